//! PTQ1_0 (GGUF type 143, PrismML): TQ1_0 with a scale for every 128 columns. 1.75 bits a weight.
//!
//! ```text
//! 128 weights → 28 bytes:  qs[24] | qh[2] | f16 scale          weight = scale · (code − 1)
//!
//!   qs[0..16]    byte m holds columns m, m+16, m+32, m+48, m+64          columns   0..80
//!   qs[16..24]   byte m holds columns m, m+8, m+16, m+24, m+32   (+80)   columns  80..120
//!   qh[0..2]     byte m holds columns m, m+2, m+4, m+6           (+120)  columns 120..128
//! ```
//!
//! Bytes are fractions in base 3, as in [`super::tq1_0`].

use super::block::Block;
use super::tq1_0::{pack_run, unpack_run};

/// The codec of one block.
pub(super) struct Ptq1_0;

/// Columns of a block.
pub const COLS: usize = 128;
/// Bytes of a block.
pub const BYTES: usize = 28;

const _: () = assert!(24 * 5 + 2 * 4 == COLS && 24 + 2 + 2 == BYTES);

impl Block<COLS, BYTES> for Ptq1_0 {
    const SCALE_AT: usize = 26;

    fn decode(block: &[u8; BYTES], codes: &mut [u8; COLS]) {
        unpack_run::<16>(&block[..16], &mut codes[..80]);
        unpack_run::<8>(&block[16..24], &mut codes[80..120]);
        unpack_run::<2>(&block[24..26], &mut codes[120..]);
    }

    fn encode(codes: &[u8; COLS], block: &mut [u8; BYTES]) {
        pack_run(&codes[..80], &mut block[..16]);
        pack_run(&codes[80..120], &mut block[16..24]);
        pack_run(&codes[120..], &mut block[24..26]);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn golden_bytes() {
        let mut codes = [1; COLS];
        codes[80..120].chunks_mut(8).zip([2, 0, 1, 2, 1]).for_each(|(plane, code)| plane[7] = code);
        codes[120..].chunks_mut(2).zip([0, 2, 2, 1]).for_each(|(plane, code)| plane[1] = code);
        let mut block = [0; BYTES];
        Ptq1_0::encode(&codes, &mut block);
        assert_eq!(block[15..17], [128, 128]); // 11111 in base 3 is 121; ⌈121 · 256 / 243⌉
        assert_eq!(block[23], 188); // 20121 is 178
        assert_eq!(block[24..], [127, 80, 0, 0]); // 11110 is 120, 02210 is 75; no scale yet
    }
}

//! TQ2_0 (GGUF type 35): 2-bit codes, a scale for every 256 columns. 2.0625 bits a weight.
//!
//! ```text
//! 256 weights → 66 bytes:  qs[64] | f16 scale                  weight = scale · (code − 1)
//!
//!   qs[0..32]    byte m holds columns m, m+32, m+64, m+96, lowest bits first   columns   0..128
//!   qs[32..64]   the same for                                                  columns 128..256
//!
//!   bit    7 6      5 4      3 2      1 0
//!        w[m+96]  w[m+64]  w[m+32]   w[m]            code 0, 1, 2 = −1, 0, +1; 3 is invalid
//! ```
//!
//! The order of bits is the reverse of I2_S.

use super::block::Block;
use super::codes::has_code_3;

/// The codec of one block.
pub(super) struct Tq2_0;

/// Columns of a block.
pub const COLS: usize = 256;
/// Bytes of a block.
pub const BYTES: usize = 66;

const _: () = assert!(64 * 4 == COLS && 64 + 2 == BYTES);

impl Block<COLS, BYTES> for Tq2_0 {
    const SCALE_AT: usize = 64;

    fn decode(block: &[u8; BYTES], codes: &mut [u8; COLS]) {
        let halves = block.as_chunks::<32>().0.iter().zip(codes.as_chunks_mut::<128>().0);
        for (bytes, codes) in halves {
            for m in 0..32 {
                codes[m] = bytes[m] & 3;
                codes[m + 32] = (bytes[m] >> 2) & 3;
                codes[m + 64] = (bytes[m] >> 4) & 3;
                codes[m + 96] = bytes[m] >> 6;
            }
        }
    }

    fn encode(codes: &[u8; COLS], block: &mut [u8; BYTES]) {
        let halves = block.as_chunks_mut::<32>().0.iter_mut().zip(codes.as_chunks::<128>().0);
        for (bytes, codes) in halves {
            for m in 0..32 {
                bytes[m] = codes[m] | codes[m + 32] << 2 | codes[m + 64] << 4 | codes[m + 96] << 6;
            }
        }
    }

    fn is_valid(block: &[u8; BYTES]) -> bool {
        !has_code_3(&block[..64])
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn golden_bytes() {
        let codes = std::array::from_fn(|c| (c % 3) as u8);
        let mut block = [0; BYTES];
        Tq2_0::encode(&codes, &mut block);
        assert_eq!(block[0], 0b00_01_10_00); // columns 0, 32, 64, 96
        assert_eq!(block[32], 0b10_00_01_10); // columns 128, 160, 192, 224
        assert_eq!(block[64..], [0, 0]); // no scale yet
    }

    #[test]
    fn code_3_is_invalid_and_the_scale_is_no_code() {
        let mut block = [0b10_01_00_10; BYTES];
        block[64..].fill(0xFF);
        assert!(Tq2_0::is_valid(&block));
        block[63] |= 0b01_00_00_00;
        assert!(!Tq2_0::is_valid(&block));
    }
}

//! Q1_0 (GGUF type 41): signs, a scale for every 128 columns. 1.125 bits a weight.
//!
//! ```text
//! 128 weights → 18 bytes:  f16 scale | bits[16]
//!
//!   bit b of byte i is column 8i + b:  0 = −scale (code 0), 1 = +scale (code 2)
//! ```
//!
//! There is no zero: a tensor with a code 1 does not fit.

use super::block::Block;

/// The codec of one block.
pub(super) struct Q1_0;

/// Columns of a block.
pub const COLS: usize = 128;
/// Bytes of a block.
pub const BYTES: usize = 18;

const _: () = assert!(2 + COLS / 8 == BYTES);

impl Block<COLS, BYTES> for Q1_0 {
    const SCALE_AT: usize = 0;
    const HAS_ZERO: bool = false;

    fn decode(block: &[u8; BYTES], codes: &mut [u8; COLS]) {
        for (byte, codes) in block[2..].iter().zip(codes.as_chunks_mut::<8>().0) {
            *codes = signs(*byte);
        }
    }

    fn encode(codes: &[u8; COLS], block: &mut [u8; BYTES]) {
        for (byte, codes) in block[2..].iter_mut().zip(codes.as_chunks::<8>().0) {
            *byte = codes.iter().enumerate().fold(0, |byte, (bit, code)| byte | (code >> 1) << bit);
        }
    }
}

/// The eight codes of a byte, by arithmetic on all of them at once.
fn signs(byte: u8) -> [u8; 8] {
    // Eight copies, each reduced to its own bit; adding 127 carries any bit to the top, bit 7.
    let own = (u64::from(byte) * 0x0101_0101_0101_0101) & 0x8040_2010_0804_0201;
    let top = own + 0x7F7F_7F7F_7F7F_7F7F;
    ((top >> 6) & 0x0202_0202_0202_0202).to_le_bytes()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn golden_bytes() {
        let mut codes = [0; COLS];
        codes[0] = 2;
        codes[7] = 2;
        codes[9] = 2;
        let mut block = [0; BYTES];
        Q1_0::encode(&codes, &mut block);
        assert_eq!(block[..5], [0, 0, 0b1000_0001, 0b0000_0010, 0]);
        let mut back = [9; COLS];
        Q1_0::decode(&block, &mut back);
        assert_eq!(back, codes);
    }

    #[test]
    fn every_byte_unpacks_bit_by_bit() {
        for byte in 0..=255u8 {
            assert_eq!(signs(byte), std::array::from_fn(|bit| 2 * (byte >> bit & 1)));
        }
    }
}

//! Q2_0 (GGUF type 42): 2-bit codes in the order of the columns, a scale for every 64 or 128.
//!
//! ```text
//!  64 weights → 18 bytes:  f16 scale | qs[16]      2.25 bits a weight  (ggml)
//! 128 weights → 34 bytes:  f16 scale | qs[32]      2.125 bits a weight (older Bonsai files under
//!                                                  the same type id; PQ2_0, type 142)
//!
//!   bit    7 6      5 4      3 2      1 0
//!        w[4i+3]  w[4i+2]  w[4i+1]   w[4i]           weight = scale · (code − 1)
//! ```
//!
//! Code 3 is +2 and valid. Which of the two blocks a file of type 42 has follows from the distance
//! of its tensors; see `gguf`.

use super::block::Block;

/// The codec of a block of 64.
pub(super) struct Q2_0;
/// The codec of a block of 128.
pub(super) struct Q2_0G128;

/// Columns of the smaller block.
pub const COLS: usize = 64;
/// Bytes of the smaller block.
pub const BYTES: usize = 18;
/// Columns of the larger block.
pub const COLS_G128: usize = 128;
/// Bytes of the larger block.
pub const BYTES_G128: usize = 34;

const _: () = assert!(2 + COLS / 4 == BYTES && 2 + COLS_G128 / 4 == BYTES_G128);

impl Block<COLS, BYTES> for Q2_0 {
    const SCALE_AT: usize = 0;
    const MAX_CODE: u8 = 3;

    fn decode(block: &[u8; BYTES], codes: &mut [u8; COLS]) {
        unpack(&block[2..], codes);
    }

    fn encode(codes: &[u8; COLS], block: &mut [u8; BYTES]) {
        pack(codes, &mut block[2..]);
    }
}

impl Block<COLS_G128, BYTES_G128> for Q2_0G128 {
    const SCALE_AT: usize = 0;
    const MAX_CODE: u8 = 3;

    fn decode(block: &[u8; BYTES_G128], codes: &mut [u8; COLS_G128]) {
        unpack(&block[2..], codes);
    }

    fn encode(codes: &[u8; COLS_G128], block: &mut [u8; BYTES_G128]) {
        pack(codes, &mut block[2..]);
    }
}

/// The four codes of every byte: a load beats the shifts of consecutive pairs.
static CODES: [[u8; 4]; 256] = {
    let mut table = [[0; 4]; 256];
    let mut byte = 0;
    while byte < 256 {
        table[byte] = [byte as u8 & 3, byte as u8 >> 2 & 3, byte as u8 >> 4 & 3, byte as u8 >> 6];
        byte += 1;
    }
    table
};

fn unpack(bytes: &[u8], codes: &mut [u8]) {
    for (byte, codes) in bytes.iter().zip(codes.as_chunks_mut::<4>().0) {
        *codes = CODES[usize::from(*byte)];
    }
}

fn pack(codes: &[u8], bytes: &mut [u8]) {
    for (byte, codes) in bytes.iter_mut().zip(codes.as_chunks::<4>().0) {
        *byte = codes[0] | codes[1] << 2 | codes[2] << 4 | codes[3] << 6;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn golden_bytes() {
        let mut codes = [1; COLS];
        codes[..8].copy_from_slice(&[0, 1, 2, 3, 3, 2, 1, 0]);
        let mut block = [0; BYTES];
        Q2_0::encode(&codes, &mut block);
        assert_eq!(block[..5], [0, 0, 0b11_10_01_00, 0b00_01_10_11, 0b01_01_01_01]);
    }

    #[test]
    fn every_byte_survives() {
        for byte in 0..=255 {
            let (mut codes, mut back) = ([9; 4], [0]);
            unpack(&[byte], &mut codes);
            pack(&codes, &mut back);
            assert_eq!(back[0], byte);
        }
    }
}

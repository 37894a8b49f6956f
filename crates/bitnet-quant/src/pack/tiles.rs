//! TILES, this project's own packing (GGUF type 1620): the layout its fastest kernels multiply, so
//! that a mapped file needs no repacking. 1.6 bits a weight, one scale for the whole tensor.
//!
//! ```text
//! a tile is 16 rows, stored as steps of 20 columns: 64 bytes, 4 for each row
//!
//!   step   row 0: 4 bytes | row 1: 4 bytes | … | row 15: 4 bytes
//!   byte b of a row = c[b] + 3·c[b+4] + 9·c[b+8] + 27·c[b+12] + 81·c[b+16]
//!                     c: codes of the 20 columns, 0, 1, 2 = −1, 0, +1; bytes above 242 are invalid
//!
//! tensor: tile after tile, each step after step; rows and columns are padded with code 0
//!         f32 scale, little-endian          weight = scale · (code − 1)
//!         60 bytes that mean nothing
//! ```
//!
//! The bytes are the same on every machine; a CPU whose kernels want others repacks them as it does
//! any packing. Other programs do not know this type.

use crate::error::{Error, Result};
use bitnet_core::kernels::{Kernels, Packing, STEP_BYTES, TILE_ROWS};
use rayon::prelude::*;

/// Columns of a step.
pub const COLS: usize = Packing::Trits.step_cols();
/// Bytes after the codes: the scale and padding.
pub const TAIL: usize = 64;

const _: () = assert!(COLS == 20 && STEP_BYTES == 64 && TILE_ROWS == 16);

/// Most a byte of five base-3 digits can be.
const MAX_BYTE: u8 = 242;

/// Bytes of a tile of `cols` columns.
fn tile_bytes(cols: usize) -> usize {
    cols.div_ceil(COLS) * STEP_BYTES
}

/// Bytes of a matrix, if that is a size in memory.
pub(crate) fn bytes(rows: usize, cols: usize) -> Option<usize> {
    let tile_bytes = cols.div_ceil(COLS).checked_mul(STEP_BYTES)?;
    rows.div_ceil(TILE_ROWS).checked_mul(tile_bytes)?.checked_add(TAIL)
}

/// Checks the codes and reads the scale.
pub(super) fn validate(what: &str, bytes: &[u8]) -> Result<f32> {
    let (codes, tail) = bytes.split_at(bytes.len() - TAIL);
    let chunks = codes.par_chunks(1 << 16);
    // A maximum of all, which compiles to vector code; a search would stop at each byte.
    let largest = chunks.map(|chunk| chunk.iter().fold(0, |max, &byte| byte.max(max))).max();
    if let Some(byte) = largest.filter(|&byte| byte > MAX_BYTE) {
        let expected = format!("bytes up to {MAX_BYTE}");
        return Err(Error::malformed(format!("{what} in TILES"), expected, byte));
    }
    let scale = f32::from_le_bytes([tail[0], tail[1], tail[2], tail[3]]);
    match scale.is_finite() {
        true => Ok(scale),
        false => Err(Error::malformed(format!("scale of {what}"), "a finite number", scale)),
    }
}

/// Writes the codes of row `row` into `out`. `bytes` are those of the whole tensor.
pub(super) fn decode_row(bytes: &[u8], row: usize, out: &mut [u8]) {
    let tile = &bytes[row / TILE_ROWS * tile_bytes(out.len())..][..tile_bytes(out.len())];
    for (step, codes) in tile.as_chunks::<STEP_BYTES>().0.iter().zip(out.chunks_mut(COLS)) {
        let word = &step[row % TILE_ROWS * 4..][..4];
        let mut digits = [0; COLS];
        for (b, &byte) in word.iter().enumerate() {
            let mut rest = byte;
            for field in 0..5 {
                digits[4 * field + b] = rest % 3;
                rest /= 3;
            }
        }
        codes.copy_from_slice(&digits[..codes.len()]);
    }
}

/// Packs the codes of up to 16 rows, `cols` each, into the bytes of a tile.
pub(super) fn encode_tile(codes: &[u8], cols: usize, out: &mut [u8]) {
    let padded_cols = cols.next_multiple_of(COLS);
    let mut padded = vec![0; TILE_ROWS * padded_cols];
    for (padded, row) in padded.chunks_exact_mut(padded_cols).zip(codes.chunks_exact(cols)) {
        padded[..cols].copy_from_slice(row);
    }
    Kernels::available()[0].pack_tile(Packing::Trits, &padded, out);
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_tile_lies_as_in_the_picture() {
        // Row 1 of 25 columns: codes 0, 1, 2, 0, 1, …
        let cols = 25;
        let mut codes = vec![0; 2 * cols];
        for (col, code) in codes[cols..].iter_mut().enumerate() {
            *code = (col % 3) as u8;
        }
        let mut tile = vec![9; tile_bytes(cols)];
        encode_tile(&codes, cols, &mut tile);
        assert_eq!(tile.len(), 2 * 64);
        // Columns 0, 4, 8, 12, 16 are 0, 1, 2, 0, 1; and so on; then columns 20 to 24 as 2, 0, 1, 2 | 0.
        let first = [3 + 2 * 9 + 81, 1 + 2 * 3 + 27 + 81 * 2, 2 + 9 + 27 * 2, 3 + 2 * 9 + 81];
        assert_eq!(&tile[4..8], &first);
        assert_eq!(&tile[64 + 4..64 + 8], &[2, 0, 1, 2]);
        assert!(
            tile[..4].iter().chain(&tile[8..64]).all(|&byte| byte == 0),
            "other rows are padding"
        );
    }
}

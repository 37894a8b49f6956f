//! The packed form of Hugging Face checkpoints (`quant_method: bitnet`): scales stand beside it.
//!
//! ```text
//! a matrix (rows, cols) → R = ⌈rows / 4⌉ rows of `cols` bytes; byte (r, c) holds column c of rows
//! r, r+R, r+2R, r+3R, lowest bits first
//!
//!   bit       7 6          5 4         3 2        1 0
//!        w[r+3R, c]   w[r+2R, c]   w[r+R, c]    w[r, c]     code 0, 1, 2 = −1, 0, +1; 3 is invalid
//! ```
//!
//! Codes of rows beyond the last are 0. Whether `weight_scale` multiplies or divides is the
//! checkpoint's business; see `hf`.

use super::codes::unpack_plane;

/// Rows of bytes for `rows` rows of weights.
pub const fn packed_rows(rows: usize) -> usize {
    rows.div_ceil(4)
}

/// Writes the codes of row `row` of `rows` into `out`.
pub(super) fn decode_row(bytes: &[u8], rows: usize, row: usize, out: &mut [u8]) {
    let packed = packed_rows(rows);
    let start = row % packed * out.len();
    unpack_plane(&bytes[start..start + out.len()], row / packed, out);
}

/// Adds the codes of row `row` of `rows` to `bytes`, the zeroed packed row that holds it.
pub(super) fn encode_row(rows: usize, row: usize, codes: &[u8], bytes: &mut [u8]) {
    let plane = row / packed_rows(rows);
    for (byte, code) in bytes.iter_mut().zip(codes) {
        *byte |= code << (2 * plane);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn golden_bytes() {
        // One column of eight rows in two bytes: rows 0, 2, 4, 6 and rows 1, 3, 5, 7.
        let column = [0, 1, 1, 0, 2, 1, 2, 2];
        let mut bytes = [0; 2];
        for (row, code) in column.iter().enumerate() {
            encode_row(8, row, &[*code], &mut bytes[row % 2..row % 2 + 1]);
        }
        assert_eq!(bytes, [0b10_10_01_00, 0b10_01_00_01]);
        for (row, code) in column.iter().enumerate() {
            let mut out = [9];
            decode_row(&bytes, 8, row, &mut out);
            assert_eq!(out[0], *code);
        }
    }
}

//! I2_S, the 2-bit packing of bitnet.cpp (GGUF type 36): one scale for the whole tensor.
//!
//! ```text
//! 128 weights of a row → 32 bytes; byte i holds columns i, i+32, i+64, i+96, highest bits first
//!
//!   bit    7 6      5 4      3 2      1 0
//!        w[i]     w[i+32]  w[i+64]  w[i+96]        code 0, 1, 2 = −1, 0, +1; 3 is invalid
//!
//! tensor: rows · cols / 4 bytes of codes, row after row
//!         f32 scale, little-endian          weight = scale · (code − 1)
//!         28 bytes that mean nothing
//! ```
//!
//! Two builds of bitnet.cpp wrote something else under the same type id, with the same length, the
//! same tail and no mark: [`I2sLayout`] names them. Knows nothing of GGUF.

use super::codes::first_code_3;
use crate::error::{Error, Result};
use std::fmt;
use std::str::FromStr;

/// Columns of a block.
pub const COLS: usize = 128;
/// Bytes of a block.
pub const BYTES: usize = 32;
/// Bytes after the codes: the scale and padding.
pub const TAIL: usize = 32;

const _: () = assert!(BYTES * 4 == COLS && TAIL >= size_of::<f32>());

/// How the codes of an I2_S tensor are ordered.
///
/// Nothing in the bytes of one tensor tells the layouts apart: they permute the same codes. The
/// tensors of a trained model together do, see `GgufFile::detect_i2s_layout`; where they do not,
/// [`I2sLayout::Canonical128`] is assumed, and the others must be asked for by who knows where the
/// file was made.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Hash)]
pub enum I2sLayout {
    /// 128 columns in 32 bytes: what x86 builds write and the published files hold.
    #[default]
    Canonical128,
    /// 64 columns in 16 bytes, byte `i` holding columns `i, i+16, i+32, i+48`: quantized by an ARM
    /// build of late 2025 or after.
    Arm64,
    /// Byte `c` of a group of four rows holds column `c` of each of them, first row in the highest
    /// bits: quantized by an x86 build without `ACT_PARALLEL`.
    FourRows,
}

impl fmt::Display for I2sLayout {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

impl FromStr for I2sLayout {
    type Err = Error;

    fn from_str(name: &str) -> Result<Self> {
        let layout = Self::ALL.into_iter().find(|layout| layout.name() == name);
        layout.ok_or_else(|| {
            Error::unsupported("I2_S layout", name, Self::ALL.map(Self::name).join(", "))
        })
    }
}

impl I2sLayout {
    /// All layouts, the canonical one first.
    pub const ALL: [Self; 3] = [Self::Canonical128, Self::Arm64, Self::FourRows];

    /// Short name, as [`fmt::Display`] writes and [`FromStr`] reads it.
    pub const fn name(self) -> &'static str {
        match self {
            Self::Canonical128 => "canonical",
            Self::Arm64 => "arm64",
            Self::FourRows => "four-rows",
        }
    }

    /// Checks that a matrix of this shape can be laid out so.
    pub(super) fn check_shape(self, what: &str, rows: usize, cols: usize) -> Result<()> {
        let (fits, expected) = match self {
            Self::Canonical128 => (cols.is_multiple_of(128), "columns divisible by 128"),
            Self::Arm64 => (cols.is_multiple_of(64), "columns divisible by 64"),
            Self::FourRows => (rows.is_multiple_of(4), "rows divisible by 4"),
        };
        if fits {
            return Ok(());
        }
        Err(Error::malformed(
            format!("{what} in I2_S"),
            expected,
            format!("{rows} rows, {cols} columns"),
        ))
    }

    /// Writes the codes of row `row` into `out`. `bytes` are the codes of the whole tensor.
    pub(super) fn decode_row(self, bytes: &[u8], row: usize, out: &mut [u8]) {
        let cols = out.len();
        match self {
            Self::Canonical128 => decode_planes::<32, 128>(&bytes[row * cols / 4..], out),
            Self::Arm64 => decode_planes::<16, 64>(&bytes[row * cols / 4..], out),
            Self::FourRows => {
                let shift = 6 - 2 * (row % 4);
                for (code, byte) in out.iter_mut().zip(&bytes[row / 4 * cols..]) {
                    *code = (byte >> shift) & 3;
                }
            }
        }
    }

    /// Adds the codes of row `row` to `bytes`, the zeroed codes of the rows that share bytes with
    /// it: that row alone, or its group of four.
    pub(crate) fn encode_row(self, row: usize, codes: &[u8], bytes: &mut [u8]) {
        match self {
            Self::Canonical128 => encode_planes::<32, 128>(codes, bytes),
            Self::Arm64 => encode_planes::<16, 64>(codes, bytes),
            Self::FourRows => {
                let shift = 6 - 2 * (row % 4);
                for (code, byte) in codes.iter().zip(bytes) {
                    *byte |= code << shift;
                }
            }
        }
    }

    /// Rows that share bytes.
    pub(crate) fn rows_together(self) -> usize {
        if self == Self::FourRows { 4 } else { 1 }
    }
}

fn decode_planes<const N: usize, const COLS: usize>(bytes: &[u8], out: &mut [u8]) {
    const { assert!(COLS == 4 * N) };
    for (block, codes) in bytes.as_chunks::<N>().0.iter().zip(out.as_chunks_mut::<COLS>().0) {
        for i in 0..N {
            codes[i] = block[i] >> 6;
            codes[i + N] = (block[i] >> 4) & 3;
            codes[i + 2 * N] = (block[i] >> 2) & 3;
            codes[i + 3 * N] = block[i] & 3;
        }
    }
}

fn encode_planes<const N: usize, const COLS: usize>(codes: &[u8], bytes: &mut [u8]) {
    const { assert!(COLS == 4 * N) };
    for (codes, block) in codes.as_chunks::<COLS>().0.iter().zip(bytes.as_chunks_mut::<N>().0) {
        for i in 0..N {
            block[i] = codes[i] << 6 | codes[i + N] << 4 | codes[i + 2 * N] << 2 | codes[i + 3 * N];
        }
    }
}

/// Checks a tensor's bytes (codes and tail) and returns its scale. The length was checked before.
pub(super) fn validate(what: &str, bytes: &[u8]) -> Result<f32> {
    let (codes, tail) = bytes.split_at(bytes.len() - TAIL);
    let scale = f32::from_le_bytes([tail[0], tail[1], tail[2], tail[3]]);
    if !scale.is_finite() {
        return Err(Error::malformed(format!("scale of {what}"), "a finite number", scale));
    }
    match first_code_3(codes) {
        None => Ok(scale),
        Some(position) => Err(Error::malformed(
            format!("{what} in I2_S"),
            "the codes 0, 1 and 2",
            format!("code 3 in byte {position} of {}", codes.len()),
        )),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Column c has code c mod 3.
    fn ramp(cols: usize) -> Vec<u8> {
        (0..cols).map(|c| (c % 3) as u8).collect()
    }

    #[test]
    fn golden_bytes() {
        let mut bytes = vec![0; 32];
        I2sLayout::Canonical128.encode_row(0, &ramp(128), &mut bytes);
        // Columns 0, 32, 64, 96 have codes 0, 2, 1, 0; columns 1, 33, 65, 97 have 1, 0, 2, 1.
        assert_eq!(bytes[..3], [0b00_10_01_00, 0b01_00_10_01, 0b10_01_00_10]);

        let mut bytes = vec![0; 16];
        I2sLayout::Arm64.encode_row(0, &ramp(64), &mut bytes);
        // Columns 0, 16, 32, 48 have codes 0, 1, 2, 0.
        assert_eq!(bytes[..2], [0b00_01_10_00, 0b01_10_00_01]);

        let mut bytes = vec![0; 2];
        for (row, codes) in [[0, 1], [1, 2], [2, 0], [0, 1]].iter().enumerate() {
            I2sLayout::FourRows.encode_row(row, codes, &mut bytes);
        }
        assert_eq!(bytes, [0b00_01_10_00, 0b01_10_00_01]);
    }

    #[test]
    fn names_are_read_back() {
        for layout in I2sLayout::ALL {
            assert_eq!(layout.to_string().parse::<I2sLayout>().unwrap(), layout);
        }
        let message = "neon".parse::<I2sLayout>().unwrap_err().to_string();
        assert_eq!(
            message,
            "I2_S layout neon is not supported; supported: canonical, arm64, four-rows"
        );
    }

    #[test]
    fn the_scale_stands_after_the_codes_and_must_be_finite() {
        let mut bytes = vec![0b01010101; 32];
        bytes.extend(0.75f32.to_le_bytes());
        bytes.resize(64, 0xEE);
        assert_eq!(validate("w", &bytes).unwrap(), 0.75);
        bytes[32..36].copy_from_slice(&f32::NAN.to_le_bytes());
        let message = validate("w", &bytes).unwrap_err().to_string();
        assert_eq!(message, "scale of w: expected a finite number, got NaN");
    }

    #[test]
    fn code_3_is_found_wherever_it_stands() {
        for position in [0, 31, 32, 63] {
            for shift in [0, 2, 4, 6] {
                let mut bytes = vec![0b10_10_10_10; 64];
                bytes[position] |= 3 << shift;
                bytes.resize(96, 0);
                let message = validate("w", &bytes).unwrap_err().to_string();
                assert!(message.contains(&format!("code 3 in byte {position} of 64")), "{message}");
            }
        }
    }
}

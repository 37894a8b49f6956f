//! Float matrices as files hold them: plain numbers, or ggml's blocks of small integers with scales.
//!
//! [`FloatTensor`] checks lengths and scales once and then serves rows as f32; [`encode_float`] is
//! the reverse for the formats that embeddings and heads are stored in. Block layouts are in
//! [`super::float_block`] and [`super::kquant`]. Plain numbers are not looked at before they are
//! used: a NaN in them comes out as NaN.

use super::float_block::{FloatBlock, Q4_0, Q4_1, Q5_0, Q5_1, Q8_0};
use super::half_float::{f16_to_f32, half_at};
use super::kquant::{Q4K, Q5K, Q6K};
use super::{PARALLEL_BYTES, float_block, kquant};
use crate::error::{Error, Result};
use crate::mapping::FileBytes;
use bitnet_core::weights::{FloatRows, FloatType};
use bytes::Bytes;
use half::{bf16, f16};
use rayon::prelude::*;
use std::fmt;

/// Number format of a float matrix.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[non_exhaustive]
pub enum FloatFormat {
    /// Numbers in a row.
    Plain(FloatType),
    /// 8-bit integers, a scale for 32.
    Q8_0,
    /// 4-bit integers, a scale for 32.
    Q4_0,
    /// 4-bit integers, a scale and a minimum for 32.
    Q4_1,
    /// 5-bit integers, a scale for 32.
    Q5_0,
    /// 5-bit integers, a scale and a minimum for 32.
    Q5_1,
    /// 4-bit integers in blocks of 256.
    Q4K,
    /// 5-bit integers in blocks of 256.
    Q5K,
    /// 6-bit integers in blocks of 256.
    Q6K,
}

impl fmt::Display for FloatFormat {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Plain(FloatType::F32) => "F32",
            Self::Plain(FloatType::F16) => "F16",
            Self::Plain(FloatType::BF16) => "BF16",
            Self::Q8_0 => "Q8_0",
            Self::Q4_0 => "Q4_0",
            Self::Q4_1 => "Q4_1",
            Self::Q5_0 => "Q5_0",
            Self::Q5_1 => "Q5_1",
            Self::Q4K => "Q4_K",
            Self::Q5K => "Q5_K",
            Self::Q6K => "Q6_K",
        })
    }
}

impl FloatFormat {
    /// Columns and bytes of a block; `(1, size)` for plain numbers.
    pub const fn block(self) -> (usize, usize) {
        match self {
            Self::Plain(number) => (1, number.size()),
            Self::Q8_0 => (float_block::COLS, float_block::Q8_0_BYTES),
            Self::Q4_0 => (float_block::COLS, float_block::Q4_0_BYTES),
            Self::Q4_1 => (float_block::COLS, float_block::Q4_1_BYTES),
            Self::Q5_0 => (float_block::COLS, float_block::Q5_0_BYTES),
            Self::Q5_1 => (float_block::COLS, float_block::Q5_1_BYTES),
            Self::Q4K => (kquant::COLS, kquant::Q4K_BYTES),
            Self::Q5K => (kquant::COLS, kquant::Q5K_BYTES),
            Self::Q6K => (kquant::COLS, kquant::Q6K_BYTES),
        }
    }

    /// Bytes of the matrix `what` of shape `(rows, cols)`; an error if it cannot be stored so.
    pub fn bytes(self, what: &str, rows: usize, cols: usize) -> Result<usize> {
        let (block_cols, block_bytes) = self.block();
        let too_large = || Error::malformed(what, "a size in memory", format!("{rows} × {cols}"));
        let numbers = rows.checked_mul(cols).filter(|&n| n > 0).ok_or_else(too_large)?;
        if !cols.is_multiple_of(block_cols) {
            return Err(Error::malformed(
                format!("{what} in {self}"),
                format!("columns divisible by {block_cols}"),
                cols,
            ));
        }
        (numbers / block_cols).checked_mul(block_bytes).ok_or_else(too_large)
    }
}

/// A float matrix, checked: its bytes are as many as the shape needs, the scales of blocks finite.
#[derive(Debug, Clone)]
pub struct FloatTensor {
    format: FloatFormat,
    rows: usize,
    cols: usize,
    bytes: FileBytes,
}

impl FloatTensor {
    /// The matrix `what`. Reads the scales of blocks; on the threads of rayon if they are many.
    pub fn new(
        what: &str,
        format: FloatFormat,
        rows: usize,
        cols: usize,
        bytes: impl Into<FileBytes>,
    ) -> Result<Self> {
        let bytes = bytes.into();
        let expected = format.bytes(what, rows, cols)?;
        if bytes.len() != expected {
            return Err(Error::malformed(
                format!("{what}, {rows} × {cols} in {format}"),
                format!("{expected} bytes"),
                bytes.len(),
            ));
        }
        match format {
            FloatFormat::Plain(_) => {}
            FloatFormat::Q8_0 => check_scales::<Q8_0, _, _>(what, &bytes)?,
            FloatFormat::Q4_0 => check_scales::<Q4_0, _, _>(what, &bytes)?,
            FloatFormat::Q4_1 => check_scales::<Q4_1, _, _>(what, &bytes)?,
            FloatFormat::Q5_0 => check_scales::<Q5_0, _, _>(what, &bytes)?,
            FloatFormat::Q5_1 => check_scales::<Q5_1, _, _>(what, &bytes)?,
            FloatFormat::Q4K => check_scales::<Q4K, _, _>(what, &bytes)?,
            FloatFormat::Q5K => check_scales::<Q5K, _, _>(what, &bytes)?,
            FloatFormat::Q6K => check_scales::<Q6K, _, _>(what, &bytes)?,
        }
        Ok(Self { format, rows, cols, bytes })
    }

    /// The format of [`FloatTensor::bytes`].
    pub fn format(&self) -> FloatFormat {
        self.format
    }

    /// The matrix as stored.
    pub fn bytes(&self) -> &[u8] {
        &self.bytes
    }
}

impl FloatRows for FloatTensor {
    fn rows(&self) -> usize {
        self.rows
    }

    fn cols(&self) -> usize {
        self.cols
    }

    fn decode_row(&self, row: usize, out: &mut [f32]) {
        let (block_cols, block_bytes) = self.format.block();
        let row_bytes = self.cols / block_cols * block_bytes;
        let bytes = &self.bytes[row * row_bytes..][..row_bytes];
        match self.format {
            FloatFormat::Plain(FloatType::F32) => decode_f32(bytes, out),
            FloatFormat::Plain(FloatType::F16) => decode_f16(bytes, out),
            FloatFormat::Plain(FloatType::BF16) => decode_bf16(bytes, out),
            FloatFormat::Q8_0 => decode_blocks::<Q8_0, _, _>(bytes, out),
            FloatFormat::Q4_0 => decode_blocks::<Q4_0, _, _>(bytes, out),
            FloatFormat::Q4_1 => decode_blocks::<Q4_1, _, _>(bytes, out),
            FloatFormat::Q5_0 => decode_blocks::<Q5_0, _, _>(bytes, out),
            FloatFormat::Q5_1 => decode_blocks::<Q5_1, _, _>(bytes, out),
            FloatFormat::Q4K => decode_blocks::<Q4K, _, _>(bytes, out),
            FloatFormat::Q5K => decode_blocks::<Q5K, _, _>(bytes, out),
            FloatFormat::Q6K => decode_blocks::<Q6K, _, _>(bytes, out),
        }
    }

    fn raw(&self) -> Option<(FloatType, Bytes)> {
        match self.format {
            FloatFormat::Plain(number) => Some((number, self.bytes.as_bytes().clone())),
            _ => None,
        }
    }

    fn release(&self) {
        self.bytes.release();
    }
}

fn check_scales<B: FloatBlock<COLS, BYTES>, const COLS: usize, const BYTES: usize>(
    what: &str,
    bytes: &[u8],
) -> Result<()> {
    let blocks = bytes.as_chunks::<BYTES>().0;
    let is_bad =
        |block: &[u8; BYTES]| B::SCALES_AT.iter().any(|&at| !half_at(block, at).is_finite());
    let bad = if bytes.len() < PARALLEL_BYTES {
        blocks.iter().position(is_bad)
    } else {
        blocks.par_iter().position_first(is_bad)
    };
    match bad {
        None => Ok(()),
        Some(index) => Err(Error::malformed(
            format!("{what}, block {index} of {}", blocks.len()),
            "finite scales",
            "NaN or infinity",
        )),
    }
}

fn decode_blocks<B: FloatBlock<COLS, BYTES>, const COLS: usize, const BYTES: usize>(
    bytes: &[u8],
    out: &mut [f32],
) {
    for (block, out) in bytes.as_chunks::<BYTES>().0.iter().zip(out.as_chunks_mut::<COLS>().0) {
        B::decode(block, out);
    }
}

fn decode_f32(bytes: &[u8], out: &mut [f32]) {
    for (bytes, out) in bytes.as_chunks::<4>().0.iter().zip(out) {
        *out = f32::from_le_bytes(*bytes);
    }
}

fn decode_bf16(bytes: &[u8], out: &mut [f32]) {
    for (bytes, out) in bytes.as_chunks::<2>().0.iter().zip(out) {
        *out = f32::from_bits(u32::from(u16::from_le_bytes(*bytes)) << 16);
    }
}

fn decode_f16(bytes: &[u8], out: &mut [f32]) {
    for (bytes, out) in bytes.as_chunks::<2>().0.iter().zip(out) {
        *out = f16_to_f32(u16::from_le_bytes(*bytes));
    }
}

/// Stores the matrix `what` in `format`: a plain one, Q8_0 or Q6_K. Runs on the threads of rayon.
///
/// Errors if the shape does not fit, or a number is not finite in the format (except that F32
/// stores anything).
pub fn encode_float(format: FloatFormat, source: &dyn FloatRows, what: &str) -> Result<Vec<u8>> {
    let (rows, cols) = (source.rows(), source.cols());
    let does_not_fit = |reason| Error::does_not_fit(what, format, reason);
    let encode_row = match format {
        FloatFormat::Plain(FloatType::F32) => encode_f32,
        FloatFormat::Plain(FloatType::F16) => encode_f16,
        FloatFormat::Plain(FloatType::BF16) => encode_bf16,
        FloatFormat::Q8_0 => float_block::encode_q8_0,
        FloatFormat::Q6K => kquant::encode_q6_k,
        _ => return Err(Error::unsupported("writing", format, "F32, F16, BF16, Q8_0, Q6_K")),
    };
    let len = format.bytes(what, rows, cols).map_err(|error| does_not_fit(error.to_string()))?;
    let mut bytes = vec![0; len];
    bytes
        .par_chunks_exact_mut(len / rows)
        .enumerate()
        .map_init(
            || vec![0.0; cols],
            |numbers, (row, bytes)| {
                source.decode_row(row, numbers);
                let finite = encode_row(numbers, bytes);
                finite.then_some(()).ok_or(row)
            },
        )
        .collect::<Result<(), usize>>()
        .map_err(|row| does_not_fit(format!("row {row} has numbers that are not finite in it")))?;
    Ok(bytes)
}

fn encode_f32(numbers: &[f32], bytes: &mut [u8]) -> bool {
    for (number, bytes) in numbers.iter().zip(bytes.as_chunks_mut().0) {
        *bytes = number.to_le_bytes();
    }
    true
}

fn encode_f16(numbers: &[f32], bytes: &mut [u8]) -> bool {
    let mut finite = true;
    for (number, bytes) in numbers.iter().zip(bytes.as_chunks_mut().0) {
        let half = f16::from_f32(*number);
        finite &= half.is_finite();
        *bytes = half.to_le_bytes();
    }
    finite
}

fn encode_bf16(numbers: &[f32], bytes: &mut [u8]) -> bool {
    let mut finite = true;
    for (number, bytes) in numbers.iter().zip(bytes.as_chunks_mut().0) {
        let half = bf16::from_f32(*number);
        finite &= half.is_finite();
        *bytes = half.to_le_bytes();
    }
    finite
}

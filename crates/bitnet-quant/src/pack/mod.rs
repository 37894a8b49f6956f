//! Packings: how weights lie in bytes, one file for each layout.
//!
//! [`TernaryTensor`] checks the bytes of a ternary matrix once and then serves its rows as codes,
//! whatever the packing; [`encode`] is the reverse for any source of codes. [`FloatTensor`] and
//! [`encode_float`] do the same for the float matrices beside them. Knows no files: names are only
//! for messages.

mod block;
mod codes;
pub mod float;
pub mod float_block;
pub mod hf_u8;
pub mod i2_s;
pub mod kquant;
pub mod ptq1_0;
pub mod q1_0;
pub mod q2_0;
pub mod tiles;
pub mod tq1_0;
pub mod tq2_0;

mod encode;
mod half_float;

pub use encode::{Encoded, encode};
pub use float::{FloatFormat, FloatTensor, encode_float};
pub use i2_s::I2sLayout;

use crate::error::{Error, Result};
use crate::mapping::FileBytes;
use bitnet_core::kernels;
use bitnet_core::weights::{Scales, TernaryRows};
use bytes::Bytes;
use std::fmt;

/// Tensors of this many bytes are checked on several threads: those of rayon.
const PARALLEL_BYTES: usize = 1 << 20;

/// A layout of ternary weights in bytes.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum Packing {
    /// bitnet.cpp, 2 bits, one scale: [`i2_s`].
    I2S(I2sLayout),
    /// ggml, base 3, a scale for 256 columns: [`tq1_0`].
    Tq1_0,
    /// ggml, 2 bits, a scale for 256 columns: [`tq2_0`].
    Tq2_0,
    /// ggml, 2 bits, a scale for 64 columns, +2 possible: [`q2_0`].
    Q2_0,
    /// PrismML, 2 bits, a scale for 128 columns, +2 possible: [`q2_0`].
    Q2_0G128,
    /// ggml, signs, a scale for 128 columns: [`q1_0`].
    Q1_0,
    /// PrismML, base 3, a scale for 128 columns: [`ptq1_0`].
    Ptq1_0,
    /// Ours, base 3, one scale, as the kernels read it: [`tiles`].
    Tiles,
    /// Hugging Face, 2 bits, scales beside it: [`hf_u8`].
    HfU8,
}

impl fmt::Display for Packing {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::I2S(I2sLayout::Canonical128) => "I2_S",
            Self::I2S(I2sLayout::Arm64) => "I2_S (arm64)",
            Self::I2S(I2sLayout::FourRows) => "I2_S (four-rows)",
            Self::Tq1_0 => "TQ1_0",
            Self::Tq2_0 => "TQ2_0",
            Self::Q2_0 => "Q2_0",
            Self::Q2_0G128 => "Q2_0 (groups of 128)",
            Self::Q1_0 => "Q1_0",
            Self::Ptq1_0 => "PTQ1_0",
            Self::Tiles => "TILES",
            Self::HfU8 => "packed uint8",
        })
    }
}

impl Packing {
    /// Whether scales lie among the bytes, not beside them.
    pub const fn has_scales(self) -> bool {
        !matches!(self, Self::HfU8)
    }

    /// Columns and bytes of a block, for packings that cut rows into blocks.
    pub const fn block(self) -> Option<(usize, usize)> {
        Some(match self {
            Self::Tq1_0 => (tq1_0::COLS, tq1_0::BYTES),
            Self::Tq2_0 => (tq2_0::COLS, tq2_0::BYTES),
            Self::Q2_0 => (q2_0::COLS, q2_0::BYTES),
            Self::Q2_0G128 => (q2_0::COLS_G128, q2_0::BYTES_G128),
            Self::Q1_0 => (q1_0::COLS, q1_0::BYTES),
            Self::Ptq1_0 => (ptq1_0::COLS, ptq1_0::BYTES),
            Self::I2S(_) | Self::Tiles | Self::HfU8 => return None,
        })
    }

    /// Bytes of the matrix `what` of shape `(rows, cols)`; an error if it cannot be packed so.
    pub fn bytes(self, what: &str, rows: usize, cols: usize) -> Result<usize> {
        let too_large = || Error::malformed(what, "a size in memory", format!("{rows} × {cols}"));
        let weights = rows.checked_mul(cols).filter(|&n| n > 0).ok_or_else(too_large)?;
        match self {
            Self::I2S(layout) => {
                layout.check_shape(what, rows, cols)?;
                Ok(weights / 4 + i2_s::TAIL)
            }
            Self::Tiles => tiles::bytes(rows, cols).ok_or_else(too_large),
            Self::HfU8 => Ok(hf_u8::packed_rows(rows) * cols),
            _ => {
                // Every other packing has blocks.
                let (block_cols, block_bytes) = self.block().unwrap_or((1, 1));
                if !cols.is_multiple_of(block_cols) {
                    return Err(Error::malformed(
                        format!("{what} in {self}"),
                        format!("columns divisible by {block_cols}"),
                        cols,
                    ));
                }
                (weights / block_cols).checked_mul(block_bytes).ok_or_else(too_large)
            }
        }
    }
}

/// A ternary matrix in one of the packings, checked: its bytes are as many as the shape needs, its
/// codes are valid, its scales finite.
#[derive(Debug, Clone)]
pub struct TernaryTensor {
    packing: Packing,
    rows: usize,
    cols: usize,
    bytes: FileBytes,
    scales: Scales,
}

impl TernaryTensor {
    /// The matrix `what` in a packing that has its scales among the bytes.
    ///
    /// Where all groups of a row, or of the matrix, share a scale, [`Scales::Row`] or
    /// [`Scales::Tensor`] says so. Reads all bytes; on the threads of rayon if they are many.
    pub fn new(
        what: &str,
        packing: Packing,
        rows: usize,
        cols: usize,
        bytes: impl Into<FileBytes>,
    ) -> Result<Self> {
        let bytes = bytes.into();
        check_len(what, packing, rows, cols, &bytes)?;
        let scales = match packing {
            Packing::I2S(_) => Scales::Tensor(i2_s::validate(what, &bytes)?),
            Packing::Tiles => Scales::Tensor(tiles::validate(what, &bytes)?),
            Packing::Tq1_0 => block::read_scales::<tq1_0::Tq1_0, _, _>(what, &bytes, cols)?,
            Packing::Tq2_0 => block::read_scales::<tq2_0::Tq2_0, _, _>(what, &bytes, cols)?,
            Packing::Q2_0 => block::read_scales::<q2_0::Q2_0, _, _>(what, &bytes, cols)?,
            Packing::Q2_0G128 => block::read_scales::<q2_0::Q2_0G128, _, _>(what, &bytes, cols)?,
            Packing::Q1_0 => block::read_scales::<q1_0::Q1_0, _, _>(what, &bytes, cols)?,
            Packing::Ptq1_0 => block::read_scales::<ptq1_0::Ptq1_0, _, _>(what, &bytes, cols)?,
            Packing::HfU8 => {
                return Err(Error::malformed(what, "scales beside the codes", "none"));
            }
        };
        Ok(Self { packing, rows, cols, bytes, scales })
    }

    /// The matrix `what` in [`Packing::HfU8`], with the scales beside it.
    pub fn with_scales(
        what: &str,
        packing: Packing,
        rows: usize,
        cols: usize,
        bytes: impl Into<FileBytes>,
        scales: Scales,
    ) -> Result<Self> {
        let bytes = bytes.into();
        if packing.has_scales() {
            return Err(Error::malformed(what, "scales among the bytes", "scales beside them"));
        }
        check_len(what, packing, rows, cols, &bytes)?;
        check_scales(what, rows, cols, &scales)?;
        if let Some(position) = codes::first_code_3(&bytes) {
            return Err(Error::malformed(
                format!("{what} in {packing}"),
                "the codes 0, 1 and 2",
                format!("code 3 in byte {position} of {}", bytes.len()),
            ));
        }
        Ok(Self { packing, rows, cols, bytes, scales })
    }

    /// The layout of [`TernaryTensor::bytes`].
    pub fn packing(&self) -> Packing {
        self.packing
    }

    /// The packed matrix, as it came.
    pub fn bytes(&self) -> &[u8] {
        &self.bytes
    }
}

impl TernaryRows for TernaryTensor {
    fn rows(&self) -> usize {
        self.rows
    }

    fn cols(&self) -> usize {
        self.cols
    }

    fn scales(&self) -> &Scales {
        &self.scales
    }

    fn decode_row(&self, row: usize, out: &mut [u8]) {
        let bytes = &self.bytes[..];
        match self.packing {
            Packing::I2S(layout) => layout.decode_row(&bytes[..bytes.len() - i2_s::TAIL], row, out),
            Packing::Tq1_0 => block::decode_row::<tq1_0::Tq1_0, _, _>(bytes, row, out),
            Packing::Tq2_0 => block::decode_row::<tq2_0::Tq2_0, _, _>(bytes, row, out),
            Packing::Q2_0 => block::decode_row::<q2_0::Q2_0, _, _>(bytes, row, out),
            Packing::Q2_0G128 => block::decode_row::<q2_0::Q2_0G128, _, _>(bytes, row, out),
            Packing::Q1_0 => block::decode_row::<q1_0::Q1_0, _, _>(bytes, row, out),
            Packing::Ptq1_0 => block::decode_row::<ptq1_0::Ptq1_0, _, _>(bytes, row, out),
            Packing::Tiles => tiles::decode_row(&bytes[..bytes.len() - tiles::TAIL], row, out),
            Packing::HfU8 => hf_u8::decode_row(bytes, self.rows, row, out),
        }
    }

    fn tiles(&self) -> Option<(kernels::Packing, Bytes)> {
        let codes = ..self.bytes.len().saturating_sub(tiles::TAIL);
        let is_tiles = self.packing == Packing::Tiles;
        is_tiles.then(|| (kernels::Packing::Trits, self.bytes.slice(codes).as_bytes().clone()))
    }

    fn release(&self) {
        self.bytes.release();
    }
}

fn check_len(what: &str, packing: Packing, rows: usize, cols: usize, bytes: &[u8]) -> Result<()> {
    let expected = packing.bytes(what, rows, cols)?;
    if bytes.len() == expected {
        return Ok(());
    }
    Err(Error::malformed(
        format!("{what}, {rows} × {cols} in {packing}"),
        format!("{expected} bytes"),
        bytes.len(),
    ))
}

/// Checks that there are as many scales as the shape demands, all finite.
fn check_scales(what: &str, rows: usize, cols: usize, scales: &Scales) -> Result<()> {
    let what = || format!("scales of {what}");
    let (values, expected) = match scales {
        Scales::Tensor(scale) => (std::slice::from_ref(scale), 1),
        Scales::Row(values) => (&values[..], rows),
        Scales::Group { group, values } => {
            if *group == 0 || !group.is_multiple_of(16) {
                return Err(Error::malformed(what(), "groups of a multiple of 16", group));
            }
            (&values[..], rows.saturating_mul(cols.div_ceil(*group)))
        }
    };
    if values.len() != expected {
        return Err(Error::malformed(what(), expected, values.len()));
    }
    match values.iter().find(|scale| !scale.is_finite()) {
        None => Ok(()),
        Some(scale) => Err(Error::malformed(what(), "finite numbers", scale)),
    }
}

#[cfg(test)]
mod tests;

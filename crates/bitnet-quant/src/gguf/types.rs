//! Tensor types and tensor descriptions of GGUF.
//!
//! Type ids are kept as the file has them; what an id means to this crate is answered by
//! [`TensorType`]. Knows no bytes: reading is in [`super::read`], writing in [`super::write`].

use crate::error::{Error, Result};
use crate::pack::{FloatFormat, I2sLayout, Packing, i2_s, tiles};
use bitnet_core::weights::FloatType;
use std::fmt;
use std::ops::Range;

/// The id of a tensor's number format, as the file has it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct TensorType(pub u32);

/// Id, name, columns and bytes of a block of every type whose size is known.
///
/// 36 is bitnet.cpp's; upstream has retired it. 39 is MXFP4, and in bitnet.cpp's files TL2.
const TENSOR_TYPES: [(u32, &str, usize, usize); 34] = [
    (0, "F32", 1, 4),
    (1, "F16", 1, 2),
    (2, "Q4_0", 32, 18),
    (3, "Q4_1", 32, 20),
    (6, "Q5_0", 32, 22),
    (7, "Q5_1", 32, 24),
    (8, "Q8_0", 32, 34),
    (10, "Q2_K", 256, 84),
    (11, "Q3_K", 256, 110),
    (12, "Q4_K", 256, 144),
    (13, "Q5_K", 256, 176),
    (14, "Q6_K", 256, 210),
    (16, "IQ2_XXS", 256, 66),
    (17, "IQ2_XS", 256, 74),
    (18, "IQ3_XXS", 256, 98),
    (19, "IQ1_S", 256, 50),
    (20, "IQ4_NL", 32, 18),
    (21, "IQ3_S", 256, 110),
    (22, "IQ2_S", 256, 82),
    (23, "IQ4_XS", 256, 136),
    (24, "I8", 1, 1),
    (25, "I16", 1, 2),
    (26, "I32", 1, 4),
    (27, "I64", 1, 8),
    (28, "F64", 1, 8),
    (29, "IQ1_M", 256, 56),
    (30, "BF16", 1, 2),
    (34, "TQ1_0", 256, 54),
    (35, "TQ2_0", 256, 66),
    (39, "MXFP4", 32, 17),
    (40, "NVFP4", 64, 36),
    (41, "Q1_0", 128, 18),
    (142, "PQ2_0", 128, 34),
    (143, "PTQ1_0", 128, 28),
];

impl TensorType {
    /// IEEE single.
    pub const F32: Self = Self(0);
    /// IEEE half.
    pub const F16: Self = Self(1);
    /// bfloat16.
    pub const BF16: Self = Self(30);
    /// Bytes with a sign.
    pub const I8: Self = Self(24);
    /// bitnet.cpp's ternary type.
    pub const I2_S: Self = Self(36);
    /// ggml's 2-bit type; its block is of 64 columns, in older PrismML files of 128.
    pub const Q2_0: Self = Self(42);

    /// This project's own ternary type.
    pub const TILES: Self = Self(1620);

    fn known(self) -> Option<&'static (u32, &'static str, usize, usize)> {
        TENSOR_TYPES.iter().find(|known| known.0 == self.0)
    }

    /// Columns and bytes of a block, for types where the id alone says it.
    pub(super) fn block(self) -> Option<(usize, usize)> {
        self.known().map(|&(_, _, cols, bytes)| (cols, bytes))
    }

    /// The packing of ternary weights of this type, I2_S being taken as canonical. For
    /// [`TensorType::Q2_0`] the file has to be asked.
    pub fn packing(self) -> Option<Packing> {
        Some(match self.0 {
            34 => Packing::Tq1_0,
            35 => Packing::Tq2_0,
            36 => Packing::I2S(I2sLayout::Canonical128),
            41 => Packing::Q1_0,
            142 => Packing::Q2_0G128,
            143 => Packing::Ptq1_0,
            1620 => Packing::Tiles,
            _ => return None,
        })
    }

    /// The type for weights in `packing`, if GGUF has one.
    pub fn of_packing(packing: Packing) -> Option<Self> {
        Some(Self(match packing {
            Packing::Tq1_0 => 34,
            Packing::Tq2_0 => 35,
            Packing::I2S(_) => 36,
            Packing::Q1_0 => 41,
            Packing::Q2_0 => 42,
            Packing::Q2_0G128 => 142,
            Packing::Ptq1_0 => 143,
            Packing::Tiles => 1620,
            _ => return None,
        }))
    }

    /// The format of float numbers of this type, if this crate decodes it.
    pub fn float_format(self) -> Option<FloatFormat> {
        Some(match self.0 {
            0 => FloatFormat::Plain(FloatType::F32),
            1 => FloatFormat::Plain(FloatType::F16),
            2 => FloatFormat::Q4_0,
            3 => FloatFormat::Q4_1,
            6 => FloatFormat::Q5_0,
            7 => FloatFormat::Q5_1,
            8 => FloatFormat::Q8_0,
            12 => FloatFormat::Q4K,
            13 => FloatFormat::Q5K,
            14 => FloatFormat::Q6K,
            30 => FloatFormat::Plain(FloatType::BF16),
            _ => return None,
        })
    }

    /// The type for floats in `format`.
    pub fn of_float(format: FloatFormat) -> Self {
        Self(match format {
            FloatFormat::Plain(FloatType::F32) => 0,
            FloatFormat::Plain(FloatType::F16) => 1,
            FloatFormat::Plain(FloatType::BF16) => 30,
            FloatFormat::Q4_0 => 2,
            FloatFormat::Q4_1 => 3,
            FloatFormat::Q5_0 => 6,
            FloatFormat::Q5_1 => 7,
            FloatFormat::Q8_0 => 8,
            FloatFormat::Q4K => 12,
            FloatFormat::Q5K => 13,
            FloatFormat::Q6K => 14,
        })
    }

    /// Bytes of a tensor of this type; `block` overrides the block the id implies.
    pub(super) fn bytes(
        self,
        what: &str,
        shape: &[usize],
        block: Option<(usize, usize)>,
    ) -> Result<usize> {
        let got = || format!("shape {shape:?} in {self}");
        let too_large = || Error::malformed(what, "a size in memory", got());
        let n =
            shape.iter().try_fold(1usize, |n, &dim| n.checked_mul(dim)).ok_or_else(too_large)?;
        if self == Self::I2_S {
            if !n.is_multiple_of(4) {
                return Err(Error::malformed(what, "a multiple of 4 weights", got()));
            }
            return Ok(n / 4 + i2_s::TAIL);
        }
        if self == Self::TILES {
            let cols = shape.last().copied().unwrap_or(1);
            return n
                .checked_div(cols)
                .and_then(|rows| tiles::bytes(rows, cols))
                .ok_or_else(too_large);
        }
        let (block_cols, block_bytes) = block.or(self.block()).ok_or_else(|| self.unknown(what))?;
        if !shape.last().is_some_and(|cols| cols.is_multiple_of(block_cols)) {
            let expected = format!("columns divisible by {block_cols}");
            return Err(Error::malformed(what, expected, got()));
        }
        (n / block_cols).checked_mul(block_bytes).ok_or_else(too_large)
    }

    /// The error for a type whose size is not known.
    pub(super) fn unknown(self, what: &str) -> Error {
        let what = format!("type of {what}");
        match self.0 {
            38 => Error::unsupported(
                what,
                "38 (TL1 of bitnet.cpp, laid out for one machine)",
                "I2_S, TQ1_0, TQ2_0, Q2_0; convert the original checkpoint again",
            ),
            id => Error::malformed(what, "a type of ggml, bitnet.cpp or PrismML", id),
        }
    }
}

impl fmt::Display for TensorType {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match (*self, self.known()) {
            (Self::I2_S, _) => f.write_str("I2_S"),
            (Self::Q2_0, _) => f.write_str("Q2_0"),
            (Self::TILES, _) => f.write_str("TILES"),
            (_, Some((_, name, ..))) => f.write_str(name),
            (Self(id), None) => write!(f, "type {id}"),
        }
    }
}

/// A tensor in a file.
#[derive(Debug, Clone, PartialEq)]
pub struct TensorInfo {
    /// Unique in its file.
    pub name: String,
    /// Outermost dimension first (the reverse of the file's order), one to four, none of them 0.
    pub shape: Vec<usize>,
    /// Number format, as the file has it.
    pub tensor_type: TensorType,
    /// The packing of ternary types.
    pub packing: Option<Packing>,
    /// Where its bytes are in the file.
    pub range: Range<usize>,
}

impl TensorInfo {
    /// Number of weights.
    pub fn n_elements(&self) -> usize {
        self.shape.iter().product()
    }

    /// `(rows, cols)`: columns are the last dimension, rows all others.
    pub fn matrix_shape(&self) -> (usize, usize) {
        let cols = self.shape.last().copied().unwrap_or(1);
        (self.n_elements() / cols, cols)
    }
}

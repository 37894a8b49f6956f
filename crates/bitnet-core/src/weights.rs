//! Weights on their way from a file to a device: who they are, not how a kernel wants them.
//!
//! A backend reads rows through [`TernaryRows`] and [`FloatRows`] and lays them out as its kernels
//! like it. Sources decode on demand, so no second full copy of a model ever exists.
//! Knows nothing of files; `bitnet-quant` implements these traits for every packing.

use crate::error::{Error, Result};
use crate::kernels::Packing;
use bytes::Bytes;
use std::sync::Arc;

/// Largest number of columns a ternary matrix may have.
///
/// Kernels sum `code × activation` in 32-bit integers with up to 6 bits of head-room taken by
/// fields that were not shifted down: `3·64 · 128 · cols/4 < 2³¹` holds below 349,525.
pub const MAX_TERNARY_COLS: usize = 262_144;

/// What one unit of a ternary code is worth.
#[derive(Debug, Clone, PartialEq)]
pub enum Scales {
    /// One scale for the whole matrix (BitNet b1.58).
    Tensor(f32),
    /// One scale for each output row, length `rows` (fused or sharded checkpoints).
    Row(Vec<f32>),
    /// One scale for each `group` consecutive columns of each row; row-major
    /// `(rows, cols.div_ceil(group))`. `group` is a multiple of 16.
    Group {
        /// Columns that share a scale.
        group: usize,
        /// `(rows, cols.div_ceil(group))`, row-major.
        values: Vec<f32>,
    },
}

/// How the input of a ternary product is quantized.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum ActivationQuant {
    /// 8-bit absmax over the whole token: what BitNet b1.58 models are trained with.
    PerToken,
    /// 8-bit absmax over groups of this many columns: for ternary weights trained with float
    /// activations. A multiple of 16 that divides or equals the weight group.
    PerGroup(usize),
}

/// A ternary matrix `(rows, cols)` = `(out_features, in_features)`, as codes.
///
/// Code `c` stands for the value `c − 1`: 0, 1, 2 are −1, 0, +1. Code 3 (+2) occurs only in
/// packings that define it.
pub trait TernaryRows: Send + Sync {
    /// Output features.
    fn rows(&self) -> usize;
    /// Input features.
    fn cols(&self) -> usize;
    /// What a code is worth.
    fn scales(&self) -> &Scales;
    /// Writes the codes of row `row` (`< rows`), one per byte, into `out` (length `cols`).
    fn decode_row(&self, row: usize, out: &mut [u8]);
    /// The matrix as tiles in this packing (see [`PackedTernary`](crate::kernels::PackedTernary)),
    /// where that is what the source holds, every byte below 243: a backend may keep these bytes
    /// (perhaps a file mapping) instead of a copy. No alignment is promised.
    fn tiles(&self) -> Option<(Packing, Bytes)> {
        None
    }
    /// Tells the source that nothing will be read from it for a while, so that mapped file pages
    /// may be dropped from memory.
    fn release(&self) {}
}

/// Columns that share a scale come in multiples of this.
const GROUP_UNIT: usize = 16;

/// Checks that scales and groups fit a ternary matrix and each other, as backends rely on.
///
/// # Errors
/// [`Error::Invalid`] for a group that is no multiple of 16 or does not divide the weights' group or
/// a matrix that is too wide, [`Error::Shape`] for a wrong number of scales.
pub fn check_ternary(weights: &dyn TernaryRows, activations: ActivationQuant) -> Result<()> {
    let (rows, cols) = (weights.rows(), weights.cols());
    if cols > MAX_TERNARY_COLS {
        let reason = format!("{cols} columns are more than {MAX_TERNARY_COLS}");
        return Err(Error::invalid("ternary matrix", reason));
    }
    let check_group = |what: &str, group: usize| match group {
        0 => Err(Error::invalid(what, "0 columns")),
        _ if !group.is_multiple_of(GROUP_UNIT) => {
            Err(Error::invalid(what, format!("{group} is not a multiple of {GROUP_UNIT}")))
        }
        _ => Ok(()),
    };
    if let ActivationQuant::PerGroup(group) = activations {
        check_group("group of activations", group)?;
    }
    match weights.scales() {
        Scales::Tensor(_) => Ok(()),
        Scales::Row(values) if values.len() == rows => Ok(()),
        Scales::Row(values) => Err(Error::shape("scales of rows", rows, values.len())),
        Scales::Group { group, values } => {
            check_group("group of weights", *group)?;
            let n_groups = cols.div_ceil(*group);
            if rows.checked_mul(n_groups) != Some(values.len()) {
                let expected = format!("{rows} × {n_groups}");
                return Err(Error::shape("scales of groups", expected, values.len()));
            }
            match activations {
                ActivationQuant::PerGroup(inner) if !group.is_multiple_of(inner) => {
                    let reason = format!("{inner} does not divide the weights' group of {group}");
                    Err(Error::invalid("group of activations", reason))
                }
                _ => Ok(()),
            }
        }
    }
}

/// Number format of a float matrix held as raw bytes.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum FloatType {
    /// IEEE single, 4 bytes.
    F32,
    /// IEEE half, 2 bytes.
    F16,
    /// bfloat16, 2 bytes.
    BF16,
}

impl FloatType {
    /// Bytes of one number.
    pub const fn size(self) -> usize {
        match self {
            Self::F32 => 4,
            Self::F16 | Self::BF16 => 2,
        }
    }
}

/// A float matrix rounded to bytes, with bounds of what that lost: enough to find the rows that can
/// have the largest products with a vector. Made by [`crate::cpu::round_rows`].
#[derive(Debug, Clone)]
pub struct RoundedRows {
    /// Tiles of 16 rows in steps of 64 bytes, four columns of each row; a byte is
    /// `128 + round(w / scale)`. Rows and columns are padded with 128.
    pub codes: Bytes,
    /// For each row of the tiles the scale, at least the norm of the rounded row, and at least the
    /// norm of its difference to the exact one: three little-endian f32.
    pub bounds: Bytes,
}

/// A float matrix `(rows, cols)`: embeddings, heads, unquantized projections.
pub trait FloatRows: Send + Sync {
    /// Output features, or vocabulary size.
    fn rows(&self) -> usize;
    /// Input features, or hidden size.
    fn cols(&self) -> usize;
    /// Writes row `row` (`< rows`) into `out` (length `cols`).
    fn decode_row(&self, row: usize, out: &mut [f32]);
    /// The matrix as little-endian, row-major numbers without padding, where that is what the
    /// source holds: a backend may keep these bytes (perhaps a file mapping) instead of a copy.
    /// No alignment is promised.
    fn raw(&self) -> Option<(FloatType, Bytes)> {
        None
    }
    /// A rounded copy of the matrix, where the source holds one: an output head need not make it
    /// then.
    fn rounded(&self) -> Option<RoundedRows> {
        None
    }
    /// As [`TernaryRows::release`].
    fn release(&self) {}
}

/// The matrix of a projection.
#[derive(Clone)]
pub enum Matrix {
    /// Ternary weights with 8-bit activations.
    Ternary {
        /// The codes and scales.
        weights: Arc<dyn TernaryRows>,
        /// How the input is quantized.
        activations: ActivationQuant,
    },
    /// Float weights with float activations.
    Float(Arc<dyn FloatRows>),
}

impl Matrix {
    /// `(rows, cols)`.
    pub fn shape(&self) -> (usize, usize) {
        match self {
            Self::Ternary { weights, .. } => (weights.rows(), weights.cols()),
            Self::Float(weights) => (weights.rows(), weights.cols()),
        }
    }
}

/// A root-mean-square norm: `y = x / sqrt(mean(x²) + eps) · weight`, in f32.
#[derive(Debug, Clone, PartialEq)]
pub struct NormWeights {
    /// One factor per feature.
    pub weight: Vec<f32>,
    /// Added to the mean square.
    pub eps: f32,
}

/// A linear projection `y = W·norm(x) + b`.
#[derive(Clone)]
pub struct LinearWeights {
    /// `W`, shape `(out_features, in_features)`.
    pub matrix: Matrix,
    /// `b`, length `out_features`.
    pub bias: Option<Vec<f32>>,
    /// A norm of this projection's own, applied to its input after any norm the block applies.
    pub input_norm: Option<NormWeights>,
}

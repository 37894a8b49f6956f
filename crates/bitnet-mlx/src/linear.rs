//! Projections: ternary ones as exact 2-bit affine products, float ones in f32.
//!
//! MLX multiplies floats with codes `c` in groups: `Σ (scale·c + bias)·x`. A trit is `c − 1`, so scale
//! 1 and bias −1 are exact, and with activations on the grid of 8-bit integers every partial sum is an
//! integer below 2²⁴ in f32: the same bits in any order. What a unit is worth is multiplied after.

use crate::array::{Array, Codes, Ops};
use crate::ffi::dtype;
use crate::fused::Fused;
use crate::memory::{Placed, Pool};
use bitnet_core::memory::AccessPattern;
use bitnet_core::weights::{
    ActivationQuant, FloatRows, LinearWeights, Matrix, NormWeights, Scales, TernaryRows,
    check_ternary,
};
use bitnet_core::{Error, Result};
use std::collections::HashMap;
use std::sync::Arc;

/// Groups MLX knows, the best first.
const GROUPS: [usize; 3] = [128, 64, 32];
/// Codes in a word.
const CODES: usize = 16;

/// A norm on the device.
pub struct MlxNorm {
    weight: Placed,
    width: usize,
    eps: f32,
    /// What it was made from, to tell whether two are the same.
    source: NormWeights,
}

impl MlxNorm {
    pub(crate) fn new(ops: &Ops, pool: &Pool, weights: &NormWeights) -> Result<Self> {
        let width = weights.weight.len();
        let weight = Placed::floats(ops, pool, &weights.weight, &[width])?;
        Ok(Self { weight, width, eps: weights.eps, source: weights.clone() })
    }

    /// Features.
    pub(crate) fn width(&self) -> usize {
        self.width
    }

    /// Normalizes the last axis of `x`.
    pub(crate) fn apply(&self, ops: &Ops, x: &Array) -> Result<Array> {
        if x.shape().last() != Some(&self.width) {
            return Err(Error::shape("norm", self.width, format!("{:?}", x.shape())));
        }
        ops.rms_norm(x, self.weight.array(), self.eps)
    }
}

/// Scales 1 and biases −1 that ternary matrices of one shape share.
#[derive(Default)]
pub(crate) struct Units(HashMap<(usize, usize), Arc<(Placed, Placed)>>);

impl Units {
    fn get(
        &mut self,
        ops: &Ops,
        pool: &Pool,
        rows: usize,
        groups: usize,
    ) -> Result<Arc<(Placed, Placed)>> {
        // A pair nobody uses any more is made anew.
        self.0.retain(|_, pair| Arc::strong_count(pair) > 1);
        if let Some(pair) = self.0.get(&(rows, groups)) {
            return Ok(pair.clone());
        }
        let shape = [rows, groups];
        let ones = Placed::floats(ops, pool, &vec![1.0; rows * groups], &shape)?;
        let minus = Placed::floats(ops, pool, &vec![-1.0; rows * groups], &shape)?;
        let pair = Arc::new((ones, minus));
        self.0.insert((rows, groups), pair.clone());
        Ok(pair)
    }
}

/// A projection on the device.
pub struct MlxLinear {
    rows: usize,
    cols: usize,
    weights: Weights,
    bias: Option<Placed>,
    pub(crate) input_norm: Option<MlxNorm>,
    /// What the arrays lie in.
    _places: Vec<Placed>,
    _units: Option<Arc<(Placed, Placed)>>,
}

enum Weights {
    Ternary {
        codes: Codes,
        /// Columns with padding: a multiple of the group.
        padded: usize,
        /// `(1)` or `(rows)`: what a unit of a row's integer sum is worth; `None` where groups have
        /// scales of their own.
        scale: Option<Array>,
        activations: ActivationQuant,
    },
    /// Numbers, for inputs that are quantized or not.
    Dense {
        /// `(cols, rows)`, a transposed view.
        columns: Array,
        activations: Option<ActivationQuant>,
    },
}

/// An input that projections share: quantized as their weights want it.
pub(crate) struct Prepared {
    key: Option<(ActivationQuant, usize)>,
    /// `(tokens, padded)`
    x: Array,
    /// `(tokens, 1)`: what a unit is worth, where the sum is to be multiplied by it.
    scale: Option<Array>,
}

impl MlxLinear {
    pub(crate) fn new(
        ops: &Ops,
        pool: &Pool,
        units: &mut Units,
        weights: &LinearWeights,
    ) -> Result<Self> {
        let (rows, cols) = weights.matrix.shape();
        if rows == 0 || cols == 0 {
            return Err(Error::invalid("projection", format!("{rows} × {cols} is empty")));
        }
        let bias = match &weights.bias {
            Some(bias) if bias.len() != rows => {
                return Err(Error::shape("bias of a projection", rows, bias.len()));
            }
            Some(bias) => Some(Placed::floats(ops, pool, bias, &[rows])?),
            None => None,
        };
        let input_norm = match &weights.input_norm {
            Some(norm) if norm.weight.len() != cols => {
                let got = norm.weight.len();
                return Err(Error::shape("input norm of a projection", cols, got));
            }
            Some(norm) => Some(MlxNorm::new(ops, pool, norm)?),
            None => None,
        };
        let mut linear = Self {
            rows,
            cols,
            weights: Weights::Dense { columns: ops.zeros(&[1], dtype::F32)?, activations: None },
            bias,
            input_norm,
            _places: Vec::new(),
            _units: None,
        };
        match &weights.matrix {
            Matrix::Ternary { weights, activations } => {
                linear.place_ternary(ops, pool, units, &**weights, *activations)?;
                weights.release();
            }
            Matrix::Float(weights) => {
                let placed = dense(ops, pool, rows, cols, |row, out| weights.decode_row(row, out))?;
                let columns = columns(ops, &placed)?;
                linear.weights = Weights::Dense { columns, activations: None };
                linear._places.push(placed);
                weights.release();
            }
        }
        Ok(linear)
    }

    fn place_ternary(
        &mut self,
        ops: &Ops,
        pool: &Pool,
        units: &mut Units,
        weights: &dyn TernaryRows,
        activations: ActivationQuant,
    ) -> Result<()> {
        let (rows, cols) = (self.rows, self.cols);
        check_ternary(weights, activations)?;
        // Of MLX's groups, the largest that divides those of the scales.
        let group = match weights.scales() {
            Scales::Group { group, .. } => {
                let fits = GROUPS.into_iter().find(|mlx| group.is_multiple_of(*mlx));
                match fits {
                    Some(fits) => fits,
                    None => return self.place_dense(ops, pool, weights, activations),
                }
            }
            Scales::Tensor(_) | Scales::Row(_) => {
                let fits = GROUPS.into_iter().find(|mlx| cols.is_multiple_of(*mlx));
                fits.unwrap_or(GROUPS[GROUPS.len() - 1])
            }
        };
        let padded = cols.next_multiple_of(group);
        let words = rows.checked_mul(padded / CODES);
        let words = words.ok_or_else(|| Error::invalid("projection", "too large"))?;
        let shape = [rows, padded / CODES];
        let pattern = AccessPattern::Weights;
        let codes = Placed::new(ops, pool, pattern, words, dtype::U32, &shape, |bytes| {
            let mut row_codes = vec![0u8; cols];
            for (row, out) in bytes.chunks_exact_mut(padded / 4).enumerate() {
                weights.decode_row(row, &mut row_codes);
                pack(&row_codes, out);
            }
        })?;
        let n_groups = padded / group;
        let (scales, biases, scale);
        match weights.scales() {
            Scales::Group { group: scale_group, values } => {
                let repeat = scale_group / group;
                let expanded = |sign: f32| -> Vec<f32> {
                    let per_row = values.chunks_exact(cols.div_ceil(*scale_group));
                    let rows = per_row.map(|row| {
                        (0..n_groups).map(move |g| sign * row[(g / repeat).min(row.len() - 1)])
                    });
                    rows.flatten().collect()
                };
                let shape = [rows, n_groups];
                let places =
                    [1.0, -1.0].map(|sign| Placed::floats(ops, pool, &expanded(sign), &shape));
                let [s, b] = places;
                let (s, b) = (s?, b?);
                (scales, biases, scale) = (s.array().clone(), b.array().clone(), None);
                self._places.extend([s, b]);
            }
            Scales::Tensor(_) | Scales::Row(_) => {
                let pair = units.get(ops, pool, rows, n_groups)?;
                (scales, biases) = (pair.0.array().clone(), pair.1.array().clone());
                let values = match weights.scales() {
                    Scales::Row(values) => values.clone(),
                    Scales::Tensor(value) => vec![*value],
                    Scales::Group { .. } => Vec::new(),
                };
                let placed = Placed::floats(ops, pool, &values, &[values.len()])?;
                scale = Some(placed.array().clone());
                self._places.push(placed);
                self._units = Some(pair);
            }
        }
        let words = codes.array().clone();
        self._places.push(codes);
        let codes = Codes { words, scales, biases, group };
        self.weights = Weights::Ternary { codes, padded, scale, activations };
        Ok(())
    }

    /// Ternary weights in groups that MLX has no codes for: as numbers.
    fn place_dense(
        &mut self,
        ops: &Ops,
        pool: &Pool,
        weights: &dyn TernaryRows,
        activations: ActivationQuant,
    ) -> Result<()> {
        let (rows, cols) = (self.rows, self.cols);
        let placed = dense(ops, pool, rows, cols, |row, out| {
            let mut codes = vec![0; cols];
            weights.decode_row(row, &mut codes);
            for (col, (out, code)) in out.iter_mut().zip(codes).enumerate() {
                let scale = match weights.scales() {
                    Scales::Tensor(scale) => *scale,
                    Scales::Row(values) => values[row],
                    Scales::Group { group, values } => {
                        values[row * cols.div_ceil(*group) + col / group]
                    }
                };
                *out = (f32::from(code) - 1.0) * scale;
            }
        })?;
        let columns = columns(ops, &placed)?;
        self.weights = Weights::Dense { columns, activations: Some(activations) };
        self._places.push(placed);
        Ok(())
    }

    /// Output features.
    pub(crate) fn rows(&self) -> usize {
        self.rows
    }

    /// Input features.
    pub(crate) fn cols(&self) -> usize {
        self.cols
    }

    /// Whether `prepared`, made for a projection with the same norms, serves this one too.
    pub(crate) fn accepts(&self, prepared: &Prepared) -> bool {
        self.key() == prepared.key
    }

    fn key(&self) -> Option<(ActivationQuant, usize)> {
        match &self.weights {
            Weights::Ternary { activations, padded, .. } => Some((*activations, *padded)),
            Weights::Dense { activations, .. } => activations.map(|a| (a, self.cols)),
        }
    }

    /// Whether `other` applies the same norm of its own.
    pub(crate) fn same_norm(&self, other: &Self) -> bool {
        let source = |linear: &Self| linear.input_norm.as_ref().map(|norm| norm.source.clone());
        source(self) == source(other)
    }

    /// Quantizes `x` `(tokens, cols)`, all norms applied, as the weights want it.
    pub(crate) fn prepare(&self, ops: &Ops, fused: &Fused, x: &Array) -> Result<Prepared> {
        let key = self.key();
        let Some((activations, padded)) = key else {
            return Ok(Prepared { key, x: x.clone(), scale: None });
        };
        let tokens = x.shape()[0];
        match activations {
            ActivationQuant::PerToken => {
                let (codes, scale) = fused.quantize(x)?;
                Ok(Prepared { key, x: ops.pad_last(&codes, padded)?, scale: Some(scale) })
            }
            ActivationQuant::PerGroup(group) => {
                let n_groups = self.cols.div_ceil(group);
                let x = ops.pad_last(x, n_groups * group)?;
                let x = ops.reshape(&x, &[tokens, n_groups, group])?;
                let (codes, scale) = fused.quantize(&x)?;
                let x = ops.multiply(&codes, &scale)?;
                let x = ops.reshape(&x, &[tokens, n_groups * group])?;
                let x = match n_groups * group > padded {
                    true => ops.transpose(
                        &ops.slice_rows(&ops.transpose(&x, &[1, 0])?, 0, padded)?,
                        &[1, 0],
                    )?,
                    false => ops.pad_last(&x, padded)?,
                };
                Ok(Prepared { key, x, scale: None })
            }
        }
    }

    /// `W·x + b`, `(tokens, rows)`.
    pub(crate) fn product(&self, ops: &Ops, input: &Prepared) -> Result<Array> {
        let mut y = match &self.weights {
            Weights::Dense { columns, .. } => ops.matmul(&input.x, columns)?,
            Weights::Ternary { codes, .. } => ops.quantized_matmul(&input.x, codes)?,
        };
        let of_rows = match &self.weights {
            Weights::Ternary { scale, .. } => scale.as_ref(),
            Weights::Dense { .. } => None,
        };
        for scale in [input.scale.as_ref(), of_rows].into_iter().flatten() {
            y = ops.multiply(&y, scale)?;
        }
        if let Some(bias) = &self.bias {
            y = ops.add(&y, bias.array())?;
        }
        Ok(y)
    }
}

/// Packs codes, one a byte, into words of 16, the first lowest; columns beyond are trits 0.
fn pack(codes: &[u8], out: &mut [u8]) {
    for (i, word) in out.as_chunks_mut::<4>().0.iter_mut().enumerate() {
        let mut value = 0u32;
        for j in 0..CODES {
            let code = codes.get(i * CODES + j).map_or(1, |&code| u32::from(code & 3));
            value |= code << (2 * j);
        }
        *word = value.to_ne_bytes();
    }
}

/// A matrix of f32, row by row.
fn dense(
    ops: &Ops,
    pool: &Pool,
    rows: usize,
    cols: usize,
    decode: impl Fn(usize, &mut [f32]),
) -> Result<Placed> {
    let words = rows.checked_mul(cols).ok_or_else(|| Error::invalid("matrix", "too large"))?;
    let shape = [rows, cols];
    Placed::new(ops, pool, AccessPattern::Weights, words, dtype::F32, &shape, |bytes| {
        let mut row_floats = vec![0.0; cols];
        for (row, out) in bytes.chunks_exact_mut(4 * cols).enumerate() {
            decode(row, &mut row_floats);
            for (out, value) in out.as_chunks_mut::<4>().0.iter_mut().zip(&row_floats) {
                *out = value.to_ne_bytes();
            }
        }
    })
}

/// A matrix as its columns: a view, made here once.
fn columns(ops: &Ops, matrix: &Placed) -> Result<Array> {
    let columns = ops.transpose(matrix.array(), &[1, 0])?;
    ops.evaluate(&[&columns]).map(|()| columns)
}

/// An embedding table or output head `(vocab, hidden)` in f32.
pub struct MlxTable {
    placed: Placed,
    transposed: Array,
    vocab: usize,
    hidden: usize,
}

impl MlxTable {
    pub(crate) fn new(ops: &Ops, pool: &Pool, source: &dyn FloatRows) -> Result<Self> {
        let (vocab, hidden) = (source.rows(), source.cols());
        if vocab == 0 || hidden == 0 {
            return Err(Error::invalid("table", format!("{vocab} × {hidden} is empty")));
        }
        let placed = dense(ops, pool, vocab, hidden, |row, out| source.decode_row(row, out))?;
        source.release();
        let transposed = columns(ops, &placed)?;
        Ok(Self { placed, transposed, vocab, hidden })
    }

    pub(crate) fn vocab(&self) -> usize {
        self.vocab
    }

    pub(crate) fn hidden(&self) -> usize {
        self.hidden
    }

    pub(crate) fn bytes(&self) -> u64 {
        self.placed.bytes()
    }

    /// `(vocab, hidden)`
    pub(crate) fn rows(&self) -> &Array {
        self.placed.array()
    }

    /// `(hidden, vocab)`
    pub(crate) fn columns(&self) -> &Array {
        &self.transposed
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn codes_lie_lowest_first_and_padding_is_zero_trits() {
        let mut out = [0; 8];
        pack(&[0, 1, 2, 3, 2], &mut out);
        assert_eq!(u32::from_ne_bytes([out[0], out[1], out[2], out[3]]), 0x5555_56E4);
        assert_eq!(out[4..], [0x55; 4]);
    }
}

//! Weights and activations for the suite: seeded, and settled so that rounding is unambiguous.

use crate::weights::{
    ActivationQuant, FloatRows, FloatType, LinearWeights, Matrix, NormWeights, Scales, TernaryRows,
};
use bytes::Bytes;
use std::sync::Arc;

/// A 64-bit linear congruential generator; its high bits are good enough to test with.
pub(super) struct Random(pub(super) u64);

impl Random {
    pub(super) fn next(&mut self) -> u32 {
        self.0 = self.0.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963);
        (self.0 >> 32) as u32
    }

    pub(super) fn below(&mut self, n: usize) -> usize {
        ((u64::from(self.next()) * n as u64) >> 32) as usize
    }

    /// In [−1, 1).
    pub(super) fn float(&mut self) -> f32 {
        self.next() as i32 as f32 / (1u32 << 31) as f32
    }

    pub(super) fn floats(&mut self, n: usize) -> Vec<f32> {
        (0..n).map(|_| self.float()).collect()
    }

    /// `0..n` in some order.
    pub(super) fn shuffled(&mut self, n: usize) -> Vec<u32> {
        let mut list: Vec<u32> = (0..n as u32).collect();
        for i in (1..n).rev() {
            list.swap(i, self.below(i + 1));
        }
        list
    }

    pub(super) fn norm(&mut self, len: usize) -> NormWeights {
        NormWeights { weight: self.floats(len).iter().map(|w| 1.0 + w / 2.0).collect(), eps: 1e-5 }
    }
}

/// A float matrix, perhaps with raw bytes.
pub(super) struct Floats {
    rows: usize,
    cols: usize,
    /// Rounded to the format of `raw`.
    values: Vec<f32>,
    raw: Option<(FloatType, Bytes)>,
}

impl Floats {
    /// `values` `(rows, cols)` in `dtype`; without raw bytes if that is `None`.
    pub(super) fn new(
        rows: usize,
        cols: usize,
        values: Vec<f32>,
        dtype: Option<FloatType>,
    ) -> Self {
        let mut bytes = Vec::new();
        let values = values
            .into_iter()
            .map(|x| match dtype {
                Some(FloatType::F32) => {
                    bytes.extend(x.to_le_bytes());
                    x
                }
                Some(FloatType::BF16) => {
                    let x = half::bf16::from_f32(x);
                    bytes.extend(x.to_le_bytes());
                    x.to_f32()
                }
                Some(FloatType::F16) => {
                    let x = half::f16::from_f32(x);
                    bytes.extend(x.to_le_bytes());
                    x.to_f32()
                }
                // A backend may keep such a source in f16, so it holds nothing finer.
                None => half::f16::from_f32(x).to_f32(),
            })
            .collect();
        let raw = dtype.map(|dtype| {
            // One byte in front, for no alignment is promised.
            bytes.insert(0, 0);
            (dtype, Bytes::from(bytes).slice(1..))
        });
        Self { rows, cols, values, raw }
    }

    pub(super) fn row(&self, row: usize) -> &[f32] {
        &self.values[row * self.cols..(row + 1) * self.cols]
    }
}

impl FloatRows for Floats {
    fn rows(&self) -> usize {
        self.rows
    }

    fn cols(&self) -> usize {
        self.cols
    }

    fn decode_row(&self, row: usize, out: &mut [f32]) {
        out.copy_from_slice(self.row(row));
    }

    fn raw(&self) -> Option<(FloatType, Bytes)> {
        self.raw.clone()
    }
}

/// A ternary matrix.
pub(super) struct Codes {
    rows: usize,
    cols: usize,
    codes: Vec<u8>,
    scales: Scales,
}

impl TernaryRows for Codes {
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
        out.copy_from_slice(&self.codes[row * self.cols..(row + 1) * self.cols]);
    }
}

/// How the scales of a ternary matrix are given.
#[derive(Debug, Clone, Copy)]
pub(super) enum ScaleKind {
    Tensor,
    Row,
    Group(usize),
}

/// A ternary projection and all that its definition needs.
pub(super) struct Ternary {
    codes: Arc<Codes>,
    pub(super) activations: ActivationQuant,
    pub(super) bias: Option<Vec<f32>>,
    pub(super) input_norm: Option<NormWeights>,
}

impl Ternary {
    /// Random codes below `n_codes` (3, or 4 where the packing knows +2), and scales around 0.02.
    pub(super) fn new(
        random: &mut Random,
        rows: usize,
        cols: usize,
        kind: ScaleKind,
        activations: ActivationQuant,
        n_codes: usize,
    ) -> Self {
        let codes = (0..rows * cols).map(|_| random.below(n_codes) as u8).collect();
        let mut scale = || 0.02 + 0.01 * random.float();
        let scales = match kind {
            ScaleKind::Tensor => Scales::Tensor(scale()),
            ScaleKind::Row => Scales::Row((0..rows).map(|_| scale()).collect()),
            ScaleKind::Group(group) => Scales::Group {
                group,
                values: (0..rows * cols.div_ceil(group)).map(|_| scale()).collect(),
            },
        };
        let codes = Arc::new(Codes { rows, cols, codes, scales });
        Self { codes, activations, bias: None, input_norm: None }
    }

    /// The scale of every weight set to `scale`.
    pub(super) fn with_scale(mut self, scale: f32) -> Self {
        let codes = Arc::get_mut(&mut self.codes).expect("not shared yet");
        codes.scales = Scales::Tensor(scale);
        self
    }

    pub(super) fn rows(&self) -> usize {
        self.codes.rows
    }

    pub(super) fn weights(&self) -> LinearWeights {
        LinearWeights {
            matrix: Matrix::Ternary { weights: self.codes.clone(), activations: self.activations },
            bias: self.bias.clone(),
            input_norm: self.input_norm.clone(),
        }
    }

    /// Columns that share an activation scale.
    fn activation_group(&self) -> usize {
        match self.activations {
            ActivationQuant::PerToken => self.codes.cols,
            ActivationQuant::PerGroup(group) => group,
        }
    }

    /// The input after `norm` and the projection's own.
    fn normed(&self, x: &[f32], norm: Option<&NormWeights>) -> Vec<f64> {
        let mut x: Vec<f64> = x.iter().copied().map(f64::from).collect();
        for norm in [norm, self.input_norm.as_ref()].into_iter().flatten() {
            x = norm_reference(&x, norm);
        }
        x
    }

    /// `(y, Σ |terms of y|)` for each row, by the definition: integer sums of trits and quantized
    /// activations, times the scales.
    pub(super) fn reference(&self, x: &[f32], norm: Option<&NormWeights>) -> Vec<(f64, f64)> {
        let x = self.normed(x, norm);
        let mut scales = Vec::new();
        let mut q = Vec::new();
        for group in x.chunks(self.activation_group()) {
            let largest = group.iter().fold(1e-5f64, |m, x| m.max(x.abs()));
            scales.push(largest / 127.0);
            q.extend(
                group.iter().map(|x| (x * 127.0 / largest).round_ties_even().clamp(-128.0, 127.0)),
            );
        }
        let cols = self.codes.cols;
        (0..self.codes.rows)
            .map(|row| {
                let (mut y, mut size) = (0.0, 0.0);
                for col in 0..cols {
                    let weight = match &self.codes.scales {
                        Scales::Tensor(scale) => *scale,
                        Scales::Row(scales) => scales[row],
                        Scales::Group { group, values } => {
                            values[row * cols.div_ceil(*group) + col / group]
                        }
                    };
                    let trit = f64::from(self.codes.codes[row * cols + col]) - 1.0;
                    let scale = f64::from(weight) * scales[col / self.activation_group()];
                    y += trit * q[col] * scale;
                    size += (trit * q[col] * scale).abs();
                }
                if let Some(bias) = &self.bias {
                    y += f64::from(bias[row]);
                    size += f64::from(bias[row].abs());
                }
                (y, size)
            })
            .collect()
    }

    /// Moves the elements of a token that are near the middle between two integers after
    /// quantization; whether there were none.
    fn settle(&self, x: &mut [f32], norm: Option<&NormWeights>) -> bool {
        /// Far above the error of a norm in f32, times 127.
        const MARGIN: f64 = 2e-3;
        let normed = self.normed(x, norm);
        let mut settled = true;
        let size = self.activation_group();
        for (group, x) in normed.chunks(size).zip(x.chunks_mut(size)) {
            let largest = group.iter().fold(1e-5f64, |m, x| m.max(x.abs()));
            for (normed, x) in group.iter().zip(x) {
                let steps = (normed * 127.0 / largest).abs();
                if (steps.fract() - 0.5).abs() < MARGIN {
                    // Less than a step towards zero, so that the largest stays the largest.
                    *x *= ((steps - 0.3) / steps) as f32;
                    settled = false;
                }
            }
        }
        settled
    }
}

/// Moves some elements of the tokens `(…, cols)` in `x`, until every correct arithmetic rounds all
/// of them alike when `linears` quantize them.
pub(super) fn settle(linears: &[&Ternary], x: &mut [f32], norm: Option<&NormWeights>) {
    for x in x.chunks_exact_mut(linears[0].codes.cols) {
        let settled = (0..1000).any(|_| {
            // One may undo another's settling, so all are asked every time.
            linears.iter().fold(true, |all, linear| linear.settle(x, norm) & all)
        });
        assert!(settled, "the activations of a test do not settle");
    }
}

/// `x / sqrt(mean(x²) + eps) · weight`.
pub(super) fn norm_reference(x: &[f64], norm: &NormWeights) -> Vec<f64> {
    let mean = x.iter().map(|x| x * x).sum::<f64>() / x.len() as f64;
    let factor = 1.0 / (mean + f64::from(norm.eps)).sqrt();
    x.iter().zip(&norm.weight).map(|(x, &w)| x * factor * f64::from(w)).collect()
}

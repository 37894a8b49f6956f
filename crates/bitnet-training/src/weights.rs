//! The projections of a model as a step multiplies with them, made anew from the masters before
//! each step.
//!
//! Forward they are the engine's own: masters go through the quantizer that loads an `online`
//! checkpoint into the layout of the engine's kernels, so that training computes what the engine
//! will. Backward the same trits, as 16-bit integers, multiply the gradients. Projections that
//! share an input are one matrix backward.

use crate::error::Result;
use crate::matmul::{View, matmul};
use crate::model::{Model, Precision};
use bitnet_core::backend::Backend;
use bitnet_core::cpu::CpuBackend;
use bitnet_core::kernels::WideMatrix;
use bitnet_core::weights::{
    ActivationQuant, FloatRows, LinearWeights, Matrix, NormWeights, Scales, TernaryRows,
};
use bitnet_quant::absmean::Absmean;
use std::ops::Range;
use std::sync::Arc;

/// A projection on the device of the engine.
pub(crate) type Linear = <CpuBackend as Backend>::Linear;

/// Projections that share an input.
pub(crate) struct Group {
    /// Forward, one after the other in the order of their rows.
    pub(crate) linears: Vec<Linear>,
    /// Output features of all together.
    pub(crate) rows: usize,
    /// Input features.
    pub(crate) cols: usize,
    /// Where the masters and their gradients stand.
    pub(crate) place: Range<usize>,
    pub(crate) back: Back,
}

/// The matrix that gradients are multiplied with.
pub(crate) enum Back {
    /// Trits, `(rows, cols)`, and what one is worth in which rows.
    Ternary { trits: WideMatrix, scales: Vec<(Range<usize>, f32)> },
    /// The masters themselves.
    Float(Arc<Vec<f32>>),
}

/// A layer's projections and norms.
pub(crate) struct Layer {
    pub(crate) input_norm: NormWeights,
    pub(crate) qkv: Group,
    pub(crate) attn_sub_norm: Option<NormWeights>,
    pub(crate) o: Group,
    pub(crate) post_attention_norm: NormWeights,
    pub(crate) gate_up: Group,
    pub(crate) ffn_sub_norm: Option<NormWeights>,
    pub(crate) down: Group,
}

/// All of a model, ready for a step.
pub(crate) struct Weights {
    pub(crate) layers: Vec<Layer>,
    pub(crate) norm: NormWeights,
    /// The masters: embedding and head are used as they are.
    pub(crate) values: Arc<Vec<f32>>,
}

impl Weights {
    /// Quantizes the masters of `model`.
    pub(crate) fn new(model: &Model, backend: &mut CpuBackend) -> Result<Self> {
        let config = model.config();
        let (hidden, ffn) = (config.hidden_size, config.intermediate_size);
        let (q_width, kv_width) = (config.query_width(), config.key_width());
        let norm = |place: &Range<usize>| NormWeights {
            weight: model.values[place.clone()].to_vec(),
            eps: config.rms_norm_eps,
        };
        let mut group = |place: &Range<usize>, rows: &[usize], cols: usize| {
            Group::new(model, backend, place.clone(), rows, cols)
        };
        let layers = model.places.layers.iter().map(|places| {
            Ok(Layer {
                input_norm: norm(&places.input_norm),
                qkv: group(&places.qkv, &[q_width, kv_width, kv_width], hidden)?,
                attn_sub_norm: places.attn_sub_norm.as_ref().map(norm),
                o: group(&places.o, &[hidden], q_width)?,
                post_attention_norm: norm(&places.post_attention_norm),
                gate_up: group(&places.gate_up, &[ffn, ffn], hidden)?,
                ffn_sub_norm: places.ffn_sub_norm.as_ref().map(norm),
                down: group(&places.down, &[hidden], ffn)?,
            })
        });
        Ok(Self {
            layers: layers.collect::<Result<_>>()?,
            norm: norm(&model.places.norm),
            values: model.values.clone(),
        })
    }
}

impl Group {
    fn new(
        model: &Model,
        backend: &mut CpuBackend,
        place: Range<usize>,
        rows: &[usize],
        cols: usize,
    ) -> Result<Self> {
        let all_rows: usize = rows.iter().sum();
        let mut linears = Vec::with_capacity(rows.len());
        let (mut codes, mut trits) = (vec![0u8; cols], Vec::new());
        let mut scales = Vec::new();
        let mut first = 0;
        for &rows in rows {
            let start = place.start + first * cols;
            let masters = Arc::new(Masters { values: model.values.clone(), start, rows, cols });
            let matrix = match model.precision() {
                Precision::Float => Matrix::Float(masters),
                Precision::Ternary => {
                    let weights: Arc<dyn TernaryRows> =
                        Arc::new(Absmean::new("master weights", masters)?);
                    let &Scales::Tensor(scale) = weights.scales() else {
                        unreachable!("absmean gives a matrix one scale")
                    };
                    scales.push((first..first + rows, scale));
                    for row in 0..rows {
                        weights.decode_row(row, &mut codes);
                        trits.extend(codes.iter().map(|&code| code as i8 - 1));
                    }
                    Matrix::Ternary { weights, activations: ActivationQuant::PerToken }
                }
            };
            linears.push(backend.linear(&LinearWeights {
                matrix,
                bias: None,
                input_norm: None,
            })?);
            first += rows;
        }
        let back = match model.precision() {
            Precision::Float => Back::Float(model.values.clone()),
            Precision::Ternary => {
                let mut wide = WideMatrix::default();
                wide.pack(&trits, cols, all_rows, cols);
                Back::Ternary { trits: wide, scales }
            }
        };
        Ok(Self { linears, rows: all_rows, cols, place, back })
    }

    /// `dx = dy·W` of a float model: `dy` `(n, rows)`, `dx` `(n, cols)`.
    pub(crate) fn float_input_gradient(&self, masters: &[f32], dy: &[f32], dx: &mut [f32]) {
        let n = dx.len() / self.cols;
        matmul(
            [n, self.cols, self.rows],
            (dx, View::rows(0, self.cols)),
            false,
            1.0,
            (dy, View::rows(0, self.rows)),
            (masters, View::rows(self.place.start, self.cols)),
        );
    }
}

/// Rows of a model's masters.
struct Masters {
    values: Arc<Vec<f32>>,
    start: usize,
    rows: usize,
    cols: usize,
}

impl FloatRows for Masters {
    fn rows(&self) -> usize {
        self.rows
    }

    fn cols(&self) -> usize {
        self.cols
    }

    fn decode_row(&self, row: usize, out: &mut [f32]) {
        out.copy_from_slice(&self.values[self.start + row * self.cols..][..self.cols]);
    }
}

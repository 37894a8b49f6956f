//! One thread of a step: windows forward and backward through the whole model.
//!
//! Forward runs the operations of the engine's CPU backend in the order of the engine's decoder,
//! and keeps what the backward pass reads. Backward goes the same way in the other direction; what
//! costs little is computed again. Knows nothing of optimizers and other threads.

use crate::attention;
use crate::distill::{Comparison, ExtraLoss, RelationGradients, Relations};
use crate::error::Result;
use crate::head::Head;
use crate::linear::{self, Input};
use crate::model::Places;
use crate::vector;
use crate::weights::{Layer, Weights};
use bitnet_core::backend::{
    Activation, Backend, Batch as Step, KvSpec, KvType, RopeSpec, SequenceSlice,
};
use bitnet_core::cpu::{CpuBackend, CpuBuffer, CpuRope, TILE_TOKENS};
use bitnet_core::kernels::Kernels;
use bitnet_core::weights::NormWeights;
use bitnet_quant::config::{HiddenAct, ModelConfig};

/// Some windows of a batch, all of equal length.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Windows<'a> {
    /// `(rows, len + 1)`
    pub(crate) tokens: &'a [u32],
    /// `(rows, len)`; empty: all count.
    pub(crate) mask: &'a [bool],
    pub(crate) rows: usize,
    pub(crate) len: usize,
}

impl Windows<'_> {
    /// What token `i` of all rows is followed by, and whether predicting it counts.
    pub(crate) fn target(&self, i: usize) -> (usize, bool) {
        let token = self.tokens[i / self.len * (self.len + 1) + i % self.len + 1];
        (token as usize, self.mask.get(i).copied().unwrap_or(true))
    }
}

/// What is to be made of some windows.
#[derive(Clone, Copy)]
pub(crate) struct Goal<'a> {
    /// One over the counted predictions of the step.
    pub(crate) scale: f32,
    /// One over all predictions of the step.
    pub(crate) scale_of_all: f32,
    pub(crate) extra: Option<&'a dyn ExtraLoss>,
}

/// Sums over windows.
#[derive(Debug, Clone, Copy, Default)]
pub(crate) struct Sums {
    /// Negative log-probabilities of the counted predictions.
    pub(crate) nats: f64,
    /// What the [`ExtraLoss`] returned.
    pub(crate) extra: f64,
    pub(crate) counted: usize,
}

/// What one layer keeps of the forward pass, `(tokens, width)` each.
struct Kept {
    x: CpuBuffer, // before attention, hidden
    q: CpuBuffer, // rotated
    k: CpuBuffer, // rotated once the backward pass begins
    v: CpuBuffer,
    attended: CpuBuffer, // q width
    middle: CpuBuffer,   // before the feed-forward block, hidden
    gate: CpuBuffer,     // intermediate
    up: CpuBuffer,       // intermediate
}

/// What a model computes on some windows, for who compares models.
pub(crate) struct Shown {
    /// After the final norm, `(n, hidden)`.
    pub(crate) hidden: Vec<f32>,
    /// Rotated queries, rotated keys and values of the layer asked for.
    pub(crate) relations: Option<[Vec<f32>; 3]>,
}

/// A thread's buffers, made for one shape of windows.
pub(crate) struct Worker {
    config: ModelConfig,
    backend: CpuBackend,
    kernels: &'static Kernels,
    rope: CpuRope,
    /// Cosines, then sines, of each position, `(positions, head_dim)`.
    angles: Vec<f32>,
    shape: Option<Buffers>,
    /// Gradients of the step, as the masters lie; empty before the first.
    pub(crate) gradients: Vec<f32>,
    scratch: linear::Scratch,
    attention: attention::Scratch,
    head: Head,
}

/// Buffers for windows of one shape.
struct Buffers {
    rows: usize,
    len: usize,
    kv: <CpuBackend as Backend>::Kv,
    layers: Vec<Kept>,
    out: CpuBuffer,   // after the last layer, hidden
    gated: CpuBuffer, // intermediate
}

impl Worker {
    /// A thread for models of this shape.
    pub(crate) fn new(config: &ModelConfig) -> Result<Self> {
        let mut backend = CpuBackend::new(Some(1), None)?;
        let rope = backend.rope(&RopeSpec {
            inv_freq: config.rope_frequencies(),
            max_positions: config.max_position_embeddings,
            magnitude: config.rope_attention_factor() as f32,
        })?;
        Ok(Self {
            config: config.clone(),
            kernels: backend.kernels(),
            backend,
            rope,
            angles: Vec::new(),
            shape: None,
            gradients: Vec::new(),
            scratch: linear::Scratch::default(),
            attention: attention::Scratch::default(),
            head: Head::default(),
        })
    }

    /// Loss and gradients of some windows; gradients are added to [`Worker::gradients`].
    pub(crate) fn learn(
        &mut self,
        weights: &Weights,
        places: &Places,
        windows: Windows<'_>,
        goal: Goal<'_>,
    ) -> Result<Sums> {
        let comparison = match goal.extra {
            Some(extra) => Some(extra.look(windows.tokens, windows.rows, windows.len)?),
            None => None,
        };
        self.forward(weights, places, windows)?;
        self.backward(weights, places, windows, goal, comparison)
    }

    /// Loss of some windows.
    pub(crate) fn measure(
        &mut self,
        weights: &Weights,
        places: &Places,
        windows: Windows<'_>,
    ) -> Result<Sums> {
        self.forward(weights, places, windows)?;
        let n = windows.rows * windows.len;
        let shape = self.shape.as_ref().expect("made by `forward`");
        let hidden = shape.out.rows(n)?;
        self.head.normalize(self.kernels, hidden, &weights.norm);
        Ok(self.head.loss(&weights.values, places, &self.config, windows))
    }

    /// Runs the windows forward and shows hidden states, and queries, keys and values of a layer.
    pub(crate) fn show(
        &mut self,
        weights: &Weights,
        places: &Places,
        windows: Windows<'_>,
        layer: Option<usize>,
    ) -> Result<Shown> {
        self.forward(weights, places, windows)?;
        let n = windows.rows * windows.len;
        let shape = self.shape.as_mut().expect("made by `forward`");
        self.head.normalize(self.kernels, shape.out.rows(n)?, &weights.norm);
        let hidden = self.head.hidden().to_vec();
        let Some(layer) = layer else { return Ok(Shown { hidden, relations: None }) };
        let kept = &mut shape.layers[layer];
        rotate_keys(&self.angles, &self.config, windows.len, kept.k.rows_mut(n)?);
        let relations =
            [kept.q.rows(n)?.to_vec(), kept.k.rows(n)?.to_vec(), kept.v.rows(n)?.to_vec()];
        Ok(Shown { hidden, relations: Some(relations) })
    }

    /// Makes room for windows of this shape.
    fn prepare(&mut self, rows: usize, len: usize) -> Result<()> {
        if self.shape.as_ref().is_some_and(|shape| shape.rows >= rows && shape.len == len) {
            return Ok(());
        }
        self.shape = None;
        let (config, backend, n) = (&self.config, &mut self.backend, rows * len);
        let block_tokens = len.next_multiple_of(TILE_TOKENS);
        let kv = backend.kv_cache(KvSpec {
            n_layers: 1, // attention follows at once, so that layers can share it
            n_kv_heads: config.num_key_value_heads,
            head_dim: config.head_dim,
            block_tokens,
            n_blocks: rows,
            dtype: KvType::F32,
        })?;
        let (hidden, ffn) = (config.hidden_size, config.intermediate_size);
        let (q_width, kv_width) = (config.query_width(), config.key_width());
        let mut layers = Vec::with_capacity(config.num_hidden_layers);
        for _ in 0..config.num_hidden_layers {
            layers.push(Kept {
                x: backend.buffer(n, hidden)?,
                q: backend.buffer(n, q_width)?,
                k: backend.buffer(n, kv_width)?,
                v: backend.buffer(n, kv_width)?,
                attended: backend.buffer(n, q_width)?,
                middle: backend.buffer(n, hidden)?,
                gate: backend.buffer(n, ffn)?,
                up: backend.buffer(n, ffn)?,
            });
        }
        let (out, gated) = (backend.buffer(n, hidden)?, backend.buffer(n, ffn)?);
        self.angles = angles(config, len);
        self.shape = Some(Buffers { rows, len, kv, layers, out, gated });
        Ok(())
    }

    fn forward(&mut self, weights: &Weights, places: &Places, windows: Windows<'_>) -> Result<()> {
        let Windows { rows, len, .. } = windows;
        self.prepare(rows, len)?;
        let (config, backend, kernels) = (&self.config, &mut self.backend, self.kernels);
        let Some(Buffers { kv, layers, out, gated, .. }) = &mut self.shape else {
            unreachable!("`prepare` has made the buffers")
        };
        let n = rows * len;
        let inputs = || windows.tokens.chunks_exact(len + 1).flat_map(|row| &row[..len]).copied();
        backend.begin(&Step {
            tokens: inputs().collect(),
            sequences: (0..rows)
                .map(|row| SequenceSlice {
                    rows: row * len..(row + 1) * len,
                    first_position: 0,
                    blocks: vec![row as u32],
                })
                .collect(),
            ..Step::default()
        })?;
        let table = &weights.values[places.embedding.clone()];
        let hidden = config.hidden_size;
        let first = match layers.first_mut() {
            Some(layer) => &mut layer.x,
            None => &mut *out,
        };
        for (token, x) in inputs().zip(first.rows_mut(n)?.chunks_exact_mut(hidden)) {
            x.copy_from_slice(&table[token as usize * hidden..][..hidden]);
        }
        for (index, layer) in weights.layers.iter().enumerate() {
            let (these, next) = layers.split_at_mut(index + 1);
            let kept = &mut these[index];
            let x_next = next.first_mut().map_or(&mut *out, |next| &mut next.x);
            let [q_proj, k_proj, v_proj] = &layer.qkv.linears[..] else { unreachable!() };
            let [gate_proj, up_proj] = &layer.gate_up.linears[..] else { unreachable!() };
            backend.project(
                &kept.x,
                Some(&layer.input_norm),
                &[q_proj, k_proj, v_proj],
                &mut [&mut kept.q, &mut kept.k, &mut kept.v],
            )?;
            backend.rotate_and_store(&mut kept.q, &mut kept.k, &kept.v, None, &self.rope, kv, 0)?;
            backend.attention(&kept.q, kv, 0, &mut kept.attended)?;
            kept.middle.rows_mut(n)?.copy_from_slice(kept.x.rows(n)?);
            let norm = layer.attn_sub_norm.as_ref();
            backend.project_add(&kept.attended, norm, &layer.o.linears[0], &mut kept.middle)?;
            backend.project(
                &kept.middle,
                Some(&layer.post_attention_norm),
                &[gate_proj, up_proj],
                &mut [&mut kept.gate, &mut kept.up],
            )?;
            gate(kernels, config, kept, n, gated)?;
            x_next.rows_mut(n)?.copy_from_slice(kept.middle.rows(n)?);
            let norm = layer.ffn_sub_norm.as_ref();
            backend.project_add(gated, norm, &layer.down.linears[0], x_next)?;
        }
        backend.finish()?;
        Ok(())
    }

    fn backward(
        &mut self,
        weights: &Weights,
        places: &Places,
        windows: Windows<'_>,
        goal: Goal<'_>,
        mut comparison: Option<Box<dyn Comparison + '_>>,
    ) -> Result<Sums> {
        let Windows { rows, len, .. } = windows;
        let n = rows * len;
        let config = &self.config;
        let (hidden, ffn) = (config.hidden_size, config.intermediate_size);
        let (q_width, kv_width) = (config.query_width(), config.key_width());
        let Some(Buffers { layers, out, gated, .. }) = &mut self.shape else {
            unreachable!("`forward` has made the buffers")
        };
        let (kernels, scratch) = (self.kernels, &mut self.scratch);
        let gradients = &mut self.gradients[..];

        // dx: the gradient of the residual stream, (n, hidden).
        let mut dx = vec![0.0; n * hidden];
        self.head.normalize(kernels, out.rows(n)?, &weights.norm);
        let compare = comparison.as_deref_mut();
        let mut sums =
            self.head.learn(&weights.values, places, config, windows, goal, compare, gradients);
        norm_back(
            &weights.norm,
            out.rows(n)?,
            self.head.d_hidden(),
            &mut dx,
            false,
            gradients,
            &places.norm,
        );

        let mut d_wide = vec![0.0; n * (2 * ffn).max(q_width + 2 * kv_width)];
        let mut d_inner = vec![0.0; n * ffn.max(q_width).max(hidden)];
        let layers = weights.layers.iter().zip(&places.layers).zip(layers).enumerate().rev();
        for (index, ((layer, places), kept)) in layers {
            let Layer { attn_sub_norm, ffn_sub_norm, .. } = layer;
            // Down projection: dx is the gradient of its output.
            gate(kernels, config, kept, n, gated)?;
            let d_gated = &mut d_inner[..n * ffn];
            let input = Input { x: gated.rows(n)?, norm: ffn_sub_norm.as_ref() };
            linear::backward(kernels, &layer.down, input, &dx, d_gated, gradients, scratch);
            if let (Some(norm), Some(place)) = (ffn_sub_norm, &places.ffn_sub_norm) {
                norm_back_in_place(norm, gated.rows(n)?, d_gated, gradients, place);
            }
            // Gate and up.
            let d_gate_up = &mut d_wide[..n * 2 * ffn];
            let backward = match config.hidden_act {
                HiddenAct::Relu2 => vector::relu2_backward,
                HiddenAct::Silu => vector::silu_backward,
            };
            backward(kept.gate.rows(n)?, kept.up.rows(n)?, d_gated, ffn, d_gate_up);
            let middle = kept.middle.rows(n)?;
            let norm = &layer.post_attention_norm;
            let d_normed = &mut d_inner[..n * hidden];
            let input = Input { x: middle, norm: Some(norm) };
            linear::backward(
                kernels,
                &layer.gate_up,
                input,
                d_gate_up,
                d_normed,
                gradients,
                scratch,
            );
            let place = &places.post_attention_norm;
            norm_back(norm, middle, d_normed, &mut dx, true, gradients, place);
            // Output projection.
            let attended = kept.attended.rows(n)?;
            let d_attended = &mut d_inner[..n * q_width];
            let input = Input { x: attended, norm: attn_sub_norm.as_ref() };
            linear::backward(kernels, &layer.o, input, &dx, d_attended, gradients, scratch);
            if let (Some(norm), Some(place)) = (attn_sub_norm, &places.attn_sub_norm) {
                norm_back_in_place(norm, attended, d_attended, gradients, place);
            }
            // Attention.
            rotate_keys(&self.angles, config, len, kept.k.rows_mut(n)?);
            let (q, k, v) = (kept.q.rows(n)?, kept.k.rows(n)?, kept.v.rows(n)?);
            let d_qkv = &mut d_wide[..n * (q_width + 2 * kv_width)];
            d_qkv.fill(0.0);
            let shape = attention::Shape {
                rows,
                len,
                n_heads: config.num_attention_heads,
                n_kv_heads: config.num_key_value_heads,
                head_dim: config.head_dim,
            };
            attention::backward(shape, q, k, v, d_attended, d_qkv, &mut self.attention);
            if let Some(comparison) = &mut comparison
                && goal.extra.and_then(|extra| extra.layer()) == Some(index)
            {
                let relations = Relations { rows, len, q, k, v };
                sums.extra +=
                    relate(&mut **comparison, relations, goal.scale_of_all, d_qkv, q_width);
            }
            rotate_gradients(&self.angles, config, len, d_qkv);
            let x = kept.x.rows(n)?;
            let d_normed = &mut d_inner[..n * hidden];
            let input = Input { x, norm: Some(&layer.input_norm) };
            linear::backward(kernels, &layer.qkv, input, d_qkv, d_normed, gradients, scratch);
            norm_back(&layer.input_norm, x, d_normed, &mut dx, true, gradients, &places.input_norm);
        }
        let table = &mut gradients[places.embedding.clone()];
        let inputs = windows.tokens.chunks_exact(len + 1).flat_map(|row| &row[..len]);
        for (&token, dx) in inputs.zip(dx.chunks_exact(hidden)) {
            bitnet_core::cpu::math::add_in_place(
                &mut table[token as usize * hidden..][..hidden],
                dx,
            );
        }
        Ok(sums)
    }
}

/// `gated = activation(gate) · up`
fn gate(
    kernels: &Kernels,
    config: &ModelConfig,
    kept: &Kept,
    n: usize,
    gated: &mut CpuBuffer,
) -> Result<()> {
    let activation = match config.hidden_act {
        HiddenAct::Relu2 => Activation::Relu2,
        HiddenAct::Silu => Activation::Silu,
    };
    let gated = gated.rows_mut(n)?;
    gated.copy_from_slice(kept.gate.rows(n)?);
    kernels.gate(activation, gated, kept.up.rows(n)?);
    Ok(())
}

fn norm_back(
    norm: &NormWeights,
    x: &[f32],
    dy: &[f32],
    dx: &mut [f32],
    add: bool,
    gradients: &mut [f32],
    place: &std::ops::Range<usize>,
) {
    let d_weight = &mut gradients[place.clone()];
    vector::norm_backward(x, &norm.weight, norm.eps, dy, dx, add, d_weight);
}

/// As [`norm_back`], the gradient of the input in place of that of the output.
fn norm_back_in_place(
    norm: &NormWeights,
    x: &[f32],
    dy: &mut [f32],
    gradients: &mut [f32],
    place: &std::ops::Range<usize>,
) {
    let width = norm.weight.len();
    let mut row = vec![0.0; width];
    for (x, dy) in x.chunks_exact(width).zip(dy.chunks_exact_mut(width)) {
        row.copy_from_slice(dy);
        norm_back(norm, x, &row, dy, false, gradients, place);
    }
}

/// Cosines, then sines, of the angles of the first positions: `(positions, head_dim)`.
fn angles(config: &ModelConfig, positions: usize) -> Vec<f32> {
    let frequencies = config.rope_frequencies();
    let magnitude = config.rope_attention_factor() as f32;
    let mut angles = Vec::with_capacity(2 * positions * frequencies.len());
    for position in 0..positions {
        let turn = |&frequency: &f32| libm::sincos(position as f64 * f64::from(frequency));
        angles.extend(frequencies.iter().map(|f| turn(f).1 as f32 * magnitude));
        angles.extend(frequencies.iter().map(|f| turn(f).0 as f32 * magnitude));
    }
    angles
}

/// Rotates keys as the engine did when it stored them.
fn rotate_keys(angles: &[f32], config: &ModelConfig, len: usize, k: &mut [f32]) {
    let (dim, width) = (config.head_dim, config.key_width());
    vector::vectorized(|| {
        for (i, k) in k.chunks_exact_mut(width).enumerate() {
            let angles = &angles[i % len * dim..][..dim];
            k.chunks_exact_mut(dim).for_each(|head| vector::rotate(head, angles));
        }
    });
}

/// Takes the gradients of queries and keys back through their rotation.
fn rotate_gradients(angles: &[f32], config: &ModelConfig, len: usize, d_qkv: &mut [f32]) {
    let dim = config.head_dim;
    let (rotated, width) =
        (config.query_width() + config.key_width(), config.query_width() + 2 * config.key_width());
    vector::vectorized(|| {
        for (i, d) in d_qkv.chunks_exact_mut(width).enumerate() {
            let angles = &angles[i % len * dim..][..dim];
            d[..rotated].chunks_exact_mut(dim).for_each(|head| vector::rotate_back(head, angles));
        }
    });
}

/// Asks for the loss on queries, keys and values, and adds its gradients to `d_qkv`.
fn relate(
    comparison: &mut dyn Comparison,
    relations: Relations<'_>,
    scale: f32,
    d_qkv: &mut [f32],
    q_width: usize,
) -> f64 {
    let [mut q, mut k, mut v] =
        [relations.q, relations.k, relations.v].map(|x| vec![0.0f32; x.len()]);
    let kv_width = k.len() / (relations.rows * relations.len);
    let gradients = RelationGradients { q: &mut q, k: &mut k, v: &mut v };
    let loss = comparison.relations(relations, scale, gradients);
    for (i, d) in d_qkv.chunks_exact_mut(q_width + 2 * kv_width).enumerate() {
        let (d_q, d_kv) = d.split_at_mut(q_width);
        let (d_k, d_v) = d_kv.split_at_mut(kv_width);
        vector::add(d_q, &q[i * q_width..][..q_width]);
        vector::add(d_k, &k[i * kv_width..][..kv_width]);
        vector::add(d_v, &v[i * kv_width..][..kv_width]);
    }
    loss
}

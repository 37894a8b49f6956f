//! The seam between a model and a device.
//!
//! A model calls [`Backend`] methods in the order of the data; what a method names lives on the
//! device (weights, KV cache, activations), and nothing comes back to the host but logits. A
//! backend may execute each call at once (CPU) or record it and submit the whole step in
//! [`Backend::finish`] (GPUs). Operations are of the size of a transformer's parts, so that each
//! backend fuses inside them what suits it. Knows shapes and positions, not text or file formats.
//!
//! The definition of correct is the CPU's scalar path; `testing` holds the conformance suite.

use crate::error::{Error, Result};
use crate::noise::Noise;
use crate::weights::{FloatRows, LinearWeights, NormWeights};
use std::ops::Range;
use std::sync::Arc;

/// Number format of the cached keys and values.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Default)]
pub enum KvType {
    /// Exact: for comparing engines.
    F32,
    /// The default.
    #[default]
    F16,
    /// 8-bit integers with a scale for each head and token.
    Q8,
}

/// The shape of a paged KV cache.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct KvSpec {
    /// Transformer layers.
    pub n_layers: usize,
    /// Key/value heads in each layer.
    pub n_kv_heads: usize,
    /// Features of a head.
    pub head_dim: usize,
    /// Tokens in a block; a multiple of 16.
    pub block_tokens: usize,
    /// Blocks in the whole cache.
    pub n_blocks: usize,
    /// Number format.
    pub dtype: KvType,
}

impl KvSpec {
    /// Bytes one block takes over all layers, keys and values together.
    pub const fn block_bytes(&self) -> usize {
        let head = match self.dtype {
            KvType::F32 => self.head_dim * 4,
            KvType::F16 => self.head_dim * 2,
            KvType::Q8 => self.head_dim + 4,
        };
        2 * self.n_layers * self.block_tokens * self.n_kv_heads * head
    }
}

/// Rotary position embedding: feature pairs `(i, i + head_dim/2)` turn by `position · inv_freq[i]`.
///
/// Checkpoints that rotate neighbours `(2i, 2i+1)` are brought to this order when they are loaded.
#[derive(Debug, Clone, PartialEq)]
pub struct RopeSpec {
    /// `head_dim / 2` frequencies, any scaling already applied.
    pub inv_freq: Vec<f32>,
    /// Positions that must be representable: the context length.
    pub max_positions: usize,
    /// Factor on rotated queries and keys; 1 for all but YaRN.
    pub magnitude: f32,
}

/// The function between the two halves of a feed-forward block.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Activation {
    /// `max(x, 0)²`
    Relu2,
    /// `x / (1 + e^−x)`
    Silu,
}

/// The part of a batch that belongs to one sequence.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct SequenceSlice {
    /// Its rows in [`Batch::tokens`]: consecutive tokens, at least one.
    pub rows: Range<usize>,
    /// Position of the first of these tokens; all earlier positions are in the cache already.
    pub first_position: usize,
    /// KV block of each `block_tokens` positions, from position 0 to the last of this slice.
    pub blocks: Vec<u32>,
}

/// One step of the model: tokens of several sequences, side by side.
///
/// A row's result never depends on what else is in the batch.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct Batch {
    /// Token ids, all `< vocab_size`.
    pub tokens: Vec<u32>,
    /// Slices that cover `tokens` in order, each of another sequence.
    pub sequences: Vec<SequenceSlice>,
    /// Rows whose logits are wanted, ascending.
    pub logit_rows: Vec<usize>,
    /// If set, only so many largest logits of each row are wanted, exactly; a backend may leave
    /// −∞ in place of the others.
    pub n_best: Option<usize>,
    /// With `n_best`, what is added to each row's logits before the largest are chosen, one for each
    /// of `logit_rows`; empty for nothing. The logits themselves stay as they are.
    pub noise: Vec<Noise>,
}

impl Batch {
    /// [`n_best`](Self::n_best), if it counts logits as they are: a backend that ignores noise
    /// gives all logits where there is some.
    pub fn n_best_plain(&self) -> Option<usize> {
        self.n_best.filter(|_| self.noise.iter().all(Noise::is_none))
    }
}

/// Checks that a step's slices cover its tokens in order, as the operations of a backend rely on.
///
/// # Errors
/// [`Error::Shape`] or [`Error::Invalid`] says which slice does not, or which logit row is none.
pub fn check_batch(batch: &Batch) -> Result<()> {
    let mut next = 0;
    for slice in &batch.sequences {
        let (start, end) = (slice.rows.start, slice.rows.end);
        if start != next || end <= start {
            let want = format!("rows from {next} on, at least one");
            return Err(Error::shape("slice of a batch", want, format!("{start}..{end}")));
        }
        if slice.first_position.checked_add(end - start).is_none() {
            let reason = format!("{} overflows", slice.first_position);
            return Err(Error::invalid("position", reason));
        }
        next = end;
    }
    if next != batch.tokens.len() {
        return Err(Error::shape(
            "slices of a batch",
            format!("{} rows", batch.tokens.len()),
            next,
        ));
    }
    let n_logits = batch.logit_rows.len();
    if !batch.noise.is_empty() && batch.noise.len() != n_logits {
        return Err(Error::shape("noise of a batch", n_logits, batch.noise.len()));
    }
    match batch.logit_rows.iter().find(|&&row| row >= next) {
        Some(row) => Err(Error::invalid("logit row", format!("{row} of {next} rows"))),
        None => Ok(()),
    }
}

/// What a table `(vocab, hidden)` is for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum TableRole {
    /// Rows are looked up.
    Embedding,
    /// Rows are multiplied with, and perhaps looked up too.
    Head,
}

/// What a device is, for reports and selection.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct DeviceInfo {
    /// Short name: `cpu`, `wgpu`, `metal`, `mlx`.
    pub name: String,
    /// What the hardware calls itself.
    pub hardware: String,
    /// The kernel path chosen on it, for instance `avx512vnni`.
    pub kernel: String,
    /// Threads used, where the notion applies.
    pub threads: usize,
}

/// What a backend finds when it looks for its device, before any model is placed there.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct FoundDevice {
    /// What the hardware calls itself.
    pub hardware: String,
    /// What drives it, with a version where there is one: `Vulkan, Mesa 25.0`.
    pub driver: Option<String>,
    /// Memory the device can use, in bytes, where the system tells.
    pub memory_bytes: Option<u64>,
    /// Whether that is the memory of the CPU.
    pub unified_memory: bool,
    /// Whether it is worth using unasked: false for what imitates a device on the CPU.
    pub accelerates: bool,
}

/// Bytes a backend holds on its device.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct MemoryUsage {
    /// Weights in the layout of the kernels, or mapped for them.
    pub weights: u64,
    /// KV cache capacity.
    pub kv_cache: u64,
    /// Activations and scratch space.
    pub activations: u64,
}

/// A device that can run the parts of a transformer.
///
/// Buffers are `(max_tokens, width)` f32, row-major; an operation touches the first
/// `batch.tokens.len()` rows. Results must not depend on batch composition or thread count.
pub trait Backend: Send + Sync + 'static {
    /// A projection on the device.
    type Linear: Send + Sync;
    /// A norm on the device.
    type Norm: Send + Sync;
    /// An embedding table or output head on the device.
    type Table: Send + Sync;
    /// Rotation tables on the device.
    type Rope: Send + Sync;
    /// Activations of a step.
    type Buffer: Send + Sync;
    /// The paged KV cache of one model.
    type Kv: Send + Sync;

    /// What this device is.
    fn device(&self) -> DeviceInfo;
    /// What it holds now.
    fn memory(&self) -> MemoryUsage;

    /// Takes a projection over to the device.
    fn linear(&mut self, weights: &LinearWeights) -> Result<Self::Linear>;
    /// Takes a norm over to the device.
    fn norm(&mut self, weights: &NormWeights) -> Result<Self::Norm>;
    /// Takes an embedding table or output head `(vocab, hidden)` over.
    fn table(&mut self, weights: Arc<dyn FloatRows>, role: TableRole) -> Result<Self::Table>;
    /// Bytes of a table that computing logits reads, at least: all of it, or, with `n_best`, what
    /// finds so many largest ones. For reports; zero if not known.
    fn table_bytes(&self, table: &Self::Table, n_best: Option<usize>) -> u64 {
        let _ = (table, n_best);
        0
    }
    /// Prepares rotations.
    fn rope(&mut self, spec: &RopeSpec) -> Result<Self::Rope>;
    /// Activations for steps of up to `max_tokens` tokens.
    fn buffer(&mut self, max_tokens: usize, width: usize) -> Result<Self::Buffer>;
    /// An empty KV cache.
    fn kv_cache(&mut self, spec: KvSpec) -> Result<Self::Kv>;

    /// Starts a step. The caller has checked token ids, positions and block tables.
    fn begin(&mut self, batch: &Batch) -> Result<()>;
    /// `x[i] = table[tokens[i]]`
    fn embed(&mut self, table: &Self::Table, x: &mut Self::Buffer) -> Result<()>;
    /// `outs[j] = linears[j](norm(x))`; the projections share the input.
    fn project(
        &mut self,
        x: &Self::Buffer,
        norm: Option<&Self::Norm>,
        linears: &[&Self::Linear],
        outs: &mut [&mut Self::Buffer],
    ) -> Result<()>;
    /// `acc += linear(norm(x))`
    fn project_add(
        &mut self,
        x: &Self::Buffer,
        norm: Option<&Self::Norm>,
        linear: &Self::Linear,
        acc: &mut Self::Buffer,
    ) -> Result<()>;
    /// `out = activation(gate(norm(x))) · up(norm(x))`
    fn gated(
        &mut self,
        x: &Self::Buffer,
        norm: Option<&Self::Norm>,
        gate: &Self::Linear,
        up: &Self::Linear,
        activation: Activation,
        out: &mut Self::Buffer,
    ) -> Result<()>;
    /// Normalizes (where norms are given) and rotates each head of `q` and `k`; `q` stays in its
    /// buffer, `k` and `v` go to layer `layer` of the cache.
    fn rotate_and_store(
        &mut self,
        q: &mut Self::Buffer,
        k: &mut Self::Buffer,
        v: &Self::Buffer,
        head_norms: Option<(&Self::Norm, &Self::Norm)>,
        rope: &Self::Rope,
        kv: &mut Self::Kv,
        layer: usize,
    ) -> Result<()>;
    /// Causal attention of each row over its own sequence, grouped queries, scores scaled by
    /// `1/sqrt(head_dim)`. `q` and `out` are `(tokens, n_heads · head_dim)`.
    fn attention(
        &mut self,
        q: &Self::Buffer,
        kv: &Self::Kv,
        layer: usize,
        out: &mut Self::Buffer,
    ) -> Result<()>;
    /// Exact logits of the batch's `logit_rows`: `(logit_rows.len(), vocab)`, row-major, into `out`;
    /// see [`Batch::n_best`].
    fn logits(
        &mut self,
        x: &Self::Buffer,
        norm: &Self::Norm,
        head: &Self::Table,
        out: &mut Vec<f32>,
    ) -> Result<()>;
    /// Copies the step's rows of a buffer to the host, after `norm` if one is given: embeddings
    /// and layer-by-layer tests.
    fn read(
        &mut self,
        x: &Self::Buffer,
        norm: Option<&Self::Norm>,
        out: &mut Vec<f32>,
    ) -> Result<()>;
    /// Ends the step: everything asked for has happened when this returns.
    fn finish(&mut self) -> Result<()>;
}

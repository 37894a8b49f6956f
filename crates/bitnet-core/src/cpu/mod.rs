//! The CPU backend: the definition of correct for every device.
//!
//! [`CpuBackend`] executes each operation when it is called, on its thread pool, with the kernels
//! chosen when it was made. Results are the same bits with every kernel, number of threads and
//! composition of the batch. Once its buffers have grown to a model's steps it allocates nothing.

pub(crate) mod attend;
mod attention;
mod buffer;
mod head;
mod input;
mod kv;
pub mod linear;
pub mod math;
mod rope;
mod scales;
mod shortlist;
mod store;
#[cfg(test)]
mod tests;

pub use buffer::{CpuBuffer, Held};
pub use head::CpuTable;
pub use kv::{CpuKv, MAX_HEAD_DIM, TILE_TOKENS};
pub use rope::CpuRope;
pub use shortlist::round_rows;

use crate::backend::{
    Activation, Backend, Batch, DeviceInfo, KvSpec, MemoryUsage, RopeSpec, SequenceSlice,
    TableRole, check_batch,
};
use crate::error::{Error, Result};
use crate::kernels::{Kernels, WeightMemory};
use crate::memory::{AccessPattern, EnhancedMemoryPool, HostMemory};
use crate::noise::Noise;
use crate::threads::{ThreadPool, default_threads};
use crate::weights::{FloatRows, LinearWeights, NormWeights};
use attention::AttentionScratch;
use buffer::Counter;
use head::{HeadScratch, Wanted};
use linear::CpuLinear;
use rope::StepAngles;
use std::sync::Arc;

/// The CPU as a device.
pub struct CpuBackend {
    pool: ThreadPool,
    kernels: &'static Kernels,
    /// Where packed weights are put.
    weight_memory: WeightMemory,
    weights: Counter,
    /// Where activations and KV caches are put.
    memory: EnhancedMemoryPool<HostMemory>,
    /// The current step.
    tokens: Vec<u32>,
    sequences: Vec<SequenceSlice>,
    logit_rows: Vec<usize>,
    angles: StepAngles,
    /// Buffers of the operations.
    projection: linear::Scratch,
    attention: AttentionScratch,
    n_best: Option<usize>,
    noise: Vec<Noise>,
    head: HeadScratch,
}

impl CpuBackend {
    /// A backend with `threads` threads (by default one for each physical core) and the kernels of
    /// that name (by default those `BITNET_KERNEL` names, or the fastest this CPU can run).
    ///
    /// # Errors
    /// [`Error::Invalid`] for kernels that do not exist or cannot run here, or an absurd number of
    /// threads; [`Error::Device`] if the system refuses a thread.
    pub fn new(threads: Option<usize>, kernel: Option<&str>) -> Result<Self> {
        let kernels = match kernel {
            Some(name) => Kernels::by_name(name)?,
            None => Kernels::detect()?,
        };
        Ok(Self {
            pool: ThreadPool::new(threads.unwrap_or_else(default_threads))?,
            kernels,
            weight_memory: WeightMemory::new(),
            weights: Counter::default(),
            memory: EnhancedMemoryPool::new(HostMemory, u64::MAX),
            tokens: Vec::new(),
            sequences: Vec::new(),
            logit_rows: Vec::new(),
            angles: StepAngles::default(),
            projection: linear::Scratch::new(),
            attention: AttentionScratch::default(),
            n_best: None,
            noise: Vec::new(),
            head: HeadScratch::default(),
        })
    }

    /// The kernels chosen.
    pub fn kernels(&self) -> &'static Kernels {
        self.kernels
    }

    fn rows(&self) -> usize {
        self.tokens.len()
    }
}

/// Copies the sequences, keeping what the old ones allocated.
fn copy_sequences(from: &[SequenceSlice], to: &mut Vec<SequenceSlice>) {
    to.truncate(from.len());
    let known = to.len();
    for (to, from) in to.iter_mut().zip(from) {
        to.rows = from.rows.clone();
        to.first_position = from.first_position;
        to.blocks.clone_from(&from.blocks);
    }
    to.extend_from_slice(&from[known..]);
}

impl Backend for CpuBackend {
    type Linear = Held<CpuLinear>;
    type Norm = NormWeights;
    type Table = Held<CpuTable>;
    type Rope = CpuRope;
    type Buffer = CpuBuffer;
    type Kv = CpuKv;

    fn device(&self) -> DeviceInfo {
        DeviceInfo {
            name: "cpu".into(),
            hardware: buffer::cpu_name(),
            kernel: self.kernels.name().into(),
            threads: self.pool.threads(),
        }
    }

    fn memory(&self) -> MemoryUsage {
        let scratch = self.projection.memory_bytes()
            + self.attention.memory_bytes()
            + self.angles.memory_bytes()
            + self.head.memory_bytes();
        MemoryUsage {
            weights: self.weights.bytes(),
            kv_cache: self.memory.active_bytes(AccessPattern::KvCache),
            activations: self.memory.active_bytes(AccessPattern::Activations) + scratch,
        }
    }

    fn linear(&mut self, weights: &LinearWeights) -> Result<Self::Linear> {
        let linear = CpuLinear::new(weights, self.kernels, &self.pool, &mut self.weight_memory)?;
        let bytes = linear.memory_bytes();
        Ok(self.weights.hold(linear, bytes))
    }

    fn norm(&mut self, weights: &NormWeights) -> Result<Self::Norm> {
        Ok(weights.clone())
    }

    fn table(&mut self, weights: Arc<dyn FloatRows>, role: TableRole) -> Result<Self::Table> {
        let table =
            CpuTable::new(&*weights, role, self.kernels, &self.pool, &mut self.weight_memory)?;
        let bytes = table.memory_bytes();
        Ok(self.weights.hold(table, bytes))
    }

    fn table_bytes(&self, table: &Self::Table, n_best: Option<usize>) -> u64 {
        table.bytes_read(n_best)
    }

    fn rope(&mut self, spec: &RopeSpec) -> Result<Self::Rope> {
        CpuRope::new(spec)
    }

    fn buffer(&mut self, max_tokens: usize, width: usize) -> Result<Self::Buffer> {
        CpuBuffer::new(max_tokens, width, &self.memory)
    }

    fn kv_cache(&mut self, spec: KvSpec) -> Result<Self::Kv> {
        CpuKv::new(spec, &self.memory)
    }

    fn begin(&mut self, batch: &Batch) -> Result<()> {
        check_batch(batch)?;
        self.tokens.clone_from(&batch.tokens);
        self.logit_rows.clone_from(&batch.logit_rows);
        self.n_best = batch.n_best;
        self.noise.clone_from(&batch.noise);
        copy_sequences(&batch.sequences, &mut self.sequences);
        self.angles.start_step();
        Ok(())
    }

    fn embed(&mut self, table: &Self::Table, x: &mut Self::Buffer) -> Result<()> {
        table.embed(&self.tokens, x.rows_mut(self.tokens.len())?)
    }

    fn project(
        &mut self,
        x: &Self::Buffer,
        norm: Option<&Self::Norm>,
        linears: &[&Self::Linear],
        outs: &mut [&mut Self::Buffer],
    ) -> Result<()> {
        /// Projections of one call; a transformer has three that share an input.
        const MOST: usize = 8;
        let n = self.rows();
        if linears.len() != outs.len() || linears.len() > MOST {
            let want = format!("{} buffers, at most {MOST}", linears.len());
            return Err(Error::shape("outputs of a projection", want, outs.len()));
        }
        let Some(first) = linears.first() else { return Ok(()) };
        let mut list: [&CpuLinear; MOST] = [first; MOST];
        for (slot, linear) in list.iter_mut().zip(linears) {
            *slot = linear;
        }
        let mut slices: [&mut [f32]; MOST] = Default::default();
        for (slice, out) in slices.iter_mut().zip(outs.iter_mut()) {
            *slice = out.rows_mut(n)?;
        }
        linear::project(
            &self.pool,
            self.kernels,
            &mut self.projection,
            x.rows(n)?,
            n,
            norm,
            &list[..linears.len()],
            &mut slices[..linears.len()],
        )
    }

    fn project_add(
        &mut self,
        x: &Self::Buffer,
        norm: Option<&Self::Norm>,
        linear: &Self::Linear,
        acc: &mut Self::Buffer,
    ) -> Result<()> {
        let n = self.rows();
        let (x, acc) = (x.rows(n)?, acc.rows_mut(n)?);
        let scratch = &mut self.projection;
        linear::project_add(&self.pool, self.kernels, scratch, x, n, norm, linear, acc)
    }

    fn gated(
        &mut self,
        x: &Self::Buffer,
        norm: Option<&Self::Norm>,
        gate: &Self::Linear,
        up: &Self::Linear,
        activation: Activation,
        out: &mut Self::Buffer,
    ) -> Result<()> {
        let n = self.rows();
        let (x, out) = (x.rows(n)?, out.rows_mut(n)?);
        let scratch = &mut self.projection;
        linear::gated(&self.pool, self.kernels, scratch, x, n, norm, gate, up, activation, out)
    }

    fn rotate_and_store(
        &mut self,
        q: &mut Self::Buffer,
        k: &mut Self::Buffer,
        v: &Self::Buffer,
        head_norms: Option<(&Self::Norm, &Self::Norm)>,
        rope: &Self::Rope,
        kv: &mut Self::Kv,
        layer: usize,
    ) -> Result<()> {
        let (n, width) = (self.rows(), q.width());
        store::prepare_angles(&self.pool, &self.sequences, rope, &mut self.angles);
        store::rotate_and_store(
            &self.pool,
            &self.sequences,
            self.angles.values(),
            q.rows_mut(n)?,
            width,
            k.rows(n)?,
            v.rows(n)?,
            head_norms,
            kv,
            layer,
        )
    }

    fn attention(
        &mut self,
        q: &Self::Buffer,
        kv: &Self::Kv,
        layer: usize,
        out: &mut Self::Buffer,
    ) -> Result<()> {
        let n = self.rows();
        attention::attention(
            &self.pool,
            self.kernels,
            &mut self.attention,
            &self.sequences,
            kv,
            layer,
            q.rows(n)?,
            q.width(),
            out.rows_mut(n)?,
        )
    }

    fn logits(
        &mut self,
        x: &Self::Buffer,
        norm: &Self::Norm,
        head: &Self::Table,
        out: &mut Vec<f32>,
    ) -> Result<()> {
        let (x, scratch) = (x.rows(self.rows())?, &mut self.head);
        let wanted = Wanted { rows: &self.logit_rows, n_best: self.n_best, noise: &self.noise };
        head.logits(&self.pool, self.kernels, x, norm, &wanted, scratch, out)
    }

    fn read(
        &mut self,
        x: &Self::Buffer,
        norm: Option<&Self::Norm>,
        out: &mut Vec<f32>,
    ) -> Result<()> {
        let (rows, width) = (x.rows(self.rows())?, x.width());
        out.clear();
        out.extend_from_slice(rows);
        if let Some(norm) = norm {
            if norm.weight.len() != width {
                return Err(Error::shape("norm of a buffer", width, norm.weight.len()));
            }
            for (x, out) in rows.chunks_exact(width).zip(out.chunks_exact_mut(width)) {
                self.kernels.norm(x, norm, out);
            }
        }
        Ok(())
    }

    fn finish(&mut self) -> Result<()> {
        Ok(())
    }
}

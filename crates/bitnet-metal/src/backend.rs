//! The backend: the operations of a step as dispatches, recorded one after the other and handed over
//! when a result is wanted.
//!
//! A decode step is one submission. Weights, cache and activations stay on the device; what comes
//! back is logits. Float sums have the order of the CPU's scalar code, so the results are meant to be
//! the same bits (see `kernels/common.metal`).

use crate::buffer::{Growing, MetalBuffer, MetalBufferPool};
use crate::driver::{Dispatch, Driver};
use crate::kernels::Kernel;
use crate::kv::MetalKv;
use crate::linear::{MetalLinear, MetalNorm};
use crate::matrix::FloatMatrix;
use crate::params::{FloatParams, NormParams, TableParams};
use crate::step::Step;
use bitnet_core::backend::{
    Activation, Backend, Batch, DeviceInfo, KvSpec, MemoryUsage, RopeSpec, TableRole,
};
use bitnet_core::cpu::CpuRope;
use bitnet_core::memory::{AccessPattern, DeviceMemory};
use bitnet_core::weights::{FloatRows, LinearWeights, NormWeights};
use bitnet_core::{Error, Result};
use std::sync::Arc;

/// A Metal device that runs models. `D` is Apple's API, or a stand-in for it in tests.
pub struct MetalBackend<D: Driver> {
    pub(crate) driver: D,
    pub(crate) pool: MetalBufferPool<D::Memory>,
    /// Bound where a kernel is not given what it may be given.
    pub(crate) nothing: MetalBuffer<D::Memory>,
    pub(crate) step: Step<D::Memory>,
    pub(crate) scratch: Scratch<D::Memory>,
    counters: Counters,
    /// Dispatches since the last submission.
    pending: u64,
}

/// What has been handed to the device so far.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Counters {
    /// Command buffers.
    pub submissions: u64,
    /// Runs of kernels.
    pub dispatches: u64,
}

/// Results that only the next dispatches read.
pub(crate) struct Scratch<M: DeviceMemory> {
    /// Rows after a norm, `(rows, stride)` floats.
    pub(crate) normed: Growing<M>,
    /// Quantized rows, their scales and their sums.
    pub(crate) codes: Growing<M>,
    pub(crate) scales: Growing<M>,
    pub(crate) sums: Growing<M>,
    /// The second half of a gate, `(rows, stride)` floats.
    pub(crate) up: Growing<M>,
    /// Spans of attention that are joined later.
    pub(crate) partials: Growing<M>,
    pub(crate) logits: Growing<M>,
}

/// Activations `(max_tokens, width)` on the device; rows are `stride` floats apart, and what pads them
/// is 0.
pub struct MetalActivations<M: DeviceMemory> {
    pub(crate) memory: MetalBuffer<M>,
    max_tokens: usize,
    pub(crate) width: usize,
    pub(crate) stride: usize,
}

/// Floats that rows are padded to a multiple of.
const ROW_FLOATS: usize = 16;

/// Floats from one row of `width` to the next.
pub(crate) fn stride(width: usize) -> usize {
    width.next_multiple_of(ROW_FLOATS)
}

impl<M: DeviceMemory> MetalActivations<M> {
    /// Checks that there are `rows` rows of `width`.
    pub(crate) fn check(&self, what: &str, rows: usize, width: usize) -> Result<()> {
        if rows > self.max_tokens {
            return Err(Error::shape(
                "rows of a buffer",
                format!("at most {}", self.max_tokens),
                rows,
            ));
        }
        match self.width == width {
            true => Ok(()),
            false => Err(Error::shape(what, width, self.width)),
        }
    }
}

impl<D: Driver> MetalBackend<D> {
    /// A backend on a device, which may hold `budget` bytes.
    ///
    /// # Errors
    /// [`Error::OutOfMemory`] if not even a few bytes can be had.
    pub fn new(driver: D, budget: u64) -> Result<Self> {
        let pool = MetalBufferPool::new(driver.memory(), budget);
        let nothing = MetalBuffer::new(&pool, 16, AccessPattern::Weights)?;
        let growing = || Growing::new(AccessPattern::Activations);
        let scratch = Scratch {
            normed: growing(),
            codes: growing(),
            scales: growing(),
            sums: growing(),
            up: growing(),
            partials: growing(),
            logits: growing(),
        };
        let step = Step::new();
        let counters = Counters::default();
        Ok(Self { driver, pool, nothing, step, scratch, counters, pending: 0 })
    }

    /// The pool its memory comes from.
    pub fn pool(&self) -> &MetalBufferPool<D::Memory> {
        &self.pool
    }

    /// What has been handed to the device so far.
    pub fn counters(&self) -> Counters {
        self.counters
    }

    /// Rows of the step.
    pub(crate) fn rows(&self) -> usize {
        self.step.n_rows
    }

    /// Hands over what was recorded and waits for it.
    fn submit(&mut self) -> Result<()> {
        if std::mem::take(&mut self.pending) == 0 {
            return Ok(());
        }
        self.counters.submissions += 1;
        self.driver.submit()
    }

    /// Records `out[i] = norm(x[rows[i]])`, all rows if `mapped` is `None`.
    pub(crate) fn norm_rows(
        recorder: &mut Recorder<'_, D>,
        x: &MetalBuffer<D::Memory>,
        norm: &MetalNorm<D::Memory>,
        out: &MetalBuffer<D::Memory>,
        mapped: Option<&MetalBuffer<D::Memory>>,
        n_rows: usize,
    ) -> Result<()> {
        let stride = stride(norm.width) as u32;
        let params = NormParams {
            width: norm.width as u32,
            x_stride: stride,
            out_stride: stride,
            mapped: u32::from(mapped.is_some()),
            eps: norm.eps,
        };
        recorder.run(
            Kernel::RmsLayerNorm,
            &[x, &norm.weight, out, mapped.unwrap_or(recorder.nothing)],
            &params,
            [n_rows as u32, 1, 1],
            (crate::kernels::STAGE + 4) * 4,
        )
    }

    /// What records dispatches, beside the parts of the backend that they read.
    #[allow(clippy::type_complexity)]
    pub(crate) fn split(
        &mut self,
    ) -> (Recorder<'_, D>, &MetalBufferPool<D::Memory>, &mut Step<D::Memory>, &mut Scratch<D::Memory>)
    {
        let recorder = Recorder {
            driver: &mut self.driver,
            nothing: &self.nothing,
            pending: &mut self.pending,
            dispatches: &mut self.counters.dispatches,
        };
        (recorder, &self.pool, &mut self.step, &mut self.scratch)
    }

    /// Reads rows of floats that are `stride` apart; the device must be done with them.
    fn download(
        &self,
        from: &MetalBuffer<D::Memory>,
        n_rows: usize,
        width: usize,
        stride: usize,
        out: &mut Vec<f32>,
    ) -> Result<()> {
        let len = n_rows.saturating_mul(width);
        let out_of_memory =
            |_| Error::OutOfMemory { what: "results".into(), bytes: 4 * len as u64 };
        out.try_reserve(len.saturating_sub(out.len())).map_err(out_of_memory)?;
        out.resize(len, 0.0);
        if width == stride {
            return from.read(&self.pool, 0, bytemuck::cast_slice_mut(out));
        }
        for (row, out) in out.chunks_exact_mut(width).enumerate() {
            from.read(&self.pool, 4 * row * stride, bytemuck::cast_slice_mut(out))?;
        }
        Ok(())
    }
}

/// Records dispatches.
pub(crate) struct Recorder<'a, D: Driver> {
    driver: &'a mut D,
    pub(crate) nothing: &'a MetalBuffer<D::Memory>,
    pending: &'a mut u64,
    dispatches: &'a mut u64,
}

impl<D: Driver> Recorder<'_, D> {
    /// Records a run that sees what those before it wrote.
    pub(crate) fn run(
        &mut self,
        kernel: Kernel,
        buffers: &[&MetalBuffer<D::Memory>],
        params: &impl bytemuck::NoUninit,
        groups: [u32; 3],
        shared_bytes: u32,
    ) -> Result<()> {
        self.record(kernel, buffers, params, groups, shared_bytes, false)
    }

    /// Records a run that may happen at the same time as the one before it, or instead of waiting.
    pub(crate) fn record(
        &mut self,
        kernel: Kernel,
        buffers: &[&MetalBuffer<D::Memory>],
        params: &impl bytemuck::NoUninit,
        groups: [u32; 3],
        shared_bytes: u32,
        beside: bool,
    ) -> Result<()> {
        let mut handles = [self.nothing.handle(); 16];
        for (handle, buffer) in handles.iter_mut().zip(buffers) {
            *handle = buffer.handle();
        }
        let dispatch = Dispatch {
            kernel,
            buffers: &handles[..buffers.len()],
            constants: bytemuck::bytes_of(params),
            groups,
            shared_bytes: shared_bytes.next_multiple_of(16),
            beside: beside && *self.pending > 0,
        };
        self.driver.encode(&dispatch)?;
        *self.pending += 1;
        *self.dispatches += 1;
        Ok(())
    }
}

impl<D: Driver> Backend for MetalBackend<D> {
    type Linear = MetalLinear<D::Memory>;
    type Norm = MetalNorm<D::Memory>;
    type Table = FloatMatrix<D::Memory>;
    type Rope = Arc<CpuRope>;
    type Buffer = MetalActivations<D::Memory>;
    type Kv = MetalKv<D::Memory>;

    fn device(&self) -> DeviceInfo {
        DeviceInfo {
            name: "metal".into(),
            hardware: self.driver.hardware(),
            kernel: "metal".into(),
            threads: 0,
        }
    }

    fn memory(&self) -> MemoryUsage {
        MemoryUsage {
            weights: self.pool.active_bytes(AccessPattern::Weights),
            kv_cache: self.pool.active_bytes(AccessPattern::KvCache),
            activations: self.pool.active_bytes(AccessPattern::Activations),
        }
    }

    fn linear(&mut self, weights: &LinearWeights) -> Result<Self::Linear> {
        MetalLinear::new(&self.pool, weights)
    }

    fn norm(&mut self, weights: &NormWeights) -> Result<Self::Norm> {
        MetalNorm::new(&self.pool, weights)
    }

    fn table(&mut self, weights: Arc<dyn FloatRows>, _: TableRole) -> Result<Self::Table> {
        FloatMatrix::new(&self.pool, &*weights)
    }

    fn table_bytes(&self, table: &Self::Table, _: Option<usize>) -> u64 {
        table.numbers.size()
    }

    fn rope(&mut self, spec: &RopeSpec) -> Result<Self::Rope> {
        CpuRope::new(spec).map(Arc::new)
    }

    fn buffer(&mut self, max_tokens: usize, width: usize) -> Result<Self::Buffer> {
        if max_tokens == 0 || width == 0 {
            return Err(Error::invalid("buffer", format!("{max_tokens} × {width} is empty")));
        }
        let stride = width.checked_next_multiple_of(ROW_FLOATS);
        let floats = stride.and_then(|stride| stride.checked_mul(max_tokens));
        let (Some(stride), Some(bytes)) = (stride, floats.and_then(|n| n.checked_mul(4))) else {
            return Err(Error::OutOfMemory { what: "activations".into(), bytes: u64::MAX });
        };
        let memory = MetalBuffer::new(&self.pool, bytes, AccessPattern::Activations)?;
        Ok(MetalActivations { memory, max_tokens, width, stride })
    }

    fn kv_cache(&mut self, spec: KvSpec) -> Result<Self::Kv> {
        MetalKv::new(&self.pool, spec)
    }

    fn begin(&mut self, batch: &Batch) -> Result<()> {
        // A step that ended in an error left dispatches behind.
        if std::mem::take(&mut self.pending) > 0 {
            self.driver.abandon();
        }
        self.step.begin(&self.pool, batch)
    }

    fn embed(&mut self, table: &Self::Table, x: &mut Self::Buffer) -> Result<()> {
        let n = self.rows();
        x.check("embeddings", n, table.cols)?;
        if self.step.largest_token as usize >= table.rows {
            let reason = format!("{} of a vocabulary of {}", self.step.largest_token, table.rows);
            return Err(Error::invalid("token", reason));
        }
        let params = TableParams {
            steps: table.steps() as u32,
            format: table.format_code(),
            width: table.cols as u32,
            out_stride: x.stride as u32,
        };
        let (mut recorder, _, step, _) = self.split();
        let buffers = [&table.numbers, step.tokens.get()?, &x.memory];
        recorder.run(Kernel::EmbedTokens, &buffers, &params, [n as u32, 1, 1], 0)
    }

    fn project(
        &mut self,
        x: &Self::Buffer,
        norm: Option<&Self::Norm>,
        linears: &[&Self::Linear],
        outs: &mut [&mut Self::Buffer],
    ) -> Result<()> {
        if linears.len() != outs.len() {
            return Err(Error::shape("outputs of a projection", linears.len(), outs.len()));
        }
        for (i, (&linear, out)) in linears.iter().zip(outs.iter_mut()).enumerate() {
            let prepared = i > 0 && linears[i - 1].shares_input_with(linear);
            self.product(x, norm, linear, out, false, prepared)?;
        }
        Ok(())
    }

    fn project_add(
        &mut self,
        x: &Self::Buffer,
        norm: Option<&Self::Norm>,
        linear: &Self::Linear,
        acc: &mut Self::Buffer,
    ) -> Result<()> {
        self.product(x, norm, linear, acc, true, false)
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
        self.gate(x, norm, gate, up, activation, out)
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
        self.rotate(q, k, v, head_norms, rope, kv, layer)
    }

    fn attention(
        &mut self,
        q: &Self::Buffer,
        kv: &Self::Kv,
        layer: usize,
        out: &mut Self::Buffer,
    ) -> Result<()> {
        self.attend(q, kv, layer, out)
    }

    fn logits(
        &mut self,
        x: &Self::Buffer,
        norm: &Self::Norm,
        head: &Self::Table,
        out: &mut Vec<f32>,
    ) -> Result<()> {
        x.check("input of the head", self.rows(), head.cols)?;
        if norm.width != head.cols {
            return Err(Error::shape("norm before the head", head.cols, norm.width));
        }
        let n = self.step.n_logit_rows;
        out.clear();
        if n == 0 {
            return self.submit();
        }
        let out_of_memory = || Error::OutOfMemory { what: "logits".into(), bytes: u64::MAX };
        let bytes = n.checked_mul(head.rows).and_then(|n| n.checked_mul(4));
        let bytes = bytes.ok_or_else(out_of_memory)?;
        let (mut recorder, pool, step, scratch) = self.split();
        let normed = scratch.normed.with_room(pool, n * x.stride * 4)?;
        let rows = step.logit_rows.get()?;
        Self::norm_rows(&mut recorder, &x.memory, norm, normed, Some(rows), n)?;
        let logits = scratch.logits.with_room(pool, bytes)?;
        let params = FloatParams {
            rows: head.rows as u32,
            tiles: head.n_tiles() as u32,
            steps: head.steps() as u32,
            tokens: n as u32,
            format: head.format_code(),
            x_stride: x.stride as u32,
            out_stride: head.rows as u32,
            has_bias: 0,
            accumulate: 0,
        };
        Self::float_product(&mut recorder, head, normed, None, logits, &params, false)?;
        self.submit()?;
        self.download(self.scratch.logits.get()?, n, head.rows, head.rows, out)
    }

    fn read(
        &mut self,
        x: &Self::Buffer,
        norm: Option<&Self::Norm>,
        out: &mut Vec<f32>,
    ) -> Result<()> {
        let n = self.rows();
        x.check("buffer", n, norm.map_or(x.width, |norm| norm.width))?;
        out.clear();
        let Some(norm) = norm else {
            self.submit()?;
            return self.download(&x.memory, n, x.width, x.stride, out);
        };
        let (mut recorder, pool, _, scratch) = self.split();
        let normed = scratch.normed.with_room(pool, n * x.stride * 4)?;
        Self::norm_rows(&mut recorder, &x.memory, norm, normed, None, n)?;
        self.submit()?;
        self.download(self.scratch.normed.get()?, n, x.width, x.stride, out)
    }

    fn finish(&mut self) -> Result<()> {
        self.submit()
    }
}

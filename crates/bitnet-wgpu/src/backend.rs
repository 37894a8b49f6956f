//! The backend itself: each operation of the contract as kernels of the current step; what a
//! projection takes is in `products`.

mod products;

use std::sync::{Arc, Weak};

use bitnet_core::backend::{
    Activation, Backend, Batch, DeviceInfo, KvSpec, MemoryUsage, RopeSpec, TableRole, check_batch,
};
use bitnet_core::memory::{AccessPattern, MemoryStats};
use bitnet_core::weights::{FloatRows, LinearWeights, NormWeights};
use bitnet_core::{Error, Result};

use self::products::{FloatProduct, Input};
use crate::buffers::{WgpuBuffer, WgpuNorm, WgpuRope};
use crate::device::{Gpu, GpuBuffer, NAME, Options};
use crate::kv::WgpuKv;
use crate::linear::WgpuLinear;
use crate::memory::{self, Pool, Region};
use crate::pipeline::{Kernel, Store};
use crate::step::{Recorder, Traffic};
use crate::table::WgpuTable;

/// Numbers a workgroup searches for the largest ones.
const PIECE: u32 = 4096;
/// Largest logits that are found on the device; for more, all of them come back.
const MAX_BEST: usize = 256;
/// The row list of a norm that takes all rows.
const NO_LIST: u32 = u32::MAX;

/// A device that wgpu reaches.
pub struct WgpuBackend {
    recorder: Recorder,
    /// Bound in place of what a kernel can do without.
    nothing: Region,
    scratch: Scratch,
    /// Angles of this step's rows, for each rope in use.
    angles: Vec<Angles>,
    positions: Vec<usize>,
    n_steps: u64,
    n_best: Option<usize>,
    /// All tokens of the step are below this,
    token_end: u32,
    /// and all blocks below this.
    block_end: u32,
    /// Positions of each sequence after the step, and blocks of its table.
    extents: Vec<(usize, usize)>,
    /// What was read back last.
    bytes: Vec<u8>,
}

/// Buffers that operations share, grown to the largest step so far.
#[derive(Default)]
struct Scratch {
    codes: Option<Region>,
    scales: Option<Region>,
    normed: Option<Region>,
    gate: Option<Region>,
    best: [Option<Region>; 2],
}

struct Angles {
    of: Weak<RopeSpec>,
    step: u64,
    values: Region,
}

impl WgpuBackend {
    /// The best device there is, with all it has.
    ///
    /// # Errors
    /// [`Error::Device`] if there is none or it cannot be opened.
    pub fn new() -> Result<Self> {
        Self::with_options(Options::default())
    }

    /// The best device, without some of what it has.
    ///
    /// # Errors
    /// As [`WgpuBackend::new`].
    pub fn with_options(options: Options) -> Result<Self> {
        Self::on(Arc::new(Gpu::open(options)?))
    }

    /// Another backend on the same device, which shares its compiled kernels, and its fate if it is
    /// lost.
    ///
    /// # Errors
    /// As [`WgpuBackend::new`].
    pub fn beside(&self) -> Result<Self> {
        Self::on(self.gpu().clone())
    }

    fn on(gpu: Arc<Gpu>) -> Result<Self> {
        let memory = memory::manager(gpu.clone());
        Ok(Self {
            nothing: memory.pool().take(16, AccessPattern::Activations)?,
            recorder: Recorder::new(gpu, memory)?,
            scratch: Scratch::default(),
            angles: Vec::new(),
            positions: Vec::new(),
            n_steps: 0,
            n_best: None,
            token_end: 0,
            block_end: 0,
            extents: Vec::new(),
            bytes: Vec::new(),
        })
    }

    /// Counts what goes over to the device and back from now on; stays valid when the backend has
    /// been handed to a model.
    pub fn traffic(&self) -> Arc<Traffic> {
        self.recorder.traffic()
    }

    /// A way to lose the device on purpose, for tests of what happens then.
    pub fn loss(&self) -> impl Fn() + Send + Sync + use<> {
        let device = self.recorder.gpu.device.clone();
        move || device.destroy()
    }

    /// What the device's memory has been used for so far; transfers are those of weights.
    pub fn memory_stats(&self) -> MemoryStats {
        self.recorder.memory.stats()
    }

    fn pool(&self) -> &Pool {
        self.recorder.memory.pool()
    }

    fn gpu(&self) -> &Arc<Gpu> {
        &self.recorder.gpu
    }

    fn n_tokens(&self) -> usize {
        self.recorder.layout.n_tokens as usize
    }

    /// A shared buffer of at least `bytes` bytes.
    fn scratch(
        &mut self,
        which: impl Fn(&mut Scratch) -> &mut Option<Region>,
        bytes: u64,
    ) -> Result<Region> {
        if let Some(region) = which(&mut self.scratch)
            && region.bytes() >= bytes
        {
            return Ok(region.clone());
        }
        // The old one goes back first, so that the pool can make one of both.
        *which(&mut self.scratch) = None;
        let region = self.pool().take(bytes, AccessPattern::Activations)?;
        *which(&mut self.scratch) = Some(region.clone());
        self.recorder.forget_bindings();
        Ok(region)
    }

    /// The angles of this step's rows under `rope`, sent once a step.
    fn angles(&mut self, rope: &WgpuRope) -> Result<Region> {
        let bytes = 4 * (self.positions.len() * rope.head_dim()) as u64;
        let of = Arc::downgrade(&rope.spec);
        let known = self.angles.iter().position(|angles| angles.of.ptr_eq(&of));
        if let Some(i) = known {
            let angles = &self.angles[i];
            if angles.step == self.n_steps {
                return Ok(angles.values.clone());
            }
            if angles.values.bytes() < bytes {
                self.angles.swap_remove(i);
            }
        }
        let i = match self.angles.iter().position(|angles| angles.of.ptr_eq(&of)) {
            Some(i) => i,
            None => {
                let bytes = bytes.next_power_of_two();
                let values = self.pool().take(bytes, AccessPattern::Activations)?;
                self.recorder.forget_bindings();
                self.angles.push(Angles { of, step: 0, values });
                self.angles.len() - 1
            }
        };
        let mut values = Vec::with_capacity(bytes as usize / 4);
        for &position in &self.positions {
            rope.angles(position, &mut values);
        }
        self.angles[i].step = self.n_steps;
        let region = self.angles[i].values.clone();
        self.recorder.send(region.buffer(), bytemuck::cast_slice(&values));
        Ok(region)
    }

    /// Checks that the step's block tables fit a cache.
    fn check_blocks(&self, kv: &WgpuKv) -> Result<()> {
        let n_blocks = kv.spec.n_blocks;
        if self.block_end as usize > n_blocks {
            let reason = format!("block {} of {n_blocks}", self.block_end - 1);
            return Err(Error::invalid("block table", reason));
        }
        let short = |&&(positions, blocks): &&(usize, usize)| {
            blocks < positions.div_ceil(kv.spec.block_tokens)
        };
        match self.extents.iter().find(short) {
            Some((positions, blocks)) => {
                let reason = format!("{blocks} blocks for {positions} positions");
                Err(Error::invalid("block table", reason))
            }
            None => Ok(()),
        }
    }

    /// The `k` largest of each row of logits, the others −∞.
    fn best_logits(
        &mut self,
        logits: Region,
        vocab: usize,
        k: usize,
        out: &mut Vec<f32>,
    ) -> Result<()> {
        let n_rows = self.recorder.layout.n_logits;
        let (mut n, mut from, mut kernel, mut turn) = (vocab as u32, logits, Kernel::TopLogits, 0);
        loop {
            let n_pieces = n.div_ceil(PIECE);
            let count = n_rows as u64 * u64::from(n_pieces) * k as u64;
            let into = self.scratch(|s| &mut s.best[turn], 8 * count)?;
            let parameters = [n, k as u32, n_pieces];
            let buffers = [(0, from.buffer()), (1, into.buffer())];
            self.recorder.dispatch(kernel, &buffers, &parameters, [n_pieces, n_rows])?;
            (n, from, kernel, turn) = (n_pieces * k as u32, into, Kernel::TopBest, 1 - turn);
            if n_pieces == 1 {
                break;
            }
        }
        let mut bytes = std::mem::take(&mut self.bytes);
        bytes.clear();
        let read = self.recorder.read(from.buffer(), 8 * u64::from(n_rows) * k as u64, &mut bytes);
        out.clear();
        out.resize(n_rows as usize * vocab, f32::NEG_INFINITY);
        for (row, found) in out.chunks_exact_mut(vocab).zip(bytes.chunks_exact(8 * k)) {
            for pair in found.as_chunks::<8>().0 {
                let [a, b, c, d, e, f, g, h] = *pair;
                // Where a row has fewer numbers than wanted, the index is none.
                if let Some(logit) = row.get_mut(u32::from_le_bytes([e, f, g, h]) as usize) {
                    *logit = f32::from_le_bytes([a, b, c, d]);
                }
            }
        }
        self.bytes = bytes;
        read
    }

    /// The first `n` numbers of a buffer.
    fn read_floats(&mut self, from: &GpuBuffer, n: usize, out: &mut Vec<f32>) -> Result<()> {
        let mut bytes = std::mem::take(&mut self.bytes);
        bytes.clear();
        let read = self.recorder.read(from, 4 * n as u64, &mut bytes);
        out.clear();
        out.extend(bytes.as_chunks::<4>().0.iter().map(|b| f32::from_le_bytes(*b)));
        self.bytes = bytes;
        read
    }
}

impl Backend for WgpuBackend {
    type Linear = WgpuLinear;
    type Norm = WgpuNorm;
    type Table = WgpuTable;
    type Rope = WgpuRope;
    type Buffer = WgpuBuffer;
    type Kv = WgpuKv;

    fn device(&self) -> DeviceInfo {
        let gpu = self.gpu();
        let mut kernel = format!("{:?} dot4I8Packed", gpu.info.backend).to_lowercase();
        for (has, what) in [
            (gpu.subgroups, " subgroups"),
            (gpu.half_precision, " f16"),
            (gpu.in_place, " in place"),
        ] {
            if has {
                kernel.push_str(what);
            }
        }
        DeviceInfo { name: NAME.into(), hardware: gpu.info.name.clone(), kernel, threads: 0 }
    }

    fn memory(&self) -> MemoryUsage {
        let bytes = |pattern| self.pool().active_bytes(pattern);
        MemoryUsage {
            weights: bytes(AccessPattern::Weights),
            kv_cache: bytes(AccessPattern::KvCache),
            activations: bytes(AccessPattern::Activations) + bytes(AccessPattern::Readback),
        }
    }

    fn linear(&mut self, weights: &LinearWeights) -> Result<Self::Linear> {
        self.recorder.forget_bindings();
        WgpuLinear::new(&self.recorder.memory, weights)
    }

    fn norm(&mut self, weights: &NormWeights) -> Result<Self::Norm> {
        self.recorder.forget_bindings();
        WgpuNorm::new(self.pool(), weights)
    }

    fn table(&mut self, weights: Arc<dyn FloatRows>, _: TableRole) -> Result<Self::Table> {
        self.recorder.forget_bindings();
        WgpuTable::new(&self.recorder.memory, &weights)
    }

    fn table_bytes(&self, table: &Self::Table, _: Option<usize>) -> u64 {
        table.memory_bytes()
    }

    fn rope(&mut self, spec: &RopeSpec) -> Result<Self::Rope> {
        self.angles.retain(|angles| angles.of.strong_count() > 0);
        WgpuRope::new(spec)
    }

    fn buffer(&mut self, max_tokens: usize, width: usize) -> Result<Self::Buffer> {
        self.recorder.forget_bindings();
        WgpuBuffer::new(self.pool(), max_tokens, width)
    }

    fn kv_cache(&mut self, spec: KvSpec) -> Result<Self::Kv> {
        self.recorder.forget_bindings();
        WgpuKv::new(self.pool(), spec)
    }

    fn begin(&mut self, batch: &Batch) -> Result<()> {
        check_batch(batch)?;
        self.n_steps += 1;
        self.n_best = batch.n_best_plain();
        self.token_end = batch.tokens.iter().max().map_or(0, |&token| token.saturating_add(1));
        let blocks = batch.sequences.iter().flat_map(|slice| &slice.blocks);
        self.block_end = blocks.max().map_or(0, |&block| block.saturating_add(1));
        let ends = batch
            .sequences
            .iter()
            .map(|slice| (slice.first_position + slice.rows.len(), slice.blocks.len()));
        self.extents.clear();
        self.extents.extend(ends);
        self.positions.clear();
        for slice in &batch.sequences {
            self.positions.extend(slice.first_position..slice.first_position + slice.rows.len());
        }
        self.recorder.begin(batch)
    }

    fn embed(&mut self, table: &Self::Table, x: &mut Self::Buffer) -> Result<()> {
        x.check("embeddings", self.n_tokens(), table.cols)?;
        if self.token_end as usize > table.rows {
            let reason = format!("{} of a table of {}", self.token_end - 1, table.rows);
            return Err(Error::invalid("token", reason));
        }
        let layout = self.recorder.layout;
        let step = self.recorder.exchange.input.clone();
        for part in &table.parts {
            let parameters = [
                part.first_row as u32,
                part.n_rows as u32,
                table.cols as u32,
                table.words as u32,
                layout.tokens,
            ];
            self.recorder.dispatch(
                Kernel::Embed(table.dtype),
                &[(0, part.weights.buffer()), (1, step.buffer()), (2, x.data.buffer())],
                &parameters,
                [(table.words as u32).div_ceil(64), layout.n_tokens],
            )?;
        }
        Ok(())
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
        let mut prepared: Option<(&WgpuLinear, Input)> = None;
        for (linear, out) in linears.iter().zip(outs) {
            out.check("output of a projection", self.n_tokens(), linear.rows)?;
            let input = match prepared.take() {
                Some((first, input)) if linear.shares_input_with(first) => input,
                _ => self.prepare(x, norm, linear)?,
            };
            self.product(linear, &input, out.data.buffer(), Store::Set, None)?;
            prepared = Some((linear, input));
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
        acc.check("sum of a projection", self.n_tokens(), linear.rows)?;
        let input = self.prepare(x, norm, linear)?;
        self.product(linear, &input, acc.data.buffer(), Store::Add, None)
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
        if gate.rows != up.rows {
            return Err(Error::shape("rows of gate and up projection", gate.rows, up.rows));
        }
        let n = self.n_tokens();
        out.check("output of a gate", n, gate.rows)?;
        let gates = self.scratch(|s| &mut s.gate, 4 * (n * gate.rows) as u64)?;
        let mut input = self.prepare(x, norm, gate)?;
        self.product(gate, &input, gates.buffer(), Store::Set, None)?;
        if !up.shares_input_with(gate) {
            input = self.prepare(x, norm, up)?;
        }
        let gates = Some((gates.buffer(), activation));
        self.product(up, &input, out.data.buffer(), Store::Gate, gates)
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
        let (n, dim, n_heads) = (self.n_tokens(), kv.spec.head_dim, kv.spec.n_kv_heads);
        q.check("queries", n, q.width)?;
        k.check("keys", n, n_heads * dim)?;
        v.check("values", n, n_heads * dim)?;
        if q.width == 0 || !q.width.is_multiple_of(dim) {
            return Err(Error::shape("queries", format!("a multiple of {dim}"), q.width));
        }
        if rope.head_dim() != dim {
            return Err(Error::shape("angles of a head", dim, rope.head_dim()));
        }
        for norm in head_norms.iter().flat_map(|(q, k)| [q, k]) {
            norm.check("norm of a head", dim)?;
        }
        self.check_blocks(kv)?;
        let parts = kv.layer(layer)?;
        let angles = self.angles(rope)?;
        let (nothing, step) = (self.nothing.clone(), self.recorder.exchange.input.clone());
        let norm = |norm: Option<&WgpuNorm>| {
            let weights = norm.map_or(&nothing, |norm| &norm.weights).clone();
            (weights, u32::from(norm.is_some()), norm.map_or(0, |norm| norm.eps.to_bits()))
        };
        let (weights, normed, eps) = norm(head_norms.map(|(q, _)| q));
        let q_heads = (q.width / dim) as u32;
        self.recorder.dispatch(
            Kernel::Rotate,
            &[(0, weights.buffer()), (1, angles.buffer()), (2, q.data.buffer())],
            &[dim as u32, normed, eps, q_heads],
            [q_heads, n as u32],
        )?;
        let (weights, normed, eps) = norm(head_norms.map(|(_, k)| k));
        for heads in parts {
            let parameters = [
                dim as u32,
                normed,
                eps,
                n_heads as u32,
                heads.first as u32,
                heads.n as u32,
                kv.spec.block_tokens as u32,
                kv.head_words as u32,
                self.recorder.layout.rows,
            ];
            let inputs = [&weights, &angles, &k.data, &v.data, &step, &heads.keys, &heads.values];
            let buffers: Vec<_> = (0..).zip(inputs.map(Region::buffer)).collect();
            let grid = [2 * heads.n as u32, n as u32];
            self.recorder.dispatch(
                Kernel::StoreHeads(kv.spec.dtype),
                &buffers,
                &parameters,
                grid,
            )?;
        }
        Ok(())
    }

    fn attention(
        &mut self,
        q: &Self::Buffer,
        kv: &Self::Kv,
        layer: usize,
        out: &mut Self::Buffer,
    ) -> Result<()> {
        let (n, dim, n_heads) = (self.n_tokens(), kv.spec.head_dim, kv.spec.n_kv_heads);
        q.check("queries", n, q.width)?;
        out.check("output of attention", n, q.width)?;
        if q.width == 0 || !q.width.is_multiple_of(n_heads * dim) {
            let want = format!("a multiple of {} features", n_heads * dim);
            return Err(Error::shape("queries", want, q.width));
        }
        self.check_blocks(kv)?;
        let group = q.width / (n_heads * dim);
        let step = self.recorder.exchange.input.clone();
        for heads in kv.layer(layer)? {
            let parameters = [
                dim as u32,
                (n_heads * group) as u32,
                group as u32,
                heads.first as u32,
                heads.n as u32,
                kv.spec.block_tokens as u32,
                kv.head_words as u32,
                self.recorder.layout.rows,
                (1.0 / (dim as f32).sqrt()).to_bits(),
            ];
            let inputs = [&q.data, &step, &heads.keys, &heads.values, &out.data];
            let buffers: Vec<_> = (0..).zip(inputs.map(Region::buffer)).collect();
            let grid = [(heads.n * group) as u32, n as u32];
            self.recorder.dispatch(
                Kernel::Attention(kv.spec.dtype),
                &buffers,
                &parameters,
                grid,
            )?;
        }
        Ok(())
    }

    fn logits(
        &mut self,
        x: &Self::Buffer,
        norm: &Self::Norm,
        head: &Self::Table,
        out: &mut Vec<f32>,
    ) -> Result<()> {
        x.check("input of the head", self.n_tokens(), head.cols)?;
        norm.check("norm before the head", head.cols)?;
        let layout = self.recorder.layout;
        let n_rows = layout.n_logits as usize;
        if n_rows == 0 {
            out.clear();
            return Ok(());
        }
        let normed = self.scratch(|s| &mut s.normed, 4 * (n_rows * head.cols) as u64)?;
        let norms = [Some(norm), None];
        let (from, list) = (x.data.clone(), layout.logit_rows);
        let into = normed.buffer();
        self.normalize(from.buffer(), head.cols, norms, list, layout.n_logits, into)?;
        self.recorder.make_room(0, 4 * (n_rows * head.rows) as u64)?;
        let logits = self.recorder.exchange.output.clone();
        for part in &head.parts {
            let product = FloatProduct {
                dtype: head.dtype,
                part,
                words: head.words,
                cols: head.cols,
                bias: None,
                n_rows: layout.n_logits,
                out_width: head.rows,
            };
            let (from, into) = (normed.buffer(), logits.buffer());
            self.float_product(&product, from, into, Store::Set, None)?;
        }
        match self.n_best {
            Some(k @ 1..=MAX_BEST) if k < head.rows => self.best_logits(logits, head.rows, k, out),
            _ => self.read_floats(logits.buffer(), n_rows * head.rows, out),
        }
    }

    fn read(
        &mut self,
        x: &Self::Buffer,
        norm: Option<&Self::Norm>,
        out: &mut Vec<f32>,
    ) -> Result<()> {
        let n = self.n_tokens();
        x.check("rows of a buffer", n, x.width)?;
        let Some(norm) = norm else {
            return self.read_floats(x.data.buffer(), n * x.width, out);
        };
        norm.check("norm of a buffer", x.width)?;
        let normed = self.scratch(|s| &mut s.normed, 4 * (n * x.width) as u64)?;
        let (from, into) = (x.data.buffer(), normed.buffer());
        self.normalize(from, x.width, [Some(norm), None], NO_LIST, n as u32, into)?;
        self.read_floats(into, n * x.width, out)
    }

    fn finish(&mut self) -> Result<()> {
        self.recorder.finish()
    }
}

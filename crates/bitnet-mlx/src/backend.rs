//! MLX as a backend: each operation adds to a graph, and the step is evaluated at its end, once.

use crate::array::{Array, Ops};
use crate::fused::Fused;
use crate::kv::MlxKv;
use crate::library::{Device, Mlx, device_error};
use crate::linear::{MlxLinear, MlxNorm, MlxTable, Prepared, Units};
use crate::memory::{Memory, MlxMemory, Placed};
use crate::step::Step;
use bitnet_core::backend::{
    Activation, Backend, Batch, DeviceInfo, KvSpec, MemoryUsage, RopeSpec, TableRole,
};
use bitnet_core::memory::{AccessPattern, EnhancedMemoryPool, GPUMemoryManager, MemoryStats};
use bitnet_core::weights::{FloatRows, LinearWeights, NormWeights};
use bitnet_core::{Error, Result};
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

/// The environment variable that decides whether MLX compiles functions, by `1` or `0`; by default
/// it does on a GPU and does not on a CPU, where its compiler takes seconds.
pub const COMPILE_VARIABLE: &str = "BITNET_MLX_COMPILE";

/// The environment variable that names a file for what the pool was asked for: written when the
/// backend goes, as the text of an [`AllocationTrace`](bitnet_core::memory::AllocationTrace).
pub const TRACE_VARIABLE: &str = "BITNET_MLX_TRACE";

/// MLX as a device.
pub struct MlxBackend {
    ops: Ops,
    fused: Fused,
    memory: Memory,
    units: Units,
    step: Step,
    /// What must have been computed when the step ends: caches, by the count of stores, and the
    /// last value of each buffer, by its number.
    pending: Vec<(u64, Array)>,
    next_buffer: u64,
    accounts: Arc<Accounts>,
    evaluations: Arc<AtomicU64>,
    /// Whether a step could not be computed: graphs may be left that point to its indices.
    failed: bool,
    trace: Option<PathBuf>,
}

/// Bytes promised to caches and buffers, which MLX allocates itself.
#[derive(Default)]
struct Accounts {
    kv_cache: AtomicU64,
    activations: AtomicU64,
}

/// Something counted for as long as it lives.
struct Counted {
    accounts: Arc<Accounts>,
    kind: AccessPattern,
    bytes: u64,
}

impl Accounts {
    fn counter(&self, kind: AccessPattern) -> &AtomicU64 {
        match kind {
            AccessPattern::KvCache => &self.kv_cache,
            _ => &self.activations,
        }
    }

    fn hold(self: &Arc<Self>, kind: AccessPattern, bytes: u64) -> Counted {
        self.counter(kind).fetch_add(bytes, Ordering::Relaxed);
        Counted { accounts: self.clone(), kind, bytes }
    }
}

impl Drop for Counted {
    fn drop(&mut self) {
        self.accounts.counter(self.kind).fetch_sub(self.bytes, Ordering::Relaxed);
    }
}

/// Activations `(max_tokens, width)`: the graph node that is their value.
pub struct MlxBuffer {
    id: u64,
    max_tokens: usize,
    width: usize,
    value: Option<Array>,
    _counted: Counted,
}

/// Rotations: the periods of the pairs.
pub struct MlxRope {
    /// `1 / frequency` `(head_dim / 2)`
    periods: Placed,
    head_dim: usize,
    magnitude: Option<Placed>,
}

/// A cache and its account.
pub struct MlxCache {
    kv: MlxKv,
    _counted: Counted,
}

impl MlxBuffer {
    /// Its rows in the current step.
    fn rows(&self, rows: usize) -> Result<&Array> {
        let there = self.value.as_ref().map_or(0, |value| value.shape()[0]);
        match &self.value {
            Some(value) if there == rows => Ok(value),
            _ => Err(Error::shape("rows of a buffer", format!("{rows} of this step"), there)),
        }
    }
}

impl MlxBackend {
    /// The best device of the MLX on this machine.
    ///
    /// # Errors
    /// [`Error::Device`] if mlx-c cannot be opened, has another version than
    /// [`SUPPORTED_VERSIONS`](crate::SUPPORTED_VERSIONS), or has no device.
    pub fn new() -> Result<Self> {
        let compile = match std::env::var(COMPILE_VARIABLE).as_deref() {
            Ok("1") => Some(true),
            Ok("0") => Some(false),
            Ok(other) if !other.is_empty() => {
                let reason = format!("{other:?} is neither 0 nor 1");
                return Err(Error::invalid(COMPILE_VARIABLE, reason));
            }
            _ => None,
        };
        Self::with_compile(compile)
    }

    /// As [`new`](Self::new), with compiled functions or without; `None` leaves it to the device.
    ///
    /// # Errors
    /// As [`new`](Self::new).
    pub fn with_compile(compile: Option<bool>) -> Result<Self> {
        let mlx = Mlx::get()?;
        let device = Arc::new(Device::best(mlx)?);
        let compile = compile.unwrap_or(device.is_gpu);
        let ops = Ops { mlx, device };
        let pool = EnhancedMemoryPool::new(MlxMemory::new(ops.clone()), u64::MAX);
        let trace = std::env::var_os(TRACE_VARIABLE).filter(|path| !path.is_empty());
        if trace.is_some() {
            pool.start_recording();
        }
        Ok(Self {
            fused: Fused::new(&ops, compile)?,
            memory: GPUMemoryManager::over(pool),
            failed: false,
            trace: trace.map(PathBuf::from),
            units: Units::default(),
            step: Step::default(),
            pending: Vec::new(),
            next_buffer: 0,
            accounts: Arc::default(),
            evaluations: Arc::default(),
            ops,
        })
    }

    /// Counts how often a graph is given to the device to compute.
    pub fn evaluations(&self) -> Arc<AtomicU64> {
        self.evaluations.clone()
    }

    /// The pool its weights and indices lie in.
    pub fn pool(&self) -> &EnhancedMemoryPool<MlxMemory> {
        self.memory.pool()
    }

    /// What the pool has done, and what went to the device and back.
    pub fn memory_stats(&self) -> MemoryStats {
        self.memory.stats()
    }

    /// Sets the value of a buffer, to be computed with the step.
    fn set(&mut self, buffer: &mut MlxBuffer, value: Array) -> Result<()> {
        let (rows, shape) = (self.step.rows(), value.shape());
        if rows > buffer.max_tokens || shape != [rows, buffer.width] {
            let want = format!("at most {} rows of {}", buffer.max_tokens, buffer.width);
            return Err(Error::shape("value of a buffer", want, format!("{shape:?}")));
        }
        self.pending.retain(|(id, _)| *id != buffer.id);
        self.pending.push((buffer.id, value.clone()));
        buffer.value = Some(value);
        Ok(())
    }

    /// Computes all that is pending, and `with` it.
    fn evaluate(&mut self, with: Option<&Array>) -> Result<()> {
        let pending = std::mem::take(&mut self.pending);
        if pending.is_empty() && with.is_none() {
            return Ok(());
        }
        let arrays: Vec<&Array> = pending.iter().map(|(_, array)| array).chain(with).collect();
        self.evaluations.fetch_add(1, Ordering::Relaxed);
        let result = self.ops.evaluate(&arrays);
        self.failed |= result.is_err();
        result
    }

    /// Outputs of projections that share an input.
    fn products(
        &self,
        x: &Array,
        norm: Option<&MlxNorm>,
        linears: &[&MlxLinear],
    ) -> Result<Vec<Array>> {
        let width = x.shape()[1];
        if let Some(linear) = linears.iter().find(|linear| linear.cols() != width) {
            return Err(Error::shape("input of a projection", linear.cols(), width));
        }
        let x = match norm {
            Some(norm) => &norm.apply(&self.ops, x)?,
            None => x,
        };
        let mut last: Option<(&MlxLinear, Prepared)> = None;
        let mut outs = Vec::with_capacity(linears.len());
        for linear in linears {
            let serves = |(of, input): &(&MlxLinear, Prepared)| {
                of.same_norm(linear) && linear.accepts(input)
            };
            if !last.as_ref().is_some_and(serves) {
                let own = match &linear.input_norm {
                    Some(norm) => &norm.apply(&self.ops, x)?,
                    None => x,
                };
                last = Some((linear, linear.prepare(&self.ops, &self.fused, own)?));
            }
            if let Some((_, input)) = &last {
                outs.push(linear.product(&self.ops, input)?);
            }
        }
        Ok(outs)
    }

    fn product(&self, x: &Array, norm: Option<&MlxNorm>, linear: &MlxLinear) -> Result<Array> {
        let mut outs = self.products(x, norm, &[linear])?;
        outs.pop().ok_or_else(|| Error::invalid("projection", "no result"))
    }

    /// `(tokens, heads · dim)`, normalized and rotated, as `(tokens, heads, dim)`.
    fn turn(&mut self, x: &Array, norm: Option<&MlxNorm>, rope: &MlxRope) -> Result<Array> {
        let (rows, dim) = (self.step.rows(), rope.head_dim);
        let width = x.shape()[1];
        if !width.is_multiple_of(dim) {
            let want = format!("a multiple of {dim}");
            return Err(Error::shape("width of queries or keys", want, width));
        }
        let mut x = self.ops.reshape(x, &[rows, width / dim, 1, dim])?;
        if let Some(norm) = norm {
            if norm.width() != dim {
                return Err(Error::shape("norm of a head", dim, norm.width()));
            }
            x = norm.apply(&self.ops, &x)?;
        }
        let positions = self.step.positions(&self.ops, &self.memory)?.array();
        x = self.ops.rope(&x, dim, positions, rope.periods.array())?;
        if let Some(magnitude) = &rope.magnitude {
            x = self.ops.multiply(&x, magnitude.array())?;
        }
        self.ops.reshape(&x, &[rows, width / dim, dim])
    }
}

impl Drop for MlxBackend {
    fn drop(&mut self) {
        if let (Some(path), Some(trace)) = (&self.trace, self.memory.pool().stop_recording()) {
            // Nobody is left to hear that a file could not be written; it is then not there.
            let _ = std::fs::write(path, trace.to_string());
        }
    }
}

impl Backend for MlxBackend {
    type Linear = MlxLinear;
    type Norm = MlxNorm;
    type Table = MlxTable;
    type Rope = MlxRope;
    type Buffer = MlxBuffer;
    type Kv = MlxCache;

    fn device(&self) -> DeviceInfo {
        let kind = if self.ops.device.is_gpu { "gpu" } else { "cpu" };
        let hardware = self.ops.device.info().0.unwrap_or_else(|| kind.into());
        let compiled = if self.fused.is_compiled() { ", compiled" } else { "" };
        DeviceInfo {
            name: "mlx".into(),
            hardware,
            kernel: format!("MLX {} on {kind}{compiled}", self.ops.mlx.version),
            threads: 1,
        }
    }

    fn memory(&self) -> MemoryUsage {
        let pool = |pattern| self.memory.pool().active_bytes(pattern);
        MemoryUsage {
            weights: pool(AccessPattern::Weights),
            kv_cache: self.accounts.kv_cache.load(Ordering::Relaxed),
            activations: self.accounts.activations.load(Ordering::Relaxed)
                + pool(AccessPattern::Upload),
        }
    }

    fn linear(&mut self, weights: &LinearWeights) -> Result<MlxLinear> {
        MlxLinear::new(&self.ops, self.memory.pool(), &mut self.units, weights)
    }

    fn norm(&mut self, weights: &NormWeights) -> Result<MlxNorm> {
        MlxNorm::new(&self.ops, self.memory.pool(), weights)
    }

    fn table(&mut self, weights: Arc<dyn FloatRows>, _: TableRole) -> Result<MlxTable> {
        MlxTable::new(&self.ops, self.memory.pool(), &*weights)
    }

    fn table_bytes(&self, table: &MlxTable, _: Option<usize>) -> u64 {
        table.bytes()
    }

    fn rope(&mut self, spec: &RopeSpec) -> Result<MlxRope> {
        let bad = spec.inv_freq.iter().any(|f| !f.is_finite()) || !spec.magnitude.is_finite();
        if bad || spec.inv_freq.is_empty() {
            return Err(Error::invalid("rotary embedding", "frequencies are not all numbers"));
        }
        let periods: Vec<f32> = spec.inv_freq.iter().map(|f| 1.0 / f).collect();
        let magnitude = (spec.magnitude != 1.0)
            .then(|| Placed::floats(&self.ops, self.memory.pool(), &[spec.magnitude], &[1]))
            .transpose()?;
        let periods =
            Placed::floats(&self.ops, self.memory.pool(), &periods, &[spec.inv_freq.len()])?;
        Ok(MlxRope { periods, head_dim: 2 * spec.inv_freq.len(), magnitude })
    }

    fn buffer(&mut self, max_tokens: usize, width: usize) -> Result<MlxBuffer> {
        if max_tokens == 0 || width == 0 {
            return Err(Error::invalid("buffer", format!("{max_tokens} × {width} is empty")));
        }
        let bytes = (max_tokens as u64).checked_mul(width as u64).and_then(|n| n.checked_mul(4));
        let fits = bytes.filter(|&bytes| i32::try_from(bytes / 4).is_ok());
        let bytes = fits.ok_or_else(|| Error::OutOfMemory {
            what: "activations".into(),
            bytes: bytes.unwrap_or(u64::MAX),
        })?;
        self.next_buffer += 1;
        let counted = self.accounts.hold(AccessPattern::Activations, bytes);
        Ok(MlxBuffer { id: self.next_buffer, max_tokens, width, value: None, _counted: counted })
    }

    fn kv_cache(&mut self, spec: KvSpec) -> Result<MlxCache> {
        let kv = MlxKv::new(spec)?;
        let counted = self.accounts.hold(AccessPattern::KvCache, kv.capacity_bytes());
        Ok(MlxCache { kv, _counted: counted })
    }

    fn begin(&mut self, batch: &Batch) -> Result<()> {
        // What an abandoned step left; its indices go now.
        self.evaluate(None)?;
        if self.failed {
            return Err(device_error("an earlier step could not be computed"));
        }
        self.step.begin(batch)
    }

    fn embed(&mut self, table: &MlxTable, x: &mut MlxBuffer) -> Result<()> {
        if table.hidden() != x.width {
            return Err(Error::shape("embeddings", table.hidden(), x.width));
        }
        let tokens = self.step.tokens(&self.ops, &self.memory, table.vocab())?;
        let rows = self.ops.take_rows(table.rows(), tokens.array())?;
        self.set(x, rows)
    }

    fn project(
        &mut self,
        x: &MlxBuffer,
        norm: Option<&MlxNorm>,
        linears: &[&MlxLinear],
        outs: &mut [&mut MlxBuffer],
    ) -> Result<()> {
        if linears.len() != outs.len() {
            let want = format!("{} buffers", linears.len());
            return Err(Error::shape("outputs of a projection", want, outs.len()));
        }
        let values = self.products(x.rows(self.step.rows())?, norm, linears)?;
        for (out, value) in outs.iter_mut().zip(values) {
            self.set(out, value)?;
        }
        Ok(())
    }

    fn project_add(
        &mut self,
        x: &MlxBuffer,
        norm: Option<&MlxNorm>,
        linear: &MlxLinear,
        acc: &mut MlxBuffer,
    ) -> Result<()> {
        let n = self.step.rows();
        let y = self.product(x.rows(n)?, norm, linear)?;
        if linear.rows() != acc.width {
            return Err(Error::shape("accumulator", linear.rows(), acc.width));
        }
        let sum = self.ops.add(acc.rows(n)?, &y)?;
        self.set(acc, sum)
    }

    fn gated(
        &mut self,
        x: &MlxBuffer,
        norm: Option<&MlxNorm>,
        gate: &MlxLinear,
        up: &MlxLinear,
        activation: Activation,
        out: &mut MlxBuffer,
    ) -> Result<()> {
        if gate.rows() != up.rows() {
            return Err(Error::shape("gate and up", gate.rows(), up.rows()));
        }
        let halves = self.products(x.rows(self.step.rows())?, norm, &[gate, up])?;
        let [gate, up] = &halves[..] else {
            return Err(Error::invalid("gate", "two products were expected"));
        };
        let value = self.fused.gate(activation, gate, up)?;
        self.set(out, value)
    }

    fn rotate_and_store(
        &mut self,
        q: &mut MlxBuffer,
        k: &mut MlxBuffer,
        v: &MlxBuffer,
        head_norms: Option<(&MlxNorm, &MlxNorm)>,
        rope: &MlxRope,
        kv: &mut MlxCache,
        layer: usize,
    ) -> Result<()> {
        let n = self.step.rows();
        let kv = &mut kv.kv;
        let spec = kv.spec();
        kv.check_layer(layer)?;
        let width = spec.n_kv_heads * spec.head_dim;
        for (what, buffer) in [("keys", &*k), ("values", v)] {
            if buffer.width != width {
                return Err(Error::shape(what, width, buffer.width));
            }
        }
        if rope.head_dim != spec.head_dim {
            return Err(Error::shape("rotations of a head", spec.head_dim, rope.head_dim));
        }
        let turned = self.turn(q.rows(n)?, head_norms.map(|(q, _)| q), rope)?;
        let turned = self.ops.reshape(&turned, &[n, q.width])?;
        self.set(q, turned)?;
        let keys = self.turn(k.rows(n)?, head_norms.map(|(_, k)| k), rope)?;
        let values = self.ops.reshape(v.rows(n)?, &[n, spec.n_kv_heads, spec.head_dim])?;
        let (slots, highest) = self.step.slots(&self.ops, &self.memory, &spec)?;
        kv.reserve(&self.ops, layer, highest)?;
        for (part, x) in [(0, &keys), (1, &values)] {
            for array in kv.store(&self.ops, layer, part, slots.array(), x)? {
                // Buffers are numbered from 1.
                self.pending.push((0, array));
            }
        }
        Ok(())
    }

    fn attention(
        &mut self,
        q: &MlxBuffer,
        kv: &MlxCache,
        layer: usize,
        out: &mut MlxBuffer,
    ) -> Result<()> {
        let (ops, kv) = (&self.ops, &kv.kv);
        let KvSpec { head_dim, n_kv_heads, .. } = kv.spec();
        kv.check_layer(layer)?;
        let group = n_kv_heads * head_dim;
        if !q.width.is_multiple_of(group) {
            return Err(Error::shape("queries", format!("a multiple of {group}"), q.width));
        }
        let n_heads = q.width / head_dim;
        let x = q.rows(self.step.rows())?;
        let scale = 1.0 / (head_dim as f32).sqrt();
        let (_, highest) = self.step.slots(ops, &self.memory, &kv.spec())?;
        let mut outs = Vec::with_capacity(self.step.batch.sequences.len());
        for (i, slice) in self.step.batch.sequences.iter().enumerate() {
            let (rows, positions) = (slice.rows.len(), slice.first_position + slice.rows.len());
            let blocks = self.step.blocks(i)?.array();
            let [k, v] = [0, 1].map(|part| kv.gather(ops, layer, part, blocks, highest, positions));
            let own = ops.slice_rows(x, slice.rows.start, slice.rows.end)?;
            let own = ops.reshape(&own, &[1, rows, n_heads, head_dim])?;
            let own = ops.transpose(&own, &[0, 2, 1, 3])?;
            let y = ops.attention(&own, &k?, &v?, scale, rows > 1)?;
            let y = ops.transpose(&y, &[0, 2, 1, 3])?;
            outs.push(ops.reshape(&y, &[rows, q.width])?);
        }
        let value = match &outs[..] {
            [only] => only.clone(),
            outs => ops.concatenate_rows(&outs.iter().collect::<Vec<_>>())?,
        };
        self.set(out, value)
    }

    fn logits(
        &mut self,
        x: &MlxBuffer,
        norm: &MlxNorm,
        head: &MlxTable,
        out: &mut Vec<f32>,
    ) -> Result<()> {
        let x = x.rows(self.step.rows())?;
        if x.shape()[1] != head.hidden() {
            return Err(Error::shape("input of the head", head.hidden(), x.shape()[1]));
        }
        out.clear();
        if self.step.batch.logit_rows.is_empty() {
            return Ok(());
        }
        let rows = self.step.logit_rows(&self.ops, &self.memory)?;
        let x = self.ops.take_rows(x, rows.array())?;
        let logits = self.ops.matmul(&norm.apply(&self.ops, &x)?, head.columns())?;
        let logits = self.ops.contiguous(&logits)?;
        self.evaluate(Some(&logits))?;
        self.ops.copy_out(&logits, out)
    }

    fn read(&mut self, x: &MlxBuffer, norm: Option<&MlxNorm>, out: &mut Vec<f32>) -> Result<()> {
        let mut value = x.rows(self.step.rows())?.clone();
        if let Some(norm) = norm {
            value = norm.apply(&self.ops, &value)?;
        }
        let value = self.ops.contiguous(&value)?;
        self.evaluate(Some(&value))?;
        self.ops.copy_out(&value, out)
    }

    fn finish(&mut self) -> Result<()> {
        self.evaluate(None)
    }
}

//! MLX as a backend: each operation is checked and recorded, and the step is run at its end, as one
//! graph that is evaluated once.

use crate::array::{Array, Ops};
use crate::compiled::Compiled;
use crate::fused::Fused;
use crate::kv::MlxKv;
use crate::library::{Device, Mlx, device_error};
use crate::linear::{MlxLinear, MlxNorm, MlxTable, Units};
use crate::memory::{Memory, MlxMemory, Placed};
use crate::program::{Extents, Op, Program, Shared, State};
use crate::step::Step;
use bitnet_core::backend::{
    Activation, Backend, Batch, DeviceInfo, KvSpec, MemoryUsage, RopeSpec, TableRole,
};
use bitnet_core::memory::{AccessPattern, EnhancedMemoryPool, GPUMemoryManager, MemoryStats};
use bitnet_core::weights::{FloatRows, LinearWeights, NormWeights};
use bitnet_core::{Error, Result};
use std::collections::BTreeMap;
use std::path::PathBuf;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard};
use std::time::{Duration, Instant};

/// The environment variable that decides what MLX compiles, by the number of a [`Compile`].
pub const COMPILE_VARIABLE: &str = "BITNET_MLX_COMPILE";

/// How the graph of a step in which every sequence has one token is made.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Compile {
    /// Node by node, like that of any other step.
    Nothing,
    /// By one function, traced once and replayed. The default on a CPU.
    Steps,
    /// As [`Steps`](Self::Steps), and what is computed number by number becomes kernels, in other steps
    /// too. The default on a GPU. On a CPU MLX calls a C++ compiler for this, which takes seconds, and
    /// writes constants with six digits, so that results differ in their last bits.
    Kernels,
}

impl Compile {
    /// What [`COMPILE_VARIABLE`] says, if it says something.
    fn from_environment() -> Result<Option<Self>> {
        match std::env::var(COMPILE_VARIABLE).as_deref() {
            Ok("0") => Ok(Some(Self::Nothing)),
            Ok("1") => Ok(Some(Self::Steps)),
            Ok("2") => Ok(Some(Self::Kernels)),
            Ok(other) if !other.is_empty() => {
                Err(Error::invalid(COMPILE_VARIABLE, format!("{other:?} is not 0, 1 or 2")))
            }
            _ => Ok(None),
        }
    }
}

/// The environment variable that names a file for what the pool was asked for: written when the
/// backend goes, as the text of an [`AllocationTrace`](bitnet_core::memory::AllocationTrace).
pub const TRACE_VARIABLE: &str = "BITNET_MLX_TRACE";

/// MLX as a device.
pub struct MlxBackend {
    ops: Ops,
    fused: Fused,
    /// Whole steps, if they are to be compiled.
    compiled: Option<Compiled>,
    compile: Compile,
    memory: Memory,
    units: Units,
    step: Step,
    n_steps: u64,
    /// What was asked for and not run yet.
    program: Program,
    /// The last value of each buffer in this step.
    values: BTreeMap<u64, Array>,
    next_buffer: u64,
    accounts: Arc<Accounts>,
    counts: Arc<Counts>,
    /// Whether a step could not be computed: caches are lost then, and graphs may be left that point
    /// to its indices.
    failed: bool,
    /// Set by a test that has lost the device.
    lost: Arc<AtomicBool>,
    trace: Option<PathBuf>,
}

/// What a backend did, counted since it was made.
#[derive(Debug, Default)]
pub struct Counts {
    evaluations: AtomicU64,
    compiled: AtomicU64,
    building_nanos: AtomicU64,
}

impl Counts {
    /// How often a graph was given to the device to compute.
    pub fn evaluations(&self) -> u64 {
        self.evaluations.load(Ordering::Relaxed)
    }

    /// How many of these graphs were made by one compiled function.
    pub fn compiled(&self) -> u64 {
        self.compiled.load(Ordering::Relaxed)
    }

    /// Time in which graphs were made, before they were computed.
    pub fn building(&self) -> Duration {
        Duration::from_nanos(self.building_nanos.load(Ordering::Relaxed))
    }
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

/// Activations `(max_tokens, width)`: the name of a node of the step's graph.
pub struct MlxBuffer {
    id: u64,
    max_tokens: usize,
    width: usize,
    /// The step that wrote it last.
    step: u64,
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
    kv: Mutex<MlxKv>,
    _counted: Counted,
}

impl MlxCache {
    /// Nobody holds it while the backend that owns it is used by another: the lock is free.
    pub(crate) fn lock(&self) -> MutexGuard<'_, MlxKv> {
        self.kv.lock().unwrap_or_else(|poisoned| poisoned.into_inner())
    }
}

impl MlxRope {
    /// `(tokens, heads · dim)`, normalized and rotated, as `(tokens, heads, dim)`.
    pub(crate) fn turn(
        &self,
        ops: &Ops,
        x: &Array,
        norm: &Option<Shared<MlxNorm>>,
        positions: &Array,
    ) -> Result<Array> {
        let (shape, dim) = (x.shape(), self.head_dim);
        let (rows, heads) = (shape[0], shape[1] / dim);
        let mut x = ops.reshape(x, &[rows, heads, 1, dim])?;
        if let Some(norm) = norm {
            x = norm.apply(ops, &x)?;
        }
        x = ops.rope(&x, dim, positions, self.periods.array())?;
        if let Some(magnitude) = &self.magnitude {
            x = ops.multiply(&x, magnitude.array())?;
        }
        ops.reshape(&x, &[rows, heads, dim])
    }
}

impl MlxBackend {
    /// The best device of the MLX on this machine.
    ///
    /// # Errors
    /// [`Error::Device`] if mlx-c cannot be opened, has another version than
    /// [`SUPPORTED_VERSIONS`](crate::SUPPORTED_VERSIONS), or has no device.
    pub fn new() -> Result<Self> {
        Self::with_compile(Compile::from_environment()?)
    }

    /// As [`new`](Self::new), with graphs made in this way; `None` leaves it to the device.
    ///
    /// # Errors
    /// As [`new`](Self::new).
    pub fn with_compile(compile: Option<Compile>) -> Result<Self> {
        let mlx = Mlx::get()?;
        let device = Arc::new(Device::best(mlx)?);
        let best = if device.is_gpu { Compile::Kernels } else { Compile::Steps };
        let compile = compile.unwrap_or(best);
        let fuse = compile == Compile::Kernels;
        let ops = Ops { mlx, device };
        let pool = EnhancedMemoryPool::new(MlxMemory::new(ops.clone()), u64::MAX);
        let trace = std::env::var_os(TRACE_VARIABLE).filter(|path| !path.is_empty());
        if trace.is_some() {
            pool.start_recording();
        }
        Ok(Self {
            fused: Fused::new(&ops, fuse)?,
            compiled: (compile != Compile::Nothing).then(|| Compiled::new(&ops, fuse)),
            compile,
            memory: GPUMemoryManager::over(pool),
            failed: false,
            lost: Arc::default(),
            trace: trace.map(PathBuf::from),
            units: Units::default(),
            step: Step::default(),
            n_steps: 0,
            program: Program::default(),
            values: BTreeMap::new(),
            next_buffer: 0,
            accounts: Arc::default(),
            counts: Arc::default(),
            ops,
        })
    }

    /// What it does from now on; stays valid when the backend has been handed to a model.
    pub fn counts(&self) -> Arc<Counts> {
        self.counts.clone()
    }

    /// A way to lose the device on purpose, for tests of what happens then: from the next step on MLX
    /// reports an error.
    pub fn loss(&self) -> impl Fn() + Send + Sync + use<> {
        let lost = self.lost.clone();
        move || lost.store(true, Ordering::Relaxed)
    }

    /// The pool its weights and indices lie in.
    pub fn pool(&self) -> &EnhancedMemoryPool<MlxMemory> {
        self.memory.pool()
    }

    /// What the pool has done, and what went to the device and back.
    pub fn memory_stats(&self) -> MemoryStats {
        self.memory.stats()
    }

    /// Checks that this step wrote a buffer.
    fn check_written(&self, buffer: &MlxBuffer) -> Result<()> {
        let rows = format!("{} of this step", self.step.rows());
        match buffer.step == self.n_steps {
            true => Ok(()),
            false => Err(Error::shape("rows of a buffer", rows, "none")),
        }
    }

    /// Checks that a buffer has room for this step's rows of `width`; it is written from now on.
    fn write(&self, buffer: &mut MlxBuffer, width: usize) -> Result<()> {
        let rows = self.step.rows();
        if rows > buffer.max_tokens || width != buffer.width {
            let want = format!("at most {} rows of {}", buffer.max_tokens, buffer.width);
            return Err(Error::shape("value of a buffer", want, format!("{rows} of {width}")));
        }
        buffer.step = self.n_steps;
        Ok(())
    }

    /// Checks that projections take the rows of a buffer, normalized.
    fn check_input(
        &self,
        x: &MlxBuffer,
        norm: Option<&Shared<MlxNorm>>,
        linears: &[&Shared<MlxLinear>],
    ) -> Result<()> {
        self.check_written(x)?;
        check_norm(norm, x.width)?;
        match linears.iter().find(|linear| linear.cols() != x.width) {
            Some(linear) => Err(Error::shape("input of a projection", linear.cols(), x.width)),
            None => Ok(()),
        }
    }

    /// Runs what was recorded. Returns what is for the host.
    fn flush(&mut self) -> Result<Option<Array>> {
        let program = std::mem::take(&mut self.program);
        if program.is_empty() {
            return Ok(None);
        }
        let from_nothing = self.values.is_empty();
        let values = std::mem::take(&mut self.values);
        // Unless all of it succeeds, keys and values are gone.
        self.failed = true;
        let start = Instant::now();
        let (indices, places) = (self.step.indices(), program.take_places()?);
        let mut state = State { indices, places, values, result: None };
        match &mut self.compiled {
            Some(compiled) if from_nothing && self.step.is_decode() && program.has_result() => {
                compiled.run(&program, &mut state)?;
                self.counts.compiled.fetch_add(1, Ordering::Relaxed);
            }
            _ => program.run(&self.ops, &self.fused, &Extents::Known(&self.step), &mut state)?,
        }
        let nanos = u64::try_from(start.elapsed().as_nanos()).unwrap_or(u64::MAX);
        self.counts.building_nanos.fetch_add(nanos, Ordering::Relaxed);
        self.counts.evaluations.fetch_add(1, Ordering::Relaxed);
        if self.lost.load(Ordering::Relaxed) {
            // What no device can: the library's error takes the way of any other.
            self.ops.reshape(&self.ops.floats(&[0.0], &[1])?, &[2])?;
        }
        self.ops.evaluate(&state.outputs())?;
        self.failed = false;
        program.put_places(state.places);
        self.values = state.values;
        Ok(state.result)
    }

    /// Runs what was recorded and copies its result to the host.
    fn flush_to(&mut self, out: &mut Vec<f32>) -> Result<()> {
        match self.flush()? {
            Some(result) => self.ops.copy_out(&result, out),
            None => Err(device_error("a step has no result")),
        }
    }
}

/// Checks that a norm fits rows of `width`.
fn check_norm(norm: Option<&Shared<MlxNorm>>, width: usize) -> Result<()> {
    match norm {
        Some(norm) if norm.width() != width => Err(Error::shape("norm", width, norm.width())),
        _ => Ok(()),
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
    type Linear = Shared<MlxLinear>;
    type Norm = Shared<MlxNorm>;
    type Table = Shared<MlxTable>;
    type Rope = Shared<MlxRope>;
    type Buffer = MlxBuffer;
    type Kv = Shared<MlxCache>;

    fn device(&self) -> DeviceInfo {
        let kind = if self.ops.device.is_gpu { "gpu" } else { "cpu" };
        let hardware = self.ops.device.info().0.unwrap_or_else(|| kind.into());
        let compiled = match self.compile {
            Compile::Nothing => "",
            Compile::Steps => ", compiled steps",
            Compile::Kernels => ", compiled steps and kernels",
        };
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

    fn linear(&mut self, weights: &LinearWeights) -> Result<Self::Linear> {
        MlxLinear::new(&self.ops, self.memory.pool(), &mut self.units, weights).map(Shared::new)
    }

    fn norm(&mut self, weights: &NormWeights) -> Result<Self::Norm> {
        MlxNorm::new(&self.ops, self.memory.pool(), weights).map(Shared::new)
    }

    fn table(&mut self, weights: Arc<dyn FloatRows>, _: TableRole) -> Result<Self::Table> {
        MlxTable::new(&self.ops, self.memory.pool(), &*weights).map(Shared::new)
    }

    fn table_bytes(&self, table: &Self::Table, _: Option<usize>) -> u64 {
        table.bytes()
    }

    fn rope(&mut self, spec: &RopeSpec) -> Result<Self::Rope> {
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
        Ok(Shared::new(MlxRope { periods, head_dim: 2 * spec.inv_freq.len(), magnitude }))
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
        Ok(MlxBuffer { id: self.next_buffer, max_tokens, width, step: 0, _counted: counted })
    }

    fn kv_cache(&mut self, spec: KvSpec) -> Result<Self::Kv> {
        let kv = MlxKv::new(spec)?;
        let counted = self.accounts.hold(AccessPattern::KvCache, kv.capacity_bytes());
        Ok(Shared::new(MlxCache { kv: Mutex::new(kv), _counted: counted }))
    }

    fn begin(&mut self, batch: &Batch) -> Result<()> {
        // What an abandoned step left was never run.
        self.program = Program::default();
        self.values.clear();
        self.n_steps += 1;
        if self.failed {
            return Err(device_error("an earlier step could not be computed"));
        }
        self.step.begin(batch, self.compiled.is_some())
    }

    fn embed(&mut self, table: &Self::Table, x: &mut MlxBuffer) -> Result<()> {
        if table.hidden() != x.width {
            return Err(Error::shape("embeddings", table.hidden(), x.width));
        }
        self.step.tokens(&self.ops, &self.memory, table.vocab())?;
        self.write(x, table.hidden())?;
        self.program.push(Op::Embed { table: table.clone(), x: x.id });
        Ok(())
    }

    fn project(
        &mut self,
        x: &MlxBuffer,
        norm: Option<&Self::Norm>,
        linears: &[&Self::Linear],
        outs: &mut [&mut MlxBuffer],
    ) -> Result<()> {
        if linears.len() != outs.len() {
            let want = format!("{} buffers", linears.len());
            return Err(Error::shape("outputs of a projection", want, outs.len()));
        }
        self.check_input(x, norm, linears)?;
        for (out, linear) in outs.iter_mut().zip(linears) {
            self.write(out, linear.rows())?;
        }
        let linears = linears.iter().map(|&linear| linear.clone()).collect();
        let outs = outs.iter().map(|out| out.id).collect();
        self.program.push(Op::Project { x: x.id, norm: norm.cloned(), linears, outs });
        Ok(())
    }

    fn project_add(
        &mut self,
        x: &MlxBuffer,
        norm: Option<&Self::Norm>,
        linear: &Self::Linear,
        acc: &mut MlxBuffer,
    ) -> Result<()> {
        self.check_input(x, norm, &[linear])?;
        self.check_written(acc)?;
        if linear.rows() != acc.width {
            return Err(Error::shape("accumulator", linear.rows(), acc.width));
        }
        let (norm, linear) = (norm.cloned(), linear.clone());
        self.program.push(Op::ProjectAdd { x: x.id, norm, linear, acc: acc.id });
        Ok(())
    }

    fn gated(
        &mut self,
        x: &MlxBuffer,
        norm: Option<&Self::Norm>,
        gate: &Self::Linear,
        up: &Self::Linear,
        activation: Activation,
        out: &mut MlxBuffer,
    ) -> Result<()> {
        if gate.rows() != up.rows() {
            return Err(Error::shape("gate and up", gate.rows(), up.rows()));
        }
        self.check_input(x, norm, &[gate, up])?;
        self.write(out, gate.rows())?;
        let (norm, halves) = (norm.cloned(), [gate, up].map(Clone::clone));
        self.program.push(Op::Gate { x: x.id, norm, halves, activation, out: out.id });
        Ok(())
    }

    fn rotate_and_store(
        &mut self,
        q: &mut MlxBuffer,
        k: &mut MlxBuffer,
        v: &MlxBuffer,
        head_norms: Option<(&Self::Norm, &Self::Norm)>,
        rope: &Self::Rope,
        kv: &mut Self::Kv,
        layer: usize,
    ) -> Result<()> {
        let spec = kv.lock().spec();
        kv.lock().check_layer(layer)?;
        let (dim, width) = (spec.head_dim, spec.n_kv_heads * spec.head_dim);
        for (what, buffer) in [("keys", &*k), ("values", v)] {
            self.check_written(buffer)?;
            if buffer.width != width {
                return Err(Error::shape(what, width, buffer.width));
            }
        }
        self.check_written(q)?;
        if !q.width.is_multiple_of(dim) {
            return Err(Error::shape("width of queries", format!("a multiple of {dim}"), q.width));
        }
        if rope.head_dim != dim {
            return Err(Error::shape("rotations of a head", dim, rope.head_dim));
        }
        check_norm(head_norms.map(|(q, _)| q), dim)?;
        check_norm(head_norms.map(|(_, k)| k), dim)?;
        if self.step.has_other_slots(&spec) {
            self.flush()?;
        }
        self.step.positions(&self.ops, &self.memory)?;
        let (_, highest) = self.step.slots(&self.ops, &self.memory, &spec)?;
        kv.lock().reserve(&self.ops, layer, highest)?;
        let place = self.program.place(kv, layer);
        self.program.push(Op::Store {
            qkv: [q.id, k.id, v.id],
            norms: [head_norms.map(|(q, _)| q.clone()), head_norms.map(|(_, k)| k.clone())],
            rope: rope.clone(),
            place,
        });
        Ok(())
    }

    fn attention(
        &mut self,
        q: &MlxBuffer,
        kv: &Self::Kv,
        layer: usize,
        out: &mut MlxBuffer,
    ) -> Result<()> {
        let spec = kv.lock().spec();
        kv.lock().check_layer(layer)?;
        let group = spec.n_kv_heads * spec.head_dim;
        if !q.width.is_multiple_of(group) {
            return Err(Error::shape("queries", format!("a multiple of {group}"), q.width));
        }
        self.check_written(q)?;
        if self.step.has_other_slots(&spec) {
            self.flush()?;
        }
        self.step.positions(&self.ops, &self.memory)?;
        let (_, highest) = self.step.slots(&self.ops, &self.memory, &spec)?;
        kv.lock().check_held(layer, highest)?;
        self.write(out, q.width)?;
        let place = self.program.place(kv, layer);
        self.program.push(Op::Attend { q: q.id, place, out: out.id });
        Ok(())
    }

    fn logits(
        &mut self,
        x: &MlxBuffer,
        norm: &Self::Norm,
        head: &Self::Table,
        out: &mut Vec<f32>,
    ) -> Result<()> {
        self.check_written(x)?;
        if x.width != head.hidden() {
            return Err(Error::shape("input of the head", head.hidden(), x.width));
        }
        check_norm(Some(norm), x.width)?;
        out.clear();
        if self.step.batch.logit_rows.is_empty() {
            return Ok(());
        }
        self.step.logit_rows(&self.ops, &self.memory)?;
        self.program.push(Op::Logits { x: x.id, norm: norm.clone(), head: head.clone() });
        self.flush_to(out)
    }

    fn read(&mut self, x: &MlxBuffer, norm: Option<&Self::Norm>, out: &mut Vec<f32>) -> Result<()> {
        self.check_written(x)?;
        check_norm(norm, x.width)?;
        self.program.push(Op::Read { x: x.id, norm: norm.cloned() });
        self.flush_to(out)
    }

    fn finish(&mut self) -> Result<()> {
        self.flush().map(drop)
    }
}

//! Attention of the BitNet 2B4T shape (20 heads, 5 key/value heads of 128 features, 30 layers):
//! a decode step over all layers at several depths, and one layer of a prefill. The numbers a
//! configuration gives are compared with the scalar kernels' before it is timed.
//!
//! `cargo bench -p bitnet-core --bench attention -- decode/q8/4096`

use bitnet_core::backend::{Backend, Batch, KvSpec, KvType, RopeSpec, SequenceSlice};
use bitnet_core::cpu::{CpuBackend, CpuBuffer, CpuKv, CpuRope};
use bitnet_core::kernels::Kernels;
use bitnet_core::threads::default_threads;
use criterion::{BenchmarkId, Criterion, Throughput, criterion_group, criterion_main};

const HEADS: usize = 20;
const KV_HEADS: usize = 5;
const HEAD_DIM: usize = 128;
const LAYERS: usize = 30;
const BLOCK_TOKENS: usize = 32;
/// Tokens of a prefill step.
const STEP: usize = 512;

/// A sequence in a cache, and the buffers of a step.
struct Case {
    backend: CpuBackend,
    kv: CpuKv,
    rope: CpuRope,
    q: CpuBuffer,
    k: CpuBuffer,
    v: CpuBuffer,
    out: CpuBuffer,
    layers: usize,
    blocks: Vec<u32>,
}

impl Case {
    /// A cache of `layers` layers that holds `depth` positions of noise.
    fn new(threads: usize, kernel: &str, dtype: KvType, layers: usize, depth: usize) -> Self {
        let mut backend = CpuBackend::new(Some(threads), Some(kernel)).expect("known kernels");
        let n_blocks = (depth + STEP).div_ceil(BLOCK_TOKENS);
        let spec = KvSpec {
            n_layers: layers,
            n_kv_heads: KV_HEADS,
            head_dim: HEAD_DIM,
            block_tokens: BLOCK_TOKENS,
            n_blocks,
            dtype,
        };
        let kv = backend.kv_cache(spec).expect("memory for a cache");
        let inv_freq = (0..HEAD_DIM / 2).map(|i| 0.85f32.powi(i as i32)).collect();
        let rope = RopeSpec { inv_freq, max_positions: depth + STEP, magnitude: 1.0 };
        let rope = backend.rope(&rope).expect("frequencies are numbers");
        let mut seed = 1u64;
        let mut noise = |heads: usize| {
            let mut buffer = backend.buffer(STEP, heads * HEAD_DIM).expect("memory for a step");
            for x in buffer.rows_mut(STEP).expect("its own size") {
                seed = seed.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1);
                *x = (seed >> 40) as f32 / (1u32 << 23) as f32 - 1.0;
            }
            buffer
        };
        let (q, k, v, out) = (noise(HEADS), noise(KV_HEADS), noise(KV_HEADS), noise(HEADS));
        // Blocks in an order that no hardware foresees, as after a while of serving.
        let blocks = (0..n_blocks as u32).map(|i| i * 7 % n_blocks as u32);
        let blocks = if n_blocks.is_multiple_of(7) {
            (0..n_blocks as u32).collect()
        } else {
            blocks.collect()
        };
        let mut case = Self { backend, kv, rope, q, k, v, out, layers, blocks };
        for start in (0..depth).step_by(STEP) {
            case.begin(start, STEP.min(depth - start));
            (0..layers).for_each(|layer| case.store(layer));
        }
        case
    }

    fn begin(&mut self, first_position: usize, rows: usize) {
        let slice = SequenceSlice { rows: 0..rows, first_position, blocks: self.blocks.clone() };
        let tokens = vec![0; rows];
        let batch = Batch { tokens, sequences: vec![slice], ..Batch::default() };
        self.backend.begin(&batch).expect("a step");
    }

    fn store(&mut self, layer: usize) {
        let Self { backend, q, k, v, rope, kv, .. } = self;
        backend.rotate_and_store(q, k, v, None, rope, kv, layer).expect("room in the cache");
    }

    fn attend(&mut self) {
        for layer in 0..self.layers {
            self.backend.attention(&self.q, &self.kv, layer, &mut self.out).expect("attention");
        }
    }

    fn result(&mut self, rows: usize) -> Vec<u32> {
        let out = self.out.rows(rows).expect("rows of a step");
        out.iter().map(|x| x.to_bits()).collect()
    }
}

const TYPES: [(&str, KvType); 3] = [("f32", KvType::F32), ("f16", KvType::F16), ("q8", KvType::Q8)];

/// Asserts that a set of kernels gives the scalar set's bits.
fn check(kernel: &str, dtype: KvType) {
    let run = |kernel| {
        let mut case = Case::new(1, kernel, dtype, 1, 300);
        case.begin(300, 5);
        case.store(0);
        case.attend();
        case.result(5)
    };
    assert_eq!(run(kernel), run("scalar"), "{kernel}");
}

fn thread_counts() -> Vec<usize> {
    let mut counts = vec![1, default_threads()];
    counts.dedup();
    counts
}

fn decode(c: &mut Criterion) {
    let Ok(kernels) = Kernels::detect() else { return };
    for (name, dtype) in TYPES {
        check(kernels.name(), dtype);
        for depth in [512, 4096] {
            let mut group = c.benchmark_group(format!("decode/{name}/{depth}"));
            group.sample_size(20);
            for threads in thread_counts() {
                let mut case = Case::new(threads, kernels.name(), dtype, LAYERS, depth);
                case.begin(depth - 1, 1);
                let tiles = 2 * LAYERS * KV_HEADS * depth / 16;
                let bytes = tiles * (16 * (HEAD_DIM * element_bytes(dtype) + scale_bytes(dtype)));
                group.throughput(Throughput::Bytes(bytes as u64));
                let id = BenchmarkId::from_parameter(format!("{}/{threads}t", kernels.name()));
                group.bench_function(id, |b| b.iter(|| case.attend()));
            }
            group.finish();
        }
    }
}

fn element_bytes(dtype: KvType) -> usize {
    match dtype {
        KvType::F32 => 4,
        KvType::F16 => 2,
        KvType::Q8 => 1,
    }
}

fn scale_bytes(dtype: KvType) -> usize {
    if dtype == KvType::Q8 { 4 } else { 0 }
}

fn prefill(c: &mut Criterion) {
    let mut group = c.benchmark_group("prefill");
    group.sample_size(10);
    group.throughput(Throughput::Elements(STEP as u64));
    for kernels in Kernels::available() {
        for (name, dtype) in TYPES {
            check(kernels.name(), dtype);
            let mut case = Case::new(1, kernels.name(), dtype, 1, 0);
            case.begin(0, STEP);
            let id = |what| BenchmarkId::new(format!("{what}/{name}"), kernels.name());
            group.bench_function(id("store"), |b| b.iter(|| case.store(0)));
            group.bench_function(id("attend"), |b| b.iter(|| case.attend()));
        }
    }
    group.finish();
}

criterion_group!(benches, decode, prefill);
criterion_main!(benches);

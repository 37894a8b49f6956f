//! Every set of kernels on one thread: products with one token and with many, whole projections,
//! and the work around them. Each product is checked against the scalar set before it is timed.
//!
//! `cargo bench -p bitnet-core --bench ternary -- matrix-vector/avx512vnni`

use bitnet_core::cpu::linear::{CpuLinear, Scratch, project};
use bitnet_core::kernels::{Kernels, PackedTernary, Packing, Tiles, TokenCodes, WeightMemory};
use bitnet_core::threads::ThreadPool;
use bitnet_core::weights::{
    ActivationQuant, LinearWeights, Matrix, NormWeights, Scales, TernaryRows,
};
use criterion::{BenchmarkId, Criterion, Throughput, criterion_group, criterion_main};
use std::hint::black_box;
use std::sync::Arc;

/// Random trits.
struct Trits {
    rows: usize,
    cols: usize,
    scales: Scales,
}

impl TernaryRows for Trits {
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
        let mut state = row as u32 ^ 0x9e37_79b9;
        for code in out {
            state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
            *code = ((u64::from(state) * 3) >> 32) as u8;
        }
    }
}

fn trits(rows: usize, cols: usize) -> Trits {
    Trits { rows, cols, scales: Scales::Tensor(0.02) }
}

fn one_thread() -> ThreadPool {
    ThreadPool::new(1).expect("a pool of one thread starts none")
}

/// A matrix and tokens, with room for the sums of all tiles.
struct Case {
    packed: PackedTernary,
    tokens: Vec<i8>,
    n_tokens: usize,
    sums: Vec<i32>,
}

impl Case {
    fn new(rows: usize, cols: usize, n_tokens: usize, kernels: &'static Kernels) -> Self {
        let mut memory = WeightMemory::new();
        let packed = PackedTernary::new(
            &trits(rows, cols),
            kernels.packing(),
            kernels,
            &one_thread(),
            &mut memory,
        )
        .expect("the matrix fits into memory");
        let tokens = (0..n_tokens * packed.padded_cols()).map(|i| (i * 97) as i8).collect();
        let sums = vec![0; packed.n_tiles() * n_tokens * 16];
        Self { packed, tokens, n_tokens, sums }
    }

    fn run(&mut self, kernels: &Kernels) {
        let (packing, steps) = (self.packed.packing(), self.packed.steps());
        let stride = self.packed.padded_cols();
        let tokens = TokenCodes { codes: &self.tokens, stride, n_tokens: self.n_tokens };
        // As projections call it: some tiles at a time, so that the sums stay near.
        for (i, sums) in self.sums.chunks_mut(16 * self.n_tokens * 16).enumerate() {
            let tiles = i * 16..self.packed.n_tiles().min((i + 1) * 16);
            let codes = self.packed.tiles(tiles);
            let tiles = Tiles { codes, packing, steps, group_steps: steps };
            kernels.products(&tiles, &tokens, sums);
        }
    }

    fn checked(mut self, kernels: &Kernels) -> Self {
        self.run(Kernels::by_name("scalar").expect("always there"));
        let want = std::mem::take(&mut self.sums);
        self.sums = vec![0; want.len()];
        self.run(kernels);
        assert!(self.sums == want, "{} differs from scalar", kernels.name());
        self
    }
}

/// One token: bound by reading the weights. Bytes are those of the packed weights.
fn matrix_vector(c: &mut Criterion) {
    for kernels in Kernels::available() {
        let mut group = c.benchmark_group(format!("matrix-vector/{}", kernels.name()));
        // In the first-level cache, in the second or third, and beyond all caches.
        for (rows, cols) in [(256, 256), (2560, 2560), (131_072, 2560)] {
            let mut case = Case::new(rows, cols, 1, kernels).checked(kernels);
            group.throughput(Throughput::Bytes(case.packed.memory_bytes()));
            group.bench_function(BenchmarkId::from_parameter(format!("{rows}x{cols}")), |b| {
                b.iter(|| case.run(black_box(kernels)));
            });
        }
        group.finish();
    }
}

/// Several tokens: bound by arithmetic. Elements are multiply-accumulates.
fn matrix_matrix(c: &mut Criterion) {
    for kernels in Kernels::available() {
        let mut group = c.benchmark_group(format!("matrix-matrix/{}", kernels.name()));
        for n_tokens in [2, 4, 8, 16, 64] {
            let (rows, cols) = (2560, 2560);
            let mut case = Case::new(rows, cols, n_tokens, kernels).checked(kernels);
            group.throughput(Throughput::Elements((rows * cols * n_tokens) as u64));
            let id = BenchmarkId::from_parameter(format!("{rows}x{cols}x{n_tokens}"));
            group.bench_function(id, |b| b.iter(|| case.run(black_box(kernels))));
        }
        group.finish();
    }
}

/// A whole 256×256 layer, floats to floats: quantization, product and scales. Elements are layers.
fn layer(c: &mut Criterion) {
    let mut group = c.benchmark_group("layer-256x256");
    group.throughput(Throughput::Elements(1));
    let (pool, n) = (one_thread(), 256);
    let weights = LinearWeights {
        matrix: Matrix::Ternary {
            weights: Arc::new(trits(n, n)),
            activations: ActivationQuant::PerToken,
        },
        bias: None,
        input_norm: None,
    };
    let x: Vec<f32> = (0..n).map(|i| (i as f32 * 0.37).sin()).collect();
    for kernels in Kernels::available() {
        let linear = CpuLinear::new(&weights, kernels, &pool, &mut WeightMemory::new())
            .expect("a plain matrix");
        let mut scratch = Scratch::new();
        let mut y = vec![0.0; n];
        group.bench_function(kernels.name(), |b| {
            b.iter(|| {
                project(&pool, kernels, &mut scratch, &x, 1, None, &[&linear], &mut [&mut y])
                    .expect("shapes fit");
            });
        });
    }
    group.finish();
}

/// What stands around a product for one token of 6912 features. Elements are features.
fn around(c: &mut Criterion) {
    let n = 6912;
    let x: Vec<f32> = (0..n).map(|i| (i as f32 * 0.37).sin()).collect();
    let norm = NormWeights { weight: vec![0.5; n], eps: 1e-5 };
    let (mut y, mut codes) = (vec![0.0; n], vec![0; n]);
    let (mut scales, mut sums) = ([0.0], [0]);
    for kernels in Kernels::available() {
        let mut group = c.benchmark_group(format!("around/{}", kernels.name()));
        group.throughput(Throughput::Elements(n as u64));
        group.bench_function("norm", |b| b.iter(|| kernels.norm(&x, &norm, &mut y)));
        group.bench_function("quantize", |b| {
            b.iter(|| kernels.quantize(&x, n, n, &mut codes, &mut scales, &mut sums));
        });
        for packing in [Packing::Codes, Packing::Trits] {
            let steps = n / packing.step_cols();
            let unpacked = vec![1; 16 * steps * packing.step_cols()];
            let mut tile = vec![0; 64 * steps];
            group.throughput(Throughput::Elements(unpacked.len() as u64));
            group.bench_function(format!("pack-{packing:?}"), |b| {
                b.iter(|| kernels.pack_tile(packing, &unpacked, &mut tile));
            });
        }
        group.finish();
    }
}

criterion_group!(benches, matrix_vector, matrix_matrix, layer, around);
criterion_main!(benches);

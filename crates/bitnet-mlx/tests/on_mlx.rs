//! The conformance suite of bitnet-core on MLX, and what only MLX promises. Needs mlx-c:
//! `scripts/test-mlx.sh` builds it and runs these.

use bitnet_core::backend::{Activation, Backend, Batch, SequenceSlice, TableRole};
use bitnet_core::testing::conformance;
use bitnet_core::weights::{
    ActivationQuant, FloatRows, LinearWeights, Matrix, NormWeights, Scales, TernaryRows,
};
use bitnet_mlx::{Compile, MlxBackend};
use std::sync::Arc;

fn conforms(compile: Compile) -> Vec<f32> {
    conformance(|| MlxBackend::with_compile(Some(compile)).unwrap())
}

/// Prompts are not compiled and tokens may be: the suite compares them bit for bit.
#[test]
#[ignore = "needs mlx-c: scripts/test-mlx.sh"]
fn mlx_conforms_node_by_node_and_with_compiled_steps() {
    assert!(conforms(Compile::Nothing) == conforms(Compile::Steps), "compiling changed results");
}

#[test]
#[ignore = "needs mlx-c and a C++ compiler: scripts/test-mlx.sh"]
fn mlx_conforms_with_compiled_kernels() {
    conforms(Compile::Kernels);
}

const HIDDEN: usize = 320;
const WIDE: usize = 512;
const TOKENS: usize = 5;

/// Numbers that look random.
fn noise(i: usize) -> f32 {
    ((i as f32 * 12.9898).sin() * 43_758.547).fract()
}

struct Codes(usize, usize, Scales);

impl TernaryRows for Codes {
    fn rows(&self) -> usize {
        self.0
    }
    fn cols(&self) -> usize {
        self.1
    }
    fn scales(&self) -> &Scales {
        &self.2
    }
    fn decode_row(&self, row: usize, out: &mut [u8]) {
        for (col, out) in out.iter_mut().enumerate() {
            *out = ((noise(row * 7919 + col) + 1.0) * 1.5) as u8;
        }
    }
}

struct Rows;

impl FloatRows for Rows {
    fn rows(&self) -> usize {
        TOKENS
    }
    fn cols(&self) -> usize {
        HIDDEN
    }
    fn decode_row(&self, row: usize, out: &mut [f32]) {
        for (col, out) in out.iter_mut().enumerate() {
            *out = noise(row * 104_729 + col);
        }
    }
}

fn linear(rows: usize, cols: usize) -> LinearWeights {
    let weights = Arc::new(Codes(rows, cols, Scales::Tensor(0.02)));
    LinearWeights {
        matrix: Matrix::Ternary { weights, activations: ActivationQuant::PerToken },
        bias: None,
        input_norm: None,
    }
}

/// A feed-forward block of both activations; the residual stream after it.
fn feed_forward(backend: &mut MlxBackend) -> Vec<f32> {
    let [gate, up] = [(); 2].map(|()| backend.linear(&linear(WIDE, HIDDEN)).unwrap());
    let down = backend.linear(&linear(HIDDEN, WIDE)).unwrap();
    let norm = backend.norm(&NormWeights { weight: vec![0.5; HIDDEN], eps: 1e-5 }).unwrap();
    let table = backend.table(Arc::new(Rows), TableRole::Embedding).unwrap();
    let mut x = backend.buffer(TOKENS, HIDDEN).unwrap();
    let mut gated = backend.buffer(TOKENS, WIDE).unwrap();
    let batch = Batch {
        tokens: (0..TOKENS as u32).collect(),
        sequences: vec![SequenceSlice { rows: 0..TOKENS, first_position: 0, blocks: vec![0] }],
        ..Batch::default()
    };
    backend.begin(&batch).unwrap();
    backend.embed(&table, &mut x).unwrap();
    for activation in [Activation::Relu2, Activation::Silu] {
        backend.gated(&x, Some(&norm), &gate, &up, activation, &mut gated).unwrap();
        backend.project_add(&gated, None, &down, &mut x).unwrap();
    }
    let mut out = Vec::new();
    backend.read(&x, None, &mut out).unwrap();
    backend.finish().unwrap();
    out
}

#[test]
#[ignore = "needs mlx-c and a C++ compiler: scripts/test-mlx.sh"]
fn compiled_functions_compute_the_same() {
    let mut plain = MlxBackend::with_compile(Some(Compile::Nothing)).unwrap();
    let mut compiled = MlxBackend::with_compile(Some(Compile::Kernels)).unwrap();
    assert!(compiled.device().kernel.ends_with("compiled steps and kernels"));
    let (want, got) = (feed_forward(&mut plain), feed_forward(&mut compiled));
    assert!(want.iter().any(|x| x.abs() > 1.0));
    for (got, want) in got.iter().zip(&want) {
        // The functions have one product, division or rounding after another: no sums to reorder,
        // but a compiler may multiply by a reciprocal.
        assert!((got - want).abs() <= 1e-5 * want.abs().max(1.0), "{got} for {want}");
    }
}

#[test]
#[ignore = "needs mlx-c: scripts/test-mlx.sh"]
fn a_step_is_one_evaluation_and_its_indices_use_memory_again() {
    let mut backend = MlxBackend::with_compile(Some(Compile::Nothing)).unwrap();
    let counts = backend.counts();
    let want = feed_forward(&mut backend);
    assert_eq!(counts.evaluations(), 1, "reading takes one, the end of the step none");
    let before = backend.memory_stats();
    assert_eq!(feed_forward(&mut backend), want);
    let after = backend.memory_stats();
    assert!(after.hit_rate > before.hit_rate, "{before:?} {after:?}");
    // The tokens of the second step, once more.
    assert_eq!(before.transferred_bytes, 4 * TOKENS as u64);
    assert_eq!(after.transferred_bytes, 8 * TOKENS as u64);
}

#[test]
#[ignore = "needs mlx-c: scripts/test-mlx.sh"]
fn engines_on_several_threads_share_the_library() {
    let want = feed_forward(&mut MlxBackend::with_compile(Some(Compile::Nothing)).unwrap());
    std::thread::scope(|scope| {
        for _ in 0..3 {
            scope.spawn(|| {
                // Made here, used there: a model is loaded on one thread and runs on another.
                let mut backend = MlxBackend::with_compile(Some(Compile::Nothing)).unwrap();
                let want = &want;
                scope.spawn(move || {
                    for _ in 0..5 {
                        assert_eq!(feed_forward(&mut backend), *want);
                    }
                });
            });
        }
    });
}

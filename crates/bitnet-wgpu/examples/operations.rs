//! Where the time of a decoded token goes on this machine's wgpu device: each operation timed alone,
//! as shares of their sum. On a device that the CPU imitates the shares say where kernels do their
//! work, and nothing about the speed of a graphics card.
//!
//! ```console
//! $ cargo run --release -p bitnet-wgpu --example operations
//! ```

use std::sync::Arc;
use std::time::{Duration, Instant};

use bitnet_core::backend::{
    Activation, Backend, Batch, KvSpec, KvType, RopeSpec, SequenceSlice, TableRole,
};
use bitnet_core::weights::{
    ActivationQuant, FloatRows, LinearWeights, Matrix, NormWeights, Scales, TernaryRows,
};
use bitnet_wgpu::WgpuBackend;

type Wgpu = WgpuBackend;
type Result<T> = bitnet_core::Result<T>;

/// The sizes of a model, or of some of its layers.
struct Shape {
    what: &'static str,
    n_layers: usize,
    hidden: usize,
    intermediate: usize,
    n_heads: usize,
    n_kv_heads: usize,
    head_dim: usize,
    /// Words of the head; none if only layers are looked at.
    vocab: Option<usize>,
}

const SHAPES: [Shape; 2] = [
    Shape {
        what: "a token of the built-in model",
        n_layers: 4,
        hidden: 256,
        intermediate: 768,
        n_heads: 4,
        n_kv_heads: 2,
        head_dim: 64,
        vocab: Some(4096),
    },
    Shape {
        what: "a layer of a 0.7B model",
        n_layers: 1,
        hidden: 1536,
        intermediate: 4096,
        n_heads: 16,
        n_kv_heads: 16,
        head_dim: 96,
        vocab: None,
    },
];

/// Positions a token sees, itself included.
const SEEN: usize = 128;
const BLOCK_TOKENS: usize = 32;
/// Times an operation is recorded in a step: what a step costs by itself is divided among them.
const TIMES: u32 = 32;
/// Steps that are timed; the fastest counts.
const STEPS: usize = 7;

/// A pseudo-random matrix of trits or floats.
struct Noise {
    rows: usize,
    cols: usize,
    scales: Scales,
}

fn noise(row: usize, col: usize) -> u32 {
    let x = (row as u32).wrapping_mul(0x9e37_79b9) ^ (col as u32).wrapping_mul(0x85eb_ca6b);
    (x ^ (x >> 15)).wrapping_mul(0x2c1b_3c6d) >> 8
}

impl TernaryRows for Noise {
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
        for (col, code) in out.iter_mut().enumerate() {
            *code = (noise(row, col) % 3) as u8;
        }
    }
}

impl FloatRows for Noise {
    fn rows(&self) -> usize {
        self.rows
    }

    fn cols(&self) -> usize {
        self.cols
    }

    fn decode_row(&self, row: usize, out: &mut [f32]) {
        for (col, x) in out.iter_mut().enumerate() {
            *x = noise(row, col) as f32 / (1 << 23) as f32 - 1.0;
        }
    }
}

fn linear(b: &mut Wgpu, rows: usize, cols: usize) -> Result<<Wgpu as Backend>::Linear> {
    let scales = Scales::Tensor(0.5 / (cols as f32).sqrt());
    let weights = Arc::new(Noise { rows, cols, scales });
    let matrix = Matrix::Ternary { weights, activations: ActivationQuant::PerToken };
    b.linear(&LinearWeights { matrix, bias: None, input_norm: None })
}

fn norm(b: &mut Wgpu, width: usize) -> Result<<Wgpu as Backend>::Norm> {
    b.norm(&NormWeights { weight: vec![1.0; width], eps: 1e-5 })
}

/// The step of one token at the last of [`SEEN`] positions, with the largest logit wanted.
fn token() -> Batch {
    let blocks = (0..SEEN.div_ceil(BLOCK_TOKENS) as u32).collect();
    let sequences = vec![SequenceSlice { rows: 0..1, first_position: SEEN - 1, blocks }];
    Batch { tokens: vec![1], sequences, logit_rows: vec![0], n_best: Some(1), ..Batch::default() }
}

/// Seconds that `operation` takes, what a step costs by itself included once in [`TIMES`].
fn time(b: &mut Wgpu, mut operation: impl FnMut(&mut Wgpu) -> Result<()>) -> Result<Duration> {
    let mut fastest = Duration::MAX;
    // The first step compiles the kernels.
    for step in 0..=STEPS {
        let started = Instant::now();
        b.begin(&token())?;
        for _ in 0..TIMES {
            operation(b)?;
        }
        b.finish()?;
        if step > 0 {
            fastest = fastest.min(started.elapsed());
        }
    }
    Ok(fastest / TIMES)
}

/// The operations of `shape`: name, how often a token needs it, seconds each time.
fn measure(b: &mut Wgpu, shape: &Shape) -> Result<Vec<(&'static str, usize, Duration)>> {
    let Shape { n_layers, hidden, intermediate, n_heads, n_kv_heads, head_dim, .. } = *shape;
    let (q_width, kv_width) = (n_heads * head_dim, n_kv_heads * head_dim);
    let norms = [hidden, q_width, intermediate].map(|width| norm(b, width));
    let [norm, attention_norm, gate_norm] = norms;
    let (norm, attention_norm, gate_norm) = (norm?, attention_norm?, gate_norm?);
    let q_proj = linear(b, q_width, hidden)?;
    let (k_proj, v_proj) = (linear(b, kv_width, hidden)?, linear(b, kv_width, hidden)?);
    let o_proj = linear(b, hidden, q_width)?;
    let (gate, up) = (linear(b, intermediate, hidden)?, linear(b, intermediate, hidden)?);
    let down = linear(b, hidden, intermediate)?;
    let inv_freq = (0..head_dim / 2).map(|i| 0.8f32.powi(i as i32)).collect();
    let rope = b.rope(&RopeSpec { inv_freq, max_positions: SEEN, magnitude: 1.0 })?;
    let n_blocks = SEEN.div_ceil(BLOCK_TOKENS);
    let dtype = KvType::F16;
    let spec =
        KvSpec { n_layers: 1, n_kv_heads, head_dim, block_tokens: BLOCK_TOKENS, n_blocks, dtype };
    let mut kv = b.kv_cache(spec)?;
    let table = |b: &mut Wgpu, rows| {
        let source = Noise { rows, cols: hidden, scales: Scales::Tensor(1.0) };
        b.table(Arc::new(source), TableRole::Head)
    };
    let head = table(b, shape.vocab.unwrap_or(16))?;
    let widths = [hidden, q_width, kv_width, kv_width, q_width, intermediate];
    let [x, q, k, v, mixed, gated] = widths.map(|width| b.buffer(1, width));
    let (mut x, mut q, mut k) = (x?, q?, k?);
    let (mut v, mut mixed, mut gated) = (v?, mixed?, gated?);

    let mut found = Vec::new();
    let embedding = time(b, |b| b.embed(&head, &mut x))?;
    let qkv = [&q_proj, &k_proj, &v_proj];
    let outs = &mut [&mut q, &mut k, &mut v];
    let taken = time(b, |b| b.project(&x, Some(&norm), &qkv, outs))?;
    found.push(("norm, quantization, q, k and v", n_layers, taken));
    let taken = time(b, |b| b.rotate_and_store(&mut q, &mut k, &v, None, &rope, &mut kv, 0))?;
    found.push(("rotation and cache", n_layers, taken));
    let taken = time(b, |b| b.attention(&q, &kv, 0, &mut mixed))?;
    found.push(("attention", n_layers, taken));
    let taken = time(b, |b| b.project_add(&mixed, Some(&attention_norm), &o_proj, &mut x))?;
    found.push(("norm, quantization, output", n_layers, taken));
    let relu = Activation::Relu2;
    let taken = time(b, |b| b.gated(&x, Some(&norm), &gate, &up, relu, &mut gated))?;
    found.push(("norm, quantization, gate and up", n_layers, taken));
    let taken = time(b, |b| b.project_add(&gated, Some(&gate_norm), &down, &mut x))?;
    found.push(("norm, quantization, down", n_layers, taken));
    if shape.vocab.is_some() {
        found.push(("embedding", 1, embedding));
        let mut logits = Vec::new();
        // Reading the largest back ends a submission each time, as it does once a token.
        let taken = time(b, |b| b.logits(&x, &norm, &head, &mut logits))?;
        found.push(("norm, head, largest logit, back to the host", 1, taken));
    }
    Ok(found)
}

fn main() -> Result<()> {
    let mut backend = WgpuBackend::new()?;
    println!("on {}, {SEEN} positions seen", backend.device().hardware);
    for shape in &SHAPES {
        let found = measure(&mut backend, shape)?;
        let cost = |&(_, times, each): &(_, usize, Duration)| times as f64 * each.as_secs_f64();
        let sum: f64 = found.iter().map(cost).sum();
        println!("\n| {} | times | share |\n|---|---|---|", shape.what);
        for operation in &found {
            let (name, times, _) = operation;
            println!("| {name} | {times} | {:.0} % |", 100.0 * cost(operation) / sum);
        }
    }
    Ok(())
}

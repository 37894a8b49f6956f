//! Every kernel against its oracle, the CPU's scalar code, bit for bit: one backend after the other is
//! led through the same small steps, in which each kernel meets each of its forms.

use super::simulator::backend;
use bitnet_core::backend::{
    Activation, Backend, Batch, KvSpec, KvType, RopeSpec, SequenceSlice, TableRole,
};
use bitnet_core::cpu::CpuBackend;
use bitnet_core::weights::{
    ActivationQuant, FloatRows, FloatType, LinearWeights, Matrix, NormWeights, Scales, TernaryRows,
};
use bytes::Bytes;
use std::sync::Arc;

struct Random(u64);

impl Random {
    fn next(&mut self) -> u32 {
        self.0 = self.0.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963);
        (self.0 >> 32) as u32
    }

    fn floats(&mut self, n: usize) -> Vec<f32> {
        (0..n).map(|_| self.next() as i32 as f32 / (1u32 << 31) as f32).collect()
    }

    fn norm(&mut self, width: usize) -> NormWeights {
        NormWeights {
            weight: self.floats(width).iter().map(|w| 1.0 + w / 2.0).collect(),
            eps: 0.01,
        }
    }
}

/// A float matrix in one format.
struct Floats {
    rows: usize,
    cols: usize,
    format: FloatType,
    bytes: Bytes,
}

impl Floats {
    fn new(random: &mut Random, rows: usize, cols: usize, format: FloatType) -> Arc<Self> {
        let values = random.floats(rows * cols);
        let bytes: Vec<u8> = match format {
            FloatType::F32 => values.iter().flat_map(|x| x.to_le_bytes()).collect(),
            FloatType::F16 => {
                values.iter().flat_map(|&x| half::f16::from_f32(x).to_le_bytes()).collect()
            }
            FloatType::BF16 => {
                values.iter().flat_map(|&x| half::bf16::from_f32(x).to_le_bytes()).collect()
            }
        };
        Arc::new(Self { rows, cols, format, bytes: bytes.into() })
    }
}

impl FloatRows for Floats {
    fn rows(&self) -> usize {
        self.rows
    }

    fn cols(&self) -> usize {
        self.cols
    }

    fn decode_row(&self, _: usize, _: &mut [f32]) {
        unreachable!("backends take the raw numbers");
    }

    fn raw(&self) -> Option<(FloatType, Bytes)> {
        Some((self.format, self.bytes.clone()))
    }
}

/// A ternary matrix.
struct Codes {
    rows: usize,
    cols: usize,
    codes: Vec<u8>,
    scales: Scales,
}

impl TernaryRows for Codes {
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
        out.copy_from_slice(&self.codes[row * self.cols..][..self.cols]);
    }
}

/// How a projection's numbers share scales.
#[derive(Clone, Copy)]
enum Kind {
    Tensor,
    Row,
    Groups { weights: usize, activations: Option<usize> },
    Float(FloatType),
}

fn linear(
    random: &mut Random,
    rows: usize,
    cols: usize,
    kind: Kind,
    extras: bool,
) -> LinearWeights {
    let codes = (0..rows * cols).map(|_| (random.next() >> 13) as u8 % 3).collect();
    let (scales, activations) = match kind {
        Kind::Row => (Scales::Row(random.floats(rows)), ActivationQuant::PerToken),
        Kind::Groups { weights: group, activations } => {
            let values = random.floats(rows * cols.div_ceil(group));
            let activations =
                activations.map_or(ActivationQuant::PerToken, ActivationQuant::PerGroup);
            (Scales::Group { group, values }, activations)
        }
        Kind::Tensor | Kind::Float(_) => (Scales::Tensor(0.7), ActivationQuant::PerToken),
    };
    let matrix = match kind {
        Kind::Float(format) => Matrix::Float(Floats::new(random, rows, cols, format)),
        _ => {
            Matrix::Ternary { weights: Arc::new(Codes { rows, cols, codes, scales }), activations }
        }
    };
    LinearWeights {
        matrix,
        bias: extras.then(|| random.floats(rows)),
        input_norm: extras.then(|| random.norm(cols)),
    }
}

fn batch(rows: usize, first: usize, blocks: &[u32]) -> Batch {
    Batch {
        tokens: (0..rows as u32).map(|row| (row * 7 + 3) % 40).collect(),
        sequences: vec![SequenceSlice {
            rows: 0..rows,
            first_position: first,
            blocks: blocks.into(),
        }],
        logit_rows: (0..rows).filter(|row| row % 5 == 0).collect(),
        ..Batch::default()
    }
}

/// Projections, gates, norms, tables and heads, for few tokens and for many.
fn projections<B: Backend>(b: &mut B, out: &mut Vec<f32>) {
    let mut random = Random(1);
    let mut read = Vec::new();
    let groups = |weights, activations| Kind::Groups { weights, activations };
    for (rows, cols, kind, extras) in [
        (37, 112, Kind::Tensor, true),
        (70, 272, Kind::Row, false),
        (40, 192, groups(64, None), true),
        (40, 192, groups(64, Some(32)), false),
        (21, 72, Kind::Float(FloatType::F32), true),
        (21, 72, Kind::Float(FloatType::BF16), false),
    ] {
        let format = match kind {
            Kind::Tensor => FloatType::F32,
            Kind::Row => FloatType::F16,
            _ => FloatType::BF16,
        };
        let table = Floats::new(&mut random, 40, cols, format);
        let table = b.table(table, TableRole::Head).expect("a table");
        let norm = b.norm(&random.norm(cols)).expect("a norm");
        let one = linear(&mut random, rows, cols, kind, extras);
        let two = linear(&mut random, rows, cols, kind, false);
        let back = linear(&mut random, cols, rows, Kind::Tensor, false);
        let [one, two, back] = [one, two, back].map(|l| b.linear(&l).expect("a projection"));
        for n in [1, 6, 35] {
            let blocks: Vec<u32> = (0..2).collect();
            b.begin(&batch(n, 0, &blocks)).expect("a step");
            let mut x = b.buffer(n, cols).expect("a buffer");
            let [mut y, mut z] = [(); 2].map(|()| b.buffer(n, rows).expect("a buffer"));
            b.embed(&table, &mut x).expect("tokens of the table");
            b.project(&x, Some(&norm), &[&one, &two], &mut [&mut y, &mut z]).expect("products");
            for buffer in [&y, &z] {
                b.read(buffer, None, &mut read).expect("a buffer");
                out.extend(&read);
            }
            for activation in [Activation::Relu2, Activation::Silu] {
                b.gated(&x, None, &one, &two, activation, &mut y).expect("a gate");
                b.read(&y, None, &mut read).expect("a buffer");
                out.extend(&read);
            }
            b.project_add(&z, None, &back, &mut x).expect("a product");
            b.read(&x, Some(&norm), &mut read).expect("a buffer");
            out.extend(&read);
            b.logits(&x, &norm, &table, &mut read).expect("logits");
            out.extend(&read);
            b.finish().expect("the end of a step");
        }
    }
}

/// A norm of rows longer than what is staged at a time.
fn long_norm<B: Backend>(b: &mut B, out: &mut Vec<f32>) {
    let mut random = Random(3);
    let table = Floats::new(&mut random, 40, 2080, FloatType::F16);
    let table = b.table(table, TableRole::Embedding).expect("a table");
    let norm = b.norm(&random.norm(2080)).expect("a norm");
    let mut x = b.buffer(2, 2080).expect("a buffer");
    let mut read = Vec::new();
    b.begin(&batch(2, 0, &[0])).expect("a step");
    b.embed(&table, &mut x).expect("tokens of the table");
    b.read(&x, Some(&norm), &mut read).expect("a buffer");
    b.finish().expect("the end of a step");
    out.extend(&read);
}

/// Rotation, cache and attention in every format, past the end of a span, in two layers.
fn attention<B: Backend>(b: &mut B, out: &mut Vec<f32>) {
    let mut random = Random(2);
    let mut read = Vec::new();
    for (dtype, head_dim, n_kv_heads, group, norms) in [
        (KvType::F32, 36, 1, 2, true),
        (KvType::F16, 64, 2, 1, false),
        (KvType::Q8, 36, 1, 5, true),
    ] {
        let (q_width, kv_width) = (head_dim * n_kv_heads * group, head_dim * n_kv_heads);
        let spec =
            KvSpec { n_layers: 2, n_kv_heads, head_dim, block_tokens: 32, n_blocks: 12, dtype };
        let mut kv = b.kv_cache(spec).expect("a cache");
        let inv_freq = (0..head_dim / 2).map(|i| 0.8f32.powi(i as i32)).collect();
        let spec = RopeSpec { inv_freq, max_positions: 384, magnitude: 1.25 };
        let rope = b.rope(&spec).expect("rotations");
        let norms =
            norms.then(|| [(); 2].map(|()| b.norm(&random.norm(head_dim)).expect("a norm")));
        let tables = [q_width, kv_width, kv_width].map(|width| {
            let table = Floats::new(&mut random, 40, width, FloatType::F32);
            b.table(table, TableRole::Embedding).expect("a table")
        });
        let blocks: Vec<u32> = (0..12).map(|i| (i * 5) % 12).collect();
        let mut first = 0;
        for n in [40, 1, 240, 1, 3] {
            b.begin(&batch(n, first, &blocks)).expect("a step");
            let mut q = b.buffer(n, q_width).expect("a buffer");
            let [mut k, mut v] = [(); 2].map(|()| b.buffer(n, kv_width).expect("a buffer"));
            let mut mixed = b.buffer(n, q_width).expect("a buffer");
            for layer in 0..2 {
                for (table, buffer) in tables.iter().zip([&mut q, &mut k, &mut v]) {
                    b.embed(table, buffer).expect("tokens of the table");
                }
                let norms = norms.as_ref().map(|[q, k]| (q, k));
                let (k, v) = if layer == 0 { (&mut k, &v) } else { (&mut v, &k) };
                b.rotate_and_store(&mut q, k, v, norms, &rope, &mut kv, layer).expect("room");
            }
            for layer in 0..2 {
                b.attention(&q, &kv, layer, &mut mixed).expect("attention");
                b.read(&mixed, None, &mut read).expect("a buffer");
                // The last rows see the most; the first ones are enough for the rest.
                let keep = q_width * n.min(4);
                out.extend(&read[..keep]);
                out.extend(&read[read.len() - keep..]);
            }
            b.read(&q, None, &mut read).expect("a buffer");
            out.extend(&read);
            b.finish().expect("the end of a step");
            first += n;
        }
    }
}

/// The results of all steps.
pub(crate) fn results<B: Backend>(mut backend: B) -> Vec<f32> {
    let mut out = Vec::new();
    projections(&mut backend, &mut out);
    long_norm(&mut backend, &mut out);
    attention(&mut backend, &mut out);
    out
}

/// What the CPU's scalar code makes of them.
pub(crate) fn scalar() -> Vec<f32> {
    results(CpuBackend::new(Some(1), Some("scalar")).expect("the CPU"))
}

/// Whether two results are the same to the last bit.
pub(crate) fn equal(a: &[f32], b: &[f32]) -> bool {
    a.len() == b.len() && a.iter().zip(b).all(|(a, b)| a.to_bits() == b.to_bits())
}

#[test]
#[ignore = "needs clang++: scripts/test-metal.sh"]
fn every_kernel_equals_its_oracle() {
    let want = scalar();
    assert!(want.iter().all(|x| x.is_finite()) && want.len() > 10_000);
    for seed in 0..4 {
        let got = results(backend(seed));
        let place = got.iter().zip(&want).position(|(a, b)| a.to_bits() != b.to_bits());
        assert_eq!(place, None, "schedule {seed}");
        assert_eq!(got.len(), want.len());
    }
}

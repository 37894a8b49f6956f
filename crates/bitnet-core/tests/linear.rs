//! Projections against their definition, and the same bits on every kernel, thread count and batch.

use bitnet_core::backend::Activation;
use bitnet_core::cpu::linear::{CpuLinear, Scratch, gated, project, project_add};
use bitnet_core::kernels::{Kernels, WeightMemory};
use bitnet_core::threads::ThreadPool;
use bitnet_core::weights::{
    ActivationQuant, FloatRows, LinearWeights, Matrix, NormWeights, Scales, TernaryRows,
};
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
}

struct Codes {
    cols: usize,
    codes: Vec<u8>,
    scales: Scales,
}

impl TernaryRows for Codes {
    fn rows(&self) -> usize {
        self.codes.len() / self.cols
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

struct Floats {
    cols: usize,
    values: Vec<f32>,
}

impl FloatRows for Floats {
    fn rows(&self) -> usize {
        self.values.len() / self.cols
    }

    fn cols(&self) -> usize {
        self.cols
    }

    fn decode_row(&self, row: usize, out: &mut [f32]) {
        out.copy_from_slice(&self.values[row * self.cols..][..self.cols]);
    }
}

fn ternary(
    rows: usize,
    cols: usize,
    scales: Scales,
    activations: ActivationQuant,
    seed: u64,
) -> LinearWeights {
    let mut random = Random(seed);
    let codes = (0..rows * cols).map(|_| (random.next() % 3) as u8).collect();
    LinearWeights {
        matrix: Matrix::Ternary { weights: Arc::new(Codes { cols, codes, scales }), activations },
        bias: None,
        input_norm: None,
    }
}

/// Every combination of scales, with a bias and a norm here and there.
fn variants(rows: usize, cols: usize) -> Vec<LinearWeights> {
    let mut random = Random(99);
    let mut all = Vec::new();
    for activations in [ActivationQuant::PerToken, ActivationQuant::PerGroup(32)] {
        let groups = cols.div_ceil(64);
        for scales in [
            Scales::Tensor(0.7),
            Scales::Row(random.floats(rows)),
            Scales::Group { group: 64, values: random.floats(rows * groups) },
        ] {
            let mut weights = ternary(rows, cols, scales, activations, all.len() as u64);
            if all.len() % 2 == 1 {
                weights.bias = Some(random.floats(rows));
            }
            if all.len() % 3 == 2 {
                let weight = random.floats(cols);
                weights.input_norm = Some(NormWeights { weight, eps: 1e-6 });
            }
            all.push(weights);
        }
    }
    let values = random.floats(rows * cols).iter().map(|&x| half(x)).collect();
    all.push(LinearWeights {
        matrix: Matrix::Float(Arc::new(Floats { cols, values })),
        bias: Some(random.floats(rows)),
        input_norm: None,
    });
    all
}

/// The nearest number that half precision holds.
fn half(x: f32) -> f32 {
    (x * 1024.0).round() / 1024.0
}

/// The norms in f32, as every kernel computes them; unit tests hold them against their definition.
fn rms_norm(x: &[f32], norm: Option<&NormWeights>) -> Vec<f32> {
    let mut out = x.to_vec();
    if let Some(norm) = norm {
        Kernels::by_name("scalar").unwrap().norm(x, norm, &mut out);
    }
    out
}

/// The definition, sums in f64: `(outputs, sums of the terms' magnitudes)`.
fn reference(weights: &LinearWeights, x: &[f32], norm: Option<&NormWeights>) -> Vec<(f64, f64)> {
    let x = rms_norm(&rms_norm(x, norm), weights.input_norm.as_ref());
    let (rows, cols) = weights.matrix.shape();
    let mut out = vec![(0.0, 0.0); rows];
    let bias = |row: usize| weights.bias.as_ref().map_or(0.0, |bias| f64::from(bias[row]));
    match &weights.matrix {
        Matrix::Float(matrix) => {
            let mut decoded = vec![0.0; cols];
            for (row, out) in out.iter_mut().enumerate() {
                matrix.decode_row(row, &mut decoded);
                for (&w, &x) in decoded.iter().zip(&x) {
                    out.0 += f64::from(w) * f64::from(x);
                    out.1 += (f64::from(w) * f64::from(x)).abs();
                }
                out.0 += bias(row);
                out.1 += bias(row).abs();
            }
        }
        Matrix::Ternary { weights: codes, activations } => {
            let span = match activations {
                ActivationQuant::PerToken => cols,
                ActivationQuant::PerGroup(group) => *group,
            };
            let mut quantized = Vec::new();
            for x in x.chunks(span) {
                let max = x.iter().fold(1e-5f32, |max, x| max.max(x.abs()));
                let code = |x: &f32| (x * (127.0 / max)).round_ties_even();
                quantized.extend(x.iter().map(|x| f64::from(code(x)) * f64::from(max) / 127.0));
            }
            let mut decoded = vec![0; cols];
            for (row, out) in out.iter_mut().enumerate() {
                codes.decode_row(row, &mut decoded);
                for (c, (&code, x)) in decoded.iter().zip(&quantized).enumerate() {
                    let scale = match codes.scales() {
                        Scales::Tensor(scale) => *scale,
                        Scales::Row(scales) => scales[row],
                        Scales::Group { group, values } => {
                            values[row * cols.div_ceil(*group) + c / group]
                        }
                    };
                    let term = (f64::from(code) - 1.0) * x * f64::from(scale);
                    out.0 += term;
                    out.1 += term.abs();
                }
                out.0 += bias(row);
                out.1 += bias(row).abs();
            }
        }
    }
    out
}

#[test]
fn projections_follow_their_definition() {
    let (rows, cols, n_tokens) = (53, 200, 3);
    let mut random = Random(1);
    let x = random.floats(n_tokens * cols);
    let norm = NormWeights { weight: random.floats(cols), eps: 1e-5 };
    let pool = ThreadPool::new(2).unwrap();
    let kernels = Kernels::detect().unwrap();
    for (i, weights) in variants(rows, cols).iter().enumerate() {
        let linear = CpuLinear::new(weights, kernels, &pool, &mut WeightMemory::new()).unwrap();
        for norm in [None, Some(&norm)] {
            let mut out = vec![9.0; n_tokens * rows];
            let mut scratch = Scratch::new();
            project(&pool, kernels, &mut scratch, &x, n_tokens, norm, &[&linear], &mut [&mut out])
                .unwrap();
            for (t, (out, x)) in out.chunks_exact(rows).zip(x.chunks_exact(cols)).enumerate() {
                for (&y, (want, magnitude)) in out.iter().zip(reference(weights, x, norm)) {
                    // A ternary sum rounds a few times for each of up to 7 groups; a float sum once
                    // for each of 13 terms of a lane and 4 times in the tree.
                    let tolerance = magnitude * f64::from(f32::EPSILON) * 32.0;
                    assert!(
                        (f64::from(y) - want).abs() <= tolerance,
                        "variant {i}, token {t}: {y} instead of {want} ± {tolerance}"
                    );
                }
            }
        }
    }
}

/// Everything at once, as bits: three projections, a sum and a gate.
fn everything(
    kernels: &'static Kernels,
    threads: usize,
    x: &[f32],
    n_tokens: usize,
    weights: &[LinearWeights],
    norm: &NormWeights,
) -> Vec<Vec<u32>> {
    let pool = ThreadPool::new(threads).unwrap();
    let mut memory = WeightMemory::new();
    let linears: Vec<_> = weights
        .iter()
        .map(|weights| CpuLinear::new(weights, kernels, &pool, &mut memory).unwrap())
        .collect();
    let linears: Vec<_> = linears.iter().collect();
    let rows = linears[0].rows();
    let mut scratch = Scratch::new();
    let mut outs = vec![vec![1.0; n_tokens * rows]; linears.len()];
    let mut views: Vec<&mut [f32]> = outs.iter_mut().map(|out| &mut out[..]).collect();
    project(&pool, kernels, &mut scratch, x, n_tokens, Some(norm), &linears, &mut views).unwrap();
    for pair in linears.windows(2) {
        let mut sum = vec![1.0; n_tokens * rows];
        project_add(&pool, kernels, &mut scratch, x, n_tokens, None, pair[0], &mut sum).unwrap();
        outs.push(sum);
        for activation in [Activation::Relu2, Activation::Silu] {
            let mut out = vec![1.0; n_tokens * rows];
            let (gate, up) = (pair[0], pair[1]);
            gated(&pool, kernels, &mut scratch, x, n_tokens, None, gate, up, activation, &mut out)
                .unwrap();
            outs.push(out);
        }
    }
    outs.iter().map(|out| out.iter().map(|y| y.to_bits()).collect()).collect()
}

#[test]
fn bits_depend_on_neither_kernel_nor_threads_nor_batch() {
    let (rows, cols, n_tokens) = (277, 160, 19);
    let mut random = Random(8);
    let x = random.floats(n_tokens * cols);
    let norm = NormWeights { weight: random.floats(cols), eps: 1e-5 };
    let mut weights = variants(rows, cols);
    // Neighbours that share their input, so that one region does several.
    weights.extend(variants(rows, cols).into_iter().take(1));
    weights.extend(variants(rows, cols).into_iter().take(1));
    let scalar = Kernels::by_name("scalar").unwrap();
    let want = everything(scalar, 1, &x, n_tokens, &weights, &norm);
    for kernels in Kernels::available() {
        for threads in [1, 2, 3, 7] {
            let got = everything(kernels, threads, &x, n_tokens, &weights, &norm);
            assert!(got == want, "{}, {threads} threads", kernels.name());
        }
        for t in [0, 7, n_tokens - 1] {
            let alone = everything(kernels, 2, &x[t * cols..][..cols], 1, &weights, &norm);
            for (alone, batch) in alone.iter().zip(&want) {
                assert!(*alone == batch[t * rows..][..rows], "{}, token {t}", kernels.name());
            }
        }
    }
}

#[test]
fn shapes_that_do_not_fit_are_errors() {
    let pool = ThreadPool::new(1).unwrap();
    let kernels = Kernels::by_name("scalar").unwrap();
    let mut memory = WeightMemory::new();
    let per_token = ActivationQuant::PerToken;
    let mut refused = |weights: &LinearWeights| {
        assert!(CpuLinear::new(weights, kernels, &pool, &mut memory).is_err());
    };
    refused(&ternary(4, 32, Scales::Row(vec![1.0; 3]), per_token, 0));
    refused(&ternary(4, 32, Scales::Group { group: 0, values: vec![] }, per_token, 0));
    refused(&ternary(4, 32, Scales::Group { group: 24, values: vec![1.0; 8] }, per_token, 0));
    refused(&ternary(4, 32, Scales::Group { group: 16, values: vec![1.0; 7] }, per_token, 0));
    refused(&ternary(4, 32, Scales::Tensor(1.0), ActivationQuant::PerGroup(8), 0));
    let grouped = Scales::Group { group: 16, values: vec![1.0; 8] };
    refused(&ternary(4, 32, grouped, ActivationQuant::PerGroup(32), 0));
    let good = ternary(4, 32, Scales::Tensor(1.0), per_token, 0);
    refused(&LinearWeights { bias: Some(vec![0.0; 5]), ..good.clone() });
    let norm = NormWeights { weight: vec![0.0; 5], eps: 1e-5 };
    refused(&LinearWeights { input_norm: Some(norm.clone()), ..good.clone() });

    let linear = CpuLinear::new(&good, kernels, &pool, &mut memory).unwrap();
    let mut scratch = Scratch::new();
    let mut project = |x: &[f32], norm, linears: &[&CpuLinear], outs: &mut [&mut [f32]]| {
        project(&pool, kernels, &mut scratch, x, 1, norm, linears, outs)
    };
    let x = [1.0; 32];
    assert!(project(&x, None, &[&linear], &mut [&mut [0.0; 4]]).is_ok());
    assert!(project(&x[1..], None, &[&linear], &mut [&mut [0.0; 4]]).is_err());
    assert!(project(&x, None, &[&linear], &mut [&mut [0.0; 5]]).is_err());
    assert!(project(&x, None, &[&linear], &mut []).is_err());
    assert!(project(&x, Some(&norm), &[&linear], &mut [&mut [0.0; 4]]).is_err());
}

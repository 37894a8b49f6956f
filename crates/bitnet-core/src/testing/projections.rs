//! Ternary and float projections, alone, accumulated and gated.

use super::inputs::{Floats, Random, ScaleKind, Ternary, norm_reference, settle};
use super::{ROUNDING, assert_close, download, rows_batch, upload};
use crate::backend::{Activation, Backend};
use crate::weights::{ActivationQuant, FloatType, LinearWeights, Matrix};
use std::sync::Arc;

/// Activations on the grid of their own quantization and scales that are powers of two: every step
/// of the definition is exact in f32, so the results are equal, not close.
pub(super) fn ternary_products_are_exact<B: Backend>(make: &impl Fn() -> B, record: &mut Vec<f32>) {
    let mut random = Random(10);
    for (rows, cols, tokens) in [(16, 64, 1), (33, 256, 1), (48, 1000, 5), (7, 16, 33)] {
        let mut backend = make();
        let linear =
            Ternary::new(&mut random, rows, cols, ScaleKind::Tensor, ActivationQuant::PerToken, 3)
                .with_scale(0.25);
        let x: Vec<f32> = (0..tokens)
            .flat_map(|token| {
                // Small enough to vary, large enough that no maximum falls under the floor of 1e-5.
                let unit = 0.5f32.powi(token % 12);
                let mut x: Vec<f32> =
                    (0..cols).map(|_| (random.below(255) as f32 - 127.0) * unit).collect();
                x[token as usize % cols] = -127.0 * unit;
                x
            })
            .collect();
        backend.begin(&rows_batch(tokens as usize)).expect("a step");
        let buffer = upload(&mut backend, &x, cols);
        let device = backend.linear(&linear.weights()).expect("a projection");
        let mut out = backend.buffer(tokens as usize, rows).expect("a buffer");
        backend.project(&buffer, None, &[&device], &mut [&mut out]).expect("a product");
        let got = download(&mut backend, &out);
        backend.finish().expect("the end of a step");
        for (token, (x, got)) in x.chunks_exact(cols).zip(got.chunks_exact(rows)).enumerate() {
            for (row, (&got, (want, _))) in got.iter().zip(linear.reference(x, None)).enumerate() {
                assert_eq!(f64::from(got), want, "{rows}×{cols} token {token} row {row}");
            }
        }
        record.extend(got);
    }
}

/// Roundings of a ternary projection beyond its integer sums: the norms of its input, each with a
/// sum over `cols`, then scales, their products, the sum over `terms` groups and the bias.
fn roundings(cols: usize, terms: usize) -> f64 {
    2.0 * (cols as f64 / 2.0 + 6.0) + terms as f64 + 6.0
}

pub(super) fn ternary_projections<B: Backend>(make: &impl Fn() -> B, record: &mut Vec<f32>) {
    use ActivationQuant::{PerGroup, PerToken};
    let mut random = Random(11);
    for (rows, cols, tokens, kind, activations, n_codes) in [
        (64, 128, 1, ScaleKind::Tensor, PerToken, 3),
        (40, 96, 4, ScaleKind::Tensor, PerToken, 4),
        (50, 200, 3, ScaleKind::Row, PerToken, 3),
        (32, 256, 2, ScaleKind::Group(64), PerToken, 3),
        (32, 256, 1, ScaleKind::Group(128), PerGroup(64), 4),
        (24, 128, 2, ScaleKind::Group(64), PerGroup(64), 3),
        (17, 160, 19, ScaleKind::Tensor, PerGroup(32), 3),
    ] {
        for own_norm in [false, true] {
            let mut backend = make();
            let norm_weights = random.norm(cols);
            let mut linear = Ternary::new(&mut random, rows, cols, kind, activations, n_codes);
            linear.input_norm = own_norm.then(|| random.norm(cols));
            linear.bias = own_norm.then(|| random.floats(rows));
            let other = Ternary::new(&mut random, rows + 5, cols, ScaleKind::Tensor, PerToken, 3);
            let mut x = random.floats(tokens * cols);
            settle(&[&linear, &other], &mut x, Some(&norm_weights));
            let norm = backend.norm(&norm_weights).expect("a norm");
            let devices = [&linear, &other]
                .map(|linear| backend.linear(&linear.weights()).expect("a projection"));
            backend.begin(&rows_batch(tokens)).expect("a step");
            let buffer = upload(&mut backend, &x, cols);
            let mut outs =
                [rows, rows + 5].map(|rows| backend.buffer(tokens + 2, rows).expect("a buffer"));
            let [first, second] = &mut outs;
            backend
                .project(&buffer, Some(&norm), &[&devices[0], &devices[1]], &mut [first, second])
                .expect("products");
            let got = [&outs[0], &outs[1]].map(|out| download(&mut backend, out));
            backend.finish().expect("the end of a step");
            for (linear, got) in [&linear, &other].into_iter().zip(got) {
                for (x, got) in x.chunks_exact(cols).zip(got.chunks_exact(linear.rows())) {
                    let want = linear.reference(x, Some(&norm_weights));
                    for (row, (&got, (want, size))) in got.iter().zip(want).enumerate() {
                        let tolerance = roundings(cols, cols.div_ceil(16)) * ROUNDING * size;
                        assert_close(got, want, tolerance, &|| {
                            format!("{rows}×{cols} {kind:?} {activations:?} row {row}")
                        });
                    }
                }
                record.extend(got);
            }
        }
    }
}

pub(super) fn float_projections<B: Backend>(make: &impl Fn() -> B, record: &mut Vec<f32>) {
    let mut random = Random(12);
    for dtype in [Some(FloatType::F32), Some(FloatType::F16), Some(FloatType::BF16), None] {
        for (rows, cols, tokens) in [(20, 64, 1), (33, 100, 5), (16, 1000, 18)] {
            let mut backend = make();
            let source = Arc::new(Floats::new(rows, cols, random.floats(rows * cols), dtype));
            let weights = LinearWeights {
                matrix: Matrix::Float(source.clone()),
                bias: Some(random.floats(rows)),
                input_norm: Some(random.norm(cols)),
            };
            let x = random.floats(tokens * cols);
            let linear = backend.linear(&weights).expect("a projection");
            backend.begin(&rows_batch(tokens)).expect("a step");
            let buffer = upload(&mut backend, &x, cols);
            let mut out = backend.buffer(tokens, rows).expect("a buffer");
            backend.project(&buffer, None, &[&linear], &mut [&mut out]).expect("a product");
            let got = download(&mut backend, &out);
            backend.finish().expect("the end of a step");
            let (Some(norm), Some(bias)) = (&weights.input_norm, &weights.bias) else { return };
            for (x, got) in x.chunks_exact(cols).zip(got.chunks_exact(rows)) {
                let x: Vec<f64> = x.iter().copied().map(f64::from).collect();
                let normed = norm_reference(&x, norm);
                for (row, &got) in got.iter().enumerate() {
                    let terms = normed.iter().zip(source.row(row)).map(|(x, &w)| x * f64::from(w));
                    let terms = terms.chain([f64::from(bias[row])]);
                    let size: f64 = terms.clone().map(f64::abs).sum();
                    let tolerance = (1.5 * cols as f64 + 8.0) * ROUNDING * size;
                    let what = || format!("{dtype:?} {rows}×{cols} row {row}");
                    assert_close(got, terms.sum(), tolerance, &what);
                }
            }
            record.extend(got);
        }
    }
}

pub(super) fn accumulation_and_gates<B: Backend>(make: &impl Fn() -> B, record: &mut Vec<f32>) {
    let mut random = Random(13);
    for (rows, cols, tokens) in [(48, 64, 1), (70, 128, 3), (16, 256, 20)] {
        for own_norms in [false, true] {
            let mut backend = make();
            let mut ternary = |rows| {
                let per_token = ActivationQuant::PerToken;
                let mut linear =
                    Ternary::new(&mut random, rows, cols, ScaleKind::Tensor, per_token, 3);
                linear.input_norm = own_norms.then(|| random.norm(cols));
                linear
            };
            let [gate, up, down] = [ternary(rows), ternary(rows), ternary(cols)];
            let norm_weights = random.norm(cols);
            let mut x = random.floats(tokens * cols);
            settle(&[&gate, &up, &down], &mut x, Some(&norm_weights));
            let norm = backend.norm(&norm_weights).expect("a norm");
            let [gate_device, up_device, down_device] = [&gate, &up, &down]
                .map(|linear| backend.linear(&linear.weights()).expect("a projection"));
            backend.begin(&rows_batch(tokens)).expect("a step");
            let buffer = upload(&mut backend, &x, cols);

            let start = random.floats(tokens * cols);
            let mut acc = upload(&mut backend, &start, cols);
            backend.project_add(&buffer, Some(&norm), &down_device, &mut acc).expect("a product");
            let got = download(&mut backend, &acc);
            for ((x, got), start) in
                x.chunks_exact(cols).zip(got.chunks_exact(cols)).zip(start.chunks_exact(cols))
            {
                let want = down.reference(x, Some(&norm_weights));
                for ((&got, (want, size)), &start) in got.iter().zip(want).zip(start) {
                    let (want, size) = (want + f64::from(start), size + f64::from(start.abs()));
                    let tolerance = roundings(cols, 1) * ROUNDING * size;
                    assert_close(got, want, tolerance, &|| format!("sum {rows}×{cols}"));
                }
            }
            record.extend(got);

            for activation in [Activation::Relu2, Activation::Silu] {
                let mut out = backend.buffer(tokens, rows).expect("a buffer");
                backend
                    .gated(&buffer, Some(&norm), &gate_device, &up_device, activation, &mut out)
                    .expect("a gate");
                let got = download(&mut backend, &out);
                for (x, got) in x.chunks_exact(cols).zip(got.chunks_exact(rows)) {
                    let gates = gate.reference(x, Some(&norm_weights));
                    let ups = up.reference(x, Some(&norm_weights));
                    for ((&got, (g, g_size)), (u, u_size)) in got.iter().zip(gates).zip(ups) {
                        // The activation, and how much it can change by when its input does.
                        let (a, slope) = match activation {
                            Activation::Relu2 => (g.max(0.0).powi(2), 2.0 * g.abs()),
                            Activation::Silu => (g / (1.0 + (-g).exp()), 1.1),
                        };
                        let error = roundings(cols, 1) * ROUNDING;
                        // An exponential may be off by 4 units, in proportion to its argument.
                        let own = (8.0 + g.abs()) * 2.0 * ROUNDING * (a * u).abs();
                        let tolerance =
                            slope * error * g_size * u.abs() + a.abs() * error * u_size + own;
                        assert_close(got, a * u, tolerance, &|| {
                            format!("{activation:?} {rows}×{cols}, gate {g}, up {u}")
                        });
                    }
                }
                record.extend(got);
            }
            backend.finish().expect("the end of a step");
        }
    }
}

/// A row's result must not depend on the other rows of the step.
pub(super) fn a_row_is_alone<B: Backend>(make: &impl Fn() -> B) {
    let mut random = Random(14);
    let (rows, cols, tokens) = (100, 192, 21);
    let per_token = ActivationQuant::PerToken;
    let linear = Ternary::new(&mut random, rows, cols, ScaleKind::Tensor, per_token, 3);
    let norm = random.norm(cols);
    let x = random.floats(tokens * cols);
    let project = |x: &[f32]| {
        let mut backend = make();
        let n = x.len() / cols;
        let device = backend.linear(&linear.weights()).expect("a projection");
        let norm = backend.norm(&norm).expect("a norm");
        backend.begin(&rows_batch(n)).expect("a step");
        let buffer = upload(&mut backend, x, cols);
        let mut out = backend.buffer(n, rows).expect("a buffer");
        backend.project(&buffer, Some(&norm), &[&device], &mut [&mut out]).expect("a product");
        let out = download(&mut backend, &out);
        backend.finish().expect("the end of a step");
        out
    };
    let together = project(&x);
    for range in [0..1, 4..5, 3..9, 20..21] {
        let alone = project(&x[range.start * cols..range.end * cols]);
        assert!(alone == together[range.start * rows..range.end * rows], "rows {range:?}");
    }
}

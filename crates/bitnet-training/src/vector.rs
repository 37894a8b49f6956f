//! The element loops of a step, compiled for the instruction set that runs them.
//!
//! Plain loops, marked `inline(always)`; [`vectorized`] compiles them for AVX2 or AVX-512 where the
//! CPU has it. Sums run in 16 lanes as in `bitnet_core::cpu::math`, so a result does not depend on
//! the instruction set. Knows slices, not layers.

use bitnet_core::cpu::math::{self, LANES};
use std::ops::Range;

/// Runs `f` compiled for the widest vectors of this CPU.
pub(crate) fn vectorized<R>(f: impl FnOnce() -> R) -> R {
    pulp::Arch::new().dispatch(f)
}

/// Largest magnitude of a quantized gradient.
const WIDE_MAX: f32 = 32_767.0;

/// The largest magnitude of `x[i] · factor`, and what to multiply by to bring it to [`WIDE_MAX`].
#[inline(always)]
fn wide_factor(max: f32) -> (f32, f32) {
    match max > 0.0 {
        true => (max / WIDE_MAX, WIDE_MAX / max),
        false => (0.0, 0.0),
    }
}

/// Quantizes rows of `x` `(n, width)`, columns first multiplied by the scale of their range, to 16
/// bits, absmax a row: `out` `(n, stride)`, padded with zeros.
pub(crate) fn quantize_rows(
    x: &[f32],
    width: usize,
    column_scales: &[(Range<usize>, f32)],
    out: &mut [i16],
    stride: usize,
    scales: &mut [f32],
) {
    vectorized(|| {
        let rows = x.chunks_exact(width).zip(out.chunks_exact_mut(stride));
        for ((x, out), scale) in rows.zip(scales) {
            let mut max = 0.0;
            for (columns, factor) in column_scales {
                max = math::larger(math::max_abs(&x[columns.clone()]) * factor, max);
            }
            let (unit, inverse) = wide_factor(max);
            *scale = unit;
            for (columns, factor) in column_scales {
                let inverse = inverse * factor;
                for (out, &x) in out[columns.clone()].iter_mut().zip(&x[columns.clone()]) {
                    *out = math::round_even_i32(x * inverse) as i16;
                }
            }
            out[width..].fill(0);
        }
    });
}

/// Quantizes columns of `x` `(n, width)`, rows first multiplied by `row_scales`, to 16 bits, absmax
/// a column, and transposes: `out` `(width, stride)`, padded with zeros. `inverses` is scratch.
pub(crate) fn quantize_columns(
    x: &[f32],
    width: usize,
    row_scales: &[f32],
    out: &mut [i16],
    stride: usize,
    scales: &mut [f32],
    inverses: &mut [f32],
) {
    /// Rows and columns of a block that is transposed in the first-level cache.
    const BLOCK: usize = 32;
    vectorized(|| {
        scales.fill(0.0);
        for (x, &factor) in x.chunks_exact(width).zip(row_scales) {
            for (max, &x) in scales.iter_mut().zip(x) {
                *max = math::larger((x * factor).abs(), *max);
            }
        }
        for (scale, inverse) in scales.iter_mut().zip(&mut *inverses) {
            (*scale, *inverse) = wide_factor(*scale);
        }
        let n = row_scales.len();
        let mut block = [[0i16; BLOCK]; BLOCK];
        for first_col in (0..width).step_by(BLOCK) {
            let cols = BLOCK.min(width - first_col);
            let inverses = &inverses[first_col..first_col + cols];
            for first_row in (0..stride).step_by(BLOCK) {
                let rows = BLOCK.min(stride - first_row);
                for (r, block) in block.iter_mut().enumerate().take(rows) {
                    let row = first_row + r;
                    if row >= n {
                        block.fill(0);
                        continue;
                    }
                    let (x, factor) = (&x[row * width + first_col..][..cols], row_scales[row]);
                    for ((out, &x), &inverse) in block.iter_mut().zip(x).zip(inverses) {
                        *out = math::round_even_i32(x * factor * inverse) as i16;
                    }
                }
                for c in 0..cols {
                    let out = &mut out[(first_col + c) * stride + first_row..][..rows];
                    for (out, block) in out.iter_mut().zip(&block) {
                        *out = block[c];
                    }
                }
            }
        }
    });
}

/// Gradients of `y = x / sqrt(mean(x²) + eps) · weight`, rows of `weight.len()`: `dx` is added to
/// (or set, without `add`), `d_weight` is added to.
pub(crate) fn norm_backward(
    x: &[f32],
    weight: &[f32],
    eps: f32,
    dy: &[f32],
    dx: &mut [f32],
    add: bool,
    d_weight: &mut [f32],
) {
    let width = weight.len();
    vectorized(|| {
        let rows = x.chunks_exact(width).zip(dy.chunks_exact(width));
        for ((x, dy), dx) in rows.zip(dx.chunks_exact_mut(width)) {
            let factor = math::inverse_rms(x, eps);
            let mut lanes = [0.0f32; LANES];
            let chunks = x.as_chunks::<LANES>().0.iter().zip(dy.as_chunks::<LANES>().0);
            for ((x, dy), w) in chunks.zip(weight.as_chunks::<LANES>().0) {
                for i in 0..LANES {
                    lanes[i] += x[i] * (dy[i] * w[i]);
                }
            }
            let tail = width / LANES * LANES;
            for i in tail..width {
                lanes[i - tail] += x[i] * (dy[i] * weight[i]);
            }
            let along = math::sum_lanes(lanes) * factor * factor * factor / width as f32;
            for i in 0..width {
                let d = dy[i] * weight[i] * factor - x[i] * along;
                dx[i] = if add { dx[i] + d } else { d };
                d_weight[i] += dy[i] * (x[i] * factor);
            }
        }
    });
}

/// Gradients of `relu(gate)² · up`: rows of `dy` `(n, width)` become rows of `out` `(n, 2·width)`,
/// first those of the gate.
pub(crate) fn relu2_backward(gate: &[f32], up: &[f32], dy: &[f32], width: usize, out: &mut [f32]) {
    gate_backward(gate, up, dy, width, out, |gate, up, dy| {
        let positive = if gate > 0.0 { gate } else { 0.0 };
        (2.0 * positive * up * dy, positive * positive * dy)
    });
}

/// As [`relu2_backward`], for `silu(gate) · up`.
pub(crate) fn silu_backward(gate: &[f32], up: &[f32], dy: &[f32], width: usize, out: &mut [f32]) {
    gate_backward(gate, up, dy, width, out, |gate, up, dy| {
        let sigmoid = 1.0 / (1.0 + math::exp(-gate));
        let silu = gate * sigmoid;
        (dy * up * (sigmoid + silu * (1.0 - sigmoid)), dy * silu)
    });
}

#[inline(always)]
fn gate_backward(
    gate: &[f32],
    up: &[f32],
    dy: &[f32],
    width: usize,
    out: &mut [f32],
    gradient: impl Fn(f32, f32, f32) -> (f32, f32),
) {
    vectorized(|| {
        let rows = gate.chunks_exact(width).zip(up.chunks_exact(width)).zip(dy.chunks_exact(width));
        for (((gate, up), dy), out) in rows.zip(out.chunks_exact_mut(2 * width)) {
            let (d_gate, d_up) = out.split_at_mut(width);
            for i in 0..width {
                (d_gate[i], d_up[i]) = gradient(gate[i], up[i], dy[i]);
            }
        }
    });
}

/// Turns one head by the angles whose cosines and sines stand in `angles`: pairs
/// `(i, i + half)`.
#[inline(always)]
pub(crate) fn rotate(head: &mut [f32], angles: &[f32]) {
    let half = head.len() / 2;
    let (cosines, sines) = angles.split_at(half);
    let (first, second) = head.split_at_mut(half);
    for i in 0..half {
        let (x, y) = (first[i], second[i]);
        (first[i], second[i]) = (x * cosines[i] - y * sines[i], y * cosines[i] + x * sines[i]);
    }
}

/// The transposed [`rotate`]: takes gradients back through it.
#[inline(always)]
pub(crate) fn rotate_back(head: &mut [f32], angles: &[f32]) {
    let half = head.len() / 2;
    let (cosines, sines) = angles.split_at(half);
    let (first, second) = head.split_at_mut(half);
    for i in 0..half {
        let (x, y) = (first[i], second[i]);
        (first[i], second[i]) = (x * cosines[i] + y * sines[i], y * cosines[i] - x * sines[i]);
    }
}

/// Softmax in place; returns the largest element and the sum of `e^(x − largest)`.
#[inline(always)]
pub(crate) fn softmax(x: &mut [f32]) -> (f32, f32) {
    let max = math::max(x);
    let total = math::exp_and_sum(x, max);
    let factor = 1.0 / total;
    x.iter_mut().for_each(|x| *x *= factor);
    (max, total)
}

/// `ds[i] = p[i] · (dp[i] − mean) · factor`, where `mean` is the sum of all `p·dp`, in place of `dp`.
#[inline(always)]
pub(crate) fn softmax_backward(p: &[f32], dp: &mut [f32], factor: f32) {
    let mean = math::dot(p, dp);
    for (dp, &p) in dp.iter_mut().zip(p) {
        *dp = p * (*dp - mean) * factor;
    }
}

/// Sum of squares, in f64 over pieces of 4096.
pub(crate) fn square_sum(x: &[f32]) -> f64 {
    vectorized(|| x.chunks(4096).map(|x| f64::from(math::dot(x, x))).sum())
}

/// `x[i] += y[i]`
pub(crate) fn add(x: &mut [f32], y: &[f32]) {
    vectorized(|| math::add_in_place(x, y));
}

#[cfg(test)]
mod tests {
    use super::*;

    fn numbers(n: usize, seed: u32) -> Vec<f32> {
        let mut state = seed;
        let mut next = || {
            state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
            (state >> 8) as f32 / (1 << 23) as f32 - 1.0
        };
        (0..n).map(|_| next()).collect()
    }

    #[test]
    fn quantized_rows_and_columns_are_close_to_what_they_stand_for() {
        for (n, width) in [(1, 1), (3, 5), (33, 70), (40, 64)] {
            let x = numbers(n * width, 3);
            let split = width / 2;
            let column_scales = [(0..split, 0.5f32), (split..width, 2.0)];
            let stride = width + 3;
            let (mut out, mut scales) = (vec![7; n * stride], vec![0.0; n]);
            quantize_rows(&x, width, &column_scales, &mut out, stride, &mut scales);
            for r in 0..n {
                assert_eq!(out[r * stride + width..(r + 1) * stride], [0; 3]);
                for c in 0..width {
                    let want = x[r * width + c] * if c < split { 0.5 } else { 2.0 };
                    let got = f32::from(out[r * stride + c]) * scales[r];
                    // Half a unit, and the rounding of the products.
                    assert!((got - want).abs() <= scales[r] * 0.51, "{got} {want}");
                }
            }
            let row_scales = numbers(n, 5);
            let stride = n + 1;
            let (mut out, mut scales) = (vec![7; width * stride], vec![0.0; width]);
            let mut inverses = vec![0.0; width];
            quantize_columns(&x, width, &row_scales, &mut out, stride, &mut scales, &mut inverses);
            for c in 0..width {
                assert_eq!(out[c * stride + n], 0);
                for r in 0..n {
                    let want = x[r * width + c] * row_scales[r];
                    let got = f32::from(out[c * stride + r]) * scales[c];
                    assert!((got - want).abs() <= scales[c] * 0.51, "{got} {want}");
                }
            }
        }
    }

    /// `f(x)` changed by a small step along each coordinate, against `gradient`.
    fn check(x: &[f32], gradient: &[f32], f: impl Fn(&[f32]) -> f64) {
        for i in 0..x.len() {
            let step = 1e-2;
            let mut moved = x.to_vec();
            moved[i] = x[i] + step;
            let above = f(&moved);
            moved[i] = x[i] - step;
            let difference = (above - f(&moved)) / (2.0 * f64::from(step));
            // The third derivative times step², and the rounding of f32 over the step.
            let tolerance = 2e-3 * (1.0 + difference.abs());
            assert!((difference - f64::from(gradient[i])).abs() < tolerance, "{i}");
        }
    }

    fn dot(a: &[f32], b: &[f32]) -> f64 {
        a.iter().zip(b).map(|(&a, &b)| f64::from(a) * f64::from(b)).sum()
    }

    #[test]
    fn gradients_match_differences() {
        let width = 21;
        let (x, weight, dy) = (numbers(2 * width, 1), numbers(width, 2), numbers(2 * width, 3));
        let norm = |x: &[f32], weight: &[f32]| {
            let mut out = vec![0.0; x.len()];
            for (x, out) in x.chunks(width).zip(out.chunks_mut(width)) {
                math::rms_norm(x, weight, 1e-5, out);
            }
            dot(&out, &dy)
        };
        let (mut dx, mut dw) = (vec![0.0; 2 * width], vec![0.0; width]);
        norm_backward(&x, &weight, 1e-5, &dy, &mut dx, true, &mut dw);
        check(&x, &dx, |x| norm(x, &weight));
        check(&weight, &dw, |weight| norm(&x, weight));

        let up = numbers(2 * width, 4);
        for silu in [false, true] {
            let mut out = vec![0.0; 4 * width];
            let backward = if silu { silu_backward } else { relu2_backward };
            backward(&x, &up, &dy, width, &mut out);
            let of = |part: usize| -> Vec<f32> {
                out.chunks(width).skip(part).step_by(2).flatten().copied().collect()
            };
            let value = |gate: &[f32], up: &[f32]| {
                let y: Vec<f32> = gate
                    .iter()
                    .zip(up)
                    .map(|(&g, &u)| if silu { math::silu(g) * u } else { g.max(0.0).powi(2) * u })
                    .collect();
                dot(&y, &dy)
            };
            check(&x, &of(0), |gate| value(gate, &up));
            check(&up, &of(1), |up| value(&x, up));
        }

        let soft = |x: &[f32]| {
            let mut p = x.to_vec();
            softmax(&mut p);
            3.0 * dot(&p, &dy[..width])
        };
        let mut p = x[..width].to_vec();
        softmax(&mut p);
        let mut ds = dy[..width].to_vec();
        softmax_backward(&p, &mut ds, 3.0);
        check(&x[..width], &ds, soft);

        let angles: Vec<f32> =
            (0..8).map(|i| if i < 4 { (i as f32).cos() } else { (i as f32 - 4.0).sin() }).collect();
        let mut turned = x[..8].to_vec();
        rotate(&mut turned, &angles);
        rotate_back(&mut turned, &angles);
        assert!(turned.iter().zip(&x).all(|(a, b)| (a - b).abs() < 1e-6));
    }
}

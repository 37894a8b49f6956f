//! The float arithmetic every part of the CPU path shares, each with one order of operations.
//!
//! A float result must be the same on every CPU, thread count and batch. So a sum always runs in
//! [`LANES`] lanes (lane `i` takes elements `i`, `i + 16`, …), each term is a multiplication
//! followed by an addition, never a fused one, and the lanes fold in a fixed tree. The functions
//! are plain loops over arrays of 16, marked `inline(always)`: called inside a function compiled
//! for AVX2 or AVX-512 they become vector code, and Rust never contracts or reorders float
//! arithmetic, so the bits stay. Knows nothing of weights, threads or instruction sets.

/// Lanes of every float sum.
pub const LANES: usize = 16;

/// One value for each lane.
pub type Lanes = [f32; LANES];

/// Folds 16 lanes into one sum: `i + (i + 8)`, then 4, 2, 1.
#[inline(always)]
pub fn sum_lanes(mut lanes: Lanes) -> f32 {
    let mut half = LANES / 2;
    while half > 0 {
        for i in 0..half {
            lanes[i] += lanes[i + half];
        }
        half /= 2;
    }
    lanes[0]
}

/// The larger of two numbers, as one compare and select; `b` where either is NaN.
#[inline(always)]
pub fn larger(a: f32, b: f32) -> f32 {
    if a > b { a } else { b }
}

/// The largest of 16 lanes.
#[inline(always)]
pub fn max_lanes(mut lanes: Lanes) -> f32 {
    let mut half = LANES / 2;
    while half > 0 {
        for i in 0..half {
            lanes[i] = larger(lanes[i], lanes[i + half]);
        }
        half /= 2;
    }
    lanes[0]
}

/// The largest element; −∞ of nothing.
#[inline(always)]
pub fn max(x: &[f32]) -> f32 {
    let mut lanes = [f32::NEG_INFINITY; LANES];
    let (chunks, tail) = x.as_chunks::<LANES>();
    for chunk in chunks {
        for i in 0..LANES {
            lanes[i] = larger(chunk[i], lanes[i]);
        }
    }
    for (lane, &value) in lanes.iter_mut().zip(tail) {
        *lane = larger(value, *lane);
    }
    max_lanes(lanes)
}

/// The largest absolute value; 0 of nothing.
#[inline(always)]
pub fn max_abs(x: &[f32]) -> f32 {
    let mut lanes = [0.0f32; LANES];
    let (chunks, tail) = x.as_chunks::<LANES>();
    for chunk in chunks {
        for i in 0..LANES {
            lanes[i] = larger(chunk[i].abs(), lanes[i]);
        }
    }
    for (lane, value) in lanes.iter_mut().zip(tail) {
        *lane = larger(value.abs(), *lane);
    }
    max_lanes(lanes)
}

/// The sum of the elements.
#[inline(always)]
pub fn sum(x: &[f32]) -> f32 {
    let mut lanes = [0.0f32; LANES];
    let (chunks, tail) = x.as_chunks::<LANES>();
    for chunk in chunks {
        for i in 0..LANES {
            lanes[i] += chunk[i];
        }
    }
    for (lane, &value) in lanes.iter_mut().zip(tail) {
        *lane += value;
    }
    sum_lanes(lanes)
}

/// `Σ a[i]·b[i]` over the length of the shorter slice.
#[inline(always)]
pub fn dot(a: &[f32], b: &[f32]) -> f32 {
    let len = a.len().min(b.len());
    let (a_chunks, a_tail) = a[..len].as_chunks::<LANES>();
    let (b_chunks, b_tail) = b[..len].as_chunks::<LANES>();
    let mut lanes = [0.0f32; LANES];
    for (a, b) in a_chunks.iter().zip(b_chunks) {
        for i in 0..LANES {
            lanes[i] += a[i] * b[i];
        }
    }
    for (lane, (&a, &b)) in lanes.iter_mut().zip(a_tail.iter().zip(b_tail)) {
        *lane += a * b;
    }
    sum_lanes(lanes)
}

/// `1 / sqrt(mean(x²) + eps)`, the factor of a root-mean-square norm.
#[inline(always)]
pub fn inverse_rms(x: &[f32], eps: f32) -> f32 {
    let mean = dot(x, x) / x.len() as f32;
    1.0 / (mean + eps).sqrt()
}

/// `out[i] = x[i] · inverse_rms(x, eps) · weight[i]`, over the length of the shortest slice.
#[inline(always)]
pub fn rms_norm(x: &[f32], weight: &[f32], eps: f32, out: &mut [f32]) {
    let factor = inverse_rms(x, eps);
    for ((out, &x), &weight) in out.iter_mut().zip(x).zip(weight) {
        *out = x * factor * weight;
    }
}

/// [`rms_norm`] in place.
#[inline(always)]
pub fn rms_norm_in_place(x: &mut [f32], weight: &[f32], eps: f32) {
    let factor = inverse_rms(x, eps);
    for (x, &weight) in x.iter_mut().zip(weight) {
        *x = *x * factor * weight;
    }
}

/// `x[i] += y[i]`, over the length of the shorter slice.
#[inline(always)]
pub fn add_in_place(x: &mut [f32], y: &[f32]) {
    for (x, &y) in x.iter_mut().zip(y) {
        *x += y;
    }
}

/// Adding this to `|x| < 2²²` rounds `x` to the nearest integer, ties to even, and leaves that
/// integer in the low bits: no instruction beyond SSE2 needed, unlike `round_ties_even`.
const ROUND: f32 = 12_582_912.0; // 1.5 · 2²³

/// `x` rounded to the nearest integer, ties to even; for `|x| < 2²²`.
#[inline(always)]
pub fn round_even(x: f32) -> f32 {
    (x + ROUND) - ROUND
}

/// As [`round_even`], as an integer.
#[inline(always)]
pub fn round_even_i32(x: f32) -> i32 {
    ((x + ROUND).to_bits() as i32).wrapping_sub(ROUND.to_bits() as i32)
}

/// Below this `e^x` is smaller than the smallest normal number.
const EXP_UNDERFLOW: f32 = -87.336_54;
/// Above this `e^x` may be larger than the largest number.
const EXP_OVERFLOW: f32 = 88.722_83;
/// ln 2 in two parts; the first has 9 significant bits, so that its product with an exponent is
/// exact.
const LN2_HIGH: f32 = 0.693_359_4;
const LN2_LOW: f32 = -2.121_944_4e-4;
/// Minimax polynomial for `(e^r − 1 − r) / r²` on `|r| ≤ ln 2 / 2`, lowest power first. It adds
/// 3.6e-9 of `e^r` at most, a sixteenth of a rounding.
const EXP_POLY: [f32; 5] = [0.499_999_94, 0.166_665_21, 0.041_668_39, 0.008_368_745, 0.001_381_454];

/// `e^x`, within 1.5 units in the last place. Results below the smallest normal number are 0,
/// those above the largest number ∞; NaN stays NaN. Branch-free, so that loops over it vectorize.
#[inline(always)]
pub fn exp(x: f32) -> f32 {
    // x = n·ln 2 + r, |r| ≤ ln 2 / 2.
    let clamped = if x > EXP_OVERFLOW { EXP_OVERFLOW } else { x };
    let clamped = if clamped < EXP_UNDERFLOW { EXP_UNDERFLOW } else { clamped };
    let shifted = clamped * std::f32::consts::LOG2_E + ROUND;
    let n = (shifted.to_bits() as i32).wrapping_sub(ROUND.to_bits() as i32);
    let n_float = shifted - ROUND;
    let r = (clamped - n_float * LN2_HIGH) - n_float * LN2_LOW;
    let [c0, c1, c2, c3, c4] = EXP_POLY;
    let poly = (((c4 * r + c3) * r + c2) * r + c1) * r + c0;
    let e_r = 1.0 + (r + r * r * poly);
    // 2^n in two factors: n may be 128, which is no exponent of a number.
    let half = n >> 1;
    let power = |n: i32| f32::from_bits((n.wrapping_add(127) as u32) << 23);
    let y = e_r * power(half) * power(n.wrapping_sub(half));
    let y = if x < EXP_UNDERFLOW { 0.0 } else { y };
    if x > EXP_OVERFLOW { f32::INFINITY } else { y }
}

/// ln x for a normal positive number, within 2 units in the last place. Branch-free, as [`exp`].
#[inline(always)]
pub fn ln(x: f32) -> f32 {
    // x = 2ⁿ·m with m from √½ to √2, and ln m = 2·artanh(s) with s = (m − 1)/(m + 1).
    let bits = x.to_bits().wrapping_sub(std::f32::consts::FRAC_1_SQRT_2.to_bits());
    let n = ((bits as i32) >> 23) as f32;
    let m = f32::from_bits((bits & 0x007f_ffff) + std::f32::consts::FRAC_1_SQRT_2.to_bits());
    let s = (m - 1.0) / (m + 1.0);
    let s2 = s * s;
    // Past s⁹ the series adds less than a thirtieth of a rounding.
    let rest = (((s2 * (1.0 / 9.0) + 1.0 / 7.0) * s2 + 1.0 / 5.0) * s2 + 1.0 / 3.0) * s2;
    let small = 2.0 * s * rest + n * LN2_LOW;
    n * LN2_HIGH + (2.0 * s + small)
}

/// `x / (1 + e^−x)`.
#[inline(always)]
pub fn silu(x: f32) -> f32 {
    x / (1.0 + exp(-x))
}

/// `max(x, 0)²`.
#[inline(always)]
pub fn relu2(x: f32) -> f32 {
    let positive = if x > 0.0 { x } else { 0.0 };
    positive * positive
}

/// `x[i] = e^(x[i] − max)`; returns their sum.
#[inline(always)]
pub fn exp_and_sum(x: &mut [f32], max: f32) -> f32 {
    let mut lanes = [0.0f32; LANES];
    let (chunks, tail) = x.as_chunks_mut::<LANES>();
    for chunk in chunks {
        for i in 0..LANES {
            chunk[i] = exp(chunk[i] - max);
            lanes[i] += chunk[i];
        }
    }
    for (lane, value) in lanes.iter_mut().zip(tail) {
        *value = exp(*value - max);
        *lane += *value;
    }
    sum_lanes(lanes)
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Numbers in [−1, 1) from a 64-bit linear congruential generator.
    fn random(len: usize, seed: u64) -> Vec<f32> {
        let mut state = seed;
        let mut next = || {
            state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1);
            (state >> 40) as f32 / (1u32 << 23) as f32 - 1.0
        };
        (0..len).map(|_| next()).collect()
    }

    /// Distance of `got` from `want` in units in the last place of `want`.
    fn ulps(got: f32, want: f64) -> f64 {
        let nearest = want as f32;
        let ulp = f64::from(f32::from_bits(nearest.abs().to_bits() + 1)) - f64::from(nearest.abs());
        (f64::from(got) - want).abs() / ulp
    }

    #[test]
    fn exp_is_within_one_and_a_half_ulps() {
        let mut worst = 0.0f64;
        for step in 0..2_000_000 {
            let x = -87.33 + step as f32 * (176.0 / 2_000_000.0);
            worst = worst.max(ulps(exp(x), f64::from(x).exp()));
        }
        assert!(worst < 1.5, "worst error {worst} ulps");
    }

    #[test]
    fn exp_at_the_edges() {
        assert_eq!(exp(0.0), 1.0);
        assert_eq!(exp(-0.0), 1.0);
        assert_eq!(exp(f32::NEG_INFINITY), 0.0);
        assert_eq!(exp(-88.0), 0.0);
        assert_eq!(exp(f32::INFINITY), f32::INFINITY);
        assert_eq!(exp(89.0), f32::INFINITY);
        assert!(exp(f32::NAN).is_nan());
        assert!(exp(EXP_UNDERFLOW) >= f32::MIN_POSITIVE);
        assert!(exp(EXP_OVERFLOW) <= f32::MAX);
        assert!(ulps(exp(EXP_OVERFLOW), f64::from(EXP_OVERFLOW).exp()) < 2.0);
    }

    #[test]
    fn ln_is_within_two_ulps() {
        let mut worst = 0.0f64;
        for bits in (f32::MIN_POSITIVE.to_bits()..f32::INFINITY.to_bits()).step_by(1009) {
            let x = f32::from_bits(bits);
            worst = worst.max(ulps(ln(x), f64::from(x).ln()));
        }
        assert!(worst < 2.0, "worst error {worst} ulps");
        assert_eq!(ln(1.0), 0.0);
    }

    #[test]
    fn activations() {
        assert_eq!(relu2(-3.0), 0.0);
        assert_eq!(relu2(3.0), 9.0);
        assert_eq!(silu(0.0), 0.0);
        assert_eq!(silu(-200.0), 0.0);
        assert_eq!(silu(200.0), 200.0);
        for x in random(1000, 1) {
            let x = 20.0 * x;
            let want = f64::from(x) / (1.0 + (-f64::from(x)).exp());
            // The error of exp counts at most in full; the addition and division half each.
            assert!(ulps(silu(x), want) < 1.5 + 1.0, "silu({x})");
        }
    }

    #[test]
    fn sums_of_every_length() {
        for len in 0..=100 {
            let (a, b) = (random(len, 2), random(len, 3));
            let exact: f64 = a.iter().zip(&b).map(|(&a, &b)| f64::from(a) * f64::from(b)).sum();
            let magnitude: f64 =
                a.iter().zip(&b).map(|(&a, &b)| (f64::from(a) * f64::from(b)).abs()).sum();
            // Each term passes through its product, the additions of its lane and the tree.
            let roundings = 1 + len.div_ceil(LANES) + 4;
            let tolerance = roundings as f64 * f64::from(f32::EPSILON) / 2.0 * magnitude;
            assert!((f64::from(dot(&a, &b)) - exact).abs() <= tolerance, "length {len}");

            let exact: f64 = a.iter().copied().map(f64::from).sum();
            let magnitude: f64 = a.iter().map(|&a| f64::from(a).abs()).sum();
            let tolerance = roundings as f64 * f64::from(f32::EPSILON) / 2.0 * magnitude;
            assert!((f64::from(sum(&a)) - exact).abs() <= tolerance, "length {len}");

            let largest = a.iter().copied().fold(f32::NEG_INFINITY, f32::max);
            assert_eq!(max(&a), largest);
            assert_eq!(max_abs(&a), a.iter().fold(0.0, |m: f32, x| m.max(x.abs())));
        }
    }

    #[test]
    fn the_order_of_a_sum_is_fixed() {
        // 2²⁴ swallows a 1 added to it, so the result tells which elements met in a lane.
        let big = 16_777_216.0;
        let mut x = [0.0f32; 33];
        x[0] = big;
        x[16] = 1.0; // lane 0: swallowed
        assert_eq!(sum(&x), big);
        x[32] = 1.0; // lane 0 again: swallowed once more
        assert_eq!(sum(&x), big);
        x[16] = 0.0;
        x[32] = 0.0;
        x[8] = 1.0; // first fold of the tree joins lanes 0 and 8
        x[1] = 2.0;
        assert_eq!(sum(&x), big + 2.0);
    }

    #[test]
    fn norms_match_the_definition() {
        for len in [1, 15, 16, 17, 128, 2560] {
            let (x, weight) = (random(len, 4), random(len, 5));
            let mean = x.iter().map(|&x| f64::from(x).powi(2)).sum::<f64>() / len as f64;
            let factor = 1.0 / (mean + f64::from(1e-5f32)).sqrt();
            let mut out = vec![0.0; len];
            rms_norm(&x, &weight, 1e-5, &mut out);
            let mut in_place = x.clone();
            rms_norm_in_place(&mut in_place, &weight, 1e-5);
            assert_eq!(out, in_place);
            // All squares are positive, so the sum's relative error is at most its roundings;
            // the root halves it. Mean, eps, root, reciprocal and two products round once each.
            let roundings = (len.div_ceil(LANES) + 5 + 2) as f64 / 2.0 + 4.0;
            let tolerance = roundings * f64::from(f32::EPSILON) / 2.0;
            for i in 0..len {
                let want = f64::from(x[i]) * factor * f64::from(weight[i]);
                assert!((f64::from(out[i]) - want).abs() <= tolerance * want.abs(), "{len}: {i}");
            }
        }
    }

    #[test]
    fn softmax_pieces() {
        for len in [1, 7, 16, 100] {
            let x = random(len, 6);
            let mut p = x.clone();
            let total = exp_and_sum(&mut p, max(&x));
            assert_eq!(total, sum(&p));
            let top = max(&x);
            let want: f64 = x.iter().map(|&x| f64::from(x - top).exp()).sum();
            // All terms are positive: the exponential's error, the lane's additions, the tree's.
            let roundings = 3.0 + (len.div_ceil(LANES) + 4) as f64;
            let tolerance = roundings * f64::from(f32::EPSILON) / 2.0;
            assert!((f64::from(total) / want - 1.0).abs() < tolerance, "length {len}");
        }
    }

    #[test]
    fn rounding_ties_to_even() {
        for (x, want) in [(0.5, 0), (1.5, 2), (2.5, 2), (-0.5, 0), (-1.5, -2), (126.7, 127)] {
            assert_eq!(round_even_i32(x), want);
            assert_eq!(round_even(x), want as f32);
        }
    }
}

//! Inputs rounded to 16 bits, and how far a logit of rounded numbers can be off.
//!
//! Knows rows and inputs by their norms; nothing of threads, and nothing of where codes are kept.

use crate::cpu::math;
use crate::kernels::{BYTE_OFFSET, ByteRow, TILE_ROWS, norm_above};
use crate::noise::Noise;
use std::cmp::Reverse;
use std::collections::BinaryHeap;
use std::sync::atomic::{AtomicI32, Ordering::Relaxed};

/// The largest magnitude of a 16-bit code whose high byte, rounded, still fits 8 bits with a sign.
const CODE_MAX: f32 = 32_639.0;

/// How an input was rounded.
#[derive(Debug, Clone, Copy, Default)]
pub(super) struct TokenBound {
    /// What one unit of a 16-bit code is worth.
    pub(super) scale: f32,
    /// Sums of the high and of the low bytes.
    pub(super) sums: [i32; 2],
    /// At least the Euclidean norm of the input.
    pub(super) norm: f32,
    /// At least the Euclidean norm of the difference to the rounded input.
    pub(super) error: f32,
    /// The same for the high bytes alone.
    pub(super) high_error: f32,
    /// What is added to its logits before the largest are chosen.
    pub(super) noise: Noise,
}

/// Rounds an input to 16 bits, `x ≈ scale · (256 · high + low)`.
pub(super) fn round_token(x: &[f32], high: &mut [i8], low: &mut [i8]) -> TokenBound {
    let scale = math::max_abs(x).max(1e-30) / CODE_MAX;
    let inverse = 1.0 / scale;
    high[x.len()..].fill(0);
    low[x.len()..].fill(0);
    let (mut sums, mut squares, mut errors, mut high_errors) = ([0, 0], 0.0, 0.0, 0.0);
    for ((&x, high), low) in x.iter().zip(high).zip(low) {
        // Within ±32,639 for numbers; what is none makes the bounds none either.
        let code = math::round_even_i32(x * inverse);
        *high = (code.wrapping_add(128) >> 8) as i8;
        *low = code as i8;
        sums[0] += i32::from(*high);
        sums[1] += i32::from(*low);
        let error = f64::from(x) - f64::from(scale) * f64::from(code);
        let high_error = error + f64::from(scale) * f64::from(*low);
        squares += f64::from(x) * f64::from(x);
        errors += error * error;
        high_errors += high_error * high_error;
    }
    let [norm, error, high_error] = [squares, errors, high_errors].map(norm_above);
    TokenBound { scale, sums, norm, error, high_error, noise: Noise::NONE }
}

/// How far the logit of a rounded row can be off for an input that is itself off by `error`.
#[inline(always)]
fn error_bound(token: &TokenBound, error: f32, row: ByteRow, slack: f32) -> f32 {
    let size = (row.norm + row.error) * (token.norm + token.error);
    row.error * token.norm + row.norm * error + slack * size
}

/// Between which two numbers the logits of 16 rows lie once noise is added, from the sums of their
/// codes with the high and the low bytes of a token.
#[inline(always)]
pub(super) fn logit_bounds(
    token: &TokenBound,
    rows: &[ByteRow; TILE_ROWS],
    high: &[i32; TILE_ROWS],
    low: &[i32; TILE_ROWS],
    noise: &[f32; TILE_ROWS],
    slack: f32,
) -> ([f32; TILE_ROWS], [f32; TILE_ROWS]) {
    let (mut lower, mut upper) = ([0.0; TILE_ROWS], [0.0; TILE_ROWS]);
    for i in 0..TILE_ROWS {
        let high = (high[i] - BYTE_OFFSET * token.sums[0]) as f32 * 256.0;
        let sum = high + (low[i] - BYTE_OFFSET * token.sums[1]) as f32;
        let score = sum * (rows[i].scale * token.scale);
        let off = error_bound(token, token.error, rows[i], slack);
        (lower[i], upper[i]) = (score - off + noise[i], score + off + noise[i]);
    }
    (lower, upper)
}

/// Whether one of the 16 rows can have a logit with noise of `floor` or more, as far as the high
/// bytes tell.
#[inline(always)]
pub(super) fn may_reach(
    floor: f32,
    token: &TokenBound,
    rows: &[ByteRow; TILE_ROWS],
    high: &[i32; TILE_ROWS],
    noise: &[f32; TILE_ROWS],
    slack: f32,
) -> bool {
    let mut below = true;
    for i in 0..TILE_ROWS {
        let high = (high[i] - BYTE_OFFSET * token.sums[0]) as f32 * 256.0;
        let score = high * (rows[i].scale * token.scale);
        let upper = score + error_bound(token, token.high_error, rows[i], slack) + noise[i];
        // What is not a number is not below one.
        below &= upper < floor;
    }
    !below
}

/// The largest of many numbers.
#[derive(Debug, Default)]
pub(super) struct Best {
    heap: BinaryHeap<Reverse<Ordered>>,
}

impl Best {
    pub(super) fn clear(&mut self) {
        self.heap.clear();
    }

    /// Numbers there is room for.
    pub(super) fn capacity(&self) -> usize {
        self.heap.capacity()
    }

    /// The numbers kept, in no order.
    pub(super) fn numbers(&self) -> impl Iterator<Item = f32> {
        self.heap.iter().map(|number| number.0.0)
    }

    /// The `n`-th largest number, or −∞ if there have been fewer.
    pub(super) fn threshold(&self, n: usize) -> f32 {
        let least = self.heap.peek().filter(|_| self.heap.len() >= n);
        least.map_or(f32::NEG_INFINITY, |Reverse(Ordered(least))| *least)
    }

    #[inline(always)]
    pub(super) fn look_at(&mut self, numbers: &[f32], n: usize) {
        let threshold = self.threshold(n);
        if self.heap.len() < n || numbers.iter().fold(false, |any, &x| any | (x > threshold)) {
            numbers.iter().for_each(|&number| self.add(number, n));
        }
    }

    pub(super) fn add(&mut self, number: f32, n: usize) {
        if self.heap.len() < n {
            self.heap.push(Reverse(Ordered(number)));
        } else if let Some(mut least) = self.heap.peek_mut()
            && number > least.0.0
        {
            *least = Reverse(Ordered(number));
        }
    }
}

/// A number that threads raise together.
#[derive(Debug)]
pub(super) struct Floor(AtomicI32);

impl Default for Floor {
    fn default() -> Self {
        Self(AtomicI32::new(Self::ordered(f32::NEG_INFINITY)))
    }
}

impl Floor {
    /// Integers in the order of floats; its own inverse.
    fn turned(bits: i32) -> i32 {
        bits ^ ((bits >> 31) as u32 >> 1) as i32
    }

    fn ordered(x: f32) -> i32 {
        Self::turned(x.to_bits() as i32)
    }

    pub(super) fn get(&self) -> f32 {
        f32::from_bits(Self::turned(self.0.load(Relaxed)) as u32)
    }

    /// Makes it `x` where that is more.
    pub(super) fn raise(&self, x: f32) {
        self.0.fetch_max(Self::ordered(x), Relaxed);
    }
}

/// A float in the total order of its bits.
#[derive(Debug)]
struct Ordered(f32);

impl PartialEq for Ordered {
    fn eq(&self, other: &Self) -> bool {
        self.cmp(other).is_eq()
    }
}

impl Eq for Ordered {}

impl PartialOrd for Ordered {
    fn partial_cmp(&self, other: &Self) -> Option<std::cmp::Ordering> {
        Some(self.cmp(other))
    }
}

impl Ord for Ordered {
    fn cmp(&self, other: &Self) -> std::cmp::Ordering {
        self.0.total_cmp(&other.0)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_largest_numbers_are_kept() {
        let mut best = Best::default();
        assert_eq!(best.threshold(2), f32::NEG_INFINITY);
        best.look_at(&[1.0], 2);
        assert_eq!(best.threshold(2), f32::NEG_INFINITY, "one of two");
        best.look_at(&[5.0, -3.0], 2);
        best.look_at(&[0.5, 2.0], 2);
        assert_eq!(best.threshold(2), 2.0);
        best.look_at(&[f32::NAN], 2);
        assert_eq!(best.threshold(2), 2.0, "what is not a number is not above one");
        assert_eq!(Best::default().threshold(0), f32::NEG_INFINITY);
    }

    #[test]
    fn a_floor_only_rises() {
        let floor = Floor::default();
        assert_eq!(floor.get(), f32::NEG_INFINITY);
        for (x, want) in [(-3.0, -3.0), (-7.5, -3.0), (-0.5, -0.5), (2.0, 2.0), (1.0, 2.0)] {
            floor.raise(x);
            assert_eq!(floor.get(), want);
        }
    }

    #[test]
    fn inputs_of_any_size_are_within_their_bounds() {
        for size in [0.0, 1e-38, 1e-3, 1.0, 1e30] {
            let x: Vec<f32> = super::super::tests::noise(3).take(100).map(|x| x * size).collect();
            let (mut high, mut low) = (vec![0; 128], vec![0; 128]);
            let bound = round_token(&x, &mut high, &mut low);
            let (mut squares, mut errors, mut high_errors) = (0.0, 0.0, 0.0);
            for (i, &x) in x.iter().enumerate() {
                let code = 256.0 * f64::from(high[i]);
                let high_error = f64::from(x) - code * f64::from(bound.scale);
                let error = high_error - f64::from(low[i]) * f64::from(bound.scale);
                squares += f64::from(x) * f64::from(x);
                errors += error * error;
                high_errors += high_error * high_error;
            }
            assert!(f64::from(bound.norm) >= squares.sqrt(), "{size}");
            assert!(f64::from(bound.error) >= errors.sqrt(), "{size}");
            assert!(f64::from(bound.high_error) >= high_errors.sqrt(), "{size}");
            // A code's unit is the largest of 32,639; an error is half of one at most, and half of
            // 256 where only the high bytes count.
            assert!(bound.error <= 0.51 * 10.0 * bound.scale, "{size}: {}", bound.error);
            assert!(bound.high_error <= 0.51 * 2560.0 * bound.scale, "{size}");
            let sum = |codes: &[i8]| codes.iter().map(|&code| i32::from(code)).sum::<i32>();
            assert_eq!(bound.sums, [sum(&high), sum(&low)]);
        }
    }
}

//! The tokens that can have the largest logits, found without reading the whole head.
//!
//! An output head of 128,256 rows in f16 is more than half of all bytes a small ternary model reads
//! for a token. A copy in 8 bits scores every row; how far each score can be off is bounded by
//! Cauchy and Schwarz from the row's and the input's rounding errors. Rows whose upper bound reaches
//! the lower bound of the n-th best are then computed exactly, by the same kernel as always: the n
//! best logits and their order are exactly those of the full head. Where the bounds exclude too
//! little, all rows are computed.

use super::math;
use crate::error::Result;
use crate::kernels::{
    BYTE_STEP_COLS, Block, FloatMatrix, Kernels, MAX_BYTE_COLS, STEP_BYTES, TILE_ROWS, WeightMemory,
};
use crate::threads::{Parts, ThreadPool, share};
use std::cmp::Reverse;
use std::collections::BinaryHeap;

/// Fewest rows for which a second copy pays.
const MIN_ROWS: usize = 16_384;
/// An exact row costs twice an approximate one; beyond this share of rows, all are computed.
const MAX_SHARE: usize = 8;
/// What an activation's 8-bit code is offset by in a row.
const OFFSET: i32 = 128;

/// An 8-bit copy of an output head `(rows, cols)` with a bound on the error of each row.
pub(super) struct Shortlist {
    rows: usize,
    cols: usize,
    /// Tiles of 16 rows, `STEP_BYTES` for each four columns; a byte is `128 + round(w / scale)`.
    codes: Block,
    bounds: Vec<RowBound>, // whole tiles
}

/// How a row was rounded.
#[derive(Debug, Clone, Copy, Default)]
struct RowBound {
    /// What one unit of a code is worth.
    scale: f32,
    /// At least the Euclidean norm of the rounded row.
    norm: f32,
    /// At least the Euclidean norm of the difference to the exact row.
    error: f32,
}

/// Buffers of a call, to be used again.
#[derive(Debug, Default)]
pub(super) struct ShortlistScratch {
    x: Vec<i8>,
    tokens: Vec<TokenBound>,
    lower: Vec<f32>,
    upper: Vec<f32>,
    candidates: Vec<u32>,
}

impl ShortlistScratch {
    pub(super) fn memory_bytes(&self) -> u64 {
        let floats = self.lower.capacity() + self.upper.capacity() + self.candidates.capacity();
        (self.x.capacity() + 4 * floats) as u64
    }
}

/// How an input was rounded.
#[derive(Debug, Clone, Copy)]
struct TokenBound {
    scale: f32,
    sum: i32,
    norm: f32,
    error: f32,
}

/// Makes a sum of squares in f64 an upper bound in f32.
fn norm_above(squares: f64) -> f32 {
    (squares.sqrt() * (1.0 + 1e-6)) as f32
}

impl Shortlist {
    /// Copies a head, or says that it is too small (or too wide) for that to pay.
    pub(super) fn new(
        matrix: &FloatMatrix,
        pool: &ThreadPool,
        memory: &mut WeightMemory,
    ) -> Result<Option<Self>> {
        let (rows, cols) = (matrix.rows(), matrix.cols());
        if rows < MIN_ROWS || cols > MAX_BYTE_COLS {
            return Ok(None);
        }
        let n_tiles = rows.div_ceil(TILE_ROWS);
        let tile_bytes = cols.div_ceil(BYTE_STEP_COLS) * STEP_BYTES;
        let mut codes = memory.take(n_tiles * tile_bytes)?;
        let mut bounds = vec![RowBound::default(); n_tiles * TILE_ROWS];
        let (code_parts, bound_parts) = (Parts::new(&mut codes), Parts::new(&mut bounds));
        pool.run(&|thread| {
            let mut row = vec![0.0; cols];
            for tile in share(n_tiles, pool.threads(), thread) {
                // SAFETY: tiles are shared out once each, so their bytes and bounds are disjoint.
                let (out, bounds) = unsafe {
                    let bytes = tile * tile_bytes..(tile + 1) * tile_bytes;
                    let rows = tile * TILE_ROWS..(tile + 1) * TILE_ROWS;
                    (code_parts.part(bytes), bound_parts.part(rows))
                };
                out.fill(OFFSET as u8);
                for (r, bound) in bounds.iter_mut().enumerate() {
                    if tile * TILE_ROWS + r < rows {
                        matrix.decode_row(tile * TILE_ROWS + r, &mut row);
                        *bound = round_row(&row, &mut out[4 * r..]);
                    }
                }
            }
        });
        Ok(Some(Self { rows, cols, codes, bounds }))
    }

    pub(super) fn memory_bytes(&self) -> u64 {
        (self.codes.len() + size_of_val(&self.bounds[..])) as u64
    }

    /// Exact logits of the `n_best` largest of each token at least; −∞ for rows that cannot be among
    /// them. `x` `(tokens, cols)`, `out` `(tokens, rows)`.
    pub(super) fn logits(
        &self,
        matrix: &FloatMatrix,
        pool: &ThreadPool,
        kernels: &Kernels,
        x: &[f32],
        n_best: usize,
        scratch: &mut ShortlistScratch,
        out: &mut [f32],
    ) {
        self.score(pool, kernels, x, scratch);
        let ShortlistScratch { lower, upper, candidates, .. } = scratch;
        let tokens = x.chunks_exact(self.cols).zip(out.chunks_exact_mut(self.rows));
        for (token, (x, out)) in tokens.enumerate() {
            let bounds = token * self.rows..(token + 1) * self.rows;
            choose(&lower[bounds.clone()], &upper[bounds], n_best, candidates);
            if candidates.len() > self.rows / MAX_SHARE {
                matrix.project(pool, kernels, x, 1, out);
                continue;
            }
            out.fill(f32::NEG_INFINITY);
            let parts = Parts::new(out);
            pool.run(&|thread| {
                let mut y = [0.0; TILE_ROWS];
                for &row in &candidates[share(candidates.len(), pool.threads(), thread)] {
                    let row = row as usize;
                    kernels.float_products(&matrix.rows_at(row..row + 1), x, 1, &mut y);
                    // SAFETY: a row is a candidate once, and candidates are shared out once each.
                    let out = unsafe { parts.part(row..row + 1) };
                    out[0] = y[0];
                }
            });
        }
    }

    /// Bounds on every row's logit for every token.
    fn score(
        &self,
        pool: &ThreadPool,
        kernels: &Kernels,
        x: &[f32],
        scratch: &mut ShortlistScratch,
    ) {
        let ShortlistScratch { x: codes, tokens, lower, upper, .. } = scratch;
        let n_tokens = x.len() / self.cols;
        let stride = self.cols.next_multiple_of(STEP_BYTES);
        codes.resize(n_tokens * stride, 0);
        lower.resize(n_tokens * self.rows, 0.0);
        upper.resize(n_tokens * self.rows, 0.0);
        tokens.clear();
        for (x, codes) in x.chunks_exact(self.cols).zip(codes.chunks_exact_mut(stride)) {
            let (mut scale, mut sum) = ([0.0], [0]);
            kernels.quantize(x, self.cols, self.cols, codes, &mut scale, &mut sum);
            let (mut squares, mut errors) = (0.0, 0.0);
            for (&x, &code) in x.iter().zip(codes.iter()) {
                let error = f64::from(x) - f64::from(scale[0]) * f64::from(code);
                squares += f64::from(x) * f64::from(x);
                errors += error * error;
            }
            let (norm, error) = (norm_above(squares), norm_above(errors));
            tokens.push(TokenBound { scale: scale[0], sum: sum[0], norm, error });
        }
        // Roundings of the exact dot product and of the bound's own arithmetic, relative to the
        // product of the norms: one for each of the additions a lane makes, and some to spare.
        let slack = (self.cols / math::LANES + 32) as f32 * f32::EPSILON;
        let (lower, upper) = (Parts::new(lower), Parts::new(upper));
        let tile_bytes = self.codes.len() / (self.bounds.len() / TILE_ROWS);
        pool.run(&|thread| {
            let mut sums = vec![0; n_tokens * TILE_ROWS];
            for tile in share(self.bounds.len() / TILE_ROWS, pool.threads(), thread) {
                let bytes = &self.codes[tile * tile_bytes..(tile + 1) * tile_bytes];
                kernels.byte_products(bytes, codes, stride, &mut sums);
                let first = tile * TILE_ROWS;
                let rows = first..self.rows.min(first + TILE_ROWS);
                for (t, (token, sums)) in
                    tokens.iter().zip(sums.chunks_exact(TILE_ROWS)).enumerate()
                {
                    let at = t * self.rows;
                    // SAFETY: tiles are shared out once each, so the rows are disjoint.
                    let (lower, upper) = unsafe {
                        let rows = at + rows.start..at + rows.end;
                        (lower.part(rows.clone()), upper.part(rows))
                    };
                    let bounds = &self.bounds[rows.clone()];
                    for (((lower, upper), sum), row) in
                        lower.iter_mut().zip(upper).zip(sums).zip(bounds)
                    {
                        let score = (sum - OFFSET * token.sum) as f32 * (row.scale * token.scale);
                        let size = (row.norm + row.error) * (token.norm + token.error);
                        let off = row.error * token.norm + row.norm * token.error + slack * size;
                        (*lower, *upper) = (score - off, score + off);
                    }
                }
            }
        });
    }
}

/// Rounds a row to 8 bits; writes four codes every `STEP_BYTES`.
fn round_row(row: &[f32], out: &mut [u8]) -> RowBound {
    let scale = math::max_abs(row).max(f32::MIN_POSITIVE) / 127.0;
    let inverse = 1.0 / scale;
    let (mut squares, mut errors) = (0.0f64, 0.0f64);
    for (step, weights) in row.chunks(BYTE_STEP_COLS).enumerate() {
        // Sums of four in f32 would do; the rows are summed in f64 so that no bound is too small.
        for (code, &weight) in out[step * STEP_BYTES..].iter_mut().zip(weights) {
            let rounded = math::round_even(weight * inverse).clamp(-127.0, 127.0);
            *code = (rounded as i32 + OFFSET) as u8;
            let value = f64::from(rounded) * f64::from(scale);
            let error = f64::from(weight) - value;
            squares += value * value;
            errors += error * error;
        }
    }
    RowBound { scale, norm: norm_above(squares), error: norm_above(errors) }
}

/// The rows whose upper bound reaches the `n_best`-th largest lower bound. A bound that is not a
/// number excludes nothing.
fn choose(lower: &[f32], upper: &[f32], n_best: usize, candidates: &mut Vec<u32>) {
    candidates.clear();
    let mut best = BinaryHeap::with_capacity(n_best + 1);
    let mut threshold = f32::NEG_INFINITY;
    for &bound in lower {
        if bound > threshold || best.len() < n_best {
            best.push(Reverse(Ordered(bound)));
            if best.len() > n_best {
                best.pop();
            }
            if best.len() == n_best {
                threshold = best.peek().map_or(f32::NEG_INFINITY, |Reverse(Ordered(x))| *x);
            }
        }
    }
    let excluded = |upper: f32| upper < threshold;
    let rows = upper.iter().enumerate().filter(|(_, upper)| !excluded(**upper));
    candidates.extend(rows.map(|(row, _)| row as u32));
}

/// A float in the total order of its bits.
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
    use crate::weights::{FloatRows, FloatType};
    use bytes::Bytes;

    struct Head {
        rows: usize,
        cols: usize,
        bytes: Bytes,
    }

    impl FloatRows for Head {
        fn rows(&self) -> usize {
            self.rows
        }

        fn cols(&self) -> usize {
            self.cols
        }

        fn decode_row(&self, _: usize, _: &mut [f32]) {
            unreachable!("the bytes are plain numbers");
        }

        fn raw(&self) -> Option<(FloatType, Bytes)> {
            Some((FloatType::F16, self.bytes.clone()))
        }
    }

    fn noise(seed: usize) -> impl Iterator<Item = f32> {
        (0..).map(move |i: usize| {
            let hash = (i + seed).wrapping_mul(0x9e37_79b9_7f4a_7c15);
            // A sum of uniform numbers is nearly normal, which has tails as real rows do.
            (0..4).map(|b| f32::from((hash >> (16 * b)) as u16) / 65_536.0 - 0.5).sum()
        })
    }

    #[test]
    fn the_best_logits_are_those_of_the_whole_head() {
        let (rows, cols) = (MIN_ROWS + 37, 130);
        let bytes = noise(1).take(rows * cols).flat_map(|x| half::f16::from_f32(x).to_le_bytes());
        let head = Head { rows, cols, bytes: bytes.collect() };
        let pool = ThreadPool::new(2).unwrap();
        let mut memory = WeightMemory::new();
        let matrix = FloatMatrix::new(&head, &pool, &mut memory).unwrap();
        let list = Shortlist::new(&matrix, &pool, &mut memory).unwrap().expect("large enough");
        let x: Vec<f32> = noise(9).take(3 * cols).collect();
        for kernels in Kernels::available() {
            let mut exact = vec![0.0; 3 * rows];
            matrix.project(&pool, kernels, &x, 3, &mut exact);
            for n_best in [1, 40] {
                let mut ours = vec![0.0; 3 * rows];
                let mut scratch = ShortlistScratch::default();
                list.logits(&matrix, &pool, kernels, &x, n_best, &mut scratch, &mut ours);
                for (ours, exact) in ours.chunks_exact(rows).zip(exact.chunks_exact(rows)) {
                    let mut order: Vec<usize> = (0..rows).collect();
                    order.sort_by(|&a, &b| exact[b].total_cmp(&exact[a]));
                    for &row in &order[..n_best] {
                        assert_eq!(ours[row].to_bits(), exact[row].to_bits());
                    }
                    let kept = ours.iter().filter(|x| x.is_finite()).count();
                    assert!(kept < rows / 4, "{kept} of {rows} rows for {n_best}");
                    assert!(ours.iter().zip(exact).all(|(a, b)| a == b || *a == f32::NEG_INFINITY));
                }
            }
        }
    }

    #[test]
    fn what_is_not_a_number_excludes_nothing() {
        let mut candidates = Vec::new();
        choose(&[f32::NAN; 5], &[f32::NAN; 5], 1, &mut candidates);
        assert_eq!(candidates.len(), 5);
        choose(&[1.0, 2.0, 3.0], &[1.5, 3.0, 4.0], 1, &mut candidates);
        assert_eq!(candidates, [1, 2]);
        choose(&[1.0, 2.0, 3.0], &[1.5, 3.0, 4.0], 9, &mut candidates);
        assert_eq!(candidates, [0, 1, 2]);
    }

    #[test]
    fn a_small_head_needs_no_copy() {
        let head = Head { rows: 4, cols: 2, bytes: Bytes::from(vec![0; 16]) };
        let pool = ThreadPool::new(1).unwrap();
        let mut memory = WeightMemory::new();
        let matrix = FloatMatrix::new(&head, &pool, &mut memory).unwrap();
        assert!(Shortlist::new(&matrix, &pool, &mut memory).unwrap().is_none());
    }
}

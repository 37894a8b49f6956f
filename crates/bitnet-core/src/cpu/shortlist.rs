//! The tokens that can have the largest logits, found without reading the whole head.
//!
//! An output head of 128,256 rows in f16 is more than half of all bytes a small ternary model reads
//! for a token. A copy in 8 bits scores every row; how far each score can be off is bounded by
//! Cauchy and Schwarz from the row's and the input's rounding errors. Rows whose upper bound reaches
//! the lower bound of the n-th best are then computed exactly, by the same kernel as always: the n
//! best logits and their order are exactly those of the full head. Where the bounds exclude too
//! little, all rows are computed.
//!
//! The input is rounded to 16 bits, as two 8-bit tokens (`256·high + low`): that costs arithmetic,
//! of which there is plenty while memory is read, and leaves the rows' rounding as the only error
//! that counts, so that few rows are left to be read a second time.

use super::math;
use crate::error::{Error, Result};
use crate::kernels::{
    BYTE_OFFSET, BYTE_STEP_COLS, ByteRow, FloatMatrix, Kernels, MAX_BYTE_COLS, STEP_BYTES, Storage,
    TILE_ROWS, TokenCodes, WeightMemory, norm_above,
};
use crate::threads::{Parts, ThreadPool, default_threads, share};
use crate::weights::{FloatRows, RoundedRows};
use std::cmp::Reverse;
use std::collections::BinaryHeap;

/// Fewest rows for which a second copy pays.
const MIN_ROWS: usize = 16_384;
/// An exact row costs twice an approximate one; beyond this share of rows, all are computed.
const MAX_SHARE: usize = 8;
/// Tiles of one call of a kernel: an even number, because kernels like pairs.
const BLOCK_TILES: usize = 4;
/// The largest magnitude of a 16-bit code whose high byte, rounded, still fits 8 bits with a sign.
const CODE_MAX: f32 = 32_639.0;

/// An 8-bit copy of an output head `(rows, cols)` with a bound on the error of each row.
pub(super) struct Shortlist {
    rows: usize,
    cols: usize,
    /// Tiles of 16 rows, `STEP_BYTES` for each four columns.
    codes: Storage,
    bounds: Vec<ByteRow>, // whole tiles
}

/// Buffers of a call, to be used again.
#[derive(Debug, Default)]
pub(super) struct ShortlistScratch {
    /// Two rows of codes for each token: high and low bytes.
    x: Vec<i8>,
    tokens: Vec<TokenBound>,
    /// Upper bounds of the logits, `(tokens, rows)`.
    upper: Vec<f32>,
    /// For each token the least logit that one of its `n_best` largest can have.
    thresholds: Vec<f32>,
    threads: Vec<Finder>,
    /// Rows to be computed exactly: token, row.
    candidates: Vec<(u32, u32)>,
}

/// What one thread finds; on cache lines of its own.
#[derive(Debug, Default)]
#[repr(align(128))]
struct Finder {
    sums: Vec<i32>,
    /// For each token the largest lower bounds among this thread's rows.
    best: Vec<Best>,
    candidates: Vec<(u32, u32)>,
}

impl ShortlistScratch {
    pub(super) fn memory_bytes(&self) -> u64 {
        let threads = self.threads.iter().map(|finder| {
            let best: usize = finder.best.iter().map(|best| best.heap.capacity()).sum();
            4 * (finder.sums.capacity() + best) + 8 * finder.candidates.capacity()
        });
        let floats = self.upper.capacity() + self.thresholds.capacity();
        let tokens = self.x.capacity() + self.tokens.capacity() * size_of::<TokenBound>();
        (threads.sum::<usize>() + 4 * floats + tokens + 8 * self.candidates.capacity()) as u64
    }
}

/// How an input was rounded.
#[derive(Debug, Clone, Copy, Default)]
struct TokenBound {
    /// What one unit of a 16-bit code is worth.
    scale: f32,
    /// Sums of the high and of the low bytes.
    sums: [i32; 2],
    /// At least the Euclidean norm of the input.
    norm: f32,
    /// At least the Euclidean norm of the difference to the rounded input.
    error: f32,
}

impl Shortlist {
    /// Takes the source's rounded copy of a head or makes one, or says that the head is too small
    /// (or too wide) for that to pay.
    ///
    /// # Errors
    /// [`Error::Shape`] or [`Error::Invalid`] for a copy that cannot be one of this head,
    /// [`Error::OutOfMemory`] if there is no room for a new one.
    pub(super) fn new(
        matrix: &FloatMatrix,
        rounded: Option<RoundedRows>,
        kernels: &Kernels,
        pool: &ThreadPool,
        memory: &mut WeightMemory,
    ) -> Result<Option<Self>> {
        let (rows, cols) = (matrix.rows(), matrix.cols());
        if rows < MIN_ROWS || cols > MAX_BYTE_COLS {
            return Ok(None);
        }
        let n_tiles = rows.div_ceil(TILE_ROWS);
        let tile_bytes = cols.div_ceil(BYTE_STEP_COLS) * STEP_BYTES;
        if let Some(RoundedRows { codes, bounds }) = rounded {
            if codes.len() != n_tiles * tile_bytes {
                return Err(Error::shape("rounded head", n_tiles * tile_bytes, codes.len()));
            }
            let bounds = read_bounds(&bounds, n_tiles * TILE_ROWS)?;
            return Ok(Some(Self { rows, cols, codes: Storage::Shared(codes), bounds }));
        }
        let mut codes = memory.take(n_tiles * tile_bytes)?;
        let mut bounds = vec![ByteRow::default(); n_tiles * TILE_ROWS];
        let (code_parts, bound_parts) = (Parts::new(&mut codes), Parts::new(&mut bounds));
        pool.run(&|thread| {
            let mut row = Vec::new();
            for tile in share(n_tiles, pool.threads(), thread) {
                let rows = tile * TILE_ROWS..(tile + 1) * TILE_ROWS;
                // SAFETY: tiles are shared out once each, so their bytes and bounds are disjoint.
                let (out, bounds) = unsafe {
                    let bytes = tile * tile_bytes..(tile + 1) * tile_bytes;
                    (code_parts.part(bytes), bound_parts.part(rows.clone()))
                };
                kernels.round_rows(&matrix.rows_at(rows), &mut row, out, bounds);
            }
        });
        Ok(Some(Self { rows, cols, codes: Storage::Own(codes), bounds }))
    }

    /// A copy that can be written to a file.
    fn to_rounded(&self) -> RoundedRows {
        let numbers = |row: &ByteRow| [row.scale, row.norm, row.error];
        let bounds = self.bounds.iter().flat_map(numbers).flat_map(f32::to_le_bytes);
        RoundedRows { codes: self.codes.to_vec().into(), bounds: bounds.collect() }
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
        let n_tokens = x.len() / self.cols;
        self.score(pool, kernels, x, n_best, scratch);
        self.choose(pool, n_best, scratch);
        let candidates = &mut scratch.candidates;
        out.fill(f32::NEG_INFINITY);
        for token in 0..n_tokens {
            let of_token = |&(t, _): &(u32, u32)| t as usize == token;
            if candidates.iter().filter(|c| of_token(c)).count() > self.rows / MAX_SHARE {
                candidates.retain(|c| !of_token(c));
                let x = &x[token * self.cols..][..self.cols];
                let out = &mut out[token * self.rows..][..self.rows];
                matrix.project(pool, kernels, x, 1, out);
            }
        }
        let parts = Parts::new(out);
        pool.run(&|thread| {
            let mut y = [0.0; TILE_ROWS];
            for &(token, row) in &candidates[share(candidates.len(), pool.threads(), thread)] {
                let (token, row) = (token as usize, row as usize);
                let x = &x[token * self.cols..][..self.cols];
                kernels.float_products(&matrix.rows_at(row..row + 1), x, 1, &mut y);
                let at = token * self.rows + row;
                // SAFETY: a row is a token's candidate once, and candidates are shared out once each.
                let out = unsafe { parts.part(at..at + 1) };
                out[0] = y[0];
            }
        });
    }

    /// Upper bounds on every row's logit for every token, and the largest lower bounds each thread
    /// has seen.
    fn score(
        &self,
        pool: &ThreadPool,
        kernels: &Kernels,
        x: &[f32],
        n_best: usize,
        scratch: &mut ShortlistScratch,
    ) {
        let ShortlistScratch { x: codes, tokens, upper, threads, .. } = scratch;
        let n_tokens = x.len() / self.cols;
        let stride = self.cols.next_multiple_of(STEP_BYTES);
        codes.resize(2 * n_tokens * stride, 0);
        upper.resize(n_tokens * self.rows, 0.0);
        tokens.clear();
        let inputs = x.chunks_exact(self.cols).zip(codes.chunks_exact_mut(2 * stride));
        tokens.extend(inputs.map(|(x, codes)| {
            let (high, low) = codes.split_at_mut(stride);
            round_token(x, high, low)
        }));
        let codes = TokenCodes { codes, stride, n_tokens: 2 * n_tokens };
        // Roundings of the exact dot product and of the bound's own arithmetic, relative to the
        // product of the norms: one for each of the additions a lane makes, and some to spare.
        let slack = (self.cols / math::LANES + 32) as f32 * f32::EPSILON;
        threads.resize_with(pool.threads().max(threads.len()), Finder::default);
        let (upper, finders) = (Parts::new(upper), Parts::new(threads));
        let n_tiles = self.bounds.len() / TILE_ROWS;
        let (steps, tile_bytes) = (self.cols.div_ceil(BYTE_STEP_COLS), self.codes.len() / n_tiles);
        pool.run(&|thread| {
            // SAFETY: each thread of the region takes its own element, once.
            let [own] = (unsafe { finders.part(thread..thread + 1) }) else { return };
            own.best.resize_with(n_tokens.max(own.best.len()), Best::default);
            own.best.iter_mut().for_each(Best::clear);
            let mine = share(n_tiles, pool.threads(), thread);
            for first in mine.clone().step_by(BLOCK_TILES) {
                let tiles = first..mine.end.min(first + BLOCK_TILES);
                let bytes = &self.codes[tiles.start * tile_bytes..tiles.end * tile_bytes];
                own.sums.resize(tiles.len() * codes.n_tokens * TILE_ROWS, 0);
                kernels.byte_products(bytes, steps, &codes, &mut own.sums);
                let sums = own.sums.as_chunks::<TILE_ROWS>().0.as_chunks::<2>().0;
                for (tile, sums) in tiles.zip(sums.chunks_exact(n_tokens)) {
                    let rows = tile * TILE_ROWS..self.rows.min((tile + 1) * TILE_ROWS);
                    let bounds = self.bounds.as_chunks::<TILE_ROWS>().0[tile];
                    for (t, ((token, sums), best)) in
                        tokens.iter().zip(sums).zip(&mut own.best).enumerate()
                    {
                        let (lower, above) = logit_bounds(token, &bounds, sums, slack);
                        // SAFETY: tiles are shared out once each, so the rows are disjoint.
                        let upper = unsafe {
                            let at = t * self.rows;
                            upper.part(at + rows.start..at + rows.end)
                        };
                        upper.copy_from_slice(&above[..rows.len()]);
                        best.look_at(&lower[..rows.len()], n_best);
                    }
                }
            }
        });
    }

    /// Lists the rows whose upper bound reaches the `n_best`-th largest lower bound. A bound that is
    /// not a number excludes nothing.
    fn choose(&self, pool: &ThreadPool, n_best: usize, scratch: &mut ShortlistScratch) {
        let ShortlistScratch { tokens, upper, thresholds, threads, candidates, .. } = scratch;
        let threads = &mut threads[..pool.threads()];
        thresholds.clear();
        thresholds.extend((0..tokens.len()).map(|token| {
            let mut all = Best::default();
            for finder in &*threads {
                finder.best[token].heap.iter().for_each(|bound| all.add(bound.0.0, n_best));
            }
            all.threshold(n_best)
        }));
        let finders = Parts::new(threads);
        pool.run(&|thread| {
            // SAFETY: each thread of the region takes its own element, once.
            let [own] = (unsafe { finders.part(thread..thread + 1) }) else { return };
            own.candidates.clear();
            for (token, &threshold) in thresholds.iter().enumerate() {
                let rows = share(self.rows, pool.threads(), thread);
                let upper = &upper[token * self.rows..][rows.clone()];
                let excluded = |upper: f32| upper < threshold;
                for (row, _) in rows.zip(upper).filter(|(_, upper)| !excluded(**upper)) {
                    own.candidates.push((token as u32, row as u32));
                }
            }
        });
        candidates.clear();
        candidates.extend(threads.iter().flat_map(|finder| &finder.candidates));
    }
}

/// What [`Shortlist::to_rounded`] wrote. Norms that are too small would hide rows; that none is
/// negative or no number is all that can be checked without reading the head.
fn read_bounds(bytes: &[u8], n_rows: usize) -> Result<Vec<ByteRow>> {
    let (rows, rest) = bytes.as_chunks::<12>();
    if rows.len() != n_rows || !rest.is_empty() {
        return Err(Error::shape("bounds of a rounded head", 12 * n_rows, bytes.len()));
    }
    let row = |bytes: &[u8; 12]| {
        let [scale, norm, error] = [0, 4, 8]
            .map(|at| f32::from_le_bytes([bytes[at], bytes[at + 1], bytes[at + 2], bytes[at + 3]]));
        let fits = [scale, norm, error].iter().all(|x| x.is_finite() && *x >= 0.0);
        let invalid = || Error::invalid("bounds of a rounded head", "a number below 0, or none");
        fits.then_some(ByteRow { scale, norm, error }).ok_or_else(invalid)
    };
    rows.iter().map(row).collect()
}

/// The rounded copy that an output head of these rows would make, for a file; `None` if it would
/// make none.
///
/// # Errors
/// As those of a table: no room, or bytes that are not the rows they should be.
pub fn round_rows(source: &dyn FloatRows) -> Result<Option<RoundedRows>> {
    let (kernels, pool) = (Kernels::detect()?, ThreadPool::new(default_threads())?);
    let mut memory = WeightMemory::new();
    let matrix = FloatMatrix::new(source, &pool, &mut memory)?;
    let list = Shortlist::new(&matrix, None, kernels, &pool, &mut memory)?;
    Ok(list.map(|list| list.to_rounded()))
}

/// Between which two numbers the logits of 16 rows lie, from the sums of their codes with the high
/// and the low bytes of a token.
#[inline(always)]
fn logit_bounds(
    token: &TokenBound,
    rows: &[ByteRow; TILE_ROWS],
    [high, low]: &[[i32; TILE_ROWS]; 2],
    slack: f32,
) -> ([f32; TILE_ROWS], [f32; TILE_ROWS]) {
    let (mut lower, mut upper) = ([0.0; TILE_ROWS], [0.0; TILE_ROWS]);
    for i in 0..TILE_ROWS {
        let high = (high[i] - BYTE_OFFSET * token.sums[0]) as f32 * 256.0;
        let sum = high + (low[i] - BYTE_OFFSET * token.sums[1]) as f32;
        let row = rows[i];
        let score = sum * (row.scale * token.scale);
        let size = (row.norm + row.error) * (token.norm + token.error);
        let off = row.error * token.norm + row.norm * token.error + slack * size;
        (lower[i], upper[i]) = (score - off, score + off);
    }
    (lower, upper)
}

/// Rounds an input to 16 bits, `x ≈ scale · (256 · high + low)`.
fn round_token(x: &[f32], high: &mut [i8], low: &mut [i8]) -> TokenBound {
    let scale = math::max_abs(x).max(1e-30) / CODE_MAX;
    let inverse = 1.0 / scale;
    high[x.len()..].fill(0);
    low[x.len()..].fill(0);
    let (mut sums, mut squares, mut errors) = ([0, 0], 0.0, 0.0);
    for ((&x, high), low) in x.iter().zip(high).zip(low) {
        // Within ±32,639 for numbers; what is none makes the bounds none either.
        let code = math::round_even_i32(x * inverse);
        *high = (code.wrapping_add(128) >> 8) as i8;
        *low = code as i8;
        sums[0] += i32::from(*high);
        sums[1] += i32::from(*low);
        let error = f64::from(x) - f64::from(scale) * f64::from(code);
        squares += f64::from(x) * f64::from(x);
        errors += error * error;
    }
    TokenBound { scale, sums, norm: norm_above(squares), error: norm_above(errors) }
}

/// The largest of many numbers.
#[derive(Debug, Default)]
struct Best {
    heap: BinaryHeap<Reverse<Ordered>>,
}

impl Best {
    fn clear(&mut self) {
        self.heap.clear();
    }

    /// The `n`-th largest number, or −∞ if there have been fewer.
    fn threshold(&self, n: usize) -> f32 {
        let least = self.heap.peek().filter(|_| self.heap.len() >= n);
        least.map_or(f32::NEG_INFINITY, |Reverse(Ordered(least))| *least)
    }

    #[inline(always)]
    fn look_at(&mut self, numbers: &[f32], n: usize) {
        let threshold = self.threshold(n);
        if self.heap.len() < n || numbers.iter().fold(false, |any, &x| any | (x > threshold)) {
            numbers.iter().for_each(|&number| self.add(number, n));
        }
    }

    fn add(&mut self, number: f32, n: usize) {
        if self.heap.len() < n {
            self.heap.push(Reverse(Ordered(number)));
        } else if let Some(mut least) = self.heap.peek_mut()
            && number > least.0.0
        {
            *least = Reverse(Ordered(number));
        }
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
    use crate::weights::FloatType;
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
        let any = Kernels::available()[0];
        let list =
            Shortlist::new(&matrix, None, any, &pool, &mut memory).unwrap().expect("large enough");
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
    fn inputs_of_any_size_are_within_their_bounds() {
        for size in [0.0, 1e-38, 1e-3, 1.0, 1e30] {
            let x: Vec<f32> = noise(3).take(100).map(|x| x * size).collect();
            let (mut high, mut low) = (vec![0; 128], vec![0; 128]);
            let bound = round_token(&x, &mut high, &mut low);
            let (mut squares, mut errors) = (0.0, 0.0);
            for (i, &x) in x.iter().enumerate() {
                let code = f64::from(256 * i32::from(high[i]) + i32::from(low[i]));
                let error = f64::from(x) - code * f64::from(bound.scale);
                squares += f64::from(x) * f64::from(x);
                errors += error * error;
            }
            assert!(f64::from(bound.norm) >= squares.sqrt(), "{size}");
            assert!(f64::from(bound.error) >= errors.sqrt(), "{size}");
            // A code's unit is the largest of 32,639; an error is half of one at most.
            assert!(bound.error <= 0.51 * 10.0 * bound.scale, "{size}: {}", bound.error);
            let sum = |codes: &[i8]| codes.iter().map(|&code| i32::from(code)).sum::<i32>();
            assert_eq!(bound.sums, [sum(&high), sum(&low)]);
        }
    }

    #[test]
    fn what_is_not_a_number_excludes_nothing() {
        let (rows, cols) = (MIN_ROWS, 16);
        let bytes = noise(1).take(rows * cols).flat_map(|x| half::f16::from_f32(x).to_le_bytes());
        let head = Head { rows, cols, bytes: bytes.collect() };
        let (pool, kernels) = (ThreadPool::new(2).unwrap(), Kernels::available()[0]);
        let mut memory = WeightMemory::new();
        let matrix = FloatMatrix::new(&head, &pool, &mut memory).unwrap();
        let list = Shortlist::new(&matrix, None, kernels, &pool, &mut memory).unwrap().unwrap();
        for broken in [f32::NAN, f32::INFINITY, f32::NEG_INFINITY] {
            let mut x: Vec<f32> = noise(2).take(2 * cols).collect();
            x[cols + 3] = broken;
            let (mut ours, mut exact) = (vec![0.0; 2 * rows], vec![0.0; 2 * rows]);
            matrix.project(&pool, kernels, &x, 2, &mut exact);
            let mut scratch = ShortlistScratch::default();
            list.logits(&matrix, &pool, kernels, &x, 1, &mut scratch, &mut ours);
            assert!(ours[..rows].contains(&f32::NEG_INFINITY), "the whole token is not disturbed");
            for (ours, exact) in ours[rows..].iter().zip(&exact[rows..]) {
                assert!(ours.to_bits() == exact.to_bits() || ours.is_nan() && exact.is_nan());
            }
        }
    }

    #[test]
    fn a_written_copy_finds_the_same_rows() {
        let (rows, cols) = (MIN_ROWS + 5, 34);
        let bytes = noise(1).take(rows * cols).flat_map(|x| half::f16::from_f32(x).to_le_bytes());
        let head = Head { rows, cols, bytes: bytes.collect() };
        let (pool, kernels) = (ThreadPool::new(1).unwrap(), Kernels::available()[0]);
        let mut memory = WeightMemory::new();
        let matrix = FloatMatrix::new(&head, &pool, &mut memory).unwrap();
        let written = round_rows(&head).unwrap().expect("large enough");
        let mut new = |rounded| Shortlist::new(&matrix, rounded, kernels, &pool, &mut memory);
        let (made, read) =
            (new(None).unwrap().unwrap(), new(Some(written.clone())).unwrap().unwrap());
        assert!(made.codes[..] == read.codes[..] && made.bounds == read.bounds);
        let cut = RoundedRows { codes: written.codes.slice(64..), ..written.clone() };
        assert!(matches!(new(Some(cut)), Err(Error::Shape { .. })));
        let cut = RoundedRows { bounds: written.bounds.slice(12..), ..written.clone() };
        assert!(matches!(new(Some(cut)), Err(Error::Shape { .. })));
        let mut broken = written.bounds.to_vec();
        broken[..4].copy_from_slice(&f32::NAN.to_le_bytes());
        let broken = RoundedRows { bounds: broken.into(), ..written };
        assert!(matches!(new(Some(broken)), Err(Error::Invalid { .. })));
    }

    #[test]
    fn a_small_head_needs_no_copy() {
        let head = Head { rows: 4, cols: 2, bytes: Bytes::from(vec![0; 16]) };
        let pool = ThreadPool::new(1).unwrap();
        let mut memory = WeightMemory::new();
        let matrix = FloatMatrix::new(&head, &pool, &mut memory).unwrap();
        let any = Kernels::available()[0];
        assert!(Shortlist::new(&matrix, None, any, &pool, &mut memory).unwrap().is_none());
    }
}

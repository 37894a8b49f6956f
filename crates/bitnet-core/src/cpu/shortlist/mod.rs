//! The tokens that can have the largest logits, found without reading the whole head.
//!
//! An output head of 128,256 rows in f16 is more than half of all bytes a small ternary model reads
//! for a token. A copy in 8 bits scores every row; how far each score can be off is bounded by
//! Cauchy and Schwarz from the row's and the input's rounding errors. Rows whose upper bound reaches
//! the lower bound of the n-th best are then computed exactly, by the same kernel as always: the n
//! best logits and their order are exactly those of the full head. Where the bounds exclude too
//! little, all rows are computed.
//!
//! The input is rounded to 16 bits, as two 8-bit tokens (`256·high + low`), which leaves the rows'
//! rounding as the only error that counts. For few inputs both are multiplied with every row: that
//! is arithmetic, of which there is plenty while memory is read. Many inputs are short of it: their
//! low bytes are multiplied only with tiles of rows that the high bytes alone do not exclude.
//!
//! Where a row's largest logits are wanted after adding [noise](crate::noise), as a draw does, it is
//! added to the bounds: rounding is monotonic, so a sum of a bound bounds the sum.

mod bounds;
#[cfg(test)]
mod tests;

use super::math;
use crate::error::{Error, Result};
use crate::kernels::{
    BYTE_STEP_COLS, ByteRow, FloatMatrix, Kernels, MAX_BYTE_COLS, STEP_BYTES, Storage, TILE_ROWS,
    TokenCodes, WeightMemory,
};
use crate::noise::Noise;
use crate::threads::{Parts, ThreadPool, default_threads, share};
use crate::weights::{FloatRows, RoundedRows};
use bounds::{Best, Floor, TokenBound, logit_bounds, may_reach, round_token};
use std::ops::Range;

/// Fewest rows for which a second copy pays.
const MIN_ROWS: usize = 16_384;
/// An exact row costs twice an approximate one; beyond this share of rows, all are computed.
const MAX_SHARE: usize = 8;
/// Tiles of one call of a kernel.
const BLOCK_TILES: usize = 4;
/// Fewest tokens whose low bytes wait for what the high bytes say.
const SIFTED_TOKENS: usize = 4;

/// An 8-bit copy of an output head `(rows, cols)` with a bound on the error of each row.
pub(super) struct Shortlist {
    rows: usize,
    cols: usize,
    /// Tiles of 16 rows, `STEP_BYTES` for each four columns.
    codes: Storage,
    bounds: Vec<ByteRow>, // whole tiles
}

/// Inputs of the head.
#[derive(Clone, Copy)]
pub(super) struct Rows<'a> {
    /// `(tokens, cols)`
    pub(super) x: &'a [f32],
    /// What is added to the logits of each token before the largest are chosen; empty for nothing.
    pub(super) noise: &'a [Noise],
}

/// Buffers of a call, to be used again.
#[derive(Debug, Default)]
pub(super) struct ShortlistScratch {
    /// Codes of all tokens: high bytes, then low bytes.
    x: Vec<i8>,
    tokens: Vec<TokenBound>,
    /// For each token, what its `n_best`-th largest logit with noise is known to reach.
    floors: Vec<Floor>,
    threads: Vec<Finder>,
    /// Rows to be computed exactly: token, row.
    candidates: Vec<(u32, u32)>,
}

/// What one thread finds; on cache lines of its own.
#[derive(Debug, Default)]
#[repr(align(128))]
struct Finder {
    sums: Vec<i32>,
    /// Tokens for which the high bytes do not exclude a tile, their low bytes and the sums of these.
    doubtful: Vec<usize>,
    low: Vec<i8>,
    low_sums: Vec<i32>,
    /// Noise of each token at the rows of a few tiles.
    noise: Vec<f32>,
    /// For each token the largest lower bounds among this thread's rows.
    best: Vec<Best>,
    /// Rows that no floor excluded when they were seen.
    candidates: Vec<Candidate>,
}

#[derive(Debug, Clone, Copy)]
struct Candidate {
    token: u32,
    row: u32,
    /// Its logit with noise is at most this.
    upper: f32,
}

impl ShortlistScratch {
    pub(super) fn memory_bytes(&self) -> u64 {
        let threads = self.threads.iter().map(|finder| {
            let best: usize = finder.best.iter().map(Best::capacity).sum();
            let sums = finder.sums.capacity() + finder.low_sums.capacity();
            let candidates = finder.candidates.capacity() * size_of::<Candidate>();
            4 * (sums + best + finder.noise.capacity())
                + 8 * finder.doubtful.capacity()
                + finder.low.capacity()
                + candidates
        });
        let tokens = self.tokens.capacity() * size_of::<TokenBound>() + 4 * self.floors.capacity();
        let own = self.x.capacity() + tokens + 8 * self.candidates.capacity();
        (threads.sum::<usize>() + own) as u64
    }
}

/// What a region scores.
struct Inputs<'a> {
    /// `(2, tokens, stride)`
    codes: &'a [i8],
    stride: usize,
    tokens: &'a [TokenBound],
    floors: &'a [Floor],
    n_best: usize,
    /// See [`error_bound`](bounds).
    slack: f32,
}

impl<'a> Inputs<'a> {
    /// The high bytes, or both, as tokens of a product.
    fn codes(&self, parts: usize) -> TokenCodes<'a> {
        let n_tokens = parts * self.tokens.len();
        TokenCodes { codes: &self.codes[..n_tokens * self.stride], stride: self.stride, n_tokens }
    }

    fn low(&self, token: usize) -> &'a [i8] {
        &self.codes[(self.tokens.len() + token) * self.stride..][..self.stride]
    }
}

/// Some rows of the copy, sixteen to a tile.
struct Tiles<'a> {
    /// Without padding.
    rows: Range<usize>,
    steps: usize,
    codes: &'a [u8],
    bounds: &'a [[ByteRow; TILE_ROWS]],
}

/// One of them.
struct Tile<'a> {
    /// Its place among those looked at together.
    index: usize,
    rows: Range<usize>,
    steps: usize,
    codes: &'a [u8],
    bounds: &'a [ByteRow; TILE_ROWS],
}

impl<'a> Tiles<'a> {
    fn iter(&self) -> impl Iterator<Item = Tile<'a>> {
        let Self { steps, codes, bounds, .. } = *self;
        let Range { start, end } = self.rows;
        let codes = codes.chunks_exact(steps * STEP_BYTES);
        codes.zip(bounds).enumerate().map(move |(index, (codes, bounds))| {
            let first = start + index * TILE_ROWS;
            Tile { index, rows: first..end.min(first + TILE_ROWS), steps, codes, bounds }
        })
    }
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

    /// Exact logits of those that are the `n_best` largest of each token after noise, at least; −∞ for
    /// rows that cannot be among them. `out` `(tokens, rows)`.
    pub(super) fn logits(
        &self,
        matrix: &FloatMatrix,
        pool: &ThreadPool,
        kernels: &Kernels,
        rows: Rows<'_>,
        n_best: usize,
        scratch: &mut ShortlistScratch,
        out: &mut [f32],
    ) {
        let x = rows.x;
        self.score(pool, kernels, rows, n_best, scratch);
        choose(pool.threads(), n_best, scratch);
        let parts = Parts::new(out);
        pool.run(&|thread| {
            // SAFETY: the output is shared out once.
            unsafe { parts.part(share(x.len() / self.cols * self.rows, pool.threads(), thread)) }
                .fill(f32::NEG_INFINITY);
        });
        let candidates = &mut scratch.candidates;
        let mut counts = vec![0; scratch.tokens.len()];
        candidates.iter().for_each(|&(token, _)| counts[token as usize] += 1);
        let too_many = |token: usize| counts[token] > self.rows / MAX_SHARE;
        candidates.retain(|&(token, _)| !too_many(token as usize));
        for token in (0..counts.len()).filter(|&token| too_many(token)) {
            let x = &x[token * self.cols..][..self.cols];
            let out = &mut out[token * self.rows..][..self.rows];
            matrix.project(pool, kernels, x, 1, out);
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

    /// Finds each thread's candidates and the largest lower bounds among its rows.
    fn score(
        &self,
        pool: &ThreadPool,
        kernels: &Kernels,
        Rows { x, noise }: Rows<'_>,
        n_best: usize,
        scratch: &mut ShortlistScratch,
    ) {
        let ShortlistScratch { x: codes, tokens, floors, threads, .. } = scratch;
        let n_tokens = x.len() / self.cols;
        let stride = self.cols.next_multiple_of(STEP_BYTES);
        codes.resize(2 * n_tokens * stride, 0);
        let (high, low) = codes.split_at_mut(n_tokens * stride);
        let codes_of = high.chunks_exact_mut(stride).zip(low.chunks_exact_mut(stride));
        tokens.clear();
        tokens.extend(
            x.chunks_exact(self.cols)
                .zip(codes_of)
                .map(|(x, (high, low))| round_token(x, high, low)),
        );
        for (token, &noise) in tokens.iter_mut().zip(noise) {
            token.noise = noise;
        }
        floors.clear();
        floors.resize_with(n_tokens, Floor::default);
        // Roundings of the exact dot product and of the bound's own arithmetic, relative to the
        // product of the norms: one for each of the additions a lane makes, and some to spare.
        let slack = (self.cols / math::LANES + 32) as f32 * f32::EPSILON;
        let inputs = Inputs { codes, stride, tokens, floors, n_best, slack };
        threads.resize_with(pool.threads().max(threads.len()), Finder::default);
        let finders = Parts::new(threads);
        pool.run(&|thread| {
            // SAFETY: each thread of the region takes its own element, once.
            let [own] = (unsafe { finders.part(thread..thread + 1) }) else { return };
            own.best.resize_with(n_tokens.max(own.best.len()), Best::default);
            own.best.iter_mut().for_each(Best::clear);
            own.candidates.clear();
            let mine = share(self.bounds.len() / TILE_ROWS, pool.threads(), thread);
            for first in mine.clone().step_by(BLOCK_TILES) {
                own.look_at(
                    kernels,
                    &inputs,
                    &self.tiles(first..mine.end.min(first + BLOCK_TILES)),
                );
            }
        });
    }

    /// Some of the tiles that follow each other.
    fn tiles(&self, range: Range<usize>) -> Tiles<'_> {
        let steps = self.cols.div_ceil(BYTE_STEP_COLS);
        let bytes = steps * STEP_BYTES;
        let rows = range.start * TILE_ROWS..self.rows.min(range.end * TILE_ROWS);
        Tiles {
            rows,
            steps,
            codes: &self.codes[range.start * bytes..range.end * bytes],
            bounds: &self.bounds.as_chunks::<TILE_ROWS>().0[range],
        }
    }
}

impl Finder {
    /// Multiplies a few tiles with the inputs and keeps the rows that can be among the best.
    fn look_at(&mut self, kernels: &Kernels, inputs: &Inputs<'_>, tiles: &Tiles<'_>) {
        let n_tokens = inputs.tokens.len();
        let sifted = n_tokens >= SIFTED_TOKENS;
        let codes = inputs.codes(if sifted { 1 } else { 2 });
        let mut sums = std::mem::take(&mut self.sums);
        sums.resize(tiles.bounds.len() * codes.n_tokens * TILE_ROWS, 0);
        kernels.byte_products(tiles.codes, tiles.steps, &codes, &mut sums);
        self.noise.resize(n_tokens * BLOCK_TILES * TILE_ROWS, 0.0);
        let (of_tokens, _) = self.noise.as_chunks_mut::<{ BLOCK_TILES * TILE_ROWS }>();
        for (token, out) in inputs.tokens.iter().zip(of_tokens) {
            kernels.noise(&token.noise, tiles.rows.start as u32, out);
        }
        let of_tiles = sums.as_chunks::<TILE_ROWS>().0.chunks_exact(codes.n_tokens);
        for (tile, sums) in tiles.iter().zip(of_tiles) {
            if sifted {
                self.sift(kernels, inputs, &tile, sums);
            } else {
                let (high, low) = sums.split_at(n_tokens);
                for (token, (high, low)) in high.iter().zip(low).enumerate() {
                    self.keep(inputs, &tile, token, high, low);
                }
            }
        }
        self.sums = sums;
    }

    /// Multiplies the low bytes of the tokens for which the high bytes do not exclude all rows.
    fn sift(
        &mut self,
        kernels: &Kernels,
        inputs: &Inputs<'_>,
        tile: &Tile<'_>,
        high: &[[i32; TILE_ROWS]],
    ) {
        self.doubtful.clear();
        self.low.clear();
        for (t, ((token, floor), high)) in
            inputs.tokens.iter().zip(inputs.floors).zip(high).enumerate()
        {
            let noise = noise_of(&self.noise, t, tile);
            if may_reach(floor.get(), token, tile.bounds, high, noise, inputs.slack) {
                self.doubtful.push(t);
                self.low.extend_from_slice(inputs.low(t));
            }
        }
        let n_tokens = self.doubtful.len();
        if n_tokens == 0 {
            return;
        }
        let codes = TokenCodes { codes: &self.low, stride: inputs.stride, n_tokens };
        let mut low = std::mem::take(&mut self.low_sums);
        low.resize(n_tokens * TILE_ROWS, 0);
        kernels.byte_products(tile.codes, tile.steps, &codes, &mut low);
        for (i, low) in low.as_chunks::<TILE_ROWS>().0.iter().enumerate() {
            let token = self.doubtful[i];
            self.keep(inputs, tile, token, &high[token], low);
        }
        self.low_sums = low;
    }

    /// Keeps the rows of a tile that no floor excludes. A bound that is not a number excludes nothing.
    fn keep(
        &mut self,
        inputs: &Inputs<'_>,
        tile: &Tile<'_>,
        token: usize,
        high: &[i32; TILE_ROWS],
        low: &[i32; TILE_ROWS],
    ) {
        let bound = &inputs.tokens[token];
        let noise = noise_of(&self.noise, token, tile);
        let (lower, upper) = logit_bounds(bound, tile.bounds, high, low, noise, inputs.slack);
        self.best[token].look_at(&lower[..tile.rows.len()], inputs.n_best);
        let floor = &inputs.floors[token];
        floor.raise(self.best[token].threshold(inputs.n_best));
        let floor = floor.get();
        for (row, upper) in tile.rows.clone().zip(upper) {
            let excluded = upper < floor;
            if !excluded {
                let (token, row) = (token as u32, row as u32);
                self.candidates.push(Candidate { token, row, upper });
            }
        }
    }
}

/// The noise of a token at the rows of one tile of those looked at together.
#[inline(always)]
fn noise_of<'a>(noise: &'a [f32], token: usize, tile: &Tile<'_>) -> &'a [f32; TILE_ROWS] {
    &noise.as_chunks().0[token * BLOCK_TILES + tile.index]
}

/// Lists the rows whose upper bound reaches the `n_best`-th largest lower bound that all threads have
/// seen together.
fn choose(n_threads: usize, n_best: usize, scratch: &mut ShortlistScratch) {
    let ShortlistScratch { tokens, floors, threads, candidates, .. } = scratch;
    let threads = &threads[..n_threads];
    candidates.clear();
    for (token, floor) in floors[..tokens.len()].iter().enumerate() {
        let mut all = Best::default();
        let numbers = threads.iter().flat_map(|finder| finder.best[token].numbers());
        numbers.for_each(|bound| all.add(bound, n_best));
        floor.raise(all.threshold(n_best));
    }
    let found = threads.iter().flat_map(|finder| &finder.candidates);
    let excluded = |found: &&Candidate| found.upper < floors[found.token as usize].get();
    candidates.extend(found.filter(|found| !excluded(found)).map(|found| (found.token, found.row)));
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

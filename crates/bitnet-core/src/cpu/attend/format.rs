//! The number formats of cached keys and values: how a tile is written and multiplied.

use super::simd::{Quad, Simd, WEIGHT_MAX, f32_to_half};
use super::{SPAN, Scratch};
use crate::cpu::kv::TILE_TOKENS;
use crate::cpu::math::{self, LANES, Lanes};
use std::ops::Range;

/// The tiles of a span, as offsets into the cache.
pub(super) struct SpanTiles<'a> {
    pub(super) cache: &'a [u8],
    pub(super) dim: usize,
    pub(super) keys: &'a [usize],
    pub(super) values: &'a [usize],
}

/// A number format.
pub(super) trait Format {
    fn tile_bytes(dim: usize) -> usize;
    fn store_key(tile: &mut [u8], token: usize, key: &[f32]);
    fn store_value(tile: &mut [u8], token: usize, value: &[f32]);

    /// Brings `scratch.queries` to the form `scores` reads.
    fn prepare<S: Simd>(simd: S, scratch: &mut Scratch, dim: usize);
    /// Scores of the queries in `queries` with every key of the span's tiles.
    fn scores<S: Simd>(
        simd: S,
        tiles: &SpanTiles<'_>,
        queries: Range<usize>,
        scratch: &mut Scratch,
    );
    /// Adds up the values of the span into `scratch.span.values`, weighted with `scratch.scores`;
    /// query `m` sees the first `visible(m)`, at least one.
    fn values<S: Simd>(
        simd: S,
        tiles: &SpanTiles<'_>,
        queries: Range<usize>,
        visible: impl Fn(usize) -> usize,
        scratch: &mut Scratch,
    );
}

/// Calls `$f::<_, …, M>` for groups of `M` = 8 (where registers allow), 4, 2 and 1 of the queries.
macro_rules! in_groups {
    ($queries:expr, $wide:expr, |$first:ident, $M:ident| $body:expr) => {{
        let std::ops::Range { start: mut $first, end } = $queries;
        while $first < end {
            match end - $first {
                8.. if $wide => {
                    const $M: usize = 8;
                    $body;
                    $first += 8;
                }
                4.. => {
                    const $M: usize = 4;
                    $body;
                    $first += 4;
                }
                2.. => {
                    const $M: usize = 2;
                    $body;
                    $first += 2;
                }
                _ => {
                    const $M: usize = 1;
                    $body;
                    $first += 1;
                }
            }
        }
    }};
}

/// A float format: one number after the other.
pub(super) trait Number {
    const SIZE: usize;
    /// 16 little-endian numbers.
    fn load<S: Simd>(simd: S, bytes: &[u8]) -> S::Floats;
    /// Writes `x`, rounded, as `SIZE` little-endian bytes.
    fn store(x: f32, bytes: &mut [u8]);
}

/// Exact numbers.
pub(super) struct F32;

impl Number for F32 {
    const SIZE: usize = 4;

    #[inline(always)]
    fn load<S: Simd>(simd: S, bytes: &[u8]) -> S::Floats {
        let (numbers, _) = bytes.as_chunks::<4>();
        simd.load(&std::array::from_fn(|i| f32::from_le_bytes(numbers[i])))
    }

    #[inline(always)]
    fn store(x: f32, bytes: &mut [u8]) {
        bytes.copy_from_slice(&x.to_le_bytes());
    }
}

/// Halves.
pub(super) struct F16;

impl Number for F16 {
    const SIZE: usize = 2;

    #[inline(always)]
    fn load<S: Simd>(simd: S, bytes: &[u8]) -> S::Floats {
        match bytes.first_chunk() {
            Some(halves) => simd.load_f16(halves),
            None => simd.splat(0.0), // Never: callers pass 16 numbers.
        }
    }

    #[inline(always)]
    fn store(x: f32, bytes: &mut [u8]) {
        bytes.copy_from_slice(&f32_to_half(x).to_le_bytes());
    }
}

impl<N: Number> Format for N {
    fn tile_bytes(dim: usize) -> usize {
        dim * TILE_TOKENS * N::SIZE
    }

    fn store_key(tile: &mut [u8], token: usize, key: &[f32]) {
        for (row, &x) in tile.chunks_exact_mut(TILE_TOKENS * N::SIZE).zip(key) {
            N::store(x, &mut row[token * N::SIZE..][..N::SIZE]);
        }
    }

    fn store_value(tile: &mut [u8], token: usize, value: &[f32]) {
        let row = &mut tile[token * value.len() * N::SIZE..][..value.len() * N::SIZE];
        for (bytes, &x) in row.chunks_exact_mut(N::SIZE).zip(value) {
            N::store(x, bytes);
        }
    }

    #[inline(always)]
    fn prepare<S: Simd>(_: S, _: &mut Scratch, _: usize) {}

    #[inline(always)]
    fn scores<S: Simd>(
        simd: S,
        tiles: &SpanTiles<'_>,
        queries: Range<usize>,
        scratch: &mut Scratch,
    ) {
        let dim = tiles.dim;
        for (tile, &start) in tiles.keys.iter().enumerate() {
            let keys = &tiles.cache[start..][..N::tile_bytes(dim)];
            in_groups!(queries.clone(), S::WIDE, |first, M| float_scores::<S, N, M>(
                simd,
                keys,
                &scratch.queries[first * dim..][..M * dim],
                &mut scratch.scores[first * SPAN + tile * TILE_TOKENS..],
            ));
        }
    }

    #[inline(always)]
    fn values<S: Simd>(
        simd: S,
        tiles: &SpanTiles<'_>,
        queries: Range<usize>,
        visible: impl Fn(usize) -> usize,
        scratch: &mut Scratch,
    ) {
        let dim = tiles.dim;
        let Scratch { scores, span, .. } = scratch;
        span.values[queries.start * dim..queries.end * dim].fill(0.0);
        for column in (0..dim).step_by(LANES) {
            in_groups!(queries.clone(), S::WIDE, |first, M| {
                // What the first query of a group sees, all of them see. Beyond that, what lies in
                // the cache may be a stranger's and not even a number, so it is not touched.
                let shared = visible(first);
                let (weights, out) = (&scores[first * SPAN..], &mut span.values[first * dim..]);
                float_values::<S, N, M>(simd, tiles, column, 0..shared, weights, out);
                for (i, m) in (first..first + M).enumerate().skip(1) {
                    let own = shared..visible(m);
                    let (weights, out) = (&weights[i * SPAN..], &mut out[i * dim..]);
                    float_values::<S, N, 1>(simd, tiles, column, own, weights, out);
                }
            });
        }
    }
}

/// Scores of `M` queries with the 16 keys of a tile, summed feature by feature; those of query `i`
/// go to `scores[i · SPAN..]`.
#[inline(always)]
fn float_scores<S: Simd, N: Number, const M: usize>(
    simd: S,
    keys: &[u8],
    queries: &[f32],
    scores: &mut [f32],
) {
    let dim = queries.len() / M;
    let queries: [&[f32]; M] = std::array::from_fn(|i| &queries[i * dim..][..dim]);
    let mut sums = [simd.splat(0.0); M];
    for (d, key) in keys.chunks_exact(LANES * N::SIZE).enumerate().take(dim) {
        let key = N::load(simd, key);
        for i in 0..M {
            sums[i] = simd.add_product(sums[i], simd.splat(queries[i][d]), key);
        }
    }
    for (i, &sum) in sums.iter().enumerate() {
        if let Some(out) = scores[i * SPAN..].first_chunk_mut() {
            simd.store(sum, out);
        }
    }
}

/// Adds the values at positions `tokens` of the span, features `column..column + 16`, for `M`
/// queries: weights at `weights[i · SPAN..]`, sums at `out[i · dim..]`.
#[inline(always)]
fn float_values<S: Simd, N: Number, const M: usize>(
    simd: S,
    tiles: &SpanTiles<'_>,
    column: usize,
    tokens: Range<usize>,
    weights: &[f32],
    out: &mut [f32],
) {
    if tokens.is_empty() {
        return;
    }
    let dim = tiles.dim;
    let mut sums = [simd.splat(0.0); M];
    for (i, sum) in sums.iter_mut().enumerate() {
        if let Some(out) = out[i * dim + column..].first_chunk() {
            *sum = simd.load(out);
        }
    }
    for tile in tokens.start / TILE_TOKENS..tokens.end.div_ceil(TILE_TOKENS) {
        let first = tile * TILE_TOKENS;
        let inside = tokens.start.max(first) - first..tokens.end.min(first + TILE_TOKENS) - first;
        let values = &tiles.cache[tiles.values[tile]..][..N::tile_bytes(dim)];
        let weights: [&[f32]; M] = std::array::from_fn(|i| &weights[i * SPAN + first..][..16]);
        for t in inside {
            let value = N::load(simd, &values[(t * dim + column) * N::SIZE..][..LANES * N::SIZE]);
            for i in 0..M {
                sums[i] = simd.add_product(sums[i], simd.splat(weights[i][t]), value);
            }
        }
    }
    for (i, &sum) in sums.iter().enumerate() {
        if let Some(out) = out[i * dim + column..].first_chunk_mut() {
            simd.store(sum, out);
        }
    }
}

/// Bytes with a scale for each token of a tile: `x = scale · (byte − 128)`, `|byte − 128| ≤ 127`.
pub(super) struct Q8;

/// The zero of [`Q8`]. Stored unsigned, because that is what the multiplication of AVX-512 takes
/// on the cache's side.
const ZERO: i32 = 128;
/// Magnitudes below this count as 0, so that no factor overflows.
const TINY: f32 = 1e-30;
/// Terms of an integer sum in a quad.
const QUAD: usize = 4;

impl Q8 {
    /// Quantizes `x` to its largest magnitude; `write(i, byte)` for each element. Returns the
    /// scale: NaN where `x` holds a NaN or an infinity, so that it cannot pass unseen.
    fn quantize(x: &[f32], mut write: impl FnMut(usize, u8)) -> f32 {
        let largest = math::max_abs(x);
        if !math::sum(x).is_finite() && !x.iter().all(|x| x.is_finite()) {
            (0..x.len()).for_each(|i| write(i, ZERO as u8));
            return f32::NAN;
        }
        let factor = if largest > TINY { 127.0 / largest } else { 0.0 };
        for (i, &x) in x.iter().enumerate() {
            let rounded = math::round_even_i32(x * factor).clamp(-127, 127);
            write(i, (rounded + ZERO) as u8);
        }
        largest / 127.0
    }

    fn store_scale(tile: &mut [u8], dim: usize, token: usize, scale: f32) {
        tile[dim * TILE_TOKENS + token * 4..][..4].copy_from_slice(&scale.to_le_bytes());
    }

    /// The 16 scales of a tile.
    #[inline(always)]
    fn scales(tiles: &SpanTiles<'_>, start: usize) -> Lanes {
        let bytes = &tiles.cache[start + tiles.dim * TILE_TOKENS..][..4 * TILE_TOKENS];
        let (scales, _) = bytes.as_chunks::<4>();
        std::array::from_fn(|i| f32::from_le_bytes(scales[i]))
    }
}

/// Rounds 16 numbers times `factor` to integers; returns their sum.
#[inline(always)]
fn round_and_sum(x: &Lanes, factor: f32, out: &mut [i32; LANES]) -> i32 {
    let mut sum = 0i32;
    for i in 0..LANES {
        out[i] = math::round_even_i32(x[i] * factor);
        sum = sum.wrapping_add(out[i]);
    }
    sum
}

impl Format for Q8 {
    fn tile_bytes(dim: usize) -> usize {
        dim * TILE_TOKENS + TILE_TOKENS * size_of::<f32>()
    }

    fn store_key(tile: &mut [u8], token: usize, key: &[f32]) {
        let scale = Self::quantize(key, |d, byte| {
            tile[d / QUAD * QUAD * TILE_TOKENS + token * QUAD + d % QUAD] = byte;
        });
        Self::store_scale(tile, key.len(), token, scale);
    }

    fn store_value(tile: &mut [u8], token: usize, value: &[f32]) {
        let start = token / QUAD * QUAD * value.len() + token % QUAD;
        let scale = Self::quantize(value, |d, byte| tile[start + d * QUAD] = byte);
        Self::store_scale(tile, value.len(), token, scale);
    }

    #[inline(always)]
    fn prepare<S: Simd>(simd: S, scratch: &mut Scratch, dim: usize) {
        let Scratch { queries, query_codes, query_factor, query_sum, .. } = scratch;
        let codes = query_codes.chunks_exact_mut(dim / QUAD);
        let stats = query_factor.iter_mut().zip(query_sum);
        for ((query, codes), (out_factor, sum)) in queries.chunks_exact(dim).zip(codes).zip(stats) {
            let largest = math::max_abs(query);
            let factor = if largest > TINY { WEIGHT_MAX / largest } else { 0.0 };
            *sum = 0;
            let (chunks, _) = query.as_chunks::<LANES>();
            let (codes, _) = codes.as_chunks_mut::<4>();
            for (x, codes) in chunks.iter().zip(codes) {
                let mut rounded = [0; LANES];
                *sum = sum.wrapping_add(round_and_sum(x, factor, &mut rounded));
                *codes = simd.encode(&rounded);
            }
            // NaN and infinities make nonsense of the codes, so they make a NaN of the factor.
            let total = math::sum(query);
            *out_factor = largest / WEIGHT_MAX + 0.0 * total;
        }
    }

    #[inline(always)]
    fn scores<S: Simd>(
        simd: S,
        tiles: &SpanTiles<'_>,
        queries: Range<usize>,
        scratch: &mut Scratch,
    ) {
        let n_quads = tiles.dim / QUAD;
        let Scratch { query_codes, query_factor, query_sum, scores, .. } = scratch;
        for (tile, &start) in tiles.keys.iter().enumerate() {
            let keys = &tiles.cache[start..][..tiles.dim * TILE_TOKENS];
            let scales = Self::scales(tiles, start);
            in_groups!(queries.clone(), false, |first, M| {
                let codes: [&[Quad]; M] =
                    std::array::from_fn(|i| &query_codes[(first + i) * n_quads..][..n_quads]);
                let mut sums = [simd.no_sums(); M];
                for (k, bytes) in keys.as_chunks::<64>().0.iter().enumerate().take(n_quads) {
                    let bytes = simd.load_bytes(bytes);
                    for i in 0..M {
                        sums[i] = simd.add_quad(sums[i], bytes, &codes[i][k]);
                    }
                }
                for (i, &sums) in sums.iter().enumerate() {
                    let m = first + i;
                    let bias = ZERO.wrapping_mul(query_sum[m]);
                    let sums = simd.finish(sums);
                    let out = &mut scores[m * SPAN + tile * TILE_TOKENS..][..TILE_TOKENS];
                    for lane in 0..LANES {
                        let sum = sums[lane].wrapping_sub(bias) as f32;
                        out[lane] = sum * scales[lane] * query_factor[m];
                    }
                }
            });
        }
    }

    #[inline(always)]
    fn values<S: Simd>(
        simd: S,
        tiles: &SpanTiles<'_>,
        queries: Range<usize>,
        visible: impl Fn(usize) -> usize,
        scratch: &mut Scratch,
    ) {
        const QUADS: usize = SPAN / QUAD;
        for m in queries.clone() {
            encode_weights(simd, tiles, m, visible(m), scratch);
        }
        let dim = tiles.dim;
        let Scratch { weight_codes, weight_factor, weight_sum, span, .. } = scratch;
        for column in (0..dim).step_by(LANES) {
            in_groups!(queries.clone(), false, |first, M| {
                let mut sums = [simd.no_sums(); M];
                for (tile, &start) in tiles.values.iter().enumerate() {
                    let values = &tiles.cache[start..][..dim * TILE_TOKENS];
                    let codes: [&[Quad; 4]; M] = std::array::from_fn(|i| {
                        let at = (first + i) * QUADS + tile * 4;
                        weight_codes[at..].first_chunk().unwrap_or(&[[0; 8]; 4])
                    });
                    for quad in 0..4 {
                        let at = (quad * dim + column) * QUAD;
                        let Some(bytes) = values[at..].first_chunk() else { continue };
                        let bytes = simd.load_bytes(bytes);
                        for i in 0..M {
                            sums[i] = simd.add_quad(sums[i], bytes, &codes[i][quad]);
                        }
                    }
                }
                for (i, &sums) in sums.iter().enumerate() {
                    let m = first + i;
                    let bias = ZERO.wrapping_mul(weight_sum[m]);
                    let sums = simd.finish(sums);
                    let out = &mut span.values[m * dim + column..][..LANES];
                    for lane in 0..LANES {
                        out[lane] = sums[lane].wrapping_sub(bias) as f32 * weight_factor[m];
                    }
                }
            });
        }
    }
}

/// Multiplies the weights of query `m` with the scales of the values and rounds the products to 16
/// bits of the largest. Those of positions it does not see become 0, whatever lies there.
#[inline(always)]
fn encode_weights<S: Simd>(
    simd: S,
    tiles: &SpanTiles<'_>,
    m: usize,
    visible: usize,
    scratch: &mut Scratch,
) {
    let n_tiles = tiles.values.len();
    let (weights, _) = scratch.scores[m * SPAN..][..SPAN].as_chunks_mut::<LANES>();
    let mut largest = [0.0f32; LANES];
    let mut total = [0.0f32; LANES];
    for (tile, weights) in weights.iter_mut().enumerate().take(n_tiles) {
        let scales = Q8::scales(tiles, tiles.values[tile]);
        let inside = visible.saturating_sub(tile * TILE_TOKENS);
        for lane in 0..LANES {
            let product = weights[lane] * scales[lane];
            weights[lane] = if lane < inside { product } else { 0.0 };
            largest[lane] = math::larger(weights[lane], largest[lane]);
            total[lane] += weights[lane];
        }
    }
    let largest = math::max_lanes(largest);
    let total = math::sum_lanes(total);
    let factor = if largest > TINY { WEIGHT_MAX / largest } else { 0.0 };
    let (codes, _) = scratch.weight_codes[m * (SPAN / QUAD)..][..SPAN / QUAD].as_chunks_mut::<4>();
    let mut sum = 0i32;
    for (weights, codes) in weights.iter().zip(codes).take(n_tiles) {
        let mut rounded = [0; LANES];
        sum = sum.wrapping_add(round_and_sum(weights, factor, &mut rounded));
        *codes = simd.encode(&rounded);
    }
    scratch.weight_sum[m] = sum;
    // As in `prepare`.
    scratch.weight_factor[m] = largest / WEIGHT_MAX + 0.0 * total;
}

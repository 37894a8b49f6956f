//! The number formats of cached keys and values: how a tile is written and multiplied.

use super::simd::{Panel, Quads, Simd, WEIGHT_MAX, f32_to_half};
use super::{SPAN, SPAN_TILES, Scratch};
use crate::cpu::kv::TILE_TOKENS;
use crate::cpu::math::{self, LANES, Lanes};
use std::ops::Range;

/// The tiles of a span, as offsets into the cache.
pub(super) struct SpanTiles<'a> {
    pub(super) cache: &'a [u8],
    pub(super) dim: usize,
    pub(super) keys: &'a [usize],
    pub(super) values: &'a [usize],
    /// Keys of the span that comes next.
    pub(super) next: &'a [usize],
    pub(super) tile_bytes: usize,
}

/// Tiles of keys that are on their way while one is worked on.
const AHEAD: usize = 2;

impl<'a> SpanTiles<'a> {
    /// The tile at `start`.
    #[inline(always)]
    fn tile(&self, start: usize) -> &'a [u8] {
        &self.cache[start..][..self.tile_bytes]
    }

    /// Keys of a tile; asks for those to come, and for the values of the same tokens. A span is
    /// read once, from places that no hardware foresees.
    #[inline(always)]
    fn keys<S: Simd>(&self, simd: S, tile: usize) -> &'a [u8] {
        if let Some(&next) = self.keys.get(tile + AHEAD) {
            simd.prefetch(self.tile(next), true);
        }
        simd.prefetch(self.tile(self.values[tile]), false);
        self.tile(self.keys[tile])
    }

    /// Asks for a part of the keys that come next, while panel `panel` of the values of a tile is
    /// worked on: memory is then as busy as with keys.
    #[inline(always)]
    fn ask_next<S: Simd>(&self, simd: S, tile: usize, panel: usize) {
        let each = self.tile_bytes / (self.dim / LANES);
        if let Some(&next) = self.next.get(tile) {
            simd.prefetch(&self.tile(next)[panel * each..][..each], false);
        }
    }
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

/// Runs `$body` for groups of `$M` = 8 (where registers allow), 4, 2 and 1 of the queries.
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

/// Element `at` of `M` rows that are `stride` apart.
#[inline(always)]
fn column<T, const M: usize>(rows: &[T], at: usize, stride: usize) -> [&T; M] {
    let mut column = [&rows[at]; M];
    for (i, element) in column.iter_mut().enumerate() {
        *element = &rows[at + i * stride];
    }
    column
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
        match bytes.first_chunk() {
            Some(numbers) => simd.load_f32(numbers),
            None => simd.splat(0.0), // Never: callers pass 16 numbers.
        }
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

/// `sums[i] += Σ_k factors[i][k] · panel[k]` over a panel of 16 × 16 numbers.
#[inline(always)]
fn add_panel<S: Simd, N: Number, const M: usize>(
    simd: S,
    sums: &mut [S::Floats; M],
    panel: &[u8],
    factors: [&Lanes; M],
) {
    for k in 0..LANES {
        let row = N::load(simd, &panel[k * LANES * N::SIZE..][..LANES * N::SIZE]);
        for i in 0..M {
            sums[i] = simd.add_product(sums[i], simd.splat(factors[i][k]), row);
        }
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
        let (chunks, _) = value.as_chunks::<LANES>();
        for (panel, x) in tile.chunks_exact_mut(LANES * TILE_TOKENS * N::SIZE).zip(chunks) {
            let row = &mut panel[token * LANES * N::SIZE..][..LANES * N::SIZE];
            for (bytes, &x) in row.chunks_exact_mut(N::SIZE).zip(x) {
                N::store(x, bytes);
            }
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
        let n_panels = tiles.dim / LANES;
        let (factors, _) = scratch.queries.as_chunks::<LANES>();
        let (scores, _) = scratch.scores.as_chunks_mut::<LANES>();
        for tile in 0..tiles.keys.len() {
            let keys = tiles.keys(simd, tile);
            in_groups!(queries.clone(), S::WIDE, |first, M| {
                let mut sums = [simd.splat(0.0); M];
                for (p, panel) in keys.chunks_exact(LANES * LANES * N::SIZE).enumerate() {
                    let factors = column(factors, first * n_panels + p, n_panels);
                    add_panel::<S, N, M>(simd, &mut sums, panel, factors);
                }
                for (i, &sum) in sums.iter().enumerate() {
                    simd.store(sum, &mut scores[(first + i) * SPAN_TILES + tile]);
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
        let n_panels = tiles.dim / LANES;
        let bytes = LANES * LANES * N::SIZE;
        let (factors, _) = scratch.scores.as_chunks::<LANES>();
        let (out, _) = scratch.span.values.as_chunks_mut::<LANES>();
        for panel in 0..n_panels {
            in_groups!(queries.clone(), S::WIDE, |first, M| {
                // What the first query of a group sees, all of them see. Beyond that, what lies in
                // the cache may be a stranger's and not even a number, so it is not touched.
                let shared = visible(first) / TILE_TOKENS;
                let mut sums = [simd.splat(0.0); M];
                for (tile, &start) in tiles.values.iter().enumerate().take(shared) {
                    if first == queries.start {
                        tiles.ask_next(simd, tile, panel);
                    }
                    let values = &tiles.tile(start)[panel * bytes..][..bytes];
                    let factors = column(factors, first * SPAN_TILES + tile, SPAN_TILES);
                    add_panel::<S, N, M>(simd, &mut sums, values, factors);
                }
                for (i, &sum) in sums.iter().enumerate() {
                    let m = first + i;
                    let tokens = shared * TILE_TOKENS..visible(m);
                    let sum = add_tokens::<S, N>(simd, sum, tiles, panel, m, tokens, factors);
                    simd.store(sum, &mut out[m * n_panels + panel]);
                }
            });
        }
    }
}

/// Adds the values at positions `tokens` of the span, one after the other, 16 features of them,
/// weighted for query `m`.
#[inline(always)]
fn add_tokens<S: Simd, N: Number>(
    simd: S,
    mut sum: S::Floats,
    tiles: &SpanTiles<'_>,
    panel: usize,
    m: usize,
    tokens: Range<usize>,
    factors: &[Lanes],
) -> S::Floats {
    let bytes = LANES * N::SIZE;
    for token in tokens {
        let (tile, row) = (token / TILE_TOKENS, token % TILE_TOKENS);
        let at = (panel * TILE_TOKENS + row) * bytes;
        let value = N::load(simd, &tiles.tile(tiles.values[tile])[at..][..bytes]);
        let factor = factors[m * SPAN_TILES + tile][row];
        sum = simd.add_product(sum, simd.splat(factor), value);
    }
    sum
}

/// Bytes with a scale for each token of a tile: `x = scale · (byte − 128)`, `|byte − 128| ≤ 127`.
pub(super) struct Q8;

/// The zero of [`Q8`]. Stored unsigned, because that is what the multiplication of AVX-512 takes
/// on the cache's side.
const ZERO: i32 = 128;
/// Magnitudes below this count as 0, so that no factor overflows.
const TINY: f32 = 1e-30;
/// Terms of an integer sum that lie side by side.
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

    /// The 16 scales of a tile: its last bytes.
    #[inline(always)]
    fn scales<S: Simd>(simd: S, tile: &[u8]) -> Lanes {
        let mut scales = [0.0; LANES];
        simd.store(F32::load(simd, &tile[tile.len() - 4 * TILE_TOKENS..]), &mut scales);
        scales
    }

    /// The panels of a tile, 16 × 16 bytes each.
    #[inline(always)]
    fn panels(tile: &[u8]) -> &[Panel] {
        tile.as_chunks().0
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

/// `sums[i] += Σ_k factors[i][k] · panel[k]` over the 16 rows of a panel.
#[inline(always)]
fn add_bytes<S: Simd, const M: usize>(
    simd: S,
    sums: &mut [S::Sums; M],
    panel: &Panel,
    factors: [&Quads; M],
) {
    let (rows, _) = panel.as_chunks::<64>();
    for (k, bytes) in rows.iter().enumerate() {
        let bytes = simd.load_bytes(bytes);
        for i in 0..M {
            sums[i] = simd.add_quad(sums[i], bytes, &factors[i][k % QUAD]);
        }
    }
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
        let start = token / QUAD * QUAD * LANES + token % QUAD;
        let scale = Self::quantize(value, |d, byte| {
            tile[d / LANES * LANES * TILE_TOKENS + start + d % LANES * QUAD] = byte;
        });
        Self::store_scale(tile, value.len(), token, scale);
    }

    #[inline(always)]
    fn prepare<S: Simd>(simd: S, scratch: &mut Scratch, dim: usize) {
        let Scratch { queries, query_codes, query_factor, query_sum, .. } = scratch;
        let codes = query_codes.chunks_exact_mut(dim / LANES);
        let stats = query_factor.iter_mut().zip(query_sum);
        for ((query, codes), (out_factor, sum)) in queries.chunks_exact(dim).zip(codes).zip(stats) {
            let largest = math::max_abs(query);
            let factor = if largest > TINY { WEIGHT_MAX / largest } else { 0.0 };
            *sum = 0;
            for (x, codes) in query.as_chunks::<LANES>().0.iter().zip(codes) {
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
        let n_panels = tiles.dim / LANES;
        let Scratch { query_codes, query_factor, query_sum, scores, .. } = scratch;
        let (scores, _) = scores.as_chunks_mut::<LANES>();
        for tile in 0..tiles.keys.len() {
            let keys = tiles.keys(simd, tile);
            let scales = Self::scales(simd, keys);
            in_groups!(queries.clone(), S::WIDE, |first, M| {
                let mut sums = [simd.no_sums(); M];
                for (p, panel) in Self::panels(keys).iter().enumerate().take(n_panels) {
                    let factors = column(query_codes, first * n_panels + p, n_panels);
                    add_bytes::<S, M>(simd, &mut sums, panel, factors);
                }
                for (i, &sums) in sums.iter().enumerate() {
                    let m = first + i;
                    let bias = ZERO.wrapping_mul(query_sum[m]);
                    let (sums, factor) = (simd.finish(sums), query_factor[m]);
                    let out = &mut scores[m * SPAN_TILES + tile];
                    for lane in 0..LANES {
                        out[lane] = sums[lane].wrapping_sub(bias) as f32 * scales[lane] * factor;
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
        for m in queries.clone() {
            encode_weights(simd, tiles, m, visible(m), scratch);
        }
        let n_panels = tiles.dim / LANES;
        let Scratch { weight_codes, weight_factor, weight_sum, span, .. } = scratch;
        let (out, _) = span.values.as_chunks_mut::<LANES>();
        for panel in 0..n_panels {
            in_groups!(queries.clone(), S::WIDE, |first, M| {
                let mut sums = [simd.no_sums(); M];
                for (tile, &start) in tiles.values.iter().enumerate() {
                    if first == queries.start {
                        tiles.ask_next(simd, tile, panel);
                    }
                    let values = &Self::panels(tiles.tile(start))[panel];
                    let factors = column(weight_codes, first * SPAN_TILES + tile, SPAN_TILES);
                    add_bytes::<S, M>(simd, &mut sums, values, factors);
                }
                for (i, &sums) in sums.iter().enumerate() {
                    let m = first + i;
                    let bias = ZERO.wrapping_mul(weight_sum[m]);
                    let (sums, factor) = (simd.finish(sums), weight_factor[m]);
                    let out = &mut out[m * n_panels + panel];
                    for lane in 0..LANES {
                        out[lane] = sums[lane].wrapping_sub(bias) as f32 * factor;
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
    let all = &mut scratch.scores[m * SPAN..][..n_tiles * LANES];
    let (weights, _) = all.as_chunks_mut::<LANES>();
    for ((tile, weights), &start) in weights.iter_mut().enumerate().zip(tiles.values) {
        let mut scales = Q8::scales(simd, tiles.tile(start));
        for lane in visible.saturating_sub(tile * TILE_TOKENS).min(LANES)..LANES {
            (weights[lane], scales[lane]) = (0.0, 0.0);
        }
        for lane in 0..LANES {
            weights[lane] *= scales[lane];
        }
    }
    let (largest, total) = (math::max(all), math::sum(all));
    let factor = if largest > TINY { WEIGHT_MAX / largest } else { 0.0 };
    let codes = &mut scratch.weight_codes[m * SPAN_TILES..][..SPAN_TILES];
    let mut sum = 0i32;
    for (weights, codes) in all.as_chunks::<LANES>().0.iter().zip(codes) {
        let mut rounded = [0; LANES];
        sum = sum.wrapping_add(round_and_sum(weights, factor, &mut rounded));
        *codes = simd.encode(&rounded);
    }
    scratch.weight_sum[m] = sum;
    // As in `prepare`.
    scratch.weight_factor[m] = largest / WEIGHT_MAX + 0.0 * total;
}

//! AVX-512 with VNNI: `vpdpbusd` multiplies 64 codes by 64 activations and adds to 16 sums.
//!
//! A step of a tile is one register, a row to each 32-bit lane. For up to four tokens the fields of
//! the codes are not even shifted down: masked in place they are worth 4ʲ times as much, each field
//! has sums of its own, and one shift after the last step sets that right (`MAX_TERNARY_COLS` says
//! why nothing overflows). For more tokens a step's fields are shifted once and used for all, two
//! tiles at a time, so that an activation is loaded once for 32 rows.

use crate::cpu::attend;
use crate::kernels::float::{self, Lanes};
use crate::kernels::quantized::TokenCodes;
use crate::kernels::{FloatTile, Kernels, STEP_BYTES, STEP_COLS, TILE_ROWS, Tiles, prefetch};
use crate::threads::share;
use std::arch::x86_64::*;
use std::hint::black_box;

pub(in crate::kernels) static AVX512VNNI: Kernels = Kernels {
    name: "avx512vnni",
    supported: || {
        is_x86_feature_detected!("avx512f")
            && is_x86_feature_detected!("avx512bw")
            && is_x86_feature_detected!("avx512vl")
            && is_x86_feature_detected!("avx512vnni")
            && is_x86_feature_detected!("avx2")
            && is_x86_feature_detected!("f16c")
    },
    products,
    rescale,
    quantize,
    norm,
    gate,
    pack_tile,
    float_products,
    byte_products: super::bytes::avx512vnni,
    attention: &attend::AVX512VNNI,
    mac_loop,
};

/// Bytes ahead of the reader that are asked for: the memory's latency times its bandwidth.
const PREFETCH: usize = 2048;
/// Up to this many tokens each field has sums of its own: 16 registers of them.
const FIELD_TOKENS: usize = 4;
/// Most tokens whose sums stay in registers for two tiles. Twelve would fit by count, but leave the
/// compiler no room.
const BLOCK_TOKENS: usize = 8;

#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512vnni,avx2,f16c")]
fn products(tiles: &Tiles<'_>, tokens: &TokenCodes<'_>, sums: &mut [i32]) {
    let tile_bytes = tiles.steps * STEP_BYTES;
    let tile_sums = tokens.n_tokens * tiles.n_groups() * TILE_ROWS;
    if tokens.n_tokens <= FIELD_TOKENS {
        for (tile, sums) in tiles.codes.chunks_exact(tile_bytes).zip(sums.chunks_mut(tile_sums)) {
            few_tokens(tile, tiles.group_steps, tokens, 0..tokens.n_tokens, sums);
        }
        return;
    }
    let pairs = tiles.codes.chunks(2 * tile_bytes).zip(sums.chunks_mut(2 * tile_sums));
    for (pair, sums) in pairs {
        if pair.len() == tile_bytes {
            for first in (0..tokens.n_tokens).step_by(FIELD_TOKENS) {
                let block = first..tokens.n_tokens.min(first + FIELD_TOKENS);
                few_tokens(pair, tiles.group_steps, tokens, block, sums);
            }
            continue;
        }
        let n_blocks = tokens.n_tokens.div_ceil(BLOCK_TOKENS);
        for block in 0..n_blocks {
            let mine = share(tokens.n_tokens, n_blocks, block);
            // While the arithmetic of this pair runs, the next pair comes from memory: both tiles
            // if this is the only block, else one tile in each of the first two blocks.
            let next = |tile: usize| match n_blocks == 1 || block == tile {
                true => 2 * tile_bytes,
                false => 0,
            };
            let ahead = [next(0), next(1)];
            match mine.len() {
                4 => pair_of_tiles::<4>(pair, tiles, tokens, mine.start, sums, ahead),
                5 => pair_of_tiles::<5>(pair, tiles, tokens, mine.start, sums, ahead),
                6 => pair_of_tiles::<6>(pair, tiles, tokens, mine.start, sums, ahead),
                7 => pair_of_tiles::<7>(pair, tiles, tokens, mine.start, sums, ahead),
                8 => pair_of_tiles::<8>(pair, tiles, tokens, mine.start, sums, ahead),
                n => unreachable!("{n} of {} tokens in a block", tokens.n_tokens),
            }
        }
    }
}

/// One tile and up to [`FIELD_TOKENS`] tokens.
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512vnni,avx2,f16c")]
fn few_tokens(
    tile: &[u8],
    group_steps: usize,
    tokens: &TokenCodes<'_>,
    block: std::ops::Range<usize>,
    sums: &mut [i32],
) {
    match block.len() {
        1 => by_fields::<1, 2>(tile, group_steps, tokens, block.start, sums),
        2 => by_fields::<2, 1>(tile, group_steps, tokens, block.start, sums),
        3 => by_fields::<3, 1>(tile, group_steps, tokens, block.start, sums),
        _ => by_fields::<4, 1>(tile, group_steps, tokens, block.start, sums),
    }
}

/// The tokens from `first` on times one tile, the fields summed apart. Consecutive steps go to
/// `CHAINS` sets of sums in turn, so that no addition waits for the one before.
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512vnni,avx2,f16c")]
fn by_fields<const TOKENS: usize, const CHAINS: usize>(
    tile: &[u8],
    group_steps: usize,
    tokens: &TokenCodes<'_>,
    first: usize,
    sums: &mut [i32],
) {
    let steps = tile.as_chunks::<STEP_BYTES>().0;
    let n_groups = steps.len().div_ceil(group_steps);
    let masks: [__m512i; 4] = std::array::from_fn(|j| _mm512_set1_epi8((3u8 << (2 * j)) as i8));
    for group in 0..n_groups {
        let range = group * group_steps..steps.len().min((group + 1) * group_steps);
        let mut acc = [[[_mm512_setzero_si512(); 4]; TOKENS]; CHAINS];
        let add = |acc: &mut [[__m512i; 4]; TOKENS], step: usize| {
            let codes = load_ahead(&steps[step], PREFETCH);
            for t in 0..TOKENS {
                // SAFETY: `Kernels::products` has checked that every token has columns for all
                // steps of a tile.
                let x = unsafe { tokens.columns(first + t, step) };
                for j in 0..4 {
                    let field = _mm512_and_si512(codes, masks[j]);
                    acc[t][j] = _mm512_dpbusd_epi32(acc[t][j], field, broadcast(&x[j]));
                }
            }
        };
        let mut step = range.start;
        while step + CHAINS <= range.end {
            for acc in &mut acc {
                add(acc, step);
                step += 1;
            }
        }
        for step in step..range.end {
            add(&mut acc[0], step);
        }
        for t in 0..TOKENS {
            let field = |j: usize| {
                let chains = acc.iter().map(|acc| acc[t][j]);
                chains.fold(_mm512_setzero_si512(), |a, b| _mm512_add_epi32(a, b))
            };
            let low = _mm512_add_epi32(field(0), _mm512_srai_epi32::<2>(field(1)));
            let high = _mm512_add_epi32(
                _mm512_srai_epi32::<4>(field(2)),
                _mm512_srai_epi32::<6>(field(3)),
            );
            store(_mm512_add_epi32(low, high), sums, (first + t) * n_groups + group);
        }
    }
}

/// The tokens from `first` on times two tiles; asks for the bytes `ahead` of each tile's steps.
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512vnni,avx2,f16c")]
fn pair_of_tiles<const TOKENS: usize>(
    pair: &[u8],
    tiles: &Tiles<'_>,
    tokens: &TokenCodes<'_>,
    first: usize,
    sums: &mut [i32],
    ahead: [usize; 2],
) {
    let n_groups = tiles.n_groups();
    let (low, high) = pair.as_chunks::<STEP_BYTES>().0.split_at(tiles.steps);
    let three = _mm512_set1_epi8(3);
    for group in 0..n_groups {
        let range = group * tiles.group_steps..tiles.steps.min((group + 1) * tiles.group_steps);
        let mut acc = [[_mm512_setzero_si512(); TOKENS]; 2];
        for step in range {
            let mut codes = [load_ahead(&low[step], ahead[0]), load_ahead(&high[step], ahead[1])];
            for j in 0..4 {
                let fields = codes.map(|codes| _mm512_and_si512(codes, three));
                codes = codes.map(|codes| _mm512_srli_epi16::<2>(codes));
                for t in 0..TOKENS {
                    // SAFETY: as in `by_fields`.
                    let x = broadcast(&unsafe { tokens.columns(first + t, step) }[j]);
                    for i in 0..2 {
                        acc[i][t] = _mm512_dpbusd_epi32(acc[i][t], fields[i], x);
                    }
                }
            }
        }
        for i in 0..2 {
            for t in 0..TOKENS {
                let at = (i * tokens.n_tokens + first + t) * n_groups + group;
                store(acc[i][t], sums, at);
            }
        }
    }
}

/// A step of a tile; the line `ahead` bytes further is asked for.
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512vnni,avx2,f16c")]
#[inline]
fn load_ahead(step: &[u8; STEP_BYTES], ahead: usize) -> __m512i {
    prefetch(step.as_ptr().wrapping_add(ahead));
    // SAFETY: the load reads the 64 bytes of `step`.
    unsafe { _mm512_loadu_si512(step.as_ptr().cast()) }
}

/// Four activations, for each of the 16 rows.
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512vnni,avx2,f16c")]
#[inline]
fn broadcast(x: &[i8; 4]) -> __m512i {
    _mm512_set1_epi32(i32::from_ne_bytes(x.map(|x| x as u8)))
}

/// Sixteen sums to their place.
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512vnni,avx2,f16c")]
#[inline]
fn store(values: __m512i, sums: &mut [i32], at: usize) {
    let out = &mut sums.as_chunks_mut::<TILE_ROWS>().0[at];
    // SAFETY: the store writes the 16 numbers of `out`.
    unsafe { _mm512_storeu_si512(out.as_mut_ptr().cast(), values) }
}

float_parts!("avx512f,avx512bw,avx512vl,avx512vnni,avx2,f16c");

#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512vnni,avx2,f16c")]
fn pack_tile(codes: &[u8], out: &mut [u8]) {
    let cols = codes.len() / TILE_ROWS;
    // Doubleword j of a row's 16 codes is field j of the row's word: shifted up by 2j and joined.
    let shifts = _mm512_set4_epi32(6, 4, 2, 0);
    for (i, step) in out.as_chunks_mut::<STEP_BYTES>().0.iter_mut().enumerate() {
        // Four rows a register, a row to each 128-bit lane.
        let rows: [__m512i; 4] = std::array::from_fn(|group| {
            let row = |r: usize| {
                let codes = &codes[(4 * group + r) * cols + i * STEP_COLS..][..STEP_COLS];
                // SAFETY: the load reads the 16 bytes of the slice.
                unsafe { _mm_loadu_si128(codes.as_ptr().cast()) }
            };
            let low = _mm256_inserti128_si256::<1>(_mm256_castsi128_si256(row(0)), row(1));
            let high = _mm256_inserti128_si256::<1>(_mm256_castsi128_si256(row(2)), row(3));
            let rows = _mm512_inserti64x4::<1>(_mm512_castsi256_si512(low), high);
            _mm512_sllv_epi32(_mm512_and_si512(rows, _mm512_set1_epi8(3)), shifts)
        });
        // Or the four doublewords of each lane together: transpose twice by halves.
        let or = |a: __m512i, b: __m512i| {
            _mm512_or_si512(_mm512_unpacklo_epi32(a, b), _mm512_unpackhi_epi32(a, b))
        };
        // Doublewords of lane l: (row l of a, row l of b) twice.
        let (ab, cd) = (or(rows[0], rows[1]), or(rows[2], rows[3]));
        let joined = _mm512_or_si512(_mm512_unpacklo_epi64(ab, cd), _mm512_unpackhi_epi64(ab, cd));
        // Lane l now holds rows l, l + 4, l + 8, l + 12; rows go in order.
        let order = _mm512_setr_epi32(0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15);
        let words = _mm512_permutexvar_epi32(order, joined);
        // SAFETY: the store writes the 64 bytes of `step`.
        unsafe { _mm512_storeu_si512(step.as_mut_ptr().cast(), words) };
    }
}

#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512vnni,avx2,f16c")]
fn float_products(tile: &FloatTile<'_>, x: &[f32], n_tokens: usize, out: &mut [f32]) {
    // SAFETY: this function has the features that the methods of `__m512` need.
    unsafe { float::products::<__m512, 4, 4>(tile, x, n_tokens, out) }
}

impl Lanes for __m512 {
    #[inline(always)]
    unsafe fn zero() -> Self {
        // SAFETY: the caller has AVX-512.
        unsafe { _mm512_setzero_ps() }
    }

    #[inline(always)]
    unsafe fn f32s(bytes: &[u8; 64]) -> Self {
        // SAFETY: as above; the load reads the 64 bytes.
        unsafe { _mm512_loadu_ps(bytes.as_ptr().cast()) }
    }

    #[inline(always)]
    unsafe fn f16s(bytes: &[u8; 32]) -> Self {
        // SAFETY: as above; the load reads the 32 bytes.
        unsafe { _mm512_cvtph_ps(_mm256_loadu_si256(bytes.as_ptr().cast())) }
    }

    #[inline(always)]
    unsafe fn bf16s(bytes: &[u8; 32]) -> Self {
        // SAFETY: as above; the load reads the 32 bytes.
        unsafe {
            let halves = _mm256_loadu_si256(bytes.as_ptr().cast());
            _mm512_castsi512_ps(_mm512_slli_epi32::<16>(_mm512_cvtepu16_epi32(halves)))
        }
    }

    #[inline(always)]
    unsafe fn add_product(self, a: Self, b: Self) -> Self {
        // SAFETY: as above.
        unsafe { _mm512_add_ps(self, _mm512_mul_ps(a, b)) }
    }

    #[inline(always)]
    unsafe fn to_array(self) -> [f32; 16] {
        let mut lanes = [0.0; 16];
        // SAFETY: as above; the store writes the 16 numbers.
        unsafe { _mm512_storeu_ps(lanes.as_mut_ptr(), self) };
        lanes
    }
}

#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512vnni,avx2,f16c")]
fn mac_loop(rounds: u64) -> u64 {
    // Latency times throughput of `vpdpbusd` is at most 10 on the CPUs that have it.
    const SUMS: usize = 16;
    let mut sums = [_mm512_setzero_si512(); SUMS];
    let (codes, x) = (black_box(_mm512_set1_epi8(1)), black_box(_mm512_set1_epi8(1)));
    for _ in 0..rounds {
        for sum in &mut sums {
            *sum = _mm512_dpbusd_epi32(*sum, codes, x);
        }
    }
    black_box(sums);
    64 * SUMS as u64
}

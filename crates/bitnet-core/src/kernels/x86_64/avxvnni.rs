//! AVX2 with VNNI: `vpdpbusd` on 256 bits, for CPUs without AVX-512.
//!
//! Everything but the integer products is the AVX2 set's. A step of a tile is two registers of
//! eight rows; see the AVX-512 set for the fields that need no shift.

use super::avx2::{
    broadcast, float_products, gate, load_ahead, noise, norm, pack_tile, quantize, rescale,
    round_rows, store,
};
use crate::cpu::attend;
use crate::kernels::quantized::TokenCodes;
use crate::kernels::{Kernels, STEP_BYTES, TILE_ROWS, Tiles};
use crate::threads::share;
use std::arch::x86_64::*;
use std::hint::black_box;

pub(in crate::kernels) static AVXVNNI: Kernels = Kernels {
    name: "avxvnni",
    supported: || super::avx2::supported() && is_x86_feature_detected!("avxvnni"),
    products,
    rescale,
    quantize,
    norm,
    gate,
    pack_tile,
    trits: None,
    float_products,
    byte_products: super::bytes::avxvnni,
    wide_products: super::wide::avx2,
    round_rows,
    noise,
    attention: &attend::AVX2,
    mac_loop,
};

/// Most tokens whose sums stay in registers.
const BLOCK_TOKENS: usize = 5;

#[target_feature(enable = "avxvnni,avx2,f16c")]
fn products(tiles: &Tiles<'_>, tokens: &TokenCodes<'_>, sums: &mut [i32]) {
    let tile_sums = tokens.n_tokens * tiles.n_groups() * TILE_ROWS;
    let all = tiles.codes.chunks_exact(tiles.steps * STEP_BYTES);
    let n_blocks = tokens.n_tokens.div_ceil(BLOCK_TOKENS);
    for (tile, sums) in all.zip(sums.chunks_mut(tile_sums)) {
        for block in 0..n_blocks {
            let block = share(tokens.n_tokens, n_blocks, block);
            match block.len() {
                1 => by_fields(tile, tiles.group_steps, tokens, block.start, sums),
                2 => shifted::<2, 2>(tile, tiles.group_steps, tokens, block.start, sums),
                3 => shifted::<3, 1>(tile, tiles.group_steps, tokens, block.start, sums),
                4 => shifted::<4, 1>(tile, tiles.group_steps, tokens, block.start, sums),
                _ => shifted::<5, 1>(tile, tiles.group_steps, tokens, block.start, sums),
            }
        }
    }
}

/// One token times one tile, each field summed apart, in place.
#[target_feature(enable = "avxvnni,avx2,f16c")]
fn by_fields(
    tile: &[u8],
    group_steps: usize,
    tokens: &TokenCodes<'_>,
    token: usize,
    sums: &mut [i32],
) {
    let steps = tile.as_chunks::<STEP_BYTES>().0;
    let n_groups = steps.len().div_ceil(group_steps);
    let masks: [__m256i; 4] = std::array::from_fn(|j| _mm256_set1_epi8((3u8 << (2 * j)) as i8));
    for group in 0..n_groups {
        let mut acc = [[_mm256_setzero_si256(); 4]; 2];
        for step in group * group_steps..steps.len().min((group + 1) * group_steps) {
            let codes = load_ahead(&steps[step]);
            // SAFETY: `Kernels::products` has checked that every token has columns for all steps of
            // a tile.
            let x = unsafe { tokens.columns::<4>(token, step) };
            for j in 0..4 {
                let x = broadcast(&x[j]);
                for half in 0..2 {
                    let field = _mm256_and_si256(codes[half], masks[j]);
                    acc[half][j] = _mm256_dpbusd_avx_epi32(acc[half][j], field, x);
                }
            }
        }
        let total = acc.map(|[a, b, c, d]| {
            let low = _mm256_add_epi32(a, _mm256_srai_epi32::<2>(b));
            let high = _mm256_add_epi32(_mm256_srai_epi32::<4>(c), _mm256_srai_epi32::<6>(d));
            _mm256_add_epi32(low, high)
        });
        store(total, sums, token * n_groups + group);
    }
}

/// The tokens from `first` on times one tile; fields go to `CHAINS` sets of sums in turn, so that
/// no addition waits for the one before.
#[target_feature(enable = "avxvnni,avx2,f16c")]
fn shifted<const TOKENS: usize, const CHAINS: usize>(
    tile: &[u8],
    group_steps: usize,
    tokens: &TokenCodes<'_>,
    first: usize,
    sums: &mut [i32],
) {
    let steps = tile.as_chunks::<STEP_BYTES>().0;
    let n_groups = steps.len().div_ceil(group_steps);
    let three = _mm256_set1_epi8(3);
    for group in 0..n_groups {
        let mut acc = [[[_mm256_setzero_si256(); 2]; TOKENS]; CHAINS];
        for step in group * group_steps..steps.len().min((group + 1) * group_steps) {
            let mut codes = load_ahead(&steps[step]);
            for j in 0..4 {
                let fields = codes.map(|codes| _mm256_and_si256(codes, three));
                codes = codes.map(|codes| _mm256_srli_epi16::<2>(codes));
                for t in 0..TOKENS {
                    // SAFETY: as in `by_fields`.
                    let x = broadcast(&unsafe { tokens.columns::<4>(first + t, step) }[j]);
                    for half in 0..2 {
                        let acc = &mut acc[j % CHAINS][t][half];
                        *acc = _mm256_dpbusd_avx_epi32(*acc, fields[half], x);
                    }
                }
            }
        }
        for t in 0..TOKENS {
            let total = std::array::from_fn(|half| {
                let chains = acc.iter().map(|acc| acc[t][half]);
                chains.fold(_mm256_setzero_si256(), |a, b| _mm256_add_epi32(a, b))
            });
            store(total, sums, (first + t) * n_groups + group);
        }
    }
}

#[target_feature(enable = "avxvnni,avx2,f16c")]
fn mac_loop(rounds: u64) -> u64 {
    // Latency times throughput of `vpdpbusd` is at most 10 on the CPUs that have it.
    const SUMS: usize = 12;
    let mut sums = [_mm256_setzero_si256(); SUMS];
    let (codes, x) = (black_box(_mm256_set1_epi8(1)), black_box(_mm256_set1_epi8(1)));
    for _ in 0..rounds {
        for sum in &mut sums {
            *sum = _mm256_dpbusd_avx_epi32(*sum, codes, x);
        }
    }
    black_box(sums);
    32 * SUMS as u64
}

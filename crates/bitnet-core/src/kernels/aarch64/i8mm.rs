//! NEON with `smmla`: two rows of eight codes times two tokens of eight activations into four sums.
//!
//! Two fields of four rows, interleaved by words, are two rows of eight consecutive columns for two
//! registers: just what the instruction wants. Tokens go in pairs; one that is left over, and so
//! every single token, takes the `sdot` path. The rest is the NEON set's.

use super::dotprod::{activations, by_fields};
use super::neon::{
    fields, float_products, gate, load_ahead, noise, norm, pack_tile, quantize, rescale,
    round_rows, store,
};
use crate::cpu::attend;
use crate::kernels::quantized::TokenCodes;
use crate::kernels::{Kernels, STEP_BYTES, TILE_ROWS, Tiles};
use std::arch::aarch64::*;
use std::arch::asm;

pub(in crate::kernels) static I8MM: Kernels = Kernels {
    name: "neon-i8mm",
    supported: || super::dotprod::supported() && std::arch::is_aarch64_feature_detected!("i8mm"),
    products,
    rescale,
    quantize,
    norm,
    gate,
    pack_tile,
    trits: None,
    float_products,
    byte_products: super::bytes::dotprod,
    wide_products: crate::kernels::wide::scalar,
    round_rows,
    noise,
    attention: &attend::PORTABLE,
    mac_loop,
};

/// `sums + a · bᵀ` for 2 × 8 matrices `a` and `b`, row-major, `sums` 2 × 2.
///
/// In assembly because the compiler's own name for it, `vmmlaq_s32`, is not stable yet.
#[target_feature(enable = "neon,i8mm")]
#[inline]
fn smmla(sums: int32x4_t, a: int8x16_t, b: int8x16_t) -> int32x4_t {
    let mut sums = sums;
    // SAFETY: the instruction, which this function's features include, works on registers alone.
    unsafe {
        asm!("smmla {0:v}.4s, {1:v}.16b, {2:v}.16b",
            inlateout(vreg) sums, in(vreg) a, in(vreg) b,
            options(pure, nomem, nostack, preserves_flags));
    }
    sums
}

#[target_feature(enable = "neon,dotprod,i8mm")]
fn products(tiles: &Tiles<'_>, tokens: &TokenCodes<'_>, sums: &mut [i32]) {
    let tile_sums = tokens.n_tokens * tiles.n_groups() * TILE_ROWS;
    let all = tiles.codes.chunks_exact(tiles.steps * STEP_BYTES);
    for (tile, sums) in all.zip(sums.chunks_mut(tile_sums)) {
        let mut first = 0;
        while first < tokens.n_tokens {
            match tokens.n_tokens - first {
                1 => by_fields(tile, tiles.group_steps, tokens, first, sums),
                2 | 3 => pairs::<1>(tile, tiles.group_steps, tokens, first, sums),
                _ => pairs::<2>(tile, tiles.group_steps, tokens, first, sums),
            }
            first += match tokens.n_tokens - first {
                n @ (1 | 2) => n,
                3 => 2,
                _ => 4,
            };
        }
    }
}

/// `PAIRS` pairs of tokens from `first` on times one tile.
#[target_feature(enable = "neon,dotprod,i8mm")]
fn pairs<const PAIRS: usize>(
    tile: &[u8],
    group_steps: usize,
    tokens: &TokenCodes<'_>,
    first: usize,
    sums: &mut [i32],
) {
    let steps = tile.as_chunks::<STEP_BYTES>().0;
    let n_groups = steps.len().div_ceil(group_steps);
    for group in 0..n_groups {
        // For each pair of tokens and register of four rows: rows 0 and 1, rows 2 and 3.
        let mut acc = [[[vdupq_n_s32(0); 2]; 4]; PAIRS];
        for step in group * group_steps..steps.len().min((group + 1) * group_steps) {
            // Columns 0–7 and 8–15 of both tokens.
            let x: [[int8x16_t; 2]; PAIRS] = std::array::from_fn(|pair| {
                // SAFETY: `Kernels::products` has checked that every token has columns for all
                // steps of a tile.
                let [a, b] = [0, 1].map(|t| unsafe {
                    vreinterpretq_s64_s8(activations(tokens, first + 2 * pair + t, step))
                });
                [vzip1q_s64(a, b), vzip2q_s64(a, b)].map(|x| vreinterpretq_s8_s64(x))
            });
            for (i, codes) in load_ahead(&steps[step]).into_iter().enumerate() {
                let fields = fields(codes).map(|field| vreinterpretq_s32_s8(field));
                for (half, fields) in fields.as_chunks::<2>().0.iter().enumerate() {
                    let [a, b] = *fields;
                    let rows = [vzip1q_s32(a, b), vzip2q_s32(a, b)];
                    for (r, rows) in rows.into_iter().enumerate() {
                        let rows = vreinterpretq_s8_s32(rows);
                        for pair in 0..PAIRS {
                            acc[pair][i][r] = smmla(acc[pair][i][r], rows, x[pair][half]);
                        }
                    }
                }
            }
        }
        for pair in 0..PAIRS {
            let at = |t: usize| (first + 2 * pair + t) * n_groups + group;
            store(acc[pair].map(|[low, high]| vuzp1q_s32(low, high)), sums, at(0));
            store(acc[pair].map(|[low, high]| vuzp2q_s32(low, high)), sums, at(1));
        }
    }
}

#[target_feature(enable = "neon,dotprod,i8mm")]
fn mac_loop(rounds: u64) -> u64 {
    const SUMS: usize = 16;
    let mut sums = [vdupq_n_s32(0); SUMS];
    let (codes, x) = (vdupq_n_s8(1), vdupq_n_s8(1));
    for _ in 0..rounds {
        for sum in &mut sums {
            *sum = smmla(*sum, codes, x);
        }
    }
    std::hint::black_box(sums);
    32 * SUMS as u64
}

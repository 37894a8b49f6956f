//! NEON with `sdot`: 16 codes times 16 activations into four 32-bit sums.
//!
//! A step of a tile is four registers of four rows, and one register holds a token's activations
//! for the whole step: `sdot` takes field j's four from its lane j. Everything but the integer
//! products is the NEON set's.

use super::neon::{
    fields, float_products, gate, load_ahead, noise, norm, pack_tile, quantize, rescale,
    round_rows, store,
};
use crate::cpu::attend;
use crate::kernels::quantized::TokenCodes;
use crate::kernels::{Kernels, STEP_BYTES, TILE_ROWS, Tiles};
use crate::threads::share;
use std::arch::aarch64::*;
use std::arch::asm;

pub(in crate::kernels) static DOTPROD: Kernels = Kernels {
    name: "neon-dotprod",
    supported,
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

pub(super) fn supported() -> bool {
    std::arch::is_aarch64_feature_detected!("neon")
        && std::arch::is_aarch64_feature_detected!("dotprod")
}

/// Most tokens whose sums stay in registers.
const BLOCK_TOKENS: usize = 4;

/// `sums + Σ codes · x`, four neighbours each, with `x` the four activations in lane `LANE`.
///
/// In assembly because the compiler's own name for it, `vdotq_laneq_s32`, is not stable yet.
#[target_feature(enable = "neon,dotprod")]
#[inline]
pub(super) fn sdot<const LANE: i32>(sums: int32x4_t, codes: int8x16_t, x: int8x16_t) -> int32x4_t {
    let mut sums = sums;
    // SAFETY: the instruction, which this function's features include, works on registers alone.
    unsafe {
        asm!("sdot {0:v}.4s, {1:v}.16b, {2:v}.4b[{3}]",
            inlateout(vreg) sums, in(vreg) codes, in(vreg) x, const LANE,
            options(pure, nomem, nostack, preserves_flags));
    }
    sums
}

#[target_feature(enable = "neon,dotprod")]
pub(super) fn products(tiles: &Tiles<'_>, tokens: &TokenCodes<'_>, sums: &mut [i32]) {
    let tile_sums = tokens.n_tokens * tiles.n_groups() * TILE_ROWS;
    let all = tiles.codes.chunks_exact(tiles.steps * STEP_BYTES);
    let n_blocks = tokens.n_tokens.div_ceil(BLOCK_TOKENS);
    for (tile, sums) in all.zip(sums.chunks_mut(tile_sums)) {
        for block in 0..n_blocks {
            let block = share(tokens.n_tokens, n_blocks, block);
            match block.len() {
                1 => by_fields(tile, tiles.group_steps, tokens, block.start, sums),
                2 => shifted::<2>(tile, tiles.group_steps, tokens, block.start, sums),
                3 => shifted::<3>(tile, tiles.group_steps, tokens, block.start, sums),
                _ => shifted::<4>(tile, tiles.group_steps, tokens, block.start, sums),
            }
        }
    }
}

/// The activations of a token at a step.
///
/// # Safety
/// As [`TokenCodes::columns`].
#[target_feature(enable = "neon")]
#[inline]
pub(super) unsafe fn activations(tokens: &TokenCodes<'_>, token: usize, step: usize) -> int8x16_t {
    // SAFETY: the caller's promise; the load reads the 16 bytes of the columns.
    unsafe { vld1q_s8(tokens.columns::<4>(token, step).as_ptr().cast()) }
}

/// One token times one tile. Fields 1 and 2 are not shifted down but summed apart, 4 and 16 times
/// as large, and set right by one shift after the last step. (Field 3 would be negative.)
#[target_feature(enable = "neon,dotprod")]
pub(super) fn by_fields(
    tile: &[u8],
    group_steps: usize,
    tokens: &TokenCodes<'_>,
    token: usize,
    sums: &mut [i32],
) {
    let steps = tile.as_chunks::<STEP_BYTES>().0;
    let n_groups = steps.len().div_ceil(group_steps);
    let mask = |bits| vdupq_n_u8(bits);
    for group in 0..n_groups {
        let mut acc = [[vdupq_n_s32(0); 3]; 4];
        for step in group * group_steps..steps.len().min((group + 1) * group_steps) {
            // SAFETY: `Kernels::products` has checked that every token has columns for all steps of
            // a tile.
            let x = unsafe { activations(tokens, token, step) };
            for (acc, codes) in acc.iter_mut().zip(load_ahead(&steps[step])) {
                let field = |bits| vreinterpretq_s8_u8(vandq_u8(codes, mask(bits)));
                acc[0] = sdot::<0>(acc[0], field(0x03), x);
                acc[1] = sdot::<1>(acc[1], field(0x0c), x);
                acc[2] = sdot::<2>(acc[2], field(0x30), x);
                acc[0] = sdot::<3>(acc[0], vreinterpretq_s8_u8(vshrq_n_u8::<6>(codes)), x);
            }
        }
        let rows = acc.map(|[ones, fours, sixteens]| {
            let sum = vaddq_s32(ones, vshrq_n_s32::<2>(fours));
            vaddq_s32(sum, vshrq_n_s32::<4>(sixteens))
        });
        store(rows, sums, token * n_groups + group);
    }
}

/// The tokens from `first` on times one tile.
#[target_feature(enable = "neon,dotprod")]
fn shifted<const TOKENS: usize>(
    tile: &[u8],
    group_steps: usize,
    tokens: &TokenCodes<'_>,
    first: usize,
    sums: &mut [i32],
) {
    let steps = tile.as_chunks::<STEP_BYTES>().0;
    let n_groups = steps.len().div_ceil(group_steps);
    for group in 0..n_groups {
        let mut acc = [[vdupq_n_s32(0); 4]; TOKENS];
        for step in group * group_steps..steps.len().min((group + 1) * group_steps) {
            // SAFETY: as in `by_fields`.
            let x: [int8x16_t; TOKENS] =
                std::array::from_fn(|t| unsafe { activations(tokens, first + t, step) });
            for (i, codes) in load_ahead(&steps[step]).into_iter().enumerate() {
                let fields = fields(codes);
                for t in 0..TOKENS {
                    let sum = sdot::<0>(acc[t][i], fields[0], x[t]);
                    let sum = sdot::<1>(sum, fields[1], x[t]);
                    let sum = sdot::<2>(sum, fields[2], x[t]);
                    acc[t][i] = sdot::<3>(sum, fields[3], x[t]);
                }
            }
        }
        for t in 0..TOKENS {
            store(acc[t], sums, (first + t) * n_groups + group);
        }
    }
}

#[target_feature(enable = "neon,dotprod")]
fn mac_loop(rounds: u64) -> u64 {
    const SUMS: usize = 16;
    let mut sums = [vdupq_n_s32(0); SUMS];
    let (codes, x) = (vdupq_n_s8(1), vdupq_n_s8(1));
    for _ in 0..rounds {
        for sum in &mut sums {
            *sum = sdot::<0>(*sum, codes, x);
        }
    }
    std::hint::black_box(sums);
    16 * SUMS as u64
}

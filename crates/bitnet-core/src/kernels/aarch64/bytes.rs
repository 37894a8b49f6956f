//! Products of unsigned bytes with signed ones, for the shortlist of an output head: one straight line
//! through memory.
//!
//! `sdot` and `smull` take signed bytes. With `code - 128` in place of each code, 128 times the sum of
//! the activations is missing at the end, the same for every row of a token.

use super::dotprod::sdot;
use super::neon::{load_ahead, store};
use crate::kernels::quantized::TokenCodes;
use crate::kernels::{BYTE_STEP_COLS, STEP_BYTES, TILE_ROWS, Tiles};
use std::arch::aarch64::*;

/// Tokens that share one pass over a tile: their sums take 16 registers.
const TOKENS: usize = 4;

/// Defines the products `$name`; `$add` multiplies four columns of four rows and adds them up by rows.
macro_rules! byte_products {
    ($name:ident, $features:literal, $add:path) => {
        #[target_feature(enable = $features)]
        pub(super) fn $name(tiles: &Tiles<'_>, tokens: &TokenCodes<'_>, sums: &mut [i32]) {
            #[target_feature(enable = $features)]
            fn pass<const N: usize>(tile: &[u8], x: &[i8], stride: usize, sums: &mut [i32]) {
                let steps = tile.as_chunks::<STEP_BYTES>().0;
                let mut acc = [[vdupq_n_s32(0); 4]; N];
                for (step, bytes) in steps.iter().enumerate() {
                    let codes = load_ahead(bytes)
                        .map(|codes| vreinterpretq_s8_u8(veorq_u8(codes, vdupq_n_u8(128))));
                    for (t, acc) in acc.iter_mut().enumerate() {
                        let x = &x[t * stride + BYTE_STEP_COLS * step..][..BYTE_STEP_COLS];
                        let x = [x[0] as u8, x[1] as u8, x[2] as u8, x[3] as u8];
                        let x = vreinterpretq_s8_s32(vdupq_n_s32(i32::from_ne_bytes(x)));
                        for (acc, codes) in acc.iter_mut().zip(codes) {
                            *acc = $add(*acc, codes, x);
                        }
                    }
                }
                for (t, acc) in acc.into_iter().enumerate() {
                    let x = &x[t * stride..][..BYTE_STEP_COLS * steps.len()];
                    let sum: i32 = x.iter().map(|&x| i32::from(x)).sum();
                    let missing = vdupq_n_s32(128 * sum);
                    store(acc.map(|rows| vaddq_s32(rows, missing)), sums, t);
                }
            }
            let (codes, stride) = (tokens.codes, tokens.stride);
            let all = tiles.codes.chunks_exact(tiles.steps * STEP_BYTES);
            for (tile, sums) in all.zip(sums.chunks_exact_mut(tokens.n_tokens * TILE_ROWS)) {
                let passes = sums.chunks_mut(TOKENS * TILE_ROWS);
                for (x, sums) in codes.chunks(TOKENS * stride).zip(passes) {
                    match sums.len() / TILE_ROWS {
                        1 => pass::<1>(tile, x, stride, sums),
                        2 => pass::<2>(tile, x, stride, sums),
                        3 => pass::<3>(tile, x, stride, sums),
                        _ => pass::<4>(tile, x, stride, sums),
                    }
                }
            }
        }
    };
}

byte_products!(neon, "neon", smull);
byte_products!(dotprod, "neon,dotprod", sdot::<0>);

/// What `sdot` does, without it.
#[target_feature(enable = "neon")]
#[inline]
fn smull(sums: int32x4_t, codes: int8x16_t, x: int8x16_t) -> int32x4_t {
    // A product is at most 128 · 128 in size; pairs are added in 32 bits.
    let low = vpaddlq_s16(vmull_s8(vget_low_s8(codes), vget_low_s8(x)));
    let high = vpaddlq_s16(vmull_high_s8(codes, x));
    vaddq_s32(sums, vpaddq_s32(low, high))
}

//! NEON as every aarch64 CPU has it: `smlal` multiplies eight codes by eight activations into
//! 16-bit sums.
//!
//! A step of a tile is four registers of four rows. The four fields of a step add at most
//! 4 · 3 · 128 = 1536 to a 16-bit sum, so 21 steps fit before the sums must be widened.

use crate::cpu::attend;
use crate::kernels::float::{self, Lanes};
use crate::kernels::quantized::TokenCodes;
use crate::kernels::{FloatTile, Kernels, STEP_BYTES, STEP_COLS, TILE_ROWS, Tiles, prefetch};
use crate::threads::share;
use std::arch::aarch64::*;
use std::arch::asm;

pub(in crate::kernels) static NEON: Kernels = Kernels {
    name: "neon",
    supported: || std::arch::is_aarch64_feature_detected!("neon"),
    products,
    rescale,
    quantize,
    norm,
    gate,
    pack_tile,
    trits: None,
    float_products,
    byte_products: super::bytes::neon,
    wide_products: crate::kernels::wide::scalar,
    round_rows,
    noise,
    attention: &attend::PORTABLE,
    mac_loop,
};

/// Bytes ahead of the reader that are asked for: the memory's latency times its bandwidth.
const PREFETCH: usize = 2048;
/// Most tokens whose sums stay in registers.
const BLOCK_TOKENS: usize = 2;
/// Steps until 16-bit sums are widened.
const NARROW_STEPS: usize = 21;
const _: () = assert!(NARROW_STEPS * 4 * 3 * 128 <= i16::MAX as usize);

#[target_feature(enable = "neon")]
fn products(tiles: &Tiles<'_>, tokens: &TokenCodes<'_>, sums: &mut [i32]) {
    let tile_sums = tokens.n_tokens * tiles.n_groups() * TILE_ROWS;
    let all = tiles.codes.chunks_exact(tiles.steps * STEP_BYTES);
    let n_blocks = tokens.n_tokens.div_ceil(BLOCK_TOKENS);
    for (tile, sums) in all.zip(sums.chunks_mut(tile_sums)) {
        for block in 0..n_blocks {
            let block = share(tokens.n_tokens, n_blocks, block);
            match block.len() {
                1 => tokens_of::<1>(tile, tiles.group_steps, tokens, block.start, sums),
                _ => tokens_of::<2>(tile, tiles.group_steps, tokens, block.start, sums),
            }
        }
    }
}

/// The tokens from `first` on times one tile.
#[target_feature(enable = "neon")]
fn tokens_of<const TOKENS: usize>(
    tile: &[u8],
    group_steps: usize,
    tokens: &TokenCodes<'_>,
    first: usize,
    sums: &mut [i32],
) {
    let steps = tile.as_chunks::<STEP_BYTES>().0;
    let n_groups = steps.len().div_ceil(group_steps);
    for group in 0..n_groups {
        let range = group * group_steps..steps.len().min((group + 1) * group_steps);
        // For each token and register of four rows: rows 0 and 1, rows 2 and 3.
        let mut wide = [[[vdupq_n_s32(0); 2]; 4]; TOKENS];
        for start in range.clone().step_by(NARROW_STEPS) {
            let mut narrow = [[[vdupq_n_s16(0); 2]; 4]; TOKENS];
            for step in start..range.end.min(start + NARROW_STEPS) {
                // SAFETY: `Kernels::products` has checked that every token has columns for all
                // steps of a tile.
                let x: [[int8x16_t; 4]; TOKENS] = std::array::from_fn(|t| unsafe {
                    tokens.columns::<4>(first + t, step).map(|x| four_columns(x))
                });
                for (i, codes) in load_ahead(&steps[step]).into_iter().enumerate() {
                    let fields = fields(codes);
                    for t in 0..TOKENS {
                        let [low, high] = &mut narrow[t][i];
                        for j in 0..4 {
                            let (field, x) = (fields[j], x[t][j]);
                            *low = vmlal_s8(*low, vget_low_s8(field), vget_low_s8(x));
                            *high = vmlal_high_s8(*high, field, x);
                        }
                    }
                }
            }
            let narrow = narrow.iter().flatten().flatten();
            for (wide, narrow) in wide.iter_mut().flatten().flatten().zip(narrow) {
                *wide = vpadalq_s16(*wide, *narrow);
            }
        }
        for t in 0..TOKENS {
            // Two neighbours are the halves of a row.
            let rows = wide[t].map(|[low, high]| vpaddq_s32(low, high));
            store(rows, sums, (first + t) * n_groups + group);
        }
    }
}

/// Four activations, for each of four rows.
#[target_feature(enable = "neon")]
#[inline]
fn four_columns(x: [i8; 4]) -> int8x16_t {
    vreinterpretq_s8_s32(vdupq_n_s32(i32::from_ne_bytes(x.map(|x| x as u8))))
}

/// A step of a tile, four rows a register; the line [`PREFETCH`] bytes further is asked for.
#[target_feature(enable = "neon")]
#[inline]
pub(super) fn load_ahead(step: &[u8; STEP_BYTES]) -> [uint8x16_t; 4] {
    prefetch(step.as_ptr().wrapping_add(PREFETCH));
    // SAFETY: each load reads 16 of the 64 bytes.
    std::array::from_fn(|i| unsafe { vld1q_u8(step.as_ptr().add(16 * i)) })
}

/// The four fields of some codes.
#[target_feature(enable = "neon")]
#[inline]
pub(super) fn fields(codes: uint8x16_t) -> [int8x16_t; 4] {
    let three = vdupq_n_u8(3);
    [
        vandq_u8(codes, three),
        vandq_u8(vshrq_n_u8::<2>(codes), three),
        vandq_u8(vshrq_n_u8::<4>(codes), three),
        vshrq_n_u8::<6>(codes),
    ]
    .map(|field| vreinterpretq_s8_u8(field))
}

/// Sixteen sums to their place.
#[target_feature(enable = "neon")]
#[inline]
pub(super) fn store(rows: [int32x4_t; 4], sums: &mut [i32], at: usize) {
    let out = &mut sums.as_chunks_mut::<TILE_ROWS>().0[at];
    for (out, rows) in out.as_chunks_mut::<4>().0.iter_mut().zip(rows) {
        // SAFETY: the store writes the four numbers of `out`.
        unsafe { vst1q_s32(out.as_mut_ptr(), rows) };
    }
}

float_parts!("neon");

#[target_feature(enable = "neon")]
pub(super) fn pack_tile(codes: &[u8], out: &mut [u8]) {
    let cols = codes.len() / TILE_ROWS;
    // Word j of a row's 16 codes is field j of the row's word: shifted up by 2j and joined.
    let shifts = vcombine_s32(vcreate_s32(2 << 32), vcreate_s32(4 | 6 << 32));
    for (i, step) in out.as_chunks_mut::<STEP_BYTES>().0.iter_mut().enumerate() {
        for (group, out) in step.as_chunks_mut::<16>().0.iter_mut().enumerate() {
            let [a, b, c, d]: [uint32x4_t; 4] = std::array::from_fn(|r| {
                let codes = &codes[(4 * group + r) * cols + i * STEP_COLS..][..STEP_COLS];
                // SAFETY: the load reads the 16 bytes of the slice.
                let codes = vandq_u8(unsafe { vld1q_u8(codes.as_ptr()) }, vdupq_n_u8(3));
                vshlq_u32(vreinterpretq_u32_u8(codes), shifts)
            });
            // Or the four words of each row together: transpose twice by halves.
            let or = |a, b| vreinterpretq_u64_u32(vorrq_u32(vzip1q_u32(a, b), vzip2q_u32(a, b)));
            let (ab, cd) = (or(a, b), or(c, d));
            let words = vorrq_u64(vzip1q_u64(ab, cd), vzip2q_u64(ab, cd));
            // SAFETY: the store writes the 16 bytes of `out`.
            unsafe { vst1q_u8(out.as_mut_ptr(), vreinterpretq_u8_u64(words)) };
        }
    }
}

#[target_feature(enable = "neon")]
pub(super) fn float_products(tile: &FloatTile<'_>, x: &[f32], n_tokens: usize, out: &mut [f32]) {
    // SAFETY: this function has the features that the methods of `Quad` need.
    unsafe { float::products::<Quad, 2, 2>(tile, x, n_tokens, out) }
}

/// Sixteen lanes in four registers.
#[derive(Clone, Copy)]
struct Quad([float32x4_t; 4]);

impl Lanes for Quad {
    #[inline(always)]
    unsafe fn zero() -> Self {
        // SAFETY: the caller has NEON.
        unsafe { Self([vdupq_n_f32(0.0); 4]) }
    }

    #[inline(always)]
    unsafe fn f32s(bytes: &[u8; 64]) -> Self {
        let p = bytes.as_ptr();
        // SAFETY: as above; each load reads 16 of the 64 bytes.
        Self(std::array::from_fn(|i| unsafe { vreinterpretq_f32_u8(vld1q_u8(p.add(16 * i))) }))
    }

    #[inline(always)]
    unsafe fn f16s(bytes: &[u8; 32]) -> Self {
        let p = bytes.as_ptr();
        // SAFETY: as above; each load reads 8 of the 32 bytes. The instruction only converts.
        Self(std::array::from_fn(|i| unsafe {
            let halves = vld1_u8(p.add(8 * i));
            let floats: float32x4_t;
            asm!("fcvtl {0:v}.4s, {1:v}.4h", out(vreg) floats, in(vreg) halves,
                options(pure, nomem, nostack, preserves_flags));
            floats
        }))
    }

    #[inline(always)]
    unsafe fn bf16s(bytes: &[u8; 32]) -> Self {
        let p = bytes.as_ptr();
        // SAFETY: as above; each load reads 8 of the 32 bytes.
        Self(std::array::from_fn(|i| unsafe {
            let halves = vreinterpret_u16_u8(vld1_u8(p.add(8 * i)));
            vreinterpretq_f32_u32(vshll_n_u16::<16>(halves))
        }))
    }

    #[inline(always)]
    unsafe fn add_product(self, a: Self, b: Self) -> Self {
        // SAFETY: as above.
        Self(std::array::from_fn(|i| unsafe { vaddq_f32(self.0[i], vmulq_f32(a.0[i], b.0[i])) }))
    }

    #[inline(always)]
    unsafe fn to_array(self) -> [f32; 16] {
        let mut lanes = [0.0; 16];
        for (lanes, part) in lanes.as_chunks_mut::<4>().0.iter_mut().zip(self.0) {
            // SAFETY: as above; the store writes the four numbers.
            unsafe { vst1q_f32(lanes.as_mut_ptr(), part) };
        }
        lanes
    }
}

#[target_feature(enable = "neon")]
fn mac_loop(rounds: u64) -> u64 {
    // In assembly, because the compiler would see that every round multiplies the same.
    let (codes, x) = (vdupq_n_s8(1), vdupq_n_s8(1));
    for _ in 0..rounds {
        // SAFETY: arithmetic on registers that the compiler is told about.
        unsafe {
            asm!(
                "smlal v16.8h, {c:v}.8b, {x:v}.8b", "smlal2 v17.8h, {c:v}.16b, {x:v}.16b",
                "smlal v18.8h, {c:v}.8b, {x:v}.8b", "smlal2 v19.8h, {c:v}.16b, {x:v}.16b",
                "smlal v20.8h, {c:v}.8b, {x:v}.8b", "smlal2 v21.8h, {c:v}.16b, {x:v}.16b",
                "smlal v22.8h, {c:v}.8b, {x:v}.8b", "smlal2 v23.8h, {c:v}.16b, {x:v}.16b",
                "smlal v24.8h, {c:v}.8b, {x:v}.8b", "smlal2 v25.8h, {c:v}.16b, {x:v}.16b",
                "smlal v26.8h, {c:v}.8b, {x:v}.8b", "smlal2 v27.8h, {c:v}.16b, {x:v}.16b",
                c = in(vreg) codes,
                x = in(vreg) x,
                out("v16") _, out("v17") _, out("v18") _, out("v19") _,
                out("v20") _, out("v21") _, out("v22") _, out("v23") _,
                out("v24") _, out("v25") _, out("v26") _, out("v27") _,
                options(nomem, nostack, preserves_flags),
            );
        }
    }
    12 * 8
}

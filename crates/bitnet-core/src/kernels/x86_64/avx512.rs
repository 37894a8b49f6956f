//! What the AVX-512 sets share: ternary products by `vpdpbusd`, whatever the packing, and float
//! lanes.
//!
//! `vpdpbusd` multiplies 64 codes by 64 activations and adds to 16 sums: a step of a tile is one
//! register, a row to each 32-bit lane. For few tokens the fields of the codes stay where they are
//! in a byte: worth a multiple of the code, each field has sums of its own, and the multiples are
//! divided out once, after the last step (`MAX_TERNARY_COLS` says why nothing overflows). For more
//! tokens a step's fields are brought to units once and used for all: one tile by up to 16 tokens,
//! whose activations are broadcast by `vpdpbusd` itself. Two tiles would halve those loads, but
//! their fields and sums do not fit the registers beside the constants that unpack them.
//!
//! The functions are `inline(always)` and carry no features themselves: each set compiles them
//! inside a function of its own that does. They use no closures around instructions, for closures
//! cannot be made to inline.

use crate::kernels::float::Lanes;
use crate::kernels::quantized::TokenCodes;
use crate::kernels::{STEP_BYTES, TILE_ROWS, Tiles, prefetch};
use crate::threads::share;
use std::arch::asm;
use std::arch::x86_64::*;
use std::ops::Range;

/// Bytes ahead of the reader that are asked for: the memory's latency times its bandwidth.
const PREFETCH: usize = 2048;
/// Most tokens whose sums stay in registers beside the fields of a step.
const BLOCK_TOKENS: usize = 16;

/// A way to take the fields of a packing out of a register of 64 bytes.
///
/// # Safety
/// Callers of the methods must run inside a function compiled with AVX-512 F, BW and VL, and VBMI
/// where the packing says so, on a CPU that has them.
pub(super) trait Fields<const FIELDS: usize> {
    /// Up to this many tokens each field has sums of its own; as many as registers allow.
    const APART_TOKENS: usize;
    /// Multiples of the codes, unsigned.
    unsafe fn in_place(step: __m512i) -> [__m512i; FIELDS];
    /// The sum of products with codes from those with the multiples of [`Fields::in_place`].
    unsafe fn total(sums: [__m512i; FIELDS]) -> __m512i;
    /// The codes.
    unsafe fn units(step: __m512i) -> [__m512i; FIELDS];
}

/// [`crate::kernels::Kernels::products`] for a packing.
///
/// # Safety
/// As [`Fields`], with AVX-512 VNNI; the lengths have been checked.
#[inline(always)]
pub(super) unsafe fn products<P: Fields<FIELDS>, const FIELDS: usize>(
    tiles: &Tiles<'_>,
    tokens: &TokenCodes<'_>,
    sums: &mut [i32],
) {
    let tile_bytes = tiles.steps * STEP_BYTES;
    let tile_sums = tokens.n_tokens * tiles.n_groups() * TILE_ROWS;
    let units = tiles.codes.chunks(tile_bytes).zip(sums.chunks_mut(tile_sums));
    for (codes, sums) in units {
        // SAFETY: the caller's promise.
        unsafe {
            if tokens.n_tokens > P::APART_TOKENS {
                many::<P, FIELDS>(codes, tiles, tokens, sums);
            } else {
                single::<P, FIELDS>(codes, tiles, tokens, sums);
            }
        }
    }
}

/// All tokens times one tile.
#[inline(always)]
unsafe fn single<P: Fields<FIELDS>, const FIELDS: usize>(
    tile: &[u8],
    tiles: &Tiles<'_>,
    tokens: &TokenCodes<'_>,
    sums: &mut [i32],
) {
    for first in (0..tokens.n_tokens).step_by(P::APART_TOKENS) {
        // SAFETY: the caller's promise.
        unsafe {
            match P::APART_TOKENS.min(tokens.n_tokens - first) {
                // A single field leaves registers for more sums.
                1 if FIELDS == 1 => apart::<P, FIELDS, 1, 4>(tile, tiles, tokens, first, sums),
                2 if FIELDS == 1 => apart::<P, FIELDS, 2, 4>(tile, tiles, tokens, first, sums),
                1 => apart::<P, FIELDS, 1, 2>(tile, tiles, tokens, first, sums),
                2 => apart::<P, FIELDS, 2, 1>(tile, tiles, tokens, first, sums),
                3 => apart::<P, FIELDS, 3, 1>(tile, tiles, tokens, first, sums),
                _ => apart::<P, FIELDS, 4, 1>(tile, tiles, tokens, first, sums),
            }
        }
    }
}

/// The tokens from `first` on times one tile, the fields summed apart. Consecutive steps go to
/// `CHAINS` sets of sums in turn, so that no addition waits for the one before.
#[inline(always)]
unsafe fn apart<P, const FIELDS: usize, const TOKENS: usize, const CHAINS: usize>(
    tile: &[u8],
    tiles: &Tiles<'_>,
    tokens: &TokenCodes<'_>,
    first: usize,
    sums: &mut [i32],
) where
    P: Fields<FIELDS>,
{
    let steps = tile.as_chunks::<STEP_BYTES>().0;
    let n_groups = tiles.n_groups();
    // SAFETY: the caller's promise; every token has columns for all steps of a tile.
    unsafe {
        for group in 0..n_groups {
            let range = group_range(tiles, group);
            let mut acc = [[[_mm512_setzero_si512(); FIELDS]; TOKENS]; CHAINS];
            let mut step = range.start;
            while step + CHAINS <= range.end {
                for acc in &mut acc {
                    add_step::<P, FIELDS, TOKENS>(acc, &steps[step], tokens, first, step);
                    step += 1;
                }
            }
            for step in step..range.end {
                add_step::<P, FIELDS, TOKENS>(&mut acc[0], &steps[step], tokens, first, step);
            }
            for t in 0..TOKENS {
                let mut total = acc[0][t];
                for acc in &acc[1..] {
                    for j in 0..FIELDS {
                        total[j] = _mm512_add_epi32(total[j], acc[t][j]);
                    }
                }
                store(P::total(total), sums, (first + t) * n_groups + group);
            }
        }
    }
}

/// One step of [`apart`].
#[inline(always)]
unsafe fn add_step<P: Fields<FIELDS>, const FIELDS: usize, const TOKENS: usize>(
    acc: &mut [[__m512i; FIELDS]; TOKENS],
    codes: &[u8; STEP_BYTES],
    tokens: &TokenCodes<'_>,
    first: usize,
    step: usize,
) {
    // SAFETY: the caller's promise; every token has columns for all steps of a tile.
    unsafe {
        let fields = P::in_place(load_ahead(codes));
        for t in 0..TOKENS {
            let x = tokens.columns::<FIELDS>(first + t, step);
            for j in 0..FIELDS {
                acc[t][j] = _mm512_dpbusd_epi32(acc[t][j], fields[j], broadcast(&x[j]));
            }
        }
    }
}

/// All tokens times one tile, more of them than are summed apart.
#[inline(always)]
unsafe fn many<P: Fields<FIELDS>, const FIELDS: usize>(
    tile: &[u8],
    tiles: &Tiles<'_>,
    tokens: &TokenCodes<'_>,
    sums: &mut [i32],
) {
    let n_blocks = tokens.n_tokens.div_ceil(BLOCK_TOKENS);
    for block in 0..n_blocks {
        let Range { start, end } = share(tokens.n_tokens, n_blocks, block);
        // SAFETY: the caller's promise.
        unsafe {
            match end - start {
                16 => in_units::<P, FIELDS, 16>(tile, tiles, tokens, start, sums),
                15 => in_units::<P, FIELDS, 15>(tile, tiles, tokens, start, sums),
                14 => in_units::<P, FIELDS, 14>(tile, tiles, tokens, start, sums),
                13 => in_units::<P, FIELDS, 13>(tile, tiles, tokens, start, sums),
                12 => in_units::<P, FIELDS, 12>(tile, tiles, tokens, start, sums),
                11 => in_units::<P, FIELDS, 11>(tile, tiles, tokens, start, sums),
                10 => in_units::<P, FIELDS, 10>(tile, tiles, tokens, start, sums),
                9 => in_units::<P, FIELDS, 9>(tile, tiles, tokens, start, sums),
                8 => in_units::<P, FIELDS, 8>(tile, tiles, tokens, start, sums),
                7 => in_units::<P, FIELDS, 7>(tile, tiles, tokens, start, sums),
                6 => in_units::<P, FIELDS, 6>(tile, tiles, tokens, start, sums),
                5 => in_units::<P, FIELDS, 5>(tile, tiles, tokens, start, sums),
                _ => in_units::<P, FIELDS, 4>(tile, tiles, tokens, start, sums),
            }
        }
    }
}

/// The tokens from `first` on times a tile.
#[inline(always)]
unsafe fn in_units<P: Fields<FIELDS>, const FIELDS: usize, const TOKENS: usize>(
    tile: &[u8],
    tiles: &Tiles<'_>,
    tokens: &TokenCodes<'_>,
    first: usize,
    sums: &mut [i32],
) {
    let n_groups = tiles.n_groups();
    let steps = tile.as_chunks::<STEP_BYTES>().0;
    // SAFETY: the caller's promise; every token has columns for all steps of a tile.
    unsafe {
        for group in 0..n_groups {
            let mut acc = [_mm512_setzero_si512(); TOKENS];
            for step in group_range(tiles, group) {
                let fields = P::units(load_ahead(&steps[step]));
                let x = tokens.columns::<FIELDS>(first, step).as_ptr();
                let mut offset = 0;
                for j in 0..FIELDS {
                    for t in 0..TOKENS {
                        let x = broadcast(&*x.byte_add(t * tokens.stride + offset));
                        acc[t] = _mm512_dpbusd_epi32(acc[t], fields[j], x);
                    }
                    offset = after(offset + 4, &mut acc[TOKENS - 1]);
                }
            }
            for t in 0..TOKENS {
                store(acc[t], sums, (first + t) * n_groups + group);
            }
        }
    }
}

/// Returns `offset`, which the compiler takes for a result of `sum`: it then cannot load what lies
/// at that offset before it has computed `sum`. Left alone it loads the activations of all fields
/// first, has no registers for them, and spills. No instruction is emitted.
#[inline]
#[target_feature(enable = "avx512f")]
fn after(offset: usize, sum: &mut __m512i) -> usize {
    let mut offset = offset;
    // SAFETY: a comment changes nothing.
    unsafe {
        asm!("/* {0} {1} */", inlateout(reg) offset, inlateout(zmm_reg) *sum,
            options(pure, nomem, nostack, preserves_flags));
    }
    offset
}

/// The steps of a group.
#[inline(always)]
fn group_range(tiles: &Tiles<'_>, group: usize) -> Range<usize> {
    group * tiles.group_steps..tiles.steps.min((group + 1) * tiles.group_steps)
}

/// A step of a tile; a line further on is asked for.
#[inline(always)]
unsafe fn load_ahead(step: &[u8; STEP_BYTES]) -> __m512i {
    prefetch(step.as_ptr().wrapping_add(PREFETCH));
    // SAFETY: the caller has AVX-512; the load reads the 64 bytes of `step`.
    unsafe { _mm512_loadu_si512(step.as_ptr().cast()) }
}

/// Four activations, for each of the 16 rows.
#[inline(always)]
unsafe fn broadcast(x: &[i8; 4]) -> __m512i {
    // SAFETY: the caller has AVX-512.
    unsafe { _mm512_set1_epi32(i32::from_ne_bytes(x.map(|x| x as u8))) }
}

/// The bits of `mask` in every byte.
#[inline(always)]
pub(super) unsafe fn mask(bytes: __m512i, mask: u8) -> __m512i {
    // SAFETY: the caller has AVX-512.
    unsafe { _mm512_and_si512(bytes, _mm512_set1_epi8(mask as i8)) }
}

/// Sixteen sums to their place.
#[inline(always)]
unsafe fn store(values: __m512i, sums: &mut [i32], at: usize) {
    let out = &mut sums.as_chunks_mut::<TILE_ROWS>().0[at];
    // SAFETY: the caller has AVX-512; the store writes the 16 numbers of `out`.
    unsafe { _mm512_storeu_si512(out.as_mut_ptr().cast(), values) }
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

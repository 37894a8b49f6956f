//! Products of unsigned bytes with signed ones, for each x86-64 instruction set: the shortlist of
//! an output head reads a quarter of a gigabyte this way for every token, so it goes in one
//! straight line through memory, with as many independent sums as hide the latency of an addition.
//!
//! To the AVX-512 sets a byte is one more packing, with a single field.

use super::avx512::{self, Fields};
use crate::kernels::{STEP_BYTES, TILE_ROWS, Tiles, TokenCodes, prefetch};
use std::arch::x86_64::*;

/// Bytes ahead of the reader that are asked for.
const PREFETCH: usize = 2048;
/// Tokens that share one pass over a tile.
const TOKENS: usize = 4;

/// Splits the tokens into passes over each tile; `$pass::<N>` multiplies `N` tokens.
macro_rules! by_tokens {
    ($pass:ident, $tiles:expr, $tokens:expr, $sums:expr) => {
        let (codes, stride) = ($tokens.codes, $tokens.stride);
        let all = $tiles.codes.chunks_exact($tiles.steps * STEP_BYTES);
        for (tile, sums) in all.zip($sums.chunks_exact_mut($tokens.n_tokens * TILE_ROWS)) {
            for (x, sums) in codes.chunks(TOKENS * stride).zip(sums.chunks_mut(TOKENS * TILE_ROWS))
            {
                match sums.len() / TILE_ROWS {
                    1 => $pass::<1>(tile, x, stride, sums),
                    2 => $pass::<2>(tile, x, stride, sums),
                    3 => $pass::<3>(tile, x, stride, sums),
                    _ => $pass::<4>(tile, x, stride, sums),
                }
            }
        }
    };
}

/// Two registers of eight rows; `$add` is the multiply-accumulate.
macro_rules! pass256 {
    ($n:ident, $tile:expr, $x:expr, $stride:expr, $sums:expr, $add:expr) => {
        let mut acc = [[_mm256_setzero_si256(); 2]; $n];
        for (step, bytes) in $tile.as_chunks::<STEP_BYTES>().0.iter().enumerate() {
            prefetch(bytes.as_ptr().wrapping_add(PREFETCH));
            for half in 0..2 {
                // SAFETY: the load reads 32 of the 64 bytes of the step.
                let codes = unsafe { _mm256_loadu_si256(bytes.as_ptr().add(32 * half).cast()) };
                for (t, acc) in acc.iter_mut().enumerate() {
                    let x = _mm256_set1_epi32(step_of($x, $stride, t, step));
                    acc[half] = $add(acc[half], codes, x);
                }
            }
        }
        for (sums, acc) in $sums.as_chunks_mut::<TILE_ROWS>().0.iter_mut().zip(acc) {
            for (sums, acc) in sums.as_chunks_mut::<8>().0.iter_mut().zip(acc) {
                // SAFETY: the store writes the 8 sums.
                unsafe { _mm256_storeu_si256(sums.as_mut_ptr().cast(), acc) };
            }
        }
    };
}
/// The four activations of a step, for every row.
#[inline(always)]
fn step_of(x: &[i8], stride: usize, token: usize, step: usize) -> i32 {
    let columns = &x[token * stride + 4 * step..][..4];
    i32::from_ne_bytes([columns[0] as u8, columns[1] as u8, columns[2] as u8, columns[3] as u8])
}

#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512vnni")]
pub(super) fn avx512vnni(tiles: &Tiles<'_>, tokens: &TokenCodes<'_>, sums: &mut [i32]) {
    // SAFETY: this function has the features; `Kernels::byte_products` has checked the lengths.
    unsafe { avx512::products::<Bytes, 1>(tiles, tokens, sums) }
}

/// A byte is its own code.
struct Bytes;

impl Fields<1> for Bytes {
    const APART_TOKENS: usize = 4;

    #[inline(always)]
    unsafe fn in_place(step: __m512i) -> [__m512i; 1] {
        [step]
    }

    #[inline(always)]
    unsafe fn total([sums]: [__m512i; 1]) -> __m512i {
        sums
    }

    #[inline(always)]
    unsafe fn units(step: __m512i) -> [__m512i; 1] {
        [step]
    }
}

#[target_feature(enable = "avxvnni,avx2")]
pub(super) fn avxvnni(tiles: &Tiles<'_>, tokens: &TokenCodes<'_>, sums: &mut [i32]) {
    by_tokens!(pass256_vnni, tiles, tokens, sums);
}

#[target_feature(enable = "avxvnni,avx2")]
fn pass256_vnni<const N: usize>(tile: &[u8], x: &[i8], stride: usize, sums: &mut [i32]) {
    let add = |acc: __m256i, codes: __m256i, x: __m256i| _mm256_dpbusd_avx_epi32(acc, codes, x);
    pass256!(N, tile, x, stride, sums, add);
}

#[target_feature(enable = "avx2")]
pub(super) fn avx2(tiles: &Tiles<'_>, tokens: &TokenCodes<'_>, sums: &mut [i32]) {
    by_tokens!(pass256_plain, tiles, tokens, sums);
}

#[target_feature(enable = "avx2")]
fn pass256_plain<const N: usize>(tile: &[u8], x: &[i8], stride: usize, sums: &mut [i32]) {
    // `maddubs` would saturate: 2 · 255 · 128 is beyond 16 bits. Even and odd bytes are widened to
    // 16 bits instead and multiplied in pairs, (0, 2) and (1, 3).
    let low = _mm256_set1_epi16(0xff);
    let add = |acc: __m256i, codes: __m256i, x: __m256i| {
        let even = _mm256_and_si256(codes, low);
        let odd = _mm256_srli_epi16::<8>(codes);
        let x_even = _mm256_srai_epi16::<8>(_mm256_slli_epi16::<8>(x));
        let x_odd = _mm256_srai_epi16::<8>(x);
        let products = _mm256_madd_epi16(even, x_even);
        _mm256_add_epi32(_mm256_add_epi32(acc, products), _mm256_madd_epi16(odd, x_odd))
    };
    pass256!(N, tile, x, stride, sums, add);
}

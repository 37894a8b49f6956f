//! AVX2: `vpmaddubsw` multiplies 32 codes by 32 activations and adds neighbours to 16-bit sums.
//!
//! A step of a tile is two registers of eight rows. The four fields of a step add at most
//! 4 · 2 · 3 · 128 = 3072 to a 16-bit sum, so ten steps fit before the sums must be widened, and
//! nothing ever saturates.

use crate::cpu::attend;
use crate::kernels::float::{self, Lanes};
use crate::kernels::quantized::TokenCodes;
use crate::kernels::{FloatTile, Kernels, STEP_BYTES, STEP_COLS, TILE_ROWS, Tiles, prefetch};
use crate::threads::share;
use std::arch::x86_64::*;

pub(in crate::kernels) static AVX2: Kernels = Kernels {
    name: "avx2",
    supported,
    products,
    rescale,
    quantize,
    norm,
    gate,
    pack_tile,
    trits: None,
    float_products,
    byte_products: super::bytes::avx2,
    wide_products: super::wide::avx2,
    round_rows,
    noise,
    attention: &attend::AVX2,
    mac_loop,
};

pub(super) fn supported() -> bool {
    is_x86_feature_detected!("avx2") && is_x86_feature_detected!("f16c")
}

/// Bytes ahead of the reader that are asked for: the memory's latency times its bandwidth.
pub(super) const PREFETCH: usize = 2048;
/// Most tokens whose sums stay in registers.
const BLOCK_TOKENS: usize = 4;
/// Steps until 16-bit sums are widened.
const NARROW_STEPS: usize = 10;
const _: () = assert!(NARROW_STEPS * 4 * 2 * 3 * 128 <= i16::MAX as usize);

#[target_feature(enable = "avx2,f16c")]
fn products(tiles: &Tiles<'_>, tokens: &TokenCodes<'_>, sums: &mut [i32]) {
    let tile_sums = tokens.n_tokens * tiles.n_groups() * TILE_ROWS;
    let all = tiles.codes.chunks_exact(tiles.steps * STEP_BYTES);
    let n_blocks = tokens.n_tokens.div_ceil(BLOCK_TOKENS);
    for (tile, sums) in all.zip(sums.chunks_mut(tile_sums)) {
        for block in 0..n_blocks {
            let block = share(tokens.n_tokens, n_blocks, block);
            match block.len() {
                1 => tokens_of::<1>(tile, tiles.group_steps, tokens, block.start, sums),
                2 => tokens_of::<2>(tile, tiles.group_steps, tokens, block.start, sums),
                3 => tokens_of::<3>(tile, tiles.group_steps, tokens, block.start, sums),
                _ => tokens_of::<4>(tile, tiles.group_steps, tokens, block.start, sums),
            }
        }
    }
}

/// The tokens from `first` on times one tile.
#[target_feature(enable = "avx2,f16c")]
fn tokens_of<const TOKENS: usize>(
    tile: &[u8],
    group_steps: usize,
    tokens: &TokenCodes<'_>,
    first: usize,
    sums: &mut [i32],
) {
    let steps = tile.as_chunks::<STEP_BYTES>().0;
    let n_groups = steps.len().div_ceil(group_steps);
    let (three, ones) = (_mm256_set1_epi8(3), _mm256_set1_epi16(1));
    for group in 0..n_groups {
        let range = group * group_steps..steps.len().min((group + 1) * group_steps);
        let mut wide = [[_mm256_setzero_si256(); 2]; TOKENS];
        for start in range.clone().step_by(NARROW_STEPS) {
            let mut narrow = [[_mm256_setzero_si256(); 2]; TOKENS];
            for step in start..range.end.min(start + NARROW_STEPS) {
                let mut codes = load_ahead(&steps[step]);
                for j in 0..4 {
                    let fields = codes.map(|codes| _mm256_and_si256(codes, three));
                    codes = codes.map(|codes| _mm256_srli_epi16::<2>(codes));
                    for t in 0..TOKENS {
                        // SAFETY: `Kernels::products` has checked that every token has columns for
                        // all steps of a tile.
                        let x = broadcast(&unsafe { tokens.columns::<4>(first + t, step) }[j]);
                        for half in 0..2 {
                            let pairs = _mm256_maddubs_epi16(fields[half], x);
                            narrow[t][half] = _mm256_add_epi16(narrow[t][half], pairs);
                        }
                    }
                }
            }
            for (wide, narrow) in wide.iter_mut().flatten().zip(narrow.iter().flatten()) {
                *wide = _mm256_add_epi32(*wide, _mm256_madd_epi16(*narrow, ones));
            }
        }
        for t in 0..TOKENS {
            store(wide[t], sums, (first + t) * n_groups + group);
        }
    }
}

/// A step of a tile, rows 0–7 and 8–15; the line [`PREFETCH`] bytes further is asked for.
#[target_feature(enable = "avx2,f16c")]
#[inline]
pub(super) fn load_ahead(step: &[u8; STEP_BYTES]) -> [__m256i; 2] {
    let [low, high] = [&step[..32], &step[32..]];
    prefetch(step.as_ptr().wrapping_add(PREFETCH));
    // SAFETY: each load reads the 32 bytes of a slice.
    unsafe { [_mm256_loadu_si256(low.as_ptr().cast()), _mm256_loadu_si256(high.as_ptr().cast())] }
}

/// Four activations, for each of eight rows.
#[target_feature(enable = "avx2,f16c")]
#[inline]
pub(super) fn broadcast(x: &[i8; 4]) -> __m256i {
    _mm256_set1_epi32(i32::from_ne_bytes(x.map(|x| x as u8)))
}

/// Sixteen sums to their place.
#[target_feature(enable = "avx2,f16c")]
#[inline]
pub(super) fn store([low, high]: [__m256i; 2], sums: &mut [i32], at: usize) {
    let out = sums.as_chunks_mut::<TILE_ROWS>().0[at].as_mut_ptr();
    // SAFETY: the stores write the 16 numbers from `out` on.
    unsafe {
        _mm256_storeu_si256(out.cast(), low);
        _mm256_storeu_si256(out.add(8).cast(), high);
    }
}

float_parts!("avx2,f16c");

#[target_feature(enable = "avx2,f16c")]
pub(super) fn pack_tile(codes: &[u8], out: &mut [u8]) {
    let cols = codes.len() / TILE_ROWS;
    // Doubleword j of a row's 16 codes is field j of the row's word: shifted up by 2j and joined.
    let shifts = _mm256_setr_epi32(0, 2, 4, 6, 0, 2, 4, 6);
    let order = _mm256_setr_epi32(0, 4, 1, 5, 2, 6, 3, 7);
    for (i, step) in out.as_chunks_mut::<STEP_BYTES>().0.iter_mut().enumerate() {
        for (half, out) in step.chunks_exact_mut(32).enumerate() {
            // Two rows a register, a row to each 128-bit lane.
            let rows: [__m256i; 4] = std::array::from_fn(|pair| {
                let row = |r: usize| {
                    let row = 8 * half + 2 * pair + r;
                    let codes = &codes[row * cols + i * STEP_COLS..][..STEP_COLS];
                    // SAFETY: the load reads the 16 bytes of the slice.
                    unsafe { _mm_loadu_si128(codes.as_ptr().cast()) }
                };
                let rows = _mm256_inserti128_si256::<1>(_mm256_castsi128_si256(row(0)), row(1));
                _mm256_sllv_epi32(_mm256_and_si256(rows, _mm256_set1_epi8(3)), shifts)
            });
            // Or the four doublewords of each lane together: transpose twice by halves.
            let or = |a: __m256i, b: __m256i| {
                _mm256_or_si256(_mm256_unpacklo_epi32(a, b), _mm256_unpackhi_epi32(a, b))
            };
            let (ab, cd) = (or(rows[0], rows[1]), or(rows[2], rows[3]));
            let joined =
                _mm256_or_si256(_mm256_unpacklo_epi64(ab, cd), _mm256_unpackhi_epi64(ab, cd));
            // The lanes hold rows 0 2 4 6 and 1 3 5 7; rows go in order.
            let words = _mm256_permutevar8x32_epi32(joined, order);
            // SAFETY: the store writes the 32 bytes of `out`.
            unsafe { _mm256_storeu_si256(out.as_mut_ptr().cast(), words) };
        }
    }
}

#[target_feature(enable = "avx2,f16c")]
pub(super) fn float_products(tile: &FloatTile<'_>, x: &[f32], n_tokens: usize, out: &mut [f32]) {
    // SAFETY: this function has the features that the methods of `Pair` need.
    unsafe { float::products::<Pair, 2, 2>(tile, x, n_tokens, out) }
}

/// Sixteen lanes in two registers.
#[derive(Clone, Copy)]
struct Pair(__m256, __m256);

impl Lanes for Pair {
    #[inline(always)]
    unsafe fn zero() -> Self {
        // SAFETY: the caller has AVX2.
        unsafe { Self(_mm256_setzero_ps(), _mm256_setzero_ps()) }
    }

    #[inline(always)]
    unsafe fn f32s(bytes: &[u8; 64]) -> Self {
        let p = bytes.as_ptr().cast::<f32>();
        // SAFETY: as above; the loads read the 64 bytes.
        unsafe { Self(_mm256_loadu_ps(p), _mm256_loadu_ps(p.add(8))) }
    }

    #[inline(always)]
    unsafe fn f16s(bytes: &[u8; 32]) -> Self {
        let p = bytes.as_ptr().cast::<__m128i>();
        // SAFETY: as above, and F16C; the loads read the 32 bytes.
        unsafe {
            Self(_mm256_cvtph_ps(_mm_loadu_si128(p)), _mm256_cvtph_ps(_mm_loadu_si128(p.add(1))))
        }
    }

    #[inline(always)]
    unsafe fn bf16s(bytes: &[u8; 32]) -> Self {
        let p = bytes.as_ptr().cast::<__m128i>();
        // SAFETY: as above; the loads read the 32 bytes.
        unsafe {
            let widen = |halves| {
                _mm256_castsi256_ps(_mm256_slli_epi32::<16>(_mm256_cvtepu16_epi32(halves)))
            };
            Self(widen(_mm_loadu_si128(p)), widen(_mm_loadu_si128(p.add(1))))
        }
    }

    #[inline(always)]
    unsafe fn add_product(self, a: Self, b: Self) -> Self {
        // SAFETY: as above.
        unsafe {
            Self(
                _mm256_add_ps(self.0, _mm256_mul_ps(a.0, b.0)),
                _mm256_add_ps(self.1, _mm256_mul_ps(a.1, b.1)),
            )
        }
    }

    #[inline(always)]
    unsafe fn to_array(self) -> [f32; 16] {
        let mut lanes = [0.0; 16];
        // SAFETY: as above; the stores write the 16 numbers.
        unsafe {
            _mm256_storeu_ps(lanes.as_mut_ptr(), self.0);
            _mm256_storeu_ps(lanes.as_mut_ptr().add(8), self.1);
        }
        lanes
    }
}

#[target_feature(enable = "avx2,f16c")]
fn mac_loop(rounds: u64) -> u64 {
    // In assembly, because the compiler would see that every round multiplies the same.
    const SUMS: u64 = 8;
    let (codes, x) = (_mm256_set1_epi8(1), _mm256_set1_epi8(1));
    for _ in 0..rounds {
        // SAFETY: arithmetic on registers that the compiler is told about; the CPU has AVX2.
        unsafe {
            std::arch::asm!(
                "vpmaddubsw {p}, {c}, {x}", "vpaddw {s0}, {s0}, {p}",
                "vpmaddubsw {q}, {c}, {x}", "vpaddw {s1}, {s1}, {q}",
                "vpmaddubsw {p}, {c}, {x}", "vpaddw {s2}, {s2}, {p}",
                "vpmaddubsw {q}, {c}, {x}", "vpaddw {s3}, {s3}, {q}",
                "vpmaddubsw {p}, {c}, {x}", "vpaddw {s4}, {s4}, {p}",
                "vpmaddubsw {q}, {c}, {x}", "vpaddw {s5}, {s5}, {q}",
                "vpmaddubsw {p}, {c}, {x}", "vpaddw {s6}, {s6}, {p}",
                "vpmaddubsw {q}, {c}, {x}", "vpaddw {s7}, {s7}, {q}",
                c = in(ymm_reg) codes,
                x = in(ymm_reg) x,
                p = out(ymm_reg) _,
                q = out(ymm_reg) _,
                s0 = out(ymm_reg) _,
                s1 = out(ymm_reg) _,
                s2 = out(ymm_reg) _,
                s3 = out(ymm_reg) _,
                s4 = out(ymm_reg) _,
                s5 = out(ymm_reg) _,
                s6 = out(ymm_reg) _,
                s7 = out(ymm_reg) _,
                options(nomem, nostack, preserves_flags),
            );
        }
    }
    32 * SUMS
}

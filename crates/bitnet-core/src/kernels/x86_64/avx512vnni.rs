//! AVX-512 with VNNI, on two-bit codes.

use super::avx512::{self, Fields, mask};
use crate::cpu::attend;
use crate::kernels::float;
use crate::kernels::quantized::TokenCodes;
use crate::kernels::{FloatTile, Kernels, Tiles};
use std::arch::x86_64::*;
use std::hint::black_box;

pub(in crate::kernels) static AVX512VNNI: Kernels = Kernels {
    name: "avx512vnni",
    supported,
    products,
    rescale,
    quantize,
    norm,
    gate,
    pack_tile: super::avx2::pack_tile,
    trits: None,
    float_products,
    byte_products: super::bytes::avx512vnni,
    wide_products: super::wide::avx512vnni,
    round_rows,
    noise,
    attention: &attend::AVX512VNNI,
    mac_loop,
};

pub(super) fn supported() -> bool {
    is_x86_feature_detected!("avx512f")
        && is_x86_feature_detected!("avx512bw")
        && is_x86_feature_detected!("avx512vl")
        && is_x86_feature_detected!("avx512vnni")
        && is_x86_feature_detected!("avx2")
        && is_x86_feature_detected!("f16c")
}

#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512vnni,avx2,f16c")]
pub(super) fn products(tiles: &Tiles<'_>, tokens: &TokenCodes<'_>, sums: &mut [i32]) {
    // SAFETY: this function has the features; `Kernels::products` has checked the lengths.
    unsafe { avx512::products::<Codes, 4>(tiles, tokens, sums) }
}

/// Two-bit codes: field `j` is worth 4ʲ.
struct Codes;

impl Fields<4> for Codes {
    const APART_TOKENS: usize = 4;

    #[inline(always)]
    unsafe fn in_place(step: __m512i) -> [__m512i; 4] {
        // SAFETY: the caller has AVX-512.
        unsafe { [mask(step, 0x03), mask(step, 0x0c), mask(step, 0x30), mask(step, 0xc0)] }
    }

    #[inline(always)]
    unsafe fn total([a, b, c, d]: [__m512i; 4]) -> __m512i {
        // SAFETY: as above.
        unsafe {
            let low = _mm512_add_epi32(a, _mm512_srai_epi32::<2>(b));
            let high = _mm512_add_epi32(_mm512_srai_epi32::<4>(c), _mm512_srai_epi32::<6>(d));
            _mm512_add_epi32(low, high)
        }
    }

    #[inline(always)]
    unsafe fn units(step: __m512i) -> [__m512i; 4] {
        // SAFETY: as above.
        unsafe {
            [
                mask(step, 3),
                mask(_mm512_srli_epi16::<2>(step), 3),
                mask(_mm512_srli_epi16::<4>(step), 3),
                mask(_mm512_srli_epi16::<6>(step), 3),
            ]
        }
    }
}

float_parts!("avx512f,avx512bw,avx512vl,avx512vnni,avx2,f16c");

#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512vnni,avx2,f16c")]
pub(super) fn float_products(tile: &FloatTile<'_>, x: &[f32], n_tokens: usize, out: &mut [f32]) {
    // SAFETY: this function has the features that the methods of `__m512` need.
    unsafe { float::products::<__m512, 4, 4>(tile, x, n_tokens, out) }
}

#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512vnni,avx2,f16c")]
pub(super) fn mac_loop(rounds: u64) -> u64 {
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

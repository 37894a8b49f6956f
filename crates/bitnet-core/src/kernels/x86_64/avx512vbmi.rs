//! AVX-512 with VNNI and VBMI, on trits: 1.6 bits a weight, a fifth less to read than codes.
//!
//! A byte is `idx + 81·t` with `idx < 81` the first four digits and `t` the fifth. One `vpermi2b`
//! looks the two-bit codes of `idx` up in a table of 128 entries. Everything else is the VNNI set's.

use super::avx512::{self, Fields, mask};
use super::avx512vnni::{
    self, float_products, gate, mac_loop, noise, norm, products, quantize, rescale, round_rows,
};
use crate::cpu::attend;
use crate::kernels::quantized::TokenCodes;
use crate::kernels::{Kernels, Packing, STEP_BYTES, TILE_ROWS, Tiles};
use std::arch::x86_64::*;

pub(in crate::kernels) static AVX512VBMI: Kernels = Kernels {
    name: "avx512vbmi",
    supported: || avx512vnni::supported() && is_x86_feature_detected!("avx512vbmi"),
    products,
    rescale,
    quantize,
    norm,
    gate,
    pack_tile: super::avx2::pack_tile,
    trits: Some((trit_products, pack_trits)),
    float_products,
    byte_products: super::bytes::avx512vnni,
    wide_products: super::wide::avx512vnni,
    round_rows,
    noise,
    attention: &attend::AVX512VNNI,
    mac_loop,
};

/// The two-bit codes of four base-3 digits, the lowest digit in the lowest bits.
const CODES: [u8; 128] = {
    let mut codes = [0; 128];
    let mut idx = 0;
    while idx < 81 {
        let digits = [idx % 3, idx / 3 % 3, idx / 9 % 3, idx / 27];
        codes[idx] = (digits[0] | (digits[1] << 2) | (digits[2] << 4) | (digits[3] << 6)) as u8;
        idx += 1;
    }
    codes
};

#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512vnni,avx512vbmi,avx2,f16c")]
fn trit_products(tiles: &Tiles<'_>, tokens: &TokenCodes<'_>, sums: &mut [i32]) {
    // SAFETY: this function has the features; `Kernels::products` has checked the lengths.
    unsafe { avx512::products::<Trits, 5>(tiles, tokens, sums) }
}

/// Base-3 digits: fields 0–3 as two-bit codes, field 4 as 81 times the digit.
struct Trits;

impl Trits {
    /// The two-bit codes of four digits, and 81 times the fifth.
    #[inline(always)]
    unsafe fn split(step: __m512i) -> (__m512i, __m512i) {
        // SAFETY: the caller has AVX-512 VBMI; the loads read the two halves of the table.
        unsafe {
            // Below 0 the differences wrap to more than the byte itself.
            let one = _mm512_sub_epi8(step, _mm512_set1_epi8(81));
            let two = _mm512_sub_epi8(step, _mm512_set1_epi8(162u8 as i8));
            let idx = _mm512_min_epu8(_mm512_min_epu8(step, one), two);
            let low = _mm512_loadu_si512(CODES.as_ptr().cast());
            let high = _mm512_loadu_si512(CODES.as_ptr().add(64).cast());
            (_mm512_permutex2var_epi8(low, idx, high), _mm512_sub_epi8(step, idx))
        }
    }
}

impl Fields<5> for Trits {
    const APART_TOKENS: usize = 3;

    #[inline(always)]
    unsafe fn in_place(step: __m512i) -> [__m512i; 5] {
        // SAFETY: the caller has AVX-512 VBMI.
        unsafe {
            let (codes, fifth) = Self::split(step);
            [mask(codes, 0x03), mask(codes, 0x0c), mask(codes, 0x30), mask(codes, 0xc0), fifth]
        }
    }

    #[inline(always)]
    unsafe fn total([a, b, c, d, e]: [__m512i; 5]) -> __m512i {
        /// 81 · this = 1 modulo 2³², so that multiplying by it divides a multiple of 81.
        const INVERSE_OF_81: i32 = 0x7819_48b1;
        const _: () = assert!(81i32.wrapping_mul(INVERSE_OF_81) == 1);
        // SAFETY: as above.
        unsafe {
            let low = _mm512_add_epi32(a, _mm512_srai_epi32::<2>(b));
            let high = _mm512_add_epi32(_mm512_srai_epi32::<4>(c), _mm512_srai_epi32::<6>(d));
            let fifth = _mm512_mullo_epi32(e, _mm512_set1_epi32(INVERSE_OF_81));
            _mm512_add_epi32(_mm512_add_epi32(low, high), fifth)
        }
    }

    #[inline(always)]
    unsafe fn units(step: __m512i) -> [__m512i; 5] {
        // SAFETY: as above.
        unsafe {
            let (codes, fifth) = Self::split(step);
            [
                mask(codes, 3),
                mask(_mm512_srli_epi16::<2>(codes), 3),
                mask(_mm512_srli_epi16::<4>(codes), 3),
                mask(_mm512_srli_epi16::<6>(codes), 3),
                // 81 and 162 end in the bits 01 and 10.
                mask(fifth, 3),
            ]
        }
    }
}

#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512vbmi")]
fn pack_trits(codes: &[u8], out: &mut [u8]) {
    const COLS: usize = Packing::Trits.step_cols();
    let cols = codes.len() / TILE_ROWS;
    let rows = _mm512_mullo_epi32(
        _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15),
        _mm512_set1_epi32(cols as i32),
    );
    for (i, step) in out.as_chunks_mut::<STEP_BYTES>().0.iter_mut().enumerate() {
        let mut digits = _mm512_setzero_si512();
        for field in (0..5).rev() {
            // SAFETY: the gather reads four codes of each of 16 rows, columns below `cols`; a tile
            // is far smaller than the 2 GiB that offsets of 32 bits reach.
            let columns = unsafe {
                let at = codes.as_ptr().add(i * COLS + 4 * field);
                _mm512_i32gather_epi32::<1>(rows, at.cast())
            };
            let tripled = _mm512_add_epi8(_mm512_add_epi8(digits, digits), digits);
            digits = _mm512_add_epi8(tripled, columns);
        }
        // SAFETY: the store writes the 64 bytes of `step`.
        unsafe { _mm512_storeu_si512(step.as_mut_ptr().cast(), digits) };
    }
}

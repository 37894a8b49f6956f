//! The operations of [`Simd`] in AVX2 (with F16C) and AVX-512 (with VNNI).

use super::simd::{Quad, Quads, Simd, encode_as_i16};
use crate::cpu::math::{LANES, Lanes};
use std::arch::x86_64::*;

/// AVX2 and F16C: 16 lanes are two registers.
#[derive(Clone, Copy)]
pub(super) struct Avx2(());

impl Avx2 {
    /// # Safety
    /// The CPU has AVX2 and F16C.
    #[inline(always)]
    pub(super) unsafe fn new() -> Self {
        Self(())
    }
}

// SAFETY, for every block in this impl: an `Avx2` exists only where its creator vouched for AVX2
// and F16C; unaligned loads and stores touch exactly the arrays they are given.
impl Simd for Avx2 {
    const WIDE: bool = false;

    type Floats = [__m256; 2];

    #[inline(always)]
    fn splat(self, x: f32) -> Self::Floats {
        // SAFETY: see the impl.
        unsafe { [_mm256_set1_ps(x); 2] }
    }

    #[inline(always)]
    fn load_f32(self, bytes: &[u8; 64]) -> Self::Floats {
        let start = bytes.as_ptr().cast::<f32>();
        // SAFETY: see the impl.
        unsafe { [_mm256_loadu_ps(start), _mm256_loadu_ps(start.add(8))] }
    }

    #[inline(always)]
    fn load_f16(self, bytes: &[u8; 32]) -> Self::Floats {
        let start = bytes.as_ptr().cast::<__m128i>();
        // SAFETY: see the impl.
        unsafe {
            [
                _mm256_cvtph_ps(_mm_loadu_si128(start)),
                _mm256_cvtph_ps(_mm_loadu_si128(start.add(1))),
            ]
        }
    }

    #[inline(always)]
    fn store(self, x: Self::Floats, out: &mut Lanes) {
        // SAFETY: see the impl.
        unsafe {
            _mm256_storeu_ps(out.as_mut_ptr(), x[0]);
            _mm256_storeu_ps(out.as_mut_ptr().add(8), x[1]);
        }
    }

    #[inline(always)]
    fn add_product(self, sum: Self::Floats, a: Self::Floats, b: Self::Floats) -> Self::Floats {
        // SAFETY: see the impl.
        unsafe {
            [
                _mm256_add_ps(sum[0], _mm256_mul_ps(a[0], b[0])),
                _mm256_add_ps(sum[1], _mm256_mul_ps(a[1], b[1])),
            ]
        }
    }

    /// 16-bit numbers: the product of bytes with the instruction made for them would saturate.
    type Bytes = [__m256i; 4];

    #[inline(always)]
    fn load_bytes(self, bytes: &[u8; 64]) -> Self::Bytes {
        let start = bytes.as_ptr().cast::<__m128i>();
        // SAFETY: see the impl.
        unsafe {
            [
                _mm256_cvtepu8_epi16(_mm_loadu_si128(start)),
                _mm256_cvtepu8_epi16(_mm_loadu_si128(start.add(1))),
                _mm256_cvtepu8_epi16(_mm_loadu_si128(start.add(2))),
                _mm256_cvtepu8_epi16(_mm_loadu_si128(start.add(3))),
            ]
        }
    }

    /// Two partial sums a lane.
    type Sums = [__m256i; 4];

    #[inline(always)]
    fn no_sums(self) -> Self::Sums {
        // SAFETY: see the impl.
        unsafe { [_mm256_setzero_si256(); 4] }
    }

    #[inline(always)]
    fn add_quad(self, sums: Self::Sums, bytes: Self::Bytes, quad: &Quad) -> Self::Sums {
        // SAFETY: see the impl.
        unsafe {
            let weights = _mm256_set1_epi64x(i64::from_le_bytes(*quad));
            std::array::from_fn(|i| _mm256_add_epi32(sums[i], _mm256_madd_epi16(bytes[i], weights)))
        }
    }

    #[inline(always)]
    fn finish(self, sums: Self::Sums) -> [i32; LANES] {
        let mut out = [0; LANES];
        for (out, sums) in out.chunks_exact_mut(8).zip(sums.chunks_exact(2)) {
            // SAFETY: see the impl; `out` has 8 elements.
            unsafe {
                // The horizontal addition works within 128-bit halves; the permutation restores
                // the order of the lanes.
                let mixed = _mm256_hadd_epi32(sums[0], sums[1]);
                let ordered = _mm256_permute4x64_epi64::<0b11_01_10_00>(mixed);
                _mm256_storeu_si256(out.as_mut_ptr().cast(), ordered);
            }
        }
        out
    }

    #[inline(always)]
    fn encode(self, factors: &[i32; LANES]) -> Quads {
        encode_as_i16(factors)
    }

    #[inline(always)]
    fn prefetch(self, bytes: &[u8], nearest: bool) {
        prefetch(bytes, nearest);
    }
}

/// AVX-512 F, BW and VNNI: 16 lanes are one register.
#[derive(Clone, Copy)]
pub(super) struct Avx512(());

impl Avx512 {
    /// # Safety
    /// The CPU has AVX-512 F, BW and VNNI.
    #[inline(always)]
    pub(super) unsafe fn new() -> Self {
        Self(())
    }
}

// SAFETY, for every block in this impl: an `Avx512` exists only where its creator vouched for
// AVX-512 F, BW and VNNI; unaligned loads and stores touch exactly the arrays they are given.
impl Simd for Avx512 {
    const WIDE: bool = true;

    type Floats = __m512;

    #[inline(always)]
    fn splat(self, x: f32) -> __m512 {
        // SAFETY: see the impl.
        unsafe { _mm512_set1_ps(x) }
    }

    #[inline(always)]
    fn load_f32(self, bytes: &[u8; 64]) -> __m512 {
        // SAFETY: see the impl.
        unsafe { _mm512_loadu_ps(bytes.as_ptr().cast()) }
    }

    #[inline(always)]
    fn load_f16(self, bytes: &[u8; 32]) -> __m512 {
        // SAFETY: see the impl.
        unsafe { _mm512_cvtph_ps(_mm256_loadu_si256(bytes.as_ptr().cast())) }
    }

    #[inline(always)]
    fn store(self, x: __m512, out: &mut Lanes) {
        // SAFETY: see the impl.
        unsafe { _mm512_storeu_ps(out.as_mut_ptr(), x) }
    }

    #[inline(always)]
    fn add_product(self, sum: __m512, a: __m512, b: __m512) -> __m512 {
        // SAFETY: see the impl.
        unsafe { _mm512_add_ps(sum, _mm512_mul_ps(a, b)) }
    }

    type Bytes = __m512i;

    #[inline(always)]
    fn load_bytes(self, bytes: &[u8; 64]) -> __m512i {
        // SAFETY: see the impl.
        unsafe { _mm512_loadu_si512(bytes.as_ptr().cast()) }
    }

    /// Sums with the high bytes of the weights, and with the low ones.
    type Sums = [__m512i; 2];

    #[inline(always)]
    fn no_sums(self) -> Self::Sums {
        // SAFETY: see the impl.
        unsafe { [_mm512_setzero_si512(); 2] }
    }

    #[inline(always)]
    fn add_quad(self, sums: Self::Sums, bytes: __m512i, quad: &Quad) -> Self::Sums {
        let [h0, h1, h2, h3, l0, l1, l2, l3] = *quad;
        // SAFETY: see the impl.
        unsafe {
            let high = _mm512_set1_epi32(i32::from_le_bytes([h0, h1, h2, h3]));
            let low = _mm512_set1_epi32(i32::from_le_bytes([l0, l1, l2, l3]));
            [_mm512_dpbusd_epi32(sums[0], bytes, high), _mm512_dpbusd_epi32(sums[1], bytes, low)]
        }
    }

    #[inline(always)]
    fn finish(self, sums: Self::Sums) -> [i32; LANES] {
        let mut out = [0; LANES];
        // SAFETY: see the impl.
        unsafe {
            let sum = _mm512_add_epi32(_mm512_slli_epi32::<8>(sums[0]), sums[1]);
            _mm512_storeu_si512(out.as_mut_ptr().cast(), sum);
        }
        out
    }

    /// Four high bytes, then four low ones: `factor = 256 · high + low`, both signed.
    #[inline(always)]
    fn encode(self, factors: &[i32; LANES]) -> Quads {
        let mut quads = [[0; 8]; 4];
        // SAFETY: see the impl; the quads are 32 bytes.
        unsafe {
            let factors = _mm512_loadu_si512(factors.as_ptr().cast());
            let rounded = _mm512_add_epi32(factors, _mm512_set1_epi32(128));
            let high = _mm512_cvtepi32_epi8(_mm512_srai_epi32::<8>(rounded));
            let low = _mm512_cvtepi32_epi8(factors);
            let out = quads.as_mut_ptr().cast::<__m128i>();
            _mm_storeu_si128(out, _mm_unpacklo_epi32(high, low));
            _mm_storeu_si128(out.add(1), _mm_unpackhi_epi32(high, low));
        }
        quads
    }
    #[inline(always)]
    fn prefetch(self, bytes: &[u8], nearest: bool) {
        prefetch(bytes, nearest);
    }
}

/// Asks for every cache line of `bytes`.
#[inline(always)]
fn prefetch(bytes: &[u8], nearest: bool) {
    for line in bytes.chunks(64) {
        let start = line.as_ptr().cast();
        // SAFETY: a prefetch reads nothing that the program could see.
        unsafe {
            match nearest {
                true => _mm_prefetch::<_MM_HINT_T0>(start),
                false => _mm_prefetch::<_MM_HINT_T1>(start),
            }
        }
    }
}

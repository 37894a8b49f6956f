//! The vector operations attention is written in, and their portable form.
//!
//! A [`Simd`] value is a token that its instruction set is there; its operations work on 16 lanes,
//! whatever the width of a register. Float operations round once each, so every set gives the
//! same bits; integer sums are exact. Knows no heads or positions.

use crate::cpu::math::{LANES, Lanes};

/// Factors of four consecutive terms of an integer sum, 16 bits each, as one set wants them.
pub(super) type Quad = [u8; 8];
/// Factors of 16 terms.
pub(super) type Quads = [Quad; 4];
/// 16 × 16 unsigned bytes: four rows of four terms in 16 lanes.
pub(super) type Panel = [u8; 256];

/// The largest magnitude of an integer factor: its high byte, after the low one is rounded off,
/// still fits 8 bits with a sign.
pub(super) const WEIGHT_MAX: f32 = 32_639.0;

/// Operations on 16 lanes.
pub(super) trait Simd: Copy {
    /// Whether eight 16-lane sums fit the registers beside their operands.
    const WIDE: bool;

    /// 16 f32.
    type Floats: Copy;
    fn splat(self, x: f32) -> Self::Floats;
    /// 16 little-endian f32.
    fn load_f32(self, bytes: &[u8; 64]) -> Self::Floats;
    /// 16 little-endian halves, exactly.
    fn load_f16(self, bytes: &[u8; 32]) -> Self::Floats;
    fn store(self, x: Self::Floats, out: &mut Lanes);
    /// `sum + a · b`, the product rounded before it is added.
    fn add_product(self, sum: Self::Floats, a: Self::Floats, b: Self::Floats) -> Self::Floats;

    /// 16 × 4 unsigned bytes, ready to be multiplied.
    type Bytes: Copy;
    fn load_bytes(self, bytes: &[u8; 64]) -> Self::Bytes;
    /// 16 integer sums, perhaps in parts.
    type Sums: Copy;
    fn no_sums(self) -> Self::Sums;
    /// Lane `i`: `sum + Σ_k bytes[4i + k] · quad[k]`, modulo 2³².
    fn add_quad(self, sums: Self::Sums, bytes: Self::Bytes, quad: &Quad) -> Self::Sums;
    fn finish(self, sums: Self::Sums) -> [i32; LANES];
    /// Integer factors, at most [`WEIGHT_MAX`] in magnitude, as quads.
    fn encode(self, factors: &[i32; LANES]) -> Quads;

    /// Asks for bytes soon to be read, at the nearest level of the caches or at the second.
    fn prefetch(self, bytes: &[u8], nearest: bool);
}

/// Plain loops, which every compiler target vectorizes as far as it can.
#[derive(Clone, Copy)]
pub(super) struct Portable;

impl Simd for Portable {
    const WIDE: bool = false;

    type Floats = Lanes;

    #[inline(always)]
    fn splat(self, x: f32) -> Lanes {
        [x; LANES]
    }

    #[inline(always)]
    fn load_f32(self, bytes: &[u8; 64]) -> Lanes {
        let mut out = [0.0; LANES];
        for (out, bytes) in out.iter_mut().zip(bytes.as_chunks::<4>().0) {
            *out = f32::from_le_bytes(*bytes);
        }
        out
    }

    #[inline(always)]
    fn load_f16(self, bytes: &[u8; 32]) -> Lanes {
        let mut out = [0.0; LANES];
        for (out, half) in out.iter_mut().zip(bytes.as_chunks::<2>().0) {
            *out = half_to_f32(u16::from_le_bytes(*half));
        }
        out
    }

    #[inline(always)]
    fn store(self, x: Lanes, out: &mut Lanes) {
        *out = x;
    }

    #[inline(always)]
    fn add_product(self, mut sum: Lanes, a: Lanes, b: Lanes) -> Lanes {
        for i in 0..LANES {
            sum[i] += a[i] * b[i];
        }
        sum
    }

    type Bytes = [u8; 64];

    #[inline(always)]
    fn load_bytes(self, bytes: &[u8; 64]) -> [u8; 64] {
        *bytes
    }

    type Sums = [i32; LANES];

    #[inline(always)]
    fn no_sums(self) -> [i32; LANES] {
        [0; LANES]
    }

    #[inline(always)]
    fn add_quad(self, mut sums: [i32; LANES], bytes: [u8; 64], quad: &Quad) -> [i32; LANES] {
        let (factors, _) = quad.as_chunks::<2>();
        for (sum, bytes) in sums.iter_mut().zip(bytes.as_chunks::<4>().0) {
            for k in 0..4 {
                let factor = i32::from(i16::from_le_bytes(factors[k]));
                *sum = sum.wrapping_add(i32::from(bytes[k]) * factor);
            }
        }
        sums
    }

    #[inline(always)]
    fn finish(self, sums: [i32; LANES]) -> [i32; LANES] {
        sums
    }

    #[inline(always)]
    fn encode(self, factors: &[i32; LANES]) -> Quads {
        encode_as_i16(factors)
    }

    #[inline(always)]
    fn prefetch(self, _: &[u8], _: bool) {}
}

/// Quads of plain 16-bit numbers.
#[inline(always)]
pub(super) fn encode_as_i16(factors: &[i32; LANES]) -> Quads {
    let mut quads = [[0; 8]; 4];
    for (bytes, &factor) in quads.as_flattened_mut().as_chunks_mut::<2>().0.iter_mut().zip(factors)
    {
        *bytes = (factor as i16).to_le_bytes();
    }
    quads
}

/// A half as f32, exactly. Moves exponent and mantissa into place and corrects the bias of the
/// exponent by a multiplication, which makes normal numbers of subnormal ones.
#[inline(always)]
pub(super) fn half_to_f32(half: u16) -> f32 {
    let bits = u32::from(half);
    let finite = f32::from_bits((bits & 0x7fff) << 13) * f32::from_bits((127 + 112) << 23);
    let special = f32::from_bits(0x7f80_0000 | (bits & 0x3ff) << 13);
    let magnitude = if bits & 0x7c00 == 0x7c00 { special } else { finite };
    f32::from_bits(magnitude.to_bits() | (bits & 0x8000) << 16)
}

/// The nearest half, ties to even; beyond the largest one the largest one, NaN stays NaN.
#[inline(always)]
pub(super) fn f32_to_half(x: f32) -> u16 {
    /// Largest half.
    const MAX: f32 = 65_504.0;
    /// Smallest normal half, 2⁻¹⁴.
    const MIN_NORMAL: u32 = (127 - 14) << 23;
    let sign = x.to_bits() >> 16 & 0x8000;
    let magnitude = x.abs();
    let magnitude = if magnitude > MAX { MAX } else { magnitude };
    let bits = magnitude.to_bits();
    // A number below 2⁻¹⁴ added to ½, whose last place is 2⁻²⁴, rounds as a subnormal half does.
    let subnormal = (magnitude + 0.5).to_bits().wrapping_sub(0.5f32.to_bits());
    let rounded = bits.wrapping_add(0xfff).wrapping_add(bits >> 13 & 1);
    let normal = rounded.wrapping_sub(112 << 23) >> 13;
    let half = if bits < MIN_NORMAL { subnormal } else { normal };
    let half = if x.is_nan() { 0x7e00 } else { half };
    (half | sign) as u16
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn halves_convert_exactly_both_ways() {
        for bits in 0..=u16::MAX {
            let want = half::f16::from_bits(bits);
            let got = half_to_f32(bits);
            if want.is_nan() {
                assert!(got.is_nan());
                assert!(half_to_f32(f32_to_half(got)).is_nan());
            } else {
                assert_eq!(got.to_bits(), want.to_f32().to_bits());
                if want.is_finite() {
                    assert_eq!(f32_to_half(got), bits);
                }
            }
        }
    }

    #[test]
    fn rounding_to_half_is_to_nearest_even() {
        // Every half and its neighbours, the ties between halves and their neighbours.
        for bits in 0..half::f16::MAX.to_bits() {
            let (low, high) = (half_to_f32(bits), half_to_f32(bits + 1));
            let middle = (low + high) / 2.0;
            for x in [middle.next_down(), middle, middle.next_up()] {
                let want = half::f16::from_f32(x).to_bits();
                assert_eq!(f32_to_half(x), want, "{x:e}");
                assert_eq!(f32_to_half(-x), want | 0x8000, "-{x:e}");
            }
        }
        assert_eq!(f32_to_half(1e30), half::f16::MAX.to_bits());
        assert_eq!(f32_to_half(f32::NEG_INFINITY), half::f16::MIN.to_bits());
    }
}

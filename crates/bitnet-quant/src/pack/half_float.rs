//! Half precision to single, in straight code that compilers turn into vector instructions, also
//! where the CPU has no instruction of its own for it.

/// The value of an IEEE half. NaN keeps its payload.
#[inline]
pub(super) fn f16_to_f32(bits: u16) -> f32 {
    let sign = u32::from(bits & 0x8000) << 16;
    let magnitude = u32::from(bits & 0x7FFF);
    // The exponent moves from bias 15 to bias 127.
    let normal = (magnitude << 13) + (112 << 23);
    // A subnormal has no leading 1: give it that of 2⁻¹⁴, and subtract 2⁻¹⁴ again.
    let smallest = f32::from_bits(113 << 23);
    let subnormal = f32::from_bits((magnitude << 13) + (113 << 23)) - smallest;
    let value = if magnitude < 0x0400 { subnormal.to_bits() } else { normal };
    let infinite = if magnitude >= 0x7C00 { 0x7F80_0000 } else { 0 };
    f32::from_bits(value | infinite | sign)
}

/// The half at `at` in a block.
#[inline]
pub(super) fn half_at(block: &[u8], at: usize) -> f32 {
    f16_to_f32(u16::from_le_bytes([block[at], block[at + 1]]))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_half_converts_as_the_reference_does() {
        for bits in 0..=u16::MAX {
            let (ours, reference) = (f16_to_f32(bits), half::f16::from_bits(bits).to_f32_const());
            if reference.is_nan() {
                assert!(ours.is_nan(), "{bits:#06x}");
            } else {
                assert_eq!(ours.to_bits(), reference.to_bits(), "{bits:#06x}");
            }
        }
    }
}

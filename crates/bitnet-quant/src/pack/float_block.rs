//! ggml's float formats in blocks of 32 columns. Every scale is an f16, `d`; some blocks have a
//! minimum `m` as well.
//!
//! ```text
//! Q8_0   34 bytes:  d | i8[32]                     w[j] = d · q[j]
//! Q4_0   18 bytes:  d | qs[16]                     w[j] = d · (q[j] − 8)
//! Q4_1   20 bytes:  d | m | qs[16]                 w[j] = d · q[j] + m
//! Q5_0   22 bytes:  d | qh[4] | qs[16]             w[j] = d · (q[j] − 16)
//! Q5_1   24 bytes:  d | m | qh[4] | qs[16]         w[j] = d · q[j] + m
//!
//!   qs[j] low four bits: column j; high four bits: column j + 16
//!   qh    bit j of the little-endian u32: fifth bit of column j
//! ```

use super::half_float::half_at;
use half::f16;

/// A layout of `COLS` floats in `BYTES` bytes.
pub(super) trait FloatBlock<const COLS: usize, const BYTES: usize> {
    /// Where the f16 scales and minima stand.
    const SCALES_AT: &'static [usize];
    /// Unpacks the numbers.
    fn decode(block: &[u8; BYTES], out: &mut [f32; COLS]);
}

/// Columns of every block here.
pub const COLS: usize = 32;
/// Bytes of a Q8_0 block.
pub const Q8_0_BYTES: usize = 34;
/// Bytes of a Q4_0 block.
pub const Q4_0_BYTES: usize = 18;
/// Bytes of a Q4_1 block.
pub const Q4_1_BYTES: usize = 20;
/// Bytes of a Q5_0 block.
pub const Q5_0_BYTES: usize = 22;
/// Bytes of a Q5_1 block.
pub const Q5_1_BYTES: usize = 24;

pub(super) struct Q8_0;
pub(super) struct Q4_0;
pub(super) struct Q4_1;
pub(super) struct Q5_0;
pub(super) struct Q5_1;

/// Low and high four bits of 16 bytes as 32 numbers.
fn nibbles(bytes: &[u8]) -> [u8; COLS] {
    let mut codes = [0; COLS];
    for (j, byte) in bytes.iter().take(16).enumerate() {
        codes[j] = byte & 15;
        codes[j + 16] = byte >> 4;
    }
    codes
}

/// As [`nibbles`], with a fifth bit from the four bytes before them.
fn five_bits(high: &[u8], low: &[u8]) -> [u8; COLS] {
    let mut codes = nibbles(low);
    for (j, code) in codes.iter_mut().enumerate() {
        *code |= ((high[j / 8] >> (j % 8)) & 1) << 4;
    }
    codes
}

/// `out = scale · (code − zero) + min`
fn scale_codes(codes: &[u8; COLS], scale: f32, zero: i32, min: f32, out: &mut [f32; COLS]) {
    for (code, out) in codes.iter().zip(out) {
        *out = scale * (i32::from(*code) - zero) as f32 + min;
    }
}

impl FloatBlock<COLS, Q8_0_BYTES> for Q8_0 {
    const SCALES_AT: &'static [usize] = &[0];

    fn decode(block: &[u8; Q8_0_BYTES], out: &mut [f32; COLS]) {
        let scale = half_at(block, 0);
        for (byte, out) in block[2..].iter().zip(out) {
            *out = scale * f32::from(*byte as i8);
        }
    }
}

impl FloatBlock<COLS, Q4_0_BYTES> for Q4_0 {
    const SCALES_AT: &'static [usize] = &[0];

    fn decode(block: &[u8; Q4_0_BYTES], out: &mut [f32; COLS]) {
        scale_codes(&nibbles(&block[2..]), half_at(block, 0), 8, 0.0, out);
    }
}

impl FloatBlock<COLS, Q4_1_BYTES> for Q4_1 {
    const SCALES_AT: &'static [usize] = &[0, 2];

    fn decode(block: &[u8; Q4_1_BYTES], out: &mut [f32; COLS]) {
        scale_codes(&nibbles(&block[4..]), half_at(block, 0), 0, half_at(block, 2), out);
    }
}

impl FloatBlock<COLS, Q5_0_BYTES> for Q5_0 {
    const SCALES_AT: &'static [usize] = &[0];

    fn decode(block: &[u8; Q5_0_BYTES], out: &mut [f32; COLS]) {
        let codes = five_bits(&block[2..6], &block[6..]);
        scale_codes(&codes, half_at(block, 0), 16, 0.0, out);
    }
}

impl FloatBlock<COLS, Q5_1_BYTES> for Q5_1 {
    const SCALES_AT: &'static [usize] = &[0, 2];

    fn decode(block: &[u8; Q5_1_BYTES], out: &mut [f32; COLS]) {
        let codes = five_bits(&block[4..8], &block[8..]);
        scale_codes(&codes, half_at(block, 0), 0, half_at(block, 2), out);
    }
}

/// Stores a row as Q8_0: the largest magnitude of a block becomes ±127. Returns whether all is
/// finite.
pub(super) fn encode_q8_0(numbers: &[f32], bytes: &mut [u8]) -> bool {
    let mut finite = true;
    let blocks = numbers.as_chunks::<COLS>().0.iter().zip(bytes.as_chunks_mut::<Q8_0_BYTES>().0);
    for (numbers, block) in blocks {
        // `max` would pass over a NaN, a sum does not.
        finite &= numbers.iter().sum::<f32>().is_finite();
        let largest = numbers.iter().fold(0f32, |largest, number| largest.max(number.abs()));
        let scale = largest / 127.0;
        let inverse = if scale == 0.0 { 0.0 } else { 1.0 / scale };
        let half = f16::from_f32(scale);
        finite &= half.is_finite();
        block[..2].copy_from_slice(&half.to_le_bytes());
        for (number, byte) in numbers.iter().zip(&mut block[2..]) {
            *byte = (number * inverse).round() as i8 as u8;
        }
    }
    finite
}

//! ggml's float formats in blocks of 256 columns with two levels of scales: Q4_K, Q5_K, Q6_K.
//!
//! ```text
//! Q4_K  144 bytes:  d | dmin | scales[12] | qs[128]
//! Q5_K  176 bytes:  d | dmin | scales[12] | qh[32] | qs[128]
//!
//!   eight runs of 32 columns, each with a 6-bit scale s and a 6-bit minimum m:
//!   w = d · s · q − dmin · m
//!
//!   scales[0..4]    low six bits: s of runs 0..4;   high two bits: top bits of s of runs 4..8
//!   scales[4..8]    low six bits: m of runs 0..4;   high two bits: top bits of m of runs 4..8
//!   scales[8..12]   low four bits of s (low half) and of m (high half) of runs 4..8
//!   qs[32p..]       low four bits: run 2p;  high four bits: run 2p + 1           (p = 0..4)
//!   qh[j]           bit r: fifth bit of column j of run r
//!
//! Q6_K  210 bytes:  ql[128] | qh[64] | scales i8[16] | d
//!
//!   sixteen runs of 16 columns:  w = d · s · (q − 32)
//!
//!   for each half h of 128 columns, j = 0..32:
//!   ql[64h + j]       low four bits: column j;       high four bits: column j + 64
//!   ql[64h + 32 + j]  low four bits: column j + 32;  high four bits: column j + 96
//!   qh[32h + j]       top two bits of columns j, j+32, j+64, j+96, lowest bits first
//! ```
//!
//! d and dmin are f16.

use super::float_block::FloatBlock;
use super::half_float::half_at;
use half::f16;

/// Columns of every block here.
pub const COLS: usize = 256;
/// Bytes of a Q4_K block.
pub const Q4K_BYTES: usize = 144;
/// Bytes of a Q5_K block.
pub const Q5K_BYTES: usize = 176;
/// Bytes of a Q6_K block.
pub const Q6K_BYTES: usize = 210;

const _: () = assert!(4 + 12 + 128 == Q4K_BYTES && Q4K_BYTES + 32 == Q5K_BYTES);
const _: () = assert!(128 + 64 + 16 + 2 == Q6K_BYTES);

pub(super) struct Q4K;
pub(super) struct Q5K;
pub(super) struct Q6K;

impl FloatBlock<COLS, Q4K_BYTES> for Q4K {
    const SCALES_AT: &'static [usize] = &[0, 2];

    fn decode(block: &[u8; Q4K_BYTES], out: &mut [f32; COLS]) {
        let codes = nibble_runs(&block[16..]);
        scale_runs(block, &codes, out);
    }
}

impl FloatBlock<COLS, Q5K_BYTES> for Q5K {
    const SCALES_AT: &'static [usize] = &[0, 2];

    fn decode(block: &[u8; Q5K_BYTES], out: &mut [f32; COLS]) {
        let high = &block[16..48];
        let mut codes = nibble_runs(&block[48..]);
        for (run, codes) in codes.chunks_exact_mut(32).enumerate() {
            for (code, high) in codes.iter_mut().zip(high) {
                *code |= ((high >> run) & 1) << 4;
            }
        }
        scale_runs(block, &codes, out);
    }
}

/// The four-bit codes of Q4_K and Q5_K.
fn nibble_runs(bytes: &[u8]) -> [u8; COLS] {
    let mut codes = [0; COLS];
    for (bytes, codes) in bytes.chunks_exact(32).zip(codes.as_chunks_mut::<64>().0) {
        for (j, byte) in bytes.iter().enumerate() {
            codes[j] = byte & 15;
            codes[j + 32] = byte >> 4;
        }
    }
    codes
}

/// Applies the scales and minima that stand in the first 16 bytes of Q4_K and Q5_K.
fn scale_runs(block: &[u8], codes: &[u8; COLS], out: &mut [f32; COLS]) {
    let (d, dmin) = (half_at(block, 0), half_at(block, 2));
    let packed = &block[4..16];
    for (run, (codes, out)) in codes.chunks_exact(32).zip(out.chunks_exact_mut(32)).enumerate() {
        let (scale, min) = if run < 4 {
            (packed[run] & 63, packed[run + 4] & 63)
        } else {
            let low = packed[run + 4];
            (low & 15 | packed[run - 4] >> 6 << 4, low >> 4 | packed[run] >> 6 << 4)
        };
        let (scale, min) = (d * f32::from(scale), dmin * f32::from(min));
        for (code, out) in codes.iter().zip(out) {
            *out = scale * f32::from(*code) - min;
        }
    }
}

impl FloatBlock<COLS, Q6K_BYTES> for Q6K {
    const SCALES_AT: &'static [usize] = &[208];

    fn decode(block: &[u8; Q6K_BYTES], out: &mut [f32; COLS]) {
        let mut codes = [0u8; COLS];
        for half in 0..2 {
            let (low, high) = (&block[64 * half..][..64], &block[128 + 32 * half..][..32]);
            let codes = &mut codes[128 * half..][..128];
            for j in 0..32 {
                codes[j] = low[j] & 15 | (high[j] & 3) << 4;
                codes[j + 32] = low[j + 32] & 15 | (high[j] >> 2 & 3) << 4;
                codes[j + 64] = low[j] >> 4 | (high[j] >> 4 & 3) << 4;
                codes[j + 96] = low[j + 32] >> 4 | (high[j] >> 6) << 4;
            }
        }
        let d = half_at(block, 208);
        let runs = codes.as_chunks::<16>().0.iter().zip(out.as_chunks_mut::<16>().0);
        for ((codes, out), scale) in runs.zip(&block[192..208]) {
            let scale = d * f32::from(*scale as i8);
            for (code, out) in codes.iter().zip(out) {
                *out = scale * f32::from(*code as i8 - 32);
            }
        }
    }
}

/// Stores a row as Q6_K. Returns whether all is finite.
pub(super) fn encode_q6_k(numbers: &[f32], bytes: &mut [u8]) -> bool {
    let mut finite = true;
    let blocks = numbers.as_chunks::<COLS>().0.iter().zip(bytes.as_chunks_mut::<Q6K_BYTES>().0);
    for (numbers, block) in blocks {
        finite &= encode_q6_k_block(numbers, block);
    }
    finite
}

fn encode_q6_k_block(numbers: &[f32; COLS], block: &mut [u8; Q6K_BYTES]) -> bool {
    let runs = numbers.as_chunks::<16>().0;
    let mut scales = [0f32; 16];
    for (scale, run) in scales.iter_mut().zip(runs) {
        *scale = best_scale(run);
    }
    // The scale of largest magnitude becomes −128, the one 8-bit number without a positive twin.
    let largest = scales.iter().fold(0f32, |a, &b| if b.abs() > a.abs() { b } else { a });
    let d = f16::from_f32(largest / -128.0);
    let inverse = if d == f16::ZERO { 0.0 } else { 1.0 / d.to_f32() };

    let mut codes = [32u8; COLS];
    let runs = runs.iter().zip(codes.as_chunks_mut::<16>().0);
    for (index, ((numbers, codes), scale)) in runs.zip(&scales).enumerate() {
        let scale = (scale * inverse).round().clamp(-128.0, 127.0) as i8;
        block[192 + index] = scale as u8;
        let step = d.to_f32() * f32::from(scale);
        if step != 0.0 {
            for (number, code) in numbers.iter().zip(codes) {
                *code = ((number / step).round_ties_even().clamp(-32.0, 31.0) as i8 + 32) as u8;
            }
        }
    }
    for half in 0..2 {
        let codes = &codes[128 * half..][..128];
        for j in 0..32 {
            block[64 * half + j] = codes[j] & 15 | codes[j + 64] << 4;
            block[64 * half + 32 + j] = codes[j + 32] & 15 | codes[j + 96] << 4;
            block[128 + 32 * half + j] = codes[j] >> 4
                | codes[j + 32] >> 4 << 2
                | codes[j + 64] >> 4 << 4
                | codes[j + 96] >> 4 << 6;
        }
    }
    block[208..].copy_from_slice(&d.to_le_bytes());
    numbers.iter().sum::<f32>().is_finite() && d.is_finite()
}

/// The step `s` for which `s · round(x / s)`, codes in −32..=31, comes nearest to `x`: nearest in
/// squares weighted by magnitude, as large weights matter most. Tries steps that put the largest
/// number near −32 and fits each to its codes by least squares.
fn best_scale(run: &[f32; 16]) -> f32 {
    let largest = run.iter().fold(0f32, |a, &b| if b.abs() > a.abs() { b } else { a });
    if largest == 0.0 {
        return 0.0;
    }
    let (mut best, mut best_gain) = (0.0, 0.0);
    for offset in -9..=9i8 {
        let inverse = -(32.0 + 0.1 * f32::from(offset)) / largest;
        let (mut product, mut square) = (0f32, 0f32);
        for x in run {
            let code = (x * inverse).round_ties_even().clamp(-32.0, 31.0);
            let weight = x * x;
            product += weight * x * code;
            square += weight * code * code;
        }
        // With the least-squares step, the error falls short of Σ w·x² by product² / square.
        if square > 0.0 && product * product > best_gain * square {
            best_gain = product * product / square;
            best = product / square;
        }
    }
    best
}

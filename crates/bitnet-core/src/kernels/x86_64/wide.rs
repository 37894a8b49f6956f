//! Products of 16-bit integers on x86-64: `vpmaddwd` on 256 bits, `vpdpwssd` on 512.

use crate::kernels::wide::{Line, PANEL_COLS, WideMatrix, WideRows, for_blocks};
use std::arch::asm;
use std::arch::x86_64::*;

/// Rows whose sums stay in registers: 12 · 2 of 32.
const ROWS_512: usize = 12;
/// As [`ROWS_512`]: 3 · 4 of 16.
const ROWS_256: usize = 3;

/// A pair of terms of one row, in every lane.
///
/// # Safety
/// `pair` must be a pair of the row's terms.
#[inline(always)]
unsafe fn pair(row: *const i16, pair: usize) -> i32 {
    // SAFETY: in bounds by the caller's promise; the type needs no alignment here.
    unsafe { row.add(2 * pair).cast::<i32>().read_unaligned() }
}

#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512vnni,avx2,f16c")]
pub(super) fn avx512vnni(
    left: &WideRows<'_>,
    right: &WideMatrix,
    out: &mut [f32],
    out_stride: usize,
) {
    for_blocks::<ROWS_512>(left, right, out, out_stride, |rows, lines, n, sums| {
        // SAFETY: the features are this function's; `n` rows of `stride` terms begin at `rows`, as
        // `WideRows::check` saw to.
        unsafe {
            match n {
                ROWS_512 => block_512::<ROWS_512>(rows, left.stride, lines, sums),
                8.. => {
                    block_512::<8>(rows, left.stride, lines, &mut sums[..8]);
                    rest_512(&rows[8 * left.stride..], left.stride, lines, &mut sums[8..n]);
                }
                4.. => {
                    block_512::<4>(rows, left.stride, lines, &mut sums[..4]);
                    rest_512(&rows[4 * left.stride..], left.stride, lines, &mut sums[4..n]);
                }
                _ => rest_512(rows, left.stride, lines, &mut sums[..n]),
            }
        }
    });
}

/// `sums + a[2i]·b[2i] + a[2i + 1]·b[2i + 1]`, one instruction. The intrinsic would do, but the
/// compiler makes a multiplication and an addition of it, a third slower here.
#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512vnni,avx2,f16c")]
fn add_pairs(mut sums: __m512i, a: __m512i, b: __m512i) -> __m512i {
    // SAFETY: the instruction reads and writes these registers only.
    unsafe {
        asm!("vpdpwssd {0}, {1}, {2}", inlateout(zmm_reg) sums, in(zmm_reg) a, in(zmm_reg) b,
            options(pure, nomem, nostack, preserves_flags));
    }
    sums
}

/// Rows one by one.
///
/// # Safety
/// As [`block_512`], for `sums.len()` rows.
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512vnni,avx2,f16c")]
unsafe fn rest_512(rows: &[i16], stride: usize, lines: &[Line], sums: &mut [[i32; PANEL_COLS]]) {
    for (r, sums) in sums.iter_mut().enumerate() {
        // SAFETY: the caller's promise.
        unsafe { block_512::<1>(&rows[r * stride..], stride, lines, std::slice::from_mut(sums)) }
    }
}

/// Sums of `ROWS` rows with a panel.
///
/// # Safety
/// `rows` must hold `ROWS` rows of `lines.len()` terms, `stride` apart.
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512vnni,avx2,f16c")]
unsafe fn block_512<const ROWS: usize>(
    rows: &[i16],
    stride: usize,
    lines: &[Line],
    sums: &mut [[i32; PANEL_COLS]],
) {
    debug_assert!(rows.len() >= (ROWS - 1) * stride + lines.len() && sums.len() == ROWS);
    let mut acc = [[_mm512_setzero_si512(); 2]; ROWS];
    for (i, [low, high]) in lines.as_chunks::<2>().0.iter().enumerate() {
        // SAFETY: a line is 64 bytes, aligned; the terms are in bounds by the caller's promise.
        unsafe {
            let low = _mm512_load_si512(low.0.as_ptr().cast());
            let high = _mm512_load_si512(high.0.as_ptr().cast());
            for r in 0..ROWS {
                let a = _mm512_set1_epi32(pair(rows.as_ptr().add(r * stride), i));
                acc[r][0] = add_pairs(acc[r][0], low, a);
                acc[r][1] = add_pairs(acc[r][1], high, a);
            }
        }
    }
    for (acc, sums) in acc.iter().zip(sums) {
        for (half, &acc) in acc.iter().enumerate() {
            // SAFETY: 16 sums from `16 · half` on.
            unsafe { _mm512_storeu_si512(sums.as_mut_ptr().add(16 * half).cast(), acc) }
        }
    }
}

#[target_feature(enable = "avx2,f16c")]
pub(super) fn avx2(left: &WideRows<'_>, right: &WideMatrix, out: &mut [f32], out_stride: usize) {
    for_blocks::<ROWS_256>(left, right, out, out_stride, |rows, lines, n, sums| {
        // SAFETY: the features are this function's; `n` rows of `stride` terms begin at `rows`, as
        // `WideRows::check` saw to.
        unsafe {
            if n == ROWS_256 {
                return block_256::<ROWS_256>(rows, left.stride, lines, sums);
            }
            for (r, sums) in sums.iter_mut().enumerate().take(n) {
                let rows = &rows[r * left.stride..];
                block_256::<1>(rows, left.stride, lines, std::slice::from_mut(sums));
            }
        }
    });
}

/// As [`block_512`].
///
/// # Safety
/// As [`block_512`].
#[target_feature(enable = "avx2,f16c")]
unsafe fn block_256<const ROWS: usize>(
    rows: &[i16],
    stride: usize,
    lines: &[Line],
    sums: &mut [[i32; PANEL_COLS]],
) {
    debug_assert!(rows.len() >= (ROWS - 1) * stride + lines.len() && sums.len() == ROWS);
    let mut acc = [[_mm256_setzero_si256(); 4]; ROWS];
    for (i, pair_lines) in lines.as_chunks::<2>().0.iter().enumerate() {
        // SAFETY: two lines are 128 bytes; the terms are in bounds by the caller's promise.
        unsafe {
            let mut a = [_mm256_setzero_si256(); ROWS];
            for r in 0..ROWS {
                a[r] = _mm256_set1_epi32(pair(rows.as_ptr().add(r * stride), i));
            }
            for quarter in 0..4 {
                let b = _mm256_load_si256(pair_lines.as_ptr().cast::<__m256i>().add(quarter));
                for r in 0..ROWS {
                    let products = _mm256_madd_epi16(b, a[r]);
                    acc[r][quarter] = _mm256_add_epi32(acc[r][quarter], products);
                }
            }
        }
    }
    for (acc, sums) in acc.iter().zip(sums) {
        for (quarter, &acc) in acc.iter().enumerate() {
            // SAFETY: 8 sums from `8 · quarter` on.
            unsafe { _mm256_storeu_si256(sums.as_mut_ptr().add(8 * quarter).cast(), acc) }
        }
    }
}

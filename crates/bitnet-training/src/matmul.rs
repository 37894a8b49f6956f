//! Float matrix products: what is not quantized multiplies here, the head, attention, and every
//! projection of a float model.
//!
//! The right factor is packed into panels of 32 columns, a row of the panel after the other, in
//! pieces of [`TERMS`] terms; the left factor is read as rows, copied first where its terms are not
//! neighbours. As many rows and columns of sums as the registers hold are computed at a time, with
//! fused multiply-add where the CPU has it, so that last bits depend on the instruction set. Knows
//! views of slices, nothing of models.

use pulp::{Simd, WithSimd};
use std::cell::RefCell;

/// A matrix inside a slice: element `(r, c)` stands at `start + r·row_stride + c·col_stride`.
#[derive(Debug, Clone, Copy)]
pub(crate) struct View {
    pub(crate) start: usize,
    pub(crate) row_stride: usize,
    pub(crate) col_stride: usize,
}

impl View {
    /// Rows of `width`, from `start` on.
    pub(crate) fn rows(start: usize, width: usize) -> Self {
        Self { start, row_stride: width, col_stride: 1 }
    }

    /// The transposed matrix.
    pub(crate) fn t(self) -> Self {
        Self { row_stride: self.col_stride, col_stride: self.row_stride, ..self }
    }

    /// Whether all of `(rows, cols)` lies inside `len` elements.
    fn fits(self, rows: usize, cols: usize, len: usize) -> bool {
        let last = (rows - 1) * self.row_stride + (cols - 1) * self.col_stride;
        self.start + last < len
    }
}

/// Columns of a panel.
const COLS: usize = 32;
/// Terms that are packed and summed at a time: a panel of them is 32 KiB.
const TERMS: usize = 256;
/// Rows that pass by a panel while it is near.
const ROWS: usize = 96;
/// Most rows of sums in registers.
const BLOCK: usize = 12;

/// A row of a panel: two cache lines.
#[derive(Debug, Clone, Copy)]
#[repr(align(64))]
struct Line([f32; COLS]);

/// What a thread packs into.
#[derive(Default)]
struct Packed {
    /// `(panels, terms)`
    right: Vec<Line>,
    /// `(rows, terms)`
    left: Vec<f32>,
}

thread_local! {
    static PACKED: RefCell<Packed> = RefCell::default();
}

/// `out = factor · a·b`, or `out += factor · a·b` where `add` is set, for `a` `(m, k)` and `b`
/// `(k, n)`, on the calling thread.
///
/// # Panics
/// If a view leaves its slice.
pub(crate) fn matmul(
    [m, n, k]: [usize; 3],
    (out, out_view): (&mut [f32], View),
    add: bool,
    factor: f32,
    (a, a_view): (&[f32], View),
    (b, b_view): (&[f32], View),
) {
    if m == 0 || n == 0 || k == 0 {
        return;
    }
    assert!(out_view.fits(m, n, out.len()));
    assert!(a_view.fits(m, k, a.len()) && b_view.fits(k, n, b.len()));
    // Elements of the output are apart, so that none is written twice.
    assert!(out_view.col_stride == 1 && out_view.row_stride >= n);
    PACKED.with_borrow_mut(|packed| {
        let product = Product { m, n, k, out, out_view, add, factor, a, a_view, b, b_view, packed };
        pulp::Arch::new().dispatch(product);
    });
}

/// The arguments of [`matmul`], on their way to the code of an instruction set.
struct Product<'a> {
    m: usize,
    n: usize,
    k: usize,
    out: &'a mut [f32],
    out_view: View,
    add: bool,
    factor: f32,
    a: &'a [f32],
    a_view: View,
    b: &'a [f32],
    b_view: View,
    packed: &'a mut Packed,
}

impl WithSimd for Product<'_> {
    type Output = ();

    #[inline(always)]
    fn with_simd<S: Simd>(self, simd: S) {
        // Rows times registers of a panel: what fits 32 registers, or 16, beside the operands.
        match S::F32_LANES {
            16 => self.run::<S, 12, 2>(simd),
            8 => self.run::<S, 3, 4>(simd),
            4 => self.run::<S, 2, 8>(simd),
            _ => self.run::<S, 1, 32>(simd),
        }
    }
}

impl Product<'_> {
    #[inline(always)]
    fn run<S: Simd, const R: usize, const V: usize>(mut self, simd: S) {
        let mut sums = [[0.0; COLS]; BLOCK];
        for first_term in (0..self.k).step_by(TERMS) {
            let terms = TERMS.min(self.k - first_term);
            let add = self.add || first_term > 0;
            self.pack_right(first_term, terms);
            for first_row in (0..self.m).step_by(ROWS) {
                let rows = ROWS.min(self.m - first_row);
                let copied = self.a_view.col_stride != 1;
                if copied {
                    self.pack_left(first_row, rows, first_term, terms);
                }
                let (left, stride) = match copied {
                    true => (&self.packed.left[..], terms),
                    false => {
                        let View { start, row_stride, .. } = self.a_view;
                        (&self.a[start + first_row * row_stride + first_term..], row_stride)
                    }
                };
                for (panel, lines) in self.packed.right.chunks_exact(terms).enumerate() {
                    let first_col = panel * COLS;
                    let width = COLS.min(self.n - first_col);
                    let mut row = 0;
                    while row < rows {
                        let left = &left[row * stride..];
                        let n = match rows - row >= R {
                            true => {
                                block::<S, R, V>(simd, left, stride, lines, &mut sums);
                                R
                            }
                            false => {
                                block::<S, 1, V>(simd, left, stride, lines, &mut sums);
                                1
                            }
                        };
                        for (r, sums) in sums.iter().enumerate().take(n) {
                            let at = (first_row + row + r) * self.out_view.row_stride;
                            let start = self.out_view.start + at + first_col;
                            let out = &mut self.out[start..start + width];
                            match add {
                                true => out
                                    .iter_mut()
                                    .zip(sums)
                                    .for_each(|(o, s)| *o += s * self.factor),
                                false => {
                                    out.iter_mut().zip(sums).for_each(|(o, s)| *o = s * self.factor)
                                }
                            }
                        }
                        row += n;
                    }
                }
            }
        }
    }

    /// Packs terms of the right factor into panels; columns beyond the last are 0.
    #[inline(always)]
    fn pack_right(&mut self, first_term: usize, terms: usize) {
        let View { start, row_stride, col_stride } = self.b_view;
        let lines = &mut self.packed.right;
        lines.resize(self.n.div_ceil(COLS) * terms, Line([0.0; COLS]));
        for (panel, lines) in lines.chunks_exact_mut(terms).enumerate() {
            let first_col = panel * COLS;
            let width = COLS.min(self.n - first_col);
            let start = start + first_term * row_stride + first_col * col_stride;
            if width < COLS {
                lines.fill(Line([0.0; COLS]));
            }
            if col_stride == 1 {
                for (t, line) in lines.iter_mut().enumerate() {
                    line.0[..width].copy_from_slice(&self.b[start + t * row_stride..][..width]);
                }
            } else {
                for c in 0..width {
                    let column = self.b[start + c * col_stride..].iter().step_by(row_stride);
                    for (line, &value) in lines.iter_mut().zip(column) {
                        line.0[c] = value;
                    }
                }
            }
        }
    }

    /// Copies rows of the left factor whose terms are not neighbours.
    #[inline(always)]
    fn pack_left(&mut self, first_row: usize, rows: usize, first_term: usize, terms: usize) {
        /// Rows of a block that is transposed in registers and the nearest cache.
        const NEAR: usize = 16;
        let View { start, row_stride, col_stride } = self.a_view;
        let left = &mut self.packed.left;
        left.resize(rows * terms, 0.0);
        let start = start + first_row * row_stride + first_term * col_stride;
        for near in (0..rows).step_by(NEAR) {
            let n = NEAR.min(rows - near);
            for t in 0..terms {
                let from = start + t * col_stride + near * row_stride;
                for r in 0..n {
                    left[(near + r) * terms + t] = self.a[from + r * row_stride];
                }
            }
        }
    }
}

/// Sums of `R` rows, `stride` apart, with a panel.
#[inline(always)]
fn block<S: Simd, const R: usize, const V: usize>(
    simd: S,
    left: &[f32],
    stride: usize,
    lines: &[Line],
    sums: &mut [[f32; COLS]; BLOCK],
) {
    let terms = lines.len();
    let rows: [&[f32]; R] = std::array::from_fn(|r| &left[r * stride..][..terms]);
    let mut acc = [[simd.splat_f32s(0.0); V]; R];
    for (t, line) in lines.iter().enumerate() {
        let (right, _) = S::as_simd_f32s(&line.0);
        for r in 0..R {
            let left = simd.splat_f32s(rows[r][t]);
            for v in 0..V {
                acc[r][v] = simd.mul_add_e_f32s(left, right[v], acc[r][v]);
            }
        }
    }
    for (acc, sums) in acc.iter().zip(sums) {
        let (sums, _) = S::as_mut_simd_f32s(sums);
        sums[..V].copy_from_slice(acc);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn products_of_views_of_every_size() {
        let number = |i: usize| ((i * 37 + 11) % 64) as f32 / 32.0 - 1.0;
        for [m, n, k] in [[1, 1, 1], [3, 2, 4], [12, 32, 256], [13, 33, 257], [100, 70, 520]] {
            let a: Vec<f32> = (0..m * k).map(number).collect();
            let b: Vec<f32> = (0..k * n).map(|i| number(i * i + 5)).collect();
            let want =
                |r: usize, c: usize| -> f32 { (0..k).map(|t| a[r * k + t] * b[t * n + c]).sum() };
            let turn = |x: &[f32], rows: usize, cols: usize| -> Vec<f32> {
                (0..rows * cols).map(|i| x[i % rows * cols + i / rows]).collect()
            };
            let (a_turned, b_turned) = (turn(&a, m, k), turn(&b, k, n));
            for (add, a_is_turned, b_is_turned) in [
                (false, false, false),
                (true, true, false),
                (true, false, true),
                (false, true, true),
            ] {
                let left = match a_is_turned {
                    false => (&a[..], View::rows(0, k)),
                    true => (&a_turned[..], View::rows(0, m).t()),
                };
                let right = match b_is_turned {
                    false => (&b[..], View::rows(0, n)),
                    true => (&b_turned[..], View::rows(0, k).t()),
                };
                let width = n + 2;
                let mut out = vec![1.0; 1 + m * width];
                matmul([m, n, k], (&mut out, View::rows(1, width)), add, 2.0, left, right);
                assert_eq!(out[0], 1.0);
                for (r, row) in out[1..].chunks(width).enumerate() {
                    for c in 0..n {
                        let want = if add { 1.0 } else { 0.0 } + 2.0 * want(r, c);
                        // Terms are below 1 and round once or twice each.
                        let tolerance = 4.0 * k as f32 * f32::EPSILON;
                        assert!((row[c] - want).abs() <= tolerance, "{m} {n} {k}: {r} {c}");
                    }
                    assert_eq!(row[n..], [1.0; 2]);
                }
            }
        }
    }

    #[test]
    #[should_panic(expected = "fits")]
    fn a_view_must_fit() {
        let (a, mut out) = (vec![0.0; 11], vec![0.0; 9]);
        let view = View::rows(0, 4);
        matmul([3, 3, 4], (&mut out, View::rows(0, 3)), false, 1.0, (&a, view), (&a, view));
    }
}

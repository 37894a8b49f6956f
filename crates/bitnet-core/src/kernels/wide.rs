//! Products of 16-bit integers: what the backward pass of quantized training multiplies with.
//!
//! The forward pass multiplies trits with 8-bit activations, so both factors of a gradient are
//! small integers already: `dY·W` has the trits, `dYᵀ·X` the activation codes. Only the gradient is
//! rounded, to 16 bits a row. The right-hand matrix is packed into panels of 32 columns, two terms
//! of each sum side by side:
//!
//! ```text
//! panel   line 0: column 0 terms 0, 1 | column 1 terms 0, 1 | … | column 15 terms 0, 1
//!         line 1: columns 16 … 31, terms 0, 1
//!         line 2: columns 0 … 15, terms 2, 3      line 3: …
//! ```
//!
//! so that one instruction multiplies a pair of terms of 16 columns and adds them to 16 sums.

use super::Kernels;

/// Columns of a panel.
pub(super) const PANEL_COLS: usize = 32;

/// Two terms of 16 columns: one 64-byte register.
#[derive(Debug, Clone, Copy)]
#[repr(align(64))]
pub(super) struct Line(pub(super) [[i16; 2]; 16]);

/// The right-hand factor, `(terms, cols)`, packed.
#[derive(Debug, Default, Clone)]
pub struct WideMatrix {
    terms: usize,
    cols: usize,
    lines: Vec<Line>,
}

impl WideMatrix {
    /// Packs the rows of `values`, `stride` apart: `(terms, cols)`.
    ///
    /// # Panics
    /// If `values` is too short.
    pub fn pack(&mut self, values: &[i8], stride: usize, terms: usize, cols: usize) {
        assert!(cols > 0 && terms > 0 && cols <= stride);
        assert!(values.len() >= (terms - 1) * stride + cols);
        (self.terms, self.cols) = (terms, cols);
        let pairs = terms.div_ceil(2);
        self.lines.clear();
        self.lines.resize(cols.div_ceil(PANEL_COLS) * pairs * 2, Line([[0; 2]; 16]));
        for (panel, lines) in self.lines.chunks_exact_mut(pairs * 2).enumerate() {
            for (i, line) in lines.iter_mut().enumerate() {
                let (term, first) = (i / 2 * 2, panel * PANEL_COLS + i % 2 * 16);
                let width = cols.saturating_sub(first).min(16);
                let row = |term: usize| &values[term * stride + first..][..width];
                let Line(line) = line;
                if width == 16 && term + 1 < terms {
                    let (a, b) = (row(term), row(term + 1));
                    for ((pair, &a), &b) in line.iter_mut().zip(a).zip(b) {
                        *pair = [a.into(), b.into()];
                    }
                } else if width > 0 {
                    for t in term..terms.min(term + 2) {
                        for (pair, &value) in line.iter_mut().zip(row(t)) {
                            pair[t - term] = value.into();
                        }
                    }
                }
            }
        }
    }

    /// Terms of each sum.
    pub fn terms(&self) -> usize {
        self.terms
    }

    /// Columns.
    pub fn cols(&self) -> usize {
        self.cols
    }

    /// Terms rounded up to whole pairs: what a row on the left must have.
    pub fn padded_terms(&self) -> usize {
        self.terms.next_multiple_of(2)
    }

    /// Panels: two lines for each pair of terms.
    pub(super) fn panels(&self) -> impl Iterator<Item = &[Line]> {
        self.lines.chunks_exact(self.padded_terms())
    }
}

/// The left-hand factor: rows of 16-bit integers above −32,768, `stride` apart, with what a unit of
/// each is worth.
#[derive(Debug, Clone, Copy)]
pub struct WideRows<'a> {
    /// The integers; 0 where terms are padded.
    pub values: &'a [i16],
    /// From one row to the next.
    pub stride: usize,
    /// One for each row.
    pub scales: &'a [f32],
}

impl WideRows<'_> {
    pub(super) fn check(&self, right: &WideMatrix, out: &[f32], out_stride: usize) {
        let (n, terms) = (self.scales.len(), right.padded_terms());
        assert!(terms > 0 && terms <= self.stride && right.cols <= out_stride);
        assert!(n == 0 || self.values.len() >= (n - 1) * self.stride + terms);
        assert!(n == 0 || out.len() >= (n - 1) * out_stride + right.cols);
    }
}

/// Adds the sums of up to 32 columns of a row to the output, each times the row's scale.
#[inline(always)]
pub(super) fn add_row(sums: &[i32; PANEL_COLS], scale: f32, out: &mut [f32]) {
    for (out, &sum) in out.iter_mut().zip(sums) {
        *out += sum as f32 * scale;
    }
}

/// The loop over panels and blocks of `ROWS` rows that all sets share; `block(rows, panel, n)`
/// gives the sums of the first `n` rows of `rows`.
#[inline(always)]
pub(super) fn for_blocks<const ROWS: usize>(
    left: &WideRows<'_>,
    right: &WideMatrix,
    out: &mut [f32],
    out_stride: usize,
    mut block: impl FnMut(&[i16], &[Line], usize, &mut [[i32; PANEL_COLS]; ROWS]),
) {
    let mut sums = [[0; PANEL_COLS]; ROWS];
    for (panel, lines) in right.panels().enumerate() {
        let first_col = panel * PANEL_COLS;
        let width = (right.cols - first_col).min(PANEL_COLS);
        for first in (0..left.scales.len()).step_by(ROWS) {
            let n = ROWS.min(left.scales.len() - first);
            block(&left.values[first * left.stride..], lines, n, &mut sums);
            for (r, sums) in sums.iter().enumerate().take(n) {
                let at = (first + r) * out_stride + first_col;
                add_row(sums, left.scales[first + r], &mut out[at..at + width]);
            }
        }
    }
}

/// The definition: plain loops.
pub(super) fn scalar(left: &WideRows<'_>, right: &WideMatrix, out: &mut [f32], out_stride: usize) {
    for_blocks::<1>(left, right, out, out_stride, |row, lines, _, sums| {
        let mut total = [[0i32; 16]; 2];
        for (pair, a) in lines.as_chunks::<2>().0.iter().zip(row.as_chunks::<2>().0) {
            for half in 0..2 {
                for (sum, b) in total[half].iter_mut().zip(&pair[half].0) {
                    let product = |i: usize| i32::from(a[i]) * i32::from(b[i]);
                    *sum = sum.wrapping_add(product(0).wrapping_add(product(1)));
                }
            }
        }
        sums[0][..16].copy_from_slice(&total[0]);
        sums[0][16..].copy_from_slice(&total[1]);
    });
}

impl Kernels {
    /// `out[r·out_stride + c] += scales[r] · Σ_t left[r, t] · right[t, c]`: sums in 32-bit integers,
    /// modulo 2³², which must be wide enough for them; then one rounding to f32, one
    /// multiplication, one addition.
    ///
    /// # Panics
    /// If the lengths of the slices do not fit together.
    pub fn wide_products(
        &self,
        left: &WideRows<'_>,
        right: &WideMatrix,
        out: &mut [f32],
        out_stride: usize,
    ) {
        left.check(right, out, out_stride);
        // SAFETY: the CPU has the features, as `available` saw to; lengths checked above.
        unsafe { (self.wide_products)(left, right, out, out_stride) }
    }
}

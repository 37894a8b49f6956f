//! Float matrix products: one safe function around the `gemm-f32` crate.
//!
//! What is not quantized multiplies here: the head, attention, and every projection of a float
//! model. Knows views of slices, nothing of models.
#![allow(unsafe_code)] // the crate's one foreign call, below

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
    // SAFETY: every element of the three views is inside its slice, as asserted; `out` is borrowed
    // mutably, so that it overlaps neither of the others.
    unsafe {
        gemm_f32::gemm::f32::get_gemm_fn()(
            m,
            n,
            k,
            out.as_mut_ptr().add(out_view.start),
            out_view.col_stride as isize,
            out_view.row_stride as isize,
            add,
            a.as_ptr().add(a_view.start),
            a_view.col_stride as isize,
            a_view.row_stride as isize,
            b.as_ptr().add(b_view.start),
            b_view.col_stride as isize,
            b_view.row_stride as isize,
            1.0,
            factor,
            false,
            false,
            false,
            gemm_common::Parallelism::None,
        );
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn products_of_views() {
        let a: Vec<f32> = (0..12).map(|i| i as f32).collect(); // (3, 4)
        let b: Vec<f32> = (0..8).map(|i| (i * i) as f32).collect(); // (4, 2)
        let mut out = vec![1.0; 9]; // (3, 3), of which two columns are written
        let (a_view, b_view) = (View::rows(0, 4), View::rows(0, 2));
        matmul([3, 2, 4], (&mut out, View::rows(0, 3)), true, 2.0, (&a, a_view), (&b, b_view));
        let want = |r: usize, c: usize| -> f32 {
            1.0 + 2.0 * (0..4).map(|k| a[r * 4 + k] * b[k * 2 + c]).sum::<f32>()
        };
        for r in 0..3 {
            assert_eq!(out[r * 3..r * 3 + 3], [want(r, 0), want(r, 1), 1.0]);
        }
        // bᵀ·aᵀ is the transpose of a·b.
        let mut other = vec![9.0; 6];
        let out_view = View::rows(0, 3);
        matmul([2, 3, 4], (&mut other, out_view), false, 1.0, (&b, b_view.t()), (&a, a_view.t()));
        assert_eq!(other[3 + 2], (want(2, 1) - 1.0) / 2.0);
    }

    #[test]
    #[should_panic(expected = "fits")]
    fn a_view_must_fit() {
        let (a, mut out) = (vec![0.0; 11], vec![0.0; 9]);
        let view = View::rows(0, 4);
        matmul([3, 3, 4], (&mut out, View::rows(0, 3)), false, 1.0, (&a, view), (&a, view));
    }
}

//! Ternary weights out of float ones: the quantizer BitNet b1.58 is trained with, and the search
//! for weights that are ternary already though stored as floats.
//!
//! Absmean, over a whole matrix, in f32: `s = max(mean|W|, 1e-5)`, trit `= round(W / s)` with ties
//! to even, clamped to ±1; one trit is worth `s`. The mean is summed in f64, row by row in order,
//! so it does not depend on threads. Both kinds of result decode on demand from their source: no
//! copy of the weights is made.

use crate::error::{Error, Result};
use bitnet_core::weights::{FloatRows, Scales, TernaryRows};
use rayon::prelude::*;
use std::sync::Arc;

/// Least scale: keeps a matrix of zeros from dividing by zero.
const MIN_SCALE: f64 = 1e-5;

/// Widths of column groups tried in the search for stored ternary weights, after whole rows.
const GROUPS: [usize; 2] = [128, 64];

/// A float matrix seen through the absmean quantizer.
pub struct Absmean {
    source: Arc<dyn FloatRows>,
    inverse: f32,
    scales: Scales,
}

impl Absmean {
    /// Measures the matrix `what`. Reads all of it, on the threads of rayon.
    ///
    /// # Errors
    /// A weight that is not finite.
    pub fn new(what: &str, source: Arc<dyn FloatRows>) -> Result<Self> {
        let cols = source.cols();
        let sums: Vec<f64> = (0..source.rows())
            .into_par_iter()
            .map_init(
                || vec![0.0; cols],
                |row_values, row| {
                    source.decode_row(row, row_values);
                    row_values.iter().map(|w| f64::from(w.abs())).sum()
                },
            )
            .collect();
        let count = source.rows() as f64 * cols as f64;
        let mean = sums.iter().sum::<f64>() / count.max(1.0);
        if !mean.is_finite() {
            return Err(Error::malformed(what, "finite weights", mean));
        }
        // The reference multiplies by the inverse in f32; so a weight on the very border between
        // two trits falls on the same side here.
        let scale = mean.max(MIN_SCALE) as f32;
        Ok(Self { source, inverse: 1.0 / scale, scales: Scales::Tensor(scale) })
    }
}

impl TernaryRows for Absmean {
    fn rows(&self) -> usize {
        self.source.rows()
    }

    fn cols(&self) -> usize {
        self.source.cols()
    }

    fn scales(&self) -> &Scales {
        &self.scales
    }

    fn decode_row(&self, row: usize, out: &mut [u8]) {
        let mut values = vec![0.0; out.len()];
        self.source.decode_row(row, &mut values);
        for (code, value) in out.iter_mut().zip(values) {
            // Rounding to even takes ±0.5 to 0, and all beyond is clamped to ±1.
            let x = value * self.inverse;
            *code = 1 + u8::from(x > 0.5) - u8::from(x < -0.5);
        }
    }

    fn release(&self) {
        self.source.release();
    }
}

/// A float matrix whose rows, or groups of columns in them, hold only −s, 0 and +s.
pub struct StoredTernary {
    source: Arc<dyn FloatRows>,
    scales: Scales,
}

impl StoredTernary {
    /// Looks whether the matrix is ternary; one that is not costs a few numbers of its first rows.
    ///
    /// A matrix of one row or column proves nothing and is never taken for ternary.
    pub fn detect(source: &Arc<dyn FloatRows>) -> Option<Self> {
        let (rows, cols) = (source.rows(), source.cols());
        if rows < 2 || cols < 2 {
            return None;
        }
        let whole_rows = std::iter::once(cols);
        let groups = GROUPS.into_iter().filter(|&group| cols > group && cols.is_multiple_of(group));
        let (group, values) = whole_rows
            .chain(groups)
            .find_map(|group| Some((group, magnitudes(&**source, group)?)))?;
        let scales = if group < cols {
            Scales::Group { group, values: values.into_iter().map(|m| m.unwrap_or(0.0)).collect() }
        } else {
            let mut found = values.iter().flatten();
            // A matrix of zeros may have been anything.
            let first = *found.next()?;
            match found.all(|&magnitude| magnitude == first) {
                true => Scales::Tensor(first),
                false => Scales::Row(values.into_iter().map(|m| m.unwrap_or(0.0)).collect()),
            }
        };
        Some(Self { source: source.clone(), scales })
    }
}

impl TernaryRows for StoredTernary {
    fn rows(&self) -> usize {
        self.source.rows()
    }

    fn cols(&self) -> usize {
        self.source.cols()
    }

    fn scales(&self) -> &Scales {
        &self.scales
    }

    fn decode_row(&self, row: usize, out: &mut [u8]) {
        let mut values = vec![0.0; out.len()];
        self.source.decode_row(row, &mut values);
        for (code, value) in out.iter_mut().zip(values) {
            *code = 1 + u8::from(value > 0.0) - u8::from(value < 0.0);
        }
    }

    fn release(&self) {
        self.source.release();
    }
}

/// The one magnitude in each group of `group` columns, `None` for a group of zeros; or `None` if
/// any group has two.
fn magnitudes(source: &dyn FloatRows, group: usize) -> Option<Vec<Option<f32>>> {
    let cols = source.cols();
    let of_row = |row_values: &mut Vec<f32>, row: usize| -> Option<Vec<Option<f32>>> {
        source.decode_row(row, row_values);
        row_values.chunks(group).map(magnitude).collect()
    };
    of_row(&mut vec![0.0; cols], 0)?; // most float matrices end here, with no thread disturbed
    let rows: Vec<_> = (0..source.rows())
        .into_par_iter()
        .map_init(|| vec![0.0; cols], of_row)
        .collect::<Option<_>>()?;
    Some(rows.into_iter().flatten().collect())
}

/// `Some(Some(s))` where all are −s, 0 or +s with a finite `s`; `Some(None)` where all are 0.
fn magnitude(values: &[f32]) -> Option<Option<f32>> {
    let mut common = None;
    for value in values {
        let magnitude = value.abs();
        if magnitude == 0.0 {
            continue;
        }
        if !magnitude.is_finite() || *common.get_or_insert(magnitude) != magnitude {
            return None;
        }
    }
    Some(common)
}

#[cfg(test)]
mod tests {
    use super::*;

    struct Rows(Vec<Vec<f32>>);

    impl FloatRows for Rows {
        fn rows(&self) -> usize {
            self.0.len()
        }
        fn cols(&self) -> usize {
            self.0[0].len()
        }
        fn decode_row(&self, row: usize, out: &mut [f32]) {
            out.copy_from_slice(&self.0[row]);
        }
    }

    fn source(rows: Vec<Vec<f32>>) -> Arc<dyn FloatRows> {
        Arc::new(Rows(rows))
    }

    fn codes(rows: &dyn TernaryRows) -> Vec<Vec<u8>> {
        let decode = |row| {
            let mut out = vec![9; rows.cols()];
            rows.decode_row(row, &mut out);
            out
        };
        (0..rows.rows()).map(decode).collect()
    }

    #[test]
    fn trits_are_rounded_to_even_and_clamped() {
        // mean|W| = (1 + 1 + 0.5 + 0.5 + 3 + 0) / 6 = 1
        let quantized = Absmean::new("w", source(vec![vec![1.0, -1.0, 0.5], vec![-0.5, 3.0, 0.0]]));
        let quantized = quantized.unwrap();
        assert_eq!(quantized.scales(), &Scales::Tensor(1.0));
        assert_eq!(codes(&quantized), [[2, 0, 1], [1, 2, 1]]);
    }

    #[test]
    fn zeros_have_the_least_scale_and_nan_is_refused() {
        let zeros = Absmean::new("w", source(vec![vec![0.0; 4]])).unwrap();
        assert_eq!(zeros.scales(), &Scales::Tensor(1e-5));
        assert_eq!(codes(&zeros), [[1; 4]]);
        for bad in [f32::NAN, f32::INFINITY] {
            let error = Absmean::new("w", source(vec![vec![1.0, bad]])).err().unwrap().to_string();
            assert!(error.starts_with("w: expected finite weights"), "{error}");
        }
    }

    #[test]
    fn stored_ternary_weights_are_found_with_as_few_scales_as_they_have() {
        let detect = |rows: Vec<Vec<f32>>| StoredTernary::detect(&source(rows));
        let one = detect(vec![vec![0.5, 0.0], vec![-0.5, 0.5]]).unwrap();
        assert_eq!(one.scales(), &Scales::Tensor(0.5));
        assert_eq!(codes(&one), [[2, 1], [0, 2]]);
        let rows = detect(vec![vec![0.5, 0.0], vec![-0.25, 0.25], vec![0.0, 0.0]]).unwrap();
        assert_eq!(rows.scales(), &Scales::Row(vec![0.5, 0.25, 0.0]));

        let mut grouped = vec![vec![1.0; 256]; 2];
        grouped[1][128..].fill(-2.0);
        let groups = detect(grouped.clone()).unwrap();
        let values = vec![1.0, 1.0, 1.0, 2.0];
        assert_eq!(groups.scales(), &Scales::Group { group: 128, values });
        grouped[1][255] = 0.3;
        assert!(detect(grouped).is_none());

        assert!(detect(vec![vec![0.5, 0.4], vec![0.5, 0.5]]).is_none());
        assert!(detect(vec![vec![0.0; 4]; 4]).is_none(), "zeros prove nothing");
        assert!(detect(vec![vec![1.0, f32::NAN]; 2]).is_none());
        assert!(detect(vec![vec![1.0; 8]]).is_none(), "nor does one row");
    }
}

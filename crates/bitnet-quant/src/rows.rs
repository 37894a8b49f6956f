//! Views of matrices that change what their rows mean, not where they lie: reordered rows, scaled
//! trits, trits as floats.

use crate::error::{Error, Result};
use bitnet_core::weights::{FloatRows, FloatType, RoundedRows, Scales, TernaryRows};
use bytes::Bytes;
use std::sync::Arc;

/// The order in which llama-family GGUF files keep the rows of each head of `q_proj` and `k_proj`:
/// rows `i` and `i + head_dim/2`, which a rotation turns together, lie side by side there.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct HeadOrder {
    head_dim: usize,
    direction: Direction,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Direction {
    ToHalves,
    ToNeighbours,
}

impl HeadOrder {
    /// Shows neighbours as halves: what a llama GGUF file needs when read.
    pub(crate) fn halves(head_dim: usize) -> Self {
        Self { head_dim, direction: Direction::ToHalves }
    }

    /// Shows halves as neighbours: what a llama GGUF file needs when written.
    pub(crate) fn neighbours(head_dim: usize) -> Self {
        Self { head_dim, direction: Direction::ToNeighbours }
    }

    /// Whether one undoes the other.
    pub(crate) fn is_inverse_of(self, other: Self) -> bool {
        self.head_dim == other.head_dim && self.direction != other.direction
    }

    /// The row of the source that stands at `row` in this order.
    pub(crate) fn source_row(self, row: usize) -> usize {
        let (head, row, half) = (row / self.head_dim, row % self.head_dim, self.head_dim / 2);
        let row = match self.direction {
            Direction::ToHalves => 2 * (row % half) + row / half,
            Direction::ToNeighbours => row / 2 + row % 2 * half,
        };
        head * self.head_dim + row
    }

    /// `values`, of which each row has as many, in this order.
    pub(crate) fn reorder(self, values: &[f32], rows: usize) -> Vec<f32> {
        let per_row = values.len() / rows;
        let source = |row| self.source_row(row) * per_row;
        (0..rows).flat_map(|row| &values[source(row)..source(row) + per_row]).copied().collect()
    }
}

/// A ternary matrix with its rows in another order.
pub(crate) struct ReorderedTernary {
    source: Arc<dyn TernaryRows>,
    order: HeadOrder,
    scales: Scales,
}

impl ReorderedTernary {
    pub(crate) fn new(source: Arc<dyn TernaryRows>, order: HeadOrder) -> Self {
        let rows = source.rows();
        let scales = match source.scales() {
            Scales::Tensor(scale) => Scales::Tensor(*scale),
            Scales::Row(values) => Scales::Row(order.reorder(values, rows)),
            Scales::Group { group, values } => {
                Scales::Group { group: *group, values: order.reorder(values, rows) }
            }
        };
        Self { source, order, scales }
    }
}

impl TernaryRows for ReorderedTernary {
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
        self.source.decode_row(self.order.source_row(row), out);
    }

    fn release(&self) {
        self.source.release();
    }
}

/// A float matrix with its rows in another order.
pub(crate) struct ReorderedFloat {
    pub(crate) source: Arc<dyn FloatRows>,
    pub(crate) order: HeadOrder,
}

impl FloatRows for ReorderedFloat {
    fn rows(&self) -> usize {
        self.source.rows()
    }

    fn cols(&self) -> usize {
        self.source.cols()
    }

    fn decode_row(&self, row: usize, out: &mut [f32]) {
        self.source.decode_row(self.order.source_row(row), out);
    }

    fn release(&self) {
        self.source.release();
    }
}

/// A ternary matrix with other scales.
pub(crate) struct Rescaled {
    source: Arc<dyn TernaryRows>,
    scales: Scales,
}

impl Rescaled {
    /// All scales of the matrix `what` multiplied by `factor`.
    pub(crate) fn new(what: &str, source: Arc<dyn TernaryRows>, factor: f32) -> Result<Self> {
        let scaled = |scale: &f32| {
            let product = scale * factor;
            let error = || Error::malformed(format!("scale of {what}"), "a finite number", product);
            product.is_finite().then_some(product).ok_or_else(error)
        };
        let all = |values: &[f32]| values.iter().map(scaled).collect::<Result<Vec<f32>>>();
        let scales = match source.scales() {
            Scales::Tensor(scale) => Scales::Tensor(scaled(scale)?),
            Scales::Row(values) => Scales::Row(all(values)?),
            Scales::Group { group, values } => {
                Scales::Group { group: *group, values: all(values)? }
            }
        };
        Ok(Self { source, scales })
    }
}

impl TernaryRows for Rescaled {
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
        self.source.decode_row(row, out);
    }

    fn release(&self) {
        self.source.release();
    }
}

/// A head and the rounded copy that the file has of it.
pub(crate) struct WithRounded {
    pub(crate) source: Arc<dyn FloatRows>,
    pub(crate) rounded: RoundedRows,
}

impl FloatRows for WithRounded {
    fn rows(&self) -> usize {
        self.source.rows()
    }

    fn cols(&self) -> usize {
        self.source.cols()
    }

    fn decode_row(&self, row: usize, out: &mut [f32]) {
        self.source.decode_row(row, out);
    }

    fn raw(&self) -> Option<(FloatType, Bytes)> {
        self.source.raw()
    }

    fn rounded(&self) -> Option<RoundedRows> {
        Some(self.rounded.clone())
    }

    fn release(&self) {
        self.source.release();
    }
}

/// A ternary matrix as floats: embeddings and heads of models that are ternary throughout.
pub(crate) struct Dequantized(pub(crate) Arc<dyn TernaryRows>);

impl FloatRows for Dequantized {
    fn rows(&self) -> usize {
        self.0.rows()
    }

    fn cols(&self) -> usize {
        self.0.cols()
    }

    fn decode_row(&self, row: usize, out: &mut [f32]) {
        let mut codes = vec![0; out.len()];
        self.0.decode_row(row, &mut codes);
        let (group, scales) = match self.0.scales() {
            Scales::Tensor(scale) => (out.len(), std::slice::from_ref(scale)),
            Scales::Row(values) => (out.len(), &values[row..=row]),
            Scales::Group { group, values } => {
                let groups = out.len().div_ceil(*group);
                (*group, &values[row * groups..][..groups])
            }
        };
        for ((out, codes), scale) in out.chunks_mut(group).zip(codes.chunks(group)).zip(scales) {
            for (out, &code) in out.iter_mut().zip(codes) {
                *out = (f32::from(code) - 1.0) * scale;
            }
        }
    }

    fn release(&self) {
        self.0.release();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    struct Codes(Vec<[u8; 4]>, Scales);

    impl TernaryRows for Codes {
        fn rows(&self) -> usize {
            self.0.len()
        }
        fn cols(&self) -> usize {
            4
        }
        fn scales(&self) -> &Scales {
            &self.1
        }
        fn decode_row(&self, row: usize, out: &mut [u8]) {
            out.copy_from_slice(&self.0[row]);
        }
    }

    #[test]
    fn neighbours_and_halves_are_inverse() {
        // Two heads of six rows: halves 0 1 2 | 3 4 5 lie as 0 3 1 4 2 5.
        let (to, from) = (HeadOrder::neighbours(6), HeadOrder::halves(6));
        let lie: Vec<_> = (0..12).map(|row| to.source_row(row)).collect();
        assert_eq!(lie, [0, 3, 1, 4, 2, 5, 6, 9, 7, 10, 8, 11]);
        for row in 0..12 {
            assert_eq!(to.source_row(from.source_row(row)), row);
            assert_eq!(from.source_row(to.source_row(row)), row);
        }
    }

    #[test]
    fn scales_move_with_their_rows() {
        let rows = vec![[0; 4], [1; 4], [2; 4], [0; 4]];
        let values = (0..8).map(|i| i as f32).collect();
        let source = Arc::new(Codes(rows, Scales::Group { group: 2, values }));
        let reordered = ReorderedTernary::new(source, HeadOrder::halves(4));
        let values = vec![0.0, 1.0, 4.0, 5.0, 2.0, 3.0, 6.0, 7.0]; // rows 0 2 1 3
        assert_eq!(reordered.scales(), &Scales::Group { group: 2, values });
        let mut out = [9; 4];
        reordered.decode_row(1, &mut out);
        assert_eq!(out, [2; 4]);
    }

    #[test]
    fn trits_become_floats_with_the_scale_of_their_place() {
        let values = vec![0.5, 2.0, 3.0, 4.0];
        let source = Codes(vec![[0, 1, 2, 3], [2; 4]], Scales::Group { group: 2, values });
        let source: Arc<dyn TernaryRows> = Arc::new(source);
        assert!(Rescaled::new("w", source.clone(), f32::MAX).is_err());
        let floats = Dequantized(Arc::new(Rescaled::new("w", source, 10.0).unwrap()));
        let mut out = [0.0; 4];
        floats.decode_row(0, &mut out);
        assert_eq!(out, [-5.0, 0.0, 20.0, 40.0]);
        floats.decode_row(1, &mut out);
        assert_eq!(out, [30.0, 30.0, 40.0, 40.0]);
    }
}

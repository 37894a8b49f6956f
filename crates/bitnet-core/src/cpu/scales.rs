//! Weight scales in the order the kernels read them: 16 rows of a tile side by side.

use crate::error::Result;
use crate::kernels::{TILE_ROWS, WeightScales};
use crate::weights::{ActivationQuant, Scales, TernaryRows, check_ternary};

/// The values of all rows, 0 for the rows that pad the last tile.
pub(super) fn pad_rows(values: &[f32]) -> Vec<f32> {
    let mut padded = values.to_vec();
    padded.resize(values.len().next_multiple_of(TILE_ROWS), 0.0);
    padded
}

/// The scales of `weights` in the order of tiles, checked against its shape and `activations`.
pub(super) fn tile_scales(
    weights: &dyn TernaryRows,
    activations: ActivationQuant,
) -> Result<Scales> {
    check_ternary(weights, activations)?;
    let (rows, cols) = (weights.rows(), weights.cols());
    match weights.scales() {
        Scales::Tensor(scale) => Ok(Scales::Tensor(*scale)),
        Scales::Row(values) => Ok(Scales::Row(pad_rows(values))),
        Scales::Group { group, values } => {
            let n_groups = cols.div_ceil(*group);
            let mut tiled = vec![0.0; rows.next_multiple_of(TILE_ROWS) * n_groups];
            for (row, values) in values.chunks_exact(n_groups).enumerate() {
                let tile = row / TILE_ROWS * n_groups * TILE_ROWS + row % TILE_ROWS;
                for (g, &value) in values.iter().enumerate() {
                    tiled[tile + g * TILE_ROWS] = value;
                }
            }
            Ok(Scales::Group { group: *group, values: tiled })
        }
    }
}

/// The scales from tile `first` on, as the kernels read them.
pub(super) fn scales_from(
    scales: &Scales,
    first: usize,
    cols: usize,
    sum_cols: usize,
) -> WeightScales<'_> {
    match scales {
        Scales::Tensor(scale) => WeightScales::Tensor(*scale),
        Scales::Row(values) => WeightScales::Row(&values[first * TILE_ROWS..]),
        Scales::Group { group, values } => {
            let n_weight_groups = cols.div_ceil(*group);
            WeightScales::Group {
                values: &values[first * n_weight_groups * TILE_ROWS..],
                n_weight_groups,
                sum_groups: (group / sum_cols).max(1),
            }
        }
    }
}

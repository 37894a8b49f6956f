//! Weight scales in the order the kernels read them: 16 rows of a tile side by side.

use crate::error::{Error, Result};
use crate::kernels::{STEP_COLS, TILE_ROWS, WeightScales};
use crate::weights::{ActivationQuant, Scales, TernaryRows};

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
    let (rows, cols) = (weights.rows(), weights.cols());
    let bad_group = |group: usize| group == 0 || !group.is_multiple_of(STEP_COLS);
    if let ActivationQuant::PerGroup(group) = activations
        && bad_group(group)
    {
        let reason = format!("{group} is not a multiple of {STEP_COLS}");
        return Err(Error::invalid("group of activations", reason));
    }
    match weights.scales() {
        Scales::Tensor(scale) => Ok(Scales::Tensor(*scale)),
        Scales::Row(values) if values.len() == rows => Ok(Scales::Row(pad_rows(values))),
        Scales::Row(values) => Err(Error::shape("scales of rows", rows, values.len())),
        Scales::Group { group, .. } if bad_group(*group) => {
            let reason = format!("{group} is not a multiple of {STEP_COLS}");
            Err(Error::invalid("group of weights", reason))
        }
        Scales::Group { group, values } => {
            let n_groups = cols.div_ceil(*group);
            if rows.checked_mul(n_groups) != Some(values.len()) {
                let expected = format!("{rows} × {n_groups}");
                return Err(Error::shape("scales of groups", expected, values.len()));
            }
            if let ActivationQuant::PerGroup(inner) = activations
                && !group.is_multiple_of(inner)
            {
                let reason = format!("{inner} does not divide the weights' group of {group}");
                return Err(Error::invalid("group of activations", reason));
            }
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

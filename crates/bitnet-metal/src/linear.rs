//! Projections on the device: ternary weights in tiles, with scales, bias and norm.
//!
//! `kernels/bitlinear.metal` has the picture of a tile. Knows layouts, not when a product runs.

use crate::buffer::{MetalBuffer, MetalBufferPool};
use crate::kernels::MAX_SHARED_BYTES;
use crate::matrix::FloatMatrix;
use bitnet_core::memory::{AccessPattern, DeviceMemory};
use bitnet_core::weights::{
    ActivationQuant, LinearWeights, MAX_TERNARY_COLS, Matrix, NormWeights, Scales, TernaryRows,
};
use bitnet_core::{Error, Result};

/// Rows of a tile.
const TILE_ROWS: usize = 16;
/// Columns of a step.
pub(crate) const STEP_COLS: usize = 16;

/// A norm on the device.
pub struct MetalNorm<M: DeviceMemory> {
    pub(crate) weight: MetalBuffer<M>,
    pub(crate) width: usize,
    pub(crate) eps: f32,
}

impl<M: DeviceMemory> MetalNorm<M> {
    pub(crate) fn new(pool: &MetalBufferPool<M>, norm: &NormWeights) -> Result<Self> {
        if norm.weight.is_empty() {
            return Err(Error::invalid("norm", "no weights"));
        }
        let weight = floats(pool, &norm.weight)?;
        Ok(Self { weight, width: norm.weight.len(), eps: norm.eps })
    }
}

/// A projection on the device.
pub struct MetalLinear<M: DeviceMemory> {
    pub(crate) rows: usize,
    pub(crate) cols: usize,
    pub(crate) weights: Weights<M>,
    pub(crate) bias: Option<MetalBuffer<M>>,
    pub(crate) input_norm: Option<MetalNorm<M>>,
}

pub(crate) enum Weights<M: DeviceMemory> {
    Ternary(Ternary<M>),
    Float(FloatMatrix<M>),
}

/// A ternary matrix in tiles.
pub(crate) struct Ternary<M: DeviceMemory> {
    pub(crate) codes: MetalBuffer<M>,
    pub(crate) scales: TileScales<M>,
    /// How the input is quantized.
    pub(crate) grouping: Grouping,
}

/// Scales in the order of tiles.
pub(crate) enum TileScales<M: DeviceMemory> {
    Tensor(f32),
    /// `(tiles · 16)`
    Row(MetalBuffer<M>),
    /// `(tiles, groups, 16)`
    Group {
        group: usize,
        values: MetalBuffer<M>,
    },
}

/// Which columns of a token share what.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Grouping {
    pub(crate) cols: usize,
    /// Columns that share an activation scale.
    pub(crate) scale_cols: usize,
    /// Columns whose products are summed as integers.
    pub(crate) sum_cols: usize,
}

impl Grouping {
    pub(crate) fn n_scales(&self) -> usize {
        self.cols.div_ceil(self.scale_cols)
    }

    pub(crate) fn n_sums(&self) -> usize {
        self.cols.div_ceil(self.sum_cols)
    }

    /// Bytes from one token's codes to the next.
    pub(crate) fn code_stride(&self) -> usize {
        self.cols.next_multiple_of(STEP_COLS)
    }
}

impl<M: DeviceMemory> MetalLinear<M> {
    /// Brings a projection to the device.
    pub(crate) fn new(pool: &MetalBufferPool<M>, weights: &LinearWeights) -> Result<Self> {
        let (rows, cols) = weights.matrix.shape();
        let bias = match &weights.bias {
            Some(bias) if bias.len() != rows => {
                return Err(Error::shape("bias of a projection", rows, bias.len()));
            }
            Some(bias) => Some(floats(pool, bias)?),
            None => None,
        };
        let input_norm = match &weights.input_norm {
            Some(norm) if norm.weight.len() != cols => {
                return Err(Error::shape("input norm of a projection", cols, norm.weight.len()));
            }
            Some(norm) => Some(MetalNorm::new(pool, norm)?),
            None => None,
        };
        let weights = match &weights.matrix {
            Matrix::Ternary { weights, activations } => {
                let ternary = Ternary::new(pool, &**weights, *activations)?;
                weights.release();
                Weights::Ternary(ternary)
            }
            Matrix::Float(weights) => Weights::Float(FloatMatrix::new(pool, &**weights)?),
        };
        Ok(Self { rows, cols, weights, bias, input_norm })
    }

    /// How the input is quantized; `None` for float weights.
    pub(crate) fn grouping(&self) -> Option<Grouping> {
        match &self.weights {
            Weights::Ternary(ternary) => Some(ternary.grouping),
            Weights::Float(_) => None,
        }
    }

    /// Whether `other` reads the very same prepared input.
    pub(crate) fn shares_input_with(&self, other: &Self) -> bool {
        self.cols == other.cols
            && self.grouping() == other.grouping()
            && self.input_norm.is_none()
            && other.input_norm.is_none()
    }

    /// Tiles of 16 rows.
    pub(crate) fn n_tiles(&self) -> usize {
        self.rows.div_ceil(TILE_ROWS)
    }

    /// Steps of 16 columns.
    pub(crate) fn steps(&self) -> usize {
        self.cols.div_ceil(STEP_COLS)
    }
}

impl<M: DeviceMemory> Ternary<M> {
    fn new(
        pool: &MetalBufferPool<M>,
        source: &dyn TernaryRows,
        activations: ActivationQuant,
    ) -> Result<Self> {
        let (rows, cols) = (source.rows(), source.cols());
        if rows == 0 || cols == 0 || cols > MAX_TERNARY_COLS {
            let reason = format!("{rows}×{cols} is empty or wider than {MAX_TERNARY_COLS} columns");
            return Err(Error::invalid("ternary matrix", reason));
        }
        let grouping = grouping(source, activations)?;
        let scales = TileScales::new(pool, source)?;
        Ok(Self { codes: pack(pool, source)?, scales, grouping })
    }
}

/// How the input of a product is quantized, checked.
fn grouping(source: &dyn TernaryRows, activations: ActivationQuant) -> Result<Grouping> {
    /// Scales of a token that fit a threadgroup's memory beside what else is there.
    const MOST_SCALES: usize = MAX_SHARED_BYTES as usize / 4 - 64;
    let cols = source.cols();
    let check = |what: &str, group: usize| match group > 0 && group.is_multiple_of(STEP_COLS) {
        true => Ok(()),
        false => Err(Error::invalid(what, format!("{group} is no multiple of {STEP_COLS}"))),
    };
    let weight_group = match source.scales() {
        Scales::Group { group, .. } => {
            check("group of weights", *group)?;
            Some(*group)
        }
        _ => None,
    };
    let grouping = match activations {
        ActivationQuant::PerToken => {
            Grouping { cols, scale_cols: cols, sum_cols: weight_group.unwrap_or(cols) }
        }
        ActivationQuant::PerGroup(group) => {
            check("group of activations", group)?;
            if weight_group.is_some_and(|weights| !weights.is_multiple_of(group)) {
                let reason = format!("{group} does not divide the weights' group");
                return Err(Error::invalid("group of activations", reason));
            }
            Grouping { cols, scale_cols: group, sum_cols: group }
        }
    };
    match grouping.n_scales() <= MOST_SCALES {
        true => Ok(grouping),
        false => {
            let reason = format!("{} of a token are more than {MOST_SCALES}", grouping.n_scales());
            Err(Error::invalid("groups of activations", reason))
        }
    }
}

impl<M: DeviceMemory> TileScales<M> {
    fn new(pool: &MetalBufferPool<M>, source: &dyn TernaryRows) -> Result<Self> {
        let (rows, cols) = (source.rows(), source.cols());
        match source.scales() {
            Scales::Tensor(scale) => Ok(Self::Tensor(*scale)),
            Scales::Row(values) if values.len() != rows => {
                Err(Error::shape("scales of rows", rows, values.len()))
            }
            Scales::Row(values) => {
                let mut padded = values.clone();
                padded.resize(rows.next_multiple_of(TILE_ROWS), 0.0);
                Ok(Self::Row(floats(pool, &padded)?))
            }
            Scales::Group { group, values } => {
                let n_groups = cols.div_ceil(*group);
                if rows.checked_mul(n_groups) != Some(values.len()) {
                    let expected = format!("{rows} × {n_groups}");
                    return Err(Error::shape("scales of groups", expected, values.len()));
                }
                let mut tiled = vec![0.0; rows.next_multiple_of(TILE_ROWS) * n_groups];
                for (row, values) in values.chunks_exact(n_groups).enumerate() {
                    let tile = row / TILE_ROWS * n_groups * TILE_ROWS + row % TILE_ROWS;
                    for (g, &value) in values.iter().enumerate() {
                        tiled[tile + g * TILE_ROWS] = value;
                    }
                }
                Ok(Self::Group { group: *group, values: floats(pool, &tiled)? })
            }
        }
    }
}

/// Packs a matrix tile by tile, straight to where the device reads it.
fn pack<M: DeviceMemory>(
    pool: &MetalBufferPool<M>,
    source: &dyn TernaryRows,
) -> Result<MetalBuffer<M>> {
    let (rows, cols) = (source.rows(), source.cols());
    let steps = cols.div_ceil(STEP_COLS);
    let tile_bytes = steps * TILE_ROWS * size_of::<u32>();
    let n_tiles = rows.div_ceil(TILE_ROWS);
    let bytes = n_tiles
        .checked_mul(tile_bytes)
        .ok_or_else(|| Error::OutOfMemory { what: "ternary matrix".into(), bytes: u64::MAX })?;
    let mut packed = MetalBuffer::with_old_contents(pool, bytes, AccessPattern::Weights)?;
    let mut tile = vec![0u32; steps * TILE_ROWS];
    let mut codes = vec![0; steps * STEP_COLS];
    for t in 0..n_tiles {
        tile.fill(0);
        for r in 0..TILE_ROWS.min(rows - t * TILE_ROWS) {
            source.decode_row(t * TILE_ROWS + r, &mut codes[..cols]);
            for (step, columns) in codes.as_chunks::<STEP_COLS>().0.iter().enumerate() {
                tile[step * TILE_ROWS + r] = word(columns);
            }
        }
        packed.write(pool, t * tile_bytes, bytemuck::cast_slice(&tile))?;
    }
    Ok(packed)
}

/// Sixteen codes: bits `2j`, `2j + 1` of byte `b` are the code of column `4j + b`.
fn word(columns: &[u8; STEP_COLS]) -> u32 {
    let mut word = 0;
    for (column, &code) in columns.iter().enumerate() {
        word |= u32::from(code & 3) << (8 * (column % 4) + 2 * (column / 4));
    }
    word
}

/// A buffer of weights that holds these numbers.
pub(crate) fn floats<M: DeviceMemory>(
    pool: &MetalBufferPool<M>,
    values: &[f32],
) -> Result<MetalBuffer<M>> {
    MetalBuffer::holding(pool, bytemuck::cast_slice(values), AccessPattern::Weights)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_word_holds_the_codes_where_the_kernels_look() {
        let mut columns = [0; STEP_COLS];
        for (column, code) in columns.iter_mut().enumerate() {
            *code = (column as u8 * 7 + 2) % 4;
        }
        let word = word(&columns);
        for field in 0..4 {
            let bytes = (word >> (2 * field) & 0x0303_0303).to_le_bytes();
            assert_eq!(bytes, columns[4 * field..4 * field + 4]);
        }
    }
}

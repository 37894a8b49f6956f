//! Float matrices on the device: embedding tables, heads, and projections that are not ternary.
//!
//! `kernels/rows.metal` has the picture of the layout.

use crate::buffer::{MetalBuffer, MetalBufferPool};
use bitnet_core::memory::{AccessPattern, DeviceMemory};
use bitnet_core::weights::{FloatRows, FloatType};
use bitnet_core::{Error, Result};

/// Rows of a tile and columns of a step.
const TILE_ROWS: usize = 8;
const STEP_COLS: usize = 16;

/// A float matrix `(rows, cols)` in tiles.
pub struct FloatMatrix<M: DeviceMemory> {
    pub(crate) rows: usize,
    pub(crate) cols: usize,
    pub(crate) format: FloatType,
    pub(crate) numbers: MetalBuffer<M>,
}

impl<M: DeviceMemory> FloatMatrix<M> {
    /// Takes a source's numbers over in their format; one without plain numbers is decoded to f16.
    pub(crate) fn new(pool: &MetalBufferPool<M>, source: &dyn FloatRows) -> Result<Self> {
        let (rows, cols) = (source.rows(), source.cols());
        if rows == 0 || cols == 0 {
            return Err(Error::invalid("float matrix", format!("{rows}×{cols} is empty")));
        }
        let raw = source.raw();
        let format = raw.as_ref().map_or(FloatType::F16, |(format, _)| *format);
        let size = format.size();
        if let Some((_, bytes)) = &raw
            && rows.checked_mul(cols).and_then(|n| n.checked_mul(size)) != Some(bytes.len())
        {
            return Err(Error::shape("bytes of a float matrix", rows * cols * size, bytes.len()));
        }
        let steps = cols.div_ceil(STEP_COLS);
        let tile_bytes = steps * TILE_ROWS * STEP_COLS * size;
        let n_tiles = rows.div_ceil(TILE_ROWS);
        let bytes = n_tiles
            .checked_mul(tile_bytes)
            .ok_or_else(|| Error::OutOfMemory { what: "float matrix".into(), bytes: u64::MAX })?;
        let mut numbers = MetalBuffer::with_old_contents(pool, bytes, AccessPattern::Weights)?;
        let mut tile = vec![0; tile_bytes];
        let mut decoded = vec![0.0; cols];
        let mut halves = vec![0; cols * 2];
        for t in 0..n_tiles {
            tile.fill(0);
            for r in 0..TILE_ROWS.min(rows - t * TILE_ROWS) {
                let row = t * TILE_ROWS + r;
                let numbers = match &raw {
                    Some((_, bytes)) => &bytes[row * cols * size..][..cols * size],
                    None => {
                        source.decode_row(row, &mut decoded);
                        for (half, &x) in halves.as_chunks_mut::<2>().0.iter_mut().zip(&decoded) {
                            *half = half::f16::from_f32(x).to_le_bytes();
                        }
                        &halves
                    }
                };
                for (step, numbers) in numbers.chunks(STEP_COLS * size).enumerate() {
                    let at = (step * TILE_ROWS + r) * STEP_COLS * size;
                    tile[at..at + numbers.len()].copy_from_slice(numbers);
                }
            }
            numbers.write(pool, t * tile_bytes, &tile)?;
        }
        source.release();
        Ok(Self { rows, cols, format, numbers })
    }

    pub(crate) fn n_tiles(&self) -> usize {
        self.rows.div_ceil(TILE_ROWS)
    }

    pub(crate) fn steps(&self) -> usize {
        self.cols.div_ceil(STEP_COLS)
    }

    /// The number the kernels know its format by.
    pub(crate) fn format_code(&self) -> u32 {
        match self.format {
            FloatType::F32 => 0,
            FloatType::F16 => 1,
            FloatType::BF16 => 2,
        }
    }
}

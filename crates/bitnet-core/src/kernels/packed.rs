//! How ternary weights lie in memory: what the kernels read.
//!
//! A tile is 16 rows. It is stored as a straight run of steps of 64 bytes, four for each row:
//!
//! ```text
//! step   u32 of row 0 | u32 of row 1 | … | u32 of row 15        little-endian
//! ```
//!
//! With [`Packing::Codes`], which every kernel reads, a step is 16 columns at two bits:
//!
//! ```text
//! u32    byte 3            byte 2            byte 1            byte 0
//! bits   76  54  32  10    76  54  32  10    76  54  32  10    76  54  32  10
//! column 15  11   7   3    14  10   6   2    13   9   5   1    12   8   4   0   (+ 16·step)
//! ```
//!
//! Two bits hold a code, trit + 1. Field `j` (bits `2j`, `2j + 1` of each byte) holds columns
//! `4j … 4j + 3`, so `(word >> 2j) & 0x03030303` is four consecutive columns as bytes: one operand
//! of a four-way dot product whose other operand, four activations, is the same for all 16 rows.
//! A vector of row words thus ends up as a vector of row sums, and nothing is added across lanes.
//!
//! With [`Packing::Trits`] a step is 20 columns at 1.6 bits, for kernels that can afford to unpack
//! them. Byte `b` of a word holds the codes of columns `b, b + 4, … b + 16 (+ 20·step)` as digits to
//! base 3, the first the lowest:
//!
//! ```text
//! byte b = c[b] + 3·c[b+4] + 9·c[b+8] + 27·c[b+12] + 81·c[b+16]
//! ```
//!
//! Rows are padded to whole tiles and columns to whole steps. Padding is code 0; the activations
//! of padding columns are 0, and the sums of padding rows are never looked at.

use super::Kernels;
use super::memory::{Storage, WeightMemory};
use crate::error::{Error, Result};
use crate::threads::{Parts, ThreadPool, share};
use crate::weights::{MAX_TERNARY_COLS, TernaryRows};
use std::ops::Range;
use std::sync::atomic::{AtomicBool, Ordering};

/// How many weights share a byte.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Packing {
    /// Four codes 0–3.
    Codes,
    /// Five codes 0–2.
    Trits,
}

impl Packing {
    /// Columns of a step.
    pub const fn step_cols(self) -> usize {
        match self {
            Self::Codes => STEP_COLS,
            Self::Trits => 20,
        }
    }
}

/// Rows of a tile.
pub const TILE_ROWS: usize = 16;
/// Columns of a step of [`Packing::Codes`]; groups of columns that share a scale are multiples.
pub const STEP_COLS: usize = 16;
/// Bytes of a step.
pub const STEP_BYTES: usize = 64;

const _: () = assert!(TILE_ROWS * STEP_COLS * 2 == STEP_BYTES * 8);

/// A ternary matrix in the layout of the kernels, without scales.
pub struct PackedTernary {
    rows: usize,
    cols: usize,
    packing: Packing,
    codes: Storage,
}

impl PackedTernary {
    /// Takes the source's tiles if it has them in this packing, or repacks its rows, each thread the
    /// tiles it would take in a product. A matrix with a code 3 cannot be packed as trits, and is
    /// packed as codes.
    ///
    /// # Errors
    /// [`Error::Invalid`] if the matrix is empty or has more than [`MAX_TERNARY_COLS`] columns,
    /// [`Error::Shape`] if its tiles are not as many as its shape needs, [`Error::OutOfMemory`] if
    /// there is no room.
    pub fn new(
        source: &dyn TernaryRows,
        packing: Packing,
        kernels: &'static Kernels,
        pool: &ThreadPool,
        memory: &mut WeightMemory,
    ) -> Result<Self> {
        let (rows, cols) = (source.rows(), source.cols());
        if rows == 0 || cols == 0 || cols > MAX_TERNARY_COLS {
            let reason = format!("{rows}×{cols} is empty or wider than {MAX_TERNARY_COLS} columns");
            return Err(Error::invalid("ternary matrix", reason));
        }
        let n_tiles = rows.div_ceil(TILE_ROWS);
        let tile_bytes = cols.div_ceil(packing.step_cols()) * STEP_BYTES;
        let bytes = n_tiles
            .checked_mul(tile_bytes)
            .ok_or_else(|| Error::OutOfMemory { what: "ternary matrix".into(), bytes: u64::MAX })?;
        if let Some((_, tiles)) = source.tiles().filter(|(held, _)| *held == packing) {
            if tiles.len() != bytes {
                return Err(Error::shape("tiles of a ternary matrix", bytes, tiles.len()));
            }
            return Ok(Self { rows, cols, packing, codes: Storage::Shared(tiles) });
        }
        let mut block = memory.take(bytes)?;
        let stride = cols.next_multiple_of(packing.step_cols());
        let codes = Parts::new(&mut block);
        let too_large = AtomicBool::new(false);
        pool.run(&|thread| {
            let mut decoded = vec![0; TILE_ROWS * stride];
            for tile in share(n_tiles, pool.threads(), thread) {
                for (r, row) in decoded.chunks_exact_mut(stride).enumerate() {
                    match tile * TILE_ROWS + r {
                        i if i < rows => source.decode_row(i, &mut row[..cols]),
                        _ => row.fill(0),
                    }
                }
                // A maximum of all, which compiles to vector code; a search would stop at each byte.
                if packing == Packing::Trits && decoded.iter().fold(0, |m, &c| c.max(m)) > 2 {
                    return too_large.store(true, Ordering::Relaxed);
                }
                // SAFETY: the shares of the threads are disjoint, and so are their tiles' bytes.
                let out = unsafe { codes.part(tile * tile_bytes..(tile + 1) * tile_bytes) };
                kernels.pack_tile(packing, &decoded, out);
            }
        });
        if too_large.into_inner() {
            return Self::new(source, Packing::Codes, kernels, pool, memory);
        }
        source.release();
        Ok(Self { rows, cols, packing, codes: Storage::Own(block) })
    }

    /// Output features.
    pub fn rows(&self) -> usize {
        self.rows
    }

    /// Input features.
    pub fn cols(&self) -> usize {
        self.cols
    }

    /// How many weights share a byte.
    pub fn packing(&self) -> Packing {
        self.packing
    }

    /// Columns rounded up to whole steps.
    pub fn padded_cols(&self) -> usize {
        self.cols.next_multiple_of(self.packing.step_cols())
    }

    /// Steps of a tile.
    pub fn steps(&self) -> usize {
        self.cols.div_ceil(self.packing.step_cols())
    }

    /// Tiles of 16 rows.
    pub fn n_tiles(&self) -> usize {
        self.rows.div_ceil(TILE_ROWS)
    }

    /// The bytes of consecutive tiles.
    pub fn tiles(&self, tiles: Range<usize>) -> &[u8] {
        let tile_bytes = self.steps() * STEP_BYTES;
        &self.codes[tiles.start * tile_bytes..tiles.end * tile_bytes]
    }

    /// Bytes held, mapped ones included.
    pub fn memory_bytes(&self) -> u64 {
        self.codes.len() as u64
    }

    /// The code at `(row, col)`: for tests and tools.
    pub fn code(&self, row: usize, col: usize) -> u8 {
        assert!(row < self.rows && col < self.cols, "({row}, {col}) is outside the matrix");
        let tile = self.tiles(row / TILE_ROWS..row / TILE_ROWS + 1);
        let (step, col) = (col / self.packing.step_cols(), col % self.packing.step_cols());
        let (field, byte) = (col / 4, tile[step * STEP_BYTES + row % TILE_ROWS * 4 + col % 4]);
        match self.packing {
            Packing::Codes => byte >> (2 * field) & 3,
            Packing::Trits => byte / 3u8.pow(field as u32) % 3,
        }
    }
}

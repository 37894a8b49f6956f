//! Float matrices as they lie in a file: f32, f16 or bf16 bytes, perhaps mapped, at any alignment.
//! Kept as they are where the source has them, so that loading a head costs nothing.

use super::memory::{Storage, WeightMemory};
use super::{Kernels, TILE_ROWS, prefetch};
use crate::cpu::math::{LANES, sum_lanes};
use crate::error::{Error, Result};
use crate::threads::{Parts, ThreadPool, share};
use crate::weights::{FloatRows, FloatType};
use std::ops::Range;

/// Up to 16 consecutive rows of a float matrix.
#[derive(Debug, Clone, Copy)]
pub struct FloatTile<'a> {
    /// Little-endian numbers, row-major.
    pub bytes: &'a [u8],
    /// Their format.
    pub dtype: FloatType,
    /// Numbers in a row.
    pub cols: usize,
}

impl FloatTile<'_> {
    /// Number of rows.
    pub fn n_rows(&self) -> usize {
        self.bytes.len() / (self.cols * self.dtype.size())
    }
}

/// A number format of weights.
pub(super) trait Number {
    const SIZE: usize;
    /// The number in the first `SIZE` little-endian bytes, exactly.
    fn decode(bytes: &[u8]) -> f32;
}

impl Number for f32 {
    const SIZE: usize = 4;

    #[inline(always)]
    fn decode(bytes: &[u8]) -> f32 {
        f32::from_le_bytes([bytes[0], bytes[1], bytes[2], bytes[3]])
    }
}

impl Number for half::bf16 {
    const SIZE: usize = 2;

    #[inline(always)]
    fn decode(bytes: &[u8]) -> f32 {
        f32::from_bits(u32::from(u16::from_le_bytes([bytes[0], bytes[1]])) << 16)
    }
}

impl Number for half::f16 {
    const SIZE: usize = 2;

    /// Moves exponent and mantissa to their places in an f32 and corrects the exponent's bias by a
    /// multiplication, which also makes normal numbers of subnormal ones. No branch, no table.
    #[inline(always)]
    fn decode(bytes: &[u8]) -> f32 {
        let bits = u32::from(u16::from_le_bytes([bytes[0], bytes[1]]));
        let finite = f32::from_bits((bits & 0x7fff) << 13) * f32::from_bits((127 + 112) << 23);
        let special = f32::from_bits(0x7f80_0000 | (bits & 0x3ff) << 13);
        let magnitude = if bits & 0x7c00 == 0x7c00 { special } else { finite };
        f32::from_bits(magnitude.to_bits() | (bits & 0x8000) << 16)
    }
}

/// A float matrix `(rows, cols)` for the kernels.
pub struct FloatMatrix {
    rows: usize,
    cols: usize,
    dtype: FloatType,
    bytes: Storage,
}

impl FloatMatrix {
    /// Takes the source's bytes; a source that has no plain numbers is decoded to f16.
    ///
    /// # Errors
    /// [`Error::Shape`] if the bytes are not `rows · cols` numbers, [`Error::Invalid`] if there are
    /// none, [`Error::OutOfMemory`] if there is no room.
    pub fn new(
        source: &dyn FloatRows,
        pool: &ThreadPool,
        memory: &mut WeightMemory,
    ) -> Result<Self> {
        let (rows, cols) = (source.rows(), source.cols());
        let len = |dtype: FloatType| {
            let bytes = rows.checked_mul(cols).and_then(|n| n.checked_mul(dtype.size()));
            bytes.ok_or_else(|| Error::invalid("float matrix", format!("{rows}×{cols} overflows")))
        };
        if rows == 0 || cols == 0 {
            return Err(Error::invalid("float matrix", format!("{rows}×{cols} is empty")));
        }
        if let Some((dtype, bytes)) = source.raw() {
            if bytes.len() != len(dtype)? {
                return Err(Error::shape("bytes of a float matrix", len(dtype)?, bytes.len()));
            }
            return Ok(Self { rows, cols, dtype, bytes: Storage::Shared(bytes) });
        }
        let mut block = memory.take(len(FloatType::F16)?)?;
        let parts = Parts::new(&mut block);
        pool.run(&|thread| {
            let mut decoded = vec![0.0; cols];
            for row in share(rows, pool.threads(), thread) {
                source.decode_row(row, &mut decoded);
                // SAFETY: rows are shared out once each, and rows do not overlap.
                let out = unsafe { parts.part(row * cols * 2..(row + 1) * cols * 2) };
                for (out, &x) in out.as_chunks_mut::<2>().0.iter_mut().zip(&decoded) {
                    *out = half::f16::from_f32(x).to_le_bytes();
                }
            }
        });
        source.release();
        Ok(Self { rows, cols, dtype: FloatType::F16, bytes: Storage::Own(block) })
    }

    /// Output features.
    pub fn rows(&self) -> usize {
        self.rows
    }

    /// Input features.
    pub fn cols(&self) -> usize {
        self.cols
    }

    /// Tiles of 16 rows; the last may be shorter.
    pub fn n_tiles(&self) -> usize {
        self.rows.div_ceil(TILE_ROWS)
    }

    /// Consecutive rows; a tile if there are at most 16.
    pub fn rows_at(&self, rows: Range<usize>) -> FloatTile<'_> {
        let bytes = &self.bytes[..];
        let row_bytes = self.cols * self.dtype.size();
        FloatTile {
            bytes: &bytes[rows.start * row_bytes..rows.end.min(self.rows) * row_bytes],
            dtype: self.dtype,
            cols: self.cols,
        }
    }

    /// Writes row `row` into `out` (length `cols`), as f32.
    ///
    /// # Panics
    /// If `row` is not below `rows` or `out` has another length.
    pub fn decode_row(&self, row: usize, out: &mut [f32]) {
        assert!(row < self.rows && out.len() == self.cols);
        let bytes = self.rows_at(row..row + 1).bytes;
        match self.dtype {
            FloatType::F32 => decode::<f32>(bytes, out),
            FloatType::F16 => decode::<half::f16>(bytes, out),
            FloatType::BF16 => decode::<half::bf16>(bytes, out),
        }
    }

    /// `out = x · Wᵀ` for `x` `(n_tokens, cols)` and `out` `(n_tokens, rows)`.
    ///
    /// # Panics
    /// If the lengths of the slices do not fit together.
    pub fn project(
        &self,
        pool: &ThreadPool,
        kernels: &Kernels,
        x: &[f32],
        n_tokens: usize,
        out: &mut [f32],
    ) {
        /// Tokens whose results fit on the stack.
        const TOKENS: usize = 16;
        assert!(x.len() == n_tokens * self.cols && out.len() == n_tokens * self.rows);
        let out = Parts::new(out);
        pool.run(&|thread| {
            let tiles = share(self.n_tiles(), pool.threads(), thread);
            let mut y = [0.0; TOKENS * TILE_ROWS];
            for tile in tiles {
                let rows = tile * TILE_ROWS..self.rows.min((tile + 1) * TILE_ROWS);
                let weights = self.rows_at(rows.clone());
                for (block, x) in x.chunks(TOKENS * self.cols).enumerate() {
                    let n = x.len() / self.cols;
                    kernels.float_products(&weights, x, n, &mut y[..n * TILE_ROWS]);
                    for (i, y) in y.chunks_exact(TILE_ROWS).take(n).enumerate() {
                        let at = (block * TOKENS + i) * self.rows;
                        // SAFETY: tiles are shared out once each, so the row ranges are disjoint.
                        let out = unsafe { out.part(at + rows.start..at + rows.end) };
                        out.copy_from_slice(&y[..rows.len()]);
                    }
                }
            }
        });
    }

    /// Bytes held, mapped ones included.
    pub fn memory_bytes(&self) -> u64 {
        (self.rows * self.cols * self.dtype.size()) as u64
    }
}

/// Sixteen f32 lanes in the registers of an instruction set.
///
/// # Safety
/// Callers of the unsafe methods must run on a CPU with the instruction set, inside a function
/// compiled for it: only there do the methods become single instructions.
pub(super) trait Lanes: Copy {
    /// 0 in every lane.
    unsafe fn zero() -> Self;
    /// Sixteen little-endian f32.
    unsafe fn f32s(bytes: &[u8; 64]) -> Self;
    /// Sixteen little-endian f16, exactly.
    unsafe fn f16s(bytes: &[u8; 32]) -> Self;
    /// Sixteen little-endian bf16, exactly.
    unsafe fn bf16s(bytes: &[u8; 32]) -> Self;
    /// `self + a · b`, the product rounded before the addition.
    unsafe fn add_product(self, a: Self, b: Self) -> Self;
    /// The lanes in order.
    unsafe fn to_array(self) -> [f32; 16];
}

/// [`Kernels::float_products`] for an instruction set: four rows at a time for a single token,
/// `ROWS` rows and `TOKENS` tokens for several, as many as its registers hold.
///
/// # Safety
/// As [`Lanes`].
#[inline(always)]
pub(super) unsafe fn products<L: Lanes, const ROWS: usize, const TOKENS: usize>(
    tile: &FloatTile<'_>,
    x: &[f32],
    n_tokens: usize,
    out: &mut [f32],
) {
    // SAFETY: the caller's promise.
    unsafe {
        match (tile.dtype, n_tokens) {
            (FloatType::F32, 1) => blocks::<L, f32, 64, 4, 1>(tile, x, out),
            (FloatType::F32, _) => blocks::<L, f32, 64, ROWS, TOKENS>(tile, x, out),
            (FloatType::F16, 1) => blocks::<L, half::f16, 32, 4, 1>(tile, x, out),
            (FloatType::F16, _) => blocks::<L, half::f16, 32, ROWS, TOKENS>(tile, x, out),
            (FloatType::BF16, 1) => blocks::<L, half::bf16, 32, 4, 1>(tile, x, out),
            (FloatType::BF16, _) => blocks::<L, half::bf16, 32, ROWS, TOKENS>(tile, x, out),
        }
    }
}

/// Cuts a tile into blocks of `ROWS` rows and `TOKENS` tokens; what is left over goes one by one.
#[inline(always)]
unsafe fn blocks<L, N, const BYTES: usize, const ROWS: usize, const TOKENS: usize>(
    tile: &FloatTile<'_>,
    x: &[f32],
    out: &mut [f32],
) where
    L: Lanes,
    N: LaneNumber<BYTES>,
{
    let row_bytes = tile.cols * N::SIZE;
    let n_rows = tile.n_rows();
    let whole_rows = n_rows / ROWS * ROWS;
    let tokens = x.chunks(TOKENS * tile.cols).zip(out.chunks_mut(TOKENS * TILE_ROWS));
    for (x, out) in tokens {
        // SAFETY: the caller's promise.
        unsafe {
            for first in (0..whole_rows).step_by(ROWS) {
                let rows = &tile.bytes[first * row_bytes..];
                if x.len() == TOKENS * tile.cols {
                    block::<L, N, BYTES, ROWS, TOKENS>(rows, x, tile.cols, &mut out[first..]);
                } else {
                    for (x, out) in x.chunks(tile.cols).zip(out.chunks_mut(TILE_ROWS)) {
                        block::<L, N, BYTES, ROWS, 1>(rows, x, tile.cols, &mut out[first..]);
                    }
                }
            }
            for row in whole_rows..n_rows {
                let bytes = &tile.bytes[row * row_bytes..];
                for (x, out) in x.chunks(tile.cols).zip(out.chunks_mut(TILE_ROWS)) {
                    block::<L, N, BYTES, 1, 1>(bytes, x, tile.cols, &mut out[row..]);
                }
            }
        }
    }
}

/// `out[16 · token + row]` for the first rows of `bytes` and the first tokens of `x`.
#[inline(always)]
unsafe fn block<L, N, const BYTES: usize, const ROWS: usize, const TOKENS: usize>(
    bytes: &[u8],
    x: &[f32],
    cols: usize,
    out: &mut [f32],
) where
    L: Lanes,
    N: LaneNumber<BYTES>,
{
    let row_bytes = cols * N::SIZE;
    let rows: [&[u8]; ROWS] = std::array::from_fn(|r| &bytes[r * row_bytes..][..row_bytes]);
    let tokens: [&[f32]; TOKENS] = std::array::from_fn(|t| &x[t * cols..][..cols]);
    // SAFETY: the caller's promise; block `i` is in bounds while `i < cols / 16`.
    unsafe {
        let mut sums = [[L::zero(); ROWS]; TOKENS];
        let whole = cols / LANES;
        for i in 0..whole {
            let mut x = [L::zero(); TOKENS];
            for t in 0..TOKENS {
                x[t] = L::f32s(&*tokens[t].as_ptr().add(i * LANES).cast());
            }
            for r in 0..ROWS {
                let address = rows[r].as_ptr().add(i * BYTES);
                // The next rows at the same columns: a whole block of rows to be read meanwhile.
                prefetch(address.wrapping_add(ROWS * row_bytes));
                let weights = N::lanes::<L>(&*address.cast());
                for t in 0..TOKENS {
                    sums[t][r] = sums[t][r].add_product(weights, x[t]);
                }
            }
        }
        if whole * LANES < cols {
            // Idle lanes add 0 · 0 to a sum that is never −0, which changes nothing.
            let mut x = [L::zero(); TOKENS];
            for t in 0..TOKENS {
                let mut padded = [0.0f32; LANES];
                padded[..cols % LANES].copy_from_slice(&tokens[t][whole * LANES..]);
                x[t] = L::f32s(&*padded.as_ptr().cast());
            }
            for r in 0..ROWS {
                let mut padded = [0; BYTES];
                let rest = &rows[r][whole * BYTES..];
                padded[..rest.len()].copy_from_slice(rest);
                let weights = N::lanes::<L>(&padded);
                for t in 0..TOKENS {
                    sums[t][r] = sums[t][r].add_product(weights, x[t]);
                }
            }
        }
        for t in 0..TOKENS {
            for r in 0..ROWS {
                out[t * TILE_ROWS + r] = sum_lanes(sums[t][r].to_array());
            }
        }
    }
}

/// A number format of which 16 take `BYTES` bytes.
trait LaneNumber<const BYTES: usize>: Number {
    /// # Safety
    /// As [`Lanes`].
    unsafe fn lanes<L: Lanes>(bytes: &[u8; BYTES]) -> L;
}

impl LaneNumber<64> for f32 {
    #[inline(always)]
    unsafe fn lanes<L: Lanes>(bytes: &[u8; 64]) -> L {
        // SAFETY: the caller's promise.
        unsafe { L::f32s(bytes) }
    }
}

impl LaneNumber<32> for half::f16 {
    #[inline(always)]
    unsafe fn lanes<L: Lanes>(bytes: &[u8; 32]) -> L {
        // SAFETY: the caller's promise.
        unsafe { L::f16s(bytes) }
    }
}

impl LaneNumber<32> for half::bf16 {
    #[inline(always)]
    unsafe fn lanes<L: Lanes>(bytes: &[u8; 32]) -> L {
        // SAFETY: the caller's promise.
        unsafe { L::bf16s(bytes) }
    }
}

#[inline(always)]
pub(super) fn decode<N: Number>(bytes: &[u8], out: &mut [f32]) {
    for (out, bytes) in out.iter_mut().zip(bytes.chunks_exact(N::SIZE)) {
        *out = N::decode(bytes);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_half_decodes_exactly() {
        for bits in 0..=u16::MAX {
            let bytes = bits.to_le_bytes();
            let (ours, theirs) =
                (<half::f16 as Number>::decode(&bytes), half::f16::from_bits(bits).to_f32());
            assert!(ours.to_bits() == theirs.to_bits() || ours.is_nan() && theirs.is_nan());
            let (ours, theirs) =
                (<half::bf16 as Number>::decode(&bytes), half::bf16::from_bits(bits).to_f32());
            assert!(ours.to_bits() == theirs.to_bits() || ours.is_nan() && theirs.is_nan());
        }
    }
}

//! Brings matrices to the device: rows packed by all cores, in as many buffers as bindings need.

use std::sync::Arc;

use bitnet_core::memory::{AccessPattern, Transfer};
use bitnet_core::weights::{FloatRows, FloatType, TernaryRows};
use bitnet_core::{Error, Result};

use crate::memory::{Manager, Region, WgpuMemory};

/// Rows of one buffer, at most: workgroups of a grid's dimension, with a row each in some kernels.
const MAX_ROWS: usize = 65_504;
/// Words packed at a time and copied while the next are packed.
const PIECE_WORDS: usize = 1 << 20;

/// Some consecutive rows of a matrix, in a buffer of their own.
#[derive(Debug)]
pub(crate) struct Part {
    pub(crate) weights: Region,
    pub(crate) first_row: usize,
    pub(crate) n_rows: usize,
}

/// Uploads `rows` rows of `words` words each; `pack(row, words)` fills one, zeroed before. While the
/// device copies some rows, the host packs the next; two staging buffers take turns. With unified
/// memory rows are written in place.
pub(crate) fn upload(
    memory: &Manager,
    what: &str,
    rows: usize,
    words: usize,
    pack: impl Fn(usize, &mut [u32]) + Sync,
) -> Result<Vec<Part>> {
    if rows == 0 || words == 0 {
        return Err(Error::invalid(what, "an empty matrix"));
    }
    let pool = memory.pool();
    let gpu = pool.memory().gpu();
    let row_bytes = 4 * words as u64;
    let rows_each = (gpu.max_binding_bytes / row_bytes).min(MAX_ROWS as u64) as usize;
    if rows_each == 0 {
        return Err(Error::OutOfMemory { what: format!("a row of {what}"), bytes: row_bytes });
    }
    let mut parts = Vec::new();
    for first_row in (0..rows).step_by(rows_each) {
        let n_rows = rows_each.min(rows - first_row);
        let mut weights = pool.take(n_rows as u64 * row_bytes, AccessPattern::Weights)?;
        let rows_per_piece = (PIECE_WORDS / words).max(1);
        let mut under_way: Option<Transfer<WgpuMemory>> = None;
        for first in (0..n_rows).step_by(rows_per_piece) {
            let n = rows_per_piece.min(n_rows - first);
            let mut piece = vec![0u32; n * words];
            pack_rows(&mut piece, words, first_row + first, &pack);
            if let Some(before) = under_way.take() {
                before.wait()?;
            }
            let bytes = bytemuck::cast_slice(&piece);
            let at = first as u64 * row_bytes;
            under_way = Some(memory.copy_to_gpu_async(bytes, &mut weights, at)?);
        }
        if let Some(last) = under_way {
            last.wait()?;
        }
        parts.push(Part { weights, first_row, n_rows });
    }
    gpu.check()?;
    Ok(parts)
}

/// Packs rows from `first` on, each core a share of them.
fn pack_rows(
    piece: &mut [u32],
    words: usize,
    first: usize,
    pack: &(impl Fn(usize, &mut [u32]) + Sync),
) {
    /// Words that are packed before a thread would have started.
    const FEW: usize = 1 << 14;
    let threads = std::thread::available_parallelism().map_or(1, usize::from);
    let each = (piece.len() / words).div_ceil(threads);
    let pack_share = |share: usize, rows: &mut [u32]| {
        for (i, row) in rows.chunks_exact_mut(words).enumerate() {
            pack(first + share * each + i, row);
        }
    };
    if threads == 1 || piece.len() < FEW {
        for (i, row) in piece.chunks_exact_mut(words).enumerate() {
            pack(first + i, row);
        }
        return;
    }
    std::thread::scope(|scope| {
        for (share, rows) in piece.chunks_mut(each * words).enumerate() {
            let pack_share = &pack_share;
            scope.spawn(move || pack_share(share, rows));
        }
    });
}

/// Words of 16 columns that a row of codes takes.
pub(crate) fn code_words(cols: usize) -> usize {
    cols.div_ceil(16)
}

/// Uploads a ternary matrix; `kernels/ternary.wgsl` shows the layout of a word.
pub(crate) fn upload_codes(memory: &Manager, source: &dyn TernaryRows) -> Result<Vec<Part>> {
    let (rows, cols) = (source.rows(), source.cols());
    let parts = upload(memory, "ternary weights", rows, code_words(cols), |row, words| {
        let mut codes = vec![0u8; 16 * words.len()];
        source.decode_row(row, &mut codes[..cols]);
        for (word, codes) in words.iter_mut().zip(codes.as_chunks::<16>().0) {
            for (col, &code) in codes.iter().enumerate() {
                let (field, byte) = (col / 4, col % 4);
                *word |= u32::from(code & 3) << (8 * byte + 2 * field);
            }
        }
    })?;
    source.release();
    Ok(parts)
}

/// Words of a row of floats.
pub(crate) fn float_words(cols: usize, dtype: FloatType) -> usize {
    (cols * dtype.size()).div_ceil(4)
}

/// Uploads a float matrix as the numbers its source holds, or as f16 if it holds no plain ones.
/// Returns its format.
pub(crate) fn upload_floats(
    memory: &Manager,
    what: &str,
    source: &Arc<dyn FloatRows>,
) -> Result<(FloatType, Vec<Part>)> {
    let (rows, cols) = (source.rows(), source.cols());
    let raw = source.raw();
    let dtype = raw.as_ref().map_or(FloatType::F16, |(dtype, _)| *dtype);
    let row_bytes = cols * dtype.size();
    if let Some((_, bytes)) = &raw
        && rows.checked_mul(row_bytes) != Some(bytes.len())
    {
        let expected = format!("{rows} × {row_bytes} bytes");
        return Err(Error::shape(what, expected, bytes.len()));
    }
    let parts = upload(memory, what, rows, float_words(cols, dtype), |row, words| match &raw {
        Some((_, bytes)) => {
            let bytes = &bytes[row * row_bytes..][..row_bytes];
            for (word, bytes) in words.iter_mut().zip(bytes.chunks(4)) {
                let mut padded = [0; 4];
                padded[..bytes.len()].copy_from_slice(bytes);
                *word = u32::from_le_bytes(padded);
            }
        }
        None => {
            let mut values = vec![0.0; cols];
            source.decode_row(row, &mut values);
            let half = |x: f32| u32::from(half::f16::from_f32(x).to_bits());
            for (word, pair) in words.iter_mut().zip(values.chunks(2)) {
                *word = half(pair[0]) | pair.get(1).map_or(0, |&x| half(x) << 16);
            }
        }
    })?;
    source.release();
    Ok((dtype, parts))
}

/// Bytes of some parts.
pub(crate) fn bytes(parts: &[Part]) -> u64 {
    parts.iter().map(|part| part.weights.bytes()).sum()
}

//! Packs any source of codes into any packing, or says why it does not fit.
//!
//! Trits are never changed. Scales of block packings are rounded to half precision; how much that
//! changes them is reported. Runs on the threads of rayon.

use super::block::{self, Block};
use super::{Packing, hf_u8, i2_s, ptq1_0, q1_0, q2_0, tiles, tq1_0, tq2_0};
use crate::error::{Error, Result};
use bitnet_core::kernels::TILE_ROWS;
use bitnet_core::weights::{Scales, TernaryRows};
use rayon::prelude::*;

/// A packed matrix.
#[derive(Debug, Clone, PartialEq)]
pub struct Encoded {
    /// The packed matrix. Packings without scales among the bytes need the source's beside them.
    pub bytes: Vec<u8>,
    /// The largest relative change of a scale by rounding it; 0 where all are exact.
    pub scale_error: f32,
}

/// Packs the matrix `what`.
///
/// Errors if the shape, a code or the number of scales does not fit `packing`, or if a scale is too
/// small or too large for half precision.
pub fn encode(packing: Packing, source: &dyn TernaryRows, what: &str) -> Result<Encoded> {
    let (rows, cols) = (source.rows(), source.cols());
    let does_not_fit = |reason| Error::does_not_fit(what, packing, reason);
    let len = packing.bytes(what, rows, cols).map_err(|error| does_not_fit(error.to_string()))?;
    let mut bytes = vec![0; len];

    let mut code_bytes = &mut bytes[..];
    let tail_bytes = match packing {
        Packing::I2S(_) => i2_s::TAIL,
        Packing::Tiles => tiles::TAIL,
        _ => 0,
    };
    if tail_bytes > 0 {
        let tail;
        (code_bytes, tail) = code_bytes.split_at_mut(len - tail_bytes);
        tail[..4].copy_from_slice(&one_scale(source).map_err(does_not_fit)?.to_le_bytes());
    }

    // A unit is the least number of bytes that holds whole rows.
    let units = match packing {
        Packing::I2S(layout) => rows / layout.rows_together(),
        Packing::Tiles => rows.div_ceil(TILE_ROWS),
        Packing::HfU8 => hf_u8::packed_rows(rows),
        _ => rows,
    };
    let scale_error = code_bytes
        .par_chunks_exact_mut(code_bytes.len() / units)
        .enumerate()
        .map_init(
            || vec![0; cols],
            |row_codes, (unit, bytes)| encode_unit(packing, source, unit, units, row_codes, bytes),
        )
        .try_reduce(|| 0.0, |a, b| Ok(a.max(b)))
        .map_err(does_not_fit)?;
    Ok(Encoded { bytes, scale_error })
}

/// Packs the rows of one unit of `units`; `bytes` are zero, `codes` is room for a row. Returns the
/// largest relative scale error.
fn encode_unit(
    packing: Packing,
    source: &dyn TernaryRows,
    unit: usize,
    units: usize,
    codes: &mut [u8],
    bytes: &mut [u8],
) -> Result<f32, String> {
    let rows = source.rows();
    match packing {
        Packing::I2S(layout) => {
            let together = layout.rows_together();
            for row in unit * together..(unit + 1) * together {
                trits_of(source, row, codes)?;
                layout.encode_row(row, codes, bytes);
            }
            Ok(0.0)
        }
        Packing::Tiles => {
            let rows = unit * TILE_ROWS..rows.min((unit + 1) * TILE_ROWS);
            let cols = codes.len();
            let mut all = vec![0; rows.len() * cols];
            for (row, codes) in rows.zip(all.chunks_exact_mut(cols)) {
                trits_of(source, row, codes)?;
            }
            tiles::encode_tile(&all, cols, bytes);
            Ok(0.0)
        }
        Packing::HfU8 => {
            for row in (unit..rows).step_by(units) {
                trits_of(source, row, codes)?;
                hf_u8::encode_row(rows, row, codes, bytes);
            }
            Ok(0.0)
        }
        Packing::Tq1_0 => encode_blocks::<tq1_0::Tq1_0, _, _>(source, unit, codes, bytes),
        Packing::Tq2_0 => encode_blocks::<tq2_0::Tq2_0, _, _>(source, unit, codes, bytes),
        Packing::Q2_0 => encode_blocks::<q2_0::Q2_0, _, _>(source, unit, codes, bytes),
        Packing::Q2_0G128 => encode_blocks::<q2_0::Q2_0G128, _, _>(source, unit, codes, bytes),
        Packing::Q1_0 => encode_blocks::<q1_0::Q1_0, _, _>(source, unit, codes, bytes),
        Packing::Ptq1_0 => encode_blocks::<ptq1_0::Ptq1_0, _, _>(source, unit, codes, bytes),
    }
}

/// The codes of a row, none of them 3.
fn trits_of(source: &dyn TernaryRows, row: usize, codes: &mut [u8]) -> Result<(), String> {
    source.decode_row(row, codes);
    if codes.contains(&3) { Err(format!("row {row} has a weight of +2")) } else { Ok(()) }
}

fn encode_blocks<B: Block<COLS, BYTES>, const COLS: usize, const BYTES: usize>(
    source: &dyn TernaryRows,
    row: usize,
    codes: &mut [u8],
    bytes: &mut [u8],
) -> Result<f32, String> {
    source.decode_row(row, codes);
    block::encode_row::<B, COLS, BYTES>(row, codes, source.scales(), bytes)
}

/// The one scale of a matrix, not counting those of rows and groups of zeros.
fn one_scale(source: &dyn TernaryRows) -> Result<f32, String> {
    let (group, values) = match source.scales() {
        Scales::Tensor(scale) => return Ok(*scale),
        Scales::Row(values) => (source.cols(), values),
        Scales::Group { group, values } => (*group, values),
    };
    let mut common = None;
    let mut codes = vec![0; source.cols()];
    let mut values = values.iter();
    for row in 0..source.rows() {
        source.decode_row(row, &mut codes);
        for (codes, scale) in codes.chunks(group).zip(&mut values) {
            if codes.iter().all(|&code| code == 1) {
                continue;
            }
            if *common.get_or_insert(*scale) != *scale {
                return Err("it has several scales".to_owned());
            }
        }
    }
    Ok(common.unwrap_or(1.0))
}

//! What packings with a half-precision scale in every block share: decoding rows, collecting and
//! checking scales, encoding rows. Each block layout is an implementation of [`Block`].

use super::PARALLEL_BYTES;
use super::half_float::half_at;
use crate::error::{Error, Result};
use bitnet_core::weights::Scales;
use half::f16;
use rayon::prelude::*;
use std::ops::Range;

/// The layout of `COLS` consecutive columns of a row in `BYTES` bytes, an f16 scale among them.
pub(super) trait Block<const COLS: usize, const BYTES: usize> {
    /// Where the scale stands.
    const SCALE_AT: usize;
    /// The largest code it can hold.
    const MAX_CODE: u8 = 2;
    /// Whether it can hold code 1.
    const HAS_ZERO: bool = true;

    /// Unpacks the codes.
    fn decode(block: &[u8; BYTES], codes: &mut [u8; COLS]);
    /// Packs codes that the layout can hold; leaves the scale alone.
    fn encode(codes: &[u8; COLS], block: &mut [u8; BYTES]);
    /// Whether the codes are such as [`Block::encode`] could have written.
    fn is_valid(_block: &[u8; BYTES]) -> bool {
        true
    }
}

/// Writes the codes of row `row` into `out`. `bytes` are those of the whole tensor.
pub(super) fn decode_row<B: Block<COLS, BYTES>, const COLS: usize, const BYTES: usize>(
    bytes: &[u8],
    row: usize,
    out: &mut [u8],
) {
    let row_bytes = out.len() / COLS * BYTES;
    let blocks = bytes[row * row_bytes..][..row_bytes].as_chunks::<BYTES>().0;
    for (block, codes) in blocks.iter().zip(out.as_chunks_mut::<COLS>().0) {
        B::decode(block, codes);
    }
}

/// The scales of one row.
enum RowScales {
    /// Every weight is 0, whatever the scales.
    Zero,
    /// All blocks but those of zeros have this scale.
    One(f32),
    Several,
}

/// Checks the blocks of a tensor and collects their scales, as few as say the same: blocks whose
/// weights are all 0 agree with any scale.
pub(super) fn read_scales<B: Block<COLS, BYTES>, const COLS: usize, const BYTES: usize>(
    what: &str,
    bytes: &[u8],
    cols: usize,
) -> Result<Scales> {
    let row_bytes = cols / COLS * BYTES;
    let read_row = |(row, bytes)| row_scales::<B, COLS, BYTES>(what, row, bytes);
    let rows: Vec<RowScales> = if bytes.len() < PARALLEL_BYTES {
        bytes.chunks_exact(row_bytes).enumerate().map(read_row).collect::<Result<_>>()?
    } else {
        bytes.par_chunks_exact(row_bytes).enumerate().map(read_row).collect::<Result<_>>()?
    };
    if rows.iter().any(|row| matches!(row, RowScales::Several)) {
        let scales = |block| scale_of::<B, COLS, BYTES>(block);
        let values = bytes.as_chunks::<BYTES>().0.iter().map(scales).collect();
        return Ok(Scales::Group { group: COLS, values });
    }
    let one = |row: &RowScales| if let RowScales::One(scale) = row { Some(*scale) } else { None };
    let mut scales = rows.iter().filter_map(one);
    // The scale of a matrix of zeros is free: 1 stays finite when it is inverted.
    let first = scales.next().unwrap_or(1.0);
    if scales.all(|scale| scale == first) {
        return Ok(Scales::Tensor(first));
    }
    Ok(Scales::Row(rows.iter().map(|row| one(row).unwrap_or(1.0)).collect()))
}

fn scale_of<B: Block<COLS, BYTES>, const COLS: usize, const BYTES: usize>(
    block: &[u8; BYTES],
) -> f32 {
    half_at(block, B::SCALE_AT)
}

fn row_scales<B: Block<COLS, BYTES>, const COLS: usize, const BYTES: usize>(
    what: &str,
    row: usize,
    bytes: &[u8],
) -> Result<RowScales> {
    let mut scales = RowScales::Zero;
    for (index, block) in bytes.as_chunks::<BYTES>().0.iter().enumerate() {
        let place = || format!("{what}, row {row}, columns from {}", index * COLS);
        let scale = scale_of::<B, COLS, BYTES>(block);
        if !scale.is_finite() {
            return Err(Error::malformed(place(), "a finite scale", scale));
        }
        if !B::is_valid(block) {
            return Err(Error::malformed(place(), "the codes 0, 1 and 2", "code 3"));
        }
        scales = match scales {
            RowScales::Several => RowScales::Several,
            RowScales::One(known) if known == scale => scales,
            _ if is_zero::<B, COLS, BYTES>(block) => scales,
            RowScales::Zero => RowScales::One(scale),
            RowScales::One(_) => RowScales::Several,
        };
    }
    Ok(scales)
}

fn is_zero<B: Block<COLS, BYTES>, const COLS: usize, const BYTES: usize>(
    block: &[u8; BYTES],
) -> bool {
    let mut codes = [0; COLS];
    B::decode(block, &mut codes);
    codes.iter().all(|&code| code == 1)
}

/// Packs the codes of row `row` into `bytes` and returns the largest relative error that rounding
/// its scales made; or says why the row does not fit.
pub(super) fn encode_row<B: Block<COLS, BYTES>, const COLS: usize, const BYTES: usize>(
    row: usize,
    codes: &[u8],
    scales: &Scales,
    bytes: &mut [u8],
) -> Result<f32, String> {
    if codes.iter().any(|&code| code > B::MAX_CODE) {
        return Err(format!("row {row} has a weight of +2"));
    }
    if !B::HAS_ZERO && codes.contains(&1) {
        return Err(format!("row {row} has a weight of 0"));
    }
    let mut worst = 0f32;
    let blocks = codes.as_chunks::<COLS>().0.iter().zip(bytes.as_chunks_mut::<BYTES>().0);
    for (index, (block_codes, block)) in blocks.enumerate() {
        B::encode(block_codes, block);
        let scale = common_scale(scales, row, codes, index * COLS..(index + 1) * COLS)?;
        let (half, error) = round_scale(scale)?;
        worst = worst.max(error);
        block[B::SCALE_AT..B::SCALE_AT + 2].copy_from_slice(&half.to_le_bytes());
    }
    Ok(worst)
}

/// The one scale of the columns `block` of a row, if there is one.
fn common_scale(
    scales: &Scales,
    row: usize,
    codes: &[u8],
    block: Range<usize>,
) -> Result<f32, String> {
    let is_zero = |cols: Range<usize>| codes[cols].iter().all(|&code| code == 1);
    match scales {
        // Quantizers of block formats take the largest magnitude as scale, so 0 for zeros.
        Scales::Tensor(_) | Scales::Row(_) if is_zero(block.clone()) => Ok(0.0),
        Scales::Tensor(scale) => Ok(*scale),
        Scales::Row(scales) => Ok(scales[row]),
        Scales::Group { group, values } => {
            let values = &values[row * codes.len().div_ceil(*group)..];
            let (first, last) = (block.start / group, (block.end - 1) / group);
            let mut common = None;
            for index in first..=last {
                let cols = block.start.max(index * group)..block.end.min((index + 1) * group);
                match common {
                    _ if first != last && is_zero(cols) => {}
                    None => common = Some(values[index]),
                    Some(scale) if scale == values[index] => {}
                    Some(_) => {
                        return Err(format!("row {row} has several scales in a block of columns"));
                    }
                }
            }
            Ok(common.unwrap_or(0.0))
        }
    }
}

/// The nearest f16 and its relative error. Scales so small or large that they lose more than the
/// last bit of an f16 do not fit.
fn round_scale(scale: f32) -> Result<(f16, f32), String> {
    let half = f16::from_f32(scale);
    if scale == 0.0 {
        return Ok((half, 0.0));
    }
    let error = ((half.to_f32() - scale) / scale).abs();
    if error <= f16::EPSILON.to_f32() / 2.0 {
        return Ok((half, error));
    }
    Err(format!("half precision cannot hold the scale {scale}"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn scales_round_to_the_nearest_half_or_do_not_fit() {
        assert_eq!(round_scale(0.75).unwrap(), (f16::from_f32(0.75), 0.0));
        let (half, error) = round_scale(0.1).unwrap();
        assert_eq!(half, f16::from_f32(0.1));
        assert!(error > 0.0 && error < 1.0 / 2048.0);
        assert!(round_scale(1e-6).is_err()); // subnormal: 17 steps of 2⁻²⁴
        assert!(round_scale(1e6).is_err()); // infinite
        assert!(round_scale(2f32.powi(-24)).is_ok()); // subnormal, but exact
    }

    #[test]
    fn a_block_over_several_groups_takes_the_scale_they_share() {
        let scales = Scales::Group { group: 16, values: vec![0.5, 7.0, 0.5, 0.25] };
        let mut codes = vec![0; 64];
        codes[16..32].fill(1); // the group with scale 7 holds zeros
        assert_eq!(common_scale(&scales, 0, &codes, 0..48), Ok(0.5));
        assert_eq!(common_scale(&scales, 0, &codes, 16..32), Ok(7.0)); // its own scale, kept
        assert!(common_scale(&scales, 0, &codes, 0..64).is_err());
        codes.fill(1);
        assert_eq!(common_scale(&scales, 0, &codes, 0..64), Ok(0.0));
        assert_eq!(common_scale(&Scales::Tensor(3.0), 0, &codes, 0..64), Ok(0.0));
    }
}

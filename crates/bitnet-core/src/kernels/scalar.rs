//! The specification: what every kernel computes, in plain loops.
//!
//! The `inline(always)` functions are also the bodies of the vector kernels' float parts: compiled
//! inside a function with AVX2 or AVX-512 they become vector code with the same bits, for Rust
//! never fuses or reorders float arithmetic. Callers have checked all lengths ([`Kernels`]).
//!
//! [`Kernels`]: super::Kernels

use super::float::{self, FloatTile, Number};
use super::quantized::{BYTE_OFFSET, ByteRow, Rescale, TokenCodes, WeightScales, norm_above};
use super::{Packing, STEP_BYTES, STEP_COLS, TILE_ROWS, Tiles};
use crate::backend::Activation;
use crate::cpu::math;
use crate::weights::{FloatType, NormWeights};
use std::hint::black_box;

/// Sums of `code · activation`, one for each group, token and row.
pub(super) fn products(tiles: &Tiles<'_>, tokens: &TokenCodes<'_>, sums: &mut [i32]) {
    products_with(tiles, tokens, sums, add_codes);
}

/// [`products`] of trits.
pub(super) fn trit_products(tiles: &Tiles<'_>, tokens: &TokenCodes<'_>, sums: &mut [i32]) {
    products_with(tiles, tokens, sums, add_trits);
}

fn products_with<const COLS: usize>(
    tiles: &Tiles<'_>,
    tokens: &TokenCodes<'_>,
    sums: &mut [i32],
    add_step: impl Fn(&[u8; STEP_BYTES], &[i8; COLS], &mut [i32; TILE_ROWS]),
) {
    let mut sums = sums.as_chunks_mut::<TILE_ROWS>().0.iter_mut();
    for tile in tiles.codes.chunks_exact(tiles.steps * STEP_BYTES) {
        for token in tokens.codes.chunks_exact(tokens.stride).take(tokens.n_tokens) {
            let group = tile.chunks(tiles.group_steps * STEP_BYTES);
            for (tile, token) in group.zip(token.chunks(tiles.group_steps * COLS)) {
                let Some(sums) = sums.next() else { return };
                *sums = [0; TILE_ROWS];
                let (steps, columns) = (tile.as_chunks::<STEP_BYTES>().0, token.as_chunks().0);
                for (step, columns) in steps.iter().zip(columns) {
                    add_step(step, columns, sums);
                }
            }
        }
    }
}

/// Adds 16 columns of 16 rows.
#[inline(always)]
fn add_codes(step: &[u8; STEP_BYTES], x: &[i8; STEP_COLS], sums: &mut [i32; TILE_ROWS]) {
    for (sum, word) in sums.iter_mut().zip(step.as_chunks::<4>().0) {
        let word = u32::from_le_bytes(*word);
        for field in 0..4 {
            let codes = ((word >> (2 * field)) & 0x0303_0303).to_le_bytes();
            for byte in 0..4 {
                *sum += i32::from(codes[byte]) * i32::from(x[4 * field + byte]);
            }
        }
    }
}

/// Adds 20 columns of 16 rows.
fn add_trits(
    step: &[u8; STEP_BYTES],
    x: &[i8; Packing::Trits.step_cols()],
    sums: &mut [i32; TILE_ROWS],
) {
    for (sum, word) in sums.iter_mut().zip(step.as_chunks::<4>().0) {
        for (byte, &digits) in word.iter().enumerate() {
            let mut digits = digits;
            for field in 0..5 {
                *sum += i32::from(digits % 3) * i32::from(x[4 * field + byte]);
                digits /= 3;
            }
        }
    }
}

/// See [`Rescale`].
#[inline(always)]
pub(super) fn rescale(job: &Rescale<'_>, out: &mut [f32]) {
    match job.weights {
        WeightScales::Tensor(scale) => rescale_with(job, out, |_, _| [scale; TILE_ROWS]),
        WeightScales::Row(values) => {
            let values = values.as_chunks::<TILE_ROWS>().0;
            rescale_with(job, out, |tile, _| values[tile]);
        }
        WeightScales::Group { values, n_weight_groups, sum_groups } => {
            let values = values.as_chunks::<TILE_ROWS>().0;
            let at = |tile, group| tile * n_weight_groups + group / sum_groups;
            rescale_with(job, out, |tile, group| values[at(tile, group)]);
        }
    }
}

/// [`rescale`] with `weights(tile, group)` the scales of 16 rows.
#[inline(always)]
fn rescale_with(
    job: &Rescale<'_>,
    out: &mut [f32],
    weights: impl Fn(usize, usize) -> [f32; TILE_ROWS],
) {
    let Rescale { n_tokens, n_groups, code_sums, token_scales, .. } = *job;
    let sums = job.sums.as_chunks::<TILE_ROWS>().0.chunks_exact(n_tokens * n_groups);
    let out = out.as_chunks_mut::<TILE_ROWS>().0.chunks_exact_mut(n_tokens);
    for (tile, (sums, out)) in sums.zip(out).enumerate() {
        let tokens = sums.chunks_exact(n_groups).zip(code_sums.chunks_exact(n_groups));
        for (token, (out, (sums, code_sums))) in out.iter_mut().zip(tokens).enumerate() {
            let mut y = [0.0; TILE_ROWS];
            for (group, (sums, code_sum)) in sums.iter().zip(code_sums).enumerate() {
                let weights = weights(tile, group);
                for r in 0..TILE_ROWS {
                    let mut term = (sums[r] - code_sum) as f32 * weights[r];
                    if job.scale_per_group {
                        term *= token_scales[token * n_groups + group];
                    }
                    y[r] += term;
                }
            }
            if !job.scale_per_group {
                y = y.map(|y| y * token_scales[token]);
            }
            *out = y;
        }
    }
}

/// See [`super::Kernels::quantize`].
#[inline(always)]
pub(super) fn quantize(
    x: &[f32],
    scale_cols: usize,
    sum_cols: usize,
    out: &mut [i8],
    scales: &mut [f32],
    sums: &mut [i32],
) {
    let spans = x.chunks(scale_cols).zip(out.chunks_mut(scale_cols));
    for ((x, out), scale) in spans.zip(scales) {
        // Absolute values order like their bits, NaN above infinity, so none goes unnoticed.
        let bits = x.iter().fold(0, |max: i32, x| max.max((x.to_bits() & 0x7fff_ffff) as i32));
        let max = f32::from_bits(bits as u32);
        if max < f32::INFINITY {
            let max = if max < 1e-5 { 1e-5 } else { max };
            let factor = 127.0 / max;
            for (out, &x) in out.iter_mut().zip(x) {
                // |x · factor| rounds to 127 at most, so this is the clamped value.
                *out = math::round_even_i32(x * factor) as i8;
            }
            *scale = max / 127.0;
        } else {
            out.fill(0);
            *scale = f32::NAN;
        }
    }
    out[x.len()..].fill(0);
    for (sum, codes) in sums.iter_mut().zip(out.chunks(sum_cols)) {
        *sum = codes.iter().map(|&code| i32::from(code)).sum();
    }
}

/// Root-mean-square norm of one token.
#[inline(always)]
pub(super) fn norm(x: &[f32], norm: &NormWeights, out: &mut [f32]) {
    math::rms_norm(x, &norm.weight, norm.eps, out);
}

/// `gate = activation(gate) · up`
#[inline(always)]
pub(super) fn gate(activation: Activation, gate: &mut [f32], up: &[f32]) {
    match activation {
        Activation::Relu2 => {
            for (gate, &up) in gate.iter_mut().zip(up) {
                *gate = math::relu2(*gate) * up;
            }
        }
        Activation::Silu => {
            for (gate, &up) in gate.iter_mut().zip(up) {
                *gate = math::silu(*gate) * up;
            }
        }
    }
}

/// The float functions above, compiled for an instruction set.
#[cfg(any(target_arch = "x86_64", target_arch = "aarch64"))]
macro_rules! float_parts {
    ($features:literal) => {
        #[target_feature(enable = $features)]
        pub(super) fn rescale(job: &crate::kernels::Rescale<'_>, out: &mut [f32]) {
            crate::kernels::scalar::rescale(job, out);
        }

        #[target_feature(enable = $features)]
        pub(super) fn quantize(
            x: &[f32],
            scale_cols: usize,
            sum_cols: usize,
            out: &mut [i8],
            scales: &mut [f32],
            sums: &mut [i32],
        ) {
            crate::kernels::scalar::quantize(x, scale_cols, sum_cols, out, scales, sums);
        }

        #[target_feature(enable = $features)]
        pub(super) fn norm(x: &[f32], norm: &crate::weights::NormWeights, out: &mut [f32]) {
            crate::kernels::scalar::norm(x, norm, out);
        }

        #[target_feature(enable = $features)]
        pub(super) fn gate(activation: crate::backend::Activation, gate: &mut [f32], up: &[f32]) {
            crate::kernels::scalar::gate(activation, gate, up);
        }

        #[target_feature(enable = $features)]
        pub(super) fn round_rows(
            rows: &crate::kernels::FloatTile<'_>,
            row: &mut Vec<f32>,
            out: &mut [u8],
            bounds: &mut [crate::kernels::ByteRow],
        ) {
            crate::kernels::scalar::round_rows(rows, row, out, bounds);
        }

        #[target_feature(enable = $features)]
        pub(super) fn noise(noise: &crate::noise::Noise, first: u32, out: &mut [f32]) {
            noise.fill(first, out);
        }
    };
}

/// Packs 16 rows of codes into a tile.
pub(super) fn pack_tile(codes: &[u8], out: &mut [u8]) {
    let cols = codes.len() / TILE_ROWS;
    for (i, step) in out.as_chunks_mut::<STEP_BYTES>().0.iter_mut().enumerate() {
        for (r, word) in step.as_chunks_mut::<4>().0.iter_mut().enumerate() {
            let columns = &codes[r * cols + i * STEP_COLS..][..STEP_COLS];
            for byte in 0..4 {
                let field = |j: usize| (columns[4 * j + byte] & 3) << (2 * j);
                word[byte] = field(0) | field(1) | field(2) | field(3);
            }
        }
    }
}

/// Packs 16 rows of codes 0–2 into a tile of trits.
pub(super) fn pack_trits(codes: &[u8], out: &mut [u8]) {
    const COLS: usize = Packing::Trits.step_cols();
    let cols = codes.len() / TILE_ROWS;
    for (i, step) in out.as_chunks_mut::<STEP_BYTES>().0.iter_mut().enumerate() {
        for (r, word) in step.as_chunks_mut::<4>().0.iter_mut().enumerate() {
            let columns = &codes[r * cols + i * COLS..][..COLS];
            for (b, byte) in word.iter_mut().enumerate() {
                *byte = (0..5).rev().fold(0, |digits, field| digits * 3 + columns[4 * field + b]);
            }
        }
    }
}

/// Dot products of float rows.
pub(super) fn float_products(tile: &FloatTile<'_>, x: &[f32], n_tokens: usize, out: &mut [f32]) {
    match tile.dtype {
        FloatType::F32 => float_rows::<f32>(tile, x, n_tokens, out),
        FloatType::F16 => float_rows::<half::f16>(tile, x, n_tokens, out),
        FloatType::BF16 => float_rows::<half::bf16>(tile, x, n_tokens, out),
    }
}

fn float_rows<N: Number>(tile: &FloatTile<'_>, x: &[f32], n_tokens: usize, out: &mut [f32]) {
    let row_bytes = tile.cols * N::SIZE;
    for (r, row) in tile.bytes.chunks_exact(row_bytes).enumerate() {
        for (token, x) in x.chunks_exact(tile.cols).take(n_tokens).enumerate() {
            let mut lanes = [0.0; math::LANES];
            let blocks = row.chunks(math::LANES * N::SIZE).zip(x.chunks(math::LANES));
            for (weights, x) in blocks {
                let weights = weights.chunks_exact(N::SIZE).map(N::decode);
                for ((lane, weight), &x) in lanes.iter_mut().zip(weights).zip(x) {
                    *lane += weight * x;
                }
            }
            out[token * TILE_ROWS + r] = math::sum_lanes(lanes);
        }
    }
}

/// [`Kernels::byte_products`](crate::kernels::Kernels::byte_products).
pub(super) fn byte_products(tiles: &Tiles<'_>, tokens: &TokenCodes<'_>, sums: &mut [i32]) {
    let all = tiles.codes.chunks_exact(tiles.steps * STEP_BYTES);
    for (tile, sums) in all.zip(sums.chunks_exact_mut(tokens.n_tokens * TILE_ROWS)) {
        let tokens = tokens.codes.chunks(tokens.stride);
        for (x, sums) in tokens.zip(sums.as_chunks_mut::<TILE_ROWS>().0) {
            sums.fill(0);
            for (step, x) in tile.as_chunks::<STEP_BYTES>().0.iter().zip(x.as_chunks::<4>().0) {
                for (sum, codes) in sums.iter_mut().zip(step.as_chunks::<4>().0) {
                    for (&code, &x) in codes.iter().zip(x) {
                        *sum += i32::from(code) * i32::from(x);
                    }
                }
            }
        }
    }
}

/// [`Kernels::round_rows`](crate::kernels::Kernels::round_rows).
#[inline(always)]
pub(super) fn round_rows(
    rows: &FloatTile<'_>,
    row: &mut Vec<f32>,
    out: &mut [u8],
    bounds: &mut [ByteRow],
) {
    row.resize(rows.cols, 0.0);
    if rows.n_rows() < TILE_ROWS {
        out.fill(BYTE_OFFSET as u8);
    }
    let each = rows.bytes.chunks_exact(rows.cols * rows.dtype.size());
    for (r, (bytes, bound)) in each.zip(bounds).enumerate() {
        match rows.dtype {
            FloatType::F32 => float::decode::<f32>(bytes, row),
            FloatType::F16 => float::decode::<half::f16>(bytes, row),
            FloatType::BF16 => float::decode::<half::bf16>(bytes, row),
        }
        *bound = round_row(row, &mut out[4 * r..]);
    }
}

/// Rounds a row to bytes; writes four of them every `STEP_BYTES`.
#[inline(always)]
fn round_row(row: &[f32], out: &mut [u8]) -> ByteRow {
    let scale = math::max_abs(row).max(f32::MIN_POSITIVE) / 127.0;
    let inverse = 1.0 / scale;
    // Sums in f64, so that no bound is too small; in lanes, so that they need not wait.
    let mut sums = [[0.0f64; math::LANES]; 2];
    let (blocks, tail) = row.as_chunks::<{ math::LANES }>();
    let mut steps = out.chunks_mut(4 * STEP_BYTES);
    for (weights, out) in blocks.iter().zip(&mut steps) {
        round_block(weights, scale, inverse, out, &mut sums);
    }
    if let Some(out) = steps.next() {
        let mut weights = [0.0; math::LANES];
        weights[..tail.len()].copy_from_slice(tail);
        round_block(&weights, scale, inverse, out, &mut sums);
    }
    let [norm, error] = sums.map(|lanes| norm_above(lanes.iter().sum()));
    ByteRow { scale, norm, error }
}

/// Sixteen weights of [`round_row`]; adds the squares of what they became and of what was lost.
#[inline(always)]
fn round_block(
    weights: &math::Lanes,
    scale: f32,
    inverse: f32,
    out: &mut [u8],
    [squares, errors]: &mut [[f64; math::LANES]; 2],
) {
    let mut codes = [0u8; math::LANES];
    for i in 0..math::LANES {
        // |w / scale| rounds to 127 at most.
        let rounded = math::round_even_i32(weights[i] * inverse);
        codes[i] = rounded.wrapping_add(BYTE_OFFSET) as u8;
        let value = f64::from(rounded) * f64::from(scale);
        let error = f64::from(weights[i]) - value;
        squares[i] += value * value;
        errors[i] += error * error;
    }
    for (step, codes) in out.chunks_mut(STEP_BYTES).zip(codes.as_chunks::<4>().0) {
        step[..4].copy_from_slice(codes);
    }
}

/// Multiply-accumulates as fast as plain code does them: one step of a tile after the other, from
/// the first-level cache.
pub(super) fn mac_loop(rounds: u64) -> u64 {
    let (step, x) = (black_box([0x55; STEP_BYTES]), black_box([1; STEP_COLS]));
    let mut sums = [0; TILE_ROWS];
    for _ in 0..rounds {
        add_codes(&step, black_box(&x), &mut sums);
        // Keeps the sums far from overflowing.
        sums = sums.map(|sum| sum & 0xffff);
    }
    black_box(sums);
    (TILE_ROWS * STEP_COLS) as u64
}

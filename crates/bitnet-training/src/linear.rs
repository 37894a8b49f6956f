//! Gradients of projections, straight through their quantizers.
//!
//! With trits `W`, activation codes `X` and their scales, `y = (X·Wᵀ)·scales`. The rounding of
//! weights and activations is taken for the identity, as the reference does, so `dx = dy·W` and
//! `dW = dyᵀ·X` have the quantized factors: integers. The gradient is rounded to 16 bits, once for
//! each product: by rows for the one, by columns for the other.

use crate::matmul::{View, matmul};
use crate::vector;
use crate::weights::{Back, Group};
use bitnet_core::kernels::{Kernels, WideMatrix, WideRows};
use bitnet_core::weights::NormWeights;

/// Most tokens of one sum: `512 · 127 · 32767 < 2³¹`.
const SPAN: usize = 512;

/// Most output features of projections that share an input: their sums over trits stay within 32 bits,
/// `65535 · 32767 < 2³¹`.
pub(crate) const MAX_ROWS: usize = 65_534;

/// What a group of projections reads.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Input<'a> {
    /// `(n, cols)`
    pub(crate) x: &'a [f32],
    /// Applied before the quantizer.
    pub(crate) norm: Option<&'a NormWeights>,
}

/// Buffers that products reuse.
#[derive(Debug, Default)]
pub(crate) struct Scratch {
    normed: Vec<f32>,
    codes: Vec<i8>,
    token_scales: Vec<f32>,
    /// The gradient as 16-bit integers, by rows or columns.
    wide: Vec<i16>,
    wide_scales: Vec<f32>,
    inverses: Vec<f32>,
    activations: WideMatrix,
}

/// `dx = dy·W`, the gradient after the norm of `input`, and `dW += dyᵀ·X` at the group's place in
/// `gradients`. `dy` is `(n, rows)`, `dx` `(n, cols)`.
pub(crate) fn backward(
    kernels: &Kernels,
    group: &Group,
    input: Input<'_>,
    dy: &[f32],
    dx: &mut [f32],
    gradients: &mut [f32],
    scratch: &mut Scratch,
) {
    let Group { rows, cols, .. } = *group;
    let n = dx.len() / cols;
    let d_weights = &mut gradients[group.place.clone()];
    let x = match input.norm {
        None => input.x,
        Some(norm) => {
            scratch.normed.resize(n * cols, 0.0);
            for (x, out) in input.x.chunks_exact(cols).zip(scratch.normed.chunks_exact_mut(cols)) {
                kernels.norm(x, norm, out);
            }
            &scratch.normed[..]
        }
    };
    match &group.back {
        Back::Float(masters) => {
            group.float_input_gradient(masters, dy, dx);
            let (d_view, dy_view) = (View::rows(0, cols), View::rows(0, rows).t());
            let sizes = [rows, cols, n];
            matmul(sizes, (d_weights, d_view), true, 1.0, (dy, dy_view), (x, View::rows(0, cols)));
        }
        Back::Ternary { trits, scales } => {
            debug_assert!(rows <= MAX_ROWS);
            scratch.codes.resize(n * cols, 0);
            scratch.token_scales.resize(n, 0.0);
            let tokens = x.chunks_exact(cols).zip(scratch.codes.chunks_exact_mut(cols));
            for ((x, codes), scale) in tokens.zip(&mut scratch.token_scales) {
                let (scale, mut sum) = (std::slice::from_mut(scale), [0]);
                kernels.quantize(x, cols, cols, codes, scale, &mut sum);
            }
            let stride = trits.padded_terms();
            scratch.wide.resize((n * stride).max(rows * SPAN), 0);
            scratch.wide_scales.resize(n.max(rows), 0.0);
            scratch.inverses.resize(rows, 0.0);
            let (wide, unit) = (&mut scratch.wide[..n * stride], &mut scratch.wide_scales[..n]);
            vector::quantize_rows(dy, rows, scales, wide, stride, unit);
            dx.fill(0.0);
            let left = WideRows { values: wide, stride, scales: unit };
            kernels.wide_products(&left, trits, dx, cols);

            for first in (0..n).step_by(SPAN) {
                let tokens = first..n.min(first + SPAN);
                let stride = tokens.len().next_multiple_of(2);
                let wide = &mut scratch.wide[..rows * stride];
                let unit = &mut scratch.wide_scales[..rows];
                vector::quantize_columns(
                    &dy[tokens.start * rows..tokens.end * rows],
                    rows,
                    &scratch.token_scales[tokens.clone()],
                    wide,
                    stride,
                    unit,
                    &mut scratch.inverses,
                );
                let codes = &scratch.codes[tokens.start * cols..];
                scratch.activations.pack(codes, cols, tokens.len(), cols);
                let left = WideRows { values: wide, stride, scales: unit };
                kernels.wide_products(&left, &scratch.activations, d_weights, cols);
            }
        }
    }
}

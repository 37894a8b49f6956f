//! Projections: norms, quantization and products, as kernels of the current step. Knows one
//! projection at a time and nothing of what it is for.

use bitnet_core::backend::Activation;
use bitnet_core::weights::FloatType;
use bitnet_core::{Error, Result};

use super::{NO_LIST, WgpuBackend};
use crate::buffers::{WgpuBuffer, WgpuNorm};
use crate::device::{GpuBuffer, failed};
use crate::linear::{Form, WgpuLinear};
use crate::memory::Region;
use crate::pipeline::{Kernel, Store};
use crate::weights::Part;

/// From this many tokens on, weights are read once for 32 tokens instead of once for each.
const TILED_FROM: u32 = 8;
/// Rows and tokens of a tile.
const TILE: u32 = 32;
/// Rows of weights of a workgroup that decodes, and of one for float weights.
const DECODE_ROWS: u32 = 8;
const FLOAT_ROWS: u32 = 4;

/// The operands of a product after norms and quantization.
pub(super) enum Input {
    Codes(Region, Region),
    Floats(Region),
}

impl WgpuBackend {
    /// Up to two norms as a kernel takes them: buffers, and the words `norms, eps, eps`.
    fn norms(&self, norms: [Option<&WgpuNorm>; 2]) -> ([Region; 2], [u32; 3]) {
        let buffers = norms.map(|norm| norm.map_or(&self.nothing, |norm| &norm.weights).clone());
        let eps = norms.map(|norm| norm.map_or(0, |norm| norm.eps.to_bits()));
        let given = u32::from(norms[0].is_some()) | u32::from(norms[1].is_some()) << 1;
        (buffers, [given, eps[0], eps[1]])
    }

    /// `out[i]` = row `i` of `x`, or the `i`th of the list at `rows`, after the norms.
    pub(super) fn normalize(
        &mut self,
        x: &GpuBuffer,
        cols: usize,
        norms: [Option<&WgpuNorm>; 2],
        rows: u32,
        n_rows: u32,
        out: &GpuBuffer,
    ) -> Result<()> {
        let (weights, [given, eps0, eps1]) = self.norms(norms);
        let step = self.recorder.exchange.input.clone();
        self.recorder.dispatch(
            Kernel::Norm,
            &[
                (0, x),
                (1, weights[0].buffer()),
                (2, weights[1].buffer()),
                (3, step.buffer()),
                (4, out),
            ],
            &[cols as u32, given, eps0, eps1, rows],
            [n_rows, 1],
        )
    }

    /// Brings the input of `linear` into the form its product takes.
    pub(super) fn prepare(
        &mut self,
        x: &WgpuBuffer,
        norm: Option<&WgpuNorm>,
        linear: &WgpuLinear,
    ) -> Result<Input> {
        let n = self.n_tokens();
        x.check("input of a projection", n, linear.cols)?;
        let norms = [norm, linear.input_norm.as_ref()];
        for norm in norms.into_iter().flatten() {
            norm.check("norm before a projection", linear.cols)?;
        }
        let cols = linear.cols as u32;
        let (n_groups, kernel) = match linear.form {
            Form::Float(_) if norms.iter().all(Option::is_none) => {
                return Ok(Input::Floats(x.data.clone()));
            }
            Form::Float(_) => {
                let out = self.scratch(|s| &mut s.normed, 4 * (n * linear.cols) as u64)?;
                let from = x.data.buffer();
                self.normalize(from, linear.cols, norms, NO_LIST, n as u32, out.buffer())?;
                return Ok(Input::Floats(out));
            }
            Form::Whole => (1, Kernel::QuantizeTokens),
            Form::Groups { n_groups, .. } => (n_groups, Kernel::QuantizeGroups),
        };
        let words = 4 * linear.words; // of four columns
        let codes = self.scratch(|s| &mut s.codes, 4 * (n * words) as u64)?;
        let scales = self.scratch(|s| &mut s.scales, 8 * (n * n_groups) as u64)?;
        let (weights, [given, eps0, eps1]) = self.norms(norms);
        let mut parameters = vec![cols, given, eps0, eps1, words as u32];
        if let Form::Groups { n_groups, cols, scale_of_token } = linear.form {
            parameters.extend([n_groups as u32, cols as u32 / 4, u32::from(scale_of_token)]);
        }
        self.recorder.dispatch(
            kernel,
            &[
                (0, x.data.buffer()),
                (1, weights[0].buffer()),
                (2, weights[1].buffer()),
                (3, codes.buffer()),
                (4, scales.buffer()),
            ],
            &parameters,
            [n as u32, 1],
        )?;
        Ok(Input::Codes(codes, scales))
    }

    /// `linear` of a prepared input, to its place in `out`.
    pub(super) fn product(
        &mut self,
        linear: &WgpuLinear,
        input: &Input,
        out: &GpuBuffer,
        store: Store,
        gate: Option<(&GpuBuffer, Activation)>,
    ) -> Result<()> {
        let n = self.n_tokens() as u32;
        let activation = u32::from(gate.is_some_and(|(_, a)| a == Activation::Silu));
        for (i, part) in linear.parts.iter().enumerate() {
            let (rows, first) = (part.n_rows as u32, part.first_row as u32);
            match input {
                Input::Floats(x) => {
                    let Form::Float(dtype) = linear.form else { return Err(mixed_up()) };
                    let product = FloatProduct {
                        dtype,
                        part,
                        words: linear.words,
                        cols: linear.cols,
                        bias: linear.biased.then(|| linear.scales[0].buffer()),
                        n_rows: n,
                        out_width: linear.rows,
                    };
                    self.float_product(&product, x.buffer(), out, store, gate)?;
                }
                Input::Codes(codes, scales) => {
                    let mut parameters =
                        vec![rows, linear.words as u32, n, linear.rows as u32, first, activation];
                    let (kernel, grid) = match linear.form {
                        Form::Float(_) => return Err(mixed_up()),
                        Form::Groups { n_groups, cols, scale_of_token } => {
                            let scale_of_token = u32::from(scale_of_token);
                            parameters.extend([n_groups as u32, cols as u32 / 16, scale_of_token]);
                            (Kernel::TernaryGrouped(store), [rows, n])
                        }
                        Form::Whole if n < TILED_FROM => {
                            (Kernel::TernaryDecode(store), [rows.div_ceil(DECODE_ROWS), n])
                        }
                        Form::Whole => {
                            let grid = [rows.div_ceil(TILE), n.div_ceil(TILE)];
                            (Kernel::TernaryTiled(store), grid)
                        }
                    };
                    parameters.resize(9, 0);
                    let (part, own) = (part.weights.buffer(), linear.scales[i].buffer());
                    let weights = [part, own, codes.buffer(), scales.buffer(), out];
                    let mut buffers: Vec<_> = (0..).zip(weights).collect();
                    buffers.extend(gate.map(|(gate, _)| (5, gate)));
                    self.recorder.dispatch(kernel, &buffers, &parameters, grid)?;
                }
            }
        }
        Ok(())
    }

    pub(super) fn float_product(
        &mut self,
        product: &FloatProduct<'_>,
        x: &GpuBuffer,
        out: &GpuBuffer,
        store: Store,
        gate: Option<(&GpuBuffer, Activation)>,
    ) -> Result<()> {
        let nothing = self.nothing.clone();
        let part = product.part;
        let bias = product.bias.unwrap_or(nothing.buffer());
        let mut buffers = vec![(0, part.weights.buffer()), (1, bias), (2, x), (4, out)];
        buffers.extend(gate.map(|(gate, _)| (5, gate)));
        let parameters = [
            part.n_rows as u32,
            product.words as u32,
            product.cols as u32,
            product.out_width as u32,
            part.first_row as u32,
            u32::from(gate.is_some_and(|(_, a)| a == Activation::Silu)),
            u32::from(product.bias.is_some()),
        ];
        let grid = [(part.n_rows as u32).div_ceil(FLOAT_ROWS), product.n_rows];
        self.recorder.dispatch(
            Kernel::FloatProduct(product.dtype, store),
            &buffers,
            &parameters,
            grid,
        )
    }
}

/// A product of float weights.
pub(super) struct FloatProduct<'a> {
    pub(super) dtype: FloatType,
    pub(super) part: &'a Part,
    pub(super) words: usize,
    pub(super) cols: usize,
    pub(super) bias: Option<&'a GpuBuffer>,
    /// Rows of the input.
    pub(super) n_rows: u32,
    pub(super) out_width: usize,
}

fn mixed_up() -> Error {
    failed("an input was prepared for another projection")
}

//! Projections as dispatches: the input is normalized and quantized once for all products that share
//! it, and each product runs in the kernel that suits its shape.

use crate::backend::{MetalActivations, MetalBackend, Recorder, Scratch, stride};
use crate::buffer::{MetalBuffer, MetalBufferPool};
use crate::driver::Driver;
use crate::kernels::{
    DECODE_TOKENS, Kernel, STAGE, TILED_MAX_COLS, TILED_ROWS, TILED_TOKENS, TILES_TOGETHER,
};
use crate::linear::{Grouping, MetalLinear, MetalNorm, STEP_COLS, Ternary, TileScales, Weights};
use crate::matrix::FloatMatrix;
use crate::params::{FloatParams, GateParams, ProductParams, QuantizeParams, QuantizedParams};
use bitnet_core::backend::Activation;
use bitnet_core::{Error, Result};

/// From here on tokens are multiplied in blocks: below, a block would be mostly padding.
const TILED_FROM: usize = 9;
/// Bytes of threadgroup memory of `bitlinear_inference_optimized`: sums of 4 simdgroups, 4 tokens
/// and 16 rows.
const OPTIMIZED_SHARED: u32 = 4 * 4 * 16 * 4;
/// Of `bitlinear_inference_tiled`: its results, which are larger than its blocks.
const TILED_SHARED: u32 = TILED_TOKENS * TILED_ROWS * 4;

type Activations<D> = MetalActivations<<D as Driver>::Memory>;
type Norm<D> = MetalNorm<<D as Driver>::Memory>;
type Linear<D> = MetalLinear<<D as Driver>::Memory>;
type Buffer<D> = MetalBuffer<<D as Driver>::Memory>;

impl<D: Driver> MetalBackend<D> {
    /// `out = linear(norm(x))`, or `out += …`. `prepared`: the input was prepared by the call before.
    pub(crate) fn product(
        &mut self,
        x: &Activations<D>,
        norm: Option<&Norm<D>>,
        linear: &Linear<D>,
        out: &mut Activations<D>,
        accumulate: bool,
        prepared: bool,
    ) -> Result<()> {
        let n = self.rows();
        out.check("output of a projection", n, linear.rows)?;
        let (stride, memory) = (out.stride, &out.memory);
        self.product_into(x, norm, linear, memory, stride, accumulate, prepared)
    }

    /// `out = activation(gate(norm(x))) · up(norm(x))`
    pub(crate) fn gate(
        &mut self,
        x: &Activations<D>,
        norm: Option<&Norm<D>>,
        gate: &Linear<D>,
        up: &Linear<D>,
        activation: Activation,
        out: &mut Activations<D>,
    ) -> Result<()> {
        let n = self.rows();
        if gate.rows != up.rows {
            return Err(Error::shape("rows of gate and up projection", gate.rows, up.rows));
        }
        self.product(x, norm, gate, out, false, false)?;
        // Out of its place for as long as `self` is lent to the product.
        let growing = crate::buffer::Growing::new(bitnet_core::memory::AccessPattern::Activations);
        let mut other = std::mem::replace(&mut self.scratch.up, growing);
        let result = other.with_room(&self.pool, n * out.stride * 4).and_then(|second| {
            let prepared = gate.shares_input_with(up);
            self.product_into(x, norm, up, second, out.stride, false, prepared)?;
            let params = GateParams {
                width: gate.rows as u32,
                stride: out.stride as u32,
                silu: u32::from(activation == Activation::Silu),
            };
            let groups = [params.width.div_ceil(Kernel::GateActivation.threads()), n as u32, 1];
            let buffers = [&out.memory, second];
            self.split().0.run(Kernel::GateActivation, &buffers, &params, groups, 0)
        });
        self.scratch.up = other;
        result
    }

    fn product_into(
        &mut self,
        x: &Activations<D>,
        norm: Option<&Norm<D>>,
        linear: &Linear<D>,
        out: &Buffer<D>,
        out_stride: usize,
        accumulate: bool,
        prepared: bool,
    ) -> Result<()> {
        let n = self.rows();
        x.check("input of a projection", n, linear.cols)?;
        if let Some(norm) = norm
            && norm.width != linear.cols
        {
            return Err(Error::shape("norm before a projection", linear.cols, norm.width));
        }
        let (mut recorder, pool, _, scratch) = self.split();
        match &linear.weights {
            Weights::Ternary(ternary) => {
                if !prepared {
                    let norms = [norm, linear.input_norm.as_ref()];
                    quantize(&mut recorder, pool, scratch, x, norms, ternary.grouping, n)?;
                }
                let target = Target { out, stride: out_stride, accumulate };
                ternary_product(&mut recorder, scratch, linear, ternary, target, n, prepared)
            }
            Weights::Float(matrix) => {
                let mut input = &x.memory;
                let norms = [norm, linear.input_norm.as_ref()];
                if !prepared && norms.iter().any(Option::is_some) {
                    let normed = scratch.normed.with_room(pool, n * x.stride * 4)?;
                    let mut from = &x.memory;
                    for norm in norms.into_iter().flatten() {
                        Self::norm_rows(&mut recorder, from, norm, normed, None, n)?;
                        from = normed;
                    }
                }
                if norms.iter().any(Option::is_some) {
                    input = scratch.normed.get()?;
                }
                let params = FloatParams {
                    rows: matrix.rows as u32,
                    tiles: matrix.n_tiles() as u32,
                    steps: matrix.steps() as u32,
                    tokens: n as u32,
                    format: matrix.format_code(),
                    x_stride: x.stride as u32,
                    out_stride: out_stride as u32,
                    has_bias: u32::from(linear.bias.is_some()),
                    accumulate: u32::from(accumulate),
                };
                let bias = linear.bias.as_ref();
                Self::float_product(&mut recorder, matrix, input, bias, out, &params, prepared)
            }
        }
    }

    /// Records `out = matrix · x + bias`.
    pub(crate) fn float_product(
        recorder: &mut Recorder<'_, D>,
        matrix: &FloatMatrix<D::Memory>,
        x: &Buffer<D>,
        bias: Option<&Buffer<D>>,
        out: &Buffer<D>,
        params: &FloatParams,
        beside: bool,
    ) -> Result<()> {
        let groups =
            [params.tiles.div_ceil(TILES_TOGETHER), params.tokens.div_ceil(DECODE_TOKENS), 1];
        let buffers = [&matrix.numbers, x, bias.unwrap_or(recorder.nothing), out];
        recorder.record(Kernel::FloatProduct, &buffers, params, groups, 0, beside)
    }
}

/// Where a product goes.
struct Target<'a, D: Driver> {
    out: &'a Buffer<D>,
    stride: usize,
    accumulate: bool,
}

/// Records the norms and the quantization of `n` rows into the scratch.
fn quantize<D: Driver>(
    recorder: &mut Recorder<'_, D>,
    pool: &MetalBufferPool<D::Memory>,
    scratch: &mut Scratch<D::Memory>,
    x: &Activations<D>,
    norms: [Option<&Norm<D>>; 2],
    grouping: Grouping,
    n: usize,
) -> Result<()> {
    let (n_scales, n_sums) = (grouping.n_scales(), grouping.n_sums());
    let mut input = &x.memory;
    let mut last = norms[1].or(norms[0]);
    if let [Some(first), Some(second)] = norms {
        let normed = scratch.normed.with_room(pool, n * x.stride * 4)?;
        MetalBackend::<D>::norm_rows(recorder, input, first, normed, None, n)?;
        (input, last) = (normed, Some(second));
    }
    let codes = scratch.codes.with_room(pool, n * grouping.code_stride())?;
    let scales = scratch.scales.with_room(pool, n * n_scales * 4)?;
    let sums = scratch.sums.with_room(pool, n * n_sums * 4)?;
    let params = QuantizeParams {
        width: grouping.cols as u32,
        x_stride: stride(grouping.cols) as u32,
        code_stride: grouping.code_stride() as u32,
        scale_cols: grouping.scale_cols as u32,
        sum_cols: grouping.sum_cols as u32,
        n_scales: n_scales as u32,
        n_sums: n_sums as u32,
        has_norm: u32::from(last.is_some()),
        eps: last.map_or(0.0, |norm| norm.eps),
    };
    // What norms stage and the factors of the scales lie in the same place, one after the other.
    let floats = (STAGE + 4).max(crate::kernels::SIMD + params.n_scales);
    let weight = last.map_or(recorder.nothing, |norm| &norm.weight);
    let buffers = [input, weight, codes, scales, sums];
    recorder.run(Kernel::QuantizeActivations, &buffers, &params, [n as u32, 1, 1], floats * 4)
}

/// Records the product of the quantized rows with ternary weights.
fn ternary_product<D: Driver>(
    recorder: &mut Recorder<'_, D>,
    scratch: &Scratch<D::Memory>,
    linear: &Linear<D>,
    ternary: &Ternary<D::Memory>,
    target: Target<'_, D>,
    n: usize,
    beside: bool,
) -> Result<()> {
    let grouping = ternary.grouping;
    let nothing = recorder.nothing;
    let (scale, scales) = match &ternary.scales {
        TileScales::Tensor(scale) => (*scale, nothing),
        TileScales::Row(values) | TileScales::Group { values, .. } => (0.0, values),
    };
    let buffers = [
        &ternary.codes,
        scratch.codes.get()?,
        scales,
        linear.bias.as_ref().unwrap_or(nothing),
        scratch.scales.get()?,
        scratch.sums.get()?,
        target.out,
    ];
    let (rows, steps, tiles) = (linear.rows as u32, linear.steps() as u32, linear.n_tiles() as u32);
    let (code_stride, out_stride) = (grouping.code_stride() as u32, target.stride as u32);
    let has_bias = u32::from(linear.bias.is_some());
    let accumulate = u32::from(target.accumulate);
    if grouping.sum_cols < grouping.cols {
        let (scale_kind, weight_group) = match &ternary.scales {
            TileScales::Tensor(_) => (0, grouping.cols),
            TileScales::Row(_) => (1, grouping.cols),
            TileScales::Group { group, .. } => (2, *group),
        };
        let params = QuantizedParams {
            rows,
            steps,
            tiles,
            code_stride,
            out_stride,
            scale_kind,
            n_groups: grouping.n_sums() as u32,
            group_steps: (grouping.sum_cols / STEP_COLS) as u32,
            n_weight_groups: grouping.cols.div_ceil(weight_group) as u32,
            sum_groups: (weight_group / grouping.sum_cols).max(1) as u32,
            scale_per_group: u32::from(grouping.scale_cols < grouping.cols),
            has_bias,
            accumulate,
            scale,
        };
        let groups = [tiles.div_ceil(TILES_TOGETHER), n as u32, 1];
        return recorder.record(Kernel::BitlinearQuantized, &buffers, &params, groups, 0, beside);
    }
    // A group that covers the row is no group: one sum, and scales that are those of rows.
    let params = ProductParams {
        rows,
        steps,
        tokens: n as u32,
        code_stride,
        out_stride,
        row_scales: u32::from(!matches!(ternary.scales, TileScales::Tensor(_))),
        has_bias,
        accumulate,
        scale,
    };
    match n >= TILED_FROM && linear.cols <= TILED_MAX_COLS {
        true => {
            let groups = [rows.div_ceil(TILED_ROWS), params.tokens.div_ceil(TILED_TOKENS), 1];
            let kernel = Kernel::BitlinearTiled;
            recorder.record(kernel, &buffers, &params, groups, TILED_SHARED, beside)
        }
        false => {
            let groups = [tiles, params.tokens.div_ceil(DECODE_TOKENS), 1];
            let kernel = Kernel::BitlinearOptimized;
            recorder.record(kernel, &buffers, &params, groups, OPTIMIZED_SHARED, beside)
        }
    }
}

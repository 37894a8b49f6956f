//! Projections on the CPU: norm, quantization and ternary product in one or two parallel regions.
//!
//! A region costs about a microsecond and a decode step has hundreds, so projections that share
//! an input share its norm, its quantization and their region. For a single token every thread
//! prepares the input for itself, which is cheaper than waiting for another to do it; several
//! tokens are prepared in parallel first. Each thread then computes whole tiles of 16 output rows,
//! so a result depends neither on the number of threads nor on the other tokens of the batch.

use crate::backend::Activation;
use crate::cpu::input::{Inputs, Prepared};
use crate::cpu::scales::{pad_rows, scales_from, tile_scales};
use crate::error::{Error, Result};
use crate::kernels::{
    FloatMatrix, Kernels, PackedTernary, Packing, Rescale, STEP_COLS, TILE_ROWS, Tiles,
    WeightMemory,
};
use crate::threads::{Parts, ThreadPool, share};
use crate::weights::{ActivationQuant, LinearWeights, Matrix, NormWeights, Scales};
use std::ops::Range;

pub use crate::cpu::input::Scratch;

/// Projections that one region computes together; more are done in several regions.
const MAX_SHARED: usize = 4;
/// Integer sums of one call of a kernel that stay in the first-level cache.
const BLOCK_SUMS: usize = 4 * 1024;
/// Most tiles of one call of a kernel.
const BLOCK_TILES: usize = 32;
/// Bytes of quantized tokens that stay in the second-level cache while weights pass by.
const BLOCK_TOKEN_BYTES: usize = 384 * 1024;

/// A projection `y = W·x + b` in the layout of the kernels.
pub struct CpuLinear {
    rows: usize,
    cols: usize,
    weights: Weights,
    /// Padded to whole tiles.
    bias: Option<Vec<f32>>,
    /// Applied to this projection's input, after any norm of the block.
    pub(super) input_norm: Option<NormWeights>,
}

enum Weights {
    Ternary { codes: PackedTernary, scales: Scales, activations: ActivationQuant },
    Float(FloatMatrix),
}

impl CpuLinear {
    /// Lays out a projection for `kernels`, in parallel.
    ///
    /// # Errors
    /// [`Error::Shape`] or [`Error::Invalid`] if the parts of `weights` do not fit together,
    /// [`Error::OutOfMemory`] if there is no room for them.
    pub fn new(
        weights: &LinearWeights,
        kernels: &'static Kernels,
        pool: &ThreadPool,
        memory: &mut WeightMemory,
    ) -> Result<Self> {
        let (rows, cols) = weights.matrix.shape();
        let bias = match &weights.bias {
            Some(bias) if bias.len() != rows => {
                return Err(Error::shape("bias of a projection", rows, bias.len()));
            }
            Some(bias) => Some(pad_rows(bias)),
            None => None,
        };
        if let Some(norm) = &weights.input_norm
            && norm.weight.len() != cols
        {
            return Err(Error::shape("input norm of a projection", cols, norm.weight.len()));
        }
        let layout = match &weights.matrix {
            Matrix::Ternary { weights, activations } => {
                let scales = tile_scales(&**weights, *activations)?;
                // Groups of columns with scales of their own are whole steps of codes, not of trits.
                let one_sum = *activations == ActivationQuant::PerToken
                    && !matches!(scales, Scales::Group { .. });
                let packing = if one_sum { kernels.packing() } else { Packing::Codes };
                let codes = PackedTernary::new(&**weights, packing, kernels, pool, memory)?;
                Weights::Ternary { codes, scales, activations: *activations }
            }
            Matrix::Float(weights) => Weights::Float(FloatMatrix::new(&**weights, pool, memory)?),
        };
        Ok(Self { rows, cols, weights: layout, bias, input_norm: weights.input_norm.clone() })
    }

    /// Output features.
    pub fn rows(&self) -> usize {
        self.rows
    }

    /// Input features.
    pub fn cols(&self) -> usize {
        self.cols
    }

    /// Bytes held: packed weights, scales, bias and norm.
    pub fn memory_bytes(&self) -> u64 {
        let weights = match &self.weights {
            Weights::Ternary { codes, scales, .. } => {
                let scales = match scales {
                    Scales::Tensor(_) => 4,
                    Scales::Row(values) | Scales::Group { values, .. } => 4 * values.len(),
                };
                codes.memory_bytes() + scales as u64
            }
            Weights::Float(matrix) => matrix.memory_bytes(),
        };
        let floats = self.bias.as_ref().map_or(0, Vec::len)
            + self.input_norm.as_ref().map_or(0, |norm| norm.weight.len());
        weights + 4 * floats as u64
    }

    fn n_tiles(&self) -> usize {
        self.rows.div_ceil(TILE_ROWS)
    }

    /// How the input must be quantized: `(columns with one scale, columns summed as integers)`, or
    /// `None` for float products.
    pub(super) fn quantization(&self) -> Option<(usize, usize)> {
        match &self.weights {
            Weights::Ternary { activations: ActivationQuant::PerGroup(group), .. } => {
                Some((*group, *group))
            }
            Weights::Ternary { scales: Scales::Group { group, .. }, .. } => {
                Some((self.cols, *group))
            }
            Weights::Ternary { .. } => Some((self.cols, self.cols)),
            Weights::Float(_) => None,
        }
    }

    /// Whether `other` reads the very same prepared input.
    fn shares_input_with(&self, other: &Self) -> bool {
        self.cols == other.cols
            && self.quantization() == other.quantization()
            && self.input_norm == other.input_norm
    }

    /// Outputs of some tiles for some tokens, bias added: `y[(tile · n_tokens + token) · 16 + row]`.
    fn products(
        &self,
        kernels: &Kernels,
        tiles: Range<usize>,
        input: &Prepared<'_>,
        sums: &mut Vec<i32>,
        y: &mut Vec<f32>,
    ) {
        let n_tokens = input.n_tokens();
        y.resize(tiles.len() * n_tokens * TILE_ROWS, 0.0);
        match (&self.weights, input) {
            (
                Weights::Ternary { codes, scales, .. },
                Prepared::Quantized {
                    codes: tokens,
                    scales: token_scales,
                    sums: code_sums,
                    n_groups,
                    scale_per_group,
                },
            ) => {
                let steps = codes.steps();
                let sum_cols = self.quantization().map_or(self.cols, |(_, sum_cols)| sum_cols);
                let group_steps = if *n_groups == 1 { steps } else { sum_cols / STEP_COLS };
                sums.resize(y.len() * n_groups, 0);
                let packing = codes.packing();
                let weights =
                    Tiles { codes: codes.tiles(tiles.clone()), packing, steps, group_steps };
                kernels.products(&weights, tokens, sums);
                let job = Rescale {
                    sums,
                    n_tokens,
                    n_groups: *n_groups,
                    code_sums,
                    token_scales,
                    scale_per_group: *scale_per_group,
                    weights: scales_from(scales, tiles.start, self.cols, sum_cols),
                };
                kernels.rescale(&job, y);
            }
            (Weights::Float(matrix), Prepared::Float { x, .. }) => {
                for (tile, y) in tiles.clone().zip(y.chunks_exact_mut(n_tokens * TILE_ROWS)) {
                    let rows = matrix.rows_at(tile * TILE_ROWS..(tile + 1) * TILE_ROWS);
                    kernels.float_products(&rows, x, n_tokens, y);
                }
            }
            _ => unreachable!("inputs are prepared as `quantization` says"),
        }
        if let Some(bias) = &self.bias {
            let tile_bias = bias.chunks_exact(TILE_ROWS).skip(tiles.start);
            for (y, bias) in y.chunks_exact_mut(n_tokens * TILE_ROWS).zip(tile_bias) {
                for y in y.chunks_exact_mut(TILE_ROWS) {
                    y.iter_mut().zip(bias).for_each(|(y, bias)| *y += bias);
                }
            }
        }
    }

    /// Integer sums of each row and token.
    fn n_groups(&self) -> usize {
        self.quantization().map_or(1, |(_, sum_cols)| self.cols.div_ceil(sum_cols))
    }

    /// Tokens of one block: as many as the caches hold, for each uses the weights once more.
    fn block_tokens(&self) -> usize {
        let by_bytes = BLOCK_TOKEN_BYTES / self.cols;
        let by_sums = 4 * BLOCK_SUMS / (2 * TILE_ROWS * self.n_groups());
        by_bytes.min(by_sums).max(1)
    }

    /// Cuts a range of tiles into what one call of a kernel takes: an even number of tiles, because
    /// kernels like pairs.
    fn blocks(
        &self,
        tiles: Range<usize>,
        n_tokens: usize,
    ) -> impl Iterator<Item = Range<usize>> + use<> {
        let by_sums = BLOCK_SUMS / (n_tokens * TILE_ROWS * self.n_groups()) / 2 * 2;
        let n = by_sums.clamp(2, BLOCK_TILES);
        tiles.clone().step_by(n).map(move |at| at..tiles.end.min(at + n))
    }
}

/// `outs[j] = linears[j](norm(x))` for `x` `(n_tokens, cols)` and `outs[j]` `(n_tokens, rows_j)`.
///
/// # Errors
/// [`Error::Shape`] if the lengths do not fit together.
pub fn project(
    pool: &ThreadPool,
    kernels: &Kernels,
    scratch: &mut Scratch,
    x: &[f32],
    n_tokens: usize,
    norm: Option<&NormWeights>,
    linears: &[&CpuLinear],
    outs: &mut [&mut [f32]],
) -> Result<()> {
    if linears.len() != outs.len() {
        return Err(Error::shape("outputs of a projection", linears.len(), outs.len()));
    }
    let mut start = 0;
    while let Some(first) = linears.get(start) {
        let more = linears[start..].iter().take(MAX_SHARED);
        let end = start + more.take_while(|linear| linear.shares_input_with(first)).count();
        let (linears, outs) = (&linears[start..end], &mut outs[start..end]);
        run(pool, kernels, scratch, x, n_tokens, norm, linears, outs, set)?;
        start = end;
    }
    Ok(())
}

/// `acc += linear(norm(x))` for `x` `(n_tokens, cols)` and `acc` `(n_tokens, rows)`.
///
/// # Errors
/// [`Error::Shape`] if the lengths do not fit together.
pub fn project_add(
    pool: &ThreadPool,
    kernels: &Kernels,
    scratch: &mut Scratch,
    x: &[f32],
    n_tokens: usize,
    norm: Option<&NormWeights>,
    linear: &CpuLinear,
    acc: &mut [f32],
) -> Result<()> {
    run(pool, kernels, scratch, x, n_tokens, norm, &[linear], &mut [acc], add)
}

/// `out = activation(gate(norm(x))) · up(norm(x))` for `x` `(n_tokens, cols)` and `out`
/// `(n_tokens, rows)`.
///
/// # Errors
/// [`Error::Shape`] if the lengths do not fit together.
pub fn gated(
    pool: &ThreadPool,
    kernels: &Kernels,
    scratch: &mut Scratch,
    x: &[f32],
    n_tokens: usize,
    norm: Option<&NormWeights>,
    gate: &CpuLinear,
    up: &CpuLinear,
    activation: Activation,
    out: &mut [f32],
) -> Result<()> {
    if gate.rows != up.rows {
        return Err(Error::shape("rows of gate and up projection", gate.rows, up.rows));
    }
    check(x, n_tokens, norm, gate, out)?;
    check(x, n_tokens, norm, up, out)?;
    if !gate.shares_input_with(up) {
        return gated_apart(pool, kernels, scratch, x, n_tokens, norm, [gate, up], activation, out);
    }
    let out = Parts::new(out);
    let inputs = Inputs::prepare(pool, kernels, scratch, x, n_tokens, norm, gate);
    pool.run(&|thread| {
        let tiles = share(gate.n_tiles(), pool.threads(), thread);
        inputs.for_blocks(thread, gate.block_tokens(), |first, input, work| {
            for tiles in gate.blocks(tiles.clone(), input.n_tokens()) {
                gate.products(kernels, tiles.clone(), input, &mut work.sums, &mut work.y);
                up.products(kernels, tiles.clone(), input, &mut work.sums, &mut work.up);
                kernels.gate(activation, &mut work.y, &work.up);
                write_tiles(&work.y, tiles, gate.rows, first, input.n_tokens(), &out, set);
            }
        });
    });
    Ok(())
}

/// [`gated`] for projections with norms of their own, which share no input.
fn gated_apart(
    pool: &ThreadPool,
    kernels: &Kernels,
    scratch: &mut Scratch,
    x: &[f32],
    n_tokens: usize,
    norm: Option<&NormWeights>,
    [gate, up]: [&CpuLinear; 2],
    activation: Activation,
    out: &mut [f32],
) -> Result<()> {
    let mut other = std::mem::take(&mut scratch.gated);
    other.resize(out.len(), 0.0);
    project(pool, kernels, scratch, x, n_tokens, norm, &[gate], &mut [out])?;
    project(pool, kernels, scratch, x, n_tokens, norm, &[up], &mut [&mut other])?;
    let (parts, len) = (Parts::new(out), other.len());
    pool.run(&|thread| {
        let part = share(len, pool.threads(), thread);
        // SAFETY: the shares of the threads are disjoint.
        let out = unsafe { parts.part(part.clone()) };
        kernels.gate(activation, out, &other[part]);
    });
    scratch.gated = other;
    Ok(())
}

/// One region over the tiles of all `linears`, which share their input.
fn run(
    pool: &ThreadPool,
    kernels: &Kernels,
    scratch: &mut Scratch,
    x: &[f32],
    n_tokens: usize,
    norm: Option<&NormWeights>,
    linears: &[&CpuLinear],
    outs: &mut [&mut [f32]],
    store: impl Fn(&mut [f32], &[f32]) + Sync + Copy,
) -> Result<()> {
    for (linear, out) in linears.iter().zip(&*outs) {
        check(x, n_tokens, norm, linear, out)?;
    }
    let mut outs = outs.iter_mut();
    let outs: [_; MAX_SHARED] = std::array::from_fn(|_| outs.next().map(|out| Parts::new(out)));
    let n_tiles = linears.iter().map(|linear| linear.n_tiles()).sum();
    let inputs = Inputs::prepare(pool, kernels, scratch, x, n_tokens, norm, linears[0]);
    pool.run(&|thread| {
        let mine = share(n_tiles, pool.threads(), thread);
        inputs.for_blocks(thread, linears[0].block_tokens(), |first, input, work| {
            let mut before = 0;
            for (linear, out) in linears.iter().zip(outs.iter().flatten()) {
                let n = linear.n_tiles();
                let tiles = mine.start.clamp(before, before + n) - before
                    ..mine.end.clamp(before, before + n) - before;
                for tiles in linear.blocks(tiles, input.n_tokens()) {
                    linear.products(kernels, tiles.clone(), input, &mut work.sums, &mut work.y);
                    write_tiles(&work.y, tiles, linear.rows, first, input.n_tokens(), out, store);
                }
                before += n;
            }
        });
    });
    Ok(())
}

/// The two ways a result reaches its place.
#[inline(always)]
fn set(out: &mut [f32], y: &[f32]) {
    out.copy_from_slice(y);
}

#[inline(always)]
fn add(acc: &mut [f32], y: &[f32]) {
    acc.iter_mut().zip(y).for_each(|(acc, y)| *acc += y);
}

/// Brings tile-major results to their rows of `out` `(…, rows)`, from token `first` on.
fn write_tiles(
    y: &[f32],
    tiles: Range<usize>,
    rows: usize,
    first: usize,
    n_tokens: usize,
    out: &Parts<'_, f32>,
    store: impl Fn(&mut [f32], &[f32]) + Sync + Copy,
) {
    if n_tokens == 1 {
        // Consecutive tiles of one token are consecutive outputs.
        let (start, end) = (tiles.start * TILE_ROWS, rows.min(tiles.end * TILE_ROWS));
        // SAFETY: a thread's tiles are its own, and so are their rows, for every token.
        let out = unsafe { out.part(first * rows + start..first * rows + end) };
        return store(out, &y[..end - start]);
    }
    for (tile, y) in tiles.zip(y.chunks_exact(n_tokens * TILE_ROWS)) {
        let (start, end) = (tile * TILE_ROWS, rows.min((tile + 1) * TILE_ROWS));
        for (token, y) in y.chunks_exact(TILE_ROWS).enumerate() {
            let at = (first + token) * rows;
            // SAFETY: as above.
            let out = unsafe { out.part(at + start..at + end) };
            match (out.as_chunks_mut::<TILE_ROWS>(), y.as_chunks::<TILE_ROWS>()) {
                // A length the compiler knows is one store instead of a call.
                (([out], []), ([y], [])) => store(out, y),
                _ => store(out, &y[..end - start]),
            }
        }
    }
}

fn check(
    x: &[f32],
    n_tokens: usize,
    norm: Option<&NormWeights>,
    linear: &CpuLinear,
    out: &[f32],
) -> Result<()> {
    let (rows, cols) = (linear.rows, linear.cols);
    if n_tokens.checked_mul(cols) != Some(x.len()) {
        return Err(Error::shape(
            "input of a projection",
            format!("{n_tokens} × {cols} numbers"),
            x.len(),
        ));
    }
    if n_tokens.checked_mul(rows) != Some(out.len()) {
        return Err(Error::shape(
            "output of a projection",
            format!("{n_tokens} × {rows} numbers"),
            out.len(),
        ));
    }
    match norm {
        Some(norm) if norm.weight.len() != cols => {
            Err(Error::shape("norm before a projection", cols, norm.weight.len()))
        }
        _ => Ok(()),
    }
}

//! The input side of a projection: norms and quantization, once for all products that share it.

use crate::cpu::linear::CpuLinear;
use crate::kernels::{Grouping, Kernels, QuantizedTokens, TokenCodes};
use crate::threads::{Parts, ThreadPool, share};
use crate::weights::NormWeights;

/// Buffers that projections reuse, so that a step allocates nothing once they have grown.
#[derive(Debug, Default)]
pub struct Scratch {
    threads: Vec<ThreadScratch>,
    /// Inputs of several tokens, prepared by all threads.
    tokens: QuantizedTokens,
    floats: Vec<f32>,
    /// The second operand of a gate whose projections share no input.
    pub(super) gated: Vec<f32>,
}

impl Scratch {
    /// Empty buffers.
    pub fn new() -> Self {
        Self::default()
    }

    /// Bytes held.
    pub fn memory_bytes(&self) -> u64 {
        let threads: u64 = self.threads.iter().map(ThreadScratch::memory_bytes).sum();
        let floats = self.floats.capacity() + self.gated.capacity();
        threads + self.tokens.memory_bytes() + 4 * floats as u64
    }
}

/// What one thread writes; on cache lines of its own.
#[derive(Debug, Default)]
#[repr(align(128))]
struct ThreadScratch {
    /// The only token of a step, prepared by each thread for itself.
    token: QuantizedTokens,
    /// A token after the block's norm, and after the projection's own.
    normed: [Vec<f32>; 2],
    work: Work,
}

/// Results of one block.
#[derive(Debug, Default)]
pub(super) struct Work {
    pub(super) sums: Vec<i32>,
    pub(super) y: Vec<f32>,
    pub(super) up: Vec<f32>,
}

impl ThreadScratch {
    fn memory_bytes(&self) -> u64 {
        let work = &self.work;
        let floats = self.normed.iter().map(Vec::capacity).sum::<usize>()
            + work.sums.capacity()
            + work.y.capacity()
            + work.up.capacity();
        self.token.memory_bytes() + 4 * floats as u64
    }
}

/// Some tokens as the kernels take them.
pub(super) enum Prepared<'a> {
    Quantized {
        codes: TokenCodes<'a>,
        scales: &'a [f32],
        sums: &'a [i32],
        n_groups: usize,
        scale_per_group: bool,
    },
    Float {
        x: &'a [f32],
        n_tokens: usize,
    },
}

impl Prepared<'_> {
    pub(super) fn n_tokens(&self) -> usize {
        match self {
            Self::Quantized { codes, .. } => codes.n_tokens,
            Self::Float { n_tokens, .. } => *n_tokens,
        }
    }
}

/// The input of a region: prepared already, or, for a single token, by each thread when it starts.
pub(super) struct Inputs<'a> {
    kernels: &'a Kernels,
    x: &'a [f32],
    n_tokens: usize,
    cols: usize,
    norms: [Option<&'a NormWeights>; 2],
    grouping: Option<Grouping>,
    tokens: &'a QuantizedTokens,
    floats: &'a [f32],
    threads: Parts<'a, ThreadScratch>,
}

impl<'a> Inputs<'a> {
    /// Applies `norm` and the norm of `linear`, and quantizes as `linear` wants it. The caller has
    /// checked the lengths.
    pub(super) fn prepare(
        pool: &ThreadPool,
        kernels: &'a Kernels,
        scratch: &'a mut Scratch,
        x: &'a [f32],
        n_tokens: usize,
        norm: Option<&'a NormWeights>,
        linear: &'a CpuLinear,
    ) -> Self {
        let cols = linear.cols();
        let norms = [norm, linear.input_norm.as_ref()];
        let grouping = linear.quantization().map(|(scale_cols, sum_cols)| Grouping {
            cols,
            scale_cols,
            sum_cols,
        });
        scratch.threads.resize_with(pool.threads().max(scratch.threads.len()), Default::default);
        let Scratch { threads, tokens, floats, .. } = scratch;
        let threads = Parts::new(threads);
        if n_tokens > 1 {
            prepare_all(
                pool, kernels, &threads, x, n_tokens, norms, grouping, cols, tokens, floats,
            );
        }
        Self { kernels, x, n_tokens, cols, norms, grouping, tokens, floats, threads }
    }

    /// Calls `f(first token, tokens, buffers)` for each block of at most `block_tokens` tokens.
    /// Each thread may call this once in a region, with its own index.
    pub(super) fn for_blocks(
        &self,
        thread: usize,
        block_tokens: usize,
        mut f: impl FnMut(usize, &Prepared<'_>, &mut Work),
    ) {
        // SAFETY: each thread of the region takes its own element, once.
        let [own] = (unsafe { self.threads.part(thread..thread + 1) }) else { return };
        if self.n_tokens == 1 {
            let x = apply_norms(self.kernels, self.x, self.norms, &mut own.normed);
            let input = match self.grouping {
                Some(grouping) => {
                    own.token.set_single(x, grouping, self.kernels);
                    quantized(&own.token, grouping, 0, 1)
                }
                None => Prepared::Float { x, n_tokens: 1 },
            };
            return f(0, &input, &mut own.work);
        }
        for first in (0..self.n_tokens).step_by(block_tokens) {
            let n_tokens = block_tokens.min(self.n_tokens - first);
            let input = match self.grouping {
                Some(grouping) => quantized(self.tokens, grouping, first, n_tokens),
                None => {
                    let x = match self.norms {
                        [None, None] => self.x,
                        _ => self.floats,
                    };
                    Prepared::Float { x: &x[first * self.cols..][..n_tokens * self.cols], n_tokens }
                }
            };
            f(first, &input, &mut own.work);
        }
    }
}

/// Some tokens of a buffer.
fn quantized(
    tokens: &QuantizedTokens,
    grouping: Grouping,
    first: usize,
    n_tokens: usize,
) -> Prepared<'_> {
    let QuantizedTokens { codes, stride, scales, n_scales, sums, n_groups } = tokens;
    let codes = &codes[first * stride..][..n_tokens * stride];
    Prepared::Quantized {
        codes: TokenCodes { codes, stride: *stride, n_tokens },
        scales: &scales[first * n_scales..][..n_tokens * n_scales],
        sums: &sums[first * n_groups..][..n_tokens * n_groups],
        n_groups: *n_groups,
        scale_per_group: grouping.scale_cols < grouping.cols,
    }
}

/// Prepares several tokens, each thread its share of them.
fn prepare_all(
    pool: &ThreadPool,
    kernels: &Kernels,
    threads: &Parts<'_, ThreadScratch>,
    x: &[f32],
    n_tokens: usize,
    norms: [Option<&NormWeights>; 2],
    grouping: Option<Grouping>,
    cols: usize,
    tokens: &mut QuantizedTokens,
    floats: &mut Vec<f32>,
) {
    let Some(grouping) = grouping else {
        if norms.iter().any(Option::is_some) {
            floats.resize(n_tokens * cols, 0.0);
            let out = Parts::new(floats);
            pool.run(&|thread| {
                // SAFETY: each thread of the region takes its own element, once.
                let [own] = (unsafe { threads.part(thread..thread + 1) }) else { return };
                for t in share(n_tokens, pool.threads(), thread) {
                    let x = apply_norms(kernels, &x[t * cols..][..cols], norms, &mut own.normed);
                    // SAFETY: the shares of the threads are disjoint.
                    unsafe { out.part(t * cols..(t + 1) * cols) }.copy_from_slice(x);
                }
            });
        }
        return;
    };
    tokens.resize(n_tokens, grouping);
    let QuantizedTokens { codes, stride, scales, n_scales, sums, n_groups } = tokens;
    let (codes, scales, sums) = (Parts::new(codes), Parts::new(scales), Parts::new(sums));
    pool.run(&|thread| {
        // SAFETY: each thread of the region takes its own element, once.
        let [own] = (unsafe { threads.part(thread..thread + 1) }) else { return };
        for t in share(n_tokens, pool.threads(), thread) {
            let x = apply_norms(kernels, &x[t * cols..][..cols], norms, &mut own.normed);
            // SAFETY: the shares of the threads are disjoint, and so are their tokens' parts.
            let (codes, scales, sums) = unsafe {
                (
                    codes.part(t * *stride..(t + 1) * *stride),
                    scales.part(t * *n_scales..(t + 1) * *n_scales),
                    sums.part(t * *n_groups..(t + 1) * *n_groups),
                )
            };
            kernels.quantize(x, grouping.scale_cols, grouping.sum_cols, codes, scales, sums);
        }
    });
}

/// One token after both norms.
fn apply_norms<'a>(
    kernels: &Kernels,
    x: &'a [f32],
    [outer, inner]: [Option<&NormWeights>; 2],
    [a, b]: &'a mut [Vec<f32>; 2],
) -> &'a [f32] {
    let mut x = x;
    for (norm, buffer) in [(outer, a), (inner, b)] {
        if let Some(norm) = norm {
            buffer.resize(x.len(), 0.0);
            kernels.norm(x, norm, buffer);
            x = buffer;
        }
    }
    x
}

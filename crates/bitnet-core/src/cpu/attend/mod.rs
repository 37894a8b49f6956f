//! Attention of a few queries over one head of the cache: the arithmetic, compiled for each
//! instruction set.
//!
//! The cached positions of a sequence are cut into spans of [`SPAN`], by absolute position. Within
//! a span: all scores, their maximum, `p = e^(score − maximum)`, `Σ p` in 16 lanes, and `Σ p·v` in
//! the order of positions. Spans join one after the other, in order ([`fold`]). So a query's result
//! depends on its position and the cache alone, not on how work was shared out.
//!
//! A tile holds 16 tokens of one head (`d` = feature, `t` = token):
//!
//! ```text
//! keys    f32, f16   [d][t]                    values  [d/16][t][d%16]
//! keys    q8         [d/4][t][d%4], scale [t]  values  [d/16][t/4][d%16][t%4], scale [t]
//! ```
//!
//! so that both products, of queries with keys and of weights with values, run over panels of 16
//! terms by 16 lanes that lie one after the other, and never add up the lanes of a register. With 8-bit keys and values both products are integer: queries and
//! weights are rounded to 16 bits, which costs nothing beside what 8 bits cost the cache.
//!
//! Knows one head of one sequence; `attention` shares the heads, rows and spans out.

mod format;
mod simd;
mod span;
#[cfg(test)]
mod tests;
#[cfg(target_arch = "x86_64")]
mod x86_64;

use crate::backend::KvType;
use crate::cpu::kv::{KvLayout, TILE_TOKENS};
use crate::cpu::math;
use format::{F16, F32, Format, Q8};
use simd::{Portable, Quads};
use std::ops::Range;

/// Positions in a span. A multiple of the 16 tokens of a tile; integer sums over a span of 8-bit
/// values with 16-bit weights fit 32 bits.
pub(crate) const SPAN: usize = 256;
/// Tiles in a span.
const SPAN_TILES: usize = SPAN / TILE_TOKENS;

/// Bytes of a tile of 16 keys or values with `dim` features, a multiple of 16.
pub(crate) fn tile_bytes(dtype: KvType, dim: usize) -> usize {
    match dtype {
        KvType::F32 => F32::tile_bytes(dim),
        KvType::F16 => F16::tile_bytes(dim),
        KvType::Q8 => Q8::tile_bytes(dim),
    }
}

/// Writes the key of token `token` (`< 16`) of a tile. `key` has the padded length.
pub(crate) fn store_key(dtype: KvType, tile: &mut [u8], token: usize, key: &[f32]) {
    match dtype {
        KvType::F32 => F32::store_key(tile, token, key),
        KvType::F16 => F16::store_key(tile, token, key),
        KvType::Q8 => Q8::store_key(tile, token, key),
    }
}

/// As [`store_key`], for a value.
pub(crate) fn store_value(dtype: KvType, tile: &mut [u8], token: usize, value: &[f32]) {
    match dtype {
        KvType::F32 => F32::store_value(tile, token, value),
        KvType::F16 => F16::store_value(tile, token, value),
        KvType::Q8 => Q8::store_value(tile, token, value),
    }
}

/// Consecutive rows of one sequence, the queries that share one key/value head, and the spans they
/// look at.
pub(crate) struct Task<'a> {
    pub(crate) cache: &'a [u8],
    pub(crate) layout: &'a KvLayout,
    pub(crate) layer: usize,
    pub(crate) kv_head: usize,
    /// The sequence's block table.
    pub(crate) blocks: &'a [u32],
    /// Query `g` of row `r` starts at `r · q_stride + g · head_dim`.
    pub(crate) q: &'a [f32],
    pub(crate) q_stride: usize,
    pub(crate) n_rows: usize,
    /// Queries that share the head.
    pub(crate) group: usize,
    /// Position of the first row.
    pub(crate) first_position: usize,
    pub(crate) spans: Range<usize>,
    /// End of the spans that this thread will work on next, the task's own included: a hint.
    pub(crate) ahead: usize,
}

impl Task<'_> {
    /// Queries, row-major: query `m` is number `m % group` of row `m / group`.
    #[inline(always)]
    pub(crate) fn n_queries(&self) -> usize {
        self.n_rows * self.group
    }

    /// Positions that the last row sees.
    #[inline(always)]
    fn end(&self) -> usize {
        self.first_position + self.n_rows
    }

    /// Positions of span `span` that query `m` sees.
    #[inline(always)]
    fn visible(&self, m: usize, span: usize) -> usize {
        (self.first_position + m / self.group + 1).saturating_sub(span * SPAN).min(SPAN)
    }
}

/// What a query has seen so far: its largest score, the sum of its weights, and the weighted sum
/// of values, both relative to that score. `max` is −∞ before the first span.
#[derive(Debug, Default)]
pub(crate) struct Partial {
    pub(crate) max: Vec<f32>,
    pub(crate) total: Vec<f32>,
    /// `(queries, dim)`
    pub(crate) values: Vec<f32>,
}

impl Partial {
    /// Nothing seen, for `n_queries` queries.
    pub(crate) fn reset(&mut self, n_queries: usize, dim: usize) {
        for (list, len, value) in [
            (&mut self.max, n_queries, f32::NEG_INFINITY),
            (&mut self.total, n_queries, 0.0),
            (&mut self.values, n_queries * dim, 0.0),
        ] {
            list.clear();
            list.resize(len, value);
        }
    }

    /// Copies it to `out`: maxima, totals, values.
    pub(crate) fn write(&self, out: &mut [f32]) {
        let n = self.max.len();
        let (max, rest) = out.split_at_mut(n);
        let (total, values) = rest.split_at_mut(n);
        max.copy_from_slice(&self.max);
        total.copy_from_slice(&self.total);
        values.copy_from_slice(&self.values);
    }

    /// Joins the next span, as [`Partial::write`] left it.
    #[inline(always)]
    fn fold_written(&mut self, written: &[f32]) {
        let n = self.max.len();
        let dim = self.values.len() / n;
        let (max, rest) = written.split_at(n);
        let (total, values) = rest.split_at(n);
        for m in 0..n {
            fold(
                (&mut self.max[m], &mut self.total[m], &mut self.values[m * dim..(m + 1) * dim]),
                (max[m], total[m], &values[m * dim..(m + 1) * dim]),
            );
        }
    }
}

/// Joins the next span `(max, total, values)` to what stands in `into`; a span of which nothing is
/// seen changes nothing.
#[inline(always)]
fn fold(into: (&mut f32, &mut f32, &mut [f32]), (max, total, values): (f32, f32, &[f32])) {
    let (into_max, into_total, into_values) = into;
    if max == f32::NEG_INFINITY {
        return;
    }
    if *into_max == f32::NEG_INFINITY {
        (*into_max, *into_total) = (max, total);
        into_values.copy_from_slice(values);
        return;
    }
    let new = math::larger(*into_max, max);
    let (old_factor, new_factor) = (math::exp(*into_max - new), math::exp(max - new));
    *into_max = new;
    *into_total = *into_total * old_factor + total * new_factor;
    for (into, &value) in into_values.iter_mut().zip(values) {
        *into = *into * old_factor + value * new_factor;
    }
}

/// Buffers of one thread. They grow with the largest task and are then reused.
#[derive(Debug, Default)]
#[repr(align(128))]
pub(crate) struct Scratch {
    /// Scaled queries `(queries, dim)`.
    queries: Vec<f32>,
    /// The same as integers, with the factor of each and its sum.
    query_codes: Vec<Quads>,
    query_factor: Vec<f32>,
    query_sum: Vec<i32>,
    /// Scores, then weights, `(queries, SPAN)`.
    scores: Vec<f32>,
    /// Weights times scales of the values, as integers, with factors and sums.
    weight_codes: Vec<Quads>,
    weight_factor: Vec<f32>,
    weight_sum: Vec<i32>,
    /// Maximum, total and values of the current span.
    span: Partial,
    /// The result of a task.
    pub(crate) result: Partial,
}

impl Scratch {
    /// Bytes held.
    pub(crate) fn memory_bytes(&self) -> u64 {
        let partial = |p: &Partial| p.max.capacity() + p.total.capacity() + p.values.capacity();
        let floats = self.queries.capacity()
            + self.query_factor.capacity()
            + self.query_sum.capacity()
            + self.scores.capacity()
            + self.weight_factor.capacity()
            + self.weight_sum.capacity()
            + partial(&self.span)
            + partial(&self.result);
        let quads = self.query_codes.capacity() + self.weight_codes.capacity();
        (4 * floats + 32 * quads) as u64
    }

    fn reset(&mut self, n: usize, dim: usize) {
        self.queries.resize(n * dim, 0.0);
        self.query_codes.resize(n * dim / 16, [[0; 8]; 4]);
        self.query_factor.resize(n, 0.0);
        self.query_sum.resize(n, 0);
        self.scores.resize(n * SPAN, 0.0);
        self.weight_codes.resize(n * SPAN_TILES, [[0; 8]; 4]);
        self.weight_factor.resize(n, 0.0);
        self.weight_sum.resize(n, 0);
        self.span.reset(n, dim);
        self.result.reset(n, dim);
    }
}

type AttendFn = unsafe fn(&Task<'_>, &mut Scratch);
type JoinFn = unsafe fn(&[f32], usize, &mut Partial);

/// [`AttentionKernels::attend`] for one instruction set and each number format.
pub(crate) struct AttentionKernels {
    f32: AttendFn,
    f16: AttendFn,
    q8: AttendFn,
    join: JoinFn,
}

impl AttentionKernels {
    /// Computes `task`; the result, not yet divided by the totals, is in `scratch.result`.
    ///
    /// # Safety
    /// The CPU has the features these kernels were compiled for.
    pub(crate) unsafe fn attend(&self, task: &Task<'_>, scratch: &mut Scratch) {
        let attend = match task.layout.spec.dtype {
            KvType::F32 => self.f32,
            KvType::F16 => self.f16,
            KvType::Q8 => self.q8,
        };
        // SAFETY: as the caller promises.
        unsafe { attend(task, scratch) }
    }

    /// Joins what [`Partial::write`] left of `n_spans` consecutive spans to `result`.
    ///
    /// # Safety
    /// As [`AttentionKernels::attend`].
    pub(crate) unsafe fn join(&self, partials: &[f32], n_spans: usize, result: &mut Partial) {
        // SAFETY: as the caller promises.
        unsafe { (self.join)(partials, n_spans, result) }
    }
}

/// For every CPU.
pub(crate) static PORTABLE: AttentionKernels = AttentionKernels {
    f32: |task, scratch| span::attend::<_, F32>(Portable, task, scratch),
    f16: |task, scratch| span::attend::<_, F16>(Portable, task, scratch),
    q8: |task, scratch| span::attend::<_, Q8>(Portable, task, scratch),
    join: span::join,
};

/// The functions of one x86-64 instruction set: the same source, compiled with its features.
#[cfg(target_arch = "x86_64")]
macro_rules! compiled_for {
    ($features:literal, $simd:ty) => {{
        #[target_feature(enable = $features)]
        unsafe fn attend<F: Format>(task: &Task<'_>, scratch: &mut Scratch) {
            // SAFETY: the CPU has these features, or this function may not be called.
            span::attend::<_, F>(unsafe { <$simd>::new() }, task, scratch);
        }
        #[target_feature(enable = $features)]
        unsafe fn join(partials: &[f32], n_spans: usize, result: &mut Partial) {
            span::join(partials, n_spans, result);
        }
        AttentionKernels { f32: attend::<F32>, f16: attend::<F16>, q8: attend::<Q8>, join }
    }};
}

/// For CPUs with AVX2 and F16C.
#[cfg(target_arch = "x86_64")]
pub(crate) static AVX2: AttentionKernels = compiled_for!("avx2,f16c", x86_64::Avx2);

/// For CPUs with AVX-512 F, BW, VL and VNNI, AVX2 and F16C.
#[cfg(target_arch = "x86_64")]
pub(crate) static AVX512VNNI: AttentionKernels =
    compiled_for!("avx512f,avx512bw,avx512vl,avx512vnni,avx2,f16c", x86_64::Avx512);

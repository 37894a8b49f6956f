//! The steps of one task: scores, softmax and values of each span, joined in order.

use super::format::{Format, SpanTiles};
use super::simd::Simd;
use super::{SPAN, SPAN_TILES, Scratch, Task, fold};
use crate::cpu::kv::{Part, TILE_TOKENS};
use crate::cpu::math;

/// Computes `task` into `scratch.result`.
#[inline(always)]
pub(super) fn attend<S: Simd, F: Format>(simd: S, task: &Task<'_>, scratch: &mut Scratch) {
    let (layout, n) = (task.layout, task.n_queries());
    let dim = layout.dim;
    scratch.reset(n, dim);
    scale_queries(task, &mut scratch.queries, dim);
    F::prepare(simd, scratch, dim);
    for span in task.spans.clone() {
        // Rows ascend, so the last query sees the most, and those that see nothing come first.
        let n_visible = task.visible(n - 1, span);
        let Some(first) = (0..n).step_by(task.group).find(|&m| task.visible(m, span) > 0) else {
            return;
        };
        let n_tiles = n_visible.div_ceil(TILE_TOKENS);
        let place =
            |part, tile| layout.sequence_tile(task.blocks, task.layer, part, task.kv_head, tile);
        let (mut keys, mut values) = ([0; SPAN_TILES], [0; SPAN_TILES]);
        for (i, (key, value)) in keys.iter_mut().zip(&mut values).enumerate().take(n_tiles) {
            let tile = span * SPAN_TILES + i;
            (*key, *value) = (place(Part::Keys, tile), place(Part::Values, tile));
        }
        let mut next = [0; SPAN_TILES];
        let n_next = match span + 1 < task.ahead {
            true => task.end().div_ceil(TILE_TOKENS).saturating_sub((span + 1) * SPAN_TILES),
            false => 0,
        };
        for (i, next) in next.iter_mut().enumerate().take(n_next) {
            *next = place(Part::Keys, (span + 1) * SPAN_TILES + i);
        }
        let tiles = SpanTiles {
            cache: task.cache,
            dim,
            keys: &keys[..n_tiles],
            values: &values[..n_tiles],
            next: &next[..n_next.min(SPAN_TILES)],
            tile_bytes: layout.tile_bytes,
        };
        F::scores(simd, &tiles, first..n, scratch);
        for m in first..n {
            softmax(scratch, m, task.visible(m, span));
        }
        F::values(simd, &tiles, first..n, |m| task.visible(m, span), scratch);
        let Scratch { span: partial, result, .. } = scratch;
        for m in first..n {
            fold(
                (
                    &mut result.max[m],
                    &mut result.total[m],
                    &mut result.values[m * dim..(m + 1) * dim],
                ),
                (partial.max[m], partial.total[m], &partial.values[m * dim..(m + 1) * dim]),
            );
        }
    }
}

/// Joins partial results of consecutive spans, each as [`super::Partial::write`] left it, into
/// `result`, which has the right size.
#[inline(always)]
pub(super) fn join(partials: &[f32], n_spans: usize, result: &mut super::Partial) {
    for partial in partials.chunks_exact(partials.len() / n_spans) {
        result.fold_written(partial);
    }
}

/// Copies the queries, padded and times `1/sqrt(head_dim)`.
#[inline(always)]
fn scale_queries(task: &Task<'_>, out: &mut [f32], dim: usize) {
    let head_dim = task.layout.spec.head_dim;
    let scale = 1.0 / (head_dim as f32).sqrt();
    for (m, out) in out.chunks_exact_mut(dim).enumerate() {
        let start = m / task.group * task.q_stride + m % task.group * head_dim;
        for (out, &q) in out.iter_mut().zip(&task.q[start..start + head_dim]) {
            *out = q * scale;
        }
        out[head_dim..].fill(0.0);
    }
}

/// Turns the first `visible` scores of query `m` into weights relative to the largest.
#[inline(always)]
fn softmax(scratch: &mut Scratch, m: usize, visible: usize) {
    let padded = visible.next_multiple_of(math::LANES);
    let scores = &mut scratch.scores[m * SPAN..][..padded];
    scores[visible..].fill(f32::NEG_INFINITY);
    let max = math::max(scores);
    scratch.span.max[m] = max;
    scratch.span.total[m] = math::exp_and_sum(scores, max);
}

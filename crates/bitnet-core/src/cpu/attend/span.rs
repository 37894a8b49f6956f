//! The steps of one task: scores, softmax and values of each span, joined in order.

use super::format::{Format, SpanTiles};
use super::simd::Simd;
use super::{SPAN, Scratch, Task, fold};
use crate::cpu::kv::{Part, TILE_TOKENS};
use crate::cpu::math;

/// Tiles in a span.
const TILES: usize = SPAN / TILE_TOKENS;

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
        let place = |part| {
            let mut places = [0; TILES];
            for (i, place) in places[..n_tiles].iter_mut().enumerate() {
                let tile = span * TILES + i;
                *place = layout.sequence_tile(task.blocks, task.layer, part, task.kv_head, tile);
            }
            places
        };
        let (keys, values) = (place(Part::Keys), place(Part::Values));
        let tiles = SpanTiles {
            cache: task.cache,
            dim,
            keys: &keys[..n_tiles],
            values: &values[..n_tiles],
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

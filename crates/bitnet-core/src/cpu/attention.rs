//! Shares the attention of a batch out to threads: rows, heads and spans of the cache.
//!
//! A piece of work is a few rows of one sequence with the queries of one key/value head, over all
//! the spans they see; a piece that would keep one thread busy while others wait is cut at the
//! spans, and its partial results are joined afterwards, in order. What is computed for a query
//! is the same either way (see `attend`). Knows lengths and costs, not number formats.

use crate::backend::SequenceSlice;
use crate::cpu::attend::{self, Partial, SPAN, Task};
use crate::cpu::kv::CpuKv;
use crate::error::{Error, Result};
use crate::kernels::Kernels;
use crate::threads::{Parts, ThreadPool, share};
use std::ops::Range;
use std::sync::atomic::{AtomicUsize, Ordering};

/// Queries that look at a tile of the cache together: enough to pay for bringing it near, few
/// enough for their scores to stay in the caches too.
const QUERIES: usize = 32;
/// Pieces for each thread, at least: the last ones to finish are then short, and yet most spans of a
/// piece are asked for while the one before is worked on.
const PIECES: usize = 4;

/// Lists and buffers that attention reuses.
#[derive(Debug, Default)]
pub(crate) struct AttentionScratch {
    threads: Vec<attend::Scratch>,
    pieces: Vec<Piece>,
    joins: Vec<Join>,
    /// Pieces of each join still to be computed.
    missing: Vec<AtomicUsize>,
    /// Results of pieces that are joined later: maxima, totals and values of each.
    partials: Vec<f32>,
}

impl AttentionScratch {
    /// Bytes held.
    pub(crate) fn memory_bytes(&self) -> u64 {
        let threads: u64 = self.threads.iter().map(attend::Scratch::memory_bytes).sum();
        let lists = self.pieces.capacity() * size_of::<Piece>()
            + self.joins.capacity() * size_of::<Join>()
            + self.missing.capacity() * size_of::<AtomicUsize>()
            + self.partials.capacity() * size_of::<f32>();
        threads + lists as u64
    }
}

/// Rows of one sequence and the queries of one key/value head.
#[derive(Debug, Clone, Copy)]
struct Place {
    /// Index in the batch's sequences.
    sequence: usize,
    /// In the batch.
    first_row: usize,
    n_rows: usize,
    kv_head: usize,
    first_position: usize,
}

#[derive(Debug, Clone)]
struct Piece {
    place: Place,
    spans: Range<usize>,
    /// What the result is a part of, if it is not the whole.
    join: Option<usize>,
}

#[derive(Debug, Clone, Copy)]
struct Join {
    /// Where in `partials` the results of its spans start, one after the other.
    partials: usize,
    n_spans: usize,
}

/// Causal attention of every row of a batch over its own sequence.
///
/// `q` and `out` are `(rows, width)`, where `width` is a multiple of `n_kv_heads · head_dim`.
pub(crate) fn attention(
    pool: &ThreadPool,
    kernels: &Kernels,
    scratch: &mut AttentionScratch,
    sequences: &[SequenceSlice],
    kv: &CpuKv,
    layer: usize,
    q: &[f32],
    width: usize,
    out: &mut [f32],
) -> Result<()> {
    let layout = &kv.layout;
    let kv_width = layout.spec.n_kv_heads * layout.spec.head_dim;
    if width == 0 || !width.is_multiple_of(kv_width) {
        return Err(Error::shape("queries", format!("a multiple of {kv_width} features"), width));
    }
    if out.len() != q.len() {
        return Err(Error::shape("output of attention", q.len(), out.len()));
    }
    kv.check_layer(layer)?;
    for slice in sequences {
        kv.check_blocks(&slice.blocks, slice.first_position + slice.rows.len())?;
    }
    let group = width / kv_width;
    let head_width = group * layout.spec.head_dim;
    let partial_len = |n_rows: usize| n_rows * group * (layout.dim + 2);
    plan(scratch, sequences, layout.spec.n_kv_heads, group, pool.threads(), partial_len);

    scratch.threads.resize_with(pool.threads().max(scratch.threads.len()), Default::default);
    let AttentionScratch { threads, pieces, joins, missing, partials } = scratch;
    let task = |place: &Place, spans: Range<usize>, ahead: usize| Task {
        cache: &kv.memory,
        layout,
        layer,
        kv_head: place.kv_head,
        blocks: &sequences[place.sequence].blocks,
        q: &q[place.first_row * width + place.kv_head * head_width..],
        q_stride: width,
        n_rows: place.n_rows,
        group,
        first_position: place.first_position,
        spans,
        ahead,
    };
    let output = Parts::new(out);
    let finish = |place: &Place, result: &Partial| {
        for row in 0..place.n_rows {
            let start = (place.first_row + row) * width + place.kv_head * head_width;
            // SAFETY: a place is finished once, and no two places share a row and a head.
            let out = unsafe { output.part(start..start + head_width) };
            for (g, out) in out.chunks_exact_mut(layout.spec.head_dim).enumerate() {
                let m = row * group + g;
                let factor = 1.0 / result.total[m];
                for (out, &value) in out.iter_mut().zip(&result.values[m * layout.dim..]) {
                    *out = value * factor;
                }
            }
        }
    };
    let scratches = Parts::new(threads);
    let partials = Parts::new(partials);
    let next = AtomicUsize::new(0);
    pool.run(&|thread| {
        // SAFETY: each thread takes its own element.
        let [scratch] = (unsafe { scratches.part(thread..thread + 1) }) else { return };
        // The last pieces are the longest of a sequence: they go first.
        while let Some(i) = pieces.len().checked_sub(next.fetch_add(1, Ordering::Relaxed) + 1) {
            let Piece { place, spans, join } = &pieces[i];
            let Some(join) = *join else {
                kernels.attend(&task(place, spans.clone(), spans.end), scratch);
                finish(place, &scratch.result);
                continue;
            };
            let Join { partials: start, n_spans } = joins[join];
            let len = partial_len(place.n_rows);
            for span in spans.clone() {
                kernels.attend(&task(place, span..span + 1, spans.end), scratch);
                let at = start + span * len;
                // SAFETY: `plan` gave every join a range of its own, and each span of it to one
                // piece.
                scratch.result.write(unsafe { partials.part(at..at + len) });
            }
            // Release and acquire: whoever finds that nothing is missing sees all that was written.
            if missing[join].fetch_sub(1, Ordering::AcqRel) == 1 {
                // SAFETY: every piece of this join is done with its part.
                let all = unsafe { partials.part(start..start + n_spans * len) };
                scratch.result.reset(place.n_rows * group, layout.dim);
                kernels.join(all, n_spans, &mut scratch.result);
                finish(place, &scratch.result);
            }
        }
    });
    Ok(())
}

/// Lists the pieces of a batch and what is to be joined.
fn plan(
    scratch: &mut AttentionScratch,
    sequences: &[SequenceSlice],
    n_kv_heads: usize,
    group: usize,
    n_threads: usize,
    partial_len: impl Fn(usize) -> usize,
) {
    let rows_each = (QUERIES / group).max(1);
    let n_spans = |end: usize| end.div_ceil(SPAN);
    let places = || {
        sequences.iter().enumerate().flat_map(move |(sequence, slice)| {
            slice.rows.clone().step_by(rows_each).map(move |first_row| Place {
                sequence,
                first_row,
                n_rows: rows_each.min(slice.rows.end - first_row),
                kv_head: 0,
                first_position: slice.first_position + first_row - slice.rows.start,
            })
        })
    };
    let cost = |place: &Place| place.n_rows * n_spans(place.first_position + place.n_rows);
    let total: usize = places().map(|place| cost(&place)).sum::<usize>() * n_kv_heads;
    let most = total / (PIECES * n_threads);
    let AttentionScratch { pieces, joins, missing, partials, .. } = scratch;
    pieces.clear();
    joins.clear();
    missing.clear();
    let mut used = 0;
    for place in places() {
        let n_spans = n_spans(place.first_position + place.n_rows);
        for kv_head in 0..n_kv_heads {
            let place = Place { kv_head, ..place };
            if n_threads == 1 || n_spans == 1 || cost(&place) <= most {
                pieces.push(Piece { place, spans: 0..n_spans, join: None });
                continue;
            }
            let n_pieces = n_spans.div_ceil((most / place.n_rows).max(1));
            for piece in 0..n_pieces {
                let spans = share(n_spans, n_pieces, piece);
                pieces.push(Piece { place, spans, join: Some(joins.len()) });
            }
            joins.push(Join { partials: used, n_spans });
            missing.push(AtomicUsize::new(n_pieces));
            used += n_spans * partial_len(place.n_rows);
        }
    }
    partials.resize(used, 0.0);
}

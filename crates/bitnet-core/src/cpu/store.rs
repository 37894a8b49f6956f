//! Rotates the queries and keys of a step and writes keys and values to the cache.
//!
//! Work is shared out by rows for the queries and by tiles for the cache, so that every tile has
//! one writer. Knows nothing of scores.

use crate::backend::SequenceSlice;
use crate::cpu::attend;
use crate::cpu::kv::{CpuKv, KvLayout, MAX_HEAD_DIM, Part, TILE_TOKENS};
use crate::cpu::math;
use crate::cpu::rope::{CpuRope, StepAngles, rotate};
use crate::error::{Error, Result};
use crate::threads::{Parts, ThreadPool, share};
use crate::weights::NormWeights;
use std::ops::Range;

/// Computes the angles of the step's rows unless `angles` has them.
pub(crate) fn prepare_angles(
    pool: &ThreadPool,
    sequences: &[SequenceSlice],
    rope: &CpuRope,
    angles: &mut StepAngles,
) {
    let n_rows = sequences.last().map_or(0, |slice| slice.rows.end);
    if !angles.needs(rope, n_rows) {
        return;
    }
    let dim = rope.head_dim();
    let parts = Parts::new(angles.values_mut());
    run(pool, n_rows, &|rows| {
        for slice in sequences {
            for row in rows.start.max(slice.rows.start)..rows.end.min(slice.rows.end) {
                // SAFETY: rows are shared out once each.
                let out = unsafe { parts.part(row * dim..(row + 1) * dim) };
                rope.angles(slice.first_position + row - slice.rows.start, out);
            }
        }
    });
}

/// See [`crate::backend::Backend::rotate_and_store`]. `q` is `(rows, q_width)`, `k` and `v` are
/// `(rows, n_kv_heads · head_dim)`; `angles` `(rows, head_dim)` belongs to the step.
pub(crate) fn rotate_and_store(
    pool: &ThreadPool,
    sequences: &[SequenceSlice],
    angles: &[f32],
    q: &mut [f32],
    q_width: usize,
    k: &[f32],
    v: &[f32],
    head_norms: Option<(&NormWeights, &NormWeights)>,
    kv: &mut CpuKv,
    layer: usize,
) -> Result<()> {
    let layout = kv.layout;
    let dim = layout.spec.head_dim;
    let n_rows = sequences.last().map_or(0, |slice| slice.rows.end);
    let width = layout.spec.n_kv_heads * dim;
    for (what, got, want) in
        [("angles", angles.len(), dim), ("keys", k.len(), width), ("values", v.len(), width)]
    {
        if got != n_rows * want {
            return Err(Error::shape(what, format!("{n_rows} rows of {want}"), got));
        }
    }
    if q_width == 0 || !q_width.is_multiple_of(dim) || q.len() != n_rows * q_width {
        let want = format!("{n_rows} rows of a multiple of {dim}");
        return Err(Error::shape("queries", want, q.len()));
    }
    if let Some((q_norm, k_norm)) = head_norms {
        for norm in [q_norm, k_norm] {
            if norm.weight.len() != dim {
                return Err(Error::shape("norm of a head", dim, norm.weight.len()));
            }
        }
    }
    kv.check_layer(layer)?;
    kv.start_write();
    for slice in sequences {
        let end = slice.first_position + slice.rows.len();
        kv.claim(&slice.blocks, slice.first_position, end)?;
    }
    let queries = Parts::new(q);
    let cache = Parts::new(&mut kv.memory);
    let n_tiles = sequences.iter().map(|slice| tiles(slice).len()).sum::<usize>();
    let heads = layout.spec.n_kv_heads;
    // One region for both: the first rows of the range are queries, the rest tiles.
    run(pool, n_rows + n_tiles * heads, &|range| {
        for row in range.start..range.end.min(n_rows) {
            // SAFETY: rows are shared out once each.
            let q = unsafe { queries.part(row * q_width..(row + 1) * q_width) };
            for head in q.chunks_exact_mut(dim) {
                turn(head, head_norms.map(|(q_norm, _)| q_norm), &angles[row * dim..][..dim]);
            }
        }
        let range = range.start.max(n_rows) - n_rows..range.end.max(n_rows) - n_rows;
        let mut before = 0;
        for slice in sequences {
            let tiles = tiles(slice);
            let n = tiles.len() * heads;
            let mine = range.start.clamp(before, before + n)..range.end.clamp(before, before + n);
            for i in mine {
                let (tile, head) = (tiles.start + (i - before) / heads, (i - before) % heads);
                for part in [Part::Keys, Part::Values] {
                    let start = layout.sequence_tile(&slice.blocks, layer, part, head, tile);
                    // SAFETY: tiles and heads are shared out once each; `claim` saw to it that the
                    // blocks behind the tiles are different ones, and offsets are inside.
                    let bytes = unsafe { cache.part(start..start + layout.tile_bytes) };
                    let norm = head_norms.map(|(_, k_norm)| k_norm);
                    let write = TileWrite { layout: &layout, slice, tile, head };
                    match part {
                        Part::Keys => write.keys(bytes, k, norm, angles),
                        Part::Values => write.values(bytes, v),
                    }
                }
            }
            before += n;
        }
    });
    Ok(())
}

/// Calls `job` with parts of `0..n`, in parallel if that is worth a region.
fn run(pool: &ThreadPool, n: usize, job: &(dyn Fn(Range<usize>) + Sync)) {
    /// Rows and tiles that one thread is done with before another has woken up.
    const FEW: usize = 16;
    match n <= FEW {
        true => job(0..n),
        false => pool.run(&|thread| job(share(n, pool.threads(), thread))),
    }
}

/// The tiles of a sequence that a slice writes to.
fn tiles(slice: &SequenceSlice) -> Range<usize> {
    let end = slice.first_position + slice.rows.len();
    slice.first_position / TILE_TOKENS..end.div_ceil(TILE_TOKENS)
}

/// Normalizes and rotates one head.
fn turn(head: &mut [f32], norm: Option<&NormWeights>, angles: &[f32]) {
    if let Some(norm) = norm {
        math::rms_norm_in_place(head, &norm.weight, norm.eps);
    }
    rotate(head, angles);
}

/// One tile of one head, and the rows that go there.
struct TileWrite<'a> {
    layout: &'a KvLayout,
    slice: &'a SequenceSlice,
    tile: usize,
    head: usize,
}

impl TileWrite<'_> {
    /// Calls `f(row, token of the tile, head)` for each row, the head padded to whole vectors.
    fn rows(&self, x: &[f32], mut f: impl FnMut(usize, usize, &mut [f32])) {
        let (head_dim, dim) = (self.layout.spec.head_dim, self.layout.dim);
        let width = self.layout.spec.n_kv_heads * head_dim;
        let first = self.slice.first_position;
        let last = first + self.slice.rows.len();
        let start = self.tile * TILE_TOKENS;
        let mut head = [0.0; MAX_HEAD_DIM];
        for position in start.max(first)..(start + TILE_TOKENS).min(last) {
            let row = self.slice.rows.start + position - first;
            head[..head_dim].copy_from_slice(&x[row * width + self.head * head_dim..][..head_dim]);
            f(row, position - start, &mut head[..dim]);
        }
    }

    fn keys(&self, tile: &mut [u8], k: &[f32], norm: Option<&NormWeights>, angles: &[f32]) {
        let head_dim = self.layout.spec.head_dim;
        self.rows(k, |row, token, head| {
            turn(&mut head[..head_dim], norm, &angles[row * head_dim..][..head_dim]);
            attend::store_key(self.layout.spec.dtype, tile, token, head);
        });
    }

    fn values(&self, tile: &mut [u8], v: &[f32]) {
        self.rows(v, |_, token, head| {
            attend::store_value(self.layout.spec.dtype, tile, token, head);
        });
    }
}

//! Rotation, cache and attention as dispatches.

use crate::backend::{MetalActivations, MetalBackend};
use crate::driver::Driver;
use crate::kernels::{Kernel, QUERIES, SPAN};
use crate::kv::MetalKv;
use crate::linear::MetalNorm;
use crate::params::{AttentionParams, RotateParams};
use bitnet_core::cpu::CpuRope;
use bitnet_core::{Error, Result};
use std::sync::Arc;

/// Memory for the results of spans, before they are joined; a step with more takes its rows in turns.
const MOST_PARTIAL_BYTES: usize = 16 << 20;

type Activations<D> = MetalActivations<<D as Driver>::Memory>;
type Norm<D> = MetalNorm<<D as Driver>::Memory>;
type Kv<D> = MetalKv<<D as Driver>::Memory>;

impl<D: Driver> MetalBackend<D> {
    pub(crate) fn rotate(
        &mut self,
        q: &mut Activations<D>,
        k: &mut Activations<D>,
        v: &Activations<D>,
        head_norms: Option<(&Norm<D>, &Norm<D>)>,
        rope: &Arc<CpuRope>,
        kv: &mut Kv<D>,
        layer: usize,
    ) -> Result<()> {
        let n = self.rows();
        let dim = kv.spec.head_dim;
        q.check("queries", n, q.width)?;
        k.check("keys", n, kv.kv_width())?;
        v.check("values", n, kv.kv_width())?;
        if !q.width.is_multiple_of(dim) {
            return Err(Error::shape("queries", format!("a multiple of {dim}"), q.width));
        }
        if rope.head_dim() != dim {
            return Err(Error::shape("rotated features of a head", dim, rope.head_dim()));
        }
        if let Some((q_norm, k_norm)) = head_norms {
            for norm in [q_norm, k_norm] {
                if norm.width != dim {
                    return Err(Error::shape("norm of a head", dim, norm.width));
                }
            }
        }
        kv.check(layer, &self.step.sequences, self.step.largest_block)?;
        self.step.prepare_angles(&self.pool, rope)?;
        let params = RotateParams {
            cache: kv.params(layer),
            n_heads: (q.width / dim) as u32,
            q_stride: q.stride as u32,
            k_stride: k.stride as u32,
            v_stride: v.stride as u32,
            has_norms: u32::from(head_norms.is_some()),
            q_eps: head_norms.map_or(0.0, |(norm, _)| norm.eps),
            k_eps: head_norms.map_or(0.0, |(_, norm)| norm.eps),
        };
        let groups = [params.n_heads + kv.spec.n_kv_heads as u32, n as u32, 1];
        // A head, and its codes where the cache has bytes.
        let shared = 2 * dim.next_multiple_of(4) as u32 * 4;
        let (mut recorder, _, step, _) = self.split();
        let nothing = recorder.nothing;
        let buffers = [
            &q.memory,
            &k.memory,
            &v.memory,
            head_norms.map_or(nothing, |(norm, _)| &norm.weight),
            head_norms.map_or(nothing, |(_, norm)| &norm.weight),
            step.angles.get()?,
            step.places.get()?,
            step.blocks.get()?,
            &kv.memory,
        ];
        recorder.run(Kernel::RotateAndStore, &buffers, &params, groups, shared)
    }

    pub(crate) fn attend(
        &mut self,
        q: &Activations<D>,
        kv: &Kv<D>,
        layer: usize,
        out: &mut Activations<D>,
    ) -> Result<()> {
        let n = self.rows();
        let (dim, kv_width) = (kv.spec.head_dim, kv.kv_width());
        q.check("queries", n, q.width)?;
        out.check("output of attention", n, q.width)?;
        if !q.width.is_multiple_of(kv_width) {
            let want = format!("a multiple of {kv_width} features");
            return Err(Error::shape("queries", want, q.width));
        }
        kv.check(layer, &self.step.sequences, self.step.largest_block)?;
        let group = (q.width / kv_width) as u32;
        let batches = kv.spec.n_kv_heads as u32 * group.div_ceil(QUERIES);
        let heads = q.width / dim;
        let spans = self.step.most_seen.div_ceil(SPAN);
        // Queries, scores, and the few numbers of each query: see the kernel.
        let padded = dim.next_multiple_of(4) as u32;
        let shared = QUERIES * (padded + SPAN as u32 + 4 + 1) * 4;
        let (mut recorder, pool, step, scratch) = self.split();
        let row_bytes = heads * spans * (dim + 2) * 4;
        let (rows, partial_bytes) = match spans {
            1 => (n, 0),
            _ => {
                let rows = (MOST_PARTIAL_BYTES / row_bytes).clamp(1, n);
                (rows, rows * row_bytes)
            }
        };
        let partials = scratch.partials.with_room(pool, partial_bytes)?;
        let (places, blocks) = (step.places.get()?, step.blocks.get()?);
        for first_row in (0..n).step_by(rows) {
            let params = AttentionParams {
                cache: kv.params(layer),
                group,
                q_stride: q.stride as u32,
                out_stride: out.stride as u32,
                first_row: first_row as u32,
                n_spans: spans as u32,
                query_scale: 1.0 / (dim as f32).sqrt(),
            };
            let rows = rows.min(n - first_row) as u32;
            let buffers = [&q.memory, &kv.memory, places, blocks, &out.memory, partials];
            let groups = [batches, rows, spans as u32];
            recorder.run(Kernel::PagedAttention, &buffers, &params, groups, shared)?;
            if spans > 1 {
                let buffers = [partials, places, &out.memory];
                let groups = [heads as u32, rows, 1];
                recorder.run(Kernel::JoinAttention, &buffers, &params, groups, 0)?;
            }
        }
        Ok(())
    }
}

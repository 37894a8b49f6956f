//! Gradients of causal attention, heads sharing keys and values in groups.
//!
//! Probabilities are computed again from queries and keys instead of being kept: blocks of queries
//! against the keys they see. Queries and keys are rotated ones, and so are the gradients here.

use crate::matmul::{View, matmul};
use crate::vector::{softmax, softmax_backward, vectorized};

/// Queries of a block.
const BLOCK: usize = 64;

/// Shape of attention over equal windows.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Shape {
    pub(crate) rows: usize,
    pub(crate) len: usize,
    pub(crate) n_heads: usize,
    pub(crate) n_kv_heads: usize,
    pub(crate) head_dim: usize,
}

/// Buffers of [`backward`].
#[derive(Debug, Default)]
pub(crate) struct Scratch {
    /// Probabilities, `(BLOCK, len)`.
    p: Vec<f32>,
    /// Gradients of probabilities, then of scores.
    ds: Vec<f32>,
}

/// Adds the gradients of queries, keys and values to the rows of `d_qkv`
/// `(rows · len, q + 2 · kv width)`, for `d_out`, the gradient of attention's result. `q` and
/// `d_out` are `(rows · len, q width)`, `k` and `v` `(rows · len, kv width)`.
pub(crate) fn backward(
    shape: Shape,
    q: &[f32],
    k: &[f32],
    v: &[f32],
    d_out: &[f32],
    d_qkv: &mut [f32],
    scratch: &mut Scratch,
) {
    let Shape { rows, len, n_heads, n_kv_heads, head_dim } = shape;
    let (q_width, kv_width) = (n_heads * head_dim, n_kv_heads * head_dim);
    let width = q_width + 2 * kv_width;
    let factor = 1.0 / (head_dim as f32).sqrt();
    scratch.p.resize(BLOCK * len, 0.0);
    scratch.ds.resize(BLOCK * len, 0.0);
    let Scratch { p, ds } = scratch;
    for row in 0..rows {
        for head in 0..n_heads {
            let kv_head = head * n_kv_heads / n_heads;
            let keys = View::rows(row * len * kv_width + kv_head * head_dim, kv_width);
            let d_keys = row * len * width + q_width + kv_head * head_dim;
            for first in (0..len).step_by(BLOCK) {
                let n = BLOCK.min(len - first);
                let seen = first + n;
                let at = row * len + first;
                let queries = View::rows(at * q_width + head * head_dim, q_width);
                let scores = View::rows(0, seen);
                matmul(
                    [n, seen, head_dim],
                    (p, scores),
                    false,
                    factor,
                    (q, queries),
                    (k, keys.t()),
                );
                matmul(
                    [n, seen, head_dim],
                    (ds, scores),
                    false,
                    1.0,
                    (d_out, queries),
                    (v, keys.t()),
                );
                vectorized(|| {
                    let block = p.chunks_exact_mut(seen).zip(ds.chunks_exact_mut(seen)).take(n);
                    for (i, (p, ds)) in block.enumerate() {
                        let (p, hidden) = p.split_at_mut(first + i + 1);
                        let (ds, hidden_ds) = ds.split_at_mut(first + i + 1);
                        hidden.fill(0.0);
                        hidden_ds.fill(0.0);
                        softmax(p);
                        softmax_backward(p, ds, factor);
                    }
                });
                let d_queries = View::rows(at * width + head * head_dim, width);
                let d_k = View::rows(d_keys, width);
                let d_v = View::rows(d_keys + kv_width, width);
                matmul([n, head_dim, seen], (d_qkv, d_queries), true, 1.0, (ds, scores), (k, keys));
                matmul(
                    [seen, head_dim, n],
                    (d_qkv, d_k),
                    true,
                    1.0,
                    (ds, scores.t()),
                    (q, queries),
                );
                matmul(
                    [seen, head_dim, n],
                    (d_qkv, d_v),
                    true,
                    1.0,
                    (p, scores.t()),
                    (d_out, queries),
                );
            }
        }
    }
}

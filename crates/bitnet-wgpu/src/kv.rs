//! The paged KV cache on the device: for each layer keys and values, in parts that fit a binding.

use bitnet_core::backend::{KvSpec, KvType};
use bitnet_core::memory::{AccessPattern, DeviceMemory};
use bitnet_core::{Error, Result};

use crate::memory::{Pool, Region};

/// Features of a head, at most: what a workgroup has room for.
const MAX_HEAD_DIM: usize = 512;

/// Some heads of a layer: `(blocks, heads, block_tokens, head_words)`.
pub(crate) struct Heads {
    pub(crate) first: usize,
    pub(crate) n: usize,
    pub(crate) keys: Region,
    pub(crate) values: Region,
}

/// A KV cache.
pub struct WgpuKv {
    pub(crate) spec: KvSpec,
    /// Words of a token's head.
    pub(crate) head_words: usize,
    /// Parts of each layer.
    pub(crate) layers: Vec<Vec<Heads>>,
}

impl WgpuKv {
    pub(crate) fn new(pool: &Pool, spec: KvSpec) -> Result<Self> {
        let KvSpec { n_layers, n_kv_heads, head_dim, block_tokens, n_blocks, dtype } = spec;
        let invalid = |what: &str, got: usize, want: &str| {
            Error::invalid(format!("KV cache: {what}"), format!("{got} is not {want}"))
        };
        if head_dim == 0 || head_dim > MAX_HEAD_DIM || !head_dim.is_multiple_of(2) {
            let want = format!("even and between 2 and {MAX_HEAD_DIM}");
            return Err(invalid("head_dim", head_dim, &want));
        }
        for (what, got) in [
            ("n_layers", n_layers),
            ("n_kv_heads", n_kv_heads),
            ("n_blocks", n_blocks),
            ("block_tokens", block_tokens),
        ] {
            if got == 0 {
                return Err(invalid(what, got, "positive"));
            }
        }
        let head_words = match dtype {
            KvType::F32 => head_dim,
            KvType::F16 => head_dim.div_ceil(2),
            KvType::Q8 => 1 + head_dim.div_ceil(4),
        };
        let head_bytes = [n_blocks, block_tokens, head_words]
            .iter()
            .fold(4u64, |bytes, &n| bytes.saturating_mul(n as u64));
        let total =
            head_bytes.saturating_mul(2 * (n_layers as u64).saturating_mul(n_kv_heads as u64));
        let full = || Error::OutOfMemory { what: "KV cache on the device".into(), bytes: total };
        let max_bytes = pool.memory().properties().max_buffer_bytes;
        // Kernels count words in 32 bits, of one part.
        let heads_each = (max_bytes / head_bytes).min(n_kv_heads as u64) as usize;
        if heads_each == 0 {
            return Err(full());
        }
        let mut layers = Vec::with_capacity(n_layers);
        for _ in 0..n_layers {
            let mut parts = Vec::new();
            for first in (0..n_kv_heads).step_by(heads_each) {
                let n = heads_each.min(n_kv_heads - first);
                let region = || {
                    pool.take(head_bytes * n as u64, AccessPattern::KvCache).map_err(|e| match e {
                        Error::OutOfMemory { .. } => full(),
                        other => other,
                    })
                };
                parts.push(Heads { first, n, keys: region()?, values: region()? });
            }
            layers.push(parts);
        }
        Ok(Self { spec, head_words, layers })
    }

    /// The parts of a layer.
    pub(crate) fn layer(&self, layer: usize) -> Result<&[Heads]> {
        self.layers.get(layer).map(|parts| &**parts).ok_or_else(|| {
            let expected = format!("below {}", self.layers.len());
            Error::shape("layer of the KV cache", expected, layer)
        })
    }
}

//! The paged KV cache on the device. `kernels/attention.metal` has the picture of a block.

use crate::buffer::{MetalBuffer, MetalBufferPool};
use crate::params::CacheParams;
use bitnet_core::backend::{KvSpec, KvType, SequenceSlice};
use bitnet_core::cpu::MAX_HEAD_DIM;
use bitnet_core::memory::{AccessPattern, DeviceMemory};
use bitnet_core::{Error, Result};

/// The paged KV cache of one model.
pub struct MetalKv<M: DeviceMemory> {
    pub(crate) spec: KvSpec,
    /// Bytes of the keys or the values of a head in a block.
    part_bytes: usize,
    pub(crate) memory: MetalBuffer<M>,
}

impl<M: DeviceMemory> MetalKv<M> {
    /// An empty cache.
    pub(crate) fn new(pool: &MetalBufferPool<M>, spec: KvSpec) -> Result<Self> {
        let invalid = |what: &str, got: usize, want: &str| {
            Error::invalid(format!("KV cache: {what}"), format!("{got} is not {want}"))
        };
        if spec.head_dim == 0 || spec.head_dim > MAX_HEAD_DIM {
            let want = format!("between 1 and {MAX_HEAD_DIM}");
            return Err(invalid("head_dim", spec.head_dim, &want));
        }
        if spec.block_tokens == 0 || !spec.block_tokens.is_multiple_of(16) {
            return Err(invalid("block_tokens", spec.block_tokens, "a positive multiple of 16"));
        }
        for (what, got) in [
            ("n_layers", spec.n_layers),
            ("n_kv_heads", spec.n_kv_heads),
            ("n_blocks", spec.n_blocks),
        ] {
            if got == 0 {
                return Err(invalid(what, got, "positive"));
            }
        }
        let token_bytes = match spec.dtype {
            KvType::F32 => 4 * spec.head_dim,
            KvType::F16 => 2 * spec.head_dim,
            // Bytes in whole words, and a scale.
            KvType::Q8 => spec.head_dim.next_multiple_of(4) + 4,
        };
        let sizes = [spec.block_tokens, spec.n_kv_heads, 2, spec.n_layers, spec.n_blocks];
        let bytes = sizes.iter().try_fold(token_bytes, |bytes, &n| bytes.checked_mul(n));
        // Kernels count tokens and parts in 32 bits.
        let fits = u32::try_from(spec.n_blocks).is_ok()
            && spec.block_tokens.checked_mul(token_bytes).is_some_and(|n| n < 1 << 31);
        let Some(bytes) = bytes.filter(|_| fits) else {
            return Err(Error::OutOfMemory { what: "KV cache".into(), bytes: u64::MAX });
        };
        let memory = MetalBuffer::with_old_contents(pool, bytes, AccessPattern::KvCache)?;
        Ok(Self { spec, part_bytes: spec.block_tokens * token_bytes, memory })
    }

    /// What the kernels are told of it.
    pub(crate) fn params(&self, layer: usize) -> CacheParams {
        CacheParams {
            n_layers: self.spec.n_layers as u32,
            n_kv_heads: self.spec.n_kv_heads as u32,
            head_dim: self.spec.head_dim as u32,
            block_tokens: self.spec.block_tokens as u32,
            format: match self.spec.dtype {
                KvType::F32 => 0,
                KvType::F16 => 1,
                KvType::Q8 => 3,
            },
            layer: layer as u32,
            part_bytes: self.part_bytes as u32,
        }
    }

    /// Checks that the layer and all blocks of a step exist, for kernels do not.
    pub(crate) fn check(
        &self,
        layer: usize,
        sequences: &[SequenceSlice],
        largest_block: u32,
    ) -> Result<()> {
        let KvSpec { n_layers, n_blocks, block_tokens, .. } = self.spec;
        if layer >= n_layers {
            return Err(Error::invalid("layer", format!("{layer} of a cache of {n_layers}")));
        }
        for slice in sequences {
            let needed = (slice.first_position + slice.rows.len()).div_ceil(block_tokens);
            if slice.blocks.len() < needed {
                let want = format!("{needed} blocks");
                return Err(Error::shape("block table", want, slice.blocks.len()));
            }
        }
        match (largest_block as usize) < n_blocks {
            true => Ok(()),
            false => {
                let reason = format!("block {largest_block} of a cache of {n_blocks}");
                Err(Error::invalid("block table", reason))
            }
        }
    }

    /// Features of queries, keys and values that must fit it.
    pub(crate) fn kv_width(&self) -> usize {
        self.spec.n_kv_heads * self.spec.head_dim
    }
}

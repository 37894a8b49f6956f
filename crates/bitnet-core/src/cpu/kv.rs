//! The paged KV cache: where the keys and values of a position lie, and the memory behind them.
//!
//! ```text
//! cache = [block][layer][keys, values][kv head][tile of 16 tokens]
//! ```
//!
//! Attention reads tiles: 16 keys or 16 values of one head, arranged so that 16 lanes of a vector
//! are 16 tokens for keys, 16 features for values (`attend` has the pictures). A block's bytes over
//! all layers are neighbours, so the memory in use grows with the blocks in use; untouched blocks
//! take none. Knows places, not number formats or what attention computes.

use crate::backend::{KvSpec, KvType};
use crate::cpu::attend;
use crate::error::{Error, Result};
use crate::memory::{AccessPattern, EnhancedMemoryPool, HostMemory, HostRegion};

/// Tokens in a tile; a block holds a whole number of tiles.
pub const TILE_TOKENS: usize = 16;
/// Largest head: the integer scores of 8-bit keys must fit 32 bits.
pub const MAX_HEAD_DIM: usize = 512;

/// Keys or values.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Part {
    Keys,
    Values,
}

/// The geometry of a cache, checked: every offset it computes is inside the cache.
#[derive(Debug, Clone, Copy)]
pub(crate) struct KvLayout {
    pub(crate) spec: KvSpec,
    /// `head_dim` rounded up to whole vectors.
    pub(crate) dim: usize,
    pub(crate) tiles_per_block: usize,
    pub(crate) tile_bytes: usize,
}

impl KvLayout {
    /// Checks the shape; no size it implies overflows.
    pub(crate) fn new(spec: KvSpec) -> Result<Self> {
        let invalid = |what: &str, got: usize, want: &str| {
            Error::invalid(format!("KV cache: {what}"), format!("{got} is not {want}"))
        };
        if spec.head_dim == 0 || spec.head_dim > MAX_HEAD_DIM {
            let want = format!("between 1 and {MAX_HEAD_DIM}");
            return Err(invalid("head_dim", spec.head_dim, &want));
        }
        if spec.block_tokens == 0 || !spec.block_tokens.is_multiple_of(TILE_TOKENS) {
            let want = format!("a positive multiple of {TILE_TOKENS}");
            return Err(invalid("block_tokens", spec.block_tokens, &want));
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
        let dim = spec.head_dim.next_multiple_of(TILE_TOKENS);
        let tile_bytes = attend::tile_bytes(spec.dtype, dim);
        let layout =
            Self { spec, dim, tiles_per_block: spec.block_tokens / TILE_TOKENS, tile_bytes };
        let sizes = [spec.n_blocks, spec.n_layers, 2, spec.n_kv_heads, layout.tiles_per_block];
        sizes.iter().try_fold(tile_bytes, |bytes, &n| bytes.checked_mul(n)).ok_or_else(|| {
            let bytes = sizes.iter().fold(tile_bytes as u64, |b, &n| b.saturating_mul(n as u64));
            Error::OutOfMemory { what: "KV cache".into(), bytes }
        })?;
        Ok(layout)
    }

    /// Bytes of the whole cache.
    pub(crate) fn bytes(&self) -> usize {
        let KvSpec { n_blocks, n_layers, n_kv_heads, .. } = self.spec;
        n_blocks * n_layers * 2 * n_kv_heads * self.tiles_per_block * self.tile_bytes
    }

    /// Where tile `tile` of a block starts, for one layer and head.
    pub(crate) fn tile(
        &self,
        block: u32,
        layer: usize,
        part: Part,
        head: usize,
        tile: usize,
    ) -> usize {
        let parts = (block as usize * self.spec.n_layers + layer) * 2 + part as usize;
        ((parts * self.spec.n_kv_heads + head) * self.tiles_per_block + tile) * self.tile_bytes
    }

    /// As [`KvLayout::tile`], for the tile that holds positions `16 · tile..` of a sequence.
    pub(crate) fn sequence_tile(
        &self,
        blocks: &[u32],
        layer: usize,
        part: Part,
        head: usize,
        tile: usize,
    ) -> usize {
        let block = blocks[tile / self.tiles_per_block];
        self.tile(block, layer, part, head, tile % self.tiles_per_block)
    }
}

/// The paged KV cache of one model.
pub struct CpuKv {
    pub(crate) layout: KvLayout,
    pub(crate) memory: HostRegion,
    /// For each block the last write that touched it: two sequences of one step must not write
    /// the same block.
    stamps: Vec<u64>,
    stamp: u64,
}

impl CpuKv {
    /// An empty cache. Its memory is taken from the system when it is first written.
    ///
    /// # Errors
    /// [`Error::Invalid`] if a size is 0, `head_dim` above [`MAX_HEAD_DIM`] or `block_tokens` no
    /// multiple of [`TILE_TOKENS`]; [`Error::OutOfMemory`] if there is no address space for it.
    pub fn new(spec: KvSpec, pool: &EnhancedMemoryPool<HostMemory>) -> Result<Self> {
        let layout = KvLayout::new(spec)?;
        let out_of_memory =
            || Error::OutOfMemory { what: "KV cache".into(), bytes: layout.bytes() as u64 };
        let memory = HostRegion::take_zeroed(pool, layout.bytes(), AccessPattern::KvCache)
            .map_err(|_| out_of_memory())?;
        if u32::try_from(spec.n_blocks).is_err() {
            return Err(out_of_memory());
        }
        Ok(Self { layout, memory, stamps: vec![0; spec.n_blocks], stamp: 0 })
    }

    /// Bytes of address space; what was never written takes no memory.
    pub fn capacity_bytes(&self) -> u64 {
        self.layout.bytes() as u64
    }

    /// Starts a write of one layer, by a step whose sequences are then passed to
    /// [`CpuKv::claim`].
    pub(crate) fn start_write(&mut self) {
        self.stamp += 1;
    }

    /// Checks that positions `first..end` of a sequence have blocks, that these exist, and that no
    /// other sequence claimed one of them since [`CpuKv::start_write`].
    pub(crate) fn claim(&mut self, blocks: &[u32], first: usize, end: usize) -> Result<()> {
        self.check_blocks(blocks, end)?;
        let block_tokens = self.layout.spec.block_tokens;
        for &block in &blocks[first / block_tokens..end.div_ceil(block_tokens)] {
            let stamp = &mut self.stamps[block as usize];
            if *stamp == self.stamp {
                let reason = format!("block {block} is written by two sequences in one step");
                return Err(Error::invalid("block table", reason));
            }
            *stamp = self.stamp;
        }
        Ok(())
    }

    /// Checks that positions `..end` of a sequence have blocks and that these exist.
    pub(crate) fn check_blocks(&self, blocks: &[u32], end: usize) -> Result<()> {
        let KvSpec { block_tokens, n_blocks, .. } = self.layout.spec;
        let needed = end.div_ceil(block_tokens);
        if blocks.len() < needed {
            return Err(Error::shape("block table", format!("{needed} blocks"), blocks.len()));
        }
        match blocks[..needed].iter().find(|&&block| block as usize >= n_blocks) {
            Some(block) => {
                let reason = format!("block {block} of a cache of {n_blocks}");
                Err(Error::invalid("block table", reason))
            }
            None => Ok(()),
        }
    }

    /// Checks that `layer` exists and that `dtype`-independent sizes fit `n_kv_heads · head_dim`.
    pub(crate) fn check_layer(&self, layer: usize) -> Result<()> {
        let n_layers = self.layout.spec.n_layers;
        match layer < n_layers {
            true => Ok(()),
            false => Err(Error::invalid("layer", format!("{layer} of a cache of {n_layers}"))),
        }
    }

    /// The number format.
    pub fn dtype(&self) -> KvType {
        self.layout.spec.dtype
    }
}

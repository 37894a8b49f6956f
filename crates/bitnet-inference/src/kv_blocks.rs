//! Who owns which block of the paged KV cache, and which blocks can be shared.
//!
//! A block holds the keys and values of `block_tokens` consecutive tokens. Full blocks are
//! published under what they hold (their tokens, everything before them, and the tenant's salt), so
//! a later sequence that starts the same way takes them over instead of computing them. Keys are
//! compared in full: no hash collision can hand one request another's context.
//! Knows token ids and counts, no tensors.

use std::collections::{BTreeMap, HashMap};
use std::sync::Arc;

/// Index of a block in the cache.
pub(crate) type BlockId = u32;

/// What stands before a block: nothing (with the tenant's salt), or one published block.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub(crate) enum Prefix {
    /// The block starts a sequence.
    Start(Option<Arc<str>>),
    /// The block follows the one published with this number. Numbers are never used again.
    After(u64),
}

#[derive(Debug, Clone, PartialEq, Eq, Hash)]
struct ContentKey {
    prefix: Prefix,
    tokens: Box<[u32]>, // block_tokens
}

#[derive(Debug, Default)]
struct Block {
    references: u32,
    /// Set while the block is published: its number, and the key it is found under.
    published: Option<(u64, ContentKey)>,
    /// Set while the block is published but unused: its place in the eviction order.
    released_at: Option<u64>,
}

/// All blocks of one model's KV cache.
#[derive(Debug)]
pub(crate) struct BlockPool {
    block_tokens: usize,
    blocks: Vec<Block>,
    /// Blocks that hold nothing worth keeping.
    empty: Vec<BlockId>,
    /// Published blocks nobody uses, oldest release first.
    evictable: BTreeMap<u64, BlockId>,
    by_content: HashMap<ContentKey, BlockId>,
    clock: u64,
}

impl BlockPool {
    pub(crate) fn new(n_blocks: usize, block_tokens: usize) -> Self {
        Self {
            block_tokens,
            blocks: (0..n_blocks).map(|_| Block::default()).collect(),
            empty: (0..n_blocks as BlockId).rev().collect(),
            evictable: BTreeMap::new(),
            by_content: HashMap::new(),
            clock: 0,
        }
    }

    pub(crate) fn block_tokens(&self) -> usize {
        self.block_tokens
    }

    pub(crate) fn n_blocks(&self) -> usize {
        self.blocks.len()
    }

    /// Blocks that can be had without taking any from a running sequence.
    pub(crate) fn n_available(&self) -> usize {
        self.empty.len() + self.evictable.len()
    }

    /// Takes a block for one sequence; the least recently used published one goes if need be.
    pub(crate) fn allocate(&mut self) -> Option<BlockId> {
        let id = match self.empty.pop() {
            Some(id) => id,
            None => {
                let (_, id) = self.evictable.pop_first()?;
                self.unpublish(id);
                id
            }
        };
        let block = &mut self.blocks[id as usize];
        debug_assert_eq!(block.references, 0);
        block.references = 1;
        block.released_at = None;
        Some(id)
    }

    /// Gives one reference to each block back.
    pub(crate) fn release(&mut self, ids: impl IntoIterator<Item = BlockId>) {
        for id in ids {
            let block = &mut self.blocks[id as usize];
            debug_assert!(block.references > 0, "block {id} released twice");
            block.references -= 1;
            if block.references > 0 {
                continue;
            }
            if block.published.is_some() {
                self.clock += 1;
                block.released_at = Some(self.clock);
                self.evictable.insert(self.clock, id);
            } else {
                self.empty.push(id);
            }
        }
    }

    /// Finds the published blocks `tokens` starts with and takes a reference to each. Returns them
    /// and what the next block follows. Never all of `tokens`: the last one is always computed,
    /// because its logits are wanted.
    pub(crate) fn reuse_prefix(
        &mut self,
        tokens: &[u32],
        salt: Option<Arc<str>>,
    ) -> (Vec<BlockId>, Prefix) {
        let mut prefix = Prefix::Start(salt);
        let mut found = Vec::new();
        let reusable = tokens.len().saturating_sub(1) / self.block_tokens * self.block_tokens;
        for chunk in tokens[..reusable].chunks_exact(self.block_tokens) {
            let key = ContentKey { prefix: prefix.clone(), tokens: chunk.into() };
            let Some(&id) = self.by_content.get(&key) else { break };
            let block = &mut self.blocks[id as usize];
            if let Some(released_at) = block.released_at.take() {
                self.evictable.remove(&released_at);
            }
            block.references += 1;
            prefix = Prefix::After(block.published.as_ref().expect("found by content").0);
            found.push(id);
        }
        (found, prefix)
    }

    /// Makes a full block findable. Returns what the next block of the sequence follows.
    pub(crate) fn publish(&mut self, id: BlockId, prefix: Prefix, tokens: &[u32]) -> Prefix {
        debug_assert_eq!(tokens.len(), self.block_tokens);
        let key = ContentKey { prefix, tokens: tokens.into() };
        if let Some(&twin) = self.by_content.get(&key) {
            // Another sequence computed the same at the same time; ours stays private.
            return Prefix::After(
                self.blocks[twin as usize].published.as_ref().expect("indexed").0,
            );
        }
        self.clock += 1;
        let number = self.clock;
        self.by_content.insert(key.clone(), id);
        self.blocks[id as usize].published = Some((number, key));
        Prefix::After(number)
    }

    /// Forgets what the blocks hold; nobody may be using one.
    pub(crate) fn forget(&mut self) {
        while let Some((_, id)) = self.evictable.pop_first() {
            self.unpublish(id);
            self.blocks[id as usize].released_at = None;
            self.empty.push(id);
        }
        debug_assert_eq!(self.empty.len(), self.blocks.len());
    }

    fn unpublish(&mut self, id: BlockId) {
        if let Some((_, key)) = self.blocks[id as usize].published.take() {
            self.by_content.remove(&key);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn publish_all(pool: &mut BlockPool, tokens: &[u32], salt: Option<&str>) -> Vec<BlockId> {
        let (mut ids, mut prefix) = pool.reuse_prefix(tokens, salt.map(Arc::from));
        for chunk in tokens.chunks_exact(pool.block_tokens()).skip(ids.len()) {
            let id = pool.allocate().unwrap();
            prefix = pool.publish(id, prefix, chunk);
            ids.push(id);
        }
        ids
    }

    #[test]
    fn a_shared_prefix_is_found_and_the_last_token_is_left_to_compute() {
        let mut pool = BlockPool::new(8, 2);
        let first = publish_all(&mut pool, &[1, 2, 3, 4, 5, 6], None);
        let (found, _) = pool.reuse_prefix(&[1, 2, 3, 4, 9, 9], None);
        assert_eq!(found, first[..2]);
        let (found, _) = pool.reuse_prefix(&[1, 2, 3, 4], None);
        assert_eq!(found, first[..1], "the block of the last token must not be reused");
    }

    #[test]
    fn another_tenant_or_another_past_finds_nothing() {
        let mut pool = BlockPool::new(8, 2);
        publish_all(&mut pool, &[1, 2, 3, 4, 5], Some("a"));
        assert!(pool.reuse_prefix(&[1, 2, 3], Some("b".into())).0.is_empty());
        assert!(pool.reuse_prefix(&[1, 2, 3], None).0.is_empty());
        // The same tokens after another beginning are another block.
        assert!(pool.reuse_prefix(&[3, 4, 5], Some("a".into())).0.is_empty());
        assert_eq!(pool.reuse_prefix(&[1, 2, 3], Some("a".into())).0.len(), 1);
    }

    #[test]
    fn the_least_recently_released_block_goes_first() {
        let mut pool = BlockPool::new(2, 1);
        let a = publish_all(&mut pool, &[1], None);
        let b = publish_all(&mut pool, &[2], None);
        pool.release(a.clone());
        pool.release(b);
        assert_eq!(pool.allocate(), Some(a[0]));
        assert!(pool.reuse_prefix(&[1, 0], None).0.is_empty());
        assert_eq!(pool.reuse_prefix(&[2, 0], None).0.len(), 1);
        assert_eq!(pool.allocate(), None);
    }

    #[test]
    fn what_is_forgotten_is_not_found_and_all_blocks_are_free() {
        let mut pool = BlockPool::new(4, 2);
        let held = publish_all(&mut pool, &[1, 2, 3, 4, 5, 6], None);
        pool.release(held);
        pool.forget();
        assert!(pool.reuse_prefix(&[1, 2, 3, 4, 5], None).0.is_empty());
        assert_eq!((0..4).filter_map(|_| pool.allocate()).count(), 4);
        assert_eq!(pool.allocate(), None);
    }

    proptest! {
        /// Whatever sequences come and go: no block is lost, none is shared without a count.
        #[test]
        fn blocks_are_conserved(operations in prop::collection::vec((0u32..3, 1usize..9, any::<bool>()), 1..60)) {
            let mut pool = BlockPool::new(12, 2);
            let mut held: Vec<Vec<BlockId>> = Vec::new();
            for (seed, length, drop_one) in operations {
                if drop_one && !held.is_empty() {
                    let ids = held.swap_remove(length % held.len());
                    pool.release(ids);
                } else {
                    let tokens: Vec<u32> = (0..length as u32).map(|i| i * seed).collect();
                    let (mut ids, mut prefix) = pool.reuse_prefix(&tokens, None);
                    let start = ids.len() * 2;
                    let mut complete = true;
                    for chunk in tokens[start..].chunks(2) {
                        let Some(id) = pool.allocate() else { complete = false; break };
                        ids.push(id);
                        if chunk.len() == 2 { prefix = pool.publish(id, prefix, chunk); }
                    }
                    if complete { held.push(ids) } else { pool.release(ids) }
                }
                let mut counts = vec![0u32; pool.n_blocks()];
                for id in held.iter().flatten() { counts[*id as usize] += 1; }
                let in_use = counts.iter().filter(|&&n| n > 0).count();
                for (block, count) in pool.blocks.iter().zip(&counts) { prop_assert_eq!(block.references, *count); }
                prop_assert_eq!(in_use + pool.n_available(), pool.n_blocks());
            }
        }
    }
}

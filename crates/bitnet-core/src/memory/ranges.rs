//! Which bytes of which buffers are free, in the order of their sizes.
//!
//! Bookkeeping alone: no buffer, no lock, no device. A free range is found by its size (the smallest
//! that fits), and freed ranges grow together with free neighbours.

use super::strategy::{Plan, Shelf};
use std::collections::{BTreeMap, BTreeSet};

/// Bytes of a buffer that belong to one region.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Range {
    /// Number of the buffer.
    pub(super) buffer: usize,
    pub(super) offset: u64,
    pub(super) bytes: u64,
}

/// A free range; the order of the fields is the order they are searched in.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
struct Free {
    shelf: Shelf,
    bytes: u64,
    buffer: usize,
    offset: u64,
}

/// A buffer the device gave.
#[derive(Debug)]
struct Buffer {
    shelf: Shelf,
    bytes: u64,
    /// Offset and length of each free range; never two that touch.
    free: BTreeMap<u64, u64>,
    in_use: u64,
    /// When its last region went, in releases.
    idle_since: u64,
    /// Whether it stays when its last region goes.
    keep: bool,
}

/// All buffers of a pool.
#[derive(Debug, Default)]
pub(super) struct Ranges {
    buffers: Vec<Option<Buffer>>,
    vacant: Vec<usize>,
    free: BTreeSet<Free>,
    /// Bytes of all buffers.
    held: u64,
    /// Bytes of the buffers that have a region.
    busy: u64,
    releases: u64,
}

impl Ranges {
    pub(super) fn held(&self) -> u64 {
        self.held
    }

    pub(super) fn busy(&self) -> u64 {
        self.busy
    }

    /// Takes the smallest free range that fits, if one does.
    pub(super) fn take(&mut self, plan: &Plan) -> Option<Range> {
        let from = Free { shelf: plan.shelf, bytes: plan.bytes, buffer: 0, offset: 0 };
        let found = *self.free.range(from..).next()?;
        let fits = found.shelf == plan.shelf && found.bytes <= plan.at_most;
        fits.then(|| self.cut(found, plan))
    }

    /// Adds a buffer and takes its first bytes.
    pub(super) fn add(&mut self, plan: &Plan) -> Range {
        let buffer = Buffer {
            shelf: plan.shelf,
            bytes: plan.buffer_bytes,
            free: BTreeMap::from([(0, plan.buffer_bytes)]),
            in_use: 0,
            idle_since: self.releases,
            keep: plan.keep,
        };
        let index = self.vacant.pop().unwrap_or(self.buffers.len());
        if index == self.buffers.len() {
            self.buffers.push(None);
        }
        self.buffers[index] = Some(buffer);
        self.held += plan.buffer_bytes;
        let whole = Free { shelf: plan.shelf, bytes: plan.buffer_bytes, buffer: index, offset: 0 };
        self.free.insert(whole);
        self.cut(whole, plan)
    }

    fn cut(&mut self, found: Free, plan: &Plan) -> Range {
        self.free.remove(&found);
        let bytes = if plan.shelf.shared { plan.bytes } else { found.bytes };
        let buffer = self.buffers[found.buffer].as_mut().expect("free ranges are in buffers");
        buffer.free.remove(&found.offset);
        if buffer.in_use == 0 {
            self.busy += buffer.bytes;
        }
        buffer.in_use += bytes;
        if bytes < found.bytes {
            let offset = found.offset + bytes;
            buffer.free.insert(offset, found.bytes - bytes);
            self.free.insert(Free { bytes: found.bytes - bytes, offset, ..found });
        }
        Range { buffer: found.buffer, offset: found.offset, bytes }
    }

    /// Frees a range; true if its buffer is to be removed now.
    pub(super) fn give_back(&mut self, range: Range) -> bool {
        self.releases += 1;
        let index = range.buffer;
        let buffer = self.buffers[index].as_mut().expect("a range's buffer outlives it");
        let shelf = buffer.shelf;
        let (mut offset, mut bytes) = (range.offset, range.bytes);
        if let Some((&before, &length)) = buffer.free.range(..offset).next_back()
            && before + length == offset
        {
            buffer.free.remove(&before);
            self.free.remove(&Free { shelf, bytes: length, buffer: index, offset: before });
            (offset, bytes) = (before, bytes + length);
        }
        if let Some(length) = buffer.free.remove(&(offset + bytes)) {
            let after = offset + bytes;
            self.free.remove(&Free { shelf, bytes: length, buffer: index, offset: after });
            bytes += length;
        }
        buffer.free.insert(offset, bytes);
        self.free.insert(Free { shelf, bytes, buffer: index, offset });
        buffer.in_use -= range.bytes;
        if buffer.in_use > 0 {
            return false;
        }
        buffer.idle_since = self.releases;
        self.busy -= buffer.bytes;
        !buffer.keep
    }

    /// Removes a buffer that has no region.
    pub(super) fn remove(&mut self, index: usize) {
        let Some(buffer) = self.buffers[index].take_if(|buffer| buffer.in_use == 0) else { return };
        self.free.remove(&Free {
            shelf: buffer.shelf,
            bytes: buffer.bytes,
            buffer: index,
            offset: 0,
        });
        self.held -= buffer.bytes;
        self.vacant.push(index);
    }

    /// The buffers without a region that were unused the longest, until `bytes` are together.
    pub(super) fn idle(&self, bytes: u64) -> Vec<usize> {
        let idle = self.buffers.iter().enumerate().filter_map(|(index, buffer)| {
            let buffer = buffer.as_ref().filter(|buffer| buffer.in_use == 0)?;
            Some((buffer.idle_since, index, buffer.bytes))
        });
        let mut idle: Vec<_> = idle.collect();
        idle.sort_unstable();
        let mut sum = 0u64;
        let needed = idle.iter().take_while(|(_, _, size)| {
            let before = sum;
            sum = sum.saturating_add(*size);
            before < bytes
        });
        needed.map(|(_, index, _)| *index).collect()
    }

    /// Checks that free and used ranges tile every buffer and that all sums agree.
    #[cfg(test)]
    pub(super) fn check(&self, live: &[Range]) {
        let (mut held, mut busy, mut n_free) = (0, 0, 0);
        for (index, buffer) in self.buffers.iter().enumerate() {
            let Some(buffer) = buffer else {
                assert!(self.vacant.contains(&index));
                continue;
            };
            let mut ranges: Vec<(u64, u64, bool)> =
                buffer.free.iter().map(|(&offset, &bytes)| (offset, bytes, true)).collect();
            n_free += ranges.len();
            for &(offset, bytes, _) in &ranges {
                let free = Free { shelf: buffer.shelf, bytes, buffer: index, offset };
                assert!(self.free.contains(&free));
            }
            let mine = live.iter().filter(|range| range.buffer == index);
            ranges.extend(mine.clone().map(|range| (range.offset, range.bytes, false)));
            ranges.sort_unstable();
            let mut end = 0;
            let mut last_free = false;
            for (offset, bytes, free) in ranges {
                assert_eq!(offset, end, "a gap or an overlap in buffer {index}");
                assert!(!(free && last_free), "free neighbours in buffer {index}");
                (end, last_free) = (offset + bytes, free);
            }
            assert_eq!(end, buffer.bytes);
            assert_eq!(buffer.in_use, mine.map(|range| range.bytes).sum::<u64>());
            held += buffer.bytes;
            busy += if buffer.in_use > 0 { buffer.bytes } else { 0 };
        }
        assert_eq!((held, busy, n_free), (self.held, self.busy, self.free.len()));
    }
}

#[cfg(test)]
mod tests {
    use super::super::device::{BufferKind, MemoryProperties};
    use super::super::strategy::{AccessPattern, AllocationStrategy};
    use super::*;
    use proptest::prelude::*;

    const PROPERTIES: MemoryProperties = MemoryProperties {
        unified: false,
        suballocates: true,
        alignment: 64,
        max_buffer_bytes: 1 << 30,
        total_bytes: None,
    };

    fn plan(strategy: AllocationStrategy, pattern: AccessPattern, bytes: u64) -> Plan {
        Plan::new(&PROPERTIES, strategy, pattern, bytes).unwrap()
    }

    proptest! {
        /// Whatever is taken, freed and evicted: nothing overlaps, nothing is lost.
        #[test]
        fn ranges_tile_their_buffers(
            actions in prop::collection::vec((0u8..10, 1u64..40_000, 0usize..64), 1..300),
        ) {
            let mut ranges = Ranges::default();
            let mut live: Vec<Range> = Vec::new();
            for (action, bytes, which) in actions {
                match action {
                    0..6 => {
                        let strategy = match which % 3 {
                            0 => AllocationStrategy::Dedicated,
                            1 => AllocationStrategy::Reused { classes_per_doubling: 4 },
                            _ => AllocationStrategy::Shared { buffer_bytes: 65_536 },
                        };
                        let plan = plan(strategy, AccessPattern::ALL[which % 5], bytes);
                        let range = ranges.take(&plan).unwrap_or_else(|| ranges.add(&plan));
                        prop_assert!(range.bytes >= bytes);
                        prop_assert_eq!(range.offset % PROPERTIES.alignment, 0);
                        live.push(range);
                    }
                    6..9 if !live.is_empty() => {
                        let range = live.swap_remove(which % live.len());
                        if ranges.give_back(range) {
                            ranges.remove(range.buffer);
                        }
                    }
                    _ => {
                        for index in ranges.idle(bytes) {
                            ranges.remove(index);
                        }
                    }
                }
                ranges.check(&live);
            }
            for range in live.drain(..) {
                if ranges.give_back(range) {
                    ranges.remove(range.buffer);
                }
            }
            prop_assert_eq!(ranges.busy(), 0);
            for index in ranges.idle(u64::MAX) {
                ranges.remove(index);
            }
            ranges.check(&[]);
            prop_assert_eq!(ranges.held(), 0);
        }
    }

    #[test]
    fn the_smallest_range_that_fits_is_taken() {
        let mut ranges = Ranges::default();
        let reused = AllocationStrategy::Reused { classes_per_doubling: 1 };
        let take = |ranges: &mut Ranges, bytes| {
            let plan = plan(reused, AccessPattern::Activations, bytes);
            ranges.take(&plan).unwrap_or_else(|| ranges.add(&plan))
        };
        let sizes = [4096, 1024, 2048].map(|bytes| take(&mut ranges, bytes));
        for range in sizes {
            assert!(!ranges.give_back(range));
        }
        assert_eq!(take(&mut ranges, 1000).buffer, sizes[1].buffer);
        assert_eq!(take(&mut ranges, 900).buffer, sizes[2].buffer, "the next class will do");
        assert_eq!(take(&mut ranges, 900).buffer, 3, "two classes up is too wasteful");
        // Another kind of buffer never serves.
        let upload = plan(reused, AccessPattern::Upload, 4000);
        assert_eq!(upload.shelf.kind, BufferKind::Upload);
        assert!(ranges.take(&upload).is_none());
    }

    #[test]
    fn the_longest_unused_buffers_are_evicted_first() {
        let mut ranges = Ranges::default();
        let plan = plan(
            AllocationStrategy::Reused { classes_per_doubling: 1 },
            AccessPattern::Upload,
            1024,
        );
        let taken: Vec<Range> = (0..4).map(|_| ranges.add(&plan)).collect();
        for i in [2, 0, 3] {
            ranges.give_back(taken[i]);
        }
        assert_eq!(ranges.idle(1), [2]);
        assert_eq!(ranges.idle(1025), [2, 0]);
        assert_eq!(ranges.idle(u64::MAX), [2, 0, 3]);
        assert!(ranges.idle(0).is_empty());
    }
}

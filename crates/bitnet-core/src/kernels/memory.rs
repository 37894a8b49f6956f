//! Memory for packed weights: few large regions of huge pages, cut into 64-byte aligned blocks.
//!
//! A decode step reads every weight once, so address translation is part of its cost: 2 MiB pages
//! save a tenth of the time. A system gives such pages only to large aligned areas, and matrices
//! are not multiples of 2 MiB; laying them end to end in one region wastes nothing. Pages are
//! taken from the system when they are first written. Knows nothing of what is stored.

use crate::error::{Error, Result};
use bytes::Bytes;
use std::ops::{Deref, DerefMut};
use std::ptr::NonNull;
use std::sync::Arc;

/// Alignment of every block: a cache line, and the widest vector.
pub const BLOCK_ALIGN: usize = 64;
/// Regions start on this boundary, the size of a huge page on x86-64 and 4K-page aarch64.
#[cfg(unix)]
const HUGE_PAGE: usize = 2 << 20;
/// Address space asked for at a time. What is never written takes no memory.
const REGION: usize = 64 << 20;

/// Where the packed weights of a model live. Blocks outlive it.
#[derive(Debug, Default)]
pub struct WeightMemory {
    /// Regions, each with the bytes of it that belong to blocks.
    regions: Vec<(Arc<Region>, usize)>,
}

impl WeightMemory {
    /// No memory yet.
    pub fn new() -> Self {
        Self::default()
    }

    /// A zeroed block of `len` bytes, in the first region that has room: small matrices fill what
    /// large ones left.
    pub(crate) fn take(&mut self, len: usize) -> Result<Block> {
        let padded = len.checked_next_multiple_of(BLOCK_ALIGN).ok_or_else(|| too_much(len))?;
        let has_room = |(region, used): &(Arc<Region>, usize)| padded <= region.len - used;
        let found = match self.regions.iter().position(has_room) {
            Some(found) => found,
            None => {
                self.regions.push((Arc::new(Region::new(padded.max(REGION))?), 0));
                self.regions.len() - 1
            }
        };
        let (region, used) = &mut self.regions[found];
        // SAFETY: `used + padded` is within the region, so the offset stays inside it.
        let start = unsafe { region.start.add(*used) };
        *used += padded;
        Ok(Block { start, len, _region: region.clone() })
    }
}

/// A part of a region that one owner reads and writes.
pub(crate) struct Block {
    start: NonNull<u8>,
    len: usize,
    _region: Arc<Region>,
}

// SAFETY: a block is the only owner of its bytes, as a `Box<[u8]>` would be.
unsafe impl Send for Block {}
// SAFETY: as above.
unsafe impl Sync for Block {}

/// Bytes of a matrix on the device.
pub(crate) enum Storage {
    /// The source's own, perhaps a file mapping.
    Shared(Bytes),
    /// Written for the kernels.
    Own(Block),
}

impl Deref for Storage {
    type Target = [u8];

    #[inline]
    fn deref(&self) -> &[u8] {
        match self {
            Self::Shared(bytes) => bytes,
            Self::Own(block) => block,
        }
    }
}

impl Deref for Block {
    type Target = [u8];

    fn deref(&self) -> &[u8] {
        // SAFETY: `WeightMemory::take` cut these bytes, zeroed and so initialized, out of a region
        // that `_region` keeps alive, and gave them to nobody else.
        unsafe { std::slice::from_raw_parts(self.start.as_ptr(), self.len) }
    }
}

impl DerefMut for Block {
    fn deref_mut(&mut self) -> &mut [u8] {
        // SAFETY: as in `deref`; the block is borrowed mutably.
        unsafe { std::slice::from_raw_parts_mut(self.start.as_ptr(), self.len) }
    }
}

/// Zeroed address space, returned to the system on drop.
#[derive(Debug)]
struct Region {
    start: NonNull<u8>,
    len: usize,
    /// What the system gave: `start` rounded down to no boundary, and its whole length.
    #[cfg(unix)]
    mapping: (NonNull<u8>, usize),
}

// SAFETY: a region is address space that belongs to no thread; it is only freed through it.
unsafe impl Send for Region {}
// SAFETY: as above.
unsafe impl Sync for Region {}

fn too_much(bytes: usize) -> Error {
    Error::OutOfMemory { what: "weights".into(), bytes: bytes as u64 }
}

#[cfg(unix)]
impl Region {
    fn new(len: usize) -> Result<Self> {
        let len = len.checked_next_multiple_of(HUGE_PAGE).ok_or_else(|| too_much(len))?;
        let mapped = len.checked_add(HUGE_PAGE).ok_or_else(|| too_much(len))?;
        // SAFETY: a new private anonymous mapping touches no existing memory.
        let address = unsafe {
            libc::mmap(
                std::ptr::null_mut(),
                mapped,
                libc::PROT_READ | libc::PROT_WRITE,
                libc::MAP_PRIVATE | libc::MAP_ANON,
                -1,
                0,
            )
        };
        let base = match NonNull::new(address.cast::<u8>()) {
            Some(base) if address != libc::MAP_FAILED => base,
            _ => return Err(too_much(len)),
        };
        let skip = base.as_ptr().align_offset(HUGE_PAGE);
        // SAFETY: `skip < HUGE_PAGE`, and the mapping is a huge page longer than `len`.
        let start = unsafe { base.add(skip) };
        #[cfg(target_os = "linux")]
        // SAFETY: the range lies inside the new mapping. The result is advice not taken at worst.
        unsafe {
            libc::madvise(start.as_ptr().cast(), len, libc::MADV_HUGEPAGE);
        }
        Ok(Self { start, len, mapping: (base, mapped) })
    }
}

#[cfg(unix)]
impl Drop for Region {
    fn drop(&mut self) {
        let (base, mapped) = self.mapping;
        // SAFETY: exactly the mapping that `new` made; every block held this region, so none is left.
        unsafe { libc::munmap(base.as_ptr().cast(), mapped) };
    }
}

#[cfg(not(unix))]
impl Region {
    fn new(len: usize) -> Result<Self> {
        let layout = Self::layout(len)?;
        // SAFETY: the length is not zero: regions have at least `REGION` bytes.
        let start = NonNull::new(unsafe { std::alloc::alloc_zeroed(layout) });
        start.map(|start| Self { start, len }).ok_or_else(|| too_much(len))
    }

    fn layout(len: usize) -> Result<std::alloc::Layout> {
        // Page alignment keeps the allocator from clearing by hand what the system clears lazily.
        std::alloc::Layout::from_size_align(len, BLOCK_ALIGN).map_err(|_| too_much(len))
    }
}

#[cfg(not(unix))]
impl Drop for Region {
    fn drop(&mut self) {
        if let Ok(layout) = Self::layout(self.len) {
            // SAFETY: allocated in `new` with the same layout.
            unsafe { std::alloc::dealloc(self.start.as_ptr(), layout) };
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn blocks_are_aligned_zeroed_and_disjoint() {
        let mut memory = WeightMemory::new();
        let mut blocks: Vec<_> =
            [1, 64, 65, 4096, REGION, 3].map(|len| memory.take(len).unwrap()).into();
        drop(memory);
        for (i, block) in blocks.iter_mut().enumerate() {
            assert_eq!(block.as_ptr().align_offset(BLOCK_ALIGN), 0);
            assert!(block.iter().all(|&b| b == 0));
            block.fill(i as u8 + 1);
        }
        for (i, block) in blocks.iter().enumerate() {
            assert!(block.iter().all(|&b| b == i as u8 + 1));
        }
    }

    #[test]
    fn small_blocks_fill_what_large_ones_left() {
        let mut memory = WeightMemory::new();
        let large: Vec<_> = (0..4).map(|_| memory.take(REGION / 4 * 3).unwrap()).collect();
        let small: Vec<_> = (0..4).map(|_| memory.take(REGION / 4).unwrap()).collect();
        assert_eq!(memory.regions.len(), 4);
        for (large, small) in large.iter().zip(&small) {
            assert_eq!(small.as_ptr(), large.as_ptr().wrapping_add(REGION / 4 * 3));
        }
    }

    #[test]
    fn an_impossible_size_is_an_error() {
        let mut memory = WeightMemory::new();
        assert!(memory.take(usize::MAX).is_err());
        assert!(memory.take(isize::MAX as usize - (8 << 20)).is_err());
        assert_eq!(memory.take(10).unwrap().len(), 10);
    }
}

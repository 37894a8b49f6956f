//! The host's own memory as a device: unified, whole buffers, written in place.

use super::device::{BufferKind, Completion, CopySide, DeviceMemory, MemoryProperties};
use super::pool::{DeviceBufferHandle, EnhancedMemoryPool};
use super::strategy::AccessPattern;
use super::system;
use crate::error::{Error, Result};
use crate::kernels::{Block, WeightMemory};
use std::ops::{Deref, DerefMut};

/// Memory of this process.
#[derive(Debug, Clone, Copy, Default)]
pub struct HostMemory;

/// A buffer in this process, zeroed when it was made. Pages are taken from the system when they
/// are first written.
pub struct HostBuffer(Bytes);

enum Bytes {
    /// From the allocator, as numbers for their alignment.
    Small(Vec<u64>),
    /// From the system, on huge pages where it has them.
    Large(Block),
}

/// From here on, huge pages are worth that a buffer touches 2 MiB at a time.
const LARGE: u64 = 16 << 20;
/// Buffers are whole numbers of these.
const WORD: u64 = 8;

impl HostBuffer {
    fn new(bytes: u64) -> Result<Self> {
        let out_of_memory = || Error::OutOfMemory { what: "host memory".into(), bytes };
        let len = usize::try_from(bytes).map_err(|_| out_of_memory())?;
        if bytes >= LARGE {
            let block = WeightMemory::new().take(len).map_err(|_| out_of_memory())?;
            return Ok(Self(Bytes::Large(block)));
        }
        let words = len.div_ceil(WORD as usize);
        // The zeroed allocation below cannot be asked whether it would succeed.
        Vec::<u64>::new().try_reserve_exact(words).map_err(|_| out_of_memory())?;
        Ok(Self(Bytes::Small(vec![0; words])))
    }

    /// Its bytes, aligned for numbers of up to 8 bytes.
    pub fn as_bytes(&self) -> &[u8] {
        match &self.0 {
            // SAFETY: the words are initialized, and any part of them is bytes.
            Bytes::Small(words) => unsafe { words.align_to().1 },
            Bytes::Large(block) => block,
        }
    }

    /// Its bytes, to write to.
    pub fn as_bytes_mut(&mut self) -> &mut [u8] {
        match &mut self.0 {
            // SAFETY: as in `as_bytes`; any bytes make words.
            Bytes::Small(words) => unsafe { words.align_to_mut().1 },
            Bytes::Large(block) => block,
        }
    }
}

impl DeviceMemory for HostMemory {
    type Buffer = HostBuffer;

    fn name(&self) -> &str {
        "host"
    }

    fn properties(&self) -> MemoryProperties {
        MemoryProperties {
            unified: true,
            suballocates: false,
            alignment: 64,
            max_buffer_bytes: isize::MAX as u64,
            total_bytes: system::total_memory(),
        }
    }

    fn allocate(&self, bytes: u64, _: BufferKind) -> Result<HostBuffer> {
        HostBuffer::new(bytes)
    }

    fn write(&self, to: &mut HostBuffer, offset: u64, bytes: &[u8]) -> Result<()> {
        let len = to.as_bytes().len();
        let range = range(len, offset, bytes.len())?;
        to.as_bytes_mut()[range].copy_from_slice(bytes);
        Ok(())
    }

    fn read(&self, from: &HostBuffer, offset: u64, out: &mut [u8]) -> Result<()> {
        let from = from.as_bytes();
        out.copy_from_slice(&from[range(from.len(), offset, out.len())?]);
        Ok(())
    }

    fn copy(&self, _: CopySide<Self>, _: CopySide<Self>, _: u64) -> Result<Completion> {
        let reason = "a region with several owners cannot be written to".into();
        Err(Error::Device { device: self.name().into(), reason })
    }
}

/// `offset..offset + bytes` of a buffer of `len` bytes.
pub(super) fn range(len: usize, offset: u64, bytes: usize) -> Result<std::ops::Range<usize>> {
    let start = usize::try_from(offset).ok();
    let end = start.and_then(|start| start.checked_add(bytes)).filter(|&end| end <= len);
    match (start, end) {
        (Some(start), Some(end)) => Ok(start..end),
        _ => Err(Error::shape("range of a buffer", format!("within {len} bytes"), {
            format!("{bytes} from {offset} on")
        })),
    }
}

/// A region of host memory with one owner: a slice that returns to its pool.
#[derive(Debug)]
pub struct HostRegion {
    /// Never cloned, and its buffer never shared.
    handle: DeviceBufferHandle<HostMemory>,
    len: usize,
}

impl HostRegion {
    /// A region of `len` bytes. What another region left in it may still be there.
    ///
    /// # Errors
    /// As [`EnhancedMemoryPool::take`].
    pub fn take(
        pool: &EnhancedMemoryPool<HostMemory>,
        len: usize,
        pattern: AccessPattern,
    ) -> Result<Self> {
        Ok(Self { handle: pool.take(len as u64, pattern)?, len })
    }

    /// As [`take`](Self::take), but all zero.
    ///
    /// # Errors
    /// As [`EnhancedMemoryPool::take`].
    pub fn take_zeroed(
        pool: &EnhancedMemoryPool<HostMemory>,
        len: usize,
        pattern: AccessPattern,
    ) -> Result<Self> {
        let mut region = Self::take(pool, len, pattern)?;
        if !region.handle.is_fresh() {
            region.fill(0);
        }
        Ok(region)
    }

    /// The bytes as numbers: `len / 4` of them.
    pub fn as_floats(&self) -> &[f32] {
        // SAFETY: any bytes are f32 numbers, and the slice begins where a buffer does: aligned.
        unsafe { self.align_to().1 }
    }

    /// The bytes as numbers, to write to.
    pub fn as_floats_mut(&mut self) -> &mut [f32] {
        // SAFETY: as in `as_floats`; any numbers are bytes.
        unsafe { self.align_to_mut().1 }
    }
}

impl Deref for HostRegion {
    type Target = [u8];

    fn deref(&self) -> &[u8] {
        &self.handle.buffer().as_bytes()[..self.len]
    }
}

impl DerefMut for HostRegion {
    fn deref_mut(&mut self) -> &mut [u8] {
        let buffer = self.handle.buffer_mut().expect("the handle was never cloned");
        &mut buffer.as_bytes_mut()[..self.len]
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn regions_are_slices_that_come_back() {
        let pool = EnhancedMemoryPool::new(HostMemory, u64::MAX);
        for bytes in [1, 4, 1000, LARGE as usize + 5] {
            let mut region = HostRegion::take(&pool, bytes, AccessPattern::Activations).unwrap();
            assert_eq!((region.len(), region.as_floats().len()), (bytes, bytes / 4));
            assert!(region.iter().all(|&b| b == 0));
            region.as_floats_mut().fill(1.5);
            assert!(region.as_floats().iter().all(|&x| x == 1.5));
            let address = region.as_ptr();
            assert_eq!(address.align_offset(8), 0);
            drop(region);
            let again = HostRegion::take(&pool, bytes, AccessPattern::Activations).unwrap();
            assert_eq!(again.as_ptr(), address, "the same memory serves again");
        }
    }

    #[test]
    fn ranges_outside_a_buffer_are_errors() {
        let mut buffer = HostBuffer::new(64).unwrap();
        for (offset, bytes) in [(60, 5), (65, 0), (u64::MAX, 1), (0, 65)] {
            let data = vec![0; bytes];
            assert!(HostMemory.write(&mut buffer, offset, &data).is_err());
            assert!(HostMemory.read(&buffer, offset, &mut vec![0; bytes]).is_err());
        }
        HostMemory.write(&mut buffer, 60, &[1, 2, 3, 4]).unwrap();
        let mut out = [0; 2];
        HostMemory.read(&buffer, 61, &mut out).unwrap();
        assert_eq!(out, [2, 3]);
    }

    #[test]
    fn impossible_sizes_are_errors() {
        for bytes in [1 << 62, u64::MAX - 1] {
            assert!(matches!(HostBuffer::new(bytes), Err(Error::OutOfMemory { .. })));
        }
    }
}

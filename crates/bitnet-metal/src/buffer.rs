//! Device memory as the backend uses it: regions of the pool, written and read in place.

use bitnet_core::memory::{
    AccessPattern, BufferKind, DeviceBufferHandle, DeviceMemory, EnhancedMemoryPool,
};
use bitnet_core::{Error, Result};

/// The pool all memory of a Metal device comes from.
pub type MetalBufferPool<M> = EnhancedMemoryPool<M>;

/// A buffer that the host and the device share. Dropping it returns it to its pool.
pub struct MetalBuffer<M: DeviceMemory> {
    handle: DeviceBufferHandle<M>,
    alignment: u64,
}

impl<M: DeviceMemory> MetalBuffer<M> {
    /// At least `bytes` bytes, 0 throughout.
    ///
    /// # Errors
    /// As [`EnhancedMemoryPool::take`].
    pub fn new(pool: &MetalBufferPool<M>, bytes: usize, pattern: AccessPattern) -> Result<Self> {
        /// Bytes written at a time.
        const CHUNK: usize = 1 << 20;
        let mut buffer = Self::with_old_contents(pool, bytes, pattern)?;
        // A device gives new buffers of zeros; only one that had another use must be cleared.
        if !buffer.handle.is_fresh() {
            let zeros = vec![0; bytes.min(CHUNK)];
            for start in (0..bytes).step_by(CHUNK) {
                buffer.write(pool, start, &zeros[..CHUNK.min(bytes - start)])?;
            }
        }
        Ok(buffer)
    }

    /// As [`MetalBuffer::new`], but with whatever stands there.
    ///
    /// # Errors
    /// As [`EnhancedMemoryPool::take`].
    pub(crate) fn with_old_contents(
        pool: &MetalBufferPool<M>,
        bytes: usize,
        pattern: AccessPattern,
    ) -> Result<Self> {
        let handle = pool.take(bytes.max(1) as u64, pattern)?;
        Ok(Self { handle, alignment: pool.memory().properties().alignment })
    }

    /// A buffer that holds `bytes`.
    pub(crate) fn holding(
        pool: &MetalBufferPool<M>,
        bytes: &[u8],
        pattern: AccessPattern,
    ) -> Result<Self> {
        let mut buffer = Self::with_old_contents(pool, bytes.len(), pattern)?;
        buffer.write(pool, 0, bytes)?;
        Ok(buffer)
    }

    /// Bytes asked for.
    pub fn size(&self) -> u64 {
        self.handle.bytes()
    }

    /// A number no other buffer of the pool has or had.
    pub fn id(&self) -> u64 {
        self.handle.id()
    }

    /// What the size was rounded up to a multiple of.
    pub fn alignment(&self) -> u64 {
        self.alignment
    }

    /// Whether bytes only pass through it on their way.
    pub fn is_staging(&self) -> bool {
        self.handle.pattern().kind() != BufferKind::Device
    }

    /// What a dispatch is given.
    pub(crate) fn handle(&self) -> &DeviceBufferHandle<M> {
        &self.handle
    }

    /// Whether the host may write to it: no dispatch that was not submitted yet has it.
    pub(crate) fn is_idle(&mut self) -> bool {
        self.handle.buffer_mut().is_some()
    }

    /// Writes `bytes` at `offset`.
    pub(crate) fn write(
        &mut self,
        pool: &MetalBufferPool<M>,
        offset: usize,
        bytes: &[u8],
    ) -> Result<()> {
        let at = self.handle.offset() + offset as u64;
        match self.handle.buffer_mut() {
            Some(buffer) => pool.memory().write(buffer, at, bytes),
            None => Err(Error::Device {
                device: "metal".into(),
                reason: "a buffer was written to before the device was done with it".into(),
            }),
        }
    }

    /// Reads into `out` from `offset` on.
    pub(crate) fn read(
        &self,
        pool: &MetalBufferPool<M>,
        offset: usize,
        out: &mut [u8],
    ) -> Result<()> {
        pool.memory().read(self.handle.buffer(), self.handle.offset() + offset as u64, out)
    }
}

/// A buffer that is made anew when more is needed than it holds, or when it is in use.
pub(crate) struct Growing<M: DeviceMemory> {
    buffer: Option<MetalBuffer<M>>,
    pattern: AccessPattern,
}

impl<M: DeviceMemory> Growing<M> {
    pub(crate) fn new(pattern: AccessPattern) -> Self {
        Self { buffer: None, pattern }
    }

    /// The buffer with room for `bytes`; its contents are arbitrary.
    pub(crate) fn with_room(
        &mut self,
        pool: &MetalBufferPool<M>,
        bytes: usize,
    ) -> Result<&MetalBuffer<M>> {
        let buffer = match self.buffer.take() {
            Some(buffer) if buffer.size() >= bytes as u64 => buffer,
            // Half as much again, so that a slowly growing need is not met byte by byte.
            Some(_) => MetalBuffer::with_old_contents(pool, bytes + bytes / 2, self.pattern)?,
            None => MetalBuffer::with_old_contents(pool, bytes, self.pattern)?,
        };
        Ok(self.buffer.insert(buffer))
    }

    /// Puts `bytes` there, in a new buffer if the device still needs the old one.
    pub(crate) fn fill(&mut self, pool: &MetalBufferPool<M>, bytes: &[u8]) -> Result<()> {
        if self.buffer.as_mut().is_some_and(|buffer| !buffer.is_idle()) {
            self.buffer = None;
        }
        self.with_room(pool, bytes.len())?;
        self.get_mut()?.write(pool, 0, bytes)
    }

    /// The buffer as it was left.
    pub(crate) fn get(&self) -> Result<&MetalBuffer<M>> {
        self.buffer.as_ref().ok_or_else(never_filled)
    }

    fn get_mut(&mut self) -> Result<&mut MetalBuffer<M>> {
        self.buffer.as_mut().ok_or_else(never_filled)
    }
}

fn never_filled() -> Error {
    Error::Device {
        device: "metal".into(),
        reason: "a buffer was used before it was filled".into(),
    }
}

//! What the pool asks of a device: to allocate, to reach a buffer from the host, and to copy
//! without making the caller wait.

use super::sync::{Arc, Condvar, Mutex, lock};
use crate::error::{Error, Result};
use std::time::Instant;

/// Where a buffer lies and who reaches it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum BufferKind {
    /// The device's own memory; with unified memory the host reaches it too.
    Device,
    /// Written by the host, copied from by the device.
    Upload,
    /// Copied to by the device, read by the host.
    Readback,
}

/// What a device's memory is like.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct MemoryProperties {
    /// Host and device share one memory: a buffer of any kind is written and read in place.
    pub unified: bool,
    /// Several regions may lie in one buffer, at offsets that are multiples of `alignment`. False
    /// where buffers are what accesses are tracked by.
    pub suballocates: bool,
    /// Lengths are rounded up to this, a power of two.
    pub alignment: u64,
    /// Largest buffer.
    pub max_buffer_bytes: u64,
    /// All of the memory, where the system tells.
    pub total_bytes: Option<u64>,
}

/// The memory of a device: the one thing a backend implements to use the pool.
pub trait DeviceMemory: Send + Sync + 'static {
    /// A buffer as the device's interface has it. Dropping it gives the memory back.
    type Buffer: Send + Sync + 'static;

    /// The device's name in errors.
    fn name(&self) -> &str;
    /// What the memory is like; the same at every call.
    fn properties(&self) -> MemoryProperties;
    /// A new buffer of `bytes` (positive, a multiple of the alignment) with arbitrary contents.
    ///
    /// # Errors
    /// [`Error::OutOfMemory`] if there is no room, [`Error::Device`] if the device is gone.
    fn allocate(&self, bytes: u64, kind: BufferKind) -> Result<Self::Buffer>;
    /// Writes into a buffer that the host reaches: one of kind [`BufferKind::Upload`], or any with
    /// unified memory.
    ///
    /// # Errors
    /// [`Error::Device`] if the host does not reach it; [`Error::Shape`] if the bytes do not fit.
    fn write(&self, to: &mut Self::Buffer, offset: u64, bytes: &[u8]) -> Result<()>;
    /// Reads from a buffer that the host reaches: one of kind [`BufferKind::Readback`], or any with
    /// unified memory.
    ///
    /// # Errors
    /// As [`DeviceMemory::write`].
    fn read(&self, from: &Self::Buffer, offset: u64, out: &mut [u8]) -> Result<()>;
    /// Starts to copy between two buffers and returns at once. Copies happen in the order they
    /// were started in.
    ///
    /// # Errors
    /// [`Error::Device`] if the device is gone; [`Error::Shape`] if a range is outside its buffer.
    fn copy(&self, from: CopySide<Self>, to: CopySide<Self>, bytes: u64) -> Result<Completion>
    where
        Self: Sized;
    /// Lets completed work be noticed on devices that do so only when asked, after waiting for all
    /// work if `wait`.
    ///
    /// # Errors
    /// [`Error::Device`] if the device is gone.
    fn poll(&self, wait: bool) -> Result<()> {
        let _ = wait;
        Ok(())
    }
}

/// One side of a copy; the buffer lives at least until the copy is done.
pub struct CopySide<M: DeviceMemory> {
    /// The buffer.
    pub buffer: std::sync::Arc<M::Buffer>,
    /// First byte in it.
    pub offset: u64,
}

/// Work a device does while the host goes on: whether it is done, and how it went.
#[derive(Debug, Clone)]
pub struct Completion(Arc<Shared>);

/// The device's end of a [`Completion`]. Dropping it unfinished reports the device as lost.
#[derive(Debug)]
pub struct Signal(Arc<Shared>);

#[derive(Debug)]
struct Shared {
    outcome: Mutex<Option<(Result<()>, Instant)>>,
    done: Condvar,
}

impl Completion {
    /// Both ends.
    pub fn new() -> (Signal, Self) {
        let shared = Arc::new(Shared { outcome: Mutex::new(None), done: Condvar::new() });
        (Signal(shared.clone()), Self(shared))
    }

    /// Something that is done already.
    pub fn done(result: Result<()>) -> Self {
        let (signal, completion) = Self::new();
        signal.finish(result);
        completion
    }

    /// Whether it is done, how it went and when.
    pub fn outcome(&self) -> Option<(Result<()>, Instant)> {
        lock(&self.0.outcome).clone()
    }

    /// Waits for a device that signals from a thread of its own.
    pub(super) fn block(&self) -> Result<()> {
        let mut outcome = lock(&self.0.outcome);
        loop {
            if let Some((result, _)) = &*outcome {
                return result.clone();
            }
            outcome = self.0.done.wait(outcome).unwrap_or_else(|poisoned| poisoned.into_inner());
        }
    }
}

impl Signal {
    /// Reports the work as done.
    pub fn finish(self, result: Result<()>) {
        self.set(result);
    }

    fn set(&self, result: Result<()>) {
        lock(&self.0.outcome).get_or_insert_with(|| (result, Instant::now()));
        self.0.done.notify_all();
    }
}

impl Drop for Signal {
    fn drop(&mut self) {
        let reason = "work was dropped before it was done".into();
        self.set(Err(Error::Device { device: "copy".into(), reason }));
    }
}

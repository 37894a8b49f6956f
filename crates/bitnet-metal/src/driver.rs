//! What the backend asks of a Metal device: memory that both sides reach, and a queue for kernels.
//!
//! Apple's API implements it on a Mac; tests implement it with the kernels compiled for the CPU, so
//! that everything above this seam runs in both.

use crate::kernels::Kernel;
use bitnet_core::Result;
use bitnet_core::memory::{DeviceBufferHandle, DeviceMemory};

/// One run of a kernel.
pub struct Dispatch<'a, M: DeviceMemory> {
    /// Which one.
    pub kernel: Kernel,
    /// The buffers of indices 0, 1, …
    pub buffers: &'a [&'a DeviceBufferHandle<M>],
    /// The constants, at the index after the last buffer's.
    pub constants: &'a [u8],
    /// Threadgroups in each dimension.
    pub groups: [u32; 3],
    /// Bytes of threadgroup memory, a multiple of 16.
    pub shared_bytes: u32,
    /// Whether it may run beside the dispatch before it; otherwise it sees everything that dispatches
    /// before it wrote.
    pub beside: bool,
}

/// A device and its queue.
///
/// Memory is unified: what is written by the host before a dispatch is seen by it, and what it wrote
/// is seen by the host after [`Driver::submit`].
pub trait Driver: Send + Sync + 'static {
    /// Its memory.
    type Memory: DeviceMemory;

    /// What the hardware calls itself.
    fn hardware(&self) -> String;
    /// The memory, to make a pool over.
    fn memory(&self) -> Self::Memory;
    /// Adds a run of a kernel to what the next [`Driver::submit`] hands over. The buffers are kept
    /// alive until it has happened.
    ///
    /// # Errors
    /// [`Device`](bitnet_core::Error::Device) if the device refuses it.
    fn encode(&mut self, dispatch: &Dispatch<'_, Self::Memory>) -> Result<()>;
    /// Hands over what was encoded and waits until it has happened.
    ///
    /// # Errors
    /// [`Device`](bitnet_core::Error::Device) if the device could not do it.
    fn submit(&mut self) -> Result<()>;
    /// Forgets what was encoded.
    fn abandon(&mut self);
}

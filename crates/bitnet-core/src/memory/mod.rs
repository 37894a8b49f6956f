//! Memory of a device: one pool under every backend, and copies that overlap with computing.
//!
//! A backend implements [`DeviceMemory`] for what its device calls a buffer, and takes regions from
//! an [`EnhancedMemoryPool`]: found by size among buffers that are free, cut and rounded as the
//! device and the access pattern want it, counted by reference, within a budget.
//! [`GPUMemoryManager`] adds transfers; [`HostMemory`] is the memory of this process. Knows bytes, not
//! tensors.
//!
//! ```
//! use bitnet_core::memory::{AccessPattern, GPUMemoryManager, HostMemory};
//!
//! let manager = GPUMemoryManager::new(HostMemory, 1 << 20);
//! let mut region = manager.pool().take(4, AccessPattern::Activations)?;
//! manager.copy_to_gpu_async(&[1, 2, 3, 4], &mut region, 0)?.wait()?;
//! let mut bytes = [0; 4];
//! manager.copy_from_gpu_async(&region, 0, 4)?.wait(&mut bytes)?;
//! assert_eq!(bytes, [1, 2, 3, 4]);
//! drop(region);
//! assert_eq!(manager.stats().active_bytes, 0);
//! # Ok::<(), bitnet_core::Error>(())
//! ```

mod device;
#[cfg(any(test, feature = "testing"))]
mod discrete;
mod host;
mod manager;
mod pool;
mod ranges;
mod stats;
mod strategy;
mod sync;
pub mod system;
#[cfg(test)]
mod tests;
mod trace;

pub use device::{BufferKind, Completion, CopySide, DeviceMemory, MemoryProperties, Signal};
#[cfg(any(test, feature = "testing"))]
pub use discrete::{DiscreteBuffer, DiscreteMemory};
pub use host::{HostBuffer, HostMemory, HostRegion};
pub use manager::{GPUMemoryManager, InferenceBuffers, Readback, Transfer};
pub use pool::{DeviceBufferHandle, EnhancedMemoryPool};
pub use stats::{MemoryStats, TransferSpan};
pub use strategy::{AccessPattern, AllocationStrategy};
pub use trace::{AllocationTrace, ReplayReport, TraceEvent};

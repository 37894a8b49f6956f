//! How does a device that wgpu reaches do what the backend contract asks?
//!
//! [`WgpuBackend`] keeps weights, KV cache and activations on a Vulkan, Metal or Direct3D 12 device,
//! records the operations of a step as they are called, and submits them together: one submission a
//! step, from which only logits (or the few best of them) come back. The shaders in `kernels/` are
//! WGSL; `pipeline` puts them together for what a device has, `step` records and submits.
//! Knows shapes and positions, no files and no text.
//!
//! Ternary products are exact integer sums, equal to the CPU's; float parts have one order of
//! summation per row, so a row's result depends neither on its batch nor on how its past was cut
//! into steps. Shaders may fuse multiplications and additions, so floats differ from the CPU's in
//! their last bits.

mod backend;
mod buffers;
mod device;
mod kv;
mod linear;
mod memory;
mod memory_size;
mod pipeline;
mod step;
mod table;
mod weights;

pub use backend::WgpuBackend;
pub use buffers::{WgpuBuffer, WgpuNorm, WgpuRope};
pub use device::{GpuBuffer, Options, find};
pub use kv::WgpuKv;
pub use linear::WgpuLinear;
pub use memory::WgpuMemory;
pub use step::Traffic;
pub use table::WgpuTable;

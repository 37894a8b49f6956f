//! How does MLX do what core's backend contract asks? Through mlx-c, opened at run time.
//!
//! [`MlxBackend`] runs a model's step as one MLX graph on Apple's GPUs, or on any CPU that MLX is
//! built for. Nothing is linked and nothing is needed at build time: [`is_mlx_available`] tells
//! whether a library that fits was found, and [`find`] why not. The product of ternary weights and 8-bit activations is
//! exact; so are the results, up to MLX's order of float sums in norms, attention and head.

mod array;
mod backend;
mod closure;
mod compiled;
mod ffi;
mod fused;
mod kv;
mod library;
mod linear;
mod memory;
mod program;
mod step;

use bitnet_core::Result;
use bitnet_core::backend::FoundDevice;
use bitnet_core::memory::system;

pub use backend::{
    COMPILE_VARIABLE, Compile, Counts, MlxBackend, MlxBuffer, MlxCache, MlxRope, TRACE_VARIABLE,
};
pub use library::{LIBRARY_VARIABLE, SUPPORTED_VERSIONS};
pub use linear::{MlxLinear, MlxNorm, MlxTable};
pub use memory::{MlxMemory, MlxStorage};
pub use program::Shared;

/// Whether mlx-c of a version this crate knows can be opened here.
pub fn is_mlx_available() -> bool {
    find().is_ok()
}

/// What MLX runs on here.
///
/// # Errors
/// [`Error::Device`](bitnet_core::Error::Device) with the reason why it cannot be used: mlx-c is not
/// found, does not fit, or has no device.
pub fn find() -> Result<FoundDevice> {
    let mlx = library::Mlx::get()?;
    let device = library::Device::best(mlx)?;
    let (hardware, memory_bytes) = device.info();
    let kind = if device.is_gpu { "GPU" } else { "CPU" };
    Ok(FoundDevice {
        hardware: hardware.unwrap_or_else(|| kind.into()),
        driver: Some(format!("MLX {} on the {kind}", mlx.version)),
        memory_bytes: memory_bytes.or_else(system::total_memory),
        unified_memory: true,
        accelerates: device.is_gpu,
    })
}

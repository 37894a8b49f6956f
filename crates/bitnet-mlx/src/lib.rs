//! How does MLX do what core's backend contract asks? Through mlx-c, opened at run time.
//!
//! [`MlxBackend`] runs a model's step as one MLX graph on Apple's GPUs, or on any CPU that MLX is
//! built for. Nothing is linked and nothing is needed at build time: [`is_mlx_available`] tells
//! whether a library that fits was found. The product of ternary weights and 8-bit activations is
//! exact; so are the results, up to MLX's order of float sums in norms, attention and head.

mod array;
mod backend;
mod ffi;
mod fused;
mod kv;
mod library;
mod linear;
mod memory;
mod step;

pub use backend::{COMPILE_VARIABLE, MlxBackend, MlxBuffer, MlxCache, MlxRope};
pub use library::{LIBRARY_VARIABLE, SUPPORTED_VERSIONS};
pub use linear::{MlxLinear, MlxNorm, MlxTable};
pub use memory::{MlxMemory, MlxStorage};

/// Whether mlx-c of a version this crate knows can be opened here.
pub fn is_mlx_available() -> bool {
    unavailable_reason().is_none()
}

/// Why MLX cannot be used here, if it cannot.
pub fn unavailable_reason() -> Option<String> {
    library::Mlx::get().err().map(|error| error.to_string())
}

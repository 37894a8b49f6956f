//! How does Metal do what the core's backend contract asks?
//!
//! The kernels are written by hand (`kernels/*.metal`); [`MetalBackend`] records them as dispatches.
//! Between it and Apple's API stands the [`Driver`]: on a Mac it is Apple's, and in tests it is the
//! same kernels compiled for the CPU, so that all but that last layer runs on any machine. Knows no
//! model files and no text.

#[cfg(target_os = "macos")]
mod apple;
mod attention;
mod backend;
mod buffer;
mod driver;
mod kernels;
mod kv;
mod linear;
mod matrix;
mod params;
mod products;
mod step;

#[cfg(target_os = "macos")]
pub use apple::{AppleBuffer, AppleDriver, AppleMemory, find, open};
pub use backend::{Counters, MetalActivations, MetalBackend};
pub use buffer::{MetalBuffer, MetalBufferPool};
pub use driver::{Dispatch, Driver};
pub use kernels::{Kernel, SOURCES, source};
pub use kv::MetalKv;
pub use linear::{MetalLinear, MetalNorm};
pub use matrix::FloatMatrix;

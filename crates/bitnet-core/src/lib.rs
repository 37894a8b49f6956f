//! How is a ternary matrix multiplied?
//!
//! `bitnet-core` holds what every device shares: the contract between a model and a device
//! ([`backend`]), the description of weights on their way to a device ([`weights`]), the CPU
//! backend with its kernels ([`cpu`], [`kernels`]) and its thread pool ([`threads`]).
//! It knows nothing of files, tokens or model names.

pub mod backend;
pub mod cpu;
pub mod error;
pub mod kernels;
pub mod machine;
pub mod memory;
pub mod noise;
mod processors;
#[cfg(any(test, feature = "testing"))]
pub mod testing;
pub mod threads;
pub mod weights;

pub use error::{Error, Result};

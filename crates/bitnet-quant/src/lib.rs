//! What do the bytes of a weight mean?
//!
//! `bitnet-quant` opens model files (GGUF, safetensors folders), unpacks every ternary packing into
//! the codes `bitnet-core` defines, converts between them without losing a trit, and quantizes
//! float masters. It knows no kernels and runs no model.
#![deny(unsafe_code)] // one exception: the file mapping

pub mod absmean;
pub mod checkpoint;
pub mod config;
pub mod convert;
pub mod error;
mod files;
pub mod gguf;
mod hf;
pub mod mapping;
pub mod pack;
pub mod quantize;
mod rows;
pub mod safetensors;
pub mod text;

pub use checkpoint::Checkpoint;
pub use error::{Error, Result};

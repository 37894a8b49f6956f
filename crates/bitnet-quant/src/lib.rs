//! What do the bytes of a weight mean?
//!
//! `bitnet-quant` opens model files (GGUF, safetensors folders), unpacks every ternary packing into
//! the codes `bitnet-core` defines, converts between them without losing a trit, and quantizes
//! float masters. It knows no kernels and runs no model.
#![deny(unsafe_code)] // one exception: the file mapping

pub mod config;
pub mod error;
pub mod mapping;
pub mod pack;
pub mod text;

pub use error::{Error, Result};

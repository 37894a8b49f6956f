//! Embedding tables and output heads on the device, in parts that fit a binding.

use std::sync::Arc;

use bitnet_core::Result;
use bitnet_core::weights::{FloatRows, FloatType};

use crate::memory::Manager;
use crate::weights::{self, Part};

/// A table `(vocab, hidden)`.
pub struct WgpuTable {
    pub(crate) rows: usize,
    pub(crate) cols: usize,
    /// Words of a row.
    pub(crate) words: usize,
    pub(crate) dtype: FloatType,
    pub(crate) parts: Vec<Part>,
}

impl WgpuTable {
    pub(crate) fn new(memory: &Manager, source: &Arc<dyn FloatRows>) -> Result<Self> {
        let (dtype, parts) = weights::upload_floats(memory, "a table", source)?;
        let (rows, cols) = (source.rows(), source.cols());
        Ok(Self { rows, cols, words: weights::float_words(cols, dtype), dtype, parts })
    }

    /// Bytes on the device.
    pub fn memory_bytes(&self) -> u64 {
        weights::bytes(&self.parts)
    }
}

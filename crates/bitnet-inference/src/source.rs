//! Where a decoder's weights come from: a model file, or a generator that needs none.

use std::path::Path;
use std::sync::Arc;

use bitnet_core::weights::{FloatRows, LinearWeights, NormWeights};
use bitnet_quant::checkpoint::Checkpoint;
use bitnet_quant::config::ModelConfig;
use bitnet_quant::text::TextAssets;

use crate::builtin::{self, BUILTIN_MODEL};
use crate::error::{InferenceError, Result};

/// Opens a GGUF file, a safetensors file, a model folder, or `"builtin"`.
///
/// # Errors
/// [`InferenceError::Model`] says which file is missing or damaged, and how.
pub fn open(path: &Path) -> Result<Checkpoint> {
    let checkpoint = match path == Path::new(BUILTIN_MODEL) && !path.exists() {
        true => builtin::checkpoint(),
        false => Checkpoint::open(path),
    };
    checkpoint.map_err(|e| InferenceError::file(path.display().to_string(), e))
}

/// The parts of a model by their canonical names, such as `model.layers.0.self_attn.q_proj`.
pub trait WeightSource {
    /// The hyper-parameters.
    fn config(&self) -> &ModelConfig;
    /// A projection.
    ///
    /// # Errors
    /// [`InferenceError::Model`] if the source has none of this name, or a damaged one.
    fn linear(&self, name: &str) -> Result<LinearWeights>;
    /// A norm; errors as [`linear`](Self::linear).
    fn norm(&self, name: &str) -> Result<NormWeights>;
    /// An embedding table or head, `(vocab_size, hidden_size)`; errors as [`linear`](Self::linear).
    fn table(&self, name: &str) -> Result<Arc<dyn FloatRows>>;
    /// Numbers in all tensors; a tied head is counted once.
    fn total_weight_count(&self) -> u64;
    /// Tokenizer and chat template.
    fn text(&self) -> &TextAssets;
    /// All weights have been brought to a device: what it copied is not needed in memory.
    fn release(&self) {}
}

impl WeightSource for Checkpoint {
    fn config(&self) -> &ModelConfig {
        self.config()
    }

    fn linear(&self, name: &str) -> Result<LinearWeights> {
        self.linear(name).map_err(|e| InferenceError::file(&self.config().name, e))
    }

    fn norm(&self, name: &str) -> Result<NormWeights> {
        self.norm(name).map_err(|e| InferenceError::file(&self.config().name, e))
    }

    fn table(&self, name: &str) -> Result<Arc<dyn FloatRows>> {
        self.table(name).map_err(|e| InferenceError::file(&self.config().name, e))
    }

    fn total_weight_count(&self) -> u64 {
        self.total_weight_count()
    }

    fn text(&self) -> &TextAssets {
        self.text()
    }

    fn release(&self) {
        self.release();
    }
}

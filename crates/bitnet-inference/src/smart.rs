//! One call for many inputs on a machine nobody described: the batch follows what memory is free
//! and what else runs.
//!
//! Knows the machine, the shape of the model and the lengths of the inputs; the engine does the
//! rest.

use std::path::Path;

use bitnet_core::memory::system::available_memory;
use bitnet_core::threads::default_threads;
use bitnet_quant::config::ModelConfig;

use crate::bench::process::load_average;
use crate::config::{BLOCK_TOKENS, EngineConfig, MemorySize};
use crate::engine::InferenceEngine;
use crate::error::{InferenceError, Result};
use crate::input::{InferenceInput, InferenceOutput};
use crate::source;

/// Largest batch: beyond it a step grows longer without more tokens per second.
const MAX_BATCH: usize = 64;
/// Memory for the cache where the system does not tell what is free.
const UNKNOWN_MEMORY: u64 = 1 << 30;

/// What decides about a batch.
#[derive(Debug, Clone, Copy, PartialEq)]
struct Conditions {
    /// Bytes that can be had without pushing anything out.
    available_memory: u64,
    /// Physical cores, and how many of them others keep busy.
    cores: usize,
    busy_cores: f64,
}

impl Conditions {
    fn now() -> Self {
        Self {
            available_memory: available_memory().unwrap_or(UNKNOWN_MEMORY * 2),
            cores: default_threads(),
            busy_cores: load_average().unwrap_or(0.0),
        }
    }

    /// The balanced profile, with as many sequences in a step as half of the free memory holds at
    /// this length, on the cores that are free.
    fn config(&self, model: &ModelConfig, inputs: usize, longest: usize) -> Result<EngineConfig> {
        let mut config = EngineConfig::balanced();
        let free = (self.cores as f64 - self.busy_cores).round().max(1.0) as usize;
        config.threads = Some(free.min(self.cores));
        // The shape of a cache for one sequence of that length.
        config.batch_size = 1;
        config.memory_pool_size = MemorySize::GB(1 << 13);
        let (positions, kv) = config.kv_cache(model)?;
        let blocks = longest.clamp(1, positions).div_ceil(BLOCK_TOKENS) as u64;
        let cache_bytes = blocks * kv.block_bytes() as u64;
        let sequence_bytes = cache_bytes + 4 * model.vocab_size as u64;
        let fit = (self.available_memory / 2 / sequence_bytes) as usize;
        if fit == 0 {
            return Err(InferenceError::Memory {
                what: format!("one sequence of {longest} tokens"),
                needed_bytes: sequence_bytes,
                available_bytes: self.available_memory / 2,
            });
        }
        config.batch_size = fit.min(inputs).clamp(1, MAX_BATCH);
        let pool = (config.batch_size as u64 * cache_bytes).max(1 << 20);
        config.memory_pool_size = MemorySize::KB(pool.div_ceil(1 << 10));
        Ok(config)
    }
}

impl InferenceEngine {
    /// Loads a model and runs many inputs through it, as many at a time as the machine's free
    /// memory and cores allow now. Results come in the order of the inputs, each the same to the
    /// last bit as if it were alone; no input, no result, and nothing is loaded.
    ///
    /// ```
    /// use bitnet_inference::InferenceEngine;
    ///
    /// # async fn example() -> Result<(), bitnet_inference::InferenceError> {
    /// let inputs = ["Once upon a".into(), "The old king".into(), "A fox".into()];
    /// let outputs = InferenceEngine::smart_infer("builtin", &inputs).await?;
    /// assert_eq!(outputs.len(), 3);
    /// # assert!(InferenceEngine::smart_infer("builtin", &[]).await?.is_empty());
    /// # Ok(())
    /// # }
    /// # futures::executor::block_on(example()).unwrap();
    /// ```
    ///
    /// # Errors
    /// As [`load_model`](Self::load_model) and [`infer_batch`](Self::infer_batch);
    /// [`InferenceError::Memory`] if not even one sequence fits.
    pub async fn smart_infer(
        path: impl AsRef<Path>,
        inputs: &[InferenceInput],
    ) -> Result<Vec<InferenceOutput>> {
        if inputs.is_empty() {
            return Ok(Vec::new());
        }
        let longest = inputs.iter().map(most_tokens).max().unwrap_or(1);
        let model = source::open(path.as_ref())?.config().clone();
        let config = Conditions::now().config(&model, inputs.len(), longest)?;
        let engine = Self::with_config(config)?;
        let model = engine.load_model(path).await?;
        engine.infer_batch(&model, inputs).await
    }
}

/// A bound on the tokens of an input, without its tokenizer: a token is a byte at least, and one
/// or two are added.
fn most_tokens(input: &InferenceInput) -> usize {
    match input {
        InferenceInput::Text(text) | InferenceInput::Rendered(text) => text.len() + 2,
        InferenceInput::Tokens(tokens) => tokens.len(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn builtin() -> ModelConfig {
        source::open(Path::new("builtin")).unwrap().config().clone()
    }

    #[test]
    fn the_batch_follows_memory_and_load() {
        let model = builtin();
        let choose = |memory: u64, busy, inputs, longest| {
            let conditions = Conditions { available_memory: memory, cores: 8, busy_cores: busy };
            let config = conditions.config(&model, inputs, longest).unwrap();
            config.validate().unwrap();
            (config.batch_size, config.threads.unwrap())
        };
        // 2 heads of 64 features, keys and values in f16: 512 bytes a token and layer; blocks of
        // 32 tokens; 16,384 bytes of logits.
        let one = 2 * (32 * 512 * model.num_hidden_layers as u64 + 16_384);
        assert_eq!(choose(10 * one, 0.0, 100, 32), (10, 8));
        assert_eq!(choose(10 * one, 0.0, 3, 32), (3, 8), "no more than there are");
        assert_eq!(choose(10 * one, 0.0, 100, 64), (5, 8), "longer inputs, smaller batches");
        assert_eq!(choose(u64::MAX / 4, 0.0, 5000, 32), (MAX_BATCH, 8));
        assert_eq!(choose(10 * one, 2.6, 100, 32), (10, 5), "others keep cores busy");
        assert_eq!(choose(10 * one, 99.0, 100, 32), (10, 1));
        let none = Conditions { available_memory: one / 2, cores: 1, busy_cores: 0.0 };
        let error = none.config(&model, 1, 32).unwrap_err();
        assert!(matches!(error, InferenceError::Memory { .. }), "{error}");
    }

    #[test]
    fn results_keep_their_order_and_bits() {
        let inputs: Vec<InferenceInput> =
            (1..20u32).map(|n| InferenceInput::Tokens((n..2 * n).collect())).collect();
        let together =
            futures::executor::block_on(InferenceEngine::smart_infer("builtin", &inputs)).unwrap();
        assert_eq!(together.len(), inputs.len());
        for (input, output) in inputs.iter().zip(&together) {
            let alone = InferenceEngine::quick_infer("builtin", input);
            assert!(futures::executor::block_on(alone).unwrap().logits == output.logits);
        }
    }

    #[test]
    fn nothing_in_nothing_out() {
        let none = InferenceEngine::smart_infer("no such file", &[]);
        assert!(futures::executor::block_on(none).unwrap().is_empty());
        let inputs = ["text".into()];
        let missing = InferenceEngine::smart_infer("no such file", &inputs);
        assert!(matches!(futures::executor::block_on(missing), Err(InferenceError::Model { .. })));
    }
}

//! Looks at a model in training through the engine that will run it: bits per byte of held-out text,
//! and continuations.

use std::ops::ControlFlow;
use std::path::Path;

use bitnet_inference::eval::{EvalMode, EvalOptions, Evaluation, evaluate};
use bitnet_inference::{EngineConfig, GenerationOptions, InferenceEngine, KvType, MemorySize};
use bitnet_quant::Checkpoint;
use serde::{Deserialize, Serialize};

use crate::error::Result;
use crate::export;
use crate::model::Model;
use crate::recipe::SampleRecipe;

/// Memory for keys and values where windows need less: holds any prompt of a small model.
const LEAST_KV_BYTES: u64 = 256 << 20;
/// Tokens beside those of a window, as the cache is made of blocks.
const SPARE_TOKENS: usize = 64;

/// How well held-out text is predicted.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
pub struct Measured {
    /// Optimizer steps done.
    pub step: u64,
    /// Bits the model needs for a byte.
    pub bits_per_byte: f64,
    /// Mean negative log-probability of a token.
    pub nats_per_token: f64,
    /// Most tokens that one could be predicted from.
    pub window: usize,
    /// Tokens that counted.
    pub tokens: u64,
    /// Bytes of text they stand for.
    pub bytes: u64,
}

/// A continuation, unedited.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Sampled {
    /// Optimizer steps done.
    pub step: u64,
    /// What was to be continued.
    pub prompt: String,
    /// The continuation.
    pub text: String,
}

/// A model in training, opened by the engine.
pub(super) struct Probe {
    engine: InferenceEngine,
    model: bitnet_inference::Model,
    step: u64,
}

impl Probe {
    /// Opens `model` as it is after `step`, with the text files of the folder `text`, for windows of
    /// `window` tokens.
    pub(super) fn new(
        model: &Model,
        text: &Path,
        step: u64,
        window: usize,
        threads: usize,
    ) -> Result<Self> {
        Self::open(&export::checkpoint(model, "training", text)?, step, window, threads)
    }

    /// Opens a checkpoint of the model.
    pub(super) fn open(
        checkpoint: &Checkpoint,
        step: u64,
        window: usize,
        threads: usize,
    ) -> Result<Self> {
        let config = checkpoint.config();
        // Keys and values in float32: of a window, and more for long prompts where that is little.
        let token_bytes = config.num_hidden_layers * 2 * config.key_width() * size_of::<f32>();
        let window_bytes = (window + SPARE_TOKENS).saturating_mul(token_bytes) as u64;
        let engine = InferenceEngine::with_config(EngineConfig {
            threads: Some(threads),
            kv_type: KvType::F32,
            memory_pool_size: MemorySize::KB(window_bytes.max(LEAST_KV_BYTES).div_ceil(1 << 10)),
            batch_size: 4,
            device: bitnet_inference::Device::Cpu,
            ..EngineConfig::balanced()
        })?;
        let model = engine.load_source_blocking("training", checkpoint)?;
        Ok(Self { engine, model, step })
    }

    /// Measures how well it predicts `text`, in windows of `window` tokens of which all but the first
    /// count. `go_on` hears of every window and may stop early; what was measured is then of no use.
    pub(super) fn measure(
        &self,
        text: &str,
        window: usize,
        go_on: &mut dyn FnMut(&Evaluation) -> bool,
    ) -> Result<Measured> {
        let options = EvalOptions {
            window: Some(window.min(self.model.context_length() - 1)),
            mode: EvalMode::Full,
        };
        let found = evaluate(&self.engine, &self.model, text, &options, &mut |found| {
            if go_on(found) { ControlFlow::Continue(()) } else { ControlFlow::Break(()) }
        })?;
        Ok(Measured {
            step: self.step,
            bits_per_byte: found.bits_per_byte(),
            nats_per_token: found.nats_per_token(),
            window: found.window,
            tokens: found.tokens,
            bytes: found.bytes,
        })
    }

    /// Continues `prompt`; the same `seed` gives the same text.
    pub(super) fn sample(&self, prompt: &str, how: &SampleRecipe, seed: u64) -> Result<Sampled> {
        let options = GenerationOptions::default()
            .max_tokens(how.tokens)
            .temperature(how.temperature)
            .seed(seed);
        let answer = self.engine.generate_blocking(&self.model, prompt, &options)?;
        Ok(Sampled { step: self.step, prompt: prompt.to_owned(), text: answer.text })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::model::Precision;
    use crate::recipe::ModelRecipe;
    use bitnet_inference::source;
    use bitnet_quant::convert;

    #[test]
    fn a_window_fits_whatever_its_keys_and_values_take() {
        let folder = tempfile::tempdir().unwrap();
        convert::write_text(&source::open(Path::new("builtin")).unwrap(), folder.path(), true)
            .unwrap();
        let (recipe, window) = (ModelRecipe::default(), 10_000);
        let recipe = ModelRecipe {
            intermediate_size: Some(64),
            num_hidden_layers: Some(16),
            num_key_value_heads: Some(4),
            ..recipe
        };
        let config = recipe.config("wide", 4096, window).unwrap();
        // 32 KiB a token: more than the least memory.
        assert!(window as u64 * 16 * 2 * 256 * 4 > LEAST_KV_BYTES);
        let model = Model::new(config, Precision::Ternary, 0).unwrap();
        let probe = Probe::new(&model, folder.path(), 0, window, 1).unwrap();
        assert_eq!(probe.model.context_length(), window);
    }
}

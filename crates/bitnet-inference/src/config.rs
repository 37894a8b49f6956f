//! How an engine is set up: every setting, its range, and the profiles that choose them.

use std::path::PathBuf;

use bitnet_core::backend::{KvSpec, KvType};
use bitnet_quant::config::ModelConfig;

use crate::device::Device;
use crate::error::{InferenceError, Result};
use crate::scheduler::StepLimits;

/// An amount of memory. `MemorySize::GB(2)` is 2 GiB.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum MemorySize {
    /// Kibibytes.
    KB(u64),
    /// Mebibytes.
    MB(u64),
    /// Gibibytes.
    GB(u64),
}

impl MemorySize {
    /// The amount in bytes, at most `u64::MAX`.
    pub const fn bytes(self) -> u64 {
        match self {
            Self::KB(n) => n.saturating_mul(1 << 10),
            Self::MB(n) => n.saturating_mul(1 << 20),
            Self::GB(n) => n.saturating_mul(1 << 30),
        }
    }
}

/// How much memory and waiting is spent on speed. The tokens never depend on it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum OptimizationLevel {
    /// Least memory: prompts in chunks of 64 tokens.
    Minimal,
    /// Prompts in chunks of 256 tokens.
    #[default]
    Balanced,
    /// Prompts in chunks of 512 tokens, and repeated text is guessed from the prompt and verified
    /// several tokens at a time.
    Aggressive,
}

impl OptimizationLevel {
    /// Prompt tokens computed in one step.
    pub const fn prefill_chunk(self) -> usize {
        match self {
            Self::Minimal => 64,
            Self::Balanced => 256,
            Self::Aggressive => 512,
        }
    }
}

/// Every setting of an engine.
#[derive(Debug, Clone, PartialEq)]
pub struct EngineConfig {
    /// Where models run. [`Device::Auto`] leaves the choice to the environment variable
    /// `BITNET_DEVICE` (names in order, commas between them) and then to this machine.
    pub device: Device,
    /// Devices to try in this order; unless empty, it stands above `device` and the environment.
    pub device_order: Vec<Device>,
    /// An absent device is an error instead of a warning, and no other device takes over for one
    /// that fails.
    pub strict_device: bool,
    /// CPU threads; `None`: one for each physical core.
    pub threads: Option<usize>,
    /// CPU kernel by name; `None`: `BITNET_KERNEL`, or the best this CPU has.
    pub kernel: Option<String>,
    /// Memory and time spent on speed.
    pub optimization_level: OptimizationLevel,
    /// Sequences that share a step.
    pub batch_size: usize,
    /// Number format of cached keys and values.
    pub kv_type: KvType,
    /// Bytes for the KV cache of a model. It is reserved, and taken from the system as it fills.
    pub memory_pool_size: MemorySize,
    /// Longest sequence; `None`: what the model was made for.
    pub context_length: Option<usize>,
    /// Requests that may wait for a model; one more is refused.
    pub max_waiting: usize,
    /// A smaller model with the same vocabulary, whose guesses the model verifies.
    pub draft_model: Option<PathBuf>,
    /// Models kept loaded.
    pub max_cached_models: usize,
    /// Bytes of weights kept loaded. The model in use is always kept.
    pub max_cached_bytes: MemorySize,
}

/// Tokens in a block of the KV cache.
pub(crate) const BLOCK_TOKENS: usize = 32;

/// Prompt tokens beside decoding sequences: a bound on the gap between the tokens of a stream.
const PREFILL_BESIDE_DECODE: usize = 128;

/// Bytes of logits one step may produce for requests that want them after every token.
const LOGIT_BYTES: usize = 64 << 20;

impl EngineConfig {
    /// Chunks of 256 prompt tokens, 16 sequences a step, 2 GiB of f16 KV cache, 4 models.
    pub fn balanced() -> Self {
        Self {
            device: Device::Auto,
            device_order: Vec::new(),
            strict_device: false,
            threads: None,
            kernel: None,
            optimization_level: OptimizationLevel::Balanced,
            batch_size: 16,
            kv_type: KvType::F16,
            memory_pool_size: MemorySize::GB(2),
            context_length: None,
            max_waiting: 512,
            draft_model: None,
            max_cached_models: 4,
            max_cached_bytes: MemorySize::GB(8),
        }
    }

    /// As [`balanced`](Self::balanced), with chunks of 512 prompt tokens, verified guesses of
    /// repeated text, 32 sequences a step and 4 GiB of KV cache.
    pub fn optimized_for_speed() -> Self {
        Self {
            optimization_level: OptimizationLevel::Aggressive,
            batch_size: 32,
            memory_pool_size: MemorySize::GB(4),
            ..Self::balanced()
        }
    }

    /// Chunks of 64 prompt tokens, 4 sequences a step, 256 MiB of 8-bit KV cache, 1 model.
    pub fn optimized_for_memory() -> Self {
        Self {
            optimization_level: OptimizationLevel::Minimal,
            batch_size: 4,
            kv_type: KvType::Q8,
            memory_pool_size: MemorySize::MB(256),
            max_cached_models: 1,
            ..Self::balanced()
        }
    }

    /// Refuses settings outside their range.
    pub fn validate(&self) -> Result<()> {
        let range = |field: &str, value: usize, low: usize, high: usize| {
            if (low..=high).contains(&value) {
                return Ok(());
            }
            Err(InferenceError::input(field, format!("{low} to {high}"), value))
        };
        range("batch_size", self.batch_size, 1, 1024)?;
        range("max_waiting", self.max_waiting, 1, 1 << 20)?;
        range("max_cached_models", self.max_cached_models, 1, 1024)?;
        if let Some(threads) = self.threads {
            range("threads", threads, 1, 1024)?;
        }
        if let Some(context_length) = self.context_length {
            range("context_length", context_length, 2, 1 << 24)?;
        }
        let pool = self.memory_pool_size.bytes();
        if !(1 << 20..=1 << 44).contains(&pool) {
            let expected = "1 MiB to 16 TiB";
            return Err(InferenceError::input(
                "memory_pool_size",
                expected,
                format!("{pool} bytes"),
            ));
        }
        Ok(())
    }

    /// Bounds of a step for a vocabulary of this size and sequences of this length.
    pub(crate) fn step_limits(&self, vocab_size: usize, max_positions: usize) -> StepLimits {
        let chunk = self.optimization_level.prefill_chunk();
        StepLimits {
            max_sequences: self.batch_size,
            max_tokens: chunk.max(self.batch_size),
            max_prefill_beside_decode: PREFILL_BESIDE_DECODE.min(chunk),
            max_logit_rows: (LOGIT_BYTES / (4 * vocab_size)).max(1),
            speculate: self.optimization_level == OptimizationLevel::Aggressive,
            max_positions,
        }
    }

    /// The cache of a draft model beside a model's: the same blocks, with its own shape.
    pub(crate) fn draft_kv(&self, draft: &ModelConfig, beside: KvSpec) -> KvSpec {
        KvSpec {
            n_layers: draft.num_hidden_layers,
            n_kv_heads: draft.num_key_value_heads,
            head_dim: draft.head_dim,
            ..beside
        }
    }

    /// The longest sequence asked for, whatever memory allows.
    pub(crate) fn context_of(&self, model: &ModelConfig) -> usize {
        let most = model.max_position_embeddings;
        self.context_length.unwrap_or(most).min(most)
    }

    /// Positions a sequence of this model may reach, and the KV cache that fits the budget.
    pub(crate) fn kv_cache(&self, model: &ModelConfig) -> Result<(usize, KvSpec)> {
        let max_positions = self.context_of(model);
        let mut spec = KvSpec {
            n_layers: model.num_hidden_layers,
            n_kv_heads: model.num_key_value_heads,
            head_dim: model.head_dim,
            block_tokens: BLOCK_TOKENS,
            n_blocks: 0,
            dtype: self.kv_type,
        };
        let budget = self.memory_pool_size.bytes();
        let block_bytes = spec.block_bytes() as u64;
        let wanted = self.batch_size.saturating_mul(max_positions.div_ceil(BLOCK_TOKENS)) as u64;
        spec.n_blocks = wanted.min(budget / block_bytes.max(1)).min(u64::from(u32::MAX)) as usize;
        if spec.n_blocks == 0 {
            return Err(InferenceError::Memory {
                what: format!("one block of {BLOCK_TOKENS} tokens in the KV cache"),
                needed_bytes: block_bytes,
                available_bytes: budget,
            });
        }
        Ok((max_positions.min(spec.n_blocks * BLOCK_TOKENS), spec))
    }
}

impl Default for EngineConfig {
    fn default() -> Self {
        Self::balanced()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn profiles_resolve_as_documented() {
        let balanced = EngineConfig::balanced();
        assert_eq!((balanced.batch_size, balanced.kv_type), (16, KvType::F16));
        assert_eq!(balanced.memory_pool_size, MemorySize::GB(2));
        assert_eq!(balanced.step_limits(1000, 64).max_tokens, 256);
        assert!(!balanced.step_limits(1000, 64).speculate);

        let speed = EngineConfig::optimized_for_speed();
        assert_eq!((speed.batch_size, speed.kv_type), (32, KvType::F16));
        assert_eq!(speed.step_limits(1000, 64).max_tokens, 512);
        assert!(speed.step_limits(1000, 64).speculate);

        let memory = EngineConfig::optimized_for_memory();
        assert_eq!((memory.batch_size, memory.kv_type), (4, KvType::Q8));
        assert_eq!((memory.memory_pool_size, memory.max_cached_models), (MemorySize::MB(256), 1));
        assert_eq!(memory.step_limits(1000, 64).max_tokens, 64);
        for profile in [balanced, speed, memory] {
            profile.validate().unwrap();
        }
    }

    #[test]
    fn nonsense_is_refused_by_name() {
        let refused = |edit: fn(&mut EngineConfig)| {
            let mut config = EngineConfig::balanced();
            edit(&mut config);
            match config.validate() {
                Err(InferenceError::Input { field, .. }) => field,
                other => panic!("{other:?}"),
            }
        };
        assert_eq!(refused(|c| c.batch_size = 0), "batch_size");
        assert_eq!(refused(|c| c.batch_size = usize::MAX), "batch_size");
        assert_eq!(refused(|c| c.threads = Some(0)), "threads");
        assert_eq!(refused(|c| c.context_length = Some(1)), "context_length");
        assert_eq!(refused(|c| c.max_waiting = 0), "max_waiting");
        assert_eq!(refused(|c| c.max_cached_models = 0), "max_cached_models");
        assert_eq!(refused(|c| c.memory_pool_size = MemorySize::KB(1)), "memory_pool_size");
        assert_eq!(refused(|c| c.memory_pool_size = MemorySize::GB(u64::MAX)), "memory_pool_size");
    }
}

//! Settings one by one: the builder of an engine.

use std::path::PathBuf;

use bitnet_core::backend::KvType;

use crate::config::{EngineConfig, MemorySize, OptimizationLevel};
use crate::device::Device;
use crate::engine::InferenceEngine;
use crate::error::Result;

/// Builds an [`InferenceEngine`]; starts from [`EngineConfig::balanced`].
///
/// ```
/// use bitnet_inference::{InferenceEngine, MemorySize, OptimizationLevel};
///
/// let engine = InferenceEngine::builder()
///     .batch_size(32)
///     .memory_pool_size(MemorySize::GB(2))
///     .optimization_level(OptimizationLevel::Aggressive)
///     .build_blocking()?;
/// assert_eq!(engine.config().batch_size, 32);
/// # Ok::<(), bitnet_inference::InferenceError>(())
/// ```
#[derive(Debug, Clone, Default)]
pub struct InferenceEngineBuilder {
    config: EngineConfig,
}

macro_rules! setting {
    ($(#[$doc:meta])* $name:ident: $type:ty) => {
        $(#[$doc])*
        pub fn $name(mut self, $name: $type) -> Self {
            self.config.$name = $name;
            self
        }
    };
}

impl InferenceEngineBuilder {
    /// Starts from other settings than the balanced ones.
    pub fn from_config(config: EngineConfig) -> Self {
        Self { config }
    }

    setting! {
        /// Sequences that share a step, 1 to 1024.
        batch_size: usize
    }
    setting! {
        /// Bytes for the KV cache of a model, 1 MiB to 16 TiB; taken from the system as it fills.
        memory_pool_size: MemorySize
    }
    setting! {
        /// Memory and time spent on speed; tokens never depend on it.
        optimization_level: OptimizationLevel
    }
    setting! {
        /// Where models run; see [`EngineConfig::device`].
        device: Device
    }
    setting! {
        /// Devices to try, best first; stands above [`device`](Self::device).
        device_order: Vec<Device>
    }
    setting! {
        /// An absent device is an error instead of a warning, and no other one takes over for a
        /// device that fails.
        strict_device: bool
    }
    setting! {
        /// Number format of cached keys and values.
        kv_type: KvType
    }
    setting! {
        /// Requests that may wait for a model; one more is refused.
        max_waiting: usize
    }
    setting! {
        /// Models kept loaded.
        max_cached_models: usize
    }
    setting! {
        /// Bytes of weights kept loaded.
        max_cached_bytes: MemorySize
    }

    /// A smaller model with the same vocabulary that guesses ahead; the model verifies its guesses,
    /// so the tokens stay the same.
    pub fn draft_model(mut self, path: impl Into<PathBuf>) -> Self {
        self.config.draft_model = Some(path.into());
        self
    }

    /// Asks for a GPU (`true`) or forbids it (`false`). Absent, the CPU serves and
    /// [`InferenceEngine::warnings`] says so; with [`strict_device`](Self::strict_device) it is an
    /// error.
    pub fn enable_gpu_acceleration(mut self, enable: bool) -> Self {
        self.config.device = if enable { Device::Gpu } else { Device::Cpu };
        self
    }

    /// CPU threads, 1 to 1024; one for each physical core by default.
    pub fn threads(mut self, threads: usize) -> Self {
        self.config.threads = Some(threads);
        self
    }

    /// CPU kernel by name, such as `scalar` or `avx2`; the best this CPU has by default.
    pub fn kernel(mut self, name: impl Into<String>) -> Self {
        self.config.kernel = Some(name.into());
        self
    }

    /// Longest sequence in tokens; what the model was made for by default and at most.
    pub fn context_length(mut self, tokens: usize) -> Self {
        self.config.context_length = Some(tokens);
        self
    }

    /// Checks the settings and builds the engine.
    ///
    /// # Errors
    /// A setting outside its range; an absent device under [`strict_device`](Self::strict_device).
    pub async fn build(self) -> Result<InferenceEngine> {
        self.build_blocking()
    }

    /// Blocking twin of [`build`](Self::build).
    pub fn build_blocking(self) -> Result<InferenceEngine> {
        InferenceEngine::with_config(self.config)
    }
}

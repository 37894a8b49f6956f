//! Which model, and how the engine runs it.

use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use bitnet_core::kernels::Kernels;
use bitnet_inference::{
    BUILTIN_MODEL, Device, EngineConfig, InferenceEngine, InferenceError, KvType, Model,
};
use clap::builder::{OsStringValueParser, TypedValueParser};
use clap::{Args, ValueEnum};

use crate::exit::Usage;
use crate::report;
use crate::term::{Term, Unit};

/// A load shorter than this shows no bar.
const QUIET_LOAD: Duration = Duration::from_millis(300);

/// A set of kernels that this CPU can run; empty for the best.
pub(crate) fn kernel_name(name: &str) -> Result<String, String> {
    if !name.is_empty() {
        Kernels::by_name(name).map_err(|error| error.to_string())?;
    }
    Ok(name.into())
}

/// A path; an empty one, as of a variable that was emptied, is the built-in model.
fn model_path() -> impl TypedValueParser<Value = PathBuf> {
    OsStringValueParser::new().map(|path| match path.is_empty() {
        true => BUILTIN_MODEL.into(),
        false => path.into(),
    })
}

/// Which model.
#[derive(Debug, Clone, Args)]
pub(crate) struct ModelArg {
    /// GGUF file, safetensors file, Hugging Face folder, or 'builtin'
    #[arg(short, long, env = "BITNET_MODEL", default_value = BUILTIN_MODEL, value_parser = model_path())]
    pub(crate) model: PathBuf,
}

/// How the engine runs a model.
#[derive(Debug, Clone, Args)]
#[command(next_help_heading = "Engine")]
pub(crate) struct EngineArgs {
    /// Starting point for all engine settings
    #[arg(long, env = "BITNET_PROFILE", value_enum, default_value = "balanced")]
    pub(crate) profile: Profile,
    /// Where to run: auto, cpu, gpu, mlx, metal or wgpu, or several in the order to try them;
    /// unless 'auto' is among them, nothing else takes over
    #[arg(long, env = "BITNET_DEVICE", default_value = "auto", value_name = "NAME,..",
        value_parser = DeviceOrder::parse)]
    pub(crate) device: DeviceOrder,
    /// CPU threads [default: one for each physical core]
    #[arg(short, long, env = "BITNET_THREADS", value_name = "N")]
    pub(crate) threads: Option<usize>,
    /// CPU kernel, as `bitnet devices` lists them [default: the best this CPU has]
    #[arg(long, env = "BITNET_KERNEL", value_name = "NAME", value_parser = kernel_name)]
    pub(crate) kernel: Option<String>,
    /// Number format of the KV cache [default: f16; q8 in the memory profile]
    #[arg(long, env = "BITNET_KV", value_enum, value_name = "TYPE")]
    pub(crate) kv: Option<KvArg>,
    /// Longest context in tokens [default: what the model was made for]
    #[arg(short, long, env = "BITNET_CTX", value_name = "TOKENS")]
    pub(crate) ctx: Option<usize>,
}

/// Profiles of the engine.
#[derive(Debug, Clone, Copy, ValueEnum)]
pub(crate) enum Profile {
    Balanced,
    Speed,
    Memory,
}

/// Devices in the order to try them.
#[derive(Debug, Clone)]
pub(crate) struct DeviceOrder(Vec<Device>);

impl DeviceOrder {
    fn parse(names: &str) -> Result<Self, String> {
        Device::parse_order(names).map(Self).map_err(|e| e.to_string())
    }
}

/// Number formats of the KV cache.
#[derive(Debug, Clone, Copy, ValueEnum)]
pub(crate) enum KvArg {
    F32,
    F16,
    Q8,
}

impl From<KvArg> for KvType {
    fn from(kv: KvArg) -> Self {
        match kv {
            KvArg::F32 => Self::F32,
            KvArg::F16 => Self::F16,
            KvArg::Q8 => Self::Q8,
        }
    }
}

impl EngineArgs {
    /// The settings asked for, for a command that runs `sequences` at a time.
    pub(crate) fn config(&self, sequences: usize) -> EngineConfig {
        let mut config = match self.profile {
            Profile::Balanced => EngineConfig::balanced(),
            Profile::Speed => EngineConfig::optimized_for_speed(),
            Profile::Memory => EngineConfig::optimized_for_memory(),
        };
        config.device_order = self.device.0.clone();
        // Who names a device on the command line wants that one and no other.
        config.strict_device = !self.device.0.contains(&Device::Auto);
        config.threads = self.threads;
        config.kernel = self.kernel.clone().filter(|name| !name.is_empty());
        config.context_length = self.ctx;
        config.batch_size = sequences;
        config.kv_type = self.kv.map_or(config.kv_type, KvType::from);
        config
    }

    /// Builds an engine and loads `model` into it, with a bar if that takes long.
    pub(crate) fn load(
        &self,
        model: &Path,
        term: &Term,
    ) -> anyhow::Result<(InferenceEngine, Model)> {
        load(self.config(1), model, term)
    }

    /// As [`load`](Self::load), with another default for the KV cache.
    pub(crate) fn load_with_kv(
        &self,
        model: &Path,
        default: KvType,
        term: &Term,
    ) -> anyhow::Result<(InferenceEngine, Model)> {
        let mut config = self.config(1);
        if self.kv.is_none() {
            config.kv_type = default;
        }
        load(config, model, term)
    }
}

/// A smaller model that speeds a generation up.
#[derive(Debug, Clone, Args)]
#[command(next_help_heading = "Engine")]
pub(crate) struct DraftArg {
    /// Let a smaller model with the same vocabulary guess ahead; the text stays the same
    #[arg(long, env = "BITNET_DRAFT", value_name = "MODEL")]
    draft: Option<PathBuf>,
}

impl DraftArg {
    /// As [`EngineArgs::load`], with the draft model beside `model`.
    pub(crate) fn load(
        &self,
        engine: &EngineArgs,
        model: &Path,
        term: &Term,
    ) -> anyhow::Result<(InferenceEngine, Model)> {
        load(EngineConfig { draft_model: self.draft.clone(), ..engine.config(1) }, model, term)
    }
}

fn load(
    config: EngineConfig,
    model: &Path,
    term: &Term,
) -> anyhow::Result<(InferenceEngine, Model)> {
    let engine = InferenceEngine::with_config(config).map_err(as_usage)?;
    for warning in engine.warnings() {
        term.warn(warning);
    }
    let started = Instant::now();
    let mut bar = None;
    let loaded = engine.load_model_with_progress(model, &mut |done, total| {
        if bar.is_none() && started.elapsed() > QUIET_LOAD {
            bar = Some(term.bar("loading", total as u64, Unit::Items));
        }
        if let Some(bar) = &bar {
            bar.set_position(done as u64);
        }
    });
    if let Some(bar) = bar {
        bar.finish_and_clear();
    }
    let loaded = loaded.map_err(explain_missing)?;
    report::moved(&loaded, 0, term);
    report::loaded(&loaded, term);
    Ok((engine, loaded))
}

/// Settings outside their range are a wrong use, not a failure.
pub(crate) fn as_usage(error: InferenceError) -> anyhow::Error {
    match error {
        InferenceError::Input { .. } => Usage::error(error.to_string()),
        other => other.into(),
    }
}

fn explain_missing(error: InferenceError) -> anyhow::Error {
    let missing = |error: &anyhow::Error| {
        error
            .chain()
            .filter_map(|cause| cause.downcast_ref::<std::io::Error>())
            .any(|io| io.kind() == std::io::ErrorKind::NotFound)
    };
    let error = anyhow::Error::new(error);
    match missing(&error) {
        true => anyhow::anyhow!(
            "{error:#}\nexpected a GGUF file, a safetensors file, a model folder, or '{BUILTIN_MODEL}'"
        ),
        false => error,
    }
}

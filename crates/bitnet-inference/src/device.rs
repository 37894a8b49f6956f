//! Which device a model goes to. The one place that knows which backends this build has.

use bitnet_core::backend::{Backend, KvSpec};
use bitnet_core::cpu::CpuBackend;

use crate::backend::InferenceBackend;
use crate::config::{EngineConfig, OptimizationLevel};
use crate::decoder::Decoder;
use crate::error::{InferenceError, Result};
use crate::source::WeightSource;

/// Where a model runs.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
#[non_exhaustive]
pub enum Device {
    /// The best device this build and this machine have.
    #[default]
    Auto,
    /// The CPU, with the best kernels it has.
    Cpu,
    /// A GPU of any kind.
    Gpu,
}

/// What a backend runs with.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct InferenceContext {
    /// The device chosen.
    pub device: Device,
    /// Memory and time spent on speed.
    pub optimization_level: OptimizationLevel,
    /// Sequences that share a step.
    pub batch_size: usize,
}

/// Resolves a preference. Returns the device and a warning if it is not what was asked for.
pub(crate) fn choose(config: &EngineConfig) -> Result<(Device, Option<String>)> {
    match config.device {
        Device::Auto | Device::Cpu => Ok((Device::Cpu, None)),
        Device::Gpu => {
            let reason = "this build has no GPU backend";
            if config.strict_device {
                return Err(InferenceError::Gpu { device: "gpu".into(), reason: reason.into() });
            }
            Ok((Device::Cpu, Some(format!("GPU asked for, but {reason}: running on the CPU"))))
        }
    }
}

/// The shape a model is placed in, chosen before it is loaded.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Placement {
    pub(crate) kv_spec: KvSpec,
    /// Positions a sequence may reach.
    pub(crate) max_positions: usize,
    /// Tokens a step may have.
    pub(crate) max_step_tokens: usize,
}

/// Brings a model onto the chosen device.
pub(crate) fn load(
    config: &EngineConfig,
    source: &dyn WeightSource,
    placement: Placement,
    progress: &mut dyn FnMut(usize, usize),
) -> Result<Box<dyn InferenceBackend>> {
    let backend = CpuBackend::new(config.threads, config.kernel.as_deref())
        .map_err(|e| InferenceError::device("cpu", e))?;
    decoder(backend, source, placement, progress)
}

fn decoder<B: Backend>(
    backend: B,
    source: &dyn WeightSource,
    placement: Placement,
    progress: &mut dyn FnMut(usize, usize),
) -> Result<Box<dyn InferenceBackend>> {
    let Placement { kv_spec, max_positions, max_step_tokens } = placement;
    let decoder =
        Decoder::load(backend, source, kv_spec, max_positions, max_step_tokens, progress)?;
    Ok(Box::new(decoder))
}

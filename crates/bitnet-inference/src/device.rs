//! Which device a model goes to. The one place that knows which backends this build has.
//!
//! `choice` decides by rules; this file knows how each device is found and loaded. A new backend is
//! a member of [`Device`], a line of `find` and a line of `open`.

mod choice;
#[cfg(all(test, feature = "mlx"))]
mod mlx_tests;

use bitnet_core::backend::{Backend, FoundDevice, KvSpec};
use bitnet_core::cpu::CpuBackend;
use bitnet_core::memory::system::total_memory;

use crate::backend::InferenceBackend;
use crate::config::{EngineConfig, OptimizationLevel};
use crate::decoder::Decoder;
use crate::error::{InferenceError, Result};
use crate::source::WeightSource;

pub(crate) use choice::{Choice, choose};

/// Where a model runs.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Default)]
#[non_exhaustive]
pub enum Device {
    /// The first of MLX, Metal, wgpu and CPU that this build and this machine have and that is
    /// faster than the CPU.
    #[default]
    Auto,
    /// The CPU, with the best kernels it has.
    Cpu,
    /// As [`Auto`](Self::Auto), the CPU excepted.
    Gpu,
    /// Apple's MLX, through mlx-c.
    Mlx,
    /// Apple's Metal.
    Metal,
    /// Vulkan, Metal or Direct3D 12 through wgpu. Named, it may also be a renderer in software.
    Wgpu,
}

/// The order in which [`Device::Auto`] looks for devices.
pub const DEFAULT_ORDER: [Device; 4] = [Device::Mlx, Device::Metal, Device::Wgpu, Device::Cpu];

impl Device {
    /// Its name in flags, environment and reports.
    pub const fn name(self) -> &'static str {
        match self {
            Self::Auto => "auto",
            Self::Cpu => "cpu",
            Self::Gpu => "gpu",
            Self::Mlx => "mlx",
            Self::Metal => "metal",
            Self::Wgpu => "wgpu",
        }
    }

    /// Reads names with commas between them: an order to try devices in.
    ///
    /// # Errors
    /// [`InferenceError::Input`] for an unknown name or an empty list.
    pub fn parse_order(names: &str) -> Result<Vec<Self>> {
        const ALL: [Device; 6] =
            [Device::Auto, Device::Cpu, Device::Gpu, Device::Mlx, Device::Metal, Device::Wgpu];
        names
            .split(',')
            .map(|name| {
                let name = name.trim();
                ALL.into_iter().find(|device| device.name().eq_ignore_ascii_case(name)).ok_or_else(
                    || {
                        let expected = ALL.map(Self::name).join(", ");
                        InferenceError::input("device", format!("one of {expected}"), name)
                    },
                )
            })
            .collect()
    }
}

impl std::fmt::Display for Device {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(self.name())
    }
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

/// A device in an overview: what is there, or why nothing is.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct DeviceReport {
    /// Which one.
    pub device: Device,
    /// The hardware found, or the reason why there is none.
    pub found: Result<FoundDevice, String>,
}

/// All devices in the order in which [`Device::Auto`] tries them.
pub fn devices() -> Vec<DeviceReport> {
    DEFAULT_ORDER.map(|device| DeviceReport { device, found: find(device) }).to_vec()
}

/// The device [`Device::Auto`] is on this machine.
pub fn default_device() -> Device {
    choice::best(&find)
}

/// Whether this build has the Metal backend and this machine a Metal device.
pub fn is_metal_available() -> bool {
    find(Device::Metal).is_ok()
}

/// Whether this build has the MLX backend and MLX can be loaded here.
pub fn is_mlx_available() -> bool {
    find(Device::Mlx).is_ok()
}

/// Looks for a device; the error is the reason why it cannot be used.
fn find(device: Device) -> Result<FoundDevice, String> {
    match device {
        Device::Cpu => {
            let cpu = CpuBackend::new(Some(1), None).map_err(|e| e.to_string())?.device();
            Ok(FoundDevice {
                hardware: cpu.hardware,
                driver: None,
                memory_bytes: total_memory(),
                unified_memory: true,
                accelerates: true,
            })
        }
        #[cfg(feature = "wgpu")]
        Device::Wgpu => bitnet_wgpu::find().map_err(reason),
        #[cfg(all(feature = "metal", target_os = "macos"))]
        Device::Metal => bitnet_metal::find().map_err(reason),
        #[cfg(feature = "mlx")]
        Device::Mlx => bitnet_mlx::find().map_err(reason),
        other => Err(absent(other)),
    }
}

/// What went wrong, without the name of the device, which the caller says.
#[cfg(any(feature = "mlx", feature = "wgpu", all(feature = "metal", target_os = "macos")))]
fn reason(error: bitnet_core::Error) -> String {
    match error {
        bitnet_core::Error::Device { reason, .. } => reason,
        other => other.to_string(),
    }
}

/// Why a device that no line of [`find`] looks for is not here.
fn absent(device: Device) -> String {
    match device {
        Device::Metal | Device::Mlx if !cfg!(target_vendor = "apple") => {
            format!("this build has no {device} backend, and this is no Apple system")
        }
        other => format!("this build has no {other} backend"),
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

/// A model on its device, and what did not go as asked on the way there.
pub(crate) struct Loaded {
    pub(crate) backend: Box<dyn InferenceBackend>,
    /// Devices that were there but did not take the model.
    pub(crate) warnings: Vec<String>,
}

/// Brings a model onto the first device of the choice that takes it.
pub(crate) fn load(
    config: &EngineConfig,
    choice: &Choice,
    source: &dyn WeightSource,
    placement: Placement,
    progress: &mut dyn FnMut(usize, usize),
) -> Result<Loaded> {
    let open = |device| open(device, config, source, placement, progress);
    choice.first_that_works(open).map(|(backend, warnings)| Loaded { backend, warnings })
}

/// Brings a model onto this device.
pub(crate) fn open(
    device: Device,
    config: &EngineConfig,
    source: &dyn WeightSource,
    placement: Placement,
    progress: &mut dyn FnMut(usize, usize),
) -> Result<Box<dyn InferenceBackend>> {
    match device {
        Device::Cpu => {
            let backend = CpuBackend::new(config.threads, config.kernel.as_deref())
                .map_err(|e| InferenceError::device("cpu", e))?;
            decoder(backend, source, placement, progress)
        }
        #[cfg(feature = "wgpu")]
        Device::Wgpu => {
            let backend = bitnet_wgpu::WgpuBackend::new();
            let backend = backend.map_err(|e| InferenceError::device("wgpu", e))?;
            decoder(backend, source, placement, progress)
        }
        #[cfg(all(feature = "metal", target_os = "macos"))]
        Device::Metal => {
            let backend = bitnet_metal::open().map_err(|e| InferenceError::device("metal", e))?;
            decoder(backend, source, placement, progress)
        }
        #[cfg(feature = "mlx")]
        Device::Mlx => {
            let backend = bitnet_mlx::MlxBackend::new();
            let backend = backend.map_err(|e| InferenceError::device("mlx", e))?;
            decoder(backend, source, placement, progress)
        }
        other => Err(InferenceError::Gpu { device: other.to_string(), reason: absent(other) }),
    }
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
    source.release();
    Ok(Box::new(decoder))
}

//! Finds an adapter, opens it, makes buffers on it, and notices when it is lost.

use std::collections::HashMap;
use std::future::Future;
use std::pin::pin;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, OnceLock};
use std::task::{Context, Poll, Waker};

use bitnet_core::backend::FoundDevice;
use bitnet_core::{Error, Result};
use wgpu::{Adapter, DeviceType, Features};

use crate::memory_size;
use crate::pipeline::{Kernel, Pipeline};

/// The name of this backend in reports and errors.
pub(crate) const NAME: &str = "wgpu";
/// Bytes of the largest parameter block of a kernel.
const IMMEDIATE_BYTES: u32 = 64;

/// What a backend uses of what its device has.
#[derive(Debug, Clone, Copy)]
pub struct Options {
    /// Fold sums inside subgroups, where the device has them.
    pub subgroups: bool,
    /// Read half-precision weights natively, where the device can.
    pub half_precision: bool,
    /// Let the host reach what kernels read, where both have one memory: weights are written and
    /// logits read in place.
    pub in_place: bool,
    /// Bytes one binding may have, if less than the device allows: weights above it are split.
    pub max_binding_bytes: u64,
}

impl Default for Options {
    /// All the device has.
    fn default() -> Self {
        Self { subgroups: true, half_precision: true, in_place: true, max_binding_bytes: u64::MAX }
    }
}

/// A device error with a reason.
pub(crate) fn failed(reason: impl Into<String>) -> Error {
    Error::Device { device: NAME.into(), reason: reason.into() }
}

/// Looks for the best adapter of this machine that has what the backend needs.
///
/// # Errors
/// [`Error::Device`] with the reason if there is none.
pub fn find() -> Result<FoundDevice> {
    // Drivers take a while to look; what they find does not change while a program runs.
    static FOUND: OnceLock<Result<FoundDevice>> = OnceLock::new();
    FOUND.get_or_init(|| best_adapter().map(|adapter| describe(&adapter))).clone()
}

fn describe(adapter: &Adapter) -> FoundDevice {
    let info = adapter.get_info();
    let version = match info.driver_info.is_empty() {
        true => info.driver.clone(),
        false => format!("{} {}", info.driver, info.driver_info),
    };
    FoundDevice {
        driver: Some(format!("{:?}, {}", info.backend, version.trim())),
        memory_bytes: memory_size::of(adapter),
        unified_memory: is_unified(&info),
        accelerates: info.device_type != DeviceType::Cpu,
        hardware: info.name,
    }
}

/// Whether its memory is the CPU's.
fn is_unified(info: &wgpu::AdapterInfo) -> bool {
    matches!(info.device_type, DeviceType::IntegratedGpu | DeviceType::Cpu)
}

fn best_adapter() -> Result<Adapter> {
    let instance = wgpu::Instance::new(wgpu::InstanceDescriptor {
        backends: wgpu::Backends::VULKAN | wgpu::Backends::METAL | wgpu::Backends::DX12,
        ..wgpu::InstanceDescriptor::new_without_display_handle_from_env()
    });
    let adapters = ready(instance.enumerate_adapters(wgpu::Backends::all()))?;
    let rank = |adapter: &Adapter| match adapter.get_info().device_type {
        DeviceType::DiscreteGpu => 0,
        DeviceType::IntegratedGpu => 1,
        DeviceType::VirtualGpu => 2,
        DeviceType::Other => 3,
        DeviceType::Cpu => 4,
    };
    let mut reason = "no Vulkan, Metal or Direct3D 12 driver has a device".to_owned();
    let usable = adapters.into_iter().filter(|adapter| match missing(adapter) {
        None => true,
        Some(what) => {
            reason = format!("{} lacks {what}", adapter.get_info().name);
            false
        }
    });
    usable.min_by_key(rank).ok_or_else(|| failed(reason))
}

/// What the backend needs and this adapter does not have.
fn missing(adapter: &Adapter) -> Option<&'static str> {
    let limits = adapter.limits();
    if !adapter.features().contains(Features::IMMEDIATES)
        || limits.max_immediate_size < IMMEDIATE_BYTES
    {
        return Some("immediate data");
    }
    (limits.max_compute_invocations_per_workgroup < 256
        || limits.max_compute_workgroup_storage_size < 16 << 10
        || limits.max_storage_buffers_per_shader_stage < 8)
        .then_some("compute shaders of the size needed")
}

/// The first error of a device, kept for whoever asks next.
#[derive(Debug, Default)]
struct Trouble(Mutex<Option<String>>);

impl Trouble {
    fn note(&self, reason: String) {
        self.0.lock().unwrap_or_else(|e| e.into_inner()).get_or_insert(reason);
    }
}

/// An open device.
pub(crate) struct Gpu {
    pub(crate) device: wgpu::Device,
    pub(crate) queue: wgpu::Queue,
    pub(crate) info: wgpu::AdapterInfo,
    pub(crate) subgroups: bool,
    pub(crate) half_precision: bool,
    /// Whether the host reaches every buffer.
    pub(crate) in_place: bool,
    /// Bytes one binding of weights may have.
    pub(crate) max_binding_bytes: u64,
    max_buffer_bytes: u64,
    /// All of the device's memory, where the driver tells.
    pub(crate) memory_bytes: Option<u64>,
    /// Kernels compiled by any backend of this device.
    pub(crate) compiled: Mutex<HashMap<Kernel, Arc<Pipeline>>>,
    trouble: Arc<Trouble>,
    next_buffer: AtomicU64,
}

/// A buffer with a number of its own, by which bindings are found again.
#[derive(Debug)]
pub struct GpuBuffer {
    pub(crate) raw: wgpu::Buffer,
    pub(crate) id: u64,
}

impl Gpu {
    /// Opens the best adapter.
    pub(crate) fn open(options: Options) -> Result<Self> {
        let adapter = best_adapter()?;
        let info = adapter.get_info();
        let optional = [
            (options.subgroups, Features::SUBGROUP),
            (options.half_precision, Features::SHADER_F16),
            // On other devices such buffers would lie in the CPU's memory, far from the kernels.
            (options.in_place && is_unified(&info), Features::MAPPABLE_PRIMARY_BUFFERS),
        ];
        let available = adapter.features();
        let mut features = Features::IMMEDIATES;
        for (wanted, feature) in optional {
            if wanted && available.contains(feature) {
                features |= feature;
            }
        }
        let limits = adapter.limits();
        let descriptor = wgpu::DeviceDescriptor {
            label: Some("bitnet"),
            required_features: features,
            required_limits: limits.clone(),
            memory_hints: wgpu::MemoryHints::MemoryUsage,
            ..Default::default()
        };
        let (device, queue) = ready(adapter.request_device(&descriptor))?
            .map_err(|e| failed(format!("the device cannot be opened: {e}")))?;
        let max_buffer_bytes =
            limits.max_storage_buffer_binding_size.min(limits.max_buffer_size) / 16 * 16;
        let trouble = Arc::new(Trouble::default());
        let lost = trouble.clone();
        device.set_device_lost_callback(move |reason, message| {
            lost.note(format!("the device was lost ({reason:?}): {message}"));
        });
        let wrong = trouble.clone();
        device.on_uncaptured_error(Arc::new(move |error: wgpu::Error| {
            wrong.note(error.to_string());
        }));
        Ok(Self {
            subgroups: features.contains(Features::SUBGROUP),
            half_precision: features.contains(Features::SHADER_F16),
            in_place: features.contains(Features::MAPPABLE_PRIMARY_BUFFERS),
            max_binding_bytes: options.max_binding_bytes.min(max_buffer_bytes),
            max_buffer_bytes,
            memory_bytes: memory_size::of(&adapter),
            info,
            device,
            queue,
            compiled: Mutex::default(),
            trouble,
            next_buffer: AtomicU64::new(0),
        })
    }

    /// Bytes a buffer may have, so that one binding can show all of it.
    pub(crate) fn max_buffer_bytes(&self) -> u64 {
        self.max_buffer_bytes
    }

    /// The first thing that went wrong on this device, if anything did.
    pub(crate) fn check(&self) -> Result<()> {
        match &*self.trouble.0.lock().unwrap_or_else(|e| e.into_inner()) {
            Some(reason) => Err(failed(reason.clone())),
            None => Ok(()),
        }
    }

    /// A buffer for `usage` of `bytes` bytes.
    ///
    /// # Errors
    /// [`Error::OutOfMemory`] if the device has no room or no buffers of this size.
    pub(crate) fn allocate(&self, bytes: u64, usage: wgpu::BufferUsages) -> Result<GpuBuffer> {
        let full = || Error::OutOfMemory { what: "a buffer on the device".into(), bytes };
        if bytes > self.max_buffer_bytes {
            return Err(full());
        }
        self.check()?;
        let scope = self.device.push_error_scope(wgpu::ErrorFilter::OutOfMemory);
        let raw = self.device.create_buffer(&wgpu::BufferDescriptor {
            label: None,
            size: bytes,
            usage,
            mapped_at_creation: false,
        });
        if ready(scope.pop())?.is_some() {
            return Err(full());
        }
        self.check()?;
        Ok(GpuBuffer { raw, id: self.next_buffer.fetch_add(1, Ordering::Relaxed) })
    }

    /// Writes `data` to a buffer, before anything that is submitted from now on.
    pub(crate) fn write(&self, buffer: &GpuBuffer, offset: u64, data: &[u8]) {
        self.queue.write_buffer(&buffer.raw, offset, data);
    }
}

/// The result of a future that is ready when it is made, as all of wgpu's are on native devices.
pub(crate) fn ready<T>(future: impl Future<Output = T>) -> Result<T> {
    match pin!(future).poll(&mut Context::from_waker(Waker::noop())) {
        Poll::Ready(value) => Ok(value),
        Poll::Pending => Err(failed("an answer of the driver did not come")),
    }
}

//! Apple's Metal API as a [`Driver`]: shared memory, pipelines made once, a command buffer a step.
//!
//! Buffers are in shared storage: what the host writes is what the device reads, without a copy.
//! Dispatches of one encoder may overlap except where one is to see what others wrote: a barrier
//! stands there. Knows nothing of what kernels compute.

use crate::backend::MetalBackend;
use crate::driver::{Dispatch, Driver};
use crate::kernels::{Kernel, source};
use bitnet_core::backend::FoundDevice;
use bitnet_core::memory::{
    BufferKind, Completion, CopySide, DeviceBufferHandle, DeviceMemory, MemoryProperties,
};
use bitnet_core::{Error, Result};
use block2::RcBlock;
use objc2::rc::{Retained, autoreleasepool};
use objc2::runtime::ProtocolObject;
use objc2_foundation::{NSError, NSString};
use objc2_metal::{
    MTLBarrierScope, MTLBlitCommandEncoder, MTLBuffer, MTLCommandBuffer, MTLCommandBufferStatus,
    MTLCommandEncoder, MTLCommandQueue, MTLCompileOptions, MTLComputeCommandEncoder,
    MTLComputePipelineState, MTLCreateSystemDefaultDevice, MTLDevice, MTLDispatchType,
    MTLGPUFamily, MTLLibrary, MTLResourceOptions, MTLSize,
};
use std::cell::Cell;
use std::ptr::NonNull;

// The default device is found by a part of Core Graphics.
#[link(name = "CoreGraphics", kind = "framework")]
unsafe extern "C" {}

/// Lengths of buffers are multiples of this.
const ALIGNMENT: u64 = 256;

fn error(reason: impl Into<String>) -> Error {
    Error::Device { device: "metal".into(), reason: reason.into() }
}

fn description(what: &str, error: &NSError) -> Error {
    self::error(format!("{what}: {}", error.localizedDescription()))
}

/// The memory of a Metal device.
#[derive(Clone)]
pub struct AppleMemory {
    device: Retained<ProtocolObject<dyn MTLDevice>>,
    queue: Retained<ProtocolObject<dyn MTLCommandQueue>>,
}

/// A buffer that host and device share.
pub struct AppleBuffer(Retained<ProtocolObject<dyn MTLBuffer>>);

// SAFETY: a buffer belongs to no thread. Its contents are written through `&mut`, and by dispatches and
// copies, which the host waits for before it reads.
unsafe impl Send for AppleBuffer {}
// SAFETY: as above.
unsafe impl Sync for AppleBuffer {}

impl AppleBuffer {
    /// The first of `bytes` bytes at `offset`, if they are inside.
    fn at(&self, offset: u64, bytes: usize) -> Result<NonNull<u8>> {
        let length = self.0.length();
        let start = usize::try_from(offset).unwrap_or(usize::MAX);
        match start.checked_add(bytes).is_some_and(|end| end <= length) {
            // SAFETY: `start` is within the buffer's bytes.
            true => Ok(unsafe { self.0.contents().cast::<u8>().add(start) }),
            false => {
                let got = format!("{bytes} from {offset} on");
                Err(Error::shape("range of a buffer", format!("within {length} bytes"), got))
            }
        }
    }
}

impl DeviceMemory for AppleMemory {
    type Buffer = AppleBuffer;

    fn name(&self) -> &str {
        "metal"
    }

    fn properties(&self) -> MemoryProperties {
        MemoryProperties {
            unified: true,
            suballocates: false,
            alignment: ALIGNMENT,
            max_buffer_bytes: self.device.maxBufferLength() as u64,
            total_bytes: Some(self.device.recommendedMaxWorkingSetSize()),
        }
    }

    fn allocate(&self, bytes: u64, _: BufferKind) -> Result<AppleBuffer> {
        let out_of_memory = || Error::OutOfMemory { what: "metal buffer".into(), bytes };
        let length = usize::try_from(bytes).map_err(|_| out_of_memory())?;
        if length == 0 || length > self.device.maxBufferLength() {
            return Err(out_of_memory());
        }
        let options = MTLResourceOptions::StorageModeShared;
        let buffer = self.device.newBufferWithLength_options(length, options);
        buffer.map(AppleBuffer).ok_or_else(out_of_memory)
    }

    fn write(&self, to: &mut AppleBuffer, offset: u64, bytes: &[u8]) -> Result<()> {
        let start = to.at(offset, bytes.len())?;
        // SAFETY: within the buffer, which is borrowed mutably and which no dispatch still to be done
        // holds: those keep handles, and a buffer with several is not lent mutably.
        unsafe { start.as_ptr().copy_from_nonoverlapping(bytes.as_ptr(), bytes.len()) };
        Ok(())
    }

    fn read(&self, from: &AppleBuffer, offset: u64, out: &mut [u8]) -> Result<()> {
        let start = from.at(offset, out.len())?;
        // SAFETY: within the buffer; the host reads what it has waited for.
        unsafe { start.as_ptr().copy_to_nonoverlapping(out.as_mut_ptr(), out.len()) };
        Ok(())
    }

    fn copy(&self, from: CopySide<Self>, to: CopySide<Self>, bytes: u64) -> Result<Completion> {
        let length = usize::try_from(bytes).unwrap_or(usize::MAX);
        from.buffer.at(from.offset, length)?;
        to.buffer.at(to.offset, length)?;
        autoreleasepool(|_| {
            let command = self.queue.commandBuffer().ok_or_else(|| error("no command buffer"))?;
            let encoder = command.blitCommandEncoder().ok_or_else(|| error("no encoder"))?;
            // SAFETY: both ranges are inside their buffers.
            unsafe {
                encoder.copyFromBuffer_sourceOffset_toBuffer_destinationOffset_size(
                    &from.buffer.0,
                    from.offset as usize,
                    &to.buffer.0,
                    to.offset as usize,
                    length,
                );
            }
            encoder.endEncoding();
            let (signal, completion) = Completion::new();
            // The block may be called once only, and keeps both buffers until then.
            let once = Cell::new(Some((signal, from, to)));
            let done =
                RcBlock::new(move |command: NonNull<ProtocolObject<dyn MTLCommandBuffer>>| {
                    if let Some((signal, _, _)) = once.take() {
                        // SAFETY: Metal passes the command buffer that was completed.
                        signal.finish(outcome(unsafe { command.as_ref() }));
                    }
                });
            // SAFETY: the block is copied by Metal and has the type it asks for.
            unsafe { command.addCompletedHandler(RcBlock::as_ptr(&done)) };
            command.commit();
            Ok(completion)
        })
    }
}

/// How a completed command buffer went.
fn outcome(command: &ProtocolObject<dyn MTLCommandBuffer>) -> Result<()> {
    match command.status() {
        MTLCommandBufferStatus::Completed => Ok(()),
        _ => Err(match command.error() {
            Some(reason) => description("a command buffer", &reason),
            None => error("a command buffer did not complete"),
        }),
    }
}

/// Looks for the system's Metal device.
///
/// # Errors
/// [`Error::Device`] if there is none, or if it lacks what the kernels use.
pub fn find() -> Result<FoundDevice> {
    let device = default_device()?;
    Ok(FoundDevice {
        hardware: device.name().to_string(),
        driver: None,
        memory_bytes: Some(device.recommendedMaxWorkingSetSize()),
        unified_memory: device.hasUnifiedMemory(),
        accelerates: true,
    })
}

/// A backend on the system's Metal device, which may hold as much as the system recommends.
///
/// # Errors
/// As [`AppleDriver::new`] and [`MetalBackend::new`].
pub fn open() -> Result<MetalBackend<AppleDriver>> {
    let driver = AppleDriver::new()?;
    let budget = driver.memory.device.recommendedMaxWorkingSetSize();
    MetalBackend::new(driver, budget)
}

/// A Metal device and its queue.
pub struct AppleDriver {
    memory: AppleMemory,
    /// In the order of [`Kernel::ALL`].
    pipelines: Vec<Retained<ProtocolObject<dyn MTLComputePipelineState>>>,
    open: Option<Open>,
    /// What the open command buffer's dispatches use.
    held: Vec<DeviceBufferHandle<AppleMemory>>,
}

/// A command buffer that is being written.
struct Open {
    command: Retained<ProtocolObject<dyn MTLCommandBuffer>>,
    encoder: Retained<ProtocolObject<dyn MTLComputeCommandEncoder>>,
}

// SAFETY: command buffers and encoders may be used from any thread, by one at a time; the driver
// touches them through `&mut` only.
unsafe impl Send for AppleDriver {}
// SAFETY: through `&` only the device's name and memory are read, which are safe to share.
unsafe impl Sync for AppleDriver {}

impl AppleDriver {
    /// The system's default device, with all kernels compiled for it.
    ///
    /// # Errors
    /// [`Error::Device`] if there is none, if it lacks what the kernels use, or if they do not compile.
    pub fn new() -> Result<Self> {
        let device = default_device()?;
        let queue = device.newCommandQueue().ok_or_else(|| error("no command queue"))?;
        let pipelines = autoreleasepool(|_| compile(&device))?;
        let memory = AppleMemory { device, queue };
        Ok(Self { memory, pipelines, open: None, held: Vec::new() })
    }

    fn open(&mut self) -> Result<&Open> {
        if self.open.is_none() {
            let command = self.memory.queue.commandBuffer();
            let command = command.ok_or_else(|| error("no command buffer"))?;
            let encoder =
                command.computeCommandEncoderWithDispatchType(MTLDispatchType::Concurrent);
            let encoder = encoder.ok_or_else(|| error("no encoder"))?;
            self.open = Some(Open { command, encoder });
        }
        self.open.as_ref().ok_or_else(|| error("no command buffer"))
    }
}

/// The system's default device, if it can run the kernels.
pub(crate) fn default_device() -> Result<Retained<ProtocolObject<dyn MTLDevice>>> {
    let device = MTLCreateSystemDefaultDevice().ok_or_else(|| error("no Metal device"))?;
    // Matrices of simdgroups, and simdgroups of 32 threads.
    match device.supportsFamily(MTLGPUFamily::Apple7) {
        true => Ok(device),
        false => {
            let reason = format!("{} is older than the M1", device.name());
            Err(error(reason))
        }
    }
}

/// Compiles the kernels, in the order of [`Kernel::ALL`].
fn compile(
    device: &ProtocolObject<dyn MTLDevice>,
) -> Result<Vec<Retained<ProtocolObject<dyn MTLComputePipelineState>>>> {
    let options = MTLCompileOptions::new();
    // Sets the safe mode where there are modes, and works before there were.
    #[allow(deprecated)]
    options.setFastMathEnabled(false);
    let library = device
        .newLibraryWithSource_options_error(&NSString::from_str(&source()), Some(&options))
        .map_err(|e| description("the kernels", &e))?;
    let pipeline = |kernel: Kernel| {
        let function = library.newFunctionWithName(&NSString::from_str(kernel.name()));
        let function = function.ok_or_else(|| error(format!("no kernel {}", kernel.name())))?;
        let pipeline = device
            .newComputePipelineStateWithFunction_error(&function)
            .map_err(|e| description(kernel.name(), &e))?;
        let most = pipeline.maxTotalThreadsPerThreadgroup();
        let width = pipeline.threadExecutionWidth();
        if most < kernel.threads() as usize || width != crate::kernels::SIMD as usize {
            return Err(error(format!(
                "{} runs in threadgroups of {most} threads, simdgroups of {width}",
                kernel.name()
            )));
        }
        Ok(pipeline)
    };
    Kernel::ALL.into_iter().map(pipeline).collect()
}

impl Driver for AppleDriver {
    type Memory = AppleMemory;

    fn hardware(&self) -> String {
        self.memory.device.name().to_string()
    }

    fn memory(&self) -> AppleMemory {
        self.memory.clone()
    }

    fn encode(&mut self, dispatch: &Dispatch<'_, AppleMemory>) -> Result<()> {
        autoreleasepool(|_| {
            let pipeline = self.pipelines[dispatch.kernel as usize].clone();
            let encoder = &self.open()?.encoder;
            if !dispatch.beside {
                encoder.memoryBarrierWithScope(MTLBarrierScope::Buffers);
            }
            encoder.setComputePipelineState(&pipeline);
            for (index, handle) in dispatch.buffers.iter().enumerate() {
                let (buffer, offset) = (&handle.buffer().0, handle.offset() as usize);
                // SAFETY: the offset is inside the buffer, which is kept until it has been used;
                // that kernels stay inside it is their affair.
                unsafe { encoder.setBuffer_offset_atIndex(Some(buffer), offset, index) };
            }
            let constants = NonNull::from(dispatch.constants).cast();
            // SAFETY: the constants are copied at once.
            unsafe {
                encoder.setBytes_length_atIndex(
                    constants,
                    dispatch.constants.len(),
                    dispatch.buffers.len(),
                );
            }
            if dispatch.shared_bytes > 0 {
                // SAFETY: kernels with threadgroup memory have it at index 0.
                unsafe {
                    encoder.setThreadgroupMemoryLength_atIndex(dispatch.shared_bytes as usize, 0);
                }
            }
            let [width, height, depth] = dispatch.groups.map(|n| n as usize);
            let threads = dispatch.kernel.threads() as usize;
            encoder.dispatchThreadgroups_threadsPerThreadgroup(
                MTLSize { width, height, depth },
                MTLSize { width: threads, height: 1, depth: 1 },
            );
            self.held.extend(dispatch.buffers.iter().map(|&handle| handle.clone()));
            Ok(())
        })
    }

    fn submit(&mut self) -> Result<()> {
        let Some(Open { command, encoder }) = self.open.take() else { return Ok(()) };
        let result = autoreleasepool(|_| {
            encoder.endEncoding();
            command.commit();
            command.waitUntilCompleted();
            outcome(&command)
        });
        self.held.clear();
        result
    }

    fn abandon(&mut self) {
        if let Some(Open { encoder, .. }) = self.open.take() {
            encoder.endEncoding();
        }
        self.held.clear();
    }
}

impl Drop for AppleDriver {
    fn drop(&mut self) {
        self.abandon();
    }
}

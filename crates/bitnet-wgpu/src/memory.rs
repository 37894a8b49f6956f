//! The device's memory under the pool of bitnet-core. wgpu tracks what happens to whole buffers, so
//! a region is a buffer of its own, and what is given back is used again whole.

use std::ops::Range;
use std::sync::Arc;

use bitnet_core::memory::{
    AccessPattern, BufferKind, Completion, CopySide, DeviceBufferHandle, DeviceMemory,
    EnhancedMemoryPool, GPUMemoryManager, InferenceBuffers, MemoryProperties,
};
use bitnet_core::{Error, Result};
use wgpu::{BufferUsages as Usage, MapMode};

use crate::device::{Gpu, GpuBuffer, NAME, failed};

/// Lengths are multiples of this: four numbers.
const ALIGNMENT: u64 = 16;

/// What kernels may do with a buffer.
const DEVICE: Usage = Usage::STORAGE.union(Usage::COPY_SRC).union(Usage::COPY_DST);

/// Memory of a device.
pub struct WgpuMemory(Arc<Gpu>);

/// A pool of it.
pub(crate) type Pool = EnhancedMemoryPool<WgpuMemory>;
/// A buffer from the pool.
pub(crate) type Region = DeviceBufferHandle<WgpuMemory>;

/// The pool, and copies through staging buffers.
pub(crate) type Manager = GPUMemoryManager<WgpuMemory>;
/// What a step exchanges with the host.
pub(crate) type Exchange = InferenceBuffers<WgpuMemory>;

/// A device's memory, bounded by the device alone.
pub(crate) fn manager(gpu: Arc<Gpu>) -> Manager {
    Manager::new(WgpuMemory(gpu), u64::MAX)
}

/// A region that holds `data`.
pub(crate) fn filled(pool: &Pool, data: &[u8], pattern: AccessPattern) -> Result<Region> {
    let mut region = pool.take((data.len() as u64).max(ALIGNMENT), pattern)?;
    let buffer = region.buffer_mut().ok_or_else(|| failed("a new region has several owners"))?;
    pool.memory().write(buffer, 0, data)?;
    Ok(region)
}

impl WgpuMemory {
    pub(crate) fn gpu(&self) -> &Arc<Gpu> {
        &self.0
    }

    /// Lets the host reach a range of a buffer once the device is done with the buffer; waits for all
    /// that was submitted if it is not.
    fn map(&self, buffer: &GpuBuffer, mode: MapMode, range: Range<u64>) -> Result<()> {
        let (sender, receiver) = std::sync::mpsc::channel();
        buffer.raw.map_async(mode, range, move |result| {
            // The receiver is gone only if a wait below failed, which is an error already.
            let _ = sender.send(result);
        });
        for wait in [false, true] {
            self.poll(wait)?;
            match receiver.try_recv() {
                Ok(Ok(())) => return Ok(()),
                Ok(Err(error)) => return Err(failed(format!("mapping a buffer failed: {error}"))),
                Err(_) => {}
            }
        }
        Err(failed("a buffer was not mapped when the device was done"))
    }
}

fn check(buffer: &GpuBuffer, offset: u64, bytes: u64) -> Result<()> {
    let size = buffer.raw.size();
    match offset.checked_add(bytes).is_some_and(|end| end <= size) {
        true => Ok(()),
        false => {
            let got = format!("{bytes} at {offset}");
            Err(Error::shape("range of a buffer", format!("within {size} bytes"), got))
        }
    }
}

impl DeviceMemory for WgpuMemory {
    type Buffer = GpuBuffer;

    fn name(&self) -> &str {
        NAME
    }

    fn properties(&self) -> MemoryProperties {
        MemoryProperties {
            unified: self.0.in_place,
            suballocates: false,
            alignment: ALIGNMENT,
            max_buffer_bytes: self.0.max_buffer_bytes(),
            total_bytes: self.0.memory_bytes,
        }
    }

    fn allocate(&self, bytes: u64, kind: BufferKind) -> Result<GpuBuffer> {
        let usage = match kind {
            BufferKind::Device if self.0.in_place => DEVICE | Usage::MAP_READ | Usage::MAP_WRITE,
            BufferKind::Device => DEVICE,
            BufferKind::Upload => Usage::MAP_WRITE | Usage::COPY_SRC,
            BufferKind::Readback => Usage::MAP_READ | Usage::COPY_DST,
        };
        self.0.allocate(bytes, usage)
    }

    fn write(&self, to: &mut GpuBuffer, offset: u64, bytes: &[u8]) -> Result<()> {
        check(to, offset, bytes.len() as u64)?;
        if !to.raw.usage().contains(Usage::MAP_WRITE) {
            self.0.write(to, offset, bytes);
            return self.0.check();
        }
        // Pairs of words are mapped; what is around the bytes stays as it is.
        let start = offset / wgpu::MAP_ALIGNMENT * wgpu::MAP_ALIGNMENT;
        let end = (offset + bytes.len() as u64).next_multiple_of(4);
        self.map(to, MapMode::Write, start..end)?;
        {
            let view = to.raw.get_mapped_range_mut(start..end);
            let mut view = view.map_err(|e| failed(format!("a buffer cannot be written: {e}")))?;
            let before = (offset - start) as usize;
            view.slice(before..before + bytes.len()).copy_from_slice(bytes);
        }
        to.raw.unmap();
        Ok(())
    }

    fn read(&self, from: &GpuBuffer, offset: u64, out: &mut [u8]) -> Result<()> {
        let end = offset + out.len() as u64;
        check(from, offset, out.len() as u64)?;
        if !from.raw.usage().contains(Usage::MAP_READ) {
            return Err(failed("the host does not reach this buffer"));
        }
        self.map(from, MapMode::Read, offset..end)?;
        {
            let view = from.raw.get_mapped_range(offset..end);
            let view = view.map_err(|e| failed(format!("results could not be read back: {e}")))?;
            out.copy_from_slice(&view);
        }
        from.raw.unmap();
        Ok(())
    }

    fn copy(&self, from: CopySide<Self>, to: CopySide<Self>, bytes: u64) -> Result<Completion> {
        check(&from.buffer, from.offset, bytes)?;
        check(&to.buffer, to.offset, bytes)?;
        let gpu = &self.0;
        let mut encoder = gpu.device.create_command_encoder(&Default::default());
        let (source, target) = (&from.buffer.raw, &to.buffer.raw);
        encoder.copy_buffer_to_buffer(source, from.offset, target, to.offset, bytes);
        gpu.queue.submit([encoder.finish()]);
        gpu.check()?;
        let (signal, completion) = Completion::new();
        gpu.queue.on_submitted_work_done(move || {
            signal.finish(Ok(()));
            // Buffers live until the copy is done.
            drop((from, to));
        });
        Ok(completion)
    }

    fn poll(&self, wait: bool) -> Result<()> {
        let how = match wait {
            true => wgpu::PollType::wait_indefinitely(),
            false => wgpu::PollType::Poll,
        };
        let polled = self.0.device.poll(how);
        self.0.check()?;
        polled.map(|_| ()).map_err(|e| failed(format!("waiting for the device failed: {e}")))
    }
}

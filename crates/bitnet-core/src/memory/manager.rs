//! A device's memory as a backend uses it: the pool, and copies that leave the host free.
//!
//! With unified memory a region is written in place: no second copy, no waiting. Otherwise bytes go
//! into a staging buffer of the pool and the device copies them while the host goes on; the staging
//! buffer returns to the pool when the device is done with it.

use super::device::{Completion, CopySide, DeviceMemory};
use super::pool::{DeviceBufferHandle, EnhancedMemoryPool};
use super::stats::{MemoryStats, TransferLog, TransferSpan};
use super::strategy::AccessPattern;
use super::sync::{Arc, Mutex, lock};
use crate::error::{Error, Result};
use std::fmt;
use std::time::Instant;

/// Memory of one device; clones are the same manager.
pub struct GPUMemoryManager<M: DeviceMemory> {
    pool: EnhancedMemoryPool<M>,
    log: Arc<Mutex<TransferLog<[DeviceBufferHandle<M>; 2]>>>,
}

impl<M: DeviceMemory> GPUMemoryManager<M> {
    /// Over `memory`, holding at most `budget` bytes.
    pub fn new(memory: M, budget: u64) -> Self {
        Self::over(EnhancedMemoryPool::new(memory, budget))
    }

    /// Over a pool.
    pub fn over(pool: EnhancedMemoryPool<M>) -> Self {
        Self { pool, log: Arc::new(Mutex::new(TransferLog::new())) }
    }

    /// The pool.
    pub fn pool(&self) -> &EnhancedMemoryPool<M> {
        &self.pool
    }

    /// Regions for what a step exchanges with the host.
    ///
    /// # Errors
    /// As [`EnhancedMemoryPool::take`].
    pub fn inference_buffers(
        &self,
        input_bytes: u64,
        output_bytes: u64,
    ) -> Result<InferenceBuffers<M>> {
        Ok(InferenceBuffers {
            input: self.pool.take(input_bytes, AccessPattern::Activations)?,
            output: self.pool.take(output_bytes, AccessPattern::Activations)?,
        })
    }

    /// Starts to copy `bytes` to a region, `offset` bytes from its start, and returns at once. The
    /// bytes have been taken over when this returns. What the device still does with the region is
    /// up to the caller.
    ///
    /// # Errors
    /// [`Error::Shape`] if the bytes do not fit; the errors of the pool and the device.
    pub fn copy_to_gpu_async(
        &self,
        bytes: &[u8],
        to: &mut DeviceBufferHandle<M>,
        offset: u64,
    ) -> Result<Transfer<M>> {
        check(to, offset, bytes.len() as u64)?;
        let started = Instant::now();
        let memory = self.pool.memory();
        let place = to.offset() + offset;
        if memory.properties().unified
            && let Some(buffer) = to.buffer_mut()
        {
            memory.write(buffer, place, bytes)?;
            return Ok(self.transfer(bytes.len(), started, Completion::done(Ok(())), None));
        }
        if bytes.is_empty() {
            return Ok(self.transfer(0, started, Completion::done(Ok(())), None));
        }
        let mut staging = self.pool.take(bytes.len() as u64, AccessPattern::Upload)?;
        let start = staging.offset();
        let buffer = staging.buffer_mut().ok_or_else(|| self.shared_staging())?;
        memory.write(buffer, start, bytes)?;
        let from = CopySide { buffer: staging.shared_buffer(), offset: start };
        let side = CopySide { buffer: to.shared_buffer(), offset: place };
        let completion = memory.copy(from, side, bytes.len() as u64)?;
        Ok(self.transfer(bytes.len(), started, completion, Some([staging, to.clone()])))
    }

    /// Starts to copy `bytes` bytes of a region to the host and returns at once.
    ///
    /// # Errors
    /// As [`copy_to_gpu_async`](Self::copy_to_gpu_async).
    pub fn copy_from_gpu_async(
        &self,
        from: &DeviceBufferHandle<M>,
        offset: u64,
        bytes: u64,
    ) -> Result<Readback<M>> {
        check(from, offset, bytes)?;
        let started = Instant::now();
        let memory = self.pool.memory();
        let place = from.offset() + offset;
        if memory.properties().unified || bytes == 0 {
            let transfer = self.transfer(0, started, Completion::done(Ok(())), None);
            let region = from.clone();
            return Ok(Readback { transfer, region, place, bytes, in_place: true });
        }
        let staging = self.pool.take(bytes, AccessPattern::Readback)?;
        let start = staging.offset();
        let side = CopySide { buffer: from.shared_buffer(), offset: place };
        let to = CopySide { buffer: staging.shared_buffer(), offset: start };
        let completion = memory.copy(side, to, bytes)?;
        let kept = Some([staging.clone(), from.clone()]);
        let transfer = self.transfer(bytes as usize, started, completion, kept);
        Ok(Readback { transfer, region: staging, place: start, bytes, in_place: false })
    }

    fn shared_staging(&self) -> Error {
        let device = self.pool.memory().name().into();
        Error::Device { device, reason: "a staging buffer is not the pool's alone".into() }
    }

    fn transfer(
        &self,
        bytes: usize,
        started: Instant,
        completion: Completion,
        kept: Option<[DeviceBufferHandle<M>; 2]>,
    ) -> Transfer<M> {
        let done;
        {
            let mut log = lock(&self.log);
            match kept {
                Some(kept) => log.start(bytes as u64, started, completion.clone(), kept),
                None if bytes > 0 => log.record_now(bytes as u64, started),
                None => {}
            }
            done = log.sweep();
        }
        drop(done);
        Transfer { manager: self.clone(), completion }
    }

    /// Takes note of the copies that are done.
    fn sweep(&self) {
        let done = lock(&self.log).sweep();
        drop(done);
    }

    /// Waits until every copy that was started is done.
    ///
    /// # Errors
    /// [`Error::Device`] if the device is gone.
    pub fn finish_transfers(&self) -> Result<()> {
        let last = lock(&self.log).last();
        match last {
            Some(completion) => Transfer { manager: self.clone(), completion }.wait(),
            None => Ok(()),
        }
    }

    /// The nine numbers.
    pub fn stats(&self) -> MemoryStats {
        self.sweep();
        let mut stats = self.pool.stats();
        lock(&self.log).fill(&mut stats);
        stats
    }

    /// The last copies that are done, in the order they were started in.
    pub fn transfer_spans(&self) -> Vec<TransferSpan> {
        self.sweep();
        lock(&self.log).spans()
    }
}

fn check<M: DeviceMemory>(region: &DeviceBufferHandle<M>, offset: u64, bytes: u64) -> Result<()> {
    match offset.checked_add(bytes) {
        Some(end) if end <= region.capacity() => Ok(()),
        _ => {
            let want = format!("within a region of {} bytes", region.capacity());
            Err(Error::shape("copy", want, format!("{bytes} bytes from {offset} on")))
        }
    }
}

impl<M: DeviceMemory> Clone for GPUMemoryManager<M> {
    fn clone(&self) -> Self {
        Self { pool: self.pool.clone(), log: self.log.clone() }
    }
}

impl<M: DeviceMemory> fmt::Debug for GPUMemoryManager<M> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("GPUMemoryManager").field("pool", &self.pool).finish_non_exhaustive()
    }
}

/// A copy under way. Dropping it lets the copy go on.
#[must_use = "the copy may not be done yet"]
#[derive(Debug)]
pub struct Transfer<M: DeviceMemory> {
    manager: GPUMemoryManager<M>,
    completion: Completion,
}

impl<M: DeviceMemory> Transfer<M> {
    /// Whether the copy is done, well or not.
    pub fn is_done(&self) -> bool {
        self.completion.outcome().is_some()
    }

    /// Waits until the copy is done.
    ///
    /// # Errors
    /// [`Error::Device`] if the device is gone.
    pub fn wait(self) -> Result<()> {
        if !self.is_done() {
            self.manager.pool.memory().poll(true)?;
        }
        let result = self.completion.block();
        self.manager.sweep();
        result
    }
}

/// A copy to the host under way.
#[must_use = "the bytes have not been read yet"]
#[derive(Debug)]
pub struct Readback<M: DeviceMemory> {
    transfer: Transfer<M>,
    region: DeviceBufferHandle<M>,
    place: u64,
    bytes: u64,
    /// Whether the host reads the region itself, so that reading it is the copy.
    in_place: bool,
}

impl<M: DeviceMemory> Readback<M> {
    /// Whether the bytes are there.
    pub fn is_done(&self) -> bool {
        self.transfer.is_done()
    }

    /// Waits for the bytes and hands them over.
    ///
    /// # Errors
    /// [`Error::Shape`] if `out` has another length; [`Error::Device`] if the device is gone.
    pub fn wait(self, out: &mut [u8]) -> Result<()> {
        if out.len() as u64 != self.bytes {
            return Err(Error::shape("bytes read back", self.bytes, out.len()));
        }
        let manager = self.transfer.manager.clone();
        self.transfer.wait()?;
        let started = Instant::now();
        manager.pool.memory().read(self.region.buffer(), self.place, out)?;
        if self.in_place && !out.is_empty() {
            lock(&manager.log).record_now(self.bytes, started);
        }
        Ok(())
    }
}

/// What a step exchanges with the host, on the device: its inputs, and the results that are wanted.
#[derive(Debug)]
pub struct InferenceBuffers<M: DeviceMemory> {
    /// Tokens, positions and block tables.
    pub input: DeviceBufferHandle<M>,
    /// Logits.
    pub output: DeviceBufferHandle<M>,
}

impl<M: DeviceMemory> InferenceBuffers<M> {
    /// Makes room for so many bytes; whether a region was exchanged for a larger one, whose contents
    /// are arbitrary. To a power of two, so that steps of growing sizes exchange few.
    ///
    /// # Errors
    /// As [`EnhancedMemoryPool::take`].
    pub fn make_room(
        &mut self,
        manager: &GPUMemoryManager<M>,
        input_bytes: u64,
        output_bytes: u64,
    ) -> Result<bool> {
        let mut exchanged = false;
        for (region, bytes) in [(&mut self.input, input_bytes), (&mut self.output, output_bytes)] {
            if bytes > region.bytes() {
                let most = manager.pool.memory().properties().max_buffer_bytes;
                let bytes = bytes.checked_next_power_of_two().unwrap_or(bytes).min(most).max(bytes);
                *region = manager.pool.take(bytes, AccessPattern::Activations)?;
                exchanged = true;
            }
        }
        Ok(exchanged)
    }
}

//! A device for tests whose memory the host does not reach: copies run on a thread of their own, in
//! order, as a card's copy engine does them, and as slowly as the test wants.

use super::device::{BufferKind, Completion, CopySide, DeviceMemory, MemoryProperties, Signal};
use super::host::range;
use crate::error::{Error, Result};
use std::sync::{Mutex, MutexGuard, mpsc};
use std::thread::JoinHandle;
use std::time::Duration;

/// The device. Dropping it waits for its copies.
#[derive(Debug)]
pub struct DiscreteMemory {
    copies: Option<mpsc::Sender<Job>>,
    engine: Option<JoinHandle<()>>,
    /// Buffers still to be had; for devices that run out.
    capacity: Mutex<u64>,
}

/// A buffer of the device.
#[derive(Debug)]
pub struct DiscreteBuffer {
    bytes: Mutex<Vec<u8>>,
    kind: BufferKind,
}

#[derive(Debug)]
struct Job {
    from: (std::sync::Arc<DiscreteBuffer>, u64),
    to: (std::sync::Arc<DiscreteBuffer>, u64),
    bytes: usize,
    signal: Signal,
}

impl DiscreteMemory {
    /// A device that gives `buffers` buffers in its life and takes `delay` for each copy.
    pub fn new(buffers: u64, delay: Duration) -> Self {
        let (copies, jobs) = mpsc::channel::<Job>();
        let engine = std::thread::spawn(move || {
            for Job { from, to, bytes, signal } in jobs {
                std::thread::sleep(delay);
                let copied = run(&from, &to, bytes);
                // The pool reuses a buffer that is its alone, and who waits may look at once.
                drop((from, to));
                signal.finish(copied);
            }
        });
        let capacity = Mutex::new(buffers);
        Self { copies: Some(copies), engine: Some(engine), capacity }
    }

    /// The bytes of a buffer, past the device's interface.
    pub fn peek(buffer: &DiscreteBuffer) -> Vec<u8> {
        buffer.lock().clone()
    }
}

fn run(
    (from, start): &(std::sync::Arc<DiscreteBuffer>, u64),
    (to, place): &(std::sync::Arc<DiscreteBuffer>, u64),
    bytes: usize,
) -> Result<()> {
    let copied = {
        let from = from.lock();
        from[range(from.len(), *start, bytes)?].to_vec()
    };
    let mut to = to.lock();
    let range = range(to.len(), *place, bytes)?;
    to[range].copy_from_slice(&copied);
    Ok(())
}

impl DiscreteBuffer {
    fn lock(&self) -> MutexGuard<'_, Vec<u8>> {
        self.bytes.lock().unwrap_or_else(|poisoned| poisoned.into_inner())
    }

    fn reachable(&self, kind: BufferKind) -> Result<()> {
        match self.kind == kind {
            true => Ok(()),
            false => Err(Error::Device {
                device: "discrete".into(),
                reason: format!("the host does not reach a buffer of kind {:?}", self.kind),
            }),
        }
    }
}

impl DeviceMemory for DiscreteMemory {
    type Buffer = DiscreteBuffer;

    fn name(&self) -> &str {
        "discrete"
    }

    fn properties(&self) -> MemoryProperties {
        MemoryProperties {
            unified: false,
            suballocates: true,
            alignment: 256,
            max_buffer_bytes: 1 << 30,
            total_bytes: None,
        }
    }

    fn allocate(&self, bytes: u64, kind: BufferKind) -> Result<DiscreteBuffer> {
        let mut left = self.capacity.lock().unwrap_or_else(|poisoned| poisoned.into_inner());
        let out_of_memory = || Error::OutOfMemory { what: "discrete".into(), bytes };
        *left = left.checked_sub(1).ok_or_else(out_of_memory)?;
        Ok(DiscreteBuffer { bytes: Mutex::new(vec![0xAA; bytes as usize]), kind })
    }

    fn write(&self, to: &mut DiscreteBuffer, offset: u64, bytes: &[u8]) -> Result<()> {
        to.reachable(BufferKind::Upload)?;
        let mut to = to.lock();
        let range = range(to.len(), offset, bytes.len())?;
        to[range].copy_from_slice(bytes);
        Ok(())
    }

    fn read(&self, from: &DiscreteBuffer, offset: u64, out: &mut [u8]) -> Result<()> {
        from.reachable(BufferKind::Readback)?;
        let from = from.lock();
        out.copy_from_slice(&from[range(from.len(), offset, out.len())?]);
        Ok(())
    }

    fn copy(&self, from: CopySide<Self>, to: CopySide<Self>, bytes: u64) -> Result<Completion> {
        let (signal, completion) = Completion::new();
        let (from, to) = ((from.buffer, from.offset), (to.buffer, to.offset));
        let job = Job { from, to, bytes: bytes as usize, signal };
        let sent = self.copies.as_ref().map(|copies| copies.send(job));
        match sent {
            Some(Ok(())) => Ok(completion),
            _ => Err(Error::Device { device: "discrete".into(), reason: "it is gone".into() }),
        }
    }
}

impl Drop for DiscreteMemory {
    fn drop(&mut self) {
        self.copies = None;
        if let Some(engine) = self.engine.take() {
            let _ = engine.join();
        }
    }
}

//! Records the kernels of a step and submits them together.
//!
//! Between [`Recorder::begin`] and the first read nothing reaches the device but one upload of the
//! step's tokens, positions and block tables. Bindings are found again from step to step, so that
//! recording a token costs look-ups and no allocations on the device.

use std::collections::HashMap;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use bitnet_core::Result;
use bitnet_core::backend::Batch;
use bitnet_core::memory::{AccessPattern, DeviceMemory};

use crate::device::{Gpu, GpuBuffer};
use crate::memory::{Exchange, Manager};
use crate::pipeline::{Kernel, Pipelines};

/// Bindings of a kernel, at most.
const MAX_BINDINGS: usize = 8;

/// What went over to the device and back, counted since the backend was made.
#[derive(Debug, Default)]
pub struct Traffic {
    steps: AtomicU64,
    submissions: AtomicU64,
    dispatches: AtomicU64,
    uploaded: AtomicU64,
    downloaded: AtomicU64,
}

impl Traffic {
    /// Steps of a model.
    pub fn steps(&self) -> u64 {
        self.steps.load(Ordering::Relaxed)
    }

    /// Command buffers handed to the device.
    pub fn submissions(&self) -> u64 {
        self.submissions.load(Ordering::Relaxed)
    }

    /// Kernels started.
    pub fn dispatches(&self) -> u64 {
        self.dispatches.load(Ordering::Relaxed)
    }

    /// Bytes sent to the device during steps; weights are not counted.
    pub fn uploaded_bytes(&self) -> u64 {
        self.uploaded.load(Ordering::Relaxed)
    }

    /// Bytes that came back.
    pub fn downloaded_bytes(&self) -> u64 {
        self.downloaded.load(Ordering::Relaxed)
    }
}

/// Where the parts of a step's description stand in its buffer, in words.
#[derive(Debug, Clone, Copy, Default)]
pub(crate) struct StepLayout {
    pub(crate) n_tokens: u32,
    pub(crate) n_logits: u32,
    /// Tokens, one word each.
    pub(crate) tokens: u32,
    /// Rows, two words each: position, start of the block table.
    pub(crate) rows: u32,
    /// Rows whose logits are wanted.
    pub(crate) logit_rows: u32,
}

/// The commands of the current step.
pub(crate) struct Recorder {
    pub(crate) gpu: Arc<Gpu>,
    pub(crate) memory: Manager,
    pipelines: Pipelines,
    encoder: Option<wgpu::CommandEncoder>,
    pass: Option<wgpu::ComputePass<'static>>,
    bindings: HashMap<(Kernel, [u64; MAX_BINDINGS]), wgpu::BindGroup>,
    /// In: the step's description; out: its logits.
    pub(crate) exchange: Exchange,
    words: Vec<u32>,
    pub(crate) layout: StepLayout,
    traffic: Arc<Traffic>,
}

impl Recorder {
    pub(crate) fn new(gpu: Arc<Gpu>, memory: Manager) -> Result<Self> {
        Ok(Self {
            pipelines: Pipelines::new(&gpu),
            encoder: None,
            pass: None,
            bindings: HashMap::new(),
            exchange: memory.inference_buffers(4096, 4096)?,
            words: Vec::new(),
            layout: StepLayout::default(),
            traffic: Arc::default(),
            gpu,
            memory,
        })
    }

    pub(crate) fn traffic(&self) -> Arc<Traffic> {
        self.traffic.clone()
    }

    /// Starts a step; what an earlier one left unsubmitted after an error is dropped.
    pub(crate) fn begin(&mut self, batch: &Batch) -> Result<()> {
        self.pass = None;
        self.encoder = None;
        self.gpu.check()?;
        let n = batch.tokens.len();
        let words = &mut self.words;
        words.clear();
        words.extend_from_slice(&batch.tokens);
        words.resize(3 * n, 0);
        words.extend(batch.logit_rows.iter().map(|&row| row as u32));
        for slice in &batch.sequences {
            let table = words.len() as u32;
            words.extend_from_slice(&slice.blocks);
            for (i, row) in slice.rows.clone().enumerate() {
                words[n + 2 * row] = (slice.first_position + i) as u32;
                words[n + 2 * row + 1] = table;
            }
        }
        self.layout = StepLayout {
            n_tokens: n as u32,
            n_logits: batch.logit_rows.len() as u32,
            tokens: 0,
            rows: n as u32,
            logit_rows: 3 * n as u32,
        };
        let bytes = 4 * self.words.len() as u64;
        self.make_room(bytes, 0)?;
        self.traffic.steps.fetch_add(1, Ordering::Relaxed);
        self.send(self.exchange.input.buffer(), bytemuck::cast_slice(&self.words));
        Ok(())
    }

    /// Makes room for what the step exchanges with the host.
    pub(crate) fn make_room(&mut self, input_bytes: u64, output_bytes: u64) -> Result<()> {
        if self.exchange.make_room(&self.memory, input_bytes, output_bytes)? {
            self.forget_bindings();
        }
        Ok(())
    }

    /// Sends `bytes` to a buffer that no kernel of this step has been recorded with yet.
    pub(crate) fn send(&self, buffer: &GpuBuffer, bytes: &[u8]) {
        self.gpu.write(buffer, 0, bytes);
        self.traffic.uploaded.fetch_add(bytes.len() as u64, Ordering::Relaxed);
    }

    /// Forgets which bindings were made, so that buffers that are gone free their memory.
    pub(crate) fn forget_bindings(&mut self) {
        self.bindings.clear();
    }

    /// Records a kernel over `grid` workgroups. `buffers` are its bindings in ascending order of
    /// their numbers, `parameters` the words of its parameter block.
    pub(crate) fn dispatch(
        &mut self,
        kernel: Kernel,
        buffers: &[(u32, &GpuBuffer)],
        parameters: &[u32],
        grid: [u32; 2],
    ) -> Result<()> {
        if grid.contains(&0) {
            return Ok(());
        }
        let pipeline = self.pipelines.get(&self.gpu, kernel)?;
        let mut key = [u64::MAX; MAX_BINDINGS];
        for (slot, (_, buffer)) in key.iter_mut().zip(buffers) {
            *slot = buffer.id;
        }
        let gpu = &self.gpu;
        let group = self.bindings.entry((kernel, key)).or_insert_with(|| {
            let entries: Vec<_> = buffers
                .iter()
                .map(|(binding, buffer)| wgpu::BindGroupEntry {
                    binding: *binding,
                    resource: buffer.raw.as_entire_binding(),
                })
                .collect();
            gpu.device.create_bind_group(&wgpu::BindGroupDescriptor {
                label: None,
                layout: &pipeline.layout,
                entries: &entries,
            })
        });
        let encoder = self
            .encoder
            .get_or_insert_with(|| gpu.device.create_command_encoder(&Default::default()));
        let pass = self.pass.get_or_insert_with(|| {
            encoder.begin_compute_pass(&Default::default()).forget_lifetime()
        });
        pass.set_pipeline(&pipeline.raw);
        pass.set_bind_group(0, &*group, &[]);
        pass.set_immediates(0, bytemuck::cast_slice(parameters));
        pass.dispatch_workgroups(grid[0], grid[1], 1);
        self.traffic.dispatches.fetch_add(1, Ordering::Relaxed);
        Ok(())
    }

    /// Submits what was recorded.
    pub(crate) fn submit(&mut self) -> Result<()> {
        self.pass = None;
        if let Some(encoder) = self.encoder.take() {
            self.gpu.queue.submit([encoder.finish()]);
            self.traffic.submissions.fetch_add(1, Ordering::Relaxed);
        }
        self.gpu.check()
    }

    /// Submits what was recorded and waits until it has happened.
    pub(crate) fn finish(&mut self) -> Result<()> {
        if self.encoder.is_none() {
            return self.gpu.check();
        }
        self.submit()?;
        self.memory.pool().memory().poll(true)
    }

    /// Submits what was recorded and appends the first `bytes` bytes of a buffer to `out`.
    pub(crate) fn read(&mut self, buffer: &GpuBuffer, bytes: u64, out: &mut Vec<u8>) -> Result<()> {
        if bytes == 0 {
            return self.finish();
        }
        let start = out.len();
        out.resize(start + bytes as usize, 0);
        let pool = self.memory.pool();
        if pool.memory().properties().unified {
            self.submit()?;
            self.memory.pool().memory().read(buffer, 0, &mut out[start..])?;
        } else {
            let staging = pool.take(bytes, AccessPattern::Readback)?;
            self.pass = None;
            let gpu = &self.gpu;
            let encoder = self
                .encoder
                .get_or_insert_with(|| gpu.device.create_command_encoder(&Default::default()));
            let to = &staging.buffer().raw;
            encoder.copy_buffer_to_buffer(&buffer.raw, 0, to, staging.offset(), bytes);
            self.submit()?;
            let memory = self.memory.pool().memory();
            memory.read(staging.buffer(), staging.offset(), &mut out[start..])?;
        }
        self.traffic.downloaded.fetch_add(bytes, Ordering::Relaxed);
        Ok(())
    }
}

//! What the kernels of a step are told of it: tokens, positions, block tables, and the angles of the
//! rotation. Written once a step, where the device reads it.

use crate::buffer::{Growing, MetalBufferPool};
use bitnet_core::backend::{Batch, SequenceSlice};
use bitnet_core::cpu::CpuRope;
use bitnet_core::memory::{AccessPattern, DeviceMemory};
use bitnet_core::{Error, Result};
use std::sync::Arc;

/// The current step.
pub(crate) struct Step<M: DeviceMemory> {
    pub(crate) tokens: Growing<M>,
    /// `(rows, 2)`: position, and where the row's block table starts in `blocks`.
    pub(crate) places: Growing<M>,
    pub(crate) blocks: Growing<M>,
    pub(crate) logit_rows: Growing<M>,
    /// `(rows, head_dim)`: cosines, then sines.
    pub(crate) angles: Growing<M>,
    /// Whose angles these are; `None` when the step is new.
    angles_of: Option<Arc<CpuRope>>,
    pub(crate) sequences: Vec<SequenceSlice>,
    pub(crate) n_rows: usize,
    pub(crate) n_logit_rows: usize,
    pub(crate) largest_token: u32,
    pub(crate) largest_block: u32,
    /// Positions the longest row sees.
    pub(crate) most_seen: usize,
}

impl<M: DeviceMemory> Step<M> {
    pub(crate) fn new() -> Self {
        let growing = || Growing::new(AccessPattern::Activations);
        Self {
            tokens: growing(),
            places: growing(),
            blocks: growing(),
            logit_rows: growing(),
            angles: growing(),
            angles_of: None,
            sequences: Vec::new(),
            n_rows: 0,
            n_logit_rows: 0,
            largest_token: 0,
            largest_block: 0,
            most_seen: 0,
        }
    }

    /// Takes a batch over; its slices must cover its tokens in order.
    pub(crate) fn begin(&mut self, pool: &MetalBufferPool<M>, batch: &Batch) -> Result<()> {
        let mut places: Vec<[u32; 2]> = Vec::with_capacity(batch.tokens.len());
        let mut blocks: Vec<u32> = Vec::new();
        self.most_seen = 0;
        for slice in &batch.sequences {
            let start = places.len();
            if slice.rows.start != start || slice.rows.is_empty() {
                let want = format!("rows from {start} on, at least one");
                let got = format!("{}..{}", slice.rows.start, slice.rows.end);
                return Err(Error::shape("slice of a batch", want, got));
            }
            let end = slice.first_position.checked_add(slice.rows.len());
            let end = end.filter(|&end| end < i32::MAX as usize).ok_or_else(|| {
                Error::invalid("position", format!("{} is too large", slice.first_position))
            })?;
            let table = blocks.len() as u32;
            places.extend((slice.first_position..end).map(|position| [position as u32, table]));
            blocks.extend_from_slice(&slice.blocks);
            self.most_seen = self.most_seen.max(end);
        }
        let n_rows = batch.tokens.len();
        if places.len() != n_rows || n_rows == 0 {
            let want = format!("{n_rows} rows, at least one");
            return Err(Error::shape("slices of a batch", want, places.len()));
        }
        if let Some(row) = batch.logit_rows.iter().find(|&&row| row >= n_rows) {
            return Err(Error::invalid("logit row", format!("{row} of {n_rows} rows")));
        }
        let logit_rows: Vec<u32> = batch.logit_rows.iter().map(|&row| row as u32).collect();
        self.largest_token = batch.tokens.iter().copied().max().unwrap_or(0);
        self.largest_block = blocks.iter().copied().max().unwrap_or(0);
        self.tokens.fill(pool, bytemuck::cast_slice(&batch.tokens))?;
        self.places.fill(pool, bytemuck::cast_slice(&places))?;
        self.blocks.fill(pool, bytemuck::cast_slice(&blocks))?;
        self.logit_rows.fill(pool, bytemuck::cast_slice(&logit_rows))?;
        self.n_rows = n_rows;
        self.n_logit_rows = logit_rows.len();
        self.sequences.clone_from(&batch.sequences);
        self.angles_of = None;
        Ok(())
    }

    /// Computes the angles of the step's rows unless they are there.
    pub(crate) fn prepare_angles(
        &mut self,
        pool: &MetalBufferPool<M>,
        rope: &Arc<CpuRope>,
    ) -> Result<()> {
        if self.angles_of.as_ref().is_some_and(|of| Arc::ptr_eq(of, rope)) {
            return Ok(());
        }
        let dim = rope.head_dim();
        let mut angles = vec![0.0f32; self.n_rows * dim];
        for slice in &self.sequences {
            for (i, row) in slice.rows.clone().enumerate() {
                rope.angles(slice.first_position + i, &mut angles[row * dim..][..dim]);
            }
        }
        self.angles.fill(pool, bytemuck::cast_slice(&angles))?;
        self.angles_of = Some(rope.clone());
        Ok(())
    }
}

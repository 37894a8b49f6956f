//! The current step: its sequences, and their indices on the device.

use crate::array::Ops;
use crate::memory::{Memory, Placed};
use bitnet_core::backend::{Batch, KvSpec, SequenceSlice, check_batch};
use bitnet_core::{Error, Result};
use std::collections::HashSet;

/// A batch and what it looks like to the operations.
#[derive(Default)]
pub(crate) struct Step {
    pub(crate) batch: Batch,
    /// Rows of its tokens in a table.
    tokens: Option<Placed>,
    /// Positions of its rows.
    positions: Option<Placed>,
    logit_rows: Option<Placed>,
    /// Block table of each sequence.
    blocks: Vec<Placed>,
    /// Slots of its rows in a cache of some shape.
    slots: Option<(usize, usize, Placed)>,
    highest_block: u32,
}

impl Step {
    /// Takes a batch over; the indices go to the device when they are first needed.
    pub(crate) fn begin(&mut self, batch: &Batch) -> Result<()> {
        check_batch(batch)?;
        let last = |slice: &SequenceSlice| slice.first_position + slice.rows.len();
        if batch.sequences.iter().any(|slice| i32::try_from(last(slice)).is_err()) {
            return Err(Error::invalid("position", "more than 32 bits"));
        }
        *self = Self { batch: batch.clone(), ..Self::default() };
        Ok(())
    }

    pub(crate) fn rows(&self) -> usize {
        self.batch.tokens.len()
    }

    /// Indices `(tokens)` into a table of `vocab` rows.
    pub(crate) fn tokens(&mut self, ops: &Ops, memory: &Memory, vocab: usize) -> Result<&Placed> {
        if let Some(token) = self.batch.tokens.iter().find(|&&token| token as usize >= vocab) {
            let reason = format!("{token} of a vocabulary of {vocab}");
            return Err(Error::invalid("token", reason));
        }
        let tokens = &self.batch.tokens;
        placed(&mut self.tokens, ops, memory, || {
            tokens.iter().map(|&t| to_index(t as usize)).collect()
        })
    }

    /// `(tokens)`
    pub(crate) fn positions(&mut self, ops: &Ops, memory: &Memory) -> Result<&Placed> {
        let sequences = &self.batch.sequences;
        placed(&mut self.positions, ops, memory, || {
            let rows = |s: &SequenceSlice| s.first_position..s.first_position + s.rows.len();
            sequences.iter().flat_map(rows).map(to_index).collect()
        })
    }

    /// `(rows with logits)`
    pub(crate) fn logit_rows(&mut self, ops: &Ops, memory: &Memory) -> Result<&Placed> {
        let rows = &self.batch.logit_rows;
        placed(&mut self.logit_rows, ops, memory, || {
            rows.iter().map(|&row| to_index(row)).collect()
        })
    }

    /// Slots `(tokens)` of the rows in a cache, and its highest block in use. Every block is checked
    /// to exist and to have one writer.
    pub(crate) fn slots(
        &mut self,
        ops: &Ops,
        memory: &Memory,
        spec: &KvSpec,
    ) -> Result<(&Placed, u32)> {
        let key = (spec.block_tokens, spec.n_blocks);
        if self.slots.as_ref().is_none_or(|(tokens, blocks, _)| (*tokens, *blocks) != key) {
            let mut written = HashSet::new();
            let mut slots = Vec::with_capacity(self.rows());
            for slice in &self.batch.sequences {
                let end = slice.first_position + slice.rows.len();
                let needed = end.div_ceil(spec.block_tokens);
                if slice.blocks.len() < needed {
                    let want = format!("{needed} blocks");
                    return Err(Error::shape("block table", want, slice.blocks.len()));
                }
                let own = &slice.blocks[..needed];
                if let Some(block) = own.iter().find(|&&block| block as usize >= spec.n_blocks) {
                    let reason = format!("block {block} of a cache of {}", spec.n_blocks);
                    return Err(Error::invalid("block table", reason));
                }
                for &block in &own[slice.first_position / spec.block_tokens..] {
                    if !written.insert(block) {
                        let reason = format!("block {block} is written twice in one step");
                        return Err(Error::invalid("block table", reason));
                    }
                }
                self.highest_block = own.iter().copied().fold(self.highest_block, u32::max);
                slots.extend((slice.first_position..end).map(|position| {
                    let block = own[position / spec.block_tokens] as usize;
                    to_index(block * spec.block_tokens + position % spec.block_tokens)
                }));
            }
            self.blocks = self
                .batch
                .sequences
                .iter()
                .map(|slice| {
                    let end = slice.first_position + slice.rows.len();
                    let own = &slice.blocks[..end.div_ceil(spec.block_tokens)];
                    let indices: Vec<i32> = own.iter().map(|&b| to_index(b as usize)).collect();
                    Placed::indices(ops, memory, &indices)
                })
                .collect::<Result<_>>()?;
            self.slots = Some((key.0, key.1, Placed::indices(ops, memory, &slots)?));
        }
        match &self.slots {
            Some((_, _, slots)) => Ok((slots, self.highest_block)),
            None => Err(Error::invalid("step", "no slots")),
        }
    }

    /// The block table of a sequence, after [`slots`](Self::slots).
    pub(crate) fn blocks(&self, sequence: usize) -> Result<&Placed> {
        let missing = || Error::invalid("attention", "nothing was stored in this step");
        self.blocks.get(sequence).ok_or_else(missing)
    }
}

/// Indices as the device takes them. What is larger was refused before: tables, positions and slots
/// are counted in 32 bits.
fn to_index(index: usize) -> i32 {
    i32::try_from(index).unwrap_or(i32::MAX)
}

fn placed<'a>(
    place: &'a mut Option<Placed>,
    ops: &Ops,
    memory: &Memory,
    indices: impl FnOnce() -> Vec<i32>,
) -> Result<&'a Placed> {
    if place.is_none() {
        *place = Some(Placed::indices(ops, memory, &indices())?);
    }
    place.as_ref().ok_or_else(|| Error::invalid("step", "no indices"))
}

//! The current step: its sequences, and their indices on the device.

use crate::array::{Array, Ops};
use crate::memory::{Memory, Placed};
use bitnet_core::backend::{Batch, KvSpec, SequenceSlice, check_batch};
use bitnet_core::{Error, Result};
use std::collections::HashSet;

/// The indices of a step, those that its operations asked for.
#[derive(Clone, Default)]
pub(crate) struct Indices {
    /// `(tokens)`
    pub(crate) tokens: Option<Array>,
    /// `(tokens)`
    pub(crate) positions: Option<Array>,
    /// `(rows with logits)`
    pub(crate) logit_rows: Option<Array>,
    /// `(tokens)`
    pub(crate) slots: Option<Array>,
    /// Block tables of the sequences.
    pub(crate) blocks: Vec<Array>,
}

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
    /// Whether block tables are longer than needed, so that their lengths are few.
    padded: bool,
}

/// Blocks that a table of `blocks` is padded to: a multiple of 4 and of an eighth of the next power of
/// two, so that a sequence of any length has had few lengths, and no more than a quarter is padding.
fn padded(blocks: usize) -> usize {
    let step = (blocks.next_power_of_two() / 8).max(4);
    blocks.next_multiple_of(step)
}

impl Step {
    /// Takes a batch over; the indices go to the device when they are first needed. Block tables of
    /// [`Step::is_decode`] are padded if `pad`.
    pub(crate) fn begin(&mut self, batch: &Batch, pad: bool) -> Result<()> {
        check_batch(batch)?;
        let last = |slice: &SequenceSlice| slice.first_position + slice.rows.len();
        if batch.sequences.iter().any(|slice| i32::try_from(last(slice)).is_err()) {
            return Err(Error::invalid("position", "more than 32 bits"));
        }
        *self = Self { batch: batch.clone(), ..Self::default() };
        self.padded = pad && self.is_decode();
        Ok(())
    }

    /// Whether every sequence has one token in it.
    pub(crate) fn is_decode(&self) -> bool {
        self.batch.sequences.len() == self.rows()
    }

    /// What of it is on the device.
    pub(crate) fn indices(&self) -> Indices {
        let array = |placed: &Placed| placed.array().clone();
        Indices {
            tokens: self.tokens.as_ref().map(array),
            positions: self.positions.as_ref().map(array),
            logit_rows: self.logit_rows.as_ref().map(array),
            slots: self.slots.as_ref().map(|(_, _, slots)| array(slots)),
            blocks: self.blocks.iter().map(array).collect(),
        }
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

    /// Whether [`slots`](Self::slots) were asked for, for a cache of another shape.
    pub(crate) fn has_other_slots(&self, spec: &KvSpec) -> bool {
        let other = |(tokens, blocks, _): &(usize, usize, Placed)| {
            (*tokens, *blocks) != (spec.block_tokens, spec.n_blocks)
        };
        self.slots.as_ref().is_some_and(other)
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
        if self.slots.is_none() || self.has_other_slots(spec) {
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
                    let mut indices: Vec<i32> = own.iter().map(|&b| to_index(b as usize)).collect();
                    if self.padded {
                        // Its own block, of which nothing is seen there.
                        indices.resize(padded(indices.len()), indices[0]);
                    }
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

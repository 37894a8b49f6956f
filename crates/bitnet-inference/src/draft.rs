//! Guesses by a second, smaller model: draft-model speculation.
//!
//! The draft model shares the block table of the sequences it guesses for, so its cache needs no
//! bookkeeping of its own: it has the same blocks, with its own keys and values in them. It follows
//! each sequence lazily and always takes its likeliest token. A wrong guess, or a cache it has not
//! filled because a prefix was reused, costs time and never a token: the model verifies everything.

use bitnet_core::backend::Batch;

use crate::backend::InferenceBackend;
use crate::kv_blocks::BlockPool;
use crate::sequence::Sequence;

/// Wrong guesses in a row before some steps go without one: a draft model is often wrong once.
pub(crate) const PATIENCE: usize = 3;

/// A draft model on its device.
pub(crate) struct Draft {
    backend: Box<dyn InferenceBackend>,
    vocab_size: usize,
    /// Tokens of one of its steps.
    max_tokens: usize,
    batch: Batch,
    logits: Vec<f32>,
}

impl Draft {
    pub(crate) fn new(
        backend: Box<dyn InferenceBackend>,
        vocab_size: usize,
        max_tokens: usize,
    ) -> Self {
        let batch = Batch { n_best: Some(1), ..Batch::default() };
        Self { backend, vocab_size, max_tokens, batch, logits: Vec::new() }
    }

    /// Lets the draft model guess what follows `sequence`, at most `max` tokens.
    pub(crate) fn guess(
        &mut self,
        sequence: &mut Sequence,
        max: usize,
        pool: &mut BlockPool,
    ) -> bitnet_core::Result<()> {
        // Positions of all tokens known, and of the guesses but the last, which is not computed.
        if max == 0 || !sequence.reserve(sequence.tokens.len() + max, pool) {
            return Ok(());
        }
        while sequence.guess.len() < max {
            let n_known = sequence.tokens.len() + sequence.guess.len();
            let first = sequence.n_drafted;
            let last = n_known.min(first + self.max_tokens);
            self.batch.tokens.clear();
            let known = sequence.tokens.iter().chain(&sequence.guess).skip(first);
            self.batch.tokens.extend(known.take(last - first));
            let rows = 0..last - first;
            self.batch.sequences.clear();
            self.batch.sequences.push(sequence.slice_at(first, rows.clone(), pool.block_tokens()));
            self.batch.logit_rows.clear();
            if last == n_known {
                self.batch.logit_rows.push(rows.end - 1);
            }
            self.backend.execute_batch(&self.batch, &mut self.logits)?;
            sequence.n_drafted = last;
            if last == n_known {
                let row = &self.logits[..self.vocab_size];
                let best = (0..row.len()).rev().max_by(|&a, &b| row[a].total_cmp(&row[b]));
                sequence.guess.push(best.expect("a vocabulary is not empty") as u32);
            }
        }
        Ok(())
    }
}

//! Guesses by a second, smaller model: draft-model speculation.
//!
//! The draft model shares the block table of the sequences it guesses for, so its cache needs no
//! bookkeeping of its own: it has the same blocks, with its own keys and values in them. It follows
//! each sequence lazily. From its logits a guess is drawn by the sequence's own sampler, whose random
//! numbers are those that the model's draw will use: models that agree on the probabilities draw
//! the same tokens at any temperature. A wrong guess, or a cache it has not filled because a prefix
//! was reused, costs time and never a token: the model verifies everything.

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
        Self { backend, vocab_size, max_tokens, batch: Batch::default(), logits: Vec::new() }
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
        let outcome = self.draw(sequence, max, pool);
        let n_guessed = sequence.guess.len();
        if let Some(sampler) = sequence.sampler() {
            sampler.rollback(n_guessed);
        }
        outcome
    }

    /// Appends guesses to the sequence and to its sampler's history.
    fn draw(
        &mut self,
        sequence: &mut Sequence,
        max: usize,
        pool: &BlockPool,
    ) -> bitnet_core::Result<()> {
        while sequence.guess.len() < max {
            let Some(sampler) = sequence.sampler() else { return Ok(()) };
            let (n_best, noise) = (sampler.n_best(), sampler.noise(0));
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
            self.batch.noise.clear();
            if last == n_known {
                self.batch.logit_rows.push(rows.end - 1);
                self.batch.n_best = n_best;
                self.batch.noise.push(noise);
            }
            self.backend.execute_batch(&self.batch, &mut self.logits)?;
            sequence.n_drafted = last;
            if last == n_known {
                // What a damaged draft model computes is no guess.
                let logits = &mut self.logits[..self.vocab_size];
                let Some(sampler) = sequence.sampler() else { return Ok(()) };
                let Ok(sampled) = sampler.sample(logits) else { return Ok(()) };
                sampler.accept(sampled.token);
                sequence.guess.push(sampled.token);
            }
        }
        Ok(())
    }
}

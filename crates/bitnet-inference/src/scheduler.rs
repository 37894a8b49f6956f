//! Chooses what runs in the next step: which sequences, how many tokens of each, in which blocks.
//!
//! Every step carries all decoding sequences and fills the rest of its token budget with chunks of
//! prompts, so that a long prompt never stops the others. When blocks run out, the sequence that
//! ranks last gives its memory back and starts again later. Knows counts, no tensors and no logits.

use std::collections::VecDeque;
use std::ops::Range;

use bitnet_core::backend::Batch;

use crate::draft::Draft;
use crate::error::Result;
use crate::kv_blocks::BlockPool;
use crate::request::FinishReason;
use crate::sequence::Sequence;
use crate::speculate::look_up;

/// Sequences that may decode in a step that verifies guesses: with more of them, a step is bound by
/// arithmetic, and a wrong guess costs time.
const MAX_SPECULATING: usize = 4;
/// Guessed tokens in one step.
const MAX_VERIFIED: usize = 16;
/// Waiting sequences that may let others pass while their beginning is being computed.
const MAX_SKIPPED: usize = 64;

/// Bounds of a step.
#[derive(Debug, Clone, Copy)]
pub(crate) struct StepLimits {
    /// Sequences that run at the same time.
    pub(crate) max_sequences: usize,
    /// Tokens in one step.
    pub(crate) max_tokens: usize,
    /// Prompt tokens in a step that also decodes: bounds the gap between two tokens of a stream.
    pub(crate) max_prefill_beside_decode: usize,
    /// Rows of logits in one step, for requests that want them after every token.
    pub(crate) max_logit_rows: usize,
    /// Guess repeated text and verify it, while few sequences decode.
    pub(crate) speculate: bool,
    /// Positions a sequence may reach.
    pub(crate) max_positions: usize,
}

/// What one sequence does in a step.
#[derive(Debug, Clone)]
pub(crate) struct PlannedSlice {
    /// Its index in [`Scheduler::running`].
    pub(crate) sequence: usize,
    /// Its rows in the batch.
    pub(crate) rows: Range<usize>,
    /// Its rows in the logits.
    pub(crate) logit_rows: Range<usize>,
}

/// The queues of one model and the memory they share.
pub(crate) struct Scheduler {
    pub(crate) running: Vec<Sequence>,
    waiting: VecDeque<Sequence>,
    pub(crate) pool: BlockPool,
    limits: StepLimits,
    n_preemptions: u64,
}

impl Scheduler {
    pub(crate) fn new(pool: BlockPool, limits: StepLimits) -> Self {
        Self { running: Vec::new(), waiting: VecDeque::new(), pool, limits, n_preemptions: 0 }
    }

    pub(crate) fn is_idle(&self) -> bool {
        self.running.is_empty() && self.waiting.is_empty()
    }

    pub(crate) fn n_waiting(&self) -> usize {
        self.waiting.len()
    }

    pub(crate) fn n_preemptions(&self) -> u64 {
        self.n_preemptions
    }

    /// Adds a sequence behind those of its priority.
    pub(crate) fn submit(&mut self, sequence: Sequence) {
        let rank = |s: &Sequence| (std::cmp::Reverse(s.priority), s.ticket);
        let at = self.waiting.partition_point(|other| rank(other) < rank(&sequence));
        self.waiting.insert(at, sequence);
    }

    /// Drops sequences nobody waits for any more.
    pub(crate) fn drop_abandoned(&mut self) {
        self.waiting.retain(|s| !s.is_abandoned());
        let pool = &mut self.pool;
        self.running.retain_mut(|s| {
            let keep = !s.is_abandoned();
            if !keep {
                s.yield_memory(pool);
            }
            keep
        });
    }

    /// Empties the queues: the sequences will not go on.
    pub(crate) fn drain(&mut self) -> Vec<Sequence> {
        let mut all: Vec<Sequence> = self.running.drain(..).collect();
        all.extend(self.waiting.drain(..));
        all
    }

    /// The cache is lost: all running sequences go back to the queue, and nothing is shared.
    pub(crate) fn start_over(&mut self) {
        while let Some(last) = self.running.len().checked_sub(1) {
            self.preempt(last);
        }
        self.pool.forget();
    }

    /// Removes a running sequence that has all it asked for, or cannot go on.
    pub(crate) fn finish(&mut self, sequence: usize, outcome: Result<FinishReason>) {
        let mut sequence = self.running.remove(sequence);
        sequence.finish(outcome, &mut self.pool);
    }

    /// Fills `batch` with the next step and `plan` with who does what in it.
    pub(crate) fn plan_step(
        &mut self,
        batch: &mut Batch,
        plan: &mut Vec<PlannedSlice>,
        draft: Option<&mut Draft>,
    ) -> bitnet_core::Result<()> {
        batch.tokens.clear();
        batch.sequences.clear();
        batch.logit_rows.clear();
        plan.clear();
        self.admit();

        // Those that decode come first: each of them needs one row.
        let mut budget = self.limits.max_tokens;
        let mut logit_budget = self.limits.max_logit_rows.max(self.limits.max_sequences);
        self.make_guesses(draft)?;
        let mut sequence = 0;
        while sequence < self.running.len() {
            if self.running[sequence].n_pending() == 1
                && budget > 0
                && self.add_slice(sequence, 1, batch, plan)
            {
                let n_rows = plan.last().map_or(0, |slice| slice.rows.len());
                budget -= n_rows.min(budget);
                logit_budget -= n_rows.min(logit_budget);
            }
            sequence += 1;
        }
        if !plan.is_empty() {
            budget = budget.min(self.limits.max_prefill_beside_decode);
        }
        for (sequence, mut n_tokens) in self.share_prefill(budget, plan) {
            // Making room for one may have sent the last ones back to the queue.
            let Some(candidate) = self.running.get(sequence) else { break };
            let every_row = candidate.wants_every_row();
            if every_row {
                n_tokens = n_tokens.min(logit_budget);
            }
            if n_tokens > 0 && self.add_slice(sequence, n_tokens, batch, plan) && every_row {
                logit_budget -= n_tokens;
            }
        }
        Ok(())
    }

    /// Divides a step's prompt tokens among the sequences that are not in it yet, in their order.
    ///
    /// Higher priorities come first. Among equals those with the least left to compute do, so that a
    /// short prompt never waits for a long one; a quarter is kept for the one that came first, so
    /// that a stream of short prompts never stops a long one.
    fn share_prefill(&self, mut budget: usize, plan: &[PlannedSlice]) -> Vec<(usize, usize)> {
        let planned = |sequence: usize| plan.iter().any(|slice| slice.sequence == sequence);
        let open: Vec<usize> = (0..self.running.len()).filter(|&i| !planned(i)).collect();
        let mut shares: Vec<(usize, usize)> = open.iter().map(|&i| (i, 0)).collect();
        let mut start = 0;
        for class in open.chunk_by(|&a, &b| self.running[a].priority == self.running[b].priority) {
            let shares = &mut shares[start..start + class.len()];
            start += class.len();
            let pending = |i: usize| self.running[class[i]].n_pending();
            let kept = pending(0).min(budget.div_ceil(4));
            shares[0].1 = kept;
            budget -= kept;
            let mut by_length: Vec<usize> = (0..class.len()).collect();
            by_length.sort_by_key(|&i| pending(i));
            for i in by_length {
                let more = (pending(i) - shares[i].1).min(budget);
                shares[i].1 += more;
                budget -= more;
            }
        }
        shares
    }

    /// Lets decoding sequences guess ahead, while a step has room to verify guesses.
    fn make_guesses(&mut self, mut draft: Option<&mut Draft>) -> bitnet_core::Result<()> {
        let decoding = |s: &Sequence| s.n_pending() == 1;
        let n_decoding = self.running.iter().filter(|s| decoding(s)).count();
        let room = self.limits.max_tokens.saturating_sub(n_decoding).min(MAX_VERIFIED);
        let share = match n_decoding {
            1..=MAX_SPECULATING => room / n_decoding,
            _ => 0,
        };
        for sequence in &mut self.running {
            sequence.guess.clear();
            let positions = self.limits.max_positions.saturating_sub(sequence.tokens.len() + 1);
            let max = share.min(positions).min(sequence.n_guessable());
            if !decoding(sequence) {
                continue;
            }
            // What a grammar forces needs no guessing: it is always right.
            sequence.guess = sequence.forced(max);
            if !sequence.guess.is_empty() || (draft.is_none() && !self.limits.speculate) {
                continue;
            }
            let max = max.min(sequence.guess_length.next());
            match &mut draft {
                Some(draft) => draft.guess(sequence, max, &mut self.pool)?,
                None => sequence.guess = look_up(&sequence.tokens, max),
            }
        }
        Ok(())
    }

    /// Moves waiting sequences into the running set while there is room.
    fn admit(&mut self) {
        let block_tokens = self.pool.block_tokens();
        let mut next = 0;
        while self.running.len() < self.limits.max_sequences && next < self.waiting.len() {
            let candidate = &self.waiting[next];
            if next < MAX_SKIPPED
                && self.running.iter().any(|s| s.computes_for(candidate, block_tokens))
            {
                next += 1; // Soon it finds its beginning in the cache instead of computing it too.
                continue;
            }
            // A sequence enters when its prompt fits into what is free and not spoken for, so that
            // it does not push out another one at once. Alone, it may always enter.
            let needed = |s: &Sequence| (s.tokens.len() + 1).div_ceil(block_tokens);
            let promised = |s: &Sequence| needed(s).saturating_sub(s.n_blocks());
            let promised: usize = self.running.iter().map(promised).sum();
            let fits = needed(candidate) + promised <= self.pool.n_available();
            if !self.running.is_empty() && !fits {
                break;
            }
            let mut sequence = self.waiting.remove(next).expect("checked above");
            sequence.start(&mut self.pool);
            let at = self.running.partition_point(|s| {
                (-s.priority, s.ticket) < (-sequence.priority, sequence.ticket)
            });
            self.running.insert(at, sequence);
        }
    }

    /// Adds `n_tokens` of a running sequence to the step. If memory is short, sequences that rank
    /// behind it and are not in the step yet give theirs back; false if even that is not enough.
    fn add_slice(
        &mut self,
        sequence: usize,
        n_tokens: usize,
        batch: &mut Batch,
        plan: &mut Vec<PlannedSlice>,
    ) -> bool {
        let computed = self.running[sequence].n_computed;
        let guessed = self.running[sequence].guess.len();
        if guessed > 0
            && !self.running[sequence].reserve(computed + n_tokens + guessed, &mut self.pool)
        {
            self.running[sequence].guess.clear(); // A guess is not worth another one's memory.
        }
        let n_positions = computed + n_tokens;
        while !self.running[sequence].reserve(n_positions, &mut self.pool) {
            let last = self.running.len() - 1;
            if last == sequence || plan.iter().any(|slice| slice.sequence == last) {
                return false; // It ranks last, or the others already run: it waits a step.
            }
            self.preempt(last);
        }
        let member = &self.running[sequence];
        let row = batch.tokens.len();
        batch.tokens.extend_from_slice(&member.tokens[computed..computed + n_tokens]);
        batch.tokens.extend_from_slice(&member.guess);
        let rows = row..batch.tokens.len();
        batch.sequences.push(member.slice(rows.clone(), self.pool.block_tokens()));
        let first_logit = batch.logit_rows.len();
        if member.wants_every_row() {
            batch.logit_rows.extend(rows.clone());
        } else if n_tokens == member.n_pending() {
            batch.logit_rows.extend(row + n_tokens - 1..rows.end);
        }
        let logit_rows = first_logit..batch.logit_rows.len();
        plan.push(PlannedSlice { sequence, rows, logit_rows });
        true
    }

    /// Sends a running sequence back to the queue without its memory.
    fn preempt(&mut self, sequence: usize) {
        let mut victim = self.running.remove(sequence);
        victim.yield_memory(&mut self.pool);
        self.n_preemptions += 1;
        self.submit(victim);
    }
}

#[cfg(test)]
mod tests;

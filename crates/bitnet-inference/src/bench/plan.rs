//! What is measured, and the steps it is made of: made-up tokens at given positions in given
//! blocks. Knows no model.

use std::fmt;

use bitnet_core::backend::{Batch, SequenceSlice};

use crate::config::BLOCK_TOKENS;

/// One thing to measure.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Test {
    /// Tokens of one prompt, with the logits of the last.
    Prefill {
        /// Tokens of the prompt.
        tokens: usize,
        /// Tokens in the cache before them.
        depth: usize,
    },
    /// Steps of one token for each sequence, with all logits.
    Decode {
        /// Steps.
        tokens: usize,
        /// Sequences decoded together.
        sequences: usize,
        /// Tokens of each sequence in the cache before.
        depth: usize,
    },
}

impl Test {
    /// Tokens computed in one repetition.
    pub fn n_tokens(&self) -> usize {
        match *self {
            Self::Prefill { tokens, .. } => tokens,
            Self::Decode { tokens, sequences, .. } => tokens * sequences,
        }
    }

    /// Tokens of each sequence in the cache before the measured ones.
    pub fn depth(&self) -> usize {
        match *self {
            Self::Prefill { depth, .. } | Self::Decode { depth, .. } => depth,
        }
    }

    /// Sequences side by side.
    pub fn n_sequences(&self) -> usize {
        match *self {
            Self::Prefill { .. } => 1,
            Self::Decode { sequences, .. } => sequences,
        }
    }

    /// Positions each sequence reaches.
    pub(super) fn n_positions(&self) -> usize {
        match *self {
            Self::Prefill { tokens, depth } | Self::Decode { tokens, depth, .. } => tokens + depth,
        }
    }

    /// Blocks of the KV cache it needs.
    pub(super) fn n_blocks(&self) -> usize {
        self.n_sequences() * self.blocks_per_sequence()
    }

    fn blocks_per_sequence(&self) -> usize {
        self.n_positions().div_ceil(BLOCK_TOKENS)
    }
}

/// `pp512`, `tg128`, `tg128 x16` (16 sequences), `tg128 @ d4096`.
impl fmt::Display for Test {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match *self {
            Self::Prefill { tokens, .. } => write!(f, "pp{tokens}")?,
            Self::Decode { tokens, sequences: 1, .. } => write!(f, "tg{tokens}")?,
            Self::Decode { tokens, sequences, .. } => write!(f, "tg{tokens} x{sequences}")?,
        }
        match self.depth() {
            0 => Ok(()),
            depth => write!(f, " @ d{depth}"),
        }
    }
}

/// Makes the steps of a test.
pub(super) struct Planner {
    pub(super) test: Test,
    pub(super) vocab_size: usize,
    /// Prompt tokens of a step.
    pub(super) chunk: usize,
    /// See [`Batch::n_best`].
    pub(super) n_best: Option<usize>,
}

impl Planner {
    /// The steps that fill the cache up to the depth.
    pub(super) fn before(&self) -> Vec<Batch> {
        let sequences = 0..self.test.n_sequences();
        sequences.flat_map(|sequence| self.prompt(sequence, 0, self.test.depth())).collect()
    }

    /// The steps of one repetition.
    pub(super) fn measured(&self) -> Vec<Batch> {
        match self.test {
            Test::Prefill { tokens, depth } => {
                let mut steps = self.prompt(0, depth, tokens);
                if let Some(last) = steps.last_mut() {
                    last.logit_rows.push(last.tokens.len() - 1);
                }
                steps
            }
            Test::Decode { tokens, sequences, depth } => {
                let step = |position| {
                    let mut batch = self.empty();
                    for sequence in 0..sequences {
                        self.add_slice(&mut batch, sequence, position, 1);
                        batch.logit_rows.push(sequence);
                    }
                    batch
                };
                (depth..depth + tokens).map(step).collect()
            }
        }
    }

    /// Chunks of one sequence's tokens, from position `first` on.
    fn prompt(&self, sequence: usize, first: usize, n_tokens: usize) -> Vec<Batch> {
        let end = first + n_tokens;
        let step = |at: usize| {
            let mut batch = self.empty();
            self.add_slice(&mut batch, sequence, at, self.chunk.min(end - at));
            batch
        };
        (first..end).step_by(self.chunk).map(step).collect()
    }

    fn empty(&self) -> Batch {
        Batch { n_best: self.n_best, ..Batch::default() }
    }

    /// Adds `n_tokens` tokens of a sequence, which owns consecutive blocks.
    fn add_slice(&self, batch: &mut Batch, sequence: usize, position: usize, n_tokens: usize) {
        let row = batch.tokens.len();
        let token = |position: usize| {
            let hash = (position as u64 * 1024 + sequence as u64 + 1) * 0x9e37_79b9;
            ((hash >> 7) % self.vocab_size as u64) as u32
        };
        batch.tokens.extend((position..position + n_tokens).map(token));
        let first_block = sequence * self.test.blocks_per_sequence();
        let n_blocks = (position + n_tokens).div_ceil(BLOCK_TOKENS);
        batch.sequences.push(SequenceSlice {
            rows: row..row + n_tokens,
            first_position: position,
            blocks: (first_block..first_block + n_blocks).map(|block| block as u32).collect(),
        });
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn planner(test: Test) -> Planner {
        Planner { test, vocab_size: 100, chunk: 48, n_best: Some(3) }
    }

    #[test]
    fn names_are_those_of_the_field() {
        assert_eq!(Test::Prefill { tokens: 512, depth: 0 }.to_string(), "pp512");
        let tg = |sequences, depth| Test::Decode { tokens: 128, sequences, depth }.to_string();
        assert_eq!(tg(1, 0), "tg128");
        assert_eq!(tg(16, 0), "tg128 x16");
        assert_eq!(tg(1, 4096), "tg128 @ d4096");
    }

    #[test]
    fn a_prompt_is_cut_into_chunks_and_its_last_token_has_logits() {
        let steps = planner(Test::Prefill { tokens: 100, depth: 10 }).measured();
        let shapes: Vec<_> = steps
            .iter()
            .map(|s| (s.sequences[0].first_position, s.tokens.len(), s.logit_rows.clone()))
            .collect();
        assert_eq!(shapes, [(10, 48, vec![]), (58, 48, vec![]), (106, 4, vec![3])]);
        assert_eq!(steps[2].sequences[0].blocks, [0, 1, 2, 3], "positions 0 to 109");
        assert_eq!(steps[0].sequences[0].blocks, [0, 1], "positions 0 to 57");
    }

    #[test]
    fn sequences_share_no_block_and_fill_what_the_test_asked_for() {
        let test = Test::Decode { tokens: 3, sequences: 4, depth: 62 };
        let planner = planner(test);
        let filling = planner.before();
        assert_eq!(filling.iter().map(|s| s.tokens.len()).sum::<usize>(), 4 * 62);
        let steps = planner.measured();
        assert_eq!(steps.len(), 3);
        let last = &steps[2];
        assert_eq!(last.logit_rows, [0, 1, 2, 3]);
        assert_eq!(last.n_best, Some(3));
        let mut blocks: Vec<u32> = last.sequences.iter().flat_map(|s| s.blocks.clone()).collect();
        assert_eq!(blocks.len(), test.n_blocks());
        blocks.sort_unstable();
        blocks.dedup();
        assert_eq!(blocks.len(), 4 * 3, "65 positions take three blocks each");
        assert!(steps.iter().flat_map(|s| &s.tokens).all(|&token| token < 100));
    }
}

//! Chooses the next token from a row of logits.
//!
//! Order of work, as in llama.cpp: logit bias → repetition, presence and frequency penalties → DRY
//! → top-k → typical → top-p → min-p → temperature → draw. Each filter sees the probabilities of
//! what the one before it left, at temperature 1. Temperature 0 takes the largest logit after the
//! penalties, ties to the lowest id.
//!
//! A draw takes the largest of the logits left after [noise] that depends on the seed, on how many
//! tokens were accepted and on the token, on nothing else: the same request gives the same tokens
//! alone, in a batch, or after a rollback, on every platform (`exp` and `ln` are plain arithmetic,
//! not the system's, and sums run in one order). Where no filter is on, a device need not compute
//! the logits that cannot win ([`Sampler::n_best`]); and a model that guesses with the same noise
//! mostly guesses what will be drawn.
//!
//! [noise]: bitnet_core::noise
//!
//! Knows token ids and logits; no text, no end tokens.

mod dry;
mod filters;
mod history;

use std::collections::HashSet;
use std::hash::{BuildHasher, Hasher, RandomState};
use std::sync::Arc;

use bitnet_core::noise::Noise;
use rand_chacha::ChaCha8Rng;
use rand_chacha::rand_core::{Rng, SeedableRng};

use crate::options::{BAN_BIAS, GenerationOptions, OptionsError};
use filters::{Candidate, Distribution};
use history::History;

/// A token and what was asked to be known about its choice.
#[derive(Debug, Clone, PartialEq)]
pub struct Sampled {
    /// The chosen token.
    pub token: u32,
    /// Natural logarithm of its probability under the unmodified logits; only if asked for.
    pub logprob: Option<f32>,
    /// The likeliest tokens under the unmodified logits with their log-probabilities, best first.
    pub top: Vec<(u32, f32)>,
}

/// Why no token could be chosen.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum SampleError {
    /// Every token is banned.
    #[error("no token can be drawn: all {vocab} logits are minus infinity or banned")]
    NoLegalToken {
        /// Length of the row of logits.
        vocab: usize,
    },
    /// What is not banned is NaN: the model is damaged.
    #[error("no token can be drawn: the model computes logits that are not numbers")]
    NotANumber,
    /// The row of logits has another length than the vocabulary.
    #[error("logits: expected {expected} (the vocabulary), got {got}")]
    WrongLength {
        /// Vocabulary size the sampler was made for.
        expected: usize,
        /// Length of the row it was given.
        got: usize,
    },
}

/// The state of one sequence's sampling: its options, its history and its place in the stream of
/// random numbers. Cloning it or [rolling it back](Sampler::rollback) lets speculation try tokens.
#[derive(Debug, Clone)]
pub struct Sampler {
    options: Arc<GenerationOptions>,
    dry_breakers: Arc<HashSet<u32>>,
    vocab: usize,
    seed: u64,
    history: History,
    candidates: Vec<Candidate>,
    undo: Vec<(u32, f32)>,
    /// The row without the tokens that are not allowed.
    allowed: Vec<f32>,
}

impl Sampler {
    /// A sampler for one sequence after `prompt`, over a vocabulary of `vocab` tokens.
    ///
    /// Fails if an option is out of range, or if a biased or prompt token lies outside the vocabulary.
    pub fn new(
        options: &GenerationOptions,
        prompt: &[u32],
        vocab: usize,
    ) -> Result<Self, OptionsError> {
        options.validate()?;
        let outside = |id: &&u32| **id as usize >= vocab;
        let check = |field, bad: Option<&u32>| match bad {
            Some(id) => Err(OptionsError {
                field,
                expected: format!("token ids below {vocab}"),
                got: id.to_string(),
            }),
            None => Ok(()),
        };
        check("logit_bias", options.logit_bias.keys().find(outside))?;
        check("prompt", prompt.iter().find(outside))?;
        Ok(Self {
            history: History::new(options, prompt),
            dry_breakers: Arc::default(),
            vocab,
            seed: options.seed.unwrap_or_else(fresh_seed),
            options: Arc::new(options.clone()),
            candidates: Vec::new(),
            undo: Vec::new(),
            allowed: Vec::new(),
        })
    }

    /// Sets the tokens that DRY's repetitions do not cross: those whose text holds one of
    /// [`DryOptions::sequence_breakers`](crate::options::DryOptions::sequence_breakers).
    #[must_use]
    pub fn with_dry_breakers(mut self, tokens: impl IntoIterator<Item = u32>) -> Self {
        self.dry_breakers = Arc::new(tokens.into_iter().collect());
        self
    }

    /// The seed in use: the one asked for, or the one picked in its absence.
    pub fn seed(&self) -> u64 {
        self.seed
    }

    /// How many of the largest logits, after [`noise`](Self::noise), decide the next token whatever
    /// the others are; `None` if all matter, because they are reported, because an option may lift
    /// one of them or because a filter needs the sum of their probabilities.
    pub fn n_best(&self) -> Option<usize> {
        const MOST: u32 = 256;
        let options = &*self.options;
        let lifted = options.logprobs.is_some()
            || options.repetition_penalty != 1.0
            || options.presence_penalty != 0.0
            || options.frequency_penalty != 0.0
            || options.dry.is_some()
            || !options.logit_bias.is_empty();
        match options.top_k {
            _ if lifted => None,
            _ if options.is_greedy() || !self.is_filtered() => Some(1),
            k @ 1..=MOST => Some(k as usize),
            _ => None,
        }
    }

    /// What has to be added to the logits before [`n_best`](Self::n_best) of them are chosen for the
    /// next draw but `ahead`.
    pub fn noise(&self, ahead: usize) -> Noise {
        match self.options.is_greedy() || self.is_filtered() {
            true => Noise::NONE,
            false => self.noise_of_draw(self.n_accepted() + ahead),
        }
    }

    /// Whether a filter has to see the logits before a token is drawn.
    fn is_filtered(&self) -> bool {
        let options = &*self.options;
        let all = options.top_k == 0 || options.top_k as usize >= self.vocab;
        !all || options.typical_p < 1.0 || options.top_p < 1.0 || options.min_p > 0.0
    }

    fn noise_of_draw(&self, index: usize) -> Noise {
        Noise::new(key(self.seed, index), self.options.temperature)
    }

    /// How many tokens were accepted since the prompt.
    pub fn n_accepted(&self) -> usize {
        self.history.n_generated()
    }

    /// Chooses a token from `logits` (one per vocabulary entry). The same call again, without
    /// [`accept`](Self::accept) between, chooses the same token.
    ///
    /// NaN counts as minus infinity. The row is worked on in place and restored before returning.
    pub fn sample(&mut self, logits: &mut [f32]) -> Result<Sampled, SampleError> {
        self.sample_where(logits, None::<fn(u32) -> bool>)
    }

    /// As [`sample`](Self::sample), among the tokens that `is_allowed` holds for. Log-probabilities
    /// stay the model's own.
    pub fn sample_among(
        &mut self,
        logits: &mut [f32],
        is_allowed: impl Fn(u32) -> bool,
    ) -> Result<Sampled, SampleError> {
        self.sample_where(logits, Some(is_allowed))
    }

    fn sample_where(
        &mut self,
        logits: &mut [f32],
        is_allowed: Option<impl Fn(u32) -> bool>,
    ) -> Result<Sampled, SampleError> {
        if logits.len() != self.vocab {
            return Err(SampleError::WrongLength { expected: self.vocab, got: logits.len() });
        }
        self.adjust(logits);
        let choice = match is_allowed {
            None => self.choose(logits),
            Some(is_allowed) => {
                let only = |(id, &logit): (usize, &f32)| match is_allowed(id as u32) {
                    true => logit,
                    false => f32::NEG_INFINITY,
                };
                let mut allowed = std::mem::take(&mut self.allowed);
                allowed.clear();
                allowed.extend(logits.iter().enumerate().map(only));
                let choice = self.choose(&allowed);
                self.allowed = allowed;
                choice
            }
        };
        while let Some((id, logit)) = self.undo.pop() {
            logits[id as usize] = logit;
        }
        let none = || match logits.iter().any(|logit| logit.is_nan()) {
            true => SampleError::NotANumber,
            false => SampleError::NoLegalToken { vocab: self.vocab },
        };
        let token = choice.ok_or_else(none)?;
        let Some(n_top) = self.options.logprobs else {
            return Ok(Sampled { token, logprob: None, top: Vec::new() });
        };
        filters::top_k(logits, 0, &mut self.candidates);
        let model = Distribution::weigh(&mut self.candidates);
        let logprob = model.ln_probability(filters::finite(logits[token as usize])) as f32;
        filters::top_k(logits, n_top.max(1) as usize, &mut self.candidates);
        let top = self.candidates.iter().take(n_top as usize);
        let top = top.map(|c| (c.id, model.ln_probability(c.logit) as f32)).collect();
        Ok(Sampled { token, logprob: Some(logprob), top })
    }

    /// Appends a token to the history: the one sampled, or another that the caller decided on.
    pub fn accept(&mut self, token: u32) {
        self.history.push(token);
    }

    /// Forgets the last `n` accepted tokens (at most all since the prompt).
    pub fn rollback(&mut self, n: usize) {
        self.history.rollback(n);
    }

    /// Applies biases and penalties in place and notes what they overwrote.
    fn adjust(&mut self, logits: &mut [f32]) {
        let Self { options, history, undo, dry_breakers, .. } = self;
        let mut set = |id: u32, change: &dyn Fn(f32) -> f32| {
            if let Some(logit) = logits.get_mut(id as usize) {
                undo.push((id, *logit));
                *logit = change(*logit);
            }
        };
        for (&id, &bias) in &options.logit_bias {
            set(id, &|logit| if bias <= BAN_BIAS { f32::NEG_INFINITY } else { logit + bias });
        }
        let repetition = options.repetition_penalty;
        for id in history.in_window() {
            set(id, &|logit| if logit > 0.0 { logit / repetition } else { logit * repetition });
        }
        for (id, count) in history.generated() {
            let penalty = options.presence_penalty + options.frequency_penalty * count as f32;
            set(id, &|logit| logit - penalty);
        }
        if let Some(dry) = &options.dry {
            for (id, penalty) in dry::penalties(dry, history.tokens(), dry_breakers) {
                set(id, &|logit| logit - penalty);
            }
        }
    }

    /// The token for these logits; `None` if none is legal.
    fn choose(&mut self, logits: &[f32]) -> Option<u32> {
        let options = &self.options;
        if options.is_greedy() {
            return filters::argmax(logits);
        }
        let noise = self.noise_of_draw(self.n_accepted());
        if !self.is_filtered() {
            return filters::draw_among_all(logits, noise);
        }
        let candidates = &mut self.candidates;
        filters::top_k(logits, options.top_k as usize, candidates);
        filters::typical(candidates, options.typical_p);
        filters::top_p(candidates, options.top_p);
        filters::min_p(candidates, options.min_p);
        filters::draw(candidates, noise)
    }
}

/// The key of draw `index` of `seed`.
///
/// ChaCha8 is a counter-mode generator, so any place of the stream is reached at once and the
/// position is the whole state.
fn key(seed: u64, index: usize) -> [u32; 2] {
    let mut key = [0; 32];
    key[..8].copy_from_slice(&seed.to_le_bytes());
    let mut stream = ChaCha8Rng::from_seed(key);
    stream.set_word_pos(index as u128 * 2);
    [stream.next_u32(), stream.next_u32()]
}

/// A seed nobody chose, from the entropy the standard library keys its hash maps with.
fn fresh_seed() -> u64 {
    RandomState::new().build_hasher().finish()
}

#[cfg(test)]
mod tests;

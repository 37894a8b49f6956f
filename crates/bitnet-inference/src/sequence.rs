//! A request on its way through the model: its tokens, how far they are computed, what it waits for.
//! Knows nothing of other sequences.

use std::ops::Range;
use std::time::{Duration, Instant};

use bitnet_core::backend::SequenceSlice;

use crate::error::Result;
use crate::kv_blocks::{BlockId, BlockPool, Prefix};
use crate::request::{Event, EventSender, FinishReason, Goal, Request, Usage};
use crate::sampler::Sampler;
use crate::speculate::GuessLength;

/// A request being worked on.
pub(crate) struct Sequence {
    /// The prompt, then what was generated.
    pub(crate) tokens: Vec<u32>,
    pub(crate) n_prompt: usize,
    /// Tokens at the front whose keys and values are in the cache.
    pub(crate) n_computed: usize,
    pub(crate) goal: Goal,
    /// Positions at the front whose rows were handed out, where every row is wanted: one that starts
    /// again computes them again.
    pub(crate) n_handed_out: usize,
    /// Guesses of what follows `tokens`, verified by the next step.
    pub(crate) guess: Vec<u32>,
    pub(crate) guess_length: GuessLength,
    /// Positions at the front that the draft model has computed.
    pub(crate) n_drafted: usize,
    pub(crate) priority: i32,
    /// Order of arrival; ties in priority go to the earlier one.
    pub(crate) ticket: u64,
    cache_salt: Option<std::sync::Arc<str>>,
    /// One block for each `block_tokens` positions computed so far (and of the next slice).
    blocks: Vec<BlockId>,
    /// Blocks at the front that are published for reuse, and what the next one follows.
    n_published: usize,
    prefix: Prefix,
    events: EventSender,
    n_cached: usize,
    arrived: Instant,
    started: Option<Instant>,
    first_token: Option<Instant>,
    last_token: Option<Instant>,
}

impl Sequence {
    pub(crate) fn new(
        request: Request,
        ticket: u64,
        arrived: Instant,
        events: EventSender,
    ) -> Self {
        Self {
            n_prompt: request.tokens.len(),
            tokens: request.tokens,
            n_computed: 0,
            goal: request.goal,
            n_handed_out: 0,
            guess: Vec::new(),
            guess_length: GuessLength::default(),
            n_drafted: 0,
            priority: request.priority,
            ticket,
            prefix: Prefix::Start(request.cache_salt.clone()),
            cache_salt: request.cache_salt,
            blocks: Vec::new(),
            n_published: 0,
            events,
            n_cached: 0,
            arrived,
            started: None,
            first_token: None,
            last_token: None,
        }
    }

    /// Tokens known but not yet computed; one for a sequence that decodes.
    pub(crate) fn n_pending(&self) -> usize {
        self.tokens.len() - self.n_computed
    }

    /// Nobody waits for the result any more.
    pub(crate) fn is_abandoned(&self) -> bool {
        self.events.is_closed()
    }

    pub(crate) fn send(&self, event: Event) {
        // A receiver that is gone is noticed by `is_abandoned` before the next step.
        let _ = self.events.unbounded_send(event);
    }

    /// Whether logits are wanted after every token, not only after the last.
    pub(crate) fn wants_every_row(&self) -> bool {
        matches!(self.goal, Goal::Logits { all: true } | Goal::Score { .. })
    }

    /// Blocks of the cache it holds.
    pub(crate) fn n_blocks(&self) -> usize {
        self.blocks.len()
    }

    /// Whether the prompt of this running sequence is about to fill a block that `other` can start
    /// from, instead of computing the same.
    pub(crate) fn computes_for(&self, other: &Self, block_tokens: usize) -> bool {
        // One token more than this block takes must be left in both: it is the one to compute.
        let end = self.n_computed / block_tokens * block_tokens + block_tokens;
        let is_prefill = end <= self.n_prompt && end < other.tokens.len();
        is_prefill
            && self.priority >= other.priority
            && !other.wants_every_row()
            && self.cache_salt == other.cache_salt
            && self.tokens[..end] == other.tokens[..end]
    }

    /// Enters the running set: takes over what earlier requests computed of its prompt.
    pub(crate) fn start(&mut self, pool: &mut BlockPool) {
        debug_assert!(self.blocks.is_empty() && self.n_computed == 0);
        if !self.wants_every_row() {
            let (blocks, prefix) = pool.reuse_prefix(&self.tokens, self.cache_salt.clone());
            self.n_computed = blocks.len() * pool.block_tokens();
            self.n_published = blocks.len();
            self.blocks = blocks;
            self.prefix = prefix;
        }
        if self.started.is_none() {
            self.started = Some(Instant::now());
            self.n_cached = self.n_computed;
        }
    }

    /// Makes sure that blocks cover the first `n_tokens` positions; false if the pool ran out.
    pub(crate) fn reserve(&mut self, n_tokens: usize, pool: &mut BlockPool) -> bool {
        while self.blocks.len() * pool.block_tokens() < n_tokens {
            match pool.allocate() {
                Some(id) => self.blocks.push(id),
                None => return false,
            }
        }
        true
    }

    /// The slice of the next step: from the first uncomputed token on, at these rows of the batch.
    pub(crate) fn slice(&self, rows: Range<usize>, block_tokens: usize) -> SequenceSlice {
        self.slice_at(self.n_computed, rows, block_tokens)
    }

    /// A slice from any position on whose blocks are reserved.
    pub(crate) fn slice_at(
        &self,
        first_position: usize,
        rows: Range<usize>,
        block_tokens: usize,
    ) -> SequenceSlice {
        let n_blocks = (first_position + rows.len()).div_ceil(block_tokens);
        SequenceSlice { rows, first_position, blocks: self.blocks[..n_blocks].to_vec() }
    }

    /// What draws its tokens, if it generates any.
    pub(crate) fn sampler(&mut self) -> Option<&mut Sampler> {
        match &mut self.goal {
            Goal::Generate(continuation) => Some(&mut continuation.sampler),
            _ => None,
        }
    }

    /// How many tokens after the next one this sequence may still want.
    pub(crate) fn n_guessable(&self) -> usize {
        match &self.goal {
            Goal::Generate(continuation) => {
                continuation.max_tokens.saturating_sub(self.n_generated() + 1)
            }
            Goal::Logits { .. } | Goal::Score { .. } => 0,
        }
    }

    /// Up to `max` tokens that must come next, if what the answer is held to leaves no choice.
    pub(crate) fn forced(&mut self, max: usize) -> Vec<u32> {
        match &mut self.goal {
            Goal::Generate(continuation) if max > 0 => {
                continuation.constraint.as_mut().map_or(Vec::new(), |c| c.forced(max))
            }
            _ => Vec::new(),
        }
    }

    /// Notes that `n_tokens` more are in the cache and publishes the blocks they filled.
    pub(crate) fn advance(&mut self, n_tokens: usize, pool: &mut BlockPool) {
        self.n_computed += n_tokens;
        let block_tokens = pool.block_tokens();
        while (self.n_published + 1) * block_tokens <= self.n_computed {
            let start = self.n_published * block_tokens;
            let content = &self.tokens[start..start + block_tokens];
            let prefix = std::mem::replace(&mut self.prefix, Prefix::Start(None));
            self.prefix = pool.publish(self.blocks[self.n_published], prefix, content);
            self.n_published += 1;
        }
    }

    /// Gives all memory back; the tokens are kept, so that the sequence can start again. Because a
    /// row's result does not depend on how its past was computed, its tokens stay the same.
    pub(crate) fn yield_memory(&mut self, pool: &mut BlockPool) {
        pool.release(std::mem::take(&mut self.blocks));
        self.n_computed = 0;
        self.n_drafted = 0;
        self.n_published = 0;
        self.prefix = Prefix::Start(self.cache_salt.clone());
    }

    pub(crate) fn note_token(&mut self) {
        let now = Instant::now();
        self.first_token.get_or_insert(now);
        self.last_token = Some(now);
    }

    pub(crate) fn n_generated(&self) -> usize {
        self.tokens.len() - self.n_prompt
    }

    /// What the request took so far.
    pub(crate) fn usage(&self) -> Usage {
        let since = |from: Option<Instant>, to: Option<Instant>| match (from, to) {
            (Some(from), Some(to)) => to.duration_since(from),
            _ => Duration::ZERO,
        };
        let end_of_prefill = self.first_token.or_else(|| Some(Instant::now()));
        Usage {
            prompt_tokens: self.n_prompt,
            cached_tokens: self.n_cached,
            completion_tokens: self.n_generated(),
            queued: since(Some(self.arrived), self.started),
            prefill: since(self.started, end_of_prefill),
            decode: since(self.first_token, self.last_token),
        }
    }

    pub(crate) fn finish(&mut self, outcome: Result<FinishReason>, pool: &mut BlockPool) {
        self.yield_memory(pool);
        self.send(match outcome {
            Ok(reason) => Event::Finished(reason, self.usage()),
            Err(error) => Event::Failed(error),
        });
    }
}

//! What is asked of a loaded model, and what comes back, in token ids.

use std::sync::Arc;
use std::time::Duration;

use futures_channel::mpsc::UnboundedSender;

use crate::error::InferenceError;
use crate::grammar::Constraint;
use crate::sampler::Sampler;

/// Who asks, for an engine that serves many: decides the order of work and what may be shared, never
/// the tokens.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct RequestContext {
    /// Higher runs first; 0 for a request that says nothing.
    pub priority: i32,
    /// Keeps this tenant's part of the prefix cache from all requests without the same salt: neither
    /// side can tell from its speed what the other has asked. `None` is a part of its own.
    pub cache_salt: Option<Arc<str>>,
}

/// One unit of work for a model.
#[derive(Debug)]
pub(crate) struct Request {
    /// The prompt: at least one token, each below the vocabulary size.
    pub(crate) tokens: Vec<u32>,
    pub(crate) goal: Goal,
    /// Higher runs first.
    pub(crate) priority: i32,
    /// Separates the prefix cache of one tenant from another's.
    pub(crate) cache_salt: Option<Arc<str>>,
}

/// What to do with the prompt.
#[derive(Debug)]
pub(crate) enum Goal {
    /// Continue it.
    Generate(Box<Continuation>),
    /// Logits after its last token, or after every token.
    Logits {
        /// Every position instead of the last.
        all: bool,
    },
    /// The log-probability of each token given those before it.
    Score {
        /// Report this many of the likeliest tokens at each place as well.
        top: usize,
    },
}

/// How a prompt is continued.
#[derive(Debug)]
pub(crate) struct Continuation {
    pub(crate) sampler: Sampler,
    /// What the answer is held to.
    pub(crate) constraint: Option<Constraint>,
    /// Most tokens to generate.
    pub(crate) max_tokens: usize,
    /// Tokens that end the answer.
    pub(crate) ending_tokens: Vec<u32>,
}

/// What a request yields, in order: any number of results, then `Finished` or `Failed`.
#[derive(Debug)]
pub(crate) enum Event {
    /// One more generated token, and what the request took so far.
    Token(GeneratedToken, Usage),
    /// Logits after the next token of the prompt (or after the last one, if only that was asked for).
    Logits(Vec<f32>),
    /// The next token of the prompt, from its second one on, with its log-probability.
    Score(GeneratedToken),
    /// The end.
    Finished(FinishReason, Usage),
    /// The end, with an error.
    Failed(InferenceError),
}

pub(crate) type EventSender = UnboundedSender<Event>;

/// A token the sampler chose.
#[derive(Debug, Clone, PartialEq)]
pub struct GeneratedToken {
    /// Its id.
    pub id: u32,
    /// Its natural log-probability under the model, before sampling options; only if asked for.
    pub logprob: Option<f32>,
    /// The most probable tokens at this position with their log-probabilities, best first.
    pub top_logprobs: Vec<(u32, f32)>,
}

/// Why a generation ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum FinishReason {
    /// The model ended it, or a stop string or stop token was met.
    Stop,
    /// `max_tokens` or the end of the context was reached.
    Length,
}

/// What a request took.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Usage {
    /// Tokens of the prompt.
    pub prompt_tokens: usize,
    /// Prompt tokens whose keys and values another request had computed already.
    pub cached_tokens: usize,
    /// Tokens generated, the ending token included.
    pub completion_tokens: usize,
    /// From arrival until the first step.
    pub queued: Duration,
    /// From the first step until the first token.
    pub prefill: Duration,
    /// From the first token to the last.
    pub decode: Duration,
}

impl Usage {
    /// Prompt tokens computed per second, or `None` if nothing was computed.
    pub fn prefill_tokens_per_second(&self) -> Option<f64> {
        rate(self.prompt_tokens - self.cached_tokens, self.prefill)
    }

    /// Tokens generated per second after the first one, or `None` for fewer than two tokens.
    pub fn decode_tokens_per_second(&self) -> Option<f64> {
        rate(self.completion_tokens.saturating_sub(1), self.decode)
    }
}

fn rate(tokens: usize, time: Duration) -> Option<f64> {
    (tokens > 0 && !time.is_zero()).then(|| tokens as f64 / time.as_secs_f64())
}

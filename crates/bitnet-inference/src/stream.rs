//! A generation in progress, as text: an iterator for threads and a `Stream` for async code.
//!
//! The worker sends token ids; here they become text that never splits a character and ends before
//! a stop string. Dropping the stream cancels the generation before the model's next step.

use std::collections::VecDeque;
use std::pin::Pin;
use std::task::{Context, Poll};

use futures_channel::mpsc::UnboundedReceiver;
use futures_core::Stream;

use crate::detokenizer::Detokenizer;
use crate::error::{InferenceError, Result};
use crate::request::{Event, FinishReason, GeneratedToken, Usage};
use crate::stop::StopMatcher;
use crate::wait::block_on;

/// A piece of a generation.
#[derive(Debug, Clone, PartialEq)]
pub struct Chunk {
    /// Text that is now certain; may be empty while a character or a possible stop string is
    /// incomplete, or for a control token.
    pub text: String,
    /// The token that brought it; `None` for text released at the end.
    pub token: Option<GeneratedToken>,
}

/// A whole generation.
#[derive(Debug, Clone, PartialEq)]
pub struct Generation {
    /// The text, without the stop string or the ending token.
    pub text: String,
    /// Every token generated, the ending one included.
    pub tokens: Vec<GeneratedToken>,
    /// Why it ended.
    pub finish_reason: FinishReason,
    /// The stop string that was met, if one was.
    pub stop_string: Option<String>,
    /// What it took.
    pub usage: Usage,
}

/// Yields [`Chunk`]s as the model computes them.
///
/// Use it as an [`Iterator`] (blocking) or as a [`Stream`] (async, on any runtime).
#[derive(Debug)]
pub struct TokenStream {
    events: Option<UnboundedReceiver<Event>>,
    detokenizer: Option<Detokenizer>,
    stop: StopMatcher,
    stop_strings: Vec<String>,
    ending_tokens: Vec<u32>,
    ready: VecDeque<Result<Chunk>>,
    stop_string: Option<String>,
    usage: Usage,
    outcome: Option<(FinishReason, Usage)>,
}

impl TokenStream {
    pub(crate) fn new(
        events: UnboundedReceiver<Event>,
        detokenizer: Option<Detokenizer>,
        stop: &[String],
        ending_tokens: Vec<u32>,
    ) -> Self {
        Self {
            events: Some(events),
            detokenizer,
            stop: StopMatcher::new(stop),
            stop_strings: stop.to_vec(),
            ending_tokens,
            ready: VecDeque::new(),
            stop_string: None,
            usage: Usage::default(),
            outcome: None,
        }
    }

    /// How it ended and what it took; `None` while it goes on or after an error.
    pub fn outcome(&self) -> Option<(FinishReason, Usage)> {
        self.outcome
    }

    /// What it took so far.
    pub fn usage(&self) -> Usage {
        self.usage
    }

    /// The stop string that ended it.
    pub fn stop_string(&self) -> Option<&str> {
        self.stop_string.as_deref()
    }

    /// Waits for the end and returns all of it. Blocking.
    ///
    /// # Errors
    /// The first error of the generation.
    pub fn collect_blocking(mut self) -> Result<Generation> {
        let mut generation = Collected::default();
        for chunk in self.by_ref() {
            generation.push(chunk?);
        }
        generation.finish(self)
    }

    /// Waits for the end and returns all of it.
    ///
    /// # Errors
    /// The first error of the generation.
    pub async fn collect(mut self) -> Result<Generation> {
        let mut generation = Collected::default();
        while let Some(chunk) = self.next_chunk().await {
            generation.push(chunk?);
        }
        generation.finish(self)
    }

    /// The next piece; `None` at the end.
    pub async fn next_chunk(&mut self) -> Option<Result<Chunk>> {
        std::future::poll_fn(|context| Pin::new(&mut *self).poll_next(context)).await
    }

    fn handle(&mut self, event: Event) {
        match event {
            Event::Token(token, usage) => self.handle_token(token, usage),
            Event::Finished(reason, usage) => {
                let rest = self.detokenizer.as_mut().map_or(String::new(), Detokenizer::finish);
                let mut rest = self.stop.push(&rest);
                if !self.note_stop_string() {
                    rest.push_str(&self.stop.finish());
                }
                if !rest.is_empty() {
                    self.ready.push_back(Ok(Chunk { text: rest, token: None }));
                }
                self.end(reason, usage);
            }
            Event::Failed(error) => {
                self.ready.push_back(Err(error));
                self.events = None;
            }
            Event::Logits(_) | Event::Score(_) => {}
        }
    }

    fn handle_token(&mut self, token: GeneratedToken, usage: Usage) {
        self.usage = usage;
        if self.ending_tokens.contains(&token.id) {
            self.ready.push_back(Ok(Chunk { text: String::new(), token: Some(token) }));
            return;
        }
        let text = self.detokenizer.as_mut().map_or(String::new(), |d| d.push(token.id));
        let text = self.stop.push(&text);
        self.ready.push_back(Ok(Chunk { text, token: Some(token) }));
        if self.note_stop_string() {
            // The worker does not know the text; hanging up is what stops it.
            self.end(FinishReason::Stop, usage);
        }
    }

    fn note_stop_string(&mut self) -> bool {
        let found = self.stop.found();
        self.stop_string = found.map(|index| self.stop_strings[index].clone());
        found.is_some()
    }

    fn end(&mut self, reason: FinishReason, usage: Usage) {
        self.usage = usage;
        self.outcome = Some((reason, usage));
        self.events = None;
    }
}

impl Stream for TokenStream {
    type Item = Result<Chunk>;

    fn poll_next(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<Option<Self::Item>> {
        loop {
            if let Some(chunk) = self.ready.pop_front() {
                return Poll::Ready(Some(chunk));
            }
            let Some(events) = &mut self.events else { return Poll::Ready(None) };
            match Pin::new(events).poll_next(context) {
                Poll::Pending => return Poll::Pending,
                Poll::Ready(Some(event)) => self.handle(event),
                Poll::Ready(None) => {
                    self.events = None;
                    return Poll::Ready(Some(Err(InferenceError::stopped())));
                }
            }
        }
    }
}

impl Iterator for TokenStream {
    type Item = Result<Chunk>;

    fn next(&mut self) -> Option<Self::Item> {
        block_on(self.next_chunk())
    }
}

#[derive(Default)]
struct Collected {
    text: String,
    tokens: Vec<GeneratedToken>,
}

impl Collected {
    fn push(&mut self, chunk: Chunk) {
        self.text.push_str(&chunk.text);
        self.tokens.extend(chunk.token);
    }

    fn finish(self, stream: TokenStream) -> Result<Generation> {
        let (finish_reason, usage) = stream.outcome.ok_or_else(InferenceError::stopped)?;
        Ok(Generation {
            text: self.text,
            tokens: self.tokens,
            finish_reason,
            stop_string: stream.stop_string,
            usage,
        })
    }
}

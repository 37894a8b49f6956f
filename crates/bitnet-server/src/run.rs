//! A request's generations while they run: all sequences of one request as one sequence of events,
//! with its deadline, its measurements and its place in the server.
//!
//! Knows no wire format. Dropping a [`Run`] drops its streams, and the engine frees their memory
//! before its next step.

use std::collections::HashSet;
use std::future::Future;
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll};
use std::time::Instant;

use axum::http::StatusCode;
use bitnet_inference::{
    Chunk, FinishReason, GeneratedToken, GenerationOptions, InferenceError, InferenceInput, Model,
    RequestContext, TokenStream, Usage,
};
use futures_core::Stream;
use tracing::Span;

use crate::constraint::Constraint;
use crate::error::{ApiError, Result};
use crate::lifecycle::Phase;
use crate::metrics::ModelMetrics;
use crate::residency::ModelUse;
use crate::state::{Admission, AppState, Caller};
use crate::trace;

/// What to generate, once everything about it was checked.
#[derive(Debug)]
pub(crate) struct Job {
    pub(crate) model: ModelUse,
    /// Its name on this server.
    pub(crate) model_name: Arc<str>,
    /// What it is in traces: `chat` or `text_completion`.
    pub(crate) operation: &'static str,
    /// One or more prompts in token ids.
    pub(crate) prompts: Vec<Vec<u32>>,
    /// Choices for each prompt.
    pub(crate) n: usize,
    pub(crate) options: GenerationOptions,
    /// What the text is held to.
    pub(crate) constraint: Option<Constraint>,
    /// Runs before requests of lower priority.
    pub(crate) priority: i32,
    /// Added to the tenant's own salt of the prefix cache.
    pub(crate) cache_salt: Option<String>,
}

/// Something that happened to one choice; choices are numbered prompt by prompt.
#[derive(Debug)]
pub(crate) enum RunEvent {
    /// More text, or a token without text yet.
    Chunk { choice: usize, chunk: Chunk },
    /// The end of a choice.
    End { choice: usize, end: End },
}

/// How a choice ended.
#[derive(Debug, Clone, PartialEq)]
pub(crate) struct End {
    pub(crate) reason: FinishReason,
    pub(crate) usage: Usage,
    /// The stop string that was met.
    pub(crate) stop_string: Option<String>,
}

/// A choice with all of its text.
#[derive(Debug, Clone, PartialEq)]
pub(crate) struct Finished {
    pub(crate) text: String,
    /// Its tokens, without the one that ended it.
    pub(crate) tokens: Vec<GeneratedToken>,
    /// The text each of the tokens brought.
    pub(crate) end: End,
}

/// Generations in progress.
pub(crate) struct Run {
    state: AppState,
    caller: Caller,
    model: ModelUse,
    model_name: Arc<str>,
    n_prompt_tokens: usize,
    sequences: Vec<Sequence>,
    n_open: usize,
    /// Where polling goes on, so that no choice starves another.
    next: usize,
    ending_tokens: HashSet<u32>,
    constraint: Option<Constraint>,
    metrics: ModelMetrics,
    span: Span,
    /// Tokens of the prompts and of the answers that have ended, and how these did.
    counted: (usize, usize, Vec<&'static str>),
    deadline: Pin<Box<tokio::time::Sleep>>,
    _admission: Admission,
}

struct Sequence {
    stream: Option<TokenStream>,
    last_token: Option<Instant>,
}

impl Run {
    /// Submits all sequences of a job.
    ///
    /// # Errors
    /// What the engine refuses; nothing is left running then.
    pub(crate) fn start(
        state: &AppState,
        caller: &Caller,
        admission: Admission,
        job: Job,
    ) -> Result<Self> {
        let mut ending_tokens: HashSet<u32> = job.options.stop_token_ids.iter().copied().collect();
        if !job.options.ignore_eos
            && let Ok(tokenizer) = job.model.tokenizer()
        {
            ending_tokens.extend(tokenizer.eos_ids());
        }
        let n_choices = job.prompts.len() * job.n;
        // Waiting would not help: it never fits.
        let most = state.engine().config().max_waiting;
        if n_choices > most {
            let message = format!(
                "{n_choices} answers are asked for; at most {most} may wait on this server"
            );
            return Err(ApiError::field("n", message));
        }
        let span = trace::generation(job.operation, &job.model_name, &job.options, n_choices);
        let mut sequences = Vec::with_capacity(job.prompts.len() * job.n);
        for prompt in &job.prompts {
            for choice in 0..job.n {
                let mut options = job.options.for_choice(choice as u64);
                options.grammar = job.constraint.as_ref().map(|c| c.grammar.clone());
                let stream = submit(state, caller, &job, prompt.clone(), &options)?;
                sequences.push(Sequence { stream: Some(stream), last_token: None });
            }
        }
        let n_tokens = job.prompts.iter().map(Vec::len).sum();
        Ok(Self {
            span,
            counted: (n_tokens, 0, Vec::with_capacity(n_choices)),
            n_open: sequences.len(),
            n_prompt_tokens: job.prompts.first().map_or(0, Vec::len),
            sequences,
            next: 0,
            ending_tokens,
            constraint: job.constraint,
            metrics: state.metrics().of_model(&job.model_name),
            deadline: Box::pin(tokio::time::sleep_until(deadline(state, caller))),
            state: state.clone(),
            caller: caller.clone(),
            model: job.model,
            model_name: job.model_name,
            _admission: admission,
        })
    }

    /// The model that runs.
    pub(crate) fn model(&self) -> &Model {
        &self.model
    }

    /// Its name on this server.
    pub(crate) fn model_name(&self) -> &Arc<str> {
        &self.model_name
    }

    /// Tokens of the first prompt.
    pub(crate) fn n_prompt_tokens(&self) -> usize {
        self.n_prompt_tokens
    }

    /// Choices of all prompts.
    pub(crate) fn n_choices(&self) -> usize {
        self.sequences.len()
    }

    /// The next event; `None` once every choice has ended.
    ///
    /// # Errors
    /// A failing engine, the deadline, or the end of the server. Nothing comes after an error.
    pub(crate) async fn next(&mut self) -> Option<Result<RunEvent>> {
        if self.n_open == 0 {
            return None;
        }
        let lifecycle = self.state.lifecycle().clone();
        let event = tokio::select! {
            biased;
            event = std::future::poll_fn(|context| self.poll_event(context)) => event,
            () = lifecycle.reached(Phase::Cancelled) => Err(shutting_down()),
        };
        if event.is_err() {
            self.close("error");
        }
        Some(event)
    }

    /// Waits for the end of every choice.
    ///
    /// # Errors
    /// As [`next`](Self::next).
    pub(crate) async fn collect(mut self) -> Result<Vec<Finished>> {
        let mut open: Vec<(String, Vec<GeneratedToken>)> =
            vec![Default::default(); self.n_choices()];
        let mut ends: Vec<Option<End>> = vec![None; self.n_choices()];
        while let Some(event) = self.next().await {
            match event? {
                RunEvent::Chunk { choice, chunk } => {
                    let (text, tokens) = &mut open[choice];
                    text.push_str(&chunk.text);
                    tokens.extend(chunk.token);
                }
                RunEvent::End { choice, end } => ends[choice] = Some(end),
            }
        }
        let finish = |((text, tokens), end): ((String, Vec<GeneratedToken>), Option<End>)| {
            let end = end.ok_or_else(ApiError::internal)?;
            Ok(Finished { text, tokens, end })
        };
        open.into_iter().zip(ends).map(finish).collect()
    }

    fn poll_event(&mut self, context: &mut Context<'_>) -> Poll<Result<RunEvent>> {
        let n = self.sequences.len();
        for offset in 0..n {
            let choice = (self.next + offset) % n;
            let Some(stream) = &mut self.sequences[choice].stream else { continue };
            let Poll::Ready(item) = Pin::new(stream).poll_next(context) else { continue };
            self.next = (choice + 1) % n;
            return Poll::Ready(match item {
                Some(Ok(chunk)) => Ok(self.take_chunk(choice, chunk)),
                Some(Err(error)) => Err(named(&self.constraint, error)),
                None => self.end(choice),
            });
        }
        if self.deadline.as_mut().poll(context).is_ready() {
            return Poll::Ready(Err(too_slow()));
        }
        Poll::Pending
    }

    fn take_chunk(&mut self, choice: usize, mut chunk: Chunk) -> RunEvent {
        if let Some(token) = &chunk.token {
            let now = Instant::now();
            let previous = self.sequences[choice].last_token.replace(now);
            self.metrics.token(self.caller.arrived, previous, now);
            if previous.is_none() {
                trace::first_token(&self.span);
            }
            // Clients count on logprobs of text; the token that ends an answer is not part of it.
            if chunk.text.is_empty() && self.ending_tokens.contains(&token.id) {
                chunk.token = None;
            }
        }
        RunEvent::Chunk { choice, chunk }
    }

    fn end(&mut self, choice: usize) -> Result<RunEvent> {
        let stream = self.sequences[choice].stream.take().ok_or_else(ApiError::internal)?;
        self.n_open -= 1;
        let (reason, usage) = stream.outcome().ok_or_else(ApiError::internal)?;
        let name = match reason {
            FinishReason::Stop => "stop",
            FinishReason::Length => "length",
        };
        let took = self.caller.arrived.elapsed();
        self.state.metrics().sequence_ended(&self.model_name, name, took, Some(&usage));
        let (n_prompt, n_generated, reasons) = &mut self.counted;
        *n_generated += usage.completion_tokens;
        reasons.push(name);
        if self.n_open == 0 {
            trace::ended(&self.span, *n_prompt, *n_generated, reasons);
        }
        tracing::info!(
            request_id = &*self.caller.request_id,
            model = &*self.model_name,
            finish = name,
            prompt_tokens = usage.prompt_tokens,
            cached_tokens = usage.cached_tokens,
            completion_tokens = usage.completion_tokens,
            took_ms = took.as_millis() as u64,
            "sequence ended"
        );
        let stop_string = stream.stop_string().map(str::to_owned);
        Ok(RunEvent::End { choice, end: End { reason, usage, stop_string } })
    }

    fn close(&mut self, reason: &'static str) {
        if self.n_open > 0 {
            trace::failed(&self.span, reason);
        }
        for sequence in &mut self.sequences {
            if sequence.stream.take().is_some() {
                let took = self.caller.arrived.elapsed();
                self.state.metrics().sequence_ended(&self.model_name, reason, took, None);
            }
        }
        self.n_open = 0;
    }
}

impl Drop for Run {
    fn drop(&mut self) {
        self.close("abort");
    }
}

/// The log-probability of each token of `tokens` after the first, with `top` alternatives.
///
/// # Errors
/// What the engine refuses, the deadline, or the end of the server.
pub(crate) async fn score(
    state: &AppState,
    caller: &Caller,
    job: &Job,
    tokens: Vec<u32>,
    top: u32,
) -> Result<Vec<GeneratedToken>> {
    let input = InferenceInput::Tokens(tokens);
    let context = context(caller, job);
    let scores = state.engine().score_tokens(&job.model, &input, top as usize, &context);
    within_limits(state, caller, async { Ok(scores.await?) }).await
}

/// How the engine is to treat a request of this caller.
fn context(caller: &Caller, job: &Job) -> RequestContext {
    // A separator that neither part holds: no salt of one tenant can be made to equal another's.
    let cache_salt = match (&caller.tenant.cache_salt, &job.cache_salt) {
        (None, None) => None,
        (Some(tenant), None) => Some(tenant.clone()),
        (tenant, Some(own)) => Some(format!("{}\0{own}", tenant.as_deref().unwrap_or("")).into()),
    };
    RequestContext { priority: job.priority, cache_salt }
}

/// Waits for `work` until the caller's deadline or the end of the server.
pub(crate) async fn within_limits<T>(
    state: &AppState,
    caller: &Caller,
    work: impl Future<Output = Result<T>>,
) -> Result<T> {
    tokio::select! {
        biased;
        outcome = work => outcome,
        () = tokio::time::sleep_until(deadline(state, caller)) => Err(too_slow()),
        () = state.lifecycle().reached(Phase::Cancelled) => Err(shutting_down()),
    }
}

fn deadline(state: &AppState, caller: &Caller) -> tokio::time::Instant {
    tokio::time::Instant::from_std(caller.arrived) + state.config().limits.request_timeout
}

fn too_slow() -> ApiError {
    let message = "the request took longer than the server allows";
    ApiError::new(StatusCode::GATEWAY_TIMEOUT, message).code("request_timeout")
}

fn shutting_down() -> ApiError {
    ApiError::new(StatusCode::SERVICE_UNAVAILABLE, "the server is shutting down")
        .code("shutting_down")
}

/// The one place where a generation enters the engine.
fn submit(
    state: &AppState,
    caller: &Caller,
    job: &Job,
    prompt: Vec<u32>,
    options: &GenerationOptions,
) -> Result<TokenStream> {
    let input = InferenceInput::Tokens(prompt);
    let context = context(caller, job);
    state.engine().stream_for(&job.model, input, options, &context).map_err(|error| {
        let error = named(&job.constraint, error);
        if error.status == StatusCode::TOO_MANY_REQUESTS {
            state.metrics().rejected(error.code.unwrap_or("other"));
        }
        error
    })
}

/// An error of the engine, under the name of the field that caused it.
fn named(constraint: &Option<Constraint>, error: InferenceError) -> ApiError {
    match constraint {
        Some(constraint) => constraint.refusal(error),
        None => error.into(),
    }
}

//! Chat answers, whole and in chunks.
//!
//! The order of a stream's chunks, as clients and other servers' tests have it: for each choice first
//! the role with `content: null`, then text or tool calls, then an empty delta with the finish
//! reason; at the end, if asked for, one chunk without choices but with the usage, which is `null`
//! in all others; then `[DONE]`.

use std::sync::Arc;

use bitnet_inference::{FinishReason, GeneratedToken, Model};
use serde::Serialize;
use utoipa::ToSchema;

use super::FINGERPRINT;
use super::types::{FunctionKind, UsageBody, UsageChunks};
use crate::error::{ApiError, Dialect, Result};
use crate::middleware::random_id;
use crate::run::{End, Run, RunEvent};
use crate::stream::{Encoder, Frames};
use crate::text::token_bytes;
use crate::tools::{ToolEvent, ToolScanner};

/// One of the answers.
#[derive(Debug, Serialize, ToSchema)]
pub(crate) struct Choice {
    /// Its number.
    pub index: usize,
    /// The answer.
    pub message: AnswerMessage,
    /// Log-probabilities, if asked for.
    #[schema(required)]
    pub logprobs: Option<Logprobs>,
    /// Why it ended: `stop`, `length` or `tool_calls`.
    pub finish_reason: &'static str,
}

/// The message of an answer.
#[derive(Debug, Serialize, ToSchema)]
pub(crate) struct AnswerMessage {
    /// Always `assistant`.
    pub role: &'static str,
    /// Its text; null if there is none beside tool calls.
    #[schema(required)]
    pub content: Option<String>,
    /// Always null.
    #[schema(required, value_type = Option<String>)]
    pub refusal: Option<()>,
    /// Calls of tools.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub tool_calls: Vec<AnswerToolCall>,
}

/// A call of a tool.
#[derive(Debug, Clone, Serialize, ToSchema)]
pub(crate) struct AnswerToolCall {
    /// To be repeated in the tool's message.
    pub id: String,
    /// Always `function`.
    #[serde(rename = "type")]
    pub kind: FunctionKind,
    /// Which function, with which arguments.
    pub function: AnswerFunction,
}

/// A function and its arguments.
#[derive(Debug, Clone, Serialize, ToSchema)]
pub(crate) struct AnswerFunction {
    /// Its name.
    pub name: String,
    /// A JSON object as text; whole only if the answer did not end by `length`.
    pub arguments: String,
}

/// Log-probabilities of an answer's tokens.
#[derive(Debug, Default, Serialize, ToSchema)]
pub(crate) struct Logprobs {
    /// Token by token.
    pub content: Vec<TokenLogprob>,
    /// Always null.
    #[schema(required, value_type = Option<String>)]
    pub refusal: Option<()>,
}

/// A token and its alternatives.
#[derive(Debug, Serialize, ToSchema)]
pub(crate) struct TokenLogprob {
    /// Its text; bytes that are no character on their own are shown as U+FFFD.
    pub token: String,
    /// Natural logarithm of its probability.
    pub logprob: f32,
    /// Its bytes.
    #[schema(required)]
    pub bytes: Option<Vec<u8>>,
    /// The likeliest tokens at this place.
    pub top_logprobs: Vec<TopLogprob>,
}

/// An alternative.
#[derive(Debug, Serialize, ToSchema)]
pub(crate) struct TopLogprob {
    /// Its text.
    pub token: String,
    /// Natural logarithm of its probability.
    pub logprob: f32,
    /// Its bytes.
    #[schema(required)]
    pub bytes: Option<Vec<u8>>,
}

/// What every chunk of a stream repeats.
#[derive(Debug, Clone)]
pub(crate) struct ChunkHead {
    pub(crate) id: String,
    pub(crate) created: u64,
    pub(crate) model: Arc<str>,
    pub(crate) usage_chunks: UsageChunks,
}

/// Writes chat answers.
pub(crate) struct ChatEncoder {
    head: ChunkHead,
    model: Model,
    with_logprobs: bool,
    choices: Vec<Open>,
    n_prompt_tokens: usize,
    /// Tokens of all choices so far.
    n_generated: usize,
}

/// A choice that is being written.
struct Open {
    started: bool,
    scanner: Option<ToolScanner>,
    end: Option<End>,
}

#[derive(Serialize)]
struct Chunk<'a> {
    id: &'a str,
    object: &'static str,
    created: u64,
    model: &'a str,
    system_fingerprint: &'static str,
    choices: &'a [ChunkChoice<'a>],
    /// Absent unless asked for; then null in all chunks but the last.
    #[serde(skip_serializing_if = "Option::is_none")]
    usage: Option<Option<UsageBody>>,
}

#[derive(Serialize)]
struct ChunkChoice<'a> {
    index: usize,
    delta: Delta<'a>,
    logprobs: Option<Logprobs>,
    finish_reason: Option<&'static str>,
}

#[derive(Default, Serialize)]
struct Delta<'a> {
    #[serde(skip_serializing_if = "Option::is_none")]
    role: Option<&'static str>,
    /// Absent, null or text.
    #[serde(skip_serializing_if = "Option::is_none")]
    content: Option<Option<&'a str>>,
    #[serde(skip_serializing_if = "Option::is_none")]
    tool_calls: Option<[DeltaCall<'a>; 1]>,
}

#[derive(Serialize)]
struct DeltaCall<'a> {
    index: usize,
    #[serde(skip_serializing_if = "Option::is_none")]
    id: Option<String>,
    #[serde(rename = "type", skip_serializing_if = "Option::is_none")]
    kind: Option<FunctionKind>,
    function: DeltaFunction<'a>,
}

#[derive(Serialize)]
struct DeltaFunction<'a> {
    #[serde(skip_serializing_if = "Option::is_none")]
    name: Option<&'a str>,
    arguments: &'a str,
}

impl ChatEncoder {
    /// For a run; looks for calls of these tools in its text.
    pub(crate) fn new(
        head: ChunkHead,
        run: &Run,
        tools: &[String],
        max_calls: usize,
        with_logprobs: bool,
    ) -> Self {
        let open = |_| Open {
            started: false,
            scanner: (!tools.is_empty()).then(|| ToolScanner::new(tools.to_vec(), max_calls)),
            end: None,
        };
        let choices = (0..run.n_choices()).map(open).collect();
        Self {
            head,
            model: run.model().clone(),
            with_logprobs,
            choices,
            n_prompt_tokens: run.n_prompt_tokens(),
            n_generated: 0,
        }
    }

    /// Waits for the whole answer instead.
    pub(crate) async fn collect(
        mut self,
        mut run: Run,
    ) -> Result<(ChunkHead, Vec<Choice>, UsageBody)> {
        let mut answers: Vec<Answer> = self.choices.iter().map(|_| Answer::default()).collect();
        while let Some(event) = run.next().await {
            match event? {
                RunEvent::Chunk { choice, chunk } => {
                    answers[choice].take(self.choices[choice].scan(&chunk.text));
                    if self.with_logprobs
                        && let Some(token) = &chunk.token
                    {
                        answers[choice].logprobs.push(token_logprob(&self.model, token));
                    }
                }
                RunEvent::End { choice, end } => {
                    answers[choice].take(self.choices[choice].scan_end());
                    self.choices[choice].end = Some(end);
                }
            }
        }
        let usage = self.usage();
        let finish = |(index, (answer, open)): (usize, (Answer, &Open))| Choice {
            index,
            logprobs: self
                .with_logprobs
                .then_some(Logprobs { content: answer.logprobs, refusal: None }),
            finish_reason: open.finish_reason(),
            message: AnswerMessage {
                role: "assistant",
                content: (!answer.text.is_empty() || answer.calls.is_empty())
                    .then_some(answer.text),
                refusal: None,
                tool_calls: answer.calls,
            },
        };
        let choices = answers.into_iter().zip(&self.choices).enumerate().map(finish).collect();
        Ok((self.head, choices, usage))
    }

    /// The prompt counts once, the answers each.
    fn usage(&self) -> UsageBody {
        let ends = || self.choices.iter().filter_map(|open| open.end.as_ref());
        let prompt =
            ends().next().map_or((0, 0), |end| (end.usage.prompt_tokens, end.usage.cached_tokens));
        UsageBody::new(prompt.0, prompt.1, ends().map(|end| end.usage.completion_tokens).sum())
    }

    fn usage_so_far(&self) -> UsageBody {
        UsageBody::so_far(self.n_prompt_tokens, self.n_generated)
    }

    fn send(&self, choices: &[ChunkChoice<'_>], usage: Option<UsageBody>, out: &mut Frames) {
        out.data(&Chunk {
            id: &self.head.id,
            object: "chat.completion.chunk",
            created: self.head.created,
            model: &self.head.model,
            system_fingerprint: FINGERPRINT,
            choices,
            usage: match self.head.usage_chunks {
                UsageChunks::Never => None,
                UsageChunks::Last => Some(usage),
                UsageChunks::Every => Some(usage.or_else(|| Some(self.usage_so_far()))),
            },
        });
    }

    fn send_delta(
        &self,
        index: usize,
        delta: Delta<'_>,
        logprobs: Option<Logprobs>,
        out: &mut Frames,
    ) {
        self.send(&[ChunkChoice { index, delta, logprobs, finish_reason: None }], None, out);
    }

    fn start(&mut self, choice: usize, out: &mut Frames) {
        if !std::mem::replace(&mut self.choices[choice].started, true) {
            let delta = Delta { role: Some("assistant"), content: Some(None), ..Delta::default() };
            self.send_delta(choice, delta, None, out);
        }
    }

    fn send_events(
        &self,
        choice: usize,
        events: Vec<ToolEvent>,
        mut logprobs: Option<Logprobs>,
        out: &mut Frames,
    ) {
        for event in &events {
            let delta = match event {
                ToolEvent::Text(text) => Delta { content: Some(Some(text)), ..Delta::default() },
                ToolEvent::Call { index, name } => Delta::call(DeltaCall {
                    index: *index,
                    id: Some(random_id("call_")),
                    kind: Some(FunctionKind::Function),
                    function: DeltaFunction { name: Some(name), arguments: "" },
                }),
                ToolEvent::Arguments { index, delta } => Delta::call(DeltaCall {
                    index: *index,
                    id: None,
                    kind: None,
                    function: DeltaFunction { name: None, arguments: delta },
                }),
            };
            self.send_delta(choice, delta, logprobs.take(), out);
        }
        // A token whose text is not certain yet still has a probability.
        if let Some(logprobs) = logprobs {
            let delta = Delta { content: Some(Some("")), ..Delta::default() };
            self.send_delta(choice, delta, Some(logprobs), out);
        }
    }
}

impl Encoder for ChatEncoder {
    fn event(&mut self, event: RunEvent, out: &mut Frames) {
        match event {
            RunEvent::Chunk { choice, chunk } => {
                self.start(choice, out);
                self.n_generated += usize::from(chunk.token.is_some());
                let events = self.choices[choice].scan(&chunk.text);
                let token = chunk.token.as_ref().filter(|_| self.with_logprobs);
                let logprobs = token.map(|token| Logprobs {
                    content: vec![token_logprob(&self.model, token)],
                    refusal: None,
                });
                self.send_events(choice, events, logprobs, out);
            }
            RunEvent::End { choice, end } => {
                self.start(choice, out);
                let events = self.choices[choice].scan_end();
                self.send_events(choice, events, None, out);
                self.choices[choice].end = Some(end);
                let finish_reason = Some(self.choices[choice].finish_reason());
                let delta = Delta::default();
                let end = ChunkChoice { index: choice, delta, logprobs: None, finish_reason };
                self.send(&[end], None, out);
            }
        }
    }

    fn finish(&mut self, out: &mut Frames) {
        if self.head.usage_chunks != UsageChunks::Never {
            self.send(&[], Some(self.usage()), out);
        }
        out.done();
    }

    fn error(&mut self, error: &ApiError, out: &mut Frames) {
        out.data(&error.body(Dialect::OpenAi, ""));
        out.done();
    }
}

impl<'a> Delta<'a> {
    fn call(call: DeltaCall<'a>) -> Self {
        Self { tool_calls: Some([call]), ..Self::default() }
    }
}

impl Open {
    fn scan(&mut self, text: &str) -> Vec<ToolEvent> {
        let mut events = Vec::new();
        match &mut self.scanner {
            Some(scanner) => scanner.push(text, &mut events),
            None if text.is_empty() => {}
            None => events.push(ToolEvent::Text(text.to_owned())),
        }
        events
    }

    fn scan_end(&mut self) -> Vec<ToolEvent> {
        let mut events = Vec::new();
        if let Some(scanner) = &mut self.scanner {
            scanner.finish(&mut events);
        }
        events
    }

    fn finish_reason(&self) -> &'static str {
        let calls = self.scanner.as_ref().is_some_and(|scanner| scanner.n_calls() > 0);
        match self.end.as_ref().map(|end| end.reason) {
            Some(FinishReason::Length) => "length",
            _ if calls => "tool_calls",
            _ => "stop",
        }
    }
}

/// A whole answer in the making.
#[derive(Default)]
struct Answer {
    text: String,
    calls: Vec<AnswerToolCall>,
    logprobs: Vec<TokenLogprob>,
}

impl Answer {
    fn take(&mut self, events: Vec<ToolEvent>) {
        for event in events {
            match event {
                ToolEvent::Text(text) => self.text.push_str(&text),
                ToolEvent::Call { name, .. } => self.calls.push(AnswerToolCall {
                    id: random_id("call_"),
                    kind: FunctionKind::Function,
                    function: AnswerFunction { name, arguments: String::new() },
                }),
                ToolEvent::Arguments { index, delta } => {
                    self.calls[index].function.arguments.push_str(&delta);
                }
            }
        }
    }
}

/// The log-probabilities of a token in this format.
pub(crate) fn token_logprob(model: &Model, token: &GeneratedToken) -> TokenLogprob {
    let text = |id: u32| {
        let bytes = token_bytes(model, id);
        (String::from_utf8_lossy(&bytes).into_owned(), Some(bytes))
    };
    let top = |&(id, logprob): &(u32, f32)| {
        let (token, bytes) = text(id);
        TopLogprob { token, logprob: finite(logprob), bytes }
    };
    let (name, bytes) = text(token.id);
    TokenLogprob {
        token: name,
        logprob: finite(token.logprob.unwrap_or(f32::NEG_INFINITY)),
        bytes,
        top_logprobs: token.top_logprobs.iter().map(top).collect(),
    }
}

/// JSON has no infinity; OpenAI writes -9999 for a token that cannot occur.
pub(crate) fn finite(logprob: f32) -> f32 {
    if logprob.is_finite() { logprob } else { -9999.0 }
}

//! `POST /v1/completions`: text that continues a prompt, with the prompt and its log-probabilities in
//! front if asked for (`echo`), which is how evaluation harnesses score given answers.

use std::collections::BTreeMap;
use std::sync::Arc;

use axum::extract::State;
use axum::response::{IntoResponse, Response};
use bitnet_inference::detokenizer::Detokenizer;
use bitnet_inference::tokenizer::EncodeOptions;
use bitnet_inference::{FinishReason, GeneratedToken, Model};
use serde::{Deserialize, Serialize};
use utoipa::ToSchema;

use super::chat::{ServiceTier, check_stream_options};
use super::chat_stream::{ChunkHead, finite};
use super::types::{Prompt, Prompts, ResponseFormat, StreamOptions, UsageBody, UsageChunks};
use super::{FINGERPRINT, now};
use crate::constraint::Constraint;
use crate::error::{ApiError, Dialect, Result};
use crate::generate::{self, Format};
use crate::json::Json;
use crate::middleware::random_id;
use crate::residency::ModelUse;
use crate::run::{End, Job, Run, RunEvent, score};
use crate::sampling::with_sampling;
use crate::state::{AppState, Caller};
use crate::stream::{Encoder, Frames, Framing, respond};
use crate::text::{check_ids, encode, token_bytes};

/// Tokens generated where a request does not say.
const DEFAULT_MAX_TOKENS: u32 = 16;
const FORMAT: &str = "response_format";
/// Log-probabilities of prompt tokens in one answer: a bound on its size.
const MAX_PROMPT_LOGPROBS: usize = 1 << 20;

with_sampling! {
    /// A request for text that continues a prompt.
    #[derive(Debug, Deserialize, ToSchema)]
    #[serde(deny_unknown_fields)]
    #[allow(dead_code)] // Some fields only say what is accepted; reading them checks them.
    pub(crate) struct CompletionRequest {
        /// Name of the model, one of `/v1/models`.
        pub model: String,
        /// A text, token ids, or a list of either; each gets `n` answers.
        pub prompt: Prompts,
        /// Most tokens to generate. Default 16.
        #[schema(minimum = 0)]
        pub max_tokens: Option<i64>,
        /// Answers to each prompt. Default 1.
        #[schema(minimum = 1, maximum = 128)]
        pub n: Option<i64>,
        /// Only the same as `n`: answers are not drawn to be thrown away.
        pub best_of: Option<i64>,
        /// Begin the answer with the prompt.
        pub echo: Option<bool>,
        /// Report the log-probability of each token and of this many alternatives.
        #[schema(minimum = 0, maximum = 20)]
        pub logprobs: Option<i64>,
        /// The form the answers must have.
        pub response_format: Option<ResponseFormat>,
        /// Send the answer in pieces as they are computed.
        pub stream: Option<bool>,
        /// How the stream is written; only with `stream`.
        pub stream_options: Option<StreamOptions>,
        /// A label of the end user; it changes nothing in the answer.
        pub user: Option<String>,
        /// There is one tier; `auto` and `default` are its names.
        pub service_tier: Option<ServiceTier>,
        /// Separates this request's part of the prefix cache from others'.
        #[schema(min_length = 1, max_length = 256)]
        pub cache_salt: Option<String>,
        /// Requests with smaller numbers run first. Default 0.
        #[schema(minimum = -1000, maximum = 1000)]
        pub priority: Option<i64>,
    }
}

/// Answers.
#[derive(Debug, Serialize, ToSchema)]
pub(crate) struct CompletionResponse {
    /// Their id.
    pub id: String,
    /// Always `text_completion`.
    pub object: &'static str,
    /// Seconds since 1970.
    pub created: u64,
    /// The model that answered.
    #[schema(value_type = String)]
    pub model: Arc<str>,
    /// What computed them.
    pub system_fingerprint: &'static str,
    /// The answers: `n` to the first prompt, then `n` to the second, …
    pub choices: Vec<CompletionChoice>,
    /// What they took; in chunks of a stream only if asked for, and null in all but the last.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schema(value_type = Option<UsageBody>)]
    pub usage: Option<Option<UsageBody>>,
}

/// One of the answers, or a piece of it.
#[derive(Debug, Serialize, ToSchema)]
pub(crate) struct CompletionChoice {
    /// Its number.
    pub index: usize,
    /// Its text.
    pub text: String,
    /// Log-probabilities, if asked for.
    #[schema(required)]
    pub logprobs: Option<CompletionLogprobs>,
    /// Why it ended: `stop` or `length`; null while it goes on.
    #[schema(required)]
    pub finish_reason: Option<&'static str>,
}

/// Log-probabilities of an answer's tokens, as parallel lists.
#[derive(Debug, Default, Serialize, ToSchema)]
pub(crate) struct CompletionLogprobs {
    /// Where each token begins in the answer's text, in characters.
    pub text_offset: Vec<usize>,
    /// Natural logarithms of their probabilities; null for the first token of a prompt.
    pub token_logprobs: Vec<Option<f32>>,
    /// Their texts; bytes that are no text on their own as `bytes:\xNN`.
    pub tokens: Vec<String>,
    /// The likeliest tokens at each place and the token itself; null for a prompt's first.
    #[schema(value_type = Vec<Option<std::collections::HashMap<String, f32>>>)]
    pub top_logprobs: Vec<Option<BTreeMap<String, f32>>>,
}

/// Completion
///
/// Text that continues a prompt. With `stream`, server-sent events, ended by `data: [DONE]`.
#[utoipa::path(
    post,
    path = "/v1/completions",
    tag = "OpenAI",
    request_body = CompletionRequest,
    responses(
        (status = 200, content((CompletionResponse = "application/json"), (crate::openapi::StreamEvent = "text/event-stream"))),
        (status = "4XX", body = crate::openapi::OpenAiError),
        (status = "5XX", body = crate::openapi::OpenAiError),
    )
)]
pub(crate) async fn completions(
    State(state): State<AppState>,
    caller: Caller,
    Json(request): Json<CompletionRequest>,
) -> Result<Response> {
    let stream = request.stream.unwrap_or(false);
    let usage_chunks = check_stream_options(stream, request.stream_options)?;
    let asked = read(&state, request)?;
    let admission = state.admit(&caller)?;
    let entry = state.registry().entry(&asked.model)?;
    let model = state.registry().model(entry).await?;
    let model_name = entry.name.clone();
    let (echo, logprobs, n) = (asked.echo, asked.logprobs, asked.n);
    let (job, prompts) = state.compute(move || prepare(model, model_name, asked)).await?;
    let head = ChunkHead {
        id: random_id("cmpl-"),
        created: now(),
        model: job.model_name.clone(),
        usage_chunks,
    };
    let mut texts = Texts { model: (*job.model).clone(), logprobs, echoes: Vec::new() };
    if echo {
        for (text, tokens) in prompts.into_iter().zip(&job.prompts) {
            let scores = match logprobs {
                Some(top) => score(&state, &caller, &job, tokens.clone(), top).await?,
                None => Vec::new(),
            };
            texts.echoes.push(texts.echo(text, tokens, &scores)?);
        }
    }
    let n_prompt_tokens = job.prompts.iter().map(Vec::len).sum();
    let run = Run::start(&state, &caller, admission, job)?;
    let encoder = CompletionEncoder::new(head, texts, n, run.n_choices(), n_prompt_tokens);
    match stream {
        true => Ok(respond(&state, run, encoder, Framing::Sse)),
        false => Ok(axum::Json(encoder.collect(run).await?).into_response()),
    }
}

/// A request in which everything was checked that needs no model.
struct Asked {
    model: String,
    prompts: Vec<Prompt>,
    n: usize,
    echo: bool,
    logprobs: Option<u32>,
    max_tokens: u32,
    priority: i32,
    cache_salt: Option<String>,
    format: Format,
    sampling: crate::sampling::Sampling,
}

fn read(state: &AppState, mut request: CompletionRequest) -> Result<Asked> {
    let limits = &state.config().limits;
    let n = generate::count("n", request.n, limits.max_choices)?.unwrap_or(1);
    if request.best_of.is_some_and(|best_of| i64::try_from(n) != Ok(best_of)) {
        return Err(ApiError::unsupported("best_of", "only the same number as `n` is accepted"));
    }
    let logprobs = match request.logprobs {
        Some(top @ 0..=20) => Some(top as u32),
        Some(top) => return Err(ApiError::invalid("logprobs", "0 to 20", top)),
        None => None,
    };
    let prompts = std::mem::take(&mut request.prompt.0);
    if prompts.is_empty() || prompts.len() > limits.max_prompts {
        let expected = format!("1 to {} prompts", limits.max_prompts);
        return Err(ApiError::invalid("prompt", &expected, prompts.len()));
    }
    let max_tokens = generate::max_tokens("max_tokens", request.max_tokens, 0)?;
    Ok(Asked {
        model: std::mem::take(&mut request.model),
        prompts,
        n,
        echo: request.echo.unwrap_or(false),
        logprobs,
        max_tokens: max_tokens.unwrap_or(DEFAULT_MAX_TOKENS),
        priority: generate::priority(request.priority)?,
        cache_salt: generate::cache_salt(request.cache_salt.take())?,
        format: ResponseFormat::read(request.response_format.take(), FORMAT)?,
        sampling: request.take_sampling(),
    })
}

/// The job, and the text of each prompt.
fn prepare(model: ModelUse, model_name: Arc<str>, asked: Asked) -> Result<(Job, Vec<String>)> {
    let mut options = asked.sampling.options(model.get_output_dim())?;
    let constraint = match asked.format {
        Format::Text => None,
        Format::Grammar(grammar) => Some(Constraint { grammar, param: FORMAT }),
    };
    if let Some(constraint) = &constraint {
        constraint.prepare(&model)?;
    }
    options.max_tokens = Some(asked.max_tokens);
    options.logprobs = asked.logprobs;
    let (mut texts, mut prompts) = (Vec::new(), Vec::new());
    for prompt in asked.prompts {
        let (text, tokens) = match prompt {
            Prompt::Text(text) => {
                let tokens = encode(&model, &text, EncodeOptions::PROMPT)?;
                (text, tokens)
            }
            Prompt::Tokens(tokens) => {
                check_ids(&model, "prompt", &tokens)?;
                let text = match asked.echo {
                    true => model.tokenizer()?.decode(&tokens, false),
                    false => String::new(),
                };
                (text, tokens)
            }
        };
        texts.push(text);
        prompts.push(tokens);
    }
    let n_tokens: usize = prompts.iter().map(Vec::len).sum();
    let per_token = asked.logprobs.map_or(0, |top| top as usize + 1);
    if asked.echo && n_tokens.saturating_mul(per_token) > MAX_PROMPT_LOGPROBS {
        let expected = format!(
            "prompts of at most {} tokens with this `logprobs`",
            MAX_PROMPT_LOGPROBS / per_token
        );
        return Err(ApiError::invalid("prompt", &expected, n_tokens));
    }
    let (n, priority, cache_salt) = (asked.n, asked.priority, asked.cache_salt);
    let job = Job {
        model,
        model_name,
        operation: "text_completion",
        prompts,
        n,
        options,
        constraint,
        priority,
        cache_salt,
    };
    Ok((job, texts))
}

/// What turns tokens into the texts of an answer.
struct Texts {
    model: Model,
    logprobs: Option<u32>,
    /// For each prompt, what its answers begin with.
    echoes: Vec<Echo>,
}

struct Echo {
    text: String,
    logprobs: Vec<Logprob>,
}

/// A row of the parallel lists.
#[derive(Clone)]
struct Logprob {
    offset: usize,
    token: String,
    logprob: Option<f32>,
    top: Option<BTreeMap<String, f32>>,
}

impl Texts {
    fn echo(&self, text: String, tokens: &[u32], scores: &[GeneratedToken]) -> Result<Echo> {
        let mut logprobs = Vec::new();
        if self.logprobs.is_some() {
            let mut detokenizer = Detokenizer::new(self.model.tokenizer()?);
            let mut offset = 0;
            for (i, &id) in tokens.iter().enumerate() {
                // The first token has no probability: nothing stands before it.
                let scored = i.checked_sub(1).and_then(|i| scores.get(i));
                logprobs.push(match scored {
                    Some(token) => self.row(offset, token),
                    None => Logprob { offset, token: self.name(id), logprob: None, top: None },
                });
                offset += detokenizer.push(id).chars().count();
            }
        }
        Ok(Echo { text, logprobs })
    }

    fn row(&self, offset: usize, token: &GeneratedToken) -> Logprob {
        let logprob = finite(token.logprob.unwrap_or(f32::NEG_INFINITY));
        let name = self.name(token.id);
        let mut top: BTreeMap<String, f32> =
            token.top_logprobs.iter().map(|&(id, p)| (self.name(id), finite(p))).collect();
        top.insert(name.clone(), logprob);
        Logprob { offset, token: name, logprob: Some(logprob), top: Some(top) }
    }

    fn name(&self, id: u32) -> String {
        token_name(&token_bytes(&self.model, id))
    }
}

/// A token's text, or its bytes in a form in which different tokens stay different.
fn token_name(bytes: &[u8]) -> String {
    match std::str::from_utf8(bytes) {
        Ok(text) => text.to_owned(),
        Err(_) => {
            bytes.iter().fold("bytes:".to_owned(), |name, byte| name + &format!("\\x{byte:02x}"))
        }
    }
}

struct CompletionEncoder {
    head: ChunkHead,
    texts: Texts,
    /// Choices for each prompt.
    n: usize,
    choices: Vec<Open>,
    n_prompt_tokens: usize,
    /// Tokens of all choices so far.
    n_generated: usize,
}

#[derive(Default)]
struct Open {
    /// Characters written.
    offset: usize,
    started: bool,
    end: Option<End>,
}

impl CompletionEncoder {
    fn new(
        head: ChunkHead,
        texts: Texts,
        n: usize,
        n_choices: usize,
        n_prompt_tokens: usize,
    ) -> Self {
        let choices = (0..n_choices).map(|_| Open::default()).collect();
        Self { head, texts, n, choices, n_prompt_tokens, n_generated: 0 }
    }

    /// The piece an event adds to its choice.
    fn piece(&mut self, event: RunEvent) -> CompletionChoice {
        let (index, new_text, token, end) = match event {
            RunEvent::Chunk { choice, chunk } => (choice, chunk.text, chunk.token, None),
            RunEvent::End { choice, end } => (choice, String::new(), None, Some(end)),
        };
        self.n_generated += usize::from(token.is_some());
        let open = &mut self.choices[index];
        let (mut text, mut rows) = (String::new(), Vec::new());
        if !std::mem::replace(&mut open.started, true)
            && let Some(echo) = self.texts.echoes.get(index / self.n)
        {
            text.push_str(&echo.text);
            rows.clone_from(&echo.logprobs);
            open.offset = text.chars().count();
        }
        if self.texts.logprobs.is_some()
            && let Some(token) = &token
        {
            rows.push(self.texts.row(open.offset, token));
        }
        open.offset += new_text.chars().count();
        text.push_str(&new_text);
        let finish_reason = end.as_ref().map(|end| match end.reason {
            FinishReason::Stop => "stop",
            FinishReason::Length => "length",
        });
        if end.is_some() {
            open.end = end;
        }
        let logprobs = self.texts.logprobs.map(|_| CompletionLogprobs::from_rows(rows));
        CompletionChoice { index, text, logprobs, finish_reason }
    }

    async fn collect(mut self, mut run: Run) -> Result<CompletionResponse> {
        let mut choices: Vec<Option<CompletionChoice>> =
            self.choices.iter().map(|_| None).collect();
        while let Some(event) = run.next().await {
            let piece = self.piece(event?);
            match &mut choices[piece.index] {
                Some(choice) => choice.append(piece),
                empty => *empty = Some(piece),
            }
        }
        let usage = Some(Some(self.usage()));
        Ok(self.response(choices.into_iter().flatten().collect(), usage))
    }

    /// Each prompt counts once, the answers each.
    fn usage(&self) -> UsageBody {
        let ends = || self.choices.iter().map(|open| open.end.as_ref());
        let first_of_prompts = || ends().step_by(self.n).flatten();
        UsageBody::new(
            first_of_prompts().map(|end| end.usage.prompt_tokens).sum(),
            first_of_prompts().map(|end| end.usage.cached_tokens).sum(),
            ends().flatten().map(|end| end.usage.completion_tokens).sum(),
        )
    }

    fn response(
        &self,
        choices: Vec<CompletionChoice>,
        usage: Option<Option<UsageBody>>,
    ) -> CompletionResponse {
        CompletionResponse {
            id: self.head.id.clone(),
            object: "text_completion",
            created: self.head.created,
            model: self.head.model.clone(),
            system_fingerprint: FINGERPRINT,
            choices,
            usage,
        }
    }
}

impl Encoder for CompletionEncoder {
    fn event(&mut self, event: RunEvent, out: &mut Frames) {
        let piece = self.piece(event);
        let tells = piece.finish_reason.is_some()
            || !piece.text.is_empty()
            || piece.logprobs.as_ref().is_some_and(|logprobs| !logprobs.tokens.is_empty());
        if tells {
            let usage = match self.head.usage_chunks {
                UsageChunks::Never => None,
                UsageChunks::Last => Some(None),
                UsageChunks::Every => {
                    Some(Some(UsageBody::so_far(self.n_prompt_tokens, self.n_generated)))
                }
            };
            out.data(&self.response(vec![piece], usage));
        }
    }

    fn finish(&mut self, out: &mut Frames) {
        if self.head.usage_chunks != UsageChunks::Never {
            out.data(&self.response(Vec::new(), Some(Some(self.usage()))));
        }
        out.done();
    }

    fn error(&mut self, error: &ApiError, out: &mut Frames) {
        out.data(&error.body(Dialect::OpenAi, ""));
        out.done();
    }
}

impl CompletionChoice {
    fn append(&mut self, piece: Self) {
        self.text.push_str(&piece.text);
        self.finish_reason = piece.finish_reason.or(self.finish_reason);
        if let (Some(all), Some(more)) = (&mut self.logprobs, piece.logprobs) {
            all.text_offset.extend(more.text_offset);
            all.token_logprobs.extend(more.token_logprobs);
            all.tokens.extend(more.tokens);
            all.top_logprobs.extend(more.top_logprobs);
        }
    }
}

impl CompletionLogprobs {
    fn from_rows(rows: Vec<Logprob>) -> Self {
        let mut lists = Self::default();
        for row in rows {
            lists.text_offset.push(row.offset);
            lists.token_logprobs.push(row.logprob);
            lists.tokens.push(row.token);
            lists.top_logprobs.push(row.top);
        }
        lists
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn tokens_that_are_no_text_keep_different_names() {
        assert_eq!(token_name("é".as_bytes()), "é");
        assert_eq!(token_name(&[0xe2, 0x80]), "bytes:\\xe2\\x80");
    }
}

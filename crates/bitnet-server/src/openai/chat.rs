//! `POST /v1/chat/completions`: from the request to its answer or its stream.

use std::sync::Arc;

use axum::extract::State;
use axum::response::{IntoResponse, Response};
use serde::{Deserialize, Serialize};
use utoipa::ToSchema;

use super::chat_stream::{ChatEncoder, Choice, ChunkHead};
use super::types::{
    Message, MessageRole, Metadata, ResponseFormat, StreamOptions, ToolChoice, ToolDefinition,
    UsageBody, UsageChunks,
};
use super::{FINGERPRINT, now};
use crate::chat::{Call, Conversation, Role, Tool, Turn};
use crate::error::{ApiError, Result};
use crate::generate::{self, ChatJob, Format, ToolMode};
use crate::json::Json;
use crate::middleware::random_id;
use crate::sampling::with_sampling;
use crate::state::{AppState, Caller};
use crate::stream::{Framing, respond};

with_sampling! {
    /// A request for the next message of a conversation.
    #[derive(Debug, Deserialize, ToSchema)]
    #[serde(deny_unknown_fields)]
    #[allow(dead_code)] // Some fields only say what is accepted; reading them checks them.
    pub(crate) struct ChatRequest {
        /// Name of the model, one of `/v1/models`.
        pub model: String,
        /// The conversation so far.
        #[schema(min_items = 1)]
        pub messages: Vec<Message>,
        /// Send the answer in pieces as they are computed.
        pub stream: Option<bool>,
        /// How the stream is written; only with `stream`.
        pub stream_options: Option<StreamOptions>,
        /// Answers to generate. Default 1.
        #[schema(minimum = 1, maximum = 128)]
        pub n: Option<i64>,
        /// Most tokens to generate. Default: as many as the context holds.
        #[schema(minimum = 1)]
        pub max_completion_tokens: Option<i64>,
        /// The older name of `max_completion_tokens`.
        #[schema(minimum = 1)]
        pub max_tokens: Option<i64>,
        /// Report the log-probability of each token.
        pub logprobs: Option<bool>,
        /// Report this many alternatives for each token; needs `logprobs`.
        #[schema(minimum = 0, maximum = 20)]
        pub top_logprobs: Option<i64>,
        /// The form the answer must have.
        pub response_format: Option<ResponseFormat>,
        /// Tools the model may call.
        pub tools: Option<Vec<ToolDefinition>>,
        /// Which of them it may or must call. Default `auto` with tools, `none` without.
        pub tool_choice: Option<ToolChoice>,
        /// Whether it may call several at once. Default true.
        pub parallel_tool_calls: Option<bool>,
        /// Only `["text"]`.
        pub modalities: Option<Vec<Modality>>,
        /// Only `false`: nothing is stored.
        pub store: Option<bool>,
        /// Labels; they change nothing in the answer.
        pub metadata: Option<Metadata>,
        /// A label of the end user; it changes nothing in the answer.
        pub user: Option<String>,
        /// A label of the end user; it changes nothing in the answer.
        pub safety_identifier: Option<String>,
        /// A hint for caches of many machines; here every request shares one cache.
        pub prompt_cache_key: Option<String>,
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

/// Kinds of output.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Deserialize, ToSchema)]
#[serde(rename_all = "lowercase")]
pub(crate) enum Modality {
    /// Text.
    Text,
}

/// Names of the one tier.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Deserialize, ToSchema)]
#[serde(rename_all = "lowercase")]
pub(crate) enum ServiceTier {
    /// As the server likes.
    Auto,
    /// The usual one.
    Default,
}

/// An answer.
#[derive(Debug, Serialize, ToSchema)]
pub(crate) struct ChatResponse {
    /// Its id.
    pub id: String,
    /// Always `chat.completion`.
    #[schema(example = "chat.completion")]
    pub object: &'static str,
    /// Seconds since 1970.
    pub created: u64,
    /// The model that answered.
    #[schema(value_type = String)]
    pub model: Arc<str>,
    /// What computed it.
    pub system_fingerprint: &'static str,
    /// The answers, by index.
    pub choices: Vec<Choice>,
    /// What it took.
    pub usage: UsageBody,
}

/// Chat completion
///
/// The next message of a conversation. With `stream`, server-sent events of `chat.completion.chunk`
/// objects, ended by `data: [DONE]`.
#[utoipa::path(
    post,
    path = "/v1/chat/completions",
    tag = "OpenAI",
    request_body = ChatRequest,
    responses(
        (status = 200, content((ChatResponse = "application/json"), (crate::openapi::StreamEvent = "text/event-stream"))),
        (status = "4XX", body = crate::openapi::OpenAiError),
        (status = "5XX", body = crate::openapi::OpenAiError),
    )
)]
pub(crate) async fn chat_completions(
    State(state): State<AppState>,
    caller: Caller,
    Json(request): Json<ChatRequest>,
) -> Result<Response> {
    let stream = request.stream.unwrap_or(false);
    let usage_chunks = check_stream_options(stream, request.stream_options)?;
    let (job, with_logprobs) = read(&state, request)?;
    let max_calls = job.max_calls;
    let tool_names: Vec<String> = match job.tools {
        ToolMode::None => Vec::new(),
        _ => job.conversation.tools.iter().map(|tool| tool.name.clone()).collect(),
    };
    let run = generate::start_chat(&state, &caller, job).await?;
    let head = ChunkHead {
        id: random_id("chatcmpl-"),
        created: now(),
        model: run.model_name().clone(),
        usage_chunks,
    };
    let encoder = ChatEncoder::new(head, &run, &tool_names, max_calls, with_logprobs);
    if stream {
        return Ok(respond(&state, run, encoder, Framing::Sse));
    }
    let (head, choices, usage) = encoder.collect(run).await?;
    let response = ChatResponse {
        id: head.id,
        object: "chat.completion",
        created: head.created,
        model: head.model,
        system_fingerprint: FINGERPRINT,
        choices,
        usage,
    };
    Ok(axum::Json(response).into_response())
}

/// Where usage is to be streamed.
pub(crate) fn check_stream_options(
    stream: bool,
    options: Option<StreamOptions>,
) -> Result<UsageChunks> {
    let Some(options) = options else { return Ok(UsageChunks::Never) };
    if !stream {
        return Err(ApiError::field("stream_options", "`stream_options` needs `stream: true`"));
    }
    if options.include_obfuscation == Some(true) {
        let why = "chunks are not padded";
        return Err(ApiError::unsupported("stream_options.include_obfuscation", why));
    }
    let include = options.include_usage.unwrap_or(false);
    match (include, options.continuous_usage_stats.unwrap_or(false)) {
        (false, true) => {
            let field = "stream_options.continuous_usage_stats";
            Err(ApiError::field(field, format!("`{field}` needs `include_usage: true`")))
        }
        (false, false) => Ok(UsageChunks::Never),
        (true, false) => Ok(UsageChunks::Last),
        (true, true) => Ok(UsageChunks::Every),
    }
}

/// Checks everything that needs no model.
fn read(state: &AppState, mut request: ChatRequest) -> Result<(ChatJob, bool)> {
    let limits = &state.config().limits;
    if request.store == Some(true) {
        return Err(ApiError::unsupported("store", "answers are not stored"));
    }
    let n = generate::count("n", request.n, limits.max_choices)?.unwrap_or(1);
    let max_tokens = match (request.max_completion_tokens, request.max_tokens) {
        (Some(_), Some(_)) => {
            let message = "`max_tokens` and `max_completion_tokens` mean the same; send one";
            return Err(ApiError::field("max_tokens", message));
        }
        (Some(n), None) => generate::max_tokens("max_completion_tokens", Some(n), 1)?,
        (None, n) => generate::max_tokens("max_tokens", n, 1)?,
    };
    let with_logprobs = request.logprobs.unwrap_or(false);
    let top_logprobs = match request.top_logprobs {
        Some(_) if !with_logprobs => {
            return Err(ApiError::field("top_logprobs", "`top_logprobs` needs `logprobs: true`"));
        }
        Some(n @ 0..=20) => n as u32,
        Some(n) => return Err(ApiError::invalid("top_logprobs", "0 to 20", n)),
        None => 0,
    };
    let tools = read_tools(request.tools.take().unwrap_or_default(), limits.max_tools)?;
    let tool_mode = read_tool_choice(request.tool_choice.take(), &tools)?;
    let conversation =
        Conversation { turns: read_messages(&request.messages, limits.max_messages)?, tools };
    let format = ResponseFormat::read(request.response_format.take(), "response_format")?;
    if !matches!(tool_mode, ToolMode::None | ToolMode::Auto) && format != Format::Text {
        let message = "a forced tool call and a response format cannot both shape the answer";
        return Err(ApiError::field("response_format", message));
    }
    let model = std::mem::take(&mut request.model);
    let priority = generate::priority(request.priority)?;
    let cache_salt = generate::cache_salt(request.cache_salt.take())?;
    let one_call = request.parallel_tool_calls == Some(false);
    let job = ChatJob {
        tools: tool_mode,
        max_calls: if one_call { 1 } else { limits.max_tools },
        format,
        n,
        max_tokens,
        logprobs: with_logprobs.then_some(top_logprobs),
        priority,
        cache_salt,
        ..ChatJob::new(model, conversation, request.take_sampling())
    };
    Ok((job, with_logprobs))
}

pub(crate) fn read_messages(messages: &[Message], max_messages: usize) -> Result<Vec<Turn>> {
    if messages.is_empty() || messages.len() > max_messages {
        let expected = format!("1 to {max_messages} messages");
        return Err(ApiError::invalid("messages", &expected, messages.len()));
    }
    messages.iter().enumerate().map(|(i, message)| read_message(i, message)).collect()
}

fn read_message(i: usize, message: &Message) -> Result<Turn> {
    let role = match message.role {
        MessageRole::System | MessageRole::Developer => Role::System,
        MessageRole::User => Role::User,
        MessageRole::Assistant => Role::Assistant,
        MessageRole::Tool => Role::Tool,
    };
    let only = |field: &str, wanted: Role| {
        let param = format!("messages[{i}].{field}");
        let message = format!("`{param}` belongs to messages of role `{}` only", wanted.name());
        ApiError::field(param, message)
    };
    if message.tool_calls.is_some() && role != Role::Assistant {
        return Err(only("tool_calls", Role::Assistant));
    }
    if message.refusal.is_some() && role != Role::Assistant {
        return Err(only("refusal", Role::Assistant));
    }
    if message.tool_call_id.is_some() != (role == Role::Tool) {
        if role != Role::Tool {
            return Err(only("tool_call_id", Role::Tool));
        }
        let param = format!("messages[{i}].tool_call_id");
        let message = format!("`{param}` is required in a message of role `tool`");
        return Err(ApiError::field(param, message).code("missing_required_parameter"));
    }
    let call = |call: &super::types::MessageToolCall| Call {
        id: call.id.clone(),
        name: call.function.name.clone(),
        arguments: call.function.arguments.clone(),
    };
    let calls: Vec<Call> = message.tool_calls.iter().flatten().map(call).collect();
    let content = message.content.as_ref().map(|content| &content.0);
    let text = content.or(message.refusal.as_ref());
    if text.is_none() && calls.is_empty() {
        let param = format!("messages[{i}].content");
        let message = format!("`{param}` is required");
        return Err(ApiError::field(param, message).code("missing_required_parameter"));
    }
    let answers = message.tool_call_id.clone();
    Ok(Turn { role, text: text.cloned().unwrap_or_default(), calls, answers })
}

pub(crate) fn read_tools(tools: Vec<ToolDefinition>, max_tools: usize) -> Result<Vec<Tool>> {
    if tools.len() > max_tools {
        return Err(ApiError::invalid("tools", &format!("at most {max_tools} tools"), tools.len()));
    }
    let tool = |(i, tool): (usize, ToolDefinition)| {
        let function = tool.function;
        let field = |name: &str| format!("tools[{i}].function.{name}");
        generate::tool(
            &field("name"),
            &field("parameters"),
            function.name,
            function.description,
            function.parameters,
        )
    };
    let tools: Vec<Tool> = tools.into_iter().enumerate().map(tool).collect::<Result<_>>()?;
    generate::distinct_tools("tools", &tools)?;
    Ok(tools)
}

fn read_tool_choice(choice: Option<ToolChoice>, tools: &[Tool]) -> Result<ToolMode> {
    match choice {
        None | Some(ToolChoice::Auto) if tools.is_empty() => Ok(ToolMode::None),
        None | Some(ToolChoice::Auto) => Ok(ToolMode::Auto),
        Some(ToolChoice::None) => Ok(ToolMode::None),
        Some(ToolChoice::Required) if tools.is_empty() => Err(ApiError::field(
            "tool_choice",
            "`tool_choice` is `required`, but there are no tools",
        )),
        Some(ToolChoice::Required) => Ok(ToolMode::Required),
        Some(ToolChoice::Named(name)) => match tools.iter().any(|tool| tool.name == name) {
            true => Ok(ToolMode::Named(name)),
            false => {
                let message = "`tool_choice` names a tool that is not among `tools`";
                Err(ApiError::field("tool_choice.function.name", message))
            }
        },
    }
}

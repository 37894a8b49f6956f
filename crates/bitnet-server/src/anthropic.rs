//! Anthropic's wire format: `POST /v1/messages` and `/v1/messages/count_tokens`.

use std::collections::HashMap;

use axum::extract::State;
use axum::response::{IntoResponse, Response};
use bitnet_inference::FinishReason;
use serde::{Deserialize, Serialize};
use serde_json::{Value, json};
use utoipa::ToSchema;

use crate::anthropic_stream::{MessageEncoder, MessageResponse};
use crate::chat::{self, Call, Conversation, Role, Tool, Turn};
use crate::content::{BlockKind, Blocks};
use crate::error::{ApiError, Result};
use crate::generate::{self, ChatJob, ToolMode};
use crate::json::Json;
use crate::sampling::{OneOrMany, Sampling};
use crate::state::{AppState, Caller};
use crate::stream::{Framing, respond};

/// A request for the next message.
#[derive(Debug, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
#[allow(dead_code)] // Some fields only say what is accepted; reading them checks them.
pub(crate) struct MessagesRequest {
    /// Name of the model, one of `/v1/models`.
    pub model: String,
    /// Most tokens to generate.
    #[schema(minimum = 1)]
    pub max_tokens: i64,
    /// The conversation so far.
    #[schema(min_items = 1)]
    pub messages: Vec<InputMessage>,
    /// Instructions.
    pub system: Option<Blocks>,
    /// Texts that end the answer.
    pub stop_sequences: Option<Vec<String>>,
    /// Send the answer in pieces as they are computed.
    pub stream: Option<bool>,
    /// Divides the logits before the draw; 0 takes the likeliest token. Default 1.
    #[schema(minimum = 0, maximum = 1)]
    pub temperature: Option<f64>,
    /// Keep this many of the likeliest tokens.
    #[schema(minimum = 0)]
    pub top_k: Option<i64>,
    /// Keep the likeliest tokens that together reach this probability.
    #[schema(minimum = 0, maximum = 1)]
    pub top_p: Option<f64>,
    /// Tools the model may call.
    pub tools: Option<Vec<ToolParam>>,
    /// Which of them it may or must call.
    pub tool_choice: Option<ToolChoiceParam>,
    /// Labels; they change nothing in the answer.
    pub metadata: Option<RequestMetadata>,
    /// Only `{"type": "disabled"}`.
    pub thinking: Option<Thinking>,
    /// There is one tier.
    pub service_tier: Option<Tier>,
}

/// A request for the number of tokens of a conversation.
#[derive(Debug, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
#[allow(dead_code)] // Some fields only say what is accepted; reading them checks them.
pub(crate) struct CountRequest {
    /// Name of the model, one of `/v1/models`.
    pub model: String,
    /// The conversation so far.
    #[schema(min_items = 1)]
    pub messages: Vec<InputMessage>,
    /// Instructions.
    pub system: Option<Blocks>,
    /// Tools the model may call.
    pub tools: Option<Vec<ToolParam>>,
    /// Which of them it may or must call.
    pub tool_choice: Option<ToolChoiceParam>,
    /// Only `{"type": "disabled"}`.
    pub thinking: Option<Thinking>,
}

/// A message of a conversation.
#[derive(Debug, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub(crate) struct InputMessage {
    /// Who speaks.
    pub role: InputRole,
    /// What is said.
    pub content: Blocks,
}

/// Who speaks.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Deserialize, ToSchema)]
#[serde(rename_all = "lowercase")]
pub(crate) enum InputRole {
    /// The person, or tools on their behalf.
    User,
    /// The model.
    Assistant,
}

/// A tool the model may call.
#[derive(Debug, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
#[allow(dead_code)] // Some fields only say what is accepted; reading them checks them.
pub(crate) struct ToolParam {
    /// Only `custom`: the server has no tools of its own.
    #[serde(rename = "type", default)]
    pub kind: CustomTool,
    /// Letters, digits, `_` and `-`.
    #[schema(min_length = 1, max_length = 64, pattern = "^[a-zA-Z0-9_-]+$")]
    pub name: String,
    /// What it does, for the model.
    pub description: Option<String>,
    /// JSON schema of its arguments, an object.
    #[schema(value_type = Object)]
    pub input_schema: Value,
    /// A hint for caches; here every prefix is cached.
    pub cache_control: Option<CacheControl>,
}

/// The one kind of tool.
#[derive(Debug, Clone, Copy, Default, Deserialize, ToSchema)]
#[serde(rename_all = "lowercase")]
pub(crate) enum CustomTool {
    /// A tool of the caller.
    #[default]
    Custom,
}

/// Which tools the model may or must call.
#[derive(Debug, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub(crate) struct ToolChoiceParam {
    /// How it is decided.
    #[serde(rename = "type")]
    pub kind: ToolChoiceKind,
    /// With `tool`: which.
    pub name: Option<String>,
    /// Call at most one. Default false.
    pub disable_parallel_tool_use: Option<bool>,
}

/// How a tool is chosen.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Deserialize, ToSchema)]
#[serde(rename_all = "lowercase")]
pub(crate) enum ToolChoiceKind {
    /// The model decides.
    Auto,
    /// It must call one.
    Any,
    /// It must call the one named.
    Tool,
    /// It is shown none.
    None,
}

/// Labels of a request.
#[derive(Debug, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
#[allow(dead_code)] // Some fields only say what is accepted; reading them checks them.
pub(crate) struct RequestMetadata {
    /// A label of the end user.
    pub user_id: Option<String>,
}

/// Thinking aloud, which these models do not.
#[derive(Debug, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
#[allow(dead_code)] // Some fields only say what is accepted; reading them checks them.
pub(crate) struct Thinking {
    /// Whether.
    #[serde(rename = "type")]
    pub kind: ThinkingKind,
}

/// The one way of thinking on offer.
#[derive(Debug, Clone, Copy, Deserialize, ToSchema)]
#[serde(rename_all = "lowercase")]
pub(crate) enum ThinkingKind {
    /// Not aloud.
    Disabled,
}

/// A hint for caches; every prefix is cached here as it is.
#[derive(Debug, Clone, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
#[allow(dead_code)] // Some fields only say what is accepted; reading them checks them.
pub(crate) struct CacheControl {
    /// Only `ephemeral`.
    #[serde(rename = "type")]
    pub kind: Ephemeral,
    /// `5m` or `1h`; the cache keeps what it has room for.
    pub ttl: Option<String>,
}

/// The one kind of cache.
#[derive(Debug, Clone, Copy, Deserialize, ToSchema)]
#[serde(rename_all = "lowercase")]
pub(crate) enum Ephemeral {
    /// Kept for a while.
    Ephemeral,
}

/// Names of the one tier.
#[derive(Debug, Clone, Copy, Deserialize, ToSchema)]
#[serde(rename_all = "snake_case")]
pub(crate) enum Tier {
    /// As the server likes.
    Auto,
    /// The usual one.
    StandardOnly,
}

/// Tokens of a conversation.
#[derive(Debug, Serialize, ToSchema)]
pub(crate) struct CountResponse {
    /// How many.
    pub input_tokens: usize,
}

/// An error in Anthropic's format.
#[derive(Debug, Serialize, ToSchema)]
pub(crate) struct AnthropicError {
    /// Always `error`.
    #[serde(rename = "type")]
    pub kind: String,
    /// The error.
    pub error: AnthropicErrorBody,
    /// The request it belongs to.
    pub request_id: String,
}

/// What went wrong.
#[derive(Debug, Serialize, ToSchema)]
pub(crate) struct AnthropicErrorBody {
    /// Its class.
    #[serde(rename = "type")]
    pub kind: String,
    /// For people.
    pub message: String,
}

/// Message
///
/// The next message of a conversation. With `stream`, server-sent events from `message_start` to
/// `message_stop`.
#[utoipa::path(
    post,
    path = "/v1/messages",
    tag = "Anthropic",
    request_body = MessagesRequest,
    responses(
        (status = 200, content((MessageResponse = "application/json"), (crate::openapi::StreamEvent = "text/event-stream"))),
        (status = "4XX", body = AnthropicError),
        (status = "5XX", body = AnthropicError),
    )
)]
pub(crate) async fn messages(
    State(state): State<AppState>,
    caller: Caller,
    Json(request): Json<MessagesRequest>,
) -> Result<Response> {
    let stream = request.stream.unwrap_or(false);
    let job = read(&state, request)?;
    let tools: Vec<String> = match job.tools {
        ToolMode::None => Vec::new(),
        _ => job.conversation.tools.iter().map(|tool| tool.name.clone()).collect(),
    };
    let max_calls = job.max_calls;
    let run = generate::start_chat(&state, &caller, job).await?;
    let encoder = MessageEncoder::new(&run, tools, max_calls, &caller.request_id);
    match stream {
        true => Ok(respond(&state, run, encoder, Framing::Sse)),
        false => Ok(axum::Json(encoder.collect(run).await?).into_response()),
    }
}

/// Number of tokens
///
/// Of a conversation, as the model would read it.
#[utoipa::path(
    post,
    path = "/v1/messages/count_tokens",
    tag = "Anthropic",
    request_body = CountRequest,
    responses(
        (status = 200, body = CountResponse),
        (status = "4XX", body = AnthropicError),
        (status = "5XX", body = AnthropicError),
    )
)]
pub(crate) async fn count_tokens(
    State(state): State<AppState>,
    caller: Caller,
    Json(request): Json<CountRequest>,
) -> Result<axum::Json<CountResponse>> {
    let _admission = state.admit(&caller)?;
    let (tools, mode, _) = read_tools(&state, request.tools, request.tool_choice)?;
    let turns = read_turns(request.system, request.messages, state.config().limits.max_messages)?;
    let conversation = Conversation { turns, tools };
    let model = state.registry().model(state.registry().entry(&request.model)?).await?;
    let shown = mode != ToolMode::None;
    let count = move || Ok(chat::prompt(&model, &conversation, shown, true)?.len());
    Ok(axum::Json(CountResponse { input_tokens: state.compute(count).await? }))
}

fn read(state: &AppState, request: MessagesRequest) -> Result<ChatJob> {
    let (tools, mode, max_calls) = read_tools(state, request.tools, request.tool_choice)?;
    if request.temperature.is_some_and(|temperature| temperature > 1.0) {
        let got = request.temperature.unwrap_or_default();
        return Err(ApiError::invalid("temperature", "a number from 0 to 1", got));
    }
    let turns = read_turns(request.system, request.messages, state.config().limits.max_messages)?;
    let sampling = Sampling {
        temperature: request.temperature,
        top_k: request.top_k,
        top_p: request.top_p,
        stop: request.stop_sequences.map(OneOrMany),
        ..Sampling::default()
    };
    Ok(ChatJob {
        tools: mode,
        max_calls,
        max_tokens: generate::max_tokens("max_tokens", Some(request.max_tokens), 1)?,
        ..ChatJob::new(request.model, Conversation { turns, tools }, sampling)
    })
}

fn read_tools(
    state: &AppState,
    tools: Option<Vec<ToolParam>>,
    choice: Option<ToolChoiceParam>,
) -> Result<(Vec<Tool>, ToolMode, usize)> {
    let max_tools = state.config().limits.max_tools;
    let tools = tools.unwrap_or_default();
    if tools.len() > max_tools {
        return Err(ApiError::invalid("tools", &format!("at most {max_tools} tools"), tools.len()));
    }
    let tool = |(i, tool): (usize, ToolParam)| {
        let (name, schema) = (format!("tools[{i}].name"), format!("tools[{i}].input_schema"));
        generate::tool(&name, &schema, tool.name, tool.description, Some(tool.input_schema))
    };
    let tools: Vec<Tool> = tools.into_iter().enumerate().map(tool).collect::<Result<_>>()?;
    generate::distinct_tools("tools", &tools)?;
    let Some(choice) = choice else {
        let mode = if tools.is_empty() { ToolMode::None } else { ToolMode::Auto };
        return Ok((tools, mode, max_tools));
    };
    let max_calls = if choice.disable_parallel_tool_use == Some(true) { 1 } else { max_tools };
    let mode = match (choice.kind, choice.name) {
        (ToolChoiceKind::Tool, Some(name)) if tools.iter().any(|tool| tool.name == name) => {
            ToolMode::Named(name)
        }
        (ToolChoiceKind::Tool, Some(_)) => {
            let message = "`tool_choice` names a tool that is not among `tools`";
            return Err(ApiError::field("tool_choice.name", message));
        }
        (ToolChoiceKind::Tool, None) => {
            return Err(ApiError::field("tool_choice.name", "`tool_choice.name` is required"));
        }
        (_, Some(_)) => {
            let message = "`tool_choice.name` goes with the type `tool` only";
            return Err(ApiError::field("tool_choice.name", message));
        }
        (ToolChoiceKind::None, None) => ToolMode::None,
        (ToolChoiceKind::Auto, None) if tools.is_empty() => ToolMode::None,
        (ToolChoiceKind::Auto, None) => ToolMode::Auto,
        (ToolChoiceKind::Any, None) if tools.is_empty() => {
            return Err(ApiError::field(
                "tool_choice",
                "a tool must be called, but there are none",
            ));
        }
        (ToolChoiceKind::Any, None) => ToolMode::Required,
    };
    Ok((tools, mode, max_calls))
}

/// Turns of a conversation. A message of tool results becomes one turn for each, and one for the text
/// beside them.
fn read_turns(
    system: Option<Blocks>,
    messages: Vec<InputMessage>,
    max_messages: usize,
) -> Result<Vec<Turn>> {
    if messages.is_empty() || messages.len() > max_messages {
        let expected = format!("1 to {max_messages} messages");
        return Err(ApiError::invalid("messages", &expected, messages.len()));
    }
    let mut turns = Vec::with_capacity(messages.len() + 1);
    if let Some(system) = system {
        turns.push(Turn::new(Role::System, system.only_text("system")?));
    }
    // A tool's result names the call it answers; the call must be there.
    let mut calls: HashMap<String, ()> = HashMap::new();
    for (i, message) in messages.into_iter().enumerate() {
        let role = match message.role {
            InputRole::User => Role::User,
            InputRole::Assistant => Role::Assistant,
        };
        let mut turn = Turn::new(role, "");
        let mut has_text = false;
        for (j, block) in message.content.0.into_iter().enumerate() {
            let wrong = |what: &str, whose: &str| {
                let param = format!("messages[{i}].content[{j}].type");
                let message = format!("`{param}`: {what} belongs to messages of role `{whose}`");
                ApiError::field(param, message)
            };
            match block.kind {
                BlockKind::Text => {
                    has_text = true;
                    turn.text.push_str(&block.text.unwrap_or_default());
                }
                BlockKind::ToolUse if role == Role::Assistant => {
                    let id = block.id.unwrap_or_default();
                    calls.insert(id.clone(), ());
                    let arguments = block.input.unwrap_or_else(|| json!({})).to_string();
                    turn.calls.push(Call { id, name: block.name.unwrap_or_default(), arguments });
                }
                BlockKind::ToolUse => return Err(wrong("`tool_use`", "assistant")),
                BlockKind::ToolResult if role == Role::User => {
                    let id = block.tool_use_id.unwrap_or_default();
                    if !calls.contains_key(&id) {
                        let param = format!("messages[{i}].content[{j}].tool_use_id");
                        let message = format!("`{param}` names no `tool_use` before it");
                        return Err(ApiError::field(param, message));
                    }
                    let param = format!("messages[{i}].content[{j}].content");
                    let text = match block.content {
                        Some(content) => content.only_text(&param)?,
                        None => String::new(),
                    };
                    let text =
                        if block.is_error == Some(true) { format!("Error: {text}") } else { text };
                    turns.push(Turn { answers: Some(id), ..Turn::new(Role::Tool, text) });
                }
                BlockKind::ToolResult => return Err(wrong("`tool_result`", "user")),
            }
        }
        if has_text || !turn.calls.is_empty() {
            turns.push(turn);
        }
    }
    Ok(turns)
}

/// Anthropic's name for the end of an answer.
pub(crate) fn stop_reason(reason: FinishReason, calls: bool, stop_string: bool) -> &'static str {
    match reason {
        FinishReason::Length => "max_tokens",
        FinishReason::Stop if calls => "tool_use",
        FinishReason::Stop if stop_string => "stop_sequence",
        FinishReason::Stop => "end_turn",
    }
}

//! `POST /v1/responses`: the next items of a conversation.
//!
//! Nothing is stored: every request carries the whole conversation, `store` may be absent or false,
//! and responses can neither be fetched later nor continued by id.

use std::fmt;

use axum::extract::State;
use axum::response::{IntoResponse, Response};
use bitnet_inference::Grammar;
use serde::de::{self, Deserializer, SeqAccess, Visitor};
use serde::{Deserialize, Serialize};
use serde_json::{Value, json};
use utoipa::ToSchema;

use super::chat::ServiceTier;
use super::now;
use super::responses_stream::ResponseEncoder;
use super::types::{Absent, FunctionKind, MessageRole, Metadata};
use crate::chat::{Call, Conversation, Role, Tool, Turn};
use crate::error::{ApiError, Result};
use crate::generate::{self, ChatJob, Format, ToolMode};
use crate::json::Json;
use crate::middleware::random_id;
use crate::openapi::schema_as;
use crate::sampling::Sampling;
use crate::state::{AppState, Caller};
use crate::stream::{Framing, respond};

/// A request for the next items of a conversation.
#[derive(Debug, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
#[allow(dead_code)] // Some fields only say what is accepted; reading them checks them.
pub(crate) struct ResponsesRequest {
    /// Name of the model, one of `/v1/models`.
    pub model: String,
    /// What the user says, or the conversation so far.
    pub input: Input,
    /// Instructions.
    pub instructions: Option<String>,
    /// Most tokens to generate. Default: as many as the context holds.
    #[schema(minimum = 1)]
    pub max_output_tokens: Option<i64>,
    /// Divides the logits before the draw; 0 takes the likeliest token. Default 1.
    #[schema(minimum = 0, maximum = 2)]
    pub temperature: Option<f64>,
    /// Keep the likeliest tokens that together reach this probability. Default 1.
    #[schema(minimum = 0, maximum = 1)]
    pub top_p: Option<f64>,
    /// The same seed gives the same answer.
    pub seed: Option<i64>,
    /// Send the answer in events as it is computed.
    pub stream: Option<bool>,
    /// How the stream is written.
    pub stream_options: Option<ResponsesStreamOptions>,
    /// The form of the text.
    pub text: Option<TextOptions>,
    /// Tools the model may call.
    pub tools: Option<Vec<ResponsesTool>>,
    /// Which of them it may or must call. Default `auto` with tools, `none` without.
    pub tool_choice: Option<ResponsesToolChoice>,
    /// Whether it may call several at once. Default true.
    pub parallel_tool_calls: Option<bool>,
    /// Report this many alternatives for each token; needs
    /// `message.output_text.logprobs` in `include`.
    #[schema(minimum = 0, maximum = 20)]
    pub top_logprobs: Option<i64>,
    /// What else to report.
    pub include: Option<Vec<Include>>,
    /// Only `false`: nothing is stored.
    pub store: Option<bool>,
    /// Only `false`.
    pub background: Option<bool>,
    /// Only `disabled`: a conversation that is too long is an error.
    pub truncation: Option<Truncation>,
    /// Labels; they change nothing in the answer.
    pub metadata: Option<Metadata>,
    /// A label of the end user; it changes nothing in the answer.
    pub user: Option<String>,
    /// A label of the end user; it changes nothing in the answer.
    pub safety_identifier: Option<String>,
    /// A hint for caches of many machines; here every request shares one cache.
    pub prompt_cache_key: Option<String>,
    /// There is one tier.
    pub service_tier: Option<ServiceTier>,
}

/// How a stream is written.
#[derive(Debug, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub(crate) struct ResponsesStreamOptions {
    /// Random padding; only `false` is accepted, and is the default.
    pub include_obfuscation: Option<bool>,
}

/// What can be reported besides.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Deserialize, ToSchema)]
pub(crate) enum Include {
    /// Log-probabilities of the text's tokens.
    #[serde(rename = "message.output_text.logprobs")]
    Logprobs,
}

/// What happens to a conversation that is too long.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Deserialize, ToSchema)]
#[serde(rename_all = "lowercase")]
pub(crate) enum Truncation {
    /// It is an error.
    Disabled,
}

/// The form of the text.
#[derive(Debug, Clone, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub(crate) struct TextOptions {
    /// Which form.
    pub format: Option<TextFormat>,
}

/// A form of text.
#[derive(Debug, Clone, Deserialize, Serialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub(crate) struct TextFormat {
    /// Which form.
    #[serde(rename = "type")]
    pub kind: super::types::FormatKind,
    /// With `json_schema`: a name.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub name: Option<String>,
    /// With `json_schema`: what it is for.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub description: Option<String>,
    /// With `json_schema`: the schema.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schema(value_type = Option<Object>)]
    pub schema: Option<Value>,
    /// With `regex`: the expression the whole answer matches.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub regex: Option<String>,
    /// With `grammar`: a Lark grammar of answers, from its rule `start` on.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub grammar: Option<String>,
    /// Answers are held to the schema either way.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub strict: Option<bool>,
}

/// A tool the model may call.
#[derive(Debug, Clone, Deserialize, Serialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub(crate) struct ResponsesTool {
    /// Only `function`.
    #[serde(rename = "type")]
    pub kind: FunctionKind,
    /// Letters, digits, `_` and `-`.
    #[schema(min_length = 1, max_length = 64, pattern = "^[a-zA-Z0-9_-]+$")]
    pub name: String,
    /// What it does, for the model.
    pub description: Option<String>,
    /// JSON schema of its arguments, an object.
    #[schema(value_type = Option<Object>)]
    pub parameters: Option<Value>,
    /// Arguments are held to the schema either way where the call is constrained.
    pub strict: Option<bool>,
}

/// Which tools the model may or must call.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct ResponsesToolChoice(ToolMode);

/// The two forms, for the OpenAPI document.
#[derive(Deserialize, ToSchema)]
#[serde(untagged, deny_unknown_fields)]
#[allow(dead_code)] // The kind is checked by its type.
pub(crate) enum ResponsesToolChoiceSchema {
    Mode(super::types::ToolMode),
    Named {
        #[serde(rename = "type")]
        kind: FunctionKind,
        name: String,
    },
}

schema_as!(ResponsesToolChoice, ResponsesToolChoiceSchema);

impl<'de> Deserialize<'de> for ResponsesToolChoice {
    fn deserialize<D: Deserializer<'de>>(reader: D) -> Result<Self, D::Error> {
        use super::types::ToolMode as Wire;
        let choice = ResponsesToolChoiceSchema::deserialize(reader).map_err(|_| {
            de::Error::custom("expected `none`, `auto`, `required` or a named function")
        })?;
        Ok(Self(match choice {
            ResponsesToolChoiceSchema::Mode(Wire::None) => ToolMode::None,
            ResponsesToolChoiceSchema::Mode(Wire::Auto) => ToolMode::Auto,
            ResponsesToolChoiceSchema::Mode(Wire::Required) => ToolMode::Required,
            ResponsesToolChoiceSchema::Named { name, .. } => ToolMode::Named(name),
        }))
    }
}

/// A text, or items.
#[derive(Debug)]
pub(crate) struct Input(Vec<InputItem>);

/// The two forms, for the OpenAPI document.
#[derive(ToSchema)]
#[serde(untagged)]
#[allow(dead_code)] // Read by the derive only.
pub(crate) enum InputSchema {
    Text(String),
    Items(Vec<InputItem>),
}

schema_as!(Input, InputSchema);

/// An item of a conversation.
#[derive(Debug, Default, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
#[allow(dead_code)] // Some fields only say what is accepted; reading them checks them.
pub(crate) struct InputItem {
    /// What it is. Default `message`.
    #[serde(rename = "type", default)]
    pub kind: ItemKind,
    /// Its id in an earlier response.
    pub id: Option<String>,
    /// Its status in an earlier response.
    pub status: Option<String>,
    /// Of a message: who speaks.
    pub role: Option<MessageRole>,
    /// Of a message: what is said.
    pub content: Option<ItemText>,
    /// Of a call or its output: the call's id.
    pub call_id: Option<String>,
    /// Of a call: the function.
    pub name: Option<String>,
    /// Of a call: its arguments, JSON as text.
    pub arguments: Option<String>,
    /// Of a call's output: the output.
    pub output: Option<ItemText>,
}

/// Kinds of items.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Deserialize, ToSchema)]
#[serde(rename_all = "snake_case")]
pub(crate) enum ItemKind {
    /// A message.
    #[default]
    Message,
    /// A call of a function.
    FunctionCall,
    /// What the function returned.
    FunctionCallOutput,
}

/// A text, or text parts.
#[derive(Debug)]
pub(crate) struct ItemText(String);

/// The two forms, for the OpenAPI document.
#[derive(ToSchema)]
#[serde(untagged)]
#[allow(dead_code)] // Read by the derive only.
pub(crate) enum ItemTextSchema {
    Text(String),
    Parts(Vec<ItemPart>),
}

schema_as!(ItemText, ItemTextSchema);

/// A part of a text.
#[derive(Debug, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
#[allow(dead_code)] // Some fields only say what is accepted; reading them checks them.
pub(crate) struct ItemPart {
    /// What it is; only text is understood.
    #[serde(rename = "type")]
    pub kind: PartKind,
    /// The text.
    pub text: String,
    /// Always empty; accepted because clients send answers back whole.
    #[schema(max_items = 0)]
    pub annotations: Option<Vec<Absent>>,
    /// Sent back by clients; not read.
    #[schema(value_type = Option<Vec<Object>>)]
    pub logprobs: Option<Vec<Value>>,
}

/// Kinds of text parts.
#[derive(Debug, Clone, Copy, Deserialize, ToSchema)]
#[serde(rename_all = "snake_case")]
pub(crate) enum PartKind {
    /// What is said to the model.
    InputText,
    /// What the model said.
    OutputText,
}

impl<'de> Deserialize<'de> for Input {
    fn deserialize<D: Deserializer<'de>>(reader: D) -> Result<Self, D::Error> {
        struct Forms;
        impl<'de> Visitor<'de> for Forms {
            type Value = Input;
            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("a string or a list of items")
            }
            fn visit_str<E: de::Error>(self, text: &str) -> Result<Input, E> {
                Ok(Input(vec![InputItem {
                    role: Some(MessageRole::User),
                    content: Some(ItemText(text.to_owned())),
                    ..InputItem::default()
                }]))
            }
            fn visit_seq<A: SeqAccess<'de>>(self, mut items: A) -> Result<Input, A::Error> {
                let mut all = Vec::new();
                while let Some(item) = items.next_element()? {
                    all.push(item);
                }
                Ok(Input(all))
            }
        }
        reader.deserialize_any(Forms)
    }
}

impl<'de> Deserialize<'de> for ItemText {
    fn deserialize<D: Deserializer<'de>>(reader: D) -> Result<Self, D::Error> {
        struct Forms;
        impl<'de> Visitor<'de> for Forms {
            type Value = ItemText;
            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("a string or a list of text parts")
            }
            fn visit_str<E: de::Error>(self, text: &str) -> Result<ItemText, E> {
                Ok(ItemText(text.to_owned()))
            }
            fn visit_seq<A: SeqAccess<'de>>(self, mut items: A) -> Result<ItemText, A::Error> {
                let mut text = String::new();
                while let Some(part) = items.next_element::<ItemPart>()? {
                    text.push_str(&part.text);
                }
                Ok(ItemText(text))
            }
        }
        reader.deserialize_any(Forms)
    }
}

/// Response
///
/// The next items of a conversation. With `stream`, server-sent events from `response.created` to
/// `response.completed`, `response.incomplete` or `response.failed`. Nothing is stored.
#[utoipa::path(
    post,
    path = "/v1/responses",
    tag = "OpenAI",
    request_body = ResponsesRequest,
    responses(
        (status = 200, content((super::responses_stream::ResponseBody = "application/json"), (crate::openapi::StreamEvent = "text/event-stream"))),
        (status = "4XX", body = crate::openapi::OpenAiError),
        (status = "5XX", body = crate::openapi::OpenAiError),
    )
)]
pub(crate) async fn responses(
    State(state): State<AppState>,
    caller: Caller,
    Json(request): Json<ResponsesRequest>,
) -> Result<Response> {
    let stream = request.stream.unwrap_or(false);
    let (job, frame) = read(&state, request)?;
    let tools: Vec<String> = match job.tools {
        ToolMode::None => Vec::new(),
        _ => job.conversation.tools.iter().map(|tool| tool.name.clone()).collect(),
    };
    let (max_calls, with_logprobs) = (job.max_calls, job.logprobs.is_some());
    let run = generate::start_chat(&state, &caller, job).await?;
    let encoder = ResponseEncoder::new(frame, &run, tools, max_calls, with_logprobs);
    match stream {
        true => Ok(respond(&state, run, encoder, Framing::Sse)),
        false => Ok(axum::Json(encoder.collect(run).await?).into_response()),
    }
}

/// The job, and the response object as far as it repeats the request.
fn read(state: &AppState, request: ResponsesRequest) -> Result<(ChatJob, Value)> {
    let limits = &state.config().limits;
    if request.store == Some(true) {
        return Err(ApiError::unsupported("store", "responses are not stored"));
    }
    if request.background == Some(true) {
        return Err(ApiError::unsupported("background", "responses are not stored"));
    }
    if request.stream_options.is_some_and(|options| options.include_obfuscation == Some(true)) {
        let why = "events are not padded";
        return Err(ApiError::unsupported("stream_options.include_obfuscation", why));
    }
    let with_logprobs = request.include.unwrap_or_default().contains(&Include::Logprobs);
    let logprobs = match request.top_logprobs {
        Some(top) if !(0..=20).contains(&top) => {
            return Err(ApiError::invalid("top_logprobs", "0 to 20", top));
        }
        Some(top @ 1..) if !with_logprobs => {
            let message = format!(
                "`top_logprobs` of {top} needs `message.output_text.logprobs` in `include`"
            );
            return Err(ApiError::field("top_logprobs", message));
        }
        top => with_logprobs.then_some(top.unwrap_or(0) as u32),
    };
    let wire_tools = request.tools.unwrap_or_default();
    let tools = read_tools(&wire_tools, limits.max_tools)?;
    let mode = read_tool_choice(request.tool_choice, &tools)?;
    let wire_format = request.text.and_then(|text| text.format);
    let format = read_format(wire_format.clone())?;
    if !matches!(mode, ToolMode::None | ToolMode::Auto) && format != Format::Text {
        let message = "a forced tool call and a text format cannot both shape the answer";
        return Err(ApiError::field("text.format", message));
    }
    let mut turns = Vec::new();
    if let Some(instructions) = &request.instructions {
        turns.push(Turn::new(Role::System, instructions.as_str()));
    }
    read_items(request.input.0, limits.max_messages, &mut turns)?;
    let parallel = request.parallel_tool_calls.unwrap_or(true);
    let frame = json!({
        "id": random_id("resp_"),
        "object": "response",
        "created_at": now(),
        "completed_at": null,
        "status": "in_progress",
        "background": false,
        "error": null,
        "incomplete_details": null,
        "instructions": request.instructions,
        "max_output_tokens": request.max_output_tokens,
        "max_tool_calls": null,
        "metadata": request.metadata.unwrap_or_default(),
        "model": request.model,
        "output": [],
        "parallel_tool_calls": parallel,
        "presence_penalty": 0.0,
        "frequency_penalty": 0.0,
        "previous_response_id": null,
        "prompt_cache_key": request.prompt_cache_key,
        "reasoning": {"effort": null, "summary": null},
        "safety_identifier": request.safety_identifier,
        "service_tier": "default",
        "store": false,
        "temperature": request.temperature.unwrap_or(1.0),
        "text": {"format": wire_format.map_or(json!({"type": "text"}), |format| json!(format))},
        "tool_choice": match &mode {
            ToolMode::None => json!("none"),
            ToolMode::Auto => json!("auto"),
            ToolMode::Required => json!("required"),
            ToolMode::Named(name) => json!({"type": "function", "name": name}),
        },
        "tools": wire_tools,
        "top_logprobs": request.top_logprobs.unwrap_or(0),
        "top_p": request.top_p.unwrap_or(1.0),
        "truncation": "disabled",
        "usage": null,
        "user": request.user,
    });
    let sampling = Sampling {
        temperature: request.temperature,
        top_p: request.top_p,
        seed: request.seed,
        ..Sampling::default()
    };
    let max_tokens = generate::max_tokens("max_output_tokens", request.max_output_tokens, 1)?;
    let job = ChatJob {
        format_param: "text.format",
        tools: mode,
        max_calls: if parallel { limits.max_tools } else { 1 },
        format,
        max_tokens,
        logprobs,
        ..ChatJob::new(request.model, Conversation { turns, tools }, sampling)
    };
    Ok((job, frame))
}

fn read_items(items: Vec<InputItem>, max_items: usize, turns: &mut Vec<Turn>) -> Result<()> {
    if items.is_empty() || items.len() > max_items {
        let expected = format!("1 to {max_items} items");
        return Err(ApiError::invalid("input", &expected, items.len()));
    }
    for (i, item) in items.into_iter().enumerate() {
        let given = [
            ("role", item.role.is_some(), ItemKind::Message),
            ("content", item.content.is_some(), ItemKind::Message),
            ("name", item.name.is_some(), ItemKind::FunctionCall),
            ("arguments", item.arguments.is_some(), ItemKind::FunctionCall),
            ("output", item.output.is_some(), ItemKind::FunctionCallOutput),
            ("call_id", item.call_id.is_some(), item.kind),
        ];
        for (name, is_there, kind) in given {
            let wanted = kind == item.kind && (name != "call_id" || kind != ItemKind::Message);
            if is_there != wanted {
                let param = format!("input[{i}].{name}");
                let what =
                    if wanted { "is required" } else { "does not belong to an item of this type" };
                return Err(ApiError::field(param.clone(), format!("`{param}` {what}")));
            }
        }
        let call_id = item.call_id.unwrap_or_default();
        let text = item.content.or(item.output).map(|text| text.0).unwrap_or_default();
        match item.kind {
            ItemKind::Message => {
                let role = match item.role {
                    Some(MessageRole::System | MessageRole::Developer) => Role::System,
                    Some(MessageRole::Assistant) => Role::Assistant,
                    Some(MessageRole::User) | None => Role::User,
                    Some(MessageRole::Tool) => {
                        let param = format!("input[{i}].role");
                        let message = format!("`{param}`: results of tools are items of their own");
                        return Err(ApiError::field(param, message));
                    }
                };
                turns.push(Turn::new(role, text));
            }
            ItemKind::FunctionCall => {
                let call = Call {
                    id: call_id,
                    name: item.name.unwrap_or_default(),
                    arguments: item.arguments.unwrap_or_default(),
                };
                // Calls of one answer are items of their own here, and one turn for the model.
                match turns.last_mut() {
                    Some(turn) if turn.role == Role::Assistant => turn.calls.push(call),
                    _ => turns.push(Turn { calls: vec![call], ..Turn::new(Role::Assistant, "") }),
                }
            }
            ItemKind::FunctionCallOutput => {
                turns.push(Turn { answers: Some(call_id), ..Turn::new(Role::Tool, text) });
            }
        }
    }
    Ok(())
}

fn read_tools(tools: &[ResponsesTool], max_tools: usize) -> Result<Vec<Tool>> {
    if tools.len() > max_tools {
        return Err(ApiError::invalid("tools", &format!("at most {max_tools} tools"), tools.len()));
    }
    let tool = |(i, tool): (usize, &ResponsesTool)| {
        let (name, schema) = (format!("tools[{i}].name"), format!("tools[{i}].parameters"));
        let ResponsesTool { description, parameters, .. } = tool.clone();
        generate::tool(&name, &schema, tool.name.clone(), description, parameters)
    };
    let tools: Vec<Tool> = tools.iter().enumerate().map(tool).collect::<Result<_>>()?;
    generate::distinct_tools("tools", &tools)?;
    Ok(tools)
}

fn read_tool_choice(choice: Option<ResponsesToolChoice>, tools: &[Tool]) -> Result<ToolMode> {
    match choice.map_or(ToolMode::Auto, |choice| choice.0) {
        ToolMode::Auto if tools.is_empty() => Ok(ToolMode::None),
        ToolMode::Required if tools.is_empty() => Err(ApiError::field(
            "tool_choice",
            "`tool_choice` is `required`, but there are no tools",
        )),
        ToolMode::Named(name) if tools.iter().all(|tool| tool.name != name) => {
            let message = "`tool_choice` names a tool that is not among `tools`";
            Err(ApiError::field("tool_choice.name", message))
        }
        mode => Ok(mode),
    }
}

fn read_format(format: Option<TextFormat>) -> Result<Format> {
    use super::types::FormatKind;
    let Some(format) = format else { return Ok(Format::Text) };
    match (&format.name, format.kind) {
        (name, FormatKind::JsonSchema) => {
            generate::check_name("text.format.name", name.as_deref().unwrap_or_default())?;
        }
        (Some(_), _) => {
            let message = "`text.format.name` does not go with this type";
            return Err(ApiError::field("text.format.name", message));
        }
        (None, _) => {}
    }
    let field = |name: &str| format!("text.format.{name}");
    format.kind.choose([
        (FormatKind::JsonSchema, field("schema"), format.schema.map(Grammar::JsonSchema)),
        (FormatKind::Regex, field("regex"), format.regex.map(Grammar::Regex)),
        (FormatKind::Grammar, field("grammar"), format.grammar.map(Grammar::Lark)),
    ])
}

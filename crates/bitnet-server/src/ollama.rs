//! The reading half of Ollama's `/api`: what its clients need to list models, generate, chat and
//! embed. Nothing here changes what is on disk.

use std::collections::BTreeMap;
use std::time::Duration;

use axum::extract::State;
use axum::response::{IntoResponse, Response};
use bitnet_inference::{Grammar, Pooling};
use serde::de::{self, Deserializer};
use serde::{Deserialize, Serialize};
use serde_json::Value;
use utoipa::ToSchema;

use crate::chat::{Call, Conversation, Role, Turn};
use crate::embed::embed;
use crate::error::{ApiError, Result};
use crate::generate::{self, ChatJob, Format, ToolMode};
use crate::json::AnyJson;
use crate::ollama_keep_alive::KeepAliveField;
use crate::ollama_stream::{Kind, LineEncoder, timestamp};
use crate::openai::types::{Prompt, Prompts, ToolDefinition};
use crate::openapi::schema_as;
use crate::residency::KeepAlive;
use crate::sampling::{OneOrMany, Sampling};
use crate::state::{AppState, Caller};
use crate::stream::{Framing, respond};

/// A request for text that continues a prompt.
#[derive(Debug, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub(crate) struct GenerateRequest {
    /// Name of the model, one of `/api/tags`.
    pub model: String,
    /// What the user says. Empty: only load the model.
    pub prompt: Option<String>,
    /// Instructions.
    pub system: Option<String>,
    /// Give the prompt to the model as it is, without a chat template.
    pub raw: Option<bool>,
    /// `json`, or a JSON schema the answer must fit.
    #[schema(value_type = Option<Object>)]
    pub format: Option<Value>,
    /// Sampling.
    pub options: Option<Options>,
    /// Send the answer line by line. Default true.
    pub stream: Option<bool>,
    /// Only `false`.
    pub think: Option<bool>,
    /// Only an empty list.
    #[schema(max_items = 0)]
    pub images: Option<Vec<String>>,
    /// How long the model stays in memory afterwards; 0 unloads it. Default: as before.
    pub keep_alive: Option<KeepAliveField>,
}

/// A request for the next message of a conversation.
#[derive(Debug, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub(crate) struct OllamaChatRequest {
    /// Name of the model, one of `/api/tags`.
    pub model: String,
    /// The conversation so far. Empty: only load the model.
    pub messages: Option<Vec<OllamaMessage>>,
    /// Tools the model may call.
    pub tools: Option<Vec<ToolDefinition>>,
    /// `json`, or a JSON schema the answer must fit.
    #[schema(value_type = Option<Object>)]
    pub format: Option<Value>,
    /// Sampling.
    pub options: Option<Options>,
    /// Send the answer line by line. Default true.
    pub stream: Option<bool>,
    /// Only `false`.
    pub think: Option<bool>,
    /// How long the model stays in memory afterwards; 0 unloads it. Default: as before.
    pub keep_alive: Option<KeepAliveField>,
}

/// A message of a conversation.
#[derive(Debug, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
#[allow(dead_code)] // Some fields only say what is accepted; reading them checks them.
pub(crate) struct OllamaMessage {
    /// `system`, `user`, `assistant` or `tool`.
    pub role: OllamaRole,
    /// What is said.
    pub content: Option<String>,
    /// Only an empty list.
    #[schema(max_items = 0)]
    pub images: Option<Vec<String>>,
    /// Tools the assistant called.
    pub tool_calls: Option<Vec<OllamaCall>>,
    /// In a tool's message: the tool's name.
    pub tool_name: Option<String>,
    /// Always absent: these models do not think aloud.
    pub thinking: Option<crate::openai::types::Absent>,
}

/// Who speaks.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Deserialize, ToSchema)]
#[serde(rename_all = "lowercase")]
pub(crate) enum OllamaRole {
    /// Instructions.
    System,
    /// The person.
    User,
    /// The model.
    Assistant,
    /// The result of a tool.
    Tool,
}

/// A call of a tool.
#[derive(Debug, Clone, Deserialize, Serialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub(crate) struct OllamaCall {
    /// Which function, with which arguments.
    pub function: OllamaFunction,
}

/// A function and its arguments.
#[derive(Debug, Clone, Deserialize, Serialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub(crate) struct OllamaFunction {
    /// Its name.
    pub name: String,
    /// Its arguments, an object.
    #[schema(value_type = Object)]
    pub arguments: Value,
}

/// Sampling, by Ollama's names and with its defaults.
#[derive(Debug, Default, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub(crate) struct Options {
    /// Most tokens to generate; -1 and -2: as many as the context holds. Default -1.
    #[schema(minimum = -2)]
    pub num_predict: Option<i64>,
    /// Most tokens of prompt and answer together. Default: the model's context.
    #[schema(minimum = 1)]
    pub num_ctx: Option<i64>,
    /// Divides the logits before the draw. Default 0.8.
    #[schema(minimum = 0, maximum = 2)]
    pub temperature: Option<f64>,
    /// Keep this many of the likeliest tokens; 0 keeps all. Default 40.
    #[schema(minimum = 0)]
    pub top_k: Option<i64>,
    /// Keep the likeliest tokens that together reach this probability. Default 0.9.
    #[schema(minimum = 0, maximum = 1)]
    pub top_p: Option<f64>,
    /// Keep tokens at least this fraction as likely as the likeliest. Default 0.
    #[schema(minimum = 0, maximum = 1)]
    pub min_p: Option<f64>,
    /// Locally typical sampling. Default 1, which keeps all.
    #[schema(minimum = 0, maximum = 1)]
    pub typical_p: Option<f64>,
    /// Makes recent tokens less likely. Default 1.1.
    #[schema(exclusive_minimum = 0, maximum = 10)]
    pub repeat_penalty: Option<f64>,
    /// Tokens that penalty looks back; 0 turns it off, -1 looks at everything. Default 64.
    #[schema(minimum = -1)]
    pub repeat_last_n: Option<i64>,
    /// Subtracted once from tokens the answer already holds. Default 0.
    #[schema(minimum = -2, maximum = 2)]
    pub presence_penalty: Option<f64>,
    /// Subtracted for each time the answer holds a token. Default 0.
    #[schema(minimum = -2, maximum = 2)]
    pub frequency_penalty: Option<f64>,
    /// The same seed gives the same answer.
    pub seed: Option<i64>,
    /// Texts that end the answer.
    pub stop: Option<OneOrMany>,
}

/// A request for embeddings.
#[derive(Debug, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
#[allow(dead_code)] // Some fields only say what is accepted; reading them checks them.
pub(crate) struct OllamaEmbedRequest {
    /// Name of the model, one of `/api/tags`.
    pub model: String,
    /// A text or a list of texts.
    pub input: OneOrMany,
    /// Only `false` has an effect, and it is what happens: an input that is too long is an error.
    pub truncate: Option<OnlyFalse>,
    /// How long the model stays in memory afterwards; 0 unloads it. Default: as before.
    pub keep_alive: Option<KeepAliveField>,
}

/// A switch that is always off.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct OnlyFalse;

schema_as!(OnlyFalse, bool);

impl<'de> Deserialize<'de> for OnlyFalse {
    fn deserialize<D: Deserializer<'de>>(reader: D) -> Result<Self, D::Error> {
        match bool::deserialize(reader)? {
            false => Ok(Self),
            true => Err(de::Error::custom("not supported; only false is accepted")),
        }
    }
}

/// Embeddings.
#[derive(Debug, Serialize, ToSchema)]
pub(crate) struct OllamaEmbedResponse {
    /// The model that computed them.
    pub model: String,
    /// One vector of length one for each input.
    pub embeddings: Vec<Vec<f32>>,
    /// Nanoseconds of the whole request.
    pub total_duration: u64,
    /// Nanoseconds the model took to load.
    pub load_duration: u64,
    /// Tokens of the inputs.
    pub prompt_eval_count: usize,
}

/// An error in Ollama's format.
#[derive(Debug, Serialize, ToSchema)]
pub(crate) struct OllamaError {
    /// What went wrong.
    pub error: String,
}

/// Generate
///
/// Text that continues a prompt, line by line unless `stream` is false.
#[utoipa::path(post, path = "/api/generate", tag = "Ollama", request_body = GenerateRequest, responses(
    (status = 200, content((crate::ollama_stream::Line = "application/json"), (crate::ollama_stream::Line = "application/x-ndjson"))),
    (status = "4XX", body = OllamaError),
    (status = "5XX", body = OllamaError),
))]
pub(crate) async fn generate(
    State(state): State<AppState>,
    caller: Caller,
    AnyJson(request): AnyJson<GenerateRequest>,
) -> Result<Response> {
    refuse_images("images", request.images.as_deref())?;
    refuse_thinking(request.think)?;
    let keep_alive = request.keep_alive.map(|field| field.0);
    let prompt = request.prompt.unwrap_or_default();
    if prompt.is_empty() {
        return load_only(&state, &caller, &request.model, keep_alive, Kind::Generate).await;
    }
    let mut turns = Vec::new();
    if let Some(system) = request.system.filter(|system| !system.is_empty()) {
        turns.push(Turn::new(Role::System, system));
    }
    turns.push(Turn::new(Role::User, prompt));
    let conversation = Conversation { turns, tools: Vec::new() };
    let raw = request.raw.unwrap_or(false);
    let job = job(request.model, conversation, request.options, request.format, raw)?;
    let job = ChatJob { keep_alive, ..job };
    answer(&state, &caller, job, Kind::Generate, request.stream).await
}

/// Chat
///
/// The next message of a conversation, line by line unless `stream` is false.
#[utoipa::path(post, path = "/api/chat", tag = "Ollama", request_body = OllamaChatRequest, responses(
    (status = 200, content((crate::ollama_stream::Line = "application/json"), (crate::ollama_stream::Line = "application/x-ndjson"))),
    (status = "4XX", body = OllamaError),
    (status = "5XX", body = OllamaError),
))]
pub(crate) async fn chat(
    State(state): State<AppState>,
    caller: Caller,
    AnyJson(request): AnyJson<OllamaChatRequest>,
) -> Result<Response> {
    let limits = &state.config().limits;
    refuse_thinking(request.think)?;
    let keep_alive = request.keep_alive.map(|field| field.0);
    let messages = request.messages.unwrap_or_default();
    if messages.is_empty() {
        return load_only(&state, &caller, &request.model, keep_alive, Kind::Chat).await;
    }
    if messages.len() > limits.max_messages {
        let expected = format!("at most {} messages", limits.max_messages);
        return Err(ApiError::invalid("messages", &expected, messages.len()));
    }
    let turns = messages.into_iter().enumerate().map(read_message).collect::<Result<_>>()?;
    let tools =
        crate::openai::chat::read_tools(request.tools.unwrap_or_default(), limits.max_tools)?;
    let conversation = Conversation { turns, tools };
    let job = job(request.model, conversation, request.options, request.format, false)?;
    let job = ChatJob { keep_alive, ..job };
    answer(&state, &caller, job, Kind::Chat, request.stream).await
}

/// Embeddings
#[utoipa::path(post, path = "/api/embed", tag = "Ollama", request_body = OllamaEmbedRequest, responses(
    (status = 200, body = OllamaEmbedResponse),
    (status = "4XX", body = OllamaError),
    (status = "5XX", body = OllamaError),
))]
pub(crate) async fn embed_texts(
    State(state): State<AppState>,
    caller: Caller,
    AnyJson(request): AnyJson<OllamaEmbedRequest>,
) -> Result<axum::Json<OllamaEmbedResponse>> {
    let inputs = request.input.0.into_iter().map(Prompt::Text).collect();
    let Prompts(inputs) = Prompts(inputs);
    let keep_alive = request.keep_alive.map(|field| field.0);
    let embedded =
        embed(&state, &caller, &request.model, inputs, Pooling::Mean, keep_alive).await?;
    Ok(axum::Json(OllamaEmbedResponse {
        model: request.model,
        embeddings: embedded.vectors,
        total_duration: caller.arrived.elapsed().as_nanos() as u64,
        load_duration: 0,
        prompt_eval_count: embedded.n_tokens,
    }))
}

async fn answer(
    state: &AppState,
    caller: &Caller,
    job: ChatJob,
    kind: Kind,
    stream: Option<bool>,
) -> Result<Response> {
    let name = job.model.clone();
    let tools = match job.tools {
        ToolMode::None => Vec::new(),
        _ => job.conversation.tools.iter().map(|tool| tool.name.clone()).collect(),
    };
    let max_calls = state.config().limits.max_tools;
    let run = generate::start_chat(state, caller, job).await?;
    let encoder = LineEncoder::new(kind, name, caller.arrived, tools, max_calls);
    match stream {
        Some(false) => Ok(axum::Json(encoder.collect(run).await?).into_response()),
        _ => Ok(respond(state, run, encoder, Framing::JsonLines)),
    }
}

/// A request without a prompt brings the model into memory, or out of it, and says so.
async fn load_only(
    state: &AppState,
    caller: &Caller,
    model: &str,
    keep: Option<KeepAlive>,
    kind: Kind,
) -> Result<Response> {
    let _admission = state.admit(caller)?;
    let entry = state.registry().entry(model)?;
    let reason = match keep {
        Some(KeepAlive::For(Duration::ZERO)) => {
            drop(entry.residency.enter(keep));
            "unload"
        }
        _ => {
            state.registry().model_for(entry, keep).await?;
            "load"
        }
    };
    let line = crate::ollama_stream::without_text(kind, model, timestamp(), reason);
    Ok(axum::Json(line).into_response())
}

fn job(
    model: String,
    conversation: Conversation,
    options: Option<Options>,
    format: Option<Value>,
    raw: bool,
) -> Result<ChatJob> {
    let options = options.unwrap_or_default();
    let max_tokens = match options.num_predict {
        None | Some(-1 | -2) => None,
        n => generate::max_tokens("options.num_predict", n, 0)?,
    };
    let context = generate::max_tokens("options.num_ctx", options.num_ctx, 1)?;
    let penalty_last_n = match options.repeat_last_n.unwrap_or(64) {
        -1 => u32::MAX,
        n => u32::try_from(n)
            .map_err(|_| ApiError::invalid("options.repeat_last_n", "-1 or more", n))?,
    };
    let sampling = Sampling {
        temperature: options.temperature.or(Some(0.8)),
        top_k: options.top_k.or(Some(40)),
        top_p: options.top_p.or(Some(0.9)),
        min_p: options.min_p,
        typical_p: options.typical_p,
        repetition_penalty: options.repeat_penalty.or(Some(1.1)),
        penalty_last_n: Some(penalty_last_n),
        presence_penalty: options.presence_penalty,
        frequency_penalty: options.frequency_penalty,
        seed: options.seed,
        stop: options.stop,
        ..Sampling::default()
    };
    let tools = if conversation.tools.is_empty() { ToolMode::None } else { ToolMode::Auto };
    Ok(ChatJob {
        max_tokens,
        context,
        raw,
        tools,
        format: read_format(format)?,
        format_param: "format",
        ..ChatJob::new(model, conversation, sampling)
    })
}

fn read_format(format: Option<Value>) -> Result<Format> {
    match format {
        None => Ok(Format::Text),
        Some(Value::String(name)) if name.is_empty() => Ok(Format::Text),
        Some(Value::String(name)) if name == "json" => Ok(Format::Grammar(Grammar::json_object())),
        Some(schema @ Value::Object(_)) => Ok(Format::Grammar(Grammar::JsonSchema(schema))),
        Some(_) => Err(ApiError::field("format", "`format`: expected `json` or a JSON schema")),
    }
}

fn read_message((i, message): (usize, OllamaMessage)) -> Result<Turn> {
    let role = match message.role {
        OllamaRole::System => Role::System,
        OllamaRole::User => Role::User,
        OllamaRole::Assistant => Role::Assistant,
        OllamaRole::Tool => Role::Tool,
    };
    refuse_images(&format!("messages[{i}].images"), message.images.as_deref())?;
    if message.tool_calls.is_some() && role != Role::Assistant {
        let param = format!("messages[{i}].tool_calls");
        let message = format!("`{param}` belongs to messages of role `assistant`");
        return Err(ApiError::field(param, message));
    }
    let call = |call: OllamaCall| Call {
        id: String::new(),
        name: call.function.name,
        arguments: call.function.arguments.to_string(),
    };
    let calls = message.tool_calls.into_iter().flatten().map(call).collect();
    Ok(Turn { role, text: message.content.unwrap_or_default(), calls, answers: message.tool_name })
}

fn refuse_images(param: &str, images: Option<&[String]>) -> Result<()> {
    match images {
        None | Some([]) => Ok(()),
        Some(_) => Err(ApiError::unsupported(param, "these models read text only")),
    }
}

fn refuse_thinking(think: Option<bool>) -> Result<()> {
    match think {
        Some(true) => Err(ApiError::unsupported("think", "these models do not think aloud")),
        Some(false) | None => Ok(()),
    }
}

/// Facts about a model under dotted names, as GGUF files have them.
pub(crate) type ModelFacts = BTreeMap<String, Value>;

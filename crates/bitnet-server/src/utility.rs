//! What a prompt becomes: `/tokenize`, `/detokenize`, `/tokenizer_info`, `/apply-template`.

use axum::extract::rejection::QueryRejection;
use axum::extract::{Query, State};
use bitnet_inference::tokenizer::{AddSpecial, EncodeOptions};
use serde::{Deserialize, Serialize};
use utoipa::ToSchema;

use crate::chat::{self, Conversation};
use crate::error::{ApiError, Result};
use crate::json::Json;
use crate::openai::chat::{read_messages, read_tools};
use crate::openai::types::{Message, ToolDefinition};
use crate::state::{AppState, Caller};
use crate::text::{check_ids, encode, token_text};

/// A text or a conversation to be tokenized.
#[derive(Debug, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub(crate) struct TokenizeRequest {
    /// Name of the model. Default: the first on offer.
    pub model: Option<String>,
    /// The text, as llama.cpp names it.
    pub content: Option<String>,
    /// The text, as vLLM names it.
    pub prompt: Option<String>,
    /// A conversation instead of a text.
    pub messages: Option<Vec<Message>>,
    /// Begin as the model expects, such as with a beginning-of-sequence token. Default false.
    pub add_special: Option<bool>,
    /// The same, as vLLM names it.
    pub add_special_tokens: Option<bool>,
    /// Read control tokens written in the text as such. Default true for `prompt`, as in vLLM, and
    /// false for `content`, as in llama.cpp.
    pub parse_special: Option<bool>,
    /// Report each token's text as well. Default false.
    pub with_pieces: Option<bool>,
}

/// Tokens.
#[derive(Debug, Serialize, ToSchema)]
pub(crate) struct TokenizeResponse {
    /// Their ids.
    pub tokens: Vec<u32>,
    /// How many.
    pub count: usize,
    /// Tokens a prompt and its answer may have together.
    pub max_model_len: usize,
    /// Their texts, if asked for; bytes that are no character on their own are shown as U+FFFD.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub pieces: Option<Vec<String>>,
}

/// Token ids to be made text.
#[derive(Debug, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub(crate) struct DetokenizeRequest {
    /// Name of the model. Default: the first on offer.
    pub model: Option<String>,
    /// The ids.
    pub tokens: Vec<u32>,
}

/// A text.
#[derive(Debug, Serialize, ToSchema)]
pub(crate) struct DetokenizeResponse {
    /// The text, as llama.cpp names it.
    pub content: String,
    /// The text, as vLLM names it.
    pub prompt: String,
}

/// A conversation to be written as the model reads it.
#[derive(Debug, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub(crate) struct TemplateRequest {
    /// Name of the model. Default: the first on offer.
    pub model: Option<String>,
    /// The conversation.
    #[schema(min_items = 1)]
    pub messages: Vec<Message>,
    /// Tools to show the model.
    pub tools: Option<Vec<ToolDefinition>>,
    /// End with what opens the answer. Default true.
    pub add_generation_prompt: Option<bool>,
}

/// A prompt.
#[derive(Debug, Serialize, ToSchema)]
pub(crate) struct TemplateResponse {
    /// What the model reads, control tokens by name.
    pub prompt: String,
}

/// Tokenize
#[utoipa::path(post, path = "/tokenize", tag = "Utilities", request_body = TokenizeRequest, responses(
    (status = 200, body = TokenizeResponse),
    (status = "4XX", body = crate::openapi::OpenAiError),
))]
pub(crate) async fn tokenize(
    State(state): State<AppState>,
    caller: Caller,
    Json(request): Json<TokenizeRequest>,
) -> Result<axum::Json<TokenizeResponse>> {
    let _admission = state.admit(&caller)?;
    let model = state.model_or_first(request.model.as_deref()).await?;
    let max_messages = state.config().limits.max_messages;
    let response = state.compute(move || {
        let given =
            [request.content.is_some(), request.prompt.is_some(), request.messages.is_some()];
        if given.iter().filter(|given| **given).count() != 1 {
            let message = "send one of `content`, `prompt` and `messages`";
            return Err(ApiError::field("content", message));
        }
        let is_prompt = request.prompt.is_some();
        let tokens = match (request.content.or(request.prompt), request.messages) {
            (Some(text), _) => {
                let add = match (request.add_special, request.add_special_tokens) {
                    (Some(_), Some(_)) => {
                        let message = "`add_special_tokens` is another name of `add_special`";
                        return Err(ApiError::field("add_special_tokens", message));
                    }
                    (Some(true), None) | (None, Some(true)) => AddSpecial::Start,
                    _ => AddSpecial::None,
                };
                let parse_special = request.parse_special.unwrap_or(is_prompt);
                encode(&model, &text, EncodeOptions { add, parse_special })?
            }
            (None, messages) => {
                let turns = read_messages(&messages.unwrap_or_default(), max_messages)?;
                let conversation = Conversation { turns, tools: Vec::new() };
                chat::prompt(&model, &conversation, false, true)?
            }
        };
        let pieces = request.with_pieces.unwrap_or(false);
        Ok(TokenizeResponse {
            count: tokens.len(),
            max_model_len: model.context_length(),
            pieces: pieces.then(|| tokens.iter().map(|&id| token_text(&model, id)).collect()),
            tokens,
        })
    });
    response.await.map(axum::Json)
}

/// Detokenize
#[utoipa::path(post, path = "/detokenize", tag = "Utilities", request_body = DetokenizeRequest, responses(
    (status = 200, body = DetokenizeResponse),
    (status = "4XX", body = crate::openapi::OpenAiError),
))]
pub(crate) async fn detokenize(
    State(state): State<AppState>,
    caller: Caller,
    Json(request): Json<DetokenizeRequest>,
) -> Result<axum::Json<DetokenizeResponse>> {
    let _admission = state.admit(&caller)?;
    let model = state.model_or_first(request.model.as_deref()).await?;
    let response = state.compute(move || {
        check_ids(&model, "tokens", &request.tokens)?;
        let text = model.tokenizer()?.decode(&request.tokens, true);
        Ok(DetokenizeResponse { content: text.clone(), prompt: text })
    });
    response.await.map(axum::Json)
}

/// Which model to describe.
#[derive(Debug, Deserialize, utoipa::IntoParams)]
#[serde(deny_unknown_fields)]
pub(crate) struct TokenizerQuery {
    /// Name of the model. Default: the first on offer.
    pub model: Option<String>,
}

/// What clients need to know of a tokenizer, under vLLM's names.
#[derive(Debug, Serialize, ToSchema)]
pub(crate) struct TokenizerInfo {
    /// Text of the token that begins a sequence.
    #[schema(required)]
    pub bos_token: Option<String>,
    /// Text of the token that ends one.
    #[schema(required)]
    pub eos_token: Option<String>,
    /// Tokens a prompt and its answer may have together.
    pub model_max_length: usize,
    /// Always null: `/apply-template` applies it.
    #[schema(required, value_type = Option<String>)]
    pub chat_template: Option<()>,
}

/// About the tokenizer
///
/// With `/tokenize` and `/detokenize`, all that evaluation programs need to count tokens as the model
/// does.
#[utoipa::path(get, path = "/tokenizer_info", tag = "Utilities", params(TokenizerQuery), responses(
    (status = 200, body = TokenizerInfo),
    (status = "4XX", body = crate::openapi::OpenAiError),
))]
pub(crate) async fn tokenizer_info(
    State(state): State<AppState>,
    caller: Caller,
    query: Result<Query<TokenizerQuery>, QueryRejection>,
) -> Result<axum::Json<TokenizerInfo>> {
    let Query(query) =
        query.map_err(|_| ApiError::field("model", "the only parameter is `model`"))?;
    let _admission = state.admit(&caller)?;
    let model = state.model_or_first(query.model.as_deref()).await?;
    let tokenizer = model.tokenizer()?;
    let text = |id: u32| tokenizer.decode(&[id], true);
    Ok(axum::Json(TokenizerInfo {
        bos_token: tokenizer.bos_id().map(text),
        eos_token: tokenizer.eos_ids().first().copied().map(text),
        model_max_length: model.context_length(),
        chat_template: None,
    }))
}

/// Apply the chat template
///
/// The prompt a conversation becomes, without generating anything.
#[utoipa::path(post, path = "/apply-template", tag = "Utilities", request_body = TemplateRequest, responses(
    (status = 200, body = TemplateResponse),
    (status = "4XX", body = crate::openapi::OpenAiError),
))]
pub(crate) async fn apply_template(
    State(state): State<AppState>,
    caller: Caller,
    Json(request): Json<TemplateRequest>,
) -> Result<axum::Json<TemplateResponse>> {
    let _admission = state.admit(&caller)?;
    let model = state.model_or_first(request.model.as_deref()).await?;
    let limits = state.config().limits.clone();
    let response = state.compute(move || {
        let turns = read_messages(&request.messages, limits.max_messages)?;
        let tools = read_tools(request.tools.unwrap_or_default(), limits.max_tools)?;
        let open = request.add_generation_prompt.unwrap_or(true);
        let with_tools = !tools.is_empty();
        let prompt = chat::render(&model, &Conversation { turns, tools }, with_tools, open)?;
        Ok(TemplateResponse { prompt })
    });
    response.await.map(axum::Json)
}

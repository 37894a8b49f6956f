//! The description of this server for programs, `/openapi.json`, derived from the types it reads and
//! writes.

use axum::extract::State;
use axum::http::header;
use axum::response::{IntoResponse, Response};
use serde::Serialize;
use utoipa::openapi::security::{HttpAuthScheme, HttpBuilder, SecurityRequirement, SecurityScheme};
use utoipa::{OpenApi, ToSchema};

use crate::state::AppState;

/// Gives a type that is read by hand the schema of a type that only describes it.
macro_rules! schema_as {
    ($type:ty, $schema:ty) => {
        impl utoipa::PartialSchema for $type {
            fn schema() -> utoipa::openapi::RefOr<utoipa::openapi::Schema> {
                <$schema as utoipa::PartialSchema>::schema()
            }
        }

        impl utoipa::ToSchema for $type {
            fn schemas(
                schemas: &mut Vec<(String, utoipa::openapi::RefOr<utoipa::openapi::Schema>)>,
            ) {
                <$schema as utoipa::ToSchema>::schemas(schemas);
            }
        }
    };
}
pub(crate) use schema_as;

/// An error in OpenAI's format.
#[derive(Debug, Serialize, ToSchema)]
pub(crate) struct OpenAiError {
    /// The error.
    pub error: OpenAiErrorBody,
}

/// What went wrong.
#[derive(Debug, Serialize, ToSchema)]
pub(crate) struct OpenAiErrorBody {
    /// For people.
    pub message: String,
    /// Its class.
    #[serde(rename = "type")]
    pub kind: String,
    /// The field that caused it.
    #[schema(required)]
    pub param: Option<String>,
    /// Its name.
    #[schema(required)]
    pub code: Option<String>,
}

/// An event of a stream. OpenAPI 3.1 has no word for it; tools read the schema of `text/event-stream`
/// as that of each event.
#[derive(ToSchema)]
#[allow(dead_code)] // Read by the derive only.
pub(crate) struct StreamEvent {
    /// Its kind, in formats that name kinds.
    event: Option<String>,
    /// A JSON object, or `[DONE]`.
    data: String,
}

#[derive(OpenApi)]
#[openapi(
    info(
        title = "BitNet-Rust",
        description = "Ternary language models over OpenAI's, Anthropic's and Ollama's wire formats."
    ),
    paths(
        crate::openai::chat::chat_completions,
        crate::openai::completions::completions,
        crate::openai::responses::responses,
        crate::openai::embeddings::embeddings,
        crate::openai::models::list,
        crate::openai::models::get,
        crate::anthropic::messages,
        crate::anthropic::count_tokens,
        crate::ollama::generate,
        crate::ollama::chat,
        crate::ollama::embed_texts,
        crate::ollama_models::tags,
        crate::ollama_models::ps,
        crate::ollama_models::show,
        crate::ollama_models::version,
        crate::utility::tokenize,
        crate::utility::detokenize,
        crate::utility::tokenizer_info,
        crate::utility::apply_template,
        crate::health::health,
        crate::health::ready,
        crate::health::metrics,
    )
)]
struct Document;

/// The document.
pub fn document(with_keys: bool) -> utoipa::openapi::OpenApi {
    let mut document = Document::openapi();
    if with_keys {
        let bearer = HttpBuilder::new().scheme(HttpAuthScheme::Bearer).build();
        let components = document.components.get_or_insert_default();
        components.add_security_scheme("api_key", SecurityScheme::Http(bearer));
        let none: [&str; 0] = [];
        document.security = Some(vec![SecurityRequirement::new("api_key", none)]);
    }
    document
}

/// Serves the document.
pub(crate) async fn openapi_json(State(state): State<AppState>) -> Response {
    let document = document(state.keys().required());
    match serde_json::to_vec(&document) {
        Ok(body) => ([(header::CONTENT_TYPE, "application/json")], body).into_response(),
        Err(_) => crate::error::ApiError::internal().into_response(),
    }
}

//! The description of this server for programs, `/openapi.json`, derived from the types it reads and
//! writes.

use std::collections::HashMap;

use axum::extract::State;
use axum::http::header;
use axum::response::{IntoResponse, Response};
use serde::Serialize;
use serde_json::{Value, json};
use utoipa::openapi::schema::{SchemaType, Type};
use utoipa::openapi::security::{HttpAuthScheme, HttpBuilder, SecurityRequirement, SecurityScheme};
use utoipa::openapi::{RefOr, Schema};
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

/// The document of a server that offers these models.
pub fn document(with_keys: bool, models: &[&str]) -> utoipa::openapi::OpenApi {
    let mut document = Document::openapi();
    name_models(&mut document, models);
    if with_keys {
        let bearer = HttpBuilder::new().scheme(HttpAuthScheme::Bearer).build();
        let components = document.components.get_or_insert_default();
        components.add_security_scheme("api_key", SecurityScheme::Http(bearer));
        let none: [&str; 0] = [];
        document.security = Some(vec![SecurityRequirement::new("api_key", none)]);
    }
    document
}

/// The document of this server.
pub(crate) fn own_document(state: &AppState) -> utoipa::openapi::OpenApi {
    let models: Vec<&str> = state.registry().entries().iter().map(|entry| &*entry.name).collect();
    document(state.keys().required(), &models)
}

/// A request of a route that is answered as it stands, but for the model's name.
fn example(path: &str) -> Option<Value> {
    const TEXT: &str = "Once upon a time";
    let messages = json!([{"role": "user", "content": TEXT}]);
    Some(match path {
        "/v1/chat/completions" | "/v1/messages" => json!({"messages": messages, "max_tokens": 16}),
        "/v1/completions" => json!({"prompt": TEXT, "max_tokens": 16}),
        "/v1/responses" => json!({"input": TEXT, "max_output_tokens": 16}),
        "/v1/embeddings" | "/api/embed" => json!({"input": TEXT}),
        "/v1/messages/count_tokens" | "/apply-template" => json!({"messages": messages}),
        "/api/chat" => json!({"messages": messages, "options": {"num_predict": 16}}),
        "/api/generate" => json!({"prompt": TEXT, "options": {"num_predict": 16}}),
        "/api/show" => json!({}),
        "/tokenize" => json!({"content": TEXT}),
        "/detokenize" => json!({"tokens": [17]}),
        _ => return None,
    })
}

/// Lists the models wherever a request names one, and gives each route an example, so that programs
/// that read the document can ask.
fn name_models(document: &mut utoipa::openapi::OpenApi, models: &[&str]) {
    let schemas = document.components.iter_mut().flat_map(|components| &mut components.schemas);
    let mut schemas: HashMap<&str, &mut RefOr<Schema>> =
        schemas.map(|(name, schema)| (name.as_str(), schema)).collect();
    for (path, item) in &mut document.paths.paths {
        for operation in [&mut item.get, &mut item.post].into_iter().flatten() {
            for parameter in operation.parameters.iter_mut().flatten() {
                let RefOr::T(parameter) = parameter else { continue };
                if parameter.name == "model" {
                    parameter.schema.iter_mut().for_each(|schema| list_values(schema, models));
                }
            }
            let Some(RefOr::T(body)) = &mut operation.request_body else { continue };
            for body in body.content.values_mut() {
                let RefOr::T(body) = body else { continue };
                body.example = example(path).map(|mut example| {
                    example["model"] = models.first().copied().into();
                    example
                });
                let Some(RefOr::Ref(body)) = &body.schema else { continue };
                let name = body.ref_location.rsplit('/').next().unwrap_or_default();
                let Some(RefOr::T(Schema::Object(body))) = schemas.get_mut(name) else { continue };
                for field in ["model", "name"] {
                    if let Some(schema) = body.properties.get_mut(field) {
                        list_values(schema, models);
                    }
                }
            }
        }
    }
}

/// Restricts a schema of strings to `values`, and null where that was allowed.
fn list_values(schema: &mut RefOr<Schema>, values: &[&str]) {
    let RefOr::T(Schema::Object(schema)) = schema else { return };
    let has_null =
        matches!(&schema.schema_type, SchemaType::Array(kinds) if kinds.contains(&Type::Null));
    let values = values.iter().map(|&value| value.into());
    schema.enum_values = Some(values.chain(has_null.then_some(Value::Null)).collect());
}

/// Serves the document.
pub(crate) async fn openapi_json(State(state): State<AppState>) -> Response {
    let document = own_document(&state);
    match serde_json::to_vec(&document) {
        Ok(body) => ([(header::CONTENT_TYPE, "application/json")], body).into_response(),
        Err(_) => crate::error::ApiError::internal().into_response(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn requests_name_the_models_on_offer() {
        let document = serde_json::to_value(document(false, &["a", "b"])).unwrap();
        let of_parameter = |path: &str| &document["paths"][path]["get"]["parameters"][0]["schema"];
        assert_eq!(of_parameter("/v1/models/{model}")["enum"], json!(["a", "b"]));
        assert_eq!(of_parameter("/tokenizer_info")["enum"], json!(["a", "b", null]));
        let schemas = document["components"]["schemas"].as_object().unwrap();
        let mut n_requests = 0;
        for (path, item) in document["paths"].as_object().unwrap() {
            let Some(body) =
                item["post"]["requestBody"]["content"]["application/json"]["schema"]["$ref"]
                    .as_str()
            else {
                continue;
            };
            let body = &schemas[body.rsplit('/').next().unwrap()];
            let values = &body["properties"]["model"]["enum"];
            assert!(values == &json!(["a", "b"]) || values == &json!(["a", "b", null]), "{path}");
            let example = &item["post"]["requestBody"]["content"]["application/json"]["example"];
            assert_eq!(example["model"], "a", "{path}");
            n_requests += 1;
        }
        assert_eq!(n_requests, 13);
    }
}

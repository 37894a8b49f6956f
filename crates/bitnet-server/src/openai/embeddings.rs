//! `POST /v1/embeddings`.

use std::sync::Arc;

use axum::extract::State;
use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use bitnet_inference::Pooling;
use serde::{Deserialize, Serialize};
use utoipa::ToSchema;

use super::types::Prompts;
use crate::embed::{Embedded, embed};
use crate::error::{ApiError, Result};
use crate::json::Json;
use crate::state::{AppState, Caller};

/// A request for embeddings.
#[derive(Debug, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
#[allow(dead_code)] // Some fields only say what is accepted; reading them checks them.
pub(crate) struct EmbeddingRequest {
    /// Name of the model, one of `/v1/models`.
    pub model: String,
    /// A text, token ids, or a list of either.
    pub input: Prompts,
    /// How vectors are written. Default `float`.
    pub encoding_format: Option<EncodingFormat>,
    /// Only the model's own number.
    pub dimensions: Option<i64>,
    /// How the states of a text's tokens become one vector. Default `mean`.
    pub pooling: Option<PoolingKind>,
    /// A label of the end user; it changes nothing in the answer.
    pub user: Option<String>,
}

/// How vectors are written.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Deserialize, ToSchema)]
#[serde(rename_all = "lowercase")]
pub(crate) enum EncodingFormat {
    /// A list of numbers.
    Float,
    /// Little-endian 32-bit floats in base64.
    Base64,
}

/// How the states of a text's tokens become one vector.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Deserialize, ToSchema)]
#[serde(rename_all = "lowercase")]
pub(crate) enum PoolingKind {
    /// Their mean.
    Mean,
    /// The last one.
    Last,
}

/// Embeddings.
#[derive(Debug, Serialize, ToSchema)]
pub(crate) struct EmbeddingResponse {
    /// Always `list`.
    pub object: &'static str,
    /// One for each input, in order.
    pub data: Vec<EmbeddingObject>,
    /// The model that computed them.
    #[schema(value_type = String)]
    pub model: Arc<str>,
    /// What they took.
    pub usage: EmbeddingUsage,
}

/// One embedding.
#[derive(Debug, Serialize, ToSchema)]
pub(crate) struct EmbeddingObject {
    /// Always `embedding`.
    pub object: &'static str,
    /// Number of its input.
    pub index: usize,
    /// The vector, of length one.
    pub embedding: Vector,
}

/// A vector in the form asked for.
#[derive(Debug, Serialize, ToSchema)]
#[serde(untagged)]
pub(crate) enum Vector {
    /// Numbers.
    Float(Vec<f32>),
    /// Little-endian 32-bit floats in base64.
    Base64(String),
}

/// What embeddings took.
#[derive(Debug, Serialize, ToSchema)]
pub(crate) struct EmbeddingUsage {
    /// Tokens of the inputs.
    pub prompt_tokens: usize,
    /// The same.
    pub total_tokens: usize,
}

/// Embeddings
///
/// One vector of length one for each input, from the model's last states.
#[utoipa::path(
    post,
    path = "/v1/embeddings",
    tag = "OpenAI",
    request_body = EmbeddingRequest,
    responses(
        (status = 200, body = EmbeddingResponse),
        (status = "4XX", body = crate::openapi::OpenAiError),
        (status = "5XX", body = crate::openapi::OpenAiError),
    )
)]
pub(crate) async fn embeddings(
    State(state): State<AppState>,
    caller: Caller,
    Json(request): Json<EmbeddingRequest>,
) -> Result<axum::Json<EmbeddingResponse>> {
    let pooling = match request.pooling {
        Some(PoolingKind::Last) => Pooling::Last,
        Some(PoolingKind::Mean) | None => Pooling::Mean,
    };
    if request.dimensions.is_some() {
        let entry = state.registry().entry(&request.model)?;
        let dim = state.registry().model(entry).await?.get_input_dim();
        if request.dimensions != i64::try_from(dim).ok() {
            let why = format!("this model's vectors have {dim} numbers");
            return Err(ApiError::unsupported("dimensions", &why));
        }
    }
    let base64 = request.encoding_format == Some(EncodingFormat::Base64);
    let Embedded { model_name, vectors, n_tokens } =
        embed(&state, &caller, &request.model, request.input.0, pooling, None).await?;
    let object = |(index, vector): (usize, Vec<f32>)| {
        let embedding = if base64 { to_base64(&vector) } else { Vector::Float(vector) };
        EmbeddingObject { object: "embedding", index, embedding }
    };
    Ok(axum::Json(EmbeddingResponse {
        object: "list",
        data: vectors.into_iter().enumerate().map(object).collect(),
        model: model_name,
        usage: EmbeddingUsage { prompt_tokens: n_tokens, total_tokens: n_tokens },
    }))
}

fn to_base64(vector: &[f32]) -> Vector {
    let bytes: Vec<u8> = vector.iter().flat_map(|x| x.to_le_bytes()).collect();
    Vector::Base64(STANDARD.encode(bytes))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn base64_holds_little_endian_floats() {
        let Vector::Base64(text) = to_base64(&[1.0, -2.0]) else { panic!("not base64") };
        assert_eq!(text, "AACAPwAAAMA=");
    }
}

//! `GET /v1/models` and `/v1/models/{model}`.

use std::sync::Arc;

use axum::extract::{Path, State};
use serde::Serialize;
use utoipa::ToSchema;

use crate::error::Result;
use crate::registry::{Entry, Registry};
use crate::state::AppState;

/// All models on offer.
#[derive(Debug, Serialize, ToSchema)]
pub(crate) struct ModelList {
    /// Always `list`.
    pub object: &'static str,
    /// The models.
    pub data: Vec<ModelInfo>,
}

/// A model on offer.
#[derive(Debug, Serialize, ToSchema)]
pub(crate) struct ModelInfo {
    /// The name to ask for.
    #[schema(value_type = String)]
    pub id: Arc<str>,
    /// Always `model`.
    pub object: &'static str,
    /// Seconds since 1970 of its file's last change.
    pub created: u64,
    /// Who offers it.
    pub owned_by: &'static str,
    /// Tokens a prompt and its answer may have together; null while it is not loaded.
    #[schema(required)]
    pub max_model_len: Option<usize>,
    /// What it is; null while it is not loaded.
    #[schema(required)]
    pub meta: Option<ModelMeta>,
}

/// What a model is.
#[derive(Debug, Serialize, ToSchema)]
pub(crate) struct ModelMeta {
    /// Tokens it chooses between.
    pub n_vocab: usize,
    /// Tokens it was made for.
    pub n_ctx_train: usize,
    /// Features of a token.
    pub n_embd: usize,
    /// Weights.
    pub n_params: u64,
    /// Bytes of weights in memory.
    pub size: u64,
}

/// List of models
#[utoipa::path(get, path = "/v1/models", tag = "OpenAI", responses(
    (status = 200, body = ModelList),
    (status = "4XX", body = crate::openapi::OpenAiError),
))]
pub(crate) async fn list(State(state): State<AppState>) -> axum::Json<ModelList> {
    let registry = state.registry();
    let data = registry.entries().iter().map(|entry| info(registry, entry)).collect();
    axum::Json(ModelList { object: "list", data })
}

/// One model
#[utoipa::path(
    get,
    path = "/v1/models/{model}",
    tag = "OpenAI",
    params(("model" = String, Path, description = "Its name")),
    responses(
        (status = 200, body = ModelInfo),
        (status = "4XX", body = crate::openapi::OpenAiError),
    )
)]
pub(crate) async fn get(
    State(state): State<AppState>,
    Path(name): Path<String>,
) -> Result<axum::Json<ModelInfo>> {
    let registry = state.registry();
    Ok(axum::Json(info(registry, registry.entry(&name)?)))
}

fn info(registry: &Registry, entry: &Entry) -> ModelInfo {
    let loaded = registry.loaded(entry);
    ModelInfo {
        id: entry.name.clone(),
        object: "model",
        created: entry.created,
        owned_by: "bitnet",
        max_model_len: loaded.as_ref().map(|model| model.context_length()),
        meta: loaded.map(|model| ModelMeta {
            n_vocab: model.get_output_dim(),
            n_ctx_train: model.config().max_position_embeddings,
            n_embd: model.get_input_dim(),
            n_params: model.get_total_weight_count(),
            size: model.memory().weights,
        }),
    }
}

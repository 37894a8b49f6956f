//! Whether the server lives, and whether it should be sent requests.

use axum::extract::State;
use axum::http::{StatusCode, header};
use axum::response::{IntoResponse, Response};
use serde::Serialize;
use utoipa::ToSchema;

use crate::error::{ApiError, Result};
use crate::lifecycle::Phase;
use crate::metrics::ModelState;
use crate::state::AppState;

/// The server is well.
#[derive(Debug, Serialize, ToSchema)]
pub(crate) struct Health {
    /// Always `ok`.
    pub status: &'static str,
}

/// Liveness
///
/// 200 as long as the process answers, draining included. Needs no key.
#[utoipa::path(get, path = "/health", tag = "Operation", responses((status = 200, body = Health)))]
pub(crate) async fn health() -> axum::Json<Health> {
    axum::Json(Health { status: "ok" })
}

/// Readiness
///
/// 200 when new requests are welcome; 503 once the server drains. Needs no key.
#[utoipa::path(
    get,
    path = "/ready",
    tag = "Operation",
    responses(
        (status = 200, body = Health),
        (status = 503, body = crate::openapi::OpenAiError),
    )
)]
pub(crate) async fn ready(State(state): State<AppState>) -> Result<axum::Json<Health>> {
    match state.lifecycle().phase() {
        Phase::Serving => Ok(axum::Json(Health { status: "ok" })),
        Phase::Draining | Phase::Cancelled => {
            let error =
                ApiError::new(StatusCode::SERVICE_UNAVAILABLE, "the server is shutting down");
            Err(error.code("shutting_down"))
        }
    }
}

/// Measurements
///
/// In the text format of Prometheus, under this server's names and vLLM's.
#[utoipa::path(
    get,
    path = "/metrics",
    tag = "Operation",
    responses((status = 200, body = String, content_type = "text/plain"))
)]
pub(crate) async fn metrics(State(state): State<AppState>) -> Response {
    for entry in state.registry().entries() {
        let loaded = state.registry().loaded(entry).map(|model| ModelState {
            stats: model.stats(),
            block_tokens: model.kv_spec().block_tokens,
            weight_bytes: model.memory().weights,
            kv_bytes: model.memory().kv_cache,
        });
        state.metrics().model_state(&entry.name, loaded);
    }
    let text = state.metrics().render();
    ([(header::CONTENT_TYPE, "text/plain; version=0.0.4; charset=utf-8")], text).into_response()
}

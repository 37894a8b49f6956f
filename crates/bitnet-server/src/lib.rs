//! How do programs reach the engine over a network?
//!
//! `bitnet-server` speaks OpenAI's wire format (chat, completions, responses, embeddings, models), and
//! as much of Anthropic's and Ollama's as generates text, over one [`InferenceEngine`]. Everything a
//! client can make it hold or do has a bound, documented in [`config`]; a field it does not act on is
//! refused by name.
//!
//! A request passes [`middleware`](self) (name, source, key), is read strictly ([`error`] says what was
//! wrong), becomes a job of the engine, and its events become an answer or a stream. The order of the
//! data: `middleware` → `json` → `openai`, … → `generate` → `run` → `stream`.
//!
//! ```no_run
//! use bitnet_inference::InferenceEngine;
//! use bitnet_server::{AppState, ServerConfig};
//!
//! # async fn example() -> Result<(), Box<dyn std::error::Error>> {
//! let engine = InferenceEngine::balanced().await?;
//! let state = AppState::new(engine, ServerConfig::default())?;
//! let listener = bitnet_server::bind(state.config()).await?;
//! bitnet_server::serve(listener, bitnet_server::router(state.clone()), state).await?;
//! # Ok(())
//! # }
//! ```
#![forbid(unsafe_code)]

mod anthropic;
mod anthropic_stream;
mod auth;
mod batch;
mod chat;
pub mod config;
mod constraint;
mod content;
mod docs;
mod embed;
pub mod error;
mod generate;
mod health;
mod json;
mod lifecycle;
mod logging;
mod metrics;
mod middleware;
mod ollama;
mod ollama_keep_alive;
mod ollama_models;
mod ollama_stream;
mod openai;
mod openapi;
mod page;
mod registry;
mod residency;
mod run;
mod sampling;
mod serve;
mod state;
mod stream;
mod text;
#[cfg(feature = "tls")]
mod tls;
mod tools;
mod trace;
mod utility;

use axum::Router;
use axum::http::{HeaderValue, Method, header};
use axum::middleware::{from_fn_with_state, map_response};
use axum::routing::{get, post};
use tower_http::catch_panic::CatchPanicLayer;
use tower_http::cors::{AllowHeaders, AllowOrigin, CorsLayer};

pub use batch::{BatchAnswer, BatchLines};
pub use config::{KeepAlive, KeepAliveError, Limits, Listen, ServerConfig};
pub use lifecycle::{Lifecycle, Phase};
#[cfg(feature = "otel")]
pub use logging::init_logging_and_traces;
pub use logging::{LogError, LogFormat, init_logging};
pub use openapi::document as openapi_document;
pub use serve::{Listener, bind, drain_on_signal, serve};
pub use state::AppState;
#[cfg(feature = "otel")]
pub use trace::Traces;

#[cfg(doc)]
use bitnet_inference::InferenceEngine;

/// All routes and everything around them.
pub fn router(state: AppState) -> Router {
    let guarded = Router::new()
        .route("/v1/chat/completions", post(openai::chat::chat_completions))
        .route("/v1/completions", post(openai::completions::completions))
        .route("/v1/responses", post(openai::responses::responses))
        .route("/v1/embeddings", post(openai::embeddings::embeddings))
        .route("/v1/messages", post(anthropic::messages))
        .route("/v1/messages/count_tokens", post(anthropic::count_tokens))
        .route("/api/generate", post(ollama::generate))
        .route("/api/chat", post(ollama::chat))
        .route("/api/embed", post(ollama::embed_texts))
        .route("/api/tags", get(ollama_models::tags))
        .route("/api/ps", get(ollama_models::ps))
        .route("/api/show", post(ollama_models::show))
        .route("/api/version", get(ollama_models::version))
        .route("/tokenize", post(utility::tokenize))
        .route("/detokenize", post(utility::detokenize))
        .route("/tokenizer_info", get(utility::tokenizer_info))
        .route("/apply-template", post(utility::apply_template))
        .route("/v1/models", get(openai::models::list))
        .route("/v1/models/{*model}", get(openai::models::get))
        .route("/metrics", get(health::metrics))
        .route("/openapi.json", get(openapi::openapi_json))
        .route("/docs", get(docs::docs))
        .route_layer(from_fn_with_state(state.clone(), middleware::authenticate));
    let open = Router::new()
        .route("/", get(page::index))
        .route("/page/{file}", get(page::file))
        .route("/health", get(health::health))
        .route("/v1/health", get(health::health))
        .route("/ready", get(health::ready));
    let mut app = guarded
        .merge(open)
        .fallback(middleware::not_found)
        .method_not_allowed_fallback(middleware::method_not_allowed);
    if !state.config().cors_origins.is_empty() {
        app = app.layer(cors(state.config()));
    }
    app.layer(from_fn_with_state(state.clone(), middleware::check_source))
        .layer(CatchPanicLayer::custom(middleware::panicked))
        .layer(from_fn_with_state(state.clone(), middleware::observe))
        .layer(map_response(no_sniff))
        .with_state(state)
}

/// Browsers are to take every body for what it says it is.
async fn no_sniff(mut response: axum::response::Response) -> axum::response::Response {
    let value = HeaderValue::from_static("nosniff");
    response.headers_mut().insert(header::X_CONTENT_TYPE_OPTIONS, value);
    response
}

fn cors(config: &ServerConfig) -> CorsLayer {
    let origins = match config.cors_origins.iter().any(|origin| origin == "*") {
        true => AllowOrigin::any(),
        false => {
            let value = |origin: &String| HeaderValue::from_str(origin).ok();
            AllowOrigin::list(config.cors_origins.iter().filter_map(value))
        }
    };
    CorsLayer::new()
        .allow_origin(origins)
        .allow_methods([Method::GET, Method::POST])
        // Official clients in browsers send names of their own; whoever may call may send any header.
        .allow_headers(AllowHeaders::mirror_request())
        .expose_headers([middleware::REQUEST_ID, header::RETRY_AFTER])
}

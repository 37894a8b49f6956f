//! What every handler shares: configuration, models, keys, measurements, and the places for requests.

use std::sync::Arc;
use std::time::Instant;

use axum::extract::FromRequestParts;
use axum::http::StatusCode;
use axum::http::request::Parts;
use bitnet_inference::InferenceEngine;
use tokio::sync::{OwnedSemaphorePermit, Semaphore};

use crate::auth::{ApiKeys, Tenant};
use crate::config::{ConfigError, ServerConfig};
use crate::error::{ApiError, Result};
use crate::lifecycle::{InWorkGuard, Lifecycle};
use crate::metrics::Metrics;
use crate::registry::Registry;
use crate::residency::ModelUse;

/// Shared by all handlers; clones are one and the same.
#[derive(Clone)]
pub struct AppState(Arc<Inner>);

struct Inner {
    config: ServerConfig,
    registry: Registry,
    keys: ApiKeys,
    metrics: Metrics,
    lifecycle: Lifecycle,
    slots: Arc<Semaphore>,
    /// Threads that may render templates and tokenize at a time.
    text_slots: Semaphore,
    engine: InferenceEngine,
}

impl AppState {
    /// The state of a server that runs models on `engine`.
    ///
    /// # Errors
    /// A setting outside its range.
    pub fn new(engine: InferenceEngine, config: ServerConfig) -> Result<Self, ConfigError> {
        config.validate()?;
        let limits = &config.limits;
        let cores = std::thread::available_parallelism().map_or(1, |n| n.get());
        Ok(Self(Arc::new(Inner {
            registry: Registry::new(engine.clone(), &config.models, config.keep_alive),
            keys: ApiKeys::new(&config.api_keys, limits.max_requests_per_key),
            metrics: Metrics::new(),
            lifecycle: Lifecycle::default(),
            slots: Arc::new(Semaphore::new(limits.max_requests.min(Semaphore::MAX_PERMITS))),
            text_slots: Semaphore::new(cores),
            engine,
            config,
        })))
    }

    /// The configuration.
    pub fn config(&self) -> &ServerConfig {
        &self.0.config
    }

    /// The models on offer.
    pub(crate) fn registry(&self) -> &Registry {
        &self.0.registry
    }

    /// The engine that runs them.
    pub(crate) fn engine(&self) -> &InferenceEngine {
        &self.0.engine
    }

    /// The API keys.
    pub(crate) fn keys(&self) -> &ApiKeys {
        &self.0.keys
    }

    /// The measurements.
    pub(crate) fn metrics(&self) -> &Metrics {
        &self.0.metrics
    }

    /// Whether the server serves, drains or ends.
    pub fn lifecycle(&self) -> &Lifecycle {
        &self.0.lifecycle
    }

    /// A place for one more request; given back when the admission is dropped.
    ///
    /// # Errors
    /// 429 when the server or the caller's key has as many requests as it may.
    pub(crate) fn admit(&self, caller: &Caller) -> Result<Admission> {
        let refuse = |error: ApiError| {
            self.metrics().rejected(error.code.unwrap_or("other"));
            error
        };
        // The server's first: who sends no key should not be told of a key's limit.
        let slot = self.0.slots.clone().try_acquire_owned().map_err(|_| {
            let message = "the server has as many requests in work as it may";
            let error = ApiError::new(StatusCode::TOO_MANY_REQUESTS, message);
            refuse(error.code("server_busy").retry_after(1))
        })?;
        let key_slot = caller.tenant.admit().map_err(refuse)?;
        self.metrics().in_flight(1.0);
        let in_work = self.lifecycle().enter();
        Ok(Admission { state: self.clone(), _slots: [key_slot, slot], _in_work: in_work })
    }

    /// The model of this name, or the first on offer, in memory.
    pub(crate) async fn model_or_first(&self, name: Option<&str>) -> Result<ModelUse> {
        let registry = self.registry();
        let entry = match name {
            Some(name) => registry.entry(name)?,
            None => registry.entries().first().ok_or_else(ApiError::internal)?,
        };
        registry.model(entry).await
    }

    /// Runs text work (templates, tokenizers, grammars) beside the async threads, as many at a time
    /// as there are cores. A panic in it is this request's error alone.
    pub(crate) async fn compute<T: Send + 'static>(
        &self,
        work: impl FnOnce() -> Result<T> + Send + 'static,
    ) -> Result<T> {
        let _slot = self.0.text_slots.acquire().await.map_err(|_| ApiError::internal())?;
        match tokio::task::spawn_blocking(work).await {
            Ok(result) => result,
            Err(error) => {
                tracing::error!(%error, "text work of a request panicked");
                Err(ApiError::internal())
            }
        }
    }
}

impl std::fmt::Debug for AppState {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("AppState").field("models", &self.registry().entries().len()).finish()
    }
}

/// A request that was let in.
pub(crate) struct Admission {
    state: AppState,
    _slots: [OwnedSemaphorePermit; 2],
    _in_work: InWorkGuard,
}

impl Drop for Admission {
    fn drop(&mut self) {
        self.state.metrics().in_flight(-1.0);
    }
}

/// Who asks, since when, under which name the request appears in logs.
#[derive(Debug, Clone)]
pub(crate) struct Caller {
    pub(crate) tenant: Tenant,
    pub(crate) request_id: Arc<str>,
    pub(crate) arrived: Instant,
}

impl<S: Sync> FromRequestParts<S> for Caller {
    type Rejection = ApiError;

    async fn from_request_parts(parts: &mut Parts, _: &S) -> Result<Self> {
        // The authentication middleware puts it there for every route that is not public.
        parts.extensions.get().cloned().ok_or_else(ApiError::internal)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn a_panic_in_the_work_of_one_request_is_that_requests_error() {
        let engine = InferenceEngine::builder().build_blocking().unwrap();
        let state = AppState::new(engine, ServerConfig::default()).unwrap();
        // More often than there are places: none may be lost.
        for _ in 0..100 {
            let failed = state.compute::<()>(|| panic!("planted")).await;
            assert_eq!(failed.unwrap_err().status, StatusCode::INTERNAL_SERVER_ERROR);
        }
        assert_eq!(state.compute(|| Ok(7)).await.unwrap(), 7);
    }
}

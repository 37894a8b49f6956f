//! The models this server offers, by name. The engine keeps them loaded and evicts them; here names
//! become paths, and a load happens once however many requests ask for it.

use std::collections::HashMap;
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::SystemTime;

use axum::http::StatusCode;
use bitnet_inference::{InferenceEngine, Model};
use tokio::sync::Mutex;

use crate::error::{ApiError, Result};
use crate::residency::{KeepAlive, ModelUse, Residency};

/// A model on offer.
#[derive(Debug)]
pub(crate) struct Entry {
    /// The name clients use.
    pub name: Arc<str>,
    /// The file or folder, or `builtin`.
    pub path: PathBuf,
    /// Seconds since 1970 of the file's last change, or of the server's start.
    pub created: u64,
    /// Shared by all entries of one path.
    pub residency: Arc<Residency>,
    loading: Mutex<()>,
    /// Warnings of the loaded model that are in the log.
    logged: AtomicUsize,
}

impl Entry {
    /// Logs what happened to its model since the last time: devices passed over or lost.
    fn log_warnings(&self, model: &Model) {
        let warnings = model.warnings();
        let known = self.logged.swap(warnings.len(), Ordering::Relaxed);
        for warning in warnings.iter().skip(known) {
            tracing::warn!(model = &*self.name, warning, "a model does not run as asked");
        }
    }
}

/// All models on offer, in the order they were given.
#[derive(Debug)]
pub(crate) struct Registry {
    engine: InferenceEngine,
    entries: Vec<Entry>,
}

impl Registry {
    /// Offers these models; each stays in memory for `keep` after its last request.
    pub(crate) fn new(
        engine: InferenceEngine,
        models: &[(String, PathBuf)],
        keep: KeepAlive,
    ) -> Self {
        let mut residencies: HashMap<&PathBuf, Arc<Residency>> = HashMap::new();
        let entry = |(name, path): &(String, PathBuf), residency: &Arc<Residency>| {
            let changed = std::fs::metadata(path).and_then(|data| data.modified());
            let changed = changed.unwrap_or_else(|_| SystemTime::now());
            let created = changed.duration_since(SystemTime::UNIX_EPOCH).map_or(0, |d| d.as_secs());
            Entry {
                name: name.as_str().into(),
                path: path.clone(),
                created,
                residency: residency.clone(),
                loading: Mutex::new(()),
                logged: AtomicUsize::new(0),
            }
        };
        let mut entries = Vec::with_capacity(models.len());
        for model in models {
            let new = || Arc::new(Residency::new(engine.clone(), model.1.clone(), keep));
            entries.push(entry(model, residencies.entry(&model.1).or_insert_with(new)));
        }
        Self { entries, engine }
    }

    /// All entries.
    pub(crate) fn entries(&self) -> &[Entry] {
        &self.entries
    }

    /// The entry of a name. Ollama's clients add `:latest`, which is the same model.
    ///
    /// # Errors
    /// 404 for a name that is not on offer.
    pub(crate) fn entry(&self, name: &str) -> Result<&Entry> {
        let find = |name: &str| self.entries.iter().find(|entry| &*entry.name == name);
        find(name).or_else(|| find(name.strip_suffix(":latest")?)).ok_or_else(|| {
            let shown: String = name.chars().take(64).collect();
            let message = format!("the model `{shown}` does not exist; see /v1/models");
            ApiError {
                param: Some("model".into()),
                ..ApiError::new(StatusCode::NOT_FOUND, message)
            }
            .code("model_not_found")
        })
    }

    /// The model of an entry if it is in memory; does not count as use.
    pub(crate) fn loaded(&self, entry: &Entry) -> Option<Model> {
        self.engine.loaded_model(&entry.path)
    }

    /// The model of an entry, loaded if it is not in memory.
    ///
    /// # Errors
    /// 503 if it cannot be loaded; the log says why.
    pub(crate) async fn model(&self, entry: &Entry) -> Result<ModelUse> {
        self.model_for(entry, None).await
    }

    /// As [`model`](Self::model), for a request that may choose how long it stays.
    pub(crate) async fn model_for(
        &self,
        entry: &Entry,
        keep: Option<KeepAlive>,
    ) -> Result<ModelUse> {
        let guard = entry.residency.enter(keep);
        Ok(ModelUse::new(self.loaded_or_load(entry).await?, guard))
    }

    async fn loaded_or_load(&self, entry: &Entry) -> Result<Model> {
        if let Some(model) = self.engine.loaded_model(&entry.path) {
            entry.log_warnings(&model);
            return Ok(self.engine.load_model(&entry.path).await?); // Counts as use.
        }
        // The engine would let each caller wait on a thread of its own.
        let _one_at_a_time = entry.loading.lock().await;
        if let Some(model) = self.engine.loaded_model(&entry.path) {
            return Ok(model);
        }
        let model = self.engine.load_model(&entry.path).await?;
        entry.logged.store(0, Ordering::Relaxed);
        entry.log_warnings(&model);
        let took_ms = model.load_time().as_millis() as u64;
        let device = &model.device().name;
        tracing::info!(model = &*entry.name, device, took_ms, "model loaded");
        Ok(model)
    }
}

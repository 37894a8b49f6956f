//! Ollama's lists of models: `/api/tags`, `/api/ps`, `/api/show`, `/api/version`.

use axum::extract::State;
use bitnet_inference::Model;
use serde::{Deserialize, Serialize};
use serde_json::json;
use sha2::{Digest, Sha256};
use utoipa::ToSchema;

use crate::error::Result;
use crate::json::AnyJson;
use crate::ollama::ModelFacts;
use crate::ollama_stream::rfc3339;
use crate::openai::now;
use crate::registry::Entry;
use crate::state::AppState;

/// All models on offer, or all in memory.
#[derive(Debug, Serialize, ToSchema)]
pub(crate) struct TagList {
    /// The models.
    pub models: Vec<Tag>,
}

/// A model.
#[derive(Debug, Serialize, ToSchema)]
pub(crate) struct Tag {
    /// Its name.
    pub name: String,
    /// The same.
    pub model: String,
    /// When its file last changed.
    pub modified_at: String,
    /// Bytes of its file; 0 for the built-in model and for folders.
    pub size: u64,
    /// Tells one state of the file from another: a hash of name, size and time, not of the content.
    pub digest: String,
    /// What it is.
    pub details: Details,
    /// For a model in memory: when it will be unloaded if nobody uses it any more; the year 9999: when
    /// others need the room.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub expires_at: Option<String>,
    /// For a model in memory: bytes on a GPU.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub size_vram: Option<u64>,
    /// For a model in memory: tokens a prompt and its answer may have together.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub context_length: Option<usize>,
}

/// What a model is.
#[derive(Debug, Serialize, ToSchema)]
pub(crate) struct Details {
    /// Always empty.
    pub parent_model: &'static str,
    /// How it is stored.
    pub format: &'static str,
    /// Its architecture; empty while it is not loaded.
    pub family: String,
    /// The same, as a list.
    pub families: Vec<String>,
    /// Weights, such as `2.4B`; empty while it is not loaded.
    pub parameter_size: String,
    /// Always ternary.
    pub quantization_level: &'static str,
}

/// Which model to show.
#[derive(Debug, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
#[allow(dead_code)] // Some fields only say what is accepted; reading them checks them.
pub(crate) struct ShowRequest {
    /// Its name.
    pub model: Option<String>,
    /// The older name of `model`.
    pub name: Option<String>,
    /// Has no effect: there are no large lists to leave out.
    pub verbose: Option<crate::ollama::OnlyFalse>,
}

/// A model in detail.
#[derive(Debug, Serialize, ToSchema)]
pub(crate) struct ShowResponse {
    /// Always empty.
    pub modelfile: &'static str,
    /// Always empty.
    pub parameters: &'static str,
    /// Always empty: templates are not Ollama's.
    pub template: &'static str,
    /// What it is.
    pub details: Details,
    /// Facts by dotted names.
    #[schema(value_type = Object)]
    pub model_info: ModelFacts,
    /// What it can do.
    pub capabilities: Vec<&'static str>,
    /// When its file last changed.
    pub modified_at: String,
}

/// This server's version.
#[derive(Debug, Serialize, ToSchema)]
pub(crate) struct Version {
    /// The version.
    pub version: &'static str,
}

/// List of models
#[utoipa::path(get, path = "/api/tags", tag = "Ollama", responses((status = 200, body = TagList)))]
pub(crate) async fn tags(State(state): State<AppState>) -> axum::Json<TagList> {
    let registry = state.registry();
    let tag = |entry| tag(entry, registry.loaded(entry).as_ref());
    axum::Json(TagList { models: registry.entries().iter().map(tag).collect() })
}

/// List of models in memory
#[utoipa::path(get, path = "/api/ps", tag = "Ollama", responses((status = 200, body = TagList)))]
pub(crate) async fn ps(State(state): State<AppState>) -> axum::Json<TagList> {
    let registry = state.registry();
    let running = |entry| {
        let model = registry.loaded(entry)?;
        let mut tag = tag(entry, Some(&model));
        tag.size = model.memory().weights;
        tag.expires_at = Some(match entry.residency.remaining() {
            Some(remaining) => rfc3339(now() + remaining.as_secs(), 0),
            None => "9999-12-31T23:59:59Z".to_owned(),
        });
        tag.size_vram = Some(0);
        tag.context_length = Some(model.context_length());
        Some(tag)
    };
    axum::Json(TagList { models: registry.entries().iter().filter_map(running).collect() })
}

/// A model in detail
#[utoipa::path(post, path = "/api/show", tag = "Ollama", request_body = ShowRequest, responses(
    (status = 200, body = ShowResponse),
    (status = "4XX", body = crate::ollama::OllamaError),
))]
pub(crate) async fn show(
    State(state): State<AppState>,
    AnyJson(request): AnyJson<ShowRequest>,
) -> Result<axum::Json<ShowResponse>> {
    let name = request.model.or(request.name).unwrap_or_default();
    let registry = state.registry();
    let entry = registry.entry(&name)?;
    let model = registry.model(entry).await?;
    let config = model.config();
    let family = config.name.clone();
    let facts = [
        ("general.architecture", json!(family)),
        ("general.parameter_count", json!(model.get_total_weight_count())),
    ];
    let own = [
        ("context_length", json!(config.max_position_embeddings)),
        ("embedding_length", json!(config.hidden_size)),
        ("block_count", json!(config.num_hidden_layers)),
        ("attention.head_count", json!(config.num_attention_heads)),
        ("attention.head_count_kv", json!(config.num_key_value_heads)),
        ("vocab_size", json!(config.vocab_size)),
    ];
    let mut model_info: ModelFacts =
        facts.into_iter().map(|(name, fact)| (name.to_owned(), fact)).collect();
    model_info.extend(own.into_iter().map(|(name, fact)| (format!("{family}.{name}"), fact)));
    let capabilities = vec!["completion", "embedding"];
    Ok(axum::Json(ShowResponse {
        modelfile: "",
        parameters: "",
        template: "",
        details: details(Some(&model)),
        model_info,
        capabilities,
        modified_at: rfc3339(entry.created, 0),
    }))
}

/// Version
#[utoipa::path(get, path = "/api/version", tag = "Ollama", responses((status = 200, body = Version)))]
pub(crate) async fn version() -> axum::Json<Version> {
    axum::Json(Version { version: env!("CARGO_PKG_VERSION") })
}

fn tag(entry: &Entry, model: Option<&Model>) -> Tag {
    let file = std::fs::metadata(&entry.path).ok().filter(std::fs::Metadata::is_file);
    let size = file.map_or(0, |file| file.len());
    let facts = format!("{}\0{size}\0{}", entry.name, entry.created);
    let digest =
        Sha256::digest(facts.as_bytes()).iter().map(|byte| format!("{byte:02x}")).collect();
    Tag {
        name: entry.name.to_string(),
        model: entry.name.to_string(),
        modified_at: rfc3339(entry.created, 0),
        size,
        digest,
        details: details(model),
        expires_at: None,
        size_vram: None,
        context_length: None,
    }
}

fn details(model: Option<&Model>) -> Details {
    let family = model.map_or(String::new(), |model| model.config().name.clone());
    Details {
        parent_model: "",
        format: "gguf",
        families: if family.is_empty() { Vec::new() } else { vec![family.clone()] },
        family,
        parameter_size: model.map_or(String::new(), |m| short_count(m.get_total_weight_count())),
        quantization_level: "ternary",
    }
}

fn short_count(n: u64) -> String {
    let n = n as f64;
    match n {
        _ if n >= 1e9 => format!("{:.1}B", n / 1e9),
        _ if n >= 1e6 => format!("{:.1}M", n / 1e6),
        _ => format!("{:.1}K", n / 1e3),
    }
}

#[cfg(test)]
mod tests {
    use super::short_count;

    #[test]
    fn counts_are_short() {
        assert_eq!(short_count(2_412_820_480), "2.4B");
        assert_eq!(short_count(3_900_000), "3.9M");
        assert_eq!(short_count(1500), "1.5K");
    }
}

//! OpenAI's wire format.

pub(crate) mod chat;
pub(crate) mod chat_stream;
pub(crate) mod completions;
pub(crate) mod embeddings;
pub(crate) mod models;
pub(crate) mod responses;
pub(crate) mod responses_stream;
pub(crate) mod types;

use std::time::SystemTime;

/// Seconds since 1970, for `created`.
pub(crate) fn now() -> u64 {
    SystemTime::now().duration_since(SystemTime::UNIX_EPOCH).map_or(0, |d| d.as_secs())
}

/// What computes the answers: they may change with it.
pub(crate) const FINGERPRINT: &str = concat!("bitnet-", env!("CARGO_PKG_VERSION"));

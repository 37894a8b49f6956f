//! Where the log goes: standard error, as text for people or JSON for machines.
//!
//! The log names requests, routes, counts and times. It never holds prompts, answers or keys; what
//! comes from clients is either checked for harmless characters or not written at all.

use tracing_subscriber::EnvFilter;
use tracing_subscriber::filter::ParseError;
use tracing_subscriber::util::{SubscriberInitExt, TryInitError};

/// How log lines are written.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum LogFormat {
    /// For people.
    #[default]
    Text,
    /// One JSON object a line.
    Json,
}

/// Why the log could not be set up.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum LogError {
    /// The filter is not one.
    #[error("log filter: {0}")]
    Filter(#[from] ParseError),
    /// The process has a log already.
    #[error("log: {0}")]
    Taken(#[from] TryInitError),
}

/// Sets up the log of this process. `filter` is a level (`info`) or a list such as
/// `info,bitnet_server::access=off`.
///
/// # Errors
/// A filter that is none; a second call.
pub fn init_logging(format: LogFormat, filter: &str) -> Result<(), LogError> {
    let filter = EnvFilter::try_new(filter)?;
    let log = tracing_subscriber::fmt().with_env_filter(filter).with_writer(std::io::stderr);
    match format {
        LogFormat::Text => log.finish().try_init()?,
        LogFormat::Json => log.json().flatten_event(true).finish().try_init()?,
    }
    Ok(())
}

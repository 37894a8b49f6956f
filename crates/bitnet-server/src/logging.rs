//! Where the log goes: standard error, as text for people or JSON for machines.
//!
//! The log names requests, routes, counts and times. It never holds prompts, answers or keys; what
//! comes from clients is either checked for harmless characters or not written at all.

use tracing::Subscriber;
use tracing_subscriber::filter::ParseError;
use tracing_subscriber::layer::SubscriberExt as _;
use tracing_subscriber::registry::LookupSpan;
use tracing_subscriber::util::{SubscriberInitExt, TryInitError};
use tracing_subscriber::{EnvFilter, Layer};

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
    /// Spans cannot be sent.
    #[cfg(feature = "otel")]
    #[error("traces: {0}")]
    Traces(String),
}

/// Sets up the log of this process. `filter` is a level (`info`) or a list such as
/// `info,bitnet_server::access=off`.
///
/// # Errors
/// A filter that is none; a second call.
pub fn init_logging(format: LogFormat, filter: &str) -> Result<(), LogError> {
    Ok(tracing_subscriber::registry().with(log_layer(format, filter)?).try_init()?)
}

/// Sets up the log as [`init_logging`] does, and sends a span for each request and generation to an
/// OpenTelemetry collector at `endpoint` (OTLP over HTTP), the base of whose address it is. The result
/// must be shut down at the end, or the last spans are lost.
///
/// # Errors
/// A filter or an address that is none; a second call.
#[cfg(feature = "otel")]
pub fn init_logging_and_traces(
    format: LogFormat,
    filter: &str,
    endpoint: &str,
) -> Result<crate::trace::Traces, LogError> {
    use tracing_subscriber::filter::filter_fn;
    let traces = crate::trace::Traces::new(endpoint)?;
    let spans = filter_fn(|metadata| metadata.target() == crate::trace::TARGET);
    tracing_subscriber::registry()
        .with(log_layer(format, filter)?)
        .with(traces.layer().with_filter(spans))
        .try_init()?;
    Ok(traces)
}

fn log_layer<S>(
    format: LogFormat,
    filter: &str,
) -> Result<Box<dyn Layer<S> + Send + Sync>, LogError>
where
    S: Subscriber + for<'a> LookupSpan<'a> + Send + Sync,
{
    // Spans are for traces; in the log they would repeat what its lines say.
    let without_spans = format!("{}=off", crate::trace::TARGET).parse()?;
    let filter = EnvFilter::try_new(filter)?.add_directive(without_spans);
    let log = tracing_subscriber::fmt::layer().with_writer(std::io::stderr);
    Ok(match format {
        LogFormat::Text => log.with_filter(filter).boxed(),
        LogFormat::Json => log.json().flatten_event(true).with_filter(filter).boxed(),
    })
}

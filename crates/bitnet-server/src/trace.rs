//! Spans for OpenTelemetry: one for each HTTP request, and one for each generation or embedding inside
//! it, under the names of its HTTP and GenAI conventions. They hold names, counts and settings, never
//! prompts, answers or keys. Where nobody listens, they cost nothing.

use axum::http::HeaderMap;
use bitnet_inference::GenerationOptions;
use tracing::Span;
use tracing::field::Empty;

/// The log leaves these spans out; traces hold nothing else.
pub(crate) const TARGET: &str = "bitnet_server::trace";

/// A request, as a child of the client's span if it sent one (`traceparent`).
pub(crate) fn request(method: &str, route: &str, headers: &HeaderMap) -> Span {
    let span = tracing::info_span!(
        target: TARGET,
        "request",
        "otel.name" = format!("{method} {route}"),
        "otel.kind" = "server",
        "http.request.method" = method,
        "http.route" = route,
        "http.response.status_code" = Empty,
        "error.type" = Empty,
    );
    #[cfg(feature = "otel")]
    adopt(&span, headers);
    #[cfg(not(feature = "otel"))]
    let _ = headers;
    span
}

/// Notes how a request was answered.
pub(crate) fn answered(span: &Span, status: u16, code: Option<&str>) {
    span.record("http.response.status_code", status);
    if status >= 500 {
        failed(span, code.unwrap_or("internal_error"));
    }
}

/// What a generation was asked to do; `operation` is the convention's name for it.
pub(crate) fn generation(
    operation: &str,
    model: &str,
    options: &GenerationOptions,
    n: usize,
) -> Span {
    tracing::info_span!(
        target: TARGET,
        "generation",
        "otel.name" = format!("{operation} {model}"),
        "gen_ai.operation.name" = operation,
        "gen_ai.provider.name" = "bitnet",
        "gen_ai.request.model" = model,
        "gen_ai.response.model" = model,
        "gen_ai.request.temperature" = f64::from(options.temperature),
        "gen_ai.request.top_p" = f64::from(options.top_p),
        "gen_ai.request.top_k" = options.top_k,
        "gen_ai.request.max_tokens" = options.max_tokens,
        "gen_ai.request.choice.count" = (n != 1).then_some(n),
        "gen_ai.request.seed" = options.seed,
        "gen_ai.usage.input_tokens" = Empty,
        "gen_ai.usage.output_tokens" = Empty,
        "error.type" = Empty,
    )
}

/// An embedding of texts.
pub(crate) fn embedding(model: &str) -> Span {
    tracing::info_span!(
        target: TARGET,
        "embedding",
        "otel.name" = format!("embeddings {model}"),
        "gen_ai.operation.name" = "embeddings",
        "gen_ai.provider.name" = "bitnet",
        "gen_ai.request.model" = model,
        "gen_ai.response.model" = model,
        "gen_ai.usage.input_tokens" = Empty,
    )
}

/// The first token is there.
pub(crate) fn first_token(span: &Span) {
    tracing::info!(target: TARGET, parent: span, "gen_ai.first_token");
}

/// Notes what a generation took and how its choices ended.
pub(crate) fn ended(
    span: &Span,
    input_tokens: usize,
    output_tokens: usize,
    reasons: &[&'static str],
) {
    span.record("gen_ai.usage.input_tokens", input_tokens);
    span.record("gen_ai.usage.output_tokens", output_tokens);
    #[cfg(feature = "otel")]
    {
        use opentelemetry::{Array, StringValue, Value};
        use tracing_opentelemetry::OpenTelemetrySpanExt;
        let reasons = reasons.iter().map(|&reason| StringValue::from(reason)).collect();
        span.set_attribute("gen_ai.response.finish_reasons", Value::Array(Array::String(reasons)));
    }
    #[cfg(not(feature = "otel"))]
    let _ = reasons;
}

/// Notes that a span's work failed.
pub(crate) fn failed(span: &Span, kind: &str) {
    span.record("error.type", kind);
    #[cfg(feature = "otel")]
    {
        use tracing_opentelemetry::OpenTelemetrySpanExt;
        span.set_status(opentelemetry::trace::Status::error(kind.to_owned()));
    }
}

#[cfg(feature = "otel")]
pub use exporter::Traces;
#[cfg(feature = "otel")]
pub(crate) use exporter::adopt;

#[cfg(feature = "otel")]
mod exporter {
    //! Where spans go.

    use axum::http::HeaderMap;
    use opentelemetry::propagation::{Extractor, TextMapPropagator};
    use opentelemetry::trace::TracerProvider;
    use opentelemetry_otlp::{Protocol, SpanExporter, WithExportConfig};
    use opentelemetry_sdk::Resource;
    use opentelemetry_sdk::propagation::TraceContextPropagator;
    use opentelemetry_sdk::trace::SdkTracerProvider;
    use tracing::{Span, Subscriber};
    use tracing_opentelemetry::{OpenTelemetryLayer, OpenTelemetrySpanExt};
    use tracing_subscriber::registry::LookupSpan;

    use crate::logging::LogError;

    /// Sends spans to a collector from a thread of its own.
    #[derive(Debug)]
    pub struct Traces(SdkTracerProvider);

    impl Traces {
        /// Spans go to `endpoint`, the base of an OTLP collector such as `http://127.0.0.1:4318`. The
        /// resource is what `OTEL_RESOURCE_ATTRIBUTES` says, the service `OTEL_SERVICE_NAME` or `bitnet`.
        pub(crate) fn new(endpoint: &str) -> Result<Self, LogError> {
            let exporter = SpanExporter::builder()
                .with_http()
                .with_protocol(Protocol::HttpBinary)
                .with_endpoint(format!("{}/v1/traces", endpoint.trim_end_matches('/')))
                .build()
                .map_err(|error| LogError::Traces(error.to_string()))?;
            let name = std::env::var("OTEL_SERVICE_NAME").ok().filter(|name| !name.is_empty());
            let resource = Resource::builder().with_service_name(name.unwrap_or("bitnet".into()));
            let provider = SdkTracerProvider::builder()
                .with_batch_exporter(exporter)
                .with_resource(resource.build());
            Ok(Self(provider.build()))
        }

        pub(crate) fn layer<S>(&self) -> OpenTelemetryLayer<S, opentelemetry_sdk::trace::SdkTracer>
        where
            S: Subscriber + for<'a> LookupSpan<'a>,
        {
            tracing_opentelemetry::layer()
                .with_tracer(self.0.tracer("bitnet-server"))
                .with_location(false)
                .with_threads(false)
                .with_tracked_inactivity(false)
                .with_level(false)
        }

        /// Sends what is left; blocks until the collector has it or the exporter gives up.
        ///
        /// # Errors
        /// The collector does not take it.
        pub fn shutdown(self) -> Result<(), LogError> {
            self.0.shutdown().map_err(|error| LogError::Traces(error.to_string()))
        }
    }

    /// Makes a span a child of the one the client names in its headers.
    pub(crate) fn adopt(span: &Span, headers: &HeaderMap) {
        struct Headers<'a>(&'a HeaderMap);
        impl Extractor for Headers<'_> {
            fn get(&self, key: &str) -> Option<&str> {
                self.0.get(key)?.to_str().ok()
            }

            fn keys(&self) -> Vec<&str> {
                self.0.keys().map(|name| name.as_str()).collect()
            }
        }
        if headers.contains_key("traceparent") {
            // Fails where no traces are recorded: then there is nothing to be a child of.
            let _ = span.set_parent(TraceContextPropagator::new().extract(&Headers(headers)));
        }
    }
}

//! What can go wrong for a client, and how each wire format says it.
//!
//! Handlers return [`ApiError`]; the outermost middleware writes the body in the dialect of the path
//! asked for, so that errors from authentication or routing speak it too. Messages name fields,
//! ranges and counts; they never contain paths of the server or prompts.

use axum::body::Body;
use axum::http::{HeaderValue, StatusCode, header};
use axum::response::{IntoResponse, Response};
use bitnet_inference::InferenceError;
use serde_json::{Value, json};

/// An error a client is told about.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{message}")]
pub struct ApiError {
    /// HTTP status.
    pub status: StatusCode,
    /// What happened, for people.
    pub message: String,
    /// The field of the request that caused it, such as `messages[0].content`.
    pub param: Option<String>,
    /// A stable name for programs, such as `context_length_exceeded`.
    pub code: Option<&'static str>,
    /// Seconds after which trying again makes sense.
    pub retry_after: Option<u32>,
}

/// `Result` with [`ApiError`].
pub type Result<T, E = ApiError> = std::result::Result<T, E>;

impl ApiError {
    /// An error with a status and a message only.
    pub fn new(status: StatusCode, message: impl Into<String>) -> Self {
        Self { status, message: message.into(), param: None, code: None, retry_after: None }
    }

    /// A field of the request that cannot be accepted.
    pub fn field(param: impl Into<String>, message: impl Into<String>) -> Self {
        Self { param: Some(param.into()), ..Self::new(StatusCode::BAD_REQUEST, message) }
    }

    /// A field that exists elsewhere but that this server does not act on.
    pub fn unsupported(param: impl Into<String>, why: &str) -> Self {
        let param = param.into();
        let message = format!("`{param}` is not supported: {why}");
        Self { code: Some("unsupported_parameter"), ..Self::field(param, message) }
    }

    /// A value outside what `param` accepts.
    pub fn invalid(param: impl Into<String>, expected: &str, got: impl std::fmt::Display) -> Self {
        let param = param.into();
        let message = format!("`{param}`: expected {expected}, got {got}");
        Self { code: Some("invalid_value"), ..Self::field(param, message) }
    }

    /// A bug of the server; the details go to the log, not to the client.
    pub fn internal() -> Self {
        let message = "the server failed while it handled this request";
        Self::new(StatusCode::INTERNAL_SERVER_ERROR, message).code("internal_error")
    }

    /// Sets [`code`](Self::code).
    #[must_use]
    pub fn code(mut self, code: &'static str) -> Self {
        self.code = Some(code);
        self
    }

    /// Sets [`retry_after`](Self::retry_after).
    #[must_use]
    pub fn retry_after(mut self, seconds: u32) -> Self {
        self.retry_after = Some(seconds);
        self
    }

    /// OpenAI's name for the class of this error.
    pub fn kind(&self) -> &'static str {
        match self.status.as_u16() {
            401 => "authentication_error",
            403 => "permission_error",
            404 => "not_found_error",
            429 => "rate_limit_error",
            503 => "unavailable_error",
            504 => "timeout_error",
            400..=499 => "invalid_request_error",
            _ => "server_error",
        }
    }

    /// The body in a dialect; `request_id` appears where the dialect has a place for it.
    pub fn body(&self, dialect: Dialect, request_id: &str) -> Value {
        match dialect {
            Dialect::OpenAi => json!({"error": {
                "message": self.message,
                "type": self.kind(),
                "param": self.param,
                "code": self.code,
            }}),
            Dialect::Anthropic => json!({
                "type": "error",
                "error": {"type": self.anthropic_kind(), "message": self.message},
                "request_id": request_id,
            }),
            Dialect::Ollama => json!({"error": self.message}),
        }
    }

    fn anthropic_kind(&self) -> &'static str {
        match self.status.as_u16() {
            401 => "authentication_error",
            403 => "permission_error",
            404 => "not_found_error",
            413 => "request_too_large",
            429 => "rate_limit_error",
            503 => "overloaded_error",
            504 => "timeout_error",
            400..=499 => "invalid_request_error",
            _ => "api_error",
        }
    }
}

/// Whose wire format a path speaks.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Dialect {
    /// Everything that is not one of the others.
    OpenAi,
    /// `/v1/messages…`
    Anthropic,
    /// `/api/…`
    Ollama,
}

impl Dialect {
    /// The dialect of a request path.
    pub fn of_path(path: &str) -> Self {
        if path == "/v1/messages" || path.starts_with("/v1/messages/") {
            Self::Anthropic
        } else if path.starts_with("/api/") {
            Self::Ollama
        } else {
            Self::OpenAi
        }
    }
}

impl IntoResponse for ApiError {
    /// An empty response that carries the error; the outermost middleware writes its body.
    fn into_response(self) -> Response {
        let mut response = self.status.into_response();
        response.extensions_mut().insert(self);
        response
    }
}

/// Writes the body of a response that carries an [`ApiError`].
pub(crate) fn render(error: &ApiError, dialect: Dialect, request_id: &str) -> Response {
    let body = error.body(dialect, request_id).to_string();
    let mut response = Response::new(Body::from(body));
    *response.status_mut() = error.status;
    let headers = response.headers_mut();
    headers.insert(header::CONTENT_TYPE, HeaderValue::from_static("application/json"));
    if let Some(seconds) = error.retry_after {
        headers.insert(header::RETRY_AFTER, HeaderValue::from(seconds));
    }
    if error.status == StatusCode::UNAUTHORIZED {
        headers.insert(header::WWW_AUTHENTICATE, HeaderValue::from_static("Bearer"));
    }
    response
}

impl From<InferenceError> for ApiError {
    fn from(error: InferenceError) -> Self {
        match error {
            InferenceError::Input { field, expected, got } => {
                let too_long = field == "prompt" && expected.starts_with("at most");
                let error = Self::invalid(field, &expected, got);
                if too_long { error.code("context_length_exceeded") } else { error }
            }
            InferenceError::Concurrency { reason } if reason.contains("waiting") => {
                Self::new(StatusCode::TOO_MANY_REQUESTS, reason).code("queue_full").retry_after(1)
            }
            InferenceError::Memory { .. } | InferenceError::Resource { .. } => {
                tracing::warn!(error = %error, "a request found no memory or resource");
                let message = "the server has no memory or threads left for this request";
                Self::new(StatusCode::SERVICE_UNAVAILABLE, message)
                    .code("insufficient_resources")
                    .retry_after(5)
            }
            InferenceError::Model { .. } => {
                // The message may name a path of this machine: to the log only.
                tracing::warn!(error = %chain(&error), "a model cannot do what was asked");
                let message = "the model could not be loaded, or lacks what this request needs";
                Self::new(StatusCode::SERVICE_UNAVAILABLE, message).code("model_unavailable")
            }
            other => {
                tracing::error!(error = %chain(&other), "the engine failed");
                Self::internal()
            }
        }
    }
}

/// An error and its causes on one line.
pub(crate) fn chain(error: &dyn std::error::Error) -> String {
    let mut text = error.to_string();
    let mut source = error.source();
    while let Some(cause) = source {
        text.push_str(": ");
        text.push_str(&cause.to_string());
        source = cause.source();
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn openai_errors_have_all_four_fields() {
        let body = ApiError::new(StatusCode::NOT_FOUND, "no").body(Dialect::OpenAi, "r");
        let error = body["error"].as_object().unwrap();
        let fields: Vec<&str> = error.keys().map(String::as_str).collect();
        assert_eq!(fields, ["message", "type", "param", "code"]);
        assert!(error["param"].is_null() && error["code"].is_null());
    }

    #[test]
    fn each_path_has_its_dialect() {
        assert_eq!(Dialect::of_path("/v1/messages"), Dialect::Anthropic);
        assert_eq!(Dialect::of_path("/v1/messages/count_tokens"), Dialect::Anthropic);
        assert_eq!(Dialect::of_path("/v1/messagesque"), Dialect::OpenAi);
        assert_eq!(Dialect::of_path("/api/chat"), Dialect::Ollama);
        assert_eq!(Dialect::of_path("/v1/models"), Dialect::OpenAi);
    }

    #[test]
    fn a_prompt_that_is_too_long_has_its_own_code() {
        let error = InferenceError::input("prompt", "at most 8 tokens", "9 tokens");
        let error = ApiError::from(error);
        assert_eq!(error.code, Some("context_length_exceeded"));
        assert_eq!(error.status, StatusCode::BAD_REQUEST);
    }

    #[test]
    fn model_errors_do_not_tell_paths() {
        let error = InferenceError::model_lacks("/srv/secret/model.gguf", "a tokenizer");
        assert!(!ApiError::from(error).message.contains("secret"));
    }
}

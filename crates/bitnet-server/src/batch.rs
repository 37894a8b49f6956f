//! OpenAI's batch format: a line of a file is a request, and so is its answer.
//!
//! Each line goes through the same routes a client would call, without a network between: whatever
//! the server accepts, refuses or bounds is the same here. Knows single lines; files belong to the
//! caller.

use std::time::Duration;

use axum::Router;
use axum::body::Body;
use axum::http::{Request, StatusCode, header};
use http_body_util::BodyExt;
use serde::Deserialize;
use serde_json::{Value, json};
use tower::ServiceExt;

use crate::middleware::{REQUEST_ID, random_id};
use crate::state::AppState;

/// What a line may ask for.
const URLS: [&str; 4] =
    ["/v1/chat/completions", "/v1/completions", "/v1/embeddings", "/v1/responses"];
/// Pause before a request that found the queue full is sent again.
const RETRY: Duration = Duration::from_millis(200);

/// Answers lines of a batch.
#[derive(Clone)]
pub struct BatchLines(Router);

/// The answer to one line.
#[derive(Debug, Clone, PartialEq)]
pub struct BatchAnswer {
    /// The line for the output, without its line break.
    pub line: String,
    /// Whether the request was answered with success.
    pub is_success: bool,
    /// Tokens generated for it.
    pub completion_tokens: u64,
}

/// A line of the input.
#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct Line {
    custom_id: String,
    method: String,
    url: String,
    body: Value,
}

impl BatchLines {
    /// Answers with the models and limits of `state`. No key may be asked for there.
    pub fn new(state: AppState) -> Self {
        Self(crate::router(state))
    }

    /// The answer to a line. A line that is no request is answered with its error, as is a request
    /// that the server refuses; this never fails. Dropping the future cancels the request.
    pub async fn answer(&self, line: &[u8]) -> BatchAnswer {
        match read(line) {
            Ok(line) => self.send(line).await,
            Err((custom_id, message)) => refusal(custom_id.as_deref(), &message),
        }
    }

    async fn send(&self, line: Line) -> BatchAnswer {
        let body = line.body.to_string();
        loop {
            let request = Request::post(&line.url)
                .header(header::HOST, "localhost")
                .header(header::CONTENT_TYPE, "application/json")
                .body(Body::from(body.clone()));
            let Ok(request) = request else {
                return refusal(Some(&line.custom_id), "`url` is no path");
            };
            let Ok(response) = self.0.clone().oneshot(request).await;
            let status = response.status();
            if status == StatusCode::TOO_MANY_REQUESTS {
                tokio::time::sleep(RETRY).await; // Requests before it will end.
                continue;
            }
            let request_id = response.headers().get(REQUEST_ID).cloned();
            let bytes = response.into_body().collect().await.map(|body| body.to_bytes());
            let bytes = bytes.unwrap_or_default();
            let Ok(body) = serde_json::from_slice::<Value>(&bytes) else {
                return refusal(Some(&line.custom_id), "the server gave no JSON");
            };
            let tokens = ["completion_tokens", "output_tokens"];
            let completion_tokens =
                tokens.iter().find_map(|name| body["usage"][name].as_u64()).unwrap_or(0);
            let answer = json!({
                "id": random_id("batch_req_"),
                "custom_id": line.custom_id,
                "response": {
                    "status_code": status.as_u16(),
                    "request_id": request_id.as_ref().and_then(|id| id.to_str().ok()),
                    "body": body,
                },
                "error": null,
            });
            let is_success = status.is_success();
            return BatchAnswer { line: answer.to_string(), is_success, completion_tokens };
        }
    }
}

impl std::fmt::Debug for BatchLines {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("BatchLines").finish_non_exhaustive()
    }
}

/// The request of a line, or its id if it has one and what is wrong with it.
fn read(line: &[u8]) -> Result<Line, (Option<String>, String)> {
    let value: Value =
        serde_json::from_slice(line).map_err(|e| (None, format!("the line is no JSON: {e}")))?;
    let id = value.get("custom_id").and_then(Value::as_str).map(str::to_owned);
    let line: Line = serde_json::from_value(value).map_err(|e| (id.clone(), e.to_string()))?;
    let wrong = |message: String| Err((id.clone(), message));
    if line.method != "POST" {
        return wrong("`method`: expected \"POST\"".into());
    }
    if !URLS.contains(&line.url.as_str()) {
        return wrong(format!("`url`: expected one of {}", URLS.join(", ")));
    }
    if line.body.get("stream").is_some_and(|stream| *stream == json!(true)) {
        return wrong("`body.stream`: a batch cannot stream".into());
    }
    Ok(line)
}

fn refusal(custom_id: Option<&str>, message: &str) -> BatchAnswer {
    let answer = json!({
        "id": random_id("batch_req_"),
        "custom_id": custom_id,
        "response": null,
        "error": {"code": "invalid_request", "message": message},
    });
    BatchAnswer { line: answer.to_string(), is_success: false, completion_tokens: 0 }
}

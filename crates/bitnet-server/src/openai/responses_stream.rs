//! Responses, whole and as events.
//!
//! `response.created`, `response.in_progress`; for each item `output_item.added`, its content, and
//! `output_item.done`; at the end the whole response once more. Every event is numbered.

use bitnet_inference::{FinishReason, Model};
use serde_json::{Value, json};
use utoipa::ToSchema;

use super::chat_stream::token_logprob;
use super::now;
use crate::error::{ApiError, Result};
use crate::middleware::random_id;
use crate::run::{End, Run, RunEvent};
use crate::stream::{Encoder, Frames};
use crate::tools::{ToolEvent, ToolScanner};

/// A response, for the OpenAPI document; the object itself repeats the request and is built as JSON.
#[derive(ToSchema)]
#[allow(dead_code)] // Read by the derive only.
pub(crate) struct ResponseBody {
    /// Its id; nothing can be fetched by it.
    id: String,
    /// Always `response`.
    object: String,
    /// Seconds since 1970.
    created_at: u64,
    /// `in_progress`, `completed`, `incomplete` or `failed`.
    status: String,
    /// The model that answered.
    model: String,
    /// Messages and calls of functions.
    #[schema(value_type = Vec<Object>)]
    output: Vec<Value>,
    /// What went wrong.
    #[schema(required, value_type = Option<Object>)]
    error: Option<Value>,
    /// Why it is not complete.
    #[schema(required, value_type = Option<Object>)]
    incomplete_details: Option<Value>,
    /// What it took; null until the end.
    #[schema(required, value_type = Option<Object>)]
    usage: Option<Value>,
}

/// Writes one response.
pub(crate) struct ResponseEncoder {
    /// The response object as it will be, without what is not known yet.
    frame: Value,
    model: Model,
    with_logprobs: bool,
    scanner: ToolScanner,
    n_events: u64,
    started: bool,
    /// Items that are whole.
    output: Vec<Value>,
    open: Option<Item>,
    /// Probabilities of tokens whose text has not appeared yet.
    logprobs: Vec<Value>,
    end: Option<End>,
}

/// The item being written.
enum Item {
    Message { id: String, text: String, logprobs: Vec<Value> },
    Call { id: String, call_id: String, name: String, arguments: String },
}

impl Item {
    fn value(&self, status: &str) -> Value {
        match self {
            Self::Message { id, text, logprobs } => {
                let content = match status {
                    "in_progress" => json!([]),
                    _ => json!([text_part(text, logprobs)]),
                };
                json!({"id": id, "type": "message", "role": "assistant", "status": status, "content": content})
            }
            Self::Call { id, call_id, name, arguments } => json!({
                "id": id, "type": "function_call", "status": status,
                "call_id": call_id, "name": name, "arguments": arguments,
            }),
        }
    }
}

fn text_part(text: &str, logprobs: &[Value]) -> Value {
    json!({"type": "output_text", "text": text, "annotations": [], "logprobs": logprobs})
}

impl ResponseEncoder {
    pub(crate) fn new(
        frame: Value,
        run: &Run,
        tools: Vec<String>,
        max_calls: usize,
        with_logprobs: bool,
    ) -> Self {
        Self {
            frame,
            model: run.model().clone(),
            with_logprobs,
            scanner: ToolScanner::new(tools, max_calls),
            n_events: 0,
            started: false,
            output: Vec::new(),
            open: None,
            logprobs: Vec::new(),
            end: None,
        }
    }

    /// Waits for the whole response instead.
    pub(crate) async fn collect(mut self, mut run: Run) -> Result<Value> {
        let mut unsent = Frames::default();
        while let Some(event) = run.next().await {
            self.event(event?, &mut unsent);
            unsent.clear();
        }
        self.close_item(&mut unsent);
        Ok(self.response())
    }

    /// The response object as it is now.
    fn response(&self) -> Value {
        let mut response = self.frame.clone();
        response["output"] = Value::Array(self.output.clone());
        let Some(End { reason, usage, .. }) = &self.end else { return response };
        let status = match reason {
            FinishReason::Stop => "completed",
            FinishReason::Length => "incomplete",
        };
        response["status"] = json!(status);
        match reason {
            FinishReason::Stop => response["completed_at"] = json!(now()),
            FinishReason::Length => {
                response["incomplete_details"] = json!({"reason": "max_output_tokens"});
            }
        }
        response["usage"] = json!({
            "input_tokens": usage.prompt_tokens,
            "input_tokens_details": {"cached_tokens": usage.cached_tokens, "cache_write_tokens": 0},
            "output_tokens": usage.completion_tokens,
            "output_tokens_details": {"reasoning_tokens": 0},
            "total_tokens": usage.prompt_tokens + usage.completion_tokens,
        });
        response
    }

    fn send(&mut self, kind: &str, mut fields: Value, out: &mut Frames) {
        fields["type"] = json!(kind);
        fields["sequence_number"] = json!(self.n_events);
        self.n_events += 1;
        out.event(kind, &fields);
    }

    fn start(&mut self, out: &mut Frames) {
        if !std::mem::replace(&mut self.started, true) {
            for kind in ["response.created", "response.in_progress"] {
                let response = self.response();
                self.send(kind, json!({"response": response}), out);
            }
        }
    }

    fn open_item(&mut self, item: Item, out: &mut Frames) {
        self.close_item(out);
        let at = self.output.len();
        let added = json!({"output_index": at, "item": item.value("in_progress")});
        self.send("response.output_item.added", added, out);
        if let Item::Message { id, .. } = &item {
            let part = json!({
                "item_id": id, "output_index": at, "content_index": 0, "part": text_part("", &[]),
            });
            self.send("response.content_part.added", part, out);
        }
        self.open = Some(item);
    }

    fn close_item(&mut self, out: &mut Frames) {
        let Some(item) = self.open.take() else { return };
        let at = self.output.len();
        match &item {
            Item::Message { id, text, logprobs } => {
                let done = json!({
                    "item_id": id, "output_index": at, "content_index": 0,
                    "text": text, "logprobs": logprobs,
                });
                self.send("response.output_text.done", done, out);
                let part = json!({
                    "item_id": id, "output_index": at, "content_index": 0,
                    "part": text_part(text, logprobs),
                });
                self.send("response.content_part.done", part, out);
            }
            Item::Call { id, name, arguments, .. } => {
                let done = json!({
                    "item_id": id, "output_index": at, "name": name, "arguments": arguments,
                });
                self.send("response.function_call_arguments.done", done, out);
            }
        }
        let length = self.end.as_ref().is_some_and(|end| end.reason == FinishReason::Length);
        let value = item.value(if length { "incomplete" } else { "completed" });
        self.send("response.output_item.done", json!({"output_index": at, "item": value}), out);
        self.output.push(value);
    }

    fn send_event(&mut self, event: ToolEvent, out: &mut Frames) {
        let at = self.output.len();
        match event {
            ToolEvent::Text(delta) => {
                if !matches!(self.open, Some(Item::Message { .. })) {
                    let (id, text) = (random_id("msg_"), String::new());
                    self.open_item(Item::Message { id, text, logprobs: Vec::new() }, out);
                }
                let new_logprobs = std::mem::take(&mut self.logprobs);
                let Some(Item::Message { id, text, logprobs }) = &mut self.open else { return };
                text.push_str(&delta);
                logprobs.extend(new_logprobs.iter().cloned());
                let event = json!({
                    "item_id": id, "output_index": self.output.len(), "content_index": 0,
                    "delta": delta, "logprobs": new_logprobs,
                });
                self.send("response.output_text.delta", event, out);
            }
            ToolEvent::Call { name, .. } => {
                // The probabilities of a call's tokens have no place in the format.
                self.logprobs.clear();
                let (id, call_id) = (random_id("fc_"), random_id("call_"));
                self.open_item(Item::Call { id, call_id, name, arguments: String::new() }, out);
            }
            ToolEvent::Arguments { delta, .. } => {
                let Some(Item::Call { id, arguments, .. }) = &mut self.open else { return };
                arguments.push_str(&delta);
                let event = json!({"item_id": id, "output_index": at, "delta": delta});
                self.send("response.function_call_arguments.delta", event, out);
            }
        }
    }
}

impl Encoder for ResponseEncoder {
    fn event(&mut self, event: RunEvent, out: &mut Frames) {
        self.start(out);
        let mut events = Vec::new();
        match event {
            RunEvent::Chunk { chunk, .. } => {
                if let Some(token) = chunk.token.as_ref().filter(|_| self.with_logprobs) {
                    self.logprobs.push(json!(token_logprob(&self.model, token)));
                }
                self.scanner.push(&chunk.text, &mut events);
            }
            RunEvent::End { end, .. } => {
                self.scanner.finish(&mut events);
                self.end = Some(end);
            }
        }
        for event in events {
            self.send_event(event, out);
        }
    }

    fn finish(&mut self, out: &mut Frames) {
        self.close_item(out);
        let response = self.response();
        let kind = match self.end.as_ref().map(|end| end.reason) {
            Some(FinishReason::Length) => "response.incomplete",
            _ => "response.completed",
        };
        self.send(kind, json!({"response": response}), out);
    }

    fn error(&mut self, error: &ApiError, out: &mut Frames) {
        self.start(out);
        let mut response = self.response();
        response["status"] = json!("failed");
        response["error"] = json!({
            "code": error.code.unwrap_or("server_error"),
            "message": error.message,
        });
        self.send("response.failed", json!({"response": response}), out);
    }
}

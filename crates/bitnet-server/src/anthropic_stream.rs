//! Anthropic's answers, whole and as events.
//!
//! `message_start`; then for each block of content `content_block_start`, its `content_block_delta`s
//! and `content_block_stop`; then `message_delta` with the stop reason and usage, and `message_stop`.

use std::sync::Arc;

use serde::Serialize;
use serde_json::{Value, json};
use utoipa::ToSchema;

use crate::anthropic::stop_reason;
use crate::error::{ApiError, Dialect, Result};
use crate::middleware::random_id;
use crate::run::{End, Run, RunEvent};
use crate::stream::{Encoder, Frames};
use crate::tools::{ToolEvent, ToolScanner};

/// An answer.
#[derive(Debug, Serialize, ToSchema)]
pub(crate) struct MessageResponse {
    /// Its id.
    pub id: String,
    /// Always `message`.
    #[serde(rename = "type")]
    pub kind: &'static str,
    /// Always `assistant`.
    pub role: &'static str,
    /// The model that answered.
    #[schema(value_type = String)]
    pub model: Arc<str>,
    /// Text and calls of tools.
    pub content: Vec<AnswerBlock>,
    /// Why it ended: `end_turn`, `max_tokens`, `stop_sequence` or `tool_use`.
    #[schema(required)]
    pub stop_reason: Option<&'static str>,
    /// The stop sequence that was met.
    #[schema(required)]
    pub stop_sequence: Option<String>,
    /// What it took.
    pub usage: MessageUsage,
}

/// A block of an answer.
#[derive(Debug, Serialize, ToSchema)]
#[serde(tag = "type", rename_all = "snake_case")]
pub(crate) enum AnswerBlock {
    /// Text.
    Text {
        /// The text.
        text: String,
        /// Always null.
        #[schema(required, value_type = Option<Vec<Object>>)]
        citations: Option<()>,
    },
    /// A call of a tool.
    ToolUse {
        /// To be repeated in the tool's result.
        id: String,
        /// The tool.
        name: String,
        /// Its arguments.
        #[schema(value_type = Object)]
        input: Value,
    },
}

/// What an answer took.
#[derive(Debug, Clone, Copy, Default, Serialize, ToSchema)]
pub(crate) struct MessageUsage {
    /// Tokens of the prompt that were computed.
    pub input_tokens: usize,
    /// Tokens generated.
    pub output_tokens: usize,
    /// Tokens of the prompt that were taken from the prefix cache.
    pub cache_read_input_tokens: usize,
    /// Always 0: writing to the cache costs nothing.
    pub cache_creation_input_tokens: usize,
}

impl MessageUsage {
    fn of(end: &End) -> Self {
        Self {
            input_tokens: end.usage.prompt_tokens - end.usage.cached_tokens,
            output_tokens: end.usage.completion_tokens,
            cache_read_input_tokens: end.usage.cached_tokens,
            cache_creation_input_tokens: 0,
        }
    }
}

/// Writes one answer.
pub(crate) struct MessageEncoder {
    id: String,
    model: Arc<str>,
    request_id: Arc<str>,
    scanner: ToolScanner,
    n_prompt_tokens: usize,
    started: bool,
    /// Blocks begun, and whether the last is open and what it is.
    n_blocks: usize,
    open: Option<Open>,
    end: Option<End>,
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum Open {
    Text,
    Call,
}

impl MessageEncoder {
    pub(crate) fn new(
        run: &Run,
        tools: Vec<String>,
        max_calls: usize,
        request_id: &Arc<str>,
    ) -> Self {
        Self {
            id: random_id("msg_"),
            model: run.model_name().clone(),
            request_id: request_id.clone(),
            scanner: ToolScanner::new(tools, max_calls),
            n_prompt_tokens: run.n_prompt_tokens(),
            started: false,
            n_blocks: 0,
            open: None,
            end: None,
        }
    }

    /// Waits for the whole answer instead.
    pub(crate) async fn collect(mut self, run: Run) -> Result<MessageResponse> {
        let finished = run.collect().await?.into_iter().next().ok_or_else(ApiError::internal)?;
        let mut events = Vec::new();
        self.scanner.push(&finished.text, &mut events);
        self.scanner.finish(&mut events);
        let mut content = Vec::new();
        let mut arguments = Vec::new();
        for event in events {
            match event {
                ToolEvent::Text(text) => content.push(AnswerBlock::Text { text, citations: None }),
                ToolEvent::Call { name, .. } => {
                    arguments.push((content.len(), String::new()));
                    let id = random_id("toolu_");
                    content.push(AnswerBlock::ToolUse { id, name, input: json!({}) });
                }
                ToolEvent::Arguments { index, delta } => arguments[index].1.push_str(&delta),
            }
        }
        for (at, text) in arguments {
            if let AnswerBlock::ToolUse { input, .. } = &mut content[at] {
                // Arguments cut off by the end of the context stay empty.
                *input = serde_json::from_str(&text).unwrap_or_else(|_| json!({}));
            }
        }
        let end = finished.end;
        let calls = self.scanner.n_calls() > 0;
        Ok(MessageResponse {
            id: self.id,
            kind: "message",
            role: "assistant",
            model: self.model,
            content,
            stop_reason: Some(stop_reason(end.reason, calls, end.stop_string.is_some())),
            usage: MessageUsage::of(&end),
            stop_sequence: end.stop_string,
        })
    }

    fn start(&mut self, out: &mut Frames) {
        if std::mem::replace(&mut self.started, true) {
            return;
        }
        // How much of the prompt was cached is known at the end; `message_delta` tells.
        let usage = MessageUsage { input_tokens: self.n_prompt_tokens, ..MessageUsage::default() };
        let message = MessageResponse {
            id: self.id.clone(),
            kind: "message",
            role: "assistant",
            model: self.model.clone(),
            content: Vec::new(),
            stop_reason: None,
            stop_sequence: None,
            usage,
        };
        out.event("message_start", &json!({"type": "message_start", "message": message}));
    }

    fn close_block(&mut self, out: &mut Frames) {
        if self.open.take().is_some() {
            let index = self.n_blocks - 1;
            out.event("content_block_stop", &json!({"type": "content_block_stop", "index": index}));
        }
    }

    fn open_block(&mut self, open: Open, block: Value, out: &mut Frames) {
        self.close_block(out);
        let start =
            json!({"type": "content_block_start", "index": self.n_blocks, "content_block": block});
        out.event("content_block_start", &start);
        self.n_blocks += 1;
        self.open = Some(open);
    }

    fn delta(&self, delta: Value, out: &mut Frames) {
        let index = self.n_blocks - 1;
        let event = json!({"type": "content_block_delta", "index": index, "delta": delta});
        out.event("content_block_delta", &event);
    }

    fn send(&mut self, events: Vec<ToolEvent>, out: &mut Frames) {
        for event in events {
            match event {
                ToolEvent::Text(text) => {
                    if self.open != Some(Open::Text) {
                        self.open_block(Open::Text, json!({"type": "text", "text": ""}), out);
                    }
                    self.delta(json!({"type": "text_delta", "text": text}), out);
                }
                ToolEvent::Call { name, .. } => {
                    let id = random_id("toolu_");
                    let block = json!({"type": "tool_use", "id": id, "name": name, "input": {}});
                    self.open_block(Open::Call, block, out);
                }
                ToolEvent::Arguments { delta, .. } => {
                    self.delta(json!({"type": "input_json_delta", "partial_json": delta}), out);
                }
            }
        }
    }
}

impl Encoder for MessageEncoder {
    fn event(&mut self, event: RunEvent, out: &mut Frames) {
        self.start(out);
        let mut events = Vec::new();
        match event {
            RunEvent::Chunk { chunk, .. } => self.scanner.push(&chunk.text, &mut events),
            RunEvent::End { end, .. } => {
                self.scanner.finish(&mut events);
                self.end = Some(end);
            }
        }
        self.send(events, out);
    }

    fn finish(&mut self, out: &mut Frames) {
        self.close_block(out);
        let Some(end) = &self.end else { return };
        let calls = self.scanner.n_calls() > 0;
        let reason = stop_reason(end.reason, calls, end.stop_string.is_some());
        let delta = json!({"stop_reason": reason, "stop_sequence": end.stop_string});
        let usage = MessageUsage::of(end);
        let event = json!({"type": "message_delta", "delta": delta, "usage": usage});
        out.event("message_delta", &event);
        out.event("message_stop", &json!({"type": "message_stop"}));
    }

    fn error(&mut self, error: &ApiError, out: &mut Frames) {
        out.event("error", &error.body(Dialect::Anthropic, &self.request_id));
    }

    fn ping(&mut self, out: &mut Frames) {
        out.event("ping", &json!({"type": "ping"}));
    }
}

//! Ollama's answers: one JSON object, or one a line.

use std::time::{Instant, SystemTime};

use bitnet_inference::FinishReason;
use serde::Serialize;
use utoipa::ToSchema;

use crate::error::{ApiError, Dialect, Result};
use crate::ollama::{OllamaCall, OllamaFunction};
use crate::run::{End, Run, RunEvent};
use crate::stream::{Encoder, Frames};
use crate::tools::{ToolEvent, ToolScanner};

/// Which of the two requests is answered.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Kind {
    /// `/api/generate`
    Generate,
    /// `/api/chat`
    Chat,
}

/// A line of an answer, or all of it.
#[derive(Debug, Serialize, ToSchema)]
pub(crate) struct Line {
    /// The model that answers.
    pub model: String,
    /// When this line was written.
    pub created_at: String,
    /// Of a chat: the message or the next piece of it.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub message: Option<LineMessage>,
    /// Of a generation: the text or the next piece of it.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub response: Option<String>,
    /// Whether this is the end.
    pub done: bool,
    /// At the end: why; `stop`, `length`, `load` or `unload`.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub done_reason: Option<&'static str>,
    /// At the end: what it took.
    #[serde(flatten)]
    #[schema(value_type = Took)]
    pub took: Option<Took>,
}

/// A message or a piece of it.
#[derive(Debug, Serialize, ToSchema)]
pub(crate) struct LineMessage {
    /// Always `assistant`.
    pub role: &'static str,
    /// Its text.
    pub content: String,
    /// Calls of tools, each whole.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub tool_calls: Vec<OllamaCall>,
}

/// What an answer took, at its end; times in nanoseconds.
#[derive(Debug, Serialize, ToSchema)]
pub(crate) struct Took {
    /// The whole request.
    #[schema(required = false)]
    pub total_duration: u64,
    /// Loading the model and waiting for its turn.
    #[schema(required = false)]
    pub load_duration: u64,
    /// Tokens of the prompt.
    #[schema(required = false)]
    pub prompt_eval_count: usize,
    /// Computing the prompt.
    #[schema(required = false)]
    pub prompt_eval_duration: u64,
    /// Tokens generated.
    #[schema(required = false)]
    pub eval_count: usize,
    /// Generating them.
    #[schema(required = false)]
    pub eval_duration: u64,
}

/// Writes one answer.
pub(crate) struct LineEncoder {
    kind: Kind,
    model: String,
    arrived: Instant,
    scanner: ToolScanner,
    /// A call whose arguments are not whole yet.
    call: Option<(String, String)>,
    end: Option<End>,
}

impl LineEncoder {
    pub(crate) fn new(
        kind: Kind,
        model: String,
        arrived: Instant,
        tools: Vec<String>,
        max_calls: usize,
    ) -> Self {
        let scanner = ToolScanner::new(tools, max_calls);
        Self { kind, model, arrived, scanner, call: None, end: None }
    }

    /// Waits for the whole answer instead.
    pub(crate) async fn collect(mut self, run: Run) -> Result<Line> {
        let finished = run.collect().await?.into_iter().next().ok_or_else(ApiError::internal)?;
        let mut events = Vec::new();
        self.scanner.push(&finished.text, &mut events);
        self.scanner.finish(&mut events);
        let (text, mut calls) = self.take(events);
        calls.extend(self.take_call());
        self.end = Some(finished.end);
        Ok(self.last_line(text, calls))
    }

    /// The text and the calls that are whole.
    fn take(&mut self, events: Vec<ToolEvent>) -> (String, Vec<OllamaCall>) {
        let (mut text, mut calls) = (String::new(), Vec::new());
        for event in events {
            match event {
                ToolEvent::Text(more) => text.push_str(&more),
                ToolEvent::Call { name, .. } => {
                    calls.extend(self.take_call());
                    self.call = Some((name, String::new()));
                }
                ToolEvent::Arguments { delta, .. } => {
                    if let Some((_, arguments)) = &mut self.call {
                        arguments.push_str(&delta);
                    }
                }
            }
        }
        (text, calls)
    }

    /// The open call, if its arguments are whole.
    fn take_call(&mut self) -> Option<OllamaCall> {
        let (name, arguments) = self.call.take()?;
        let arguments = serde_json::from_str(&arguments).ok()?;
        Some(OllamaCall { function: OllamaFunction { name, arguments } })
    }

    fn line(&self, text: String, calls: Vec<OllamaCall>) -> Line {
        let (message, response) = match self.kind {
            Kind::Chat => {
                let message = LineMessage { role: "assistant", content: text, tool_calls: calls };
                (Some(message), None)
            }
            Kind::Generate => (None, Some(text)),
        };
        Line {
            model: self.model.clone(),
            created_at: timestamp(),
            message,
            response,
            done: false,
            done_reason: None,
            took: None,
        }
    }

    fn last_line(&self, text: String, calls: Vec<OllamaCall>) -> Line {
        let mut line = self.line(text, calls);
        line.done = true;
        let Some(End { reason, usage, .. }) = &self.end else { return line };
        line.done_reason = Some(match reason {
            FinishReason::Stop => "stop",
            FinishReason::Length => "length",
        });
        let total = self.arrived.elapsed();
        line.took = Some(Took {
            total_duration: total.as_nanos() as u64,
            load_duration: total.saturating_sub(usage.prefill + usage.decode).as_nanos() as u64,
            prompt_eval_count: usage.prompt_tokens,
            prompt_eval_duration: usage.prefill.as_nanos() as u64,
            eval_count: usage.completion_tokens,
            eval_duration: usage.decode.as_nanos() as u64,
        });
        line
    }
}

impl Encoder for LineEncoder {
    fn event(&mut self, event: RunEvent, out: &mut Frames) {
        let mut events = Vec::new();
        let mut ended = false;
        match event {
            RunEvent::Chunk { chunk, .. } => self.scanner.push(&chunk.text, &mut events),
            RunEvent::End { end, .. } => {
                self.scanner.finish(&mut events);
                self.end = Some(end);
                ended = true;
            }
        }
        let (text, mut calls) = self.take(events);
        if ended {
            calls.extend(self.take_call());
        }
        if !text.is_empty() || !calls.is_empty() {
            out.line(&self.line(text, calls));
        }
    }

    fn finish(&mut self, out: &mut Frames) {
        out.line(&self.last_line(String::new(), Vec::new()));
    }

    fn error(&mut self, error: &ApiError, out: &mut Frames) {
        out.line(&error.body(Dialect::Ollama, ""));
    }

    /// Nothing: every line must be an answer.
    fn ping(&mut self, _: &mut Frames) {}
}

/// What answers a request that only loads a model.
pub(crate) fn without_text(
    kind: Kind,
    model: &str,
    created_at: String,
    reason: &'static str,
) -> Line {
    let message = LineMessage { role: "assistant", content: String::new(), tool_calls: Vec::new() };
    Line {
        model: model.to_owned(),
        created_at,
        message: (kind == Kind::Chat).then_some(message),
        response: (kind == Kind::Generate).then(String::new),
        done: true,
        done_reason: Some(reason),
        took: None,
    }
}

/// Now, as RFC 3339 has it.
pub(crate) fn timestamp() -> String {
    let now = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH).unwrap_or_default();
    rfc3339(now.as_secs(), now.subsec_nanos())
}

/// A time in seconds and nanoseconds since 1970, as RFC 3339 has it.
pub(crate) fn rfc3339(seconds: u64, nanoseconds: u32) -> String {
    let (days, rest) = (seconds / 86_400, seconds % 86_400);
    // Days from 0000-03-01, so that the leap day ends a year; 400 years have 146,097 days.
    let days = days + 719_468;
    let (era, day_of_era) = (days / 146_097, days % 146_097);
    let year_of_era =
        (day_of_era - day_of_era / 1460 + day_of_era / 36_524 - day_of_era / 146_096) / 365;
    let day_of_year = day_of_era - (365 * year_of_era + year_of_era / 4 - year_of_era / 100);
    let month_from_march = (5 * day_of_year + 2) / 153;
    let day = day_of_year - (153 * month_from_march + 2) / 5 + 1;
    let month = if month_from_march < 10 { month_from_march + 3 } else { month_from_march - 9 };
    let year = era * 400 + year_of_era + u64::from(month <= 2);
    let (hour, minute, second) = (rest / 3600, rest / 60 % 60, rest % 60);
    format!("{year:04}-{month:02}-{day:02}T{hour:02}:{minute:02}:{second:02}.{nanoseconds:09}Z")
}

#[cfg(test)]
mod tests {
    use super::rfc3339;

    #[test]
    fn dates_are_right_around_leap_days() {
        for (seconds, date) in [
            (0, "1970-01-01T00:00:00"),
            (951_782_399, "2000-02-28T23:59:59"),
            (951_782_400, "2000-02-29T00:00:00"),
            (951_868_800, "2000-03-01T00:00:00"),
            (1_709_164_800, "2024-02-29T00:00:00"),
            (1_735_689_599, "2024-12-31T23:59:59"),
            (4_107_542_400, "2100-03-01T00:00:00"),
        ] {
            assert_eq!(rfc3339(seconds, 7), format!("{date}.000000007Z"));
        }
    }
}

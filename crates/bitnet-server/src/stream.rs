//! Answers that arrive while they are computed: server-sent events and lines of JSON.
//!
//! A task drives the run and an encoder turns its events into frames. Between it and the connection
//! stands a bounded channel: a reader that is slow makes the task wait, one that is gone or stalls
//! ends it, and with it the generation.

use std::pin::Pin;
use std::task::{Context, Poll};
use std::time::Duration;

use axum::body::Body;
use axum::http::{HeaderValue, header};
use axum::response::Response;
use bytes::Bytes;
use hyper::body::Frame;
use serde::Serialize;
use tokio::sync::mpsc;

use crate::error::ApiError;
use crate::run::{Run, RunEvent};
use crate::state::AppState;

/// Turns the events of a run into the frames of one wire format.
pub(crate) trait Encoder: Send + 'static {
    /// Appends the frames for an event.
    fn event(&mut self, event: RunEvent, out: &mut Frames);
    /// Appends the frames that end a run in which every choice has ended.
    fn finish(&mut self, out: &mut Frames);
    /// Appends the frames that end a run which failed.
    fn error(&mut self, error: &ApiError, out: &mut Frames);
    /// Appends what shows a silent stream to be alive, if the format has something for it.
    fn ping(&mut self, out: &mut Frames) {
        out.comment("ping");
    }
}

/// How frames are delimited.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Framing {
    /// `text/event-stream`
    Sse,
    /// `application/x-ndjson`: one JSON value a line.
    JsonLines,
}

/// Bytes ready to be sent.
#[derive(Debug, Default)]
pub(crate) struct Frames(Vec<u8>);

impl Frames {
    /// `data: JSON`
    pub(crate) fn data(&mut self, value: &impl Serialize) {
        self.0.extend_from_slice(b"data: ");
        self.json(value);
        self.0.extend_from_slice(b"\n\n");
    }

    /// `event: NAME`, then `data: JSON`
    pub(crate) fn event(&mut self, name: &str, value: &impl Serialize) {
        self.0.extend_from_slice(b"event: ");
        self.0.extend_from_slice(name.as_bytes());
        self.0.push(b'\n');
        self.data(value);
    }

    /// `data: [DONE]`
    pub(crate) fn done(&mut self) {
        self.0.extend_from_slice(b"data: [DONE]\n\n");
    }

    /// A line that event-stream readers skip.
    pub(crate) fn comment(&mut self, text: &str) {
        self.0.extend_from_slice(b": ");
        self.0.extend_from_slice(text.as_bytes());
        self.0.extend_from_slice(b"\n\n");
    }

    /// A line of JSON.
    pub(crate) fn line(&mut self, value: &impl Serialize) {
        self.json(value);
        self.0.push(b'\n');
    }

    /// Forgets what is not sent.
    pub(crate) fn clear(&mut self) {
        self.0.clear();
    }

    fn json(&mut self, value: &impl Serialize) {
        // Fails only for maps whose keys are not strings, which no response type has.
        serde_json::to_writer(&mut self.0, value).expect("responses are valid JSON");
    }

    fn take(&mut self) -> Option<Bytes> {
        (!self.0.is_empty()).then(|| std::mem::take(&mut self.0).into())
    }

    #[cfg(test)]
    pub(crate) fn text(&mut self) -> String {
        String::from_utf8(std::mem::take(&mut self.0)).unwrap()
    }
}

/// A response whose body is written by `encoder` while `run` goes on.
pub(crate) fn respond(
    state: &AppState,
    run: Run,
    encoder: impl Encoder,
    framing: Framing,
) -> Response {
    let limits = &state.config().limits;
    let (sender, receiver) = mpsc::channel(limits.stream_buffer);
    let timing = Timing { stall: limits.stall_timeout, ping: limits.sse_ping_interval };
    tokio::spawn(pump(run, encoder, sender, timing));
    let mut response = Response::new(Body::new(ChannelBody(receiver)));
    let media_type = match framing {
        Framing::Sse => "text/event-stream; charset=utf-8",
        Framing::JsonLines => "application/x-ndjson",
    };
    let headers = response.headers_mut();
    headers.insert(header::CONTENT_TYPE, HeaderValue::from_static(media_type));
    headers.insert(header::CACHE_CONTROL, HeaderValue::from_static("no-cache"));
    // nginx would otherwise collect the stream and pass it on in lumps.
    headers.insert("x-accel-buffering", HeaderValue::from_static("no"));
    response
}

#[derive(Debug, Clone, Copy)]
struct Timing {
    stall: Duration,
    ping: Duration,
}

/// Drives a run to its end in a task of its own, so that a panic in it ends this stream alone, with
/// an error event.
async fn pump(run: Run, encoder: impl Encoder, sender: mpsc::Sender<Bytes>, timing: Timing) {
    let (driver, out) = (sender.clone(), sender);
    if let Err(error) = tokio::spawn(drive(run, encoder, driver, timing)).await {
        tracing::error!(%error, "a stream panicked");
        let body = ApiError::internal().body(crate::error::Dialect::OpenAi, "");
        let mut frames = Frames::default();
        frames.data(&body);
        if let Some(bytes) = frames.take() {
            let _ = out.send(bytes).await;
        }
    }
}

async fn drive(
    mut run: Run,
    mut encoder: impl Encoder,
    sender: mpsc::Sender<Bytes>,
    timing: Timing,
) {
    let mut frames = Frames::default();
    loop {
        let event = tokio::select! {
            biased;
            // Hearing of it here, not at the next token, frees the memory within one step.
            () = sender.closed() => return,
            event = tokio::time::timeout(timing.ping, run.next()) => event,
        };
        let ended = match event {
            Err(_) => {
                encoder.ping(&mut frames);
                false
            }
            Ok(Some(Ok(event))) => {
                encoder.event(event, &mut frames);
                false
            }
            Ok(Some(Err(error))) => {
                encoder.error(&error, &mut frames);
                true
            }
            Ok(None) => {
                encoder.finish(&mut frames);
                true
            }
        };
        if let Some(bytes) = frames.take()
            && sender.send_timeout(bytes, timing.stall).await.is_err()
        {
            return;
        }
        if ended {
            return;
        }
    }
}

/// A body fed by a channel.
struct ChannelBody(mpsc::Receiver<Bytes>);

impl hyper::body::Body for ChannelBody {
    type Data = Bytes;
    type Error = std::convert::Infallible;

    fn poll_frame(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, Self::Error>>> {
        self.0.poll_recv(context).map(|bytes| bytes.map(|bytes| Ok(Frame::data(bytes))))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn frames_are_delimited_as_the_formats_say() {
        let mut frames = Frames::default();
        frames.data(&serde_json::json!({"text": "a\nb"}));
        frames.event("message_stop", &serde_json::json!({}));
        frames.comment("ping");
        frames.done();
        let expected = "data: {\"text\":\"a\\nb\"}\n\nevent: message_stop\ndata: {}\n\n: ping\n\ndata: [DONE]\n\n";
        assert_eq!(frames.text(), expected);
        frames.line(&[1, 2]);
        assert_eq!(frames.text(), "[1,2]\n");
    }
}

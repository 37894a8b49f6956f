//! One request, and when each piece of its answer came. HTTP/1.1 without TLS, a connection for each
//! request, as many small clients would make it.

use std::time::{Duration, Instant};

use anyhow::Context;
use bytes::{Buf, Bytes};
use clap::ValueEnum;
use http_body_util::{BodyExt, Full, Limited};
use hyper::body::Incoming;
use hyper::{Request, Response, Uri};
use hyper_util::rt::TokioIo;
use serde::Deserialize;
use serde_json::Value;
use tokio::net::TcpStream;

use crate::exit::Usage;

/// Longest answer that is not a stream, and longest line of one that is.
const MAX_BYTES: usize = 1 << 20;

/// Routes that answer.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub(crate) enum Endpoint {
    Chat,
    Completions,
}

impl Endpoint {
    /// Its path.
    pub(crate) fn path(self) -> &'static str {
        match self {
            Self::Chat => "/v1/chat/completions",
            Self::Completions => "/v1/completions",
        }
    }
}

/// The server that is measured.
#[derive(Debug)]
pub(crate) struct Target {
    /// Host and port.
    authority: String,
    base: String,
    key: Option<String>,
    pub(crate) endpoint: Endpoint,
    timeout: Duration,
}

/// When the pieces of an answer came.
#[derive(Debug, Clone, PartialEq)]
pub(crate) struct Timing {
    pub(crate) start: Instant,
    /// Arrivals of text; at least one.
    pub(crate) pieces: Vec<Instant>,
    pub(crate) usage: UsageCounts,
}

/// The server's own counts.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Deserialize)]
pub(crate) struct UsageCounts {
    pub(crate) prompt_tokens: u64,
    pub(crate) completion_tokens: u64,
    #[serde(default)]
    pub(crate) prompt_tokens_details: Option<Details>,
}

/// Of prompt tokens.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Deserialize)]
pub(crate) struct Details {
    #[serde(default)]
    cached_tokens: u64,
}

impl UsageCounts {
    /// Prompt tokens the server had already.
    pub(crate) fn cached_tokens(&self) -> u64 {
        self.prompt_tokens_details.unwrap_or_default().cached_tokens
    }
}

impl Timing {
    /// Time to the first text.
    pub(crate) fn ttft(&self) -> Duration {
        self.pieces[0] - self.start
    }

    /// Time to the last text.
    pub(crate) fn e2e(&self) -> Duration {
        self.end() - self.start
    }

    /// When the last text came.
    pub(crate) fn end(&self) -> Instant {
        self.pieces[self.pieces.len() - 1]
    }

    /// Time of each token after the first; `None` for a single token.
    pub(crate) fn tpot(&self) -> Option<Duration> {
        let rest = u32::try_from(self.usage.completion_tokens.checked_sub(1)?).ok()?;
        (self.e2e() - self.ttft()).checked_div(rest)
    }

    /// Gaps between pieces.
    pub(crate) fn gaps(&self) -> impl Iterator<Item = Duration> {
        self.pieces.windows(2).map(|pair| pair[1] - pair[0])
    }
}

impl Target {
    /// The server at `url`.
    ///
    /// # Errors
    /// A URL that is not `http://HOST[:PORT][/PATH]`.
    pub(crate) fn parse(
        url: &str,
        key: Option<String>,
        endpoint: Endpoint,
        timeout: Duration,
    ) -> anyhow::Result<Self> {
        let wrong = || Usage::error(format!("--url: expected http://HOST[:PORT], got {url:?}"));
        let uri: Uri = url.parse().map_err(|_| wrong())?;
        let host = uri.host().filter(|_| uri.scheme_str() == Some("http")).ok_or_else(wrong)?;
        let path = uri.path().trim_end_matches('/');
        Ok(Self {
            authority: format!("{host}:{}", uri.port_u16().unwrap_or(80)),
            // Clients are told addresses with and without the `/v1`.
            base: path.strip_suffix("/v1").unwrap_or(path).to_owned(),
            key,
            endpoint,
            timeout,
        })
    }

    async fn send(
        &self,
        method: &str,
        path: &str,
        body: String,
    ) -> anyhow::Result<Response<Incoming>> {
        let stream = TcpStream::connect(&self.authority).await?;
        stream.set_nodelay(true)?;
        let (mut sender, connection) =
            hyper::client::conn::http1::handshake(TokioIo::new(stream)).await?;
        // Ends with the response; errors show in the response as well.
        tokio::spawn(connection);
        let mut request = Request::builder()
            .method(method)
            .uri(format!("{}{path}", self.base))
            .header("host", &self.authority)
            .header("content-type", "application/json");
        if let Some(key) = &self.key {
            request = request.header("authorization", format!("Bearer {key}"));
        }
        let request = request.body(Full::new(Bytes::from(body)))?;
        let response = sender.send_request(request).await?;
        // Kept until the head is there: dropped earlier, the connection would close.
        drop(sender);
        Ok(response)
    }

    /// Where it is.
    pub(crate) fn address(&self) -> String {
        format!("http://{}{}", self.authority, self.base)
    }
}

/// The name of the first model the server has.
///
/// # Errors
/// No server, no key, no model.
pub(crate) async fn first_model(target: &Target) -> anyhow::Result<String> {
    let at = target.address();
    let response = target.send("GET", "/v1/models", String::new()).await;
    let response =
        response.with_context(|| format!("cannot reach {at}; `bitnet serve` starts a server"))?;
    let status = response.status();
    let body = Limited::new(response.into_body(), MAX_BYTES).collect().await;
    let body = body.map_err(|error| anyhow::anyhow!("{at}/v1/models: {error}"))?.to_bytes();
    anyhow::ensure!(status.is_success(), "{at}/v1/models: {status}: {}", message(&body));
    let list: Value = serde_json::from_slice(&body).with_context(|| format!("{at}/v1/models"))?;
    let name = list["data"][0]["id"].as_str();
    Ok(name.with_context(|| format!("{at} has no model"))?.to_owned())
}

/// The server's words for an error.
fn message(body: &[u8]) -> String {
    let value: Value = serde_json::from_slice(body).unwrap_or_default();
    let message = value["error"]["message"].as_str().or(value["message"].as_str());
    message.unwrap_or("no message").chars().take(200).collect()
}

/// Sends a request and follows its answer to the end. `Err` names the kind of failure.
pub(crate) async fn request(target: &Target, body: String) -> Result<Timing, String> {
    match tokio::time::timeout(target.timeout, follow(target, body)).await {
        Ok(outcome) => outcome,
        Err(_) => Err("timeout".into()),
    }
}

async fn follow(target: &Target, body: String) -> Result<Timing, String> {
    let start = Instant::now();
    let response = target.send("POST", target.endpoint.path(), body).await;
    let response = response.map_err(|error| format!("connection: {}", error.root_cause()))?;
    let status = response.status();
    if !status.is_success() {
        let body = Limited::new(response.into_body(), MAX_BYTES).collect().await;
        let body = body.map(|body| body.to_bytes()).unwrap_or_default();
        return Err(format!("{}: {}", status.as_u16(), message(&body)));
    }
    let mut body = response.into_body();
    let mut events = Events::default();
    let mut timing = Timing { start, pieces: Vec::new(), usage: UsageCounts::default() };
    while let Some(frame) = body.frame().await {
        let now = Instant::now();
        let frame = frame.map_err(|_| "the stream broke off")?;
        let Ok(mut data) = frame.into_data() else { continue };
        events.push(&mut data)?;
        while let Some(event) = events.next()? {
            if event.error.is_some() {
                return Err("error in the stream".into());
            }
            if event.has_text() {
                timing.pieces.push(now);
            }
            timing.usage = event.usage.unwrap_or(timing.usage);
        }
        if events.done {
            break;
        }
    }
    match (events.done, timing.pieces.is_empty()) {
        (false, _) => Err("the stream broke off".into()),
        (true, true) => Err("an answer without text".into()),
        (true, false) => Ok(timing),
    }
}

/// Splits a stream of bytes into events.
#[derive(Default)]
struct Events {
    rest: Vec<u8>,
    done: bool,
}

#[derive(Deserialize)]
struct Event {
    #[serde(default)]
    choices: Vec<Choice>,
    usage: Option<UsageCounts>,
    error: Option<Value>,
}

#[derive(Deserialize)]
struct Choice {
    delta: Option<Delta>,
    text: Option<String>,
}

#[derive(Deserialize)]
struct Delta {
    content: Option<String>,
}

impl Event {
    fn has_text(&self) -> bool {
        self.choices.iter().any(|choice| {
            let content = choice.delta.as_ref().and_then(|delta| delta.content.as_ref());
            content.or(choice.text.as_ref()).is_some_and(|text| !text.is_empty())
        })
    }
}

impl Events {
    fn push(&mut self, data: &mut impl Buf) -> Result<(), String> {
        while data.has_remaining() {
            let chunk = data.chunk();
            self.rest.extend_from_slice(chunk);
            let n = chunk.len();
            data.advance(n);
        }
        match self.rest.len() > MAX_BYTES {
            true => Err("an event without end".into()),
            false => Ok(()),
        }
    }

    /// The next whole event, if there is one.
    fn next(&mut self) -> Result<Option<Event>, String> {
        while let Some(end) = self.rest.iter().position(|&byte| byte == b'\n') {
            let line: Vec<u8> = self.rest.drain(..=end).collect();
            let Some(data) = line.trim_ascii().strip_prefix(b"data:") else { continue };
            if data.trim_ascii() == b"[DONE]" {
                self.done = true;
                continue;
            }
            let event = serde_json::from_slice(data).map_err(|_| "an event that is not JSON")?;
            return Ok(Some(event));
        }
        Ok(None)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn urls_are_read_with_and_without_v1() {
        let parse = |url: &str| Target::parse(url, None, Endpoint::Chat, Duration::ZERO);
        for (url, authority, base) in [
            ("http://localhost", "localhost:80", ""),
            ("http://127.0.0.1:8080/", "127.0.0.1:8080", ""),
            ("http://box:1/llm/v1/", "box:1", "/llm"),
            ("http://[::1]:8080/v1", "[::1]:8080", ""),
        ] {
            let target = parse(url).unwrap();
            assert_eq!((target.authority.as_str(), target.base.as_str()), (authority, base));
        }
        for url in ["https://localhost", "localhost:80", "", "http://"] {
            assert!(parse(url).is_err(), "{url}");
        }
    }

    #[test]
    fn events_are_found_wherever_the_bytes_are_cut() {
        let text = ": ping\n\ndata: {\"choices\":[{\"delta\":{\"content\":\"é\"}}]}\r\n\n\
                    data: {\"choices\":[],\"usage\":{\"prompt_tokens\":3,\"completion_tokens\":2,\
                    \"prompt_tokens_details\":{\"cached_tokens\":1}}}\n\ndata: [DONE]\n\n";
        for cut in 0..text.len() {
            let mut events = Events::default();
            let (mut texts, mut usage) = (0, None);
            for part in [&text.as_bytes()[..cut], &text.as_bytes()[cut..]] {
                events.push(&mut &*part).unwrap();
                while let Some(event) = events.next().unwrap() {
                    texts += usize::from(event.has_text());
                    usage = event.usage.or(usage);
                }
            }
            assert!(events.done);
            let usage = usage.unwrap();
            assert_eq!((texts, usage.completion_tokens, usage.cached_tokens()), (1, 2, 1));
        }
        let mut events = Events::default();
        assert!(events.push(&mut &*vec![b'x'; MAX_BYTES + 1]).is_err());
    }

    #[test]
    fn times_follow_their_formulas() {
        let start = Instant::now();
        let at = |ms| start + Duration::from_millis(ms);
        let mut usage = UsageCounts { completion_tokens: 4, ..UsageCounts::default() };
        let timing = Timing { start, pieces: vec![at(100), at(110), at(160)], usage };
        assert_eq!(timing.ttft(), Duration::from_millis(100));
        assert_eq!(timing.e2e(), Duration::from_millis(160));
        assert_eq!(timing.tpot(), Some(Duration::from_millis(20)));
        let gaps: Vec<_> = timing.gaps().map(|gap| gap.as_millis()).collect();
        assert_eq!(gaps, [10, 50]);
        usage.completion_tokens = 1;
        assert_eq!(Timing { start, pieces: vec![at(1)], usage }.tpot(), None);
    }
}

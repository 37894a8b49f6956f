//! How the server is set up: where it listens, who may call, and a bound on everything a request
//! can cost. Knows nothing of models; each limit is documented with its default.

use std::net::SocketAddr;
use std::path::PathBuf;
use std::time::Duration;

pub use crate::residency::{KeepAlive, KeepAliveError};

/// Where the server listens.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Listen {
    /// A TCP address.
    Tcp(SocketAddr),
    /// A Unix domain socket; the file is created, readable and writable by its owner alone.
    #[cfg(unix)]
    Unix(PathBuf),
}

/// Everything about the server that can be chosen.
#[derive(Debug, Clone)]
pub struct ServerConfig {
    /// Where to listen. Default: `127.0.0.1:8080`.
    pub listen: Listen,
    /// Models to serve, as `(name, path)`. The first is the default where a wire format has one.
    /// Default: the built-in model, under the name `builtin`.
    pub models: Vec<(String, PathBuf)>,
    /// How long a model stays in memory after its last request, unless a request of Ollama's clients
    /// says otherwise. Default: until others need the room.
    pub keep_alive: KeepAlive,
    /// API keys in plain text; only their hashes are kept. Empty: no key is asked for.
    pub api_keys: Vec<String>,
    /// Origins a browser may call from, or `*`. Default: none but the server's own page.
    pub cors_origins: Vec<String>,
    /// Host names accepted in the `Host` header besides `localhost` and loopback addresses. On a
    /// loopback or Unix listener all others are refused, which is what stops DNS rebinding; on any
    /// other listener hosts are checked only if this list is not empty.
    pub allowed_hosts: Vec<String>,
    /// Certificate chain and private key (PEM) for HTTPS.
    #[cfg(feature = "tls")]
    pub tls: Option<(PathBuf, PathBuf)>,
    /// Bounds.
    pub limits: Limits,
}

impl Default for ServerConfig {
    fn default() -> Self {
        Self {
            listen: Listen::Tcp(SocketAddr::from(([127, 0, 0, 1], 8080))),
            models: vec![("builtin".into(), PathBuf::from("builtin"))],
            keep_alive: KeepAlive::default(),
            api_keys: Vec::new(),
            cors_origins: Vec::new(),
            allowed_hosts: Vec::new(),
            #[cfg(feature = "tls")]
            tls: None,
            limits: Limits::default(),
        }
    }
}

/// Bounds on what clients can make the server hold or do.
#[derive(Debug, Clone)]
pub struct Limits {
    /// Connections served at a time; more wait in the system's backlog. Default: 1,024.
    pub max_connections: usize,
    /// Time to send a request's head, idle time between requests included. Default: 30 s.
    pub header_read_timeout: Duration,
    /// Bytes of a request's head; more is answered with 431. Default: 64 KiB.
    pub max_header_bytes: usize,
    /// Header fields of a request; more is answered with 431. Default: 100.
    pub max_headers: usize,
    /// Bytes of a request's body; more is answered with 413. Default: 8 MiB.
    pub max_body_bytes: usize,
    /// Time to send a request's body; after it 408. Default: 30 s.
    pub body_read_timeout: Duration,
    /// Wall-clock time of a whole request, waiting included; after it 504, or an error event in a
    /// stream. Default: 1 hour.
    pub request_timeout: Duration,
    /// Requests in work or waiting in the server; more are answered with 429. Default: 512.
    pub max_requests: usize,
    /// Requests of one API key in work or waiting. Default: as `max_requests`.
    pub max_requests_per_key: usize,
    /// Time a client may leave a stream unread before it counts as gone. Default: 60 s.
    pub stall_timeout: Duration,
    /// Events a stream may hold for a slow reader before generation waits for it. Default: 256.
    pub stream_buffer: usize,
    /// Silence in an event stream after which a comment is sent, so that proxies keep it open.
    /// Default: 15 s.
    pub sse_ping_interval: Duration,
    /// Time requests in work may take to finish after SIGTERM. Default: 30 s.
    pub drain_grace: Duration,
    /// Messages in a conversation. Default: 4,096.
    pub max_messages: usize,
    /// Tools in a request. Default: 128.
    pub max_tools: usize,
    /// Choices (`n`) per prompt. Default: 128.
    pub max_choices: usize,
    /// Prompts or inputs in one request. Default: 256.
    pub max_prompts: usize,
    /// JSON values in a body. Default: 1,000,000.
    pub max_json_values: usize,
}

impl Default for Limits {
    fn default() -> Self {
        Self {
            max_connections: 1024,
            header_read_timeout: Duration::from_secs(30),
            max_header_bytes: 64 << 10,
            max_headers: 100,
            max_body_bytes: 8 << 20,
            body_read_timeout: Duration::from_secs(30),
            request_timeout: Duration::from_secs(3600),
            max_requests: 512,
            max_requests_per_key: 512,
            stall_timeout: Duration::from_secs(60),
            stream_buffer: 256,
            sse_ping_interval: Duration::from_secs(15),
            drain_grace: Duration::from_secs(30),
            max_messages: 4096,
            max_tools: 128,
            max_choices: 128,
            max_prompts: 256,
            max_json_values: 1_000_000,
        }
    }
}

/// A configuration that cannot be served.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("server option {option}: expected {expected}, got {got}")]
pub struct ConfigError {
    /// The option.
    pub option: &'static str,
    /// What it accepts.
    pub expected: String,
    /// What it was given.
    pub got: String,
}

impl ServerConfig {
    /// Refuses settings outside their range.
    pub fn validate(&self) -> Result<(), ConfigError> {
        let error = |option, expected: &str, got: String| {
            Err(ConfigError { option, expected: expected.into(), got })
        };
        if self.models.is_empty() {
            return error("models", "at least one model", "none".into());
        }
        for (i, (name, _)) in self.models.iter().enumerate() {
            let printable = name.chars().all(|c| !c.is_control());
            if name.is_empty() || name.len() > 256 || !printable {
                return error("models", "names of 1 to 256 printable bytes", format!("{name:?}"));
            }
            if self.models[..i].iter().any(|(other, _)| other == name) {
                return error("models", "each name once", format!("{name:?} twice"));
            }
        }
        if self.api_keys.iter().any(|key| key.trim().is_empty()) {
            return error("api_keys", "keys of at least one character", "an empty key".into());
        }
        let limits = &self.limits;
        let counts = [
            ("max_connections", limits.max_connections),
            ("max_headers", limits.max_headers),
            ("max_body_bytes", limits.max_body_bytes),
            ("max_requests", limits.max_requests),
            ("max_requests_per_key", limits.max_requests_per_key),
            ("stream_buffer", limits.stream_buffer),
            ("max_messages", limits.max_messages),
            ("max_choices", limits.max_choices),
            ("max_prompts", limits.max_prompts),
            ("max_json_values", limits.max_json_values),
        ];
        for (option, value) in counts {
            if value == 0 {
                return error(option, "at least 1", "0".into());
            }
        }
        // hyper panics below this.
        if limits.max_header_bytes < 8192 {
            let got = limits.max_header_bytes.to_string();
            return error("max_header_bytes", "at least 8192", got);
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn nonsense_is_refused_by_name() {
        type Edit = fn(&mut ServerConfig);
        let cases: [(&str, Edit); 6] = [
            ("models", |c| c.models.clear()),
            ("models", |c| c.models.push(c.models[0].clone())),
            ("models", |c| c.models[0].0 = "a\nb".into()),
            ("api_keys", |c| c.api_keys.push(" ".into())),
            ("max_connections", |c| c.limits.max_connections = 0),
            ("max_header_bytes", |c| c.limits.max_header_bytes = 100),
        ];
        ServerConfig::default().validate().unwrap();
        for (option, edit) in cases {
            let mut config = ServerConfig::default();
            edit(&mut config);
            assert_eq!(config.validate().unwrap_err().option, option);
        }
    }
}

//! A server in this process and a client that speaks plain HTTP to it.
#![allow(dead_code, unreachable_pub)] // Each test file uses its part.

use std::net::SocketAddr;

use bitnet_inference::{EngineConfig, InferenceEngine, Model};
use bitnet_server::{AppState, Listen, Phase, ServerConfig};
use bytes::Bytes;
use http_body_util::{BodyExt, Full};
use hyper::{HeaderMap, Request, StatusCode, body::Incoming};
use hyper_util::rt::TokioIo;
use serde_json::{Value, json};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;
use tokio::task::JoinHandle;

/// A running server.
pub struct Server {
    pub address: SocketAddr,
    pub state: AppState,
    pub engine: InferenceEngine,
    pub task: JoinHandle<std::io::Result<()>>,
}

/// A whole answer.
#[derive(Debug)]
pub struct Answer {
    pub status: StatusCode,
    pub headers: HeaderMap,
    pub text: String,
}

impl Answer {
    pub fn json(&self) -> Value {
        serde_json::from_str(&self.text).unwrap_or_else(|e| panic!("{e}: {}", self.text))
    }

    /// The `data:` values of an event stream.
    pub fn events(&self) -> Vec<String> {
        let data = |line: &str| line.strip_prefix("data: ").map(str::to_owned);
        self.text.lines().filter_map(data).collect()
    }

    /// The events of a stream as JSON, without `[DONE]`, which must be the last.
    pub fn chunks(&self) -> Vec<Value> {
        let mut events = self.events();
        assert_eq!(events.pop().as_deref(), Some("[DONE]"), "{}", self.text);
        events.iter().map(|event| serde_json::from_str(event).unwrap()).collect()
    }
}

impl Server {
    /// A server with the built-in model and its default settings.
    pub async fn start() -> Self {
        Self::start_with(|_| {}, |_| {}).await
    }

    pub async fn start_with(
        edit_server: impl FnOnce(&mut ServerConfig),
        edit_engine: impl FnOnce(&mut EngineConfig),
    ) -> Self {
        let mut engine_config = EngineConfig { threads: Some(1), ..EngineConfig::balanced() };
        edit_engine(&mut engine_config);
        let engine = InferenceEngine::with_config(engine_config).unwrap();
        let mut config = ServerConfig {
            listen: Listen::Tcp(SocketAddr::from(([127, 0, 0, 1], 0))),
            ..ServerConfig::default()
        };
        edit_server(&mut config);
        let state = AppState::new(engine.clone(), config).unwrap();
        let listener = bitnet_server::bind(state.config()).await.unwrap();
        let address = listener.local_addr().unwrap_or(SocketAddr::from(([0, 0, 0, 0], 0)));
        let app = bitnet_server::router(state.clone());
        let task = tokio::spawn(bitnet_server::serve(listener, app, state.clone()));
        Self { address, state, engine, task }
    }

    pub async fn model(&self) -> Model {
        self.engine.load_model("builtin").await.unwrap()
    }

    pub async fn get(&self, path: &str) -> Answer {
        self.send(Request::get(path)).await
    }

    pub async fn post(&self, path: &str, body: Value) -> Answer {
        self.post_text(path, body.to_string()).await
    }

    pub async fn post_text(&self, path: &str, body: impl Into<Bytes>) -> Answer {
        let request = Request::post(path).header("content-type", "application/json");
        self.send_body(request, body.into()).await
    }

    pub async fn send(&self, request: hyper::http::request::Builder) -> Answer {
        self.send_body(request, Bytes::new()).await
    }

    pub async fn send_body(&self, request: hyper::http::request::Builder, body: Bytes) -> Answer {
        let response = self.open(request, body).await;
        let (status, headers) = (response.status(), response.headers().clone());
        let bytes = response.into_body().collect().await.unwrap().to_bytes();
        Answer { status, headers, text: String::from_utf8(bytes.to_vec()).unwrap() }
    }

    /// Sends a request and returns once the head of the response is here.
    pub async fn open(
        &self,
        mut request: hyper::http::request::Builder,
        body: Bytes,
    ) -> hyper::Response<Incoming> {
        let stream = TcpStream::connect(self.address).await.unwrap();
        let io = TokioIo::new(stream);
        let (mut sender, connection) = hyper::client::conn::http1::handshake(io).await.unwrap();
        tokio::spawn(connection);
        if !request.headers_ref().unwrap().contains_key("host") {
            request = request.header("host", self.address.to_string());
        }
        sender.send_request(request.body(Full::new(body)).unwrap()).await.unwrap()
    }

    /// Sends bytes as they are and reads until the server hangs up or is silent.
    pub async fn raw(&self, bytes: &[u8]) -> String {
        let mut stream = TcpStream::connect(self.address).await.unwrap();
        let _ = stream.write_all(bytes).await;
        let mut answer = Vec::new();
        let read = stream.read_to_end(&mut answer);
        let _ = tokio::time::timeout(std::time::Duration::from_secs(2), read).await;
        String::from_utf8_lossy(&answer).into_owned()
    }

    /// Waits until no sequence is running or waiting; panics if that takes too long.
    pub async fn idle(&self) {
        let model = self.model().await;
        for _ in 0..500 {
            let stats = model.stats();
            if stats.running == 0 && stats.waiting == 0 && stats.kv_blocks_in_use == 0 {
                return;
            }
            tokio::time::sleep(std::time::Duration::from_millis(10)).await;
        }
        panic!("still busy: {:?}", model.stats());
    }

    pub fn drain(&self) {
        self.state.lifecycle().advance(Phase::Draining);
    }
}

/// A short chat request; `extra` overrides its fields.
pub fn chat(extra: Value) -> Value {
    let mut body = json!({
        "model": "builtin",
        "messages": [{"role": "user", "content": "Once upon a time"}],
        "max_tokens": 8,
        "temperature": 0,
    });
    merge(&mut body, extra);
    body
}

/// A short completion request; `extra` overrides its fields.
pub fn completion(extra: Value) -> Value {
    let mut body = json!({
        "model": "builtin", "prompt": "Once upon a time", "max_tokens": 8, "temperature": 0,
    });
    merge(&mut body, extra);
    body
}

pub fn merge(body: &mut Value, extra: Value) {
    let Value::Object(extra) = extra else { panic!("not an object") };
    for (name, value) in extra {
        body[name] = value;
    }
}

/// The second where `BITNET_HOSTILE=heavy` asks for crowds that take minutes; else the first.
pub fn heavy<T>(light: T, heavy: T) -> T {
    if std::env::var_os("BITNET_HOSTILE").is_some_and(|value| value == "heavy") {
        heavy
    } else {
        light
    }
}

/// The names of an object's fields, in order.
pub fn names(value: &Value) -> Vec<&str> {
    value.as_object().unwrap().keys().map(String::as_str).collect()
}

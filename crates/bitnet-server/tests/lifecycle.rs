//! Who may call, how much at a time, and what happens when clients or the server leave.

mod common;

use std::time::Duration;

use bytes::Bytes;
use common::{Server, chat, completion};
use http_body_util::BodyExt;
use hyper::Request;
use serde_json::json;

fn post(path: &str) -> hyper::http::request::Builder {
    Request::post(path).header("content-type", "application/json")
}

/// A generation that goes on until the context is full.
fn endless(extra: serde_json::Value) -> Bytes {
    let mut body = completion(json!({"max_tokens": 100_000, "ignore_eos": true}));
    common::merge(&mut body, extra);
    body.to_string().into()
}

#[tokio::test]
async fn keys_open_everything_but_health() {
    let server = Server::start_with(|c| c.api_keys.push("sk-test".into()), |_| {}).await;
    for path in ["/health", "/ready", "/v1/health"] {
        assert_eq!(server.get(path).await.status, 200, "{path}");
    }
    for path in ["/v1/models", "/metrics", "/openapi.json", "/api/tags", "/api/version"] {
        let answer = server.get(path).await;
        assert_eq!(answer.status, 401, "{path}");
        assert_eq!(answer.headers["www-authenticate"], "Bearer");
        let request = Request::get(path).header("authorization", "Bearer sk-test");
        assert_eq!(server.send(request).await.status, 200, "{path}");
    }
    assert_eq!(server.post("/v1/chat/completions", chat(json!({}))).await.status, 401);
    let request = post("/v1/messages").header("x-api-key", "sk-tesu");
    let answer = server.send_body(request, "{}".into()).await;
    assert_eq!(answer.json()["error"]["type"], "authentication_error");
}

#[tokio::test]
async fn foreign_hosts_and_origins_are_refused() {
    let server = Server::start().await;
    let ask = |host: &str, origin: Option<&str>| {
        let mut request = Request::get("/v1/models").header("host", host);
        if let Some(origin) = origin {
            request = request.header("origin", origin);
        }
        server.send(request)
    };
    assert_eq!(ask("localhost:1", None).await.status, 200);
    assert_eq!(ask("evil.example", None).await.status, 403);
    assert_eq!(ask("localhost", Some("http://evil.example")).await.status, 403);
    assert_eq!(ask("localhost", Some("http://localhost:3000")).await.status, 200);
    let preflight = Request::options("/v1/models")
        .header("origin", "http://evil.example")
        .header("access-control-request-method", "GET");
    let answer = server.send(preflight).await;
    assert_eq!(answer.status, 403);
    assert!(!answer.headers.contains_key("access-control-allow-origin"));
}

#[tokio::test]
async fn listed_origins_get_cors_headers() {
    let origin = "http://app.example";
    let server = Server::start_with(|c| c.cors_origins.push(origin.into()), |_| {}).await;
    let preflight = Request::options("/v1/chat/completions")
        .header("origin", origin)
        .header("access-control-request-method", "POST")
        .header("access-control-request-headers", "authorization,content-type,x-stainless-os");
    let answer = server.send(preflight).await;
    assert_eq!(answer.status, 200);
    let headers = answer.headers["access-control-allow-headers"].to_str().unwrap();
    assert!(headers.contains("x-stainless-os"), "{headers}");
    assert_eq!(answer.headers["access-control-allow-origin"], origin);
    let answer = server.send(Request::get("/v1/models").header("origin", origin)).await;
    assert_eq!(answer.headers["access-control-allow-origin"], origin);
}

#[tokio::test]
async fn a_client_that_leaves_frees_its_sequence() {
    let server = Server::start().await;
    let model = server.model().await;
    for stream in [true, false] {
        let request = endless(json!({"stream": stream}));
        let open = server.open(post("/v1/completions"), request);
        if stream {
            let mut response = open.await;
            response.body_mut().frame().await.unwrap().unwrap();
            drop(response);
        } else {
            let _ = tokio::time::timeout(Duration::from_millis(50), open).await;
        }
        server.idle().await;
    }
    // In the middle of a prompt that takes several steps.
    let long = json!({"prompt": vec![17; 900], "stream": true});
    let open = server.open(post("/v1/completions"), endless(long));
    let _ = tokio::time::timeout(Duration::from_millis(20), open).await;
    server.idle().await;
    let steps = model.stats().steps;
    tokio::time::sleep(Duration::from_millis(50)).await;
    assert_eq!(model.stats().steps, steps, "nothing is computed for nobody");
}

#[tokio::test]
async fn a_reader_that_does_not_read_is_dropped() {
    let edit = |c: &mut bitnet_server::ServerConfig| {
        c.limits.stall_timeout = Duration::from_millis(200);
        c.limits.stream_buffer = 1;
    };
    let server = Server::start_with(edit, |_| {}).await;
    server.model().await;
    let request = endless(json!({"stream": true, "n": 16, "logprobs": 20}));
    // Held open, never read: the socket's buffers fill up.
    let _response = server.open(post("/v1/completions"), request).await;
    server.idle().await;
}

#[tokio::test]
async fn more_than_fits_is_refused_with_retry_after() {
    let server = Server::start_with(|c| c.limits.max_requests = 2, |_| {}).await;
    server.model().await;
    let mut open = Vec::new();
    for _ in 0..2 {
        open.push(server.open(post("/v1/completions"), endless(json!({"stream": true}))).await);
    }
    let refused = server.post("/v1/completions", completion(json!({}))).await;
    assert_eq!(refused.status, 429);
    assert_eq!(refused.headers["retry-after"], "1");
    assert_eq!(refused.json()["error"]["code"], "server_busy");
    assert_eq!(server.get("/v1/models").await.status, 200, "only generation is bounded");
    drop(open);
    server.idle().await;
    assert_eq!(server.post("/v1/completions", completion(json!({}))).await.status, 200);
    let metrics = server.get("/metrics").await.text;
    assert!(metrics.contains("bitnet_rejections_total{reason=\"server_busy\"} 1"), "{metrics}");
}

#[tokio::test]
async fn the_engines_queue_is_bounded_too() {
    let server = Server::start_with(
        |_| {},
        |e| {
            e.max_waiting = 2;
            e.batch_size = 1;
        },
    )
    .await;
    server.model().await;
    let stream = |n: u32| endless(json!({"stream": true, "n": n}));
    let mut running = server.open(post("/v1/completions"), stream(1)).await;
    running.body_mut().frame().await.unwrap().unwrap();
    let waiting = server.open(post("/v1/completions"), stream(2)).await;
    assert_eq!(waiting.status(), 200);
    let refused = server.post("/v1/completions", completion(json!({}))).await;
    assert_eq!(refused.status, 429, "{}", refused.text);
    assert_eq!(refused.headers["retry-after"], "1");
    assert_eq!(refused.json()["error"]["code"], "queue_full");
    // What could never wait is not asked to come again.
    let refused = server.post("/v1/completions", completion(json!({"n": 3}))).await;
    assert_eq!(refused.status, 400, "{}", refused.text);
    assert_eq!(refused.json()["error"]["param"], "n");
    drop((running, waiting));
    server.idle().await;
}

#[tokio::test]
async fn draining_lets_requests_finish_and_refuses_new_ones() {
    let server = Server::start().await;
    server.model().await;
    let request = completion(json!({"max_tokens": 60, "ignore_eos": true, "stream": true}));
    let mut response = server.open(post("/v1/completions"), request.to_string().into()).await;
    response.body_mut().frame().await.unwrap().unwrap();
    // A connection that was open before may still ask.
    server.drain();
    let body = response.into_body().collect().await.unwrap().to_bytes();
    assert!(String::from_utf8_lossy(&body).ends_with("data: [DONE]\n\n"));
    let outcome = tokio::time::timeout(Duration::from_secs(5), server.task).await;
    outcome.expect("the server returns once it is idle").unwrap().unwrap();
}

#[tokio::test]
async fn what_outlasts_the_grace_period_ends_with_an_error_event() {
    let edit = |c: &mut bitnet_server::ServerConfig| {
        c.limits.drain_grace = Duration::from_millis(50);
        c.limits.stall_timeout = Duration::from_millis(100);
    };
    let server = Server::start_with(edit, |_| {}).await;
    server.model().await;
    let request = endless(json!({"stream": true, "n": 16}));
    let response = server.open(post("/v1/completions"), request).await;
    server.drain();
    let body = response.into_body().collect().await.unwrap().to_bytes();
    let text = String::from_utf8_lossy(&body).into_owned();
    assert!(
        text.contains("\"code\":\"shutting_down\""),
        "{}",
        &text[text.len().saturating_sub(400)..]
    );
    assert!(text.ends_with("data: [DONE]\n\n"));
}

#[tokio::test]
async fn a_request_has_a_deadline() {
    let edit = |c: &mut bitnet_server::ServerConfig| {
        c.limits.request_timeout = Duration::from_millis(30);
    };
    let server = Server::start_with(edit, |_| {}).await;
    server.model().await;
    let request = completion(json!({"max_tokens": 100_000, "ignore_eos": true, "n": 16}));
    let answer = server.post("/v1/completions", request).await;
    assert_eq!(
        (answer.status.as_u16(), &answer.json()["error"]["code"]),
        (504, &json!("request_timeout"))
    );
    server.idle().await;
}

#[tokio::test]
async fn metrics_are_counted_under_both_names() {
    let server = Server::start().await;
    let request = completion(json!({"max_tokens": 5, "ignore_eos": true}));
    server.post("/v1/completions", request).await;
    server.idle().await;
    let text = server.get("/metrics").await.text;
    for line in [
        "vllm:generation_tokens_total{model_name=\"builtin\"} 5",
        "bitnet_time_to_first_token_seconds_count{model_name=\"builtin\"} 1",
        "vllm:inter_token_latency_seconds_count{model_name=\"builtin\"} 4",
        "vllm:request_success_total{model_name=\"builtin\",finished_reason=\"length\"} 1",
        "vllm:num_requests_running{model_name=\"builtin\"} 0",
        "bitnet_model_loaded{model_name=\"builtin\"} 1",
        "bitnet_http_requests_total{method=\"POST\",route=\"/v1/completions\",status=\"200\"} 1",
    ] {
        assert!(text.lines().any(|l| l == line), "no line {line} in\n{text}");
    }
}

#[tokio::test]
async fn one_tenants_prefix_is_not_anothers() {
    let edit = |c: &mut bitnet_server::ServerConfig| c.api_keys = vec!["a".into(), "b".into()];
    let server = Server::start_with(edit, |_| {}).await;
    let cached = async |key: &str, salt: Option<&str>| {
        let body =
            completion(json!({"prompt": vec![17; 200], "max_tokens": 1, "cache_salt": salt}));
        let request = post("/v1/completions").header("x-api-key", key);
        let body = server.send_body(request, body.to_string().into()).await.json();
        body["usage"]["prompt_tokens_details"]["cached_tokens"].as_u64().unwrap()
    };
    assert_eq!(cached("a", None).await, 0);
    assert!(cached("a", None).await > 0);
    assert_eq!(cached("b", None).await, 0);
    assert_eq!(cached("a", Some("x")).await, 0);
    assert!(cached("a", Some("x")).await > 0);
    assert_eq!(cached("b", Some("x")).await, 0);
}

#[cfg(unix)]
#[tokio::test]
async fn a_unix_socket_serves_its_owner_and_goes_with_the_server() {
    use std::os::unix::fs::PermissionsExt;
    use tokio::io::{AsyncReadExt, AsyncWriteExt};
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("bitnet.sock");
    let listen = bitnet_server::Listen::Unix(path.clone());
    let server = Server::start_with(|c| c.listen = listen, |_| {}).await;
    assert_eq!(std::fs::metadata(&path).unwrap().permissions().mode() & 0o777, 0o600);
    let mut stream = tokio::net::UnixStream::connect(&path).await.unwrap();
    stream.write_all(b"GET /health HTTP/1.1\r\nconnection: close\r\n\r\n").await.unwrap();
    let mut answer = String::new();
    stream.read_to_string(&mut answer).await.unwrap();
    assert!(answer.starts_with("HTTP/1.1 200"), "{answer}");
    server.drain();
    let outcome = tokio::time::timeout(Duration::from_secs(5), server.task).await;
    outcome.expect("the server returns once it is idle").unwrap().unwrap();
    assert!(!path.exists());
}

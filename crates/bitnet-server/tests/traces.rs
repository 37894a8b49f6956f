//! Spans reach a collector, under the names of OpenTelemetry's conventions.
#![cfg(feature = "otel")]

mod common;

use std::io::{Read, Write};
use std::net::{TcpListener, TcpStream};
use std::sync::mpsc;

use bitnet_server::LogFormat;
use common::{Server, chat};
use hyper::Request;
use serde_json::json;

/// The body of a request whose head has a content-length.
fn body(stream: &mut TcpStream) -> Vec<u8> {
    let mut bytes = Vec::new();
    let mut buffer = [0; 4096];
    loop {
        let n = stream.read(&mut buffer).unwrap();
        bytes.extend_from_slice(&buffer[..n]);
        let Some(end) = bytes.windows(4).position(|window| window == b"\r\n\r\n") else { continue };
        let head = String::from_utf8_lossy(&bytes[..end]).to_lowercase();
        assert!(head.starts_with("post /v1/traces"), "{head}");
        let length = head.split("content-length: ").nth(1).unwrap().lines().next().unwrap();
        if bytes.len() >= end + 4 + length.trim().parse::<usize>().unwrap() || n == 0 {
            return bytes.split_off(end + 4);
        }
    }
}

#[test]
fn a_request_and_its_generation_are_one_trace_of_the_clients() {
    let collector = TcpListener::bind("127.0.0.1:0").unwrap();
    let endpoint = format!("http://{}", collector.local_addr().unwrap());
    let (sender, bodies) = mpsc::channel();
    std::thread::spawn(move || {
        for stream in collector.incoming() {
            let mut stream = stream.unwrap();
            let _ = sender.send(body(&mut stream));
            let _ = stream
                .write_all(b"HTTP/1.1 200 OK\r\ncontent-length: 0\r\nconnection: close\r\n\r\n");
        }
    });
    let traces =
        bitnet_server::init_logging_and_traces(LogFormat::Text, "error", &endpoint).unwrap();
    let runtime = tokio::runtime::Runtime::new().unwrap();
    runtime.block_on(async {
        let server = Server::start().await;
        let request = Request::post("/v1/chat/completions")
            .header("content-type", "application/json")
            .header("traceparent", "00-0102030405060708090a0b0c0d0e0f10-1112131415161718-01");
        let secret = json!([{"role": "user", "content": "a secret prompt"}]);
        let answer =
            server.send_body(request, chat(json!({"messages": secret})).to_string().into()).await;
        assert_eq!(answer.status, 200);
        assert_eq!(server.get("/nowhere").await.status, 404);
        server.idle().await;
    });
    traces.shutdown().unwrap();
    let sent: Vec<u8> = bodies.try_iter().flatten().collect();
    let contains = |part: &[u8]| sent.windows(part.len()).any(|window| window == part);
    for name in [
        "POST /v1/chat/completions",
        "http.response.status_code",
        "chat builtin",
        "gen_ai.operation.name",
        "gen_ai.provider.name",
        "gen_ai.request.model",
        "gen_ai.request.max_tokens",
        "gen_ai.request.temperature",
        "gen_ai.usage.input_tokens",
        "gen_ai.usage.output_tokens",
        "gen_ai.response.finish_reasons",
        "gen_ai.first_token",
        "GET (none)",
        "bitnet",
    ] {
        assert!(contains(name.as_bytes()), "no {name}");
    }
    let trace_id: Vec<u8> = (1..=16).collect();
    let parent: Vec<u8> = (0x11..=0x18).collect();
    assert!(contains(&trace_id) && contains(&parent), "the spans are the client's");
    assert!(!contains(b"secret"), "prompts are never part of traces");
}

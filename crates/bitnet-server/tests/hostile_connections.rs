//! Connections nobody should open: crowds that say nothing, senders of a byte at a time, clients that
//! break off in every way, and more requests than there is room for. The server stays reachable, and
//! afterwards nothing is left. `BITNET_HOSTILE=heavy` (scripts/test-hostile.sh) makes the crowds large.

mod common;

use std::time::{Duration, Instant};

use common::{Server, chat, completion, heavy};
use http_body_util::BodyExt;
use hyper::Request;
use serde_json::json;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;

fn post(path: &str) -> hyper::http::request::Builder {
    Request::post(path).header("content-type", "application/json")
}

/// Resident bytes and open files of this process, where the system tells.
fn resources() -> Option<(u64, usize)> {
    let status = std::fs::read_to_string("/proc/self/status").ok()?;
    let line = status.lines().find_map(|line| line.strip_prefix("VmRSS:"))?;
    let kib: u64 = line.split_whitespace().next()?.parse().ok()?;
    Some((kib << 10, std::fs::read_dir("/proc/self/fd").ok()?.count()))
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_crowd_that_says_nothing_is_sent_away_and_others_are_served() {
    let (crowd, places) = heavy((300, 200), (9000, 8000));
    let edit = |c: &mut bitnet_server::ServerConfig| {
        c.limits.max_connections = places;
        c.limits.header_read_timeout = Duration::from_millis(heavy(1000, 5000));
    };
    let server = Server::start_with(edit, |_| {}).await;
    server.model().await;
    let before = resources();
    let mut idle = Vec::new();
    for i in 0..crowd {
        // The system's backlog is full now and then; the server takes from it as places come free.
        let connect = TcpStream::connect(server.address);
        let stream = tokio::time::timeout(Duration::from_secs(60), connect).await;
        let mut stream = stream.expect("a place comes free").unwrap();
        if i % 2 == 0 {
            let _ = stream.write_all(b"POST /v1/chat/completions HTTP/1.1\r\nhost: local").await;
        }
        idle.push(stream);
    }
    // All places are taken; this one gets one when the silent are sent away.
    let started = Instant::now();
    let answer = server.post("/v1/chat/completions", chat(json!({}))).await;
    assert_eq!(answer.status, 200);
    assert!(started.elapsed() < Duration::from_secs(60), "{:?}", started.elapsed());
    if let (Some(before), Some(now)) = (before, resources()) {
        // hyper's buffers, tasks and sockets of both sides; 64 KiB of head each would be more.
        assert!(now.0 < before.0 + (16 << 20) + crowd as u64 * 24_000, "{before:?} {now:?}");
    }
    for stream in &mut idle {
        let mut rest = Vec::new();
        let read = tokio::time::timeout(Duration::from_secs(60), stream.read_to_end(&mut rest));
        let _ = read.await.expect("the silent are sent away");
        assert!(rest.is_empty() || rest.starts_with(b"HTTP/1.1 408"), "{rest:?}");
    }
    drop(idle);
    assert_eq!(server.get("/health").await.status, 200);
    if let (Some(before), Some(_)) = (before, resources()) {
        let closed = async || resources().is_some_and(|now| now.1 <= before.1 + 4);
        assert!(soon(closed).await, "{before:?} {:?}", resources());
    }
}

/// Whether something becomes true within some seconds.
async fn soon(is_so: impl AsyncFn() -> bool) -> bool {
    for _ in 0..500 {
        if is_so().await {
            return true;
        }
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
    false
}

#[tokio::test]
async fn a_byte_at_a_time_ends_at_the_time_for_all_of_it() {
    let edit = |c: &mut bitnet_server::ServerConfig| {
        c.limits.header_read_timeout = Duration::from_millis(400);
        c.limits.body_read_timeout = Duration::from_millis(400);
    };
    let server = Server::start_with(edit, |_| {}).await;
    let head = "POST /v1/completions HTTP/1.1\r\nhost: localhost\r\n";
    let body = format!("{head}content-type: application/json\r\ncontent-length: 500\r\n\r\n");
    for (start, trickle, status) in [
        (head.to_owned(), "x-a: b\r\n", "HTTP/1.1 408"),
        (body.clone(), "{\"prompt\": [", "HTTP/1.1 408"),
        // Chunks of one byte, without an end.
        (
            body.replace("content-length: 500", "transfer-encoding: chunked"),
            "1\r\n{\r\n",
            "HTTP/1.1 408",
        ),
    ] {
        let started = Instant::now();
        let stream = TcpStream::connect(server.address).await.unwrap();
        let (mut reader, mut writer) = stream.into_split();
        writer.write_all(start.as_bytes()).await.unwrap();
        let trickling = tokio::spawn(async move {
            for byte in trickle.bytes().cycle() {
                if writer.write_all(&[byte]).await.is_err() {
                    return;
                }
                tokio::time::sleep(Duration::from_millis(5)).await;
            }
        });
        let mut answer = Vec::new();
        let _ = reader.read_to_end(&mut answer).await;
        trickling.abort();
        let answer = String::from_utf8_lossy(&answer).into_owned();
        assert!(answer.is_empty() || answer.starts_with(status), "{trickle:?}: {answer}");
        assert!(
            started.elapsed() < Duration::from_secs(20),
            "{trickle:?}: {:?}",
            started.elapsed()
        );
    }
    assert_eq!(server.get("/health").await.status, 200);
}

#[tokio::test]
async fn clients_that_break_off_in_any_way_free_their_sequence() {
    let server = Server::start().await;
    server.model().await;
    let body = completion(json!({"max_tokens": 100_000, "ignore_eos": true, "stream": true}));
    let body = body.to_string();
    let request = format!(
        "POST /v1/completions HTTP/1.1\r\nhost: localhost\r\ncontent-type: application/json\r\n\
         content-length: {}\r\n\r\n{body}",
        body.len()
    );
    for i in 0..heavy(12, 1000) {
        let mut stream = TcpStream::connect(server.address).await.unwrap();
        stream.write_all(request.as_bytes()).await.unwrap();
        // Before the head of the answer, or after some events of it.
        if i % 2 == 0 {
            let mut some = [0; 2000];
            let _ = stream.read_exact(&mut some).await.unwrap();
        }
        match i % 3 {
            0 => {
                // Half-closed: it would still read.
                stream.shutdown().await.unwrap();
                let mut rest = Vec::new();
                let _ =
                    tokio::time::timeout(Duration::from_secs(20), stream.read_to_end(&mut rest))
                        .await
                        .expect("half-closing counts as hanging up");
            }
            1 => {
                stream.set_zero_linger().unwrap(); // A reset instead of an orderly end.
                drop(stream);
            }
            _ => drop(stream),
        }
    }
    server.idle().await;
    let answer = server.post("/v1/chat/completions", chat(json!({}))).await;
    assert_eq!(answer.status, 200);
}

#[tokio::test]
async fn a_flood_is_answered_or_sent_away() {
    let server = Server::start_with(|c| c.limits.max_requests = 4, |_| {}).await;
    let alone = server.post("/v1/completions", completion(json!({}))).await.json();
    let flood = (0..heavy(60, 2000)).map(|_| server.post("/v1/completions", completion(json!({}))));
    let (mut answered, mut refused) = (0, 0);
    for answer in futures::future::join_all(flood).await {
        match answer.status.as_u16() {
            200 => {
                answered += 1;
                assert_eq!(answer.json()["choices"], alone["choices"]);
            }
            429 => {
                refused += 1;
                assert!(answer.headers.contains_key("retry-after"));
            }
            other => panic!("{other}: {}", answer.text),
        }
    }
    assert!(answered >= 4 && refused > 0, "{answered} answered, {refused} refused");
    server.idle().await;
}

#[tokio::test]
async fn models_that_come_and_go_answer_every_request() {
    let server = Server::start().await;
    let generate = json!({
        "model": "builtin", "prompt": "Once", "stream": false, "keep_alive": 0,
        "options": {"num_predict": 2, "temperature": 0},
    });
    let requests = (0..heavy(40, 400)).map(|i| match i % 4 {
        3 => server.post("/v1/completions", completion(json!({"stream": true}))),
        _ => server.post("/api/generate", generate.clone()),
    });
    for answer in futures::future::join_all(requests).await {
        assert_eq!(answer.status, 200, "{}", answer.text);
    }
    let empty = async || server.get("/api/ps").await.json()["models"] == json!([]);
    assert!(soon(empty).await);
}

#[tokio::test]
async fn credentials_that_are_none() {
    let server = Server::start_with(|c| c.api_keys.push("sk-test".into()), |_| {}).await;
    let long = format!("Bearer {}", "sk-test".repeat(8000));
    for value in [
        &b""[..],
        b"Bearer",
        b"Bearer ",
        b"Bearer  sk-test x",
        b"Basic c2stdGVzdA==",
        b"sk-test",
        b"Bearer sk-tes",
        b"Bearer sk-testt",
        b"Bearer sk-test\xff",
        b"Bearer \xff\xfe",
        long.as_bytes(),
    ] {
        let request = Request::get("/v1/models").header("authorization", value);
        let answer = server.send(request).await;
        assert_eq!(
            answer.status,
            401,
            "{}",
            String::from_utf8_lossy(&value[..value.len().min(40)])
        );
        assert!(!answer.text.contains("sk-test"), "what was sent is not told: {}", answer.text);
    }
    let right = Request::get("/v1/models").header("authorization", "Bearer sk-test");
    assert_eq!(server.send(right).await.status, 200);
}

#[tokio::test]
async fn every_route_has_its_methods_and_no_others() {
    let server = Server::start().await;
    let document = server.get("/openapi.json").await.json();
    for (path, item) in document["paths"].as_object().unwrap() {
        let served: Vec<String> =
            item.as_object().unwrap().keys().map(|method| method.to_uppercase()).collect();
        let path = path.replace("{model}", "builtin");
        for method in ["GET", "POST", "PUT", "DELETE", "PATCH", "OPTIONS", "TRACE", "CONNECTS"] {
            if served.iter().any(|served| served == method) {
                continue;
            }
            let answer = server.send(Request::builder().method(method).uri(&path)).await;
            assert_eq!(answer.status, 405, "{method} {path}: {}", answer.text);
            let allowed = answer.headers["allow"].to_str().unwrap();
            assert!(served.iter().all(|method| allowed.contains(method)), "{path}: {allowed}");
        }
        if served.contains(&"GET".to_owned()) {
            let get = server.get(&path).await;
            let head = server.send(Request::head(&path)).await;
            assert_eq!((head.status, head.text.as_str()), (get.status, ""), "HEAD {path}");
        }
    }
    // A body where none belongs is not read as another request.
    let request = Request::get("/health");
    let answer = server.send_body(request, "GET /v1/models HTTP/1.1\r\n\r\n".into()).await;
    assert_eq!((answer.status.as_u16(), answer.text.as_str()), (200, "{\"status\":\"ok\"}"));
    let mut open = server.open(post("/v1/completions"), "{".into()).await;
    assert_eq!(open.status(), 400);
    assert!(open.body_mut().frame().await.is_some());
}

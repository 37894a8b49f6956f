//! After many requests, whole and broken off, nothing is left: no thread, no file handle, no memory.
//! `scripts/soak.py` does the same for longer, against the program.
#![cfg(target_os = "linux")]

mod common;

use std::time::Duration;

use common::{Server, chat, completion};
use http_body_util::BodyExt;
use hyper::Request;
use serde_json::json;

/// One request of a mix; every fourth is read to its end.
async fn one(server: &Server, i: usize) {
    let post = |path: &str| Request::post(path).header("content-type", "application/json");
    let long =
        json!({"stream": true, "max_tokens": 200, "ignore_eos": true, "seed": i, "temperature": 1});
    match i % 4 {
        0 => {
            let answer = server.post(
                "/v1/chat/completions",
                chat(json!({"seed": i, "stream": i.is_multiple_of(8)})),
            );
            assert_eq!(answer.await.status, 200);
        }
        // Left after the first events.
        1 => {
            let body = completion(long).to_string();
            let mut response = server.open(post("/v1/completions"), body.into()).await;
            for _ in 0..i % 5 + 1 {
                response.body_mut().frame().await.unwrap().unwrap();
            }
        }
        // Left at some moment, perhaps before the head of the answer.
        2 => {
            let body =
                completion(json!({"max_tokens": 100, "ignore_eos": true, "n": 3})).to_string();
            let open = server.open(post("/v1/completions"), body.into());
            let _ = tokio::time::timeout(Duration::from_millis(i as u64 % 20), open).await;
        }
        // Refused.
        _ => {
            let answer = server.post("/v1/chat/completions", chat(json!({"temperature": 9}))).await;
            assert_eq!(answer.status, 400);
        }
    }
}

/// Resident bytes, threads and open files of this process.
fn resources() -> (f64, usize, usize) {
    let status = std::fs::read_to_string("/proc/self/status").unwrap();
    let number = |name: &str| {
        let line = status.lines().find_map(|line| line.strip_prefix(name)).unwrap();
        line.split_whitespace().next().unwrap().parse::<usize>().unwrap()
    };
    let files = std::fs::read_dir("/proc/self/fd").unwrap().count();
    (number("VmRSS:") as f64 * 1024.0, number("Threads:"), files)
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn nothing_is_left_of_many_requests() {
    let server = Server::start().await;
    let run = async |from: usize, to: usize| {
        for i in (from..to).step_by(8) {
            futures::future::join_all((i..to.min(i + 8)).map(|i| one(&server, i))).await;
        }
        server.idle().await;
    };
    // Until caches, thread pools and the allocator have what they keep.
    run(0, 200).await;
    let (bytes, threads, files) = resources();
    run(200, 600).await;
    // Connections that clients have left close a moment later.
    let mut after = resources();
    for _ in 0..100 {
        if after.1 <= threads && after.2 <= files {
            break;
        }
        tokio::time::sleep(Duration::from_millis(50)).await;
        after = resources();
    }
    // Threads for blocking work end after idling for ten seconds; a few more may live just now.
    assert!(after.1 <= threads + 4, "{} threads, then {}", threads, after.1);
    assert!(after.2 <= files, "{} files, then {}", files, after.2);
    // Twice the requests may not take a twentieth more; 2 MiB for what the system rounds.
    assert!(after.0 <= bytes * 1.05 + 2e6, "{bytes} bytes, then {}", after.0);
    assert!(server.get("/metrics").await.text.contains("bitnet_requests_in_flight 0\n"));
}

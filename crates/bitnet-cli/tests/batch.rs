//! `bitnet batch` on files: answers in order, errors in their lines, and going on after a stop.

mod common;

use std::path::Path;
use std::time::Duration;

use common::{bitnet, run, text};
use serde_json::{Value, json};

fn request(id: &str, url: &str, body: Value) -> String {
    let mut body = body;
    if body.get("model").is_none() {
        body["model"] = json!("builtin");
    }
    json!({"custom_id": id, "method": "POST", "url": url, "body": body}).to_string() + "\n"
}

fn completion(id: &str, max_tokens: u32) -> String {
    let body = json!({"prompt": "Once upon a time", "max_tokens": max_tokens, "temperature": 0});
    request(id, "/v1/completions", body)
}

fn answers(path: &Path) -> Vec<Value> {
    let text = std::fs::read_to_string(path).unwrap();
    assert!(text.is_empty() || text.ends_with('\n'));
    text.lines().map(|line| serde_json::from_str(line).unwrap()).collect()
}

fn batch(input: &Path, output: &Path) -> (Option<i32>, String) {
    let output =
        run(&["batch", input.to_str().unwrap(), output.to_str().unwrap(), "--threads", "1"]);
    (output.status.code(), text(&output.stderr))
}

#[test]
fn every_line_gets_its_answer_in_order() {
    let folder = tempfile::tempdir().unwrap();
    let (input, output) = (folder.path().join("in.jsonl"), folder.path().join("out.jsonl"));
    let mut lines = String::new();
    // The first is the longest: answers must wait for it.
    lines.push_str(&completion("long", 200));
    lines.push_str(&request(
        "chat",
        "/v1/chat/completions",
        json!({"messages": [{"role": "user", "content": "Hello"}], "max_tokens": 5}),
    ));
    lines.push_str("\n   \n");
    lines.push_str(&request("vector", "/v1/embeddings", json!({"input": "a fox"})));
    lines.push_str(&request(
        "responses",
        "/v1/responses",
        json!({"input": "Hi", "max_output_tokens": 16}),
    ));
    lines.push_str(&completion("last", 3));
    std::fs::write(&input, &lines).unwrap();
    let (code, stderr) = batch(&input, &output);
    assert_eq!(code, Some(0), "{stderr}");
    assert!(stderr.contains("5 of 5 requests answered"), "{stderr}");
    let answers = answers(&output);
    let ids: Vec<&str> = answers.iter().map(|a| a["custom_id"].as_str().unwrap()).collect();
    assert_eq!(ids, ["long", "chat", "vector", "responses", "last"]);
    for answer in &answers {
        assert_eq!(answer["response"]["status_code"], 200, "{answer}");
        assert!(answer["error"].is_null() && answer["id"].as_str().unwrap().len() > 10);
        assert!(answer["response"]["request_id"].is_string());
    }
    assert_eq!(answers[0]["response"]["body"]["usage"]["completion_tokens"], 200);
    assert_eq!(
        answers[2]["response"]["body"]["data"][0]["embedding"].as_array().unwrap().len(),
        256
    );
}

#[test]
fn lines_that_cannot_be_answered_say_why() {
    let folder = tempfile::tempdir().unwrap();
    let (input, output) = (folder.path().join("in.jsonl"), folder.path().join("out.jsonl"));
    let mut lines = String::from("not json\n");
    lines.push_str(&request("url", "/v1/files", json!({})));
    lines.push_str(&request("stream", "/v1/completions", json!({"prompt": "x", "stream": true})));
    lines.push_str(&completion("get", 2).replace("POST", "GET"));
    lines.push_str("{\"custom_id\":7}\n");
    lines.push_str(&request("range", "/v1/completions", json!({"prompt": "x", "top_p": 7})));
    lines.push_str(&request("model", "/v1/completions", json!({"prompt": "x", "model": "gpt"})));
    lines.push_str(&completion("good", 2));
    let mut bytes = lines.into_bytes();
    bytes.extend(vec![b'x'; 9 << 20]);
    bytes.push(b'\n');
    bytes.extend(vec![b'['; 100_000]);
    std::fs::write(&input, &bytes).unwrap();
    let (code, stderr) = batch(&input, &output);
    assert_eq!(code, Some(1), "{stderr}");
    assert!(stderr.contains("9 requests failed"), "{stderr}");
    let answers = answers(&output);
    assert_eq!(answers.len(), 10);
    for (i, answer) in answers.iter().enumerate() {
        let (response, error) = (&answer["response"], &answer["error"]);
        match answer["custom_id"].as_str() {
            Some("range") => {
                assert_eq!(response["status_code"], 400);
                assert_eq!(response["body"]["error"]["param"], "top_p");
            }
            Some("model") => assert_eq!(response["status_code"], 404),
            Some("good") => assert_eq!(response["status_code"], 200),
            _ => {
                assert!(response.is_null(), "{i}: {answer}");
                assert!(error["message"].as_str().is_some_and(|m| !m.is_empty()), "{answer}");
            }
        }
    }
    assert!(answers[1]["error"]["message"].as_str().unwrap().contains("/v1/chat/completions"));
}

#[test]
fn a_batch_goes_on_where_it_stopped() {
    let folder = tempfile::tempdir().unwrap();
    let (input, output) = (folder.path().join("in.jsonl"), folder.path().join("out.jsonl"));
    let lines: String = (0..12).map(|i| completion(&format!("r{i}"), 4)).collect();
    std::fs::write(&input, &lines).unwrap();
    assert_eq!(batch(&input, &output).0, Some(0));
    let whole = std::fs::read_to_string(&output).unwrap();

    // Stopped in the middle of the sixth line.
    let five: usize = whole.split_inclusive('\n').take(5).map(str::len).sum();
    std::fs::write(&output, &whole[..five + 20]).unwrap();
    let (code, stderr) = batch(&input, &output);
    assert_eq!(code, Some(0), "{stderr}");
    assert!(stderr.contains("5 of 12 requests are answered already"), "{stderr}");
    let again = std::fs::read_to_string(&output).unwrap();
    assert_eq!(again[..five], whole[..five], "what was there is kept");
    let texts = |text: &str| -> Vec<Value> {
        let answers = text.lines().map(|line| serde_json::from_str::<Value>(line).unwrap());
        answers.map(|a| json!([a["custom_id"], a["response"]["body"]["choices"]])).collect()
    };
    assert_eq!(texts(&again), texts(&whole));
    // Nothing is left to do.
    let (code, _) = batch(&input, &output);
    assert_eq!((code, std::fs::read_to_string(&output).unwrap()), (Some(0), again.clone()));

    // The answers of another batch are not overwritten.
    std::fs::write(&input, lines.replace("r3", "x3")).unwrap();
    let (code, stderr) = batch(&input, &output);
    assert_eq!(code, Some(1));
    assert!(stderr.contains("line 4"), "{stderr}");
    assert_eq!(std::fs::read_to_string(&output).unwrap(), again);
}

#[cfg(unix)]
#[test]
fn ctrl_c_leaves_whole_lines_and_a_second_run_finishes() {
    let folder = tempfile::tempdir().unwrap();
    let (input, output) = (folder.path().join("in.jsonl"), folder.path().join("out.jsonl"));
    let lines: String = (0..400).map(|i| completion(&format!("r{i}"), 60)).collect();
    std::fs::write(&input, &lines).unwrap();
    let args = ["batch", input.to_str().unwrap(), output.to_str().unwrap(), "--parallel", "4"];
    let mut child = bitnet().args(args).stderr(std::process::Stdio::piped()).spawn().unwrap();
    while std::fs::metadata(&output).map_or(0, |data| data.len()) < 2000 {
        assert!(child.try_wait().unwrap().is_none(), "it ended before it was stopped");
        std::thread::sleep(Duration::from_millis(20));
    }
    // A second batch on the same output is refused while this one writes.
    let (code, stderr) = batch(&input, &output);
    assert_eq!(code, Some(1));
    assert!(stderr.contains("another batch"), "{stderr}");

    let kill = std::process::Command::new("kill").args(["-INT", &child.id().to_string()]).status();
    assert!(kill.unwrap().success());
    let ended = child.wait_with_output().unwrap();
    assert_eq!(ended.status.code(), Some(130), "{}", text(&ended.stderr));
    let done = answers(&output).len();
    assert!((1..400).contains(&done), "{done} lines");

    // The second run has only the rest to do; a shorter input will do to show it.
    let rest: String = lines.split_inclusive('\n').take(done + 3).collect();
    std::fs::write(&input, rest).unwrap();
    let (code, stderr) = batch(&input, &output);
    assert_eq!(code, Some(0), "{stderr}");
    let answers = answers(&output);
    assert_eq!(answers.len(), done + 3);
    for (i, answer) in answers.iter().enumerate() {
        assert_eq!(answer["custom_id"], format!("r{i}"));
    }
}

#[test]
fn files_that_cannot_be_used_are_named() {
    let folder = tempfile::tempdir().unwrap();
    let missing = folder.path().join("missing.jsonl");
    let output = folder.path().join("out.jsonl");
    let (code, stderr) = batch(&missing, &output);
    assert_eq!(code, Some(1));
    assert!(stderr.contains("missing.jsonl"), "{stderr}");
    assert!(!output.exists());

    std::fs::write(&missing, completion("a", 1)).unwrap();
    for precious in ["precious notes\n", "precious notes", "{\"a\":1}\n"] {
        std::fs::write(&output, precious).unwrap();
        let (code, stderr) = batch(&missing, &output);
        assert_eq!(code, Some(1), "{stderr}");
        assert_eq!(std::fs::read_to_string(&output).unwrap(), precious);
    }
}

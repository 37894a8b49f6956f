//! Anthropic's and Ollama's wire formats, and the utilities.

mod common;

use common::{Server, merge, names};
use serde_json::{Value, json};

fn message(extra: Value) -> Value {
    let mut body = json!({
        "model": "builtin", "max_tokens": 6, "temperature": 0,
        "messages": [{"role": "user", "content": "Once upon a time"}],
    });
    merge(&mut body, extra);
    body
}

#[tokio::test]
async fn an_anthropic_message_has_its_shape_and_its_stream_its_order() {
    let server = Server::start().await;
    let whole = server.post("/v1/messages", message(json!({}))).await.json();
    let fields =
        ["id", "type", "role", "model", "content", "stop_reason", "stop_sequence", "usage"];
    assert_eq!(names(&whole), fields);
    assert_eq!((&whole["type"], &whole["stop_reason"]), (&json!("message"), &json!("max_tokens")));
    let answer = server.post("/v1/messages", message(json!({"stream": true}))).await;
    let kinds: Vec<&str> =
        answer.text.lines().filter_map(|line| line.strip_prefix("event: ")).collect();
    let events: Vec<Value> =
        answer.events().iter().map(|event| serde_json::from_str(event).unwrap()).collect();
    for (kind, event) in kinds.iter().zip(&events) {
        assert_eq!(event["type"], *kind);
    }
    let mut order = kinds.clone();
    order.dedup();
    assert_eq!(
        order,
        [
            "message_start",
            "content_block_start",
            "content_block_delta",
            "content_block_stop",
            "message_delta",
            "message_stop",
        ]
    );
    let text: String = events.iter().filter_map(|event| event["delta"]["text"].as_str()).collect();
    assert_eq!(whole["content"][0]["text"], text);
    let count =
        json!({"model": "builtin", "messages": [{"role": "user", "content": "Once upon a time"}]});
    let counted = server.post("/v1/messages/count_tokens", count).await.json();
    assert_eq!(counted["input_tokens"], events[0]["message"]["usage"]["input_tokens"]);
}

#[tokio::test]
async fn anthropic_errors_are_anthropics() {
    let server = Server::start().await;
    let answer = server.post("/v1/messages", message(json!({"top_a": 1}))).await;
    assert_eq!(answer.status, 400);
    let body = answer.json();
    assert_eq!(names(&body), ["type", "error", "request_id"]);
    assert_eq!(body["error"]["type"], "invalid_request_error");
    assert!(body["error"]["message"].as_str().unwrap().contains("top_a"));
    assert_eq!(body["request_id"], answer.headers["request-id"].to_str().unwrap());
    for bad in [
        json!({"max_tokens": 0}),
        json!({"messages": []}),
        json!({"messages": [{"role": "user", "content": [{"type": "image", "source": {}}]}]}),
        json!({"messages": [{"role": "user", "content": [
            {"type": "tool_result", "tool_use_id": "nobody", "content": "x"}]}]}),
        json!({"temperature": 1.5}),
        json!({"tool_choice": {"type": "any"}}),
        json!({"thinking": {"type": "enabled", "budget_tokens": 1024}}),
    ] {
        assert_eq!(server.post("/v1/messages", message(bad.clone())).await.status, 400, "{bad}");
    }
}

#[tokio::test]
async fn ollama_chats_and_generates_line_by_line() {
    let server = Server::start().await;
    let options = json!({"num_predict": 6, "temperature": 0});
    let request = json!({
        "model": "builtin:latest", "options": options,
        "messages": [{"role": "user", "content": "Once upon a time"}],
    });
    let answer = server.post("/api/chat", request).await;
    assert_eq!(answer.headers["content-type"], "application/x-ndjson");
    let lines: Vec<Value> =
        answer.text.lines().map(|line| serde_json::from_str(line).unwrap()).collect();
    let (last, pieces) = lines.split_last().unwrap();
    assert!(pieces.iter().all(|line| line["done"] == false));
    assert_eq!((&last["done"], &last["done_reason"]), (&json!(true), &json!("length")));
    assert_eq!(last["eval_count"], 6);
    let text: String =
        pieces.iter().map(|line| line["message"]["content"].as_str().unwrap()).collect();
    let request = json!({
        "model": "builtin", "prompt": "Once upon a time", "stream": false, "options": options,
    });
    let whole = server.post("/api/generate", request).await.json();
    assert_eq!(whole["response"], text);
    let load = server.post("/api/generate", json!({"model": "builtin"})).await.json();
    assert_eq!((&load["done_reason"], &load["response"]), (&json!("load"), &json!("")));
}

#[tokio::test]
async fn ollama_lists_shows_and_embeds() {
    let server = Server::start().await;
    assert!(server.get("/api/version").await.json()["version"].is_string());
    assert_eq!(server.get("/api/ps").await.json()["models"], json!([]));
    let show = server.post("/api/show", json!({"model": "builtin"})).await.json();
    assert!(show["model_info"]["general.parameter_count"].as_u64().unwrap() > 1_000_000);
    assert_eq!(server.get("/api/ps").await.json()["models"][0]["name"], "builtin");
    assert_eq!(server.get("/api/tags").await.json()["models"][0]["model"], "builtin");
    let embed = server.post("/api/embed", json!({"model": "builtin", "input": ["a", "b"]})).await;
    assert_eq!(embed.json()["embeddings"].as_array().unwrap().len(), 2);
    let error = server.post("/api/chat", json!({"model": "none", "messages": []})).await;
    assert_eq!(error.status, 404);
    assert_eq!(names(&error.json()), ["error"]);
}

#[tokio::test]
async fn ollama_chooses_how_long_a_model_stays() {
    let server = Server::start().await;
    let loaded = async || {
        let list = server.get("/api/ps").await.json();
        list["models"].get(0).map(|model| model["expires_at"].as_str().unwrap().to_owned())
    };
    let generate = async |keep_alive: Value| {
        let request = json!({
            "model": "builtin", "prompt": "Once", "stream": false, "keep_alive": keep_alive,
            "options": {"num_predict": 2},
        });
        let answer = server.post("/api/generate", request).await;
        assert_eq!(answer.status, 200, "{}", answer.text);
    };
    generate(Value::Null).await;
    assert!(loaded().await.unwrap().starts_with("9999"), "by default until room is needed");
    generate(json!("1h")).await;
    assert!(loaded().await.unwrap().starts_with("2"), "the time is told");
    generate(json!(-1)).await;
    assert!(loaded().await.unwrap().starts_with("9999"));
    generate(json!(0)).await;
    assert_eq!(loaded().await, None);
    // While someone else uses it, it stays; a streamed request of another client is such a use.
    let stream = json!({"stream": true, "max_tokens": 500, "ignore_eos": true});
    let open = hyper::Request::post("/v1/completions").header("content-type", "application/json");
    let body = common::completion(stream).to_string();
    let other = server.open(open, body.into()).await;
    let unload = json!({"model": "builtin", "messages": [], "keep_alive": 0});
    let answer = server.post("/api/chat", unload).await.json();
    assert_eq!(answer["done_reason"], "unload");
    assert!(loaded().await.is_some(), "in use");
    drop(other);
    for _ in 0..500 {
        if loaded().await.is_none() {
            break;
        }
        tokio::time::sleep(std::time::Duration::from_millis(10)).await;
    }
    assert_eq!(loaded().await, None);
    // Embeddings and short times; the next load has the default again.
    let embed = json!({"model": "builtin", "input": "a", "keep_alive": "50ms"});
    assert_eq!(server.post("/api/embed", embed).await.status, 200);
    tokio::time::sleep(std::time::Duration::from_millis(300)).await;
    assert_eq!(loaded().await, None);
    generate(Value::Null).await;
    assert!(loaded().await.unwrap().starts_with("9999"));
    for bad in [json!("soon"), json!(""), json!(true), json!({})] {
        let request = json!({"model": "builtin", "prompt": "x", "keep_alive": bad});
        let answer = server.post("/api/generate", request).await;
        assert_eq!(answer.status, 400, "{bad}");
        assert!(answer.json()["error"].as_str().unwrap().contains("keep_alive"), "{bad}");
    }
}

#[tokio::test]
async fn texts_survive_the_tokenizer() {
    let server = Server::start().await;
    let text = "Once upon a time — 你好 <|endoftext|>";
    let tokens =
        server.post("/tokenize", json!({"content": text, "with_pieces": true})).await.json();
    assert_eq!(
        tokens["pieces"].as_array().unwrap().len(),
        tokens["count"].as_u64().unwrap() as usize
    );
    let info = server.get("/tokenizer_info").await.json();
    let eos = json!({"prompt": info["eos_token"], "add_special_tokens": false});
    assert_eq!(server.post("/tokenize", eos).await.json()["count"], 1, "{info}");
    assert_eq!(server.get("/tokenizer_info?model=none").await.status, 404);
    assert_eq!(server.get("/tokenizer_info?x=1").await.status, 400);
    let back = server.post("/detokenize", json!({"tokens": tokens["tokens"]})).await.json();
    assert_eq!(back["content"], text);
    let parsed = json!({"content": "<|endoftext|>", "parse_special": true});
    assert_eq!(server.post("/tokenize", parsed).await.json()["count"], 1);
    let messages =
        json!([{"role": "user", "content": "Hello"}, {"role": "user", "content": "you"}]);
    let prompt = server.post("/apply-template", json!({"messages": messages})).await.json();
    assert_eq!(prompt["prompt"], "Hello\nyou");
    let bad = server.post("/detokenize", json!({"tokens": [4096]})).await;
    assert_eq!((bad.status.as_u16(), &bad.json()["error"]["param"]), (400, &json!("tokens")));
}

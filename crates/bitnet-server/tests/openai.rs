//! OpenAI's wire format: shapes of answers and order of streams.

mod common;

use common::{Server, chat, completion, names};
use serde_json::{Value, json};

#[tokio::test]
async fn a_chat_answer_has_the_contracts_shape() {
    let server = Server::start().await;
    let answer = server.post("/v1/chat/completions", chat(json!({}))).await;
    assert_eq!(answer.status, 200, "{}", answer.text);
    let body = answer.json();
    let fields = ["id", "object", "created", "model", "system_fingerprint", "choices", "usage"];
    assert_eq!(names(&body), fields);
    assert_eq!((&body["object"], &body["model"]), (&json!("chat.completion"), &json!("builtin")));
    let choice = &body["choices"][0];
    assert_eq!(names(choice), ["index", "message", "logprobs", "finish_reason"]);
    assert_eq!(names(&choice["message"]), ["role", "content", "refusal"]);
    assert!(choice["logprobs"].is_null() && choice["message"]["refusal"].is_null());
    assert_eq!(choice["finish_reason"], "length");
    assert!(!choice["message"]["content"].as_str().unwrap().is_empty());
    let usage = &body["usage"];
    assert_eq!(usage["completion_tokens"], 8);
    let sum = usage["prompt_tokens"].as_u64().unwrap() + 8;
    assert_eq!(usage["total_tokens"], sum);
    assert!(answer.headers.contains_key("x-request-id"));
}

#[tokio::test]
async fn a_chat_stream_has_the_contracts_order() {
    let server = Server::start().await;
    let whole = server.post("/v1/chat/completions", chat(json!({}))).await.json();
    let request = chat(json!({"stream": true, "stream_options": {"include_usage": true}}));
    let answer = server.post("/v1/chat/completions", request).await;
    assert!(answer.headers["content-type"].to_str().unwrap().starts_with("text/event-stream"));
    let chunks = answer.chunks();
    let (last, chunks) = chunks.split_last().unwrap();
    assert_eq!(last["choices"], json!([]));
    assert_eq!(last["usage"]["completion_tokens"], 8);
    let first = &chunks[0]["choices"][0]["delta"];
    assert_eq!(first, &json!({"role": "assistant", "content": null}));
    let mut text = String::new();
    for (i, chunk) in chunks.iter().enumerate() {
        assert_eq!(chunk["id"], last["id"]);
        assert_eq!(chunk["object"], "chat.completion.chunk");
        assert!(chunk.as_object().unwrap().contains_key("usage") && chunk["usage"].is_null());
        let choice = &chunk["choices"][0];
        assert_eq!(names(choice), ["index", "delta", "logprobs", "finish_reason"]);
        assert_eq!(choice["delta"].get("role").is_some(), i == 0);
        let is_last = i + 1 == chunks.len();
        assert_eq!(choice["finish_reason"].is_null(), !is_last, "{chunk}");
        if is_last {
            assert_eq!(choice["delta"], json!({}));
        }
        text.push_str(choice["delta"]["content"].as_str().unwrap_or_default());
    }
    assert_eq!(json!(text), whole["choices"][0]["message"]["content"]);
}

#[tokio::test]
async fn usage_may_be_counted_in_every_chunk() {
    let server = Server::start().await;
    let options = json!({"include_usage": true, "continuous_usage_stats": true});
    let fields = json!({"stream": true, "stream_options": options, "ignore_eos": true});
    for (path, body) in [
        ("/v1/chat/completions", chat(fields.clone())),
        ("/v1/completions", completion(fields.clone())),
    ] {
        let chunks = server.post(path, body).await.chunks();
        let counts: Vec<u64> = chunks
            .iter()
            .map(|chunk| chunk["usage"]["completion_tokens"].as_u64().unwrap())
            .collect();
        assert!(counts.is_sorted(), "{counts:?}");
        assert_eq!(counts.last(), Some(&8));
        assert!(counts.contains(&4), "{counts:?}");
    }
    let alone = json!({"stream": true, "stream_options": {"continuous_usage_stats": true}});
    let answer = server.post("/v1/chat/completions", chat(alone)).await;
    assert_eq!(answer.json()["error"]["param"], "stream_options.continuous_usage_stats");
}

#[tokio::test]
async fn without_include_usage_chunks_have_no_usage() {
    let server = Server::start().await;
    let answer = server.post("/v1/chat/completions", chat(json!({"stream": true}))).await;
    let chunks = answer.chunks();
    assert!(chunks.iter().all(|chunk| chunk.get("usage").is_none()));
    assert!(chunks.iter().all(|chunk| chunk["choices"].as_array().unwrap().len() == 1));
}

#[tokio::test]
async fn choices_are_independent_and_seeded() {
    let server = Server::start().await;
    let request = |n: u32| chat(json!({"n": n, "seed": 7, "temperature": 1, "max_tokens": 12}));
    let one = server.post("/v1/chat/completions", request(1)).await.json();
    let three = server.post("/v1/chat/completions", request(3)).await.json();
    let again = server.post("/v1/chat/completions", request(3)).await.json();
    assert_eq!(three["choices"], again["choices"]);
    assert_eq!(one["choices"][0], three["choices"][0]);
    let texts: Vec<&Value> = (0..3).map(|i| &three["choices"][i]["message"]["content"]).collect();
    assert!(texts[0] != texts[1] && texts[1] != texts[2], "{texts:?}");
    assert_eq!(three["usage"]["prompt_tokens"], one["usage"]["prompt_tokens"]);
    assert_eq!(three["usage"]["completion_tokens"], 36);
}

#[tokio::test]
async fn log_probabilities_come_with_bytes_and_alternatives() {
    let server = Server::start().await;
    let request = chat(json!({"logprobs": true, "top_logprobs": 3}));
    let body = server.post("/v1/chat/completions", request).await.json();
    let choice = &body["choices"][0];
    let content = choice["logprobs"]["content"].as_array().unwrap();
    assert_eq!(content.len(), 8);
    let mut bytes = Vec::new();
    for token in content {
        assert_eq!(names(token), ["token", "logprob", "bytes", "top_logprobs"]);
        let top = token["top_logprobs"].as_array().unwrap();
        assert_eq!(top.len(), 3);
        // Temperature 0 takes the likeliest token.
        assert_eq!(top[0]["logprob"], token["logprob"]);
        assert!(top[0]["logprob"].as_f64() >= top[1]["logprob"].as_f64());
        bytes.extend(token["bytes"].as_array().unwrap().iter().map(|b| b.as_u64().unwrap() as u8));
    }
    assert_eq!(String::from_utf8(bytes).unwrap(), choice["message"]["content"].as_str().unwrap());
}

#[tokio::test]
async fn stop_strings_bias_and_bans_work() {
    let server = Server::start().await;
    let free = server.post("/v1/completions", completion(json!({"max_tokens": 40}))).await.json();
    let text = free["choices"][0]["text"].as_str().unwrap().to_owned();
    let word = text.split_whitespace().nth(3).unwrap();
    let request = completion(json!({"max_tokens": 40, "stop": [word]}));
    let stopped = server.post("/v1/completions", request).await.json();
    assert_eq!(stopped["choices"][0]["finish_reason"], "stop");
    let before = &text[..text.find(word).unwrap()];
    assert_eq!(stopped["choices"][0]["text"], before);

    let forced = completion(json!({"logit_bias": {"17": 100}, "max_tokens": 3, "logprobs": 0}));
    let forced = server.post("/v1/completions", forced).await.json();
    let tokens = forced["choices"][0]["logprobs"]["tokens"].as_array().unwrap();
    assert!(tokens.iter().all(|token| token == &tokens[0]), "{tokens:?}");
}

#[tokio::test]
async fn echo_and_logprobs_score_a_prompt() {
    let server = Server::start().await;
    let tokens = server.post("/tokenize", json!({"content": "Once upon a time"})).await.json();
    let request = completion(json!({
        "prompt": tokens["tokens"], "echo": true, "logprobs": 1, "max_tokens": 1,
    }));
    let body = server.post("/v1/completions", request).await.json();
    let choice = &body["choices"][0];
    let logprobs = &choice["logprobs"];
    let n = tokens["count"].as_u64().unwrap() as usize + 1;
    for list in ["tokens", "token_logprobs", "top_logprobs", "text_offset"] {
        assert_eq!(logprobs[list].as_array().unwrap().len(), n, "{list}");
    }
    assert!(logprobs["token_logprobs"][0].is_null() && logprobs["top_logprobs"][0].is_null());
    assert!(logprobs["token_logprobs"][1].as_f64().unwrap() < 0.0);
    let joined: String =
        logprobs["tokens"].as_array().unwrap().iter().map(|t| t.as_str().unwrap()).collect();
    assert_eq!(joined, choice["text"].as_str().unwrap());
    assert!(choice["text"].as_str().unwrap().starts_with("Once upon a time"));
    let text: Vec<char> = joined.chars().collect();
    for (offset, token) in logprobs["text_offset"]
        .as_array()
        .unwrap()
        .iter()
        .zip(logprobs["tokens"].as_array().unwrap())
    {
        let (offset, token) = (offset.as_u64().unwrap() as usize, token.as_str().unwrap());
        let end = offset + token.chars().count();
        assert_eq!(text[offset..end].iter().collect::<String>(), token);
    }
    // What greedy decoding chose is the likeliest, so its logprob is the top one.
    let last = &logprobs["top_logprobs"][n - 1];
    let best =
        last.as_object().unwrap().values().filter_map(Value::as_f64).fold(f64::MIN, f64::max);
    assert_eq!(logprobs["token_logprobs"][n - 1].as_f64().unwrap(), best);

    let nothing = completion(json!({"echo": true, "logprobs": 0, "max_tokens": 0}));
    let body = server.post("/v1/completions", nothing).await.json();
    assert_eq!(body["choices"][0]["text"], "Once upon a time");
    assert_eq!(body["usage"]["completion_tokens"], 0);
}

#[tokio::test]
async fn prompts_come_in_lists_and_streams_agree_with_wholes() {
    let server = Server::start().await;
    let request = json!({"prompt": ["Once upon", "The king"], "n": 2, "echo": true, "logprobs": 2});
    let whole = server.post("/v1/completions", completion(request.clone())).await.json();
    assert_eq!(whole["choices"].as_array().unwrap().len(), 4);
    for (i, prompt) in ["Once upon", "Once upon", "The king", "The king"].iter().enumerate() {
        assert_eq!(whole["choices"][i]["index"], i);
        assert!(whole["choices"][i]["text"].as_str().unwrap().starts_with(prompt));
    }
    let mut streamed = request;
    streamed["stream"] = json!(true);
    let chunks = server.post("/v1/completions", completion(streamed)).await.chunks();
    let mut texts = vec![String::new(); 4];
    for chunk in &chunks {
        let choice = &chunk["choices"][0];
        texts[choice["index"].as_u64().unwrap() as usize]
            .push_str(choice["text"].as_str().unwrap());
    }
    for (i, text) in texts.iter().enumerate() {
        assert_eq!(&whole["choices"][i]["text"], text);
    }
}

#[tokio::test]
async fn models_are_listed_and_unknown_ones_are_404() {
    let server = Server::start().await;
    let list = server.get("/v1/models").await.json();
    assert_eq!((&list["object"], &list["data"][0]["id"]), (&json!("list"), &json!("builtin")));
    assert!(list["data"][0]["meta"].is_null(), "nothing is loaded before it is needed");
    server.post("/v1/completions", completion(json!({"max_tokens": 1}))).await;
    let model = server.get("/v1/models/builtin").await.json();
    assert_eq!((&model["object"], &model["meta"]["n_vocab"]), (&json!("model"), &json!(4096)));
    for answer in [
        server.get("/v1/models/none").await,
        server.post("/v1/chat/completions", chat(json!({"model": "none"}))).await,
    ] {
        assert_eq!(answer.status, 404);
        let error = &answer.json()["error"];
        assert_eq!(names(error), ["message", "type", "param", "code"]);
        assert_eq!(error["code"], "model_not_found");
    }
}

#[tokio::test]
async fn embeddings_are_unit_vectors_in_both_forms() {
    let server = Server::start().await;
    let request = json!({"model": "builtin", "input": ["a cat", "a dog"]});
    let body = server.post("/v1/embeddings", request).await.json();
    let vector: Vec<f64> = body["data"][1]["embedding"]
        .as_array()
        .unwrap()
        .iter()
        .map(|x| x.as_f64().unwrap())
        .collect();
    assert_eq!(vector.len(), 256);
    assert!((vector.iter().map(|x| x * x).sum::<f64>() - 1.0).abs() < 1e-4);
    let request = json!({"model": "builtin", "input": "a dog", "encoding_format": "base64", "pooling": "mean"});
    let base64 = server.post("/v1/embeddings", request).await.json();
    // 256 floats of 4 bytes in base64.
    assert_eq!(base64["data"][0]["embedding"].as_str().unwrap().len(), 1368);
    let other = json!({"model": "builtin", "input": "a dog", "dimensions": 12});
    let answer = server.post("/v1/embeddings", other).await;
    assert_eq!(
        (answer.status.as_u16(), &answer.json()["error"]["param"]),
        (400, &json!("dimensions"))
    );
}

#[tokio::test]
async fn a_response_streams_its_events_in_order() {
    let server = Server::start().await;
    let request = json!({
        "model": "builtin", "input": "Once upon a time", "max_output_tokens": 6, "temperature": 0,
        "instructions": "Tell a story.",
    });
    let whole = server.post("/v1/responses", request.clone()).await.json();
    assert_eq!((&whole["object"], &whole["status"]), (&json!("response"), &json!("incomplete")));
    assert_eq!(whole["incomplete_details"]["reason"], "max_output_tokens");
    assert_eq!(whole["store"], false);
    let mut streamed = request;
    streamed["stream"] = json!(true);
    let answer = server.post("/v1/responses", streamed).await;
    let events: Vec<Value> =
        answer.events().iter().map(|event| serde_json::from_str(event).unwrap()).collect();
    let mut kinds: Vec<&str> = events.iter().map(|event| event["type"].as_str().unwrap()).collect();
    for (i, event) in events.iter().enumerate() {
        assert_eq!(event["sequence_number"], i);
    }
    let last = events.last().unwrap();
    let text: String = events
        .iter()
        .filter(|event| event["type"] == "response.output_text.delta")
        .map(|event| event["delta"].as_str().unwrap())
        .collect();
    assert_eq!(last["response"]["output"][0]["content"][0]["text"], text);
    assert_eq!(whole["output"][0]["content"][0]["text"], text);
    kinds.dedup();
    assert_eq!(
        kinds,
        [
            "response.created",
            "response.in_progress",
            "response.output_item.added",
            "response.content_part.added",
            "response.output_text.delta",
            "response.output_text.done",
            "response.content_part.done",
            "response.output_item.done",
            "response.incomplete",
        ]
    );
}

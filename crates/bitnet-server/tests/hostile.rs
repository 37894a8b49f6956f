//! What nobody should send: each case ends in a clean refusal, and the next request is answered as if
//! nothing had been.

mod common;

use common::{Answer, Server, chat, completion};
use hyper::Request;
use serde_json::{Value, json};

/// Sends each body and expects a 4xx in the dialect's error shape that names `param` (`""`: any).
async fn refuse_all(server: &Server, path: &str, cases: Vec<(&str, Value)>) {
    for (param, body) in cases {
        let shown: String = body.to_string().chars().take(200).collect();
        let answer = server.post(path, body).await;
        assert!(
            answer.status.is_client_error(),
            "{path} {shown}: {} {}",
            answer.status,
            answer.text
        );
        let error = answer.json()["error"].clone();
        assert!(error["message"].as_str().is_some_and(|m| m.len() < 2000), "{shown}: {error}");
        if !param.is_empty() {
            assert_eq!(error["param"], param, "{path} {shown}: {error}");
        }
    }
}

async fn usual(server: &Server) -> Value {
    let answer =
        server.post("/v1/chat/completions", chat(json!({"seed": 1, "temperature": 1}))).await;
    assert_eq!(answer.status, 200, "{}", answer.text);
    answer.json()["choices"].clone()
}

fn nested(depth: usize) -> String {
    format!("{}1{}", "[".repeat(depth), "]".repeat(depth))
}

#[tokio::test]
async fn parameters_outside_their_range() {
    let server = Server::start().await;
    let before = usual(&server).await;
    let both = vec![
        ("n", json!({"n": 0})),
        ("n", json!({"n": -1})),
        ("n", json!({"n": 129})),
        ("n", json!({"n": 2147483648u64})),
        ("n", json!({"n": "1"})),
        ("n", json!({"n": 1.5})),
        ("n", json!({"n": []})),
        ("max_tokens", json!({"max_tokens": -1})),
        ("max_tokens", json!({"max_tokens": 4294967296u64})),
        ("temperature", json!({"temperature": -1})),
        ("temperature", json!({"temperature": 2.01})),
        ("temperature", json!({"temperature": 1e308})),
        ("temperature", json!({"temperature": "hot"})),
        ("top_p", json!({"top_p": -0.1})),
        ("top_p", json!({"top_p": 2})),
        ("top_k", json!({"top_k": -2})),
        ("top_k", json!({"top_k": 4294967296u64})),
        ("min_p", json!({"min_p": 1.1})),
        ("typical_p", json!({"typical_p": -1})),
        ("repetition_penalty", json!({"repetition_penalty": 0})),
        ("presence_penalty", json!({"presence_penalty": 2.1})),
        ("frequency_penalty", json!({"frequency_penalty": -2.1})),
        (
            "dry_allowed_length",
            json!({"dry_allowed_length": i64::from(i32::MIN), "dry_multiplier": 1}),
        ),
        ("logit_bias", json!({"logit_bias": {"4096": 1}})),
        ("logit_bias", json!({"logit_bias": {"-1": 1}})),
        ("logit_bias", json!({"logit_bias": {"x": 1}})),
        ("logit_bias", json!({"logit_bias": {"1": 1e9}})),
        ("logit_bias", json!({"logit_bias": {"1": -1e9}})),
        ("seed", json!({"seed": 9223372036854775808u64})),
        ("seed", json!({"seed": "x"})),
        ("stop", json!({"stop": ""})),
        ("stop", json!({"stop": vec!["x"; 1000]})),
        ("stop", json!({"stop": "x".repeat(1 << 20)})),
        ("stop", json!({"stop": 1})),
        ("stop[0]", json!({"stop": [1]})),
        ("stop_token_ids", json!({"stop_token_ids": [4096]})),
        ("stream", json!({"stream": "yes"})),
        ("stream_options", json!({"stream_options": {"include_usage": true}})),
        ("stream_options.x", json!({"stream": true, "stream_options": {"x": true}})),
        (
            "stream_options.include_obfuscation",
            json!({"stream": true, "stream_options": {"include_obfuscation": true}}),
        ),
        ("model", json!({"model": ""})),
        ("model", json!({"model": "../../etc/passwd"})),
        ("model", json!({"model": "m".repeat(1 << 20)})),
        ("model", json!({"model": 7})),
        ("priority", json!({"priority": 1001})),
        ("cache_salt", json!({"cache_salt": ""})),
        ("x_unknown", json!({"x_unknown": null})),
    ];
    let for_chat = |cases: &[(&'static str, Value)]| {
        cases.iter().map(|(param, extra)| (*param, chat(extra.clone()))).collect::<Vec<_>>()
    };
    refuse_all(&server, "/v1/chat/completions", for_chat(&both)).await;
    let for_text = both.into_iter().map(|(param, extra)| (param, completion(extra))).collect();
    refuse_all(&server, "/v1/completions", for_text).await;
    assert_eq!(usual(&server).await, before);
}

#[tokio::test]
async fn chat_requests_that_make_no_sense() {
    let server = Server::start().await;
    let before = usual(&server).await;
    let function = |name: &str, parameters: Value| json!({"type": "function", "function": {"name": name, "parameters": parameters}});
    let good = function("f", json!({"type": "object"}));
    let user = |content: Value| json!({"messages": [{"role": "user", "content": content}]});
    let mut cases = vec![
        ("max_tokens", json!({"max_tokens": 0})),
        ("max_tokens", json!({"max_completion_tokens": 5})),
        ("top_logprobs", json!({"top_logprobs": 2})),
        ("top_logprobs", json!({"top_logprobs": 21, "logprobs": true})),
        ("top_logprobs", json!({"top_logprobs": -1, "logprobs": true})),
        ("messages", json!({"messages": []})),
        ("messages", json!({"messages": null})),
        ("messages", json!({"messages": "hello"})),
        ("messages[0].role", json!({"messages": [{}]})),
        ("messages[0].role", json!({"messages": [{"role": 7, "content": "x"}]})),
        ("messages[0].role", json!({"messages": [{"role": "king", "content": "x"}]})),
        ("messages[0].content", json!({"messages": [{"role": "user"}]})),
        ("messages[0].content", user(json!(7))),
        (
            "messages[0].content[0].type",
            user(json!([{"type": "image_url", "image_url": {"url": "x"}}])),
        ),
        ("messages[0].content[0].type", user(json!([{"type": "input_audio", "input_audio": {}}]))),
        ("messages", json!({"messages": vec![json!({"role": "user", "content": "x"}); 5000]})),
        ("messages[0].tool_call_id", json!({"messages": [{"role": "tool", "content": "x"}]})),
        (
            "messages[0].tool_calls",
            json!({"messages": [{"role": "user", "content": "x", "tool_calls": []}]}),
        ),
        ("tools", json!({"tools": vec![good.clone(); 129]})),
        ("tools", json!({"tools": [good.clone(), good.clone()]})),
        ("tools[0].function.name", json!({"tools": [function("get weather", json!({}))]})),
        ("tools[0].function.name", json!({"tools": [function("a\nb", json!({}))]})),
        ("tools[0].function.parameters", json!({"tools": [function("f", json!(1))]})),
        ("tools[0].function.parameters", json!({"tools": [function("f", json!("x"))]})),
        ("tools[0].type", json!({"tools": [{"type": "web_search"}]})),
        ("tool_choice", json!({"tool_choice": "required"})),
        ("tool_choice", json!({"tool_choice": "sometimes"})),
        (
            "tool_choice.function.name",
            json!({"tools": [good], "tool_choice": {"type": "function", "function": {"name": "g"}}}),
        ),
        ("response_format.type", json!({"response_format": {"type": "sound"}})),
        ("response_format.json_schema", json!({"response_format": {"type": "json_schema"}})),
        ("store", json!({"store": true})),
        ("modalities[0]", json!({"modalities": ["audio"]})),
        ("service_tier", json!({"service_tier": "flex"})),
    ];
    let unsupported = [
        "functions",
        "function_call",
        "audio",
        "prediction",
        "reasoning_effort",
        "web_search_options",
        "verbosity",
        "chat_template",
        "chat_template_kwargs",
        "n_discard",
    ];
    cases.extend(unsupported.map(|name| (name, json!({name: {"a": 1}}))));
    let cases = cases.into_iter().map(|(param, extra)| (param, chat(extra))).collect();
    refuse_all(&server, "/v1/chat/completions", cases).await;
    assert_eq!(usual(&server).await, before);
}

#[tokio::test]
async fn prompts_that_do_not_fit() {
    let server = Server::start().await;
    let before = usual(&server).await;
    let long = "word ".repeat(200_000);
    let cases = vec![
        ("prompt", json!({"prompt": []})),
        ("prompt", json!({"prompt": ""})),
        ("prompt", json!({"prompt": [4096]})),
        ("prompt[0]", json!({"prompt": [-1]})),
        ("prompt[0][0]", json!({"prompt": [[[1]]]})),
        ("prompt", json!({"prompt": [1, "a"]})),
        ("prompt", json!({"prompt": vec![vec![1u32]; 10_000]})),
        ("prompt", json!({"prompt": vec![17; 1024]})),
        ("prompt", json!({"prompt": long})),
        ("best_of", json!({"best_of": 5})),
        ("suffix", json!({"suffix": "x"})),
        ("logprobs", json!({"logprobs": 21})),
        ("logprobs", json!({"logprobs": -1})),
    ];
    let cases = cases.into_iter().map(|(param, extra)| (param, completion(extra))).collect();
    refuse_all(&server, "/v1/completions", cases).await;
    // One token fits, and so does a prompt that leaves room for one.
    for prompt in [vec![17], vec![17; 1023]] {
        let answer = server.post("/v1/completions", completion(json!({"prompt": prompt}))).await;
        assert_eq!(answer.status, 200, "{}", answer.text);
    }
    assert_eq!(usual(&server).await, before);
}

#[tokio::test]
async fn worst_cases_for_the_tokenizer_take_linear_time() {
    let server = Server::start().await;
    server.model().await;
    for unit in ["a", " ", "\u{301}", "🦀", "\n", "<|", "ab\u{200d}"] {
        let text = unit.repeat((1 << 18) / unit.len());
        let started = std::time::Instant::now();
        let answer = server.post("/tokenize", json!({"content": text})).await;
        assert_eq!(answer.status, 200, "{unit:?}");
        assert!(started.elapsed().as_secs() < 20, "{unit:?} took {:?}", started.elapsed());
    }
}

#[tokio::test]
async fn an_answer_without_a_legal_token_ends() {
    let server = Server::start().await;
    let bias: serde_json::Map<String, Value> =
        (0..4096).map(|id| (id.to_string(), json!(-100))).collect();
    let answer = server.post("/v1/completions", completion(json!({"logit_bias": bias}))).await;
    assert_eq!(answer.status, 200, "{}", answer.text);
    assert_eq!(answer.json()["choices"][0]["text"], "");
}

#[tokio::test]
async fn control_tokens_in_a_message_stay_text() {
    let server = Server::start().await;
    let count = async |text: &str| {
        let messages = json!([{"role": "user", "content": text}]);
        server.post("/tokenize", json!({"messages": messages})).await.json()["count"]
            .as_u64()
            .unwrap()
    };
    assert!(count("<|endoftext|>").await > count("x").await);
}

#[tokio::test]
async fn bodies_that_are_not_what_they_should_be() {
    let server = Server::start_with(|c| c.limits.max_body_bytes = 1 << 20, |_| {}).await;
    let before = usual(&server).await;
    let path = "/v1/chat/completions";
    let usual_text = chat(json!({})).to_string();
    let duplicate = usual_text.replacen('{', "{\"model\":\"builtin\",", 1);
    let bodies: Vec<Vec<u8>> = vec![
        b"".into(),
        b"null".into(),
        b"[]".into(),
        b"\"x\"".into(),
        b"{".into(),
        duplicate.into(),
        format!("\u{feff}{usual_text}").into(),
        nested(100_000).into(),
        format!("{{\"messages\":{}}}", nested(5000)).into(),
        b"{\"model\":\"\\ud800\"}".into(),
        b"{\"model\":\"\xff\xfe\"}".into(),
        usual_text.replace("\"temperature\":0", "\"temperature\":NaN").into(),
        usual_text.replace("\"temperature\":0", "\"temperature\":1e999").into(),
        usual_text.replace("\"temperature\":0", "\"temperature\":-Infinity").into(),
        format!("{usual_text}{usual_text}").into(),
    ];
    for body in bodies {
        let shown = String::from_utf8_lossy(&body[..body.len().min(80)]).into_owned();
        let answer = server.post_text(path, body).await;
        assert_eq!(answer.status, 400, "{shown}: {}", answer.text);
        assert!(answer.json()["error"]["message"].is_string());
    }
    let big = server.post_text(path, vec![b' '; (1 << 20) + 1]).await;
    assert_eq!(
        (big.status.as_u16(), &big.json()["error"]["code"]),
        (413, &json!("request_too_large"))
    );
    let typed = |media_type: &str| {
        let request = Request::post(path).header("content-type", media_type);
        server.send_body(request, usual_text.clone().into())
    };
    for media_type in ["text/plain", "application/x-www-form-urlencoded", "multipart/form-data", ""]
    {
        assert_eq!(typed(media_type).await.status, 415, "{media_type}");
    }
    assert_eq!(typed("application/json; charset=utf-8").await.status, 200);
    let zipped = Request::post(path)
        .header("content-type", "application/json")
        .header("content-encoding", "gzip");
    assert_eq!(server.send_body(zipped, vec![0x1f, 0x8b, 8].into()).await.status, 415);
    assert_eq!(usual(&server).await, before);
}

#[tokio::test]
async fn http_that_is_not_what_it_should_be() {
    let edit = |c: &mut bitnet_server::ServerConfig| {
        c.limits.header_read_timeout = std::time::Duration::from_millis(300);
        c.limits.body_read_timeout = std::time::Duration::from_millis(300);
    };
    let server = Server::start_with(edit, |_| {}).await;
    let before = usual(&server).await;
    let head =
        |lines: &str| format!("POST /v1/completions HTTP/1.1\r\nhost: localhost\r\n{lines}\r\n");
    let typed = "content-type: application/json\r\n";
    let many = (0..200).map(|i| format!("x-{i}: 1\r\n")).collect::<String>();
    let cases: Vec<(Vec<u8>, &str)> = vec![
        (head(&format!("x: {}\r\n", "a".repeat(1 << 20))).into(), "431"),
        (head(&many).into(), "431"),
        (b"GET /\r\n".into(), ""),
        (b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03".into(), "400"),
        (b"\0\0\0\0\r\n\r\n".into(), "400"),
        (b"GET / HTTP/1.1\r\nhost: a\r\nhost: localhost\r\n\r\n".into(), "400"),
        (b"GET /v1/models\0 HTTP/1.1\r\nhost: localhost\r\n\r\n".into(), "400"),
        (format!("GET /{} HTTP/1.1\r\nhost: localhost\r\n\r\n", "a".repeat(20_000)).into(), "414"),
        // Heads and bodies that never end.
        (b"GET /health HTTP/1.1\r\nhost: local".into(), ""),
        ((head(&format!("{typed}content-length: 100\r\n")) + "{").into(), "408"),
        ((head(&format!("{typed}transfer-encoding: chunked\r\n")) + "1\r\n{\r\n").into(), "408"),
        (head(&format!("{typed}content-length: 99999999999\r\n")).into(), "413"),
        ((head(&format!("{typed}content-length: x\r\n")) + "{}").into(), "400"),
        (
            (head(&format!("{typed}content-length: 2\r\ncontent-length: 3\r\n")) + "{}").into(),
            "400",
        ),
    ];
    for (bytes, status) in cases {
        let shown = String::from_utf8_lossy(&bytes[..bytes.len().min(120)]).into_owned();
        let answer = server.raw(&bytes).await;
        let expected = format!("HTTP/1.1 {status}");
        assert!(
            answer.is_empty() && status.is_empty() || answer.starts_with(&expected),
            "{shown:?}: {answer:?}"
        );
    }
    // Two requests in one packet get two answers.
    let one = "GET /health HTTP/1.1\r\nhost: localhost\r\n\r\n";
    let answers = server.raw(format!("{one}{one}").as_bytes()).await;
    assert_eq!(answers.matches("HTTP/1.1 200").count(), 2);
    assert_eq!(usual(&server).await, before);
}

#[tokio::test]
async fn paths_and_methods_that_are_not_served() {
    let server = Server::start().await;
    for path in [
        "/../etc/passwd",
        "/%2e%2e/x",
        "//v1/models",
        "/v1",
        "/v1/models/",
        "/v1/%00",
        "/api/pull",
        "/api/delete",
        "/v1/chat/completions/x",
        "/%0a%0dx",
    ] {
        let answer = server.get(path).await;
        assert_eq!(answer.status, 404, "{path}");
        assert!(answer.json()["error"].is_object() || answer.json()["error"].is_string(), "{path}");
    }
    for method in ["PUT", "DELETE", "PATCH", "TRACE", "BREW"] {
        for path in ["/v1/chat/completions", "/v1/models", "/health", "/metrics", "/api/tags"] {
            let answer = server.send(Request::builder().method(method).uri(path)).await;
            assert_eq!(answer.status, 405, "{method} {path}");
            assert!(answer.headers.contains_key("allow"), "{method} {path}");
        }
    }
    assert_eq!(server.get("/v1/chat/completions").await.status, 405);
    let head = server.send(Request::head("/v1/models")).await;
    assert_eq!((head.status.as_u16(), head.text.as_str()), (200, ""));
}

#[tokio::test]
async fn the_other_dialects_refuse_unknown_fields_too() {
    let server = Server::start().await;
    let refused = async |path: &str, body: Value| -> Answer {
        let answer = server.post(path, body.clone()).await;
        assert_eq!(answer.status, 400, "{path} {body}: {}", answer.text);
        answer
    };
    let messages = json!([{"role": "user", "content": "x"}]);
    for (path, body) in [
        (
            "/v1/responses",
            json!({"model": "builtin", "input": "x", "previous_response_id": "resp_1"}),
        ),
        ("/v1/responses", json!({"model": "builtin", "input": "x", "store": true})),
        ("/v1/responses", json!({"model": "builtin", "input": "x", "background": true})),
        (
            "/v1/responses",
            json!({"model": "builtin", "input": "x", "tools": [{"type": "web_search"}]}),
        ),
        ("/v1/responses", json!({"model": "builtin", "input": []})),
        (
            "/v1/responses",
            json!({"model": "builtin", "input": [{"type": "item_reference", "id": "x"}]}),
        ),
        (
            "/v1/responses",
            json!({"model": "builtin", "input": "x", "reasoning": {"effort": "high"}}),
        ),
        ("/v1/embeddings", json!({"model": "builtin", "input": ""})),
        ("/v1/embeddings", json!({"model": "builtin", "input": []})),
        ("/v1/embeddings", json!({"model": "builtin", "input": [70000]})),
        (
            "/api/chat",
            json!({"model": "builtin", "messages": messages, "options": {"mirostat": 1}}),
        ),
        ("/api/chat", json!({"model": "builtin", "messages": messages, "think": true})),
        (
            "/api/chat",
            json!({"model": "builtin", "messages": [{"role": "user", "content": "x", "images": ["a"]}]}),
        ),
        ("/api/generate", json!({"model": "builtin", "prompt": "x", "template": "y"})),
        ("/api/generate", json!({"model": "builtin", "prompt": "x", "options": {"num_ctx": 1}})),
        ("/tokenize", json!({})),
        ("/tokenize", json!({"content": "a", "prompt": "b"})),
        ("/detokenize", json!({"tokens": [-1]})),
        ("/apply-template", json!({"messages": []})),
    ] {
        refused(path, body).await;
    }
}

//! Answers held to schemas, expressions, grammars and tools, in every dialect; and grammars nobody
//! should send.

mod common;

use common::{Server, chat, completion};
use serde_json::{Value, json};

fn person() -> Value {
    json!({
        "type": "object",
        "properties": {
            "name": {"type": "string", "maxLength": 6, "pattern": "^[a-z]+$"},
            "age": {"type": "integer", "minimum": 0, "maximum": 99},
            "kind": {"enum": ["fox", "king"]},
        },
        "required": ["name", "age", "kind"],
        "additionalProperties": false,
    })
}

fn assert_person(text: &str) {
    let person: Value = serde_json::from_str(text).unwrap_or_else(|e| panic!("{e}: {text}"));
    let fields: Vec<&str> = common::names(&person);
    assert_eq!(fields, ["name", "age", "kind"]);
    assert!((1..=6).contains(&person["name"].as_str().unwrap().len()), "{text}");
    assert!((0..=99).contains(&person["age"].as_i64().unwrap()), "{text}");
    assert!(["fox", "king"].contains(&person["kind"].as_str().unwrap()), "{text}");
}

fn schema_format(schema: Value) -> Value {
    json!({"type": "json_schema", "json_schema": {"name": "it", "strict": true, "schema": schema}})
}

fn tool(name: &str, parameters: Value) -> Value {
    json!({"type": "function", "function": {"name": name, "parameters": parameters}})
}

#[tokio::test]
async fn a_chat_answer_fits_its_schema_in_every_choice_and_in_a_stream() {
    let server = Server::start().await;
    let request = |extra: Value| {
        let mut body = chat(json!({
            "response_format": schema_format(person()), "max_tokens": 100, "temperature": 1, "seed": 3,
        }));
        common::merge(&mut body, extra);
        body
    };
    let whole = server.post("/v1/chat/completions", request(json!({"n": 8}))).await;
    assert_eq!(whole.status, 200, "{}", whole.text);
    let whole = whole.json();
    for choice in whole["choices"].as_array().unwrap() {
        assert_person(choice["message"]["content"].as_str().unwrap());
        assert_eq!(choice["finish_reason"], "stop");
    }
    let stream = server.post("/v1/chat/completions", request(json!({"stream": true}))).await;
    let text: String = stream
        .chunks()
        .iter()
        .filter_map(|chunk| chunk["choices"][0]["delta"]["content"].as_str().map(str::to_owned))
        .collect();
    assert_eq!(json!(text), whole["choices"][0]["message"]["content"]);
    // Log-probabilities are of the tokens the text is made of.
    let scored = request(json!({"logprobs": true, "top_logprobs": 2}));
    let scored = server.post("/v1/chat/completions", scored).await.json();
    let tokens = scored["choices"][0]["logprobs"]["content"].as_array().unwrap();
    let joined: String = tokens.iter().map(|token| token["token"].as_str().unwrap()).collect();
    assert_eq!(joined, text);
}

#[tokio::test]
async fn objects_expressions_and_grammars_shape_answers() {
    let server = Server::start().await;
    let request = chat(json!({
        "response_format": {"type": "json_object"}, "max_tokens": 400, "temperature": 0.5, "seed": 1,
        "logit_bias": {},
    }));
    let answer = server.post("/v1/chat/completions", request).await.json();
    let choice = &answer["choices"][0];
    let text = choice["message"]["content"].as_str().unwrap();
    assert!(text.starts_with('{'), "{text}");
    if choice["finish_reason"] == "stop" {
        assert!(serde_json::from_str::<Value>(text).unwrap().is_object());
    }

    let request = completion(json!({
        "response_format": {"type": "regex", "regex": "[A-Z]{2}-[0-9]{3}"}, "n": 5, "temperature": 1,
        "seed": 9, "max_tokens": 20,
    }));
    let answer = server.post("/v1/completions", request).await;
    assert_eq!(answer.status, 200, "{}", answer.text);
    for choice in answer.json()["choices"].as_array().unwrap() {
        let text = choice["text"].as_str().unwrap().as_bytes();
        assert!(text.len() == 6 && text[0].is_ascii_uppercase() && text[5].is_ascii_digit());
        assert_eq!(choice["finish_reason"], "stop");
    }

    let sum = "start: NUMBER (\"+\" NUMBER){2}\nNUMBER: /[0-9]{1,3}/\n";
    let request = chat(json!({
        "response_format": {"type": "grammar", "grammar": sum}, "max_tokens": 40, "temperature": 1,
    }));
    let answer = server.post("/v1/chat/completions", request).await.json();
    let text = answer["choices"][0]["message"]["content"].as_str().unwrap();
    assert_eq!(text.split('+').filter(|n| n.parse::<u32>().is_ok()).count(), 3, "{text}");

    let format = json!({"type": "json_schema", "name": "it", "schema": person()});
    let request = json!({
        "model": "builtin", "input": "Who?", "text": {"format": format}, "max_output_tokens": 100,
    });
    let answer = server.post("/v1/responses", request).await.json();
    assert_person(answer["output"][0]["content"][0]["text"].as_str().unwrap());

    let request = json!({
        "model": "builtin", "stream": false, "format": person(),
        "messages": [{"role": "user", "content": "Who?"}],
    });
    let answer = server.post("/api/chat", request).await.json();
    assert_person(answer["message"]["content"].as_str().unwrap());
}

#[tokio::test]
async fn forced_calls_have_arguments_that_fit() {
    let server = Server::start().await;
    let tools = json!([
        tool("add_person", person()),
        tool(
            "pick",
            json!({
                "type": "object",
                "properties": {"tree": {"$ref": "#/$defs/node"}},
                "required": ["tree"],
                "additionalProperties": false,
                "$defs": {"node": {"enum": [1, 2, [3]]}},
            })
        ),
    ]);
    let request = |choice: Value, stream: bool| {
        chat(json!({
            "tools": tools, "tool_choice": choice, "max_tokens": 150, "temperature": 1, "seed": 2,
            "stream": stream,
        }))
    };
    let named = json!({"type": "function", "function": {"name": "add_person"}});
    for choice in [json!("required"), named] {
        let whole = server.post("/v1/chat/completions", request(choice.clone(), false)).await;
        assert_eq!(whole.status, 200, "{}", whole.text);
        let whole = whole.json();
        assert_eq!(whole["choices"][0]["finish_reason"], "tool_calls", "{whole}");
        let call = &whole["choices"][0]["message"]["tool_calls"][0]["function"];
        let arguments = call["arguments"].as_str().unwrap();
        match call["name"].as_str().unwrap() {
            "add_person" => assert_person(arguments),
            "pick" => {
                let picked: Value = serde_json::from_str(arguments).unwrap();
                assert!([json!(1), json!(2), json!([3])].contains(&picked["tree"]), "{arguments}");
            }
            other => panic!("{other}"),
        }
        assert!(choice == "required" || call["name"] == "add_person");

        let chunks = server.post("/v1/chat/completions", request(choice, true)).await.chunks();
        let deltas: Vec<&Value> = chunks
            .iter()
            .map(|chunk| &chunk["choices"][0]["delta"]["tool_calls"][0]["function"])
            .collect();
        let streamed: String = deltas.iter().filter_map(|d| d["arguments"].as_str()).collect();
        assert_eq!(streamed, arguments);
    }
    let request = json!({
        "model": "builtin", "max_tokens": 150, "tool_choice": {"type": "any"},
        "tools": [{"name": "add_person", "input_schema": person()}],
        "messages": [{"role": "user", "content": "Who?"}],
    });
    let answer = server.post("/v1/messages", request).await.json();
    assert_eq!(
        (&answer["stop_reason"], &answer["content"][0]["name"]),
        (&json!("tool_use"), &json!("add_person"))
    );
    assert_person(&answer["content"][0]["input"].to_string());
}

#[tokio::test]
async fn grammars_nobody_should_send_are_refused_and_harm_no_one() {
    let server = Server::start().await;
    let usual = async || {
        let request = chat(json!({"response_format": schema_format(person()), "max_tokens": 80}));
        server.post("/v1/chat/completions", request).await.json()["choices"].clone()
    };
    let before = usual().await;
    let deep =
        |n: usize| (0..n).fold(json!({}), |inner, _| json!({"type": "array", "items": inner}));
    let parentheses = "(".repeat(30_000);
    let bad_schemas = vec![
        json!({"type": 123}),
        json!({"type": "hiccup"}),
        json!({"type": "integer", "minimum": 5, "maximum": 1}),
        json!({"enum": []}),
        json!({"$ref": "http://example.com/x.json"}),
        json!({"$ref": "#/$defs/none"}),
        json!({"type": "string", "pattern": "(?<=x)*"}),
        json!({"type": "string", "pattern": parentheses}),
        json!({"type": "object", "description": "x".repeat(1 << 20)}),
        deep(500),
    ];
    for schema in bad_schemas {
        let shown: String = schema.to_string().chars().take(100).collect();
        let request = chat(json!({"response_format": schema_format(schema.clone())}));
        let answer = server.post_text("/v1/chat/completions", request.to_string()).await;
        assert_eq!(answer.status, 400, "{shown}: {}", answer.text);
        let error = answer.json()["error"].clone();
        assert!(error["message"].as_str().is_some_and(|m| m.len() < 1000), "{shown}: {error}");
        // A JSON body deeper than 128 levels is refused before its fields are known.
        assert!(error["param"] == "response_format" || shown.contains("items"), "{shown}: {error}");
        // The same as arguments of a tool that must be called.
        let parameters = json!({"type": "object", "properties": {"a": schema}, "required": ["a"]});
        let request = chat(json!({"tools": [tool("f", parameters)], "tool_choice": "required"}));
        let answer = server.post("/v1/chat/completions", request).await;
        assert_eq!(answer.status, 400, "{shown}: {}", answer.text);
        // Unforced, the schema is a text for the model.
    }
    for format in [
        json!({"type": "json_schema", "json_schema": {"name": "x", "schema": 123}}),
        json!({"type": "json_schema", "json_schema": {"name": "x", "schema": "x"}}),
        json!({"type": "json_schema", "json_schema": {"name": "a b", "schema": {}}}),
        json!({"type": "json_object", "json_schema": {"name": "x", "schema": {}}}),
        json!({"type": "regex"}),
        json!({"type": "regex", "regex": "("}),
        json!({"type": "regex", "regex": "(?<=x)y"}),
        json!({"type": "regex", "regex": parentheses}),
        json!({"type": "regex", "regex": "x".repeat(1 << 17)}),
        json!({"type": "regex", "grammar": "start: \"x\""}),
        json!({"type": "grammar", "grammar": ""}),
        json!({"type": "grammar", "grammar": "start: nothing"}),
        json!({"type": "grammar", "grammar": "start: \"a"}),
        json!({"type": "grammar", "grammar": format!("start: {parentheses}")}),
        json!({"type": "text", "regex": "x"}),
        json!({"type": "sound"}),
        json!("json_object"),
    ] {
        let shown: String = format.to_string().chars().take(100).collect();
        for path in ["/v1/chat/completions", "/v1/completions"] {
            let extra = json!({"response_format": format});
            let body = if path == "/v1/completions" { completion(extra) } else { chat(extra) };
            let answer = server.post(path, body).await;
            assert_eq!(answer.status, 400, "{path} {shown}: {}", answer.text);
        }
    }
    assert_eq!(usual().await, before);
}

#[tokio::test]
async fn costly_grammars_end_soon_and_many_different_ones_are_forgotten() {
    let server = Server::start().await;
    let chain: String = (0..4000).map(|i| format!("r{i}: r{}\n", i + 1)).collect();
    let properties: serde_json::Map<String, Value> =
        (0..5000).map(|i| (format!("p{i}"), json!({}))).collect();
    for format in [
        schema_format(json!({"type": "string", "maxLength": 1u64 << 31})),
        schema_format(json!({"type": "string", "minLength": 1u64 << 31})),
        schema_format(json!({"type": "array", "minItems": 1u64 << 31})),
        schema_format(json!({"type": "string", "pattern": "(a+)+$"})),
        schema_format(json!({"type": "string", "pattern": ".{0,100000}"})),
        schema_format(json!({"type": "string", "format": "hiccup"})),
        schema_format(json!({"type": "object", "properties": properties})),
        schema_format(json!({"$ref": "#"})),
        json!({"type": "regex", "regex": "((a{0,100}){0,100}){0,100}"}),
        json!({"type": "regex", "regex": "(a?){2000}a{2000}"}),
        json!({"type": "grammar", "grammar": "start: start \"x\" | \"x\""}),
        json!({"type": "grammar", "grammar": "start: e\ne: e e | \"x\" | "}),
        json!({"type": "grammar", "grammar": format!("start: r0\n{chain}r4000: \"x\"\n")}),
    ] {
        let shown: String = format.to_string().chars().take(100).collect();
        let started = std::time::Instant::now();
        let answer =
            server.post("/v1/completions", completion(json!({"response_format": format}))).await;
        assert!([200, 400].contains(&answer.status.as_u16()), "{shown}: {}", answer.text);
        assert!(started.elapsed().as_secs() < 60, "{shown} took {:?}", started.elapsed());
    }
    for i in 0..common::heavy(200, 10_000) {
        let format = schema_format(json!({"type": "string", "const": format!("{i}")}));
        let request = completion(json!({"response_format": format, "max_tokens": 10}));
        let answer = server.post("/v1/completions", request).await.json();
        assert_eq!(answer["choices"][0]["text"], format!("\"{i}\""));
    }
}

//! Every field of every request, as the OpenAPI document names them, with values nobody should send:
//! each is answered or refused by name, none fails the server, and the next request is answered as if
//! nothing had been. A field that is added is tested here without being told to.

mod common;

use common::{Server, chat};
use futures::StreamExt;
use serde_json::{Value, json};

fn hostile() -> Vec<Value> {
    vec![
        json!(null),
        json!(true),
        json!(""),
        json!("x\u{0}\r\n\u{1b}[31m"),
        json!("x".repeat(70_000)),
        json!(-1),
        json!(0),
        json!(-0.0),
        json!(0.5),
        json!(2147483648u64),
        json!(u64::MAX),
        json!(i64::MIN),
        json!(1e308),
        json!([]),
        json!([null]),
        json!([[[]]]),
        json!(vec!["x"; 2000]),
        json!({}),
        json!({"": {"$ref": "#"}}),
        json!({"type": "function", "function": {"name": "x", "parameters": {"$ref": "#"}}}),
    ]
}

/// The fields of a request's schema: `a`, and `a.b` where `a` is an object of its own.
fn fields(document: &Value, schema: &Value) -> Vec<Vec<String>> {
    let resolve = |schema: &Value| -> Value {
        let schema = match schema["oneOf"].as_array() {
            Some(kinds) => kinds.iter().find(|kind| kind["$ref"].is_string()).unwrap_or(schema),
            None => schema,
        };
        match schema["$ref"].as_str() {
            Some(name) => {
                document["components"]["schemas"][name.rsplit('/').next().unwrap()].clone()
            }
            None => schema.clone(),
        }
    };
    let mut paths = Vec::new();
    for (name, field) in resolve(schema)["properties"].as_object().unwrap() {
        paths.push(vec![name.clone()]);
        for inner in resolve(field)["properties"].as_object().into_iter().flat_map(|map| map.keys())
        {
            paths.push(vec![name.clone(), inner.clone()]);
        }
    }
    paths
}

#[tokio::test]
async fn every_field_of_every_request() {
    // A short context, so that the largest numbers of tokens are few.
    let server = Server::start_with(|_| {}, |engine| engine.context_length = Some(48)).await;
    let usual = async || {
        let request = chat(json!({"seed": 1, "temperature": 1}));
        server.post("/v1/chat/completions", request).await.json()["choices"].clone()
    };
    let before = usual().await;
    let document = server.get("/openapi.json").await.json();
    let mut cases = Vec::new();
    for (path, item) in document["paths"].as_object().unwrap() {
        let body = &item["post"]["requestBody"]["content"]["application/json"];
        if body.is_null() {
            continue;
        }
        // The document's own example is a good request; two tokens of answer are enough here.
        let mut good = body["example"].clone();
        for name in ["max_tokens", "max_output_tokens"] {
            if good[name].is_number() {
                good[name] = json!(2);
            }
        }
        if good["options"].is_object() {
            good["options"]["num_predict"] = json!(2);
        }
        let answer = server.post(path, good.clone()).await;
        assert_eq!(answer.status, 200, "{path}: {}", answer.text);
        for field in fields(&document, &body["schema"]) {
            for value in hostile() {
                let mut request = good.clone();
                let place = field.iter().fold(&mut request, |place, name| &mut place[name]);
                *place = value;
                cases.push((path.clone(), field.join("."), request));
            }
        }
    }
    assert!(cases.len() > 4000, "{} cases", cases.len());
    let ask = async |(path, field, request): (String, String, Value)| {
        let shown: String = request.to_string().chars().take(300).collect();
        let answer = server.post(&path, request).await;
        let status = answer.status.as_u16();
        assert!(
            [200, 400, 404].contains(&status),
            "{path} {field} {shown}: {status} {}",
            answer.text
        );
        if status == 200 {
            return;
        }
        let error = &answer.json()["error"];
        let message = error["message"].as_str().or(error.as_str());
        assert!(
            message.is_some_and(|m| !m.is_empty() && m.len() < 2000),
            "{path} {field}: {error}"
        );
    };
    futures::stream::iter(cases).map(ask).buffer_unordered(8).collect::<Vec<()>>().await;
    server.idle().await;
    assert_eq!(usual().await, before);
}

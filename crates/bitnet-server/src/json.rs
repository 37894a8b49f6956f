//! Request bodies: JSON read strictly, so that nothing a client writes is misread or ignored.
//!
//! Bytes and time are bounded before anything is parsed; names must not repeat in an object; the
//! number of values is bounded; depth is bounded by serde_json (128). A field that a type does not
//! know, or whose value does not fit, is named in the error.

use std::fmt;

use axum::extract::{FromRequest, Request};
use axum::http::{HeaderMap, StatusCode, header};
use bytes::Bytes;
use http_body_util::{BodyExt, LengthLimitError, Limited};
use serde::de::{self, DeserializeOwned, DeserializeSeed, MapAccess, SeqAccess, Visitor};
use serde_json::{Map, Value};

use crate::config::Limits;
use crate::error::{ApiError, Result};
use crate::state::AppState;

/// Longest error text sent back: it may quote what the client sent.
const MAX_MESSAGE_CHARS: usize = 400;

/// A JSON body of type `T`; the media type must say that it is JSON.
#[derive(Debug)]
pub(crate) struct Json<T>(pub(crate) T);

/// A JSON body of type `T` under any media type: Ollama's clients often send none.
#[derive(Debug)]
pub(crate) struct AnyJson<T>(pub(crate) T);

impl<T: DeserializeOwned> FromRequest<AppState> for Json<T> {
    type Rejection = ApiError;

    async fn from_request(request: Request, state: &AppState) -> Result<Self> {
        if !is_json(request.headers()) {
            let message = "send the body as `content-type: application/json`";
            return Err(ApiError::new(StatusCode::UNSUPPORTED_MEDIA_TYPE, message));
        }
        read(request, &state.config().limits).await.map(Self)
    }
}

impl<T: DeserializeOwned> FromRequest<AppState> for AnyJson<T> {
    type Rejection = ApiError;

    async fn from_request(request: Request, state: &AppState) -> Result<Self> {
        read(request, &state.config().limits).await.map(Self)
    }
}

fn is_json(headers: &HeaderMap) -> bool {
    let Some(Ok(media_type)) = headers.get(header::CONTENT_TYPE).map(|v| v.to_str()) else {
        return false;
    };
    let essence = media_type.split(';').next().unwrap_or_default().trim();
    essence.eq_ignore_ascii_case("application/json")
        || (essence.len() > 17
            && essence[..12].eq_ignore_ascii_case("application/")
            && essence[essence.len() - 5..].eq_ignore_ascii_case("+json"))
}

async fn read<T: DeserializeOwned>(request: Request, limits: &Limits) -> Result<T> {
    let body = read_body(request, limits).await?;
    from_slice(&body, limits.max_json_values)
}

async fn read_body(request: Request, limits: &Limits) -> Result<Bytes> {
    let max = limits.max_body_bytes;
    let too_large = || {
        let message = format!("the body is larger than {max} bytes, which is the limit");
        ApiError::new(StatusCode::PAYLOAD_TOO_LARGE, message).code("request_too_large")
    };
    let encoding = request.headers().get(header::CONTENT_ENCODING);
    if encoding.is_some_and(|encoding| encoding != "identity") {
        let message = "compressed bodies are not accepted";
        return Err(ApiError::new(StatusCode::UNSUPPORTED_MEDIA_TYPE, message));
    }
    let declared = request.headers().get(header::CONTENT_LENGTH);
    let declared = declared.and_then(|v| v.to_str().ok()?.parse::<u64>().ok());
    if declared.is_some_and(|bytes| bytes > max as u64) {
        return Err(too_large());
    }
    let collected = Limited::new(request.into_body(), max).collect();
    match tokio::time::timeout(limits.body_read_timeout, collected).await {
        Err(_) => {
            let message = "the body did not arrive in time";
            Err(ApiError::new(StatusCode::REQUEST_TIMEOUT, message))
        }
        Ok(Err(error)) if error.is::<LengthLimitError>() => Err(too_large()),
        Ok(Err(_)) => Err(ApiError::new(StatusCode::BAD_REQUEST, "the body ended early")),
        Ok(Ok(collected)) => Ok(collected.to_bytes()),
    }
}

/// Reads a value of type `T` from JSON with at most `max_values` values.
pub(crate) fn from_slice<T: DeserializeOwned>(bytes: &[u8], max_values: usize) -> Result<T> {
    let mut budget = max_values;
    let mut reader = serde_json::Deserializer::from_slice(bytes);
    let value = Strict { budget: &mut budget }
        .deserialize(&mut reader)
        .and_then(|value| reader.end().map(|()| value))
        .map_err(|e| {
            let message = format!("the body is not valid JSON: {e}");
            ApiError::new(StatusCode::BAD_REQUEST, shorten(message)).code("invalid_json")
        })?;
    if !value.is_object() {
        // A list would otherwise be read as the fields in their order.
        let error = ApiError::new(StatusCode::BAD_REQUEST, "the body must be a JSON object");
        return Err(error.code("invalid_type"));
    }
    from_value(value)
}

/// Reads a value of type `T` from a parsed one.
pub(crate) fn from_value<T: DeserializeOwned>(value: Value) -> Result<T> {
    serde_path_to_error::deserialize(value).map_err(|error| {
        let path = error.path().to_string();
        let reason = error.into_inner().to_string();
        field_error(if path == "." { "" } else { &path }, &reason)
    })
}

/// The error of one field, in the words of serde's message about it.
fn field_error(path: &str, reason: &str) -> ApiError {
    let join = |name: &str| match path {
        "" => name.to_owned(),
        _ if path == name || path.ends_with(&format!(".{name}")) => path.to_owned(),
        _ => format!("{path}.{name}"),
    };
    let quoted = |prefix: &str| reason.strip_prefix(prefix)?.split('`').next().map(str::to_owned);
    if let Some(name) = quoted("unknown field `") {
        let param = join(&name);
        let message = shorten(format!("`{param}` is not a field this server knows"));
        return ApiError::field(shorten(param), message).code("unknown_parameter");
    }
    if let Some(name) = quoted("missing field `") {
        let param = join(&name);
        let message = format!("`{param}` is required");
        return ApiError::field(param, message).code("missing_required_parameter");
    }
    let message = match path {
        "" => reason.to_owned(),
        _ => format!("`{path}`: {reason}"),
    };
    let mut error = ApiError::new(StatusCode::BAD_REQUEST, shorten(message)).code("invalid_type");
    error.param = (!path.is_empty()).then(|| shorten(path.to_owned()));
    error
}

fn shorten(mut text: String) -> String {
    if let Some((end, _)) = text.char_indices().nth(MAX_MESSAGE_CHARS) {
        text.truncate(end);
        text.push('…');
    }
    text
}

/// Reads any JSON value; refuses repeated names and more values than the budget.
struct Strict<'a> {
    budget: &'a mut usize,
}

impl<'de> DeserializeSeed<'de> for Strict<'_> {
    type Value = Value;

    fn deserialize<D: de::Deserializer<'de>>(self, reader: D) -> Result<Value, D::Error> {
        match self.budget.checked_sub(1) {
            Some(rest) => *self.budget = rest,
            None => return Err(de::Error::custom("too many values")),
        }
        reader.deserialize_any(self)
    }
}

impl<'de> Visitor<'de> for Strict<'_> {
    type Value = Value;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("a JSON value")
    }

    fn visit_unit<E>(self) -> Result<Value, E> {
        Ok(Value::Null)
    }

    fn visit_bool<E>(self, value: bool) -> Result<Value, E> {
        Ok(Value::Bool(value))
    }

    fn visit_i64<E>(self, value: i64) -> Result<Value, E> {
        Ok(value.into())
    }

    fn visit_u64<E>(self, value: u64) -> Result<Value, E> {
        Ok(value.into())
    }

    fn visit_f64<E>(self, value: f64) -> Result<Value, E> {
        Ok(value.into())
    }

    fn visit_str<E>(self, value: &str) -> Result<Value, E> {
        Ok(value.into())
    }

    fn visit_string<E>(self, value: String) -> Result<Value, E> {
        Ok(value.into())
    }

    fn visit_seq<A: SeqAccess<'de>>(self, mut items: A) -> Result<Value, A::Error> {
        let mut values = Vec::new();
        while let Some(value) = items.next_element_seed(Strict { budget: &mut *self.budget })? {
            values.push(value);
        }
        Ok(Value::Array(values))
    }

    fn visit_map<A: MapAccess<'de>>(self, mut entries: A) -> Result<Value, A::Error> {
        let mut object = Map::new();
        while let Some(name) = entries.next_key::<String>()? {
            let value = entries.next_value_seed(Strict { budget: &mut *self.budget })?;
            if object.contains_key(&name) {
                return Err(de::Error::custom(format_args!("the name `{name}` stands twice")));
            }
            object.insert(name, value);
        }
        Ok(Value::Object(object))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde::Deserialize;

    #[derive(Debug, Deserialize, PartialEq)]
    #[serde(deny_unknown_fields)]
    struct Body {
        model: String,
        n: Option<u32>,
        #[serde(default)]
        inner: Vec<Inner>,
    }

    #[derive(Debug, Deserialize, PartialEq)]
    #[serde(deny_unknown_fields)]
    struct Inner {
        role: String,
    }

    fn parse(text: &str) -> Result<Body> {
        from_slice(text.as_bytes(), 100)
    }

    #[test]
    fn a_good_body_is_read() {
        let body = parse(r#" {"model":"a","n":null,"inner":[{"role":"u"}]} "#).unwrap();
        assert_eq!(body.inner[0].role, "u");
    }

    #[test]
    fn what_is_wrong_is_named() {
        for (text, param, code) in [
            (r#"{"model":"a","x":1}"#, Some("x"), "unknown_parameter"),
            (r#"{"n":1}"#, Some("model"), "missing_required_parameter"),
            (r#"{"model":"a","n":-1}"#, Some("n"), "invalid_type"),
            (r#"{"model":"a","n":1.5}"#, Some("n"), "invalid_type"),
            (r#"{"model":7}"#, Some("model"), "invalid_type"),
            (
                r#"{"model":"a","inner":[{"role":"u"},{}]}"#,
                Some("inner[1].role"),
                "missing_required_parameter",
            ),
            (
                r#"{"model":"a","inner":[{"role":"u","z":1}]}"#,
                Some("inner[0].z"),
                "unknown_parameter",
            ),
            (r#"[1]"#, None, "invalid_type"),
        ] {
            let error = parse(text).unwrap_err();
            assert_eq!(error.param.as_deref(), param, "{text}: {error}");
            assert_eq!(error.code, Some(code), "{text}: {error}");
            assert_eq!(error.status, StatusCode::BAD_REQUEST);
        }
    }

    #[test]
    fn what_is_not_json_is_refused() {
        let deep = format!("{}1{}", "[".repeat(100_000), "]".repeat(100_000));
        let wide = format!("[{}1]", "1,".repeat(100));
        let cases: [&[u8]; 16] = [
            b"",
            b"{",
            b"{}}",
            b"{} x",
            b"NaN",
            b"{\"model\":1e999}",
            b"{\"model\":Infinity}",
            b"{\"model\":01}",
            b"\xef\xbb\xbf{}",
            b"{\"model\":\"\xff\"}",
            b"{\"model\":\"\\ud800\"}",
            b"{\"model\":\"a\",\"model\":\"b\"}",
            b"{\"model\":\"a\",\"inner\":[{\"role\":\"a\",\"role\":\"a\"}]}",
            b"{'model':'a'}",
            deep.as_bytes(),
            wide.as_bytes(),
        ];
        for bytes in cases {
            let error = from_slice::<Body>(bytes, 100).unwrap_err();
            let start = String::from_utf8_lossy(&bytes[..bytes.len().min(40)]);
            assert_eq!(error.code, Some("invalid_json"), "{start}: {error}");
        }
    }

    #[test]
    fn media_types_that_say_json() {
        for (text, expected) in [
            ("application/json", true),
            ("Application/JSON; charset=utf-8", true),
            ("application/problem+json", true),
            ("application/x", false),
            ("text/json", false),
            ("+json", false),
            ("ééééééééééééééé+json", false),
        ] {
            let mut headers = HeaderMap::new();
            headers
                .insert("content-type", header::HeaderValue::from_bytes(text.as_bytes()).unwrap());
            assert_eq!(is_json(&headers), expected, "{text}");
        }
        assert!(!is_json(&HeaderMap::new()));
    }

    #[test]
    fn quoted_input_is_cut_short() {
        let text = format!(r#"{{"model":"a","n":"{}"}}"#, "é".repeat(5000));
        assert!(parse(&text).unwrap_err().message.chars().count() <= MAX_MESSAGE_CHARS + 1);
    }
}

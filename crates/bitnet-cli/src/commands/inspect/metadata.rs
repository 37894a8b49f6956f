//! The metadata of a GGUF file, shown: short values whole, long ones by their beginning, lists by their
//! length. Knows no keys.

use bitnet_quant::gguf::{Array, Value};
use serde_json::{Value as Json, json};

/// Longest text shown to people, in characters.
const TEXT_SHOWN: usize = 80;
/// Longest list that is shown with its elements.
const LIST_SHOWN: usize = 16;

/// The value for programs; a long list is its type and length.
pub(super) fn as_json(value: &Value) -> Json {
    match value {
        Value::U8(n) => json!(n),
        Value::I8(n) => json!(n),
        Value::U16(n) => json!(n),
        Value::I16(n) => json!(n),
        Value::U32(n) => json!(n),
        Value::I32(n) => json!(n),
        Value::F32(x) => json!(x),
        Value::Bool(on) => json!(on),
        Value::String(text) => json!(text),
        Value::U64(n) => json!(n),
        Value::I64(n) => json!(n),
        Value::F64(x) => json!(x),
        Value::Array(list) if list.len() > LIST_SHOWN => {
            json!({ "type": value.type_name(), "length": list.len() })
        }
        Value::Array(list) => list_json(list),
    }
}

fn list_json(list: &Array) -> Json {
    match list {
        Array::U8(list) => json!(list),
        Array::I8(list) => json!(list),
        Array::U16(list) => json!(list),
        Array::I16(list) => json!(list),
        Array::U32(list) => json!(list),
        Array::I32(list) => json!(list),
        Array::F32(list) => json!(list),
        Array::Bool(list) => json!(list),
        Array::String(list) => json!(list),
        Array::U64(list) => json!(list),
        Array::I64(list) => json!(list),
        Array::F64(list) => json!(list),
        // The reader bounds how deep lists lie in lists.
        Array::Array(list) => list.iter().map(list_json).collect(),
    }
}

/// The value for people, one line.
pub(super) fn as_text(value: &Value) -> String {
    match value {
        Value::String(text) => {
            let shown: String = text.chars().take(TEXT_SHOWN).collect();
            let rest = text.chars().count() - shown.chars().count();
            match rest {
                0 => format!("{shown:?}"),
                rest => format!("{shown:?} … ({rest} more characters)"),
            }
        }
        Value::Array(list) if list.len() > LIST_SHOWN => {
            format!("{} elements", crate::term::count(list.len() as u64))
        }
        other => as_json(other).to_string(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn long_values_are_shown_in_short() {
        let text = Value::String("x".repeat(81));
        assert!(as_text(&text).ends_with("(1 more characters)"), "{}", as_text(&text));
        assert_eq!(as_json(&text), "x".repeat(81));
        let short = Value::Array(Array::U32(vec![1, 2]));
        assert_eq!((as_text(&short).as_str(), as_json(&short)), ("[1,2]", json!([1, 2])));
        let long = Value::Array(Array::String(vec![String::new(); 1000]));
        assert_eq!(as_text(&long), "1,000 elements");
        assert_eq!(as_json(&long), json!({"type": "array of string", "length": 1000}));
        let nested = Value::Array(Array::Array(vec![Array::Bool(vec![true])]));
        assert_eq!(as_text(&nested), "[[true]]");
    }
}

//! What texts each kind of grammar lets through, and what hostile grammars cost.

use super::*;
use std::time::{Duration, Instant};

/// A vocabulary of all bytes, some longer words, and an end token.
fn compiler() -> GrammarCompiler {
    let mut words: Vec<Vec<u8>> = (0..=255).map(|byte| vec![byte]).collect();
    words.extend(["true", "\":", "abc", "{\"", "  ", "é"].map(|word| word.as_bytes().to_vec()));
    words.push(b"\xff<end>".to_vec());
    let end = words.len() as u32 - 1;
    GrammarCompiler::with_words(words, &[end], None).unwrap()
}

const END: u32 = 262;

/// Whether the language holds `text`, byte by byte.
fn accepts(compiler: &GrammarCompiler, grammar: &Grammar, text: &str) -> bool {
    let mut constraint = compiler.constraint(grammar).unwrap();
    for (at, byte) in text.bytes().enumerate() {
        if !constraint.allowed().unwrap().contains(u32::from(byte)) {
            return false;
        }
        if constraint.accept(u32::from(byte)).unwrap() {
            return at + 1 == text.len();
        }
    }
    constraint.allowed().is_ok_and(|allowed| allowed.contains(END))
}

fn schema(schema: Value) -> Grammar {
    Grammar::JsonSchema(schema)
}

#[test]
fn each_kind_of_grammar_lets_its_texts_through_and_no_others() {
    let compiler = compiler();
    let person = schema(json!({
        "type": "object",
        "properties": {
            "name": {"type": "string", "maxLength": 8},
            "age": {"type": "integer", "minimum": 0, "maximum": 150},
            "tags": {"type": "array", "items": {"enum": ["a", "b"]}, "maxItems": 2},
        },
        "required": ["name", "age"],
        "additionalProperties": false,
    }));
    let cases: Vec<(Grammar, &[&str], &[&str])> = vec![
        (
            person,
            &[
                r#"{"name":"Ann","age":7}"#,
                r#"{"name": "Zoë", "age": 150, "tags": ["a","b"]}"#,
                r#"{ "name": "", "age": 0 }"#,
            ],
            &[
                r#"{"name":"Ann"}"#,
                "{\n  \"name\": \"\",\n  \"age\": 0\n}",
                r#"{"age":7,"name":"Ann"}"#,
                r#"{"name":"Ann","age":151}"#,
                r#"{"name":"Ann","age":7.5}"#,
                r#"{"name":"much too long","age":7}"#,
                r#"{"name":"A","age":1,"tags":["a","b","a"]}"#,
                r#"{"name":"A","age":1,"x":1}"#,
                r#"{"name":"A",  "age":1}"#,
                r#"[1]"#,
                "",
            ],
        ),
        (
            Grammar::json_object(),
            &["{}", r#"{"a": [1, null, {"b": "é\n"}]}"#],
            &["[]", "{", "1", r#"{"a":}"#, "{\n\n\n\n}", "{} x"],
        ),
        (
            schema(json!({"$ref": "#/$defs/tree", "$defs": {"tree": {
                "type": "object",
                "properties": {"left": {"$ref": "#/$defs/tree"}},
                "additionalProperties": false,
            }}})),
            &["{}", r#"{"left":{"left":{}}}"#],
            &[r#"{"left":1}"#],
        ),
        (Grammar::Regex("[a-c]+(-[0-9]{2})?".into()), &["a", "abc-07"], &["", "d", "a-7", "a-077"]),
        (Grammar::Regex("a/b\"c".into()), &["a/b\"c"], &["a/b"]),
        (
            Grammar::Lark("start: sum\nsum: NUM (\"+\" NUM)*\nNUM: /[0-9]+/\n".into()),
            &["1", "12+3+4"],
            &["", "+", "1+", "1 + 2"],
        ),
        (
            Grammar::Lark("start: list\nlist: \"(\" (list | \"x\")* \")\"\n".into()),
            &["()", "(x(x)())"],
            &["(", "x", "(x"],
        ),
    ];
    for (grammar, good, bad) in cases {
        for text in good {
            assert!(accepts(&compiler, &grammar, text), "{grammar:?} {text:?}");
        }
        for text in bad {
            assert!(!accepts(&compiler, &grammar, text), "{grammar:?} {text:?}");
        }
    }
}

#[test]
fn what_a_request_adds_cannot_widen_the_language() {
    let compiler = compiler();
    let grammar = schema(json!({
        "type": "object", "additionalProperties": false, "x-guidance": {"whitespace_pattern": "x+"},
    }));
    assert!(!accepts(&compiler, &grammar, "{xx}"));
    assert!(accepts(&compiler, &grammar, "{ }"));
}

#[test]
fn longer_tokens_are_allowed_where_their_bytes_are() {
    let compiler = compiler();
    let mut constraint = compiler.constraint(&Grammar::Regex("abcd|\\{\"".into())).unwrap();
    let allowed = constraint.allowed().unwrap();
    assert!(allowed.contains(258) && allowed.contains(259) && allowed.contains(u32::from(b'a')));
    assert!(!allowed.contains(256) && !allowed.contains(260) && !allowed.contains(END));
    assert!(!constraint.accept(258).unwrap());
    assert!(constraint.accept(u32::from(b'd')).unwrap(), "complete, and nothing may follow");
}

#[test]
fn a_vocabulary_without_an_end_token_ends_where_the_grammar_does() {
    let words = (0..=255).map(|byte| vec![byte]).collect();
    let compiler = GrammarCompiler::with_words(words, &[], None).unwrap();
    let mut constraint = compiler.constraint(&Grammar::Regex("ab".into())).unwrap();
    assert!(!constraint.accept(u32::from(b'a')).unwrap());
    assert!(constraint.accept(u32::from(b'b')).unwrap());
}

#[test]
fn a_missing_byte_is_an_error_and_not_an_answer() {
    let words: Vec<Vec<u8>> = (b'a'..=b'z').map(|byte| vec![byte]).collect();
    let compiler = GrammarCompiler::with_words(words, &[], None).unwrap();
    let mut constraint = compiler.constraint(&Grammar::Regex("a1".into())).unwrap();
    let stuck = constraint.accept(0).and_then(|_| constraint.allowed().map(drop));
    assert!(matches!(stuck, Err(InferenceError::Input { .. })), "{stuck:?}");
}

#[test]
fn damaged_and_unsatisfiable_grammars_are_refused_with_the_reason() {
    let compiler = compiler();
    let deep_regex = "(".repeat(30_000) + &")".repeat(30_000);
    let cases = vec![
        schema(json!({"type": 123})),
        schema(json!({"type": "hiccup"})),
        schema(json!(true)),
        schema(json!({"type": "integer", "minimum": 5, "maximum": 4})),
        schema(json!({"enum": []})),
        schema(json!({"$ref": "http://example.com/schema.json"})),
        schema(json!({"$ref": "file:///etc/passwd"})),
        schema(json!({"$ref": "#/$defs/none"})),
        schema(json!({"type": "string", "pattern": "(?<=x)*"})),
        schema(json!({"type": "string", "pattern": deep_regex})),
        Grammar::Regex("(".into()),
        Grammar::Regex("(?<=x)y".into()),
        Grammar::Regex(deep_regex.clone()),
        Grammar::Regex("x".repeat(MAX_GRAMMAR_BYTES + 1)),
        Grammar::Lark("".into()),
        Grammar::Lark("start: nothing".into()),
        Grammar::Lark("start: \"a".into()),
        Grammar::Lark("start: A\nA: B\nB: A".into()),
        Grammar::Lark(format!("start: {deep_regex}")),
    ];
    for grammar in cases {
        let shown: String = format!("{grammar:?}").chars().take(80).collect();
        let error = compiler.constraint(&grammar).expect_err(&shown);
        let InferenceError::Input { field, got, .. } = error else { panic!("{shown}") };
        assert_eq!(field, "grammar");
        assert!(got.len() <= MAX_REASON_BYTES && !got.contains("panic"), "{shown}: {got}");
        // The next grammar is unharmed.
        assert!(accepts(&compiler, &Grammar::Regex("ok".into()), "ok"));
    }
}

/// Compiles a grammar and walks along it; whatever happens must happen soon.
#[test]
fn hostile_grammars_cost_little() {
    let compiler = compiler();
    let chain = |n: usize, rule: &dyn Fn(usize) -> String| -> String {
        (0..n).map(rule).collect::<Vec<_>>().join("\n") + &format!("\nr{n}: \"x\"\nR{n}: \"x\"")
    };
    let properties: serde_json::Map<String, Value> =
        (0..MAX_SCHEMA_MEMBERS).map(|i| (format!("p{i}"), json!({}))).collect();
    let mut nested = json!({});
    for _ in 0..60 {
        nested = json!({"type": "object", "properties": {"a": nested}});
    }
    let cases = vec![
        schema(json!({"type": "string", "maxLength": 1u64 << 31})),
        schema(json!({"type": "string", "minLength": 1u64 << 31})),
        schema(json!({"type": "string", "minLength": 100_000})),
        schema(json!({"type": "array", "minItems": 1u64 << 31})),
        schema(
            json!({"type": "array", "items": {"type": "array", "minItems": 3000}, "minItems": 3000}),
        ),
        schema(json!({"type": "string", "pattern": "(a+)+$"})),
        schema(json!({"type": "string", "pattern": "^+[a-z]$"})),
        schema(json!({"type": "string", "pattern": "^{2}x$"})),
        schema(json!({"type": "string", "pattern": ".{0,100000}"})),
        schema(json!({"type": "string", "pattern": "(.{0,1000}x){1000}"})),
        schema(json!({"type": "string", "format": "hiccup"})),
        schema(json!({"type": "object", "properties": properties})),
        schema(json!({"$ref": "#"})),
        schema(json!({"allOf": [{"$ref": "#"}]})),
        schema(json!({"anyOf": (0..500).map(|i| json!({"const": i})).collect::<Vec<_>>()})),
        schema(json!({"type": "number", "multipleOf": 1e-300})),
        schema(nested),
        Grammar::Regex("(a+)+$".into()),
        Grammar::Regex("((a{0,100}){0,100}){0,100}".into()),
        Grammar::Regex("(a?){2000}a{2000}".into()),
        Grammar::Regex(".{0,100000}".into()),
        Grammar::Regex("(.*a.{20}|.*b.{20}|.*c.{20})d".into()),
        Grammar::Lark("start: start \"x\" | \"x\"".into()),
        Grammar::Lark("start: start".into()),
        Grammar::Lark("start: a\na: b\nb: a".into()),
        Grammar::Lark("start: e\ne: e e | \"x\" | ".into()),
        Grammar::Lark("start: \"x\"{0,100000}".into()),
        Grammar::Lark("start: (((\"x\"{100}){100}){100}){100}".into()),
        Grammar::Lark("start: r0\n".to_owned() + &chain(5000, &|i| format!("r{i}: r{}", i + 1))),
        Grammar::Lark(
            "start: r0\n".to_owned() + &chain(2500, &|i| format!("r{i}: \"x\" r{} \"y\"", i + 1)),
        ),
        Grammar::Lark("start: R0\n".to_owned() + &chain(4000, &|i| format!("R{i}: R{} ", i + 1))),
        Grammar::Lark(
            "start: R0\n".to_owned() + &chain(2500, &|i| format!("R{i}: \"a\" (R{}|\"b\")", i + 1)),
        ),
    ];
    for grammar in cases {
        let shown: String = format!("{grammar:?}").chars().take(80).collect();
        let started = Instant::now();
        if let Ok(mut constraint) = compiler.constraint(&grammar) {
            for _ in 0..30 {
                let Ok(allowed) = constraint.allowed() else { break };
                let letters = (b'a'..=b'z').chain(*b"x\"{[:0]}").map(u32::from);
                let Some(token) = letters.rev().find(|&id| allowed.contains(id)) else { break };
                if constraint.accept(token).unwrap_or(true) {
                    break;
                }
            }
        }
        let took = started.elapsed();
        eprintln!("{took:9.1?} {shown}");
        assert!(took < Duration::from_secs(20), "{shown} took {took:?}");
    }
}

#[test]
fn the_memory_of_grammars_is_bounded_and_remembers_the_last() {
    let compiler = compiler();
    for i in 0..200 {
        compiler.constraint(&Grammar::Regex(format!("a{i}"))).unwrap();
    }
    compiler.constraint(&Grammar::Regex("a190".into())).unwrap();
    let kept = compiler.kept.lock().unwrap();
    assert_eq!(kept.len(), KEPT_GRAMMARS);
    assert_eq!(kept[0].0, Grammar::Regex("a190".into()));
    assert_eq!(kept[1].0, Grammar::Regex("a199".into()));
}

#[test]
fn an_answer_does_not_disturb_another_one_of_the_same_grammar() {
    let compiler = compiler();
    let grammar = Grammar::Regex("ab|cd".into());
    let mut first = compiler.constraint(&grammar).unwrap();
    first.accept(u32::from(b'a')).unwrap();
    let mut second = compiler.constraint(&grammar).unwrap();
    assert!(second.allowed().unwrap().contains(u32::from(b'c')));
    assert!(!first.allowed().unwrap().contains(u32::from(b'c')));
}

#[test]
fn sizes_are_checked_without_recursion() {
    let mut deep = json!({});
    for _ in 0..100_000 {
        // The macro would write the value out by recursion.
        deep = Value::Object([("items".to_owned(), deep)].into_iter().collect());
    }
    let grammar = schema(deep);
    assert!(grammar.check_size().unwrap_err().to_string().contains("128 levels"));
    // A tree this deep cannot be dropped by recursion either.
    let Grammar::JsonSchema(mut value) = grammar else { unreachable!() };
    while let Some(inner) = value.get_mut("items").map(Value::take) {
        value = inner;
    }
    let members = |n: usize| -> Value { (0..n).map(|i| (format!("p{i}"), json!({}))).collect() };
    assert!(schema(members(MAX_SCHEMA_MEMBERS)).check_size().is_ok());
    let wide = schema(members(MAX_SCHEMA_MEMBERS + 1)).check_size().unwrap_err();
    assert!(wide.to_string().contains("512 members"), "{wide}");
    let many = schema(json!({"anyOf": vec![members(MAX_SCHEMA_MEMBERS); 10]}));
    assert!(many.check_size().unwrap_err().to_string().contains("in all"));
    let wide = schema(json!({"enum": vec!["x".repeat(1000); 300]}));
    assert!(wide.check_size().unwrap_err().to_string().contains("bytes"));
    assert!(Grammar::Lark("x".repeat(MAX_GRAMMAR_BYTES + 1)).check_size().is_err());
}

//! `bitnet eval`: the measured values, the windows, the JSON.

mod common;

use bitnet_inference::builtin;
use bitnet_inference::tokenizer::{EncodeOptions, Tokenizer};
use common::{failure, json, run, stdout};

/// A text in the model's own style, some hundreds of tokens long.
fn story() -> tempfile::NamedTempFile {
    let mut text = String::new();
    for name in ["princess", "fisherman", "fox", "giant", "miller"] {
        text.push_str(&format!(
            "Once upon a time there was a {name} who lived at the edge of a great forest. Every \
             morning the {name} went down to the river, and every evening came home again. \"I am \
             tired,\" said the {name}, \"and I will sleep until the sun is high.\"\n"
        ));
    }
    let file = tempfile::NamedTempFile::new().unwrap();
    std::fs::write(file.path(), text).unwrap();
    file
}

fn number(json: &serde_json::Value, key: &str) -> f64 {
    json[key].as_f64().unwrap_or_else(|| panic!("{key} in {json}"))
}

#[test]
fn values_agree_with_each_other_and_with_the_text() {
    let file = story();
    let path = file.path().to_str().unwrap();
    let found = json(&["eval", path, "--mode", "full", "--window", "64", "--json"]);
    let (nats, tokens) = (number(&found, "nats_per_token"), number(&found, "tokens"));
    let bits = nats * tokens / std::f64::consts::LN_2;
    assert!((number(&found, "perplexity") - nats.exp()).abs() < 1e-9 * nats.exp());
    assert!((number(&found, "bits_per_byte") - bits / number(&found, "bytes")).abs() < 1e-12);
    assert_eq!((tokens / 64.0).ceil(), number(&found, "windows"));
    // The model was trained on fairy tales, this one too: far better than chance, far from certain.
    assert!((0.5..3.0).contains(&number(&found, "bits_per_byte")), "{found}");
}

#[test]
fn one_window_over_everything_counts_every_byte_after_the_first_token() {
    let file = story();
    let path = file.path().to_str().unwrap();
    let found = json(&["eval", path, "--mode", "full", "--window", "1000", "--json"]);
    let text = std::fs::read_to_string(path).unwrap();
    let tokenizer = Tokenizer::from_assets(builtin::checkpoint().unwrap().text()).unwrap();
    let first = tokenizer.encode(&text, EncodeOptions::TEXT).unwrap()[0];
    // The first token has nothing before it to be predicted from.
    let expected = text.len() - tokenizer.token_bytes(first).len();
    assert_eq!(number(&found, "bytes"), expected as f64);
}

#[test]
fn more_context_predicts_better() {
    let file = story();
    let path = file.path().to_str().unwrap();
    let bits =
        |args: &[&str]| number(&json(&[&["eval", path, "--json"], args].concat()), "bits_per_byte");
    let short = bits(&["--mode", "full", "--window", "16"]);
    let long = bits(&["--mode", "full", "--window", "128"]);
    let sliding = bits(&["--mode", "sliding", "--window", "16", "--stride", "4"]);
    assert!(long < short && sliding < short, "short {short}, long {long}, sliding {sliding}");
}

#[test]
fn half_of_each_window_counts_as_in_llama_perplexity() {
    let file = story();
    let found = json(&["eval", file.path().to_str().unwrap(), "--window", "64", "--json"]);
    assert_eq!(found["mode"], "half");
    // Positions 33 to 63 of each window.
    assert_eq!(number(&found, "tokens"), 31.0 * number(&found, "windows"));
}

#[test]
fn the_formats_of_a_model_measure_the_same() {
    let file = story();
    let path = file.path().to_str().unwrap();
    let measure = |form: &str| {
        let model = common::golden(&format!("bitnet-tiny/{form}"));
        number(&json(&["eval", path, "-m", &model, "--window", "32", "--json"]), "nats_per_token")
    };
    let (packed, gguf) = (measure("packed_multiply"), measure("model-i2_s.gguf"));
    assert!((packed - gguf).abs() < 0.02, "{packed} {gguf}");
}

#[test]
fn people_see_labelled_values() {
    let file = story();
    let path = file.path().to_str().unwrap();
    let shown = stdout(&["eval", path, "--max-chars", "200"]);
    for label in ["perplexity", "bits per byte", "nats per token", "measured on"] {
        assert!(shown.contains(label), "{shown}");
    }
    assert!(!shown.contains('\x1b'), "no colours outside a terminal");
    let loud = run(&["eval", path, "--max-chars", "200"]);
    assert!(common::text(&loud.stderr).contains("1 of 1 window in"));
    let quiet = run(&["eval", path, "--max-chars", "200", "--quiet"]);
    assert!(quiet.stderr.is_empty());
}

#[test]
fn what_is_wrong_is_said() {
    let file = story();
    let path = file.path().to_str().unwrap();
    for (args, code, expected) in [
        (&["eval", "/nowhere/text"][..], 1, "/nowhere/text"),
        (&["eval", path, "--window", "5000"], 2, "window: expected 2 to 1024"),
        (&["eval", path, "--stride", "5"], 2, "--mode sliding"),
        (&["eval", path, "--mode", "sliding", "--window", "8", "--stride", "8"], 2, "stride"),
        (&["eval", path, "--max-chars", "0"], 2, "expected some text"),
        (&["eval", path, "--max-chars", "1"], 2, "text"),
    ] {
        let (found, stderr) = failure(args);
        assert_eq!(found, code, "{args:?}: {stderr}");
        assert!(stderr.contains(expected), "{args:?}: {stderr}");
    }
}

//! `bitnet inspect`: what it tells of each kind of file.

mod common;

use common::{failure, golden, json, stdout};
use serde_json::json;

#[test]
fn the_same_model_is_recognised_in_every_form() {
    for (form, format) in [
        ("packed_multiply", "safetensors"),
        ("packed_divide", "safetensors"),
        ("online", "safetensors"),
        ("model-i2_s.gguf", "GGUF v3"),
    ] {
        let found = json(&["inspect", &golden(&format!("bitnet-tiny/{form}")), "--json"]);
        assert_eq!(found["format"], format);
        let config = &found["config"];
        assert_eq!(config["architecture"], "bitnet");
        assert_eq!(config["hidden_act"], "relu2");
        for (name, value) in [
            ("hidden_size", 128),
            ("intermediate_size", 256),
            ("num_hidden_layers", 2),
            ("num_attention_heads", 4),
            ("num_key_value_heads", 2),
            ("vocab_size", 320),
        ] {
            assert_eq!(config[name], value, "{form} {name}");
        }
        assert_eq!(config["sub_norms"], true);
        // Per layer: q and o 128·128, k and v 64·128, gate, up and down 128·256.
        let ternary = 2 * (2 * 128 * 128 + 2 * 64 * 128 + 3 * 128 * 256);
        let float = 320 * 128 + 2 * (3 * 128 + 256) + 128;
        assert_eq!(found["weights"]["ternary"], ternary, "{form}");
        assert_eq!(found["weights"]["float"], float, "{form}");
        assert_eq!(found["tokenizer"]["size"], 320, "{form}");
        assert!(found["tensors"].is_null());
    }
}

#[test]
fn packed_weights_are_smaller_than_their_masters() {
    let bits = |form: &str| {
        let found = json(&["inspect", &golden(&format!("bitnet-tiny/{form}")), "--json"]);
        found["weights"]["bits_per_weight"].as_f64().unwrap()
    };
    assert!(bits("packed_multiply") < bits("online"));
}

#[test]
fn tensors_are_listed_with_their_types() {
    let path = golden("gguf-bitnet-silu/model-tq2_0.gguf");
    let found = json(&["inspect", &path, "--tensors", "--json"]);
    let tensors = found["tensors"].as_array().unwrap();
    let gate = tensors.iter().find(|t| t["file_name"] == "blk.0.ffn_gate.weight").unwrap();
    assert_eq!(gate["type"], "TQ2_0");
    assert_eq!(gate["bits_per_weight"], 2.0625);
    let shown = stdout(&["inspect", &path, "--tensors"]);
    assert!(shown.contains("blk.0.ffn_gate.weight") && shown.contains("TQ2_0"), "{shown}");
}

#[test]
fn metadata_is_listed_with_types_and_values() {
    let path = golden("bitnet-tiny/model-i2_s.gguf");
    let found = json(&["inspect", &path, "--metadata", "--json"]);
    let (keys, config) = (&found["metadata"], &found["config"]);
    let family = keys["general.architecture"].as_str().unwrap();
    assert_eq!(keys[format!("{family}.embedding_length")], config["hidden_size"]);
    let tokens = json!({"type": "array of string", "length": 320});
    assert_eq!(keys["tokenizer.ggml.tokens"], tokens);
    let shown = stdout(&["inspect", &path, "--metadata"]);
    let line = shown.lines().find(|line| line.contains("tokenizer.ggml.tokens")).unwrap();
    assert!(line.contains("array of string") && line.contains("320 elements"), "{line}");
    let (code, stderr) = failure(&["inspect", &golden("bitnet-tiny/online"), "--metadata"]);
    assert!(code == 2 && stderr.contains("GGUF"), "{code} {stderr}");
}

#[test]
fn people_see_shape_weights_and_text() {
    let shown = stdout(&["inspect", "builtin"]);
    for expected in ["architecture    bitnet", "4,096", "bits per weight", "tokenizer", "sub-norms"]
    {
        assert!(shown.contains(expected), "{expected}: {shown}");
    }
    assert!(!shown.contains('\x1b'));
}

#[test]
fn files_that_are_no_models_are_refused() {
    let folder = tempfile::tempdir().unwrap();
    let text = folder.path().join("notes.txt");
    std::fs::write(&text, "no model").unwrap();
    for path in [folder.path(), &text, &folder.path().join("missing.gguf")] {
        let (code, stderr) = failure(&["inspect", path.to_str().unwrap()]);
        assert_eq!(code, 1);
        let name = path.file_name().unwrap().to_str().unwrap();
        assert!(stderr.contains(name), "the file is named: {stderr}");
    }
}

//! Files that lie: each must give a typed error that names the file and the lie, soon and without
//! asking for the memory they claim to need.

mod common;

use bitnet_quant::checkpoint::ModelFiles;
use bitnet_quant::safetensors::{Planned, write_header};
use bitnet_quant::{Checkpoint, Error};
use bytes::Bytes;
use common::{Tiny, golden_path, read_all};
use proptest::prelude::*;
use safetensors::Dtype;
use serde_json::json;

const Q_PROJ: &str = "model.layers.0.self_attn.q_proj.weight";
const Q_SCALE: &str = "model.layers.0.self_attn.q_proj.weight_scale";

/// Opens and reads all of a damaged model; the error's text.
fn refusal(damage: impl FnOnce(&mut Tiny)) -> String {
    let mut tiny = Tiny::new();
    damage(&mut tiny);
    let result = tiny.open().and_then(|checkpoint| read_all(&checkpoint));
    let message = result.expect_err("a damaged model was accepted").to_string();
    assert!(message.starts_with("tiny"), "{message} does not name the file");
    message
}

#[track_caller]
fn refused(expected: &str, damage: impl FnOnce(&mut Tiny)) {
    let message = refusal(damage);
    assert!(message.contains(expected), "{message:?} should contain {expected:?}");
}

#[test]
fn the_undamaged_model_opens() {
    read_all(&Tiny::new().open().unwrap()).unwrap();
}

#[test]
fn missing_tensors() {
    let names: Vec<String> = Tiny::new().tensors.into_iter().map(|(t, _)| t.name).collect();
    for name in names {
        refused(&format!("tensor {name} is missing"), |tiny| drop(tiny.remove(&name)));
    }
    refused("tensor lm_head.weight is missing", |t| t.config["tie_word_embeddings"] = json!(false));
    refused("attn_sub_norm.weight is missing", |t| t.config["model_type"] = json!("bitnet"));
    refused("q_norm.weight is missing", |t| {
        t.config["model_type"] = json!("qwen3");
        t.config["head_dim"] = json!(8);
    });
}

#[test]
fn wrong_shapes() {
    refused("shape of model.norm.weight: expected [16], got [15]", |tiny| {
        tiny.remove("model.norm.weight");
        tiny.push_f32("model.norm.weight", &[15], &[1.0; 15]);
    });
    refused("q_proj.weight: expected [16, 16], got [20, 16]", |tiny| {
        tiny.remove(Q_PROJ);
        tiny.push(Q_PROJ, Dtype::U8, &[5, 16], vec![0; 80]);
    });
    refused("expected [16, 16], got [16, 16, 1]", |tiny| {
        tiny.remove(Q_PROJ);
        tiny.push_f32(Q_PROJ, &[16, 16, 1], &[0.0; 256]);
    });
    refused("q_proj.bias: expected [16], got [8]", |tiny| {
        tiny.push_f32("model.layers.0.self_attn.q_proj.bias", &[8], &[0.0; 8]);
    });
    refused("got [0]", |tiny| {
        tiny.remove("model.norm.weight");
        tiny.push_f32("model.norm.weight", &[0], &[]);
    });
}

#[test]
fn a_lying_config() {
    for (key, value, expected) in [
        ("hidden_size", json!(32), "shape of model.embed_tokens.weight"),
        ("vocab_size", json!(9), "expected [9, 16], got [8, 16]"),
        ("vocab_size", json!(4_000_000), "shape of model.embed_tokens.weight"),
        ("num_hidden_layers", json!(2), "tensor model.layers.1."),
        ("num_hidden_layers", json!(u64::MAX), "num_hidden_layers: expected 1 to"),
        ("num_attention_heads", json!(4_000_000_000_u64), "num_attention_heads: expected"),
        ("num_key_value_heads", json!(1), "shape of model.layers.0.self_attn.k_proj.weight"),
        ("head_dim", json!(4), "shape of model.layers.0.self_attn.q_proj.weight"),
        ("intermediate_size", json!(16), "shape of model.layers.0.mlp.gate_proj.weight"),
        ("rms_norm_eps", json!(-1e-5), "rms_norm_eps: expected a number above 0"),
        ("rope_theta", json!(0), "rope_theta: expected a number above 1"),
        ("max_position_embeddings", json!(1u64 << 40), "max_position_embeddings: expected"),
        ("quantization_config", json!(null), "type of model.layers.0.self_attn.q_proj.weight U8"),
    ] {
        refused(expected, |tiny| tiny.config[key] = value);
    }
}

#[test]
fn scales_and_weights_that_are_no_numbers() {
    for (stored, expected) in [
        (&[f32::NAN][..], "weight_scale: expected finite numbers, got NaN at 0"),
        (&[f32::INFINITY], "weight_scale: expected finite numbers, got inf at 0"),
        (&[1.0, 2.0], "weight_scale: expected one number, got 2"),
    ] {
        refused(expected, |tiny| {
            tiny.remove(Q_SCALE);
            tiny.push_f32(Q_SCALE, &[stored.len()], stored);
        });
    }
    refused("weight_scale: expected a number that has an inverse, got 0", |tiny| {
        tiny.config["quantization_config"]["linear_class"] = json!("bitlinear");
        tiny.remove(Q_SCALE);
        tiny.push_f32(Q_SCALE, &[1], &[0.0]);
    });
    refused("model.norm.weight: expected finite numbers, got NaN at 3", |tiny| {
        tiny.remove("model.norm.weight");
        let mut values = [1.0; 16];
        values[3] = f32::NAN;
        tiny.push_f32("model.norm.weight", &[16], &values);
    });
    refused("q_proj.weight: expected finite weights, got NaN", |tiny| {
        tiny.config["quantization_config"]["quantization_mode"] = json!("online");
        tiny.remove(Q_PROJ);
        tiny.push_f32(Q_PROJ, &[16, 16], &[f32::NAN; 256]);
    });
    refused("expected ternary weights, as quantization_mode offline promises", |tiny| {
        tiny.remove(Q_PROJ);
        let values: Vec<f32> = (0..256).map(|i| i as f32).collect();
        tiny.push_f32(Q_PROJ, &[16, 16], &values);
    });
    refused("expected the codes 0, 1 and 2, got code 3 in byte 7 of 64", |tiny| {
        let (planned, mut bytes) = tiny.remove(Q_PROJ);
        bytes[7] = 0b00_11_00_00;
        tiny.tensors.push((planned, bytes));
    });
    refused("type of model.norm.weight I64 is not supported", |tiny| {
        tiny.remove("model.norm.weight");
        tiny.push("model.norm.weight", Dtype::I64, &[16], vec![0; 128]);
    });
}

#[test]
fn giant_headers_and_deep_json() {
    let open = |name: &'static str, bytes: Vec<u8>| {
        let mut files = Tiny::new().files();
        let at = files.iter().position(|(file, _)| *file == name);
        let at = at.expect("a file of the tiny model");
        files[at].1 = Bytes::from(bytes);
        let error = Checkpoint::from_files(ModelFiles::in_memory("tiny", files)).unwrap_err();
        let message = error.to_string();
        assert!(message.starts_with(&format!("tiny/{name}: ")), "{message}");
        message
    };
    let mut giant = (1u64 << 40).to_le_bytes().to_vec();
    giant.resize(1000, b' ');
    assert!(open("model.safetensors", giant).contains("header length: expected at most"));
    let deep = [b"{\"a\":".as_slice(), &b"[".repeat(1 << 20)].concat();
    let mut header = (deep.len() as u64).to_le_bytes().to_vec();
    header.extend_from_slice(&deep);
    open("model.safetensors", header);
    open("config.json", deep);
    open("config.json", vec![b' '; 5 << 20]);
    open("config.json", Vec::new());
    open("model.safetensors", Vec::new());
}

#[test]
fn a_header_that_promises_the_moon_costs_nothing() {
    let plan = [Planned { name: "x".into(), dtype: Dtype::F32, shape: vec![1 << 30, 1 << 20] }];
    let mut bytes = Vec::new();
    write_header(&mut bytes, &plan).unwrap();
    let mut files = Tiny::new().files();
    files[1].1 = bytes.into();
    let error = Checkpoint::from_files(ModelFiles::in_memory("tiny", files)).unwrap_err();
    assert!(error.to_string().contains("header"), "{error}");
}

#[test]
fn what_is_no_model_on_disk() {
    let folder = tempfile::tempdir().unwrap();
    let path = |name: &str| folder.path().join(name);
    let refused = |name: &str, expected: &str| {
        let error = Checkpoint::open(path(name)).unwrap_err();
        let message = match &error {
            Error::Io { source, .. } => format!("{error}: {source}"),
            _ => error.to_string(),
        };
        assert!(message.starts_with(&path(name).display().to_string()), "{message}");
        assert!(message.contains(expected), "{message}");
    };
    refused("absent", "o such file");
    std::fs::create_dir(path("empty")).unwrap();
    refused("empty", "config.json or a GGUF file is missing");
    std::fs::write(path("nothing"), b"").unwrap();
    refused("nothing", "an empty file");
    std::fs::write(path("text.txt"), b"hello").unwrap();
    refused("text.txt", "expected GGUF or safetensors, got a file that starts with");
    std::fs::write(path("alone.safetensors"), Tiny::new().safetensors()).unwrap();
    let error = Checkpoint::open(path("alone.safetensors")).unwrap_err().to_string();
    assert!(error.contains("config.json is missing"), "{error}");
    // A folder where a file is expected.
    std::fs::create_dir_all(path("odd/config.json")).unwrap();
    assert!(Checkpoint::open(path("odd")).unwrap_err().to_string().contains("a folder"));
}

#[cfg(unix)]
#[test]
fn pipes_are_refused_without_waiting() {
    let folder = tempfile::tempdir().unwrap();
    let pipe = folder.path().join("config.json");
    assert!(std::process::Command::new("mkfifo").arg(&pipe).status().unwrap().success());
    for path in [pipe.as_path(), folder.path()] {
        let error = Checkpoint::open(path).unwrap_err().to_string();
        assert!(error.contains("a pipe, socket or device"), "{error}");
    }
}

/// Bytes of a file with one bit flipped in some places.
fn flip(bytes: &[u8], places: &[(usize, u8)]) -> Bytes {
    let mut bytes = bytes.to_vec();
    for &(place, bit) in places {
        let at = place % bytes.len();
        bytes[at] ^= 1 << bit;
    }
    bytes.into()
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(512))]

    /// Whatever bits are wrong: a model that can be read, or an error; never a panic.
    #[test]
    fn flipped_bits_never_panic(
        file in 0usize..2,
        places in prop::collection::vec((any::<usize>(), 0u8..8), 1..4),
    ) {
        let mut files = Tiny::new().files();
        // Most damage should fall on the header, not on weights.
        let limit = if file == 1 { 2600 } else { usize::MAX };
        let places: Vec<_> = places.into_iter().map(|(at, bit)| (at % limit, bit)).collect();
        files[file].1 = flip(&files[file].1, &places);
        if let Ok(checkpoint) = Checkpoint::from_files(ModelFiles::in_memory("tiny", files)) {
            let _ = read_all(&checkpoint);
            let _ = checkpoint.tensors();
        }
    }
}

#[test]
fn a_weight_file_cut_anywhere_is_refused() {
    let files = Tiny::new().files();
    let whole = files[1].1.clone();
    for len in 0..whole.len() {
        let mut files = files.clone();
        files[1].1 = whole.slice(..len);
        assert!(Checkpoint::from_files(ModelFiles::in_memory("tiny", files)).is_err(), "{len}");
    }
}

#[test]
fn golden_configs_with_wrong_models_are_refused() {
    let read = |path: &str| Bytes::from(std::fs::read(golden_path(path)).unwrap());
    let files = [
        ("config.json", read("llama-ternary-tiny/online/config.json")),
        ("model.safetensors", read("bitnet-tiny/online/model.safetensors")),
    ];
    let error = Checkpoint::from_files(ModelFiles::in_memory("mixed", files)).unwrap_err();
    assert!(matches!(error, Error::Malformed { .. } | Error::Missing { .. }), "{error}");
}

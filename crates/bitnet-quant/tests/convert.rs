//! Converts the golden models between all forms: no trit may change, and no scale where the target
//! has room for it.

mod common;

use bitnet_core::weights::{ActivationQuant, Matrix};
use bitnet_quant::checkpoint::{FileFormat, ModelFiles};
use bitnet_quant::config::RopeScaling;
use bitnet_quant::convert::{
    ConvertOptions, Progress, Report, Target, check, convert, table_format,
};
use bitnet_quant::quantize::{QuantizeOptions, quantize};
use bitnet_quant::text::TokenizerSource;
use bitnet_quant::{Checkpoint, Error};
use bytes::Bytes;
use common::{PROJECTIONS, Tiny, floats, golden, golden_path, trits};
use std::path::{Path, PathBuf};
use tempfile::TempDir;

/// Relative error of rounding to half precision.
const HALF: f32 = 1.0 / 2048.0;

fn target(name: &str) -> ConvertOptions {
    ConvertOptions::new(name.parse().unwrap())
}

/// A place for the output: a folder for folders, a file for GGUF.
fn place(folder: &TempDir, name: &str, options: ConvertOptions) -> PathBuf {
    match options.target {
        Target::Folder(_) => folder.path().join(name),
        Target::Gguf(_) => folder.path().join(format!("{name}.gguf")),
    }
}

fn run(source: &Checkpoint, options: ConvertOptions, out: &Path) -> Result<Report, Error> {
    convert(source, options, out, &mut |_| {})
}

/// Compares two checkpoints weight by weight; scales within `tolerance`.
fn same(a: &Checkpoint, b: &Checkpoint, tolerance: f32) {
    for path in a.projections() {
        let ((codes, scale, activations), other) = (trits(a, &path), trits(b, &path));
        assert!(codes == other.0, "{path}");
        assert!((scale - other.1).abs() <= tolerance * scale, "{path}: {scale} and {}", other.1);
        assert_eq!(activations, other.2, "{path}");
    }
    for layer in 0..a.config().num_hidden_layers {
        for part in ["input_layernorm", "post_attention_layernorm"] {
            let path = format!("model.layers.{layer}.{part}");
            assert_eq!(a.norm(&path).unwrap(), b.norm(&path).unwrap());
        }
    }
    assert_eq!(a.norm("model.norm").unwrap(), b.norm("model.norm").unwrap());
    for path in ["model.embed_tokens", "lm_head"] {
        assert_eq!(a.has(path), b.has(path));
        if a.has(path) {
            let (a, b) = (a.table(path).unwrap(), b.table(path).unwrap());
            assert!(floats(&*a) == floats(&*b), "{path}");
        }
    }
    assert_eq!(a.weight_count(), b.weight_count());
}

/// Settings that must survive, whatever the form.
fn same_settings(a: &Checkpoint, b: &Checkpoint) {
    let (mut a_config, b_config) = (a.config().clone(), b.config().clone());
    a_config.name.clone_from(&b_config.name);
    let (a_divisors, b_divisors) = (a_config.rope_divisors(), b_config.rope_divisors());
    for (a, b) in a_divisors.iter().zip(&b_divisors) {
        assert!((a - b).abs() <= 1e-6 * a, "rope divisors {a} and {b}");
    }
    a_config.rope_scaling.clone_from(&b_config.rope_scaling);
    assert_eq!(a_config, b_config);
    let (a, b) = (a.text(), b.text());
    assert_eq!(a.bos_token_id, b.bos_token_id);
    assert_eq!(a.eos_token_ids, b.eos_token_ids);
    assert_eq!(a.add_bos, b.add_bos);
    assert_eq!(a.chat_template, b.chat_template);
}

#[test]
fn all_forms_become_each_other() {
    let sources = [
        "bitnet-tiny/packed_multiply",
        "bitnet-tiny/packed_divide",
        "bitnet-tiny/online",
        "bitnet-tiny/model-i2_s.gguf",
        "llama-ternary-tiny/packed_multiply",
        "llama-ternary-tiny/online",
        "gguf-bitnet-silu/model-tq2_0.gguf",
        "gguf-bitnet-silu/model-tq1_0.gguf",
    ];
    for name in sources {
        let source = golden(name);
        let folder = tempfile::tempdir().unwrap();
        for (target_name, target) in Target::all() {
            let options = ConvertOptions::new(target);
            let out = place(&folder, target_name, options);
            let result = run(&source, options, &out);
            // Rows of 128 and 384 columns do not divide into blocks of 256.
            if matches!(target_name, "tq1_0" | "tq2_0") && !name.starts_with("gguf") {
                let error = result.unwrap_err();
                assert!(matches!(error, Error::DoesNotFit { .. }), "{error}");
                assert!(!out.exists());
                continue;
            }
            let report = result.unwrap_or_else(|error| panic!("{name} to {target_name}: {error}"));
            let exact = matches!(target_name, "hf" | "hf-divide" | "i2_s" | "tiles");
            assert!(!exact || report.scale_error == 0.0);
            assert!(report.scale_error <= HALF);
            assert_eq!(report.ternary, 7 * source.config().num_hidden_layers);
            let result = Checkpoint::open(&out).unwrap();
            same(&source, &result, if exact { 0.0 } else { HALF });
            same_settings(&source, &result);
            assert_eq!(result.file_format() == FileFormat::Safetensors, out.is_dir());
        }
    }
}

#[test]
fn there_and_back_gives_the_same_bytes() {
    let folder = tempfile::tempdir().unwrap();
    for (name, form, detour) in [
        ("bitnet-tiny/model-i2_s.gguf", "i2_s", "hf"),
        ("gguf-bitnet-silu/model-tq2_0.gguf", "tq2_0", "i2_s"),
        ("gguf-bitnet-silu/model-tq1_0.gguf", "tq1_0", "hf-divide"),
    ] {
        let source = golden(name);
        let there = place(&folder, &format!("{form}-there"), target(detour));
        run(&source, target(detour), &there).unwrap();
        let back = place(&folder, &format!("{form}-back"), target(form));
        run(&Checkpoint::open(&there).unwrap(), target(form), &back).unwrap();
        let (a, b) = (open_gguf(&golden_path(name)), open_gguf(&back));
        for tensor in a.tensors() {
            let other = b.info(&tensor.name).unwrap();
            assert_eq!((tensor.tensor_type, &tensor.shape), (other.tensor_type, &other.shape));
            assert!(a.bytes(tensor)[..] == b.bytes(other)[..], "{name}: {}", tensor.name);
        }
    }
}

fn open_gguf(path: &Path) -> bitnet_quant::gguf::GgufFile {
    bitnet_quant::gguf::GgufFile::open(path).unwrap()
}

#[test]
fn llama_files_have_the_row_order_of_llama_cpp() {
    let folder = tempfile::tempdir().unwrap();
    let source = golden("llama-ternary-tiny/packed_multiply");
    let out = folder.path().join("m.gguf");
    run(&source, target("q2_0"), &out).unwrap();
    let bitnet_quant::gguf::Tensor::Ternary(stored) =
        open_gguf(&out).tensor("blk.0.attn_q.weight").unwrap()
    else {
        panic!("attn_q is float")
    };
    use bitnet_core::weights::TernaryRows;
    let (codes, ..) = trits(&source, "model.layers.0.self_attn.q_proj");
    // Heads of 32 features: file row 2i is row i, file row 2i + 1 is row i + 16.
    for (file_row, row) in [(0, 0), (1, 16), (2, 1), (31, 31), (32, 32), (35, 49)] {
        let mut out = vec![9; 128];
        stored.decode_row(file_row, &mut out);
        assert!(out == codes[row * 128..][..128], "row {file_row}");
    }
    let freqs = Checkpoint::open(&out).unwrap().config().rope_scaling.clone();
    let RopeScaling::Factors(freqs) = freqs else { panic!("{freqs:?}") };
    assert_eq!((freqs.len(), freqs[0], freqs[15]), (16, 1.0, 8.0));
}

#[test]
fn tables_take_the_format_asked_for() {
    let folder = tempfile::tempdir().unwrap();
    let source = golden("gguf-bitnet-silu/model-tq2_0.gguf");
    let exact = floats(&*source.table("model.embed_tokens").unwrap());
    let largest = exact.iter().fold(0f32, |a, b| a.max(b.abs()));
    for (name, steps) in
        [("f32", f32::INFINITY), ("f16", 2048.0), ("bf16", 256.0), ("q8_0", 254.0), ("q6_k", 60.0)]
    {
        let tables = Some(table_format(name).unwrap());
        let options = ConvertOptions { tables, ..target("tq2_0") };
        let out = place(&folder, name, options);
        run(&source, options, &out).unwrap();
        let result = Checkpoint::open(&out).unwrap();
        let entry = result.tensors().into_iter().find(|t| t.name == "model.embed_tokens.weight");
        assert_eq!(entry.unwrap().type_name.to_lowercase(), name);
        let table = floats(&*result.table("model.embed_tokens").unwrap());
        for (a, b) in exact.iter().zip(&table) {
            assert!((a - b).abs() <= largest / steps, "{name}: {a} became {b}");
        }
    }
    let options = ConvertOptions { tables: Some(table_format("q8_0").unwrap()), ..target("hf") };
    let error = run(&source, options, &folder.path().join("hf")).unwrap_err();
    assert!(matches!(error, Error::Unsupported { .. }), "{error}");
    assert!(!folder.path().join("hf").exists(), "nothing is left of a failed conversion");
    let told = check(&source, options).unwrap_err();
    assert_eq!(told.to_string(), error.to_string(), "known without writing");
    assert!("q7_z".parse::<Target>().unwrap_err().to_string().contains("supported: hf, hf-divide"));
}

#[test]
fn nothing_is_replaced_without_force() {
    let folder = tempfile::tempdir().unwrap();
    let source = golden("bitnet-tiny/packed_multiply");
    for name in ["hf", "i2_s"] {
        let out = place(&folder, name, target(name));
        check(&source, target(name)).unwrap();
        assert!(!out.exists());
        run(&source, target(name), &out).unwrap();
        assert!(matches!(run(&source, target(name), &out), Err(Error::Exists(_))));
        run(&source, ConvertOptions { force: true, ..target(name) }, &out).unwrap();
        same(&source, &Checkpoint::open(&out).unwrap(), 0.0);
    }
    // The tokenizer and template of the model that was there are not the new one's.
    let (own, out) = (golden("qwen3-tiny/packed_multiply"), folder.path().join("hf"));
    std::fs::write(out.join("chat_template.jinja"), "of another model").unwrap();
    run(&own, ConvertOptions { force: true, ..target("hf") }, &out).unwrap();
    assert!(!out.join("chat_template.jinja").exists() && !out.join("tokenizer.json").exists());
    // Other weights in a folder would be found in place of the new ones: never replaced.
    let out = folder.path().join("hf");
    std::fs::write(out.join("model-00001-of-00002.safetensors"), b"x").unwrap();
    let error = run(&source, ConvertOptions { force: true, ..target("hf") }, &out).unwrap_err();
    assert!(
        matches!(error, Error::Exists(path) if path.ends_with("model-00001-of-00002.safetensors"))
    );
    let left: Vec<_> = std::fs::read_dir(folder.path())
        .unwrap()
        .map(|entry| entry.unwrap().file_name().into_string().unwrap())
        .filter(|name| name.ends_with(".part"))
        .collect();
    assert!(left.is_empty(), "{left:?}");
}

#[test]
fn progress_reaches_the_end() {
    let folder = tempfile::tempdir().unwrap();
    let source = golden("llama-ternary-tiny/packed_divide");
    for name in ["hf", "i2_s"] {
        let (mut last, mut calls, mut total_at_end) = (0, 0, 0);
        let mut watch = |progress: Progress<'_>| {
            assert!(progress.done > last && progress.done <= progress.total);
            (last, total_at_end, calls) = (progress.done, progress.total, calls + 1);
        };
        let out = place(&folder, name, target(name));
        let report = convert(&source, target(name), out, &mut watch).unwrap();
        assert_eq!((last, last), (total_at_end, report.bytes));
        assert_eq!(calls, report.tensors);
    }
}

#[test]
fn vocabularies_survive_both_ways() {
    let folder = tempfile::tempdir().unwrap();
    let source = golden("bitnet-tiny/packed_multiply");
    let Some(TokenizerSource::HuggingFace(original)) = &source.text().tokenizer else { panic!() };
    let original: serde_json::Value = serde_json::from_slice(original).unwrap();

    let gguf = folder.path().join("m.gguf");
    run(&source, target("i2_s"), &gguf).unwrap();
    let checkpoint = Checkpoint::open(&gguf).unwrap();
    let Some(TokenizerSource::Gguf(vocabulary)) = &checkpoint.text().tokenizer else { panic!() };
    assert_eq!((vocabulary.model.as_str(), vocabulary.pre.as_deref()), ("gpt2", Some("gpt-2")));
    // The same that `make_goldens.py` wrote by hand.
    let by_hand = golden("bitnet-tiny/model-i2_s.gguf");
    let Some(TokenizerSource::Gguf(by_hand)) = &by_hand.text().tokenizer else { panic!() };
    assert_eq!(vocabulary.tokens, by_hand.tokens);
    assert_eq!(vocabulary.merges, by_hand.merges);
    assert_eq!(vocabulary.token_types, by_hand.token_types);

    let back = folder.path().join("back");
    run(&checkpoint, target("hf"), &back).unwrap();
    let made: serde_json::Value =
        serde_json::from_slice(&std::fs::read(back.join("tokenizer.json")).unwrap()).unwrap();
    assert_eq!(made["model"]["vocab"], original["model"]["vocab"]);
    assert_eq!(made["model"]["merges"], original["model"]["merges"]);
    assert_eq!(made["added_tokens"], original["added_tokens"]);
    let result = Checkpoint::open(&back).unwrap();
    assert_eq!(result.text().special_tokens, checkpoint.text().special_tokens);
}

/// The online golden without the word that it is BitNet: an ordinary float model.
fn float_model() -> Checkpoint {
    let folder = golden_path("llama-ternary-tiny/online");
    let config = std::fs::read(folder.join("config.json")).unwrap();
    let mut config: serde_json::Value = serde_json::from_slice(&config).unwrap();
    config.as_object_mut().unwrap().remove("quantization_config");
    let names = ["model.safetensors", "tokenizer.json", "tokenizer_config.json"];
    let read = |name| (name, Bytes::from(std::fs::read(folder.join(name)).unwrap()));
    let files = names.into_iter().map(read);
    let files = files.chain([("config.json", Bytes::from(config.to_string()))]);
    Checkpoint::from_files(ModelFiles::in_memory("float", files)).unwrap()
}

#[test]
fn masters_become_the_ternary_goldens() {
    let folder = tempfile::tempdir().unwrap();
    let source = float_model();
    let path = "model.layers.0.mlp.up_proj";
    assert!(matches!(source.linear(path).unwrap().matrix, Matrix::Float(_)));
    assert_eq!(source.weight_count().ternary, 0);
    let golden = golden("llama-ternary-tiny/packed_multiply");
    for name in ["hf", "hf-divide", "i2_s"] {
        let out = place(&folder, name, target(name));
        let report = quantize(&source, &QuantizeOptions::new(target(name)), &out, &mut |_| {});
        assert_eq!(report.unwrap().ternary, 14);
        let result = Checkpoint::open(&out).unwrap();
        same(&golden, &result, f32::EPSILON);
        same_settings(&golden, &result);
    }
    // What is to be kept stays float, in either form, and after opening too.
    for (name, source) in
        [("hf", &source), ("i2_s", &source), ("q2_0", &common::golden("bitnet-tiny/online"))]
    {
        let keep = vec!["layers.1".to_owned(), "q_proj".to_owned()];
        let options = QuantizeOptions { output: target(name), keep };
        let out = place(&folder, &format!("{name}-kept"), options.output);
        assert_eq!(quantize(source, &options, &out, &mut |_| {}).unwrap().ternary, 6);
        let result = Checkpoint::open(&out).unwrap();
        for path in result.projections() {
            let kept = path.contains("layers.1") || path.ends_with("q_proj");
            let matrix = result.linear(&path).unwrap().matrix;
            assert_eq!(matches!(matrix, Matrix::Float(_)), kept, "{name} {path}");
        }
    }
    let error = quantize(&golden, &QuantizeOptions::new(target("hf")), folder.path(), &mut |_| {});
    assert!(error.unwrap_err().to_string().contains("expected float weights to quantize"));
}

#[test]
fn ternary_weights_trained_with_float_activations_stay_so() {
    let folder = tempfile::tempdir().unwrap();
    // As TriLM is published: ±s and 0 in floats, no word of it.
    let mut tiny = Tiny::sized(128, 256);
    tiny.config.as_object_mut().unwrap().remove("quantization_config");
    for part in PROJECTIONS {
        let path = format!("model.layers.0.{part}");
        tiny.remove(&format!("{path}.weight_scale"));
        let (planned, packed) = tiny.remove(&format!("{path}.weight"));
        let shape = [planned.shape[0] * 4, planned.shape[1]];
        let values: Vec<f32> = (0..packed.len() * 4).map(|i| (i % 3) as f32 * 0.5 - 0.5).collect();
        tiny.push_f32(&planned.name, &shape, &values);
    }
    let source = tiny.open().unwrap();
    let path = "model.layers.0.mlp.down_proj";
    let (codes, scale, activations) = trits(&source, path);
    assert_eq!((&codes[..4], scale), (&[0, 1, 2, 0][..], 0.5));
    assert_eq!(activations, ActivationQuant::PerGroup(32));
    for form in ["i2_s", "q2_0"] {
        let out = place(&folder, form, target(form));
        assert!(run(&source, target(form), &out).unwrap().notes.is_empty());
        assert_eq!(
            trits(&Checkpoint::open(&out).unwrap(), path),
            (codes.clone(), scale, activations)
        );
    }
    // The folder's form has no word for float activations.
    let out = folder.path().join("hf");
    let report = run(&source, target("hf"), &out).unwrap();
    assert!(report.notes[0].contains("float activations"), "{:?}", report.notes);
    assert_eq!(trits(&Checkpoint::open(&out).unwrap(), path).2, ActivationQuant::PerToken);
}

#[test]
#[ignore = "needs Python with the packages gguf, safetensors, tokenizers and numpy"]
fn the_python_packages_read_what_we_write() {
    let python = std::env::var("BITNET_TEST_PYTHON").unwrap_or_else(|_| "python3".to_owned());
    let script = concat!(env!("CARGO_MANIFEST_DIR"), "/tests/fixtures/check_conversions.py");
    let folder = tempfile::tempdir().unwrap();
    let source = golden("gguf-bitnet-silu/model-tq2_0.gguf");
    for name in ["hf", "hf-divide", "tq1_0", "tq2_0"] {
        run(&source, target(name), &place(&folder, name, target(name))).unwrap();
    }
    let gguf = folder.path().join("text.gguf");
    run(&golden("bitnet-tiny/packed_divide"), target("i2_s"), &gguf).unwrap();
    run(&Checkpoint::open(&gguf).unwrap(), target("hf"), &folder.path().join("text")).unwrap();
    let output = std::process::Command::new(python)
        .arg(script)
        .arg(folder.path())
        .arg(golden_path("bitnet-tiny/text.json"))
        .output()
        .unwrap();
    let text = String::from_utf8_lossy(&output.stdout);
    assert!(output.status.success(), "{text}{}", String::from_utf8_lossy(&output.stderr));
}

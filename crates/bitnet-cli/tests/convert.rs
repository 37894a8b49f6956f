//! `bitnet convert` and `bitnet quantize`: round trips through every form.

mod common;

use common::{failure, golden, json, run, stdout};

const IDS: &str = "5,6,7,8,9,10,11,12";

fn logits(model: &str) -> Vec<f64> {
    let found = json(&["logits", model, "--ids", IDS, "--all", "--json"]);
    let rows = found["logits"].as_array().unwrap().clone();
    rows.iter()
        .flat_map(|row| row.as_array().unwrap().clone())
        .map(|x| x.as_f64().unwrap())
        .collect()
}

fn distance(a: &[f64], b: &[f64]) -> f64 {
    let difference: f64 = a.iter().zip(b).map(|(a, b)| (a - b).powi(2)).sum();
    (difference / b.iter().map(|b| b * b).sum::<f64>()).sqrt()
}

#[test]
fn every_form_keeps_the_models_logits() {
    let folder = tempfile::tempdir().unwrap();
    let source = golden("llama-ternary-tiny/packed_multiply");
    let expected = logits(&source);
    for (form, extra) in
        [("hf", &[][..]), ("hf", &["--scale", "divide"]), ("i2_s", &[]), ("q2_0", &[])]
    {
        let out = folder.path().join(format!("{form}{}.gguf", extra.len()));
        let out = out.to_str().unwrap();
        let report = json(&[&["convert", &source, out, "--to", form, "--json"], extra].concat());
        assert!(report["ternary"].as_u64().unwrap() > 0, "{report}");
        // Forms with half precision scales move activations over a rounding border now and then.
        let exact = report["scale_error"].as_f64().unwrap() == 0.0;
        let found = distance(&logits(out), &expected);
        assert!(found < if exact { 1e-4 } else { 3e-2 }, "{form} {extra:?}: {found:e}");
    }
}

#[test]
fn there_and_back_is_the_same_model() {
    let folder = tempfile::tempdir().unwrap();
    let path = |name: &str| folder.path().join(name).to_str().unwrap().to_owned();
    let source = golden("bitnet-tiny/packed_multiply");
    let (gguf, back) = (path("model.gguf"), path("back"));
    stdout(&["convert", &source, &gguf]);
    stdout(&["convert", &gguf, &back]);
    let format = |model: &str| json(&["inspect", model, "--json"])["format"].clone();
    assert_eq!((format(&gguf), format(&back)), ("GGUF v3".into(), "safetensors".into()));
    assert_eq!(logits(&back), logits(&source));
    // The tokenizer and the template came along.
    let told = |model: &str| {
        stdout(&["run", "-m", model, "Hello there", "--chat", "--greedy", "-n", "8", "--quiet"])
    };
    assert_eq!(told(&gguf), told(&source));
    assert_eq!(told(&back), told(&source));
}

#[test]
fn masters_become_the_ternary_model_they_were_trained_as() {
    let folder = tempfile::tempdir().unwrap();
    let out = folder.path().join("packed");
    let out = out.to_str().unwrap();
    let masters = golden("bitnet-tiny/online");
    stdout(&["quantize", &masters, out, "--to", "hf"]);
    assert!(distance(&logits(out), &logits(&masters)) < 1e-4);
    let inspected = json(&["inspect", out, "--json"]);
    let ternary = inspected["weights"]["ternary"].as_u64().unwrap();
    let formats = &inspected["weights"]["formats"];
    assert!(formats["packed uint8"]["tensors"].as_u64().unwrap() == 14 && ternary > 0, "{formats}");

    let kept = folder.path().join("kept");
    let kept = kept.to_str().unwrap();
    stdout(&["quantize", &masters, kept, "--to", "hf", "--keep", "mlp.down_proj"]);
    let formats = json(&["inspect", kept, "--json"])["weights"]["formats"].clone();
    assert_eq!(formats["packed uint8"]["tensors"], 12, "{formats}");
}

#[test]
fn embeddings_may_be_stored_smaller() {
    let folder = tempfile::tempdir().unwrap();
    let out = folder.path().join("small.gguf");
    let out = out.to_str().unwrap();
    let source = golden("bitnet-tiny/packed_multiply");
    stdout(&["convert", &source, out, "--to", "i2_s", "--embedding", "q8_0"]);
    let tensors = json(&["inspect", out, "--tensors", "--json"])["tensors"].clone();
    let tensors = tensors.as_array().unwrap().clone();
    let table = tensors.iter().find(|t| t["file_name"] == "token_embd.weight").unwrap();
    assert_eq!(table["type"], "Q8_0");
    assert!(distance(&logits(out), &logits(&source)) < 3e-2);
}

#[test]
fn nothing_is_overwritten_unasked_and_mistakes_leave_nothing() {
    let folder = tempfile::tempdir().unwrap();
    let out = folder.path().join("model.gguf");
    let source = golden("bitnet-tiny/packed_multiply");
    let to = |extra: &[&str]| {
        let args = ["convert", &source, out.to_str().unwrap()];
        args.iter().chain(extra).map(|arg| (*arg).to_owned()).collect::<Vec<_>>()
    };
    let refused = |args: Vec<String>| failure(&args.iter().map(String::as_str).collect::<Vec<_>>());
    let (code, stderr) = refused(to(&["--to", "parchment"]));
    assert!(code == 2 && stderr.contains("i2_s"), "{stderr}");
    assert_eq!(refused(to(&["--to", "i2_s", "--scale", "divide"])).0, 2);
    assert_eq!(refused(to(&["--to", "i2_s", "--embedding", "q3_k"])).0, 2);
    assert_eq!(std::fs::read_dir(folder.path()).unwrap().count(), 0);

    std::fs::write(&out, "precious").unwrap();
    let (code, stderr) = refused(to(&["--to", "i2_s"]));
    assert!(code == 1 && stderr.contains("exists already"), "{stderr}");
    assert_eq!(std::fs::read_to_string(&out).unwrap(), "precious");
    let forced = to(&["--to", "i2_s", "--force"]);
    stdout(&forced.iter().map(String::as_str).collect::<Vec<_>>());
    assert!(std::fs::metadata(&out).unwrap().len() > 1000);

    // A folder may have any name, but this one looks like a file's.
    let folder = out.with_file_name("folder.gguf");
    let told = run(&["convert", &source, folder.to_str().unwrap(), "--to", "hf"]);
    assert!(told.status.success() && folder.is_dir());
    assert!(common::text(&told.stderr).contains("folder.gguf is a folder"));

    let (code, stderr) = failure(&["quantize", &source, "x", "--to", "hf"]);
    assert!(code == 1 && stderr.contains("float weights to quantize"), "{stderr}");
}

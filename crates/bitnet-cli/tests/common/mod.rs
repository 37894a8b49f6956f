//! Runs the built program as a user would, away from the user's own settings.
#![allow(dead_code)] // each test file uses its part

use std::io::Write;
use std::path::PathBuf;
use std::process::{Command, Output, Stdio};

use safetensors::{Dtype, SafeTensors};
use serde_json::Value;

/// The program with no settings from the environment.
pub(crate) fn bitnet() -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_bitnet"));
    for (name, _) in std::env::vars_os() {
        // BITNET_KERNEL stays: the whole suite runs once with each kernel of a machine.
        if name.to_string_lossy().starts_with("BITNET_") && name != "BITNET_KERNEL" {
            command.env_remove(name);
        }
    }
    command.stdin(Stdio::null());
    command
}

/// Runs it to its end with these arguments.
pub(crate) fn run(args: &[&str]) -> Output {
    bitnet().args(args).output().expect("the program starts")
}

/// Runs it with `input` in its standard input.
pub(crate) fn run_with_input(args: &[&str], input: &str) -> Output {
    let mut child = bitnet()
        .args(args)
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .expect("the program starts");
    // A program that ends early closes the pipe; its exit code is what the test looks at.
    let _ = child.stdin.take().expect("piped").write_all(input.as_bytes());
    child.wait_with_output().expect("the program ends")
}

/// Standard output of a run that must succeed.
pub(crate) fn stdout(args: &[&str]) -> String {
    let output = run(args);
    assert!(output.status.success(), "{args:?}: {}", text(&output.stderr));
    text(&output.stdout)
}

/// Standard output of a run that must succeed, as JSON.
pub(crate) fn json(args: &[&str]) -> Value {
    let out = stdout(args);
    serde_json::from_str(&out).unwrap_or_else(|error| panic!("{args:?}: {error}: {out}"))
}

/// Exit code and standard error of a run that must fail.
pub(crate) fn failure(args: &[&str]) -> (i32, String) {
    let output = run(args);
    let stderr = text(&output.stderr);
    let code = output.status.code().expect("an exit code");
    assert_ne!(code, 0, "{args:?} should fail");
    assert!(!stderr.contains("panicked"), "{stderr}");
    (code, stderr)
}

/// Output as text.
pub(crate) fn text(bytes: &[u8]) -> String {
    String::from_utf8(bytes.to_vec()).expect("UTF-8")
}

/// A path below the golden models.
pub(crate) fn golden(path: &str) -> String {
    let folder = PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("../../fixtures/goldens");
    folder.join(path).to_str().expect("a UTF-8 path").to_owned()
}

/// A tensor of a golden file: its shape and numbers.
pub(crate) struct Golden {
    pub(crate) shape: Vec<usize>,
    pub(crate) values: Vec<f64>,
}

/// Reads the tensor `name` of `<model>/golden.safetensors`.
pub(crate) fn golden_tensor(model: &str, name: &str) -> Golden {
    let bytes = std::fs::read(golden(&format!("{model}/golden.safetensors"))).expect("a golden");
    let file = SafeTensors::deserialize(&bytes).expect("safetensors");
    let tensor = file.tensor(name).expect("the tensor");
    let values = match tensor.dtype() {
        Dtype::F32 => {
            let numbers = tensor.data().chunks_exact(4);
            numbers.map(|b| f64::from(f32::from_le_bytes(b.try_into().unwrap()))).collect()
        }
        Dtype::I64 => {
            let numbers = tensor.data().chunks_exact(8);
            numbers.map(|b| i64::from_le_bytes(b.try_into().unwrap()) as f64).collect()
        }
        other => panic!("{name} is {other:?}"),
    };
    Golden { shape: tensor.shape().to_vec(), values }
}

/// Token ids as `--ids` takes them.
pub(crate) fn ids(tokens: &[f64]) -> String {
    let ids: Vec<_> = tokens.iter().map(|&id| (id as u32).to_string()).collect();
    ids.join(",")
}

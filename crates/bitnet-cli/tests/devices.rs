//! `bitnet run --device …` on every device that this build and this machine have: each tells the
//! CPU's story, token by token.
//!
//! A default build has the CPU alone, and then nothing is compared; `BITNET_REQUIRE_DEVICES` names
//! devices, with spaces between them, that must be here.

mod common;

use common::{bitnet, text};
use serde_json::Value;

/// Where mlx-c is, which the other tests do without.
const MLX_LIBRARY: &str = "BITNET_MLX_LIBRARY";

/// What the program prints as JSON, and what it says.
fn run(args: &[&str]) -> (Value, String) {
    let mut command = bitnet();
    if let Some(library) = std::env::var_os(MLX_LIBRARY) {
        command.env(MLX_LIBRARY, library);
    }
    let output = command.args(args).output().expect("the program starts");
    assert!(output.status.success(), "{args:?}: {}", text(&output.stderr));
    let out = text(&output.stdout);
    let value = serde_json::from_str(&out).unwrap_or_else(|e| panic!("{args:?}: {e}: {out}"));
    (value, text(&output.stderr))
}

/// The story a device tells.
fn tokens(device: &str, prompt: &str) -> Vec<u64> {
    let (answer, said) =
        run(&["run", prompt, "--greedy", "-n", "48", "--json", "-v", "--device", device]);
    assert!(said.contains(&format!("builtin on {device}")), "{said}");
    let tokens = answer["tokens"].as_array().expect("tokens");
    tokens.iter().map(|token| token["id"].as_u64().expect("an id")).collect()
}

#[test]
fn every_device_tells_the_cpu_s_story() {
    let (list, _) = run(&["devices", "--json"]);
    let devices = list["devices"].as_array().expect("devices");
    let here = devices.iter().filter(|device| device["available"] == true);
    let here: Vec<&str> = here.filter_map(|device| device["name"].as_str()).collect();
    let required = std::env::var("BITNET_REQUIRE_DEVICES").unwrap_or_default();
    for name in required.split_whitespace() {
        assert!(here.contains(&name), "{name} is not here: {list:#}");
    }
    if here == ["cpu"] {
        eprintln!("SKIPPED: there is no device beside the CPU");
        return;
    }
    for prompt in ["Once upon a time", "The old king was sad because"] {
        let of_cpu = tokens("cpu", prompt);
        assert_eq!(of_cpu.len(), 48);
        for device in here.iter().filter(|&&name| name != "cpu") {
            assert_eq!(tokens(device, prompt), of_cpu, "{device}: {prompt}");
        }
    }
}

/// A library that is not there is said to be missing; nothing else takes its place.
#[cfg(feature = "mlx")]
#[test]
fn a_missing_mlx_library_is_an_error() {
    let mut command = bitnet();
    command.env(MLX_LIBRARY, "/nonexistent.so").args(["run", "Once", "-n", "1", "--device", "mlx"]);
    let output = command.output().expect("the program starts");
    let said = text(&output.stderr);
    assert!(!output.status.success() && said.contains("cannot be opened"), "{said}");
}

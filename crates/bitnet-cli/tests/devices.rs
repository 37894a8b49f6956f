//! `bitnet run --device …` on every device that this build and this machine have: each tells the
//! CPU's story, token by token, as long as the CPU itself is sure of it.
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

/// Two tokens whose log-probabilities are nearer than this may change places. Devices add floats in other
/// orders, and where that turns the rounding of one activation to 8 bits, logits of this small model move
/// by up to 0.07.
const TIE: f64 = 0.15;

/// A token's id, and those that were likeliest in its place with their log-probabilities.
type Token = (u64, Vec<(u64, f64)>);

/// The story a device tells.
fn story(device: &str, prompt: &str) -> Vec<Token> {
    let fixed = ["--greedy", "-n", "48", "--json", "--logprobs", "4", "-v", "--device", device];
    let (answer, said) = run(&[&["run", prompt], &fixed[..]].concat());
    assert!(said.contains(&format!("builtin on {device}")), "{said}");
    let id = |token: &Value| token["id"].as_u64().expect("an id");
    let alternatives = |token: &Value| {
        let top = token["top_logprobs"].as_array().expect("alternatives").iter();
        top.map(|t| (id(t), t["logprob"].as_f64().expect("a number"))).collect()
    };
    let tokens = answer["tokens"].as_array().expect("tokens");
    tokens.iter().map(|token| (id(token), alternatives(token))).collect()
}

/// Asserts that a story is the CPU's up to its first near tie, and as probable all the way.
fn same_story(device: &str, told: &[Token], of_cpu: &[Token]) {
    assert_eq!(told.len(), of_cpu.len());
    for (i, ((token, theirs), (expected, ours))) in told.iter().zip(of_cpu).enumerate() {
        let find = |list: &[(u64, f64)], id| list.iter().find(|t| t.0 == id).map(|t| t.1);
        let best = find(ours, *expected).expect("the likeliest is among the likeliest");
        let found = find(theirs, *expected);
        assert!(
            found.is_some_and(|p| (p - best).abs() < TIE),
            "{device}, {i}: {theirs:?} {ours:?}"
        );
        if token != expected {
            let second = find(ours, *token);
            assert!(second.is_some_and(|p| best - p < TIE), "{device}, {i}: {token} of {ours:?}");
            assert!(i >= 8, "{device}: stories part at token {i}");
            return;
        }
    }
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
        let of_cpu = story("cpu", prompt);
        assert_eq!(of_cpu.len(), 48);
        for device in here.iter().filter(|&&name| name != "cpu") {
            same_story(device, &story(device, prompt), &of_cpu);
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

//! The command line as a whole: help, completions, devices, colours.

mod common;

use common::{failure, json, run, stdout, text};

#[test]
fn help_teaches_by_example() {
    let help = stdout(&["--help"]);
    assert!(
        help.contains("bitnet run \"Once upon a time\"") && help.contains("Exit codes"),
        "{help}"
    );
    for command in ["run", "chat", "inspect", "convert", "quantize", "eval", "logits", "devices"] {
        let help = stdout(&[command, "--help"]);
        assert!(help.contains("Examples:") && help.contains(&format!("bitnet {command}")));
    }
}

#[test]
fn nothing_or_nonsense_is_code_2() {
    assert_eq!(failure(&[]).0, 2);
    assert_eq!(failure(&["fly"]).0, 2);
}

#[test]
fn completions_know_the_commands() {
    for shell in ["bash", "zsh", "fish", "elvish", "powershell"] {
        let script = stdout(&["completions", shell]);
        assert!(script.contains("inspect") && script.contains("temperature"), "{shell}");
    }
}

#[test]
fn devices_name_the_kernels_of_this_cpu() {
    let devices = json(&["devices", "--json"]);
    let cpu = &devices["devices"][0];
    assert_eq!(cpu["name"], "cpu");
    assert!(cpu["threads"].as_u64().unwrap() >= 1);
    let kernels = cpu["kernels"].as_array().unwrap();
    assert!(kernels.contains(&"scalar".into()) && kernels.contains(&cpu["kernel"]), "{devices}");
    assert!(stdout(&["devices"]).contains("(chosen)"));
}

#[test]
fn every_device_is_here_or_says_why_not() {
    let list = json(&["devices", "--json"]);
    let devices = list["devices"].as_array().unwrap();
    let names: Vec<_> = devices.iter().map(|device| device["name"].as_str().unwrap()).collect();
    assert_eq!(names, ["cpu", "mlx", "metal", "wgpu"]);
    assert!(names.contains(&list["default"].as_str().unwrap()));
    for device in devices {
        let name = device["name"].as_str().unwrap();
        let args = ["run", "A fox", "--greedy", "-n", "2", "--device", name];
        if device["available"] == true {
            assert!(!device["hardware"].as_str().unwrap().is_empty(), "{device}");
            continue;
        }
        // Named and absent: no other device takes over, and the reason is the same.
        let output = run(&args);
        assert!(!output.status.success(), "{name}");
        let reason = device["reason"].as_str().unwrap();
        assert!(text(&output.stderr).contains(reason), "{name}: {}", text(&output.stderr));
        // In an order, the next one does.
        let order = format!("{name},cpu");
        let output = run(&["run", "A fox", "--greedy", "-n", "2", "--device", &order, "-v"]);
        assert!(text(&output.stderr).contains("builtin on cpu"), "{}", text(&output.stderr));
    }
    let unknown = run(&["run", "A fox", "--device", "abacus"]);
    assert_eq!(unknown.status.code(), Some(2));
    assert!(text(&unknown.stderr).contains("metal"), "{}", text(&unknown.stderr));
}

#[test]
fn colours_only_where_wanted() {
    let story = ["run", "A fox", "-n", "2", "--seed", "1"];
    let colored = |args: &[&str]| run(&[&story[..], args].concat()).stdout.contains(&0x1b);
    assert!(!colored(&[]) && colored(&["--color", "always"]) && !colored(&["--color", "never"]));
}

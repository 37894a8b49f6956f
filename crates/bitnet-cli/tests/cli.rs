//! The command line as a whole: help, completions, devices, colours.

mod common;

use common::{failure, json, run, stdout};

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
fn colours_only_where_wanted() {
    let story = ["run", "A fox", "-n", "2", "--seed", "1"];
    let colored = |args: &[&str]| run(&[&story[..], args].concat()).stdout.contains(&0x1b);
    assert!(!colored(&[]) && colored(&["--color", "always"]) && !colored(&["--color", "never"]));
}

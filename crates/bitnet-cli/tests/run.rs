//! `bitnet run`: where the prompt comes from, what is printed where, how it ends.

mod common;

use common::{failure, golden, json, run, run_with_input, stdout, text};

const STORY: &str = "Once upon a time there was a little princess who lived";

/// The reference implementation's greedy continuation of [`STORY`], with the prompt.
fn reference_story() -> String {
    let file = std::fs::read_to_string(golden("story/golden.json")).unwrap();
    let golden: serde_json::Value = serde_json::from_str(&file).unwrap();
    golden["greedy_text"].as_str().unwrap().to_owned()
}

#[test]
fn the_newcomers_command_tells_a_story() {
    let output = run(&["run", "Once upon a time"]);
    assert!(output.status.success());
    let story = text(&output.stdout);
    assert!(story.starts_with("Once upon a time") && story.len() > 100, "{story}");
    let said = text(&output.stderr);
    assert!(said.contains("tok/s") && said.contains("first token after"), "{said}");
    assert!(!story.contains('\x1b') && !said.contains('\x1b'), "no colours outside a terminal");
}

#[test]
fn greedy_text_is_the_reference_text() {
    let told =
        stdout(&["run", STORY, "--greedy", "-n", "40", "--repetition-penalty", "1", "--kv", "f32"]);
    assert_eq!(told.trim_end_matches('\n'), reference_story());
}

#[test]
fn the_prompt_may_come_from_a_file_or_a_pipe() {
    let args = ["--greedy", "-n", "40", "--repetition-penalty", "1", "--kv", "f32"];
    let expected = reference_story().strip_prefix(STORY).unwrap().to_owned() + "\n";
    let file = tempfile::NamedTempFile::new().unwrap();
    std::fs::write(file.path(), format!("{STORY}\n")).unwrap();
    let path = file.path().to_str().unwrap();
    assert_eq!(stdout(&[&["run", "--file", path], &args[..]].concat()), expected);
    for prompt in [&["run"][..], &["run", "-"]] {
        let piped = run_with_input(&[prompt, &args[..]].concat(), &format!("{STORY}\n"));
        assert_eq!(text(&piped.stdout), expected);
    }
}

#[test]
fn json_holds_text_tokens_and_times() {
    let found = json(&["run", "Once upon", "-n", "5", "--seed", "3", "--json", "--logprobs", "2"]);
    assert_eq!(found["finish_reason"], "length");
    assert_eq!((&found["prompt"], &found["model"]), (&"Once upon".into(), &"builtin".into()));
    assert_eq!(found["seed"], 3);
    assert_eq!(found["usage"]["completion_tokens"], 5);
    let tokens = found["tokens"].as_array().unwrap();
    assert_eq!(tokens.len(), 5);
    for token in tokens {
        assert!(token["logprob"].as_f64().unwrap() <= 0.0);
        assert_eq!(token["top_logprobs"].as_array().unwrap().len(), 2);
    }
    assert!(found["timings"]["time_to_first_token_seconds"].as_f64().unwrap() > 0.0);
    assert!(!found["text"].as_str().unwrap().is_empty());
}

#[test]
fn a_seed_makes_the_draws_repeatable() {
    let with = |seed: &str| stdout(&["run", "The king", "-n", "40", "--seed", seed]);
    assert_eq!(with("7"), with("7"));
    assert_ne!(with("7"), with("8"));
    // An unchosen seed is reported, so that a good story can be told again.
    let first = json(&["run", "The king", "-n", "20", "--json"]);
    let seed = first["seed"].to_string();
    let again = json(&["run", "The king", "-n", "20", "--json", "--seed", &seed]);
    assert_eq!(first["text"], again["text"]);
}

#[test]
fn stop_texts_and_biases_act() {
    let base = ["run", STORY, "--seed", "1", "-n", "300", "--no-echo"];
    let free = json(&[&base[..], &["--json"]].concat());
    let (before, _) = free["text"].as_str().unwrap().split_once(".\n").expect("a paragraph");
    let stopped = stdout(&[&base[..], &["--stop", r".\n"]].concat());
    assert_eq!(stopped, format!("{before}\n"));
    let first = free["tokens"][0]["id"].to_string();
    let bias = format!("{first}=-100");
    let biased = json(&[&base[..], &["--json", "--logit-bias", &bias]].concat());
    assert_ne!(biased["tokens"][0]["id"].to_string(), first);
}

#[test]
fn chat_uses_the_models_template() {
    let model = golden("bitnet-tiny/packed_multiply");
    let args = ["run", "-m", &model, "--greedy", "-n", "4", "--json"];
    let prompt_tokens = |extra: &[&str]| {
        json(&[&args[..], extra].concat())["usage"]["prompt_tokens"].as_u64().unwrap()
    };
    let plain = prompt_tokens(&["Hello"]);
    let chat = prompt_tokens(&["Hello", "--chat"]);
    let system = prompt_tokens(&["Hello", "--chat", "--system", "Be brief."]);
    assert!(plain < chat && chat < system, "{plain} {chat} {system}");
}

#[test]
fn every_kernel_and_cache_format_is_accepted_and_named() {
    let devices = json(&["devices", "--json"]);
    let kernels = devices["devices"][0]["kernels"].as_array().unwrap().clone();
    let told = |kernel: &str| {
        let args = ["run", STORY, "--greedy", "-n", "20", "--kernel", kernel, "--verbose"];
        let output = run(&args);
        assert!(text(&output.stderr).contains(&format!("kernel {kernel}")), "{kernel}");
        text(&output.stdout)
    };
    let stories: Vec<_> = kernels.iter().map(|name| told(name.as_str().unwrap())).collect();
    assert!(stories.iter().all(|story| *story == stories[0]), "all kernels tell the same");
    for (kv, name) in [("f32", "F32"), ("f16", "F16"), ("q8", "Q8")] {
        let output = run(&["run", "A fox", "-n", "3", "--kv", kv, "-v"]);
        assert!(text(&output.stderr).contains(&format!("KV cache {name}")), "{kv}");
    }
}

#[test]
fn a_draft_model_changes_no_token() {
    let args = ["run", STORY, "-n", "40", "--seed", "5"];
    let drafted = stdout(&[&args[..], &["--draft", "builtin"]].concat());
    assert_eq!(drafted, stdout(&args));
    let other = golden("bitnet-tiny/packed_multiply");
    let (code, stderr) = failure(&["run", "x", "--draft", &other]);
    assert!(code == 1 && stderr.contains("draft_model"), "{stderr}");
}

#[test]
fn settings_may_come_from_the_environment() {
    let output = common::bitnet()
        .args(["run", "Hello", "-n", "2", "--json"])
        .env("BITNET_MODEL", golden("bitnet-tiny/model-i2_s.gguf"))
        .output()
        .unwrap();
    let found: serde_json::Value = serde_json::from_slice(&output.stdout).unwrap();
    assert!(found["model"].as_str().unwrap().ends_with("model-i2_s.gguf"));
}

#[test]
fn wrong_use_is_code_2_and_failure_is_code_1() {
    for (args, code, expected) in [
        (&["run", ""][..], 2, "expected a prompt"),
        (&["run", "x", "--temperature", "-1"], 2, "temperature"),
        (&["run", "x", "--top-p", "2"], 2, "top_p"),
        (&["run", "x", "--seed", "-1"], 2, "'--seed <N>'"),
        (&["run", "x", "--dry-base", "2"], 2, "--dry-multiplier"),
        (&["run", "x", "--logit-bias", "7"], 2, "TOKEN_ID=BIAS"),
        (&["run", "x", "--threads", "0"], 2, "threads"),
        (&["run", "x", "--logprobs", "2"], 2, "--json"),
        (&["run", "x", "--nonsense"], 2, "--nonsense"),
        (&["run", "x", "--kernel", "abacus"], 2, "abacus"),
        (&["run", "x", "-m", "/nowhere/model.gguf"], 1, "expected a GGUF file"),
        (&["run", "--file", "/nowhere/prompt"], 1, "/nowhere/prompt"),
        (&["run", "x", "--device", "gpu"], 1, "gpu"),
    ] {
        let (found, stderr) = failure(args);
        assert_eq!(found, code, "{args:?}: {stderr}");
        assert!(stderr.contains(expected), "{args:?}: {stderr}");
    }
    let bytes = tempfile::NamedTempFile::new().unwrap();
    std::fs::write(bytes.path(), b"abc\xff").unwrap();
    let (code, stderr) = failure(&["run", "--file", bytes.path().to_str().unwrap()]);
    assert!(code == 1 && stderr.contains("invalid byte at offset 3"), "{stderr}");
}

#[test]
fn a_prompt_longer_than_the_context_says_so() {
    let (code, stderr) = failure(&["run", &"word ".repeat(50), "--ctx", "16"]);
    assert_eq!(code, 1);
    assert!(stderr.contains("at most 15 tokens"), "{stderr}");
}

#[cfg(unix)]
mod signals {
    use super::common;
    use std::io::Read;
    use std::process::{Child, Command, Stdio};

    /// A story without an end.
    fn endless() -> Child {
        common::bitnet()
            .args(["run", "Once", "--ignore-eos", "-n", "100000", "--kernel", "scalar"])
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .spawn()
            .unwrap()
    }

    #[test]
    fn ctrl_c_ends_with_statistics_and_code_130() {
        let mut child = endless();
        let mut out = child.stdout.take().unwrap();
        let mut first = [0; 16];
        out.read_exact(&mut first).unwrap(); // It has begun.
        let interrupt = Command::new("kill").args(["-INT", &child.id().to_string()]).status();
        assert!(interrupt.unwrap().success());
        let mut rest = String::new();
        out.read_to_string(&mut rest).unwrap();
        let output = child.wait_with_output().unwrap();
        assert_eq!(output.status.code(), Some(130));
        assert!(common::text(&output.stderr).contains("tok/s"));
        assert!(rest.ends_with('\n'), "the last line is complete");
    }

    #[test]
    fn a_reader_that_leaves_is_no_error() {
        let mut child = endless();
        let mut out = child.stdout.take().unwrap();
        let mut first = [0; 16];
        out.read_exact(&mut first).unwrap();
        drop(out);
        let output = child.wait_with_output().unwrap();
        assert_eq!(output.status.code(), Some(0));
        assert_eq!(common::text(&output.stderr), "");
    }
}

/// A copy of a small model with NaN in place of its embedding.
fn damaged_model(folder: &std::path::Path) -> String {
    let source = golden("bitnet-tiny/packed_multiply");
    for file in std::fs::read_dir(source).unwrap().map(|file| file.unwrap().path()) {
        std::fs::copy(&file, folder.join(file.file_name().unwrap())).unwrap();
    }
    let path = folder.join("model.safetensors");
    let mut bytes = std::fs::read(&path).unwrap();
    let tensors = safetensors::SafeTensors::deserialize(&bytes).unwrap();
    let table = tensors.tensor("model.embed_tokens.weight").unwrap().data();
    let start = table.as_ptr().addr() - bytes.as_ptr().addr();
    let range = start..start + table.len();
    bytes[range].fill(0xff); // NaN in every float format
    std::fs::write(path, bytes).unwrap();
    folder.display().to_string()
}

#[test]
fn a_model_that_computes_no_numbers_is_an_error() {
    let folder = tempfile::tempdir().unwrap();
    let model = damaged_model(folder.path());
    let text = folder.path().join("text.txt");
    std::fs::write(&text, "The king and the queen lived in a castle by the sea.").unwrap();
    for args in [
        &["run", "-m", &model, "The king"][..],
        &["logits", &model, "--ids", "1, 2", "--json"],
        &["logits", &model, "--ids", "1,2"],
        &["eval", &text.display().to_string(), "--model", &model],
    ] {
        let output = run(args);
        assert_eq!(output.status.code(), Some(1), "{args:?}");
        let error = String::from_utf8(output.stderr).unwrap();
        assert!(error.contains("not numbers") || error.contains("not finite"), "{args:?}: {error}");
        assert!(output.stdout.is_empty() || args[0] == "run", "{args:?} printed before it failed");
    }
    let chat = run_with_input(&["chat", "-m", &model], "hello\n");
    assert_eq!(chat.status.code(), Some(1), "an answer failed where nobody watched");
}

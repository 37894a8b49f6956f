//! `bitnet chat` with its lines from a pipe: answers, commands, saved conversations.

mod common;

use common::{golden, run_with_input, text};
use std::process::Output;

fn chat(args: &[&str], lines: &str) -> Output {
    let model = golden("bitnet-tiny/packed_multiply");
    let base = ["chat", "-m", &model, "--greedy", "-n", "6", "--no-history"];
    run_with_input(&[&base[..], args].concat(), lines)
}

#[test]
fn it_answers_and_leaves_at_the_end_of_the_input() {
    let output = chat(&[], "Hello\n");
    assert_eq!(output.status.code(), Some(0), "{}", text(&output.stderr));
    assert!(!output.stdout.is_empty());
    assert!(text(&output.stderr).contains("/help"));
}

#[test]
fn commands_do_what_help_says() {
    let output =
        chat(&[], "/help\n/set temperature 0.5\n/set\n/system Be brief.\n/system\n/exit\nHello\n");
    let out = text(&output.stdout);
    assert!(out.contains("/regenerate") && out.contains("\"temperature\": 0.5"), "{out}");
    assert!(out.contains("Be brief."));
    let answered = text(&output.stderr).contains("cut at");
    assert!(!answered, "nothing is answered after /exit");
}

#[test]
fn mistakes_are_explained_and_the_chat_goes_on() {
    let output =
        chat(&[], "/frobnicate\n/set top_p 3\n/regenerate\n/load /nowhere\n/stats\nHello\n");
    let said = text(&output.stderr);
    for expected in [
        "unknown command /frobnicate",
        "top_p",
        "no answer yet",
        "/nowhere",
        "nothing was generated",
    ] {
        assert!(said.contains(expected), "{expected}: {said}");
    }
    assert!(!output.stdout.is_empty(), "it answered in the end");
}

#[test]
fn a_conversation_is_saved_and_loaded() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("talk.json");
    let path = path.to_str().unwrap();
    chat(&["--system", "Be brief."], &format!("Hello\nAnd now?\n/save {path}\n"));
    let saved: serde_json::Value =
        serde_json::from_str(&std::fs::read_to_string(path).unwrap()).unwrap();
    let roles: Vec<_> =
        saved["messages"].as_array().unwrap().iter().map(|m| m["role"].as_str().unwrap()).collect();
    assert_eq!(roles, ["system", "user", "assistant", "user", "assistant"]);
    let output = chat(&["--load", path], "/stats\n/regenerate\n/stats\n");
    let out = text(&output.stdout);
    assert!(out.contains("last answer:"), "{out}{}", text(&output.stderr));

    std::fs::write(path, r#"{"model": "m", "messages": [{"role": "assistant", "content": "x"}]}"#)
        .unwrap();
    let output = chat(&["--load", path], "");
    assert_eq!(output.status.code(), Some(1));
    assert!(text(&output.stderr).contains("by turns"));
}

#[test]
fn a_model_without_a_template_gets_the_plain_format() {
    let output = run_with_input(&["chat", "-n", "8", "--seed", "1", "--no-history"], "Hello\n");
    assert!(output.status.success());
    assert!(text(&output.stderr).contains("no chat template"), "{}", text(&output.stderr));
    assert!(!text(&output.stdout).contains("User:"), "the answer ends before the next question");
}

#[test]
fn a_full_context_forgets_the_oldest_exchanges() {
    let lines = "Tell me about the sea and the wind.\n".repeat(8);
    let output = chat(&["--ctx", "128"], &lines);
    assert!(output.status.success());
    let said = text(&output.stderr);
    assert!(said.contains("no longer seen") && !said.contains("error"), "{said}");
}

#[cfg(unix)]
#[test]
fn ctrl_c_stops_the_answer_and_the_chat_goes_on() {
    use std::io::{Read, Write};
    use std::process::{Command, Stdio};

    let mut child = common::bitnet()
        .args(["chat", "--no-history", "--ignore-eos", "-n", "100000", "--kernel", "scalar"])
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .unwrap();
    let (mut lines, mut out) = (child.stdin.take().unwrap(), child.stdout.take().unwrap());
    lines.write_all(b"Tell me a story.\n").unwrap();
    out.read_exact(&mut [0; 8]).unwrap(); // It has begun.
    let interrupt = Command::new("kill").args(["-INT", &child.id().to_string()]).status();
    assert!(interrupt.unwrap().success());
    lines.write_all(b"/stats\n").unwrap();
    drop(lines);
    let mut rest = String::new();
    out.read_to_string(&mut rest).unwrap();
    let output = child.wait_with_output().unwrap();
    assert_eq!(output.status.code(), Some(0));
    assert!(text(&output.stderr).contains("(stopped)"), "{}", text(&output.stderr));
    assert!(rest.contains("last answer:"), "{rest}");
}

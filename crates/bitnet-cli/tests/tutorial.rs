//! The commands of docs/training.md, run in their order on a text made here.

mod common;

use std::path::Path;

use common::text;

/// Words of a shell line, quoted or not.
fn words(line: &str) -> Vec<String> {
    let quoted = line.split('"').enumerate();
    let words = quoted.flat_map(|(i, part)| match i % 2 {
        1 => vec![part.to_owned()],
        _ => part.split_whitespace().map(str::to_owned).collect(),
    });
    words.collect()
}

/// The parts of the page between fences of this kind.
fn blocks<'a>(page: &'a str, kind: &str) -> Vec<&'a str> {
    let fence = format!("```{kind}\n");
    let parts = page.split(fence.as_str()).skip(1);
    parts.map(|part| part.split("```").next().expect("a closing fence")).collect()
}

#[test]
fn every_command_of_the_page_works() {
    let page = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../docs/training.md");
    let page = std::fs::read_to_string(page).unwrap();
    let folder = tempfile::tempdir().unwrap();
    let write = |name: &str, text: String| std::fs::write(folder.path().join(name), text).unwrap();
    let tale = |i: usize| format!("The {i}th king rode to the river. \"Who is there?\" said he.\n");
    write("tales.txt", (0..900).map(tale).collect());
    write("held-out.txt", (900..920).map(tale).collect());
    let letter =
        |i: usize| format!("{{\"text\": \"Dear friend number {i}, all is well here.\"}}\n");
    write("letters.jsonl", (0..300).map(letter).collect());
    let chat = |i: usize| {
        format!(
            "{{\"messages\": [{{\"role\": \"user\", \"content\": \"Who is king {i}?\"}}, \
             {{\"role\": \"assistant\", \"content\": \"King {i} of the river.\"}}]}}\n"
        )
    };
    write("chats.jsonl", (0..200).map(chat).collect());
    write("recipe.toml", blocks(&page, "toml").concat());

    let lines = blocks(&page, "console").concat();
    // Ten minutes are for people.
    let lines = lines.replace("--minutes 10", "--steps 30").replace("--minutes 20", "--steps 40");
    let mut commands = 0;
    for line in lines.lines().filter_map(|line| line.strip_prefix("$ bitnet ")) {
        let mut args = words(line);
        if args[0] == "run" {
            args.extend(["-n".into(), "8".into()]);
        }
        let output = common::bitnet().current_dir(folder.path()).args(&args).output().unwrap();
        assert!(output.status.success(), "bitnet {line}: {}", text(&output.stderr));
        commands += 1;
    }
    assert!(commands >= 7, "{commands} commands");
    assert!(folder.path().join("runs/recipe/model-tq2_0.gguf").is_file());
}

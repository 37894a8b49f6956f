//! `bitnet tokenizer`, `train`, `finetune`, `distill`: what they write, say and refuse.

mod common;

use std::path::{Path, PathBuf};

use common::{failure, json, run, stdout, text};

fn corpus(folder: &Path) -> PathBuf {
    let line =
        |i: usize| format!("The {} fox said: \"Where is the hen?\" No hen answered.\n", i % 9);
    let path = folder.join("tales.txt");
    std::fs::write(&path, (0..400).map(line).collect::<String>()).unwrap();
    path
}

/// Flags of a model that trains in no time.
const SMALL: [&str; 12] = [
    "--hidden-size",
    "64",
    "--intermediate-size",
    "64",
    "--layers",
    "1",
    "--vocab-size",
    "300",
    "--window",
    "32",
    "--rows",
    "2",
];

#[test]
fn from_text_to_a_model_that_runs() {
    let folder = tempfile::tempdir().unwrap();
    let corpus = corpus(folder.path());
    let path = |name: &str| folder.path().join(name).to_str().unwrap().to_owned();
    let (corpus, tok, out) = (corpus.to_str().unwrap(), path("tok"), path("run"));
    let made =
        json(&["tokenizer", "train", corpus, "--out", &tok, "--vocab-size", "280", "--json"]);
    assert_eq!(made["vocab_size"], 280);

    let mut args = vec!["train", corpus, "--out", &out, "--tokenizer", &tok, "--steps", "30"];
    args.extend(SMALL);
    args.extend(["--eval", corpus, "--prompt", "The", "--json", "--threads", "1"]);
    let trained = json(&args);
    assert_eq!((trained["steps"].as_u64(), trained["stopped"].as_bool()), (Some(30), Some(false)));
    assert!(trained["bits_per_byte"].as_f64().unwrap() < 6.0, "{trained}");

    let model = format!("{out}/model");
    let said = stdout(&["run", "-m", &model, "The 3", "-n", "5", "--greedy", "--no-echo"]);
    assert!(!said.trim().is_empty());
    assert!(stdout(&["inspect", &model]).contains("bitnet"));

    let (code, stderr) = failure(&args);
    assert_eq!(code, 2);
    assert!(stderr.contains("told to resume"), "{stderr}");
    let longer = run(&["train", "--out", &out, "--resume", "--steps", "33"]);
    assert!(longer.status.success(), "{}", text(&longer.stderr));
    assert!(text(&longer.stderr).contains("going on after step 30"), "{}", text(&longer.stderr));

    let tuned = path("tuned");
    let args = ["finetune", &model, corpus, "--out", &tuned, "--steps", "2", "--window", "32"];
    let tuned = stdout(&[&args[..], &["--export", "hf", "--export", "masters"]].concat());
    assert!(tuned.contains("masters"), "{tuned}");
}

#[test]
fn a_float_teacher_and_its_ternary_student() {
    let folder = tempfile::tempdir().unwrap();
    let corpus = corpus(folder.path());
    let path = |name: &str| folder.path().join(name).to_str().unwrap().to_owned();
    let (corpus, teacher, student) = (corpus.to_str().unwrap(), path("teacher"), path("student"));
    let mut args = vec!["train", corpus, "--out", &teacher, "--float", "--family", "llama"];
    args.extend(["--separate-head", "--steps", "5"]);
    args.extend(SMALL);
    stdout(&args);
    let teacher = format!("{teacher}/model");
    let config = std::fs::read_to_string(Path::new(&teacher).join("config.json")).unwrap();
    let config: serde_json::Value = serde_json::from_str(&config).unwrap();
    assert_eq!(config["tie_word_embeddings"], false);
    let args = ["distill", &teacher, corpus, "--out", &student, "--steps", "3", "--window", "32"];
    stdout(&args);
    assert!(stdout(&["inspect", &format!("{student}/model")]).contains("bitnet"));
}

/// What a log says of each step, without times.
fn steps(out: &str) -> Vec<String> {
    let csv = std::fs::read_to_string(Path::new(out).join("log.csv")).unwrap();
    let row = |row: &str| {
        let cells: Vec<&str> = row.split(',').collect();
        [&cells[..2], &cells[3..7]].concat().join(" ")
    };
    csv.lines().map(row).collect()
}

#[test]
fn resuming_changes_nothing_that_is_not_asked_for() {
    let folder = tempfile::tempdir().unwrap();
    let corpus = corpus(folder.path());
    let path = |name: &str| folder.path().join(name).to_str().unwrap().to_owned();
    let (corpus, teacher) = (corpus.to_str().unwrap(), path("teacher"));
    let mut args = vec!["train", corpus, "--out", &teacher, "--float", "--family", "llama"];
    args.extend(["--steps", "2"]);
    args.extend(SMALL);
    stdout(&args);

    let line = "{\"messages\": [{\"role\": \"user\", \"content\": \"Where is the hen?\"}, \
        {\"role\": \"assistant\", \"content\": \"No hen answered.\"}]}\n";
    let chats = path("chats.jsonl");
    std::fs::write(&chats, line.repeat(100)).unwrap();
    let stages = path("stages.toml");
    let model = format!("{teacher}/model");
    std::fs::write(
        &stages,
        "train = { window = 32, rows = 2, rate = 2e-3, schedule = 'cosine', accumulate = 2 }\n\
         model = { hidden_size = 64, intermediate_size = 64, num_hidden_layers = 1, vocab_size = 300 }\n\
         stage = [{ until = 0.6, mix = [{ files = ['tales.txt'] }] },\n\
         { mix = [{ files = ['chats.jsonl'], weight = 2.0 }, { files = ['tales.txt'] }] }]\n",
    )
    .unwrap();
    let parts =
        "--rate 5e-3 --logits 0.5 --temperature 3 --attention 0.25 --layer 0 --no-sub-norms";
    for (name, begin, go_on) in [
        (
            "tuned",
            vec!["finetune", &model, corpus, "--rate", "1e-2", "--window", "32"],
            vec!["finetune", &model],
        ),
        ("chat", vec!["finetune", &model, &chats, "--window", "32"], vec!["train"]),
        (
            "taught",
            [
                &["distill", &model, corpus, "--window", "32"][..],
                &parts.split(' ').collect::<Vec<_>>(),
            ]
            .concat(),
            vec!["distill", &model],
        ),
        ("staged", vec!["train", "--config", &stages], vec!["train"]),
    ] {
        let out = path(name);
        let common = ["--steps", "6", "--save-every", "3", "--threads", "1", "--out", &out];
        stdout(&[&begin[..], &common].concat());
        let whole = steps(&out);
        assert_eq!(whole.len(), 7);
        std::fs::remove_dir_all(Path::new(&out).join("checkpoints/step-00000006")).unwrap();
        stdout(&[&go_on[..], &["--resume", "--out", &out]].concat());
        assert_eq!(steps(&out), whole, "{name}");
    }
    let recipe = std::fs::read_to_string(path("taught/recipe.toml")).unwrap();
    stdout(&["distill", &model, "--resume", "--out", &path("taught"), "--attention", "2"]);
    let changed = std::fs::read_to_string(path("taught/recipe.toml")).unwrap();
    assert_eq!(changed, recipe.replace("attention = 0.25", "attention = 2.0"));
    let (code, stderr) = failure(&["train", "--resume", "--out", &path("tuned"), "--layers", "2"]);
    assert!(code == 2 && stderr.contains("no flags of a new model's shape"), "{stderr}");
}

#[cfg(unix)]
#[test]
fn ctrl_c_saves_and_the_run_goes_on() {
    use std::io::{BufRead, BufReader};
    use std::process::{Command, Stdio};
    let folder = tempfile::tempdir().unwrap();
    let corpus = corpus(folder.path());
    let out = folder.path().join("run");
    let (corpus, out) = (corpus.to_str().unwrap(), out.to_str().unwrap());
    let mut child = common::bitnet()
        .args(["train", corpus, "--out", out, "--steps", "1000000"])
        .args(SMALL)
        .stderr(Stdio::piped())
        .spawn()
        .unwrap();
    // The first step is reported at once.
    let mut lines = BufReader::new(child.stderr.take().unwrap()).lines();
    assert!(lines.by_ref().any(|line| line.unwrap().contains("step 1 ")));
    let killed = Command::new("kill").args(["-INT", &child.id().to_string()]).status().unwrap();
    assert!(killed.success());
    let rest: Vec<String> = lines.map(|line| line.unwrap()).collect();
    assert_eq!(child.wait().unwrap().code(), Some(130), "{rest:?}");
    assert!(rest.iter().any(|line| line.contains("--resume")), "{rest:?}");
    let csv = std::fs::read_to_string(Path::new(out).join("log.csv")).unwrap();
    let done = csv.lines().count() as u64 - 1;
    let more = (done + 2).to_string();
    let resumed = json(&["train", "--out", out, "--resume", "--steps", &more, "--json"]);
    assert_eq!(resumed["steps"].as_u64(), Some(done + 2));
}

#[test]
fn what_is_wrong_is_said() {
    let folder = tempfile::tempdir().unwrap();
    let corpus = corpus(folder.path());
    let corpus = corpus.to_str().unwrap();
    let out = folder.path().join("out").to_str().unwrap().to_owned();
    let recipe = folder.path().join("run.toml");
    std::fs::write(&recipe, "train.stops = 5").unwrap();
    let recipe = recipe.to_str().unwrap();
    for (args, code, expected) in [
        (&["train", "--out", &out, "--steps", "1"][..], 2, "expected files of text"),
        (&["train", corpus, "--out", &out], 2, "--steps, --tokens or --minutes"),
        (&["train", corpus, "--out", &out, "--steps", "1", "--tokens", "1"], 2, "cannot be used"),
        (&["train", corpus, "--out", &out, "--steps", "1", "--preset", "7b"], 2, "one of 1m"),
        (&["train", "gone.txt", "--out", &out, "--steps", "1"], 1, "gone.txt: cannot open"),
        (&["train", "--config", recipe, "--out", &out], 2, "unknown field `stops`"),
        (&["train", "--out", &out, "--resume"], 2, "holds no run"),
        (&["train", corpus, "--out", &out, "--steps", "1", "--export", "exe"], 1, "target exe"),
        (
            &["train", corpus, "--out", &out, "--steps", "1", "--float", "--export", "i2_s"],
            2,
            "export: expected hf or masters for float weights",
        ),
        (
            &["train", corpus, "--out", &out, "--steps", "1", "--from", "builtin", "--layers", "2"],
            2,
            "model.num_hidden_layers: expected nothing beside a model to go on from",
        ),
        (&["tokenizer", "train", corpus, "--out", &out, "--vocab-size", "9"], 2, "vocab_size"),
        (&["finetune", "/nowhere", corpus, "--out", &out, "--steps", "1"], 1, "/nowhere"),
    ] {
        let (found, stderr) = failure(args);
        assert!(stderr.contains(expected), "{args:?}: {stderr}");
        assert_eq!(found, code, "{args:?}: {stderr}");
    }
}

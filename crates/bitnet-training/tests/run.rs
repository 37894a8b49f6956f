//! Whole runs, small: a model that learns, runs that resume, conversations, distillation, and what is
//! said of bad data before the first step.

use std::path::{Path, PathBuf};

use bitnet_inference::{EngineConfig, InferenceEngine, InferenceInput, KvType};
use bitnet_quant::text::TextAssets;
use bitnet_training::data::Encoder;
use bitnet_training::recipe::{
    CorpusRecipe, DistillRecipe, Family, ModelRecipe, Recipe, StageRecipe,
};
use bitnet_training::run::{Event, Place, Report, run};
use bitnet_training::{Error, Model, Precision, export};

/// Tales with words and order enough to learn something from: about 40 KB.
fn tales(folder: &Path) -> PathBuf {
    let (who, what) = (["fox", "hen", "owl", "cat", "dog"], ["bread", "corn", "milk", "soup"]);
    let tale = |i: usize| {
        let (a, b, c) = (who[i % 5], who[(i / 5) % 5], what[(i / 3) % 4]);
        format!(
            "The {a} met the {b}. \"Have you any {c}?\" said the {a}. \"I have {c},\" said the {b}.\n"
        )
    };
    let text: Vec<String> = (0..500).map(tale).collect();
    let path = folder.join("tales.txt");
    std::fs::write(&path, text.join("<|endoftext|>\n")).unwrap();
    path
}

/// A model small enough for a debug build, wide enough for every packing.
fn recipe(files: &[PathBuf], steps: u64) -> Recipe {
    let mut recipe = Recipe { seed: 5, ..Recipe::default() };
    recipe.model.hidden_size = Some(256);
    recipe.model.intermediate_size = Some(256);
    recipe.model.num_hidden_layers = Some(1);
    recipe.model.vocab_size = Some(320);
    recipe.train.steps = Some(steps);
    recipe.train.window = 48;
    recipe.train.rows = 4;
    recipe.train.threads = 1;
    recipe.stage = vec![StageRecipe {
        until: 1.0,
        mix: vec![CorpusRecipe { files: files.to_vec(), weight: 1.0 }],
    }];
    recipe
}

fn place(folder: &Path, name: &str, resume: bool) -> Place {
    Place { folder: folder.join(name), resume }
}

/// Runs to the end, or until `stop_after` steps were done; with all losses.
fn go(recipe: &Recipe, place: &Place, stop_after: u64) -> (Report, Vec<f64>) {
    let mut losses = Vec::new();
    let report = run(recipe, place, &mut |event| {
        if let Event::Stepped(line) = event {
            losses.push(line.loss);
            return line.step != stop_after;
        }
        true
    });
    (report.unwrap(), losses)
}

fn engine() -> InferenceEngine {
    let config = EngineConfig { kv_type: KvType::F32, ..EngineConfig::balanced() };
    InferenceEngine::with_config(config).unwrap()
}

fn logits(path: &Path, text: &str) -> Vec<f32> {
    let engine = engine();
    let model = engine.load_model_blocking(path).unwrap();
    engine.infer_blocking(&model, &InferenceInput::from(text)).unwrap().logits
}

/// ‖a − b‖ / ‖b‖
fn distance(a: &[f32], b: &[f32]) -> f32 {
    assert_eq!(a.len(), b.len());
    let difference: f32 = a.iter().zip(b).map(|(a, b)| (a - b) * (a - b)).sum();
    (difference / b.iter().map(|b| b * b).sum::<f32>()).sqrt()
}

#[test]
fn a_toy_model_learns_and_its_exports_agree() {
    let folder = tempfile::tempdir().unwrap();
    let tales = tales(folder.path());
    let mut recipe = recipe(std::slice::from_ref(&tales), 120);
    recipe.eval.text = Some(tales);
    recipe.eval.every = 50;
    recipe.samples.prompts = vec!["The fox".into()];
    recipe.samples.tokens = 12;
    recipe.samples.every = 60;
    recipe.license = Some("mit".into());
    recipe.export = ["hf", "i2_s", "tq1_0", "tq2_0", "masters"].map(String::from).to_vec();
    let place = place(folder.path(), "toy", false);
    let (report, losses) = go(&recipe, &place, u64::MAX);

    assert_eq!((losses.len(), report.stopped, report.steps), (120, false, 120));
    let end = losses[110..].iter().sum::<f64>() / 10.0;
    // The vocabulary has 320 tokens: it begins near ln 320 = 5.77.
    assert!(losses[0] > 5.3 && end < 2.0, "{} to {end}", losses[0]);
    let measured = report.measured.unwrap();
    assert!(measured.bits_per_byte < 1.5, "{measured:?}");

    let out = &place.folder;
    let card = std::fs::read_to_string(out.join("model/README.md")).unwrap();
    for part in
        ["license: \"mit\"", "tales.txt", "bits a byte", "loss.svg", "**The fox**", "| seed | 5 |"]
    {
        assert!(card.contains(part), "the card should have {part}:\n{card}");
    }
    assert!(!card.contains(folder.path().to_str().unwrap()), "no paths of this machine");
    for file in ["loss.svg", "log.csv", "log.jsonl", "recipe.toml", "model/loss.svg", "README.md"] {
        assert!(out.join(file).is_file(), "{file}");
    }
    let log = std::fs::read_to_string(out.join("log.jsonl")).unwrap();
    let count = |event: &str| log.matches(&format!("\"event\":\"{event}\"")).count();
    assert_eq!((count("step"), count("eval"), count("sample")), (120, 3, 2));

    let prompt = "The fox met the";
    let packed = logits(&out.join("model"), prompt);
    let best = |logits: &[f32]| (0..logits.len()).max_by(|&a, &b| logits[a].total_cmp(&logits[b]));
    for file in ["model-i2_s.gguf", "model-tq1_0.gguf", "model-tq2_0.gguf", "masters"] {
        let found = logits(&out.join(file), prompt);
        // Embeddings are bf16 in the folder, f16 in GGUF, f32 beside the masters.
        let apart = distance(&found, &packed);
        assert!(apart < 0.03, "{file}: {apart}");
        assert_eq!(best(&found), best(&packed), "{file}");
    }
}

#[test]
fn a_resumed_run_equals_an_uninterrupted_one() {
    let folder = tempfile::tempdir().unwrap();
    let files = [tales(folder.path())];
    let mut recipe = recipe(&files, 14);
    recipe.checkpoints.every = 3;
    recipe.train.accumulate = 2;
    let (_, whole) = go(&recipe, &place(folder.path(), "whole", false), u64::MAX);

    let (report, mut parts) = go(&recipe, &place(folder.path(), "parts", false), 5);
    assert!(report.stopped && report.exported.is_empty());
    let (report, more) = go(&recipe, &place(folder.path(), "parts", true), 10);
    assert!(report.stopped && report.steps == 10);
    parts.extend(more);
    let (report, more) = go(&recipe, &place(folder.path(), "parts", true), u64::MAX);
    assert!(!report.stopped);
    parts.extend(more);
    assert_eq!(parts, whole);

    let read = |run: &str, file: &str| std::fs::read(folder.path().join(run).join(file)).unwrap();
    assert_eq!(read("parts", "model/model.safetensors"), read("whole", "model/model.safetensors"));
    let csv = String::from_utf8(read("parts", "log.csv")).unwrap();
    assert_eq!(csv.lines().count(), 15, "each step once");
    let kept = std::fs::read_dir(folder.path().join("parts/checkpoints")).unwrap().count();
    assert_eq!(kept, 2);

    // A checkpoint cut short by a crash is not taken for one.
    let checkpoints = folder.path().join("parts/checkpoints");
    std::fs::create_dir(checkpoints.join(".step-00000099.part")).unwrap();
    recipe.train.steps = Some(15);
    let (report, more) = go(&recipe, &place(folder.path(), "parts", true), u64::MAX);
    assert_eq!(
        (report.steps, more.len()),
        (15, 1),
        "a longer run goes on where the short one ended"
    );

    let again = run(&recipe, &place(folder.path(), "parts", false), &mut |_| true).unwrap_err();
    assert!(again.to_string().contains("told to resume"), "{again}");
    recipe.train.rows = 3;
    let other = run(&recipe, &place(folder.path(), "parts", true), &mut |_| true).unwrap_err();
    assert!(other.to_string().contains("expected a run with seed 5; 2 × 3 windows"), "{other}");
}

#[test]
fn what_an_early_end_left_behind_is_made_anew() {
    let folder = tempfile::tempdir().unwrap();
    let mut recipe = recipe(&[tales(folder.path())], 1);
    let place = place(folder.path(), "run", false);
    let text = place.folder.join("text");
    let ended = run(&recipe, &place, &mut |event| !matches!(event, Event::Started(_)));
    assert!(matches!(ended, Err(Error::Stopped)));
    // Another vocabulary is asked for, and of the old one a file is gone.
    std::fs::remove_file(text.join("tokenizer_config.json")).unwrap();
    recipe.model.vocab_size = Some(300);
    go(&recipe, &place, u64::MAX);
    let encoder = Encoder::new(&TextAssets::from_folder(&text).unwrap()).unwrap();
    assert_eq!(encoder.tokenizer().vocab_size(), 300);
    let model = std::fs::read_to_string(place.folder.join("model/config.json")).unwrap();
    assert!(model.contains("\"vocab_size\": 300"), "{model}");
}

#[test]
fn a_run_goes_on_as_what_it_began_as() {
    let folder = tempfile::tempdir().unwrap();
    let tales = tales(folder.path());
    let files = [folder.path().join("a/tales.txt"), folder.path().join("b/tales.txt")];
    for (file, text) in
        files.iter().zip([std::fs::read_to_string(&tales).unwrap(), "Other. ".repeat(999)])
    {
        std::fs::create_dir_all(file.parent().unwrap()).unwrap();
        std::fs::write(file, text).unwrap();
    }
    let mut recipe = recipe(&files[..1], 2);
    recipe.export = vec!["masters".into()];
    go(&recipe, &place(folder.path(), "run", false), u64::MAX);
    let other = folder.path().join("other");
    let options = bitnet_training::tokenizer::TokenizerOptions::new(290);
    bitnet_training::tokenizer::train_tokenizer(&files, &options, &other, false, &mut |_| true)
        .unwrap();

    recipe.train.steps = Some(3);
    let again = |recipe: &Recipe| {
        run(recipe, &place(folder.path(), "run", true), &mut |_| true).map(|report| report.steps)
    };
    type Change<'a> = Box<dyn Fn(&mut Recipe) + 'a>;
    let changes: Vec<(&str, Change<'_>)> = vec![
        (
            "expected corpus 1, file 1, tales.txt = ",
            Box::new(|r| r.stage[0].mix[0].files = vec![files[1].clone()]),
        ),
        (
            "expected weights = ternary, as the run began, got float",
            Box::new(|r| r.train.float = true),
        ),
        ("expected hidden_act = relu2, as", Box::new(|r| r.model.hidden_act = Some("silu".into()))),
        ("expected rope_theta = 10000.0, as", Box::new(|r| r.model.rope_theta = Some(5e4))),
        (
            "expected num_attention_heads = 4, as the run began, got 8", // with tensors of the same shapes
            Box::new(|r| {
                r.model.num_attention_heads = Some(8);
                r.model.num_key_value_heads = Some(4);
            }),
        ),
        ("expected family = bitnet", Box::new(|r| r.model.family = Some(Family::Llama))),
        ("expected separator = <|endoftext|>", Box::new(|r| r.separator = Some("---".into()))),
        (
            "tokenizer: expected the one the run began",
            Box::new(|r| r.tokenizer = Some(other.clone())),
        ),
    ];
    for (expected, change) in changes {
        let mut recipe = recipe.clone();
        change(&mut recipe);
        let error = again(&recipe).expect_err(expected).to_string();
        assert!(error.contains(expected), "{error:?} should say {expected:?}");
    }
    // The same data from another place are the same data; older checkpoints say less of them.
    recipe.stage[0].mix[0].files = vec![tales];
    assert_eq!(again(&recipe).unwrap(), 3);
    let state = folder.path().join("run/checkpoints/step-00000003/state.json");
    let mut json: serde_json::Value =
        serde_json::from_slice(&std::fs::read(&state).unwrap()).unwrap();
    assert!(json.as_object_mut().unwrap().remove("made_of").is_some());
    std::fs::write(&state, json.to_string()).unwrap();
    recipe.train.steps = Some(4);
    assert_eq!(again(&recipe).unwrap(), 4);
}

#[test]
fn a_run_can_be_stopped_before_its_first_step_and_after_its_last() {
    let folder = tempfile::tempdir().unwrap();
    let tales = tales(folder.path());
    // Whoever reads it all finds out that its end is no text.
    let mut long = std::fs::read(&tales).unwrap().repeat(200);
    long.push(0xff);
    let path = folder.path().join("long.txt");
    std::fs::write(&path, long).unwrap();
    let place_of = |resume| place(folder.path(), "run", resume);
    let stop = &mut |event: Event<'_>| !matches!(event, Event::TrainingTokenizer(_));
    let stopped = run(&recipe(&[path], 1), &place_of(false), stop);
    assert!(matches!(stopped, Err(Error::Stopped)), "{stopped:?}");
    assert!(!place_of(false).folder.join("text").exists());

    let mut recipe = recipe(std::slice::from_ref(&tales), 2);
    recipe.eval.text = Some(tales);
    recipe.samples.prompts = vec!["The fox".into()];
    recipe.samples.tokens = 4;
    let mut seen = 0;
    let mut hear = |event: Event<'_>| {
        seen += usize::from(matches!(event, Event::Measuring { .. }));
        seen < 2
    };
    let report = run(&recipe, &place_of(false), &mut hear).unwrap();
    assert_eq!((report.stopped, report.steps, seen), (true, 2, 2));
    assert!(report.measured.is_none() && report.exported.is_empty());
    for _ in 0..2 {
        let (report, losses) = go(&recipe, &place_of(true), u64::MAX);
        assert!(!report.stopped && report.measured.is_some() && losses.is_empty());
        assert_eq!(report.exported.len(), 1);
    }
    let log = std::fs::read_to_string(place_of(true).folder.join("log.jsonl")).unwrap();
    assert_eq!(log.matches("\"event\":\"sample\"").count(), 1, "{log}");
}

#[test]
fn a_model_goes_on_from_its_trits_and_learns_answers() {
    let folder = tempfile::tempdir().unwrap();
    let chats = folder.path().join("chats.jsonl");
    let line = |i: usize| {
        let (question, answer) =
            [("red", "A rose."), ("blue", "The sea."), ("green", "Grass.")][i % 3];
        format!(
            "{{\"messages\": [{{\"role\": \"user\", \"content\": \"What is {question}?\"}}, \
             {{\"role\": \"assistant\", \"content\": \"{answer}\"}}]}}\n"
        )
    };
    std::fs::write(&chats, (0..300).map(line).collect::<String>()).unwrap();
    let mut recipe = recipe(&[chats], 12);
    recipe.model = Default::default();
    recipe.from = Some("builtin".into());
    recipe.train.rate = 1e-3;
    recipe.export = vec!["i2_s".into()];
    let (report, losses) = go(&recipe, &place(folder.path(), "chat", false), u64::MAX);
    assert!(losses[11] < 0.6 * losses[0], "{losses:?}");
    assert!(report.tokens < 12 * 4 * 48 / 2, "only answers count: {}", report.tokens);

    // Nothing is lost on the way in: no step, the same weights.
    recipe.train.rate = 1e-12;
    recipe.train.steps = Some(1);
    recipe.export = vec!["masters".into()];
    let place = place(folder.path(), "same", false);
    go(&recipe, &place, u64::MAX);
    let prompt = "Once upon a time there was a";
    let apart = distance(
        &logits(&place.folder.join("masters"), prompt),
        &logits(Path::new("builtin"), prompt),
    );
    assert!(apart < 0.02, "{apart}");
}

#[test]
fn a_float_model_teaches_a_ternary_one() {
    let folder = tempfile::tempdir().unwrap();
    let files = [tales(folder.path())];
    let mut teacher = recipe(&files, 60);
    teacher.train.float = true;
    teacher.model.family = Some(Family::Llama);
    teacher.model.num_hidden_layers = Some(2);
    teacher.export = vec!["hf".into()];
    let place_of_teacher = place(folder.path(), "teacher", false);
    let (_, losses) = go(&teacher, &place_of_teacher, u64::MAX);
    assert!(losses[59] < 3.0, "{losses:?}");

    let mut student = recipe(&files, 60);
    student.model = Default::default();
    student.distill = Some(DistillRecipe::new(place_of_teacher.folder.join("model")));
    let (mut apart, mut told) = (Vec::new(), 0);
    let place = place(folder.path(), "student", false);
    run(&student, &place, &mut |event| {
        match event {
            Event::Stepped(line) => apart.push(line.extra_loss),
            Event::Exported(_) => told += 1,
            _ => {}
        }
        true
    })
    .unwrap();
    assert_eq!(told, 1);
    let (first, last) = (apart[0], apart[50..].iter().sum::<f64>() / 10.0);
    assert!(last < 0.5 * first, "the student comes closer to the teacher: {first} to {last}");
    let config = std::fs::read_to_string(place.folder.join("model/config.json")).unwrap();
    assert!(config.contains("BitNetForCausalLM") && config.contains("silu"), "{config}");
    let (student, teacher) = (place.folder.join("model"), place_of_teacher.folder.join("model"));
    let card = |folder: &Path| std::fs::read_to_string(folder.join("README.md")).unwrap();
    assert!(card(&teacher).contains("tags: [float]"), "{}", card(&teacher));
    let told = card(&student);
    assert!(
        told.contains("tags: [bitnet, ternary]") && told.contains("| taught by | model;"),
        "{told}"
    );
    let apart = distance(&logits(&student, "The fox met"), &logits(&teacher, "The fox met"));
    assert!(apart < 0.8, "{apart}");
}

#[test]
fn what_is_wrong_is_said_before_the_first_step() {
    let folder = tempfile::tempdir().unwrap();
    let good = recipe(&[tales(folder.path())], 2);
    let write = |name: &str, bytes: &[u8]| {
        let path = folder.path().join(name);
        std::fs::write(&path, bytes).unwrap();
        path
    };
    let (binary, short) = (write("binary.txt", b"a\xff"), write("short.txt", b"word"));
    let broken = write("broken.jsonl", b"{\"text\": 5}");
    let empty = write("empty.txt", b"");
    let turn = |role: &str| format!("{{\"role\": \"{role}\", \"content\": \"Hm, hm.\"}}");
    let turns = ["user", "assistant", "user"].map(turn).join(", ");
    let silent =
        write("silent.jsonl", format!("{{\"messages\": [{turns}]}}\n").repeat(50).as_bytes());
    let deaf = folder.path().join("deaf"); // a template that leaves answers out
    type Spoil<'a> = Box<dyn Fn(&mut Recipe) + 'a>;
    let file = |path: &PathBuf| {
        let path = path.clone();
        move |r: &mut Recipe| r.stage[0].mix[0].files = vec![path.clone()]
    };
    let spoilt: Vec<(&str, Spoil<'_>)> = vec![
        ("binary.txt, line 1: expected UTF-8", Box::new(file(&binary))),
        ("short.txt: expected at least 49 tokens", Box::new(file(&short))),
        ("broken.jsonl, line 1", Box::new(file(&broken))),
        ("gone.txt: cannot open", Box::new(file(&folder.path().join("gone.txt")))),
        ("model.num_attention_heads", Box::new(|r| r.model.num_attention_heads = Some(7))),
        ("tokens of the tokenizer, got 280", Box::new(|r| r.model.vocab_size = Some(280))),
        ("train.rows", Box::new(|r| r.train.rows = 0)),
        ("stage 1: expected weights above 0", Box::new(|r| r.stage[0].mix[0].weight = -1.0)),
        (
            "train.window: expected at most the model's context, 1024",
            Box::new(|r| {
                r.model = Default::default();
                r.from = Some("builtin".into());
                r.tokenizer = None;
                r.train.window = 2000;
            }),
        ),
        (
            "columns divisible by 256",
            Box::new(|r| {
                r.model.intermediate_size = Some(384);
                r.export = vec!["tq2_0".into()];
            }),
        ),
        (
            "nowhere",
            Box::new(|r| {
                r.model = Default::default();
                r.from = Some("nowhere".into());
            }),
        ),
        ("empty.txt: expected text to measure on", Box::new(|r| r.eval.text = Some(empty.clone()))),
        (
            "text: expected at least 3 tokens",
            Box::new(|r| {
                r.eval.text = Some(short.clone());
                r.eval.bytes = 1;
            }),
        ),
        ("samples.prompts: expected", Box::new(|r| r.samples.prompts = vec![String::new()])),
        (
            "got \"word word word word word word word word \"…: ",
            Box::new(|r| r.samples.prompts = vec!["word ".repeat(2000)]),
        ),
        (
            "GGUF has no llama with relu²",
            Box::new(|r| {
                r.model.family = Some(Family::Llama);
                r.model.hidden_act = Some("relu2".into());
                r.export = vec!["i2_s".into()];
            }),
        ),
        (
            "silent.jsonl: expected something to predict: text, or answers of an assistant, got none",
            Box::new(|r| {
                r.tokenizer = Some(deaf.clone());
                r.stage[0].until = 0.5;
                let mix = vec![CorpusRecipe { files: vec![silent.clone()], weight: 1.0 }];
                r.stage.push(StageRecipe { until: 1.0, mix });
            }),
        ),
        (
            "tokenizer: expected the teacher's, in which token 257 is",
            Box::new(|r| {
                r.model = Default::default();
                r.distill = Some(DistillRecipe::new("builtin".into()));
            }),
        ),
        (
            "the student's 4 query and 2 key/value heads of 16, or attention = 0, got 4 query and 4",
            Box::new(|r| {
                r.model = Default::default();
                r.from = Some(folder.path().join("two"));
                r.distill = Some(DistillRecipe::new(folder.path().join("four")));
            }),
        ),
        (
            "the student's vocab_size, 320, got 330",
            Box::new(|r| {
                r.model = Default::default();
                r.from = Some(folder.path().join("two"));
                r.distill = Some(DistillRecipe::new(folder.path().join("more")));
            }),
        ),
    ];
    // One tokenizer for all, so that vocabularies can disagree with it.
    let tokenizer = folder.path().join("tokenizer");
    let options = bitnet_training::tokenizer::TokenizerOptions::new(320);
    let files = good.training_files();
    bitnet_training::tokenizer::train_tokenizer(&files, &options, &tokenizer, false, &mut |_| true)
        .unwrap();
    std::fs::create_dir(&deaf).unwrap();
    for file in ["tokenizer.json", "tokenizer_config.json"] {
        std::fs::copy(tokenizer.join(file), deaf.join(file)).unwrap();
    }
    let template = "{% for m in messages if m.role == 'user' %}{{ m.content }}{% endfor %}";
    std::fs::write(deaf.join("chat_template.jinja"), template).unwrap();
    for (name, kv_heads, vocab_size) in [("two", 2, 320), ("four", 4, 320), ("more", 2, 330)] {
        let shape = ModelRecipe {
            hidden_size: Some(64),
            intermediate_size: Some(64),
            num_hidden_layers: Some(1),
            num_attention_heads: Some(4),
            num_key_value_heads: Some(kv_heads),
            ..ModelRecipe::default()
        };
        let config = shape.config(name, vocab_size, 48).unwrap();
        let model = Model::new(config, Precision::Float, 1).unwrap();
        export::write_masters(&model, &tokenizer, &folder.path().join(name)).unwrap();
    }
    for (i, (expected, spoil)) in spoilt.iter().enumerate() {
        let mut recipe = Recipe { tokenizer: Some(tokenizer.clone()), ..good.clone() };
        spoil(&mut recipe);
        let mut steps = 0;
        let result = run(&recipe, &place(folder.path(), &format!("run{i}"), false), &mut |event| {
            steps += usize::from(matches!(event, Event::Stepped(_)));
            true
        });
        let error = result.expect_err(expected).to_string();
        assert!(error.contains(expected), "{error:?} should say {expected:?}");
        assert_eq!(steps, 0);
    }
}

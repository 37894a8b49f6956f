//! The public API on the built-in model: profiles, settings, streams, errors.

use std::error::Error as _;
use std::time::Duration;

use bitnet_inference::{
    Device, EngineConfig, FinishReason, GenerationOptions, InferenceEngine, InferenceError,
    InferenceInput, KvType, MemorySize, Model, OptimizationLevel,
};
use futures::executor::block_on;

#[path = "../examples/one_page.rs"]
#[allow(dead_code, unreachable_pub)]
mod one_page;

fn engine() -> InferenceEngine {
    InferenceEngine::builder().build_blocking().unwrap()
}

fn builtin(engine: &InferenceEngine) -> Model {
    engine.load_model_blocking("builtin").unwrap()
}

#[test]
fn the_engine_says_what_the_one_page_says() {
    let engine = InferenceEngine::builder().kv_type(KvType::F32).build_blocking().unwrap();
    let model = builtin(&engine);
    for prompt in ["Once upon a time", "The old king looked at the sea and said"] {
        let input = InferenceInput::from(prompt).tokens(&model).unwrap();
        let checkpoint = bitnet_inference::builtin::checkpoint().unwrap();
        let expected = one_page::greedy(&checkpoint, input.clone(), 24).unwrap();
        let options = GenerationOptions::greedy().max_tokens(24).ignore_eos(true);
        let answer = engine.generate_blocking(&model, input.clone(), &options).unwrap();
        let ids: Vec<u32> = answer.tokens.iter().map(|token| token.id).collect();
        assert_eq!(ids, expected[input.len()..], "{prompt}");
    }
}

#[test]
fn profiles_build_and_run() {
    block_on(async {
        for (engine, config) in [
            (InferenceEngine::balanced().await, EngineConfig::balanced()),
            (InferenceEngine::optimized_for_speed().await, EngineConfig::optimized_for_speed()),
            (InferenceEngine::optimized_for_memory().await, EngineConfig::optimized_for_memory()),
        ] {
            let engine = engine.unwrap();
            assert_eq!(*engine.config(), config);
            let model = engine.load_model("builtin").await.unwrap();
            let options = GenerationOptions::greedy().max_tokens(5);
            let answer = engine.generate(&model, "Once upon a time", &options).await.unwrap();
            assert_eq!(answer.usage.completion_tokens, 5);
        }
    });
}

#[test]
fn every_builder_setting_has_an_effect() {
    let builder = InferenceEngine::builder()
        .batch_size(3)
        .memory_pool_size(MemorySize::MB(8))
        .optimization_level(OptimizationLevel::Minimal)
        .device(Device::Cpu)
        .context_length(100)
        .threads(1)
        .kernel("scalar");
    let engine = block_on(builder.build()).unwrap();
    let model = builtin(&engine);
    assert_eq!(model.device().kernel, "scalar");
    assert_eq!(model.device().threads, 1);
    assert_eq!(model.context_length(), 100);
    // Three sequences of 100 positions in blocks of 32 would need 12 blocks, and fit into 8 MiB.
    assert_eq!(model.stats().kv_blocks, 12);
    assert_eq!(engine.context().batch_size, 3);
    assert!(engine.warnings().is_empty());
    assert!(model.warnings().is_empty());

    let long = InferenceEngine::builder().context_length(5000).build_blocking().unwrap();
    let model = builtin(&long);
    assert_eq!(model.context_length(), 1024, "what it was made for");
    assert!(model.warnings()[0].contains("5000"), "{:?}", model.warnings());

    let small = InferenceEngine::builder().memory_pool_size(MemorySize::MB(1)).build_blocking();
    assert!(builtin(&small.unwrap()).stats().kv_blocks < 32, "the budget bounds the cache");

    let unknown = InferenceEngine::builder().kernel("abacus").build_blocking().unwrap();
    let error = unknown.load_model_blocking("builtin").unwrap_err();
    assert!(
        error.source().unwrap().to_string().contains("scalar"),
        "lists what there is: {error:?}"
    );
}

#[test]
fn an_absent_gpu_is_a_warning_or_an_error() {
    let lenient =
        InferenceEngine::builder().enable_gpu_acceleration(true).build_blocking().unwrap();
    assert_eq!(lenient.context().device, Device::Cpu);
    assert!(lenient.warnings()[0].contains("CPU"), "{:?}", lenient.warnings());
    let strict = InferenceEngine::builder()
        .enable_gpu_acceleration(true)
        .strict_device(true)
        .build_blocking();
    assert!(matches!(strict, Err(InferenceError::Gpu { .. })));
}

#[test]
fn the_model_describes_itself_as_its_file_does() {
    let model = builtin(&engine());
    assert_eq!(model.get_model_id(), "builtin");
    let config: serde_json::Value =
        serde_json::from_slice(include_bytes!("../builtin/config.json")).unwrap();
    let size = |name: &str| config[name].as_u64().unwrap();
    let (hidden, ffn) = (size("hidden_size"), size("intermediate_size"));
    let head_dim = config["head_dim"].as_u64().unwrap_or(hidden / size("num_attention_heads"));
    let kv_width = size("num_key_value_heads") * head_dim;
    assert_eq!(model.get_input_dim() as u64, hidden);
    assert_eq!(model.get_output_dim() as u64, size("vocab_size"));
    // Ternary q and o, k and v, gate, up and down; four norms; the embedding and the last norm.
    let ternary = 2 * hidden * hidden + 2 * kv_width * hidden + 3 * hidden * ffn;
    let per_layer = ternary + 3 * hidden + ffn;
    let all = size("num_hidden_layers") * per_layer + size("vocab_size") * hidden + hidden;
    assert_eq!(model.get_total_weight_count(), all);
}

#[test]
fn a_stream_yields_before_the_end_and_stops_when_dropped() {
    let engine = engine();
    let model = builtin(&engine);
    let options = GenerationOptions::default().max_tokens(900).seed(3).ignore_eos(true);
    let mut stream = engine.stream(&model, "Once upon a time", &options).unwrap();
    stream.next().unwrap().unwrap();
    let computed = model.stats().tokens_computed;
    assert!(computed < 500, "the first token came after {computed} of 900");
    drop(stream);
    // Nothing runs any more after a step: the count of computed tokens stands still.
    let mut last = model.stats().tokens_computed;
    for _ in 0..100 {
        std::thread::sleep(Duration::from_millis(5));
        let now = model.stats().tokens_computed;
        if now == last {
            assert!(now < 890, "{now} tokens were computed after the stream was dropped");
            return;
        }
        last = now;
    }
    panic!("the generation went on after its stream was dropped");
}

#[test]
fn streamed_text_is_the_collected_text_and_a_seed_repeats_it() {
    let engine = engine();
    let model = builtin(&engine);
    let options = GenerationOptions::default().max_tokens(60).seed(11).temperature(1.2).logprobs(3);
    let collected = engine.generate_blocking(&model, "The sea was", &options).unwrap();
    let chunks = engine.stream(&model, "The sea was", &options).unwrap();
    let streamed: String = chunks.map(|chunk| chunk.unwrap().text).collect();
    assert_eq!(streamed, collected.text);
    assert!(
        collected.tokens.iter().all(|t| t.logprob.unwrap() <= 0.0 && t.top_logprobs.len() == 3)
    );
    let other = GenerationOptions::default().max_tokens(60).seed(12).temperature(1.2);
    assert_ne!(engine.generate_blocking(&model, "The sea was", &other).unwrap().text, streamed);
}

#[test]
fn choices_are_what_each_is_alone_and_their_prompt_is_computed_once() {
    let engine = engine();
    let model = builtin(&engine);
    let prompt: Vec<u32> = (0..300).map(|i| i * 11 % 4000).collect();
    let options = GenerationOptions::default().seed(5).max_tokens(6).ignore_eos(true);
    let before = model.stats().tokens_computed;
    let choices = engine.generate_choices_blocking(&model, prompt.clone(), &options, 6).unwrap();
    let computed = model.stats().tokens_computed - before;
    assert!(computed < 300 + 6 * (32 + 6), "{computed} tokens for 6 answers");
    for (i, choice) in choices.iter().enumerate() {
        let alone = options.for_choice(i as u64);
        let alone = engine.generate_blocking(&model, prompt.clone(), &alone).unwrap();
        assert_eq!(choice.tokens, alone.tokens);
    }
    assert_ne!(choices[0].tokens, choices[1].tokens);
}

#[test]
fn an_answer_that_fits_a_schema_is_computed_in_fewer_steps_than_it_has_tokens() {
    let engine = engine();
    let model = builtin(&engine);
    let schema = serde_json::json!({
        "type": "object",
        "properties": {
            "a_rather_long_name": {"enum": ["fox", "king"]},
            "another_long_name": {"type": "integer", "minimum": 1, "maximum": 9},
        },
        "required": ["a_rather_long_name", "another_long_name"],
        "additionalProperties": false,
    });
    let options = GenerationOptions::default()
        .seed(3)
        .max_tokens(120)
        .grammar(bitnet_inference::Grammar::JsonSchema(schema));
    let before = model.stats().steps;
    let answer = engine.generate_blocking(&model, "Who is it?", &options).unwrap();
    let steps = model.stats().steps - before;
    let value: serde_json::Value = serde_json::from_str(&answer.text).unwrap();
    assert!(["fox", "king"].contains(&value["a_rather_long_name"].as_str().unwrap()));
    assert_eq!(answer.finish_reason, FinishReason::Stop);
    assert!(
        (steps as usize) < answer.tokens.len(),
        "{steps} steps, {} tokens",
        answer.tokens.len()
    );
    let bad = options.grammar(bitnet_inference::Grammar::Regex("(".into()));
    let error = engine.generate_blocking(&model, "x", &bad).unwrap_err();
    assert!(error.to_string().contains("grammar"), "{error}");
}

#[test]
fn stop_strings_end_the_text_before_themselves() {
    let engine = engine();
    let model = builtin(&engine);
    let options = GenerationOptions::greedy().max_tokens(60);
    let whole = engine.generate_blocking(&model, "Once upon a time", &options).unwrap();
    let middle: String = whole.text.chars().skip(20).take(9).collect();
    let stopped = engine
        .generate_blocking(&model, "Once upon a time", &options.clone().stop(&middle))
        .unwrap();
    assert_eq!(stopped.finish_reason, FinishReason::Stop);
    assert_eq!(stopped.stop_string.as_deref(), Some(middle.as_str()));
    assert_eq!(stopped.text, whole.text[..whole.text.find(&middle).unwrap()]);
    assert!(stopped.tokens.len() < whole.tokens.len());
    assert_eq!(stopped.usage.prompt_tokens, whole.usage.prompt_tokens);
    assert_eq!(whole.finish_reason, FinishReason::Length);
}

#[test]
fn guessing_ahead_changes_nothing_but_the_number_of_steps() {
    let speed = InferenceEngine::builder()
        .optimization_level(OptimizationLevel::Aggressive)
        .build_blocking()
        .unwrap();
    let (fast, plain) = (builtin(&speed), builtin(&engine()));
    let prompt = "one two three four five, one two three four five, one two three four";
    let options = GenerationOptions::greedy().max_tokens(80).ignore_eos(true);
    let guessed = speed.generate_blocking(&fast, prompt, &options).unwrap();
    let expected = engine().generate_blocking(&plain, prompt, &options).unwrap();
    assert_eq!(guessed.tokens, expected.tokens);
    assert!(fast.stats().steps < plain.stats().steps, "{:?} {:?}", fast.stats(), plain.stats());
}

#[test]
fn inputs_out_of_range_are_typed_errors() {
    let engine = engine();
    let model = builtin(&engine);
    let options = GenerationOptions::greedy().max_tokens(5);
    let fails = |input: InferenceInput| engine.infer_blocking(&model, &input).unwrap_err();
    assert!(matches!(fails("".into()), InferenceError::Input { .. }));
    assert!(matches!(fails(vec![4096].into()), InferenceError::Input { .. }));
    assert!(fails(vec![1; 1025].into()).to_string().contains("1024"));
    let hot = engine.stream(&model, "a", &options.temperature(-1.0)).unwrap_err();
    assert!(hot.to_string().contains("temperature"), "{hot}");
}

#[test]
fn models_that_cannot_be_opened_say_why() {
    let engine = engine();
    let open = |path: &str| match engine.load_model_blocking(path) {
        Err(error @ InferenceError::Model { .. }) => error.source().unwrap().to_string(),
        other => panic!("{path}: {other:?}"),
    };
    assert!(open("/no/such/model.gguf").contains("/no/such/model.gguf"));
    let folder = tempfile::tempdir().unwrap();
    assert!(open(folder.path().to_str().unwrap()).contains("config.json"));
    let file = folder.path().join("empty.gguf");
    std::fs::write(&file, b"").unwrap();
    assert!(open(file.to_str().unwrap()).contains("empty.gguf"));
    // The next load is unharmed.
    builtin(&engine);
}

#[test]
fn the_cache_loads_once_and_keeps_what_it_may() {
    let engine = InferenceEngine::builder().max_cached_models(1).build_blocking().unwrap();
    let first = builtin(&engine);
    let again = builtin(&engine);
    assert_eq!(engine.loaded_models().0, 1);
    let options = GenerationOptions::greedy().max_tokens(3);
    engine.generate_blocking(&again, "Once", &options).unwrap();
    assert!(first.stats().steps > 0, "both handles are one model");
    engine.unload_models();
    assert_eq!(engine.loaded_models(), (0, 0));
    engine.generate_blocking(&first, "Once", &options).unwrap();
}

#[test]
fn a_full_context_ends_the_answer() {
    let engine = InferenceEngine::builder().context_length(40).build_blocking().unwrap();
    let model = builtin(&engine);
    let options = GenerationOptions::greedy().ignore_eos(true);
    let answer = engine.generate_blocking(&model, vec![5; 30], &options).unwrap();
    assert_eq!((answer.finish_reason, answer.tokens.len()), (FinishReason::Length, 10));
}

#[test]
fn a_draft_model_changes_nothing_but_the_number_of_steps() {
    // The model drafts for itself, with the same random numbers: every guess is right.
    let drafted = InferenceEngine::builder().draft_model("builtin").build_blocking().unwrap();
    let (fast, plain) = (builtin(&drafted), builtin(&engine()));
    let default = GenerationOptions::default().seed(5);
    let unfiltered = default.clone().temperature(1.0).top_k(0).top_p(1.0).min_p(0.0);
    for options in [GenerationOptions::greedy(), default, unfiltered] {
        let options = options.max_tokens(60).ignore_eos(true);
        let guessed = drafted.generate_blocking(&fast, "The old house", &options).unwrap();
        let expected = engine().generate_blocking(&plain, "The old house", &options).unwrap();
        assert_eq!(guessed.tokens, expected.tokens);
    }
    assert!(fast.stats().steps * 4 < plain.stats().steps, "{:?} {:?}", fast.stats(), plain.stats());

    let folder = concat!(env!("CARGO_MANIFEST_DIR"), "/../../fixtures/goldens/bitnet-tiny/online");
    let other = InferenceEngine::builder().draft_model(folder).build_blocking().unwrap();
    let error = other.load_model_blocking("builtin").unwrap_err();
    assert!(error.to_string().contains("vocabulary of 4096"), "{error}");
}

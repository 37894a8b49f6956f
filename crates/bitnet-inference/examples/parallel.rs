//! How throughput rises with the number of workers, until a step is bound by arithmetic.
//!
//! `cargo run --release -p bitnet-inference --example parallel -- 2b4t` measures a model of that
//! shape with random weights; without an argument, the built-in model.

use std::time::Instant;

use bitnet_inference::synthetic::{SyntheticModel, SyntheticShape};
use bitnet_inference::{
    GenerationOptions, InferenceEngine, InferenceInput, ParallelConfig, ParallelInferenceProcessor,
};

/// Tokens of a prompt, and of its answer.
const PROMPT: u32 = 16;
const ANSWER: u32 = 48;

fn main() -> Result<(), Box<dyn std::error::Error>> {
    let engine = InferenceEngine::builder().batch_size(32).build_blocking()?;
    let model = match std::env::args().nth(1) {
        Some(shape) => {
            let shape: SyntheticShape = shape.parse()?;
            engine.load_source_blocking("synthetic", &SyntheticModel::new(shape.config(), 1))?
        }
        None => engine.load_model_blocking("builtin")?,
    };
    let options = GenerationOptions::greedy().max_tokens(ANSWER).ignore_eos(true);
    println!("workers   tokens/s   times one worker");
    let mut of_one = None;
    for workers in [1, 2, 4, 8, 16, 32] {
        let config = ParallelConfig { workers, queue_capacity: 64 };
        let processor = ParallelInferenceProcessor::new(&engine, &model, config)?;
        // Prompts that share nothing, so that none is found in the cache.
        let prompts = (0..workers as u32 * 2).map(|i| {
            let first = (workers as u32 * 100 + i) * PROMPT;
            InferenceInput::Tokens((first..first + PROMPT).map(|id| id * 7 % 4096).collect())
        });
        let started = Instant::now();
        let mut n_tokens = 0;
        for answer in processor.generate_all(prompts, &options) {
            n_tokens += answer?.tokens.len();
        }
        let rate = n_tokens as f64 / started.elapsed().as_secs_f64();
        let one = *of_one.get_or_insert(rate);
        println!("{workers:>7}   {rate:>8.1}   {:>16.2}", rate / one);
    }
    Ok(())
}

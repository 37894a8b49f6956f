//! Measures the engine as its users meet it: scheduling, sampling and channels included.

use std::fmt;
use std::path::Path;
use std::sync::Arc;
use std::time::{Duration, Instant};

use bitnet_core::backend::{DeviceInfo, MemoryUsage};

use super::{Latency, process};
use crate::engine::InferenceEngine;
use crate::error::{InferenceError, Result};
use crate::input::InferenceInput;
use crate::model::Model;
use crate::options::GenerationOptions;
use crate::request::{Continuation, Event, Goal, Request, Usage};
use crate::sampler::Sampler;
use crate::wait::block_on;

/// What [`InferenceEngine::benchmark`] measured.
#[derive(Debug, Clone)]
pub struct BenchmarkReport {
    /// The path or name of the model.
    pub model: String,
    /// Where it ran.
    pub device: DeviceInfo,
    /// Tokens of the input.
    pub prompt_tokens: usize,
    /// Tokens generated.
    pub operations: usize,
    /// Times the input was processed from its beginning.
    pub runs: usize,
    /// How long it took to open and place the model.
    pub load_time: Duration,
    /// Time of all runs together.
    pub elapsed: Duration,
    /// Prompt tokens computed per second: from a run's first step to its first token.
    pub prefill_tokens_per_second: f64,
    /// Tokens generated per second after each run's first; 0 if every run had but one.
    pub decode_tokens_per_second: f64,
    /// From the arrival of a run to its first token.
    pub time_to_first_token: Latency,
    /// Between one token of a run and the next.
    pub token_latency: Latency,
    /// Bytes the model holds on its device.
    pub memory: MemoryUsage,
    /// Memory of the process at the end, in bytes, where the system tells.
    pub resident_bytes: Option<u64>,
    /// The most memory the process held, in bytes, where the system tells.
    pub peak_bytes: Option<u64>,
}

impl BenchmarkReport {
    /// Tokens generated per second of the whole time, prompts included.
    pub fn operations_per_second(&self) -> f64 {
        self.operations as f64 / self.elapsed.as_secs_f64()
    }

    /// The report as text; its first line holds `Throughput: N ops/sec, Memory: N MB`, where an
    /// operation is one generated token and the memory is that of the process, or of the model
    /// where the system does not tell.
    pub fn display(&self) -> String {
        self.to_string()
    }
}

impl fmt::Display for BenchmarkReport {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let ms = |time: Duration| time.as_secs_f64() * 1e3;
        let percentiles = |latency: &Latency| {
            let [p50, p95, p99] = [50.0, 95.0, 99.0].map(|p| ms(latency.percentile(p)));
            format!("p50 {p50:.3} ms, p95 {p95:.3} ms, p99 {p99:.3} ms")
        };
        let MemoryUsage { weights, kv_cache, activations } = self.memory;
        let held = self.resident_bytes.unwrap_or(weights + kv_cache + activations);
        let mb = |bytes: u64| bytes as f64 / 1e6;
        writeln!(
            f,
            "Throughput: {:.1} ops/sec, Memory: {:.1} MB",
            self.operations_per_second(),
            mb(held)
        )?;
        let DeviceInfo { name, kernel, threads, .. } = &self.device;
        writeln!(f, "Model: {} on {name} ({kernel}, {threads} threads)", self.model)?;
        writeln!(
            f,
            "Prefill: {:.1} tokens/sec ({} tokens, {} runs)",
            self.prefill_tokens_per_second, self.prompt_tokens, self.runs
        )?;
        writeln!(
            f,
            "Decode: {:.1} tokens/sec ({} tokens)",
            self.decode_tokens_per_second, self.operations
        )?;
        writeln!(f, "Time to first token: {}", percentiles(&self.time_to_first_token))?;
        writeln!(f, "Token latency: {}", percentiles(&self.token_latency))?;
        write!(
            f,
            "Weights: {:.1} MB, KV cache: {:.1} MB, activations: {:.1} MB",
            mb(weights),
            mb(kv_cache),
            mb(activations)
        )?;
        if let Some(peak) = self.peak_bytes {
            write!(f, ", peak of the process: {:.1} MB", mb(peak))?;
        }
        write!(f, "\nLoad: {:.1} ms", ms(self.load_time))
    }
}

impl InferenceEngine {
    /// Loads a model with the balanced profile and measures `iterations` operations. An operation
    /// is one token generated after `input`, most likely token first; where the context ends, the
    /// input is processed again from its beginning.
    ///
    /// ```
    /// use bitnet_inference::InferenceEngine;
    ///
    /// # async fn example() -> Result<(), bitnet_inference::InferenceError> {
    /// let report = InferenceEngine::benchmark("builtin", &"Once upon a time".into(), 50).await?;
    /// assert_eq!(report.operations, 50);
    /// println!("{}", report.display());
    /// # Ok(())
    /// # }
    /// # futures::executor::block_on(example()).unwrap();
    /// ```
    ///
    /// # Errors
    /// No iterations, an input that is empty or fills the context, or a model that fails.
    pub async fn benchmark(
        path: impl AsRef<Path>,
        input: &InferenceInput,
        iterations: usize,
    ) -> Result<BenchmarkReport> {
        let engine = Self::balanced().await?;
        let model = engine.load_model(path).await?;
        measure(&model, input, iterations).await
    }

    /// Blocking twin of [`benchmark`](Self::benchmark).
    pub fn benchmark_blocking(
        path: impl AsRef<Path>,
        input: &InferenceInput,
        iterations: usize,
    ) -> Result<BenchmarkReport> {
        block_on(Self::benchmark(path, input, iterations))
    }

    /// As [`benchmark`](Self::benchmark), with this engine's settings and a model it has loaded.
    ///
    /// # Errors
    /// As [`benchmark`](Self::benchmark).
    pub async fn benchmark_model(
        &self,
        model: &Model,
        input: &InferenceInput,
        iterations: usize,
    ) -> Result<BenchmarkReport> {
        measure(model, input, iterations).await
    }

    /// Blocking twin of [`benchmark_model`](Self::benchmark_model).
    pub fn benchmark_model_blocking(
        &self,
        model: &Model,
        input: &InferenceInput,
        iterations: usize,
    ) -> Result<BenchmarkReport> {
        block_on(self.benchmark_model(model, input, iterations))
    }
}

/// Sums over the runs of a measurement.
#[derive(Default)]
struct Totals {
    runs: usize,
    operations: usize,
    prefill: Duration,
    decode: Duration,
    first_tokens: Vec<Duration>,
    gaps: Vec<Duration>,
}

async fn measure(
    model: &Model,
    input: &InferenceInput,
    iterations: usize,
) -> Result<BenchmarkReport> {
    if iterations == 0 {
        return Err(InferenceError::input("iterations", "at least 1", iterations));
    }
    let tokens = input.tokens(model)?;
    let prompt_tokens = tokens.len();
    // Warms caches and threads, and shows early whether the input fits.
    run(model, &tokens, "warm-up", 1, &mut Totals::default()).await?;

    let mut totals = Totals::default();
    let started = Instant::now();
    while totals.operations < iterations {
        // A salt of its own keeps a run from finding the prompt of the last one in the cache.
        let salt = format!("run {}", totals.runs);
        run(model, &tokens, &salt, iterations - totals.operations, &mut totals).await?;
    }
    let elapsed = started.elapsed();
    let rate = |tokens: usize, time: Duration| match time.is_zero() {
        true => 0.0,
        false => tokens as f64 / time.as_secs_f64(),
    };
    Ok(BenchmarkReport {
        model: model.get_model_id().to_owned(),
        device: model.device().clone(),
        prompt_tokens,
        operations: totals.operations,
        runs: totals.runs,
        load_time: model.load_time(),
        elapsed,
        prefill_tokens_per_second: rate(prompt_tokens * totals.runs, totals.prefill),
        decode_tokens_per_second: rate(totals.gaps.len(), totals.decode),
        time_to_first_token: Latency::new(totals.first_tokens),
        token_latency: Latency::new(totals.gaps),
        memory: model.memory(),
        resident_bytes: process::resident_memory(),
        peak_bytes: process::peak_memory(),
    })
}

/// Generates up to `max_tokens` tokens; all times are the worker's, from one clock.
async fn run(
    model: &Model,
    tokens: &[u32],
    salt: &str,
    max_tokens: usize,
    totals: &mut Totals,
) -> Result<()> {
    let options = GenerationOptions::default().temperature(0.0);
    let sampler = Sampler::new(&options, tokens, model.get_output_dim())?;
    let continuation =
        Continuation { sampler, constraint: None, max_tokens, ending_tokens: Vec::new() };
    let request = Request {
        tokens: tokens.to_vec(),
        goal: Goal::Generate(Box::new(continuation)),
        priority: 0,
        cache_salt: Some(Arc::from(salt)),
    };
    let events = model.worker().submit(request)?;
    let mut previous: Option<Usage> = None;
    let (_, usage) = crate::engine::drain(events, |event, _: &mut ()| {
        let Event::Token(_, usage) = event else { return };
        match previous {
            Some(previous) => totals.gaps.push(usage.decode.saturating_sub(previous.decode)),
            None => totals.first_tokens.push(usage.queued + usage.prefill),
        }
        previous = Some(usage);
    })
    .await?;
    totals.runs += 1;
    totals.operations += usage.completion_tokens;
    totals.prefill += usage.prefill;
    totals.decode += usage.decode;
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_report_covers_every_operation_and_says_so() {
        let input = InferenceInput::Tokens(vec![1; 40]);
        let report = block_on(InferenceEngine::benchmark("builtin", &input, 60)).unwrap();
        assert_eq!((report.operations, report.prompt_tokens), (60, 40));
        assert_eq!(report.time_to_first_token.count(), report.runs);
        assert_eq!(report.token_latency.count(), 60 - report.runs);
        assert!(report.prefill_tokens_per_second > 0.0 && report.decode_tokens_per_second > 0.0);
        let slowest = report.token_latency.percentile(100.0);
        assert!(report.token_latency.percentile(50.0) <= slowest && slowest <= report.elapsed);
        let text = report.display();
        let first = text.lines().next().unwrap();
        let numbers = first.strip_prefix("Throughput: ").and_then(|s| s.strip_suffix(" MB"));
        let (throughput, memory) = numbers.unwrap().split_once(" ops/sec, Memory: ").unwrap();
        assert!(throughput.parse::<f64>().unwrap() > 0.0, "{first}");
        assert!(memory.parse::<f64>().unwrap() > 0.0, "{first}");
    }

    #[test]
    fn a_full_context_starts_again() {
        let engine = InferenceEngine::builder().context_length(64).build_blocking().unwrap();
        let model = engine.load_model_blocking("builtin").unwrap();
        let input = InferenceInput::Tokens(vec![1; 34]);
        let report = block_on(engine.benchmark_model(&model, &input, 100)).unwrap();
        assert_eq!((report.operations, report.runs), (100, 4), "30 tokens fit behind the input");
    }

    #[test]
    fn no_iterations_are_refused() {
        let report = block_on(InferenceEngine::benchmark("builtin", &"a".into(), 0));
        assert!(matches!(report, Err(InferenceError::Input { .. })));
    }
}

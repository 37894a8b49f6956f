//! Measures a model in the field's terms: prompt processing (`pp`), token generation (`tg`), at a
//! depth, for several sequences together, against what the machine allows.
//!
//! A test runs the model's steps alone: tokens are made up beforehand, so tokenization, scheduling
//! and sampling are outside the measured time; each repetition of a generation produces the logits
//! of every token. [`InferenceEngine::benchmark`](crate::InferenceEngine::benchmark) measures the
//! engine with all of these. Knows no output format.

mod engine;
mod plan;
pub mod process;
mod small;
mod stats;

pub use engine::BenchmarkReport;
pub use plan::Test;
pub use small::products_per_second;
pub use stats::{Latency, Sample};

use std::time::{Duration, Instant};

use bitnet_core::backend::{Batch, DeviceInfo, KvSpec, KvType, MemoryUsage};
use bitnet_core::kernels::Kernels;
use bitnet_core::machine;
use bitnet_core::memory::system::available_memory;
use bitnet_core::threads::ThreadPool;
use bitnet_quant::config::ModelConfig;

use crate::backend::{InferenceBackend, StepCost};
use crate::config::{BLOCK_TOKENS, EngineConfig};
use crate::device::{self, Placement};
use crate::error::{InferenceError, Result};
use crate::options::GenerationOptions;
use crate::source::WeightSource;
use plan::Planner;
use process::CpuTimes;

/// How to measure.
#[derive(Debug, Clone)]
pub struct Settings {
    /// CPU threads; `None`: one for each physical core.
    pub threads: Option<usize>,
    /// CPU kernel by name; `None`: `BITNET_KERNEL`, or the best this CPU has.
    pub kernel: Option<String>,
    /// Number format of cached keys and values.
    pub kv_type: KvType,
    /// Prompt tokens computed in one step.
    pub chunk: usize,
    /// Logits wanted of each token: so many largest ones, exactly; `None`: all of them. A backend
    /// may find the largest without reading the whole head.
    pub n_best: Option<usize>,
    /// Measured repetitions of each test, after one that is not.
    pub repetitions: usize,
}

impl Default for Settings {
    /// All physical cores, f16, and as many logits as the engine's default sampling looks at.
    fn default() -> Self {
        Self {
            threads: None,
            kernel: None,
            kv_type: KvType::F16,
            chunk: 512,
            n_best: Some(GenerationOptions::default().top_k as usize),
            repetitions: 5,
        }
    }
}

/// What bringing the model onto the device took.
#[derive(Debug, Clone, Copy)]
pub struct Loading {
    /// From the start until the model was in place.
    pub load: Duration,
    /// From the start until the logits of a first token were there.
    pub first_token: Duration,
    /// Resident memory of the process then, in bytes, where the system tells.
    pub resident_bytes: Option<u64>,
}

/// The result of a test.
#[derive(Debug, Clone)]
pub struct Measurement {
    /// What was measured.
    pub test: Test,
    /// Tokens per second, all sequences together; one sample a repetition.
    pub tokens_per_second: Sample,
    /// Time of a step.
    pub step: Latency,
    /// Bytes of weights and KV cache one repetition must read at least.
    pub bytes_read: u64,
    /// Ternary multiply-accumulates of one repetition.
    pub ternary_macs: u64,
    /// Processors that other programs kept busy meanwhile, where the system tells; a measurement
    /// with more than a tenth of one is not worth recording.
    pub other_load: Option<f64>,
    /// A hash of the last step's best logits: equal for every thread count and kernel.
    pub fingerprint: u64,
}

/// What the machine can do on the threads of a measurement.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Limits {
    /// Bytes read from memory in a second.
    pub bytes_per_second: f64,
    /// 8-bit multiply-accumulates in a second.
    pub macs_per_second: f64,
}

impl Limits {
    /// Measures the limits of this many threads: reading memory laid out as weights are (1 GiB, or
    /// a quarter of what is available), and the multiply-accumulate instruction of a kernel. Best of
    /// many in under a second each.
    ///
    /// # Errors
    /// No such kernel on this CPU, or no room for the memory to read.
    pub fn measure(threads: usize, kernel: &str) -> Result<Self> {
        const MOST: u64 = 1 << 30;
        const LEAST: u64 = 1 << 26;
        let available = available_memory().unwrap_or(u64::MAX);
        let n_bytes = (available / 4).clamp(LEAST, MOST) as usize;
        let device = |e| InferenceError::device("the limits of the machine", e);
        let pool = ThreadPool::new(threads).map_err(device)?;
        let kernels = Kernels::by_name(kernel).map_err(device)?;
        Ok(Self {
            bytes_per_second: machine::measure_read_bandwidth(&pool, n_bytes).map_err(device)?,
            macs_per_second: machine::measure_mac_peak(&pool, kernels),
        })
    }
}

/// Which limit a test comes up against first.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Bound {
    /// Reading the weights and the KV cache.
    Memory,
    /// Multiplying.
    Arithmetic,
}

impl Measurement {
    /// The fastest the machine could do the test, in tokens per second, and what bounds it: each
    /// byte read once, each ternary product computed once, nothing else counted.
    pub fn limit(&self, limits: &Limits) -> (f64, Bound) {
        let reading = self.bytes_read as f64 / limits.bytes_per_second;
        let multiplying = self.ternary_macs as f64 / limits.macs_per_second;
        let bound = if reading >= multiplying { Bound::Memory } else { Bound::Arithmetic };
        (self.test.n_tokens() as f64 / reading.max(multiplying), bound)
    }
}

/// A model in place, ready to be measured.
pub struct Bench {
    backend: Box<dyn InferenceBackend>,
    config: ModelConfig,
    total_weights: u64,
    settings: Settings,
    loading: Loading,
    max_positions: usize,
    logits: Vec<f32>,
}

impl Bench {
    /// Opens a model and places it with room for `tests`.
    ///
    /// Positions may lie beyond the context the model was made for: nothing is said about its text.
    ///
    /// # Errors
    /// Nonsense in the settings or tests, a KV cache larger than the memory that is available, or a
    /// model that does not load.
    pub fn load(
        open: impl FnOnce() -> Result<Box<dyn WeightSource>>,
        settings: Settings,
        tests: &[Test],
        progress: &mut dyn FnMut(usize, usize),
    ) -> Result<Self> {
        check(&settings, tests)?;
        let started = Instant::now();
        let source = open()?;
        let config = source.config().clone();
        let max_positions = tests.iter().map(Test::n_positions).max().unwrap_or(1);
        let max_sequences = tests.iter().map(Test::n_sequences).max().unwrap_or(1);
        let kv_spec = KvSpec {
            n_layers: config.num_hidden_layers,
            n_kv_heads: config.num_key_value_heads,
            head_dim: config.head_dim,
            block_tokens: BLOCK_TOKENS,
            n_blocks: tests.iter().map(Test::n_blocks).max().unwrap_or(1),
            dtype: settings.kv_type,
        };
        let needed_bytes = kv_spec.n_blocks as u64 * kv_spec.block_bytes() as u64;
        if let Some(available_bytes) = available_memory()
            && needed_bytes > available_bytes
        {
            let what = "the KV cache of these tests".into();
            return Err(InferenceError::Memory { what, needed_bytes, available_bytes });
        }
        let max_step_tokens = settings.chunk.min(max_positions).max(max_sequences);
        let placement = Placement { kv_spec, max_positions, max_step_tokens };
        let engine_config = EngineConfig {
            threads: settings.threads,
            kernel: settings.kernel.clone(),
            kv_type: settings.kv_type,
            // A measurement says on what it was made: no other device takes over.
            strict_device: true,
            ..EngineConfig::balanced()
        };
        let choice = device::choose(&engine_config)?;
        let backend = device::open(choice.first(), &engine_config, &*source, placement, progress)?;
        let load = started.elapsed();
        let total_weights = source.total_weight_count();
        drop(source);
        let loading = Loading { load, first_token: load, resident_bytes: None };
        let logits = Vec::new();
        let mut bench =
            Self { backend, config, total_weights, settings, loading, max_positions, logits };
        let first = Test::Prefill { tokens: 1, depth: 0 };
        bench.planner(first).measured().iter().try_for_each(|batch| bench.step(batch))?;
        bench.loading.first_token = started.elapsed();
        bench.loading.resident_bytes = process::resident_memory();
        Ok(bench)
    }

    /// What loading took.
    pub fn loading(&self) -> Loading {
        self.loading
    }

    /// The hyper-parameters of the model.
    pub fn config(&self) -> &ModelConfig {
        &self.config
    }

    /// Numbers in all its tensors.
    pub fn total_weights(&self) -> u64 {
        self.total_weights
    }

    /// The device, with the kernel and threads in use.
    pub fn device(&self) -> DeviceInfo {
        self.backend.device()
    }

    /// Bytes held on the device.
    pub fn memory(&self) -> MemoryUsage {
        self.backend.get_memory_usage()
    }

    /// What a step reads and computes besides the KV cache and the head.
    pub fn step_cost(&self) -> StepCost {
        self.backend.step_cost()
    }

    /// Bytes of the head that a step with logits reads, at least.
    pub fn head_bytes(&self) -> u64 {
        self.backend.head_bytes(self.settings.n_best)
    }

    /// Runs a test: once unmeasured, then as often as the settings say; `progress` is called with
    /// (repetitions done, repetitions).
    ///
    /// # Errors
    /// A test longer than those the model was placed for, a device that fails, or logits that are
    /// not numbers: a fast wrong answer is no result.
    pub fn run(
        &mut self,
        test: Test,
        progress: &mut dyn FnMut(usize, usize),
    ) -> Result<Measurement> {
        check(&self.settings, &[test])?;
        let spec = self.backend.kv_spec();
        if test.n_blocks() > spec.n_blocks || test.n_positions() > self.max_positions {
            let expected = format!("at most {} positions", self.max_positions);
            return Err(InferenceError::input("test", expected, test));
        }
        let planner = self.planner(test);
        let steps = planner.measured();
        // Every repetition writes the positions behind the depth anew.
        for batch in planner.before().iter().chain(&steps) {
            self.step(batch)?;
        }
        let repetitions = self.settings.repetitions;
        let mut rates = Vec::with_capacity(repetitions);
        let mut times = Vec::with_capacity(repetitions * steps.len());
        let before = CpuTimes::now();
        for repetition in 0..repetitions {
            progress(repetition, repetitions);
            let started = Instant::now();
            let mut previous = started;
            for batch in &steps {
                self.step(batch)?;
                let now = Instant::now();
                times.push(now - previous);
                previous = now;
            }
            rates.push(test.n_tokens() as f64 / (previous - started).as_secs_f64());
        }
        progress(repetitions, repetitions);
        let other_load = before.zip(CpuTimes::now()).map(|(a, b)| b.other_load_since(&a));
        let (bytes_read, ternary_macs) = self.cost(&steps);
        Ok(Measurement {
            test,
            tokens_per_second: Sample::new(rates),
            step: Latency::new(times),
            bytes_read,
            ternary_macs,
            other_load,
            fingerprint: self.fingerprint()?,
        })
    }

    fn planner(&self, test: Test) -> Planner {
        let Settings { chunk, n_best, .. } = self.settings;
        Planner { test, vocab_size: self.config.vocab_size, chunk, n_best }
    }

    fn step(&mut self, batch: &Batch) -> Result<()> {
        let result = self.backend.execute_batch(batch, &mut self.logits);
        result.map_err(|e| InferenceError::device(&self.config.name, e))
    }

    /// Bytes that must be read and ternary products that must be computed in these steps.
    fn cost(&self, steps: &[Batch]) -> (u64, u64) {
        let cost = self.backend.step_cost();
        let head_bytes = self.head_bytes();
        let spec = self.backend.kv_spec();
        let kv_bytes = (spec.block_bytes() / spec.block_tokens) as u64;
        let (mut bytes, mut macs) = (0, 0);
        for step in steps {
            let positions = step.sequences.iter().map(|s| s.first_position + s.rows.len());
            bytes += cost.layer_bytes + kv_bytes * positions.sum::<usize>() as u64;
            bytes += if step.logit_rows.is_empty() { 0 } else { head_bytes };
            macs += cost.ternary_macs * step.tokens.len() as u64;
        }
        (bytes, macs)
    }

    /// A hash of the best logit of each row and the token it belongs to.
    fn fingerprint(&self) -> Result<u64> {
        // FNV-1a.
        let mut hash = 0xcbf2_9ce4_8422_2325_u64;
        for row in self.logits.chunks_exact(self.config.vocab_size) {
            // Rows that are not among the wanted ones may be −∞; anything else is a number.
            let broken = row.iter().any(|x| x.is_nan() || *x == f32::INFINITY);
            let best = row.iter().enumerate().max_by(|a, b| a.1.total_cmp(b.1));
            let best = best.filter(|(_, x)| x.is_finite() && !broken).ok_or_else(|| {
                let what = "the measured steps gave logits that are not numbers";
                InferenceError::model_lacks(&self.config.name, what)
            })?;
            for byte in (best.0 as u32).to_le_bytes().into_iter().chain(best.1.to_le_bytes()) {
                hash = (hash ^ u64::from(byte)).wrapping_mul(0x0100_0000_01b3);
            }
        }
        Ok(hash)
    }
}

/// Refuses tests that measure nothing or whose sizes overflow.
fn check(settings: &Settings, tests: &[Test]) -> Result<()> {
    let range = |field: &str, value: usize, low: usize, high: usize| {
        if (low..=high).contains(&value) {
            return Ok(());
        }
        Err(InferenceError::input(field, format!("{low} to {high}"), value))
    };
    range("chunk", settings.chunk, 1, 1 << 16)?;
    range("logits", settings.n_best.unwrap_or(1), 1, 1 << 24)?;
    range("repetitions", settings.repetitions, 1, 10_000)?;
    for test in tests {
        range("sequences", test.n_sequences(), 1, 1024)?;
        range("depth", test.depth(), 0, 1 << 24)?;
        range("tokens", test.n_tokens() / test.n_sequences(), 1, 1 << 24)?;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::synthetic::{SyntheticModel, SyntheticShape};

    fn model() -> SyntheticModel {
        let config = ModelConfig {
            hidden_size: 64,
            intermediate_size: 96,
            num_hidden_layers: 3,
            num_attention_heads: 4,
            num_key_value_heads: 2,
            head_dim: 16,
            vocab_size: 50,
            ..SyntheticShape::Bitnet2B4T.config()
        };
        SyntheticModel::new(config, 0)
    }

    fn bench(threads: usize, tests: &[Test]) -> Bench {
        let settings =
            Settings { threads: Some(threads), chunk: 16, repetitions: 2, ..Settings::default() };
        Bench::load(|| Ok(Box::new(model())), settings, tests, &mut |_, _| {}).unwrap()
    }

    const QUIET: fn(usize, usize) = |_, _| {};

    #[test]
    fn every_test_yields_its_samples_and_the_same_logits_on_any_threads() {
        let tests = [
            Test::Prefill { tokens: 40, depth: 0 },
            Test::Decode { tokens: 5, sequences: 1, depth: 0 },
            Test::Decode { tokens: 5, sequences: 3, depth: 33 },
        ];
        let mut results = Vec::new();
        for threads in [1, 2] {
            let mut bench = bench(threads, &tests);
            assert_eq!(bench.device().threads, threads);
            let loading = bench.loading();
            assert!(loading.first_token >= loading.load);
            for test in tests {
                let measured = bench.run(test, &mut QUIET.clone()).unwrap();
                assert_eq!(measured.tokens_per_second.values().len(), 2);
                let steps = if test == tests[0] { 3 } else { 5 };
                assert_eq!(measured.step.count(), 2 * steps);
                results.push(measured);
            }
        }
        for (one, two) in results[..3].iter().zip(&results[3..]) {
            assert_eq!(one.fingerprint, two.fingerprint, "{}", one.test);
            assert_eq!((one.bytes_read, one.ternary_macs), (two.bytes_read, two.ternary_macs));
        }
        assert_ne!(results[0].fingerprint, results[1].fingerprint);
    }

    #[test]
    fn costs_are_those_of_the_shape() {
        let test = Test::Decode { tokens: 4, sequences: 2, depth: 10 };
        let mut bench = bench(1, &[test]);
        let weights = 3 * (2 * 64 * 64 + 2 * 32 * 64 + 3 * 96 * 64);
        let cost = bench.step_cost();
        assert_eq!(cost.ternary_macs, weights);
        assert!(cost.layer_bytes >= weights / 5, "1.6 bits a weight at least");
        let head_bytes = bench.head_bytes();
        assert_eq!(head_bytes, 50 * 64 * 2, "f16, and too small for a second copy");
        assert!(cost.layer_bytes + head_bytes <= bench.memory().weights);
        let measured = bench.run(test, &mut QUIET.clone()).unwrap();
        assert_eq!(measured.ternary_macs, 4 * 2 * weights);
        // Two sequences read 11, 12, 13 and 14 positions of f16 keys and values.
        let kv_bytes = 2 * (11 + 12 + 13 + 14) * (3 * 2 * 2 * 16 * 2);
        assert_eq!(measured.bytes_read, 4 * (cost.layer_bytes + head_bytes) + kv_bytes);
    }

    #[test]
    fn the_limit_is_the_slower_of_reading_and_multiplying() {
        let measured = Measurement {
            test: Test::Prefill { tokens: 10, depth: 0 },
            tokens_per_second: Sample::new(vec![1.0]),
            step: Latency::default(),
            bytes_read: 100,
            ternary_macs: 1000,
            other_load: None,
            fingerprint: 0,
        };
        let limits =
            |bytes_per_second, macs_per_second| Limits { bytes_per_second, macs_per_second };
        assert_eq!(measured.limit(&limits(50.0, 1000.0)), (5.0, Bound::Memory));
        assert_eq!(measured.limit(&limits(100.0, 250.0)), (2.5, Bound::Arithmetic));
    }

    #[test]
    fn tests_without_room_or_sense_are_refused() {
        let small = Test::Prefill { tokens: 8, depth: 0 };
        let mut placed = bench(1, &[small]);
        let large = Test::Prefill { tokens: 100, depth: 0 };
        assert!(matches!(placed.run(large, &mut QUIET.clone()), Err(InferenceError::Input { .. })));
        let nothing = Test::Decode { tokens: 0, sequences: 1, depth: 0 };
        let nobody = Test::Decode { tokens: 1, sequences: 0, depth: 0 };
        for test in [nothing, nobody] {
            let open = || -> Result<Box<dyn WeightSource>> { Ok(Box::new(model())) };
            assert!(Bench::load(open, Settings::default(), &[test], &mut |_, _| {}).is_err());
        }
    }

    #[test]
    #[cfg(target_os = "linux")] // others do not tell how much memory is available
    fn a_cache_larger_than_the_memory_is_an_error_before_anything_is_loaded() {
        let huge = Test::Decode { tokens: 1 << 24, sequences: 1024, depth: 0 };
        let open = || -> Result<Box<dyn WeightSource>> { Ok(Box::new(model())) };
        let result = Bench::load(open, Settings::default(), &[huge], &mut |_, _| {});
        assert!(matches!(result.err(), Some(InferenceError::Memory { .. })));
    }
}

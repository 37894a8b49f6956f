//! Batches whose size follows what memory and time allow.
//!
//! After each batch its size is judged: one that took too long halves the next, one that was quick
//! lets it grow by a quarter. What an input costs in memory is learnt from the inputs seen; a budget
//! that shrinks counts from the next batch on.

use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use super::processor::BatchProcessor;
use super::task::{Generate, Logits, Task};
use crate::config::MemorySize;
use crate::engine::InferenceEngine;
use crate::error::{InferenceError, Result};
use crate::input::{InferenceInput, InferenceOutput};
use crate::model::Model;
use crate::options::GenerationOptions;
use crate::stream::Generation;

/// Bounds of a [`DynamicBatchProcessor`].
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct DynamicBatchConfig {
    /// Smallest batch; memory may force a smaller one still, of one input at least.
    pub min_batch_size: usize,
    /// Largest batch.
    pub max_batch_size: usize,
    /// Bytes the inputs of a batch may hold: their blocks of the KV cache and their logits.
    pub memory_budget: MemorySize,
    /// How long a batch may take.
    pub target_latency: Duration,
}

impl Default for DynamicBatchConfig {
    /// 1 to 64 inputs, 1 GiB, 2 seconds.
    fn default() -> Self {
        Self {
            min_batch_size: 1,
            max_batch_size: 64,
            memory_budget: MemorySize::GB(1),
            target_latency: Duration::from_secs(2),
        }
    }
}

/// What a [`DynamicBatchProcessor`] has done.
#[derive(Debug, Clone, Copy, Default, PartialEq)]
pub struct BatchStatistics {
    /// Batches run.
    pub batches: u64,
    /// Inputs in them.
    pub inputs: u64,
    /// Size of the next batch.
    pub batch_size: usize,
    /// The largest batch run.
    pub largest_batch: usize,
    /// Times the size grew.
    pub grown: u64,
    /// Times it shrank because a batch took too long.
    pub shrunk_for_latency: u64,
    /// Times it shrank because the memory budget asked for it.
    pub shrunk_for_memory: u64,
    /// The most bytes the inputs of one batch held.
    pub peak_bytes: u64,
    /// Time of the last batch.
    pub last_latency: Duration,
    /// Time of all batches.
    pub busy: Duration,
}

impl BatchStatistics {
    /// Inputs per second of the time batches ran; `None` before the first.
    pub fn inputs_per_second(&self) -> Option<f64> {
        (!self.busy.is_zero()).then(|| self.inputs as f64 / self.busy.as_secs_f64())
    }
}

/// Runs lists of inputs in batches whose size adapts. Results never depend on the sizes.
///
/// ```
/// use bitnet_inference::batch::{DynamicBatchConfig, DynamicBatchProcessor};
/// use bitnet_inference::{InferenceEngine, MemorySize};
///
/// let engine = InferenceEngine::builder().build_blocking()?;
/// let model = engine.load_model_blocking("builtin")?;
/// let processor = DynamicBatchProcessor::new(DynamicBatchConfig::default())?;
/// let inputs = vec!["Once upon a time".into(); 20];
/// assert_eq!(processor.infer(&engine, &model, &inputs)?.len(), 20);
///
/// processor.set_memory_budget(MemorySize::KB(200)); // counts from the next batch on
/// processor.infer(&engine, &model, &inputs)?;
/// assert!(processor.statistics().batch_size <= 2);
/// # Ok::<(), bitnet_inference::InferenceError>(())
/// ```
#[derive(Debug)]
pub struct DynamicBatchProcessor {
    target_latency: Duration,
    state: Mutex<State>,
}

#[derive(Debug)]
struct State {
    sizer: BatchSizer,
    statistics: BatchStatistics,
}

impl DynamicBatchProcessor {
    /// A processor that starts with the smallest batch.
    ///
    /// # Errors
    /// A range that is empty or begins at 0.
    pub fn new(config: DynamicBatchConfig) -> Result<Self> {
        let DynamicBatchConfig { min_batch_size: min, max_batch_size: max, .. } = config;
        if min == 0 || min > max {
            return Err(InferenceError::input(
                "min_batch_size",
                format!("1 to max_batch_size, which is {max}"),
                min,
            ));
        }
        let sizer = BatchSizer::new(min, max, config.memory_budget.bytes());
        let statistics = BatchStatistics { batch_size: min, ..BatchStatistics::default() };
        let state = Mutex::new(State { sizer, statistics });
        Ok(Self { target_latency: config.target_latency, state })
    }

    /// Changes the memory budget; it counts from the next batch on, also within a running list.
    pub fn set_memory_budget(&self, budget: MemorySize) {
        let mut state = self.lock();
        state.sizer.budget = budget.bytes();
        state.statistics.batch_size = state.sizer.size();
    }

    /// What it has done so far.
    pub fn statistics(&self) -> BatchStatistics {
        self.lock().statistics
    }

    /// The logits after the last token of each input, in the order of the inputs. Blocking.
    ///
    /// # Errors
    /// The first error of any input; [`InferenceError::Memory`] for one over the budget by itself.
    pub fn infer(
        &self,
        engine: &InferenceEngine,
        model: &Model,
        inputs: &[InferenceInput],
    ) -> Result<Vec<InferenceOutput>> {
        self.run(engine, model, inputs, &Logits)
    }

    /// An answer to each prompt, with the same options. Blocking.
    ///
    /// # Errors
    /// As [`infer`](Self::infer), and options outside their range.
    pub fn generate(
        &self,
        engine: &InferenceEngine,
        model: &Model,
        prompts: &[InferenceInput],
        options: &GenerationOptions,
    ) -> Result<Vec<Generation>> {
        self.run(engine, model, prompts, &Generate(options))
    }

    fn run<T: Task>(
        &self,
        engine: &InferenceEngine,
        model: &Model,
        inputs: &[InferenceInput],
        task: &T,
    ) -> Result<Vec<T::Output>> {
        let mut outputs = Vec::with_capacity(inputs.len());
        while outputs.len() < inputs.len() {
            let (size, budget) = {
                let state = self.lock();
                (state.sizer.size(), state.sizer.budget)
            };
            // The engine may not let so many wait.
            let size = size.min(engine.config().max_waiting).min(inputs.len() - outputs.len());
            let processor = BatchProcessor {
                max_batch_size: size,
                memory_threshold: MemorySize::KB(budget.div_ceil(1 << 10)),
                parallel_workers: 1,
            };
            let batch = &inputs[outputs.len()..outputs.len() + size];
            let started = Instant::now();
            let (results, peaks) = processor.run(engine, model, batch, task)?;
            let latency = started.elapsed();
            outputs.extend(results);

            let mut state = self.lock();
            let state = &mut *state;
            let change = state.sizer.observe(&Observation {
                inputs: size,
                bytes_per_input: peaks.bytes.div_ceil(peaks.inputs.max(1) as u64),
                too_slow: latency > self.target_latency,
                quick: latency < self.target_latency * 3 / 4,
            });
            let statistics = &mut state.statistics;
            statistics.batches += 1;
            statistics.inputs += size as u64;
            statistics.batch_size = state.sizer.size();
            statistics.largest_batch = statistics.largest_batch.max(peaks.inputs);
            statistics.peak_bytes = statistics.peak_bytes.max(peaks.bytes);
            statistics.last_latency = latency;
            statistics.busy += latency;
            match change {
                Change::Grown => statistics.grown += 1,
                Change::ShrunkForLatency => statistics.shrunk_for_latency += 1,
                Change::ShrunkForMemory => statistics.shrunk_for_memory += 1,
                Change::None => {}
            }
        }
        Ok(outputs)
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// How a batch went.
#[derive(Debug, Clone, Copy)]
struct Observation {
    inputs: usize,
    bytes_per_input: u64,
    too_slow: bool,
    quick: bool,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Change {
    None,
    Grown,
    ShrunkForLatency,
    ShrunkForMemory,
}

/// Chooses the size of the next batch. Knows numbers only.
#[derive(Debug, Clone)]
struct BatchSizer {
    min: usize,
    max: usize,
    budget: u64,
    /// What time allows.
    wanted: usize,
    /// What an input took lately; jumps up, and comes down slowly.
    bytes_per_input: u64,
}

impl BatchSizer {
    fn new(min: usize, max: usize, budget: u64) -> Self {
        Self { min, max, budget, wanted: min, bytes_per_input: 0 }
    }

    /// Inputs the budget has room for, as far as is known.
    fn room(&self) -> usize {
        match self.bytes_per_input {
            0 => self.max,
            bytes => usize::try_from(self.budget / bytes).unwrap_or(usize::MAX).max(1),
        }
    }

    fn size(&self) -> usize {
        self.wanted.clamp(self.min, self.max).min(self.room())
    }

    fn observe(&mut self, seen: &Observation) -> Change {
        let before = self.size();
        let settled = self.bytes_per_input - self.bytes_per_input / 8;
        self.bytes_per_input = seen.bytes_per_input.max(settled);
        if seen.too_slow {
            self.wanted = (seen.inputs / 2).max(self.min);
        } else if seen.quick && seen.inputs >= before {
            // A batch that was not full says nothing about a fuller one.
            self.wanted = (before + (before / 4).max(1)).min(self.max);
        }
        match self.size() {
            after if after > before => Change::Grown,
            after if after < before && seen.too_slow => Change::ShrunkForLatency,
            after if after < before => Change::ShrunkForMemory,
            _ => Change::None,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn seen(inputs: usize, bytes_per_input: u64, milliseconds: usize) -> Observation {
        let (too_slow, quick) = (milliseconds > 1000, milliseconds < 750);
        Observation { inputs, bytes_per_input, too_slow, quick }
    }

    proptest! {
        /// Whatever budgets, costs and speeds come: sizes stay in their range and within the budget
        /// as far as it is known; overload brings them down fast, relief brings them back.
        #[test]
        fn sizes_fall_under_pressure_and_recover_after(
            max in 1usize..200,
            steps in prop::collection::vec((1u64..5000, 1u64..50, 1usize..100), 1..80),
        ) {
            let mut sizer = BatchSizer::new(1, max, 100_000);
            for (budget, bytes, cost) in steps {
                sizer.budget = budget;
                let size = sizer.size();
                prop_assert!((1..=max).contains(&size));
                prop_assert!(size == 1 || size as u64 * sizer.bytes_per_input <= budget);
                sizer.observe(&seen(size, bytes, size * cost));
            }
            // A budget of one input: the next batch obeys.
            sizer.observe(&seen(sizer.size(), 50, 10));
            sizer.budget = 50;
            prop_assert_eq!(sizer.size(), 1);
            // Relief: back to the largest within a bounded number of quick batches.
            sizer.budget = u64::MAX;
            for _ in 0..40 {
                sizer.observe(&seen(sizer.size(), 50, 10));
            }
            prop_assert_eq!(sizer.size(), max);
            // Each batch too slow: down to the smallest within the logarithm of the size.
            for _ in 0..8 {
                sizer.observe(&seen(sizer.size(), 50, 5000));
            }
            prop_assert_eq!(sizer.size(), 1);
        }
    }

    #[test]
    fn a_steady_load_settles_below_the_target() {
        let mut sizer = BatchSizer::new(1, 64, u64::MAX);
        let mut sizes = Vec::new();
        for _ in 0..100 {
            let size = sizer.size();
            sizes.push(size);
            sizer.observe(&seen(size, 1, size * 50)); // 20 inputs take the target of a second
        }
        assert!(sizes[20..].iter().all(|&size| (10..=20).contains(&size)), "{sizes:?}");
    }

    #[test]
    fn a_running_processor_obeys_a_budget_and_keeps_its_results() {
        let engine = InferenceEngine::builder().threads(1).build_blocking().unwrap();
        let model = engine.load_model_blocking("builtin").unwrap();
        let inputs: Vec<InferenceInput> =
            (1..60u32).map(|n| InferenceInput::Tokens((n..n + 20).collect())).collect();
        let slow = Duration::from_secs(3600);
        let config = DynamicBatchConfig { target_latency: slow, ..DynamicBatchConfig::default() };
        let processor = DynamicBatchProcessor::new(config).unwrap();
        let free = processor.infer(&engine, &model, &inputs).unwrap();
        let statistics = processor.statistics();
        assert!(statistics.largest_batch > 4 && statistics.grown > 3, "{statistics:?}");
        assert_eq!(statistics.inputs, 59);

        // A block of 32 tokens, 512 bytes a token and layer, and a row of 4,096 logits.
        let one = 16 * model.config().num_hidden_layers as u64 + 16;
        processor.set_memory_budget(MemorySize::KB(2 * one + 10));
        assert_eq!(processor.statistics().batch_size, 2);
        let bounded = processor.infer(&engine, &model, &inputs).unwrap();
        assert!(free.iter().zip(&bounded).all(|(a, b)| a.logits == b.logits));
        assert_eq!(processor.statistics().batch_size, 2);
        assert_eq!(processor.statistics().batches - statistics.batches, 30);

        processor.set_memory_budget(MemorySize::GB(1));
        processor.infer(&engine, &model, &inputs).unwrap();
        assert!(processor.statistics().batch_size > 4, "{:?}", processor.statistics());
        assert!(processor.statistics().inputs_per_second().unwrap() > 0.0);
    }

    #[test]
    fn a_target_that_cannot_be_met_keeps_batches_small() {
        let engine = InferenceEngine::builder().threads(1).build_blocking().unwrap();
        let model = engine.load_model_blocking("builtin").unwrap();
        let inputs = vec![InferenceInput::Tokens(vec![1; 20]); 12];
        let config = DynamicBatchConfig {
            target_latency: Duration::from_nanos(1),
            min_batch_size: 2,
            ..DynamicBatchConfig::default()
        };
        let processor = DynamicBatchProcessor::new(config).unwrap();
        assert_eq!(processor.infer(&engine, &model, &inputs).unwrap().len(), 12);
        assert_eq!((processor.statistics().batches, processor.statistics().largest_batch), (6, 2));
    }

    #[test]
    fn an_empty_range_is_refused() {
        for (min_batch_size, max_batch_size) in [(0, 4), (5, 4)] {
            let config = DynamicBatchConfig {
                min_batch_size,
                max_batch_size,
                ..DynamicBatchConfig::default()
            };
            assert!(DynamicBatchProcessor::new(config).is_err());
        }
    }
}

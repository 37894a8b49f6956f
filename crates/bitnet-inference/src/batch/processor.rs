//! A list of inputs in batches of bounded number and memory.

use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Condvar, Mutex, MutexGuard, PoisonError};

use super::task::{Generate, Logits, Task};
use crate::config::MemorySize;
use crate::engine::InferenceEngine;
use crate::error::{InferenceError, Result};
use crate::input::{InferenceInput, InferenceOutput};
use crate::model::Model;
use crate::options::GenerationOptions;
use crate::stream::Generation;
use crate::wait::block_on_all;

/// Runs a list of inputs, so many at a time and within so much memory.
///
/// A list that does not fit is split; splitting never changes a result. Results come in the order
/// of the inputs.
///
/// ```
/// use bitnet_inference::batch::BatchProcessor;
/// use bitnet_inference::{GenerationOptions, InferenceEngine, MemorySize};
///
/// let engine = InferenceEngine::builder().build_blocking()?;
/// let model = engine.load_model_blocking("builtin")?;
/// let processor = BatchProcessor {
///     max_batch_size: 4,
///     memory_threshold: MemorySize::MB(16),
///     parallel_workers: 2,
/// };
/// let inputs = ["Once upon a", "The old king", "A fox"].map(Into::into);
/// let outputs = processor.infer(&engine, &model, &inputs)?;
/// assert_eq!(outputs.len(), 3);
/// let options = GenerationOptions::greedy().max_tokens(5);
/// let answers = processor.generate(&engine, &model, &inputs, &options)?;
/// assert!(answers.iter().all(|answer| answer.tokens.len() <= 5));
/// # Ok::<(), bitnet_inference::InferenceError>(())
/// ```
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct BatchProcessor {
    /// Inputs in one batch, at most.
    pub max_batch_size: usize,
    /// Bytes that the inputs of all batches in work may hold together: their blocks of the KV cache
    /// and their logits. An input that needs more by itself is refused.
    pub memory_threshold: MemorySize,
    /// Threads that each carry one batch at a time: they read its texts into tokens and wait for its
    /// results, so that while one batch is in the model's steps the next is being made.
    pub parallel_workers: usize,
}

/// The most that was in work at a time.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub(super) struct Peaks {
    pub(super) batches: usize,
    pub(super) largest_batch: usize,
    pub(super) inputs: usize,
    pub(super) bytes: u64,
    /// Batches at the same time.
    pub(super) workers: usize,
}

impl BatchProcessor {
    /// The logits after the last token of each input. Blocking.
    ///
    /// # Errors
    /// A field of the processor outside its range; otherwise the first error of any input, which
    /// ends the rest. [`InferenceError::Memory`] for an input over the threshold by itself.
    pub fn infer(
        &self,
        engine: &InferenceEngine,
        model: &Model,
        inputs: &[InferenceInput],
    ) -> Result<Vec<InferenceOutput>> {
        self.run(engine, model, inputs, &Logits).map(|(outputs, _)| outputs)
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
        self.run(engine, model, prompts, &Generate(options)).map(|(outputs, _)| outputs)
    }

    fn validate(&self, engine: &InferenceEngine) -> Result<()> {
        let most = engine.config().max_waiting;
        let range = |field: &str, value: usize| match (1..=most).contains(&value) {
            true => Ok(()),
            false => Err(InferenceError::input(field, format!("1 to {most}"), value)),
        };
        range("max_batch_size", self.max_batch_size)?;
        range("parallel_workers", self.parallel_workers)?;
        let together = self.max_batch_size.saturating_mul(self.parallel_workers);
        range("max_batch_size * parallel_workers", together)
    }

    /// Runs `task` on every input.
    pub(super) fn run<T: Task>(
        &self,
        engine: &InferenceEngine,
        model: &Model,
        inputs: &[InferenceInput],
        task: &T,
    ) -> Result<(Vec<T::Output>, Peaks)> {
        self.validate(engine)?;
        let job = Job {
            processor: *self,
            engine,
            model,
            inputs,
            task,
            next: AtomicUsize::new(0),
            failed: AtomicBool::new(false),
            in_work: Mutex::default(),
            freed: Condvar::new(),
        };
        let n_workers = self.parallel_workers.min(inputs.len());
        let mut results: Vec<(usize, Result<T::Output>)> = std::thread::scope(|scope| {
            let mut threads = Vec::with_capacity(n_workers);
            for _ in 0..n_workers {
                let spawned = std::thread::Builder::new()
                    .name("bitnet-batch".into())
                    .spawn_scoped(scope, || job.carry_batches());
                match spawned {
                    Ok(thread) => threads.push(thread),
                    // Those that started do the work of all.
                    Err(_) if !threads.is_empty() => break,
                    Err(error) => return Err(InferenceError::thread(&error)),
                }
            }
            let mut all = Vec::with_capacity(inputs.len());
            for thread in threads {
                all.extend(thread.join().map_err(|_| InferenceError::stopped())?);
            }
            Ok(all)
        })?;
        results.sort_by_key(|(index, _)| *index);
        let outputs = results.into_iter().map(|(_, result)| result).collect::<Result<_>>()?;
        let peaks = job.lock().peaks;
        Ok((outputs, peaks))
    }
}

/// One list on its way.
struct Job<'a, T> {
    processor: BatchProcessor,
    engine: &'a InferenceEngine,
    model: &'a Model,
    inputs: &'a [InferenceInput],
    task: &'a T,
    next: AtomicUsize,
    failed: AtomicBool,
    in_work: Mutex<InWork>,
    freed: Condvar,
}

#[derive(Default)]
struct InWork {
    inputs: usize,
    bytes: u64,
    workers: usize,
    peaks: Peaks,
}

/// An input as tokens, with the memory it takes in work.
struct Prepared {
    index: usize,
    tokens: Vec<u32>,
    bytes: u64,
}

impl<T: Task> Job<'_, T> {
    /// What one thread does: makes a batch, runs it, and again until no input is left.
    fn carry_batches(&self) -> Vec<(usize, Result<T::Output>)> {
        let mut results = Vec::new();
        let mut left_over = None;
        loop {
            let (batch, error) = self.next_batch(&mut left_over);
            if let Some((index, error)) = error {
                self.failed.store(true, Ordering::Relaxed);
                results.push((index, Err(error)));
            }
            if batch.is_empty() {
                return results;
            }
            let bytes = batch.iter().map(|input| input.bytes).sum();
            let n_inputs = batch.len();
            self.note_batch(n_inputs);
            let (indices, work): (Vec<_>, Vec<_>) = batch
                .into_iter()
                .map(|input| (input.index, self.task.start(self.engine, self.model, input.tokens)))
                .unzip();
            for (index, result) in indices.into_iter().zip(block_on_all(work)) {
                if result.is_err() {
                    self.failed.store(true, Ordering::Relaxed);
                }
                results.push((index, result));
            }
            self.give_back(n_inputs, bytes);
        }
    }

    /// Claims inputs while they fit. One that does not fit beside the others waits in `left_over`.
    fn next_batch(
        &self,
        left_over: &mut Option<Prepared>,
    ) -> (Vec<Prepared>, Option<(usize, InferenceError)>) {
        let mut batch = Vec::new();
        while batch.len() < self.processor.max_batch_size {
            let input = match left_over.take() {
                Some(input) => input,
                None if self.failed.load(Ordering::Relaxed) => break,
                None => {
                    let index = self.next.fetch_add(1, Ordering::Relaxed);
                    let Some(input) = self.inputs.get(index) else { break };
                    match self.prepare(index, input) {
                        Ok(input) => input,
                        Err(error) => return (batch, Some((index, error))),
                    }
                }
            };
            if !self.take(input.bytes, batch.is_empty()) {
                *left_over = Some(input);
                break;
            }
            batch.push(input);
        }
        (batch, None)
    }

    fn note_batch(&self, n_inputs: usize) {
        let InWork { workers, peaks, .. } = &mut *self.lock();
        *workers += 1;
        peaks.batches += 1;
        peaks.largest_batch = peaks.largest_batch.max(n_inputs);
        peaks.workers = peaks.workers.max(*workers);
    }

    fn prepare(&self, index: usize, input: &InferenceInput) -> Result<Prepared> {
        let tokens = input.tokens(self.model)?;
        let bytes = self.task.bytes(self.model, tokens.len());
        let threshold = self.processor.memory_threshold.bytes();
        if bytes > threshold {
            return Err(InferenceError::Memory {
                what: format!("input {index} of {} tokens", tokens.len()),
                needed_bytes: bytes,
                available_bytes: threshold,
            });
        }
        Ok(Prepared { index, tokens, bytes })
    }

    /// Takes memory for one input; waits for it, if nothing depends on this thread meanwhile.
    fn take(&self, bytes: u64, may_wait: bool) -> bool {
        let threshold = self.processor.memory_threshold.bytes();
        let mut in_work = self.lock();
        while in_work.bytes + bytes > threshold {
            if !may_wait {
                return false;
            }
            in_work = self.freed.wait(in_work).unwrap_or_else(PoisonError::into_inner);
        }
        in_work.bytes += bytes;
        in_work.inputs += 1;
        in_work.peaks.bytes = in_work.peaks.bytes.max(in_work.bytes);
        in_work.peaks.inputs = in_work.peaks.inputs.max(in_work.inputs);
        true
    }

    fn give_back(&self, n_inputs: usize, bytes: u64) {
        let mut in_work = self.lock();
        in_work.inputs -= n_inputs;
        in_work.bytes -= bytes;
        in_work.workers -= 1;
        drop(in_work);
        self.freed.notify_all();
    }

    fn lock(&self) -> MutexGuard<'_, InWork> {
        self.in_work.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn engine() -> (InferenceEngine, Model) {
        let engine = InferenceEngine::builder().threads(1).build_blocking().unwrap();
        let model = engine.load_model_blocking("builtin").unwrap();
        (engine, model)
    }

    fn inputs() -> Vec<InferenceInput> {
        (1..30u32).map(|n| InferenceInput::Tokens((n..n + 1 + n * 3 % 50).collect())).collect()
    }

    fn processor(max_batch_size: usize, kib: u64, parallel_workers: usize) -> BatchProcessor {
        let memory_threshold = MemorySize::KB(kib);
        BatchProcessor { max_batch_size, memory_threshold, parallel_workers }
    }

    /// A block of the built-in model: 32 tokens of 4 layers, 2 heads, 64 features, keys and values,
    /// in 16 bits; and a row of logits.
    const ONE_BLOCK_KIB: u64 = 64 + 16;

    #[test]
    fn all_three_fields_are_honoured_and_splitting_changes_nothing() {
        let (engine, model) = engine();
        let inputs = inputs();
        let alone: Vec<InferenceOutput> =
            inputs.iter().map(|input| engine.infer_blocking(&model, input).unwrap()).collect();
        for (size, kib, workers) in [
            (1, 1 << 20, 1),
            (3, 1 << 20, 1),
            (64, 3 * ONE_BLOCK_KIB, 1),
            (4, 500, 3),
            (2, 1 << 20, 4),
        ] {
            let processor = processor(size, kib, workers);
            let (outputs, peaks) = processor.run(&engine, &model, &inputs, &Logits).unwrap();
            for (output, alone) in outputs.iter().zip(&alone) {
                assert!(output.logits == alone.logits, "{processor:?}");
            }
            assert_eq!(outputs.len(), alone.len());
            assert!(peaks.largest_batch <= size && peaks.bytes <= kib << 10, "{peaks:?}");
            assert!(peaks.workers <= workers && peaks.inputs <= size * workers, "{peaks:?}");
        }
        // Each bound is reached where the others allow it.
        let peaks = |size, kib, workers| {
            processor(size, kib, workers).run(&engine, &model, &inputs, &Logits).unwrap().1
        };
        assert_eq!(peaks(5, 1 << 20, 1).largest_batch, 5);
        assert!(peaks(64, 3 * ONE_BLOCK_KIB, 1).inputs <= 3);
        assert!(peaks(1, 1 << 20, 4).workers > 1);
    }

    #[test]
    fn answers_come_in_order() {
        let (engine, model) = engine();
        let inputs = inputs();
        let options = GenerationOptions::default().seed(4).max_tokens(6);
        let answers = processor(4, 4096, 2).generate(&engine, &model, &inputs, &options).unwrap();
        for (input, answer) in inputs.iter().zip(answers) {
            let alone = engine.generate_blocking(&model, input.clone(), &options).unwrap();
            assert_eq!(answer.tokens, alone.tokens);
        }
    }

    #[test]
    fn nothing_in_nothing_out_and_nonsense_is_refused() {
        let (engine, model) = engine();
        assert!(processor(1, 1, 1).infer(&engine, &model, &[]).unwrap().is_empty());
        for (size, workers) in [(0, 1), (1, 0), (100, 100), (usize::MAX, 2)] {
            let refused = processor(size, 1 << 20, workers).infer(&engine, &model, &inputs());
            assert!(matches!(refused, Err(InferenceError::Input { .. })), "{size} {workers}");
        }
        let small = processor(4, ONE_BLOCK_KIB, 2).infer(&engine, &model, &inputs());
        let Err(InferenceError::Memory { needed_bytes, available_bytes, .. }) = small else {
            panic!("{small:?}")
        };
        assert!(needed_bytes > available_bytes && available_bytes == ONE_BLOCK_KIB << 10);
    }

    #[test]
    fn the_first_error_ends_the_list() {
        let (engine, model) = engine();
        let mut inputs = inputs();
        inputs[2] = InferenceInput::Tokens(vec![70_000]);
        let error = processor(2, 1 << 20, 2).infer(&engine, &model, &inputs).unwrap_err();
        assert!(error.to_string().contains("below 4096"), "{error}");
    }
}

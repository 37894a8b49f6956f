//! A queue of inputs and workers that carry them to the model: for inputs that arrive one by one,
//! from several threads, without end.
//!
//! A worker is a place in the model's steps more than a computing thread: it waits while the engine
//! computes its input together with those of the other workers. So throughput rises with the number
//! of workers until a step is bound by arithmetic. The worker that has been idle longest gets the
//! next input.

use std::collections::VecDeque;
use std::future::Future;
use std::pin::{Pin, pin};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::task::{Context, Poll};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use futures_channel::oneshot;

use crate::engine::InferenceEngine;
use crate::error::{InferenceError, Result};
use crate::input::{InferenceInput, InferenceOutput};
use crate::model::Model;
use crate::options::GenerationOptions;
use crate::stream::Generation;
use crate::wait::block_on;

/// Bounds of a [`ParallelInferenceProcessor`].
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct ParallelConfig {
    /// Inputs in work at a time, 1 to 1024; more than the engine's batch size wait in its queue.
    pub workers: usize,
    /// Inputs that may wait for a worker, at least 1. One more waits in
    /// [`submit`](ParallelInferenceProcessor::submit) and is refused by
    /// [`try_submit`](ParallelInferenceProcessor::try_submit).
    pub queue_capacity: usize,
}

impl Default for ParallelConfig {
    /// 16 workers, as many as sequences in a step of the balanced profile, and 64 places to wait.
    fn default() -> Self {
        Self { workers: 16, queue_capacity: 64 }
    }
}

/// What a [`ParallelInferenceProcessor`] is doing and has done.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ParallelStatistics {
    /// Inputs that wait for a worker.
    pub queued: usize,
    /// Inputs in work.
    pub in_work: usize,
    /// Inputs each worker has finished, with a result or an error.
    pub finished: Vec<u64>,
}

/// How the work ended at [`ParallelInferenceProcessor::shutdown`].
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Shutdown {
    /// Inputs that were waiting or in work and were finished in time.
    pub finished: usize,
    /// Inputs that were cancelled; whoever waits for them gets an error.
    pub cancelled: usize,
}

/// Carries inputs from a bounded queue to one model, several at a time.
///
/// ```
/// use bitnet_inference::batch::{ParallelConfig, ParallelInferenceProcessor};
/// use bitnet_inference::InferenceEngine;
///
/// let engine = InferenceEngine::builder().build_blocking()?;
/// let model = engine.load_model_blocking("builtin")?;
/// let config = ParallelConfig { workers: 4, queue_capacity: 8 };
/// let processor = ParallelInferenceProcessor::new(&engine, &model, config)?;
///
/// // One by one:
/// let pending = processor.submit("Once upon a time".into())?;
/// assert_eq!(pending.wait()?.logits.len(), 4096);
///
/// // A stream of any length, in constant memory; results come in the order of the inputs:
/// let inputs = (0..100u32).map(|n| vec![n, n + 1].into());
/// for output in processor.infer_all(inputs) {
///     assert_eq!(output?.n_tokens, 2);
/// }
/// # Ok::<(), bitnet_inference::InferenceError>(())
/// ```
///
/// Dropping it cancels what is left; [`shutdown`](Self::shutdown) lets it finish first.
#[derive(Debug)]
pub struct ParallelInferenceProcessor {
    shared: Arc<Shared>,
    threads: Vec<JoinHandle<()>>,
    /// One for each worker; dropping it cancels what the worker has in hand.
    alive: Vec<oneshot::Sender<()>>,
    engine: InferenceEngine,
    model: Model,
    config: ParallelConfig,
}

/// An input on its way. Dropping it cancels the input.
#[derive(Debug)]
pub struct Pending<T>(oneshot::Receiver<Result<T>>);

impl<T> Pending<T> {
    /// Waits for the result. Blocking.
    ///
    /// # Errors
    /// What the engine refused or failed at; [`InferenceError::Concurrency`] if it was cancelled.
    pub fn wait(self) -> Result<T> {
        block_on(self)
    }
}

impl<T> Future for Pending<T> {
    type Output = Result<T>;

    fn poll(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<Result<T>> {
        let reply = Pin::new(&mut self.0).poll(context);
        reply.map(|reply| reply.unwrap_or_else(|_| Err(cancelled())))
    }
}

/// Does one input, unless the signal comes first.
type Work = Box<dyn FnOnce(&mut oneshot::Receiver<()>) + Send>;

#[derive(Debug)]
struct Shared {
    state: Mutex<State>,
    /// There is work, or the end has come.
    work: Condvar,
    /// There is room in the queue, or a worker has become idle.
    room: Condvar,
}

#[derive(Default)]
struct State {
    queue: VecDeque<Work>,
    /// Workers without work, longest idle first.
    idle: VecDeque<usize>,
    in_work: usize,
    finished: Vec<u64>,
    closed: bool,
}

impl std::fmt::Debug for State {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("State").field("queued", &self.queue.len()).finish_non_exhaustive()
    }
}

impl ParallelInferenceProcessor {
    /// Starts the workers.
    ///
    /// # Errors
    /// A bound outside its range, or threads that the system does not give.
    pub fn new(engine: &InferenceEngine, model: &Model, config: ParallelConfig) -> Result<Self> {
        let most_workers = engine.config().max_waiting.min(1024);
        for (field, value, most) in [
            ("workers", config.workers, most_workers),
            ("queue_capacity", config.queue_capacity, 1 << 20),
        ] {
            if !(1..=most).contains(&value) {
                return Err(InferenceError::input(field, format!("1 to {most}"), value));
            }
        }
        let state = State { finished: vec![0; config.workers], ..State::default() };
        let shared = Arc::new(Shared {
            state: Mutex::new(state),
            work: Condvar::new(),
            room: Condvar::new(),
        });
        let mut processor = Self {
            shared,
            threads: Vec::with_capacity(config.workers),
            alive: Vec::with_capacity(config.workers),
            engine: engine.clone(),
            model: model.clone(),
            config,
        };
        for worker in 0..config.workers {
            let (alive, mut ended) = oneshot::channel();
            let shared = processor.shared.clone();
            let thread = std::thread::Builder::new()
                .name(format!("bitnet-batch-{worker}"))
                .spawn(move || shared.carry(worker, &mut ended));
            // On an error the drop ends those that have started.
            processor.threads.push(thread.map_err(|e| InferenceError::thread(&e))?);
            processor.alive.push(alive);
        }
        Ok(processor)
    }

    /// Queues an input for its logits; waits while the queue is full.
    ///
    /// # Errors
    /// A processor that is shutting down.
    pub fn submit(&self, input: InferenceInput) -> Result<Pending<InferenceOutput>> {
        self.enqueue(self.logits_of(input), true)
    }

    /// As [`submit`](Self::submit), but never waits.
    ///
    /// # Errors
    /// [`InferenceError::Concurrency`] if the queue is full.
    pub fn try_submit(&self, input: InferenceInput) -> Result<Pending<InferenceOutput>> {
        self.enqueue(self.logits_of(input), false)
    }

    /// Queues a prompt for an answer; waits while the queue is full.
    ///
    /// # Errors
    /// A processor that is shutting down. Options outside their range are the answer's error.
    pub fn submit_generation(
        &self,
        prompt: InferenceInput,
        options: &GenerationOptions,
    ) -> Result<Pending<Generation>> {
        self.enqueue(self.answer_to(prompt, options), true)
    }

    /// As [`submit_generation`](Self::submit_generation), but never waits.
    ///
    /// # Errors
    /// [`InferenceError::Concurrency`] if the queue is full.
    pub fn try_submit_generation(
        &self,
        prompt: InferenceInput,
        options: &GenerationOptions,
    ) -> Result<Pending<Generation>> {
        self.enqueue(self.answer_to(prompt, options), false)
    }

    /// The logits of every input, in order. Inputs are taken as results are: memory stays the same
    /// however many there are.
    pub fn infer_all<'p, I>(&'p self, inputs: I) -> Ordered<'p, I::IntoIter, InferenceOutput>
    where
        I: IntoIterator<Item = InferenceInput>,
    {
        self.ordered(inputs.into_iter(), Box::new(|input| self.submit(input)))
    }

    /// An answer to every prompt, in order, as [`infer_all`](Self::infer_all).
    pub fn generate_all<'p, I>(
        &'p self,
        prompts: I,
        options: &'p GenerationOptions,
    ) -> Ordered<'p, I::IntoIter, Generation>
    where
        I: IntoIterator<Item = InferenceInput>,
    {
        self.ordered(
            prompts.into_iter(),
            Box::new(|prompt| self.submit_generation(prompt, options)),
        )
    }

    /// What it is doing and has done.
    pub fn statistics(&self) -> ParallelStatistics {
        let state = self.shared.lock();
        ParallelStatistics {
            queued: state.queue.len(),
            in_work: state.in_work,
            finished: state.finished.clone(),
        }
    }

    /// Takes nothing new, gives what is queued and in work `grace` to finish, cancels the rest, and
    /// waits for the workers to end. Blocking, for `grace` and the time of one step at most.
    pub fn shutdown(mut self, grace: Duration) -> Shutdown {
        let deadline = Instant::now() + grace;
        let mut state = self.shared.lock();
        state.closed = true;
        let open = state.queue.len() + state.in_work;
        self.shared.work.notify_all();
        while state.queue.len() + state.in_work > 0 {
            let Some(left) = deadline.checked_duration_since(Instant::now()) else { break };
            let waited = self.shared.room.wait_timeout(state, left);
            state = waited.unwrap_or_else(PoisonError::into_inner).0;
        }
        let cancelled = state.queue.len() + state.in_work;
        drop(state);
        self.stop();
        Shutdown { finished: open - cancelled, cancelled }
    }

    /// Cancels everything and waits for the workers.
    fn stop(&mut self) {
        let queue = {
            let mut state = self.shared.lock();
            state.closed = true;
            std::mem::take(&mut state.queue)
        };
        drop(queue); // Outside the lock: whoever waits for these is told now.
        self.alive.clear();
        self.shared.work.notify_all();
        self.shared.room.notify_all();
        for thread in self.threads.drain(..) {
            let _ = thread.join();
        }
    }

    fn logits_of(
        &self,
        input: InferenceInput,
    ) -> impl Future<Output = Result<InferenceOutput>> + Send + use<> {
        let (engine, model) = (self.engine.clone(), self.model.clone());
        async move { engine.infer(&model, &input).await }
    }

    fn answer_to(
        &self,
        prompt: InferenceInput,
        options: &GenerationOptions,
    ) -> impl Future<Output = Result<Generation>> + Send + use<> {
        let (engine, model, options) = (self.engine.clone(), self.model.clone(), options.clone());
        async move { engine.generate(&model, prompt, &options).await }
    }

    fn enqueue<T: Send + 'static>(
        &self,
        work: impl Future<Output = Result<T>> + Send + 'static,
        wait: bool,
    ) -> Result<Pending<T>> {
        let (mut reply, pending) = oneshot::channel();
        let work: Work = Box::new(move |ended| {
            let mut work = pin!(work);
            let outcome = block_on(std::future::poll_fn(|context| {
                if reply.poll_canceled(context).is_ready() {
                    return Poll::Ready(None); // Nobody waits for it any more.
                }
                if Pin::new(&mut *ended).poll(context).is_ready() {
                    return Poll::Ready(Some(Err(cancelled())));
                }
                work.as_mut().poll(context).map(Some)
            }));
            if let Some(outcome) = outcome {
                let _ = reply.send(outcome);
            }
        });
        let mut state = self.shared.lock();
        loop {
            if state.closed {
                return Err(cancelled());
            }
            if state.queue.len() < self.config.queue_capacity {
                break;
            }
            if !wait {
                let reason = format!("{} inputs are waiting already", state.queue.len());
                return Err(InferenceError::Concurrency { reason });
            }
            state = self.shared.room.wait(state).unwrap_or_else(PoisonError::into_inner);
        }
        state.queue.push_back(work);
        drop(state);
        self.shared.work.notify_all();
        Ok(Pending(pending))
    }

    fn ordered<'p, I, T>(&'p self, inputs: I, start: Start<'p, T>) -> Ordered<'p, I, T>
    where
        I: Iterator<Item = InferenceInput>,
    {
        let window = self.config.workers + self.config.queue_capacity;
        Ordered { inputs: Some(inputs), start, window, pending: VecDeque::new() }
    }
}

impl Drop for ParallelInferenceProcessor {
    fn drop(&mut self) {
        self.stop();
    }
}

impl Shared {
    /// What a worker does until the end.
    fn carry(&self, worker: usize, ended: &mut oneshot::Receiver<()>) {
        let mut state = self.lock();
        loop {
            state.idle.push_back(worker);
            let work = loop {
                if state.idle.front() == Some(&worker)
                    && let Some(work) = state.queue.pop_front()
                {
                    state.idle.pop_front();
                    break work;
                }
                if state.closed && state.queue.is_empty() {
                    return;
                }
                state = self.work.wait(state).unwrap_or_else(PoisonError::into_inner);
            };
            state.in_work += 1;
            drop(state);
            self.room.notify_all();
            self.work.notify_all(); // Another one is the longest idle now.
            // A panic in a sampler or tokenizer is this input's alone; its waiter sees it cancelled.
            let _ = std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| work(ended)));
            state = self.lock();
            state.in_work -= 1;
            state.finished[worker] += 1;
            self.room.notify_all();
        }
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

type Start<'p, T> = Box<dyn Fn(InferenceInput) -> Result<Pending<T>> + 'p>;

/// Results in the order of their inputs; see [`ParallelInferenceProcessor::infer_all`]. Dropping it
/// cancels what is in work.
pub struct Ordered<'p, I, T> {
    inputs: Option<I>,
    start: Start<'p, T>,
    window: usize,
    pending: VecDeque<Result<Pending<T>>>,
}

impl<I: Iterator<Item = InferenceInput>, T> Iterator for Ordered<'_, I, T> {
    type Item = Result<T>;

    fn next(&mut self) -> Option<Result<T>> {
        while self.pending.len() < self.window {
            let Some(input) = self.inputs.as_mut().and_then(Iterator::next) else {
                self.inputs = None;
                break;
            };
            self.pending.push_back((self.start)(input));
        }
        Some(self.pending.pop_front()?.and_then(Pending::wait))
    }
}

impl<I, T> std::fmt::Debug for Ordered<'_, I, T> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Ordered").field("in_work", &self.pending.len()).finish_non_exhaustive()
    }
}

fn cancelled() -> InferenceError {
    InferenceError::Concurrency { reason: "the work was cancelled".into() }
}

#[cfg(test)]
mod tests;

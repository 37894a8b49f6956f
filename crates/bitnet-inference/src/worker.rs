//! The thread that owns a loaded model: take requests, plan a step, run it, hand out its results.
//!
//! Everything a step touches belongs to this thread alone, so the loop takes no lock. Others send
//! requests over a channel and receive events over one channel per request; dropping the receiver
//! cancels the request before the next step.

use std::collections::VecDeque;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, OnceLock, mpsc};
use std::thread::JoinHandle;
use std::time::Instant;

use bitnet_core::backend::{Batch, DeviceInfo, KvSpec, MemoryUsage, SequenceSlice};
use bitnet_core::noise::Noise;
use futures_channel::{mpsc as events, oneshot};

use crate::backend::InferenceBackend;
use crate::draft::{Draft, PATIENCE};
use crate::embed::{EmbeddingJob, Pooling};
use crate::error::{InferenceError, Result};
use crate::kv_blocks::BlockPool;
use crate::request::{
    Continuation, Event, EventSender, FinishReason, GeneratedToken, Goal, Request,
};
use crate::sampler::SampleError;
use crate::scheduler::{PlannedSlice, Scheduler, StepLimits};
use crate::score::with_alternatives;
use crate::sequence::Sequence;

/// Bounds of a worker, fixed when its model is loaded.
#[derive(Debug, Clone, Copy)]
pub(crate) struct WorkerLimits {
    pub(crate) step: StepLimits,
    /// Requests that may wait; one more is refused.
    pub(crate) max_waiting: usize,
    /// Positions a sequence may reach: the context length, or what the cache holds if that is less.
    pub(crate) max_positions: usize,
    /// The context length.
    pub(crate) context: usize,
    pub(crate) vocab_size: usize,
}

/// Brings the model onto another device, for when the first one is lost.
pub(crate) type Spare = Box<dyn FnOnce() -> Result<Box<dyn InferenceBackend>> + Send>;

/// What a model runs on, and what happened to it there.
#[derive(Debug)]
pub(crate) struct Place {
    pub(crate) device: DeviceInfo,
    pub(crate) memory: MemoryUsage,
    /// Why the model is no longer where it was loaded.
    pub(crate) notice: Option<String>,
}

enum Command {
    Submit(Request, EventSender, Instant),
    HiddenStates(Vec<u32>, oneshot::Sender<Result<Vec<Vec<f32>>>>),
    Embed(EmbeddingJob),
    Stop,
}

/// Counters of a worker, readable from any thread.
#[derive(Debug, Default)]
pub(crate) struct WorkerStats {
    pub(crate) running: AtomicU64,
    pub(crate) waiting: AtomicU64,
    pub(crate) preemptions: AtomicU64,
    pub(crate) steps: AtomicU64,
    pub(crate) tokens_computed: AtomicU64,
    pub(crate) blocks_in_use: AtomicU64,
    failed: AtomicBool,
}

/// A handle to a worker. Dropping it stops the thread after the current step.
pub(crate) struct Worker {
    commands: mpsc::Sender<Command>,
    thread: Mutex<Option<JoinHandle<()>>>,
    stats: Arc<WorkerStats>,
    limits: WorkerLimits,
    pub(crate) kv_spec: KvSpec,
    loaded: Place,
    /// Set when another device took over.
    moved: Arc<OnceLock<Place>>,
}

impl Worker {
    /// Starts the thread that owns `backend`. If its device is lost, `spare` takes over.
    pub(crate) fn spawn(
        backend: Box<dyn InferenceBackend>,
        draft: Option<Draft>,
        spare: Option<Spare>,
        mut limits: WorkerLimits,
    ) -> Result<Self> {
        let kv_spec = backend.kv_spec();
        limits.max_positions = limits.max_positions.min(kv_spec.n_blocks * kv_spec.block_tokens);
        let loaded =
            Place { device: backend.device(), memory: backend.get_memory_usage(), notice: None };
        let moved = Arc::new(OnceLock::new());
        let stats = Arc::new(WorkerStats::default());
        let (commands, inbox) = mpsc::channel();
        let pool = BlockPool::new(kv_spec.n_blocks, kv_spec.block_tokens);
        let mut state = WorkerThread {
            backend,
            draft,
            spare,
            moved: moved.clone(),
            scheduler: Scheduler::new(pool, limits.step),
            limits,
            stats: stats.clone(),
            batch: Batch::default(),
            plan: Vec::new(),
            logits: Vec::new(),
            embeddings: VecDeque::new(),
            next_ticket: 0,
            n_waiting_reported: 0,
        };
        let thread = std::thread::Builder::new()
            .name("bitnet-worker".into())
            .spawn(move || state.run(&inbox))
            .map_err(|e| InferenceError::thread(&e))?;
        let thread = Mutex::new(Some(thread));
        Ok(Self { commands, thread, stats, limits, kv_spec, loaded, moved })
    }

    /// Where the model is now.
    pub(crate) fn place(&self) -> &Place {
        self.moved.get().unwrap_or(&self.loaded)
    }

    /// Whether the thread has ended after an error it could not mend.
    pub(crate) fn has_failed(&self) -> bool {
        self.stats.failed.load(Ordering::Acquire)
    }

    pub(crate) fn stats(&self) -> &WorkerStats {
        &self.stats
    }

    pub(crate) fn limits(&self) -> &WorkerLimits {
        &self.limits
    }

    /// Hands a request over; its events arrive at the receiver.
    pub(crate) fn submit(&self, request: Request) -> Result<events::UnboundedReceiver<Event>> {
        self.check(&request)?;
        let waiting = self.stats.waiting.fetch_add(1, Ordering::Relaxed);
        if waiting >= self.limits.max_waiting as u64 {
            self.stats.waiting.fetch_sub(1, Ordering::Relaxed);
            let reason = format!("{waiting} requests are waiting already, which is the limit");
            return Err(InferenceError::Concurrency { reason });
        }
        let (sender, receiver) = events::unbounded();
        let command = Command::Submit(request, sender, Instant::now());
        self.commands.send(command).map_err(|_| InferenceError::stopped())?;
        Ok(receiver)
    }

    /// The residual stream of each layer for one sequence of tokens.
    pub(crate) fn hidden_states(&self, tokens: Vec<u32>) -> Result<Vec<Vec<f32>>> {
        let limit = self.limits.step.max_tokens;
        if tokens.is_empty() || tokens.len() > limit {
            let expected = format!("1 to {limit} tokens");
            return Err(InferenceError::input("tokens", expected, tokens.len()));
        }
        self.check_ids(&tokens)?;
        let (sender, receiver) = oneshot::channel();
        let command = Command::HiddenStates(tokens, sender);
        self.commands.send(command).map_err(|_| InferenceError::stopped())?;
        crate::wait::block_on(receiver).map_err(|_| InferenceError::stopped())?
    }

    /// Hands a text over to be embedded; `width` is the model's hidden size.
    pub(crate) fn embed(
        &self,
        tokens: Vec<u32>,
        pooling: Pooling,
        width: usize,
    ) -> Result<oneshot::Receiver<Result<Vec<f32>>>> {
        self.check_tokens(&tokens, 0)?;
        let (sender, receiver) = oneshot::channel();
        let job = EmbeddingJob::new(tokens, pooling, width, sender);
        self.commands.send(Command::Embed(job)).map_err(|_| InferenceError::stopped())?;
        Ok(receiver)
    }

    fn check(&self, request: &Request) -> Result<()> {
        let generates = usize::from(matches!(request.goal, Goal::Generate(_)));
        self.check_tokens(&request.tokens, generates)
    }

    /// Refuses tokens that can never be computed, with room for `more` behind them.
    fn check_tokens(&self, tokens: &[u32], more: usize) -> Result<()> {
        if self.has_failed() {
            return Err(InferenceError::stopped());
        }
        let n_tokens = tokens.len();
        let longest = self.limits.max_positions;
        if n_tokens == 0 {
            return Err(InferenceError::input("prompt", "at least one token", "an empty prompt"));
        }
        if n_tokens + more > longest {
            let why = match longest < self.limits.context {
                true => "what the KV cache has memory for",
                false => "the context",
            };
            let expected = format!("at most {} tokens ({why}: {longest})", longest - more);
            return Err(InferenceError::input("prompt", expected, format!("{n_tokens} tokens")));
        }
        self.check_ids(tokens)
    }

    fn check_ids(&self, tokens: &[u32]) -> Result<()> {
        let vocab_size = self.limits.vocab_size;
        match tokens.iter().find(|&&id| id as usize >= vocab_size) {
            Some(id) => Err(InferenceError::input("token id", format!("below {vocab_size}"), id)),
            None => Ok(()),
        }
    }
}

impl Drop for Worker {
    fn drop(&mut self) {
        let _ = self.commands.send(Command::Stop);
        let thread = self.thread.lock().unwrap_or_else(|poisoned| poisoned.into_inner()).take();
        if let Some(thread) = thread
            && thread.thread().id() != std::thread::current().id()
        {
            let _ = thread.join();
        }
    }
}

/// What the thread owns.
struct WorkerThread {
    backend: Box<dyn InferenceBackend>,
    draft: Option<Draft>,
    spare: Option<Spare>,
    moved: Arc<OnceLock<Place>>,
    scheduler: Scheduler,
    limits: WorkerLimits,
    stats: Arc<WorkerStats>,
    batch: Batch,
    plan: Vec<PlannedSlice>,
    logits: Vec<f32>,
    /// Texts to embed, one after the other, a chunk beside each step.
    embeddings: VecDeque<EmbeddingJob>,
    next_ticket: u64,
    /// Requests taken from the channel or queued, as last reported in the counters.
    n_waiting_reported: u64,
}

impl WorkerThread {
    fn run(&mut self, inbox: &mpsc::Receiver<Command>) {
        self.serve(inbox);
        // Who hung up since the last step is counted out too.
        self.scheduler.drop_abandoned();
        self.publish_stats();
    }

    /// Steps until it is stopped or fails.
    fn serve(&mut self, inbox: &mpsc::Receiver<Command>) {
        loop {
            if self.scheduler.is_idle() && self.embeddings.is_empty() {
                match inbox.recv() {
                    Ok(Command::Stop) | Err(_) => return,
                    Ok(command) => self.obey(command),
                }
            }
            loop {
                match inbox.try_recv() {
                    Ok(Command::Stop) | Err(mpsc::TryRecvError::Disconnected) => return,
                    Ok(command) => self.obey(command),
                    Err(mpsc::TryRecvError::Empty) => break,
                }
            }
            // A panic below is a bug in a kernel or the engine; whoever waits must still hear of it.
            let outcome = catch_unwind(AssertUnwindSafe(|| self.step()));
            let error = match outcome {
                Ok(Ok(())) => continue,
                Ok(Err(error)) => match self.move_away(error) {
                    Ok(()) => continue,
                    Err(error) => error,
                },
                Err(_) => {
                    InferenceError::Concurrency { reason: "the engine failed inside a step".into() }
                }
            };
            self.stats.failed.store(true, Ordering::Release);
            for sequence in self.scheduler.drain() {
                sequence.send(Event::Failed(error.clone()));
            }
            for job in self.embeddings.drain(..) {
                job.finish(Err(error.clone()));
            }
            return;
        }
    }

    fn obey(&mut self, command: Command) {
        match command {
            Command::Submit(request, events, arrived) => {
                let ticket = self.next_ticket;
                self.next_ticket += 1;
                let sequence = Sequence::new(request, ticket, arrived, events);
                self.scheduler.submit(sequence);
                self.n_waiting_reported += 1;
            }
            Command::HiddenStates(tokens, reply) => {
                let _ = reply.send(self.hidden_states(tokens));
            }
            Command::Embed(job) => self.embeddings.push_back(job),
            Command::Stop => {}
        }
    }

    /// One step: schedule → forward → hand out → advance.
    fn step(&mut self) -> bitnet_core::Result<()> {
        self.scheduler.drop_abandoned();
        self.scheduler.plan_step(&mut self.batch, &mut self.plan, self.draft.as_mut())?;
        // Before the step as well: that of a long prompt may take seconds.
        self.publish_stats();
        if !self.plan.is_empty() {
            self.batch.n_best = self.best_wanted();
            self.set_noise();
            self.backend.execute_batch(&self.batch, &mut self.logits)?;
            self.hand_out();
            self.stats.steps.fetch_add(1, Ordering::Relaxed);
            self.stats.tokens_computed.fetch_add(self.batch.tokens.len() as u64, Ordering::Relaxed);
        } else if !self.scheduler.is_idle() && self.embeddings.is_empty() {
            // Every admitted sequence fits alone, so this cannot happen; spinning would hide it.
            return Err(bitnet_core::Error::invalid("scheduler", "no sequence can run"));
        }
        self.embed_chunk()?;
        self.publish_stats();
        Ok(())
    }

    /// After a device was lost: goes on with the spare one, if there is one. Sequences start again
    /// there from their tokens. Otherwise returns why the worker has to stop.
    fn move_away(&mut self, error: bitnet_core::Error) -> Result<()> {
        let lost = matches!(error, bitnet_core::Error::Device { .. });
        let error = InferenceError::device("step", error);
        let Some(spare) = self.spare.take_if(|_| lost) else { return Err(error) };
        self.backend = spare().map_err(|second| InferenceError::Gpu {
            device: self.backend.device().name,
            reason: format!("{error}; and nothing could take over: {second}"),
        })?;
        let without = if self.draft.take().is_some() { ", without the draft model" } else { "" };
        let device = self.backend.device();
        let notice = format!("{error}: {} took over{without}", device.name);
        let memory = self.backend.get_memory_usage();
        // There is one spare, so this is the only time.
        let _ = self.moved.set(Place { device, memory, notice: Some(notice) });
        for job in &mut self.embeddings {
            job.start_over(&mut self.scheduler.pool);
        }
        self.scheduler.start_over();
        Ok(())
    }

    /// Computes the next tokens of the embedding whose turn it is, if there is memory for it.
    fn embed_chunk(&mut self) -> bitnet_core::Result<()> {
        let pool = &mut self.scheduler.pool;
        let Some(mut job) = self.embeddings.pop_front() else { return Ok(()) };
        if job.is_abandoned() {
            pool.release(job.blocks);
            return Ok(());
        }
        let block_tokens = pool.block_tokens();
        let needed = job.tokens.len().div_ceil(block_tokens);
        if job.blocks.is_empty() {
            if needed > pool.n_available() {
                self.embeddings.push_front(job); // Sequences will leave.
                return Ok(());
            }
            job.blocks.extend((0..needed).map_while(|_| pool.allocate()));
        }
        let limit = match self.scheduler.running.is_empty() {
            true => self.limits.step.max_tokens,
            false => self.limits.step.max_prefill_beside_decode,
        };
        let range = job.n_computed..job.tokens.len().min(job.n_computed + limit);
        let slice = SequenceSlice {
            rows: 0..range.len(),
            first_position: range.start,
            blocks: job.blocks[..range.end.div_ceil(block_tokens)].to_vec(),
        };
        let batch = Batch {
            tokens: job.tokens[range.clone()].to_vec(),
            sequences: vec![slice],
            ..Batch::default()
        };
        let mut states = Vec::new();
        if let Err(error) = self.backend.final_states(&batch, &mut states) {
            self.embeddings.push_front(job); // Another device may take over.
            return Err(error);
        }
        job.take(range.len(), &states);
        if job.n_computed == job.tokens.len() {
            self.scheduler.pool.release(std::mem::take(&mut job.blocks));
            job.finish(Ok(()));
        } else {
            self.embeddings.push_front(job);
        }
        Ok(())
    }

    /// How many of the largest logits decide every row of the step, if that is all that matters.
    fn best_wanted(&self) -> Option<usize> {
        let with_logits = self.plan.iter().filter(|slice| !slice.logit_rows.is_empty());
        let wanted = with_logits.map(|slice| match &self.scheduler.running[slice.sequence].goal {
            // Among the best there may be none that is allowed.
            Goal::Generate(continuation) if continuation.constraint.is_some() => None,
            Goal::Generate(continuation) => continuation.sampler.n_best(),
            Goal::Logits { .. } | Goal::Score { .. } => None,
        });
        wanted.reduce(|a, b| Some(a?.max(b?))).flatten()
    }

    /// The noise of the rows' draws, if it helps a device to leave logits out.
    fn set_noise(&mut self) {
        let noise = &mut self.batch.noise;
        noise.clear();
        if self.batch.n_best.is_none() {
            return;
        }
        for slice in &self.plan {
            if let Goal::Generate(continuation) = &self.scheduler.running[slice.sequence].goal {
                let rows = 0..slice.logit_rows.len();
                noise.extend(rows.map(|ahead| continuation.sampler.noise(ahead)));
            }
        }
        if noise.iter().all(Noise::is_none) {
            noise.clear();
        }
    }

    /// Gives each sequence of the step its results; those that have all they asked for leave.
    fn hand_out(&mut self) {
        let vocab_size = self.limits.vocab_size;
        let mut finished = Vec::new();
        for slice in &self.plan {
            let sequence = &mut self.scheduler.running[slice.sequence];
            let first_position = sequence.n_computed;
            let guess = std::mem::take(&mut sequence.guess);
            sequence.advance(slice.rows.len() - guess.len(), &mut self.scheduler.pool);
            let rows = &mut self.logits
                [slice.logit_rows.start * vocab_size..slice.logit_rows.end * vocab_size];
            let known = match sequence.wants_every_row() {
                true => sequence.n_handed_out.saturating_sub(first_position),
                false => 0,
            };
            sequence.n_handed_out = sequence.n_handed_out.max(sequence.n_computed);
            let end = match &sequence.goal {
                Goal::Generate(_) if rows.is_empty() => None,
                Goal::Generate(_) => {
                    let (n_right, end) =
                        next_tokens(sequence, rows, &guess, vocab_size, self.limits.max_positions);
                    sequence.advance(n_right, &mut self.scheduler.pool);
                    // What the draft model computed after a wrong guess is of no use.
                    sequence.n_drafted = sequence.n_drafted.min(sequence.n_computed);
                    if !guess.is_empty() {
                        let patience = self.draft.as_ref().map_or(0, |_| PATIENCE);
                        sequence.guess_length.learn(n_right, guess.len(), patience);
                    }
                    end
                }
                Goal::Logits { .. } => {
                    for row in rows.chunks_exact(vocab_size).skip(known) {
                        sequence.send(Event::Logits(row.to_vec()));
                    }
                    (sequence.n_pending() == 0).then_some(Ok(FinishReason::Stop))
                }
                Goal::Score { top } => {
                    let next = &sequence.tokens[(first_position + 1).min(sequence.tokens.len())..];
                    for (row, &token) in rows.chunks_exact(vocab_size).zip(next).skip(known) {
                        sequence.send(Event::Score(with_alternatives(row, token, *top)));
                    }
                    (sequence.n_pending() == 0).then_some(Ok(FinishReason::Stop))
                }
            };
            if let Some(outcome) = end {
                finished.push((slice.sequence, outcome));
            }
        }
        finished.sort_by_key(|(sequence, _)| std::cmp::Reverse(*sequence));
        for (sequence, outcome) in finished {
            self.scheduler.finish(sequence, outcome);
        }
    }

    fn hidden_states(&mut self, tokens: Vec<u32>) -> Result<Vec<Vec<f32>>> {
        let block_tokens = self.scheduler.pool.block_tokens();
        let n_blocks = tokens.len().div_ceil(block_tokens);
        let mut blocks = Vec::with_capacity(n_blocks);
        while blocks.len() < n_blocks {
            let Some(id) = self.scheduler.pool.allocate() else {
                self.scheduler.pool.release(blocks);
                return Err(InferenceError::Concurrency {
                    reason: "the KV cache is in use".into(),
                });
            };
            blocks.push(id);
        }
        let slice =
            SequenceSlice { rows: 0..tokens.len(), first_position: 0, blocks: blocks.clone() };
        let batch = Batch { tokens, sequences: vec![slice], ..Batch::default() };
        let states = self.backend.hidden_states(&batch);
        self.scheduler.pool.release(blocks);
        states.map_err(|e| InferenceError::device("hidden states", e))
    }

    fn publish_stats(&mut self) {
        let pool = &self.scheduler.pool;
        let stats = &self.stats;
        // Submitters count a request in; here it is counted out once it has left the queue.
        let n_waiting = self.scheduler.n_waiting() as u64;
        stats.waiting.fetch_add(n_waiting.wrapping_sub(self.n_waiting_reported), Ordering::Relaxed);
        self.n_waiting_reported = n_waiting;
        stats.running.store(self.scheduler.running.len() as u64, Ordering::Relaxed);
        stats.preemptions.store(self.scheduler.n_preemptions(), Ordering::Relaxed);
        stats.blocks_in_use.store((pool.n_blocks() - pool.n_available()) as u64, Ordering::Relaxed);
    }
}

/// Samples the next token of a sequence, and the ones after it as far as `guess` was right. Returns
/// how many guessed tokens were right, and the end if this was it.
fn next_tokens(
    sequence: &mut Sequence,
    rows: &mut [f32],
    guess: &[u32],
    vocab_size: usize,
    max_positions: usize,
) -> (usize, Option<Result<FinishReason>>) {
    for (i, logits) in rows.chunks_exact_mut(vocab_size).enumerate() {
        let end = next_token(sequence, logits, max_positions).transpose();
        let right = end.is_none() && guess.get(i) == sequence.tokens.last();
        if !right {
            return (i, end);
        }
    }
    (guess.len(), None)
}

/// Samples the next token of a sequence; a reason to end, if this was its last one.
///
/// # Errors
/// No token belongs to what the answer is held to; the model computes no numbers.
fn next_token(
    sequence: &mut Sequence,
    logits: &mut [f32],
    max_positions: usize,
) -> Result<Option<FinishReason>> {
    let Goal::Generate(continuation) = &mut sequence.goal else { return Ok(None) };
    let Continuation { sampler, constraint, max_tokens, ending_tokens } = &mut **continuation;
    let max_tokens = *max_tokens;
    if max_tokens == 0 {
        return Ok(Some(FinishReason::Length));
    }
    let sampled = match constraint {
        None => match sampler.sample(logits) {
            Ok(sampled) => sampled,
            // Every token is forbidden: there is nothing to say.
            Err(SampleError::NoLegalToken { .. }) => return Ok(Some(FinishReason::Stop)),
            Err(error) => return Err(InferenceError::model_lacks("output", error.to_string())),
        },
        Some(constraint) => {
            let allowed = constraint.allowed()?;
            let sampled = sampler.sample_among(logits, |id| allowed.contains(id));
            sampled.map_err(|e| {
                InferenceError::input("grammar", "an answer that can be completed", e)
            })?
        }
    };
    sampler.accept(sampled.token);
    let mut ended = ending_tokens.contains(&sampled.token);
    if !ended && let Some(constraint) = constraint {
        ended = constraint.accept(sampled.token)?;
    }
    sequence.tokens.push(sampled.token);
    sequence.note_token();
    let token =
        GeneratedToken { id: sampled.token, logprob: sampled.logprob, top_logprobs: sampled.top };
    sequence.send(Event::Token(token, sequence.usage()));
    if ended {
        Ok(Some(FinishReason::Stop))
    } else if sequence.n_generated() >= max_tokens || sequence.tokens.len() >= max_positions {
        Ok(Some(FinishReason::Length))
    } else {
        Ok(None)
    }
}

#[cfg(test)]
mod tests;

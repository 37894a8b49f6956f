//! The engine's promises over random schedules, with a model whose logits are a hash of what its
//! paged cache holds: a wrong block, a stale block or a lost token changes them.

use super::*;
use crate::options::GenerationOptions;
use crate::request::Continuation;
use crate::sampler::Sampler;
use crate::wait::block_on;
use bitnet_core::backend::KvType;
use proptest::prelude::*;
use std::pin::Pin;

mod schedules;

const VOCAB: usize = 40;
const BLOCK_TOKENS: usize = 4;

/// Stores each token in its cache slot; logits are a hash of all slots up to the row's position.
struct HashModel {
    slots: Vec<Option<u32>>,
    n_blocks: usize,
    largest_step: Arc<AtomicU64>,
    panic_on: Option<u32>,
    /// Steps until its device is lost.
    steps_left: Option<u64>,
    /// How many tokens of its past a row's logits depend on.
    memory: usize,
    /// Slots that were never written are no error: a draft model's, where a prefix was reused.
    lenient: bool,
    /// Leaves out all logits but the largest ones that a step asks for, as the CPU's head may.
    frugal: bool,
}

impl HashModel {
    /// Keeps the `n` largest after noise.
    fn leave_out(logits: &mut [f32], n: usize, noise: Noise) {
        let noisy = |id: usize| logits[id] + noise.at(id as u32);
        let mut order: Vec<usize> = (0..logits.len()).collect();
        order.sort_by(|&a, &b| noisy(b).total_cmp(&noisy(a)));
        order.into_iter().skip(n).for_each(|id| logits[id] = f32::NEG_INFINITY);
    }

    fn new(n_blocks: usize) -> Self {
        let slots = vec![None; n_blocks * BLOCK_TOKENS];
        Self {
            slots,
            n_blocks,
            largest_step: Arc::default(),
            panic_on: None,
            steps_left: None,
            memory: usize::MAX,
            lenient: false,
            frugal: false,
        }
    }
}

impl InferenceBackend for HashModel {
    fn execute_batch(&mut self, batch: &Batch, logits: &mut Vec<f32>) -> bitnet_core::Result<()> {
        self.largest_step.fetch_max(batch.tokens.len() as u64, Ordering::Relaxed);
        if let Some(left) = &mut self.steps_left {
            *left = left.checked_sub(1).ok_or_else(|| bitnet_core::Error::Device {
                device: "mock".into(),
                reason: "planted loss".into(),
            })?;
        }
        logits.clear();
        let mut rows = Vec::new();
        for slice in &batch.sequences {
            let slot = |p: usize| {
                slice.blocks[p / BLOCK_TOKENS] as usize * BLOCK_TOKENS + p % BLOCK_TOKENS
            };
            for (i, row) in slice.rows.clone().enumerate() {
                assert_ne!(Some(batch.tokens[row]), self.panic_on, "planted panic");
                self.slots[slot(slice.first_position + i)] = Some(batch.tokens[row]);
            }
            for (i, row) in slice.rows.clone().enumerate() {
                let past = (0..=slice.first_position + i).map(|p| self.slots[slot(p)]);
                let past: Vec<u32> = past
                    .map(|t| t.or(self.lenient.then_some(0)).expect("the slot was written"))
                    .collect();
                rows.push((row, past));
            }
        }
        for (i, row) in batch.logit_rows.iter().enumerate() {
            let past = &rows.iter().find(|(r, _)| r == row).expect("a row of the batch").1;
            let recent = &past[past.len().saturating_sub(self.memory)..];
            let seed =
                recent.iter().fold(7u64, |h, &t| (h ^ u64::from(t)).wrapping_mul(0x100_0000_01b3));
            let logit =
                |i: u64| ((seed ^ i).wrapping_mul(0x9e37_79b9_7f4a_7c15) >> 40) as f32 / 2e6;
            let start = logits.len();
            logits.extend((0..VOCAB as u64).map(logit));
            if let (Some(n), true) = (batch.n_best, self.frugal) {
                let noise = batch.noise.get(i).copied().unwrap_or_default();
                Self::leave_out(&mut logits[start..], n, noise);
            }
        }
        Ok(())
    }

    fn hidden_states(&mut self, _: &Batch) -> bitnet_core::Result<Vec<Vec<f32>>> {
        Ok(Vec::new())
    }

    fn kv_spec(&self) -> KvSpec {
        KvSpec {
            n_layers: 1,
            n_kv_heads: 1,
            head_dim: 2,
            block_tokens: BLOCK_TOKENS,
            n_blocks: self.n_blocks,
            dtype: KvType::F32,
        }
    }

    fn device(&self) -> DeviceInfo {
        DeviceInfo {
            name: if self.steps_left.is_some() { "fragile" } else { "mock" }.into(),
            hardware: String::new(),
            kernel: String::new(),
            threads: 1,
        }
    }

    fn get_memory_usage(&self) -> MemoryUsage {
        MemoryUsage::default()
    }
}

fn worker(model: HashModel, max_sequences: usize, max_tokens: usize) -> Worker {
    worker_with(model, max_sequences, max_tokens, false)
}

fn worker_with(
    model: HashModel,
    max_sequences: usize,
    max_tokens: usize,
    speculate: bool,
) -> Worker {
    worker_drafted(model, None, max_sequences, max_tokens, speculate)
}

fn worker_drafted(
    model: HashModel,
    draft: Option<HashModel>,
    max_sequences: usize,
    max_tokens: usize,
    speculate: bool,
) -> Worker {
    worker_spared(model, draft, None, max_sequences, max_tokens, speculate)
}

fn worker_spared(
    model: HashModel,
    draft: Option<HashModel>,
    spare: Option<Spare>,
    max_sequences: usize,
    max_tokens: usize,
    speculate: bool,
) -> Worker {
    let draft = draft.map(|model| Draft::new(Box::new(model), VOCAB, 7));
    let step = StepLimits {
        max_sequences,
        max_tokens,
        max_prefill_beside_decode: max_tokens.div_ceil(2),
        max_logit_rows: 3,
        speculate,
        max_positions: 200,
    };
    let limits =
        WorkerLimits { step, max_waiting: 64, max_positions: 200, context: 200, vocab_size: VOCAB };
    Worker::spawn(Box::new(model), draft, spare, limits).unwrap()
}

fn request(prompt: &[u32], n_new: usize, seed: u64, priority: i32) -> Request {
    let options = GenerationOptions::new().seed(seed).temperature((seed % 2) as f32);
    let options = match seed % 4 {
        3 => options.top_k(0).top_p(1.0).min_p(0.0),
        _ => options,
    };
    let sampler = Sampler::new(&options, prompt, VOCAB).unwrap();
    let goal = Continuation { sampler, constraint: None, max_tokens: n_new, ending_tokens: vec![] };
    Request {
        tokens: prompt.to_vec(),
        goal: Goal::Generate(Box::new(goal)),
        priority,
        cache_salt: None,
    }
}

fn next(events: &mut events::UnboundedReceiver<Event>) -> Option<Event> {
    use futures_core::Stream;
    block_on(std::future::poll_fn(|context| Pin::new(&mut *events).poll_next(context)))
}

fn tokens_of(mut events: events::UnboundedReceiver<Event>) -> Vec<u32> {
    let mut tokens = Vec::new();
    loop {
        match next(&mut events).expect("a request ends with an event") {
            Event::Token(token, _) => tokens.push(token.id),
            Event::Finished(..) => return tokens,
            other => panic!("unexpected {other:?}"),
        }
    }
}

fn alone(prompt: &[u32], n_new: usize, seed: u64, memory: usize) -> Vec<u32> {
    let worker = worker(HashModel { memory, ..HashModel::new(50) }, 1, 64);
    tokens_of(worker.submit(request(prompt, n_new, seed, 0)).unwrap())
}

/// A model that is lost after so many steps, with a draft model if that is asked for.
fn fragile(steps: u64, spare: Option<Spare>, drafted: bool) -> Worker {
    let model = HashModel { steps_left: Some(steps), ..HashModel::new(30) };
    let draft = drafted.then(|| HashModel { lenient: true, ..HashModel::new(30) });
    worker_spared(model, draft, spare, 4, 9, false)
}

#[test]
fn a_spare_device_takes_over_with_the_same_tokens_and_says_so() {
    for (steps, drafted) in [(0, false), (1, false), (7, false), (20, false), (7, true)] {
        let spare: Spare = Box::new(|| Ok(Box::new(HashModel::new(30))));
        let worker = fragile(steps, Some(spare), drafted);
        assert_eq!(worker.place().device.name, "fragile");
        let prompt: Vec<u32> = (0..11).collect();
        let running: Vec<_> =
            (0..6).map(|seed| worker.submit(request(&prompt, 15, seed, 0)).unwrap()).collect();
        for (seed, events) in (0..6).zip(running) {
            assert_eq!(tokens_of(events), alone(&prompt, 15, seed, usize::MAX), "step {steps}");
        }
        assert_eq!(worker.place().device.name, "mock");
        let notice = worker.place().notice.clone().expect("it says so");
        assert!(notice.contains("planted loss") && notice.contains("mock took over"), "{notice}");
        assert_eq!(notice.contains("without the draft model"), drafted);
        assert!(!worker.has_failed());
    }
}

/// A request for the logits after every token gets each row once, though it starts again.
#[test]
fn rows_are_handed_out_once_when_a_device_is_lost() {
    let prompt: Vec<u32> = (0..30).map(|p| p % VOCAB as u32).collect();
    let rows = |worker: &Worker| {
        let request = Request {
            tokens: prompt.clone(),
            goal: Goal::Logits { all: true },
            priority: 0,
            cache_salt: None,
        };
        let mut events = worker.submit(request).unwrap();
        let mut rows = Vec::new();
        loop {
            match next(&mut events).expect("a request ends with an event") {
                Event::Logits(row) => rows.push(row),
                Event::Finished(..) => return rows,
                other => panic!("unexpected {other:?}"),
            }
        }
    };
    let want = rows(&worker(HashModel::new(30), 4, 9));
    assert_eq!(want.len(), prompt.len());
    for steps in [0, 1, 3, 5] {
        let spare: Spare = Box::new(|| Ok(Box::new(HashModel::new(30))));
        let fragile = fragile(steps, Some(spare), false);
        assert_eq!(rows(&fragile), want, "lost after {steps} steps");
        assert_eq!(fragile.place().device.name, "mock");
    }
}

#[test]
fn without_a_spare_a_lost_device_is_the_error_of_the_request() {
    let useless: Spare = Box::new(|| Err(InferenceError::model_lacks("m", "a file")));
    for (spare, reason) in [(None, "planted loss"), (Some(useless), "nothing could take over")] {
        let worker = fragile(3, spare, false);
        let mut events = worker.submit(request(&[1, 2, 3], 15, 0, 0)).unwrap();
        let error = loop {
            match next(&mut events).expect("a request ends with an event") {
                Event::Failed(error) => break error,
                Event::Token(..) => {}
                other => panic!("unexpected {other:?}"),
            }
        };
        assert!(matches!(error, InferenceError::Gpu { .. }), "{error:?}");
        assert!(error.to_string().contains(reason), "{error}");
        assert!(worker.has_failed());
        assert!(worker.submit(request(&[1], 1, 0, 0)).is_err());
    }
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 40, ..ProptestConfig::default() })]

    /// In any batch, with or without a cached prefix, before and after preemption, under any step
    /// size: each request gets the tokens it gets alone. Nothing is left behind.
    #[test]
    fn every_request_gets_the_tokens_it_gets_alone(
        requests in prop::collection::vec((0u32..3, 1usize..30, 1usize..20, -1i32..2), 1..12),
        n_blocks in 14usize..60,
        max_sequences in 1usize..6,
        max_tokens in 1usize..20,
        speculate in any::<bool>(),
        // A draft model that knows the whole past is always right, one that does not seldom is.
        draft_memory in prop::sample::select(vec![None, Some(1), Some(usize::MAX)]),
        memory in prop::sample::select(vec![1, 2, usize::MAX]), // short memories repeat themselves
    ) {
        let max_tokens = max_tokens.max(max_sequences);
        let model = HashModel { memory, ..HashModel::new(n_blocks) };
        let largest_step = model.largest_step.clone();
        let draft = draft_memory.map(|memory| HashModel { memory, lenient: true, ..HashModel::new(n_blocks) });
        let worker = worker_drafted(model, draft, max_sequences, max_tokens, speculate);
        let mut running = Vec::new();
        for (i, (family, n_prompt, n_new, priority)) in requests.iter().enumerate() {
            // Prompts of a family share their beginning.
            let prompt: Vec<u32> = (0..*n_prompt as u32).map(|p| (p * 7 + family) % VOCAB as u32).collect();
            let events = worker.submit(request(&prompt, *n_new, i as u64, *priority)).unwrap();
            running.push((prompt, *n_new, i as u64, events));
        }
        for (prompt, n_new, seed, events) in running {
            prop_assert_eq!(tokens_of(events), alone(&prompt, n_new, seed, memory));
        }
        prop_assert!(largest_step.load(Ordering::Relaxed) <= max_tokens as u64);
        let worker_stats = worker.stats.clone();
        drop(worker); // joins the thread, so that the counters are final
        prop_assert_eq!(worker_stats.blocks_in_use.load(Ordering::Relaxed), 0);
        prop_assert_eq!(worker_stats.waiting.load(Ordering::Relaxed), 0);
    }
}

#[test]
fn memory_pressure_preempts_and_the_tokens_stay_the_same() {
    let worker = worker(HashModel::new(14), 4, 16);
    let prompts: Vec<Vec<u32>> = (0..4).map(|i| vec![i, 20 + i, 30]).collect();
    let events: Vec<_> =
        prompts.iter().map(|p| worker.submit(request(p, 40, 5, 0)).unwrap()).collect();
    for (prompt, events) in prompts.iter().zip(events) {
        assert_eq!(tokens_of(events), alone(prompt, 40, 5, usize::MAX));
    }
    assert!(worker.stats.preemptions.load(Ordering::Relaxed) > 0);
}

#[test]
fn a_second_request_reuses_the_prefix_and_another_tenant_does_not() {
    let worker = worker(HashModel::new(50), 2, 64);
    let prompt: Vec<u32> = (0..33).collect();
    let cached = |salt: Option<&str>| {
        let mut request = request(&prompt, 2, 1, 0);
        request.cache_salt = salt.map(Arc::from);
        let mut events = worker.submit(request).unwrap();
        loop {
            if let Event::Finished(_, usage) = next(&mut events).unwrap() {
                return usage.cached_tokens;
            }
        }
    };
    assert_eq!(cached(None), 0);
    assert_eq!(cached(None), 32);
    assert_eq!(cached(Some("tenant")), 0);
}

#[test]
fn a_dropped_request_leaves_within_a_step_and_frees_its_memory() {
    let worker = worker(HashModel::new(50), 2, 8);
    let mut events = worker.submit(request(&[1], 190, 1, 0)).unwrap();
    assert!(matches!(next(&mut events), Some(Event::Token(..))));
    drop(events);
    // The next request ends; by then the first one is gone.
    tokens_of(worker.submit(request(&[2], 3, 1, 0)).unwrap());
    assert!(worker.stats.running.load(Ordering::Relaxed) <= 1);
    let stats = worker.stats.clone();
    drop(worker);
    assert_eq!(stats.blocks_in_use.load(Ordering::Relaxed), 0);
}

#[test]
fn impossible_requests_are_refused_with_the_reason() {
    let worker = worker(HashModel::new(10), 2, 8);
    let refusal = |tokens: &[u32]| worker.submit(request_of(tokens)).unwrap_err().to_string();
    assert!(refusal(&[]).contains("at least one token"));
    assert!(refusal(&[40]).contains("below 40"), "{}", refusal(&[40]));
    assert!(refusal(&[1; 41]).contains("memory for: 40"), "{}", refusal(&[1; 41]));
    assert_eq!(tokens_of(worker.submit(request(&[1; 39], 5, 0, 0)).unwrap()).len(), 1);
}

fn request_of(tokens: &[u32]) -> Request {
    let tokens = tokens.to_vec();
    Request { tokens, goal: Goal::Logits { all: false }, priority: 0, cache_salt: None }
}

#[test]
fn a_full_queue_pushes_back() {
    let worker = worker(HashModel::new(50), 1, 8);
    let mut held = Vec::new();
    let refused = (0..1000).any(|_| match worker.submit(request(&[1], 190, 1, 0)) {
        Ok(events) => {
            held.push(events);
            false
        }
        Err(error) => matches!(error, InferenceError::Concurrency { .. }),
    });
    assert!(refused);
}

#[test]
fn a_panic_in_a_step_reaches_everyone_who_waits_and_the_next_request() {
    let mut model = HashModel::new(50);
    model.panic_on = Some(13);
    let worker = worker(model, 4, 8);
    let mut events = worker.submit(request(&[13], 5, 1, 0)).unwrap();
    assert!(matches!(next(&mut events), Some(Event::Failed(_))));
    while worker.submit(request(&[1], 5, 1, 0)).is_ok() {
        std::thread::yield_now(); // until the thread has marked itself as failed
    }
}

#[test]
fn scores_cover_every_token_but_the_first_in_any_chunking() {
    let prompt: Vec<u32> = (0..23).map(|i| i * 3 % VOCAB as u32).collect();
    let scores = |max_tokens: usize| {
        let worker = worker(HashModel::new(50), 2, max_tokens);
        let request = Request {
            tokens: prompt.clone(),
            goal: Goal::Score { top: 0 },
            priority: 0,
            cache_salt: None,
        };
        let mut events = worker.submit(request).unwrap();
        let mut scores = Vec::new();
        loop {
            match next(&mut events).unwrap() {
                Event::Score(token) => scores.extend(token.logprob),
                Event::Finished(..) => return scores,
                other => panic!("unexpected {other:?}"),
            }
        }
    };
    let whole = scores(64);
    assert_eq!(whole.len(), 22);
    assert_eq!(whole, scores(2));
}

#[test]
fn guessing_saves_steps_where_text_repeats_and_changes_no_token() {
    let run = |speculate: bool| {
        let worker = worker_with(HashModel { memory: 1, ..HashModel::new(50) }, 2, 32, speculate);
        let tokens = tokens_of(worker.submit(request(&[3, 1, 4], 150, 0, 0)).unwrap());
        let stats = worker.stats.clone();
        drop(worker);
        (tokens, stats.steps.load(Ordering::Relaxed))
    };
    let (plain, plain_steps) = run(false);
    let (guessed, guessed_steps) = run(true);
    assert_eq!(plain, guessed);
    assert_eq!(plain_steps, 150);
    assert!(guessed_steps < 50, "{guessed_steps} steps");
}

#[test]
fn a_good_draft_model_saves_steps_and_a_bad_one_changes_no_token() {
    let run = |draft: Option<HashModel>| {
        let worker = worker_drafted(HashModel::new(50), draft, 2, 32, false);
        let tokens = tokens_of(worker.submit(request(&[3, 1, 4], 120, 0, 0)).unwrap());
        let stats = worker.stats.clone();
        drop(worker);
        (tokens, stats.steps.load(Ordering::Relaxed))
    };
    let (plain, _) = run(None);
    let (good, steps) = run(Some(HashModel::new(50)));
    assert_eq!(plain, good);
    assert!(steps <= 120 / 5, "{steps} steps");
    let (bad, _) = run(Some(HashModel { memory: 1, ..HashModel::new(50) }));
    assert_eq!(plain, bad);
}

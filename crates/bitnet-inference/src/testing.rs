//! What the engine promises whatever device a model is on, as checks that the tests of backends call:
//! a device that is lost in mid-request. Exists for tests only.

use std::path::Path;

use bitnet_core::backend::{Backend, KvSpec, KvType};
use bitnet_core::cpu::CpuBackend;

use crate::backend::InferenceBackend;
use crate::decoder::Decoder;
use crate::error::{InferenceError, Result};
use crate::options::GenerationOptions;
use crate::request::{Continuation, Event, Goal, Request};
use crate::sampler::Sampler;
use crate::scheduler::StepLimits;
use crate::source::WeightSource;
use crate::worker::{Spare, Worker, WorkerLimits};

const BLOCKS: usize = 16;
const POSITIONS: usize = 32 * BLOCKS;
/// Tokens a request wants, and those after which its device is lost. The worker may be a few ahead of
/// whoever reads its tokens.
const TOKENS: usize = 60;
const BEFORE: usize = 10;

/// The built-in model on a device, with a cache of 16 blocks of 32 tokens, and the size of its
/// vocabulary.
///
/// # Panics
/// If the device does not take it.
pub fn placed<B: Backend>(backend: B) -> (Box<dyn InferenceBackend>, usize) {
    let source = crate::source::open(Path::new("builtin")).expect("the built-in model");
    let config = WeightSource::config(&source);
    let kv_spec = KvSpec {
        n_layers: config.num_hidden_layers,
        n_kv_heads: config.num_key_value_heads,
        head_dim: config.head_dim,
        block_tokens: 32,
        n_blocks: BLOCKS,
        dtype: KvType::F16,
    };
    let model = Decoder::load(backend, &source, kv_spec, POSITIONS, 64, &mut |_, _| {});
    (Box::new(model.expect("it fits")), config.vocab_size)
}

fn worker<B: Backend>(backend: B, spare: Option<Spare>) -> Worker {
    let (model, vocab_size) = placed(backend);
    let step = StepLimits {
        max_sequences: 2,
        max_tokens: 64,
        max_prefill_beside_decode: 64,
        max_logit_rows: 64,
        speculate: false,
        max_positions: POSITIONS,
    };
    let (max_waiting, max_positions, context) = (8, POSITIONS, POSITIONS);
    let limits = WorkerLimits { step, max_waiting, max_positions, context, vocab_size };
    Worker::spawn(model, None, spare, limits).expect("a thread")
}

/// Generates tokens and calls `lose` once some have come.
fn generate(worker: &Worker, lose: impl Fn()) -> Result<Vec<u32>> {
    let tokens: Vec<u32> = (5..25).collect();
    let sampler = Sampler::new(&GenerationOptions::greedy(), &tokens, 4096).expect("greedy");
    let goal =
        Continuation { sampler, constraint: None, max_tokens: TOKENS, ending_tokens: vec![] };
    let goal = Goal::Generate(Box::new(goal));
    let request = Request { tokens, goal, priority: 0, cache_salt: None };
    let mut events = worker.submit(request)?;
    let mut ids = Vec::new();
    loop {
        use futures_core::Stream;
        let next = std::future::poll_fn(|c| std::pin::Pin::new(&mut events).poll_next(c));
        match crate::wait::block_on(next).expect("a request ends with an event") {
            Event::Token(token, _) => ids.push(token.id),
            Event::Finished(..) => return Ok(ids),
            Event::Failed(error) => return Err(error),
            other => panic!("unexpected {other:?}"),
        }
        if ids.len() == BEFORE {
            lose();
        }
    }
}

/// A request whose device is lost ends on the CPU, with the tokens it had, and the model says so.
/// `make` gives a backend and a way to lose its device.
///
/// # Panics
/// If it does not.
pub fn a_lost_device_ends_on_the_cpu_and_says_so<B: Backend, L: Fn()>(make: impl Fn() -> (B, L)) {
    let undisturbed = generate(&worker(make().0, None), || {}).expect("a device that stays");
    assert_eq!(undisturbed.len(), TOKENS);
    let (backend, lose) = make();
    let name = backend.device().name;
    let spare: Spare = Box::new(|| Ok(placed(CpuBackend::new(Some(1), None).expect("a CPU")).0));
    let worker = worker(backend, Some(spare));
    let tokens = generate(&worker, lose).expect("the CPU takes over");
    assert_eq!(tokens.len(), TOKENS);
    assert_eq!(tokens[..BEFORE], undisturbed[..BEFORE]);
    assert_eq!(worker.place().device.name, "cpu");
    let notice = worker.place().notice.clone().expect("it says so");
    assert!(notice.contains(&name) && notice.contains("cpu took over"), "{notice}");
}

/// A request whose device is lost ends with an error of the device where nothing may take over.
///
/// # Panics
/// If it does not.
pub fn a_lost_device_is_a_clean_error<B: Backend, L: Fn()>(make: impl Fn() -> (B, L)) {
    let (backend, lose) = make();
    let worker = worker(backend, None);
    let error = generate(&worker, lose).expect_err("the device is lost");
    assert!(matches!(error, InferenceError::Gpu { .. }), "{error:?}");
    assert!(worker.has_failed());
}

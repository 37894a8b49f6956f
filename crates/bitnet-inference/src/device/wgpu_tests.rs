//! A model on wgpu: how often a token goes to the device, and what happens when the device is lost in
//! the middle of a request. Without a device the tests say so and pass, unless
//! `BITNET_REQUIRE_WGPU` is set.

use std::path::Path;

use bitnet_core::backend::{Batch, KvSpec, SequenceSlice};
use bitnet_wgpu::WgpuBackend;

use super::*;
use crate::options::GenerationOptions;
use crate::request::{Continuation, Event, Goal, Request};
use crate::sampler::Sampler;
use crate::scheduler::StepLimits;
use crate::worker::{Spare, Worker, WorkerLimits};

const BLOCKS: usize = 16;

fn backend() -> Option<WgpuBackend> {
    match WgpuBackend::new() {
        Ok(backend) => Some(backend),
        Err(error) => {
            let required = std::env::var_os("BITNET_REQUIRE_WGPU").is_some();
            assert!(!required, "a wgpu device is required: {error}");
            eprintln!("SKIPPED, no wgpu device: {error}");
            None
        }
    }
}

fn placed<B: Backend>(backend: B) -> (Box<dyn InferenceBackend>, usize) {
    let source = crate::source::open(Path::new("builtin")).unwrap();
    let config = WeightSource::config(&source);
    let kv_spec = KvSpec {
        n_layers: config.num_hidden_layers,
        n_kv_heads: config.num_key_value_heads,
        head_dim: config.head_dim,
        block_tokens: 32,
        n_blocks: BLOCKS,
        dtype: bitnet_core::backend::KvType::F16,
    };
    let placement = Placement { kv_spec, max_positions: 32 * BLOCKS, max_step_tokens: 64 };
    (decoder(backend, &source, placement, &mut |_, _| {}).unwrap(), config.vocab_size)
}

#[test]
fn a_token_is_one_submission_and_only_the_best_logits_come_back() {
    let Some(backend) = backend() else { return };
    let traffic = backend.traffic();
    let (mut model, vocab_size) = placed(backend);
    let mut logits = Vec::new();
    let mut step = |tokens: Vec<u32>, first_position: usize, n_best: Option<usize>| {
        let rows = 0..tokens.len();
        let logit_rows = vec![rows.end - 1];
        let sequences = vec![SequenceSlice { rows, first_position, blocks: (0..2).collect() }];
        let batch = Batch { tokens, sequences, logit_rows, n_best };
        let before = (traffic.submissions(), traffic.downloaded_bytes());
        model.execute_batch(&batch, &mut logits).unwrap();
        (traffic.submissions() - before.0, traffic.downloaded_bytes() - before.1)
    };
    assert_eq!(step((1..40).collect(), 0, None), (1, 4 * vocab_size as u64), "a prompt");
    assert_eq!(step(vec![40], 39, Some(1)), (1, 8), "a token");
    assert_eq!(step(vec![41], 40, Some(40)), (1, 320), "a token to be drawn");
    let dispatches = traffic.dispatches();
    let uploaded = traffic.uploaded_bytes();
    step(vec![42], 41, Some(1));
    println!(
        "a token: {} kernels, {} bytes up, 8 bytes down",
        traffic.dispatches() - dispatches,
        traffic.uploaded_bytes() - uploaded
    );
}

fn worker(backend: WgpuBackend, spare: Option<Spare>) -> Worker {
    let (model, vocab_size) = placed(backend);
    let step = StepLimits {
        max_sequences: 2,
        max_tokens: 64,
        max_prefill_beside_decode: 64,
        max_logit_rows: 64,
        speculate: false,
        max_positions: 32 * BLOCKS,
    };
    let max_positions = 32 * BLOCKS;
    Worker::spawn(
        model,
        None,
        spare,
        WorkerLimits { step, max_waiting: 8, max_positions, context: max_positions, vocab_size },
    )
    .unwrap()
}

/// Generates 60 tokens and calls `after_ten` once ten have come.
fn generate(worker: &Worker, after_ten: impl Fn()) -> Result<Vec<u32>> {
    let tokens: Vec<u32> = (5..25).collect();
    let sampler = Sampler::new(&GenerationOptions::greedy(), &tokens, 4096).unwrap();
    let goal = Continuation { sampler, constraint: None, max_tokens: 60, ending_tokens: vec![] };
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
        if ids.len() == 10 {
            after_ten();
        }
    }
}

#[test]
fn a_wgpu_device_lost_in_mid_request_ends_on_the_cpu_and_says_so() {
    let Some(first) = backend() else { return };
    let undisturbed = generate(&worker(first, None), || {}).unwrap();
    let Some(second) = backend() else { return };
    let lose = second.loss();
    let spare: Spare = Box::new(|| Ok(placed(CpuBackend::new(Some(1), None).unwrap()).0));
    let worker = worker(second, Some(spare));
    let tokens = generate(&worker, lose).unwrap();
    assert_eq!(tokens.len(), 60);
    assert_eq!(tokens[..10], undisturbed[..10]);
    assert_eq!(worker.place().device.name, "cpu");
    let notice = worker.place().notice.clone().expect("it says so");
    assert!(notice.contains("wgpu") && notice.contains("cpu took over"), "{notice}");
}

#[test]
fn a_wgpu_device_lost_in_mid_request_is_a_clean_error_where_nothing_may_take_over() {
    let Some(backend) = backend() else { return };
    let lose = backend.loss();
    let worker = worker(backend, None);
    let error = generate(&worker, lose).expect_err("the device is lost");
    assert!(matches!(error, InferenceError::Gpu { .. }), "{error:?}");
    assert!(worker.has_failed());
}

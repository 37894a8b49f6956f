//! A model on MLX: how often a token goes to the device, and what it brings along.

use std::path::Path;
use std::sync::atomic::Ordering::Relaxed;

use bitnet_core::backend::{Batch, KvSpec, KvType, SequenceSlice};
use bitnet_core::memory::{AccessPattern, TraceEvent};
use bitnet_mlx::MlxBackend;

use super::*;
use crate::engine::InferenceEngine;
use crate::model::Model;
use crate::options::GenerationOptions;

#[test]
#[ignore = "needs mlx-c: scripts/test-mlx.sh"]
fn a_token_is_one_evaluation() {
    let backend = MlxBackend::new().unwrap();
    let (evaluations, pool) = (backend.evaluations(), backend.pool().clone());
    let source = crate::source::open(Path::new("builtin")).unwrap();
    let config = WeightSource::config(&source);
    let kv_spec = KvSpec {
        n_layers: config.num_hidden_layers,
        n_kv_heads: config.num_key_value_heads,
        head_dim: config.head_dim,
        block_tokens: 32,
        n_blocks: 8,
        dtype: KvType::F16,
    };
    let placement = Placement { kv_spec, max_positions: 256, max_step_tokens: 64 };
    let mut model = decoder(backend, &source, placement, &mut |_, _| {}).unwrap();
    let mut logits = Vec::new();
    let mut step = |tokens: Vec<u32>, first_position: usize| {
        let rows = 0..tokens.len();
        let logit_rows = vec![rows.end - 1];
        let sequences = vec![SequenceSlice { rows, first_position, blocks: vec![0, 1] }];
        let batch = Batch { tokens, sequences, logit_rows, n_best: None };
        let before = evaluations.load(Relaxed);
        pool.start_recording();
        model.execute_batch(&batch, &mut logits).unwrap();
        let events = pool.stop_recording().unwrap().events;
        let taken = events.iter().filter_map(|event| match event {
            TraceEvent::Take { bytes, pattern, .. } => Some((*pattern, *bytes)),
            TraceEvent::Release { .. } => None,
        });
        let taken: Vec<_> = taken.collect();
        assert!(taken.iter().all(|(pattern, _)| *pattern == AccessPattern::Upload));
        (evaluations.load(Relaxed) - before, taken.iter().map(|(_, bytes)| bytes).sum::<u64>())
    };
    assert_eq!(step((1..40).collect(), 0).0, 1, "a prompt");
    // Token, position, slot and logit row, and two blocks of its past.
    assert_eq!(step(vec![40], 39), (1, 24), "a token");
    assert_eq!(logits.len(), config.vocab_size);
}

/// Clients that send one request after another, of ever other lengths, all served together: each
/// answer is the one the request gets alone. With `BITNET_MLX_TRACE` this is the recorded serving
/// trace that bitnet-core replays.
#[test]
#[ignore = "needs mlx-c: scripts/test-mlx.sh"]
fn requests_served_together_are_answered_as_alone() {
    const CLIENTS: usize = 4;
    const REQUESTS: usize = 5;
    let engine = || {
        let builder = InferenceEngine::builder().device(Device::Mlx).strict_device(true);
        let engine = builder.batch_size(CLIENTS).context_length(256).build_blocking().unwrap();
        let model = engine.load_model_blocking("builtin").unwrap();
        assert_eq!(model.device().name, "mlx");
        (engine, model)
    };
    let ask = |(engine, model): &(InferenceEngine, Model), client: usize, request: usize| {
        let length = 3 + (client * 37 + request * 61) % 140;
        let prompt: Vec<u32> =
            (0..length).map(|i| ((i * 97 + client * 31 + request * 7) % 4096) as u32).collect();
        let max_tokens = 6 + (client * 11 + request * 5) % 24;
        let options = GenerationOptions::greedy().max_tokens(max_tokens as u32).ignore_eos(true);
        let answer = engine.generate_blocking(model, prompt, &options).unwrap();
        answer.tokens.iter().map(|token| token.id).collect::<Vec<_>>()
    };
    let together = engine();
    let answers: Vec<Vec<Vec<u32>>> = std::thread::scope(|scope| {
        let clients: Vec<_> = (0..CLIENTS)
            .map(|client| {
                let (together, ask) = (&together, &ask);
                scope.spawn(move || (0..REQUESTS).map(|r| ask(together, client, r)).collect())
            })
            .collect();
        clients.into_iter().map(|client| client.join().unwrap()).collect()
    });
    // The recording ends with the first engine, before the second one begins.
    drop(together);
    if std::env::var_os(bitnet_mlx::TRACE_VARIABLE).is_some() {
        return;
    }
    let alone = engine();
    for (client, answers) in answers.iter().enumerate() {
        for (request, answer) in answers.iter().enumerate().step_by(2) {
            assert_eq!(*answer, ask(&alone, client, request), "client {client} request {request}");
        }
    }
}

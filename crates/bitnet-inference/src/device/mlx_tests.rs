//! A model on MLX: how often a token goes to the device, and what it brings along.

use std::path::Path;

use bitnet_core::backend::{Batch, KvSpec, KvType, SequenceSlice};
use bitnet_core::memory::{AccessPattern, TraceEvent};
use bitnet_mlx::{Counts, MlxBackend};

use super::*;
use crate::engine::InferenceEngine;
use crate::model::Model;
use crate::options::GenerationOptions;

fn placed(backend: MlxBackend) -> (Box<dyn InferenceBackend>, usize) {
    let source = crate::source::open(Path::new("builtin")).unwrap();
    let config = WeightSource::config(&source);
    let kv_spec = KvSpec {
        n_layers: config.num_hidden_layers,
        n_kv_heads: config.num_key_value_heads,
        head_dim: config.head_dim,
        block_tokens: 32,
        n_blocks: 16,
        dtype: KvType::F16,
    };
    let placement = Placement { kv_spec, max_positions: 512, max_step_tokens: 64 };
    (decoder(backend, &source, placement, &mut |_, _| {}).unwrap(), config.vocab_size)
}

/// A step of these tokens of one sequence, which wants the logits of the last.
fn step(tokens: Vec<u32>, first_position: usize, blocks: &[u32]) -> Batch {
    let rows = 0..tokens.len();
    let logit_rows = vec![rows.end - 1];
    let sequences = vec![SequenceSlice { rows, first_position, blocks: blocks.to_vec() }];
    Batch { tokens, sequences, logit_rows, n_best: None }
}

#[test]
#[ignore = "needs mlx-c: scripts/test-mlx.sh"]
fn a_token_is_one_evaluation() {
    let backend = MlxBackend::with_compile(Some(false)).unwrap();
    let (counts, pool) = (backend.counts(), backend.pool().clone());
    let (mut model, vocab_size) = placed(backend);
    let mut logits = Vec::new();
    let mut run = |tokens: Vec<u32>, first_position: usize| {
        let before = counts.evaluations();
        pool.start_recording();
        model.execute_batch(&step(tokens, first_position, &[0, 1]), &mut logits).unwrap();
        let events = pool.stop_recording().unwrap().events;
        let taken = events.iter().filter_map(|event| match event {
            TraceEvent::Take { bytes, pattern, .. } => Some((*pattern, *bytes)),
            TraceEvent::Release { .. } => None,
        });
        let taken: Vec<_> = taken.collect();
        assert!(taken.iter().all(|(pattern, _)| *pattern == AccessPattern::Upload));
        (counts.evaluations() - before, taken.iter().map(|(_, bytes)| bytes).sum::<u64>())
    };
    assert_eq!(run((1..40).collect(), 0).0, 1, "a prompt");
    // Token, position, slot and logit row, and two blocks of its past.
    assert_eq!(run(vec![40], 39), (1, 24), "a token");
    assert_eq!(logits.len(), vocab_size);
}

/// Greedy tokens after a prompt of 40, in blocks `0, 1, …`; the place of block table entries never
/// matters. Also the time that making graphs took for each.
fn greedy(
    model: &mut dyn InferenceBackend,
    counts: &Counts,
    n: usize,
) -> (Vec<u32>, Vec<std::time::Duration>) {
    let blocks: Vec<u32> = (0..16).rev().collect();
    let mut logits = Vec::new();
    let (mut tokens, mut times) = (Vec::new(), Vec::new());
    let mut batch = step((1..41).collect(), 0, &blocks[..2]);
    for position in 40..40 + n {
        let before = counts.building();
        model.execute_batch(&batch, &mut logits).unwrap();
        times.push(counts.building() - before);
        let best = (0..logits.len()).max_by(|&a, &b| logits[a].total_cmp(&logits[b])).unwrap();
        tokens.push(best as u32);
        let needed = (position + 1).div_ceil(32);
        batch = step(vec![best as u32], position, &blocks[..needed]);
    }
    (tokens, times)
}

/// A token is one application of one compiled function, the same for tokens at all positions but
/// where the block table's length changes, and gives the tokens of the plain graph. Prints what making
/// the graph of a token takes either way.
#[test]
#[ignore = "needs mlx-c and a C++ compiler: scripts/test-mlx.sh"]
fn a_token_is_one_compiled_function() {
    const TOKENS: usize = 200;
    let [(plain, plain_times, _), (compiled, compiled_times, n_compiled)] =
        [false, true].map(|compile| {
            let backend = MlxBackend::with_compile(Some(compile)).unwrap();
            let counts = backend.counts();
            let (mut model, _) = placed(backend);
            let (tokens, times) = greedy(&mut *model, &counts, TOKENS);
            assert_eq!(counts.evaluations(), TOKENS as u64);
            (tokens, times, counts.compiled())
        });
    assert_eq!(plain, compiled);
    assert_eq!(n_compiled, TOKENS as u64 - 1, "all but the prompt");
    let median = |mut times: Vec<std::time::Duration>| {
        times.remove(0); // the prompt's
        times.sort_unstable();
        (times[times.len() / 2], times[times.len() - 1])
    };
    let ((plain, _), (replayed, traced)) = (median(plain_times), median(compiled_times));
    println!(
        "making the graph of a token: {plain:.1?} node by node, {replayed:.1?} by the compiled \
         function; {traced:.1?} when it is traced and compiled"
    );
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

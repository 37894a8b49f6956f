//! A model on MLX: how often a token goes to the device and what it brings along, node by node and
//! compiled, and what happens when the device is lost. Needs mlx-c: `scripts/test-mlx.sh` builds it and
//! runs these.

use bitnet_core::backend::{Batch, SequenceSlice};
use bitnet_core::memory::{AccessPattern, TraceEvent};
use bitnet_inference::backend::InferenceBackend;
use bitnet_inference::testing::{self, placed};
use bitnet_mlx::{Compile, Counts, MlxBackend};
use std::time::Duration;

/// A step of these tokens of one sequence, which wants the logits of the last.
fn step(tokens: Vec<u32>, first_position: usize, blocks: &[u32]) -> Batch {
    let rows = 0..tokens.len();
    let logit_rows = vec![rows.end - 1];
    let sequences = vec![SequenceSlice { rows, first_position, blocks: blocks.to_vec() }];
    Batch { tokens, sequences, logit_rows, ..Batch::default() }
}

#[test]
#[ignore = "needs mlx-c: scripts/test-mlx.sh"]
fn a_token_is_one_evaluation() {
    let backend = MlxBackend::with_compile(Some(Compile::Nothing)).unwrap();
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
) -> (Vec<u32>, Vec<Duration>) {
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
#[ignore = "needs mlx-c: scripts/test-mlx.sh"]
fn a_token_is_one_compiled_function() {
    const TOKENS: usize = 120;
    let [(plain, plain_times, _), (compiled, compiled_times, n_compiled)] =
        [Compile::Nothing, Compile::Steps].map(|compile| {
            let backend = MlxBackend::with_compile(Some(compile)).unwrap();
            let counts = backend.counts();
            let (mut model, _) = placed(backend);
            let (tokens, times) = greedy(&mut *model, &counts, TOKENS);
            assert_eq!(counts.evaluations(), TOKENS as u64);
            (tokens, times, counts.compiled())
        });
    assert_eq!(plain, compiled);
    assert_eq!(n_compiled, TOKENS as u64 - 1, "all but the prompt");
    let median = |mut times: Vec<Duration>| {
        times.remove(0); // the prompt's
        times.sort_unstable();
        (times[times.len() / 2], times[times.len() - 1])
    };
    let ((plain, _), (replayed, traced)) = (median(plain_times), median(compiled_times));
    println!(
        "making the graph of a token: {plain:.1?} node by node, {replayed:.1?} by the compiled \
         function; {traced:.1?} when it is traced"
    );
}

fn losable() -> (MlxBackend, impl Fn()) {
    let backend = MlxBackend::new().unwrap();
    let lose = backend.loss();
    (backend, lose)
}

#[test]
#[ignore = "needs mlx-c: scripts/test-mlx.sh"]
fn a_device_lost_in_mid_request_ends_on_the_cpu_and_says_so() {
    testing::a_lost_device_ends_on_the_cpu_and_says_so(losable);
}

#[test]
#[ignore = "needs mlx-c: scripts/test-mlx.sh"]
fn a_device_lost_in_mid_request_is_a_clean_error_where_nothing_may_take_over() {
    testing::a_lost_device_is_a_clean_error(losable);
}

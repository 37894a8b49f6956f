//! Whole models on the simulated device: the reference's greedy tokens, and the CPU's logits to the
//! last bit, prefill, decode and several sequences in a step.

use super::simulator::{Library, Simulator, backend};
use bitnet_core::backend::{Backend, Batch, KvSpec, KvType, SequenceSlice};
use bitnet_core::cpu::CpuBackend;
use bitnet_inference::backend::InferenceBackend;
use bitnet_inference::decoder::Decoder;
use bitnet_inference::source::{self, WeightSource};
use bitnet_inference::testing;
use bitnet_metal::MetalBackend;
use safetensors::SafeTensors;
use std::path::{Path, PathBuf};
use std::sync::atomic::Ordering;

const BLOCK_TOKENS: usize = 32;
/// Tokens of the prompts in the golden files.
const PROMPT: usize = 12;

fn goldens() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../../fixtures/goldens")
}

/// Brings a model onto a device, with room for `n_blocks` blocks.
fn load<B: Backend>(backend: B, model: &str, n_blocks: usize, dtype: KvType) -> Decoder<B> {
    let path = match model {
        "builtin" => PathBuf::from(model),
        other => goldens().join(other),
    };
    let checkpoint = source::open(&path).expect("a fixture");
    let config = checkpoint.config().clone();
    let spec = KvSpec {
        n_layers: config.num_hidden_layers,
        n_kv_heads: config.num_key_value_heads,
        head_dim: config.head_dim,
        block_tokens: BLOCK_TOKENS,
        n_blocks,
        dtype,
    };
    let positions = n_blocks * BLOCK_TOKENS;
    Decoder::load(backend, &checkpoint as &dyn WeightSource, spec, positions, 64, &mut |_, _| {})
        .expect("the model fits")
}

fn cpu(model: &str, n_blocks: usize, dtype: KvType) -> Decoder<CpuBackend> {
    let backend = CpuBackend::new(Some(1), Some("scalar")).expect("the CPU");
    load(backend, model, n_blocks, dtype)
}

fn metal(model: &str, n_blocks: usize, dtype: KvType) -> Decoder<MetalBackend<Simulator>> {
    load(backend(2), model, n_blocks, dtype)
}

/// The step that feeds `tokens[first..]` of one sequence and wants the last row's logits.
fn batch(tokens: &[u32], first: usize) -> Batch {
    let rows = tokens.len() - first;
    let blocks = (0..tokens.len().div_ceil(BLOCK_TOKENS) as u32).collect();
    Batch {
        tokens: tokens[first..].to_vec(),
        sequences: vec![SequenceSlice { rows: 0..rows, first_position: first, blocks }],
        logit_rows: vec![rows - 1],
        ..Batch::default()
    }
}

fn argmax(row: &[f32]) -> u32 {
    (0..row.len()).max_by(|&a, &b| row[a].total_cmp(&row[b])).expect("a vocabulary") as u32
}

fn bits(x: &[f32]) -> Vec<u32> {
    x.iter().map(|x| x.to_bits()).collect()
}

/// The prompt and the tokens that follow it, as the reference implementation chose them.
fn greedy(model: &str) -> Vec<u32> {
    let file = std::fs::read(goldens().join(model).join("golden.safetensors")).expect("a fixture");
    let file = SafeTensors::deserialize(&file).expect("a golden file");
    let tensor = file.tensor("greedy").expect("greedy tokens");
    let width = *tensor.shape().last().expect("a matrix");
    let ids = tensor.data().as_chunks::<8>().0.iter().take(width);
    ids.map(|id| i64::from_le_bytes(*id) as u32).collect()
}

#[test]
#[ignore = "needs clang++: scripts/test-metal.sh"]
fn greedy_tokens_are_the_reference_s_and_logits_the_cpu_s() {
    for (golden, model) in [
        ("bitnet-tiny", "bitnet-tiny/online"),
        ("bitnet-tiny", "bitnet-tiny/packed_multiply"),
        ("llama-ternary-tiny", "llama-ternary-tiny/online"),
        ("qwen3-tiny", "qwen3-tiny/packed_multiply"),
        ("story", "builtin"),
    ] {
        let expected = greedy(golden);
        let n_blocks = expected.len().div_ceil(BLOCK_TOKENS);
        let (mut gpu, mut reference) =
            (metal(model, n_blocks, KvType::F32), cpu(model, n_blocks, KvType::F32));
        let mut tokens = expected[..PROMPT].to_vec();
        let (mut first, mut logits, mut want) = (0, Vec::new(), Vec::new());
        while tokens.len() < expected.len() {
            let step = batch(&tokens, first);
            gpu.execute_batch(&step, &mut logits).expect("a step");
            reference.execute_batch(&step, &mut want).expect("a step");
            assert!(bits(&logits) == bits(&want), "{model}: position {}", tokens.len());
            first = tokens.len();
            tokens.push(argmax(&logits));
        }
        assert_eq!(tokens, expected, "{model}");
    }
}

/// Every number format of the cache, past the end of a span, and two sequences that share steps.
#[test]
#[ignore = "needs clang++: scripts/test-metal.sh"]
fn long_and_shared_steps_have_the_cpu_s_bits() {
    const LONG: usize = 300;
    for dtype in [KvType::F32, KvType::F16, KvType::Q8] {
        let model = "bitnet-tiny/packed_multiply";
        let (mut gpu, mut reference) = (metal(model, 20, dtype), cpu(model, 20, dtype));
        let token = |i: usize| (i * 37 + 11) as u32 % 200;
        // One sequence in the even blocks, the other in the odd ones; the second joins late.
        let slice = |odd: u32, row: usize, first: usize, n: usize| SequenceSlice {
            rows: row..row + n,
            first_position: first,
            blocks: (0..(first + n).div_ceil(BLOCK_TOKENS) as u32).map(|i| 2 * i + odd).collect(),
        };
        let (mut one, mut other) = (0, 0);
        let (mut logits, mut want) = (Vec::new(), Vec::new());
        while one < LONG {
            let n = [50, 1, 8][one % 3].min(LONG - one);
            let m = if one > 100 { 3 } else { 0 };
            let mut sequences = vec![slice(0, 0, one, n)];
            if m > 0 && other + m < 250 {
                sequences.push(slice(1, n, other, m));
            }
            let rows = sequences.last().map_or(0, |slice| slice.rows.end);
            let step = Batch {
                tokens: (0..rows).map(|row| token(one + 7 * row)).collect(),
                sequences,
                logit_rows: (0..rows).filter(|row| row % 3 == 0).collect(),
                ..Batch::default()
            };
            gpu.execute_batch(&step, &mut logits).expect("a step");
            reference.execute_batch(&step, &mut want).expect("a step");
            assert!(bits(&logits) == bits(&want), "{dtype:?}: position {one}");
            one += n;
            other += rows - n;
        }
        assert!(other > 0, "the sequences shared steps");
    }
}

/// Nothing but the logits comes back, so a step is handed over once, and with it what it is about.
#[test]
#[ignore = "needs clang++: scripts/test-metal.sh"]
fn a_step_is_one_submission() {
    let simulator = Simulator::new(Library::kernels(), 0);
    let traffic = simulator.traffic();
    let backend = MetalBackend::new(simulator, 1 << 40).expect("a few bytes");
    let mut model = load(backend, "builtin", 4, KvType::F16);
    let tokens: Vec<u32> = (1..=8).collect();
    let mut logits = Vec::new();
    let counts = || {
        [&traffic.submissions, &traffic.written, &traffic.read].map(|n| n.load(Ordering::Relaxed))
    };
    for (first, end) in [(0, 6), (6, 7), (7, 8)] {
        let before = counts();
        model.execute_batch(&batch(&tokens[..end], first), &mut logits).expect("a step");
        let after = counts();
        let [submissions, written, read] = [0, 1, 2].map(|i| after[i] - before[i]);
        println!("{} tokens: {written} bytes written, {read} read", end - first);
        assert_eq!(submissions, 1, "submissions of a step of {} tokens", end - first);
        // Token, position, start of its blocks, one block, row of logits, and 32 angles' cosines and
        // sines; then the logits of one row.
        let rows = (end - first) as u64;
        assert_eq!((written, read), (rows * (4 + 8 + 256) + 8, 4 * logits.len() as u64));
    }
}

fn losable() -> (MetalBackend<Simulator>, impl Fn()) {
    let simulator = Simulator::new(Library::kernels(), 0);
    let lose = simulator.loss();
    (MetalBackend::new(simulator, 1 << 40).expect("a few bytes"), lose)
}

#[test]
#[ignore = "needs clang++: scripts/test-metal.sh"]
fn a_device_lost_in_mid_request_ends_on_the_cpu_and_says_so() {
    testing::a_lost_device_ends_on_the_cpu_and_says_so(losable);
}

#[test]
#[ignore = "needs clang++: scripts/test-metal.sh"]
fn a_device_lost_in_mid_request_is_a_clean_error_where_nothing_may_take_over() {
    testing::a_lost_device_is_a_clean_error(losable);
}

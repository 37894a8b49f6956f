//! What a checkpoint makes of GGUF metadata: families, rotary settings, text, known mistakes, lies.

mod common;

use bitnet_core::weights::{ActivationQuant, Matrix, Scales};
use bitnet_quant::checkpoint::ModelFiles;
use bitnet_quant::config::{Architecture, HiddenAct, RopeScaling};
use bitnet_quant::gguf::{Array, GgufWriter, Metadata, TensorSpec, TensorType, Value};
use bitnet_quant::text::TokenizerSource;
use bitnet_quant::{Checkpoint, Error};
use bytes::Bytes;
use common::{PROJECTIONS, read_all, trits};
use proptest::prelude::*;

const HIDDEN: usize = 128;
const FFN: usize = 256;
const VOCAB: usize = 8;

/// A GGUF file of one layer, all trits 0, in I2_S with a scale of 0.25.
#[derive(Clone)]
struct TinyGguf {
    family: &'static str,
    metadata: Metadata,
    tensors: Vec<(TensorSpec, Vec<u8>)>,
}

fn string(text: &str) -> Value {
    Value::String(text.into())
}

fn strings(texts: &[&str]) -> Value {
    Value::Array(Array::String(texts.iter().map(|text| text.to_string()).collect()))
}

impl TinyGguf {
    fn new(family: &'static str) -> Self {
        let mut tiny = Self { family, metadata: Metadata::new(), tensors: Vec::new() };
        tiny.metadata.set("general.architecture", string(family));
        for (key, value) in [
            ("block_count", 1),
            ("context_length", 64),
            ("embedding_length", HIDDEN as u32),
            ("feed_forward_length", FFN as u32),
            ("attention.head_count", 2),
        ] {
            tiny.set(key, Value::U32(value));
        }
        tiny.set("attention.layer_norm_rms_epsilon", Value::F32(1e-5));
        tiny.push_f32("token_embd.weight", &[VOCAB, HIDDEN], &[0.5; VOCAB * HIDDEN]);
        tiny.push_f32("output_norm.weight", &[HIDDEN], &[1.0; HIDDEN]);
        for norm in ["attn_norm", "ffn_norm"] {
            tiny.push_f32(&format!("blk.0.{norm}.weight"), &[HIDDEN], &[1.0; HIDDEN]);
        }
        if family.starts_with("bitnet") {
            tiny.push_f32("blk.0.attn_sub_norm.weight", &[HIDDEN], &[1.0; HIDDEN]);
            tiny.push_f32("blk.0.ffn_sub_norm.weight", &[FFN], &[1.0; FFN]);
        }
        if family == "qwen3" {
            tiny.push_f32("blk.0.attn_q_norm.weight", &[64], &[1.0; 64]);
            tiny.push_f32("blk.0.attn_k_norm.weight", &[64], &[1.0; 64]);
        }
        for (name, rows, cols) in matrices() {
            let mut bytes = vec![0b01_01_01_01; rows * cols / 4];
            bytes.extend(0.25f32.to_le_bytes());
            bytes.extend([0; 28]);
            tiny.push(&format!("blk.0.{name}.weight"), TensorType::I2_S, &[rows, cols], bytes);
        }
        tiny
    }

    fn set(&mut self, suffix: &str, value: Value) {
        self.metadata.set(format!("{}.{suffix}", self.family), value);
    }

    fn push(&mut self, name: &str, tensor_type: TensorType, shape: &[usize], bytes: Vec<u8>) {
        self.tensors.retain(|(spec, _)| spec.name != name);
        let spec = TensorSpec { name: name.into(), shape: shape.to_vec(), tensor_type };
        self.tensors.push((spec, bytes));
    }

    fn push_f32(&mut self, name: &str, shape: &[usize], values: &[f32]) {
        let bytes = values.iter().flat_map(|value| value.to_le_bytes()).collect();
        self.push(name, TensorType::F32, shape, bytes);
    }

    fn with_tokens(mut self, tokens: &[&str]) -> Self {
        self.metadata.set("tokenizer.ggml.model", string("gpt2"));
        self.metadata.set("tokenizer.ggml.tokens", strings(tokens));
        let types = tokens.iter().map(|token| if token.starts_with('<') { 3 } else { 1 });
        let types = Value::Array(Array::I32(types.collect()));
        self.metadata.set("tokenizer.ggml.token_type", types);
        self
    }

    fn bytes(&self) -> Vec<u8> {
        let specs: Vec<TensorSpec> = self.tensors.iter().map(|(spec, _)| spec.clone()).collect();
        let mut writer = GgufWriter::new(Vec::new(), "tiny", &self.metadata, &specs).unwrap();
        for (spec, bytes) in &self.tensors {
            writer.write_tensor(&spec.name, bytes).unwrap();
        }
        writer.finish().unwrap()
    }

    fn open(&self) -> Result<Checkpoint, Error> {
        open(self.bytes())
    }
}

fn open(bytes: Vec<u8>) -> Result<Checkpoint, Error> {
    Checkpoint::from_files(ModelFiles::in_memory("models", [("tiny.gguf", Bytes::from(bytes))]))
}

fn matrices() -> [(&'static str, usize, usize); 7] {
    [
        ("attn_q", HIDDEN, HIDDEN),
        ("attn_k", HIDDEN, HIDDEN),
        ("attn_v", HIDDEN, HIDDEN),
        ("attn_output", HIDDEN, HIDDEN),
        ("ffn_gate", FFN, HIDDEN),
        ("ffn_up", FFN, HIDDEN),
        ("ffn_down", HIDDEN, FFN),
    ]
}

#[test]
fn families_have_their_activation() {
    for (family, architecture, act) in [
        ("bitnet-b1.58", Architecture::Bitnet, HiddenAct::Relu2),
        ("bitnet-25", Architecture::Bitnet, HiddenAct::Relu2),
        ("bitnet", Architecture::Bitnet, HiddenAct::Silu),
        ("llama", Architecture::Llama, HiddenAct::Silu),
        ("qwen3", Architecture::Qwen3, HiddenAct::Silu),
    ] {
        let checkpoint = TinyGguf::new(family).open().unwrap();
        let config = checkpoint.config();
        assert_eq!((config.architecture, config.hidden_act), (architecture, act), "{family}");
        assert_eq!(config.name, "tiny");
        assert_eq!(
            (config.num_key_value_heads, config.head_dim, config.vocab_size),
            (2, 64, VOCAB)
        );
        assert_eq!(config.rope_theta, 10_000.0);
        assert!(config.tie_word_embeddings);
        assert_eq!(config.sub_norms, architecture == Architecture::Bitnet);
        assert_eq!(config.qk_norm, architecture == Architecture::Qwen3);
        read_all(&checkpoint).unwrap();
        let (_, scale, activations) = trits(&checkpoint, "model.layers.0.mlp.down_proj");
        assert_eq!((scale, activations), (0.25, ActivationQuant::PerToken));
    }
    let mut tiny = TinyGguf::new("bitnet");
    tiny.set("hidden_activation", string("relu2"));
    assert_eq!(tiny.open().unwrap().config().hidden_act, HiddenAct::Relu2);
    tiny.push_f32("output.weight", &[VOCAB, HIDDEN], &[0.5; VOCAB * HIDDEN]);
    assert!(!tiny.open().unwrap().config().tie_word_embeddings);
}

#[test]
fn rotary_settings() {
    let scaling = |change: fn(&mut TinyGguf)| {
        let mut tiny = TinyGguf::new("qwen3");
        change(&mut tiny);
        tiny.open().unwrap().config().rope_scaling.clone()
    };
    assert_eq!(scaling(|_| {}), RopeScaling::None);
    let linear = |tiny: &mut TinyGguf| {
        tiny.set("rope.scaling.type", string("linear"));
        tiny.set("rope.scaling.factor", Value::F32(2.0));
    };
    assert_eq!(scaling(linear), RopeScaling::Linear { factor: 2.0 });
    // What the converter of bitnet.cpp writes.
    let by_one = |tiny: &mut TinyGguf| {
        tiny.set("rope.scaling.type", string("linear"));
        tiny.set("rope.scaling.factor", Value::F32(1.0));
    };
    assert_eq!(scaling(by_one), RopeScaling::None);
    let factors = |tiny: &mut TinyGguf| tiny.push_f32("rope_freqs.weight", &[32], &[8.0; 32]);
    assert_eq!(scaling(factors), RopeScaling::Factors(vec![8.0; 32]));
    let ones = |tiny: &mut TinyGguf| tiny.push_f32("rope_freqs.weight", &[32], &[1.0; 32]);
    assert_eq!(scaling(ones), RopeScaling::None);
    // Bonsai 8B.
    let yarn = |tiny: &mut TinyGguf| {
        tiny.set("rope.scaling.type", string("yarn"));
        tiny.set("rope.scaling.factor", Value::F32(4.0));
        tiny.set("rope.scaling.original_context_length", Value::U32(16_384));
    };
    let RopeScaling::Yarn { factor, original_max_position_embeddings, attention_factor, .. } =
        scaling(yarn)
    else {
        panic!()
    };
    assert_eq!((factor, original_max_position_embeddings), (4.0, 16_384));
    assert!((attention_factor - 1.138_629_4).abs() < 1e-6);
}

const TOKENS: [&str; 6] = ["<|begin_of_text|>", "<|end_of_text|>", "<|eot_id|>", "a", "b", "ab"];

#[test]
fn mistakes_of_the_official_file_are_corrected_and_told() {
    let mut tiny = TinyGguf::new("bitnet-b1.58").with_tokens(&TOKENS);
    tiny.metadata.set("tokenizer.ggml.merges", strings(&["a b"]));
    tiny.metadata.set("tokenizer.ggml.bos_token_id", Value::U32(0));
    tiny.metadata.set("tokenizer.ggml.eos_token_id", Value::U32(1));
    tiny.metadata.set("tokenizer.ggml.padding_token_id", Value::U32(1));
    tiny.metadata.set("tokenizer.ggml.add_bos_token", Value::Bool(true));
    let template = "Human: {{ messages[0]['content'] }}\n\nBITNETAssistant: ";
    tiny.metadata.set("tokenizer.chat_template", string(template));
    let checkpoint = tiny.open().unwrap();
    let text = checkpoint.text();
    assert_eq!(text.eos_token_ids, [1, 2], "the file names one of two");
    assert_eq!((text.bos_token_id, text.add_bos), (Some(0), Some(true)));
    let used = text.chat_template.as_deref().unwrap();
    assert!(used.contains("<|eot_id|>") && !used.contains("BITNETAssistant"));
    let Some(TokenizerSource::Gguf(vocabulary)) = &text.tokenizer else { panic!() };
    assert_eq!(vocabulary.pre.as_deref(), Some("llama-bpe"));
    let pairs = [("bos_token", TOKENS[0]), ("eos_token", TOKENS[1]), ("pad_token", TOKENS[1])];
    let pairs: Vec<_> = pairs.map(|(a, b)| (a.to_owned(), b.to_owned())).into();
    assert_eq!(text.special_tokens, pairs);
    let told: Vec<_> = checkpoint.overrides().iter().map(|o| (o.what, o.found.as_str())).collect();
    assert_eq!(told, [("pre-tokenizer", "none"), ("end tokens", "1"), ("chat template", template)]);
    assert!(checkpoint.overrides().iter().all(|o| !o.used.is_empty() && !o.why.is_empty()));

    // The same words in a file of another family are its own business.
    let mut other = TinyGguf::new("llama").with_tokens(&TOKENS);
    other.metadata.set("tokenizer.chat_template", string(template));
    other.metadata.set("tokenizer.ggml.eos_token_id", Value::U32(2));
    other.metadata.set("tokenizer.ggml.eot_token_id", Value::U32(1));
    let checkpoint = other.open().unwrap();
    assert!(checkpoint.overrides().is_empty(), "{:?}", checkpoint.overrides());
    assert_eq!(checkpoint.text().chat_template.as_deref(), Some(template));
    assert_eq!(checkpoint.text().eos_token_ids, [1, 2]);
    let Some(TokenizerSource::Gguf(vocabulary)) = &checkpoint.text().tokenizer else { panic!() };
    assert_eq!(vocabulary.pre, None);
}

#[test]
fn a_file_without_tokenizer_has_no_text() {
    let text = TinyGguf::new("llama").open().unwrap().text().clone();
    assert!(
        text.tokenizer.is_none() && text.chat_template.is_none() && text.eos_token_ids.is_empty()
    );
}

/// Blocks of Q2_0, 64 columns with the scale of their row.
fn q2_0(rows: usize, cols: usize, scale: impl Fn(usize) -> f32) -> Vec<u8> {
    let mut bytes = Vec::new();
    for row in 0..rows {
        for _ in 0..cols / 64 {
            bytes.extend(half::f16::from_f32(scale(row)).to_le_bytes());
            bytes.extend([0b10_01_00_10; 16]);
        }
    }
    bytes
}

#[test]
fn several_scales_tell_of_float_activations() {
    // As Bonsai: ternary throughout, the embedding too.
    let mut tiny = TinyGguf::new("qwen3");
    for (name, rows, cols) in matrices() {
        let bytes = q2_0(rows, cols, |row| 0.5 + (row % 4) as f32);
        tiny.push(&format!("blk.0.{name}.weight"), TensorType::Q2_0, &[rows, cols], bytes);
    }
    let bytes = q2_0(VOCAB, HIDDEN, |row| 1.0 + row as f32);
    tiny.push("token_embd.weight", TensorType::Q2_0, &[VOCAB, HIDDEN], bytes);
    let checkpoint = tiny.open().unwrap();
    let linear = checkpoint.linear("model.layers.0.mlp.up_proj").unwrap();
    let Matrix::Ternary { weights, activations } = linear.matrix else { panic!() };
    assert_eq!(activations, ActivationQuant::PerGroup(32));
    let Scales::Row(scales) = weights.scales() else { panic!("{:?}", weights.scales()) };
    assert_eq!(scales[..5], [0.5, 1.5, 2.5, 3.5, 0.5]);
    let table = checkpoint.table("model.embed_tokens").unwrap();
    let mut row = [0.0; HIDDEN];
    table.decode_row(3, &mut row);
    assert_eq!(row[..4], [4.0, -4.0, 0.0, 4.0]);
    let count = checkpoint.weight_count();
    assert_eq!(count.ternary as usize, 4 * 128 * 128 + 3 * 128 * 256 + VOCAB * HIDDEN);

    // Scales of the rows of a BitNet model belong to its shards: its activations stay.
    let mut bitnet = TinyGguf::new("bitnet");
    let bytes = q2_0(FFN, HIDDEN, |row| 1.0 + (row / 128) as f32);
    bitnet.push("blk.0.ffn_up.weight", TensorType::Q2_0, &[FFN, HIDDEN], bytes);
    let linear = bitnet.open().unwrap().linear("model.layers.0.mlp.up_proj").unwrap();
    assert!(matches!(
        linear.matrix,
        Matrix::Ternary { activations: ActivationQuant::PerToken, .. }
    ));
}

#[test]
fn norms_biases_and_factors_of_projections() {
    let mut tiny = TinyGguf::new("qwen3");
    for (name, _, cols) in matrices() {
        tiny.push_f32(&format!("blk.0.{name}_norm_in.weight"), &[cols], &vec![2.0; cols]);
    }
    tiny.push_f32("blk.0.attn_v.bias", &[HIDDEN], &[3.0; HIDDEN]);
    tiny.push_f32("blk.0.attn_v.scale", &[1], &[4.0]);
    let checkpoint = tiny.open().unwrap();
    assert_eq!(checkpoint.config().projection_norm_eps, Some(1e-5));
    let linear = checkpoint.linear("model.layers.0.self_attn.v_proj").unwrap();
    let norm = linear.input_norm.unwrap();
    assert_eq!((norm.weight[0], norm.weight.len(), norm.eps), (2.0, HIDDEN, 1e-5));
    assert_eq!(linear.bias.unwrap(), [3.0; HIDDEN]);
    let Matrix::Ternary { weights, activations } = linear.matrix else { panic!() };
    assert_eq!((weights.scales(), activations), (&Scales::Tensor(1.0), ActivationQuant::PerToken));
}

#[test]
fn rows_of_llama_heads_come_in_halves() {
    let mut tiny = TinyGguf::new("llama");
    // The first column has the row's number, the others something no trit is.
    let values: Vec<f32> = (0..HIDDEN * HIDDEN)
        .map(|i| if i % HIDDEN == 0 { (i / HIDDEN) as f32 } else { 0.1 * i as f32 })
        .collect();
    tiny.push_f32("blk.0.attn_q.weight", &[HIDDEN, HIDDEN], &values);
    tiny.push_f32("blk.0.attn_v.weight", &[HIDDEN, HIDDEN], &values);
    let bias: Vec<f32> = (0..HIDDEN).map(|i| i as f32).collect();
    tiny.push_f32("blk.0.attn_q.bias", &[HIDDEN], &bias);
    for name in ["k", "v"] {
        tiny.push_f32(&format!("blk.0.attn_{name}.bias"), &[HIDDEN], &bias);
    }
    let checkpoint = tiny.open().unwrap();
    assert!(checkpoint.config().attention_bias);
    let first = |part: &str, row: usize| {
        let linear = checkpoint.linear(&format!("model.layers.0.self_attn.{part}")).unwrap();
        let Matrix::Float(rows) = linear.matrix else { panic!() };
        let mut out = [0.0; HIDDEN];
        rows.decode_row(row, &mut out);
        (out[0], linear.bias.unwrap()[row])
    };
    // Two heads of 64 features: row 1 lies third, row 32 second, row 64 first of its head.
    assert_eq!(first("q_proj", 1), (2.0, 2.0));
    assert_eq!(first("q_proj", 32), (1.0, 1.0));
    assert_eq!(first("q_proj", 64 + 33), (67.0, 67.0));
    assert_eq!(first("v_proj", 1), (1.0, 1.0));
}

#[track_caller]
fn refused(expected: &str, damage: impl FnOnce(&mut TinyGguf)) {
    let mut tiny = TinyGguf::new("llama").with_tokens(&TOKENS);
    damage(&mut tiny);
    let error = tiny.open().and_then(|checkpoint| read_all(&checkpoint)).unwrap_err().to_string();
    assert!(error.starts_with("models/tiny.gguf: "), "{error}");
    assert!(error.contains(expected), "{error:?} should contain {expected:?}");
}

#[test]
fn lies_are_named() {
    let key = |name: &str, value: Value| {
        let name = name.to_owned();
        move |tiny: &mut TinyGguf| {
            tiny.metadata.set(name, value);
        }
    };
    refused(
        "architecture gpt2 is not supported; supported: bitnet-b1.58",
        key("general.architecture", string("gpt2")),
    );
    refused("general.type adapter", key("general.type", string("adapter")));
    refused("GGUF split in 3 files", key("split.count", Value::U16(3)));
    refused("rotated (prism.hadamard)", key("prism.hadamard.version", Value::U32(1)));
    refused("expected an unsigned integer, got string", key("llama.block_count", string("1")));
    refused("num_hidden_layers: expected 1 to", key("llama.block_count", Value::U32(u32::MAX)));
    refused("tensor model.layers.1.", key("llama.block_count", Value::U32(2)));
    refused(
        "expected a divisor of embedding_length 128, got 3",
        key("llama.attention.head_count", Value::U32(3)),
    );
    refused(
        "num_key_value_heads: expected 1 to",
        key("llama.attention.head_count_kv", Value::U32(0)),
    );
    refused(
        "rope.dimension_count 32 is not supported",
        key("llama.rope.dimension_count", Value::U32(32)),
    );
    refused(
        "rms_norm_eps: expected a number above 0",
        key("llama.attention.layer_norm_rms_epsilon", Value::F32(f32::NAN)),
    );
    refused(
        "key llama.vocab_size: expected 8, as token_embd, got 9",
        key("llama.vocab_size", Value::U32(9)),
    );
    refused("expert_count 8", key("llama.expert_count", Value::U32(8)));
    refused("attention sliding window", key("llama.attention.sliding_window", Value::U32(16)));
    refused("rope.scaling.type longrope", key("llama.rope.scaling.type", string("longrope")));
    refused(
        "key tokenizer.ggml.bos_token_id: expected a token below 8, got 8",
        key("tokenizer.ggml.bos_token_id", Value::U32(8)),
    );
    refused(
        "key tokenizer.ggml.tokens: expected at most 8 tokens",
        key("tokenizer.ggml.tokens", strings(&["x"; 9])),
    );
    refused(
        "key tokenizer.ggml.token_type: expected 2 values",
        key("tokenizer.ggml.tokens", strings(&["x", "y"])),
    );
    refused(
        "key ternary.activation_group: expected a multiple of 16",
        key("ternary.activation_group", Value::U32(24)),
    );
    refused("shape of token_embd.weight: expected two sizes", |tiny| {
        tiny.push_f32("token_embd.weight", &[VOCAB * HIDDEN], &[0.5; VOCAB * HIDDEN]);
    });
    refused("number of rope factors: expected 32 (head_dim / 2), got 16", |tiny| {
        tiny.push_f32("rope_freqs.weight", &[16], &[2.0; 16]);
    });
    refused("rope factor: expected a number above 0", |tiny| {
        tiny.push_f32("rope_freqs.weight", &[32], &[0.0; 32]);
    });
    refused("rope_freqs.weight with rope.scaling is not supported", |tiny| {
        tiny.push_f32("rope_freqs.weight", &[32], &[2.0; 32]);
        tiny.set("rope.scaling.type", string("linear"));
        tiny.set("rope.scaling.factor", Value::F32(2.0));
    });
    refused("tensor model.layers.0.mlp.up_proj.weight is missing", |tiny| {
        tiny.tensors.retain(|(spec, _)| spec.name != "blk.0.ffn_up.weight");
    });
    refused("shape of blk.0.ffn_up.weight: expected [256, 128], got [128, 256]", |tiny| {
        let (_, bytes) =
            tiny.tensors.iter().find(|(s, _)| s.name == "blk.0.ffn_up.weight").unwrap();
        tiny.push("blk.0.ffn_up.weight", TensorType::I2_S, &[128, 256], bytes.clone());
    });
    refused("type of blk.0.ffn_up.weight Q2_K is not supported; supported: F32", |tiny| {
        tiny.push("blk.0.ffn_up.weight", TensorType(10), &[FFN, 2 * HIDDEN], vec![0; FFN * 84]);
    });
    refused(
        "scale of model.layers.0.mlp.up_proj.weight: expected a finite number, got NaN",
        |tiny| {
            let mut bytes = vec![0x55; FFN * HIDDEN / 4];
            bytes.extend(f32::NAN.to_le_bytes());
            bytes.extend([0; 28]);
            tiny.push("blk.0.ffn_up.weight", TensorType::I2_S, &[FFN, HIDDEN], bytes);
        },
    );
    refused("got code 3 in byte 0 of 8192", |tiny| {
        tiny.push(
            "blk.0.ffn_up.weight",
            TensorType::I2_S,
            &[FFN, HIDDEN],
            [vec![0xFF; FFN * HIDDEN / 4], vec![0; 32]].concat(),
        );
    });
    refused("type of model.norm.weight I2_S is not supported; supported: F32, F16, BF16", |tiny| {
        tiny.push("output_norm.weight", TensorType::I2_S, &[HIDDEN], vec![0; HIDDEN / 4 + 32]);
    });
    refused("tensor model.norm.weight: expected one name for it, got two", |tiny| {
        tiny.push_f32("model.norm.weight", &[HIDDEN], &[1.0; HIDDEN]);
    });
}

#[test]
fn a_folder_with_one_gguf_file_is_that_file() {
    let folder = tempfile::tempdir().unwrap();
    let bytes = TinyGguf::new("llama").bytes();
    std::fs::write(folder.path().join("a.gguf"), &bytes).unwrap();
    assert_eq!(Checkpoint::open(folder.path()).unwrap().config().name, "a");
    std::fs::write(folder.path().join("b.gguf"), &bytes).unwrap();
    let error = Checkpoint::open(folder.path()).unwrap_err().to_string();
    assert!(error.contains("GGUF files: expected one, got a.gguf, b.gguf"), "{error}");
}

#[test]
fn a_file_cut_anywhere_is_refused() {
    let whole = TinyGguf::new("bitnet").with_tokens(&TOKENS).bytes();
    // The first bytes one by one, the rest in steps.
    for len in (0..1000).chain((1000..whole.len() - 32).step_by(499)) {
        assert!(open(whole[..len].to_vec()).is_err(), "cut to {len} of {} bytes", whole.len());
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(512))]

    /// Whatever bits are wrong: a model that can be read, or an error; never a panic.
    #[test]
    fn flipped_bits_never_panic(places in prop::collection::vec((0usize..3000, 0u8..8), 1..4)) {
        let mut bytes = TinyGguf::new("bitnet-b1.58").with_tokens(&TOKENS).bytes();
        for (place, bit) in places {
            bytes[place] ^= 1 << bit;
        }
        if let Ok(checkpoint) = open(bytes) {
            let _ = read_all(&checkpoint);
            let _ = checkpoint.tensors();
        }
    }
}

#[test]
fn every_part_of_a_layer_has_a_gguf_name() {
    let checkpoint = TinyGguf::new("llama").open().unwrap();
    let entries = checkpoint.tensors();
    for part in PROJECTIONS {
        let name = format!("model.layers.0.{part}.weight");
        assert!(entries.iter().any(|entry| entry.name == name), "{name}");
    }
}

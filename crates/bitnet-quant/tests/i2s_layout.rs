//! Files of the unmarked I2_S layouts, made from the built-in model's trained weights.

use bitnet_core::weights::{Matrix, Scales, TernaryRows};
use bitnet_quant::Checkpoint;
use bitnet_quant::checkpoint::OpenOptions;
use bitnet_quant::gguf::{GgufFile, GgufWriter, Metadata, Tensor, TensorSpec, TensorType, Value};
use bitnet_quant::pack::{I2sLayout, Packing, encode};
use std::path::Path;
use std::sync::Arc;

const LAYERS: usize = 4;

fn built_in() -> Checkpoint {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("../bitnet-inference/builtin");
    Checkpoint::open(folder).unwrap()
}

fn ternary(checkpoint: &Checkpoint, path: &str) -> Arc<dyn TernaryRows> {
    match checkpoint.linear(path).unwrap().matrix {
        Matrix::Ternary { weights, .. } => weights,
        Matrix::Float(_) => panic!("{path} is ternary"),
    }
}

/// The feed-forward projections of a trained model, by GGUF name.
fn trained() -> Vec<(String, Arc<dyn TernaryRows>)> {
    let checkpoint = built_in();
    let parts = (0..LAYERS).flat_map(|layer| ["gate", "up", "down"].map(|part| (layer, part)));
    let tensor = |(layer, part)| {
        let weights = ternary(&checkpoint, &format!("model.layers.{layer}.mlp.{part}_proj"));
        (format!("blk.{layer}.ffn_{part}.weight"), weights)
    };
    parts.map(tensor).collect()
}

fn file(tensors: &[(String, Arc<dyn TernaryRows>)], layout: I2sLayout) -> GgufFile {
    let specs: Vec<TensorSpec> = tensors
        .iter()
        .map(|(name, weights)| TensorSpec {
            name: name.clone(),
            shape: vec![weights.rows(), weights.cols()],
            tensor_type: TensorType::I2_S,
        })
        .collect();
    let mut writer = GgufWriter::new(Vec::new(), "i2s.gguf", &Metadata::new(), &specs).unwrap();
    for (name, weights) in tensors {
        let encoded = encode(Packing::I2S(layout), &**weights, name).unwrap();
        writer.write_tensor(name, &encoded.bytes).unwrap();
    }
    GgufFile::from_bytes(writer.finish().unwrap(), "i2s.gguf").unwrap()
}

fn codes(weights: &dyn TernaryRows) -> Vec<u8> {
    let mut codes = vec![9; weights.rows() * weights.cols()];
    for (row, out) in codes.chunks_exact_mut(weights.cols()).enumerate() {
        weights.decode_row(row, out);
    }
    codes
}

#[test]
fn trained_weights_tell_their_layout() {
    let tensors = trained();
    for layout in I2sLayout::ALL {
        let file = file(&tensors, layout);
        assert_eq!(file.detect_i2s_layout(), Some(layout));
        // Read so, the weights are those that were written.
        let file = file.with_i2s_layout(layout);
        for (name, weights) in &tensors {
            let Tensor::Ternary(tensor) = file.tensor(name).unwrap() else { panic!("ternary") };
            assert_eq!(codes(&tensor), codes(&**weights));
        }
    }
    // Read as canonical, they are not.
    let (name, weights) = &tensors[0];
    let Tensor::Ternary(tensor) = file(&tensors, I2sLayout::Arm64).tensor(name).unwrap() else {
        panic!("ternary");
    };
    assert_ne!(codes(&tensor), codes(&**weights));
}

/// One layer is enough.
#[test]
fn one_trained_layer_tells_its_layout() {
    let tensors = trained();
    for layer in 0..LAYERS {
        for layout in I2sLayout::ALL {
            let file = file(&tensors[3 * layer..][..3], layout);
            assert_eq!(file.detect_i2s_layout(), Some(layout), "layer {layer}");
        }
    }
}

/// Writes the built-in model as bitnet.cpp would, with its I2_S tensors in `layout`.
fn write_model(path: &Path, layout: I2sLayout) {
    let model = built_in();
    let config = model.config();
    let mut metadata = Metadata::new();
    metadata.set("general.architecture", Value::String("bitnet-b1.58".into()));
    for (key, value) in [
        ("block_count", config.num_hidden_layers),
        ("context_length", config.max_position_embeddings),
        ("embedding_length", config.hidden_size),
        ("feed_forward_length", config.intermediate_size),
        ("attention.head_count", config.num_attention_heads),
        ("attention.head_count_kv", config.num_key_value_heads),
        ("rope.dimension_count", config.head_dim),
        ("vocab_size", config.vocab_size),
    ] {
        metadata.set(format!("bitnet-b1.58.{key}"), Value::U32(value as u32));
    }
    let eps = Value::F32(config.rms_norm_eps);
    metadata.set("bitnet-b1.58.attention.layer_norm_rms_epsilon", eps);

    let mut tensors = Vec::new();
    let mut add = |name: String, shape: Vec<usize>, tensor_type, bytes: Vec<u8>| {
        tensors.push((TensorSpec { name, shape, tensor_type }, bytes));
    };
    let floats = |values: &[f32]| values.iter().flat_map(|x| x.to_le_bytes()).collect::<Vec<u8>>();
    let shape = vec![config.vocab_size, config.hidden_size];
    let zeros = vec![0; 4 * config.vocab_size * config.hidden_size];
    add("token_embd.weight".into(), shape, TensorType::F32, zeros);
    let mut add_norm = |name: String, path: &str| {
        let weight = model.norm(path).unwrap().weight;
        add(name, vec![weight.len()], TensorType::F32, floats(&weight));
    };
    add_norm("output_norm.weight".into(), "model.norm");
    for layer in 0..config.num_hidden_layers {
        for (name, path) in [
            ("attn_norm", "input_layernorm"),
            ("attn_sub_norm", "self_attn.attn_sub_norm"),
            ("ffn_norm", "post_attention_layernorm"),
            ("ffn_sub_norm", "mlp.ffn_sub_norm"),
        ] {
            add_norm(format!("blk.{layer}.{name}.weight"), &format!("model.layers.{layer}.{path}"));
        }
    }
    for layer in 0..config.num_hidden_layers {
        for (name, path) in [
            ("attn_q", "self_attn.q_proj"),
            ("attn_k", "self_attn.k_proj"),
            ("attn_v", "self_attn.v_proj"),
            ("attn_output", "self_attn.o_proj"),
            ("ffn_gate", "mlp.gate_proj"),
            ("ffn_up", "mlp.up_proj"),
            ("ffn_down", "mlp.down_proj"),
        ] {
            let weights = ternary(&model, &format!("model.layers.{layer}.{path}"));
            let bytes = encode(Packing::I2S(layout), &*weights, name).unwrap().bytes;
            let shape = vec![weights.rows(), weights.cols()];
            add(format!("blk.{layer}.{name}.weight"), shape, TensorType::I2_S, bytes);
        }
    }
    let specs: Vec<_> = tensors.iter().map(|(spec, _)| spec.clone()).collect();
    let out = std::fs::File::create(path).unwrap();
    let mut writer = GgufWriter::new(out, path, &metadata, &specs).unwrap();
    for (spec, bytes) in &tensors {
        writer.write_tensor(&spec.name, bytes).unwrap();
    }
    writer.finish().unwrap();
}

#[test]
fn a_model_in_another_layout_opens_healed_and_says_so() {
    let folder = tempfile::tempdir().unwrap();
    let expected = built_in();
    for layout in I2sLayout::ALL {
        let path = folder.path().join(format!("{layout}.gguf"));
        write_model(&path, layout);
        let opened = Checkpoint::open(&path).unwrap();
        for path in ["self_attn.q_proj", "self_attn.o_proj", "mlp.down_proj"] {
            let path = format!("model.layers.1.{path}");
            assert_eq!(codes(&*ternary(&opened, &path)), codes(&*ternary(&expected, &path)));
        }
        let healed = opened.overrides().iter().find(|change| change.what == "I2_S layout");
        let used = healed.map(|change| change.used.clone());
        assert_eq!(used, (layout != I2sLayout::Canonical128).then(|| layout.to_string()));

        // Who knows better is believed.
        let options = OpenOptions { i2s_layout: Some(I2sLayout::Canonical128) };
        let forced = Checkpoint::open_with(&path, options).unwrap();
        assert!(forced.overrides().iter().all(|change| change.what != "I2_S layout"));
        let path = "model.layers.1.mlp.down_proj";
        let same = codes(&*ternary(&forced, path)) == codes(&*ternary(&expected, path));
        assert_eq!(same, layout == I2sLayout::Canonical128);
    }
}

/// Weights of the same density without a history.
struct Random {
    rows: usize,
    cols: usize,
    seed: u32,
}

impl TernaryRows for Random {
    fn rows(&self) -> usize {
        self.rows
    }
    fn cols(&self) -> usize {
        self.cols
    }
    fn scales(&self) -> &Scales {
        &Scales::Tensor(1.0)
    }
    fn decode_row(&self, row: usize, out: &mut [u8]) {
        let mut state = (row as u32).wrapping_mul(0x9E37_79B9) ^ self.seed;
        for code in out {
            state ^= state << 13;
            state ^= state >> 17;
            state ^= state << 5;
            *code = (state % 3) as u8;
        }
    }
}

#[test]
fn untrained_weights_tell_nothing() {
    for seed in 1..20u32 {
        let random = |rows, cols, part| -> Arc<dyn TernaryRows> {
            Arc::new(Random { rows, cols, seed: seed.wrapping_mul(0x85EB_CA6B) ^ (part << 24) })
        };
        let tensors: Vec<_> = (0..LAYERS as u32)
            .flat_map(|layer| {
                [
                    (format!("blk.{layer}.ffn_gate.weight"), random(768, 256, 3 * layer)),
                    (format!("blk.{layer}.ffn_up.weight"), random(768, 256, 3 * layer + 1)),
                    (format!("blk.{layer}.ffn_down.weight"), random(256, 768, 3 * layer + 2)),
                ]
            })
            .collect();
        assert_eq!(file(&tensors, I2sLayout::Canonical128).detect_i2s_layout(), None);
    }
}

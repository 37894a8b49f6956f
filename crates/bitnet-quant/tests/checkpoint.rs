//! Opens the golden models in every form they are stored in and compares what is in them.

mod common;

use bitnet_core::weights::{ActivationQuant, Matrix, Scales};
use bitnet_quant::Checkpoint;
use bitnet_quant::checkpoint::{FileFormat, ModelFiles};
use bitnet_quant::config::{Architecture, HiddenAct, ModelConfig, RopeScaling};
use bitnet_quant::text::TokenizerSource;
use bytes::Bytes;
use common::{PROJECTIONS, Tiny, floats, golden, golden_path, trits};

/// The forms of one golden model hold the same trits and, within the rounding of their inverses
/// and means, the same scales.
fn forms_agree(model: &str, forms: &[&str]) {
    let first = golden(&format!("{model}/{}", forms[0]));
    for form in &forms[1..] {
        let other = golden(&format!("{model}/{form}"));
        for layer in 0..first.config().num_hidden_layers {
            for part in PROJECTIONS {
                let path = format!("model.layers.{layer}.{part}");
                let (codes, scale, activations) = trits(&first, &path);
                let (other_codes, other_scale, other_activations) = trits(&other, &path);
                assert!(codes == other_codes, "{form} {path}");
                assert_eq!(activations, ActivationQuant::PerToken);
                assert_eq!(other_activations, ActivationQuant::PerToken);
                // Two roundings to f32 lie between a scale and the inverse of its inverse.
                let error = (scale - other_scale).abs() / scale;
                assert!(error <= f32::EPSILON, "{form} {path}: {scale} and {other_scale}");
            }
        }
        for path in ["model.norm", "model.layers.0.input_layernorm"] {
            assert_eq!(first.norm(path).unwrap(), other.norm(path).unwrap(), "{form} {path}");
        }
        assert_eq!(first.config().vocab_size, other.config().vocab_size);
        assert_eq!(first.total_weight_count(), other.total_weight_count(), "{form}");
        assert_eq!(first.weight_count(), other.weight_count(), "{form}");
    }
}

#[test]
fn all_forms_of_bitnet_tiny_hold_the_same_trits() {
    forms_agree("bitnet-tiny", &["packed_multiply", "packed_divide", "online", "model-i2_s.gguf"]);
}

#[test]
fn both_packings_of_the_silu_gguf_hold_the_same_trits() {
    forms_agree("gguf-bitnet-silu", &["model-tq2_0.gguf", "model-tq1_0.gguf"]);
}

#[test]
fn settings_of_gguf_files() {
    let checkpoint = golden("bitnet-tiny/model-i2_s.gguf");
    let folder = golden("bitnet-tiny/packed_multiply");
    let expected = ModelConfig { name: "model-i2_s".into(), ..folder.config().clone() };
    assert_eq!(checkpoint.config(), &expected);
    assert_eq!(checkpoint.file_format(), FileFormat::Gguf(3));
    let text = checkpoint.text();
    assert_eq!((text.bos_token_id, &text.eos_token_ids[..]), (Some(1), &[2][..]));
    assert_eq!((text.add_bos, text.chat_template.as_ref()), (Some(true), None));
    let Some(TokenizerSource::Gguf(vocabulary)) = &text.tokenizer else { panic!("{text:?}") };
    assert_eq!((vocabulary.model.as_str(), vocabulary.tokens.len()), ("gpt2", 320));
    let entries = checkpoint.tensors();
    let packed = entries.iter().find(|t| t.file_name == "blk.1.ffn_down.weight").unwrap();
    assert_eq!(packed.name, "model.layers.1.mlp.down_proj.weight");
    assert_eq!((&packed.type_name[..], packed.bytes), ("I2_S", 128 * 256 / 4 + 32));

    let silu = golden("gguf-bitnet-silu/model-tq2_0.gguf");
    assert_eq!(silu.config().hidden_act, HiddenAct::Silu);
    assert_eq!(silu.config().architecture, Architecture::Bitnet);
    assert!(checkpoint.overrides().is_empty() && silu.overrides().is_empty());
}

#[test]
fn all_forms_of_llama_ternary_tiny_hold_the_same_trits() {
    forms_agree("llama-ternary-tiny", &["packed_multiply", "packed_divide", "online"]);
}

#[test]
fn settings_of_bitnet_tiny() {
    let checkpoint = golden("bitnet-tiny/packed_multiply");
    let config = checkpoint.config();
    assert_eq!(config.architecture, Architecture::Bitnet);
    assert_eq!(config.name, "packed_multiply");
    assert_eq!((config.hidden_size, config.intermediate_size), (128, 256));
    assert_eq!((config.num_attention_heads, config.num_key_value_heads), (4, 2));
    assert_eq!((config.head_dim, config.vocab_size), (32, 320));
    assert_eq!((config.rope_theta, &config.rope_scaling), (500_000.0, &RopeScaling::None));
    assert_eq!(config.hidden_act, HiddenAct::Relu2);
    assert!(config.tie_word_embeddings && config.sub_norms && !config.qk_norm);
    assert_eq!(checkpoint.file_format(), FileFormat::Safetensors);
    assert!(checkpoint.has("model.layers.1.mlp.ffn_sub_norm") && !checkpoint.has("lm_head"));
    let text = checkpoint.text();
    assert_eq!((text.bos_token_id, &text.eos_token_ids[..]), (Some(1), &[2][..]));
    assert_eq!(text.add_bos, Some(true));
    assert!(text.chat_template.as_ref().unwrap().contains("Assistant"));
    // Two layers of 128·(128 + 64 + 64 + 128) + 3·128·256 trits; an embedding of 320·128 and norms
    // of 128, 128, 128, 256 a layer and 128 at the end.
    let count = checkpoint.weight_count();
    assert_eq!(count.ternary, 2 * (128 * 384 + 3 * 128 * 256));
    assert_eq!(count.float, 320 * 128 + 2 * 640 + 128);
    let packed = checkpoint.tensors();
    let packed = packed.iter().find(|t| t.name.ends_with("1.mlp.down_proj.weight")).unwrap();
    assert_eq!((&packed.shape[..], &packed.type_name[..]), (&[128, 256][..], "packed uint8"));
    assert_eq!((packed.bytes, packed.bits_per_weight), (128 * 256 / 4, 2.0));
}

#[test]
fn settings_of_llama_ternary_tiny() {
    let checkpoint = golden("llama-ternary-tiny/online");
    let config = checkpoint.config();
    assert_eq!(config.architecture, Architecture::Llama);
    assert_eq!(config.hidden_act, HiddenAct::Silu);
    assert!(!config.tie_word_embeddings && !config.sub_norms);
    let scaling = RopeScaling::Llama3 {
        factor: 8.0,
        low_freq_factor: 1.0,
        high_freq_factor: 4.0,
        original_max_position_embeddings: 64,
    };
    assert_eq!(config.rope_scaling, scaling);
    let head = checkpoint.table("lm_head").unwrap();
    assert_eq!((head.rows(), head.cols()), (320, 128));
    assert_ne!(floats(&*head), floats(&*checkpoint.table("model.embed_tokens").unwrap()));
}

#[test]
fn the_built_in_model_opens_from_memory_without_a_copy() {
    let folder = concat!(env!("CARGO_MANIFEST_DIR"), "/../bitnet-inference/builtin");
    let read = |name: &str| Bytes::from(std::fs::read(format!("{folder}/{name}")).unwrap());
    let weights = read("model.safetensors");
    let range = weights.as_ptr_range();
    let names = ["config.json", "tokenizer.json", "tokenizer_config.json"];
    let files = names.into_iter().map(|name| (name, read(name)));
    let files = files.chain([("model.safetensors", weights)]);
    let checkpoint = Checkpoint::from_files(ModelFiles::in_memory("builtin", files)).unwrap();
    assert_eq!(checkpoint.config().name, "builtin");
    let (_, bytes) = checkpoint.table("model.embed_tokens").unwrap().raw().unwrap();
    assert!(range.contains(&bytes.as_ptr()), "the table is the file's own bytes");
    for part in PROJECTIONS {
        trits(&checkpoint, &format!("model.layers.0.{part}"));
    }
    let on_disk = Checkpoint::open(folder).unwrap();
    assert_eq!(on_disk.total_weight_count(), checkpoint.total_weight_count());
}

#[test]
fn a_file_of_a_folder_opens_as_the_folder() {
    let folder = golden_path("bitnet-tiny/online");
    for file in ["model.safetensors", "config.json"] {
        let checkpoint = Checkpoint::open(folder.join(file)).unwrap();
        assert_eq!(checkpoint.config().name, "online");
    }
}

#[test]
fn an_embedding_model_without_its_head_is_bitnet_by_its_norms() {
    let mut tiny = Tiny::sized(128, 256);
    tiny.config["model_type"] = "qwen3".into();
    tiny.config["head_dim"] = 64.into();
    tiny.config.as_object_mut().unwrap().remove("quantization_config");
    for part in PROJECTIONS {
        let path = format!("model.layers.0.{part}");
        tiny.remove(&format!("{path}.weight_scale"));
        let (planned, packed) = tiny.remove(&format!("{path}.weight"));
        let shape = [planned.shape[0] * 4, planned.shape[1]];
        let values: Vec<f32> = (0..packed.len() * 4).map(|i| (i % 7) as f32 - 3.0).collect();
        tiny.push_f32(&planned.name, &shape, &values);
        tiny.push_f32(&format!("{path}.norm.weight"), &[shape[1]], &vec![2.0; shape[1]]);
    }
    for norm in ["q_norm", "k_norm"] {
        tiny.push_f32(&format!("model.layers.0.self_attn.{norm}.weight"), &[64], &[1.0; 64]);
    }
    // As a model saved without its head names its tensors.
    for (planned, _) in &mut tiny.tensors {
        planned.name = planned.name.strip_prefix("model.").unwrap().to_owned();
    }
    let checkpoint = tiny.open().unwrap();
    assert_eq!(checkpoint.config().projection_norm_eps, Some(1e-6));
    let linear = checkpoint.linear("model.layers.0.mlp.down_proj").unwrap();
    assert_eq!(linear.input_norm.unwrap().weight, [2.0; 256]);
    let Matrix::Ternary { weights, activations } = linear.matrix else { panic!() };
    assert_eq!(activations, ActivationQuant::PerToken);
    // mean|W| of −3 … 3 is 12/7, give or take the last few columns.
    let Scales::Tensor(scale) = weights.scales() else { panic!() };
    assert!((scale - 12.0 / 7.0).abs() < 1e-3, "{scale}");
    let mut codes = [9; 256];
    weights.decode_row(0, &mut codes);
    assert_eq!(codes[..7], [0, 0, 0, 1, 2, 2, 2]);
}

#[test]
fn offline_trits_stored_as_floats_take_their_scale() {
    let mut tiny = Tiny::new();
    for part in PROJECTIONS {
        let name = format!("model.layers.0.{part}.weight");
        let (planned, packed) = tiny.remove(&name);
        let shape = [planned.shape[0] * 4, planned.shape[1]];
        let values: Vec<f32> = (0..packed.len() * 4).map(|i| (i % 3) as f32 - 1.0).collect();
        tiny.push_f32(&name, &shape, &values);
    }
    for (class, scale) in [("autobitlinear", 0.25), ("bitlinear", 4.0)] {
        tiny.config["quantization_config"]["linear_class"] = class.into();
        let (codes, found, activations) =
            trits(&tiny.open().unwrap(), "model.layers.0.self_attn.v_proj");
        assert_eq!((found, activations), (scale, ActivationQuant::PerToken));
        assert_eq!(codes[..4], [0, 1, 2, 0]);
    }
}

#[test]
fn modules_not_converted_stay_float() {
    let mut tiny = Tiny::new();
    tiny.config["quantization_config"]["modules_to_not_convert"] = serde_json::json!(["down_proj"]);
    let name = "model.layers.0.mlp.down_proj.weight";
    tiny.remove(name);
    let values: Vec<f32> = (0..512).map(|i| i as f32).collect();
    tiny.push_f32(name, &[16, 32], &values);
    let checkpoint = tiny.open().unwrap();
    let matrix = checkpoint.linear("model.layers.0.mlp.down_proj").unwrap().matrix;
    let Matrix::Float(rows) = matrix else { panic!() };
    assert_eq!(floats(&*rows), values);
    let all = checkpoint.weight_count();
    assert_eq!((all.ternary, all.float), (4 * 256 + 2 * 512, 512 + 128 + 3 * 16));
}

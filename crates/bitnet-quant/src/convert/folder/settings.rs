//! The settings of a Hugging Face folder: `config.json` and `tokenizer_config.json`.

use super::{CONFIG, MAX_TEXT_FILE};
use crate::checkpoint::Origin;
use crate::config::{Architecture, HiddenAct, ModelConfig, RopeScaling};
use crate::convert::ScaleUse;
use crate::convert::source::{Content, Item, Source};
use crate::error::{Error, Result};
use crate::text::TextAssets;
use serde_json::{Value, json};

/// The new `config.json`: the source's own, if it has one, with what changes.
pub(super) fn config_json(
    source: &Source<'_>,
    scale_use: ScaleUse,
    items: &[Item],
) -> Result<Value> {
    let config = source.checkpoint.config();
    let mut json = match &source.checkpoint.parts().origin {
        Origin::Folder(files) => {
            let own = files.read(CONFIG, MAX_TEXT_FILE)?.unwrap_or_default();
            serde_json::from_slice(&own).map_err(|e| Error::from(e).in_file(files.label(CONFIG)))?
        }
        Origin::Gguf(_) => {
            json!({ "rope_theta": config.rope_theta, "rope_scaling": rope(config)? })
        }
    };
    let settings = shape(config);
    let object = json.as_object_mut();
    let object = object.ok_or_else(|| Error::malformed(CONFIG, "an object", "something else"))?;
    object.extend(settings.as_object().cloned().unwrap_or_default());
    for outdated in ["weight_bits", "input_bits", "auto_map", "quantization_config"] {
        object.remove(outdated);
    }
    if let Origin::Gguf(_) = source.checkpoint.parts().origin {
        let text = source.checkpoint.text();
        object.insert("bos_token_id".into(), json!(text.bos_token_id));
        object.insert("eos_token_id".into(), json!(text.eos_token_ids));
    }
    if items.iter().any(|item| matches!(item.content, Content::Ternary(_))) {
        object.insert("quantization_config".into(), quantization(scale_use, config, items));
    }
    Ok(json)
}

/// `config.json` of a model that has none yet, without special tokens and quantization.
pub(in crate::convert) fn new_config_json(config: &ModelConfig) -> Result<Value> {
    let mut json = json!({ "rope_theta": config.rope_theta, "rope_scaling": rope(config)? });
    if let (Some(object), Value::Object(settings)) = (json.as_object_mut(), shape(config)) {
        object.extend(settings);
    }
    Ok(json)
}

/// What `config.json` says of the shape of a model.
fn shape(config: &ModelConfig) -> Value {
    let (class, model_type) = match config.architecture {
        Architecture::Bitnet => ("BitNetForCausalLM", "bitnet"),
        Architecture::Llama => ("LlamaForCausalLM", "llama"),
        Architecture::Qwen3 => ("Qwen3ForCausalLM", "qwen3"),
    };
    json!({
        "architectures": [class],
        "model_type": model_type,
        "hidden_size": config.hidden_size,
        "intermediate_size": config.intermediate_size,
        "num_hidden_layers": config.num_hidden_layers,
        "num_attention_heads": config.num_attention_heads,
        "num_key_value_heads": config.num_key_value_heads,
        "head_dim": config.head_dim,
        "vocab_size": config.vocab_size,
        "max_position_embeddings": config.max_position_embeddings,
        "rms_norm_eps": shortest(config.rms_norm_eps),
        "hidden_act": match config.hidden_act {
            HiddenAct::Relu2 => "relu2",
            HiddenAct::Silu => "silu",
        },
        "attention_bias": config.attention_bias,
        "tie_word_embeddings": config.tie_word_embeddings,
    })
}

fn quantization(scale_use: ScaleUse, config: &ModelConfig, items: &[Item]) -> Value {
    let float = |item: &Item| match item.content {
        Content::Float(_) => item.name.strip_suffix(".weight").map(str::to_owned),
        _ => None,
    };
    let not_converted: Vec<String> =
        std::iter::once("lm_head".to_owned()).chain(items.iter().filter_map(float)).collect();
    let mut quantization = json!({
        "quant_method": "bitnet",
        "linear_class": match scale_use {
            ScaleUse::Multiply => "autobitlinear",
            ScaleUse::Divide => "bitlinear",
        },
        "quantization_mode": "offline",
        "modules_to_not_convert": not_converted,
    });
    if let Some(eps) = config.projection_norm_eps {
        quantization["use_rms_norm"] = json!(true);
        quantization["rms_norm_eps"] = shortest(eps);
    }
    quantization
}

/// The number with the fewest digits that reads as this f32.
fn shortest(value: f32) -> Value {
    json!(value.to_string().parse::<f64>().unwrap_or(value.into()))
}

fn rope(config: &ModelConfig) -> Result<Value> {
    Ok(match &config.rope_scaling {
        RopeScaling::None => Value::Null,
        RopeScaling::Linear { factor } => json!({"rope_type": "linear", "factor": factor}),
        RopeScaling::Llama3 {
            factor,
            low_freq_factor,
            high_freq_factor,
            original_max_position_embeddings,
        } => json!({
            "rope_type": "llama3",
            "factor": factor,
            "low_freq_factor": low_freq_factor,
            "high_freq_factor": high_freq_factor,
            "original_max_position_embeddings": original_max_position_embeddings,
        }),
        RopeScaling::Yarn {
            factor,
            original_max_position_embeddings,
            beta_fast,
            beta_slow,
            attention_factor,
        } => json!({
            "rope_type": "yarn",
            "factor": factor,
            "original_max_position_embeddings": original_max_position_embeddings,
            "beta_fast": beta_fast,
            "beta_slow": beta_slow,
            "attention_factor": attention_factor,
        }),
        RopeScaling::Factors(factors) => {
            let found = llama3_of(factors, config).ok_or_else(|| {
                let reason = "config.json has no name for its divisors of frequencies";
                Error::does_not_fit("rope scaling", "Hugging Face", reason)
            })?;
            return rope(&ModelConfig { rope_scaling: found, ..config.clone() });
        }
    })
}

/// The Llama 3 settings that give these divisors. All published models blend between one and four
/// turns in a context that is a power of two.
fn llama3_of(factors: &[f32], config: &ModelConfig) -> Option<RopeScaling> {
    let factor = f64::from(factors.iter().copied().fold(1.0, f32::max));
    (6..=20).map(|power| 1 << power).find_map(|original| {
        let rope_scaling = RopeScaling::Llama3 {
            factor,
            low_freq_factor: 1.0,
            high_freq_factor: 4.0,
            original_max_position_embeddings: original,
        };
        let candidate = ModelConfig { rope_scaling, ..config.clone() };
        let divisors = candidate.rope_divisors();
        let near = |(a, b): (&f32, &f64)| (f64::from(*a) - b).abs() <= 1e-4 * b;
        factors.iter().zip(&divisors).all(near).then_some(candidate.rope_scaling)
    })
}

/// A new `tokenizer_config.json`.
pub(super) fn tokenizer_config(text: &TextAssets, config: &ModelConfig) -> Value {
    let mut settings = json!({
        "tokenizer_class": "PreTrainedTokenizerFast",
        "model_max_length": config.max_position_embeddings,
        "clean_up_tokenization_spaces": false,
        "add_eos_token": text.add_eos,
    });
    if let Some(add_bos) = text.add_bos {
        settings["add_bos_token"] = json!(add_bos);
    }
    for (name, token) in &text.special_tokens {
        settings[name] = json!(token);
    }
    if let Some(template) = &text.chat_template {
        settings["chat_template"] = json!(template);
    }
    settings
}

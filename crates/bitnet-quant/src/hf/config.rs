//! Reads `config.json`: hyper-parameters, and how the projections of a checkpoint are quantized.
//!
//! Each family's defaults are those of its class in transformers, since files leave out what
//! equals them. Knows no tensors: what only they can tell (sub-norms, norms on heads) is added by
//! the checkpoint.

use crate::config::{Architecture, HiddenAct, ModelConfig, RopeScaling};
use crate::error::{Error, Result};
use serde::Deserialize;

/// What a `config.json` says.
#[derive(Debug, Clone)]
pub(crate) struct HfConfig {
    pub(crate) model: ModelConfig,
    pub(crate) quantization: Option<Quantization>,
    /// Epsilon of norms inside projections, if there are any.
    pub(crate) projection_norm_eps: f32,
    pub(crate) bos_token_id: Option<u32>,
    pub(crate) eos_token_ids: Vec<u32>,
}

/// How the projections of a BitNet checkpoint are stored.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Quantization {
    pub(crate) mode: Mode,
    /// What `weight_scale` does to a product.
    pub(crate) scale_use: ScaleUse,
    /// Modules left in float.
    pub(crate) modules_to_not_convert: Vec<String>,
}

/// Whether trits are stored or made at load.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Mode {
    /// Trits and a scale.
    Offline,
    /// Float masters, quantized by their mean.
    Online,
    /// Floats that are trits times a scale if they look so, and masters if not.
    Either,
}

/// What `weight_scale` does to a product: the two classes of linear layers in transformers differ.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum ScaleUse {
    /// `autobitlinear`: the product is multiplied by it.
    Multiply,
    /// `bitlinear`: the product is divided by it.
    Divide,
}

/// `config.json` as it is written. Unknown keys are passed over.
#[derive(Deserialize)]
struct Raw {
    model_type: Option<String>,
    architectures: Option<Vec<String>>,
    hidden_size: Option<usize>,
    intermediate_size: Option<usize>,
    num_hidden_layers: Option<usize>,
    num_attention_heads: Option<usize>,
    num_key_value_heads: Option<usize>,
    head_dim: Option<usize>,
    vocab_size: Option<usize>,
    max_position_embeddings: Option<usize>,
    rms_norm_eps: Option<f32>,
    rope_theta: Option<f64>,
    rope_scaling: Option<RawRope>,
    rope_parameters: Option<RawRope>,
    partial_rotary_factor: Option<f64>,
    hidden_act: Option<String>,
    tie_word_embeddings: Option<bool>,
    attention_bias: Option<bool>,
    use_sliding_window: Option<bool>,
    sliding_window: Option<usize>,
    layer_types: Option<Vec<String>>,
    bos_token_id: Option<TokenIds>,
    eos_token_id: Option<TokenIds>,
    quantization_config: Option<RawQuantization>,
    quantization: Option<serde::de::IgnoredAny>,
    weight_bits: Option<u32>,
    input_bits: Option<u32>,
}

#[derive(Deserialize)]
struct RawRope {
    rope_type: Option<String>,
    r#type: Option<String>,
    rope_theta: Option<f64>,
    factor: Option<f64>,
    low_freq_factor: Option<f64>,
    high_freq_factor: Option<f64>,
    original_max_position_embeddings: Option<usize>,
    beta_fast: Option<f64>,
    beta_slow: Option<f64>,
    attention_factor: Option<f64>,
    truncate: Option<bool>,
    partial_rotary_factor: Option<f64>,
}

#[derive(Deserialize)]
struct RawQuantization {
    quant_method: Option<String>,
    linear_class: Option<String>,
    quantization_mode: Option<String>,
    modules_to_not_convert: Option<Vec<String>>,
    use_rms_norm: Option<bool>,
    rms_norm_eps: Option<f32>,
}

/// One token id, or several, or null.
#[derive(Deserialize)]
#[serde(untagged)]
pub(super) enum TokenIds {
    One(u32),
    Many(Vec<u32>),
}

impl TokenIds {
    pub(super) fn into_vec(self) -> Vec<u32> {
        match self {
            Self::One(id) => vec![id],
            Self::Many(ids) => ids,
        }
    }
}

/// The names of the supported families, for messages.
const FAMILIES: &str = "bitnet, llama, qwen3";

/// Reads `config.json`; `name` is the model's name for people.
pub(crate) fn parse(json: &[u8], name: String) -> Result<HfConfig> {
    let raw: Raw = serde_json::from_slice(json)?;
    let architecture = architecture(&raw)?;
    let quantization = quantization(&raw)?;
    let model = model(&raw, architecture, name)?;
    let from_quantization = raw.quantization_config.as_ref().and_then(|q| match q.use_rms_norm {
        Some(true) => Some(q.rms_norm_eps.unwrap_or(1e-6)),
        _ => None,
    });
    Ok(HfConfig {
        projection_norm_eps: from_quantization.unwrap_or(model.rms_norm_eps),
        model,
        quantization,
        bos_token_id: raw.bos_token_id.and_then(|ids| ids.into_vec().first().copied()),
        eos_token_ids: raw.eos_token_id.map(TokenIds::into_vec).unwrap_or_default(),
    })
}

fn architecture(raw: &Raw) -> Result<Architecture> {
    let classes = raw.architectures.as_deref().unwrap_or_default();
    // The 1bitLLM reproductions call their model type `llama`, but their layers are BitNet's.
    if classes.iter().any(|class| class.eq_ignore_ascii_case("BitnetForCausalLM")) {
        return Ok(Architecture::Bitnet);
    }
    match raw.model_type.as_deref() {
        Some("bitnet") => Ok(Architecture::Bitnet),
        Some("llama") => Ok(Architecture::Llama),
        Some("qwen3") => Ok(Architecture::Qwen3),
        Some(other) => Err(Error::unsupported("model_type", other, FAMILIES)),
        None => Err(Error::missing("model_type")),
    }
}

fn model(raw: &Raw, architecture: Architecture, name: String) -> Result<ModelConfig> {
    let need = |value: Option<usize>, key: &str| value.ok_or_else(|| Error::missing(key));
    let hidden_size = need(raw.hidden_size, "hidden_size")?;
    let heads = need(raw.num_attention_heads, "num_attention_heads")?;
    let default_eps = if architecture == Architecture::Bitnet { 1e-5 } else { 1e-6 };
    let max_position_embeddings = raw.max_position_embeddings.unwrap_or(match architecture {
        Architecture::Bitnet | Architecture::Llama => 2048,
        Architecture::Qwen3 => 32_768,
    });
    // Qwen3 has the switch and it is off by default; elsewhere a window alone may well be meant.
    let switched_on = raw.use_sliding_window.unwrap_or(architecture != Architecture::Qwen3);
    let bounded = raw.sliding_window.is_some_and(|w| (1..max_position_embeddings).contains(&w));
    if raw.use_sliding_window == Some(true)
        || switched_on && bounded
        || raw.layer_types.iter().flatten().any(|kind| kind != "full_attention")
    {
        let supported = "full attention (`use_sliding_window`: false asks for it)";
        return Err(Error::unsupported("attention", "sliding window", supported));
    }
    let model = ModelConfig {
        architecture,
        name,
        hidden_size,
        intermediate_size: need(raw.intermediate_size, "intermediate_size")?,
        num_hidden_layers: need(raw.num_hidden_layers, "num_hidden_layers")?,
        num_attention_heads: heads,
        num_key_value_heads: raw.num_key_value_heads.unwrap_or(heads),
        head_dim: head_dim(raw.head_dim, architecture, hidden_size, heads)?,
        vocab_size: need(raw.vocab_size, "vocab_size")?,
        max_position_embeddings,
        rms_norm_eps: raw.rms_norm_eps.unwrap_or(default_eps),
        rope_theta: rope_theta(raw, architecture),
        rope_scaling: rope_scaling(raw, max_position_embeddings)?,
        hidden_act: hidden_act(raw.hidden_act.as_deref(), architecture)?,
        tie_word_embeddings: raw.tie_word_embeddings.unwrap_or(false),
        sub_norms: architecture == Architecture::Bitnet,
        qk_norm: architecture == Architecture::Qwen3,
        projection_norm_eps: None,
        attention_bias: raw.attention_bias.unwrap_or(false),
    };
    model.validate()?;
    Ok(model)
}

fn head_dim(
    stated: Option<usize>,
    architecture: Architecture,
    hidden_size: usize,
    heads: usize,
) -> Result<usize> {
    match (stated, architecture) {
        (Some(head_dim), _) => Ok(head_dim),
        (None, Architecture::Qwen3) => Ok(128),
        (None, _) if heads > 0 && hidden_size.is_multiple_of(heads) => Ok(hidden_size / heads),
        (None, _) => {
            let expected = format!("a divisor of hidden_size {hidden_size}");
            Err(Error::malformed("num_attention_heads", expected, heads))
        }
    }
}

fn hidden_act(name: Option<&str>, architecture: Architecture) -> Result<HiddenAct> {
    match (name, architecture) {
        (Some("relu2"), _) | (None, Architecture::Bitnet) => Ok(HiddenAct::Relu2),
        (Some("silu" | "swish"), _) | (None, _) => Ok(HiddenAct::Silu),
        (Some(other), _) => Err(Error::unsupported("hidden_act", other, "relu2, silu")),
    }
}

fn rope_theta(raw: &Raw, architecture: Architecture) -> f64 {
    let nested = raw.rope_parameters.as_ref().and_then(|rope| rope.rope_theta);
    nested.or(raw.rope_theta).unwrap_or(match architecture {
        Architecture::Bitnet => 500_000.0,
        Architecture::Llama | Architecture::Qwen3 => 10_000.0,
    })
}

/// `rope_parameters` (transformers 5) or `rope_scaling` (before): the same keys in either.
fn rope_scaling(raw: &Raw, max_position_embeddings: usize) -> Result<RopeScaling> {
    if let Some(rope) = &raw.rope_parameters
        && rope.rope_type.is_none()
        && rope.r#type.is_none()
        && rope.rope_theta.is_none()
    {
        return Err(Error::unsupported("rope_parameters", "of another form", "one for all layers"));
    }
    let Some(rope) = raw.rope_parameters.as_ref().or(raw.rope_scaling.as_ref()) else {
        return whole_head(raw.partial_rotary_factor).map(|()| RopeScaling::None);
    };
    whole_head(raw.partial_rotary_factor.or(rope.partial_rotary_factor))?;
    let need = |value: Option<f64>, key| value.ok_or_else(|| Error::missing(key));
    let original = rope.original_max_position_embeddings.unwrap_or(max_position_embeddings);
    match rope.rope_type.as_deref().or(rope.r#type.as_deref()) {
        None | Some("default") => Ok(RopeScaling::None),
        Some("linear") => Ok(RopeScaling::Linear { factor: need(rope.factor, "rope factor")? }),
        Some("llama3") => Ok(RopeScaling::Llama3 {
            factor: need(rope.factor, "rope factor")?,
            low_freq_factor: need(rope.low_freq_factor, "rope low_freq_factor")?,
            high_freq_factor: need(rope.high_freq_factor, "rope high_freq_factor")?,
            original_max_position_embeddings: original,
        }),
        Some("yarn") => {
            if rope.truncate == Some(false) {
                return Err(Error::unsupported("yarn truncate", false, true));
            }
            let factor = need(rope.factor, "rope factor")?;
            let by_factor = || RopeScaling::yarn_attention_factor(factor);
            Ok(RopeScaling::Yarn {
                factor,
                original_max_position_embeddings: original,
                beta_fast: rope.beta_fast.unwrap_or(32.0),
                beta_slow: rope.beta_slow.unwrap_or(1.0),
                attention_factor: rope.attention_factor.unwrap_or_else(by_factor),
            })
        }
        Some(other) => Err(Error::unsupported("rope_type", other, "default, linear, llama3, yarn")),
    }
}

fn whole_head(partial_rotary_factor: Option<f64>) -> Result<()> {
    match partial_rotary_factor {
        None | Some(1.0) => Ok(()),
        Some(part) => Err(Error::unsupported("partial_rotary_factor", part, 1)),
    }
}

fn quantization(raw: &Raw) -> Result<Option<Quantization>> {
    if raw.quantization.is_some() {
        let supported = "bitnet (safetensors), GGUF";
        return Err(Error::unsupported("quantization method", "MLX", supported));
    }
    if let Some(bits) = raw.input_bits.filter(|&bits| bits != 8) {
        return Err(Error::unsupported("input_bits", bits, 8));
    }
    let Some(quantization) = &raw.quantization_config else {
        // 1bitLLM: float masters and no word about quantization but this.
        return match raw.weight_bits {
            None => Ok(None),
            Some(1) => Ok(Some(Quantization {
                mode: Mode::Online,
                scale_use: ScaleUse::Multiply,
                modules_to_not_convert: Vec::new(),
            })),
            Some(bits) => Err(Error::unsupported("weight_bits", bits, 1)),
        };
    };
    match quantization.quant_method.as_deref() {
        Some("bitnet") => {}
        other => {
            let got = other.unwrap_or("without a name");
            return Err(Error::unsupported("quantization method", got, "bitnet"));
        }
    }
    let scale_use = match quantization.linear_class.as_deref() {
        Some("autobitlinear") => ScaleUse::Multiply,
        None | Some("bitlinear") => ScaleUse::Divide,
        Some(other) => {
            return Err(Error::unsupported("linear_class", other, "autobitlinear, bitlinear"));
        }
    };
    let mode = match quantization.quantization_mode.as_deref() {
        None | Some("offline") => Mode::Offline,
        Some("online") => Mode::Online,
        Some(other) => {
            return Err(Error::unsupported("quantization_mode", other, "offline, online"));
        }
    };
    let modules_to_not_convert = quantization.modules_to_not_convert.clone().unwrap_or_default();
    Ok(Some(Quantization { mode, scale_use, modules_to_not_convert }))
}

impl Quantization {
    /// For files that say nothing of how BitNet weights are stored: all projections are ternary,
    /// whether they were rounded already or not.
    pub(crate) fn either() -> Self {
        let modules_to_not_convert = Vec::new();
        Self { mode: Mode::Either, scale_use: ScaleUse::Multiply, modules_to_not_convert }
    }

    /// Whether the module `path` (`model.layers.0.mlp.up_proj`) is stored as ternary weights.
    pub(crate) fn converts(&self, path: &str) -> bool {
        !lists(&self.modules_to_not_convert, path)
    }
}

/// Whether one of `entries` names the module `path` or a part of its path.
pub(crate) fn lists(entries: &[String], path: &str) -> bool {
    let dotted = format!(".{path}.");
    entries.iter().any(|entry| {
        let entry = entry.trim_matches('.');
        !entry.is_empty() && dotted.contains(&format!(".{entry}."))
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::{Value, json};

    fn base() -> Value {
        json!({
            "model_type": "llama", "hidden_size": 64, "intermediate_size": 128,
            "num_hidden_layers": 2, "num_attention_heads": 4, "vocab_size": 100
        })
    }

    fn with(changes: Value) -> Result<HfConfig> {
        let mut config = base();
        for (key, value) in changes.as_object().expect("an object") {
            config[key] = value.clone();
        }
        parse(config.to_string().as_bytes(), "test".into())
    }

    #[test]
    fn what_is_left_out_has_its_familys_default() {
        let llama = with(json!({})).unwrap().model;
        assert_eq!((llama.num_key_value_heads, llama.head_dim), (4, 16));
        assert_eq!((llama.rope_theta, llama.rms_norm_eps), (10_000.0, 1e-6));
        assert_eq!(llama.hidden_act, HiddenAct::Silu);
        let bitnet = with(json!({"model_type": "bitnet"})).unwrap().model;
        assert_eq!((bitnet.rope_theta, bitnet.rms_norm_eps), (500_000.0, 1e-5));
        assert_eq!(bitnet.hidden_act, HiddenAct::Relu2);
        let qwen = with(json!({"model_type": "qwen3", "eos_token_id": [1, 2]})).unwrap();
        assert_eq!((qwen.model.head_dim, qwen.model.max_position_embeddings), (128, 32_768));
        assert_eq!(qwen.eos_token_ids, [1, 2]);
    }

    #[test]
    fn the_1bitllm_naming_is_bitnet_with_masters() {
        let config = with(json!({
            "architectures": ["BitnetForCausalLM"], "weight_bits": 1, "input_bits": 8,
            "hidden_act": "silu", "rope_scaling": null
        }));
        let config = config.unwrap();
        assert_eq!(config.model.architecture, Architecture::Bitnet);
        assert_eq!(config.model.hidden_act, HiddenAct::Silu);
        assert_eq!(config.quantization.unwrap().mode, Mode::Online);
    }

    #[test]
    fn both_forms_of_rope_settings_are_read() {
        let scaling = json!({
            "rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
            "original_max_position_embeddings": 8192
        });
        let old = with(json!({"rope_theta": 5e5, "rope_scaling": scaling})).unwrap().model;
        let mut parameters = scaling;
        parameters["rope_theta"] = json!(5e5);
        let new = with(json!({"rope_parameters": parameters})).unwrap().model;
        assert_eq!((new.rope_theta, &new.rope_scaling), (5e5, &old.rope_scaling));
        assert!(matches!(old.rope_scaling, RopeScaling::Llama3 { factor: 8.0, .. }));
        let linear = with(json!({"rope_scaling": {"type": "linear", "factor": 2.0}})).unwrap();
        assert_eq!(linear.model.rope_scaling, RopeScaling::Linear { factor: 2.0 });
        let yarn =
            json!({"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16384});
        let yarn = with(json!({"rope_scaling": yarn})).unwrap().model.rope_scaling;
        let RopeScaling::Yarn { attention_factor, .. } = yarn else { panic!("{yarn:?}") };
        assert!((attention_factor - 1.138_629_4).abs() < 1e-6);
    }

    #[test]
    fn the_linear_class_alone_decides_what_scales_do() {
        let of = |class: Value| {
            let quantization = json!({"quant_method": "bitnet", "linear_class": class});
            with(json!({"quantization_config": quantization})).unwrap().quantization.unwrap()
        };
        assert_eq!(of(json!("autobitlinear")).scale_use, ScaleUse::Multiply);
        assert_eq!(of(json!("bitlinear")).scale_use, ScaleUse::Divide);
        assert_eq!(of(Value::Null).scale_use, ScaleUse::Divide);
        assert_eq!(of(Value::Null).mode, Mode::Offline);
    }

    #[test]
    fn excepted_modules_are_matched_by_whole_names() {
        let quantization = Quantization {
            mode: Mode::Online,
            scale_use: ScaleUse::Multiply,
            modules_to_not_convert: vec!["lm_head".into(), "layers.1.mlp".into(), String::new()],
        };
        assert!(quantization.converts("model.layers.11.mlp.up_proj"));
        assert!(quantization.converts("model.layers.0.self_attn.q_proj"));
        assert!(!quantization.converts("model.layers.1.mlp.up_proj"));
        assert!(!quantization.converts("lm_head"));
    }

    #[test]
    fn what_is_not_supported_says_what_would_be() {
        for (changes, expected) in [
            (
                json!({"model_type": "gpt2"}),
                "model_type gpt2 is not supported; supported: bitnet, llama, qwen3",
            ),
            (
                json!({"hidden_act": "gelu"}),
                "hidden_act gelu is not supported; supported: relu2, silu",
            ),
            (
                json!({"quantization_config": {"quant_method": "gptq"}}),
                "quantization method gptq is not supported; supported: bitnet",
            ),
            (json!({"quantization": {"bits": 2, "group_size": 128}}), "quantization method MLX"),
            (json!({"rope_scaling": {"type": "dynamic", "factor": 2}}), "rope_type dynamic"),
            (
                json!({"rope_parameters": {"full_attention": {"rope_theta": 1e4}}}),
                "rope_parameters",
            ),
            (json!({"partial_rotary_factor": 0.5}), "partial_rotary_factor 0.5"),
            (json!({"layer_types": ["sliding_attention"]}), "attention sliding window"),
            (json!({"use_sliding_window": true}), "attention sliding window"),
            (json!({"sliding_window": 16}), "attention sliding window"),
            (json!({"weight_bits": 4}), "weight_bits 4"),
            (
                json!({"hidden_size": 65}),
                "num_attention_heads: expected a divisor of hidden_size 65, got 4",
            ),
            (json!({"num_attention_heads": 0}), "num_attention_heads"),
            (json!({"hidden_size": null}), "hidden_size is missing"),
            (json!({"hidden_size": -4}), "not the JSON expected"),
            (json!({"vocab_size": 1u64 << 50}), "vocab_size: expected 1 to"),
        ] {
            let message = with(changes).unwrap_err().to_string();
            assert!(message.starts_with(expected), "{message:?} should start with {expected:?}");
        }
        let deep = format!("{{\"a\":{}", "[".repeat(200_000));
        assert!(matches!(parse(deep.as_bytes(), String::new()), Err(Error::Json { .. })));
        assert!(matches!(parse(b"", String::new()), Err(Error::Json { .. })));
    }
}

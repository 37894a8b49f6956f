//! Reads a GGUF file as a checkpoint: metadata as the settings Hugging Face names, tensors under
//! Hugging Face names.
//!
//! Files of the `llama` architecture keep the rows of each query and key head in another order,
//! which is turned back when rows are read; no other architecture here does. Text is in
//! [`super::text`].

use super::{GgufFile, TensorInfo, names, text};
use crate::checkpoint::{FileFormat, Kind, OpenOptions, Origin, Override, Parts, Tensor};
use crate::config::{Architecture, HiddenAct, ModelConfig, RopeScaling};
use crate::error::{Error, Result};
use crate::hf::Quantization;
use crate::mapping::FileBytes;
use crate::pack::I2sLayout;
use crate::rows::HeadOrder;
use std::collections::BTreeMap;
use std::path::Path;
use std::sync::Arc;

/// What every GGUF file starts with.
pub(crate) const MAGIC: &[u8] = b"GGUF";

/// Where this crate notes that ternary weights were trained with float activations, which one
/// scale for a matrix would belie: the columns that share an activation scale.
pub(crate) const ACTIVATION_GROUP_KEY: &str = "ternary.activation_group";

const ARCHITECTURES: &str = "bitnet-b1.58, bitnet-25, bitnet, llama, qwen3";

/// Opens the file in `bytes`; `label` names it in messages.
pub(crate) fn load(bytes: &FileBytes, label: &str, options: OpenOptions) -> Result<Parts> {
    let mut overrides = Vec::new();
    let file = GgufFile::from_bytes(bytes.clone(), label)?;
    let file = with_i2s_layout(file, options.i2s_layout, &mut overrides);
    refuse_other_kinds(&file)?;
    let family: &str = file.require("general.architecture")?;
    let config = config(&file, family, label)?;
    let text = text::read(&file, family, config.vocab_size, &mut overrides)?;
    let tensors = tensors(&file, label)?;

    let embeds = tensors.contains_key("model.layers.0.self_attn.q_proj.norm.weight");
    // Floats beside ternary projections were left so; floats alone are masters.
    let has_ternary = tensors
        .iter()
        .any(|(name, t)| name.ends_with("_proj.weight") && matches!(t.kind, Kind::Ternary(_)));
    let masters = (config.architecture == Architecture::Bitnet || embeds) && !has_ternary;
    let activation_group: Option<usize> = file.get(ACTIVATION_GROUP_KEY)?;
    if let Some(group) = activation_group
        && (group == 0 || group > 1024 || !group.is_multiple_of(16))
    {
        let expected = "a multiple of 16 up to 1024";
        return Err(Error::malformed(format!("key {ACTIVATION_GROUP_KEY}"), expected, group));
    }
    Ok(Parts {
        place: label.to_owned(),
        text,
        format: FileFormat::Gguf(file.version()),
        overrides,
        tensors,
        projection_norm_eps: config.rms_norm_eps,
        quantization: masters.then(Quantization::either),
        activation_group,
        head_order: (family == "llama").then(|| HeadOrder::halves(config.head_dim)),
        origin: Origin::Gguf(bytes.clone()),
        config,
    })
}

/// Settles how I2_S tensors are laid out: as `asked`, or else as their weights tell.
fn with_i2s_layout(
    file: GgufFile,
    asked: Option<I2sLayout>,
    overrides: &mut Vec<Override>,
) -> GgufFile {
    let layout = asked.or_else(|| file.detect_i2s_layout()).unwrap_or_default();
    if asked.is_none() && layout != I2sLayout::Canonical128 {
        overrides.push(Override {
            what: "I2_S layout",
            found: "unmarked".into(),
            used: layout.to_string(),
            why: "zeros of feed-forward rows and columns only match in this layout",
        });
    }
    file.with_i2s_layout(layout)
}

/// Files that hold no whole decoder, or one whose weights mean something else.
fn refuse_other_kinds(file: &GgufFile) -> Result<()> {
    if let Some(kind) = file.get::<&str>("general.type")?.filter(|&kind| kind != "model") {
        return Err(Error::unsupported("general.type", kind, "model"));
    }
    if let Some(parts) = file.get::<u32>("split.count")?.filter(|&parts| parts > 1) {
        let got = format!("{parts} files");
        return Err(Error::unsupported("GGUF split in", got, "1 file; merge them first"));
    }
    if file.metadata().value("prism.hadamard.version").is_some() {
        return Err(Error::unsupported("weights", "rotated (prism.hadamard)", "plain ones"));
    }
    Ok(())
}

fn config(file: &GgufFile, family: &str, label: &str) -> Result<ModelConfig> {
    let key = |suffix: &str| format!("{family}.{suffix}");
    let (architecture, hidden_act) = match family {
        // Made for relu², whatever other programs do with them.
        "bitnet-b1.58" | "bitnet-25" => (Architecture::Bitnet, HiddenAct::Relu2),
        "bitnet" => match file.get::<&str>(&key("hidden_activation"))? {
            None | Some("silu" | "swish") => (Architecture::Bitnet, HiddenAct::Silu),
            Some("relu2" | "relu_sqr") => (Architecture::Bitnet, HiddenAct::Relu2),
            Some(other) => {
                return Err(Error::unsupported("hidden_activation", other, "silu, relu2"));
            }
        },
        "llama" => (Architecture::Llama, HiddenAct::Silu),
        "qwen3" => (Architecture::Qwen3, HiddenAct::Silu),
        other => return Err(Error::unsupported("architecture", other, ARCHITECTURES)),
    };
    if let Some(experts) = file.get::<u32>(&key("expert_count"))?.filter(|&count| count > 0) {
        return Err(Error::unsupported("expert_count", experts, 0));
    }
    let hidden_size: usize = file.require(&key("embedding_length"))?;
    let heads: usize = file.require(&key("attention.head_count"))?;
    let context: usize = file.require(&key("context_length"))?;
    if let Some(window) = file.get::<usize>(&key("attention.sliding_window"))?
        && (1..context).contains(&window)
    {
        return Err(Error::unsupported("attention", "sliding window", "full attention"));
    }
    let head_dim = head_dim(file, &key, hidden_size, heads)?;
    let config = ModelConfig {
        architecture,
        name: name(file, label)?,
        hidden_size,
        intermediate_size: file.require(&key("feed_forward_length"))?,
        num_hidden_layers: file.require(&key("block_count"))?,
        num_attention_heads: heads,
        num_key_value_heads: file.get(&key("attention.head_count_kv"))?.unwrap_or(heads),
        head_dim,
        vocab_size: vocab_size(file, &key("vocab_size"))?,
        max_position_embeddings: context,
        rms_norm_eps: file.require(&key("attention.layer_norm_rms_epsilon"))?,
        rope_theta: file.get(&key("rope.freq_base"))?.unwrap_or(10_000.0),
        rope_scaling: rope_scaling(file, &key, context)?,
        hidden_act,
        tie_word_embeddings: file.find("output.weight").is_none(),
        sub_norms: architecture == Architecture::Bitnet,
        qk_norm: architecture == Architecture::Qwen3,
        projection_norm_eps: None,
        attention_bias: false,
    };
    config.validate()?;
    Ok(config)
}

fn name(file: &GgufFile, label: &str) -> Result<String> {
    Ok(match file.get::<&str>("general.name")? {
        Some(name) => name.to_owned(),
        None => {
            let stem = Path::new(label).file_stem().map(|stem| stem.to_string_lossy());
            stem.map_or_else(|| label.to_owned(), |stem| stem.into_owned())
        }
    })
}

fn head_dim(
    file: &GgufFile,
    key: &impl Fn(&str) -> String,
    hidden_size: usize,
    heads: usize,
) -> Result<usize> {
    let head_dim = match file.get(&key("attention.key_length"))? {
        Some(length) => length,
        None if heads > 0 && hidden_size.is_multiple_of(heads) => hidden_size / heads,
        None => {
            let expected = format!("a divisor of embedding_length {hidden_size}");
            return Err(Error::malformed(
                format!("key {}", key("attention.head_count")),
                expected,
                heads,
            ));
        }
    };
    for suffix in ["attention.value_length", "rope.dimension_count"] {
        let other: Option<usize> = file.get(&key(suffix))?;
        if let Some(other) = other.filter(|&other| other != head_dim) {
            return Err(Error::unsupported(suffix, other, format!("the head's size, {head_dim}")));
        }
    }
    Ok(head_dim)
}

/// The rows of the embedding table, which must be what the metadata says where it says so.
fn vocab_size(file: &GgufFile, key: &str) -> Result<usize> {
    let table = file.info("token_embd.weight")?;
    let rows = match table.shape[..] {
        [rows, _] => rows,
        _ => {
            let what = "shape of token_embd.weight";
            return Err(Error::malformed(what, "two sizes", format!("{:?}", table.shape)));
        }
    };
    match file.get::<usize>(key)? {
        Some(stated) if stated != rows => {
            Err(Error::malformed(format!("key {key}"), format!("{rows}, as token_embd"), stated))
        }
        _ => Ok(rows),
    }
}

fn rope_scaling(
    file: &GgufFile,
    key: &impl Fn(&str) -> String,
    context: usize,
) -> Result<RopeScaling> {
    let factor: Option<f64> = match file.get(&key("rope.scaling.factor"))? {
        Some(factor) => Some(factor),
        None => file.get(&key("rope.scale_linear"))?, // before llama.cpp had several kinds
    };
    let scaling = match file.get::<&str>(&key("rope.scaling.type"))? {
        Some("none") => RopeScaling::None,
        None | Some("linear") => match factor {
            None | Some(1.0) => RopeScaling::None,
            Some(factor) => RopeScaling::Linear { factor },
        },
        Some("yarn") => {
            let factor = factor.ok_or_else(|| Error::missing(key("rope.scaling.factor")))?;
            let number = |suffix: &str, default: f64| -> Result<f64> {
                Ok(file.get(&key(suffix))?.unwrap_or(default))
            };
            let original = file.get(&key("rope.scaling.original_context_length"))?;
            RopeScaling::Yarn {
                factor,
                original_max_position_embeddings: original.unwrap_or(context),
                beta_fast: number("rope.scaling.yarn_beta_fast", 32.0)?,
                beta_slow: number("rope.scaling.yarn_beta_slow", 1.0)?,
                attention_factor: number("rope.scaling.attn_factor", 1.0)?
                    * RopeScaling::yarn_attention_factor(factor),
            }
        }
        Some(other) => {
            return Err(Error::unsupported("rope.scaling.type", other, "none, linear, yarn"));
        }
    };
    let Some(info) = file.find("rope_freqs.weight") else { return Ok(scaling) };
    if scaling != RopeScaling::None {
        return Err(Error::unsupported("rope_freqs.weight", "with rope.scaling", "one of them"));
    }
    let factors = tensor(file, info, &Arc::from(file.name())).vector("rope_freqs.weight")?;
    match factors.iter().all(|&factor| factor == 1.0) {
        true => Ok(RopeScaling::None),
        false => Ok(RopeScaling::Factors(factors)),
    }
}

fn tensors(file: &GgufFile, label: &str) -> Result<BTreeMap<String, Tensor>> {
    let label: Arc<str> = label.into();
    let mut tensors = BTreeMap::new();
    for info in file.tensors() {
        let name = names::canonical(&info.name).unwrap_or_else(|| info.name.clone());
        // Two names for one tensor: a Hugging Face name in a GGUF file beside the usual one.
        if tensors.insert(name.clone(), tensor(file, info, &label)).is_some() {
            return Err(Error::malformed(format!("tensor {name}"), "one name for it", "two"));
        }
    }
    Ok(tensors)
}

fn tensor(file: &GgufFile, info: &TensorInfo, label: &Arc<str>) -> Tensor {
    let kind = match (info.packing, info.tensor_type.float_format()) {
        (Some(packing), _) => Kind::Ternary(packing),
        (None, Some(format)) => Kind::Float(format),
        (None, None) => Kind::Other(info.tensor_type.to_string()),
    };
    Tensor {
        name: info.name.clone(),
        file: label.clone(),
        shape: info.shape.clone(),
        kind,
        bytes: file.bytes(info),
    }
}

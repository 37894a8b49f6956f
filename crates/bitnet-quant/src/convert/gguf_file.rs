//! Writes a GGUF file with the keys and tensor names of llama.cpp and bitnet.cpp.
//!
//! | family | `general.architecture` |
//! |---|---|
//! | bitnet with relu² | `bitnet-b1.58`, for which every program takes relu² |
//! | bitnet with SiLU | `bitnet` |
//! | llama | `llama`, rows of query and key heads in that architecture's order |
//! | qwen3 | `qwen3` |

use super::output::NewFile;
use super::source::{Content, Item, Packed, Source, Table};
use super::{ConvertOptions, Meter, Progress, Report, vocabulary};
use crate::checkpoint::Origin;
use crate::config::{Architecture, HiddenAct, ModelConfig, RopeScaling};
use crate::error::{Error, Result};
use crate::gguf::load::ACTIVATION_GROUP_KEY;
use crate::gguf::{Array, GgufFile, GgufWriter, Metadata, TensorSpec, TensorType, Value, names};
use crate::mapping::FileBytes;
use crate::pack::Packing;
use crate::rows::HeadOrder;
use bitnet_core::kernels::TILE_ROWS;
use bitnet_core::weights::{ActivationQuant, RoundedRows, Scales};
use bytes::Bytes;
use std::path::Path;

/// The tensor of rotary divisors.
const ROPE_FREQS: &str = "rope_freqs.weight";

/// All of a file but the bytes of its tensors.
struct Plan {
    items: Vec<Item>,
    ternary_type: TensorType,
    order: Option<HeadOrder>,
    metadata: Metadata,
    divisors: Option<Vec<f32>>,
    /// Those of `items`, then of `divisors`, then of `rounded`.
    specs: Vec<TensorSpec>,
    rounded: Vec<(TensorSpec, Bytes)>,
    /// Bytes of all tensors.
    bytes: u64,
    notes: Vec<String>,
}

/// Whether a file can be written: plans it and no more.
pub(super) fn check(source: &Source<'_>, packing: Packing, options: ConvertOptions) -> Result<()> {
    plan(source, packing, options).map(drop)
}

fn plan(source: &Source<'_>, packing: Packing, options: ConvertOptions) -> Result<Plan> {
    let Some(ternary_type) = TensorType::of_packing(packing) else {
        return Err(Error::unsupported(
            "packing in GGUF",
            packing,
            "I2_S, TQ1_0, TQ2_0, Q2_0, TILES",
        ));
    };
    let config = source.checkpoint.config();
    let items = source.items()?;
    let order = (config.architecture == Architecture::Llama)
        .then(|| HeadOrder::neighbours(config.head_dim));

    let mut notes = Vec::new();
    let mut metadata = metadata(source, packing, &mut notes)?;
    if let Some(group) = activation_group(source, &items)? {
        metadata.set(ACTIVATION_GROUP_KEY, Value::U32(group));
    }
    let divisors = rope_freqs(config);
    let mut specs = specs(&items, ternary_type, options, divisors.as_deref())?;
    let rounded = rounded_head(source, packing, options)?;
    specs.extend(rounded.iter().map(|(spec, _)| spec.clone()));
    let length = |spec: &TensorSpec| {
        let refuse =
            |error: Error| Error::does_not_fit(&spec.name, spec.tensor_type, error.to_string());
        spec.n_bytes().map(|len| len as u64).map_err(refuse)
    };
    let bytes = specs.iter().map(length).sum::<Result<u64>>()?;
    Ok(Plan { items, ternary_type, order, metadata, divisors, specs, rounded, bytes, notes })
}

pub(super) fn write(
    source: &Source<'_>,
    packing: Packing,
    options: ConvertOptions,
    out: &Path,
    progress: &mut dyn FnMut(Progress<'_>),
) -> Result<Report> {
    let mut file = NewFile::create(out, options.force)?;
    let plan = plan(source, packing, options)?;
    let Plan { items, ternary_type, order, metadata, divisors, specs, rounded, .. } = plan;
    let mut meter = Meter::new(plan.bytes, progress);
    meter.report.notes = plan.notes;

    let mut writer = GgufWriter::new(file.writer(), out, &metadata, &specs)?;
    for (spec, item) in specs.iter().zip(&items) {
        let path = item.name.strip_suffix(".weight").unwrap_or(&item.name);
        let float = |bytes| Packed { bytes, scale_error: 0.0 };
        let packed = match item.content {
            Content::Ternary(_) => source.pack(path, packing, order)?,
            Content::Table(table) => match (options.tables, table) {
                (Some(format), _) | (None, Table::Float(format)) => {
                    float(source.table(&item.name, format)?)
                }
                (None, Table::Ternary) => source.ternary_table(&item.name, packing)?,
            },
            Content::Float(_) => float(source.float(path, order)?),
            Content::Vector(_) => float(f32_bytes(&source.vector(&item.name, order)?)),
        };
        writer.write_tensor(&spec.name, &packed.bytes)?;
        meter.report.ternary += usize::from(spec.tensor_type == ternary_type);
        meter.report.scale_error = meter.report.scale_error.max(packed.scale_error);
        meter.wrote(&spec.name, packed.bytes.len());
        source.release(&item.name);
    }
    if let Some(divisors) = divisors {
        writer.write_tensor(ROPE_FREQS, &f32_bytes(&divisors))?;
        meter.wrote(ROPE_FREQS, divisors.len() * 4);
    }
    for (spec, bytes) in &rounded {
        writer.write_tensor(&spec.name, bytes)?;
        meter.wrote(&spec.name, bytes.len());
    }
    writer.finish()?;
    file.commit()?;
    Ok(meter.report)
}

/// The tensors of the rounded copy of the head, where the file is to start without repacking.
fn rounded_head(
    source: &Source<'_>,
    packing: Packing,
    options: ConvertOptions,
) -> Result<Vec<(TensorSpec, Bytes)>> {
    // In another format the head would be another matrix, and this no copy of it.
    if packing != Packing::Tiles || options.tables.is_some() {
        return Ok(Vec::new());
    }
    let path = match source.checkpoint.config().tie_word_embeddings {
        true => "model.embed_tokens",
        false => "lm_head",
    };
    let head = source.checkpoint.table(path)?;
    let rounded = bitnet_core::cpu::round_rows(&*head)
        .map_err(|error| Error::does_not_fit(path, packing, error.to_string()))?;
    let Some(RoundedRows { codes, bounds }) = rounded else { return Ok(Vec::new()) };
    let rows = bounds.len() / 12;
    let tensor = |suffix: &str, shape, tensor_type| -> Result<TensorSpec> {
        let name = names::gguf(&format!("{path}.{suffix}"));
        let name = name.ok_or_else(|| Error::does_not_fit(path, "GGUF", "it has no name there"))?;
        Ok(TensorSpec { name, shape, tensor_type })
    };
    let [codes_name, bounds_name] = names::ROUNDED;
    let n_tiles = rows / TILE_ROWS;
    let codes_spec = tensor(codes_name, vec![n_tiles, codes.len() / n_tiles], TensorType::I8)?;
    let bounds_spec = tensor(bounds_name, vec![rows, 3], TensorType::F32)?;
    Ok(vec![(codes_spec, codes), (bounds_spec, bounds)])
}

fn f32_bytes(values: &[f32]) -> FileBytes {
    values.iter().flat_map(|value| value.to_le_bytes()).collect::<Vec<u8>>().into()
}

fn specs(
    items: &[Item],
    ternary_type: TensorType,
    options: ConvertOptions,
    divisors: Option<&[f32]>,
) -> Result<Vec<TensorSpec>> {
    let mut specs = Vec::with_capacity(items.len() + 1);
    for item in items {
        let name = names::gguf(&item.name)
            .ok_or_else(|| Error::does_not_fit(&item.name, "GGUF", "it has no name there"))?;
        let tensor_type = match (item.content, options.tables) {
            (Content::Vector(_), _) => TensorType::F32,
            (Content::Table(_), Some(format)) => TensorType::of_float(format),
            (Content::Ternary(_) | Content::Table(Table::Ternary), _) => ternary_type,
            (Content::Float(stored) | Content::Table(Table::Float(stored)), _) => {
                TensorType::of_float(stored)
            }
        };
        specs.push(TensorSpec { name, shape: item.shape.clone(), tensor_type });
    }
    if let Some(divisors) = divisors {
        let (name, shape) = (ROPE_FREQS.to_owned(), vec![divisors.len()]);
        specs.push(TensorSpec { name, shape, tensor_type: TensorType::F32 });
    }
    Ok(specs)
}

/// Divisors of frequencies for the scalings that have no keys of their own.
fn rope_freqs(config: &ModelConfig) -> Option<Vec<f32>> {
    match config.rope_scaling {
        RopeScaling::Llama3 { .. } | RopeScaling::Factors(_) => {
            Some(config.rope_divisors().into_iter().map(|divisor| divisor as f32).collect())
        }
        RopeScaling::None | RopeScaling::Linear { .. } | RopeScaling::Yarn { .. } => None,
    }
}

/// The activation group, where a reader would not find out that there is one: one scale for a
/// matrix tells of BitNet training elsewhere.
fn activation_group(source: &Source<'_>, items: &[Item]) -> Result<Option<u32>> {
    if source.checkpoint.config().architecture == Architecture::Bitnet {
        return Ok(None);
    }
    for item in items {
        if let Content::Ternary(ActivationQuant::PerGroup(group)) = item.content {
            let path = item.name.strip_suffix(".weight").unwrap_or(&item.name);
            if matches!(source.ternary(path)?.scales(), Scales::Tensor(_)) {
                return Ok(u32::try_from(group).ok());
            }
        }
    }
    Ok(None)
}

fn metadata(source: &Source<'_>, packing: Packing, notes: &mut Vec<String>) -> Result<Metadata> {
    let config = source.checkpoint.config();
    let family = match (config.architecture, config.hidden_act) {
        (Architecture::Bitnet, HiddenAct::Relu2) => "bitnet-b1.58",
        (Architecture::Bitnet, HiddenAct::Silu) => "bitnet",
        (Architecture::Llama, HiddenAct::Silu) => "llama",
        (Architecture::Qwen3, HiddenAct::Silu) => "qwen3",
        (family, HiddenAct::Relu2) => {
            let reason = format!("GGUF has no {family} with relu²");
            return Err(Error::does_not_fit("hidden_act", "GGUF", reason));
        }
    };
    let mut metadata = Metadata::new();
    metadata.set("general.architecture", Value::String(family.into()));
    metadata.set("general.type", Value::String("model".into()));
    metadata.set("general.name", Value::String(config.name.clone()));
    metadata.set("general.quantization_version", Value::U32(2));
    if packing == Packing::Tiles {
        // A step of a tile is one line of the caches, if the tensor starts at one.
        metadata.set("general.alignment", Value::U32(64));
    }
    if let Some(file_type) = file_type(packing) {
        metadata.set("general.file_type", Value::U32(file_type));
    }
    if let Origin::Gguf(bytes) = &source.checkpoint.parts().origin {
        keep_metadata(bytes, &source.checkpoint.parts().place, &mut metadata)?;
    }
    settings(config, family, &mut metadata)?;
    vocabulary::write(source.checkpoint, &mut metadata, notes)?;
    Ok(metadata)
}

/// The number by which llama.cpp and bitnet.cpp name the most frequent type of a file.
fn file_type(packing: Packing) -> Option<u32> {
    match packing {
        Packing::Tq1_0 => Some(36),
        Packing::Tq2_0 => Some(37),
        Packing::I2S(_) => Some(40),
        Packing::Q2_0G128 => Some(142),
        Packing::Ptq1_0 => Some(143),
        _ => None,
    }
}

/// Takes over what a GGUF file says of itself: author, licence, how it was made.
fn keep_metadata(bytes: &FileBytes, name: &str, metadata: &mut Metadata) -> Result<()> {
    let file = GgufFile::from_bytes(bytes.clone(), name)?;
    for (key, value) in file.metadata().entries() {
        let of_the_file = ["general.alignment", "general.file_type"].contains(&key.as_str());
        if key.starts_with("general.") && !of_the_file && metadata.value(key).is_none() {
            metadata.set(key.clone(), value.clone());
        }
    }
    Ok(())
}

/// The keys of the hyper-parameters.
fn settings(config: &ModelConfig, family: &str, metadata: &mut Metadata) -> Result<()> {
    let mut set = |suffix: &str, value| {
        metadata.set(format!("{family}.{suffix}"), value);
    };
    for (suffix, value) in [
        ("vocab_size", config.vocab_size),
        ("context_length", config.max_position_embeddings),
        ("embedding_length", config.hidden_size),
        ("block_count", config.num_hidden_layers),
        ("feed_forward_length", config.intermediate_size),
        ("attention.head_count", config.num_attention_heads),
        ("attention.head_count_kv", config.num_key_value_heads),
        ("attention.key_length", config.head_dim),
        ("attention.value_length", config.head_dim),
        ("rope.dimension_count", config.head_dim),
    ] {
        set(suffix, number(suffix, value)?);
    }
    set("attention.layer_norm_rms_epsilon", Value::F32(config.rms_norm_eps));
    set("rope.freq_base", Value::F32(config.rope_theta as f32));
    if let Some(eps) = config.projection_norm_eps.filter(|&eps| eps != config.rms_norm_eps) {
        let reason = format!("GGUF has one epsilon for all norms, not {eps} for some");
        return Err(Error::does_not_fit("rms_norm_eps of the projections", "GGUF", reason));
    }
    match &config.rope_scaling {
        RopeScaling::None | RopeScaling::Llama3 { .. } | RopeScaling::Factors(_) => {}
        RopeScaling::Linear { factor } => {
            set("rope.scaling.type", Value::String("linear".into()));
            set("rope.scaling.factor", Value::F32(*factor as f32));
        }
        RopeScaling::Yarn {
            factor,
            original_max_position_embeddings: original,
            beta_fast,
            beta_slow,
            attention_factor,
        } => {
            set("rope.scaling.type", Value::String("yarn".into()));
            set("rope.scaling.factor", Value::F32(*factor as f32));
            let suffix = "rope.scaling.original_context_length";
            set(suffix, number(suffix, *original)?);
            set("rope.scaling.yarn_beta_fast", Value::F32(*beta_fast as f32));
            set("rope.scaling.yarn_beta_slow", Value::F32(*beta_slow as f32));
            let usual = RopeScaling::yarn_attention_factor(*factor);
            if (attention_factor - usual).abs() > 1e-6 {
                let extra = attention_factor / usual;
                set("rope.scaling.attn_factor", Value::F32(extra as f32));
            }
        }
    }
    Ok(())
}

fn number(what: &str, value: usize) -> Result<Value> {
    let value = u32::try_from(value);
    value.map(Value::U32).map_err(|e| Error::does_not_fit(what, "GGUF", e.to_string()))
}

/// An array of strings.
pub(super) fn strings(values: Vec<String>) -> Value {
    Value::Array(Array::String(values))
}

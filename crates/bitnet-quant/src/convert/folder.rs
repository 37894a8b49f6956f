//! Writes a Hugging Face folder: `config.json`, `model.safetensors`, tokenizer files.
//!
//! The files of a Hugging Face source that say more than this crate reads (tokenizer settings,
//! generation settings) are copied as they are; for other sources they are made anew.

use super::output::NewFile;
use super::source::{Content, Item, Source, Table};
use super::{ConvertOptions, Meter, Progress, Report, ScaleUse, tokenizer_json};
use crate::checkpoint::Origin;
use crate::config::{Architecture, HiddenAct, ModelConfig, RopeScaling};
use crate::error::{Error, Result};
use crate::files::ModelFiles;
use crate::mapping::FileBytes;
use crate::pack::{FloatFormat, Packing, encode_float, hf_u8};
use crate::safetensors::{self, Planned};
use crate::text::{TextAssets, TokenizerSource};
use ::safetensors::Dtype;
use bitnet_core::weights::{ActivationQuant, FloatType};
use bytes::Bytes;
use serde_json::{Value, json};
use std::path::Path;

const CONFIG: &str = "config.json";
const WEIGHTS: &str = "model.safetensors";
const TOKENIZER: &str = "tokenizer.json";

/// Files copied from a Hugging Face source.
const TEXT_FILES: [&str; 6] = [
    TOKENIZER,
    "tokenizer.model",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "generation_config.json",
    "chat_template.jinja",
];

/// Longest of them.
const MAX_TEXT_FILE: u64 = 256 << 20;

pub(super) fn write(
    source: &Source<'_>,
    scale_use: ScaleUse,
    options: ConvertOptions,
    out: &Path,
    progress: &mut dyn FnMut(Progress<'_>),
) -> Result<Report> {
    let made = prepare(out, options.force)?;
    let result = write_files(source, scale_use, options, out, progress);
    if result.is_err() && made {
        // Empty again, as nothing was committed; if something was, the folder stays.
        let _ = std::fs::remove_dir(out);
    }
    result
}

/// Makes the folder, or checks that what is in it is not in the way. Says whether it is new.
fn prepare(out: &Path, force: bool) -> Result<bool> {
    if !out.exists() {
        std::fs::create_dir_all(out).map_err(|e| Error::io(out, "create", e))?;
        return Ok(true);
    }
    let files = ModelFiles::folder(out);
    // Weights under other names would be found in place of the new ones, or beside them.
    let others = files.names_with("safetensors")?.into_iter().find(|name| name != WEIGHTS);
    let index = files.names_with("json")?.into_iter().find(|name| name.contains(".index."));
    if let Some(other) = others.or(index) {
        return Err(Error::Exists(out.join(other)));
    }
    let own = [CONFIG, WEIGHTS].into_iter().chain(TEXT_FILES).find(|name| files.has(name));
    match own {
        Some(name) if !force => Err(Error::Exists(out.join(name))),
        _ => Ok(false),
    }
}

fn write_files(
    source: &Source<'_>,
    scale_use: ScaleUse,
    options: ConvertOptions,
    out: &Path,
    progress: &mut dyn FnMut(Progress<'_>),
) -> Result<Report> {
    let items = source.items()?;
    let config = config_json(source, scale_use, &items)?;
    let mut finished = text_files(source, options, out)?;

    let mut file = NewFile::create(&out.join(WEIGHTS), options.force)?;
    let mut tensors: Vec<(Planned, &Item)> = Vec::new();
    for item in &items {
        tensors.extend(planned(item, options)?.into_iter().map(|planned| (planned, item)));
    }
    let mut plan: Vec<Planned> = tensors.iter().map(|(planned, _)| planned.clone()).collect();
    safetensors::sort(&mut plan);
    let total = plan.iter().map(|planned| planned.byte_len() as u64).sum();
    let mut meter = Meter::new(total, progress);
    safetensors::write_header(file.writer(), &plan)
        .map_err(|e| Error::io(out.join(WEIGHTS), "write", e))?;
    for planned in &plan {
        let item = tensors.iter().find(|(own, _)| own.name == planned.name).map(|(_, item)| *item);
        let item = item.ok_or_else(|| Error::missing(&planned.name))?;
        let bytes = bytes(source, scale_use, options, planned, item)?;
        if bytes.len() != planned.byte_len() {
            let expected = format!("{} bytes", planned.byte_len());
            return Err(Error::malformed(&planned.name, expected, bytes.len()));
        }
        file.write(&bytes)?;
        meter.report.ternary += usize::from(planned.dtype == Dtype::U8);
        meter.wrote(&planned.name, bytes.len());
        source.release(&item.name);
    }
    meter.report.notes.extend(notes(&items));

    finished.push(file);
    // Last, as a folder is a model by its settings.
    let mut file = NewFile::create(&out.join(CONFIG), options.force)?;
    file.write(format!("{config:#}\n").as_bytes())?;
    finished.push(file);
    finished.into_iter().try_for_each(NewFile::commit)?;
    Ok(meter.report)
}

/// The tensors an item becomes.
fn planned(item: &Item, options: ConvertOptions) -> Result<Vec<Planned>> {
    let one =
        |dtype| vec![Planned { name: file_name(&item.name), dtype, shape: item.shape.clone() }];
    Ok(match item.content {
        Content::Ternary(_) => {
            let shape = vec![hf_u8::packed_rows(item.shape[0]), item.shape[1]];
            let scale = format!("{}_scale", file_name(&item.name));
            vec![
                Planned { name: file_name(&item.name), dtype: Dtype::U8, shape },
                Planned { name: scale, dtype: Dtype::F32, shape: vec![1] },
            ]
        }
        Content::Vector(stored) => one(dtype(stored.unwrap_or(FloatType::F32))),
        Content::Float(stored) => one(dtype(plain(stored))),
        Content::Table(table) => one(dtype(table_type(table, options)?)),
    })
}

/// Transformers has its own name for norms inside projections.
fn file_name(canonical: &str) -> String {
    canonical.replace("_proj.norm.", "_proj.rms_norm.")
}

fn bytes(
    source: &Source<'_>,
    scale_use: ScaleUse,
    options: ConvertOptions,
    planned: &Planned,
    item: &Item,
) -> Result<FileBytes> {
    let path = item.name.strip_suffix(".weight").unwrap_or(&item.name);
    match item.content {
        Content::Ternary(_) if planned.dtype == Dtype::U8 => {
            Ok(source.pack(path, Packing::HfU8, None)?.bytes)
        }
        Content::Ternary(_) => {
            let scale = source.scale(path, "the packed form of Hugging Face")?;
            let stored = match scale_use {
                ScaleUse::Multiply => scale,
                ScaleUse::Divide => inverse_of(scale),
            };
            Ok(stored.to_le_bytes().to_vec().into())
        }
        Content::Vector(stored) => {
            let values = source.vector(&item.name, None)?;
            let vector = Vector(values);
            let format = FloatFormat::Plain(stored.unwrap_or(FloatType::F32));
            Ok(encode_float(format, &vector, &item.name)?.into())
        }
        Content::Float(FloatFormat::Plain(_)) => source.float(path, None),
        Content::Float(_) => {
            let format = FloatFormat::Plain(FloatType::F32);
            Ok(encode_float(format, &*source.float_rows(path)?, &item.name)?.into())
        }
        Content::Table(table) => {
            source.table(&item.name, FloatFormat::Plain(table_type(table, options)?))
        }
    }
}

/// Numbers as a matrix of one row.
struct Vector(Vec<f32>);

impl bitnet_core::weights::FloatRows for Vector {
    fn rows(&self) -> usize {
        1
    }

    fn cols(&self) -> usize {
        self.0.len()
    }

    fn decode_row(&self, _row: usize, out: &mut [f32]) {
        out.copy_from_slice(&self.0);
    }
}

/// The number whose inverse is `scale`, if there is one; else the nearest to it.
fn inverse_of(scale: f32) -> f32 {
    let guess = 1.0 / scale;
    let candidates = [guess, guess.next_up(), guess.next_down()];
    candidates.into_iter().find(|candidate| 1.0 / candidate == scale).unwrap_or(guess)
}

fn dtype(number: FloatType) -> Dtype {
    match number {
        FloatType::F32 => Dtype::F32,
        FloatType::F16 => Dtype::F16,
        FloatType::BF16 => Dtype::BF16,
    }
}

/// The plain format that holds a stored one exactly.
fn plain(stored: FloatFormat) -> FloatType {
    match stored {
        FloatFormat::Plain(number) => number,
        _ => FloatType::F32,
    }
}

fn table_type(table: Table, options: ConvertOptions) -> Result<FloatType> {
    match (options.tables, table) {
        (Some(FloatFormat::Plain(number)), _) => Ok(number),
        (Some(other), _) => {
            Err(Error::unsupported("tables in safetensors", other, "F32, F16, BF16"))
        }
        (None, Table::Float(stored)) => Ok(plain(stored)),
        // Trits times a half-precision scale.
        (None, Table::Ternary) => Ok(FloatType::F16),
    }
}

fn notes(items: &[Item]) -> Option<String> {
    let grouped =
        |item: &&Item| matches!(item.content, Content::Ternary(ActivationQuant::PerGroup(_)));
    items.iter().find(grouped).map(|_| {
        "the weights were trained with float activations; programs that read packed folders \
         quantize them to 8 bits a token"
            .to_owned()
    })
}

/// Copies or makes the files that say something about text; not yet committed.
fn text_files(source: &Source<'_>, options: ConvertOptions, out: &Path) -> Result<Vec<NewFile>> {
    let mut contents: Vec<(&str, Bytes)> = Vec::new();
    match &source.checkpoint.parts().origin {
        Origin::Folder(files) => {
            for name in TEXT_FILES {
                contents.extend(files.read(name, MAX_TEXT_FILE)?.map(|bytes| (name, bytes)));
            }
        }
        Origin::Gguf(_) => {
            let text = source.checkpoint.text();
            if let Some(TokenizerSource::Gguf(vocabulary)) = &text.tokenizer {
                let json = tokenizer_json::build(vocabulary, text)?;
                contents.push((TOKENIZER, json.to_string().into()));
                let settings = tokenizer_config(text, source.checkpoint.config());
                contents.push(("tokenizer_config.json", format!("{settings:#}\n").into()));
            }
            let generation = json!({
                "bos_token_id": text.bos_token_id, "eos_token_id": text.eos_token_ids
            });
            contents.push(("generation_config.json", format!("{generation:#}\n").into()));
        }
    }
    let mut files = Vec::new();
    for (name, bytes) in contents {
        let mut file = NewFile::create(&out.join(name), options.force)?;
        file.write(&bytes)?;
        files.push(file);
    }
    Ok(files)
}

fn tokenizer_config(text: &TextAssets, config: &ModelConfig) -> Value {
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

/// The new `config.json`: the source's own, if it has one, with what changes.
fn config_json(source: &Source<'_>, scale_use: ScaleUse, items: &[Item]) -> Result<Value> {
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
    let (class, model_type) = match config.architecture {
        Architecture::Bitnet => ("BitNetForCausalLM", "bitnet"),
        Architecture::Llama => ("LlamaForCausalLM", "llama"),
        Architecture::Qwen3 => ("Qwen3ForCausalLM", "qwen3"),
    };
    let settings = json!({
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
    });
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

//! A model on its way out of training: as the engine opens it, and as files.
//!
//! Masters become a Hugging Face folder whose configuration says that projections are quantized at load;
//! everything else (packed folders, GGUF) is made of that by the converters of `bitnet-quant`, so that
//! a trained model takes the way any other model takes.

use std::collections::HashMap;
use std::path::{Path, PathBuf};

use ::safetensors::Dtype;
use bitnet_quant::checkpoint::{Checkpoint, ModelFiles};
use bitnet_quant::config::{Architecture, ModelConfig};
use bitnet_quant::convert::{self, ConvertOptions, NewFile, Progress, Target};
use bitnet_quant::quantize::{self, QuantizeOptions};
use bitnet_quant::safetensors::{self, Planned};
use bytes::Bytes;
use serde_json::{Value, json};

use crate::error::{Error, Result};
use crate::model::{Model, Precision};

/// What a model's text files say of its special tokens.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct SpecialIds {
    /// Begins a text.
    pub bos: Option<u32>,
    /// Ends a text.
    pub eos: Option<u32>,
}

/// Opens `model` as the engine would open it from a folder: its masters with the text files of the
/// folder `text`. All of it is in memory.
///
/// # Errors
/// Text files that cannot be read.
pub fn checkpoint(model: &Model, name: &str, text: &Path) -> Result<Checkpoint> {
    Ok(Checkpoint::from_files(ModelFiles::in_memory(name, files(model, text)?))?)
}

/// Writes the masters of `model` into the folder `out`: what [`checkpoint()`] opens.
///
/// # Errors
/// A full disk.
pub fn write_masters(model: &Model, text: &Path, out: &Path) -> Result<()> {
    std::fs::create_dir_all(out).map_err(|error| Error::io(out, "create", error))?;
    for (name, bytes) in files(model, text)?.into_iter().rev() {
        let mut file = NewFile::create(&out.join(name), true)?;
        file.write(&bytes)?;
        file.commit()?;
    }
    Ok(())
}

/// The files of a folder with masters; `config.json` first.
fn files(model: &Model, text: &Path) -> Result<Vec<(String, Bytes)>> {
    let ids = special_ids(text)?;
    let config = format!("{:#}\n", config_json(model.config(), model.precision(), ids)?);
    let mut files: Vec<(String, Bytes)> = vec![
        ("config.json".into(), config.into()),
        ("model.safetensors".into(), weights(model)?.into()),
    ];
    for name in convert::TEXT_FILES {
        let path = text.join(name);
        if path.is_file() {
            let bytes = std::fs::read(&path).map_err(|error| Error::io(&path, "read", error))?;
            files.push((name.into(), bytes.into()));
        }
    }
    Ok(files)
}

/// Whether [`write()`] can make this form of a checkpoint that [`checkpoint()`] made; to be asked before
/// a long run.
///
/// # Errors
/// A form that cannot hold the model.
pub fn check(checkpoint: &Checkpoint, precision: Precision, target: Target) -> Result<()> {
    let options = options(precision, target)?;
    match precision {
        Precision::Ternary => quantize::check(checkpoint, &QuantizeOptions::new(options))?,
        Precision::Float => convert::check(checkpoint, options)?,
    }
    Ok(())
}

/// Writes a checkpoint that [`checkpoint()`] made: a folder or a GGUF file, as `target` demands.
/// Ternary models become ternary weights with embeddings in bf16 (f16 in GGUF); float models stay as
/// they are.
///
/// # Errors
/// A form that cannot hold the model, a full disk, files in the way.
pub fn write(
    checkpoint: &Checkpoint,
    precision: Precision,
    target: Target,
    out: &Path,
    force: bool,
) -> Result<PathBuf> {
    let options = ConvertOptions { force, ..options(precision, target)? };
    let quiet = &mut |_: Progress<'_>| {};
    match precision {
        Precision::Ternary => {
            quantize::quantize(checkpoint, &QuantizeOptions::new(options), out, quiet)?
        }
        Precision::Float => convert::convert(checkpoint, options, out, quiet)?,
    };
    Ok(out.to_owned())
}

/// How a form is written.
fn options(precision: Precision, target: Target) -> Result<ConvertOptions> {
    let tables = match (precision, target) {
        (Precision::Float, _) => None,
        (Precision::Ternary, Target::Folder(_)) => Some("bf16"),
        (Precision::Ternary, Target::Gguf(_)) => Some("f16"),
    };
    let tables = tables.map(convert::table_format).transpose()?;
    Ok(ConvertOptions { tables, ..ConvertOptions::new(target) })
}

/// `model.safetensors` with the masters in float32.
fn weights(model: &Model) -> Result<Vec<u8>> {
    let mut plan: Vec<Planned> = model
        .named_parameters()
        .map(|(parameter, _)| Planned {
            name: parameter.name.clone(),
            dtype: Dtype::F32,
            shape: parameter.shape.clone(),
        })
        .collect();
    safetensors::sort(&mut plan);
    let mut out = Vec::with_capacity(model.parameter_count() * 4 + (1 << 16));
    safetensors::write_header(&mut out, &plan)
        .map_err(|error| Error::io("model.safetensors", "write", error))?;
    let by_name: HashMap<&str, &[f32]> =
        model.named_parameters().map(|(p, values)| (p.name.as_str(), values)).collect();
    for planned in &plan {
        out.extend(by_name[planned.name.as_str()].iter().flat_map(|x| x.to_le_bytes()));
    }
    Ok(out)
}

/// `config.json` of a model.
fn config_json(config: &ModelConfig, precision: Precision, ids: SpecialIds) -> Result<Value> {
    let architecture = match config.sub_norms {
        // Norms inside attention and feed-forward make a llama a bitnet.
        true => Architecture::Bitnet,
        false => Architecture::Llama,
    };
    let mut value = convert::config_json(&ModelConfig { architecture, ..config.clone() })?;
    value["bos_token_id"] = json!(ids.bos);
    value["eos_token_id"] = json!(ids.eos);
    value["dtype"] = json!("float32");
    if precision == Precision::Ternary {
        value["quantization_config"] = json!({
            "quant_method": "bitnet",
            "linear_class": "autobitlinear",
            "quantization_mode": "online",
            "modules_to_not_convert": ["lm_head"],
        });
    }
    Ok(value)
}

fn special_ids(text: &Path) -> Result<SpecialIds> {
    let assets = bitnet_quant::text::TextAssets::from_folder(text)?;
    Ok(SpecialIds { bos: assets.bos_token_id, eos: assets.eos_token_ids.first().copied() })
}

//! Writes a Hugging Face folder: `config.json`, `model.safetensors`, tokenizer files.
//!
//! The files of a Hugging Face source that say more than this crate reads (tokenizer settings,
//! generation settings) are copied as they are; for other sources they are made anew.

pub(super) mod settings;

use super::output::NewFile;
use super::source::{Content, Item, Source, Table};
use super::{ConvertOptions, Meter, Progress, Report, ScaleUse, tokenizer_json};
use crate::checkpoint::Origin;
use crate::error::{Error, Result};
use crate::files::ModelFiles;
use crate::mapping::FileBytes;
use crate::pack::{FloatFormat, Packing, encode_float, hf_u8};
use crate::safetensors::{self, Planned};
use crate::text::TokenizerSource;
use ::safetensors::Dtype;
use bitnet_core::weights::{ActivationQuant, FloatType};
use bytes::Bytes;
use serde_json::json;
use std::path::{Path, PathBuf};

const CONFIG: &str = "config.json";
const WEIGHTS: &str = "model.safetensors";
const TOKENIZER: &str = "tokenizer.json";

/// The files of a Hugging Face folder that say something about text; they follow a model.
pub const TEXT_FILES: [&str; 6] = [
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

/// Whether a folder can be written: makes its settings and plans its tensors, and no more.
pub(super) fn check(
    source: &Source<'_>,
    scale_use: ScaleUse,
    options: ConvertOptions,
) -> Result<()> {
    let items = source.items()?;
    settings::config_json(source, scale_use, &items)?;
    items.iter().try_for_each(|item| planned(item, options).map(drop))?;
    text_contents(source).map(drop)
}

/// Writes the text files alone.
pub(super) fn write_text(source: &Source<'_>, options: ConvertOptions, out: &Path) -> Result<()> {
    std::fs::create_dir_all(out).map_err(|e| Error::io(out, "create", e))?;
    text_files(source, options, out)?.into_iter().try_for_each(NewFile::commit)
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
    let config = settings::config_json(source, scale_use, &items)?;
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
    let written: Vec<PathBuf> = finished.iter().map(|file| file.path().to_owned()).collect();
    finished.into_iter().try_for_each(NewFile::commit)?;
    // What another model's tokenizer or template left behind would be taken for this one's.
    for left in TEXT_FILES.map(|name| out.join(name)).iter().filter(|&left| !written.contains(left))
    {
        match std::fs::remove_file(left) {
            Err(e) if e.kind() != std::io::ErrorKind::NotFound => {
                return Err(Error::io(left, "remove", e));
            }
            _ => {}
        }
    }
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
    let mut files = Vec::new();
    for (name, bytes) in text_contents(source)? {
        let mut file = NewFile::create(&out.join(name), options.force)?;
        file.write(&bytes)?;
        files.push(file);
    }
    Ok(files)
}

/// Names and bytes of the files that say something about text.
fn text_contents(source: &Source<'_>) -> Result<Vec<(&'static str, Bytes)>> {
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
                let settings = settings::tokenizer_config(text, source.checkpoint.config());
                contents.push(("tokenizer_config.json", format!("{settings:#}\n").into()));
            }
            let generation = json!({
                "bos_token_id": text.bos_token_id, "eos_token_id": text.eos_token_ids
            });
            contents.push(("generation_config.json", format!("{generation:#}\n").into()));
        }
    }
    Ok(contents)
}

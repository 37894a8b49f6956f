//! Checkpoints of a run: everything a resumed run needs to give the losses of an uninterrupted one.
//!
//! ```text
//! checkpoints/step-00000500/state.safetensors   masters, and their moments as NAME.first, NAME.second
//! checkpoints/step-00000500/state.json          step, tokens, seconds, place in the data
//! ```
//!
//! A checkpoint is written beside its place and renamed when it is whole; so what has the name of one
//! can be used. Only the newest are kept.

use std::collections::{BTreeMap, HashMap};
use std::fs;
use std::path::{Path, PathBuf};

use ::safetensors::Dtype;
use bitnet_quant::convert::NewFile;
use bitnet_quant::mapping::open_mapped;
use bitnet_quant::safetensors::{self, Planned};
use serde::{Deserialize, Serialize};

use crate::data::MixtureState;
use crate::error::{Error, Result};
use crate::model::{Model, Precision};
use crate::trainer::{TrainOptions, Trainer};
use bitnet_quant::config::ModelConfig;

const TENSORS: &str = "state.safetensors";
const SETTINGS: &str = "state.json";
const PREFIX: &str = "step-";
const FIRST: &str = ".first";
const SECOND: &str = ".second";

/// Where a run stands, beside the numbers of its model.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Position {
    /// Optimizer steps done.
    pub step: u64,
    /// Predictions trained on.
    pub tokens: u64,
    /// Seconds of training, over all sittings.
    pub seconds: f64,
    /// Place in the data.
    pub data: MixtureState,
    /// The recipe's seed and data, to notice when a run is continued with others.
    pub recipe: String,
    /// Model, tokenizer and data by name, for the same purpose; older checkpoints have none.
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    pub made_of: BTreeMap<String, String>,
}

/// Writes a checkpoint into `folder` and removes all but the newest `keep`.
///
/// # Errors
/// A full disk.
pub fn save(folder: &Path, trainer: &Trainer, position: &Position, keep: usize) -> Result<PathBuf> {
    let name = format!("{PREFIX}{:08}", position.step);
    let (part, whole) = (folder.join(format!(".{name}.part")), folder.join(&name));
    remove(&part)?;
    fs::create_dir_all(&part).map_err(|error| Error::io(&part, "create", error))?;
    write_tensors(&part.join(TENSORS), trainer)?;
    let mut file = NewFile::create(&part.join(SETTINGS), true)?;
    file.write(&serde_json::to_vec_pretty(position).map_err(Error::json)?)?;
    file.commit()?;
    remove(&whole)?;
    fs::rename(&part, &whole).map_err(|error| Error::io(&whole, "create", error))?;
    let found = list(folder)?;
    for (_, old) in found.iter().rev().skip(keep.max(1)) {
        remove(old)?;
    }
    Ok(whole)
}

fn remove(folder: &Path) -> Result<()> {
    match fs::remove_dir_all(folder) {
        Err(error) if error.kind() != std::io::ErrorKind::NotFound => {
            Err(Error::io(folder, "remove", error))
        }
        _ => Ok(()),
    }
}

/// The newest checkpoint in `folder`, if there is one.
///
/// # Errors
/// A folder that cannot be read.
pub fn newest(folder: &Path) -> Result<Option<PathBuf>> {
    Ok(list(folder)?.pop().map(|(_, path)| path))
}

/// Checkpoints by step.
fn list(folder: &Path) -> Result<Vec<(u64, PathBuf)>> {
    let entries = match fs::read_dir(folder) {
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => return Ok(Vec::new()),
        entries => entries.map_err(|error| Error::io(folder, "read", error))?,
    };
    let mut found: Vec<(u64, PathBuf)> = entries
        .filter_map(|entry| {
            let entry = entry.ok()?;
            let step = entry.file_name().to_str()?.strip_prefix(PREFIX)?.parse().ok()?;
            Some((step, entry.path()))
        })
        .collect();
    found.sort();
    Ok(found)
}

fn write_tensors(path: &Path, trainer: &Trainer) -> Result<()> {
    let mut plan = Vec::new();
    let mut numbers: HashMap<String, &[f32]> = HashMap::new();
    let mut add = |name: String, shape: &[usize], values| {
        plan.push(Planned { name: name.clone(), dtype: Dtype::F32, shape: shape.to_vec() });
        numbers.insert(name, values);
    };
    for (parameter, values) in trainer.model().named_parameters() {
        add(parameter.name.clone(), &parameter.shape, values);
    }
    for (parameter, first, second) in trainer.state() {
        add(format!("{}{FIRST}", parameter.name), &parameter.shape, first);
        add(format!("{}{SECOND}", parameter.name), &parameter.shape, second);
    }
    safetensors::sort(&mut plan);
    let mut file = NewFile::create(path, true)?;
    safetensors::write_header(file.writer(), &plan)
        .map_err(|error| Error::io(path, "write", error))?;
    for planned in &plan {
        let bytes: Vec<u8> = numbers[&planned.name].iter().flat_map(|x| x.to_le_bytes()).collect();
        file.write(&bytes)?;
    }
    Ok(file.commit()?)
}

/// Where the run of a checkpoint stood.
///
/// # Errors
/// A checkpoint that is damaged.
pub fn position(checkpoint: &Path) -> Result<Position> {
    let path = checkpoint.join(SETTINGS);
    let json = fs::read(&path).map_err(|error| Error::io(&path, "read", error))?;
    serde_json::from_slice(&json).map_err(Error::json)
}

/// The trainer of a checkpoint.
///
/// # Errors
/// A checkpoint that is damaged or belongs to a model of another shape.
pub fn load(
    checkpoint: &Path,
    config: ModelConfig,
    precision: Precision,
    options: TrainOptions,
) -> Result<(Trainer, Position)> {
    let position = position(checkpoint)?;
    let bytes = open_mapped(checkpoint.join(TENSORS))?;
    let mut tensors = HashMap::new();
    for (name, tensor) in safetensors::read(&bytes)? {
        if tensor.dtype != Dtype::F32 {
            return Err(Error::tensor(name, "F32", tensor.dtype.to_string()));
        }
        let numbers = tensor.bytes.chunks_exact(4);
        let values: Vec<f32> =
            numbers.map(|b| f32::from_le_bytes([b[0], b[1], b[2], b[3]])).collect();
        tensors.insert(name, (tensor.shape, values));
    }
    let model = Model::from_tensors(config, precision, &tensors)?;
    let mut trainer = Trainer::new(model, options)?;
    let moment = |name: &str, which: &str| {
        tensors.get(&format!("{name}{which}")).map(|(_, values)| values.clone())
    };
    trainer
        .load_state(position.step, |name| Some((moment(name, FIRST)?, moment(name, SECOND)?)))?;
    Ok((trainer, position))
}

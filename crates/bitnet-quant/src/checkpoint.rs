//! One view of every model file and folder.
//!
//! Whatever the format, a checkpoint has hyper-parameters, text assets and tensors under the names
//! Hugging Face gives them; [`Checkpoint::linear`] says what the bytes of a projection mean.
//! Opening checks all names, shapes and settings against each other and reads no weights; weights
//! are checked when they are asked for, and decoded when a backend reads their rows.
//!
//! Knows formats only through `hf` and `gguf`, and runs no model.

pub(crate) mod shapes;
mod tensor;
mod weights;

use crate::config::ModelConfig;
use crate::error::{Error, Result};
use crate::gguf;
use crate::hf::{self, Quantization};
use crate::mapping::{self, FileBytes};
use crate::pack::I2sLayout;
use crate::rows::HeadOrder;
use crate::text::TextAssets;
use std::collections::BTreeMap;
use std::fmt;
use std::path::Path;

pub use crate::files::ModelFiles;
pub use tensor::TensorEntry;
pub(crate) use tensor::{Kind, Tensor, plain as plain_format};

/// A model file or folder, opened and checked.
///
/// ```
/// use bitnet_quant::Checkpoint;
///
/// let folder = concat!(env!("CARGO_MANIFEST_DIR"), "/../../fixtures/goldens/bitnet-tiny");
/// let gguf = Checkpoint::open(format!("{folder}/model-i2_s.gguf"))?;
/// let packed = Checkpoint::open(format!("{folder}/packed_multiply"))?;
/// assert_eq!(gguf.config().hidden_size, packed.config().hidden_size);
///
/// let q_proj = gguf.linear("model.layers.0.self_attn.q_proj")?;
/// assert_eq!(q_proj.matrix.shape(), (128, 128));
/// # Ok::<(), bitnet_quant::Error>(())
/// ```
pub struct Checkpoint {
    parts: Parts,
}

/// What a format's loader finds.
pub(crate) struct Parts {
    /// How messages name the file or folder.
    pub(crate) place: String,
    pub(crate) config: ModelConfig,
    pub(crate) text: TextAssets,
    pub(crate) format: FileFormat,
    pub(crate) overrides: Vec<Override>,
    /// By canonical name, `model.norm.weight`.
    pub(crate) tensors: BTreeMap<String, Tensor>,
    /// Epsilon of norms inside projections, if there are any.
    pub(crate) projection_norm_eps: f32,
    /// How float projections are to be read.
    pub(crate) quantization: Option<Quantization>,
    /// Activation group of ternary weights that were not trained with 8-bit tokens, where the file
    /// says so.
    pub(crate) activation_group: Option<usize>,
    /// The order of rows in `q_proj` and `k_proj`, where it is not that of halves.
    pub(crate) head_order: Option<HeadOrder>,
    /// Where all this was read from.
    pub(crate) origin: Origin,
}

/// Where a checkpoint was read from, for those who need more of it than the view has.
pub(crate) enum Origin {
    /// A Hugging Face folder.
    Folder(ModelFiles),
    /// The bytes of a GGUF file.
    Gguf(FileBytes),
}

/// The formats a checkpoint can have.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[non_exhaustive]
pub enum FileFormat {
    /// A Hugging Face folder.
    Safetensors,
    /// A GGUF file of this version.
    Gguf(u32),
}

impl fmt::Display for FileFormat {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Safetensors => f.write_str("safetensors"),
            Self::Gguf(version) => write!(f, "GGUF v{version}"),
        }
    }
}

/// Metadata known to be wrong and replaced.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Override {
    /// The setting: `chat template`, `eos tokens`, …
    pub what: &'static str,
    /// What the file says.
    pub found: String,
    /// What is used in its place.
    pub used: String,
    /// Why.
    pub why: &'static str,
}

/// How many weights a checkpoint has.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct WeightCount {
    /// Numbers in ternary matrices, and in masters that will be quantized.
    pub ternary: u64,
    /// All others. Trits that a float checkpoint stores as floats are among them: only reading them
    /// tells.
    pub float: u64,
}

/// What cannot be learnt from a file and must be said.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct OpenOptions {
    /// The layout of I2_S tensors, which carry no mark of it. `None`: the one the weights speak
    /// for, and the canonical one if they are silent.
    pub i2s_layout: Option<I2sLayout>,
}

impl Checkpoint {
    /// Opens a GGUF file, a safetensors file with `config.json` beside it, or a folder.
    ///
    /// Files are mapped, not read: their pages come into memory when used. Do not cut a file short
    /// while it is open.
    pub fn open(path: impl AsRef<Path>) -> Result<Self> {
        Self::open_with(path, OpenOptions::default())
    }

    /// As [`Checkpoint::open`], with what the file cannot say.
    pub fn open_with(path: impl AsRef<Path>, options: OpenOptions) -> Result<Self> {
        let path = path.as_ref();
        let metadata = std::fs::metadata(path).map_err(|e| Error::io(path, "open", e))?;
        if metadata.is_dir() {
            return Self::from_folder(&ModelFiles::folder(path), options);
        }
        let bytes = mapping::open_mapped(path)?;
        if bytes.starts_with(gguf::load::MAGIC) {
            return Self::from_gguf(&bytes, &path.display().to_string(), options);
        }
        let parent = path.parent().filter(|parent| !parent.as_os_str().is_empty());
        let files = ModelFiles::folder(parent.unwrap_or(Path::new(".")));
        match path.file_name().and_then(|name| name.to_str()) {
            Some(name) if name.ends_with(".safetensors") => {
                Self::assemble(hf::load(&files, Some(name))?)
            }
            Some(name) if name.ends_with(".safetensors.index.json") || name == "config.json" => {
                Self::assemble(hf::load(&files, None)?)
            }
            _ => {
                let start = &bytes[..bytes.len().min(4)];
                let got = format!("a file that starts with {start:02x?}");
                let error = Error::malformed("model file", "GGUF or safetensors", got);
                Err(error.in_file(path.display()))
            }
        }
    }

    /// Opens the files of a model: a folder, or bytes in memory, which are shared and not copied.
    pub fn from_files(files: ModelFiles) -> Result<Self> {
        Self::from_folder(&files, OpenOptions::default())
    }

    /// A folder with `config.json`, or with one GGUF file.
    fn from_folder(files: &ModelFiles, options: OpenOptions) -> Result<Self> {
        if files.has("config.json") {
            return Self::assemble(hf::load(files, None)?);
        }
        match files.names_with("gguf")?.as_slice() {
            [] => Err(Error::missing("config.json or a GGUF file").in_file(files.place())),
            [name] => {
                let bytes = files.map(name)?.ok_or_else(|| Error::missing(name))?;
                Self::from_gguf(&bytes, &files.label(name), options)
            }
            several => {
                let error = Error::malformed("GGUF files", "one", several.join(", "));
                Err(error.in_file(files.place()))
            }
        }
    }

    fn from_gguf(bytes: &FileBytes, label: &str, options: OpenOptions) -> Result<Self> {
        let parts = gguf::load::load(bytes, label, options).map_err(|e| e.in_file(label))?;
        Self::assemble(parts)
    }

    /// Checks the parts against each other.
    fn assemble(mut parts: Parts) -> Result<Self> {
        let place = parts.place.clone();
        shapes::complete_config(&mut parts).map_err(|e| e.in_file(&place))?;
        shapes::check(&parts).map_err(|e| e.in_file(&place))?;
        Ok(Self { parts })
    }

    /// What it was made of.
    pub(crate) fn parts(&self) -> &Parts {
        &self.parts
    }

    /// The hyper-parameters.
    pub fn config(&self) -> &ModelConfig {
        &self.parts.config
    }

    /// Tokenizer, chat template, special tokens.
    pub fn text(&self) -> &TextAssets {
        &self.parts.text
    }

    /// The format it is stored in.
    pub fn file_format(&self) -> FileFormat {
        self.parts.format
    }

    /// Metadata that was known to be wrong and replaced.
    pub fn overrides(&self) -> &[Override] {
        &self.parts.overrides
    }

    /// The GGUF file it was read from, with its metadata, opened anew; `None` for other formats.
    ///
    /// # Errors
    /// As [`GgufFile::from_bytes`](gguf::GgufFile::from_bytes), if the file was changed meanwhile.
    pub fn gguf(&self) -> Result<Option<gguf::GgufFile>> {
        match &self.parts.origin {
            Origin::Gguf(bytes) => {
                gguf::GgufFile::from_bytes(bytes.clone(), &self.parts.place).map(Some)
            }
            _ => Ok(None),
        }
    }

    /// Every tensor of the files, also those no model uses, by canonical name.
    pub fn tensors(&self) -> Vec<TensorEntry> {
        self.parts.tensors.iter().map(|(name, tensor)| tensor.entry(name)).collect()
    }

    /// Paths of all projections, layer by layer, as [`Checkpoint::linear`] takes them.
    pub fn projections(&self) -> impl Iterator<Item = String> {
        let layers = 0..self.parts.config.num_hidden_layers;
        layers.flat_map(|index| shapes::PROJECTIONS.map(|part| shapes::layer(index, part)))
    }

    /// Whether there is a weight of the module `path`, for instance `lm_head`.
    pub fn has(&self, path: &str) -> bool {
        self.parts.tensors.contains_key(&format!("{path}.weight"))
    }

    /// Tells the system that the files will not be read for a while: their pages leave the process's
    /// memory, and come back where they are read all the same.
    pub fn release(&self) {
        match &self.parts.origin {
            Origin::Gguf(bytes) => bytes.release(),
            Origin::Folder(_) => {
                self.parts.tensors.values().for_each(|tensor| tensor.bytes.release());
            }
        }
    }

    /// Numbers in all tensors the model uses: weights, biases, norms; a tied head counts once, and
    /// scales do not count.
    pub fn total_weight_count(&self) -> u64 {
        let WeightCount { ternary, float } = self.weight_count();
        ternary + float
    }

    /// As [`Checkpoint::total_weight_count`], by kind.
    pub fn weight_count(&self) -> WeightCount {
        let mut count = WeightCount::default();
        for (name, shape) in shapes::expected(&self.parts) {
            let Some(tensor) = self.parts.tensors.get(&name) else { continue };
            let numbers = shape.iter().map(|&size| size as u64).product::<u64>();
            let path = name.strip_suffix(".weight").unwrap_or_default();
            let quantized = self.parts.quantization.as_ref().is_some_and(|q| q.converts(path));
            match tensor.kind {
                Kind::Ternary(_) => count.ternary += numbers,
                _ if quantized && path.ends_with("_proj") => count.ternary += numbers,
                _ => count.float += numbers,
            }
        }
        count
    }
}

impl fmt::Debug for Checkpoint {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Checkpoint")
            .field("place", &self.parts.place)
            .field("format", &self.parts.format)
            .field("config", &self.parts.config)
            .finish_non_exhaustive()
    }
}

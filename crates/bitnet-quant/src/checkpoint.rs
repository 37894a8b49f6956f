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

use crate::absmean::{Absmean, StoredTernary};
use crate::config::{Architecture, ModelConfig};
use crate::error::{Error, Result};
use crate::gguf;
use crate::hf::{self, Mode, Quantization, ScaleUse};
use crate::mapping::{self, FileBytes};
use crate::pack::{I2sLayout, Packing, TernaryTensor};
use crate::rows::{Dequantized, HeadOrder, ReorderedFloat, ReorderedTernary, Rescaled};
use crate::text::TextAssets;
use bitnet_core::weights::{
    ActivationQuant, FloatRows, LinearWeights, Matrix, NormWeights, Scales, TernaryRows,
};
use std::collections::BTreeMap;
use std::fmt;
use std::path::Path;
use std::sync::Arc;

pub use crate::files::ModelFiles;
pub use tensor::TensorEntry;
pub(crate) use tensor::{Kind, Tensor, plain as plain_format};

/// Columns that share an activation scale where ternary weights meet activations they were not
/// trained with: the width of ggml's 8-bit blocks, so that no accuracy is lost against it.
const ACTIVATION_GROUP: usize = 32;

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
    /// All others.
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

    /// The projection `path`, for instance `model.layers.0.self_attn.q_proj`.
    ///
    /// Reads and checks its codes and scales, or measures its masters; that may use the threads of
    /// rayon.
    pub fn linear(&self, path: &str) -> Result<LinearWeights> {
        self.read_linear(path).map_err(|e| e.in_file(self.file_of(&format!("{path}.weight"))))
    }

    /// The norm `path`, for instance `model.layers.0.input_layernorm`.
    pub fn norm(&self, path: &str) -> Result<NormWeights> {
        let name = format!("{path}.weight");
        let weight = self.vector(&name).map_err(|e| e.in_file(self.file_of(&name)))?;
        let weight = weight.ok_or_else(|| self.lacks(&name))?;
        Ok(NormWeights { weight, eps: self.parts.config.rms_norm_eps })
    }

    /// The embedding table or head `path`: `model.embed_tokens` or `lm_head`. A ternary table is
    /// decoded to floats.
    pub fn table(&self, path: &str) -> Result<Arc<dyn FloatRows>> {
        let name = format!("{path}.weight");
        let (tensor, shape) = self.matrix_tensor(&name)?;
        let table: Result<Arc<dyn FloatRows>> = match tensor.kind {
            Kind::Ternary(packing) if packing.has_scales() => {
                let rows = tensor.ternary(&name, packing, shape);
                rows.map(|rows| -> Arc<dyn FloatRows> { Arc::new(Dequantized(Arc::new(rows))) })
            }
            _ => tensor.float(&name, shape),
        };
        table.map_err(|e| e.in_file(&tensor.file))
    }

    /// Whether the projection `path` lies in the file as floats, whatever is made of them.
    pub(crate) fn is_stored_float(&self, path: &str) -> bool {
        let tensor = self.parts.tensors.get(&format!("{path}.weight"));
        tensor.is_some_and(|tensor| matches!(tensor.kind, Kind::Float(_)))
    }

    /// The floats of a projection that lies in the file as such, rows in the order of halves.
    pub(crate) fn stored_float(&self, path: &str) -> Result<Arc<dyn FloatRows>> {
        let name = format!("{path}.weight");
        let (tensor, shape) = self.matrix_tensor(&name)?;
        let source = tensor.float(&name, shape).map_err(|e| e.in_file(&tensor.file))?;
        Ok(match self.head_order(path) {
            Some(order) => Arc::new(ReorderedFloat { source, order }),
            None => source,
        })
    }

    /// The order in which the file has the rows of a projection, where it is not that of halves.
    pub(crate) fn head_order(&self, path: &str) -> Option<HeadOrder> {
        let ordered = path.ends_with(".q_proj") || path.ends_with(".k_proj");
        self.parts.head_order.filter(|_| ordered)
    }

    fn read_linear(&self, path: &str) -> Result<LinearWeights> {
        let name = format!("{path}.weight");
        let (tensor, shape) = self.matrix_tensor(&name)?;
        let mut matrix = self.matrix(path, &name, tensor, shape)?;
        let mut bias = self.vector(&format!("{path}.bias"))?;
        if let Some(order) = self.head_order(path) {
            matrix = match matrix {
                Matrix::Float(source) => Matrix::Float(Arc::new(ReorderedFloat { source, order })),
                Matrix::Ternary { weights, activations } => Matrix::Ternary {
                    weights: Arc::new(ReorderedTernary::new(weights, order)),
                    activations,
                },
            };
            bias = bias.map(|bias| order.reorder(&bias, shape.0));
        }
        let norm = self.vector(&format!("{path}.norm.weight"))?;
        let eps = self.parts.projection_norm_eps;
        let input_norm = norm.map(|weight| NormWeights { weight, eps });
        Ok(LinearWeights { matrix, bias, input_norm })
    }

    /// What the bytes of a projection mean.
    fn matrix(
        &self,
        path: &str,
        name: &str,
        tensor: &Tensor,
        shape: (usize, usize),
    ) -> Result<Matrix> {
        let quantization = self.parts.quantization.as_ref().filter(|q| q.converts(path));
        let weights: Arc<dyn TernaryRows> = match tensor.kind {
            Kind::Ternary(Packing::HfU8) => {
                let scale = self.weight_scale(path)?;
                let scale = scale.ok_or_else(|| self.lacks(&format!("{path}.weight_scale")))?;
                let (packing, bytes) = (Packing::HfU8, tensor.bytes.clone());
                let scales = Scales::Tensor(scale);
                Arc::new(TernaryTensor::with_scales(
                    name, packing, shape.0, shape.1, bytes, scales,
                )?)
            }
            Kind::Ternary(packing) => {
                let stored = Arc::new(tensor.ternary(name, packing, shape)?);
                self.with_output_scale(path, stored)?
            }
            _ => {
                let float = tensor.float(name, shape)?;
                let mode = quantization.map(|q| q.mode);
                match (mode, StoredTernary::detect(&float).filter(|_| mode != Some(Mode::Online))) {
                    (Some(Mode::Offline), Some(stored)) => {
                        self.with_weight_scale(path, Arc::new(stored))?
                    }
                    (Some(Mode::Offline), None) => {
                        let expected = "ternary weights, as quantization_mode offline promises";
                        return Err(Error::malformed(name, expected, "others"));
                    }
                    (_, Some(stored)) => self.with_output_scale(path, Arc::new(stored))?,
                    (Some(Mode::Online | Mode::Either), None) => {
                        Arc::new(Absmean::new(name, float)?)
                    }
                    (None, None) => return self.float_matrix(path, float),
                }
            }
        };
        let activations = self.activations(&*weights, quantization.is_some(), &tensor.kind);
        Ok(Matrix::Ternary { weights, activations })
    }

    /// How the input of ternary weights is quantized.
    ///
    /// BitNet models are trained with 8-bit tokens. Of other files those with one scale for a whole
    /// matrix are BitNet models too (Llama3-1.58, Falcon-E); several scales, or ternary weights in
    /// a float checkpoint (TriLM, Bonsai), tell of training with float activations.
    fn activations(
        &self,
        weights: &dyn TernaryRows,
        quantized: bool,
        stored: &Kind,
    ) -> ActivationQuant {
        if let Some(group) = self.parts.activation_group {
            return ActivationQuant::PerGroup(group);
        }
        let config = &self.parts.config;
        let bitnet = quantized
            || config.architecture == Architecture::Bitnet
            || config.projection_norm_eps.is_some()
            || matches!((weights.scales(), stored), (Scales::Tensor(_), Kind::Ternary(_)));
        match bitnet {
            true => ActivationQuant::PerToken,
            false => ActivationQuant::PerGroup(ACTIVATION_GROUP),
        }
    }

    /// What one trit is worth by the file's `weight_scale`, if it has one.
    fn weight_scale(&self, path: &str) -> Result<Option<f32>> {
        let name = format!("{path}.weight_scale");
        let Some(values) = self.vector(&name)? else { return Ok(None) };
        let [stored] = values[..] else {
            return Err(Error::malformed(name, "one number", values.len()));
        };
        let divides = self.parts.quantization.as_ref().map(|q| q.scale_use);
        let scale = if divides == Some(ScaleUse::Divide) { 1.0 / stored } else { stored };
        if scale.is_finite() {
            return Ok(Some(scale));
        }
        Err(Error::malformed(name, "a number that is not 0", stored))
    }

    fn with_weight_scale(
        &self,
        path: &str,
        weights: Arc<dyn TernaryRows>,
    ) -> Result<Arc<dyn TernaryRows>> {
        Ok(match self.weight_scale(path)? {
            Some(scale) => Arc::new(Rescaled::new(weights, scale)),
            None => weights,
        })
    }

    /// Some GGUF files have a factor on a projection's output beside it.
    fn with_output_scale(
        &self,
        path: &str,
        weights: Arc<dyn TernaryRows>,
    ) -> Result<Arc<dyn TernaryRows>> {
        let name = format!("{path}.output_scale");
        Ok(match self.vector(&name)?.as_deref() {
            None | Some([1.0]) => weights,
            Some([scale]) => Arc::new(Rescaled::new(weights, *scale)),
            Some(several) => return Err(Error::malformed(name, "one number", several.len())),
        })
    }

    fn float_matrix(&self, path: &str, float: Arc<dyn FloatRows>) -> Result<Matrix> {
        let name = format!("{path}.output_scale");
        match self.vector(&name)?.as_deref() {
            None | Some([1.0]) => Ok(Matrix::Float(float)),
            Some(_) => Err(Error::unsupported(name, "on float weights", "ternary weights")),
        }
    }

    /// All numbers of a tensor of one dimension, finite; `None` if there is no such tensor.
    pub(crate) fn vector(&self, name: &str) -> Result<Option<Vec<f32>>> {
        let Some(tensor) = self.parts.tensors.get(name) else { return Ok(None) };
        tensor.vector(name).map(Some).map_err(|e| e.in_file(&tensor.file))
    }

    /// A matrix and the `(rows, cols)` that the configuration gives it.
    fn matrix_tensor(&self, name: &str) -> Result<(&Tensor, (usize, usize))> {
        let tensor = self.parts.tensors.get(name).ok_or_else(|| self.lacks(name))?;
        let shape = shapes::matrix(&self.parts.config, name);
        let shape =
            shape.ok_or_else(|| Error::unsupported("matrix", name, "projections, tables"))?;
        Ok((tensor, shape))
    }

    fn lacks(&self, name: &str) -> Error {
        Error::missing(format!("tensor {name}")).in_file(&self.parts.place)
    }

    fn file_of(&self, name: &str) -> &str {
        self.parts.tensors.get(name).map_or(&self.parts.place, |tensor| &tensor.file)
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

//! Writes a checkpoint in another form: a Hugging Face folder with packed weights, or a GGUF file.
//!
//! No trit changes on the way. Scales are kept exactly where the target has room for them; where
//! it stores them in half precision, [`Report::scale_error`] says what that cost. Weights already
//! in the form asked for are copied byte by byte. One tensor at a time is in memory.
//!
//! | | what is written |
//! |---|---|
//! | projections | ternary ones in the form asked for, float ones as they are |
//! | embedding, head | as they are, or in the format asked for |
//! | norms, biases | as they are in folders, F32 in GGUF |
//! | settings | config.json, or the keys of llama.cpp and bitnet.cpp |
//! | text | tokenizer, chat template and special tokens, rewritten from one form to the other |

mod folder;
mod gguf_file;
mod output;
mod source;
mod tokenizer_json;
mod vocabulary;

use crate::checkpoint::Checkpoint;
use crate::config::ModelConfig;
use crate::error::{Error, Result};
use crate::pack::{FloatFormat, I2sLayout, Packing};
use bitnet_core::weights::FloatType;
use std::fmt;
use std::path::Path;
use std::str::FromStr;

pub use crate::hf::ScaleUse;
pub use folder::TEXT_FILES;
pub use output::NewFile;
pub(crate) use source::Source;

/// The form of a new checkpoint.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Target {
    /// A Hugging Face folder, ternary weights four to a byte, with scales that multiply or divide.
    Folder(ScaleUse),
    /// A GGUF file with ternary weights in this packing.
    Gguf(Packing),
}

/// Names of targets, as [`Target::from_str`] takes them.
const TARGETS: [(&str, Target); 9] = [
    ("hf", Target::Folder(ScaleUse::Multiply)),
    ("hf-divide", Target::Folder(ScaleUse::Divide)),
    ("i2_s", Target::Gguf(Packing::I2S(I2sLayout::Canonical128))),
    ("tq1_0", Target::Gguf(Packing::Tq1_0)),
    ("tq2_0", Target::Gguf(Packing::Tq2_0)),
    ("q2_0", Target::Gguf(Packing::Q2_0)),
    ("pq2_0", Target::Gguf(Packing::Q2_0G128)),
    ("ptq1_0", Target::Gguf(Packing::Ptq1_0)),
    ("tiles", Target::Gguf(Packing::Tiles)),
];

/// Names of the formats embeddings can be written in.
const TABLE_FORMATS: [(&str, FloatFormat); 5] = [
    ("f32", FloatFormat::Plain(FloatType::F32)),
    ("f16", FloatFormat::Plain(FloatType::F16)),
    ("bf16", FloatFormat::Plain(FloatType::BF16)),
    ("q8_0", FloatFormat::Q8_0),
    ("q6_k", FloatFormat::Q6K),
];

impl Target {
    /// All targets with their names.
    pub fn all() -> impl Iterator<Item = (&'static str, Self)> {
        TARGETS.into_iter()
    }
}

impl FromStr for Target {
    type Err = Error;

    fn from_str(name: &str) -> Result<Self> {
        by_name(&TARGETS, "target", name)
    }
}

impl fmt::Display for Target {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match (TARGETS.iter().find(|(_, target)| target == self), self) {
            (Some((name, _)), _) => f.write_str(name),
            (None, Self::Gguf(packing)) => packing.fmt(f),
            (None, Self::Folder(_)) => f.write_str("hf"),
        }
    }
}

/// The format of an embedding table by its name: `f32`, `f16`, `bf16`, `q8_0`, `q6_k`.
pub fn table_format(name: &str) -> Result<FloatFormat> {
    by_name(&TABLE_FORMATS, "table format", name)
}

fn by_name<T: Copy>(known: &[(&str, T)], what: &str, name: &str) -> Result<T> {
    let found = known.iter().find(|(known, _)| known.eq_ignore_ascii_case(name));
    found.map(|(_, value)| *value).ok_or_else(|| {
        let names: Vec<&str> = known.iter().map(|(name, _)| *name).collect();
        Error::unsupported(what, name, names.join(", "))
    })
}

/// What to write.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct ConvertOptions {
    /// The form.
    pub target: Target,
    /// The format of embedding and head; `None` keeps theirs, or the nearest that holds it exactly.
    pub tables: Option<FloatFormat>,
    /// Replace what is there already.
    pub force: bool,
}

impl ConvertOptions {
    /// Tables as they are, nothing replaced.
    pub fn new(target: Target) -> Self {
        Self { target, tables: None, force: false }
    }
}

/// How far a conversion has come.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Progress<'a> {
    /// The tensor written last.
    pub tensor: &'a str,
    /// Bytes of weights written.
    pub done: u64,
    /// Bytes of weights there will be.
    pub total: u64,
}

/// What a conversion did.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct Report {
    /// Bytes of weights written.
    pub bytes: u64,
    /// Tensors written.
    pub tensors: usize,
    /// Matrices written as ternary weights.
    pub ternary: usize,
    /// The largest relative change of a scale by rounding it to half precision; 0 if all are exact.
    pub scale_error: f32,
    /// What the new form cannot say, in sentences.
    pub notes: Vec<String>,
}

/// Writes `checkpoint` to `out`: a folder or a file, as the target demands.
///
/// Nothing appears under its final name before it is complete. `progress` is called after each
/// tensor. Uses the threads of rayon.
///
/// # Errors
/// A checkpoint that the target cannot hold, an `out` that exists (without
/// [`ConvertOptions::force`]), damaged weights, a full disk.
pub fn convert(
    checkpoint: &Checkpoint,
    options: ConvertOptions,
    out: impl AsRef<Path>,
    progress: &mut dyn FnMut(Progress<'_>),
) -> Result<Report> {
    write(&Source::new(checkpoint), options, out.as_ref(), progress)
}

/// Whether [`convert`] can write `checkpoint` in this form, as far as can be told without writing; to
/// be asked before long work whose result it will be.
///
/// # Errors
/// A checkpoint that the target cannot hold, damaged settings.
pub fn check(checkpoint: &Checkpoint, options: ConvertOptions) -> Result<()> {
    check_source(&Source::new(checkpoint), options)
}

/// Writes only what `checkpoint` says about text into the folder `out`: tokenizer, chat template,
/// special tokens, as `convert` to a folder does.
///
/// # Errors
/// As [`convert`].
pub fn write_text(checkpoint: &Checkpoint, out: impl AsRef<Path>, force: bool) -> Result<()> {
    let options =
        ConvertOptions { force, ..ConvertOptions::new(Target::Folder(ScaleUse::Multiply)) };
    folder::write_text(&Source::new(checkpoint), options, out.as_ref())
}

/// The `config.json` of a new Hugging Face checkpoint: shape, family and rotary embedding; special tokens
/// and quantization are for the caller to add.
///
/// # Errors
/// A rotary embedding that `config.json` cannot describe.
pub fn config_json(config: &ModelConfig) -> Result<serde_json::Value> {
    folder::settings::new_config_json(config)
}

/// What `convert` and `quantize` share.
pub(crate) fn write(
    source: &Source<'_>,
    options: ConvertOptions,
    out: &Path,
    progress: &mut dyn FnMut(Progress<'_>),
) -> Result<Report> {
    match options.target {
        Target::Folder(scale_use) => folder::write(source, scale_use, options, out, progress),
        Target::Gguf(packing) => gguf_file::write(source, packing, options, out, progress),
    }
}

/// What `check` and its twin in `quantize` share.
pub(crate) fn check_source(source: &Source<'_>, options: ConvertOptions) -> Result<()> {
    match options.target {
        Target::Folder(scale_use) => folder::check(source, scale_use, options),
        Target::Gguf(packing) => gguf_file::check(source, packing, options),
    }
}

/// Counts what was written and tells who listens.
struct Meter<'a> {
    report: Report,
    total: u64,
    progress: &'a mut dyn FnMut(Progress<'_>),
}

impl<'a> Meter<'a> {
    fn new(total: u64, progress: &'a mut dyn FnMut(Progress<'_>)) -> Self {
        Self { report: Report::default(), total, progress }
    }

    fn wrote(&mut self, tensor: &str, bytes: usize) {
        self.report.bytes += bytes as u64;
        self.report.tensors += 1;
        let Report { bytes: done, .. } = self.report;
        (self.progress)(Progress { tensor, done, total: self.total });
    }
}

//! Files that commands read and write without an engine: texts, models, and new models with a bar.

use std::io::{self, Read, Write};
use std::path::{Path, PathBuf};

use anyhow::Context;
use bitnet_inference::{BUILTIN_MODEL, builtin};
use bitnet_quant::checkpoint::{Checkpoint, OpenOptions};
use bitnet_quant::convert::{ConvertOptions, Progress, Report, ScaleUse, Target, table_format};
use bitnet_quant::pack::{FloatFormat, I2sLayout};
use clap::builder::PossibleValuesParser;
use clap::{Args, ValueEnum};
use serde_json::json;

use crate::exit::Usage;
use crate::term::{Term, Unit, bytes, count, counted, printable};

/// The whole text of a file; `-` stands for standard input.
///
/// # Errors
/// A file that cannot be read or is not UTF-8.
pub(crate) fn read_text(path: &Path) -> anyhow::Result<String> {
    let (bytes, name) = if path.as_os_str() == "-" {
        let mut bytes = Vec::new();
        io::stdin().lock().read_to_end(&mut bytes).context("cannot read standard input")?;
        (bytes, "standard input".into())
    } else {
        let name = path.display().to_string();
        (std::fs::read(path).with_context(|| format!("cannot read {name}"))?, name)
    };
    String::from_utf8(bytes).map_err(|error| {
        let at = error.utf8_error().valid_up_to();
        anyhow::anyhow!("{name}: expected UTF-8 text, got an invalid byte at offset {at}")
    })
}

/// A model file or folder to read.
#[derive(Debug, Args)]
pub(crate) struct InputArgs {
    /// GGUF file, safetensors file, Hugging Face folder, or 'builtin'
    #[arg(value_name = "MODEL")]
    pub(crate) input: PathBuf,
    /// Layout of I2_S tensors, where it is known better than it can be recognized: canonical, arm64
    /// or four-rows
    #[arg(long, value_name = "LAYOUT")]
    i2s_layout: Option<I2sLayout>,
}

impl InputArgs {
    /// Opens it and checks its names, shapes and settings.
    pub(crate) fn open(&self) -> anyhow::Result<Checkpoint> {
        let builtin = self.input.as_os_str() == BUILTIN_MODEL && !self.input.exists();
        let options = OpenOptions { i2s_layout: self.i2s_layout };
        Ok(if builtin {
            builtin::checkpoint()?
        } else {
            Checkpoint::open_with(&self.input, options)?
        })
    }
}

/// A model file or folder to write.
#[derive(Debug, Args)]
pub(crate) struct OutputArgs {
    /// Where to write: a folder for hf, a GGUF file for the others
    output: PathBuf,
    /// Form of the result [default: i2_s where OUTPUT ends in .gguf, else hf]
    #[arg(long, value_name = "FORM", value_parser = target_names())]
    to: Option<String>,
    /// What packed Hugging Face weights do with their scale [default: multiply]
    #[arg(long, value_enum, value_name = "USE")]
    scale: Option<ScaleArg>,
    /// Format of embedding and head: f32, f16, bf16, q8_0, q6_k [default: as they are]
    #[arg(long, value_name = "FORMAT", value_parser = table_format)]
    embedding: Option<FloatFormat>,
    /// Replace what is there already
    #[arg(long)]
    force: bool,
    /// Print what was done as one JSON object
    #[arg(long)]
    json: bool,
}

/// What packed Hugging Face weights do with their scale.
#[derive(Debug, Clone, Copy, ValueEnum)]
enum ScaleArg {
    Multiply, // as `autobitlinear` reads it
    Divide,   // as `bitlinear` reads it
}

/// The dividing folder is `--to hf --scale divide` here.
fn target_names() -> PossibleValuesParser {
    let names = Target::all().map(|(name, _)| name).filter(|name| *name != "hf-divide");
    PossibleValuesParser::new(names)
}

impl OutputArgs {
    /// The path to write.
    pub(crate) fn path(&self) -> &Path {
        &self.output
    }

    /// What the library is to write.
    pub(crate) fn options(&self) -> anyhow::Result<ConvertOptions> {
        let named =
            if self.output.extension().is_some_and(|e| e == "gguf") { "i2_s" } else { "hf" };
        let mut target: Target = self.to.as_deref().unwrap_or(named).parse()?;
        match (&mut target, self.scale) {
            (Target::Folder(scale_use), Some(ScaleArg::Divide)) => *scale_use = ScaleUse::Divide,
            (Target::Folder(_), _) | (_, None) => {}
            (Target::Gguf(_), Some(_)) => return Err(Usage::error("--scale belongs to --to hf")),
        }
        Ok(ConvertOptions { target, tables: self.embedding, force: self.force })
    }

    /// Runs `write` with a bar and prints what it did.
    pub(crate) fn write(
        &self,
        label: &str,
        term: &Term,
        write: impl FnOnce(&mut dyn FnMut(Progress<'_>)) -> bitnet_quant::Result<Report>,
    ) -> anyhow::Result<()> {
        let bar = term.bar(label, 0, Unit::Bytes);
        let report = write(&mut |progress| {
            bar.set_length(progress.total);
            bar.set_position(progress.done);
            bar.set_message(printable(progress.tensor).into_owned());
        });
        bar.finish_and_clear();
        let report = report?;
        for note in &report.notes {
            term.warn(note);
        }
        if self.output.is_dir() && self.output.extension().is_some_and(|e| e == "gguf") {
            term.warn(&format!("{} is a folder: `--to hf` writes no GGUF", self.output.display()));
        }
        let mut out = io::stdout().lock();
        if self.json {
            let report = json!({
                "output": self.output,
                "bytes": report.bytes,
                "tensors": report.tensors,
                "ternary": report.ternary,
                "scale_error": report.scale_error,
                "notes": report.notes,
            });
            writeln!(out, "{report:#}")?;
            return Ok(());
        }
        let tensors = counted(report.tensors as u64, "tensor");
        let ternary = count(report.ternary as u64);
        let (path, size) = (self.output.display(), bytes(report.bytes));
        writeln!(out, "{path}: {size} in {tensors}, {ternary} of them ternary")?;
        if report.scale_error > 0.0 {
            let error = report.scale_error * 100.0;
            term.note(&format!("scales rounded to half precision, by at most {error:.3} %"));
        }
        Ok(())
    }
}

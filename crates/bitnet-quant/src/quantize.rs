//! Makes ternary checkpoints of float ones, by the absmean of each projection.
//!
//! This is the quantizer BitNet b1.58 is trained with. Masters that were trained with it lose
//! nothing; weights that were not lose most of what they know, and need training after this.

use crate::checkpoint::Checkpoint;
use crate::convert::{self, ConvertOptions, Progress, Report, Source};
use crate::error::{Error, Result};
use crate::hf;
use std::path::Path;

/// What to quantize and how to store it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct QuantizeOptions {
    /// The form of the result.
    pub output: ConvertOptions,
    /// Projections left in float: whole names or parts of paths between dots, as in
    /// `modules_to_not_convert`, for instance `mlp.down_proj` or `layers.0`.
    pub keep: Vec<String>,
}

impl QuantizeOptions {
    /// All projections, in this form.
    pub fn new(output: ConvertOptions) -> Self {
        Self { output, keep: Vec::new() }
    }
}

/// Writes `checkpoint` to `out` with its float projections as ternary weights.
///
/// Embedding, head and norms stay as they are, and so do projections that are ternary already.
/// Masters that are quantized at load otherwise are float here. All else is as with
/// [`convert::convert`].
///
/// # Errors
/// As `convert`; a checkpoint in which there is nothing to quantize; something to keep that it does not
/// have.
pub fn quantize(
    checkpoint: &Checkpoint,
    options: &QuantizeOptions,
    out: impl AsRef<Path>,
    progress: &mut dyn FnMut(Progress<'_>),
) -> Result<Report> {
    through(checkpoint, options, |source| {
        convert::write(source, options.output, out.as_ref(), progress)
    })
}

/// Whether [`quantize`] can write `checkpoint` in this form, as [`convert::check`] tells.
///
/// # Errors
/// As [`quantize`], but for those of writing.
pub fn check(checkpoint: &Checkpoint, options: &QuantizeOptions) -> Result<()> {
    through(checkpoint, options, |source| convert::check_source(source, options.output))
}

/// Does `work` on the checkpoint as the quantizer shows it.
fn through<T>(
    checkpoint: &Checkpoint,
    options: &QuantizeOptions,
    work: impl FnOnce(&Source<'_>) -> Result<T>,
) -> Result<T> {
    for entry in &options.keep {
        let one = std::slice::from_ref(entry);
        if !checkpoint.projections().any(|path| hf::lists(one, &path)) {
            let error =
                Error::malformed("what to keep", "a projection or a part of its path", entry);
            return Err(error.in_file(&checkpoint.parts().place));
        }
    }
    let select = |path: &str| !hf::lists(&options.keep, path);
    if !checkpoint.projections().any(|path| select(&path) && checkpoint.is_stored_float(&path)) {
        let error = Error::malformed("projections", "float weights to quantize", "none");
        return Err(error.in_file(&checkpoint.parts().place));
    }
    work(&Source::quantized(checkpoint, &select))
}

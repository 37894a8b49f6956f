//! What can go wrong in training.

/// Result of this crate.
pub type Result<T> = std::result::Result<T, Error>;

/// What can go wrong in training.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// A setting outside its range.
    #[error("{what}: expected {expected}, got {got}")]
    Setting {
        /// Which setting.
        what: String,
        /// What it may be.
        expected: String,
        /// What it is.
        got: String,
    },
    /// Text or tokens that cannot be trained on.
    #[error("training data: {0}")]
    Data(String),
    /// A tensor that is missing or has another shape.
    #[error("tensor {name}: expected {expected}, got {got}")]
    Tensor {
        /// Its name.
        name: String,
        /// What it should be.
        expected: String,
        /// What it is.
        got: String,
    },
    /// The loss or the gradient is no number any more.
    #[error("step {step}: the {what} is {value}; a lower learning rate may help")]
    Diverged {
        /// The optimizer step.
        step: u64,
        /// Loss or gradient norm.
        what: &'static str,
        /// Its value.
        value: f64,
    },
    /// A file, a text or a checkpoint that cannot be used.
    #[error("{what}: expected {expected}, got {got}")]
    Input {
        /// Which one, and where in it.
        what: String,
        /// What it should be.
        expected: String,
        /// What it is.
        got: String,
    },
    /// The listener stopped the work before there was anything to save.
    #[error("stopped")]
    Stopped,
    /// From the kernels.
    #[error(transparent)]
    Core(#[from] bitnet_core::Error),
    /// From a model file, or from the file system.
    #[error(transparent)]
    Quant(#[from] bitnet_quant::Error),
    /// From the engine that measures a model in training.
    #[error(transparent)]
    Inference(#[from] bitnet_inference::InferenceError),
}

impl Error {
    /// A setting outside its range.
    pub fn setting(
        what: impl Into<String>,
        expected: impl Into<String>,
        got: impl ToString,
    ) -> Self {
        Self::Setting { what: what.into(), expected: expected.into(), got: got.to_string() }
    }

    /// A file, a text or a checkpoint that cannot be used.
    pub fn input(what: impl Into<String>, expected: impl Into<String>, got: impl ToString) -> Self {
        Self::Input { what: what.into(), expected: expected.into(), got: got.to_string() }
    }

    /// A failed system call on `path`.
    pub(crate) fn io(
        path: impl AsRef<std::path::Path>,
        action: &'static str,
        source: std::io::Error,
    ) -> Self {
        Self::Quant(bitnet_quant::Error::io(path, action, source))
    }

    /// JSON that is not what it should be.
    pub(crate) fn json(source: serde_json::Error) -> Self {
        Self::Quant(source.into())
    }

    /// A tensor that is missing or has another shape.
    pub fn tensor(
        name: impl Into<String>,
        expected: impl Into<String>,
        got: impl Into<String>,
    ) -> Self {
        Self::Tensor { name: name.into(), expected: expected.into(), got: got.into() }
    }
}

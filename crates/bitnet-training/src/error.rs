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
    /// From the kernels.
    #[error(transparent)]
    Core(#[from] bitnet_core::Error),
    /// From a model file.
    #[error(transparent)]
    Quant(#[from] bitnet_quant::Error),
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

    /// A tensor that is missing or has another shape.
    pub fn tensor(
        name: impl Into<String>,
        expected: impl Into<String>,
        got: impl Into<String>,
    ) -> Self {
        Self::Tensor { name: name.into(), expected: expected.into(), got: got.into() }
    }
}

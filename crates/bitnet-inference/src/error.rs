//! The one error type of the engine's API.

use std::sync::Arc;

use crate::options::OptionsError;
use crate::tokenizer::TokenizerError;

/// Why the engine could not do what was asked.
///
/// The classes tell a caller what to change: the input, the model file, the memory budget, or when
/// to try again. Causes are kept as sources.
#[derive(Debug, Clone, thiserror::Error)]
#[non_exhaustive]
pub enum InferenceError {
    /// A GPU, or the backend asked for, is not here or failed.
    #[error("device {device}: {reason}")]
    Gpu {
        /// The device asked for.
        device: String,
        /// What is missing or what happened.
        reason: String,
    },
    /// The memory budget does not allow it.
    #[error("memory: {what} needs {needed_bytes} bytes, {available_bytes} are allowed")]
    Memory {
        /// What the memory is for.
        what: String,
        /// Bytes it takes.
        needed_bytes: u64,
        /// Bytes the budget leaves for it.
        available_bytes: u64,
    },
    /// A thread, a file handle or another resource of the system could not be had.
    #[error("resource {resource}: {reason}")]
    Resource {
        /// Which resource.
        resource: String,
        /// What the system said.
        reason: String,
    },
    /// Too many requests at once, a request that was cancelled, or an engine that has stopped.
    #[error("concurrency: {reason}")]
    Concurrency {
        /// What collided.
        reason: String,
    },
    /// The model cannot be opened, is damaged, or lacks what was asked of it.
    #[error("model {model}")]
    Model {
        /// The path or name given.
        model: String,
        /// The exact reason.
        #[source]
        source: ModelError,
    },
    /// The input or an option is outside its range.
    #[error("input {field}: expected {expected}, got {got}")]
    Input {
        /// The option or argument.
        field: String,
        /// What is allowed.
        expected: String,
        /// What was given.
        got: String,
    },
}

/// What is wrong with a model.
#[derive(Debug, Clone, thiserror::Error)]
#[non_exhaustive]
pub enum ModelError {
    /// Its file.
    #[error(transparent)]
    File(Arc<bitnet_quant::Error>),
    /// Its tensors, on the way to the device.
    #[error(transparent)]
    Device(#[from] bitnet_core::Error),
    /// Its tokenizer.
    #[error(transparent)]
    Tokenizer(#[from] TokenizerError),
    /// Anything it does not provide.
    #[error("{0}")]
    Lacks(String),
}

/// `Result` with [`InferenceError`].
pub type Result<T, E = InferenceError> = std::result::Result<T, E>;

impl From<OptionsError> for InferenceError {
    fn from(error: OptionsError) -> Self {
        Self::Input { field: error.field.into(), expected: error.expected, got: error.got }
    }
}

impl InferenceError {
    /// An input outside its range.
    pub fn input(
        field: impl Into<String>,
        expected: impl Into<String>,
        got: impl ToString,
    ) -> Self {
        Self::Input { field: field.into(), expected: expected.into(), got: got.to_string() }
    }

    /// A model that does not provide what was asked of it.
    pub fn model_lacks(model: impl Into<String>, what: impl Into<String>) -> Self {
        Self::Model { model: model.into(), source: ModelError::Lacks(what.into()) }
    }

    pub(crate) fn file(model: impl Into<String>, source: bitnet_quant::Error) -> Self {
        Self::Model { model: model.into(), source: ModelError::File(Arc::new(source)) }
    }

    pub(crate) fn tokenizer(model: &str, source: TokenizerError) -> Self {
        Self::Model { model: model.to_owned(), source: ModelError::Tokenizer(source) }
    }

    /// A thread that could not be started.
    pub(crate) fn thread(source: &std::io::Error) -> Self {
        Self::Resource { resource: "thread".into(), reason: source.to_string() }
    }

    pub(crate) fn stopped() -> Self {
        Self::Concurrency { reason: "the engine has stopped".into() }
    }

    /// An error of the device while `what` ran on it.
    pub(crate) fn device(what: &str, source: bitnet_core::Error) -> Self {
        match source {
            bitnet_core::Error::OutOfMemory { what, bytes } => {
                Self::Memory { what, needed_bytes: bytes, available_bytes: 0 }
            }
            bitnet_core::Error::Device { device, reason } => Self::Gpu { device, reason },
            other => Self::Model { model: what.to_string(), source: ModelError::Device(other) },
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::error::Error as _;

    #[test]
    fn errors_of_the_system_and_the_device_keep_their_reasons() {
        let denied = std::io::Error::from(std::io::ErrorKind::PermissionDenied);
        let error = InferenceError::thread(&denied);
        assert!(matches!(error, InferenceError::Resource { .. }));
        assert_eq!(error.to_string(), "resource thread: permission denied");

        let full = bitnet_core::Error::OutOfMemory { what: "KV cache".into(), bytes: 1 << 40 };
        let error = InferenceError::device("model", full);
        assert!(matches!(error, InferenceError::Memory { needed_bytes: 0x100_0000_0000, .. }));

        let shape = bitnet_core::Error::shape("q_proj", "(4, 4)", "(4, 8)");
        let error = InferenceError::device("model", shape);
        assert!(error.source().expect("chained").to_string().contains("expected (4, 4)"));
    }
}

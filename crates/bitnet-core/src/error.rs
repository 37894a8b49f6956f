//! The one error type of this crate: what was asked for, what was expected, what came.

/// Everything that can go wrong below the level of files.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// Two shapes that must agree do not.
    #[error("{what}: expected {expected}, got {got}")]
    Shape {
        /// The operation or tensor concerned.
        what: String,
        /// The shape the operation needs.
        expected: String,
        /// The shape it was given.
        got: String,
    },
    /// A value outside the range an operation is defined for.
    #[error("{what}: {reason}")]
    Invalid {
        /// The operation or setting concerned.
        what: String,
        /// Why the value cannot be used.
        reason: String,
    },
    /// Memory could not be had.
    #[error("out of memory: {what} needs {bytes} bytes")]
    OutOfMemory {
        /// What the memory was for.
        what: String,
        /// How much was asked for.
        bytes: u64,
    },
    /// The device cannot do what was asked, or is gone.
    #[error("device {device}: {reason}")]
    Device {
        /// The device's name, as `bitnet devices` prints it.
        device: String,
        /// What happened.
        reason: String,
    },
}

/// `Result` with this crate's [`Error`].
pub type Result<T, E = Error> = std::result::Result<T, E>;

impl Error {
    /// A shape mismatch in `what`.
    pub fn shape(what: impl Into<String>, expected: impl ToString, got: impl ToString) -> Self {
        Self::Shape { what: what.into(), expected: expected.to_string(), got: got.to_string() }
    }

    /// An unusable value in `what`.
    pub fn invalid(what: impl Into<String>, reason: impl Into<String>) -> Self {
        Self::Invalid { what: what.into(), reason: reason.into() }
    }
}

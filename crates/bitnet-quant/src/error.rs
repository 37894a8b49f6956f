//! The one error type of this crate: which file, which part of it, what was expected, what came.
//!
//! Code that sees bytes but no file name leaves `file` empty; whoever opened the file adds the name
//! with [`Error::in_file`]. Paths are those the caller gave; hiding them from strangers is the
//! caller's business.

use std::path::{Path, PathBuf};

/// Everything that can go wrong between a file and the weights in it.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// The operating system could not read or write a file.
    #[error("{}: cannot {action}", path.display())]
    Io {
        /// The file or folder concerned.
        path: PathBuf,
        /// What was tried: `open`, `read`, `create`, …
        action: &'static str,
        /// What the system said.
        source: std::io::Error,
    },
    /// Contents that contradict their format, or another part of the same model.
    #[error("{}{what}: expected {expected}, got {got}", prefix(file))]
    Malformed {
        /// The file, or empty where it is not known.
        file: String,
        /// The field, tensor or key concerned.
        what: String,
        /// What belongs there.
        expected: String,
        /// What is there.
        got: String,
    },
    /// JSON that does not parse, or not as what it must be.
    #[error("{}not the JSON expected", prefix(file))]
    Json {
        /// The file, or empty where it is not known.
        file: String,
        /// Where and why.
        source: serde_json::Error,
    },
    /// Something that a model must have is not there.
    #[error("{}{what} is missing", prefix(file))]
    Missing {
        /// The file or folder searched, or empty where it is not known.
        file: String,
        /// The tensor, key or file that is missing.
        what: String,
    },
    /// A valid file of a kind this crate does not know.
    #[error("{}{what} {got} is not supported; supported: {supported}", prefix(file))]
    Unsupported {
        /// The file, or empty where it is not known.
        file: String,
        /// The setting concerned: `architecture`, `tensor type`, …
        what: String,
        /// Its value in the file.
        got: String,
        /// The values that would do.
        supported: String,
    },
    /// Weights that a packing cannot hold without changing them.
    #[error("{what} does not fit {format}: {reason}")]
    DoesNotFit {
        /// The tensor or part concerned.
        what: String,
        /// The format asked for.
        format: String,
        /// Why it cannot hold them.
        reason: String,
    },
    /// An output that exists already and was not to be replaced.
    #[error("{} exists already", .0.display())]
    Exists(PathBuf),
}

/// `Result` with this crate's [`Error`].
pub type Result<T, E = Error> = std::result::Result<T, E>;

/// `"name: "`, or nothing for an unknown file.
fn prefix(file: &str) -> String {
    if file.is_empty() { String::new() } else { format!("{file}: ") }
}

impl Error {
    /// Contents of `what` that are not what the format or the rest of the model demands.
    pub fn malformed(what: impl Into<String>, expected: impl ToString, got: impl ToString) -> Self {
        let (expected, got) = (expected.to_string(), got.to_string());
        Self::Malformed { file: String::new(), what: what.into(), expected, got }
    }

    /// `what` should be there and is not.
    pub fn missing(what: impl Into<String>) -> Self {
        Self::Missing { file: String::new(), what: what.into() }
    }

    /// `what` has the value `got`, which this crate cannot handle.
    pub fn unsupported(
        what: impl Into<String>,
        got: impl ToString,
        supported: impl ToString,
    ) -> Self {
        let (got, supported) = (got.to_string(), supported.to_string());
        Self::Unsupported { file: String::new(), what: what.into(), got, supported }
    }

    /// `what` cannot be stored as `format`.
    pub fn does_not_fit(
        what: impl Into<String>,
        format: impl ToString,
        reason: impl Into<String>,
    ) -> Self {
        Self::DoesNotFit { what: what.into(), format: format.to_string(), reason: reason.into() }
    }

    /// A failed system call on `path`.
    pub fn io(path: impl AsRef<Path>, action: &'static str, source: std::io::Error) -> Self {
        Self::Io { path: path.as_ref().to_owned(), action, source }
    }

    /// Names the file an error is about, unless a deeper layer did so already.
    #[must_use]
    pub fn in_file(mut self, name: impl ToString) -> Self {
        if let Self::Malformed { file, .. }
        | Self::Json { file, .. }
        | Self::Missing { file, .. }
        | Self::Unsupported { file, .. } = &mut self
            && file.is_empty()
        {
            *file = name.to_string();
        }
        self
    }
}

impl From<serde_json::Error> for Error {
    fn from(source: serde_json::Error) -> Self {
        Self::Json { file: String::new(), source }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_file_what_expected_and_got() {
        let error = Error::malformed("tensor a", "shape [2, 3]", "shape [3, 2]");
        assert_eq!(error.to_string(), "tensor a: expected shape [2, 3], got shape [3, 2]");
        let error = error.in_file("m.gguf").in_file("folder");
        assert_eq!(error.to_string(), "m.gguf: tensor a: expected shape [2, 3], got shape [3, 2]");
    }

    #[test]
    fn keeps_the_cause() {
        let io = std::io::Error::new(std::io::ErrorKind::NotFound, "gone");
        let error = Error::io("x/y", "open", io);
        assert_eq!(error.to_string(), "x/y: cannot open");
        assert_eq!(std::error::Error::source(&error).expect("io source").to_string(), "gone");
    }
}

//! Why a tokenizer cannot be built, or a text cannot be encoded.

/// What is wrong with a tokenizer or a text.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum TokenizerError {
    /// The model comes without a tokenizer.
    #[error("the model has no tokenizer")]
    Missing,
    /// `tokenizer.json` is not JSON of the expected shape.
    #[error("tokenizer.json: {reason}")]
    Json {
        /// What the parser expected and where.
        reason: String,
    },
    /// A vocabulary that contradicts itself.
    #[error("tokenizer: {what}: expected {expected}, got {got}")]
    Invalid {
        /// The part concerned.
        what: String,
        /// What it must be.
        expected: String,
        /// What it is.
        got: String,
    },
    /// A kind of tokenizer this crate does not know.
    #[error("tokenizer: {what} `{got}` is not supported; supported: {supported}")]
    Unsupported {
        /// The part concerned.
        what: &'static str,
        /// Its name in the file.
        got: String,
        /// The names that are supported.
        supported: String,
    },
    /// A pre-tokenizer pattern took more steps on this text than is reasonable.
    #[error("tokenizer: the pattern `{pattern}` is too slow on this text (at byte {at})")]
    TooSlow {
        /// The beginning of the pattern.
        pattern: String,
        /// Where in the text it was given up.
        at: usize,
    },
}

impl TokenizerError {
    pub(super) fn invalid(
        what: impl Into<String>,
        expected: impl ToString,
        got: impl ToString,
    ) -> Self {
        Self::Invalid { what: what.into(), expected: expected.to_string(), got: got.to_string() }
    }
}

//! What the text of an answer is held to.

use serde_json::Value;

use crate::error::ApiError;

/// A language the answer must belong to, and the field that asked for it.
#[derive(Debug, Clone, PartialEq)]
pub(crate) enum Constraint {
    /// JSON that fits the schema of a response format.
    Format(Value),
    /// One call of a tool, `{"name": …, "arguments": …}`.
    Call(Value),
}

impl Constraint {
    /// Refuses what the engine cannot hold an answer to.
    pub(crate) fn unsupported(&self) -> ApiError {
        let why = "this build cannot hold answers to a grammar";
        match self {
            Self::Format(_) => ApiError::unsupported("response_format", why),
            Self::Call(_) => ApiError::unsupported("tool_choice", why),
        }
    }
}

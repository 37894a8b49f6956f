//! What the text of an answer is held to, and the field that asked for it.

use bitnet_inference::{Grammar, InferenceError, Model};

use crate::error::{ApiError, Result};

/// A language the answer must belong to.
#[derive(Debug, Clone, PartialEq)]
pub(crate) struct Constraint {
    pub(crate) grammar: Grammar,
    /// The field that asked for it.
    pub(crate) param: &'static str,
}

impl Constraint {
    /// Compiles it, so that the generations that follow start at once.
    ///
    /// # Errors
    /// A grammar the engine cannot hold answers to.
    pub(crate) fn prepare(&self, model: &Model) -> Result<()> {
        model.prepare_grammar(&self.grammar).map_err(|error| self.refusal(error))
    }

    /// The error of the engine, under the name of the field if it is about the grammar.
    pub(crate) fn refusal(&self, error: InferenceError) -> ApiError {
        match error {
            InferenceError::Input { field, expected, got } if field == "grammar" => {
                ApiError::invalid(self.param, &expected, got)
            }
            other => other.into(),
        }
    }
}

//! What goes into the engine and what comes out of a single forward pass.

use crate::error::{InferenceError, Result};
use crate::model::Model;
use crate::request::Usage;
use crate::tokenizer::EncodeOptions;

/// A prompt: text for the model's tokenizer, or token ids taken as they are.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum InferenceInput {
    /// Text. The tokenizer adds what the model expects in front (such as a beginning-of-sequence
    /// token); control tokens written in the text stay text.
    Text(String),
    /// Text in which control tokens stand for themselves: a rendered chat template.
    Rendered(String),
    /// Token ids; nothing is added.
    Tokens(Vec<u32>),
}

impl InferenceInput {
    /// The token ids the model sees.
    ///
    /// # Errors
    /// Text for a model without a tokenizer.
    pub fn tokens(&self, model: &Model) -> Result<Vec<u32>> {
        match self {
            Self::Text(text) => encode(model, text, EncodeOptions::PROMPT),
            Self::Rendered(text) => encode(model, text, EncodeOptions::CHAT),
            Self::Tokens(tokens) => Ok(tokens.clone()),
        }
    }
}

fn encode(model: &Model, text: &str, options: EncodeOptions) -> Result<Vec<u32>> {
    let encoded = model.tokenizer()?.encode(text, options);
    encoded.map_err(|e| InferenceError::input("prompt", "text the tokenizer can encode", e))
}

impl From<&str> for InferenceInput {
    fn from(text: &str) -> Self {
        Self::Text(text.to_owned())
    }
}

impl From<String> for InferenceInput {
    fn from(text: String) -> Self {
        Self::Text(text)
    }
}

impl From<Vec<u32>> for InferenceInput {
    fn from(tokens: Vec<u32>) -> Self {
        Self::Tokens(tokens)
    }
}

impl From<&[u32]> for InferenceInput {
    fn from(tokens: &[u32]) -> Self {
        Self::Tokens(tokens.to_vec())
    }
}

/// The result of a forward pass.
#[derive(Debug, Clone, PartialEq)]
pub struct InferenceOutput {
    /// Logits after the last token, `vocab_size` numbers.
    pub logits: Vec<f32>,
    /// Tokens of the input.
    pub n_tokens: usize,
    /// What it took.
    pub usage: Usage,
}

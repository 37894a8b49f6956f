//! Texts and token ids of a model, for handlers.

use bitnet_inference::Model;
use bitnet_inference::tokenizer::EncodeOptions;

use crate::error::{ApiError, Result};

/// The bytes a token stands for.
pub(crate) fn token_bytes(model: &Model, id: u32) -> Vec<u8> {
    model.tokenizer().map_or(Vec::new(), |tokenizer| tokenizer.token_bytes(id).to_vec())
}

/// The text of a token; bytes that are no character on their own become U+FFFD.
pub(crate) fn token_text(model: &Model, id: u32) -> String {
    String::from_utf8_lossy(&token_bytes(model, id)).into_owned()
}

/// The token ids of a text.
///
/// # Errors
/// A model without a tokenizer.
pub(crate) fn encode(model: &Model, text: &str, options: EncodeOptions) -> Result<Vec<u32>> {
    model.tokenizer()?.encode(text, options).map_err(|error| {
        tracing::warn!(%error, "a text could not be tokenized");
        ApiError::field("prompt", "the text could not be tokenized")
    })
}

/// Refuses ids outside the vocabulary, by the name of their field.
///
/// # Errors
/// The first such id.
pub(crate) fn check_ids(model: &Model, param: &str, ids: &[u32]) -> Result<()> {
    let vocab_size = model.get_output_dim();
    match ids.iter().find(|&&id| id as usize >= vocab_size) {
        Some(id) => Err(ApiError::invalid(param, &format!("token ids below {vocab_size}"), id)),
        None => Ok(()),
    }
}

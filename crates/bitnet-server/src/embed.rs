//! Embeddings, whatever wire format asks: prompts in, vectors of length one out.

use std::sync::Arc;

use bitnet_inference::tokenizer::{AddSpecial, EncodeOptions};
use bitnet_inference::{Embedding, InferenceInput, Pooling};

use crate::error::{ApiError, Result};
use crate::openai::types::Prompt;
use crate::residency::KeepAlive;
use crate::run::within_limits;
use crate::state::{AppState, Caller};
use crate::text::{check_ids, encode};

/// Vectors, and what they took.
#[derive(Debug)]
pub(crate) struct Embedded {
    pub(crate) model_name: Arc<str>,
    /// One for each input, `hidden_size` numbers.
    pub(crate) vectors: Vec<Vec<f32>>,
    pub(crate) n_tokens: usize,
}

/// Embeds each input.
///
/// # Errors
/// No inputs or too many, an empty input, one longer than the model takes.
pub(crate) async fn embed(
    state: &AppState,
    caller: &Caller,
    model: &str,
    inputs: Vec<Prompt>,
    pooling: Pooling,
    keep_alive: Option<KeepAlive>,
) -> Result<Embedded> {
    let max_inputs = state.config().limits.max_prompts;
    if inputs.is_empty() || inputs.len() > max_inputs {
        let expected = format!("1 to {max_inputs} inputs");
        return Err(ApiError::invalid("input", &expected, inputs.len()));
    }
    let _admission = state.admit(caller)?;
    let entry = state.registry().entry(model)?;
    let model = state.registry().model_for(entry, keep_alive).await?;
    let span = crate::trace::embedding(&entry.name);
    let (mut vectors, mut n_tokens) = (Vec::with_capacity(inputs.len()), 0);
    // One by one, so that a client that leaves stops the rest.
    for input in inputs {
        let of = model.clone();
        let tokens = state.compute(move || match input {
            Prompt::Text(text) => {
                let whole = EncodeOptions { add: AddSpecial::Both, parse_special: false };
                encode(&of, &text, whole)
            }
            Prompt::Tokens(tokens) => check_ids(&of, "input", &tokens).map(|()| tokens),
        });
        let input = InferenceInput::Tokens(tokens.await?);
        let embedding = async {
            let embedding = state.engine().embed(&model, &input, pooling).await;
            embedding.map_err(|error| {
                let error = ApiError::from(error);
                ApiError { param: error.param.as_ref().map(|_| "input".into()), ..error }
            })
        };
        let Embedding { vector, n_tokens: n } = within_limits(state, caller, embedding).await?;
        vectors.push(vector);
        n_tokens += n;
    }
    span.record("gen_ai.usage.input_tokens", n_tokens);
    Ok(Embedded { model_name: entry.name.clone(), vectors, n_tokens })
}

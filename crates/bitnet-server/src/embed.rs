//! Embeddings, whatever wire format asks: prompts in, vectors of length one out.

use std::sync::Arc;

use bitnet_inference::Model;
use bitnet_inference::tokenizer::{AddSpecial, EncodeOptions};

use crate::error::{ApiError, Result};
use crate::openai::types::Prompt;
use crate::state::{AppState, Caller};
use crate::text::{check_ids, encode};

/// How the states of a text's tokens become one vector.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub(crate) enum Pooling {
    /// Their mean.
    #[default]
    Mean,
    /// The last one.
    Last,
}

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
) -> Result<Embedded> {
    let max_inputs = state.config().limits.max_prompts;
    if inputs.is_empty() || inputs.len() > max_inputs {
        let expected = format!("1 to {max_inputs} inputs");
        return Err(ApiError::invalid("input", &expected, inputs.len()));
    }
    let _admission = state.admit(caller)?;
    let entry = state.registry().entry(model)?;
    let model = state.registry().model(entry).await?;
    let span = crate::trace::embedding(&entry.name);
    let (mut vectors, mut n_tokens) = (Vec::with_capacity(inputs.len()), 0);
    // One by one, so that a client that leaves stops the rest.
    for input in inputs {
        let model = model.clone();
        let (vector, n) = state.compute(move || embed_one(&model, input, pooling)).await?;
        vectors.push(vector);
        n_tokens += n;
    }
    span.record("gen_ai.usage.input_tokens", n_tokens);
    Ok(Embedded { model_name: entry.name.clone(), vectors, n_tokens })
}

fn embed_one(model: &Model, input: Prompt, pooling: Pooling) -> Result<(Vec<f32>, usize)> {
    let tokens = match input {
        Prompt::Text(text) => {
            let whole = EncodeOptions { add: AddSpecial::Both, parse_special: false };
            encode(model, &text, whole)?
        }
        Prompt::Tokens(tokens) => tokens,
    };
    check_ids(model, "input", &tokens)?;
    if tokens.is_empty() {
        return Err(ApiError::invalid("input", "at least one token", "an empty input"));
    }
    let states = model.hidden_states(&tokens).map_err(|error| {
        let mut error = ApiError::from(error);
        if error.param.is_some() {
            error.param = Some("input".into());
        }
        error
    })?;
    let rows = states.last().map_or(&[][..], Vec::as_slice);
    Ok((pool(rows, model.get_input_dim(), pooling), tokens.len()))
}

/// One vector of length one from `(tokens, dim)` states.
fn pool(rows: &[f32], dim: usize, pooling: Pooling) -> Vec<f32> {
    let mut sums = vec![0f64; dim];
    let n_rows = rows.len() / dim.max(1);
    let first = if pooling == Pooling::Last { n_rows.saturating_sub(1) } else { 0 };
    for row in rows.chunks_exact(dim.max(1)).skip(first) {
        for (sum, &x) in sums.iter_mut().zip(row) {
            *sum += f64::from(x);
        }
    }
    // The division by the number of rows falls away in the length.
    let length = sums.iter().map(|x| x * x).sum::<f64>().sqrt();
    let scale = if length > 0.0 { 1.0 / length } else { 0.0 };
    sums.iter().map(|x| (x * scale) as f32).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn vectors_have_length_one() {
        let rows = [3.0, 0.0, 0.0, 4.0];
        assert_eq!(pool(&rows, 2, Pooling::Last), [0.0, 1.0]);
        assert_eq!(pool(&rows, 2, Pooling::Mean), [0.6, 0.8]);
        assert_eq!(pool(&[0.0, 0.0], 2, Pooling::Mean), [0.0, 0.0]);
    }
}

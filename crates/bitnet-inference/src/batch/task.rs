//! What is computed from each input of a batch, and the memory it takes meanwhile.

use std::future::Future;

use crate::engine::InferenceEngine;
use crate::error::Result;
use crate::input::{InferenceInput, InferenceOutput};
use crate::model::Model;
use crate::options::GenerationOptions;
use crate::stream::Generation;

/// Something to do with every input.
pub(super) trait Task: Sync {
    /// What comes out.
    type Output: Send;

    /// Tokens generated after the input, at most.
    fn new_tokens(&self, model: &Model, prompt_tokens: usize) -> usize;

    /// Hands the input to the engine. Dropping the future cancels the work.
    fn start(
        &self,
        engine: &InferenceEngine,
        model: &Model,
        tokens: Vec<u32>,
    ) -> impl Future<Output = Result<Self::Output>> + Send;

    /// Bytes that an input of this length holds while it is in work: its blocks of the KV cache and
    /// a row of logits.
    fn bytes(&self, model: &Model, prompt_tokens: usize) -> u64 {
        let kv = model.kv_spec();
        let tokens = prompt_tokens + self.new_tokens(model, prompt_tokens);
        let blocks = tokens.div_ceil(kv.block_tokens.max(1)) as u64;
        blocks * kv.block_bytes() as u64 + 4 * model.get_output_dim() as u64
    }
}

/// The logits after the last token.
pub(super) struct Logits;

impl Task for Logits {
    type Output = InferenceOutput;

    fn new_tokens(&self, _: &Model, _: usize) -> usize {
        0
    }

    async fn start(
        &self,
        engine: &InferenceEngine,
        model: &Model,
        tokens: Vec<u32>,
    ) -> Result<InferenceOutput> {
        engine.infer(model, &InferenceInput::Tokens(tokens)).await
    }
}

/// A whole answer.
pub(super) struct Generate<'a>(pub(super) &'a GenerationOptions);

impl Task for Generate<'_> {
    type Output = Generation;

    fn new_tokens(&self, model: &Model, prompt_tokens: usize) -> usize {
        let room = model.context_length().saturating_sub(prompt_tokens);
        self.0.max_tokens.map_or(room, |n| room.min(n as usize))
    }

    async fn start(
        &self,
        engine: &InferenceEngine,
        model: &Model,
        tokens: Vec<u32>,
    ) -> Result<Generation> {
        engine.generate(model, InferenceInput::Tokens(tokens), self.0).await
    }
}

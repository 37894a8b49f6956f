//! One vector for a text: the model's last states, pooled.
//!
//! Knows rows of numbers; the worker computes them, a chunk at a time beside the steps of others.

use futures_channel::oneshot;

use crate::engine::InferenceEngine;
use crate::error::{InferenceError, Result};
use crate::input::InferenceInput;
use crate::kv_blocks::{BlockId, BlockPool};
use crate::model::Model;
use crate::tokenizer::{AddSpecial, EncodeOptions};
use crate::wait::block_on;

/// How the states of a text's tokens become one vector.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Pooling {
    /// Their mean.
    #[default]
    Mean,
    /// The last one.
    Last,
}

/// A text as a vector.
#[derive(Debug, Clone, PartialEq)]
pub struct Embedding {
    /// `hidden_size` numbers; their squares sum to 1, or all are 0.
    pub vector: Vec<f32>,
    /// Tokens of the text, with those the model wants first and last.
    pub n_tokens: usize,
}

impl InferenceEngine {
    /// The embedding of an input: its tokens' states after the final norm, pooled and scaled to
    /// length one. Texts get the tokens the model wants first and last. Dropping the future cancels
    /// the work before the model's next step.
    ///
    /// ```
    /// use bitnet_inference::{InferenceEngine, Pooling};
    ///
    /// let engine = InferenceEngine::builder().build_blocking()?;
    /// let model = engine.load_model_blocking("builtin")?;
    /// let embed = |text: &str| engine.embed_blocking(&model, &text.into(), Pooling::Mean);
    /// let (king, queen, ship) = (embed("the king")?, embed("the queen")?, embed("a ship at sea")?);
    /// let dot = |a: &[f32], b: &[f32]| a.iter().zip(b).map(|(x, y)| x * y).sum::<f32>();
    /// assert!(dot(&king.vector, &queen.vector) > dot(&king.vector, &ship.vector));
    /// # Ok::<(), bitnet_inference::InferenceError>(())
    /// ```
    ///
    /// # Errors
    /// An empty input, one longer than the context, or a model that fails.
    pub async fn embed(
        &self,
        model: &Model,
        input: &InferenceInput,
        pooling: Pooling,
    ) -> Result<Embedding> {
        let tokens = match input {
            InferenceInput::Text(text) => {
                let whole = EncodeOptions { add: AddSpecial::Both, parse_special: false };
                let encoded = model.tokenizer()?.encode(text, whole);
                let refused =
                    |e| InferenceError::input("prompt", "text the tokenizer can encode", e);
                encoded.map_err(refused)?
            }
            other => other.tokens(model)?,
        };
        let n_tokens = tokens.len();
        let reply = model.worker().embed(tokens, pooling, model.get_input_dim())?;
        let vector = reply.await.map_err(|_| InferenceError::stopped())??;
        Ok(Embedding { vector, n_tokens })
    }

    /// Blocking twin of [`embed`](Self::embed).
    pub fn embed_blocking(
        &self,
        model: &Model,
        input: &InferenceInput,
        pooling: Pooling,
    ) -> Result<Embedding> {
        block_on(self.embed(model, input, pooling))
    }
}

/// An embedding being computed.
pub(crate) struct EmbeddingJob {
    pub(crate) tokens: Vec<u32>,
    pub(crate) n_computed: usize,
    /// Blocks of the cache that cover the tokens; empty until it begins.
    pub(crate) blocks: Vec<BlockId>,
    pool: Pool,
    reply: oneshot::Sender<Result<Vec<f32>>>,
}

impl EmbeddingJob {
    pub(crate) fn new(
        tokens: Vec<u32>,
        pooling: Pooling,
        width: usize,
        reply: oneshot::Sender<Result<Vec<f32>>>,
    ) -> Self {
        Self { tokens, n_computed: 0, blocks: Vec::new(), pool: Pool::new(pooling, width), reply }
    }

    /// Nobody waits for it any more.
    pub(crate) fn is_abandoned(&self) -> bool {
        self.reply.is_canceled()
    }

    /// The device and all it held is lost: begins again.
    pub(crate) fn start_over(&mut self, pool: &mut BlockPool) {
        pool.release(std::mem::take(&mut self.blocks));
        self.n_computed = 0;
        self.pool.sums.fill(0.0);
    }

    /// Takes the states of the next tokens, `(n, width)`.
    pub(crate) fn take(&mut self, n_tokens: usize, states: &[f32]) {
        self.pool.push(states);
        self.n_computed += n_tokens;
    }

    /// Sends the vector, or why there is none.
    pub(crate) fn finish(self, outcome: Result<()>) {
        let _ = self.reply.send(outcome.map(|()| self.pool.finish()));
    }
}

/// Rows on their way to one vector.
struct Pool {
    pooling: Pooling,
    sums: Vec<f64>, // width
}

impl Pool {
    fn new(pooling: Pooling, width: usize) -> Self {
        Self { pooling, sums: vec![0.0; width] }
    }

    fn push(&mut self, rows: &[f32]) {
        for row in rows.chunks_exact(self.sums.len()) {
            if self.pooling == Pooling::Last {
                self.sums.fill(0.0);
            }
            self.sums.iter_mut().zip(row).for_each(|(sum, &x)| *sum += f64::from(x));
        }
    }

    /// The division by the number of rows falls away in the length.
    fn finish(&self) -> Vec<f32> {
        let length = self.sums.iter().map(|x| x * x).sum::<f64>().sqrt();
        let scale = if length > 0.0 { 1.0 / length } else { 0.0 };
        self.sums.iter().map(|x| (x * scale) as f32).collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::future::Future;

    #[test]
    fn vectors_have_length_one() {
        let pooled = |pooling, rows: &[f32]| {
            let mut pool = Pool::new(pooling, 2);
            rows.chunks(2).for_each(|row| pool.push(row));
            pool.finish()
        };
        let rows = [3.0, 0.0, 0.0, 4.0];
        assert_eq!(pooled(Pooling::Last, &rows), [0.0, 1.0]);
        assert_eq!(pooled(Pooling::Mean, &rows), [0.6, 0.8]);
        assert_eq!(pooled(Pooling::Mean, &[0.0, 0.0]), [0.0, 0.0]);
    }

    #[test]
    fn an_embedding_is_the_pooled_last_states_in_any_chunking() {
        use crate::config::OptimizationLevel;
        let tokens: Vec<u32> = (0..200).map(|i| i * 13 % 4096).collect();
        let whole = InferenceEngine::builder().build_blocking().unwrap();
        let model = whole.load_model_blocking("builtin").unwrap();
        let states = model.hidden_states(&tokens).unwrap();
        let chunked = InferenceEngine::builder()
            .optimization_level(OptimizationLevel::Minimal) // chunks of 64
            .build_blocking()
            .unwrap();
        let small = chunked.load_model_blocking("builtin").unwrap();
        for pooling in [Pooling::Mean, Pooling::Last] {
            let mut pool = Pool::new(pooling, model.get_input_dim());
            pool.push(states.last().unwrap());
            let input = InferenceInput::Tokens(tokens.clone());
            for (engine, model) in [(&whole, &model), (&chunked, &small)] {
                let embedding = engine.embed_blocking(model, &input, pooling).unwrap();
                assert!(embedding.vector == pool.finish(), "{pooling:?}");
                assert_eq!(embedding.n_tokens, 200);
            }
        }
        // As long as the context, and no longer.
        let long = |n| InferenceInput::Tokens(vec![7; n]);
        assert!(whole.embed_blocking(&model, &long(1024), Pooling::Mean).is_ok());
        for bad in [long(1025), long(0), vec![70_000].into()] {
            let refused = whole.embed_blocking(&model, &bad, Pooling::Mean);
            assert!(matches!(refused, Err(InferenceError::Input { .. })), "{refused:?}");
        }
        // The answer is sent before the blocks are given back.
        let started = std::time::Instant::now();
        while model.stats().kv_blocks_in_use > 0 {
            assert!(started.elapsed() < std::time::Duration::from_secs(20), "blocks are kept");
            std::thread::yield_now();
        }
    }

    #[test]
    fn embeddings_and_answers_run_beside_each_other() {
        use crate::options::GenerationOptions;
        // A cache for two sequences of 128 positions.
        let engine =
            InferenceEngine::builder().batch_size(2).context_length(128).build_blocking().unwrap();
        let model = engine.load_model_blocking("builtin").unwrap();
        let options = GenerationOptions::greedy().max_tokens(60).ignore_eos(true);
        let alone = engine.generate_blocking(&model, "Once upon", &options).unwrap();
        let input = InferenceInput::Tokens(vec![9; 120]);
        let vector = engine.embed_blocking(&model, &input, Pooling::Mean).unwrap();
        std::thread::scope(|scope| {
            for _ in 0..4 {
                scope.spawn(|| {
                    let beside = engine.generate_blocking(&model, "Once upon", &options).unwrap();
                    assert_eq!(beside.tokens, alone.tokens);
                });
                scope.spawn(|| {
                    let beside = engine.embed_blocking(&model, &input, Pooling::Mean).unwrap();
                    assert!(beside == vector);
                });
            }
            // One that nobody waits for leaves.
            let mut pending = Box::pin(engine.embed(&model, &input, Pooling::Mean));
            futures::executor::block_on(std::future::poll_fn(|context| {
                let _ = pending.as_mut().poll(context);
                std::task::Poll::Ready(())
            }));
            drop(pending);
        });
    }
}

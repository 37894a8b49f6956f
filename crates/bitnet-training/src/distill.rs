//! The seam for losses beside the prediction of the next token.
//!
//! Distillation compares what a student computes with what a teacher does on the same windows: its
//! logits, and the queries, keys and values of one layer. Before the trainer takes some windows through
//! the model, an [`ExtraLoss`] looks at them; the [`Comparison`] it returns is shown both, and adds to
//! the gradients. Knows no teacher.

use bitnet_quant::config::ModelConfig;

use crate::error::Result;

/// Queries, keys and values of one layer as attention reads them: rotated, and padded nowhere.
#[derive(Debug, Clone, Copy)]
pub struct Relations<'a> {
    /// Windows.
    pub rows: usize,
    /// Tokens of a window.
    pub len: usize,
    /// `(rows · len, n_heads · head_dim)`
    pub q: &'a [f32],
    /// `(rows · len, n_kv_heads · head_dim)`
    pub k: &'a [f32],
    /// `(rows · len, n_kv_heads · head_dim)`
    pub v: &'a [f32],
}

/// Where the gradients of [`Relations`] are added to; shapes as there.
#[derive(Debug)]
pub struct RelationGradients<'a> {
    /// Of the queries.
    pub q: &'a mut [f32],
    /// Of the keys.
    pub k: &'a mut [f32],
    /// Of the values.
    pub v: &'a mut [f32],
}

/// A loss beside that of the next token. Called from the trainer's threads.
pub trait ExtraLoss: Sync {
    /// Whether it can be computed of a model of this shape.
    ///
    /// # Errors
    /// [`Error::Setting`](crate::Error::Setting) says what does not fit.
    fn suits(&self, student: &ModelConfig) -> Result<()>;

    /// The share of the loss of the next token; 1 leaves it as it is.
    fn token_weight(&self) -> f32 {
        1.0
    }

    /// The layer whose [`Relations`] are wanted.
    fn layer(&self) -> Option<usize> {
        None
    }

    /// Looks at windows before the trainer does: `tokens` is `(rows, len + 1)`, ids below the
    /// vocabulary of a model that [`suits`](Self::suits).
    ///
    /// # Errors
    /// Those of the model that is asked.
    fn look(&self, tokens: &[u32], rows: usize, len: usize) -> Result<Box<dyn Comparison + '_>>;
}

/// What an [`ExtraLoss`] has to say to some windows.
pub trait Comparison {
    /// Adds gradients with respect to `logits`, `(tokens, vocab)`, to `gradient`, and returns the
    /// loss. Both are to be multiplied by `scale`, one over the counted predictions of the step;
    /// `counts` says which of the tokens' predictions count. The first of the tokens is number
    /// `first_token` of the windows, counted over all their rows.
    fn logits(
        &mut self,
        first_token: usize,
        logits: &[f32],
        counts: &[bool],
        scale: f32,
        gradient: &mut [f32],
    ) -> f64;

    /// As [`Comparison::logits`], for the relations of [`ExtraLoss::layer`] in the whole windows;
    /// `scale` is one over all tokens of the step, whether they count or not: a token that is not to be
    /// predicted is still looked back on.
    fn relations(
        &mut self,
        relations: Relations<'_>,
        scale: f32,
        gradient: RelationGradients<'_>,
    ) -> f64 {
        let _ = (relations, scale, gradient);
        0.0
    }
}

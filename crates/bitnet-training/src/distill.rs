//! The seam for losses beside the prediction of the next token.
//!
//! Distillation compares what a student computes with what a teacher does on the same windows: its
//! logits, and the queries, keys and values of one layer. The trainer shows both to an
//! [`ExtraLoss`], which adds to the gradients. Knows no teacher.

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

/// Which windows of a step are looked at.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Place {
    /// Index of the batch among those of the step.
    pub batch: usize,
    /// First window in that batch.
    pub first_row: usize,
    /// First of the windows' tokens that is shown, counted over the windows from `first_row` on.
    pub first_token: usize,
}

/// A loss beside that of the next token. Called from the trainer's threads.
pub trait ExtraLoss: Sync {
    /// The share of the loss of the next token; 1 leaves it as it is.
    fn token_weight(&self) -> f32 {
        1.0
    }

    /// The layer whose [`Relations`] are wanted.
    fn layer(&self) -> Option<usize> {
        None
    }

    /// Adds gradients with respect to `logits`, `(tokens, vocab)`, to `gradient`, and returns the
    /// loss. Both are to be multiplied by `scale`, one over the counted predictions of the step;
    /// `counts` says which of the tokens' predictions count.
    fn logits(
        &self,
        place: Place,
        logits: &[f32],
        counts: &[bool],
        scale: f32,
        gradient: &mut [f32],
    ) -> f64;

    /// As [`ExtraLoss::logits`], for the relations of [`ExtraLoss::layer`].
    fn relations(
        &self,
        place: Place,
        relations: Relations<'_>,
        scale: f32,
        gradient: RelationGradients<'_>,
    ) -> f64 {
        let _ = (place, relations, scale, gradient);
        0.0
    }
}

//! The final norm, the logits and the loss of the next token, with their gradients.
//!
//! Logits of a whole step would be the largest array of all, so tokens pass in pieces: logits of a
//! piece become its loss, then its gradient, in the same place.

use crate::distill::Comparison;
use crate::matmul::{View, matmul};
use crate::model::Places;
use crate::vector::{self, softmax, vectorized};
use crate::worker::{Goal, Sums, Windows};
use bitnet_core::kernels::Kernels;
use bitnet_core::weights::NormWeights;
use bitnet_quant::config::ModelConfig;

/// Tokens of a piece: enough to pay for packing the table once more, few enough for their logits
/// to stay near.
const PIECE: usize = 256;

/// Buffers of the head.
#[derive(Debug, Default)]
pub(crate) struct Head {
    /// After the final norm, `(n, hidden)`.
    hidden: Vec<f32>,
    d_hidden: Vec<f32>,
    /// Of a piece, `(PIECE, vocab)`.
    logits: Vec<f32>,
    gradient: Vec<f32>,
}

impl Head {
    /// Normalizes the residual stream `x`, rows of the norm's width.
    pub(crate) fn normalize(&mut self, kernels: &Kernels, x: &[f32], norm: &NormWeights) {
        let width = norm.weight.len();
        self.hidden.resize(x.len(), 0.0);
        for (x, out) in x.chunks_exact(width).zip(self.hidden.chunks_exact_mut(width)) {
            kernels.norm(x, norm, out);
        }
    }

    /// The gradient of what [`Head::normalize`] made.
    pub(crate) fn d_hidden(&self) -> &[f32] {
        &self.d_hidden
    }

    /// What [`Head::normalize`] made, `(n, hidden)`.
    pub(crate) fn hidden(&self) -> &[f32] {
        &self.hidden
    }

    /// The loss of the windows' predictions.
    pub(crate) fn loss(
        &mut self,
        values: &[f32],
        places: &Places,
        config: &ModelConfig,
        windows: Windows<'_>,
    ) -> Sums {
        let vocab = config.vocab_size;
        let mut sums = Sums::default();
        let n = windows.rows * windows.len;
        self.logits.resize(PIECE.min(n) * vocab, 0.0);
        for first in (0..n).step_by(PIECE) {
            let count = PIECE.min(n - first);
            let logits = &mut self.logits[..count * vocab];
            piece_logits(&self.hidden, values, places, config, first, count, logits);
            for (i, row) in logits.chunks_exact_mut(vocab).enumerate() {
                let (target, counts) = windows.target(first + i);
                if counts {
                    sums.nats += cross_entropy(row, target);
                    sums.counted += 1;
                }
            }
        }
        sums
    }

    /// The loss, and its gradients: those of the table are added to `gradients`, those of the
    /// hidden states are in [`Head::d_hidden`].
    pub(crate) fn learn(
        &mut self,
        values: &[f32],
        places: &Places,
        config: &ModelConfig,
        windows: Windows<'_>,
        goal: Goal<'_>,
        mut comparison: Option<&mut (dyn Comparison + '_)>,
        gradients: &mut [f32],
    ) -> Sums {
        let (vocab, width) = (config.vocab_size, config.hidden_size);
        let place = places.head.as_ref().unwrap_or(&places.embedding);
        let table = &values[place.clone()];
        let d_table = &mut gradients[place.clone()];
        let mut sums = Sums::default();
        let scale = goal.scale * goal.extra.map_or(1.0, |extra| extra.token_weight());
        let n = windows.rows * windows.len;
        self.d_hidden.resize(n * width, 0.0);
        self.logits.resize(PIECE.min(n) * vocab, 0.0);
        for first in (0..n).step_by(PIECE) {
            let count = PIECE.min(n - first);
            let logits = &mut self.logits[..count * vocab];
            piece_logits(&self.hidden, values, places, config, first, count, logits);
            if let Some(comparison) = &mut comparison {
                self.gradient.clear();
                self.gradient.resize(count * vocab, 0.0);
                let counts: Vec<bool> =
                    (first..first + count).map(|i| windows.target(i).1).collect();
                let gradient = &mut self.gradient;
                sums.extra += comparison.logits(first, logits, &counts, goal.scale, gradient);
            }
            for (i, row) in logits.chunks_exact_mut(vocab).enumerate() {
                let (target, counts) = windows.target(first + i);
                if !counts {
                    row.fill(0.0);
                    continue;
                }
                sums.nats += cross_entropy(row, target);
                sums.counted += 1;
                // The row holds probabilities now.
                row[target] -= 1.0;
                vectorized(|| row.iter_mut().for_each(|d| *d *= scale));
            }
            if comparison.is_some() {
                vector::add(logits, &self.gradient);
            }
            let (d_view, rows) = (View::rows(0, vocab), View::rows(first * width, width));
            matmul(
                [count, width, vocab],
                (&mut self.d_hidden, rows),
                false,
                1.0,
                (logits, d_view),
                (table, View::rows(0, width)),
            );
            matmul(
                [vocab, width, count],
                (d_table, View::rows(0, width)),
                true,
                1.0,
                (logits, d_view.t()),
                (&self.hidden, rows),
            );
        }
        sums
    }
}

/// Logits of the `count` tokens from `first` on, of which `hidden` has the states after the final norm.
pub(crate) fn piece_logits(
    hidden: &[f32],
    values: &[f32],
    places: &Places,
    config: &ModelConfig,
    first: usize,
    count: usize,
    out: &mut [f32],
) {
    let (vocab, width) = (config.vocab_size, config.hidden_size);
    let table = &values[places.head.clone().unwrap_or(places.embedding.clone())];
    matmul(
        [count, vocab, width],
        (out, View::rows(0, vocab)),
        false,
        1.0,
        (hidden, View::rows(first * width, width)),
        (table, View::rows(0, width).t()),
    );
}

/// Turns logits into probabilities and returns the negative log-probability of `target`.
fn cross_entropy(row: &mut [f32], target: usize) -> f64 {
    let logit = row[target];
    let (max, total) = vectorized(|| softmax(row));
    f64::from(max) + libm::log(f64::from(total)) - f64::from(logit)
}

//! How well a model predicts a text: nats per token, perplexity, bits per byte.
//!
//! A text longer than the context is read in windows; [`EvalMode`] says where they begin and which
//! of their tokens count. What is left at the end of the text counts in full mode only, where the last
//! window may be shorter; a text shorter than one window is one window. Where the tokenizer starts a
//! prompt with a beginning-of-sequence token, every window starts with it: it replaces the window's
//! first token.

use std::ops::{ControlFlow, Range};

use crate::engine::InferenceEngine;
use crate::error::{InferenceError, Result};
use crate::input::InferenceInput;
use crate::model::Model;

/// Where windows begin and which of their tokens count. `n` is the window's length in tokens.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum EvalMode {
    /// What llama-perplexity does: windows stand side by side, and the tokens after position `n/2`
    /// count, so that each has at least half a window before it.
    #[default]
    SecondHalf,
    /// Every token but the first of the text counts once: each window predicts `n` tokens, and the
    /// next one begins with the last of them. The last window predicts what is left.
    Full,
    /// A window begins every `stride` tokens and its last `stride` tokens count; of the first
    /// window, all but its first token do.
    Sliding {
        /// From the beginning of a window to that of the next, 1 to `n - 1`.
        stride: usize,
    },
}

/// How a text is measured.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct EvalOptions {
    /// Tokens in a window, at least 2; `None`: 512, or the context if that is shorter.
    pub window: Option<usize>,
    /// Which tokens count.
    pub mode: EvalMode,
}

impl Default for EvalOptions {
    fn default() -> Self {
        Self { window: None, mode: EvalMode::SecondHalf }
    }
}

/// The window unless one is asked for, which is llama-perplexity's.
const DEFAULT_WINDOW: usize = 512;

/// What was measured, so far or in all.
#[derive(Debug, Clone, Copy, PartialEq, Default)]
pub struct Evaluation {
    /// Tokens of a window.
    pub window: usize,
    /// Windows of the text.
    pub windows: usize,
    /// Windows measured.
    pub windows_done: usize,
    /// Tokens that counted.
    pub tokens: u64,
    /// Bytes of text these tokens stand for.
    pub bytes: u64,
    /// Sum of their negative log-probabilities, natural.
    pub nats: f64,
    squares: f64,
}

impl Evaluation {
    /// Mean negative log-probability of a token; NaN before the first window is done.
    pub fn nats_per_token(&self) -> f64 {
        self.nats / self.tokens as f64
    }

    /// `e` to the power of [`nats_per_token`](Self::nats_per_token).
    pub fn perplexity(&self) -> f64 {
        self.nats_per_token().exp()
    }

    /// Standard error of [`perplexity`](Self::perplexity), taking tokens as independent; `None` for
    /// fewer than two, which say nothing of how much tokens differ.
    pub fn perplexity_error(&self) -> Option<f64> {
        if self.tokens < 2 {
            return None;
        }
        let (n, mean) = (self.tokens as f64, self.nats_per_token());
        let variance = (self.squares / n - mean * mean).max(0.0);
        Some(self.perplexity() * (variance / (n - 1.0)).sqrt())
    }

    /// Bits the model needs for a byte of the text: comparable between tokenizers.
    pub fn bits_per_byte(&self) -> f64 {
        self.nats / std::f64::consts::LN_2 / self.bytes as f64
    }

    fn add(&mut self, logprobs: &[f32], bytes: u64) {
        for &logprob in logprobs {
            let nats = -f64::from(logprob);
            self.nats += nats;
            self.squares += nats * nats;
        }
        self.tokens += logprobs.len() as u64;
        self.bytes += bytes;
        self.windows_done += 1;
    }
}

/// Measures how well `model` predicts `text`. Blocking; `progress` hears of every window and may end
/// the work early, which gives what was measured until then.
///
/// ```
/// use bitnet_inference::InferenceEngine;
/// use bitnet_inference::eval::{EvalOptions, evaluate};
/// use std::ops::ControlFlow;
///
/// let engine = InferenceEngine::builder().build_blocking()?;
/// let model = engine.load_model_blocking("builtin")?;
/// let text = "Once upon a time there was a little princess who lived in a castle.";
/// let found = evaluate(&engine, &model, text, &EvalOptions::default(), &mut |_| {
///     ControlFlow::Continue(())
/// })?;
/// assert!(found.perplexity() > 1.0 && found.bits_per_byte() < 8.0);
/// # Ok::<(), bitnet_inference::InferenceError>(())
/// ```
///
/// # Errors
/// A text too short to have a token that counts, a window that the context does not hold, a model
/// without a tokenizer or with damaged weights.
pub fn evaluate(
    engine: &InferenceEngine,
    model: &Model,
    text: &str,
    options: &EvalOptions,
    progress: &mut dyn FnMut(&Evaluation) -> ControlFlow<()>,
) -> Result<Evaluation> {
    let tokenizer = model.tokenizer()?;
    let tokens = InferenceInput::from(text).tokens(model)?;
    let bos = tokenizer.bos_id().filter(|bos| tokens.first() == Some(bos));
    let (window, windows) = plan(tokens.len(), model.context_length(), options)?;
    let mut found = Evaluation { window, windows: windows.len(), ..Evaluation::default() };
    for Window { fed, counted } in windows {
        let mut input = tokens[fed.clone()].to_vec();
        input[0] = bos.unwrap_or(input[0]);
        // `score` has one number for each token after the first.
        let logprobs = engine.score(model, &InferenceInput::Tokens(input))?;
        let first = fed.start + 1;
        let logprobs = &logprobs[counted.start - first..counted.end - first];
        if logprobs.iter().any(|logprob| !logprob.is_finite()) {
            let what = "it computes probabilities that are not numbers";
            return Err(InferenceError::model_lacks(model.get_model_id(), what));
        }
        let bytes = tokens[counted].iter().map(|&id| tokenizer.token_bytes(id).len() as u64).sum();
        found.add(logprobs, bytes);
        if progress(&found).is_break() {
            break;
        }
    }
    Ok(found)
}

/// Positions in the text's tokens.
#[derive(Debug, Clone, PartialEq, Eq)]
struct Window {
    /// What the model sees.
    fed: Range<usize>,
    /// What counts: inside `fed`, never its first.
    counted: Range<usize>,
}

/// The length of a window and all windows of a text of `n_tokens`.
fn plan(n_tokens: usize, context: usize, options: &EvalOptions) -> Result<(usize, Vec<Window>)> {
    // In full mode a window takes one token more than it predicts.
    let extra = usize::from(options.mode == EvalMode::Full);
    let longest = context - extra;
    let window = options.window.unwrap_or(DEFAULT_WINDOW.min(longest));
    if !(2..=longest).contains(&window) {
        return Err(InferenceError::input("window", format!("2 to {longest} tokens"), window));
    }
    if let EvalMode::Sliding { stride } = options.mode
        && !(1..window).contains(&stride)
    {
        let expected = format!("1 to {}, less than the window", window - 1);
        return Err(InferenceError::input("stride", expected, stride));
    }
    let window = window.min(n_tokens.saturating_sub(extra));
    let step = match options.mode {
        EvalMode::SecondHalf | EvalMode::Full => window,
        EvalMode::Sliding { stride } => stride,
    };
    let mut windows = Vec::new();
    let mut start = 0;
    let least = match options.mode {
        EvalMode::Full => 2,
        EvalMode::SecondHalf | EvalMode::Sliding { .. } => window,
    };
    while window > 0 && start + least <= n_tokens {
        let fed = start..(start + window + extra).min(n_tokens);
        let first = match options.mode {
            EvalMode::SecondHalf => start + window / 2 + 1,
            EvalMode::Sliding { stride } if start > 0 => fed.end - stride,
            EvalMode::Full | EvalMode::Sliding { .. } => start + 1,
        };
        if first < fed.end {
            windows.push(Window { counted: first..fed.end, fed });
        }
        start += step;
    }
    match windows.is_empty() {
        true => {
            Err(InferenceError::input("text", "at least 3 tokens", format!("{n_tokens} tokens")))
        }
        false => Ok((window, windows)),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn windows(
        n_tokens: usize,
        window: usize,
        mode: EvalMode,
    ) -> Vec<(Range<usize>, Range<usize>)> {
        let options = EvalOptions { window: Some(window), mode };
        let (_, windows) = plan(n_tokens, 100, &options).unwrap();
        windows.into_iter().map(|w| (w.fed, w.counted)).collect()
    }

    #[test]
    fn the_second_half_of_each_window_counts() {
        let found = windows(21, 8, EvalMode::SecondHalf);
        assert_eq!(found, [(0..8, 5..8), (8..16, 13..16)]);
    }

    #[test]
    fn full_windows_count_each_token_once() {
        let found = windows(21, 8, EvalMode::Full);
        assert_eq!(found, [(0..9, 1..9), (8..17, 9..17), (16..21, 17..21)]);
        assert_eq!(windows(17, 8, EvalMode::Full), [(0..9, 1..9), (8..17, 9..17)]);
        assert_eq!(windows(18, 8, EvalMode::Full)[2], (16..18, 17..18));
    }

    #[test]
    fn sliding_windows_count_each_token_once_with_more_before_it() {
        let found = windows(17, 8, EvalMode::Sliding { stride: 4 });
        assert_eq!(found, [(0..8, 1..8), (4..12, 8..12), (8..16, 12..16)]);
    }

    #[test]
    fn a_short_text_is_one_window() {
        assert_eq!(windows(5, 8, EvalMode::SecondHalf), [(0..5, 3..5)]);
        assert_eq!(windows(5, 8, EvalMode::Full), [(0..5, 1..5)]);
        assert_eq!(windows(5, 8, EvalMode::Sliding { stride: 4 }), [(0..5, 1..5)]);
    }

    #[test]
    fn nonsense_is_refused() {
        let plan = |n_tokens, window, mode| plan(n_tokens, 100, &EvalOptions { window, mode });
        for (n_tokens, window, mode, field) in [
            (50, Some(1), EvalMode::SecondHalf, "window"),
            (50, Some(101), EvalMode::SecondHalf, "window"),
            (50, Some(100), EvalMode::Full, "window"),
            (50, Some(10), EvalMode::Sliding { stride: 0 }, "stride"),
            (50, Some(10), EvalMode::Sliding { stride: 10 }, "stride"),
            (0, None, EvalMode::SecondHalf, "text"),
            (1, None, EvalMode::Full, "text"),
            (2, None, EvalMode::SecondHalf, "text"),
        ] {
            let error = plan(n_tokens, window, mode).unwrap_err().to_string();
            assert!(error.contains(field), "{error}");
        }
        assert_eq!(plan(50, None, EvalMode::Full).unwrap().0, 49);
    }

    #[test]
    fn means_and_errors_follow_from_the_sums() {
        let mut found = Evaluation::default();
        found.add(&[-1.0, -3.0], 8);
        assert_eq!((found.nats_per_token(), found.tokens), (2.0, 2));
        assert!((found.perplexity() - 2f64.exp()).abs() < 1e-12);
        // Variance of (1, 3) is 1, of their mean 1.
        assert!((found.perplexity_error().unwrap() - 2f64.exp()).abs() < 1e-12);
        assert!((found.bits_per_byte() - 4.0 / std::f64::consts::LN_2 / 8.0).abs() < 1e-12);
        let mut one = Evaluation::default();
        one.add(&[-1.0], 3);
        assert_eq!((one.nats_per_token(), one.perplexity_error()), (1.0, None));
    }
}

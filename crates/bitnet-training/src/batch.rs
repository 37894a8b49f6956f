//! What a step is computed on: windows of tokens, and which of their predictions count.

use crate::error::{Error, Result};

/// Windows of equal length: each token of a window but the last predicts the one after it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Batch {
    /// `(rows, len + 1)` token ids.
    pub tokens: Vec<u32>,
    /// Windows.
    pub rows: usize,
    /// Predictions of a window.
    pub len: usize,
    /// `(rows, len)`: whether the prediction made at this place counts. `None`: all do.
    pub loss_mask: Option<Vec<bool>>,
}

impl Batch {
    /// Checks that the lengths fit together and every token is below `vocab_size`.
    ///
    /// # Errors
    /// [`Error::Data`] says what does not fit.
    pub fn check(&self, vocab_size: usize) -> Result<()> {
        if self.rows == 0 || self.len == 0 {
            return Err(Error::Data(format!("a batch of {} × {} tokens", self.rows, self.len)));
        }
        let expected = self.rows * (self.len + 1);
        if self.tokens.len() != expected {
            let got = self.tokens.len();
            return Err(Error::Data(format!("a batch has {got} tokens where {expected} belong")));
        }
        if let Some(mask) = &self.loss_mask
            && mask.len() != self.rows * self.len
        {
            let (got, expected) = (mask.len(), self.rows * self.len);
            return Err(Error::Data(format!("a mask has {got} places where {expected} belong")));
        }
        match self.tokens.iter().find(|&&token| token as usize >= vocab_size) {
            Some(token) => {
                Err(Error::Data(format!("token {token} of a vocabulary of {vocab_size}")))
            }
            None => Ok(()),
        }
    }

    /// Predictions that count.
    pub fn counted(&self) -> usize {
        match &self.loss_mask {
            Some(mask) => mask.iter().filter(|&&counts| counts).count(),
            None => self.rows * self.len,
        }
    }
}

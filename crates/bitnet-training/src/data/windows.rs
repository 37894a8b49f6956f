//! Windows of tokens in a shuffled order, epoch after epoch.
//!
//! The tokens of a corpus, documents end to end, are cut into windows of `len` predictions, each
//! with the token before them. Each epoch cuts at another place and shuffles anew.

use super::shuffle::{Shuffle, mix};
use super::tokens::Tokens;
use crate::error::{Error, Result};

/// Corpora of fewer windows than this are cut at the same place each time: none to spare.
const FEW: u64 = 8;

/// The windows of a corpus, counted over all epochs.
#[derive(Debug, Clone)]
pub struct Windows {
    tokens: Tokens,
    len: usize,
    per_epoch: u64,
    shifts: u64,
    seed: u64,
}

impl Windows {
    /// Windows of `len` predictions.
    ///
    /// # Errors
    /// A corpus with fewer than `len + 1` tokens.
    pub fn new(tokens: Tokens, len: usize, seed: u64) -> Result<Self> {
        let (n, width) = (tokens.len() as u64, len as u64);
        let whole = n.saturating_sub(1) / width.max(1);
        if whole == 0 || width == 0 {
            let expected = format!("at least {} tokens, one window", width + 1);
            return Err(Error::input(tokens.name().to_owned(), expected, n));
        }
        // One window less leaves room to cut anywhere.
        let per_epoch = if whole < FEW { whole } else { whole - 1 };
        let shifts = (n - 1 - per_epoch * width + 1).min(width);
        Ok(Self { tokens, len, per_epoch, shifts, seed })
    }

    /// Windows of one epoch.
    pub fn per_epoch(&self) -> u64 {
        self.per_epoch
    }

    /// The corpus.
    pub fn tokens(&self) -> &Tokens {
        &self.tokens
    }

    /// Appends window `index` to `ids` (`len + 1` token ids) and whether each prediction counts to
    /// `counted` (`len` flags). Says whether any counts.
    pub fn read(&self, index: u64, ids: &mut Vec<u32>, counted: &mut Vec<bool>) -> bool {
        let (epoch, place) = (index / self.per_epoch, index % self.per_epoch);
        let seed = mix(self.seed ^ mix(epoch));
        let place = Shuffle::new(self.per_epoch, seed).get(place);
        let shift = mix(seed ^ 1) % self.shifts;
        let start = (place * self.len as u64 + shift) as usize;
        self.tokens.read(start..start + self.len + 1, ids, counted)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::collections::HashMap;

    fn windows(n: u32, len: usize) -> Windows {
        Windows::new(Tokens::in_memory("numbers", &(0..n).collect::<Vec<_>>()), len, 7).unwrap()
    }

    fn starts(windows: &Windows, range: std::ops::Range<u64>) -> Vec<u32> {
        let read = |index| {
            let (mut ids, mut counted) = (Vec::new(), Vec::new());
            assert!(windows.read(index, &mut ids, &mut counted));
            assert_eq!(counted, vec![true; windows.len]);
            assert!(
                ids.windows(2).all(|pair| pair[1] == pair[0] + 1) && ids.len() == windows.len + 1
            );
            ids[0]
        };
        range.map(read).collect()
    }

    #[test]
    fn an_epoch_predicts_each_token_at_most_once() {
        let windows = windows(1000, 9);
        let n = windows.per_epoch();
        assert_eq!(n, 110);
        let mut orders = Vec::new();
        for epoch in 0..3 {
            let order = starts(&windows, epoch * n..(epoch + 1) * n);
            let mut predicted = HashMap::new();
            for start in &order {
                (start + 1..=start + 9).for_each(|token| *predicted.entry(token).or_insert(0) += 1);
            }
            assert!(predicted.values().all(|&count| count == 1));
            assert_eq!(predicted.len() as u64, n * 9);
            orders.push(order);
        }
        assert_ne!(orders[0], orders[1]);
        let cut = |order: &[u32]| order[0] % 9;
        assert!(orders.iter().any(|order| cut(order) != cut(&orders[0])), "another cut each epoch");
    }

    #[test]
    fn a_corpus_of_one_window_is_enough_and_less_is_not() {
        assert_eq!(starts(&windows(10, 9), 0..3), [0, 0, 0]);
        let tokens = Tokens::in_memory("short", &[1, 2, 3]);
        let error = Windows::new(tokens, 3, 0).unwrap_err().to_string();
        assert_eq!(error, "short: expected at least 4 tokens, one window, got 3");
    }
}

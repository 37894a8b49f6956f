//! Guessing the next tokens, so that one read of the weights can verify several of them.
//!
//! A guess never changes what is generated: the model computes every guessed position, the sampler
//! draws from its logits as always, and the first draw that differs from the guess ends the run.
//! Prompt lookup needs no second model: where the last tokens stood before, what followed them then
//! is the guess. It pays on text that repeats: code, quotations, edits, structured output.

/// Longest ending that is looked up; longer ones are tried first.
const LONGEST_ENDING: usize = 4;
/// Shortest ending that is looked up.
const SHORTEST_ENDING: usize = 2;
/// Tokens before the end that are searched, so that a guess costs microseconds in any context.
const SEARCH_WINDOW: usize = 8192;
/// Most tokens guessed at once.
pub(crate) const MAX_GUESS: usize = 12;

/// How much to guess, learnt from how the last guesses of a sequence went.
#[derive(Debug, Clone)]
pub(crate) struct GuessLength {
    tokens: usize,
    /// Steps to sit out after guesses that failed.
    pause: usize,
    n_failures: usize,
}

impl Default for GuessLength {
    fn default() -> Self {
        Self { tokens: 4, pause: 0, n_failures: 0 }
    }
}

impl GuessLength {
    /// Tokens to guess in this step; 0 while guessing has not paid lately.
    pub(crate) fn next(&mut self) -> usize {
        if self.pause > 0 {
            self.pause -= 1;
            return 0;
        }
        self.tokens
    }

    /// Learns from a guess of which the first `n_right` of `n_guessed` tokens were right. After
    /// more than `patience` guesses in a row that were wrong from their first token, some steps go
    /// without one.
    pub(crate) fn learn(&mut self, n_right: usize, n_guessed: usize, patience: usize) {
        if n_right == n_guessed {
            self.tokens = (self.tokens * 2).min(MAX_GUESS);
            self.n_failures = 0;
        } else if n_right == 0 {
            self.tokens = (self.tokens / 2).max(2);
            self.n_failures += 1;
            self.pause = self.n_failures.saturating_sub(patience).min(8);
        } else {
            self.tokens = (n_right + 1).max(2);
            self.n_failures = 0;
        }
    }
}

/// At most `max` tokens that may follow `tokens`; empty if nothing repeats.
pub(crate) fn look_up(tokens: &[u32], max: usize) -> Vec<u32> {
    for n_ending in (SHORTEST_ENDING..=LONGEST_ENDING).rev() {
        if let Some(follows) = last_occurrence(tokens, n_ending) {
            // Past its end the text is taken to go on repeating.
            let period = tokens.len() - follows;
            return (0..max).map(|i| tokens[follows + i % period]).collect();
        }
    }
    Vec::new()
}

/// Where the latest earlier occurrence of the last `n_ending` tokens ends.
fn last_occurrence(tokens: &[u32], n_ending: usize) -> Option<usize> {
    let (before, ending) = tokens.split_at(tokens.len().checked_sub(n_ending)?);
    let first = before.len().saturating_sub(SEARCH_WINDOW);
    // Occurrences may overlap the ending itself, as in "ha ha ha", but not be it.
    let start = (first..before.len()).rev().find(|&at| tokens[at..at + n_ending] == *ending)?;
    Some(start + n_ending)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_followed_last_time_is_guessed() {
        assert_eq!(look_up(&[1, 2, 3, 4, 5, 9, 2, 3], 3), [4, 5, 9]);
        assert_eq!(look_up(&[1, 2, 3, 4, 7, 2, 3, 8, 2, 3], 1), [8], "the latest counts");
        assert_eq!(look_up(&[7, 7, 7, 7], 3), [7, 7, 7], "an overlap with the ending");
        assert_eq!(look_up(&[5, 6, 5, 6], 4), [5, 6, 5, 6]);
        assert!(look_up(&[1, 2, 3, 4], 3).is_empty());
        assert!(look_up(&[], 3).is_empty());
        assert!(look_up(&[1, 2, 1, 2], 0).is_empty());
    }

    #[test]
    fn success_lengthens_and_failure_pauses() {
        let mut length = GuessLength::default();
        assert_eq!(length.next(), 4);
        length.learn(4, 4, 0);
        assert_eq!(length.next(), 8);
        length.learn(0, 8, 0);
        assert_eq!([length.next(), length.next()], [0, 4], "one step of pause");
        length.learn(1, 4, 0);
        assert_eq!(length.next(), 2, "one more than were right");
    }

    #[test]
    fn patience_forgives_failures() {
        let mut length = GuessLength::default();
        for _ in 0..2 {
            length.learn(0, 2, 2);
            assert_eq!(length.next(), 2);
        }
        length.learn(0, 2, 2);
        assert_eq!([length.next(), length.next()], [0, 2]);
    }
}

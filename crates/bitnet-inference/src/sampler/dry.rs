//! DRY: lowers the logits of tokens that would continue a sequence the text already holds.
//!
//! If the last `m` tokens occur earlier and `t` follows them there, emitting `t` extends the
//! repetition to `m + 1`. The lengths `m` for all earlier places come from one run of the
//! Z-algorithm over the reversed history, so the cost is linear in the window.

use std::collections::{HashMap, HashSet};

use crate::options::DryOptions;

/// The penalty of each token that would extend a repetition of at least
/// [`DryOptions::allowed_length`] tokens. A repetition never reaches across a `breakers` token.
pub(super) fn penalties(
    options: &DryOptions,
    history: &[u32],
    breakers: &HashSet<u32>,
) -> Vec<(u32, f32)> {
    let window = &history[history.len().saturating_sub(options.last_n as usize)..];
    if options.multiplier == 0.0 || window.is_empty() {
        return Vec::new();
    }
    // What follows the last breaker is all that can be repeated.
    let suffix = window.iter().rev().take_while(|token| !breakers.contains(token)).count();
    let mut longest: HashMap<u32, usize> = HashMap::new();
    for (back, length) in suffix_matches(window).into_iter().enumerate().skip(1) {
        // The match ends `back` tokens before the end; the token after it is one further on.
        let length = length.min(suffix);
        if length >= options.allowed_length as usize {
            let next = window[window.len() - back];
            let entry = longest.entry(next).or_default();
            *entry = length.max(*entry);
        }
    }
    let penalty = |length: usize| {
        let excess = (length - options.allowed_length as usize).min(10_000) as f64;
        let penalty = options.multiplier as f64 * libm::pow(options.base as f64, excess);
        // Finite, so that a repeated token stays legal where nothing else is.
        penalty.min(1e30) as f32
    };
    longest.into_iter().map(|(token, length)| (token, penalty(length))).collect()
}

/// For each `back`: how many of the last tokens equal those that end `back` tokens before the end.
fn suffix_matches(window: &[u32]) -> Vec<usize> {
    let n = window.len();
    let reversed = |i: usize| window[n - 1 - i];
    let mut z = vec![0; n];
    z[0] = n;
    // [left, right) is the match found so far that reaches furthest.
    let (mut left, mut right) = (0, 0);
    for i in 1..n {
        let mut length = if i < right { z[i - left].min(right - i) } else { 0 };
        while i + length < n && reversed(length) == reversed(i + length) {
            length += 1;
        }
        z[i] = length;
        if i + length > right {
            (left, right) = (i, i + length);
        }
    }
    z
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn sorted(mut penalties: Vec<(u32, f32)>) -> Vec<(u32, f32)> {
        penalties.sort_by_key(|p| p.0);
        penalties
    }

    fn options() -> DryOptions {
        DryOptions { multiplier: 1.0, base: 2.0, ..DryOptions::default() }
    }

    #[test]
    fn repeated_sequences_are_penalised_by_length() {
        // "1 2 3" then "1 2": a 3 would make the repetition three long.
        assert_eq!(penalties(&options(), &[1, 2, 3, 1, 2], &HashSet::new()), [(3, 1.0)]);
        // One matching token is within the allowed length of two.
        assert_eq!(penalties(&options(), &[1, 2, 3, 1], &HashSet::new()), []);
        // Three matching tokens: 1 * 2^(3 - 2).
        assert_eq!(penalties(&options(), &[9, 8, 7, 5, 9, 8, 7], &HashSet::new()), [(5, 2.0)]);
        // Two continuations; the longer match of the same token wins.
        let history = [1, 2, 3, 4, 2, 3, 5, 6, 1, 2, 3];
        assert_eq!(sorted(penalties(&options(), &history, &HashSet::new())), [(4, 2.0), (5, 1.0)]);
        // A run: "a a a a" matches itself shifted by one.
        assert_eq!(penalties(&options(), &[7, 7, 7, 7], &HashSet::new()), [(7, 2.0)]);
    }

    #[test]
    fn breakers_and_the_window_limit_the_match() {
        let history = [9, 8, 7, 5, 9, 8, 7];
        assert_eq!(penalties(&options(), &history, &HashSet::from([9])), [(5, 1.0)]);
        assert_eq!(penalties(&options(), &history, &HashSet::from([8])), []);
        assert_eq!(penalties(&options(), &history, &HashSet::from([7])), []);
        let near = DryOptions { last_n: 4, ..options() };
        assert_eq!(penalties(&near, &history, &HashSet::new()), []);
    }

    #[test]
    fn no_penalty_is_infinite() {
        let huge = DryOptions { multiplier: 100.0, base: 10.0, ..options() };
        let penalties = penalties(&huge, &[3; 5000], &HashSet::new());
        assert_eq!(penalties, [(3, 1e30)]);
    }

    #[test]
    fn an_empty_history_has_no_penalties() {
        assert_eq!(penalties(&options(), &[], &HashSet::new()), []);
    }

    proptest! {
        #[test]
        fn equals_the_definition(
            history in prop::collection::vec(0..4_u32, 0..40),
            breakers in prop::collection::hash_set(0..4_u32, 0..2),
            allowed_length in 1..4_u32,
            last_n in 0..50_u32,
        ) {
            let options = DryOptions { allowed_length, last_n, ..options() };
            let window = &history[history.len().saturating_sub(last_n as usize)..];
            let n = window.len();
            let mut expected: HashMap<u32, f32> = HashMap::new();
            for next in 1..n {
                let mut length = 0;
                while length < next
                    && window[next - 1 - length] == window[n - 1 - length]
                    && !breakers.contains(&window[n - 1 - length])
                {
                    length += 1;
                }
                if length >= allowed_length as usize {
                    let penalty = f32::powi(2.0, length as i32 - allowed_length as i32);
                    let entry = expected.entry(window[next]).or_insert(0.0);
                    *entry = entry.max(penalty);
                }
            }
            let got: HashMap<u32, f32> =
                penalties(&options, &history, &breakers).into_iter().collect();
            prop_assert_eq!(got, expected);
        }
    }
}

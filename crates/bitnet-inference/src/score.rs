//! Probabilities of given tokens, from rows of logits.

use crate::request::GeneratedToken;

/// The natural log-probability of `token` under a row of logits.
///
/// Sums run in f64 and in the order of the ids, with `exp` from the `libm` crate: the same on every
/// platform. A row without a finite number gives minus infinity.
pub(crate) fn log_probability(logits: &[f32], token: u32) -> f32 {
    let max = logits.iter().copied().filter(|x| !x.is_nan()).fold(f32::NEG_INFINITY, f32::max);
    if !max.is_finite() {
        return f32::NEG_INFINITY;
    }
    let exps = logits.iter().filter(|x| !x.is_nan()).map(|&x| f64::from(libm::expf(x - max)));
    let total: f64 = exps.sum();
    let logit = logits.get(token as usize).copied().filter(|x| !x.is_nan());
    logit.map_or(f32::NEG_INFINITY, |x| (f64::from(x - max) - libm::log(total)) as f32)
}

/// `token` with its log-probability and the `top` likeliest tokens with theirs, best first, ties to
/// the lowest id.
pub(crate) fn with_alternatives(logits: &[f32], token: u32, top: usize) -> GeneratedToken {
    let mut best: Vec<(u32, f32)> = Vec::with_capacity(top + 1);
    for (id, &logit) in logits.iter().enumerate() {
        let worst = best.last().filter(|_| best.len() == top);
        let too_small = worst.is_some_and(|&(_, worst)| logit <= worst);
        if top == 0 || !logit.is_finite() || too_small {
            continue;
        }
        let place = best.partition_point(|&(_, other)| other >= logit);
        best.insert(place, (id as u32, logit));
        best.truncate(top);
    }
    // All share one denominator, so one probability gives every other.
    if let Some(&(likeliest, logit)) = best.first() {
        let denominator = logit - log_probability(logits, likeliest);
        for (_, value) in &mut best {
            *value -= denominator;
        }
    }
    let logprob = Some(log_probability(logits, token));
    GeneratedToken { id: token, logprob, top_logprobs: best }
}

#[cfg(test)]
mod tests {
    use super::{log_probability, with_alternatives};

    #[test]
    fn alternatives_come_best_first_and_odd_values_do_not_panic() {
        let row = [0.0, 3.0, f32::NAN, 3.0, 1.0, f32::NEG_INFINITY];
        let scored = with_alternatives(&row, 4, 3);
        let ids: Vec<u32> = scored.top_logprobs.iter().map(|&(id, _)| id).collect();
        assert_eq!(ids, [1, 3, 4]);
        assert_eq!(scored.logprob, Some(log_probability(&row, 4)));
        for &(id, logprob) in &scored.top_logprobs {
            assert!((logprob - log_probability(&row, id)).abs() < 1e-6);
        }
        assert!(with_alternatives(&row, 0, 0).top_logprobs.is_empty());
        assert!(with_alternatives(&[f32::NAN; 3], 0, 2).top_logprobs.is_empty());
        assert_eq!(with_alternatives(&row, 0, 100).top_logprobs.len(), 4);
    }

    #[test]
    fn a_uniform_row_shares_equally_and_odd_values_do_not_panic() {
        assert!((log_probability(&[2.0; 4], 1) - 0.25f32.ln()).abs() < 1e-6);
        assert!((log_probability(&[0.0, f32::NEG_INFINITY, 0.0], 0) - 0.5f32.ln()).abs() < 1e-6);
        assert_eq!(log_probability(&[f32::NAN; 2], 0), f32::NEG_INFINITY);
        assert_eq!(log_probability(&[0.0, f32::NAN], 1), f32::NEG_INFINITY);
        assert_eq!(log_probability(&[0.0], 7), f32::NEG_INFINITY);
    }
}

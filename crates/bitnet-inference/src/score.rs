//! Probabilities of given tokens, from rows of logits.

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

#[cfg(test)]
mod tests {
    use super::log_probability;

    #[test]
    fn a_uniform_row_shares_equally_and_odd_values_do_not_panic() {
        assert!((log_probability(&[2.0; 4], 1) - 0.25f32.ln()).abs() < 1e-6);
        assert!((log_probability(&[0.0, f32::NEG_INFINITY, 0.0], 0) - 0.5f32.ln()).abs() < 1e-6);
        assert_eq!(log_probability(&[f32::NAN; 2], 0), f32::NEG_INFINITY);
        assert_eq!(log_probability(&[0.0, f32::NAN], 1), f32::NEG_INFINITY);
        assert_eq!(log_probability(&[0.0], 7), f32::NEG_INFINITY);
    }
}

//! Rotary position embedding: how fast each pair of features turns, and what longer contexts do to
//! that.

use super::{ModelConfig, bounds, positive, within};
use crate::error::{Error, Result};
use std::f64::consts::PI;

/// Context extension of the rotary embedding.
#[derive(Debug, Clone, PartialEq)]
pub enum RopeScaling {
    /// Frequencies as `rope_theta` gives them.
    None,
    /// Positions divided by `factor`.
    Linear {
        /// The divisor.
        factor: f64,
    },
    /// Llama 3.1: low frequencies divided by `factor`, a smooth passage between.
    Llama3 {
        /// Divisor of the low frequencies.
        factor: f64,
        /// Wavelengths above `original / low_freq_factor` are divided.
        low_freq_factor: f64,
        /// Wavelengths below `original / high_freq_factor` are kept.
        high_freq_factor: f64,
        /// Context the model was trained with first.
        original_max_position_embeddings: usize,
    },
    /// YaRN: high frequencies kept, low ones divided by `factor`, a linear passage between; queries
    /// and keys grow by `attention_factor` (Bonsai 8B).
    Yarn {
        /// Divisor of the low frequencies.
        factor: f64,
        /// Context the model was trained with first.
        original_max_position_embeddings: usize,
        /// Frequencies with more turns than this in the original context are kept.
        beta_fast: f64,
        /// Frequencies with fewer turns than this in the original context are divided.
        beta_slow: f64,
        /// Factor on rotated queries and on rotated keys.
        attention_factor: f64,
    },
    /// A divisor for each frequency, as GGUF files store it (`rope_freqs.weight`).
    Factors(Vec<f32>),
}

impl RopeScaling {
    /// What YaRN multiplies rotated queries and keys by when the checkpoint does not say.
    pub fn yarn_attention_factor(factor: f64) -> f64 {
        if factor > 1.0 { 0.1 * factor.ln() + 1.0 } else { 1.0 }
    }

    /// Checks that every number is one a rotation can have.
    pub(super) fn validate(&self, head_dim: usize) -> Result<()> {
        const FACTOR: f64 = 1e6;
        match self {
            Self::None => Ok(()),
            Self::Linear { factor } => positive("rope factor", *factor, FACTOR),
            Self::Llama3 {
                factor,
                low_freq_factor,
                high_freq_factor,
                original_max_position_embeddings: original,
            } => {
                positive("rope factor", *factor, FACTOR)?;
                positive("rope low_freq_factor", *low_freq_factor, FACTOR)?;
                positive("rope high_freq_factor", *high_freq_factor, FACTOR)?;
                if high_freq_factor <= low_freq_factor {
                    let expected = format!("more than low_freq_factor {low_freq_factor}");
                    return Err(Error::malformed("high_freq_factor", expected, high_freq_factor));
                }
                within("original_max_position_embeddings", *original, bounds::POSITIONS)
            }
            Self::Yarn {
                factor,
                original_max_position_embeddings: original,
                beta_fast,
                beta_slow,
                attention_factor,
            } => {
                positive("rope factor", *factor, FACTOR)?;
                positive("rope beta_fast", *beta_fast, FACTOR)?;
                positive("rope beta_slow", *beta_slow, FACTOR)?;
                positive("rope attention_factor", *attention_factor, 1e3)?;
                within("original_max_position_embeddings", *original, bounds::POSITIONS)
            }
            Self::Factors(factors) => {
                if factors.len() != head_dim / 2 {
                    let expected = format!("{} (head_dim / 2)", head_dim / 2);
                    return Err(Error::malformed(
                        "number of rope factors",
                        expected,
                        factors.len(),
                    ));
                }
                factors.iter().try_for_each(|&f| positive("rope factor", f64::from(f), FACTOR))
            }
        }
    }

    /// What the frequency of feature pair `pair` is divided by; `unscaled` is the one `rope_theta`
    /// gives it.
    fn divisor(&self, pair: usize, unscaled: f64, config: &ModelConfig) -> f64 {
        match self {
            Self::None => 1.0,
            Self::Linear { factor } => *factor,
            Self::Factors(factors) => factors.get(pair).copied().map_or(1.0, f64::from),
            Self::Llama3 {
                factor,
                low_freq_factor,
                high_freq_factor,
                original_max_position_embeddings,
            } => {
                // Turns in the original context.
                let turns = *original_max_position_embeddings as f64 * unscaled / (2.0 * PI);
                let kept = (turns - low_freq_factor) / (high_freq_factor - low_freq_factor);
                blend(kept, *factor)
            }
            Self::Yarn {
                factor, original_max_position_embeddings, beta_fast, beta_slow, ..
            } => {
                let half = config.head_dim as f64 / 2.0;
                // The pair, as a real number, that makes so many turns in the original context.
                let pair_with = |turns: f64| {
                    let context = *original_max_position_embeddings as f64;
                    half * libm::log(context / (turns * 2.0 * PI)) / libm::log(config.rope_theta)
                };
                let last = config.head_dim as f64 - 1.0;
                let low = pair_with(*beta_fast).floor().max(0.0);
                let high = pair_with(*beta_slow).ceil().min(last);
                let width = if high == low { 0.001 } else { high - low };
                blend(1.0 - (pair as f64 - low) / width, *factor)
            }
        }
    }
}

/// A divisor between `factor` (`kept` 0 or less) and 1 (`kept` 1 or more): the frequency is the
/// mean of both ends with this weight.
fn blend(kept: f64, factor: f64) -> f64 {
    let kept = kept.clamp(0.0, 1.0);
    1.0 / (kept + (1.0 - kept) / factor)
}

impl ModelConfig {
    /// What the frequency of each of the `head_dim / 2` feature pairs is divided by.
    pub fn rope_divisors(&self) -> Vec<f64> {
        let divisor = |pair| self.rope_scaling.divisor(pair, self.unscaled_frequency(pair), self);
        (0..self.head_dim / 2).map(divisor).collect()
    }

    /// The angle in radians by which each of the `head_dim / 2` feature pairs turns from one
    /// position to the next.
    pub fn rope_frequencies(&self) -> Vec<f32> {
        let divisors = self.rope_divisors().into_iter().enumerate();
        divisors.map(|(pair, divisor)| (self.unscaled_frequency(pair) / divisor) as f32).collect()
    }

    /// Factor on rotated queries and on rotated keys; 1 for all but YaRN.
    pub fn rope_attention_factor(&self) -> f64 {
        match self.rope_scaling {
            RopeScaling::Yarn { attention_factor, .. } => attention_factor,
            _ => 1.0,
        }
    }

    fn unscaled_frequency(&self, pair: usize) -> f64 {
        let exponent = (2 * pair) as f64 / self.head_dim as f64;
        1.0 / libm::pow(self.rope_theta, exponent)
    }
}

#[cfg(test)]
mod tests {
    use super::super::tests::tiny;
    use super::*;

    fn divisors(rope_scaling: RopeScaling, head_dim: usize, rope_theta: f64) -> Vec<f64> {
        ModelConfig { rope_scaling, head_dim, rope_theta, ..tiny() }.rope_divisors()
    }

    #[test]
    fn llama3_keeps_high_and_divides_low_frequencies() {
        let scaling = RopeScaling::Llama3 {
            factor: 8.0,
            low_freq_factor: 1.0,
            high_freq_factor: 4.0,
            original_max_position_embeddings: 64,
        };
        // Unscaled 1, 0.1, 0.01, 0.001: 10.2, 1.02, 0.10 and 0.01 turns in 64 positions.
        let divisors = divisors(scaling, 8, 10_000.0);
        assert_eq!((divisors[0], divisors[2], divisors[3]), (1.0, 8.0, 8.0));
        let kept = (6.4 / (2.0 * PI) - 1.0) / 3.0;
        assert!((divisors[1] - 1.0 / (kept + (1.0 - kept) / 8.0)).abs() < 1e-12);
    }

    #[test]
    fn yarn_as_transformers_computes_it() {
        let scaling = RopeScaling::Yarn {
            factor: 4.0,
            original_max_position_embeddings: 16_384,
            beta_fast: 32.0,
            beta_slow: 1.0,
            attention_factor: RopeScaling::yarn_attention_factor(4.0),
        };
        let config =
            ModelConfig { rope_scaling: scaling, head_dim: 128, rope_theta: 1e6, ..tiny() };
        let divisors = config.rope_divisors();
        // Pairs up to 20 make 32 turns in 16,384 positions, pairs from 37 on less than one.
        assert!(divisors[..=20].iter().all(|&divisor| divisor == 1.0));
        assert!(divisors[37..].iter().all(|&divisor| divisor == 4.0));
        let kept = 1.0 - 5.0 / 17.0;
        assert!((divisors[25] - 1.0 / (kept + (1.0 - kept) / 4.0)).abs() < 1e-12);
        assert!((config.rope_attention_factor() - 1.138_629_436).abs() < 1e-9);
    }

    #[test]
    fn plain_frequencies_fall_from_one() {
        let config = ModelConfig { head_dim: 4, rope_theta: 10_000.0, ..tiny() };
        assert_eq!(config.rope_frequencies(), [1.0, 0.01]);
        let halved = ModelConfig { rope_scaling: RopeScaling::Linear { factor: 2.0 }, ..config };
        assert_eq!(halved.rope_frequencies(), [0.5, 0.005]);
        assert_eq!(divisors(RopeScaling::Factors(vec![1.0, 3.0]), 4, 1e4), [1.0, 3.0]);
    }
}

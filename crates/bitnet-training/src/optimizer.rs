//! AdamW over the flat list of masters. Knows ranges and moments, not layers.

use crate::error::{Error, Result};
use crate::model::{ParameterKind, Places};
use crate::vector::vectorized;

/// Settings of AdamW.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct AdamW {
    /// Decay of the mean of gradients.
    pub beta1: f64,
    /// Decay of the mean of their squares.
    pub beta2: f64,
    /// Added to the root of the latter.
    pub epsilon: f64,
}

impl Default for AdamW {
    /// 0.9, 0.95, 1e-8.
    fn default() -> Self {
        Self { beta1: 0.9, beta2: 0.95, epsilon: 1e-8 }
    }
}

impl AdamW {
    pub(crate) fn check(&self) -> Result<()> {
        for (what, beta) in [("beta1", self.beta1), ("beta2", self.beta2)] {
            if !(0.0..1.0).contains(&beta) {
                return Err(Error::setting(what, "0 to below 1", beta));
            }
        }
        if !(self.epsilon > 0.0 && self.epsilon <= 1.0) {
            return Err(Error::setting("epsilon", "above 0, at most 1", self.epsilon));
        }
        Ok(())
    }
}

/// The moments of every parameter.
#[derive(Debug, Clone)]
pub(crate) struct Moments {
    pub(crate) first: Vec<f32>,
    pub(crate) second: Vec<f32>,
}

impl Moments {
    pub(crate) fn new(len: usize) -> Self {
        Self { first: vec![0.0; len], second: vec![0.0; len] }
    }

    /// One update: `gradients` times `factor` are the step's gradients. Norms are not decayed.
    pub(crate) fn update(
        &mut self,
        adam: &AdamW,
        places: &Places,
        step: u64,
        rate: f64,
        decay: f64,
        gradients: &[f32],
        factor: f32,
        values: &mut [f32],
    ) {
        let correction = |beta: f64| 1.0 - libm::pow(beta, step as f64);
        let (beta1, beta2) = (adam.beta1 as f32, adam.beta2 as f32);
        let (from1, from2) = ((1.0 - adam.beta1) as f32, (1.0 - adam.beta2) as f32);
        let first_factor = (rate / correction(adam.beta1)) as f32;
        let second_factor = (1.0 / correction(adam.beta2)) as f32;
        let epsilon = adam.epsilon as f32;
        for parameter in &places.parameters {
            let kept = match parameter.kind {
                ParameterKind::Norm => 1.0,
                ParameterKind::Projection | ParameterKind::Table => 1.0 - (rate * decay) as f32,
            };
            let range = parameter.range.clone();
            let (first, second) = (&mut self.first[range.clone()], &mut self.second[range.clone()]);
            let (gradients, values) = (&gradients[range.clone()], &mut values[range]);
            vectorized(|| {
                let moments = first.iter_mut().zip(second);
                for (((m, v), g), value) in moments.zip(gradients).zip(values) {
                    let g = g * factor;
                    *m = *m * beta1 + g * from1;
                    *v = *v * beta2 + g * g * from2;
                    let root = (*v * second_factor).sqrt() + epsilon;
                    *value = *value * kept - first_factor * *m / root;
                }
            });
        }
    }
}

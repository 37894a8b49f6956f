//! How the learning rate and the weight decay change over a run.
//!
//! A schedule is a function of progress (0 at the first step, 1 after the last), so that a run may
//! be measured in steps, tokens or time. Knows no optimizer.

use crate::error::{Error, Result};

/// The shape of a run.
#[derive(Debug, Clone, Copy, PartialEq)]
pub enum Shape {
    /// The BitNet b1.58 recipe: cosine decay from the peak, and in mid-run a fall to a lower peak that
    /// decays to the floor, without weight decay.
    TwoStage {
        /// Where the second stage begins, 0 to 1.
        switch: f64,
        /// Learning rate at the beginning of the second stage, as a share of the peak.
        second_peak: f64,
    },
    /// The peak is held, then the rate falls linearly to the floor.
    Trapezoid {
        /// The share of the run that the fall takes, 0 to 1.
        decay: f64,
    },
    /// Cosine decay from the peak to the floor.
    Cosine,
}

/// Learning rate and weight decay over a run.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Schedule {
    /// Its shape.
    pub shape: Shape,
    /// Highest learning rate.
    pub peak: f64,
    /// Lowest one at the end, as a share of the peak.
    pub floor: f64,
    /// The share of the run in which the rate grows from 0 to the peak.
    pub warmup: f64,
    /// Weight decay of matrices, in the first stage.
    pub weight_decay: f64,
}

impl Schedule {
    /// Checks that every number is in its range.
    ///
    /// # Errors
    /// [`Error::Setting`].
    pub fn check(&self) -> Result<()> {
        let range = |what: &str, value: f64, low: f64, high: f64| {
            if value >= low && value <= high {
                return Ok(());
            }
            Err(Error::setting(what, format!("{low} to {high}"), value))
        };
        range("learning rate", self.peak, f64::MIN_POSITIVE, 10.0)?;
        range("floor of the learning rate", self.floor, 0.0, 1.0)?;
        range("warm-up", self.warmup, 0.0, 1.0)?;
        range("weight decay", self.weight_decay, 0.0, 10.0)?;
        match self.shape {
            Shape::TwoStage { switch, second_peak } => {
                range("switch to the second stage", switch, 0.0, 1.0)?;
                range("learning rate of the second stage", second_peak, 0.0, 1.0)
            }
            Shape::Trapezoid { decay } => range("decay", decay, 0.0, 1.0),
            Shape::Cosine => Ok(()),
        }
    }

    /// The learning rate at `progress`.
    pub fn rate(&self, progress: f64) -> f64 {
        let progress = progress.clamp(0.0, 1.0);
        let warm = if progress < self.warmup { progress / self.warmup } else { 1.0 };
        let cosine = |x: f64| 0.5 + 0.5 * libm::cos(std::f64::consts::PI * x.clamp(0.0, 1.0));
        let (from, share) = match self.shape {
            Shape::TwoStage { switch, second_peak } if progress >= switch => (
                second_peak.max(self.floor),
                cosine((progress - switch) / (1.0 - switch).max(1e-9)),
            ),
            // Over the whole run, as if there were no second stage.
            Shape::TwoStage { .. } | Shape::Cosine => (1.0, cosine(progress)),
            Shape::Trapezoid { decay } => (1.0, ((1.0 - progress) / decay.max(1e-9)).min(1.0)),
        };
        self.peak * warm * (self.floor + (from - self.floor) * share)
    }

    /// The weight decay at `progress`.
    pub fn decay(&self, progress: f64) -> f64 {
        match self.shape {
            Shape::TwoStage { switch, .. } if progress >= switch => 0.0,
            _ => self.weight_decay,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn schedule(shape: Shape) -> Schedule {
        Schedule { shape, peak: 2.0, floor: 0.1, warmup: 0.1, weight_decay: 0.3 }
    }

    #[test]
    fn every_shape_warms_up_and_ends_at_the_floor() {
        for shape in [
            Shape::TwoStage { switch: 0.5, second_peak: 0.6 },
            Shape::Trapezoid { decay: 0.4 },
            Shape::Cosine,
        ] {
            let schedule = schedule(shape);
            schedule.check().unwrap();
            assert_eq!(schedule.rate(0.0), 0.0);
            assert!(schedule.rate(0.05) < schedule.rate(0.1));
            assert!((schedule.rate(1.0) - 0.2).abs() < 1e-9, "{shape:?}");
            assert!((schedule.rate(7.0) - 0.2).abs() < 1e-9);
        }
    }

    #[test]
    fn the_second_stage_is_lower_and_without_weight_decay() {
        let schedule = schedule(Shape::TwoStage { switch: 0.5, second_peak: 0.3 });
        assert!(schedule.rate(0.499) > 1.0);
        assert!((schedule.rate(0.5) - 0.6).abs() < 1e-9);
        assert_eq!((schedule.decay(0.49), schedule.decay(0.5)), (0.3, 0.0));
    }

    #[test]
    fn a_trapezoid_holds_its_peak() {
        let schedule = schedule(Shape::Trapezoid { decay: 0.4 });
        assert_eq!((schedule.rate(0.1), schedule.rate(0.6)), (2.0, 2.0));
        assert!((schedule.rate(0.8) - 1.1).abs() < 1e-9);
    }

    #[test]
    fn numbers_outside_their_range_are_refused() {
        let good = schedule(Shape::Cosine);
        for bad in [
            Schedule { peak: 0.0, ..good },
            Schedule { peak: f64::NAN, ..good },
            Schedule { warmup: 1.5, ..good },
            Schedule { shape: Shape::Trapezoid { decay: -0.1 }, ..good },
        ] {
            assert!(bad.check().is_err(), "{bad:?}");
        }
    }
}

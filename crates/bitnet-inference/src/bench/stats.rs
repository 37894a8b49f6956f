//! Means, deviations and percentiles of what was measured.

use std::time::Duration;

/// Numbers measured under the same conditions.
#[derive(Debug, Clone, PartialEq)]
pub struct Sample {
    values: Vec<f64>,
}

impl Sample {
    /// A sample of these values.
    pub fn new(values: Vec<f64>) -> Self {
        Self { values }
    }

    /// In the order they were measured.
    pub fn values(&self) -> &[f64] {
        &self.values
    }

    /// The arithmetic mean; 0 of nothing.
    pub fn mean(&self) -> f64 {
        self.values.iter().sum::<f64>() / self.values.len().max(1) as f64
    }

    /// The sample standard deviation (n − 1); 0 of fewer than two values.
    pub fn deviation(&self) -> f64 {
        let n = self.values.len();
        if n < 2 {
            return 0.0;
        }
        let mean = self.mean();
        let squares: f64 = self.values.iter().map(|x| (x - mean) * (x - mean)).sum();
        (squares / (n - 1) as f64).sqrt()
    }
}

/// How long something took, many times.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Latency {
    sorted: Vec<Duration>,
}

impl Latency {
    /// The distribution of these times.
    pub fn new(mut times: Vec<Duration>) -> Self {
        times.sort_unstable();
        Self { sorted: times }
    }

    /// How many were measured.
    pub fn count(&self) -> usize {
        self.sorted.len()
    }

    /// The shortest time that at least `percent` of all did not exceed (nearest rank); zero of
    /// nothing.
    pub fn percentile(&self, percent: f64) -> Duration {
        let rank = (percent / 100.0 * self.sorted.len() as f64).ceil() as usize;
        self.sorted.get(rank.clamp(1, self.sorted.len().max(1)) - 1).copied().unwrap_or_default()
    }

    /// The arithmetic mean; zero of nothing.
    pub fn mean(&self) -> Duration {
        let total: Duration = self.sorted.iter().sum();
        total.checked_div(self.sorted.len() as u32).unwrap_or_default()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn mean_and_deviation_are_those_of_the_textbook() {
        let sample = Sample::new(vec![2.0, 4.0, 4.0, 4.0, 5.0, 5.0, 7.0, 9.0]);
        assert_eq!(sample.mean(), 5.0);
        assert!((sample.deviation() - (32.0f64 / 7.0).sqrt()).abs() < 1e-12);
        assert_eq!(Sample::new(vec![3.0]).deviation(), 0.0);
        assert_eq!(Sample::new(vec![]).mean(), 0.0);
    }

    #[test]
    fn percentiles_are_nearest_ranks() {
        let latency = Latency::new((1..=200).rev().map(Duration::from_micros).collect());
        assert_eq!(latency.percentile(50.0), Duration::from_micros(100));
        assert_eq!(latency.percentile(99.0), Duration::from_micros(198));
        assert_eq!(latency.percentile(100.0), Duration::from_micros(200));
        assert_eq!(latency.percentile(0.0), Duration::from_micros(1));
        assert_eq!(latency.mean(), Duration::from_nanos(100_500));
        assert_eq!(Latency::default().percentile(99.0), Duration::ZERO);
        assert_eq!(Latency::default().mean(), Duration::ZERO);
    }
}

//! Rotary position embedding: the angles of a step's positions, and the rotation of a head.
//!
//! Angles and their sines are computed in f64 by a library that gives the same bits everywhere,
//! for the positions of the step only: once a step, not once a layer, and without a table for the
//! whole context. Knows positions, not where heads come from.

use crate::backend::RopeSpec;
use crate::error::{Error, Result};
use std::sync::Arc;

/// Rotations on the CPU: the frequencies.
#[derive(Debug, Clone)]
pub struct CpuRope {
    spec: Arc<RopeSpec>,
}

impl CpuRope {
    /// Takes the frequencies over.
    ///
    /// # Errors
    /// [`Error::Invalid`] if there are none, or one or the magnitude is not finite.
    pub fn new(spec: &RopeSpec) -> Result<Self> {
        let bad = spec.inv_freq.iter().position(|f| !f.is_finite());
        match bad {
            _ if !spec.magnitude.is_finite() => {
                let reason = format!("the magnitude is {}", spec.magnitude);
                Err(Error::invalid("rotary embedding", reason))
            }
            Some(i) => {
                let reason = format!("frequency {i} is {}", spec.inv_freq[i]);
                Err(Error::invalid("rotary embedding", reason))
            }
            None if spec.inv_freq.is_empty() => {
                Err(Error::invalid("rotary embedding", "no frequencies"))
            }
            None => Ok(Self { spec: Arc::new(spec.clone()) }),
        }
    }

    /// Features of the heads it rotates.
    pub fn head_dim(&self) -> usize {
        2 * self.spec.inv_freq.len()
    }

    /// Writes the cosines, then the sines of a position's angles: `head_dim` numbers.
    pub fn angles(&self, position: usize, out: &mut [f32]) {
        let (cosines, sines) = out.split_at_mut(self.spec.inv_freq.len());
        for ((cos, sin), &frequency) in cosines.iter_mut().zip(sines).zip(&self.spec.inv_freq) {
            let (s, c) = libm::sincos(position as f64 * f64::from(frequency));
            let magnitude = self.spec.magnitude;
            (*sin, *cos) = (s as f32 * magnitude, c as f32 * magnitude);
        }
    }
}

/// The angles of a step's rows, kept from layer to layer.
#[derive(Debug, Default)]
pub(crate) struct StepAngles {
    /// Whose angles these are; `None` when the step is new.
    of: Option<Arc<RopeSpec>>,
    /// `(rows, head_dim)`: cosines, then sines.
    values: Vec<f32>,
}

impl StepAngles {
    /// Forgets the angles: the next rows have other positions.
    pub(crate) fn start_step(&mut self) {
        self.of = None;
    }

    /// Whether the angles of `rope` are to be computed; if so, room for `rows` of them is made.
    pub(crate) fn needs(&mut self, rope: &CpuRope, rows: usize) -> bool {
        let known = self.of.as_ref().is_some_and(|spec| Arc::ptr_eq(spec, &rope.spec));
        if !known {
            self.of = Some(rope.spec.clone());
            self.values.resize(rows * rope.head_dim(), 0.0);
        }
        !known
    }

    pub(crate) fn values(&self) -> &[f32] {
        &self.values
    }

    pub(crate) fn values_mut(&mut self) -> &mut [f32] {
        &mut self.values
    }

    pub(crate) fn memory_bytes(&self) -> u64 {
        4 * self.values.capacity() as u64
    }
}

/// Turns the pairs `(i, i + head_dim/2)` of one head by the angles whose cosines and sines stand in
/// `angles`.
#[inline(always)]
pub(crate) fn rotate(head: &mut [f32], angles: &[f32]) {
    let half = head.len() / 2;
    let (cosines, sines) = angles.split_at(half);
    let (first, second) = head.split_at_mut(half);
    for (((x, y), cos), sin) in first.iter_mut().zip(second).zip(cosines).zip(sines) {
        (*x, *y) = (*x * cos - *y * sin, *y * cos + *x * sin);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn rope(head_dim: usize) -> CpuRope {
        let inv_freq: Vec<f32> = (0..head_dim / 2)
            .map(|i| 500_000f64.powf(-2.0 * i as f64 / head_dim as f64) as f32)
            .collect();
        CpuRope::new(&RopeSpec { inv_freq, max_positions: 1 << 20, magnitude: 1.0 }).unwrap()
    }

    #[test]
    fn a_rotation_is_a_complex_product() {
        let dim = 64;
        let rope = rope(dim);
        let mut angles = vec![0.0; dim];
        for position in [0, 1, 4095, 1_000_000] {
            rope.angles(position, &mut angles);
            let x: Vec<f32> = (0..dim).map(|i| ((i * 37 + 11) % 64) as f32 / 32.0 - 1.0).collect();
            let mut got = x.clone();
            rotate(&mut got, &angles);
            for i in 0..dim / 2 {
                let angle = position as f64 * f64::from(rope.spec.inv_freq[i]);
                let (a, b) = (f64::from(x[i]), f64::from(x[i + dim / 2]));
                let want = [a * angle.cos() - b * angle.sin(), b * angle.cos() + a * angle.sin()];
                // Cosine, sine, two products and a sum round once each; all magnitudes are ≤ 1.
                let tolerance = 3.0 * f64::from(f32::EPSILON) * (a.abs() + b.abs());
                assert!((f64::from(got[i]) - want[0]).abs() <= tolerance);
                assert!((f64::from(got[i + dim / 2]) - want[1]).abs() <= tolerance);
            }
            if position == 0 {
                assert_eq!(got, x);
            }
        }
    }

    #[test]
    fn angles_are_kept_for_one_step_and_one_rope() {
        let (a, b) = (rope(8), rope(8));
        let mut angles = StepAngles::default();
        assert!(angles.needs(&a, 3));
        assert_eq!(angles.values().len(), 24);
        assert!(!angles.needs(&a, 3));
        assert!(angles.needs(&b, 3));
        angles.start_step();
        assert!(angles.needs(&b, 2));
        assert_eq!(angles.values().len(), 16);
    }

    #[test]
    fn frequencies_must_be_numbers() {
        for inv_freq in [vec![], vec![1.0, f32::NAN], vec![f32::INFINITY]] {
            let spec = RopeSpec { inv_freq, max_positions: 1, magnitude: 1.0 };
            assert!(CpuRope::new(&spec).is_err());
        }
        let spec = RopeSpec { inv_freq: vec![1.0], max_positions: 1, magnitude: f32::NAN };
        assert!(CpuRope::new(&spec).is_err());
    }
}

//! The small things on the device: activations, norms, rotations.

use std::sync::Arc;

use bitnet_core::backend::RopeSpec;
use bitnet_core::memory::AccessPattern;
use bitnet_core::weights::NormWeights;
use bitnet_core::{Error, Result};

use crate::memory::{Pool, Region, filled};

/// Activations `(max_tokens, width)`, row-major f32.
pub struct WgpuBuffer {
    pub(crate) data: Region,
    pub(crate) width: usize,
    max_tokens: usize,
}

impl WgpuBuffer {
    pub(crate) fn new(pool: &Pool, max_tokens: usize, width: usize) -> Result<Self> {
        if max_tokens == 0 || width == 0 {
            return Err(Error::invalid("buffer", format!("{max_tokens} × {width} is empty")));
        }
        let bytes = (max_tokens as u64).saturating_mul(width as u64).saturating_mul(4);
        let data = pool.take(bytes, AccessPattern::Activations)?;
        Ok(Self { data, width, max_tokens })
    }

    /// Checks that `rows` rows of `width` features are here.
    pub(crate) fn check(&self, what: &str, rows: usize, width: usize) -> Result<()> {
        if self.width != width {
            return Err(Error::shape(what, format!("{width} features"), self.width));
        }
        match rows <= self.max_tokens {
            true => Ok(()),
            false => Err(Error::shape(what, format!("at most {} rows", self.max_tokens), rows)),
        }
    }
}

/// A root-mean-square norm on the device.
pub struct WgpuNorm {
    pub(crate) weights: Region, // (len)
    pub(crate) len: usize,
    pub(crate) eps: f32,
}

impl WgpuNorm {
    pub(crate) fn new(pool: &Pool, norm: &NormWeights) -> Result<Self> {
        let data = bytemuck::cast_slice(&norm.weight);
        let weights = filled(pool, data, AccessPattern::Weights)?;
        Ok(Self { weights, len: norm.weight.len(), eps: norm.eps })
    }

    /// Checks that it fits rows of this width.
    pub(crate) fn check(&self, what: &str, width: usize) -> Result<()> {
        match self.len == width {
            true => Ok(()),
            false => Err(Error::shape(what, width, self.len)),
        }
    }
}

/// Rotations: the frequencies. Angles are computed on the host in f64, for the rows of a step only,
/// because shaders have neither f64 nor exact sines.
#[derive(Debug, Clone)]
pub struct WgpuRope {
    pub(crate) spec: Arc<RopeSpec>,
}

impl WgpuRope {
    pub(crate) fn new(spec: &RopeSpec) -> Result<Self> {
        let invalid = |reason: String| Err(Error::invalid("rotary embedding", reason));
        if spec.inv_freq.is_empty() {
            return invalid("no frequencies".into());
        }
        if !spec.magnitude.is_finite() {
            return invalid(format!("the magnitude is {}", spec.magnitude));
        }
        match spec.inv_freq.iter().position(|f| !f.is_finite()) {
            Some(i) => invalid(format!("frequency {i} is {}", spec.inv_freq[i])),
            None => Ok(Self { spec: Arc::new(spec.clone()) }),
        }
    }

    /// Features of the heads it rotates.
    pub(crate) fn head_dim(&self) -> usize {
        2 * self.spec.inv_freq.len()
    }

    /// Appends the cosines, then the sines of a position's angles.
    pub(crate) fn angles(&self, position: usize, out: &mut Vec<f32>) {
        let turned = |f: &f32| libm::sincos(position as f64 * f64::from(*f));
        let RopeSpec { inv_freq, magnitude, .. } = &*self.spec;
        out.extend(inv_freq.iter().map(|f| turned(f).1 as f32 * magnitude));
        out.extend(inv_freq.iter().map(|f| turned(f).0 as f32 * magnitude));
    }
}

//! A tensor of any file, before anything is decoded.

use crate::error::{Error, Result};
use crate::mapping::FileBytes;
use crate::pack::{FloatFormat, FloatTensor, Packing, TernaryTensor};
use bitnet_core::weights::{FloatRows, FloatType};
use std::sync::Arc;

/// A tensor as it lies in a file.
pub(crate) struct Tensor {
    /// Its name there.
    pub(crate) name: String,
    /// How messages name the file.
    pub(crate) file: Arc<str>,
    /// Sizes in weights, outermost first.
    pub(crate) shape: Vec<usize>,
    pub(crate) kind: Kind,
    pub(crate) bytes: FileBytes,
}

/// What the bytes of a tensor are.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Kind {
    Ternary(Packing),
    Float(FloatFormat),
    /// Something no weight is made of.
    Other(String),
}

/// A line of a listing of tensors.
#[derive(Debug, Clone, PartialEq)]
pub struct TensorEntry {
    /// The name in the file.
    pub file_name: String,
    /// The name Hugging Face checkpoints give it.
    pub name: String,
    /// Sizes in weights, outermost first: `[out, in]` for a projection.
    pub shape: Vec<usize>,
    /// Number format or packing.
    pub type_name: String,
    /// Bytes it takes in the file.
    pub bytes: u64,
    /// Bits one weight takes, scales included where they lie among the weights.
    pub bits_per_weight: f64,
}

/// The formats weights can have, for messages.
const SUPPORTED: &str = "F32, F16, BF16, Q8_0, Q4_0, Q4_1, Q5_0, Q5_1, Q4_K, Q5_K, Q6_K, I2_S, \
                         TQ1_0, TQ2_0, Q2_0, Q1_0, PQ2_0, PTQ1_0, TILES, packed uint8";

impl Tensor {
    /// Whether the tensor can be what the model needs. The packed form of Hugging Face has room
    /// for up to three rows more than the matrix.
    pub(crate) fn has_shape(&self, shape: &[usize]) -> bool {
        match (&self.kind, shape, &self.shape[..]) {
            (Kind::Ternary(Packing::HfU8), [rows, cols], [own_rows, own_cols]) => {
                rows.next_multiple_of(4) == *own_rows && cols == own_cols
            }
            (_, expected, own) => expected == own,
        }
    }

    /// Checks that weights can be made of it at all.
    pub(super) fn check_type(&self) -> Result<()> {
        match self.kind {
            Kind::Ternary(_) | Kind::Float(_) => Ok(()),
            Kind::Other(_) => {
                let what = format!("type of {}", self.name);
                Err(Error::unsupported(what, self.type_name(), SUPPORTED))
            }
        }
    }

    /// Decodes a ternary matrix of shape `(rows, cols)` that has its scales among its bytes.
    pub(crate) fn ternary(
        &self,
        what: &str,
        packing: Packing,
        (rows, cols): (usize, usize),
    ) -> Result<TernaryTensor> {
        TernaryTensor::new(what, packing, rows, cols, self.bytes.clone())
    }

    /// Opens a float matrix of shape `(rows, cols)`.
    pub(crate) fn float(
        &self,
        what: &str,
        (rows, cols): (usize, usize),
    ) -> Result<Arc<dyn FloatRows>> {
        let Kind::Float(format) = self.kind else {
            return Err(Error::unsupported(format!("type of {what}"), self.type_name(), SUPPORTED));
        };
        Ok(Arc::new(FloatTensor::new(what, format, rows, cols, self.bytes.clone())?))
    }

    /// All its numbers, which must be finite and of a plain format.
    pub(crate) fn vector(&self, what: &str) -> Result<Vec<f32>> {
        /// More numbers than any norm, bias or scale has.
        const MAX_NUMBERS: usize = 1 << 20;
        let Kind::Float(FloatFormat::Plain(_)) = self.kind else {
            let what = format!("type of {what}");
            return Err(Error::unsupported(what, self.type_name(), "F32, F16, BF16"));
        };
        let len = self.shape.iter().try_fold(1usize, |len, &size| len.checked_mul(size));
        let Some(len) = len.filter(|len| (1..=MAX_NUMBERS).contains(len)) else {
            let expected = format!("1 to {MAX_NUMBERS} numbers");
            return Err(Error::malformed(what, expected, format!("shape {:?}", self.shape)));
        };
        let mut values = vec![0.0; len];
        self.float(what, (1, len))?.decode_row(0, &mut values);
        match values.iter().position(|value| !value.is_finite()) {
            None => Ok(values),
            Some(at) => {
                let got = format!("{} at {at}", values[at]);
                Err(Error::malformed(what, "finite numbers", got))
            }
        }
    }

    /// Its line in a listing.
    pub(crate) fn entry(&self, name: &str) -> TensorEntry {
        let weights = self.shape.iter().map(|&size| size as f64).product::<f64>();
        TensorEntry {
            file_name: self.name.clone(),
            name: name.to_owned(),
            shape: self.shape.clone(),
            type_name: self.type_name(),
            bytes: self.bytes.len() as u64,
            bits_per_weight: 8.0 * self.bytes.len() as f64 / weights.max(1.0),
        }
    }

    fn type_name(&self) -> String {
        match &self.kind {
            Kind::Ternary(packing) => packing.to_string(),
            Kind::Float(format) => format.to_string(),
            Kind::Other(name) => name.clone(),
        }
    }
}

/// The plain number format of a safetensors type.
pub(crate) fn plain(dtype: safetensors::Dtype) -> Option<FloatFormat> {
    use safetensors::Dtype;
    Some(FloatFormat::Plain(match dtype {
        Dtype::F32 => FloatType::F32,
        Dtype::F16 => FloatType::F16,
        Dtype::BF16 => FloatType::BF16,
        _ => return None,
    }))
}

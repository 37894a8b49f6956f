//! What a conversion reads: every tensor the model uses, by canonical name, as bytes of the form
//! asked for.

use crate::absmean::Absmean;
use crate::checkpoint::{Checkpoint, Kind, Tensor, shapes};
use crate::error::{Error, Result};
use crate::mapping::FileBytes;
use crate::pack::{Encoded, FloatFormat, Packing, encode, encode_float};
use crate::rows::{HeadOrder, ReorderedTernary};
use bitnet_core::weights::{
    ActivationQuant, FloatRows, FloatType, LinearWeights, Matrix, Scales, TernaryRows,
};
use std::sync::Arc;

/// A checkpoint, perhaps seen through a quantizer.
pub(crate) struct Source<'a> {
    pub(crate) checkpoint: &'a Checkpoint,
    /// Says by path which float projections are to be quantized.
    quantize: Option<&'a dyn Fn(&str) -> bool>,
}

/// A tensor to be written.
#[derive(Debug, Clone, PartialEq)]
pub(super) struct Item {
    /// Canonical name.
    pub(super) name: String,
    /// Outermost size first.
    pub(super) shape: Vec<usize>,
    pub(super) content: Content,
}

/// What an item is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Content {
    /// A norm or a bias, stored in this plain format or otherwise.
    Vector(Option<FloatType>),
    /// A ternary projection.
    Ternary(ActivationQuant),
    /// A float projection, stored in this format.
    Float(FloatFormat),
    /// The embedding or the head, stored in this format.
    Table(Table),
}

/// A matrix in the packing asked for.
pub(super) struct Packed {
    pub(super) bytes: FileBytes,
    /// The largest relative change of a scale by rounding it.
    pub(super) scale_error: f32,
}

impl Packed {
    /// The bytes as they are.
    fn kept(tensor: &Tensor) -> Self {
        Self { bytes: tensor.bytes.clone(), scale_error: 0.0 }
    }
}

impl From<Encoded> for Packed {
    fn from(Encoded { bytes, scale_error }: Encoded) -> Self {
        Self { bytes: bytes.into(), scale_error }
    }
}

/// How the embedding or the head is stored.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Table {
    Float(FloatFormat),
    Ternary,
}

impl<'a> Source<'a> {
    /// The checkpoint as it is.
    pub(crate) fn new(checkpoint: &'a Checkpoint) -> Self {
        Self { checkpoint, quantize: None }
    }

    /// The checkpoint with the float projections quantized whose path `select` approves.
    pub(crate) fn quantized(checkpoint: &'a Checkpoint, select: &'a dyn Fn(&str) -> bool) -> Self {
        Self { checkpoint, quantize: Some(select) }
    }

    /// Everything the model uses, in the order of the data. Looks at projections, so that it is
    /// known which are ternary.
    pub(super) fn items(&self) -> Result<Vec<Item>> {
        let mut items = Vec::new();
        for (name, shape) in shapes::expected(self.checkpoint.parts()) {
            let tensor = self.tensor(&name)?;
            let stored = match tensor.kind {
                Kind::Float(format) => Some(format),
                _ => None,
            };
            let path = name.strip_suffix(".weight").unwrap_or_default();
            let content = match shape[..] {
                [_] => match stored {
                    Some(FloatFormat::Plain(number)) => Content::Vector(Some(number)),
                    _ => Content::Vector(None),
                },
                _ if path.ends_with("_proj") => match (self.linear(path)?.matrix, stored) {
                    (Matrix::Ternary { activations, .. }, _) => Content::Ternary(activations),
                    (Matrix::Float(_), Some(format)) => Content::Float(format),
                    (Matrix::Float(_), None) => Content::Float(FloatFormat::Plain(FloatType::F32)),
                },
                _ => Content::Table(stored.map_or(Table::Ternary, Table::Float)),
            };
            items.push(Item { name, shape, content });
        }
        Ok(items)
    }

    fn tensor(&self, name: &str) -> Result<&Tensor> {
        let tensor = self.checkpoint.parts().tensors.get(name);
        tensor.ok_or_else(|| Error::missing(format!("tensor {name}")))
    }

    fn linear(&self, path: &str) -> Result<LinearWeights> {
        let mut linear = self.checkpoint.linear(path)?;
        match (self.quantize.map(|select| select(path)), &linear.matrix) {
            (Some(true), Matrix::Float(source)) => {
                let weights = Arc::new(Absmean::new(path, source.clone())?);
                linear.matrix = Matrix::Ternary { weights, activations: ActivationQuant::PerToken };
            }
            (Some(false), Matrix::Ternary { .. }) if self.checkpoint.is_stored_float(path) => {
                linear.matrix = Matrix::Float(self.checkpoint.stored_float(path)?);
            }
            _ => {}
        }
        Ok(linear)
    }

    /// The trits of a projection, rows in the order of halves.
    pub(super) fn ternary(&self, path: &str) -> Result<Arc<dyn TernaryRows>> {
        match self.linear(path)?.matrix {
            Matrix::Ternary { weights, .. } => Ok(weights),
            Matrix::Float(_) => Err(Error::malformed(path, "ternary weights", "floats")),
        }
    }

    /// The bytes of a ternary projection in `packing`, its rows in `order` (or that of halves).
    pub(super) fn pack(
        &self,
        path: &str,
        packing: Packing,
        order: Option<HeadOrder>,
    ) -> Result<Packed> {
        let name = format!("{path}.weight");
        let (tensor, order) = (self.tensor(&name)?, order.filter(|_| is_ordered(path)));
        // Nothing but the bytes says what the weights are: keep them.
        if tensor.kind == Kind::Ternary(packing)
            && self.is_stored_in(path, order)
            && !self.checkpoint.parts().tensors.contains_key(&format!("{path}.output_scale"))
        {
            return Ok(Packed::kept(tensor));
        }
        let weights = self.ternary(path)?;
        let encoded = match order {
            Some(order) => encode(packing, &ReorderedTernary::new(weights, order), path),
            None => encode(packing, &*weights, path),
        };
        encoded.map(Packed::from)
    }

    /// The one scale of a ternary projection, for forms with room for one only.
    pub(super) fn scale(&self, path: &str, format: &str) -> Result<f32> {
        match self.ternary(path)?.scales() {
            Scales::Tensor(scale) => Ok(*scale),
            Scales::Row(_) | Scales::Group { .. } => {
                Err(Error::does_not_fit(path, format, "it has several scales"))
            }
        }
    }

    /// The bytes of a float projection in the format it is stored in, its rows in `order`.
    pub(super) fn float(&self, path: &str, order: Option<HeadOrder>) -> Result<FileBytes> {
        let tensor = self.tensor(&format!("{path}.weight"))?;
        let order = order.filter(|_| is_ordered(path));
        if self.is_stored_in(path, order) {
            return Ok(tensor.bytes.clone());
        }
        // Rows are bytes of their own in every float format, so that they need no decoding.
        let rows = tensor.shape[0];
        let row_bytes = tensor.bytes.len() / rows;
        let stored = self.checkpoint.head_order(path);
        let mut bytes = Vec::with_capacity(tensor.bytes.len());
        for row in 0..rows {
            let row = order.map_or(row, |order| order.source_row(row));
            let row = stored.map_or(row, |order| order.source_row(row));
            bytes.extend_from_slice(&tensor.bytes[row * row_bytes..][..row_bytes]);
        }
        Ok(bytes.into())
    }

    /// The float rows of a projection, in the order of halves.
    pub(super) fn float_rows(&self, path: &str) -> Result<Arc<dyn FloatRows>> {
        match self.linear(path)?.matrix {
            Matrix::Float(rows) => Ok(rows),
            Matrix::Ternary { .. } => Err(Error::malformed(path, "floats", "ternary weights")),
        }
    }

    /// The bytes of the embedding or head in `format`.
    pub(super) fn table(&self, name: &str, format: FloatFormat) -> Result<FileBytes> {
        let tensor = self.tensor(name)?;
        if tensor.kind == Kind::Float(format) {
            return Ok(tensor.bytes.clone());
        }
        let path = name.strip_suffix(".weight").unwrap_or(name);
        Ok(encode_float(format, &*self.checkpoint.table(path)?, name)?.into())
    }

    /// The bytes of a ternary embedding or head in `packing`.
    pub(super) fn ternary_table(&self, name: &str, packing: Packing) -> Result<Packed> {
        let tensor = self.tensor(name)?;
        let Kind::Ternary(stored) = tensor.kind else {
            return Err(Error::malformed(name, "ternary weights", "floats"));
        };
        if stored == packing {
            return Ok(Packed::kept(tensor));
        }
        let shape = (tensor.shape[0], tensor.shape[1]);
        encode(packing, &tensor.ternary(name, stored, shape)?, name).map(Packed::from)
    }

    /// The numbers of a norm or bias, in `order` where it belongs to ordered rows.
    pub(super) fn vector(&self, name: &str, order: Option<HeadOrder>) -> Result<Vec<f32>> {
        if let Some(path) = name.strip_suffix(".bias") {
            // Biases of ordered rows are ordered; projections give them back in halves.
            let bias = self.checkpoint.linear(path)?.bias.unwrap_or_default();
            let rows = bias.len();
            return Ok(match order.filter(|_| is_ordered(path)) {
                Some(order) => order.reorder(&bias, rows),
                None => bias,
            });
        }
        let values = self.checkpoint.vector(name)?;
        values.ok_or_else(|| Error::missing(format!("tensor {name}")))
    }

    /// Lets the pages of a tensor go that has been written.
    pub(super) fn release(&self, name: &str) {
        if let Some(tensor) = self.checkpoint.parts().tensors.get(name) {
            tensor.bytes.release();
        }
    }

    /// Whether the file holds the rows of a projection in `order` already.
    fn is_stored_in(&self, path: &str, order: Option<HeadOrder>) -> bool {
        match (self.checkpoint.head_order(path), order) {
            (None, None) => true,
            (Some(stored), Some(order)) => stored.is_inverse_of(order),
            _ => false,
        }
    }
}

/// Whether llama GGUF files have rows of this projection in an order of their own.
fn is_ordered(path: &str) -> bool {
    path.ends_with(".q_proj") || path.ends_with(".k_proj")
}

//! What the bytes of a weight mean: projections, norms and tables of a checkpoint.

use super::{Checkpoint, Kind, Tensor, shapes};
use crate::absmean::{Absmean, StoredTernary};
use crate::config::Architecture;
use crate::error::{Error, Result};
use crate::gguf::names::ROUNDED;
use crate::hf::{Mode, ScaleUse};
use crate::pack::{Packing, TernaryTensor};
use crate::rows::{
    Dequantized, HeadOrder, ReorderedFloat, ReorderedTernary, Rescaled, WithRounded,
};
use bitnet_core::weights::{
    ActivationQuant, FloatRows, LinearWeights, Matrix, NormWeights, RoundedRows, Scales,
    TernaryRows,
};
use std::sync::Arc;

/// Columns that share an activation scale where ternary weights meet activations they were not
/// trained with: the width of ggml's 8-bit blocks, so that no accuracy is lost against it.
const ACTIVATION_GROUP: usize = 32;

impl Checkpoint {
    /// The projection `path`, for instance `model.layers.0.self_attn.q_proj`.
    ///
    /// Reads and checks its codes and scales, or measures its masters; that may use the threads of
    /// rayon.
    pub fn linear(&self, path: &str) -> Result<LinearWeights> {
        self.read_linear(path).map_err(|e| e.in_file(self.file_of(&format!("{path}.weight"))))
    }

    /// The norm `path`, for instance `model.layers.0.input_layernorm`.
    pub fn norm(&self, path: &str) -> Result<NormWeights> {
        let name = format!("{path}.weight");
        let weight = self.vector(&name).map_err(|e| e.in_file(self.file_of(&name)))?;
        let weight = weight.ok_or_else(|| self.lacks(&name))?;
        Ok(NormWeights { weight, eps: self.parts.config.rms_norm_eps })
    }

    /// The embedding table or head `path`: `model.embed_tokens` or `lm_head`. A ternary table is
    /// decoded to floats.
    pub fn table(&self, path: &str) -> Result<Arc<dyn FloatRows>> {
        let name = format!("{path}.weight");
        let (tensor, shape) = self.matrix_tensor(&name)?;
        let table: Result<Arc<dyn FloatRows>> = match tensor.kind {
            Kind::Ternary(packing) if packing.has_scales() => {
                let rows = tensor.ternary(&name, packing, shape);
                rows.map(|rows| -> Arc<dyn FloatRows> { Arc::new(Dequantized(Arc::new(rows))) })
            }
            _ => tensor.float(&name, shape),
        };
        let source = table.map_err(|e| e.in_file(&tensor.file))?;
        Ok(match self.rounded(path) {
            Some(rounded) => Arc::new(WithRounded { source, rounded }),
            None => source,
        })
    }

    /// The rounded copy of a head, where the file has one.
    fn rounded(&self, path: &str) -> Option<RoundedRows> {
        let bytes = |suffix: &str| {
            let tensor = self.parts.tensors.get(&format!("{path}.{suffix}"))?;
            Some(tensor.bytes.as_bytes().clone())
        };
        let [codes, bounds] = ROUNDED;
        Some(RoundedRows { codes: bytes(codes)?, bounds: bytes(bounds)? })
    }

    /// The numbers of the projection `path` as training starts from them: the floats a checkpoint
    /// stores, or its trits times their scales. Rows are in the order of halves.
    ///
    /// # Errors
    /// As [`Checkpoint::linear`].
    pub fn master(&self, path: &str) -> Result<Arc<dyn FloatRows>> {
        if self.is_stored_float(path) {
            return self.stored_float(path);
        }
        Ok(match self.linear(path)?.matrix {
            Matrix::Ternary { weights, .. } => Arc::new(Dequantized(weights)),
            Matrix::Float(rows) => rows,
        })
    }

    /// Whether the projection `path` lies in the file as floats, whatever is made of them.
    pub(crate) fn is_stored_float(&self, path: &str) -> bool {
        let tensor = self.parts.tensors.get(&format!("{path}.weight"));
        tensor.is_some_and(|tensor| matches!(tensor.kind, Kind::Float(_)))
    }

    /// The floats of a projection that lies in the file as such, rows in the order of halves.
    pub(crate) fn stored_float(&self, path: &str) -> Result<Arc<dyn FloatRows>> {
        let name = format!("{path}.weight");
        let (tensor, shape) = self.matrix_tensor(&name)?;
        let source = tensor.float(&name, shape).map_err(|e| e.in_file(&tensor.file))?;
        Ok(match self.head_order(path) {
            Some(order) => Arc::new(ReorderedFloat { source, order }),
            None => source,
        })
    }

    /// The order in which the file has the rows of a projection, where it is not that of halves.
    pub(crate) fn head_order(&self, path: &str) -> Option<HeadOrder> {
        let ordered = path.ends_with(".q_proj") || path.ends_with(".k_proj");
        self.parts.head_order.filter(|_| ordered)
    }

    fn read_linear(&self, path: &str) -> Result<LinearWeights> {
        let name = format!("{path}.weight");
        let (tensor, shape) = self.matrix_tensor(&name)?;
        let mut matrix = self.matrix(path, &name, tensor, shape)?;
        let mut bias = self.vector(&format!("{path}.bias"))?;
        if let Some(order) = self.head_order(path) {
            matrix = match matrix {
                Matrix::Float(source) => Matrix::Float(Arc::new(ReorderedFloat { source, order })),
                Matrix::Ternary { weights, activations } => Matrix::Ternary {
                    weights: Arc::new(ReorderedTernary::new(weights, order)),
                    activations,
                },
            };
            bias = bias.map(|bias| order.reorder(&bias, shape.0));
        }
        let norm = self.vector(&format!("{path}.norm.weight"))?;
        let eps = self.parts.projection_norm_eps;
        let input_norm = norm.map(|weight| NormWeights { weight, eps });
        Ok(LinearWeights { matrix, bias, input_norm })
    }

    /// What the bytes of a projection mean.
    fn matrix(
        &self,
        path: &str,
        name: &str,
        tensor: &Tensor,
        shape: (usize, usize),
    ) -> Result<Matrix> {
        let quantization = self.parts.quantization.as_ref().filter(|q| q.converts(path));
        let weights: Arc<dyn TernaryRows> = match tensor.kind {
            Kind::Ternary(Packing::HfU8) => {
                let scale = self.weight_scale(path)?;
                let scale = scale.ok_or_else(|| self.lacks(&format!("{path}.weight_scale")))?;
                let (packing, bytes) = (Packing::HfU8, tensor.bytes.clone());
                let scales = Scales::Tensor(scale);
                Arc::new(TernaryTensor::with_scales(
                    name, packing, shape.0, shape.1, bytes, scales,
                )?)
            }
            Kind::Ternary(packing) => {
                let stored = Arc::new(tensor.ternary(name, packing, shape)?);
                self.with_output_scale(path, stored)?
            }
            _ => {
                let float = tensor.float(name, shape)?;
                let mode = quantization.map(|q| q.mode);
                match (mode, StoredTernary::detect(&float).filter(|_| mode != Some(Mode::Online))) {
                    (Some(Mode::Offline), Some(stored)) => {
                        self.with_weight_scale(path, Arc::new(stored))?
                    }
                    (Some(Mode::Offline), None) => {
                        let expected = "ternary weights, as quantization_mode offline promises";
                        return Err(Error::malformed(name, expected, "others"));
                    }
                    (_, Some(stored)) => self.with_output_scale(path, Arc::new(stored))?,
                    (Some(Mode::Online | Mode::Either), None) => {
                        Arc::new(Absmean::new(name, float)?)
                    }
                    (None, None) => return self.float_matrix(path, float),
                }
            }
        };
        let activations = self.activations(&*weights, quantization.is_some(), &tensor.kind);
        Ok(Matrix::Ternary { weights, activations })
    }

    /// How the input of ternary weights is quantized.
    ///
    /// BitNet models are trained with 8-bit tokens. Of other files those with one scale for a whole
    /// matrix are BitNet models too (Llama3-1.58, Falcon-E); several scales, or ternary weights in
    /// a float checkpoint (TriLM, Bonsai), tell of training with float activations.
    fn activations(
        &self,
        weights: &dyn TernaryRows,
        quantized: bool,
        stored: &Kind,
    ) -> ActivationQuant {
        if let Some(group) = self.parts.activation_group {
            return ActivationQuant::PerGroup(group);
        }
        let config = &self.parts.config;
        let bitnet = quantized
            || config.architecture == Architecture::Bitnet
            || config.projection_norm_eps.is_some()
            || matches!((weights.scales(), stored), (Scales::Tensor(_), Kind::Ternary(_)));
        match bitnet {
            true => ActivationQuant::PerToken,
            false => ActivationQuant::PerGroup(ACTIVATION_GROUP),
        }
    }

    /// What one trit is worth by the file's `weight_scale`, if it has one.
    fn weight_scale(&self, path: &str) -> Result<Option<f32>> {
        let name = format!("{path}.weight_scale");
        let Some(values) = self.vector(&name)? else { return Ok(None) };
        let [stored] = values[..] else {
            return Err(Error::malformed(name, "one number", values.len()));
        };
        let divides = self.parts.quantization.as_ref().map(|q| q.scale_use);
        let scale = if divides == Some(ScaleUse::Divide) { 1.0 / stored } else { stored };
        if scale.is_finite() {
            return Ok(Some(scale));
        }
        Err(Error::malformed(name, "a number that has an inverse", stored))
    }

    fn with_weight_scale(
        &self,
        path: &str,
        weights: Arc<dyn TernaryRows>,
    ) -> Result<Arc<dyn TernaryRows>> {
        Ok(match self.weight_scale(path)? {
            Some(scale) => Arc::new(Rescaled::new(path, weights, scale)?),
            None => weights,
        })
    }

    /// Some GGUF files have a factor on a projection's output beside it.
    fn with_output_scale(
        &self,
        path: &str,
        weights: Arc<dyn TernaryRows>,
    ) -> Result<Arc<dyn TernaryRows>> {
        let name = format!("{path}.output_scale");
        Ok(match self.vector(&name)?.as_deref() {
            None | Some([1.0]) => weights,
            Some([scale]) => Arc::new(Rescaled::new(path, weights, *scale)?),
            Some(several) => return Err(Error::malformed(name, "one number", several.len())),
        })
    }

    fn float_matrix(&self, path: &str, float: Arc<dyn FloatRows>) -> Result<Matrix> {
        let name = format!("{path}.output_scale");
        match self.vector(&name)?.as_deref() {
            None | Some([1.0]) => Ok(Matrix::Float(float)),
            Some(_) => Err(Error::unsupported(name, "on float weights", "ternary weights")),
        }
    }

    /// All numbers of a tensor of one dimension, finite; `None` if there is no such tensor.
    pub(crate) fn vector(&self, name: &str) -> Result<Option<Vec<f32>>> {
        let Some(tensor) = self.parts.tensors.get(name) else { return Ok(None) };
        tensor.vector(name).map(Some).map_err(|e| e.in_file(&tensor.file))
    }

    /// A matrix and the `(rows, cols)` that the configuration gives it.
    fn matrix_tensor(&self, name: &str) -> Result<(&Tensor, (usize, usize))> {
        let tensor = self.parts.tensors.get(name).ok_or_else(|| self.lacks(name))?;
        let shape = shapes::matrix(&self.parts.config, name);
        let shape =
            shape.ok_or_else(|| Error::unsupported("matrix", name, "projections, tables"))?;
        Ok((tensor, shape))
    }

    fn lacks(&self, name: &str) -> Error {
        Error::missing(format!("tensor {name}")).in_file(&self.parts.place)
    }

    fn file_of(&self, name: &str) -> &str {
        self.parts.tensors.get(name).map_or(&self.parts.place, |tensor| &tensor.file)
    }
}

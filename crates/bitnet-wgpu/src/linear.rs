//! Projections on the device: packed weights, their scales, and how their input is prepared.

use bitnet_core::memory::AccessPattern;
use bitnet_core::weights::{
    ActivationQuant, FloatType, LinearWeights, Matrix, Scales, TernaryRows, check_ternary,
};
use bitnet_core::{Error, Result};

use crate::buffers::WgpuNorm;
use crate::memory::{Manager, Pool, Region, filled};
use crate::weights::{self, Part, code_words, float_words};

/// A projection `y = W·x + b`.
pub struct WgpuLinear {
    pub(crate) rows: usize,
    pub(crate) cols: usize,
    /// Words of a row of weights.
    pub(crate) words: usize,
    pub(crate) form: Form,
    pub(crate) parts: Vec<Part>,
    /// Scales and biases of each part's rows; for float weights, the biases of all rows.
    pub(crate) scales: Vec<Region>,
    pub(crate) biased: bool,
    pub(crate) input_norm: Option<WgpuNorm>,
}

/// What a product has to know of its operands.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Form {
    /// One scale for each row of weights, one for each token.
    Whole,
    /// Columns are summed in groups, each with a scale of its own on one side or both.
    Groups {
        n_groups: usize,
        /// Columns of a group.
        cols: usize,
        /// Whether the activations of a token have one scale.
        scale_of_token: bool,
    },
    /// Float weights with float activations.
    Float(FloatType),
}

impl WgpuLinear {
    pub(crate) fn new(memory: &Manager, weights: &LinearWeights) -> Result<Self> {
        let pool = memory.pool();
        let (rows, cols) = weights.matrix.shape();
        if let Some(bias) = &weights.bias
            && bias.len() != rows
        {
            return Err(Error::shape("bias of a projection", rows, bias.len()));
        }
        let input_norm = match &weights.input_norm {
            Some(norm) if norm.weight.len() != cols => {
                return Err(Error::shape("input norm of a projection", cols, norm.weight.len()));
            }
            Some(norm) => Some(WgpuNorm::new(pool, norm)?),
            None => None,
        };
        let bias = weights.bias.as_deref();
        let (form, words, parts, scales) = match &weights.matrix {
            Matrix::Ternary { weights, activations } => {
                check_ternary(&**weights, *activations)?;
                let form = form_of(&**weights, *activations);
                let parts = weights::upload_codes(memory, &**weights)?;
                let of_part = |part: &Part| scales_of(&**weights, form, part, bias);
                let scales = parts.iter().map(|part| upload_scales(pool, &of_part(part)));
                let scales = scales.collect::<Result<_>>()?;
                (form, code_words(cols), parts, scales)
            }
            Matrix::Float(source) => {
                let (dtype, parts) = weights::upload_floats(memory, "float weights", source)?;
                let scales = vec![upload_scales(pool, bias.unwrap_or(&[]))?];
                (Form::Float(dtype), float_words(cols, dtype), parts, scales)
            }
        };
        let biased = weights.bias.is_some();
        Ok(Self { rows, cols, words, form, parts, scales, biased, input_norm })
    }

    /// Whether `other` reads the very same prepared input.
    pub(crate) fn shares_input_with(&self, other: &Self) -> bool {
        // Which format float weights have does not matter to their input.
        let same_form = match (self.form, other.form) {
            (Form::Float(_), Form::Float(_)) => true,
            (a, b) => a == b,
        };
        self.cols == other.cols
            && same_form
            && self.input_norm.is_none()
            && other.input_norm.is_none()
    }
}

fn form_of(weights: &dyn TernaryRows, activations: ActivationQuant) -> Form {
    let cols = weights.cols();
    let (group, scale_of_token) = match (activations, weights.scales()) {
        (ActivationQuant::PerGroup(group), _) => (group, false),
        (ActivationQuant::PerToken, Scales::Group { group, .. }) => (*group, true),
        (ActivationQuant::PerToken, _) => return Form::Whole,
    };
    Form::Groups { n_groups: cols.div_ceil(group), cols: group, scale_of_token }
}

/// The scales and biases of a part's rows, as the kernels of its form read them.
fn scales_of(weights: &dyn TernaryRows, form: Form, part: &Part, bias: Option<&[f32]>) -> Vec<f32> {
    let rows = part.first_row..part.first_row + part.n_rows;
    let bias = |row: usize| bias.map_or(0.0, |bias| bias[row]);
    let scale = |row: usize, col: usize| match weights.scales() {
        Scales::Tensor(scale) => *scale,
        Scales::Row(values) => values[row],
        Scales::Group { group, values } => {
            values[row * weights.cols().div_ceil(*group) + col / group]
        }
    };
    match form {
        Form::Groups { n_groups, cols, .. } => {
            let scales = rows
                .clone()
                .flat_map(|row| (0..n_groups).map(move |group| (row, group * cols)))
                .map(|(row, col)| scale(row, col));
            scales.chain(rows.clone().map(bias)).collect()
        }
        Form::Whole | Form::Float(_) => rows.flat_map(|row| [scale(row, 0), bias(row)]).collect(),
    }
}

fn upload_scales(pool: &Pool, values: &[f32]) -> Result<Region> {
    filled(pool, bytemuck::cast_slice(values), AccessPattern::Weights)
}

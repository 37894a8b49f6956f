//! The hyper-parameters of a decoder, under the names Hugging Face checkpoints use, whatever file
//! they came from, and the bounds they must keep. Knows no tensors and no kernels.

mod rope;

use crate::error::{Error, Result};
use bitnet_core::weights::MAX_TERNARY_COLS;
use std::fmt;

pub use rope::RopeScaling;

/// What a checkpoint says about the shape of its model.
#[derive(Debug, Clone, PartialEq)]
pub struct ModelConfig {
    /// Family, as `models/` in the engine names it: `bitnet`, `llama`, `qwen3`.
    pub architecture: Architecture,
    /// A name for people: the file's own, or its folder's.
    pub name: String,
    /// Features of the residual stream.
    pub hidden_size: usize,
    /// Features between gate/up and down.
    pub intermediate_size: usize,
    /// Transformer layers.
    pub num_hidden_layers: usize,
    /// Query heads.
    pub num_attention_heads: usize,
    /// Key/value heads; divides `num_attention_heads`.
    pub num_key_value_heads: usize,
    /// Features of a head.
    pub head_dim: usize,
    /// Rows of the embedding table.
    pub vocab_size: usize,
    /// Longest context the model was made for.
    pub max_position_embeddings: usize,
    /// Added to the mean square in every norm.
    pub rms_norm_eps: f32,
    /// Base of the rotary frequencies.
    pub rope_theta: f64,
    /// How rotary frequencies are stretched.
    pub rope_scaling: RopeScaling,
    /// The function between the two halves of the feed-forward block.
    pub hidden_act: HiddenAct,
    /// The head is the embedding table.
    pub tie_word_embeddings: bool,
    /// Norms before the output projection of attention and before the down projection (BitNet).
    pub sub_norms: bool,
    /// Norms on each head of queries and keys (Qwen3).
    pub qk_norm: bool,
    /// Every projection has an input norm of its own, with this epsilon (BitNet embedding models).
    pub projection_norm_eps: Option<f32>,
    /// Q, k and v have biases.
    pub attention_bias: bool,
}

/// Families of decoders the engine knows.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[non_exhaustive]
pub enum Architecture {
    /// BitNet b1.58 (2B4T and the 1bitLLM reproductions): sub-norms.
    Bitnet,
    /// Llama, with ternary or float projections.
    Llama,
    /// Qwen3: norms on queries and keys.
    Qwen3,
}

/// Feed-forward activation.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum HiddenAct {
    /// `max(x, 0)²`
    Relu2,
    /// `x · sigmoid(x)`
    Silu,
}

impl fmt::Display for Architecture {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Bitnet => "bitnet",
            Self::Llama => "llama",
            Self::Qwen3 => "qwen3",
        })
    }
}

/// Largest accepted values. They are far above every published model and far below what would let
/// a lying header ask for absurd amounts of memory.
mod bounds {
    pub(super) const HIDDEN: usize = 1 << 17;
    pub(super) const LAYERS: usize = 1 << 10;
    pub(super) const HEADS: usize = 1 << 12;
    pub(super) const HEAD_DIM: usize = 1 << 12;
    pub(super) const VOCAB: usize = 1 << 22;
    pub(super) const POSITIONS: usize = 1 << 24;
}

impl ModelConfig {
    /// Checks that every number is one a decoder can have, and that they fit together.
    pub fn validate(&self) -> Result<()> {
        within("hidden_size", self.hidden_size, bounds::HIDDEN)?;
        within("intermediate_size", self.intermediate_size, MAX_TERNARY_COLS)?;
        within("num_hidden_layers", self.num_hidden_layers, bounds::LAYERS)?;
        within("num_attention_heads", self.num_attention_heads, bounds::HEADS)?;
        within("num_key_value_heads", self.num_key_value_heads, bounds::HEADS)?;
        within("head_dim", self.head_dim, bounds::HEAD_DIM)?;
        within("vocab_size", self.vocab_size, bounds::VOCAB)?;
        within("max_position_embeddings", self.max_position_embeddings, bounds::POSITIONS)?;
        let width = self.num_attention_heads * self.head_dim;
        within("num_attention_heads · head_dim", width, MAX_TERNARY_COLS)?;
        if !self.num_attention_heads.is_multiple_of(self.num_key_value_heads) {
            let expected = format!("a divisor of num_attention_heads {}", self.num_attention_heads);
            return Err(Error::malformed(
                "num_key_value_heads",
                expected,
                self.num_key_value_heads,
            ));
        }
        if !self.head_dim.is_multiple_of(2) {
            return Err(Error::malformed("head_dim", "an even number", self.head_dim));
        }
        positive("rms_norm_eps", f64::from(self.rms_norm_eps), 1.0)?;
        if let Some(eps) = self.projection_norm_eps {
            positive("rms_norm_eps of the projections", f64::from(eps), 1.0)?;
        }
        if !(self.rope_theta > 1.0 && self.rope_theta <= 1e15) {
            let expected = "a number above 1, at most 1e15";
            return Err(Error::malformed("rope_theta", expected, self.rope_theta));
        }
        self.rope_scaling.validate(self.head_dim)
    }

    /// Features of all query heads together: rows of `q_proj`, columns of `o_proj`.
    pub const fn query_width(&self) -> usize {
        self.num_attention_heads * self.head_dim
    }

    /// Features of all key heads together: rows of `k_proj` and `v_proj`.
    pub const fn key_width(&self) -> usize {
        self.num_key_value_heads * self.head_dim
    }
}

/// `1 ≤ value ≤ max`
fn within(what: &str, value: usize, max: usize) -> Result<()> {
    if (1..=max).contains(&value) {
        return Ok(());
    }
    Err(Error::malformed(what, format!("1 to {max}"), value))
}

/// `0 < value ≤ max`, which no NaN is.
fn positive(what: &str, value: f64, max: f64) -> Result<()> {
    if value > 0.0 && value <= max {
        return Ok(());
    }
    Err(Error::malformed(what, format!("a number above 0, at most {max}"), value))
}

#[cfg(test)]
mod tests {
    use super::*;

    pub(super) fn tiny() -> ModelConfig {
        ModelConfig {
            architecture: Architecture::Llama,
            name: "tiny".into(),
            hidden_size: 64,
            intermediate_size: 128,
            num_hidden_layers: 2,
            num_attention_heads: 4,
            num_key_value_heads: 2,
            head_dim: 16,
            vocab_size: 100,
            max_position_embeddings: 128,
            rms_norm_eps: 1e-5,
            rope_theta: 10_000.0,
            rope_scaling: RopeScaling::None,
            hidden_act: HiddenAct::Silu,
            tie_word_embeddings: true,
            sub_norms: false,
            qk_norm: false,
            projection_norm_eps: None,
            attention_bias: false,
        }
    }

    #[test]
    fn every_nonsense_is_named() {
        assert!(tiny().validate().is_ok());
        type Spoil = fn(&mut ModelConfig);
        let spoilt: [(&str, Spoil); 12] = [
            ("hidden_size", |c| c.hidden_size = 0),
            ("hidden_size", |c| c.hidden_size = usize::MAX),
            ("intermediate_size", |c| c.intermediate_size = 1 << 40),
            ("num_hidden_layers", |c| c.num_hidden_layers = 1 << 20),
            ("num_key_value_heads", |c| c.num_key_value_heads = 3),
            ("head_dim", |c| c.head_dim = 15),
            ("vocab_size", |c| c.vocab_size = 1 << 40),
            ("rms_norm_eps", |c| c.rms_norm_eps = f32::NAN),
            ("rms_norm_eps", |c| c.rms_norm_eps = 0.0),
            ("rope_theta", |c| c.rope_theta = f64::INFINITY),
            ("rope factor", |c| c.rope_scaling = RopeScaling::Linear { factor: -1.0 }),
            ("number of rope factors", |c| c.rope_scaling = RopeScaling::Factors(vec![1.0])),
        ];
        for (what, spoil) in spoilt {
            let mut config = tiny();
            spoil(&mut config);
            let message = config.validate().expect_err(what).to_string();
            assert!(message.starts_with(what), "{message} should name {what}");
        }
    }
}

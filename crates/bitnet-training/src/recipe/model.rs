//! The shape of a new model: a preset, single numbers, or both.
//!
//! Presets have widths that are multiples of 256 and heads of 64, so that every ternary packing holds
//! them.

use bitnet_quant::config::{Architecture, HiddenAct, ModelConfig, RopeScaling};
use serde::{Deserialize, Serialize};

use crate::error::{Error, Result};

/// The shape of a new model. What is not given comes from the preset.
#[derive(Debug, Clone, PartialEq, Default, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct ModelRecipe {
    /// Names a member of [`PRESETS`].
    #[serde(skip_serializing_if = "Option::is_none")]
    pub preset: Option<String>,
    /// `bitnet` (with sub-norms) or `llama`.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub family: Option<Family>,
    /// Size of the vocabulary: of the tokenizer that is trained, or what a given one must not exceed.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub vocab_size: Option<usize>,
    /// Features of the residual stream.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub hidden_size: Option<usize>,
    /// Features between gate/up and down.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub intermediate_size: Option<usize>,
    /// Layers.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub num_hidden_layers: Option<usize>,
    /// Query heads.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub num_attention_heads: Option<usize>,
    /// Key/value heads.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub num_key_value_heads: Option<usize>,
    /// `relu2` or `silu`.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub hidden_act: Option<String>,
    /// Whether the head is the embedding table.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub tie_word_embeddings: Option<bool>,
    /// Base of the rotary frequencies.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub rope_theta: Option<f64>,
    /// Longest context the model says it has; at least the window it is trained with.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub max_position_embeddings: Option<usize>,
}

/// Families that can be trained.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Family {
    /// BitNet b1.58: sub-norms; relu² unless said otherwise.
    Bitnet,
    /// Llama; SiLU unless said otherwise.
    Llama,
}

/// A sensible size.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Preset {
    /// How it is asked for: its ternary weights.
    pub name: &'static str,
    /// Features of the residual stream.
    pub hidden_size: usize,
    /// Features between gate/up and down.
    pub intermediate_size: usize,
    /// Layers.
    pub num_hidden_layers: usize,
    /// Query heads, of 64 features.
    pub num_attention_heads: usize,
    /// Key/value heads.
    pub num_key_value_heads: usize,
    /// Vocabulary of the tokenizer that suits it.
    pub vocab_size: usize,
}

/// Sizes with names, by ternary weights.
pub const PRESETS: [Preset; 6] = [
    preset("1m", 256, 512, 2, 4, 2, 2048),
    preset("3m", 256, 768, 4, 4, 2, 4096),
    preset("6m", 256, 1024, 6, 4, 2, 4096),
    preset("19m", 512, 1536, 6, 8, 4, 8192),
    preset("31m", 512, 2048, 8, 8, 4, 8192),
    preset("85m", 768, 2048, 14, 12, 6, 16384),
];

const fn preset(
    name: &'static str,
    hidden_size: usize,
    intermediate_size: usize,
    num_hidden_layers: usize,
    num_attention_heads: usize,
    num_key_value_heads: usize,
    vocab_size: usize,
) -> Preset {
    Preset {
        name,
        hidden_size,
        intermediate_size,
        num_hidden_layers,
        num_attention_heads,
        num_key_value_heads,
        vocab_size,
    }
}

impl ModelRecipe {
    /// The preset asked for, or the one that fills what is not given.
    fn preset(&self) -> Result<Preset> {
        let name = self.preset.as_deref().unwrap_or("3m");
        PRESETS.into_iter().find(|preset| preset.name == name).ok_or_else(|| {
            let names: Vec<&str> = PRESETS.iter().map(|preset| preset.name).collect();
            Error::setting("model.preset", format!("one of {}", names.join(", ")), name)
        })
    }

    /// The vocabulary a new tokenizer gets.
    ///
    /// # Errors
    /// A preset that is not known.
    pub fn vocab_size(&self) -> Result<usize> {
        Ok(self.vocab_size.unwrap_or(self.preset()?.vocab_size))
    }

    /// The configuration of a new model for a tokenizer with `vocab_size` tokens, trained with windows
    /// of `window`.
    ///
    /// # Errors
    /// Numbers that make no decoder, named.
    pub fn config(&self, name: &str, vocab_size: usize, window: usize) -> Result<ModelConfig> {
        let preset = self.preset()?;
        let family = self.family.unwrap_or(Family::Bitnet);
        if let Some(asked) = self.vocab_size
            && asked < vocab_size
        {
            let expected = format!("at least the {vocab_size} tokens of the tokenizer");
            return Err(Error::setting("model.vocab_size", expected, asked));
        }
        let heads = self.num_attention_heads.unwrap_or(preset.num_attention_heads);
        let hidden_size = self.hidden_size.unwrap_or(preset.hidden_size);
        if heads == 0 || !hidden_size.is_multiple_of(heads) {
            let expected = format!("a divisor of hidden_size {hidden_size}");
            return Err(Error::setting("model.num_attention_heads", expected, heads));
        }
        let positions = self.max_position_embeddings.unwrap_or(window.max(1024));
        if positions < window {
            let expected = format!("at least the window, {window}");
            return Err(Error::setting("model.max_position_embeddings", expected, positions));
        }
        let hidden_act = match (self.hidden_act.as_deref(), family) {
            (Some("relu2"), _) | (None, Family::Bitnet) => HiddenAct::Relu2,
            (Some("silu"), _) | (None, Family::Llama) => HiddenAct::Silu,
            (Some(other), _) => {
                return Err(Error::setting("model.hidden_act", "relu2 or silu", other));
            }
        };
        let config = ModelConfig {
            architecture: match family {
                Family::Bitnet => Architecture::Bitnet,
                Family::Llama => Architecture::Llama,
            },
            name: name.to_owned(),
            hidden_size,
            intermediate_size: self.intermediate_size.unwrap_or(preset.intermediate_size),
            num_hidden_layers: self.num_hidden_layers.unwrap_or(preset.num_hidden_layers),
            num_attention_heads: heads,
            num_key_value_heads: self.num_key_value_heads.unwrap_or(preset.num_key_value_heads),
            head_dim: hidden_size / heads,
            vocab_size: self.vocab_size.unwrap_or(vocab_size),
            max_position_embeddings: positions,
            rms_norm_eps: 1e-5,
            rope_theta: self.rope_theta.unwrap_or(10_000.0),
            rope_scaling: RopeScaling::None,
            hidden_act,
            tie_word_embeddings: self.tie_word_embeddings.unwrap_or(true),
            sub_norms: family == Family::Bitnet,
            qk_norm: false,
            projection_norm_eps: None,
            attention_bias: false,
        };
        config.validate()?;
        if !config.hidden_size.is_multiple_of(4) || !config.intermediate_size.is_multiple_of(4) {
            let got = format!("{} and {}", config.hidden_size, config.intermediate_size);
            let expected = "multiples of 4, as packed files need";
            return Err(Error::setting("model.hidden_size, intermediate_size", expected, got));
        }
        Ok(config)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::model::{Model, ParameterKind, Precision};

    #[test]
    fn presets_have_the_ternary_weights_of_their_names() {
        for preset in PRESETS {
            let recipe = ModelRecipe { preset: Some(preset.name.into()), ..Default::default() };
            let config = recipe.config("m", 300, 256).unwrap();
            assert!(config.hidden_size.is_multiple_of(256));
            assert!(config.intermediate_size.is_multiple_of(256));
            assert_eq!(config.head_dim, 64);
            if preset.hidden_size > 256 {
                continue; // enough to count the small ones
            }
            let model = Model::new(config, Precision::Ternary, 0).unwrap();
            let ternary: usize = model
                .named_parameters()
                .filter(|(p, _)| p.kind == ParameterKind::Projection)
                .map(|(_, values)| values.len())
                .sum();
            let millions = (ternary as f64 / 1e6).round();
            assert_eq!(format!("{millions}m"), preset.name);
        }
    }

    #[test]
    fn nonsense_is_named() {
        let recipe = ModelRecipe::default();
        for (recipe, expected) in [
            (ModelRecipe { preset: Some("7b".into()), ..recipe.clone() }, "one of 1m, 3m"),
            (ModelRecipe { num_attention_heads: Some(3), ..recipe.clone() }, "num_attention_heads"),
            (ModelRecipe { hidden_act: Some("gelu".into()), ..recipe.clone() }, "relu2 or silu"),
            (ModelRecipe { vocab_size: Some(9), ..recipe.clone() }, "at least the 300 tokens"),
            (ModelRecipe { max_position_embeddings: Some(9), ..recipe.clone() }, "the window, 256"),
            (ModelRecipe { num_key_value_heads: Some(3), ..recipe.clone() }, "num_key_value_heads"),
            (ModelRecipe { intermediate_size: Some(0), ..recipe.clone() }, "intermediate_size"),
        ] {
            let error = recipe.config("m", 300, 256).unwrap_err().to_string();
            assert!(error.contains(expected), "{error} should say {expected}");
        }
    }
}

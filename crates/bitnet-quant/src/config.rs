//! The hyper-parameters of a decoder, under the names Hugging Face checkpoints use, whatever file
//! they came from. Knows no tensors and no kernels.

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

/// Context extension of the rotary embedding.
#[derive(Debug, Clone, PartialEq)]
pub enum RopeScaling {
    /// Frequencies as `rope_theta` gives them.
    None,
    /// Positions divided by `factor`.
    Linear {
        /// The divisor.
        factor: f64,
    },
    /// Llama 3.1: low frequencies divided by `factor`, a smooth passage between.
    Llama3 {
        /// Divisor of the low frequencies.
        factor: f64,
        /// Wavelengths above `original / low_freq_factor` are divided.
        low_freq_factor: f64,
        /// Wavelengths below `original / high_freq_factor` are kept.
        high_freq_factor: f64,
        /// Context the model was trained with first.
        original_max_position_embeddings: usize,
    },
    /// A divisor for each frequency, as GGUF files store it (`rope_freqs.weight`).
    Factors(Vec<f32>),
}

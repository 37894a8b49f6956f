//! Models of a known shape with random weights: speed and memory can be measured without a file.
//!
//! Rows are computed when they are asked for, from a seed and their own name, so the same shape is
//! the same model everywhere and the only full copy of it is the one on the device. Such a model
//! computes numbers like a trained one (its activations keep their size from layer to layer) and
//! says nothing.

mod gguf;

use std::str::FromStr;
use std::sync::Arc;

use bitnet_core::weights::{
    ActivationQuant, FloatRows, FloatType, LinearWeights, Matrix, NormWeights, Scales, TernaryRows,
};
use bitnet_quant::config::{Architecture, HiddenAct, ModelConfig, RopeScaling};
use bitnet_quant::text::TextAssets;
use bytes::Bytes;

use crate::error::{InferenceError, Result};
use crate::source::WeightSource;

/// Shapes of published models.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum SyntheticShape {
    /// `bitnet_b1_58-large`: 0.7 B parameters.
    Bitnet0_7B,
    /// BitNet b1.58 2B4T: 2.4 B parameters.
    Bitnet2B4T,
    /// `bitnet_b1_58-3B`: 3.3 B parameters.
    Bitnet3B,
    /// Llama 3 8B with ternary projections: 8 B parameters, a head of its own.
    Llama8B,
}

impl SyntheticShape {
    /// Every shape with the name it is asked for by.
    pub const ALL: [(&'static str, Self); 4] = [
        ("0.7b", Self::Bitnet0_7B),
        ("2b4t", Self::Bitnet2B4T),
        ("3b", Self::Bitnet3B),
        ("8b", Self::Llama8B),
    ];

    /// The name it is asked for by.
    pub fn name(self) -> &'static str {
        Self::ALL.iter().find(|(_, shape)| *shape == self).map_or("", |(name, _)| name)
    }

    /// Its hyper-parameters.
    pub fn config(self) -> ModelConfig {
        let base = ModelConfig {
            architecture: Architecture::Bitnet,
            name: format!("synthetic {}", self.name()),
            hidden_size: 2560,
            intermediate_size: 6912,
            num_hidden_layers: 30,
            num_attention_heads: 20,
            num_key_value_heads: 5,
            head_dim: 128,
            vocab_size: 128_256,
            max_position_embeddings: 4096,
            rms_norm_eps: 1e-5,
            rope_theta: 500_000.0,
            rope_scaling: RopeScaling::None,
            hidden_act: HiddenAct::Relu2,
            tie_word_embeddings: true,
            sub_norms: true,
            qk_norm: false,
            projection_norm_eps: None,
            attention_bias: false,
        };
        let first_bitnet = ModelConfig {
            vocab_size: 32_002,
            max_position_embeddings: 2048,
            rope_theta: 10_000.0,
            hidden_act: HiddenAct::Silu,
            ..base.clone()
        };
        match self {
            Self::Bitnet2B4T => base,
            Self::Bitnet0_7B => ModelConfig {
                hidden_size: 1536,
                intermediate_size: 4096,
                num_hidden_layers: 24,
                num_attention_heads: 16,
                num_key_value_heads: 16,
                head_dim: 96,
                ..first_bitnet
            },
            Self::Bitnet3B => ModelConfig {
                hidden_size: 3200,
                intermediate_size: 8640,
                num_hidden_layers: 26,
                num_attention_heads: 32,
                num_key_value_heads: 32,
                head_dim: 100,
                ..first_bitnet
            },
            Self::Llama8B => ModelConfig {
                architecture: Architecture::Llama,
                hidden_size: 4096,
                intermediate_size: 14_336,
                num_hidden_layers: 32,
                num_attention_heads: 32,
                num_key_value_heads: 8,
                max_position_embeddings: 8192,
                hidden_act: HiddenAct::Silu,
                tie_word_embeddings: false,
                sub_norms: false,
                ..base
            },
        }
    }
}

impl FromStr for SyntheticShape {
    type Err = InferenceError;

    fn from_str(name: &str) -> Result<Self> {
        let found = Self::ALL.iter().find(|(known, _)| *known == name);
        found.map(|(_, shape)| *shape).ok_or_else(|| {
            let names: Vec<_> = Self::ALL.iter().map(|(name, _)| *name).collect();
            InferenceError::input("synthetic shape", names.join(", "), name)
        })
    }
}

/// A model with random weights.
#[derive(Debug, Clone)]
pub struct SyntheticModel {
    config: ModelConfig,
    seed: u64,
    text: TextAssets,
}

impl SyntheticModel {
    /// A model of these hyper-parameters. The same configuration and seed give the same weights.
    pub fn new(config: ModelConfig, seed: u64) -> Self {
        Self { config, seed, text: TextAssets::default() }
    }

    /// Rows and columns of the projection or table with this canonical name.
    fn shape(&self, name: &str) -> Option<(usize, usize)> {
        let c = &self.config;
        let (q_width, kv_width) =
            (c.num_attention_heads * c.head_dim, c.num_key_value_heads * c.head_dim);
        let (parent, part) = name.rsplit_once('.').unwrap_or(("", name));
        let in_layer = parent.starts_with("model.layers.");
        Some(match part {
            "q_proj" if in_layer => (q_width, c.hidden_size),
            "k_proj" | "v_proj" if in_layer => (kv_width, c.hidden_size),
            "o_proj" if in_layer => (c.hidden_size, q_width),
            "gate_proj" | "up_proj" if in_layer => (c.intermediate_size, c.hidden_size),
            "down_proj" if in_layer => (c.hidden_size, c.intermediate_size),
            "embed_tokens" => (c.vocab_size, c.hidden_size),
            "lm_head" if !c.tie_word_embeddings => (c.vocab_size, c.hidden_size),
            _ => return None,
        })
    }

    fn norm_width(&self, name: &str) -> Option<usize> {
        let c = &self.config;
        Some(match name.rsplit_once('.').map_or(name, |(_, part)| part) {
            "input_layernorm" | "post_attention_layernorm" | "norm" => c.hidden_size,
            "attn_sub_norm" if c.sub_norms => c.num_attention_heads * c.head_dim,
            "ffn_sub_norm" if c.sub_norms => c.intermediate_size,
            "q_norm" | "k_norm" if c.qk_norm => c.head_dim,
            _ => return None,
        })
    }

    fn lacks(&self, name: &str) -> InferenceError {
        InferenceError::model_lacks(&self.config.name, format!("its shape has no {name}"))
    }

    fn seed_of(&self, name: &str) -> u64 {
        name.bytes().fold(mix(self.seed), |hash, byte| mix(hash ^ u64::from(byte)))
    }
}

impl WeightSource for SyntheticModel {
    fn config(&self) -> &ModelConfig {
        &self.config
    }

    fn linear(&self, name: &str) -> Result<LinearWeights> {
        let (rows, cols) = self.shape(name).ok_or_else(|| self.lacks(name))?;
        let weights = Arc::new(RandomTrits::new(rows, cols, self.seed_of(name)));
        let matrix = Matrix::Ternary { weights, activations: ActivationQuant::PerToken };
        let norm = |eps| NormWeights { weight: vec![1.0; cols], eps };
        Ok(LinearWeights {
            matrix,
            bias: None,
            input_norm: self.config.projection_norm_eps.map(norm),
        })
    }

    fn norm(&self, name: &str) -> Result<NormWeights> {
        let width = self.norm_width(name).ok_or_else(|| self.lacks(name))?;
        Ok(NormWeights { weight: vec![1.0; width], eps: self.config.rms_norm_eps })
    }

    fn table(&self, name: &str) -> Result<Arc<dyn FloatRows>> {
        let (rows, cols) = self.shape(name).ok_or_else(|| self.lacks(name))?;
        Ok(Arc::new(RandomHalves { rows, cols, seed: self.seed_of(name) }))
    }

    fn total_weight_count(&self) -> u64 {
        let c = &self.config;
        let count = |name: &str| self.shape(name).map_or(0, |(rows, cols)| (rows * cols) as u64);
        let norm = |name: &str| self.norm_width(name).unwrap_or(0) as u64;
        let parts = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"];
        let projections: u64 =
            parts.iter().map(|part| count(&format!("model.layers.0.{part}"))).sum();
        let names =
            ["input_layernorm", "post_attention_layernorm", "attn_sub_norm", "ffn_sub_norm"];
        let norms: u64 = names.iter().chain(&["q_norm", "k_norm"]).map(|name| norm(name)).sum();
        let layers = c.num_hidden_layers as u64 * (projections + norms);
        layers + norm("norm") + count("model.embed_tokens") + count("lm_head")
    }

    fn text(&self) -> &TextAssets {
        &self.text
    }
}

/// One round of splitmix64: a good 64-bit hash of a counter.
fn mix(x: u64) -> u64 {
    let x = x.wrapping_add(0x9e37_79b9_7f4a_7c15);
    let x = (x ^ (x >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    let x = (x ^ (x >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    x ^ (x >> 31)
}

/// Five codes for each value of a random byte: 3⁵ = 243 outcomes, nearly uniform over 256.
const FIVE_CODES: [[u8; 5]; 256] = {
    let mut table = [[0; 5]; 256];
    let mut byte = 0;
    while byte < 256 {
        let mut digits = byte * 243 / 256;
        let mut i = 0;
        while i < 5 {
            table[byte][i] = (digits % 3) as u8;
            digits /= 3;
            i += 1;
        }
        byte += 1;
    }
    table
};

/// A ternary matrix with a third of its weights each −1, 0 and +1.
struct RandomTrits {
    rows: usize,
    cols: usize,
    seed: u64,
    scales: Scales,
}

impl RandomTrits {
    fn new(rows: usize, cols: usize, seed: u64) -> Self {
        // Two thirds of the weights count, so outputs are as large as inputs. Eleven significant
        // bits, as many as half precision keeps: packings with such scales change nothing.
        let scale = f32::from_bits((1.5 / cols as f32).sqrt().to_bits() & !0x1fff);
        Self { rows, cols, seed, scales: Scales::Tensor(scale) }
    }
}

impl TernaryRows for RandomTrits {
    fn rows(&self) -> usize {
        self.rows
    }

    fn cols(&self) -> usize {
        self.cols
    }

    fn scales(&self) -> &Scales {
        &self.scales
    }

    fn decode_row(&self, row: usize, out: &mut [u8]) {
        let start = mix(self.seed ^ row as u64);
        let (fives, rest) = out.as_chunks_mut::<5>();
        let codes = |random: u64, i: usize| FIVE_CODES[usize::from(random.to_le_bytes()[i])];
        for (i, fives) in fives.chunks_mut(8).enumerate() {
            let random = mix(start.wrapping_add(i as u64));
            for (j, five) in fives.iter_mut().enumerate() {
                *five = codes(random, j);
            }
        }
        rest.copy_from_slice(&codes(mix(!start), 0)[..rest.len()]);
    }
}

/// A half-precision table of numbers between 2⁻⁷ and 2⁻³ in size, either sign.
struct RandomHalves {
    rows: usize,
    cols: usize,
    seed: u64,
}

impl RandomHalves {
    /// The bits of the numbers of a row.
    fn bits(&self, row: usize) -> impl Iterator<Item = u16> {
        let start = mix(self.seed ^ row as u64);
        let words = (0..self.cols.div_ceil(4) as u64).map(move |i| mix(start.wrapping_add(i)));
        let numbers = words.flat_map(|word| [word, word >> 16, word >> 32, word >> 48]);
        // Sign, a biased exponent of 8 to 11, ten bits of fraction.
        numbers.map(|random| (random as u16 & 0x8fff) + 0x2000).take(self.cols)
    }
}

impl FloatRows for RandomHalves {
    fn rows(&self) -> usize {
        self.rows
    }

    fn cols(&self) -> usize {
        self.cols
    }

    fn decode_row(&self, row: usize, out: &mut [f32]) {
        for (out, bits) in out.iter_mut().zip(self.bits(row)) {
            let magnitude = f32::from_bits((u32::from(bits & 0x7fff) << 13) + ((127 - 15) << 23));
            *out = if bits & 0x8000 == 0 { magnitude } else { -magnitude };
        }
    }

    fn raw(&self) -> Option<(FloatType, Bytes)> {
        let mut bytes = Vec::with_capacity(self.rows * self.cols * 2);
        for row in 0..self.rows {
            bytes.extend(self.bits(row).flat_map(u16::to_le_bytes));
        }
        Some((FloatType::F16, bytes.into()))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn shapes_have_the_published_parameter_counts() {
        let count =
            |shape: SyntheticShape| SyntheticModel::new(shape.config(), 0).total_weight_count();
        // Seven projections, the tied table, and the norms, from the published configurations.
        let ternary = 30 * (2 * 2560 * 2560 + 2 * 640 * 2560 + 3 * 6912 * 2560);
        assert_eq!(ternary, 2_084_044_800);
        let norms = 30 * (3 * 2560 + 6912) + 2560;
        assert_eq!(count(SyntheticShape::Bitnet2B4T), ternary + 128_256 * 2560 + norms);
        assert_eq!(count(SyntheticShape::Bitnet0_7B) / 1_000_000, 728);
        assert_eq!(count(SyntheticShape::Bitnet3B) / 1_000_000, 3324);
        assert_eq!(count(SyntheticShape::Llama8B) / 1_000_000, 8030);
    }

    #[test]
    fn trits_are_balanced_and_the_same_every_time() {
        let matrix = RandomTrits::new(64, 1003, 7);
        let mut counts = [0usize; 3];
        let mut codes = vec![9; 1003];
        for row in 0..64 {
            matrix.decode_row(row, &mut codes);
            codes.iter().for_each(|&code| counts[usize::from(code)] += 1);
        }
        // 64,192 draws: the deviation of a third is about 120.
        assert!(counts.iter().all(|&n| n.abs_diff(64_192 / 3) < 1000), "{counts:?}");
        let mut again = vec![9; 1003];
        matrix.decode_row(63, &mut again);
        assert_eq!(codes, again);
        matrix.decode_row(62, &mut again);
        assert_ne!(codes, again);
    }

    #[test]
    fn table_rows_are_the_numbers_of_its_raw_bytes() {
        let table = RandomHalves { rows: 3, cols: 10, seed: 1 };
        let (dtype, bytes) = table.raw().expect("tables are stored");
        assert_eq!(dtype, FloatType::F16);
        let mut row = vec![0.0; 10];
        for i in 0..3 {
            table.decode_row(i, &mut row);
            for (j, x) in row.iter().enumerate() {
                let at = (i * 10 + j) * 2;
                let half = u16::from_le_bytes([bytes[at], bytes[at + 1]]);
                assert!((0.0078125..0.125).contains(&x.abs()), "{x}");
                // 10 fraction bits, exponent bias 15.
                let exponent = i32::from(half >> 10 & 31) - 15;
                let fraction = 1.0 + f64::from(half & 1023) / 1024.0;
                let sign = if half >> 15 == 0 { 1.0 } else { -1.0 };
                assert_eq!(f64::from(*x), sign * fraction * 2f64.powi(exponent));
            }
        }
    }

    #[test]
    fn an_unknown_shape_names_the_known_ones() {
        let error = "7b".parse::<SyntheticShape>().unwrap_err().to_string();
        assert!(error.contains("2b4t") && error.contains("7b"), "{error}");
    }
}

//! The whole flow on one page: file → model → tokens → ternary products → sampler → text.
//!
//! No batching, no cache of anything but keys and values, no threads, no vector instructions: plain
//! loops that say what the engine computes. A test asserts that the engine yields the same tokens.
//!
//! `cargo run --release --example one_page -p bitnet-inference -- [MODEL [PROMPT]]`

use bitnet_core::cpu::math::{dot, exp, max_abs, relu2, rms_norm, round_even, silu};
use bitnet_core::weights::{FloatRows, LinearWeights, Matrix, NormWeights, Scales};
use bitnet_inference::builtin;
use bitnet_inference::tokenizer::{EncodeOptions, Tokenizer};
use bitnet_quant::checkpoint::Checkpoint;
use bitnet_quant::config::HiddenAct;

type Result<T> = std::result::Result<T, Box<dyn std::error::Error>>;

fn main() -> Result<()> {
    let mut arguments = std::env::args().skip(1);
    let checkpoint = match arguments.next() {
        Some(path) if path != "builtin" => Checkpoint::open(path)?,
        _ => builtin::checkpoint()?,
    };
    let prompt = arguments.next().unwrap_or("Once upon a time".into());
    let tokenizer = Tokenizer::from_assets(checkpoint.text())?;
    let tokens = greedy(&checkpoint, tokenizer.encode(&prompt, EncodeOptions::PROMPT)?, 40)?;
    println!("{}", tokenizer.decode(&tokens, false));
    Ok(())
}

/// Continues `tokens` by `n_new` tokens, always the likeliest one.
pub fn greedy(checkpoint: &Checkpoint, mut tokens: Vec<u32>, n_new: usize) -> Result<Vec<u32>> {
    let mut model = Model::load(checkpoint)?;
    let n_total = tokens.len() + n_new;
    let mut position = 0;
    while tokens.len() < n_total {
        let logits = model.forward(tokens[position], position)?;
        position += 1;
        if position == tokens.len() {
            let best = (0..logits.len()).rev().max_by(|&a, &b| logits[a].total_cmp(&logits[b]));
            tokens.push(best.expect("a vocabulary is not empty") as u32);
        }
    }
    Ok(tokens)
}

struct Model<'a> {
    checkpoint: &'a Checkpoint,
    layers: Vec<Layer>,
    embedding: std::sync::Arc<dyn FloatRows>, // (vocab, hidden)
    norm: NormWeights,                        // hidden
    inv_freq: Vec<f32>,                       // head_dim / 2
}

struct Layer {
    input_norm: NormWeights,
    qkv: [LinearWeights; 3], // (heads * head_dim, hidden)
    attn_sub_norm: NormWeights,
    o_proj: LinearWeights, // (hidden, heads * head_dim)
    post_attention_norm: NormWeights,
    gate_up: [LinearWeights; 2], // (intermediate, hidden)
    ffn_sub_norm: NormWeights,
    down_proj: LinearWeights, // (hidden, intermediate)
    keys: Vec<Vec<f32>>,      // one entry of kv_heads * head_dim for each position
    values: Vec<Vec<f32>>,
}

impl<'a> Model<'a> {
    fn load(checkpoint: &'a Checkpoint) -> Result<Self> {
        let config = checkpoint.config();
        if !config.sub_norms || !config.tie_word_embeddings {
            return Err("this page shows BitNet models with a tied head".into());
        }
        let mut layers = Vec::new();
        for i in 0..config.num_hidden_layers {
            let linear = |name: &str| checkpoint.linear(&format!("model.layers.{i}.{name}"));
            let norm = |name: &str| checkpoint.norm(&format!("model.layers.{i}.{name}"));
            layers.push(Layer {
                input_norm: norm("input_layernorm")?,
                qkv: [
                    linear("self_attn.q_proj")?,
                    linear("self_attn.k_proj")?,
                    linear("self_attn.v_proj")?,
                ],
                attn_sub_norm: norm("self_attn.attn_sub_norm")?,
                o_proj: linear("self_attn.o_proj")?,
                post_attention_norm: norm("post_attention_layernorm")?,
                gate_up: [linear("mlp.gate_proj")?, linear("mlp.up_proj")?],
                ffn_sub_norm: norm("mlp.ffn_sub_norm")?,
                down_proj: linear("mlp.down_proj")?,
                keys: Vec::new(),
                values: Vec::new(),
            });
        }
        Ok(Self {
            checkpoint,
            layers,
            embedding: checkpoint.table("model.embed_tokens")?,
            norm: checkpoint.norm("model.norm")?,
            inv_freq: config.rope_frequencies(),
        })
    }

    /// The logits after `token` at `position`; its keys and values join the cache.
    fn forward(&mut self, token: u32, position: usize) -> Result<Vec<f32>> {
        let config = self.checkpoint.config();
        let (head_dim, n_heads) = (config.head_dim, config.num_attention_heads);
        let group = n_heads / config.num_key_value_heads; // query heads that share a key head
        let mut x = vec![0.0; config.hidden_size];
        self.embedding.decode_row(token as usize, &mut x);

        for layer in &mut self.layers {
            let h = normed(&x, &layer.input_norm);
            let [mut q, mut k, v] = layer.qkv.each_ref().map(|proj| bit_linear(proj, &h));
            for head in q.chunks_exact_mut(head_dim).chain(k.chunks_exact_mut(head_dim)) {
                rotate(head, position, &self.inv_freq);
            }
            layer.keys.push(k);
            layer.values.push(v);

            let mut attention = vec![0.0; n_heads * head_dim];
            for (head_idx, out) in attention.chunks_exact_mut(head_dim).enumerate() {
                let q = &q[head_idx * head_dim..][..head_dim];
                let kv = head_idx / group * head_dim..(head_idx / group + 1) * head_dim;
                let scale = 1.0 / (head_dim as f32).sqrt();
                let scores = layer.keys.iter().map(|k| dot(q, &k[kv.clone()]) * scale);
                let scores: Vec<f32> = scores.collect();
                let max = scores.iter().copied().fold(f32::NEG_INFINITY, f32::max);
                let weights: Vec<f32> = scores.iter().map(|s| exp(s - max)).collect();
                let total: f32 = weights.iter().sum();
                for (weight, value) in weights.iter().zip(&layer.values) {
                    for (out, value) in out.iter_mut().zip(&value[kv.clone()]) {
                        *out += weight / total * value;
                    }
                }
            }
            let h = normed(&attention, &layer.attn_sub_norm);
            add(&mut x, &bit_linear(&layer.o_proj, &h));

            let h = normed(&x, &layer.post_attention_norm);
            let [gate, up] = layer.gate_up.each_ref().map(|proj| bit_linear(proj, &h));
            let activation = if config.hidden_act == HiddenAct::Relu2 { relu2 } else { silu };
            let h: Vec<f32> = gate.iter().zip(&up).map(|(g, u)| activation(*g) * u).collect();
            let h = normed(&h, &layer.ffn_sub_norm);
            add(&mut x, &bit_linear(&layer.down_proj, &h));
        }

        let h = normed(&x, &self.norm);
        let mut row = vec![0.0; config.hidden_size];
        let logit = |id: usize| {
            self.embedding.decode_row(id, &mut row);
            dot(&row, &h)
        };
        Ok((0..config.vocab_size).map(logit).collect())
    }
}

/// `y = W · x` with ternary `W` and `x` rounded to 8 bits: the sum is one of integers.
fn bit_linear(projection: &LinearWeights, x: &[f32]) -> Vec<f32> {
    let Matrix::Ternary { weights, .. } = &projection.matrix else {
        panic!("this page shows ternary projections");
    };
    let Scales::Tensor(weight_scale) = *weights.scales() else {
        panic!("this page shows one scale for each matrix");
    };
    let max = max_abs(x).max(1e-5);
    let quantize = |x: &f32| round_even(x * (127.0 / max)).clamp(-128.0, 127.0) as i32;
    let q: Vec<i32> = x.iter().map(quantize).collect();
    let mut codes = vec![0u8; weights.cols()];
    let row = |row: usize| {
        weights.decode_row(row, &mut codes);
        let sum: i32 = codes.iter().zip(&q).map(|(&code, q)| (i32::from(code) - 1) * q).sum();
        sum as f32 * (weight_scale * (max / 127.0))
    };
    (0..weights.rows()).map(row).collect()
}

fn normed(x: &[f32], norm: &NormWeights) -> Vec<f32> {
    let mut out = vec![0.0; x.len()];
    rms_norm(x, &norm.weight, norm.eps, &mut out);
    out
}

/// Turns each pair `(i, i + head_dim/2)` by `position · inv_freq[i]`.
fn rotate(head: &mut [f32], position: usize, inv_freq: &[f32]) {
    let (first, second) = head.split_at_mut(inv_freq.len());
    for ((a, b), freq) in first.iter_mut().zip(second).zip(inv_freq) {
        let angle = position as f64 * f64::from(*freq);
        let (sin, cos) = (libm::sin(angle) as f32, libm::cos(angle) as f32);
        (*a, *b) = (*a * cos - *b * sin, *b * cos + *a * sin);
    }
}

fn add(x: &mut [f32], y: &[f32]) {
    for (x, y) in x.iter_mut().zip(y) {
        *x += y;
    }
}

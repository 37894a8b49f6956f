//! The transformer all families share: what a step of the model is.
//!
//! One decoder serves `bitnet`, `llama` and `qwen3`; they differ in optional parts, which the
//! checkpoint's configuration turns on. This file is wiring: it names the operations of a step in
//! the order of the data and leaves every element loop to the [`Backend`]. Knows no text, no
//! scheduling and no file formats.

use bitnet_core::backend::{
    Activation, Backend, Batch, DeviceInfo, KvSpec, MemoryUsage, RopeSpec, TableRole,
};
use bitnet_core::weights::{LinearWeights, Matrix};
use bitnet_quant::config::{HiddenAct, ModelConfig};

use crate::backend::{InferenceBackend, StepCost};
use crate::error::{InferenceError, Result};
use crate::source::WeightSource;

/// A decoder on a device, with its KV cache and the activations of one step.
pub struct Decoder<B: Backend> {
    backend: B,
    activation: Activation,
    embedding: B::Table, // (vocab_size, hidden_size)
    layers: Vec<Layer<B>>,
    norm: B::Norm,
    head: Option<B::Table>, // (vocab_size, hidden_size); None: the embedding serves
    rope: B::Rope,
    kv: B::Kv,
    kv_spec: KvSpec,
    step: StepBuffers<B>,
    cost: StepCost,
}

/// One transformer block.
struct Layer<B: Backend> {
    input_norm: B::Norm,
    q_proj: B::Linear,                      // (n_heads * head_dim, hidden)
    k_proj: B::Linear,                      // (n_kv_heads * head_dim, hidden)
    v_proj: B::Linear,                      // (n_kv_heads * head_dim, hidden)
    head_norms: Option<(B::Norm, B::Norm)>, // on q and k, head_dim each
    attn_sub_norm: Option<B::Norm>,         // n_heads * head_dim
    o_proj: B::Linear,                      // (hidden, n_heads * head_dim)
    post_attention_norm: B::Norm,
    gate_proj: B::Linear,          // (intermediate, hidden)
    up_proj: B::Linear,            // (intermediate, hidden)
    ffn_sub_norm: Option<B::Norm>, // intermediate
    down_proj: B::Linear,          // (hidden, intermediate)
}

/// Activations of a step, `(max_tokens, width)` each.
struct StepBuffers<B: Backend> {
    x: B::Buffer,         // residual stream, hidden
    q: B::Buffer,         // n_heads * head_dim
    k: B::Buffer,         // n_kv_heads * head_dim
    v: B::Buffer,         // n_kv_heads * head_dim
    attention: B::Buffer, // n_heads * head_dim
    gated: B::Buffer,     // intermediate
}

impl<B: Backend> Decoder<B> {
    /// Brings a model onto the device; `progress` is called with (layers done, layers).
    pub fn load(
        mut backend: B,
        source: &dyn WeightSource,
        kv_spec: KvSpec,
        max_positions: usize,
        max_step_tokens: usize,
        progress: &mut dyn FnMut(usize, usize),
    ) -> Result<Self> {
        let config = source.config();
        let name = config.name.clone();
        let device = |e| InferenceError::device(&name, e);

        let b = &mut backend;
        let mut cost = StepCost::default();
        let bytes_before = b.memory().weights;
        let mut layers = Vec::with_capacity(config.num_hidden_layers);
        for layer_idx in 0..config.num_hidden_layers {
            let path = format!("model.layers.{layer_idx}");
            let mut linear = |part: &str| -> Result<B::Linear> {
                let weights = source.linear(&format!("{path}.{part}"))?;
                cost.ternary_macs += ternary_weights(&weights);
                b.linear(&weights).map_err(device)
            };
            let (q_proj, k_proj, v_proj) = (
                linear("self_attn.q_proj")?,
                linear("self_attn.k_proj")?,
                linear("self_attn.v_proj")?,
            );
            let o_proj = linear("self_attn.o_proj")?;
            let (gate_proj, up_proj) = (linear("mlp.gate_proj")?, linear("mlp.up_proj")?);
            let down_proj = linear("mlp.down_proj")?;
            let mut norm = |part: &str| -> Result<B::Norm> {
                let weights = source.norm(&format!("{path}.{part}"))?;
                b.norm(&weights).map_err(device)
            };
            layers.push(Layer {
                input_norm: norm("input_layernorm")?,
                q_proj,
                k_proj,
                v_proj,
                head_norms: match config.qk_norm {
                    true => Some((norm("self_attn.q_norm")?, norm("self_attn.k_norm")?)),
                    false => None,
                },
                attn_sub_norm: match config.sub_norms {
                    true => Some(norm("self_attn.attn_sub_norm")?),
                    false => None,
                },
                o_proj,
                post_attention_norm: norm("post_attention_layernorm")?,
                gate_proj,
                up_proj,
                ffn_sub_norm: match config.sub_norms {
                    true => Some(norm("mlp.ffn_sub_norm")?),
                    false => None,
                },
                down_proj,
            });
            progress(layer_idx + 1, config.num_hidden_layers);
        }
        cost.layer_bytes = b.memory().weights - bytes_before;

        let table = |b: &mut B, name: &str, role: TableRole| {
            b.table(source.table(name)?, role).map_err(device)
        };
        let (embedding, head) = match config.tie_word_embeddings {
            true => (table(b, "model.embed_tokens", TableRole::Head)?, None),
            false => (
                table(b, "model.embed_tokens", TableRole::Embedding)?,
                Some(table(b, "lm_head", TableRole::Head)?),
            ),
        };
        let norm = b.norm(&source.norm("model.norm")?).map_err(device)?;
        let rope = RopeSpec {
            inv_freq: config.rope_frequencies(),
            max_positions,
            magnitude: config.rope_attention_factor() as f32,
        };
        let rope = b.rope(&rope).map_err(device)?;
        let kv = b.kv_cache(kv_spec).map_err(device)?;
        let step = StepBuffers::allocate(b, config, max_step_tokens).map_err(device)?;
        let activation = match config.hidden_act {
            HiddenAct::Relu2 => Activation::Relu2,
            HiddenAct::Silu => Activation::Silu,
        };
        Ok(Self {
            backend,
            activation,
            embedding,
            layers,
            norm,
            head,
            rope,
            kv,
            kv_spec,
            step,
            cost,
        })
    }

    /// One step up to the last residual stream. `observe` sees it after the embedding (0) and after
    /// each layer (1, 2, …); it exists for tests and embeddings and is usually empty.
    fn forward(
        &mut self,
        batch: &Batch,
        mut observe: impl FnMut(&mut B, &B::Buffer, usize) -> bitnet_core::Result<()>,
    ) -> bitnet_core::Result<()> {
        let Self { backend: b, step, kv, rope, .. } = self;
        let StepBuffers { x, q, k, v, attention, gated } = step;
        b.begin(batch)?;
        b.embed(&self.embedding, x)?;
        observe(b, x, 0)?;
        for (layer_idx, layer) in self.layers.iter().enumerate() {
            let qkv = [&layer.q_proj, &layer.k_proj, &layer.v_proj];
            b.project(x, Some(&layer.input_norm), &qkv, &mut [q, k, v])?;
            let head_norms = layer.head_norms.as_ref().map(|(q, k)| (q, k));
            b.rotate_and_store(q, k, v, head_norms, rope, kv, layer_idx)?;
            b.attention(q, kv, layer_idx, attention)?;
            b.project_add(attention, layer.attn_sub_norm.as_ref(), &layer.o_proj, x)?;

            let norm = Some(&layer.post_attention_norm);
            b.gated(x, norm, &layer.gate_proj, &layer.up_proj, self.activation, gated)?;
            b.project_add(gated, layer.ffn_sub_norm.as_ref(), &layer.down_proj, x)?;
            observe(b, x, layer_idx + 1)?;
        }
        Ok(())
    }
}

impl<B: Backend> StepBuffers<B> {
    fn allocate(b: &mut B, config: &ModelConfig, max_tokens: usize) -> bitnet_core::Result<Self> {
        let q_width = config.num_attention_heads * config.head_dim;
        let kv_width = config.num_key_value_heads * config.head_dim;
        Ok(Self {
            x: b.buffer(max_tokens, config.hidden_size)?,
            q: b.buffer(max_tokens, q_width)?,
            k: b.buffer(max_tokens, kv_width)?,
            v: b.buffer(max_tokens, kv_width)?,
            attention: b.buffer(max_tokens, q_width)?,
            gated: b.buffer(max_tokens, config.intermediate_size)?,
        })
    }
}

impl<B: Backend> InferenceBackend for Decoder<B> {
    fn execute_batch(&mut self, batch: &Batch, logits: &mut Vec<f32>) -> bitnet_core::Result<()> {
        self.forward(batch, |_, _, _| Ok(()))?;
        logits.clear();
        if !batch.logit_rows.is_empty() {
            let head = self.head.as_ref().unwrap_or(&self.embedding);
            self.backend.logits(&self.step.x, &self.norm, head, logits)?;
        }
        self.backend.finish()
    }

    fn hidden_states(&mut self, batch: &Batch) -> bitnet_core::Result<Vec<Vec<f32>>> {
        let mut states = Vec::with_capacity(self.layers.len() + 1);
        self.forward(batch, |backend, x, _| {
            let mut state = Vec::new();
            backend.read(x, None, &mut state)?;
            states.push(state);
            Ok(())
        })?;
        let last = states.last_mut().expect("the embedding was observed");
        self.backend.read(&self.step.x, Some(&self.norm), last)?;
        self.backend.finish()?;
        Ok(states)
    }

    fn final_states(&mut self, batch: &Batch, states: &mut Vec<f32>) -> bitnet_core::Result<()> {
        self.forward(batch, |_, _, _| Ok(()))?;
        self.backend.read(&self.step.x, Some(&self.norm), states)?;
        self.backend.finish()
    }

    fn kv_spec(&self) -> KvSpec {
        self.kv_spec
    }

    fn step_cost(&self) -> StepCost {
        self.cost
    }

    fn head_bytes(&self, n_best: Option<usize>) -> u64 {
        self.backend.table_bytes(self.head.as_ref().unwrap_or(&self.embedding), n_best)
    }

    fn device(&self) -> DeviceInfo {
        self.backend.device()
    }

    fn get_memory_usage(&self) -> MemoryUsage {
        self.backend.memory()
    }
}

/// Ternary multiply-accumulates of a projection for one token.
fn ternary_weights(linear: &LinearWeights) -> u64 {
    match &linear.matrix {
        Matrix::Ternary { weights, .. } => weights.rows() as u64 * weights.cols() as u64,
        Matrix::Float(_) => 0,
    }
}

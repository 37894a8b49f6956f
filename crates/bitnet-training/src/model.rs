//! The float32 masters of a model: one flat list of numbers, and the name, shape and place of
//! every tensor in it.
//!
//! Names and shapes are those of Hugging Face checkpoints. Tensors that share an input (q, k and v;
//! gate and up) lie one after the other, so that the trainer sees them as one matrix. Knows neither
//! files nor how a step is computed.

use crate::error::{Error, Result};
use crate::linear::MAX_ROWS;
use bitnet_quant::Checkpoint;
use bitnet_quant::config::ModelConfig;
use rand_chacha::ChaCha8Rng;
use rand_chacha::rand_core::{Rng, SeedableRng};
use std::collections::HashMap;
use std::ops::Range;
use std::sync::Arc;

/// How the projections of a model compute.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Precision {
    /// Absmean ternary weights and absmax 8-bit activations, with straight-through gradients.
    Ternary,
    /// Float32: teachers, and models to be distilled.
    Float,
}

/// What a tensor is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum ParameterKind {
    /// Embedding or head, `(vocab_size, hidden_size)`.
    Table,
    /// A matrix that is ternary when the model runs, `(out_features, in_features)`.
    Projection,
    /// The factors of a norm.
    Norm,
}

/// One tensor of a model.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Parameter {
    /// As in a Hugging Face checkpoint: `model.layers.0.self_attn.q_proj.weight`.
    pub name: String,
    /// Outermost first.
    pub shape: Vec<usize>,
    /// What it is.
    pub kind: ParameterKind,
    /// Its numbers in the flat list, row-major.
    pub range: Range<usize>,
}

/// Places of the tensors of one layer.
#[derive(Debug, Clone)]
pub(crate) struct LayerPlaces {
    pub(crate) input_norm: Range<usize>,
    pub(crate) qkv: Range<usize>, // (q + 2 · kv width, hidden)
    pub(crate) attn_sub_norm: Option<Range<usize>>,
    pub(crate) o: Range<usize>, // (hidden, q width)
    pub(crate) post_attention_norm: Range<usize>,
    pub(crate) gate_up: Range<usize>, // (2 · intermediate, hidden)
    pub(crate) ffn_sub_norm: Option<Range<usize>>,
    pub(crate) down: Range<usize>, // (hidden, intermediate)
}

/// Names, shapes and places of all tensors.
#[derive(Debug, Clone)]
pub(crate) struct Places {
    pub(crate) parameters: Vec<Parameter>,
    pub(crate) embedding: Range<usize>,
    pub(crate) layers: Vec<LayerPlaces>,
    pub(crate) norm: Range<usize>,
    /// `None`: the embedding serves.
    pub(crate) head: Option<Range<usize>>,
    pub(crate) len: usize,
}

impl Places {
    fn new(config: &ModelConfig) -> Self {
        let mut parameters: Vec<Parameter> = Vec::new();
        let mut len = 0;
        let mut add = |name: String, shape: &[usize], kind| {
            let range = len..len + shape.iter().product::<usize>();
            len = range.end;
            parameters.push(Parameter {
                name: name + ".weight",
                shape: shape.to_vec(),
                kind,
                range: range.clone(),
            });
            range
        };
        use ParameterKind::{Norm, Projection, Table};
        let (hidden, ffn) = (config.hidden_size, config.intermediate_size);
        let (q_width, kv_width) = (config.query_width(), config.key_width());
        let table = [config.vocab_size, hidden];
        let embedding = add("model.embed_tokens".into(), &table, Table);
        let layers = (0..config.num_hidden_layers)
            .map(|index| {
                let part = |part: &str| format!("model.layers.{index}.{part}");
                let input_norm = add(part("input_layernorm"), &[hidden], Norm);
                let q = add(part("self_attn.q_proj"), &[q_width, hidden], Projection);
                add(part("self_attn.k_proj"), &[kv_width, hidden], Projection);
                let v = add(part("self_attn.v_proj"), &[kv_width, hidden], Projection);
                let sub_norms = config.sub_norms;
                let attn_sub_norm =
                    sub_norms.then(|| add(part("self_attn.attn_sub_norm"), &[q_width], Norm));
                let o = add(part("self_attn.o_proj"), &[hidden, q_width], Projection);
                let post_attention_norm = add(part("post_attention_layernorm"), &[hidden], Norm);
                let gate = add(part("mlp.gate_proj"), &[ffn, hidden], Projection);
                let up = add(part("mlp.up_proj"), &[ffn, hidden], Projection);
                let ffn_sub_norm = sub_norms.then(|| add(part("mlp.ffn_sub_norm"), &[ffn], Norm));
                let down = add(part("mlp.down_proj"), &[hidden, ffn], Projection);
                LayerPlaces {
                    input_norm,
                    qkv: q.start..v.end,
                    attn_sub_norm,
                    o,
                    post_attention_norm,
                    gate_up: gate.start..up.end,
                    ffn_sub_norm,
                    down,
                }
            })
            .collect();
        let norm = add("model.norm".into(), &[hidden], Norm);
        let head = (!config.tie_word_embeddings).then(|| add("lm_head".into(), &table, Table));
        Self { parameters, embedding, layers, norm, head, len }
    }
}

/// A model as it is trained: hyper-parameters and float32 masters.
#[derive(Debug, Clone)]
pub struct Model {
    pub(crate) config: ModelConfig,
    precision: Precision,
    pub(crate) places: Arc<Places>,
    pub(crate) values: Arc<Vec<f32>>,
}

impl Model {
    /// A new model: matrices from a normal distribution, norms 1.
    ///
    /// The standard deviation is 0.02, and 0.02/√(2·layers) for the projections that write to the
    /// residual stream.
    ///
    /// # Errors
    /// [`Error::Quant`] or [`Error::Setting`] for a configuration that cannot be trained: the
    /// families trained here are `bitnet` and `llama`.
    pub fn new(config: ModelConfig, precision: Precision, seed: u64) -> Result<Self> {
        let places = Self::places(&config)?;
        let mut random = Normal { random: ChaCha8Rng::seed_from_u64(seed), second: None };
        let mut values = vec![1.0; places.len];
        let small = 0.02 / (2.0 * config.num_hidden_layers as f64).sqrt();
        for parameter in &places.parameters {
            if parameter.kind == ParameterKind::Norm {
                continue;
            }
            let residual = ["o_proj.weight", "down_proj.weight"];
            let to_residual = residual.iter().any(|end| parameter.name.ends_with(end));
            let deviation = if to_residual { small } else { 0.02 };
            for value in &mut values[parameter.range.clone()] {
                *value = (random.next() * deviation) as f32;
            }
        }
        Ok(Self { config, precision, places: Arc::new(places), values: Arc::new(values) })
    }

    /// A model from tensors by name, each with its shape; what the model has no place for is
    /// ignored.
    ///
    /// # Errors
    /// As [`Model::new`], and [`Error::Tensor`] for one that is missing, misshapen or not finite.
    pub fn from_tensors(
        config: ModelConfig,
        precision: Precision,
        tensors: &HashMap<String, (Vec<usize>, Vec<f32>)>,
    ) -> Result<Self> {
        let places = Self::places(&config)?;
        let mut values = vec![0.0; places.len];
        for parameter in &places.parameters {
            let expected = || format!("shape {:?}", parameter.shape);
            let Some((shape, data)) = tensors.get(&parameter.name) else {
                return Err(Error::tensor(&parameter.name, expected(), "none"));
            };
            if *shape != parameter.shape || data.len() != parameter.range.len() {
                return Err(Error::tensor(&parameter.name, expected(), format!("{shape:?}")));
            }
            if let Some(bad) = data.iter().find(|value| !value.is_finite()) {
                return Err(Error::tensor(&parameter.name, "finite numbers", bad.to_string()));
            }
            values[parameter.range.clone()].copy_from_slice(data);
        }
        Ok(Self { config, precision, places: Arc::new(places), values: Arc::new(values) })
    }

    /// The masters of a checkpoint; packed ternary weights become floats.
    ///
    /// # Errors
    /// As [`Model::from_tensors`].
    pub fn from_checkpoint(checkpoint: &Checkpoint, precision: Precision) -> Result<Self> {
        let config = checkpoint.config().clone();
        let places = Self::places(&config)?;
        let mut tensors = HashMap::new();
        for parameter in &places.parameters {
            let path = parameter.name.trim_end_matches(".weight");
            let data = match parameter.kind {
                ParameterKind::Norm => checkpoint.norm(path)?.weight,
                ParameterKind::Table => decode(&*checkpoint.table(path)?),
                ParameterKind::Projection => {
                    let mut data = decode(&*checkpoint.master(path)?);
                    if precision == Precision::Ternary {
                        keep_scale(&mut data);
                    }
                    data
                }
            };
            tensors.insert(parameter.name.clone(), (parameter.shape.clone(), data));
        }
        Self::from_tensors(config, precision, &tensors)
    }

    fn places(config: &ModelConfig) -> Result<Places> {
        config.validate()?;
        let unsupported = |what: &str| {
            Err(Error::setting(
                "model",
                "the architecture bitnet or llama",
                format!("one with {what}"),
            ))
        };
        if config.qk_norm {
            return unsupported("norms on queries and keys");
        }
        if config.attention_bias {
            return unsupported("biases");
        }
        if config.projection_norm_eps.is_some() {
            return unsupported("norms inside projections");
        }
        let heads = config.num_attention_heads + 2 * config.num_key_value_heads;
        for (what, rows) in [
            ("query, key and value features", heads * config.head_dim),
            ("gate and up features", 2 * config.intermediate_size),
        ] {
            if rows > MAX_ROWS {
                return Err(Error::setting("model", format!("at most {MAX_ROWS} {what}"), rows));
            }
        }
        Ok(Places::new(config))
    }

    /// The hyper-parameters.
    pub fn config(&self) -> &ModelConfig {
        &self.config
    }

    /// How its projections compute.
    pub fn precision(&self) -> Precision {
        self.precision
    }

    /// Every tensor with its numbers, in one fixed order.
    pub fn named_parameters(&self) -> impl Iterator<Item = (&Parameter, &[f32])> {
        self.places.parameters.iter().map(|p| (p, &self.values[p.range.clone()]))
    }

    /// Numbers in all tensors; a tied head counts once.
    pub fn parameter_count(&self) -> usize {
        self.places.len
    }
}

/// Masters from trits: the mean of their magnitudes is to be what one trit was worth, so that
/// quantizing gives the weights they came from. Other masters stay as they are.
fn keep_scale(values: &mut [f32]) {
    let Some(scale) = values.iter().map(|x| x.abs()).find(|&x| x > 0.0) else { return };
    if values.iter().any(|x| x.abs() != scale && *x != 0.0) {
        return;
    }
    let nonzero = values.iter().filter(|&&x| x != 0.0).count();
    let larger = (values.len() as f64 / nonzero as f64) as f32;
    values.iter_mut().for_each(|x| *x *= larger);
}

fn decode(rows: &dyn bitnet_core::weights::FloatRows) -> Vec<f32> {
    let mut out = vec![0.0; rows.rows() * rows.cols()];
    for (row, out) in out.chunks_exact_mut(rows.cols()).enumerate() {
        rows.decode_row(row, out);
    }
    out
}

/// Normally distributed numbers, by the polar method.
struct Normal {
    random: ChaCha8Rng,
    second: Option<f64>,
}

impl Normal {
    fn next(&mut self) -> f64 {
        if let Some(second) = self.second.take() {
            return second;
        }
        loop {
            let mut uniform = || (self.random.next_u64() >> 11) as f64 / (1u64 << 52) as f64 - 1.0;
            let (x, y) = (uniform(), uniform());
            let square = x * x + y * y;
            if square > 0.0 && square < 1.0 {
                let factor = (-2.0 * libm::log(square) / square).sqrt();
                self.second = Some(y * factor);
                return x * factor;
            }
        }
    }
}

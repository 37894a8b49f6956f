//! Which tensors a model has and what shape each must have; and the few settings that only the
//! presence of tensors tells.

use super::Parts;
use crate::config::{Architecture, ModelConfig};
use crate::error::{Error, Result};

/// The projections of a layer.
pub(crate) const PROJECTIONS: [&str; 7] = [
    "self_attn.q_proj",
    "self_attn.k_proj",
    "self_attn.v_proj",
    "self_attn.o_proj",
    "mlp.gate_proj",
    "mlp.up_proj",
    "mlp.down_proj",
];

/// The path of part `part` of layer `layer`.
pub(crate) fn layer(layer: usize, part: &str) -> String {
    format!("model.layers.{layer}.{part}")
}

/// Sets what files do not say outright: optional norms are there if their tensors are.
pub(super) fn complete_config(parts: &mut Parts) -> Result<()> {
    let has = |part: &str| parts.tensors.contains_key(&layer(0, part));
    let config = &mut parts.config;
    config.sub_norms =
        config.architecture == Architecture::Bitnet || has("self_attn.attn_sub_norm.weight");
    config.qk_norm = config.architecture == Architecture::Qwen3 || has("self_attn.q_norm.weight");
    config.attention_bias |= has("self_attn.q_proj.bias");
    config.projection_norm_eps =
        has("self_attn.q_proj.norm.weight").then_some(parts.projection_norm_eps);
    config.validate()
}

/// Checks that every tensor the model needs is there, with its shape, and that no optional tensor
/// that is there has a wrong one.
pub(super) fn check(parts: &Parts) -> Result<()> {
    for (name, shape) in expected(parts) {
        let tensor = parts
            .tensors
            .get(&name)
            .ok_or_else(|| Error::missing(format!("tensor {name}")).in_file(&parts.place))?;
        tensor.check_type().map_err(|e| e.in_file(&tensor.file))?;
        if !tensor.has_shape(&shape) {
            let error = Error::malformed(
                format!("shape of {}", tensor.name),
                format!("{shape:?}"),
                format!("{:?}", tensor.shape),
            );
            return Err(error.in_file(&tensor.file));
        }
    }
    Ok(())
}

/// Canonical names and shapes of all tensors the model uses: `(out, in)` for matrices.
pub(crate) fn expected(parts: &Parts) -> Vec<(String, Vec<usize>)> {
    let config = &parts.config;
    let mut all = vec![
        ("model.embed_tokens.weight".to_owned(), vec![config.vocab_size, config.hidden_size]),
        ("model.norm.weight".to_owned(), vec![config.hidden_size]),
    ];
    if !config.tie_word_embeddings {
        all.push(("lm_head.weight".to_owned(), vec![config.vocab_size, config.hidden_size]));
    }
    for index in 0..config.num_hidden_layers {
        let mut norm = |part: &str, size: usize| {
            all.push((layer(index, &format!("{part}.weight")), vec![size]));
        };
        norm("input_layernorm", config.hidden_size);
        norm("post_attention_layernorm", config.hidden_size);
        if config.sub_norms {
            norm("self_attn.attn_sub_norm", config.query_width());
            norm("mlp.ffn_sub_norm", config.intermediate_size);
        }
        if config.qk_norm {
            norm("self_attn.q_norm", config.head_dim);
            norm("self_attn.k_norm", config.head_dim);
        }
        for part in PROJECTIONS {
            let path = layer(index, part);
            let (rows, cols) = projection(config, part);
            all.push((format!("{path}.weight"), vec![rows, cols]));
            if config.projection_norm_eps.is_some() {
                all.push((format!("{path}.norm.weight"), vec![cols]));
            }
            let bias = format!("{path}.bias");
            let needed = config.attention_bias
                && matches!(part, "self_attn.q_proj" | "self_attn.k_proj" | "self_attn.v_proj");
            if needed || parts.tensors.contains_key(&bias) {
                all.push((bias, vec![rows]));
            }
        }
    }
    all
}

/// `(rows, cols)` of a matrix by its canonical name.
pub(super) fn matrix(config: &ModelConfig, name: &str) -> Option<(usize, usize)> {
    if name == "model.embed_tokens.weight" || name == "lm_head.weight" {
        return Some((config.vocab_size, config.hidden_size));
    }
    let rest = name.strip_prefix("model.layers.")?.strip_suffix(".weight")?;
    let (_, part) = rest.split_once('.')?;
    PROJECTIONS.contains(&part).then(|| projection(config, part))
}

/// `(rows, cols)` of one of [`PROJECTIONS`].
fn projection(config: &ModelConfig, part: &str) -> (usize, usize) {
    let (hidden, intermediate) = (config.hidden_size, config.intermediate_size);
    match part {
        "self_attn.q_proj" => (config.query_width(), hidden),
        "self_attn.k_proj" | "self_attn.v_proj" => (config.key_width(), hidden),
        "self_attn.o_proj" => (hidden, config.query_width()),
        "mlp.down_proj" => (hidden, intermediate),
        _ => (intermediate, hidden), // gate_proj, up_proj
    }
}

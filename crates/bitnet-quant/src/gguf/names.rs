//! Tensor names of GGUF and of Hugging Face checkpoints, in both directions.

/// Tensors outside the layers.
const WHOLE: [(&str, &str); 7] = [
    ("token_embd.weight", "model.embed_tokens.weight"),
    ("output_norm.weight", "model.norm.weight"),
    ("output.weight", "lm_head.weight"),
    // Of files in this project's own packing: see [`ROUNDED`].
    ("token_embd.rounded", "model.embed_tokens.rounded"),
    ("token_embd.rounding", "model.embed_tokens.rounding"),
    ("output.rounded", "lm_head.rounded"),
    ("output.rounding", "lm_head.rounding"),
];

/// Suffixes of the tensors that hold the rounded copy of a head: its codes and its bounds
/// (`bitnet_core::weights::RoundedRows`).
pub(crate) const ROUNDED: [&str; 2] = ["rounded", "rounding"];

/// Modules of a layer: `blk.3.attn_q` is `model.layers.3.self_attn.q_proj`.
const MODULES: [(&str, &str); 20] = [
    ("attn_norm", "input_layernorm"),
    ("attn_q", "self_attn.q_proj"),
    ("attn_k", "self_attn.k_proj"),
    ("attn_v", "self_attn.v_proj"),
    ("attn_output", "self_attn.o_proj"),
    ("attn_sub_norm", "self_attn.attn_sub_norm"),
    ("attn_q_norm", "self_attn.q_norm"),
    ("attn_k_norm", "self_attn.k_norm"),
    ("ffn_norm", "post_attention_layernorm"),
    ("ffn_gate", "mlp.gate_proj"),
    ("ffn_up", "mlp.up_proj"),
    ("ffn_down", "mlp.down_proj"),
    ("ffn_sub_norm", "mlp.ffn_sub_norm"),
    // Norms inside projections (BitNet embedding models).
    ("attn_q_norm_in", "self_attn.q_proj.norm"),
    ("attn_k_norm_in", "self_attn.k_proj.norm"),
    ("attn_v_norm_in", "self_attn.v_proj.norm"),
    ("attn_output_norm_in", "self_attn.o_proj.norm"),
    ("ffn_gate_norm_in", "mlp.gate_proj.norm"),
    ("ffn_up_norm_in", "mlp.up_proj.norm"),
    ("ffn_down_norm_in", "mlp.down_proj.norm"),
];

/// What a module's tensor is: `.scale` is a factor on the module's output.
const SUFFIXES: [(&str, &str); 3] =
    [("weight", "weight"), ("bias", "bias"), ("scale", "output_scale")];

/// The Hugging Face name of a GGUF tensor, if it has one.
pub(crate) fn canonical(name: &str) -> Option<String> {
    if let Some((_, canonical)) = WHOLE.iter().find(|(gguf, _)| *gguf == name) {
        return Some((*canonical).to_owned());
    }
    let (layer, rest) = name.strip_prefix("blk.")?.split_once('.')?;
    let (module, suffix) = rest.rsplit_once('.')?;
    let layer = layer_number(layer)?;
    let (_, module) = MODULES.iter().find(|(gguf, _)| *gguf == module)?;
    let (_, suffix) = SUFFIXES.iter().find(|(gguf, _)| *gguf == suffix)?;
    Some(format!("model.layers.{layer}.{module}.{suffix}"))
}

/// The GGUF name of a tensor by its Hugging Face name, if it has one.
pub(crate) fn gguf(name: &str) -> Option<String> {
    if let Some((gguf, _)) = WHOLE.iter().find(|(_, canonical)| *canonical == name) {
        return Some((*gguf).to_owned());
    }
    let (layer, rest) = name.strip_prefix("model.layers.")?.split_once('.')?;
    let (module, suffix) = rest.rsplit_once('.')?;
    let layer = layer_number(layer)?;
    let (module, _) = MODULES.iter().find(|(_, canonical)| *canonical == module)?;
    let (suffix, _) = SUFFIXES.iter().find(|(_, canonical)| *canonical == suffix)?;
    Some(format!("blk.{layer}.{module}.{suffix}"))
}

/// A number written as numbers are, so that no two names mean the same layer.
fn layer_number(text: &str) -> Option<usize> {
    text.parse().ok().filter(|number: &usize| number.to_string() == text)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_go_there_and_back() {
        for (there, back) in [
            ("token_embd.weight", "model.embed_tokens.weight"),
            ("blk.17.attn_output.weight", "model.layers.17.self_attn.o_proj.weight"),
            ("blk.0.attn_q.bias", "model.layers.0.self_attn.q_proj.bias"),
            ("blk.0.ffn_down_norm_in.weight", "model.layers.0.mlp.down_proj.norm.weight"),
            ("blk.0.attn_q_norm.weight", "model.layers.0.self_attn.q_norm.weight"),
            ("blk.2.ffn_up.scale", "model.layers.2.mlp.up_proj.output_scale"),
        ] {
            assert_eq!(canonical(there).as_deref(), Some(back));
            assert_eq!(gguf(back).as_deref(), Some(there));
        }
        for other in
            ["rope_freqs.weight", "blk.01.attn_q.weight", "blk.+1.attn_q.weight", "blk.x.y.z"]
        {
            assert_eq!(canonical(other), None, "{other}");
        }
    }
}

//! Any bytes as the config.json, tokenizer_config.json and safetensors file of a folder. The input
//! is the three one after the other, behind the lengths of the first two (4 bytes each, lowest
//! first).
#![no_main]

use bitnet_quant::checkpoint::{Checkpoint, ModelFiles};
use bytes::Bytes;
use libfuzzer_sys::fuzz_target;

fuzz_target!(|input: &[u8]| {
    let Some((lengths, files)) = input.split_at_checked(8) else { return };
    let length = |at: usize| u32::from_le_bytes(lengths[at..at + 4].try_into().unwrap()) as usize;
    let (config, rest) = files.split_at(length(0).min(files.len()));
    let (tokenizer_config, weights) = rest.split_at(length(4).min(rest.len()));
    let files = [
        ("config.json", config),
        ("tokenizer_config.json", tokenizer_config),
        ("model.safetensors", weights),
    ]
    .map(|(name, bytes)| (name, Bytes::copy_from_slice(bytes)));
    if let Ok(checkpoint) = Checkpoint::from_files(ModelFiles::in_memory("fuzz", files)) {
        for layer in 0..checkpoint.config().num_hidden_layers.min(2) {
            let _ = checkpoint.linear(&format!("model.layers.{layer}.self_attn.q_proj"));
            let _ = checkpoint.norm(&format!("model.layers.{layer}.input_layernorm"));
        }
        let _ = checkpoint.table("model.embed_tokens");
    }
});

//! Any bytes as the config.json and the safetensors file of a folder.
#![no_main]

use arbitrary::Arbitrary;
use bitnet_quant::checkpoint::{Checkpoint, ModelFiles};
use bytes::Bytes;
use libfuzzer_sys::fuzz_target;

#[derive(Debug, Arbitrary)]
struct Folder {
    config: Vec<u8>,
    weights: Vec<u8>,
    tokenizer_config: Vec<u8>,
}

fuzz_target!(|folder: Folder| {
    let files = [
        ("config.json", Bytes::from(folder.config)),
        ("model.safetensors", Bytes::from(folder.weights)),
        ("tokenizer_config.json", Bytes::from(folder.tokenizer_config)),
    ];
    if let Ok(checkpoint) = Checkpoint::from_files(ModelFiles::in_memory("fuzz", files)) {
        for layer in 0..checkpoint.config().num_hidden_layers.min(2) {
            let _ = checkpoint.linear(&format!("model.layers.{layer}.self_attn.q_proj"));
            let _ = checkpoint.norm(&format!("model.layers.{layer}.input_layernorm"));
        }
        let _ = checkpoint.table("model.embed_tokens");
    }
});

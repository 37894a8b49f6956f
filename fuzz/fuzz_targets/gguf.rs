//! Any bytes as a GGUF file: header, metadata, tensors, and every weight a decoder would read.
#![no_main]

use bitnet_quant::checkpoint::{Checkpoint, ModelFiles};
use bytes::Bytes;
use libfuzzer_sys::fuzz_target;

fuzz_target!(|data: &[u8]| {
    let files = ModelFiles::in_memory("fuzz", [("model.gguf", Bytes::copy_from_slice(data))]);
    if let Ok(checkpoint) = Checkpoint::from_files(files) {
        read_all(&checkpoint);
    }
});

/// Reads every tensor the decoder would ask for.
fn read_all(checkpoint: &Checkpoint) {
    let _ = checkpoint.text();
    let _ = checkpoint.table("model.embed_tokens");
    let _ = checkpoint.norm("model.norm");
    for layer in 0..checkpoint.config().num_hidden_layers.min(4) {
        for part in ["self_attn.q_proj", "self_attn.k_proj", "mlp.down_proj"] {
            let _ = checkpoint.linear(&format!("model.layers.{layer}.{part}"));
        }
    }
}

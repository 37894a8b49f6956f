//! Any bytes as a tokenizer.json, and texts through it.
#![no_main]

use bitnet_inference::tokenizer::{EncodeOptions, Tokenizer};
use bitnet_quant::text::{TextAssets, TokenizerSource};
use bytes::Bytes;
use libfuzzer_sys::fuzz_target;

fuzz_target!(|file: &[u8]| {
    let source = TokenizerSource::HuggingFace(Bytes::copy_from_slice(file));
    let assets = TextAssets { tokenizer: Some(source), ..TextAssets::default() };
    let Ok(tokenizer) = Tokenizer::from_assets(&assets) else { return };
    // The file's own characters are the texts that reach most of its vocabulary.
    let own = String::from_utf8_lossy(&file[..file.len().min(2000)]);
    for text in [&own, "", "Hello\u{0} wörld  42\r\n\t<s></s> 日本語 🙂\u{fffd}"] {
        if let Ok(ids) = tokenizer.encode(text, EncodeOptions::PROMPT) {
            let _ = tokenizer.decode(&ids, false);
        }
    }
});

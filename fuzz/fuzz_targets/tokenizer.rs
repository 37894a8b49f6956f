//! Any bytes as a tokenizer.json, and any text through it.
#![no_main]

use bitnet_inference::tokenizer::{EncodeOptions, Tokenizer};
use bitnet_quant::text::{TextAssets, TokenizerSource};
use bytes::Bytes;
use libfuzzer_sys::fuzz_target;

fuzz_target!(|input: (Vec<u8>, String)| {
    let (file, text) = input;
    let source = TokenizerSource::HuggingFace(Bytes::from(file));
    let assets = TextAssets { tokenizer: Some(source), ..TextAssets::default() };
    if let Ok(tokenizer) = Tokenizer::from_assets(&assets)
        && let Ok(ids) = tokenizer.encode(&text, EncodeOptions::PROMPT)
    {
        let _ = tokenizer.decode(&ids, false);
    }
});

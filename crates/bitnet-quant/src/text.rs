//! What a checkpoint says about its text: the raw material of a tokenizer and a chat template.
//! Nothing is interpreted here; the engine builds tokenizers.

pub mod pretokenizers;

use crate::error::{Error, Result};
use crate::files::ModelFiles;
use bytes::Bytes;
use std::path::Path;

/// Tokenizer and template of a checkpoint, after known wrong metadata was corrected.
#[derive(Debug, Clone, Default)]
pub struct TextAssets {
    /// Where tokens come from; `None` for a model without a tokenizer.
    pub tokenizer: Option<TokenizerSource>,
    /// The Jinja chat template.
    pub chat_template: Option<String>,
    /// Beginning-of-sequence token.
    pub bos_token_id: Option<u32>,
    /// All tokens that end a generation.
    pub eos_token_ids: Vec<u32>,
    /// Whether encoding a prompt puts `bos` first. `None`: as the tokenizer's own rules say.
    pub add_bos: Option<bool>,
    /// Whether encoding a prompt puts `eos` last (embedding models).
    pub add_eos: bool,
    /// Text of `bos`, `eos`, … for the chat template: `("bos_token", "<s>")`.
    pub special_tokens: Vec<(String, String)>,
}

impl TextAssets {
    /// What the files of a tokenizer in a Hugging Face folder say, whether a model is in it or not.
    /// `config.json` is not read.
    ///
    /// # Errors
    /// A folder without a tokenizer, files that are damaged.
    pub fn from_folder(path: impl AsRef<Path>) -> Result<Self> {
        let files = ModelFiles::folder(path.as_ref());
        let assets = crate::hf::text::read(&files, None, &[])?;
        match assets.tokenizer {
            Some(_) => Ok(assets),
            None => Err(Error::missing("tokenizer.json").in_file(files.place())),
        }
    }
}

/// The two forms tokenizers come in.
#[derive(Debug, Clone)]
pub enum TokenizerSource {
    /// The bytes of a `tokenizer.json`.
    HuggingFace(Bytes),
    /// The vocabulary in a GGUF file's metadata.
    Gguf(GgufVocabulary),
}

/// The `tokenizer.ggml.*` metadata of a GGUF file.
#[derive(Debug, Clone, Default)]
pub struct GgufVocabulary {
    /// `tokenizer.ggml.model`: `gpt2` (byte-level BPE) or `llama` (SentencePiece).
    pub model: String,
    /// `tokenizer.ggml.pre`: name of the pre-tokenizer.
    pub pre: Option<String>,
    /// Token texts by id.
    pub tokens: Vec<String>,
    /// SentencePiece scores by id; empty if absent.
    pub scores: Vec<f32>,
    /// Token kinds by id (1 normal, 2 unknown, 3 control, 4 user-defined, 5 unused, 6 byte); empty if absent.
    pub token_types: Vec<i32>,
    /// BPE merges, `left right`.
    pub merges: Vec<String>,
    /// `tokenizer.ggml.unknown_token_id`
    pub unk_token_id: Option<u32>,
    /// `tokenizer.ggml.add_space_prefix`
    pub add_space_prefix: Option<bool>,
}

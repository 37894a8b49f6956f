//! Builds the parts of a tokenizer from the vocabulary in a GGUF file.

use tokenizers::models::bpe::Vocab;

use bitnet_quant::text::GgufVocabulary;

use super::added::AddedToken;
use super::alphabet;
use super::error::TokenizerError;
use super::json::{BpeOptions, bpe};
use super::names;
use super::normalize::Normalizer;
use super::pretokenize::Step;
use super::spm::SentencePiece;
use super::vocab::{Kind, byte_token};
use super::{Model, Parts};

/// `tokenizer.ggml.token_type`
mod token_type {
    pub(super) const UNKNOWN: i32 = 2;
    pub(super) const CONTROL: i32 = 3;
    pub(super) const USER_DEFINED: i32 = 4;
    pub(super) const UNUSED: i32 = 5;
    pub(super) const BYTE: i32 = 6;
}

/// SentencePiece's visible space.
const SPACE: &str = "▁";

/// The parts of the tokenizer that `vocabulary` describes. `control` lists tokens that are control
/// tokens whatever their type says; `bos` is put first if the kind of tokenizer has it so.
pub(super) fn read(
    vocabulary: &GgufVocabulary,
    control: &[u32],
    bos: Option<u32>,
) -> Result<Parts, TokenizerError> {
    let size = vocabulary.tokens.len();
    let per_token = |what: &str, len: usize| match len {
        0 => Ok(()),
        len if len == size => Ok(()),
        len => Err(TokenizerError::invalid(what, format!("{size}, one per token"), len)),
    };
    if size == 0 {
        return Err(TokenizerError::invalid("tokens", "a vocabulary", "none"));
    }
    per_token("token types", vocabulary.token_types.len())?;
    per_token("scores", vocabulary.scores.len())?;
    let types: Vec<i32> = (0..size as u32)
        .map(|id| match vocabulary.token_types.get(id as usize) {
            _ if control.contains(&id) => token_type::CONTROL,
            Some(&kind) => kind,
            None => 1,
        })
        .collect();
    let mut parts = match vocabulary.model.as_str() {
        "gpt2" => byte_level(vocabulary, &types)?,
        "llama" => sentence_piece(vocabulary, &types)?,
        other => {
            return Err(TokenizerError::Unsupported {
                what: "tokenizer.ggml.model",
                got: other.chars().take(60).collect(),
                supported: "gpt2, llama".to_owned(),
            });
        }
    };
    let starts_with_bos = match vocabulary.model.as_str() {
        "llama" => true,
        _ => names::llama3_rules(pre_tokenizer(vocabulary)),
    };
    parts.prefix = bos.filter(|_| starts_with_bos).into_iter().collect();
    Ok(parts)
}

/// The name of the pre-tokenizer. Files without one are Llama 3's, if they have its first token,
/// or older than the name.
fn pre_tokenizer(vocabulary: &GgufVocabulary) -> &str {
    match &vocabulary.pre {
        Some(name) => name,
        None if vocabulary.tokens.iter().any(|token| token == "<|begin_of_text|>") => "llama-bpe",
        None => "default",
    }
}

/// The tokens that are looked for in the text before it is cut into words.
fn added(vocabulary: &GgufVocabulary, types: &[i32]) -> Vec<AddedToken> {
    let tokens = vocabulary.tokens.iter().zip(types).enumerate();
    tokens
        .filter_map(|(id, (text, &kind))| {
            let control = matches!(kind, token_type::CONTROL | token_type::UNKNOWN);
            let found = control || kind == token_type::USER_DEFINED;
            let token =
                AddedToken { id: id as u32, text: text.clone(), control, ..AddedToken::default() };
            found.then_some(token)
        })
        .collect()
}

/// `id, bytes, kind` of every token.
fn table(
    vocabulary: &GgufVocabulary,
    types: &[i32],
    bytes: impl Fn(&str, i32) -> Vec<u8>,
) -> Vec<(u32, Vec<u8>, Kind)> {
    let tokens = vocabulary.tokens.iter().zip(types).enumerate();
    tokens
        .map(|(id, (text, &kind))| match kind {
            token_type::CONTROL | token_type::UNKNOWN => {
                (id as u32, text.clone().into_bytes(), Kind::Control)
            }
            token_type::USER_DEFINED => (id as u32, text.clone().into_bytes(), Kind::Text),
            token_type::UNUSED => (id as u32, bytes(text, kind), Kind::Unused),
            _ => (id as u32, bytes(text, kind), Kind::Text),
        })
        .collect()
}

fn byte_level(vocabulary: &GgufVocabulary, types: &[i32]) -> Result<Parts, TokenizerError> {
    let name = pre_tokenizer(vocabulary);
    let steps = Step::named(name)?;
    let mut vocab = Vocab::default();
    for (id, text) in vocabulary.tokens.iter().enumerate() {
        // Padding repeats texts; the first has the text.
        vocab.entry(text.clone()).or_insert(id as u32);
    }
    let mut merges = Vec::with_capacity(vocabulary.merges.len());
    for (rank, merge) in vocabulary.merges.iter().enumerate() {
        let Some((left, right)) = merge.split_once(' ') else {
            let got = format!("`{}`", merge.chars().take(60).collect::<String>());
            return Err(TokenizerError::invalid(format!("merge {rank}"), "`left right`", got));
        };
        // A merge that makes no token can never show in a text; writers leave such rows behind.
        let parts = [left, right, &format!("{left}{right}")];
        if parts.iter().all(|part| vocab.contains_key(*part)) {
            merges.push((left.to_owned(), right.to_owned()));
        }
    }
    let added = added(vocabulary, types);
    let options = BpeOptions { ignore_merges: names::llama3_rules(name), ..BpeOptions::default() };
    let model = bpe(vocab, merges, &added, options)?;
    let bytes = |text: &str, _| alphabet::bytes(text).unwrap_or_else(|| text.as_bytes().to_vec());
    Ok(Parts {
        normalizers: Vec::new(),
        steps,
        model: Model::Bpe(Box::new(model)),
        tokens: table(vocabulary, types, bytes),
        added,
        prefix: Vec::new(),
        suffix: Vec::new(),
        strip_start: 0,
    })
}

fn sentence_piece(vocabulary: &GgufVocabulary, types: &[i32]) -> Result<Parts, TokenizerError> {
    if vocabulary.scores.is_empty() {
        return Err(TokenizerError::invalid("scores", "one per token", "none"));
    }
    if let Some(score) = vocabulary.scores.iter().find(|score| !score.is_finite()) {
        return Err(TokenizerError::invalid("scores", "numbers", score));
    }
    let mut bytes = [None; 256];
    for (id, text) in vocabulary.tokens.iter().enumerate() {
        if types[id] == token_type::BYTE {
            let byte = byte_token(text).ok_or_else(|| {
                let got = format!("`{}`", text.chars().take(60).collect::<String>());
                TokenizerError::invalid(format!("byte token {id}"), "`<0x00>` to `<0xFF>`", got)
            })?;
            bytes[byte as usize] = Some(id as u32);
        }
    }
    let pieces = vocabulary.tokens.iter().zip(&vocabulary.scores).enumerate();
    let pieces = pieces.filter(|(id, _)| {
        let no_text =
            [token_type::CONTROL, token_type::UNKNOWN, token_type::UNUSED, token_type::BYTE];
        !no_text.contains(&types[*id])
    });
    let pieces = pieces.map(|(id, (text, &score))| (text.clone(), id as u32, score));
    let model = SentencePiece::new(pieces, bytes, vocabulary.unk_token_id);
    let prefix = vocabulary.add_space_prefix.unwrap_or(true);
    let mut normalizers = vec![Normalizer::Replace { from: " ".into(), to: SPACE.into() }];
    if prefix {
        normalizers.insert(0, Normalizer::Prepend(SPACE.into()));
    }
    let bytes = |text: &str, kind| match byte_token(text).filter(|_| kind == token_type::BYTE) {
        Some(byte) => vec![byte],
        None => text.replace(SPACE, " ").into_bytes(),
    };
    Ok(Parts {
        normalizers,
        steps: Vec::new(),
        model: Model::SentencePiece(model),
        tokens: table(vocabulary, types, bytes),
        added: added(vocabulary, types),
        prefix: Vec::new(),
        suffix: Vec::new(),
        strip_start: usize::from(prefix),
    })
}

//! Text to token ids and back.
//!
//! A text runs through: control and added tokens cut out → normalization → words → merging. The
//! parts come from a `tokenizer.json` or from GGUF metadata; merging is the BPE of the
//! `tokenizers` crate or SentencePiece's. Everything around it is written here, because a
//! tokenizer meets hostile files and hostile texts: every loop is linear in the text, and what
//! cannot be done is an error.
//!
//! Knows nothing of models. Tokens become text in [`detokenizer`](crate::detokenizer).

mod added;
pub(crate) mod alphabet;
mod error;
mod gguf;
mod json;
mod normalize;
mod pattern;
mod pretokenize;
mod spm;
mod vocab;

use std::borrow::Cow;
use std::sync::Arc;

use bitnet_quant::text::{TextAssets, TokenizerSource, pretokenizers as names};
use tokenizers::Model as _;
use tokenizers::models::bpe::BPE;

use crate::detokenizer::Detokenizer;
use added::{AddedToken, AddedTokens, Segment};
pub use error::TokenizerError;
use normalize::Normalizer;
use pretokenize::{Step, Words};
use spm::SentencePiece;
use vocab::{Kind, Vocabulary};

/// A tokenizer. Cloning it is cheap; clones share the vocabulary.
#[derive(Clone)]
pub struct Tokenizer(Arc<Inner>);

impl std::fmt::Debug for Tokenizer {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Tokenizer").field("vocab_size", &self.vocab_size()).finish_non_exhaustive()
    }
}

struct Inner {
    vocabulary: Vocabulary,
    added: AddedTokens,
    normalizers: Vec<Normalizer>,
    steps: Vec<Step>,
    model: Model,
    prefix: Vec<u32>,
    suffix: Vec<u32>,
    bos: Option<u32>,
    eos: Vec<u32>,
    strip_start: usize,
}

/// Makes tokens of words.
#[derive(Debug)]
enum Model {
    Bpe(Box<BPE>),
    SentencePiece(SentencePiece),
}

/// What a file says, before the checkpoint's settings apply.
#[derive(Debug)]
struct Parts {
    normalizers: Vec<Normalizer>,
    steps: Vec<Step>,
    model: Model,
    /// `id, bytes, kind`; the last row of an id counts.
    tokens: Vec<(u32, Vec<u8>, Kind)>,
    added: Vec<AddedToken>,
    prefix: Vec<u32>,
    suffix: Vec<u32>,
    /// Spaces that encoding puts first and decoding takes away.
    strip_start: usize,
}

/// Which tokens encoding adds to those of the text.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum AddSpecial {
    /// None.
    #[default]
    None,
    /// What the model wants first (`bos`), unless the text already begins with it.
    Start,
    /// What the model wants first and last: for embeddings, or to equal
    /// `add_special_tokens=True` in Python.
    Both,
}

/// How to encode a text. Without `parse_special` the text of a control token is text like any
/// other: what a user types cannot end a turn.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct EncodeOptions {
    /// Tokens to add.
    pub add: AddSpecial,
    /// Whether the text of a control token becomes that token.
    pub parse_special: bool,
}

impl EncodeOptions {
    /// A piece of text: nothing added, nothing parsed.
    pub const TEXT: Self = Self { add: AddSpecial::None, parse_special: false };
    /// A prompt to continue: begins as the model expects, control tokens are not parsed.
    pub const PROMPT: Self = Self { add: AddSpecial::Start, parse_special: false };
    /// What a chat template wrote: control tokens are parsed. Texts from outside must go through
    /// [`Tokenizer::protect`] before the template gets them.
    pub const CHAT: Self = Self { add: AddSpecial::Start, parse_special: true };
}

impl Tokenizer {
    /// The tokenizer of a checkpoint.
    pub fn from_assets(assets: &TextAssets) -> Result<Self, TokenizerError> {
        let mut parts = match assets.tokenizer.as_ref().ok_or(TokenizerError::Missing)? {
            TokenizerSource::HuggingFace(json) => json::read(json)?,
            TokenizerSource::Gguf(vocabulary) => {
                let control: Vec<u32> =
                    assets.bos_token_id.iter().chain(&assets.eos_token_ids).copied().collect();
                gguf::read(vocabulary, &control, assets.bos_token_id)?
            }
        };
        match (assets.add_bos, assets.bos_token_id) {
            (Some(true), Some(bos)) if !parts.prefix.contains(&bos) => parts.prefix.insert(0, bos),
            (Some(false), Some(bos)) => parts.prefix.retain(|&token| token != bos),
            _ => {}
        }
        if let Some(&eos) = assets.eos_token_ids.first().filter(|_| assets.add_eos)
            && !parts.suffix.contains(&eos)
        {
            parts.suffix.push(eos);
        }
        let vocabulary = Vocabulary::new(parts.tokens)?;
        let special = parts.prefix.iter().chain(&parts.suffix).chain(&assets.eos_token_ids);
        for &id in special.chain(&assets.bos_token_id) {
            if id as usize >= vocabulary.len() {
                let expected = format!("an id below {}", vocabulary.len());
                return Err(TokenizerError::invalid("special token", expected, id));
            }
        }
        let added = AddedTokens::new(parts.added, |text| normalize(&parts.normalizers, text))?;
        Ok(Self(Arc::new(Inner {
            vocabulary,
            added,
            normalizers: parts.normalizers,
            steps: parts.steps,
            model: parts.model,
            prefix: parts.prefix,
            suffix: parts.suffix,
            bos: assets.bos_token_id,
            eos: assets.eos_token_ids.clone(),
            strip_start: parts.strip_start,
        })))
    }

    /// The token ids of `text`. Time and memory are linear in the text (merging: n log n).
    pub fn encode(&self, text: &str, options: EncodeOptions) -> Result<Vec<u32>, TokenizerError> {
        let inner = &*self.0;
        let mut ids = Vec::with_capacity(text.len() / 4 + 2);
        for segment in inner.added.split_raw(text, options.parse_special) {
            match segment {
                Segment::Token(id) => ids.push(id),
                Segment::Text { text, at_start } => {
                    inner.encode_text(text, options.parse_special, at_start, &mut ids)?;
                }
            }
        }
        let begins = ids.starts_with(&inner.prefix);
        match options.add {
            AddSpecial::None => {}
            AddSpecial::Start if begins => {}
            AddSpecial::Start | AddSpecial::Both => {
                ids.splice(0..0, inner.prefix.iter().copied());
            }
        }
        if options.add == AddSpecial::Both {
            ids.extend(&inner.suffix);
        }
        Ok(ids)
    }

    /// The text of `ids`. Bytes that are no UTF-8 become U+FFFD. Control tokens have no text,
    /// unless `show_control` asks for it.
    pub fn decode(&self, ids: &[u32], show_control: bool) -> String {
        let mut detokenizer = Detokenizer::new(self);
        if show_control {
            detokenizer = detokenizer.show_control();
        }
        let mut text: String = ids.iter().map(|&id| detokenizer.push(id)).collect();
        text.push_str(&detokenizer.finish());
        text
    }

    /// `text`, changed invisibly so that [`EncodeOptions::CHAT`] reads no control token in it,
    /// yet encodes it as it was. For texts from outside on their way into a chat template.
    pub fn protect<'t>(&self, text: &'t str) -> Cow<'t, str> {
        self.0.added.protect(text)
    }

    /// Undoes [`protect`](Self::protect), for showing a rendered template.
    pub fn unprotect<'t>(&self, text: &'t str) -> Cow<'t, str> {
        AddedTokens::unprotect(text)
    }

    /// The bytes a token stands for; a control token's are its name. Empty for ids without a token.
    pub fn token_bytes(&self, id: u32) -> &[u8] {
        self.0.vocabulary.bytes(id)
    }

    /// The token with exactly this text, control tokens included.
    pub fn token_id(&self, text: &str) -> Option<u32> {
        let named = self.0.added.id(text);
        named.or_else(|| match &self.0.model {
            Model::Bpe(bpe) => bpe.token_to_id(text),
            Model::SentencePiece(model) => model.id(text),
        })
    }

    /// One more than the largest token id. A model's logits may be longer.
    pub fn vocab_size(&self) -> usize {
        self.0.vocabulary.len()
    }

    /// Whether a token steers the model and is not part of the text.
    pub fn is_control(&self, id: u32) -> bool {
        self.0.vocabulary.kind(id) == Kind::Control
    }

    /// The token that begins a sequence.
    pub fn bos_id(&self) -> Option<u32> {
        self.0.bos
    }

    /// The tokens that end a generation.
    pub fn eos_ids(&self) -> &[u32] {
        &self.0.eos
    }

    /// The tokens whose text holds one of `texts`: DRY's sequence breakers.
    pub fn tokens_containing<S: AsRef<str>>(&self, texts: &[S]) -> Vec<u32> {
        let Ok(finder) = aho_corasick::AhoCorasick::new(texts.iter().map(AsRef::as_ref)) else {
            return Vec::new();
        };
        let ids = 0..self.vocab_size() as u32;
        ids.filter(|&id| finder.is_match(self.token_bytes(id))).collect()
    }

    /// How many spaces encoding put before the first word.
    pub(crate) fn strip_start(&self) -> usize {
        self.0.strip_start
    }
}

impl Inner {
    /// Appends the tokens of a text that names no raw added token.
    fn encode_text(
        &self,
        text: &str,
        parse_special: bool,
        at_start: bool,
        ids: &mut Vec<u32>,
    ) -> Result<(), TokenizerError> {
        let normalized = normalize(&self.normalizers, text)?;
        for segment in self.added.split_normalized(&normalized, parse_special, at_start) {
            match segment {
                Segment::Token(id) => ids.push(id),
                Segment::Text { text, at_start } => {
                    let text = match parse_special {
                        true => AddedTokens::unprotect(text),
                        false => Cow::Borrowed(text),
                    };
                    let mut words = Words::new(text.into_owned(), at_start);
                    for step in &self.steps {
                        step.run(&mut words)?;
                    }
                    self.model.encode(&words, ids)?;
                }
            }
        }
        Ok(())
    }
}

impl Model {
    fn encode(&self, words: &Words, ids: &mut Vec<u32>) -> Result<(), TokenizerError> {
        for word in words.iter() {
            match self {
                Self::SentencePiece(model) => model.encode(word, ids),
                Self::Bpe(bpe) => {
                    let tokens = bpe.tokenize(word).map_err(|e| {
                        TokenizerError::invalid("BPE", "a token for every character", e)
                    })?;
                    ids.extend(tokens.into_iter().map(|token| token.id));
                }
            }
        }
        Ok(())
    }
}

fn normalize(normalizers: &[Normalizer], text: &str) -> Result<String, TokenizerError> {
    normalizers.iter().try_fold(text.to_owned(), |text, normalizer| normalizer.run(text))
}

#[cfg(test)]
mod tests;

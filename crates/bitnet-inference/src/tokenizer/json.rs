//! Reads a `tokenizer.json` into the parts of a tokenizer.
//!
//! The file is somebody else's: every part is checked before the BPE of the `tokenizers` crate
//! sees it, because that crate trusts its input. Kinds of parts that no generating model uses
//! (WordPiece, Unigram, …) are refused by name.

use std::collections::HashSet;

use serde::de::{self, Deserializer, IgnoredAny, SeqAccess, Visitor};
use serde::{Deserialize, de::DeserializeOwned};
use tokenizers::models::bpe::{BPE, Vocab};

use super::added::AddedToken;
use super::alphabet;
use super::error::TokenizerError;
use super::names;
use super::normalize::{Form, Normalizer};
use super::pattern::Pattern;
use super::pretokenize::{Behavior, Prepend, Step};
use super::vocab::{Kind, byte_token};
use super::{Model, Parts};

/// The parts of the tokenizer that `json` (the bytes of a `tokenizer.json`) describes.
pub(super) fn read(json: &[u8]) -> Result<Parts, TokenizerError> {
    // The kind of model first: the others' vocabularies have another shape.
    let kind = parse::<Outline>(json)?.model.kind;
    if let Some(kind) = kind.filter(|kind| kind != "BPE") {
        return Err(unsupported("model", &kind, "BPE"));
    }
    let File { added_tokens, normalizer, pre_tokenizer, post_processor, decoder, model } =
        parse(json)?;
    let mut normalizers = Vec::new();
    if let Some(normalizer) = normalizer {
        normalizer.push_to(&mut normalizers)?;
    }
    let mut steps = Vec::new();
    if let Some(pre_tokenizer) = pre_tokenizer {
        pre_tokenizer.push_to(&mut steps)?;
    }
    let mut decoding = Decoding::default();
    match decoder {
        Some(decoder) => decoding.add(decoder),
        None => decoding.bytes = steps.iter().any(|step| matches!(step, Step::Bytes { .. })),
    }
    let (prefix, suffix) = match post_processor {
        Some(processor) => processor.frame()?,
        None => (Vec::new(), Vec::new()),
    };

    let mut tokens: Vec<(u32, Vec<u8>, Kind)> = Vec::with_capacity(model.vocab.len());
    let mut seen = HashSet::with_capacity(model.vocab.len());
    for (text, &id) in &model.vocab {
        if !seen.insert(id) {
            return Err(TokenizerError::invalid(
                "vocabulary",
                "one token per id",
                format!("two with id {id}"),
            ));
        }
        tokens.push((id, decoding.bytes_of(text), Kind::Text));
    }
    for token in &added_tokens {
        if let Some(&id) = model.vocab.get(&token.content).filter(|id| **id != token.id) {
            let what = format!("added token `{}`", shorten(&token.content));
            return Err(TokenizerError::invalid(
                what,
                format!("id {id}, as in the vocabulary"),
                token.id,
            ));
        }
        let kind = if token.special { Kind::Control } else { Kind::Text };
        tokens.push((token.id, token.content.as_bytes().to_vec(), kind));
    }
    let added: Vec<AddedToken> = added_tokens.into_iter().map(AddedJson::into_token).collect();
    Ok(Parts {
        normalizers,
        steps,
        model: Model::Bpe(Box::new(model.build(&added)?)),
        tokens,
        added,
        prefix,
        suffix,
        strip_start: decoding.strip,
    })
}

fn parse<T: DeserializeOwned>(json: &[u8]) -> Result<T, TokenizerError> {
    serde_json::from_slice(json).map_err(|e| TokenizerError::Json { reason: e.to_string() })
}

fn unsupported(what: &'static str, got: &str, supported: &str) -> TokenizerError {
    TokenizerError::Unsupported { what, got: shorten(got), supported: supported.to_owned() }
}

fn shorten(text: &str) -> String {
    text.chars().take(60).collect()
}

#[derive(Deserialize)]
struct Outline {
    model: OutlineModel,
}

#[derive(Deserialize)]
struct OutlineModel {
    #[serde(rename = "type")]
    kind: Option<String>,
}

#[derive(Deserialize)]
struct File {
    #[serde(default)]
    added_tokens: Vec<AddedJson>,
    normalizer: Option<NormalizerJson>,
    pre_tokenizer: Option<PreTokenizerJson>,
    post_processor: Option<PostProcessorJson>,
    decoder: Option<DecoderJson>,
    model: ModelJson,
}

#[derive(Deserialize)]
struct AddedJson {
    id: u32,
    content: String,
    #[serde(default)]
    single_word: bool,
    #[serde(default)]
    lstrip: bool,
    #[serde(default)]
    rstrip: bool,
    #[serde(default)]
    normalized: bool,
    #[serde(default)]
    special: bool,
}

impl AddedJson {
    fn into_token(self) -> AddedToken {
        AddedToken {
            id: self.id,
            text: self.content,
            control: self.special,
            single_word: self.single_word,
            lstrip: self.lstrip,
            rstrip: self.rstrip,
            normalized: self.normalized,
        }
    }
}

#[derive(Deserialize)]
struct ModelJson {
    vocab: Vocab,
    merges: Vec<Merge>,
    dropout: Option<f32>,
    unk_token: Option<String>,
    continuing_subword_prefix: Option<String>,
    end_of_word_suffix: Option<String>,
    #[serde(default)]
    fuse_unk: bool,
    #[serde(default)]
    byte_fallback: bool,
    #[serde(default)]
    ignore_merges: bool,
}

impl ModelJson {
    fn build(self, added: &[AddedToken]) -> Result<BPE, TokenizerError> {
        let given = |text: &Option<String>| text.as_ref().is_some_and(|text| !text.is_empty());
        if given(&self.continuing_subword_prefix) || given(&self.end_of_word_suffix) {
            return Err(unsupported(
                "BPE with",
                "continuing_subword_prefix or end_of_word_suffix",
                "neither",
            ));
        }
        if self.dropout.is_some_and(|dropout| dropout != 0.0) {
            return Err(unsupported("BPE with", "dropout", "none"));
        }
        let merges = self.merges.into_iter().map(|merge| (merge.left, merge.right)).collect();
        let options = BpeOptions {
            unk_token: self.unk_token,
            fuse_unk: self.fuse_unk,
            byte_fallback: self.byte_fallback,
            ignore_merges: self.ignore_merges,
        };
        bpe(self.vocab, merges, added, options)
    }
}

/// What a BPE does besides merging.
#[derive(Debug, Default)]
pub(super) struct BpeOptions {
    pub(super) unk_token: Option<String>,
    pub(super) fuse_unk: bool,
    pub(super) byte_fallback: bool,
    pub(super) ignore_merges: bool,
}

/// A BPE of checked parts. Control tokens leave the vocabulary, unless a merge makes them: plain
/// text must not become one.
pub(super) fn bpe(
    mut vocab: Vocab,
    merges: Vec<(String, String)>,
    added: &[AddedToken],
    options: BpeOptions,
) -> Result<BPE, TokenizerError> {
    let mut joined = String::new();
    let mut made = HashSet::new();
    for (rank, (left, right)) in merges.iter().enumerate() {
        joined.clear();
        joined.push_str(left);
        joined.push_str(right);
        for text in [left, right, &joined] {
            let Some(id) = vocab.get(text) else {
                let got = format!("`{}`, which is none", shorten(text));
                return Err(TokenizerError::invalid(format!("merge {rank}"), "tokens", got));
            };
            made.insert(*id);
        }
    }
    if let Some(unknown) = options.unk_token.as_ref().filter(|text| !vocab.contains_key(*text)) {
        return Err(TokenizerError::invalid(
            "unk_token",
            "a token",
            format!("`{}`", shorten(unknown)),
        ));
    }
    for token in added.iter().filter(|token| token.control && !made.contains(&token.id)) {
        if options.unk_token.as_ref() != Some(&token.text) {
            vocab.remove(&token.text);
        }
    }
    let mut builder = BPE::builder()
        .vocab_and_merges(vocab, merges)
        .fuse_unk(options.fuse_unk)
        .byte_fallback(options.byte_fallback)
        .ignore_merges(options.ignore_merges)
        // Its cache lives in thread-local storage and outlives the tokenizer.
        .cache_capacity(0);
    if let Some(unknown) = options.unk_token {
        builder = builder.unk_token(unknown);
    }
    builder.build().map_err(|e| TokenizerError::invalid("BPE", "a vocabulary with merges", e))
}

/// `"left right"` or `["left", "right"]`.
struct Merge {
    left: String,
    right: String,
}

impl<'de> Deserialize<'de> for Merge {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct Pair;
        impl<'de> Visitor<'de> for Pair {
            type Value = Merge;

            fn expecting(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
                f.write_str("a merge: \"left right\" or [\"left\", \"right\"]")
            }

            fn visit_str<E: de::Error>(self, text: &str) -> Result<Merge, E> {
                match text.split_once(' ') {
                    Some((left, right)) if !right.contains(' ') => {
                        Ok(Merge { left: left.to_owned(), right: right.to_owned() })
                    }
                    _ => Err(E::invalid_value(de::Unexpected::Str(text), &self)),
                }
            }

            fn visit_seq<A: SeqAccess<'de>>(self, mut parts: A) -> Result<Merge, A::Error> {
                let left = parts.next_element()?;
                let right = parts.next_element()?;
                match (left, right, parts.next_element::<IgnoredAny>()?) {
                    (Some(left), Some(right), None) => Ok(Merge { left, right }),
                    _ => Err(de::Error::custom("a merge has two parts")),
                }
            }
        }
        deserializer.deserialize_any(Pair)
    }
}

#[derive(Deserialize)]
enum PatternJson {
    String(String),
    Regex(String),
}

impl PatternJson {
    fn compile(&self) -> Result<Pattern, TokenizerError> {
        match self {
            Self::String(text) => Pattern::new(&fancy_regex::escape(text)),
            Self::Regex(pattern) => Pattern::new(pattern),
        }
    }
}

#[derive(Deserialize)]
#[serde(tag = "type")]
#[allow(clippy::upper_case_acronyms)] // the names in the file
enum NormalizerJson {
    Sequence { normalizers: Vec<NormalizerJson> },
    NFC,
    NFD,
    NFKC,
    NFKD,
    Lowercase,
    Prepend { prepend: String },
    Replace { pattern: PatternJson, content: String },
    Strip { strip_left: bool, strip_right: bool },
}

impl NormalizerJson {
    fn push_to(self, out: &mut Vec<Normalizer>) -> Result<(), TokenizerError> {
        out.push(match self {
            Self::Sequence { normalizers } => {
                return normalizers.into_iter().try_for_each(|one| one.push_to(out));
            }
            Self::NFC => Normalizer::Unicode(Form::Nfc),
            Self::NFD => Normalizer::Unicode(Form::Nfd),
            Self::NFKC => Normalizer::Unicode(Form::Nfkc),
            Self::NFKD => Normalizer::Unicode(Form::Nfkd),
            Self::Lowercase => Normalizer::Lowercase,
            Self::Prepend { prepend } => Normalizer::Prepend(prepend),
            Self::Replace { pattern: PatternJson::String(from), .. } if from.is_empty() => {
                return Ok(());
            }
            Self::Replace { pattern: PatternJson::String(from), content } => {
                Normalizer::Replace { from, to: content }
            }
            Self::Replace { pattern, content } => {
                Normalizer::ReplacePattern { from: pattern.compile()?, to: content }
            }
            Self::Strip { strip_left, strip_right } => {
                Normalizer::Strip { left: strip_left, right: strip_right }
            }
        });
        Ok(())
    }
}

#[derive(Deserialize)]
#[serde(tag = "type")]
enum PreTokenizerJson {
    Sequence {
        pretokenizers: Vec<PreTokenizerJson>,
    },
    ByteLevel {
        #[serde(default = "yes")]
        add_prefix_space: bool,
        #[serde(default = "yes")]
        use_regex: bool,
    },
    Split {
        pattern: PatternJson,
        behavior: Behavior,
        #[serde(default)]
        invert: bool,
    },
    Digits {
        #[serde(default)]
        individual_digits: bool,
    },
    Punctuation {
        #[serde(default = "isolated")]
        behavior: Behavior,
    },
    Metaspace {
        replacement: char,
        add_prefix_space: Option<bool>,
        #[serde(default = "always")]
        prepend_scheme: Prepend,
        #[serde(default = "yes")]
        split: bool,
    },
    WhitespaceSplit,
    Whitespace,
}

fn yes() -> bool {
    true
}

fn isolated() -> Behavior {
    Behavior::Isolated
}

fn always() -> Prepend {
    Prepend::Always
}

impl PreTokenizerJson {
    fn push_to(self, out: &mut Vec<Step>) -> Result<(), TokenizerError> {
        let split = |pattern: &str, behavior, invert| {
            Ok(Step::Split { pattern: Pattern::new(pattern)?, behavior, invert })
        };
        out.push(match self {
            Self::Sequence { pretokenizers } => {
                return pretokenizers.into_iter().try_for_each(|one| one.push_to(out));
            }
            Self::ByteLevel { add_prefix_space, use_regex } => Step::Bytes {
                prefix_space: add_prefix_space,
                words: use_regex.then(|| Pattern::new(names::GPT2)).transpose()?,
            },
            Self::Split { pattern, behavior, invert } => {
                Step::Split { pattern: pattern.compile()?, behavior, invert }
            }
            Self::Digits { individual_digits } => Step::Digits { individual: individual_digits },
            Self::Punctuation { behavior } => Step::punctuation(behavior)?,
            Self::Metaspace { replacement, add_prefix_space, prepend_scheme, split } => {
                let prepend =
                    if add_prefix_space == Some(false) { Prepend::Never } else { prepend_scheme };
                Step::Metaspace { replacement, prepend, split }
            }
            Self::WhitespaceSplit => split(r"\s", Behavior::Removed, false)?,
            Self::Whitespace => split(r"\w+|[^\w\s]+", Behavior::Removed, true)?,
        });
        Ok(())
    }
}

#[derive(Deserialize)]
#[serde(tag = "type")]
enum PostProcessorJson {
    Sequence { processors: Vec<PostProcessorJson> },
    ByteLevel {},
    TemplateProcessing { single: Vec<PieceJson>, special_tokens: SpecialTokensJson },
    BertProcessing { sep: (String, u32), cls: (String, u32) },
    RobertaProcessing { sep: (String, u32), cls: (String, u32) },
}

#[derive(Deserialize)]
enum PieceJson {
    Sequence { id: String },
    SpecialToken { id: String },
}

type SpecialTokensJson = std::collections::HashMap<String, SpecialTokenJson>;

#[derive(Deserialize)]
struct SpecialTokenJson {
    ids: Vec<u32>,
}

impl PostProcessorJson {
    /// The tokens before and after a text.
    fn frame(self) -> Result<(Vec<u32>, Vec<u32>), TokenizerError> {
        match self {
            Self::ByteLevel {} => Ok((Vec::new(), Vec::new())),
            Self::BertProcessing { sep, cls } | Self::RobertaProcessing { sep, cls } => {
                Ok((vec![cls.1], vec![sep.1]))
            }
            Self::Sequence { processors } => {
                // Later processors frame what earlier ones made.
                let (mut prefix, mut suffix) = (Vec::new(), Vec::new());
                for processor in processors {
                    let (mut before, after) = processor.frame()?;
                    before.append(&mut prefix);
                    prefix = before;
                    suffix.extend(after);
                }
                Ok((prefix, suffix))
            }
            Self::TemplateProcessing { single, special_tokens } => {
                let (mut prefix, mut suffix, mut seen) = (Vec::new(), Vec::new(), 0);
                for piece in single {
                    match piece {
                        PieceJson::Sequence { id } if id == "A" => seen += 1,
                        PieceJson::Sequence { id } => {
                            return Err(TokenizerError::invalid(
                                "post_processor",
                                "sequence A",
                                id,
                            ));
                        }
                        PieceJson::SpecialToken { id } => {
                            let token = special_tokens.get(&id).ok_or_else(|| {
                                let got = format!("`{}`", shorten(&id));
                                TokenizerError::invalid("post_processor", "a special token", got)
                            })?;
                            if seen == 0 { &mut prefix } else { &mut suffix }.extend(&token.ids);
                        }
                    }
                }
                if seen != 1 {
                    let got = format!("it {seen} times");
                    return Err(TokenizerError::invalid("post_processor", "the text once", got));
                }
                Ok((prefix, suffix))
            }
        }
    }
}

#[derive(Deserialize)]
#[serde(tag = "type")]
enum DecoderJson {
    Sequence {
        decoders: Vec<DecoderJson>,
    },
    ByteLevel {},
    ByteFallback {},
    Fuse {},
    Replace {
        pattern: LiteralJson,
        content: String,
    },
    Strip {
        content: char,
        start: usize,
    },
    Metaspace {
        replacement: char,
        add_prefix_space: Option<bool>,
        #[serde(default = "always")]
        prepend_scheme: Prepend,
    },
}

#[derive(Deserialize)]
enum LiteralJson {
    String(String),
}

/// How the text of a token turns into bytes.
#[derive(Debug, Default)]
struct Decoding {
    bytes: bool,
    byte_tokens: bool,
    replace: Vec<(String, String)>,
    strip: usize,
}

impl Decoding {
    fn add(&mut self, decoder: DecoderJson) {
        match decoder {
            DecoderJson::Sequence { decoders } => {
                decoders.into_iter().for_each(|one| self.add(one))
            }
            DecoderJson::ByteLevel {} => self.bytes = true,
            DecoderJson::ByteFallback {} => self.byte_tokens = true,
            DecoderJson::Fuse {} => {}
            DecoderJson::Replace { pattern: LiteralJson::String(from), content } => {
                if !from.is_empty() {
                    self.replace.push((from, content));
                }
            }
            // Only spaces are ever put first, so only they are taken away again.
            DecoderJson::Strip { content, start } => {
                self.strip = if content == ' ' { start } else { 0 };
            }
            DecoderJson::Metaspace { replacement, add_prefix_space, prepend_scheme } => {
                self.replace.push((replacement.to_string(), " ".to_owned()));
                let prepends = add_prefix_space != Some(false) && prepend_scheme != Prepend::Never;
                self.strip = usize::from(prepends);
            }
        }
    }

    fn bytes_of(&self, text: &str) -> Vec<u8> {
        if self.byte_tokens
            && let Some(byte) = byte_token(text)
        {
            return vec![byte];
        }
        if self.bytes
            && let Some(bytes) = alphabet::bytes(text)
        {
            return bytes;
        }
        let mut text = text.to_owned();
        for (from, to) in &self.replace {
            text = text.replace(from, to);
        }
        text.into_bytes()
    }
}

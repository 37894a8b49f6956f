//! Writes the `tokenizer.*` keys of a GGUF file, from a GGUF vocabulary or a `tokenizer.json`.
//!
//! A `tokenizer.json` can describe more tokenizers than GGUF: byte-level BPE with a pre-tokenizer
//! that has a name there, and BPE with byte fallback (SentencePiece) are taken; all else is
//! refused, as it would give other tokens.

use super::gguf_file::strings;
use crate::checkpoint::Checkpoint;
use crate::error::{Error, Result};
use crate::gguf::{Array, Metadata, Value};
use crate::text::{GgufVocabulary, TextAssets, TokenizerSource, pretokenizers};
use serde::Deserialize;
use std::collections::HashMap;

/// Kinds of tokens in GGUF.
pub(super) mod kind {
    pub(in super::super) const NORMAL: i32 = 1;
    pub(in super::super) const UNKNOWN: i32 = 2;
    pub(in super::super) const CONTROL: i32 = 3;
    pub(in super::super) const USER_DEFINED: i32 = 4;
    pub(in super::super) const UNUSED: i32 = 5;
    pub(in super::super) const BYTE: i32 = 6;
}

/// `tokenizer.json`, as far as it matters here.
#[derive(Deserialize)]
struct TokenizerJson {
    #[serde(default)]
    added_tokens: Vec<AddedToken>,
    pre_tokenizer: Option<PreTokenizer>,
    post_processor: Option<PostProcessor>,
    model: Model,
}

#[derive(Deserialize)]
struct AddedToken {
    id: u32,
    content: String,
    #[serde(default)]
    special: bool,
}

#[derive(Deserialize)]
struct Model {
    r#type: Option<String>,
    #[serde(default)]
    vocab: serde_json::Value,
    #[serde(default)]
    merges: Vec<Merge>,
    unk_token: Option<String>,
    #[serde(default)]
    byte_fallback: Option<bool>,
    #[serde(default)]
    ignore_merges: Option<bool>,
}

/// A merge, as one text or as a pair.
#[derive(Deserialize)]
#[serde(untagged)]
enum Merge {
    Text(String),
    Pair(String, String),
}

impl Merge {
    fn pair(&self) -> Option<(&str, &str)> {
        match self {
            Self::Text(text) => text.split_once(' '),
            Self::Pair(left, right) => Some((left, right)),
        }
    }
}

#[derive(Deserialize)]
#[serde(tag = "type")]
enum PreTokenizer {
    Sequence {
        pretokenizers: Vec<PreTokenizer>,
    },
    Split {
        pattern: SplitPattern,
        behavior: String,
        #[serde(default)]
        invert: bool,
    },
    Digits {
        #[serde(default)]
        individual_digits: bool,
    },
    ByteLevel {
        #[serde(default)]
        add_prefix_space: bool,
        #[serde(default = "yes")]
        use_regex: bool,
    },
    #[serde(other)]
    Other,
}

fn yes() -> bool {
    true
}

#[derive(Deserialize)]
enum SplitPattern {
    String(serde::de::IgnoredAny),
    Regex(String),
}

#[derive(Deserialize)]
#[serde(tag = "type")]
enum PostProcessor {
    Sequence {
        processors: Vec<PostProcessor>,
    },
    TemplateProcessing {
        single: Vec<TemplatePart>,
    },
    #[serde(other)]
    Other,
}

#[derive(Deserialize)]
enum TemplatePart {
    SpecialToken { id: String },
    Sequence {},
}

/// Writes the keys of a checkpoint's text side.
pub(super) fn write(
    checkpoint: &Checkpoint,
    metadata: &mut Metadata,
    notes: &mut Vec<String>,
) -> Result<()> {
    let text = checkpoint.text();
    let read;
    let (vocabulary, ends) = match &text.tokenizer {
        None => return Ok(()),
        Some(TokenizerSource::Gguf(vocabulary)) => (vocabulary, Ends::default()),
        Some(TokenizerSource::HuggingFace(json)) => {
            read = read_json(json, checkpoint.config().vocab_size)?;
            (&read.0, read.1)
        }
    };
    let mut set = |key: &str, value: Value| {
        metadata.set(format!("tokenizer.ggml.{key}"), value);
    };
    set("model", Value::String(vocabulary.model.clone()));
    if let Some(pre) = &vocabulary.pre {
        set("pre", Value::String(pre.clone()));
    }
    set("tokens", strings(vocabulary.tokens.clone()));
    if !vocabulary.scores.is_empty() {
        set("scores", Value::Array(Array::F32(vocabulary.scores.clone())));
    }
    if !vocabulary.token_types.is_empty() {
        set("token_type", Value::Array(Array::I32(vocabulary.token_types.clone())));
    }
    if !vocabulary.merges.is_empty() {
        set("merges", strings(vocabulary.merges.clone()));
    }
    if let Some(flag) = vocabulary.add_space_prefix {
        set("add_space_prefix", Value::Bool(flag));
    }
    for (key, id) in token_ids(text, vocabulary, notes) {
        set(&format!("{key}_token_id"), Value::U32(id));
    }
    if let Some(flag) = text.add_bos.or(ends.bos) {
        set("add_bos_token", Value::Bool(flag));
    }
    if text.add_eos || ends.eos == Some(true) {
        set("add_eos_token", Value::Bool(true));
    }
    if let Some(template) = &text.chat_template {
        metadata.set("tokenizer.chat_template", Value::String(template.clone()));
    }
    Ok(())
}

/// Ids of special tokens. GGUF has room for three tokens that end a text.
fn token_ids(
    text: &TextAssets,
    vocabulary: &GgufVocabulary,
    notes: &mut Vec<String>,
) -> Vec<(&'static str, u32)> {
    let id_of = |name: &str| {
        let (_, text) = text.special_tokens.iter().find(|(key, _)| key == name)?;
        let id = vocabulary.tokens.iter().position(|token| token == text)?;
        u32::try_from(id).ok()
    };
    let mut ids = Vec::new();
    ids.extend(text.bos_token_id.map(|id| ("bos", id)));
    let mut ends = text.eos_token_ids.clone();
    if let Some(first) = id_of("eos_token").and_then(|id| ends.iter().position(|&end| end == id)) {
        ends.swap(0, first);
    }
    ids.extend(["eos", "eot", "eom"].into_iter().zip(ends.iter().copied()));
    if ends.len() > 3 {
        notes.push(format!("GGUF has room for three end tokens; {:?} are left out", &ends[3..]));
    }
    ids.extend(vocabulary.unk_token_id.or_else(|| id_of("unk_token")).map(|id| ("unknown", id)));
    ids.extend(id_of("pad_token").map(|id| ("padding", id)));
    ids
}

/// Whether encoding puts a token first or last; `None` where the tokenizer has no say.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
struct Ends {
    bos: Option<bool>,
    eos: Option<bool>,
}

fn read_json(json: &[u8], vocab_size: usize) -> Result<(GgufVocabulary, Ends)> {
    let tokenizer: TokenizerJson = serde_json::from_slice(json)?;
    let kind = tokenizer.model.r#type.as_deref().unwrap_or("BPE");
    if kind != "BPE" {
        return Err(Error::does_not_fit("tokenizer", "GGUF", format!("its model is {kind}")));
    }
    let mut vocabulary = match tokenizer.model.byte_fallback {
        Some(true) => GgufVocabulary { model: "llama".into(), ..Default::default() },
        _ => {
            let rules = tokenizer.model.ignore_merges.unwrap_or(false);
            let pre = pre_tokenizer(tokenizer.pre_tokenizer.as_ref(), rules)?;
            GgufVocabulary { model: "gpt2".into(), pre: Some(pre.into()), ..Default::default() }
        }
    };
    tokens(&tokenizer, vocab_size, &mut vocabulary)?;
    let pairs: Option<Vec<(&str, &str)>> = tokenizer.model.merges.iter().map(Merge::pair).collect();
    let pairs = pairs.ok_or_else(|| Error::malformed("merge", "two tokens", "one"))?;
    if vocabulary.model == "llama" {
        vocabulary.scores = scores(&vocabulary.tokens, &pairs);
    } else {
        // Spaces are written otherwise in a byte-level vocabulary, so that one can part the pair.
        vocabulary.merges = pairs.iter().map(|(left, right)| format!("{left} {right}")).collect();
    }
    let ends = tokenizer.post_processor.as_ref().map_or_else(Ends::default, ends);
    Ok((vocabulary, ends))
}

/// Fills in the texts and kinds of all tokens.
fn tokens(
    tokenizer: &TokenizerJson,
    vocab_size: usize,
    vocabulary: &mut GgufVocabulary,
) -> Result<()> {
    let vocab = tokenizer.model.vocab.as_object();
    let vocab = vocab.ok_or_else(|| Error::malformed("vocab", "an object", "something else"))?;
    let normal = vocab.iter().map(|(token, id)| (token, id.as_u64(), None));
    let added = tokenizer.added_tokens.iter();
    let added = added.map(|token| (&token.content, Some(token.id.into()), Some(token.special)));
    let mut tokens = vec![None; vocab_size];
    for (token, id, special) in normal.chain(added) {
        let place = id.and_then(|id| usize::try_from(id).ok()).and_then(|id| tokens.get_mut(id));
        let Some(place) = place else {
            let expected = format!("an id below vocab_size {vocab_size}");
            return Err(Error::malformed(format!("token {token:?}"), expected, format!("{id:?}")));
        };
        let is_byte = vocabulary.model == "llama" && is_byte_token(token);
        let kind = match special {
            _ if tokenizer.model.unk_token.as_ref() == Some(token) => kind::UNKNOWN,
            Some(true) => kind::CONTROL,
            Some(false) => kind::USER_DEFINED,
            None if is_byte => kind::BYTE,
            None => kind::NORMAL,
        };
        *place = Some((token.clone(), kind));
    }
    for (id, token) in tokens.into_iter().enumerate() {
        let (token, kind) = token.unwrap_or_else(|| (format!("[PAD{id}]"), kind::UNUSED));
        if kind == kind::UNKNOWN {
            vocabulary.unk_token_id = u32::try_from(id).ok();
        }
        vocabulary.tokens.push(token);
        vocabulary.token_types.push(kind);
    }
    Ok(())
}

/// `<0x00>` to `<0xFF>`
pub(super) fn is_byte_token(token: &str) -> bool {
    let digits = token.strip_prefix("<0x").and_then(|rest| rest.strip_suffix('>'));
    digits.is_some_and(|digits| digits.len() == 2 && u8::from_str_radix(digits, 16).is_ok())
}

/// SentencePiece merges the pair whose token has the highest score; here, whose merge comes first.
fn scores(tokens: &[String], merges: &[(&str, &str)]) -> Vec<f32> {
    let mut rank = HashMap::new();
    for (index, (left, right)) in merges.iter().enumerate() {
        rank.entry(format!("{left}{right}")).or_insert(index);
    }
    let score = |token: &String| rank.get(token).map_or(0.0, |&rank| -(rank as f32));
    tokens.iter().map(score).collect()
}

/// The name GGUF has for a pre-tokenizer.
fn pre_tokenizer(pre: Option<&PreTokenizer>, llama3_rules: bool) -> Result<&'static str> {
    let refuse = |reason: &str| Err(Error::does_not_fit("pre-tokenizer", "GGUF", reason));
    let Some(pre) = pre else { return refuse("there is none, and bytes are not mapped") };
    let mut patterns = Vec::new();
    let mut has_bytes = false;
    let mut steps = vec![pre];
    while let Some(step) = steps.pop() {
        match step {
            PreTokenizer::Sequence { pretokenizers } => steps.extend(pretokenizers.iter().rev()),
            PreTokenizer::Split { pattern: SplitPattern::Regex(pattern), behavior, invert } => {
                // Both ways to say: the matches are the words.
                match (behavior.as_str(), invert) {
                    ("Isolated", false) | ("Removed", true) => patterns.push(pattern.as_str()),
                    _ => return refuse("it splits otherwise than at matches"),
                }
            }
            PreTokenizer::Digits { individual_digits: true } => patterns.push(r"\p{N}"),
            PreTokenizer::ByteLevel { add_prefix_space: false, use_regex } => {
                has_bytes = true;
                if *use_regex {
                    patterns.push(pretokenizers::GPT2);
                }
            }
            _ => return refuse("it has a step that GGUF has no name for"),
        }
    }
    if !has_bytes {
        return refuse("it does not map bytes");
    }
    match pretokenizers::name_of(&patterns, llama3_rules) {
        Some(name) => Ok(name),
        None => refuse(&format!("GGUF has no name for its patterns {patterns:?}")),
    }
}

fn ends(post_processor: &PostProcessor) -> Ends {
    match post_processor {
        PostProcessor::Sequence { processors } => {
            let found = processors.iter().map(ends).find(|ends| *ends != Ends::default());
            found.unwrap_or_default()
        }
        PostProcessor::TemplateProcessing { single } => {
            let is_token = |part: Option<&TemplatePart>| match part {
                Some(TemplatePart::SpecialToken { id }) => !id.is_empty(),
                _ => false,
            };
            Ends { bos: Some(is_token(single.first())), eos: Some(is_token(single.last())) }
        }
        PostProcessor::Other => Ends::default(),
    }
}

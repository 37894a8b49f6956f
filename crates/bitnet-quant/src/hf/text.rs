//! Collects what a Hugging Face folder says about text: tokenizer, chat template, special tokens.
//!
//! These stand in up to seven files, several of which may say where a text ends; all that do are
//! heard. The bytes of `tokenizer.json` are passed on uninterpreted but for its added tokens.

use super::config::TokenIds;
use super::sentencepiece;
use crate::error::{Error, Result};
use crate::files::ModelFiles;
use crate::text::{TextAssets, TokenizerSource};
use bytes::Bytes;
use serde::Deserialize;
use std::collections::BTreeMap;

/// Longest files read whole. The largest known `tokenizer.json` has 33 MB.
const MAX_TOKENIZER: u64 = 256 << 20;
const MAX_SETTINGS: u64 = 16 << 20;
const MAX_TEMPLATE: u64 = 1 << 20;

/// Names of special tokens that templates may refer to.
const SPECIAL: [&str; 4] = ["bos_token", "eos_token", "unk_token", "pad_token"];

#[derive(Deserialize, Default)]
struct TokenizerConfig {
    add_bos_token: Option<bool>,
    add_eos_token: Option<bool>,
    chat_template: Option<Templates>,
    #[serde(default)]
    added_tokens_decoder: BTreeMap<String, TokenText>,
    bos_token: Option<TokenText>,
    eos_token: Option<TokenText>,
    unk_token: Option<TokenText>,
    pad_token: Option<TokenText>,
}

#[derive(Deserialize)]
#[serde(untagged)]
enum Templates {
    One(String),
    Named(Vec<NamedTemplate>),
}

#[derive(Deserialize)]
struct NamedTemplate {
    name: String,
    template: String,
}

/// A token's text, alone or among its properties.
#[derive(Deserialize)]
#[serde(untagged)]
enum TokenText {
    Text(String),
    Token { content: String },
}

impl TokenText {
    fn into_text(self) -> String {
        match self {
            Self::Text(text) | Self::Token { content: text } => text,
        }
    }
}

#[derive(Deserialize, Default)]
struct GenerationConfig {
    bos_token_id: Option<TokenIds>,
    eos_token_id: Option<TokenIds>,
}

/// The one part of `tokenizer.json` read here.
#[derive(Deserialize)]
struct AddedTokens {
    #[serde(default)]
    added_tokens: Vec<AddedToken>,
}

#[derive(Deserialize)]
struct AddedToken {
    id: u32,
    content: String,
}

/// Reads all that `files` say about text, beside what `config.json` says.
pub(crate) fn read(
    files: &ModelFiles,
    config_bos: Option<u32>,
    config_eos: &[u32],
) -> Result<TextAssets> {
    let json = files.read("tokenizer.json", MAX_TOKENIZER)?;
    let mut settings: TokenizerConfig = parse(files, "tokenizer_config.json")?.unwrap_or_default();
    let generation: GenerationConfig = parse(files, "generation_config.json")?.unwrap_or_default();
    let map: BTreeMap<String, serde_json::Value> =
        parse(files, "special_tokens_map.json")?.unwrap_or_default();

    let mut ids = BTreeMap::new();
    for (id, token) in std::mem::take(&mut settings.added_tokens_decoder) {
        if let Ok(id) = id.parse::<u32>() {
            ids.insert(token.into_text(), id);
        }
    }
    if let Some(json) = &json {
        let added: AddedTokens = serde_json::from_slice(json)
            .map_err(|e| Error::from(e).in_file(files.label("tokenizer.json")))?;
        ids.extend(added.added_tokens.into_iter().map(|token| (token.content, token.id)));
    }

    let special_tokens = special_tokens(&mut settings, map);
    let id_of = |name: &str| {
        let (_, text) = special_tokens.iter().find(|(key, _)| key == name)?;
        ids.get(text).copied()
    };
    let generation_bos = generation.bos_token_id.and_then(|ids| ids.into_vec().first().copied());
    let mut eos_token_ids = generation.eos_token_id.map(TokenIds::into_vec).unwrap_or_default();
    eos_token_ids.extend(config_eos);
    eos_token_ids.extend(id_of("eos_token"));
    eos_token_ids.sort_unstable();
    eos_token_ids.dedup();

    Ok(TextAssets {
        tokenizer: tokenizer(files, json)?,
        chat_template: chat_template(files, settings.chat_template)?,
        bos_token_id: id_of("bos_token").or(config_bos).or(generation_bos),
        eos_token_ids,
        add_bos: settings.add_bos_token,
        add_eos: settings.add_eos_token.unwrap_or(false),
        special_tokens,
    })
}

fn parse<T: for<'a> Deserialize<'a>>(files: &ModelFiles, name: &str) -> Result<Option<T>> {
    let Some(bytes) = files.read(name, MAX_SETTINGS)? else { return Ok(None) };
    let parsed = serde_json::from_slice(&bytes);
    parsed.map(Some).map_err(|e| Error::from(e).in_file(files.label(name)))
}

fn tokenizer(files: &ModelFiles, json: Option<Bytes>) -> Result<Option<TokenizerSource>> {
    if let Some(json) = json {
        return Ok(Some(TokenizerSource::HuggingFace(json)));
    }
    let Some(model) = files.read("tokenizer.model", MAX_TOKENIZER)? else { return Ok(None) };
    let vocabulary = sentencepiece::read(&model);
    let vocabulary = vocabulary.map_err(|e| e.in_file(files.label("tokenizer.model")))?;
    Ok(Some(TokenizerSource::Gguf(vocabulary)))
}

/// A template in a file of its own comes before one in the settings, as in transformers.
fn chat_template(files: &ModelFiles, settings: Option<Templates>) -> Result<Option<String>> {
    const FILE: &str = "chat_template.jinja";
    if let Some(bytes) = files.read(FILE, MAX_TEMPLATE)? {
        let text = std::str::from_utf8(&bytes).map_err(|e| {
            Error::malformed("chat template", "UTF-8", e).in_file(files.label(FILE))
        })?;
        return Ok(Some(text.to_owned()));
    }
    Ok(match settings {
        None => None,
        Some(Templates::One(template)) => Some(template),
        Some(Templates::Named(templates)) => {
            templates.into_iter().find(|t| t.name == "default").map(|t| t.template)
        }
    })
}

/// Texts of the special tokens: `tokenizer_config.json` first, then `special_tokens_map.json`.
fn special_tokens(
    settings: &mut TokenizerConfig,
    mut map: BTreeMap<String, serde_json::Value>,
) -> Vec<(String, String)> {
    let texts = [
        settings.bos_token.take(),
        settings.eos_token.take(),
        settings.unk_token.take(),
        settings.pad_token.take(),
    ];
    let mut found = Vec::new();
    for (name, text) in SPECIAL.into_iter().zip(texts) {
        let from_map = || {
            let text: TokenText = serde_json::from_value(map.remove(name)?).ok()?;
            Some(text.into_text())
        };
        let text = text.map(TokenText::into_text).or_else(from_map);
        found.extend(text.map(|text| (name.to_owned(), text)));
    }
    found
}

#[cfg(test)]
mod tests {
    use super::*;

    fn files(list: &[(&str, &str)]) -> ModelFiles {
        let own = list.iter().map(|(name, text)| (*name, Bytes::from(text.to_string())));
        ModelFiles::in_memory("test", own)
    }

    /// Reads `files` beside a config.json that names two tokens.
    fn read(files: &ModelFiles) -> Result<TextAssets> {
        super::read(files, Some(7), &[8])
    }

    #[test]
    fn every_file_that_names_an_end_is_heard() {
        let files = files(&[
            ("tokenizer.json", r#"{"model": {}, "added_tokens": [{"id": 5, "content": "<e>"}]}"#),
            (
                "tokenizer_config.json",
                r#"{"eos_token": {"content": "<e>"}, "bos_token": "<b>", "add_bos_token": false}"#,
            ),
            ("generation_config.json", r#"{"eos_token_id": [8, 9]}"#),
            (
                "special_tokens_map.json",
                r#"{"unk_token": "<u>", "additional_special_tokens": ["x"]}"#,
            ),
        ]);
        let text = read(&files).unwrap();
        assert_eq!(text.eos_token_ids, [5, 8, 9]);
        assert_eq!(text.bos_token_id, Some(7), "`<b>` has no id, so config.json decides");
        assert_eq!(text.add_bos, Some(false));
        let pair = |name: &str, text: &str| (name.to_owned(), text.to_owned());
        let expected =
            [pair("bos_token", "<b>"), pair("eos_token", "<e>"), pair("unk_token", "<u>")];
        assert_eq!(text.special_tokens, expected);
        assert!(matches!(text.tokenizer, Some(TokenizerSource::HuggingFace(_))));
    }

    #[test]
    fn templates_come_from_three_places() {
        let one = ("tokenizer_config.json", r#"{"chat_template": "one"}"#);
        let named = (
            "tokenizer_config.json",
            r#"{"chat_template": [{"name": "tool_use", "template": "t"}, {"name": "default", "template": "d"}]}"#,
        );
        let template = |list: &[(&str, &str)]| read(&files(list)).unwrap().chat_template;
        assert_eq!(template(&[one]).as_deref(), Some("one"));
        assert_eq!(template(&[named]).as_deref(), Some("d"));
        assert_eq!(template(&[one, ("chat_template.jinja", "file")]).as_deref(), Some("file"));
        assert_eq!(template(&[]), None);
    }

    #[test]
    fn broken_files_are_named() {
        for (name, content) in [
            ("tokenizer.json", "{"),
            ("tokenizer_config.json", r#"{"chat_template": 7}"#),
            ("generation_config.json", r#"{"eos_token_id": -1}"#),
        ] {
            let message = read(&files(&[(name, content)])).unwrap_err().to_string();
            assert!(message.starts_with(&format!("test/{name}: ")), "{message}");
        }
        let invalid =
            ModelFiles::in_memory("test", [("chat_template.jinja", Bytes::from_static(b"\xFF"))]);
        assert!(read(&invalid).unwrap_err().to_string().contains("UTF-8"));
    }
}

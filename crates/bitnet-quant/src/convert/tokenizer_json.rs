//! Writes a `tokenizer.json` that gives the same tokens as a GGUF vocabulary.

use super::vocabulary::{is_byte_token, kind};
use crate::error::{Error, Result};
use crate::text::{GgufVocabulary, TextAssets, pretokenizers};
use serde_json::{Map, Value, json};
use std::collections::HashMap;

/// SentencePiece's visible space.
const SPACE: &str = "▁";

/// The JSON of the tokenizer that `vocabulary` describes; `text` says what encoding adds.
pub(super) fn build(vocabulary: &GgufVocabulary, text: &TextAssets) -> Result<Value> {
    let pre = pre_tokenizer(vocabulary);
    let llama = vocabulary.model == "llama";
    let (normalizer, pre_tokenizer, decoder, merges) = match vocabulary.model.as_str() {
        "gpt2" => {
            let bytes = json!({
                "type": "ByteLevel", "add_prefix_space": false, "trim_offsets": true, "use_regex": false
            });
            (Value::Null, splits(pre, bytes.clone())?, bytes, pairs(&vocabulary.merges)?)
        }
        "llama" => {
            let (normalizer, decoder) = visible_spaces(vocabulary.add_space_prefix.unwrap_or(true));
            (normalizer, Value::Null, decoder, merges_by_score(vocabulary))
        }
        other => return Err(Error::unsupported("tokenizer.ggml.model", other, "gpt2, llama")),
    };
    let unknown = vocabulary.unk_token_id.and_then(|id| vocabulary.tokens.get(id as usize));
    let rules = !llama && pretokenizers::llama3_rules(pre);
    Ok(json!({
        "version": "1.0",
        "truncation": null,
        "padding": null,
        "added_tokens": added_tokens(vocabulary),
        "normalizer": normalizer,
        "pre_tokenizer": pre_tokenizer,
        "post_processor": post_processor(vocabulary, text, llama || rules),
        "decoder": decoder,
        "model": {
            "type": "BPE",
            "dropout": null,
            "unk_token": if llama { json!(unknown) } else { Value::Null },
            "continuing_subword_prefix": null,
            "end_of_word_suffix": null,
            "fuse_unk": llama,
            "byte_fallback": llama,
            "ignore_merges": rules,
            "vocab": vocab(vocabulary),
            "merges": merges,
        },
    }))
}

/// Files without a name are Llama 3's, if they have its first token, or older than the names.
fn pre_tokenizer(vocabulary: &GgufVocabulary) -> &str {
    match &vocabulary.pre {
        Some(name) => name,
        None if vocabulary.tokens.iter().any(|token| token == "<|begin_of_text|>") => "llama-bpe",
        None => "default",
    }
}

fn splits(pre: &str, bytes: Value) -> Result<Value> {
    let patterns = pretokenizers::patterns(pre)
        .ok_or_else(|| Error::unsupported("tokenizer.ggml.pre", pre, pretokenizers::supported()))?;
    let split = |pattern: &&str| json!({"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated", "invert": false});
    let steps: Vec<Value> = patterns.iter().map(split).chain([bytes]).collect();
    Ok(json!({"type": "Sequence", "pretokenizers": steps}))
}

fn pairs(merges: &[String]) -> Result<Vec<(&str, &str)>> {
    let pair = |merge: &String| merge.split_once(' ').map(|_| ());
    if let Some(index) = merges.iter().position(|merge| pair(merge).is_none()) {
        return Err(Error::malformed(format!("merge {index}"), "two tokens", &merges[index]));
    }
    Ok(merges.iter().filter_map(|merge| merge.split_once(' ')).collect())
}

/// Normalizer and decoder that make spaces visible and invisible again.
fn visible_spaces(prefix: bool) -> (Value, Value) {
    let replace = |from: &str, to: &str| json!({"type": "Replace", "pattern": {"String": from}, "content": to});
    let mut normalizers = vec![replace(" ", SPACE)];
    let mut decoders =
        vec![replace(SPACE, " "), json!({"type": "ByteFallback"}), json!({"type": "Fuse"})];
    if prefix {
        normalizers.insert(0, json!({"type": "Prepend", "prepend": SPACE}));
        decoders.push(json!({"type": "Strip", "content": " ", "start": 1, "stop": 0}));
    }
    (
        json!({"type": "Sequence", "normalizers": normalizers}),
        json!({"type": "Sequence", "decoders": decoders}),
    )
}

/// SentencePiece merges any two neighbours that are a token together, best score first. As a list:
/// every way to part a token into two, in the order of the scores of the whole.
fn merges_by_score(vocabulary: &GgufVocabulary) -> Vec<(&str, &str)> {
    let mergeable = |id: usize, token: &str| {
        let kind = vocabulary.token_types.get(id).copied().unwrap_or(kind::NORMAL);
        matches!(kind, kind::NORMAL | kind::USER_DEFINED) && !is_byte_token(token)
    };
    let mut ids = HashMap::new();
    for (id, token) in vocabulary.tokens.iter().enumerate() {
        if mergeable(id, token) {
            ids.entry(token.as_str()).or_insert(id);
        }
    }
    let mut found = Vec::new();
    for (&token, &id) in &ids {
        let score = vocabulary.scores.get(id).copied().unwrap_or(0.0);
        for (at, _) in token.char_indices().skip(1) {
            let (left, right) = token.split_at(at);
            if let (Some(&left_id), Some(&right_id)) = (ids.get(left), ids.get(right)) {
                found.push((score, id, left_id, right_id, (left, right)));
            }
        }
    }
    found.sort_unstable_by(|a, b| b.0.total_cmp(&a.0).then((a.1, a.2, a.3).cmp(&(b.1, b.2, b.3))));
    found.into_iter().map(|(.., pair)| pair).collect()
}

fn vocab(vocabulary: &GgufVocabulary) -> Value {
    let mut vocab = Map::new();
    for (id, token) in vocabulary.tokens.iter().enumerate() {
        // Padding repeats texts; the first has the text.
        vocab.entry(token.clone()).or_insert_with(|| json!(id));
    }
    Value::Object(vocab)
}

fn added_tokens(vocabulary: &GgufVocabulary) -> Vec<Value> {
    let types = vocabulary.token_types.iter().enumerate();
    types
        .filter(|(_, kind)| matches!(**kind, kind::UNKNOWN | kind::CONTROL | kind::USER_DEFINED))
        .map(|(id, kind)| {
            json!({
                "id": id,
                "content": vocabulary.tokens[id],
                "single_word": false,
                "lstrip": false,
                "rstrip": false,
                "normalized": false,
                "special": *kind != kind::USER_DEFINED,
            })
        })
        .collect()
}

/// Puts `bos` first and `eos` last, where encoding does.
fn post_processor(vocabulary: &GgufVocabulary, text: &TextAssets, adds_bos: bool) -> Value {
    let token = |id: u32| vocabulary.tokens.get(id as usize).map(|token| (token, id));
    let bos = text.bos_token_id.filter(|_| text.add_bos.unwrap_or(adds_bos)).and_then(token);
    let eos = text.eos_token_ids.first().copied().filter(|_| text.add_eos).and_then(token);
    if bos.is_none() && eos.is_none() {
        return Value::Null;
    }
    let part = |(token, _): (&String, u32)| json!({"SpecialToken": {"id": token, "type_id": 0}});
    let around = |sequence: Value| -> Vec<Value> {
        bos.map(part).into_iter().chain([sequence]).chain(eos.map(part)).collect()
    };
    let mut special = Map::new();
    for (token, id) in bos.into_iter().chain(eos) {
        special.insert(token.clone(), json!({"id": token, "ids": [id], "tokens": [token]}));
    }
    let single = around(json!({"Sequence": {"id": "A", "type_id": 0}}));
    let pair = single.iter().cloned().chain(around(json!({"Sequence": {"id": "B", "type_id": 1}})));
    json!({
        "type": "TemplateProcessing",
        "single": single,
        "pair": pair.collect::<Vec<_>>(),
        "special_tokens": special,
    })
}

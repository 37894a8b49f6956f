//! What a run is made of, as names and values: kept with each checkpoint, so that going on with other
//! data, another tokenizer or another model is noticed.
//!
//! Only what a checkpoint names is compared: those of older programs name less.

use std::collections::BTreeMap;

use bitnet_quant::config::{HiddenAct, ModelConfig};
use sha2::{Digest, Sha256};

use crate::data::{Corpus, Encoder, hex};
use crate::error::{Error, Result};
use crate::model::{Model, Precision};

/// What a run is made of.
#[derive(Clone, Copy)]
pub(super) struct Parts<'a> {
    pub(super) config: &'a ModelConfig,
    pub(super) precision: Precision,
    pub(super) encoder: &'a Encoder,
    pub(super) separator: &'a str,
    pub(super) corpora: &'a [Corpus],
    pub(super) teacher: Option<&'a Model>,
}

/// Every part by its name, as a word or as a SHA-256.
pub(super) fn names(parts: Parts<'_>) -> BTreeMap<String, String> {
    let Parts { config, precision, encoder, separator, corpora, teacher } = parts;
    let mut all = BTreeMap::from(
        [
            ("family", config.architecture.to_string()),
            ("hidden_size", config.hidden_size.to_string()),
            ("intermediate_size", config.intermediate_size.to_string()),
            ("num_hidden_layers", config.num_hidden_layers.to_string()),
            ("num_attention_heads", config.num_attention_heads.to_string()),
            ("num_key_value_heads", config.num_key_value_heads.to_string()),
            ("vocab_size", config.vocab_size.to_string()),
            ("rms_norm_eps", format!("{:?}", config.rms_norm_eps)),
            ("rope_theta", format!("{:?}", config.rope_theta)),
            ("rotary frequencies", rotation(config)),
            ("tie_word_embeddings", config.tie_word_embeddings.to_string()),
            (
                "hidden_act",
                match config.hidden_act {
                    HiddenAct::Relu2 => "relu2".into(),
                    HiddenAct::Silu => "silu".into(),
                },
            ),
            (
                "weights",
                match precision {
                    Precision::Ternary => "ternary".into(),
                    Precision::Float => "float".into(),
                },
            ),
            ("tokenizer", encoder.fingerprint().to_owned()),
            ("separator", separator.to_owned()),
            ("teacher", teacher.map_or("none".into(), numbers)),
        ]
        .map(|(name, value)| (name.to_owned(), value)),
    );
    for (corpus, number) in corpora.iter().zip(1..) {
        for (file, place) in corpus.windows.tokens().info().files.iter().zip(1..) {
            let name = format!("corpus {number}, file {place}, {}", file.name);
            all.insert(name, file.sha256.clone());
        }
    }
    all
}

/// Compares a run with what `checkpoint` says it was made of.
pub(super) fn compare(
    checkpoint: &str,
    was: &BTreeMap<String, String>,
    now: &BTreeMap<String, String>,
) -> Result<()> {
    for (name, value) in was {
        let found = now.get(name).map_or("none", String::as_str);
        if found != value {
            let expected = format!("{name} = {value}, as the run began");
            return Err(Error::input(checkpoint, expected, found));
        }
    }
    Ok(())
}

/// SHA-256 of how a model turns queries and keys.
fn rotation(config: &ModelConfig) -> String {
    let mut hash = Sha256::new();
    for frequency in config.rope_frequencies() {
        hash.update(frequency.to_le_bytes());
    }
    hash.update(config.rope_attention_factor().to_le_bytes());
    hex(&hash.finalize())
}

/// SHA-256 of all numbers of a model.
fn numbers(model: &Model) -> String {
    let mut hash = Sha256::new();
    for (parameter, values) in model.named_parameters() {
        hash.update(&parameter.name);
        for values in values.chunks(1 << 14) {
            let bytes: Vec<u8> = values.iter().flat_map(|x| x.to_le_bytes()).collect();
            hash.update(bytes);
        }
    }
    hex(&hash.finalize())
}

//! Sampling fields as the OpenAI-style requests carry them, and what they mean to the engine.
//!
//! The wire's ranges are checked here, by the wire's names; defaults are the wire's as well
//! (temperature 1, nothing filtered), not the engine's.

use std::collections::BTreeMap;

use bitnet_inference::GenerationOptions;
use bitnet_inference::options::DryOptions;
use serde::Deserialize;
use serde::de::{self, Deserializer, SeqAccess, Visitor};
use utoipa::ToSchema;

use crate::error::{ApiError, Result};
use crate::openapi::schema_as;

/// Sampling fields taken out of a request.
#[derive(Debug, Clone, Default)]
pub(crate) struct Sampling {
    pub(crate) temperature: Option<f64>,
    pub(crate) top_p: Option<f64>,
    pub(crate) top_k: Option<i64>,
    pub(crate) min_p: Option<f64>,
    pub(crate) typical_p: Option<f64>,
    pub(crate) repetition_penalty: Option<f64>,
    pub(crate) penalty_last_n: Option<u32>,
    pub(crate) presence_penalty: Option<f64>,
    pub(crate) frequency_penalty: Option<f64>,
    pub(crate) dry_multiplier: Option<f64>,
    pub(crate) dry_base: Option<f64>,
    pub(crate) dry_allowed_length: Option<u32>,
    pub(crate) dry_penalty_last_n: Option<u32>,
    pub(crate) dry_sequence_breakers: Option<Vec<String>>,
    pub(crate) logit_bias: Option<BTreeMap<String, f64>>,
    pub(crate) seed: Option<i64>,
    pub(crate) stop: Option<OneOrMany>,
    pub(crate) stop_token_ids: Option<Vec<u32>>,
    pub(crate) ignore_eos: Option<bool>,
}

/// Declares a request type with the sampling fields after its own, and a way to take them out.
macro_rules! with_sampling {
    ($(#[$meta:meta])* pub(crate) struct $name:ident { $($fields:tt)* }) => {
        $(#[$meta])*
        pub(crate) struct $name {
            $($fields)*
            /// Divides the logits before the draw; 0 takes the likeliest token. Default 1.
            #[schema(minimum = 0, maximum = 2)]
            pub temperature: Option<f64>,
            /// Keep the likeliest tokens that together reach this probability. Default 1.
            #[schema(minimum = 0, maximum = 1)]
            pub top_p: Option<f64>,
            /// Keep this many of the likeliest tokens; 0 or -1 keeps all. Default 0.
            #[schema(minimum = -1)]
            pub top_k: Option<i64>,
            /// Keep tokens at least this fraction as likely as the likeliest. Default 0.
            #[schema(minimum = 0, maximum = 1)]
            pub min_p: Option<f64>,
            /// Locally typical sampling. Default 1, which keeps all.
            #[schema(minimum = 0, maximum = 1)]
            pub typical_p: Option<f64>,
            /// Makes recent tokens less likely; 1, the default, changes nothing.
            #[schema(exclusive_minimum = 0, maximum = 10)]
            pub repetition_penalty: Option<f64>,
            /// Tokens the repetition penalty looks back. Default 64.
            pub penalty_last_n: Option<u32>,
            /// Subtracted once from tokens the answer already holds. Default 0.
            #[schema(minimum = -2, maximum = 2)]
            pub presence_penalty: Option<f64>,
            /// Subtracted for each time the answer holds a token. Default 0.
            #[schema(minimum = -2, maximum = 2)]
            pub frequency_penalty: Option<f64>,
            /// Strength of the penalty on continuing a repeated sequence; 0, the default, turns
            /// it off.
            #[schema(minimum = 0, maximum = 100)]
            pub dry_multiplier: Option<f64>,
            /// Growth of that penalty with each repeated token. Default 1.75.
            #[schema(minimum = 1, maximum = 10)]
            pub dry_base: Option<f64>,
            /// Repetitions shorter than this are free. Default 2.
            #[schema(minimum = 1)]
            pub dry_allowed_length: Option<u32>,
            /// Tokens searched for repetitions. Default: all.
            pub dry_penalty_last_n: Option<u32>,
            /// Texts no repetition reaches across.
            pub dry_sequence_breakers: Option<Vec<String>>,
            /// Added to the logits of tokens, by token id; -100 forbids the token.
            pub logit_bias: Option<std::collections::BTreeMap<String, f64>>,
            /// The same seed gives the same answer. Choice `i` of `n` draws with `seed + i`.
            pub seed: Option<i64>,
            /// Texts that end the answer and are not part of it.
            pub stop: Option<$crate::sampling::OneOrMany>,
            /// Tokens that end the answer, besides the model's own.
            pub stop_token_ids: Option<Vec<u32>>,
            /// Go on when the model ends its answer.
            pub ignore_eos: Option<bool>,
        }

        impl $name {
            /// Takes the sampling fields out.
            pub(crate) fn take_sampling(&mut self) -> $crate::sampling::Sampling {
                $crate::sampling::Sampling {
                    temperature: self.temperature.take(),
                    top_p: self.top_p.take(),
                    top_k: self.top_k.take(),
                    min_p: self.min_p.take(),
                    typical_p: self.typical_p.take(),
                    repetition_penalty: self.repetition_penalty.take(),
                    penalty_last_n: self.penalty_last_n.take(),
                    presence_penalty: self.presence_penalty.take(),
                    frequency_penalty: self.frequency_penalty.take(),
                    dry_multiplier: self.dry_multiplier.take(),
                    dry_base: self.dry_base.take(),
                    dry_allowed_length: self.dry_allowed_length.take(),
                    dry_penalty_last_n: self.dry_penalty_last_n.take(),
                    dry_sequence_breakers: self.dry_sequence_breakers.take(),
                    logit_bias: self.logit_bias.take(),
                    seed: self.seed.take(),
                    stop: self.stop.take(),
                    stop_token_ids: self.stop_token_ids.take(),
                    ignore_eos: self.ignore_eos.take(),
                }
            }
        }
    };
}
pub(crate) use with_sampling;

impl Sampling {
    /// The engine's options for a vocabulary of this size.
    ///
    /// # Errors
    /// A field outside the wire's range, by the wire's name.
    pub(crate) fn options(self, vocab_size: usize) -> Result<GenerationOptions> {
        let mut options = GenerationOptions::default();
        options.temperature = number("temperature", self.temperature, 0.0, 2.0, 1.0)?;
        options.top_p = number("top_p", self.top_p, 0.0, 1.0, 1.0)?;
        options.min_p = number("min_p", self.min_p, 0.0, 1.0, 0.0)?;
        options.typical_p = number("typical_p", self.typical_p, 0.0, 1.0, 1.0)?;
        options.presence_penalty =
            number("presence_penalty", self.presence_penalty, -2.0, 2.0, 0.0)?;
        options.frequency_penalty =
            number("frequency_penalty", self.frequency_penalty, -2.0, 2.0, 0.0)?;
        options.repetition_penalty =
            number("repetition_penalty", self.repetition_penalty, 1e-6, 10.0, 1.0)?;
        if let Some(n) = self.penalty_last_n {
            options.penalty_last_n = n;
        }
        options.top_k = match self.top_k.unwrap_or(0) {
            -1 => 0,
            k => u32::try_from(k).map_err(|_| ApiError::invalid("top_k", "-1 to 4294967295", k))?,
        };
        let multiplier = number("dry_multiplier", self.dry_multiplier, 0.0, 100.0, 0.0)?;
        let mut dry = DryOptions::default();
        dry.multiplier = multiplier;
        dry.base = number("dry_base", self.dry_base, 1.0, 10.0, f64::from(dry.base))?;
        dry.allowed_length = self.dry_allowed_length.unwrap_or(dry.allowed_length);
        dry.last_n = self.dry_penalty_last_n.unwrap_or(dry.last_n);
        dry.sequence_breakers = self.dry_sequence_breakers.unwrap_or(dry.sequence_breakers);
        options.dry = (multiplier > 0.0).then_some(dry);
        for (token, bias) in self.logit_bias.unwrap_or_default() {
            let (id, bias) = bias_entry(&token, bias, vocab_size)?;
            options.logit_bias.insert(id, bias);
        }
        // Negative seeds are seeds like any other.
        options.seed = self.seed.map(|seed| seed as u64);
        options.stop = self.stop.map(|stop| stop.0).unwrap_or_default();
        options.stop_token_ids = self.stop_token_ids.unwrap_or_default();
        if let Some(id) = options.stop_token_ids.iter().find(|&&id| id as usize >= vocab_size) {
            let expected = format!("token ids below {vocab_size}");
            return Err(ApiError::invalid("stop_token_ids", &expected, id));
        }
        options.ignore_eos = self.ignore_eos.unwrap_or(false);
        options.validate().map_err(options_error)?;
        Ok(options)
    }
}

/// The engine's complaint about an option, under the wire's name for it.
pub(crate) fn options_error(error: bitnet_inference::options::OptionsError) -> ApiError {
    let name = match error.field {
        "dry.multiplier" => "dry_multiplier",
        "dry.base" => "dry_base",
        "dry.allowed_length" => "dry_allowed_length",
        "dry.sequence_breakers" => "dry_sequence_breakers",
        name => name,
    };
    ApiError::invalid(name, &error.expected, error.got)
}

/// A number within its range, or the default.
pub(crate) fn number(
    name: &str,
    value: Option<f64>,
    low: f64,
    high: f64,
    default: f64,
) -> Result<f32> {
    let value = value.unwrap_or(default);
    if (low..=high).contains(&value) {
        return Ok(value as f32);
    }
    Err(ApiError::invalid(name, &format!("a number from {low} to {high}"), value))
}

fn bias_entry(token: &str, bias: f64, vocab_size: usize) -> Result<(u32, f32)> {
    let id = token.parse::<u32>().ok().filter(|id| (*id as usize) < vocab_size);
    // A leading zero or plus would let two names mean one token.
    let Some(id) = id.filter(|id| id.to_string() == token) else {
        let shown: String = token.chars().take(32).collect();
        let expected = format!("token ids below {vocab_size} as names");
        return Err(ApiError::invalid("logit_bias", &expected, format!("`{shown}`")));
    };
    Ok((id, number("logit_bias", Some(bias), -100.0, 100.0, 0.0)?))
}

/// A text or a list of texts.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct OneOrMany(pub Vec<String>);

schema_as!(OneOrMany, OneOrManySchema);

/// The two forms, for the OpenAPI document.
#[derive(ToSchema)]
#[serde(untagged)]
#[allow(dead_code)] // Read by the derive only.
pub(crate) enum OneOrManySchema {
    One(String),
    Many(Vec<String>),
}

impl<'de> Deserialize<'de> for OneOrMany {
    fn deserialize<D: Deserializer<'de>>(reader: D) -> Result<Self, D::Error> {
        struct Texts;
        impl<'de> Visitor<'de> for Texts {
            type Value = Vec<String>;
            fn expecting(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
                f.write_str("a string or a list of strings")
            }
            fn visit_str<E: de::Error>(self, text: &str) -> Result<Vec<String>, E> {
                Ok(vec![text.to_owned()])
            }
            fn visit_seq<A: SeqAccess<'de>>(self, mut items: A) -> Result<Vec<String>, A::Error> {
                let mut texts = Vec::new();
                while let Some(text) = items.next_element()? {
                    texts.push(text);
                }
                Ok(texts)
            }
        }
        reader.deserialize_any(Texts).map(Self)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn defaults_are_the_wires() {
        let options = Sampling::default().options(100).unwrap();
        assert_eq!((options.temperature, options.top_p, options.top_k), (1.0, 1.0, 0));
        assert_eq!((options.min_p, options.dry), (0.0, None));
    }

    #[test]
    fn each_field_is_refused_outside_its_range_by_name() {
        type Edit = fn(&mut Sampling);
        let cases: [(&str, Edit); 22] = [
            ("temperature", |s| s.temperature = Some(-1.0)),
            ("temperature", |s| s.temperature = Some(2.01)),
            ("temperature", |s| s.temperature = Some(1e308)),
            ("temperature", |s| s.temperature = Some(f64::NAN)),
            ("top_p", |s| s.top_p = Some(2.0)),
            ("top_p", |s| s.top_p = Some(-1.0)),
            ("top_k", |s| s.top_k = Some(-2)),
            ("top_k", |s| s.top_k = Some(1 << 32)),
            ("min_p", |s| s.min_p = Some(1.5)),
            ("typical_p", |s| s.typical_p = Some(-0.5)),
            ("repetition_penalty", |s| s.repetition_penalty = Some(0.0)),
            ("presence_penalty", |s| s.presence_penalty = Some(-2.1)),
            ("frequency_penalty", |s| s.frequency_penalty = Some(2.1)),
            ("dry_multiplier", |s| s.dry_multiplier = Some(-1.0)),
            ("dry_base", |s| s.dry_base = Some(0.0)),
            ("dry_allowed_length", |s| {
                s.dry_multiplier = Some(1.0);
                s.dry_allowed_length = Some(0);
            }),
            ("logit_bias", |s| s.logit_bias = Some([("100".into(), 1.0)].into())),
            ("logit_bias", |s| s.logit_bias = Some([("01".into(), 1.0)].into())),
            ("logit_bias", |s| s.logit_bias = Some([("1".into(), 1e9)].into())),
            ("stop", |s| s.stop = Some(OneOrMany(vec![String::new()]))),
            ("stop", |s| s.stop = Some(OneOrMany(vec!["x".into(); 1000]))),
            ("stop_token_ids", |s| s.stop_token_ids = Some(vec![100])),
        ];
        for (param, edit) in cases {
            let mut sampling = Sampling::default();
            edit(&mut sampling);
            let error = sampling.options(100).unwrap_err();
            assert_eq!(error.param.as_deref(), Some(param), "{error}");
        }
    }

    #[test]
    fn one_text_or_many() {
        let read = |text: &str| serde_json::from_str::<OneOrMany>(text).map(|v| v.0);
        assert_eq!(read(r#""a""#).unwrap(), ["a"]);
        assert_eq!(read(r#"["a","b"]"#).unwrap(), ["a", "b"]);
        assert!(read("1").is_err() && read(r#"["a",1]"#).is_err());
    }
}

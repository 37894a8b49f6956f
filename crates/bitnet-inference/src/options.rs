//! What a caller may ask of one generation, with its defaults and bounds.
//!
//! Knows names and ranges only: the sampler, the stop matcher and the engine give each its meaning.
//! A request from outside is checked by [`GenerationOptions::validate`] before it costs anything.

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};

use crate::grammar::Grammar;

/// Most stop strings one request may carry.
pub const MAX_STOP_STRINGS: usize = 64;
/// Longest stop string, in bytes.
pub const MAX_STOP_BYTES: usize = 1024;
/// Most stop tokens one request may carry.
pub const MAX_STOP_TOKENS: usize = 1024;
/// Most entries of [`GenerationOptions::logit_bias`].
pub const MAX_LOGIT_BIAS: usize = 4096;
/// Most alternatives per token in [`GenerationOptions::logprobs`].
pub const MAX_LOGPROBS: u32 = 100;
/// Most sequence breakers of [`DryOptions`], each of at most this many bytes.
pub const MAX_DRY_BREAKERS: usize = 64;
/// A bias at or below this removes the token instead of lowering its logit.
pub const BAN_BIAS: f32 = -100.0;

/// An option outside its range.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("option `{field}`: expected {expected}, got {got}")]
pub struct OptionsError {
    /// Name of the option, as written in [`GenerationOptions`].
    pub field: &'static str,
    /// The values it accepts.
    pub expected: String,
    /// The value it was given.
    pub got: String,
}

/// How text is generated from one prompt.
///
/// The defaults are those most local engines agree on: temperature 0.8, top-k 40, top-p 0.95,
/// min-p 0.05, no penalties. [`GenerationOptions::greedy`] always takes the likeliest token.
///
/// ```
/// use bitnet_inference::options::GenerationOptions;
///
/// let options = GenerationOptions::new().max_tokens(64).temperature(0.7).seed(42).stop("\n\n");
/// assert!(options.validate().is_ok());
/// assert_eq!(options.top_p(1.5).validate().unwrap_err().field, "top_p");
/// ```
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
#[non_exhaustive]
pub struct GenerationOptions {
    /// Most tokens to generate; `None`: as many as the context still holds.
    pub max_tokens: Option<u32>,
    /// Divides the logits before the draw; 0 takes the likeliest token. 0 to 100.
    pub temperature: f32,
    /// Keep the `k` likeliest tokens; 0 keeps all.
    pub top_k: u32,
    /// Keep the likeliest tokens that together reach this probability; 1 keeps all. 0 to 1.
    pub top_p: f32,
    /// Keep tokens at least this fraction as likely as the likeliest; 0 keeps all. 0 to 1.
    pub min_p: f32,
    /// Keep the tokens whose surprise is nearest the expected surprise, up to this probability
    /// (locally typical sampling); 1 keeps all. 0 to 1.
    pub typical_p: f32,
    /// Divides positive and multiplies negative logits of tokens among the last
    /// [`penalty_last_n`](Self::penalty_last_n) of prompt and answer; 1 changes nothing. Above 0, to 10.
    pub repetition_penalty: f32,
    /// Window of the repetition penalty in tokens; 0 turns it off, `u32::MAX` looks at everything.
    pub penalty_last_n: u32,
    /// Subtracted from the logit of every token the answer already holds. -2 to 2.
    pub presence_penalty: f32,
    /// Subtracted from a token's logit once for each time the answer holds it. -2 to 2.
    pub frequency_penalty: f32,
    /// Penalty on continuing a repeated sequence; `None` for none.
    pub dry: Option<DryOptions>,
    /// Added to the logits of these tokens; at -100 and below the token cannot be drawn. Up to 100.
    pub logit_bias: BTreeMap<u32, f32>,
    /// Makes the draws repeatable; `None` picks a new seed for every request.
    pub seed: Option<u64>,
    /// Texts that end the answer; they are not part of it.
    pub stop: Vec<String>,
    /// Tokens that end the answer, besides the model's own end tokens.
    pub stop_token_ids: Vec<u32>,
    /// Go on when the model emits its end token.
    pub ignore_eos: bool,
    /// Report the log-probability of each token and of this many alternatives. The probabilities
    /// are the model's own, before biases, penalties, filters and temperature.
    pub logprobs: Option<u32>,
    /// The language the answer must belong to. Every token is drawn among those that keep it
    /// possible, and the answer ends once it is complete and nothing may follow.
    pub grammar: Option<Grammar>,
}

impl Default for GenerationOptions {
    fn default() -> Self {
        Self {
            max_tokens: None,
            temperature: 0.8,
            top_k: 40,
            top_p: 0.95,
            min_p: 0.05,
            typical_p: 1.0,
            repetition_penalty: 1.0,
            penalty_last_n: 64,
            presence_penalty: 0.0,
            frequency_penalty: 0.0,
            dry: None,
            logit_bias: BTreeMap::new(),
            seed: None,
            stop: Vec::new(),
            stop_token_ids: Vec::new(),
            ignore_eos: false,
            logprobs: None,
            grammar: None,
        }
    }
}

/// "Don't repeat yourself": a token that would extend a repetition of `m` tokens loses
/// `multiplier * base^(m - allowed_length)` of its logit, once `m` reaches `allowed_length`.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
#[non_exhaustive]
pub struct DryOptions {
    /// Penalty at `m = allowed_length`. 0 to 100; 0 changes nothing.
    pub multiplier: f32,
    /// Growth of the penalty with each further repeated token. 1 to 10.
    pub base: f32,
    /// Repetitions shorter than this are free. At least 1.
    pub allowed_length: u32,
    /// How many of the last tokens of prompt and answer to search; `u32::MAX` searches all.
    pub last_n: u32,
    /// Texts across which no repetition counts; a token holding one of them is a border.
    pub sequence_breakers: Vec<String>,
}

impl Default for DryOptions {
    fn default() -> Self {
        Self {
            multiplier: 0.8,
            base: 1.75,
            allowed_length: 2,
            last_n: u32::MAX,
            sequence_breakers: ["\n", ":", "\"", "*"].map(String::from).to_vec(),
        }
    }
}

impl GenerationOptions {
    /// The defaults.
    pub fn new() -> Self {
        Self::default()
    }

    /// The likeliest token at every step: the same answer every time, without a seed.
    pub fn greedy() -> Self {
        Self { temperature: 0.0, ..Self::default() }
    }

    /// Whether every step takes the likeliest token.
    pub fn is_greedy(&self) -> bool {
        self.temperature == 0.0
    }

    /// Sets [`max_tokens`](Self::max_tokens).
    #[must_use]
    pub fn max_tokens(mut self, n: u32) -> Self {
        self.max_tokens = Some(n);
        self
    }

    /// Sets [`temperature`](Self::temperature).
    #[must_use]
    pub fn temperature(mut self, temperature: f32) -> Self {
        self.temperature = temperature;
        self
    }

    /// Sets [`top_k`](Self::top_k).
    #[must_use]
    pub fn top_k(mut self, k: u32) -> Self {
        self.top_k = k;
        self
    }

    /// Sets [`top_p`](Self::top_p).
    #[must_use]
    pub fn top_p(mut self, p: f32) -> Self {
        self.top_p = p;
        self
    }

    /// Sets [`min_p`](Self::min_p).
    #[must_use]
    pub fn min_p(mut self, p: f32) -> Self {
        self.min_p = p;
        self
    }

    /// Sets [`typical_p`](Self::typical_p).
    #[must_use]
    pub fn typical_p(mut self, p: f32) -> Self {
        self.typical_p = p;
        self
    }

    /// Sets [`repetition_penalty`](Self::repetition_penalty) and its window.
    #[must_use]
    pub fn repetition_penalty(mut self, penalty: f32, last_n: u32) -> Self {
        self.repetition_penalty = penalty;
        self.penalty_last_n = last_n;
        self
    }

    /// Sets [`presence_penalty`](Self::presence_penalty).
    #[must_use]
    pub fn presence_penalty(mut self, penalty: f32) -> Self {
        self.presence_penalty = penalty;
        self
    }

    /// Sets [`frequency_penalty`](Self::frequency_penalty).
    #[must_use]
    pub fn frequency_penalty(mut self, penalty: f32) -> Self {
        self.frequency_penalty = penalty;
        self
    }

    /// Sets [`dry`](Self::dry).
    #[must_use]
    pub fn dry(mut self, dry: DryOptions) -> Self {
        self.dry = Some(dry);
        self
    }

    /// Adds one entry to [`logit_bias`](Self::logit_bias).
    #[must_use]
    pub fn logit_bias(mut self, token: u32, bias: f32) -> Self {
        self.logit_bias.insert(token, bias);
        self
    }

    /// Sets [`seed`](Self::seed).
    #[must_use]
    pub fn seed(mut self, seed: u64) -> Self {
        self.seed = Some(seed);
        self
    }

    /// Adds one text to [`stop`](Self::stop).
    #[must_use]
    pub fn stop(mut self, text: impl Into<String>) -> Self {
        self.stop.push(text.into());
        self
    }

    /// Adds one token to [`stop_token_ids`](Self::stop_token_ids).
    #[must_use]
    pub fn stop_token(mut self, token: u32) -> Self {
        self.stop_token_ids.push(token);
        self
    }

    /// Sets [`ignore_eos`](Self::ignore_eos).
    #[must_use]
    pub fn ignore_eos(mut self, ignore: bool) -> Self {
        self.ignore_eos = ignore;
        self
    }

    /// Sets [`logprobs`](Self::logprobs).
    #[must_use]
    pub fn logprobs(mut self, alternatives: u32) -> Self {
        self.logprobs = Some(alternatives);
        self
    }

    /// Sets [`grammar`](Self::grammar).
    #[must_use]
    pub fn grammar(mut self, grammar: Grammar) -> Self {
        self.grammar = Some(grammar);
        self
    }

    /// The options of the `i`-th of several answers to one prompt: with a seed, each has its own, and
    /// the first is what a single answer would be.
    #[must_use]
    pub fn for_choice(&self, i: u64) -> Self {
        Self { seed: self.seed.map(|seed| seed.wrapping_add(i)), ..self.clone() }
    }

    /// Checks every option against its range; the first that fails is reported.
    pub fn validate(&self) -> Result<(), OptionsError> {
        in_range("temperature", self.temperature, 0.0, 100.0)?;
        in_range("top_p", self.top_p, 0.0, 1.0)?;
        in_range("min_p", self.min_p, 0.0, 1.0)?;
        in_range("typical_p", self.typical_p, 0.0, 1.0)?;
        // The smallest positive normal number stands for "above 0".
        in_range("repetition_penalty", self.repetition_penalty, f32::MIN_POSITIVE, 10.0)?;
        in_range("presence_penalty", self.presence_penalty, -2.0, 2.0)?;
        in_range("frequency_penalty", self.frequency_penalty, -2.0, 2.0)?;
        at_most("logit_bias", "entries", self.logit_bias.len(), MAX_LOGIT_BIAS)?;
        for (token, &bias) in &self.logit_bias {
            // Minus infinity is a ban like -100.
            if bias.is_nan() || bias > 100.0 {
                let expected = "a number up to 100".to_owned();
                return Err(error("logit_bias", expected, format!("{bias} for token {token}")));
            }
        }
        if self.logprobs.is_some_and(|n| n > MAX_LOGPROBS) {
            let got = self.logprobs.unwrap_or_default();
            return Err(error("logprobs", format!("at most {MAX_LOGPROBS}"), got.to_string()));
        }
        at_most("stop_token_ids", "tokens", self.stop_token_ids.len(), MAX_STOP_TOKENS)?;
        texts("stop", &self.stop, MAX_STOP_STRINGS)?;
        if let Some(grammar) = &self.grammar {
            grammar.check_size()?;
        }
        match &self.dry {
            Some(dry) => dry.validate(),
            None => Ok(()),
        }
    }
}

impl DryOptions {
    fn validate(&self) -> Result<(), OptionsError> {
        in_range("dry.multiplier", self.multiplier, 0.0, 100.0)?;
        in_range("dry.base", self.base, 1.0, 10.0)?;
        if self.allowed_length == 0 {
            return Err(error("dry.allowed_length", "at least 1".into(), "0".into()));
        }
        texts("dry.sequence_breakers", &self.sequence_breakers, MAX_DRY_BREAKERS)
    }
}

fn error(field: &'static str, expected: String, got: String) -> OptionsError {
    OptionsError { field, expected, got }
}

fn in_range(field: &'static str, got: f32, low: f32, high: f32) -> Result<(), OptionsError> {
    // Written so that NaN fails.
    if (low..=high).contains(&got) {
        return Ok(());
    }
    let low = if low == f32::MIN_POSITIVE { "above 0".to_owned() } else { low.to_string() };
    Err(error(field, format!("{low} to {high}"), got.to_string()))
}

fn at_most(field: &'static str, of: &str, got: usize, limit: usize) -> Result<(), OptionsError> {
    if got <= limit {
        return Ok(());
    }
    Err(error(field, format!("at most {limit} {of}"), got.to_string()))
}

fn texts(field: &'static str, texts: &[String], limit: usize) -> Result<(), OptionsError> {
    at_most(field, "texts", texts.len(), limit)?;
    for text in texts {
        if text.is_empty() || text.len() > MAX_STOP_BYTES {
            let expected = format!("texts of 1 to {MAX_STOP_BYTES} bytes");
            return Err(error(field, expected, format!("{} bytes", text.len())));
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn defaults_and_greedy_are_valid() {
        GenerationOptions::default().validate().unwrap();
        GenerationOptions::greedy().validate().unwrap();
        GenerationOptions::new().dry(DryOptions::default()).validate().unwrap();
        assert!(GenerationOptions::greedy().is_greedy() && !GenerationOptions::new().is_greedy());
    }

    #[test]
    fn each_option_rejects_what_lies_outside_its_range() {
        let new = GenerationOptions::new;
        let dry = |edit: fn(&mut DryOptions)| {
            let mut options = DryOptions::default();
            edit(&mut options);
            new().dry(options)
        };
        let cases: Vec<(&str, GenerationOptions)> = vec![
            ("temperature", new().temperature(-1.0)),
            ("temperature", new().temperature(f32::NAN)),
            ("temperature", new().temperature(f32::MAX)),
            ("top_p", new().top_p(-0.1)),
            ("top_p", new().top_p(2.0)),
            ("min_p", new().min_p(f32::NAN)),
            ("min_p", new().min_p(1.01)),
            ("typical_p", new().typical_p(-1.0)),
            ("repetition_penalty", new().repetition_penalty(0.0, 64)),
            ("repetition_penalty", new().repetition_penalty(-1.0, 64)),
            ("repetition_penalty", new().repetition_penalty(f32::INFINITY, 64)),
            ("presence_penalty", new().presence_penalty(2.5)),
            ("frequency_penalty", new().frequency_penalty(-2.5)),
            ("logit_bias", new().logit_bias(3, 1e9)),
            ("logit_bias", new().logit_bias(3, f32::NAN)),
            ("logprobs", new().logprobs(MAX_LOGPROBS + 1)),
            ("stop", new().stop("")),
            ("stop", new().stop("x".repeat(MAX_STOP_BYTES + 1))),
            ("stop", (0..=MAX_STOP_STRINGS).fold(new(), |o, i| o.stop(i.to_string()))),
            ("stop_token_ids", (0..=MAX_STOP_TOKENS as u32).fold(new(), |o, i| o.stop_token(i))),
            ("logit_bias", (0..=MAX_LOGIT_BIAS as u32).fold(new(), |o, i| o.logit_bias(i, 0.0))),
            ("dry.multiplier", dry(|d| d.multiplier = -0.1)),
            ("dry.base", dry(|d| d.base = 0.5)),
            ("dry.base", dry(|d| d.base = f32::NAN)),
            ("dry.allowed_length", dry(|d| d.allowed_length = 0)),
            ("dry.sequence_breakers", dry(|d| d.sequence_breakers.push(String::new()))),
        ];
        for (field, options) in cases {
            let error = options.validate().expect_err(field);
            assert_eq!(error.field, field, "{error}");
        }
    }

    #[test]
    fn the_error_names_option_range_and_value() {
        let error = GenerationOptions::new().repetition_penalty(-1.0, 8).validate().unwrap_err();
        assert_eq!(
            error.to_string(),
            "option `repetition_penalty`: expected above 0 to 10, got -1"
        );
    }

    #[test]
    fn bans_may_be_written_as_minus_infinity() {
        GenerationOptions::new().logit_bias(1, f32::NEG_INFINITY).validate().unwrap();
    }

    #[test]
    fn json_round_trips_and_unknown_names_are_refused() {
        let options = GenerationOptions::new()
            .seed(7)
            .logit_bias(5, -2.5)
            .stop("§")
            .dry(DryOptions::default());
        let json = serde_json::to_string(&options).unwrap();
        assert_eq!(serde_json::from_str::<GenerationOptions>(&json).unwrap(), options);
        let partial: GenerationOptions = serde_json::from_str(r#"{"temperature":0}"#).unwrap();
        assert_eq!(partial, GenerationOptions::greedy());
        assert!(serde_json::from_str::<GenerationOptions>(r#"{"temprature":0}"#).is_err());
    }
}

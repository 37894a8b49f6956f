//! How the next token is chosen.

use bitnet_inference::options::{DryOptions, GenerationOptions};
use clap::Args;

use crate::exit::Usage;

/// How the next token is chosen.
#[derive(Debug, Clone, Default, Args)]
#[command(next_help_heading = "Sampling")]
pub(crate) struct SamplingArgs {
    /// Most tokens to generate
    #[arg(short = 'n', long, value_name = "N", allow_negative_numbers = true)]
    pub(crate) max_tokens: Option<u32>,
    /// Higher is more surprising; 0 always takes the likeliest token [default: 0.8]
    #[arg(
        long,
        alias = "temp",
        value_name = "T",
        conflicts_with = "greedy",
        allow_negative_numbers = true
    )]
    pub(crate) temperature: Option<f32>,
    /// Always take the likeliest token: the same text every time
    #[arg(long)]
    pub(crate) greedy: bool,
    /// Keep the K likeliest tokens; 0 keeps all [default: 40]
    #[arg(long, value_name = "K", allow_negative_numbers = true)]
    pub(crate) top_k: Option<u32>,
    /// Keep the likeliest tokens that together reach this probability [default: 0.95]
    #[arg(long, value_name = "P", allow_negative_numbers = true)]
    pub(crate) top_p: Option<f32>,
    /// Keep tokens at least this fraction as likely as the likeliest [default: 0.05]
    #[arg(long, value_name = "P", allow_negative_numbers = true)]
    pub(crate) min_p: Option<f32>,
    /// Keep the tokens nearest the expected surprise, up to this probability [default: 1]
    #[arg(long, value_name = "P", allow_negative_numbers = true)]
    pub(crate) typical_p: Option<f32>,
    /// Make recent tokens less likely by this factor [default: 1]
    #[arg(long, alias = "repeat-penalty", value_name = "X", allow_negative_numbers = true)]
    pub(crate) repetition_penalty: Option<f32>,
    /// How many recent tokens the repetition penalty looks at [default: 64]
    #[arg(long, alias = "repeat-last-n", value_name = "N")]
    pub(crate) penalty_last_n: Option<u32>,
    /// Lower the logit of every token the answer already holds [default: 0]
    #[arg(long, value_name = "X", allow_negative_numbers = true)]
    pub(crate) presence_penalty: Option<f32>,
    /// Lower a token's logit each time the answer uses it [default: 0]
    #[arg(long, value_name = "X", allow_negative_numbers = true)]
    pub(crate) frequency_penalty: Option<f32>,
    /// DRY: penalty on continuing a repeated sequence, such as 0.8 [default: 0, off]
    #[arg(long, value_name = "X", allow_negative_numbers = true)]
    pub(crate) dry_multiplier: Option<f32>,
    /// DRY: growth of the penalty with each further repeated token [default: 1.75]
    #[arg(long, value_name = "X", allow_negative_numbers = true)]
    pub(crate) dry_base: Option<f32>,
    /// DRY: repetitions shorter than this are free [default: 2]
    #[arg(long, value_name = "N")]
    pub(crate) dry_allowed_length: Option<u32>,
    /// DRY: how many recent tokens to search [default: all]
    #[arg(long, value_name = "N")]
    pub(crate) dry_last_n: Option<u32>,
    /// DRY: text across which no repetition counts; may be given several times
    #[arg(long, value_name = "TEXT", value_parser = unescape)]
    pub(crate) dry_sequence_breaker: Vec<String>,
    /// Make the draws repeatable
    #[arg(long, value_name = "N", allow_negative_numbers = true)]
    pub(crate) seed: Option<u64>,
    /// End before this text; may be given several times; \n and \t are understood
    #[arg(long, value_name = "TEXT", value_parser = unescape)]
    pub(crate) stop: Vec<String>,
    /// End at this token; may be given several times
    #[arg(long, value_name = "ID")]
    pub(crate) stop_token: Vec<u32>,
    /// Go on when the model wants to end
    #[arg(long)]
    pub(crate) ignore_eos: bool,
    /// Add to a token's logit, as 1234=-2.5; -100 forbids it; may be given several times
    #[arg(long, value_name = "ID=BIAS", value_parser = logit_bias)]
    pub(crate) logit_bias: Vec<(u32, f32)>,
}

impl SamplingArgs {
    /// `base` with what was given on the command line, and a seed that can be reported.
    ///
    /// # Errors
    /// A value outside its range.
    pub(crate) fn options(&self, base: GenerationOptions) -> anyhow::Result<GenerationOptions> {
        fn set<T: Copy>(field: &mut T, given: Option<T>) {
            if let Some(given) = given {
                *field = given;
            }
        }
        let mut options = base;
        options.max_tokens = self.max_tokens.or(options.max_tokens);
        set(&mut options.temperature, self.temperature.or(self.greedy.then_some(0.0)));
        set(&mut options.top_k, self.top_k);
        set(&mut options.top_p, self.top_p);
        set(&mut options.min_p, self.min_p);
        set(&mut options.typical_p, self.typical_p);
        set(&mut options.repetition_penalty, self.repetition_penalty);
        set(&mut options.penalty_last_n, self.penalty_last_n);
        set(&mut options.presence_penalty, self.presence_penalty);
        set(&mut options.frequency_penalty, self.frequency_penalty);
        options.dry = self.dry(options.dry)?;
        options.seed = self.seed.or(options.seed);
        options.stop.extend(self.stop.iter().cloned());
        options.stop_token_ids.extend(&self.stop_token);
        options.ignore_eos |= self.ignore_eos;
        options.logit_bias.extend(self.logit_bias.iter().copied());
        options.validate().map_err(|error| Usage::error(error.to_string()))?;
        Ok(options)
    }

    fn dry(&self, base: Option<DryOptions>) -> anyhow::Result<Option<DryOptions>> {
        let details = self.dry_base.is_some()
            || self.dry_allowed_length.is_some()
            || self.dry_last_n.is_some()
            || !self.dry_sequence_breaker.is_empty();
        let Some(multiplier) = self.dry_multiplier else {
            if details && base.is_none() {
                let message =
                    "the --dry-… options need --dry-multiplier, such as --dry-multiplier 0.8";
                return Err(Usage::error(message));
            }
            return Ok(base);
        };
        if multiplier == 0.0 {
            return Ok(None);
        }
        let mut dry = base.unwrap_or_default();
        dry.multiplier = multiplier;
        dry.base = self.dry_base.unwrap_or(dry.base);
        dry.allowed_length = self.dry_allowed_length.unwrap_or(dry.allowed_length);
        dry.last_n = self.dry_last_n.unwrap_or(dry.last_n);
        if !self.dry_sequence_breaker.is_empty() {
            dry.sequence_breakers.clone_from(&self.dry_sequence_breaker);
        }
        Ok(Some(dry))
    }
}

/// A seed nobody chose; drawn here and not by the engine so that it can be reported.
pub(crate) fn fresh_seed() -> u64 {
    use std::hash::{BuildHasher, RandomState};
    // Small enough that every JSON reader keeps it exactly.
    RandomState::new().hash_one(std::process::id()) >> 32
}

/// Text in which a shell user wrote `\n`, `\t`, `\r` or `\\`.
fn unescape(text: &str) -> Result<String, String> {
    let mut out = String::with_capacity(text.len());
    let mut chars = text.chars();
    while let Some(c) = chars.next() {
        out.push(match c {
            '\\' => match chars.next() {
                Some('n') => '\n',
                Some('t') => '\t',
                Some('r') => '\r',
                Some('\\') => '\\',
                Some(other) => {
                    return Err(format!(
                        "unknown escape \\{other}; \\n, \\t, \\r and \\\\ are known"
                    ));
                }
                None => return Err("a lone \\ at the end; write \\\\".into()),
            },
            c => c,
        });
    }
    match out.is_empty() {
        true => Err("expected some text".into()),
        false => Ok(out),
    }
}

fn logit_bias(text: &str) -> Result<(u32, f32), String> {
    let expected = || format!("expected TOKEN_ID=BIAS, such as 1234=-2.5, got '{text}'");
    let (id, bias) = text.split_once('=').ok_or_else(expected)?;
    let id = id.trim().parse().map_err(|_| expected())?;
    Ok((id, bias.trim().parse().map_err(|_| expected())?))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn flags_change_only_what_they_name() {
        let base = GenerationOptions::default().max_tokens(5).temperature(0.3);
        assert_eq!(SamplingArgs::default().options(base.clone()).unwrap(), base);
        let args = SamplingArgs { top_k: Some(7), greedy: true, ..SamplingArgs::default() };
        let options = args.options(base.clone()).unwrap();
        let expected = base.top_k(7).temperature(0.0);
        assert_eq!(options, expected);
    }

    #[test]
    fn help_tells_the_defaults_in_force() {
        let (options, dry) = (GenerationOptions::default(), DryOptions::default());
        let help = SamplingArgs::augment_args(clap::Command::new("x")).render_long_help();
        let help = help.to_string();
        for (flag, default) in [
            ("--temperature", options.temperature),
            ("--top-k", options.top_k as f32),
            ("--top-p", options.top_p),
            ("--min-p", options.min_p),
            ("--typical-p", options.typical_p),
            ("--repetition-penalty", options.repetition_penalty),
            ("--penalty-last-n", options.penalty_last_n as f32),
            ("--presence-penalty", options.presence_penalty),
            ("--frequency-penalty", options.frequency_penalty),
            ("--dry-base", dry.base),
            ("--dry-allowed-length", dry.allowed_length as f32),
        ] {
            let text = &help[help.find(&format!("{flag} ")).expect(flag)..];
            let (_, after) = text.split_once("[default: ").expect(flag);
            assert!(after.starts_with(&format!("{default}]")), "{flag} is {default}: {text}");
        }
        assert!(options.dry.is_none() && dry.last_n == u32::MAX);
    }

    #[test]
    fn dry_starts_with_its_multiplier() {
        let args = SamplingArgs { dry_base: Some(2.0), ..SamplingArgs::default() };
        assert!(args.options(GenerationOptions::default()).is_err());
        let args = SamplingArgs { dry_multiplier: Some(0.5), ..args };
        let dry = args.options(GenerationOptions::default()).unwrap().dry.unwrap();
        assert_eq!((dry.multiplier, dry.base), (0.5, 2.0));
        let off = SamplingArgs { dry_multiplier: Some(0.0), ..SamplingArgs::default() };
        assert_eq!(off.options(GenerationOptions::default()).unwrap().dry, None);
    }

    #[test]
    fn values_out_of_range_are_a_wrong_use() {
        let args = SamplingArgs { top_p: Some(2.0), ..SamplingArgs::default() };
        let error = args.options(GenerationOptions::default()).unwrap_err();
        assert!(error.is::<Usage>(), "{error}");
    }

    #[test]
    fn escapes_and_biases() {
        assert_eq!(unescape(r"a\n\\b").unwrap(), "a\n\\b");
        assert!(unescape(r"\x").is_err() && unescape("a\\").is_err() && unescape("").is_err());
        assert_eq!(logit_bias("12=-2.5").unwrap(), (12, -2.5));
        assert!(logit_bias("12").is_err() && logit_bias("x=1").is_err());
    }
}

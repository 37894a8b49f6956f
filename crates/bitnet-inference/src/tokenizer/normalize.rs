//! Rewrites a text before it is cut into words: Unicode normal forms, visible spaces, replacements.

use tokenizers::NormalizedString;

use super::error::TokenizerError;
use super::pattern::Pattern;

/// One rewriting of a whole text.
#[derive(Debug, Clone)]
pub(super) enum Normalizer {
    /// A Unicode normal form.
    Unicode(Form),
    /// Lower case.
    Lowercase,
    /// Text put before every text that is not empty.
    Prepend(String),
    /// Every occurrence of a text becomes another.
    Replace { from: String, to: String },
    /// Every match of a pattern becomes a text.
    ReplacePattern { from: Pattern, to: String },
    /// White space at the ends is removed.
    Strip { left: bool, right: bool },
}

/// A Unicode normal form.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Form {
    Nfc,
    Nfd,
    Nfkc,
    Nfkd,
}

impl Normalizer {
    pub(super) fn run(&self, text: String) -> Result<String, TokenizerError> {
        Ok(match self {
            // ASCII is in every normal form.
            Self::Unicode(_) if text.is_ascii() => text,
            Self::Unicode(form) => {
                let mut normalized = NormalizedString::from(text);
                match form {
                    Form::Nfc => normalized.nfc(),
                    Form::Nfd => normalized.nfd(),
                    Form::Nfkc => normalized.nfkc(),
                    Form::Nfkd => normalized.nfkd(),
                };
                normalized.get().to_owned()
            }
            // One character at a time: the final sigma has no form of its own here.
            Self::Lowercase => text.chars().flat_map(char::to_lowercase).collect(),
            Self::Prepend(prefix) if text.is_empty() || prefix.is_empty() => text,
            Self::Prepend(prefix) => format!("{prefix}{text}"),
            Self::Replace { from, to } => text.replace(from, to),
            Self::ReplacePattern { from, to } => {
                let mut out = String::with_capacity(text.len());
                for (range, is_match) in from.split(&text)? {
                    out.push_str(if is_match { to } else { &text[range] });
                }
                out
            }
            Self::Strip { left, right } => {
                let trimmed = if *left { text.trim_start() } else { &text };
                (if *right { trimmed.trim_end() } else { trimmed }).to_owned()
            }
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_rewriting() {
        let run = |normalizer: Normalizer, text: &str| normalizer.run(text.to_owned()).unwrap();
        assert_eq!(run(Normalizer::Unicode(Form::Nfc), "e\u{301}ﬁ"), "éﬁ");
        assert_eq!(run(Normalizer::Unicode(Form::Nfkc), "e\u{301}ﬁ"), "éfi");
        assert_eq!(run(Normalizer::Unicode(Form::Nfd), "é"), "e\u{301}");
        assert_eq!(run(Normalizer::Unicode(Form::Nfkd), "ﬁ"), "fi");
        assert_eq!(run(Normalizer::Lowercase, "AÉΣ"), "aéσ");
        assert_eq!(run(Normalizer::Prepend("▁".into()), "a"), "▁a");
        assert_eq!(run(Normalizer::Prepend("▁".into()), ""), "");
        assert_eq!(run(Normalizer::Replace { from: " ".into(), to: "▁".into() }, " a b"), "▁a▁b");
        let spaces = Pattern::new(r"\s+").unwrap();
        let replace = Normalizer::ReplacePattern { from: spaces, to: "_".into() };
        assert_eq!(run(replace, "a \n b"), "a_b");
        assert_eq!(run(Normalizer::Strip { left: true, right: false }, " a "), "a ");
        assert_eq!(run(Normalizer::Strip { left: false, right: true }, " a "), " a");
    }
}

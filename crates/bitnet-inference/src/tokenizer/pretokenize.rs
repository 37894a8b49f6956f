//! Cuts a text into words, inside which a tokenizer merges, and writes the words in its alphabet.
//!
//! Each step works on the words the one before it left. Mirrors the pre-tokenizers of Hugging
//! Face's tokenizers, whose JSON names the variants here come from.

use std::ops::Range;

use serde::Deserialize;

use super::alphabet;
use super::error::TokenizerError;
use super::names;
use super::pattern::Pattern;

/// A text with the words it is cut into; what lies between words is dropped.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Words {
    pub(super) text: String,
    pub(super) ranges: Vec<Range<usize>>,
    /// Whether the text stands at the very beginning of what is encoded.
    pub(super) at_start: bool,
}

impl Words {
    /// One word.
    pub(super) fn new(text: String, at_start: bool) -> Self {
        let whole = 0..text.len();
        Self { text, ranges: if whole.is_empty() { Vec::new() } else { vec![whole] }, at_start }
    }

    pub(super) fn iter(&self) -> impl Iterator<Item = &str> {
        self.ranges.iter().map(|range| &self.text[range.clone()])
    }

    /// Cuts every word further: `cut` gets a word and returns ranges in it.
    fn cut(
        &mut self,
        mut cut: impl FnMut(&str) -> Result<Vec<Range<usize>>, TokenizerError>,
    ) -> Result<(), TokenizerError> {
        let mut ranges = Vec::with_capacity(self.ranges.len());
        for word in &self.ranges {
            let parts = cut(&self.text[word.clone()])?.into_iter().filter(|part| !part.is_empty());
            ranges.extend(parts.map(|part| word.start + part.start..word.start + part.end));
        }
        self.ranges = ranges;
        Ok(())
    }

    /// Writes every word anew; `write` also learns whether the word begins the whole text.
    fn rewrite(&mut self, mut write: impl FnMut(&str, bool, &mut String)) {
        let mut text = String::with_capacity(self.text.len() + self.text.len() / 2);
        for range in &mut self.ranges {
            let start = text.len();
            write(&self.text[range.clone()], self.at_start && range.start == 0, &mut text);
            *range = start..text.len();
        }
        self.text = text;
    }
}

/// What becomes of a delimiter.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Deserialize)]
pub(super) enum Behavior {
    /// It is dropped.
    Removed,
    /// It is a word.
    Isolated,
    /// It ends the word before it.
    MergedWithPrevious,
    /// It begins the word after it.
    MergedWithNext,
    /// Delimiters in a row are one word.
    Contiguous,
}

/// One step.
#[derive(Debug, Clone)]
pub(super) enum Step {
    /// Cut at the matches of a pattern (with `invert`: at what does not match).
    Split { pattern: Pattern, behavior: Behavior, invert: bool },
    /// Cut at each digit, or at runs of digits.
    Digits { individual: bool },
    /// Write spaces as another character, perhaps put one first, perhaps cut before each.
    Metaspace { replacement: char, prepend: Prepend, split: bool },
    /// Write bytes as characters, perhaps after putting a space first.
    Bytes { prefix_space: bool, words: Option<Pattern> },
}

/// Where a text gets a leading space it does not have.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "snake_case")]
pub(super) enum Prepend {
    /// At the beginning of the whole text.
    First,
    /// Nowhere.
    Never,
    /// At every word there is so far.
    Always,
}

impl Step {
    /// The steps for a byte-level vocabulary whose pre-tokenizer has this name in GGUF.
    pub(super) fn named(name: &str) -> Result<Vec<Self>, TokenizerError> {
        let patterns = names::patterns(name).ok_or_else(|| TokenizerError::Unsupported {
            what: "pre-tokenizer",
            got: name.to_owned(),
            supported: names::supported(),
        })?;
        let mut steps = Vec::with_capacity(patterns.len() + 1);
        for pattern in patterns {
            let pattern = Pattern::new(pattern)?;
            steps.push(Self::Split { pattern, behavior: Behavior::Isolated, invert: false });
        }
        steps.push(Self::Bytes { prefix_space: false, words: None });
        Ok(steps)
    }

    /// Cuts at punctuation: Unicode's category P and the ASCII symbols.
    pub(super) fn punctuation(behavior: Behavior) -> Result<Self, TokenizerError> {
        let pattern = Pattern::new(r"[\p{P}$+<=>^`|~]")?;
        Ok(Self::Split { pattern, behavior, invert: false })
    }

    /// Works on `words` in place.
    pub(super) fn run(&self, words: &mut Words) -> Result<(), TokenizerError> {
        match self {
            Self::Split { pattern, behavior, invert } => words.cut(|word| {
                let mut pieces = pattern.split(word)?;
                pieces.iter_mut().for_each(|(_, is_match)| *is_match ^= invert);
                Ok(behavior.apply(pieces))
            }),
            Self::Digits { individual } => {
                let behavior = if *individual { Behavior::Isolated } else { Behavior::Contiguous };
                words.cut(|word| Ok(behavior.apply(char_pieces(word, char::is_numeric))))
            }
            Self::Metaspace { replacement, prepend, split } => {
                words.rewrite(|word, is_first, out| {
                    let wanted = match prepend {
                        Prepend::First => is_first,
                        Prepend::Never => false,
                        Prepend::Always => true,
                    };
                    if wanted && !word.starts_with([' ', *replacement]) {
                        out.push(*replacement);
                    }
                    out.extend(word.chars().map(|c| if c == ' ' { *replacement } else { c }));
                });
                if !split {
                    return Ok(());
                }
                words.cut(|word| {
                    let pieces = char_pieces(word, |c| c == *replacement);
                    Ok(Behavior::MergedWithNext.apply(pieces))
                })
            }
            Self::Bytes { prefix_space, words: pattern } => {
                if *prefix_space {
                    words.rewrite(|word, _, out| {
                        if !word.starts_with(' ') {
                            out.push(' ');
                        }
                        out.push_str(word);
                    });
                }
                if let Some(pattern) = pattern {
                    words.cut(|word| Ok(Behavior::Isolated.apply(pattern.split(word)?)))?;
                }
                words.rewrite(|word, _, out| alphabet::push_chars(word.as_bytes(), out));
                Ok(())
            }
        }
    }
}

/// Pieces that cover the word: each character of the class, and what lies between.
fn char_pieces(word: &str, class: impl Fn(char) -> bool) -> Vec<(Range<usize>, bool)> {
    let mut pieces: Vec<(Range<usize>, bool)> = Vec::new();
    for (start, c) in word.char_indices() {
        let end = start + c.len_utf8();
        match pieces.last_mut() {
            Some((range, false)) if !class(c) => range.end = end,
            _ => pieces.push((start..end, class(c))),
        }
    }
    pieces
}

impl Behavior {
    /// Turns pieces that cover a word (delimiters: `true`) into words.
    fn apply(self, pieces: Vec<(Range<usize>, bool)>) -> Vec<Range<usize>> {
        let mut words: Vec<Range<usize>> = Vec::with_capacity(pieces.len());
        let mut previous = false;
        let extend = |words: &mut Vec<Range<usize>>, range: Range<usize>, joined: bool| match words
            .last_mut()
        {
            Some(last) if joined => last.end = range.end,
            _ => words.push(range),
        };
        match self {
            Self::Isolated => words.extend(pieces.into_iter().map(|(range, _)| range)),
            Self::Removed => {
                words.extend(pieces.into_iter().filter(|(_, m)| !m).map(|(range, _)| range));
            }
            Self::Contiguous => {
                for (range, is_match) in pieces {
                    extend(&mut words, range, is_match == previous);
                    previous = is_match;
                }
            }
            Self::MergedWithPrevious => {
                for (range, is_match) in pieces {
                    extend(&mut words, range, is_match && !previous);
                    previous = is_match;
                }
            }
            Self::MergedWithNext => {
                // A delimiter takes the following piece in, unless that is a delimiter itself.
                for (range, is_match) in pieces {
                    extend(&mut words, range, previous && !is_match);
                    previous = is_match;
                }
            }
        }
        words
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn words(steps: &[Step], text: &str) -> Vec<String> {
        let mut words = Words::new(text.to_owned(), true);
        steps.iter().for_each(|step| step.run(&mut words).unwrap());
        words.iter().map(str::to_owned).collect()
    }

    fn split(behavior: Behavior, invert: bool) -> Step {
        Step::Split { pattern: Pattern::new("-").unwrap(), behavior, invert }
    }

    #[test]
    fn behaviors() {
        let cases: [(Behavior, &[&str]); 5] = [
            (Behavior::Removed, &["the", "final", "countdown"]),
            (Behavior::Isolated, &["the", "-", "final", "-", "-", "countdown"]),
            (Behavior::MergedWithPrevious, &["the-", "final-", "-", "countdown"]),
            (Behavior::MergedWithNext, &["the", "-final", "-", "-countdown"]),
            (Behavior::Contiguous, &["the", "-", "final", "--", "countdown"]),
        ];
        for (behavior, expected) in cases {
            assert_eq!(words(&[split(behavior, false)], "the-final--countdown"), expected);
        }
        assert_eq!(words(&[split(Behavior::Removed, true)], "a-b"), ["-"]);
        assert_eq!(words(&[split(Behavior::Isolated, false)], ""), [""; 0]);
    }

    #[test]
    fn digits_and_punctuation() {
        assert_eq!(words(&[Step::Digits { individual: true }], "a12b"), ["a", "1", "2", "b"]);
        assert_eq!(words(&[Step::Digits { individual: false }], "a12b"), ["a", "12", "b"]);
        let punctuation = Step::punctuation(Behavior::Contiguous).unwrap();
        assert_eq!(words(&[punctuation], "a$+b«!c"), ["a", "$+", "b", "«!", "c"]);
    }

    #[test]
    fn spaces_become_visible() {
        let metaspace = |prepend, split| Step::Metaspace { replacement: '▁', prepend, split };
        assert_eq!(words(&[metaspace(Prepend::First, true)], "a b  c"), ["▁a", "▁b", "▁", "▁c"]);
        assert_eq!(words(&[metaspace(Prepend::First, false)], " a b"), ["▁a▁b"]);
        assert_eq!(words(&[metaspace(Prepend::Never, false)], "a b"), ["a▁b"]);
        let twice = [split(Behavior::Removed, false), metaspace(Prepend::First, true)];
        assert_eq!(words(&twice, "a-b"), ["▁a", "b"]);
        let always = [split(Behavior::Removed, false), metaspace(Prepend::Always, true)];
        assert_eq!(words(&always, "a-b"), ["▁a", "▁b"]);
    }

    #[test]
    fn bytes_are_written_last() {
        let bytes =
            Step::Bytes { prefix_space: true, words: Some(Pattern::new(names::GPT2).unwrap()) };
        assert_eq!(words(&[bytes], "né 12"), ["ĠnÃ©", "Ġ12"]);
        assert_eq!(words(&Step::named("smollm").unwrap(), "a 12"), ["a", "Ġ", "1", "2"]);
    }

    #[test]
    fn an_unknown_name_lists_the_known_ones() {
        let error = Step::named("martian").unwrap_err().to_string();
        assert!(error.contains("`martian`") && error.contains("qwen2"), "{error}");
    }
}

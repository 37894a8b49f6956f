//! Tokens whose text is found in a text before anything else happens to it: control tokens, if
//! the caller lets text name them, and tokens that were added to a finished vocabulary.

use std::borrow::Cow;
use std::collections::HashMap;
use std::sync::OnceLock;

use aho_corasick::{AhoCorasick, MatchKind};

use super::error::TokenizerError;

/// Put into control tokens that text must not name; a noncharacter, which no text contains.
/// See [`AddedTokens::protect`].
const MARK: char = '\u{FDD0}';

/// A token with its own way of being found.
#[derive(Debug, Clone, Default)]
pub(super) struct AddedToken {
    pub(super) id: u32,
    pub(super) text: String,
    /// Text does not name it unless asked.
    pub(super) control: bool,
    /// Found only between characters that are not part of a word.
    pub(super) single_word: bool,
    /// White space before it belongs to it.
    pub(super) lstrip: bool,
    /// White space after it belongs to it.
    pub(super) rstrip: bool,
    /// Looked for in the normalized text, in its own normalized form.
    pub(super) normalized: bool,
}

/// A part of a text.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum Segment<'t> {
    Text {
        text: &'t str,
        /// Whether it stands at the beginning of the whole text.
        at_start: bool,
    },
    Token(u32),
}

/// All added tokens of a vocabulary.
#[derive(Debug, Clone)]
pub(super) struct AddedTokens {
    raw: Finder,
    normalized: Finder,
    ids: HashMap<String, u32>,
    controls: Vec<String>,
    overlapping: OnceLock<Option<AhoCorasick>>,
}

impl AddedTokens {
    /// `normalize` gives the form in which a token of normalized text is looked for.
    pub(super) fn new(
        tokens: Vec<AddedToken>,
        normalize: impl Fn(&str) -> Result<String, TokenizerError>,
    ) -> Result<Self, TokenizerError> {
        let ids = tokens.iter().map(|t| (t.text.clone(), t.id)).collect();
        let controls = tokens
            .iter()
            .filter(|t| t.control && !t.text.is_empty())
            .map(|t| t.text.clone())
            .collect();
        let (mut normalized, raw): (Vec<_>, Vec<_>) =
            tokens.into_iter().filter(|t| !t.text.is_empty()).partition(|t| t.normalized);
        for token in &mut normalized {
            token.text = normalize(&token.text)?;
        }
        normalized.retain(|token| !token.text.is_empty());
        Ok(Self {
            raw: Finder::new(raw)?,
            normalized: Finder::new(normalized)?,
            ids,
            controls,
            overlapping: OnceLock::new(),
        })
    }

    /// The token with this text.
    pub(super) fn id(&self, text: &str) -> Option<u32> {
        self.ids.get(text).copied()
    }

    /// Cuts a text as it came.
    pub(super) fn split_raw<'t>(&self, text: &'t str, controls: bool) -> Vec<Segment<'t>> {
        self.raw.split(text, controls, true)
    }

    /// Cuts a normalized part of a text.
    pub(super) fn split_normalized<'t>(
        &self,
        text: &'t str,
        controls: bool,
        at_start: bool,
    ) -> Vec<Segment<'t>> {
        self.normalized.split(text, controls, at_start)
    }

    /// `text` with marks inside everything that would be read as a control token.
    pub(super) fn protect<'t>(&self, text: &'t str) -> Cow<'t, str> {
        // Building fails only for sizes that `Finder::new` has refused before.
        let finder = self.overlapping.get_or_init(|| AhoCorasick::new(&self.controls).ok());
        let Some(finder) = finder else { return Cow::Borrowed(text) };
        let first_char = |at: usize| text[at..].chars().next().map_or(0, char::len_utf8);
        // A mark after the first character breaks every token that begins there.
        let mut breaks: Vec<usize> = finder
            .find_overlapping_iter(text)
            .map(|found| found.start() + first_char(found.start()))
            .collect();
        if breaks.is_empty() {
            return Cow::Borrowed(text);
        }
        breaks.sort_unstable();
        breaks.dedup();
        let mut out = String::with_capacity(text.len() + breaks.len() * MARK.len_utf8());
        let mut from = 0;
        for at in breaks {
            out.push_str(&text[from..at]);
            out.push(MARK);
            from = at;
        }
        out.push_str(&text[from..]);
        Cow::Owned(out)
    }

    /// Removes the marks of [`protect`](Self::protect).
    pub(super) fn unprotect(text: &str) -> Cow<'_, str> {
        if text.contains(MARK) { Cow::Owned(text.replace(MARK, "")) } else { Cow::Borrowed(text) }
    }
}

/// Two automata over the same tokens: all of them, and those that plain text may name.
#[derive(Debug, Clone)]
struct Finder {
    all: Option<(AhoCorasick, Vec<AddedToken>)>,
    plain: Option<(AhoCorasick, Vec<AddedToken>)>,
}

impl Finder {
    fn new(tokens: Vec<AddedToken>) -> Result<Self, TokenizerError> {
        let plain = tokens.iter().filter(|token| !token.control).cloned().collect();
        Ok(Self { all: automaton(tokens)?, plain: automaton(plain)? })
    }

    fn split<'t>(&self, text: &'t str, controls: bool, at_start: bool) -> Vec<Segment<'t>> {
        let mut segments = Vec::new();
        let mut from = 0;
        let add_text = |segments: &mut Vec<Segment<'t>>, from: usize, to: usize| {
            if from < to {
                let at_start = at_start && from == 0;
                segments.push(Segment::Text { text: &text[from..to], at_start });
            }
        };
        let automaton = if controls { &self.all } else { &self.plain };
        if let Some((finder, tokens)) = automaton {
            for found in finder.find_iter(text) {
                let token = &tokens[found.pattern().as_usize()];
                let (before, after) = (&text[..found.start()], &text[found.end()..]);
                if found.start() < from
                    || (token.single_word
                        && (before.chars().next_back().is_some_and(is_word_char)
                            || after.chars().next().is_some_and(is_word_char)))
                {
                    continue;
                }
                let mut start = found.start();
                if token.lstrip {
                    start = text[from..start].trim_end().len() + from;
                }
                add_text(&mut segments, from, start);
                segments.push(Segment::Token(token.id));
                from = found.end();
                if token.rstrip {
                    from = text.len() - after.trim_start().len();
                }
            }
        }
        add_text(&mut segments, from, text.len());
        segments
    }
}

fn is_word_char(c: char) -> bool {
    c.is_alphanumeric() || c == '_'
}

fn automaton(
    tokens: Vec<AddedToken>,
) -> Result<Option<(AhoCorasick, Vec<AddedToken>)>, TokenizerError> {
    if tokens.is_empty() {
        return Ok(None);
    }
    let automaton = AhoCorasick::builder()
        .match_kind(MatchKind::LeftmostLongest)
        .build(tokens.iter().map(|token| &token.text))
        .map_err(|e| TokenizerError::invalid("added tokens", "an automaton", e))?;
    Ok(Some((automaton, tokens)))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn token(id: u32, text: &str) -> AddedToken {
        AddedToken { id, text: text.into(), control: true, ..AddedToken::default() }
    }

    fn added(tokens: Vec<AddedToken>) -> AddedTokens {
        AddedTokens::new(tokens, |text| Ok(text.to_lowercase())).unwrap()
    }

    /// `a[3]b`: text, token 3, text.
    fn show(segments: Vec<Segment<'_>>) -> String {
        let show = |segment| match segment {
            Segment::Text { text, .. } => text.to_owned(),
            Segment::Token(id) => format!("[{id}]"),
        };
        segments.into_iter().map(show).collect()
    }

    #[test]
    fn control_tokens_are_found_only_on_request() {
        let mut user = token(2, "<tool>");
        user.control = false;
        let added = added(vec![token(1, "<s>"), user]);
        assert_eq!(show(added.split_raw("a<s><tool>b", true)), "a[1][2]b");
        assert_eq!(show(added.split_raw("a<s><tool>b", false)), "a<s>[2]b");
        assert_eq!(added.split_raw("", true), []);
    }

    #[test]
    fn the_longest_of_overlapping_tokens_wins() {
        let added = added(vec![token(1, "<|a"), token(2, "<|a|>"), token(3, "|>x")]);
        assert_eq!(show(added.split_raw("<|a|>x <|a", true)), "[2]x [1]");
    }

    #[test]
    fn tokens_take_white_space_and_words_as_they_say() {
        let left = AddedToken { lstrip: true, ..token(1, "<l>") };
        let right = AddedToken { rstrip: true, ..token(2, "<r>") };
        let word = AddedToken { single_word: true, ..token(3, "cat") };
        let added = added(vec![left, right, word]);
        assert_eq!(show(added.split_raw("a  <l> b <r>  c", true)), "a[1] b [2]c");
        assert_eq!(show(added.split_raw("  <l><r>  ", true)), "[1][2]");
        assert_eq!(show(added.split_raw("cat cats concat cat", true)), "[3] cats concat [3]");
    }

    #[test]
    fn tokens_of_normalized_text_are_normalized_themselves() {
        let added = added(vec![AddedToken { normalized: true, ..token(1, "CAT") }]);
        assert_eq!(show(added.split_raw("a CAT", true)), "a CAT");
        assert_eq!(show(added.split_normalized("a cat", true, true)), "a [1]");
    }

    #[test]
    fn protected_text_names_no_control_token() {
        let added = added(vec![token(1, "<s>"), token(2, "ss"), token(3, "s>s"), token(4, "é<")]);
        for text in ["<s>", "<ss>s", "sss", "é<s>", "plain", "", "<s><s>"] {
            let protected = added.protect(text);
            assert_eq!(show(added.split_raw(&protected, true)), *protected, "{text}");
            assert_eq!(AddedTokens::unprotect(&protected), text);
        }
        assert!(matches!(added.protect("plain"), Cow::Borrowed(_)));
    }
}

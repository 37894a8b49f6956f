//! Splits text at the matches of a regular expression, in linear time for the patterns that real
//! tokenizers use.
//!
//! Nearly all of them are a list of plain alternatives that ends in `\s+(?!\S)|\s+`: "whitespace,
//! but leave the last character to the next word". The look-ahead is the only part an automaton
//! cannot do, and its effect is simple: a whitespace run that something follows gives its last
//! character back. So the alternatives run as one automaton, which cannot backtrack, and the run
//! is cut here. Other patterns go to a backtracking engine under two limits, steps per match and
//! time per text, so that a hostile one ends in an error.

use std::error::Error as _;
use std::ops::Range;
use std::time::{Duration, Instant};

use fancy_regex::{Assertion, Expr, LookAround};
use regex_automata::{Input, meta};

use super::error::TokenizerError;

/// Longest pattern accepted, in bytes; the longest known one has about 1,000.
const MAX_PATTERN_BYTES: usize = 1 << 16;
/// Backtracking steps of one match; one step is about 10 ns.
const BACKTRACK_LIMIT: usize = 4_000_000;
/// Time a backtracking pattern may take for one text: a fixed part and a part per byte.
const SLOWEST: (Duration, Duration) = (Duration::from_secs(5), Duration::from_micros(10));

/// A compiled pattern.
#[derive(Debug, Clone)]
pub(super) struct Pattern {
    source: String,
    engine: Engine,
}

#[derive(Debug, Clone)]
enum Engine {
    /// Plain alternatives.
    Automaton(meta::Regex),
    /// Plain alternatives (pattern 0), then a whitespace run without its last character
    /// (pattern 1). `single`: a run of one character matches too.
    Words { automaton: meta::Regex, single: bool },
    /// Anything else.
    Backtracking(Box<fancy_regex::Regex>),
}

impl Pattern {
    /// Compiles a pattern in the syntax of Hugging Face's tokenizers.
    pub(super) fn new(source: &str) -> Result<Self, TokenizerError> {
        let invalid = |got: String| {
            TokenizerError::invalid("pre-tokenizer pattern", "a regular expression", got)
        };
        if source.len() > MAX_PATTERN_BYTES {
            return Err(invalid(format!("{} bytes", source.len())));
        }
        let tree = Expr::parse_tree(source).map_err(|e| invalid(e.to_string()))?.expr;
        let engine = match plan(&tree) {
            Plan::Plain => Engine::Automaton(automaton(&[print(&[&tree])]).map_err(invalid)?),
            Plan::Words { words, single } => {
                let patterns = [print(&words), r"\s+".to_owned()];
                Engine::Words { automaton: automaton(&patterns).map_err(invalid)?, single }
            }
            Plan::Backtracking => backtracking(source).map_err(invalid)?,
        };
        // An automaton does not step over empty matches the way a backtracking engine does.
        let engine = match engine {
            Engine::Automaton(re) | Engine::Words { automaton: re, .. } if re.is_match("") => {
                backtracking(source).map_err(invalid)?
            }
            engine => engine,
        };
        Ok(Self { source: source.to_owned(), engine })
    }

    /// Cuts `text` into pieces that cover it in order: matches (`true`) and what lies between.
    pub(super) fn split(&self, text: &str) -> Result<Vec<(Range<usize>, bool)>, TokenizerError> {
        let mut pieces = Pieces { pieces: Vec::new(), end: 0 };
        match &self.engine {
            Engine::Automaton(automaton) => {
                for found in automaton.find_iter(text) {
                    pieces.add(found.range());
                }
            }
            Engine::Words { automaton, single } => {
                let mut at = 0;
                while let Some(found) = automaton.find(Input::new(text).span(at..text.len())) {
                    let mut range = found.range();
                    at = range.end;
                    if found.pattern().as_usize() == 1 && range.end < text.len() {
                        let last = text[range.clone()].chars().next_back();
                        let last = last.map_or(0, char::len_utf8);
                        if last < range.len() {
                            range.end -= last;
                            at = range.end;
                        } else if !single {
                            continue;
                        }
                    }
                    pieces.add(range);
                }
            }
            Engine::Backtracking(regex) => {
                let start = Instant::now();
                let allowed = SLOWEST.0 + SLOWEST.1 * u32::try_from(text.len()).unwrap_or(u32::MAX);
                for found in regex.find_iter(text) {
                    match found {
                        Ok(found) if start.elapsed() <= allowed => pieces.add(found.range()),
                        _ => {
                            let pattern = self.source.chars().take(60).collect();
                            return Err(TokenizerError::TooSlow { pattern, at: pieces.end });
                        }
                    }
                }
            }
        }
        pieces.gap(text.len());
        Ok(pieces.pieces)
    }
}

struct Pieces {
    pieces: Vec<(Range<usize>, bool)>,
    end: usize,
}

impl Pieces {
    fn gap(&mut self, until: usize) {
        if self.end < until {
            self.pieces.push((self.end..until, false));
        }
    }

    fn add(&mut self, found: Range<usize>) {
        self.gap(found.start);
        self.end = found.end;
        self.pieces.push((found, true));
    }
}

fn automaton(patterns: &[String]) -> Result<meta::Regex, String> {
    meta::Regex::builder().build_many(patterns).map_err(|e| match e.source() {
        Some(cause) => cause.to_string(),
        None => e.to_string(),
    })
}

fn backtracking(source: &str) -> Result<Engine, String> {
    let regex = fancy_regex::RegexBuilder::new(source).backtrack_limit(BACKTRACK_LIMIT).build();
    Ok(Engine::Backtracking(Box::new(regex.map_err(|e| e.to_string())?)))
}

enum Plan<'a> {
    Plain,
    Words { words: Vec<&'a Expr>, single: bool },
    Backtracking,
}

/// How to run a pattern.
fn plan(tree: &Expr) -> Plan<'_> {
    if is_plain(tree) {
        return Plan::Plain;
    }
    let alternatives = match tree {
        Expr::Alt(alternatives) => alternatives.as_slice(),
        other => std::slice::from_ref(other),
    };
    let (words, single) = match alternatives {
        [words @ .., spaces, rest] if is_spaces_but_last(spaces) && is_spaces(rest) => {
            (words, true)
        }
        [words @ .., spaces] if is_spaces_but_last(spaces) => (words, false),
        _ => return Plan::Backtracking,
    };
    if words.is_empty() || !words.iter().all(is_plain) {
        return Plan::Backtracking;
    }
    Plan::Words { words: words.iter().collect(), single }
}

/// Whether an automaton can run this and `Expr::to_str` can print it.
fn is_plain(expr: &Expr) -> bool {
    match expr {
        Expr::Empty | Expr::Any { .. } | Expr::Literal { .. } | Expr::Delegate { .. } => true,
        Expr::Assertion(assertion) => {
            matches!(assertion, Assertion::StartText | Assertion::EndText)
        }
        Expr::Concat(children) | Expr::Alt(children) => children.iter().all(is_plain),
        Expr::Group(child) | Expr::Repeat { child, .. } => is_plain(child),
        _ => false,
    }
}

/// `\s+`
fn is_spaces(expr: &Expr) -> bool {
    match expr {
        Expr::Repeat { child, lo: 1, hi: usize::MAX, greedy: true } => is_class(child, r"\s"),
        _ => false,
    }
}

/// `\s+(?!\S)`
fn is_spaces_but_last(expr: &Expr) -> bool {
    match expr {
        Expr::Concat(parts) => match parts.as_slice() {
            [spaces, Expr::LookAround(ahead, LookAround::LookAheadNeg)] => {
                is_spaces(spaces) && is_class(ahead, r"\S")
            }
            _ => false,
        },
        _ => false,
    }
}

fn is_class(expr: &Expr, class: &str) -> bool {
    matches!(expr, Expr::Delegate { inner, .. } if inner == class)
}

/// The alternatives in the syntax of the automaton.
fn print(alternatives: &[&Expr]) -> String {
    let mut out = String::new();
    for (i, alternative) in alternatives.iter().enumerate() {
        if i > 0 {
            out.push('|');
        }
        // Precedence 1: an alternative of an alternation.
        alternative.to_str(&mut out, 1);
    }
    out
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;
    use std::sync::LazyLock;

    use proptest::prelude::*;

    use super::super::names;
    use super::*;

    fn split<'t>(pattern: &str, text: &'t str) -> Vec<&'t str> {
        let pieces = Pattern::new(pattern).unwrap().split(text).unwrap();
        pieces.into_iter().map(|(range, _)| &text[range]).collect()
    }

    /// Every known pattern with a backtracking engine for it.
    static KNOWN: LazyLock<Vec<(Pattern, fancy_regex::Regex)>> = LazyLock::new(|| {
        let patterns: BTreeSet<&str> = names::all().flat_map(|(_, steps)| steps).copied().collect();
        let both =
            |pattern| (Pattern::new(pattern).unwrap(), fancy_regex::Regex::new(pattern).unwrap());
        patterns.into_iter().map(both).collect()
    });

    /// What a backtracking engine makes of the pattern.
    fn reference(regex: &fancy_regex::Regex, text: &str) -> Vec<(Range<usize>, bool)> {
        let mut pieces = Pieces { pieces: Vec::new(), end: 0 };
        regex.find_iter(text).for_each(|found| pieces.add(found.unwrap().range()));
        pieces.gap(text.len());
        pieces.pieces
    }

    #[test]
    fn whitespace_leaves_its_last_character_to_the_next_word() {
        assert_eq!(split(names::GPT2, "a   b  "), ["a", "  ", " b", "  "]);
        assert_eq!(
            split(names::LLAMA3, "a\t\tb \n\n c 1234"),
            ["a", "\t", "\tb", " \n\n", " c", " ", "123", "4"]
        );
    }

    #[test]
    fn every_known_pattern_runs_as_an_automaton() {
        for (pattern, _) in &*KNOWN {
            assert!(!matches!(pattern.engine, Engine::Backtracking(_)), "{}", pattern.source);
        }
    }

    #[test]
    fn patterns_with_other_look_arounds_work_too() {
        // Digits in threes from the right.
        assert_eq!(split(r"(?=(\d{3})+(?!\d))", "1234567"), ["1", "", "234", "", "567"]);
        assert_eq!(split(r"a++b?+|\bc", "aab c"), ["aab", " ", "c"]);
    }

    #[test]
    fn a_catastrophic_pattern_is_an_error() {
        let pattern = Pattern::new(r"((?:a|aa)+)\1c").unwrap();
        let text = "a".repeat(40) + "b";
        let error = pattern.split(&text).unwrap_err();
        assert!(matches!(error, TokenizerError::TooSlow { at: 0, .. }), "{error}");
        // The same without look-around runs as an automaton.
        assert_eq!(split("(a+)+$|.", &text).len(), 41);
    }

    #[test]
    fn nonsense_is_an_error() {
        let deep = "(".repeat(100_000);
        let nested = "(".repeat(40_000) + "a" + &")".repeat(20_000);
        let huge = "(?:a{1000}){1000}{1000}";
        for pattern in ["(", "[z-a]", r"\p{Nonsense}", "(?P<a", "*", &deep, &nested, huge] {
            let error = Pattern::new(pattern).unwrap_err();
            assert!(matches!(error, TokenizerError::Invalid { .. }), "{pattern}");
        }
    }

    proptest! {
        #[test]
        fn equals_the_backtracking_engine(
            text in r"([ \t\n\r]{0,4}|[a-zA-Z]{1,3}|'|'s|'LL|[0-9]{1,4}|[!?.,:$+]{1,2}|日本|é|ß|\u{300}|🦊|\u{3000}|ا|½){0,12}"
        ) {
            for (pattern, regex) in &*KNOWN {
                let split = pattern.split(&text).unwrap();
                prop_assert_eq!(split, reference(regex, &text), "{}", &pattern.source);
            }
        }
    }
}

//! Holds an answer to a language: JSON that fits a schema, a regular expression, or a Lark grammar.
//!
//! The parsing is llguidance's. What stands here is its setting: the vocabulary it sees, limits that
//! bound the time and memory of hostile grammars, and a memory of the last ones. Knows the bytes of
//! tokens; nothing of logits, sampling or the text before the answer.

use std::collections::VecDeque;
use std::sync::{Arc, Mutex, PoisonError};

use llguidance::api::{ParserLimits, StopReason, TopLevelGrammar};
use llguidance::toktrie::{SimpleVob, TokEnv, TokRxInfo, TokTrie, TokenizerEnv};
use llguidance::{Matcher, ParserFactory};
use serde::{Deserialize, Serialize};
use serde_json::{Value, json};

use crate::error::{InferenceError, Result};
use crate::options::OptionsError;
use crate::tokenizer::{EncodeOptions, Tokenizer};

/// Longest JSON schema, as compact JSON text.
pub const MAX_SCHEMA_BYTES: usize = 256 << 10;
/// Longest regular expression or Lark grammar.
pub const MAX_GRAMMAR_BYTES: usize = 64 << 10;
/// Deepest nesting of a JSON schema.
pub const MAX_SCHEMA_DEPTH: usize = 128;
/// Members of one object in a JSON schema: compiling takes the square of a schema's properties.
pub const MAX_SCHEMA_MEMBERS: usize = 512;
/// Members of all objects in a JSON schema.
pub const MAX_SCHEMA_MEMBERS_IN_ALL: usize = 5000;

/// Compiled grammars kept for the next request with the same one.
const KEPT_GRAMMARS: usize = 32;
/// Stack of the thread that compiles: rules may refer to rules in chains as long as the text allows.
const COMPILE_STACK: usize = 256 << 20;
/// Tokens longer than this cannot be part of a held answer; the trie has no room for them.
const MAX_TOKEN_BYTES: usize = 512;
/// Longest reason passed on in an error.
const MAX_REASON_BYTES: usize = 300;
/// White space between the parts of JSON: one space, if any. A small model that may indent spends
/// its tokens on nothing else.
const JSON_SPACE: &str = "[ ]";

/// The language an answer must belong to.
///
/// ```
/// use bitnet_inference::{GenerationOptions, Grammar, InferenceEngine};
///
/// let engine = InferenceEngine::builder().build_blocking()?;
/// let model = engine.load_model_blocking("builtin")?;
/// let options = GenerationOptions::default().seed(1).grammar(Grammar::Regex("[a-z]{3}-[0-9]{2}".into()));
/// let answer = engine.generate_blocking(&model, "The code is", &options)?;
/// assert_eq!(answer.text.len(), 6);
/// assert_eq!(answer.text.as_bytes()[3], b'-');
/// # Ok::<(), bitnet_inference::InferenceError>(())
/// ```
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
#[non_exhaustive]
pub enum Grammar {
    /// JSON that fits this schema: a large part of draft 2020-12; what is outside it is refused.
    /// Members come in the order of the schema's `properties`. References must be local.
    JsonSchema(Value),
    /// Text that matches this regular expression as a whole: no look-around, no back-references.
    Regex(String),
    /// Text of this grammar, in llguidance's dialect of Lark, from its rule `start` on.
    Lark(String),
}

impl Grammar {
    /// Any JSON object.
    pub fn json_object() -> Self {
        Self::JsonSchema(json!({"type": "object"}))
    }

    /// Refuses what is too large to be compiled; says nothing about whether it can be.
    ///
    /// # Errors
    /// A text or schema over its limit, or a schema that is no object.
    pub fn check_size(&self) -> Result<(), OptionsError> {
        let error =
            |expected: String, got: String| Err(OptionsError { field: "grammar", expected, got });
        match self {
            Self::Regex(text) | Self::Lark(text) if text.len() > MAX_GRAMMAR_BYTES => {
                error(format!("at most {MAX_GRAMMAR_BYTES} bytes"), format!("{} bytes", text.len()))
            }
            Self::Regex(_) | Self::Lark(_) => Ok(()),
            Self::JsonSchema(schema) if !schema.is_object() => {
                error("a JSON schema that is an object".into(), "something else".into())
            }
            Self::JsonSchema(schema) => {
                // Depth first, and without recursion: writing a value as text recurses.
                if let Err(expected) = check_shape(schema) {
                    return error(expected, "a larger one".into());
                }
                match schema.to_string().len() {
                    0..=MAX_SCHEMA_BYTES => Ok(()),
                    n => error(format!("at most {MAX_SCHEMA_BYTES} bytes"), format!("{n} bytes")),
                }
            }
        }
    }

    fn for_parser(&self) -> TopLevelGrammar {
        match self {
            Self::JsonSchema(schema) => {
                let mut schema = schema.clone();
                // Replaces what a request may have put there: it could widen the language.
                schema["x-guidance"] = json!({"whitespace_pattern": JSON_SPACE});
                TopLevelGrammar::from_json_schema(schema)
            }
            Self::Regex(pattern) => TopLevelGrammar::from_regex(pattern),
            Self::Lark(grammar) => TopLevelGrammar::from_lark(grammar.clone()),
        }
    }
}

/// Bounds a schema's depth and members; says what was expected. Does not recurse.
fn check_shape(schema: &Value) -> Result<(), String> {
    let (mut open, mut n_members) = (vec![(schema, 1)], 0);
    while let Some((value, depth)) = open.pop() {
        if depth > MAX_SCHEMA_DEPTH {
            return Err(format!("a schema of at most {MAX_SCHEMA_DEPTH} levels"));
        }
        match value {
            Value::Array(items) => open.extend(items.iter().map(|item| (item, depth + 1))),
            Value::Object(members) => {
                n_members += members.len();
                if members.len() > MAX_SCHEMA_MEMBERS {
                    return Err(format!("objects of at most {MAX_SCHEMA_MEMBERS} members"));
                }
                if n_members > MAX_SCHEMA_MEMBERS_IN_ALL {
                    return Err(format!("at most {MAX_SCHEMA_MEMBERS_IN_ALL} members in all"));
                }
                open.extend(members.values().map(|item| (item, depth + 1)));
            }
            _ => {}
        }
    }
    Ok(())
}

/// Compiles grammars for one vocabulary and keeps the last few.
pub(crate) struct GrammarCompiler {
    factory: ParserFactory,
    kept: Mutex<VecDeque<(Grammar, Matcher)>>,
}

impl GrammarCompiler {
    /// For a tokenizer whose model has `n_logits` logits. Takes a fraction of a second for a large
    /// vocabulary.
    ///
    /// # Errors
    /// A vocabulary that the parser cannot hold.
    pub(crate) fn new(tokenizer: &Tokenizer, n_logits: usize) -> Result<Self, String> {
        let words = (0..n_logits as u32).map(|id| word(tokenizer, id)).collect();
        let canonical = (tokenizer.strip_start() == 0).then(|| tokenizer.clone());
        Self::with_words(words, tokenizer.eos_ids(), canonical)
    }

    /// For the words of a vocabulary; a word without bytes is never part of an answer.
    pub(crate) fn with_words(
        mut words: Vec<Vec<u8>>,
        eos: &[u32],
        tokenizer: Option<Tokenizer>,
    ) -> Result<Self, String> {
        let mut eos: Vec<u32> =
            eos.iter().copied().filter(|&id| (id as usize) < words.len()).collect();
        if eos.is_empty() {
            // The parser needs an end token; this one lies behind the logits and is never drawn.
            eos.push(words.len() as u32);
            words.push(b"\xff<end>".to_vec());
        }
        for &id in &eos {
            // What ends an answer must never be taken for a part of it.
            let word = &mut words[id as usize];
            if word.first() != Some(&TokTrie::SPECIAL_TOKEN_MARKER) {
                word.insert(0, TokTrie::SPECIAL_TOKEN_MARKER);
            }
        }
        let build = move || {
            let info = TokRxInfo::new(words.len() as u32, eos[0]);
            let trie = TokTrie::from(&info, &words).with_eos_tokens(&eos);
            let environment: TokEnv = Arc::new(Vocabulary { trie, tokenizer });
            let mut factory = ParserFactory::new_simple(&environment)?;
            *factory.limits_mut() = limits();
            factory.quiet();
            Ok(factory)
        };
        // The trie asserts bounds that a hostile vocabulary may break.
        let factory = llguidance::panic_utils::catch_unwind(std::panic::AssertUnwindSafe(build));
        let factory = factory.map_err(|e| reason(&e.to_string()))?;
        Ok(Self { factory, kept: Mutex::default() })
    }

    /// A fresh constraint for one answer. Compiling takes milliseconds, tens of them for a schema of
    /// thousands of lines.
    ///
    /// # Errors
    /// A grammar that is no grammar, that no text belongs to, or that is too large or too complex.
    pub(crate) fn constraint(&self, grammar: &Grammar) -> Result<Constraint> {
        grammar.check_size()?;
        let mut kept = self.kept.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(at) = kept.iter().position(|(known, _)| known == grammar) {
            let entry = kept.remove(at).expect("just found");
            // A copy of its own: what another answer's text cost the parser must not count here.
            let matcher = entry.1.deep_clone();
            kept.push_front(entry);
            return Ok(Constraint { matcher });
        }
        drop(kept);
        let matcher = self.compile(grammar)?;
        let constraint = Constraint { matcher: matcher.deep_clone() };
        let mut kept = self.kept.lock().unwrap_or_else(PoisonError::into_inner);
        kept.truncate(KEPT_GRAMMARS - 1);
        kept.push_front((grammar.clone(), matcher));
        Ok(constraint)
    }

    fn compile(&self, grammar: &Grammar) -> Result<Matcher> {
        let work = || Matcher::new(self.factory.create_parser(grammar.for_parser()));
        let matcher = std::thread::scope(|scope| {
            let thread = std::thread::Builder::new()
                .name("bitnet-grammar".into())
                .stack_size(COMPILE_STACK)
                .spawn_scoped(scope, work)
                .map_err(|e| InferenceError::thread(&e))?;
            thread.join().map_err(|_| invalid("the parser failed"))
        })?;
        match matcher.get_error() {
            Some(error) => Err(invalid(&error)),
            None => Ok(matcher),
        }
    }
}

impl std::fmt::Debug for GrammarCompiler {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("GrammarCompiler").finish_non_exhaustive()
    }
}

/// The bytes of a token as the parser sees them.
fn word(tokenizer: &Tokenizer, id: u32) -> Vec<u8> {
    let bytes = tokenizer.token_bytes(id);
    if bytes.len() > MAX_TOKEN_BYTES {
        return Vec::new();
    }
    let marker: &[u8] =
        if tokenizer.is_control(id) { &[TokTrie::SPECIAL_TOKEN_MARKER] } else { &[] };
    [marker, bytes].concat()
}

/// Bounds of one grammar. Time: compiling stays below a second, a mask below some ten milliseconds.
/// Memory: a state of the lexer takes 1 to 2 KiB.
fn limits() -> ParserLimits {
    ParserLimits {
        max_items_in_row: 2000,
        initial_lexer_fuel: 1_000_000,
        step_lexer_fuel: 100_000,
        step_max_items: 50_000,
        max_lexer_states: 20_000,
        max_grammar_size: 200_000,
        precompute_large_lexemes: true,
        verbose_errors: false,
    }
}

/// The vocabulary as the parser asks for it.
struct Vocabulary {
    trie: TokTrie,
    /// Set if its tokens of a piece of text are those it has inside a longer one.
    tokenizer: Option<Tokenizer>,
}

impl TokenizerEnv for Vocabulary {
    fn tok_trie(&self) -> &TokTrie {
        &self.trie
    }

    fn tokenize_bytes(&self, bytes: &[u8]) -> Vec<u32> {
        let encode = |tokenizer: &Tokenizer| {
            let text = std::str::from_utf8(bytes).ok()?;
            let ids = tokenizer.encode(text, EncodeOptions::TEXT).ok()?;
            // A tokenizer that changes its text says something else than what was forced.
            let same = ids.iter().flat_map(|&id| tokenizer.token_bytes(id)).eq(bytes);
            same.then_some(ids)
        };
        let ids = self.tokenizer.as_ref().and_then(encode);
        ids.unwrap_or_else(|| self.trie.greedy_tokenize(bytes))
    }

    fn tokenize_is_canonical(&self) -> bool {
        self.tokenizer.is_some()
    }
}

/// Where one answer stands in its language.
pub(crate) struct Constraint {
    matcher: Matcher,
}

impl Constraint {
    /// The tokens that may come next; never none.
    ///
    /// # Errors
    /// No token can continue the answer, or finding out is too expensive.
    pub(crate) fn allowed(&mut self) -> Result<TokenSet> {
        self.matcher.compute_mask().map(TokenSet).map_err(|e| invalid(&e.to_string()))
    }

    /// Notes the token that was chosen; whether the answer is complete.
    ///
    /// # Errors
    /// A token outside the language, or a parser over its limits.
    pub(crate) fn accept(&mut self, token: u32) -> Result<bool> {
        self.matcher.consume_token(token).map_err(|e| invalid(&e.to_string()))?;
        match self.matcher.stop_reason() {
            StopReason::NotStopped => Ok(false),
            reason if reason.is_ok() => Ok(true),
            reason => Err(invalid(&reason.to_string())),
        }
    }

    /// The tokens that must come next, if the grammar leaves no choice.
    pub(crate) fn forced(&mut self, max: usize) -> Vec<u32> {
        let mut forced = self.matcher.compute_ff_tokens();
        forced.truncate(max);
        forced
    }
}

impl std::fmt::Debug for Constraint {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Constraint").finish_non_exhaustive()
    }
}

/// A set of token ids.
pub(crate) struct TokenSet(SimpleVob);

impl TokenSet {
    pub(crate) fn contains(&self, token: u32) -> bool {
        self.0.is_allowed(token)
    }
}

fn invalid(message: &str) -> InferenceError {
    InferenceError::input("grammar", "a grammar the engine can hold answers to", reason(message))
}

/// The first line of what the parser says, without the state it may append.
fn reason(message: &str) -> String {
    let line = message.lines().map(str::trim).find(|line| !line.is_empty()).unwrap_or_default();
    let line = match line.strip_prefix("panic:") {
        Some(_) => "one that the parser fails on",
        None => line,
    };
    line.char_indices().take_while(|(at, _)| *at < MAX_REASON_BYTES).map(|(_, c)| c).collect()
}

#[cfg(test)]
mod tests;

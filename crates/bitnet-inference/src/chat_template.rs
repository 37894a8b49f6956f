//! Messages to the one text a chat model was trained on, by the Jinja template of its checkpoint.
//!
//! Templates are written for Python's transformers: its settings, functions and filters are
//! mirrored here. A template is also a program from a stranger: it runs without a loader, under
//! fuel (which pays for every instruction and every byte it makes), a recursion limit and a limit
//! on the values it builds, and its failure is an error.
//!
//! Knows messages and text. [`ChatTemplate::encode`] alone meets the tokenizer, so that no text
//! from outside can pose as a control token.

mod guard;
mod python;

use std::borrow::Cow;
use std::sync::Arc;

use minijinja::machinery::{CompiledTemplate, TemplateConfig};
use minijinja::syntax::SyntaxConfig;
use minijinja::value::{Serde, Value, merge_maps};
use minijinja::{AutoEscape, Environment, ErrorKind, context};
use serde::{Deserialize, Serialize};
use serde_json::{Map, Value as Json};

use crate::tokenizer::{EncodeOptions, Tokenizer, TokenizerError};

/// Longest template in bytes; the longest in the wild has 20 KB.
pub const MAX_TEMPLATE_BYTES: usize = 1 << 20;
/// Fuel for every rendering, for each message, and for each byte of the messages. One unit pays
/// for an instruction or for 64 bytes that are made or copied.
const FUEL: (u64, u64, u64) = (400_000, 4_000, 2);
/// Depth of loops, blocks and macro calls inside each other; a macro call counts for several.
const MAX_DEPTH: usize = 400;
/// The names that the caller's own variables cannot take.
const RESERVED: [&str; 4] = ["messages", "tools", "documents", "add_generation_prompt"];
/// The template for models that have none: `User: …` and `Assistant: …`, a line each.
const PLAIN: &str = "{% for message in messages %}{{ message.role | capitalize }}: \
     {{ message.content | trim }}\n{% endfor %}{% if add_generation_prompt %}Assistant:{% endif %}";

/// One message of a conversation.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Message {
    /// Who speaks: `system`, `user`, `assistant` or `tool`.
    pub role: String,
    /// What is said.
    #[serde(default)]
    pub content: String,
    /// Further fields some templates read: `tool_calls`, `name`, `reasoning_content`, …
    #[serde(flatten)]
    pub extra: Map<String, Json>,
}

impl Message {
    /// A message of `role`.
    pub fn new(role: impl Into<String>, content: impl Into<String>) -> Self {
        Self { role: role.into(), content: content.into(), extra: Map::new() }
    }

    /// What the model is to know beforehand.
    pub fn system(content: impl Into<String>) -> Self {
        Self::new("system", content)
    }

    /// What the user says.
    pub fn user(content: impl Into<String>) -> Self {
        Self::new("user", content)
    }

    /// What the model said.
    pub fn assistant(content: impl Into<String>) -> Self {
        Self::new("assistant", content)
    }
}

/// What a template gets besides the messages.
#[derive(Debug, Clone, PartialEq)]
pub struct ChatOptions {
    /// End with the beginning of the model's answer.
    pub add_generation_prompt: bool,
    /// Descriptions of the functions the model may call, as in the OpenAI API.
    pub tools: Vec<Json>,
    /// Further variables, such as `enable_thinking`.
    pub extra: Map<String, Json>,
}

impl Default for ChatOptions {
    fn default() -> Self {
        Self { add_generation_prompt: true, tools: Vec::new(), extra: Map::new() }
    }
}

/// Why a template cannot be used, or not on these messages.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum TemplateError {
    /// The template is longer than [`MAX_TEMPLATE_BYTES`].
    #[error("chat template: expected at most {MAX_TEMPLATE_BYTES} bytes, got {0}")]
    TooLong(usize),
    /// The template is no Jinja, or asks for what is not there (other files, unknown filters).
    #[error("chat template, line {line}: {reason}")]
    Invalid {
        /// Where, counted from 1; 0 if unknown.
        line: usize,
        /// What is wrong.
        reason: String,
    },
    /// The template refuses these messages with words of its own.
    #[error("the chat template refuses the messages: {0}")]
    Refused(String),
    /// The template did more work, or made more text, than any chat needs.
    #[error("chat template: gave up after too much work or text (line {line})")]
    TooMuchWork {
        /// Where it was stopped.
        line: usize,
    },
    /// A caller's variable has a name that is taken.
    #[error("chat template variable `{0}`: the name is taken by the template's own input")]
    ReservedName(String),
    /// The rendered text cannot be encoded.
    #[error(transparent)]
    Tokenizer(#[from] TokenizerError),
}

/// A compiled chat template. Cloning it is cheap.
#[derive(Debug, Clone)]
pub struct ChatTemplate {
    environment: Arc<Environment<'static>>,
    source: Arc<str>,
    special_tokens: Value,
}

impl ChatTemplate {
    /// Compiles a template. `special_tokens` are the texts it calls `bos_token`, `eos_token`, ….
    pub fn new(source: &str, special_tokens: &[(String, String)]) -> Result<Self, TemplateError> {
        if source.len() > MAX_TEMPLATE_BYTES {
            return Err(TemplateError::TooLong(source.len()));
        }
        let template = Self::unchecked(&python::without_generation_tags(source), special_tokens);
        template.compile().map_err(error)?;
        Ok(template)
    }

    /// A template for models that have none: `User: …` and `Assistant: …`, a line each.
    pub fn plain() -> Self {
        Self::unchecked(PLAIN, &[])
    }

    /// Whether the template's text holds a name, such as that of a variable it reads.
    pub fn mentions(&self, name: &str) -> bool {
        self.source.contains(name)
    }

    fn unchecked(source: &str, special_tokens: &[(String, String)]) -> Self {
        let mut environment = Environment::new();
        environment.set_recursion_limit(MAX_DEPTH);
        environment.set_unknown_method_callback(python::call_method);
        python::add_to(&mut environment);
        guard::add_to(&mut environment);
        let special_tokens = Value::from_pairs(special_tokens.iter().cloned());
        Self { environment: Arc::new(environment), source: source.into(), special_tokens }
    }

    /// Compiles the text; templates are short, and the result would borrow from it.
    fn compile(&self) -> Result<CompiledTemplate<'_>, minijinja::Error> {
        let config = TemplateConfig {
            syntax_config: SyntaxConfig::builder().trim_blocks(true).lstrip_blocks(true).build()?,
            default_auto_escape: Arc::new(|_| AutoEscape::None),
        };
        CompiledTemplate::new("chat", &self.source, &config)
    }

    /// The text of a conversation. Texts inside the messages are copied as they are; to encode the
    /// result use [`encode`](Self::encode), which keeps control tokens out of them.
    pub fn render(
        &self,
        messages: &[Message],
        options: &ChatOptions,
    ) -> Result<String, TemplateError> {
        let reserved = |name: &&String| RESERVED.iter().chain(&guard::NAMES).any(|n| n == name);
        if let Some(name) = options.extra.keys().find(reserved) {
            return Err(TemplateError::ReservedName(name.clone()));
        }
        let tools = (!options.tools.is_empty()).then_some(&options.tools);
        let input = context! {
            messages => Serde(messages),
            tools => Serde(tools),
            documents => (),
            add_generation_prompt => options.add_generation_prompt,
        };
        let extra = Value::from(Serde(&options.extra));
        let bytes: usize = messages
            .iter()
            .map(|message| message.role.len() + message.content.len() + size(&message.extra))
            .chain(options.tools.iter().map(value_size))
            .chain([size(&options.extra)])
            .sum();
        let fuel = FUEL.0 + FUEL.1 * messages.len() as u64 + FUEL.2 * bytes as u64;
        let mut environment = Environment::clone(&self.environment);
        environment.set_fuel(Some(fuel));
        let context = merge_maps([input, extra, self.special_tokens.clone()]);
        guard::render(&environment, &self.compile().map_err(error)?, context).map_err(error)
    }

    /// The tokens of a conversation. Control tokens are those the template writes; the same
    /// characters inside a message are encoded as text.
    pub fn encode(
        &self,
        tokenizer: &Tokenizer,
        messages: &[Message],
        options: &ChatOptions,
    ) -> Result<Vec<u32>, TemplateError> {
        let protect = |text: &mut String| {
            if let Cow::Owned(protected) = tokenizer.protect(text) {
                *text = protected;
            }
        };
        let mut messages = messages.to_vec();
        for message in &mut messages {
            protect(&mut message.role);
            protect(&mut message.content);
            message.extra.values_mut().for_each(|value| for_each_text(value, &protect));
        }
        let mut options = options.clone();
        options.tools.iter_mut().for_each(|value| for_each_text(value, &protect));
        options.extra.values_mut().for_each(|value| for_each_text(value, &protect));
        let text = self.render(&messages, &options)?;
        Ok(tokenizer.encode(&text, EncodeOptions::CHAT)?)
    }
}

fn error(error: minijinja::Error) -> TemplateError {
    let line = error.line().unwrap_or(0);
    if let Some(message) = python::refusal(&error) {
        return TemplateError::Refused(message);
    }
    if error.kind() == ErrorKind::OutOfFuel {
        return TemplateError::TooMuchWork { line };
    }
    let reason = error.to_string();
    // The line is told already, and the name is our own.
    let reason = reason.rsplit_once(" (in ").map_or(&*reason, |(reason, _)| reason);
    TemplateError::Invalid { line, reason: reason.chars().take(300).collect() }
}

/// Applies `change` to every text in a JSON value, names of fields included.
fn for_each_text(value: &mut Json, change: &impl Fn(&mut String)) {
    match value {
        Json::String(text) => change(text),
        Json::Array(items) => items.iter_mut().for_each(|item| for_each_text(item, change)),
        Json::Object(map) => {
            for (mut name, mut value) in std::mem::take(map) {
                change(&mut name);
                for_each_text(&mut value, change);
                map.insert(name, value);
            }
        }
        Json::Null | Json::Bool(_) | Json::Number(_) => {}
    }
}

/// About how many bytes a JSON value has.
fn value_size(value: &Json) -> usize {
    match value {
        Json::String(text) => text.len() + 8,
        Json::Array(items) => items.iter().map(|item| value_size(item) + 8).sum(),
        Json::Object(map) => size(map),
        Json::Null | Json::Bool(_) | Json::Number(_) => 8,
    }
}

fn size(map: &Map<String, Json>) -> usize {
    map.iter().map(|(name, value)| name.len() + value_size(value) + 8).sum()
}

#[cfg(test)]
mod tests;

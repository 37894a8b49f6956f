//! From a checked request to a running generation, for every wire format: model, prompt, options,
//! and a place in the server.

use bitnet_inference::Grammar;
use bitnet_inference::tokenizer::EncodeOptions;
use serde_json::{Value, json};

use crate::chat::{self, Conversation, Tool};
use crate::constraint::Constraint;
use crate::error::{ApiError, Result};
use crate::residency::{KeepAlive, ModelUse};
use crate::run::{Job, Run};
use crate::sampling::Sampling;
use crate::state::{AppState, Caller};
use crate::text::encode;

/// What the model may do with the tools of a request.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum ToolMode {
    /// It is not shown them.
    None,
    /// It decides.
    Auto,
    /// It must call one.
    Required,
    /// It must call this one.
    Named(String),
}

/// The form an answer must have.
#[derive(Debug, Clone, PartialEq)]
pub(crate) enum Format {
    /// Anything.
    Text,
    /// Something of a language.
    Grammar(Grammar),
}

/// A request for the next turn of a conversation.
#[derive(Debug)]
pub(crate) struct ChatJob {
    pub(crate) model: String,
    pub(crate) conversation: Conversation,
    pub(crate) tools: ToolMode,
    /// Calls one answer may make.
    pub(crate) max_calls: usize,
    pub(crate) format: Format,
    /// The field that asked for the format.
    pub(crate) format_param: &'static str,
    pub(crate) n: usize,
    pub(crate) max_tokens: Option<u32>,
    /// Most tokens of prompt and answer together.
    pub(crate) context: Option<u32>,
    /// The last turn's text is the prompt as it is.
    pub(crate) raw: bool,
    /// Report log-probabilities, and of this many alternatives.
    pub(crate) logprobs: Option<u32>,
    pub(crate) priority: i32,
    pub(crate) cache_salt: Option<String>,
    /// How long the model stays in memory afterwards.
    pub(crate) keep_alive: Option<KeepAlive>,
    pub(crate) sampling: Sampling,
}

impl ChatJob {
    /// One answer of plain text, without tools or limits of its own.
    pub(crate) fn new(model: String, conversation: Conversation, sampling: Sampling) -> Self {
        Self {
            model,
            conversation,
            tools: ToolMode::None,
            max_calls: usize::MAX,
            format: Format::Text,
            format_param: "response_format",
            n: 1,
            max_tokens: None,
            context: None,
            raw: false,
            logprobs: None,
            priority: 0,
            cache_salt: None,
            keep_alive: None,
            sampling,
        }
    }
}

/// Starts the answer to a conversation.
///
/// # Errors
/// An unknown model, options outside their range, a prompt that does not fit, a full server.
pub(crate) async fn start_chat(state: &AppState, caller: &Caller, job: ChatJob) -> Result<Run> {
    let admission = state.admit(caller)?;
    let entry = state.registry().entry(&job.model)?;
    let model = state.registry().model_for(entry, job.keep_alive).await?;
    let model_name = entry.name.clone();
    let job = state.compute(move || prepare_chat(model, model_name, job)).await?;
    Run::start(state, caller, admission, job)
}

fn prepare_chat(model: ModelUse, model_name: std::sync::Arc<str>, job: ChatJob) -> Result<Job> {
    let mut options = job.sampling.options(model.get_output_dim())?;
    options.max_tokens = job.max_tokens;
    options.logprobs = job.logprobs;
    let constraint =
        chat_constraint(job.format, job.format_param, &job.tools, &job.conversation.tools);
    if let Some(constraint) = &constraint {
        constraint.prepare(&model)?;
    }
    let shown = job.tools != ToolMode::None;
    let prompt = match (job.raw, job.conversation.turns.last()) {
        (true, Some(turn)) => encode(&model, &turn.text, EncodeOptions::PROMPT)?,
        _ => chat::prompt(&model, &job.conversation, shown, true)?,
    };
    if let Some(context) = job.context {
        let rest = (context as usize).checked_sub(prompt.len()).filter(|&rest| rest > 0);
        let Some(rest) = rest else {
            let expected = format!("fewer tokens than `num_ctx`, which is {context}");
            let error = ApiError::invalid("prompt", &expected, prompt.len());
            return Err(error.code("context_length_exceeded"));
        };
        let rest = u32::try_from(rest).unwrap_or(u32::MAX);
        options.max_tokens = Some(options.max_tokens.map_or(rest, |max| max.min(rest)));
    }
    let (n, priority, cache_salt) = (job.n, job.priority, job.cache_salt);
    Ok(Job {
        model,
        model_name,
        operation: if job.raw { "text_completion" } else { "chat" },
        prompts: vec![prompt],
        n,
        options,
        constraint,
        priority,
        cache_salt,
    })
}

/// What the text of an answer is held to.
fn chat_constraint(
    format: Format,
    format_param: &'static str,
    mode: &ToolMode,
    tools: &[Tool],
) -> Option<Constraint> {
    let call = |tool: &Tool| {
        json!({
            "type": "object",
            "properties": {"name": {"const": tool.name}, "arguments": tool.parameters},
            "required": ["name", "arguments"],
            "additionalProperties": false,
        })
    };
    let calls = match mode {
        ToolMode::None | ToolMode::Auto => {
            return match format {
                Format::Text => None,
                Format::Grammar(grammar) => Some(Constraint { grammar, param: format_param }),
            };
        }
        ToolMode::Required => tools.iter().map(call).collect::<Vec<_>>(),
        ToolMode::Named(name) => tools.iter().filter(|tool| tool.name == *name).map(call).collect(),
    };
    let grammar = Grammar::JsonSchema(with_root_definitions(calls));
    Some(Constraint { grammar, param: "tools" })
}

/// A schema of any of these calls. References inside a tool's schema start at its own root, so its
/// definitions move to the root of the whole under names of their own.
fn with_root_definitions(mut calls: Vec<Value>) -> Value {
    let mut definitions = serde_json::Map::new();
    for (i, call) in calls.iter_mut().enumerate() {
        let arguments = &mut call["properties"]["arguments"];
        let name = format!("tool{i}");
        let mut moved = arguments.take();
        rebase_references(&mut moved, &format!("#/$defs/{name}"));
        *arguments = json!({"$ref": format!("#/$defs/{name}")});
        definitions.insert(name, moved);
    }
    json!({"anyOf": calls, "$defs": definitions})
}

/// Lets every local reference in `schema` start at `root`.
fn rebase_references(schema: &mut Value, root: &str) {
    // Requests are at most 128 levels deep: the JSON reader sees to it.
    match schema {
        Value::Array(items) => items.iter_mut().for_each(|item| rebase_references(item, root)),
        Value::Object(members) => {
            for (key, value) in members {
                match value {
                    Value::String(target) if key == "$ref" && target.starts_with('#') => {
                        target.replace_range(..1, root);
                    }
                    value => rebase_references(value, root),
                }
            }
        }
        _ => {}
    }
}

/// A count from 1 to `max`.
pub(crate) fn count(name: &str, value: Option<i64>, max: usize) -> Result<Option<usize>> {
    let Some(value) = value else { return Ok(None) };
    match usize::try_from(value) {
        Ok(count) if (1..=max).contains(&count) => Ok(Some(count)),
        _ => Err(ApiError::invalid(name, &format!("1 to {max}"), value)),
    }
}

/// A number of tokens to generate, at least `min`. More than the context holds is no error: the
/// answer ends where the context does.
pub(crate) fn max_tokens(name: &str, value: Option<i64>, min: u32) -> Result<Option<u32>> {
    let Some(value) = value else { return Ok(None) };
    match u32::try_from(value) {
        Ok(count) if count >= min => Ok(Some(count)),
        _ => Err(ApiError::invalid(name, &format!("{min} to {}", u32::MAX), value)),
    }
}

/// The engine's priority, where greater runs first; on the wire smaller does, as in vLLM.
pub(crate) fn priority(value: Option<i64>) -> Result<i32> {
    match value.unwrap_or(0) {
        value @ -1000..=1000 => Ok(-(value as i32)),
        value => Err(ApiError::invalid("priority", "-1000 to 1000", value)),
    }
}

/// A salt of the prefix cache.
pub(crate) fn cache_salt(value: Option<String>) -> Result<Option<String>> {
    match value {
        Some(salt) if salt.is_empty() || salt.len() > 256 => {
            Err(ApiError::invalid("cache_salt", "1 to 256 bytes", salt.len()))
        }
        value => Ok(value),
    }
}

/// Checks a name as OpenAI's rules have it.
pub(crate) fn check_name(param: &str, name: &str) -> Result<()> {
    let plain = |c: u8| c.is_ascii_alphanumeric() || c == b'_' || c == b'-';
    if (1..=64).contains(&name.len()) && name.bytes().all(plain) {
        return Ok(());
    }
    let shown: String = name.chars().take(64).collect();
    let expected = "1 to 64 letters, digits, `_` or `-`";
    Err(ApiError::invalid(param, expected, format!("{shown:?}")))
}

/// A tool with a good name and an object as its schema.
pub(crate) fn tool(
    name_param: &str,
    schema_param: &str,
    name: String,
    description: Option<String>,
    parameters: Option<Value>,
) -> Result<Tool> {
    check_name(name_param, &name)?;
    let parameters = parameters.unwrap_or_else(|| json!({"type": "object", "properties": {}}));
    let is_object = parameters
        .as_object()
        .is_some_and(|schema| schema.get("type").is_none_or(|kind| kind == "object"));
    if !is_object {
        let message = format!("`{schema_param}`: expected a JSON schema of an object");
        return Err(ApiError::field(schema_param, message).code("invalid_value"));
    }
    Ok(Tool { name, description, parameters })
}

/// Refuses two tools of one name.
pub(crate) fn distinct_tools(param: &str, tools: &[Tool]) -> Result<()> {
    let mut names = std::collections::HashSet::new();
    match tools.iter().find(|tool| !names.insert(&tool.name)) {
        Some(tool) => {
            Err(ApiError::invalid(param, "each name once", format!("`{}` twice", tool.name)))
        }
        None => Ok(()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn counts_and_priorities_are_bounded() {
        for bad in [0, -1, 129, i64::MAX, i64::MIN] {
            assert!(count("n", Some(bad), 128).is_err(), "{bad}");
        }
        assert_eq!(count("n", Some(128), 128), Ok(Some(128)));
        assert!(max_tokens("max_tokens", Some(0), 1).is_err());
        assert!(max_tokens("max_tokens", Some(1 << 32), 1).is_err());
        assert_eq!(max_tokens("max_tokens", Some(0), 0), Ok(Some(0)));
        assert_eq!(priority(Some(-7)), Ok(7));
        assert!(priority(Some(1001)).is_err());
    }

    #[test]
    fn tools_need_plain_names_and_object_schemas() {
        let make = |name: &str, parameters| tool("n", "p", name.into(), None, parameters);
        assert!(make("get_weather-2", None).is_ok());
        for name in ["", "a b", "a\n", "é", &"x".repeat(65)] {
            assert_eq!(make(name, None).unwrap_err().param.as_deref(), Some("n"), "{name:?}");
        }
        for schema in [json!(1), json!("x"), json!([]), json!({"type": "string"})] {
            assert!(make("f", Some(schema.clone())).is_err(), "{schema}");
        }
        let twice = [make("f", None).unwrap(), make("f", None).unwrap()];
        assert!(distinct_tools("tools", &twice).is_err());
    }

    #[test]
    fn forced_calls_are_held_to_the_tools() {
        let node = json!({
            "type": "object",
            "properties": {"next": {"$ref": "#"}, "leaf": {"$ref": "#/$defs/leaf"}},
            "$defs": {"leaf": {"type": "string"}},
        });
        let tools = [
            tool("", "", "f".into(), None, None).unwrap(),
            tool("", "", "g".into(), None, Some(node)).unwrap(),
        ];
        let named = ToolMode::Named("g".into());
        let constraint = chat_constraint(Format::Text, "", &named, &tools).unwrap();
        let Grammar::JsonSchema(schema) = constraint.grammar else { panic!("not a schema") };
        assert_eq!(schema["anyOf"].as_array().unwrap().len(), 1);
        assert_eq!(schema["anyOf"][0]["properties"]["name"]["const"], "g");
        let moved = &schema["$defs"]["tool0"];
        assert_eq!(moved["properties"]["next"]["$ref"], "#/$defs/tool0");
        assert_eq!(moved["properties"]["leaf"]["$ref"], "#/$defs/tool0/$defs/leaf");
        assert_eq!(chat_constraint(Format::Text, "", &ToolMode::Auto, &tools), None);
    }
}

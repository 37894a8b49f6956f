//! OpenAI's request fields that are not plain values: messages, tools, formats.
//!
//! Unions are read by hand, so that an error names the field inside them.

use std::collections::BTreeMap;
use std::fmt;

use bitnet_inference::Grammar;
use serde::de::value::{MapAccessDeserializer, SeqAccessDeserializer};
use serde::de::{self, Deserializer, MapAccess, SeqAccess, Visitor};
use serde::{Deserialize, Serialize};
use serde_json::Value;
use utoipa::ToSchema;
use utoipa::openapi::schema::{ObjectBuilder, Type};
use utoipa::openapi::{RefOr, Schema};

use crate::error::ApiError;
use crate::generate::{self, Format};
use crate::openapi::schema_as;

/// A message of a conversation.
#[derive(Debug, Clone, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
#[allow(dead_code)] // Some fields only say what is accepted; reading them checks them.
pub(crate) struct Message {
    /// Who speaks.
    pub role: MessageRole,
    /// What is said; may be absent in an assistant's message that calls tools.
    pub content: Option<Content>,
    /// Name of the speaker; not shown to the model.
    #[schema(max_length = 64)]
    pub name: Option<String>,
    /// Tools the assistant called.
    pub tool_calls: Option<Vec<MessageToolCall>>,
    /// In a tool's message: the call it answers.
    pub tool_call_id: Option<String>,
    /// A refusal of the assistant, repeated back; treated as its text.
    pub refusal: Option<String>,
    /// Always empty here; accepted because clients send answers back whole.
    #[schema(max_items = 0)]
    pub annotations: Option<Vec<Absent>>,
    /// Always null.
    pub audio: Option<Absent>,
    /// Always null.
    pub function_call: Option<Absent>,
}

/// A value that must not be there: only `null` and absence are accepted in its place.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Absent {}

impl utoipa::PartialSchema for Absent {
    fn schema() -> RefOr<Schema> {
        ObjectBuilder::new().schema_type(Type::Null).into()
    }
}

impl ToSchema for Absent {}

impl<'de> Deserialize<'de> for Absent {
    fn deserialize<D: Deserializer<'de>>(_: D) -> Result<Self, D::Error> {
        Err(de::Error::custom("not supported; only null is accepted"))
    }
}

/// Who speaks.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Deserialize, ToSchema)]
#[serde(rename_all = "lowercase")]
pub(crate) enum MessageRole {
    /// Instructions; the same as `system`.
    Developer,
    /// Instructions.
    System,
    /// The person.
    User,
    /// The model.
    Assistant,
    /// The result of a tool.
    Tool,
}

/// A call of a tool in an assistant's message.
#[derive(Debug, Clone, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
#[allow(dead_code)] // Some fields only say what is accepted; reading them checks them.
pub(crate) struct MessageToolCall {
    /// Its id, which the tool's message repeats.
    pub id: String,
    /// Always `function`.
    #[serde(rename = "type", default)]
    pub kind: FunctionKind,
    /// The function called.
    pub function: CalledFunction,
}

/// The function called and its arguments.
#[derive(Debug, Clone, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub(crate) struct CalledFunction {
    /// Its name.
    pub name: String,
    /// A JSON object as text.
    pub arguments: String,
}

/// The one kind of tool.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Deserialize, Serialize, ToSchema)]
#[serde(rename_all = "lowercase")]
pub(crate) enum FunctionKind {
    /// A function of the caller.
    #[default]
    Function,
}

/// A text, or a list of text parts.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Content(pub String);

schema_as!(Content, ContentSchema);

/// The two forms, for the OpenAPI document.
#[derive(ToSchema)]
#[serde(untagged)]
#[allow(dead_code)] // Read by the derive only.
pub(crate) enum ContentSchema {
    Text(String),
    Parts(Vec<Part>),
}

/// A part of a message; only text is understood.
#[derive(Debug, Clone, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub(crate) struct Part {
    #[serde(rename = "type")]
    #[allow(dead_code)] // That it is `text` is checked by its type.
    kind: PartKind,
    text: String,
}

#[derive(Debug, Clone, Copy, Deserialize, ToSchema)]
#[serde(rename_all = "snake_case")]
pub(crate) enum PartKind {
    Text,
}

impl<'de> Deserialize<'de> for Content {
    fn deserialize<D: Deserializer<'de>>(reader: D) -> Result<Self, D::Error> {
        struct Texts;
        impl<'de> Visitor<'de> for Texts {
            type Value = Content;
            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("a string or a list of text parts")
            }
            fn visit_str<E: de::Error>(self, text: &str) -> Result<Content, E> {
                Ok(Content(text.to_owned()))
            }
            fn visit_seq<A: SeqAccess<'de>>(self, mut items: A) -> Result<Content, A::Error> {
                let mut text = String::new();
                while let Some(part) = items.next_element::<Part>()? {
                    text.push_str(&part.text);
                }
                Ok(Content(text))
            }
        }
        reader.deserialize_any(Texts)
    }
}

/// A tool the model may call.
#[derive(Debug, Clone, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
#[allow(dead_code)] // Some fields only say what is accepted; reading them checks them.
pub(crate) struct ToolDefinition {
    /// Always `function`.
    #[serde(rename = "type")]
    pub kind: FunctionKind,
    /// The function.
    pub function: FunctionDefinition,
}

/// A function the model may call.
#[derive(Debug, Clone, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
#[allow(dead_code)] // Some fields only say what is accepted; reading them checks them.
pub(crate) struct FunctionDefinition {
    /// Letters, digits, `_` and `-`.
    #[schema(min_length = 1, max_length = 64, pattern = "^[a-zA-Z0-9_-]+$")]
    pub name: String,
    /// What it does, for the model.
    pub description: Option<String>,
    /// JSON schema of its arguments, an object. Absent: no arguments.
    #[schema(value_type = Option<Object>)]
    pub parameters: Option<Value>,
    /// Arguments are held to the schema either way where the call is constrained.
    pub strict: Option<bool>,
}

/// Which tools the model may or must call.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum ToolChoice {
    /// None.
    None,
    /// Any or none, as the model decides.
    Auto,
    /// At least one.
    Required,
    /// This one.
    Named(String),
}

schema_as!(ToolChoice, ToolChoiceSchema);

/// The two forms, for the OpenAPI document.
#[derive(ToSchema)]
#[serde(untagged)]
#[allow(dead_code)] // Read by the derive only.
pub(crate) enum ToolChoiceSchema {
    Mode(ToolMode),
    Named(NamedTool),
}

#[derive(Debug, Clone, Copy, Deserialize, ToSchema)]
#[serde(rename_all = "lowercase")]
pub(crate) enum ToolMode {
    None,
    Auto,
    Required,
}

#[derive(Debug, Clone, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub(crate) struct NamedTool {
    #[serde(rename = "type")]
    #[allow(dead_code)] // That it is `function` is checked by its type.
    kind: FunctionKind,
    function: FunctionName,
}

#[derive(Debug, Clone, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub(crate) struct FunctionName {
    name: String,
}

impl<'de> Deserialize<'de> for ToolChoice {
    fn deserialize<D: Deserializer<'de>>(reader: D) -> Result<Self, D::Error> {
        struct Choice;
        impl<'de> Visitor<'de> for Choice {
            type Value = ToolChoice;
            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("`none`, `auto`, `required` or a named function")
            }
            fn visit_str<E: de::Error>(self, mode: &str) -> Result<ToolChoice, E> {
                match mode {
                    "none" => Ok(ToolChoice::None),
                    "auto" => Ok(ToolChoice::Auto),
                    "required" => Ok(ToolChoice::Required),
                    other => Err(de::Error::unknown_variant(other, &["none", "auto", "required"])),
                }
            }
            fn visit_map<A: MapAccess<'de>>(self, entries: A) -> Result<ToolChoice, A::Error> {
                let tool = NamedTool::deserialize(MapAccessDeserializer::new(entries))?;
                Ok(ToolChoice::Named(tool.function.name))
            }
        }
        reader.deserialize_any(Choice)
    }
}

/// The form the answer must have.
#[derive(Debug, Clone, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub(crate) struct ResponseFormat {
    /// Which form.
    #[serde(rename = "type")]
    pub kind: FormatKind,
    /// With `json_schema`: the schema.
    pub json_schema: Option<JsonSchemaFormat>,
    /// With `regex`: the expression the whole answer matches.
    pub regex: Option<String>,
    /// With `grammar`: a Lark grammar of answers, from its rule `start` on.
    pub grammar: Option<String>,
}

impl ResponseFormat {
    /// The form, where `param` is the field this came in.
    pub(crate) fn read(format: Option<Self>, param: &str) -> Result<Format, ApiError> {
        let Some(format) = format else { return Ok(Format::Text) };
        let field = |name: &str| format!("{param}.{name}");
        let name = format.json_schema.as_ref().map(|schema| schema.name.as_str());
        if let Some(name) = name {
            generate::check_name(&field("json_schema.name"), name)?;
        }
        let schema = format.json_schema.map(|format| Grammar::JsonSchema(format.schema));
        let forms = [
            (FormatKind::JsonSchema, field("json_schema"), schema),
            (FormatKind::Regex, field("regex"), format.regex.map(Grammar::Regex)),
            (FormatKind::Grammar, field("grammar"), format.grammar.map(Grammar::Lark)),
        ];
        format.kind.choose(forms)
    }
}

/// Forms of answers.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Deserialize, Serialize, ToSchema)]
#[serde(rename_all = "snake_case")]
pub(crate) enum FormatKind {
    /// Anything.
    Text,
    /// A JSON object.
    JsonObject,
    /// JSON that fits a schema.
    JsonSchema,
    /// Text that matches a regular expression.
    Regex,
    /// Text of a grammar.
    Grammar,
}

impl FormatKind {
    /// The form, given the fields that describe one: each goes with its own kind only.
    pub(crate) fn choose<const N: usize>(
        self,
        forms: [(Self, String, Option<Grammar>); N],
    ) -> Result<Format, ApiError> {
        let mut chosen = None;
        for (kind, param, grammar) in forms {
            if kind == self {
                let missing = format!("`{param}` is required");
                chosen = Some(grammar.ok_or_else(|| ApiError::field(param, missing))?);
            } else if grammar.is_some() {
                let message = format!("`{param}` does not go with this type");
                return Err(ApiError::field(param, message));
            }
        }
        match (self, chosen) {
            (Self::JsonObject, _) => Ok(Format::Grammar(Grammar::json_object())),
            (_, Some(grammar)) => Ok(Format::Grammar(grammar)),
            (_, None) => Ok(Format::Text),
        }
    }
}

/// A schema with a name.
#[derive(Debug, Clone, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
#[allow(dead_code)] // Some fields only say what is accepted; reading them checks them.
pub(crate) struct JsonSchemaFormat {
    /// Letters, digits, `_` and `-`.
    #[schema(min_length = 1, max_length = 64, pattern = "^[a-zA-Z0-9_-]+$")]
    pub name: String,
    /// What it is for, for the model.
    pub description: Option<String>,
    /// The schema.
    #[schema(value_type = Object)]
    pub schema: Value,
    /// Answers are held to the schema either way.
    pub strict: Option<bool>,
}

/// How a stream is to be written.
#[derive(Debug, Clone, Copy, Default, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub(crate) struct StreamOptions {
    /// Send a last chunk with the usage, and `usage: null` in all others.
    pub include_usage: Option<bool>,
    /// As in vLLM: count prompt and generated tokens so far in every chunk. Needs `include_usage`.
    pub continuous_usage_stats: Option<bool>,
    /// Random padding; only `false` is accepted, and is the default.
    pub include_obfuscation: Option<bool>,
}

/// Which chunks of a stream tell the usage.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum UsageChunks {
    /// None.
    Never,
    /// A last one of its own; the others say null.
    Last,
    /// All: what was counted so far.
    Every,
}

/// A prompt: a text, token ids, or a list of either.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Prompts(pub Vec<Prompt>);

/// One prompt.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Prompt {
    /// Text for the tokenizer.
    Text(String),
    /// Token ids as they are.
    Tokens(Vec<u32>),
}

schema_as!(Prompts, PromptSchema);

/// The four forms, for the OpenAPI document.
#[derive(ToSchema)]
#[serde(untagged)]
#[allow(dead_code)] // Read by the derive only.
pub(crate) enum PromptSchema {
    Text(String),
    Texts(Vec<String>),
    Tokens(Vec<u32>),
    TokenLists(Vec<Vec<u32>>),
}

impl<'de> Deserialize<'de> for Prompts {
    fn deserialize<D: Deserializer<'de>>(reader: D) -> Result<Self, D::Error> {
        struct Forms;
        impl<'de> Visitor<'de> for Forms {
            type Value = Prompts;
            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("a string, token ids, or a list of either")
            }
            fn visit_str<E: de::Error>(self, text: &str) -> Result<Prompts, E> {
                Ok(Prompts(vec![Prompt::Text(text.to_owned())]))
            }
            fn visit_seq<A: SeqAccess<'de>>(self, mut items: A) -> Result<Prompts, A::Error> {
                let mut prompts = Vec::new();
                let mut tokens = Vec::new();
                while let Some(item) = items.next_element()? {
                    match item {
                        PromptItem::Token(id) => tokens.push(id),
                        PromptItem::Prompt(prompt) => prompts.push(prompt),
                    }
                    if !tokens.is_empty() && !prompts.is_empty() {
                        return Err(de::Error::custom("token ids mixed with texts or lists"));
                    }
                }
                if !tokens.is_empty() {
                    prompts.push(Prompt::Tokens(tokens));
                }
                Ok(Prompts(prompts))
            }
        }
        reader.deserialize_any(Forms)
    }
}

enum PromptItem {
    Token(u32),
    Prompt(Prompt),
}

impl<'de> Deserialize<'de> for PromptItem {
    fn deserialize<D: Deserializer<'de>>(reader: D) -> Result<Self, D::Error> {
        struct Item;
        impl<'de> Visitor<'de> for Item {
            type Value = PromptItem;
            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("a string, a token id, or a list of token ids")
            }
            fn visit_u64<E: de::Error>(self, id: u64) -> Result<PromptItem, E> {
                let bad = || E::invalid_value(de::Unexpected::Unsigned(id), &"a token id");
                u32::try_from(id).map(PromptItem::Token).map_err(|_| bad())
            }
            fn visit_str<E: de::Error>(self, text: &str) -> Result<PromptItem, E> {
                Ok(PromptItem::Prompt(Prompt::Text(text.to_owned())))
            }
            fn visit_seq<A: SeqAccess<'de>>(self, items: A) -> Result<PromptItem, A::Error> {
                let tokens = Vec::deserialize(SeqAccessDeserializer::new(items))?;
                Ok(PromptItem::Prompt(Prompt::Tokens(tokens)))
            }
        }
        reader.deserialize_any(Item)
    }
}

/// Labels a client may attach to a request; they change nothing in the answer.
pub(crate) type Metadata = BTreeMap<String, String>;

/// What a request took.
#[derive(Debug, Clone, Copy, Serialize, ToSchema)]
pub(crate) struct UsageBody {
    /// Tokens of the prompts.
    pub prompt_tokens: usize,
    /// Tokens generated, those that ended the answers included.
    pub completion_tokens: usize,
    /// Both.
    pub total_tokens: usize,
    /// Details about the prompt; not in counts of unfinished answers.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub prompt_tokens_details: Option<PromptTokensDetails>,
}

/// Details about prompt tokens.
#[derive(Debug, Clone, Copy, Default, Serialize, ToSchema)]
pub(crate) struct PromptTokensDetails {
    /// Taken from the prefix cache instead of being computed.
    pub cached_tokens: usize,
}

impl UsageBody {
    /// Adds up the choices of a request: prompts count once, answers each.
    pub(crate) fn new(
        prompt_tokens: usize,
        cached_tokens: usize,
        completion_tokens: usize,
    ) -> Self {
        Self {
            prompt_tokens,
            completion_tokens,
            total_tokens: prompt_tokens + completion_tokens,
            prompt_tokens_details: Some(PromptTokensDetails { cached_tokens }),
        }
    }

    /// What was counted before the answers have ended.
    pub(crate) fn so_far(prompt_tokens: usize, completion_tokens: usize) -> Self {
        let total_tokens = prompt_tokens + completion_tokens;
        Self { prompt_tokens, completion_tokens, total_tokens, prompt_tokens_details: None }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::json::from_value;
    use serde_json::json;

    #[test]
    fn prompts_come_in_four_forms() {
        let text = |t: &str| Prompt::Text(t.into());
        for (value, expected) in [
            (json!("a"), vec![text("a")]),
            (json!(["a", "b"]), vec![text("a"), text("b")]),
            (json!([1, 2]), vec![Prompt::Tokens(vec![1, 2])]),
            (json!([[1], [2, 3]]), vec![Prompt::Tokens(vec![1]), Prompt::Tokens(vec![2, 3])]),
            (json!([]), vec![]),
        ] {
            assert_eq!(from_value::<Prompts>(value).unwrap().0, expected);
        }
        for value in [
            json!(1),
            json!([1, "a"]),
            json!([-1]),
            json!([1.5]),
            json!([[[1]]]),
            json!([4294967296u64]),
        ] {
            assert!(from_value::<Prompts>(value.clone()).is_err(), "{value}");
        }
    }

    #[test]
    fn parts_that_are_not_text_are_named() {
        let message = |content| json!({"role": "user", "content": content});
        let read = |content| from_value::<Message>(message(content));
        let parts = json!([{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]);
        assert_eq!(read(parts).unwrap().content.unwrap().0, "ab");
        let image = json!([{"type": "text", "text": "a"}, {"type": "image_url", "image_url": {}}]);
        let error = read(image).unwrap_err();
        assert_eq!(error.param.as_deref(), Some("content[1].type"), "{error}");
    }

    #[test]
    fn tool_choices_come_in_two_forms() {
        let read = |value| from_value::<ToolChoice>(value);
        assert_eq!(read(json!("required")).unwrap(), ToolChoice::Required);
        let named = json!({"type": "function", "function": {"name": "f"}});
        assert_eq!(read(named).unwrap(), ToolChoice::Named("f".into()));
        assert!(read(json!("sometimes")).is_err());
        assert!(read(json!({"type": "function"})).is_err());
    }

    #[test]
    fn replayed_answers_are_accepted() {
        let message = json!({
            "role": "assistant", "content": null, "refusal": null, "annotations": [], "audio": null,
            "function_call": null,
            "tool_calls": [{"id": "c", "type": "function", "function": {"name": "f", "arguments": "{}"}}],
        });
        assert!(from_value::<Message>(message).is_ok());
        let error =
            from_value::<Message>(json!({"role": "assistant", "audio": {"id": "a"}})).unwrap_err();
        assert_eq!(error.param.as_deref(), Some("audio"));
    }
}

//! A conversation, whatever wire format it came in, and the prompt it becomes.
//!
//! With the model's chat template if it has one. A model without one is a plain language model: the
//! texts of the conversation, one below the other, are its prompt and it writes on from there.

use bitnet_inference::tokenizer::EncodeOptions;
use bitnet_inference::{ChatOptions, Message, Model};
use serde_json::{Value, json};

use crate::error::{ApiError, Result};
use crate::text::encode;

/// Who speaks.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Role {
    System,
    User,
    Assistant,
    Tool,
}

impl Role {
    /// The name chat templates use.
    pub(crate) fn name(self) -> &'static str {
        match self {
            Self::System => "system",
            Self::User => "user",
            Self::Assistant => "assistant",
            Self::Tool => "tool",
        }
    }
}

/// A turn of a conversation.
#[derive(Debug, Clone, PartialEq)]
pub(crate) struct Turn {
    pub(crate) role: Role,
    pub(crate) text: String,
    /// Functions the assistant called in this turn.
    pub(crate) calls: Vec<Call>,
    /// For a tool's turn: which call it answers.
    pub(crate) answers: Option<String>,
}

/// A call of a function.
#[derive(Debug, Clone, PartialEq)]
pub(crate) struct Call {
    pub(crate) id: String,
    pub(crate) name: String,
    /// A JSON object, as text.
    pub(crate) arguments: String,
}

/// A function the model may call.
#[derive(Debug, Clone, PartialEq)]
pub(crate) struct Tool {
    pub(crate) name: String,
    pub(crate) description: Option<String>,
    /// JSON schema of its arguments.
    pub(crate) parameters: Value,
}

/// Turns and tools.
#[derive(Debug, Clone, PartialEq, Default)]
pub(crate) struct Conversation {
    pub(crate) turns: Vec<Turn>,
    pub(crate) tools: Vec<Tool>,
}

impl Turn {
    /// A turn of text.
    pub(crate) fn new(role: Role, text: impl Into<String>) -> Self {
        Self { role, text: text.into(), calls: Vec::new(), answers: None }
    }
}

/// The token ids of a conversation, ready for the answer if `open` is set. Tools are shown to the
/// model if `with_tools` is set. Control tokens written in texts from outside stay text.
///
/// # Errors
/// A template that refuses this conversation; a model without a tokenizer.
pub(crate) fn prompt(
    model: &Model,
    conversation: &Conversation,
    with_tools: bool,
    open: bool,
) -> Result<Vec<u32>> {
    let tools = if with_tools { &conversation.tools[..] } else { &[] };
    if model.has_chat_template() {
        let (messages, options) = for_template(model, conversation, tools, open)?;
        return Ok(model.chat_prompt(&messages, &options)?.tokens(model)?);
    }
    encode(model, &plain(&with_tools_in_text(conversation, tools)), EncodeOptions::PROMPT)
}

/// A conversation as text, for people.
///
/// # Errors
/// A template that refuses this conversation.
pub(crate) fn render(
    model: &Model,
    conversation: &Conversation,
    with_tools: bool,
    open: bool,
) -> Result<String> {
    let tools = if with_tools { &conversation.tools[..] } else { &[] };
    if model.has_chat_template() {
        let (messages, options) = for_template(model, conversation, tools, open)?;
        return model.chat_template()?.render(&messages, &options).map_err(|error| {
            ApiError::invalid("messages", "what the chat template accepts", error)
        });
    }
    Ok(plain(&with_tools_in_text(conversation, tools)))
}

/// What a chat template gets. Tools and calls go in the fields templates read them from, if this one
/// reads them at all, and are written out in the texts otherwise.
fn for_template(
    model: &Model,
    conversation: &Conversation,
    tools: &[Tool],
    open: bool,
) -> Result<(Vec<Message>, ChatOptions)> {
    let template = model.chat_template()?;
    let options = ChatOptions { add_generation_prompt: open, ..ChatOptions::default() };
    if template.mentions("tools") {
        let messages = conversation.turns.iter().map(message).collect();
        let tools = tools.iter().map(tool_value).collect();
        return Ok((messages, ChatOptions { tools, ..options }));
    }
    // Templates that do not know the role of tools refuse it.
    let role = |role: Role| if role == Role::Tool { Role::User.name() } else { role.name() };
    let turns = with_tools_in_text(conversation, tools);
    let messages = turns.into_iter().map(|turn| Message::new(role(turn.role), turn.text)).collect();
    Ok((messages, options))
}

/// A turn as templates that know tools expect it.
fn message(turn: &Turn) -> Message {
    let mut message = Message::new(turn.role.name(), turn.text.as_str());
    let call = |call: &Call| {
        // Templates write arguments out themselves, so they want the object and not its text.
        let arguments: Value = serde_json::from_str(&call.arguments).unwrap_or_else(|_| json!({}));
        let function = json!({"name": call.name, "arguments": arguments});
        json!({"id": call.id, "type": "function", "function": function})
    };
    if !turn.calls.is_empty() {
        message.extra.insert("tool_calls".into(), turn.calls.iter().map(call).collect());
    }
    if let Some(id) = &turn.answers {
        message.extra.insert("tool_call_id".into(), json!(id));
    }
    message
}

/// The texts, one below the other: what a model without a template writes on from.
fn plain(turns: &[Turn]) -> String {
    let texts = turns.iter().map(|turn| turn.text.as_str()).filter(|text| !text.is_empty());
    texts.collect::<Vec<_>>().join("\n")
}

/// The turns with tools and their calls written out, for models whose template knows of neither.
fn with_tools_in_text(conversation: &Conversation, tools: &[Tool]) -> Vec<Turn> {
    let mut turns = conversation.turns.clone();
    for turn in &mut turns {
        for call in std::mem::take(&mut turn.calls) {
            if !turn.text.is_empty() {
                turn.text.push('\n');
            }
            turn.text.push_str(&call_text(&call));
        }
    }
    if !tools.is_empty() {
        let instructions = tool_instructions(tools);
        match turns.first_mut() {
            Some(first) if first.role == Role::System => {
                first.text.push_str("\n\n");
                first.text.push_str(&instructions);
            }
            _ => turns.insert(0, Turn::new(Role::System, instructions)),
        }
    }
    turns
}

/// A call as [`crate::tools`] finds it in an answer.
fn call_text(call: &Call) -> String {
    let name = Value::from(call.name.as_str());
    let arguments = if call.arguments.trim().is_empty() { "{}" } else { &call.arguments };
    format!("<tool_call>\n{{\"name\": {name}, \"arguments\": {arguments}}}\n</tool_call>")
}

fn tool_instructions(tools: &[Tool]) -> String {
    let mut text = String::from(
        "You can call these functions. Each line is one function as JSON: its name, what it does, \
         and the JSON schema of its arguments.\n",
    );
    for tool in tools {
        text.push_str(&tool_value(tool)["function"].to_string());
        text.push('\n');
    }
    text.push_str(
        "To call a function, write the following and nothing after it:\n<tool_call>\n\
         {\"name\": \"the function\", \"arguments\": {\"an argument\": \"its value\"}}\n</tool_call>",
    );
    text
}

/// A tool as chat templates expect it.
fn tool_value(tool: &Tool) -> Value {
    let mut function = json!({"name": tool.name});
    if let Some(description) = &tool.description {
        function["description"] = json!(description);
    }
    function["parameters"] = tool.parameters.clone();
    json!({"type": "function", "function": function})
}

#[cfg(test)]
mod tests {
    use super::*;

    fn conversation(tools: Vec<Tool>) -> Conversation {
        let mut call = Turn::new(Role::Assistant, "");
        let arguments = "{\"a\": 1}".to_owned();
        call.calls.push(Call { id: "c".into(), name: "f".into(), arguments });
        let turns = vec![Turn::new(Role::User, "One"), call, Turn::new(Role::Tool, "Two")];
        Conversation { turns, tools }
    }

    #[test]
    fn a_model_without_a_template_reads_the_texts() {
        let turns = with_tools_in_text(&conversation(Vec::new()), &[]);
        let call = "<tool_call>\n{\"name\": \"f\", \"arguments\": {\"a\": 1}}\n</tool_call>";
        assert_eq!(plain(&turns), format!("One\n{call}\nTwo"));
    }

    #[test]
    fn tools_are_explained_in_the_system_turn() {
        let tool =
            Tool { name: "f".into(), description: Some("Adds.".into()), parameters: json!({}) };
        let conversation = conversation(vec![tool]);
        let turns = with_tools_in_text(&conversation, &conversation.tools);
        assert_eq!(turns[0].role, Role::System);
        assert!(turns[0].text.contains(r#"{"name":"f","description":"Adds.","parameters":{}}"#));
        assert_eq!(turns.len(), 4);
    }
}

//! Anthropic's content: a text, or a list of blocks, read so that errors name the field inside.

use std::fmt;

use serde::Deserialize;
use serde::de::{self, Deserializer, SeqAccess, Visitor};
use serde_json::Value;
use utoipa::ToSchema;

use crate::anthropic::CacheControl;
use crate::error::{ApiError, Result};
use crate::openapi::schema_as;

/// A text, or blocks.
#[derive(Debug, Clone)]
pub(crate) struct Blocks(pub Vec<Block>);

schema_as!(Blocks, BlocksSchema);

/// The two forms, for the OpenAPI document.
#[derive(ToSchema)]
#[serde(untagged)]
#[allow(dead_code)] // Read by the derive only.
pub(crate) enum BlocksSchema {
    Text(String),
    Blocks(Vec<Block>),
}

/// A block of content.
#[derive(Debug, Clone, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
#[allow(dead_code)] // Some fields only say what is accepted; reading them checks them.
pub(crate) struct Block {
    /// What it is; only text and tools are understood.
    #[serde(rename = "type")]
    pub kind: BlockKind,
    /// With `text`: the text.
    pub text: Option<String>,
    /// With `tool_use`: the call's id.
    pub id: Option<String>,
    /// With `tool_use`: the tool's name.
    pub name: Option<String>,
    /// With `tool_use`: its arguments.
    #[schema(value_type = Option<Object>)]
    pub input: Option<Value>,
    /// With `tool_result`: the call it answers.
    pub tool_use_id: Option<String>,
    /// With `tool_result`: the result.
    #[schema(no_recursion)]
    pub content: Option<Blocks>,
    /// With `tool_result`: the tool failed.
    pub is_error: Option<bool>,
    /// A hint for caches; every prefix is cached here as it is.
    pub cache_control: Option<CacheControl>,
    /// Always null or empty; accepted because clients send answers back whole.
    #[schema(value_type = Option<Vec<Object>>, max_items = 0)]
    pub citations: Option<Vec<crate::openai::types::Absent>>,
}

/// Kinds of blocks.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Deserialize, ToSchema)]
#[serde(rename_all = "snake_case")]
pub(crate) enum BlockKind {
    /// Text.
    Text,
    /// A call of a tool.
    ToolUse,
    /// The result of one.
    ToolResult,
}

impl Block {
    fn text(text: String) -> Self {
        Self {
            kind: BlockKind::Text,
            text: Some(text),
            id: None,
            name: None,
            input: None,
            tool_use_id: None,
            content: None,
            is_error: None,
            cache_control: None,
            citations: None,
        }
    }

    /// That the fields are those of its kind.
    fn check(&self) -> Result<(), String> {
        let fields = [
            ("text", self.text.is_some(), BlockKind::Text, true),
            ("citations", self.citations.is_some(), BlockKind::Text, false),
            ("id", self.id.is_some(), BlockKind::ToolUse, true),
            ("name", self.name.is_some(), BlockKind::ToolUse, true),
            ("input", self.input.is_some(), BlockKind::ToolUse, true),
            ("tool_use_id", self.tool_use_id.is_some(), BlockKind::ToolResult, true),
            ("content", self.content.is_some(), BlockKind::ToolResult, false),
            ("is_error", self.is_error.is_some(), BlockKind::ToolResult, false),
        ];
        for (name, is_there, kind, required) in fields {
            if is_there && kind != self.kind {
                return Err(format!("unknown field `{name}` in a block of this type"));
            }
            if !is_there && required && kind == self.kind {
                return Err(format!("missing field `{name}`"));
            }
        }
        if self.input.as_ref().is_some_and(|input| !input.is_object()) {
            return Err("invalid type: `input` must be an object".into());
        }
        Ok(())
    }
}

impl Blocks {
    /// The text of blocks that must all be text.
    ///
    /// # Errors
    /// A block of another type.
    pub(crate) fn only_text(self, param: &str) -> Result<String> {
        let mut all = String::new();
        for (i, block) in self.0.into_iter().enumerate() {
            let Some(text) = block.text else {
                let param = format!("{param}[{i}].type");
                let message = format!("`{param}`: only text is understood here");
                return Err(ApiError::field(param, message));
            };
            all.push_str(&text);
        }
        Ok(all)
    }
}

impl<'de> Deserialize<'de> for Blocks {
    fn deserialize<D: Deserializer<'de>>(reader: D) -> Result<Self, D::Error> {
        struct Forms;
        impl<'de> Visitor<'de> for Forms {
            type Value = Blocks;
            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("a string or a list of content blocks")
            }
            fn visit_str<E: de::Error>(self, text: &str) -> Result<Blocks, E> {
                Ok(Blocks(vec![Block::text(text.to_owned())]))
            }
            fn visit_seq<A: SeqAccess<'de>>(self, mut items: A) -> Result<Blocks, A::Error> {
                let mut blocks = Vec::new();
                while let Some(block) = items.next_element::<Block>()? {
                    block.check().map_err(de::Error::custom)?;
                    blocks.push(block);
                }
                Ok(Blocks(blocks))
            }
        }
        reader.deserialize_any(Forms)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::json::from_value;
    use serde_json::json;

    #[test]
    fn texts_and_blocks_are_read() {
        let read = |value| from_value::<Blocks>(value);
        assert_eq!(read(json!("a")).unwrap().only_text("p").unwrap(), "a");
        let blocks = json!([
            {"type": "text", "text": "a", "cache_control": {"type": "ephemeral"}},
            {"type": "text", "text": "b"},
        ]);
        assert_eq!(read(blocks).unwrap().only_text("p").unwrap(), "ab");
        let call = json!([{"type": "tool_use", "id": "c", "name": "f", "input": {}}]);
        assert!(read(call.clone()).is_ok());
        assert_eq!(
            read(call).unwrap().only_text("p").unwrap_err().param.as_deref(),
            Some("p[0].type")
        );
    }

    #[test]
    fn blocks_have_the_fields_of_their_type() {
        for value in [
            json!([{"type": "text"}]),
            json!([{"type": "text", "text": "a", "id": "b"}]),
            json!([{"type": "tool_use", "id": "c", "name": "f"}]),
            json!([{"type": "tool_use", "id": "c", "name": "f", "input": []}]),
            json!([{"type": "tool_result"}]),
            json!([{"type": "image", "source": {}}]),
            json!([{}]),
            json!([1]),
            json!(1),
        ] {
            assert!(from_value::<Blocks>(value.clone()).is_err(), "{value}");
        }
    }
}

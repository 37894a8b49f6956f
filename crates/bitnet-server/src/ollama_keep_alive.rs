//! Ollama's `keep_alive`: how long a model stays in memory after a request, in seconds or as a duration.

use serde::Deserialize;
use serde::de::{self, Deserializer};
use serde_json::Value;
use utoipa::ToSchema;

use crate::openapi::schema_as;
use crate::residency::{KeepAlive, KeepAliveError};

/// How long the model stays in memory after this request.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct KeepAliveField(pub KeepAlive);

/// The two forms, for the OpenAPI document.
#[derive(ToSchema)]
#[serde(untagged)]
#[allow(dead_code)] // Read by the derive only.
pub(crate) enum KeepAliveSchema {
    /// Seconds; a negative number keeps it until others need the room.
    Seconds(f64),
    /// Such as `5m` or `1h30m`.
    Duration(String),
}

schema_as!(KeepAliveField, KeepAliveSchema);

impl<'de> Deserialize<'de> for KeepAliveField {
    fn deserialize<D: Deserializer<'de>>(reader: D) -> Result<Self, D::Error> {
        let keep = match Value::deserialize(reader)? {
            Value::Number(seconds) => seconds.as_f64().and_then(KeepAlive::from_seconds),
            Value::String(text) => text.parse().ok(),
            _ => None,
        };
        keep.map(Self).ok_or_else(|| de::Error::custom(KeepAliveError))
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use serde_json::{from_value, json};

    use super::*;

    #[test]
    fn seconds_and_durations_are_read() {
        let read = |value: Value| from_value::<KeepAliveField>(value).map(|field| field.0).ok();
        let minutes = Some(KeepAlive::For(Duration::from_secs(300)));
        assert_eq!(read(json!(300)), minutes);
        assert_eq!(read(json!("5m")), minutes);
        assert_eq!(read(json!(-1)), Some(KeepAlive::Always));
        for bad in [json!(true), json!([]), json!({}), json!("soon"), json!("")] {
            assert_eq!(read(bad.clone()), None, "{bad}");
        }
    }
}

//! `/docs`: the OpenAPI document as a page for people. One HTML file without external resources; it is
//! written here from the document itself, so that it cannot differ from it.

use std::fmt::Write;

use axum::extract::State;
use axum::http::header;
use axum::response::{IntoResponse, Response};
use serde_json::Value;

use crate::error::ApiError;
use crate::state::AppState;

const STYLE: &str = "\
:root{color-scheme:light dark}body{font:16px/1.5 system-ui,sans-serif;max-width:60rem;margin:2rem auto;\
padding:0 1rem}code,pre{font-family:ui-monospace,monospace;font-size:.9em}table{border-collapse:collapse;\
width:100%;margin:.5rem 0 1rem}td,th{text-align:left;vertical-align:top;padding:.25rem .75rem .25rem 0;\
border-bottom:1px solid #8884}details{margin:.5rem 0;padding:.5rem .75rem;border:1px solid #8886;\
border-radius:.4rem}summary{cursor:pointer}summary code{font-weight:600}.type{color:light-dark(#666,#aaa)}nav a{margin-right:1rem}";

/// Serves the page.
pub(crate) async fn docs(State(state): State<AppState>) -> Response {
    let document = serde_json::to_value(crate::openapi::own_document(&state));
    match document {
        Ok(document) => {
            let policy = "default-src 'none'; style-src 'unsafe-inline'";
            let headers = [
                (header::CONTENT_TYPE, "text/html; charset=utf-8"),
                (header::CONTENT_SECURITY_POLICY, policy),
            ];
            (headers, page(&document)).into_response()
        }
        Err(_) => ApiError::internal().into_response(),
    }
}

fn page(document: &Value) -> String {
    let title = text(&document["info"]["title"]);
    let mut html = format!(
        "<!doctype html><html lang=\"en\"><meta charset=\"utf-8\">\
         <meta name=\"viewport\" content=\"width=device-width\"><title>{title}</title>\
         <style>{STYLE}</style><main><h1>{title} {}</h1><p>{}</p>\
         <nav aria-label=\"Parts\"><a href=\"#routes\">Routes</a><a href=\"#schemas\">Types</a>\
         <a href=\"/openapi.json\">openapi.json</a></nav><h2 id=\"routes\">Routes</h2>",
        text(&document["info"]["version"]),
        text(&document["info"]["description"]),
    );
    for (path, item) in entries(&document["paths"]) {
        for (method, operation) in entries(item) {
            route(&mut html, path, method, operation);
        }
    }
    html.push_str("<h2 id=\"schemas\">Types</h2>");
    for (name, schema) in entries(&document["components"]["schemas"]) {
        let name = escape(name);
        let _ = write!(
            html,
            "<details id=\"{name}\"><summary><code>{name}</code> {}</summary>",
            text(&schema["description"])
        );
        fields(&mut html, schema);
        html.push_str("</details>");
    }
    html.push_str("</main>");
    html
}

fn route(html: &mut String, path: &str, method: &str, operation: &Value) {
    let _ = write!(
        html,
        "<details><summary><code>{} {}</code> {}</summary><p>{}</p>",
        escape(&method.to_uppercase()),
        escape(path),
        text(&operation["summary"]),
        text(&operation["description"]),
    );
    for (_, media) in entries(&operation["requestBody"]["content"]) {
        let _ = write!(html, "<p>Body: {}</p>", kind(&media["schema"]));
        if let Some(example) = media.get("example") {
            let _ = write!(html, "<pre>{}</pre>", escape(&format!("{example:#}")));
        }
    }
    html.push_str("<table><tr><th>Status</th><th>Answer</th></tr>");
    for (status, response) in entries(&operation["responses"]) {
        let bodies: Vec<String> =
            entries(&response["content"]).map(|(_, media)| kind(&media["schema"])).collect();
        let _ = write!(html, "<tr><td>{}</td><td>{}</td></tr>", escape(status), bodies.join(", "));
    }
    html.push_str("</table></details>");
}

fn fields(html: &mut String, schema: &Value) {
    if schema.get("properties").is_none() {
        let _ = write!(html, "<p>{}</p>", kind(schema));
        return;
    }
    let required = |name: &str| {
        schema["required"].as_array().is_some_and(|names| names.iter().any(|n| n == name))
    };
    html.push_str("<table>");
    for (name, field) in entries(&schema["properties"]) {
        let mark = if required(name) { "" } else { " <span class=\"type\">optional</span>" };
        let range: String = ["minimum", "maximum", "minLength", "maxLength", "maxItems"]
            .iter()
            .filter_map(|bound| Some(format!(" {bound} {}", field.get(bound)?)))
            .collect();
        let _ = write!(
            html,
            "<tr><td><code>{}</code>{mark}</td><td class=\"type\">{}{}</td><td>{}</td></tr>",
            escape(name),
            kind(field),
            escape(&range),
            text(&field["description"]),
        );
    }
    html.push_str("</table>");
}

/// A schema in a few words, with links to the types it names.
fn kind(schema: &Value) -> String {
    if let Some(name) = schema["$ref"].as_str().and_then(|path| path.rsplit('/').next()) {
        let name = escape(name);
        return format!("<a href=\"#{name}\">{name}</a>");
    }
    for union in ["oneOf", "anyOf", "allOf"] {
        if let Some(members) = schema[union].as_array() {
            return members.iter().map(kind).collect::<Vec<_>>().join(" or ");
        }
    }
    if let Some(values) = schema["enum"].as_array() {
        let values: Vec<String> = values.iter().map(|value| escape(&value.to_string())).collect();
        return values.join(" or ");
    }
    match &schema["type"] {
        Value::String(name) if name == "array" => format!("list of {}", kind(&schema["items"])),
        Value::String(name) => escape(name),
        Value::Array(names) => {
            let plain: Vec<String> = names
                .iter()
                .filter_map(Value::as_str)
                .filter(|name| *name != "null")
                .map(|name| {
                    if name == "array" {
                        format!("list of {}", kind(&schema["items"]))
                    } else {
                        escape(name)
                    }
                })
                .collect();
            plain.join(" or ")
        }
        _ => "any".to_owned(),
    }
}

fn entries(value: &Value) -> impl Iterator<Item = (&str, &Value)> {
    value.as_object().into_iter().flatten().map(|(name, value)| (name.as_str(), value))
}

fn text(value: &Value) -> String {
    escape(value.as_str().unwrap_or_default())
}

fn escape(text: &str) -> String {
    text.replace('&', "&amp;").replace('<', "&lt;").replace('>', "&gt;").replace('"', "&quot;")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_page_shows_every_route_and_loads_nothing() {
        let document = serde_json::to_value(crate::openapi::document(false, &["builtin"])).unwrap();
        let html = page(&document);
        for (path, _) in entries(&document["paths"]) {
            assert!(html.contains(&escape(path)), "{path}");
        }
        for word in ["<script", "src=", "http://", "https://", "@import", "url("] {
            assert!(!html.contains(word), "{word}");
        }
    }

    #[test]
    fn descriptions_cannot_write_html() {
        assert_eq!(escape("<b a=\"&\">"), "&lt;b a=&quot;&amp;&quot;&gt;");
    }
}

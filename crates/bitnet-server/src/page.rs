//! The page to talk to models and to watch the server, at `/`: files of `page/`, part of the binary.
//!
//! The files hold no secret, so they are sent without a key; the page asks for one when the routes it
//! calls do. It loads nothing from elsewhere, and its policy has the browser refuse to, and to parse
//! HTML or run code that comes from a model.

use std::sync::LazyLock;

use axum::extract::Path;
use axum::http::{HeaderMap, HeaderName, HeaderValue, StatusCode, Uri, header};
use axum::response::{IntoResponse, Response};
use sha2::{Digest, Sha256};

use crate::error::Result;
use crate::middleware::not_found;

/// What the page may do. Trusted types without any policy mean that no text becomes HTML or code.
const POLICY: &str = "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self'; \
    connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'; \
    require-trusted-types-for 'script'; trusted-types 'none'";

struct File {
    name: &'static str,
    text: &'static str,
}

macro_rules! files {
    ($($name:literal),* $(,)?) => {
        &[$(File { name: $name, text: include_str!(concat!("../page/", $name)) }),*]
    };
}

const FILES: &[File] = files![
    "index.html",
    "base.css",
    "chat.css",
    "metrics.css",
    "icon.svg",
    "main.js",
    "answer.js",
    "api.js",
    "chart.js",
    "chat.js",
    "dom.js",
    "highlight.js",
    "inline.js",
    "markdown.js",
    "messages.js",
    "metrics.js",
    "prometheus.js",
    "settings.js",
    "store.js",
    "tree.js",
];

/// Changes whenever any of the files does: modules import each other, so they change together.
static TAG: LazyLock<HeaderValue> = LazyLock::new(|| {
    let mut hash = Sha256::new();
    for file in FILES {
        hash.update(file.text);
    }
    let digest = hash.finalize();
    let hex: String = digest.iter().take(8).map(|byte| format!("{byte:02x}")).collect();
    HeaderValue::from_str(&format!("\"{hex}\"")).expect("hexadecimal digits are a header value")
});

impl File {
    fn media_type(&self) -> &'static str {
        match self.name.rsplit_once('.') {
            Some((_, "html")) => "text/html; charset=utf-8",
            Some((_, "css")) => "text/css; charset=utf-8",
            Some((_, "js")) => "text/javascript; charset=utf-8",
            _ => "image/svg+xml",
        }
    }

    fn respond(&self, request: &HeaderMap) -> Response {
        let headers: [(HeaderName, HeaderValue); 6] = [
            (header::CONTENT_TYPE, HeaderValue::from_static(self.media_type())),
            (header::CONTENT_SECURITY_POLICY, HeaderValue::from_static(POLICY)),
            (header::REFERRER_POLICY, HeaderValue::from_static("no-referrer")),
            (
                "cross-origin-opener-policy".parse().expect("a name"),
                HeaderValue::from_static("same-origin"),
            ),
            // Kept by browsers, but asked about each time, so that a new server has a new page.
            (header::CACHE_CONTROL, HeaderValue::from_static("no-cache")),
            (header::ETAG, TAG.clone()),
        ];
        if request.get(header::IF_NONE_MATCH) == Some(&*TAG) {
            return (StatusCode::NOT_MODIFIED, headers).into_response();
        }
        (headers, self.text).into_response()
    }
}

/// The page itself.
pub(crate) async fn index(headers: HeaderMap) -> Response {
    FILES[0].respond(&headers)
}

/// A file it is made of.
pub(crate) async fn file(
    Path(name): Path<String>,
    uri: Uri,
    headers: HeaderMap,
) -> Result<Response> {
    match FILES.iter().skip(1).find(|file| file.name == name) {
        Some(file) => Ok(file.respond(&headers)),
        None => Err(not_found(uri).await),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn nothing_is_loaded_from_elsewhere() {
        for file in FILES {
            // Namespaces are names, not addresses; links in answers are matched by a pattern.
            let text = file.text.replace("http://www.w3.org/2000/svg", "");
            for word in ["http://", "https://", "@import", "url(", "//cdn"] {
                assert!(!text.contains(word), "{word} in {}", file.name);
            }
        }
    }

    #[test]
    fn no_text_becomes_html_or_code() {
        for file in FILES {
            for word in [
                "innerHTML",
                "outerHTML",
                "insertAdjacentHTML",
                "document.write",
                "eval(",
                "new Function",
                "DOMParser",
                "srcdoc",
                "setTimeout(\"",
                "javascript:",
                "<style",
                "style=\"",
                "onclick=\"",
            ] {
                assert!(!file.text.contains(word), "{word} in {}", file.name);
            }
        }
    }

    #[test]
    fn every_file_that_is_named_is_there_and_every_file_is_named() {
        let named = |name: &str| {
            let forms = [format!("\"page/{name}\""), format!("\"./{name}\"")];
            FILES.iter().any(|file| forms.iter().any(|form| file.text.contains(form)))
        };
        for file in &FILES[1..] {
            assert!(named(file.name), "{} is used by no other file", file.name);
        }
        for file in FILES {
            for part in
                file.text.split("from \"./").skip(1).chain(file.text.split("\"page/").skip(1))
            {
                let name = part.split('"').next().unwrap_or_default();
                assert!(FILES.iter().any(|file| file.name == name), "{} wants {name}", file.name);
            }
        }
    }
}

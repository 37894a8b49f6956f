//! What every request passes on its way in and out: a name, a record, a check of where it comes from
//! and who sends it, and errors in the dialect of its path.

use std::any::Any;
use std::net::IpAddr;
use std::sync::Arc;
use std::time::Instant;

use axum::extract::{MatchedPath, Request, State};
use axum::http::{HeaderMap, HeaderName, HeaderValue, Method, StatusCode, Uri, header};
use axum::middleware::Next;
use axum::response::{IntoResponse, Response};
use tracing::Instrument;

use crate::config::{Listen, ServerConfig};
use crate::error::{ApiError, Dialect, Result, render};
use crate::lifecycle::Phase;
use crate::state::{AppState, Caller};
use crate::trace;

/// Names a request in both directions.
pub(crate) const REQUEST_ID: HeaderName = HeaderName::from_static("x-request-id");

/// Longest path and query.
const MAX_URI_BYTES: usize = 8 << 10;

/// Arrival and name of a request, for whatever comes further in.
#[derive(Debug, Clone)]
struct Arrival {
    at: Instant,
    request_id: Arc<str>,
}

/// Outermost: names the request, renders errors, counts and logs the response.
pub(crate) async fn observe(
    State(state): State<AppState>,
    mut request: Request,
    next: Next,
) -> Response {
    let at = Instant::now();
    let request_id = request_id(request.headers());
    request.extensions_mut().insert(Arrival { at, request_id: request_id.clone() });
    let method = request.method().clone();
    let dialect = Dialect::of_path(request.uri().path());
    let route = request.extensions().get::<MatchedPath>().cloned();
    let route = route.as_ref().map_or("(none)", |path| path.as_str());

    // Other methods count as one, so that clients cannot make label values.
    let known = [Method::GET, Method::POST, Method::HEAD, Method::OPTIONS];
    let method = if known.contains(&method) { method.as_str() } else { "other" };
    let span = trace::request(method, route, request.headers());

    let mut response = match check_uri(request.uri()) {
        Ok(()) => next.run(request).instrument(span.clone()).await,
        Err(error) => error.into_response(),
    };
    if let Some(error) = response.extensions_mut().remove::<ApiError>() {
        let head = std::mem::take(response.headers_mut());
        response = render(&error, dialect, &request_id);
        response.headers_mut().extend(head.into_iter().filter_map(|(name, value)| {
            let name = name?;
            (name != header::CONTENT_TYPE && name != header::CONTENT_LENGTH)
                .then_some((name, value))
        }));
        response.extensions_mut().insert(error);
    }
    if let Ok(value) = HeaderValue::from_str(&request_id) {
        if dialect == Dialect::Anthropic {
            response.headers_mut().insert("request-id", value.clone());
        }
        response.headers_mut().insert(REQUEST_ID, value);
    }
    let status = response.status().as_u16();
    let took = at.elapsed();
    state.metrics().http(method, route, status, took);
    let code = response.extensions().get::<ApiError>().and_then(|error| error.code);
    trace::answered(&span, status, code);
    tracing::info!(
        target: "bitnet_server::access",
        request_id = &*request_id,
        method,
        route,
        status,
        code,
        took_us = took.as_micros() as u64,
        "request"
    );
    response
}

fn check_uri(uri: &Uri) -> Result<()> {
    let bytes = uri.path_and_query().map_or(0, |path| path.as_str().len());
    if bytes > MAX_URI_BYTES {
        let message = format!("the URI has {bytes} bytes; {MAX_URI_BYTES} is the limit");
        return Err(ApiError::new(StatusCode::URI_TOO_LONG, message));
    }
    Ok(())
}

/// The client's own name for the request if it is harmless in a log, or a random one.
fn request_id(headers: &HeaderMap) -> Arc<str> {
    let harmless = |id: &&str| {
        let plain = |c: u8| c.is_ascii_alphanumeric() || matches!(c, b'-' | b'_' | b'.');
        (1..=64).contains(&id.len()) && id.bytes().all(plain)
    };
    match headers.get(REQUEST_ID).and_then(|value| value.to_str().ok()).filter(harmless) {
        Some(id) => id.into(),
        None => random_id("req_").into(),
    }
}

/// `prefix` and 24 random characters.
pub(crate) fn random_id(prefix: &str) -> String {
    let mut bytes = [0u8; 12];
    // Names need to be unlike, not secret; without a random source the clock will do.
    if getrandom::fill(&mut bytes).is_err() {
        let now = std::time::SystemTime::UNIX_EPOCH.elapsed().map_or(0, |d| d.as_nanos());
        bytes.copy_from_slice(&now.to_le_bytes()[..12]);
    }
    bytes.iter().fold(prefix.to_owned(), |mut id, byte| {
        id.push_str(&format!("{byte:02x}"));
        id
    })
}

/// A panic of a handler becomes a 500 of its request.
pub(crate) fn panicked(_: Box<dyn Any + Send + 'static>) -> Response {
    // The panic hook has written where and why; the request id is in the access log.
    ApiError::internal().into_response()
}

/// Refuses requests that a web page of somebody else made a browser send.
pub(crate) async fn check_source(
    State(state): State<AppState>,
    request: Request,
    next: Next,
) -> Response {
    let own_host = match host_of_request(&request) {
        Ok(host) => host,
        Err(error) => return error.into_response(),
    };
    match check_host(state.config(), &own_host)
        .and_then(|()| check_origin(state.config(), &own_host, request.headers()))
    {
        Ok(()) => next.run(request).await,
        Err(error) => {
            state.metrics().rejected(error.code.unwrap_or("other"));
            error.into_response()
        }
    }
}

/// The host a request was sent to, without port, in lower case.
fn host_of_request(request: &Request) -> Result<String> {
    let mut hosts = request.headers().get_all(header::HOST).iter();
    let host = hosts.next().map(|value| value.to_str());
    if hosts.next().is_some() {
        return Err(ApiError::new(StatusCode::BAD_REQUEST, "more than one `host` header"));
    }
    match (request.uri().host(), host) {
        (Some(host), _) => Ok(host.to_ascii_lowercase()),
        (None, Some(Ok(host))) => Ok(without_port(host).to_ascii_lowercase()),
        (None, None) => Ok(String::new()),
        (None, Some(Err(_))) => Err(ApiError::new(StatusCode::BAD_REQUEST, "a bad `host` header")),
    }
}

fn without_port(authority: &str) -> &str {
    match authority.rsplit_once(':') {
        // In `[::1]` the last colon is inside the brackets.
        Some((host, port)) if !port.contains(']') => host,
        _ => authority,
    }
}

fn is_loopback(host: &str) -> bool {
    let address = host.trim_start_matches('[').trim_end_matches(']').parse::<IpAddr>();
    host == "localhost" || address.is_ok_and(|address| address.is_loopback())
}

fn check_host(config: &ServerConfig, host: &str) -> Result<()> {
    let local = match &config.listen {
        Listen::Tcp(address) => address.ip().is_loopback(),
        #[cfg(unix)]
        Listen::Unix(_) => true,
    };
    if !local && config.allowed_hosts.is_empty() {
        return Ok(());
    }
    let allowed = |name: &String| name.eq_ignore_ascii_case(host);
    // Clients of HTTP/1.0 and of Unix sockets may send none; browsers always do.
    if host.is_empty() || is_loopback(host) || config.allowed_hosts.iter().any(allowed) {
        return Ok(());
    }
    let message = "this host name is not allowed; start the server with it as an allowed host";
    Err(ApiError::new(StatusCode::FORBIDDEN, message).code("host_not_allowed"))
}

fn check_origin(config: &ServerConfig, own_host: &str, headers: &HeaderMap) -> Result<()> {
    let Some(origin) = headers.get(header::ORIGIN) else { return Ok(()) };
    let origin = origin.to_str().unwrap_or_default();
    let host = origin.split_once("://").map_or("", |(_, authority)| without_port(authority));
    let same = !host.is_empty() && host.eq_ignore_ascii_case(own_host);
    let listed = config.cors_origins.iter().any(|allowed| allowed == "*" || allowed == origin);
    if same || listed {
        return Ok(());
    }
    let message =
        "requests from this origin are not allowed; start the server with it as a CORS origin";
    Err(ApiError::new(StatusCode::FORBIDDEN, message).code("origin_not_allowed"))
}

/// Finds out who calls; refuses strangers, and everyone once the server drains.
pub(crate) async fn authenticate(
    State(state): State<AppState>,
    mut request: Request,
    next: Next,
) -> Response {
    match identify(&state, &request) {
        Ok(caller) => {
            request.extensions_mut().insert(caller);
            next.run(request).await
        }
        Err(error) => {
            state.metrics().rejected(error.code.unwrap_or("other"));
            error.into_response()
        }
    }
}

fn identify(state: &AppState, request: &Request) -> Result<Caller> {
    let tenant = state.keys().authenticate(request.headers())?;
    if state.lifecycle().phase() > Phase::Serving {
        let error = ApiError::new(StatusCode::SERVICE_UNAVAILABLE, "the server is shutting down");
        return Err(error.code("shutting_down").retry_after(10));
    }
    let arrival = request.extensions().get::<Arrival>().ok_or_else(ApiError::internal)?;
    Ok(Caller { tenant, request_id: arrival.request_id.clone(), arrived: arrival.at })
}

/// For paths that nothing serves.
pub(crate) async fn not_found(uri: Uri) -> ApiError {
    let path: String = uri.path().chars().take(128).collect();
    ApiError::new(StatusCode::NOT_FOUND, format!("nothing is served at {path}")).code("unknown_url")
}

/// For methods that a path does not serve; axum adds the `allow` header.
pub(crate) async fn method_not_allowed(method: Method) -> ApiError {
    let method: String = method.as_str().chars().take(16).collect();
    let message = format!("{method} is not served at this path");
    ApiError::new(StatusCode::METHOD_NOT_ALLOWED, message).code("method_not_allowed")
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::net::SocketAddr;

    fn config(address: [u8; 4]) -> ServerConfig {
        let listen = Listen::Tcp(SocketAddr::from((address, 1)));
        ServerConfig { listen, ..ServerConfig::default() }
    }

    #[test]
    fn a_loopback_listener_serves_loopback_names_only() {
        let local = config([127, 0, 0, 1]);
        for host in ["localhost", "127.0.0.1", "127.9.9.9", "[::1]", ""] {
            assert!(check_host(&local, host).is_ok(), "{host}");
        }
        for host in ["evil.example", "localhost.evil.example", "127.0.0.1.evil.example", "10.0.0.1"]
        {
            assert_eq!(
                check_host(&local, host).unwrap_err().status,
                StatusCode::FORBIDDEN,
                "{host}"
            );
        }
        let named = ServerConfig { allowed_hosts: vec!["Box.lan".into()], ..local };
        assert!(check_host(&named, "box.lan").is_ok());
    }

    #[test]
    fn a_public_listener_checks_hosts_only_if_told() {
        let public = config([0, 0, 0, 0]);
        assert!(check_host(&public, "any.example").is_ok());
        let named = ServerConfig { allowed_hosts: vec!["box.lan".into()], ..public };
        assert!(check_host(&named, "any.example").is_err());
    }

    #[test]
    fn foreign_origins_are_refused_unless_listed() {
        let with = |origin: &str| {
            let mut headers = HeaderMap::new();
            headers.insert(header::ORIGIN, origin.parse().unwrap());
            headers
        };
        let mut config = config([127, 0, 0, 1]);
        assert!(check_origin(&config, "localhost", &HeaderMap::new()).is_ok());
        assert!(check_origin(&config, "localhost", &with("http://localhost:8080")).is_ok());
        for origin in ["http://evil.example", "null", "http://localhost.evil.example", "://", ""] {
            assert!(check_origin(&config, "localhost", &with(origin)).is_err(), "{origin}");
        }
        config.cors_origins.push("http://app.example".into());
        assert!(check_origin(&config, "localhost", &with("http://app.example")).is_ok());
        assert!(check_origin(&config, "localhost", &with("https://app.example")).is_err());
    }

    #[test]
    fn ports_are_cut_off() {
        assert_eq!(without_port("localhost:80"), "localhost");
        assert_eq!(without_port("[::1]:80"), "[::1]");
        assert_eq!(without_port("[::1]"), "[::1]");
        assert_eq!(without_port("a"), "a");
    }

    #[test]
    fn request_ids_cannot_forge_log_lines() {
        let with = |id: &str| {
            let mut headers = HeaderMap::new();
            headers.insert(REQUEST_ID, HeaderValue::from_bytes(id.as_bytes()).unwrap());
            request_id(&headers)
        };
        assert_eq!(&*with("abc-1.2_3"), "abc-1.2_3");
        for id in ["a b", "a\tb", "é", "", &"x".repeat(65), "a=1", "\"x\""] {
            assert!(with(id).starts_with("req_"), "{id}");
        }
        assert_ne!(with(""), with(""));
    }
}

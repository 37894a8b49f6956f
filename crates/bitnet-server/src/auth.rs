//! Who is calling: API keys, kept as SHA-256 hashes and compared in constant time.
//!
//! All keys are compared, whichever matches, so that timing tells nothing about any of them. Each key
//! is a tenant of its own: it has a bound on requests at a time and a salt that separates its part of
//! the prefix cache from the others'.

use std::sync::Arc;

use axum::http::{HeaderMap, StatusCode, header};
use sha2::{Digest, Sha256};
use subtle::ConstantTimeEq;
use tokio::sync::{OwnedSemaphorePermit, Semaphore};

use crate::error::{ApiError, Result};

/// Longest key that is looked at.
const MAX_KEY_BYTES: usize = 1024;

/// The caller of a request.
#[derive(Debug, Clone)]
pub(crate) struct Tenant {
    /// Separates the prefix caches of tenants; `None` where no keys are used.
    pub cache_salt: Option<Arc<str>>,
    slots: Arc<Semaphore>,
}

impl Tenant {
    /// A place for one more request of this tenant.
    pub(crate) fn admit(&self) -> Result<OwnedSemaphorePermit> {
        self.slots.clone().try_acquire_owned().map_err(|_| {
            let message = "this API key has as many requests in work as it may";
            ApiError::new(StatusCode::TOO_MANY_REQUESTS, message)
                .code("key_limit_reached")
                .retry_after(1)
        })
    }
}

/// The keys that open the server.
#[derive(Debug, Clone)]
pub(crate) struct ApiKeys {
    keys: Vec<([u8; 32], Tenant)>,
    anonymous: Tenant,
}

impl ApiKeys {
    /// Hashes the keys; each may have `max_requests` at a time. No keys: everyone may call, and
    /// everyone together has that bound.
    pub(crate) fn new(keys: &[String], max_requests: usize) -> Self {
        let slots = || Arc::new(Semaphore::new(max_requests.min(Semaphore::MAX_PERMITS)));
        let tenant = |key: &String| {
            let hash = hash(key.trim().as_bytes());
            let salt = hash_with_purpose(b"bitnet prefix cache salt", &hash);
            (hash, Tenant { cache_salt: Some(salt), slots: slots() })
        };
        let anonymous = Tenant { cache_salt: None, slots: slots() };
        Self { keys: keys.iter().map(tenant).collect(), anonymous }
    }

    /// Whether a key is asked for.
    pub(crate) fn required(&self) -> bool {
        !self.keys.is_empty()
    }

    /// Who sends these headers: `Authorization: Bearer KEY` or `x-api-key: KEY`.
    ///
    /// # Errors
    /// 401 where keys are in use and none of them is sent.
    pub(crate) fn authenticate(&self, headers: &HeaderMap) -> Result<Tenant> {
        if !self.required() {
            return Ok(self.anonymous.clone());
        }
        let Some(key) = presented_key(headers) else {
            let message = "no API key: send `Authorization: Bearer KEY` or `x-api-key: KEY`";
            return Err(ApiError::new(StatusCode::UNAUTHORIZED, message).code("missing_api_key"));
        };
        let presented = hash(key);
        let mut tenant = None;
        for (stored, owner) in &self.keys {
            if bool::from(stored.ct_eq(&presented)) {
                tenant = Some(owner);
            }
        }
        let message = "the API key is not one of this server's";
        let wrong = || ApiError::new(StatusCode::UNAUTHORIZED, message).code("invalid_api_key");
        tenant.cloned().ok_or_else(wrong)
    }
}

fn presented_key(headers: &HeaderMap) -> Option<&[u8]> {
    let bearer = headers.get(header::AUTHORIZATION).and_then(|value| {
        let (scheme, key) = value.as_bytes().split_at_checked(7)?;
        scheme.eq_ignore_ascii_case(b"bearer ").then(|| key.trim_ascii())
    });
    let key = bearer.or_else(|| headers.get("x-api-key").map(|value| value.as_bytes()))?;
    (!key.is_empty() && key.len() <= MAX_KEY_BYTES).then_some(key)
}

fn hash(bytes: &[u8]) -> [u8; 32] {
    Sha256::digest(bytes).into()
}

fn hash_with_purpose(purpose: &[u8], hash: &[u8; 32]) -> Arc<str> {
    let digest = Sha256::new().chain_update(purpose).chain_update(hash).finalize();
    digest.iter().take(16).map(|byte| format!("{byte:02x}")).collect::<String>().into()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn headers(name: &'static str, value: &str) -> HeaderMap {
        let mut headers = HeaderMap::new();
        headers.insert(name, value.parse().unwrap());
        headers
    }

    #[test]
    fn both_headers_are_read_and_wrong_keys_refused() {
        let keys = ApiKeys::new(&["sk-one".into(), "sk-two".into()], 4);
        for (name, value) in [
            ("authorization", "Bearer sk-one"),
            ("authorization", "bearer  sk-two"),
            ("x-api-key", "sk-two"),
        ] {
            assert!(keys.authenticate(&headers(name, value)).is_ok(), "{value}");
        }
        for (name, value) in [
            ("authorization", "sk-one"),
            ("authorization", "Basic sk-one"),
            ("authorization", "Bearer"),
            ("authorization", "Bearer "),
            ("authorization", "Bearer sk-on"),
            ("authorization", "Bearer sk-one sk-two"),
            ("x-api-key", ""),
            ("x-api-key", &"k".repeat(10_000)),
        ] {
            let error = keys.authenticate(&headers(name, value)).unwrap_err();
            assert_eq!(error.status, StatusCode::UNAUTHORIZED, "{value}");
        }
        assert!(keys.authenticate(&HeaderMap::new()).is_err());
    }

    #[test]
    fn each_key_has_its_own_salt_and_slots() {
        let keys = ApiKeys::new(&["a".into(), "b".into()], 1);
        let a = keys.authenticate(&headers("x-api-key", "a")).unwrap();
        let b = keys.authenticate(&headers("x-api-key", "b")).unwrap();
        assert_ne!(a.cache_salt, b.cache_salt);
        let slot = a.admit().unwrap();
        assert_eq!(a.admit().unwrap_err().status, StatusCode::TOO_MANY_REQUESTS);
        assert!(b.admit().is_ok());
        drop(slot);
        assert!(a.admit().is_ok());
    }

    #[test]
    fn the_salt_does_not_tell_the_key() {
        let keys = ApiKeys::new(&["secret".into()], 1);
        let tenant = keys.authenticate(&headers("x-api-key", "secret")).unwrap();
        let salt = tenant.cache_salt.unwrap();
        let plain: String = hash(b"secret").iter().map(|b| format!("{b:02x}")).collect();
        assert!(!plain.contains(&*salt));
    }

    #[test]
    fn without_keys_everyone_may_call() {
        assert!(ApiKeys::new(&[], 1).authenticate(&HeaderMap::new()).is_ok());
    }
}

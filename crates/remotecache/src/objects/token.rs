//! What GitHub's runtime token says of itself: until when it is good, and for which scopes. Its signature is for the
//! service to check.

use std::fmt;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use base64::Engine;
use base64::engine::general_purpose::URL_SAFE_NO_PAD;
use build::error::BuildError;
use serde::Deserialize;

const WRITE: u64 = 2;

/// A token. Nothing of it is printed but its scopes.
#[derive(Clone)]
pub(super) struct RuntimeToken {
    raw: String,
    /// Where caches are looked for.
    pub scopes: Vec<Scope>,
}

/// A branch or tag whose caches may be used.
#[derive(Clone, Debug, Deserialize)]
#[serde(rename_all = "PascalCase")]
pub(super) struct Scope {
    /// Such as `refs/heads/main`.
    pub scope: String,
    permission: u64,
}

#[derive(Deserialize)]
struct Claims {
    ac: Option<String>,
    exp: Option<f64>,
    nbf: Option<f64>,
}

impl fmt::Debug for RuntimeToken {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("RuntimeToken")
            .field("scopes", &self.scopes)
            .finish_non_exhaustive()
    }
}

impl RuntimeToken {
    /// Reads a token.
    ///
    /// # Errors
    /// A user error, without the token, when it is none, or cannot be used now.
    pub fn parse(raw: &str, now: SystemTime) -> Result<Self, BuildError> {
        let invalid =
            |what: &str| BuildError::user(format!("invalid token for github actions cache: {what}"));
        let mut parts = raw.trim().split('.');
        let (Some(_), Some(claims), Some(_), None) = (parts.next(), parts.next(), parts.next(), parts.next())
        else {
            return Err(invalid("not three parts"));
        };
        let claims = URL_SAFE_NO_PAD.decode(claims.trim_end_matches('='));
        let claims = claims.map_err(|_| invalid("claims are not base64"))?;
        let claims: Claims = serde_json::from_slice(&claims).map_err(|_| invalid("claims are not JSON"))?;
        let scopes = claims.ac.ok_or_else(|| invalid("no access controls"))?;
        let scopes: Vec<Scope> =
            serde_json::from_str(&scopes).map_err(|_| invalid("access controls cannot be read"))?;
        let at = |seconds: f64| {
            let since = Duration::try_from_secs_f64(seconds).ok()?;
            UNIX_EPOCH.checked_add(since)
        };
        let ends = claims
            .exp
            .and_then(at)
            .ok_or_else(|| invalid("no expiration time"))?;
        if now > ends {
            let ends = oci::timestamp::from_system(ends);
            return Err(BuildError::user(format!("cache token expired at {ends}")));
        }
        let begins = claims.nbf.and_then(at).ok_or_else(|| invalid("no issue time"))?;
        if now < begins {
            return Err(invalid("issued in the future"));
        }
        Ok(Self {
            raw: raw.trim().to_owned(),
            scopes,
        })
    }

    /// The scope that is written to; empty: none may be.
    pub fn writable(&self) -> &str {
        let writable = self
            .scopes
            .iter()
            .rev()
            .find(|scope| scope.permission & WRITE != 0);
        writable.map_or("", |scope| scope.scope.as_str())
    }

    /// The header that proves who sends a request.
    pub fn bearer(&self) -> String {
        format!("Bearer {}", self.raw)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn token(claims: &str) -> String {
        format!("e30.{}.x", URL_SAFE_NO_PAD.encode(claims))
    }

    #[test]
    fn claims_are_read() {
        let now = UNIX_EPOCH + Duration::from_secs(1000);
        let scopes = r#"[{\"Scope\":\"refs/heads/b\",\"Permission\":3},{\"Scope\":\"refs/heads/main\",\"Permission\":1}]"#;
        let good = token(&format!(r#"{{"ac":"{scopes}","exp":2000,"nbf":1000}}"#));
        let read = RuntimeToken::parse(&good, now).unwrap();
        assert_eq!((read.scopes.len(), read.writable()), (2, "refs/heads/b"));
        assert!(!format!("{read:?}").contains("e30"));
        for (claims, text) in [
            (r#"{"exp":2000,"nbf":1}"#, "no access controls"),
            (r#"{"ac":"[]","nbf":1}"#, "no expiration time"),
            (
                r#"{"ac":"[]","exp":999,"nbf":1}"#,
                "expired at 1970-01-01T00:16:39Z",
            ),
            (r#"{"ac":"[]","exp":2000,"nbf":1001}"#, "in the future"),
            (r#"{"ac":"{}","exp":2000,"nbf":1}"#, "cannot be read"),
            ("x", "not JSON"),
        ] {
            let error = RuntimeToken::parse(&token(claims), now).unwrap_err().to_string();
            assert!(error.contains(text), "{error}");
        }
        assert!(
            RuntimeToken::parse("secret", now)
                .unwrap_err()
                .to_string()
                .contains("three parts")
        );
    }
}

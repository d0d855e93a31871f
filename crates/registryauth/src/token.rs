//! Requests to token servers and their answers.
//!
//! A server is asked by GET ("Token Authentication Specification" of the distribution project) or by POST ("OAuth2 Token
//! Authentication"). The parameters of a form are in the order of their names, as Go encodes them and servers see them from
//! containerd.

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use http::HeaderValue;
use http::header::InvalidHeaderValue;
use serde::Deserialize;
use url::Url;

/// Validity of a token whose server does not say, in seconds.
pub const DEFAULT_EXPIRY_S: i64 = 60;
/// Largest answer that is read, in bytes.
pub const MAX_ANSWER_BYTES: usize = 1 << 20;
/// What a form is sent as.
pub const FORM_TYPE: &str = "application/x-www-form-urlencoded; charset=utf-8";

/// What a token server is asked for.
#[derive(Clone, Copy, Debug)]
pub struct Request<'a> {
    /// The client, as it calls itself; sent by POST only.
    pub client_id: &'a str,
    /// The service that the challenge named, or nothing.
    pub service: &'a str,
    /// Scopes, such as `repository:library/alpine:pull`.
    pub scopes: &'a [String],
}

/// In whose name a token server is asked.
#[derive(Clone, Copy)]
pub struct Account<'a> {
    /// The account's name; empty: `secret` is an identity token.
    pub username: &'a str,
    /// Its password, or an identity token.
    pub secret: &'a str,
}

impl Request<'_> {
    /// The URL to ask by GET: the realm with the query that it may have, and what is asked for.
    pub fn query(&self, mut realm: Url) -> Url {
        {
            let mut query = realm.query_pairs_mut();
            for scope in self.scopes {
                query.append_pair("scope", scope);
            }
            if !self.service.is_empty() {
                query.append_pair("service", self.service);
            }
        }
        realm
    }

    /// The body of a POST, which goes as [`FORM_TYPE`].
    pub fn form(&self, account: Account<'_>) -> String {
        let scope = self.scopes.join(" ");
        let mut form = vec![("client_id", self.client_id), ("service", self.service)];
        if !scope.is_empty() {
            form.push(("scope", &scope));
        }
        if account.username.is_empty() {
            form.extend([("grant_type", "refresh_token"), ("refresh_token", account.secret)]);
        } else {
            form.extend([
                ("grant_type", "password"),
                ("username", account.username),
                ("password", account.secret),
            ]);
        }
        form.sort_unstable();
        url::form_urlencoded::Serializer::new(String::new())
            .extend_pairs(form)
            .finish()
    }
}

impl Account<'_> {
    /// The value of an `Authorization` header of the scheme `Basic`, marked as a secret.
    ///
    /// # Errors
    /// Never for what Base64 gives; the type of the header demands it.
    pub fn basic(&self) -> Result<HeaderValue, InvalidHeaderValue> {
        let encoded = STANDARD.encode(format!("{}:{}", self.username, self.secret));
        secret_header(&format!("Basic {encoded}"))
    }
}

/// A header's value that is not shown when it is printed.
///
/// # Errors
/// When the text has characters that a header cannot hold.
pub fn secret_header(text: &str) -> Result<HeaderValue, InvalidHeaderValue> {
    let mut value = HeaderValue::from_str(text)?;
    value.set_sensitive(true);
    Ok(value)
}

/// A token as a server issues it.
#[derive(Clone, PartialEq, Eq)]
pub struct Issued {
    /// The token; never empty.
    pub token: String,
    /// Validity in seconds from now, as the server says; it may say nothing (0), or nonsense.
    pub expires_in_s: i64,
}

/// Why an answer has no token.
#[derive(Debug, thiserror::Error)]
pub enum AnswerError {
    /// It cannot be understood.
    #[error("unable to decode token response: {source}")]
    Decode {
        /// Why.
        source: serde_json::Error,
    },
    /// There is none in it.
    #[error("authorization server did not include a token in the response")]
    Missing,
}

/// Reads the body of a successful answer. A server may use the name of either specification, or both for one token.
///
/// # Errors
/// [`AnswerError`].
pub fn read_answer(body: &[u8]) -> Result<Issued, AnswerError> {
    #[derive(Deserialize)]
    struct Answer {
        #[serde(default)]
        token: String,
        #[serde(default)]
        access_token: String,
        #[serde(default)]
        expires_in: i64,
    }
    let answer: Answer = serde_json::from_slice(body).map_err(|source| AnswerError::Decode { source })?;
    let token = if answer.access_token.is_empty() {
        answer.token
    } else {
        answer.access_token
    };
    if token.is_empty() {
        return Err(AnswerError::Missing);
    }
    Ok(Issued {
        token,
        expires_in_s: answer.expires_in,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn scopes() -> Vec<String> {
        ["repository:a/b:pull", "x:y:z"].map(str::to_owned).to_vec()
    }

    fn request<'a>(service: &'a str, scopes: &'a [String]) -> Request<'a> {
        Request {
            client_id: "me",
            service,
            scopes,
        }
    }

    #[test]
    fn forms_are_in_order() {
        let scopes = scopes();
        let password = Account {
            username: "u",
            secret: "p&q",
        };
        assert_eq!(
            request("s", &scopes).form(password),
            "client_id=me&grant_type=password&password=p%26q&scope=repository%3Aa%2Fb%3Apull+x%3Ay%3Az&service=s&username=u"
        );
        let identity = Account {
            username: "",
            secret: "identity",
        };
        assert_eq!(
            request("", &[]).form(identity),
            "client_id=me&grant_type=refresh_token&refresh_token=identity&service="
        );
    }

    #[test]
    fn a_realm_keeps_its_query() {
        let scopes = scopes();
        let realm = || Url::parse("https://h/token?a=b").unwrap();
        assert_eq!(
            request("s", &scopes).query(realm()).as_str(),
            "https://h/token?a=b&scope=repository%3Aa%2Fb%3Apull&scope=x%3Ay%3Az&service=s"
        );
        assert_eq!(request("", &[]).query(realm()).as_str(), "https://h/token?a=b");
    }

    #[test]
    fn secrets_are_not_shown() {
        let account = Account {
            username: "u",
            secret: "p",
        };
        let header = account.basic().unwrap();
        assert_eq!(header.to_str().unwrap(), "Basic dTpw");
        assert!(header.is_sensitive());
        assert!(secret_header("Bearer a\nb").is_err());
    }

    #[test]
    fn answers_have_a_token_by_either_name() {
        let read = |body: &str| {
            let issued = read_answer(body.as_bytes());
            issued
                .map(|issued| (issued.token, issued.expires_in_s))
                .map_err(|error| error.to_string())
        };
        assert_eq!(read(r#"{"token":"t","expires_in":5}"#), Ok(("t".to_owned(), 5)));
        assert_eq!(
            read(r#"{"token":"t","access_token":"a"}"#),
            Ok(("a".to_owned(), 0))
        );
        let missing = "authorization server did not include a token in the response";
        assert_eq!(read("{}"), Err(missing.to_owned()));
        assert!(
            read("<html>")
                .unwrap_err()
                .starts_with("unable to decode token response: ")
        );
    }
}

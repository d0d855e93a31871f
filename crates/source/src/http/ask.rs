//! Asking a web server, and the servers that it refers to.

use reqwest::header::{AUTHORIZATION, HeaderMap, HeaderValue, LOCATION};
use reqwest::{Client, Method, Response, StatusCode, Url};

use crate::percent;

/// How many servers are asked, one referring to the next.
const MAX_REDIRECTS: usize = 10;

/// Why there is no answer.
#[derive(Debug, thiserror::Error)]
pub(super) enum AskError {
    /// A server could not be reached.
    #[error(transparent)]
    Http(#[from] reqwest::Error),
    /// Servers refer to one another without end.
    #[error("stopped after {MAX_REDIRECTS} redirects")]
    TooMany,
    /// A server refers to something that is no URL.
    #[error("failed to parse Location header {location:?}")]
    Location {
        /// What it refers to.
        location: String,
        /// What is wrong with it.
        source: url::ParseError,
    },
    /// A server refers to something that is not on a web server.
    #[error("unsupported protocol scheme {scheme:?}")]
    Scheme {
        /// Its scheme.
        scheme: String,
    },
}

/// A question, asked as often as needed.
#[derive(Debug)]
pub(super) struct Question {
    /// What is asked for.
    pub url: Url,
    /// Headers, for every server.
    pub headers: HeaderMap,
    /// The value of an `Authorization` header, for the first server and what belongs to it.
    pub authorization: Option<HeaderValue>,
}

impl Question {
    /// Asks with further headers, and follows redirects. `client` must not follow them itself. Dropping the future ends it.
    pub async fn ask(
        &self,
        client: &Client,
        method: &Method,
        more: &HeaderMap,
    ) -> Result<Response, AskError> {
        let mut url = self.url.clone();
        let mut is_trusted = true;
        for _ in 0..MAX_REDIRECTS {
            let mut headers = self.headers.clone();
            headers.extend(more.clone());
            let own = self.authorization.clone().filter(|_| is_trusted);
            if let Some(value) = own.or_else(|| account(&url)) {
                headers.insert(AUTHORIZATION, value);
            }
            let request = client.request(method.clone(), without_account(&url));
            let response = request.headers(headers).send().await?;
            let Some(next) = target(&url, &response)? else {
                return Ok(response);
            };
            // Once they were withheld, whoever refers back does not get them sent.
            is_trusted = is_trusted && belongs_to(&next, &self.url);
            url = next;
        }
        Err(AskError::TooMany)
    }
}

/// Where a server refers to. An answer that refers to nothing is one.
fn target(url: &Url, response: &Response) -> Result<Option<Url>, AskError> {
    let is_redirect = matches!(
        response.status(),
        StatusCode::MOVED_PERMANENTLY
            | StatusCode::FOUND
            | StatusCode::SEE_OTHER
            | StatusCode::TEMPORARY_REDIRECT
            | StatusCode::PERMANENT_REDIRECT
    );
    let Some(location) = response.headers().get(LOCATION).filter(|_| is_redirect) else {
        return Ok(None);
    };
    let location = String::from_utf8_lossy(location.as_bytes()).into_owned();
    if location.is_empty() {
        return Ok(None);
    }
    let next = match url.join(&location) {
        Ok(next) => next,
        Err(source) => return Err(AskError::Location { location, source }),
    };
    if !matches!(next.scheme(), "http" | "https") {
        let scheme = next.scheme().to_owned();
        return Err(AskError::Scheme { scheme });
    }
    Ok(Some(next))
}

/// Whether credentials for `first` may be sent to `next`: to the same host, on any port, and to those below it, but not
/// in the clear if they were not before. This is what Go's client does, but for the last.
fn belongs_to(next: &Url, first: &Url) -> bool {
    let (Some(next_host), Some(first_host)) = (next.host_str(), first.host_str()) else {
        return false;
    };
    let is_below = || {
        matches!(first.host(), Some(url::Host::Domain(_)))
            && next_host
                .strip_suffix(first_host)
                .is_some_and(|rest| rest.ends_with('.'))
    };
    let is_exposed = first.scheme() == "https" && next.scheme() != "https";
    !is_exposed && (next_host == first_host || is_below())
}

/// The account in a URL.
fn account(url: &Url) -> Option<HeaderValue> {
    use base64::Engine as _;
    if url.username().is_empty() && url.password().is_none() {
        return None;
    }
    let mut text = percent::decoded(url.username());
    text.push(':');
    text.push_str(&percent::decoded(url.password().unwrap_or_default()));
    let encoded = base64::engine::general_purpose::STANDARD.encode(text);
    let mut value = HeaderValue::from_str(&format!("Basic {encoded}")).ok()?;
    value.set_sensitive(true);
    Some(value)
}

pub(super) fn without_account(url: &Url) -> Url {
    let mut url = url.clone();
    // A URL that cannot have an account has none.
    let _ = url.set_password(None);
    let _ = url.set_username("");
    url
}

#[cfg(test)]
mod tests {
    use super::*;

    fn url(text: &str) -> Url {
        Url::parse(text).expect("is valid")
    }

    #[test]
    fn credentials_stay_with_their_host() {
        let is_sent = |next: &str, first: &str| belongs_to(&url(next), &url(first));
        for next in [
            "http://h.test/b",
            "https://h.test/",
            "http://h.test:8080/",
            "http://a.b.h.test/",
        ] {
            assert!(is_sent(next, "http://h.test/a"), "{next}");
        }
        for next in [
            "http://xh.test/",
            "http://test/",
            "http://h.test.evil/",
            "http://1.2.3.4/",
        ] {
            assert!(!is_sent(next, "http://h.test/a"), "{next}");
        }
        assert!(!is_sent("http://h.test/", "https://h.test/"));
        assert!(is_sent("http://1.2.3.4:1/", "http://1.2.3.4:2/"));
    }

    #[test]
    fn an_account_in_a_url_is_a_header() {
        let value = |text: &str| account(&url(text)).map(|value| value.to_str().map(str::to_owned).ok());
        assert_eq!(value("http://u:p@h/"), Some(Some("Basic dTpw".to_owned())));
        assert_eq!(value("http://u@h/"), Some(Some("Basic dTo=".to_owned())));
        assert_eq!(value("http://u%40:p@h/"), Some(Some("Basic dUA6cA==".to_owned())));
        assert_eq!(value("http://h/"), None);
        assert_eq!(without_account(&url("http://u:p@h/a")).as_str(), "http://h/a");
    }
}

//! `WWW-Authenticate` challenges (RFC 9110 §11.6.1, RFC 6750).

use std::collections::BTreeMap;

use http::HeaderMap;
use http::header::WWW_AUTHENTICATE;

/// How a host wants to be authenticated to.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) enum Scheme {
    Bearer,
    Basic,
}

/// One challenge with its parameters, keys in lower case.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Challenge {
    pub scheme: Scheme,
    pub params: BTreeMap<String, String>,
}

impl Challenge {
    pub fn param(&self, key: &str) -> &str {
        self.params.get(key).map_or("", String::as_str)
    }
}

/// Reads the challenges this client can answer, bearer before basic.
pub(crate) fn parse(headers: &HeaderMap) -> Vec<Challenge> {
    let mut found: Vec<Challenge> = headers
        .get_all(WWW_AUTHENTICATE)
        .iter()
        .filter_map(|value| value.to_str().ok())
        .filter_map(parse_one)
        .collect();
    found.sort_by_key(|challenge| challenge.scheme);
    found
}

fn parse_one(text: &str) -> Option<Challenge> {
    let (name, mut rest) = take_token(text);
    let scheme = match name.to_ascii_lowercase().as_str() {
        "bearer" => Scheme::Bearer,
        "basic" => Scheme::Basic,
        _ => return None,
    };
    let mut params = BTreeMap::new();
    loop {
        let (key, after) = take_token(rest.trim_start());
        let Some(after) = after.strip_prefix('=') else {
            break;
        };
        if key.is_empty() {
            break;
        }
        let (value, after) = take_value(after);
        params.insert(key.to_ascii_lowercase(), value);
        match after.trim_start().strip_prefix(',') {
            Some(next) => rest = next,
            None => break,
        }
    }
    Some(Challenge { scheme, params })
}

fn take_token(text: &str) -> (&str, &str) {
    let is_token = |c: char| c.is_ascii_graphic() && !"()<>@,;:\\\"/[]?={}".contains(c);
    text.split_at(text.find(|c| !is_token(c)).unwrap_or(text.len()))
}

fn take_value(text: &str) -> (String, &str) {
    let Some(quoted) = text.strip_prefix('"') else {
        let (token, rest) = take_token(text);
        return (token.to_owned(), rest);
    };
    let mut value = String::new();
    let mut chars = quoted.char_indices();
    while let Some((at, c)) = chars.next() {
        match c {
            '"' => return (value, quoted.get(at + 1..).unwrap_or("")),
            '\\' => value.extend(chars.next().map(|(_, escaped)| escaped)),
            other => value.push(other),
        }
    }
    (String::new(), "")
}

#[cfg(test)]
mod tests {
    use super::*;

    fn one(text: &str) -> Challenge {
        parse_one(text).expect("a known scheme")
    }

    #[test]
    fn reads_a_token_challenge() {
        let challenge =
            one(r#"Bearer realm="https://auth.example/token",service="r",scope="repository:a/b:pull,push""#);
        assert_eq!(challenge.scheme, Scheme::Bearer);
        assert_eq!(challenge.param("realm"), "https://auth.example/token");
        assert_eq!(challenge.param("scope"), "repository:a/b:pull,push");
        assert_eq!(challenge.param("error"), "");
    }

    #[test]
    fn reads_escapes_and_bare_values() {
        let challenge = one(r#"basic Realm="a \"b\"", charset=UTF-8"#);
        assert_eq!(challenge.param("realm"), "a \"b\"");
        assert_eq!(challenge.param("charset"), "UTF-8");
    }

    #[test]
    fn survives_garbage() {
        for text in [
            "",
            "Bearer",
            "Bearer =",
            "Bearer realm",
            "Bearer realm=\"unterminated",
            "Bearer ,,,",
            "Digest a=b",
        ] {
            let _ = parse_one(text);
        }
        assert_eq!(one("Bearer realm=\"unterminated").param("realm"), "");
    }
}

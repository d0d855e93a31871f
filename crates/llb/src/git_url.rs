//! URLs of Git repositories, in URL form and in the form of `scp`.

use oci::path;

/// Why a text is not the URL of a Git repository.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum GitUrlError {
    /// It is neither a URL nor in the form of `scp`.
    #[error("unknown protocol")]
    UnknownProtocol,
    /// It is a URL of another protocol.
    #[error("{0}: invalid protocol")]
    InvalidProtocol(String),
    /// It is a URL that cannot be parsed.
    #[error("parse {0:?}: invalid URL")]
    Invalid(String),
}

/// A parsed URL of a Git repository, with what BuildKit puts into fragment and query.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct GitUrl {
    /// `http`, `https`, `ssh` or `git`.
    pub scheme: String,
    /// User and password as written, empty where there are none.
    pub user: String,
    /// Host with its port.
    pub host: String,
    /// Path of the repository on the host, decoded.
    pub path: String,
    /// Query parameters in order, decoded.
    pub query: Vec<(String, String)>,
    /// Ref and directory of the fragment `ref:subdir`, when there is a fragment.
    pub fragment: Option<(String, String)>,
    /// What to hand to Git: the URL without query and fragment.
    pub remote: String,
}

impl GitUrl {
    /// Parses a URL such as `https://host/repo.git#ref:subdir` or `git@host:repo.git`.
    pub fn parse(text: &str) -> Result<Self, GitUrlError> {
        if let Some((scheme, rest)) = text.split_once("://")
            && !scheme.is_empty()
            && scheme.bytes().all(|c| c.is_ascii_alphanumeric())
        {
            let scheme = scheme.to_lowercase();
            if !matches!(scheme.as_str(), "http" | "https" | "ssh" | "git") {
                return Err(GitUrlError::InvalidProtocol(scheme));
            }
            return Self::parse_url(scheme, rest).ok_or_else(|| GitUrlError::Invalid(text.into()));
        }
        Self::parse_scp(text).ok_or(GitUrlError::UnknownProtocol)
    }

    fn parse_url(scheme: String, rest: &str) -> Option<Self> {
        if rest.bytes().any(|c| c.is_ascii_control()) {
            return None;
        }
        let (rest, fragment) = rest
            .split_once('#')
            .map_or((rest, ""), |(rest, fragment)| (rest, fragment));
        let (rest, query) = rest
            .split_once('?')
            .map_or((rest, ""), |(rest, query)| (rest, query));
        let (authority, path) = rest.find('/').map_or((rest, ""), |at| rest.split_at(at));
        let (user, host) = match authority.rsplit_once('@') {
            None => (None, authority),
            Some((user, host)) => (Some(user), host),
        };
        let host = decode_host(host)?;
        let remote = if rest.is_empty() {
            format!("{scheme}:")
        } else {
            let user = user.map_or_else(|| Some(String::new()), encode_user)?;
            format!(
                "{scheme}://{user}{}{}",
                encode(host.as_bytes(), is_host),
                encode_path(path)?
            )
        };
        Some(Self {
            user: user.unwrap_or_default().into(),
            host,
            path: percent_decode(path, false)?,
            // As with Go's URLs, what is malformed is left out.
            query: parse_query(query).0,
            fragment: parse_fragment(&percent_decode(fragment, false)?),
            remote,
            scheme,
        })
    }

    /// Parses `user@host:path?query#fragment`.
    fn parse_scp(text: &str) -> Option<Self> {
        let (user, rest) = text.split_once('@')?;
        let (host, rest) = rest.split_once(':')?;
        let is_user = |c: u8| c.is_ascii_alphanumeric() || c == b'-' || c == b'_';
        let is_host = |c: u8| c.is_ascii_alphanumeric() || c == b'-' || c == b'.';
        if user.is_empty() || host.is_empty() || !user.bytes().all(is_user) || !host.bytes().all(is_host) {
            return None;
        }
        let (rest, fragment) = rest
            .split_once('#')
            .map_or((rest, ""), |(rest, fragment)| (rest, fragment));
        let (path, query) = rest
            .split_once('?')
            .map_or((rest, ""), |(rest, query)| (rest, query));
        let (query, true) = parse_query(query) else {
            return None;
        };
        Some(Self {
            scheme: "ssh".into(),
            user: user.into(),
            host: host.into(),
            path: path.into(),
            query,
            fragment: parse_fragment(fragment),
            remote: format!("{user}@{host}:{path}"),
        })
    }
}

/// Splits `ref:subdir`; the directory is cleaned and relative.
fn parse_fragment(fragment: &str) -> Option<(String, String)> {
    if fragment.is_empty() {
        return None;
    }
    let (reference, subdir) = fragment.split_once(':').unwrap_or((fragment, ""));
    Some((
        reference.into(),
        path::join(&["/", subdir]).trim_start_matches('/').into(),
    ))
}

/// Reads the parameters that are well-formed, and tells whether all are.
fn parse_query(query: &str) -> (Vec<(String, String)>, bool) {
    let parse = |pair: &str| {
        let (key, value) = pair.split_once('=').unwrap_or((pair, ""));
        let good = !pair.contains(';');
        good.then_some((percent_decode(key, true)?, percent_decode(value, true)?))
    };
    let pairs = query.split('&').filter(|pair| !pair.is_empty());
    let parsed: Vec<_> = pairs.map(parse).collect();
    let all_good = parsed.iter().all(Option::is_some);
    (parsed.into_iter().flatten().collect(), all_good)
}

/// Tells whether a byte never has to be encoded.
fn is_unreserved(c: u8) -> bool {
    c.is_ascii_alphanumeric() || b"-_.~".contains(&c)
}

fn is_host(c: u8) -> bool {
    is_unreserved(c) || b"!$&'()*+,;=:[]<>\"".contains(&c)
}

/// Encodes bytes that are not to be kept.
fn encode(bytes: &[u8], keep: impl Fn(u8) -> bool) -> String {
    let mut out = String::with_capacity(bytes.len());
    for c in bytes {
        if keep(*c) {
            out.push(char::from(*c));
        } else {
            out.push_str(&format!("%{c:02X}"));
        }
    }
    out
}

/// Encodes a path anew if it is not encoded well, as Go's URLs do.
fn encode_path(path: &str) -> Option<String> {
    let is_well = |c: u8| is_unreserved(c) || b"!$&'()*+,;=:@[]%/".contains(&c);
    if path.bytes().all(is_well) {
        return Some(path.to_owned());
    }
    let keep = |c: u8| is_unreserved(c) || b"$&+,/:;=@".contains(&c);
    Some(encode(&decode_bytes(path, false)?, keep))
}

/// Encodes user and password anew; `@` is put behind them. Nothing if they hold what they must not.
fn encode_user(user: &str) -> Option<String> {
    let is_allowed = |c: u8| c.is_ascii_alphanumeric() || b"-._:~!$&'()*+,;=%@".contains(&c);
    if !user.bytes().all(is_allowed) {
        return None;
    }
    let part = |text: &str| {
        let keep = |c: u8| is_unreserved(c) || b"$&+,;=".contains(&c);
        Some(encode(&decode_bytes(text, false)?, keep))
    };
    Some(match user.split_once(':') {
        None => format!("{}@", part(user)?),
        Some((name, password)) => format!("{}:{}@", part(name)?, part(password)?),
    })
}

/// Decodes a host with its port; nothing if it cannot be one.
fn decode_host(host: &str) -> Option<String> {
    let port = match host.strip_prefix('[') {
        Some(rest) => rest.split_once(']')?.1,
        None => host.rfind(':').map_or("", |at| &host[at..]),
    };
    let is_port = port.is_empty()
        || port
            .strip_prefix(':')
            .is_some_and(|port| port.bytes().all(|c| c.is_ascii_digit()));
    let allowed = host.bytes().all(|c| c == b'%' || !c.is_ascii() || is_host(c));
    let decoded = decode_bytes(host, false)?;
    // What is encoded in a host is no ASCII.
    let plain = host.bytes().filter(u8::is_ascii).count() - 3 * host.matches('%').count();
    let kept = decoded.iter().filter(|c| c.is_ascii()).count();
    if is_port && allowed && plain == kept {
        String::from_utf8(decoded).ok()
    } else {
        None
    }
}

fn percent_decode(text: &str, plus_is_space: bool) -> Option<String> {
    String::from_utf8(decode_bytes(text, plus_is_space)?).ok()
}

fn decode_bytes(text: &str, plus_is_space: bool) -> Option<Vec<u8>> {
    let mut out = Vec::with_capacity(text.len());
    let mut bytes = text.bytes();
    while let Some(c) = bytes.next() {
        match c {
            b'%' => {
                let high = char::from(bytes.next()?).to_digit(16)?;
                let low = char::from(bytes.next()?).to_digit(16)?;
                out.push(u8::try_from(high * 16 + low).ok()?);
            }
            b'+' if plus_is_space => out.push(b' '),
            c => out.push(c),
        }
    }
    Some(out)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn remote(text: &str) -> Option<String> {
        GitUrl::parse(text).ok().map(|url| url.remote)
    }

    #[test]
    fn remotes_are_encoded_as_go_does() {
        for (text, wanted) in [
            ("https://x/a%20b.git?ref=y#z", Some("https://x/a%20b.git")),
            ("https://x/é.git", Some("https://x/%C3%A9.git")),
            ("https://x/a|%20.git", Some("https://x/a%7C%20.git")),
            ("https://x/a(b)![c].git", Some("https://x/a(b)![c].git")),
            ("https://x/(é).git", Some("https://x/%28%C3%A9%29.git")),
            ("https://u!:p%40@x:80/a", Some("https://u%21:p%40@x:80/a")),
            ("https://é.x/a", Some("https://%C3%A9.x/a")),
            ("https://[::1]:80/a", Some("https://[::1]:80/a")),
            ("https://x%20/a", None),
            ("https://a^b/a", None),
            ("https://x:ab/a", None),
            ("https://[::1/a", None),
            ("https://u\"@x/a", None),
        ] {
            assert_eq!(remote(text).as_deref(), wanted, "{text}");
        }
    }

    #[test]
    fn malformed_parameters_are_left_out_of_urls_only() {
        let url = GitUrl::parse("https://x/a.git?a;b&c=%zz&ref=y").unwrap();
        assert_eq!(url.query, [("ref".to_owned(), "y".to_owned())]);
        assert!(GitUrl::parse("git@x:a?%zz=1").is_err());
        assert!(GitUrl::parse("git@x:a?b;c").is_err());
        assert!(GitUrl::parse("git@x:a?b=c").is_ok());
    }
}

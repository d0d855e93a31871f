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
        let (rest, fragment) = rest
            .split_once('#')
            .map_or((rest, ""), |(rest, fragment)| (rest, fragment));
        let (rest, query) = rest
            .split_once('?')
            .map_or((rest, ""), |(rest, query)| (rest, query));
        if rest.bytes().any(|c| c.is_ascii_control() || c == b' ') {
            return None;
        }
        let (authority, path) = rest.find('/').map_or((rest, ""), |at| rest.split_at(at));
        let (user, host) = authority.rsplit_once('@').unwrap_or(("", authority));
        Some(Self {
            user: user.into(),
            host: host.into(),
            path: percent_decode(path, false)?,
            query: parse_query(query)?,
            fragment: parse_fragment(&percent_decode(fragment, false)?),
            remote: if rest.is_empty() {
                format!("{scheme}:")
            } else {
                format!("{scheme}://{rest}")
            },
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
        Some(Self {
            scheme: "ssh".into(),
            user: user.into(),
            host: host.into(),
            path: path.into(),
            query: parse_query(query)?,
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

fn parse_query(query: &str) -> Option<Vec<(String, String)>> {
    let pairs = query.split('&').filter(|pair| !pair.is_empty());
    pairs
        .map(|pair| {
            let (key, value) = pair.split_once('=').unwrap_or((pair, ""));
            Some((percent_decode(key, true)?, percent_decode(value, true)?))
        })
        .collect()
}

fn percent_decode(text: &str, plus_is_space: bool) -> Option<String> {
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
    String::from_utf8(out).ok()
}

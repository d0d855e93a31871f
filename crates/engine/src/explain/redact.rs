//! Keeping secrets out of what is remembered and shown: values whose names look like secrets, credentials in addresses.

use std::sync::LazyLock;

use regex::{Captures, Regex};

/// What stands in place of a secret.
pub(crate) const HIDDEN: &str = "***";

/// Parts of names that make secrets of values.
const SECRET_PARTS: [&str; 9] = [
    "TOKEN",
    "PASSWORD",
    "PASSWD",
    "PASSPHRASE",
    "SECRET",
    "KEY",
    "CREDENTIAL",
    "BEARER",
    "SIGNATURE",
];
/// Words that do so only when they stand alone in a name.
const SECRET_WORDS: [&str; 5] = ["AUTH", "AUTHORIZATION", "PASS", "PAT", "PWD"];
/// Secrets shorter than this are not looked for in other texts: they would blot out half of them.
const SHORTEST_SECRET: usize = 4;

/// Tells whether a value of this name must not be shown.
pub(crate) fn is_secret_name(name: &str) -> bool {
    let name = name.to_ascii_uppercase();
    // The shell's own name of the working directory.
    if matches!(name.as_str(), "PWD" | "OLDPWD") {
        return false;
    }
    SECRET_PARTS.iter().any(|part| name.contains(part))
        || name
            .split(|c: char| !c.is_ascii_alphanumeric())
            .any(|word| SECRET_WORDS.contains(&word))
}

type Expression = LazyLock<Option<Regex>>;

/// `scheme://user:password@`, also without a password.
static USER_INFO: Expression =
    LazyLock::new(|| Regex::new(r#"([A-Za-z][A-Za-z0-9+.-]*://)[^/\s"'<>]*@"#).ok());
/// `"NAME=value with spaces"`, in quotes of either kind.
static QUOTED: Expression = LazyLock::new(|| {
    Regex::new(r#"(")([A-Za-z_][\w.-]*)=(?:[^"\\]|\\.)*"|(')([A-Za-z_][\w.-]*)=[^']*'"#).ok()
});
/// `NAME=value`, `"name": "value"`, `Name: value`, `--name value`; the value may be quoted.
static NAMED: Expression = LazyLock::new(|| {
    let name = r#"(?:(--?[A-Za-z][\w.-]*)(\s+)|([A-Za-z_][\w.-]*)(["']?\s*[=:]\s*))"#;
    let value = r#"((?:"(?:[^"\\]|\\.)*"|'[^']*'|[^\s"'&;]|["'])+)"#;
    Regex::new(&format!("{name}{value}")).ok()
});
/// `Bearer value`, `Basic value`.
static SCHEME: Expression =
    LazyLock::new(|| Regex::new(r"(?i)\b(bearer|basic)(\s+)[A-Za-z0-9._~+/=-]{6,}").ok());

/// Replaces secrets in a text: credentials in addresses, values behind names that look like secrets, and all occurrences of
/// `known`.
pub(crate) fn text(text: &str, known: &[String]) -> String {
    let mut text = text.to_owned();
    for secret in known.iter().filter(|secret| secret.len() >= SHORTEST_SECRET) {
        text = text.replace(secret.as_str(), HIDDEN);
    }
    // The expressions are constants and do compile; were one not to, nothing is shown.
    let (Some(user_info), Some(quoted)) = (&*USER_INFO, &*QUOTED) else {
        return HIDDEN.to_owned();
    };
    let (Some(named), Some(scheme)) = (&*NAMED, &*SCHEME) else {
        return HIDDEN.to_owned();
    };
    let text = user_info.replace_all(&text, |found: &Captures<'_>| {
        let end = found.get(0).map_or(0, |whole| whole.end());
        // `oci-layout://name@sha256:…` names no user.
        match text[end..].starts_with("sha256:") {
            true => found[0].to_owned(),
            false => format!("{}{HIDDEN}@", &found[1]),
        }
    });
    let text = quoted.replace_all(&text, |found: &Captures<'_>| {
        let part = |index: usize| found.get(index).map(|part| part.as_str());
        let (quote, name) = (part(1).or(part(3)), part(2).or(part(4)));
        match (quote, name) {
            (Some(quote), Some(name)) if is_secret_name(name) => format!("{quote}{name}={HIDDEN}{quote}"),
            _ => found[0].to_owned(),
        }
    });
    let text = scheme.replace_all(&text, |found: &Captures<'_>| {
        format!("{}{}{HIDDEN}", &found[1], &found[2])
    });
    let hide = |found: &Captures<'_>| {
        let part = |index: usize| found.get(index).map_or("", |part| part.as_str());
        let (name, between) = match part(1) {
            "" => (part(3), part(4)),
            flag => (flag, part(2)),
        };
        if is_secret_name(name) && !part(5).starts_with("//") {
            format!("{name}{between}{HIDDEN}")
        } else {
            found[0].to_owned()
        }
    };
    replace_overlapping(named, &text, hide)
}

/// Replaces like `replace_all`, but looks again from within a match that was left as it is: `a=b=c` has two names.
fn replace_overlapping(regex: &Regex, text: &str, hide: impl Fn(&Captures<'_>) -> String) -> String {
    let mut out = String::with_capacity(text.len());
    let mut from = 0;
    while let Some(found) = regex.captures_at(text, from) {
        let Some(whole) = found.get(0) else { break };
        let value = found.get(5).map_or(whole.end(), |value| value.start());
        let replaced = hide(&found);
        out.push_str(&text[from..whole.start()]);
        if replaced == whole.as_str() {
            out.push_str(&text[whole.start()..value]);
            from = value;
        } else {
            out.push_str(&replaced);
            from = whole.end();
        }
    }
    out.push_str(&text[from..]);
    out
}

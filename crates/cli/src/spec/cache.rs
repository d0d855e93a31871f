//! `--export-cache`/`--cache-to` and `--import-cache`/`--cache-from`.

use std::collections::BTreeMap;

use super::{SpecError, go_bool, key_values};

/// A remote cache.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct CacheEntry {
    /// The back end's name.
    pub kind: String,
    /// Its options.
    pub attrs: BTreeMap<String, String>,
}

/// Reads a cache to export to; a bare reference means a registry.
///
/// # Errors
/// For a missing type, or a missing token of GitHub's cache.
pub fn cache_export(
    flag: &str,
    text: &str,
    env: impl Fn(&str) -> Option<String>,
) -> Result<CacheEntry, SpecError> {
    let mut entry = entry(flag, text, env)?;
    entry
        .attrs
        .entry("mode".to_owned())
        .or_insert_with(|| "min".to_owned());
    Ok(entry)
}

/// Reads a cache to import from; a bare reference means a registry.
///
/// # Errors
/// For a missing type, or a missing token of GitHub's cache.
pub fn cache_import(
    flag: &str,
    text: &str,
    env: impl Fn(&str) -> Option<String>,
) -> Result<CacheEntry, SpecError> {
    entry(flag, text, env)
}

fn entry(flag: &str, text: &str, env: impl Fn(&str) -> Option<String>) -> Result<CacheEntry, SpecError> {
    if !text.contains("type=") {
        let attrs = BTreeMap::from([("ref".to_owned(), text.to_owned())]);
        return Ok(CacheEntry {
            kind: "registry".to_owned(),
            attrs,
        });
    }
    let mut kind = String::new();
    let mut attrs = BTreeMap::new();
    for (key, value) in key_values(text)? {
        if key == "type" {
            kind = value;
        } else {
            attrs.insert(key, value);
        }
    }
    if kind.is_empty() {
        return Err(SpecError::invalid(format!("{flag} requires type=<type>")));
    }
    if kind == "gha" {
        add_github_env(&mut attrs, env)?;
    }
    Ok(CacheEntry { kind, attrs })
}

/// Fills in what GitHub's runner tells a job of its cache service.
fn add_github_env(
    attrs: &mut BTreeMap<String, String>,
    env: impl Fn(&str) -> Option<String>,
) -> Result<(), SpecError> {
    let second = match attrs.get("version") {
        Some(version) => version == "2",
        None => env("ACTIONS_CACHE_SERVICE_V2").is_some_and(|value| go_bool(&value).unwrap_or(false)),
    };
    if second
        && !attrs.contains_key("url_v2")
        && let Some(url) = env("ACTIONS_RESULTS_URL")
    {
        attrs.insert("url_v2".to_owned(), url);
    }
    if !attrs.contains_key("url")
        && let Some(url) = env("ACTIONS_CACHE_URL").or_else(|| env("ACTIONS_RESULTS_URL"))
    {
        attrs.insert("url".to_owned(), url);
    }
    if !attrs.contains_key("url") && !attrs.contains_key("url_v2") {
        return Err(SpecError::invalid(
            "cache with type gha requires url parameter to be set",
        ));
    }
    if !attrs.contains_key("token") {
        let token = env("ACTIONS_RUNTIME_TOKEN").ok_or_else(|| {
            SpecError::invalid("cache with type gha requires token parameter or $ACTIONS_RUNTIME_TOKEN")
        })?;
        attrs.insert("token".to_owned(), token);
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn no_env(_: &str) -> Option<String> {
        None
    }

    #[test]
    fn reads_caches() {
        let export = cache_export("--export-cache", "type=local,dest=x", no_env).unwrap();
        assert_eq!(
            (export.kind.as_str(), export.attrs["mode"].as_str()),
            ("local", "min")
        );
        let import = cache_import("--import-cache", "example.com/cache", no_env).unwrap();
        assert_eq!(
            (import.kind.as_str(), import.attrs["ref"].as_str()),
            ("registry", "example.com/cache")
        );
        assert!(!import.attrs.contains_key("mode"));
        let error = cache_export("--export-cache", "type=,ref=x", no_env).unwrap_err();
        assert_eq!(error.to_string(), "--export-cache requires type=<type>");
    }

    #[test]
    fn github_needs_a_token() {
        let env = |name: &str| match name {
            "ACTIONS_CACHE_URL" => Some("http://x".to_owned()),
            "ACTIONS_RUNTIME_TOKEN" => Some("secret".to_owned()),
            _ => None,
        };
        let entry = cache_import("--import-cache", "type=gha", env).unwrap();
        assert_eq!(
            (entry.attrs["url"].as_str(), entry.attrs["token"].as_str()),
            ("http://x", "secret")
        );
        assert!(cache_import("--import-cache", "type=gha", no_env).is_err());
    }
}

//! `--opt`, `--local` and other `name=value` flags, and `--allow`.

use std::collections::BTreeMap;

use super::SpecError;
use crate::format::csv;

/// Reads `name=value` pairs; a later one replaces an earlier one.
///
/// # Errors
/// For a value without `=`.
pub fn attributes<S: AsRef<str>>(values: &[S]) -> Result<BTreeMap<String, String>, SpecError> {
    let mut map = BTreeMap::new();
    for value in values {
        let value = value.as_ref();
        let (name, value) = value
            .split_once('=')
            .ok_or_else(|| SpecError::invalid(format!("invalid value {value}")))?;
        map.insert(name.to_owned(), value.to_owned());
    }
    Ok(map)
}

/// Reads frontend options. A build argument without a value takes it from this process' environment and is left out
/// when it is not set there; `SOURCE_DATE_EPOCH` is always passed on.
///
/// # Errors
/// For a value without `=`.
pub fn build_opts(
    values: &[String],
    env: impl Fn(&str) -> Option<String>,
) -> Result<BTreeMap<String, String>, SpecError> {
    let mut options = BTreeMap::new();
    if let Some(epoch) = env("SOURCE_DATE_EPOCH") {
        options.insert("build-arg:SOURCE_DATE_EPOCH".to_owned(), epoch);
    }
    let mut resolved = Vec::new();
    for value in values {
        match value.strip_prefix("build-arg:") {
            Some(name) if !name.is_empty() && !name.contains('=') => {
                if let Some(from_env) = env(name) {
                    resolved.push(format!("{value}={from_env}"));
                }
            }
            _ => resolved.push(value.clone()),
        }
    }
    options.extend(attributes(&resolved)?);
    Ok(options)
}

/// Checks the rights that `--allow` grants.
///
/// # Errors
/// For a right of another name.
pub fn allow(values: &[String]) -> Result<(), SpecError> {
    for value in values {
        let unknown = || SpecError::invalid(format!("unknown entitlement {value}"));
        match value.split_once('=') {
            Some(("device", devices)) => check_device(devices)?,
            None if matches!(value.as_str(), "security.insecure" | "network.host" | "device") => {}
            _ => return Err(unknown()),
        }
    }
    Ok(())
}

fn check_device(devices: &str) -> Result<(), SpecError> {
    if devices.is_empty() {
        return Ok(());
    }
    for field in csv::fields(devices)?.iter().skip(1) {
        match field.split_once('=') {
            Some(("alias", _)) => {}
            Some((key, _)) => return Err(SpecError::invalid(format!("unknown device config key {key:?}"))),
            None => return Err(SpecError::invalid(format!("invalid device config {field:?}"))),
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn owned(values: &[&str]) -> Vec<String> {
        values.iter().map(|value| (*value).to_owned()).collect()
    }

    #[test]
    fn build_arguments_come_from_the_environment() {
        let env = |name: &str| (name == "FOO").then(|| "bar".to_owned());
        let opts = build_opts(&owned(&["build-arg:FOO", "build-arg:UNSET", "target=x=y"]), env).unwrap();
        assert_eq!(
            opts.into_iter().collect::<Vec<_>>(),
            [
                ("build-arg:FOO".to_owned(), "bar".to_owned()),
                ("target".to_owned(), "x=y".to_owned())
            ]
        );
        let epoch = |name: &str| (name == "SOURCE_DATE_EPOCH").then(|| "1".to_owned());
        assert_eq!(
            build_opts(&[], epoch).unwrap()["build-arg:SOURCE_DATE_EPOCH"],
            "1"
        );
        assert_eq!(
            build_opts(&owned(&["x"]), env).unwrap_err().to_string(),
            "invalid value x"
        );
    }

    #[test]
    fn rights_are_known_by_name() {
        assert!(
            allow(&owned(&[
                "security.insecure",
                "network.host",
                "device",
                "device=vendor/x=y,alias=z"
            ]))
            .is_ok()
        );
        assert!(allow(&owned(&["device=a,foo=b"])).is_err());
        assert_eq!(
            allow(&owned(&["root"])).unwrap_err().to_string(),
            "unknown entitlement root"
        );
    }
}

//! `--attest`, `--sbom` and `--provenance`.

use super::{SpecError, go_bool, key_values};

/// Turns an attestation (`type=provenance,mode=max`) into the frontend's option, or nothing when it is disabled.
/// `kind` names the type when the flag does (`--sbom=true`, `--provenance=mode=max`).
///
/// # Errors
/// For a missing type.
pub fn attestation(kind: Option<&str>, text: &str) -> Result<Option<(String, String)>, SpecError> {
    let text = match (kind, go_bool(text)) {
        (Some(_), Ok(false)) => return Ok(None),
        (Some(kind), Ok(true)) => return Ok(Some((format!("attest:{kind}"), String::new()))),
        _ => text,
    };
    let fields = key_values(text)?;
    let value_of = |name: &str| {
        fields
            .iter()
            .find(|(key, _)| key == name)
            .map(|(_, value)| value.as_str())
    };
    let kind = kind
        .or_else(|| value_of("type"))
        .ok_or_else(|| SpecError::invalid("attestation type not specified"))?;
    if value_of("disabled").is_some_and(|disabled| go_bool(disabled).unwrap_or(false)) {
        return Ok(None);
    }
    let rest: Vec<String> = fields
        .iter()
        .filter(|(key, _)| key != "type" && key != "disabled")
        .map(|(key, value)| format!("{key}={value}"))
        .collect();
    Ok(Some((format!("attest:{kind}"), rest.join(","))))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn reads_attestations() {
        let some = |key: &str, value: &str| Some((key.to_owned(), value.to_owned()));
        assert_eq!(
            attestation(None, "type=sbom,generator=x").unwrap(),
            some("attest:sbom", "generator=x")
        );
        assert_eq!(
            attestation(Some("provenance"), "mode=max").unwrap(),
            some("attest:provenance", "mode=max")
        );
        assert_eq!(
            attestation(Some("sbom"), "true").unwrap(),
            some("attest:sbom", "")
        );
        assert_eq!(attestation(Some("sbom"), "false").unwrap(), None);
        assert_eq!(attestation(None, "type=sbom,disabled=true").unwrap(), None);
        assert!(attestation(None, "mode=max").is_err());
    }
}

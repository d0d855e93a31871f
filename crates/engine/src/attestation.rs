//! Statements about a result that the engine makes itself: provenance, and a scanner's bill of materials.
//!
//! The options are those of BuildKit: `attest:provenance` and `attest:sbom` among the frontend's options, or the build
//! arguments `BUILDKIT_ATTEST_…`. Statements are attached to the result after the build; exporters write them.

mod build_config;
mod capture;
mod predicate;
mod provenance;
mod request;
mod sbom;

use std::collections::BTreeMap;

use crate::error::BuildError;

pub use provenance::ProvenanceProcessor;
pub use sbom::SbomProcessor;

const OPT_PREFIX: &str = "attest:";
const ARG_PREFIX: &str = "build-arg:BUILDKIT_ATTEST_";
/// Why an attestation was made.
const REASON_KEY: &str = "reason";
/// Whether an attestation only makes sense inside the image.
const INLINE_ONLY_KEY: &str = "inline-only";

/// What the client wants stated about its result.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Wanted {
    /// Parameters of the provenance; `None`: not wanted.
    pub provenance: Option<BTreeMap<String, String>>,
    /// Parameters of the bill of materials; `None`: not wanted.
    pub sbom: Option<BTreeMap<String, String>>,
}

/// Reads what is wanted from the frontend's options.
///
/// # Errors
/// A user error for kinds and versions that are not known, and for lists that cannot be read.
pub fn wanted(opts: &BTreeMap<String, String>) -> Result<Wanted, BuildError> {
    let mut wanted = Wanted::default();
    for (key, value) in opts {
        let kind = key
            .strip_prefix(OPT_PREFIX)
            .or_else(|| key.strip_prefix(ARG_PREFIX));
        let Some(kind) = kind.map(str::to_lowercase) else {
            continue;
        };
        let mut attrs = BTreeMap::new();
        for field in fields(value).map_err(|error| error.context(format!("failed to parse {kind}")))? {
            let (name, value) = field.split_once('=').unwrap_or((&field, ""));
            attrs.insert(name.to_owned(), value.to_owned());
        }
        match kind.as_str() {
            "provenance" => {
                let version = attrs
                    .entry("version".to_owned())
                    .or_insert_with(|| "v1".to_owned());
                if !matches!(version.as_str(), "v1" | "v0.2") {
                    return Err(BuildError::user(format!(
                        "invalid provenance SLSA version: {version}"
                    )));
                }
                wanted.provenance = Some(attrs);
            }
            "sbom" => {
                let generator = attrs.entry("generator".to_owned());
                if generator
                    .or_insert_with(|| sbom::DEFAULT_GENERATOR.to_owned())
                    .is_empty()
                {
                    return Err(BuildError::user("sbom generator cannot be empty"));
                }
                wanted.sbom = Some(attrs);
            }
            _ => return Err(BuildError::user(format!("unknown attestation type {kind:?}"))),
        }
    }
    Ok(wanted)
}

/// The fields of one line of comma-separated values.
fn fields(line: &str) -> Result<Vec<String>, BuildError> {
    let mut fields = Vec::new();
    let mut rest = line;
    while !rest.is_empty() {
        let (field, after) = match rest.strip_prefix('"') {
            None => rest
                .split_once(',')
                .map_or((rest.to_owned(), None), |(f, after)| (f.to_owned(), Some(after))),
            Some(quoted) => quoted_field(quoted)?,
        };
        fields.push(field);
        rest = after.unwrap_or_default();
    }
    Ok(fields)
}

/// A field in quotes, in which doubled quotes stand for one, and what follows it.
fn quoted_field(text: &str) -> Result<(String, Option<&str>), BuildError> {
    let mut field = String::new();
    let mut rest = text;
    loop {
        let Some((part, after)) = rest.split_once('"') else {
            return Err(BuildError::user("extraneous or missing \" in quoted-field"));
        };
        field.push_str(part);
        match after.chars().next() {
            None => return Ok((field, None)),
            Some(',') => return Ok((field, Some(&after[1..]))),
            Some('"') => {
                field.push('"');
                rest = &after[1..];
            }
            Some(_) => return Err(BuildError::user("extraneous or missing \" in quoted-field")),
        }
    }
}

/// Reads a flag as Go does.
fn flag(text: &str) -> Option<bool> {
    match text {
        "1" | "t" | "T" | "true" | "TRUE" | "True" => Some(true),
        "0" | "f" | "F" | "false" | "FALSE" | "False" => Some(false),
        _ => None,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn opts(pairs: &[(&str, &str)]) -> BTreeMap<String, String> {
        pairs
            .iter()
            .map(|(key, value)| ((*key).to_owned(), (*value).to_owned()))
            .collect()
    }

    #[test]
    fn kinds_have_defaults() {
        let wanted = wanted(&opts(&[
            ("attest:provenance", "mode=min"),
            ("build-arg:BUILDKIT_ATTEST_SBOM", ""),
        ]))
        .unwrap();
        assert_eq!(
            wanted.provenance,
            Some(opts(&[("mode", "min"), ("version", "v1")]))
        );
        assert_eq!(wanted.sbom, Some(opts(&[("generator", sbom::DEFAULT_GENERATOR)])));
    }

    #[test]
    fn what_is_not_known_is_refused() {
        assert!(wanted(&opts(&[("attest:vibes", "")])).is_err());
        assert!(wanted(&opts(&[("attest:provenance", "version=v9")])).is_err());
        assert!(wanted(&opts(&[("attest:sbom", "generator=")])).is_err());
    }

    #[test]
    fn fields_may_be_quoted() {
        assert_eq!(
            fields("a=1,\"b=x,\"\"y\"\"\",c").unwrap(),
            ["a=1", "b=x,\"y\"", "c"]
        );
        assert!(fields("\"a").is_err());
        assert!(fields("").unwrap().is_empty());
    }
}

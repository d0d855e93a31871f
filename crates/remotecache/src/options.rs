//! Attributes of cache exporters and importers. Those that are not known are refused by name: one that is ignored would
//! lose cache without a word.

use std::collections::BTreeMap;

use build::cache_export::CacheMode;
use build::error::BuildError;
use export::image::options::{ImageOptions, LayerOptions, parse_bool};
use oci::media_type;

/// How a cache's manifest looks.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum ManifestForm {
    /// An image manifest, which all registries take.
    #[default]
    Image,
    /// An index whose entries are layers.
    Index,
    /// Docker's manifest list whose entries are layers of Docker's types.
    DockerList,
}

impl ManifestForm {
    /// Returns the manifest's media type.
    pub fn media_type(self) -> &'static str {
        match self {
            Self::Image => media_type::OCI_MANIFEST,
            Self::Index => media_type::OCI_INDEX,
            Self::DockerList => media_type::DOCKER_MANIFEST_LIST,
        }
    }
}

/// Attributes by which all exporters are the same.
#[derive(Clone, Debug, Default)]
pub struct ExportOptions {
    /// Which steps' results are taken along.
    pub mode: CacheMode,
    /// Whether a failure does not fail the build.
    pub ignore_error: bool,
    /// What is left out makes the export fail: the client said that it ignores no errors.
    pub complete: bool,
    /// How layers are packed.
    pub layers: LayerOptions,
    /// How the cache's manifest looks.
    pub form: ManifestForm,
    /// Accept any certificate, and plain HTTP.
    pub insecure: bool,
}

const PACKING: [&str; 3] = ["compression", "force-compression", "compression-level"];

/// Reads the attributes of an exporter; `own` are those of its kind.
///
/// # Errors
/// A user error for an attribute or a value that is not known.
pub fn read_export(
    kind: &str,
    attrs: &BTreeMap<String, String>,
    own: &[&str],
) -> Result<ExportOptions, BuildError> {
    let mut options = ExportOptions::default();
    let mut oci_types = true;
    let mut image_manifest = None;
    let mut packing = BTreeMap::new();
    for (key, value) in attrs {
        match key.as_str() {
            "mode" => options.mode = mode(value)?,
            "ignore-error" => {
                options.ignore_error = value.is_empty() || parse_bool(key, value)?;
                options.complete = !options.ignore_error;
            }
            "oci-mediatypes" => oci_types = parse_bool(key, value)?,
            "image-manifest" => image_manifest = Some(parse_bool(key, value)?),
            "registry.insecure" if own.contains(&"registry.insecure") => {
                options.insecure = parse_bool(key, value)?
            }
            key if PACKING.contains(&key) => {
                packing.insert(key.to_owned(), value.clone());
            }
            key if own.contains(&key) => {}
            key => return Err(unsupported(kind, "exporter", key)),
        }
    }
    options.layers = ImageOptions::read(&packing)?.layers;
    options.form = match (image_manifest.unwrap_or(oci_types), oci_types) {
        (true, true) => ManifestForm::Image,
        (false, true) => ManifestForm::Index,
        (false, false) => ManifestForm::DockerList,
        (true, false) => {
            return Err(BuildError::user(
                "invalid configuration for remote cache, OCI mediatypes are required for image-manifest cache format",
            ));
        }
    };
    Ok(options)
}

/// Checks the attributes of an importer. Those of its exporter mean nothing, but are what users copy.
///
/// # Errors
/// A user error for an attribute that is not known.
pub fn check_import(kind: &str, attrs: &BTreeMap<String, String>, own: &[&str]) -> Result<(), BuildError> {
    const OF_EXPORTS: [&str; 4] = ["mode", "ignore-error", "oci-mediatypes", "image-manifest"];
    for key in attrs.keys().map(String::as_str) {
        if !own.contains(&key) && !OF_EXPORTS.contains(&key) && !PACKING.contains(&key) {
            return Err(unsupported(kind, "importer", key));
        }
    }
    Ok(())
}

/// Returns an attribute that is a yes or no; absent: no.
pub fn is_set(attrs: &BTreeMap<String, String>, key: &str) -> Result<bool, BuildError> {
    attrs.get(key).map_or(Ok(false), |value| parse_bool(key, value))
}

fn unsupported(kind: &str, what: &str, key: &str) -> BuildError {
    BuildError::user(format!(
        "attribute {key:?} is not supported by the {kind} cache {what}"
    ))
}

fn mode(text: &str) -> Result<CacheMode, BuildError> {
    match text {
        "" | "min" => Ok(CacheMode::Min),
        "max" => Ok(CacheMode::Max),
        other => Err(BuildError::user(format!("invalid cache export mode: {other}"))),
    }
}

#[cfg(test)]
mod tests {
    use layer::compress::Compression;

    use super::super::objects::ObjectKind;
    use super::*;

    fn attrs(pairs: &[(&str, &str)]) -> BTreeMap<String, String> {
        pairs
            .iter()
            .map(|(key, value)| ((*key).to_owned(), (*value).to_owned()))
            .collect()
    }

    #[test]
    fn attributes_are_read() {
        let given = [
            ("ref", "x"),
            ("mode", "max"),
            ("compression", "zstd"),
            ("registry.insecure", "true"),
        ];
        let options = read_export("registry", &attrs(&given), &["ref", "registry.insecure"]).unwrap();
        assert_eq!(
            (options.mode, options.layers.compression),
            (CacheMode::Max, Compression::Zstd)
        );
        assert_eq!((options.form, options.insecure), (ManifestForm::Image, true));
        let options = read_export("local", &attrs(&[("oci-mediatypes", "false")]), &[]).unwrap();
        assert_eq!(options.form, ManifestForm::DockerList);
    }

    /// What the ecosystem's documentation names for exports and imports to and from object stores.
    #[test]
    fn what_is_documented_of_object_stores_is_known() {
        let s3 = "bucket region blobs_prefix manifests_prefix endpoint_url use_path_style disable_accept_encoding \
                  access_key_id secret_access_key session_token prefix name touch_refresh upload_parallelism retry_mode \
                  retry_max_attempts";
        let azure =
            "account_url account_name container blobs_prefix manifests_prefix secret_access_key prefix name";
        let github = "url url_v2 token scope timeout ghtoken repository version";
        for (kind, names) in [
            (ObjectKind::S3, s3),
            (ObjectKind::AzureBlob, azure),
            (ObjectKind::GitHub, github),
        ] {
            for name in names.split_whitespace() {
                let given = attrs(&[(name, "x")]);
                read_export(kind.name(), &given, kind.attributes()).unwrap();
                check_import(kind.name(), &given, kind.attributes()).unwrap();
            }
            let common = [
                ("mode", "max"),
                ("ignore-error", "true"),
                ("compression", "zstd"),
                ("compression-level", "3"),
                ("force-compression", "true"),
            ];
            let options = read_export(kind.name(), &attrs(&common), kind.attributes()).unwrap();
            assert!(options.ignore_error && options.layers.force);
            check_import(kind.name(), &attrs(&common), kind.attributes()).unwrap();
            let unknown = attrs(&[("dest", "x")]);
            assert!(read_export(kind.name(), &unknown, kind.attributes()).is_err());
        }
    }

    #[test]
    fn what_is_not_known_is_named() {
        let error = |given: &[(&str, &str)]| {
            read_export("local", &attrs(given), &["dest"])
                .unwrap_err()
                .to_string()
        };
        assert_eq!(
            error(&[("scope", "x")]),
            "attribute \"scope\" is not supported by the local cache exporter"
        );
        assert_eq!(error(&[("mode", "most")]), "invalid cache export mode: most");
        assert!(error(&[("registry.insecure", "true")]).contains("registry.insecure"));
        assert!(error(&[("image-manifest", "true"), ("oci-mediatypes", "false")]).contains("OCI mediatypes"));
        assert!(check_import("registry", &attrs(&[("ref", "x"), ("mode", "max")]), &["ref"]).is_ok());
        assert!(check_import("registry", &attrs(&[("reff", "x")]), &["ref"]).is_err());
    }
}

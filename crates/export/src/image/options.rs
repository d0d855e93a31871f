//! Attributes that all image exporters share, with BuildKit's names and texts.

use std::collections::BTreeMap;

use build::error::BuildError;
use bytes::Bytes;
use layer::compress::Compression;
use layer::tree::Timestamp;
use oci::media_type;

use super::annotations::Annotations;
use crate::platforms::{EPOCH_ATTRIBUTE, parse_epoch};

/// How layers are packed.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct LayerOptions {
    /// Compression of layers that have no blob yet.
    pub compression: Compression,
    /// Its level; `None`: the format's default.
    pub level: Option<i32>,
    /// Whether layers that have a blob of another compression are converted.
    pub force: bool,
    /// Whether layers with places of their own keep those and their non-distributable type.
    pub prefer_nondistributable: bool,
}

impl LayerOptions {
    /// OCI's media type of layers made with these options.
    pub fn media_type(&self) -> &'static str {
        match self.compression {
            Compression::Uncompressed => media_type::OCI_LAYER,
            Compression::Gzip | Compression::Estargz => media_type::OCI_LAYER_GZIP,
            Compression::Zstd => media_type::OCI_LAYER_ZSTD,
        }
    }
}

/// What an image exporter was asked for.
#[derive(Clone, Debug, Default)]
pub struct ImageOptions {
    /// Names, separated by commas; `*` takes the one of the result's metadata.
    pub name: String,
    /// How layers are packed.
    pub layers: LayerOptions,
    /// OCI's media types instead of Docker's; unset: decided by the exporter.
    pub oci_types: Option<bool>,
    /// Attestations as OCI artifacts; unset: with OCI's media types.
    pub oci_artifact: Option<bool>,
    /// Annotations.
    pub annotations: Annotations,
    /// The latest time in the image; the inner `None` takes no notice of the frontend's either.
    pub epoch: Option<Option<Timestamp>>,
    /// Keep attestations that only make sense inside the image.
    pub force_inline_attestations: bool,
    /// Set the times in layers to at most the epoch.
    pub rewrite_timestamp: bool,
    /// Attributes with no meaning here: metadata that overrides the result's.
    pub rest: BTreeMap<String, String>,
}

impl ImageOptions {
    /// Reads the shared attributes; the others are left in `rest`.
    pub fn read(attrs: &BTreeMap<String, String>) -> Result<Self, BuildError> {
        let mut this = Self::default();
        for (key, value) in attrs {
            match key.as_str() {
                "name" => this.name.clone_from(value),
                "oci-mediatypes" => this.oci_types = Some(parse_bool(key, value)?),
                "oci-artifact" => this.oci_artifact = Some(parse_bool(key, value)?),
                "attestation-inline" => this.force_inline_attestations = parse_bool(key, value)?,
                "prefer-nondist-layers" => this.layers.prefer_nondistributable = parse_bool(key, value)?,
                "rewrite-timestamp" => this.rewrite_timestamp = parse_bool(key, value)?,
                "compression" => this.layers.compression = compression(value)?,
                "force-compression" => this.layers.force = flag(key, value)?,
                "compression-level" => {
                    let level = value.parse().map_err(|_| {
                        BuildError::user(format!("non-integer value {value} specified for {key}"))
                    })?;
                    this.layers.level = Some(level);
                }
                EPOCH_ATTRIBUTE => this.epoch = Some(parse_epoch(value)?),
                _ => {
                    if !this.annotations.read(key, value)? {
                        this.rest.insert(key.clone(), value.clone());
                    }
                }
            }
        }
        this.validate()?;
        Ok(this)
    }

    /// Whether OCI's media types are used; Docker's only if they were asked for.
    pub fn uses_oci_types(&self) -> bool {
        self.oci_types.unwrap_or(true)
    }

    /// Whether attestations are written as OCI artifacts.
    pub fn uses_oci_artifact(&self) -> bool {
        self.oci_artifact.unwrap_or_else(|| self.uses_oci_types())
    }

    /// Takes an attribute with no meaning for all image exporters, as a flag: an empty value is yes.
    pub fn take_flag(&mut self, key: &str) -> Result<Option<bool>, BuildError> {
        self.rest.remove(key).map(|value| flag(key, &value)).transpose()
    }

    /// The result's metadata as the attributes override it.
    pub fn metadata(&self, metadata: &BTreeMap<String, Bytes>) -> BTreeMap<String, Bytes> {
        let mut all = metadata.clone();
        all.extend(
            self.rest
                .iter()
                .map(|(key, value)| (key.clone(), Bytes::from(value.clone()))),
        );
        all
    }

    fn validate(&self) -> Result<(), BuildError> {
        if self.uses_oci_types() {
            return Ok(());
        }
        if self.layers.compression == Compression::Estargz {
            return Err(BuildError::user(
                "exporter option \"compression=estargz\" conflicts with \"oci-mediatypes=false\"",
            ));
        }
        if self.uses_oci_artifact() {
            return Err(BuildError::user(
                "exporter option \"oci-artifact=true\" conflicts with \"oci-mediatypes=false\"",
            ));
        }
        Ok(())
    }
}

fn compression(text: &str) -> Result<Compression, BuildError> {
    match text {
        "uncompressed" => Ok(Compression::Uncompressed),
        "gzip" => Ok(Compression::Gzip),
        "estargz" => Ok(Compression::Estargz),
        "zstd" => Ok(Compression::Zstd),
        other => Err(BuildError::user(format!("unsupported compression type {other}"))),
    }
}

fn flag(key: &str, value: &str) -> Result<bool, BuildError> {
    if value.is_empty() {
        Ok(true)
    } else {
        parse_bool(key, value)
    }
}

/// The spellings of Go's `strconv.ParseBool`.
pub fn parse_bool(key: &str, value: &str) -> Result<bool, BuildError> {
    match value {
        "1" | "t" | "T" | "true" | "TRUE" | "True" => Ok(true),
        "0" | "f" | "F" | "false" | "FALSE" | "False" => Ok(false),
        other => Err(BuildError::user(format!(
            "non-bool value specified for {key}: strconv.ParseBool: parsing {other:?}: invalid syntax"
        ))),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn read(attrs: &[(&str, &str)]) -> Result<ImageOptions, BuildError> {
        ImageOptions::read(
            &attrs
                .iter()
                .map(|(key, value)| ((*key).into(), (*value).into()))
                .collect(),
        )
    }

    #[test]
    fn defaults_are_buildkits() {
        let options = read(&[]).unwrap();
        assert!(options.uses_oci_types() && options.uses_oci_artifact());
        assert_eq!(options.layers.media_type(), media_type::OCI_LAYER_GZIP);
    }

    #[test]
    fn conflicts_are_told() {
        let error = read(&[("oci-artifact", "true"), ("oci-mediatypes", "0")]).unwrap_err();
        assert_eq!(
            error.to_string(),
            "exporter option \"oci-artifact=true\" conflicts with \"oci-mediatypes=false\""
        );
        assert!(read(&[("compression", "zstd"), ("oci-mediatypes", "false")]).is_ok());
        let error = read(&[("compression", "estargz"), ("oci-mediatypes", "false")]).unwrap_err();
        assert_eq!(
            error.to_string(),
            "exporter option \"compression=estargz\" conflicts with \"oci-mediatypes=false\""
        );
        let options = read(&[("compression", "estargz")]).unwrap();
        assert_eq!(options.layers.media_type(), media_type::OCI_LAYER_GZIP);
        assert!(read(&[("rewrite-timestamp", "yes")]).is_err());
        assert_eq!(
            read(&[("compression", "lzma")]).unwrap_err().to_string(),
            "unsupported compression type lzma"
        );
    }

    #[test]
    fn unknown_attributes_become_metadata() {
        let mut options = read(&[("push", ""), ("containerimage.config", "{}")]).unwrap();
        assert_eq!(options.take_flag("push").unwrap(), Some(true));
        assert_eq!(options.take_flag("push").unwrap(), None);
        let metadata = options.metadata(&BTreeMap::new());
        assert_eq!(metadata["containerimage.config"], Bytes::from_static(b"{}"));
    }
}

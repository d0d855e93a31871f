//! What an image vertex asks for.

use build::error::BuildError;
use build::op::VertexSpec;
use build::session::SessionId;
use cache::RecordType;
use llb::pb;
use oci::{Digest, Platform, Reference};

use super::ResolvedImage;

/// The vertex's identifier and attributes, read.
#[derive(Clone, Debug)]
pub struct ImageAttributes {
    /// The image; has a tag or a digest.
    pub reference: Reference,
    /// The platform to choose from an index.
    pub platform: Platform,
    /// What the refs made are for.
    pub record_type: RecordType,
    /// Use only so many layers from the bottom.
    pub layer_limit: Option<usize>,
    /// What the reference must resolve to.
    pub checksum: Option<Digest>,
    /// For `oci-layout://`: the session that has the layout.
    pub session: Option<SessionId>,
    /// For `oci-layout://`: the layout's name at the client.
    pub layout: String,
}

impl ImageAttributes {
    /// Reads a vertex.
    pub fn of_vertex(scheme: &str, vertex: &VertexSpec) -> Result<Self, BuildError> {
        let Some(pb::op::Op::Source(source)) = &vertex.op.op else {
            return Err(BuildError::internal("not a source op"));
        };
        let platform = vertex.op.platform.as_ref().map(Platform::from);
        Self::read(scheme, source, platform)
    }

    /// Reads a source op; without a platform it is the host's.
    pub fn read(scheme: &str, op: &pb::SourceOp, platform: Option<Platform>) -> Result<Self, BuildError> {
        let name = op.identifier.strip_prefix(scheme).unwrap_or(&op.identifier);
        let reference = Reference::parse(name).map_err(|error| {
            BuildError::user(format!("failed to parse image reference {name:?}: {error}"))
        })?;
        if reference.is_name_only() {
            return Err(BuildError::user(format!("object required in {name}")));
        }
        let mut this = Self {
            reference,
            platform: platform.unwrap_or_else(Platform::host),
            record_type: RecordType::Regular,
            layer_limit: None,
            checksum: None,
            session: None,
            layout: String::new(),
        };
        for (key, value) in &op.attrs {
            match key.as_str() {
                llb::attr::IMAGE_RESOLVE_MODE => check_mode(value)?,
                llb::attr::IMAGE_RECORD_TYPE => this.record_type = record_type(value)?,
                llb::attr::IMAGE_LAYER_LIMIT | llb::attr::OCI_LAYOUT_LAYER_LIMIT => {
                    this.layer_limit = Some(layer_limit(value)?);
                }
                llb::attr::IMAGE_CHECKSUM => {
                    let checksum = value.parse().map_err(|error| {
                        BuildError::user(format!("invalid image checksum {value}: {error}"))
                    })?;
                    this.checksum = Some(checksum);
                }
                llb::attr::OCI_LAYOUT_SESSION_ID if !value.is_empty() => {
                    this.session = Some(SessionId(value.clone()));
                }
                llb::attr::OCI_LAYOUT_STORE_ID => this.layout.clone_from(value),
                _ => {}
            }
        }
        Ok(this)
    }

    /// Checks what the reference resolved to.
    pub fn check(&self, image: &ResolvedImage) -> Result<(), BuildError> {
        if let Some(expected) = self.checksum
            && expected != image.root.digest
        {
            return Err(BuildError::user(format!(
                "image digest {} for {} does not match expected checksum {expected}",
                image.root.digest, self.reference
            )));
        }
        let layers = image.manifest.layers.len();
        match self.layer_limit {
            Some(limit) if limit > layers => Err(BuildError::user(format!(
                "layer limit {limit} is greater than the number of layers in the image {layers}"
            ))),
            _ => Ok(()),
        }
    }
}

/// There is no store of named images here, so all modes ask the registry; unknown ones are refused.
fn check_mode(mode: &str) -> Result<(), BuildError> {
    match mode {
        ""
        | llb::attr::IMAGE_RESOLVE_MODE_DEFAULT
        | llb::attr::IMAGE_RESOLVE_MODE_FORCE_PULL
        | llb::attr::IMAGE_RESOLVE_MODE_PREFER_LOCAL => Ok(()),
        other => Err(BuildError::user(format!("invalid resolvemode: {other}"))),
    }
}

pub(crate) fn record_type(text: &str) -> Result<RecordType, BuildError> {
    match text {
        "" | "regular" => Ok(RecordType::Regular),
        "internal" => Ok(RecordType::Internal),
        "frontend" => Ok(RecordType::Frontend),
        other => Err(BuildError::user(format!("invalid record type {other}"))),
    }
}

fn layer_limit(text: &str) -> Result<usize, BuildError> {
    match text.parse() {
        Ok(limit) if limit > 0 => Ok(limit),
        _ => Err(BuildError::user(format!("invalid layer limit {text}"))),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn read(attrs: &[(&str, &str)]) -> Result<ImageAttributes, String> {
        let attrs = attrs
            .iter()
            .map(|(key, value)| ((*key).to_owned(), (*value).to_owned()))
            .collect();
        let op = pb::SourceOp {
            identifier: "docker-image://docker.io/library/alpine:latest".to_owned(),
            attrs,
        };
        ImageAttributes::read("docker-image://", &op, None).map_err(|error| error.to_string())
    }

    #[test]
    fn what_is_asked_for_is_read_or_refused_by_name() {
        let digest = Digest::sha256(b"");
        let text = digest.to_string();
        let found = read(&[
            ("image.resolvemode", "pull"),
            ("image.recordtype", "frontend"),
            ("image.layerlimit", "3"),
            ("image.checksum", &text),
        ])
        .expect("is fine");
        assert_eq!(found.reference.to_string(), "docker.io/library/alpine:latest");
        assert_eq!(
            (found.layer_limit, found.record_type, found.checksum),
            (Some(3), RecordType::Frontend, Some(digest))
        );
        for mode in ["", "default", "pull", "local"] {
            assert!(read(&[("image.resolvemode", mode)]).is_ok(), "{mode:?}");
        }
        for (key, value, expected) in [
            ("image.resolvemode", "never", "invalid resolvemode: never"),
            ("image.recordtype", "odd", "invalid record type odd"),
            ("image.layerlimit", "0", "invalid layer limit 0"),
            ("image.layerlimit", "-1", "invalid layer limit -1"),
            ("image.checksum", "md5", "invalid image checksum md5"),
        ] {
            let error = read(&[(key, value)]).expect_err("is refused");
            assert!(error.starts_with(expected), "{error}");
        }
    }
}

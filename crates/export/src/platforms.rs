//! Which platforms a result has, and what else its metadata says to all exporters.

use std::collections::BTreeMap;

use build::error::BuildError;
use build::export::ExportSource;
use build::op::ResultRef;
use bytes::Bytes;
use layer::tree::Timestamp;
use oci::{ImageConfig, Platform};
use serde::{Deserialize, Serialize};

/// Metadata: the platforms of a result with several refs, as JSON.
pub const PLATFORMS_KEY: &str = "refs.platforms";
/// Metadata: an image's config; with `/ID` for one of several platforms.
pub const IMAGE_CONFIG_KEY: &str = "containerimage.config";
/// Metadata: the time that nothing exported may be younger than; with `/ID` for one of several platforms.
pub const EPOCH_KEY: &str = "source.date.epoch";
/// Attribute of exporters with the same meaning, which wins.
pub const EPOCH_ATTRIBUTE: &str = "source-date-epoch";

/// One of a result's platforms.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "PascalCase")]
pub struct ExportPlatform {
    /// The key of its ref and of its metadata.
    #[serde(rename = "ID")]
    pub id: String,
    /// The platform, normalized.
    pub platform: Platform,
}

#[derive(Default, Deserialize)]
#[serde(rename_all = "PascalCase", default)]
struct Document {
    #[serde(deserialize_with = "oci::json::nullable")]
    platforms: Vec<ExportPlatform>,
}

/// Returns a result's platforms, never none: a result that says nothing has its image config's or the host's.
///
/// # Errors
/// A user error for metadata that makes no sense.
pub fn platforms(metadata: &BTreeMap<String, Bytes>) -> Result<Vec<ExportPlatform>, BuildError> {
    let Some(bytes) = metadata.get(PLATFORMS_KEY) else {
        return Ok(vec![single(metadata)?]);
    };
    let document: Document = if bytes.is_empty() {
        Document::default()
    } else {
        serde_json::from_slice::<Option<Document>>(bytes)
            .map(Option::unwrap_or_default)
            .map_err(|error| BuildError::user(format!("failed to parse platforms of the result: {error}")))?
    };
    if document.platforms.is_empty() {
        return Err(BuildError::user("invalid empty platforms index for exporter"));
    }
    let mut platforms = document.platforms;
    for entry in &mut platforms {
        if entry.id.is_empty() {
            return Err(BuildError::user("invalid empty platform key for exporter"));
        }
        if entry.platform.os.is_empty() || entry.platform.architecture.is_empty() {
            return Err(BuildError::user(format!(
                "invalid platform value {} for exporter",
                entry.platform
            )));
        }
        entry.platform = entry.platform.clone().normalized();
    }
    Ok(platforms)
}

fn single(metadata: &BTreeMap<String, Bytes>) -> Result<ExportPlatform, BuildError> {
    let mut platform = Platform::host();
    if let Some(bytes) = metadata.get(IMAGE_CONFIG_KEY) {
        // A null is told by the exporter that needs the config.
        let config = serde_json::from_slice::<Option<ImageConfig>>(bytes)
            .map_err(|error| BuildError::user(format!("failed to parse image config: {error}")))?;
        let named = config.map(|config| config.platform()).unwrap_or_default();
        match (named.os.is_empty(), named.architecture.is_empty()) {
            (false, false) => platform = named,
            (true, true) => {}
            _ => {
                return Err(BuildError::user(
                    "invalid image config: os and architecture must be specified together",
                ));
            }
        }
    }
    let platform = platform.normalized();
    Ok(ExportPlatform {
        id: platform.to_string(),
        platform,
    })
}

/// Returns a result's refs with their platforms, in the result's order.
///
/// # Errors
/// A user error when refs and platforms do not fit together.
pub fn refs(source: &ExportSource) -> Result<Vec<(ExportPlatform, ResultRef)>, BuildError> {
    let is_map = !source.refs.is_empty();
    if is_map && !source.metadata.contains_key(PLATFORMS_KEY) {
        return Err(BuildError::user(
            "unable to export multiple refs, missing platforms mapping",
        ));
    }
    let platforms = platforms(&source.metadata)?;
    if !is_map && platforms.len() > 1 {
        return Err(BuildError::user(
            "unable to export multiple platforms without map",
        ));
    }
    let mut found = Vec::with_capacity(platforms.len());
    for platform in platforms {
        let known = !is_map || source.refs.contains_key(&platform.id) || source.refs.len() == 1;
        if !known {
            return Err(BuildError::user(format!(
                "failed to find ref for ID {}",
                platform.id
            )));
        }
        let reference = source.find(&platform.id).cloned().unwrap_or(ResultRef::SCRATCH);
        found.push((platform, reference));
    }
    Ok(found)
}

/// Returns metadata of a platform: its own, or that of the whole result.
pub fn metadata<'a>(source: &'a ExportSource, key: &str, platform: Option<&str>) -> Option<&'a Bytes> {
    let own = platform.and_then(|id| source.metadata.get(&format!("{key}/{id}")));
    own.or_else(|| source.metadata.get(key))
}

/// Returns the latest time that the frontend allows.
///
/// # Errors
/// A user error when it is not a number.
pub fn epoch(source: &ExportSource, platform: Option<&str>) -> Result<Option<Timestamp>, BuildError> {
    let Some(value) = metadata(source, EPOCH_KEY, platform) else {
        return Ok(None);
    };
    let text = String::from_utf8_lossy(value);
    parse_epoch(&text)
        .map_err(|error| error.context(format!("invalid SOURCE_DATE_EPOCH from frontend: {text:?}")))
}

/// Reads seconds since 1970; an empty text is none.
///
/// # Errors
/// A user error when it is not a number.
pub fn parse_epoch(text: &str) -> Result<Option<Timestamp>, BuildError> {
    if text.is_empty() {
        return Ok(None);
    }
    match text.parse() {
        Ok(seconds) => Ok(Some(Timestamp {
            seconds,
            nanoseconds: 0,
        })),
        Err(_) => Err(BuildError::user(format!(
            "invalid time {text:?}: not a number of seconds"
        ))),
    }
}

//! The cache manifest's configuration, `application/vnd.buildkit.cacheconfig.v0`, as BuildKit writes and reads it.

use std::time::{Duration, SystemTime, UNIX_EPOCH};

use oci::json::nullable;
use serde::{Deserialize, Serialize};

/// What a cache consists of.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct CacheConfig {
    /// Layers, each with its parent.
    #[serde(default, deserialize_with = "nullable", skip_serializing_if = "Vec::is_empty")]
    pub layers: Vec<ConfigLayer>,
    /// Records, linked with each other.
    #[serde(default, deserialize_with = "nullable", skip_serializing_if = "Vec::is_empty")]
    pub records: Vec<ConfigRecord>,
}

/// A layer on top of another.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct ConfigLayer {
    /// The blob's digest.
    #[serde(default, skip_serializing_if = "String::is_empty")]
    pub blob: String,
    /// Index of the layer below; -1: none. Zero is not written.
    #[serde(default, skip_serializing_if = "is_zero")]
    pub parent: i64,
    /// What is known of the blob; only where nothing else tells it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub annotations: Option<LayerAnnotations>,
}

/// What manifests tell of layers, for caches without one.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct LayerAnnotations {
    /// The blob's media type.
    #[serde(default, skip_serializing_if = "String::is_empty")]
    pub media_type: String,
    /// Digest of the uncompressed layer.
    #[serde(default, rename = "diffID", skip_serializing_if = "String::is_empty")]
    pub diff_id: String,
    /// The blob's size in bytes.
    #[serde(default, skip_serializing_if = "is_zero")]
    pub size: i64,
    /// When the layer was made.
    #[serde(default)]
    pub created_at: String,
}

/// One output of one step, as identified by its inputs.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct ConfigRecord {
    /// Results that are a layer with all below it.
    #[serde(default, deserialize_with = "nullable", skip_serializing_if = "Vec::is_empty")]
    pub layers: Vec<ConfigResult>,
    /// Results that are a list of layers.
    #[serde(default, deserialize_with = "nullable", skip_serializing_if = "Vec::is_empty")]
    pub chains: Vec<ConfigChain>,
    /// Digest of the step and its output.
    #[serde(default, skip_serializing_if = "String::is_empty")]
    pub digest: String,
    /// Per input, the ways in which it is identified.
    #[serde(default, deserialize_with = "nullable", skip_serializing_if = "Vec::is_empty")]
    pub inputs: Vec<Vec<ConfigInput>>,
}

/// A result that is a layer with all below it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct ConfigResult {
    /// Index of the topmost layer.
    pub layer: i64,
    /// When the result was made.
    #[serde(default)]
    pub created_at: String,
}

/// A result that is a list of layers.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct ConfigChain {
    /// Indices of the layers, bottom first.
    #[serde(default, deserialize_with = "nullable")]
    pub layers: Vec<i64>,
    /// When the result was made.
    #[serde(default)]
    pub created_at: String,
}

/// A record that identifies an input.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct ConfigInput {
    /// What is read of the input; empty: all of it.
    #[serde(default, skip_serializing_if = "String::is_empty")]
    pub selector: String,
    /// Index of the input's record.
    pub link: i64,
}

fn is_zero(value: &i64) -> bool {
    *value == 0
}

/// An index as configurations have it.
pub fn wire_index(index: usize) -> i64 {
    i64::try_from(index).unwrap_or(i64::MAX)
}

/// A time of a configuration; what cannot be read, or lies before 1970, is the epoch.
pub fn parse_time(text: &str) -> SystemTime {
    let parsed = oci::timestamp::parse(text);
    let since = parsed
        .and_then(|(seconds, nanoseconds)| Some(Duration::new(u64::try_from(seconds).ok()?, nanoseconds)));
    since
        .and_then(|since| UNIX_EPOCH.checked_add(since))
        .unwrap_or(UNIX_EPOCH)
}

/// Nanoseconds since the epoch, as the solver counts.
pub fn nanoseconds(at: SystemTime) -> i64 {
    let since = at.duration_since(UNIX_EPOCH).unwrap_or_default();
    i64::try_from(since.as_nanos()).unwrap_or(i64::MAX)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn reads_what_go_writes() {
        let text = r#"{"layers":[{"blob":"sha256:aa","parent":-1},{"blob":"sha256:bb"}],"records":[
            {"digest":"sha256:01","inputs":null},
            {"layers":[{"layer":1,"createdAt":"2024-01-01T00:00:00.5Z"}],"chains":[{"layers":[0]}],
             "digest":"sha256:02","inputs":[[{"selector":"sha256:03","link":0}]]}]}"#;
        let config: CacheConfig = serde_json::from_str(text).unwrap();
        assert_eq!(config.layers[1].parent, 0);
        assert_eq!(config.records[1].inputs[0][0].link, 0);
        let back = serde_json::to_string(&config).unwrap();
        assert!(
            back.starts_with(r#"{"layers":[{"blob":"sha256:aa","parent":-1},{"blob":"sha256:bb"}],"#),
            "{back}"
        );
    }

    #[test]
    fn times_are_total() {
        assert_eq!(parse_time("0001-01-01T00:00:00Z"), UNIX_EPOCH);
        assert_eq!(parse_time("no time"), UNIX_EPOCH);
        assert_eq!(
            parse_time("1970-01-01T00:00:01.5Z"),
            UNIX_EPOCH + Duration::from_millis(1500)
        );
    }
}

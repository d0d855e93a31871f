//! Image configurations as they are exported: layers and history brought in line, the rest byte for byte as given.

use std::collections::BTreeMap;

use build::error::{BuildError, ErrorKind};
use layer::tree::Timestamp;
use oci::{Digest, History, ImageConfig, Platform};
use serde::Serialize;
use serde::de::IgnoredAny;
use serde_json::value::{RawValue, to_raw_value};

use super::layers::ExportLayer;

/// `PATH` of an image without a configuration of its own.
const DEFAULT_PATH: &str = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin";
/// Key of the inline cache.
const INLINE_CACHE_KEY: &str = "moby.buildkit.cache.v0";

/// A parsed configuration and the base's, if known.
pub struct ConfigSource<'a> {
    /// The configuration as the frontend gave it; empty: a default one.
    pub given: &'a [u8],
    /// The configuration of the image below.
    pub base: Option<&'a ImageConfig>,
    /// The latest time in the image.
    pub epoch: Option<Timestamp>,
    /// Cache records for whoever imports the image as cache.
    pub inline_cache: Option<&'a [u8]>,
}

/// The configuration for an image without one.
pub fn default_config(platform: &Platform) -> Result<Vec<u8>, BuildError> {
    #[derive(Serialize)]
    struct Default<'a> {
        #[serde(flatten)]
        platform: &'a Platform,
        config: Config,
        rootfs: RootFs,
    }
    #[derive(Serialize)]
    #[serde(rename_all = "PascalCase")]
    struct Config {
        #[serde(skip_serializing_if = "Vec::is_empty")]
        env: Vec<String>,
        working_dir: &'static str,
    }
    let env = if platform.os == "windows" {
        Vec::new()
    } else {
        vec![format!("PATH={DEFAULT_PATH}")]
    };
    let config = Default {
        platform,
        config: Config {
            env,
            working_dir: "/",
        },
        rootfs: RootFs {
            kind: "layers",
            diff_ids: None,
        },
    };
    oci::json::to_vec(&config).map_err(invalid("failed to create empty image config"))
}

#[derive(Serialize)]
struct RootFs {
    #[serde(rename = "type")]
    kind: &'static str,
    diff_ids: Option<Vec<Digest>>,
}

/// Writes the configuration of an image with these layers.
pub fn patch(source: &ConfigSource<'_>, layers: &[ExportLayer]) -> Result<Vec<u8>, BuildError> {
    let fields: Option<BTreeMap<String, Box<RawValue>>> =
        serde_json::from_slice(source.given).map_err(invalid("failed to parse image config for patch"))?;
    let Some(mut fields) = fields else {
        return Err(BuildError::user("invalid null image config for export"));
    };
    let parsed: ImageConfig =
        serde_json::from_slice(source.given).map_err(invalid("invalid image config for export"))?;
    if parsed.os.is_empty() {
        return Err(BuildError::user("invalid image config for export: missing os"));
    }
    if parsed.architecture.is_empty() {
        return Err(BuildError::user(
            "invalid image config for export: missing architecture",
        ));
    }
    let had_history = has_list(fields.get("history").map(AsRef::as_ref));
    let mut history = complete_history(parsed.history, layers);
    if let Some(epoch) = source.epoch {
        clamp_history(&mut history, source.base, epoch);
    }
    let diff_ids: Vec<Digest> = layers.iter().map(|layer| layer.diff_id).collect();
    let rootfs = RootFs {
        kind: "layers",
        diff_ids: (!diff_ids.is_empty()).then_some(diff_ids),
    };
    fields.insert("rootfs".to_owned(), raw(&rootfs)?);
    // Go tells an absent list from an empty one.
    let listed = (had_history || !history.is_empty()).then_some(&history);
    fields.insert("history".to_owned(), raw(&listed)?);
    match (fields.get("created"), source.epoch) {
        (Some(created), Some(epoch)) => {
            let text: Option<String> =
                serde_json::from_str(created.get()).map_err(invalid("failed to unmarshal creation time"))?;
            if text
                .as_deref()
                .and_then(oci::timestamp::parse)
                .is_some_and(|at| is_after(at, epoch))
            {
                fields.insert("created".to_owned(), raw(&time_text(epoch))?);
            }
        }
        (Some(_), None) => {}
        (None, _) => {
            let last = history.iter().rev().find_map(|entry| entry.created.as_ref());
            fields.insert("created".to_owned(), raw(&last)?);
        }
    }
    if let Some(records) = source.inline_cache {
        use base64::Engine;
        let encoded = base64::engine::general_purpose::STANDARD.encode(records);
        fields.insert(INLINE_CACHE_KEY.to_owned(), raw(&encoded)?);
    }
    Ok(join(&fields))
}

fn has_list(value: Option<&RawValue>) -> bool {
    value.is_some_and(|value| serde_json::from_str::<Vec<IgnoredAny>>(value.get()).is_ok())
}

fn raw<T: Serialize>(value: &T) -> Result<Box<RawValue>, BuildError> {
    to_raw_value(value).map_err(invalid("failed to marshal image config"))
}

fn invalid(what: &'static str) -> impl Fn(serde_json::Error) -> BuildError {
    move |error| BuildError::from_source(ErrorKind::User, error).context(what)
}

/// Writes the fields in order of their names, as Go writes a map: spaces gone, its characters escaped.
fn join(fields: &BTreeMap<String, Box<RawValue>>) -> Vec<u8> {
    let mut out = String::from("{");
    for (at, (key, value)) in fields.iter().enumerate() {
        if at > 0 {
            out.push(',');
        }
        // A string always serializes.
        out.push_str(&oci::json::to_string(key).unwrap_or_default());
        out.push(':');
        compact(value.get(), &mut out);
    }
    out.push('}');
    out.into_bytes()
}

/// Copies valid JSON without the spaces between its tokens, with Go's escapes inside strings.
pub(super) fn compact(json: &str, out: &mut String) {
    let mut in_string = false;
    let mut escaped = false;
    for c in json.chars() {
        if !in_string && c.is_ascii_whitespace() {
            continue;
        }
        match c {
            '<' => out.push_str("\\u003c"),
            '>' => out.push_str("\\u003e"),
            '&' => out.push_str("\\u0026"),
            '\u{2028}' => out.push_str("\\u2028"),
            '\u{2029}' => out.push_str("\\u2029"),
            other => out.push(other),
        }
        if c == '"' && !escaped {
            in_string = !in_string;
        }
        escaped = in_string && c == '\\' && !escaped;
    }
}

/// Makes the history fit the layers: one entry per layer that is not marked empty, each with a time.
fn complete_history(mut history: Vec<History>, layers: &[ExportLayer]) -> Vec<History> {
    let named = history.iter().filter(|entry| !entry.empty_layer).count();
    if named > layers.len() {
        // More entries than layers: those at the bottom are the ones that have them.
        let mut seen = 0;
        for entry in &mut history {
            if seen >= layers.len() {
                entry.empty_layer = true;
            }
            if !entry.empty_layer {
                seen += 1;
            }
        }
    }
    for layer in layers.iter().skip(named) {
        history.push(History {
            created: Some(layer.created_text()),
            created_by: layer.description.clone(),
            author: String::new(),
            comment: "buildkit.exporter.image.v0".to_owned(),
            empty_layer: false,
        });
    }
    let mut of_layers = layers.iter();
    for entry in history.iter_mut().filter(|entry| !entry.empty_layer) {
        let layer = of_layers.next();
        if entry.created.is_none() {
            entry.created = layer.map(ExportLayer::created_text);
        }
    }
    fill_times(&mut history);
    history
}

/// Gives entries without a time that of the layer before them, those before the first new layer that layer's.
fn fill_times(history: &mut [History]) {
    let mut created = None;
    let mut missing = false;
    for entry in &*history {
        match &entry.created {
            Some(time) => {
                created = Some(time.clone());
                if missing {
                    break;
                }
            }
            None => missing = true,
        }
    }
    let mut missing = false;
    for entry in history {
        match &entry.created {
            Some(time) if missing => created = Some(time.clone()),
            Some(_) => {}
            None => {
                missing = true;
                entry.created.clone_from(&created);
            }
        }
    }
}

/// Sets times later than the epoch to it, but not in the entries that come from the base.
fn clamp_history(history: &mut [History], base: Option<&ImageConfig>, epoch: Timestamp) {
    let base = base.map_or(&[][..], |base| &base.history);
    let shared = history
        .iter()
        .zip(base)
        .take_while(|(entry, below)| *entry == *below)
        .count();
    for entry in history.iter_mut().skip(shared) {
        let time = entry.created.as_deref().and_then(oci::timestamp::parse);
        if time.is_none_or(|time| is_after(time, epoch)) {
            entry.created = Some(time_text(epoch));
        }
    }
}

fn is_after(time: (i64, u32), epoch: Timestamp) -> bool {
    time > (epoch.seconds, epoch.nanoseconds)
}

fn time_text(time: Timestamp) -> String {
    oci::timestamp::format(time.seconds, time.nanoseconds)
}

#[cfg(test)]
mod tests {
    use std::time::{Duration, UNIX_EPOCH};

    use super::*;

    fn layer(name: &str, at_s: u64) -> ExportLayer {
        ExportLayer {
            descriptor: oci::Descriptor::of_bytes(oci::media_type::OCI_LAYER_GZIP, name.as_bytes()),
            diff_id: Digest::sha256(name),
            original_diff_id: Digest::sha256(name),
            providers: Vec::new(),
            description: format!("RUN {name}"),
            created_at: UNIX_EPOCH + Duration::from_secs(at_s),
        }
    }

    fn patched(given: &str, layers: &[ExportLayer], epoch: Option<i64>) -> String {
        let epoch = epoch.map(|seconds| Timestamp {
            seconds,
            nanoseconds: 0,
        });
        let source = ConfigSource {
            given: given.as_bytes(),
            base: None,
            epoch,
            inline_cache: None,
        };
        String::from_utf8(patch(&source, layers).unwrap()).unwrap()
    }

    #[test]
    fn a_bare_config_gets_history_and_layers() {
        let a = layer("a", 1);
        let text = patched(
            r#"{"os": "linux", "architecture": "amd64"}"#,
            std::slice::from_ref(&a),
            None,
        );
        let expected = format!(
            r#"{{"architecture":"amd64","created":"1970-01-01T00:00:01Z","history":[{{"created":"1970-01-01T00:00:01Z","created_by":"RUN a","comment":"buildkit.exporter.image.v0"}}],"os":"linux","rootfs":{{"type":"layers","diff_ids":["{}"]}}}}"#,
            a.diff_id
        );
        assert_eq!(text, expected);
    }

    #[test]
    fn nothing_else_changes_a_byte() {
        let given = r#"{ "os":"linux","architecture":"amd64", "config": {"Z": [1.0e2, "a < \"b\" & c"], "A" : null}, "history":[], "created":"2020-01-01T00:00:00Z"}"#;
        assert_eq!(
            patched(given, &[], None),
            r#"{"architecture":"amd64","config":{"Z":[1.0e2,"a \u003c \"b\" \u0026 c"],"A":null},"created":"2020-01-01T00:00:00Z","history":[],"os":"linux","rootfs":{"type":"layers","diff_ids":null}}"#
        );
    }

    #[test]
    fn empty_layers_take_the_time_of_the_first_new_layer() {
        let given = r#"{"os":"linux","architecture":"a","history":[{"created":"2000-01-01T00:00:00Z"},{"created_by":"ENV","empty_layer":true},{"created_by":"RUN"}]}"#;
        let text = patched(given, &[layer("base", 5), layer("new", 6)], None);
        assert!(
            text.contains(r#"{"created":"1970-01-01T00:00:06Z","created_by":"ENV","empty_layer":true}"#),
            "{text}"
        );
    }

    #[test]
    fn too_much_history_becomes_empty() {
        let given = r#"{"os":"linux","architecture":"a","history":[{"created":"2000-01-01T00:00:00Z"},{"created":"2001-01-01T00:00:00Z"}]}"#;
        let text = patched(given, &[layer("only", 5)], None);
        assert!(
            text.contains(r#"{"created":"2001-01-01T00:00:00Z","empty_layer":true}"#),
            "{text}"
        );
    }

    #[test]
    fn the_epoch_clamps() {
        let given = r#"{"os":"linux","architecture":"a","created":"2020-01-01T00:00:00Z"}"#;
        let text = patched(given, &[layer("a", 1000)], Some(500));
        assert!(
            text.contains(r#""created":"1970-01-01T00:08:20Z","history":[{"created":"1970-01-01T00:08:20Z""#),
            "{text}"
        );
    }

    #[test]
    fn a_config_without_platform_is_refused() {
        for given in ["{}", r#"{"os":"linux"}"#, "null", "[]", ""] {
            let source = ConfigSource {
                given: given.as_bytes(),
                base: None,
                epoch: None,
                inline_cache: None,
            };
            assert!(patch(&source, &[]).is_err(), "{given}");
        }
    }

    #[test]
    fn the_default_config_is_gos() {
        let text = String::from_utf8(default_config(&Platform::new("linux", "amd64")).unwrap()).unwrap();
        assert_eq!(
            text,
            format!(
                r#"{{"architecture":"amd64","os":"linux","config":{{"Env":["PATH={DEFAULT_PATH}"],"WorkingDir":"/"}},"rootfs":{{"type":"layers","diff_ids":null}}}}"#
            )
        );
    }
}

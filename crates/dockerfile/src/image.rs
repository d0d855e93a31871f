//! Image configurations as the frontend reads, changes and prints them.

use oci::{ImageConfig, Platform, json};
use serde_json::{Map, Value};

use crate::error::{ConvertError, Progress};
use crate::raw;

/// Marks an image that has a list of layers, if an empty one; others without layers have none. Never printed.
const EMPTY_LIST: &str = "empty diff_ids";

/// Reads a configuration. What the frontend does not know is dropped, as it is not inherited.
pub(crate) fn read(bytes: &[u8]) -> Progress<ImageConfig> {
    let mut image: ImageConfig = serde_json::from_slice(bytes)
        .map_err(|err| ConvertError::Json(format!("invalid image config: {err}")))?;
    image.extra.clear();
    if image.rootfs.diff_ids.is_empty() {
        let value: Value = serde_json::from_slice(bytes).unwrap_or_default();
        if value.pointer("/rootfs/diff_ids").is_some_and(Value::is_array) {
            image.extra.insert(EMPTY_LIST.to_owned(), Value::Null);
        }
        if value.get("rootfs").is_none_or(Value::is_null) {
            image.rootfs.kind.clear();
        }
    }
    let config = &mut image.config;
    config.extra.clear();
    let maps = [&mut config.exposed_ports, &mut config.volumes];
    maps.into_iter()
        .flat_map(|map| map.values_mut())
        .for_each(|value| *value = Value::Object(Map::new()));
    for history in &mut image.history {
        history.created = history.created.take().map(|time| trim_fraction(&time));
    }
    image.created = image.created.take().map(|time| trim_fraction(&time));
    Ok(image)
}

/// Removes zeros at the end of a time's fraction, and an empty fraction.
fn trim_fraction(time: &str) -> String {
    let Some((seconds, rest)) = time.split_once('.') else {
        return time.to_owned();
    };
    let digits = rest.find(|c: char| !c.is_ascii_digit()).unwrap_or(rest.len());
    let (fraction, zone) = rest.split_at(digits);
    let fraction = fraction.trim_end_matches('0');
    if fraction.is_empty() {
        format!("{seconds}{zone}")
    } else {
        format!("{seconds}.{fraction}{zone}")
    }
}

/// Tells whether a time is one that Go's JSON can have: its year has four digits.
fn is_printable(time: &str) -> bool {
    time.find('-') == Some(4)
}

/// Prints a configuration.
pub(crate) fn print(image: &ImageConfig) -> Progress<Vec<u8>> {
    let mut times = image
        .history
        .iter()
        .filter_map(|history| history.created.as_ref());
    if !times.all(|time| is_printable(time)) || !image.created.iter().all(|time| is_printable(time)) {
        let text = "failed to marshal image config: json: error calling MarshalJSON for type *time.Time: \
                    Time.MarshalJSON: year outside of range [0,9999]";
        return Err(ConvertError::Json(text.to_owned()).into());
    }
    let to_text =
        |image: &ImageConfig| json::to_string(image).map_err(|err| ConvertError::Json(err.to_string()));
    if image.extra.contains_key(EMPTY_LIST) {
        let mut image = image.clone();
        image.extra.clear();
        return Ok(raw::json(to_text(&image)?).into_bytes());
    }
    // Quotes are escaped within texts, so this cannot be found in one.
    let text = to_text(image)?.replacen("\"diff_ids\":[]}", "\"diff_ids\":null}", 1);
    Ok(raw::json(text).into_bytes())
}

/// Returns the configuration a build from nothing starts with.
pub(crate) fn empty(platform: &Platform) -> ImageConfig {
    let mut image = ImageConfig::default();
    image.set_platform(platform.clone());
    "/".clone_into(&mut image.config.working_dir);
    if platform.os != "windows" {
        image
            .config
            .env
            .push(format!("PATH={}", llb::default_path(&platform.os)));
    }
    image
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn years_have_four_digits() {
        let with = |time: &str| {
            let image = ImageConfig {
                created: Some(time.to_owned()),
                ..ImageConfig::default()
            };
            print(&image).is_ok()
        };
        assert!(with("9999-12-31T23:59:59Z"));
        assert!(!with("10000-01-01T00:00:00Z"));
        assert!(!with("-001-01-01T00:00:00Z"));
        let mut image = ImageConfig::default();
        image.history.push(oci::History {
            created: Some("10000-01-01T00:00:00Z".to_owned()),
            ..oci::History::default()
        });
        assert!(print(&image).is_err());
    }

    #[test]
    fn reads_and_prints_as_buildkit_does() {
        let image = read(
            br#"{"architecture":"amd64","os":"linux","x":1,"history":[{"created":"2024-01-02T03:04:05.120000000Z"}],
                "config":{"Env":["A=b"],"OnBuild":null,"Hostname":"h","ExposedPorts":{"80/tcp":null}}}"#,
        )
        .unwrap();
        assert_eq!(
            String::from_utf8(print(&image).unwrap()).unwrap(),
            concat!(
                r#"{"architecture":"amd64","os":"linux","rootfs":{"type":"","diff_ids":null},"#,
                r#""history":[{"created":"2024-01-02T03:04:05.12Z"}],"config":{"ExposedPorts":{"80/tcp":{}},"Env":["A=b"]}}"#
            )
        );
    }
}

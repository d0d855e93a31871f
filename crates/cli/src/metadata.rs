//! What a build yields beside its exports: `--metadata-file`, `--iidfile`, and answers of frontends.

use std::collections::BTreeMap;
use std::path::Path;

use base64::Engine as _;
use serde_json::Value;

use crate::failure::Failure;
use crate::oci_index::write_atomically;

/// Writes what exporters tell as JSON; entries that hold an object in base64 are written as that object.
///
/// # Errors
/// When the file cannot be written.
pub fn write(path: &Path, response: &BTreeMap<String, String>) -> Result<(), Failure> {
    let entries = response.iter().map(|(key, value)| (key.clone(), decode(value)));
    let object: serde_json::Map<String, Value> = entries.collect();
    let text = serde_json::to_string_pretty(&Value::Object(object))
        .map_err(|error| Failure::new(format!("failed to write {}: {error}", path.display())))?;
    Ok(write_atomically(path, text.as_bytes())?)
}

fn decode(text: &str) -> Value {
    let object = base64::engine::general_purpose::STANDARD
        .decode(text)
        .ok()
        .and_then(|json| serde_json::from_slice::<serde_json::Map<String, Value>>(&json).ok())
        .filter(|object| !object.is_empty());
    match object {
        Some(object) => Value::Object(object),
        None => Value::from(text),
    }
}

/// Returns an image's id: its config's digest, else its manifest's.
pub fn image_id(response: &BTreeMap<String, String>) -> Option<&str> {
    let entry = |key: &str| response.get(key).map(String::as_str);
    entry("containerimage.config.digest").or_else(|| entry("containerimage.digest"))
}

/// Formats a frontend's answer to a question.
pub fn answer_text(metadata: &BTreeMap<String, Vec<u8>>) -> String {
    if let Some(text) = metadata.get("result.txt") {
        return String::from_utf8_lossy(text).into_owned();
    }
    metadata
        .iter()
        .filter(|(key, _)| key.starts_with("result."))
        .map(|(key, value)| format!("{key}\n{}\n", String::from_utf8_lossy(value)))
        .collect()
}

/// Says how much a check found; nothing for other questions.
pub fn check_text(metadata: &BTreeMap<String, Vec<u8>>) -> String {
    if !metadata.contains_key("result.statuscode") {
        return String::new();
    }
    let found = metadata
        .get("result.json")
        .and_then(|json| serde_json::from_slice::<Value>(json).ok());
    let found = found.as_ref().and_then(|found| found.get("warnings")?.as_array());
    match found.map_or(0, Vec::len) {
        0 => "Check complete, no warnings found.\n".to_owned(),
        1 => "Check complete, 1 warning has been found!\n".to_owned(),
        count => format!("Check complete, {count} warnings have been found!\n"),
    }
}

/// Returns the exit code that a frontend's answer asks for.
pub fn status_code(metadata: &BTreeMap<String, Vec<u8>>) -> u8 {
    let code = metadata
        .get("result.statuscode")
        .and_then(|code| std::str::from_utf8(code).ok());
    code.and_then(|code| code.parse().ok()).unwrap_or(0)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn objects_in_base64_are_unpacked() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("metadata.json");
        let response = [
            ("containerimage.digest", "sha256:19"),
            ("number", "MTI="),
            ("empty", "e30="),
            ("list", "W10="),
            ("object", "eyJmb28iOm51bGwsImJhciI6ImJheiJ9"),
        ];
        write(
            &path,
            &response
                .into_iter()
                .map(|(key, value)| (key.to_owned(), value.to_owned()))
                .collect(),
        )
        .unwrap();
        let written: Value = serde_json::from_slice(&std::fs::read(&path).unwrap()).unwrap();
        let expected = serde_json::json!({
            "containerimage.digest": "sha256:19", "number": "MTI=", "empty": "e30=", "list": "W10=",
            "object": {"foo": null, "bar": "baz"},
        });
        assert_eq!(written, expected);
    }

    #[test]
    fn checks_tell_what_they_found() {
        let answer = |json: &str, code: &str| {
            BTreeMap::from([
                ("result.json".to_owned(), json.as_bytes().to_vec()),
                ("result.statuscode".to_owned(), code.as_bytes().to_vec()),
            ])
        };
        let fine = answer(r#"{"warnings":null}"#, "0");
        assert_eq!(check_text(&fine), "Check complete, no warnings found.\n");
        assert_eq!(status_code(&fine), 0);
        let found = answer(r#"{"warnings":[{},{}]}"#, "1");
        assert_eq!(
            check_text(&found),
            "Check complete, 2 warnings have been found!\n"
        );
        assert_eq!(status_code(&found), 1);
        assert_eq!(
            (check_text(&BTreeMap::new()), status_code(&BTreeMap::new())),
            (String::new(), 0)
        );
    }

    #[test]
    fn the_config_is_the_id() {
        let mut response = BTreeMap::from([("containerimage.digest".to_owned(), "sha256:m".to_owned())]);
        assert_eq!(image_id(&response), Some("sha256:m"));
        response.insert("containerimage.config.digest".to_owned(), "sha256:c".to_owned());
        assert_eq!(image_id(&response), Some("sha256:c"));
    }
}

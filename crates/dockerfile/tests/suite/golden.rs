//! Digests, names, images, errors and warnings that BuildKit's frontend produces, as facts.
//!
//! Each directory of `tests/golden` holds a Dockerfile, perhaps `options.json` and other files of the context, and in
//! `expected.json` what BuildKit made of them with the images of `images.json`.
//!
//! `options.json` may hold: `options` of the request; `platforms` of the worker; capabilities that are `missing`;
//! metadata of `sources` by identifier; `inputs` by name, each a source; a source `policy`, what images become when they
//! are resolved; and `newest`, the newest time in the archive of a context.

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};

use dockerfile::{Failure, Outcome, Range, Warning};
use llb::pb::{Definition, OpMetadata};
use serde_json::{Map, Value, json};

use crate::drive::{Driver, files_of, input, request};

/// The cases; those of another directory if `GOLDEN_DIR` names one.
fn golden_dir() -> PathBuf {
    match std::env::var_os("GOLDEN_DIR") {
        Some(dir) => dir.into(),
        None => Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/golden"),
    }
}

fn read_json(path: &Path) -> Value {
    match fs::read(path) {
        Ok(bytes) => serde_json::from_slice(&bytes).unwrap(),
        Err(_) => Value::Null,
    }
}

#[test]
fn matches_buildkit() {
    let images = read_json(&golden_dir().join("images.json"));
    let only = std::env::var("GOLDEN").ok();
    let mut names: Vec<String> = fs::read_dir(golden_dir())
        .unwrap()
        .map(|entry| entry.unwrap())
        .filter(|entry| entry.path().is_dir())
        .map(|entry| entry.file_name().into_string().unwrap())
        .filter(|name| only.as_ref().is_none_or(|only| name == only))
        .collect();
    names.sort();
    assert!(!names.is_empty());
    let mut problems = Vec::new();
    for name in &names {
        let dir = golden_dir().join(name);
        let mut expected = read_json(&dir.join("expected.json"));
        drop_cap(&mut expected);
        let mut actual = run(&dir, &images);
        if name.starts_with("req-convertllb") {
            // The mapping leaves order and spaces open.
            parse_result(&mut expected);
            parse_result(&mut actual);
        }
        if std::env::var_os("GOLDEN_DIR").is_some() {
            // Images are resolved at the same time, in no certain order.
            sort_warnings(&mut expected);
            sort_warnings(&mut actual);
        }
        let before = problems.len();
        compare(name, &expected, &actual, &mut problems);
        if problems.len() > before && only.is_some() {
            problems.push(serde_json::to_string_pretty(&actual).unwrap());
        }
    }
    let count = problems.len();
    assert!(
        problems.is_empty(),
        "{count} differences in {} cases:\n{}",
        names.len(),
        problems.join("\n")
    );
}

fn drop_cap(value: &mut Value) {
    match value {
        Value::Object(fields) => fields.values_mut().for_each(drop_cap),
        Value::Array(values) => {
            values.retain(|value| value != "exec.meta.setsdefaultpath");
            values.iter_mut().for_each(drop_cap);
        }
        _ => {}
    }
}

fn parse_result(value: &mut Value) {
    let Some(result) = value.pointer_mut("/metadata/result.json") else {
        return;
    };
    let Some(text) = result.as_str() else {
        return;
    };
    *result = serde_json::from_str(text).unwrap();
    drop_cap(result);
    if let Some(metadata) = result["metadata"].as_object_mut() {
        for vertex in metadata.values_mut().filter_map(Value::as_object_mut) {
            vertex.remove("caps");
            // Group names are made up anew.
            vertex.remove("progress_group");
        }
    }
}

fn sort_warnings(value: &mut Value) {
    if let Some(warnings) = value.get_mut("warnings").and_then(Value::as_array_mut) {
        warnings.sort_by_key(ToString::to_string);
    }
}

fn compare(path: &str, expected: &Value, actual: &Value, problems: &mut Vec<String>) {
    match (expected, actual) {
        (Value::Object(one), Value::Object(two)) => {
            let mut keys: Vec<&String> = one.keys().chain(two.keys()).collect();
            keys.sort();
            keys.dedup();
            for key in keys {
                let null = Value::Null;
                let (one, two) = (one.get(key).unwrap_or(&null), two.get(key).unwrap_or(&null));
                compare(&format!("{path} / {key}"), one, two, problems);
            }
        }
        _ if expected == actual => {}
        // We read the ignore file along with the base images, so also when one of those cannot be resolved.
        (Value::Null, Value::Object(vertices)) if path.contains("/ solves / ") => {
            let is_ignore = |vertex: &Value| vertex["name"] == "[internal] load .dockerignore";
            if !vertices.values().any(is_ignore) {
                problems.push(format!("{path}: solved in vain"));
            }
        }
        _ => problems.push(format!("{path}:\n    expected {expected}\n    actual   {actual}")),
    }
}

fn texts(value: &Value) -> Vec<String> {
    let list = value.as_array().map(Vec::as_slice).unwrap_or_default();
    list.iter()
        .map(|text| text.as_str().unwrap().to_owned())
        .collect()
}

fn run(dir: &Path, images: &Value) -> Value {
    let options = read_json(&dir.join("options.json"));
    let mut platforms = texts(&options["platforms"]);
    if platforms.is_empty() {
        platforms.push("linux/amd64".to_owned());
    }
    let without = texts(&options["missing"]);
    let given: BTreeMap<String, String> =
        serde_json::from_value(options["options"].clone()).unwrap_or_default();
    let files = files_of(dir);
    let mut driver = Driver {
        files: &files,
        images,
        sources: &options["sources"],
        policy: &options["policy"],
        newest: options["newest"].as_i64(),
        solved: Vec::new(),
        asked: Vec::new(),
    };
    let mut request = request(given, &platforms, &without);
    for (name, source) in options["inputs"].as_object().into_iter().flatten() {
        request
            .inputs
            .insert(name.clone(), input(source.as_str().unwrap()));
    }
    let result = driver.run(request);
    let Driver {
        mut solved,
        mut asked,
        ..
    } = driver;
    asked.sort();
    let mut out = json!({});
    if !asked.is_empty() {
        out["asked"] = json!(asked);
    }
    let warnings = describe(result, &mut out, &mut solved);
    if !warnings.is_empty() {
        out["warnings"] = warnings.iter().map(warning_json).collect();
    }
    let solves: Map<String, Value> = solved
        .iter()
        .map(|found| (root(found), vertices(found)))
        .collect();
    if !solves.is_empty() {
        out["solves"] = Value::Object(solves);
    }
    out
}

/// Describes how a conversion ended; returns its warnings.
fn describe(
    result: Result<Outcome, Box<Failure>>,
    out: &mut Value,
    solved: &mut Vec<Definition>,
) -> Vec<Warning> {
    match result {
        Ok(Outcome::Build(build)) => {
            let mut refs = Vec::new();
            for found in build.results {
                let id = if build.multi_platform {
                    found.id.clone()
                } else {
                    String::new()
                };
                refs.push(format!("{id}={}", root(&found.definition)));
                solved.push(found.definition);
                for attestation in found.attestations {
                    let root = root(&attestation.definition);
                    refs.push(format!("attestation {}={root}", found.id));
                    solved.push(attestation.definition);
                }
            }
            refs.sort();
            // The same platform may be asked for twice.
            refs.dedup();
            out["refs"] = json!(refs);
            out["metadata"] = texts_of(&build.metadata);
            build.warnings
        }
        Ok(Outcome::Metadata(found)) => {
            out["metadata"] = texts_of(&found.metadata);
            found.warnings
        }
        Ok(Outcome::Forward(forward)) => {
            out["forward"] = json!(forward.options);
            Vec::new()
        }
        Err(failure) => {
            out["error"] = failure_json(&failure);
            failure.warnings
        }
    }
}

fn texts_of(metadata: &BTreeMap<String, Vec<u8>>) -> Value {
    metadata
        .iter()
        .map(|(key, value)| (key.clone(), json!(String::from_utf8_lossy(value))))
        .collect()
}

fn lines(ranges: &[Range]) -> Value {
    let mut lines = Vec::new();
    for range in ranges {
        lines.push(i64::from(range.start.line));
        if range.end.line != range.start.line {
            lines.push(-i64::from(range.end.line));
        }
    }
    json!(lines)
}

fn failure_json(failure: &Failure) -> Value {
    let sources: Vec<Value> = failure
        .sources
        .iter()
        .map(|source| lines(&source.ranges))
        .collect();
    json!({ "message": failure.message, "sources": sources })
}

fn warning_json(warning: &Warning) -> Value {
    json!({
        "message": warning.short,
        "detail": warning.detail,
        "url": warning.url,
        "lines": lines(&warning.source.ranges),
    })
}

fn root(definition: &Definition) -> String {
    if definition.def.is_empty() {
        return "scratch".into();
    }
    let graph = llb::Graph::load(definition).unwrap();
    graph.vertex(graph.root()).digest.to_string()
}

fn vertices(definition: &Definition) -> Value {
    let digests = definition
        .def
        .iter()
        .map(|raw| oci::Digest::sha256(raw).to_string());
    let empty = OpMetadata::default();
    let vertex = |digest: String| {
        let metadata = definition.metadata.get(&digest).unwrap_or(&empty);
        let mut out = json!({});
        for (key, name) in [
            ("name", "llb.customname"),
            ("command", "com.docker.dockerfile.v1.command"),
        ] {
            if let Some(text) = metadata.description.get(name).filter(|text| !text.is_empty()) {
                out[key] = json!(text);
            }
        }
        if metadata.ignore_cache {
            out["ignore_cache"] = json!(true);
        }
        if let Some(group) = &metadata.progress_group {
            out["group"] = json!(format!("{} {}", group.name, group.weak));
        }
        if !metadata.caps.is_empty() {
            // BuildKit's scanner finds this one on what was marshaled before.
            let caps: Vec<_> = metadata
                .caps
                .keys()
                .filter(|cap| *cap != "exec.meta.setsdefaultpath")
                .collect();
            out["caps"] = json!(caps);
        }
        if let Some(resources) = &metadata.linux_resources {
            out["resources"] = json!(serde_json::to_string(resources).unwrap());
        }
        let source = definition
            .source
            .as_ref()
            .and_then(|source| source.locations.get(&digest));
        let found = source.map(|found| found.locations.as_slice()).unwrap_or_default();
        if !found.is_empty() {
            out["lines"] = found
                .iter()
                .map(|place| json!(wire_lines(&place.ranges)))
                .collect();
        }
        (digest, out)
    };
    Value::Object(digests.map(vertex).collect())
}

fn wire_lines(ranges: &[llb::pb::Range]) -> Vec<i32> {
    let line = |at: Option<llb::pb::Position>| at.unwrap_or_default().line;
    let mut lines = Vec::new();
    for range in ranges {
        lines.push(line(range.start));
        if line(range.end) != line(range.start) {
            lines.push(-line(range.end));
        }
    }
    lines
}

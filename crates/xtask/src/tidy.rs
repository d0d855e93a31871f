//! Rules of this repository that neither rustc nor clippy checks.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, bail};

use crate::shell::root;

/// Which workspace crates each crate may import; complete.
const IMPORTS: &[(&str, &[&str])] = &[
    ("oci", &[]),
    ("llb", &["oci"]),
    ("solver", &["oci"]),
    ("layer", &["oci"]),
    ("dockerfile", &["llb", "oci"]),
    ("content", &["oci"]),
    ("registryauth", &[]),
    ("registry", &["oci", "registryauth"]),
    ("proxy", &["oci"]),
    ("snapshot", &["layer", "oci"]),
    ("cache", &["content", "snapshot", "layer", "oci"]),
    ("executor", &["snapshot", "oci"]),
    ("build", &["cache", "layer", "llb", "oci", "solver"]),
    (
        "source",
        &[
            "build", "cache", "content", "layer", "llb", "oci", "registry", "snapshot",
        ],
    ),
    (
        "export",
        &[
            "build", "cache", "content", "layer", "oci", "registry", "snapshot", "source",
        ],
    ),
    (
        "remotecache",
        &[
            "build", "cache", "export", "layer", "oci", "registry", "solver", "source",
        ],
    ),
    (
        "engine",
        &[
            "build",
            "cache",
            "content",
            "dockerfile",
            "executor",
            "export",
            "layer",
            "llb",
            "oci",
            "proxy",
            "registry",
            "remotecache",
            "snapshot",
            "solver",
            "source",
        ],
    ),
    ("api", &["llb", "oci"]),
    (
        "daemon",
        &["api", "cache", "engine", "executor", "llb", "oci", "registry"],
    ),
    ("cli", &["api", "llb", "oci", "registryauth"]),
    ("cooper", &["cli", "daemon"]),
];

/// Crates that may import any other.
const AIDS: &[&str] = &["testkit", "xtask"];

/// Crates that may depend on tokio.
const ASYNC: &[&str] = &[
    "registry",
    "proxy",
    "executor",
    "build",
    "source",
    "export",
    "remotecache",
    "engine",
    "api",
    "daemon",
    "cli",
    "cooper",
    "testkit",
    "xtask",
];

/// Crates that may depend on anyhow outside their tests.
const ANYHOW: &[&str] = &["cooper", "xtask"];

/// Longest Rust file, tests and generated code apart.
const MAX_LINES: usize = 1000;

/// Longest `ARCHITECTURE.md`.
const MAX_ARCHITECTURE_LINES: usize = 300;

/// Checks every rule and reports all breaches at once.
pub fn run() -> Result<()> {
    let root = root();
    let mut breaches = Vec::new();
    check_manifests(&root, &mut breaches)?;
    check_sources(&root, &mut breaches)?;
    check_documents(&root, &mut breaches)?;
    if breaches.is_empty() {
        println!("tidy: ok");
        return Ok(());
    }
    for breach in &breaches {
        eprintln!("tidy: {breach}");
    }
    bail!("tidy: {} breaches", breaches.len())
}

fn check_manifests(root: &Path, breaches: &mut Vec<String>) -> Result<()> {
    let allowed: BTreeMap<&str, &[&str]> = IMPORTS.iter().copied().collect();
    let members = crate_names(root)?;
    for name in &members {
        let path = root.join("crates").join(name).join("Cargo.toml");
        let manifest = std::fs::read_to_string(&path).with_context(|| path.display().to_string())?;
        let dependencies = dependencies_of(&manifest);
        for dependency in &dependencies {
            let is_member = members.contains(dependency);
            let may_import = AIDS.contains(&name.as_str())
                || allowed
                    .get(name.as_str())
                    .is_some_and(|imports| imports.contains(&dependency.as_str()));
            if is_member && !may_import {
                breaches.push(format!("crate {name} must not import {dependency}"));
            }
            if dependency == "tokio" && !ASYNC.contains(&name.as_str()) {
                breaches.push(format!("crate {name} must not depend on tokio"));
            }
            if dependency == "anyhow" && !ANYHOW.contains(&name.as_str()) {
                breaches.push(format!("crate {name} must not depend on anyhow"));
            }
        }
        if !AIDS.contains(&name.as_str()) && !allowed.contains_key(name.as_str()) {
            breaches.push(format!("crate {name} is missing from the import table"));
        }
    }
    Ok(())
}

fn crate_names(root: &Path) -> Result<Vec<String>> {
    let mut names = Vec::new();
    for entry in std::fs::read_dir(root.join("crates"))? {
        let entry = entry?;
        if entry.path().join("Cargo.toml").is_file() {
            names.push(entry.file_name().to_string_lossy().into_owned());
        }
    }
    names.sort();
    Ok(names)
}

/// Names in `[dependencies]` and its target-specific forms, not in `[dev-dependencies]`.
fn dependencies_of(manifest: &str) -> Vec<String> {
    let mut inside = false;
    let mut names = Vec::new();
    for line in manifest.lines() {
        let line = line.trim();
        if line.starts_with('[') {
            inside =
                line == "[dependencies]" || (line.starts_with("[target") && line.ends_with(".dependencies]"));
        } else if inside {
            let name: String = line
                .chars()
                .take_while(|c| c.is_ascii_alphanumeric() || matches!(c, '-' | '_'))
                .collect();
            if !name.is_empty() {
                names.push(name);
            }
        }
    }
    names
}

fn check_sources(root: &Path, breaches: &mut Vec<String>) -> Result<()> {
    let mut files = Vec::new();
    collect_files(&root.join("crates"), "rs", &mut files)?;
    files.sort();
    for path in files {
        let shown = path.strip_prefix(root).unwrap_or(&path).to_path_buf();
        let generated = shown.components().any(|part| part.as_os_str() == "gen");
        if generated {
            continue;
        }
        let text = std::fs::read_to_string(&path).with_context(|| path.display().to_string())?;
        check_source(&shown, &text, breaches);
    }
    Ok(())
}

fn check_source(shown: &Path, text: &str, breaches: &mut Vec<String>) {
    let name = shown.display().to_string();
    let in_tests =
        name.contains("/tests/") || name.ends_with("/tests.rs") || name.starts_with("crates/testkit");
    if !text.starts_with("//!") {
        breaches.push(format!("{name}: does not begin with a //! comment"));
    }
    let lines = text.lines().count();
    if lines > MAX_LINES && !in_tests {
        breaches.push(format!("{name}: {lines} lines, more than {MAX_LINES}"));
    }
    let is_crate_root = (name.ends_with("/src/lib.rs") || name.ends_with("/src/main.rs")) && !in_tests;
    let may_be_unsafe = name.starts_with("crates/executor/");
    if is_crate_root && !may_be_unsafe && !text.contains("#![forbid(unsafe_code)]") {
        breaches.push(format!("{name}: lacks #![forbid(unsafe_code)]"));
    }
    if name != "crates/xtask/src/tidy.rs" {
        check_markers(&name, text, in_tests, breaches);
    }
}

fn check_markers(name: &str, text: &str, in_tests: bool, breaches: &mut Vec<String>) {
    const UNFINISHED: &[&str] = &[
        "TODO",
        "FIXME",
        "XXX",
        "todo!(",
        "unimplemented!(",
        "#[ignore",
        "#[allow(",
    ];
    let unsafe_is_home = name.starts_with("crates/executor/src/sys");
    for (index, line) in text.lines().enumerate() {
        let code = line.trim_start();
        for marker in UNFINISHED {
            if line.contains(marker) {
                breaches.push(format!("{name}:{}: {marker}", index + 1));
            }
        }
        let is_comment = code.starts_with("//");
        if !is_comment && !unsafe_is_home && (code.contains("unsafe {") || code.contains("unsafe fn")) {
            breaches.push(format!("{name}:{}: unsafe outside executor::sys", index + 1));
        }
        let sleeps = line.contains("thread::sleep(") || line.contains("time::sleep(");
        if in_tests && sleeps && !name.starts_with("crates/testkit") {
            breaches.push(format!("{name}:{}: a test waits by the clock", index + 1));
        }
    }
}

fn check_documents(root: &Path, breaches: &mut Vec<String>) -> Result<()> {
    for required in [
        "README.md",
        "ARCHITECTURE.md",
        "CONTRIBUTING.md",
        "CHANGELOG.md",
        "LICENSE",
        "docs/glossary.md",
    ] {
        if !root.join(required).is_file() {
            breaches.push(format!("{required} is missing"));
        }
    }
    let architecture = std::fs::read_to_string(root.join("ARCHITECTURE.md")).unwrap_or_default();
    if architecture.lines().count() > MAX_ARCHITECTURE_LINES {
        breaches.push(format!(
            "ARCHITECTURE.md: more than {MAX_ARCHITECTURE_LINES} lines"
        ));
    }
    let mut files = Vec::new();
    collect_files(&root.join("docs"), "md", &mut files)?;
    for entry in std::fs::read_dir(root)? {
        let path = entry?.path();
        if path.extension().is_some_and(|extension| extension == "md") {
            files.push(path);
        }
    }
    files.sort();
    for path in files {
        check_links(root, &path, breaches)?;
    }
    Ok(())
}

/// Every relative link of a document must lead to a file.
fn check_links(root: &Path, path: &Path, breaches: &mut Vec<String>) -> Result<()> {
    let text = std::fs::read_to_string(path)?;
    let shown = path.strip_prefix(root).unwrap_or(path).display();
    for piece in text.split("](").skip(1) {
        let target = piece.split([')', '#', ' ']).next().unwrap_or_default();
        if target.is_empty() || target.contains("://") || target.starts_with("mailto:") {
            continue;
        }
        let base = path.parent().unwrap_or(root);
        if !base.join(target).exists() {
            breaches.push(format!("{shown}: link to {target} leads nowhere"));
        }
    }
    Ok(())
}

fn collect_files(dir: &Path, extension: &str, files: &mut Vec<PathBuf>) -> Result<()> {
    let entries = match std::fs::read_dir(dir) {
        Ok(entries) => entries,
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => return Ok(()),
        Err(error) => return Err(error).with_context(|| dir.display().to_string()),
    };
    for entry in entries {
        let entry = entry?;
        let path = entry.path();
        if entry.file_type()?.is_dir() {
            if entry.file_name() != "target" {
                collect_files(&path, extension, files)?;
            }
        } else if path.extension().is_some_and(|found| found == extension) {
            files.push(path);
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn reads_only_normal_dependencies() {
        let manifest = "[dependencies]\na.workspace = true\nb-c = \"1\"\n[dev-dependencies]\nd = \"1\"\n";
        assert_eq!(dependencies_of(manifest), ["a", "b-c"]);
    }

    #[test]
    fn finds_unfinished_work_and_stray_unsafe() {
        let mut breaches = Vec::new();
        check_source(
            Path::new("crates/x/src/a.rs"),
            "//! A.\n// TODO later\nunsafe {}\n",
            &mut breaches,
        );
        assert_eq!(breaches.len(), 2, "{breaches:?}");
    }

    #[test]
    fn accepts_a_clean_file() {
        let mut breaches = Vec::new();
        check_source(
            Path::new("crates/x/src/a.rs"),
            "//! A.\nfn f() {}\n",
            &mut breaches,
        );
        assert!(breaches.is_empty(), "{breaches:?}");
    }
}

//! `--output`: where a result goes.

use std::collections::BTreeMap;
use std::path::PathBuf;

use super::{SpecError, go_bool, key_values};
use crate::format::csv;

/// Where the client puts what an exporter sends.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Destination {
    /// Nothing comes to the client.
    None,
    /// Into a directory.
    Directory(PathBuf),
    /// Into a file.
    File(PathBuf),
    /// To standard output.
    Stdout,
}

/// One exporter.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Output {
    /// The exporter's name.
    pub kind: String,
    /// Its options, without `dest` when the client takes the result.
    pub attrs: BTreeMap<String, String>,
    /// Where the client puts it.
    pub destination: Destination,
}

/// Reads an output as `buildctl` does. `stdout_is_terminal`: a file is not written there.
///
/// # Errors
/// For a missing or surplus type or destination.
pub fn buildctl_output(text: &str, stdout_is_terminal: bool) -> Result<Output, SpecError> {
    let mut kind = String::new();
    let mut attrs = BTreeMap::new();
    for (key, value) in key_values(text)? {
        if key == "type" {
            kind = value;
        } else {
            attrs.insert(key, value);
        }
    }
    if kind.is_empty() {
        return Err(SpecError::invalid("--output requires type=<type>"));
    }
    if let Some(output) = attrs.get("output") {
        let message = format!("output={output} not supported for --output, you meant dest={output}?");
        return Err(SpecError::invalid(message));
    }
    resolve(kind, attrs, stdout_is_terminal)
        .map_err(|error| SpecError::invalid(format!("invalid output option: output: {error}")))
}

/// Reads an output as `docker buildx build` does: also a bare directory, `-` for a tarball on standard output, and
/// `type=registry`.
///
/// # Errors
/// For a missing or surplus type or destination.
pub fn buildx_output(text: &str, stdout_is_terminal: bool) -> Result<Output, SpecError> {
    let fields = csv::fields(text)?;
    let is_bare = fields.len() == 1 && fields[0] == text && !text.starts_with("type=");
    let text = match text {
        "-" => "type=tar,dest=-".to_owned(),
        _ if is_bare && !text.contains('=') => {
            let attrs = BTreeMap::from([("dest".to_owned(), text.to_owned())]);
            return resolve("local".to_owned(), attrs, stdout_is_terminal);
        }
        _ => text.to_owned(),
    };
    let mut output = buildctl_output(
        &text.replacen("type=registry", "type=image,push=true", 1),
        stdout_is_terminal,
    )?;
    if output.attrs.contains_key("push") && text.contains("type=registry") {
        output.attrs.insert("push".to_owned(), "true".to_owned());
    }
    Ok(output)
}

fn resolve(
    kind: String,
    mut attrs: BTreeMap<String, String>,
    stdout_is_terminal: bool,
) -> Result<Output, SpecError> {
    let dest = attrs.get("dest").cloned().unwrap_or_default();
    let as_tar = || attrs.get("tar").is_none_or(|tar| go_bool(tar).unwrap_or(true));
    let (takes_directory, takes_file) = match kind.as_str() {
        "local" => (true, false),
        "tar" => (false, true),
        "oci" | "docker" => (!as_tar(), as_tar()),
        _ => (false, false),
    };
    let destination = if takes_directory {
        if dest.is_empty() {
            return Err(SpecError::invalid(format!(
                "output directory is required for {kind} exporter"
            )));
        }
        Destination::Directory(PathBuf::from(dest))
    } else if takes_file && !dest.is_empty() && dest != "-" {
        let path = PathBuf::from(&dest);
        match std::fs::metadata(&path) {
            Ok(found) if found.is_dir() => return Err(SpecError::invalid("destination file is a directory")),
            Err(source) if source.kind() != std::io::ErrorKind::NotFound => {
                return Err(SpecError::File {
                    context: format!("invalid destination file: {dest}"),
                    source,
                });
            }
            _ => Destination::File(path),
        }
    } else if takes_file && stdout_is_terminal {
        let message = format!("output file is required for {kind} exporter. refusing to write to console");
        return Err(SpecError::invalid(message));
    } else if takes_file {
        Destination::Stdout
    } else if !dest.is_empty() {
        return Err(SpecError::invalid(format!(
            "output {dest} is not supported by {kind} exporter"
        )));
    } else {
        Destination::None
    };
    if destination != Destination::None {
        attrs.remove("dest");
    }
    Ok(Output {
        kind,
        attrs,
        destination,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn reads_buildctl_outputs() {
        let output = buildctl_output("type=image,name=example.com/a,push=true", true).unwrap();
        assert_eq!(
            (output.kind.as_str(), &output.destination),
            ("image", &Destination::None)
        );
        assert_eq!(output.attrs["push"], "true");
        let output = buildctl_output("type=local,dest=out", true).unwrap();
        assert_eq!(output.destination, Destination::Directory("out".into()));
        assert!(output.attrs.is_empty());
        assert_eq!(
            buildctl_output("type=tar", false).unwrap().destination,
            Destination::Stdout
        );
        assert_eq!(
            buildctl_output("type=oci,dest=/nonexistent/x", false)
                .unwrap()
                .destination,
            Destination::File("/nonexistent/x".into())
        );
        assert_eq!(
            buildctl_output("type=oci,tar=false,dest=out", false)
                .unwrap()
                .destination,
            Destination::Directory("out".into())
        );
    }

    #[test]
    fn refuses_what_makes_no_sense() {
        for (text, message) in [
            ("dest=x", "--output requires type=<type>"),
            (
                "type=local",
                "invalid output option: output: output directory is required for local exporter",
            ),
            (
                "type=image,dest=x",
                "invalid output option: output: output x is not supported by image exporter",
            ),
            (
                "type=local,output=x",
                "output=x not supported for --output, you meant dest=x?",
            ),
            (
                "type=tar,dest=/",
                "invalid output option: output: destination file is a directory",
            ),
            (
                "type=tar",
                "invalid output option: output: output file is required for tar exporter. refusing to write to console",
            ),
        ] {
            assert_eq!(buildctl_output(text, true).unwrap_err().to_string(), message);
        }
    }

    #[test]
    fn reads_buildx_shorthands() {
        assert_eq!(
            buildx_output("out", true).unwrap().destination,
            Destination::Directory("out".into())
        );
        let output = buildx_output("-", false).unwrap();
        assert_eq!(
            (output.kind.as_str(), output.destination),
            ("tar", Destination::Stdout)
        );
        let output = buildx_output("type=registry,name=x", true).unwrap();
        assert_eq!(
            (output.kind.as_str(), output.attrs["push"].as_str()),
            ("image", "true")
        );
    }
}

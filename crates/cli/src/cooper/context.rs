//! Where a build's files come from: a directory, an address, or standard input.

use std::collections::BTreeMap;
use std::io::{Read as _, Write as _};
use std::path::{Path, PathBuf};

use crate::failure::Failure;
use crate::oci_index;
use crate::services::uploads::Uploads;

/// The name of a Dockerfile that no name was given for.
const DOCKERFILE: &str = "Dockerfile";
/// How much of standard input is looked at to tell a tarball from a Dockerfile.
const PEEK_BYTES: usize = 512;
/// Longest Dockerfile that is read from standard input.
const MAX_DOCKERFILE_BYTES: u64 = 16 << 20;

/// What a build reads, as the frontend is told.
#[derive(Debug, Default)]
pub struct Context {
    /// Options of the frontend.
    pub options: BTreeMap<String, String>,
    /// Directories by name.
    pub directories: BTreeMap<String, PathBuf>,
    /// OCI layouts by name.
    pub layouts: BTreeMap<String, PathBuf>,
    /// What names the directories between builds.
    pub origin: String,
    /// A stream that the frontend fetches.
    pub uploads: Option<Uploads>,
    /// What was made for this build only.
    made: Vec<MadeDirectory>,
}

/// A directory that goes with the build.
#[derive(Debug)]
struct MadeDirectory(PathBuf);

impl Drop for MadeDirectory {
    fn drop(&mut self) {
        // A leftover in the temporary directory harms nobody.
        let _ = std::fs::remove_dir_all(&self.0);
    }
}

/// Tells whether a context is fetched by the daemon.
fn is_remote(context: &str) -> bool {
    let schemes = ["http://", "https://", "git://", "git@", "ssh://", "github.com/"];
    schemes.iter().any(|scheme| context.starts_with(scheme))
}

impl Context {
    /// Finds the files of a build.
    ///
    /// # Errors
    /// For a directory or Dockerfile that is not there, or a standard input that cannot be used.
    pub fn find(context: &str, dockerfile: Option<&str>) -> Result<Self, Failure> {
        let mut found = Self::default();
        match context {
            "-" if dockerfile == Some("-") => {
                return Err(Failure::new(
                    "invalid argument: can't use stdin for both build context and dockerfile",
                ));
            }
            "-" => found.read_stdin(dockerfile)?,
            _ if is_remote(context) => {
                found.options.insert("context".to_owned(), context.to_owned());
                found.origin = context.to_owned();
                found.add_dockerfile(None, dockerfile)?;
            }
            _ => {
                let dir = std::fs::canonicalize(context).ok().filter(|dir| dir.is_dir());
                let dir = dir.ok_or_else(|| {
                    Failure::new(format!("unable to prepare context: path {context:?} not found"))
                })?;
                found.origin = dir.display().to_string();
                found.add_dockerfile(Some(&dir), dockerfile)?;
                found.directories.insert("context".to_owned(), dir);
            }
        }
        Ok(found)
    }

    fn add_dockerfile(&mut self, context: Option<&Path>, dockerfile: Option<&str>) -> Result<(), Failure> {
        let (dir, name) = match (dockerfile, context) {
            (Some("-"), _) => {
                let mut text = Vec::new();
                std::io::stdin()
                    .lock()
                    .take(MAX_DOCKERFILE_BYTES)
                    .read_to_end(&mut text)?;
                (self.make_dockerfile(&text)?, DOCKERFILE.to_owned())
            }
            (Some(name), None) => {
                // The daemon finds it in what it fetches.
                self.options.insert("filename".to_owned(), name.to_owned());
                return Ok(());
            }
            (Some(name), Some(context)) => split_dockerfile(Path::new(name), context)?,
            (None, Some(context)) => split_dockerfile(&context.join(DOCKERFILE), context)?,
            (None, None) => return Ok(()),
        };
        self.directories.insert("dockerfile".to_owned(), dir);
        self.options.insert("filename".to_owned(), name);
        Ok(())
    }

    fn make_dockerfile(&mut self, text: &[u8]) -> Result<PathBuf, Failure> {
        let dir = self.make_directory()?;
        std::fs::write(dir.join(DOCKERFILE), text)?;
        Ok(dir)
    }

    fn make_directory(&mut self) -> Result<PathBuf, Failure> {
        let dir = std::env::temp_dir().join(format!("cooper-context-{}", crate::ids::new_id()));
        let mut builder = std::fs::DirBuilder::new();
        std::os::unix::fs::DirBuilderExt::mode(&mut builder, 0o700);
        builder.create(&dir)?;
        self.made.push(MadeDirectory(dir.clone()));
        Ok(dir)
    }

    /// Standard input is a tarball with everything, or a Dockerfile that needs nothing.
    fn read_stdin(&mut self, dockerfile: Option<&str>) -> Result<(), Failure> {
        let mut stdin = std::io::stdin().lock();
        let mut head = Vec::new();
        (&mut stdin)
            .take(u64::try_from(PEEK_BYTES).unwrap_or(0))
            .read_to_end(&mut head)?;
        if head.is_empty() {
            return Err(Failure::new("failed to read context from stdin: it is empty"));
        }
        drop(stdin);
        if is_archive(&head) {
            let uploads = Uploads::default();
            let rest = tokio::io::AsyncReadExt::chain(std::io::Cursor::new(head), tokio::io::stdin());
            self.options.insert("context".to_owned(), uploads.add(rest));
            if let Some(name) = dockerfile {
                self.options.insert("filename".to_owned(), name.to_owned());
            }
            self.uploads = Some(uploads);
            return Ok(());
        }
        if dockerfile.is_some() {
            return Err(Failure::new(
                "ambiguous Dockerfile source: both stdin and flag correspond to Dockerfiles",
            ));
        }
        std::io::stdin()
            .lock()
            .take(MAX_DOCKERFILE_BYTES)
            .read_to_end(&mut head)?;
        let dir = self.make_dockerfile(&head)?;
        self.options.insert("filename".to_owned(), DOCKERFILE.to_owned());
        self.directories.insert("dockerfile".to_owned(), dir);
        let empty = self.make_directory()?;
        self.directories.insert("context".to_owned(), empty);
        Ok(())
    }

    /// Adds a named context: a directory, an OCI layout, an image, or an address.
    ///
    /// # Errors
    /// For a value that is none, or a layout without the image.
    pub fn add_named(&mut self, value: &str) -> Result<(), Failure> {
        let (name, target) = value
            .split_once('=')
            .ok_or_else(|| Failure::new(format!("invalid context value: {value}, expected key=value")))?;
        let name = name.to_lowercase();
        let option = format!("context:{name}");
        if let Some(layout) = target.strip_prefix("oci-layout://") {
            let (reference, dir) = layout_reference(layout)?;
            let store = crate::ids::new_id();
            self.options
                .insert(option, format!("oci-layout://{store}{reference}"));
            self.layouts.insert(store, dir);
            return Ok(());
        }
        if is_remote(target) || target.starts_with("docker-image://") || target.starts_with("target:") {
            self.options.insert(option, target.to_owned());
            return Ok(());
        }
        let dir = std::fs::canonicalize(target)
            .ok()
            .filter(|dir| dir.is_dir())
            .ok_or_else(|| {
                Failure::new(format!(
                    "failed to get build context {name}: stat {target}: no such directory"
                ))
            })?;
        let directory = if name == "context" || name == "dockerfile" {
            format!("_{name}")
        } else {
            name
        };
        self.options.insert(option, format!("local:{directory}"));
        self.directories.insert(directory, dir);
        Ok(())
    }
}

/// Splits a layout's path from the tag or digest in it; returns `@digest` and the directory.
fn layout_reference(text: &str) -> Result<(String, PathBuf), Failure> {
    if let Some((dir, digest)) = text.split_once('@') {
        return Ok((format!("@{digest}"), PathBuf::from(dir)));
    }
    let (dir, tag) = match text.rsplit_once(':') {
        Some((dir, tag)) if !tag.contains('/') => (dir, tag),
        _ => (text, "latest"),
    };
    let manifest = oci_index::find(Path::new(dir), tag).map_err(|error| Failure::new(error.to_string()))?;
    let manifest =
        manifest.ok_or_else(|| Failure::new(format!("failed to find {tag} in index of OCI layout {dir}")))?;
    Ok((format!("@{}", manifest.digest), PathBuf::from(dir)))
}

fn split_dockerfile(path: &Path, context: &Path) -> Result<(PathBuf, String), Failure> {
    let inside = context.join(path);
    let path = if path.exists() { path.to_owned() } else { inside };
    let missing = || {
        let message = format!(
            "failed to read dockerfile: open {}: no such file or directory",
            path.display()
        );
        Failure::new(message)
    };
    let name = path
        .file_name()
        .ok_or_else(missing)?
        .to_string_lossy()
        .into_owned();
    let dir = path
        .parent()
        .filter(|dir| !dir.as_os_str().is_empty())
        .unwrap_or(Path::new("."));
    let dir = std::fs::canonicalize(dir).map_err(|_| missing())?;
    if !path.exists() {
        return Err(missing());
    }
    Ok((dir, name))
}

/// Tells a tarball, perhaps a compressed one, by its first bytes.
fn is_archive(head: &[u8]) -> bool {
    let magics: [&[u8]; 4] = [
        &[0x1f, 0x8b],
        b"BZh",
        &[0xfd, b'7', b'z', b'X', b'Z'],
        &[0x28, 0xb5, 0x2f, 0xfd],
    ];
    magics.iter().any(|magic| head.starts_with(magic)) || head.get(257..262) == Some(b"ustar")
}

/// Returns the key under which a daemon keeps a context's files between builds: of this machine, user and context.
pub fn shared_key(origin: &str) -> String {
    let machine = std::fs::read_to_string("/etc/machine-id")
        .or_else(|_| std::fs::read_to_string("/proc/sys/kernel/hostname"))
        .unwrap_or_default();
    let mut text = Vec::new();
    // Writing to memory does not fail.
    let _ = write!(
        text,
        "{}:{}:{origin}",
        machine.trim(),
        rustix::process::getuid().as_raw()
    );
    oci::Digest::sha256(&text).hex()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn directories_have_a_dockerfile() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().to_str().unwrap();
        let error = Context::find(path, None).unwrap_err().to_string();
        assert!(error.contains("failed to read dockerfile"), "{error}");
        std::fs::write(dir.path().join("Dockerfile"), "FROM scratch").unwrap();
        std::fs::write(dir.path().join("other.Dockerfile"), "FROM scratch").unwrap();
        let found = Context::find(path, None).unwrap();
        assert_eq!(found.options["filename"], "Dockerfile");
        assert_eq!(found.directories["context"], found.directories["dockerfile"]);
        let found = Context::find(path, Some("other.Dockerfile")).unwrap();
        assert_eq!(found.options["filename"], "other.Dockerfile");
        assert!(
            Context::find("/nonexistent", None)
                .unwrap_err()
                .to_string()
                .contains("not found")
        );
    }

    #[test]
    fn addresses_are_fetched_by_the_daemon() {
        let found = Context::find("https://github.com/a/b.git#main", Some("x/Dockerfile")).unwrap();
        assert_eq!(found.options["context"], "https://github.com/a/b.git#main");
        assert_eq!(found.options["filename"], "x/Dockerfile");
        assert!(found.directories.is_empty());
    }

    #[test]
    fn named_contexts_are_told_apart() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().to_str().unwrap();
        let mut context = Context::default();
        context.add_named(&format!("dockerfile={path}")).unwrap();
        context.add_named("base=docker-image://alpine").unwrap();
        assert_eq!(context.options["context:dockerfile"], "local:_dockerfile");
        assert_eq!(context.options["context:base"], "docker-image://alpine");
        assert!(context.directories.contains_key("_dockerfile"));
        assert!(context.add_named("x").is_err() && context.add_named("x=/nonexistent").is_err());
        std::fs::write(
            dir.path().join("index.json"),
            r#"{"manifests":[{"digest":"sha256:a","annotations":{"org.opencontainers.image.ref.name":"v1"}}]}"#,
        )
        .unwrap();
        context.add_named(&format!("l=oci-layout://{path}:v1")).unwrap();
        assert!(context.options["context:l"].ends_with("@sha256:a"));
        assert!(context.add_named(&format!("l=oci-layout://{path}:v2")).is_err());
    }

    #[test]
    fn archives_are_told_by_their_first_bytes() {
        assert!(is_archive(&[0x1f, 0x8b, 8]));
        let mut tar = vec![0; 512];
        tar[257..262].copy_from_slice(b"ustar");
        assert!(is_archive(&tar));
        assert!(!is_archive(b"FROM alpine\n"));
    }

    #[test]
    fn keys_differ_by_context() {
        assert_ne!(shared_key("/a"), shared_key("/b"));
        assert_eq!(shared_key("/a"), shared_key("/a"));
    }
}

//! Where files come from: images, the client, Git, HTTP, OCI layouts.

use std::collections::BTreeMap;
use std::sync::Arc;

use oci::{Digest, Reference, path};

use super::vertex::{Kind, Output, Vertex};
use super::{Constraints, MarshalError, State};
use crate::{GitUrl, GitUrlError, attr, caps};

type Attrs = BTreeMap<String, String>;

/// Sets an attribute that has a value.
fn set(attrs: &mut Attrs, name: &str, value: &str) {
    if !value.is_empty() {
        attrs.insert(name.to_owned(), value.to_owned());
    }
}

/// Returns the JSON list that attributes hold, empty for no patterns.
fn list(patterns: &[String]) -> String {
    if patterns.is_empty() {
        String::new()
    } else {
        oci::json::to_string(patterns).unwrap_or_default()
    }
}

fn source(identifier: String, attrs: Attrs, constraints: Constraints, error: Option<MarshalError>) -> State {
    let platform = constraints.platform.clone();
    let kind = Kind::Source {
        identifier,
        attrs,
        error,
    };
    State::new(Some(Output {
        vertex: Arc::new(Vertex { kind, constraints }),
        index: 0,
        platform,
    }))
}

/// How an image reference becomes a digest.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum ResolveMode {
    /// As the daemon is configured.
    #[default]
    Default,
    /// From the registry.
    ForcePull,
    /// From the local store where it is there.
    PreferLocal,
}

impl ResolveMode {
    /// Returns the value of the attribute.
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::Default => attr::IMAGE_RESOLVE_MODE_DEFAULT,
            Self::ForcePull => attr::IMAGE_RESOLVE_MODE_FORCE_PULL,
            Self::PreferLocal => attr::IMAGE_RESOLVE_MODE_PREFER_LOCAL,
        }
    }
}

/// Options of [`State::image`].
#[derive(Clone, Debug, Default)]
pub struct ImageOptions {
    /// How the reference becomes a digest.
    pub resolve_mode: ResolveMode,
    /// Record type of the pulled layers, such as `internal`; empty for the usual one.
    pub record_type: String,
    /// Most layers to use.
    pub layer_limit: Option<u32>,
    /// Digest the image must have.
    pub checksum: Option<Digest>,
    /// Constraints.
    pub constraints: Constraints,
}

/// Options of [`State::local`].
#[derive(Clone, Debug, Default)]
pub struct LocalOptions {
    /// Session that has the files; empty for the build's.
    pub session_id: String,
    /// Files to send; all when empty.
    pub include_patterns: Vec<String>,
    /// Files not to send.
    pub exclude_patterns: Vec<String>,
    /// Paths whose symlink targets are sent too.
    pub follow_paths: Vec<String>,
    /// Name shared by transfers of the same directory.
    pub shared_key_hint: String,
    /// How unchanged files are told, `none` or `metadata`; empty for the default.
    pub differ: String,
    /// Whether a daemon must know `differ`.
    pub differ_required: bool,
    /// Sends metadata only, but for these files.
    pub metadata_only: Option<Vec<String>>,
    /// Constraints.
    pub constraints: Constraints,
}

/// Options of [`State::git`].
#[derive(Clone, Debug, Default)]
#[expect(
    clippy::struct_excessive_bools,
    reason = "each is an attribute of the protocol"
)]
pub struct GitOptions {
    /// Commit, tag or branch; goes before the fragment's.
    pub reference: String,
    /// Directory of the repository; goes before the fragment's.
    pub subdir: String,
    /// Keeps `.git`.
    pub keep_git_dir: bool,
    /// Leaves submodules out.
    pub skip_submodules: bool,
    /// Commit that the reference must resolve to.
    pub checksum: String,
    /// File times: `checkout` or `commit`; empty for the default.
    pub mtime: String,
    /// Fetches the commit itself.
    pub fetch_by_commit: bool,
    /// Secret with a token, instead of `GIT_AUTH_TOKEN`.
    pub auth_token_secret: Option<String>,
    /// Secret with a header, instead of `GIT_AUTH_HEADER`.
    pub auth_header_secret: Option<String>,
    /// Lines for `known_hosts`.
    pub known_ssh_hosts: String,
    /// SSH agent, instead of `default`.
    pub mount_ssh_sock: String,
    /// Where a bundle is read from instead.
    pub bundle: String,
    /// Session of a bundle in an OCI layout.
    pub bundle_session_id: String,
    /// Store of a bundle in an OCI layout.
    pub bundle_store_id: String,
    /// Makes a bundle of the checkout.
    pub checkout_bundle: bool,
    /// Constraints.
    pub constraints: Constraints,
}

/// Options of [`State::http`].
#[derive(Clone, Debug, Default)]
pub struct HttpOptions {
    /// Digest the file must have.
    pub checksum: Option<Digest>,
    /// Name of the file; empty for that of the URL or the response.
    pub filename: String,
    /// Permission bits; 0 for the default.
    pub perm: u32,
    /// Owner.
    pub uid: u32,
    /// Group.
    pub gid: u32,
    /// Secret with an `Authorization` header.
    pub auth_header_secret: String,
    /// `Accept` and `User-Agent` headers, when either is set.
    pub headers: Option<(String, String)>,
    /// Public key and detached signature in armor.
    pub signature: Option<(String, String)>,
    /// Constraints.
    pub constraints: Constraints,
}

/// Options of [`State::image_blob`] and [`State::oci_layout_blob`].
#[derive(Clone, Debug, Default)]
pub struct ImageBlobOptions {
    /// Name of the file.
    pub filename: String,
    /// Permission bits; 0 for the default.
    pub perm: u32,
    /// Owner.
    pub uid: u32,
    /// Group.
    pub gid: u32,
    /// Session of the OCI layout.
    pub session_id: String,
    /// Store of the OCI layout.
    pub store_id: String,
    /// Constraints.
    pub constraints: Constraints,
}

/// Options of [`State::oci_layout`].
#[derive(Clone, Debug, Default)]
pub struct OciLayoutOptions {
    /// Session that has the layout; empty for the build's.
    pub session_id: String,
    /// Store; empty for the one that the reference names.
    pub store_id: String,
    /// Most layers to use.
    pub layer_limit: Option<u32>,
    /// Constraints.
    pub constraints: Constraints,
}

impl State {
    /// Returns the filesystem of an image in a registry. A bad reference fails when the state is marshaled.
    pub fn image(reference: &str, options: ImageOptions) -> Self {
        let ImageOptions {
            resolve_mode,
            record_type,
            layer_limit,
            checksum,
            mut constraints,
        } = options;
        let (name, error) = match Reference::parse(reference) {
            Ok(parsed) => (parsed.with_default_tag().to_string(), None),
            Err(err) => (reference.to_owned(), Some(MarshalError::Reference(err))),
        };
        constraints.add_cap(caps::SOURCE_IMAGE);
        let mut attrs = Attrs::new();
        if resolve_mode != ResolveMode::Default {
            set(&mut attrs, attr::IMAGE_RESOLVE_MODE, resolve_mode.as_str());
        }
        if resolve_mode == ResolveMode::ForcePull {
            constraints.add_cap(caps::SOURCE_IMAGE_RESOLVE_MODE);
        }
        set(&mut attrs, attr::IMAGE_RECORD_TYPE, &record_type);
        if let Some(limit) = layer_limit {
            set(&mut attrs, attr::IMAGE_LAYER_LIMIT, &limit.to_string());
            constraints.add_cap(caps::SOURCE_IMAGE_LAYER_LIMIT);
        }
        if let Some(checksum) = checksum {
            set(&mut attrs, attr::IMAGE_CHECKSUM, &checksum.to_string());
            constraints.add_cap(caps::SOURCE_IMAGE_CHECKSUM);
        }
        source(format!("docker-image://{name}"), attrs, constraints, error)
    }

    /// Returns one blob of a repository as a file.
    pub fn image_blob(reference: &str, options: ImageBlobOptions) -> Self {
        blob("docker-image+blob", reference, options)
    }

    /// Returns one blob of an OCI layout as a file.
    pub fn oci_layout_blob(reference: &str, options: ImageBlobOptions) -> Self {
        blob("oci-layout+blob", reference, options)
    }

    /// Returns files of the client.
    pub fn local(name: &str, options: LocalOptions) -> Self {
        let mut constraints = options.constraints;
        let mut attrs = Attrs::new();
        let mut add = |name, value: &str, cap: Option<&str>| {
            if !value.is_empty() {
                set(&mut attrs, name, value);
                if let Some(cap) = cap {
                    constraints.add_cap(cap);
                }
            }
        };
        add(
            attr::LOCAL_SESSION_ID,
            &options.session_id,
            Some(caps::SOURCE_LOCAL_SESSION_ID),
        );
        let include = list(&options.include_patterns);
        add(
            attr::INCLUDE_PATTERNS,
            &include,
            Some(caps::SOURCE_LOCAL_INCLUDE_PATTERNS),
        );
        add(
            attr::FOLLOW_PATHS,
            &list(&options.follow_paths),
            Some(caps::SOURCE_LOCAL_FOLLOW_PATHS),
        );
        let exclude = list(&options.exclude_patterns);
        add(
            attr::EXCLUDE_PATTERNS,
            &exclude,
            Some(caps::SOURCE_LOCAL_EXCLUDE_PATTERNS),
        );
        add(
            attr::SHARED_KEY_HINT,
            &options.shared_key_hint,
            Some(caps::SOURCE_LOCAL_SHARED_KEY_HINT),
        );
        let differ_cap = options.differ_required.then_some(caps::SOURCE_LOCAL_DIFFER);
        add(attr::LOCAL_DIFFER, &options.differ, differ_cap);
        if let Some(exceptions) = &options.metadata_only {
            add(
                attr::METADATA_TRANSFER,
                "true",
                Some(caps::SOURCE_METADATA_TRANSFER),
            );
            add(attr::METADATA_TRANSFER_EXCLUDE, &list(exceptions), None);
        }
        constraints.add_cap(caps::SOURCE_LOCAL);
        source(format!("local://{name}"), attrs, constraints, None)
    }

    /// Returns a checkout of a Git repository. `fragment` is `ref:subdir`.
    ///
    /// Unlike the Go client this does not ask an SSH server for its keys: `known_ssh_hosts` has them or is empty.
    pub fn git(url: &str, fragment: &str, options: GitOptions) -> Self {
        let (parsed, url) = match GitUrl::parse(url) {
            Err(GitUrlError::UnknownProtocol) => {
                let url = format!("https://{url}");
                (GitUrl::parse(&url).ok(), url)
            }
            parsed => (parsed.ok(), url.to_owned()),
        };
        let url = parsed.as_ref().map_or(url, |parsed| parsed.remote.clone());
        let (reference, subdir) = fragment.split_once(':').unwrap_or((fragment, ""));
        let subdir = path::join(&["/", subdir]).trim_start_matches('/').to_owned();
        let reference = if options.reference.is_empty() {
            reference
        } else {
            &options.reference
        };
        let subdir = if options.subdir.is_empty() {
            &subdir
        } else {
            &options.subdir
        };
        let identifier = git_identifier(parsed.as_ref(), &url, reference, subdir);
        let mut constraints = options.constraints.clone();
        let attrs = git_attrs(&options, parsed.as_ref(), &url, &mut constraints);
        source(format!("git://{identifier}"), attrs, constraints, None)
    }

    /// Returns a file from a web server.
    pub fn http(url: &str, options: HttpOptions) -> Self {
        let mut constraints = options.constraints;
        let mut attrs = Attrs::new();
        if let Some(checksum) = options.checksum {
            set(&mut attrs, attr::HTTP_CHECKSUM, &checksum.to_string());
            constraints.add_cap(caps::SOURCE_HTTP_CHECKSUM);
        }
        file_attrs(
            &mut attrs,
            &options.filename,
            options.perm,
            options.uid,
            options.gid,
        );
        if options.perm != 0 {
            constraints.add_cap(caps::SOURCE_HTTP_PERM);
        }
        if options.uid != 0 || options.gid != 0 {
            constraints.add_cap(caps::SOURCE_HTTP_UID_GID);
        }
        if !options.auth_header_secret.is_empty() {
            set(
                &mut attrs,
                attr::HTTP_AUTH_HEADER_SECRET,
                &options.auth_header_secret,
            );
            constraints.add_cap(caps::SOURCE_HTTP_AUTH);
        }
        if let Some((accept, user_agent)) = &options.headers {
            set(&mut attrs, &format!("{}accept", attr::HTTP_HEADER_PREFIX), accept);
            set(
                &mut attrs,
                &format!("{}user-agent", attr::HTTP_HEADER_PREFIX),
                user_agent,
            );
            constraints.add_cap(caps::SOURCE_HTTP_HEADER);
        }
        if let Some((key, signature)) = &options.signature {
            set(&mut attrs, attr::HTTP_SIGNATURE_VERIFY_PUB_KEY, key);
            set(&mut attrs, attr::HTTP_SIGNATURE_VERIFY, signature);
            constraints.add_cap(caps::SOURCE_HTTP_SIGNATURE_VERIFY);
        }
        constraints.add_cap(caps::SOURCE_HTTP);
        source(url.to_owned(), attrs, constraints, None)
    }

    /// Returns the filesystem of an image in an OCI layout of the client.
    pub fn oci_layout(reference: &str, options: OciLayoutOptions) -> Self {
        let mut constraints = options.constraints;
        let mut attrs = Attrs::new();
        set(&mut attrs, attr::OCI_LAYOUT_SESSION_ID, &options.session_id);
        set(&mut attrs, attr::OCI_LAYOUT_STORE_ID, &options.store_id);
        if let Some(limit) = options.layer_limit {
            set(&mut attrs, attr::OCI_LAYOUT_LAYER_LIMIT, &limit.to_string());
        }
        constraints.add_cap(caps::SOURCE_OCI_LAYOUT);
        source(format!("oci-layout://{reference}"), attrs, constraints, None)
    }
}

fn file_attrs(attrs: &mut Attrs, filename: &str, perm: u32, uid: u32, gid: u32) {
    set(attrs, attr::HTTP_FILENAME, filename);
    if perm != 0 {
        set(attrs, attr::HTTP_PERM, &format!("0{:o}", perm & 0o777));
    }
    for (name, id) in [(attr::HTTP_UID, uid), (attr::HTTP_GID, gid)] {
        if id != 0 {
            set(attrs, name, &id.to_string());
        }
    }
}

fn blob(scheme: &str, reference: &str, options: ImageBlobOptions) -> State {
    let mut attrs = Attrs::new();
    file_attrs(
        &mut attrs,
        &options.filename,
        options.perm,
        options.uid,
        options.gid,
    );
    set(&mut attrs, attr::OCI_LAYOUT_SESSION_ID, &options.session_id);
    set(&mut attrs, attr::OCI_LAYOUT_STORE_ID, &options.store_id);
    let mut constraints = options.constraints;
    constraints.add_cap(caps::SOURCE_IMAGE_BLOB);
    let checked = match Reference::parse(reference) {
        Err(err) => Err(MarshalError::Reference(err)),
        Ok(parsed) if parsed.tag().is_some() => Err(MarshalError::TaggedBlob),
        Ok(parsed) if parsed.digest().is_none() => Err(MarshalError::BlobWithoutDigest),
        Ok(parsed) => Ok(parsed.to_string()),
    };
    let (name, error) = match checked {
        Ok(name) => (name, None),
        Err(err) => ("invalid".to_owned(), Some(err)),
    };
    source(format!("{scheme}://{name}"), attrs, constraints, error)
}

/// The same for every protocol of the same repository, so that they share a checkout.
fn git_identifier(url: Option<&GitUrl>, text: &str, reference: &str, subdir: &str) -> String {
    let Some(url) = url else { return text.to_owned() };
    let mut identifier = format!("{}{}", url.host, path::join(&["/", &url.path]));
    if !reference.is_empty() || !subdir.is_empty() {
        identifier.push('#');
        identifier.push_str(reference);
    }
    if !subdir.is_empty() {
        identifier.push(':');
        identifier.push_str(subdir);
    }
    identifier
}

fn git_attrs(options: &GitOptions, url: Option<&GitUrl>, text: &str, constraints: &mut Constraints) -> Attrs {
    let mut attrs = Attrs::new();
    let mut add = |name, value: &str, cap: Option<&str>| {
        if !value.is_empty() {
            set(&mut attrs, name, value);
            if let Some(cap) = cap {
                constraints.add_cap(cap);
            }
        }
    };
    let flag = |on: bool| if on { "true" } else { "" };
    add(
        attr::KEEP_GIT_DIR,
        flag(options.keep_git_dir),
        Some(caps::SOURCE_GIT_KEEP_DIR),
    );
    add(attr::FULL_REMOTE_URL, text, Some(caps::SOURCE_GIT_FULL_URL));
    let explicit = options.auth_token_secret.is_some() || options.auth_header_secret.is_some();
    let auth_cap = explicit.then_some(caps::SOURCE_GIT_HTTP_AUTH);
    let token = options.auth_token_secret.as_deref().unwrap_or("GIT_AUTH_TOKEN");
    add(attr::AUTH_TOKEN_SECRET, token, auth_cap);
    let header = options.auth_header_secret.as_deref().unwrap_or("GIT_AUTH_HEADER");
    add(attr::AUTH_HEADER_SECRET, header, auth_cap);
    let is_ssh = url.is_some_and(|url| url.scheme == "ssh");
    if is_ssh {
        add(attr::KNOWN_SSH_HOSTS, &options.known_ssh_hosts, None);
        let sock = if options.mount_ssh_sock.is_empty() {
            "default"
        } else {
            &options.mount_ssh_sock
        };
        add(attr::MOUNT_SSH_SOCK, sock, Some(caps::SOURCE_GIT_MOUNT_SSH_SOCK));
    }
    add(
        attr::GIT_CHECKSUM,
        &options.checksum,
        Some(caps::SOURCE_GIT_CHECKSUM),
    );
    add(
        attr::GIT_SKIP_SUBMODULES,
        flag(options.skip_submodules),
        Some(caps::SOURCE_GIT_SKIP_SUBMODULES),
    );
    add(attr::GIT_MTIME, &options.mtime, Some(caps::SOURCE_GIT_MTIME));
    add(
        attr::GIT_FETCH_BY_COMMIT,
        flag(options.fetch_by_commit),
        Some(caps::SOURCE_GIT_FETCH_BY_COMMIT),
    );
    add(attr::GIT_BUNDLE, &options.bundle, Some(caps::SOURCE_GIT_BUNDLE));
    add(attr::OCI_LAYOUT_SESSION_ID, &options.bundle_session_id, None);
    add(attr::OCI_LAYOUT_STORE_ID, &options.bundle_store_id, None);
    add(
        attr::GIT_CHECKOUT_BUNDLE,
        flag(options.checkout_bundle),
        Some(caps::SOURCE_GIT_CHECKOUT_BUNDLE),
    );
    constraints.add_cap(caps::SOURCE_GIT);
    if is_ssh {
        constraints.add_cap(caps::SOURCE_GIT_KNOWN_SSH_HOSTS);
    }
    attrs
}

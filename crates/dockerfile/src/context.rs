//! Build contexts: the main one, the Dockerfile's, and named ones.

use std::cell::RefCell;
use std::collections::{BTreeMap, BTreeSet};
use std::rc::Rc;

use base64::Engine as _;
use llb::pb::{self, Definition};
use llb::{
    Constraints, CopyOptions, Deferred, FileActions, GitOptions, HttpOptions, ImageOptions, LocalOptions,
    MarshalOptions, OciLayoutOptions, State,
};
use oci::pattern::read_ignore_file;
use oci::{ImageConfig, Platform, Reference, path};

use crate::ask::Asker;
use crate::error::{ConvertError, Progress, Stop};
use crate::git_ref::GitRef;
use crate::image;
use crate::options::Options;
use crate::request::{ImageConfigNeed, LayoutStore};
use crate::text;

const CONTEXT: &str = "context";
const DOCKERFILE: &str = "Dockerfile";
const DOCKERIGNORE: &str = ".dockerignore";
/// Name of the file that a context from a web server is downloaded to.
const HTTP_FILE: &str = "context";
/// How much of a download is looked at to tell whether it is an archive.
const ARCHIVE_HEADER_BYTES: u64 = 1024;
/// How often a source policy may turn a context into another one.
const MAX_REDIRECTS: usize = 10;

/// Constraints of a vertex that is none of the user's steps.
pub(crate) fn internal(name: &str) -> Constraints {
    Constraints::new().custom_name(format!("[internal] {name}"))
}

/// Encodes a state on its own.
pub(crate) fn marshal(state: &State) -> Progress<Definition> {
    Ok(state.marshal(&MarshalOptions::default())?)
}

/// Where the main context and the Dockerfile come from.
#[derive(Debug)]
struct Main {
    /// `None` for the client's directory.
    context: Option<State>,
    dockerfile: Option<State>,
    dockerfile_local: String,
    filename: String,
    /// The context before it was unpacked or narrowed to a directory.
    source: Option<State>,
    http_archive: bool,
}

/// The Dockerfile and where it is from.
#[derive(Clone, Debug)]
pub(crate) struct Entrypoint {
    pub(crate) data: Vec<u8>,
    pub(crate) filename: String,
    pub(crate) definition: Definition,
}

/// Paths that are used of a context.
pub(crate) type Paths = Rc<RefCell<BTreeSet<String>>>;

/// A local directory of which only those files are to be sent that are used; known at the end.
#[derive(Debug)]
pub(crate) struct PendingLocal {
    slot: Deferred,
    name: String,
    options: LocalOptions,
    paths: Option<Paths>,
}

impl PendingLocal {
    /// Decides what is sent.
    pub(crate) fn resolve(mut self) {
        if let Some(paths) = &self.paths {
            self.options.follow_paths = follow_paths(&paths.borrow());
        }
        self.slot.resolve(&State::local(&self.name, self.options));
    }
}

/// Turns used paths into those to follow: relative and in order; none if everything is used.
pub(crate) fn follow_paths(paths: &BTreeSet<String>) -> Vec<String> {
    if paths.contains("/") {
        return Vec::new();
    }
    let mut relative: Vec<String> = paths.iter().map(|used| path::join(&[".", used])).collect();
    relative.sort();
    relative
}

/// A named context that was asked for.
#[derive(Clone, Debug)]
pub(crate) struct NamedContext {
    input: String,
    name: String,
    name_with_platform: String,
    platform: Option<Platform>,
    resolve_mode: String,
}

/// What a named context is.
pub(crate) struct Loaded {
    pub(crate) state: State,
    pub(crate) image: Option<ImageConfig>,
}

/// All contexts of one request.
pub(crate) struct Contexts<'a> {
    pub(crate) options: &'a Options,
    inputs: &'a BTreeMap<String, Definition>,
    pub(crate) asker: &'a Asker<'a>,
    main: Main,
    /// The ignore file beside the Dockerfile and its name.
    dockerignore: Option<(Vec<u8>, String)>,
}

impl<'a> Contexts<'a> {
    /// Finds out where the main context is.
    pub(crate) fn detect(
        options: &'a Options,
        inputs: &'a BTreeMap<String, Definition>,
        asker: &'a Asker<'a>,
    ) -> Progress<Self> {
        let mut main = Main {
            context: None,
            dockerfile: None,
            dockerfile_local: options.get("dockerfilekey").unwrap_or("dockerfile").to_owned(),
            filename: options.get("filename").unwrap_or(DOCKERFILE).to_owned(),
            source: None,
            http_archive: false,
        };
        let context = options
            .get(options.get("contextkey").unwrap_or(CONTEXT))
            .unwrap_or_default();
        if let Some(found) = GitRef::parse(context) {
            let state = git_context(context, &found?, options, true);
            main.source = Some(state.clone());
            main.dockerfile = Some(state.clone());
            main.context = Some(state);
        } else if context.starts_with("http://") || context.starts_with("https://") {
            http_context(&mut main, context, asker)?;
        } else {
            if inputs.values().any(|input| input.metadata.is_empty()) {
                return Err(ConvertError::NilInput
                    .context("failed to get frontend inputs")
                    .into());
            }
            if options.get("dockerfilekey").is_none() {
                let input = inputs.get(&main.dockerfile_local);
                main.dockerfile = input.map(State::from_definition).transpose()?;
            }
            main.context = inputs.get(CONTEXT).map(State::from_definition).transpose()?;
        }
        if let (Some(context), Some(subdir)) = (&main.context, options.get("contextsubdir")) {
            main.context = Some(subdir_of(context, subdir));
        }
        Ok(Self {
            options,
            inputs,
            asker,
            main,
            dockerignore: None,
        })
    }

    /// Reads the Dockerfile.
    pub(crate) fn entrypoint(&mut self) -> Progress<Entrypoint> {
        let filename = self.main.filename.clone();
        let lower = (path::base(&filename) == DOCKERFILE)
            .then(|| path::join(&[&path::dir(&filename), &DOCKERFILE.to_lowercase()]));
        let ignore = format!("{filename}{DOCKERIGNORE}");
        let forced = self.options.get("dockerfilekey").is_some();
        let state = match &self.main.dockerfile {
            Some(state) if !forced => state.clone(),
            _ => self.local_dockerfile(&filename, &ignore, lower.as_deref()),
        };
        let definition = marshal(&state)?;
        let mut paths = vec![filename.as_str(), ignore.as_str()];
        paths.extend(lower.as_deref());
        let files = self.asker.files(&definition, &paths, None);
        let files = files.map_err(|stop| stop.context("failed to read dockerfile"))?;
        let data = match (&files[0], files.get(2)) {
            (Ok(data), _) | (Err(_), Some(Ok(data))) => data.clone(),
            (Err(error), _) => {
                let error = ConvertError::Answer(error.clone());
                return Err(error.context("failed to read dockerfile").into());
            }
        };
        if let Ok(content) = &files[1] {
            self.dockerignore = Some((content.clone(), ignore));
        }
        Ok(Entrypoint {
            data,
            filename,
            definition,
        })
    }

    fn local_dockerfile(&self, filename: &str, ignore: &str, lower: Option<&str>) -> State {
        let local = &self.main.dockerfile_local;
        let names = [Some(filename), Some(ignore), lower];
        State::local(
            local,
            LocalOptions {
                session_id: self.options.session_of(local),
                follow_paths: names.into_iter().flatten().map(str::to_owned).collect(),
                shared_key_hint: local.clone(),
                differ: llb::attr::LOCAL_DIFFER_NONE.to_owned(),
                constraints: internal(&format!("load build definition from {filename}")),
                ..LocalOptions::default()
            },
        )
    }

    /// Reads the ignore patterns of the main context; none if it is not the client's directory.
    pub(crate) fn ignore_patterns(&self) -> Progress<Vec<String>> {
        if self.main.context.is_some() {
            return Ok(Vec::new());
        }
        if let Some((content, _)) = &self.dockerignore {
            return Ok(read_ignore_file(content));
        }
        let state = State::local(
            CONTEXT,
            LocalOptions {
                session_id: self.options.session_of(CONTEXT),
                follow_paths: vec![DOCKERIGNORE.to_owned()],
                shared_key_hint: format!("{CONTEXT}-{DOCKERIGNORE}"),
                differ: llb::attr::LOCAL_DIFFER_NONE.to_owned(),
                constraints: internal(&format!("load {DOCKERIGNORE}")),
                ..LocalOptions::default()
            },
        );
        match self.read_ignore(&state) {
            // The client may have no such directory; then nothing can be ignored in it.
            Err(Stop::Failed(_)) => Ok(Vec::new()),
            patterns => patterns,
        }
    }

    fn read_ignore(&self, state: &State) -> Progress<Vec<String>> {
        let files = self.asker.files(&marshal(state)?, &[DOCKERIGNORE], None)?;
        // Without the file there are no patterns, whatever the reason.
        Ok(files[0]
            .as_ref()
            .map(|content| read_ignore_file(content))
            .unwrap_or_default())
    }

    /// Returns the main context; of the client's directory only `used` is sent.
    pub(crate) fn main(&self, used: &BTreeSet<String>) -> Progress<State> {
        if let Some(context) = &self.main.context {
            return Ok(context.clone());
        }
        let patterns = self.ignore_patterns();
        let exclude_patterns =
            patterns.map_err(|stop| stop.context("failed to read dockerignore patterns"))?;
        Ok(State::local(
            CONTEXT,
            LocalOptions {
                session_id: self.options.session_of(CONTEXT),
                exclude_patterns,
                shared_key_hint: CONTEXT.to_owned(),
                follow_paths: follow_paths(used),
                constraints: internal("load build context"),
                ..LocalOptions::default()
            },
        ))
    }

    /// Returns the main context as it is fetched, and whether it is an archive that gets unpacked.
    pub(crate) fn main_source(&self) -> Option<(&State, bool)> {
        self.main
            .source
            .as_ref()
            .map(|state| (state, self.main.http_archive))
    }

    /// Looks for a named context, first one for the platform.
    pub(crate) fn named(
        &self,
        name: &str,
        platform: Option<&Platform>,
        resolve_mode: &str,
    ) -> Progress<Option<NamedContext>> {
        let reference = Reference::parse(name).map_err(|error| {
            Stop::from(ConvertError::Reference(error).context(format!("invalid context name {name}")))
        })?;
        let familiar = reference.familiar();
        let name = familiar.strip_suffix(":latest").unwrap_or(&familiar);
        let shown = platform.cloned().unwrap_or_else(Platform::host).normalized();
        let with_platform = format!("{name}::{}", shown.format_all());
        let found = [with_platform.as_str(), name]
            .into_iter()
            .find_map(|name_with_platform| {
                let input = self
                    .options
                    .get(&format!("context:{name_with_platform}"))?
                    .to_owned();
                Some(NamedContext {
                    input,
                    name: name.to_owned(),
                    name_with_platform: name_with_platform.to_owned(),
                    platform: platform.cloned(),
                    resolve_mode: resolve_mode.to_owned(),
                })
            });
        Ok(found)
    }

    /// Loads a named context. `locals` gets what is to be decided at the end, with the paths used of it.
    pub(crate) fn load(
        &self,
        context: &NamedContext,
        locals: &mut Vec<PendingLocal>,
        paths: Option<Paths>,
    ) -> Progress<Loaded> {
        let mut context = context.clone();
        for _ in 0..=MAX_REDIRECTS {
            let (kind, rest) = context
                .input
                .split_once(':')
                .ok_or_else(|| ConvertError::ContextForm {
                    input: context.input.clone(),
                    name: context.name_with_platform.clone(),
                })?;
            let kind = if kind.starts_with("git@") { "git" } else { kind };
            let loaded = match kind {
                "docker-image" => match self.load_image(&context, rest)? {
                    Ok(loaded) => loaded,
                    Err(input) => {
                        context.input = input;
                        continue;
                    }
                },
                "git" => match GitRef::parse(&context.input) {
                    Some(found) => plain(git_context(&context.input, &found?, self.options, false)),
                    None => return Err(ConvertError::GitContext(context.input).into()),
                },
                "http" | "https" => self.load_http(&context)?,
                "oci-layout" => self.load_layout(&context, rest)?,
                "local" => self.load_local(&context, rest, locals, paths)?,
                "input" => self.load_input(&context, rest)?,
                _ => {
                    let (kind, name) = (kind.to_owned(), context.name_with_platform);
                    return Err(ConvertError::ContextKind { kind, name }.into());
                }
            };
            return Ok(loaded);
        }
        Err(ConvertError::ContextRecursion(context.input).into())
    }

    fn load_image(&self, context: &NamedContext, rest: &str) -> Progress<Result<Loaded, String>> {
        let written = rest.strip_prefix("//").unwrap_or(rest);
        if written == "scratch" {
            return Ok(Ok(plain(State::scratch())));
        }
        let name = &context.name_with_platform;
        let need = ImageConfigNeed {
            reference: Reference::parse(written)?.with_default_tag().to_string(),
            platform: context.platform.clone(),
            resolve_mode: context.resolve_mode.clone(),
            log_name: format!("[context {name}] load metadata for {written}"),
            store: None,
        };
        let answer = match self.asker.image(need)? {
            Ok(answer) => answer,
            Err(updated) => {
                let (kind, rest) = updated
                    .split_once("://")
                    .ok_or_else(|| ConvertError::Redirect(updated.to_owned()))?;
                return Ok(Err(format!("{kind}:{rest}")));
            }
        };
        let mut constraints = Constraints::new().custom_name(format!("[context {name}] {written}"));
        constraints.platform.clone_from(&context.platform);
        let state = State::image(
            &answer.reference,
            ImageOptions {
                constraints,
                ..ImageOptions::default()
            },
        );
        with_config(&state, &answer.config).map(Ok)
    }

    fn load_http(&self, context: &NamedContext) -> Progress<Loaded> {
        if let Some(found) = GitRef::parse(&context.input) {
            return Ok(plain(git_context(&context.input, &found?, self.options, false)));
        }
        let name = format!("[context {}] {}", context.name_with_platform, context.input);
        Ok(plain(State::http(
            &context.input,
            HttpOptions {
                filename: HTTP_FILE.to_owned(),
                constraints: Constraints::new().custom_name(name),
                ..HttpOptions::default()
            },
        )))
    }

    fn load_layout(&self, context: &NamedContext, rest: &str) -> Progress<Loaded> {
        let written = rest.strip_prefix("//").unwrap_or(rest);
        let no_digest = || ConvertError::LayoutDigest(written.to_owned());
        let (tagged, digest) = written.split_once('@').ok_or_else(no_digest)?;
        let digest = digest.parse().map_err(ConvertError::Digest).map_err(|error| {
            error.context(format!(
                "could not parse oci-layout reference {}",
                text::quote(written)
            ))
        })?;
        let name_start = tagged.rfind('/').map_or(0, |at| at + 1);
        let store_id = tagged[name_start..]
            .find(':')
            .map_or(tagged, |at| &tagged[..name_start + at]);
        let reference = Reference::parse(&context.name)?.with_digest(digest).to_string();
        let session_id = self.options.session_id.clone();
        let shown = &context.name_with_platform;
        let need = ImageConfigNeed {
            reference: reference.clone(),
            platform: context.platform.clone(),
            resolve_mode: String::new(),
            log_name: format!("[context {shown}] load metadata for {reference}"),
            store: Some(LayoutStore {
                session_id: session_id.clone(),
                store_id: store_id.to_owned(),
            }),
        };
        let answer = self
            .asker
            .image(need)?
            .map_err(|updated| ConvertError::Redirect(updated.to_owned()))?;
        let mut constraints =
            Constraints::new().custom_name(format!("[context {shown}] OCI load from client"));
        constraints.platform.clone_from(&context.platform);
        let options = OciLayoutOptions {
            session_id,
            store_id: store_id.to_owned(),
            layer_limit: None,
            constraints,
        };
        let mut loaded = with_config(&State::oci_layout(&reference, options), &answer.config)?;
        loaded.image = Some(image::read(&answer.config)?);
        Ok(loaded)
    }

    fn load_local(
        &self,
        context: &NamedContext,
        name: &str,
        locals: &mut Vec<PendingLocal>,
        paths: Option<Paths>,
    ) -> Progress<Loaded> {
        let shown = &context.name_with_platform;
        let session_id = self.options.session_of(name);
        let ignore = State::local(
            name,
            LocalOptions {
                session_id: session_id.clone(),
                follow_paths: vec![DOCKERIGNORE.to_owned()],
                shared_key_hint: format!("context:{shown}-{DOCKERIGNORE}"),
                differ: llb::attr::LOCAL_DIFFER_NONE.to_owned(),
                constraints: Constraints::new().custom_name(format!("[context {shown}] load {DOCKERIGNORE}")),
                ..LocalOptions::default()
            },
        );
        let exclude_patterns = self.read_ignore(&ignore)?;
        let shared_key = self
            .options
            .get(&format!("sharedkey:localdir:{shown}"))
            .unwrap_or_default();
        let (state, slot) = State::deferred();
        let options = LocalOptions {
            session_id,
            exclude_patterns,
            shared_key_hint: format!("context:{shown}-{shared_key}"),
            constraints: Constraints::new().custom_name(format!("[context {shown}] load from client")),
            ..LocalOptions::default()
        };
        locals.push(PendingLocal {
            slot,
            name: name.to_owned(),
            options,
            paths,
        });
        Ok(plain(state))
    }

    fn load_input(&self, context: &NamedContext, input: &str) -> Progress<Loaded> {
        let definition = self.inputs.get(input).ok_or_else(|| ConvertError::Input {
            input: input.to_owned(),
            name: context.name_with_platform.clone(),
        })?;
        let state = State::from_definition(definition)?;
        let Some(metadata) = self.options.get(&format!("input-metadata:{input}")) else {
            return Ok(plain(state));
        };
        let parsed: BTreeMap<String, String> = serde_json::from_str(metadata).map_err(|error| {
            ConvertError::Json(error.to_string())
                .context(format!("failed to parse input metadata {metadata}"))
        })?;
        let Some(config) = parsed.get("containerimage.config") else {
            return Ok(plain(state));
        };
        let config = base64::engine::general_purpose::STANDARD
            .decode(config)
            .map_err(|error| {
                let context = format!("failed to parse image config for {}", context.name_with_platform);
                ConvertError::Json(error.to_string()).context(context)
            })?;
        let mut loaded = with_config(&state, &config)?;
        loaded.image = Some(image::read(&config)?);
        Ok(loaded)
    }
}

fn plain(state: State) -> Loaded {
    Loaded { state, image: None }
}

fn with_config(state: &State, config: &[u8]) -> Progress<Loaded> {
    let mut image = image::read(config)?;
    image.created = None;
    Ok(Loaded {
        state: state.image_config(&image),
        image: Some(image),
    })
}

/// Makes the state of a context in a Git repository.
fn git_context(written: &str, found: &GitRef, options: &Options, is_main: bool) -> State {
    let keep = is_main
        && options
            .get("build-arg:BUILDKIT_CONTEXT_KEEP_GIT_DIR")
            .and_then(text::parse_bool)
            .unwrap_or_default();
    let has_epoch = options
        .get("build-arg:SOURCE_DATE_EPOCH")
        .is_some_and(|epoch| !epoch.is_empty());
    let default_mtime = if is_main && has_epoch { "commit" } else { "" };
    let mtime = if found.mtime.is_empty() {
        default_mtime
    } else {
        &found.mtime
    };
    State::git(
        &found.remote,
        "",
        GitOptions {
            keep_git_dir: keep || found.keep_git_dir == Some(true),
            mtime: mtime.to_owned(),
            fetch_by_commit: found.fetch_by_commit,
            constraints: internal(&format!("load git source {written}")),
            ..found.options()
        },
    )
}

fn http_context(main: &mut Main, url: &str, asker: &Asker<'_>) -> Progress<()> {
    let state = State::http(
        url,
        HttpOptions {
            filename: HTTP_FILE.to_owned(),
            constraints: internal("load remote build context"),
            ..HttpOptions::default()
        },
    );
    let files = asker.files(&marshal(&state)?, &[HTTP_FILE], Some(ARCHIVE_HEADER_BYTES));
    let files = files.map_err(|stop| stop.context("failed to read downloaded context"))?;
    let header = match &files[0] {
        Ok(header) => header,
        Err(error) => {
            let error = ConvertError::Answer(error.clone());
            return Err(error.context("failed to read downloaded context").into());
        }
    };
    main.source = Some(state.clone());
    if is_archive(header) {
        let unpack = CopyOptions {
            attempt_unpack: true,
            ..CopyOptions::default()
        };
        let actions = FileActions::new().copy(&state, format!("/{HTTP_FILE}"), "/", unpack);
        main.context = Some(State::scratch().file(actions, &Constraints::new()));
        main.http_archive = true;
    } else {
        HTTP_FILE.clone_into(&mut main.filename);
        main.context = Some(state);
    }
    main.dockerfile.clone_from(&main.context);
    Ok(())
}

fn subdir_of(context: &State, subdir: &str) -> State {
    let options = CopyOptions {
        copy_dir_contents_only: true,
        ..CopyOptions::default()
    };
    State::scratch().file(
        FileActions::new().copy(context, subdir, "/", options),
        &Constraints::new(),
    )
}

/// Tells whether bytes begin an archive: bzip2, gzip, xz or tar.
fn is_archive(header: &[u8]) -> bool {
    let magics: [&[u8]; 3] = [b"BZh", b"\x1f\x8b\x08", b"\xfd7zXZ\x00"];
    magics.iter().any(|magic| header.starts_with(magic)) || is_tar(header)
}

const TAR_BLOCK_BYTES: usize = 512;

/// Tells whether bytes begin with a whole entry of a tar. Long names go on behind the bytes looked at.
fn is_tar(header: &[u8]) -> bool {
    let Some(block) = header.get(..TAR_BLOCK_BYTES) else {
        return false;
    };
    if matches!(block[156], b'x' | b'L' | b'K') {
        return false;
    }
    let (unsigned, signed) = block
        .iter()
        .enumerate()
        .fold((0i64, 0i64), |(unsigned, signed), (at, byte)| {
            let byte = if (148..156).contains(&at) { b' ' } else { *byte };
            (
                unsigned + i64::from(byte),
                signed + i64::from(i8::from_ne_bytes([byte])),
            )
        });
    let text = std::str::from_utf8(&block[148..156]).unwrap_or_default();
    let stated = i64::from_str_radix(text.trim_matches(['\0', ' ']), 8);
    stated.is_ok_and(|stated| stated == unsigned || stated == signed) && block.iter().any(|byte| *byte != 0)
}

/// Describes the source of a state that is nothing else, for asking about it.
pub(crate) fn source_of(state: &State) -> Option<pb::SourceOp> {
    let (identifier, attrs) = state.as_source()?;
    Some(pb::SourceOp { identifier, attrs })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn follows_used_paths() {
        let paths = |used: &[&str]| follow_paths(&used.iter().map(|path| (*path).to_owned()).collect());
        assert_eq!(paths(&["/b", "/a/c"]), ["a/c", "b"]);
        assert!(paths(&["/", "/a"]).is_empty());
    }

    #[test]
    fn recognizes_archives() {
        let mut header = [0u8; 1024];
        header[..1].copy_from_slice(b"a");
        header[148..156].copy_from_slice(b"        ");
        let sum: u32 = header[..512].iter().map(|byte| u32::from(*byte)).sum();
        header[148..156].copy_from_slice(format!("{sum:06o}\0 ").as_bytes());
        assert!(is_archive(&header));
        header[0] = b'b';
        assert!(!is_archive(&header));
        assert!(is_archive(b"\x1f\x8b\x08...") && !is_archive(b"FROM x") && !is_archive(&[0; 1024]));
    }
}

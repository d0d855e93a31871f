//! Build contexts: the main one, the Dockerfile's, and named ones.

mod archive;
mod named;

use std::cell::RefCell;
use std::collections::{BTreeMap, BTreeSet};
use std::rc::Rc;

use llb::pb::{self, Definition};
use llb::{
    Constraints, CopyOptions, Deferred, FileActions, GitOptions, HttpOptions, LocalOptions, MarshalOptions,
    State,
};
use oci::path;
use oci::pattern::read_ignore_file;

pub(crate) use named::NamedContext;

use crate::ask::Asker;
use crate::error::{ConvertError, Progress, Stop};
use crate::git_ref::GitRef;
use crate::options::Options;
use crate::text;
use archive::is_archive;

const CONTEXT: &str = "context";
const DOCKERFILE: &str = "Dockerfile";
const DOCKERIGNORE: &str = ".dockerignore";
/// Name of the file that a context from a web server is downloaded to.
const HTTP_FILE: &str = "context";
/// How much of a download is looked at to tell whether it is an archive.
const ARCHIVE_HEADER_BYTES: u64 = 1024;

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
    /// Makes contexts of which only named ones are looked at.
    pub(crate) fn only_named(
        options: &'a Options,
        inputs: &'a BTreeMap<String, Definition>,
        asker: &'a Asker<'a>,
    ) -> Self {
        let main = Main {
            context: None,
            dockerfile: None,
            dockerfile_local: String::new(),
            filename: String::new(),
            source: None,
        };
        Self {
            options,
            inputs,
            asker,
            main,
            dockerignore: None,
        }
    }

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
            main.source.clone_from(&main.context);
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

    /// Returns the main context before it was unpacked or narrowed to a directory; none if it is the client's directory.
    pub(crate) fn main_source(&self) -> Option<&State> {
        self.main.source.as_ref()
    }
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

/// Describes the source of a state, for asking about it: the only one that it is made from.
pub(crate) fn source_of(state: &State) -> Option<pb::SourceOp> {
    if let Some((identifier, attrs)) = state.as_source() {
        return Some(pb::SourceOp { identifier, attrs });
    }
    let definition = marshal(state).ok()?;
    let graph = llb::Graph::load(&definition).ok()?;
    let mut sources = graph.vertices().iter().filter_map(|vertex| match &vertex.op.op {
        Some(pb::op::Op::Source(source)) => Some(source.clone()),
        _ => None,
    });
    let source = sources.next()?;
    // Nothing is to be learned from a client's directory.
    (sources.next().is_none() && !source.identifier.starts_with("local://")).then_some(source)
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
}

//! COPY and ADD.

use llb::{
    Chown, Constraints, CopyOptions, FileActions, GitOptions, HttpOptions, MkfileOptions, State, caps, merge,
};
use oci::{Digest, path};

use super::dispatch::Step;
use super::name::shown;
use super::stages::StageId;
use super::{Converter, STEP_BYTES, wire_ranges};
use crate::chmod::{Chmod, parse_chmod};
use crate::context::internal;
use crate::error::{ConvertError, Progress};
use crate::git_ref::{GitRef, is_git, is_http, url_file_name};
use crate::instruction::{Copy, InlineSource};
use crate::lint::rules;
use crate::os_path;
use crate::raw;

/// How many inputs that are made for it an instruction may have.
pub(super) const MAX_MADE: usize = 5_000;

/// A COPY or ADD with its words expanded.
struct Work<'c> {
    step: &'c Step<'c>,
    copy: Copy,
    is_add: bool,
    /// What local sources are copied from.
    from: State,
    /// The ignore file of the build context applies.
    ignores: bool,
    dest: String,
    os: String,
    /// Permissions and owner.
    options: CopyOptions,
    /// Name of the step.
    name: String,
    actions: FileActions,
    message: String,
}

impl Converter<'_> {
    pub(super) fn copy(&mut self, step: &Step<'_>, copy: &Copy, is_add: bool) -> Progress<()> {
        let copy = self.expand_copy(step, copy)?;
        let source = step.sources.first().copied();
        let from = match source {
            None => self.build_context.clone(),
            Some(source) => {
                let stage = &self.stages[source.0];
                if !stage.dispatched {
                    let (from, stage) = (copy.from.clone(), self.stages[step.id.0].stage_name.clone());
                    return Err(ConvertError::CopyOrder { from, stage }.into());
                }
                stage.state.clone()
            }
        };
        self.check_copy(&copy)?;
        let mut work = self.begin_copy(step, copy, is_add, from)?;
        for written in std::mem::take(&mut work.copy.sources) {
            work.message.push_str(&format!(" {written}"));
            self.copy_source_path(&mut work, &written)?;
            match source {
                None if is_add && (written.starts_with("http://") || written.starts_with("https://")) => {}
                None => self.use_context(step.id, &written),
                Some(source) => {
                    let used = path::join(&["/", &written]);
                    self.stages[source.0].paths.borrow_mut().insert(used);
                }
            }
        }
        for document in std::mem::take(&mut work.copy.contents) {
            self.copy_document(&mut work, document)?;
        }
        self.end_copy(work);
        Ok(())
    }

    /// Counts what each source adds: patterns are repeated, what is no file of the context is a vertex of its own.
    fn check_copy(&mut self, copy: &Copy) -> Progress<()> {
        let remote = copy
            .sources
            .iter()
            .filter(|source| is_http(source) || is_git(source));
        let made = copy.contents.len() + remote.count();
        let patterns: usize = copy.excludes.iter().map(|pattern| pattern.len() + 8).sum();
        let count = copy.sources.len() + copy.contents.len();
        self.spend(
            STEP_BYTES
                .saturating_mul(made)
                .saturating_add(patterns.saturating_mul(count)),
        )?;
        if made > MAX_MADE {
            return Err(ConvertError::TooLarge.into());
        }
        Ok(())
    }

    fn expand_copy(&self, step: &Step<'_>, copy: &Copy) -> Progress<Copy> {
        let mut documents = self.lexer.with_escape('\\');
        documents.skip_quotes = true;
        let mut copy = copy.clone();
        copy.chown = self.expand(step, &copy.chown)?;
        copy.chmod = self.expand(step, &copy.chmod)?;
        copy.checksum = self.expand(step, &copy.checksum)?;
        for source in &mut copy.sources {
            *source = self.expand(step, source)?;
        }
        copy.dest = self.expand(step, &copy.dest)?;
        for document in copy.contents.iter_mut().filter(|document| document.expand) {
            document.content = self.expand_with(&documents, step, &document.content)?;
        }
        Ok(copy)
    }

    fn begin_copy<'c>(
        &mut self,
        step: &'c Step<'c>,
        copy: Copy,
        is_add: bool,
        from: State,
    ) -> Progress<Work<'c>> {
        let id = step.id;
        let stage = &self.stages[id.0];
        let platform = stage.platform.clone().unwrap_or_default();
        let dest = destination(stage.state.get_dir(), &copy.dest, &platform.os)?;
        let mut options = CopyOptions {
            create_dest_path: true,
            exclude_patterns: copy.excludes.clone(),
            chown: (!copy.chown.is_empty()).then(|| Chown::parse(&copy.chown)),
            ..CopyOptions::default()
        };
        match copy.chmod.as_str() {
            "" => {}
            chmod => match parse_chmod(chmod)? {
                Chmod::Bits(bits) => options.mode = Some(bits),
                Chmod::Symbolic(text) => options.mode_str = text,
            },
        }
        check_checksum(&copy, is_add)?;
        let mut message = if is_add {
            "ADD".to_owned()
        } else {
            "COPY".to_owned()
        };
        if copy.parents {
            message.push_str(" --parents");
        }
        for (flag, value) in [("chown", &copy.chown), ("chmod", &copy.chmod)] {
            if !value.is_empty() {
                message.push_str(&format!(" --{flag}={value}"));
            }
        }
        let text = shown(&self.lexer, &step.instruction.code, &stage.env);
        let name = self.instruction_name(id, &text, Some(&platform));
        let ignores = step.sources.is_empty();
        let os = platform.os;
        let actions = FileActions::new();
        Ok(Work {
            step,
            copy,
            is_add,
            from,
            ignores,
            dest,
            os,
            options,
            name,
            actions,
            message,
        })
    }

    fn copy_source_path(&self, work: &mut Work<'_>, source: &str) -> Progress<()> {
        let git = GitRef::parse(source).transpose()?;
        if let Some(git) = git.filter(|git| !git.like_local) {
            return copy_git(work, &git);
        }
        if is_http(source) {
            return copy_http(work, source);
        }
        self.copy_local(work, source)
    }

    fn copy_local(&self, work: &mut Work<'_>, source: &str) -> Progress<()> {
        self.warn_ignored(work, source);
        let drive = |error| ConvertError::OsPath(error).context("removing drive letter");
        let normalize = |path: &str| os_path::normalize("/", path, &work.os, false).map_err(drive);
        let mut options = CopyOptions {
            follow_symlinks: true,
            copy_dir_contents_only: true,
            attempt_unpack: work.copy.unpack.unwrap_or(work.is_add),
            allow_wildcard: true,
            allow_empty_wildcard: true,
            ..work.options.clone()
        };
        let mut source = source;
        if work.copy.parents {
            let (parent, pattern) = source.split_once("/./").unwrap_or(("/", source));
            let pattern = normalize(pattern)?;
            if !has_wildcards(parent) && !has_wildcards(&pattern) {
                options
                    .required_paths
                    .push(normalize(&path::join(&[parent, &pattern]))?);
            }
            options
                .include_patterns
                .push(pattern.strip_prefix('/').unwrap_or(&pattern).to_owned());
            source = parent;
        }
        let source = normalize(source)?;
        let actions = std::mem::take(&mut work.actions);
        work.actions = actions.copy(&work.from, source, &work.dest, options);
        Ok(())
    }

    /// Warns of a source that the ignore file leaves out. Where files are let in again nothing can be said.
    fn warn_ignored(&self, work: &Work<'_>, source: &str) {
        let Some(matcher) = self
            .ignore
            .as_ref()
            .filter(|matcher| work.ignores && !matcher.has_exclusions())
        else {
            return;
        };
        let source = path::clean(source);
        let covers_all = || {
            matcher
                .patterns()
                .iter()
                .any(|pattern| matches!(pattern.as_str(), "*" | "**" | "**/*"))
        };
        if matches!(source.as_str(), "." | "/") && !covers_all() {
            return;
        }
        if matcher.matches_or_parent(&source).unwrap_or_default() {
            let instruction = if work.is_add { "Add" } else { "Copy" };
            let message = || rules::copy_ignored_file(instruction, &source);
            work.step.linter.run(
                &rules::COPY_IGNORED_FILE,
                &work.step.instruction.location,
                message,
            );
        }
    }

    fn copy_document(&self, work: &mut Work<'_>, document: InlineSource) -> Progress<()> {
        work.message.push_str(&format!(" <<{}", document.path));
        let file = os_path::remove_drive(&document.path, &work.os, false)
            .map_err(|error| ConvertError::OsPath(error).context("removing drive letter"))?;
        let platform = self.stages[work.step.id.0].platform.clone().unwrap_or_default();
        let content = raw::encode(&document.content).into_owned();
        let written = State::scratch().file(
            FileActions::new().mkfile(&file, 0o644, content, MkfileOptions::default()),
            &internal("preparing inline document").platform(&platform),
        );
        let actions = std::mem::take(&mut work.actions);
        let file = os_path::to_slash(&file, &work.os);
        work.actions = actions.copy(&written, file, &work.dest, work.options.clone());
        Ok(())
    }

    fn end_copy(&mut self, work: Work<'_>) {
        let id = work.step.id;
        let message = format!("{} {} # buildkit", work.message, work.copy.dest);
        let mut constraints = Constraints::new()
            .custom_name(work.name.clone())
            .location(self.source_map, wire_ranges(&work.step.instruction.location));
        if self.stages[id.0].ignore_cache {
            constraints = constraints.ignore_cache();
        }
        let links = work.copy.link && work.copy.chmod.is_empty();
        if links && self.contexts.options.supports(caps::MERGE_OP) {
            self.link(id, work, &constraints);
        } else {
            let stage = &mut self.stages[id.0];
            stage.state = stage.state.file(work.actions, &constraints);
        }
        self.commit(id, message, true);
    }

    /// Copies onto nothing and lays the result on top, so that it does not depend on what is below.
    fn link(&mut self, id: StageId, work: Work<'_>, constraints: &Constraints) {
        let platform = self.stages[id.0].platform.clone().unwrap_or_default();
        let group = self.group_id(id);
        // Naming the step again must not count it again.
        let count = self.stages[id.0].command_index;
        let text = shown(&self.lexer, &work.step.instruction.code, &self.stages[id.0].env);
        self.stages[id.0].command_index = count.saturating_sub(1);
        let link_name = self.instruction_name(id, &format!("LINK {text}"), Some(&platform));
        let copied = Constraints::new()
            .platform(&platform)
            .and(constraints)
            .progress_group(&group, &work.name, true);
        let merged = constraints
            .clone()
            .progress_group(&group, &work.name, false)
            .custom_name(link_name);
        let layer = State::scratch().file(work.actions, &copied);
        let stage = &mut self.stages[id.0];
        let below = stage.state.clone();
        stage.state = below.with_filesystem_of(&merge([&below, &layer], &merged));
    }

    /// Names a progress group: the same for the same request, another for each step.
    fn group_id(&self, id: StageId) -> String {
        let stage = &self.stages[id.0];
        let seed = format!(
            "{}\n{}\n{:?}\n{}\n{}",
            self.contexts.options.session_id,
            self.platforms.target,
            id,
            stage.command_index,
            stage.stage.code
        );
        let mut hex = Digest::sha256(seed).hex();
        hex.truncate(25);
        hex
    }
}

/// Makes the destination absolute; `.` and nothing are the working directory.
fn destination(dir: &str, dest: &str, os: &str) -> Progress<String> {
    let dest = os_path::remove_drive(dest, os, true)
        .map_err(|error| ConvertError::OsPath(error).context("removing drive letter"))?;
    if os_path::is_absolute(&dest, os) {
        return Ok(os_path::normalize("/", &dest, os, true)?);
    }
    let dest = if matches!(dest.as_str(), "" | ".") {
        "./"
    } else {
        &dest
    };
    Ok(os_path::normalize(dir, dest, os, true)?)
}

fn check_checksum(copy: &Copy, is_add: bool) -> Progress<()> {
    if copy.checksum.is_empty() {
        return Ok(());
    }
    match copy.sources.as_slice() {
        _ if !is_add => Err(ConvertError::CopyChecksum.into()),
        [source] if is_http(source) || is_git(source) => Ok(()),
        [_] => Err(ConvertError::ChecksumSource.into()),
        _ => Err(ConvertError::ManyChecksum.into()),
    }
}

fn copy_git(work: &mut Work<'_>, git: &GitRef) -> Progress<()> {
    if !work.is_add {
        return Err(ConvertError::CopyGit.into());
    }
    let copy = &mut work.copy;
    if let (Some(one), Some(two)) = (copy.keep_git_dir, git.keep_git_dir)
        && one != two
    {
        return Err(ConvertError::KeepGitDir.into());
    }
    // Both stick for the sources behind.
    copy.keep_git_dir = git.keep_git_dir.or(copy.keep_git_dir);
    if !git.checksum.is_empty() {
        if !copy.checksum.is_empty() && copy.checksum != git.checksum {
            return Err(ConvertError::Checksum(copy.checksum.clone(), git.checksum.clone()).into());
        }
        copy.checksum.clone_from(&git.checksum);
    }
    let state = State::git(
        &git.remote,
        "",
        GitOptions {
            keep_git_dir: copy.keep_git_dir == Some(true),
            checksum: copy.checksum.clone(),
            fetch_by_commit: git.fetch_by_commit,
            constraints: Constraints::new().custom_name(work.name.clone()),
            ..git.options()
        },
    );
    let actions = std::mem::take(&mut work.actions);
    work.actions = actions.copy(&state, "/", &work.dest, work.options.clone());
    Ok(())
}

fn copy_http(work: &mut Work<'_>, url: &str) -> Progress<()> {
    if !work.is_add {
        return Err(ConvertError::CopyUrl.into());
    }
    let filename = url_file_name(url);
    let checksum = match work.copy.checksum.as_str() {
        "" => None,
        checksum => Some(checksum.parse::<Digest>()?),
    };
    let state = State::http(
        url,
        HttpOptions {
            filename: filename.clone(),
            checksum,
            constraints: Constraints::new()
                .custom_name(work.name.clone())
                .description([("com.docker.dockerfile.v1.command", "")]),
            ..HttpOptions::default()
        },
    );
    let options = CopyOptions {
        attempt_unpack: work.copy.unpack.unwrap_or_default(),
        ..work.options.clone()
    };
    let actions = std::mem::take(&mut work.actions);
    work.actions = actions.copy(&state, filename, &work.dest, options);
    Ok(())
}

fn has_wildcards(name: &str) -> bool {
    let mut bytes = name.bytes();
    while let Some(byte) = bytes.next() {
        match byte {
            b'*' | b'?' | b'[' => return true,
            b'\\' => {
                bytes.next();
            }
            _ => {}
        }
    }
    false
}

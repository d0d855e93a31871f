//! Copying one source to one destination, with patterns.

use std::collections::BTreeMap;
use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use oci::pattern::{Matcher, ParentState};
use rustix::fs::OFlags;

use super::file::{self, Look, Place};
use super::mode::Mode;
use super::pool::{Job, Pool};
use super::{CopyError, CopyOptions, ModeChange};
use crate::tree::{FileType, Root, Stat, TreeContext, TreeError, at};

/// Copies with fewer files than this are not worth a thread.
const FEW_FILES: usize = 64;
/// Directories whose times wait for their files. Each holds a source directory open.
const MAX_UNFINISHED: usize = 256;

pub(super) struct Copier<'a> {
    pub(super) from: &'a Root,
    pub(super) to: &'a Root,
    pub(super) options: &'a CopyOptions,
    mode: Option<Mode>,
    include: Option<Matcher>,
    exclude: Option<Matcher>,
    /// Where files with several names were copied to first.
    links: BTreeMap<(u64, u64), PathBuf>,
    /// Directories on the way to the current entry, made when something in them is copied.
    parents: Vec<Parent>,
    /// The destination's directory, open from one entry to the next.
    open: Option<(PathBuf, Arc<OwnedFd>)>,
    /// Files that were copied so far, and the threads that copy when there are many.
    files: usize,
    pool: Option<Pool>,
    /// Directories that are complete once all is copied that was given to the threads, the deepest first.
    unfinished: Vec<Unfinished>,
}

/// A directory that was copied, but for what the files in it change.
struct Unfinished {
    /// The directory of the source, and its name there.
    dir: Arc<OwnedFd>,
    name: PathBuf,
    stat: Stat,
    source: PathBuf,
    target: PathBuf,
    /// It was there before: it stays as it is, but for its times.
    only_times: bool,
}

struct Parent {
    source: PathBuf,
    target: PathBuf,
    stat: Stat,
    is_made: bool,
    /// Made by this copy: whatever is in it, this copy put there.
    is_fresh: bool,
    /// Made on account of something in it, so its times are to be set when that is done.
    is_implied: bool,
}

/// What the patterns say of an entry's directory.
#[derive(Default)]
struct Matched {
    include: Option<ParentState>,
    exclude: Option<ParentState>,
}

fn matcher(what: &'static str, patterns: &[String]) -> Result<Option<Matcher>, CopyError> {
    if patterns.is_empty() {
        return Ok(None);
    }
    let invalid = |_| CopyError::Invalid {
        what,
        text: patterns.join(","),
    };
    Matcher::new(patterns).map(Some).map_err(invalid)
}

impl<'a> Copier<'a> {
    pub(super) fn new(from: &'a Root, to: &'a Root, options: &'a CopyOptions) -> Result<Self, CopyError> {
        let mode = match &options.mode {
            Some(ModeChange::Symbolic(text)) => {
                Some(Mode::parse(text).ok_or_else(|| CopyError::Invalid {
                    what: "mode",
                    text: text.clone(),
                })?)
            }
            _ => None,
        };
        Ok(Self {
            from,
            to,
            options,
            mode,
            include: matcher("include pattern", &options.include)?,
            exclude: matcher("exclude pattern", &options.exclude)?,
            links: BTreeMap::new(),
            parents: Vec::new(),
            open: None,
            files: 0,
            pool: None,
            unfinished: Vec::new(),
        })
    }

    /// Copies the resolved path `source` to the resolved path `target`, whose directory exists.
    pub(super) fn copy(&mut self, source: &Path, target: &Path) -> Result<(), CopyError> {
        let (dir, name) = (source.parent().unwrap_or(Path::new("")), source.file_name());
        let name = name.map_or(Path::new("."), Path::new);
        let dir = at::open_beneath(self.from, dir, OFlags::PATH | OFlags::DIRECTORY).on("open", source)?;
        self.entry(
            &Arc::new(dir),
            name,
            source,
            Path::new(""),
            target,
            &Matched::default(),
        )?;
        self.finish()
    }

    /// Returns whether patterns take an entry, and whether they leave it out explicitly.
    fn matches(&self, path: &Path, parent: &Matched) -> Result<(bool, bool, Matched), CopyError> {
        let bytes = path.as_os_str().as_bytes();
        let ask = |matcher: &Option<Matcher>, state: &Option<ParentState>, what: &'static str| match matcher {
            None => Ok(None),
            Some(matcher) => matcher
                .matches_with_parent(bytes, state.as_ref())
                .map(Some)
                .map_err(|_| CopyError::Invalid {
                    what,
                    text: path.display().to_string(),
                }),
        };
        let include = ask(&self.include, &parent.include, "include pattern")?;
        let exclude = ask(&self.exclude, &parent.exclude, "exclude pattern")?;
        let is_excluded = exclude.as_ref().is_some_and(|(matched, _)| *matched);
        let is_included = include.as_ref().is_none_or(|(matched, _)| *matched) && !is_excluded;
        let state = Matched {
            include: include.map(|(_, state)| state),
            exclude: exclude.map(|(_, state)| state),
        };
        Ok((is_included, is_excluded, state))
    }

    /// Reports whether an excluded directory can hold something a later pattern takes back.
    fn has_exceptions(&self) -> bool {
        self.exclude.as_ref().is_some_and(Matcher::has_exclusions)
    }

    /// Copies `name` in `dir`. `components` is the path below the source, empty for the source itself.
    fn entry(
        &mut self,
        dir: &Arc<OwnedFd>,
        name: &Path,
        source: &Path,
        components: &Path,
        target: &Path,
        parent: &Matched,
    ) -> Result<(), CopyError> {
        if self.options.stop.is_stopped() {
            return Err(CopyError::Stopped);
        }
        let is_top = components.as_os_str().is_empty();
        let (include, excluded, state) = if is_top {
            (true, false, Matched::default())
        } else {
            self.matches(components, parent)?
        };
        if !include && self.include.is_none() && !self.has_exceptions() {
            return Ok(());
        }
        let stat = at::stat_at(dir, name).on("lstat", source)?;
        if !include && !stat.is_dir() {
            return Ok(());
        }
        if include {
            self.make_way(&stat, target)?;
            self.make_parents(!is_top)?;
        }
        if !stat.is_dir() {
            return self.file(dir, name, &stat, source, target);
        }
        let existing = self.find(target)?;
        if include {
            self.directory(existing, &stat, target, !is_top)?;
        }
        self.parents.push(Parent {
            source: source.to_owned(),
            target: target.to_owned(),
            stat,
            is_made: include,
            is_fresh: include && existing.is_none(),
            is_implied: false,
        });
        let copied = if excluded && !self.has_exceptions() {
            Ok(())
        } else {
            self.contents(dir, name, source, components, target, &state)
        };
        let implied = self.parents.pop().is_some_and(|parent| parent.is_implied);
        copied?;
        if !implied && !include {
            return Ok(());
        }
        self.unfinished.push(Unfinished {
            dir: Arc::clone(dir),
            name: name.to_owned(),
            stat,
            source: source.to_owned(),
            target: target.to_owned(),
            only_times: !implied && is_top && existing.is_some(),
        });
        if self.unfinished.len() < MAX_UNFINISHED {
            return Ok(());
        }
        self.finish()
    }

    /// Waits for the files, which change the times of their directories when they are made, and then completes those.
    fn finish(&mut self) -> Result<(), CopyError> {
        self.pool.as_mut().map_or(Ok(()), Pool::settle)?;
        for directory in std::mem::take(&mut self.unfinished) {
            let Unfinished { stat, target, .. } = &directory;
            if directory.only_times {
                self.restore_times(stat, target)?;
                continue;
            }
            let place = Place {
                dir: directory.dir.as_fd(),
                name: &directory.name,
            };
            self.finish_directory(place, stat, &directory.source, target)?;
        }
        Ok(())
    }

    fn contents(
        &mut self,
        dir: &Arc<OwnedFd>,
        name: &Path,
        source: &Path,
        components: &Path,
        target: &Path,
        state: &Matched,
    ) -> Result<(), CopyError> {
        at::check_depth(components).on("open", source)?;
        let below = Arc::new(at::open_dir_beneath(dir, name).on("open", source)?);
        for name in at::list(&below).on("readdirent", source)? {
            let (source, components) = (source.join(&name), components.join(&name));
            self.entry(
                &below,
                Path::new(&name),
                &source,
                &components,
                &target.join(&name),
                state,
            )?;
        }
        Ok(())
    }

    /// Opens the destination's directory.
    fn enter(&mut self, target: &Path) -> Result<(), CopyError> {
        let dir = target.parent().unwrap_or(Path::new(""));
        if !matches!(&self.open, Some((path, _)) if path == dir) {
            let fd = at::open_beneath(self.to, dir, OFlags::PATH | OFlags::DIRECTORY).on("open", dir)?;
            self.open = Some((dir.to_owned(), Arc::new(fd)));
        }
        Ok(())
    }

    /// Calls `act` with the place of a destination.
    fn at<T>(
        &mut self,
        action: &'static str,
        target: &Path,
        act: impl FnOnce(Place<'_>) -> io::Result<T>,
    ) -> Result<T, CopyError> {
        self.enter(target)?;
        let name = target.file_name().map_or(Path::new("."), Path::new);
        let done = match &self.open {
            Some((_, fd)) => act(Place {
                dir: fd.as_fd(),
                name,
            }),
            None => Err(io::ErrorKind::NotFound.into()),
        };
        Ok(done.on(action, target)?)
    }

    /// Finds out what is at a destination, whose directory may not be there yet.
    fn find(&mut self, target: &Path) -> Result<Option<Stat>, CopyError> {
        let is_fresh = |parent: &Parent| parent.is_fresh && target.parent() == Some(&parent.target);
        if self.parents.last().is_some_and(is_fresh) {
            return Ok(None);
        }
        match self.at("lstat", target, |place| at::try_stat_at(place.dir, place.name)) {
            Err(CopyError::Tree(TreeError { source, .. })) if source.kind() == io::ErrorKind::NotFound => {
                Ok(None)
            }
            done => done,
        }
    }

    /// Removes what is in the way, if that is wanted.
    fn make_way(&mut self, stat: &Stat, target: &Path) -> Result<(), CopyError> {
        if !self.options.always_replace {
            return Ok(());
        }
        match self.find(target)? {
            Some(existing) if !(existing.is_dir() && stat.is_dir()) => {
                self.at("rm", target, |place| at::remove_all(place.dir, place.name))?;
                self.open = None;
                Ok(())
            }
            _ => Ok(()),
        }
    }

    /// Makes the directories on the way that patterns did not take by themselves.
    fn make_parents(&mut self, overwrite: bool) -> Result<(), CopyError> {
        for index in 0..self.parents.len() {
            let parent = &self.parents[index];
            if parent.is_made {
                continue;
            }
            let (stat, source, target) = (parent.stat, parent.source.clone(), parent.target.clone());
            let existing = self.find(&target)?;
            let existed = existing.is_some();
            self.directory(existing, &stat, &target, overwrite)?;
            if !existed {
                let above = source.parent().unwrap_or(Path::new(""));
                let dir = at::open_beneath(self.from, above, OFlags::PATH | OFlags::DIRECTORY)
                    .on("open", &source)?;
                let name = source.file_name().map_or(Path::new("."), Path::new);
                self.finish_directory(
                    Place {
                        dir: dir.as_fd(),
                        name,
                    },
                    &stat,
                    &source,
                    &target,
                )?;
            }
            self.parents[index].is_made = true;
            self.parents[index].is_fresh = !existed;
            self.parents[index].is_implied = !existed;
        }
        Ok(())
    }

    /// Makes a directory, or takes one that is there.
    fn directory(
        &mut self,
        existing: Option<Stat>,
        stat: &Stat,
        target: &Path,
        overwrite: bool,
    ) -> Result<(), CopyError> {
        match existing {
            None => self.at("mkdir", target, |place| {
                at::make_dir(place.dir, place.name, stat.permissions() & 0o777)
            }),
            Some(existing) if !existing.is_dir() => Err(CopyError::DirectoryOverFile {
                path: target.to_owned(),
            }),
            Some(_) if overwrite => self.at("chmod", target, |place| {
                at::set_mode(place.dir, place.name, stat.permissions())
            }),
            Some(_) => Ok(()),
        }
    }

    fn look(&self, stat: &Stat) -> Look {
        let mut look = Look::of(stat);
        if self.options.owner.is_some() {
            look.owner = self.options.owner;
        }
        match (&self.mode, &self.options.mode) {
            (Some(mode), _) => look.mode = mode.apply(stat.permissions(), stat.is_dir()),
            (None, Some(ModeChange::Bits(bits))) => look.mode = bits & 0o7777,
            _ => {}
        }
        if let Some(time) = self.options.time {
            (look.atime, look.mtime) = (time, time);
        }
        look
    }

    fn finish_directory(
        &mut self,
        source: Place<'_>,
        stat: &Stat,
        path: &Path,
        target: &Path,
    ) -> Result<(), CopyError> {
        let look = self.look(stat);
        self.at("chmod", target, |place| {
            file::copy_xattrs(source, place);
            file::describe(place, look, false)
        })
        .map_err(|error| on_source(error, path))
    }

    fn restore_times(&mut self, stat: &Stat, target: &Path) -> Result<(), CopyError> {
        let look = self.look(stat);
        self.at("chtimes", target, |place| {
            at::set_times(place.dir, place.name, Some(look.atime), Some(look.mtime))
        })
    }

    fn file(
        &mut self,
        dir: &Arc<OwnedFd>,
        name: &Path,
        stat: &Stat,
        path: &Path,
        target: &Path,
    ) -> Result<(), CopyError> {
        match self.find(target)? {
            Some(existing) if existing.is_dir() => {
                return Err(CopyError::FileOverDirectory {
                    path: target.to_owned(),
                });
            }
            Some(_) => self.at("remove", target, |place| at::remove_all(place.dir, place.name))?,
            None => {}
        }
        let look = self.look(stat);
        let is_linked = stat.is_linked() && stat.file_type() == FileType::Regular;
        if is_linked && let Some(first) = self.links.get(&stat.identity()).cloned() {
            return self.link(&first, target, look);
        }
        self.enter(target)?;
        let Some((_, to)) = &self.open else {
            return Err(CopyError::Tree(TreeError {
                action: "open",
                path: target.to_owned(),
                source: io::ErrorKind::NotFound.into(),
            }));
        };
        let job = Job {
            from: Arc::clone(dir),
            name: name.to_owned(),
            stat: *stat,
            to: Arc::clone(to),
            target: target.file_name().map_or_else(|| ".".into(), PathBuf::from),
            look,
            path: path.to_owned(),
        };
        if is_linked {
            // Its other names are made of it.
            self.links.insert(stat.identity(), target.to_owned());
            return job.run();
        }
        self.hand_over(job)
    }

    /// Copies a file, or has it copied.
    fn hand_over(&mut self, job: Job) -> Result<(), CopyError> {
        self.files += 1;
        if self.files == FEW_FILES {
            self.pool = Pool::start();
        }
        match &mut self.pool {
            Some(pool) => pool.give(job),
            None => job.run(),
        }
    }

    /// Makes another name of a file that was copied to `first`.
    fn link(&mut self, first: &Path, target: &Path, look: Look) -> Result<(), CopyError> {
        let above = first.parent().unwrap_or(Path::new(""));
        let dir = at::open_beneath(self.to, above, OFlags::PATH | OFlags::DIRECTORY).on("open", first)?;
        let name = first.file_name().map_or(Path::new("."), Path::new);
        self.at("link", target, |place| {
            let from = Place {
                dir: dir.as_fd(),
                name,
            };
            file::link(from, place)?;
            file::describe(place, look, false)
        })
    }
}

/// Names the source in failures that are as likely about it as about the destination.
fn on_source(error: CopyError, path: &Path) -> CopyError {
    match error {
        CopyError::Tree(TreeError { action, source, .. }) => CopyError::Tree(TreeError {
            action,
            path: path.to_owned(),
            source,
        }),
        error => error,
    }
}

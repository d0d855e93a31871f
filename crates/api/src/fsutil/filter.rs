//! Walking a tree in order, with include and exclude patterns.

use std::ops::ControlFlow;

use oci::pattern::{Matcher, ParentState, Pattern};
use rustix::fs::FileType;

use super::follow::follow_links;
use super::tree::{Listing, Seen};
use super::{Stat, Tree, TreeError};

/// Which entries of a tree are wanted.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct FilterOptions {
    /// Patterns an entry, or a directory above it, must match; empty for all entries.
    pub include_patterns: Vec<String>,
    /// Patterns of entries to leave out, with `!` for exceptions.
    pub exclude_patterns: Vec<String>,
    /// Paths to include together with all that the symlinks on them lead to.
    pub follow_paths: Vec<String>,
}

/// Calls `visit` with the stat of every wanted entry, parents first, siblings by name. Directories that hold something
/// wanted are visited even when they are not wanted themselves. Entries that vanish meanwhile are left out.
pub fn walk(
    tree: &Tree,
    options: &FilterOptions,
    visit: &mut dyn FnMut(Stat) -> ControlFlow<()>,
) -> Result<(), TreeError> {
    let filter = Filter::new(tree, options)?;
    Walk {
        tree,
        filter,
        visit,
        seen: Seen::default(),
        stack: Vec::new(),
    }
    .run()
}

struct Filter {
    include: Option<Side>,
    exclude: Option<Side>,
}

/// A list of patterns, and what can be said about all directories that none of them leads into.
struct Side {
    matcher: Matcher,
    /// Texts of the patterns that can match below an unmatched directory, if those are plain prefixes.
    prefixes: Option<Vec<String>>,
}

impl Side {
    fn new(which: &'static str, patterns: Vec<String>, exclusion: bool) -> Result<Option<Self>, TreeError> {
        if patterns.is_empty() {
            return Ok(None);
        }
        let matcher = match Matcher::new(&patterns) {
            Ok(matcher) => matcher,
            Err(source) => {
                return Err(TreeError::Pattern {
                    which,
                    patterns,
                    source,
                });
            }
        };
        let leading = matcher
            .patterns()
            .iter()
            .filter(|pattern| pattern.is_exclusion() == exclusion);
        let texts: Vec<String> = leading.map(without_trailing_glob).collect();
        let plain = texts
            .iter()
            .all(|text| !text.contains(['*', '[', ']', '?', '^', '\\']));
        Ok(Some(Self {
            matcher,
            prefixes: plain.then_some(texts),
        }))
    }

    /// Tells whether nothing below a directory can be matched by the patterns in question.
    fn is_closed(&self, dir: &[u8]) -> bool {
        let dir = [dir, b"/"].concat();
        let leads_into = |text: &String| format!("{text}/").as_bytes().starts_with(&dir);
        self.prefixes
            .as_ref()
            .is_some_and(|prefixes| !prefixes.iter().any(leads_into))
    }
}

fn without_trailing_glob(pattern: &Pattern) -> String {
    let text = pattern.as_str();
    let text = text.strip_suffix("/**").unwrap_or(text);
    text.strip_suffix("/*").unwrap_or(text).to_owned()
}

enum Decision {
    Emit,
    /// Not wanted itself, but perhaps something below it is.
    Pass,
    /// Not wanted, nor anything below it.
    Prune,
}

impl Filter {
    fn new(tree: &Tree, options: &FilterOptions) -> Result<Self, TreeError> {
        let mut include = options.include_patterns.clone();
        if !options.follow_paths.is_empty()
            && let Some(targets) = follow_links(tree, &options.follow_paths)?
        {
            include.extend(targets);
            include = super::follow::without_nested(include).unwrap_or_default();
        }
        Ok(Self {
            include: Side::new("include", include, false)?,
            exclude: Side::new("exclude", options.exclude_patterns.clone(), true)?,
        })
    }

    fn decide(
        &self,
        path: &[u8],
        is_dir: bool,
        parent: Option<&Frame>,
    ) -> Result<(Decision, States), TreeError> {
        let fail = |which| {
            move |source| TreeError::Pattern {
                which,
                patterns: vec![String::from_utf8_lossy(path).into_owned()],
                source,
            }
        };
        let mut states = States::default();
        let mut decision = Decision::Emit;
        if let Some(side) = &self.include {
            let above = parent.and_then(|frame| frame.states.include.as_ref());
            let (matched, state) = side
                .matcher
                .matches_with_parent(path, above)
                .map_err(fail("include"))?;
            states.include = Some(state);
            if !matched {
                if is_dir && side.is_closed(path) {
                    return Ok((Decision::Prune, states));
                }
                decision = Decision::Pass;
            }
        }
        if let Some(side) = &self.exclude {
            let above = parent.and_then(|frame| frame.states.exclude.as_ref());
            let (matched, state) = side
                .matcher
                .matches_with_parent(path, above)
                .map_err(fail("exclude"))?;
            states.exclude = Some(state);
            if matched {
                if is_dir && side.is_closed(path) {
                    return Ok((Decision::Prune, states));
                }
                decision = Decision::Pass;
            }
        }
        Ok((decision, states))
    }
}

#[derive(Default)]
struct States {
    include: Option<ParentState>,
    exclude: Option<ParentState>,
}

/// A directory being walked.
struct Frame {
    path: Vec<u8>,
    rest: std::vec::IntoIter<(Vec<u8>, FileType)>,
    states: States,
    visited: bool,
}

struct Walk<'a> {
    tree: &'a Tree,
    filter: Filter,
    visit: &'a mut dyn FnMut(Stat) -> ControlFlow<()>,
    seen: Seen,
    stack: Vec<Frame>,
}

impl Walk<'_> {
    fn run(mut self) -> Result<(), TreeError> {
        let mut top = self.tree.list(b"")?.into_iter();
        loop {
            let (dir, next) = match self.stack.last_mut() {
                Some(frame) => (frame.path.as_slice(), frame.rest.next()),
                None => (&b""[..], top.next()),
            };
            match next {
                Some((name, kind)) => {
                    let path = if dir.is_empty() {
                        name
                    } else {
                        [dir, b"/", &name].concat()
                    };
                    self.entry(path, kind == FileType::Directory)?;
                }
                None if self.stack.is_empty() => return Ok(()),
                None => {
                    self.stack.pop();
                }
            }
        }
    }

    fn entry(&mut self, path: Vec<u8>, is_dir: bool) -> Result<(), TreeError> {
        let (decision, states) = self.filter.decide(&path, is_dir, self.stack.last())?;
        let visited = match decision {
            Decision::Prune => return Ok(()),
            Decision::Pass => false,
            Decision::Emit => {
                let stat = match self.tree.stat(&path, &mut self.seen) {
                    Err(err) if err.is_gone() => return Ok(()),
                    stat => stat?,
                };
                self.emit_parents()?;
                self.emit(stat)?;
                true
            }
        };
        if !is_dir {
            return Ok(());
        }
        let listing: Listing = match self.tree.list(&path) {
            Err(err) if err.is_gone() || !visited && err.is_denied() => return Ok(()),
            listing => listing?,
        };
        self.stack.push(Frame {
            path,
            rest: listing.into_iter(),
            states,
            visited,
        });
        Ok(())
    }

    fn emit_parents(&mut self) -> Result<(), TreeError> {
        for at in 0..self.stack.len() {
            if !self.stack[at].visited {
                let stat = self.tree.stat(&self.stack[at].path, &mut self.seen)?;
                self.emit(stat)?;
                self.stack[at].visited = true;
            }
        }
        Ok(())
    }

    fn emit(&mut self, stat: Stat) -> Result<(), TreeError> {
        match (self.visit)(stat) {
            ControlFlow::Continue(()) => Ok(()),
            ControlFlow::Break(()) => Err(TreeError::Stopped),
        }
    }
}

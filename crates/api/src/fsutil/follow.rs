//! Finding what the symlinks on some paths lead to, so that it is sent, too.

use std::collections::BTreeSet;

use oci::path;
use oci::pattern::glob_match;
use rustix::fs::FileType;

use super::tree::Seen;
use super::{Tree, TreeError};

/// Returns the paths, and all that symlinks on them lead to, sorted; `None` when that is the whole tree.
pub(super) fn follow_links(tree: &Tree, paths: &[String]) -> Result<Option<Vec<String>>, TreeError> {
    let mut resolver = Resolver {
        tree,
        resolved: BTreeSet::new(),
        pending: paths.iter().rev().cloned().collect(),
    };
    while let Some(next) = resolver.pending.pop() {
        resolver.resolve(&next)?;
    }
    Ok(without_nested(resolver.resolved.into_iter().collect()))
}

/// Leaves out paths below the one before; `None` when one is the whole tree. Expects a sorted list.
pub(super) fn without_nested(paths: Vec<String>) -> Option<Vec<String>> {
    let mut out = Vec::with_capacity(paths.len());
    let mut last = String::new();
    for next in paths {
        if next == "." {
            return None;
        }
        if !next.starts_with(&format!("{last}/")) {
            last.clone_from(&next);
            out.push(next);
        }
    }
    Some(out)
}

struct Resolver<'a> {
    tree: &'a Tree,
    resolved: BTreeSet<String>,
    pending: Vec<String>,
}

impl Resolver<'_> {
    /// Follows one path up to its first symlink, and leaves what that leads to for later.
    fn resolve(&mut self, wanted: &str) -> Result<(), TreeError> {
        let wanted = relative(wanted);
        let mut current = String::from(".");
        let mut rest = wanted.as_str();
        loop {
            let (first, after) = rest.split_once('/').unwrap_or((rest, ""));
            current = path::join(&[&current, first]);
            let targets = self.targets(&current, true)?;
            if after.is_empty() || targets.is_some() {
                if !self.resolved.insert(current.clone()) {
                    return Ok(());
                }
                let targets = targets.unwrap_or_default();
                self.pending
                    .extend(targets.iter().rev().map(|target| path::join(&[target, after])));
                return Ok(());
            }
            rest = after;
        }
    }

    /// Returns where a symlink leads to, or the symlinks that a wildcard matches; `None` for anything else.
    fn targets(&self, entry: &str, allow_wildcard: bool) -> Result<Option<Vec<String>>, TreeError> {
        if entry == "." {
            return Ok(None);
        }
        let (dir, base) = (path::dir(entry), path::base(entry));
        if allow_wildcard && has_wildcard(base) {
            let listing = match self.tree.list(if dir == "." { b"" } else { dir.as_bytes() }) {
                Err(err) if err.is_gone() => return Ok(None),
                listing => listing?,
            };
            let mut out = Vec::new();
            for (name, kind) in listing {
                let name = String::from_utf8_lossy(&name);
                if kind == FileType::Symlink && glob_match(base, name.as_bytes()).unwrap_or(false) {
                    out.extend(
                        self.targets(&path::join(&[&dir, &name]), false)?
                            .unwrap_or_default(),
                    );
                }
            }
            return Ok((!out.is_empty()).then_some(out));
        }
        let stat = match self.tree.stat(entry.as_bytes(), &mut Seen::default()) {
            Err(err) if err.is_gone() || is_loop(&err) => return Ok(None),
            stat => stat?,
        };
        if !stat.is_symlink() {
            return Ok(None);
        }
        let link = path::clean(&String::from_utf8_lossy(&stat.linkname));
        Ok(Some(vec![if link.starts_with('/') {
            link
        } else {
            path::join(&["/", &dir, &link])
        }]))
    }
}

/// A path that names a symlink's child is no path of this tree.
fn is_loop(err: &TreeError) -> bool {
    let is = |source: &std::io::Error| source.raw_os_error() == Some(rustix::io::Errno::LOOP.raw_os_error());
    matches!(err, TreeError::Io { source, .. } if is(source))
}

/// Cleans a path and makes it relative to the root; `.` for the root.
fn relative(wanted: &str) -> String {
    let rooted = path::join(&["/", wanted]);
    let relative = rooted.trim_start_matches('/');
    if relative.is_empty() {
        ".".into()
    } else {
        relative.into()
    }
}

fn has_wildcard(name: &str) -> bool {
    let mut chars = name.chars();
    while let Some(c) = chars.next() {
        match c {
            '\\' => {
                chars.next();
            }
            '*' | '?' | '[' => return true,
            _ => {}
        }
    }
    false
}

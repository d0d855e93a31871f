//! Expanding patterns over a tree.

use std::os::fd::AsFd;
use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};

use oci::pattern::glob_match;
use rustix::fs::OFlags;

use super::{Root, TreeContext, TreeError, at, resolve};

fn has_wildcard(part: &[u8]) -> bool {
    let mut bytes = part.iter();
    while let Some(byte) = bytes.next() {
        match byte {
            b'\\' => {
                bytes.next();
            }
            b'*' | b'?' | b'[' => return true,
            _ => {}
        }
    }
    false
}

pub(super) fn expand(root: &Root, pattern: &Path, follow: bool) -> Result<Vec<PathBuf>, TreeError> {
    let clean = resolve::lexical(pattern);
    let mut fixed = PathBuf::new();
    let mut rest = PathBuf::new();
    for part in &clean {
        if rest.as_os_str().is_empty() && !has_wildcard(part.as_bytes()) {
            fixed.push(part);
        } else {
            rest.push(part);
        }
    }
    if rest.as_os_str().is_empty() {
        return Ok(vec![fixed]);
    }
    let base = if follow {
        root.resolve(&fixed)?
    } else {
        root.resolve_parent(&fixed)?
    };
    let flags = OFlags::PATH | OFlags::NOFOLLOW;
    let stat = at::open_beneath(root.as_fd(), &base, flags)
        .and_then(at::stat_fd)
        .on("lstat", &fixed)?;
    // Go's patterns are text; one that is not matches nothing.
    let Some(text) = rest.to_str().filter(|_| stat.is_dir()) else {
        return Ok(Vec::new());
    };
    let mut found = Vec::new();
    let search = Search {
        root,
        base: &base,
        pattern: text,
        depth: rest.iter().count(),
    };
    search.visit(&mut PathBuf::new(), 1, &mut found)?;
    Ok(found)
}

struct Search<'a> {
    root: &'a Root,
    base: &'a Path,
    pattern: &'a str,
    /// Parts of the pattern. A class (`[^a]`) may match a slash in Go, so with classes depth says nothing.
    depth: usize,
}

impl Search<'_> {
    fn visit(&self, relative: &mut PathBuf, level: usize, found: &mut Vec<PathBuf>) -> Result<(), TreeError> {
        let dir = self.base.join(&*relative);
        let fd = at::open_dir_beneath(self.root.as_fd(), &dir).on("open", &dir)?;
        for name in at::list(&fd).on("readdirent", &dir)? {
            relative.push(&name);
            if glob_match(self.pattern, relative.as_os_str().as_bytes()).unwrap_or(false) {
                found.push(self.base.join(&*relative));
            } else if (level < self.depth || self.pattern.contains('['))
                && at::stat_at(&fd, &*name).on("lstat", &dir.join(&name))?.is_dir()
            {
                self.visit(relative, level + 1, found)?;
            }
            relative.pop();
        }
        Ok(())
    }
}

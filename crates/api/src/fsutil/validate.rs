//! Order of entries: parents before children, siblings by name, nothing outside.

use std::cmp::Ordering;

use oci::path;

/// Why an entry is refused.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum OrderError {
    /// The path is not UTF-8.
    #[error("path is not UTF-8: {0}")]
    NotText(String),
    /// The path is not in its shortest form.
    #[error("unclean path {0}")]
    Unclean(String),
    /// The path is absolute.
    #[error("absolute path {0}")]
    Absolute(String),
    /// The path leaves the tree.
    #[error("escape check {0}")]
    Escape(String),
    /// The entry comes too late, or its directory does not come at all.
    #[error("changes out of order: {path:?} {last:?}")]
    Order {
        /// The entry.
        path: String,
        /// The entry before it in the nearest directory.
        last: String,
    },
    /// A hard link to an entry that did not come before.
    #[error("invalid link {path} to unknown path: {target:?}")]
    Link {
        /// The entry.
        path: String,
        /// What it links to.
        target: String,
    },
}

/// Orders paths as a walk does: a directory's entries directly follow it.
pub fn compare_paths(one: &[u8], two: &[u8]) -> Ordering {
    for (a, b) in one.iter().zip(two) {
        match (a, b) {
            (a, b) if a == b => {}
            (b'/', _) => return Ordering::Less,
            (_, b'/') => return Ordering::Greater,
            (a, b) => return a.cmp(b),
        }
    }
    one.len().cmp(&two.len())
}

/// Checks that entries come in the order of a walk.
#[derive(Debug)]
pub struct Validator {
    /// The directories that lead to the last entry, each with the name of its last entry.
    parents: Vec<(String, String)>,
}

impl Default for Validator {
    fn default() -> Self {
        Self {
            parents: vec![(String::new(), String::new())],
        }
    }
}

impl Validator {
    /// Checks the next entry.
    pub fn check(&mut self, entry: &str, is_dir: bool) -> Result<(), OrderError> {
        if entry.starts_with('/') {
            return Err(OrderError::Absolute(entry.into()));
        }
        if entry != path::clean(entry) || entry == "." || entry.contains('\0') {
            return Err(OrderError::Unclean(entry.into()));
        }
        if entry == ".." || entry.starts_with("../") {
            return Err(OrderError::Escape(entry.into()));
        }
        let (dir, base) = entry.rsplit_once('/').unwrap_or(("", entry));
        while self.parents.len() > 1
            && self
                .parents
                .last()
                .is_some_and(|(parent, _)| !is_within(dir, parent))
        {
            self.parents.pop();
        }
        let Some((parent, last)) = self.parents.last_mut() else {
            return Ok(());
        };
        if parent != dir || last.as_str() >= base {
            return Err(OrderError::Order {
                path: entry.into(),
                last: path::join(&[parent, last]),
            });
        }
        base.clone_into(last);
        if is_dir {
            self.parents.push((entry.into(), String::new()));
        }
        Ok(())
    }
}

fn is_within(dir: &str, parent: &str) -> bool {
    dir.strip_prefix(parent)
        .is_some_and(|rest| rest.is_empty() || rest.starts_with('/'))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn check(entries: &[&str]) -> Result<(), OrderError> {
        let mut validator = Validator::default();
        entries.iter().try_for_each(|entry| {
            let (entry, is_dir) = entry
                .strip_suffix('/')
                .map_or((*entry, false), |entry| (entry, true));
            validator.check(entry, is_dir)
        })
    }

    #[test]
    fn walks_pass() {
        check(&["a/", "a/b/", "a/b/c", "a/d", "a.b", "b/", "b/a", "c"]).unwrap();
        check(&["bar/", "bar/foo", "bar-foo"]).unwrap();
    }

    #[test]
    fn everything_else_is_refused() {
        for entries in [
            &["b", "a"][..],
            &["a", "a"],
            &["a/b"],
            &["a", "a/b"],
            &["a/", "a/c", "a/b"],
            &["a/", "b", "a/b"],
            &["../a"],
            &[".."],
            &["."],
            &[""],
            &["/a"],
            &["a/../b"],
            &["a//b"],
            &["a/./b"],
        ] {
            assert!(check(entries).is_err(), "{entries:?}");
        }
    }

    #[test]
    fn paths_order_as_walks_do() {
        let mut paths = ["foo-bar", "foo/a", "foo", "foo.c", "a/b/c", "a/b", "a"];
        paths.sort_by(|a, b| compare_paths(a.as_bytes(), b.as_bytes()));
        assert_eq!(paths, ["a", "a/b", "a/b/c", "foo", "foo/a", "foo-bar", "foo.c"]);
    }
}

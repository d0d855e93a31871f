//! Checks that a client's listing is a tree: clean relative paths, in order, each below a directory that came before.

use std::cmp::Ordering;
use std::collections::HashSet;

use build::session::FileStat;

use super::receive::TransferError;

/// Longest path.
const MAX_PATH_BYTES: usize = 16 << 10;
/// Longest link target, as Linux has it.
const MAX_LINK_BYTES: usize = 4096;
/// Most entries of one directory tree.
const MAX_ENTRIES: usize = 10_000_000;

/// Go's `os.ModeDir`.
pub(super) const MODE_DIR: u32 = 1 << 31;
/// Go's `os.ModeSymlink`.
pub(super) const MODE_SYMLINK: u32 = 1 << 27;
/// Go's `os.ModeDevice`.
pub(super) const MODE_DEVICE: u32 = 1 << 26;
/// Go's `os.ModeNamedPipe`.
pub(super) const MODE_FIFO: u32 = 1 << 25;
/// Go's `os.ModeSocket`.
pub(super) const MODE_SOCKET: u32 = 1 << 24;
/// Go's `os.ModeSetuid`.
pub(super) const MODE_SETUID: u32 = 1 << 23;
/// Go's `os.ModeSetgid`.
pub(super) const MODE_SETGID: u32 = 1 << 22;
/// Go's `os.ModeCharDevice`.
pub(super) const MODE_CHAR: u32 = 1 << 21;
/// Go's `os.ModeSticky`.
pub(super) const MODE_STICKY: u32 = 1 << 20;
/// Go's `os.ModeType` without `os.ModeIrregular`.
const MODE_TYPE: u32 = MODE_DIR | MODE_SYMLINK | MODE_DEVICE | MODE_FIFO | MODE_SOCKET | MODE_CHAR;

/// Whether an entry has content of its own.
pub(super) fn has_content(stat: &FileStat) -> bool {
    stat.mode & MODE_TYPE == 0 && stat.linkname.is_empty()
}

/// Whether an entry is another name of an earlier one.
pub(super) fn is_hard_link(stat: &FileStat) -> bool {
    stat.mode & (MODE_DIR | MODE_SYMLINK) == 0 && !stat.linkname.is_empty()
}

/// Compares paths as a walk of the tree meets them: a directory, then everything in it, then its next sibling.
pub(super) fn compare(a: &str, b: &str) -> Ordering {
    a.split('/').cmp(b.split('/'))
}

/// Watches one listing.
#[derive(Debug, Default)]
pub(super) struct Order {
    /// Directories from the root to where the listing is.
    open: Vec<String>,
    last: Option<String>,
    /// What a hard link may name.
    files: HashSet<String>,
    entries: usize,
}

impl Order {
    /// Takes the next entry.
    pub fn accept(&mut self, stat: &FileStat) -> Result<(), TransferError> {
        let refuse = |reason| {
            Err(TransferError::Listing {
                path: stat.path.clone(),
                reason,
            })
        };
        self.entries += 1;
        if self.entries > MAX_ENTRIES {
            return refuse("the directory has too many entries");
        }
        if stat.path.len() > MAX_PATH_BYTES || stat.linkname.len() > MAX_LINK_BYTES.max(MAX_PATH_BYTES) {
            return refuse("the path is too long");
        }
        let is_clean = stat.path.split('/').all(|part| !matches!(part, "" | "." | ".."));
        if !is_clean || stat.path.contains('\0') || stat.linkname.contains('\0') {
            return refuse("the path is not a clean relative path");
        }
        if self
            .last
            .as_ref()
            .is_some_and(|last| compare(last, &stat.path) != Ordering::Less)
        {
            return refuse("the path is out of order");
        }
        if stat.size_bytes < 0 {
            return refuse("the size is negative");
        }
        // Character devices have the bit of devices as well.
        if (stat.mode & MODE_TYPE & !MODE_CHAR).count_ones() > 1 {
            return refuse("it is of several kinds");
        }
        let parent = stat.path.rsplit_once('/').map(|(parent, _)| parent);
        while let Some(dir) = self.open.last() {
            if Some(dir.as_str()) == parent || parent.is_some_and(|parent| is_below(parent, dir)) {
                break;
            }
            self.open.pop();
        }
        if parent != self.open.last().map(String::as_str) {
            return refuse("the path's directory was not listed");
        }
        if is_hard_link(stat) && !self.files.contains(&stat.linkname) {
            return refuse("the hard link's target was not listed");
        }
        if stat.mode & MODE_DIR != 0 {
            self.open.push(stat.path.clone());
        } else if has_content(stat) {
            self.files.insert(stat.path.clone());
        }
        self.last = Some(stat.path.clone());
        Ok(())
    }
}

fn is_below(path: &str, dir: &str) -> bool {
    path.strip_prefix(dir).is_some_and(|rest| rest.starts_with('/'))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn entry(path: &str, mode: u32) -> FileStat {
        FileStat {
            path: path.to_owned(),
            mode,
            ..FileStat::default()
        }
    }

    fn accepts(entries: &[(&str, u32)]) -> bool {
        let mut order = Order::default();
        entries
            .iter()
            .all(|(path, mode)| order.accept(&entry(path, *mode)).is_ok())
    }

    #[test]
    fn takes_a_walk_in_order() {
        assert!(accepts(&[
            ("a", MODE_DIR),
            ("a/b", 0),
            ("a/c", MODE_DIR),
            ("a/c/d", 0),
            ("a-b", 0),
            ("b", 0)
        ]));
    }

    #[test]
    fn refuses_what_is_no_tree() {
        assert!(!accepts(&[("../a", 0)]));
        assert!(!accepts(&[("/a", 0)]));
        assert!(!accepts(&[("a/", 0)]));
        assert!(!accepts(&[("", MODE_DIR)]));
        assert!(!accepts(&[("a", 0), ("a/b", 0)]));
        assert!(!accepts(&[("a", MODE_SYMLINK), ("a/b", 0)]));
        assert!(!accepts(&[("b", 0), ("a", 0)]));
        assert!(!accepts(&[("a", 0), ("a", 0)]));
        assert!(!accepts(&[("a\0b", 0)]));
    }

    #[test]
    fn refuses_attributes_that_no_file_has() {
        let accepts = |stat: &FileStat| Order::default().accept(stat).is_ok();
        for size_bytes in [-1, i64::MIN] {
            assert!(!accepts(&FileStat {
                size_bytes,
                ..entry("a", 0)
            }));
        }
        assert!(accepts(&FileStat {
            size_bytes: i64::MAX,
            ..entry("a", 0)
        }));
        assert!(!accepts(&entry("a", MODE_DIR | MODE_SYMLINK)));
        assert!(!accepts(&entry("a", MODE_FIFO | MODE_DEVICE)));
        assert!(accepts(&entry("a", MODE_DEVICE | MODE_CHAR | 0o666)));
    }

    #[test]
    fn refuses_links_to_what_was_not_listed() {
        let mut order = Order::default();
        order.accept(&entry("a", 0)).expect("is listed");
        let link = |target: &str| FileStat {
            linkname: target.to_owned(),
            ..entry("b", 0)
        };
        assert!(order.accept(&link("../x")).is_err());
        assert!(order.accept(&link("a")).is_ok() || order.accept(&entry("c", 0)).is_ok());
    }
}

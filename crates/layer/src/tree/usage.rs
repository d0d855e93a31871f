//! Measuring trees.

use std::collections::BTreeSet;
use std::io;
use std::os::fd::OwnedFd;
use std::path::Path;

use rustix::fs::{CWD, OFlags};

use super::at;

/// Measures the host's directory `root` with all in it: allocated bytes and inodes, each file once however many names it
/// has; files in `except` (device and inode number) not at all. `path` must come from this program.
pub fn usage(root: &Path, except: &BTreeSet<(u64, u64)>) -> io::Result<(u64, u64)> {
    let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC;
    let dir = rustix::fs::openat(CWD, root, flags, rustix::fs::Mode::empty())?;
    let mut sum = Sum {
        seen: BTreeSet::new(),
        except,
        size_bytes: at::stat_fd(&dir)?.allocated_bytes,
        inodes: 1,
    };
    sum.dir(&dir, 0)?;
    Ok((sum.size_bytes, sum.inodes))
}

struct Sum<'a> {
    seen: BTreeSet<(u64, u64)>,
    except: &'a BTreeSet<(u64, u64)>,
    size_bytes: u64,
    inodes: u64,
}

impl Sum<'_> {
    fn dir(&mut self, dir: &OwnedFd, depth: usize) -> io::Result<()> {
        for name in at::list(dir)? {
            let Some(stat) = at::try_stat_at(dir, &*name)? else {
                continue;
            };
            if stat.is_linked()
                && (self.except.contains(&stat.identity()) || !self.seen.insert(stat.identity()))
            {
                continue;
            }
            self.size_bytes = self.size_bytes.saturating_add(stat.allocated_bytes);
            self.inodes += 1;
            // What lies deeper than anyone can walk is not worth failing for.
            if stat.is_dir() && depth < at::DEPTH_MAX {
                match at::open_dir_beneath(dir, Path::new(&name)) {
                    Err(error) if error.kind() == io::ErrorKind::NotFound => {}
                    done => self.dir(&done?, depth + 1)?,
                }
            }
        }
        Ok(())
    }
}

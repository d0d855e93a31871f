//! Terminals of containers' processes, made in the container's own `devpts`.

use std::os::fd::{AsFd, BorrowedFd, OwnedFd};

use rustix::fs::{Mode, OFlags, Uid};
use rustix::mount::{MoveMountFlags, OpenTreeFlags};
use rustix::pty::OpenptFlags;

use super::child::{Fallible as _, SetupError};
use crate::tree;

/// A terminal that no process controls yet.
#[derive(Debug)]
pub(super) struct Terminal {
    master: OwnedFd,
    slave: OwnedFd,
}

impl Terminal {
    /// Makes one in `/dev/pts` and gives it to a user.
    pub(super) fn open(root: BorrowedFd<'_>, uid: u32) -> Result<Self, SetupError> {
        let what = "make a terminal";
        let master =
            tree::open_in_root(root, "/dev/pts/ptmx", OFlags::RDWR | OFlags::NOCTTY).or_fail(what)?;
        rustix::pty::unlockpt(&master).or_fail(what)?;
        let flags = OpenptFlags::RDWR | OpenptFlags::NOCTTY | OpenptFlags::CLOEXEC;
        let slave = rustix::pty::ioctl_tiocgptpeer(&master, flags).or_fail(what)?;
        rustix::fs::fchown(&slave, Some(Uid::from_raw(uid)), None).or_fail(what)?;
        Ok(Self { master, slave })
    }

    /// Returns the side that is not the process'.
    pub(super) fn master(&self) -> BorrowedFd<'_> {
        self.master.as_fd()
    }

    /// Makes it the container's `/dev/console`.
    pub(super) fn put_on_console(&self, root: BorrowedFd<'_>) -> Result<(), SetupError> {
        let what = "make /dev/console";
        let dev = tree::open_in_root(root, "/dev", OFlags::PATH | OFlags::DIRECTORY).or_fail(what)?;
        let flags = OFlags::CREATE | OFlags::WRONLY | OFlags::NOFOLLOW | OFlags::CLOEXEC;
        drop(rustix::fs::openat(&dev, c"console", flags, Mode::from_raw_mode(0o600)).or_fail(what)?);
        let flags = OFlags::PATH | OFlags::NOFOLLOW | OFlags::CLOEXEC;
        let point = rustix::fs::openat(&dev, c"console", flags, Mode::empty()).or_fail(what)?;
        let flags =
            OpenTreeFlags::OPEN_TREE_CLONE | OpenTreeFlags::OPEN_TREE_CLOEXEC | OpenTreeFlags::AT_EMPTY_PATH;
        let slave = rustix::mount::open_tree(&self.slave, c"", flags).or_fail(what)?;
        let flags = MoveMountFlags::MOVE_MOUNT_F_EMPTY_PATH | MoveMountFlags::MOVE_MOUNT_T_EMPTY_PATH;
        rustix::mount::move_mount(&slave, c"", &point, c"", flags).or_fail(what)
    }

    /// Makes it this session's terminal and stdio.
    pub(super) fn take_control(self) -> Result<(), SetupError> {
        let what = "take the terminal";
        rustix::process::ioctl_tiocsctty(&self.slave).or_fail(what)?;
        rustix::stdio::dup2_stdin(&self.slave).or_fail(what)?;
        rustix::stdio::dup2_stdout(&self.slave).or_fail(what)?;
        rustix::stdio::dup2_stderr(&self.slave).or_fail(what)
    }
}

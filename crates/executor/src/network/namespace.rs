//! Network namespaces: made and entered on threads of their own.

use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::path::Path;

use rustix::fs::{Mode, OFlags};
use rustix::thread::LinkNameSpaceType;

use crate::sys;

fn lost() -> io::Error {
    io::Error::other("a thread for a network namespace panicked")
}

/// Runs something on a thread that ends with it: what the thread enters is left with its end. Blocking.
fn on_a_thread<T: Send>(work: impl FnOnce() -> io::Result<T> + Send) -> io::Result<T> {
    std::thread::scope(|scope| {
        let thread = std::thread::Builder::new()
            .name("network".to_owned())
            .spawn_scoped(scope, work)?;
        thread.join().map_err(|_| lost())?
    })
}

fn own_namespace() -> io::Result<OwnedFd> {
    let flags = OFlags::RDONLY | OFlags::CLOEXEC;
    Ok(rustix::fs::open(
        c"/proc/thread-self/ns/net",
        flags,
        Mode::empty(),
    )?)
}

/// Opens the namespace that the calling thread is in.
pub(super) fn current() -> io::Result<OwnedFd> {
    own_namespace()
}

/// Makes a namespace with its loopback device up; it lives as long as something refers to it. `furnish` is called inside
/// it. Blocking.
pub(super) fn make(furnish: impl FnOnce(BorrowedFd<'_>) -> io::Result<()> + Send) -> io::Result<OwnedFd> {
    on_a_thread(|| {
        sys::unshare(libc::CLONE_NEWNET)?;
        let namespace = own_namespace()?;
        sys::bring_loopback_up()?;
        furnish(namespace.as_fd())?;
        Ok(namespace)
    })
}

/// Gives a namespace a path, which keeps it until [`unmount`]. The file is made.
pub(super) fn mount(namespace: BorrowedFd<'_>, path: &Path) -> io::Result<()> {
    std::fs::File::create(path)?;
    let source = format!("/proc/self/fd/{}", namespace.as_raw_fd());
    Ok(rustix::mount::mount_bind(source, path)?)
}

/// Whether a namespace is mounted at a path.
pub(super) fn is_mounted(path: &Path) -> bool {
    const NSFS_MAGIC: u64 = 0x6e73_6673;
    rustix::fs::statfs(path).is_ok_and(|stat| u64::try_from(stat.f_type) == Ok(NSFS_MAGIC))
}

/// Takes the path away that [`mount`] gave, with the file. One that is not there is no error.
pub(super) fn unmount(path: &Path) -> io::Result<()> {
    if is_mounted(path) {
        rustix::mount::unmount(path, rustix::mount::UnmountFlags::DETACH)?;
    }
    match std::fs::remove_file(path) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => Err(error),
        _ => Ok(()),
    }
}

/// Runs something inside a namespace. Blocking.
pub(super) fn within<T: Send>(
    namespace: BorrowedFd<'_>,
    work: impl FnOnce() -> io::Result<T> + Send,
) -> io::Result<T> {
    on_a_thread(|| {
        rustix::thread::move_into_link_name_space(namespace, Some(LinkNameSpaceType::Network))?;
        work()
    })
}

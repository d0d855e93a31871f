//! The kernel's interfaces that no safe wrapper offers: the only unsafe code of the workspace.
//!
//! Every function here is safe to call: what cannot be had by construction is checked or demanded as a value
//! ([`SingleThread`]).

mod bpf;
mod process;
mod seccomp;

use std::ffi::CStr;
use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};

use tokio::io::unix::AsyncFd;

pub(crate) use bpf::{BpfInstruction, attach_device_program, load_device_program};
pub(crate) use process::{
    Cloned, NewProcess, SingleThread, clone_process, execute, execute_fd, give_terminal,
    mark_all_close_on_exec, reset_signals, unshare,
};
pub(crate) use seccomp::{SockFilter, install_seccomp};

/// Turns a raw system call's result into `io::Result`.
fn check(result: libc::c_long) -> io::Result<libc::c_long> {
    if result < 0 {
        Err(io::Error::last_os_error())
    } else {
        Ok(result)
    }
}

/// Has the C library keep at most so many heaps; elsewhere than with the GNU one, nothing. See `mallopt(3)`.
#[cfg(target_env = "gnu")]
pub(crate) fn limit_heaps(count: i32) {
    // SAFETY: the function takes two numbers and locks what it changes. Should it refuse, memory is used as before.
    let _ = unsafe { libc::mallopt(libc::M_ARENA_MAX, count) };
}

/// Has the C library keep at most so many heaps; elsewhere than with the GNU one, nothing. See `mallopt(3)`.
#[cfg(not(target_env = "gnu"))]
pub(crate) fn limit_heaps(_count: i32) {}

/// Has the C library give memory that is free back to the kernel; elsewhere than with the GNU one, nothing. See
/// `malloc_trim(3)`.
#[cfg(target_env = "gnu")]
pub(crate) fn trim_heaps() {
    // SAFETY: the function takes a number and locks each heap while it looks at it.
    let _ = unsafe { libc::malloc_trim(0) };
}

/// Has the C library give memory that is free back to the kernel; elsewhere than with the GNU one, nothing. See
/// `malloc_trim(3)`.
#[cfg(not(target_env = "gnu"))]
pub(crate) fn trim_heaps() {}

/// Lets tokio wait for a descriptor.
pub(crate) fn register(fd: OwnedFd) -> io::Result<AsyncFd<OwnedFd>> {
    // SAFETY: an `OwnedFd` is one open descriptor, the same as long as it lives, and the `AsyncFd` owns it.
    Ok(unsafe { AsyncFd::register(fd) }?)
}

/// Changes of a mount's attributes (`MOUNT_ATTR_*`) and propagation.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct MountChange {
    pub(crate) set: u64,
    pub(crate) clear: u64,
    /// `MS_PRIVATE`, `MS_SLAVE`, … or 0.
    pub(crate) propagation: u64,
    pub(crate) recursive: bool,
}

/// Changes the mount behind `mount`, attached or not.
pub(crate) fn change_mount(mount: impl AsFd, change: MountChange) -> io::Result<()> {
    let attributes = libc::mount_attr {
        attr_set: change.set,
        attr_clr: change.clear,
        propagation: change.propagation,
        userns_fd: 0,
    };
    let mut flags = libc::AT_EMPTY_PATH;
    if change.recursive {
        flags |= libc::AT_RECURSIVE;
    }
    // SAFETY: the descriptor is borrowed for the call, the path is a NUL-terminated constant, and the structure has
    // the size given and outlives the call, which only reads it.
    let result = unsafe {
        libc::syscall(
            libc::SYS_mount_setattr,
            mount.as_fd().as_raw_fd(),
            c"".as_ptr(),
            flags,
            &raw const attributes,
            size_of::<libc::mount_attr>(),
        )
    };
    check(result).map(drop)
}

/// Leaves the daemon's session keyring for a new, empty one.
pub(crate) fn join_new_session_keyring() -> io::Result<()> {
    const KEYCTL_JOIN_SESSION_KEYRING: libc::c_long = 1;
    // SAFETY: this operation takes a name or null and touches no other memory.
    let result = unsafe {
        libc::syscall(
            libc::SYS_keyctl,
            KEYCTL_JOIN_SESSION_KEYRING,
            std::ptr::null::<libc::c_char>(),
            0,
            0,
            0,
        )
    };
    check(result).map(drop)
}

/// Brings the network namespace's loopback device up.
pub(crate) fn bring_loopback_up() -> io::Result<()> {
    let socket = rustix::net::socket_with(
        rustix::net::AddressFamily::INET,
        rustix::net::SocketType::DGRAM,
        rustix::net::SocketFlags::CLOEXEC,
        None,
    )?;
    // SAFETY: `ifreq` is a plain C structure for which all zeros is a valid value.
    let mut request: libc::ifreq = unsafe { std::mem::zeroed() };
    for (to, from) in request.ifr_name.iter_mut().zip(b"lo") {
        *to = libc::c_char::from_ne_bytes([*from]);
    }
    // SAFETY: the kernel reads and fills the structure, which outlives the call.
    check(libc::c_long::from(unsafe {
        libc::ioctl(socket.as_raw_fd(), libc::SIOCGIFFLAGS, &raw mut request)
    }))?;
    let up = libc::c_short::try_from(libc::IFF_UP).unwrap_or(1);
    // SAFETY: the previous call filled the flags, a plain integer.
    unsafe { request.ifr_ifru.ifru_flags |= up };
    // SAFETY: the kernel reads the structure, which outlives the call.
    check(libc::c_long::from(unsafe {
        libc::ioctl(socket.as_raw_fd(), libc::SIOCSIFFLAGS, &raw mut request)
    }))?;
    Ok(())
}

/// Asks which loop device is free next.
pub(crate) fn free_loop_device(control: BorrowedFd<'_>) -> io::Result<u32> {
    const LOOP_CTL_GET_FREE: libc::Ioctl = 0x4C82;
    // SAFETY: the request takes no argument.
    let number = check(libc::c_long::from(unsafe {
        libc::ioctl(control.as_raw_fd(), LOOP_CTL_GET_FREE)
    }))?;
    u32::try_from(number).map_err(|_| io::Error::from(io::ErrorKind::InvalidData))
}

/// Forwards to `execveat` and friends: pointers to the strings, with the terminating null.
fn pointers<S: AsRef<CStr>>(strings: &[S]) -> Vec<*const libc::c_char> {
    strings
        .iter()
        .map(|text| text.as_ref().as_ptr())
        .chain(std::iter::once(std::ptr::null()))
        .collect()
}

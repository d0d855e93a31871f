//! Making processes and becoming other programs.

use std::ffi::{CStr, CString};
use std::io;
use std::os::fd::{AsRawFd, BorrowedFd, FromRawFd, OwnedFd};

use super::{check, pointers};

/// Proof that this process has one thread, so that its copies find no lock held by another.
///
/// Whoever holds it must not make threads.
#[derive(Debug)]
pub(crate) struct SingleThread(());

impl SingleThread {
    /// Looks how many threads there are; fails unless there is one.
    pub(crate) fn prove() -> io::Result<Self> {
        let count = std::fs::read_dir("/proc/self/task")?.count();
        if count == 1 {
            Ok(Self(()))
        } else {
            Err(io::Error::other(format!("the supervisor has {count} threads")))
        }
    }
}

/// On which side of [`clone_process`] we are.
#[derive(Debug)]
pub(crate) enum Cloned {
    /// In the process that called.
    Parent {
        /// Refers to it.
        pidfd: OwnedFd,
    },
    /// In the new process.
    Child(NewProcess),
}

/// Proof of being a copy: what the original owned must not be dropped here, so the copy never returns to it.
#[derive(Debug)]
pub(crate) struct NewProcess(());

impl NewProcess {
    /// Closes every descriptor above 2 but `keep`. Whatever else in this copy believes to own one must never be used nor
    /// dropped any more.
    pub(crate) fn close_all_but(self, keep: &[BorrowedFd<'_>]) -> io::Result<()> {
        let mut numbers: Vec<libc::c_uint> = keep.iter().map(|fd| fd.as_raw_fd().unsigned_abs()).collect();
        numbers.sort_unstable();
        let mut from: libc::c_uint = 3;
        for number in numbers.into_iter().chain([libc::c_uint::MAX]) {
            if number > from {
                let to = if number == libc::c_uint::MAX {
                    number
                } else {
                    number - 1
                };
                // SAFETY: closes descriptors that, by the contract above, nobody uses any more.
                check(unsafe { libc::syscall(libc::SYS_close_range, from, to, 0 as libc::c_uint) })?;
            }
            from = number.saturating_add(1);
        }
        Ok(())
    }
}

/// Makes a copy of this process in the namespaces named by `flags` (`CLONE_NEW*`), directly in `cgroup` if given (a
/// cgroup v2 directory).
pub(crate) fn clone_process(
    _proof: &SingleThread,
    flags: u64,
    cgroup: Option<BorrowedFd<'_>>,
) -> io::Result<Cloned> {
    let mut pidfd: libc::c_int = -1;
    // SAFETY: `clone_args` is a plain C structure for which all zeros is a valid value.
    let mut arguments: libc::clone_args = unsafe { std::mem::zeroed() };
    arguments.flags = flags | u64::from(libc::CLONE_PIDFD.unsigned_abs());
    arguments.pidfd = u64::try_from((&raw mut pidfd).expose_provenance()).unwrap_or(0);
    arguments.exit_signal = u64::from(libc::SIGCHLD.unsigned_abs());
    if let Some(cgroup) = cgroup {
        const CLONE_INTO_CGROUP: u64 = 0x2_0000_0000;
        arguments.flags |= CLONE_INTO_CGROUP;
        arguments.cgroup = u64::from(cgroup.as_raw_fd().unsigned_abs());
    }
    // SAFETY: without CLONE_VM and with a null stack this is a fork: the child runs on a copy of this stack. There is one
    // thread (`_proof`), so no lock of any library is held by another in the copy. The structure and `pidfd` outlive the call.
    let result = unsafe {
        libc::syscall(
            libc::SYS_clone3,
            &raw mut arguments,
            size_of::<libc::clone_args>(),
        )
    };
    let pid = check(result)?;
    if pid == 0 {
        return Ok(Cloned::Child(NewProcess(())));
    }
    // SAFETY: on success the kernel stored a new descriptor that nobody else owns.
    let pidfd = unsafe { OwnedFd::from_raw_fd(pidfd) };
    Ok(Cloned::Parent { pidfd })
}

/// Moves this process into new namespaces (`CLONE_NEW*`).
pub(crate) fn unshare(flags: libc::c_int) -> io::Result<()> {
    // SAFETY: namespace flags do not affect this process' memory or descriptors.
    check(libc::c_long::from(unsafe { libc::unshare(flags) })).map(drop)
}

/// Becomes another program; returns only why it could not.
pub(crate) fn execute(program: &CStr, args: &[CString], env: &[CString]) -> io::Error {
    let (args, env) = (pointers(args), pointers(env));
    // SAFETY: both arrays end with null and their strings with NUL; all outlive the call.
    unsafe { libc::execve(program.as_ptr(), args.as_ptr(), env.as_ptr()) };
    io::Error::last_os_error()
}

/// Becomes the program behind a descriptor; returns only why it could not.
pub(crate) fn execute_fd(program: BorrowedFd<'_>, args: &[CString], env: &[CString]) -> io::Error {
    let (args, env) = (pointers(args), pointers(env));
    // SAFETY: both arrays end with null and their strings with NUL; all outlive the call.
    unsafe {
        libc::syscall(
            libc::SYS_execveat,
            program.as_raw_fd(),
            c"".as_ptr(),
            args.as_ptr(),
            env.as_ptr(),
            libc::AT_EMPTY_PATH,
        )
    };
    io::Error::last_os_error()
}

/// Lets every descriptor but 0, 1 and 2 go at the next execution of a program.
pub(crate) fn mark_all_close_on_exec() -> io::Result<()> {
    const CLOSE_RANGE_CLOEXEC: libc::c_uint = 4;
    // SAFETY: only changes a flag of descriptors.
    check(unsafe {
        libc::syscall(
            libc::SYS_close_range,
            3 as libc::c_uint,
            libc::c_uint::MAX,
            CLOSE_RANGE_CLOEXEC,
        )
    })
    .map(drop)
}

/// Gives every signal its default action and blocks none.
pub(crate) fn reset_signals() {
    // All zeros are the default action without flags, larger than the kernel's `struct sigaction` everywhere; and an
    // empty set. The C library would not let us change the signals it uses itself.
    let zeros = [0_u64; 8];
    for signal in 1..=64 {
        // SAFETY: the default action runs no code of ours; the structure outlives the call, which only reads it. Signals
        // that cannot be changed are refused, which is fine.
        unsafe {
            libc::syscall(
                libc::SYS_rt_sigaction,
                signal,
                zeros.as_ptr(),
                std::ptr::null_mut::<libc::c_void>(),
                size_of::<u64>(),
            )
        };
    }
    // SAFETY: as above; blocking nothing is what a new program expects.
    unsafe {
        libc::syscall(
            libc::SYS_rt_sigprocmask,
            libc::SIG_SETMASK,
            zeros.as_ptr(),
            std::ptr::null_mut::<libc::c_void>(),
            size_of::<u64>(),
        )
    };
}

/// Lets a program that is started have its standard input as controlling terminal, in a session of its own.
pub(crate) fn give_terminal(command: &mut tokio::process::Command) {
    let take = || {
        rustix::process::setsid()?;
        // SAFETY: standard input is open in the new process, and nobody else touches it there.
        let stdin = unsafe { BorrowedFd::borrow_raw(0) };
        Ok(rustix::process::ioctl_tiocsctty(stdin)?)
    };
    // SAFETY: makes nothing but two system calls between fork and exec.
    unsafe { command.pre_exec(take) };
}

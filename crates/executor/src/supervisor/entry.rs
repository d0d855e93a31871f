//! How a process becomes the supervisor.

use std::ffi::CString;
use std::io::{self, Write as _};
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::ffi::OsStrExt as _;

use rustix::fs::{CWD, MemfdFlags, Mode, OFlags, SealFlags};
use rustix::mount::OpenTreeFlags;
use rustix::process::DumpableBehavior;

use super::Supervisor;
use crate::spec::ATTR_RDONLY;
use crate::sys::{self, MountChange, SingleThread};

/// The name under which the daemon starts it.
pub(crate) const ARGUMENT_ZERO: &str = "cooper-supervisor";
/// The name under which it starts itself again, from a file that containers cannot write to.
const SEALED: &str = "cooper-supervisor-sealed";

/// Acts as the supervisor if this process was started as one, and then never returns; else returns at once.
///
/// Must be called first in `main`, before any thread exists.
pub fn supervisor_main() {
    let Some(name) = std::env::args_os().next() else {
        return;
    };
    let result = match name.as_bytes() {
        name if name == ARGUMENT_ZERO.as_bytes() => seal(),
        name if name == SEALED.as_bytes() => supervise(),
        _ => return,
    };
    if let Err(error) = result {
        // The daemon shows it; there is no other way out of here.
        let _ = writeln!(io::stderr(), "container supervisor: {error}");
        std::process::exit(1);
    }
    std::process::exit(0);
}

/// Executes this program again through a read-only mount of its own, or a sealed copy. Otherwise a process that gets hold
/// of `/proc/self/exe` in a container (an image's program may be a script with that interpreter) could overwrite the
/// daemon's binary on the host.
fn seal() -> io::Result<()> {
    let program = read_only_self().or_else(|_| sealed_copy())?;
    let args = [CString::new(SEALED)?];
    Err(sys::execute_fd(program.as_fd(), &args, &[]))
}

fn read_only_self() -> io::Result<OwnedFd> {
    let flags = OpenTreeFlags::OPEN_TREE_CLONE | OpenTreeFlags::OPEN_TREE_CLOEXEC;
    let mount = rustix::mount::open_tree(CWD, c"/proc/self/exe", flags)?;
    sys::change_mount(
        &mount,
        MountChange {
            set: ATTR_RDONLY,
            ..MountChange::default()
        },
    )?;
    Ok(mount)
}

fn sealed_copy() -> io::Result<OwnedFd> {
    let copy = rustix::fs::memfd_create(c"cooper", MemfdFlags::CLOEXEC | MemfdFlags::ALLOW_SEALING)?;
    let mut copy = std::fs::File::from(copy);
    io::copy(&mut std::fs::File::open("/proc/self/exe")?, &mut copy)?;
    let seals = SealFlags::SEAL | SealFlags::SHRINK | SealFlags::GROW | SealFlags::WRITE;
    rustix::fs::fcntl_add_seals(&copy, seals)?;
    Ok(copy.into())
}

fn supervise() -> io::Result<()> {
    let proof = SingleThread::prove()?;
    // The daemon's socket came as standard input.
    let daemon = rustix::io::fcntl_dupfd_cloexec(rustix::stdio::stdin(), 3)?;
    let null = rustix::fs::open(c"/dev/null", OFlags::RDWR | OFlags::CLOEXEC, Mode::empty())?;
    rustix::stdio::dup2_stdin(&null)?;
    rustix::stdio::dup2_stdout(&null)?;
    drop(null);
    // A terminal's interrupt is the daemon's to act upon, which then closes the socket.
    rustix::process::setsid()?;
    rustix::process::set_dumpable_behavior(DumpableBehavior::NotDumpable)?;
    rustix::thread::set_name(c"supervisor")?;
    let mut supervisor = Supervisor::new(proof, daemon)?;
    let served = supervisor.serve();
    supervisor.kill_all();
    served
}

//! The last steps: limits, identity, capabilities, filter, program.

use std::convert::Infallible;
use std::ffi::{CString, OsStr};
use std::io;
use std::os::unix::ffi::OsStrExt as _;

use rustix::fs::{Access, AtFlags, CWD, FileType, Gid, Mode, Uid};
use rustix::process::{Resource, Rlimit, Signal};
use rustix::thread::{CapabilitySet, CapabilitySets};

use super::child::{Fallible as _, SetupError, plain};
use super::seccomp;
use crate::label::set::Writer;
use crate::spec::{CapabilitySpec, LimitSpec, ProcessSpec};
use crate::sys;
use crate::user::Identity;

/// Becomes the program; returns only why it could not.
pub(super) fn become_program(
    process: &ProcessSpec,
    identity: &Identity,
    labels: Writer,
) -> Result<Infallible, SetupError> {
    for limit in &process.limits {
        set_limit(limit)?;
    }
    rustix::process::umask(Mode::from_raw_mode(0o022));
    let changed_early = rustix::process::chdir(process.cwd.as_str()).is_ok();
    let program = compile_filter(process)?;
    labels.label_program().or_fail("set the labels of the program")?;
    if process.no_new_privs {
        rustix::thread::set_no_new_privs(true).or_fail("set no-new-privileges")?;
    }
    // Installing needs rights that are given up below; what is called from here on passes the filter.
    if let Some(program) = program {
        sys::install_seccomp(&program).or_fail("install the system call filter")?;
    }
    drop_bounding(process.capabilities.bounding)?;
    rustix::thread::set_keep_capabilities(true).or_fail("keep capabilities")?;
    set_identity(identity)?;
    set_capabilities(&process.capabilities)?;
    // Changing the identity cleared it.
    rustix::process::set_parent_process_death_signal(Some(Signal::KILL)).or_fail("tie to the supervisor")?;
    if !changed_early {
        // Root without rights on a network file system may be refused where the user is not.
        rustix::process::chdir(process.cwd.as_str())
            .or_fail(format_args!("chdir to cwd ({:?})", process.cwd))?;
    }
    execute(process, identity)
}

fn compile_filter(process: &ProcessSpec) -> Result<Option<Vec<sys::SockFilter>>, SetupError> {
    if !process.seccomp {
        return Ok(None);
    }
    let filter = seccomp::filter(process.capabilities.bounding);
    filter
        .map(Some)
        .ok_or_else(|| SetupError::new("there is no system call filter for this architecture"))
}

fn resource(name: &str) -> Option<Resource> {
    Some(match name {
        "as" => Resource::As,
        "core" => Resource::Core,
        "cpu" => Resource::Cpu,
        "data" => Resource::Data,
        "fsize" => Resource::Fsize,
        "locks" => Resource::Locks,
        "memlock" => Resource::Memlock,
        "msgqueue" => Resource::Msgqueue,
        "nice" => Resource::Nice,
        "nofile" => Resource::Nofile,
        "nproc" => Resource::Nproc,
        "rss" => Resource::Rss,
        "rtprio" => Resource::Rtprio,
        "rttime" => Resource::Rttime,
        "sigpending" => Resource::Sigpending,
        "stack" => Resource::Stack,
        _ => return None,
    })
}

/// A limit above the daemon's own needs `CAP_SYS_RESOURCE`; without it the step fails and says so, as it would not get
/// what it asked for.
fn set_limit(limit: &LimitSpec) -> Result<(), SetupError> {
    let name = &limit.name;
    let resource = resource(name).ok_or_else(|| SetupError::new(format!("unknown ulimit {name}")))?;
    let wanted = Rlimit {
        current: limit.soft,
        maximum: limit.hard,
    };
    match rustix::process::setrlimit(resource, wanted) {
        Err(rustix::io::Errno::PERM) => {
            let text = |value: Option<u64>| value.map_or("unlimited".to_owned(), |value| value.to_string());
            let own = rustix::process::getrlimit(resource).maximum;
            Err(SetupError::new(format!(
                "ulimit {name}: cannot raise the hard limit from {} to {}: the daemon lacks CAP_SYS_RESOURCE",
                text(own),
                text(limit.hard)
            )))
        }
        result => result.or_fail(format_args!("set ulimit {name}")),
    }
}

fn drop_bounding(keep: u64) -> Result<(), SetupError> {
    for number in 0..64 {
        let capability = CapabilitySet::from_bits_retain(1 << number);
        match rustix::thread::capability_is_in_bounding_set(capability) {
            // Numbers are used without gaps.
            Err(rustix::io::Errno::INVAL) => break,
            Ok(true) if keep & (1 << number) == 0 => {
                rustix::thread::remove_capability_from_bounding_set(capability)
                    .or_fail("drop capabilities from the bounding set")?;
            }
            other => drop(other.or_fail("read the bounding set")?),
        }
    }
    Ok(())
}

fn set_identity(identity: &Identity) -> Result<(), SetupError> {
    let groups: Vec<Gid> = identity
        .groups
        .iter()
        .map(|&group| Gid::from_raw(group))
        .collect();
    rustix::thread::set_thread_groups(&groups).or_fail("set the groups")?;
    let (uid, gid) = (Uid::from_raw(identity.uid), Gid::from_raw(identity.gid));
    rustix::thread::set_thread_res_gid(gid, gid, gid).or_fail("set the group")?;
    rustix::thread::set_thread_res_uid(uid, uid, uid).or_fail("set the user")
}

fn set_capabilities(sets: &CapabilitySpec) -> Result<(), SetupError> {
    let set = |bits: u64| CapabilitySet::from_bits_retain(bits);
    let wanted = CapabilitySets {
        effective: set(sets.effective),
        permitted: set(sets.permitted),
        inheritable: set(sets.inheritable),
    };
    rustix::thread::set_capabilities(None, wanted).or_fail("set the capabilities")?;
    rustix::thread::clear_ambient_capability_set().or_fail("clear the ambient capabilities")?;
    for number in 0..64 {
        if sets.ambient & (1 << number) != 0 {
            rustix::thread::configure_capability_in_ambient_set(set(1 << number), true)
                .or_fail("set the ambient capabilities")?;
        }
    }
    Ok(())
}

fn c_strings(texts: &[String]) -> Result<Vec<CString>, SetupError> {
    texts
        .iter()
        .map(|text| CString::new(text.as_str()).map_err(|_| SetupError::new("a NUL byte in an argument")))
        .collect()
}

fn execute(process: &ProcessSpec, identity: &Identity) -> Result<Infallible, SetupError> {
    let name = process
        .args
        .first()
        .ok_or_else(|| SetupError::new("no program to run"))?;
    let mut env = process.env.clone();
    if variable(&env, "HOME").unwrap_or_default().is_empty() {
        let home = identity
            .home
            .as_deref()
            .filter(|home| !home.is_empty())
            .unwrap_or("/");
        env.retain(|entry| !entry.starts_with("HOME="));
        env.push(format!("HOME={home}"));
    }
    let program = find_program(name, variable(&env, "PATH").unwrap_or_default())?;
    let program = CString::new(program).map_err(|_| SetupError::new("a NUL byte in the program's name"))?;
    let (args, env) = (c_strings(&process.args)?, c_strings(&env)?);
    sys::mark_all_close_on_exec().or_fail("close descriptors")?;
    let error = sys::execute(&program, &args, &env);
    Err(SetupError::new(format!(
        "exec {}: {}",
        program.to_string_lossy(),
        plain(&error)
    )))
}

fn variable<'a>(env: &'a [String], name: &str) -> Option<&'a str> {
    env.iter().find_map(|entry| {
        entry
            .split_once('=')
            .filter(|(key, _)| *key == name)
            .map(|(_, value)| value)
    })
}

/// Looks a program up as a shell does.
fn find_program(name: &str, path: &str) -> Result<Vec<u8>, SetupError> {
    if name.contains('/') {
        return match is_executable(name.as_bytes()) {
            Ok(()) => Ok(name.as_bytes().to_vec()),
            Err(error) => Err(SetupError::new(match error.kind() {
                io::ErrorKind::NotFound => format!("exec: {name:?}: stat {name}: {}", plain(&error)),
                _ => format!("exec: {name:?}: {}", plain(&error)),
            })),
        };
    }
    let mut denied = false;
    for directory in path.split(':') {
        let directory = if directory.is_empty() { "." } else { directory };
        let candidate = format!("{directory}/{name}").into_bytes();
        match is_executable(&candidate) {
            Ok(()) => return Ok(candidate),
            Err(error) => denied |= error.kind() == io::ErrorKind::PermissionDenied,
        }
    }
    let reason = if denied {
        "permission denied"
    } else {
        "executable file not found in $PATH"
    };
    Err(SetupError::new(format!("exec: {name:?}: {reason}")))
}

fn is_executable(path: &[u8]) -> io::Result<()> {
    let path = OsStr::from_bytes(path);
    let stat = rustix::fs::stat(path)?;
    match FileType::from_raw_mode(stat.st_mode) {
        FileType::Directory => Err(rustix::io::Errno::ISDIR.into()),
        _ => Ok(rustix::fs::accessat(
            CWD,
            path,
            Access::EXEC_OK,
            AtFlags::EACCESS,
        )?),
    }
}

//! The one generator of container specifications: every path that starts a process goes through here.
//!
//! A [`ContainerSpec`] is complete: whoever carries it out decides nothing about confinement any more.

use std::path::PathBuf;

use serde::{Deserialize, Serialize};

use crate::capability;
use crate::cdi::DeviceEdits;
use crate::error::RunError;
use crate::label::{ContainerLabels, ProcessLabels};
use crate::request::{
    ContainerMount, MountSource, Network, Process, Resources, RunRequest, Security, Ulimit,
};
use crate::telemetry;

pub(crate) const ATTR_RDONLY: u64 = 0x1;
pub(crate) const ATTR_NOSUID: u64 = 0x2;
pub(crate) const ATTR_NODEV: u64 = 0x4;
pub(crate) const ATTR_NOEXEC: u64 = 0x8;
pub(crate) const ATTR_STRICTATIME: u64 = 0x20;

const DEFAULT_HOSTNAME: &str = "buildkitsandbox";

/// Most mounts of one container.
const MAX_MOUNTS: usize = 4096;

/// Paths of `/proc` and `/sys` that tell or do too much; replaced by nothing.
const MASKED_PATHS: &[&str] = &[
    "/proc/acpi",
    "/proc/asound",
    "/proc/kcore",
    "/proc/keys",
    "/proc/latency_stats",
    "/proc/timer_list",
    "/proc/timer_stats",
    "/proc/sched_debug",
    "/proc/scsi",
    "/sys/firmware",
    "/sys/devices/virtual/powercap",
];

/// Paths of `/proc` that change the machine.
const READ_ONLY_PATHS: &[&str] = &[
    "/proc/bus",
    "/proc/fs",
    "/proc/irq",
    "/proc/sys",
    "/proc/sysrq-trigger",
];

/// Everything about a container.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub(crate) struct ContainerSpec {
    pub(crate) id: String,
    pub(crate) root: TreeSpec,
    pub(crate) read_only_root: bool,
    /// In the order in which they are made.
    pub(crate) mounts: Vec<MountSpec>,
    /// The SELinux context of file systems that are made for it; empty: none in particular.
    pub(crate) mount_label: String,
    pub(crate) masked_paths: Vec<String>,
    pub(crate) read_only_paths: Vec<String>,
    /// Nodes in `/dev` beside the usual ones; the device rules let them be used.
    pub(crate) devices: Vec<DeviceNode>,
    /// Programs of the host that an OCI runtime runs.
    pub(crate) hooks: Vec<HookSpec>,
    /// Whether the device rules let everything through.
    pub(crate) all_devices: bool,
    pub(crate) network: NetworkSpec,
    pub(crate) hostname: String,
    /// Absolute, without `.` and `..`; the container's cgroup is `<parent>/buildkit/<id>`, or `/buildkit/<id>` for `/`.
    pub(crate) cgroup_parent: String,
    pub(crate) resources: ResourceSpec,
    pub(crate) process: ProcessSpec,
    pub(crate) stubs_recursive: bool,
    pub(crate) oom_score_adj: Option<i32>,
    /// A certificate in PEM that is trusted for the time of the run.
    pub(crate) trusted_authority: Option<String>,
    /// An empty directory of the host on which things are mounted while the container is built.
    pub(crate) staging: PathBuf,
}

/// A container's network.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) enum NetworkSpec {
    /// The host's.
    Host,
    /// Its own, with a loopback device.
    Loopback,
    /// A namespace that is handed over with the specification.
    Given,
}

/// A snapshot's mount as plain data.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
pub(crate) struct TreeSpec {
    pub(crate) fstype: String,
    pub(crate) source: PathBuf,
    pub(crate) options: Vec<String>,
}

/// Something mounted into the container.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub(crate) struct MountSpec {
    pub(crate) target: String,
    pub(crate) kind: MountKind,
    /// `MOUNT_ATTR_*`.
    pub(crate) attributes: u64,
    /// Part of the source; empty: all.
    pub(crate) selector: String,
    /// Whether the mount point, if it has to be made, is removed after the run.
    pub(crate) stub: bool,
}

/// What is mounted.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub(crate) enum MountKind {
    /// A new instance of a file system of the kernel.
    Kernel {
        fstype: String,
        options: Vec<(String, String)>,
    },
    /// A snapshot.
    Tree(TreeSpec),
    /// A path of the host.
    Host(PathBuf),
    /// A tmpfs that has the mode of the directory it covers.
    Tmpfs { size_bytes: Option<u64> },
    /// A file in memory: a range of the frame's attachment.
    File {
        offset: usize,
        len: usize,
        uid: u32,
        gid: u32,
        mode: u32,
    },
    /// The container's own cgroups.
    Cgroup,
}

/// A device node.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct DeviceNode {
    /// Below `/dev`; parts are not `.` or `..`.
    pub(crate) name: String,
    pub(crate) block: bool,
    pub(crate) major: u32,
    pub(crate) minor: u32,
    /// Permission bits.
    pub(crate) mode: u32,
    pub(crate) uid: u32,
    pub(crate) gid: u32,
    /// What may be done with it: of `r`, `w` and `m`.
    pub(crate) access: String,
}

/// A program of the host that is run at a point of a container's life.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct HookSpec {
    /// `createContainer` and so on.
    pub(crate) point: String,
    pub(crate) path: String,
    pub(crate) args: Vec<String>,
    pub(crate) env: Vec<String>,
    pub(crate) timeout_s: Option<u32>,
}

/// Limits as the cgroup takes them; 0 or empty: none.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct ResourceSpec {
    pub(crate) memory_bytes: i64,
    pub(crate) memory_swap_bytes: i64,
    pub(crate) cpu_shares: u64,
    pub(crate) cpu_quota_us: i64,
    pub(crate) cpu_period_us: u64,
    pub(crate) cpuset_cpus: String,
    pub(crate) cpuset_mems: String,
}

/// Everything about a process.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct ProcessSpec {
    pub(crate) args: Vec<String>,
    pub(crate) env: Vec<String>,
    pub(crate) cwd: String,
    pub(crate) user: String,
    /// Groups beside those of the user.
    pub(crate) extra_groups: Vec<u32>,
    pub(crate) tty: bool,
    pub(crate) limits: Vec<LimitSpec>,
    pub(crate) capabilities: CapabilitySpec,
    pub(crate) seccomp: bool,
    pub(crate) no_new_privs: bool,
    pub(crate) labels: ProcessLabels,
}

/// A process limit; `None`: unlimited.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct LimitSpec {
    /// Without `RLIMIT_`, in small letters.
    pub(crate) name: String,
    pub(crate) soft: Option<u64>,
    pub(crate) hard: Option<u64>,
}

/// Capability sets as bits.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct CapabilitySpec {
    pub(crate) bounding: u64,
    pub(crate) effective: u64,
    pub(crate) permitted: u64,
    pub(crate) inheritable: u64,
    pub(crate) ambient: u64,
}

/// What the host contributes.
#[derive(Clone, Debug)]
pub(crate) struct HostFacts {
    /// The capabilities this process may hand on.
    pub(crate) capabilities: u64,
    pub(crate) resolv_conf: PathBuf,
    /// `None`: made of the request.
    pub(crate) hosts: Option<PathBuf>,
    pub(crate) staging: PathBuf,
    pub(crate) cgroup_parent: String,
    pub(crate) oom_score_adj: Option<i32>,
    /// The socket that takes spans; `None`: there is none.
    pub(crate) trace_socket: Option<PathBuf>,
    /// The labels of this container.
    pub(crate) labels: ContainerLabels,
    /// Device nodes for insecure containers.
    pub(crate) insecure_devices: Vec<DeviceNode>,
}

/// Makes the specification of a container, and the attachment with the content of its files.
pub(crate) fn container_spec(
    request: &RunRequest,
    facts: &HostFacts,
) -> Result<(ContainerSpec, Vec<u8>), RunError> {
    let insecure = request.security == Security::Insecure;
    let mut attachment = Vec::new();
    let mut mounts = system_mounts(facts, insecure);
    if facts.hosts.is_none() {
        let text = crate::hosts::hosts_file(&request.hostname, &request.extra_hosts)?;
        let kind = attach_file(&mut attachment, text.as_bytes(), (0, 0), 0o644);
        mounts.push(bound_file("/etc/hosts", kind));
    }
    mounts.push(MountSpec {
        target: "/sys/fs/cgroup".to_owned(),
        kind: MountKind::Cgroup,
        attributes: ATTR_NOSUID | ATTR_NOEXEC | ATTR_NODEV | if insecure { 0 } else { ATTR_RDONLY },
        selector: String::new(),
        stub: false,
    });
    let given = request
        .mounts
        .iter()
        .map(|mount| user_mount(mount, &mut attachment));
    for mount in given.chain(request.devices.mounts.iter().map(device_mount)) {
        let mount = mount?;
        match mounts.iter_mut().find(|earlier| earlier.target == mount.target) {
            Some(earlier) => *earlier = mount,
            None => mounts.push(mount),
        }
    }
    if let Some(socket) = &facts.trace_socket {
        mounts.retain(|earlier| earlier.target != telemetry::TARGET);
        mounts.push(bound_file(telemetry::TARGET, MountKind::Host(socket.clone())));
    }
    if mounts.len() > MAX_MOUNTS {
        return Err(invalid(format!("{} mounts are too many", mounts.len())));
    }
    let owned = |paths: &[&str]| paths.iter().map(|&path| path.to_owned()).collect();
    let spec = ContainerSpec {
        id: request.id.as_str().to_owned(),
        root: tree(&request.root.mounts, "the root file system")?,
        read_only_root: request.root.read_only,
        mounts,
        mount_label: facts.labels.mount.clone(),
        masked_paths: if insecure { Vec::new() } else { owned(MASKED_PATHS) },
        read_only_paths: if insecure {
            Vec::new()
        } else {
            owned(READ_ONLY_PATHS)
        },
        devices: devices(facts, &request.devices),
        hooks: request.devices.hooks.clone(),
        all_devices: insecure,
        network: match request.network {
            // A sandbox of its own is the executor's to give.
            Network::Sandbox | Network::Host => NetworkSpec::Host,
            Network::None => NetworkSpec::Loopback,
        },
        hostname: hostname(&request.hostname)?,
        cgroup_parent: cgroup_parent(&request.cgroup_parent, &facts.cgroup_parent)?,
        resources: resources(&request.resources)?,
        process: first_process(request, facts)?,
        stubs_recursive: request.remove_stubs_recursive,
        oom_score_adj: facts.oom_score_adj,
        trusted_authority: request.trusted_authority.clone(),
        staging: facts.staging.clone(),
    };
    Ok((spec, attachment))
}

/// The process of a container, with what its devices bring.
fn first_process(request: &RunRequest, facts: &HostFacts) -> Result<ProcessSpec, RunError> {
    let mut process = request.process.clone();
    if facts.trace_socket.is_some() {
        telemetry::add_environment(&mut process.env, request.trace_parent.as_deref());
    }
    // A device's variables replace those of the same name.
    process.env.extend(request.devices.env.iter().cloned());
    let mut spec = process_spec(&process, request.security, &request.ulimits, facts.capabilities)?;
    spec.extra_groups.clone_from(&request.devices.groups);
    spec.labels.clone_from(&facts.labels.process);
    Ok(spec)
}

/// Nodes that the container has beside the usual ones; of a path that is asked for twice the last counts.
fn devices(facts: &HostFacts, edits: &DeviceEdits) -> Vec<DeviceNode> {
    let mut devices = facts.insecure_devices.clone();
    for device in &edits.nodes {
        devices.retain(|earlier| earlier.name != device.name);
        devices.push(device.clone());
    }
    devices
}

fn device_mount((source, target, attributes): &(PathBuf, String, u64)) -> Result<MountSpec, RunError> {
    Ok(MountSpec {
        target: clean_target(target)?,
        kind: MountKind::Host(source.clone()),
        attributes: *attributes,
        selector: String::new(),
        stub: true,
    })
}

/// Makes the specification of a process, the first of a container or a further one, without the container's labels.
pub(crate) fn process_spec(
    process: &Process,
    security: Security,
    ulimits: &[Ulimit],
    available_capabilities: u64,
) -> Result<ProcessSpec, RunError> {
    if process.args.is_empty() || process.args.first().is_some_and(String::is_empty) {
        return Err(invalid("no program to run"));
    }
    let texts = process
        .args
        .iter()
        .chain(&process.env)
        .chain([&process.cwd, &process.user]);
    if texts.into_iter().any(|text| text.contains('\0')) {
        return Err(invalid("a NUL byte in arguments, environment, directory or user"));
    }
    let capabilities = match security {
        Security::Sandbox => {
            let set = capability::SANDBOX & available_capabilities;
            CapabilitySpec {
                bounding: set,
                effective: set,
                permitted: set,
                inheritable: 0,
                ambient: 0,
            }
        }
        Security::Insecure => {
            let set = available_capabilities;
            CapabilitySpec {
                bounding: set,
                effective: set,
                permitted: set,
                inheritable: set,
                ambient: set,
            }
        }
    };
    Ok(ProcessSpec {
        args: process.args.clone(),
        env: unique_env(&process.env),
        cwd: if process.cwd.is_empty() {
            "/".to_owned()
        } else {
            process.cwd.clone()
        },
        user: process.user.clone(),
        extra_groups: Vec::new(),
        tty: process.tty,
        limits: ulimits.iter().map(limit).collect::<Result<_, _>>()?,
        capabilities,
        seccomp: security == Security::Sandbox,
        // As BuildKit: programs such as sudo work in a build.
        no_new_privs: false,
        labels: ProcessLabels::default(),
    })
}

fn invalid(message: impl Into<String>) -> RunError {
    RunError::Invalid {
        message: message.into(),
    }
}

fn kernel(target: &str, fstype: &str, attributes: u64, options: &[(&str, &str)]) -> MountSpec {
    let options = options
        .iter()
        .map(|&(key, value)| (key.to_owned(), value.to_owned()))
        .collect();
    MountSpec {
        target: target.to_owned(),
        kind: MountKind::Kernel {
            fstype: fstype.to_owned(),
            options,
        },
        attributes,
        selector: String::new(),
        stub: false,
    }
}

fn bound_file(target: &str, kind: MountKind) -> MountSpec {
    MountSpec {
        target: target.to_owned(),
        kind,
        attributes: ATTR_NOSUID | ATTR_NOEXEC | ATTR_NODEV | ATTR_RDONLY,
        selector: String::new(),
        stub: true,
    }
}

fn system_mounts(facts: &HostFacts, insecure: bool) -> Vec<MountSpec> {
    const QUIET: u64 = ATTR_NOSUID | ATTR_NOEXEC | ATTR_NODEV;
    let pts = [
        ("newinstance", ""),
        ("ptmxmode", "0666"),
        ("mode", "0620"),
        ("gid", "5"),
    ];
    let mut mounts = vec![
        kernel("/proc", "proc", QUIET, &[]),
        kernel(
            "/dev",
            "tmpfs",
            ATTR_NOSUID | ATTR_STRICTATIME,
            &[("mode", "755"), ("size", "65536k")],
        ),
        kernel("/dev/pts", "devpts", ATTR_NOSUID | ATTR_NOEXEC, &pts),
        kernel(
            "/dev/shm",
            "tmpfs",
            QUIET,
            &[("mode", "1777"), ("size", "65536k")],
        ),
        kernel("/dev/mqueue", "mqueue", QUIET, &[]),
        kernel(
            "/sys",
            "sysfs",
            QUIET | if insecure { 0 } else { ATTR_RDONLY },
            &[],
        ),
        bound_file("/etc/resolv.conf", MountKind::Host(facts.resolv_conf.clone())),
    ];
    if let Some(hosts) = &facts.hosts {
        mounts.push(bound_file("/etc/hosts", MountKind::Host(hosts.clone())));
    }
    mounts
}

fn attach_file(attachment: &mut Vec<u8>, bytes: &[u8], (uid, gid): (u32, u32), mode: u32) -> MountKind {
    let offset = attachment.len();
    attachment.extend_from_slice(bytes);
    MountKind::File {
        offset,
        len: bytes.len(),
        uid,
        gid,
        mode: mode & 0o777,
    }
}

fn user_mount(mount: &ContainerMount, attachment: &mut Vec<u8>) -> Result<MountSpec, RunError> {
    let target = clean_target(&mount.target)?;
    if mount.selector.contains('\0') {
        return Err(invalid("a NUL byte in a mount's source path"));
    }
    let read_only = if mount.read_only { ATTR_RDONLY } else { 0 };
    let (kind, attributes) = match &mount.source {
        MountSource::Snapshot(mounts) => (
            MountKind::Tree(tree(mounts, &format!("mount {target}"))?),
            read_only,
        ),
        MountSource::Host(path) => (MountKind::Host(path.clone()), read_only),
        MountSource::Tmpfs { size_bytes } => (
            MountKind::Tmpfs {
                size_bytes: size_bytes.filter(|&size| size > 0),
            },
            ATTR_NOSUID | read_only,
        ),
        MountSource::File(file) => {
            let no_exec = if file.mode & 0o111 == 0 { ATTR_NOEXEC } else { 0 };
            let kind = attach_file(attachment, &file.bytes, (file.uid, file.gid), file.mode);
            (kind, ATTR_RDONLY | ATTR_NODEV | ATTR_NOSUID | no_exec)
        }
    };
    Ok(MountSpec {
        target,
        kind,
        attributes,
        selector: mount.selector.clone(),
        stub: true,
    })
}

/// Cleans a mount's target textually, as `path.Clean` does.
fn clean_target(target: &str) -> Result<String, RunError> {
    if !target.starts_with('/') || target.contains('\0') {
        return Err(invalid(format!(
            "mount target {target:?} is not an absolute path"
        )));
    }
    let mut parts: Vec<&str> = Vec::new();
    for part in target.split('/') {
        match part {
            "" | "." => {}
            ".." => drop(parts.pop()),
            part => parts.push(part),
        }
    }
    let clean = format!("/{}", parts.join("/"));
    match parts.first() {
        None => Err(invalid("mount target / is the root file system itself")),
        Some(&"proc") => Err(invalid(format!(
            "{clean:?} cannot be mounted because it is inside /proc"
        ))),
        Some(_) => Ok(clean),
    }
}

fn tree(mounts: &[snapshot::Mount], what: &str) -> Result<TreeSpec, RunError> {
    let [mount] = mounts else {
        return Err(invalid(format!(
            "{what} has {} mounts instead of one",
            mounts.len()
        )));
    };
    if !mount.target.as_os_str().is_empty() {
        return Err(invalid(format!("{what} is mounted below its mount point")));
    }
    let text = |option: &std::ffi::OsString| {
        option
            .to_str()
            .map(str::to_owned)
            .ok_or_else(|| invalid(format!("{what} is mounted with a path that is not UTF-8")))
    };
    let options = mount.options.iter().map(text).collect::<Result<_, _>>()?;
    Ok(TreeSpec {
        fstype: mount.fstype.clone(),
        source: mount.source.clone(),
        options,
    })
}

fn hostname(hostname: &str) -> Result<String, RunError> {
    if hostname.is_empty() {
        return Ok(DEFAULT_HOSTNAME.to_owned());
    }
    if hostname.len() > 64 || hostname.contains(['\0', '\n']) {
        return Err(invalid(format!("invalid host name {hostname:?}")));
    }
    Ok(hostname.to_owned())
}

fn cgroup_parent(asked: &str, default: &str) -> Result<String, RunError> {
    let parent = if asked.is_empty() { default } else { asked };
    let mut parts = Vec::new();
    for part in parent.trim_end_matches(':').split('/') {
        match part {
            "" | "." => {}
            ".." => return Err(invalid(format!("cgroup parent {parent:?} leads upwards"))),
            part if part.contains(['\0', '\n']) => return Err(invalid("invalid cgroup parent")),
            part => parts.push(part),
        }
    }
    Ok(format!("/{}", parts.join("/")))
}

fn resources(resources: &Resources) -> Result<ResourceSpec, RunError> {
    let list = |text: &str, what: &str| {
        if text
            .bytes()
            .all(|byte| byte.is_ascii_digit() || byte == b',' || byte == b'-')
        {
            Ok(text.to_owned())
        } else {
            Err(invalid(format!("invalid {what} list {text:?}")))
        }
    };
    for (what, value, least) in [
        ("memory", resources.memory_bytes, 0),
        ("memory and swap", resources.memory_swap_bytes, -1),
        ("CPU quota", resources.cpu_quota_us, -1),
    ] {
        if value < least {
            return Err(invalid(format!("invalid {what} limit {value}")));
        }
    }
    Ok(ResourceSpec {
        memory_bytes: resources.memory_bytes,
        memory_swap_bytes: resources.memory_swap_bytes,
        cpu_shares: resources.cpu_shares,
        cpu_quota_us: resources.cpu_quota_us,
        cpu_period_us: resources.cpu_period_us,
        cpuset_cpus: list(&resources.cpuset_cpus, "CPU")?,
        cpuset_mems: list(&resources.cpuset_mems, "memory node")?,
    })
}

/// The limits' names, as `ulimits` and `RLIMIT_` spell them.
pub(crate) const LIMIT_NAMES: &[&str] = &[
    "as",
    "core",
    "cpu",
    "data",
    "fsize",
    "locks",
    "memlock",
    "msgqueue",
    "nice",
    "nofile",
    "nproc",
    "rss",
    "rtprio",
    "rttime",
    "sigpending",
    "stack",
];

fn limit(limit: &Ulimit) -> Result<LimitSpec, RunError> {
    let name = limit.name.to_ascii_lowercase();
    if !LIMIT_NAMES.contains(&name.as_str()) {
        return Err(invalid(format!("unknown ulimit {:?}", limit.name)));
    }
    // -1 is `RLIM_INFINITY`; other negative values have no meaning.
    let value = |value: i64| match value {
        -1 => Ok(None),
        value => u64::try_from(value)
            .map(Some)
            .map_err(|_| invalid(format!("invalid value {value} of ulimit {name:?}"))),
    };
    let (soft, hard) = (value(limit.soft)?, value(limit.hard)?);
    if hard.is_some_and(|hard| soft.is_none_or(|soft| soft > hard)) {
        return Err(invalid(format!(
            "ulimit {name:?}: the soft limit is above the hard one"
        )));
    }
    Ok(LimitSpec { name, soft, hard })
}

/// Keeps one value of each variable: the last, at the place of the first.
fn unique_env(env: &[String]) -> Vec<String> {
    let mut places = std::collections::BTreeMap::new();
    let mut unique: Vec<String> = Vec::with_capacity(env.len());
    for entry in env {
        let name = entry.split_once('=').map_or(entry.as_str(), |(name, _)| name);
        match places.get(name) {
            Some(&place) => unique[place] = entry.clone(),
            None => {
                places.insert(name, unique.len());
                unique.push(entry.clone());
            }
        }
    }
    unique
}

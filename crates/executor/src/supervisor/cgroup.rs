//! Control groups: where containers' are, what they limit, and what they tell afterwards.
//!
//! On version 1 every hierarchy has a directory of its own; a container joins `devices` (its device rules) and `memory`
//! (to learn of a lack of memory), and all of them when it has limits or a parent of its own. On version 2 there is one
//! directory, and a container is born in it.

use std::fs;
use std::io;
use std::os::fd::OwnedFd;
use std::path::{Path, PathBuf};

use rustix::fs::{Mode, OFlags};

use crate::spec::{DeviceNode, ResourceSpec};

/// Where hierarchies are mounted.
pub(crate) const MOUNT_POINT: &str = "/sys/fs/cgroup";

/// The version 1 hierarchies every container joins.
const ALWAYS: &[&str] = &["devices", "memory"];

/// Devices that a sandboxed process may use; everything else it may at most make nodes for.
pub(crate) const ALLOWED_DEVICES: &[(char, u32, Option<u32>)] = &[
    ('c', 1, Some(3)), // null
    ('c', 1, Some(5)), // zero
    ('c', 1, Some(7)), // full
    ('c', 1, Some(8)), // random
    ('c', 1, Some(9)), // urandom
    ('c', 5, Some(0)), // tty
    ('c', 5, Some(2)), // ptmx
    ('c', 136, None),  // pts
];

/// A version 1 hierarchy.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Hierarchy {
    /// Its controllers, or its name.
    pub(crate) controllers: Vec<String>,
    pub(crate) mount: PathBuf,
}

/// How this machine's control groups are mounted.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(crate) struct Layout {
    /// Version 2 at [`MOUNT_POINT`].
    pub(crate) unified: bool,
    pub(crate) hierarchies: Vec<Hierarchy>,
}

impl Layout {
    /// Looks at this process' mounts.
    pub(crate) fn probe() -> io::Result<Self> {
        Ok(Self::parse(&fs::read_to_string("/proc/self/mountinfo")?))
    }

    /// Whether there is anything to put containers into.
    pub(crate) fn is_usable(&self) -> bool {
        self.unified || !self.hierarchies.is_empty()
    }

    fn parse(mountinfo: &str) -> Self {
        let mut layout = Self::default();
        for line in mountinfo.lines() {
            let Some((left, right)) = line.split_once(" - ") else {
                continue;
            };
            let Some(point) = left.split(' ').nth(4) else {
                continue;
            };
            let mut right = right.split(' ');
            let (fstype, options) = (right.next().unwrap_or_default(), right.nth(1).unwrap_or_default());
            match fstype {
                "cgroup2" if point == MOUNT_POINT => layout.unified = true,
                "cgroup" if Path::new(point).parent() == Some(Path::new(MOUNT_POINT)) => {
                    let is_controller = |option: &&str| !matches!(*option, "rw" | "ro" | "xattr" | "none");
                    let controllers: Vec<String> = options
                        .split(',')
                        .filter(is_controller)
                        .filter(|option| !option.starts_with("release_agent="))
                        .map(|option| option.strip_prefix("name=").unwrap_or(option).to_owned())
                        .collect();
                    let mount = PathBuf::from(point);
                    if !layout.hierarchies.iter().any(|known| known.mount == mount) {
                        layout.hierarchies.push(Hierarchy { controllers, mount });
                    }
                }
                _ => {}
            }
        }
        if layout.unified {
            layout.hierarchies.clear();
        }
        layout
    }

    fn hierarchy_of(&self, controller: &str) -> Option<&Hierarchy> {
        self.hierarchies
            .iter()
            .find(|hierarchy| hierarchy.controllers.iter().any(|own| own == controller))
    }
}

/// A container's cgroup, in whatever hierarchies there are.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Cgroup {
    layout: Layout,
    /// Relative to a hierarchy's mount.
    path: PathBuf,
    /// Whether it is in all version 1 hierarchies.
    everywhere: bool,
}

impl Cgroup {
    /// Names the cgroup of a container. `parent` is absolute and clean.
    pub(crate) fn new(layout: &Layout, parent: &str, id: &str, everywhere: bool) -> Self {
        let path = Path::new(parent.trim_start_matches('/'))
            .join("buildkit")
            .join(id);
        Self {
            layout: layout.clone(),
            path,
            everywhere,
        }
    }

    /// Its directories in the version 1 hierarchies that it is in.
    pub(crate) fn directories(&self) -> impl Iterator<Item = (&Hierarchy, PathBuf)> {
        let joins = |hierarchy: &&Hierarchy| {
            self.everywhere
                || hierarchy
                    .controllers
                    .iter()
                    .any(|own| ALWAYS.contains(&own.as_str()))
        };
        self.layout
            .hierarchies
            .iter()
            .filter(joins)
            .map(|hierarchy| (hierarchy, hierarchy.mount.join(&self.path)))
    }

    /// Whether this is a version 2 cgroup.
    pub(crate) fn is_unified(&self) -> bool {
        self.layout.unified
    }

    fn unified_directory(&self) -> PathBuf {
        Path::new(MOUNT_POINT).join(&self.path)
    }

    /// Makes the version 2 directory and opens it; enables controllers on the way as far as they can be.
    pub(crate) fn create_unified(&self) -> io::Result<OwnedFd> {
        let directory = self.unified_directory();
        let mut above = PathBuf::from(MOUNT_POINT);
        let mut parts = self.path.components().peekable();
        while let Some(part) = parts.next() {
            enable_controllers(&above);
            above.push(part);
            match fs::create_dir(&above) {
                Err(error) if error.kind() == io::ErrorKind::AlreadyExists && parts.peek().is_some() => {}
                result => result?,
            }
        }
        Ok(rustix::fs::open(
            &directory,
            OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC,
            Mode::empty(),
        )?)
    }

    /// Makes the version 1 directories and moves this process into them.
    pub(crate) fn join(&self) -> io::Result<()> {
        for (hierarchy, directory) in self.directories() {
            create_all(&hierarchy.mount, &self.path)?;
            if hierarchy.controllers.iter().any(|own| own == "cpuset") {
                inherit_cpuset(&hierarchy.mount, &self.path)?;
            }
            fs::write(directory.join("cgroup.procs"), "0")?;
        }
        Ok(())
    }

    /// Moves this process in, whatever the version.
    pub(crate) fn enter(&self) -> io::Result<()> {
        if self.is_unified() {
            return fs::write(self.unified_directory().join("cgroup.procs"), "0");
        }
        for (_, directory) in self.directories() {
            fs::write(directory.join("cgroup.procs"), "0")?;
        }
        Ok(())
    }

    fn devices_directory(&self) -> io::Result<PathBuf> {
        let hierarchy = self
            .layout
            .hierarchy_of("devices")
            .ok_or_else(|| io::Error::new(io::ErrorKind::Unsupported, "there is no devices cgroup"))?;
        Ok(hierarchy.mount.join(&self.path))
    }

    /// Sets the version 1 device rules.
    pub(crate) fn restrict_devices(&self) -> io::Result<()> {
        let directory = self.devices_directory()?;
        fs::write(directory.join("devices.deny"), "a")?;
        let allow = directory.join("devices.allow");
        for rule in ["c *:* m", "b *:* m"] {
            fs::write(&allow, rule)?;
        }
        for (kind, major, minor) in ALLOWED_DEVICES {
            let minor = minor.map_or("*".to_owned(), |minor| minor.to_string());
            fs::write(&allow, format!("{kind} {major}:{minor} rwm"))?;
        }
        Ok(())
    }

    /// Adds version 1 device rules to the usual ones.
    pub(crate) fn allow_devices(&self, devices: &[DeviceNode]) -> io::Result<()> {
        if devices.is_empty() {
            return Ok(());
        }
        let allow = self.devices_directory()?.join("devices.allow");
        for device in devices {
            let kind = if device.block { 'b' } else { 'c' };
            let rule = format!("{kind} {}:{} {}", device.major, device.minor, device.access);
            fs::write(&allow, rule)?;
        }
        Ok(())
    }

    /// Sets limits.
    pub(crate) fn limit(&self, resources: &ResourceSpec) -> io::Result<()> {
        let settings = if self.is_unified() {
            unified_settings(resources)
        } else {
            settings(resources)
        };
        for (controller, file, value) in settings {
            let path = if self.is_unified() {
                self.unified_directory().join(file)
            } else {
                let hierarchy = self.layout.hierarchy_of(controller).ok_or_else(|| {
                    io::Error::new(
                        io::ErrorKind::Unsupported,
                        format!("there is no {controller} cgroup"),
                    )
                })?;
                hierarchy.mount.join(&self.path).join(file)
            };
            fs::write(&path, &value)
                .map_err(|error| io::Error::new(error.kind(), format!("{file} = {value}: {error}")))?;
        }
        Ok(())
    }

    /// Whether the kernel killed something in it for lack of memory.
    pub(crate) fn was_oom_killed(&self) -> bool {
        let path = if self.is_unified() {
            self.unified_directory().join("memory.events")
        } else if let Some(hierarchy) = self.layout.hierarchy_of("memory") {
            hierarchy.mount.join(&self.path).join("memory.oom_control")
        } else {
            return false;
        };
        let text = fs::read_to_string(path).unwrap_or_default();
        let count = text.lines().find_map(|line| line.strip_prefix("oom_kill "));
        count.is_some_and(|count| count.trim() != "0")
    }

    /// Removes it with whatever was made below it. It must be empty of processes.
    pub(crate) fn remove(&self) {
        if self.is_unified() {
            remove_tree(&self.unified_directory());
        } else {
            for (_, directory) in self.directories() {
                remove_tree(&directory);
            }
        }
    }
}

fn enable_controllers(directory: &Path) {
    let Ok(available) = fs::read_to_string(directory.join("cgroup.controllers")) else {
        return;
    };
    for controller in available.split_whitespace() {
        // A controller that cannot be enabled is noticed when a limit needs it.
        let _ = fs::write(directory.join("cgroup.subtree_control"), format!("+{controller}"));
    }
}

fn create_all(mount: &Path, path: &Path) -> io::Result<()> {
    let directory = mount.join(path);
    match fs::create_dir(&directory) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => fs::create_dir_all(directory),
        result => result,
    }
}

/// A new cpuset is empty and takes no process until it has CPUs and memory nodes.
fn inherit_cpuset(mount: &Path, path: &Path) -> io::Result<()> {
    let mut directory = mount.to_owned();
    for part in path.components() {
        for file in ["cpuset.cpus", "cpuset.mems"] {
            let own = directory.join(part).join(file);
            if fs::read_to_string(&own)?.trim().is_empty() {
                fs::write(own, fs::read_to_string(directory.join(file))?)?;
            }
        }
        directory.push(part);
    }
    Ok(())
}

/// Removes a cgroup and those below it. Each level is a directory of which only directories can be removed.
fn remove_tree(directory: &Path) {
    if fs::remove_dir(directory).is_ok() {
        return;
    }
    if let Ok(entries) = fs::read_dir(directory) {
        for entry in entries.flatten() {
            if entry.file_type().is_ok_and(|kind| kind.is_dir()) {
                remove_tree(&entry.path());
            }
        }
    }
    // What stays is empty and harmless.
    let _ = fs::remove_dir(directory);
}

type Setting = (&'static str, &'static str, String);

fn settings(resources: &ResourceSpec) -> Vec<Setting> {
    let mut all = Vec::new();
    let mut set = |wanted: bool, controller, file, value: String| {
        if wanted {
            all.push((controller, file, value));
        }
    };
    let r = resources;
    set(
        r.memory_bytes != 0,
        "memory",
        "memory.limit_in_bytes",
        r.memory_bytes.to_string(),
    );
    set(
        r.memory_swap_bytes != 0,
        "memory",
        "memory.memsw.limit_in_bytes",
        r.memory_swap_bytes.to_string(),
    );
    set(r.cpu_shares != 0, "cpu", "cpu.shares", r.cpu_shares.to_string());
    set(
        r.cpu_period_us != 0,
        "cpu",
        "cpu.cfs_period_us",
        r.cpu_period_us.to_string(),
    );
    set(
        r.cpu_quota_us != 0,
        "cpu",
        "cpu.cfs_quota_us",
        r.cpu_quota_us.to_string(),
    );
    set(
        !r.cpuset_cpus.is_empty(),
        "cpuset",
        "cpuset.cpus",
        r.cpuset_cpus.clone(),
    );
    set(
        !r.cpuset_mems.is_empty(),
        "cpuset",
        "cpuset.mems",
        r.cpuset_mems.clone(),
    );
    all
}

fn unified_settings(resources: &ResourceSpec) -> Vec<Setting> {
    let mut all = Vec::new();
    let r = resources;
    if r.memory_bytes != 0 {
        all.push(("memory", "memory.max", r.memory_bytes.to_string()));
    }
    match r.memory_swap_bytes {
        0 => {}
        -1 => all.push(("memory", "memory.swap.max", "max".to_owned())),
        // Here swap is counted apart from memory.
        both => all.push((
            "memory",
            "memory.swap.max",
            both.saturating_sub(r.memory_bytes).max(0).to_string(),
        )),
    }
    if r.cpu_shares != 0 {
        let shares = r.cpu_shares.clamp(2, 262_144);
        all.push((
            "cpu",
            "cpu.weight",
            (1 + (shares - 2) * 9_999 / 262_142).to_string(),
        ));
    }
    if r.cpu_quota_us != 0 || r.cpu_period_us != 0 {
        let quota = if r.cpu_quota_us > 0 {
            r.cpu_quota_us.to_string()
        } else {
            "max".to_owned()
        };
        let period = if r.cpu_period_us == 0 {
            100_000
        } else {
            r.cpu_period_us
        };
        all.push(("cpu", "cpu.max", format!("{quota} {period}")));
    }
    if !r.cpuset_cpus.is_empty() {
        all.push(("cpuset", "cpuset.cpus", r.cpuset_cpus.clone()));
    }
    if !r.cpuset_mems.is_empty() {
        all.push(("cpuset", "cpuset.mems", r.cpuset_mems.clone()));
    }
    all
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn hierarchies_are_found_in_mountinfo() {
        let hybrid = "29 23 0:26 / /sys/fs/cgroup rw - tmpfs tmpfs rw,mode=755\n\
            30 29 0:27 / /sys/fs/cgroup/cpu,cpuacct rw shared:9 - cgroup cgroup rw,cpu,cpuacct\n\
            31 29 0:28 / /sys/fs/cgroup/systemd rw - cgroup cgroup rw,xattr,name=systemd\n\
            32 29 0:29 / /sys/fs/cgroup/unified rw - cgroup2 cgroup2 rw\n";
        let layout = Layout::parse(hybrid);
        assert!(!layout.unified);
        assert_eq!(layout.hierarchies.len(), 2);
        assert_eq!(
            layout.hierarchy_of("cpuacct").unwrap().mount,
            Path::new("/sys/fs/cgroup/cpu,cpuacct")
        );
        assert_eq!(layout.hierarchies[1].controllers, ["systemd"]);

        let unified = Layout::parse("30 23 0:27 / /sys/fs/cgroup rw - cgroup2 cgroup rw,nsdelegate\n");
        assert!(unified.unified && unified.hierarchies.is_empty());
    }

    #[test]
    fn limits_are_translated_for_version_2() {
        let resources = ResourceSpec {
            memory_bytes: 64 << 20,
            memory_swap_bytes: 96 << 20,
            cpu_shares: 1024,
            cpu_quota_us: 50_000,
            cpu_period_us: 0,
            cpuset_cpus: "0".to_owned(),
            cpuset_mems: String::new(),
        };
        let values: Vec<String> = unified_settings(&resources)
            .into_iter()
            .map(|(_, file, value)| format!("{file}={value}"))
            .collect();
        assert_eq!(
            values,
            [
                "memory.max=67108864",
                "memory.swap.max=33554432",
                "cpu.weight=39",
                "cpu.max=50000 100000",
                "cpuset.cpus=0"
            ]
        );
    }
}

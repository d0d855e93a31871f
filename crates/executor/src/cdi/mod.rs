//! Devices of the host that containers can be given, as the Container Device Interface describes them.
//!
//! A [`DeviceRegistry`] knows the directories of specifications; [`DeviceRegistry::scan`] reads them as they are now into
//! [`Devices`]. Files that cannot be used are left out and reported: one vendor's mistake costs only its own devices.

mod document;
mod spec;

use std::collections::{BTreeMap, BTreeSet};
use std::io::{self, Read as _};
use std::os::unix::fs::{FileTypeExt as _, MetadataExt as _};
use std::path::{Path, PathBuf};
use std::sync::Arc;

use self::spec::{Bind, Edits, Hook, Node, Specification};
use crate::error::RunError;
use crate::spec::{ATTR_NODEV, ATTR_NOEXEC, ATTR_NOSUID, ATTR_RDONLY, DeviceNode, HookSpec};

/// Longest file that is read.
const MAX_FILE_BYTES: u64 = 4 << 20;
/// Most files of a directory that are read.
const MAX_FILES: usize = 1024;
/// Names the class of a device; asking for the class gives all its devices.
const CLASS: &str = "org.mobyproject.buildkit.device.class";
/// Makes a device available to builds without the right to it.
const AUTO_ALLOW: &str = "org.mobyproject.buildkit.device.autoallow";

/// Where devices are described, and which of them need no right. Cheap to clone; the default has none.
#[derive(Clone, Debug, Default)]
pub struct DeviceRegistry {
    inner: Arc<Places>,
}

#[derive(Debug, Default)]
struct Places {
    dirs: Vec<PathBuf>,
    auto_allowed: BTreeSet<String>,
}

/// Why a file of a specification directory does not count.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{}: {reason}", path.display())]
pub struct DeviceFileError {
    /// The file or directory.
    pub path: PathBuf,
    /// What is wrong with it.
    pub reason: String,
}

/// The devices there are at one time.
#[derive(Clone, Debug, Default)]
pub struct Devices {
    known: BTreeMap<String, Known>,
    auto_allowed: BTreeSet<String>,
    problems: Vec<DeviceFileError>,
}

#[derive(Clone, Debug)]
struct Known {
    annotations: BTreeMap<String, String>,
    /// Those of its file and its own.
    edits: [Edits; 2],
    file: PathBuf,
    /// Which directory it is from; later ones win.
    rank: usize,
}

/// A device as it is listed.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct DeviceListing {
    /// `vendor/class=name`.
    pub name: String,
    /// What its specification says beside, e.g. its class.
    pub annotations: BTreeMap<String, String>,
    /// Whether builds may use it without the right to it.
    pub auto_allowed: bool,
}

/// What becomes of a container that gets devices. The default changes nothing.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct DeviceEdits {
    pub(crate) env: Vec<String>,
    pub(crate) nodes: Vec<DeviceNode>,
    /// Source, target and `MOUNT_ATTR_*`.
    pub(crate) mounts: Vec<(PathBuf, String, u64)>,
    pub(crate) hooks: Vec<HookSpec>,
    pub(crate) groups: Vec<u32>,
}

impl DeviceRegistry {
    /// Makes a registry of `dirs`, of which later ones win. `auto_allowed` names devices (`vendor/class=name`) or kinds
    /// (`vendor/class`) that need no right.
    pub fn new(dirs: Vec<PathBuf>, auto_allowed: impl IntoIterator<Item = String>) -> Self {
        let auto_allowed = auto_allowed.into_iter().collect();
        Self {
            inner: Arc::new(Places { dirs, auto_allowed }),
        }
    }

    /// Reads all specifications as they are now. Blocking; directories that do not exist have none.
    pub fn scan(&self) -> Devices {
        let mut devices = Devices {
            auto_allowed: self.inner.auto_allowed.clone(),
            ..Devices::default()
        };
        let mut conflicts = BTreeSet::new();
        for (rank, dir) in self.inner.dirs.iter().enumerate() {
            for path in devices.files(dir) {
                match read(&path) {
                    Ok(specification) => devices.add(specification, &path, rank, &mut conflicts),
                    Err(reason) => devices.problems.push(DeviceFileError { path, reason }),
                }
            }
        }
        devices
    }
}

fn read(path: &Path) -> Result<Specification, String> {
    let failed = |error: io::Error| error.to_string();
    let file = std::fs::File::open(path).map_err(failed)?;
    let mut text = String::new();
    file.take(MAX_FILE_BYTES + 1)
        .read_to_string(&mut text)
        .map_err(failed)?;
    if u64::try_from(text.len()).is_ok_and(|len| len > MAX_FILE_BYTES) {
        return Err(format!("it exceeds {MAX_FILE_BYTES} bytes"));
    }
    let is_json = path.extension().is_some_and(|extension| extension == "json");
    let document = if is_json {
        document::json(&text)
    } else {
        document::yaml(&text)
    };
    Specification::read(document?)
}

impl Devices {
    /// Lists the files of a directory that are specifications by name, sorted.
    fn files(&mut self, dir: &Path) -> Vec<PathBuf> {
        let entries = match std::fs::read_dir(dir) {
            Ok(entries) => entries,
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Vec::new(),
            Err(error) => {
                self.problem(dir, error.to_string());
                return Vec::new();
            }
        };
        let mut files: Vec<PathBuf> = entries
            .flatten()
            .map(|entry| entry.path())
            // A pipe would be waited for.
            .filter(|path| {
                path.extension()
                    .is_some_and(|extension| extension == "json" || extension == "yaml")
                    && path.is_file()
            })
            .collect();
        files.sort();
        if files.len() > MAX_FILES {
            self.problem(dir, format!("only the first {MAX_FILES} files are read"));
            files.truncate(MAX_FILES);
        }
        files
    }

    fn problem(&mut self, path: &Path, reason: String) {
        self.problems.push(DeviceFileError {
            path: path.to_owned(),
            reason,
        });
    }

    fn add(
        &mut self,
        found: Specification,
        file: &Path,
        rank: usize,
        conflicts: &mut BTreeSet<(usize, String)>,
    ) {
        for device in found.devices {
            let name = format!("{}={}", found.kind, device.name);
            let earlier = self.known.get(&name).filter(|earlier| earlier.rank == rank);
            if let Some(earlier) = earlier {
                let reason = format!("device {name} is also in {}", earlier.file.display());
                self.problem(file, reason);
                self.known.remove(&name);
                conflicts.insert((rank, name));
                continue;
            }
            if conflicts.contains(&(rank, name.clone())) {
                continue;
            }
            let mut annotations = found.annotations.clone();
            annotations.extend(device.annotations);
            let known = Known {
                annotations,
                edits: [found.edits.clone(), device.edits],
                file: file.to_owned(),
                rank,
            };
            self.known.insert(name, known);
        }
    }

    /// Lists all devices by name.
    pub fn list(&self) -> Vec<DeviceListing> {
        let listing = |(name, known): (&String, &Known)| DeviceListing {
            name: name.clone(),
            annotations: known.annotations.clone(),
            auto_allowed: self.is_auto_allowed(name),
        };
        self.known.iter().map(listing).collect()
    }

    /// Lists the files that do not count.
    pub fn problems(&self) -> &[DeviceFileError] {
        &self.problems
    }

    /// Tells whether a device needs no right.
    pub fn is_auto_allowed(&self, name: &str) -> bool {
        let kind = name.split_once('=').map_or(name, |(kind, _)| kind);
        let is_true = |value: &String| matches!(value.as_str(), "1" | "t" | "T" | "true" | "TRUE" | "True");
        self.auto_allowed.contains(name)
            || self.auto_allowed.contains(kind)
            || self
                .known
                .get(name)
                .and_then(|known| known.annotations.get(AUTO_ALLOW))
                .is_some_and(is_true)
    }

    /// Finds the devices that a request means: `vendor/class=name` that one, `vendor/class=*` all of the kind,
    /// `vendor/class` the first of it by name; else all whose class is the request's text. Empty if there are none.
    pub fn find(&self, request: &str) -> Vec<String> {
        let (kind, name) = request.split_once('=').unwrap_or((request, ""));
        let mut found: Vec<String> = Vec::new();
        if spec::split_kind(kind).is_some() {
            let prefix = format!("{kind}=");
            let mut of_kind = self
                .known
                .keys()
                .filter(|known| known.starts_with(&prefix))
                .cloned();
            match name {
                "" => found.extend(of_kind.next()),
                "*" => found.extend(of_kind),
                _ => found.extend(of_kind.find(|known| known == request)),
            }
        }
        if found.is_empty() {
            let is_of_class =
                |known: &Known| known.annotations.get(CLASS).is_some_and(|class| class == request);
            let of_class = self.known.iter().filter(|(_, known)| is_of_class(known));
            found.extend(of_class.map(|(name, _)| name.clone()));
        }
        found
    }

    /// Puts together what containers get with these devices, each counted once. Blocking: it looks at device nodes.
    ///
    /// # Errors
    /// [`RunError::Invalid`] for a device that is not there or that asks for what cannot be done.
    pub fn edits<'n>(&self, names: impl IntoIterator<Item = &'n str>) -> Result<DeviceEdits, RunError> {
        let names: BTreeSet<&str> = names.into_iter().collect();
        let (mut edits, mut files) = (DeviceEdits::default(), BTreeSet::new());
        for name in names {
            let invalid = |reason: String| RunError::Invalid {
                message: format!("device {name}: {reason}"),
            };
            let known = self.known.get(name);
            let known = known.ok_or_else(|| invalid("it is not registered".to_owned()))?;
            // What a file's devices have in common comes once.
            let common = files.insert(&known.file).then_some(&known.edits[0]);
            for part in common.into_iter().chain([&known.edits[1]]) {
                edits.add(part).map_err(invalid)?;
            }
        }
        Ok(edits)
    }
}

impl DeviceEdits {
    /// Whether a container stays as it is.
    pub fn is_empty(&self) -> bool {
        *self == Self::default()
    }

    fn add(&mut self, edits: &Edits) -> Result<(), String> {
        if let Some(part) = edits.unsupported {
            return Err(format!("{part} are not supported"));
        }
        self.env.extend(edits.env.iter().cloned());
        for node in &edits.nodes {
            self.nodes.push(resolve(node)?);
        }
        for bind in &edits.mounts {
            self.mounts.push(mount(bind)?);
        }
        self.hooks.extend(edits.hooks.iter().map(host_hook));
        let groups = edits.groups.iter().filter(|group| **group != 0);
        self.groups.extend(groups);
        Ok(())
    }
}

fn host_hook(hook: &Hook) -> HookSpec {
    HookSpec {
        point: hook.point.clone(),
        path: hook.path.clone(),
        args: hook.args.clone(),
        env: hook.env.clone(),
        timeout_s: hook.timeout_s,
    }
}

/// Completes a node by what the host's is.
fn resolve(node: &Node) -> Result<DeviceNode, String> {
    let name = node
        .path
        .strip_prefix("/dev/")
        .filter(|name| name.split('/').all(|part| !matches!(part, "" | "." | "..")));
    let name = name.ok_or_else(|| format!("device node {:?} is not below /dev", node.path))?;
    let mut resolved = DeviceNode {
        name: name.to_owned(),
        block: node.kind == "b",
        major: node.major,
        minor: node.minor,
        mode: node.mode.unwrap_or(0o666),
        uid: node.uid.unwrap_or(0),
        gid: node.gid.unwrap_or(0),
        access: if node.access.is_empty() {
            "rwm".to_owned()
        } else {
            node.access.clone()
        },
    };
    if node.kind == "p" {
        return Err(format!(
            "device node {:?} is a pipe, which is not supported",
            node.path
        ));
    }
    if !node.kind.is_empty() && node.major != 0 {
        return Ok(resolved);
    }
    let host = if node.host_path.is_empty() {
        &node.path
    } else {
        &node.host_path
    };
    let metadata = std::fs::symlink_metadata(host).map_err(|error| format!("{host}: {error}"))?;
    let kind = metadata.file_type();
    if !kind.is_block_device() && !kind.is_char_device() {
        return Err(format!("{host} is no device node"));
    }
    let is_same = match node.kind.as_str() {
        "" => true,
        "b" => kind.is_block_device(),
        _ => kind.is_char_device(),
    };
    if !is_same {
        return Err(format!("{host} is a device node of another type"));
    }
    let number = metadata.rdev();
    (resolved.major, resolved.minor) = (rustix::fs::major(number), rustix::fs::minor(number));
    resolved.block = kind.is_block_device();
    resolved.mode = node.mode.unwrap_or(metadata.mode() & 0o777);
    resolved.uid = node.uid.unwrap_or(metadata.uid());
    resolved.gid = node.gid.unwrap_or(metadata.gid());
    Ok(resolved)
}

fn mount(bind: &Bind) -> Result<(PathBuf, String, u64), String> {
    let mut attributes = 0;
    if !matches!(bind.fstype.as_str(), "" | "bind" | "none") {
        return Err(format!(
            "mount {:?}: file systems of type {:?} are not supported",
            bind.target, bind.fstype
        ));
    }
    for option in &bind.options {
        attributes |= match option.as_str() {
            "ro" => ATTR_RDONLY,
            "nosuid" => ATTR_NOSUID,
            "nodev" => ATTR_NODEV,
            "noexec" => ATTR_NOEXEC,
            "rw" | "bind" | "rbind" | "private" | "rprivate" | "suid" | "dev" | "exec" => 0,
            _ => return Err(format!("mount {:?}: unknown option {option:?}", bind.target)),
        };
    }
    let source = PathBuf::from(&bind.host_path);
    if !source.is_absolute() {
        return Err(format!(
            "mount {:?}: {:?} is not absolute",
            bind.target, bind.host_path
        ));
    }
    Ok((source, bind.target.clone(), attributes))
}

#[cfg(test)]
mod tests;

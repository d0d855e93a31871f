//! Device specifications: what a file of a specification directory says.
//!
//! The format is the Container Device Interface's, version 1.1.0.

use std::collections::BTreeMap;

use super::document::{Fields, Value};

/// Versions of the format that exist.
const VERSIONS: &[&str] = &[
    "0.1.0", "0.2.0", "0.3.0", "0.4.0", "0.5.0", "0.6.0", "0.7.0", "0.8.0", "1.0.0", "1.1.0",
];
/// Longest annotations of a file or device in sum.
const MAX_ANNOTATION_BYTES: usize = 256 << 10;
/// Points in a container's life at which hooks run.
const HOOKS: &[&str] = &[
    "prestart",
    "createRuntime",
    "createContainer",
    "startContainer",
    "poststart",
    "poststop",
];

/// A file's content.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Specification {
    /// `vendor/class`.
    pub(super) kind: String,
    pub(super) annotations: BTreeMap<String, String>,
    pub(super) devices: Vec<DeviceEntry>,
    /// What each of the devices brings in common.
    pub(super) edits: Edits,
}

/// A device of a file.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct DeviceEntry {
    pub(super) name: String,
    pub(super) annotations: BTreeMap<String, String>,
    pub(super) edits: Edits,
}

/// What becomes of a container that gets a device.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(super) struct Edits {
    pub(super) env: Vec<String>,
    pub(super) nodes: Vec<Node>,
    pub(super) mounts: Vec<Bind>,
    pub(super) hooks: Vec<Hook>,
    pub(super) groups: Vec<u32>,
    /// Parts that are known and not carried out: network devices, resource classes.
    pub(super) unsupported: Option<&'static str>,
}

/// A device node.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Node {
    pub(super) path: String,
    /// The host's node that it is a copy of; empty: the one at the same path.
    pub(super) host_path: String,
    /// `b`, `c`, `u`, `p` or empty: as the host's.
    pub(super) kind: String,
    pub(super) major: u32,
    pub(super) minor: u32,
    pub(super) mode: Option<u32>,
    /// Of `r`, `w` and `m`; empty: all.
    pub(super) access: String,
    pub(super) uid: Option<u32>,
    pub(super) gid: Option<u32>,
}

/// A mount.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Bind {
    pub(super) host_path: String,
    pub(super) target: String,
    pub(super) options: Vec<String>,
    pub(super) fstype: String,
}

/// A program that is run on the host when a container is made.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Hook {
    pub(super) point: String,
    pub(super) path: String,
    pub(super) args: Vec<String>,
    pub(super) env: Vec<String>,
    pub(super) timeout_s: Option<u32>,
}

impl Specification {
    /// Reads and checks a document. The error is a text that names the field.
    pub(super) fn read(document: Value) -> Result<Self, String> {
        let mut fields = Fields::new(document, String::new()).map_err(|_| "it is no map".to_owned())?;
        let version = fields.text("cdiVersion")?;
        if !VERSIONS.contains(&version.as_str()) {
            return Err(format!("invalid version {version:?}"));
        }
        let kind = fields.text("kind")?;
        check_kind(&kind)?;
        let annotations = annotations(&mut fields)?;
        let devices = fields.list("devices", device)?;
        let edits = edits(fields.fields("containerEdits")?)?;
        fields.finish()?;
        if devices.is_empty() {
            return Err("it has no devices".to_owned());
        }
        for (at, device) in devices.iter().enumerate() {
            if devices[..at].iter().any(|earlier| earlier.name == device.name) {
                return Err(format!("multiple devices {:?}", device.name));
            }
        }
        Ok(Self {
            kind,
            annotations,
            devices,
            edits,
        })
    }
}

/// Splits `vendor/class`; `None` if it is none.
pub(super) fn split_kind(kind: &str) -> Option<(&str, &str)> {
    let (vendor, class) = kind.split_once('/')?;
    (is_name(vendor, "_-.") && is_name(class, "_-.")).then_some((vendor, class))
}

fn check_kind(kind: &str) -> Result<(), String> {
    split_kind(kind)
        .filter(|(vendor, class)| starts_with_letter(vendor) && starts_with_letter(class))
        .map(drop)
        .ok_or_else(|| format!("invalid kind {kind:?}: it has to be vendor/class"))
}

fn starts_with_letter(text: &str) -> bool {
    text.starts_with(|letter: char| letter.is_ascii_alphabetic())
}

/// Letters, digits and some marks, the last no mark.
fn is_name(text: &str, marks: &str) -> bool {
    text.bytes()
        .all(|byte| byte.is_ascii_alphanumeric() || marks.as_bytes().contains(&byte))
        && text.ends_with(|letter: char| letter.is_ascii_alphanumeric())
}

fn annotations(fields: &mut Fields) -> Result<BTreeMap<String, String>, String> {
    let annotations = fields.text_map("annotations")?;
    let total: usize = annotations
        .iter()
        .map(|(key, value)| key.len() + value.len())
        .sum();
    if total > MAX_ANNOTATION_BYTES {
        return Err(format!("annotations exceed {MAX_ANNOTATION_BYTES} bytes"));
    }
    for key in annotations.keys() {
        let (prefix, name) = key.rsplit_once('/').unwrap_or(("", key));
        let is_valid =
            (prefix.is_empty() || is_name(prefix, "-.")) && name.len() <= 63 && is_name(name, "_-.");
        if !is_valid || prefix.len() > 253 {
            return Err(format!("invalid annotation {key:?}"));
        }
    }
    Ok(annotations)
}

fn device(value: Value, place: String) -> Result<DeviceEntry, String> {
    let mut fields = Fields::new(value, place.clone())?;
    let name = fields.text("name")?;
    if name.is_empty() || !is_name(&name, "_-.:") || !name.as_bytes()[0].is_ascii_alphanumeric() {
        return Err(format!("invalid device name {name:?}"));
    }
    let annotations = annotations(&mut fields)?;
    let edits = edits(fields.fields("containerEdits")?)?;
    fields.finish()?;
    if edits == Edits::default() {
        return Err(format!("invalid device {name:?}: empty device edits"));
    }
    Ok(DeviceEntry {
        name,
        annotations,
        edits,
    })
}

fn edits(mut fields: Fields) -> Result<Edits, String> {
    let env = fields.texts("env")?;
    if let Some(entry) = env.iter().find(|entry| entry.find('=').is_none_or(|at| at == 0)) {
        return Err(format!("invalid environment variable {entry:?}"));
    }
    let edits = Edits {
        env,
        nodes: fields.list("deviceNodes", node)?,
        mounts: fields.list("mounts", bind)?,
        hooks: fields.list("hooks", hook)?,
        groups: fields.list("additionalGids", group)?,
        unsupported: match (fields.is_set("netDevices"), fields.is_set("intelRdt")) {
            (true, _) => Some("netDevices"),
            (false, true) => Some("intelRdt"),
            (false, false) => None,
        },
    };
    fields.finish()?;
    Ok(edits)
}

fn group(value: Value, place: String) -> Result<u32, String> {
    let entries = BTreeMap::from([("gid".to_owned(), value)]);
    let mut fields = Fields::new(Value::Map(entries), place.clone())?;
    fields
        .number("gid")?
        .ok_or_else(|| format!("{place} is no number"))
}

fn node(value: Value, place: String) -> Result<Node, String> {
    let mut fields = Fields::new(value, place.clone())?;
    let node = Node {
        path: fields.text("path")?,
        host_path: fields.text("hostPath")?,
        kind: fields.text("type")?,
        major: fields.number("major")?.unwrap_or(0),
        minor: fields.number("minor")?.unwrap_or(0),
        mode: fields.number("fileMode")?,
        access: fields.text("permissions")?,
        uid: fields.number("uid")?,
        gid: fields.number("gid")?,
    };
    fields.finish()?;
    if node.path.is_empty() {
        return Err(format!("{place}: invalid (empty) device path"));
    }
    if !matches!(node.kind.as_str(), "" | "b" | "c" | "u" | "p") {
        return Err(format!("device {:?}: invalid type {:?}", node.path, node.kind));
    }
    if node.access.bytes().any(|byte| !b"rwm".contains(&byte)) {
        return Err(format!(
            "device {:?}: invalid permissions {:?}",
            node.path, node.access
        ));
    }
    if node.mode.is_some_and(|mode| mode > 0o7777) {
        return Err(format!("device {:?}: invalid fileMode", node.path));
    }
    Ok(node)
}

fn bind(value: Value, place: String) -> Result<Bind, String> {
    let mut fields = Fields::new(value, place.clone())?;
    let bind = Bind {
        host_path: fields.text("hostPath")?,
        target: fields.text("containerPath")?,
        options: fields.texts("options")?,
        fstype: fields.text("type")?,
    };
    fields.finish()?;
    if bind.host_path.is_empty() || bind.target.is_empty() {
        return Err(format!("{place}: invalid mount, a path is empty"));
    }
    Ok(bind)
}

fn hook(value: Value, place: String) -> Result<Hook, String> {
    let mut fields = Fields::new(value, place.clone())?;
    let hook = Hook {
        point: fields.text("hookName")?,
        path: fields.text("path")?,
        args: fields.texts("args")?,
        env: fields.texts("env")?,
        timeout_s: fields.number("timeout")?,
    };
    fields.finish()?;
    if !HOOKS.contains(&hook.point.as_str()) {
        return Err(format!("{place}: invalid hook name {:?}", hook.point));
    }
    if hook.path.is_empty() {
        return Err(format!("{place}: invalid hook, empty path"));
    }
    Ok(hook)
}

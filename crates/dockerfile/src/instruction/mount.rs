//! `RUN --mount`.

use super::InstructionError;
use crate::word::WordError;
use crate::{csv, size, suggest, text};

/// What is mounted.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) enum MountKind {
    #[default]
    Bind,
    Cache,
    Tmpfs,
    Secret,
    Ssh,
}

const KINDS: [(&str, MountKind); 5] = [
    ("bind", MountKind::Bind),
    ("cache", MountKind::Cache),
    ("secret", MountKind::Secret),
    ("ssh", MountKind::Ssh),
    ("tmpfs", MountKind::Tmpfs),
];

impl MountKind {
    pub(crate) fn name(self) -> &'static str {
        KINDS
            .iter()
            .find(|(_, kind)| *kind == self)
            .map_or("", |(name, _)| name)
    }
}

/// Who may use a cache at the same time.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Sharing {
    Shared,
    Private,
    Locked,
}

const SHARINGS: [(&str, Sharing); 3] = [
    ("locked", Sharing::Locked),
    ("private", Sharing::Private),
    ("shared", Sharing::Shared),
];

/// One `--mount`.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(crate) struct Mount {
    pub(crate) kind: MountKind,
    pub(crate) from: String,
    pub(crate) source: String,
    pub(crate) target: String,
    pub(crate) readonly: bool,
    pub(crate) size_bytes: i64,
    pub(crate) id: String,
    pub(crate) sharing: Option<Sharing>,
    pub(crate) required: bool,
    /// Secrets: also, or only, a variable of this name.
    pub(crate) env: Option<String>,
    pub(crate) mode: Option<u32>,
    pub(crate) uid: Option<u32>,
    pub(crate) gid: Option<u32>,
}

const KEYS: [&str; 19] = [
    "type",
    "from",
    "source",
    "target",
    "readonly",
    "id",
    "sharing",
    "required",
    "size",
    "mode",
    "uid",
    "gid",
    "src",
    "dst",
    "destination",
    "ro",
    "rw",
    "readwrite",
    "env",
];

/// Expands the variables of one value.
pub(crate) type Expander<'a> = &'a mut dyn FnMut(&str) -> Result<String, WordError>;

/// Parses a mount. Without an expander only `from` is looked at: everything else may hold variables.
pub(crate) fn parse_mount(flag: &str, mut expander: Option<Expander<'_>>) -> Result<Mount, InstructionError> {
    let fields = csv::fields(flag).map_err(|error| InstructionError::Csv {
        what: "mounts",
        error,
    })?;
    let mut mount = Mount::default();
    let mut readonly = None;
    for field in &fields {
        let (key, value) = field
            .split_once('=')
            .map_or((field.as_str(), None), |(key, value)| (key, Some(value)));
        let key = key.to_lowercase();
        match (value, &mut expander) {
            (None, None) => {}
            (None, Some(_)) => set_switch(&mut mount, &mut readonly, &key, field)?,
            (Some(value), Some(expand)) => {
                let value = expand(value)?;
                set_value(&mut mount, &mut readonly, &key, value, field)?;
            }
            (Some(value), None) if key == "from" => {
                if value.find('$').is_some_and(|at| at + 1 != value.len()) {
                    return Err(InstructionError::MountVariable(key));
                }
                value.clone_into(&mut mount.from);
            }
            (Some(_), None) => {}
        }
    }
    mount.readonly = readonly.unwrap_or(!matches!(mount.kind, MountKind::Cache | MountKind::Tmpfs));
    check(&mount)?;
    Ok(mount)
}

fn set_switch(
    mount: &mut Mount,
    readonly: &mut Option<bool>,
    key: &str,
    field: &str,
) -> Result<(), InstructionError> {
    match key {
        "readonly" | "ro" => *readonly = Some(true),
        "readwrite" | "rw" => *readonly = Some(false),
        "required" if matches!(mount.kind, MountKind::Secret | MountKind::Ssh) => mount.required = true,
        "required" => return Err(unexpected(key, mount)),
        _ => return Err(InstructionError::MountField(field.to_owned())),
    }
    Ok(())
}

fn unexpected(key: &str, mount: &Mount) -> InstructionError {
    InstructionError::MountKeyForKind {
        key: key.to_owned(),
        kind: mount.kind.name(),
    }
}

fn set_value(
    mount: &mut Mount,
    readonly: &mut Option<bool>,
    key: &str,
    value: String,
    field: &str,
) -> Result<(), InstructionError> {
    let invalid = |value: &str| InstructionError::MountValue {
        key: key.to_owned(),
        value: value.to_owned(),
    };
    let parse_bool = |value: &str| text::parse_bool(value).ok_or_else(|| invalid(value));
    match key {
        "type" => mount.kind = parse_kind(&value)?,
        "from" => mount.from = value,
        "source" | "src" => mount.source = value,
        "target" | "dst" | "destination" => mount.target = value,
        "readonly" | "ro" => *readonly = Some(parse_bool(&value)?),
        "readwrite" | "rw" => *readonly = Some(!parse_bool(&value)?),
        "required" if matches!(mount.kind, MountKind::Secret | MountKind::Ssh) => {
            mount.required = parse_bool(&value)?
        }
        "size" if mount.kind == MountKind::Tmpfs => {
            mount.size_bytes = size::parse_size(&value).ok_or_else(|| invalid(&value))?;
        }
        "required" | "size" => return Err(unexpected(key, mount)),
        "id" => mount.id = value,
        "sharing" => mount.sharing = Some(parse_sharing(&value)?),
        "mode" => mount.mode = Some(parse_number("mode", &value, 8)?),
        "uid" => mount.uid = Some(parse_number("uid", &value, 10)?),
        "gid" => mount.gid = Some(parse_number("gid", &value, 10)?),
        "env" => mount.env = Some(value),
        _ => {
            let error = InstructionError::MountKey {
                key: key.to_owned(),
                field: field.to_owned(),
            };
            return Err(error.suggest(suggest::search(key, KEYS, false)));
        }
    }
    Ok(())
}

fn parse_kind(value: &str) -> Result<MountKind, InstructionError> {
    let wanted = value.to_lowercase();
    KINDS
        .iter()
        .find(|(name, _)| *name == wanted)
        .map(|(_, kind)| *kind)
        .ok_or_else(|| {
            InstructionError::MountType(value.to_owned()).suggest(suggest::search(
                value,
                KINDS.map(|(name, _)| name),
                false,
            ))
        })
}

fn parse_sharing(value: &str) -> Result<Sharing, InstructionError> {
    let wanted = value.to_lowercase();
    SHARINGS
        .iter()
        .find(|(name, _)| *name == wanted)
        .map(|(_, sharing)| *sharing)
        .ok_or_else(|| {
            let names = SHARINGS.map(|(name, _)| name);
            InstructionError::MountSharing(value.to_owned()).suggest(suggest::search(value, names, false))
        })
}

fn parse_number(what: &'static str, value: &str, radix: u32) -> Result<u32, InstructionError> {
    let number = if value.starts_with('+') {
        None
    } else {
        u32::from_str_radix(value, radix).ok()
    };
    number.ok_or_else(|| InstructionError::MountNumber {
        what,
        value: value.to_owned(),
    })
}

fn check(mount: &Mount) -> Result<(), InstructionError> {
    if matches!(mount.kind, MountKind::Bind | MountKind::Tmpfs) {
        let given = [("mode", mount.mode), ("uid", mount.uid), ("gid", mount.gid)];
        if let Some((what, _)) = given.into_iter().find(|(_, value)| value.is_some()) {
            return Err(InstructionError::MountOwner {
                what,
                kind: mount.kind.name(),
            });
        }
    }
    if mount.kind == MountKind::Secret {
        let problem = if !mount.from.is_empty() {
            Some("secret mount should not have a from")
        } else if mount.sharing.is_some() {
            Some("secret mount should not define sharing")
        } else if mount.source.is_empty() && mount.target.is_empty() && mount.id.is_empty() {
            Some("invalid secret mount. one of source, target required")
        } else if !mount.source.is_empty() && !mount.id.is_empty() {
            Some("both source and id can't be set")
        } else {
            None
        };
        if let Some(problem) = problem {
            return Err(InstructionError::SecretMount(problem));
        }
    }
    if mount.sharing.is_some() && mount.kind != MountKind::Cache {
        return Err(InstructionError::SharingForKind(mount.kind.name()));
    }
    Ok(())
}

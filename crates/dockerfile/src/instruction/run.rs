//! RUN and its flags.

use super::flags::{FlagKind, Flags};
use super::mount::{Mount, parse_mount};
use super::parse::command_line;
use super::{CommandLine, InstructionError};
use crate::parser::Node;
use crate::{csv, suggest, text};

/// The network a command sees.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) enum Network {
    #[default]
    Default,
    None,
    Host,
}

/// RUN.
#[derive(Clone, Debug, Default)]
pub(crate) struct Run {
    pub(crate) command: CommandLine,
    /// The `--mount` flags, unexpanded.
    pub(crate) mount_flags: Vec<String>,
    /// The mounts as far as they are known without variables: only `from` counts.
    pub(crate) mounts: Vec<Mount>,
    pub(crate) network: Network,
    pub(crate) insecure: bool,
    /// Whether it asks for devices.
    pub(crate) wants_devices: bool,
}

pub(super) fn parse(node: &mut Node) -> Result<Run, InstructionError> {
    let known = [
        ("device", FlagKind::Texts),
        ("mount", FlagKind::Texts),
        ("network", FlagKind::Text),
        ("security", FlagKind::Text),
    ];
    let flags = Flags::parse(&node.flags, &known)?;
    let devices = flags.texts("device");
    devices.iter().try_for_each(|flag| check_device(flag))?;
    let mount_flags = flags.texts("mount");
    let mounts = mount_flags
        .iter()
        .map(|flag| parse_mount(flag, None))
        .collect::<Result<_, _>>()?;
    let network = match flags.get("network") {
        None | Some("default") => Network::Default,
        Some("none") => Network::None,
        Some("host") => Network::Host,
        Some(other) => return Err(InstructionError::Network(other.to_owned())),
    };
    let insecure = match flags.get("security") {
        None | Some("sandbox") => false,
        Some("insecure") => true,
        Some(other) => return Err(InstructionError::Security(other.to_owned())),
    };
    Ok(Run {
        command: command_line(node),
        mount_flags,
        mounts,
        network,
        insecure,
        wants_devices: !devices.is_empty(),
    })
}

/// Checks a device as far as it is written out; this version of the frontend has no use for it.
fn check_device(flag: &str) -> Result<(), InstructionError> {
    let fields = csv::fields(flag).map_err(|error| InstructionError::Csv {
        what: "devices",
        error,
    })?;
    let mut name = String::new();
    for field in &fields {
        let (key, value) = field
            .split_once('=')
            .map_or((field.as_str(), None), |(key, value)| (key, Some(value)));
        let key = key.to_lowercase();
        match (key.as_str(), value) {
            ("required", None) => {}
            ("required", Some(value)) => {
                text::parse_bool(value).ok_or_else(|| InstructionError::MountValue {
                    key: key.clone(),
                    value: value.to_owned(),
                })?;
            }
            ("name", Some(value)) if name.is_empty() => value.clone_into(&mut name),
            ("name", Some(_)) => return Err(InstructionError::DeviceName(name)),
            _ if name.is_empty() => field.clone_into(&mut name),
            (_, None) => return Err(InstructionError::MountField(field.clone())),
            _ => {
                let found = suggest::search(&key, ["name", "required"], false);
                return Err(InstructionError::MountKey {
                    key,
                    field: field.clone(),
                }
                .suggest(found));
            }
        }
    }
    Ok(())
}

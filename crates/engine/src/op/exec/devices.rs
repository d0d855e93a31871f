//! Devices of the host that a step asks for.

use executor::{DeviceEdits, DeviceRegistry, Devices};
use llb::pb;

use super::blocking;
use crate::error::{BuildError, ErrorKind};

/// Finds out which devices are meant, each once, in the order asked for. What is optional may be missing.
///
/// # Errors
/// A user error for a device that is not there.
pub(crate) fn resolve(devices: &Devices, wanted: &[pb::CdiDevice]) -> Result<Vec<String>, BuildError> {
    let mut names: Vec<String> = Vec::new();
    for device in wanted {
        let found = devices.find(&device.name);
        if found.is_empty() && !device.optional {
            return Err(BuildError::user(format!(
                "required device {:?} is not registered",
                device.name
            )));
        }
        names.extend(found);
    }
    let mut seen = std::collections::BTreeSet::new();
    names.retain(|name| seen.insert(name.clone()));
    Ok(names)
}

/// What a container gets with the devices that its op names.
pub(super) async fn edits(
    registry: &DeviceRegistry,
    wanted: &[pb::CdiDevice],
) -> Result<DeviceEdits, BuildError> {
    if wanted.is_empty() {
        return Ok(DeviceEdits::default());
    }
    let (registry, wanted) = (registry.clone(), wanted.to_vec());
    blocking(move || {
        let devices = registry.scan();
        let names = resolve(&devices, &wanted)?;
        let edits = devices.edits(names.iter().map(String::as_str));
        edits.map_err(|error| BuildError::from_source(ErrorKind::User, error))
    })
    .await
}

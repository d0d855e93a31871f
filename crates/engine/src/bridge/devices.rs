//! Whether builds may use the devices that their steps ask for.

use std::collections::BTreeSet;

use executor::Devices;
use llb::pb;

use crate::error::{BuildError, ErrorKind};
use crate::job::Entitlement;
use crate::op::exec::devices::resolve;

/// Checks a step's devices against the rights of one build and returns what the step gets instead: the devices by their
/// full names. A build with the right to all devices gets what it asks for as it asks for it.
///
/// # Errors
/// [`ErrorKind::Denied`] for devices that need a right the build lacks, a user error for those that are not there.
pub(super) fn allowed(
    devices: &Devices,
    rights: &[Entitlement],
    wanted: &[pb::CdiDevice],
) -> Result<Vec<pb::CdiDevice>, BuildError> {
    if rights.contains(&Entitlement::Device(None)) {
        return Ok(wanted.to_vec());
    }
    let grants = || {
        rights.iter().filter_map(|right| match right {
            Entitlement::Device(grant) => grant.as_ref(),
            Entitlement::NetworkHost | Entitlement::SecurityInsecure => None,
        })
    };
    let (mut allowed, mut others) = (Vec::new(), Vec::new());
    for device in wanted {
        let renamed = grants().find_map(|grant| {
            let is_alias = grant.alias.as_ref() == Some(&device.name);
            is_alias.then(|| grant.device.clone())
        });
        match renamed {
            Some(name) => allowed.push(pb::CdiDevice {
                name,
                ..device.clone()
            }),
            None => others.push(device.clone()),
        }
    }
    let granted: BTreeSet<String> = grants()
        .filter(|grant| grant.alias.is_none())
        .flat_map(|grant| devices.find(&grant.device))
        .collect();
    let mut forbidden = Vec::new();
    for name in resolve(devices, &others)? {
        if granted.contains(&name) || devices.is_auto_allowed(&name) {
            allowed.push(pb::CdiDevice {
                name,
                ..pb::CdiDevice::default()
            });
        } else {
            forbidden.push(name);
        }
    }
    let denied = |text| Err(BuildError::new(ErrorKind::Denied, text));
    match forbidden.as_slice() {
        [] => Ok(allowed),
        [one] => denied(format!("device {one} is requested by the build but not allowed")),
        many => denied(format!(
            "devices {} are requested by the build but not allowed",
            many.join(", ")
        )),
    }
}

#[cfg(test)]
mod tests {
    use executor::DeviceRegistry;

    use super::*;
    use crate::solve::parse_entitlement;

    fn devices() -> Devices {
        let dir = tempfile::tempdir().expect("makes a directory");
        let text = "{cdiVersion: 0.6.0, kind: v/c, devices: [
            {name: a, containerEdits: {env: [A=1]}},
            {name: b, containerEdits: {env: [B=1]}},
            {name: free, containerEdits: {env: [C=1]},
             annotations: {org.mobyproject.buildkit.device.autoallow: true}}]}";
        std::fs::write(dir.path().join("c.yaml"), text).expect("writes a file");
        DeviceRegistry::new(vec![dir.path().to_owned()], []).scan()
    }

    fn check(rights: &[&str], wanted: &[&str]) -> Result<Vec<String>, String> {
        let rights: Vec<Entitlement> = rights
            .iter()
            .map(|text| parse_entitlement(text).expect("is a right"))
            .collect();
        let device = |name: &&str| pb::CdiDevice {
            name: name.trim_end_matches('?').to_owned(),
            optional: name.ends_with('?'),
        };
        let wanted: Vec<_> = wanted.iter().map(device).collect();
        match allowed(&devices(), &rights, &wanted) {
            Ok(devices) => Ok(devices.into_iter().map(|device| device.name).collect()),
            Err(error) => Err(error.to_string()),
        }
    }

    fn names(names: &[&str]) -> Result<Vec<String>, String> {
        Ok(names.iter().map(|name| (*name).to_owned()).collect())
    }

    #[test]
    fn devices_need_a_right() {
        assert_eq!(check(&[], &["v/c=free"]), names(&["v/c=free"]));
        let one = "device v/c=a is requested by the build but not allowed";
        assert_eq!(check(&[], &["v/c=a"]), Err(one.to_owned()));
        assert_eq!(check(&["device=v/c=b"], &["v/c=a"]), Err(one.to_owned()));
        let two = "devices v/c=a, v/c=b are requested by the build but not allowed";
        assert_eq!(check(&[], &["v/c=*"]), Err(two.to_owned()));
        assert_eq!(check(&["device"], &["v/c=*"]), names(&["v/c=*"]));
        assert_eq!(check(&["device=v/c"], &["v/c"]), names(&["v/c=a"]));
        assert_eq!(
            check(&["device=v/c=*"], &["v/c=*"]),
            names(&["v/c=a", "v/c=b", "v/c=free"])
        );
    }

    #[test]
    fn rights_may_give_a_device_another_name() {
        assert_eq!(check(&["device=v/c=a,alias=gpu"], &["gpu"]), names(&["v/c=a"]));
        assert!(check(&["device=v/c=a,alias=gpu"], &["v/c=a"]).is_err());
    }

    #[test]
    fn only_optional_devices_may_be_missing() {
        let missing = "required device \"v/c=z\" is not registered";
        assert_eq!(check(&[], &["v/c=z"]), Err(missing.to_owned()));
        assert_eq!(check(&[], &["v/c=z?"]), names(&[]));
    }
}

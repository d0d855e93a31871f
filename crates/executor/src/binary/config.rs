//! A container specification in an OCI runtime's terms (`config.json`).

use serde_json::{Value, json};

use crate::capability;
use crate::spec::{
    ATTR_NODEV, ATTR_NOEXEC, ATTR_NOSUID, ATTR_RDONLY, ATTR_STRICTATIME, CapabilitySpec, ContainerSpec,
    LimitSpec, MountSpec, NetworkSpec, ProcessSpec,
};
use crate::supervisor::seccomp;
use crate::user::Identity;

/// A mount whose source is prepared.
#[derive(Clone, Debug)]
pub(super) struct OciMount {
    pub(super) target: String,
    pub(super) fstype: String,
    pub(super) source: String,
    pub(super) options: Vec<String>,
}

/// The options for `MOUNT_ATTR_*`.
pub(super) fn attribute_options(attributes: u64) -> Vec<String> {
    let names = [
        (ATTR_RDONLY, "ro"),
        (ATTR_NOSUID, "nosuid"),
        (ATTR_NODEV, "nodev"),
        (ATTR_NOEXEC, "noexec"),
        (ATTR_STRICTATIME, "strictatime"),
    ];
    names
        .iter()
        .filter(|(bit, _)| attributes & bit != 0)
        .map(|(_, name)| (*name).to_owned())
        .collect()
}

/// Describes a new instance of a file system.
pub(super) fn instance(
    mount: &MountSpec,
    fstype: &str,
    options: impl IntoIterator<Item = String>,
) -> OciMount {
    let mut all = attribute_options(mount.attributes);
    all.extend(options);
    OciMount {
        target: mount.target.clone(),
        fstype: fstype.to_owned(),
        source: fstype.to_owned(),
        options: all,
    }
}

/// Describes a mount that is what is at `source` on the host.
pub(super) fn bound(mount: &MountSpec, source: &std::path::Path) -> OciMount {
    let mut options = attribute_options(mount.attributes);
    options.push("rbind".to_owned());
    OciMount {
        target: mount.target.clone(),
        fstype: "bind".to_owned(),
        source: source.to_string_lossy().into_owned(),
        options,
    }
}

/// Makes `config.json`. `network` is the path of a network namespace that is given.
pub(super) fn config(
    spec: &ContainerSpec,
    identity: &Identity,
    rootfs: &std::path::Path,
    mounts: &[OciMount],
    network: Option<&str>,
    unified: bool,
) -> Value {
    let mounts: Vec<Value> = mounts
        .iter()
        .map(|mount| {
            json!({
                "destination": mount.target,
                "type": mount.fstype,
                "source": mount.source,
                "options": mount.options,
            })
        })
        .collect();
    let mut namespaces = vec!["pid", "ipc", "uts", "mount"];
    if spec.network == NetworkSpec::Loopback {
        namespaces.push("network");
    }
    if unified {
        namespaces.push("cgroup");
    }
    let mut namespaces: Vec<Value> = namespaces.into_iter().map(|kind| json!({"type": kind})).collect();
    namespaces.extend(network.map(|path| json!({"type": "network", "path": path})));
    let mut linux = json!({
        "namespaces": namespaces,
        "cgroupsPath": format!("{}/buildkit/{}", spec.cgroup_parent.trim_end_matches('/'), spec.id),
        "maskedPaths": spec.masked_paths,
        "readonlyPaths": spec.read_only_paths,
        "devices": devices(spec),
        "resources": resources(spec),
    });
    if !spec.mount_label.is_empty() {
        linux["mountLabel"] = json!(spec.mount_label);
    }
    if spec.process.seccomp {
        linux["seccomp"] = seccomp::oci_profile(spec.process.capabilities.bounding);
    }
    let mut process = process(&spec.process, identity);
    if let Some(adjustment) = spec.oom_score_adj {
        process["oomScoreAdj"] = json!(adjustment);
    }
    json!({
        "ociVersion": "1.0.2",
        "process": process,
        "root": {"path": rootfs, "readonly": spec.read_only_root},
        "hostname": spec.hostname,
        "mounts": mounts,
        "linux": linux,
        "hooks": hooks(spec),
    })
}

/// Makes what `exec --process` reads, and what is in `config.json`.
pub(super) fn process(process: &ProcessSpec, identity: &Identity) -> Value {
    let mut value = json!({
        "terminal": process.tty,
        "user": {"uid": identity.uid, "gid": identity.gid, "additionalGids": identity.groups},
        "args": process.args,
        "env": process.env,
        "cwd": process.cwd,
        "capabilities": capabilities(&process.capabilities),
        "rlimits": process.limits.iter().map(limit).collect::<Vec<_>>(),
        "noNewPrivileges": process.no_new_privs,
    });
    let labels = [
        ("apparmorProfile", &process.labels.apparmor),
        ("selinuxLabel", &process.labels.selinux),
    ];
    for (key, label) in labels {
        if !label.is_empty() {
            value[key] = json!(label);
        }
    }
    value
}

fn capabilities(sets: &CapabilitySpec) -> Value {
    json!({
        "bounding": capability::names(sets.bounding),
        "effective": capability::names(sets.effective),
        "permitted": capability::names(sets.permitted),
        "inheritable": capability::names(sets.inheritable),
        "ambient": capability::names(sets.ambient),
    })
}

fn limit(limit: &LimitSpec) -> Value {
    let value = |value: Option<u64>| value.unwrap_or(u64::MAX);
    json!({
        "type": format!("RLIMIT_{}", limit.name.to_ascii_uppercase()),
        "soft": value(limit.soft),
        "hard": value(limit.hard),
    })
}

fn devices(spec: &ContainerSpec) -> Vec<Value> {
    let device = |device: &crate::spec::DeviceNode| {
        json!({
            "path": format!("/dev/{}", device.name),
            "type": if device.block { "b" } else { "c" },
            "major": device.major,
            "minor": device.minor,
            "fileMode": device.mode,
            "uid": device.uid,
            "gid": device.gid,
        })
    };
    spec.devices.iter().map(device).collect()
}

fn device_rules(spec: &ContainerSpec) -> Value {
    if spec.all_devices {
        return json!([{"allow": true, "type": "c", "access": "rwm"}, {"allow": true, "type": "b", "access": "rwm"}]);
    }
    let mut rules = vec![json!({"allow": false, "access": "rwm"})];
    rules.extend(spec.devices.iter().map(|device| {
        json!({
            "allow": true,
            "type": if device.block { "b" } else { "c" },
            "major": device.major,
            "minor": device.minor,
            "access": device.access,
        })
    }));
    Value::Array(rules)
}

fn hooks(spec: &ContainerSpec) -> Value {
    let mut hooks = json!({});
    for hook in &spec.hooks {
        let mut entry = json!({"path": hook.path, "args": hook.args, "env": hook.env});
        if let Some(timeout_s) = hook.timeout_s {
            entry["timeout"] = json!(timeout_s);
        }
        match &mut hooks[&hook.point] {
            Value::Array(entries) => entries.push(entry),
            absent => *absent = json!([entry]),
        }
    }
    hooks
}

fn resources(spec: &ContainerSpec) -> Value {
    let resources = &spec.resources;
    let rules = device_rules(spec);
    let mut all = json!({"devices": rules});
    let mut set = |group: &str, key: &str, value: Value, wanted: bool| {
        if wanted {
            all[group][key] = value;
        }
    };
    let r = resources;
    set("memory", "limit", json!(r.memory_bytes), r.memory_bytes != 0);
    set(
        "memory",
        "swap",
        json!(r.memory_swap_bytes),
        r.memory_swap_bytes != 0,
    );
    set("cpu", "shares", json!(r.cpu_shares), r.cpu_shares != 0);
    set("cpu", "quota", json!(r.cpu_quota_us), r.cpu_quota_us != 0);
    set("cpu", "period", json!(r.cpu_period_us), r.cpu_period_us != 0);
    set("cpu", "cpus", json!(r.cpuset_cpus), !r.cpuset_cpus.is_empty());
    set("cpu", "mems", json!(r.cpuset_mems), !r.cpuset_mems.is_empty());
    all
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::label::ProcessLabels;

    #[test]
    fn labels_are_told_if_there_are_any() {
        let identity = Identity {
            uid: 0,
            gid: 0,
            groups: Vec::new(),
            home: None,
        };
        let plain = process(&ProcessSpec::default(), &identity);
        assert_eq!(
            (plain.get("apparmorProfile"), plain.get("selinuxLabel")),
            (None, None)
        );
        let labels = ProcessLabels {
            apparmor: "steps".to_owned(),
            selinux: "a:b:c:s0".to_owned(),
        };
        let spec = ProcessSpec {
            labels,
            ..ProcessSpec::default()
        };
        let labelled = process(&spec, &identity);
        assert_eq!(labelled["apparmorProfile"], "steps");
        assert_eq!(labelled["selinuxLabel"], "a:b:c:s0");
    }
}

//! Which labels containers get, and how they are set.

use std::fs;
use std::path::Path;

use super::set::{Writer, label_keys};
use super::*;

const CONTEXTS: &str = r#"
# comment
process = "system_u:system_r:container_t:s0"
;file = "not:this:one"
file="system_u:object_r:container_file_t:s0"
ro_file = "system_u:object_r:container_ro_file_t:s0"
"#;
const MOUNTED: &str =
    "30 25 0:26 / /sys/fs/selinux rw,nosuid,noexec,relatime shared:17 - selinuxfs selinuxfs rw\n";

fn put(host: &Path, path: &str, text: &str) {
    let path = host.join(path);
    fs::create_dir_all(path.parent().unwrap()).unwrap();
    fs::write(path, text).unwrap();
}

fn selinux_host() -> tempfile::TempDir {
    let host = tempfile::tempdir().unwrap();
    put(host.path(), "proc/self/mountinfo", MOUNTED);
    put(
        host.path(),
        "proc/self/attr/current",
        "system_u:system_r:container_runtime_t:s0\0",
    );
    put(
        host.path(),
        "etc/selinux/config",
        "SELINUX=enforcing\nSELINUXTYPE=targeted\n",
    );
    put(
        host.path(),
        "etc/selinux/targeted/contexts/lxc_contexts",
        CONTEXTS,
    );
    host
}

fn selinux(host: &Path) -> Labeler {
    let config = LabelConfig {
        selinux: true,
        ..LabelConfig::default()
    };
    Labeler::new(config, host.to_owned())
}

fn apparmor(host: &Path) -> Labeler {
    let config = LabelConfig {
        apparmor_profile: "steps".to_owned(),
        ..LabelConfig::default()
    };
    Labeler::new(config, host.to_owned())
}

#[test]
fn nothing_is_labelled_unless_it_is_asked_for() {
    let host = selinux_host();
    let labeler = Labeler::new(LabelConfig::default(), host.path().to_owned());
    let labels = labeler.labels(Security::Sandbox).unwrap();
    assert_eq!(
        (labels.process, labels.mount.as_str()),
        (ProcessLabels::default(), "")
    );
}

#[test]
fn confined_containers_have_levels_of_their_own() {
    let host = selinux_host();
    let labeler = selinux(host.path());
    let labels = labeler.labels(Security::Sandbox).unwrap();
    let level = labels
        .process
        .selinux
        .strip_prefix("system_u:system_r:container_t:")
        .unwrap();
    let categories = level.strip_prefix("s0:c").unwrap().split_once(",c").unwrap();
    let (low, high): (u16, u16) = (categories.0.parse().unwrap(), categories.1.parse().unwrap());
    assert!(low < high && high < 1024, "{level}");
    assert_eq!(
        labels.mount,
        format!("system_u:object_r:container_file_t:{level}")
    );

    let others: Vec<ContainerLabels> = (0..200)
        .map(|_| labeler.labels(Security::Sandbox).unwrap())
        .collect();
    let in_use = || labeler.levels.lock().unwrap().len();
    assert_eq!(in_use(), 201);
    drop(others);
    assert_eq!(in_use(), 1);
    assert!(labeler.levels.lock().unwrap().contains(level));
}

#[test]
fn insecure_containers_are_not_confined() {
    let host = selinux_host();
    let labels = selinux(host.path()).labels(Security::Insecure).unwrap();
    assert_eq!(labels.process, ProcessLabels::default());
    assert_eq!(labels.mount, "system_u:object_r:container_file_t:s0:c1022,c1023");
    let host = tempfile::tempdir().unwrap();
    let labels = apparmor(host.path()).labels(Security::Insecure).unwrap();
    assert_eq!(labels.process, ProcessLabels::default());
}

#[test]
fn contexts_that_packages_share_win() {
    let host = selinux_host();
    let shared = "process = a:b:c\nfile = d:e:f";
    put(host.path(), "usr/share/containers/selinux/contexts", shared);
    let labels = selinux(host.path()).labels(Security::Sandbox).unwrap();
    // A policy without levels.
    assert_eq!(
        (labels.process.selinux.as_str(), labels.mount.as_str()),
        ("a:b:c", "d:e:f")
    );
    assert!(labels.lease.is_none());
}

#[test]
fn labels_that_cannot_be_given_are_refused() {
    let refusal = |labeler: &Labeler, security| labeler.labels(security).unwrap_err().to_string();
    let host = tempfile::tempdir().unwrap();
    let unavailable = "selinux is not available";
    for security in [Security::Sandbox, Security::Insecure] {
        assert_eq!(refusal(&selinux(host.path()), security), unavailable);
    }
    assert_eq!(
        refusal(&apparmor(host.path()), Security::Sandbox),
        "AppArmor is not supported on this host, but the profile 'steps' was specified"
    );

    let host = selinux_host();
    put(
        host.path(),
        "proc/self/mountinfo",
        &MOUNTED.replace("rw,nosuid", "ro,nosuid"),
    );
    assert_eq!(refusal(&selinux(host.path()), Security::Sandbox), unavailable);
    let host = selinux_host();
    put(host.path(), "proc/self/attr/current", "kernel\0");
    assert_eq!(refusal(&selinux(host.path()), Security::Sandbox), unavailable);
    let host = selinux_host();
    put(
        host.path(),
        "etc/selinux/targeted/contexts/lxc_contexts",
        "file = a:b:c",
    );
    let message = refusal(&selinux(host.path()), Security::Sandbox);
    assert!(
        message.contains("targeted/contexts/lxc_contexts names no process"),
        "{message}"
    );
}

#[test]
fn a_profile_is_for_confined_containers_where_it_can_be_had() {
    let host = tempfile::tempdir().unwrap();
    put(host.path(), "sys/module/apparmor/parameters/enabled", "Y\n");
    assert!(apparmor(host.path()).labels(Security::Sandbox).is_err());
    fs::create_dir_all(host.path().join("sys/kernel/security/apparmor")).unwrap();
    let labels = apparmor(host.path()).labels(Security::Sandbox).unwrap();
    assert_eq!(
        (labels.process.apparmor.as_str(), labels.mount.as_str()),
        ("steps", "")
    );
    put(host.path(), "sys/module/apparmor/parameters/enabled", "N\n");
    assert!(apparmor(host.path()).labels(Security::Sandbox).is_err());
}

#[test]
fn labels_are_written_where_the_kernel_reads_them() {
    let labels = |apparmor: &str, selinux: &str| ProcessLabels {
        apparmor: apparmor.to_owned(),
        selinux: selinux.to_owned(),
    };
    let proc = tempfile::tempdir().unwrap();
    let read = |path: &str| fs::read_to_string(proc.path().join("thread-self/attr").join(path)).unwrap();
    let set = |labels: &ProcessLabels| Writer::open(labels, proc.path()).and_then(Writer::label_program);
    // Without labels nothing has to be there.
    set(&labels("", "")).unwrap();
    let message = set(&labels("steps", "")).unwrap_err().to_string();
    assert!(message.contains("thread-self/attr/exec"), "{message}");

    put(proc.path(), "thread-self/attr/exec", "");
    set(&labels("steps", "")).unwrap();
    assert_eq!(read("exec"), "exec steps");
    put(proc.path(), "thread-self/attr/exec", "");
    set(&labels("", "a:b:c:s0")).unwrap();
    assert_eq!(read("exec"), "a:b:c:s0");

    put(proc.path(), "thread-self/attr/exec", "");
    put(proc.path(), "thread-self/attr/apparmor/exec", "");
    set(&labels("steps", "")).unwrap();
    assert_eq!(
        (read("exec").as_str(), read("apparmor/exec").as_str()),
        ("", "exec steps")
    );

    put(proc.path(), "thread-self/attr/keycreate", "");
    label_keys("a:b:c:s0", proc.path()).unwrap();
    assert_eq!(read("keycreate"), "a:b:c:s0");
}

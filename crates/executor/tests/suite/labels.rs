//! Labels of security modules, where the host has them.

use std::path::Path;
use std::process::Command;
use std::sync::Arc;

use executor::{ExecutorConfig, LabelConfig, Security};

use crate::Test;
use crate::fixture::{Lab, shell};

pub const TESTS: &[Test] = crate::tests![
    a_profile_confines_or_is_refused,
    contexts_are_set_or_refused,
    without_labels_nothing_changes,
];

const PROFILE: &str = "executor-suite";
/// Lets everything be done but one thing.
const RULES: &str = "profile executor-suite flags=(attach_disconnected) {
  file,
  capability,
  network,
  signal,
  deny /tmp/forbidden w,
}
";
const OWN_LABEL: &str = "cat /proc/self/attr/current";

fn labelled(lab: &Lab, labels: LabelConfig) -> Lab {
    let config = ExecutorConfig {
        labels,
        ..ExecutorConfig::default()
    };
    Lab::configured(&lab.runtime, config)
}

fn skip(what: &str, reason: &str) {
    eprintln!("skipped: {what} from inside: {reason}");
}

async fn a_profile_confines_or_is_refused(lab: Arc<Lab>) {
    let labels = LabelConfig {
        apparmor_profile: PROFILE.to_owned(),
        selinux: false,
    };
    let lab = labelled(&lab, labels);
    let mut insecure = lab.request("true");
    insecure.security = Security::Insecure;
    lab.ok(insecure).await;
    if !Path::new("/sys/kernel/security/apparmor").exists() {
        let message = lab.run(lab.request("true")).await.unwrap_err().to_string();
        let refused =
            "AppArmor is not supported on this host, but the profile 'executor-suite' was specified";
        assert_eq!(message, refused);
        return skip(
            "AppArmor profiles",
            "the kernel does not have AppArmor or does not show it",
        );
    }
    let file = lab.path().join("profile");
    std::fs::write(&file, RULES).unwrap();
    let loaded = Command::new("apparmor_parser").arg("-r").arg(&file).status();
    if !loaded.is_ok_and(|status| status.success()) {
        return skip("AppArmor profiles", "apparmor_parser cannot load one");
    }
    assert_eq!(lab.sh(OWN_LABEL).await.trim(), "executor-suite (enforce)");
    assert_eq!(
        lab.sh("touch /tmp/forbidden 2>/dev/null || echo denied").await,
        "denied\n"
    );
    let container = lab.request("sleep 100");
    let container = lab
        .executor
        .start(container, executor::Stdio::default())
        .await
        .unwrap();
    let (stdio, streams) = crate::fixture::pipes();
    let output = crate::fixture::read_all(streams);
    let process = container.exec(shell(OWN_LABEL), stdio).await.unwrap();
    assert!(process.wait().await.unwrap().success());
    assert_eq!(output.await.unwrap().0.trim(), "executor-suite (enforce)");
}

async fn contexts_are_set_or_refused(lab: Arc<Lab>) {
    let labels = LabelConfig {
        apparmor_profile: String::new(),
        selinux: true,
    };
    let lab = labelled(&lab, labels);
    if !Path::new("/sys/fs/selinux/enforce").exists() {
        for security in [Security::Sandbox, Security::Insecure] {
            let mut request = lab.request("true");
            request.security = security;
            let message = lab.run(request).await.unwrap_err().to_string();
            assert_eq!(message, "selinux is not available");
        }
        return skip("SELinux contexts", "no policy is loaded");
    }
    let own = lab.sh(OWN_LABEL).await;
    assert!(own.contains(":container_t:s0:c"), "{own}");
}

async fn without_labels_nothing_changes(lab: Arc<Lab>) {
    // The attribute cannot be read at all where no module has one.
    let own = std::fs::read_to_string("/proc/self/attr/current").unwrap_or_default();
    assert_eq!(lab.sh(&format!("{OWN_LABEL} 2>/dev/null || true")).await, own);
}

//! Settings that are known and cannot be honoured.

use super::file::ConfigFile;

/// A setting that cannot be honoured.
#[derive(Debug, thiserror::Error, PartialEq, Eq)]
#[error("{key} is not supported: {reason}")]
pub struct Refused {
    /// The setting, as the file spells it.
    pub key: &'static str,
    /// Why, and what to do instead.
    pub reason: String,
}

/// Refuses settings that would silently have no effect, or not the one that is asked for.
///
/// # Errors
/// [`Refused`] with the first such setting.
pub fn refuse_unsupported(file: &ConfigFile) -> Result<(), Refused> {
    let checks = worker_checks(file).into_iter().chain(daemon_checks(file));
    for (refused, key, reason) in checks {
        if refused {
            return Err(Refused { key, reason });
        }
    }
    Ok(())
}

/// Whether a setting is to be refused, its key, and why.
type Check = (bool, &'static str, String);

fn worker_checks(file: &ConfigFile) -> [Check; 8] {
    let oci = &file.worker.oci;
    let snapshotters = ["", "auto", "overlayfs", "overlay", "native"];
    let containerd_enabled = file.worker.containerd.enabled == Some(true);
    [
        (
            containerd_enabled,
            "worker.containerd.enabled",
            "there is no containerd worker; use worker.oci".to_owned(),
        ),
        (
            oci.enabled == Some(false),
            "worker.oci.enabled",
            "it is the only worker and cannot be turned off".to_owned(),
        ),
        (
            !snapshotters.contains(&oci.snapshotter.as_str()),
            "worker.oci.snapshotter",
            format!(
                "unknown snapshotter name: {:?}; known are overlayfs, native and auto",
                oci.snapshotter
            ),
        ),
        (
            !oci.proxy_snapshotter_path.is_empty(),
            "worker.oci.proxySnapshotterPath",
            "snapshotters of other processes cannot be used".to_owned(),
        ),
        (
            !oci.stargz_snapshotter.is_empty(),
            "worker.oci.stargzSnapshotter",
            "there is no stargz snapshotter".to_owned(),
        ),
        (
            !oci.user_remap.is_empty(),
            "worker.oci.userRemapUnsupported",
            "user ids are not remapped".to_owned(),
        ),
        (
            oci.no_process_sandbox,
            "worker.oci.noProcessSandbox",
            "steps always have a process namespace of their own".to_owned(),
        ),
        (
            oci.max_parallelism < 0,
            "worker.oci.max-parallelism",
            format!("{} is negative", oci.max_parallelism),
        ),
    ]
}

fn daemon_checks(file: &ConfigFile) -> [Check; 3] {
    let gha = file.cache.gha.as_ref();
    let gha_signatures = gha.is_some_and(|gha| !gha.sign.is_empty() || !gha.verify.is_empty());
    [
        (
            file.system.max_registry_concurrency.is_some(),
            "system.maxRegistryConcurrency",
            "the number of connections a registry is fixed".to_owned(),
        ),
        (
            file.system.platforms_cache_max_age.is_some(),
            "system.platformsCacheMaxAge",
            "platforms are found once, when the daemon starts".to_owned(),
        ),
        (
            gha_signatures,
            "cache.gha",
            "caches are neither signed nor verified".to_owned(),
        ),
    ]
}

//! What the daemon tells of its only worker.

use std::collections::BTreeMap;
use std::io::{self, Write as _};
use std::os::unix::fs::OpenOptionsExt;
use std::path::Path;
use std::time::Duration;

use api::pb::{pb, worker};
use cache::PruneOptions;
use oci::Platform;

/// The version of BuildKit that this daemon is compatible with; its own follows the `+`, which comparisons ignore.
pub const VERSION: &str = concat!("v0.31.0+cooper.", env!("CARGO_PKG_VERSION"));
/// Whose program it is.
pub const PACKAGE: &str = "cooper";
/// Where the state directory keeps the worker's id.
const ID_FILE: &str = "workerid";

const LABEL_PREFIX: &str = "org.mobyproject.buildkit.worker.";

/// Facts about the worker that are shown.
#[derive(Clone, Debug, Default)]
pub struct WorkerFacts {
    /// The snapshotter's name.
    pub snapshotter: String,
    /// The network that steps get.
    pub network: String,
    /// `sandbox` or `no-sandbox`.
    pub process_mode: String,
    /// Whether steps get SELinux labels.
    pub selinux: bool,
    /// AppArmor profile of steps; empty: none.
    pub apparmor_profile: String,
    /// The user's own labels.
    pub labels: BTreeMap<String, String>,
    /// Platforms that steps are run for.
    pub platforms: Vec<Platform>,
    /// Policies of garbage collection.
    pub policies: Vec<PruneOptions>,
}

/// Returns the commit that the program was built from, if that was known.
pub fn revision() -> &'static str {
    option_env!("COOPER_REVISION").unwrap_or_default()
}

/// Returns the version as messages have it.
pub fn version() -> worker::BuildkitVersion {
    worker::BuildkitVersion {
        package: PACKAGE.to_owned(),
        version: VERSION.to_owned(),
        revision: revision().to_owned(),
        dockerfile_version: engine::DOCKERFILE_VERSION.to_owned(),
    }
}

/// Returns what web servers are told: some serve builders by the name of the one that this daemon is compatible with.
pub fn user_agent() -> String {
    let release = VERSION.split('+').next().unwrap_or_default();
    let minor = release.rsplit_once('.').map_or(release, |(minor, _)| minor);
    format!("buildkit/{minor} cooper/{}", env!("CARGO_PKG_VERSION"))
}

/// Reads the worker's id from the state directory, or makes one and keeps it there. Blocking.
///
/// # Errors
/// When the file cannot be read or written.
pub fn worker_id(root: &Path) -> io::Result<String> {
    let path = root.join(ID_FILE);
    match std::fs::read_to_string(&path) {
        Ok(id) if !id.trim().is_empty() => return Ok(id.trim().to_owned()),
        Ok(_) => {}
        Err(error) if error.kind() == io::ErrorKind::NotFound => {}
        Err(error) => return Err(error),
    }
    let id = std::fs::read_to_string("/proc/sys/kernel/random/uuid")?
        .trim()
        .replace('-', "");
    let new = root.join(format!("{ID_FILE}.new"));
    let mut options = std::fs::OpenOptions::new();
    options.write(true).create(true).truncate(true).mode(0o644);
    options.open(&new)?.write_all(id.as_bytes())?;
    std::fs::rename(&new, &path)?;
    Ok(id)
}

fn hostname() -> String {
    std::fs::read_to_string("/proc/sys/kernel/hostname")
        .map_or_else(|_| "unknown".to_owned(), |name| name.trim().to_owned())
}

/// Makes the worker's record.
pub fn record(id: String, facts: WorkerFacts) -> worker::WorkerRecord {
    let mut labels = BTreeMap::from(
        [
            ("executor", "oci".to_owned()),
            ("hostname", hostname()),
            ("network", facts.network),
            ("oci.process-mode", facts.process_mode),
            ("selinux.enabled", facts.selinux.to_string()),
            ("snapshotter", facts.snapshotter),
        ]
        .map(|(name, value)| (format!("{LABEL_PREFIX}{name}"), value)),
    );
    if !facts.apparmor_profile.is_empty() {
        labels.insert(format!("{LABEL_PREFIX}apparmor.profile"), facts.apparmor_profile);
    }
    labels.extend(facts.labels);
    let platforms = facts.platforms.into_iter().map(|platform| pb::Platform {
        architecture: platform.architecture,
        os: platform.os,
        variant: platform.variant,
        os_version: platform.os_version,
        os_features: platform.os_features,
    });
    worker::WorkerRecord {
        id,
        labels,
        platforms: platforms.collect(),
        gc_policy: facts.policies.into_iter().map(policy).collect(),
        buildkit_version: Some(version()),
        cdi_devices: Vec::new(),
    }
}

fn policy(policy: PruneOptions) -> worker::GcPolicy {
    let size = |bytes: u64| i64::try_from(bytes).unwrap_or(i64::MAX);
    let nanoseconds = |span: Duration| i64::try_from(span.as_nanos()).unwrap_or(i64::MAX);
    worker::GcPolicy {
        all: policy.all,
        keep_duration: nanoseconds(policy.keep_duration),
        filters: policy.filter,
        reserved_space: size(policy.reserved_bytes),
        max_used_space: size(policy.max_used_bytes),
        min_free_space: size(policy.min_free_bytes),
    }
}

/// Tells whether a worker matches any of the filters; without filters, it does. A filter is a list of conditions that
/// must all hold: `id==x`, `labels."name"==x`, `labels.name`, with `!=` for the opposite and `~=` for a part of the text.
///
/// # Errors
/// For a filter that cannot be read.
pub fn matches(worker: &worker::WorkerRecord, filters: &[String]) -> Result<bool, String> {
    if filters.is_empty() {
        return Ok(true);
    }
    let mut any = false;
    for filter in filters {
        let mut all = true;
        for condition in filter.split(',') {
            all &= holds(worker, condition.trim())?;
        }
        any |= all;
    }
    Ok(any)
}

/// How a condition compares a field's value with its own.
type Comparison = fn(&str, &str) -> bool;

fn holds(worker: &worker::WorkerRecord, condition: &str) -> Result<bool, String> {
    let operators: [(&str, Comparison); 3] = [
        ("==", |one, other| one == other),
        ("!=", |one, other| one != other),
        ("~=", |one, other| one.contains(other)),
    ];
    let found = operators
        .iter()
        .find_map(|(text, holds)| condition.split_once(text).map(|parts| (parts, holds)));
    let (field, wanted) = match found {
        Some(((field, value), holds)) => (field.trim(), Some((value.trim().trim_matches('"'), holds))),
        None => (condition, None),
    };
    let value = match field.strip_prefix("labels.") {
        Some(label) => worker.labels.get(label.trim_matches('"')).map(String::as_str),
        None if field == "id" => Some(worker.id.as_str()),
        None => return Err(format!("invalid filter {condition:?}: unknown field {field:?}")),
    };
    Ok(match wanted {
        None => value.is_some(),
        Some((wanted, holds)) => holds(value.unwrap_or_default(), wanted),
    })
}

/// Finds the platforms whose programs run here: the host's with its variants, its 32-bit one, and those that the kernel
/// hands to an emulator.
pub fn platforms() -> Vec<Platform> {
    let host = Platform::host();
    let mut platforms = vec![host.clone()];
    platforms.extend(variants().iter().map(|variant| {
        let mut platform = host.clone();
        (*variant).clone_into(&mut platform.variant);
        platform
    }));
    if host.architecture == "amd64" && runs_386() {
        platforms.push(Platform::new("linux", "386"));
    }
    let entries = std::fs::read_dir("/proc/sys/fs/binfmt_misc");
    let names = entries
        .into_iter()
        .flatten()
        .filter_map(|entry| entry.ok()?.file_name().into_string().ok());
    let mut names: Vec<String> = names.filter(|name| is_enabled(name)).collect();
    names.sort();
    for name in names {
        let emulated = emulated(&name).map(|(architecture, variant)| {
            let mut platform = Platform::new("linux", architecture);
            variant.clone_into(&mut platform.variant);
            platform
        });
        let is_new = |platform: &Platform| {
            platforms
                .iter()
                .all(|known| known.architecture != platform.architecture)
        };
        let emulated = emulated.filter(is_new);
        platforms.extend(emulated);
    }
    platforms
}

/// Returns the levels of the x86-64 psABI that the processor has, beyond the first.
#[cfg(target_arch = "x86_64")]
fn variants() -> &'static [&'static str] {
    let v2 = std::is_x86_feature_detected!("sse4.2")
        && std::is_x86_feature_detected!("ssse3")
        && std::is_x86_feature_detected!("popcnt")
        && std::is_x86_feature_detected!("cmpxchg16b");
    let v3 = std::is_x86_feature_detected!("avx2")
        && std::is_x86_feature_detected!("bmi1")
        && std::is_x86_feature_detected!("bmi2")
        && std::is_x86_feature_detected!("f16c")
        && std::is_x86_feature_detected!("fma")
        && std::is_x86_feature_detected!("lzcnt")
        && std::is_x86_feature_detected!("movbe");
    let v4 = std::is_x86_feature_detected!("avx512f")
        && std::is_x86_feature_detected!("avx512bw")
        && std::is_x86_feature_detected!("avx512cd")
        && std::is_x86_feature_detected!("avx512dq")
        && std::is_x86_feature_detected!("avx512vl");
    match (v2, v3, v4) {
        (true, true, true) => &["v2", "v3", "v4"],
        (true, true, false) => &["v2", "v3"],
        (true, false, _) => &["v2"],
        (false, ..) => &[],
    }
}

#[cfg(not(target_arch = "x86_64"))]
fn variants() -> &'static [&'static str] {
    &[]
}

/// Returns whether the kernel runs 32-bit x86 programs: whether it was built to, and was not told otherwise at boot.
fn runs_386() -> bool {
    let line = std::fs::read_to_string("/proc/cmdline").unwrap_or_default();
    let is_off = line.split_whitespace().any(|word| {
        word.strip_prefix("ia32_emulation=")
            .is_some_and(|value| matches!(value, "0" | "off" | "n" | "no" | "false"))
    });
    !is_off && Path::new("/proc/sys/abi/vsyscall32").exists()
}

fn is_enabled(name: &str) -> bool {
    let text = std::fs::read_to_string(Path::new("/proc/sys/fs/binfmt_misc").join(name)).unwrap_or_default();
    text.lines().next() == Some("enabled")
}

/// Returns the architecture and variant that an emulator of this name is for.
fn emulated(name: &str) -> Option<(&'static str, &'static str)> {
    Some(match name.strip_prefix("qemu-").unwrap_or(name) {
        "x86_64" => ("amd64", ""),
        "i386" => ("386", ""),
        "aarch64" => ("arm64", ""),
        "arm" => ("arm", "v7"),
        "riscv64" => ("riscv64", ""),
        "ppc64le" => ("ppc64le", ""),
        "s390x" => ("s390x", ""),
        "mips64" => ("mips64", ""),
        "mips64el" => ("mips64le", ""),
        "loongarch64" => ("loong64", ""),
        _ => return None,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn servers_are_told_a_release() {
        let told = user_agent();
        let (buildkit, own) = told.split_once(' ').unwrap();
        let release = buildkit.strip_prefix("buildkit/v").unwrap();
        assert!(VERSION.starts_with(&format!("v{release}.")), "{told}");
        assert_eq!(release.split('.').count(), 2, "{told}");
        assert!(own.starts_with("cooper/"), "{told}");
    }

    #[test]
    fn ids_are_kept() {
        let dir = tempfile::tempdir().unwrap();
        let id = worker_id(dir.path()).unwrap();
        assert_eq!(id.len(), 32);
        assert_eq!(worker_id(dir.path()).unwrap(), id);
    }

    #[test]
    fn records_have_buildkits_labels() {
        let facts = WorkerFacts {
            snapshotter: "overlayfs".to_owned(),
            network: "host".to_owned(),
            labels: [("a".to_owned(), "b".to_owned())].into(),
            platforms: vec![Platform::new("linux", "amd64")],
            ..WorkerFacts::default()
        };
        let record = record("id".to_owned(), facts);
        assert_eq!(record.labels["org.mobyproject.buildkit.worker.executor"], "oci");
        assert_eq!(
            record.labels["org.mobyproject.buildkit.worker.snapshotter"],
            "overlayfs"
        );
        assert_eq!(record.labels["a"], "b");
        assert_eq!(record.platforms[0].architecture, "amd64");
        for (filter, expected) in [
            ("id==id", true),
            ("id!=id", false),
            ("labels.a", true),
            ("labels.\"a\"==b,id==id", true),
            ("labels.a~=c", false),
        ] {
            assert_eq!(matches(&record, &[filter.to_owned()]), Ok(expected), "{filter}");
        }
        assert!(matches(&record, &["size>1".to_owned()]).is_err());
        assert_eq!(matches(&record, &[]), Ok(true));
    }

    #[test]
    fn the_host_comes_first() {
        let found = platforms();
        assert_eq!(found[0], Platform::host());
        let names: std::collections::BTreeSet<String> = found.iter().map(ToString::to_string).collect();
        assert_eq!(names.len(), found.len(), "{names:?}");
        assert_eq!(
            names.contains("linux/386"),
            Platform::host().architecture == "amd64" && runs_386()
        );
        assert_eq!(emulated("qemu-aarch64"), Some(("arm64", "")));
        assert_eq!(emulated("python3"), None);
    }
}

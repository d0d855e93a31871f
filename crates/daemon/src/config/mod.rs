//! The daemon's configuration: `buildkitd.toml` as BuildKit reads it, with the flags on top.
//!
//! Every table and key of BuildKit is known. What cannot be honoured is refused by its name ([`unsupported`]); a key that
//! nobody knows is reported as a warning, so that a misspelt one is noticed.

mod file;
mod size;
mod unsupported;

pub use file::{
    CacheTable, CdiTable, ConfigFile, ContainerdTable, DnsTable, FrontendTable, FrontendTables, GcRule,
    GhaTable, GrpcTable, HistoryTable, KeyPair, LogTable, OciTable, OtelTable, RegistryTable, SystemTable,
    TlsTable, WorkerTables,
};
pub use size::{DiskSize, Seconds, SizeError};
pub use unsupported::{Refused, refuse_unsupported};

use std::path::{Path, PathBuf};

/// Why a configuration cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum ConfigError {
    /// The file cannot be read.
    #[error("failed to load config from {path}")]
    Read {
        /// The file.
        path: PathBuf,
        /// Why.
        #[source]
        source: std::io::Error,
    },
    /// The file is not what it should be.
    #[error("failed to parse config {path}")]
    Parse {
        /// The file.
        path: PathBuf,
        /// Where and why.
        #[source]
        source: toml::de::Error,
    },
    /// It asks for what is not there.
    #[error(transparent)]
    Refused(#[from] Refused),
    /// A value makes no sense.
    #[error("{message}")]
    Invalid {
        /// The text.
        message: String,
    },
}

impl ConfigError {
    pub(crate) fn invalid(message: impl Into<String>) -> Self {
        Self::Invalid {
            message: message.into(),
        }
    }
}

/// Reads a configuration file; one that does not exist is empty. Returns the keys that are not known with it.
///
/// # Errors
/// [`ConfigError`] when it exists and cannot be used.
pub fn load(path: &Path) -> Result<(ConfigFile, Vec<String>), ConfigError> {
    let text = match std::fs::read_to_string(path) {
        Ok(text) => text,
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => {
            return Ok((ConfigFile::default(), Vec::new()));
        }
        Err(source) => {
            return Err(ConfigError::Read {
                path: path.to_owned(),
                source,
            });
        }
    };
    parse(&text).map_err(|source| ConfigError::Parse {
        path: path.to_owned(),
        source,
    })
}

fn parse(text: &str) -> Result<(ConfigFile, Vec<String>), toml::de::Error> {
    let mut unknown = Vec::new();
    let deserializer = toml::Deserializer::parse(text)?;
    let file = serde_ignored::deserialize(deserializer, |path| unknown.push(path.to_string()))?;
    Ok((file, unknown))
}

#[cfg(test)]
mod tests {
    use super::*;

    const FULL: &str = r#"
root = "/foo/bar"
debug=true
insecure-entitlements = ["security.insecure"]
proxyNetwork = false
[gc]
enabled=true
[grpc]
address=["buildkit.sock"]
debugAddress="debug.sock"
gid=1234
[grpc.tls]
cert="mycert.pem"
[otel]
socketPath="/tmp/otel-grpc.sock"
[worker.oci]
enabled=true
snapshotter="overlayfs"
gc=false
gckeepstorage=123456789
[worker.oci.labels]
foo="bar"
"aa.bb.cc"="baz"
[worker.containerd]
namespace="non-default"
platforms=["linux/amd64"]
[worker.containerd.runtime]
name="exotic"
options.foo="bar"
[[worker.containerd.gcpolicy]]
all=true
filters=["foo==bar"]
reservedSpace=20
keepDuration=3600
[[worker.oci.gcpolicy]]
reservedSpace="40MB"
keepDuration="24h"
maxUsedSpace="80%"
[registry."docker.io"]
mirrors=["hub.docker.io"]
http=true
ca=["myca.pem"]
[[registry."docker.io".keypair]]
key="key.pem"
cert="cert.pem"
[dns]
nameservers=["1.1.1.1"]
searchDomains=["example.com"]
[cdi]
specDirs=["/x"]
[frontend."dockerfile.v0"]
enabled=false
[frontend."gateway.v0"]
allowedRepositories=["docker.io/x"]
[system]
maxRegistryConcurrency=4
platformsCacheMaxAge="1h"
[history]
maxAge="48h"
maxEntries=5
"#;

    #[test]
    fn reads_every_table() {
        let (file, unknown) = parse(FULL).unwrap();
        assert_eq!(unknown, ["gc"]);
        assert_eq!(file.root.as_deref(), Some(Path::new("/foo/bar")));
        assert_eq!(file.insecure_entitlements, ["security.insecure"]);
        assert_eq!(file.grpc.gid, Some(1234));
        assert_eq!(file.worker.oci.labels["aa.bb.cc"], "baz");
        assert_eq!(file.worker.oci.gc, Some(false));
        assert_eq!(file.worker.oci.gckeepstorage, DiskSize::Bytes(123_456_789));
        let rule = &file.worker.oci.gcpolicy[0];
        assert_eq!(
            (rule.reserved_space, rule.max_used_space),
            (DiskSize::Bytes(40 << 20), DiskSize::Percent(80))
        );
        assert_eq!(rule.keep_duration.0, 86_400);
        assert_eq!(file.worker.containerd.gcpolicy[0].keep_duration.0, 3_600);
        assert_eq!(file.registry["docker.io"].keypair[0].key, Path::new("key.pem"));
        assert_eq!(file.frontend.dockerfile.enabled, Some(false));
        assert_eq!(file.system.platforms_cache_max_age.map(|age| age.0), Some(3_600));
        assert_eq!(file.history.max_entries, 5);
        assert!(
            refuse_unsupported(&file)
                .unwrap_err()
                .to_string()
                .contains("maxRegistryConcurrency")
        );
    }

    #[test]
    fn refuses_by_name_what_is_not_there() {
        for (text, name) in [
            ("[worker.containerd]\nenabled=true", "worker.containerd.enabled"),
            ("[worker.oci]\nenabled=false", "worker.oci.enabled"),
            ("[worker.oci]\nsnapshotter='stargz'", "worker.oci.snapshotter"),
            (
                "[worker.oci]\nproxySnapshotterPath='/x'",
                "worker.oci.proxySnapshotterPath",
            ),
            (
                "[worker.oci]\nuserRemapUnsupported='x'",
                "worker.oci.userRemapUnsupported",
            ),
            ("[worker.oci]\nmax-parallelism=-1", "worker.oci.max-parallelism"),
            ("[cache.gha.verify]\nrequired=true", "cache.gha"),
        ] {
            let (file, _) = parse(text).unwrap();
            assert!(
                refuse_unsupported(&file).unwrap_err().to_string().contains(name),
                "{text}"
            );
        }
    }

    #[test]
    fn wrong_types_are_errors() {
        for bad in [
            "root = 1",
            "[worker.oci]\ngckeepstorage='x'",
            "[history]\nmaxAge='soon'",
            "[",
        ] {
            assert!(parse(bad).is_err(), "{bad}");
        }
    }
}

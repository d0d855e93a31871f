//! The socket at which processes of containers leave their OpenTelemetry spans.

use std::io;
use std::os::unix::fs::MetadataExt as _;
use std::path::{Path, PathBuf};
use std::sync::{Arc, OnceLock};

/// Where containers have the socket.
pub(crate) const TARGET: &str = "/dev/otel-grpc.sock";
/// What exporters of spans are told, unless the step tells them otherwise.
const EXPORTER_ENV: [(&str, &str); 3] = [
    ("OTEL_TRACES_EXPORTER", "otlp"),
    ("OTEL_EXPORTER_OTLP_TRACES_ENDPOINT", "unix:///dev/otel-grpc.sock"),
    ("OTEL_EXPORTER_OTLP_TRACES_PROTOCOL", "grpc"),
];

/// A socket that is mounted into every container, once it is there. Cheap to clone; all clones are one. The default one
/// never comes to be there.
#[derive(Clone, Debug, Default)]
pub struct TraceSocket(Arc<OnceLock<Place>>);

#[derive(Debug)]
struct Place {
    path: PathBuf,
    /// Device and inode.
    identity: (u64, u64),
}

impl TraceSocket {
    /// Lets containers that start from now on have a socket. The first one that is named counts. Absolute.
    ///
    /// # Errors
    /// When there is nothing at the path.
    pub fn offer(&self, path: &Path) -> io::Result<()> {
        let place = Place {
            path: path.to_owned(),
            identity: identity(path)?,
        };
        self.0.get_or_init(|| place);
        Ok(())
    }

    /// Returns the socket's path, unless something else is there by now: another daemon's socket is not to be offered.
    pub(crate) fn path(&self) -> Option<PathBuf> {
        let place = self.0.get()?;
        let is_there = identity(&place.path).is_ok_and(|found| found == place.identity);
        is_there.then(|| place.path.clone())
    }
}

fn identity(path: &Path) -> io::Result<(u64, u64)> {
    let metadata = std::fs::symlink_metadata(path)?;
    Ok((metadata.dev(), metadata.ino()))
}

/// Adds what exporters are told, where the environment does not say it, and the parent of the process' spans, a
/// `traceparent` of W3C Trace Context: that one replaces the environment's.
pub(crate) fn add_environment(env: &mut Vec<String>, parent: Option<&str>) {
    for (name, value) in EXPORTER_ENV {
        let is_set = env
            .iter()
            .any(|pair| pair.split_once('=').map_or(pair.as_str(), |(known, _)| known) == name);
        if !is_set {
            env.push(format!("{name}={value}"));
        }
    }
    env.extend(parent.map(|parent| format!("TRACEPARENT={parent}")));
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_a_step_says_itself_stays() {
        let mut env = vec!["OTEL_TRACES_EXPORTER=none".to_owned(), "A=b".to_owned()];
        add_environment(&mut env, Some("00-1-2-01"));
        assert_eq!(
            env,
            [
                "OTEL_TRACES_EXPORTER=none",
                "A=b",
                "OTEL_EXPORTER_OTLP_TRACES_ENDPOINT=unix:///dev/otel-grpc.sock",
                "OTEL_EXPORTER_OTLP_TRACES_PROTOCOL=grpc",
                "TRACEPARENT=00-1-2-01",
            ]
        );
        let mut env = Vec::new();
        add_environment(&mut env, None);
        assert_eq!((env.len(), env[0].as_str()), (3, "OTEL_TRACES_EXPORTER=otlp"));
    }

    #[test]
    fn a_socket_that_was_replaced_is_not_offered() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("socket");
        let socket = TraceSocket::default();
        assert_eq!(socket.path(), None);
        assert!(socket.offer(&path).is_err());
        std::fs::write(&path, "").unwrap();
        socket.offer(&path).unwrap();
        assert_eq!(socket.clone().path(), Some(path.clone()));
        // The first file stays, so that the other one cannot have its inode.
        std::fs::rename(&path, directory.path().join("old")).unwrap();
        assert_eq!(socket.path(), None);
        std::fs::write(&path, "").unwrap();
        assert_eq!(socket.path(), None);
    }
}

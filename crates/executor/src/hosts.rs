//! The `/etc/hosts` of containers.

use std::fmt::Write as _;

use crate::error::RunError;
use crate::request::HostAddress;

const DEFAULT_HOSTNAME: &str = "buildkitsandbox";

/// Returns the file's text.
pub(crate) fn hosts_file(hostname: &str, extra: &[HostAddress]) -> Result<String, RunError> {
    let hostname = if hostname.is_empty() {
        DEFAULT_HOSTNAME
    } else {
        hostname
    };
    let mut text = format!("127.0.0.1\tlocalhost {hostname}\n::1\tlocalhost ip6-localhost ip6-loopback\n");
    for entry in extra {
        if entry.host.contains(['\n', '\0']) {
            return Err(RunError::Invalid {
                message: format!("invalid host name {:?}", entry.host),
            });
        }
        // Writing to a String cannot fail.
        let _ = writeln!(text, "{}\t{}", entry.address, entry.host);
    }
    Ok(text)
}

/// Whether a container can share the file without anything of its own.
pub(crate) fn is_default(hostname: &str, extra: &[HostAddress]) -> bool {
    extra.is_empty() && (hostname.is_empty() || hostname == DEFAULT_HOSTNAME)
}

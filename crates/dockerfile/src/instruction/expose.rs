//! Ports of EXPOSE.

use std::net::IpAddr;

use crate::text::quote;

/// Why a port is refused.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub(crate) enum PortError {
    #[error("invalid port: {}: no port specified", quote(.0))]
    Missing(String),
    #[error("invalid port: {}: invalid proto: {protocol}", quote(.port))]
    Protocol { port: String, protocol: String },
    #[error("invalid IP address {0}")]
    BracketedAddress(String),
    #[error("invalid IP address: {0}")]
    Address(String),
    #[error("invalid containerPort: {0}")]
    ContainerPort(String),
    #[error("invalid hostPort: {0}")]
    HostPort(String),
    #[error("invalid ranges specified for container and host Ports: {container} and {host}")]
    Ranges { container: String, host: String },
}

/// A port, or a range of them.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Port {
    /// As in the image configuration: `80/tcp`.
    pub(crate) exposed: Vec<String>,
    /// The protocol is not in lower case.
    pub(crate) odd_casing: bool,
    /// There is an address or a host port, neither of which means anything here.
    pub(crate) has_host: bool,
}

/// Parses `[[address:]host:]port[-port][/protocol]`. The lint of a refused port is lost with it.
pub(crate) fn parse_port(text: &str) -> Result<Port, PortError> {
    let parts: Vec<&str> = text.split(':').collect();
    let (address, host, container) = match parts[..] {
        [container] => (String::new(), "", container),
        [host, container] => (String::new(), host, container),
        [ref address @ .., host, container] => (address.join(":"), host, container),
        [] => (String::new(), "", ""),
    };
    let (container, protocol) = container.split_once('/').unwrap_or((container, ""));
    if container.is_empty() {
        return Err(PortError::Missing(text.to_owned()));
    }
    let lower = protocol.to_lowercase();
    let lower = match lower.as_str() {
        "" => "tcp",
        "tcp" | "udp" | "sctp" => lower.as_str(),
        _ => return Err(PortError::Protocol { port: text.to_owned(), protocol: protocol.to_owned() }),
    };
    check_address(&address)?;
    let (start, end) = range(container).ok_or_else(|| PortError::ContainerPort(container.to_owned()))?;
    if !host.is_empty() {
        let (host_start, host_end) = range(host).ok_or_else(|| PortError::HostPort(host.to_owned()))?;
        if end - start != host_end - host_start && end != start {
            return Err(PortError::Ranges { container: container.to_owned(), host: host.to_owned() });
        }
    }
    Ok(Port {
        exposed: (start..=end).map(|port| format!("{port}/{lower}")).collect(),
        odd_casing: protocol != protocol.to_lowercase(),
        has_host: !address.is_empty() || !host.is_empty(),
    })
}

fn check_address(address: &str) -> Result<(), PortError> {
    let bare = match address.strip_prefix('[') {
        None => address,
        Some(rest) => rest.strip_suffix(']').ok_or_else(|| PortError::BracketedAddress(address.to_owned()))?,
    };
    if bare.is_empty() || bare.parse::<IpAddr>().is_ok() { Ok(()) } else { Err(PortError::Address(bare.to_owned())) }
}

fn range(text: &str) -> Option<(u16, u16)> {
    let number = |text: &str| text.parse::<u16>().ok();
    match text.split_once('-') {
        None => number(text).map(|port| (port, port)),
        Some((start, end)) => {
            let (start, end) = (number(start)?, number(end)?);
            (start <= end).then_some((start, end))
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn parses_ports() {
        assert_eq!(parse_port("80").unwrap().exposed, ["80/tcp"]);
        assert_eq!(parse_port("80-82/UDP").unwrap().exposed, ["80/udp", "81/udp", "82/udp"]);
        assert!(parse_port("[::1]:80:80").unwrap().has_host);
        assert_eq!(parse_port("x").unwrap_err().to_string(), "invalid containerPort: x");
        assert_eq!(parse_port("80/x").unwrap_err().to_string(), "invalid port: \"80/x\": invalid proto: x");
        assert_eq!(parse_port("/tcp").unwrap_err().to_string(), "invalid port: \"/tcp\": no port specified");
        assert_eq!(parse_port("80-79").unwrap_err().to_string(), "invalid containerPort: 80-79");
    }
}

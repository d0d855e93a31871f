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
    #[error("invalid IP address {address}: address {address}:: {reason}")]
    BracketedAddress { address: String, reason: &'static str },
    #[error("invalid IP address: {0}")]
    Address(String),
    #[error("invalid containerPort: {0}")]
    ContainerPort(String),
    #[error("invalid hostPort: {0}")]
    HostPort(String),
    #[error("invalid ranges specified for container and host Ports: {container} and {host}")]
    Ranges { container: String, host: String },
}

/// A port, or a range of them, split but not yet understood.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Port {
    address: String,
    host: String,
    container: String,
    protocol: String,
    /// The protocol is not in lower case.
    pub(crate) odd_casing: bool,
}

/// Splits `[[address:]host:]port[-port][/protocol]`.
pub(crate) fn split_port(text: &str) -> Result<Port, PortError> {
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
        _ => {
            return Err(PortError::Protocol {
                port: text.to_owned(),
                protocol: protocol.to_owned(),
            });
        }
    };
    Ok(Port {
        odd_casing: protocol != protocol.to_lowercase(),
        address,
        host: host.to_owned(),
        container: container.to_owned(),
        protocol: lower.to_owned(),
    })
}

impl Port {
    /// There is an address or a host port, neither of which means anything here.
    pub(crate) fn has_host(&self) -> bool {
        !self.address.is_empty() || !self.host.is_empty()
    }

    /// Lists the ports as the image configuration has them: `80/tcp`.
    pub(crate) fn exposed(&self) -> Result<Vec<String>, PortError> {
        let (host, container) = (self.host.as_str(), self.container.as_str());
        check_address(&self.address)?;
        let (start, end) = range(container).ok_or_else(|| PortError::ContainerPort(container.to_owned()))?;
        if !host.is_empty() {
            let (host_start, host_end) = range(host).ok_or_else(|| PortError::HostPort(host.to_owned()))?;
            if end - start != host_end - host_start && end != start {
                return Err(PortError::Ranges {
                    container: container.to_owned(),
                    host: host.to_owned(),
                });
            }
        }
        Ok((start..=end)
            .map(|port| format!("{port}/{}", self.protocol))
            .collect())
    }
}

fn check_address(address: &str) -> Result<(), PortError> {
    let bare = match address.strip_prefix('[') {
        None => address,
        Some(rest) => rest
            .strip_suffix(']')
            .ok_or_else(|| PortError::BracketedAddress {
                address: address.to_owned(),
                reason: if rest.contains(']') {
                    "missing port in address"
                } else {
                    "missing ']' in address"
                },
            })?,
    };
    if bare.is_empty() || bare.parse::<IpAddr>().is_ok() {
        Ok(())
    } else {
        Err(PortError::Address(bare.to_owned()))
    }
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

    fn exposed(text: &str) -> Result<Vec<String>, String> {
        split_port(text)
            .and_then(|port| port.exposed())
            .map_err(|err| err.to_string())
    }

    #[test]
    fn parses_ports() {
        assert_eq!(exposed("80").unwrap(), ["80/tcp"]);
        assert_eq!(exposed("80-82/UDP").unwrap(), ["80/udp", "81/udp", "82/udp"]);
        assert!(split_port("[::1]:80:80").unwrap().has_host());
        assert_eq!(exposed("x").unwrap_err(), "invalid containerPort: x");
        assert_eq!(
            exposed("80/x").unwrap_err(),
            "invalid port: \"80/x\": invalid proto: x"
        );
        assert_eq!(
            exposed("/tcp").unwrap_err(),
            "invalid port: \"/tcp\": no port specified"
        );
        assert_eq!(exposed("80-79").unwrap_err(), "invalid containerPort: 80-79");
    }
}

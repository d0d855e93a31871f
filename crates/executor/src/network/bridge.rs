//! The built-in bridge: a bridge device of our own, a pair of devices for each container, address translation.
//!
//! Daemons may share a bridge. What they do to it is serialised by a lock on the network namespace it is in; the last
//! one to end removes it. A device is named after the address it carries, so whoever holds the address may remove a
//! device that a killed daemon left.

use std::fs::File;
use std::io;
use std::net::Ipv4Addr;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::Arc;
use std::time::{Duration, Instant};

use rustix::fs::FlockOperation;

use super::addresses::{self, Address, Addresses, Subnet};
use super::link::{self, Link, Pair};
use super::netlink::Netlink;
use super::pool::{Lease, Provider};
use super::{BridgeConfig, NetworkError, firewall, forward, namespace};

/// Marks bridges that we made and may remove.
const ALIAS: &str = "cooper";
/// The device's name in containers.
const INSIDE: &str = "eth0";
const FORWARDING: &str = "/proc/sys/net/ipv4/ip_forward";
/// How long others may hold the lock.
const LOCK_LIMIT: Duration = Duration::from_secs(60);
const LOCK_POLL: Duration = Duration::from_millis(2);

/// A bridge that is in use.
#[derive(Debug)]
pub(super) struct Bridge {
    name: Arc<str>,
    addresses: Addresses,
}

/// A container's place at the bridge.
#[derive(Debug)]
struct Port {
    namespace: OwnedFd,
    address: Address,
    bridge: Arc<str>,
}

fn failed(action: impl Into<String>) -> impl FnOnce(io::Error) -> NetworkError {
    let action = action.into();
    move |source| NetworkError::System { action, source }
}

/// The first half of a device's name, the same for all of a bridge.
fn prefix(bridge: &str) -> String {
    // FNV-1a, folded.
    let hash = bridge.bytes().fold(0x811c_9dc5_u32, |hash, byte| {
        (hash ^ u32::from(byte)).wrapping_mul(0x0100_0193)
    });
    format!("ck{:04x}", (hash >> 16) ^ (hash & 0xffff))
}

fn device_name(bridge: &str, address: Ipv4Addr) -> String {
    format!("{}{:08x}", prefix(bridge), u32::from(address))
}

/// Reads the address out of a device's name, if it is one of the bridge's.
fn address_of(bridge: &str, device: &str) -> Option<Ipv4Addr> {
    let digits = device.strip_prefix(&prefix(bridge))?;
    let is_ours = digits.len() == 8 && digits.bytes().all(|byte| byte.is_ascii_hexdigit());
    let number = is_ours.then(|| u32::from_str_radix(digits, 16).ok())??;
    Some(Ipv4Addr::from(number))
}

/// A hardware address that belongs to an address for good, so that nobody remembers a wrong one.
fn hardware_address(address: Ipv4Addr) -> [u8; 6] {
    let [a, b, c, d] = address.octets();
    // Locally administered.
    [0x02, 0x42, a, b, c, d]
}

fn check_name(name: &str) -> Result<(), NetworkError> {
    let is_plain = |byte: u8| byte.is_ascii_alphanumeric() || matches!(byte, b'-' | b'_' | b'.');
    let is_valid = (1..=15).contains(&name.len())
        && name.bytes().all(is_plain)
        && name.starts_with(|first: char| first.is_ascii_alphabetic());
    if is_valid {
        return Ok(());
    }
    Err(NetworkError::Invalid {
        message: format!(
            "invalid bridge name {name:?}: expected a letter and up to 14 letters, digits, dots, dashes or underscores"
        ),
    })
}

/// Waits for the lock on this network namespace; it is let go with the file.
fn lock() -> Result<File, NetworkError> {
    let action = "lock the network namespace";
    let file = File::from(namespace::current().map_err(failed(action))?);
    let start = Instant::now();
    loop {
        match rustix::fs::flock(&file, FlockOperation::NonBlockingLockExclusive) {
            Ok(()) => return Ok(file),
            Err(rustix::io::Errno::WOULDBLOCK | rustix::io::Errno::INTR) => {}
            Err(error) => return Err(failed(action)(error.into())),
        }
        if start.elapsed() > LOCK_LIMIT {
            return Err(failed(action)(io::Error::new(
                io::ErrorKind::TimedOut,
                "another process holds it",
            )));
        }
        std::thread::sleep(LOCK_POLL);
    }
}

fn enable_forwarding() -> Result<(), NetworkError> {
    let current = std::fs::read_to_string(FORWARDING);
    if current.is_ok_and(|text| text.trim() == "1") {
        return Ok(());
    }
    std::fs::write(FORWARDING, "1").map_err(failed(format!(
        "enable IP forwarding, which the bridge network needs ({FORWARDING})"
    )))
}

fn open_netlink() -> Result<Netlink, NetworkError> {
    Netlink::open().map_err(failed("open a netlink socket"))
}

impl Bridge {
    /// Sets a bridge up, or joins one that others use, and removes devices that nobody owns any more. Blocking.
    pub(super) fn start(config: &BridgeConfig) -> Result<Self, NetworkError> {
        check_name(&config.name)?;
        let subnet = Subnet::parse(&config.subnet)?;
        let bridge = Self {
            name: Arc::from(config.name.as_str()),
            addresses: Addresses::new(&config.name, subnet),
        };
        let prepared = bridge.prepare();
        if prepared.is_err() {
            bridge.close();
        }
        prepared.map(|()| bridge)
    }

    fn prepare(&self) -> Result<(), NetworkError> {
        let _lock = lock()?;
        let mut netlink = open_netlink()?;
        self.set_up(&mut netlink)?;
        self.sweep(&mut netlink)
    }

    fn find(&self, netlink: &mut Netlink) -> Result<Option<Link>, NetworkError> {
        let found = link::find(netlink, &self.name).map_err(failed("list network devices"))?;
        match found {
            Some(link) if link.kind != "bridge" => Err(NetworkError::Invalid {
                message: format!("{:?} already exists but is not a bridge", link.name),
            }),
            found => Ok(found),
        }
    }

    /// Makes the bridge unless it exists, and puts its address and rules in force. The lock is held.
    fn set_up(&self, netlink: &mut Netlink) -> Result<Link, NetworkError> {
        let (name, subnet) = (&*self.name, self.addresses.subnet);
        let gateway = subnet.gateway();
        let link = match self.find(netlink)? {
            Some(link) => link,
            None => {
                link::add_bridge(netlink, name, hardware_address(gateway))
                    .map_err(failed(format!("make the bridge {name}")))?;
                let link = self.find(netlink)?.ok_or_else(|| NetworkError::Invalid {
                    message: format!("the bridge {name:?} vanished"),
                })?;
                link::set_alias(netlink, link.index, ALIAS)
                    .map_err(failed(format!("mark the bridge {name}")))?;
                link
            }
        };
        link::add_address(netlink, link.index, gateway, subnet.prefix)
            .map_err(failed(format!("give {gateway} to the bridge {name}")))?;
        link::set_up(netlink, link.index).map_err(failed(format!("bring the bridge {name} up")))?;
        enable_forwarding()?;
        firewall::set(name, subnet)?;
        forward::accept(name);
        Ok(link)
    }

    /// Removes devices of addresses that nobody holds. The lock is held.
    fn sweep(&self, netlink: &mut Netlink) -> Result<(), NetworkError> {
        let links = link::links(netlink).map_err(failed("list network devices"))?;
        for device in links {
            let Some(address) = address_of(&self.name, &device.name) else {
                continue;
            };
            if let Some(_held) = addresses::take(&self.name, address)? {
                tracing::info!(device = device.name, %address, "removing a device that nobody owns any more");
                link::remove(netlink, device.index).map_err(failed(format!("remove {}", device.name)))?;
            }
        }
        Ok(())
    }

    /// Removes the bridge unless others use it.
    fn tear_down(&self) -> Result<(), NetworkError> {
        let _lock = lock()?;
        let mut netlink = open_netlink()?;
        let links = link::links(&mut netlink).map_err(failed("list network devices"))?;
        let bridge = links.iter().find(|link| *link.name == *self.name);
        if bridge.is_some_and(|bridge| links.iter().any(|link| link.master == bridge.index)) {
            return Ok(());
        }
        if let Some(bridge) = bridge.filter(|bridge| bridge.alias == ALIAS) {
            link::remove(&mut netlink, bridge.index)
                .map_err(failed(format!("remove the bridge {}", self.name)))?;
        }
        forward::forget(&self.name);
        firewall::clear(&self.name)
    }
}

impl Provider for Bridge {
    fn make(&self, _: &str) -> Result<Box<dyn Lease>, NetworkError> {
        let _lock = lock()?;
        let mut netlink = open_netlink()?;
        let bridge = match self.find(&mut netlink)? {
            Some(bridge) => bridge,
            // Another daemon was the last one for a moment, or somebody cleaned up.
            None => self.set_up(&mut netlink)?,
        };
        let address = self.addresses.take_any()?;
        let name = device_name(&self.name, address.address);
        let stale = link::find(&mut netlink, &name).map_err(failed("list network devices"))?;
        if let Some(stale) = stale {
            link::remove(&mut netlink, stale.index).map_err(failed(format!("remove {name}")))?;
        }
        let subnet = self.addresses.subnet;
        let furnish = |inside: BorrowedFd<'_>| {
            let pair = Pair {
                name: &name,
                master: bridge.index,
                peer_name: INSIDE,
                peer_address: hardware_address(address.address),
                peer_namespace: inside,
            };
            // Of the daemon's namespace, as it was opened there.
            link::add_pair(&mut netlink, &pair)?;
            let mut netlink = Netlink::open()?;
            let missing = || io::Error::from(io::ErrorKind::NotFound);
            let device = link::find(&mut netlink, INSIDE)?.ok_or_else(missing)?;
            link::add_address(&mut netlink, device.index, address.address, subnet.prefix)?;
            link::set_up(&mut netlink, device.index)?;
            link::add_default_route(&mut netlink, subnet.gateway())
        };
        let namespace = namespace::make(furnish)
            .map_err(failed(format!("connect a container to the bridge {}", self.name)))?;
        Ok(Box::new(Port {
            namespace,
            address,
            bridge: Arc::clone(&self.name),
        }))
    }

    fn close(&self) {
        if let Err(error) = self.tear_down() {
            tracing::warn!(%error, "cannot remove the bridge network");
        }
    }
}

impl Lease for Port {
    fn namespace(&self) -> BorrowedFd<'_> {
        self.namespace.as_fd()
    }

    fn release(self: Box<Self>) {
        let name = device_name(&self.bridge, self.address.address);
        // The namespace would take it along, but some time later, and the address is free at once.
        let removed = Netlink::open().and_then(|mut netlink| match link::find(&mut netlink, &name)? {
            Some(device) => link::remove(&mut netlink, device.index),
            None => Ok(()),
        });
        if let Err(error) = removed {
            tracing::warn!(%error, device = name, "cannot remove a network device");
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn devices_are_named_after_bridge_and_address() {
        let address = Ipv4Addr::new(10, 10, 255, 254);
        let name = device_name("buildkit0", address);
        assert!(name.len() <= 15, "{name}");
        assert_eq!(address_of("buildkit0", &name), Some(address));
        assert_eq!(address_of("buildkit1", &name), None);
        for other in ["eth0", "ck", &name[..13], "ck00000a0a0002zz"] {
            assert_eq!(address_of("buildkit0", other), None, "{other}");
        }
    }

    #[test]
    fn names_that_no_device_can_have_are_refused() {
        assert!(check_name("buildkit0").is_ok());
        for name in ["", "sixteen-letters-", "a b", "a\"b", "a/b", "0a", "..", "a;b"] {
            assert!(check_name(name).is_err(), "{name}");
        }
    }
}

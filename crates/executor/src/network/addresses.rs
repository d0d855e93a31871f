//! Which addresses of a bridge's network are in use.
//!
//! The kernel keeps the books: an address in use is an abstract socket of that name in the network namespace the bridge
//! is in. The socket is exclusive among all daemons that share the bridge, and it goes with its process however that
//! ends, so no address outlives a killed daemon and nothing on disk has to be repaired.

use std::net::Ipv4Addr;
use std::os::fd::OwnedFd;
use std::sync::atomic::{AtomicU32, Ordering};

use rustix::net::{AddressFamily, SocketAddrUnix, SocketFlags, SocketType};

use super::NetworkError;

/// Largest network: more addresses than could ever be in use at once.
const MIN_PREFIX: u8 = 8;
/// Smallest network: a bridge and a container.
const MAX_PREFIX: u8 = 30;

/// An IPv4 network; the bridge has its first address, containers the others.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Subnet {
    base: u32,
    pub(super) prefix: u8,
}

impl Subnet {
    /// Reads `10.10.0.0/16`. Any address of the network may be given.
    pub(super) fn parse(text: &str) -> Result<Self, NetworkError> {
        let invalid = || NetworkError::Invalid {
            message: format!(
                "invalid bridge subnet {text:?}: expected an IPv4 network such as 10.10.0.0/16, with {MIN_PREFIX} to \
                 {MAX_PREFIX} bits"
            ),
        };
        let (address, prefix) = text.split_once('/').ok_or_else(invalid)?;
        let address: Ipv4Addr = address.parse().map_err(|_| invalid())?;
        let prefix: u8 = prefix.parse().map_err(|_| invalid())?;
        if !(MIN_PREFIX..=MAX_PREFIX).contains(&prefix) {
            return Err(invalid());
        }
        let mask = u32::MAX << (32 - prefix);
        Ok(Self {
            base: u32::from(address) & mask,
            prefix,
        })
    }

    /// Returns the bridge's address.
    pub(super) fn gateway(self) -> Ipv4Addr {
        Ipv4Addr::from(self.base + 1)
    }

    /// Returns the network in its usual notation.
    pub(super) fn text(self) -> String {
        format!("{}/{}", Ipv4Addr::from(self.base), self.prefix)
    }

    /// How many containers can have an address.
    fn capacity(self) -> u32 {
        // All but the network itself, the bridge and the broadcast address.
        (1_u32 << (32 - self.prefix)) - 3
    }

    /// Returns a container's address by number, which wraps around.
    fn address(self, number: u32) -> Ipv4Addr {
        Ipv4Addr::from(self.base + 2 + number % self.capacity())
    }
}

/// An address in use, as long as this lives.
#[derive(Debug)]
pub(super) struct Address {
    pub(super) address: Ipv4Addr,
    _socket: OwnedFd,
}

/// Takes a certain address; `None` if it is in use.
pub(super) fn take(bridge: &str, address: Ipv4Addr) -> Result<Option<Address>, NetworkError> {
    let failed = |source: rustix::io::Errno| NetworkError::System {
        action: format!("reserve the address {address}"),
        source: source.into(),
    };
    let name = SocketAddrUnix::new_abstract_name(format!("cooper/network/{bridge}/{address}").as_bytes());
    let name = name.map_err(failed)?;
    let (family, kind) = (AddressFamily::UNIX, SocketType::DGRAM);
    let socket = rustix::net::socket_with(family, kind, SocketFlags::CLOEXEC, None).map_err(failed)?;
    match rustix::net::bind(&socket, &name) {
        Ok(()) => Ok(Some(Address {
            address,
            _socket: socket,
        })),
        Err(rustix::io::Errno::ADDRINUSE) => Ok(None),
        Err(error) => Err(failed(error)),
    }
}

/// Hands addresses out, each as late as possible after its last use.
#[derive(Debug)]
pub(super) struct Addresses {
    bridge: String,
    pub(super) subnet: Subnet,
    next: AtomicU32,
}

impl Addresses {
    pub(super) fn new(bridge: &str, subnet: Subnet) -> Self {
        Self {
            bridge: bridge.to_owned(),
            subnet,
            next: AtomicU32::new(0),
        }
    }

    /// Takes an address that nobody uses.
    pub(super) fn take_any(&self) -> Result<Address, NetworkError> {
        for _ in 0..self.subnet.capacity() {
            let number = self.next.fetch_add(1, Ordering::Relaxed);
            if let Some(address) = take(&self.bridge, self.subnet.address(number))? {
                return Ok(address);
            }
        }
        Err(NetworkError::Exhausted {
            subnet: self.subnet.text(),
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Abstract names are the machine's, so tests that run at once need names of their own.
    fn bridge(test: &str) -> String {
        format!("{test}-{}", std::process::id())
    }

    #[test]
    fn subnets_are_read() {
        let subnet = Subnet::parse("10.10.3.4/16").unwrap();
        assert_eq!(subnet.text(), "10.10.0.0/16");
        assert_eq!(subnet.gateway(), Ipv4Addr::new(10, 10, 0, 1));
        assert_eq!(subnet.address(0), Ipv4Addr::new(10, 10, 0, 2));
        assert_eq!(subnet.address(65532), Ipv4Addr::new(10, 10, 255, 254));
        assert_eq!(subnet.address(65533), Ipv4Addr::new(10, 10, 0, 2));
        let top = Subnet::parse("255.255.255.255/30").unwrap();
        assert_eq!(
            (top.address(0), top.capacity()),
            (Ipv4Addr::new(255, 255, 255, 254), 1)
        );
        for text in [
            "",
            "10.0.0.0",
            "10.0.0.0/7",
            "10.0.0.0/31",
            "fd00::/64",
            "10.0.0/8",
            "10.0.0.0/-1",
        ] {
            assert!(Subnet::parse(text).is_err(), "{text}");
        }
    }

    #[test]
    fn an_address_is_given_to_one_and_comes_back() {
        let subnet = Subnet::parse("10.77.0.0/29").unwrap();
        let bridge = bridge("addresses");
        let ours = Addresses::new(&bridge, subnet);
        let theirs = Addresses::new(&bridge, subnet);
        let taken: Vec<Address> = (0..5)
            .map(|number| if number % 2 == 0 { &ours } else { &theirs }.take_any().unwrap())
            .collect();
        let mut distinct: Vec<Ipv4Addr> = taken.iter().map(|address| address.address).collect();
        distinct.sort_unstable();
        distinct.dedup();
        assert_eq!(distinct.len(), 5);
        assert!(!distinct.contains(&subnet.gateway()));
        assert!(matches!(ours.take_any(), Err(NetworkError::Exhausted { .. })));
        drop(taken);
        assert!(take(&bridge, distinct[0]).unwrap().is_some());
        assert!(ours.take_any().is_ok());
    }
}

//! Network devices, addresses and routes.

use std::io;
use std::net::Ipv4Addr;
use std::os::fd::{AsRawFd, BorrowedFd};

use super::netlink::{CREATE, Message, Netlink, attributes, text_of};

const LINK_BODY_BYTES: usize = 16;
/// `VETH_INFO_PEER` of `linux/veth.h`.
const VETH_INFO_PEER: u16 = 1;
const AF_INET: u8 = 2;
const UP: u32 = 1;

/// A network device.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(super) struct Link {
    pub(super) index: u32,
    pub(super) name: String,
    /// `bridge`, `veth`, …; empty for hardware.
    pub(super) kind: String,
    /// Who made it, in words.
    pub(super) alias: String,
    /// Index of the bridge it belongs to; 0: none.
    pub(super) master: u32,
}

/// A pair of devices, one in each namespace.
#[derive(Clone, Copy, Debug)]
pub(super) struct Pair<'a> {
    /// The end in our namespace.
    pub(super) name: &'a str,
    /// The bridge our end belongs to.
    pub(super) master: u32,
    /// The other end's name, hardware address and namespace.
    pub(super) peer_name: &'a str,
    pub(super) peer_address: [u8; 6],
    pub(super) peer_namespace: BorrowedFd<'a>,
}

/// `struct ifinfomsg`; sets the flags that are 1 in `flags`.
fn link_body(index: u32, flags: u32) -> [u8; LINK_BODY_BYTES] {
    let mut body = [0; LINK_BODY_BYTES];
    body[4..8].copy_from_slice(&index.to_ne_bytes());
    body[8..12].copy_from_slice(&flags.to_ne_bytes());
    body[12..16].copy_from_slice(&flags.to_ne_bytes());
    body
}

/// Lists all devices.
pub(super) fn links(netlink: &mut Netlink) -> io::Result<Vec<Link>> {
    let found = netlink.list(libc::RTM_GETLINK, &link_body(0, 0))?;
    Ok(found.iter().filter_map(|body| link_of(body)).collect())
}

/// Finds a device by name.
pub(super) fn find(netlink: &mut Netlink, name: &str) -> io::Result<Option<Link>> {
    Ok(links(netlink)?.into_iter().find(|link| link.name == name))
}

fn number(value: &[u8]) -> u32 {
    value
        .first_chunk::<4>()
        .map_or(0, |bytes| u32::from_ne_bytes(*bytes))
}

fn link_of(body: &[u8]) -> Option<Link> {
    let mut link = Link {
        index: number(body.get(4..8)?),
        ..Link::default()
    };
    for (kind, value) in attributes(body, LINK_BODY_BYTES) {
        match kind {
            libc::IFLA_IFNAME => link.name = text_of(value),
            libc::IFLA_IFALIAS => link.alias = text_of(value),
            libc::IFLA_MASTER => link.master = number(value),
            libc::IFLA_LINKINFO => {
                let found = attributes(value, 0).find(|(kind, _)| *kind == libc::IFLA_INFO_KIND);
                link.kind = found.map(|(_, kind)| text_of(kind)).unwrap_or_default();
            }
            _ => {}
        }
    }
    Some(link)
}

/// Makes a bridge. Its hardware address is given, so that it does not change with the devices that belong to it.
pub(super) fn add_bridge(netlink: &mut Netlink, name: &str, address: [u8; 6]) -> io::Result<()> {
    let mut message = Message::new(libc::RTM_NEWLINK, CREATE, &link_body(0, 0));
    message
        .text(libc::IFLA_IFNAME, name)
        .attribute(libc::IFLA_ADDRESS, &address)
        .nest(libc::IFLA_LINKINFO, |info| {
            info.attribute(libc::IFLA_INFO_KIND, b"bridge");
        });
    netlink.request(message)
}

/// Makes a pair of devices, and our end part of the bridge and up.
pub(super) fn add_pair(netlink: &mut Netlink, pair: &Pair<'_>) -> io::Result<()> {
    let namespace = pair.peer_namespace.as_raw_fd().to_ne_bytes();
    let mut message = Message::new(libc::RTM_NEWLINK, CREATE, &link_body(0, UP));
    message
        .text(libc::IFLA_IFNAME, pair.name)
        .attribute(libc::IFLA_MASTER, &pair.master.to_ne_bytes())
        .nest(libc::IFLA_LINKINFO, |info| {
            info.attribute(libc::IFLA_INFO_KIND, b"veth")
                .nest(libc::IFLA_INFO_DATA, |data| {
                    data.nest(VETH_INFO_PEER, |peer| {
                        peer.raw(&link_body(0, 0));
                        peer.text(libc::IFLA_IFNAME, pair.peer_name)
                            .attribute(libc::IFLA_ADDRESS, &pair.peer_address)
                            .attribute(libc::IFLA_NET_NS_FD, &namespace);
                    });
                });
        });
    netlink.request(message)
}

/// Says who made a device.
pub(super) fn set_alias(netlink: &mut Netlink, index: u32, alias: &str) -> io::Result<()> {
    let mut message = Message::new(libc::RTM_NEWLINK, 0, &link_body(index, 0));
    message.attribute(libc::IFLA_IFALIAS, alias.as_bytes());
    netlink.request(message)
}

/// Brings a device up.
pub(super) fn set_up(netlink: &mut Netlink, index: u32) -> io::Result<()> {
    netlink.request(Message::new(libc::RTM_NEWLINK, 0, &link_body(index, UP)))
}

/// Removes a device, and with one end of a pair the other; one that is gone is no error.
pub(super) fn remove(netlink: &mut Netlink, index: u32) -> io::Result<()> {
    match netlink.request(Message::new(libc::RTM_DELLINK, 0, &link_body(index, 0))) {
        Err(error) if error.raw_os_error() == Some(libc::ENODEV) => Ok(()),
        result => result,
    }
}

/// Gives a device an address; one that it has is no error.
pub(super) fn add_address(
    netlink: &mut Netlink,
    index: u32,
    address: Ipv4Addr,
    prefix: u8,
) -> io::Result<()> {
    // struct ifaddrmsg
    let mut body = [0; 8];
    body[0] = AF_INET;
    body[1] = prefix;
    body[4..8].copy_from_slice(&index.to_ne_bytes());
    let mut message = Message::new(libc::RTM_NEWADDR, CREATE, &body);
    message
        .attribute(libc::IFA_LOCAL, &address.octets())
        .attribute(libc::IFA_ADDRESS, &address.octets());
    match netlink.request(message) {
        Err(error) if error.raw_os_error() == Some(libc::EEXIST) => Ok(()),
        result => result,
    }
}

/// Makes a gateway the default route.
pub(super) fn add_default_route(netlink: &mut Netlink, gateway: Ipv4Addr) -> io::Result<()> {
    // struct rtmsg
    let mut body = [0; 12];
    body[0] = AF_INET;
    body[4] = libc::RT_TABLE_MAIN;
    body[5] = libc::RTPROT_BOOT;
    body[6] = libc::RT_SCOPE_UNIVERSE;
    body[7] = libc::RTN_UNICAST;
    let mut message = Message::new(libc::RTM_NEWROUTE, CREATE, &body);
    message.attribute(libc::RTA_GATEWAY, &gateway.octets());
    netlink.request(message)
}

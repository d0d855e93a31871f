//! Requests to the kernel's routing netlink (rtnetlink(7)), encoded by hand.
//!
//! A message is a header, a structure of its kind, and attributes; all numbers are in the machine's byte order.

use std::io;
use std::os::fd::OwnedFd;

use rustix::net::netlink::SocketAddrNetlink;
use rustix::net::{AddressFamily, RecvFlags, SendFlags, SocketFlags, SocketType};

const HEADER_BYTES: usize = 16;
/// Longest part of an answer; the kernel never sends longer ones for what is asked here.
const RECEIVE_BYTES: usize = 64 << 10;
/// How often a listing that changed while it was made is made again.
const MAX_LISTINGS: usize = 8;
/// `NLM_F_DUMP`.
const DUMP: u16 = 0x300;
const REQUEST: u16 = 1;
const ACK: u16 = 4;
/// `NLM_F_DUMP_INTR`.
const INTERRUPTED: u16 = 0x10;
/// `NLM_F_CREATE | NLM_F_EXCL`.
pub(super) const CREATE: u16 = 0x600;
const ERROR: u16 = 2;
const DONE: u16 = 3;
/// `NLA_TYPE_MASK`: without the flags for nesting and byte order.
const KIND_MASK: u16 = 0x3fff;

/// A request that is put together.
#[derive(Debug)]
pub(super) struct Message {
    bytes: Vec<u8>,
}

impl Message {
    /// Begins a message of a kind (`RTM_*`) with its structure and flags beside those of every request.
    pub(super) fn new(kind: u16, flags: u16, body: &[u8]) -> Self {
        let mut bytes = vec![0; HEADER_BYTES];
        bytes[4..6].copy_from_slice(&kind.to_ne_bytes());
        bytes[6..8].copy_from_slice(&(flags | REQUEST).to_ne_bytes());
        bytes.extend_from_slice(body);
        let mut message = Self { bytes };
        message.pad();
        message
    }

    fn pad(&mut self) {
        self.bytes.resize(self.bytes.len().next_multiple_of(4), 0);
    }

    /// Adds an attribute.
    pub(super) fn attribute(&mut self, kind: u16, value: &[u8]) -> &mut Self {
        self.nest(kind, |message| message.bytes.extend_from_slice(value))
    }

    /// Adds a text attribute with its terminating NUL.
    pub(super) fn text(&mut self, kind: u16, value: &str) -> &mut Self {
        self.nest(kind, |message| {
            message.bytes.extend_from_slice(value.as_bytes());
            message.bytes.push(0);
        })
    }

    /// Adds an attribute whose value is made of others, or bytes followed by others.
    pub(super) fn nest(&mut self, kind: u16, fill: impl FnOnce(&mut Self)) -> &mut Self {
        let start = self.bytes.len();
        self.bytes.extend_from_slice(&[0; 4]);
        fill(self);
        // What is asked for here stays far below 64 KiB.
        let len = u16::try_from(self.bytes.len() - start).unwrap_or(u16::MAX);
        self.bytes[start..start + 2].copy_from_slice(&len.to_ne_bytes());
        self.bytes[start + 2..start + 4].copy_from_slice(&kind.to_ne_bytes());
        self.pad();
        self
    }

    /// Adds bytes as they are: the structure in front of nested attributes.
    pub(super) fn raw(&mut self, bytes: &[u8]) {
        self.bytes.extend_from_slice(bytes);
        self.pad();
    }
}

/// A socket in the network namespace of the thread that made it; it stays there.
#[derive(Debug)]
pub(super) struct Netlink {
    socket: OwnedFd,
    sequence: u32,
}

/// One message of an answer.
#[derive(Clone, Copy, Debug)]
struct Part<'a> {
    kind: u16,
    flags: u16,
    sequence: u32,
    body: &'a [u8],
}

impl Netlink {
    /// Opens a socket in this thread's network namespace.
    pub(super) fn open() -> io::Result<Self> {
        // The protocol's number, `NETLINK_ROUTE`, is 0.
        let (family, kind) = (AddressFamily::NETLINK, SocketType::RAW);
        let socket = rustix::net::socket_with(family, kind, SocketFlags::CLOEXEC, None)?;
        rustix::net::bind(&socket, &SocketAddrNetlink::new(0, 0))?;
        Ok(Self { socket, sequence: 0 })
    }

    /// Makes a request and waits until it is acknowledged.
    pub(super) fn request(&mut self, message: Message) -> io::Result<()> {
        let sequence = self.send(message, ACK)?;
        let mut acknowledged = false;
        while !acknowledged {
            self.receive(sequence, |part| {
                if part.kind == ERROR {
                    acknowledged = true;
                    error_of(part.body)?;
                }
                Ok(())
            })?;
        }
        Ok(())
    }

    /// Lists what a request of a kind and structure yields: the bodies of all messages.
    pub(super) fn list(&mut self, kind: u16, body: &[u8]) -> io::Result<Vec<Vec<u8>>> {
        for _ in 0..MAX_LISTINGS {
            let sequence = self.send(Message::new(kind, DUMP, body), 0)?;
            let (mut found, mut is_done, mut is_torn) = (Vec::new(), false, false);
            while !is_done {
                self.receive(sequence, |part| {
                    is_torn |= part.flags & INTERRUPTED != 0;
                    match part.kind {
                        DONE => is_done = true,
                        ERROR => error_of(part.body)?,
                        _ => found.push(part.body.to_vec()),
                    }
                    Ok(())
                })?;
            }
            if !is_torn {
                return Ok(found);
            }
        }
        Err(io::Error::from(io::ErrorKind::ResourceBusy))
    }

    fn send(&mut self, mut message: Message, flags: u16) -> io::Result<u32> {
        self.sequence = self.sequence.wrapping_add(1);
        let bytes = &mut message.bytes;
        let len = u32::try_from(bytes.len()).map_err(io::Error::other)?;
        bytes[0..4].copy_from_slice(&len.to_ne_bytes());
        let all = u16::from_ne_bytes([bytes[6], bytes[7]]) | flags;
        bytes[6..8].copy_from_slice(&all.to_ne_bytes());
        bytes[8..12].copy_from_slice(&self.sequence.to_ne_bytes());
        rustix::net::send(&self.socket, bytes, SendFlags::empty())?;
        Ok(self.sequence)
    }

    /// Receives some messages of the answer to a request.
    fn receive(&self, sequence: u32, mut take: impl FnMut(Part<'_>) -> io::Result<()>) -> io::Result<()> {
        let mut buffer = vec![0; RECEIVE_BYTES];
        let (len, _) = rustix::io::retry_on_intr(|| {
            rustix::net::recv(&self.socket, &mut buffer[..], RecvFlags::empty())
        })?;
        let mut rest = buffer.get(..len).unwrap_or_default();
        while !rest.is_empty() {
            let (part, after) = split(rest)?;
            if part.sequence == sequence {
                take(part)?;
            }
            rest = after;
        }
        Ok(())
    }
}

fn malformed() -> io::Error {
    io::Error::new(io::ErrorKind::InvalidData, "malformed netlink message")
}

fn split(bytes: &[u8]) -> io::Result<(Part<'_>, &[u8])> {
    let header = bytes.first_chunk::<HEADER_BYTES>().ok_or_else(malformed)?;
    let [l0, l1, l2, l3, k0, k1, f0, f1, s0, s1, s2, s3, ..] = *header;
    let len = usize::try_from(u32::from_ne_bytes([l0, l1, l2, l3])).map_err(io::Error::other)?;
    let body = bytes.get(HEADER_BYTES..len).ok_or_else(malformed)?;
    let part = Part {
        kind: u16::from_ne_bytes([k0, k1]),
        flags: u16::from_ne_bytes([f0, f1]),
        sequence: u32::from_ne_bytes([s0, s1, s2, s3]),
        body,
    };
    Ok((part, bytes.get(len.next_multiple_of(4)..).unwrap_or_default()))
}

/// Reads the error of an acknowledgement, 0 for none.
fn error_of(body: &[u8]) -> io::Result<()> {
    let code = body.first_chunk::<4>().ok_or_else(malformed)?;
    match i32::from_ne_bytes(*code) {
        0 => Ok(()),
        code => Err(io::Error::from_raw_os_error(code.wrapping_neg())),
    }
}

/// Goes through the attributes that follow a structure of `skip` bytes.
pub(super) fn attributes(body: &[u8], skip: usize) -> impl Iterator<Item = (u16, &[u8])> {
    let mut rest = body.get(skip..).unwrap_or_default();
    std::iter::from_fn(move || {
        let [l0, l1, k0, k1] = *rest.first_chunk::<4>()?;
        let len = usize::from(u16::from_ne_bytes([l0, l1]));
        let value = rest.get(4..len)?;
        rest = rest.get(len.next_multiple_of(4)..).unwrap_or_default();
        Some((u16::from_ne_bytes([k0, k1]) & KIND_MASK, value))
    })
}

/// Reads a text attribute up to its NUL.
pub(super) fn text_of(value: &[u8]) -> String {
    let end = value.iter().position(|&byte| byte == 0).unwrap_or(value.len());
    String::from_utf8_lossy(&value[..end]).into_owned()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn attributes_are_padded_and_read_back() {
        let mut message = Message::new(16, CREATE, &[7; 16]);
        message.text(3, "ab").nest(18, |nested| {
            nested.attribute(1, b"veth");
        });
        assert_eq!(message.bytes.len() % 4, 0);
        let found: Vec<_> = attributes(&message.bytes, HEADER_BYTES + 16).collect();
        assert_eq!(found[0], (3, &b"ab\0"[..]));
        assert_eq!(found[1].0, 18);
        assert_eq!(attributes(found[1].1, 0).collect::<Vec<_>>(), [(1, &b"veth"[..])]);
    }

    #[test]
    fn hostile_lengths_end_the_reading() {
        for bytes in [&[0_u8, 0][..], &[3, 0, 1, 0], &[255, 255, 1, 0, 1]] {
            assert_eq!(attributes(bytes, 0).count(), 0, "{bytes:?}");
            assert!(split(bytes).is_err());
        }
        let mut header = [0_u8; HEADER_BYTES];
        header[0] = 4;
        assert!(split(&header).is_err());
        assert_eq!(attributes(b"abc", 10).count(), 0);
    }

    #[test]
    fn refusals_carry_their_number() {
        let refused = error_of(&(-17_i32).to_ne_bytes()).unwrap_err();
        assert_eq!(refused.raw_os_error(), Some(17));
        assert!(error_of(&0_i32.to_ne_bytes()).is_ok());
        assert!(error_of(&[0]).is_err());
    }
}

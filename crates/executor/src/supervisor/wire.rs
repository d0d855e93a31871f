//! What the daemon, the supervisor and its children tell each other, and how it is framed.
//!
//! A frame is one message on a `SOCK_SEQPACKET` socket: a header that the supervisor reads, a body that it passes on,
//! and descriptors. A body that does not fit into a message travels in a memory file, as the first descriptor.

use std::io::{self, IoSlice, IoSliceMut, Read as _, Write as _};
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};

use rustix::net::{
    RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, SendAncillaryBuffer, SendAncillaryMessage,
    SendFlags,
};
use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};

use crate::spec::{ContainerSpec, DeviceNode, NetworkSpec, ProcessSpec};
use crate::tree::Stub;
use crate::trust::Trusted;

/// Longest message; what is longer goes into a memory file. The default socket buffer holds three of these.
const MAX_MESSAGE: usize = 60 << 10;
/// Longest body that is accepted.
const MAX_BODY: usize = 64 << 20;
/// Most descriptors of one frame.
const MAX_FDS: usize = 8;

/// From the daemon to the supervisor.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub(crate) enum Request {
    /// Start a container. Body: [`ContainerSpec`] and attachment. Descriptors: the three of stdio, then the network
    /// namespace if one is given.
    Start { seq: u64, traits: ContainerTraits },
    /// Start a process in the container `container`. Body: [`ProcessSpec`]. Descriptors: the three of stdio.
    Exec { seq: u64, container: u64 },
    /// Kill what was started as `seq`, if it still runs.
    Kill { seq: u64 },
}

/// What the supervisor has to know of a container before it is built.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct ContainerTraits {
    /// Name of its cgroup.
    pub(crate) id: String,
    pub(crate) network: NetworkSpec,
    pub(crate) cgroup_parent: String,
    /// Whether it has limits, a parent of its own, or may use all devices: then it joins all cgroup hierarchies.
    pub(crate) special_cgroup: bool,
    pub(crate) all_devices: bool,
    /// Devices that may be used beside the usual ones.
    pub(crate) devices: Vec<DeviceNode>,
}

/// From the supervisor to the daemon.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub(crate) enum Answer {
    /// The program was executed. Body: [`Prepared`]. Descriptors: pidfd, then those of [`Prepared`].
    Started { seq: u64 },
    /// It was not. Body: [`Failure`]. Nothing is left of it.
    Failed { seq: u64 },
    /// It ended. For a container: with all its processes.
    Exited {
        seq: u64,
        code: u32,
        signal: Option<i32>,
        oom_killed: bool,
    },
}

/// From a child to the supervisor.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub(crate) enum Report {
    /// All is ready, the program is executed next. Body and descriptors: [`Prepared`].
    Prepared,
    /// It will not run. Body: [`Failure`].
    Failed,
}

/// What a child made. Descriptors: the root (for containers), then the terminal (if any).
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Prepared {
    pub(crate) stubs: Vec<Stub>,
    pub(crate) has_root: bool,
    pub(crate) has_pty: bool,
    /// To be taken out of the root again.
    pub(crate) trusted: Option<Trusted>,
}

/// Why something could not be started.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Failure {
    pub(crate) message: String,
}

/// What a child is to build.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub(crate) enum Blueprint {
    Container(Box<ContainerSpec>),
    Process(Box<ProcessSpec>),
}

/// A frame that was received.
#[derive(Debug)]
pub(crate) struct Frame<H> {
    pub(crate) header: H,
    pub(crate) body: Vec<u8>,
    pub(crate) fds: Vec<OwnedFd>,
}

/// A frame ready to be sent, again if the socket was full.
#[derive(Debug)]
pub(crate) struct OutgoingFrame {
    message: Vec<u8>,
    body_file: Option<OwnedFd>,
}

impl OutgoingFrame {
    /// Encodes a frame.
    pub(crate) fn new(header: &impl Serialize, body: &[u8]) -> io::Result<Self> {
        let header = serde_json::to_vec(header)?;
        let header_len = u32::try_from(header.len()).map_err(io::Error::other)?;
        let mut message = Vec::with_capacity(5 + header.len() + body.len());
        let in_file = 5 + header.len() + body.len() > MAX_MESSAGE;
        message.push(u8::from(in_file));
        message.extend_from_slice(&header_len.to_le_bytes());
        message.extend_from_slice(&header);
        if !in_file {
            message.extend_from_slice(body);
            return Ok(Self {
                message,
                body_file: None,
            });
        }
        if body.len() > MAX_BODY || message.len() > MAX_MESSAGE {
            return Err(io::Error::new(
                io::ErrorKind::InvalidInput,
                "the container's description is too long",
            ));
        }
        let file = rustix::fs::memfd_create(c"cooper-spec", rustix::fs::MemfdFlags::CLOEXEC)?;
        let mut file = std::fs::File::from(file);
        file.write_all(body)?;
        Ok(Self {
            message,
            body_file: Some(file.into()),
        })
    }

    /// Sends it with descriptors.
    pub(crate) fn send(
        &self,
        socket: BorrowedFd<'_>,
        fds: &[BorrowedFd<'_>],
        flags: SendFlags,
    ) -> io::Result<()> {
        let fds: Vec<BorrowedFd<'_>> = self
            .body_file
            .iter()
            .map(AsFd::as_fd)
            .chain(fds.iter().copied())
            .collect();
        let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(MAX_FDS))];
        let mut control = SendAncillaryBuffer::new(&mut space);
        if !fds.is_empty() && !control.push(SendAncillaryMessage::ScmRights(&fds)) {
            return Err(io::Error::new(
                io::ErrorKind::InvalidInput,
                "too many descriptors",
            ));
        }
        let parts = [IoSlice::new(&self.message)];
        loop {
            match rustix::net::sendmsg(socket, &parts, &mut control, flags | SendFlags::NOSIGNAL) {
                Err(rustix::io::Errno::INTR) => {}
                result => return Ok(result.map(drop)?),
            }
        }
    }
}

/// Sends a frame at once.
pub(crate) fn send(
    socket: BorrowedFd<'_>,
    header: &impl Serialize,
    body: &[u8],
    fds: &[BorrowedFd<'_>],
) -> io::Result<()> {
    OutgoingFrame::new(header, body)?.send(socket, fds, SendFlags::empty())
}

/// Receives a frame; `None` when the other side is gone.
pub(crate) fn receive<H: DeserializeOwned>(
    socket: BorrowedFd<'_>,
    flags: RecvFlags,
) -> io::Result<Option<Frame<H>>> {
    let mut message = vec![0; MAX_MESSAGE + 1];
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(MAX_FDS))];
    let mut control = RecvAncillaryBuffer::new(&mut space);
    let received = loop {
        let mut parts = [IoSliceMut::new(&mut message)];
        match rustix::net::recvmsg(socket, &mut parts, &mut control, flags | RecvFlags::CMSG_CLOEXEC) {
            Err(rustix::io::Errno::INTR) => {}
            result => break result?,
        }
    };
    let mut fds: Vec<OwnedFd> = Vec::new();
    for part in control.drain() {
        if let RecvAncillaryMessage::ScmRights(rights) = part {
            fds.extend(rights);
        }
    }
    if received.bytes == 0 {
        return Ok(None);
    }
    message.truncate(received.bytes);
    decode(&message, fds).map(Some)
}

fn decode<H: DeserializeOwned>(message: &[u8], mut fds: Vec<OwnedFd>) -> io::Result<Frame<H>> {
    let malformed = || io::Error::new(io::ErrorKind::InvalidData, "malformed frame");
    let (&in_file, rest) = message.split_first().ok_or_else(malformed)?;
    let (len, rest) = rest.split_first_chunk::<4>().ok_or_else(malformed)?;
    let len = usize::try_from(u32::from_le_bytes(*len)).map_err(io::Error::other)?;
    let (header, body) = rest.split_at_checked(len).ok_or_else(malformed)?;
    let header = serde_json::from_slice(header)?;
    if in_file == 0 {
        return Ok(Frame {
            header,
            body: body.to_vec(),
            fds,
        });
    }
    if fds.is_empty() {
        return Err(malformed());
    }
    let mut file = std::fs::File::from(fds.remove(0));
    io::Seek::rewind(&mut file)?;
    let mut body = Vec::new();
    let limit = u64::try_from(MAX_BODY).map_err(io::Error::other)?;
    file.take(limit).read_to_end(&mut body)?;
    Ok(Frame { header, body, fds })
}

/// Makes a body of a value and an attachment.
pub(crate) fn encode_body(value: &impl Serialize, attachment: &[u8]) -> io::Result<Vec<u8>> {
    let value = serde_json::to_vec(value)?;
    let len = u32::try_from(value.len()).map_err(io::Error::other)?;
    let mut body = Vec::with_capacity(4 + value.len() + attachment.len());
    body.extend_from_slice(&len.to_le_bytes());
    body.extend_from_slice(&value);
    body.extend_from_slice(attachment);
    Ok(body)
}

/// Takes a body apart.
pub(crate) fn decode_body<T: DeserializeOwned>(body: &[u8]) -> io::Result<(T, &[u8])> {
    let malformed = || io::Error::new(io::ErrorKind::InvalidData, "malformed body");
    let (len, rest) = body.split_first_chunk::<4>().ok_or_else(malformed)?;
    let len = usize::try_from(u32::from_le_bytes(*len)).map_err(io::Error::other)?;
    let (value, attachment) = rest.split_at_checked(len).ok_or_else(malformed)?;
    Ok((serde_json::from_slice(value)?, attachment))
}

/// Makes a connected pair of sockets.
pub(crate) fn socket_pair() -> io::Result<(OwnedFd, OwnedFd)> {
    Ok(rustix::net::socketpair(
        rustix::net::AddressFamily::UNIX,
        rustix::net::SocketType::SEQPACKET,
        rustix::net::SocketFlags::CLOEXEC,
        None,
    )?)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn frames_of_any_size_arrive_with_their_descriptors() {
        let (a, b) = socket_pair().unwrap();
        for len in [0, 1, MAX_MESSAGE - 100, MAX_MESSAGE + 1, 1 << 20] {
            let body = vec![7; len];
            send(
                a.as_fd(),
                &Request::Kill { seq: 5 },
                &body,
                &[a.as_fd(), b.as_fd()],
            )
            .unwrap();
            let frame: Frame<Request> = receive(b.as_fd(), RecvFlags::empty()).unwrap().unwrap();
            assert_eq!(
                (frame.header, frame.body.len(), frame.fds.len()),
                (Request::Kill { seq: 5 }, len, 2)
            );
        }
        drop(a);
        assert!(
            receive::<Request>(b.as_fd(), RecvFlags::empty())
                .unwrap()
                .is_none()
        );
    }

    #[test]
    fn malformed_messages_are_errors() {
        for message in [
            &b""[..],
            b"\0",
            b"\0\xff\xff\xff\xff{}",
            b"\x01\x02\0\0\0{}",
            b"\0\x02\0\0\0{}",
        ] {
            assert!(decode::<Request>(message, Vec::new()).is_err(), "{message:?}");
        }
    }
}

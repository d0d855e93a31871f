//! The file transfer protocol spoken inside `FileSync` and `FileSend`: a tree of stats in path order, contents on request.
//!
//! The sender lists a directory as `STAT` packets, each entry numbered by its position, and ends with an empty one. The
//! receiver asks for contents by number (`REQ`), gets them in pieces (`DATA`, an empty piece ends a file), and says
//! `FIN`, which the sender answers. Either side may fail with `ERR`. The rules are those of `tonistiigi/fsutil`.

mod filter;
mod follow;
mod receive;
mod send;
mod tree;
mod validate;

use bytes::Bytes;

pub use crate::pb::fsutil::packet::PacketType;
pub use crate::pb::fsutil::{Packet, Stat};
pub use filter::{FilterOptions, walk};
pub use receive::{ReceiveOptions, receive};
pub use send::{Progress, SendSource, send};
pub use tree::{Tree, TreeError};
pub use validate::{OrderError, Validator, compare_paths};

/// Mode bits of Go's `os.FileMode`, which stats use instead of `st_mode`.
pub mod mode {
    /// Directory.
    pub const DIR: u32 = 1 << 31;
    /// Symlink.
    pub const SYMLINK: u32 = 1 << 27;
    /// Device.
    pub const DEVICE: u32 = 1 << 26;
    /// Named pipe.
    pub const NAMED_PIPE: u32 = 1 << 25;
    /// Socket.
    pub const SOCKET: u32 = 1 << 24;
    /// Set user ID.
    pub const SETUID: u32 = 1 << 23;
    /// Set group ID.
    pub const SETGID: u32 = 1 << 22;
    /// Character device, together with [`DEVICE`].
    pub const CHAR_DEVICE: u32 = 1 << 21;
    /// Sticky bit.
    pub const STICKY: u32 = 1 << 20;
    /// Of no known kind.
    pub const IRREGULAR: u32 = 1 << 19;
    /// All bits that tell a kind.
    pub const TYPE: u32 = DIR | SYMLINK | NAMED_PIPE | SOCKET | DEVICE | CHAR_DEVICE | IRREGULAR;

    /// Converts the mode of a system call.
    pub const fn from_unix(mode: u32) -> u32 {
        let kind = match mode & 0o170_000 {
            0o040_000 => DIR,
            0o120_000 => SYMLINK,
            0o060_000 => DEVICE,
            0o020_000 => DEVICE | CHAR_DEVICE,
            0o010_000 => NAMED_PIPE,
            0o140_000 => SOCKET,
            0o100_000 => 0,
            _ => IRREGULAR,
        };
        let special = (if mode & 0o4000 != 0 { SETUID } else { 0 })
            | (if mode & 0o2000 != 0 { SETGID } else { 0 })
            | (if mode & 0o1000 != 0 { STICKY } else { 0 });
        kind | special | mode & 0o777
    }

    /// Returns the permission bits for a system call, with set-ID and sticky bits.
    pub const fn to_unix_permissions(mode: u32) -> u32 {
        (if mode & SETUID != 0 { 0o4000 } else { 0 })
            | (if mode & SETGID != 0 { 0o2000 } else { 0 })
            | (if mode & STICKY != 0 { 0o1000 } else { 0 })
            | mode & 0o777
    }
}

impl Stat {
    /// Tells whether the entry is a directory.
    pub const fn is_dir(&self) -> bool {
        self.mode & mode::DIR != 0
    }

    /// Tells whether the entry is a symlink.
    pub const fn is_symlink(&self) -> bool {
        self.mode & mode::SYMLINK != 0
    }

    /// Tells whether the entry is a regular file, be it a hard link.
    pub const fn is_file(&self) -> bool {
        self.mode & mode::TYPE == 0
    }
}

/// A packet by its meaning.
#[derive(Clone, Debug, PartialEq)]
pub enum Message {
    /// The next entry; `None` ends the listing.
    Stat(Option<Stat>),
    /// The receiver wants the content of an entry.
    Request(u32),
    /// A piece of content; an empty one ends the entry.
    Data {
        /// Number of the entry.
        id: u32,
        /// The bytes.
        bytes: Bytes,
    },
    /// Done.
    Fin,
    /// The other side failed.
    Failed(String),
}

impl From<Message> for Packet {
    fn from(message: Message) -> Self {
        let (kind, stat, id, data) = match message {
            Message::Stat(stat) => (PacketType::PacketStat, stat, 0, Bytes::new()),
            Message::Request(id) => (PacketType::PacketReq, None, id, Bytes::new()),
            Message::Data { id, bytes } => (PacketType::PacketData, None, id, bytes),
            Message::Fin => (PacketType::PacketFin, None, 0, Bytes::new()),
            Message::Failed(text) => (PacketType::PacketErr, None, 0, text.into()),
        };
        Self {
            r#type: kind.into(),
            stat,
            id,
            data,
        }
    }
}

/// A packet of an unknown type.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("unknown packet type {0}")]
pub struct UnknownPacket(pub i32);

impl TryFrom<Packet> for Message {
    type Error = UnknownPacket;

    fn try_from(packet: Packet) -> Result<Self, UnknownPacket> {
        let kind = PacketType::try_from(packet.r#type).map_err(|_| UnknownPacket(packet.r#type))?;
        Ok(match kind {
            PacketType::PacketStat => Self::Stat(packet.stat),
            PacketType::PacketReq => Self::Request(packet.id),
            PacketType::PacketData => Self::Data {
                id: packet.id,
                bytes: packet.data,
            },
            PacketType::PacketFin => Self::Fin,
            PacketType::PacketErr => Self::Failed(String::from_utf8_lossy(&packet.data).into_owned()),
        })
    }
}

/// Why a transfer failed.
#[derive(Debug, thiserror::Error)]
pub enum TransferError {
    /// The other side failed; the text is its own.
    #[error("error from {side}: {message}")]
    Remote {
        /// Which side.
        side: &'static str,
        /// Its text.
        message: String,
    },
    /// The call failed.
    #[error("transfer failed: {}", .0.message())]
    Call(#[source] Box<tonic::Status>),
    /// The other side went away before it was done.
    #[error("transfer ended early")]
    Ended,
    /// A packet that makes no sense here.
    #[error("unexpected packet: {0}")]
    Protocol(&'static str),
    /// A packet of an unknown type.
    #[error(transparent)]
    Unknown(#[from] UnknownPacket),
    /// A number that names no entry.
    #[error("invalid file request {0}")]
    InvalidFile(u32),
    /// Entries are out of order, or name something outside.
    #[error(transparent)]
    Order(#[from] OrderError),
    /// The local tree could not be read.
    #[error(transparent)]
    Tree(#[from] TreeError),
    /// A local file could not be written.
    #[error("{action} {path}")]
    Write {
        /// What was done.
        action: &'static str,
        /// Where.
        path: String,
        /// Why it failed.
        #[source]
        source: std::io::Error,
    },
}

/// Joins an error with its causes.
fn error_text(err: &dyn std::error::Error) -> String {
    let mut out = err.to_string();
    let mut cause = err.source();
    while let Some(next) = cause {
        out.push_str(": ");
        out.push_str(&next.to_string());
        cause = next.source();
    }
    out
}

//! File transfer messages between the wire and the engine.

use api::fsutil::{Message, Packet, Stat};
use bytes::Bytes;
use engine::session::{FilePacket, FileStat, SessionError};

/// Turns a packet of the wire into the engine's.
///
/// # Errors
/// [`SessionError::Refused`] for an unknown type, or a name that is no text.
pub(super) fn from_wire(packet: Packet) -> Result<FilePacket, SessionError> {
    let message = Message::try_from(packet).map_err(|error| SessionError::Refused {
        message: error.to_string(),
    })?;
    Ok(match message {
        Message::Stat(stat) => FilePacket::Stat(stat.map(stat_from_wire).transpose()?),
        Message::Request(id) => FilePacket::Request(id),
        Message::Data { id, bytes } => FilePacket::Content { id, bytes },
        Message::Fin => FilePacket::Fin,
        Message::Failed(text) => FilePacket::Failed(text),
    })
}

/// Turns the engine's packet into one of the wire.
pub(super) fn to_wire(packet: FilePacket) -> Packet {
    let message = match packet {
        FilePacket::Stat(stat) => Message::Stat(stat.map(stat_to_wire)),
        FilePacket::Request(id) => Message::Request(id),
        FilePacket::Content { id, bytes } => Message::Data { id, bytes },
        FilePacket::Fin => Message::Fin,
        FilePacket::Failed(text) => Message::Failed(text),
    };
    message.into()
}

fn text(bytes: Bytes) -> Result<String, SessionError> {
    String::from_utf8(bytes.to_vec()).map_err(|error| {
        let message = format!(
            "file name {:?} is not UTF-8",
            String::from_utf8_lossy(error.as_bytes())
        );
        SessionError::Refused { message }
    })
}

fn stat_from_wire(stat: Stat) -> Result<FileStat, SessionError> {
    Ok(FileStat {
        path: text(stat.path)?,
        mode: stat.mode,
        uid: stat.uid,
        gid: stat.gid,
        size_bytes: stat.size,
        mod_time_ns: stat.mod_time,
        linkname: text(stat.linkname)?,
        dev_major: stat.devmajor,
        dev_minor: stat.devminor,
        xattrs: stat.xattrs,
        change_time_ns: stat.change_time,
    })
}

/// Turns the engine's attributes into those of the wire.
pub(crate) fn stat_to_wire(stat: FileStat) -> Stat {
    Stat {
        path: Bytes::from(stat.path),
        mode: stat.mode,
        uid: stat.uid,
        gid: stat.gid,
        size: stat.size_bytes,
        mod_time: stat.mod_time_ns,
        linkname: Bytes::from(stat.linkname),
        devmajor: stat.dev_major,
        devminor: stat.dev_minor,
        xattrs: stat.xattrs,
        change_time: stat.change_time_ns,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn packets_survive_both_ways() {
        let stat = FileStat {
            path: "a/ü".to_owned(),
            mode: 0o644,
            size_bytes: 7,
            xattrs: [("user.x".to_owned(), Bytes::from_static(b"y"))].into(),
            ..FileStat::default()
        };
        for packet in [
            FilePacket::Stat(Some(stat)),
            FilePacket::Stat(None),
            FilePacket::Request(3),
            FilePacket::Content {
                id: 4,
                bytes: Bytes::from_static(b"x"),
            },
            FilePacket::Fin,
            FilePacket::Failed("text".to_owned()),
        ] {
            assert_eq!(from_wire(to_wire(packet.clone())).unwrap(), packet);
        }
    }

    #[test]
    fn hostile_packets_are_refused() {
        let unknown = Packet {
            r#type: 99,
            ..Packet::default()
        };
        assert!(from_wire(unknown).is_err());
        let stat = Stat {
            path: Bytes::from_static(b"\xff"),
            ..Stat::default()
        };
        assert!(
            from_wire(Packet {
                stat: Some(stat),
                ..Packet::default()
            })
            .is_err()
        );
    }
}

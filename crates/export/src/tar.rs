//! The tar exporter: a result's files as one archive to the client.

use std::collections::BTreeMap;
use std::io::{self, Write};
use std::sync::Arc;

use async_trait::async_trait;
use build::error::{BuildError, ErrorKind};
use build::export::{ExportContext, ExportSource, Exported, Exporter, ExporterInstance};
use build::session::{ByteStream, FileStat};
use build::unlazy::Unlazy;
use bytes::Bytes;
use layer::tar::{EntryKind, Header, Writer};
use layer::tree::Timestamp;
use tokio::sync::mpsc;

use super::files::{Files, Part, WalkError};
use super::local::{Layout, blocking, client};

/// Bytes of the archive in one message.
const PIECE_BYTES: usize = 256 << 10;

/// Makes tar exporters.
#[derive(Debug)]
pub struct TarExporter {
    unlazy: Arc<dyn Unlazy>,
}

impl TarExporter {
    /// Makes an exporter that fetches lazy refs through `unlazy`.
    pub fn new(unlazy: Arc<dyn Unlazy>) -> Self {
        Self { unlazy }
    }
}

impl Exporter for TarExporter {
    fn resolve(
        &self,
        id: usize,
        attrs: BTreeMap<String, String>,
    ) -> Result<Arc<dyn ExporterInstance>, BuildError> {
        let layout = Layout::read(&attrs)?;
        Ok(Arc::new(TarInstance {
            id,
            layout,
            unlazy: Arc::clone(&self.unlazy),
        }))
    }
}

#[derive(Debug)]
struct TarInstance {
    id: usize,
    layout: Layout,
    unlazy: Arc<dyn Unlazy>,
}

#[async_trait]
impl ExporterInstance for TarInstance {
    fn name(&self) -> &str {
        "exporting to client tarball"
    }

    async fn export(&self, ctx: &ExportContext, source: &ExportSource) -> Result<Exported, BuildError> {
        let parts = self.layout.parts(&*self.unlazy, ctx, source, true).await?;
        let session = client(ctx).await?;
        let stream = session.send_file(&self.id.to_string(), &BTreeMap::new()).await?;
        let _step = ctx.progress.step("sending tarball", "");
        tokio::select! {
            sent = send(stream, parts) => sent?,
            () = ctx.cancel.cancelled() => return Err(BuildError::canceled()),
        }
        Ok(Exported::default())
    }
}

async fn send(stream: ByteStream, parts: Vec<Part>) -> Result<(), BuildError> {
    let ByteStream {
        mut incoming,
        outgoing,
    } = stream;
    blocking(move || write_archive(&parts, outgoing)).await?;
    match incoming.recv().await {
        None => Ok(()),
        Some(Ok(_)) => Err(BuildError::user("the client answered a file with bytes")),
        Some(Err(error)) => Err(error.into()),
    }
}

fn write_archive(parts: &[Part], outgoing: mpsc::Sender<Bytes>) -> Result<(), BuildError> {
    let mut archive = Writer::new(Pieces {
        outgoing,
        piece: Vec::with_capacity(PIECE_BYTES),
    });
    for part in parts {
        let files = Files::open(part)?;
        files.walk(&mut |stat| {
            write_entry(&mut archive, &files, &stat).map_err(|source| WalkError::Read {
                path: stat.path.clone(),
                source,
            })
        })?;
    }
    let sent = archive.finish().and_then(|mut pieces| pieces.flush());
    sent.map_err(|error| BuildError::from_source(ErrorKind::Unavailable, error))
}

fn write_entry(archive: &mut Writer<Pieces>, files: &Files, stat: &FileStat) -> io::Result<()> {
    let header = header(stat);
    archive.write_header(&header)?;
    if header.kind == EntryKind::Regular && header.size_bytes > 0 {
        let file = files.open_file(&stat.path).map_err(io::Error::other)?;
        let copied = io::copy(&mut io::Read::take(file, header.size_bytes), archive)?;
        if copied != header.size_bytes {
            return Err(io::Error::new(
                io::ErrorKind::UnexpectedEof,
                "the file shrank while it was read",
            ));
        }
    }
    Ok(())
}

fn header(stat: &FileStat) -> Header {
    let is = |bit: u32| stat.mode & (1 << bit) != 0;
    let is_link = !stat.linkname.is_empty();
    let kind = match () {
        () if is(31) => EntryKind::Directory,
        () if is(27) => EntryKind::Symlink,
        () if is_link => EntryKind::Hardlink,
        () if is(25) => EntryKind::Fifo,
        () if is(26) && is(21) => EntryKind::CharDevice,
        () if is(26) => EntryKind::BlockDevice,
        () => EntryKind::Regular,
    };
    let name = if kind == EntryKind::Directory {
        format!("{}/", stat.path)
    } else {
        stat.path.clone()
    };
    let mut header = Header::new(kind, name);
    header.link = stat.linkname.clone().into_bytes();
    header.mode = stat.mode & 0o777;
    for (bit, unix) in [(23, 0o4000), (22, 0o2000), (20, 0o1000)] {
        if is(bit) {
            header.mode |= unix;
        }
    }
    header.uid = stat.uid;
    header.gid = stat.gid;
    header.mtime = Timestamp {
        nanoseconds: 0,
        ..Timestamp::from_unix_nanos(stat.mod_time_ns)
    };
    header.dev = (
        u32::try_from(stat.dev_major).unwrap_or(0),
        u32::try_from(stat.dev_minor).unwrap_or(0),
    );
    header.xattrs = stat
        .xattrs
        .iter()
        .map(|(name, value)| (name.clone().into_bytes(), value.to_vec()))
        .collect();
    if kind == EntryKind::Regular {
        header.size_bytes = u64::try_from(stat.size_bytes).unwrap_or(0);
    }
    header
}

/// Hands written bytes on in pieces.
struct Pieces {
    outgoing: mpsc::Sender<Bytes>,
    piece: Vec<u8>,
}

impl Write for Pieces {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        self.piece.extend_from_slice(bytes);
        if self.piece.len() >= PIECE_BYTES {
            self.flush()?;
        }
        Ok(bytes.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        if self.piece.is_empty() {
            return Ok(());
        }
        let piece = std::mem::replace(&mut self.piece, Vec::with_capacity(PIECE_BYTES));
        self.outgoing
            .blocking_send(Bytes::from(piece))
            .map_err(|_| io::Error::new(io::ErrorKind::BrokenPipe, "the client left the transfer"))
    }
}

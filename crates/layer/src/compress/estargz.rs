//! eStargz: a gzip stream of a tar archive whose files can be read one by one.
//!
//! Each piece of a file's data begins a gzip member of its own. The archive is followed by a second one that holds nothing
//! but a table in JSON, which tells of each entry what it is, where its pieces begin and what their digests are. The last 51
//! bytes are an empty gzip member whose header tells where the table begins. All of it is one gzip stream, and who does
//! not know better reads the archive up to its end mark.

mod find;
mod table;

use std::collections::BTreeMap;
use std::io::{self, Write};

pub use find::{Table, find};
use oci::{Digest, Digester};

use self::table::{Entry, Names};
use super::aside::Aside;
use super::blocks::{Effort, GzipBlocks, whole_member};
use crate::tar::{BLOCK, EntryKind, Header, Reader, Writer, extension_bytes, padding};

/// Annotation of a layer's descriptor: the digest of the table.
pub const TABLE_DIGEST: &str = "containerd.io/snapshot/stargz/toc.digest";
/// Annotation of a layer's descriptor: the length of the stream decompressed, in bytes.
pub const UNCOMPRESSED_SIZE: &str = "io.containers.estargz.uncompressed-size";

/// Leaves of a descriptor's annotations those that tell of the table.
pub fn keep_annotations(annotations: &mut BTreeMap<String, String>) {
    annotations.retain(|key, _| [TABLE_DIGEST, UNCOMPRESSED_SIZE].contains(&key.as_str()));
}

/// Name of the entry that holds the table.
const TABLE_NAME: &str = "stargz.index.json";
/// Length of the footer in bytes.
const FOOTER: usize = 51;
/// Most bytes of a file in one piece.
const PIECE: u64 = 4 << 20;
/// Bytes of headers that may follow a piece in its member before another begins, so that archives of nothing but headers
/// do not fill the memory.
const BEHIND_PIECE: usize = 64 << 10;
/// Most bytes of an entry's header with all its extensions.
const HEADER_MAX: usize = 4 << 20;

/// Returns the annotations of a blob with a table of this digest and this length decompressed.
pub(super) fn annotations(table: &Digest, uncompressed_bytes: u64) -> BTreeMap<String, String> {
    BTreeMap::from([
        (TABLE_DIGEST.to_owned(), table.to_string()),
        (UNCOMPRESSED_SIZE.to_owned(), uncompressed_bytes.to_string()),
    ])
}

/// Packs the archive that is written to it.
pub(super) struct Estargz<W> {
    blocks: GzipBlocks<W>,
    effort: Effort,
    at: At,
    /// The header being read, with its extensions.
    header: Vec<u8>,
    /// Length of `header` at which it is looked at next.
    wanted: usize,
    entries: Vec<Entry>,
    names: Names,
}

/// What comes next in the archive.
enum At {
    /// A block of a header.
    Header,
    /// The data of an extended header.
    Extension,
    /// A file's data.
    File(Box<File>),
    /// Bytes behind a file's data.
    Padding(u64),
    /// Whatever follows the end mark.
    End,
}

/// A file being read.
struct File {
    /// The entry of the current piece, not in the table yet.
    piece: Entry,
    /// Where in the table the first piece is.
    first: usize,
    /// Bytes of the file, and those not read yet.
    size: u64,
    left: u64,
    /// Bytes of the piece not read yet.
    piece_left: u64,
    digester: Digester,
    /// The piece's digest, where it is not the file's.
    piece_digester: Option<Digester>,
}

/// A packed archive.
pub(super) struct Ended<W> {
    pub(super) out: W,
    /// What was added to the archive.
    pub(super) table: Vec<u8>,
    /// The digest of the JSON in it.
    pub(super) digest: Digest,
    /// What the archive was added to, without the table.
    pub(super) digester: Aside,
}

fn invalid(reason: impl Into<Box<dyn std::error::Error + Send + Sync>>) -> io::Error {
    io::Error::new(io::ErrorKind::InvalidData, reason)
}

impl<W: Write> Estargz<W> {
    pub(super) fn new(out: W, effort: Effort, threads: usize) -> Self {
        let limit = usize::try_from(PIECE).unwrap_or(usize::MAX) + BEHIND_PIECE;
        Self {
            blocks: GzipBlocks::with_limit(out, effort, threads, limit),
            effort,
            at: At::Header,
            header: Vec::new(),
            wanted: BLOCK,
            entries: Vec::new(),
            names: Names::default(),
        }
    }

    /// Writes table and footer. An archive cut short is an error.
    pub(super) fn finish(self) -> io::Result<Ended<W>> {
        let is_whole = match self.at {
            At::Header => self.header.is_empty(),
            // The last entry's padding may be missing, as when reading.
            At::Padding(_) | At::End => true,
            At::Extension | At::File(_) => false,
        };
        if !is_whole {
            return Err(io::ErrorKind::UnexpectedEof.into());
        }
        let ended = self.blocks.finish()?;
        let written = ended.out;
        let json = table::encode(self.entries, &written.starts)?;
        let mut header = Header::new(EntryKind::Regular, TABLE_NAME);
        header.size_bytes = json.len() as u64;
        let mut archive = Writer::new(Vec::new());
        archive.write_header(&header)?;
        archive.write_all(&json)?;
        let table = archive.finish()?;
        let mut out = written.out;
        out.write_all(&whole_member(self.effort, &table)?)?;
        out.write_all(&footer(written.length))?;
        Ok(Ended {
            out,
            table,
            digest: Digest::sha256(&json),
            digester: ended.digester,
        })
    }

    /// Collects a header; returns how many bytes it took.
    fn take_header(&mut self, bytes: &[u8]) -> io::Result<usize> {
        let count = bytes.len().min(self.wanted - self.header.len());
        self.header.extend_from_slice(&bytes[..count]);
        if self.header.len() < self.wanted {
            return Ok(count);
        }
        if let At::Extension = self.at {
            self.at = At::Header;
            self.want(BLOCK)?;
            return Ok(count);
        }
        let Some(block) = self.header.last_chunk::<BLOCK>() else {
            return Ok(count);
        };
        if block.iter().all(|byte| *byte == 0) {
            self.pass_header()?;
            self.at = At::End;
        } else {
            match extension_bytes(block).map(usize::try_from) {
                Some(Ok(0)) => self.want(BLOCK)?,
                Some(length) => {
                    self.at = At::Extension;
                    self.want(length.unwrap_or(usize::MAX))?;
                }
                None => self.begin_entry()?,
            }
        }
        Ok(count)
    }

    fn want(&mut self, more: usize) -> io::Result<()> {
        self.wanted = self.wanted.saturating_add(more);
        if self.wanted > HEADER_MAX {
            return Err(invalid("too many extended headers"));
        }
        Ok(())
    }

    fn pass_header(&mut self) -> io::Result<()> {
        self.blocks.write_all(&self.header)?;
        self.header.clear();
        self.wanted = BLOCK;
        Ok(())
    }

    fn begin_entry(&mut self) -> io::Result<()> {
        let mut reader = Reader::new(&*self.header);
        let header = reader.next_entry().map_err(invalid)?;
        let header = header.ok_or_else(|| invalid("a header without an entry"))?;
        if reader.is_sparse() {
            return Err(invalid("unsupported input tar entry: a sparse file"));
        }
        if clean_name(&header.name) == TABLE_NAME.as_bytes() {
            return Err(invalid(
                "existing TOC JSON is not allowed; decompress layer before append",
            ));
        }
        self.pass_header()?;
        let mut entry = Entry::new(&header, &mut self.names);
        if header.kind != EntryKind::Regular {
            self.entries.push(entry);
        } else if header.size_bytes == 0 {
            entry.digest = Some(Digest::sha256([]));
            self.entries.push(entry);
        } else {
            let file = File {
                piece: entry,
                first: self.entries.len(),
                size: header.size_bytes,
                left: header.size_bytes,
                piece_left: 0,
                digester: Digester::sha256(),
                piece_digester: None,
            };
            self.begin_piece(Box::new(file))?;
        }
        Ok(())
    }

    fn begin_piece(&mut self, mut file: Box<File>) -> io::Result<()> {
        // Until all is written, the number of the block stands for where it begins.
        file.piece.offset = self.blocks.cut()?;
        file.piece.chunk_offset = file.size - file.left;
        file.piece_left = file.left.min(PIECE);
        if file.left >= PIECE {
            // A piece without a length goes on to the file's end.
            file.piece.chunk_size = PIECE;
        }
        file.piece_digester = (file.size > PIECE).then(Digester::sha256);
        self.at = At::File(file);
        Ok(())
    }

    /// Takes a file's data; returns how many bytes it took.
    fn take_data(&mut self, mut file: Box<File>, bytes: &[u8]) -> io::Result<usize> {
        let room = usize::try_from(file.piece_left).unwrap_or(usize::MAX);
        let data = &bytes[..bytes.len().min(room)];
        self.blocks.write_all(data)?;
        file.digester.update(data);
        if let Some(digester) = &mut file.piece_digester {
            digester.update(data);
        }
        file.left -= data.len() as u64;
        file.piece_left -= data.len() as u64;
        if file.piece_left > 0 {
            self.at = At::File(file);
            return Ok(data.len());
        }
        let next = file.piece.next_piece();
        let mut piece = std::mem::replace(&mut file.piece, next);
        piece.chunk_digest = file.piece_digester.take().map(Digester::finish);
        self.entries.push(piece);
        if file.left > 0 {
            self.begin_piece(file)?;
        } else {
            self.end_file(*file);
        }
        Ok(data.len())
    }

    fn end_file(&mut self, file: File) {
        let digest = file.digester.finish();
        let first = &mut self.entries[file.first];
        first.digest = Some(digest);
        first.chunk_digest.get_or_insert(digest);
        self.at = match padding(file.size) {
            0 => At::Header,
            padding => At::Padding(padding),
        };
    }

    fn take_padding(&mut self, left: u64, bytes: &[u8]) -> io::Result<usize> {
        let room = usize::try_from(left).unwrap_or(usize::MAX);
        let data = &bytes[..bytes.len().min(room)];
        self.blocks.write_all(data)?;
        self.at = match left - data.len() as u64 {
            0 => At::Header,
            left => At::Padding(left),
        };
        Ok(data.len())
    }
}

impl<W: Write> Write for Estargz<W> {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        match std::mem::replace(&mut self.at, At::Header) {
            at @ (At::Header | At::Extension) => {
                self.at = at;
                self.take_header(bytes)
            }
            At::File(file) => self.take_data(file, bytes),
            At::Padding(left) => self.take_padding(left, bytes),
            At::End => {
                self.at = At::End;
                self.blocks.write(bytes)
            }
        }
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

/// A name without what does not matter in it: `./a//b/` is `a/b`.
fn clean_name(name: &[u8]) -> Vec<u8> {
    let mut parts: Vec<&[u8]> = Vec::new();
    for part in name.split(|byte| *byte == b'/') {
        match part {
            b"" | b"." => {}
            b".." => drop(parts.pop()),
            part => parts.push(part),
        }
    }
    parts.join(&b'/')
}

/// An empty gzip member that tells where the table begins.
fn footer(table_offset: u64) -> Vec<u8> {
    let mut footer = vec![0x1f, 0x8b, 8, 4, 0, 0, 0, 0, 0, 0xff];
    footer.extend([26, 0, b'S', b'G', 22, 0]);
    footer.extend(format!("{table_offset:016x}STARGZ").bytes());
    // The last block, stored and empty; checksum and length of nothing.
    footer.extend([1, 0, 0, 0xff, 0xff, 0, 0, 0, 0, 0, 0, 0, 0]);
    footer
}

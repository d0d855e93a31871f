//! Reading.
//!
//! Where archives contradict themselves, this reader decides as Go's `archive/tar` does, so that an image means the same
//! here and there: a GNU long name beats a PAX path, empty PAX values are ignored, a header-only entry has no data
//! whatever its size says.

use std::io::{self, Read};

use super::{BLOCK, EntryKind, Header, number, pax, sparse};
use crate::tree::Timestamp;

/// Longest name or extended header that is accepted, in bytes.
const SPECIAL_MAX: u64 = 1 << 20;
/// Extended headers in a row before the archive counts as hostile.
const EXTENSIONS_MAX: usize = 64;

/// A damaged archive.
#[derive(Debug, thiserror::Error)]
pub enum ReadError {
    /// The stream failed or ended early.
    #[error("read archive")]
    Io(#[source] io::Error),
    /// A header says what cannot be.
    #[error("invalid tar header at byte {offset}: {reason}")]
    Header {
        /// Where the header begins.
        offset: u64,
        /// What is wrong.
        reason: &'static str,
    },
}

/// Reads an archive entry by entry. Understands ustar, PAX, GNU long names and GNU sparse files.
#[derive(Debug)]
pub struct Reader<R> {
    inner: Counting<R>,
    /// Data bytes of the current entry that are still in the stream.
    stored: u64,
    /// Zero bytes behind them.
    padding: u64,
    /// The current entry's holes, if it has any.
    map: Option<sparse::Map>,
    /// Where the current header began.
    start: u64,
    ended: bool,
}

#[derive(Debug)]
struct Counting<R> {
    inner: R,
    offset: u64,
}

impl<R: Read> Read for Counting<R> {
    fn read(&mut self, buf: &mut [u8]) -> io::Result<usize> {
        let count = self.inner.read(buf)?;
        self.offset += count as u64;
        Ok(count)
    }
}

/// What extended headers say about the next entry.
#[derive(Default)]
struct Extensions {
    records: pax::Records,
    long_name: Option<Vec<u8>>,
    long_link: Option<Vec<u8>>,
}

impl<R: Read> Reader<R> {
    /// Starts at the beginning of an uncompressed archive.
    pub fn new(inner: R) -> Self {
        let inner = Counting { inner, offset: 0 };
        Self {
            inner,
            stored: 0,
            padding: 0,
            map: None,
            start: 0,
            ended: false,
        }
    }

    /// Skips what is left of the current entry and reads the next header; `None` at the archive's end. Global headers are
    /// skipped.
    pub fn next_entry(&mut self) -> Result<Option<Header>, ReadError> {
        let mut extensions = Extensions::default();
        for _ in 0..EXTENSIONS_MAX {
            self.skip_entry()?;
            let Some(block) = self.read_block()? else {
                return Ok(None);
            };
            match block[156] {
                b'x' => {
                    let data = self.read_special(&block)?;
                    extensions.records = pax::parse(&data).ok_or_else(|| self.bad("extended header"))?;
                }
                b'g' => {
                    self.read_special(&block)?;
                }
                b'L' => extensions.long_name = Some(text(&self.read_special(&block)?).to_vec()),
                b'K' => extensions.long_link = Some(text(&self.read_special(&block)?).to_vec()),
                _ => return self.entry(&block, extensions).map(Some),
            }
        }
        Err(self.bad("too many extended headers"))
    }

    /// Skips the hole at which the current entry's data is; returns its length, zero where there is none. What was skipped
    /// is not read any more.
    pub fn skip_hole(&mut self) -> u64 {
        self.map.as_mut().map_or(0, sparse::Map::skip_hole)
    }

    /// Reports whether the current entry has holes, whose bytes are not all in the archive.
    pub(crate) fn is_sparse(&self) -> bool {
        self.map.is_some()
    }

    /// Returns the rest of the input, which is where the archive's end was.
    pub fn into_inner(self) -> R {
        self.inner.inner
    }

    fn bad(&self, reason: &'static str) -> ReadError {
        ReadError::Header {
            offset: self.start,
            reason,
        }
    }

    fn skip_entry(&mut self) -> Result<(), ReadError> {
        let skip = std::mem::take(&mut self.stored);
        let padding = std::mem::take(&mut self.padding);
        self.map = None;
        let skipped = io::copy(&mut (&mut self.inner).take(skip), &mut io::sink()).map_err(ReadError::Io)?;
        if skipped < skip {
            return Err(ReadError::Io(io::ErrorKind::UnexpectedEof.into()));
        }
        // The last entry's padding may be missing, as in Go.
        io::copy(&mut (&mut self.inner).take(padding), &mut io::sink()).map_err(ReadError::Io)?;
        Ok(())
    }

    /// Reads a header block; `None` at the end, which is two zero blocks, one, or none.
    fn read_block(&mut self) -> Result<Option<[u8; BLOCK]>, ReadError> {
        if self.ended {
            return Ok(None);
        }
        self.start = self.inner.offset;
        let Some(block) = self.read_full_block()? else {
            return Ok(None);
        };
        if block.iter().any(|byte| *byte != 0) {
            return Ok(Some(block));
        }
        self.ended = true;
        match self.read_full_block()? {
            Some(block) if block.iter().any(|byte| *byte != 0) => Err(self.bad("data after the end mark")),
            _ => Ok(None),
        }
    }

    fn read_full_block(&mut self) -> Result<Option<[u8; BLOCK]>, ReadError> {
        let mut block = [0; BLOCK];
        let mut filled = 0;
        while filled < BLOCK {
            match self.inner.read(&mut block[filled..]) {
                Ok(0) if filled == 0 => return Ok(None),
                Ok(0) => return Err(ReadError::Io(io::ErrorKind::UnexpectedEof.into())),
                Ok(count) => filled += count,
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) => return Err(ReadError::Io(error)),
            }
        }
        Ok(Some(block))
    }

    /// Reads the data of an extended header.
    fn read_special(&mut self, block: &[u8; BLOCK]) -> Result<Vec<u8>, ReadError> {
        if format(block).is_none() {
            return Err(self.bad("checksum"));
        }
        let size = number::parse(&block[124..136]).and_then(|size| u64::try_from(size).ok());
        let size = size
            .filter(|size| *size <= SPECIAL_MAX)
            .ok_or_else(|| self.bad("size of an extended header"))?;
        let mut data = Vec::new();
        let count = (&mut self.inner)
            .take(size)
            .read_to_end(&mut data)
            .map_err(ReadError::Io)?;
        if (count as u64) < size {
            return Err(ReadError::Io(io::ErrorKind::UnexpectedEof.into()));
        }
        self.padding = padding(size);
        Ok(data)
    }

    fn entry(&mut self, block: &[u8; BLOCK], extensions: Extensions) -> Result<Header, ReadError> {
        let format = format(block).ok_or_else(|| self.bad("checksum"))?;
        let mut stored = 0;
        let parsed = parse_header(block, format, &extensions, &mut stored);
        let mut header = parsed.map_err(|reason| self.bad(reason))?;
        if header.kind != EntryKind::Regular {
            stored = 0;
        }
        self.stored = stored;
        self.padding = padding(stored);
        self.read_map(block, format, &extensions.records, &mut header)?;
        if header.kind == EntryKind::Regular {
            header.size_bytes = self.map.as_ref().map_or(stored, sparse::Map::size_bytes);
        }
        Ok(header)
    }

    /// Finds out about holes.
    fn read_map(
        &mut self,
        block: &[u8; BLOCK],
        format: Format,
        records: &pax::Records,
        header: &mut Header,
    ) -> Result<(), ReadError> {
        let map = if block[156] == b'S' {
            if format != Format::Gnu {
                return Err(self.bad("sparse file in a foreign format"));
            }
            sparse::old_gnu(block, &mut self.inner).map_err(ReadError::Io)?
        } else if let Some(in_data) = sparse::pax_version(records) {
            if header.kind != EntryKind::Regular {
                return Err(self.bad("sparse entry that is no file"));
            }
            if let Some(name) = records
                .get(&b"GNU.sparse.name"[..])
                .filter(|name| !name.is_empty())
            {
                header.name.clone_from(name);
            }
            let size = [&b"GNU.sparse.size"[..], b"GNU.sparse.realsize"]
                .iter()
                .find_map(|key| records.get(*key).filter(|text| !text.is_empty()));
            let size = match size {
                Some(text) => pax::decimal(text).ok_or_else(|| self.bad("size of a sparse file"))?,
                None => self.stored,
            };
            if in_data {
                let limit = self.stored;
                let read =
                    sparse::from_data(&mut (&mut self.inner).take(limit), size).map_err(ReadError::Io)?;
                read.map(|(map, taken)| {
                    self.stored -= taken;
                    map
                })
            } else {
                sparse::from_records(records, size)
            }
        } else {
            return Ok(());
        };
        let map =
            map.filter(|map| map.stored_bytes() == self.stored && i64::try_from(map.size_bytes()).is_ok());
        self.map = Some(map.ok_or_else(|| self.bad("map of a sparse file"))?);
        Ok(())
    }

    fn read_stored(&mut self, buf: &mut [u8]) -> io::Result<usize> {
        let room = usize::try_from(self.stored).unwrap_or(usize::MAX).min(buf.len());
        if room == 0 {
            return Ok(0);
        }
        let count = self.inner.read(&mut buf[..room])?;
        if count == 0 {
            return Err(io::ErrorKind::UnexpectedEof.into());
        }
        self.stored -= count as u64;
        Ok(count)
    }
}

/// Reads the current entry's data; holes read as zeros.
impl<R: Read> Read for Reader<R> {
    fn read(&mut self, buf: &mut [u8]) -> io::Result<usize> {
        let Some(map) = &self.map else {
            return self.read_stored(buf);
        };
        let (room, is_data) = map.peek(buf.len());
        let count = if is_data {
            self.read_stored(&mut buf[..room])?
        } else {
            buf[..room].fill(0);
            room
        };
        if let Some(map) = &mut self.map {
            map.advance(count);
        }
        Ok(count)
    }
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Format {
    V7,
    Ustar,
    Star,
    Gnu,
}

/// Recognizes the format; `None` when the checksum is wrong.
fn format(block: &[u8; BLOCK]) -> Option<Format> {
    let expected = number::parse_octal(&block[148..156])?;
    let (mut unsigned, mut signed) = (0_u64, 0_i64);
    for (index, byte) in block.iter().enumerate() {
        let byte = if (148..156).contains(&index) { b' ' } else { *byte };
        unsigned += u64::from(byte);
        signed += i64::from(i8::from_ne_bytes([byte]));
    }
    if expected != unsigned && i64::try_from(expected) != Ok(signed) {
        return None;
    }
    Some(match (&block[257..263], &block[263..265]) {
        (b"ustar\0", _) if &block[508..512] == b"tar\0" => Format::Star,
        (b"ustar\0", _) => Format::Ustar,
        (b"ustar ", b" \0") => Format::Gnu,
        _ => Format::V7,
    })
}

/// Bytes that follow a header which only says something of the next entry, padding included; `None` for an entry's own
/// header. A length that cannot be counts as none: [`Reader`] refuses it.
pub(crate) fn extension_bytes(block: &[u8; BLOCK]) -> Option<u64> {
    if !matches!(block[156], b'x' | b'g' | b'L' | b'K') {
        return None;
    }
    let size = number::parse(&block[124..136]).and_then(|size| u64::try_from(size).ok());
    let size = size.filter(|size| *size <= SPECIAL_MAX).unwrap_or(0);
    Some(size + padding(size))
}

pub(crate) fn padding(size: u64) -> u64 {
    (BLOCK as u64 - size % BLOCK as u64) % BLOCK as u64
}

/// Takes a field's text up to its first zero byte.
fn text(field: &[u8]) -> &[u8] {
    field.split(|byte| *byte == 0).next().unwrap_or_default()
}

fn parse_header(
    block: &[u8; BLOCK],
    format: Format,
    extensions: &Extensions,
    stored: &mut u64,
) -> Result<Header, &'static str> {
    let field = |from: usize, to: usize| number::parse(&block[from..to]).ok_or("a number");
    let mut header = Header::new(EntryKind::Regular, text(&block[..100]));
    let mut numbers = Numbers {
        size: field(124, 136)?,
        uid: field(108, 116)?,
        gid: field(116, 124)?,
    };
    header.link = text(&block[157..257]).to_vec();
    let mode = field(100, 108)?;
    header.mode = u32::try_from(mode & 0o7777).map_err(|_| "mode")?;
    header.mtime = Timestamp::from_seconds(field(136, 148)?);
    if format != Format::V7 {
        header.uname = text(&block[265..297]).to_vec();
        header.gname = text(&block[297..329]).to_vec();
        parse_prefix(block, format, &mut header);
    }
    let dev = if format == Format::V7 {
        (0, 0)
    } else {
        (field(329, 337)?, field(337, 345)?)
    };
    merge_records(&mut header, &mut numbers, &extensions.records)?;
    if let Some(name) = extensions.long_name.as_ref().filter(|name| !name.is_empty()) {
        header.name.clone_from(name);
    }
    if let Some(link) = extensions.long_link.as_ref().filter(|link| !link.is_empty()) {
        header.link.clone_from(link);
    }
    header.kind = match block[156] {
        0 if header.name.ends_with(b"/") => EntryKind::Directory,
        0 | b'0' | b'7' | b'S' => EntryKind::Regular,
        b'1' => EntryKind::Hardlink,
        b'2' => EntryKind::Symlink,
        b'3' => EntryKind::CharDevice,
        b'4' => EntryKind::BlockDevice,
        b'5' => EntryKind::Directory,
        b'6' => EntryKind::Fifo,
        _ => return Err("unknown type of entry"),
    };
    if matches!(header.kind, EntryKind::CharDevice | EntryKind::BlockDevice) {
        let number = |value: i64| u32::try_from(value).map_err(|_| "device number");
        header.dev = (number(dev.0)?, number(dev.1)?);
    }
    header.uid = u32::try_from(numbers.uid).map_err(|_| "owner")?;
    header.gid = u32::try_from(numbers.gid).map_err(|_| "group")?;
    *stored = u64::try_from(numbers.size).map_err(|_| "negative size")?;
    Ok(header)
}

/// Reads ustar's prefix of the name, or the times that stand in its place.
fn parse_prefix(block: &[u8; BLOCK], format: Format, header: &mut Header) {
    let seconds = |from: usize, to: usize| number::parse(&block[from..to]).map(Timestamp::from_seconds);
    let prefix = match format {
        Format::V7 => b"",
        Format::Ustar => text(&block[345..500]),
        Format::Star => {
            (header.atime, header.ctime) = (seconds(476, 488), seconds(488, 500));
            text(&block[345..476])
        }
        Format::Gnu => {
            let (atime, ctime) = (seconds(345, 357), seconds(357, 369));
            if atime.is_some() && ctime.is_some() {
                header.atime = atime.filter(|_| block[345] != 0);
                header.ctime = ctime.filter(|_| block[357] != 0);
                b""
            } else {
                // Old Go programs wrote a prefix into GNU headers.
                text(&block[345..500])
            }
        }
    };
    if !prefix.is_empty() {
        header.name = [prefix, b"/", &header.name].concat();
    }
}

struct Numbers {
    size: i64,
    uid: i64,
    gid: i64,
}

fn merge_records(
    header: &mut Header,
    numbers: &mut Numbers,
    records: &pax::Records,
) -> Result<(), &'static str> {
    let number = |value: &[u8]| {
        pax::decimal(value)
            .and_then(|value| i64::try_from(value).ok())
            .ok_or("a number in an extended header")
    };
    let time = |value: &[u8]| pax::time(value).ok_or("a time in an extended header");
    for (key, value) in records {
        if let Some(name) = key.strip_prefix(pax::XATTR) {
            if !name.is_empty() {
                header.xattrs.insert(name.to_vec(), value.clone());
            }
            continue;
        }
        if value.is_empty() {
            continue;
        }
        match key.as_slice() {
            b"path" => header.name.clone_from(value),
            b"linkpath" => header.link.clone_from(value),
            b"uname" => header.uname.clone_from(value),
            b"gname" => header.gname.clone_from(value),
            b"size" => numbers.size = number(value)?,
            b"uid" => numbers.uid = number(value)?,
            b"gid" => numbers.gid = number(value)?,
            b"mtime" => header.mtime = time(value)?,
            b"atime" => header.atime = Some(time(value)?),
            b"ctime" => header.ctime = Some(time(value)?),
            _ => {
                header.records.insert(key.clone(), value.clone());
            }
        }
    }
    Ok(())
}

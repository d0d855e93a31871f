//! Writing.
//!
//! The choices are those of Go's `archive/tar` with `Format: FormatPAX`, which containerd writes layers with: ustar when
//! all fits, else a PAX header before an otherwise ordinary one; no end padding beyond two zero blocks.

use std::io::{self, Write};

use super::{BLOCK, EntryKind, Header, number, pax};

/// Writes an archive.
#[derive(Debug)]
pub struct Writer<W> {
    inner: W,
    /// Bytes of data still owed by the caller.
    owed: u64,
    /// Zero bytes after them.
    padding: usize,
}

impl<W: Write> Writer<W> {
    /// Starts an archive.
    pub fn new(inner: W) -> Self {
        Self {
            inner,
            owed: 0,
            padding: 0,
        }
    }

    /// Writes a header; exactly `size_bytes` of data must follow for regular files.
    ///
    /// Fails with `InvalidInput` when a field cannot be expressed, such as a zero byte in a name.
    pub fn write_header(&mut self, header: &Header) -> io::Result<()> {
        self.end_entry()?;
        let records = records(header)?;
        let size = if header.kind == EntryKind::Regular {
            header.size_bytes
        } else {
            0
        };
        // A long name that ustar can split needs no record of its own, but gets one when there are others.
        let fits_ustar = records
            .keys()
            .all(|key| key == b"path" && split_name(&header.name).is_some());
        let block = if fits_ustar {
            ustar(header, size)
        } else {
            self.write_extended(&header.name, &records)?;
            plain(header, size)
        };
        self.inner.write_all(&block)?;
        self.owed = size;
        self.padding = padding(size);
        Ok(())
    }

    fn write_extended(&mut self, name: &[u8], records: &pax::Records) -> io::Result<()> {
        let mut data = Vec::new();
        for (key, value) in records {
            pax::append(&mut data, key, value)
                .ok_or_else(|| invalid("an extended record cannot be expressed"))?;
        }
        let mut name = ascii(&extended_name(name));
        name.truncate(100);
        while name.last() == Some(&b'/') {
            name.pop();
        }
        let mut block = [0; BLOCK];
        put(&mut block[..100], &name);
        number::write_octal(&mut block[100..108], 0);
        number::write_octal(&mut block[108..116], 0);
        number::write_octal(&mut block[116..124], 0);
        number::write_octal(
            &mut block[124..136],
            i64::try_from(data.len()).map_err(io::Error::other)?,
        );
        number::write_octal(&mut block[136..148], 0);
        block[156] = b'x';
        seal(&mut block);
        self.inner.write_all(&block)?;
        self.inner.write_all(&data)?;
        let zeros = padding(data.len() as u64);
        self.inner.write_all(&[0; BLOCK][..zeros])
    }

    fn end_entry(&mut self) -> io::Result<()> {
        if self.owed > 0 {
            return Err(invalid("less data than the header announced"));
        }
        let zeros = std::mem::take(&mut self.padding);
        self.inner.write_all(&[0; BLOCK][..zeros])
    }

    /// Ends the archive with its two zero blocks and returns the output.
    pub fn finish(mut self) -> io::Result<W> {
        self.end_entry()?;
        self.inner.write_all(&[0; BLOCK * 2])?;
        self.inner.flush()?;
        Ok(self.inner)
    }
}

/// Takes the current entry's data; more than announced is refused.
impl<W: Write> Write for Writer<W> {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        let length = bytes.len() as u64;
        if length > self.owed {
            return Err(invalid("more data than the header announced"));
        }
        let count = self.inner.write(bytes)?;
        self.owed -= count as u64;
        Ok(count)
    }

    fn flush(&mut self) -> io::Result<()> {
        self.inner.flush()
    }
}

fn invalid(reason: &'static str) -> io::Error {
    io::Error::new(io::ErrorKind::InvalidInput, reason)
}

fn padding(size: u64) -> usize {
    let over = usize::try_from(size % BLOCK as u64).unwrap_or_default();
    (BLOCK - over) % BLOCK
}

/// Collects what the plain header cannot hold.
fn records(header: &Header) -> io::Result<pax::Records> {
    let mut records = pax::Records::new();
    let is_ascii = |text: &[u8]| text.iter().all(|byte| *byte < 0x80 && *byte != 0);
    let texts: [(&[u8], &[u8], usize); 4] = [
        (b"path", &header.name, 100),
        (b"linkpath", &header.link, 100),
        (b"uname", &header.uname, 32),
        (b"gname", &header.gname, 32),
    ];
    for (key, text, width) in texts {
        if !is_ascii(text) || text.len() > width {
            records.insert(key.to_vec(), text.to_vec());
        }
    }
    let size = i64::try_from(header.size_bytes).map_err(|_| invalid("file too large"))?;
    let numbers: [(&[u8], i64, usize); 3] = [
        (b"uid", header.uid.into(), 8),
        (b"gid", header.gid.into(), 8),
        (b"size", size, 12),
    ];
    for (key, value, width) in numbers {
        if !number::fits_octal(width, value) {
            records.insert(key.to_vec(), value.to_string().into_bytes());
        }
    }
    if !number::fits_octal(8, header.dev.0.into()) || !number::fits_octal(8, header.dev.1.into()) {
        return Err(invalid("a device number cannot be expressed"));
    }
    if !number::fits_octal(12, header.mtime.seconds) || header.mtime.nanoseconds != 0 {
        records.insert(b"mtime".to_vec(), pax::format_time(header.mtime));
    }
    for (key, time) in [(&b"atime"[..], header.atime), (b"ctime", header.ctime)] {
        if let Some(time) = time {
            records.insert(key.to_vec(), pax::format_time(time));
        }
    }
    for (key, value) in &header.records {
        if !pax::BASIC.contains(&key.as_slice()) && !key.starts_with(pax::SPARSE) {
            records.insert(key.clone(), value.clone());
        }
    }
    for (key, value) in &header.xattrs {
        records.insert([pax::XATTR, key].concat(), value.clone());
    }
    Ok(records)
}

/// Splits a long name at a slash into ustar's prefix and name fields.
fn split_name(name: &[u8]) -> Option<(&[u8], &[u8])> {
    let length = name.len();
    if length <= 100 || !name.iter().all(|byte| *byte < 0x80 && *byte != 0) {
        return None;
    }
    // A slash at the very end stays with the name.
    let search = if length > 156 {
        156
    } else if name[length - 1] == b'/' {
        length - 1
    } else {
        length
    };
    let slash = name[..search].iter().rposition(|byte| *byte == b'/')?;
    let rest = length - slash - 1;
    if rest > 100 || rest == 0 || slash == 0 || slash > 155 {
        return None;
    }
    Some((&name[..slash], &name[slash + 1..]))
}

fn ascii(text: &[u8]) -> Vec<u8> {
    text.iter()
        .copied()
        .filter(|byte| *byte < 0x80 && *byte != 0)
        .collect()
}

/// Names the extended header as Go does: `dir/PaxHeaders.0/file`, cleaned.
fn extended_name(name: &[u8]) -> Vec<u8> {
    let slash = name
        .iter()
        .rposition(|byte| *byte == b'/')
        .map_or(0, |slash| slash + 1);
    let (dir, file) = name.split_at(slash);
    let rooted = dir.first() == Some(&b'/');
    let mut parts: Vec<&[u8]> = Vec::new();
    for part in dir
        .split(|byte| *byte == b'/')
        .chain([&b"PaxHeaders.0"[..], file])
    {
        match part {
            b"" | b"." => {}
            b".." if parts.last().is_some_and(|last| *last != b"..") => {
                parts.pop();
            }
            b".." if rooted => {}
            _ => parts.push(part),
        }
    }
    let joined = parts.join(&b'/');
    if rooted {
        [b"/", joined.as_slice()].concat()
    } else {
        joined
    }
}

/// Copies text into a field. A text that fills the field with a slash at the cut loses the slash, as in Go.
fn put(field: &mut [u8], text: &[u8]) {
    let count = text.len().min(field.len());
    field[..count].copy_from_slice(&text[..count]);
    if text.len() > field.len() && field.last() == Some(&b'/') {
        let end = field
            .iter()
            .rposition(|byte| *byte != b'/')
            .map_or(0, |last| last + 1);
        field[end] = 0;
    }
}

fn flag(kind: EntryKind) -> u8 {
    match kind {
        EntryKind::Regular => b'0',
        EntryKind::Hardlink => b'1',
        EntryKind::Symlink => b'2',
        EntryKind::CharDevice => b'3',
        EntryKind::BlockDevice => b'4',
        EntryKind::Directory => b'5',
        EntryKind::Fifo => b'6',
    }
}

fn fields(header: &Header, size: u64) -> [u8; BLOCK] {
    let mut block = [0; BLOCK];
    number::write_octal(&mut block[100..108], header.mode.into());
    number::write_octal(&mut block[108..116], header.uid.into());
    number::write_octal(&mut block[116..124], header.gid.into());
    number::write_octal(&mut block[124..136], i64::try_from(size).unwrap_or(-1));
    number::write_octal(&mut block[136..148], header.mtime.seconds);
    block[156] = flag(header.kind);
    number::write_octal(&mut block[329..337], header.dev.0.into());
    number::write_octal(&mut block[337..345], header.dev.1.into());
    block
}

fn ustar(header: &Header, size: u64) -> [u8; BLOCK] {
    let mut block = fields(header, size);
    let (prefix, name) = split_name(&header.name).unwrap_or((b"", &header.name));
    put(&mut block[..100], name);
    put(&mut block[157..257], &header.link);
    put(&mut block[265..297], &header.uname);
    put(&mut block[297..329], &header.gname);
    put(&mut block[345..500], prefix);
    seal(&mut block);
    block
}

fn plain(header: &Header, size: u64) -> [u8; BLOCK] {
    let mut block = fields(header, size);
    put(&mut block[..100], &ascii(&header.name));
    put(&mut block[157..257], &ascii(&header.link));
    put(&mut block[265..297], &ascii(&header.uname));
    put(&mut block[297..329], &ascii(&header.gname));
    seal(&mut block);
    block
}

/// Adds magic, version and checksum.
fn seal(block: &mut [u8; BLOCK]) {
    block[257..265].copy_from_slice(b"ustar\x0000");
    block[148..156].fill(b' ');
    let sum: u32 = block.iter().map(|byte| u32::from(*byte)).sum();
    number::write_octal(&mut block[148..155], sum.into());
    block[155] = b' ';
}

//! Sparse files: GNU's old format and the three PAX formats.

use std::io::{self, Read};

use super::{BLOCK, number, pax};

/// Most bytes a map may take; more is hostile.
const MAP_MAX: usize = 1 << 20;

/// A run of data within a file: offset and length in bytes.
pub(super) type Region = (u64, u64);

/// A file with holes, as its archive describes it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Map {
    /// Runs of data, ascending, not overlapping, not empty.
    regions: Vec<Region>,
    /// Length of the file.
    size: u64,
    /// Where the next byte is read.
    position: u64,
    /// The first region that ends behind `position`.
    next: usize,
}

impl Map {
    /// Checks a map; `None` for one that overlaps, runs backwards or exceeds the file.
    pub(super) fn new(regions: Vec<Region>, size: u64) -> Option<Self> {
        let mut end = 0;
        for (offset, length) in &regions {
            if *offset < end {
                return None;
            }
            end = offset.checked_add(*length).filter(|end| *end <= size)?;
        }
        let regions = regions.into_iter().filter(|(_, length)| *length > 0).collect();
        Some(Self {
            regions,
            size,
            position: 0,
            next: 0,
        })
    }

    /// Returns how much data the archive must hold.
    pub(super) fn stored_bytes(&self) -> u64 {
        self.regions.iter().map(|(_, length)| length).sum()
    }

    /// Returns the file's length.
    pub(super) fn size_bytes(&self) -> u64 {
        self.size
    }

    /// Tells what the next at most `room` bytes are: their number, and whether they are data.
    pub(super) fn peek(&self, room: usize) -> (usize, bool) {
        let (run, is_data) = self.run();
        (usize::try_from(run).unwrap_or(usize::MAX).min(room), is_data)
    }

    /// Tells how many bytes are of one kind from here on, and whether they are data.
    fn run(&self) -> (u64, bool) {
        match self.regions.get(self.next) {
            Some((offset, _)) if self.position < *offset => (offset - self.position, false),
            Some((offset, length)) => (offset + length - self.position, true),
            None => (self.size - self.position, false),
        }
    }

    /// Moves to the next data, or to the end; returns how many bytes there are none of on the way.
    pub(super) fn skip_hole(&mut self) -> u64 {
        let (run, is_data) = self.run();
        if is_data {
            return 0;
        }
        self.position += run;
        run
    }

    /// Moves over `count` bytes of what `peek` told.
    pub(super) fn advance(&mut self, count: usize) {
        self.position += count as u64;
        if let Some((offset, length)) = self.regions.get(self.next)
            && self.position >= offset + length
        {
            self.next += 1;
        }
    }
}

/// Reads the entries of a GNU header or extension block; `None` for damaged ones.
fn entries(fields: &[u8], regions: &mut Vec<Region>) -> Option<()> {
    for entry in fields.chunks_exact(24) {
        if entry[0] == 0 {
            break;
        }
        let offset = u64::try_from(number::parse(&entry[..12])?).ok()?;
        let length = u64::try_from(number::parse(&entry[12..])?).ok()?;
        regions.push((offset, length));
    }
    Some(())
}

/// Reads the map of GNU's old format, whose extension blocks follow the header in `input`.
pub(super) fn old_gnu(header: &[u8; BLOCK], input: &mut impl Read) -> io::Result<Option<Map>> {
    let Some(size) = number::parse(&header[483..495]).and_then(|size| u64::try_from(size).ok()) else {
        return Ok(None);
    };
    let mut regions = Vec::new();
    if entries(&header[386..482], &mut regions).is_none() {
        return Ok(None);
    }
    let mut more = header[482] != 0;
    while more {
        if regions.len() * 24 > MAP_MAX {
            return Ok(None);
        }
        let mut block = [0; BLOCK];
        input.read_exact(&mut block)?;
        if entries(&block[..504], &mut regions).is_none() {
            return Ok(None);
        }
        more = block[504] != 0;
    }
    Ok(Map::new(regions, size))
}

/// Says which PAX sparse format records are of: `Some(true)` for the one whose map lies before the data.
pub(super) fn pax_version(records: &pax::Records) -> Option<bool> {
    let get = |key: &[u8]| records.get(key).map(Vec::as_slice).unwrap_or_default();
    match (get(b"GNU.sparse.major"), get(b"GNU.sparse.minor")) {
        (b"0", b"0" | b"1") => Some(false),
        (b"1", b"0") => Some(true),
        (b"", b"") if !get(b"GNU.sparse.map").is_empty() => Some(false),
        _ => None,
    }
}

/// Reads a map from records alone.
pub(super) fn from_records(records: &pax::Records, size: u64) -> Option<Map> {
    let count = pax::decimal(records.get(&b"GNU.sparse.numblocks"[..])?)?;
    let text = records
        .get(&b"GNU.sparse.map"[..])
        .map(Vec::as_slice)
        .unwrap_or_default();
    let numbers: Vec<u64> = if text.is_empty() {
        Vec::new()
    } else {
        text.split(|byte| *byte == b',')
            .map(pax::decimal)
            .collect::<Option<_>>()?
    };
    if count.checked_mul(2)? != numbers.len() as u64 {
        return None;
    }
    Map::new(
        numbers.chunks_exact(2).map(|pair| (pair[0], pair[1])).collect(),
        size,
    )
}

/// Reads a map that lies before the data: decimal numbers, one a line, padded to whole blocks. Returns how many bytes it
/// took along with it.
pub(super) fn from_data(input: &mut impl Read, size: u64) -> io::Result<Option<(Map, u64)>> {
    let mut lines = Lines {
        input,
        block: [0; BLOCK],
        at: BLOCK,
        taken: 0,
    };
    let Some(count) = lines.number()? else {
        return Ok(None);
    };
    let mut regions = Vec::new();
    for _ in 0..count {
        match (lines.number()?, lines.number()?) {
            (Some(offset), Some(length)) => regions.push((offset, length)),
            _ => return Ok(None),
        }
    }
    let taken = lines.taken as u64;
    Ok(Map::new(regions, size).map(|map| (map, taken)))
}

struct Lines<'a, R> {
    input: &'a mut R,
    block: [u8; BLOCK],
    at: usize,
    taken: usize,
}

impl<R: Read> Lines<'_, R> {
    fn number(&mut self) -> io::Result<Option<u64>> {
        let mut text = Vec::new();
        loop {
            if self.at == BLOCK {
                if self.taken >= MAP_MAX {
                    return Ok(None);
                }
                self.input.read_exact(&mut self.block)?;
                self.taken += BLOCK;
                self.at = 0;
            }
            let byte = self.block[self.at];
            self.at += 1;
            if byte == b'\n' {
                return Ok(pax::decimal(&text));
            }
            text.push(byte);
            if text.len() > 20 {
                return Ok(None);
            }
        }
    }
}

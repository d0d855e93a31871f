//! Archives block by block, so that they can say anything.

use std::io::Write as _;

const BLOCK: usize = 512;

/// An archive under construction.
#[derive(Clone, Default)]
pub struct Tarball {
    bytes: Vec<u8>,
}

impl Tarball {
    /// Starts an empty archive.
    pub fn new() -> Self {
        Self::default()
    }

    /// Adds a file.
    pub fn file(self, name: &str, data: &[u8]) -> Self {
        self.entry(b'0', name, "", data)
    }

    /// Adds a directory.
    pub fn dir(self, name: &str) -> Self {
        self.entry(b'5', name, "", &[])
    }

    /// Adds a symbolic link.
    pub fn symlink(self, name: &str, target: &str) -> Self {
        self.entry(b'2', name, target, &[])
    }

    /// Adds another name of a file.
    pub fn link(self, name: &str, target: &str) -> Self {
        self.entry(b'1', name, target, &[])
    }

    /// Adds an entry; names that are too long for a header get one of their own.
    pub fn entry(self, kind: u8, name: &str, link: &str, data: &[u8]) -> Self {
        let mut records = Vec::new();
        if name.len() > 100 {
            records.push(("path", name.as_bytes()));
        }
        if link.len() > 100 {
            records.push(("linkpath", link.as_bytes()));
        }
        let this = if records.is_empty() {
            self
        } else {
            self.records(&records)
        };
        this.header(kind, name, data.len() as u64, |header| {
            let link = &link.as_bytes()[..link.len().min(100)];
            header[157..157 + link.len()].copy_from_slice(link);
        })
        .data(data)
    }

    /// Adds an extended header for the next entry.
    pub fn records(self, records: &[(&str, &[u8])]) -> Self {
        let mut data = Vec::new();
        for (key, value) in records {
            data.extend_from_slice(&record(key, value));
        }
        self.header(b'x', "extended", data.len() as u64, |_| {})
            .data(&data)
    }

    /// Adds a header, spoiled before its checksum is made.
    pub fn header(mut self, kind: u8, name: &str, size: u64, spoil: impl FnOnce(&mut [u8; BLOCK])) -> Self {
        let mut header = [0; BLOCK];
        let name = &name.as_bytes()[..name.len().min(100)];
        header[..name.len()].copy_from_slice(name);
        octal(&mut header[100..108], 0o755);
        octal(&mut header[108..116], 0);
        octal(&mut header[116..124], 0);
        octal(&mut header[124..136], size);
        octal(&mut header[136..148], 86_400);
        header[156] = kind;
        header[257..265].copy_from_slice(b"ustar\x0000");
        spoil(&mut header);
        header[148..156].fill(b' ');
        let sum: u64 = header.iter().map(|byte| u64::from(*byte)).sum();
        octal(&mut header[148..155], sum);
        self.bytes.extend_from_slice(&header);
        self
    }

    /// Adds bytes, filled up to a block.
    pub fn data(mut self, data: &[u8]) -> Self {
        self.bytes.extend_from_slice(data);
        self.bytes.resize(self.bytes.len().next_multiple_of(BLOCK), 0);
        self
    }

    /// The archive as far as it is, without an end.
    pub fn cut(self) -> Vec<u8> {
        self.bytes
    }

    /// Ends the archive.
    pub fn end(mut self) -> Vec<u8> {
        self.bytes.resize(self.bytes.len() + 2 * BLOCK, 0);
        self.bytes
    }
}

/// A file of `size` bytes, all of them a hole but the last one.
pub fn sparse(name: &str, size: u64) -> Vec<u8> {
    let map = format!("{},1", size - 1);
    let size = size.to_string();
    let records: [(&str, &[u8]); 6] = [
        ("GNU.sparse.major", b"0"),
        ("GNU.sparse.minor", b"1"),
        ("GNU.sparse.name", name.as_bytes()),
        ("GNU.sparse.size", size.as_bytes()),
        ("GNU.sparse.numblocks", b"1"),
        ("GNU.sparse.map", map.as_bytes()),
    ];
    Tarball::new().records(&records).file(name, b"x").end()
}

/// A compressed archive of `chunks` times the same entries, which is quick to make: streams of gzip can be joined.
pub fn many(chunk: &[u8], chunks: usize) -> Vec<u8> {
    let (body, end) = (gzip(chunk), gzip(&[0; 2 * BLOCK]));
    let mut all = body.repeat(chunks);
    all.extend_from_slice(&end);
    all
}

/// Compresses.
pub fn gzip(bytes: &[u8]) -> Vec<u8> {
    let mut out = flate2::write::GzEncoder::new(Vec::new(), flate2::Compression::fast());
    // Writing to memory does not fail.
    let _ = out.write_all(bytes);
    out.finish().unwrap_or_default()
}

fn octal(field: &mut [u8], value: u64) {
    let digits = field.len() - 1;
    let text = format!("{value:0digits$o}");
    field[..digits].copy_from_slice(&text.as_bytes()[text.len() - digits..]);
}

/// `LENGTH KEY=VALUE\n`, whose length counts itself.
fn record(key: &str, value: &[u8]) -> Vec<u8> {
    let rest = key.len() + value.len() + 3;
    let mut length = rest + 1;
    while length != rest + length.to_string().len() {
        length = rest + length.to_string().len();
    }
    [
        length.to_string().as_bytes(),
        b" ",
        key.as_bytes(),
        b"=",
        value,
        b"\n",
    ]
    .concat()
}

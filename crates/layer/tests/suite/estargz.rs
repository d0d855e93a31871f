//! Archives whose files can be read one by one.

use std::collections::BTreeMap;
use std::io::{Read, Write};

use flate2::bufread::{GzDecoder, MultiGzDecoder};
use layer::compress::estargz::{self, TABLE_DIGEST, UNCOMPRESSED_SIZE, find};
use layer::compress::{Compression, Packed, Packer, decompress};
use layer::tar::{EntryKind, Header, Reader, Writer};
use layer::tree::Timestamp;
use oci::Digest;
use serde_json::Value;

const PIECE: usize = 4 << 20;

fn try_pack(archive: &[u8], level: Option<i32>, step: usize) -> std::io::Result<Packed<Vec<u8>>> {
    let mut packer = Packer::new(Vec::new(), Compression::Estargz, level)?;
    for part in archive.chunks(step) {
        packer.write_all(part)?;
    }
    packer.finish()
}

fn pack(archive: &[u8]) -> Packed<Vec<u8>> {
    try_pack(archive, None, 100_000).unwrap()
}

fn gunzip(bytes: &[u8]) -> Vec<u8> {
    let mut plain = Vec::new();
    MultiGzDecoder::new(bytes).read_to_end(&mut plain).unwrap();
    plain
}

fn table_of(blob: &[u8]) -> estargz::Table {
    find_in(blob).expect("no table")
}

fn find_in(blob: &[u8]) -> Option<estargz::Table> {
    find(blob.len() as u64, |buf, offset| {
        let from = usize::try_from(offset).unwrap();
        buf.copy_from_slice(&blob[from..from + buf.len()]);
        Ok(())
    })
    .unwrap()
}

/// The bytes of the table's JSON.
fn json_of(blob: &[u8]) -> Vec<u8> {
    let offset = usize::try_from(table_of(blob).offset).unwrap();
    let mut archive = Reader::new(GzDecoder::new(&blob[offset..]));
    assert_eq!(archive.next_entry().unwrap().unwrap().name, b"stargz.index.json");
    let mut json = Vec::new();
    archive.read_to_end(&mut json).unwrap();
    json
}

fn entries_of(blob: &[u8]) -> Vec<Value> {
    let table: Value = serde_json::from_slice(&json_of(blob)).unwrap();
    assert_eq!(table["version"], 1);
    table["entries"].as_array().unwrap().clone()
}

fn file(name: &str, data: &[u8]) -> (Header, Vec<u8>) {
    let mut header = Header::new(EntryKind::Regular, name);
    header.size_bytes = data.len() as u64;
    header.mode = 0o644;
    (header, data.to_vec())
}

fn other(kind: EntryKind, name: &str) -> (Header, Vec<u8>) {
    (Header::new(kind, name), Vec::new())
}

fn archive(entries: &[(Header, Vec<u8>)]) -> Vec<u8> {
    let mut writer = Writer::new(Vec::new());
    for (header, data) in entries {
        writer.write_header(header).unwrap();
        writer.write_all(data).unwrap();
    }
    writer.finish().unwrap()
}

fn noise(length: usize) -> Vec<u8> {
    let mut state = 0x9e37_79b9_u32;
    let next = |_| {
        state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
        state.to_be_bytes()[0] & 0x3f
    };
    (0..length).map(next).collect()
}

/// One of everything a layer has.
fn all_kinds() -> Vec<(Header, Vec<u8>)> {
    let mut directory = other(EntryKind::Directory, "d/");
    directory.0.mode = 0o1755;
    directory.0.mtime = Timestamp {
        seconds: 1_700_000_000,
        nanoseconds: 600_000_000,
    };
    let mut owned = file("d/owned", b"hello");
    (owned.0.uid, owned.0.gid) = (5, 6);
    (owned.0.uname, owned.0.gname) = (b"games".to_vec(), b"disk".to_vec());
    owned.0.xattrs = BTreeMap::from([(b"user.a".to_vec(), b"\x00\xff".to_vec())]);
    let mut again = file("d/again", b"x");
    (again.0.uid, again.0.uname) = (5, b"games".to_vec());
    let mut hard = other(EntryKind::Hardlink, "d/hard");
    hard.0.link = b"d/owned".to_vec();
    let mut soft = other(EntryKind::Symlink, "soft");
    soft.0.link = b"d/owned".to_vec();
    let mut device = other(EntryKind::CharDevice, "dev");
    device.0.dev = (1, 3);
    let mut disk = other(EntryKind::BlockDevice, "disk");
    disk.0.dev = (8, 0);
    let long = format!("{}/long", "n".repeat(300));
    vec![
        directory,
        owned,
        again,
        hard,
        soft,
        device,
        disk,
        other(EntryKind::Fifo, "fifo"),
        file("empty", b""),
        file(".wh.gone", b""),
        file("d/.wh..wh..opq", b""),
        file(&long, &noise(700)),
        file("exact", &noise(PIECE)),
        file("large", &noise(2 * PIECE + 77)),
        file("last", &[7; 512]),
    ]
}

#[test]
fn the_archive_is_unchanged_and_the_table_follows_it() {
    let plain = archive(&all_kinds());
    let packed = pack(&plain);
    let whole = gunzip(&packed.out);
    assert!(whole.starts_with(&plain));
    assert_eq!(packed.diff_id, Digest::sha256(&whole));
    assert_eq!(packed.annotations[UNCOMPRESSED_SIZE], whole.len().to_string());
    let table = table_of(&packed.out);
    let json = json_of(&packed.out);
    assert_eq!(table.digest, Digest::sha256(&json));
    assert_eq!(packed.annotations[TABLE_DIGEST], table.digest.to_string());
    let offset = usize::try_from(table.offset).unwrap();
    assert!(gunzip(&packed.out[..offset]) == plain);
    let footer = &packed.out[packed.out.len() - 51..];
    assert_eq!(gunzip(footer), b"");
    assert_eq!(footer[16..38], *format!("{offset:016x}STARGZ").as_bytes());
    let (kind, mut reader) = decompress(&*packed.out).unwrap();
    assert_eq!(kind, Compression::Gzip, "its first bytes are gzip's");
    let mut back = Vec::new();
    reader.read_to_end(&mut back).unwrap();
    assert!(back == whole);
}

#[test]
fn each_piece_is_found_where_the_table_says() {
    let kinds = all_kinds();
    let packed = pack(&archive(&kinds));
    let mut files: BTreeMap<String, Vec<u8>> = BTreeMap::new();
    for entry in entries_of(&packed.out) {
        let Some(digest) = entry["chunkDigest"].as_str() else { continue };
        let name = entry["name"].as_str().unwrap();
        let data = files.entry(name.to_owned()).or_default();
        assert_eq!(entry["chunkOffset"].as_u64().unwrap_or(0), data.len() as u64);
        let (header, expected) = kinds.iter().find(|(header, _)| header.name == name.as_bytes()).unwrap();
        let left = header.size_bytes - data.len() as u64;
        let length = entry["chunkSize"].as_u64().unwrap_or(left);
        assert_eq!(length, left.min(PIECE as u64));
        let offset = usize::try_from(entry["offset"].as_u64().unwrap()).unwrap();
        let mut piece = Vec::new();
        // A single member holds the whole piece.
        let member = GzDecoder::new(&packed.out[offset..]);
        member.take(length).read_to_end(&mut piece).unwrap();
        assert_eq!(digest, Digest::sha256(&piece).to_string(), "{name}");
        data.extend(piece);
        if data.len() as u64 == header.size_bytes {
            assert!(data == expected, "{name}");
        }
    }
    let with_data = kinds.iter().filter(|(_, data)| !data.is_empty()).count();
    assert_eq!(files.len(), with_data);
}

#[test]
fn the_table_describes_each_entry() {
    let kinds = all_kinds();
    let packed = pack(&archive(&kinds));
    let entries = entries_of(&packed.out);
    let get = |name: &str| entries.iter().find(|entry| entry["name"] == name).unwrap();
    let types = |kind: &str| entries.iter().filter(|entry| entry["type"] == kind).count();
    assert_eq!(types("chunk"), 2);
    assert_eq!(entries.len(), kinds.len() + 2);
    let directory = get("d/");
    assert_eq!(directory["type"], "dir");
    assert_eq!(directory["mode"], 0o1755);
    assert_eq!(directory["modtime"], "2023-11-14T22:13:21Z");
    let owned = get("d/owned");
    assert_eq!(owned["size"], 5);
    assert_eq!((&owned["uid"], &owned["gid"]), (&5.into(), &6.into()));
    assert_eq!(owned["userName"], "games");
    assert_eq!(owned["groupName"], "disk");
    assert_eq!(owned["xattrs"]["user.a"], "AP8=");
    assert_eq!(owned["digest"], Digest::sha256(b"hello").to_string());
    assert_eq!(owned["digest"], owned["chunkDigest"]);
    assert!(get("d/again").get("userName").is_none(), "told before");
    assert_eq!(get("d/hard")["type"], "hardlink");
    assert_eq!(get("d/hard")["linkName"], "d/owned");
    assert_eq!(get("soft")["type"], "symlink");
    assert_eq!((&get("dev")["type"], &get("dev")["devMinor"]), (&"char".into(), &3.into()));
    assert_eq!((&get("disk")["type"], &get("disk")["devMajor"]), (&"block".into(), &8.into()));
    assert_eq!(get("fifo")["type"], "fifo");
    for empty in ["empty", ".wh.gone", "d/.wh..wh..opq"] {
        assert_eq!(get(empty)["digest"], Digest::sha256([]).to_string());
        assert!(get(empty).get("offset").is_none());
        assert!(get(empty).get("modtime").is_none());
    }
    assert_eq!(get("large")["digest"], Digest::sha256(noise(2 * PIECE + 77)).to_string());
    assert_ne!(get("large")["digest"], get("large")["chunkDigest"]);
    assert_eq!(get("exact")["chunkSize"], PIECE);
}

#[test]
fn output_depends_on_archive_and_level_alone() {
    let plain = archive(&all_kinds());
    let bytes = pack(&plain).out;
    for step in [1000, 511, 1 << 23] {
        assert!(try_pack(&plain, None, step).unwrap().out == bytes);
    }
    let small = archive(&all_kinds()[..9]);
    assert!(try_pack(&small, None, 1).unwrap().out == pack(&small).out);
    assert!(try_pack(&plain, Some(1), 1000).unwrap().out != bytes);
}

#[test]
fn archives_without_files_and_of_many_headers_are_packed() {
    for plain in [archive(&[]), Vec::new()] {
        let packed = pack(&plain);
        assert!(gunzip(&packed.out).starts_with(&plain));
        assert!(entries_of(&packed.out).is_empty());
    }
    let many: Vec<_> = (0..20_000)
        .map(|number| other(EntryKind::Fifo, &format!("fifo{number}")))
        .chain([file("f", b"behind")])
        .collect();
    let packed = pack(&archive(&many));
    let entries = entries_of(&packed.out);
    assert_eq!(entries.len(), many.len());
    let offset = usize::try_from(entries[20_000]["offset"].as_u64().unwrap()).unwrap();
    assert!(gunzip(&packed.out[offset..]).starts_with(b"behind"));
}

#[test]
fn what_follows_the_end_mark_and_missing_end_marks_stay_as_they_are() {
    let mut long = archive(&[file("f", b"x")]);
    let short = long[..1024].to_vec();
    long.extend([0; 3000]);
    for plain in [long, short.clone(), short[..513].to_vec()] {
        let packed = pack(&plain);
        let offset = usize::try_from(table_of(&packed.out).offset).unwrap();
        assert!(gunzip(&packed.out[..offset]) == plain);
    }
}

#[test]
fn archives_that_cannot_be_packed_are_refused() {
    let error = |plain: &[u8]| try_pack(plain, None, 1000).unwrap_err();
    let with_table = archive(&[file("./stargz.index.json", b"{}")]);
    assert_eq!(
        error(&with_table).to_string(),
        "existing TOC JSON is not allowed; decompress layer before append"
    );
    let whole = archive(&all_kinds());
    for cut in [100, 700, 512 * 3 + 2] {
        let kind = error(&whole[..cut]).kind();
        assert_eq!(kind, std::io::ErrorKind::UnexpectedEof, "{cut}");
    }
    assert_eq!(error(&noise(2048)).kind(), std::io::ErrorKind::InvalidData);
    let mut sparse = archive(&[file("s", b"")]);
    sparse[156] = b'S';
    // The old format of holes: its magic, and the header's checksum.
    sparse[257..265].copy_from_slice(b"ustar  \0");
    sparse[329..512].fill(0);
    sparse[148..156].fill(b' ');
    let sum: u32 = sparse[..512].iter().map(|byte| u32::from(*byte)).sum();
    sparse[148..156].copy_from_slice(format!("{sum:06o}\0 ").as_bytes());
    assert_eq!(
        error(&sparse).to_string(),
        "unsupported input tar entry: a sparse file"
    );
    let mut endless = archive(&[file("g", b"")])[..512].repeat(9000);
    for block in endless.chunks_mut(512) {
        block[156] = b'g';
    }
    assert_eq!(error(&endless).to_string(), "too many extended headers");
}

#[test]
fn other_blobs_have_no_table() {
    let plain = archive(&all_kinds()[..9]);
    let blob = pack(&plain).out;
    assert!(find_in(&blob).is_some());
    assert_eq!(find_in(&blob[..blob.len() - 1]), None);
    assert_eq!(find_in(&blob[..30]), None);
    assert_eq!(find_in(&[]), None);
    let end = blob.len() - 51;
    // A footer that leads elsewhere, or behind the end.
    for offset in ["0000000000000000", "00000000ffffffff", "ffffffffffffffff", "+000000000000000"] {
        let mut lying = blob.clone();
        lying[end + 16..end + 32].copy_from_slice(offset.as_bytes());
        assert_eq!(find_in(&lying), None, "{offset}");
    }
    let mut packer = Packer::new(Vec::new(), Compression::Gzip, None).unwrap();
    packer.write_all(&plain).unwrap();
    assert_eq!(find_in(&packer.finish().unwrap().out), None);
    let failing = find(1000, |_, _| Err(std::io::Error::other("no disk")));
    assert_eq!(failing.unwrap_err().to_string(), "no disk");
}

//! Compression both ways.

use std::io::{Read, Write};

use layer::compress::{Compression, Packer, decompress, decompress_archive};

fn noise(length: usize) -> Vec<u8> {
    let mut state = 0x9e37_79b9_u32;
    (0..length)
        .map(|index| {
            state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
            if index % 3 == 0 {
                b'a'
            } else {
                state.to_be_bytes()[0]
            }
        })
        .collect()
}

fn pack(data: &[u8], compression: Compression, level: Option<i32>, chunk: usize) -> (Vec<u8>, oci::Digest) {
    let mut packer = Packer::new(Vec::new(), compression, level).unwrap();
    for part in data.chunks(chunk.max(1)) {
        packer.write_all(part).unwrap();
    }
    let packed = packer.finish().unwrap();
    assert!(packed.annotations.is_empty());
    (packed.out, packed.diff_id)
}

#[test]
fn what_is_packed_unpacks_and_the_diff_id_is_right() {
    for compression in [Compression::Uncompressed, Compression::Gzip, Compression::Zstd] {
        for length in [0, 1, (1 << 20) - 1, 1 << 20, (1 << 20) + 1, (5 << 20) + 77] {
            let data = noise(length);
            let (bytes, diff_id) = pack(&data, compression, None, 100_000);
            assert_eq!(diff_id, oci::Digest::sha256(&data));
            let (found, mut reader) = decompress(&*bytes).unwrap();
            let mut back = Vec::new();
            reader.read_to_end(&mut back).unwrap();
            assert!(back == data, "{compression:?} {length}");
            if length > 0 {
                assert_eq!(found, compression);
            }
        }
    }
}

#[test]
fn output_depends_on_input_and_level_alone() {
    let data = noise(3 << 20);
    for (compression, levels) in [(Compression::Gzip, [1, 6]), (Compression::Zstd, [1, 3])] {
        let bytes = levels.map(|level| pack(&data, compression, Some(level), 4096).0);
        assert_ne!(bytes[0], bytes[1]);
        assert_eq!(bytes[1], pack(&data, compression, Some(levels[1]), 1 << 21).0);
        assert_eq!(bytes[1], pack(&data, compression, None, 777).0);
    }
}

/// Bytes that no compressor can make smaller.
fn dense(length: usize) -> Vec<u8> {
    let mut state = 0x2545_f491_4f6c_dd1d_u64;
    let next = |_| {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        (state >> 32).to_le_bytes()[0]
    };
    (0..length).map(next).collect()
}

#[test]
fn what_is_dense_is_stored_unless_a_level_is_asked_for() {
    let text = b"words that come again, and again ".repeat(20_000);
    let data = [dense(1_500_000), text.clone(), dense(700_000), text].concat();
    let (bytes, _) = pack(&data, Compression::Gzip, None, 4096);
    let (tried, _) = pack(&data, Compression::Gzip, Some(5), 4096);
    assert_ne!(bytes, tried);
    let excess = bytes.len() as f64 / tried.len() as f64;
    assert!(excess < 1.01, "stored {} of {}", bytes.len(), tried.len());
    let mut back = Vec::new();
    decompress(&*bytes).unwrap().1.read_to_end(&mut back).unwrap();
    assert!(back == data);
}

#[test]
fn a_packer_dropped_early_leaves_nothing_waiting() {
    let mut packer = Packer::new(Vec::new(), Compression::Gzip, None).unwrap();
    packer.write_all(&noise(6 << 20)).unwrap();
    drop(packer);
}

#[test]
fn levels_out_of_range_are_refused() {
    assert!(Packer::new(Vec::new(), Compression::Gzip, Some(99)).is_err());
    assert!(Packer::new(Vec::new(), Compression::Zstd, Some(0)).is_err());
}

#[test]
fn archives_of_users_may_be_bzip2_or_xz() {
    let bzip2 = [
        0x42, 0x5a, 0x68, 0x39, 0x31, 0x41, 0x59, 0x26, 0x53, 0x59, 0xc1, 0xc0, 0x80, 0xe2, 0x00, 0x00, 0x01,
        0x41, 0x00, 0x00, 0x10, 0x02, 0x44, 0xa0, 0x00, 0x30, 0xcd, 0x00, 0xc3, 0x46, 0x29, 0x97, 0x17, 0x72,
        0x45, 0x38, 0x50, 0x90, 0xc1, 0xc0, 0x80, 0xe2,
    ];
    let mut text = String::new();
    decompress_archive(&bzip2[..])
        .unwrap()
        .read_to_string(&mut text)
        .unwrap();
    assert_eq!(text, "hello\n");
    let xz = [
        0xfd, 0x37, 0x7a, 0x58, 0x5a, 0x00, 0x00, 0x04, 0xe6, 0xd6, 0xb4, 0x46, 0x02, 0x00, 0x21, 0x01, 0x16,
        0x00, 0x00, 0x00, 0x74, 0x2f, 0xe5, 0xa3, 0x01, 0x00, 0x05, 0x68, 0x65, 0x6c, 0x6c, 0x6f, 0x0a, 0x00,
        0x00, 0x00, 0xa5, 0x60, 0x97, 0xf1, 0x94, 0xf6, 0xfd, 0xe0, 0x00, 0x01, 0x1e, 0x06, 0xc1, 0x2f, 0xa4,
        0x1d, 0x1f, 0xb6, 0xf3, 0x7d, 0x01, 0x00, 0x00, 0x00, 0x00, 0x04, 0x59, 0x5a,
    ];
    let mut text = String::new();
    decompress_archive(&xz[..])
        .unwrap()
        .read_to_string(&mut text)
        .unwrap();
    assert_eq!(text, "hello\n");
}

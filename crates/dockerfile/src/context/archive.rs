//! Telling archives from other files.

/// Tells whether bytes begin an archive: bzip2, gzip, xz or tar.
pub(super) fn is_archive(header: &[u8]) -> bool {
    let magics: [&[u8]; 3] = [b"BZh", b"\x1f\x8b\x08", b"\xfd7zXZ\x00"];
    magics.iter().any(|magic| header.starts_with(magic)) || is_tar(header)
}

const TAR_BLOCK_BYTES: usize = 512;

/// Tells whether bytes begin with a whole entry of a tar. Long names go on behind the bytes looked at.
fn is_tar(header: &[u8]) -> bool {
    let Some(block) = header.get(..TAR_BLOCK_BYTES) else {
        return false;
    };
    if matches!(block[156], b'x' | b'L' | b'K') {
        return false;
    }
    let (unsigned, signed) = block
        .iter()
        .enumerate()
        .fold((0i64, 0i64), |(unsigned, signed), (at, byte)| {
            let byte = if (148..156).contains(&at) { b' ' } else { *byte };
            (
                unsigned + i64::from(byte),
                signed + i64::from(i8::from_ne_bytes([byte])),
            )
        });
    let text = std::str::from_utf8(&block[148..156]).unwrap_or_default();
    let stated = i64::from_str_radix(text.trim_matches(['\0', ' ']), 8);
    stated.is_ok_and(|stated| stated == unsigned || stated == signed) && block.iter().any(|byte| *byte != 0)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn recognizes_archives() {
        let mut header = [0u8; 1024];
        header[..1].copy_from_slice(b"a");
        header[148..156].copy_from_slice(b"        ");
        let sum: u32 = header[..512].iter().map(|byte| u32::from(*byte)).sum();
        header[148..156].copy_from_slice(format!("{sum:06o}\0 ").as_bytes());
        assert!(is_archive(&header));
        header[0] = b'b';
        assert!(!is_archive(&header));
        assert!(is_archive(b"\x1f\x8b\x08...") && !is_archive(b"FROM x") && !is_archive(&[0; 1024]));
    }
}

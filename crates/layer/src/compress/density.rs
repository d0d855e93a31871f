//! Finds what cannot be made smaller: archives, pictures and keys that lie in layers, on which a compressor spends most of
//! its time for nothing.
//!
//! All is decided in integers from the bytes alone, so that every machine decides alike.

use std::ops::Range;

/// Bytes decided on together: twice as far as gzip looks back for repetitions.
const SEGMENT: usize = 64 << 10;
/// With fewer bytes their distribution says nothing.
const LEAST: usize = 16 << 10;
/// One in so many positions is looked at for repetitions.
const SAMPLED: u32 = 64;
/// Of every so many bytes the first quarter is counted.
const COUNTED: usize = 1 << 10;
/// Bits of the table of what was seen at sampled positions.
const TABLE_BITS: u32 = 12;

/// Cuts a block into runs that are alike: whether each is dense, and where it lies. Neighbours differ.
pub(super) fn runs(block: &[u8]) -> Vec<(bool, Range<usize>)> {
    let mut runs: Vec<(bool, Range<usize>)> = Vec::new();
    let mut start = 0;
    for segment in block.chunks(SEGMENT) {
        let (dense, end) = (is_dense(segment), start + segment.len());
        match runs.last_mut() {
            Some((last, range)) if *last == dense => range.end = end,
            _ => runs.push((dense, start..end)),
        }
        start = end;
    }
    runs
}

fn is_dense(segment: &[u8]) -> bool {
    segment.len() >= LEAST && is_even(segment) && !repeats(segment)
}

/// Whether all bytes are about as frequent, by a quarter of them: coding them by frequency would gain less than two
/// percent.
fn is_even(segment: &[u8]) -> bool {
    // Four tables: a counter that was just written cannot be read at once.
    let mut counts = [[0_u32; 256]; 4];
    let mut counted = 0;
    for part in segment.chunks(COUNTED) {
        let part = &part[..part.len().min(COUNTED / 4)];
        counted += part.len() as u64;
        for four in part.chunks(4) {
            for (table, byte) in counts.iter_mut().zip(four) {
                table[usize::from(*byte)] += 1;
            }
        }
    }
    let [a, b, c, d] = counts;
    let pairs: u64 = (0..256)
        .map(|byte| u64::from(a[byte] + b[byte] + c[byte] + d[byte]))
        .map(|count| count * count)
        .sum();
    // Among evenly spread bytes one pair in 256 is of the same value; a sixteenth more is let pass.
    (pairs - counted) * 256 * 16 <= counted * counted * 17
}

/// Whether more than one in 64 of the sampled sequences of four bytes occurred before.
fn repeats(segment: &[u8]) -> bool {
    let mut seen = [0_u32; 1 << TABLE_BITS];
    let (mut sampled, mut again) = (0_usize, 0_usize);
    for four in segment.windows(4) {
        let value = u32::from_le_bytes([four[0], four[1], four[2], four[3]]);
        let hash = value.wrapping_mul(0x9e37_79b1);
        // The bytes decide whether they are looked at: wherever they come again, they are again.
        if !hash.is_multiple_of(SAMPLED) {
            continue;
        }
        sampled += 1;
        let place = &mut seen[(hash >> (32 - TABLE_BITS)) as usize];
        again += usize::from(*place == value);
        *place = value;
    }
    again * 64 > sampled
}

#[cfg(test)]
mod tests {
    use super::{LEAST, SEGMENT, is_dense, runs};

    fn noise(length: usize) -> Vec<u8> {
        let mut state = 0x2545_f491_4f6c_dd1d_u64;
        (0..length)
            .map(|_| {
                state ^= state << 13;
                state ^= state >> 7;
                state ^= state << 17;
                (state >> 32).to_le_bytes()[0]
            })
            .collect()
    }

    #[test]
    fn noise_is_dense_and_words_are_not() {
        assert!(is_dense(&noise(SEGMENT)));
        assert!(is_dense(&noise(LEAST)));
        assert!(!is_dense(&noise(LEAST - 1)), "too little to tell");
        let words = b"the quick brown fox jumps over the lazy dog ".repeat(1500);
        assert!(!is_dense(&words[..SEGMENT]));
        assert!(!is_dense(&vec![0; SEGMENT]));
    }

    #[test]
    fn noise_of_fewer_values_is_not_dense() {
        let mut bytes = noise(SEGMENT);
        for byte in &mut bytes {
            *byte &= 0x7f;
        }
        assert!(!is_dense(&bytes));
    }

    #[test]
    fn noise_that_comes_again_is_not_dense() {
        let mut bytes = noise(SEGMENT);
        bytes.copy_within(0..500, 31_003);
        assert!(is_dense(&bytes), "little is to be gained");
        bytes.copy_within(0..20_000, 31_003);
        assert!(!is_dense(&bytes));
    }

    #[test]
    fn runs_cover_the_block_and_alternate() {
        let mut block = vec![b'a'; SEGMENT];
        block.extend(noise(3 * SEGMENT));
        block.extend(vec![b'b'; SEGMENT + 1]);
        let expected = vec![
            (false, 0..SEGMENT),
            (true, SEGMENT..4 * SEGMENT),
            (false, 4 * SEGMENT..block.len()),
        ];
        assert_eq!(runs(&block), expected);
        assert_eq!(runs(&[]), vec![]);
    }
}

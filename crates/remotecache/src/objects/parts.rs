//! A blob's bytes in parts of one size: what is uploaded at once can be sent again from memory.

use bytes::{Bytes, BytesMut};
use futures_util::stream::StreamExt;
use oci::{Descriptor, Digest};
use registry::{BlobSource, ByteStream};

use super::http::ObjectError;

const MIB: u64 = 1 << 20;
/// Parts of objects that are not so large that there would be too many of them.
const PART_BYTES: u64 = 16 * MIB;

/// Reads a source in parts.
pub(super) struct Parts {
    stream: ByteStream,
    held: BytesMut,
    digest: Digest,
    expected: u64,
    taken: u64,
    part: usize,
}

impl Parts {
    /// Opens a source. There will be at most `most` parts.
    pub fn new(source: &dyn BlobSource, blob: &Descriptor, most: u64) -> Self {
        let needed = blob.size.div_ceil(most.max(1)).div_ceil(MIB) * MIB;
        Self {
            stream: source.open(0),
            held: BytesMut::new(),
            digest: blob.digest,
            expected: blob.size,
            taken: 0,
            part: usize::try_from(needed.max(PART_BYTES)).unwrap_or(usize::MAX),
        }
    }

    /// Whether the whole blob is one part.
    pub fn is_single(&self) -> bool {
        usize::try_from(self.expected).is_ok_and(|size| size <= self.part)
    }

    /// The next part; empty at the end.
    ///
    /// # Errors
    /// [`ObjectError::Source`] when the bytes cannot be read, or are more or fewer than they should be.
    pub async fn next(&mut self) -> Result<Bytes, ObjectError> {
        while self.held.len() < self.part {
            match self.stream.next().await {
                Some(Ok(chunk)) => self.held.extend_from_slice(&chunk),
                Some(Err(source)) => return Err(self.unreadable(source)),
                None => break,
            }
        }
        let part = self.held.split_to(self.part.min(self.held.len())).freeze();
        self.taken += u64::try_from(part.len()).unwrap_or(u64::MAX);
        if self.taken > self.expected || part.is_empty() && self.taken < self.expected {
            let text = format!("{} bytes instead of {}", self.taken, self.expected);
            return Err(self.unreadable(std::io::Error::other(text)));
        }
        Ok(part)
    }

    fn unreadable(&self, source: std::io::Error) -> ObjectError {
        ObjectError::Source {
            digest: self.digest,
            source,
        }
    }
}

#[cfg(test)]
mod tests {
    use registry::BytesSource;

    use super::super::blob_of;
    use super::*;

    #[tokio::test]
    async fn parts_are_of_one_size() {
        let bytes = vec![7; usize::try_from(PART_BYTES).unwrap() + 3];
        let source = BytesSource(bytes.clone().into());
        let mut parts = Parts::new(&source, &blob_of(&bytes), 100);
        assert!(!parts.is_single());
        let mut sizes = Vec::new();
        loop {
            let part = parts.next().await.unwrap();
            sizes.push(part.len());
            if part.is_empty() {
                break;
            }
        }
        assert_eq!(sizes, [bytes.len() - 3, 3, 0]);
        // As few as asked for.
        assert!(Parts::new(&source, &blob_of(&bytes), 1).is_single());
    }

    #[tokio::test]
    async fn other_bytes_than_promised_are_refused() {
        for promised in [2, 4] {
            let mut blob = blob_of(b"abc");
            blob.size = promised;
            let mut parts = Parts::new(&BytesSource("abc".into()), &blob, 100);
            let mut read = parts.next().await;
            if read.is_ok() {
                read = parts.next().await;
            }
            assert!(matches!(read, Err(ObjectError::Source { .. })), "{promised}");
        }
    }
}

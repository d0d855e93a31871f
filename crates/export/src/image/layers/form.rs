//! What a layer's blob is packed as, and what is in it.

use std::io::{BufReader, Read, Seek, SeekFrom};

use build::blocking::internal;
use build::error::BuildError;
use cache::Store;
use layer::compress::estargz::{self, Table, find, keep_annotations};
use layer::compress::{Compression, decompress};
use oci::{Descriptor, Digest, Digester, media_type};

/// A blob and what it is packed as.
pub(super) struct Form {
    /// The blob, with annotations only if they belong to what it is packed as.
    pub(super) blob: Descriptor,
    /// `None` where its media type says nothing.
    pub(super) compression: Option<Compression>,
    /// The table of a blob that is here and has one.
    table: Option<Table>,
}

impl Form {
    /// Looks at a blob's media type and, as that does not tell eStargz, at its end. What a blob that is not here is said to
    /// be is believed.
    pub(super) fn of(store: &Store, mut blob: Descriptor) -> Result<Self, BuildError> {
        let mut compression = compression_of(&blob);
        let is_here = store.content().exists(&blob.digest).map_err(internal)?;
        let table = if is_here {
            table_of(store, &blob.digest)?
        } else {
            None
        };
        if let Some(Compression::Gzip | Compression::Estargz) = compression
            && is_here
        {
            compression = Some(Compression::Gzip);
            if let Some(table) = table {
                compression = Some(Compression::Estargz);
                let digest = table.digest.to_string();
                blob.annotations.insert(estargz::TABLE_DIGEST.to_owned(), digest);
            }
        }
        if compression == Some(Compression::Estargz) {
            keep_annotations(&mut blob.annotations);
        } else {
            blob.annotations.clear();
        }
        Ok(Self {
            blob,
            compression,
            table,
        })
    }
}

/// A layer's compression by its descriptor; `None` for one that says nothing.
pub(super) fn compression_of(descriptor: &Descriptor) -> Option<Compression> {
    match media_type::to_oci(&descriptor.media_type) {
        media_type::OCI_LAYER | media_type::OCI_FOREIGN_LAYER => Some(Compression::Uncompressed),
        media_type::OCI_LAYER_GZIP | media_type::OCI_FOREIGN_LAYER_GZIP => {
            if descriptor.annotations.contains_key(estargz::TABLE_DIGEST) {
                Some(Compression::Estargz)
            } else {
                Some(Compression::Gzip)
            }
        }
        media_type::OCI_LAYER_ZSTD | media_type::OCI_FOREIGN_LAYER_ZSTD => Some(Compression::Zstd),
        _ => None,
    }
}

fn table_of(store: &Store, blob: &Digest) -> Result<Option<Table>, BuildError> {
    let blob = store.content().reader(blob).map_err(internal)?;
    find(blob.len(), |buf, offset| blob.read_exact_at(buf, offset)).map_err(internal)
}

/// A blob to be packed in another way.
pub(super) struct Plain<'a> {
    store: &'a Store,
    blob: Digest,
    table: Option<Table>,
}

impl<'a> Plain<'a> {
    /// Checks that a blob that is here is what it was when it was stored: what is made of damaged bytes would have a digest
    /// that vouches for them.
    pub(super) fn open(store: &'a Store, form: &Form) -> Result<Self, BuildError> {
        let blob = form.blob.digest;
        store.content().verify(&blob).map_err(internal)?;
        let table = form.table;
        Ok(Self { store, blob, table })
    }

    /// Reads the layer, without what eStargz added to it.
    pub(super) fn layer(&self) -> Result<impl Read + use<>, BuildError> {
        self.read(0, self.table.map_or(u64::MAX, |table| table.offset))
    }

    /// Copies the layer to `out`. Returns the digest of all that is in the blob, added or not: the diffID of this blob.
    pub(super) fn copy(&self, out: &mut impl std::io::Write) -> Result<Digest, BuildError> {
        let mut digester = Digester::sha256();
        let mut layer = Tee {
            input: self.layer()?,
            digester: &mut digester,
        };
        std::io::copy(&mut layer, out).map_err(internal)?;
        if let Some(table) = self.table {
            let mut added = self.read(table.offset, u64::MAX)?;
            std::io::copy(&mut added, &mut digester).map_err(internal)?;
        }
        Ok(digester.finish())
    }

    fn read(&self, from: u64, length: u64) -> Result<impl Read + use<>, BuildError> {
        let blob = self.store.content().reader(&self.blob).map_err(internal)?;
        let mut reader = blob.into_reader();
        reader.seek(SeekFrom::Start(from)).map_err(internal)?;
        let reader = BufReader::with_capacity(1 << 20, reader.take(length));
        let (_, plain) = decompress(reader).map_err(internal)?;
        Ok(plain)
    }
}

/// Digests what is read through it.
struct Tee<'a, R> {
    input: R,
    digester: &'a mut Digester,
}

impl<R: Read> Read for Tee<'_, R> {
    fn read(&mut self, buf: &mut [u8]) -> std::io::Result<usize> {
        let count = self.input.read(buf)?;
        self.digester.update(&buf[..count]);
        Ok(count)
    }
}

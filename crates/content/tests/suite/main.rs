//! The blob store's contract.
#![expect(clippy::unwrap_used, reason = "a failing test says where")]

use std::fs;
use std::io::{Read, Seek, SeekFrom, Write};
use std::path::Path;
use std::time::Duration;

use content::{Durability, Store, StoreError, VerifyError, WriteError};
use oci::{Algorithm, Descriptor, Digest};

fn store() -> (tempfile::TempDir, Store) {
    let dir = tempfile::tempdir().unwrap();
    let store = Store::open(dir.path()).unwrap();
    (dir, store)
}

fn describe(bytes: &[u8]) -> Descriptor {
    Descriptor::of_bytes("application/octet-stream", bytes)
}

fn read(store: &Store, digest: &Digest) -> Vec<u8> {
    store.reader(digest).unwrap().read_all(1 << 20).unwrap()
}

fn walk(store: &Store) -> Vec<(Digest, u64)> {
    let mut found = Vec::new();
    store
        .walk(|stat| {
            found.push((stat.digest, stat.size_bytes));
            Ok::<_, StoreError>(())
        })
        .unwrap();
    found.sort();
    found
}

#[test]
fn a_blob_is_invisible_until_it_is_proven() {
    let (dir, store) = store();
    let descriptor = describe(b"hello");
    let mut writer = store.writer("ref", Some(&descriptor)).unwrap();
    writer.write_all(b"hel").unwrap();
    assert!(!store.exists(&descriptor.digest).unwrap());
    assert!(store.reader(&descriptor.digest).unwrap_err().is_not_found());
    writer.write_all(b"lo").unwrap();
    assert!(walk(&store).is_empty());
    assert_eq!(writer.commit().unwrap(), descriptor.digest);
    assert_eq!(read(&store, &descriptor.digest), b"hello");
    assert_eq!(walk(&store), [(descriptor.digest, 5)]);
    assert_eq!(store.info(&descriptor.digest).unwrap().unwrap().size_bytes, 5);
    assert!(store.ingests().unwrap().is_empty());
    assert!(
        dir.path()
            .join("blobs/sha256")
            .join(descriptor.digest.hex())
            .is_file()
    );
    // Committing the same again is no failure and leaves nothing.
    let mut writer = store.writer("again", None).unwrap();
    writer.write_all(b"hello").unwrap();
    writer.commit().unwrap();
    assert!(store.ingests().unwrap().is_empty());
}

#[test]
fn wrong_bytes_never_become_a_blob() {
    let (_dir, store) = store();
    let descriptor = describe(b"hello");
    let mut writer = store.writer("ref", Some(&descriptor)).unwrap();
    writer.write_all(b"jello").unwrap();
    assert!(matches!(writer.commit(), Err(WriteError::DigestMismatch { .. })));
    assert!(store.ingests().unwrap().is_empty(), "there is nothing to resume");
    let mut writer = store.writer("ref", Some(&descriptor)).unwrap();
    writer.write_all(b"hell").unwrap();
    assert!(matches!(
        writer.commit(),
        Err(WriteError::SizeMismatch {
            expected: 5,
            actual: 4,
            ..
        })
    ));
    let mut writer = store.writer("ref", Some(&descriptor)).unwrap();
    assert_eq!(writer.offset(), 4, "what was too short can be resumed");
    assert!(
        writer.write_all(b"o and more").is_err(),
        "no more than announced is taken"
    );
    writer.write_all(b"o").unwrap();
    writer.commit().unwrap();
    assert!(store.exists(&descriptor.digest).unwrap());
}

#[test]
fn an_ingest_is_resumed_also_by_another_process() {
    let (dir, store) = store();
    let descriptor = describe(b"hello world");
    let mut writer = store.writer("layer/with:odd\nkey", Some(&descriptor)).unwrap();
    writer.write_all(b"hello ").unwrap();
    assert!(matches!(
        store.writer("layer/with:odd\nkey", None),
        Err(WriteError::Busy { .. })
    ));
    drop(writer);
    let listed = store.ingests().unwrap();
    assert_eq!(
        (listed[0].ref_key.as_str(), listed[0].offset_bytes),
        ("layer/with:odd\nkey", 6)
    );
    drop(store);
    let store = Store::open(dir.path()).unwrap();
    let mut writer = store.writer("layer/with:odd\nkey", Some(&descriptor)).unwrap();
    assert_eq!(writer.offset(), 6);
    writer.write_all(b"world").unwrap();
    writer.commit().unwrap();
    assert_eq!(read(&store, &descriptor.digest), b"hello world");
}

#[test]
fn an_ingest_can_start_over_or_be_given_up() {
    let (_dir, store) = store();
    let mut writer = store.writer("ref", None).unwrap();
    writer.write_all(b"wrong").unwrap();
    writer.restart().unwrap();
    assert_eq!(writer.offset(), 0);
    writer.write_all(b"ok").unwrap();
    assert_eq!(writer.commit().unwrap(), Digest::sha256(b"ok"));
    let mut writer = store.writer("ref", None).unwrap();
    writer.write_all(b"no").unwrap();
    writer.discard().unwrap();
    assert_eq!(store.writer("ref", None).unwrap().offset(), 0);
}

#[test]
fn stale_ingests_are_swept_but_not_those_being_written() {
    let (_dir, store) = store();
    drop(store.writer("old", None).unwrap());
    let held = store.writer("held", None).unwrap();
    assert_eq!(store.sweep_ingests(Duration::from_secs(3600)).unwrap(), 0);
    assert_eq!(store.sweep_ingests(Duration::ZERO).unwrap(), 1);
    assert_eq!(store.ingests().unwrap().len(), 1);
    drop(held);
    assert_eq!(store.sweep_ingests(Duration::ZERO).unwrap(), 1);
}

#[test]
fn deferred_blobs_are_readable_at_once_and_durable_after_sync() {
    let (dir, store) = store();
    let blobs: Vec<Digest> = (0..60_u8)
        .map(|index| store.put(&[index; 100], Durability::Deferred).unwrap())
        .collect();
    let lost = store.put(b"lost", Durability::Deferred).unwrap();
    for digest in &blobs {
        assert_eq!(read(&store, digest).len(), 100);
    }
    assert_eq!(walk(&store).len(), 61);
    assert!(store.delete(&lost).unwrap());
    store.sync().unwrap();
    store.sync().unwrap();
    let lost = store.put(b"lost", Durability::Deferred).unwrap();
    drop(store);
    let store = Store::open(dir.path()).unwrap();
    assert_eq!(walk(&store).len(), 60);
    assert!(
        !store.exists(&lost).unwrap(),
        "what was not flushed is gone, not half there"
    );
    // Immediate after deferred is immediate.
    let digest = store.put(b"both", Durability::Deferred).unwrap();
    store.put(b"both", Durability::Immediate).unwrap();
    drop(store);
    assert!(Store::open(dir.path()).unwrap().exists(&digest).unwrap());
}

#[test]
fn readers_keep_their_bytes_when_the_blob_goes() {
    let (_dir, store) = store();
    let digest = store.put(b"0123456789", Durability::Immediate).unwrap();
    let blob = store.reader(&digest).unwrap();
    assert!(store.delete(&digest).unwrap());
    assert!(!store.delete(&digest).unwrap());
    assert!(store.reader(&digest).unwrap_err().is_not_found());
    let mut buf = [0; 3];
    blob.read_exact_at(&mut buf, 4).unwrap();
    assert_eq!(&buf, b"456");
    assert!(blob.read_exact_at(&mut buf, 9).is_err());
    assert!(blob.read_all(5).is_err());
    let mut reader = blob.into_reader();
    reader.seek(SeekFrom::End(-2)).unwrap();
    let mut rest = String::new();
    reader.read_to_string(&mut rest).unwrap();
    assert_eq!(rest, "89");
    assert!(reader.seek(SeekFrom::Current(-100)).is_err());
}

#[test]
fn corruption_is_found() {
    let (dir, store) = store();
    let digest = store.put(b"good", Durability::Immediate).unwrap();
    store.verify(&digest).unwrap();
    fs::write(dir.path().join("blobs/sha256").join(digest.hex()), b"evil").unwrap();
    match store.verify(&digest) {
        Err(VerifyError::Corrupt { actual, .. }) => assert_eq!(*actual, Digest::sha256(b"evil")),
        other => panic!("{other:?}"),
    }
    store.delete(&digest).unwrap();
    assert!(matches!(
        store.verify(&digest),
        Err(VerifyError::Store(StoreError::NotFound { .. }))
    ));
}

#[test]
fn other_algorithms_and_foreign_files() {
    let (dir, store) = store();
    let digest = Digest::of(Algorithm::Sha512, b"long");
    let descriptor = Descriptor::new("x/y", digest, 4);
    let mut writer = store.writer("ref", Some(&descriptor)).unwrap();
    writer.write_all(b"long").unwrap();
    assert_eq!(writer.commit().unwrap(), digest);
    fs::write(dir.path().join("blobs/sha256/README"), "not a blob").unwrap();
    assert_eq!(walk(&store), [(digest, 4)]);
    store.verify(&digest).unwrap();
}

#[test]
fn many_threads_may_put_the_same_bytes() {
    let (_dir, store) = store();
    std::thread::scope(|scope| {
        for index in 0..8 {
            let store = store.clone();
            scope.spawn(move || {
                let durability = if index % 2 == 0 {
                    Durability::Deferred
                } else {
                    Durability::Immediate
                };
                for round in 0..20_u8 {
                    store.put(&[round; 64], durability).unwrap();
                    if index == 0 {
                        store.sync().unwrap();
                    }
                }
            });
        }
    });
    store.sync().unwrap();
    assert_eq!(walk(&store).len(), 20);
    let pending = Path::new("pending");
    assert!(fs::read_dir(_dir.path().join(pending)).unwrap().next().is_none());
}

#[test]
fn a_verified_reader_ends_only_with_the_right_bytes() {
    let (dir, store) = store();
    let digest = store.put(b"right", Durability::Immediate).unwrap();
    let mut bytes = Vec::new();
    let open = || store.reader(&digest).unwrap().into_verified_reader();
    assert_eq!(open().read_to_end(&mut bytes).unwrap(), 5);
    fs::write(dir.path().join("blobs/sha256").join(digest.hex()), "wrong").unwrap();
    let error = open().read_to_end(&mut bytes).unwrap_err();
    let source = error
        .get_ref()
        .and_then(|error| error.downcast_ref::<VerifyError>());
    assert!(matches!(source, Some(VerifyError::Corrupt { .. })), "{error}");
}

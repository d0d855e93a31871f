//! Solver records.

use std::time::{Duration, SystemTime};

use cache::{Batch, CacheResult, Link, RecordDescription, RefId, Store, StoreError};
use oci::Digest;

use crate::fixture::*;

fn link(input: u32, op: &str) -> Link {
    Link {
        input,
        output: 0,
        digest: Digest::sha256(op),
        selector: None,
    }
}

fn result(id: &RefId) -> CacheResult {
    CacheResult {
        id: id.to_string(),
        refs: vec![id.clone()],
        created_at: SystemTime::UNIX_EPOCH + Duration::from_secs(7),
    }
}

fn id(name: &str) -> String {
    Digest::sha256(name).to_string()
}

fn add(store: &Store, fill: impl FnOnce(&mut Batch)) {
    let mut batch = Batch::new();
    fill(&mut batch);
    store.records().apply(batch).unwrap();
}

#[test]
fn links_are_walked_both_ways() {
    let dir = Dir::new();
    let store = dir.open();
    let records = store.records();
    let selected = Link {
        selector: Some(Digest::sha256("sel")),
        ..link(0, "op")
    };
    add(&store, |batch| {
        batch
            .link(id("p"), link(0, "op"), id("c1"))
            .link(id("p"), link(0, "op"), "plain text id")
            .link(id("p"), selected, id("c3"));
        batch.link(id("q"), link(1, "op"), id("c1"));
    });
    let mut children = records.children(&id("p"), &link(0, "op")).unwrap();
    children.sort();
    let mut expected = [id("c1"), "plain text id".to_owned()];
    expected.sort();
    assert_eq!(children, expected);
    assert_eq!(records.children(&id("p"), &selected).unwrap(), [id("c3")]);
    assert_eq!(
        records.children(&id("p"), &link(1, "op")).unwrap(),
        Vec::<String>::new()
    );
    assert!(records.has_link(&id("q"), &link(1, "op"), &id("c1")).unwrap());
    assert!(!records.has_link(&id("q"), &link(0, "op"), &id("c1")).unwrap());
    let mut parents: Vec<String> = records
        .backlinks(&id("c1"))
        .unwrap()
        .into_iter()
        .map(|(parent, _)| parent)
        .collect();
    parents.sort();
    let mut expected = [id("p"), id("q")];
    expected.sort();
    assert_eq!(parents, expected);
    assert_eq!(records.links(&id("q")).unwrap(), [(link(1, "op"), id("c1"))]);
    assert_eq!(records.list(None, 10).unwrap().len(), 2);
    assert_eq!(
        records
            .list(Some(&records.list(None, 1).unwrap()[0]), 10)
            .unwrap()
            .len(),
        1
    );
    assert!(records.exists(&id("p")).unwrap() && !records.exists(&id("c1")).unwrap());
}

#[test]
fn a_result_retains_its_ref_and_goes_with_it() {
    let dir = Dir::new();
    let store = dir.open();
    let records = store.records();
    let a = step(&store, None, "a");
    let reference = a.id().clone();
    add(&store, |batch| {
        batch
            .link(id("root"), link(0, "op"), id("k"))
            .result(id("k"), result(&reference));
        batch.describe(
            id("k"),
            RecordDescription {
                groups: vec!["g".into()],
                json: b"{}".to_vec(),
                listings: Vec::new(),
                created_at: SystemTime::now(),
            },
        );
    });
    assert_eq!(records.gone_since(&id("k")).unwrap(), None);
    drop(a);
    assert_eq!(records.results(&id("k")).unwrap(), [result(&reference)]);
    assert_eq!(
        records.load(&id("k"), reference.as_str()).unwrap(),
        Some(result(&reference))
    );
    assert_eq!(records.load(&id("k"), "other").unwrap(), None);
    assert_eq!(records.by_result(reference.as_str()).unwrap(), [id("k")]);
    assert_eq!(records.described("g", 5).unwrap().len(), 1);
    drop(store.get(&reference).unwrap());
    store
        .prune(&[cache::PruneOptions::default()], &mut |_| {
            std::ops::ControlFlow::Continue(())
        })
        .unwrap();
    assert_eq!(records.results(&id("k")).unwrap(), []);
    // The record led nowhere without it, and so did its parent.
    assert!(!records.exists(&id("k")).unwrap() && !records.exists(&id("root")).unwrap());
    assert_eq!(records.backlinks(&id("k")).unwrap(), []);
    assert_eq!(records.described("g", 5).unwrap(), []);
    assert!(records.gone_since(&id("k")).unwrap().is_some());
    assert_eq!(records.gone_since(&id("root")).unwrap(), None);
    assert_eq!(records.list(None, 10).unwrap(), Vec::<String>::new());
}

#[test]
fn a_result_of_a_ref_that_is_gone_is_left_out() {
    let dir = Dir::new();
    let store = dir.open();
    add(&store, |batch| {
        batch.result(id("k"), result(&"gone".parse().unwrap()));
        batch.result(
            id("s"),
            CacheResult {
                id: "scratch".into(),
                refs: vec![],
                created_at: SystemTime::UNIX_EPOCH,
            },
        );
    });
    assert!(!store.records().exists(&id("k")).unwrap());
    assert_eq!(store.records().results(&id("s")).unwrap().len(), 1);
    store.records().release("scratch").unwrap();
    assert!(!store.records().exists(&id("s")).unwrap());
}

#[test]
fn a_record_with_children_outlives_its_result() {
    let dir = Dir::new();
    let store = dir.open();
    let (a, b) = (step(&store, None, "a"), step(&store, None, "b"));
    add(&store, |batch| {
        batch
            .result(id("k"), result(a.id()))
            .link(id("k"), link(0, "op"), id("child"))
            .result(id("child"), result(b.id()));
    });
    store.records().release(a.id().as_str()).unwrap();
    assert_eq!(store.records().results(&id("k")).unwrap(), []);
    assert_eq!(
        store.records().children(&id("k"), &link(0, "op")).unwrap(),
        [id("child")]
    );
}

fn description(seconds: u64, text: &str, listings: &[&str]) -> RecordDescription {
    RecordDescription {
        groups: vec!["g".into(), "h".into()],
        json: text.into(),
        listings: listings
            .iter()
            .map(|listing| listing.as_bytes().to_vec())
            .collect(),
        created_at: SystemTime::UNIX_EPOCH + Duration::from_secs(seconds),
    }
}

#[test]
fn newest_descriptions_come_first_and_replace_older_ones() {
    let dir = Dir::new();
    let store = dir.open();
    add(&store, |batch| {
        batch
            .link(id("root"), link(0, "op"), id("a"))
            .link(id("root"), link(0, "op"), id("b"))
            .describe(id("a"), description(1, "1", &[]))
            .describe(id("b"), description(2, "2", &[]))
            .describe(id("a"), description(3, "3", &[]))
            .describe(id("unknown"), description(4, "4", &[]));
    });
    let records = store.records();
    for group in ["g", "h"] {
        let found = records.described(group, 9).unwrap();
        let texts: Vec<&[u8]> = found.iter().map(|found| &found.json[..]).collect();
        assert_eq!(texts, [b"3", b"2"]);
        assert_eq!(records.described(group, 1).unwrap().len(), 1);
    }
    let found = records.description(&id("b")).unwrap().unwrap();
    assert_eq!((&found.json[..], found.record), (&b"2"[..], id("b")));
    assert_eq!(records.description(&id("unknown")).unwrap(), None);
}

#[test]
fn a_listing_is_kept_once_and_as_long_as_a_description_names_it() {
    let dir = Dir::new();
    let store = dir.open();
    let records = store.records();
    let (a, b) = (step(&store, None, "a"), step(&store, None, "b"));
    let (shared, own) = (Digest::sha256("shared"), Digest::sha256("own"));
    add(&store, |batch| {
        batch
            .result(id("a"), result(a.id()))
            .result(id("b"), result(b.id()))
            .describe(id("a"), description(1, "1", &["shared", "own"]))
            .describe(id("b"), description(2, "2", &["shared"]));
    });
    let listing = |digest| records.listing(digest).unwrap();
    assert_eq!(listing(&shared).as_deref(), Some(&b"shared"[..]));
    assert_eq!(listing(&own).as_deref(), Some(&b"own"[..]));
    records.release(a.id().as_str()).unwrap();
    assert_eq!(listing(&own), None);
    assert!(listing(&shared).is_some() && records.gone_since(&id("a")).unwrap().is_some());
    records.release(b.id().as_str()).unwrap();
    assert_eq!(listing(&shared), None);

    // What is made again is not gone any more, and what is described too late is not described.
    let again = step(&store, None, "again");
    add(&store, |batch| {
        batch
            .result(id("a"), result(again.id()))
            .describe(id("a"), description(3, "3", &[]));
    });
    assert_eq!(records.gone_since(&id("a")).unwrap(), None);
    let mut late = Batch::new();
    late.describe(id("b"), description(4, "4", &["late"]));
    records.apply_later(late).unwrap();
    add(&store, |batch| {
        batch.link(id("x"), link(0, "op"), id("y"));
    });
    assert_eq!(records.description(&id("b")).unwrap(), None);
    assert_eq!(listing(&Digest::sha256("late")), None);
}

#[test]
fn ids_no_key_can_hold_are_refused() {
    let dir = Dir::new();
    let store = dir.open();
    for bad in [String::new(), "a\0b".into(), "x".repeat(513)] {
        let mut batch = Batch::new();
        batch.link(bad, link(0, "op"), id("c"));
        assert!(matches!(
            store.records().apply(batch),
            Err(StoreError::InvalidRecordId { .. })
        ));
    }
}

#[test]
fn records_survive_a_restart() {
    let dir = Dir::new();
    let store = dir.open();
    let a = step(&store, None, "a");
    let reference = a.id().clone();
    add(&store, |batch| {
        batch.result(id("k"), result(&reference));
    });
    drop((a, store));
    let store = dir.open();
    assert_eq!(store.records().results(&id("k")).unwrap(), [result(&reference)]);
    assert_eq!(read(&store.get(&reference).unwrap(), "a").as_deref(), Some("a"));
}

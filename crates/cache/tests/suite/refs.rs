//! Making, holding, sharing and losing refs.

use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

use cache::{
    ImmutableRef, LayerBlob, OpenError, RecordType, RefOptions, StoreError, StoreOptions, UsageOptions,
};
use layer::Stop;
use oci::Digest;

use crate::fixture::*;

#[test]
fn nobody_else_may_enter() {
    use std::os::unix::fs::PermissionsExt;
    let dir = Dir::new();
    let mode = |name: &str| {
        std::fs::metadata(dir.path().join(name))
            .unwrap()
            .permissions()
            .mode()
            & 0o777
    };
    drop(dir.open());
    // As an earlier version may have left it.
    std::fs::set_permissions(dir.path().join("content"), std::fs::Permissions::from_mode(0o777)).unwrap();
    drop(dir.open());
    for name in ["content", "snapshots", "writing"] {
        assert_eq!(mode(name), 0o700, "{name}");
    }
    assert_eq!((mode("lock"), mode("metadata.redb")), (0o600, 0o600));
}

#[test]
fn a_chain_of_steps_sees_what_is_below() {
    let dir = Dir::new();
    let store = dir.open();
    let a = step(&store, None, "a");
    let b = step(&store, Some(&a), "b");
    assert_eq!(read(&b, "a").as_deref(), Some("a"));
    assert_eq!(read(&b, "b").as_deref(), Some("b"));
    assert_eq!(read(&a, "b"), None);
    assert_eq!(b.parents()[0].id(), a.id());
    assert_eq!(
        b.layer_chain()
            .iter()
            .map(|layer| layer.id().clone())
            .collect::<Vec<_>>(),
        [a.id().clone(), b.id().clone()]
    );
    assert!(!b.is_lazy() && b.missing_blobs().unwrap().is_empty());
}

#[test]
fn an_unretained_step_goes_with_its_last_handle() {
    let dir = Dir::new();
    let store = dir.open();
    let a = step(&store, None, "a");
    let id = a.id().clone();
    let clone = a.clone();
    assert_eq!(read(&clone, "a").as_deref(), Some("a"));
    drop(a);
    assert_eq!(read(&clone, "a").as_deref(), Some("a"));
    drop(clone);
    assert!(store.get(&id).unwrap_err().is_not_found());
    assert_eq!(listed(&store), Vec::<String>::new());
    store.flush().unwrap();
    store
        .prune(&[], &mut |_| std::ops::ControlFlow::Continue(()))
        .unwrap();
    assert_eq!(store.snapshotter().list(), []);
}

#[test]
fn a_mutable_ref_is_one_writers_alone() {
    let dir = Dir::new();
    let store = dir.open();
    let cache = store
        .create_mutable(
            None,
            RefOptions {
                record_type: RecordType::ExecCacheMount,
                ..retained("c")
            },
        )
        .unwrap();
    cache.set_index("mount:/root/.cache").unwrap();
    write(&cache, "f", "1");
    let id = cache.id().clone();
    assert!(matches!(store.get_mutable(&id), Err(StoreError::Locked { .. })));
    assert!(matches!(store.get(&id), Err(StoreError::Locked { .. })));
    drop(cache);
    assert_eq!(
        store.search_index("mount:/root/.cache").unwrap(),
        std::slice::from_ref(&id)
    );
    let cache = store.get_mutable(&id).unwrap();
    assert!(dir.path().join("writing").read_dir().unwrap().count() == 1);
    drop(cache);
    assert_eq!(store.search_index("other").unwrap(), []);
}

#[test]
fn a_committed_source_is_taken_back_for_writing() {
    let dir = Dir::new();
    let store = dir.open();
    let source = store.create_mutable(None, retained("context")).unwrap();
    source.set_index("context").unwrap();
    source.set_metadata("manifest", Some(b"m")).unwrap();
    write(&source, "f", "1");
    let id = source.id().clone();
    let first = source.commit().unwrap();
    first.set_checksums(b"tree").unwrap();
    assert_eq!(read(&first, "f").as_deref(), Some("1"));
    // Held: another build has to make its own.
    assert!(matches!(store.get_mutable(&id), Err(StoreError::Locked { .. })));
    let first_id = first.id().clone();
    drop(first);
    assert_eq!(store.get(&id).unwrap().id(), &first_id);
    let again = store.get_mutable(&id).unwrap();
    assert_eq!(again.take_checksums().as_deref(), Some(&b"tree"[..]));
    assert_eq!(again.take_checksums(), None);
    assert_eq!(again.metadata("manifest").unwrap().as_deref(), Some(&b"m"[..]));
    assert!(store.get(&first_id).unwrap_err().is_not_found());
    write(&again, "f", "2");
    let second = again.commit().unwrap();
    assert_eq!(read(&second, "f").as_deref(), Some("2"));
    // A child needs it to stay as it is.
    let child = step(&store, Some(&second), "child");
    assert!(store.get_mutable(&id).unwrap_err().is_not_found());
    assert_eq!(read(&child, "f").as_deref(), Some("2"));
}

#[test]
fn who_lies_about_a_blobs_size_spoils_no_other_chain() {
    let dir = Dir::new();
    let store = dir.open();
    let (base, top) = (tar_layer("a", "1"), tar_layer("b", "2"));
    let honest = [layer_blob(&base, &["one"]), layer_blob(&top, &["one"])];
    let mut lying = honest.clone();
    lying[0].descriptor.size -= 1;
    let make = |layers: &[LayerBlob]| {
        let image = store.from_blob_chain(layers, &described("image")).unwrap();
        image.unwrap()
    };
    let liar = make(&lying);
    let image = make(&honest);
    assert_ne!(liar.id(), image.id());
    let missing = image.missing_blobs().unwrap();
    let sizes = missing.iter().map(|blob| blob.descriptor.size);
    let expected = honest.iter().map(|layer| layer.descriptor.size);
    assert!(sizes.eq(expected), "{missing:?}");
    assert_eq!(make(&honest).id(), image.id());
    assert_eq!(make(&lying).id(), liar.id());
}

#[test]
fn blob_chains_are_lazy_and_shared() {
    let dir = Dir::new();
    let store = dir.open();
    let (base, top) = (tar_layer("a", "1"), tar_layer("b", "2"));
    let layers = [layer_blob(&base, &["one"]), layer_blob(&top, &["one"])];
    let image = store
        .from_blob_chain(&layers, &described("image"))
        .unwrap()
        .unwrap();
    assert!(image.is_lazy() && image.is_blob_lazy());
    let missing = image.missing_blobs().unwrap();
    assert_eq!(
        missing
            .iter()
            .map(|blob| blob.descriptor.clone())
            .collect::<Vec<_>>(),
        [layers[0].descriptor.clone(), layers[1].descriptor.clone()]
    );
    assert!(matches!(image.unpack(), Err(StoreError::Lazy { digests, .. }) if digests.len() == 2));
    assert!(matches!(
        store.create_mutable(Some(&image), described("x")),
        Err(StoreError::Lazy { .. })
    ));

    let again = store
        .from_blob_chain(
            &[layer_blob(&base, &["two"]), layer_blob(&top, &["one"])],
            &described("image"),
        )
        .unwrap()
        .unwrap();
    assert_eq!(again.id(), image.id());
    assert_eq!(
        again.parents()[0].providers(&layers[0].descriptor.digest),
        [provider("two"), provider("one")]
    );

    let pin = store.pin(&[layers[0].descriptor.digest, layers[1].descriptor.digest]);
    put(&store, &base);
    put(&store, &top);
    image.unpack().unwrap();
    drop(pin);
    assert!(!image.is_lazy());
    assert_eq!(
        (read(&image, "a").as_deref(), read(&image, "b").as_deref()),
        (Some("1"), Some("2"))
    );
    assert_eq!(
        image.chain_id(),
        oci::chain_id(&[layers[0].diff_id, layers[1].diff_id])
    );
    assert!(
        store
            .from_blob_chain(&[], &RefOptions::default())
            .unwrap()
            .is_none()
    );

    // Another compression of the same layer is another ref on the same tree.
    let mut other = layer_blob(&base, &["three"]);
    other.descriptor.digest = Digest::sha256(b"compressed otherwise");
    let other = store
        .from_blob_chain(&[other], &described("other"))
        .unwrap()
        .unwrap();
    assert_ne!(other.id(), image.parents()[0].id());
    assert!(!other.is_lazy() && other.is_blob_lazy());
    assert_eq!(read(&other, "a").as_deref(), Some("1"));
}

#[test]
fn a_layer_that_is_not_what_was_promised_is_refused() {
    let dir = Dir::new();
    let store = dir.open();
    let tar = tar_layer("a", "1");
    let mut layer = layer_blob(&tar, &[]);
    layer.diff_id = Digest::sha256(b"other");
    let image = store
        .from_blob_chain(&[layer], &described("image"))
        .unwrap()
        .unwrap();
    put(&store, &tar);
    assert!(matches!(image.unpack(), Err(StoreError::WrongDiffId { .. })));
    assert!(image.is_lazy());
    assert_eq!(store.snapshotter().list(), []);
}

#[test]
fn a_blob_of_another_kind_is_no_layer() {
    let dir = Dir::new();
    let store = dir.open();
    for kind in [
        "",
        "application/octet-stream",
        "application/vnd.example.layer.v1.tar",
    ] {
        let tar = tar_layer("a", kind);
        put(&store, &tar);
        let mut layer = layer_blob(&tar, &[]);
        layer.descriptor.media_type = kind.to_owned();
        let image = store
            .from_blob_chain(&[layer], &described("image"))
            .unwrap()
            .unwrap();
        let error = image.unpack().unwrap_err();
        let reason = std::error::Error::source(&error).unwrap().to_string();
        assert_eq!(
            reason,
            format!("failed to get stream processor for {kind}: no processor for media-type")
        );
        assert!(image.is_lazy());
        // It does not spoil an image that says what the blob is.
        let honest = store
            .from_blob_chain(&[layer_blob(&tar, &[])], &described("image"))
            .unwrap()
            .unwrap();
        honest.unpack().unwrap();
        assert_eq!(read(&honest, "a").as_deref(), Some(kind));
    }
}

#[test]
fn a_layer_that_nobody_wants_any_more_is_given_up() {
    let dir = Dir::new();
    let store = dir.open();
    let tars = [tar_layer("a", "1"), tar_layer("b", &"2".repeat(8 << 20))];
    let layers = tars.each_ref().map(|tar| layer_blob(tar, &[]));
    let image = store
        .from_blob_chain(&layers, &described("image"))
        .unwrap()
        .unwrap();
    for tar in &tars {
        put(&store, tar);
    }
    let asked = Arc::new(AtomicUsize::new(0));
    let stop = {
        let asked = Arc::clone(&asked);
        // In the midst of the second layer: about the first one it is asked a few times only.
        Stop::when(move || asked.fetch_add(1, Ordering::Relaxed) > 20)
    };
    assert!(matches!(
        image.unpack_until(&stop),
        Err(StoreError::Unwanted { .. })
    ));
    assert!(image.is_lazy() && !image.parents()[0].is_lazy());
    assert_eq!(store.snapshotter().list().len(), 1);
    let at_once = Stop::when(|| true);
    assert!(matches!(
        image.unpack_until(&at_once),
        Err(StoreError::Unwanted { .. })
    ));
    image.unpack().unwrap();
    assert_eq!(read(&image, "a").as_deref(), Some("1"));
    assert!(!image.is_lazy());
}

#[test]
fn a_ref_without_bytes_or_providers_is_a_miss() {
    let dir = Dir::new();
    let store = dir.open();
    let tar = tar_layer("a", "1");
    let digest = put(&store, &tar);
    let image = store
        .from_blob_chain(&[layer_blob(&tar, &[])], &described("image"))
        .unwrap()
        .unwrap();
    let id = image.id().clone();
    drop(image);
    store.get(&id).unwrap();
    store.content().delete(&digest).unwrap();
    assert!(store.get(&id).unwrap_err().is_not_found());
    assert_eq!(listed(&store), Vec::<String>::new());
}

#[test]
fn exported_blobs_are_remembered_and_found() {
    let dir = Dir::new();
    let store = dir.open();
    let a = step(&store, None, "a");
    let b = step(&store, Some(&a), "b");
    let blobs = [tar_layer("a", "a"), tar_layer("b", "b")];
    let layers = [layer_blob(&blobs[0], &[]), layer_blob(&blobs[1], &[])];
    assert!(matches!(
        a.set_blob(layers[0].diff_id, layers[0].descriptor.clone(), vec![], true),
        Err(StoreError::Invalid { .. })
    ));
    for (reference, (blob, layer)) in [&a, &b].into_iter().zip(blobs.iter().zip(&layers)) {
        let pin = store.pin(&[layer.descriptor.digest]);
        put(&store, blob);
        reference
            .set_blob(layer.diff_id, layer.descriptor.clone(), vec![], true)
            .unwrap();
        drop(pin);
    }
    assert_eq!(b.blobs(), [layers[1].descriptor.clone()]);
    assert_eq!(
        b.chain_id(),
        oci::chain_id(&[layers[0].diff_id, layers[1].diff_id])
    );
    assert!(
        a.set_blob(Digest::sha256(b"x"), layers[0].descriptor.clone(), vec![], true)
            .is_err()
    );
    // An image with these layers is what was built here.
    let image = store.from_blob_chain(&layers, &described("image")).unwrap();
    let image = image.filter(|image| image.is_lazy() || image.id() == b.id());
    assert!(image.is_some());
}

#[test]
fn a_further_form_may_have_another_diff_id() {
    let dir = Dir::new();
    let (plain, more) = (tar_layer("a", "a"), [tar_layer("a", "a"), vec![0; 512]].concat());
    let (layer, variant) = (layer_blob(&plain, &["r"]), layer_blob(&more, &[]));
    let id = {
        let store = dir.open();
        let image = store.from_blob_chain(std::slice::from_ref(&layer), &described("image"));
        let image = image.unwrap().unwrap();
        let pin = store.pin(&[variant.descriptor.digest]);
        put(&store, &more);
        let set = |first| image.set_blob(variant.diff_id, variant.descriptor.clone(), vec![], first);
        assert!(set(true).is_err(), "the layer itself has one diffID");
        set(false).unwrap();
        drop(pin);
        image.id().clone()
    };
    let store = dir.open();
    let image = store.get(&id).unwrap();
    assert_eq!(image.diff_id(), Some(layer.diff_id));
    assert_eq!(image.diff_id_of(&layer.descriptor.digest), Some(layer.diff_id));
    assert_eq!(
        image.diff_id_of(&variant.descriptor.digest),
        Some(variant.diff_id)
    );
    assert_eq!(image.chain_id(), Some(layer.diff_id));
    // It is what is here.
    image.unpack().unwrap();
}

#[test]
fn blobs_may_be_made_in_any_order() {
    for order in [[0, 1, 2], [2, 1, 0], [1, 2, 0], [2, 0, 1], [1, 0, 2]] {
        let dir = Dir::new();
        let mut store = dir.open();
        let mut stack: Vec<ImmutableRef> = Vec::new();
        for name in ["a", "b", "c"] {
            let below = stack.last().cloned();
            stack.push(step(&store, below.as_ref(), name));
        }
        let blobs = ["a", "b", "c"].map(|name| tar_layer(name, name));
        let layers = [0, 1, 2].map(|index| layer_blob(&blobs[index], &[]));
        for (count, index) in order.into_iter().enumerate() {
            let pin = store.pin(&[layers[index].descriptor.digest]);
            put(&store, &blobs[index]);
            stack[index].finalize().unwrap();
            stack[index]
                .set_blob(
                    layers[index].diff_id,
                    layers[index].descriptor.clone(),
                    vec![],
                    true,
                )
                .unwrap();
            drop(pin);
            if count == 1 {
                // What cannot be told yet can still be told after a restart.
                let ids: Vec<_> = stack.iter().map(|layer| layer.id().clone()).collect();
                stack.iter().for_each(ImmutableRef::retain);
                stack.clear();
                drop(store);
                store = dir.open();
                stack = ids.iter().map(|id| store.get(id).unwrap()).collect();
            }
        }
        for count in 1..=3 {
            let image = store
                .from_blob_chain(&layers[..count], &described("image"))
                .unwrap();
            assert_eq!(image.unwrap().id(), stack[count - 1].id(), "{order:?} {count}");
        }
        check(&store);
    }
}

#[test]
fn what_an_image_adds_to_an_equal_one_is_its_layers() {
    let dir = Dir::new();
    let store = dir.open();
    let blobs = ["a", "b"].map(|name| tar_layer(name, name));
    let layers = [0, 1].map(|index| layer_blob(&blobs[index], &[]));
    for blob in &blobs {
        std::mem::forget(store.pin(&[put(&store, blob)]));
    }
    let a = step(&store, None, "a");
    let b = step(&store, Some(&a), "b");
    b.finalize().unwrap();
    // An image with the same first layer, before it is known that it is the same.
    let image = store
        .from_blob_chain(&layers[..1], &described("image"))
        .unwrap()
        .unwrap();
    for (reference, layer) in [&a, &b].into_iter().zip(&layers) {
        reference
            .set_blob(layer.diff_id, layer.descriptor.clone(), vec![], true)
            .unwrap();
    }
    assert_ne!(image.id(), a.id());
    let diff = store.diff(Some(&image), Some(&b), described("diff")).unwrap();
    let chain = diff.layer_chain();
    assert_eq!(chain.len(), 1);
    assert_eq!(chain[0].id(), b.id());
    assert_eq!(read(&diff, "a"), None);
    assert_eq!(read(&diff, "b").as_deref(), Some("b"));
}

#[test]
fn merges_and_diffs_apply_layers() {
    let dir = Dir::new();
    let store = dir.open();
    let base = step(&store, None, "base");
    let a = step(&store, Some(&base), "a");
    let b = step(&store, Some(&base), "b");
    let diff = store.diff(Some(&base), Some(&b), described("diff")).unwrap();
    assert_eq!(
        diff.layer_chain()
            .iter()
            .map(|layer| layer.id().clone())
            .collect::<Vec<_>>(),
        [b.id().clone()]
    );
    let merged = store
        .merge(&[a.clone(), diff.clone()], described("merge"))
        .unwrap();
    assert!(merged.is_lazy() && merged.missing_blobs().unwrap().is_empty());
    for name in ["base", "a", "b"] {
        assert_eq!(read(&merged, name).as_deref(), Some(name));
    }
    assert_eq!(read(&diff, "base"), None);
    assert_eq!(read(&diff, "b").as_deref(), Some("b"));
    let chain: Vec<_> = merged
        .layer_chain()
        .iter()
        .map(|layer| layer.id().clone())
        .collect();
    assert_eq!(chain, [base.id().clone(), a.id().clone(), b.id().clone()]);
    assert_eq!(
        store
            .merge(std::slice::from_ref(&a), described("one"))
            .unwrap()
            .id(),
        a.id()
    );
    assert!(store.merge(&[], described("none")).is_err());
    assert_eq!(store.diff(None, Some(&a), described("all")).unwrap().id(), a.id());
    let child = step(&store, Some(&merged), "child");
    assert_eq!(read(&child, "b").as_deref(), Some("b"));
    // Flattened: the inner merge is not needed.
    let outer = store
        .merge(&[merged.clone(), child.clone()], described("outer"))
        .unwrap();
    assert_eq!(outer.parents().len(), 3);
}

#[test]
fn a_diff_of_stacks_is_what_the_layers_did() {
    let dir = Dir::new();
    let store = dir.open();
    let (base, extra) = (step(&store, None, "base"), step(&store, None, "extra"));
    let with_file = step(&store, Some(&base), "file");
    let stack = store
        .merge(&[with_file.clone(), extra.clone()], described("stack"))
        .unwrap();
    let upper = without(&store, &stack, "file");
    let diff = store.diff(Some(&base), Some(&upper), described("diff")).unwrap();
    let ids = |reference: &cache::ImmutableRef| {
        let chain = reference.layer_chain();
        chain.iter().map(|layer| layer.id().clone()).collect::<Vec<_>>()
    };
    // The layers themselves, so that their blobs serve again.
    assert_eq!(
        ids(&diff),
        [with_file.id().clone(), extra.id().clone(), upper.id().clone()]
    );
    assert_eq!(read(&diff, "extra").as_deref(), Some("extra"));
    // Neither side has the file, but a layer in between removed it.
    let onto = store
        .merge(&[with_file.clone(), diff], described("onto"))
        .unwrap();
    assert_eq!(read(&onto, "file"), None);
    assert_eq!(read(&onto, "extra").as_deref(), Some("extra"));
    assert_eq!(read(&onto, "base").as_deref(), Some("base"));
    // Two stacks with nothing in common are compared.
    let compared = store
        .diff(Some(&extra), Some(&upper), described("compared"))
        .unwrap();
    assert_eq!(ids(&compared), [compared.id().clone()]);
    assert_eq!(read(&compared, "extra"), None);
}

#[test]
fn merges_do_not_multiply_without_bound() {
    let dir = Dir::new();
    let store = dir.open();
    let mut merged = step(&store, None, "a");
    let refused = (0..40).any(|_| {
        match store.merge(&[merged.clone(), merged.clone()], described("m")) {
            Ok(next) => merged = next,
            Err(error) => return matches!(error, StoreError::Invalid { .. }),
        }
        false
    });
    assert!(refused);
}

#[test]
fn a_directory_is_one_processs_alone() {
    let dir = Dir::new();
    let store = dir.open();
    let refused = try_open(
        dir.path(),
        StoreOptions {
            lock_timeout: Some(Duration::from_millis(30)),
            ..StoreOptions::default()
        },
    );
    let own = std::process::id();
    assert!(matches!(refused, Err(OpenError::Locked { owner: Some(owner), .. }) if owner == own));
    drop(store);
    dir.open();
}

#[test]
fn a_newer_directory_is_refused() {
    let dir = Dir::new();
    drop(dir.open());
    std::fs::write(dir.path().join("version"), "2\n").unwrap();
    let error = try_open(dir.path(), StoreOptions::default()).unwrap_err();
    assert!(matches!(
        error,
        OpenError::NewerVersion {
            found: 2,
            supported: 1,
            ..
        }
    ));
    assert!(
        error.to_string().contains("state version 2") && error.to_string().contains("version 1"),
        "{error}"
    );
}

#[test]
fn a_damaged_database_is_set_aside() {
    let dir = Dir::new();
    let store = dir.open();
    let a = step(&store, None, "a");
    a.retain();
    drop((a, store));
    let path = dir.path().join("metadata.redb");
    let length = std::fs::metadata(&path).unwrap().len();
    std::fs::write(&path, vec![0x5a; usize::try_from(length).unwrap()]).unwrap();
    let opened = try_open(dir.path(), StoreOptions::default());
    // A file that is no database at all is an error or a fresh start; never a panic or stale refs.
    if let Ok(store) = opened {
        assert_eq!(listed(&store), Vec::<String>::new());
    }
}

#[test]
fn values_go_with_their_ref() {
    let dir = Dir::new();
    let store = dir.open();
    let a = step(&store, None, "a");
    a.set_metadata("k", Some(b"v")).unwrap();
    a.set_metadata("gone", Some(b"v")).unwrap();
    a.set_metadata("gone", None).unwrap();
    assert_eq!(a.metadata("k").unwrap().as_deref(), Some(&b"v"[..]));
    assert_eq!(a.metadata("gone").unwrap(), None);
    assert_eq!(a.checksums().unwrap(), None);
    a.retain();
    a.finalize().unwrap();
    let id = a.id().clone();
    drop((a, store));
    let store = dir.open();
    assert_eq!(
        store.get(&id).unwrap().metadata("k").unwrap().as_deref(),
        Some(&b"v"[..])
    );
}

#[test]
fn usage_tells_who_holds_what() {
    let dir = Dir::new();
    let store = dir.open();
    let (a, b) = {
        let a = step(&store, None, "a");
        let b = step(&store, Some(&a), "b");
        (a, b)
    };
    a.retain();
    b.retain();
    b.finalize().unwrap();
    let find = |name: &str| {
        let records = store.disk_usage(&UsageOptions::default()).unwrap();
        records
            .into_iter()
            .find(|record| record.description == name)
            .unwrap()
    };
    let a_id = a.id().clone();
    drop(a);
    assert!(find("a").in_use && find("b").in_use);
    assert_eq!(find("b").parents, [a_id]);
    assert!(find("b").size_bytes > 0);
    drop(b);
    assert!(!find("a").in_use && !find("b").in_use);
    assert_eq!(find("b").usage_count, 1);
    assert!(find("b").last_used_at.is_some());
    let filtered = |filter: &str| {
        let options = UsageOptions {
            filter: vec![filter.into()],
            ..UsageOptions::default()
        };
        store.disk_usage(&options).unwrap().len()
    };
    assert_eq!(
        (
            filtered("description==a"),
            filtered("inuse"),
            filtered("immutable"),
            filtered("type==regular")
        ),
        (1, 0, 2, 2)
    );
    let young = UsageOptions {
        age_limit: Duration::from_secs(3600),
        ..UsageOptions::default()
    };
    assert_eq!(store.disk_usage(&young).unwrap().len(), 0);
}

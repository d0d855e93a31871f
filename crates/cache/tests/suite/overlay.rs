//! The same on overlayfs, where mounts are more than directories.

use crate::fixture::*;

#[test]
fn steps_sources_and_images_look_right() {
    let dir = Dir::new();
    let Some(store) = open_overlay(dir.path()) else {
        return;
    };
    let (base, top) = (tar_layer("base", "i"), tar_layer("top", "t"));
    put(&store, &base);
    put(&store, &top);
    let layers = [layer_blob(&base, &[]), layer_blob(&top, &[])];
    let image = store
        .from_blob_chain(&layers, &described("image"))
        .unwrap()
        .unwrap();
    assert_eq!(read(&image, "base").as_deref(), Some("i"));
    let a = step(&store, Some(&image), "a");
    let b = step(&store, Some(&a), "b");
    for (name, text) in [("base", "i"), ("top", "t"), ("a", "a"), ("b", "b")] {
        assert_eq!(read(&b, name).as_deref(), Some(text));
    }

    // Not finalized: the active snapshot is looked at read-only, on nothing and on something.
    for parent in [None, Some(&a)] {
        let source = store.create_mutable(parent, retained("source")).unwrap();
        write(&source, "f", "1");
        let id = source.id().clone();
        let source = source.commit().unwrap();
        let mounts = source.mounts().unwrap();
        assert!(mounts[0].is_read_only() && mounts[0].upper_dir().is_none());
        assert_eq!(read(&source, "f").as_deref(), Some("1"));
        drop(source);
        let source = store.get_mutable(&id).unwrap();
        assert!(source.mounts(true).unwrap()[0].is_read_only());
        write(&source, "f", "2");
        assert_eq!(read(&source.commit().unwrap(), "f").as_deref(), Some("2"));
    }

    let other = step(&store, Some(&image), "other");
    let diff = store.diff(Some(&image), Some(&other), described("diff")).unwrap();
    let merged = store.merge(&[b.clone(), diff], described("merge")).unwrap();
    for name in ["base", "top", "a", "b", "other"] {
        assert!(read(&merged, name).is_some(), "{name}");
    }
}

/// More layers than an old mount call can name.
#[test]
fn long_chains_mount() {
    let dir = Dir::new();
    let Some(store) = open_overlay(dir.path()) else {
        return;
    };
    let mut last = None;
    for number in 0..140 {
        last = Some(step(&store, last.as_ref(), &format!("f{number}")));
    }
    let last = last.unwrap();
    assert_eq!(read(&last, "f0").as_deref(), Some("f0"));
    assert_eq!(last.layer_chain().len(), 140);
}

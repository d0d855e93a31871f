//! Images as sources: resolved at once, fetched when needed.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use engine::ErrorKind;
use engine::session::Credentials;
use llb::{ImageOptions, OciLayoutOptions, State};
use snapshot::Kind;
use testkit::image::{Image, ImageBuilder, Layer, LayerBuilder, index};
use testkit::registry::{Accounts, Action, Options, Registry};

use super::world::{World, image, with_file};

fn two_layers() -> Image {
    ImageBuilder::new()
        .layer(
            LayerBuilder::new()
                .dir("etc")
                .file("etc/a", "1")
                .file("etc/b", "2")
                .build(),
        )
        .layer(
            LayerBuilder::new()
                .dir("etc")
                .file("etc/a", "3")
                .whiteout("etc/b")
                .build(),
        )
        .build()
}

#[tokio::test(flavor = "multi_thread")]
async fn an_unused_image_is_not_pulled() {
    let (world, server) = (World::new(), Registry::start().await);
    server.add_image("x", "t", &two_layers());
    world.resolve(&image(server.reference("x:t"))).await.unwrap();
    let blobs = server
        .log()
        .iter()
        .filter(|line| line.contains("/blobs/"))
        .count();
    assert_eq!(blobs, 1, "only the configuration: {:?}", server.log());
}

#[tokio::test(flavor = "multi_thread")]
async fn a_step_on_an_image_sees_its_layers() {
    let (world, server) = (World::new(), Registry::start().await);
    server.add_image("x", "t", &two_layers());
    let state = with_file(&image(server.reference("x:t")), "/etc/c", "4");
    world.build(&state, "docker", &[("name", "y")]).await.unwrap();
    assert_eq!(server.count("GET", "/blobs/"), 3);
    // A copy of the result's tree would need mounts: the layers' order shows in the archive's last manifest.
    let file = world.client.file.lock().unwrap().clone();
    assert!(file.len() > 2048);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_digest_known_here_needs_no_registry() {
    let (world, server) = (World::new(), Registry::start().await);
    let stored = server.add_image("x", "t", &two_layers());
    let pinned = server.reference(&format!("x:t@{}", stored.digest));
    let state = with_file(&image(&pinned), "/etc/c", "4");
    world.resolve(&state).await.unwrap();
    server.clear_log();
    world.resolve(&state).await.unwrap();
    assert_eq!(server.log(), Vec::<String>::new());
    // Another repository's name is no way to it.
    let other = server.reference(&format!("other@{}", stored.digest));
    assert_eq!(
        world.resolve(&image(other)).await.unwrap_err().kind(),
        ErrorKind::NotFound
    );
}

#[tokio::test(flavor = "multi_thread")]
async fn an_index_gives_the_best_match() {
    let (world, server) = (World::new(), Registry::start().await);
    let of = |platform: &str, name: &str| {
        let platform = oci::Platform::parse(platform).unwrap();
        ImageBuilder::new()
            .platform(platform)
            .layer(LayerBuilder::new().file(name, "1").build())
            .build()
    };
    let images = [
        of("linux/arm/v6", "v6"),
        of("linux/arm/v7", "v7"),
        of("linux/s390x", "z"),
    ];
    server.add_index("x", "t", &[&images[0], &images[1], &images[2]]);
    let platform = |text: &str| {
        let constraints = llb::Constraints {
            platform: Some(oci::Platform::parse(text).unwrap()),
            ..Default::default()
        };
        State::image(
            &server.reference("x:t").to_string(),
            ImageOptions {
                constraints,
                ..ImageOptions::default()
            },
        )
    };
    world.resolve(&platform("linux/arm/v7")).await.unwrap();
    assert_eq!(
        server.count("GET", &images[1].config_descriptor.digest.to_string()),
        1
    );
    let error = world.resolve(&platform("linux/riscv64")).await.unwrap_err();
    assert!(
        error
            .to_string()
            .ends_with("no match for platform in manifest: not found"),
        "{error}"
    );
}

#[tokio::test(flavor = "multi_thread")]
async fn the_clients_account_opens_private_images() {
    let accounts = Accounts {
        users: BTreeMap::from([("user".to_owned(), "secret".to_owned())]),
        ..Accounts::default()
    };
    let server = Registry::start_with(Options {
        accounts: Some(accounts),
        ..Options::default()
    })
    .await;
    server.add_image("x", "t", &two_layers());
    let world = World::new();
    let state = with_file(&image(server.reference("x:t")), "/c", "4");
    let error = world.resolve(&state).await.unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Denied);
    assert!(error.to_string().contains("pull access denied"), "{error}");
    *world.client.account.lock().unwrap() = Some(Credentials {
        username: "user".into(),
        secret: "secret".into(),
    });
    // The refusal is remembered with the first build's view of the registry at most for that build.
    let world = {
        let other = World::new();
        *other.client.account.lock().unwrap() = world.client.account.lock().unwrap().clone();
        other
    };
    world.resolve(&state).await.unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn trouble_during_a_pull_is_survived() {
    let (world, server) = (World::new(), Registry::start().await);
    let image_ = ImageBuilder::new()
        .layer(Layer::bulky("a", 2 << 20))
        .layer(Layer::bulky("b", 1 << 20))
        .build();
    server.add_image("x", "t", &image_);
    for _ in 0..3 {
        server.fault("GET", "/blobs/", 1, Action::Truncate(700_000));
        server.fault("GET", "/blobs/", 1, Action::Status(503, vec![], ""));
    }
    world
        .resolve(&with_file(&image(server.reference("x:t")), "/c", "4"))
        .await
        .unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn damaged_layers_are_refused() {
    let server = Registry::start().await;
    let good = two_layers();
    // The blob is not the manifest's.
    server.add_image("corrupt", "t", &good);
    server.fault(
        "GET",
        &good.layers[0].descriptor.digest.to_string(),
        100,
        Action::Corrupt,
    );
    // The layer is not the configuration's.
    let lying = ImageBuilder::new()
        .layer(good.layers[0].clone())
        .edit(|config| config.rootfs.diff_ids = vec![oci::Digest::sha256("other")])
        .build();
    server.add_image("lying", "t", &lying);
    // The layer is no archive.
    let mut garbage = good.layers[0].clone();
    garbage.blob = Bytes::from_static(b"garbage");
    garbage.descriptor = oci::Descriptor::of_bytes(oci::media_type::OCI_LAYER_GZIP, &garbage.blob);
    server.add_image("garbage", "t", &ImageBuilder::new().layer(garbage).build());
    for name in ["corrupt", "lying", "garbage"] {
        let world = World::new();
        let state = with_file(&image(server.reference(&format!("{name}:t"))), "/c", "4");
        let error = world.resolve(&state).await.unwrap_err();
        assert_ne!(error.kind(), ErrorKind::Internal, "{name}: {error}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn who_has_other_layers_spoils_nobody_elses_image() {
    let server = Registry::start().await;
    let good = two_layers();
    let layer = &good.layers[0].descriptor;
    server.add_image("honest", "t", &good);
    server.add_image("corrupt", "t", &good);
    let blob = format!("/corrupt/blobs/{}", layer.digest);
    server.fault("GET", &blob, 1000, Action::Corrupt);
    server.add_image("lying", "honest", &good);
    let manifest = String::from_utf8(good.manifest.to_vec()).unwrap();
    let told = format!("\"size\":{}", layer.size);
    assert!(manifest.contains(&told));
    let manifest = manifest.replace(&told, &format!("\"size\":{}", layer.size - 1));
    server.add_manifest("lying", Some("t"), &good.descriptor.media_type, manifest.into());
    let from = |name: &str| image(server.reference(&format!("{name}:t")));
    for other in ["corrupt", "lying"] {
        // They come first, and fail.
        let world = World::new();
        let refused = world.resolve(&with_file(&from(other), "/c", "4")).await;
        assert!(refused.is_err(), "{other}");
        world
            .resolve(&with_file(&from("honest"), "/c", "4"))
            .await
            .unwrap_or_else(|error| panic!("after {other}: {error}"));
        // They come between what an image is and what is in it.
        let world = World::new();
        world.resolve(&from("honest")).await.unwrap();
        world.resolve(&from(other)).await.unwrap();
        world
            .resolve(&with_file(&from("honest"), "/c", "4"))
            .await
            .unwrap_or_else(|error| panic!("with {other}: {error}"));
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn manifests_that_contradict_themselves_are_refused() {
    let server = Registry::start().await;
    let good = two_layers();
    server.add_image("x", "good", &good);
    let (_, list) = index(&[&good]);
    let manifest = String::from_utf8(good.manifest.to_vec()).unwrap();
    let both = format!("{},\"manifests\":[]}}", manifest.trim_end_matches('}'));
    let extra = ImageBuilder::new().layer(good.layers[0].clone()).edit(|config| {
        config.rootfs.diff_ids.push(oci::Digest::sha256("one too many"));
    });
    let cases: [(&str, &str, Bytes); 4] = [
        ("both", oci::media_type::OCI_MANIFEST, both.into()),
        ("index", oci::media_type::OCI_MANIFEST, list),
        ("text", oci::media_type::OCI_MANIFEST, "garbage".into()),
        ("old", oci::media_type::DOCKER_SCHEMA1, "{}".into()),
    ];
    for (tag, kind, bytes) in cases {
        server.add_manifest("x", Some(tag), kind, bytes);
    }
    server.add_image("x", "extra", &extra.build());
    for (tag, text) in [
        ("both", "ambiguous"),
        ("text", "failed to parse"),
        ("old", "schema 1 has been removed"),
        ("extra", "mismatched image rootfs and manifest layers"),
    ] {
        let error = World::new()
            .resolve(&image(server.reference(&format!("x:{tag}"))))
            .await
            .unwrap_err();
        assert!(error.to_string().contains(text), "{tag}: {error}");
    }
    // An index that is served as a manifest is still an index.
    World::new()
        .resolve(&image(server.reference("x:index")))
        .await
        .unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn limits_and_checksums_hold() {
    let (world, server) = (World::new(), Registry::start().await);
    let stored = server.add_image("x", "t", &two_layers());
    let state = |options: ImageOptions| State::image(&server.reference("x:t").to_string(), options);
    let limited = |limit| {
        state(ImageOptions {
            layer_limit: Some(limit),
            ..ImageOptions::default()
        })
    };
    world.resolve(&limited(1)).await.unwrap();
    let error = world.resolve(&limited(3)).await.unwrap_err();
    assert!(
        error.to_string().contains("layer limit 3 is greater than"),
        "{error}"
    );
    let checked = |digest| {
        state(ImageOptions {
            checksum: Some(digest),
            ..ImageOptions::default()
        })
    };
    world.resolve(&checked(stored.digest)).await.unwrap();
    let error = world
        .resolve(&checked(oci::Digest::sha256("x")))
        .await
        .unwrap_err();
    assert!(
        error.to_string().contains("does not match expected checksum"),
        "{error}"
    );
}

#[tokio::test(flavor = "multi_thread")]
async fn a_layout_at_the_client_is_an_image() {
    let world = World::new();
    let made = two_layers();
    let blobs = made.layers.iter().map(|layer| layer.blob.clone());
    for bytes in blobs.chain([made.config.clone(), made.manifest.clone()]) {
        world
            .client
            .blobs
            .lock()
            .unwrap()
            .insert(oci::Digest::sha256(&bytes), bytes);
    }
    let reference = format!("docker.io/library/any@{}", made.descriptor.digest);
    let options = OciLayoutOptions {
        store_id: "layout".into(),
        ..OciLayoutOptions::default()
    };
    let state = State::oci_layout(&reference, options.clone());
    world
        .build(&with_file(&state, "/c", "4"), "docker", &[])
        .await
        .unwrap();
    let mut reads = world.client.reads.lock().unwrap().clone();
    reads.sort();
    let mut blobs: Vec<_> = world.client.blobs.lock().unwrap().keys().copied().collect();
    blobs.sort();
    assert_eq!(reads, blobs, "each once");
    let missing = State::oci_layout(&format!("x@{}", oci::Digest::sha256("?")), options);
    let error = world.resolve(&missing).await.unwrap_err();
    assert!(
        error.to_string().contains("unable to get info about digest"),
        "{error}"
    );
}

#[tokio::test(flavor = "multi_thread")]
async fn a_blob_becomes_a_file() {
    let (world, server) = (World::new(), Registry::start().await);
    let bytes = vec![7; 100_000];
    let digest = server.add_blob("x", bytes.clone());
    let options = llb::ImageBlobOptions {
        filename: "a/f.bin".into(),
        ..llb::ImageBlobOptions::default()
    };
    let state = State::image_blob(&server.reference(&format!("x@{digest}")).to_string(), options);
    world
        .build(&state, "docker", &[("compression", "uncompressed")])
        .await
        .unwrap();
    let file = world.client.file.lock().unwrap().clone();
    let mut outer = tar::Archive::new(&file[..]);
    let layers = outer.entries().unwrap().map(|entry| {
        let mut content = Vec::new();
        std::io::Read::read_to_end(&mut entry.unwrap(), &mut content).unwrap();
        content
    });
    let layer = layers
        .into_iter()
        .find(|content| content.len() > bytes.len())
        .unwrap();
    let mut layer = tar::Archive::new(&layer[..]);
    let entry = layer.entries().unwrap().next().unwrap().unwrap();
    assert_eq!(entry.path().unwrap().to_str(), Some("f.bin"));
    assert_eq!(
        (entry.header().mode().unwrap(), entry.header().mtime().unwrap()),
        (0o600, 0)
    );

    let missing = oci::Digest::sha256("missing");
    let reference = server.reference(&format!("x@{missing}")).to_string();
    let error = world
        .resolve(&State::image_blob(&reference, llb::ImageBlobOptions::default()))
        .await
        .unwrap_err();
    assert_eq!(error.kind(), ErrorKind::NotFound);
    let damaged = server.add_blob("x", "damaged");
    server.fault("GET", &damaged.to_string(), 100, Action::Corrupt);
    let reference = server.reference(&format!("x@{damaged}")).to_string();
    let error = world
        .resolve(&State::image_blob(&reference, llb::ImageBlobOptions::default()))
        .await
        .unwrap_err();
    assert!(error.to_string().contains("unexpected digest"), "{error}");
}

#[tokio::test(flavor = "multi_thread")]
async fn the_difference_of_lazy_images_is_their_upper_layers() {
    let (world, server) = (World::new(), Registry::start().await);
    let layer = |name: &str| LayerBuilder::new().file(name, name).build();
    let image_ = ImageBuilder::new()
        .layer(layer("first"))
        .layer(layer("second"))
        .layer(layer("third"))
        .build();
    server.add_image("x", "t", &image_);
    let reference = server.reference("x:t").to_string();
    let of = |limit| {
        State::image(
            &reference,
            ImageOptions {
                layer_limit: limit,
                ..ImageOptions::default()
            },
        )
    };
    let state = with_file(
        &llb::diff(&of(Some(2)), &of(None), &llb::Constraints::new()),
        "/forth",
        "forth",
    );
    world.build(&state, "tar", &[]).await.unwrap();
    assert_eq!(tar_names(&world), ["forth", "third"]);
}

#[tokio::test(flavor = "multi_thread")]
async fn an_image_built_here_is_the_refs_that_it_was_built_from() {
    let (world, server) = (World::new(), Registry::start().await);
    let files = ["first", "second", "third"];
    let built = files.iter().fold(State::scratch(), |state, name| {
        with_file(&state, &format!("/{name}"), name)
    });
    let reference = server.reference("x:t").to_string();
    world
        .build(&built, "image", &[("name", &reference), ("push", "true")])
        .await
        .unwrap();
    server.clear_log();
    let of = |limit| {
        State::image(
            &reference,
            ImageOptions {
                layer_limit: limit,
                ..ImageOptions::default()
            },
        )
    };
    let state = with_file(&of(Some(2)), "/forth", "forth");
    world.build(&state, "tar", &[]).await.unwrap();
    assert_eq!(tar_names(&world), ["first", "forth", "second"]);
    let state = with_file(
        &llb::diff(&of(Some(2)), &of(None), &llb::Constraints::new()),
        "/forth",
        "forth",
    );
    world.build(&state, "tar", &[]).await.unwrap();
    assert_eq!(tar_names(&world), ["forth", "third"]);
    assert_eq!(
        server.count("GET", "/blobs/"),
        1,
        "only the configuration: {:?}",
        server.log()
    );
}

/// The names in the archive that the client was sent.
fn tar_names(world: &World) -> Vec<String> {
    let file = world.client.file.lock().unwrap().clone();
    let mut archive = tar::Archive::new(&file[..]);
    let entries = archive.entries().unwrap();
    entries
        .map(|entry| entry.unwrap().path().unwrap().to_str().unwrap().to_owned())
        .collect()
}

#[tokio::test(flavor = "multi_thread")]
async fn unpacking_ends_with_the_last_build_that_wants_it() {
    let (world, server) = (World::new(), Registry::start().await);
    let large = LayerBuilder::new().file("large", vec![b'x'; 128 << 20]).build();
    server.add_image("x", "t", &ImageBuilder::new().layer(large).build());
    let state = with_file(&image(server.reference("x:t")), "/small", "1");
    let snapshotter = Arc::clone(world.engine.services().store.snapshotter());
    let kinds = || -> Vec<Kind> { snapshotter.list().iter().map(|stat| stat.kind).collect() };
    let until = async |is_so: &dyn Fn(&[Kind]) -> bool| {
        while !is_so(&kinds()) {
            tokio::task::yield_now().await;
        }
    };
    tokio::select! {
        built = world.build(&state, "tar", &[]) => panic!("{built:?} before it could be given up"),
        () = until(&|kinds| kinds.contains(&Kind::Active)) => {}
    }
    // The thread that unpacks notices and removes what it made; it would leave a committed snapshot otherwise.
    let ended = until(&|kinds| !kinds.contains(&Kind::Active));
    tokio::time::timeout(Duration::from_secs(30), ended)
        .await
        .unwrap();
    assert_eq!(kinds(), []);
    world.build(&state, "tar", &[]).await.unwrap();
}

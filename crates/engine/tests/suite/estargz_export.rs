//! Layers whose files can be read one by one, in images and caches.

use std::io::Read;

use bytes::Bytes;
use engine::solve::SolveRequest;
use layer::compress::estargz::{TABLE_DIGEST, UNCOMPRESSED_SIZE, find};
use llb::State;
use oci::{Descriptor, Digest, ImageConfig, Manifest, media_type};
use testkit::image::{Image, ImageBuilder, Layer};
use testkit::objects::Objects;
use testkit::registry::Registry;

use super::object_cache::{kinds, max};
use super::remote_cache::{Build, cached_files, option};
use super::world::{World, image, request, with_file};

const FORCED: [(&str, &str); 2] = [("compression", "estargz"), ("force-compression", "true")];

fn base() -> Image {
    ImageBuilder::new().layer(Layer::bulky("bin", 100_000)).build()
}

fn manifest(server: &Registry, repository: &str) -> Manifest {
    let (_, bytes) = server.manifest(repository, "t").unwrap();
    serde_json::from_slice(&bytes).unwrap()
}

/// Builds and pushes; returns the layers, once their diffIDs are known to be right.
async fn push(
    world: &World,
    server: &Registry,
    repository: &str,
    state: &State,
    attrs: &[(&str, &str)],
) -> Vec<Descriptor> {
    let name = server.reference(&format!("{repository}:t")).to_string();
    let attrs = [&[("name", name.as_str()), ("push", "true")], attrs].concat();
    world.build(state, "image", &attrs).await.unwrap();
    let pushed = manifest(server, repository);
    let config = server.blob(repository, &pushed.config.digest).unwrap();
    let config: ImageConfig = serde_json::from_slice(&config).unwrap();
    let diff_ids: Vec<Digest> = pushed
        .layers
        .iter()
        .map(|layer| Digest::sha256(plain(server, repository, layer)))
        .collect();
    assert_eq!(config.rootfs.diff_ids, diff_ids);
    pushed.layers
}

fn plain(server: &Registry, repository: &str, layer: &Descriptor) -> Vec<u8> {
    let blob = server.blob(repository, &layer.digest).unwrap();
    let (_, mut reader) = layer::compress::decompress(&*blob).unwrap();
    let mut plain = Vec::new();
    reader.read_to_end(&mut plain).unwrap();
    plain
}

/// Whether a layer is eStargz; then its annotations are right.
fn is_estargz(server: &Registry, repository: &str, layer: &Descriptor) -> bool {
    assert_eq!(layer.media_type, media_type::OCI_LAYER_GZIP);
    let blob = server.blob(repository, &layer.digest).unwrap();
    let read = |buf: &mut [u8], offset: u64| {
        let from = usize::try_from(offset).unwrap();
        buf.copy_from_slice(&blob[from..from + buf.len()]);
        Ok(())
    };
    let table = find(blob.len() as u64, read).unwrap();
    let Some(table) = table else {
        assert_eq!(layer.annotations.len(), 0, "{layer:?}");
        return false;
    };
    assert_eq!(layer.annotations[TABLE_DIGEST], table.digest.to_string());
    let size = plain(server, repository, layer).len().to_string();
    assert_eq!(layer.annotations.get(UNCOMPRESSED_SIZE).unwrap_or(&size), &size);
    true
}

fn all_estargz(server: &Registry, repository: &str, layers: &[Descriptor]) -> Vec<bool> {
    let each = layers.iter().map(|layer| is_estargz(server, repository, layer));
    each.collect()
}

#[tokio::test(flavor = "multi_thread")]
async fn layers_are_converted_only_by_force_and_back() {
    let (world, server) = (World::new(), Registry::start().await);
    let base = base();
    server.add_image("base", "t", &base);
    let state = with_file(&image(server.reference("base:t")), "/new", "1");
    let layers = push(&world, &server, "app", &state, &FORCED[..1]).await;
    assert_eq!(all_estargz(&server, "app", &layers), [false, true]);
    let forced = push(&world, &server, "app", &state, &FORCED).await;
    assert_eq!(all_estargz(&server, "app", &forced), [true, true]);
    assert_eq!(forced[1], layers[1], "the layer is used again");
    let gzip = [("compression", "gzip"), FORCED[1]];
    let unforced = push(&world, &server, "app", &state, &gzip[..1]).await;
    assert_eq!(unforced, layers, "the first form of each layer");
    let gzip = push(&world, &server, "app", &state, &gzip).await;
    assert_eq!(all_estargz(&server, "app", &gzip), [false, false]);
    assert_eq!(gzip[0].digest, base.layers[0].descriptor.digest);
    let original = plain(&server, "app", &gzip[1]);
    assert!(plain(&server, "app", &layers[1]).starts_with(&original));
    // What another engine makes of the same files is the same.
    let again = push(&World::new(), &server, "again", &state, &FORCED).await;
    assert_eq!(again, forced);
}

#[tokio::test(flavor = "multi_thread")]
async fn layers_of_images_that_are_estargz_stay_and_unpack_without_the_table() {
    let server = Registry::start().await;
    let base = base();
    server.add_image("base", "t", &base);
    let made = image(server.reference("base:t"));
    let layers = push(&World::new(), &server, "lazy", &made, &FORCED).await;
    // As registries have it whose images were copied by those who keep no annotations.
    let mut bare = manifest(&server, "lazy");
    bare.layers[0].annotations.clear();
    let bytes = Bytes::from(serde_json::to_vec(&bare).unwrap());
    server.add_manifest("lazy", Some("bare"), media_type::OCI_MANIFEST, bytes);
    for tag in ["t", "bare"] {
        let world = World::new();
        let state = with_file(&image(server.reference(&format!("lazy:{tag}"))), "/new", "1");
        let forced = push(&world, &server, "app", &state, &FORCED).await;
        assert_eq!(forced[0].digest, layers[0].digest, "{tag}");
        assert_eq!(all_estargz(&server, "app", &forced), [true, true], "{tag}");
        world.build(&state, "tar", &[]).await.unwrap();
        let files = world.client.file.lock().unwrap().clone();
        let mut files = tar::Archive::new(&files[..]);
        let names = files.entries().unwrap().map(|entry| {
            let entry = entry.unwrap();
            entry.path().unwrap().to_str().unwrap().to_owned()
        });
        assert_eq!(names.collect::<Vec<_>>(), ["bin", "new"], "{tag}");
        let plain_layers = [("compression", "uncompressed"), FORCED[1]];
        let back = push(&world, &server, "app", &state, &plain_layers).await;
        assert!(plain(&server, "app", &back[0]) == base.layers[0].tar, "{tag}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn timestamps_of_a_base_stay_though_its_layers_are_converted() {
    let (world, server) = (World::new(), Registry::start().await);
    server.add_image("base", "t", &base());
    let state = with_file(&image(server.reference("base:t")), "/new", "1");
    let attrs = [
        FORCED[0],
        FORCED[1],
        ("source-date-epoch", "500"),
        ("rewrite-timestamp", "true"),
    ];
    let layers = push(&world, &server, "app", &state, &attrs).await;
    let mut rewritten = layers[1].clone();
    assert_eq!(
        rewritten
            .annotations
            .remove("buildkit/rewritten-timestamp")
            .as_deref(),
        Some("500")
    );
    assert!(is_estargz(&server, "app", &rewritten));
}

#[tokio::test(flavor = "multi_thread")]
async fn manifests_of_docker_have_no_annotations() {
    let (world, server) = (World::new(), Registry::start().await);
    let state = with_file(&State::scratch(), "/new", "1");
    let first = push(&world, &server, "app", &state, &FORCED).await;
    let docker = push(&world, &server, "app", &state, &[("oci-mediatypes", "false")]).await;
    assert_eq!(docker[0].digest, first[0].digest);
    assert_eq!(docker[0].media_type, media_type::DOCKER_LAYER_GZIP);
    assert!(docker[0].annotations.is_empty());
}

#[tokio::test(flavor = "multi_thread")]
async fn caches_of_such_layers_serve_other_engines() {
    let server = Registry::start().await;
    server.add_image("base", "t", &base());
    let state = image(server.reference("base:t"));
    let state = with_file(&with_file(&state, "/one", "1"), "/two", "2");
    let cache = server.reference("cache:t").to_string();
    let name = server.reference("app:t").to_string();
    let attrs = [("ref", cache.as_str()), ("mode", "max"), FORCED[0], FORCED[1]];
    let export = Build {
        state: &state,
        name: None,
        exports: vec![option("registry", &attrs)],
        imports: Vec::new(),
    };
    export.run(&World::new()).await;
    let cached = manifest(&server, "cache").layers;
    assert_eq!(cached.len(), 3);
    for layer in &cached {
        let diff_id = Digest::sha256(plain(&server, "cache", layer)).to_string();
        assert_eq!(layer.annotations["containerd.io/uncompressed"], diff_id);
        assert!(is_estargz(&server, "cache", layer));
    }
    let world = World::new();
    let import = Build {
        state: &state,
        name: Some(&name),
        exports: vec![option("inline", &[])],
        imports: vec![option("registry", &attrs)],
    };
    let (_, vertices) = import.run(&world).await;
    assert_eq!(cached_files(&vertices), [true, true], "{vertices:?}");
    let pushed = manifest(&server, "app").layers;
    assert_eq!(all_estargz(&server, "app", &pushed), [true, true, true]);
    world.build(&state, "tar", &[]).await.unwrap();
    // The image it made serves as a cache as well.
    let import = Build {
        state: &state,
        name: None,
        exports: Vec::new(),
        imports: vec![option("registry", &[("ref", &name)])],
    };
    let (_, vertices) = import.run(&World::new()).await;
    assert_eq!(cached_files(&vertices), [true, true], "{vertices:?}");
}

#[tokio::test(flavor = "multi_thread")]
async fn object_stores_hold_such_layers_too() {
    let (server, objects) = (Registry::start().await, Objects::start().await);
    server.add_image("base", "t", &base());
    let state = image(server.reference("base:t"));
    let state = with_file(&with_file(&state, "/one", "1"), "/two", "2");
    let expected = push(&World::new(), &server, "app", &state, &FORCED).await;
    let name = server.reference("again:t").to_string();
    for kind in kinds(&objects) {
        let mut place = max(&kind);
        let forced = FORCED.map(|(key, value)| (key.to_owned(), value.to_owned()));
        place.attrs.extend(forced);
        let build = |exports, imports| Build {
            state: &state,
            name: None,
            exports,
            imports,
        };
        build(vec![place.clone()], Vec::new()).run(&World::new()).await;
        let world = World::new();
        let (_, vertices) = build(Vec::new(), vec![kind.clone()]).run(&world).await;
        assert_eq!(cached_files(&vertices), [true, true], "{vertices:?}");
        // The configuration in a store does not tell; the layers themselves do.
        let pushed = world.solve(SolveRequest {
            definition: Some(state.marshal(&llb::MarshalOptions::default()).unwrap()),
            cache_imports: vec![kind.clone()],
            ..request(
                "image",
                &[&[("name", name.as_str()), ("push", "true")], &FORCED[..]].concat(),
            )
        });
        pushed.await.unwrap();
        let layers = manifest(&server, "again").layers;
        assert_eq!(
            all_estargz(&server, "again", &layers),
            [true, true, true],
            "{}",
            kind.kind
        );
        let digests = |layers: &[Descriptor]| layers.iter().map(|layer| layer.digest).collect::<Vec<_>>();
        assert_eq!(digests(&layers), digests(&expected), "{}", kind.kind);
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn converted_images_hold_their_inline_cache() {
    let (world, server) = (World::new(), Registry::start().await);
    server.add_image("base", "t", &base());
    let state = with_file(&image(server.reference("base:t")), "/one", "1");
    // The layers' first form is another.
    push(&world, &server, "first", &state, &[]).await;
    let name = server.reference("app:t").to_string();
    let attrs = [("name", name.as_str()), ("push", "true"), FORCED[0], FORCED[1]];
    let mut request = request("image", &attrs);
    request.definition = Some(state.marshal(&llb::MarshalOptions::default()).unwrap());
    request.cache_exports = vec![option("inline", &[])];
    world.solve(request).await.unwrap();
    let import = Build {
        state: &state,
        name: None,
        exports: Vec::new(),
        imports: vec![option("registry", &[("ref", &name)])],
    };
    let (_, vertices) = import.run(&World::new()).await;
    assert_eq!(cached_files(&vertices), [true], "{vertices:?}");
}

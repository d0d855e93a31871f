//! Caches as they are asked for: how large they are, how their layers are packed, of how many platforms they are, and how
//! many there are at once.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use engine::bridge::{CacheOption, Frontend};
use engine::job::JobId;
use engine::progress::Vertex;
use engine::solve::SolveRequest;
use llb::State;
use oci::{Digest, Manifest, Platform, media_type};
use testkit::image::{ImageBuilder, Layer};
use testkit::objects::Objects;
use testkit::registry::{Action, Registry};

use super::cache_shapes::two_stages;
use super::object_cache::{kinds, max};
use super::remote_cache::{Build, cached_files, option};
use super::world::{Platforms, World, image, request, with_file};

fn manifest(server: &Registry, repository: &str) -> Manifest {
    let (_, bytes) = server.manifest(repository, "t").unwrap();
    serde_json::from_slice(&bytes).unwrap()
}

/// Exports without an image.
async fn export(state: &State, exports: Vec<CacheOption>) {
    let build = Build {
        state,
        name: None,
        exports,
        imports: Vec::new(),
    };
    build.run(&World::new()).await;
}

/// The steps that an empty engine makes although it has a cache.
async fn made(state: &State, name: &str, import: CacheOption) -> Vec<String> {
    let build = Build {
        state,
        name: Some(name),
        exports: Vec::new(),
        imports: vec![import],
    };
    let (_, vertices) = build.run(&World::new()).await;
    let made = vertices.into_iter().filter(|(_, cached)| !cached);
    let made = made.map(|(name, _)| name);
    made.filter(|name| name.starts_with("mkfile") || name.starts_with("copy"))
        .collect()
}

#[tokio::test(flavor = "multi_thread")]
async fn small_caches_have_the_last_results_layers_alone() {
    let (server, objects) = (Registry::start().await, Objects::start().await);
    let state = two_stages(&server);
    let name = server.reference("app:t").to_string();
    let cache = server.reference("cache:t").to_string();
    let blobs = || {
        let paths = objects.paths().into_iter().chain(objects.keys());
        let blobs = paths.filter(|path| path.contains("sha256:"));
        blobs.count()
    };
    // The second stage's base, the file of the first and two steps; with the first stage three layers more.
    for (large, layers) in [(false, 5), (true, 8)] {
        let sized = |place: &CacheOption| if large { max(place) } else { place.clone() };
        let place = option("registry", &[("ref", &cache)]);
        export(&state, vec![sized(&place)]).await;
        assert_eq!(manifest(&server, "cache").layers.len(), layers);
        assert_eq!(made(&state, &name, place).await, Vec::<String>::new());
        for place in kinds(&objects) {
            objects.remove("");
            export(&state, vec![sized(&place)]).await;
            assert_eq!(blobs(), layers, "{}", place.kind);
            let made = made(&state, &name, place).await;
            assert_eq!(made, Vec::<String>::new(), "{large}");
        }
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn layers_are_packed_as_is_asked_for() {
    let server = Registry::start().await;
    let state = two_stages(&server);
    let (name, cache) = (
        server.reference("app:t").to_string(),
        server.reference("cache:t").to_string(),
    );
    let forced = ("force-compression", "true");
    let zstd = |level| [("compression", "zstd"), ("compression-level", level), forced];
    let gzip = [media_type::OCI_LAYER_GZIP; 8];
    let mut sizes = Vec::new();
    for (packing, kinds) in [
        (&zstd("1")[..], [media_type::OCI_LAYER_ZSTD; 8]),
        (&zstd("19")[..], [media_type::OCI_LAYER_ZSTD; 8]),
        (
            &[("compression", "uncompressed"), forced][..],
            [media_type::OCI_LAYER; 8],
        ),
        (&[("compression", "gzip"), forced][..], gzip),
    ] {
        let place = option("registry", &[("ref", &cache)]);
        let mut asked = max(&place);
        let packing = packing
            .iter()
            .map(|(key, value)| ((*key).to_owned(), (*value).to_owned()));
        asked.attrs.extend(packing);
        export(&state, vec![asked]).await;
        let layers = manifest(&server, "cache").layers;
        let found: Vec<&str> = layers.iter().map(|layer| layer.media_type.as_str()).collect();
        assert_eq!(found, kinds);
        for layer in &layers {
            let blob = server.blob("cache", &layer.digest).unwrap();
            let (_, mut plain) = layer::compress::decompress(&*blob).unwrap();
            let mut bytes = Vec::new();
            std::io::Read::read_to_end(&mut plain, &mut bytes).unwrap();
            let diff_id = Digest::sha256(bytes).to_string();
            assert_eq!(layer.annotations["containerd.io/uncompressed"], diff_id);
        }
        sizes.push(layers.iter().map(|layer| layer.size).sum::<u64>());
        assert_eq!(made(&state, &name, place).await, Vec::<String>::new());
    }
    assert!(sizes[1] < sizes[0] && sizes[0] < sizes[2], "{sizes:?}");
    // Without force what is packed already stays, and the rest is packed as is asked for.
    let place = option(
        "registry",
        &[("ref", &cache), ("mode", "max"), ("compression", "zstd")],
    );
    export(&state, vec![place]).await;
    let layers = manifest(&server, "cache").layers;
    let of_bases = layers
        .iter()
        .filter(|layer| layer.media_type == media_type::OCI_LAYER_GZIP);
    assert_eq!((of_bases.count(), layers.len()), (4, 8));
}

/// A build of two platforms, each with a base and a step of its own.
async fn build_platforms(
    server: &Registry,
    exports: Vec<CacheOption>,
    imports: Vec<CacheOption>,
) -> Vec<Vertex> {
    let state = |platform: &str, path: &str| {
        let options = llb::ImageOptions::default();
        let base = State::image(&server.reference("base:t").to_string(), options);
        (
            Platform::parse(platform).unwrap(),
            with_file(&base, path, platform),
        )
    };
    let (amd, arm) = (state("linux/amd64", "/amd"), state("linux/arm64", "/arm"));
    let configs = [&amd.0, &arm.0].map(|platform| {
        let config = format!(r#"{{"os":"linux","architecture":"{}"}}"#, platform.architecture);
        let key = format!("containerimage.config/linux/{}", platform.architecture);
        (key, Bytes::from(config))
    });
    let platforms = vec![("linux/amd64", amd.1), ("linux/arm64", arm.1)];
    let frontend: Arc<dyn Frontend> = Arc::new(Platforms(platforms, configs.into(), imports));
    let world = World::with_frontend(BTreeMap::from([("test".to_owned(), frontend)]));
    let name = server.reference("app:t").to_string();
    let solved = world.solve(SolveRequest {
        frontend: "test".to_owned(),
        cache_exports: exports,
        ..request("image", &[("name", &name), ("push", "true")])
    });
    solved.await.unwrap();
    let progress = world.engine.job_progress(&JobId("build-0".to_owned())).unwrap();
    progress.vertices()
}

#[tokio::test(flavor = "multi_thread")]
async fn caches_of_several_platforms_serve_all_of_them() {
    let (server, objects) = (Registry::start().await, Objects::start().await);
    let base = |platform: &str, size| {
        ImageBuilder::new()
            .platform(Platform::parse(platform).unwrap())
            .layer(Layer::bulky("bin", size))
            .build()
    };
    let bases = [base("linux/amd64", 20_000), base("linux/arm64", 30_000)];
    server.add_index("base", "t", &[&bases[0], &bases[1]]);
    let cache = server.reference("cache:t").to_string();
    let inline = server.reference("app:t").to_string();
    let mut places = vec![(
        option("registry", &[("ref", &cache)]),
        option("registry", &[("ref", &cache)]),
    )];
    places.push((option("inline", &[]), option("registry", &[("ref", &inline)])));
    places.extend(kinds(&objects).into_iter().map(|kind| (kind.clone(), kind)));
    for (export, import) in places {
        let vertices = build_platforms(&server, vec![export.clone()], Vec::new()).await;
        let steps = |vertices: &[Vertex]| -> Vec<bool> {
            let steps = vertices.iter().filter(|vertex| vertex.name.starts_with("mkfile"));
            steps.map(|vertex| vertex.cached).collect()
        };
        assert_eq!(steps(&vertices), [false, false]);
        let (_, first) = server.manifest("app", "t").unwrap();
        let exports = if export.kind == "inline" {
            vec![export.clone()]
        } else {
            Vec::new()
        };
        let vertices = build_platforms(&server, exports, vec![import]).await;
        assert_eq!(steps(&vertices), [true, true], "{export:?}: {vertices:?}");
        let (_, again) = server.manifest("app", "t").unwrap();
        let layers = |index: &Bytes| -> Vec<Vec<Digest>> {
            let index: oci::Index = serde_json::from_slice(index).unwrap();
            let images = index.manifests.iter().map(|image| {
                let (_, bytes) = server.manifest("app", &image.digest.to_string()).unwrap();
                let manifest: Manifest = serde_json::from_slice(&bytes).unwrap();
                manifest.layers.iter().map(|layer| layer.digest).collect()
            });
            images.collect()
        };
        assert_eq!(layers(&again), layers(&first), "{export:?}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_cache_that_does_not_exist_yet_hinders_nothing() {
    let (server, objects) = (Registry::start().await, Objects::start().await);
    server.add_image(
        "base",
        "t",
        &ImageBuilder::new().layer(Layer::bulky("bin", 9000)).build(),
    );
    let state = with_file(&image(server.reference("base:t")), "/one", "1");
    let cache = server.reference("cache:t").to_string();
    let mut places = vec![option("registry", &[("ref", &cache)])];
    places.extend(kinds(&objects));
    // The same places for both, as on a fresh branch; then all of them have it.
    for (round, cached) in [false, true].into_iter().enumerate() {
        let world = World::new();
        let solved = world.solve(SolveRequest {
            definition: Some(state.marshal(&llb::MarshalOptions::default()).unwrap()),
            cache_exports: places.iter().map(max).collect(),
            cache_imports: places.clone(),
            ..request("image", &[])
        });
        let response = solved.await.unwrap();
        assert_eq!(response.exporter_response.get("cooper.cache.omitted"), None);
        let progress = world.engine.job_progress(&JobId("build-0".to_owned())).unwrap();
        let vertices = progress.vertices();
        let steps = vertices.iter().map(|vertex| (vertex.name.clone(), vertex.cached));
        assert_eq!(cached_files(&steps.collect()), [cached], "{round}");
        let of_registry = vertices
            .iter()
            .find(|vertex| vertex.name.starts_with("importing cache") && vertex.name.contains(&cache))
            .unwrap();
        assert_eq!(
            of_registry.error.contains("not found"),
            !cached,
            "{of_registry:?}"
        );
    }
    assert_eq!(manifest(&server, "cache").layers.len(), 2);
}

#[tokio::test(flavor = "multi_thread")]
async fn caches_are_exported_while_the_image_is_pushed() {
    let server = Registry::start().await;
    let state = two_stages(&server);
    let (name, cache) = (
        server.reference("app:t").to_string(),
        server.reference("cache:t").to_string(),
    );
    for repository in ["/app/blobs/", "/cache/blobs/"] {
        server.fault("POST", repository, 3, Action::Delay(Duration::from_millis(100)));
    }
    let world = World::new();
    let build = Build {
        state: &state,
        name: Some(&name),
        exports: vec![option("registry", &[("ref", &cache), ("mode", "max")])],
        imports: Vec::new(),
    };
    build.run(&world).await;
    let first = |method: &str, part: &str| {
        let log = server.log();
        let place = log
            .iter()
            .position(|line| line.starts_with(method) && line.contains(part));
        place.unwrap_or_else(|| panic!("{method} {part}: {log:?}"))
    };
    // Either begins before the other ends.
    assert!(first("HEAD", "/cache/blobs/") < first("PUT", "/app/manifests/"));
    assert!(first("HEAD", "/app/blobs/") < first("PUT", "/cache/manifests/"));
}

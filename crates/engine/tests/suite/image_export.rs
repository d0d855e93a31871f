//! Results as images: pushed, as archives, into layouts.

use std::collections::BTreeMap;
use std::io::Read;
use std::sync::Arc;

use bytes::Bytes;
use engine::bridge::Frontend;
use engine::solve::SolveRequest;
use llb::State;
use oci::{ImageConfig, Index, Manifest, media_type};
use testkit::image::{Image, ImageBuilder, Layer};
use testkit::registry::Registry;

use super::world::{Platforms, World, image, request, with_file};

fn base() -> Image {
    ImageBuilder::new().layer(Layer::bulky("bin", 100_000)).build()
}

fn manifest(server: &Registry, repository: &str, object: &str) -> Manifest {
    let (_, bytes) = server.manifest(repository, object).unwrap();
    serde_json::from_slice(&bytes).unwrap()
}

fn config(server: &Registry, repository: &str, manifest: &Manifest) -> ImageConfig {
    serde_json::from_slice(&server.blob(repository, &manifest.config.digest).unwrap()).unwrap()
}

/// The files of an archive by name.
pub fn archive(bytes: &[u8]) -> BTreeMap<String, Vec<u8>> {
    let mut archive = tar::Archive::new(bytes);
    let entries = archive.entries().unwrap().map(|entry| {
        let mut entry = entry.unwrap();
        let mut content = Vec::new();
        entry.read_to_end(&mut content).unwrap();
        (entry.path().unwrap().to_str().unwrap().to_owned(), content)
    });
    entries.collect()
}

#[tokio::test(flavor = "multi_thread")]
async fn a_result_is_pushed_on_its_base() {
    let (world, server) = (World::new(), Registry::start().await);
    let base = base();
    server.add_image("base", "t", &base);
    let state = with_file(&image(server.reference("base:t")), "/new", "1");
    let name = server.reference("app:v1").to_string();
    let built = world
        .build(&state, "image", &[("name", &name), ("push", "true")])
        .await
        .unwrap();

    let pushed = manifest(&server, "app", "v1");
    assert_eq!(pushed.media_type, media_type::OCI_MANIFEST);
    assert_eq!(pushed.layers.len(), 2);
    assert_eq!(pushed.layers[0].digest, base.layers[0].descriptor.digest);
    assert_eq!(pushed.layers[1].media_type, media_type::OCI_LAYER_GZIP);
    let config = config(&server, "app", &pushed);
    assert_eq!(config.rootfs.diff_ids[0], base.layers[0].diff_id);
    assert_eq!(config.history.len(), 2);
    assert_eq!(config.history[1].comment, "buildkit.exporter.image.v0");
    let (_, bytes) = server.manifest("app", "v1").unwrap();
    let digest = oci::Digest::sha256(&bytes).to_string();
    assert_eq!(built.exporter_response["containerimage.digest"], digest);
    assert_eq!(built.exporter_response["image.name"], name);
    assert_eq!(
        built.exporter_response["containerimage.config.digest"],
        pushed.config.digest.to_string()
    );
    assert!(built.exporter_response.contains_key("containerimage.descriptor"));
    let mounts = server
        .log()
        .iter()
        .filter(|line| line.contains("from=base"))
        .count();
    assert_eq!(mounts, 1, "the base's layer is mounted");

    // The same build again works out and sends nothing.
    server.clear_log();
    let again = world
        .build(&state, "image", &[("name", &name), ("push", "true")])
        .await
        .unwrap();
    assert_eq!(again.exporter_response["containerimage.digest"], digest);
    assert_eq!(
        server.count("PUT", "") + server.count("POST", ""),
        0,
        "{:?}",
        server.log()
    );
}

#[tokio::test(flavor = "multi_thread")]
async fn a_lazy_image_is_copied_without_being_pulled() {
    let (world, server) = (World::new(), Registry::start().await);
    server.add_image("base", "t", &base());
    let name = server.reference("copy:t").to_string();
    let state = image(server.reference("base:t"));
    world
        .build(&state, "image", &[("name", &name), ("push", "")])
        .await
        .unwrap();
    let layer = base().layers[0].descriptor.digest.to_string();
    assert_eq!(server.count("GET", &layer), 0);
    assert!(server.blob("copy", &base().layers[0].descriptor.digest).is_some());
}

#[tokio::test(flavor = "multi_thread")]
async fn a_lazy_image_is_copied_to_another_registry() {
    let (world, server, other) = (World::new(), Registry::start().await, Registry::start().await);
    server.add_image("base", "t", &base());
    let name = other.reference("copy:t").to_string();
    let state = image(server.reference("base:t"));
    world
        .build(&state, "image", &[("name", &name), ("push", "1")])
        .await
        .unwrap();
    let layer = &base().layers[0];
    assert_eq!(other.blob("copy", &layer.descriptor.digest).unwrap(), layer.blob);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_push_by_digest_makes_no_tag() {
    let (world, server) = (World::new(), Registry::start().await);
    let state = with_file(&State::scratch(), "/a", "1");
    let name = server.reference("app").to_string();
    let attrs = [
        ("name", name.as_str()),
        ("push", "true"),
        ("push-by-digest", "true"),
    ];
    let built = world.build(&state, "image", &attrs).await.unwrap();
    let digest = &built.exporter_response["containerimage.digest"];
    assert!(server.manifest("app", digest).is_some());
    assert!(server.manifest("app", "latest").is_none());
    let tagged = server.reference("app:t").to_string();
    let attrs = [
        ("name", tagged.as_str()),
        ("push", "true"),
        ("push-by-digest", "true"),
    ];
    let error = world.build(&state, "image", &attrs).await.unwrap_err();
    assert!(error.to_string().contains("can't push tagged ref"), "{error}");
}

#[tokio::test(flavor = "multi_thread")]
async fn nothing_is_an_image_too() {
    let (world, server) = (World::new(), Registry::start().await);
    server.add_image("none", "t", &ImageBuilder::new().build());
    let name = server.reference("empty:t").to_string();
    let state = image(server.reference("none:t"));
    world
        .build(&state, "image", &[("name", &name), ("push", "true")])
        .await
        .unwrap();
    let (_, bytes) = server.manifest("empty", "t").unwrap();
    assert!(
        String::from_utf8(bytes.to_vec())
            .unwrap()
            .contains("\"layers\": null")
    );
}

#[tokio::test(flavor = "multi_thread")]
async fn docker_media_types_are_used_on_request() {
    let (world, server) = (World::new(), Registry::start().await);
    let name = server.reference("app:t").to_string();
    let attrs = [
        ("name", name.as_str()),
        ("push", "true"),
        ("oci-mediatypes", "false"),
    ];
    world
        .build(&with_file(&State::scratch(), "/a", "1"), "image", &attrs)
        .await
        .unwrap();
    let pushed = manifest(&server, "app", "t");
    assert_eq!(pushed.media_type, media_type::DOCKER_MANIFEST);
    assert_eq!(pushed.config.media_type, media_type::DOCKER_CONFIG);
    assert_eq!(pushed.layers[0].media_type, media_type::DOCKER_LAYER_GZIP);
}

#[tokio::test(flavor = "multi_thread")]
async fn compression_is_changed_only_by_force() {
    let (world, server) = (World::new(), Registry::start().await);
    server.add_image("base", "t", &base());
    let state = with_file(&image(server.reference("base:t")), "/new", "1");
    let name = server.reference("app:t").to_string();
    let attrs = [("name", name.as_str()), ("push", "true"), ("compression", "zstd")];
    world.build(&state, "image", &attrs).await.unwrap();
    let kinds = |pushed: Manifest| {
        pushed
            .layers
            .into_iter()
            .map(|layer| layer.media_type)
            .collect::<Vec<_>>()
    };
    let (gzip, zstd) = (media_type::OCI_LAYER_GZIP, media_type::OCI_LAYER_ZSTD);
    assert_eq!(kinds(manifest(&server, "app", "t")), [gzip, zstd]);
    let force = ("force-compression", "true");
    world
        .build(&state, "image", &[attrs[0], attrs[1], attrs[2], force])
        .await
        .unwrap();
    assert_eq!(kinds(manifest(&server, "app", "t")), [zstd, zstd]);
    let pushed = manifest(&server, "app", "t");
    let config = config(&server, "app", &pushed);
    for (layer, diff_id) in pushed.layers.iter().zip(&config.rootfs.diff_ids) {
        let blob = server.blob("app", &layer.digest).unwrap();
        let plain = zstd_decode(&blob);
        assert_eq!(oci::Digest::sha256(&plain), *diff_id);
    }
    // Without it the first form of each layer is used again.
    world.build(&state, "image", &attrs[..2]).await.unwrap();
    assert_eq!(kinds(manifest(&server, "app", "t")), [gzip, zstd]);
}

fn zstd_decode(bytes: &[u8]) -> Vec<u8> {
    zstd::stream::decode_all(bytes).unwrap()
}

#[tokio::test(flavor = "multi_thread")]
async fn the_epoch_reaches_config_and_layers() {
    let (world, server) = (World::new(), Registry::start().await);
    let name = server.reference("app:t").to_string();
    let attrs = [
        ("name", name.as_str()),
        ("push", "true"),
        ("source-date-epoch", "500"),
        ("rewrite-timestamp", "true"),
    ];
    world
        .build(&with_file(&State::scratch(), "/a", "1"), "image", &attrs)
        .await
        .unwrap();
    let pushed = manifest(&server, "app", "t");
    let config = config(&server, "app", &pushed);
    assert_eq!(config.created.as_deref(), Some("1970-01-01T00:08:20Z"));
    assert_eq!(
        pushed.layers[0].annotations["buildkit/rewritten-timestamp"],
        "500"
    );
    let blob = server.blob("app", &pushed.layers[0].digest).unwrap();
    let plain = flate2::read::MultiGzDecoder::new(&blob[..]);
    let mut layer = tar::Archive::new(plain);
    let times: Vec<u64> = layer
        .entries()
        .unwrap()
        .map(|entry| entry.unwrap().header().mtime().unwrap())
        .collect();
    assert!(
        !times.is_empty() && times.iter().all(|time| *time <= 500),
        "{times:?}"
    );
}

#[tokio::test(flavor = "multi_thread")]
async fn a_docker_archive_loads_everywhere() {
    let (world, server) = (World::new(), Registry::start().await);
    server.add_image("base", "t", &base());
    let state = with_file(&image(server.reference("base:t")), "/new", "1");
    let built = world
        .build(&state, "docker", &[("name", "app,other:2")])
        .await
        .unwrap();
    assert_eq!(
        built.exporter_response["image.name"],
        "docker.io/library/app:latest,docker.io/library/other:2"
    );
    let bytes = world.client.file.lock().unwrap().clone();
    let files = archive(&bytes);
    assert_eq!(files["oci-layout"], br#"{"imageLayoutVersion":"1.0.0"}"#);
    let loaded: serde_json::Value = serde_json::from_slice(&files["manifest.json"]).unwrap();
    assert_eq!(
        loaded[0]["RepoTags"],
        serde_json::json!(["app:latest", "other:2"])
    );
    for layer in loaded[0]["Layers"].as_array().unwrap() {
        assert!(files.contains_key(layer.as_str().unwrap()));
    }
    let index: Index = serde_json::from_slice(&files["index.json"]).unwrap();
    assert_eq!(index.manifests.len(), 2);
    assert_eq!(
        index.manifests[1].annotations["org.opencontainers.image.ref.name"],
        "2"
    );
    assert_eq!(
        index.manifests[0].digest.to_string(),
        built.exporter_response["containerimage.digest"]
    );
    for (name, content) in &files {
        if let Some(hex) = name.strip_prefix("blobs/sha256/").filter(|hex| !hex.is_empty()) {
            assert_eq!(oci::Digest::sha256(content).hex(), hex);
        }
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_layout_is_copied_into_the_clients_store() {
    let world = World::new();
    let state = with_file(&State::scratch(), "/a", "1");
    let built = world.build(&state, "oci", &[("tar", "false")]).await.unwrap();
    let digest: oci::Digest = built.exporter_response["containerimage.digest"].parse().unwrap();
    let blobs = world.client.blobs.lock().unwrap().clone();
    let copied: Manifest = serde_json::from_slice(&blobs[&digest]).unwrap();
    assert!(blobs.contains_key(&copied.config.digest) && blobs.contains_key(&copied.layers[0].digest));
}

#[tokio::test(flavor = "multi_thread")]
async fn several_platforms_become_an_index() {
    let server = Registry::start().await;
    let base = base();
    server.add_image("base", "t", &base);
    let state = |name: &str| with_file(&image(server.reference("base:t")), name, "1");
    let config = |arch: &str| Bytes::from(format!(r#"{{"os":"linux","architecture":"{arch}"}}"#));
    let metadata = BTreeMap::from([
        ("containerimage.config/linux/amd64".to_owned(), config("amd64")),
        ("containerimage.config/linux/arm64".to_owned(), config("arm64")),
    ]);
    let platforms = vec![("linux/amd64", state("/a")), ("linux/arm64", state("/b"))];
    let frontend: Arc<dyn Frontend> = Arc::new(Platforms(platforms, metadata, Vec::new()));
    let world = World::with_frontend(BTreeMap::from([("test".to_owned(), frontend)]));
    let name = server.reference("app:t").to_string();
    let attrs = [
        ("name", name.as_str()),
        ("push", "true"),
        ("annotation-index.who", "me"),
        ("annotation[linux/arm64].which", "arm"),
    ];
    let solve = |exporter: &str| SolveRequest {
        frontend: "test".into(),
        ..request(exporter, &attrs)
    };
    let built = world.solve(solve("image")).await.unwrap();
    let (kind, bytes) = server.manifest("app", "t").unwrap();
    assert_eq!(kind, media_type::OCI_INDEX);
    let index: Index = serde_json::from_slice(&bytes).unwrap();
    assert_eq!(index.annotations["who"], "me");
    let architectures: Vec<_> = index
        .manifests
        .iter()
        .map(|one| one.platform.clone().unwrap().architecture)
        .collect();
    assert_eq!(architectures, ["amd64", "arm64"]);
    let arm = manifest(&server, "app", &index.manifests[1].digest.to_string());
    assert_eq!(arm.annotations["which"], "arm");
    assert_eq!(self::config(&server, "app", &arm).architecture, "arm64");
    assert!(
        !built
            .exporter_response
            .contains_key("containerimage.config.digest")
    );
    let error = world.solve(solve("docker")).await.unwrap_err();
    assert_eq!(
        error.to_string(),
        "docker exporter does not currently support exporting manifest lists"
    );
}

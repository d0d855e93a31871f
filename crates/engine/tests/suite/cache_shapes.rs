//! Caches of builds of every shape: what is exported is restored whole on an empty engine.

use std::collections::BTreeMap;
use std::sync::Arc;

use async_trait::async_trait;
use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use engine::BuildError;
use engine::bridge::{Bridge, BridgeRequest, BuildResult, Frontend, FrontendRequest};
use engine::solve::SolveRequest;
use llb::{Constraints, CopyOptions, FileActions, MarshalOptions, State};
use testkit::image::{ImageBuilder, Layer};
use testkit::objects::Objects;
use testkit::registry::Registry;

use super::object_cache::{kinds, max};
use super::remote_cache::{Build, option};
use super::world::{World, image, with_file};

pub fn copy(from: &State, path: &str, onto: &State) -> State {
    let options = CopyOptions {
        created_ns: Some(1_000_000_000_000),
        ..CopyOptions::default()
    };
    onto.file(
        FileActions::new().copy(from, path, "/copied", options),
        &Constraints::new(),
    )
}

/// Two stages on different bases; the second takes a file of the first.
pub fn two_stages(server: &Registry) -> State {
    for (name, size) in [("one", 30_000), ("two", 50_000)] {
        let base = ImageBuilder::new()
            .layer(Layer::bulky("bin", size))
            .layer(Layer::bulky("lib", size + 1))
            .build();
        server.add_image(name, "t", &base);
    }
    let one = with_file(&image(server.reference("one:t")), "/made", "1");
    let two = with_file(&image(server.reference("two:t")), "/own", "2");
    with_file(&copy(&one, "/made", &two), "/last", "3")
}

/// Builds with one cache imported and one exported; returns the image's digest and the steps that ran.
async fn rebuild(
    world: &World,
    state: &State,
    name: &str,
    imports: &[&str],
    exports: &[&str],
) -> (String, Vec<String>) {
    let import = |name: &&str| option("registry", &[("ref", *name)]);
    let export = |name: &&str| option("registry", &[("ref", *name), ("mode", "max")]);
    let build = Build {
        state,
        name: Some(name),
        exports: exports.iter().map(export).collect(),
        imports: imports.iter().map(import).collect(),
    };
    let (response, vertices) = build.run(world).await;
    assert_eq!(response.exporter_response.get("cooper.cache.omitted"), None);
    let is_step = |name: &&String| name.starts_with("mkfile") || name.starts_with("copy");
    let ran = vertices
        .iter()
        .filter(|(_, cached)| !**cached)
        .map(|(name, _)| name);
    (
        response.exporter_response["containerimage.digest"].clone(),
        ran.filter(is_step).cloned().collect(),
    )
}

/// The layers of a cache in a registry.
pub fn layers(server: &Registry, repository: &str) -> Vec<oci::Digest> {
    let (_, bytes) = server.manifest(repository, "t").unwrap();
    let manifest: oci::Manifest = serde_json::from_slice(&bytes).unwrap();
    let mut layers: Vec<_> = manifest.layers.iter().map(|layer| layer.digest).collect();
    layers.sort();
    layers
}

#[tokio::test(flavor = "multi_thread")]
async fn stages_on_lazy_bases_survive_two_exports() {
    let server = Registry::start().await;
    let state = two_stages(&server);
    let name = |repository: &str| server.reference(&format!("{repository}:t")).to_string();
    let (app, first, second) = (name("app"), name("first"), name("second"));
    let (expected, ran) = rebuild(&World::new(), &state, &app, &[], &[&first]).await;
    assert_eq!(ran.len(), 4);
    // Both bases, and what each of the four steps changed.
    assert_eq!(layers(&server, "first").len(), 8);
    // All of it is found and stays where it is, and is exported from there.
    let pushed = name("other");
    server.clear_log();
    let (again, ran) = rebuild(&World::new(), &state, &pushed, &[&first], &[&second]).await;
    assert_eq!((again.as_str(), ran), (expected.as_str(), Vec::new()));
    for layer in layers(&server, "first") {
        assert_eq!(server.count("GET", &layer.to_string()), 0, "{:?}", server.log());
    }
    assert_eq!(
        server.count("PUT", "/blobs/uploads/"),
        2,
        "the image's configuration and the cache's"
    );
    let world = World::new();
    let (again, ran) = rebuild(&world, &state, &app, &[&second], &[]).await;
    assert_eq!((again.as_str(), ran), (expected.as_str(), Vec::new()));
    // A new step on what is lazy takes everything below it along.
    let changed = with_file(&state, "/new", "4");
    let third = name("third");
    let (expected, ran) = rebuild(&World::new(), &changed, &app, &[&first], &[&third]).await;
    assert_eq!(ran.len(), 1, "{ran:?}");
    let (again, ran) = rebuild(&World::new(), &changed, &app, &[&third], &[]).await;
    assert_eq!(again, expected);
    assert!(!ran.iter().any(|step| step.contains("/new")), "{ran:?}");
}

#[tokio::test(flavor = "multi_thread")]
async fn every_kind_of_ref_can_be_exported_with_an_inline_cache() {
    let server = Registry::start().await;
    let stages = two_stages(&server);
    let base = image(server.reference("one:t"));
    let from_nothing = with_file(&State::scratch(), "/alone", "x");
    let constraints = Constraints::new();
    let merged = llb::merge([&base, &from_nothing, &stages], &constraints);
    let changes = llb::diff(&base, &with_file(&base, "/changed", "y"), &constraints);
    let empty = llb::diff(&base, &base, &constraints);
    // Its history tells of more layers than there are, as squashing leaves it.
    let entry = |empty: bool| serde_json::from_str(&format!(r#"{{"empty_layer":{empty}}}"#)).unwrap();
    let squashed = ImageBuilder::new()
        .layer(Layer::bulky("all", 9000))
        .edit(|config| config.history.extend([entry(false), entry(true), entry(false)]))
        .build();
    server.add_image("squashed", "t", &squashed);
    server.add_image("layerless", "t", &ImageBuilder::new().build());
    let on = |name: &str| with_file(&image(server.reference(name)), "/on-it", "z");
    let (on_squashed, on_layerless) = (on("squashed:t"), on("layerless:t"));
    let shapes = [
        ("on-squashed", on_squashed, true),
        ("on-layerless", on_layerless, true),
        ("stages", stages, true),
        ("untouched", base, false),
        // Steps without inputs are found again without results, as sources are.
        ("nothing", from_nothing, false),
        ("merged", merged, true),
        ("changes", changes, true),
        ("empty", empty, false),
    ];
    for (shape, state, has_steps) in shapes {
        let name = server.reference(&format!("{shape}:t")).to_string();
        let world = World::new();
        let build = |imports| Build {
            state: &state,
            name: Some(&name),
            exports: vec![option("inline", &[])],
            imports,
        };
        build(Vec::new()).run(&world).await;
        let import = vec![option("registry", &[("ref", &name)])];
        let (response, vertices) = build(import).run(&World::new()).await;
        assert!(
            response.exporter_response.contains_key("containerimage.digest"),
            "{shape}"
        );
        if has_steps {
            assert!(vertices.values().any(|cached| *cached), "{shape}: {vertices:?}");
        }
    }
}

/// Turns a cache into what other versions wrote: records in another order, with all fields or with as few as possible,
/// results as lists of layers.
fn rewritten(config: &serde_json::Value, lists: bool) -> serde_json::Value {
    let mut config = config.clone();
    let layers = config["layers"].as_array().unwrap().clone();
    let below = |mut layer: i64| {
        let mut chain = Vec::new();
        while let Ok(index) = usize::try_from(layer) {
            chain.insert(0, layer);
            layer = layers[index]["parent"].as_i64().unwrap_or(0);
        }
        chain
    };
    let records = config["records"].as_array_mut().unwrap();
    let last = records.len() as i64 - 1;
    records.reverse();
    for record in records {
        for link in record["inputs"].as_array_mut().into_iter().flatten() {
            for link in link.as_array_mut().unwrap() {
                link["link"] = (last - link["link"].as_i64().unwrap()).into();
            }
        }
        let results = record["layers"].as_array().cloned().unwrap_or_default();
        let tops = results.iter().map(|result| result["layer"].as_i64().unwrap());
        if lists {
            let chains = tops
                .map(|top| serde_json::json!({"layers": below(top), "createdAt": "2020-01-01T00:00:00Z"}));
            record["chains"] = chains.collect();
            record["layers"] = serde_json::Value::Null;
        } else {
            record["layers"] = tops.map(|top| serde_json::json!({ "layer": top })).collect();
        }
        if record["inputs"].is_null() {
            record["inputs"] = serde_json::Value::Null;
        }
    }
    config
}

/// The same cache, as a manifest of other forms, each under a tag of its own.
fn other_forms(server: &Registry) -> Vec<&'static str> {
    let (_, bytes) = server.manifest("first", "t").unwrap();
    let manifest: serde_json::Value = serde_json::from_slice(&bytes).unwrap();
    let config = manifest["config"]["digest"].as_str().unwrap().parse().unwrap();
    let config: serde_json::Value = serde_json::from_slice(&server.blob("first", &config).unwrap()).unwrap();
    let kind = oci::media_type::BUILDKIT_CACHE_CONFIG;
    let stored = |lists| {
        let bytes = rewritten(&config, lists).to_string();
        let digest = server.add_blob("first", bytes.clone());
        serde_json::json!({"mediaType": kind, "digest": digest.to_string(), "size": bytes.len()})
    };
    let (lists, tops) = (stored(true), stored(false));
    let mut layers = manifest["layers"].as_array().unwrap().clone();
    let put = |tag, kind: &str, json: serde_json::Value| {
        server.add_manifest("first", Some(tag), kind, json.to_string().into());
    };
    let with = |layers: &[serde_json::Value], config: &serde_json::Value| {
        let mut entries = layers.to_vec();
        entries.push(config.clone());
        serde_json::Value::Array(entries)
    };
    put(
        "index",
        oci::media_type::OCI_INDEX,
        serde_json::json!({"schemaVersion": 2, "manifests": with(&layers, &lists)}),
    );
    put(
        "image",
        oci::media_type::OCI_MANIFEST,
        serde_json::json!({
            "schemaVersion": 2, "mediaType": oci::media_type::OCI_MANIFEST, "config": tops, "layers": layers,
        }),
    );
    for layer in &mut layers {
        layer["mediaType"] = oci::media_type::DOCKER_LAYER_GZIP.into();
        let all = layer["annotations"].as_object_mut().unwrap();
        all.retain(|name, _| name == "containerd.io/uncompressed");
    }
    put(
        "docker",
        oci::media_type::DOCKER_MANIFEST_LIST,
        serde_json::json!({
            "schemaVersion": 2, "mediaType": oci::media_type::DOCKER_MANIFEST_LIST, "manifests": with(&layers, &tops),
        }),
    );
    vec!["index", "image", "docker"]
}

#[tokio::test(flavor = "multi_thread")]
async fn caches_in_the_forms_of_other_versions_are_restored_whole() {
    let server = Registry::start().await;
    let state = two_stages(&server);
    let name = |reference: &str| server.reference(reference).to_string();
    let app = name("app:t");
    let (expected, _) = rebuild(&World::new(), &state, &app, &[], &[&name("first:t")]).await;
    for tag in other_forms(&server) {
        let cache = name(&format!("first:{tag}"));
        let (digest, ran) = rebuild(&World::new(), &state, &app, &[&cache], &[]).await;
        assert_eq!(ran, Vec::<String>::new(), "{tag}");
        // What made a layer, and when, is told by annotations alone.
        assert!(digest == expected || tag == "docker", "{tag}");
    }
    // None of them vouches for a layer that is gone.
    let (_, bytes) = server.manifest("app", "t").unwrap();
    let built: oci::Manifest = serde_json::from_slice(&bytes).unwrap();
    server.remove_blob("first", &built.layers.last().unwrap().digest);
    for tag in ["t", "index", "image", "docker"] {
        let cache = name(&format!("first:{tag}"));
        let (_, ran) = rebuild(&World::new(), &state, &app, &[&cache], &[]).await;
        assert_eq!(ran.len(), 1, "{tag}: {ran:?}");
        assert!(ran[0].contains("/last"), "{tag}: {ran:?}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn records_within_an_image_are_found_in_each_of_their_forms() {
    let server = Registry::start().await;
    let state = two_stages(&server);
    let name = server.reference("app:t").to_string();
    let build = |imports| Build {
        state: &state,
        name: Some(&name),
        exports: vec![option("inline", &[])],
        imports,
    };
    build(Vec::new()).run(&World::new()).await;
    let (kind, bytes) = server.manifest("app", "t").unwrap();
    let mut manifest: oci::Manifest = serde_json::from_slice(&bytes).unwrap();
    let image = server.blob("app", &manifest.config.digest).unwrap();
    let image: serde_json::Value = serde_json::from_slice(&image).unwrap();
    let records = STANDARD.decode(image["moby.buildkit.cache.v0"].as_str().unwrap());
    let records: serde_json::Value = serde_json::from_slice(&records.unwrap()).unwrap();
    let layers: Vec<_> = (0..manifest.layers.len())
        .map(|index| serde_json::json!({ "parent": index as i64 - 1 }))
        .collect();
    let whole = serde_json::json!({"layers": layers, "records": records});
    for lists in [false, true] {
        let mut image = image.clone();
        let records = match lists {
            false => rewritten(&whole, false)["records"].to_string(),
            true => records.to_string(),
        };
        image["moby.buildkit.cache.v0"] = STANDARD.encode(records).into();
        let bytes = image.to_string();
        manifest.config = oci::Descriptor::of_bytes(manifest.config.media_type.clone(), bytes.as_bytes());
        server.add_blob("app", bytes);
        let bytes = serde_json::to_vec(&manifest).unwrap();
        server.add_manifest("app", Some("other"), &kind, bytes.into());
        let cache = server.reference("app:other").to_string();
        let (_, vertices) = build(vec![option("registry", &[("ref", &cache)])])
            .run(&World::new())
            .await;
        let missed = vertices
            .iter()
            .filter(|(step, cached)| step.contains("/last") && !**cached);
        assert_eq!(missed.count(), 0, "{lists}: {vertices:?}");
    }
}

/// A frontend of a client's own: it builds what it was given.
#[derive(Debug)]
struct Own(llb::pb::Definition);

#[async_trait]
impl Frontend for Own {
    async fn solve(&self, bridge: &Bridge, _: FrontendRequest) -> Result<BuildResult, BuildError> {
        bridge
            .solve(BridgeRequest {
                definition: Some(self.0.clone()),
                ..BridgeRequest::default()
            })
            .await
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_frontend_of_ones_own_exports_to_any_cache() {
    let server = Registry::start().await;
    let definition = two_stages(&server).marshal(&MarshalOptions::default()).unwrap();
    let frontend: Arc<dyn Frontend> = Arc::new(Own(definition));
    let world = World::with_frontend(BTreeMap::from([("own".to_owned(), frontend)]));
    let cache = server.reference("cache:t").to_string();
    let objects = Objects::start().await;
    let mut exports = vec![
        option("local", &[("dest", "/cache"), ("mode", "max")]),
        option("registry", &[("ref", &cache), ("mode", "max")]),
        option("inline", &[]),
    ];
    exports.extend(kinds(&objects).iter().map(max));
    let response = world
        .solve(SolveRequest {
            frontend: "own".to_owned(),
            cache_exports: exports,
            ..super::world::request("image", &[])
        })
        .await
        .unwrap();
    assert!(response.exporter_response.contains_key("cache.manifest"));
    assert_eq!(layers(&server, "cache").len(), 8);
    assert!(world.client.blobs.lock().unwrap().len() >= 8);
    let is_blob = |path: &&String| path.contains("/blobs/");
    assert_eq!(objects.paths().iter().filter(is_blob).count(), 2 * 8);
    let is_blob = |key: &&String| key.starts_with("buildkit-blob");
    // Both of GitHub's protocols lead to one service, and what it has is not sent again.
    assert_eq!(objects.keys().iter().filter(is_blob).count(), 8);
}

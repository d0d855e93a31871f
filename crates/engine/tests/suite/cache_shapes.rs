//! Caches of builds of every shape: what is exported is restored whole on an empty engine.

use std::collections::BTreeMap;
use std::sync::Arc;

use async_trait::async_trait;
use engine::BuildError;
use engine::bridge::{Bridge, BridgeRequest, BuildResult, Frontend, FrontendRequest};
use engine::solve::SolveRequest;
use llb::{Constraints, CopyOptions, FileActions, MarshalOptions, State};
use testkit::image::{ImageBuilder, Layer};
use testkit::registry::Registry;

use super::remote_cache::{Build, option};
use super::world::{World, image, with_file};

fn copy(from: &State, path: &str, onto: &State) -> State {
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
fn two_stages(server: &Registry) -> State {
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
fn layers(server: &Registry, repository: &str) -> Vec<oci::Digest> {
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
    let (again, ran) = rebuild(&World::new(), &state, &app, &[&first], &[&second]).await;
    assert_eq!((again.as_str(), ran), (expected.as_str(), Vec::new()));
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
    let shapes = [
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
    let response = world
        .solve(SolveRequest {
            frontend: "own".to_owned(),
            cache_exports: vec![
                option("local", &[("dest", "/cache"), ("mode", "max")]),
                option("registry", &[("ref", &cache), ("mode", "max")]),
            ],
            ..SolveRequest::default()
        })
        .await
        .unwrap();
    assert!(response.exporter_response.contains_key("cache.manifest"));
    assert_eq!(layers(&server, "cache").len(), 8);
    assert!(world.client.blobs.lock().unwrap().len() >= 8);
}

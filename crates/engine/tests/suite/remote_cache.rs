//! Caches exported by one engine and imported by another.

use std::collections::BTreeMap;

use engine::bridge::CacheOption;
use engine::job::JobId;
use engine::solve::{SolveRequest, SolveResponse};
use llb::{MarshalOptions, State};
use oci::{Manifest, media_type};
use testkit::image::{ImageBuilder, Layer};
use testkit::registry::Registry;

use super::world::{World, image, request, with_file};

pub fn option(kind: &str, attrs: &[(&str, &str)]) -> CacheOption {
    let attrs = attrs
        .iter()
        .map(|(key, value)| ((*key).to_owned(), (*value).to_owned()));
    CacheOption {
        kind: kind.to_owned(),
        attrs: attrs.collect(),
    }
}

pub struct Build<'a> {
    pub state: &'a State,
    pub name: Option<&'a str>,
    pub exports: Vec<CacheOption>,
    pub imports: Vec<CacheOption>,
}

impl Build<'_> {
    /// Builds; returns the response, and per step whether it was cached.
    pub async fn run(self, world: &World) -> (SolveResponse, BTreeMap<String, bool>) {
        let mut wanted = match self.name {
            Some(name) => request("image", &[("name", name), ("push", "true")]),
            None => SolveRequest::default(),
        };
        wanted.definition = Some(self.state.marshal(&MarshalOptions::default()).unwrap());
        wanted.cache_exports = self.exports;
        wanted.cache_imports = self.imports;
        let response = world.solve(wanted).await.unwrap();
        let number = (0..)
            .take_while(|number| {
                world
                    .engine
                    .job_progress(&JobId(format!("build-{number}")))
                    .is_some()
            })
            .last()
            .unwrap();
        let progress = world
            .engine
            .job_progress(&JobId(format!("build-{number}")))
            .unwrap();
        let vertices = progress.vertices();
        for vertex in &vertices {
            assert_eq!(vertex.error, "", "{}", vertex.name);
        }
        (
            response,
            vertices
                .into_iter()
                .map(|vertex| (vertex.name, vertex.cached))
                .collect(),
        )
    }
}

/// Two steps on a base image.
fn steps(server: &Registry) -> State {
    let base = ImageBuilder::new().layer(Layer::bulky("bin", 10_000)).build();
    server.add_image("base", "t", &base);
    let state = image(server.reference("base:t"));
    with_file(&with_file(&state, "/one", "1"), "/two", "2")
}

pub fn cached_files(vertices: &BTreeMap<String, bool>) -> Vec<bool> {
    let files = vertices.iter().filter(|(name, _)| name.starts_with("mkfile"));
    files.map(|(_, cached)| *cached).collect()
}

#[tokio::test(flavor = "multi_thread")]
async fn an_inline_cache_makes_the_same_image_again() {
    let server = Registry::start().await;
    let state = steps(&server);
    let name = server.reference("app:t").to_string();
    let build = |imports| Build {
        state: &state,
        name: Some(&name),
        exports: vec![option("inline", &[])],
        imports,
    };
    let (first, _) = build(Vec::new()).run(&World::new()).await;
    let import = || vec![option("registry", &[("ref", &name)])];
    let (second, vertices) = build(import()).run(&World::new()).await;
    let digest = |response: &SolveResponse| response.exporter_response["containerimage.digest"].clone();
    assert_eq!(digest(&first), digest(&second));
    assert!(cached_files(&vertices).contains(&true), "{vertices:?}");
    assert!(
        !vertices
            .keys()
            .any(|name| name.contains("/two") && !vertices[name]),
        "{vertices:?}"
    );
}

#[tokio::test(flavor = "multi_thread")]
async fn a_registry_cache_serves_another_engine() {
    let server = Registry::start().await;
    let state = steps(&server);
    let cache = server.reference("cache:t").to_string();
    let export = Build {
        state: &state,
        name: None,
        exports: vec![option("registry", &[("ref", &cache), ("mode", "max")])],
        imports: Vec::new(),
    };
    let (response, _) = export.run(&World::new()).await;
    assert!(response.exporter_response["cache.manifest"].contains("sha256:"));
    let (_, bytes) = server.manifest("cache", "t").unwrap();
    let manifest: Manifest = serde_json::from_slice(&bytes).unwrap();
    assert_eq!(manifest.config.media_type, media_type::BUILDKIT_CACHE_CONFIG);
    assert_eq!(manifest.layers.len(), 3);
    // The same cache in its older form.
    let mut entries = manifest.layers.clone();
    entries.push(manifest.config.clone());
    let index = serde_json::to_vec(&oci::Index::new(entries)).unwrap();
    server.add_manifest("cache", Some("index"), media_type::OCI_INDEX, index.into());

    // The last step is new; the one before is in the cache.
    let changed = with_file(&state, "/three", "3");
    for tag in ["t", "index"] {
        let cache = server.reference(&format!("cache:{tag}")).to_string();
        let import = Build {
            state: &changed,
            name: None,
            exports: Vec::new(),
            imports: vec![option("registry", &[("ref", &cache)])],
        };
        let (_, vertices) = import.run(&World::new()).await;
        assert!(cached_files(&vertices).contains(&true), "{vertices:?}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_local_cache_is_kept_by_the_client() {
    let server = Registry::start().await;
    let state = steps(&server);
    let world = World::new();
    let build = |exports, imports| Build {
        state: &state,
        name: None,
        exports,
        imports,
    };
    let exports = vec![option("local", &[("dest", "/cache"), ("mode", "max")])];
    let (response, _) = build(exports, Vec::new()).run(&world).await;
    let descriptor: oci::Descriptor =
        serde_json::from_str(&response.exporter_response["cache.manifest"]).unwrap();
    let blobs = world.client.blobs.lock().unwrap().clone();
    assert!(blobs.contains_key(&descriptor.digest));

    let other = World::new();
    *other.client.blobs.lock().unwrap() = blobs;
    let digest = descriptor.digest.to_string();
    let imports = vec![option("local", &[("src", "/cache"), ("digest", &digest)])];
    let (_, vertices) = build(Vec::new(), imports).run(&other).await;
    assert!(cached_files(&vertices).contains(&true), "{vertices:?}");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_broken_cache_is_an_empty_one() {
    let server = Registry::start().await;
    let state = steps(&server);
    let config = server.add_blob("cache", r#"{"layers":[{"parent":9}]}"#);
    let size = r#"{"layers":[{"parent":9}]}"#.len() as u64;
    let config = oci::Descriptor::new(media_type::BUILDKIT_CACHE_CONFIG, config, size);
    let manifest = serde_json::to_vec(&Manifest::new(config, Vec::new())).unwrap();
    server.add_manifest("cache", Some("t"), media_type::OCI_MANIFEST, manifest.into());
    let cache = server.reference("cache:t").to_string();
    let build = Build {
        state: &state,
        name: None,
        exports: Vec::new(),
        imports: vec![option("registry", &[("ref", &cache)])],
    };
    let (_, vertices) = build.run(&World::new()).await;
    assert!(!cached_files(&vertices).contains(&true), "{vertices:?}");
}

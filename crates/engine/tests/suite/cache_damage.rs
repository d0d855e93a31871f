//! Caches some of whose bytes are gone, cut off, others than they were, or slow to come.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Duration;

use async_trait::async_trait;
use engine::BuildError;
use engine::bridge::{Bridge, BridgeRequest, BuildResult, CacheOption, FileRange, Frontend, FrontendRequest};
use engine::job::JobId;
use engine::progress::Vertex;
use engine::solve::{ExporterRequest, SolveRequest, SolveResponse};
use llb::{MarshalOptions, State, pb};
use oci::Digest;
use testkit::image::{ImageBuilder, Layer};
use testkit::objects::Objects;
use testkit::registry::{Action, Registry};

use super::cache_shapes::copy;
use super::object_cache::{kinds, max};
use super::remote_cache::{Build, cached_files, option};
use super::world::{World, image, request, with_file};

/// A base of one layer, which is returned, and two steps on it.
fn steps(server: &Registry) -> (Layer, State) {
    let base = Layer::bulky("bin", 20_000);
    server.add_image("base", "t", &ImageBuilder::new().layer(base.clone()).build());
    let state = image(server.reference("base:t"));
    (base, with_file(&with_file(&state, "/one", "1"), "/two", "2"))
}

/// The caches of every type that can be changed behind the engine's back, as they are exported.
fn places(server: &Registry, objects: &Objects) -> Vec<CacheOption> {
    let cache = server.reference("cache:t").to_string();
    let mut places = vec![
        option("registry", &[("ref", &cache)]),
        option("registry", &[("ref", &cache), ("registry.insecure", "true")]),
        option("local", &[("dest", "/cache")]),
    ];
    places.extend(kinds(objects));
    places
}

/// Exports to a place; returns how to import from it.
async fn export(world: &World, state: &State, place: &CacheOption) -> CacheOption {
    let build = Build {
        state,
        name: None,
        exports: vec![max(place)],
        imports: Vec::new(),
    };
    let (response, _) = build.run(world).await;
    if place.kind != "local" {
        return place.clone();
    }
    let manifest = &response.exporter_response["cache.manifest"];
    let manifest: oci::Descriptor = serde_json::from_str(manifest).unwrap();
    let digest = manifest.digest.to_string();
    option("local", &[("src", "/cache"), ("digest", &digest)])
}

/// What happened to a blob.
#[derive(Clone, Copy, Debug, PartialEq)]
enum Damage {
    Gone,
    Short,
    Other,
}

impl Damage {
    fn applied(self, bytes: &[u8]) -> Vec<u8> {
        let mut bytes = bytes.to_vec();
        match self {
            Self::Gone => bytes.clear(),
            Self::Short => bytes.truncate(bytes.len() / 2),
            Self::Other => bytes[0] ^= 1,
        }
        bytes
    }
}

/// Damages blobs of a cache, wherever it is.
fn damage(server: &Registry, objects: &Objects, world: &World, digests: &[Digest], damage: Damage) {
    for digest in digests {
        let mut blobs = world.client.blobs.lock().unwrap();
        let stored = server.blob("cache", digest);
        if damage == Damage::Gone {
            server.remove_blob("cache", digest);
            blobs.remove(digest);
            objects.remove(&digest.to_string());
            continue;
        }
        if let Some(stored) = stored {
            server.replace_blob("cache", digest, damage.applied(&stored));
        }
        if let Some(kept) = blobs.get_mut(digest) {
            *kept = damage.applied(kept).into();
        }
        objects.damage(&digest.to_string(), |bytes| *bytes = damage.applied(bytes));
    }
}

/// Builds and pushes without any cache from elsewhere.
async fn push(world: &World, state: &State, server: &Registry, repository: &str) {
    let name = server.reference(&format!("{repository}:t")).to_string();
    let build = Build {
        state,
        name: Some(&name),
        exports: Vec::new(),
        imports: Vec::new(),
    };
    build.run(world).await;
}

/// Builds with a cache; returns the files that were made, not found.
async fn rebuild(world: &World, state: &State, name: &str, import: &CacheOption) -> Vec<String> {
    let build = Build {
        state,
        name: Some(name),
        exports: Vec::new(),
        imports: vec![import.clone()],
    };
    let (_, vertices) = build.run(world).await;
    let made = vertices.iter().filter(|(_, cached)| !**cached);
    let made = made.map(|(name, _)| name.clone());
    made.filter(|name| name.starts_with("mkfile")).collect()
}

/// The layers of an image, or of a cache.
fn layers(server: &Registry, repository: &str) -> Vec<Digest> {
    let (_, bytes) = server.manifest(repository, "t").unwrap();
    let manifest: oci::Manifest = serde_json::from_slice(&bytes).unwrap();
    manifest.layers.iter().map(|layer| layer.digest).collect()
}

#[tokio::test(flavor = "multi_thread")]
async fn a_layer_that_is_gone_or_short_is_a_miss_before_anything_counts_as_cached() {
    for kind in 0..7 {
        for done in [Damage::Gone, Damage::Short] {
            let (server, objects) = (Registry::start().await, Objects::start().await);
            let place = places(&server, &objects).swap_remove(kind);
            // GitHub's service does not tell how large an entry is.
            if place.kind == "gha" && done == Damage::Short {
                continue;
            }
            let (_, state) = steps(&server);
            let world = World::new();
            push(&world, &state, &server, "app").await;
            let import = export(&world, &state, &place).await;
            // The topmost layer: the step below is still to be had.
            let top = layers(&server, "app")[2];
            damage(&server, &objects, &world, &[top], done);
            let other = World::new();
            *other.client.blobs.lock().unwrap() = world.client.blobs.lock().unwrap().clone();
            server.clear_log();
            let again = server.reference("again:t").to_string();
            let made = rebuild(&other, &state, &again, &import).await;
            assert_eq!(made.len(), 1, "{place:?} {done:?}: {made:?}");
            assert!(made[0].contains("/two"), "{place:?} {done:?}: {made:?}");
            assert_eq!(layers(&server, "again")[..2], layers(&server, "app")[..2]);
            // It was not even tried to fetch it.
            assert_eq!(server.count("GET", &format!("cache/blobs/{top}")), 0, "{place:?}");
        }
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_step_is_made_anew_when_its_layer_proves_to_be_damaged() {
    // What is too short is found before, but for GitHub, whose service does not tell how large an entry is.
    let cases = (0..7)
        .map(|kind| (kind, Damage::Other))
        .chain([(5, Damage::Short)]);
    for (kind, done) in cases {
        let (server, objects) = (Registry::start().await, Objects::start().await);
        let place = places(&server, &objects).swap_remove(kind);
        let (base, state) = steps(&server);
        let world = World::new();
        push(&world, &state, &server, "app").await;
        let import = export(&world, &state, &place).await;
        // All of them: the base's is still whole where the image comes from.
        let mut damaged = layers(&server, "app");
        assert_eq!(damaged[0], base.descriptor.digest);
        if done == Damage::Short {
            damaged.drain(..2);
        }
        damage(&server, &objects, &world, &damaged, done);
        let other = World::new();
        *other.client.blobs.lock().unwrap() = world.client.blobs.lock().unwrap().clone();
        // A new step needs the bytes of those below it.
        let more = with_file(&state, "/three", "3");
        let again = server.reference("again:t").to_string();
        let made = rebuild(&other, &more, &again, &import).await;
        assert_eq!(
            made.len(),
            damaged.len().min(2) + 1,
            "{place:?} {done:?}: {made:?}"
        );
        push(&World::new(), &more, &server, "fresh").await;
        let again = layers(&server, "again");
        assert_eq!(again, layers(&server, "fresh"), "{place:?}");
        // What is known to be damaged in the cache's repository is not taken from there.
        for layer in again {
            let blob = server.blob("again", &layer).unwrap();
            assert_eq!(Digest::sha256(blob), layer, "{place:?} {done:?}");
        }
    }
}

/// Exporters that read the bytes of a result; the registry they push to does not have them.
fn readers(server: &Registry) -> Vec<ExporterRequest> {
    let name = server.reference("again:t").to_string();
    let reader = |kind: &str, attrs: &[(&str, &str)]| ExporterRequest {
        kind: kind.to_owned(),
        attrs: attrs
            .iter()
            .map(|(key, value)| ((*key).to_owned(), (*value).to_owned()))
            .collect(),
    };
    vec![
        reader("image", &[("name", &name), ("push", "true")]),
        reader(
            "image",
            &[
                ("name", &name),
                ("push", "true"),
                ("compression", "zstd"),
                ("force-compression", "true"),
            ],
        ),
        reader("oci", &[]),
        reader("oci", &[("tar", "false")]),
        reader("tar", &[]),
    ]
}

/// Builds with a cache for exporters; returns the steps that were made, how many warnings there were, and the vertices.
async fn export_again(
    world: &World,
    state: &State,
    exporters: Vec<ExporterRequest>,
    exports: Vec<CacheOption>,
    import: &CacheOption,
) -> (Vec<String>, usize, SolveResponse) {
    let id = format!(
        "again-{}",
        Digest::sha256(format!("{exporters:?} {exports:?}")).hex()
    );
    let solved = world
        .engine
        .solve(SolveRequest {
            id: id.clone(),
            session: Some(engine::session::SessionId("client".to_owned())),
            definition: Some(state.marshal(&MarshalOptions::default()).unwrap()),
            exporters,
            cache_exports: exports,
            cache_imports: vec![import.clone()],
            ..SolveRequest::default()
        })
        .await
        .unwrap();
    let progress = world.engine.job_progress(&JobId(id)).unwrap();
    let vertices = progress.vertices();
    for vertex in &vertices {
        assert_eq!(vertex.error, "", "{}", vertex.name);
    }
    let made = vertices.iter().filter(|vertex| !vertex.cached);
    let made = made.map(|vertex| vertex.name.clone());
    (
        made.filter(|name| name.starts_with("mkfile")).collect(),
        progress.warnings(),
        solved,
    )
}

#[tokio::test(flavor = "multi_thread")]
async fn a_step_is_made_anew_when_an_exporter_finds_its_layer_damaged() {
    for number in 0..5 {
        let (server, objects) = (Registry::start().await, Objects::start().await);
        let (_, state) = steps(&server);
        let place = places(&server, &objects).swap_remove(0);
        let world = World::new();
        push(&world, &state, &server, "app").await;
        let import = export(&world, &state, &place).await;
        // The topmost layer, then that of the step below as well.
        for first in [2, 1] {
            let target = Registry::start().await;
            let exporter = readers(&target).swap_remove(number);
            let damaged = layers(&server, "app").split_off(first);
            damage(&server, &objects, &world, &damaged, Damage::Other);
            let other = World::new();
            let exporters = vec![exporter.clone()];
            let (made, warnings, _) = export_again(&other, &state, exporters, Vec::new(), &import).await;
            assert_eq!(made.len(), damaged.len(), "{exporter:?}: {made:?}");
            assert!(warnings > 0, "{exporter:?}");
            if number == 0 {
                assert_eq!(layers(&target, "again"), layers(&server, "app"));
            }
            // What was made is found here from now on.
            let (made, warnings, _) =
                export_again(&other, &state, readers(&target), Vec::new(), &import).await;
            assert_eq!((made.len(), warnings), (0, 0), "{made:?}");
            // Back to how it was.
            damage(&server, &objects, &world, &damaged, Damage::Other);
        }
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn what_is_pushed_is_what_other_exporters_made_anew() {
    let (server, objects) = (Registry::start().await, Objects::start().await);
    let (_, state) = steps(&server);
    let import = places(&server, &objects).swap_remove(0);
    let mut packed = import.clone();
    for (key, value) in [("compression", "zstd"), ("force-compression", "true")] {
        packed.attrs.insert(key.to_owned(), value.to_owned());
    }
    let world = World::new();
    export(&world, &state, &packed).await;
    let top = layers(&server, "cache");
    damage(&server, &objects, &world, &top, Damage::Other);
    // The registry says that it has these layers, and only who reads them knows better.
    let name = server.reference("cache:again").to_string();
    let attrs = [("name", name.as_str()), ("push", "true")];
    let push = ExporterRequest {
        kind: "image".to_owned(),
        attrs: attrs
            .map(|(key, value)| (key.to_owned(), value.to_owned()))
            .into(),
    };
    let exporters = vec![push, readers(&server).pop().unwrap()];
    let (made, warnings, _) = export_again(&World::new(), &state, exporters, Vec::new(), &import).await;
    assert_eq!((made.len(), warnings > 0), (2, true), "{made:?}");
    let (_, bytes) = server.manifest("cache", "again").unwrap();
    let pushed: oci::Manifest = serde_json::from_slice(&bytes).unwrap();
    for layer in pushed.layers {
        let blob = server.blob("cache", &layer.digest).unwrap();
        assert_eq!(Digest::sha256(blob), layer.digest, "{top:?}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_cache_is_exported_whole_although_that_it_was_imported_from_is_damaged() {
    let (server, objects) = (Registry::start().await, Objects::start().await);
    let (_, state) = steps(&server);
    let import = places(&server, &objects).swap_remove(0);
    let world = World::new();
    push(&world, &state, &server, "app").await;
    export(&world, &state, &import).await;
    let all = layers(&server, "app");
    damage(&server, &objects, &world, &all[2..], Damage::Other);
    let target = Registry::start().await;
    let second = option("registry", &[("ref", &target.reference("second:t").to_string())]);
    let mut complete = max(&second);
    complete
        .attrs
        .insert("ignore-error".to_owned(), "false".to_owned());
    let other = World::new();
    let (made, warnings, response) = export_again(&other, &state, Vec::new(), vec![complete], &import).await;
    assert_eq!(made.len(), 1, "{made:?}");
    assert_eq!(omitted(&response), Vec::<serde_json::Value>::new());
    assert_eq!(warnings, 1);
    let mut exported = layers(&target, "second");
    let mut expected = all.clone();
    exported.sort();
    expected.sort();
    assert_eq!(exported, expected);
}

/// A frontend that reads a file of what it builds with a cache.
#[derive(Debug)]
struct Reads {
    definition: pb::Definition,
    import: CacheOption,
}

#[async_trait]
impl Frontend for Reads {
    async fn solve(&self, bridge: &Bridge, _: FrontendRequest) -> Result<BuildResult, BuildError> {
        let request = BridgeRequest {
            definition: Some(self.definition.clone()),
            cache_imports: vec![self.import.clone()],
            ..BridgeRequest::default()
        };
        let result = bridge.solve(request).await?;
        let reference = result.single.as_ref().unwrap();
        let read = reference.read_file("/two", FileRange::default()).await?;
        assert_eq!(read, "2");
        Ok(result)
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_frontend_reads_what_is_made_anew_of_a_damaged_layer() {
    let (server, objects) = (Registry::start().await, Objects::start().await);
    let (_, state) = steps(&server);
    let place = places(&server, &objects).swap_remove(0);
    let world = World::new();
    push(&world, &state, &server, "app").await;
    let import = export(&world, &state, &place).await;
    damage(
        &server,
        &objects,
        &world,
        &layers(&server, "app")[1..],
        Damage::Other,
    );
    let definition = state.marshal(&MarshalOptions::default()).unwrap();
    let frontend: Arc<dyn Frontend> = Arc::new(Reads { definition, import });
    let other = World::with_frontend(BTreeMap::from([("reads".to_owned(), frontend)]));
    let solved = other.solve(SolveRequest {
        frontend: "reads".to_owned(),
        ..request("oci", &[])
    });
    solved.await.unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn what_cannot_be_made_anew_fails_with_the_blob_and_its_place() {
    let (server, objects) = (Registry::start().await, Objects::start().await);
    let (base, state) = steps(&server);
    let import = places(&server, &objects).swap_remove(0);
    let world = World::new();
    export(&world, &state, &import).await;
    let digest = base.descriptor.digest;
    damage(&server, &objects, &world, &[digest], Damage::Other);
    server.remove_blob("base", &digest);
    let other = World::new();
    let solved = other.solve(SolveRequest {
        definition: Some(state.marshal(&MarshalOptions::default()).unwrap()),
        cache_imports: vec![import],
        ..request("oci", &[])
    });
    let error = solved.await.unwrap_err().to_string();
    assert!(error.contains(&digest.to_string()), "{error}");
    assert!(error.contains("cannot be made anew"), "{error}");
    let progress = other.engine.job_progress(&JobId("build-0".to_owned())).unwrap();
    assert!(progress.warnings() > 0);
}

#[tokio::test(flavor = "multi_thread")]
async fn what_one_place_has_damaged_comes_from_another() {
    let server = Registry::start().await;
    let (base, state) = steps(&server);
    let place = option("registry", &[("ref", &server.reference("cache:t").to_string())]);
    export(&World::new(), &state, &place).await;
    let digest = base.descriptor.digest;
    server.replace_blob("cache", &digest, Damage::Other.applied(&base.blob));
    server.clear_log();
    let world = World::new();
    // The base is known by where the image is, before the cache tells of its own copy.
    world.resolve(&image(server.reference("base:t"))).await.unwrap();
    let more = with_file(&state, "/three", "3");
    let name = server.reference("app:t").to_string();
    let made = rebuild(&world, &more, &name, &place).await;
    assert_eq!(made.len(), 1, "{made:?}");
    for repository in ["base", "cache"] {
        let asked = server.count("GET", &format!("/{repository}/blobs/{digest}"));
        assert_eq!(asked, 1, "{repository}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn what_cannot_be_exported_any_more_is_listed() {
    let (server, objects) = (Registry::start().await, Objects::start().await);
    let (base, state) = steps(&server);
    let first = option("registry", &[("ref", &server.reference("first:t").to_string())]);
    let world = World::new();
    let import = export(&world, &state, &first).await;
    for (number, place) in places(&server, &objects).into_iter().enumerate() {
        for complete in [false, true] {
            let lazy = World::new();
            let found = Build {
                state: &state,
                name: None,
                exports: Vec::new(),
                imports: vec![import.clone()],
            };
            let (_, vertices) = found.run(&lazy).await;
            assert!(cached_files(&vertices).contains(&true), "{vertices:?}");
            // Nothing was fetched so far, and now the base's layer is nowhere: nothing can be made anew either.
            for repository in ["base", "first"] {
                server.remove_blob(repository, &base.descriptor.digest);
            }
            let mut place = max(&place);
            if complete {
                place.attrs.insert("ignore-error".to_owned(), "false".to_owned());
            }
            let id = format!("{number}-{complete}");
            let solved = lazy
                .engine
                .solve(SolveRequest {
                    id: id.clone(),
                    session: Some(engine::session::SessionId("client".to_owned())),
                    definition: Some(state.marshal(&MarshalOptions::default()).unwrap()),
                    cache_exports: vec![place.clone()],
                    ..SolveRequest::default()
                })
                .await;
            let progress = lazy.engine.job_progress(&JobId(id)).unwrap();
            // The last step's result was found, and cannot be had; the other's never was here.
            assert!(progress.warnings() > 0, "{place:?} {solved:?}");
            for repository in ["base", "first"] {
                server.add_blob(repository, base.blob.clone());
            }
            match solved {
                Ok(response) => {
                    assert!(!complete, "{place:?}");
                    let told = &response.exporter_response["cooper.cache.omitted"];
                    let told: serde_json::Value = serde_json::from_str(told).unwrap();
                    assert_eq!(told.as_array().unwrap().len(), 2, "{told}");
                    assert!(told[0]["record"].as_str().unwrap().starts_with("sha256:"));
                    let reason = told[0]["reason"].as_str().unwrap();
                    let gone = format!("layer {}: ", base.descriptor.digest);
                    assert!(
                        reason.starts_with(&gone) && reason.ends_with("not found"),
                        "{reason}"
                    );
                    assert_eq!(told[1]["count"], 1, "{told}");
                }
                Err(error) => {
                    assert!(complete, "{place:?}: {error}");
                    assert!(error.to_string().contains("left out 1 result,"), "{error}");
                }
            }
        }
    }
}

/// What the response lists as left out.
fn omitted(response: &SolveResponse) -> Vec<serde_json::Value> {
    let told = response.exporter_response.get("cooper.cache.omitted");
    told.map_or(Vec::new(), |told| serde_json::from_str(told).unwrap())
}

/// A step on a state that its definition wants left out of caches.
fn kept_out(state: &State, path: &str) -> State {
    let made = llb::MkfileOptions {
        created_ns: Some(1_000_000_000_000),
        ..llb::MkfileOptions::default()
    };
    let file = llb::FileActions::new().mkfile(path, 0o644, "kept out", made);
    state.file(file, &llb::Constraints::new().export_cache(false))
}

#[tokio::test(flavor = "multi_thread")]
async fn what_is_kept_out_of_caches_on_purpose_is_listed_and_no_failure() {
    let (server, objects) = (Registry::start().await, Objects::start().await);
    let (_, below) = steps(&server);
    let state = with_file(&kept_out(&below, "/secret"), "/above", "4");
    for place in places(&server, &objects) {
        let world = World::new();
        let mut large = max(&place);
        large.attrs.insert("ignore-error".to_owned(), "false".to_owned());
        let build = Build {
            state: &state,
            name: None,
            exports: vec![large],
            imports: Vec::new(),
        };
        let (response, _) = build.run(&world).await;
        let [told] = &omitted(&response)[..] else {
            panic!("{place:?}: {response:?}");
        };
        assert!(told["record"].as_str().unwrap().starts_with("sha256:"), "{told}");
        assert_eq!(
            told["reason"],
            "the build's definition wants it left out of caches"
        );
        let progress = world.engine.job_progress(&JobId("build-0".to_owned())).unwrap();
        assert_eq!(progress.warnings(), 1, "{place:?}");
        let is_kept_out = |vertex: &&Vertex| vertex.digest.to_string() == told["record"].as_str().unwrap();
        let vertices = progress.vertices();
        let vertex = vertices.iter().find(is_kept_out).unwrap();
        assert!(vertex.name.contains("/secret"), "{vertex:?}");
    }
    // It alone is made anew where its result is asked for.
    let place = option("registry", &[("ref", &server.reference("cache:t").to_string())]);
    let name = server.reference("app:t").to_string();
    let more = with_file(&kept_out(&below, "/secret"), "/other", "5");
    let made = rebuild(&World::new(), &more, &name, &place).await;
    assert_eq!(made.len(), 2, "{made:?}");
    assert!(!made.iter().any(|step| step.contains("/two")), "{made:?}");
    assert_eq!(
        rebuild(&World::new(), &state, &name, &place).await,
        Vec::<String>::new()
    );
}

#[tokio::test(flavor = "multi_thread")]
async fn what_is_not_among_the_records_of_an_image_is_listed() {
    let server = Registry::start().await;
    let (_, below) = steps(&server);
    let base = image(server.reference("base:t"));
    let name = server.reference("app:t").to_string();
    for (state, kept_out, reason) in [
        (&below, false, None),
        (
            &kept_out(&below, "/secret"),
            true,
            Some("the build's definition wants it left out of caches"),
        ),
        (
            &base,
            false,
            Some("the image has no inline cache: no step's result consists of its layers"),
        ),
    ] {
        let world = World::new();
        let build = Build {
            state,
            name: Some(&name),
            exports: vec![option("inline", &[("ignore-error", "false")])],
            imports: Vec::new(),
        };
        let (response, _) = build.run(&world).await;
        let told = omitted(&response);
        let reasons: Vec<_> = told
            .iter()
            .map(|entry| entry["reason"].as_str().unwrap())
            .collect();
        assert_eq!(reasons, Vec::from_iter(reason));
        assert!(
            told.iter().all(|entry| entry["record"].is_string() == kept_out),
            "{told:?}"
        );
        let progress = world.engine.job_progress(&JobId("build-0".to_owned())).unwrap();
        assert_eq!(progress.warnings(), told.len());
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn what_a_smaller_cache_never_had_is_no_failure_of_a_larger_one() {
    let server = Registry::start().await;
    let (_, state) = steps(&server);
    // A step whose result is no part of the last one's.
    let aside = with_file(&image(server.reference("base:t")), "/aside", "x");
    let state = copy(&aside, "/aside", &state);
    let small = option("registry", &[("ref", &server.reference("small:t").to_string())]);
    let build = |exports, imports| Build {
        state: &state,
        name: None,
        exports,
        imports,
    };
    build(vec![small.clone()], Vec::new()).run(&World::new()).await;
    let mut large = max(&option(
        "registry",
        &[("ref", &server.reference("large:t").to_string())],
    ));
    large.attrs.insert("ignore-error".to_owned(), "false".to_owned());
    let world = World::new();
    // With the small cache at hand, and with what is left of it.
    // Then the steps below the last one are known without their results as well.
    for (number, (imports, without)) in [(vec![small], 1), (Vec::new(), 3)].into_iter().enumerate() {
        let (response, vertices) = build(vec![large.clone()], imports).run(&world).await;
        assert!(
            cached_files(&vertices).iter().all(|cached| *cached),
            "{vertices:?}"
        );
        let told = omitted(&response);
        assert_eq!(told.len(), 1, "{told:?}");
        assert_eq!(told[0]["count"], without, "{told:?}");
        assert_eq!(told[0]["records"].as_array().unwrap().len(), without, "{told:?}");
        let progress = world
            .engine
            .job_progress(&JobId(format!("build-{number}")))
            .unwrap();
        assert_eq!(progress.warnings(), 0);
    }
    // What it took along is as good as before.
    assert_eq!(layers(&server, "large"), layers(&server, "small"));
    let import = option("registry", &[("ref", &server.reference("large:t").to_string())]);
    let (_, vertices) = build(Vec::new(), vec![import]).run(&World::new()).await;
    assert!(
        cached_files(&vertices).iter().all(|cached| *cached),
        "{vertices:?}"
    );
}

#[tokio::test(flavor = "multi_thread")]
async fn a_registry_in_trouble_is_waited_for() {
    let server = Registry::start().await;
    let (_, state) = steps(&server);
    let place = option("registry", &[("ref", &server.reference("cache:t").to_string())]);
    let trouble = || {
        let later = vec![("Retry-After", "0".to_owned())];
        server.fault("", "/cache/", 1, Action::Status(429, later, ""));
        server.fault("", "/cache/", 1, Action::Status(503, Vec::new(), "slow down"));
        server.fault("", "/cache/", 1, Action::Reset);
        server.fault("", "/cache/", 1, Action::Delay(Duration::from_millis(20)));
    };
    trouble();
    server.fault("PUT", "/cache/", 1, Action::ResetUpload(100));
    export(&World::new(), &state, &place).await;
    assert_eq!(layers(&server, "cache").len(), 3);
    trouble();
    // What is cut off goes on where it broke; what lies is asked again, or not believed.
    server.fault("GET", "/cache/blobs/", 2, Action::Truncate(50));
    let more = with_file(&state, "/three", "3");
    let name = server.reference("app:t").to_string();
    let made = rebuild(&World::new(), &more, &name, &place).await;
    assert_eq!(made.len(), 1, "{made:?}");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_registry_that_gives_nothing_is_an_empty_cache() {
    let troubles = [
        Action::Status(429, vec![("Retry-After", "0".to_owned())], ""),
        Action::Status(503, Vec::new(), ""),
        Action::Status(403, Vec::new(), ""),
        Action::Reset,
        Action::Corrupt,
        Action::Truncate(10),
        Action::WrongDigestHeader(Digest::sha256("other")),
    ];
    let server = Registry::start().await;
    let (_, state) = steps(&server);
    let place = option("registry", &[("ref", &server.reference("cache:t").to_string())]);
    export(&World::new(), &state, &place).await;
    let more = with_file(&state, "/three", "3");
    for trouble in troubles {
        server.fault("", "/cache/", usize::MAX, trouble.clone());
        let world = World::new();
        let solved = world.solve(SolveRequest {
            definition: Some(more.marshal(&MarshalOptions::default()).unwrap()),
            cache_imports: vec![place.clone()],
            ..request("image", &[])
        });
        solved.await.unwrap();
        let progress = world.engine.job_progress(&JobId("build-0".to_owned())).unwrap();
        let is_made = |vertex: &&Vertex| vertex.name.starts_with("mkfile") && !vertex.cached;
        let vertices = progress.vertices();
        assert_eq!(
            vertices.iter().filter(is_made).count(),
            3,
            "{trouble:?}: {vertices:?}"
        );
        // It is told where the cache is imported, and fails nothing.
        let import = vertices
            .iter()
            .find(|vertex| vertex.name.starts_with("importing cache"));
        assert_ne!(import.unwrap().error, "", "{trouble:?}");
        server.clear_faults();
    }
}

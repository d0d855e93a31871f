//! Caches of what is merged and of what differs: all of it is found again on an empty engine, and is what it was.

use std::collections::BTreeMap;

use engine::solve::SolveRequest;
use llb::{Constraints, MarshalOptions, State};
use testkit::image::{ImageBuilder, LayerBuilder};
use testkit::registry::Registry;

use super::cache_shapes::{copy, layers};
use super::image_export::archive;
use super::remote_cache::{Build, option};
use super::world::{World, image, request, with_file};

/// Two images of two layers each, none of which is needed to merge.
fn bases(server: &Registry) -> (State, State) {
    let base = |name: &str| {
        let layer = |number: usize| {
            let content = format!("{name} {number}").repeat(1_000);
            LayerBuilder::new()
                .file(&format!("{name}/{number}"), content)
                .build()
        };
        server.add_image(
            name,
            "t",
            &ImageBuilder::new().layer(layer(1)).layer(layer(2)).build(),
        );
        image(server.reference(&format!("{name}:t")))
    };
    (base("one"), base("two"))
}

/// A copy onto nothing that is merged onto a state, as `COPY --link` is.
fn link(from: &State, path: &str, onto: &State) -> State {
    llb::merge([onto, &copy(from, path, &State::scratch())], &Constraints::new())
}

/// What is merged or differs, each with a name.
fn shapes(server: &Registry) -> Vec<(&'static str, State)> {
    let constraints = Constraints::new();
    let (one, two) = bases(server);
    let made = with_file(&one, "/made", "1");
    let linked = link(&made, "/made", &two);
    let changes = llb::diff(
        &two,
        &with_file(&with_file(&two, "/a", "x"), "/b", "y"),
        &constraints,
    );
    // Not one on top of the other: what differs is found out by comparing the trees.
    let compared = llb::diff(&made, &with_file(&two, "/other", "2"), &constraints);
    vec![
        ("images", llb::merge([&one, &two], &constraints)),
        ("link", linked.clone()),
        ("links", link(&with_file(&two, "/more", "3"), "/more", &linked)),
        (
            "above",
            with_file(&with_file(&linked, "/above", "4"), "/above-that", "5"),
        ),
        ("changes", changes.clone()),
        ("compared", compared.clone()),
        (
            "all",
            with_file(
                &llb::merge([&linked, &changes, &compared], &constraints),
                "/last",
                "6",
            ),
        ),
    ]
}

/// The steps that were made, not found. What a build reads and writes is none.
fn made(vertices: &BTreeMap<String, bool>) -> Vec<String> {
    let other = ["exporting", "importing", "docker-image://", "pushing"];
    let steps = vertices
        .iter()
        .filter(|(name, _)| !other.iter().any(|other| name.starts_with(other)));
    steps
        .filter(|(_, cached)| !**cached)
        .map(|(name, _)| name.clone())
        .collect()
}

/// The files of a state, built with a cache.
async fn files(world: &World, state: &State, imports: &[&str]) -> BTreeMap<String, Vec<u8>> {
    let import = |name: &&str| option("registry", &[("ref", *name)]);
    let solved = world.solve(SolveRequest {
        definition: Some(state.marshal(&MarshalOptions::default()).unwrap()),
        cache_imports: imports.iter().map(import).collect(),
        ..request("tar", &[])
    });
    solved.await.unwrap();
    let bytes = world.client.file.lock().unwrap().clone();
    archive(&bytes)
}

#[tokio::test(flavor = "multi_thread")]
async fn merges_and_differences_are_found_whole_and_lazily() {
    for (number, (shape, _)) in shapes(&Registry::start().await).into_iter().enumerate() {
        let server = Registry::start().await;
        let state = shapes(&server).swap_remove(number).1;
        let name = |repository: &str| server.reference(&format!("{repository}:t")).to_string();
        let (first, second) = (name("first"), name("second"));
        let export = |to: &str, imports: &[&str]| {
            let import = |name: &&str| option("registry", &[("ref", *name)]);
            Build {
                state: &state,
                name: None,
                exports: vec![option(
                    "registry",
                    &[("ref", to), ("mode", "max"), ("ignore-error", "false")],
                )],
                imports: imports.iter().map(import).collect(),
            }
        };
        let world = World::new();
        let (response, vertices) = export(&first, &[]).run(&world).await;
        assert!(!made(&vertices).is_empty(), "{shape}: {vertices:?}");
        assert_eq!(
            response.exporter_response.get("cooper.cache.omitted"),
            None,
            "{shape}"
        );
        let expected = files(&world, &state, &[]).await;
        // On an empty engine all is found, and exported again, from where it is.
        server.clear_log();
        let (response, vertices) = export(&second, &[&first]).run(&World::new()).await;
        assert_eq!(made(&vertices), Vec::<String>::new(), "{shape}");
        assert_eq!(
            response.exporter_response.get("cooper.cache.omitted"),
            None,
            "{shape}"
        );
        assert_eq!(layers(&server, "first"), layers(&server, "second"), "{shape}");
        for layer in layers(&server, "first") {
            assert_eq!(
                server.count("GET", &layer.to_string()),
                0,
                "{shape}: {:?}",
                server.log()
            );
        }
        // What was exported from what is lazy is as good, also when nothing else has the layers.
        for base in ["one", "two", "first"] {
            for layer in layers(&server, "second") {
                server.remove_blob(base, &layer);
            }
        }
        let other = World::new();
        assert_eq!(files(&other, &state, &[&second]).await, expected, "{shape}");
        let import = vec![option("registry", &[("ref", &second)])];
        let app = name("app");
        let again = Build {
            state: &state,
            name: Some(&app),
            exports: Vec::new(),
            imports: import,
        };
        let (_, vertices) = again.run(&World::new()).await;
        assert_eq!(made(&vertices), Vec::<String>::new(), "{shape}");
    }
}

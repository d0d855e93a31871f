//! Caches in object stores, exported by one engine and imported by another.

use std::collections::BTreeMap;
use std::time::{Duration, Instant};

use base64::Engine;
use base64::engine::general_purpose::URL_SAFE_NO_PAD;
use engine::bridge::CacheOption;
use engine::solve::SolveResponse;
use llb::State;
use testkit::image::{ImageBuilder, Layer};
use testkit::objects::Objects;
use testkit::registry::{Action, Registry};

use super::remote_cache::{Build, cached_files, option};
use super::world::{World, image, with_file};

const SECRET: &str = "aGlkZGVuLXNlY3JldA==";

/// A token for two branches, of which one may be written to; its last part is what must not be seen.
fn token() -> String {
    let scopes =
        r#"[{\"Scope\":\"refs/heads/main\",\"Permission\":1},{\"Scope\":\"refs/heads/b\",\"Permission\":3}]"#;
    let claims = format!(r#"{{"ac":"{scopes}","exp":99999999999,"nbf":1}}"#);
    format!("e30.{}.{SECRET}", URL_SAFE_NO_PAD.encode(claims))
}

/// The kinds of stores, each with its attributes.
pub fn kinds(objects: &Objects) -> Vec<CacheOption> {
    let (s3, azure, github) = (objects.url("s3"), objects.url("azure"), objects.url("github"));
    let token = token();
    let s3 = [
        ("bucket", "b"),
        ("region", "eu-1"),
        ("endpoint_url", &s3),
        ("use_path_style", "true"),
        ("access_key_id", "id"),
        ("secret_access_key", SECRET),
        ("prefix", "p/"),
        ("name", "one;two"),
    ];
    // The account is in the URL's path for stores that are reached by address; here the path is the account's root.
    let azure = [
        ("account_url", azure.trim_end_matches('/')),
        ("account_name", "acc"),
        ("container", "c"),
        ("secret_access_key", SECRET),
    ];
    let first = [("url", github.as_str()), ("token", &token), ("scope", "app")];
    let second = [("url_v2", github.as_str()), ("token", &token), ("scope", "app2")];
    vec![
        option("s3", &s3),
        option("azblob", &azure),
        option("gha", &first),
        option("gha", &second),
    ]
}

pub fn max(kind: &CacheOption) -> CacheOption {
    let mut kind = kind.clone();
    kind.attrs.insert("mode".to_owned(), "max".to_owned());
    kind
}

fn steps(server: &Registry, size: usize) -> State {
    let base = ImageBuilder::new().layer(Layer::bulky("bin", size)).build();
    server.add_image("base", "t", &base);
    let state = image(server.reference("base:t"));
    with_file(&with_file(&state, "/one", "1"), "/two", "2")
}

async fn export(world: &World, state: &State, kind: &CacheOption) -> SolveResponse {
    let build = Build {
        state,
        name: None,
        exports: vec![max(kind)],
        imports: Vec::new(),
    };
    build.run(world).await.0
}

async fn import(
    world: &World,
    state: &State,
    name: &str,
    kind: &CacheOption,
) -> (SolveResponse, BTreeMap<String, bool>) {
    let build = Build {
        state,
        name: Some(name),
        exports: Vec::new(),
        imports: vec![kind.clone()],
    };
    build.run(world).await
}

fn layers(server: &Registry, repository: &str) -> Vec<oci::Descriptor> {
    let (_, bytes) = server.manifest(repository, "t").unwrap();
    serde_json::from_slice::<oci::Manifest>(&bytes).unwrap().layers
}

fn digest(response: &SolveResponse) -> &str {
    &response.exporter_response["containerimage.digest"]
}

#[tokio::test(flavor = "multi_thread")]
async fn every_kind_of_store_serves_another_engine() {
    let server = Registry::start().await;
    let objects = Objects::start().await;
    // More than one part.
    let state = steps(&server, 17 << 20);
    let world = World::new();
    let name = server.reference("app:t").to_string();
    let expected = Build {
        state: &state,
        name: Some(&name),
        exports: Vec::new(),
        imports: Vec::new(),
    };
    expected.run(&world).await;
    for kind in kinds(&objects) {
        let response = export(&world, &state, &kind).await;
        let shown = format!("{response:?}");
        assert!(!shown.contains(SECRET), "{shown}");
        let writes = |objects: &Objects| -> usize {
            let blobs = objects
                .paths()
                .into_iter()
                .filter(|path| path.contains("sha256:"));
            blobs.map(|path| objects.writes(&path)).sum()
        };
        let written = writes(&objects);
        let other = World::new();
        let name = server.reference("again:t").to_string();
        let (again, vertices) = import(&other, &state, &name, &kind).await;
        assert!(!digest(&again).is_empty());
        // These caches do not keep what made a layer, which is in the image's history.
        assert_eq!(layers(&server, "again"), layers(&server, "app"), "{}", kind.kind);
        assert!(cached_files(&vertices).contains(&true), "{vertices:?}");
        assert!(
            !vertices
                .iter()
                .any(|(name, cached)| name.contains("/two") && !cached),
            "{vertices:?}"
        );
        let secret_dir = other.files_with(SECRET);
        assert!(secret_dir.is_empty(), "{secret_dir:?}");
        // What is there is not sent again, but made young where that is a copy within the store.
        export(&world, &state, &kind).await;
        let touched = if kind.kind == "s3" { written } else { 0 };
        assert_eq!(writes(&objects), written + touched, "{}", kind.kind);
    }
    check_layout(&objects);
}

/// Objects are where others look for them, and no request tells a secret in its path.
fn check_layout(objects: &Objects) {
    let paths = objects.paths();
    for expected in [
        "/s3/b/p/manifests/one",
        "/s3/b/p/manifests/two",
        "/s3/b/p/blobs/sha256:",
        "/azure/c/manifests/buildkit",
        "/azure/c/blobs/sha256:",
    ] {
        assert!(
            paths.iter().any(|path| path.starts_with(expected)),
            "{expected}: {paths:?}"
        );
    }
    let keys = objects.keys();
    for expected in ["buildkit-blob-1-sha256:", "index-app-1-", "index-app2-1-"] {
        assert!(
            keys.iter().any(|key| key.starts_with(expected)),
            "{expected}: {keys:?}"
        );
    }
    assert!(
        keys.iter()
            .any(|key| key.starts_with("index-app-1-") && key.ends_with("#2")),
        "{keys:?}"
    );
    let seen = format!(
        "{:?}",
        objects.seen().iter().map(|seen| &seen.target).collect::<Vec<_>>()
    );
    assert!(!seen.contains(SECRET));
}

#[tokio::test(flavor = "multi_thread")]
async fn trouble_passes() {
    let server = Registry::start().await;
    let state = steps(&server, 100_000);
    let objects = Objects::start().await;
    let world = World::new();
    for (round, kind) in kinds(&objects).into_iter().enumerate() {
        let retry = || Action::Status(429, vec![("Retry-After", "0".to_owned())], "");
        objects.fault("", "", 1, retry());
        objects.fault("", "", 1, Action::Status(503, Vec::new(), "slow down"));
        objects.fault("", "", 1, Action::Reset);
        export(&world, &state, &kind).await;
        objects.fault("GET", "", 1, Action::Status(500, Vec::new(), ""));
        // GitHub's bytes are at other places than their names.
        let blobs = if kind.kind == "gha" {
            "/signed/"
        } else {
            "sha256%3A"
        };
        objects.fault("GET", blobs, 2, Action::Truncate(20));
        objects.fault("", "", 1, retry());
        let name = server.reference(&format!("again{round}:t")).to_string();
        let (_, vertices) = import(&World::new(), &state, &name, &kind).await;
        assert!(
            cached_files(&vertices).contains(&true),
            "{}: {vertices:?}",
            kind.kind
        );
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_store_is_left_alone_for_as_long_as_it_asks() {
    let server = Registry::start().await;
    let state = steps(&server, 1000);
    let objects = Objects::start().await;
    for kind in kinds(&objects) {
        // For longer than any first wait of its own.
        let later = vec![("Retry-After", "1".to_owned())];
        objects.fault("", "", 1, Action::Status(429, later, ""));
        let start = Instant::now();
        export(&World::new(), &state, &kind).await;
        assert!(start.elapsed() >= Duration::from_secs(1), "{}", kind.kind);
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn an_expired_layer_is_a_miss() {
    let server = Registry::start().await;
    let state = steps(&server, 1000);
    let objects = Objects::start().await;
    let world = World::new();
    for kind in kinds(&objects) {
        export(&world, &state, &kind).await;
        let name = server.reference("app:t").to_string();
        // Later builds of the same engine do not import it: what they cannot reach they make.
        let other = World::new();
        import(&other, &state, &name, &kind).await;
        for part in ["/blobs/", "buildkit-blob"] {
            objects.remove(part);
        }
        let (response, vertices) = import(&World::new(), &state, &name, &kind).await;
        assert!(
            !cached_files(&vertices).contains(&true),
            "{}: {vertices:?}",
            kind.kind
        );
        assert!(!digest(&response).is_empty());
        let again = Build {
            state: &state,
            name: Some(&name),
            exports: Vec::new(),
            imports: Vec::new(),
        };
        let (again, _) = again.run(&other).await;
        assert!(!digest(&again).is_empty());
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_store_that_cannot_be_written_fails_the_build_unless_that_is_ignored() {
    let server = Registry::start().await;
    let state = steps(&server, 1000);
    let objects = Objects::start().await;
    let world = World::new();
    for kind in kinds(&objects) {
        for ignored in [false, true] {
            objects.fault(
                "",
                "",
                usize::MAX,
                Action::Status(403, Vec::new(), "<E><Code>AccessDenied</Code></E>"),
            );
            let mut kind = max(&kind);
            kind.attrs.insert("ignore-error".to_owned(), ignored.to_string());
            let mut request = super::world::request("image", &[]);
            request.definition = Some(state.marshal(&llb::MarshalOptions::default()).unwrap());
            request.cache_exports = vec![kind];
            let solved = world.solve(request).await;
            match solved {
                Ok(_) => assert!(ignored),
                Err(error) => {
                    let text = format!("{error} {error:?}");
                    assert!(!ignored && text.contains("403"), "{text}");
                    assert!(!text.contains(SECRET), "{text}");
                }
            }
        }
    }
}

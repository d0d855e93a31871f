//! Caches as other builders write them: each document is written out here, after the format and not by our exporter.

use std::time::{Duration, UNIX_EPOCH};

use build::progress::VertexProgress;
use build::session::{Session, SessionError, SessionGroup, SessionId, Sessions};
use oci::Reference;
use registry::{Client, HostsConfig};
use serde_json::{Value, json};
use solver::{Key, Link, Query, RecordId, StoreId};
use testkit::registry::Registry;
use tokio_util::sync::CancellationToken;

use super::*;

const REPOSITORY: &str = "cache";

/// No client at all.
#[derive(Debug)]
struct Nobody;

#[async_trait]
impl Sessions for Nobody {
    async fn get(&self, id: &SessionId) -> Result<Arc<dyn Session>, SessionError> {
        Err(SessionError::NoSession {
            id: id.to_string(),
            reason: "there are none".into(),
        })
    }

    fn try_get(&self, _: &SessionId) -> Option<Arc<dyn Session>> {
        None
    }
}

fn digest(name: &str) -> Digest {
    Digest::sha256(name)
}

/// The digest under which a step without inputs, or any step, is known: of its op and its first output.
fn step(name: &str) -> String {
    RecordId::root(&digest(name), 0).0.to_string()
}

/// A layer's descriptor as a cache's manifest has it.
fn layer(kind: &str, name: &str) -> Value {
    json!({
        "mediaType": kind, "digest": digest(name).to_string(), "size": 1234,
        "annotations": {
            "buildkit/createdat": "2021-02-03T04:05:06.789Z",
            "containerd.io/uncompressed": digest(&format!("plain {name}")).to_string(),
        },
    })
}

/// An image and a part of the context, and a step on both of two layers; then one more on that. A zero is not written.
fn config() -> Value {
    json!({
        "layers": [
            {"blob": digest("lower").to_string(), "parent": -1},
            {"blob": digest("upper").to_string()},
            {"blob": digest("top").to_string(), "parent": 1},
        ],
        "records": records(json!({"layers": [{"layer": 1, "createdAt": "2021-02-03T04:05:07Z"}]})),
    })
}

/// The records, with the result of the first step that has one.
fn records(result: Value) -> Value {
    let mut run = json!({
        "digest": step("run"),
        "inputs": [[{"link": 1}], [{"selector": digest("/src").to_string(), "link": 2}]],
    });
    for (key, value) in result.as_object().unwrap() {
        run[key] = value.clone();
    }
    json!([
        run,
        {"digest": step("image")},
        {"digest": step("context")},
        {
            "layers": [{"layer": 2, "createdAt": "2021-02-03T04:05:08Z"}],
            "digest": step("after"),
            "inputs": [[{"link": 0}]],
        },
    ])
}

fn put(server: &Registry, kind: &str, document: &Value) -> Value {
    let bytes = document.to_string();
    let digest = server.add_blob(REPOSITORY, bytes.clone());
    json!({"mediaType": kind, "digest": digest.to_string(), "size": bytes.len()})
}

fn put_manifest(server: &Registry, kind: &str, mut document: Value) -> Value {
    document["schemaVersion"] = 2.into();
    document["mediaType"] = kind.into();
    let stored = server.add_manifest(REPOSITORY, None, kind, document.to_string().into());
    json!({"mediaType": kind, "digest": stored.digest.to_string(), "size": stored.size})
}

fn layers(kind: &str) -> Vec<Value> {
    ["lower", "upper", "top"].map(|name| layer(kind, name)).to_vec()
}

/// The form that all registries take: the configuration is that of an image manifest.
fn image_manifest(server: &Registry, config: &Value) -> Value {
    let config = put(server, media_type::BUILDKIT_CACHE_CONFIG, config);
    let manifest = json!({"config": config, "layers": layers(media_type::OCI_LAYER_GZIP)});
    put_manifest(server, media_type::OCI_MANIFEST, manifest)
}

/// The older form: layers and configuration are entries of an index.
fn index(server: &Registry, kind: &str, layer_kind: &str) -> Value {
    let mut entries = layers(layer_kind);
    entries.push(put(server, media_type::BUILDKIT_CACHE_CONFIG, &config()));
    put_manifest(server, kind, json!({ "manifests": entries }))
}

/// An image with records in its configuration, whose layers are the image's own.
fn inline(server: &Registry, records: &Value) -> Value {
    let diff_id = |name: &str| digest(&format!("plain {name}")).to_string();
    let made = |by: &str| json!({"created": "2021-02-03T04:05:06Z", "created_by": by});
    let image = put(
        server,
        media_type::OCI_CONFIG,
        &json!({
            "architecture": "amd64", "os": "linux", "config": {},
            "rootfs": {"type": "layers", "diff_ids": [diff_id("lower"), diff_id("upper"), diff_id("top")]},
            "history": [made("base"), {"created_by": "ENV a=b", "empty_layer": true}, made("RUN it"), made("after")],
            "moby.buildkit.cache.v0": STANDARD.encode(records.to_string()),
        }),
    );
    let mut layers = layers(media_type::OCI_LAYER_GZIP);
    for layer in &mut layers {
        layer.as_object_mut().unwrap().remove("annotations");
    }
    put_manifest(
        server,
        media_type::OCI_MANIFEST,
        json!({"config": image, "layers": layers}),
    )
}

/// What an import finds at a descriptor.
async fn import_at(server: &Registry, root: &Value) -> Vec<ImportedRecords> {
    let ctx = ImportContext {
        jobs: Vec::new(),
        sessions: SessionGroup::new(Arc::new(Nobody), Vec::new()),
        progress: VertexProgress::new(digest("import"), "import".to_owned(), Vec::new(), None),
        cancel: CancellationToken::new(),
    };
    let place = Place::Registry {
        client: Client::new(HostsConfig::default()),
        reference: Reference::parse(&server.reference("cache:t").to_string()).unwrap(),
        insecure: false,
    };
    let mut importing = Importing {
        ctx: &ctx,
        place: &place,
        provider: place.provider(),
        found: Vec::new(),
    };
    let root: Descriptor = serde_json::from_value(root.clone()).unwrap();
    importing.root(&root).await.unwrap();
    importing.found
}

fn link(parent: RecordId, input: usize, op: &str, selector: Option<&str>) -> Query {
    Query::Children(
        StoreId(1),
        Link {
            parent,
            input,
            op: digest(op),
            output: 0,
            selector: selector.map(digest),
        },
    )
}

/// Requires that the whole cache is found in some records: each step by each of its inputs, with its layers.
fn check(form: &str, records: &ImportedRecords) {
    assert_eq!(records.results(), 2, "{form}");
    let root = |name: &str| RecordId::root(&digest(name), 0);
    for name in ["image", "context"] {
        let key = Key {
            store: StoreId(1),
            record: root(name),
        };
        assert_eq!(records.ids(&Query::Record(key)), [root(name)], "{form}: {name}");
        assert!(
            records.layers_of(&Query::Record(key)).is_empty(),
            "{form}: {name}"
        );
    }
    let blobs = |names: &[&str]| vec![names.iter().map(|name| digest(name)).collect::<Vec<_>>()];
    let by_image = link(root("image"), 0, "run", None);
    let by_context = link(root("context"), 1, "run", Some("/src"));
    for query in [&by_image, &by_context] {
        assert_eq!(records.layers_of(query), blobs(&["lower", "upper"]), "{form}");
    }
    for wrong in [
        link(root("context"), 1, "run", None),
        link(root("image"), 1, "run", None),
        link(root("image"), 0, "after", None),
    ] {
        assert!(records.ids(&wrong).is_empty(), "{form}: {wrong:?}");
    }
    let run = records.ids(&by_image);
    assert_eq!(run, records.ids(&by_context), "{form}");
    let after = link(run[0], 0, "after", None);
    assert_eq!(
        records.layers_of(&after),
        blobs(&["lower", "upper", "top"]),
        "{form}"
    );
    for blob in records.known_blobs() {
        let name = ["lower", "upper", "top"]
            .into_iter()
            .find(|name| digest(name) == blob.descriptor.digest);
        assert_eq!(
            blob.diff_id,
            digest(&format!("plain {}", name.unwrap())),
            "{form}"
        );
        assert_eq!(blob.descriptor.size, 1234, "{form}");
        assert_eq!(blob.providers.len(), 1, "{form}");
        let made = blob.created_at.unwrap().duration_since(UNIX_EPOCH).unwrap();
        assert_eq!(made.as_secs(), 1_612_325_106, "{form}");
    }
}

#[tokio::test]
async fn a_cache_is_found_in_each_form_of_its_manifest() {
    let server = Registry::start().await;
    // Nothing is said with null, as with what is not there.
    let mut nulls = config();
    nulls["records"][1]["inputs"] = Value::Null;
    nulls["records"][1]["layers"] = Value::Null;
    nulls["records"][0]["chains"] = Value::Null;
    let forms = [
        ("image manifest", image_manifest(&server, &config())),
        ("nulls", image_manifest(&server, &nulls)),
        (
            "index",
            index(&server, media_type::OCI_INDEX, media_type::OCI_LAYER_GZIP),
        ),
        (
            "list",
            index(
                &server,
                media_type::DOCKER_MANIFEST_LIST,
                media_type::DOCKER_LAYER_GZIP,
            ),
        ),
    ];
    for (form, root) in forms {
        let found = import_at(&server, &root).await;
        assert_eq!(found.len(), 1, "{form}");
        check(form, &found[0]);
    }
}

#[tokio::test]
async fn a_cache_is_found_within_an_image_and_in_the_images_of_an_index() {
    let server = Registry::start().await;
    let top = inline(
        &server,
        &records(json!({"layers": [{"layer": 1, "createdAt": "2021-02-03T04:05:07Z"}]})),
    );
    let list = inline(
        &server,
        &records(json!({"chains": [{"layers": [0, 1], "createdAt": "2021-02-03T04:05:07Z"}]})),
    );
    for (form, root) in [("image", &top), ("chains", &list)] {
        let found = import_at(&server, root).await;
        assert_eq!(found.len(), 1, "{form}");
        check(form, &found[0]);
    }
    let of = |mut image: Value, architecture: &str| {
        image["platform"] = json!({"os": "linux", "architecture": architecture});
        image
    };
    let mut attestation = of(top.clone(), "unknown");
    attestation["digest"] = digest("an attestation that is not asked for").to_string().into();
    attestation["annotations"] = json!({"vnd.docker.reference.type": "attestation-manifest"});
    let entries = [of(top, "amd64"), of(list, "arm64"), attestation];
    let root = put_manifest(&server, media_type::OCI_INDEX, json!({ "manifests": entries }));
    let found = import_at(&server, &root).await;
    assert_eq!(found.len(), 2);
    for records in &found {
        check("index of images", records);
    }
}

/// What grows with the records may be larger than what registries call a manifest.
#[tokio::test]
async fn a_large_configuration_is_read() {
    let server = Registry::start().await;
    let mut large = config();
    large["layers"][0]["of later versions"] = "x".repeat(8 << 20).into();
    let found = import_at(&server, &image_manifest(&server, &large)).await;
    check("large", &found[0]);
}

#[tokio::test]
async fn results_are_as_old_as_they_say() {
    let server = Registry::start().await;
    let found = import_at(&server, &image_manifest(&server, &config())).await;
    assert_eq!(
        found[0].times(),
        [7, 8].map(|second| UNIX_EPOCH + Duration::from_secs(1_612_325_100 + second))
    );
}

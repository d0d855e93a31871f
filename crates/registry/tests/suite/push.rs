//! Blobs and manifests into a registry.

use std::collections::BTreeMap;
use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use bytes::Bytes;
use futures_util::stream::{self, StreamExt};
use oci::Descriptor;
use registry::{BlobSource, ByteStream, Client, ClientOptions, PushBlob, PushOutcome, RegistryError};
use testkit::image::{ImageBuilder, LayerBuilder};
use testkit::registry::{Accounts, Action, Options, Registry};
use tokio::sync::Barrier;

use super::auth::Account;
use super::client;

/// A source in small chunks that notes where it was opened.
struct Chunks {
    bytes: Bytes,
    opened: Mutex<Vec<u64>>,
    fails: bool,
}

impl Chunks {
    fn new(size: usize) -> Self {
        let bytes: Vec<u8> = (0..=250_u8).cycle().take(size).collect();
        Self {
            bytes: bytes.into(),
            opened: Mutex::default(),
            fails: false,
        }
    }

    fn descriptor(&self) -> Descriptor {
        Descriptor::of_bytes("application/octet-stream", &self.bytes)
    }

    fn opened(&self) -> Vec<u64> {
        self.opened.lock().unwrap().clone()
    }
}

impl BlobSource for Chunks {
    fn open(&self, offset: u64) -> ByteStream {
        self.opened.lock().unwrap().push(offset);
        if self.fails {
            return stream::iter([Err(std::io::Error::other("disk on fire"))]).boxed();
        }
        let rest = self.bytes.slice(usize::try_from(offset).unwrap()..);
        let chunks: Vec<_> = rest
            .chunks(70_000)
            .map(|chunk| Ok(Bytes::copy_from_slice(chunk)))
            .collect();
        stream::iter(chunks).boxed()
    }
}

async fn push(
    client: &Client,
    server: &Registry,
    source: &Chunks,
    from: &[&str],
) -> Result<PushOutcome, RegistryError> {
    let from: Vec<String> = from.iter().map(|from| (*from).to_owned()).collect();
    let descriptor = source.descriptor();
    let blob = PushBlob {
        descriptor: &descriptor,
        source,
        mount_from: &from,
        progress: None,
    };
    client.push_blob(&server.reference("x:t"), blob).await
}

#[tokio::test]
async fn a_blob_is_uploaded_once() {
    let server = Registry::start().await;
    let source = Chunks::new(3_000_000);
    let client = client();
    assert_eq!(
        push(&client, &server, &source, &[]).await.unwrap(),
        PushOutcome::Uploaded
    );
    assert_eq!(
        server.blob("x", &source.descriptor().digest).unwrap(),
        source.bytes
    );
    assert_eq!(
        push(&client, &server, &source, &[]).await.unwrap(),
        PushOutcome::Existed
    );
    assert_eq!(source.opened(), [0]);
}

#[tokio::test]
async fn an_empty_blob_is_uploaded() {
    let server = Registry::start().await;
    let source = Chunks::new(0);
    assert_eq!(
        push(&client(), &server, &source, &[]).await.unwrap(),
        PushOutcome::Uploaded
    );
    assert!(server.blob("x", &source.descriptor().digest).is_some());
}

#[tokio::test]
async fn progress_is_told() {
    let server = Registry::start().await;
    let source = Chunks::new(300_000);
    let told = Arc::new(AtomicU64::new(0));
    let teller = Arc::clone(&told);
    let descriptor = source.descriptor();
    let blob = PushBlob {
        descriptor: &descriptor,
        source: &source,
        mount_from: &[],
        progress: Some(Arc::new(move |at| teller.store(at, Ordering::Relaxed))),
    };
    client().push_blob(&server.reference("x:t"), blob).await.unwrap();
    assert_eq!(told.load(Ordering::Relaxed), 300_000);
}

#[tokio::test]
async fn a_blob_of_another_repository_is_mounted() {
    let server = Registry::start().await;
    let source = Chunks::new(1000);
    server.add_blob("base", source.bytes.clone());
    let outcome = push(&client(), &server, &source, &["x", "base"]).await.unwrap();
    assert_eq!(outcome, PushOutcome::Mounted("base".into()));
    assert!(source.opened().is_empty());
    assert!(server.blob("x", &source.descriptor().digest).is_some());
}

#[tokio::test]
async fn a_refused_mount_becomes_the_upload() {
    let server = Registry::start().await;
    let source = Chunks::new(1000);
    assert_eq!(
        push(&client(), &server, &source, &["base"]).await.unwrap(),
        PushOutcome::Uploaded
    );
    assert_eq!(server.count("POST", "/blobs/uploads/"), 1, "{:?}", server.log());
}

#[tokio::test]
async fn an_interrupted_upload_is_resumed() {
    let server = Registry::start().await;
    let source = Chunks::new(5_000_000);
    server.fault("PUT", "/blobs/uploads/", 1, Action::ResetUpload(2_000_000));
    assert_eq!(
        push(&client(), &server, &source, &[]).await.unwrap(),
        PushOutcome::Uploaded
    );
    assert_eq!(
        server.blob("x", &source.descriptor().digest).unwrap(),
        source.bytes
    );
    assert_eq!(source.opened()[..2], [0, 2_000_000]);
    assert_eq!(server.count("POST", ""), 1);
}

#[tokio::test]
async fn a_lost_upload_starts_over() {
    let server = Registry::start().await;
    let source = Chunks::new(5_000_000);
    server.fault("PUT", "/blobs/uploads/", 1, Action::Status(502, vec![], ""));
    server.fault("GET", "/blobs/uploads/", 1, Action::Status(404, vec![], ""));
    push(&client(), &server, &source, &[]).await.unwrap();
    assert_eq!(
        server.blob("x", &source.descriptor().digest).unwrap(),
        source.bytes
    );
    assert_eq!(source.opened(), [0, 0]);
}

#[tokio::test]
async fn a_server_that_wants_an_hour_before_the_upload_goes_on_is_an_error() {
    let server = Registry::start().await;
    let source = Chunks::new(1000);
    let later = Action::Status(429, vec![("Retry-After", "3600".into())], "");
    server.fault("PUT", "/blobs/uploads/", 1, later);
    let error = push(&client(), &server, &source, &[]).await.unwrap_err();
    assert!(error.to_string().contains("429 Too Many Requests"), "{error}");
    assert_eq!(server.count("PUT", "/blobs/uploads/"), 1);
}

#[tokio::test]
async fn a_body_limit_leads_to_pieces() {
    let server = Registry::start_with(Options {
        max_put_bytes: Some(1 << 20),
        ..Options::default()
    })
    .await;
    let source = Chunks::new(2_500_000);
    push(&client(), &server, &source, &[]).await.unwrap();
    assert_eq!(
        server.blob("x", &source.descriptor().digest).unwrap(),
        source.bytes
    );
    assert_eq!(server.count("PATCH", ""), 3);
}

#[tokio::test]
async fn a_source_that_cannot_be_read_is_not_retried() {
    let server = Registry::start().await;
    let source = Chunks {
        fails: true,
        ..Chunks::new(1000)
    };
    let error = push(&client(), &server, &source, &[]).await.unwrap_err();
    let RegistryError::ReadSource { source: why, .. } = error else {
        panic!("{error}");
    };
    assert_eq!(why.to_string(), "disk on fire");
    assert_eq!(source.opened(), [0]);
}

#[tokio::test]
async fn an_image_is_pushed_by_tag_and_digest() {
    let server = Registry::start().await;
    let image = ImageBuilder::new()
        .layer(LayerBuilder::new().file("a", "1").build())
        .build();
    let client = client();
    let reference = server.reference("x:t");
    for (descriptor, bytes) in [
        (&image.layers[0].descriptor, &image.layers[0].blob),
        (&image.config_descriptor, &image.config),
    ] {
        let source = registry::BytesSource(bytes.clone());
        let blob = PushBlob {
            descriptor,
            source: &source,
            mount_from: &[],
            progress: None,
        };
        client.push_blob(&reference, blob).await.unwrap();
    }
    for tag in [None, Some("t"), Some("t")] {
        client
            .push_manifest(&reference, &image.descriptor, image.manifest.clone(), tag)
            .await
            .unwrap();
    }
    assert_eq!(server.manifest("x", "t").unwrap().1, image.manifest);
    assert_eq!(server.count("PUT", "/manifests/"), 2);
    // A moved tag is put again.
    server.add_manifest("x", Some("t"), oci::media_type::OCI_MANIFEST, "{}".into());
    client
        .push_manifest(&reference, &image.descriptor, image.manifest.clone(), Some("t"))
        .await
        .unwrap();
    assert_eq!(server.manifest("x", "t").unwrap().1, image.manifest);
}

#[tokio::test]
async fn a_rejected_manifest_tells_why() {
    let server = Registry::start().await;
    let image = ImageBuilder::new().build();
    let error = client()
        .push_manifest(
            &server.reference("x:t"),
            &image.descriptor,
            image.manifest.clone(),
            Some("t"),
        )
        .await
        .unwrap_err();
    assert!(
        error
            .to_string()
            .contains("400 Bad Request: manifest blob unknown: "),
        "{error}"
    );
}

#[tokio::test]
async fn a_push_without_permission_is_denied() {
    let accounts = Accounts {
        users: BTreeMap::from([("user".to_owned(), "secret".to_owned())]),
        read_only: ["x".to_owned()].into(),
        ..Accounts::default()
    };
    let server = Registry::start_with(Options {
        accounts: Some(accounts),
        ..Options::default()
    })
    .await;
    let client = client().with_credentials(Arc::new(Account::new("user", "secret")));
    let error = push(&client, &server, &Chunks::new(10), &[]).await.unwrap_err();
    assert!(
        error
            .to_string()
            .starts_with("push access denied, repository does not exist or may require authorization"),
        "{error}"
    );
}

#[tokio::test]
async fn a_private_mount_source_does_not_hinder_the_push() {
    let accounts = Accounts {
        users: BTreeMap::from([("user".to_owned(), "secret".to_owned())]),
        ..Accounts::default()
    };
    let server = Registry::start_with(Options {
        accounts: Some(accounts),
        ..Options::default()
    })
    .await;
    let client = client().with_credentials(Arc::new(Account::new("user", "secret")));
    let source = Chunks::new(10);
    server.fault("POST", "/blobs/uploads/", 1, Action::Status(403, vec![], ""));
    assert_eq!(
        push(&client, &server, &source, &["other"]).await.unwrap(),
        PushOutcome::Uploaded
    );
}

/// A source that is read only once as many are open as may be.
struct Together {
    number: u8,
    all: Arc<Barrier>,
    open: Arc<AtomicUsize>,
    most: Arc<AtomicUsize>,
}

impl BlobSource for Together {
    fn open(&self, _: u64) -> ByteStream {
        let (all, open, most) = (
            Arc::clone(&self.all),
            Arc::clone(&self.open),
            Arc::clone(&self.most),
        );
        let number = self.number;
        let reading = async move {
            most.fetch_max(open.fetch_add(1, Ordering::SeqCst) + 1, Ordering::SeqCst);
            all.wait().await;
            open.fetch_sub(1, Ordering::SeqCst);
            Ok(Bytes::from(vec![number]))
        };
        stream::once(reading).boxed()
    }
}

#[tokio::test]
async fn uploads_go_side_by_side_up_to_a_bound() {
    let (server, bound) = (Registry::start().await, ClientOptions::default().max_transfers);
    let (all, open, most) = (Arc::new(Barrier::new(bound)), Arc::default(), Arc::default());
    let client = client();
    let blobs = 0..u8::try_from(3 * bound).unwrap();
    let pushes = blobs.map(|number| {
        let source = Together {
            number,
            all: Arc::clone(&all),
            open: Arc::clone(&open),
            most: Arc::clone(&most),
        };
        let (client, reference) = (client.clone(), server.reference("x:t"));
        async move {
            let descriptor = Descriptor::of_bytes("application/octet-stream", &[number]);
            let blob = PushBlob {
                descriptor: &descriptor,
                source: &source,
                mount_from: &[],
                progress: None,
            };
            client.push_blob(&reference, blob).await.unwrap()
        }
    });
    let pushed = futures_util::future::join_all(pushes);
    let pushed = tokio::time::timeout(Duration::from_secs(60), pushed).await;
    assert_eq!(pushed.unwrap(), vec![PushOutcome::Uploaded; 3 * bound]);
    assert_eq!(most.load(Ordering::SeqCst), bound);
}

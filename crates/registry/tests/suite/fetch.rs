//! Blob streams.

use futures_util::TryStreamExt;
use oci::{Descriptor, Digest};
use registry::{Client, RegistryError};
use testkit::registry::{Action, Options, Quirk, Registry};

use super::client;

async fn read(
    client: &Client,
    server: &Registry,
    descriptor: &Descriptor,
    offset: u64,
) -> Result<Vec<u8>, RegistryError> {
    let stream = client.fetch(&server.reference("x:t"), descriptor, offset).await?;
    let chunks: Vec<bytes::Bytes> = stream.try_collect().await?;
    Ok(chunks.concat())
}

fn content() -> Vec<u8> {
    (0..300_000_u32).flat_map(u32::to_le_bytes).collect()
}

fn store(server: &Registry) -> Descriptor {
    server.add_blob("x", content());
    Descriptor::of_bytes("", &content())
}

#[tokio::test]
async fn a_blob_arrives_whole_or_from_an_offset() {
    let server = Registry::start().await;
    let descriptor = store(&server);
    let client = client();
    assert_eq!(read(&client, &server, &descriptor, 0).await.unwrap(), content());
    assert_eq!(
        read(&client, &server, &descriptor, 1001).await.unwrap(),
        content()[1001..]
    );
    assert!(
        read(&client, &server, &descriptor, descriptor.size)
            .await
            .unwrap()
            .is_empty()
    );
}

#[tokio::test]
async fn a_broken_transfer_goes_on_where_it_broke() {
    for without_ranges in [false, true] {
        let options = if without_ranges {
            Options::quirk(Quirk::NoRanges)
        } else {
            Options::default()
        };
        let server = Registry::start_with(options).await;
        let descriptor = store(&server);
        server.fault("GET", "/blobs/", 3, Action::Truncate(500_001));
        assert_eq!(read(&client(), &server, &descriptor, 0).await.unwrap(), content());
        let ranges: Vec<_> = server
            .seen()
            .into_iter()
            .filter_map(|seen| seen.headers.get("range").cloned())
            .collect();
        assert_eq!(ranges[0], "bytes=500001-");
    }
}

#[tokio::test]
async fn a_transfer_that_never_progresses_ends() {
    let server = Registry::start().await;
    let descriptor = store(&server);
    server.fault("GET", "/blobs/", 1, Action::Truncate(10));
    server.fault("GET", "/blobs/", 1000, Action::Truncate(0));
    let error = read(&client(), &server, &descriptor, 0).await.unwrap_err();
    assert!(
        error.is_transient() || matches!(error, RegistryError::SizeMismatch { .. }),
        "{error}"
    );
    assert!(server.seen().len() < 20);
}

#[tokio::test]
async fn other_bytes_are_an_error() {
    let server = Registry::start().await;
    let descriptor = store(&server);
    server.fault("GET", "/blobs/", 1, Action::Corrupt);
    let error = read(&client(), &server, &descriptor, 0).await.unwrap_err();
    assert!(matches!(error, RegistryError::DigestMismatch { .. }), "{error}");
}

#[tokio::test]
async fn more_bytes_than_announced_are_an_error() {
    let server = Registry::start().await;
    let descriptor = Descriptor {
        size: 1000,
        ..store(&server)
    };
    let error = read(&client(), &server, &descriptor, 0).await.unwrap_err();
    assert!(
        matches!(
            error,
            RegistryError::SizeMismatch {
                expected_bytes: 1000,
                ..
            }
        ),
        "{error}"
    );
}

#[tokio::test]
async fn fewer_bytes_than_announced_are_an_error() {
    let server = Registry::start().await;
    let mut descriptor = store(&server);
    let size = descriptor.size;
    descriptor.size += 10;
    // From the beginning, from the very end, where a server has no range to send, and from behind it.
    for offset in [0, size, size + 5] {
        let error = read(&client(), &server, &descriptor, offset).await.unwrap_err();
        let RegistryError::SizeMismatch {
            expected_bytes,
            actual_bytes,
            ..
        } = error
        else {
            panic!("{error}");
        };
        assert_eq!(expected_bytes, size + 10);
        assert!(actual_bytes == size || actual_bytes == offset, "{actual_bytes}");
    }
}

#[tokio::test]
async fn a_server_says_where_a_blob_ends() {
    let server = Registry::start().await;
    let descriptor = store(&server);
    let range = Action::Status(416, vec![("Content-Range", "bytes */7".to_owned())], "");
    server.fault("GET", "/blobs/", 1, range);
    let error = read(&client(), &server, &descriptor, 9)
        .await
        .unwrap_err()
        .to_string();
    assert!(
        error.ends_with(&format!("expected {}, got 7", descriptor.size)),
        "{error}"
    );
}

#[tokio::test]
async fn a_missing_blob_is_not_found() {
    let server = Registry::start().await;
    let descriptor = Descriptor::new("", Digest::sha256("x"), 1);
    assert!(
        read(&client(), &server, &descriptor, 0)
            .await
            .unwrap_err()
            .is_not_found()
    );
}

#[tokio::test]
async fn a_missing_layer_comes_from_its_urls() {
    let server = Registry::start().await;
    let elsewhere = Registry::start().await;
    let digest = elsewhere.add_blob("y", content());
    let mut descriptor = Descriptor::of_bytes("", &content());
    descriptor.urls = vec![
        "ftp://x/".into(),
        format!("http://{}/v2/y/blobs/{digest}", elsewhere.domain()),
    ];
    assert_eq!(read(&client(), &server, &descriptor, 0).await.unwrap(), content());
}

#[tokio::test]
async fn redirects_carry_no_credentials() {
    let elsewhere = Registry::start().await;
    let digest = elsewhere.add_blob("y", content());
    let server = Registry::start().await;
    let target = format!("http://{}/v2/y/blobs/{digest}?signature=s", elsewhere.domain());
    server.fault(
        "GET",
        "/blobs/",
        1,
        Action::Status(401, vec![("WWW-Authenticate", "Basic realm=r".into())], ""),
    );
    server.fault(
        "GET",
        "/blobs/",
        1,
        Action::Status(307, vec![("Location", target)], ""),
    );
    let client = client().with_credentials(std::sync::Arc::new(super::auth::Account::new("u", "p")));
    let descriptor = Descriptor::of_bytes("", &content());
    assert_eq!(read(&client, &server, &descriptor, 0).await.unwrap(), content());
    assert!(server.seen()[1].headers.contains_key("authorization"));
    let redirected = &elsewhere.seen()[0];
    assert!(!redirected.headers.contains_key("authorization") && !redirected.headers.contains_key("referer"));
}

#[tokio::test]
async fn dropped_streams_give_their_slot_back() {
    let server = Registry::start().await;
    let descriptor = store(&server);
    let client = client();
    for _ in 0..20 {
        let stream = client
            .fetch(&server.reference("x:t"), &descriptor, 0)
            .await
            .unwrap();
        drop(stream);
    }
}

#[tokio::test(start_paused = true)]
async fn silence_has_an_end() {
    let server = Registry::start().await;
    let descriptor = store(&server);
    server.fault("GET", "", 100, Action::Hang);
    let error = read(&client(), &server, &descriptor, 0).await.unwrap_err();
    assert!(
        matches!(
            error,
            RegistryError::Timeout { .. } | RegistryError::Transport { .. }
        ),
        "{error}"
    );
}

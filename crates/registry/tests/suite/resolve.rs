//! Names to descriptors, and documents by digest.

use oci::{Descriptor, Digest, media_type};
use registry::RegistryError;
use testkit::image::{ImageBuilder, LayerBuilder};
use testkit::registry::{Action, Options, Quirk, Registry};

use super::client;

fn image() -> testkit::image::Image {
    ImageBuilder::new()
        .layer(LayerBuilder::new().file("a", "1").build())
        .build()
}

#[tokio::test]
async fn a_tag_becomes_a_descriptor_by_head_alone() {
    let server = Registry::start().await;
    let image = image();
    let stored = server.add_image("library/x", "latest", &image);
    let found = client()
        .resolve(&server.reference("library/x:latest"))
        .await
        .unwrap();
    assert_eq!(
        (found.digest, found.size, &found.media_type),
        (stored.digest, stored.size, &stored.media_type)
    );
    assert_eq!(server.log(), ["HEAD /v2/library/x/manifests/latest"]);
}

#[tokio::test]
async fn a_digest_is_kept_and_its_manifest_verified() {
    let server = Registry::start().await;
    let stored = server.add_image("x", "t", &image());
    let reference = server.reference(&format!("x@{}", stored.digest));
    let client = client();
    let found = client.resolve(&reference).await.unwrap();
    assert_eq!(found.digest, stored.digest);
    assert_eq!(
        client.manifest(&reference, &found).await.unwrap(),
        server.manifest("x", "t").unwrap().1
    );
}

#[tokio::test]
async fn without_digest_header_the_manifest_is_fetched() {
    let server = Registry::start_with(Options::quirk(Quirk::NoDigestHeader)).await;
    let stored = server.add_image("x", "t", &image());
    let found = client().resolve(&server.reference("x:t")).await.unwrap();
    assert_eq!(found.digest, stored.digest);
    assert_eq!(server.count("GET", "/manifests/t"), 1);
}

#[tokio::test]
async fn without_head_the_manifest_is_fetched() {
    let server = Registry::start_with(Options::quirk(Quirk::NoHead)).await;
    let stored = server.add_image("x", "t", &image());
    assert_eq!(
        client().resolve(&server.reference("x:t")).await.unwrap().digest,
        stored.digest
    );
}

#[tokio::test]
async fn an_unknown_name_is_not_found() {
    let server = Registry::start().await;
    let reference = server.reference("x:nope");
    let error = client().resolve(&reference).await.unwrap_err();
    assert!(error.is_not_found());
    assert_eq!(error.to_string(), format!("{reference}: not found"));
}

#[tokio::test]
async fn a_blob_resolves_by_digest() {
    let server = Registry::start().await;
    let digest = server.add_blob("x", "bytes");
    let found = client()
        .resolve(&server.reference(&format!("x@{digest}")))
        .await
        .unwrap();
    assert_eq!((found.digest, found.size), (digest, 5));
}

#[tokio::test]
async fn a_forged_digest_header_is_caught_by_the_fetch() {
    let server = Registry::start().await;
    server.add_image("x", "t", &image());
    let other = server.add_manifest("x", None, media_type::OCI_MANIFEST, "{}".into());
    let forged = Action::WrongDigestHeader(other.digest);
    server.fault("HEAD", "/manifests/t", 1, forged);
    let client = client();
    let reference = server.reference("x:t");
    let found = client.resolve(&reference).await.unwrap();
    assert_eq!(found.digest, other.digest);
    server.fault("GET", "/manifests/", 1, Action::Corrupt);
    let error = client.manifest(&reference, &found).await.unwrap_err();
    assert!(matches!(error, RegistryError::DigestMismatch { .. }), "{error}");
}

#[tokio::test]
async fn an_invalid_digest_header_is_refused() {
    let server = Registry::start().await;
    server.fault(
        "HEAD",
        "/manifests/",
        1,
        Action::Status(200, vec![("Docker-Content-Digest", "x".into())], ""),
    );
    let error = client().resolve(&server.reference("x:t")).await.unwrap_err();
    assert!(matches!(error, RegistryError::InvalidResponse { .. }), "{error}");
}

#[tokio::test]
async fn huge_manifests_are_refused() {
    let server = Registry::start().await;
    let huge = vec![b' '; 5 << 20];
    let stored = server.add_manifest("x", Some("t"), media_type::OCI_INDEX, huge.into());
    let client = client();
    let reference = server.reference("x:t");
    let error = client.resolve(&reference).await.unwrap_err();
    assert!(matches!(error, RegistryError::TooLarge { .. }), "{error}");
    // A descriptor that lies about the size does not help.
    let lying = Descriptor::new(media_type::OCI_INDEX, stored.digest, 10);
    let error = client.manifest(&reference, &lying).await.unwrap_err();
    assert!(matches!(error, RegistryError::TooLarge { .. }), "{error}");
}

#[tokio::test]
async fn trouble_is_retried_and_retry_after_is_heard() {
    let server = Registry::start().await;
    let stored = server.add_image("x", "t", &image());
    server.fault(
        "HEAD",
        "",
        1,
        Action::Status(429, vec![("Retry-After", "1".into())], ""),
    );
    server.fault("HEAD", "", 1, Action::Status(503, vec![], ""));
    server.fault("HEAD", "", 1, Action::Reset);
    let start = std::time::Instant::now();
    let found = client().resolve(&server.reference("x:t")).await.unwrap();
    assert_eq!(found.digest, stored.digest);
    assert_eq!(server.count("HEAD", ""), 4);
    assert!(start.elapsed() >= std::time::Duration::from_secs(1));
}

#[tokio::test]
async fn retries_end() {
    let server = Registry::start().await;
    server.fault(
        "",
        "",
        100,
        Action::Status(
            503,
            vec![],
            r#"{"errors":[{"code":"UNAVAILABLE","message":"later"}]}"#,
        ),
    );
    let error = client()
        .manifest(&server.reference("x:t"), &descriptor())
        .await
        .unwrap_err();
    assert!(error.is_transient());
    assert!(
        error
            .to_string()
            .ends_with("503 Service Unavailable: unavailable: later"),
        "{error}"
    );
    assert_eq!(server.seen().len(), 5);
}

#[tokio::test]
async fn a_server_that_wants_an_hour_is_an_error() {
    let server = Registry::start().await;
    server.fault(
        "",
        "",
        100,
        Action::Status(429, vec![("Retry-After", "3600".into())], ""),
    );
    let error = client().resolve(&server.reference("x:t")).await.unwrap_err();
    assert!(error.to_string().contains("429 Too Many Requests"), "{error}");
    assert_eq!(server.seen().len(), 1);
}

#[tokio::test]
async fn referrers_are_listed_and_filtered() {
    for without_referrers in [false, true] {
        let options = if without_referrers {
            Options::quirk(Quirk::NoReferrers)
        } else {
            Options::default()
        };
        let server = Registry::start_with(options).await;
        let subject = server.add_image("x", "t", &image());
        let config = Descriptor::of_bytes(media_type::OCI_EMPTY, b"{}");
        let mut manifest = oci::Manifest::new(config, Vec::new());
        manifest.subject = Some(subject.clone());
        manifest.artifact_type = "application/x".into();
        let bytes = serde_json::to_vec(&manifest).unwrap();
        let stored = server.add_manifest("x", None, media_type::OCI_MANIFEST, bytes.into());
        let client = client();
        let reference = server.reference("x:t");
        if without_referrers {
            let mut listed = stored.clone();
            listed.artifact_type = "application/x".into();
            let tag = format!("sha256-{}", subject.digest.hex());
            let index = serde_json::to_vec(&oci::Index::new(vec![listed])).unwrap();
            server.add_manifest("x", Some(&tag), media_type::OCI_INDEX, index.into());
        }
        let found = client
            .referrers(&reference, &subject.digest, Some("application/x"))
            .await
            .unwrap();
        assert_eq!(
            found.iter().map(|found| found.digest).collect::<Vec<_>>(),
            [stored.digest]
        );
        assert_eq!(
            client
                .referrers(&reference, &subject.digest, Some("other"))
                .await
                .unwrap(),
            []
        );
        assert_eq!(
            client
                .referrers(&reference, &Digest::sha256("?"), None)
                .await
                .unwrap(),
            []
        );
    }
}

fn descriptor() -> Descriptor {
    Descriptor::new(media_type::OCI_MANIFEST, Digest::sha256("x"), 10)
}

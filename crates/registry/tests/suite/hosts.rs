//! Mirrors and per-host settings.

use registry::{Client, ClientOptions, HostConfig, HostsConfig};
use testkit::image::{Image, ImageBuilder, LayerBuilder};
use testkit::registry::{Action, Registry};

use super::{client, client_with};

fn image() -> Image {
    ImageBuilder::new()
        .layer(LayerBuilder::new().file("a", "1").build())
        .build()
}

fn mirrored(origin: &Registry, mirrors: &[String]) -> HostsConfig {
    let mut hosts = HostsConfig::default();
    let host = HostConfig {
        mirrors: mirrors.to_vec(),
        ..HostConfig::default()
    };
    hosts.hosts.insert(origin.domain(), host);
    hosts
}

#[tokio::test]
async fn a_mirror_answers_first() {
    let (origin, mirror) = (Registry::start().await, Registry::start().await);
    let stored = mirror.add_image("proxy/x", "t", &image());
    let hosts = mirrored(&origin, &[format!("{}/proxy", mirror.domain())]);
    let client = client_with(hosts);
    let reference = origin.reference("x:t");
    let found = client.resolve(&reference).await.unwrap();
    client.manifest(&reference, &found).await.unwrap();
    assert_eq!(found.digest, stored.digest);
    assert!(origin.seen().is_empty());
    assert!(
        mirror.log()[0].contains(&format!("?ns={}", origin.domain())),
        "{:?}",
        mirror.log()
    );
}

#[tokio::test]
async fn the_origin_answers_for_a_mirror_that_cannot() {
    let (origin, mirror) = (Registry::start().await, Registry::start().await);
    let stored = origin.add_image("x", "t", &image());
    mirror.fault("HEAD", "", 1, Action::Status(503, vec![], ""));
    let client = client_with(mirrored(&origin, &[mirror.domain()]));
    let reference = origin.reference("x:t");
    let found = client.resolve(&reference).await.unwrap();
    assert_eq!(found.digest, stored.digest);
    assert_eq!(mirror.seen().len(), 1, "trouble at a mirror is not worth a wait");
    client.manifest(&reference, &found).await.unwrap();
    mirror.fault("GET", "", 1, Action::Reset);
    client
        .fetch_bytes(&reference, &image().config_descriptor)
        .await
        .unwrap();
}

#[tokio::test]
async fn pushes_go_to_the_origin() {
    let (origin, mirror) = (Registry::start().await, Registry::start().await);
    let client = client_with(mirrored(&origin, &[mirror.domain()]));
    let descriptor = oci::Descriptor::of_bytes("", b"bytes");
    let source = registry::BytesSource("bytes".into());
    let blob = registry::PushBlob {
        descriptor: &descriptor,
        source: &source,
        mount_from: &[],
        progress: None,
    };
    client.push_blob(&origin.reference("x:t"), blob).await.unwrap();
    assert!(mirror.seen().is_empty());
    assert!(origin.blob("x", &descriptor.digest).is_some());
}

#[tokio::test]
async fn an_insecure_registry_may_speak_plain_http() {
    let server = Registry::start().await;
    let stored = server.add_image("x", "t", &image());
    let client = client().with_insecure(&server.domain());
    for _ in 0..2 {
        assert_eq!(
            client.resolve(&server.reference("x:t")).await.unwrap().digest,
            stored.digest
        );
    }
    assert_eq!(server.count("HEAD", "/manifests/t"), 2);
}

#[tokio::test]
async fn requests_that_find_plain_http_together_do_not_wait_for_each_other() {
    let server = Registry::start().await;
    let stored = server.add_image("x", "t", &image());
    // Whoever had to wait before another attempt would have none left.
    let options = ClientOptions {
        max_attempts: 1,
        ..ClientOptions::default()
    };
    let client = Client::with_options(HostsConfig::default(), options).with_insecure(&server.domain());
    let reference = server.reference("x:t");
    let found = futures_util::future::join_all((0..9).map(|_| client.resolve(&reference))).await;
    for one in found {
        assert_eq!(one.unwrap().digest, stored.digest);
    }
}

#[test]
fn the_configuration_reads_as_buildkits() {
    let text = r#"
        ["docker.io"]
        mirrors = ["mirror.gcr.io", "m:5000/proxy"]
        http = true
        insecure = true
        ca = ["/etc/ca.pem"]
        tlsconfigdir = ["/etc/certs"]
        [["docker.io".keypair]]
        key = "/etc/key.pem"
        cert = "/etc/cert.pem"
    "#;
    let config: HostsConfig = toml::from_str(text).unwrap();
    let host = &config.hosts["docker.io"];
    assert_eq!(host.mirrors, ["mirror.gcr.io", "m:5000/proxy"]);
    assert_eq!((host.plain_http, host.insecure), (Some(true), Some(true)));
    assert_eq!(host.keypair[0].cert.to_str(), Some("/etc/cert.pem"));
}

#[tokio::test]
async fn missing_certificates_are_named() {
    let mut hosts = HostsConfig::default();
    let host = HostConfig {
        ca: vec!["/nonexistent/ca.pem".into()],
        ..HostConfig::default()
    };
    hosts.hosts.insert("registry.example".into(), host);
    let reference = oci::Reference::parse("registry.example/x:t").unwrap();
    let error = client_with(hosts).resolve(&reference).await.unwrap_err();
    let source = std::error::Error::source(&error).unwrap().to_string();
    assert_eq!(source, "failed to read /nonexistent/ca.pem");
}

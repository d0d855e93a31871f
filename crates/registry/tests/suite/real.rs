//! The same against `docker-registry`, where it is installed.

use std::io::Write;
use std::path::Path;
use std::process::{Child, Command, Stdio};

use futures_util::TryStreamExt;
use registry::{BytesSource, Client, HostConfig, HostsConfig, PushBlob, PushOutcome};
use testkit::image::{ImageBuilder, Layer};

use super::{client, client_with};

struct Daemon {
    child: Child,
    port: u16,
    _dir: tempfile::TempDir,
}

impl Drop for Daemon {
    fn drop(&mut self) {
        // It may have ended by itself.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// Starts a registry, with TLS if a certificate and key are given.
async fn start(tls: Option<(&Path, &Path)>) -> Option<Daemon> {
    let binary = "/usr/bin/docker-registry";
    if !Path::new(binary).exists() {
        eprintln!("skipped: {binary} is not installed");
        return None;
    }
    let port = std::net::TcpListener::bind("127.0.0.1:0")
        .unwrap()
        .local_addr()
        .unwrap()
        .port();
    let dir = tempfile::tempdir().unwrap();
    let config = dir.path().join("config.yml");
    let tls = tls.map_or_else(String::new, |(certificate, key)| {
        format!(
            ", tls: {{certificate: {}, key: {}}}",
            certificate.display(),
            key.display()
        )
    });
    let text = format!(
        "version: 0.1
log: {{level: error}}
storage: {{filesystem: {{rootdirectory: {}}}}}
http: {{addr: \"127.0.0.1:{port}\"{tls}}}
",
        dir.path().join("data").display()
    );
    std::fs::File::create(&config)
        .unwrap()
        .write_all(text.as_bytes())
        .unwrap();
    let child = Command::new(binary)
        .args(["serve".as_ref(), config.as_os_str()])
        .stdout(Stdio::null())
        .stderr(Stdio::null())
        .spawn()
        .unwrap();
    let daemon = Daemon {
        child,
        port,
        _dir: dir,
    };
    // Connections are refused until it listens: the client's own retries wait for it.
    let probe = daemon.reference("probe:t");
    for _ in 0..20 {
        let client = Client::new(HostsConfig::default()).with_insecure(probe.domain());
        if client.resolve(&probe).await.is_err_and(|e| e.is_not_found()) {
            return Some(daemon);
        }
    }
    panic!("docker-registry does not answer");
}

impl Daemon {
    fn reference(&self, name: &str) -> oci::Reference {
        oci::Reference::parse(&format!("localhost:{}/{name}", self.port)).unwrap()
    }
}

#[tokio::test]
async fn an_image_goes_there_and_back() {
    let Some(daemon) = start(None).await else { return };
    let client = client();
    let image = ImageBuilder::new().layer(Layer::bulky("a", 3 << 20)).build();
    let reference = daemon.reference("team/x:t");
    let layer = &image.layers[0];
    let blobs = [
        (&layer.descriptor, &layer.blob),
        (&image.config_descriptor, &image.config),
    ];
    for (descriptor, bytes) in blobs {
        let source = BytesSource(bytes.clone());
        let blob = PushBlob {
            descriptor,
            source: &source,
            mount_from: &[],
            progress: None,
        };
        assert_eq!(
            client.push_blob(&reference, blob).await.unwrap(),
            PushOutcome::Uploaded
        );
    }
    client
        .push_manifest(&reference, &image.descriptor, image.manifest.clone(), Some("t"))
        .await
        .unwrap();

    let found = client.resolve(&reference).await.unwrap();
    assert_eq!(found.digest, image.descriptor.digest);
    assert_eq!(client.manifest(&reference, &found).await.unwrap(), image.manifest);
    assert_eq!(
        client
            .fetch_bytes(&reference, &image.config_descriptor)
            .await
            .unwrap(),
        image.config
    );
    let tail = client.fetch(&reference, &layer.descriptor, 1000).await.unwrap();
    let tail: Vec<bytes::Bytes> = tail.try_collect().await.unwrap();
    assert_eq!(tail.concat(), layer.blob[1000..]);

    let other = daemon.reference("team/y:t");
    let source = BytesSource(layer.blob.clone());
    let from = ["team/x".to_owned()];
    let blob = PushBlob {
        descriptor: &layer.descriptor,
        source: &source,
        mount_from: &from,
        progress: None,
    };
    assert_eq!(
        client.push_blob(&other, blob).await.unwrap(),
        PushOutcome::Mounted("team/x".into())
    );
    assert!(
        client
            .resolve(&daemon.reference("team/x:none"))
            .await
            .unwrap_err()
            .is_not_found()
    );
}

#[tokio::test]
async fn certificates_are_verified_unless_told_otherwise() {
    let dir = tempfile::tempdir().unwrap();
    let (certificate, key) = (dir.path().join("cert.pem"), dir.path().join("key.pem"));
    let made = Command::new("openssl")
        .args([
            "req",
            "-x509",
            "-newkey",
            "rsa:2048",
            "-nodes",
            "-days",
            "2",
            "-subj",
            "/CN=localhost",
        ])
        .args(["-addext", "subjectAltName=DNS:localhost", "-keyout"])
        .args([key.as_os_str(), "-out".as_ref(), certificate.as_os_str()])
        .stderr(Stdio::null())
        .status();
    if !made.is_ok_and(|status| status.success()) {
        eprintln!("skipped: openssl is not installed");
        return;
    }
    let Some(daemon) = start(Some((&certificate, &key))).await else {
        return;
    };
    let reference = daemon.reference("x:t");
    let with = |host: HostConfig| {
        let mut hosts = HostsConfig::default();
        hosts.hosts.insert(reference.domain().to_owned(), host);
        client_with(hosts)
    };
    let https = HostConfig {
        plain_http: Some(false),
        ..HostConfig::default()
    };
    let error = with(https.clone()).resolve(&reference).await.unwrap_err();
    assert!(error.to_string().contains("certificate"), "{error}");
    let trusting = HostConfig {
        ca: vec![certificate.clone()],
        ..https.clone()
    };
    assert!(
        with(trusting)
            .resolve(&reference)
            .await
            .unwrap_err()
            .is_not_found()
    );
    let careless = HostConfig {
        insecure: Some(true),
        ..https
    };
    assert!(
        with(careless)
            .resolve(&reference)
            .await
            .unwrap_err()
            .is_not_found()
    );
    // Insecure and plain HTTP together: HTTPS where the server speaks it.
    let either = client().with_insecure(reference.domain());
    assert!(either.resolve(&reference).await.unwrap_err().is_not_found());
}

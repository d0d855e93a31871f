//! Registries that are asked for too much at once.

use std::sync::Arc;

use bytes::Bytes;
use futures_util::StreamExt;
use futures_util::stream;
use oci::Descriptor;
use registry::{BlobSource, ByteStream, BytesSource, Client, PushBlob};
use testkit::registry::{Action, Registry};
use tokio::sync::Notify;

use super::client;

/// A blob that is read no sooner than allowed.
#[derive(Default)]
struct Gated {
    opened: Arc<Notify>,
    go: Arc<Notify>,
}

const GATED: &[u8] = b"gated";

impl BlobSource for Gated {
    fn open(&self, _: u64) -> ByteStream {
        let (opened, go) = (Arc::clone(&self.opened), Arc::clone(&self.go));
        let reading = async move {
            opened.notify_one();
            go.notified().await;
            Ok(Bytes::from_static(GATED))
        };
        stream::once(reading).boxed()
    }
}

async fn push(client: &Client, server: &Registry, bytes: &[u8], source: &dyn BlobSource) {
    let descriptor = Descriptor::of_bytes("application/octet-stream", bytes);
    let blob = PushBlob {
        descriptor: &descriptor,
        source,
        mount_from: &[],
        progress: None,
    };
    client.push_blob(&server.reference("x:t"), blob).await.unwrap();
}

fn status(code: u16, retry_after: bool) -> Action {
    let later = retry_after.then(|| ("Retry-After", "0".to_owned()));
    Action::Status(code, later.into_iter().collect(), "")
}

/// What a registry answers, to which request, and how many transfers are allowed after the one that met it.
type Script = [(&'static str, Option<Action>, usize)];

/// From two allowed, to four, and what follows each kind of answer. A transfer that succeeds in the end counts.
fn script(first: &'static str, last: &'static str) -> Vec<(&'static str, Option<Action>, usize)> {
    let mut script: Vec<_> = [2, 3, 3, 3, 4, 4, 4, 4, 4]
        .map(|allowed| (first, None, allowed))
        .into();
    script.extend([
        // Trouble that has nothing to do with how much is asked for.
        (first, Some(status(500, false)), 4),
        (first, Some(Action::Reset), 4),
        (last, Some(status(503, false)), 2),
        (first, None, 3),
        (first, Some(status(502, true)), 2),
        (last, Some(status(429, true)), 2),
        (last, Some(status(429, false)), 2),
        (first, None, 2),
        (first, None, 3),
    ]);
    script
}

#[tokio::test]
async fn pushes_go_side_by_side_as_far_as_the_registry_allows() {
    let (server, client, held) = (Registry::start().await, client(), Arc::new(Gated::default()));
    let domain = server.domain();
    assert_eq!(client.allowed_pushes(&domain), 4);
    server.fault("POST", "/x/blobs/uploads/", 1, status(429, true));
    let holding = async { push(&client, &server, GATED, &*held).await };
    let working = async {
        held.opened.notified().await;
        let script: &Script = &script("HEAD", "PUT");
        for (number, (method, answer, allowed)) in script.iter().enumerate() {
            if let Some(answer) = answer {
                server.fault(method, "/x/blobs/", 1, answer.clone());
            }
            let bytes = number.to_string();
            push(
                &client,
                &server,
                bytes.as_bytes(),
                &BytesSource(bytes.clone().into()),
            )
            .await;
            assert_eq!(client.allowed_pushes(&domain), *allowed, "{number}: {answer:?}");
        }
        // The other way is another matter.
        assert_eq!(client.allowed_fetches(&domain), 4);
        held.go.notify_one();
    };
    tokio::join!(holding, working);
    assert_eq!(
        client.allowed_pushes(&domain),
        4,
        "nothing is remembered of transfers that are over"
    );
}

#[tokio::test]
async fn fetches_go_side_by_side_as_far_as_the_registry_allows() {
    let (server, client) = (Registry::start().await, client());
    let (domain, reference) = (server.domain(), server.reference("x:t"));
    let store = |text: &str| {
        server.add_blob("x", text.to_owned());
        Descriptor::of_bytes("", text.as_bytes())
    };
    server.fault("GET", "/x/blobs/", 1, status(429, true));
    let held = client.fetch(&reference, &store("held"), 0).await.unwrap();
    for (number, (method, answer, allowed)) in script("GET", "GET").iter().enumerate() {
        let descriptor = store(&number.to_string());
        if let Some(answer) = answer {
            server.fault(method, "/x/blobs/", 1, answer.clone());
        }
        client.fetch_bytes(&reference, &descriptor).await.unwrap();
        assert_eq!(client.allowed_fetches(&domain), *allowed, "{number}: {answer:?}");
    }
    assert_eq!(client.allowed_pushes(&domain), 4);
    drop(held);
    assert_eq!(client.allowed_fetches(&domain), 4);
}

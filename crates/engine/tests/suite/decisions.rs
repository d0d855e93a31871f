//! What clients decide while they build: whether a source may be used, and what becomes of a result.

use std::collections::BTreeMap;

use engine::ErrorKind;
use engine::bridge::{MetaRequest, PolicyAnswer};
use engine::job::JobId;
use engine::session::SessionId;
use engine::solve::{ExporterRequest, SolveRequest};
use llb::{MarshalOptions, State, pb};
use testkit::image::{ImageBuilder, LayerBuilder};
use testkit::registry::Registry;

use super::world::{World, image, request, with_file};

async fn server() -> Registry {
    let server = Registry::start().await;
    for name in ["x", "y"] {
        let layer = LayerBuilder::new().file("name", name).build();
        server.add_image(name, "t", &ImageBuilder::new().layer(layer).build());
    }
    server
}

fn checked(state: &State) -> SolveRequest {
    SolveRequest {
        definition: Some(state.marshal(&MarshalOptions::default()).unwrap()),
        policy_session: Some(SessionId("client".to_owned())),
        ..request("image", &[])
    }
}

fn source(reference: impl std::fmt::Display) -> pb::SourceOp {
    pb::SourceOp {
        identifier: format!("docker-image://{reference}"),
        ..pb::SourceOp::default()
    }
}

fn answers(world: &World, answers: impl IntoIterator<Item = PolicyAnswer>) {
    world.client.answers.lock().unwrap().extend(answers);
}

fn asked(world: &World) -> Vec<String> {
    let questions = world.client.questions.lock().unwrap();
    questions
        .iter()
        .map(|question| question.source.op.identifier.clone())
        .collect()
}

#[tokio::test(flavor = "multi_thread")]
async fn a_client_allows_and_denies() {
    let (world, server) = (World::new(), server().await);
    let state = image(server.reference("x:t"));
    answers(&world, [PolicyAnswer::Allow]);
    world.solve(checked(&state)).await.unwrap();
    let questions = world.client.questions.lock().unwrap().clone();
    assert_eq!(
        questions[0]
            .platform
            .as_ref()
            .map(|platform| platform.os.as_str()),
        Some("linux")
    );
    assert_eq!(asked(&world), [source(server.reference("x:t")).identifier]);

    let messages = vec!["no x".to_owned(), "take y".to_owned()];
    answers(
        &world,
        [PolicyAnswer::Deny {
            messages: messages.clone(),
        }],
    );
    let error = world.solve(checked(&state)).await.unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Denied);
    assert!(error.to_string().contains("not allowed by policy"), "{error}");
    assert_eq!(error.deny_messages(), messages);

    // A client that cannot be asked allows nothing.
    let error = world.solve(checked(&state)).await.unwrap_err();
    assert!(error.to_string().contains("asked too often"), "{error}");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_client_learns_more_before_it_decides() {
    let (world, server) = (World::new(), server().await);
    let op = source(server.reference("x:t"));
    let ask = |op: &pb::SourceOp| PolicyAnswer::Ask {
        op: op.clone(),
        request: Box::new(MetaRequest::default()),
    };
    answers(&world, [ask(&op), PolicyAnswer::Allow]);
    world
        .solve(checked(&image(server.reference("x:t"))))
        .await
        .unwrap();
    let questions = world.client.questions.lock().unwrap().clone();
    assert!(questions[0].source.image.is_none());
    let known = questions[1].source.image.as_ref().unwrap();
    assert!(!known.config.is_empty());

    // It cannot look at another source by way of a question.
    let mut other = op.clone();
    other.identifier = source(server.reference("y:t")).identifier;
    let mut attributed = op.clone();
    attributed
        .attrs
        .insert("image.layerlimit".to_owned(), "1".to_owned());
    for (wrong, text) in [
        (other, "different source identifier"),
        (attributed, "different source attrs"),
    ] {
        answers(&world, [ask(&wrong), PolicyAnswer::Allow]);
        let error = world
            .solve(checked(&image(server.reference("x:t"))))
            .await
            .unwrap_err();
        assert!(error.to_string().contains(text), "{error}");
        world.client.answers.lock().unwrap().clear();
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn what_a_client_converts_to_is_decided_on_too() {
    let (world, server) = (World::new(), server().await);
    let other = source(server.reference("y:t"));
    answers(
        &world,
        [PolicyAnswer::Convert(other.clone()), PolicyAnswer::Allow],
    );
    server.clear_log();
    let state = with_file(&image(server.reference("x:t")), "/a", "1");
    world.solve(checked(&state)).await.unwrap();
    let log = server.log();
    assert!(log.iter().any(|line| line.contains("/v2/y/")), "{log:?}");
    assert!(!log.iter().any(|line| line.contains("/v2/x/")), "{log:?}");
    assert_eq!(asked(&world)[1], other.identifier);

    world.client.questions.lock().unwrap().clear();
    answers(&world, std::iter::repeat_n(PolicyAnswer::Convert(other), 20));
    let error = world.solve(checked(&state)).await.unwrap_err();
    assert!(error.to_string().contains("too many policy requests"), "{error}");
    assert_eq!(asked(&world).len(), 10);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_client_chooses_exporters_late() {
    let world = World::new();
    let state = with_file(&State::scratch(), "/a", "1");
    let wish = |exporters: Vec<ExporterRequest>| SolveRequest {
        definition: Some(state.marshal(&MarshalOptions::default()).unwrap()),
        exporters,
        wants_session_exporters: true,
        ..SolveRequest::default()
    };
    *world.client.chosen.lock().unwrap() = request("oci", &[]).exporters;
    let done = world.solve(wish(Vec::new())).await.unwrap();
    assert!(world.client.file.lock().unwrap().len() > 512);
    let (refs, told) = world.client.exports.lock().unwrap().clone();
    assert_eq!(refs.len(), 1);
    assert_eq!(told, done.exporter_response);
    assert!(told.contains_key("containerimage.digest"), "{told:?}");

    // What it chooses comes on top of what was asked for; an exporter that is not known is an error.
    world.client.chosen.lock().unwrap().clear();
    world.solve(wish(request("image", &[]).exporters)).await.unwrap();
    let (_, told) = world.client.exports.lock().unwrap().clone();
    assert!(told.contains_key("containerimage.digest"), "{told:?}");
    *world.client.refusal.lock().unwrap() = Some("not so".to_owned());
    let error = world
        .solve(wish(request("image", &[]).exporters))
        .await
        .unwrap_err();
    assert_eq!(error.to_string(), "not so");
    *world.client.chosen.lock().unwrap() = request("unknown", &[]).exporters;
    assert!(world.solve(wish(Vec::new())).await.is_err());
}

#[tokio::test(flavor = "multi_thread")]
async fn nobody_looks_at_a_build_that_has_ended() {
    let world = World::new();
    let state = with_file(&State::scratch(), "/a", "1");
    let wish = SolveRequest {
        definition: Some(state.marshal(&MarshalOptions::default()).unwrap()),
        wants_session_exporters: true,
        frontend_opts: BTreeMap::new(),
        ..SolveRequest::default()
    };
    world.solve(wish).await.unwrap();
    assert!(world.engine.bridge(&JobId("build-0".to_owned())).await.is_err());
}

//! Definitions that a step has in a file of its input.

use bytes::Bytes;
use engine::ErrorKind;
use engine::solve::SolveRequest;
use llb::{Constraints, FileActions, MarshalOptions, MkfileOptions, State, encode_op, op_digest, pb};
use prost::Message as _;

use super::world::{World, request, with_file};

/// A definition of one more step, which builds what the result of `state` contains.
fn building(state: &State) -> pb::Definition {
    let mut definition = state.marshal(&MarshalOptions::default()).unwrap();
    let end = pb::Op::decode(definition.def.pop().unwrap()).unwrap();
    let input = pb::BuildInput { input: 0 };
    let op = pb::Op {
        inputs: end.inputs,
        op: Some(pb::op::Op::Build(pb::BuildOp {
            builder: -1,
            inputs: [(pb::LLB_DEFINITION_INPUT.to_owned(), input)].into(),
            ..pb::BuildOp::default()
        })),
        ..pb::Op::default()
    };
    let end = pb::Op {
        inputs: vec![pb::Input {
            digest: op_digest(&op).to_string(),
            index: 0,
        }],
        ..pb::Op::default()
    };
    definition.def.extend([encode_op(&op), encode_op(&end)]);
    definition
}

/// A state whose file has this definition.
fn holding(definition: Bytes) -> State {
    let made = MkfileOptions::default();
    let actions = FileActions::new().mkfile(pb::LLB_DEFINITION_INPUT, 0o644, definition, made);
    State::scratch().file(actions, &Constraints::new())
}

#[tokio::test(flavor = "multi_thread")]
async fn a_definition_in_a_file_is_built() {
    let world = World::new();
    let inner = with_file(&State::scratch(), "/inner", "1");
    let bytes = inner.marshal(&MarshalOptions::default()).unwrap().encode_to_vec();
    let wish = SolveRequest {
        definition: Some(building(&holding(bytes.into()))),
        ..request("image", &[])
    };
    let nested = world.solve(wish).await.unwrap();
    let direct = world.build(&inner, "image", &[]).await.unwrap();
    let other = with_file(&State::scratch(), "/other", "1");
    let other = world.build(&other, "image", &[]).await.unwrap();
    let digest = "containerimage.digest";
    assert_eq!(nested.exporter_response[digest], direct.exporter_response[digest]);
    assert_ne!(nested.exporter_response[digest], other.exporter_response[digest]);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_file_that_is_no_definition_is_the_users_error() {
    let world = World::new();
    let wish = SolveRequest {
        definition: Some(building(&holding(Bytes::from_static(b"no definition")))),
        ..request("image", &[])
    };
    let error = world.solve(wish).await.unwrap_err();
    assert_eq!(error.kind(), ErrorKind::User, "{error}");
    assert!(
        error
            .to_string()
            .contains("failed to parse buildkit.llb.definition"),
        "{error}"
    );
}

//! Definitions from clients that mean no good.

use std::collections::BTreeMap;

use bytes::Bytes;
use llb::pb::{self, Definition, Op};
use llb::{Constraints, Graph, GraphError, ImageOptions, MarshalOptions, OpError, State, encode_op, merge};
use oci::Digest;
use proptest::prelude::*;
use prost::Message as _;

fn image(name: &str) -> State {
    State::image(name, ImageOptions::default())
}

fn marshal(state: &State) -> Definition {
    state.marshal(&MarshalOptions::default()).unwrap()
}

/// Makes a definition whose result is the first output of `op`.
fn definition(op: &Op) -> Definition {
    let raw = encode_op(op);
    let root = Op {
        inputs: vec![input(&raw, 0)],
        ..Op::default()
    };
    Definition {
        def: vec![raw, root.encode_to_vec().into()],
        ..Definition::default()
    }
}

fn input(raw: &Bytes, index: i64) -> pb::Input {
    pb::Input {
        digest: Digest::sha256(raw).to_string(),
        index,
    }
}

fn exec(change: impl FnOnce(&mut pb::ExecOp)) -> Op {
    let mut exec = pb::ExecOp {
        meta: Some(pb::Meta {
            args: vec!["a".into()],
            ..Default::default()
        }),
        mounts: vec![pb::Mount {
            input: -1,
            dest: "/".into(),
            ..Default::default()
        }],
        ..Default::default()
    };
    change(&mut exec);
    Op {
        op: Some(pb::op::Op::Exec(exec)),
        ..Op::default()
    }
}

fn file(change: impl FnOnce(&mut pb::FileAction)) -> Op {
    let mkdir = pb::FileActionMkDir {
        path: "/a".into(),
        ..Default::default()
    };
    let action = Some(pb::file_action::Action::Mkdir(mkdir));
    let mut action = pb::FileAction {
        input: -1,
        secondary_input: -1,
        output: 0,
        action,
    };
    change(&mut action);
    Op {
        op: Some(pb::op::Op::File(pb::FileOp {
            actions: vec![action],
        })),
        ..Op::default()
    }
}

#[test]
fn vertices_come_in_topological_order() {
    let alpine = image("alpine");
    let one = alpine.run(["one"]).done().root();
    let graph = Graph::load(&marshal(&merge(
        [&one, &alpine, &one],
        &Constraints::new().custom_name("all"),
    )))
    .unwrap();
    assert_eq!(graph.vertices().len(), 3);
    for (at, vertex) in graph.vertices().iter().enumerate() {
        assert!(vertex.inputs.iter().all(|edge| edge.vertex < at));
        assert_eq!(vertex.digest, Digest::sha256(&vertex.raw));
    }
    let root = graph.vertex(graph.root());
    assert_eq!(
        root.name,
        "merge (one, docker-image://docker.io/library/alpine:latest, one)"
    );
    assert_eq!(root.metadata.description["llb.customname"], "all");
    assert_eq!(graph.find(&root.digest), Some(2));
}

#[test]
fn long_chains_need_no_stack() {
    let mut state = image("alpine");
    for at in 0..20_000 {
        state = state.run([at.to_string()]).done().root();
    }
    let definition = marshal(&state);
    drop(state);
    assert_eq!(Graph::load(&definition).unwrap().vertices().len(), 20_001);
}

#[test]
fn names_of_nested_merges_stay_short() {
    let mut state = image("alpine");
    for _ in 0..64 {
        state = merge([&state, &state], &Constraints::new());
    }
    let graph = Graph::load(&marshal(&state)).unwrap();
    assert!(graph.vertices().iter().all(|vertex| vertex.name.len() < 5000));
}

#[test]
fn shapes_that_are_no_graph_are_refused() {
    let load = |def: Vec<Bytes>| {
        Graph::load(&Definition {
            def,
            ..Definition::default()
        })
        .unwrap_err()
    };
    assert_eq!(load(Vec::new()), GraphError::Empty);
    assert_eq!(load(vec![encode_op(&exec(|_| {}))]), GraphError::TooSmall(1));
    assert!(matches!(
        load(vec!["\u{1}".into(), Bytes::new()]),
        GraphError::Decode(_)
    ));
    assert_eq!(
        load(vec![encode_op(&exec(|_| {})), Bytes::new()]),
        GraphError::NoRoot
    );
    let missing = Op {
        inputs: vec![pb::Input {
            digest: "sha256:x".into(),
            index: 0,
        }],
        ..Op::default()
    };
    let missing = encode_op(&missing);
    let error = load(vec![encode_op(&exec(|_| {})), missing]);
    assert_eq!(error, GraphError::MissingInput("sha256:x".into()));
    for index in [-1, 1, i64::MAX] {
        let raw = encode_op(&exec(|_| {}));
        let root = encode_op(&Op {
            inputs: vec![input(&raw, index)],
            ..Op::default()
        });
        assert_eq!(load(vec![raw, root]), GraphError::Output { input: 0, index });
    }
}

#[test]
fn bad_operations_are_refused() {
    let index = |field, index| OpError::Index { field, index };
    let value = |field, value| OpError::UnknownValue { field, value };
    let cases = [
        (Op::default(), OpError::UnknownKind),
        (
            exec(|exec| exec.meta = None),
            OpError::Missing("exec op with no meta"),
        ),
        (
            exec(|exec| exec.meta = Some(pb::Meta::default())),
            OpError::Missing("exec op with no args"),
        ),
        (
            exec(|exec| exec.mounts.clear()),
            OpError::Missing("exec op with no mounts"),
        ),
        (
            exec(|exec| exec.mounts[0].dest = "/a".into()),
            OpError::Missing("exec op with no rootfs"),
        ),
        (exec(|exec| exec.mounts[0].input = 0), index("mount input", 0)),
        (exec(|exec| exec.mounts[0].input = -2), index("mount input", -2)),
        (exec(|exec| exec.mounts[0].output = 1), index("mount output", 1)),
        (exec(|exec| exec.mounts[0].mount_type = 9), value("mount type", 9)),
        (exec(|exec| exec.network = 7), value("network mode", 7)),
        (exec(|exec| exec.security = 2), value("security mode", 2)),
        (file(|action| action.input = 0), index("file action input", 0)),
        (
            file(|action| action.secondary_input = 3),
            index("file action secondary input", 3),
        ),
        (file(|action| action.output = 1), index("file action output", 1)),
        (
            file(|action| action.action = None),
            OpError::Missing("file action of unknown kind"),
        ),
    ];
    for (op, want) in cases {
        assert_eq!(Graph::load(&definition(&op)).unwrap_err(), GraphError::Op(want));
    }
    Graph::load(&definition(&exec(|_| {}))).unwrap();
    Graph::load(&definition(&file(|_| {}))).unwrap();
}

#[test]
fn secrets_have_no_output() {
    let only_secret = exec(|exec| {
        exec.mounts[0].output = -1;
        let mount_type = pb::MountType::Secret.into();
        exec.mounts.push(pb::Mount {
            input: -1,
            dest: "/s".into(),
            mount_type,
            ..Default::default()
        });
    });
    let error = Graph::load(&definition(&only_secret)).unwrap_err();
    assert_eq!(error, GraphError::Output { input: 0, index: 0 });
}

#[test]
fn rewriting_renews_what_depends_on_the_change() {
    let state = image("alpine").run(["one"]).done().root();
    let mut graph = Graph::load(&marshal(&merge([&state, &image("busybox")], &Constraints::new()))).unwrap();
    let before: Vec<Digest> = graph.vertices().iter().map(|vertex| vertex.digest).collect();
    graph
        .rewrite::<OpError>(|vertex| {
            let mut op = vertex.op.clone();
            let Some(pb::op::Op::Source(source)) = &mut op.op else {
                return Ok(None);
            };
            source.identifier = source.identifier.replace("alpine:latest", "alpine:3");
            Ok(vertex.name.contains("alpine").then_some(op))
        })
        .unwrap();
    let want = marshal(&merge(
        [&image("alpine:3").run(["one"]).done().root(), &image("busybox")],
        &Constraints::new(),
    ));
    let want = Graph::load(&want).unwrap();
    let digests = |graph: &Graph| {
        graph
            .vertices()
            .iter()
            .map(|vertex| vertex.digest)
            .collect::<Vec<_>>()
    };
    assert_eq!(digests(&graph), digests(&want));
    assert_eq!(
        before
            .iter()
            .zip(digests(&graph))
            .filter(|(before, after)| *before == after)
            .count(),
        1
    );
}

#[test]
fn marks_change_identities_and_nothing_else() {
    let state = image("alpine")
        .run(["one"])
        .done()
        .root()
        .run(["two"])
        .done()
        .root();
    let definition = marshal(&merge([&state, &image("busybox")], &Constraints::new()));
    let plain = Graph::load(&definition).unwrap();
    let mut marked = Graph::load(&definition).unwrap();
    marked.mark(b"\0mark", |vertex| vertex.name.contains("one"));
    for (before, after) in plain.vertices().iter().zip(marked.vertices()) {
        let is_source = matches!(before.op.op, Some(pb::op::Op::Source(_)));
        assert_eq!(before.digest == after.digest, is_source, "{}", before.name);
        assert_eq!(before.op.op, after.op.op);
        let expected = if after.name.contains("one") {
            assert_eq!(before.raw, after.raw);
            [&after.raw[..], b"\0mark"].concat()
        } else {
            after.raw.to_vec()
        };
        assert_eq!(after.digest, Digest::sha256(&expected));
        for (input, edge) in after.op.inputs.iter().zip(&after.inputs) {
            assert_eq!(input.digest, marked.vertices()[edge.vertex].digest.to_string());
        }
    }
    let mut twice = Graph::load(&definition).unwrap();
    twice.mark(b"", |_| false);
    let digests = |graph: &Graph| {
        graph
            .vertices()
            .iter()
            .map(|vertex| vertex.digest)
            .collect::<Vec<_>>()
    };
    assert_eq!(digests(&twice), digests(&plain));
}

proptest! {
    #[test]
    fn any_bytes_are_read_or_refused(def in prop::collection::vec(prop::collection::vec(any::<u8>(), 0..64), 0..4)) {
        let def = def.into_iter().map(Bytes::from).collect();
        let _ = Graph::load(&Definition { def, metadata: BTreeMap::new(), source: None });
    }

    #[test]
    fn any_change_of_a_byte_is_read_or_refused(at in any::<prop::sample::Index>(), byte in any::<u8>()) {
        let mut definition = marshal(&image("alpine").run(["one", "two"]).done().root());
        let op = at.index(definition.def.len());
        let mut raw = definition.def[op].to_vec();
        let place = at.index(raw.len());
        raw[place] = byte;
        definition.def[op] = raw.into();
        let _ = Graph::load(&definition);
    }
}

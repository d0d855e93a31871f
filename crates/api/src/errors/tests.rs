//! Details survive a status, and have the bytes that Go clients read.

use super::*;
use llb::pb;

fn source() -> errdefs::Source {
    let position = |line| Some(pb::Position { line, character: 0 });
    errdefs::Source {
        info: Some(pb::SourceInfo {
            filename: "Dockerfile".into(),
            data: "FROM a\nRUN b\nRUN c\nRUN d\nRUN e\nRUN f\n".into(),
            language: "Dockerfile".into(),
            definition: None,
        }),
        ranges: vec![pb::Range {
            start: position(3),
            end: position(3),
        }],
    }
}

#[test]
fn details_survive_a_status() {
    let solve = errdefs::Solve {
        input_i_ds: vec!["a".into()],
        mount_i_ds: vec![String::new(), "b".into()],
        op: None,
        subject: Some(errdefs::solve::Subject::File(errdefs::FileAction { index: 2 })),
        description: BTreeMap::from([("k".into(), "v".into())]),
    };
    let stack = stack::Stack {
        frames: vec![stack::Frame {
            name: "f".into(),
            file: "x.rs".into(),
            line: 7,
        }],
        pid: 1,
        ..Default::default()
    };
    let failure = Failure::new(Code::Unknown, "process did not complete")
        .with(Detail::Stack(stack))
        .with(Detail::Vertex(errdefs::Vertex {
            digest: "sha256:00".into(),
        }))
        .with(Detail::Source(source()))
        .with(Detail::Solve(Box::new(solve)))
        .with(Detail::Frontend(errdefs::Frontend {
            name: "dockerfile.v0".into(),
            source: String::new(),
        }))
        .with(Detail::FrontendCap(errdefs::FrontendCap { name: "cap".into() }))
        .with(Detail::Subrequest(errdefs::Subrequest { name: "sub".into() }))
        .with(Detail::PolicyDenied(vec!["no".into(), "take another".into()]))
        .with(Detail::Other(Any {
            type_url: "type.googleapis.com/x".into(),
            value: vec![1],
        }));
    assert_eq!(Failure::from_status(&failure.to_status()), failure);
    assert_eq!(Failure::from_rpc(&failure.to_rpc()), failure);
    assert_eq!(failure.vertex(), Some("sha256:00"));
    assert_eq!(failure.sources().count(), 1);
    assert_eq!(
        failure.deny_messages().collect::<Vec<_>>(),
        ["no", "take another"]
    );
}

#[test]
fn values_are_gos_json() {
    let any = Detail::Vertex(errdefs::Vertex {
        digest: "sha256:00".into(),
    })
    .to_any();
    assert_eq!(any.type_url, "github.com/moby/buildkit/errdefs.Vertex+json");
    assert_eq!(any.value, br#"{"digest":"sha256:00"}"#);
    let any = Detail::PolicyDenied(vec!["no".into()]).to_any();
    assert_eq!(
        any.type_url,
        "github.com/moby/buildkit/policysession.DecisionResponse+json"
    );
    assert_eq!(any.value, br#"{"denyMessages":[{"message":"no"}]}"#);
    let any = Detail::Source(source()).to_any();
    let want = concat!(
        r#"{"info":{"filename":"Dockerfile","data":"RlJPTSBhClJVTiBiClJVTiBjClJVTiBkClJVTiBlClJVTiBmCg==","#,
        r#""language":"Dockerfile"},"ranges":[{"start":{"line":3},"end":{"line":3}}]}"#
    );
    assert_eq!(String::from_utf8(any.value).unwrap(), want);
}

#[test]
fn missing_positions_are_filled_in() {
    let mut open = source();
    open.ranges[0].end = None;
    assert_eq!(Detail::Source(open).to_any(), Detail::Source(source()).to_any());
}

#[test]
fn solve_inlines_every_oneof() {
    let owner = pb::ChownOpt {
        user: Some(pb::UserOpt {
            user: Some(pb::user_opt::User::ById(0)),
        }),
        group: None,
    };
    let mkdir = pb::FileActionMkDir {
        path: "/a".into(),
        mode: 0o755,
        owner: Some(owner),
        ..Default::default()
    };
    let action = pb::FileAction {
        action: Some(pb::file_action::Action::Mkdir(mkdir)),
        input: -1,
        ..Default::default()
    };
    let file = pb::FileOp {
        actions: vec![action],
    };
    let op = pb::Op {
        op: Some(pb::op::Op::File(file)),
        ..Default::default()
    };
    let solve = errdefs::Solve {
        op: Some(op),
        ..Default::default()
    };
    assert_eq!(
        solve_json(&solve),
        json!({"op": {"file": {"actions": [{
            "input": -1, "secondaryInput": 0, "output": 0,
            "mkdir": {"path": "/a", "mode": 0o755, "owner": {"user": {"byID": 0}, "group": null}},
        }]}}})
    );
}

#[test]
fn malformed_details_are_kept() {
    let any = Any {
        type_url: "github.com/moby/buildkit/errdefs.Vertex+json".into(),
        value: b"{".to_vec(),
    };
    assert_eq!(Detail::from_any(any.clone()), Detail::Other(any));
}

#[test]
fn sources_render_with_context() {
    let want = "Dockerfile:3\n--------------------\n   1 |     FROM a\n   2 |     RUN b\n   3 | >>> RUN c\n   4 |     RUN d\n   5 |     RUN e\n--------------------\n";
    assert_eq!(render_source(&source()).unwrap(), want);
    assert_eq!(render_source(&errdefs::Source::default()), None);
}

//! `RUN --device`.

use std::collections::BTreeMap;

use dockerfile::Outcome;
use llb::pb;

use crate::hostile::{convert, convert_without};

/// The devices of each step: name, and whether it may be missing.
fn devices(dockerfile: &str) -> Vec<Vec<(String, bool)>> {
    let Ok(Outcome::Build(build)) = convert(dockerfile, BTreeMap::new()) else {
        panic!("{dockerfile} is not built");
    };
    let graph = llb::Graph::load(&build.results[0].definition).unwrap();
    let of_step = |vertex: &llb::Vertex| match &vertex.op.op {
        Some(pb::op::Op::Exec(exec)) => Some(
            exec.cdi_devices
                .iter()
                .map(|device| (device.name.clone(), device.optional))
                .collect(),
        ),
        _ => None,
    };
    graph.vertices().iter().filter_map(of_step).collect()
}

#[test]
fn devices_are_optional_unless_required() {
    let one = |name: &str, optional| vec![(name.to_owned(), optional)];
    assert_eq!(
        devices("FROM alpine\nRUN --device=v/c=d x\n"),
        [one("v/c=d", true)]
    );
    assert_eq!(
        devices("FROM alpine\nRUN --device=v/c=d,required x\n"),
        [one("v/c=d", false)]
    );
    assert_eq!(
        devices("FROM alpine\nRUN --device=name=v/c,required=false x\n"),
        [one("v/c", true)]
    );
    let both = devices("FROM alpine\nRUN --device=a/b --device=class,required x\n");
    assert_eq!(
        both,
        [vec![("a/b".to_owned(), true), ("class".to_owned(), false)]]
    );
    assert_eq!(devices("FROM alpine\nRUN x\n"), [vec![]]);
}

#[test]
fn a_server_without_devices_is_named() {
    let without = [llb::caps::EXEC_META_CDI.to_owned()];
    let failure = convert_without("FROM alpine\nRUN --device=v/c=d x\n", &without).unwrap_err();
    assert_eq!(
        failure.message,
        "RUN --device is not supported by this build server"
    );
    assert_eq!(failure.sources[0].ranges[0].start.line, 2);
    assert!(convert_without("FROM alpine\nRUN x\n", &without).is_ok());
}

#[test]
fn unknown_options_are_refused() {
    for flag in [
        "v/c,nonsense",
        "v/c,requird=true",
        "name=a,name=b",
        "v/c,required=maybe",
    ] {
        let text = format!("FROM alpine\nRUN --device={flag} x\n");
        assert!(convert(&text, BTreeMap::new()).is_err(), "{flag}");
    }
}

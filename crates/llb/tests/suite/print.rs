//! Printing and comparing definitions.

use llb::{
    Constraints, CopyOptions, FileActions, Graph, ImageOptions, MarshalOptions, MkdirOptions, Mount, State,
    compare, dump,
};
use oci::Platform;

fn marshal(state: &State) -> llb::pb::Definition {
    let options = MarshalOptions {
        platform: Platform::new("linux", "amd64"),
        ..MarshalOptions::default()
    };
    state.marshal(&options).unwrap()
}

fn example(arg: &str) -> State {
    let alpine = State::image("alpine", ImageOptions::default());
    let copied = State::scratch().file(
        FileActions::new()
            .mkdir("/a", 0o755, MkdirOptions::default())
            .copy(&alpine, "/x", "/y", CopyOptions::default()),
        &Constraints::new(),
    );
    alpine.run([arg]).mount(Mount::new("/m", &copied)).done().root()
}

#[test]
fn json_lines_are_the_go_clients() {
    let ops = dump::ops(&marshal(&example("one"))).unwrap();
    let text = dump::to_json_lines(&ops).unwrap();
    let first = text.lines().next().unwrap();
    let want = concat!(
        r#"{"Op":{"Op":{"source":{"identifier":"docker-image://docker.io/library/alpine:latest"}},"#,
        r#""platform":{"Architecture":"amd64","OS":"linux"},"constraints":{}},"Digest":"#,
    );
    assert!(first.starts_with(want), "{first}");
    assert!(
        first.ends_with(r#","OpMetadata":{"caps":{"source.image":true}}}"#),
        "{first}"
    );
    assert!(
        text.contains(r#"{"input":1,"secondaryInput":0,"output":0,"Action":{"copy":{"src":"/x","dest":"/y""#),
        "{text}"
    );
}

#[test]
fn dot_shows_mounts() {
    let definition = marshal(&example("one"));
    let ops = dump::ops(&definition).unwrap();
    let text = dump::to_dot(&ops);
    assert!(text.starts_with("digraph {\n") && text.ends_with("}\n"));
    assert!(text.contains(r#"[label="one" shape="box"];"#), "{text}");
    assert!(
        text.contains(r#"[label="mkdir{path=/a},copy{src=/x, dest=/y}" shape="note"];"#),
        "{text}"
    );
    assert!(text.contains(r#"[label="/m"];"#), "{text}");
}

#[test]
fn comparing_names_the_field_that_changed() {
    let load = |state: &State| Graph::load(&marshal(state)).unwrap();
    let (before, after) = (
        load(&example("one")),
        load(&example("two").run(["more"]).done().root()),
    );
    assert_eq!(compare::compare(&before, &before).same, 3);
    let difference = compare::compare(&before, &load(&example("two")));
    assert_eq!((difference.same, difference.changed.len()), (2, 1));
    let change = &difference.changed[0];
    assert_eq!(
        change.fields,
        [("Op.exec.meta.args.0".to_owned(), "one".into(), "two".into())]
    );
    let text = compare::to_text(&difference);
    assert!(
        text.starts_with("2 same\n~ two\n") && text.contains(r#"Op.exec.meta.args.0: "one" -> "two""#),
        "{text}"
    );
    let difference = compare::compare(&before, &after);
    assert_eq!(difference.changed.len() + difference.added.len(), 2);
}

#[test]
fn json_reads_what_it_writes() {
    for op in dump::ops(&marshal(&example("one"))).unwrap() {
        let text = oci::json::to_string(&op.op).unwrap();
        assert_eq!(serde_json::from_str::<llb::pb::Op>(&text).unwrap(), op.op);
    }
}

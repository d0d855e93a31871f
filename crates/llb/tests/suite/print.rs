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

fn load(state: &State) -> Graph {
    Graph::load(&marshal(state)).unwrap()
}

#[test]
fn comparing_names_the_field_that_changed() {
    let before = load(&example("one"));
    let same = compare::compare(&before, &before);
    assert_eq!((same.same, same.is_empty()), (3, true));
    let difference = compare::compare(&before, &load(&example("two")));
    assert_eq!((difference.same, difference.changed.len()), (2, 1));
    let change = &difference.changed[0];
    assert_eq!(
        change.fields,
        [("Op.exec.meta.args.0".to_owned(), "one".into(), "two".into())]
    );
    let text = compare::to_text(&difference);
    assert!(
        text.starts_with("2 same, 1 changed, 0 removed, 0 added\n~ two\n")
            && text.contains(r#"Op.exec.meta.args.0: "one" -> "two""#),
        "{text}"
    );
}

/// A chain of runs on an image.
fn chain(steps: &[&[&str]]) -> Graph {
    let mut state = State::image("alpine", ImageOptions::default());
    for step in steps {
        state = state.run(step.iter().copied()).done().root();
    }
    load(&state)
}

#[test]
fn a_step_put_in_between_is_all_that_is_new() {
    let before = chain(&[&["a"], &["b"], &["c"]]);
    let difference = compare::compare(&before, &chain(&[&["a"], &["new"], &["b"], &["c"]]));
    assert_eq!(difference.same, 2);
    assert!(difference.removed.is_empty());
    let added: Vec<&str> = difference.added.iter().map(|(_, name)| name.as_str()).collect();
    assert_eq!(added, ["new"]);
    let [change] = difference.changed.as_slice() else {
        panic!("{difference:?}");
    };
    // What follows differs through its input only.
    assert_eq!(change.name, "b");
    assert_eq!(change.fields, [("inputs.0".to_owned(), "a".into(), "new".into())]);
}

#[test]
fn words_put_into_a_list_are_told_alone() {
    let before = chain(&[&["cc", "-c", "x.c"]]);
    let difference = compare::compare(&before, &chain(&[&["cc", "-O2", "-g", "-c", "x.c"]]));
    let null = serde_json::Value::Null;
    assert_eq!(
        difference.changed[0].fields,
        [
            ("Op.exec.meta.args.1".to_owned(), null.clone(), "-O2".into()),
            ("Op.exec.meta.args.2".to_owned(), null, "-g".into()),
        ]
    );
}

#[test]
fn steps_that_are_gone_and_flags_that_are_set_are_told() {
    let before = chain(&[&["a"], &["b"]]);
    let difference = compare::compare(&before, &chain(&[&["a"]]));
    let removed: Vec<&str> = difference.removed.iter().map(|(_, name)| name.as_str()).collect();
    assert_eq!((difference.same, removed), (2, vec!["b"]));

    let alpine = State::image("alpine", ImageOptions::default());
    let without = load(&alpine.run(["a"]).done().root());
    let ignore = Constraints::new().ignore_cache();
    let ignoring = load(&alpine.run(["a"]).constraints(&ignore).done().root());
    let difference = compare::compare(&without, &ignoring);
    assert_eq!(
        difference.changed[0].fields,
        [("ignore_cache".to_owned(), false.into(), true.into())]
    );
}

#[test]
fn dot_quotes_as_go_does() {
    let ops = dump::ops(&marshal(
        &State::image("alpine", ImageOptions::default())
            .run(["a\u{1b}\"é'"])
            .done()
            .root(),
    ));
    let text = dump::to_dot(&ops.unwrap());
    assert!(text.contains(r#"[label="a\x1b\"é'" shape="box"];"#), "{text}");
}

#[test]
fn json_reads_what_it_writes() {
    for op in dump::ops(&marshal(&example("one"))).unwrap() {
        let text = oci::json::to_string(&op.op).unwrap();
        assert_eq!(serde_json::from_str::<llb::pb::Op>(&text).unwrap(), op.op);
    }
}

//! What is described, what is hidden, and the words for what differs.

use std::collections::BTreeSet;
use std::sync::Arc;

use layer::checksum::ListedKind;
use llb::pb;
use oci::Digest;
use solver::{Link, NewRecord, RecordId};

use super::compare::{changes, is_equal, nearest};
use super::describe;
use super::describe::{Described, Pin, Subject, describe as describe_vertex, groups, shown_name};
use super::listing::{Entry, Listing, MAX_BYTES, diff};
use super::redact::{is_secret_name, text};
use crate::explanation::{Change, Explanation, Reason};
use crate::op::{OpProvenance, VertexSpec};

fn exec(name: &str, args: &[&str], env: &[&str]) -> VertexSpec {
    let strings = |texts: &[&str]| texts.iter().map(|text| (*text).to_owned()).collect();
    let op = pb::ExecOp {
        meta: Some(pb::Meta {
            args: strings(args),
            env: strings(env),
            cwd: "/".to_owned(),
            ..pb::Meta::default()
        }),
        ..pb::ExecOp::default()
    };
    spec(name, pb::op::Op::Exec(op))
}

fn spec(name: &str, op: pb::op::Op) -> VertexSpec {
    VertexSpec {
        op: Arc::new(pb::Op {
            op: Some(op),
            platform: Some(pb::Platform {
                os: "linux".to_owned(),
                architecture: "amd64".to_owned(),
                ..pb::Platform::default()
            }),
            ..pb::Op::default()
        }),
        name: name.to_owned(),
        input_names: vec!["[1/3] FROM base:latest".to_owned()],
        ..VertexSpec::default()
    }
}

fn record(op: &VertexSpec, parent: &str) -> NewRecord {
    let op = Digest::sha256(serde_json::to_vec(op.op.as_ref()).unwrap());
    NewRecord {
        record: RecordId(Digest::sha256(format!("{op}{parent}"))),
        links: vec![Link {
            parent: RecordId(Digest::sha256(parent)),
            input: 0,
            op,
            output: 0,
            selector: None,
        }],
        result: None,
    }
}

fn described(spec: &VertexSpec, parent: &str) -> Described {
    described_on(spec, parent, &[])
}

fn described_on(spec: &VertexSpec, parent: &str, pins: &[Option<Pin>]) -> Described {
    describe_vertex(Subject {
        spec,
        record: &record(spec, parent),
        provenance: None,
        pins,
    })
}

fn told(now: &Described, before: &Described) -> Vec<String> {
    let changes = changes(now, before, &mut |_, _| Vec::new());
    changes.iter().map(Change::text).collect()
}

fn image(source: &str, hash: &str) -> Pin {
    Pin {
        what: "image".to_owned(),
        source: source.to_owned(),
        value: Digest::sha256(hash).to_string(),
    }
}

#[test]
fn definitions_are_compared_in_words() {
    let before = described(&exec("[2/3] RUN a", &["sh", "-c", "a"], &["A=1", "B=2"]), "p");
    let now = described(&exec("[2/3] RUN b", &["sh", "-c", "b"], &["A=3", "C=4"]), "p");
    assert_eq!(
        told(&now, &before),
        [
            "argument 3 \"a\"→\"b\"",
            "environment variable A \"1\"→\"3\"",
            "environment variable C was added: \"4\"",
            "environment variable B was removed: \"2\"",
        ]
    );
    assert!(told(&now, &now).is_empty() && is_equal(&now, &now) && !is_equal(&now, &before));

    let more = described(
        &exec("[2/3] RUN a", &["sh", "-e", "-c", "a"], &["A=1", "B=2"]),
        "p",
    );
    assert_eq!(told(&more, &before), ["arguments \"sh -c a\"→\"sh -e -c a\""]);
    let mut other = exec("[2/3] RUN a", &["sh", "-c", "a"], &["A=1", "B=2"]);
    Arc::make_mut(&mut other.op)
        .platform
        .as_mut()
        .unwrap()
        .architecture = "arm64".to_owned();
    assert_eq!(
        told(&described(&other, "p"), &before),
        ["platform \"linux/amd64\"→\"linux/arm64\""]
    );
    let long = |end: &str| {
        let script = format!("{}{end}", "x".repeat(300));
        described(&exec("[2/3] RUN a", &["sh", "-c", &script], &[]), "p")
    };
    assert_eq!(
        told(&long("one"), &long("two")),
        ["argument 3 \"…xxxxxxxxxxxxxxxxtwo\"→\"…xxxxxxxxxxxxxxxxone\""]
    );
}

#[test]
fn file_ops_are_compared_in_words() {
    let copy = |dest: &str, mode: i32| {
        let copy = pb::FileActionCopy {
            src: "/a".to_owned(),
            dest: dest.to_owned(),
            mode,
            ..pb::FileActionCopy::default()
        };
        let action = pb::FileAction {
            action: Some(pb::file_action::Action::Copy(copy)),
            ..pb::FileAction::default()
        };
        let actions = vec![action];
        described(
            &spec("[2/2] COPY a b", pb::op::Op::File(pb::FileOp { actions })),
            "p",
        )
    };
    assert_eq!(
        told(&copy("/c", 0o640), &copy("/b", -1)),
        [
            "destination of the copy \"/b\"→\"/c\"",
            "mode of the copy was added: \"0640\"",
        ]
    );
    let heredoc = |data: &str| {
        let made = pb::FileActionMkFile {
            path: "/f".to_owned(),
            data: data.to_owned().into(),
            ..pb::FileActionMkFile::default()
        };
        let action = pb::FileAction {
            action: Some(pb::file_action::Action::Mkfile(made)),
            ..pb::FileAction::default()
        };
        let actions = vec![action];
        described(
            &spec("[2/2] COPY <<F /f", pb::op::Op::File(pb::FileOp { actions })),
            "p",
        )
    };
    let (before, now) = (heredoc("canary-1"), heredoc("canary-2"));
    assert_eq!(told(&now, &before), ["content of the file changed"]);
    assert!(!serde_json::to_string(&now).unwrap().contains("canary"));
}

#[test]
fn inputs_are_compared_in_words() {
    let step = exec("[2/3] RUN a", &["a"], &[]);
    let on = |parent: &str, pin: Pin| described_on(&step, parent, &[Some(pin)]);
    let base = "docker.io/library/base:latest";
    let (one, two) = (
        Digest::sha256("one").to_string(),
        Digest::sha256("two").to_string(),
    );
    assert_eq!(
        told(&on("q", image(base, "two")), &on("p", image(base, "one"))),
        [format!("digest of image {base} {}→{}", &one[..19], &two[..19])]
    );
    assert_eq!(
        told(&on("q", image("other", "two")), &on("p", image(base, "one"))),
        [format!("image {base}→other")]
    );
    assert_eq!(
        told(&described(&step, "q"), &described(&step, "p")),
        ["input \"[1/3] FROM base:latest\" changed"]
    );
    let mut renamed = step.clone();
    renamed.input_names = vec!["[1/3] RUN other".to_owned()];
    assert_eq!(
        told(&described(&renamed, "q"), &described(&step, "p")),
        ["input \"FROM base:latest\" became \"RUN other\""]
    );
    let provenance = OpProvenance {
        source: Some("https://user:canary@host/file".to_owned()),
        pin: Some("sha256:1".to_owned()),
        ..OpProvenance::default()
    };
    let pin = describe::pin(&provenance).unwrap();
    assert_eq!(
        (pin.what.as_str(), pin.source.as_str()),
        ("checksum", "https://***@host/file")
    );
}

#[test]
fn the_nearest_is_the_same_step_in_another_state() {
    let now = described(&exec("[2/3] RUN a", &["a"], &["A=1"]), "p");
    let earlier = |name: &str, args: &[&str], env: &[&str], parent: &str| {
        (name.to_owned(), described(&exec(name, args, env), parent))
    };
    let candidates = [
        earlier("[2/3] RUN far", &["far"], &["B=1"], "elsewhere"),
        earlier("[2/3] RUN a", &["a"], &["A=2"], "q"),
        earlier("[5/9] RUN a", &["a"], &["A=2"], "p"),
        earlier("[2/3] RUN b", &["b"], &["A=1"], "p"),
        earlier("[3/3] RUN c", &["c"], &["A=1"], "p"),
    ];
    assert_eq!(nearest(&now, &candidates).unwrap().0, "[2/3] RUN b");
    assert_eq!(nearest(&now, &candidates[..3]).unwrap().0, "[5/9] RUN a");
    // What happens to stand at the same place elsewhere is another step.
    assert!(nearest(&now, &candidates[..1]).is_none());
    assert!(nearest(&now, &candidates[4..]).is_none());

    let digest = Digest::sha256("x");
    let with_digest = described(&exec(&format!("[1/3] FROM a@{digest}"), &["a"], &[]), "p");
    let without = described(&exec("[1/5] FROM a", &["a"], &[]), "p");
    assert_eq!(groups(&with_digest)[0], groups(&without)[0]);
    assert_ne!(groups(&with_digest)[1], groups(&without)[1]);
    let unnamed = |name: &str, parent: &str| groups(&described(&exec(name, &["a"], &[]), parent));
    assert_eq!(unnamed("mkfile /a", "p")[1], unnamed("mkfile /b", "p")[1]);
    assert_ne!(unnamed("mkfile /a", "p")[1], unnamed("mkfile /a", "q")[1]);
}

#[test]
fn secrets_are_not_described() {
    let mut step = exec(
        "[2/3] RUN curl https://me:canary-url@host/ && echo canary-env --password canary-flag",
        &["sh", "-c", "echo canary-env; API_KEY='canary quoted' x"],
        &[
            "API_TOKEN=canary-env",
            "PATH=/bin",
            "URL=http://u:canary-url@host/x",
        ],
    );
    step.input_names = vec!["[1/3] ADD https://token:canary-url@host/".to_owned()];
    let now = described(&step, "p");
    let json = serde_json::to_string(&now).unwrap();
    assert!(!json.contains("canary"), "{json}");
    assert!(!shown_name(&step).contains("canary"), "{}", shown_name(&step));
    let mut other = step.clone();
    if let Some(pb::op::Op::Exec(exec)) = &mut Arc::make_mut(&mut other.op).op {
        exec.meta.as_mut().unwrap().env[0] = "API_TOKEN=canary-other".to_owned();
    }
    assert_eq!(
        told(&described(&other, "p"), &now)[..],
        [
            // The other value is not known to be a secret of this step any more, but no name gives it away either.
            "environment variable API_TOKEN changed",
        ][..]
    );
}

#[test]
fn names_of_secrets_are_known() {
    for secret in [
        "TOKEN",
        "github_token",
        "DB_PASSWORD",
        "apiKey",
        "AWS_SECRET_ACCESS_KEY",
        "CREDENTIALS",
        "NPM_AUTH",
        "GH_PAT",
        "db-pwd",
    ] {
        assert!(is_secret_name(secret), "{secret}");
    }
    for plain in ["PATH", "HOME", "PWD", "AUTHOR", "VERSION", "PATCH", "COMPASS"] {
        assert!(!is_secret_name(plain), "{plain}");
    }
}

#[test]
fn texts_lose_their_secrets() {
    for (given, expected) in [
        (
            "git clone https://me:pw@host/x.git",
            "git clone https://***@host/x.git",
        ),
        (
            "https://token@host/ and ftp://a:b@h",
            "https://***@host/ and ftp://***@h",
        ),
        ("TOKEN=abc make", "TOKEN=*** make"),
        ("A=1 TOKEN='a b' B=2", "A=1 TOKEN=*** B=2"),
        ("x --password hunter2 --user me", "x --password *** --user me"),
        ("x --password=hunter2 -v", "x --password=*** -v"),
        (
            "curl 'https://h/?a=1&token=abc&b=2'",
            "curl 'https://h/?a=1&token=***&b=2'",
        ),
        ("Authorization: Bearer abcdefgh", "Authorization: *** abcdefgh"),
        // The comma goes, too: it could be part of a secret.
        (
            "{\"password\": \"abc\", \"n\": 1}",
            "{\"password\": *** \"n\": 1}",
        ),
        ("make KEY=\"a \\\" b\" all", "make KEY=*** all"),
        ("nothing to see", "nothing to see"),
        ("SECRET_URL=https://host/x", "SECRET_URL=***"),
    ] {
        let shown = text(given, &[]);
        if given.starts_with("Authorization") {
            assert!(!shown.contains("abcdefgh"), "{shown}");
        } else {
            assert_eq!(shown, expected);
        }
    }
    assert_eq!(
        text("echo s3cr3t abc", &["s3cr3t".to_owned(), "abc".to_owned()]),
        "echo *** abc"
    );
}

fn file(mode: u32, size_bytes: u64, hash: u8) -> Entry {
    Entry {
        kind: ListedKind::File,
        mode,
        uid: 0,
        gid: 0,
        size_bytes,
        link: None,
        xattrs: None,
        hash: [hash; 16],
    }
}

fn listing(files: &[(&str, Entry)]) -> Listing {
    Listing {
        files: files
            .iter()
            .map(|(path, entry)| ((*path).to_owned(), entry.clone()))
            .collect(),
        is_cut: false,
    }
}

fn file_texts(before: &Listing, now: &Listing, same: Option<bool>) -> Vec<String> {
    let changes = diff(before, now, "context", &mut |_, _| same);
    changes.iter().map(Change::text).collect()
}

#[test]
fn files_are_compared_in_words() {
    let link = |target: &str, hash| Entry {
        kind: ListedKind::Symlink,
        link: Some(target.to_owned()),
        ..file(0o777, 0, hash)
    };
    let owned = |hash| Entry {
        uid: 1000,
        gid: 100,
        ..file(0o644, 5, hash)
    };
    let before = listing(&[
        ("bytes", file(0o644, 3, 1)),
        ("gone", file(0o644, 3, 1)),
        ("kind", file(0o644, 3, 1)),
        ("link", link("a", 1)),
        ("mode", file(0o644, 3, 1)),
        ("owner", file(0o644, 5, 1)),
        ("same", file(0o644, 3, 1)),
        ("size", file(0o644, 3, 1)),
    ]);
    let now = listing(&[
        ("bytes", file(0o644, 3, 2)),
        ("kind", link("x", 2)),
        ("link", link("b", 2)),
        ("mode", file(0o664, 3, 2)),
        ("new", file(0o644, 3, 2)),
        ("owner", owned(2)),
        ("same", file(0o644, 3, 1)),
        ("size", file(0o644, 9, 2)),
    ]);
    assert_eq!(
        file_texts(&before, &now, Some(true)),
        [
            "content of bytes changed",
            "gone was removed",
            "type of kind file→symbolic link",
            "target of link a→b",
            "mode of mode 0644→0664",
            "new was added",
            "owner of owner 0:0→1000:100",
            "content of size changed, 3 bytes→9 bytes",
        ]
    );
    let (before, now) = (
        listing(&[("f", file(0o644, 3, 1))]),
        listing(&[("f", file(0o600, 3, 2))]),
    );
    assert_eq!(file_texts(&before, &now, None), ["mode of f 0644→0600"]);
    assert_eq!(
        file_texts(&before, &now, Some(false)),
        ["mode of f 0644→0600", "content of f changed"]
    );
}

#[test]
fn what_a_cut_listing_leaves_out_is_not_absent() {
    let cut = Listing {
        is_cut: true,
        ..listing(&[("a", file(0o644, 1, 1)), ("b", file(0o644, 1, 1))])
    };
    let now = listing(&[
        ("a", file(0o644, 1, 1)),
        ("aa", file(0o644, 1, 1)),
        ("z", file(0o644, 1, 1)),
    ]);
    assert_eq!(file_texts(&cut, &now, None), ["aa was added", "b was removed"]);
}

#[test]
fn listings_are_stored() {
    let mut stored = listing(&[
        (".", file(0o755, 0, 9)),
        ("dir/one", file(0o4755, 1 << 40, 1)),
        ("dir/öne", file(0o644, 7, 2)),
    ]);
    let entry = stored.files.get_mut("dir/one").unwrap();
    entry.xattrs = Some([7; 16]);
    let link = Entry {
        kind: ListedKind::Symlink,
        link: Some("dir".to_owned()),
        ..file(0o777, 0, 3)
    };
    stored.files.insert("link".to_owned(), link);
    let bytes = stored.encode();
    assert_eq!(Listing::decode(&bytes), Some(stored.clone()));
    for end in 2..bytes.len() {
        // A prefix is shorter or nothing, never a panic.
        assert_ne!(Listing::decode(&bytes[..end]), Some(stored.clone()));
    }
    assert_eq!(Listing::decode(b"\x02\0"), None);

    let many = (0..60_000).map(|number| (format!("{number:08}/file"), file(0o644, 1, 1)));
    let large = Listing {
        files: many.collect(),
        is_cut: false,
    };
    let bytes = large.encode();
    let read = Listing::decode(&bytes).unwrap();
    assert!(bytes.len() <= MAX_BYTES && read.is_cut && read.files.len() < 60_000);
}

#[test]
fn explanations_are_told_in_lines() {
    let mut explanation = Explanation {
        vertex: Digest::sha256("v"),
        name: String::new(),
        reason: Reason::NeverBuilt,
        compared_at: None,
        changes: Vec::new(),
        omitted: 0,
    };
    assert_eq!(explanation.lines(), ["never built here before"]);
    explanation.reason = Reason::Changed;
    explanation.changes.push(Change {
        subject: "user".to_owned(),
        before: Some("a".to_owned()),
        after: Some("b\nc".to_owned()),
        ..Change::default()
    });
    explanation.omitted = 2;
    assert_eq!(explanation.lines(), ["user \"a\"→\"b c\"", "and 2 more"]);
    let names: BTreeSet<&str> = [
        Reason::Changed,
        Reason::NeverBuilt,
        Reason::Expired,
        Reason::Unusable,
        Reason::Ignored,
        Reason::Client,
        Reason::Unidentified,
    ]
    .map(Reason::as_str)
    .into();
    assert_eq!(names.len(), 7);
}

//! Directories of clients that are no directories.

use anyhow::{Result, bail};
use api::fsutil::{Message, Packet, Stat, mode};
use bytes::Bytes;
use llb::pb;
use prost::Message as _;

use super::client::{Content, Files, name, request};
use super::ops::{definition, exec, image, op, second, source};
use super::yard::{End, MARK, Yard};
use crate::e2e::fixture::Lab;

/// A directory that attacks.
struct Case {
    name: &'static str,
    files: fn(&Lab) -> Files,
    /// What the source asks for.
    attrs: &'static [(&'static str, &'static str)],
    /// Runs where the directory is at `/m`; empty: no step.
    script: &'static str,
    end: End,
}

const fn refused(name: &'static str, files: fn(&Lab) -> Files, parts: &'static [&'static str]) -> Case {
    Case {
        name,
        files,
        attrs: &[],
        script: "",
        end: End::Refused(parts),
    }
}

const fn confined(name: &'static str, files: fn(&Lab) -> Files, script: &'static str) -> Case {
    Case {
        name,
        files,
        attrs: &[],
        script,
        end: End::Built,
    }
}

/// A file.
fn entry(path: &str) -> Stat {
    Stat {
        path: Bytes::copy_from_slice(path.as_bytes()),
        mode: 0o644,
        size: 7,
        ..Stat::default()
    }
}

fn of_mode(path: &str, mode: u32) -> Stat {
    Stat {
        mode,
        size: 0,
        ..entry(path)
    }
}

fn dir(path: &str) -> Stat {
    of_mode(path, mode::DIR | 0o755)
}

fn symlink(path: &str, target: &str) -> Stat {
    linked(of_mode(path, mode::SYMLINK | 0o777), target)
}

fn linked(stat: Stat, target: &str) -> Stat {
    Stat {
        linkname: Bytes::copy_from_slice(target.as_bytes()),
        ..stat
    }
}

/// A directory of these entries, whose files all have the content that they should.
fn listing(stats: Vec<Stat>) -> Files {
    Files::honest(stats, b"content".to_vec())
}

/// The packets of a listing, to be spoiled.
fn packets(stats: Vec<Stat>) -> Vec<Packet> {
    listing(stats).listing
}

fn of_size(size: i64) -> Files {
    listing(vec![Stat { size, ..entry("a") }])
}

fn outside(lab: &Lab) -> String {
    lab.dir().join("outside").to_string_lossy().into_owned()
}

const CASES: &[Case] = &[
    refused(
        "a name that leads up",
        |_| listing(vec![entry(&format!("../../../../{MARK}"))]),
        &["cooper-attack", "not a clean relative path"],
    ),
    refused(
        "an absolute name",
        |_| listing(vec![entry(&format!("/tmp/{MARK}"))]),
        &["cooper-attack", "not a clean relative path"],
    ),
    refused(
        "a name that leads up on the way",
        |_| listing(vec![dir("a"), entry("a/../b")]),
        &["a/../b", "not a clean relative path"],
    ),
    refused(
        "a name with a zero byte",
        |_| listing(vec![entry("a\0b")]),
        &["a\\0b", "not a clean relative path"],
    ),
    confined(
        "a name with a newline",
        |_| listing(vec![entry("a\nb")]),
        "[ \"$(cat \"/m/a\nb\")\" = content ]",
    ),
    refused(
        "a name of 300 bytes",
        |_| listing(vec![entry(&"n".repeat(300))]),
        &["nnnn", "name too long"],
    ),
    refused(
        "a name of a megabyte",
        |_| listing(vec![entry(&"n".repeat(1_500_000))]),
        &["nnnn", "too long"],
    ),
    refused(
        "a name that is no text",
        |_| {
            listing(vec![Stat {
                path: Bytes::from_static(b"a\xff"),
                ..entry("")
            }])
        },
        &["is not UTF-8"],
    ),
    refused(
        "a link target of a megabyte",
        |_| listing(vec![symlink("l", &"n".repeat(1_500_000))]),
        &["too long"],
    ),
    refused(
        "a file below a file",
        |_| listing(vec![entry("a"), entry("a/b")]),
        &["a/b", "directory was not listed"],
    ),
    refused(
        "a file below a link that leads out",
        |lab| listing(vec![symlink("a", &outside(lab)), entry(&format!("a/{MARK}"))]),
        &["a/cooper-attack", "directory was not listed"],
    ),
    refused(
        "names out of order",
        |_| listing(vec![entry("b"), entry("a")]),
        &["\"a\"", "out of order"],
    ),
    refused(
        "a name twice",
        |lab| listing(vec![dir("a"), symlink("a", &outside(lab)), entry("a/victim")]),
        &["\"a\"", "out of order"],
    ),
    refused(
        "a hard link out",
        |lab| {
            listing(vec![linked(
                entry(MARK),
                &format!("../../../..{}/victim", outside(lab)),
            )])
        },
        &["cooper-attack", "target was not listed"],
    ),
    refused(
        "a hard link to a link",
        |lab| {
            listing(vec![
                symlink("a", &format!("{}/victim", outside(lab))),
                linked(entry("b"), "a"),
            ])
        },
        &["\"b\"", "target was not listed"],
    ),
    refused("a size of less than nothing", |_| of_size(-1), &["\"a\"", "size"]),
    refused(
        "a size of the smallest number",
        |_| of_size(i64::MIN),
        &["\"a\"", "size"],
    ),
    refused(
        "a directory with a size of less than nothing",
        |_| listing(vec![Stat { size: -1, ..dir("a") }]),
        &["\"a\"", "size"],
    ),
    confined(
        "a size of the greatest number",
        |_| of_size(i64::MAX),
        "[ \"$(cat /m/a)\" = content ]",
    ),
    refused(
        "a device of less than nothing",
        |_| {
            listing(vec![Stat {
                devmajor: -1,
                devminor: i64::MIN,
                ..of_mode("a", mode::DEVICE | 0o666)
            }])
        },
        &["mknod a"],
    ),
    confined(
        "devices",
        |_| {
            listing(vec![
                Stat {
                    devmajor: 8,
                    devminor: 0,
                    ..of_mode("disk", mode::DEVICE | 0o666)
                },
                of_mode("pipe", mode::NAMED_PIPE | 0o666),
                of_mode("socket", mode::SOCKET | 0o666),
            ])
        },
        "[ -b /m/disk ] && [ -p /m/pipe ] && ! head -c 1 /m/disk",
    ),
    refused(
        "a thing of several kinds",
        |lab| {
            listing(vec![linked(
                of_mode("a", mode::DIR | mode::SYMLINK | mode::DEVICE),
                &outside(lab),
            )])
        },
        &["\"a\"", "it is of several kinds"],
    ),
    confined(
        "a thing of no known kind",
        |_| listing(vec![of_mode("a", mode::IRREGULAR | 0o644)]),
        "[ -f /m/a ]",
    ),
    confined(
        "times and owners that there cannot be",
        |_| {
            listing(vec![Stat {
                mod_time: i64::MIN,
                uid: u32::MAX - 1,
                gid: u32::MAX - 1,
                ..entry("a")
            }])
        },
        "[ -f /m/a ]",
    ),
    confined(
        "marks of the kernel's overlays",
        |_| {
            let redirect = ("trusted.overlay.redirect".to_owned(), Bytes::from_static(b"/etc"));
            let marked = Stat {
                xattrs: [redirect].into(),
                ..dir("a")
            };
            listing(vec![marked, entry("a/b")])
        },
        "[ \"$(ls /m/a)\" = b ]",
    ),
    refused(
        "attributes without a name",
        |_| {
            listing(vec![Stat {
                xattrs: [("x\0y".to_owned(), Bytes::from_static(b"z"))].into(),
                ..entry("a")
            }])
        },
        &["setxattr a"],
    ),
    refused(
        "an entry after the end of the listing",
        |_| {
            let mut packets = packets(vec![entry("a")]);
            packets.push(Message::Stat(Some(entry("b"))).into());
            Files::new(packets)
        },
        &["after the end of the listing"],
    ),
    refused(
        "content that nobody asked for",
        |_| {
            let mut packets = packets(vec![entry("a")]);
            packets.insert(
                0,
                Message::Data {
                    id: 7,
                    bytes: Bytes::from_static(b"x"),
                }
                .into(),
            );
            Files::new(packets)
        },
        &["not asked for"],
    ),
    refused(
        "content of another file",
        |_| Files {
            content: Content::Script(|id| {
                let bytes = Bytes::from_static(b"x");
                vec![Message::Data { id: id + 1, bytes }.into()]
            }),
            ..listing(vec![entry("a")])
        },
        &["not asked for"],
    ),
    refused(
        "an end before the end",
        |_| Files::new(vec![Message::Fin.into()]),
        &["ended before the receiver"],
    ),
    refused(
        "a question instead of an answer",
        |_| Files::new(vec![Message::Request(0).into()]),
        &["sent a request"],
    ),
    refused(
        "a packet of unknown type",
        |_| {
            Files::new(vec![Packet {
                r#type: 99,
                ..Packet::default()
            }])
        },
        &["unknown packet type 99"],
    ),
    refused(
        "a failure of a megabyte",
        |_| Files::new(vec![Message::Failed("evil".repeat(400_000)).into()]),
        &["error from sender: evilevil"],
    ),
    Case {
        attrs: &[("local.differ", "evil")],
        ..refused(
            "a comparison that nobody knows",
            |_| listing(vec![entry("a")]),
            &["local.differ", "evil"],
        )
    },
    Case {
        attrs: &[("local.includepattern", "{}")],
        ..refused(
            "patterns that are no list",
            |_| listing(vec![entry("a")]),
            &["local.includepattern"],
        )
    },
];

/// Reads a directory, and looks at it in a step.
fn reading(lab: &Lab, attrs: &[(&str, &str)], script: &str) -> pb::Definition {
    let hint = name("hint");
    let attrs = [attrs, &[("local.sharedkeyhint", hint.as_str())]].concat();
    let from = source("local://context", &attrs);
    if script.is_empty() {
        return definition(&[from]);
    }
    let base = image(&lab.busybox());
    let step = exec(&[&base, &from], script, |exec, _| exec.mounts.push(second("/m")));
    definition(&[from, base, step])
}

/// Sends them all.
pub fn run(lab: &Lab) -> Result<()> {
    let mut yard = Yard::open(lab)?;
    for case in CASES {
        let files = (case.files)(lab);
        let request = request(reading(lab, case.attrs, case.script));
        yard.case(case.name, case.end, |yard| yard.client.solve_with(files, request));
    }
    swaps(lab, &mut yard);
    nests(&mut yard);
    yard.close()
}

/// Directories in directories, as many as a path can have, which go all at once.
fn deep(yard: &mut Yard<'_>) {
    let key = name("key");
    let path = vec!["d"; 2000].join("/");
    let dirs = (0..path.len()).step_by(2).map(|end| dir(&path[..=end])).collect();
    let rounds = [
        ("two thousand directories in each other", dirs),
        ("nothing in their place", Vec::new()),
    ];
    for (what, stats) in rounds {
        let files = Files {
            shared_key: key.clone(),
            ..listing(stats)
        };
        let request = request(definition(&[source("local://context", &[])]));
        yard.case(what, End::Built, |yard| yard.client.solve_with(files, request));
    }
}

/// A definition that builds what the file `filename` of the client's directory says.
fn building(filename: &str) -> pb::Definition {
    let from = source("local://context", &[]);
    let build = pb::BuildOp {
        builder: -1,
        inputs: [(pb::LLB_DEFINITION_INPUT.to_owned(), pb::BuildInput { input: 0 })].into(),
        attrs: [(llb::attr::LLB_DEFINITION_FILENAME.to_owned(), filename.to_owned())].into(),
        ..pb::BuildOp::default()
    };
    let build = op(pb::op::Op::Build(build), &[&from]);
    definition(&[from, build])
}

/// Definitions in files that need themselves.
fn nests(yard: &mut Yard<'_>) {
    fn send(id: u32, filename: &str) -> Vec<Packet> {
        let bytes = Bytes::from(building(filename).encode_to_vec());
        [bytes, Bytes::new()]
            .map(|bytes| Message::Data { id, bytes }.into())
            .to_vec()
    }
    let itself = Files {
        content: Content::Script(|id| send(id, "a")),
        ..listing(vec![entry("a")])
    };
    // Each of two files builds the other one.
    let each_other = Files {
        content: Content::Script(|id| send(id, if id == 0 { "b" } else { "a" })),
        ..listing(vec![entry("a"), entry("b")])
    };
    for (what, files) in [
        ("a definition that builds itself", itself),
        ("definitions that build each other", each_other),
    ] {
        let request = request(building("a"));
        yard.case(
            what,
            End::Refused(&["a build op must not build itself"]),
            |yard| yard.client.solve_with(files, request),
        );
    }
}

/// Directories that are something else the next time.
fn swaps(lab: &Lab, yard: &mut Yard<'_>) {
    let key = name("key");
    let again = |stats: Vec<Stat>| Files {
        shared_key: key.clone(),
        ..listing(stats)
    };
    let rounds = [
        (
            "a directory, at first",
            again(vec![dir("d"), dir("d/dir"), entry("d/victim")]),
        ),
        (
            "a link to the outside in its place",
            again(vec![symlink("d", &outside(lab))]),
        ),
        ("a directory once more", again(vec![dir("d"), entry("d/victim")])),
        ("a link in the place of its file", {
            let victim = format!("{}/victim", outside(lab));
            again(vec![dir("d"), symlink("d/victim", &victim)])
        }),
        (
            "a file in the place of that link",
            again(vec![dir("d"), entry("d/victim")]),
        ),
        ("nothing", again(Vec::new())),
    ];
    for (what, files) in rounds {
        // All rounds are of the same directory.
        let request = request(definition(&[source("local://context", &[])]));
        yard.case(what, End::Built, |yard| yard.client.solve_with(files, request));
    }
    deep(yard);
    // A listing that is broken off leaves nothing that the next one relies on.
    let broken = Files {
        listing: vec![
            Message::Stat(Some(dir("d"))).into(),
            Message::Stat(Some(symlink("d/out", &outside(lab)))).into(),
            Message::Failed("enough".to_owned()).into(),
        ],
        ..again(Vec::new())
    };
    let request = || request(definition(&[source("local://context", &[])]));
    let ask = request();
    yard.case("a directory broken off", End::Refused(&["enough"]), |yard| {
        yard.client.solve_with(broken, ask)
    });
    let ask = request();
    yard.case("a directory after it", End::Built, |yard| {
        let files = again(vec![dir("d"), dir("d/out"), entry("d/out/victim")]);
        match yard.client.solve_with(files, ask)? {
            Ok(answer) => Ok(Ok(answer)),
            Err(status) => bail!("{}", status.message()),
        }
    });
}

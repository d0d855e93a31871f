//! Definitions that no honest client makes.

use anyhow::Result;
use bytes::Bytes;
use llb::pb;
use llb::pb::file_action::Action;

use super::client::{Files, request};
use super::ops::{
    copying, definition, exec, file, files, image, input, linking, making, mkfile, mount, of_unknown_kind,
    op, raw, second, source,
};
use super::yard::{DefinitionCase, End, MARK, Yard};
use crate::e2e::fixture::Lab;

/// Sends them all.
pub fn run(lab: &Lab) -> Result<()> {
    let mut yard = Yard::open(lab)?;
    for case in SHAPES
        .iter()
        .chain(INDICES)
        .chain(ENUMS)
        .chain(NAMES)
        .chain(STEPS)
    {
        let definition = (case.make)(lab);
        let request = request(definition);
        yard.case(case.name, case.end, |yard| {
            yard.client.solve_with(Files::new(Vec::new()), request)
        });
    }
    yard.close()
}

const fn refused(
    name: &'static str,
    make: fn(&Lab) -> pb::Definition,
    parts: &'static [&'static str],
) -> DefinitionCase {
    DefinitionCase {
        name,
        make,
        end: End::Refused(parts),
    }
}

const fn built(name: &'static str, make: fn(&Lab) -> pb::Definition) -> DefinitionCase {
    DefinitionCase {
        name,
        make,
        end: End::Built,
    }
}

/// A result, and an end that asks for it in its own way.
fn with_end(inputs: impl FnOnce(&pb::Op) -> Vec<pb::Input>) -> pb::Definition {
    let made = mkfile("x", b"x");
    let end = pb::Op {
        inputs: inputs(&made),
        ..pb::Op::default()
    };
    raw([&made, &end].map(llb::encode_op))
}

/// An input that names its operation by `digest`.
fn naming(digest: String) -> pb::Definition {
    with_end(|_| vec![pb::Input { digest, index: 0 }])
}

/// What a definition is as a whole.
const SHAPES: &[DefinitionCase] = &[
    refused(
        "one operation",
        |_| raw([llb::encode_op(&mkfile("x", b"x"))]),
        &["invalid LLB with 1 vertexes"],
    ),
    refused(
        "bytes that are no operation",
        |_| {
            raw([
                Bytes::from_static(b"\xff\xff\xff\xff"),
                Bytes::from_static(b"\x0a\x7f"),
            ])
        },
        &["failed to parse llb proto op"],
    ),
    refused(
        "no result",
        |_| with_end(|_| Vec::new()),
        &["no inputs on last vertex"],
    ),
    refused(
        "an operation that is missing",
        |_| naming(llb::op_digest(&mkfile("elsewhere", b"")).to_string()),
        &["invalid missing input digest sha256:"],
    ),
    refused(
        "a path for a digest",
        |_| naming("../../etc/passwd".to_owned()),
        &["invalid missing input digest ../../etc/passwd"],
    ),
    refused(
        "a digest of a megabyte",
        |_| naming("sha256:".to_owned() + &"a".repeat(1_500_000)),
        &["invalid missing input digest sha256:aaaa"],
    ),
    refused(
        "more operations than there may be",
        |_| {
            let made = mkfile("x", b"x");
            let many = (0..100_001_i64).map(|index| {
                llb::encode_op(&pb::Op {
                    inputs: vec![input(&made, index)],
                    ..pb::Op::default()
                })
            });
            raw(many)
        },
        &["operations exceed 100000"],
    ),
    refused(
        "more inputs than an operation may have",
        |_| with_end(|made| vec![input(made, 0); 10_001]),
        &["inputs of an operation exceed 10000"],
    ),
    refused(
        "a file action that needs itself",
        |_| {
            let action = pb::FileAction {
                input: 0,
                secondary_input: pb::EMPTY,
                output: 0,
                action: Some(Action::Mkfile(making("x", b""))),
            };
            definition(&[files(vec![action], &[])])
        },
        &["invalid file action input index 0"],
    ),
    refused(
        "a long chain whose begin is missing",
        |_| {
            let mut ops = vec![op(
                pb::op::Op::Merge(pb::MergeOp::default()),
                &[&mkfile("missing", b"")],
            )];
            for _ in 0..5000 {
                let merge = pb::MergeOp {
                    inputs: vec![pb::MergeInput { input: 0 }],
                };
                let last = op(pb::op::Op::Merge(merge), &[&ops[ops.len() - 1]]);
                ops.push(last);
            }
            definition(&ops)
        },
        &["invalid missing input digest"],
    ),
];

/// A file operation with one action that was spoiled.
fn spoiled_action(spoil: impl FnOnce(&mut pb::FileAction)) -> pb::Definition {
    let base = mkfile("base", b"");
    let mut action = pb::FileAction {
        input: 0,
        secondary_input: pb::EMPTY,
        output: 0,
        action: Some(Action::Mkfile(making("x", b""))),
    };
    spoil(&mut action);
    let file = files(vec![action], &[&base]);
    definition(&[base, file])
}

fn spoiled_step(lab: &Lab, spoil: impl FnOnce(&mut pb::ExecOp, &mut pb::Meta)) -> pb::Definition {
    let base = image(&lab.busybox());
    let step = exec(&[&base], "true", spoil);
    definition(&[base, step])
}

fn spoiled_mount(lab: &Lab, spoil: impl FnOnce(&mut pb::Mount)) -> pb::Definition {
    spoiled_step(lab, |exec, _| spoil(&mut exec.mounts[0]))
}

fn diff(lower: Option<i64>, upper: Option<i64>) -> pb::Definition {
    let base = mkfile("base", b"");
    let diff = pb::DiffOp {
        lower: lower.map(|input| pb::LowerDiffInput { input }),
        upper: upper.map(|input| pb::UpperDiffInput { input }),
    };
    let diff = op(pb::op::Op::Diff(diff), &[&base]);
    definition(&[base, diff])
}

/// Numbers that point nowhere.
const INDICES: &[DefinitionCase] = &[
    refused(
        "output -1",
        |_| with_end(|made| vec![input(made, -1)]),
        &["output index -1"],
    ),
    refused(
        "output of the smallest number",
        |_| with_end(|made| vec![input(made, i64::MIN)]),
        &["output index -9223372036854775808"],
    ),
    refused(
        "output that is not there",
        |_| with_end(|made| vec![input(made, 1)]),
        &["output index 1"],
    ),
    refused(
        "file action input -2",
        |_| spoiled_action(|action| action.input = -2),
        &["invalid file action input index -2"],
    ),
    refused(
        "file action secondary input 9",
        |_| spoiled_action(|action| action.secondary_input = 9),
        &["invalid file action secondary input index 9"],
    ),
    refused(
        "file action output -7",
        |_| spoiled_action(|action| action.output = -7),
        &["invalid file action output index -7"],
    ),
    refused(
        "file action output of the greatest number",
        |_| spoiled_action(|action| action.output = i64::MAX),
        &["invalid file action output index 9223372036854775807"],
    ),
    refused(
        "owner named in input -9",
        |_| {
            spoiled_action(|action| {
                let named = pb::NamedUserOpt {
                    name: "root".to_owned(),
                    input: -9,
                };
                let user = pb::UserOpt {
                    user: Some(pb::user_opt::User::ByName(named)),
                };
                let owner = Some(pb::ChownOpt {
                    user: Some(user),
                    group: None,
                });
                action.action = Some(Action::Mkfile(pb::FileActionMkFile {
                    owner,
                    ..making("x", b"")
                }));
            })
        },
        &["invalid file owner input index -9"],
    ),
    refused(
        "mount input -2",
        |lab| spoiled_mount(lab, |mount| mount.input = -2),
        &["invalid mount input index -2"],
    ),
    refused(
        "mount output of the greatest number",
        |lab| spoiled_mount(lab, |mount| mount.output = i64::MAX),
        &["invalid mount output index 9223372036854775807"],
    ),
    refused(
        "merge input -1",
        |_| {
            let base = mkfile("base", b"");
            let merge = pb::MergeOp {
                inputs: vec![pb::MergeInput { input: -1 }],
            };
            let merge = op(pb::op::Op::Merge(merge), &[&base]);
            definition(&[base, merge])
        },
        &["invalid merge input index -1"],
    ),
    refused(
        "diff input -5",
        |_| diff(Some(-5), Some(0)),
        &["invalid diff input index -5"],
    ),
    refused(
        "diff of one side",
        |_| diff(None, Some(0)),
        &["nil lower or upper input"],
    ),
    refused(
        "build input -1",
        |_| {
            let base = mkfile(pb::LLB_DEFINITION_INPUT, b"");
            let build = pb::BuildOp {
                builder: -1,
                inputs: [(pb::LLB_DEFINITION_INPUT.to_owned(), pb::BuildInput { input: -1 })].into(),
                ..pb::BuildOp::default()
            };
            let build = op(pb::op::Op::Build(build), &[&base]);
            definition(&[base, build])
        },
        &["invalid build op input index -1"],
    ),
    refused(
        "passthrough of input 3",
        |_| {
            let base = mkfile("base", b"");
            let pass = pb::PassthroughOp {
                id: "id".to_owned(),
                outputs: vec![3],
            };
            let pass = op(pb::op::Op::Passthrough(pass), &[&base]);
            definition(&[base, pass])
        },
        &["invalid passthrough output input index 3"],
    ),
];

/// Values of enums that no version knows, and parts that are not there.
const ENUMS: &[DefinitionCase] = &[
    refused(
        "operation of unknown kind",
        |_| {
            let made = mkfile("x", b"x");
            let unknown = of_unknown_kind(&made);
            let end = pb::Op {
                inputs: vec![pb::Input {
                    digest: oci::Digest::sha256(&unknown).to_string(),
                    index: 0,
                }],
                ..pb::Op::default()
            };
            raw([llb::encode_op(&made), unknown, llb::encode_op(&end)])
        },
        &["invalid op of unknown kind"],
    ),
    refused(
        "network 99",
        |lab| spoiled_step(lab, |exec, _| exec.network = 99),
        &["invalid network mode 99"],
    ),
    refused(
        "security -1",
        |lab| spoiled_step(lab, |exec, _| exec.security = -1),
        &["invalid security mode -1"],
    ),
    refused(
        "mount of type 42",
        |lab| spoiled_mount(lab, |mount| mount.mount_type = 42),
        &["invalid mount type 42"],
    ),
    refused(
        "content cache 9",
        |lab| spoiled_mount(lab, |mount| mount.content_cache = 9),
        &["invalid mount content cache 9"],
    ),
    refused(
        "sharing 1000",
        |lab| {
            spoiled_mount(lab, |mount| {
                mount.cache_opt = Some(pb::CacheOpt {
                    id: "x".to_owned(),
                    sharing: 1000,
                });
            })
        },
        &["invalid cache sharing mode 1000"],
    ),
    refused(
        "file action of unknown kind",
        |_| spoiled_action(|action| action.action = None),
        &["invalid file action of unknown kind"],
    ),
    refused(
        "no actions",
        |_| definition(&[files(Vec::new(), &[])]),
        &["file op with no actions"],
    ),
    refused(
        "step without arguments",
        |lab| spoiled_step(lab, |_, meta| meta.args.clear()),
        &["exec op with no args"],
    ),
    refused(
        "step without root",
        |lab| spoiled_mount(lab, |mount| mount.dest = "/elsewhere".to_owned()),
        &["exec op with no rootfs"],
    ),
    refused(
        "source of unknown kind",
        |_| definition(&[source("evil://x", &[])]),
        &["evil"],
    ),
    refused(
        "source without a name",
        |_| definition(&[source("", &[])]),
        &["source op with no identifier"],
    ),
    refused(
        "a capability that nobody has",
        |_| {
            let mut definition = definition(&[mkfile("x", b"x")]);
            let digest = oci::Digest::sha256(&definition.def[0]).to_string();
            let metadata = pb::OpMetadata {
                caps: [("evil.cap".to_owned(), true)].into(),
                ..pb::OpMetadata::default()
            };
            definition.metadata.insert(digest, metadata);
            definition
        },
        &["evil.cap", "is not supported"],
    ),
];

/// A name that is too long for any file.
fn long_name() -> String {
    "n".repeat(4096)
}

/// Makes a file under a hostile name, and looks in a step that it is where it belongs.
fn made_at(lab: &Lab, path: &str, script: &str) -> pb::Definition {
    let made = mkfile(path, b"made");
    let base = image(&lab.busybox());
    let step = exec(&[&base, &made], script, |exec, _| exec.mounts.push(second("/m")));
    definition(&[made, base, step])
}

/// Puts links into a tree that lead out, and does something through them.
fn through_links(lab: &Lab, action: Action, script: &str) -> pb::Definition {
    let outside = lab.dir().join("outside");
    let absolute = file(linking("/abs", &outside.to_string_lossy()), &[]);
    let up = format!("../../../../../../../../..{}", outside.display());
    let links = file(linking("/up", &up), &[&absolute]);
    let more = file(linking("/loop", "loop"), &[&links]);
    let done = file(action, &[&more]);
    let base = image(&lab.busybox());
    let step = exec(&[&base, &done], script, |exec, _| exec.mounts.push(second("/m")));
    definition(&[absolute, links, more, done, base, step])
}

/// Names of files.
const NAMES: &[DefinitionCase] = &[
    built("a file above the root", |lab| {
        made_at(lab, &format!("../../../../{MARK}-a"), &format!("cat /m/{MARK}-a"))
    }),
    built("a name with a newline", |lab| {
        made_at(lab, "a\nb", "cat \"/m/a\nb\"")
    }),
    refused(
        "a name with a zero byte",
        |_| definition(&[mkfile("a\0b", b"")]),
        &["lstat a\0b: invalid argument"],
    ),
    refused(
        "a name of 4 KiB",
        |_| definition(&[mkfile(&long_name(), b"")]),
        &["nnnn", "name too long"],
    ),
    refused(
        "a name of a megabyte",
        |_| definition(&[mkfile(&"n".repeat(1_500_000), b"")]),
        &["nnnn", "name too long"],
    ),
    refused(
        "a path of 5,000 directories",
        |_| {
            let mkdir = pb::FileActionMkDir {
                path: "/a".repeat(5000),
                mode: 0o755,
                make_parents: true,
                timestamp: -1,
                ..pb::FileActionMkDir::default()
            };
            definition(&[file(Action::Mkdir(mkdir), &[])])
        },
        &["name too long"],
    ),
    refused(
        "a file through a link that leads out",
        |lab| through_links(lab, Action::Mkfile(making("/abs/cooper-attack-b", b"x")), "true"),
        &["/abs/cooper-attack-b: no such file or directory"],
    ),
    refused(
        "a file through a link that leads up",
        |lab| through_links(lab, Action::Mkfile(making("/up/cooper-attack-c", b"x")), "true"),
        &["/up/cooper-attack-c: no such file or directory"],
    ),
    built("a directory through a link that leads up", |lab| {
        let mkdir = pb::FileActionMkDir {
            path: format!("/up/{MARK}-c/d"),
            mode: 0o755,
            make_parents: true,
            timestamp: -1,
            ..pb::FileActionMkDir::default()
        };
        let script = format!("find /m -name {MARK}-c | grep outside");
        through_links(lab, Action::Mkdir(mkdir), &script)
    }),
    refused(
        "a file through a link to itself",
        |lab| through_links(lab, Action::Mkfile(making("/loop/x", b"x")), "true"),
        &["too many levels of symbolic links"],
    ),
    built("removal through a link that leads out", |lab| {
        let rm = pb::FileActionRm {
            path: "/abs/victim".to_owned(),
            allow_not_found: true,
            allow_wildcard: false,
        };
        through_links(lab, Action::Rm(rm), "true")
    }),
    built("removal above the root", |lab| {
        let rm = pb::FileActionRm {
            path: "../../../../*/outside/*".to_owned(),
            allow_not_found: true,
            allow_wildcard: true,
        };
        through_links(lab, Action::Rm(rm), "true")
    }),
    refused(
        "a copy of what is outside",
        |lab| {
            let victim = lab.dir().join("outside/victim");
            let from = file(linking("/link", &victim.to_string_lossy()), &[]);
            let copy = copying("/link", "/copied", |copy| copy.follow_symlink = true);
            let empty = mkfile("x", b"");
            let copied = file(copy, &[&empty, &from]);
            definition(&[from, empty, copied])
        },
        &["\"/link\": not found"],
    ),
    refused(
        "a pattern that is none",
        |_| {
            let from = mkfile("x", b"");
            let copy = copying("/[", "/", |copy| copy.allow_wildcard = true);
            let copied = file(copy, &[&from, &from]);
            definition(&[from, copied])
        },
        &["syntax error in pattern"],
    ),
    refused(
        "a mode that is none",
        |_| {
            let from = mkfile("x", b"");
            let copy = copying("/x", "/y", |copy| copy.mode_str = "u=evil".to_owned());
            let copied = file(copy, &[&from, &from]);
            definition(&[from, copied])
        },
        &["u=evil"],
    ),
    refused(
        "a git repository that is an option",
        |_| {
            let url = format!("git://--upload-pack=touch /tmp/{MARK}-d");
            definition(&[source(&url, &[])])
        },
        &["--upload-pack"],
    ),
    refused(
        "a git repository by a program",
        |_| {
            let url = format!("ext::sh -c touch% /tmp/{MARK}-e");
            let attrs = [("git.fullurl", url.as_str())];
            definition(&[source("git://127.0.0.1:1/x.git", &attrs)])
        },
        &["ext"],
    ),
    refused(
        "an image with a path for a name",
        |_| definition(&[image("../../etc/passwd")]),
        &["../../etc/passwd"],
    ),
    refused(
        "an image with a newline in its name",
        |_| definition(&[image("a\nb")]),
        &["a\\nb"],
    ),
];

/// What steps ask for.
const STEPS: &[DefinitionCase] = &[
    built("a working directory above the root", |lab| {
        spoiled_step(lab, |_, meta| {
            meta.cwd = format!("../../{MARK}-f");
            meta.args[2] = format!("[ \"$PWD\" = /{MARK}-f ]");
        })
    }),
    built("a mount above the root", |lab| {
        spoiled_step(lab, |exec, meta| {
            let dest = format!("/../../{MARK}-g");
            exec.mounts.push(mount(pb::MountType::Tmpfs, &dest));
            meta.args[2] = format!("[ -d /{MARK}-g ]");
        })
    }),
    built("a mount on a link that leads out", |lab| {
        let outside = lab.dir().join("outside/dir");
        let base = image(&lab.busybox());
        let linked = file(linking("/out", &outside.to_string_lossy()), &[&base]);
        let step = exec(
            &[&linked],
            &format!("touch /out/{MARK}-h; [ -f {}/{MARK}-h ]", outside.display()),
            |exec, _| exec.mounts.push(mount(pb::MountType::Tmpfs, "/out")),
        );
        definition(&[base, linked, step])
    }),
    refused(
        "a part of a mount above its root",
        |lab| {
            let from = mkfile("x", b"");
            let base = image(&lab.busybox());
            let step = exec(&[&base, &from], "cat /m", |exec, _| {
                exec.mounts.push(pb::Mount {
                    selector: "../../../../../../etc/passwd".to_owned(),
                    ..second("/m")
                });
            });
            definition(&[from, base, step])
        },
        &["etc/passwd"],
    ),
    refused(
        "a zero byte in an argument",
        |lab| spoiled_step(lab, |_, meta| meta.args[2] = "echo \0".to_owned()),
        &["a NUL byte in"],
    ),
    refused(
        "a zero byte in a variable",
        |lab| spoiled_step(lab, |_, meta| meta.env.push("A=b\0c".to_owned())),
        &["a NUL byte in"],
    ),
    refused(
        "a user that there is not",
        |lab| spoiled_step(lab, |_, meta| meta.user = "../../etc/passwd".to_owned()),
        &["../../etc/passwd"],
    ),
    refused(
        "a user number that is too great",
        |lab| spoiled_step(lab, |_, meta| meta.user = "99999999999999999999".to_owned()),
        &["99999999999999999999"],
    ),
    refused(
        "a limit that is none",
        |lab| {
            spoiled_step(lab, |_, meta| {
                meta.ulimit.push(pb::Ulimit {
                    name: "evil".to_owned(),
                    soft: -7,
                    hard: -9,
                });
            })
        },
        &["evil"],
    ),
    refused(
        "a host with a newline in its name",
        |lab| {
            spoiled_step(lab, |_, meta| {
                meta.extra_hosts.push(pb::HostIp {
                    host: "x\n1.2.3.4 registry".to_owned(),
                    ip: "127.0.0.1".to_owned(),
                });
            })
        },
        &["x\\n1.2.3.4 registry"],
    ),
    refused(
        "a host with an address that is none",
        |lab| {
            spoiled_step(lab, |_, meta| {
                meta.extra_hosts.push(pb::HostIp {
                    host: "x".to_owned(),
                    ip: "1.2.3.4 y".to_owned(),
                });
            })
        },
        &["1.2.3.4 y"],
    ),
    refused(
        "a control group above its root",
        |lab| {
            spoiled_step(lab, |_, meta| {
                meta.cgroup_parent = format!("../../../../{MARK}-i");
            })
        },
        &["../../../../cooper-attack-i"],
    ),
    refused(
        "a device by path",
        |lab| {
            spoiled_step(lab, |exec, _| {
                exec.cdi_devices.push(pb::CdiDevice {
                    name: "/dev/sda".to_owned(),
                    optional: false,
                });
            })
        },
        &["/dev/sda"],
    ),
    built("a temporary directory of less than nothing", |lab| {
        spoiled_step(lab, |exec, _| {
            exec.mounts.push(pb::Mount {
                tmpfs_opt: Some(pb::TmpfsOpt { size: -1 }),
                ..mount(pb::MountType::Tmpfs, "/t")
            });
        })
    }),
    built("a cache with a path for an id", |lab| {
        spoiled_step(lab, |exec, meta| {
            exec.mounts.push(pb::Mount {
                cache_opt: Some(pb::CacheOpt {
                    id: format!("../../../{MARK}-j"),
                    sharing: 0,
                }),
                ..mount(pb::MountType::Cache, "/c")
            });
            meta.args[2] = "touch /c/x".to_owned();
        })
    }),
    refused(
        "rights that were not granted",
        |lab| {
            spoiled_step(lab, |exec, _| {
                exec.security = pb::SecurityMode::Insecure.into();
            })
        },
        &["security.insecure is not allowed"],
    ),
    refused(
        "a secret that there is not, above the root",
        |lab| {
            spoiled_step(lab, |exec, _| {
                exec.mounts.push(pb::Mount {
                    secret_opt: Some(pb::SecretOpt {
                        id: "../../../etc/shadow".to_owned(),
                        ..pb::SecretOpt::default()
                    }),
                    ..mount(pb::MountType::Secret, &format!("/../../{MARK}-k"))
                });
            })
        },
        &["../../../etc/shadow"],
    ),
    built("two roots", |lab| {
        spoiled_step(lab, |exec, _| {
            let again = pb::Mount {
                output: pb::EMPTY,
                ..exec.mounts[0].clone()
            };
            exec.mounts.push(again);
        })
    }),
];

//! Definitions as any client may send them: what steps and file operations can ask for and no Dockerfile says.

use anyhow::{Context as _, Result, bail, ensure};
use api::pb::control::SolveRequest;
use llb::pb;
use llb::pb::file_action::Action;
use llb::pb::user_opt::User;

use super::fixture::Lab;
use super::hostile::client::{Client, request};
use super::hostile::ops::{
    copying, definition, exec, file, files, image, input, linking, making, mkfile, mount, second,
};
use super::{Need, Scenario};

/// This file's scenarios.
pub const SCENARIOS: &[Scenario] = &[
    Scenario {
        name: "steps-by-definition",
        needs: &[Need::Root],
        run: steps,
    },
    Scenario {
        name: "files-by-definition",
        needs: &[Need::Root],
        run: file_operations,
    },
    Scenario {
        name: "limits-and-proxies-are-no-keys",
        needs: &[Need::Root],
        run: outside_of_keys,
    },
    Scenario {
        name: "rights-are-granted-twice",
        needs: &[Need::Root],
        run: rights,
    },
];

/// A definition, and parts of the error that it ends with; none: it is built.
type Case = (&'static str, fn(&Lab) -> pb::Definition, &'static [&'static str]);

/// Runs all, so that one run shows all that is wrong.
fn run_cases(lab: &Lab, cases: &[Case]) -> Result<()> {
    let daemon = lab.daemon()?;
    let client = Client::connect(&daemon)?;
    let outcomes = cases.iter().map(|(name, make, parts)| {
        expect_answer(&client, request(make(lab)), parts).with_context(|| (*name).to_owned())
    });
    let failures = outcomes.filter_map(Result::err);
    let complaints: Vec<String> = failures.map(|error| format!("{error:#}")).collect();
    ensure!(complaints.is_empty(), "{}", complaints.join("\n"));
    Ok(())
}

fn expect_answer(client: &Client, request: SolveRequest, parts: &[&str]) -> Result<()> {
    match client.solve(request)? {
        Ok(_) if parts.is_empty() => Ok(()),
        Ok(_) => bail!("it was built"),
        Err(status) => {
            let text = status.message();
            let is_expected = !parts.is_empty() && parts.iter().all(|part| text.contains(part));
            ensure!(is_expected, "it failed: {text}");
            Ok(())
        }
    }
}

/// One step on the base image.
fn step(lab: &Lab, script: &str, edit: impl FnOnce(&mut pb::ExecOp, &mut pb::Meta)) -> pb::Definition {
    let base = image(&lab.busybox());
    let step = exec(&[&base], script, edit);
    definition(&[base, step])
}

const ACCOUNTS: &str = "echo 'app:x:1200:1300::/home/app:/bin/sh' >> /etc/passwd; \
    echo 'app:x:1300:' >> /etc/group; echo 'extra:x:1400:app' >> /etc/group";

/// A step of a user, on an image with accounts of its own; `prepare` is run before.
fn as_user(lab: &Lab, prepare: &str, user: &str, script: &str) -> pb::Definition {
    let base = image(&lab.busybox());
    let prepared = exec(&[&base], prepare, |_, _| {});
    let step = exec(&[&prepared], script, |_, meta| user.clone_into(&mut meta.user));
    definition(&[base, prepared, step])
}

fn user_is(lab: &Lab, user: &str, expected: &str) -> pb::Definition {
    let script = format!("[ \"$(id -u) $(id -g) $(id -G)\" = '{expected}' ]");
    as_user(lab, ACCOUNTS, user, &script)
}

const STEPS: &[Case] = &[
    (
        "a user by name",
        |lab| user_is(lab, "app", "1200 1300 1300 1400"),
        &[],
    ),
    (
        "a user by number",
        |lab| user_is(lab, "1200", "1200 1300 1300 1400"),
        &[],
    ),
    (
        "a group by name",
        |lab| user_is(lab, "app:extra", "1200 1400 1400"),
        &[],
    ),
    ("a group by number", |lab| user_is(lab, "app:7", "1200 7 7"), &[]),
    (
        "numbers without accounts",
        |lab| user_is(lab, "5000:6000", "5000 6000 6000"),
        &[],
    ),
    (
        "a list of users that is too long to be read",
        |lab| {
            let prepare = "head -c 10485761 /dev/zero | tr '\\0' '#' > /etc/passwd";
            as_user(lab, prepare, "app", "true")
        },
        &["\"/etc/passwd\" exceeds 10485760 bytes"],
    ),
    (
        "a list of groups that is too long to be read",
        |lab| {
            let prepare = "head -c 10485761 /dev/zero | tr '\\0' '#' > /etc/group";
            as_user(lab, prepare, "app", "true")
        },
        &["\"/etc/group\" exceeds 10485760 bytes"],
    ),
    (
        "a working directory that is made and stays",
        |lab| {
            let base = image(&lab.busybox());
            let made = exec(&[&base], "[ $PWD = /made/by/it ]", |_, meta| {
                "/made/by/it".clone_into(&mut meta.cwd);
            });
            let look = exec(&[&made], "[ -d /made/by/it ]", |_, _| {});
            definition(&[base, made, look])
        },
        &[],
    ),
    (
        "a host name and further hosts",
        |lab| {
            let script = "[ $(hostname) = named ] && grep -q '^10.1.2.3\tsome.where$' /etc/hosts && \
                grep -q '^127.0.0.1\tlocalhost named$' /etc/hosts && ! (echo x >> /etc/hosts) 2>/dev/null";
            step(lab, script, |_, meta| {
                "named".clone_into(&mut meta.hostname);
                meta.extra_hosts.push(pb::HostIp {
                    host: "some.where".to_owned(),
                    ip: "10.1.2.3".to_owned(),
                });
            })
        },
        &[],
    ),
    (
        "limits of processes",
        |lab| {
            step(
                lab,
                "[ $(ulimit -n) = 100 ] && [ $(ulimit -Hn) = 200 ]",
                |_, meta| {
                    meta.ulimit.push(pb::Ulimit {
                        name: "nofile".to_owned(),
                        soft: 100,
                        hard: 200,
                    });
                },
            )
        },
        &[],
    ),
    (
        "no terminal and no input",
        |lab| step(lab, "! [ -t 0 ] && ! [ -t 1 ] && [ -z \"$(cat)\" ]", |_, _| {}),
        &[],
    ),
    (
        "an exit code that is none of those allowed",
        |lab| step(lab, "exit 3", |_, meta| meta.valid_exit_codes = vec![0, 4]),
        &["did not complete successfully: exit code: 3"],
    ),
    (
        "an exit code that is allowed",
        |lab| {
            let base = image(&lab.busybox());
            let failing = exec(&[&base], "touch /made; exit 3", |_, meta| {
                meta.valid_exit_codes = vec![3, 4];
            });
            let look = exec(&[&failing], "[ -e /made ]", |_, _| {});
            definition(&[base, failing, look])
        },
        &[],
    ),
    (
        "a read-only root",
        |lab| {
            let script = "! touch /x 2>/dev/null && touch /t/x && ! [ -e /w ]";
            step(lab, script, |exec, _| {
                exec.mounts[0].readonly = true;
                exec.mounts.push(mount(pb::MountType::Tmpfs, "/t"));
            })
        },
        &[],
    ),
    (
        "a temporary directory of a size, beside the working directory",
        |lab| {
            step(lab, "df -k /work/scratch | grep -q ' 2048 '", |exec, meta| {
                "/work".clone_into(&mut meta.cwd);
                exec.mounts.push(pb::Mount {
                    tmpfs_opt: Some(pb::TmpfsOpt { size: 2 << 20 }),
                    ..mount(pb::MountType::Tmpfs, "scratch")
                });
            })
        },
        &[],
    ),
    ("outputs of several mounts", outputs, &[]),
    ("a part of a mount, written to", written_part, &[]),
    (
        "memory that is not enough",
        |lab| {
            let base = image(&lab.busybox());
            let step = exec(&[&base], "exec tail /dev/zero", |_, _| {});
            let digest = llb::op_digest(&step).to_string();
            let mut definition = definition(&[base, step]);
            let limits = pb::LinuxResources {
                memory: 32 << 20,
                ..pb::LinuxResources::default()
            };
            definition.metadata.insert(digest, limited(limits));
            definition
        },
        &["exit code: 137: cannot allocate memory"],
    ),
];

fn steps(lab: &Lab) -> Result<()> {
    run_cases(lab, STEPS)
}

fn limited(limits: pb::LinuxResources) -> pb::OpMetadata {
    pb::OpMetadata {
        linux_resources: Some(limits),
        ..pb::OpMetadata::default()
    }
}

fn bound(index: i64, output: i64, dest: &str) -> pb::Mount {
    pb::Mount {
        input: index,
        output,
        content_cache: pb::MountContentCache::Off.into(),
        ..mount(pb::MountType::Bind, dest)
    }
}

/// A step that looks at outputs of another: the first is its root, the others are mounted at `/m1` and so on.
fn looking(outputs: &[pb::Input], script: &str) -> pb::Op {
    let mut look = exec(&[], script, |exec, _| {
        for index in 1..outputs.len() {
            exec.mounts.push(pb::Mount {
                readonly: true,
                ..bound(index as i64, pb::EMPTY, &format!("/m{index}"))
            });
        }
    });
    look.inputs = outputs.to_vec();
    look
}

/// Mounts that are written to and kept, or lost, or cannot be written to.
fn outputs(lab: &Lab) -> pb::Definition {
    let (base, given) = (image(&lab.busybox()), mkfile("x", b"given"));
    let script = "echo n > /new/n; echo c > /changed/c; [ -f /kept/x ] && ! touch /kept/y 2>/dev/null; \
        [ -f /lost/x ] && touch /lost/l; touch /root-file";
    let step = exec(&[&base, &given], script, |exec, _| {
        exec.mounts.push(bound(pb::EMPTY, 1, "/new"));
        exec.mounts.push(bound(1, 2, "/changed"));
        exec.mounts.push(pb::Mount {
            readonly: true,
            ..bound(1, 3, "/kept")
        });
        exec.mounts.push(bound(1, pb::EMPTY, "/lost"));
    });
    let outputs = [0, 1, 2, 3].map(|index| input(&step, index));
    let inputs = [&outputs[..], &[input(&given, 0)]].concat();
    let look = looking(
        &inputs,
        "[ -e /root-file ] && ! [ -e /new ] && ! [ -e /lost ] && [ \"$(ls /m1)\" = n ] && \
         [ \"$(ls /m2 | tr '\\n' ' ')\" = 'c x ' ] && [ \"$(ls /m3)\" = x ] && [ \"$(ls /m4)\" = x ]",
    );
    definition(&[base, given, step, look])
}

/// The whole tree is the output, though only a part of it was mounted.
fn written_part(lab: &Lab) -> pb::Definition {
    let base = image(&lab.busybox());
    let directory = file(
        Action::Mkdir(pb::FileActionMkDir {
            path: "/part".to_owned(),
            mode: 0o755,
            timestamp: -1,
            ..pb::FileActionMkDir::default()
        }),
        &[],
    );
    let given = file(Action::Mkfile(making("/other", b"")), &[&directory]);
    let step = exec(
        &[&base, &given],
        "! [ -e /m/other ] && touch /m/new",
        |exec, _| {
            exec.mounts.push(pb::Mount {
                selector: "part".to_owned(),
                ..bound(1, 1, "/m")
            });
        },
    );
    let look = looking(
        &[input(&base, 0), input(&step, 1)],
        "[ -e /m1/part/new ] && [ -e /m1/other ]",
    );
    definition(&[base, directory, given, step, look])
}

fn named(name: &str, index: i64) -> Option<pb::UserOpt> {
    Some(pb::UserOpt {
        user: Some(User::ByName(pb::NamedUserOpt {
            name: name.to_owned(),
            input: index,
        })),
    })
}

/// A step on the base image that looks at what was made, at `/m`.
fn made(lab: &Lab, ops: &[pb::Op], script: &str) -> pb::Definition {
    let base = image(&lab.busybox());
    let Some(last) = ops.last() else {
        return definition(&[base]);
    };
    let look = exec(&[&base, last], script, |exec, _| exec.mounts.push(second("/m")));
    let mut all = ops.to_vec();
    all.extend([base, look]);
    definition(&all)
}

/// Seconds and the nanoseconds of a time that is asked for.
const TIME_NS: i64 = 1_234_567_890_123_456_789;

const FILES: &[Case] = &[
    ("owners by name, each from a tree of its own", owners, &[]),
    (
        "a directory with parents, owner, mode and time",
        |lab| {
            let mkdir = pb::FileActionMkDir {
                path: "/a/b".to_owned(),
                mode: 0o2750,
                make_parents: true,
                owner: Some(numbers(11, 12)),
                timestamp: TIME_NS,
            };
            let dir = file(Action::Mkdir(mkdir), &[]);
            made(
                lab,
                &[dir],
                "[ \"$(stat -c '%u %g %a %Y' /m/a /m/a/b | sort -u)\" = '11 12 750 1234567890' ]",
            )
        },
        &[],
    ),
    (
        "a directory without its parent",
        |lab| {
            let mkdir = pb::FileActionMkDir {
                path: "/a/b".to_owned(),
                mode: 0o755,
                timestamp: -1,
                ..pb::FileActionMkDir::default()
            };
            made(lab, &[file(Action::Mkdir(mkdir), &[])], "true")
        },
        &["/a", "no such file or directory"],
    ),
    (
        "a file with owner, mode and time, in place of another",
        |lab| {
            let before = mkfile("f", b"the longer one before");
            let after = file(
                Action::Mkfile(pb::FileActionMkFile {
                    owner: Some(numbers(11, 12)),
                    timestamp: TIME_NS,
                    mode: 0o640,
                    ..making("/f", b"after")
                }),
                &[&before],
            );
            made(
                lab,
                &[before, after],
                "[ \"$(cat /m/f) $(stat -c '%u %g %Y' /m/f)\" = 'after 11 12 1234567890' ]",
            )
        },
        &[],
    ),
    (
        "a link with owner and time",
        |lab| {
            let Action::Symlink(link) = linking("/l", "/nowhere") else {
                return definition(&[]);
            };
            let link = Action::Symlink(pb::FileActionSymlink {
                owner: Some(numbers(11, 12)),
                timestamp: TIME_NS,
                ..link
            });
            let script = "[ \"$(readlink /m/l) $(stat -c '%u %g %Y' /m/l)\" = '/nowhere 11 12 1234567890' ]";
            made(lab, &[file(link, &[])], script)
        },
        &[],
    ),
    (
        "files removed by a pattern",
        |lab| {
            let [one, two, other] = three();
            let rm = removing("/a*", true, false);
            let rest = file(rm, &[&other]);
            made(lab, &[one, two, other, rest], "[ \"$(ls /m)\" = b ]")
        },
        &[],
    ),
    (
        "files that need not be there",
        |lab| {
            let one = mkfile("a", b"");
            let rest = file(removing("/z", false, true), &[&one]);
            made(lab, &[one, rest], "[ \"$(ls /m)\" = a ]")
        },
        &[],
    ),
    (
        "files that have to be there",
        |lab| {
            let one = mkfile("a", b"");
            let rest = file(removing("/z", false, false), &[&one]);
            made(lab, &[one, rest], "true")
        },
        &["/z", "no such file or directory"],
    ),
    ("several outputs of one operation", several_outputs, &[]),
];

fn file_operations(lab: &Lab) -> Result<()> {
    run_cases(lab, FILES)
}

fn numbers(uid: u32, gid: u32) -> pb::ChownOpt {
    let by_id = |id| {
        Some(pb::UserOpt {
            user: Some(User::ById(id)),
        })
    };
    pb::ChownOpt {
        user: by_id(uid),
        group: by_id(gid),
    }
}

fn removing(path: &str, allow_wildcard: bool, allow_not_found: bool) -> Action {
    Action::Rm(pb::FileActionRm {
        path: path.to_owned(),
        allow_not_found,
        allow_wildcard,
    })
}

/// Files `a1`, `a2` and `b`, one made after the other.
fn three() -> [pb::Op; 3] {
    let one = mkfile("a1", b"");
    let two = file(Action::Mkfile(making("/a2", b"")), &[&one]);
    let other = file(Action::Mkfile(making("/b", b"")), &[&two]);
    [one, two, other]
}

/// The user's number comes from one tree, the group's from another, and neither from the one that is copied to or from.
fn owners(lab: &Lab) -> pb::Definition {
    let base = image(&lab.busybox());
    let users = exec(&[&base], "echo 'app:x:1200:1300:::' > /etc/passwd", |_, _| {});
    let groups = exec(&[&base], "echo 'app:x:1400:' > /etc/group", |_, _| {});
    let decoy = exec(
        &[&base],
        &format!("{ACCOUNTS}; sed -i s/1200/9/ /etc/passwd"),
        |_, _| {},
    );
    let from = mkfile("f", b"");
    let copy = copying("/f", "/copied/f", |copy| {
        copy.owner = Some(pb::ChownOpt {
            user: named("app", 2),
            group: named("app", 3),
        });
    });
    let copied = file(copy, &[&decoy, &from, &users, &groups]);
    let script = "[ \"$(stat -c '%u %g' /m/copied /m/copied/f | sort -u)\" = '1200 1400' ]";
    let mut ops = vec![base.clone(), users, groups, decoy, from, copied];
    let last = &ops[5];
    let look = exec(&[&base, last], script, |exec, _| exec.mounts.push(second("/m")));
    ops.push(look);
    definition(&ops)
}

/// Two results, one made on top of the other.
fn several_outputs(lab: &Lab) -> pb::Definition {
    let base = image(&lab.busybox());
    let making = |path: &str, from: i64, output: i64| pb::FileAction {
        input: from,
        secondary_input: pb::EMPTY,
        output,
        action: Some(Action::Mkfile(making(path, b""))),
    };
    let both = files(vec![making("/a", pb::EMPTY, 1), making("/b", 0, 0)], &[]);
    let look = looking(
        &[input(&base, 0), input(&both, 0), input(&both, 1)],
        "[ \"$(ls /m1 | tr '\\n' ' ')\" = 'a b ' ] && [ \"$(ls /m2)\" = a ]",
    );
    definition(&[base, both, look])
}

/// A cache mount in which steps leave a line each time they run.
fn counter() -> pb::Mount {
    pb::Mount {
        cache_opt: Some(pb::CacheOpt {
            id: "runs".to_owned(),
            sharing: pb::CacheSharingOpt::Locked.into(),
        }),
        ..mount(pb::MountType::Cache, "/runs")
    }
}

/// What a step gets beside its definition is not what tells it from others, but it gets it.
fn outside_of_keys(lab: &Lab) -> Result<()> {
    let daemon = lab.daemon()?;
    let client = Client::connect(&daemon)?;
    let base = image(&lab.busybox());
    let counted = |proxy: Option<pb::ProxyEnv>| {
        let script = "echo \"$HTTP_PROXY $https_proxy $NO_PROXY $ftp_proxy $ALL_PROXY\" >> /runs/log";
        exec(&[&base], script, |exec, meta| {
            exec.mounts.push(counter());
            meta.proxy_env = proxy;
        })
    };
    let proxy = |name: &str| pb::ProxyEnv {
        http_proxy: format!("http://{name}"),
        https_proxy: format!("https://{name}"),
        ftp_proxy: "ftp".to_owned(),
        no_proxy: "none".to_owned(),
        all_proxy: "all".to_owned(),
    };
    for (proxy, memory) in [
        (Some(proxy("a")), 0),
        (Some(proxy("b")), 64 << 20),
        (None, 128 << 20),
    ] {
        let step = counted(proxy);
        let digest = llb::op_digest(&step).to_string();
        let mut definition = definition(&[base.clone(), step]);
        let limits = pb::LinuxResources {
            memory,
            cpu_shares: 512,
            ..pb::LinuxResources::default()
        };
        definition.metadata.insert(digest, limited(limits));
        expect_answer(&client, request(definition), &[])?;
    }
    let look = |script: &str| {
        let look = exec(&[&base], script, |exec, _| exec.mounts.push(counter()));
        expect_answer(&client, request(definition(&[base.clone(), look])), &[])
    };
    look("[ \"$(cat /runs/log)\" = 'http://a https://a none ftp all' ]")
        .context("the step ran more than once")?;
    // Whatever else is different runs: what was looked at can fail.
    let other = exec(&[&base], "echo other >> /runs/log", |exec, _| {
        exec.mounts.push(counter())
    });
    expect_answer(&client, request(definition(&[base.clone(), other])), &[])?;
    look("[ $(wc -l < /runs/log) = 2 ]")
}

/// A right needs the daemon's grant and the client's.
fn rights(lab: &Lab) -> Result<()> {
    let insecure = |lab: &Lab| {
        step(
            lab,
            "mount -t tmpfs none /mnt 2>/dev/null || mkdir /x && mount -t tmpfs none /x",
            |exec, _| {
                exec.security = pb::SecurityMode::Insecure.into();
            },
        )
    };
    let host = |lab: &Lab| step(lab, "true", |exec, _| exec.network = pb::NetMode::Host.into());
    let ask = |client: &Client, definition: pb::Definition, rights: &[&str], parts: &[&str]| {
        let request = SolveRequest {
            entitlements: rights.iter().map(|&right| right.to_owned()).collect(),
            ..request(definition)
        };
        expect_answer(client, request, parts).with_context(|| format!("asked for {rights:?}"))
    };
    {
        let daemon = lab.daemon()?;
        let client = Client::connect(&daemon)?;
        for right in ["security.insecure", "network.host"] {
            ask(&client, insecure(lab), &[right], &[right, "not allowed"])?;
        }
        ask(&client, insecure(lab), &["unheard.of"], &["unheard.of"])?;
    }
    let config = lab.dir().join("cooperd.toml");
    std::fs::write(&config, "insecure-entitlements = [\"network.host\"]\n")?;
    let config = format!("--config={}", config.display());
    for flags in [
        vec![
            "--allow-insecure-entitlement=security.insecure",
            "--allow-insecure-entitlement=network.host",
        ],
        vec![config.as_str()],
    ] {
        let daemon = lab.daemon_with(&flags)?;
        let client = Client::connect(&daemon)?;
        ask(&client, host(lab), &[], &["network.host is not allowed"])?;
        ask(&client, host(lab), &["network.host"], &[])?;
        if flags[0] == config {
            ask(
                &client,
                insecure(lab),
                &["security.insecure"],
                &["security.insecure", "not allowed"],
            )?;
            continue;
        }
        ask(
            &client,
            insecure(lab),
            &["network.host"],
            &["security.insecure is not allowed"],
        )?;
        ask(
            &client,
            insecure(lab),
            &["network.host", "security.insecure"],
            &[],
        )?;
    }
    Ok(())
}

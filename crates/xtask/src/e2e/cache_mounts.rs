//! Cache mounts: what they begin with, who has them, how long they last.

use std::fs;
use std::process::Stdio;

use anyhow::{Result, ensure};

use super::fixture::{Daemon, Lab, eventually, expect, processes_of, succeed};
use super::{Need, Scenario};

/// This file's scenarios.
pub const SCENARIOS: &[Scenario] = &[
    Scenario {
        name: "cache-mount-options",
        needs: &[Need::Root],
        run: options,
    },
    Scenario {
        name: "cache-mounts-last",
        needs: &[Need::Root],
        run: last,
    },
    Scenario {
        name: "cache-mounts-at-once",
        needs: &[Need::Root],
        run: at_once,
    },
];

const OPTIONS: &str = r#"FROM @BASE@ AS seed
RUN mkdir -p /seed/sub && echo seeded > /seed/sub/f && echo top > /seed/top && chown -R 21:22 /seed/sub
FROM @BASE@
RUN --mount=type=cache,id=owned,target=/owned,uid=11,gid=12,mode=0750 \
    [ "$(stat -c '%u %g %a' /owned)" = '11 12 750' ] && touch /owned/kept
RUN --mount=type=cache,id=owned,target=/elsewhere,uid=11,gid=12,mode=0750 [ -e /elsewhere/kept ]
RUN --mount=type=cache,id=owned,target=/owned ! [ -e /owned/kept ]
RUN --mount=type=cache,id=owned,target=/owned,uid=11,gid=12,mode=0750,ro \
    [ -e /owned/kept ] && ! touch /owned/x 2>/dev/null
RUN --mount=type=cache,id=seeded,from=seed,source=/seed/sub,target=/c \
    [ "$(cat /c/f)" = seeded ] && ! [ -e /c/top ] && [ "$(stat -c '%u %g' /c/f)" = '21 22' ] && echo more >> /c/f
RUN --mount=type=cache,id=seeded,from=seed,source=/seed/sub,target=/c [ "$(cat /c/f | tr '\n' ' ')" = 'seeded more ' ]
RUN --mount=type=cache,id=seeded,from=seed,target=/c [ -e /c/seed/top ] && [ "$(wc -l < /c/seed/sub/f)" = 2 ]
RUN --mount=type=bind,from=seed,source=/seed,target=/s [ "$(cat /s/sub/f)" = seeded ]
RUN ! [ -e /owned ] && ! [ -e /c ]
"#;

fn options(lab: &Lab) -> Result<()> {
    let context = lab.context("c", &[("Dockerfile", OPTIONS)])?;
    succeed(&mut lab.cooper_build(&context)).map(drop)
}

/// Adds a line to a cache mount and shows it; each call is another step.
fn add(lab: &Lab, daemon: &Daemon<'_>, line: &str) -> Result<String> {
    let dockerfile = format!(
        "FROM @BASE@\nRUN --mount=type=cache,id=lines,target=/c echo {line} >> /c/log && echo \"has $(cat /c/log | tr '\\n' ' ').\"\n"
    );
    let context = lab.context(line, &[("Dockerfile", &dockerfile)])?;
    succeed(&mut daemon.buildctl_build(&context))
}

/// A step that writes to the same mount and is still there.
const HANGING: &str = "FROM @BASE@
RUN --mount=type=cache,id=lines,target=/c,sharing=locked echo killed >> /c/log && exec sleep 87654
";

fn last(lab: &Lab) -> Result<()> {
    let mut daemon = lab.daemon()?;
    expect(&add(lab, &daemon, "one")?, "has one .")?;
    daemon.restart()?;
    expect(&add(lab, &daemon, "two")?, "has one two .")?;
    // Neither a daemon that is killed nor one that restarts leaves it locked, or empty.
    let context = lab.context("hanging", &[("Dockerfile", HANGING)])?;
    let mut build = daemon
        .buildctl_build(&context)
        .stdout(Stdio::null())
        .stderr(Stdio::null())
        .spawn()?;
    eventually("the step", || !processes_of("sleep 87654").is_empty())?;
    daemon.kill_and_start()?;
    build.wait()?;
    let shown = add(lab, &daemon, "three")?;
    expect(&shown, "has one two ")?;
    expect(&shown, " three .")?;
    // What is used just now is not removed, what is not is.
    succeed(&mut daemon.buildctl(&["prune", "--filter=type==regular"]))?;
    expect(&add(lab, &daemon, "four")?, " three four .")?;
    succeed(&mut daemon.buildctl(&["prune", "--filter=type==exec.cachemount"]))?;
    expect(&add(lab, &daemon, "five")?, "has five .")
}

/// Two steps of one build, of which each waits until it has seen the other, or has seen that it has a mount for itself.
fn pair(sharing: &str, first: &str, second: &str) -> String {
    let mount = format!("--mount=type=cache,id=pair-{sharing},target=/c,sharing={sharing}");
    let sync = "--mount=type=cache,id=sync,target=/sync";
    format!(
        "FROM @BASE@ AS one\nRUN {mount} {sync} touch /sync/{sharing}-one && {first}\n\
         FROM @BASE@ AS two\nRUN {mount} {sync} touch /sync/{sharing}-two && {second}\n\
         FROM scratch\nCOPY --from=one /out /one\nCOPY --from=two /out /two\n"
    )
}

fn at_once(lab: &Lab) -> Result<()> {
    let daemon = lab.daemon()?;
    let build = |sharing: &str, first: &str, second: &str| -> Result<(String, String)> {
        let context = lab.context(sharing, &[("Dockerfile", &pair(sharing, first, second))])?;
        let out = lab.dir().join(format!("out-{sharing}"));
        let mut build = daemon.buildctl_build(&context);
        succeed(build.arg(format!("--output=type=local,dest={}", out.display())))?;
        Ok((
            fs::read_to_string(out.join("one"))?,
            fs::read_to_string(out.join("two"))?,
        ))
    };
    let meet = |own: &str, other: &str| {
        format!(
            "touch /c/{own} && until [ -e /c/{other} ]; do usleep 1000; done && ls /c | tr '\\n' ' ' > /out"
        )
    };
    let (one, two) = build("shared", &meet("a", "b"), &meet("b", "a"))?;
    ensure!(one == "a b " && two == "a b ", "shared: {one:?} {two:?}");
    // Each waits for the other to run, so both have the mount at the same time.
    let apart = |own: &str, other: &str| {
        format!(
            "touch /c/{own} && until [ -e /sync/private-{other} ]; do usleep 1000; done && touch /sync/private-{own}-saw && \
             until [ -e /sync/private-{other}-saw ]; do usleep 1000; done && ls /c > /out"
        )
    };
    let (one, two) = build("private", &apart("one", "two"), &apart("two", "one"))?;
    ensure!(one == "one\n" && two == "two\n", "private: {one:?} {two:?}");
    // Whoever comes second finds what the first left, and never the first itself.
    let alone =
        "mkdir /c/held && usleep 200000 && rmdir /c/held && echo x >> /c/log && wc -l < /c/log > /out";
    let (one, two) = build("locked", alone, alone)?;
    let mut seen = [one.trim().to_owned(), two.trim().to_owned()];
    seen.sort();
    ensure!(seen == ["1", "2"], "locked: {seen:?}");
    Ok(())
}

//! Bad input: one clear message, the right exit code, a daemon that goes on, nothing leaked.

use std::fs;
use std::path::Path;
use std::process::{Command, Stdio};

use anyhow::{Result, ensure};

use super::fixture::{Daemon, Lab, eventually, expect, fail, processes_of, succeed};
use super::{Need, Scenario};

/// This file's scenarios.
pub const SCENARIOS: &[Scenario] = &[
    Scenario {
        name: "mistakes-in-a-dockerfile",
        needs: &[Need::Root],
        run: mistakes,
    },
    Scenario {
        name: "failing-step",
        needs: &[Need::Root],
        run: failing_step,
    },
    Scenario {
        name: "unreachable-registry",
        needs: &[Need::Root],
        run: unreachable_registry,
    },
    Scenario {
        name: "vanished-client",
        needs: &[Need::Root],
        run: vanished_client,
    },
    Scenario {
        name: "full-disk",
        needs: &[Need::Root],
        run: full_disk,
    },
    Scenario {
        name: "newer-state-directory",
        needs: &[Need::Root],
        run: newer_state,
    },
    Scenario {
        name: "hostile-requests",
        needs: &[Need::Root],
        run: hostile_names,
    },
];

/// The daemon still builds.
fn goes_on(lab: &Lab, daemon: &Daemon<'_>) -> Result<()> {
    let context = lab.context("fine", &[("Dockerfile", "FROM @BASE@\nRUN true\n")])?;
    succeed(&mut daemon.buildctl_build(&context)).map(drop)
}

fn mistakes(lab: &Lab) -> Result<()> {
    let cases: &[(&str, &str, &[&str])] = &[
        (
            "syntax",
            "FROM @BASE@\nRUN --mount=type=nonsense true\n",
            &["Dockerfile:2", "nonsense"],
        ),
        (
            "unknown",
            "FROM @BASE@\nRUNN true\n",
            &["Dockerfile:2", "unknown instruction: RUNN", "did you mean RUN?"],
        ),
        (
            "missing-source",
            "FROM @BASE@\nCOPY absent.txt /\n",
            &["Dockerfile:2", "absent.txt", "not found"],
        ),
        ("no-stage", "FROM @BASE@\nCOPY --from=nope /a /b\n", &["nope"]),
        ("empty", "", &["the Dockerfile cannot be empty"]),
        ("no-from", "RUN true\n", &["no build stage in current context"]),
    ];
    let daemon = lab.daemon()?;
    for (name, dockerfile, messages) in cases {
        let context = lab.context(name, &[("Dockerfile", dockerfile)])?;
        for mut build in [daemon.buildctl_build(&context), daemon.cooper_build(&context)] {
            let (code, message) = fail(&mut build)?;
            ensure!(code == 1, "{name}: exit code {code}");
            for needle in *messages {
                expect(&message, needle)?;
            }
        }
    }
    goes_on(lab, &daemon)
}

fn failing_step(lab: &Lab) -> Result<()> {
    let dockerfile = "FROM @BASE@\nRUN echo first\nRUN echo the reason >&2; exit 7\n";
    let context = lab.context("c", &[("Dockerfile", dockerfile)])?;
    let daemon = lab.daemon()?;
    let (code, message) = fail(&mut daemon.buildctl_build(&context))?;
    ensure!(code == 1, "exit code {code}");
    expect(&message, "did not complete successfully: exit code: 7")?;
    expect(&message, "the reason")?;
    expect(&message, "Dockerfile:3")?;
    expect(&message, ">>> RUN echo the reason")?;
    goes_on(lab, &daemon)
}

fn unreachable_registry(lab: &Lab) -> Result<()> {
    let context = lab.context(
        "c",
        &[("Dockerfile", "FROM 127.0.0.1:1/nothing/here:latest\nRUN true\n")],
    )?;
    let daemon = lab.daemon()?;
    let (code, message) = fail(&mut daemon.buildctl_build(&context))?;
    ensure!(code == 1, "exit code {code}");
    let name = "127.0.0.1:1/nothing/here:latest";
    expect(
        &message,
        &format!("failed to solve: {name}: failed to resolve source metadata for {name}: "),
    )?;
    expect(&message, "connection refused")?;
    let absent = format!("FROM {}/library/absent:latest\nRUN true\n", lab.registry());
    let context = lab.context("absent", &[("Dockerfile", &absent)])?;
    let (_, message) = fail(&mut daemon.buildctl_build(&context))?;
    let name = format!("{}/library/absent:latest", lab.registry());
    let text =
        format!("failed to solve: {name}: failed to resolve source metadata for {name}: {name}: not found");
    expect(&message, &text)?;
    goes_on(lab, &daemon)
}

fn vanished_client(lab: &Lab) -> Result<()> {
    let marker = lab.dir().join("marker-of-this-test");
    let dockerfile = format!(
        "FROM @BASE@\nRUN echo running; cat /dev/zero > /dev/null; echo {}\n",
        marker.display()
    );
    let context = lab.context("c", &[("Dockerfile", &dockerfile)])?;
    let daemon = lab.daemon()?;
    let mut client = daemon
        .buildctl_build(&context)
        .stdout(Stdio::null())
        .stderr(Stdio::piped())
        .spawn()?;
    let progress = client
        .stderr
        .take()
        .ok_or_else(|| anyhow::anyhow!("no progress"))?;
    let running = std::io::BufRead::lines(std::io::BufReader::new(progress))
        .map_while(Result::ok)
        .any(|line| line.ends_with(" running"));
    ensure!(running, "the step never started:\n{}", daemon.log());
    client.kill()?;
    client.wait()?;
    let name = marker.to_string_lossy().into_owned();
    eventually("the end of a vanished client's step", || {
        processes_of(&name).is_empty()
    })?;
    goes_on(lab, &daemon)
}

/// A small tmpfs that is unmounted at the end.
struct SmallDisk<'a>(&'a Path);

impl<'a> SmallDisk<'a> {
    fn mount(path: &'a Path) -> Result<Self> {
        fs::create_dir_all(path)?;
        succeed(
            Command::new("mount")
                .args(["-t", "tmpfs", "-o", "size=28m", "tmpfs"])
                .arg(path),
        )?;
        Ok(Self(path))
    }
}

impl Drop for SmallDisk<'_> {
    fn drop(&mut self) {
        let _ = Command::new("umount").arg("-l").arg(self.0).status();
    }
}

fn free_bytes(path: &Path) -> u64 {
    rustix::fs::statvfs(path).map_or(0, |stat| stat.f_bavail * stat.f_frsize)
}

fn full_disk(lab: &Lab) -> Result<()> {
    let state = lab.dir().join("daemon");
    let disk = SmallDisk::mount(&state)?;
    let daemon = lab.daemon()?;
    // Each round begins with what the one before left behind.
    for round in 1..=4 {
        let dockerfile = format!("FROM @BASE@\nRUN dd if=/dev/zero of=/big{round} bs=64k count=1000\n");
        let context = lab.context("c", &[("Dockerfile", &dockerfile)])?;
        let (code, message) = fail(&mut daemon.buildctl_build(&context))?;
        ensure!(code == 1, "exit code {code}");
        expect(&message.to_lowercase(), "no space left")?;
        eventually("the room of a step that failed", || free_bytes(&state) > 12 << 20)?;
        goes_on(lab, &daemon)?;
    }
    drop(daemon);
    drop(disk);
    Ok(())
}

fn newer_state(lab: &Lab) -> Result<()> {
    let daemon = lab.daemon()?;
    goes_on(lab, &daemon)?;
    drop(daemon);
    let version = lab.dir().join("daemon/version");
    ensure!(version.is_file(), "the state directory does not name its version");
    fs::write(&version, "9999\n")?;
    let mut command = lab.command("cooperd");
    command.arg("--root").arg(lab.dir().join("daemon"));
    let (code, message) = fail(
        command
            .arg("--addr")
            .arg(format!("unix://{}", lab.dir().join("e.sock").display())),
    )?;
    ensure!(code == 1, "exit code {code}");
    expect(&message, "9999")?;
    expect(&message, &lab.dir().join("daemon").display().to_string())
}

fn hostile_names(lab: &Lab) -> Result<()> {
    let outside = lab.dir().join("outside");
    fs::create_dir_all(&outside)?;
    fs::write(outside.join("victim"), "untouched")?;
    let target = outside.display();
    let dockerfile = format!(
        "FROM @BASE@\nRUN ln -s {target} /link && ln -s ../../../../../../../../{target} /up\nCOPY a.txt /link/victim\nCOPY a.txt /up/victim\nWORKDIR /link/made\n"
    );
    let context = lab.context("c", &[("Dockerfile", &dockerfile), ("a.txt", "evil")])?;
    let daemon = lab.daemon()?;
    succeed(&mut daemon.buildctl_build(&context))?;
    ensure!(
        fs::read_to_string(outside.join("victim"))? == "untouched",
        "a COPY left its root"
    );
    ensure!(!outside.join("made").exists(), "a WORKDIR left its root");
    goes_on(lab, &daemon)
}

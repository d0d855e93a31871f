//! What is remembered between builds, restarts and kills.

use std::fs;
use std::process::Stdio;
use std::time::{Duration, SystemTime};

use anyhow::{Result, ensure};

use super::fixture::{Lab, cached_steps, expect, expect_not, succeed};
use super::{Need, Scenario};

/// This file's scenarios.
pub const SCENARIOS: &[Scenario] = &[
    Scenario {
        name: "cached-after-restart-and-kill",
        needs: &[Need::Root],
        run: cached_after_restart_and_kill,
    },
    Scenario {
        name: "changed-file-reruns-dependents",
        needs: &[Need::Root],
        run: changed_file,
    },
    Scenario {
        name: "same-size-same-mtime-is-noticed",
        needs: &[Need::Root],
        run: stale_file,
    },
    Scenario {
        name: "second-sync-moves-only-changes",
        needs: &[Need::Root],
        run: second_sync,
    },
    Scenario {
        name: "kill-during-builds",
        needs: &[Need::Root],
        run: kill_during_builds,
    },
    Scenario {
        name: "overlapping-builds-share-a-step",
        needs: &[Need::Root],
        run: overlapping_builds,
    },
    Scenario {
        name: "prune-empties-the-store",
        needs: &[Need::Root],
        run: prune,
    },
];

const CHAIN: &str =
    "FROM @BASE@\nWORKDIR /w\nCOPY a.txt .\nRUN cat a.txt > got\nCOPY b.txt .\nRUN cat got b.txt > all\n";

fn chain(lab: &Lab) -> Result<std::path::PathBuf> {
    lab.context("c", &[("Dockerfile", CHAIN), ("a.txt", "a1"), ("b.txt", "b1")])
}

fn cached_after_restart_and_kill(lab: &Lab) -> Result<()> {
    let context = chain(lab)?;
    let mut daemon = lab.daemon()?;
    let first = succeed(&mut daemon.buildctl_build(&context))?;
    ensure!(cached_steps(&first) == 0, "{first}");
    for _ in 0..2 {
        let again = succeed(&mut daemon.buildctl_build(&context))?;
        ensure!(cached_steps(&again) == 5, "{again}");
        daemon.restart()?;
    }
    daemon.kill_and_start()?;
    let killed = succeed(&mut daemon.buildctl_build(&context))?;
    ensure!(cached_steps(&killed) == 5, "{killed}");
    Ok(())
}

fn changed_file(lab: &Lab) -> Result<()> {
    let context = chain(lab)?;
    let daemon = lab.daemon()?;
    succeed(&mut daemon.buildctl_build(&context))?;
    fs::write(context.join("b.txt"), "b2")?;
    let changed = succeed(&mut daemon.buildctl_build(&context))?;
    ensure!(
        cached_steps(&changed) == 3,
        "only what depends on b.txt may run:\n{changed}"
    );
    let out = lab.dir().join("out");
    succeed(
        daemon
            .buildctl_build(&context)
            .arg(format!("--output=type=local,dest={}", out.display())),
    )?;
    expect(&fs::read_to_string(out.join("w/all"))?, "a1b2")
}

fn stale_file(lab: &Lab) -> Result<()> {
    let context = chain(lab)?;
    let daemon = lab.daemon()?;
    let out = lab.dir().join("out");
    let build = || {
        succeed(
            daemon
                .buildctl_build(&context)
                .arg(format!("--output=type=local,dest={}", out.display())),
        )
    };
    let path = context.join("b.txt");
    for (round, content) in ["b2", "b3", "b4", "b5"].into_iter().enumerate() {
        if round == 2 {
            // So old that its time alone would be trusted.
            let earlier = SystemTime::now() - Duration::from_secs(3600);
            fs::File::options()
                .write(true)
                .open(&path)?
                .set_modified(earlier)?;
        }
        build()?;
        let modified = fs::metadata(&path)?.modified()?;
        fs::write(&path, content)?;
        fs::File::options()
            .write(true)
            .open(&path)?
            .set_modified(modified)?;
        build()?;
        expect(&fs::read_to_string(out.join("w/all"))?, content)?;
    }
    Ok(())
}

fn second_sync(lab: &Lab) -> Result<()> {
    let context = lab.context("c", &[("Dockerfile", "FROM @BASE@\nCOPY src /src\n")])?;
    fs::create_dir(context.join("src"))?;
    for index in 0..200 {
        fs::write(context.join(format!("src/f{index}")), vec![b'x'; 10_000])?;
    }
    // Files modified just before a transfer are read again by the next one, so these are older.
    let earlier = SystemTime::now() - Duration::from_secs(3600);
    for index in 0..200 {
        let file = fs::File::options()
            .write(true)
            .open(context.join(format!("src/f{index}")))?;
        file.set_modified(earlier)?;
    }
    let daemon = lab.daemon()?;
    let transferred = |progress: &str| -> String {
        let mut lines = progress
            .lines()
            .filter(|line| line.contains("transferring context"));
        lines.next_back().unwrap_or_default().to_owned()
    };
    let first = succeed(&mut daemon.buildctl_build(&context))?;
    expect(&transferred(&first), "MB")?;
    fs::write(context.join("src/f7"), "changed")?;
    let second = succeed(&mut daemon.buildctl_build(&context))?;
    expect_not(&transferred(&second), "MB")
}

fn kill_during_builds(lab: &Lab) -> Result<()> {
    let mut daemon = lab.daemon()?;
    for round in 0..6 {
        let dockerfile = format!(
            "FROM @BASE@\nRUN echo {round} > /round\n{}",
            "RUN echo x >> /log\n".repeat(12)
        );
        let context = lab.context(&format!("c{round}"), &[("Dockerfile", &dockerfile)])?;
        let mut build = daemon
            .buildctl_build(&context)
            .stdout(Stdio::null())
            .stderr(Stdio::piped())
            .spawn()?;
        // The kill falls on a different step each round: after the n-th line of progress.
        let mut lines = std::io::BufRead::lines(std::io::BufReader::new(
            build
                .stderr
                .take()
                .ok_or_else(|| anyhow::anyhow!("no progress"))?,
        ));
        for _ in 0..(8 + round * 9) {
            if lines.next().is_none() {
                break;
            }
        }
        daemon.kill_and_start()?;
        drop(lines);
        build.wait()?;
        let out = lab.dir().join(format!("out{round}"));
        succeed(
            daemon
                .buildctl_build(&context)
                .arg(format!("--output=type=local,dest={}", out.display())),
        )?;
        ensure!(
            fs::read_to_string(out.join("log"))?.lines().count() == 12,
            "a step was lost or ran twice"
        );
        let again = succeed(&mut daemon.buildctl_build(&context))?;
        ensure!(cached_steps(&again) == 13, "{again}");
    }
    Ok(())
}

fn overlapping_builds(lab: &Lab) -> Result<()> {
    let dockerfile = "FROM @BASE@\nRUN --mount=type=cache,target=/count echo ran >> /count/runs && head -c 3000000 /dev/urandom > /big\nRUN --mount=type=cache,target=/count cp /count/runs /runs\n";
    let context = lab.context("c", &[("Dockerfile", dockerfile)])?;
    let daemon = lab.daemon()?;
    let mut builds = Vec::new();
    for _ in 0..6 {
        builds.push(
            daemon
                .buildctl_build(&context)
                .stdout(Stdio::piped())
                .stderr(Stdio::piped())
                .spawn()?,
        );
    }
    for build in builds {
        let output = build.wait_with_output()?;
        ensure!(output.status.success(), "{}", super::fixture::text(&output));
    }
    let out = lab.dir().join("out");
    succeed(
        daemon
            .buildctl_build(&context)
            .arg(format!("--output=type=local,dest={}", out.display())),
    )?;
    let runs = fs::read_to_string(out.join("runs"))?;
    ensure!(
        runs.lines().count() == 1,
        "the shared step ran {} times",
        runs.lines().count()
    );
    Ok(())
}

fn prune(lab: &Lab) -> Result<()> {
    let context = chain(lab)?;
    let daemon = lab.daemon()?;
    succeed(&mut daemon.buildctl_build(&context))?;
    expect(&succeed(&mut daemon.buildctl(&["du"]))?, "Total:")?;
    succeed(&mut daemon.buildctl(&["prune", "--all"]))?;
    let left = succeed(&mut daemon.buildctl(&["du"]))?;
    ensure!(
        left.contains("Total:") && left.contains("0B"),
        "something is left:\n{left}"
    );
    let again = succeed(&mut daemon.buildctl_build(&context))?;
    ensure!(cached_steps(&again) == 0, "{again}");
    Ok(())
}

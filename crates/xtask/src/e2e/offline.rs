//! Builds without their network: what sources were last found to be stands in for an answer where that is allowed.

use std::fs;

use anyhow::{Result, ensure};

use super::fixture::{Daemon, Lab, cached_steps, expect, expect_not, fail, succeed};
use super::{Need, Scenario};
use crate::base_image::BaseRegistry;

/// This file's scenarios.
pub const SCENARIOS: &[Scenario] = &[
    Scenario {
        name: "offline-rebuild",
        needs: &[Need::Root],
        run: offline_rebuild,
    },
    Scenario {
        name: "offline-by-configuration",
        needs: &[Need::Root],
        run: by_configuration,
    },
];

const NOT_ASKED: &str = "could not be asked for and is taken to be what it last was";

/// Builds once with a registry, which is gone afterwards; returns the context.
fn build_and_lose(lab: &Lab, daemon: &Daemon<'_>) -> Result<std::path::PathBuf> {
    let registry = BaseRegistry::start()?;
    let dockerfile = format!(
        "FROM {0}/library/busybox:latest AS one\nRUN echo made > /made\nFROM {0}/library/alpine\nCOPY --from=one /made /made\nRUN cat /made\n",
        registry.address()
    );
    let context = lab.context("c", &[("Dockerfile", &dockerfile)])?;
    succeed(&mut daemon.cooper_build(&context))?;
    Ok(context)
}

fn offline_rebuild(lab: &Lab) -> Result<()> {
    let mut daemon = lab.daemon()?;
    let context = build_and_lose(lab, &daemon)?;
    // The registry is asked for in every build, unless a build says that it need not be.
    let (_, message) = fail(&mut daemon.cooper_build(&context))?;
    expect(&message, "connection refused")?;
    let (_, message) = fail(daemon.cooper_build(&context).arg("--resolve-cache=required"))?;
    expect(&message, "connection refused")?;
    for round in 0..2 {
        let shown = succeed(daemon.cooper_build(&context).arg("--resolve-cache=fallback"))?;
        expect(&shown, NOT_ASKED)?;
        ensure!(
            cached_steps(&shown) >= 3,
            "round {round} was not cached:\n{shown}"
        );
        let shown = succeed(daemon.cooper_build(&context).arg("--resolve-cache=offline"))?;
        expect_not(&shown, NOT_ASKED)?;
        let mut buildctl = daemon.buildctl_build(&context);
        succeed(buildctl.arg("--opt=cooper.resolve-cache=offline"))?;
        daemon.restart()?;
    }
    // Steps are executed, not only found: the images' files are there.
    let shown = succeed(
        daemon
            .cooper_build(&context)
            .args(["--resolve-cache=offline", "--no-cache"]),
    )?;
    // `--no-cache` is about steps, not about the two images.
    ensure!(cached_steps(&shown) == 2, "{shown}");
    let (_, message) = fail(daemon.cooper_build(&context).arg("--resolve-cache=maybe"))?;
    expect(&message, "required, fallback or offline")?;
    let unknown = lab.context(
        "unknown",
        &[("Dockerfile", "FROM 127.0.0.1:1/never/seen\nRUN true\n")],
    )?;
    let (_, message) = fail(daemon.cooper_build(&unknown).arg("--resolve-cache=offline"))?;
    expect(&message, "127.0.0.1:1/never/seen:latest is not known here")?;
    let (_, message) = fail(daemon.cooper_build(&unknown).arg("--resolve-cache=fallback"))?;
    expect(&message, "connection refused")
}

/// The daemon's configuration says it for builds that do not.
fn by_configuration(lab: &Lab) -> Result<()> {
    let config = lab.dir().join("cooperd.toml");
    fs::write(&config, "resolveCache = \"fallback\"\n")?;
    let flag = format!("--config={}", config.display());
    let daemon = lab.daemon_with(&[&flag])?;
    let context = build_and_lose(lab, &daemon)?;
    expect(&succeed(&mut daemon.buildctl_build(&context))?, NOT_ASKED)?;
    let (_, message) = fail(daemon.cooper_build(&context).arg("--resolve-cache=required"))?;
    expect(&message, "connection refused")?;
    drop(daemon);
    let daemon = lab.daemon_with(&[&flag, "--resolve-cache=offline"])?;
    expect_not(&succeed(&mut daemon.buildctl_build(&context))?, NOT_ASKED)?;
    drop(daemon);
    let mut command = lab.command("cooperd");
    let (_, message) = fail(
        command
            .arg("--resolve-cache=maybe")
            .arg("--root")
            .arg(lab.dir().join("other")),
    )?;
    expect(&message, "required, fallback or offline")
}

//! End-to-end tests: the real binary, real containers, real registries, real clients.
//!
//! Each scenario gets directories of its own; the base images come from an in-process registry. A scenario that needs
//! something this machine lacks is reported as skipped with the reason.

mod build;
mod cache;
mod cache_mounts;
mod cancelled_mounts;
mod clients;
mod containers;
mod definitions;
mod emulation;
mod errors;
mod explain;
mod exporters;
pub mod fixture;
mod frontends;
mod hostile;
mod interchange;
mod networks;
mod object_caches;
mod offline;
mod policies;
mod ssh;
mod steps;
mod store;
mod web_files;

use std::time::Instant;

use anyhow::{Context, Result, bail};

use crate::setup;
use crate::test::Counts;
use fixture::Lab;

/// What a scenario cannot do without.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Need {
    /// Root, for containers.
    Root,
    /// A program on `PATH` or among the unpacked tools.
    Program(&'static str),
    /// A program of a package that npm installs below `target/tools`: the package, the program.
    Node(&'static str, &'static str),
    /// The docker client together with its buildx plugin.
    Buildx,
    /// A `buildkitd` on `PATH` that is not ours, together with `runc`, which it runs containers with.
    ForeignDaemon,
}

/// One end-to-end test.
pub struct Scenario {
    /// Its name, as `cargo xtask e2e NAME` takes it.
    pub name: &'static str,
    /// What it needs.
    pub needs: &'static [Need],
    /// The test itself.
    pub run: fn(&Lab) -> Result<()>,
}

/// Runs all scenarios, or those whose names contain one of `names`.
pub fn run(names: &[String]) -> Result<Counts> {
    println!("=== end-to-end tests");
    let scenarios: Vec<&Scenario> = [
        build::SCENARIOS,
        cache::SCENARIOS,
        cache_mounts::SCENARIOS,
        cancelled_mounts::SCENARIOS,
        clients::SCENARIOS,
        containers::SCENARIOS,
        definitions::SCENARIOS,
        emulation::SCENARIOS,
        errors::SCENARIOS,
        explain::SCENARIOS,
        exporters::SCENARIOS,
        frontends::SCENARIOS,
        hostile::SCENARIOS,
        interchange::SCENARIOS,
        networks::SCENARIOS,
        object_caches::SCENARIOS,
        offline::SCENARIOS,
        policies::SCENARIOS,
        ssh::SCENARIOS,
        steps::SCENARIOS,
        store::SCENARIOS,
        web_files::SCENARIOS,
    ]
    .into_iter()
    .flatten()
    .filter(|scenario| names.is_empty() || names.iter().any(|name| scenario.name.contains(name.as_str())))
    .collect();
    let mut counts = Counts::default();
    if setup::find("busybox").is_none() {
        println!(
            "skipped all {} scenarios: busybox is missing, no base image can be made",
            scenarios.len()
        );
        counts.skipped = scenarios.len();
        return Ok(counts);
    }
    let binaries = fixture::build_binaries()?;
    for scenario in scenarios {
        if let Some(reason) = scenario.needs.iter().find_map(|need| missing(*need)) {
            println!("skipped {}: {reason}", scenario.name);
            counts.skipped += 1;
            continue;
        }
        let start = Instant::now();
        match run_one(scenario, &binaries) {
            Ok(()) => {
                println!("ok {} ({:.1} s)", scenario.name, start.elapsed().as_secs_f32());
                counts.passed += 1;
            }
            Err(error) => {
                println!("FAILED {}: {error:#}", scenario.name);
                counts.failed += 1;
            }
        }
    }
    Ok(counts)
}

/// The `e2e` command.
pub fn command(names: &[String]) -> Result<()> {
    setup::base()?;
    setup::clients();
    let counts = run(names)?;
    println!(
        "{} passed, {} failed, {} skipped",
        counts.passed, counts.failed, counts.skipped
    );
    if counts.failed > 0 {
        bail!("{} scenarios failed", counts.failed);
    }
    Ok(())
}

fn run_one(scenario: &Scenario, binaries: &std::path::Path) -> Result<()> {
    let lab = Lab::new(scenario.name, binaries).context("setting up")?;
    let outcome = (scenario.run)(&lab);
    let leaks = lab.finish();
    outcome?;
    leaks
}

fn missing(need: Need) -> Option<String> {
    match need {
        Need::Root if !crate::shell::is_root() => Some("containers need root".to_owned()),
        Need::Program(program) if setup::find(program).is_none() => {
            Some(format!("{program} is not installed"))
        }
        Need::Node(package, program) => setup::node_program(package, program).err(),
        Need::Buildx if setup::find("docker").is_none() => Some("docker is not installed".to_owned()),
        Need::Buildx if setup::buildx().is_none() => Some("docker-buildx is not installed".to_owned()),
        Need::ForeignDaemon if setup::foreign_daemon().is_none() => {
            Some("no buildkitd but ours is on PATH".to_owned())
        }
        Need::ForeignDaemon if setup::find("runc").is_none() => Some("runc is not installed".to_owned()),
        _ => None,
    }
}

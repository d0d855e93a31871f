//! Unmodified clients, real registries, real runtimes.

use std::fs;
use std::path::Path;
use std::process::Command;

use anyhow::{Context, Result, ensure};

use super::fixture::{Daemon, Lab, cached_steps, expect, succeed};
use super::{Need, Scenario};
use crate::base_image::RealRegistry;
use crate::setup;
use crate::shell::root;

/// This file's scenarios.
pub const SCENARIOS: &[Scenario] = &[
    Scenario {
        name: "buildx-build",
        needs: &[Need::Root, Need::Buildx],
        run: buildx_build,
    },
    Scenario {
        name: "buildx-bake",
        needs: &[Need::Root, Need::Buildx],
        run: buildx_bake,
    },
    Scenario {
        name: "push-and-consume",
        needs: &[
            Need::Root,
            Need::Program("docker-registry"),
            Need::Program("skopeo"),
            Need::Program("umoci"),
            Need::Program("runc"),
        ],
        run: push_and_consume,
    },
    Scenario {
        name: "buildctl-of-the-machine",
        needs: &[Need::Root, Need::Program("buildctl")],
        run: foreign_buildctl,
    },
];

/// A docker client whose only builder is the scenario's daemon.
fn buildx(lab: &Lab, daemon: &Daemon<'_>) -> Result<Command> {
    let config = lab.dir().join("docker");
    let plugins = config.join("cli-plugins");
    if !plugins.exists() {
        fs::create_dir_all(&plugins)?;
        let plugin = setup::buildx().context("docker-buildx is gone")?;
        std::os::unix::fs::symlink(plugin, plugins.join("docker-buildx"))?;
        let mut create = lab.tool("docker")?;
        create.env("DOCKER_CONFIG", &config);
        succeed(
            create
                .args(["buildx", "create", "--name=lab", "--driver=remote", "--use"])
                .arg(daemon.address()),
        )?;
    }
    let mut command = lab.tool("docker")?;
    command.env("DOCKER_CONFIG", &config).arg("buildx");
    Ok(command)
}

fn base_context(lab: &Lab) -> String {
    format!("busybox=docker-image://{}", lab.busybox())
}

fn buildx_build(lab: &Lab) -> Result<()> {
    let daemon = lab.daemon()?;
    let example = root().join("examples/hello");
    let out = lab.dir().join("out");
    let build = || -> Result<String> {
        let mut command = buildx(lab, &daemon)?;
        command
            .args(["build", "--progress=plain", "--build-context"])
            .arg(base_context(lab));
        succeed(
            command
                .arg(format!("--output=type=local,dest={}", out.display()))
                .arg(&example),
        )
    };
    build()?;
    expect(
        &fs::read_to_string(out.join("usr/share/hello/result"))?,
        "Hi, Anna!",
    )?;
    let again = build()?;
    ensure!(cached_steps(&again) >= 6, "{again}");
    let mut inspect = buildx(lab, &daemon)?;
    expect(&succeed(inspect.arg("inspect"))?, "running")
}

fn buildx_bake(lab: &Lab) -> Result<()> {
    let daemon = lab.daemon()?;
    let target = |name: &str| {
        format!(
            "target \"{name}\" {{\n  target = \"{name}\"\n  output = [\"type=local,dest=out-{name}\"]\n}}\n"
        )
    };
    let group = "group \"default\" {\n  targets = [\"a\", \"b\"]\n}\n";
    let bake = format!("{group}{}{}", target("a"), target("b"));
    let dockerfile = "FROM @BASE@ AS base\nRUN echo shared > /s\nFROM base AS a\nRUN cat /s > /a\nFROM base AS b\nRUN cat /s > /b\n";
    let context = lab.context("c", &[("Dockerfile", dockerfile), ("docker-bake.hcl", &bake)])?;
    let mut command = buildx(lab, &daemon)?;
    succeed(
        command
            .args(["bake", "--progress=plain", "--allow=fs.write=*"])
            .current_dir(&context),
    )?;
    expect(&fs::read_to_string(context.join("out-a/a"))?, "shared")?;
    expect(&fs::read_to_string(context.join("out-b/b"))?, "shared")
}

fn push_and_consume(lab: &Lab) -> Result<()> {
    let registry = RealRegistry::start(&lab.dir().join("registry"))?;
    let daemon = lab.daemon()?;
    let example = root().join("examples/hello");
    let name = format!("{}/team/hello:1", registry.address());
    let mut build = daemon.cooper_build(&example);
    build.arg(format!("--build-context={}", base_context(lab)));
    succeed(build.arg(format!("--output=type=image,name={name},push=true")))?;
    inspect_unpack_run(lab, &name)?;
    let mut build = daemon.buildctl_build(&example);
    build.arg(format!("--opt=context:busybox=docker-image://{}", lab.busybox()));
    let progress = succeed(build.arg(format!("--output=type=image,name={name},push=true")))?;
    expect(&progress, "pushing manifest for")
}

fn inspect_unpack_run(lab: &Lab, name: &str) -> Result<()> {
    let inspect = succeed(
        lab.tool("skopeo")?
            .args(["inspect", "--tls-verify=false"])
            .arg(format!("docker://{name}")),
    )?;
    expect(&inspect, "\"org.opencontainers.image.title\": \"hello\"")?;
    let layout = lab.dir().join("layout");
    let target = format!("oci:{}:hello", layout.display());
    succeed(
        lab.tool("skopeo")?
            .args(["copy", "--src-tls-verify=false"])
            .arg(format!("docker://{name}"))
            .arg(target),
    )?;
    let bundle = lab.dir().join("bundle");
    succeed(
        lab.tool("umoci")?
            .arg("unpack")
            .arg(format!("--image={}:hello", layout.display()))
            .arg(&bundle),
    )?;
    run_bundle(lab, &bundle)
}

/// Runs the unpacked image as it is, without a terminal.
fn run_bundle(lab: &Lab, bundle: &Path) -> Result<()> {
    let config = bundle.join("config.json");
    let spec = fs::read_to_string(&config)?.replace("\"terminal\": true", "\"terminal\": false");
    let spec = spec.replace("\"terminal\":true", "\"terminal\":false");
    fs::write(&config, spec)?;
    let id = format!("cooper-e2e-{}", std::process::id());
    let ran = succeed(lab.tool("runc")?.args(["run", "--bundle"]).arg(bundle).arg(id))?;
    expect(&ran, "Hello, Anna!")?;
    expect(&ran, "greeted by cooper")
}

fn foreign_buildctl(lab: &Lab) -> Result<()> {
    let context = lab.context("c", &[("Dockerfile", "FROM @BASE@\nRUN echo hi > /hi\n")])?;
    let daemon = lab.daemon()?;
    let out = lab.dir().join("out");
    let shown = context.display();
    let mut build = lab.tool("buildctl")?;
    build.args([
        "--addr",
        &daemon.address(),
        "build",
        "--progress=plain",
        "--frontend=dockerfile.v0",
    ]);
    build
        .arg(format!("--local=context={shown}"))
        .arg(format!("--local=dockerfile={shown}"));
    succeed(build.arg(format!("--output=type=local,dest={}", out.display())))?;
    expect(&fs::read_to_string(out.join("hi"))?, "hi")
}

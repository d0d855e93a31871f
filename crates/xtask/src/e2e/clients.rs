//! Unmodified clients, real registries, real runtimes.

use std::fs;
use std::path::Path;
use std::process::Command;

use anyhow::{Context, Result, ensure};

use super::fixture::{Daemon, Lab, cached_steps, expect, fail, succeed};
use super::{Need, Scenario};
use crate::base_image::{BaseRegistry, RealRegistry};
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
        name: "buildx-history",
        needs: &[Need::Root, Need::Buildx],
        run: buildx_history,
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
        name: "registry-accounts",
        needs: &[Need::Root],
        run: registry_accounts,
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

/// What buildx tells of builds that have ended, also after the daemon was started again.
fn buildx_history(lab: &Lab) -> Result<()> {
    let mut daemon = lab.daemon()?;
    let fine = lab.context(
        "fine",
        &[("Dockerfile", "FROM @BASE@\nRUN echo to be remembered\n")],
    )?;
    let bad = lab.context("bad", &[("Dockerfile", "FROM @BASE@\nRUN exit 3\n")])?;
    let metadata = lab.dir().join("metadata.json");
    let mut build = buildx(lab, &daemon)?;
    build
        .args([
            "build",
            "--progress=plain",
            "--output=type=image,name=x",
            "--metadata-file",
        ])
        .arg(&metadata);
    succeed(build.arg(&fine))?;
    expect(&fs::read_to_string(&metadata)?, "\"buildx.build.provenance\"")?;
    let mut build = buildx(lab, &daemon)?;
    fail(build.args(["build", "--progress=plain"]).arg(&bad))?;
    for round in ["at once", "after a restart"] {
        let history = |arguments: &[&str]| -> Result<String> {
            let mut command = buildx(lab, &daemon)?;
            succeed(command.arg("history").args(arguments)).context(round)
        };
        let listed = history(&["ls", "--format={{.Name}} {{.Status}}"])?;
        expect(&listed, "fine Completed")?;
        expect(&listed, "bad Error")?;
        let wrong = history(&["ls", "--filter=status=error", "--format={{.Name}}"])?;
        ensure!(wrong.trim() == "bad", "{wrong}");
        let id = history(&["ls", "--filter=status=completed", "--format={{.Ref}}"])?;
        let id = id.trim().rsplit('/').next().unwrap_or_default().to_owned();
        expect(&history(&["logs", &id])?, "to be remembered")?;
        let inspected = history(&["inspect", &id])?;
        expect(&inspected, "pkg:docker/")?;
        expect(&inspected, "https://slsa.dev/provenance/v1")?;
        let provenance = history(&[
            "inspect",
            "attachment",
            "--type=https://slsa.dev/provenance/v1",
            &id,
        ])?;
        expect(&provenance, "resolvedDependencies")?;
        let out = lab.dir().join("exported.tar");
        history(&["export", "--output", &out.display().to_string(), &id])?;
        ensure!(fs::metadata(&out)?.len() > 0, "nothing was exported");
        daemon.restart()?;
    }
    Ok(())
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
    expect(&progress, "pushing manifest for")?;
    let last = progress.trim_end().lines().last().unwrap_or_default();
    ensure!(last.contains(" DONE "), "the export does not end: {last}");
    Ok(())
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

/// Passwords stay with our clients where a registry takes tokens, and only there; either use of them is told.
fn registry_accounts(lab: &Lab) -> Result<()> {
    let daemon = lab.daemon()?;
    let config = lab.dir().join("docker");
    fs::create_dir_all(&config)?;
    for (basic, refused, told) in [
        (false, "", "[auth] library/busybox:pull token for"),
        (false, "1", "[auth] sharing credentials for"),
        (true, "", "[auth] sharing credentials for"),
    ] {
        let private = BaseRegistry::start_private("user", "pass", basic)?;
        let address = private.address();
        // The account is `user:pass`.
        let text = format!(r#"{{"auths":{{"{address}":{{"auth":"dXNlcjpwYXNz"}}}}}}"#);
        fs::write(config.join("config.json"), text)?;
        let dockerfile = format!("FROM {address}/library/busybox\nRUN true\n");
        let context = lab.context("private", &[("Dockerfile", &dockerfile)])?;
        let mut build = daemon.buildctl_build(&context);
        build
            .env("DOCKER_CONFIG", &config)
            .env("BUILDKIT_NO_CLIENT_TOKEN", refused);
        let shown = succeed(&mut build)?;
        expect(&shown, &format!("{told} {address}"))?;
        let fetched = private.registry().seen();
        let by_client: Vec<bool> = fetched
            .iter()
            .filter(|seen| seen.target.starts_with("/token"))
            .map(|seen| {
                seen.headers
                    .get("user-agent")
                    .is_some_and(|agent| agent == "buildkit-client")
            })
            .collect();
        ensure!(by_client.is_empty() == basic, "{fetched:?}");
        ensure!(
            by_client.iter().all(|by_client| *by_client == refused.is_empty()),
            "{fetched:?}"
        );
        let mut stranger = daemon.buildctl_build(&context);
        let (_, shown) = fail(
            stranger
                .arg("--no-cache")
                .env("DOCKER_CONFIG", lab.dir().join("none")),
        )?;
        expect(
            &shown,
            if basic {
                "401 Unauthorized"
            } else {
                "insufficient_scope"
            },
        )?;
    }
    Ok(())
}

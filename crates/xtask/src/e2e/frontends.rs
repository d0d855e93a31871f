//! Frontends in images: what they get, what they make, and what becomes of those that misbehave.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use anyhow::{Context, Result, ensure};

use super::fixture::{Daemon, Lab, eventually, expect, fail, succeed};
use super::{Need, Scenario};
use crate::base_image::RealRegistry;
use crate::shell::root;

/// This file's scenarios.
pub const SCENARIOS: &[Scenario] = &[
    Scenario {
        name: "frontend-in-an-image",
        needs: &[Need::Root, Need::Program("docker-registry"), Need::Program("ldd")],
        run: in_an_image,
    },
    Scenario {
        name: "misbehaving-frontends",
        needs: &[Need::Root, Need::Program("docker-registry")],
        run: misbehaving,
    },
    Scenario {
        name: "frontend-cancelled",
        needs: &[Need::Root, Need::Program("docker-registry")],
        run: cancelled,
    },
];

/// Builds the example frontend and returns it with the libraries that it needs, as names below `/`.
fn example(lab: &Lab) -> Result<PathBuf> {
    crate::shell::run(
        Command::new(env!("CARGO"))
            .args(["build", "--locked", "--package", "api", "--example", "frontend"])
            .current_dir(root()),
    )?;
    let target = std::env::var_os("CARGO_TARGET_DIR").map_or_else(|| root().join("target"), PathBuf::from);
    let binary = target.join("debug/examples/frontend");
    let libraries = succeed(lab.tool("ldd")?.arg(&binary))?;
    let context = lab.dir().join("frontend");
    fs::create_dir_all(&context)?;
    fs::copy(&binary, context.join("run")).context("the example frontend is missing")?;
    for library in libraries.split_whitespace().filter(|word| word.starts_with('/')) {
        let place = context.join("root").join(library.trim_start_matches('/'));
        fs::create_dir_all(place.parent().context("a library has a directory")?)?;
        fs::copy(library, place)?;
    }
    let dockerfile = "FROM scratch\nCOPY root /\nCOPY run /run-frontend\nENTRYPOINT [\"/run-frontend\"]\n\
        LABEL moby.buildkit.frontend.caps=moby.buildkit.frontend.inputs\n\
        LABEL moby.buildkit.frontend.network.none=true\n";
    fs::write(context.join("Dockerfile"), dockerfile)?;
    Ok(context)
}

/// Builds an image and pushes it.
fn push(daemon: &Daemon<'_>, context: &Path, name: &str) -> Result<()> {
    let mut build = daemon.buildctl_build(context);
    succeed(build.arg(format!("--output=type=image,name={name},push=true"))).map(drop)
}

/// `buildctl build` with a frontend in an image.
fn gateway(daemon: &Daemon<'_>, image: &str, options: &[&str]) -> Command {
    let mut build = daemon.buildctl(&["build", "--progress=plain", "--frontend=gateway.v0"]);
    build.arg(format!("--opt=source={image}"));
    build.args(options.iter().map(|option| format!("--opt={option}")));
    build
}

fn in_an_image(lab: &Lab) -> Result<()> {
    let registry = RealRegistry::start(&lab.dir().join("registry"))?;
    let daemon = lab.daemon()?;
    let image = format!("{}/frontend:latest", registry.address());
    push(&daemon, &example(lab)?, &image)?;

    let out = lab.dir().join("out");
    let output = format!("--output=type=local,dest={}", out.display());
    succeed(gateway(&daemon, &image, &["a=b=c", "x="]).arg(&output))?;
    let told = fs::read_to_string(out.join("told"))?;
    for line in [
        "a=b=c\n",
        "x=\n",
        "workers: 1\n",
        "inputs: 0\n",
        "definition: true\n",
    ] {
        expect(&told, line)?;
    }

    let dockerfile = format!("# syntax={image}\nnot a Dockerfile at all\n");
    let context = lab.context("c", &[("Dockerfile", &dockerfile)])?;
    succeed(daemon.buildctl_build(&context).arg(&output))?;
    let told = fs::read_to_string(out.join("told"))?;
    expect(&told, &format!("cmdline={image}\n"))?;
    expect(&told, &format!("source={image}\n"))?;
    succeed(daemon.cooper_build(&context).arg(&output))?;

    let plain = lab.context("plain", &[("Dockerfile", "FROM scratch\n")])?;
    let mut build = daemon.buildctl_build(&plain);
    succeed(
        build
            .arg(format!("--opt=build-arg:BUILDKIT_SYNTAX={image} more"))
            .arg(&output),
    )?;
    expect(
        &fs::read_to_string(out.join("told"))?,
        &format!("cmdline={image} more\n"),
    )?;

    let (_, message) = fail(&mut gateway(&daemon, &image, &["fail=for this reason"]))?;
    expect(&message, "for this reason")?;
    let (_, message) = fail(&mut gateway(&daemon, &image, &["read=1"]))?;
    expect(&message, "it reads ")?;
    let (_, message) = fail(&mut gateway(&daemon, &image, &["frontend.caps=x.y"]))?;
    expect(&message, "unsupported frontend capability x.y")?;
    let (_, message) = fail(&mut gateway(&daemon, &image, &["gateway-devel=true"]))?;
    expect(&message, "development gateway is no longer supported")?;
    // It does not end by itself, but its result is there.
    succeed(&mut gateway(&daemon, &image, &["linger=1"]))?;
    with_each_cache(lab, &daemon, &registry, &image)?;
    only_allowed(lab, daemon, &image)
}

/// Caches of every kind can be exported of what a frontend in an image makes, one by one and all at once.
fn with_each_cache(lab: &Lab, daemon: &Daemon<'_>, registry: &RealRegistry, image: &str) -> Result<()> {
    let caches = [
        "type=inline".to_owned(),
        format!("type=registry,ref={}/cache:t,mode=max", registry.address()),
        format!("type=local,dest={},mode=max", lab.dir().join("cache").display()),
    ];
    let made = format!("{}/made:t", registry.address());
    let build = |caches: &[String]| {
        let mut build = gateway(daemon, image, &["x=y"]);
        build.arg(format!("--output=type=image,name={made},push=true"));
        build.args(caches.iter().map(|cache| format!("--export-cache={cache}")));
        succeed(&mut build)
    };
    for cache in &caches {
        expect(&build(std::slice::from_ref(cache))?, "exporting")?;
    }
    build(&caches).map(drop)
}

/// A daemon may be told from which repositories frontends are taken.
fn only_allowed(lab: &Lab, daemon: Daemon<'_>, image: &str) -> Result<()> {
    drop(daemon);
    let config = lab.dir().join("cooperd.toml");
    fs::write(
        &config,
        "[frontend.\"gateway.v0\"]\nallowedRepositories = [\"example.com/only\"]\n",
    )?;
    let flag = format!("--config={}", config.display());
    let daemon = lab.daemon_with(&[&flag])?;
    let (_, message) = fail(&mut gateway(&daemon, image, &[]))?;
    expect(&message, &format!("'{image}' is not an allowed gateway source"))
}

/// Makes an image whose entry point is a shell script.
fn script(
    lab: &Lab,
    daemon: &Daemon<'_>,
    registry: &RealRegistry,
    name: &str,
    script: &str,
) -> Result<String> {
    let dockerfile = "FROM @BASE@\nCOPY script /\nENTRYPOINT [\"/bin/sh\", \"/script\"]\n";
    let context = lab.context(name, &[("Dockerfile", dockerfile), ("script", script)])?;
    let image = format!("{}/{name}:latest", registry.address());
    push(daemon, &context, &image)?;
    Ok(image)
}

fn misbehaving(lab: &Lab) -> Result<()> {
    let registry = RealRegistry::start(&lab.dir().join("registry"))?;
    let daemon = lab.daemon()?;
    let preface = r"printf 'PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n'";
    let cases: &[(&str, &str, &[&str])] = &[
        (
            "crashing",
            "echo the reason >&2; exit 3",
            &["exit code: 3", "the reason"],
        ),
        ("silent", "exec >&-; exit 0", &["no result for incomplete build"]),
        (
            "garbling",
            "echo hello; exec sleep 1000",
            &["does not speak gRPC", "hello"],
        ),
        ("flooding", "exec yes flood", &["does not speak gRPC", "flood"]),
        (
            "complaining",
            "yes complaint | head -c 50000000 >&2; exit 4",
            &["exit code: 4", "complaint"],
        ),
        (
            "falling-silent",
            &format!("{preface}; exec >&-; exec sleep 1000"),
            &["frontend grpc server closed unexpectedly"],
        ),
        ("breaking-off", &format!("{preface}; yes; exit 0"), &["frontend "]),
    ];
    for (name, text, messages) in cases {
        let image = script(lab, &daemon, &registry, name, text)?;
        let (code, message) = fail(&mut gateway(&daemon, &image, &[]))?;
        ensure!(code == 1, "{name}: exit code {code}");
        ensure!(
            message.len() < 100_000,
            "{name}: {} bytes of errors",
            message.len()
        );
        expect(&message, &image)?;
        for needle in *messages {
            expect(&message, needle)?;
        }
    }
    // The daemon goes on, and nothing of them is left.
    let context = lab.context("fine", &[("Dockerfile", "FROM @BASE@\nRUN true\n")])?;
    succeed(&mut daemon.buildctl_build(&context))?;
    eventually("the end of all frontends", || !is_running("sleep 1000"))
}

fn cancelled(lab: &Lab) -> Result<()> {
    let registry = RealRegistry::start(&lab.dir().join("registry"))?;
    let daemon = lab.daemon()?;
    let image = script(lab, &daemon, &registry, "hanging", "exec sleep 98765")?;
    let mut build = gateway(&daemon, &image, &[]);
    let mut client = build.stdout(Stdio::null()).stderr(Stdio::null()).spawn()?;
    eventually("a running frontend", || is_running("sleep 98765"))?;
    succeed(Command::new("kill").arg("-INT").arg(client.id().to_string()))?;
    client.wait()?;
    eventually("the end of a cancelled frontend", || !is_running("sleep 98765"))?;
    let context = lab.context("fine", &[("Dockerfile", "FROM @BASE@\nRUN true\n")])?;
    succeed(&mut daemon.buildctl_build(&context)).map(drop)
}

/// Whether a process of that command line runs.
fn is_running(line: &str) -> bool {
    let entries = fs::read_dir("/proc").into_iter().flatten().flatten();
    entries
        .filter_map(|entry| fs::read(entry.path().join("cmdline")).ok())
        .any(|found| String::from_utf8_lossy(&found).replace('\0', " ").trim() == line)
}

//! The main job on the example: build it in containers with an embedded engine, then prove the image.

use std::fs;
use std::path::Path;
use std::process::Command;

use anyhow::{Context, Result, ensure};

use crate::base_image::BaseRegistry;
use crate::shell::{is_root, output, root, run};
use crate::{e2e::fixture, setup};

/// Builds `examples/hello`, shows what the image holds, runs it, and builds it again to show the cache.
pub fn command() -> Result<()> {
    setup::base()?;
    let binaries = fixture::build_binaries()?;
    let registry = BaseRegistry::start()?;
    if !is_root() {
        println!("demo: checking examples/hello");
        run(cooper(&binaries, &registry).arg("--check"))?;
        println!(
            "demo: skipped: building, listing and running it: its RUN steps run in containers, and containers need root; \
             run this command as root (for example with sudo -E)"
        );
        return Ok(());
    }
    let out = root().join("target/demo");
    if out.exists() {
        fs::remove_dir_all(&out)?;
    }
    fs::create_dir_all(&out)?;
    let archive = out.join("hello.tar");
    let rootfs = out.join("rootfs");
    println!("demo: building examples/hello into {}", archive.display());
    build(
        &binaries,
        &registry,
        &format!("type=oci,dest={}", archive.display()),
    )?;
    println!(
        "demo: building it again, which finds every step in the cache, into {}",
        rootfs.display()
    );
    build(
        &binaries,
        &registry,
        &format!("type=local,dest={}", rootfs.display()),
    )?;
    list(&archive)?;
    prove(&rootfs)
}

fn build(binaries: &Path, registry: &BaseRegistry, target: &str) -> Result<()> {
    run(cooper(binaries, registry)
        .arg("--tag=hello:demo")
        .arg(format!("--output={target}")))
}

/// `cooper build` of the example, with a state directory of its own.
fn cooper(binaries: &Path, registry: &BaseRegistry) -> Command {
    let mut command = Command::new(binaries.join("cooper"));
    command
        .arg("build")
        .arg(format!(
            "--build-context=busybox=docker-image://{}/library/busybox:latest",
            registry.address()
        ))
        .arg(root().join("examples/hello"))
        .env("COOPER_STATE", root().join("target/demo-state"))
        .env_remove("BUILDKIT_HOST")
        .env_remove("COOPER_HOST");
    command
}

fn list(archive: &Path) -> Result<()> {
    println!("demo: the image archive holds");
    let listed = output(Command::new("tar").arg("-tvf").arg(archive))?;
    ensure!(
        listed.contains("index.json"),
        "the archive has no index.json:\n{listed}"
    );
    print!("{listed}");
    Ok(())
}

/// Runs the image's program in its own root filesystem, as the image's user.
fn prove(rootfs: &Path) -> Result<()> {
    println!("demo: running the image's entry point in its root filesystem");
    let said = output(
        Command::new("chroot")
            .args(["--userspec=1000:1000"])
            .arg(rootfs)
            .arg("/usr/bin/greet")
            .env_clear()
            // `chroot` itself is looked up here, too: Debian keeps it among the administrator's programs.
            .env("PATH", "/usr/sbin:/usr/bin:/sbin:/bin")
            .env("GREETING", "Hello"),
    )
    .context("running the image")?;
    print!("{said}");
    ensure!(
        said.contains("Hello, Anna!") && said.contains("3 names greeted by cooper"),
        "the image said something else"
    );
    println!("demo: ok");
    Ok(())
}

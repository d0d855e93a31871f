//! Steps of platforms whose programs do not run here by themselves.

use std::fs;
use std::os::unix::fs::PermissionsExt as _;

use anyhow::{Result, ensure};
use oci::Platform;
use testkit::image::LayerBuilder;

use super::fixture::{Lab, expect, fail, succeed};
use super::{Need, Scenario};
use crate::base_image::busybox_builder;

/// This file's scenarios.
pub const SCENARIOS: &[Scenario] = &[
    Scenario {
        name: "foreign-platforms",
        needs: &[Need::Root],
        run: embedded,
    },
    Scenario {
        name: "foreign-platforms-with-runc",
        needs: &[Need::Root, Need::Program("runc")],
        run: with_runc,
    },
];

/// A platform that no machine of these tests is, and that no package has an emulator for.
const FOREIGN: &str = "sparc64";

/// The head of a program of that platform: 64 bits, big-endian, executable, machine 43.
fn program() -> Vec<u8> {
    let mut bytes = vec![0; 64];
    bytes[..7].copy_from_slice(b"\x7fELF\x02\x02\x01");
    bytes[16..24].copy_from_slice(&[0, 2, 0, 43, 0, 0, 0, 1]);
    bytes
}

fn embedded(lab: &Lab) -> Result<()> {
    check(lab, &[])
}

fn with_runc(lab: &Lab) -> Result<()> {
    check(lab, &["--oci-worker-binary=runc"])
}

/// In the place of an emulator: the shell of this machine, which the image has beside its own.
const EMULATOR: &str = "#!/bin/busybox sh
shift
echo emulated
exec /bin/busybox sh \"$@\"
";

fn check(lab: &Lab, flags: &[&str]) -> Result<()> {
    let shell = LayerBuilder::new()
        .file_with_mode("bin/sh", program(), 0o755)
        .build();
    let image = busybox_builder()?
        .platform(Platform::new("linux", FOREIGN))
        .layer(shell)
        .build();
    lab.images().add_image("foreign", "latest", &image);
    let dockerfile = format!(
        "FROM --platform=linux/{FOREIGN} {}/foreign:latest\nRUN echo \"$0 in $(pwd)\" > /made && cat /made\n",
        lab.registry()
    );
    let context = lab.context("c", &[("Dockerfile", &dockerfile)])?;
    let daemon = lab.daemon_with(flags)?;
    let (code, message) = fail(&mut daemon.buildctl_build(&context))?;
    ensure!(code == 1, "exit code {code}");
    expect(&message.to_lowercase(), "exec format error")?;
    expect(
        &message,
        "this machine does not run linux/sparc64 programs: no emulator for them is registered with binfmt_misc, and there is \
         no buildkit-qemu-sparc64",
    )?;
    // What is installed is found without a restart, and is not a part of the image.
    let emulator = lab.programs()?.join("buildkit-qemu-sparc64");
    fs::write(&emulator, EMULATOR)?;
    fs::set_permissions(&emulator, fs::Permissions::from_mode(0o755))?;
    let out = lab.dir().join("out");
    let shown = succeed(
        daemon
            .buildctl_build(&context)
            .arg(format!("--output=type=local,dest={}", out.display())),
    )?;
    expect(&shown, "emulated")?;
    ensure!(out.join("made").exists(), "the step made nothing:\n{shown}");
    ensure!(
        !out.join("dev/.buildkit_qemu_emulator").exists(),
        "the emulator was left in the image"
    );
    // It does not tell the step from one that needs none.
    fs::remove_file(&emulator)?;
    expect(&succeed(&mut daemon.buildctl_build(&context))?, "CACHED")
}

//! Installs or fetches what the demo and the tests need, and says so.
//!
//! As root on Debian: packages of the machine's own release are installed by apt. The Docker command-line clients are not
//! in every release; they are unpacked below `target/tools` from Debian's unstable suite without touching the system.
//! Without root, packages are unpacked below `target/tools` as well. Whatever cannot be had is reported and the tests
//! that need it are skipped with that reason.

use std::ffi::OsString;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use anyhow::{Context, Result, bail};

use crate::shell::{is_root, root, which};

/// A program the tests use and the package that has it.
struct Tool {
    program: &'static str,
    package: &'static str,
}

/// Needed by the demo and nearly all end-to-end tests.
const BASE: &[Tool] = &[Tool {
    program: "busybox",
    package: "busybox-static",
}];

/// Real clients, runtimes and registries that some end-to-end tests use.
const CLIENTS: &[Tool] = &[
    Tool {
        program: "runc",
        package: "runc",
    },
    Tool {
        program: "skopeo",
        package: "skopeo",
    },
    Tool {
        program: "umoci",
        package: "umoci",
    },
    Tool {
        program: "docker-registry",
        package: "docker-registry",
    },
];

/// Runtimes that the embedded one is compared with.
const RUNTIMES: &[Tool] = &[
    Tool {
        program: "runc",
        package: "runc",
    },
    Tool {
        program: "crun",
        package: "crun",
    },
];

/// What tests of file systems and packet filters make theirs with, as root.
const KERNEL_TOOLS: &[Tool] = &[
    Tool {
        program: "mkfs.btrfs",
        package: "btrfs-progs",
    },
    Tool {
        program: "mkfs.xfs",
        package: "xfsprogs",
    },
    Tool {
        program: "iptables-nft",
        package: "iptables",
    },
    Tool {
        program: "nft",
        package: "nftables",
    },
];

/// Packages unpacked from Debian's unstable suite where the machine's release lacks them.
const UNSTABLE: &[Tool] = &[
    Tool {
        program: "docker",
        package: "docker-cli",
    },
    Tool {
        program: "docker-buildx",
        package: "docker-buildx",
    },
];

/// Provides the base image's ingredients.
pub fn base() -> Result<()> {
    provide(BASE);
    if find("busybox").is_none() {
        bail!("busybox is missing: install Debian's package busybox-static");
    }
    Ok(())
}

/// Provides the clients, runtimes and registries as far as they can be had.
pub fn clients() {
    provide(CLIENTS);
    let missing: Vec<&Tool> = UNSTABLE
        .iter()
        .filter(|tool| find(tool.program).is_none())
        .collect();
    if missing.is_empty() {
        return;
    }
    for tool in missing {
        if let Err(error) = unpack_from_unstable(tool.package) {
            eprintln!("setup: {} is not available: {error:#}", tool.program);
        }
    }
}

/// Provides what tests that only root can run need, as far as it can be had.
pub fn kernel_tools() {
    if is_root() {
        provide(KERNEL_TOOLS);
    }
}

/// Provides the base image's ingredients and the runtimes that containers are run with, as far as they can be had.
pub fn runtimes() -> Result<()> {
    base()?;
    provide(RUNTIMES);
    Ok(())
}

/// Finds a program on `PATH` or among the unpacked tools.
pub fn find(program: &str) -> Option<PathBuf> {
    which(program).or_else(|| {
        tool_dirs()
            .into_iter()
            .map(|dir| dir.join(program))
            .find(|path| path.is_file())
    })
}

/// A `buildkitd` of this machine that is another's: ours answers to that name as well.
pub fn foreign_daemon() -> Option<PathBuf> {
    let dirs = std::env::split_paths(&std::env::var_os("PATH")?).collect::<Vec<_>>();
    let mut programs = dirs.into_iter().map(|dir| dir.join("buildkitd"));
    programs.find(|program| is_foreign(program))
}

/// Whether a program tells a version, and not one of ours.
fn is_foreign(program: &Path) -> bool {
    let answer = Command::new(program)
        .arg("--version")
        .stdin(Stdio::null())
        .output();
    answer.is_ok_and(|answer| {
        let version = String::from_utf8_lossy(&answer.stdout);
        answer.status.success() && version.starts_with("buildkitd ") && !version.contains("cooper")
    })
}

/// A program of a package from npm's registry, installed below `target/tools` when it is first asked for.
///
/// # Errors
/// With why it cannot be had.
pub fn node_program(package: &str, program: &str) -> Result<PathBuf, String> {
    if let Some(found) = which(program) {
        return Ok(found);
    }
    let dir = root().join("target/tools/node");
    let path = dir.join("node_modules/.bin").join(program);
    if path.exists() {
        return Ok(path);
    }
    let npm = which("npm").ok_or_else(|| format!("{program} is not installed, and neither is npm"))?;
    std::fs::create_dir_all(&dir).map_err(|error| format!("{}: {error}", dir.display()))?;
    let installed = Command::new(npm)
        .args(["install", "--no-audit", "--no-fund", "--prefix"])
        .arg(&dir)
        .arg(package)
        .stdin(Stdio::null())
        .stdout(Stdio::null())
        .stderr(Stdio::null())
        .status();
    match installed {
        Ok(status) if status.success() && path.exists() => Ok(path),
        Ok(_) => Err(format!("npm cannot install {package}")),
        Err(error) => Err(format!("npm: {error}")),
    }
}

/// `PATH` with the unpacked tools behind the system's.
pub fn path_with_tools() -> OsString {
    let system = std::env::var_os("PATH").unwrap_or_default();
    let dirs = std::env::split_paths(&system).chain(tool_dirs());
    std::env::join_paths(dirs).unwrap_or(system)
}

/// Where the buildx plugin was found, for clients that look for plugins in a directory of their own.
pub fn buildx() -> Option<PathBuf> {
    let candidates = [
        PathBuf::from("/usr/libexec/docker/cli-plugins/docker-buildx"),
        PathBuf::from("/usr/lib/docker/cli-plugins/docker-buildx"),
    ];
    candidates
        .into_iter()
        .find(|path| path.is_file())
        .or_else(|| find("docker-buildx"))
}

fn tools() -> PathBuf {
    root().join("target/tools")
}

fn tool_dirs() -> Vec<PathBuf> {
    let tools = tools();
    ["usr/bin", "usr/sbin", "bin", "usr/libexec/docker/cli-plugins"]
        .iter()
        .map(|dir| tools.join(dir))
        .collect()
}

fn provide(wanted: &[Tool]) {
    let missing: Vec<&Tool> = wanted
        .iter()
        .filter(|tool| find(tool.program).is_none())
        .collect();
    if missing.is_empty() {
        return;
    }
    let packages: Vec<&str> = missing.iter().map(|tool| tool.package).collect();
    if is_root() {
        println!("setup: installing {}", packages.join(" "));
        if install(&packages).is_err() {
            // The lists may be absent or old on a fresh machine.
            let _ = quiet(Command::new("apt-get").arg("update"));
            for package in &packages {
                if let Err(error) = install(&[package]) {
                    eprintln!("setup: {package} could not be installed: {error:#}");
                }
            }
        }
        return;
    }
    for package in packages {
        println!(
            "setup: unpacking {package} below {} (not root)",
            tools().display()
        );
        if let Err(error) = unpack(package, &[]) {
            eprintln!("setup: {package} could not be unpacked: {error:#}");
        }
    }
}

fn install(packages: &[&str]) -> Result<()> {
    quiet(
        Command::new("apt-get")
            .args(["install", "-y", "--no-install-recommends"])
            .args(packages)
            .env("DEBIAN_FRONTEND", "noninteractive"),
    )
}

/// Downloads a package with apt and unpacks it below `target/tools`.
fn unpack(package: &str, options: &[String]) -> Result<()> {
    let downloads = tools().join("downloads");
    std::fs::create_dir_all(&downloads)?;
    quiet(
        Command::new("apt-get")
            .args(options)
            .arg("download")
            .arg(package)
            .current_dir(&downloads),
    )?;
    let archive = std::fs::read_dir(&downloads)?
        .filter_map(|entry| entry.ok().map(|entry| entry.path()))
        .find(|path| {
            path.file_name()
                .is_some_and(|name| name.to_string_lossy().starts_with(&format!("{package}_")))
        })
        .with_context(|| format!("apt left no archive of {package}"))?;
    quiet(Command::new("dpkg-deb").arg("-x").arg(&archive).arg(tools()))?;
    std::fs::remove_file(archive)?;
    Ok(())
}

/// The same from the unstable suite, with package lists of our own so that the system's stay as they are.
fn unpack_from_unstable(package: &str) -> Result<()> {
    println!(
        "setup: unpacking {package} of Debian unstable below {}",
        tools().display()
    );
    let options = unstable_apt_options()?;
    unpack(package, &options)
}

fn unstable_apt_options() -> Result<Vec<String>> {
    let state = tools().join("apt");
    let lists = state.join("lists");
    std::fs::create_dir_all(lists.join("partial"))?;
    let sources = state.join("unstable.list");
    let options: Vec<String> = [
        format!("Dir::Etc::sourcelist={}", sources.display()),
        "Dir::Etc::sourceparts=/dev/null".to_owned(),
        format!("Dir::State::lists={}", lists.display()),
        format!("Dir::Cache={}", state.join("cache").display()),
        "APT::Sandbox::User=".to_owned(),
    ]
    .into_iter()
    .flat_map(|option| ["-o".to_owned(), option])
    .collect();
    std::fs::create_dir_all(state.join("cache/archives/partial"))?;
    if !sources.exists() {
        let signed_by = Path::new("/usr/share/keyrings/debian-archive-keyring.gpg");
        let archive = debian_archive().unwrap_or_else(|| "http://deb.debian.org/debian".to_owned());
        std::fs::write(
            &sources,
            format!("deb [signed-by={}] {archive} sid main\n", signed_by.display()),
        )?;
        if let Err(error) = quiet(Command::new("apt-get").args(&options).arg("update")) {
            std::fs::remove_file(&sources)?;
            return Err(error);
        }
    }
    Ok(options)
}

/// The archive this machine already uses, so that a local mirror is respected.
fn debian_archive() -> Option<String> {
    let mut texts = Vec::new();
    for path in ["/etc/apt/sources.list.d/debian.sources", "/etc/apt/sources.list"] {
        texts.extend(std::fs::read_to_string(path).ok());
    }
    texts
        .iter()
        .flat_map(|text| text.lines())
        .filter(|line| line.starts_with("URIs:") || line.starts_with("deb "))
        .flat_map(str::split_whitespace)
        .find(|word| word.contains("://") && word.trim_end_matches('/').ends_with("/debian"))
        .map(str::to_owned)
}

fn quiet(command: &mut Command) -> Result<()> {
    let output = command
        .stdin(Stdio::null())
        .output()
        .with_context(|| format!("starting {command:?}"))?;
    if !output.status.success() {
        let text = String::from_utf8_lossy(&output.stderr);
        let last = text
            .lines()
            .rev()
            .find(|line| !line.trim().is_empty())
            .unwrap_or("no message")
            .to_owned();
        bail!("{last}");
    }
    Ok(())
}

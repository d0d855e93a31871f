//! Agents of clients: in steps, and for git over SSH.

use std::fs;
use std::os::unix::fs::PermissionsExt as _;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};

use anyhow::{Context, Result, ensure};
use prost::Message as _;

use super::fixture::{Lab, eventually, expect, expect_not, fail, succeed};
use super::hostile::ops::{definition, source};
use super::{Need, Scenario};

/// This file's scenarios.
pub const SCENARIOS: &[Scenario] = &[
    Scenario {
        name: "agents-in-steps",
        needs: &[
            Need::Root,
            Need::Program("ssh-agent"),
            Need::Program("ssh-add"),
            Need::Program("ssh-keygen"),
            Need::Program("ldd"),
        ],
        run: agents_in_steps,
    },
    Scenario {
        name: "git-over-ssh",
        needs: &[Need::Root, Need::Program("git"), Need::Program("ssh-agent")],
        run: git_over_ssh,
    },
];

/// A real agent; it ends when dropped.
struct Agent {
    socket: PathBuf,
    child: Child,
}

impl Agent {
    fn start(lab: &Lab) -> Result<Self> {
        let socket = lab.dir().join("agent.sock");
        let child = lab
            .tool("ssh-agent")?
            .args(["-D", "-a"])
            .arg(&socket)
            .stdout(Stdio::null())
            .stderr(Stdio::null())
            .spawn()?;
        let agent = Self { socket, child };
        eventually("the agent's socket", || agent.socket.exists())?;
        Ok(agent)
    }
}

impl Drop for Agent {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// Makes a key and returns where it is, and its fingerprint.
fn key(lab: &Lab, name: &str) -> Result<(PathBuf, String)> {
    let path = lab.dir().join(name);
    let mut making = lab.tool("ssh-keygen")?;
    succeed(
        making
            .args(["-q", "-t", "ed25519", "-N", "", "-C", name, "-f"])
            .arg(&path),
    )?;
    let shown = succeed(lab.tool("ssh-keygen")?.arg("-lf").arg(&path))?;
    let fingerprint = shown.split(' ').nth(1).context("a fingerprint")?;
    Ok((path, fingerprint.to_owned()))
}

/// Copies a program and the libraries that it needs to where they are in a root file system.
fn copy_program(lab: &Lab, name: &str, root: &Path) -> Result<()> {
    let program = crate::setup::find(name).with_context(|| format!("{name} is not installed"))?;
    let libraries = succeed(lab.tool("ldd")?.arg(&program))?;
    let words = libraries.split_whitespace().filter(|word| word.starts_with('/'));
    for (from, to) in words
        .map(|library| (PathBuf::from(library), library.to_owned()))
        .chain([(program, format!("/bin/{name}"))])
    {
        let place = root.join(to.trim_start_matches('/'));
        fs::create_dir_all(place.parent().context("a file has a directory")?)?;
        fs::copy(from, place)?;
    }
    Ok(())
}

const WITH_AGENTS: &str = r#"FROM @BASE@ AS tools
COPY root /
FROM tools
RUN --mount=type=ssh,required=true ssh-add -l | grep -q '@DEFAULT@' && [ "$(ssh-add -l | wc -l)" = 1 ]
RUN --mount=type=ssh,id=other,target=/agent,uid=11,gid=12,mode=0640 \
    [ "$(stat -c '%u %g %a' /agent)" = '11 12 640' ] && SSH_AUTH_SOCK=/agent ssh-add -l | grep -q '@OTHER@'
RUN --mount=type=ssh --mount=type=ssh,id=other,target=/agent \
    ssh-add -l | grep -q '@DEFAULT@' && SSH_AUTH_SOCK=/agent ssh-add -l | grep -q '@OTHER@'
RUN --mount=type=ssh,id=other ! ssh-add -D 2>/dev/null && ! ssh-add -L 2>/dev/null | grep -q PRIVATE
RUN --mount=type=ssh,id=none [ -z "$SSH_AUTH_SOCK" ] || ! [ -e "$SSH_AUTH_SOCK" ]
RUN ! [ -e /agent ] && ! ls /run/buildkit 2>/dev/null
"#;

fn agents_in_steps(lab: &Lab) -> Result<()> {
    let agent = Agent::start(lab)?;
    let ((default, shown_default), (other, shown_other)) = (key(lab, "default-key")?, key(lab, "other-key")?);
    succeed(
        lab.tool("ssh-add")?
            .env("SSH_AUTH_SOCK", &agent.socket)
            .arg("-q")
            .arg(&default),
    )?;
    let dockerfile = WITH_AGENTS
        .replace("@DEFAULT@", &shown_default)
        .replace("@OTHER@", &shown_other);
    let context = lab.context("c", &[("Dockerfile", &dockerfile)])?;
    copy_program(lab, "ssh-add", &context.join("root"))?;
    let daemon = lab.daemon_with(&["--debug"])?;
    let build = |ssh: &[String]| -> Command {
        let mut build = daemon.cooper_build(&context);
        build.env("SSH_AUTH_SOCK", &agent.socket).args(ssh);
        build
    };
    let (_, message) = fail(&mut build(&[]))?;
    expect(&message, "no SSH key \"\" forwarded from the client")?;
    let other = format!("--ssh=other={}", other.display());
    let (_, message) = fail(&mut build(std::slice::from_ref(&other)))?;
    expect(&message, "default")?;
    let shown = succeed(&mut build(&["--ssh=default".to_owned(), other]))?;
    // Neither the keys nor who holds them are kept.
    for name in ["default-key", "other-key"] {
        let text = fs::read_to_string(lab.dir().join(name))?;
        let line = text.lines().nth(2).context("a key has lines")?;
        expect_not(&shown, line)?;
        expect_not(&daemon.log(), line)?;
        let kept = lab
            .tool("grep")?
            .args(["-rlF", line])
            .arg(lab.dir().join("daemon"))
            .output()?;
        ensure!(
            kept.stdout.is_empty(),
            "a key is in {}",
            String::from_utf8_lossy(&kept.stdout)
        );
    }
    Ok(())
}

/// In the place of `ssh`: notes how it is called, and runs the command here.
const SSH: &str = r#"#!/bin/sh
{
    echo "called: $*"
    [ -S "$SSH_AUTH_SOCK" ] && echo "with an agent"
    for word; do
        case $word in UserKnownHostsFile=*) cat "${word#*=}" ;; esac
    done
    echo "home: $HOME."
} >> @LOG@
for command; do :; done
exec sh -c "$command"
"#;

/// Puts the stand-in for ssh where the daemon finds it; returns the file in which it says how it was called.
fn stand_in(lab: &Lab) -> Result<PathBuf> {
    let log = lab.dir().join("ssh.log");
    let ssh = lab.programs()?.join("ssh");
    fs::write(&ssh, SSH.replace("@LOG@", &log.to_string_lossy()))?;
    fs::set_permissions(&ssh, fs::Permissions::from_mode(0o755))?;
    Ok(log)
}

/// Commits a repository's only file.
fn commit(lab: &Lab, repository: &Path, content: &str) -> Result<()> {
    fs::create_dir_all(repository)?;
    fs::write(repository.join("f"), content)?;
    let script =
        "test -d .git || git init -q -b main; git add f; git -c user.name=n -c user.email=e commit -q -m m";
    succeed(lab.tool("sh")?.current_dir(repository).args(["-ec", script]))?;
    Ok(())
}

fn expect_called(log: &Path, parts: &[&str], not: &str) -> Result<()> {
    let called = fs::read_to_string(log)?;
    for part in parts {
        expect(&called, part)?;
    }
    expect_not(&called, not)
}

fn expect_content(lab: &Lab, content: &str) -> Result<()> {
    let found = fs::read_to_string(lab.dir().join("out/f"))?;
    ensure!(found == content, "the file is another: {found:?}");
    Ok(())
}

fn git_over_ssh(lab: &Lab) -> Result<()> {
    let log = stand_in(lab)?;
    let repository = lab.dir().join("repository");
    commit(lab, &repository, "content")?;
    let agent = Agent::start(lab)?;
    let daemon = lab.daemon()?;
    let url = format!("ssh://git@host.test{}", repository.display());
    let build = |attrs: &[(&str, &str)], flags: &[&str]| -> Result<Command> {
        let attrs = [&[("git.fullurl", url.as_str())][..], attrs].concat();
        let identifier = format!("git://host.test{}#main", repository.display());
        let file = lab.dir().join("definition");
        fs::write(&file, definition(&[source(&identifier, &attrs)]).encode_to_vec())?;
        let out = lab.dir().join("out");
        let mut build = daemon.buildctl(&["build", "--progress=plain", "--no-cache"]);
        build
            .arg(format!("--output=type=local,dest={}", out.display()))
            .args(flags)
            .env("SSH_AUTH_SOCK", &agent.socket)
            .stdin(fs::File::open(&file)?);
        Ok(build)
    };
    // Without lines for it, any host is trusted, as BuildKit has it.
    succeed(&mut build(&[], &[])?)?;
    expect_content(lab, "content")?;
    let parts = [
        "StrictHostKeyChecking=no",
        "BatchMode=yes",
        "git@host.test",
        "-F /dev/null",
    ];
    expect_called(&log, &parts, "with an agent")?;
    fs::remove_file(&log)?;

    commit(lab, &repository, "changed")?;
    let attrs = [
        ("git.knownsshhosts", "host.test ssh-ed25519 AAAAC3Nza\n"),
        ("git.mountsshsock", "default"),
    ];
    let (_, message) = fail(&mut build(&attrs, &[])?)?;
    expect(&message, "no SSH key \"default\" forwarded from the client")?;
    ensure!(!log.exists(), "git was run without the agent");
    succeed(&mut build(&attrs, &["--ssh=default"])?)?;
    expect_content(lab, "changed")?;
    let parts = [
        "with an agent",
        "host.test ssh-ed25519 AAAAC3Nza\n",
        "UserKnownHostsFile=",
    ];
    expect_called(&log, &parts, "StrictHostKeyChecking=no")?;
    // The hosts' file and the agent's socket are gone with git.
    for dir in ["sockets", "git"] {
        let left = fs::read_dir(lab.dir().join("daemon/worker").join(dir))?.count();
        ensure!(left == 0, "{left} files were left in {dir}");
    }
    Ok(())
}

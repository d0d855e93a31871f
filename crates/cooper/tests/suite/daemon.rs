//! `buildkitd` and `buildctl`.

use super::program::{Daemon, Programs, failure, read, success};

#[test]
fn the_daemon_serves_buildctl() {
    let programs = Programs::new();
    programs.context("FROM scratch\nCOPY file /copy\n");
    let daemon = Daemon::start(
        &programs,
        "buildkitd",
        &[
            "--oci-worker=true",
            "--containerd-worker=false",
            "--oci-worker-gc=false",
        ],
    );
    let buildctl = |args: &[&str]| programs.run("buildctl", [&["--addr", &daemon.address], args].concat());

    let (workers, _) = success(&buildctl(&[
        "debug",
        "workers",
        "--format",
        "{{range .}}{{.ID}}{{end}}",
    ]));
    assert_eq!(workers.trim().len(), 32, "{workers}");
    let (info, _) = success(&buildctl(&["debug", "info"]));
    assert!(info.starts_with("BuildKit:"), "{info}");

    let build = [
        "build",
        "--progress=plain",
        "--frontend=dockerfile.v0",
        "--local",
        "context=context",
        "--local",
        "dockerfile=context",
        "--output",
        "type=local,dest=out",
        "--ref-file",
        "ref",
        "--trace",
        "trace.json",
    ];
    let (_, progress) = success(&buildctl(&build));
    assert!(progress.contains("#1 [internal] load"), "{progress}");
    assert_eq!(read(&programs.path("out"), "copy"), "content");
    assert!(read(programs.dir.path(), "trace.json").contains("\"vertexes\":["));

    let id = read(programs.dir.path(), "ref");
    let (logs, _) = success(&buildctl(&["debug", "logs", "--progress=plain", &id]));
    assert!(logs.contains("COPY file /copy"), "{logs}");
    let (histories, _) = success(&buildctl(&["debug", "histories"]));
    assert!(
        histories.contains(&id) && histories.contains("COMPLETE"),
        "{histories}"
    );

    let (usage, _) = success(&buildctl(&["du", "--format", "json"]));
    assert!(usage.contains("\"recordType\":"), "{usage}");
    let (pruned, _) = success(&buildctl(&["prune", "--all"]));
    assert!(pruned.contains("Total:"), "{pruned}");
    let (usage, _) = success(&buildctl(&["du"]));
    assert!(usage.contains("Total:\t\t0B"), "{usage}");
    success(&buildctl(&["prune-histories"]));
    assert_eq!(daemon.stop(), Some(0));
}

#[test]
fn failures_have_buildctls_form() {
    let programs = Programs::new();
    programs.context("FROM scratch\nCOPY missing /x\n");
    let daemon = Daemon::start(&programs, "cooperd", &[]);
    let buildctl = |args: &[&str]| programs.run("buildctl", [&["--addr", &daemon.address], args].concat());
    let build = [
        "build",
        "--progress=plain",
        "--frontend=dockerfile.v0",
        "--local=context=context",
        "--local=dockerfile=context",
    ];
    let stderr = failure(&buildctl(&build), 1);
    assert!(stderr.contains("   2 | >>> COPY missing /x\n"), "{stderr}");
    assert!(
        stderr
            .lines()
            .last()
            .unwrap()
            .starts_with("error: failed to solve: "),
        "{stderr}"
    );
    let stderr = failure(&buildctl(&["build", "--frontend=nonexistent.v0"]), 1);
    assert!(stderr.contains("nonexistent.v0"), "{stderr}");
    let stderr = failure(&buildctl(&["build"]), 1);
    assert!(
        stderr.contains("please specify --frontend or pipe LLB definition to stdin"),
        "{stderr}"
    );
    // A second daemon on the same state must not disturb the first.
    let second = [
        "--root",
        "root",
        "--addr",
        &daemon.address,
        "--config=/nonexistent",
    ];
    let stderr = failure(&programs.run("cooperd", second), 1);
    assert!(stderr.contains("in use by another process"), "{stderr}");
    success(&buildctl(&["du"]));
}

#[test]
fn help_and_versions_need_no_daemon() {
    let programs = Programs::new();
    for (name, args) in [
        ("buildctl", &[] as &[&str]),
        ("buildctl", &["--help"]),
        ("buildctl", &["--version"]),
        ("buildkitd", &["--help"]),
        ("buildkitd", &["--version"]),
        ("cooperd", &["--version"]),
        ("cooper", &[]),
        ("cooper", &["version"]),
        ("cooper", &["build", "--help"]),
    ] {
        let (stdout, _) = success(&programs.run(name, args));
        assert!(!stdout.is_empty(), "{name} {args:?}");
    }
    let (version, _) = success(&programs.run("buildctl", ["--version"]));
    assert!(version.starts_with("buildctl cooper v0.31."), "{version}");
    let stderr = failure(
        &programs.run("buildctl", ["--addr", "unix:///nonexistent/x.sock", "du"]),
        1,
    );
    assert!(
        stderr.starts_with("error: failed to connect to unix:///nonexistent/x.sock"),
        "{stderr}"
    );
}

#[test]
fn settings_that_cannot_be_honoured_are_refused() {
    let programs = Programs::new();
    for (setting, refusal) in [
        (
            "proxySnapshotterPath = \"/run/snapshotter.sock\"",
            "buildkitd: worker.oci.proxySnapshotterPath is not supported",
        ),
        (
            "networkMode = \"cni\"\ncniConfigPath = \"/nonexistent.json\"",
            "buildkitd: cannot read cni config \"/nonexistent.json\"",
        ),
    ] {
        std::fs::write(programs.path("c.toml"), format!("[worker.oci]\n{setting}\n")).unwrap();
        let run = programs.run("buildkitd", ["--config", "c.toml", "--root", "root"]);
        let stderr = failure(&run, 1);
        assert!(stderr.starts_with(refusal), "{stderr}");
    }
    let stderr = failure(
        &programs.run("buildkitd", ["--containerd-worker=true", "--root", "root"]),
        1,
    );
    assert!(stderr.contains("containerd"), "{stderr}");
}

//! `cooper build` without a daemon.

use super::program::{Programs, failure, read, success};

const DOCKERFILE: &str = "FROM scratch\nARG NAME=none\nLABEL name=$NAME\nCOPY file /copy\n";

fn build(programs: &Programs, args: &[&str]) -> std::process::Output {
    let root = programs.path("root");
    let context = programs.path("context");
    let mut all = vec!["build", "--root", root.to_str().unwrap(), "--progress=plain"];
    all.extend(args);
    all.push(context.to_str().unwrap());
    programs.run("cooper", all)
}

#[test]
fn builds_are_cached_between_processes() {
    let programs = Programs::new();
    programs.context(DOCKERFILE);
    let (_, progress) = success(&build(&programs, &["-o", "out"]));
    assert_eq!(read(&programs.path("out"), "copy"), "content");
    assert!(
        progress.contains("COPY file /copy") && !progress.contains("CACHED"),
        "{progress}"
    );
    let (_, progress) = success(&build(&programs, &["-o", "out"]));
    assert!(progress.contains("CACHED"), "{progress}");
    std::fs::write(programs.path("context/file"), "changed").unwrap();
    success(&build(&programs, &["-o", "out"]));
    assert_eq!(read(&programs.path("out"), "copy"), "changed");
}

#[test]
fn images_go_to_files_with_their_metadata() {
    let programs = Programs::new();
    programs.context(DOCKERFILE);
    let args = [
        "-t",
        "example.com/x:v1",
        "--build-arg",
        "NAME=y",
        "-o",
        "type=oci,dest=image.tar",
        "--metadata-file",
        "m.json",
        "--iidfile",
        "id",
        "-q",
    ];
    let (stdout, stderr) = success(&build(&programs, &args));
    let id = read(programs.dir.path(), "id");
    assert!(id.starts_with("sha256:"), "{id}");
    assert_eq!(stdout.trim(), id);
    assert_eq!(stderr, "");
    let metadata = read(programs.dir.path(), "m.json");
    assert!(
        metadata.contains("\"image.name\": \"example.com/x:v1\""),
        "{metadata}"
    );
    assert!(
        metadata.contains("\"containerimage.descriptor\": {"),
        "{metadata}"
    );
    assert!(std::fs::metadata(programs.path("image.tar")).unwrap().len() > 1024);
    let layout = ["-t", "example.com/x:v1", "-o", "type=oci,tar=false,dest=layout"];
    success(&build(&programs, &layout));
    let index = read(&programs.path("layout"), "index.json");
    assert!(index.contains("example.com/x:v1"), "{index}");
}

#[test]
fn failures_point_into_the_dockerfile() {
    let programs = Programs::new();
    programs.context("FROM scratch\nCOPY missing /x\n");
    let stderr = failure(&build(&programs, &[]), 1);
    assert!(
        stderr.contains("Dockerfile:2\n--------------------\n"),
        "{stderr}"
    );
    assert!(stderr.contains("   2 | >>> COPY missing /x\n"), "{stderr}");
    let mut last = stderr.lines().rev();
    let (hint, error) = (last.next().unwrap(), last.next().unwrap());
    assert!(
        error.starts_with("ERROR: failed to build: failed to solve: ") && error.contains("missing"),
        "{stderr}"
    );
    assert!(
        hint.starts_with("HINT: ") && hint.contains("build context"),
        "{stderr}"
    );
    let stderr = failure(&build(&programs, &["-f", "nonexistent"]), 1);
    assert!(stderr.contains("failed to read dockerfile"), "{stderr}");
    failure(&programs.run("cooper", ["build", "--no-such-flag"]), 2);
}

#[test]
fn a_dockerfile_may_come_from_standard_input() {
    let programs = Programs::new();
    programs.context("FROM broken\n");
    std::fs::write(programs.path("other"), "FROM scratch\nCOPY file /other\n").unwrap();
    let root = programs.path("root");
    let mut command = programs.command("cooper", ["build", "-f", "-", "-o", "out", "context", "--root"]);
    command
        .arg(root)
        .stdin(std::fs::File::open(programs.path("other")).unwrap());
    success(&command.output().unwrap());
    assert_eq!(read(&programs.path("out"), "other"), "content");
}

#[test]
fn questions_are_answered() {
    let programs = Programs::new();
    programs.context("FROM scratch AS one\nFROM scratch AS two\n");
    let (stdout, _) = success(&build(&programs, &["--call", "targets"]));
    assert!(stdout.contains("one") && stdout.contains("two"), "{stdout}");
    failure(&build(&programs, &["--call", "nonsense"]), 1);
}

#[test]
fn builds_at_once_share_one_engine() {
    let programs = Programs::new();
    programs.context(DOCKERFILE);
    let root = programs.path("root");
    let children: Vec<_> = (0..4)
        .map(|number| {
            let out = format!("out{number}");
            let mut command = programs.command("cooper", ["build", "context", "-o", &out, "--root"]);
            command
                .arg(&root)
                .stderr(std::process::Stdio::piped())
                .spawn()
                .unwrap()
        })
        .collect();
    for child in children {
        success(&child.wait_with_output().unwrap());
    }
    for number in 0..4 {
        assert_eq!(read(&programs.path(&format!("out{number}")), "copy"), "content");
    }
    assert!(!root.join("cooper.sock").exists());
}

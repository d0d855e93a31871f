//! What is mounted, what is left behind, and what cannot be reached.

use std::os::unix::fs::{MetadataExt as _, PermissionsExt as _, symlink};
use std::path::Path;
use std::sync::Arc;

use executor::{
    ContainerMount, ExecutorConfig, FileSource, HostAddress, MountSource, RunRequest, TraceSocket,
};

use crate::Test;
use crate::fixture::{Lab, shell};

pub const TESTS: &[Test] = crate::tests![
    mounts_of_every_kind_work,
    selectors_stay_inside,
    secrets_are_files_in_memory,
    the_same_overlay_can_be_mounted_twice,
    stubs_leave_no_trace,
    stubs_of_nested_targets_go_when_asked,
    a_read_only_root_is_read_only,
    impossible_targets_are_refused,
    masks_cannot_be_led_astray,
    the_hosts_mounts_are_untouched,
    the_parent_of_the_root_is_the_root,
    long_chains_of_layers_mount,
    name_resolution_is_set_up,
    listings_of_mounts_name_their_sources,
    spans_can_be_left_at_a_socket,
];

fn mount(target: &str, source: MountSource) -> ContainerMount {
    ContainerMount {
        target: target.to_owned(),
        source,
        selector: String::new(),
        read_only: false,
    }
}

async fn mounts_of_every_kind_work(lab: Arc<Lab>) {
    let directory = lab.directory();
    std::fs::write(directory.join("file"), "host").unwrap();
    let mut request = lab.request(
        "cat /in/dir/file /one; echo new > /in/dir/new; (echo x > /ro/x) 2>/dev/null && echo writable; \
         echo t > /tmpfs/t && cat /tmpfs/t; stat -c %a /tmp /tmpfs; grep -c ' /tmp tmpfs .*size=1024k' /proc/mounts",
    );
    request.mounts = vec![
        mount(
            "/in/dir",
            MountSource::Snapshot(vec![snapshot::Mount::bind(&directory, false)]),
        ),
        mount("/one", MountSource::Host(directory.join("file"))),
        ContainerMount {
            read_only: true,
            ..mount(
                "/ro",
                MountSource::Snapshot(vec![snapshot::Mount::bind(&directory, true)]),
            )
        },
        mount(
            "/tmp",
            MountSource::Tmpfs {
                size_bytes: Some(1 << 20),
            },
        ),
        mount("/tmpfs", MountSource::Tmpfs { size_bytes: None }),
    ];
    assert_eq!(lab.ok(request).await, "hosthostt\n1777\n1777\n1\n");
    assert!(directory.join("new").exists() && !directory.join("x").exists());
}

async fn selectors_stay_inside(lab: Arc<Lab>) {
    let directory = lab.directory();
    std::fs::create_dir_all(directory.join("tree/sub")).unwrap();
    std::fs::write(directory.join("tree/sub/f"), "inside").unwrap();
    std::fs::create_dir_all(directory.join("sub")).unwrap();
    std::fs::write(directory.join("sub/f"), "outside").unwrap();
    symlink("../../../sub", directory.join("tree/link")).unwrap();
    for selector in ["sub", "/sub/", "link", "../sub", "sub/../../sub"] {
        let mut request = lab.request("cat /m/f");
        let source = MountSource::Snapshot(vec![snapshot::Mount::bind(directory.join("tree"), false)]);
        request.mounts = vec![ContainerMount {
            selector: selector.to_owned(),
            ..mount("/m", source)
        }];
        assert_eq!(lab.ok(request).await, "inside", "{selector}");
    }
    let mut request = lab.request("true");
    let source = MountSource::Snapshot(vec![snapshot::Mount::bind(directory.join("tree"), false)]);
    request.mounts = vec![ContainerMount {
        selector: "missing".to_owned(),
        ..mount("/m", source)
    }];
    let error = lab.run(request).await.unwrap_err().to_string();
    assert!(
        error.contains("missing") && error.contains("no such file"),
        "{error}"
    );
}

async fn secrets_are_files_in_memory(lab: Arc<Lab>) {
    let mut request = lab.request(
        "cat /run/secrets/a; stat -c %u:%g:%a /run/secrets/a; (echo x > /run/secrets/a) 2>/dev/null && echo writable; \
         /run/tool; wc -c < /big",
    );
    let file = |bytes: &[u8], mode| FileSource {
        bytes: bytes.to_vec(),
        uid: 5,
        gid: 6,
        mode,
    };
    request.mounts = vec![
        mount("/run/secrets/a", MountSource::File(file(b"hidden\n", 0o440))),
        mount(
            "/run/tool",
            MountSource::File(file(b"#!/bin/sh\necho tool\n", 0o555)),
        ),
        mount("/big", MountSource::File(file(&vec![b'x'; 500 << 10], 0o444))),
    ];
    let tree = lab.tree();
    request.root = tree.root;
    assert_eq!(lab.ok(request).await, "hidden\n5:6:440\ntool\n512000\n");
    assert!(!tree.upper.join("run/secrets/a").exists() && !tree.upper.join("big").exists());
}

async fn the_same_overlay_can_be_mounted_twice(lab: Arc<Lab>) {
    let tree = lab.tree();
    std::fs::create_dir(tree.upper.join("a")).unwrap();
    let mut request = lab.request("echo x > /one/a/f && cat /two/f");
    request.mounts = vec![
        mount("/one", MountSource::Snapshot(tree.root.mounts.clone())),
        ContainerMount {
            selector: "a".to_owned(),
            ..mount("/two", MountSource::Snapshot(tree.root.mounts.clone()))
        },
    ];
    assert_eq!(lab.ok(request).await, "x\n");
    assert!(tree.upper.join("a/f").exists());
}

fn list(path: &Path) -> Vec<String> {
    let mut names: Vec<String> = std::fs::read_dir(path)
        .unwrap()
        .map(|entry| entry.unwrap().file_name().into_string().unwrap())
        .collect();
    names.sort();
    names
}

async fn stubs_leave_no_trace(lab: Arc<Lab>) {
    let tree = lab.tree();
    let etc = std::fs::metadata(lab.path().join("rootfs/etc")).unwrap();
    let mut request = RunRequest::new(tree.root, shell("echo x > /made"));
    request.mounts = vec![
        mount("/stub", MountSource::Tmpfs { size_bytes: None }),
        mount("/stub/inner", MountSource::Tmpfs { size_bytes: None }),
        mount("/deep/stub", MountSource::Tmpfs { size_bytes: None }),
    ];
    lab.ok(request).await;
    assert_eq!(list(&tree.upper), ["deep", "etc", "made"]);
    assert!(list(&tree.upper.join("etc")).is_empty() && list(&tree.upper.join("deep")).is_empty());
    let after = std::fs::metadata(tree.upper.join("etc")).unwrap();
    if lab.embedded {
        assert_eq!(
            (after.mtime(), after.mtime_nsec()),
            (etc.mtime(), etc.mtime_nsec())
        );
    }

    // What the step fills is not a stub any more.
    let tree = lab.tree();
    symlink("/elsewhere", tree.upper.join("link")).unwrap();
    let mut request = RunRequest::new(tree.root, shell("true"));
    request.mounts = vec![mount("/link/x", MountSource::Tmpfs { size_bytes: None })];
    lab.ok(request).await;
    assert_eq!(list(&tree.upper), ["elsewhere", "etc", "link"]);
}

async fn stubs_of_nested_targets_go_when_asked(lab: Arc<Lab>) {
    let tree = lab.tree();
    let mut request = RunRequest::new(tree.root, shell("true"));
    request.remove_stubs_recursive = true;
    request.mounts = vec![mount("/a/b/c", MountSource::Tmpfs { size_bytes: None })];
    lab.ok(request).await;
    assert_eq!(list(&tree.upper), ["etc"]);
}

async fn a_read_only_root_is_read_only(lab: Arc<Lab>) {
    let tree = lab.tree();
    let mut request = RunRequest::new(
        tree.root,
        shell("(echo x > /x) 2>/dev/null && echo writable; echo y > /rw/y && cat /rw/y; ls /"),
    );
    request.root.read_only = true;
    request.mounts = vec![mount("/rw", MountSource::Tmpfs { size_bytes: None })];
    let text = lab.ok(request).await;
    assert!(text.starts_with("y\nbin\n"), "{text}");
    assert_eq!(list(&tree.upper), ["etc"], "stubs are removed nevertheless");
}

async fn impossible_targets_are_refused(lab: Arc<Lab>) {
    for target in [
        "/",
        "relative",
        "/..",
        "/proc",
        "/proc/self",
        "/x/../proc/1",
        "/bin/busybox/x",
        "/nul\0",
    ] {
        let mut request = lab.request("true");
        request.mounts = vec![mount(target, MountSource::Tmpfs { size_bytes: None })];
        let result = lab.run(request).await;
        assert!(result.as_ref().is_err(), "{target:?}: {result:?}");
    }
}

async fn the_hosts_mounts_are_untouched(lab: Arc<Lab>) {
    let count = || {
        std::fs::read_to_string("/proc/self/mountinfo")
            .unwrap()
            .lines()
            .count()
    };
    let before = count();
    let container = {
        let (stdio, _streams) = crate::fixture::pipes();
        lab.executor.start(lab.request("sleep 100"), stdio).await.unwrap()
    };
    if lab.embedded {
        assert_eq!(count(), before);
    }
    container.kill();
    assert_eq!(container.wait().await.unwrap().code, 137);
    assert_eq!(count(), before);
}

async fn the_parent_of_the_root_is_the_root(lab: Arc<Lab>) {
    let mut request =
        lab.request("ls -d /../../bin; cd /; cd ..; ls -d bin; stat -c %i / /.. | sort -u | wc -l");
    let file = FileSource {
        bytes: b"x".to_vec(),
        uid: 0,
        gid: 0,
        mode: 0o444,
    };
    request.mounts = vec![mount("/secret", MountSource::File(file))];
    assert_eq!(lab.ok(request).await, "/../../bin\nbin\n1\n");
}

async fn long_chains_of_layers_mount(lab: Arc<Lab>) {
    let directory = lab.directory();
    let mut lower = Vec::new();
    for number in 0..200 {
        let layer = directory.join(format!("layer-with-a-rather-long-name-{number:0>80}"));
        std::fs::create_dir(&layer).unwrap();
        std::fs::set_permissions(&layer, std::fs::Permissions::from_mode(0o755)).unwrap();
        std::fs::write(layer.join(format!("f{number}")), "x").unwrap();
        lower.push(layer);
    }
    lower.push(lab.path().join("rootfs"));
    let (upper, work) = (directory.join("upper"), directory.join("work"));
    std::fs::create_dir(&upper).unwrap();
    std::fs::create_dir(&work).unwrap();
    let mount = snapshot::Mount::overlay(
        lower.iter().map(std::path::PathBuf::as_path),
        Some((&upper, &work)),
        &[],
    );
    let mut request = lab.request("ls / | grep -c ^f");
    request.root.mounts = vec![mount];
    assert_eq!(lab.ok(request).await, "200\n");
}

async fn name_resolution_is_set_up(lab: Arc<Lab>) {
    let mut request =
        lab.request("cat /etc/hosts; hostname; (echo x >> /etc/hosts) 2>/dev/null && echo writable");
    request.process.args[2].push_str("; grep -q nameserver /etc/resolv.conf");
    request.hostname = "other".to_owned();
    request.extra_hosts = vec![HostAddress {
        host: "some.where".to_owned(),
        address: "10.1.2.3".parse().unwrap(),
    }];
    let expected = "127.0.0.1\tlocalhost other\n::1\tlocalhost ip6-localhost ip6-loopback\n10.1.2.3\tsome.where\nother\n";
    assert_eq!(lab.ok(request).await, expected);
    let text = lab.sh("cat /etc/hosts").await;
    assert_eq!(
        text,
        "127.0.0.1\tlocalhost buildkitsandbox\n::1\tlocalhost ip6-localhost ip6-loopback\n"
    );
}

async fn masks_cannot_be_led_astray(lab: Arc<Lab>) {
    if !lab.embedded {
        return;
    }
    let directory = lab.directory();
    symlink("/proc/kcore", directory.join("null")).unwrap();
    let mut request = lab.request("head -c 1 /proc/kcore | wc -c");
    request.mounts = vec![mount(
        "/dev",
        MountSource::Snapshot(vec![snapshot::Mount::bind(&directory, false)]),
    )];
    assert_eq!(lab.ok(request).await, "0\n");
    // No device nodes are made in a mount of the user's.
    assert!(!directory.join("zero").exists());

    let tree = lab.tree();
    std::fs::create_dir(tree.upper.join("elsewhere")).unwrap();
    let request = RunRequest::new(tree.root, shell("true"));
    // Covers the image's own directory.
    std::fs::remove_dir_all(tree.upper.join("proc")).ok();
    symlink("elsewhere", tree.upper.join("proc")).unwrap();
    let error = lab.run(request).await.unwrap_err().to_string();
    assert!(error.contains("symbolic link"), "{error}");
}

async fn listings_of_mounts_name_their_sources(lab: Arc<Lab>) {
    let listed = lab
        .sh("sed -n 's|^\\([^ ]* /[a-z]* [a-z]*\\) .*|\\1|p' /proc/mounts")
        .await;
    for line in ["proc /proc proc", "tmpfs /dev tmpfs", "sysfs /sys sysfs"] {
        assert!(listed.lines().any(|listed| listed == line), "{listed}");
    }
}

async fn spans_can_be_left_at_a_socket(lab: Arc<Lab>) {
    const SCRIPT: &str = "ls /dev/otel-grpc.sock; env | grep -E '^(OTEL|TRACE)' | sort; \
        grep -c ' /dev/otel-grpc.sock [^ ]* ro,' /proc/mounts";
    const PARENT: &str = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01";
    let (directory, trace_socket) = (lab.directory(), TraceSocket::default());
    let tracing = Lab::configured(
        &lab.runtime,
        ExecutorConfig {
            trace_socket: trace_socket.clone(),
            ..ExecutorConfig::default()
        },
    );
    let request = || {
        let mut request = tracing.request(SCRIPT);
        request.trace_parent = Some(PARENT.to_owned());
        request
    };
    let without = tracing.run(request()).await.unwrap();
    assert_eq!(without.stdout, "0\n");
    let path = directory.join("socket");
    let _listener = std::os::unix::net::UnixListener::bind(&path).unwrap();
    trace_socket.offer(&path).unwrap();
    let mut overriding = request();
    overriding
        .process
        .env
        .push("OTEL_TRACES_EXPORTER=none".to_owned());
    overriding.process.env.push("TRACEPARENT=mine".to_owned());
    // What a step mounts in its place is not there.
    overriding.mounts = vec![mount("/dev/otel-grpc.sock", MountSource::Host(directory))];
    for (request, exporter) in [(request(), "otlp"), (overriding, "none")] {
        let expected = format!(
            "/dev/otel-grpc.sock\nOTEL_EXPORTER_OTLP_TRACES_ENDPOINT=unix:///dev/otel-grpc.sock\n\
             OTEL_EXPORTER_OTLP_TRACES_PROTOCOL=grpc\nOTEL_TRACES_EXPORTER={exporter}\n\
             TRACEPARENT={PARENT}\n1\n"
        );
        assert_eq!(tracing.ok(request).await, expected);
    }
}

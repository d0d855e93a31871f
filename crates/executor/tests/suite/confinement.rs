//! What a process in a container may and may not do.

use std::path::Path;
use std::sync::Arc;

use executor::{DeviceRegistry, Devices, Network, Resources, Security, Ulimit};

use crate::Test;
use crate::fixture::{Lab, shell};

pub const TESTS: &[Test] = crate::tests![
    seccomp_filters_sandboxed_processes_only,
    capabilities_are_few,
    insecure_has_what_the_daemon_has,
    masked_paths_show_nothing,
    kernel_settings_are_read_only,
    a_node_can_be_made_but_not_opened,
    given_devices_can_be_used,
    devices_that_cannot_be_given_are_refused,
    usual_devices_work,
    limits_are_set,
    a_limit_that_cannot_be_raised_is_an_error,
    no_descriptor_of_the_host_is_open,
    groups_are_the_images,
    users_get_their_stdio_and_home,
    memory_is_limited_and_its_lack_told,
    cpu_limits_are_set,
    the_network_is_the_hosts_or_a_loopback,
    processes_of_the_host_are_invisible,
    the_binary_of_the_supervisor_cannot_be_written,
    namespaces_cannot_be_made,
];

fn status<'a>(text: &'a str, key: &str) -> &'a str {
    let line = text
        .lines()
        .find_map(|line| line.strip_prefix(key)?.strip_prefix(':'));
    line.unwrap_or_else(|| panic!("no {key} in {text}")).trim()
}

async fn seccomp_filters_sandboxed_processes_only(lab: Arc<Lab>) {
    let text = lab.sh("cat /proc/self/status").await;
    assert_eq!(status(&text, "Seccomp"), "2");
    assert_eq!(status(&text, "NoNewPrivs"), "0");
    let mut request = lab.request("cat /proc/self/status");
    request.security = Security::Insecure;
    assert_eq!(status(&lab.ok(request).await, "Seccomp"), "0");
}

async fn capabilities_are_few(lab: Arc<Lab>) {
    let text = lab.sh("cat /proc/self/status").await;
    for set in ["CapPrm", "CapEff", "CapBnd"] {
        assert_eq!(status(&text, set), "00000000a80425fb", "{set}");
    }
    for set in ["CapInh", "CapAmb"] {
        assert_eq!(status(&text, set), "0000000000000000", "{set}");
    }
    let mut request = lab.request("cat /proc/self/status");
    request.process.user = "user".to_owned();
    let text = lab.ok(request).await;
    assert_eq!(status(&text, "CapEff"), "0000000000000000");
    assert_eq!(status(&text, "CapBnd"), "00000000a80425fb");
}

async fn insecure_has_what_the_daemon_has(lab: Arc<Lab>) {
    let own = std::fs::read_to_string("/proc/self/status").unwrap();
    let mut request = lab.request(
        "cat /proc/self/status; mkdir /tmp/x && mount -t tmpfs none /tmp/x && test -c /dev/fuse && test -b /dev/loop0 \
         && test -w /proc/sys/kernel/core_pattern && mkdir /sys/fs/cgroup/memory/inner",
    );
    request.security = Security::Insecure;
    let text = lab.ok(request).await;
    for set in ["CapPrm", "CapEff", "CapBnd", "CapInh", "CapAmb"] {
        assert_eq!(status(&text, set), status(&own, "CapEff"), "{set}");
    }
}

async fn masked_paths_show_nothing(lab: Arc<Lab>) {
    let script = "for f in kcore keys timer_list latency_stats sched_debug; do \
                    test ! -e /proc/$f || test \"$(head -c 1 /proc/$f | wc -c)\" = 0 || echo \"$f is readable\"; done; \
                  for d in /proc/acpi /proc/scsi /sys/firmware /proc/asound; do \
                    test ! -e $d || test -z \"$(ls $d)\" || echo \"$d is not empty\"; done";
    assert_eq!(lab.sh(script).await, "");
}

async fn kernel_settings_are_read_only(lab: Arc<Lab>) {
    let script = "for f in /proc/sys/kernel/hostname /proc/sysrq-trigger /proc/irq/default_smp_affinity; do \
                    test ! -e $f || { (echo x > $f) 2>/dev/null && echo \"$f is writable\"; }; done; \
                  mkdir /sys/x 2>/dev/null && echo sys; for d in /sys/fs/cgroup/devices /sys/fs/cgroup; do \
                    test ! -d $d || { mkdir $d/x 2>/dev/null && echo $d; break; }; done; \
                  test -w /dev || echo dev; true";
    assert_eq!(lab.sh(script).await, "");
}

async fn a_node_can_be_made_but_not_opened(lab: Arc<Lab>) {
    // 1:11 is the kernel's log, 7:0 a loop device, 1:1 memory.
    let script = "mknod /tmp/kmsg c 1 11 && mknod /tmp/loop b 7 0 && mknod /tmp/mem c 1 1 || exit 9; \
                  for d in kmsg loop mem; do (head -c 1 /tmp/$d > /dev/null) 2>&1; done; true";
    let text = lab.sh(script).await;
    assert_eq!(text.matches("Operation not permitted").count(), 3, "{text}");
}

const DEVICE: &str = "{cdiVersion: 0.6.0, kind: v/c, devices: [{name: d, containerEdits: {
    env: [FROM_DEVICE=yes, PATH=/bin],
    additionalGids: [77],
    deviceNodes: [{path: /dev/a/b/loops, hostPath: /dev/loop-control, permissions: r, fileMode: 0604, gid: 9}],
    mounts: [{hostPath: @DIR@, containerPath: /given/here, options: [ro, nosuid]}]}},
    {name: hooked, containerEdits: {hooks: [{hookName: createContainer, path: /bin/true}]}}]}";

fn devices(lab: &Lab) -> Devices {
    let directory = lab.directory();
    let text = DEVICE.replace("@DIR@", &directory.to_string_lossy());
    std::fs::write(directory.join("device.yaml"), text).unwrap();
    DeviceRegistry::new(vec![directory], []).scan()
}

async fn given_devices_can_be_used(lab: Arc<Lab>) {
    if !Path::new("/dev/loop-control").exists() {
        eprintln!("skipped: there is no /dev/loop-control");
        return;
    }
    let script = "id -G; stat -c '%a %g' /dev/a/b/loops; true < /dev/a/b/loops && echo read; \
                  (true > /dev/a/b/loops) 2>&1; ls /given/here; (: > /given/here/x) 2>&1; echo $FROM_DEVICE $PATH";
    let mut request = lab.request(script);
    request.devices = devices(&lab).edits(["v/c=d"]).unwrap();
    let text = lab.ok(request).await;
    assert!(text.starts_with("0 10 77\n604 9\nread\n"), "{text}");
    assert!(text.contains("loops: Operation not permitted"), "{text}");
    assert!(
        text.contains("device.yaml\n") && text.contains("Read-only file system"),
        "{text}"
    );
    assert!(text.ends_with("yes /bin\n"), "{text}");
    // The next container has none of it.
    let text = lab
        .sh("mknod /tmp/l c 10 237; (true < /tmp/l) 2>&1; test -e /dev/a || echo none")
        .await;
    assert!(
        text.contains("Operation not permitted") && text.ends_with("none\n"),
        "{text}"
    );
}

async fn devices_that_cannot_be_given_are_refused(lab: Arc<Lab>) {
    let mut request = lab.request("true");
    request.devices = devices(&lab).edits(["v/c=hooked"]).unwrap();
    match lab.run(request).await {
        Ok(output) => assert!(lab.name() != "embedded" && output.status.success(), "{output:?}"),
        Err(error) => assert!(
            error.to_string().contains("createContainer hook /bin/true"),
            "{error}"
        ),
    }
}

async fn usual_devices_work(lab: Arc<Lab>) {
    let script = "echo x > /dev/null; head -c 4 /dev/zero | wc -c; head -c 4 /dev/urandom | wc -c; \
                  test -d /dev/pts && test -d /dev/shm && test -d /dev/mqueue && echo to > /dev/shm/x && \
                  for l in fd stdout ptmx; do readlink /dev/$l; done; stat -c %a /dev/shm /dev/null";
    let text = lab.sh(script).await;
    assert_eq!(
        text,
        "4\n4\n/proc/self/fd\n/proc/self/fd/1\npts/ptmx\n1777\n666\n"
    );
}

async fn limits_are_set(lab: Arc<Lab>) {
    let mut request = lab.request("ulimit -n; ulimit -Hn; ulimit -u");
    request.ulimits = vec![
        Ulimit {
            name: "nofile".to_owned(),
            soft: 100,
            hard: 200,
        },
        Ulimit {
            name: "nproc".to_owned(),
            soft: 77,
            hard: 77,
        },
    ];
    assert_eq!(lab.ok(request).await, "100\n200\n77\n");
    for (name, soft, hard) in [("bogus", 1, 1), ("nofile", 2, 1), ("nofile", -2, -2)] {
        let mut request = lab.request("true");
        request.ulimits = vec![Ulimit {
            name: name.to_owned(),
            soft,
            hard,
        }];
        assert!(lab.run(request).await.is_err(), "{name} {soft} {hard}");
    }
}

async fn a_limit_that_cannot_be_raised_is_an_error(lab: Arc<Lab>) {
    let own = rustix::thread::capabilities(None).unwrap();
    if own
        .effective
        .contains(rustix::thread::CapabilitySet::SYS_RESOURCE)
    {
        eprintln!("skipped: this process may raise limits");
        return;
    }
    let hard = rustix::process::getrlimit(rustix::process::Resource::Nofile)
        .maximum
        .unwrap();
    let mut request = lab.request("true");
    let more = i64::try_from(hard).unwrap() + 1;
    request.ulimits = vec![Ulimit {
        name: "nofile".to_owned(),
        soft: 10,
        hard: more,
    }];
    let result = lab.run(request).await;
    let refused = match &result {
        Err(error) => !lab.embedded || error.to_string().contains("CAP_SYS_RESOURCE"),
        Ok(output) => !lab.embedded && !output.status.success(),
    };
    assert!(refused, "{result:?}");
}

async fn no_descriptor_of_the_host_is_open(lab: Arc<Lab>) {
    // Keeps one open that is inherited unless somebody takes care.
    let stray = std::fs::File::open("/etc/hosts").unwrap();
    rustix::io::fcntl_setfd(&stray, rustix::io::FdFlags::empty()).unwrap();
    for _ in 0..3 {
        assert_eq!(
            lab.sh("exec /bin/busybox ls /proc/self/fd").await,
            "0\n1\n2\n3\n",
            "3 is ls' own"
        );
    }
    // Sockets show as such: none of those may be.
    let text = lab.sh("exec /bin/busybox ls -l /proc/self/fd").await;
    assert!(!text.contains("socket:"), "{text}");
}

async fn groups_are_the_images(lab: Arc<Lab>) {
    for (user, expected) in [
        ("", "0|0|0 10"),
        ("user", "1000|1001|1001 10 50"),
        ("user:staff", "1000|50|50"),
        ("1000:7", "1000|7|7"),
        ("4000", "4000|0|0"),
    ] {
        let mut request = lab.request("echo \"$(id -u)|$(id -g)|$(id -G)\"");
        request.process.user = user.to_owned();
        assert_eq!(lab.ok(request).await.trim(), expected, "{user:?}");
    }
    let mut request = lab.request("true");
    request.process.user = "nobody-knows".to_owned();
    let error = lab.run(request).await.unwrap_err().to_string();
    assert!(error.contains("unable to find user nobody-knows"), "{error}");
}

async fn users_get_their_stdio_and_home(lab: Arc<Lab>) {
    let mut request = lab.request("echo to-stderr > /dev/stderr; echo $HOME; umask; pwd");
    request.process.user = "user".to_owned();
    request.process.cwd = "/work/new".to_owned();
    let output = lab.run(request).await.unwrap();
    assert_eq!(
        (output.stdout.as_str(), output.stderr.as_str()),
        ("/home/user\n0022\n/work/new\n", "to-stderr\n")
    );
    let mut request = lab.request("stat -c %u:%g:%a /work/new; echo $HOME");
    request.process.cwd = "/work/new".to_owned();
    request.process.user = "1234:5".to_owned();
    assert_eq!(lab.ok(request).await, "1234:5:755\n/\n");
}

async fn memory_is_limited_and_its_lack_told(lab: Arc<Lab>) {
    let mut request = lab.request("exec tail /dev/zero");
    request.resources = Resources {
        memory_bytes: 32 << 20,
        ..Resources::default()
    };
    let output = lab.run(request).await.unwrap();
    assert_eq!(
        (output.status.code, output.status.oom_killed),
        (137, true),
        "{output:?}"
    );
    assert!(!lab.run(lab.request("exit 137")).await.unwrap().status.oom_killed);
}

async fn cpu_limits_are_set(lab: Arc<Lab>) {
    let unified = std::path::Path::new("/sys/fs/cgroup/cgroup.controllers").exists();
    let script = if unified {
        "cat /sys/fs/cgroup/cpu.max"
    } else {
        "cat /sys/fs/cgroup/cpu/cpu.cfs_quota_us /sys/fs/cgroup/cpu/cpu.shares /sys/fs/cgroup/cpuset/cpuset.cpus"
    };
    let mut request = lab.request(script);
    request.resources = Resources {
        cpu_quota_us: 50_000,
        cpu_period_us: 100_000,
        cpu_shares: 512,
        cpuset_cpus: "0".to_owned(),
        ..Resources::default()
    };
    let expected = if unified {
        "50000 100000\n"
    } else {
        "50000\n512\n0\n"
    };
    assert_eq!(lab.ok(request).await, expected);
}

async fn the_network_is_the_hosts_or_a_loopback(lab: Arc<Lab>) {
    let own = std::fs::read_link("/proc/self/ns/net").unwrap();
    let script = "readlink /proc/self/ns/net; ip link";
    for network in [Network::Host, Network::Sandbox] {
        let mut request = lab.request(script);
        request.network = network;
        assert!(
            lab.ok(request).await.starts_with(own.to_str().unwrap()),
            "{network:?}"
        );
    }
    let mut request = lab.request(script);
    request.network = Network::None;
    let text = lab.ok(request).await;
    assert!(!text.starts_with(own.to_str().unwrap()));
    assert_eq!(
        text.lines().filter(|line| line.contains("mtu")).count(),
        1,
        "{text}"
    );
    assert!(text.contains("lo: <LOOPBACK,UP"), "{text}");
}

async fn processes_of_the_host_are_invisible(lab: Arc<Lab>) {
    let text = lab.sh("echo $$; ls -d /proc/[0-9]* | wc -l; hostname").await;
    let lines: Vec<&str> = text.lines().collect();
    assert_eq!(lines[0], "1");
    assert!(lines[1].parse::<u32>().unwrap() < 6, "{text}");
    assert_eq!(lines[2], "buildkitsandbox");
}

async fn the_binary_of_the_supervisor_cannot_be_written(lab: Arc<Lab>) {
    if !lab.embedded {
        return;
    }
    // Executes whatever `/proc/self/exe` was before: the supervisor's binary. It is not recognised, hence this harness
    // runs, lists nothing and ends.
    let tree = lab.tree();
    std::fs::write(tree.upper.join("trap"), "#!/proc/self/exe --list\n").unwrap();
    std::fs::set_permissions(
        tree.upper.join("trap"),
        std::os::unix::fs::PermissionsExt::from_mode(0o755),
    )
    .unwrap();
    let own = std::env::current_exe().unwrap();
    let before = std::fs::metadata(&own).unwrap().modified().unwrap();
    let mut request = executor::RunRequest::new(tree.root, crate::fixture::process(&["/trap"]));
    request.process.args.push("--list".to_owned());
    // Without a loader in the image it cannot even start; with one it must not find anything writable.
    let _ = lab.run(request).await;
    assert_eq!(std::fs::metadata(&own).unwrap().modified().unwrap(), before);

    let mut request = lab.request("sleep 0.2");
    request.process = shell("true");
    lab.ok(request).await;
    // The supervisor itself runs from a read-only mount.
    let supervisor = std::fs::read_dir("/proc").unwrap().flatten().find(|entry| {
        std::fs::read(entry.path().join("cmdline"))
            .is_ok_and(|line| line.starts_with(b"cooper-supervisor-sealed"))
    });
    let supervisor = supervisor.expect("a supervisor runs").path().join("exe");
    let binary = std::fs::File::open(supervisor).unwrap();
    let flags = rustix::fs::fstatvfs(&binary).unwrap().f_flag;
    assert!(flags.contains(rustix::fs::StatVfsMountFlags::RDONLY), "{flags:?}");
}

async fn namespaces_cannot_be_made(lab: Arc<Lab>) {
    let script = "unshare -U true 2>&1; unshare -m true 2>&1; mount -t tmpfs none /tmp 2>&1; true";
    let text = lab.sh(script).await;
    assert!(
        text.matches("ermission").count() + text.matches("not permitted").count() >= 3,
        "{text}"
    );
}

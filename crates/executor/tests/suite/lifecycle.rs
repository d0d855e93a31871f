//! Starting, ending, signalling, joining.

use std::sync::Arc;
use std::time::{Duration, Instant};

use executor::{ContainerId, Process, RunError, Stdio};
use tokio_util::sync::CancellationToken;

use crate::Test;
use crate::fixture::{Lab, pipes, process, read_all, shell};

pub const TESTS: &[Test] = crate::tests![
    exit_codes_are_told,
    programs_that_cannot_run_say_why,
    cancelling_kills_everything,
    dropping_kills_everything,
    processes_can_join,
    terminals_work,
    signals_arrive,
    stdin_is_passed,
    many_run_at_once,
    cgroups_are_removed,
    a_long_description_arrives,
    starting_is_quick,
    a_killed_supervisor_is_replaced,
];

async fn exit_codes_are_told(lab: Arc<Lab>) {
    for code in [0, 1, 42, 255] {
        let status = lab
            .run(lab.request(&format!("exit {code}")))
            .await
            .unwrap()
            .status;
        assert_eq!((status.code, status.signal), (code, None));
    }
    let status = lab
        .run(lab.request("sleep 100 & kill -9 $!; wait $!"))
        .await
        .unwrap()
        .status;
    assert_eq!(status.code, 137);
}

async fn programs_that_cannot_run_say_why(lab: Arc<Lab>) {
    for (program, expected) in [
        ("/bin/nothing", "no such file or directory"),
        ("nothing", "executable file not found in $PATH"),
        ("/etc/passwd", "permission denied"),
        ("/etc", ""),
    ] {
        let mut request = lab.request("");
        request.process = process(&[program]);
        let error = lab.run(request).await.unwrap_err();
        assert!(matches!(error, RunError::Start { .. }), "{error:?}");
        assert!(error.to_string().contains(expected), "{program}: {error}");
    }
    for args in [&[][..], &[""], &["a\0b"]] {
        let mut request = lab.request("");
        request.process = process(args);
        assert!(lab.run(request).await.is_err());
    }
    // Nothing is left that would disturb the next one.
    assert_eq!(lab.sh("echo fine").await, "fine\n");
}

async fn cancelling_kills_everything(lab: Arc<Lab>) {
    let cancel = CancellationToken::new();
    let (stdio, (out, err)) = pipes();
    drop(err);
    let request = lab.request(
        "trap '' TERM INT; (while true; do sleep 1; done) & echo ready; while true; do sleep 1; done",
    );
    let reading = async {
        let mut out = tokio::fs::File::from_std(std::fs::File::from(out));
        let mut buffer = [0; 6];
        tokio::io::AsyncReadExt::read_exact(&mut out, &mut buffer)
            .await
            .unwrap();
        cancel.cancel();
        // Ends when all writers are gone.
        tokio::io::AsyncReadExt::read(&mut out, &mut buffer)
            .await
            .unwrap()
    };
    let (ran, left) = tokio::join!(lab.executor.run(request, stdio, &cancel), reading);
    assert!(matches!(ran, Err(RunError::Canceled)));
    assert_eq!(left, 0);
    assert!(matches!(
        lab.run_with(lab.request("true"), &cancel).await,
        Err(RunError::Canceled)
    ));
}

async fn dropping_kills_everything(lab: Arc<Lab>) {
    let (stdio, streams) = pipes();
    let reading = read_all(streams);
    let container = lab
        .executor
        .start(lab.request("sleep 1000 & sleep 1000"), stdio)
        .await
        .unwrap();
    drop(container);
    reading.await.unwrap();
    let (stdio, streams) = pipes();
    let reading = read_all(streams);
    let cancel = CancellationToken::new();
    let run = lab.executor.run(lab.request("sleep 1000"), stdio, &cancel);
    assert!(
        tokio::time::timeout(Duration::from_millis(50), run)
            .await
            .is_err()
    );
    reading.await.unwrap();
}

async fn processes_can_join(lab: Arc<Lab>) {
    let mut request = lab.request("echo $$ > /first; read line; exit 7");
    request.id = ContainerId::random();
    request.process.env.push("A=b".to_owned());
    request.process.cwd = "/tmp".to_owned();
    let (input, write) = rustix::pipe::pipe_with(rustix::pipe::PipeFlags::CLOEXEC).unwrap();
    let container = lab
        .executor
        .start(
            request,
            Stdio {
                stdin: Some(input),
                ..Stdio::default()
            },
        )
        .await
        .unwrap();

    let (stdio, streams) = pipes();
    let reading = read_all(streams);
    let script = "cat /first /proc/self/status; echo $A; pwd; hostname; ls /proc/self/fd | wc -l; \
                  for n in mnt pid ipc; do readlink /proc/1/ns/$n; readlink /proc/self/ns/$n; done; exit 3";
    let joined = container
        .exec(
            Process {
                env: Vec::new(),
                ..shell(script)
            },
            stdio,
        )
        .await
        .unwrap();
    assert_eq!(joined.wait().await.unwrap().code, 3);
    let (text, errors) = reading.await.unwrap();
    let value = |key: &str| {
        text.lines()
            .find_map(|line| line.strip_prefix(key))
            .map(str::trim)
            .unwrap_or_default()
    };
    assert!(text.starts_with("1\n"), "{text}{errors}");
    assert_eq!(value("Seccomp:"), "2");
    assert_eq!(value("CapEff:"), "00000000a80425fb");
    let lines: Vec<&str> = text.lines().skip_while(|line| *line != "b").collect();
    assert_eq!(lines[..3], ["b", "/tmp", "buildkitsandbox"], "{text}");
    assert_eq!(lines[3], "4", "stdio and ls' own");
    assert!(
        lines[4] == lines[5] && lines[6] == lines[7] && lines[8] == lines[9],
        "{text}"
    );

    let missing = container.exec(process(&["/nothing"]), Stdio::default()).await;
    assert!(matches!(missing, Err(RunError::Start { .. })), "{missing:?}");
    let long = container
        .exec(shell("sleep 1000"), Stdio::default())
        .await
        .unwrap();
    drop(write);
    assert_eq!(container.wait().await.unwrap().code, 7);
    assert_eq!(long.wait().await.unwrap().code, 137, "all end with the first");
    let late = container.exec(shell("true"), Stdio::default()).await;
    assert!(late.is_err(), "{late:?}");
}

async fn terminals_work(lab: Arc<Lab>) {
    let mut request = lab.request(
        "test -t 0 && test -t 1 && tty && read line && echo \"got $line\"; until stty size | grep 33; do usleep 1000; done; test -c /dev/console",
    );
    request.process.tty = true;
    let container = lab.executor.start(request, Stdio::default()).await.unwrap();
    let pty = container.process().take_pty().unwrap();
    assert!(container.process().take_pty().is_none());
    pty.resize(33, 77).unwrap();
    pty.write_all(b"hello\n").await.unwrap();
    let mut text = Vec::new();
    let mut buffer = [0; 1024];
    loop {
        match pty.read(&mut buffer).await.unwrap() {
            0 => break,
            len => text.extend_from_slice(&buffer[..len]),
        }
    }
    let text = String::from_utf8(text).unwrap();
    assert!(text.contains("got hello") && text.contains("33 77"), "{text}");
    assert!(
        text.contains("/dev/pts/0") || text.contains("/dev/console"),
        "{text}"
    );
    assert_eq!(container.wait().await.unwrap().code, 0);
}

async fn signals_arrive(lab: Arc<Lab>) {
    let (stdio, streams) = pipes();
    let script = "trap 'echo caught; exit 5' TERM; echo ready; while true; do sleep 0.01; done";
    let container = lab.executor.start(lab.request(script), stdio).await.unwrap();
    let mut out = tokio::fs::File::from_std(std::fs::File::from(streams.0));
    let mut buffer = [0; 6];
    tokio::io::AsyncReadExt::read_exact(&mut out, &mut buffer)
        .await
        .unwrap();
    assert_eq!(&buffer, b"ready\n");
    assert!(container.process().signal(12_345).is_err());
    container.process().signal(15).unwrap();
    assert_eq!(container.wait().await.unwrap().code, 5);
    assert!(
        container.process().signal(15).is_ok(),
        "one that is gone is no error"
    );
}

async fn stdin_is_passed(lab: Arc<Lab>) {
    let (input, write) = rustix::pipe::pipe_with(rustix::pipe::PipeFlags::CLOEXEC).unwrap();
    let (mut stdio, streams) = pipes();
    stdio.stdin = Some(input);
    let reading = read_all(streams);
    let cancel = CancellationToken::new();
    let run = lab.executor.run(lab.request("cat"), stdio, &cancel);
    rustix::io::write(&write, b"passed").unwrap();
    drop(write);
    assert!(run.await.unwrap().success());
    assert_eq!(reading.await.unwrap().0, "passed");
    assert_eq!(
        lab.sh("cat; echo end").await,
        "end\n",
        "without stdin there is nothing to read"
    );
}

async fn many_run_at_once(lab: Arc<Lab>) {
    let mut runs = tokio::task::JoinSet::new();
    for number in 0..40 {
        let lab = Arc::clone(&lab);
        runs.spawn(async move {
            let text = lab.sh(&format!("echo {number}; sleep 0.05")).await;
            assert_eq!(text.trim(), number.to_string());
        });
    }
    while let Some(result) = runs.join_next().await {
        result.unwrap();
    }
}

fn own_cgroups() -> usize {
    let mut count = 0;
    for hierarchy in ["memory", "devices", "pids", "."] {
        let directory = format!("/sys/fs/cgroup/{hierarchy}/cooper-test/buildkit");
        let entries = std::fs::read_dir(directory).into_iter().flatten().flatten();
        count += entries
            .filter(|entry| entry.file_type().is_ok_and(|kind| kind.is_dir()))
            .count();
    }
    count
}

async fn cgroups_are_removed(lab: Arc<Lab>) {
    let request = |script: &str| {
        let mut request = lab.request(script);
        request.cgroup_parent = "/cooper-test".to_owned();
        request
    };
    let (stdio, _streams) = pipes();
    let container = lab.executor.start(request("sleep 100"), stdio).await.unwrap();
    assert!(own_cgroups() > 0);
    container.kill();
    container.wait().await.unwrap();
    lab.run(request("exit 1")).await.unwrap();
    assert_eq!(own_cgroups(), 0);
    let mut hostile = request("true");
    hostile.cgroup_parent = "../../x".to_owned();
    assert!(lab.run(hostile).await.is_err());
    for hierarchy in std::fs::read_dir("/sys/fs/cgroup").unwrap().flatten() {
        let _ = std::fs::remove_dir(hierarchy.path().join("cooper-test/buildkit"));
        let _ = std::fs::remove_dir(hierarchy.path().join("cooper-test"));
    }
}

async fn a_long_description_arrives(lab: Arc<Lab>) {
    let mut request = lab.request("echo ${#LONG}; echo $#");
    request.process.env.push(format!("LONG={}", "x".repeat(120_000)));
    request
        .process
        .args
        .extend((0..10_000).map(|number| number.to_string()));
    assert_eq!(lab.ok(request).await, "120000\n9999\n");
}

async fn starting_is_quick(lab: Arc<Lab>) {
    let mut times = Vec::new();
    for _ in 0..50 {
        let mut request = lab.request("");
        request.process = process(&["/bin/true"]);
        let begin = Instant::now();
        let status = lab
            .executor
            .run(request, Stdio::default(), &CancellationToken::new())
            .await
            .unwrap();
        times.push(begin.elapsed());
        assert!(status.success());
    }
    times.sort();
    eprintln!(
        "{}: start to exit of /bin/true: median {:?}, best {:?}",
        lab.name(),
        times[25],
        times[0]
    );
}

async fn a_killed_supervisor_is_replaced(lab: Arc<Lab>) {
    if !lab.embedded {
        return;
    }
    let (stdio, streams) = pipes();
    let reading = read_all(streams);
    let container = lab
        .executor
        .start(lab.request("sleep 1000 & sleep 1000"), stdio)
        .await
        .unwrap();
    let own = rustix::process::getpid().as_raw_nonzero().to_string();
    let children = std::fs::read_dir("/proc").unwrap().flatten().filter(|entry| {
        let stat = std::fs::read_to_string(entry.path().join("stat")).unwrap_or_default();
        let parent = stat.rsplit(") ").next().and_then(|rest| rest.split(' ').nth(1));
        stat.contains("(supervisor)") && parent == Some(own.as_str())
    });
    for child in children {
        let pid: i32 = child.file_name().to_str().unwrap().parse().unwrap();
        let pid = rustix::process::Pid::from_raw(pid).unwrap();
        rustix::process::kill_process(pid, rustix::process::Signal::KILL).unwrap();
    }
    assert!(matches!(
        container.wait().await,
        Err(RunError::SupervisorLost { .. })
    ));
    // Nothing it ran lives on.
    reading.await.unwrap();
    assert_eq!(lab.sh("echo again").await, "again\n");
}

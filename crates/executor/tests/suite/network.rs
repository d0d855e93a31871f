//! Networks of containers. All of this happens in network namespaces made for it: see [`into_a_namespace`].

use std::io::{Read as _, Write as _};
use std::net::{Ipv4Addr, TcpListener};
use std::os::unix::process::CommandExt as _;
use std::path::Path;
use std::process::{Child, Command, Stdio as ChildStdio};
use std::sync::Arc;

use executor::{BridgeConfig, CniConfig, ContainerId, Network, NetworkChoice, Stdio};
use rustix::thread::LinkNameSpaceType;

use crate::Test;
use crate::fixture::{Lab, pipes, read_all, shell};

pub const TESTS: &[Test] = crate::tests![
    containers_of_a_bridge_reach_each_other,
    a_bridge_leads_out_but_not_in,
    a_bridge_leads_out_where_forwarding_is_dropped,
    bridges_are_shared_and_removed_by_the_last,
    what_a_killed_daemon_left_is_removed,
    modes_beside_the_bridge_stay,
    plugins_make_networks_and_undo_them,
];

/// Set in the harness once it is in a network namespace of its own.
const MARK: &str = "COOPER_SUITE_NETWORK";
const OUTSIDE: &str = "198.51.100.2";

/// Executes the harness again in a new network namespace, so that nothing of the machine is touched.
pub fn into_a_namespace() {
    if std::env::var_os(MARK).is_none() {
        let error = Command::new("unshare")
            .arg("--net")
            .arg(std::env::current_exe().unwrap())
            .args(std::env::args().skip(1))
            .env(MARK, "1")
            .exec();
        eprintln!("skipped: tests of networks need a namespace of their own: {error}");
        return;
    }
    ip("link set lo up");
}

/// Why the tests here cannot run.
fn cannot_run() -> bool {
    let missing = ["ip", "nft"].into_iter().find(|program| {
        let asked = Command::new(program)
            .arg("-V")
            .stdout(ChildStdio::null())
            .status();
        asked.is_err()
    });
    let reason = if std::env::var_os(MARK).is_none() {
        Some("no network namespace could be made".to_owned())
    } else {
        missing.map(|program| format!("{program} is not installed"))
    };
    if let Some(reason) = &reason {
        eprintln!("skipped: {reason}");
    }
    reason.is_some()
}

fn ip(arguments: &str) -> String {
    let output = Command::new("ip").args(arguments.split(' ')).output().unwrap();
    assert!(output.status.success(), "ip {arguments}: {output:?}");
    String::from_utf8(output.stdout).unwrap()
}

fn bridge(name: &str, subnet: &str) -> NetworkChoice {
    NetworkChoice::Bridge(BridgeConfig {
        name: name.to_owned(),
        subnet: subnet.to_owned(),
        pool_size: 2,
    })
}

/// Requires that nothing is left of a bridge.
fn assert_gone(bridge: &str) {
    let links = ip("-o link");
    assert!(!links.contains(bridge) && !links.contains(": ck"), "{links}");
    let rules = Command::new("nft").args(["list", "ruleset"]).output().unwrap();
    let rules = String::from_utf8(rules.stdout).unwrap();
    assert!(!rules.contains(bridge), "{rules}");
}

const ADDRESS: &str = "ip -4 -o addr show eth0 | sed 's/.*inet //; s,/.*,,'";

/// Answers on port 8080 once and tells its own address first. The answer comes from a file, as the server ends with its
/// client, which may be before a pipe has something.
fn server() -> String {
    format!("{ADDRESS}; echo hello > /answer; nc -l -p 8080 < /answer")
}

async fn containers_of_a_bridge_reach_each_other(lab: Arc<Lab>) {
    if cannot_run() {
        return;
    }
    let lab = Lab::with_network(&lab.runtime, bridge("cktest0", "10.96.0.0/24"));
    let (stdio, (out, _err)) = pipes();
    let serving = lab.executor.start(lab.request(&server()), stdio).await.unwrap();
    let mut out = tokio::fs::File::from_std(out.into());
    let address = line(&mut out).await;
    assert!(address.starts_with("10.96.0."), "{address}");
    let client = format!(
        "until nc {address} 8080; do usleep 10000; done; ping -c 1 10.96.0.1 >/dev/null && echo pong"
    );
    assert_eq!(lab.sh(&client).await, "hello\npong\n");
    assert!(serving.wait().await.unwrap().success());
    // A further process is in the same network.
    let mut request = lab.request("read line");
    request.id = ContainerId::random();
    let (read, write) = rustix::pipe::pipe_with(rustix::pipe::PipeFlags::CLOEXEC).unwrap();
    let stdio = Stdio {
        stdin: Some(read),
        ..Stdio::default()
    };
    let container = lab.executor.start(request, stdio).await.unwrap();
    let (stdio, streams) = pipes();
    let joined = container.exec(shell(ADDRESS), stdio).await.unwrap();
    let (shown, _) = read_all(streams).await.unwrap();
    assert!(shown.starts_with("10.96.0."), "{shown}");
    joined.wait().await.unwrap();
    drop(write);
    container.wait().await.unwrap();
    drop((container, serving, joined, lab));
    assert_gone("cktest0");
}

async fn line(out: &mut tokio::fs::File) -> String {
    use tokio::io::AsyncReadExt as _;
    let mut text = String::new();
    while !text.ends_with('\n') {
        let byte = out.read_u8().await.unwrap();
        text.push(char::from(byte));
    }
    text.trim().to_owned()
}

/// A namespace that stands for the rest of the world.
struct Outside {
    holder: Child,
}

impl Outside {
    fn new() -> Self {
        let mut holder = Command::new("unshare")
            .args(["--net", "sh", "-c", "echo ready; exec sleep 1000"])
            .stdout(ChildStdio::piped())
            .spawn()
            .unwrap();
        let mut ready = [0; 6];
        holder.stdout.as_mut().unwrap().read_exact(&mut ready).unwrap();
        let outside = Self { holder };
        let pid = outside.holder.id();
        ip("link add out0 type veth peer name out1");
        ip(&format!("link set out1 netns {pid}"));
        ip("addr add 198.51.100.1/24 dev out0");
        ip("link set out0 up");
        outside.within(move || {
            ip("link set lo up");
            ip("link set out1 up");
            ip("addr add 198.51.100.2/24 dev out1");
            ip("route add 10.97.0.0/24 via 198.51.100.1");
        });
        outside
    }

    fn within<T: Send>(&self, work: impl FnOnce() -> T + Send) -> T {
        let namespace = std::fs::File::open(format!("/proc/{}/ns/net", self.holder.id())).unwrap();
        std::thread::scope(|scope| {
            let inside = scope.spawn(|| {
                let kind = Some(LinkNameSpaceType::Network);
                rustix::thread::move_into_link_name_space(std::os::fd::AsFd::as_fd(&namespace), kind)
                    .unwrap();
                work()
            });
            inside.join().unwrap()
        })
    }
}

impl Drop for Outside {
    fn drop(&mut self) {
        ip("link del out0");
        self.holder.kill().unwrap();
        self.holder.wait().unwrap();
    }
}

async fn a_bridge_leads_out_but_not_in(lab: Arc<Lab>) {
    if cannot_run() {
        return;
    }
    let lab = Lab::with_network(&lab.runtime, bridge("cktest1", "10.97.0.0/24"));
    let outside = Outside::new();
    let listener = outside.within(|| TcpListener::bind((OUTSIDE, 8080)).unwrap());
    let answering = std::thread::spawn(move || {
        let (mut connection, peer) = listener.accept().unwrap();
        connection.write_all(b"welcome\n").unwrap();
        peer.ip()
    });
    // Nobody who listens on the host's loopback device is reached.
    let host = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).unwrap();
    let port = host.local_addr().unwrap().port();
    let script = format!("nc -w 1 127.0.0.1 {port} && echo reached; nc {OUTSIDE} 8080 </dev/null");
    assert_eq!(lab.sh(&script).await, "welcome\n");
    let seen = answering.join().unwrap();
    assert_eq!(seen, Ipv4Addr::new(198, 51, 100, 1), "the address was translated");
    let (stdio, (out, _err)) = pipes();
    let serving = lab.executor.start(lab.request(&server()), stdio).await.unwrap();
    let mut out = tokio::fs::File::from_std(out.into());
    let address = line(&mut out).await;
    // It answers from within, but not to the outside.
    let from_outside = outside.within(|| {
        let nc = format!("busybox nc -w 1 {address} 8080 </dev/null");
        Command::new("sh").args(["-c", &nc]).output().unwrap()
    });
    assert!(!from_outside.status.success(), "{from_outside:?}");
    let client = format!("until nc {address} 8080; do usleep 10000; done");
    assert_eq!(lab.sh(&client).await, "hello\n");
    serving.wait().await.unwrap();
    drop((serving, lab));
    assert_gone("cktest1");
}

/// Runs iptables of either kind; `None`: it is not here, or has no table.
fn iptables(program: &str, arguments: &str) -> Option<String> {
    let output = Command::new(program).args(arguments.split(' ')).output().ok()?;
    let text = || String::from_utf8(output.stdout).unwrap();
    output.status.success().then(text)
}

async fn a_bridge_leads_out_where_forwarding_is_dropped(lab: Arc<Lab>) {
    if cannot_run() {
        return;
    }
    for program in ["iptables-nft", "iptables-legacy"] {
        if iptables(program, "-P FORWARD DROP").is_none() {
            eprintln!("skipped: {program} cannot be used");
            continue;
        }
        // Of an administrator, and of a daemon that was killed.
        let kept = "FORWARD -i cktest6 -j ACCEPT";
        let stale = "FORWARD -i cktest6 -m comment --comment cooper-cktest6 -j ACCEPT";
        iptables(program, "-A FORWARD -j REJECT").unwrap();
        iptables(program, &format!("-A {kept}")).unwrap();
        iptables(program, &format!("-I {stale}")).unwrap();
        let outside = Outside::new();
        let listener = outside.within(|| TcpListener::bind((OUTSIDE, 8080)).unwrap());
        let answering = std::thread::spawn(move || {
            for connection in listener.incoming().take(2) {
                connection.unwrap().write_all(b"welcome\n").unwrap();
            }
        });
        let first = Lab::with_network(&lab.runtime, bridge("cktest6", "10.97.0.0/24"));
        let second = Lab::with_network(&lab.runtime, bridge("cktest6", "10.97.0.0/24"));
        let script = format!("nc -w 5 {OUTSIDE} 8080 </dev/null");
        assert_eq!(first.sh(&script).await, "welcome\n", "{program}");
        let shown = iptables(program, "-S FORWARD").unwrap();
        assert_eq!(shown.matches("cooper-cktest6").count(), 2, "{shown}");
        drop(first);
        assert_eq!(second.sh(&script).await, "welcome\n", "{program}");
        answering.join().unwrap();
        drop(second);
        let shown = iptables(program, "-S FORWARD").unwrap();
        assert!(!shown.contains("cooper") && shown.contains(kept), "{shown}");
        iptables(program, "-F FORWARD").unwrap();
        iptables(program, "-P FORWARD ACCEPT").unwrap();
        drop(outside);
        assert_gone("cktest6");
    }
}

async fn bridges_are_shared_and_removed_by_the_last(lab: Arc<Lab>) {
    if cannot_run() {
        return;
    }
    let choice = bridge("cktest2", "10.98.0.0/24");
    let first = Lab::with_network(&lab.runtime, choice.clone());
    let second = Lab::with_network(&lab.runtime, choice);
    assert_eq!(first.sh("echo a").await, "a\n");
    drop(first);
    assert!(ip("-o link").contains("cktest2"));
    assert!(
        second
            .sh("ping -c 1 10.98.0.1")
            .await
            .contains("1 packets received")
    );
    // Somebody cleans up too much; what is made from then on works again.
    ip("link del cktest2");
    for _ in 0..3 {
        second.run(second.request("true")).await.unwrap();
    }
    assert!(
        second
            .sh("ping -c 1 10.98.0.1")
            .await
            .contains("1 packets received")
    );
    drop(second);
    assert_gone("cktest2");
    // One that an administrator made stays, without our rules.
    ip("link add cktest2 type bridge");
    drop(Lab::with_network(&lab.runtime, bridge("cktest2", "10.98.0.0/24")));
    ip("link del cktest2");
    assert_gone("cktest2");
}

async fn what_a_killed_daemon_left_is_removed(lab: Arc<Lab>) {
    if cannot_run() {
        return;
    }
    let choice = bridge("cktest3", "10.99.0.0/30");
    let first = Lab::with_network(&lab.runtime, choice.clone());
    let device = ip("-o link")
        .lines()
        .filter_map(|line| line.split(": ").nth(1))
        .find(|name| name.starts_with("ck") && name.contains('@'))
        .map(|name| name.split('@').next().unwrap_or_default().to_owned())
        .unwrap();
    drop(first);
    // As a container that outlived its daemon would keep it; nobody holds its address any more.
    ip(&format!("link add {device} type veth peer name ckpeer"));
    let second = Lab::with_network(&lab.runtime, choice);
    assert!(!ip("-o link").contains("ckpeer"));
    // The network has one address for containers; it was free.
    assert!(second.sh(ADDRESS).await.starts_with("10.99.0.2"));
    drop(second);
    assert_gone("cktest3");
}

async fn modes_beside_the_bridge_stay(lab: Arc<Lab>) {
    if cannot_run() {
        return;
    }
    let lab = Lab::with_network(&lab.runtime, bridge("cktest4", "10.95.0.0/24"));
    let mut request = lab.request("ip link");
    request.network = Network::Host;
    assert!(lab.ok(request).await.contains("cktest4"));
    let mut request = lab.request("ip -o link | wc -l; ip route");
    request.network = Network::None;
    assert_eq!(lab.ok(request).await.trim(), "1");
    let resolver = lab.sh("cat /etc/resolv.conf; ls /sys/class/net").await;
    assert!(
        !resolver.contains("nameserver 127.") && resolver.contains("eth0"),
        "{resolver}"
    );
    drop(lab);
    assert_gone("cktest4");
}

const PLUGINS: &str = "/usr/lib/cni";

async fn plugins_make_networks_and_undo_them(lab: Arc<Lab>) {
    if cannot_run() {
        return;
    }
    if !Path::new(PLUGINS).join("bridge").exists() {
        eprintln!("skipped: no CNI plugins are in {PLUGINS} (Debian's containernetworking-plugins)");
        return;
    }
    let directory = tempfile::tempdir().unwrap();
    let leases = directory.path().join("leases");
    let config = format!(
        r#"{{"cniVersion":"0.4.0","name":"cktest","plugins":[{{"type":"bridge","bridge":"cktest5","isDefaultGateway":true,
            "ipam":{{"type":"host-local","dataDir":{leases:?},"ranges":[[{{"subnet":"10.94.0.0/29"}}]]}}}}]}}"#
    );
    let config_path = directory.path().join("n.conflist");
    std::fs::write(&config_path, config).unwrap();
    let choice = NetworkChoice::Cni(CniConfig {
        config_path,
        binary_dir: PLUGINS.into(),
        pool_size: 1,
    });
    let lab = Lab::with_network(&lab.runtime, choice);
    // More than there are addresses, one after the other: each is given back.
    for _ in 0..8 {
        let output = lab.sh(&format!("{ADDRESS}; ping -c 1 10.94.0.1")).await;
        assert!(
            output.starts_with("10.94.0.") && output.contains("1 packets received"),
            "{output}"
        );
    }
    let mut request = lab.request("cat /etc/hostname; hostname");
    request.hostname = "named".to_owned();
    assert!(lab.ok(request).await.contains("named"));
    let journal = lab.path().join("state/cni");
    assert!(std::fs::read_dir(&journal).unwrap().count() > 0);
    drop(lab);
    let links = ip("-o link");
    assert!(!links.contains("veth"), "{links}");
    let left: Vec<String> = std::fs::read_dir(leases.join("cktest"))
        .unwrap()
        .map(|entry| entry.unwrap().file_name().into_string().unwrap())
        .filter(|name| name.starts_with("10."))
        .collect();
    assert!(left.is_empty(), "{left:?}");
    ip("link del cktest5");
}

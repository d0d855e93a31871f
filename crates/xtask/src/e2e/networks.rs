//! The networks of steps. Each scenario happens in a network namespace of its own, so the machine's devices, rules and
//! settings are not touched.

use std::fs;
use std::io::Write as _;
use std::net::{TcpListener, UdpSocket};
use std::path::PathBuf;
use std::process::{Command, Stdio};

use anyhow::{Context, Result, ensure};

use super::fixture::{Daemon, Lab, eventually, expect, expect_not, fail, succeed};
use super::{Need, Scenario};

/// This file's scenarios.
pub const SCENARIOS: &[Scenario] = &[
    Scenario {
        name: "network-bridge",
        needs: &[
            Need::Root,
            Need::Program("ip"),
            Need::Program("nft"),
            Need::Program("unshare"),
        ],
        run: bridge,
    },
    Scenario {
        name: "network-cni",
        needs: &[
            Need::Root,
            Need::Program("ip"),
            Need::Program("iptables"),
            Need::Program("unshare"),
        ],
        run: cni,
    },
    Scenario {
        name: "network-proxy",
        needs: &[
            Need::Root,
            Need::Program("ip"),
            Need::Program("nft"),
            Need::Program("unshare"),
        ],
        run: proxy,
    },
];

/// Set for the process that is in a namespace of its own.
const INSIDE: &str = "COOPER_E2E_NETWORK";
const PLUGINS: &str = "/usr/lib/cni";

/// Runs a scenario by this program, executed again in a new network namespace.
fn isolated(name: &str, lab: &Lab, run: fn(&Lab) -> Result<()>) -> Result<()> {
    if std::env::var_os(INSIDE).is_some() {
        ip("link set lo up")?;
        return run(lab);
    }
    let mut command = Command::new("unshare");
    command
        .arg("--net")
        .arg(std::env::current_exe()?)
        .args(["e2e", name])
        .env(INSIDE, "1")
        .stdin(Stdio::null());
    let output = succeed(&mut command)?;
    expect(&output, "1 passed, 0 failed, 0 skipped")
}

fn ip(arguments: &str) -> Result<String> {
    succeed(Command::new("ip").args(arguments.split(' ')))
}

/// The network devices that containers are connected by.
fn devices(master: &str) -> Vec<String> {
    let shown = ip(&format!("-o link show master {master}")).unwrap_or_default();
    let name = |line: &str| Some(line.split(": ").nth(1)?.split('@').next()?.to_owned());
    shown.lines().filter_map(name).collect()
}

fn write_config(lab: &Lab, text: &str) -> Result<String> {
    let path = lab.dir().join("cooperd.toml");
    fs::write(&path, text)?;
    Ok(format!("--config={}", path.display()))
}

/// Two steps that run at once: one serves, the other finds its address in a cache they share.
const PAIR: &str = r#"FROM @BASE@ AS server
RUN --mount=type=cache,id=address,target=/shared \
    ip -4 -o addr show eth0 | sed 's/.*inet //; s,/.*,,' > /shared/new && mv /shared/new /shared/address && \
    echo hello from the server > /answer && nc -l -p 8080 < /answer && touch /served
FROM @BASE@ AS client
RUN --mount=type=cache,id=address,target=/shared \
    until [ -e /shared/address ] && nc $(cat /shared/address) 8080 > /heard; do usleep 10000; done && cat /heard && \
    ping -c 1 $(ip route | sed -n 's/default via //; s/ .*//; 1p') && touch /gateway
FROM scratch
COPY --from=server /served /
COPY --from=client /heard /gateway /
"#;

fn pair(lab: &Lab, daemon: &Daemon<'_>) -> Result<()> {
    let context = lab.context("pair", &[("Dockerfile", PAIR)])?;
    let out = lab.dir().join("pair-out");
    let mut build = daemon.buildctl_build(&context);
    succeed(build.arg(format!("--output=type=local,dest={}", out.display())))?;
    let heard = fs::read_to_string(out.join("heard"))?;
    ensure!(heard == "hello from the server\n", "{heard:?}");
    ensure!(out.join("gateway").exists(), "the gateway did not answer");
    Ok(())
}

/// Runs one step that must succeed; every call is another step.
fn step(lab: &Lab, daemon: &Daemon<'_>, script: &str) -> Result<String> {
    let dockerfile = format!("FROM @BASE@\nRUN {script}\n");
    let context = lab.context("step", &[("Dockerfile", &dockerfile)])?;
    succeed(daemon.buildctl_build(&context).arg("--no-cache"))
}

/// Kills the daemon while a step runs, and starts it again.
fn kill_amid_a_step(lab: &Lab, daemon: &mut Daemon<'_>) -> Result<()> {
    let context = lab.context(
        "long",
        &[("Dockerfile", "FROM @BASE@\nRUN echo begun && sleep 1000\n")],
    )?;
    let mut build = daemon
        .buildctl_build(&context)
        .stdout(Stdio::null())
        .stderr(Stdio::null())
        .spawn()?;
    let pid = daemon.pid();
    eventually("the step", || {
        let children = Command::new("pgrep").args(["-f", "^sleep 1000"]).output();
        children.is_ok_and(|output| output.status.success()) && PathBuf::from(format!("/proc/{pid}")).exists()
    })?;
    daemon.kill()?;
    build.wait()?;
    daemon.start_again()
}

/// Answers every question for an address with that of the bridge.
fn serve_names(socket: &UdpSocket, address: [u8; 4]) {
    let mut buffer = [0; 512];
    while let Ok((len, peer)) = socket.recv_from(&mut buffer) {
        let Some(question) = buffer
            .get(..len)
            .filter(|question| len > 16 && question[2] & 0x80 == 0)
        else {
            continue;
        };
        let name_end = 12 + question[12..].iter().position(|&byte| byte == 0).unwrap_or(0);
        let Some(asked) = question.get(12..name_end + 5) else {
            continue;
        };
        let is_address = question.get(name_end + 1..name_end + 3) == Some(&[0, 1]);
        let mut answer = question[..2].to_vec();
        answer.extend([0x81, 0x80, 0, 1, 0, u8::from(is_address), 0, 0, 0, 0]);
        answer.extend(asked);
        if is_address {
            answer.extend([0xc0, 12, 0, 1, 0, 1, 0, 0, 0, 60, 0, 4]);
            answer.extend(address);
        }
        if socket.send_to(&answer, peer).is_err() {
            return;
        }
    }
}

/// Starts a name server and a web server on all addresses of the namespace; they end with the process.
fn serve() -> Result<()> {
    let names = UdpSocket::bind("0.0.0.0:53").context("serving names")?;
    std::thread::spawn(move || serve_names(&names, [10, 90, 0, 1]));
    let web = TcpListener::bind("0.0.0.0:8000").context("serving files")?;
    std::thread::spawn(move || {
        for mut connection in web.incoming().flatten() {
            let mut request = [0; 1024];
            let _ = std::io::Read::read(&mut connection, &mut request);
            let _ = connection
                .write_all(b"HTTP/1.0 200 OK\r\nContent-Length: 8\r\nConnection: close\r\n\r\nby name\n");
        }
    });
    Ok(())
}

fn bridge(lab: &Lab) -> Result<()> {
    isolated("network-bridge", lab, bridge_inside)
}

fn bridge_inside(lab: &Lab) -> Result<()> {
    serve()?;
    // Thirteen addresses for containers.
    let config = write_config(
        lab,
        "[worker.oci]\nnetworkMode = \"bridge\"\nbridgeName = \"cke2e0\"\nbridgeSubnet = \"10.90.0.0/28\"\n\
         cniPoolSize = 2\n[dns]\nnameservers = [\"10.90.0.1\"]\n",
    )?;
    let mut daemon = lab.daemon_with(&[&config])?;
    expect(
        &succeed(&mut daemon.buildctl(&["debug", "workers", "-v"]))?,
        "worker.network:\t\tcni",
    )?;
    pair(lab, &daemon)?;
    expect(
        &step(
            lab,
            &daemon,
            "wget -q -O - http://some.test:8000/ && cat /etc/resolv.conf /etc/hosts",
        )?,
        "by name",
    )?;
    // The registry listens on the host's loopback device.
    let registry = lab.registry().replace(':', " ");
    step(lab, &daemon, &format!("! nc -w 1 {registry} </dev/null"))?;
    step(
        lab,
        &daemon,
        "[ $(ip -o link | wc -l) = 2 ] && ip route | grep -q '^default via 10.90.0.1'",
    )?;
    kill_amid_a_step(lab, &mut daemon)?;
    let left = || devices("cke2e0").len() <= 2;
    eventually("the killed daemon's devices are gone", left)?;
    // More steps than there are addresses.
    let dockerfile = format!("FROM @BASE@\n{}", "RUN ping -c 1 10.90.0.1\n".repeat(16));
    let context = lab.context("many", &[("Dockerfile", &dockerfile)])?;
    succeed(&mut daemon.buildctl_build(&context))?;
    eventually("what was used is given back", left)?;
    daemon.stop()?;
    nothing_is_left("cke2e0")?;
    other_filters_are_named(lab, &config)?;
    without_nftables(lab, &config)
}

/// A filter that the bridge's packets may not pass is told, once iptables' own is known to let them pass.
fn other_filters_are_named(lab: &Lab, config: &str) -> Result<()> {
    let nft = |arguments: &str| succeed(Command::new("nft").args(arguments.split(' ')));
    nft("add table inet others")?;
    nft("add chain inet others forward { type filter hook forward priority 0 ; policy drop ; }")?;
    let has_iptables = Command::new("iptables")
        .args(["-P", "FORWARD", "DROP"])
        .output()
        .is_ok_and(|output| output.status.success());
    let mut daemon = lab.daemon_with(&[config])?;
    let log = daemon.log();
    daemon.stop()?;
    expect(&log, "these chains refuse forwarded packets")?;
    expect(&log, "inet others forward")?;
    if has_iptables {
        expect_not(&log, "FORWARD")?;
    }
    nft("delete table inet others")?;
    nothing_is_left("cke2e0")
}

fn nothing_is_left(bridge: &str) -> Result<()> {
    let links = ip("-o link")?;
    ensure!(!links.contains(bridge) && !links.contains(": ck"), "{links}");
    let rules = succeed(Command::new("nft").args(["list", "ruleset"]))?;
    ensure!(!rules.contains(bridge), "{rules}");
    Ok(())
}

/// A daemon that cannot have its bridge does not start, says why, and leaves nothing.
fn without_nftables(lab: &Lab, config: &str) -> Result<()> {
    let mut command = lab.command("cooperd");
    command
        .arg(config)
        .arg("--root")
        .arg(lab.dir().join("daemon"))
        .arg(format!("--addr=unix://{}", lab.dir().join("n.sock").display()))
        .env("PATH", "/nonexistent");
    let (_, output) = fail(&mut command)?;
    expect(&output, "nft: not found in $PATH")?;
    nothing_is_left("cke2e0")
}

fn cni(lab: &Lab) -> Result<()> {
    if !PathBuf::from(PLUGINS).join("bridge").exists() {
        println!("skipped network-cni: no CNI plugins are in {PLUGINS}");
        return Ok(());
    }
    isolated("network-cni", lab, cni_inside)
}

fn cni_inside(lab: &Lab) -> Result<()> {
    let leases = lab.dir().join("leases");
    let list = format!(
        r#"{{"cniVersion":"1.0.0","name":"cke2e","plugins":[
            {{"type":"bridge","bridge":"cke2e1","isDefaultGateway":true,"ipMasq":true,
              "ipam":{{"type":"host-local","dataDir":{leases:?},"ranges":[[{{"subnet":"10.91.0.0/28"}}]]}}}},
            {{"type":"firewall","ingressPolicy":"same-bridge"}}]}}"#
    );
    let file = lab.dir().join("cni.conflist");
    fs::write(&file, list)?;
    let flags = [
        "--oci-worker-net=cni".to_owned(),
        format!("--oci-cni-config-path={}", file.display()),
        format!("--oci-cni-binary-dir={PLUGINS}"),
        "--oci-cni-pool-size=2".to_owned(),
    ];
    let flags: Vec<&str> = flags.iter().map(String::as_str).collect();
    let mut daemon = lab.daemon_with(&flags)?;
    pair(lab, &daemon)?;
    kill_amid_a_step(lab, &mut daemon)?;
    let dockerfile = format!("FROM @BASE@\n{}", "RUN ping -c 1 10.91.0.1\n".repeat(16));
    let context = lab.context("many", &[("Dockerfile", &dockerfile)])?;
    succeed(&mut daemon.buildctl_build(&context))?;
    daemon.stop()?;
    let devices = devices("cke2e1");
    ensure!(devices.is_empty(), "{devices:?}");
    let leased: Vec<String> = fs::read_dir(leases.join("cke2e"))?
        .filter_map(|entry| entry.ok()?.file_name().into_string().ok())
        .filter(|name| name.starts_with("10."))
        .collect();
    ensure!(leased.is_empty(), "{leased:?}");
    let rules = succeed(Command::new("iptables").args(["-t", "nat", "-S"]))?;
    ensure!(!rules.contains("10.91.0."), "{rules}");
    Ok(())
}

fn proxy(lab: &Lab) -> Result<()> {
    isolated("network-proxy", lab, proxy_inside)
}

/// `NO_PROXY` is emptied where a server of the daemon's loopback device is meant, not one of the step's own.
const PROXIED: &str = r#"FROM @BASE@
RUN --network=none mkdir -p /etc/ssl/certs && echo base > /etc/ssl/certs/ca-certificates.crt
RUN env NO_PROXY= no_proxy= wget -q -O /fetched http://127.0.0.1:8000/x && grep -q 'by name' /fetched
RUN unset HTTP_PROXY http_proxy; ! wget -q -T 2 -O - http://127.0.0.1:8000/direct
RUN [ "$(ls /sys/class/net)" = lo ] && ! ping -c 1 -w 1 10.90.0.1
RUN grep -q 'buildkit proxy CA begin' /etc/ssl/certs/ca-certificates.crt && grep -q 'BEGIN CERTIFICATE' /etc/ssl/certs/ca-certificates.crt
RUN --network=none [ "$(cat /etc/ssl/certs/ca-certificates.crt)" = base ] && [ -z "$HTTP_PROXY" ]
"#;

fn proxied(lab: &Lab, daemon: &Daemon<'_>, dockerfile: &str) -> Result<Command> {
    let context = lab.context("proxied", &[("Dockerfile", dockerfile)])?;
    let mut build = daemon.buildctl_build(&context);
    build.args(["--proxy-network", "--no-cache"]);
    Ok(build)
}

fn proxy_inside(lab: &Lab) -> Result<()> {
    serve()?;
    let mut daemon = lab.daemon()?;
    let out = lab.dir().join("out");
    let mut build = proxied(lab, &daemon, PROXIED)?;
    build
        .args(["--opt=attest:provenance=mode=max,version=v1"])
        .arg(format!("--output=type=local,dest={}", out.display()));
    let shown = succeed(&mut build)?;
    expect(&shown, "proxy network requests:")?;
    expect(&shown, "- GET http://127.0.0.1:8000/x -> 200")?;
    expect_not(&shown, "/direct ->")?;
    let provenance = fs::read_to_string(out.join("provenance.json"))?;
    expect(&provenance, "\"uri\": \"http://127.0.0.1:8000/x\"")?;
    expect(&provenance, "\"mode\": \"proxy\"")?;
    policies_decide(lab, &daemon)?;
    daemon.stop()?;
    drop(daemon);
    // Behind a bridge the proxy reaches what the bridge reaches, and not the daemon's loopback device.
    let config = write_config(
        lab,
        "proxyNetwork = true\n[worker.oci]\nnetworkMode = \"bridge\"\nbridgeName = \"cke2e2\"\n\
         bridgeSubnet = \"10.90.0.0/28\"\n",
    )?;
    let mut daemon = lab.daemon_with(&[&config])?;
    let shown = step(
        lab,
        &daemon,
        "! env NO_PROXY= no_proxy= wget -q -O - http://127.0.0.1:8000/loopback && wget -q -O - http://10.90.0.1:8000/gateway",
    )?;
    expect(&shown, "- GET http://127.0.0.1:8000/loopback -> 502")?;
    expect(&shown, "- GET http://10.90.0.1:8000/gateway -> 200")?;
    daemon.stop()?;
    nothing_is_left("cke2e2")
}

fn policies_decide(lab: &Lab, daemon: &Daemon<'_>) -> Result<()> {
    let policy = lab.dir().join("policy.json");
    fs::write(
        &policy,
        r#"{"rules":[{"action":"DENY","selector":{"identifier":"http://127.0.0.1:8000/denied"}},
            {"action":"CONVERT","selector":{"identifier":"http://127.0.0.1:8000/old"},
             "updates":{"identifier":"http://127.0.0.1:8000/new"}}]}"#,
    )?;
    let policy = format!("--source-policy-file={}", policy.display());
    let run = |path: &str| {
        format!("FROM @BASE@\nRUN env NO_PROXY= no_proxy= wget -S -O - http://127.0.0.1:8000/{path}\n")
    };
    let (_, shown) = fail(proxied(lab, daemon, &run("denied"))?.arg(&policy))?;
    expect(&shown, "403 Forbidden")?;
    let shown = succeed(proxied(lab, daemon, &run("old"))?.arg(&policy))?;
    expect(&shown, "- GET http://127.0.0.1:8000/new -> 200")
}

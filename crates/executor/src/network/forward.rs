//! Other people's packet filters: what they do to packets that are forwarded for a bridge.
//!
//! A packet passes only if every filter lets it, so accepting it in a table of our own is no help where another one refuses
//! it. Docker, for one, makes iptables drop what nobody accepted. As Docker and the plugins of CNI do, we accept there what
//! is ours. Filters that are not iptables', such as firewalld's, are left alone: they are made anew by their owners, who may
//! even keep others out. That they refuse packets is said, with what to do.

mod listing;

use std::process::Command;
use std::time::Duration;

use self::listing::{BaseChain, Rules, base_chains};
use super::program;

const LIMIT: Duration = Duration::from_secs(20);
/// Tables of the older iptables that are in use in the thread's network namespace, one a line.
const LEGACY_TABLES: &str = "/proc/thread-self/net/ip_tables_names";
/// The chain of the newer iptables, as nftables calls it.
const CHAIN: &str = "ip filter FORWARD";
/// The name of firewalld's table.
const FIREWALLD: &str = "firewalld";

/// Lets packets from a bridge, and the answers to them, pass the filters of iptables, and warns of filters that they may
/// not pass. Failures are no more than that: containers can do without connections to the outside. Blocking.
pub(super) fn accept(bridge: &str) {
    let mut failures = Vec::new();
    for program in programs() {
        let added = rules(bridge).iter().try_for_each(|rule| add(program, rule));
        if let Err(message) = added {
            failures.push(format!("{program}: {message}"));
        }
    }
    let (chains, failures) = (blocking(bridge), failures.join("; "));
    if chains.is_empty() {
        // Where nothing is refused, nothing has to be accepted.
        tracing::debug!(
            bridge,
            failures,
            "the bridge network is not hindered by other packet filters"
        );
        return;
    }
    tracing::warn!(
        bridge,
        chains = chains.join(", "),
        failures,
        "steps may have no connections to the outside: these chains refuse forwarded packets that none of their rules accepts; {}",
        advice(bridge, &chains)
    );
}

/// What an administrator can do about chains that refuse a bridge's packets.
fn advice(bridge: &str, chains: &[String]) -> String {
    let mut text = "let them accept all packets with the bridge as input interface, and those of established connections with the \
                    bridge as output interface"
        .to_owned();
    if chains
        .iter()
        .any(|chain| chain.split(' ').nth(1) == Some(FIREWALLD))
    {
        let command = format!("firewall-cmd --permanent --zone=trusted --add-interface={bridge}");
        text.push_str(&format!(
            "; for firewalld, put the bridge into a zone that accepts packets: `{command}`, then `firewall-cmd --reload`"
        ));
    }
    text
}

/// Takes back what [`accept`] did. Blocking.
pub(super) fn forget(bridge: &str) {
    for program in programs() {
        for rule in rules(bridge) {
            // A rule that is not there is as good as removed.
            if has(program, &rule)
                && let Err(message) = iptables(program, "--delete", &rule)
            {
                tracing::warn!(
                    bridge,
                    program,
                    message,
                    "cannot remove a rule of the bridge network"
                );
            }
        }
    }
}

/// The programs that filters of iptables are changed with: the host's choice, and whichever else has something to say.
/// They may be the same, so rules are looked for before they are added.
fn programs() -> Vec<&'static str> {
    let mut programs = vec!["iptables"];
    if is_legacy_in_use() {
        programs.push("iptables-legacy");
    }
    if nft(&["list", "chain", "ip", "filter", "FORWARD"]).is_some() {
        programs.push("iptables-nft");
    }
    programs
}

fn is_legacy_in_use() -> bool {
    std::fs::read_to_string(LEGACY_TABLES).is_ok_and(|names| names.lines().any(|name| name == "filter"))
}

/// A rule for what comes from a bridge and one for the answers, without the action; marked, so that an administrator's
/// are never taken for them.
fn rules(bridge: &str) -> [Vec<String>; 2] {
    let rule = |condition: &str| {
        let words = format!("FORWARD {condition} -m comment --comment cooper-{bridge} -j ACCEPT");
        words.split(' ').map(str::to_owned).collect()
    };
    [
        rule(&format!("-i {bridge}")),
        rule(&format!("-o {bridge} -m conntrack --ctstate RELATED,ESTABLISHED")),
    ]
}

/// Adds a rule before all others unless it is there, as what is last in the chain may refuse everything.
fn add(program: &str, rule: &[String]) -> Result<(), String> {
    if has(program, rule) {
        return Ok(());
    }
    iptables(program, "--insert", rule)
}

fn has(program: &str, rule: &[String]) -> bool {
    iptables(program, "--check", rule).is_ok()
}

fn iptables(program: &str, action: &str, rule: &[String]) -> Result<(), String> {
    let mut command = Command::new(program);
    // Others may hold its lock for a moment.
    command.args(["--wait", "10", action]).args(rule);
    match program::run(&mut command, b"", LIMIT) {
        Ok(output) if output.status.success() => Ok(()),
        Ok(output) => Err(output.stderr),
        Err(error) => Err(error.to_string()),
    }
}

fn nft(arguments: &[&str]) -> Option<String> {
    let output = program::run(Command::new("nft").args(arguments), b"", LIMIT).ok()?;
    let text = || String::from_utf8_lossy(&output.stdout).into_owned();
    output.status.success().then(text)
}

/// The chains that refuse a bridge's packets, as far as can be told.
fn blocking(bridge: &str) -> Vec<String> {
    let listed = nft(&["list", "chains"]).unwrap_or_default();
    let mut chains = Vec::new();
    for chain in base_chains(&listed) {
        let shown = format!("{} {}", chain.table, chain.name);
        // What iptables' own chain accepts, a program of the same kind tells.
        let is_passed = || shown == CHAIN && is_accepted(bridge, true);
        if refuses(bridge, chain, shown == CHAIN) && !is_passed() {
            chains.push(shown);
        }
    }
    if is_legacy_in_use() && !is_accepted(bridge, false) {
        chains.push("FORWARD of iptables-legacy".to_owned());
    }
    chains
}

/// Whether a chain refuses what none of its rules accepts. Unless it is iptables', whose rules are another program's to
/// tell, a table that names the bridge is taken to know what it does with its packets.
fn refuses(bridge: &str, chain: BaseChain<'_>, is_iptables: bool) -> bool {
    let Some((family, table)) = chain.table.split_once(' ') else {
        return false;
    };
    let Some(shown) = nft(&["list", "table", family, table]) else {
        return chain.drops;
    };
    if !is_iptables && shown.contains(&format!("\"{bridge}\"")) {
        return false;
    }
    chain.drops || Rules::read(&shown).refuse(chain.name)
}

/// Whether the newer iptables, or the older one, has a bridge's rules.
fn is_accepted(bridge: &str, is_newer: bool) -> bool {
    ["iptables", "iptables-nft", "iptables-legacy"]
        .iter()
        .any(|program| {
            let version = program::run(Command::new(program).arg("--version"), b"", LIMIT);
            version.is_ok_and(|version| {
                version.status.success()
                    && String::from_utf8_lossy(&version.stdout).contains("(nf_tables)") == is_newer
                    && rules(bridge).iter().all(|rule| has(program, rule))
            })
        })
}

#[cfg(test)]
mod tests {
    use super::*;

    /// As firewalld 1.2 makes them, in short.
    const OF_FIREWALLD: &str = "table inet firewalld {
        chain policies { jump zones; }
        chain zones { iifname \"eth0\" goto public; goto public; }
        chain public { oifname \"eth0\" accept; }
        chain filter_FORWARD {
            type filter hook forward priority filter + 10; policy accept;
            ct state { established, related } accept
            iifname \"lo\" accept
            ct state invalid drop
            jump policies
            log prefix \"FINAL_REJECT: \"
            reject with icmpx type admin-prohibited
        }
    }";
    /// One that passes what it does not know, and one that has no rules but drops.
    const OF_OTHERS: &str = "table inet polite {
        chain forward { type filter hook forward priority 0; policy accept; iifname \"eth0\" drop; }
    }
    table ip strict {
        chain forward { type filter hook forward priority 0; policy drop; }
    }
    table ip6 other {
        chain forward { type filter hook forward priority 0; policy accept; drop; }
    }";

    /// Does something in a new network namespace; `None`: there cannot be one.
    fn in_namespace<T: Send>(work: impl FnOnce() -> T + Send) -> Option<T> {
        use std::io::Read as _;
        use std::process::Stdio;
        // It holds the namespace until its input ends.
        let mut holder = Command::new("unshare")
            .args(["--net", "sh", "-c", "echo ready; read line"])
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(Stdio::null())
            .spawn()
            .ok()?;
        let ready = holder.stdout.as_mut()?.read_exact(&mut [0; 6]);
        let namespace = std::fs::File::open(format!("/proc/{}/ns/net", holder.id()));
        let done = ready.ok().map(|()| {
            std::thread::scope(|scope| {
                let inside = scope.spawn(|| {
                    let kind = Some(rustix::thread::LinkNameSpaceType::Network);
                    let namespace = namespace.unwrap();
                    rustix::thread::move_into_link_name_space(std::os::fd::AsFd::as_fd(&namespace), kind)
                        .unwrap();
                    work()
                });
                inside.join().unwrap()
            })
        });
        drop(holder.stdin.take());
        holder.wait().unwrap();
        done
    }

    #[test]
    fn chains_that_refuse_are_told_of() {
        if nft(&["--version"]).is_none() {
            return eprintln!("skipped: nft is not installed");
        }
        let told = in_namespace(|| {
            let set = |script: &str| {
                let output = program::run(Command::new("nft").args(["-f", "-"]), script.as_bytes(), LIMIT);
                let output = output.unwrap();
                assert!(output.status.success(), "{}", output.stderr);
                blocking("b-0")
            };
            let nothing = set("");
            let firewalld = set(OF_FIREWALLD);
            let others = set(OF_OTHERS);
            // The administrator does something about it; a bridge of a similar name is another.
            set("insert rule inet firewalld zones iifname \"b-01\" accept\n");
            let still = set("insert rule ip strict forward iifname \"b-0\" accept\n");
            let none = set("insert rule inet firewalld zones iifname \"b-0\" accept\n");
            (nothing, firewalld, others, still, none)
        });
        let Some((nothing, firewalld, others, still, none)) = told else {
            return eprintln!("skipped: no network namespace could be made");
        };
        let chain = "inet firewalld filter_FORWARD";
        assert_eq!((nothing, firewalld), (vec![], vec![chain.to_owned()]));
        assert_eq!(others, [chain, "ip strict forward"]);
        assert_eq!((still, none), (vec![chain.to_owned()], vec![]));
    }

    #[test]
    fn firewalld_is_told_by_its_own_program() {
        let of = |chain: &str| advice("b0", &[chain.to_owned()]);
        let command = "firewall-cmd --permanent --zone=trusted --add-interface=b0";
        assert!(of("inet firewalld filter_FORWARD").contains(command));
        assert!(!of("inet mine firewalld").contains("firewall-cmd"));
    }

    #[test]
    fn rules_are_marked_with_the_bridge() {
        for rule in rules("b0") {
            assert!(
                rule.windows(2).any(|pair| pair == ["--comment", "cooper-b0"]),
                "{rule:?}"
            );
        }
    }
}

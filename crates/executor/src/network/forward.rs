//! Other people's packet filters: what they do to packets that are forwarded for a bridge.
//!
//! A packet passes only if every filter lets it, so accepting it in a table of our own is no help where another one drops
//! it. Docker, for one, makes iptables drop what nobody accepted. As Docker and the plugins of CNI do, we accept there what
//! is ours. Filters that are not iptables' are left alone; that they drop packets is said, with what to do.

use std::process::Command;
use std::time::Duration;

use super::program;

const LIMIT: Duration = Duration::from_secs(20);
/// Tables of the older iptables that are in use in the thread's network namespace, one a line.
const LEGACY_TABLES: &str = "/proc/thread-self/net/ip_tables_names";
/// The chain of the newer iptables, as nftables calls it.
const CHAIN: &str = "ip filter FORWARD";

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
        // Where nothing is dropped, nothing has to be accepted.
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
        "steps may have no connections to the outside: these chains drop forwarded packets; let them accept all packets with the \
         bridge as input interface, and those of established connections with the bridge as output interface"
    );
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

/// The chains that drop a bridge's packets, as far as can be told.
fn blocking(bridge: &str) -> Vec<String> {
    let mut chains = dropping(&nft(&["list", "chains"]).unwrap_or_default());
    // What iptables' own chain accepts, a program of the same kind tells.
    if chains.iter().any(|chain| chain == CHAIN) && is_accepted(bridge, true) {
        chains.retain(|chain| chain != CHAIN);
    }
    if is_legacy_in_use() && !is_accepted(bridge, false) {
        chains.push("FORWARD of iptables-legacy".to_owned());
    }
    chains
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

/// Finds the chains for forwarded IPv4 packets whose policy is to drop them, in what `nft list chains` shows.
fn dropping(shown: &str) -> Vec<String> {
    let (mut table, mut chain) = ("", "");
    let mut found = Vec::new();
    for line in shown.lines().map(str::trim) {
        if let Some(name) = line.strip_prefix("table ") {
            table = name.trim_end_matches(" {");
        } else if let Some(name) = line.strip_prefix("chain ") {
            chain = name.trim_end_matches(" {");
        } else if line.contains(" hook forward ")
            && line.contains("policy drop;")
            && (table.starts_with("ip ") || table.starts_with("inet "))
        {
            found.push(format!("{table} {chain}"));
        }
    }
    found
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn chains_that_drop_are_found_in_a_listing() {
        let shown = "table ip filter {\n\tchain FORWARD {\n\t\ttype filter hook forward priority filter; policy drop;\n\t}\n\
            \tchain DOCKER {\n\t}\n\tchain INPUT {\n\t\ttype filter hook input priority filter; policy drop;\n\t}\n}\n\
            table inet mine {\n\tchain a {\n\t\ttype filter hook forward priority filter; policy accept;\n\t}\n\
            \tchain b {\n\t\ttype filter hook forward priority 5; policy drop;\n\t}\n}\n\
            table ip6 filter {\n\tchain FORWARD {\n\t\ttype filter hook forward priority filter; policy drop;\n\t}\n}\n\
            table bridge filter {\n\tchain FORWARD {\n\t\ttype filter hook forward priority filter; policy drop;\n\t}\n}\n";
        assert_eq!(dropping(shown), ["ip filter FORWARD", "inet mine b"]);
        assert_eq!(dropping(""), [""; 0]);
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

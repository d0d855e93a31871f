//! The `/etc/resolv.conf` of containers, made of the host's.

use std::net::IpAddr;

use crate::executor::DnsConfig;

/// What is used when the host knows no name server that a container can reach.
const FALLBACK: &[&str] = &[
    "8.8.8.8",
    "8.8.4.4",
    "2001:4860:4860::8888",
    "2001:4860:4860::8844",
];

/// What a `resolv.conf` says.
#[derive(Debug, Default)]
struct ResolvConf {
    nameservers: Vec<String>,
    search: Vec<String>,
    options: Vec<String>,
    other: Vec<String>,
}

/// Splits off an IPv6 zone, which `IpAddr` does not take.
fn address(text: &str) -> Option<IpAddr> {
    text.split_once('%')
        .map_or(text, |(address, _)| address)
        .parse()
        .ok()
}

fn parse(text: &str) -> ResolvConf {
    let mut parsed = ResolvConf::default();
    for line in text.lines() {
        if line.starts_with(['#', ';']) {
            continue;
        }
        let mut fields = line.split_whitespace();
        let Some(keyword) = fields.next() else { continue };
        let values: Vec<String> = fields.map(str::to_owned).collect();
        match (keyword, values.first()) {
            ("nameserver", Some(server)) if address(server).is_some() => {
                parsed.nameservers.push(server.clone())
            }
            ("nameserver" | "domain" | "search" | "options", None) | ("nameserver", Some(_)) => {}
            // The last one counts.
            ("domain" | "search", Some(_)) => parsed.search = values,
            ("options", Some(_)) => parsed.options.extend(values),
            _ => parsed.other.push(line.to_owned()),
        }
    }
    parsed
}

/// Whether the only name server is systemd-resolved's, which a container of its own network cannot reach; its real
/// servers are in another file then.
pub(crate) fn is_resolved_stub(host: &str) -> bool {
    parse(host).nameservers == ["127.0.0.53"]
}

fn is_loopback(server: &str) -> bool {
    address(server).is_some_and(|address| address.is_loopback())
}

/// Makes a container's file. `host_network` keeps name servers on loopback addresses.
pub(crate) fn resolv_conf(host: &str, dns: &DnsConfig, host_network: bool) -> String {
    let mut conf = parse(host);
    if !dns.nameservers.is_empty() {
        conf.nameservers.clone_from(&dns.nameservers);
    }
    if !dns.search_domains.is_empty() {
        // A lone "." means none.
        conf.search = if dns.search_domains == ["."] {
            Vec::new()
        } else {
            dns.search_domains.clone()
        };
    }
    if !dns.options.is_empty() {
        conf.options.clone_from(&dns.options);
    }
    if dns.nameservers.is_empty() && (!host_network || conf.nameservers.is_empty()) {
        conf.nameservers.retain(|server| !is_loopback(server));
        if conf.nameservers.is_empty() {
            conf.nameservers = FALLBACK.iter().map(|&server| server.to_owned()).collect();
        }
    }
    let mut lines: Vec<String> = conf
        .nameservers
        .iter()
        .map(|server| format!("nameserver {server}"))
        .collect();
    if !conf.search.is_empty() {
        lines.push(format!("search {}", conf.search.join(" ")));
    }
    if !conf.options.is_empty() {
        lines.push(format!("options {}", conf.options.join(" ")));
    }
    lines.extend(conf.other);
    lines.iter().map(|line| format!("{line}\n")).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn loopback_servers_are_left_out_unless_the_network_is_the_hosts() {
        let host = "# comment\nnameserver 127.0.0.53\nnameserver 10.0.0.1\nsearch a b\noptions ndots:2\nsortlist x\n";
        let own = resolv_conf(host, &DnsConfig::default(), false);
        assert_eq!(
            own,
            "nameserver 10.0.0.1\nsearch a b\noptions ndots:2\nsortlist x\n"
        );
        let shared = resolv_conf(host, &DnsConfig::default(), true);
        assert!(
            shared.starts_with("nameserver 127.0.0.53\nnameserver 10.0.0.1\n"),
            "{shared}"
        );
    }

    #[test]
    fn without_any_server_public_ones_are_used() {
        for host_network in [false, true] {
            let text = resolv_conf("search x\n", &DnsConfig::default(), host_network);
            assert!(
                text.starts_with("nameserver 8.8.8.8\nnameserver 8.8.4.4\n"),
                "{text}"
            );
        }
    }

    #[test]
    fn configured_servers_replace_the_hosts_and_stay_even_if_loopback() {
        let dns = DnsConfig {
            nameservers: vec!["127.0.0.1".to_owned()],
            options: vec!["edns0".to_owned()],
            search_domains: vec!["example.org".to_owned()],
        };
        let text = resolv_conf("nameserver 10.0.0.1\nsearch a\noptions b\n", &dns, false);
        assert_eq!(text, "nameserver 127.0.0.1\nsearch example.org\noptions edns0\n");
    }

    #[test]
    fn the_stub_resolver_is_recognised() {
        assert!(is_resolved_stub("nameserver 127.0.0.53\noptions edns0\n"));
        assert!(!is_resolved_stub("nameserver 127.0.0.53\nnameserver 10.0.0.1\n"));
    }
}

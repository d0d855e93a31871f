//! The packet filter's part of a bridge: addresses are translated on the way out, and nobody outside reaches in.
//!
//! All rules of a bridge are in one nftables table of its name, which is replaced and removed as a whole. What has to be said to
//! the filters of others is in [`super::forward`].

use std::process::Command;
use std::time::Duration;

use super::addresses::Subnet;
use super::{NetworkError, program};

const LIMIT: Duration = Duration::from_secs(20);

fn table(bridge: &str) -> String {
    format!("cooper-{bridge}")
}

/// Makes the script that replaces a bridge's table.
fn script(bridge: &str, subnet: Subnet) -> String {
    let (table, subnet) = (table(bridge), subnet.text());
    // Naming the table before deleting it makes the deletion succeed when there is none.
    format!(
        "table ip {table}\n\
         delete table ip {table}\n\
         table ip {table} {{\n\
         \tchain postrouting {{\n\
         \t\ttype nat hook postrouting priority 100; policy accept;\n\
         \t\tip saddr {subnet} ip daddr != {{ {subnet}, 224.0.0.0/4 }} masquerade\n\
         \t}}\n\
         \tchain forward {{\n\
         \t\ttype filter hook forward priority 0; policy accept;\n\
         \t\toifname \"{bridge}\" ct state established,related accept\n\
         \t\tiifname \"{bridge}\" accept\n\
         \t\toifname \"{bridge}\" drop\n\
         \t}}\n\
         }}\n"
    )
}

/// Puts a bridge's rules in force. Blocking.
pub(super) fn set(bridge: &str, subnet: Subnet) -> Result<(), NetworkError> {
    nft(&script(bridge, subnet))
}

/// Removes a bridge's rules. Blocking.
pub(super) fn clear(bridge: &str) -> Result<(), NetworkError> {
    let table = table(bridge);
    nft(&format!("table ip {table}\ndelete table ip {table}\n"))
}

fn nft(script: &str) -> Result<(), NetworkError> {
    let failed = |message: String| NetworkError::Program {
        program: "nft".to_owned(),
        message,
    };
    let output = program::run(Command::new("nft").args(["-f", "-"]), script.as_bytes(), LIMIT);
    match output {
        Ok(output) if output.status.success() => Ok(()),
        Ok(output) => Err(failed(output.stderr)),
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => Err(failed(
            "not found in $PATH; the bridge network needs nftables, install it or use the network mode host or cni"
                .to_owned(),
        )),
        Err(error) => Err(failed(error.to_string())),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_table_is_replaced_as_a_whole() {
        let text = script("b-0", Subnet::parse("10.9.0.0/24").unwrap());
        assert!(
            text.starts_with("table ip cooper-b-0\ndelete table ip cooper-b-0\ntable ip cooper-b-0 {\n"),
            "{text}"
        );
        assert!(text.contains("ip saddr 10.9.0.0/24 ip daddr != { 10.9.0.0/24, 224.0.0.0/4 } masquerade\n"));
        assert!(text.contains("oifname \"b-0\" drop\n"));
        assert_eq!(text.matches('{').count(), text.matches('}').count());
    }
}

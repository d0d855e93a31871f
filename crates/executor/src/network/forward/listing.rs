//! What `nft` shows of chains and their rules: which chains refuse a forwarded packet that no rule of theirs accepts.
//!
//! Only rules without a condition are understood. One with a condition may concern a bridge's packets or not, so it says
//! nothing here.

use std::collections::BTreeMap;

/// A chain that forwarded IPv4 packets pass.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct BaseChain<'a> {
    /// Family and name of its table, as in `inet firewalld`.
    pub(super) table: &'a str,
    /// Its name.
    pub(super) name: &'a str,
    /// Whether it drops what gets to its end.
    pub(super) drops: bool,
}

/// Finds the chains at the hook for forwarded IPv4 packets in what `nft list chains` shows.
pub(super) fn base_chains(shown: &str) -> Vec<BaseChain<'_>> {
    let (mut table, mut name) = ("", "");
    let mut found = Vec::new();
    for line in shown.lines().map(str::trim) {
        if let Some(named) = opened(line, "table ") {
            table = named;
        } else if let Some(named) = opened(line, "chain ") {
            name = named;
        } else if line.contains(" hook forward ") && (table.starts_with("ip ") || table.starts_with("inet "))
        {
            let drops = line.contains("policy drop;");
            found.push(BaseChain { table, name, drops });
        }
    }
    found
}

/// What a line opens, such as `chain a {`.
fn opened<'a>(line: &'a str, kind: &str) -> Option<&'a str> {
    line.strip_prefix(kind)?.strip_suffix('{').map(str::trim_end)
}

/// What becomes of a packet.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Fate {
    Accepted,
    Refused,
}

/// A rule without a condition that ends the way through its chain, or leads to another.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Verdict<'a> {
    Ends(Fate),
    Return,
    Jump(&'a str),
    Goto(&'a str),
}

/// The rules of a table by chain, as `nft list table` shows them.
#[derive(Debug)]
pub(super) struct Rules<'a>(BTreeMap<&'a str, Vec<&'a str>>);

impl<'a> Rules<'a> {
    /// Reads what `nft list table` shows.
    pub(super) fn read(shown: &'a str) -> Self {
        let mut chains: BTreeMap<&str, Vec<&str>> = BTreeMap::new();
        let mut chain = None;
        for line in shown.lines().map(str::trim) {
            match opened(line, "chain ") {
                Some(name) => chain = Some(chains.entry(name).or_default()),
                None if line == "}" => chain = None,
                None => chain.iter_mut().for_each(|rules| rules.push(line)),
            }
        }
        Self(chains)
    }

    /// Whether a packet that no condition fits is refused by a rule of a chain, or of one that it leads to.
    pub(super) fn refuse(&self, chain: &str) -> bool {
        self.fate(chain, &mut BTreeMap::new()) == Some(Fate::Refused)
    }

    /// What becomes of a packet in a chain; `None`: it gets to the chain's end. Each chain is followed once, also where
    /// chains would lead to each other.
    fn fate<'s>(&'s self, chain: &'s str, known: &mut BTreeMap<&'s str, Option<Fate>>) -> Option<Fate> {
        if let Some(fate) = known.get(chain) {
            return *fate;
        }
        known.insert(chain, None);
        let rules = self.0.get(chain)?;
        let fate = self.fate_of(rules, known);
        known.insert(chain, fate);
        fate
    }

    fn fate_of<'s>(&'s self, rules: &[&'s str], known: &mut BTreeMap<&'s str, Option<Fate>>) -> Option<Fate> {
        for rule in rules {
            match verdict(rule) {
                Some(Verdict::Ends(fate)) => return Some(fate),
                Some(Verdict::Return) => return None,
                Some(Verdict::Goto(other)) => return self.fate(other, known),
                Some(Verdict::Jump(other)) => {
                    if let Some(fate) = self.fate(other, known) {
                        return Some(fate);
                    }
                }
                None => {}
            }
        }
        None
    }
}

/// Reads a rule; `None` if it has a condition, or decides nothing.
fn verdict(rule: &str) -> Option<Verdict<'_>> {
    // What is quoted, which nothing inside can end, is a condition's or no business of ours.
    let mut words = rule
        .split('"')
        .step_by(2)
        .flat_map(str::split_whitespace)
        .peekable();
    loop {
        return Some(match words.next()? {
            "counter" => {
                // With what it counted, or without.
                while words
                    .next_if(|word| matches!(*word, "packets" | "bytes") || word.parse::<u64>().is_ok())
                    .is_some()
                {}
                continue;
            }
            "log" => {
                let is_option = |word: &&str| {
                    !matches!(
                        *word,
                        "counter" | "drop" | "reject" | "accept" | "return" | "jump" | "goto"
                    )
                };
                while words.next_if(is_option).is_some() {}
                continue;
            }
            "drop" | "reject" => Verdict::Ends(Fate::Refused),
            "accept" => Verdict::Ends(Fate::Accepted),
            "return" => Verdict::Return,
            "jump" => Verdict::Jump(words.next()?),
            "goto" => Verdict::Goto(words.next()?),
            _ => return None,
        });
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn base_chains_are_found_in_a_listing() {
        let shown = "table ip filter {\n\tchain FORWARD {\n\t\ttype filter hook forward priority filter; policy drop;\n\t}\n\
            \tchain DOCKER {\n\t}\n\tchain INPUT {\n\t\ttype filter hook input priority filter; policy drop;\n\t}\n}\n\
            table inet mine {\n\tchain a {\n\t\ttype filter hook forward priority filter; policy accept;\n\t}\n}\n\
            table ip6 filter {\n\tchain FORWARD {\n\t\ttype filter hook forward priority filter; policy drop;\n\t}\n}\n\
            table bridge filter {\n\tchain FORWARD {\n\t\ttype filter hook forward priority filter; policy drop;\n\t}\n}\n";
        let chain = |table, name, drops| BaseChain { table, name, drops };
        assert_eq!(
            base_chains(shown),
            [
                chain("ip filter", "FORWARD", true),
                chain("inet mine", "a", false)
            ]
        );
        assert_eq!(base_chains(""), []);
    }

    #[test]
    fn rules_without_a_condition_are_understood() {
        let refused = Some(Verdict::Ends(Fate::Refused));
        for (rule, understood) in [
            ("drop", refused),
            ("reject with icmpx admin-prohibited comment \"accept\"", refused),
            (" counter packets 12 bytes 3456 reject", refused),
            ("counter drop", refused),
            (
                "log prefix \"FINAL_REJECT: accept\" level info flags all counter drop",
                refused,
            ),
            ("log", None),
            ("counter packets 1 bytes 2", None),
            ("accept", Some(Verdict::Ends(Fate::Accepted))),
            ("jump x", Some(Verdict::Jump("x"))),
            ("goto x", Some(Verdict::Goto("x"))),
            ("return", Some(Verdict::Return)),
            ("iifname \"eth0\" drop", None),
            ("ct state invalid drop", None),
            ("ct state vmap { invalid : drop }", None),
            ("limit rate 1/second log prefix \"x\" drop", None),
            ("type filter hook forward priority filter; policy drop;", None),
            ("", None),
        ] {
            assert_eq!(verdict(rule), understood, "{rule:?}");
        }
    }

    #[test]
    fn chains_are_followed() {
        let chain =
            |name: &str, rules: &[&str]| format!("\tchain {name} {{\n\t\t{}\n\t}}\n", rules.join("\n\t\t"));
        let shown = [
            chain(
                "ends",
                &[
                    "type filter hook forward priority 0; policy accept;",
                    "iifname \"a\" accept",
                    "drop",
                ],
            ),
            chain("jumps", &["jump nothing", "jump ends"]),
            chain("goes", &["goto nothing", "drop"]),
            chain("accepts", &["jump accepted", "drop"]),
            chain("accepted", &["accept"]),
            chain("returns", &["return", "drop"]),
            chain("nothing", &[]),
            chain("circle", &["jump circle", "jump missing", "jump ends"]),
        ]
        .concat();
        let rules = Rules::read(&shown);
        for (name, refuses) in [
            ("ends", true),
            ("jumps", true),
            ("goes", false),
            ("accepts", false),
            ("returns", false),
            ("nothing", false),
            ("circle", true),
            ("missing", false),
        ] {
            assert_eq!(rules.refuse(name), refuses, "{name}");
        }
    }
}

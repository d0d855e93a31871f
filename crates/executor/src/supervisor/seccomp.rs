//! The system call filter of sandboxed processes: docker's default profile as a classic BPF program.
//!
//! Calls that are not let through fail with `EPERM` (`clone3` with `ENOSYS`, so that C libraries fall back to `clone`).
//! Arguments are compared by their low 32 bits, because the kernel looks at no more of them.

use crate::capability;
use crate::sys::SockFilter;

use super::syscalls::SYSCALLS;

/// When a call is let through.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Rule {
    /// Always.
    Always,
    /// With one of these capabilities.
    With(&'static [&'static str]),
    /// For all address families but `AF_ALG` and `AF_VSOCK`.
    Socket,
    /// For the usual personalities.
    Personality,
    /// Without new namespaces, unless with `SYS_ADMIN`.
    Clone,
    /// With `SYS_ADMIN`; its flags cannot be looked at.
    Clone3,
}

/// An architecture whose calls a process may make.
struct Architecture {
    /// `AUDIT_ARCH_*`.
    audit: u32,
    /// Column in [`SYSCALLS`].
    column: usize,
    /// Whether numbers from 0x40000000 on are another calling convention (x32), which is refused.
    has_x32: bool,
}

#[cfg(target_arch = "x86_64")]
const ARCHITECTURES: &[Architecture] = &[
    Architecture {
        audit: 0xC000_003E,
        column: 0,
        has_x32: true,
    },
    Architecture {
        audit: 0x4000_0003,
        column: 1,
        has_x32: false,
    },
];
#[cfg(target_arch = "aarch64")]
const ARCHITECTURES: &[Architecture] = &[
    Architecture {
        audit: 0xC000_00B7,
        column: 2,
        has_x32: false,
    },
    Architecture {
        audit: 0x4000_0028,
        column: 3,
        has_x32: false,
    },
];
#[cfg(target_arch = "riscv64")]
const ARCHITECTURES: &[Architecture] = &[Architecture {
    audit: 0xC000_00F3,
    column: 4,
    has_x32: false,
}];
/// Without a table nothing could be let through, so sandboxed containers are refused.
#[cfg(not(any(target_arch = "x86_64", target_arch = "aarch64", target_arch = "riscv64")))]
const ARCHITECTURES: &[Architecture] = &[];

#[cfg(target_arch = "x86_64")]
const OCI_ARCHITECTURES: &[&str] = &["SCMP_ARCH_X86_64", "SCMP_ARCH_X86"];
#[cfg(target_arch = "aarch64")]
const OCI_ARCHITECTURES: &[&str] = &["SCMP_ARCH_AARCH64", "SCMP_ARCH_ARM"];
/// The runtime's own architecture alone.
#[cfg(not(any(target_arch = "x86_64", target_arch = "aarch64")))]
const OCI_ARCHITECTURES: &[&str] = &[];

/// Offsets in `struct seccomp_data`; the low half of an argument on little-endian machines.
const DATA_NUMBER: u32 = 0;
const DATA_ARCH: u32 = 4;
const DATA_ARG0_LOW: u32 = 16;

const LOAD: u16 = 0x20;
const AND: u16 = 0x54;
const JUMP: u16 = 0x05;
const IF_EQUAL: u16 = 0x15;
const IF_GREATER: u16 = 0x25;
const IF_NOT_LESS: u16 = 0x35;
const RETURN: u16 = 0x06;

const ALLOW: u32 = 0x7fff_0000;
const FAIL: u32 = 0x0005_0000;
const KILL_PROCESS: u32 = 0x8000_0000;
const EPERM: u32 = 1;
const ENOSYS: u32 = 38;

const AF_ALG: u32 = 38;
const AF_VSOCK: u32 = 40;
/// `CLONE_NEW{NS,UTS,IPC,USER,PID,NET,CGROUP}`.
const NAMESPACES: u32 = 0x7E02_0000;
const PERSONALITIES: [u32; 5] = [0, 0x8, 0x2_0000, 0x2_0008, 0xffff_ffff];

/// Says the same in an OCI runtime's terms, for a process with these capabilities.
pub(crate) fn oci_profile(capabilities: u64) -> serde_json::Value {
    use serde_json::json;
    let has = |name: &str| capabilities & capability::bit(name) != 0;
    let allow = |name: &str, args: serde_json::Value| json!({"names": [name], "action": "SCMP_ACT_ALLOW", "args": args});
    let mut always = Vec::new();
    let mut rules = Vec::new();
    for (name, rule, _) in SYSCALLS {
        match rule {
            Rule::Always => always.push(*name),
            Rule::With(names) if names.iter().any(|name| has(name)) => always.push(*name),
            Rule::With(_) => {}
            Rule::Clone | Rule::Clone3 if has("SYS_ADMIN") => always.push(*name),
            Rule::Clone => {
                let masked =
                    json!({"index": 0, "value": NAMESPACES, "valueTwo": 0, "op": "SCMP_CMP_MASKED_EQ"});
                rules.push(allow(name, json!([masked])));
            }
            Rule::Clone3 => {
                rules.push(json!({"names": [name], "action": "SCMP_ACT_ERRNO", "errnoRet": ENOSYS}));
            }
            Rule::Socket => {
                for (operator, value) in [
                    ("SCMP_CMP_LT", AF_ALG),
                    ("SCMP_CMP_EQ", AF_ALG + 1),
                    ("SCMP_CMP_GT", AF_VSOCK),
                ] {
                    rules.push(allow(name, json!([{"index": 0, "value": value, "op": operator}])));
                }
            }
            Rule::Personality => {
                for value in PERSONALITIES {
                    rules.push(allow(
                        name,
                        json!([{"index": 0, "value": value, "op": "SCMP_CMP_EQ"}]),
                    ));
                }
            }
        }
    }
    rules.push(json!({"names": always, "action": "SCMP_ACT_ALLOW"}));
    json!({
        "defaultAction": "SCMP_ACT_ERRNO",
        "defaultErrnoRet": EPERM,
        "architectures": OCI_ARCHITECTURES,
        "syscalls": rules,
    })
}

/// Makes the filter for a process with these capabilities; `None` if this architecture has no table.
pub(crate) fn filter(capabilities: u64) -> Option<Vec<SockFilter>> {
    if ARCHITECTURES.is_empty() {
        return None;
    }
    let mut program = vec![statement(LOAD, DATA_ARCH)];
    for architecture in ARCHITECTURES {
        let section = section(architecture, capabilities);
        // Sections are longer than a conditional jump can be.
        program.push(jump(IF_EQUAL, architecture.audit, 1, 0));
        program.push(statement(JUMP, u32::try_from(section.len()).ok()?));
        program.extend(section);
    }
    program.push(statement(RETURN, KILL_PROCESS));
    Some(program)
}

const fn statement(code: u16, value: u32) -> SockFilter {
    SockFilter {
        code,
        jump_true: 0,
        jump_false: 0,
        value,
    }
}

const fn jump(code: u16, value: u32, jump_true: u8, jump_false: u8) -> SockFilter {
    SockFilter {
        code,
        jump_true,
        jump_false,
        value,
    }
}

/// What follows the comparison with a call's number; nothing: the call is let through. `None`: it is not.
fn check(rule: Rule, capabilities: u64) -> Option<Vec<SockFilter>> {
    let has = |name: &str| capabilities & capability::bit(name) != 0;
    Some(match rule {
        Rule::Always => Vec::new(),
        Rule::With(names) if names.iter().any(|name| has(name)) => Vec::new(),
        Rule::With(_) => return None,
        Rule::Clone | Rule::Clone3 if has("SYS_ADMIN") => Vec::new(),
        Rule::Clone3 => vec![statement(RETURN, FAIL | ENOSYS)],
        Rule::Clone => vec![
            statement(LOAD, DATA_ARG0_LOW),
            statement(AND, NAMESPACES),
            jump(IF_EQUAL, 0, 0, 1),
            statement(RETURN, ALLOW),
            statement(RETURN, FAIL | EPERM),
        ],
        Rule::Socket => vec![
            statement(LOAD, DATA_ARG0_LOW),
            jump(IF_EQUAL, AF_ALG, 2, 0),
            jump(IF_EQUAL, AF_VSOCK, 1, 0),
            statement(RETURN, ALLOW),
            statement(RETURN, FAIL | EPERM),
        ],
        Rule::Personality => {
            let mut check = vec![statement(LOAD, DATA_ARG0_LOW)];
            for personality in PERSONALITIES {
                check.extend([jump(IF_EQUAL, personality, 0, 1), statement(RETURN, ALLOW)]);
            }
            check.push(statement(RETURN, FAIL | EPERM));
            check
        }
    })
}

fn section(architecture: &Architecture, capabilities: u64) -> Vec<SockFilter> {
    let mut program = vec![statement(LOAD, DATA_NUMBER)];
    if architecture.has_x32 {
        program.extend([
            jump(IF_NOT_LESS, 0x4000_0000, 0, 1),
            statement(RETURN, FAIL | ENOSYS),
        ]);
    }
    let mut allowed = Vec::new();
    for (_, rule, numbers) in SYSCALLS {
        let Some(number) = numbers
            .get(architecture.column)
            .and_then(|&number| u32::try_from(number).ok())
        else {
            continue;
        };
        let Some(check) = check(*rule, capabilities) else {
            continue;
        };
        if check.is_empty() {
            allowed.push(number);
        } else {
            program.push(jump(
                IF_EQUAL,
                number,
                0,
                u8::try_from(check.len()).unwrap_or(u8::MAX),
            ));
            program.extend(check);
        }
    }
    allowed.sort_unstable();
    allowed.dedup();
    for range in allowed.chunk_by(|a, b| a + 1 == *b) {
        let (Some(&first), Some(&last)) = (range.first(), range.last()) else {
            continue;
        };
        // Ranges ascend: a number below the first one is in none.
        program.extend([
            jump(IF_GREATER, last, 3, 0),
            jump(IF_NOT_LESS, first, 0, 1),
            statement(RETURN, ALLOW),
            statement(RETURN, FAIL | EPERM),
        ]);
    }
    program.push(statement(RETURN, FAIL | EPERM));
    program
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Runs the filter as the kernel does.
    fn decide(program: &[SockFilter], arch: u32, number: u32, arg0: u64) -> u32 {
        let low = u32::try_from(arg0 & 0xffff_ffff).unwrap();
        let mut accumulator = 0_u32;
        let mut at = 0;
        loop {
            let instruction = program[at];
            at += 1;
            let condition = match instruction.code {
                RETURN => return instruction.value,
                LOAD => {
                    accumulator = match instruction.value {
                        DATA_NUMBER => number,
                        DATA_ARCH => arch,
                        DATA_ARG0_LOW => low,
                        other => panic!("loads {other}"),
                    };
                    continue;
                }
                AND => {
                    accumulator &= instruction.value;
                    continue;
                }
                JUMP => {
                    at += usize::try_from(instruction.value).unwrap();
                    continue;
                }
                IF_EQUAL => accumulator == instruction.value,
                IF_GREATER => accumulator > instruction.value,
                IF_NOT_LESS => accumulator >= instruction.value,
                other => panic!("code {other}"),
            };
            at += usize::from(if condition {
                instruction.jump_true
            } else {
                instruction.jump_false
            });
        }
    }

    fn number(name: &str, column: usize) -> u32 {
        let row = SYSCALLS.iter().find(|(known, _, _)| *known == name);
        u32::try_from(row.unwrap_or_else(|| panic!("{name}")).2[column]).unwrap()
    }

    #[test]
    fn every_call_is_decided_as_its_rule_says() {
        let program = filter(capability::SANDBOX).unwrap();
        assert!(program.len() < 4096, "{}", program.len());
        for architecture in ARCHITECTURES {
            let mut expected = std::collections::BTreeMap::new();
            for (name, rule, numbers) in SYSCALLS {
                let Ok(number) = u32::try_from(numbers[architecture.column]) else {
                    continue;
                };
                let allowed = match rule {
                    Rule::Always => true,
                    Rule::With(names) => names
                        .iter()
                        .any(|name| capability::SANDBOX & capability::bit(name) != 0),
                    _ => continue,
                };
                expected.insert(number, (*name, allowed));
            }
            for number in 0..600 {
                if SYSCALLS.iter().any(|(_, rule, numbers)| {
                    u32::try_from(numbers[architecture.column]) == Ok(number)
                        && !matches!(rule, Rule::Always | Rule::With(_))
                }) {
                    continue;
                }
                let allowed = expected.get(&number).is_some_and(|(_, allowed)| *allowed);
                let verdict = decide(&program, architecture.audit, number, 0);
                assert_eq!(
                    verdict,
                    if allowed { ALLOW } else { FAIL | EPERM },
                    "{number} {:?}",
                    expected.get(&number)
                );
            }
        }
    }

    #[test]
    fn arguments_are_looked_at() {
        let program = filter(capability::SANDBOX).unwrap();
        for architecture in ARCHITECTURES {
            let decide = |name: &str, arg0| {
                decide(
                    &program,
                    architecture.audit,
                    number(name, architecture.column),
                    arg0,
                )
            };
            assert_eq!(decide("socket", 2), ALLOW);
            assert_eq!(decide("socket", 39), ALLOW);
            assert_eq!(decide("socket", 41), ALLOW);
            assert_eq!(decide("socket", 38), FAIL | EPERM);
            assert_eq!(decide("socket", 40), FAIL | EPERM);
            assert_eq!(
                decide("socket", 0x1_0000_0026),
                FAIL | EPERM,
                "the kernel sees AF_ALG"
            );
            assert_eq!(decide("clone", 0x11), ALLOW);
            assert_eq!(decide("clone", 0x1000_0011), FAIL | EPERM);
            assert_eq!(decide("clone3", 0), FAIL | ENOSYS);
            assert_eq!(decide("personality", 0xffff_ffff), ALLOW);
            assert_eq!(decide("personality", 4), FAIL | EPERM);
            assert_eq!(decide("chroot", 0), ALLOW);
            assert_eq!(decide("mount", 0), FAIL | EPERM);
        }
    }

    #[test]
    fn capabilities_open_calls_and_unknown_architectures_none() {
        let all = filter(u64::MAX).unwrap();
        let native = &ARCHITECTURES[0];
        for name in ["mount", "clone3", "bpf", "reboot", "unshare"] {
            assert_eq!(
                decide(&all, native.audit, number(name, native.column), 0),
                ALLOW,
                "{name}"
            );
        }
        assert_eq!(decide(&all, 0x1234, 0, 0), KILL_PROCESS);
        if native.has_x32 {
            assert_eq!(decide(&all, native.audit, 0x4000_0000, 0), FAIL | ENOSYS);
        }
    }
}

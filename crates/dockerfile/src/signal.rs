//! Names of signals.

const NAMES: &[&str] = &[
    "ABRT", "ALRM", "BUS", "CHLD", "CLD", "CONT", "FPE", "HUP", "ILL", "INT", "IO", "IOT", "KILL", "PIPE",
    "POLL", "PROF", "PWR", "QUIT", "SEGV", "STKFLT", "STOP", "SYS", "TERM", "TRAP", "TSTP", "TTIN", "TTOU",
    "URG", "USR1", "USR2", "VTALRM", "WINCH", "XCPU", "XFSZ", "RTMIN", "RTMAX",
];

/// Tells whether a text names a signal: a number other than 0, or a name with or without `SIG`.
pub(crate) fn is_signal(text: &str) -> bool {
    if let Ok(number) = text.parse::<i64>() {
        return number != 0;
    }
    let upper = text.to_uppercase();
    let name = upper.strip_prefix("SIG").unwrap_or(&upper);
    let offset = |prefix: &str, highest: u32| {
        let digits = name
            .strip_prefix(prefix)
            .filter(|digits| !digits.starts_with('0'));
        digits
            .and_then(|digits| digits.parse::<u32>().ok())
            .is_some_and(|offset| (1..=highest).contains(&offset))
    };
    NAMES.contains(&name) || offset("RTMIN+", 15) || offset("RTMAX-", 14)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn knows_signals() {
        for text in ["SIGTERM", "term", "9", "SIGRTMIN+3", "-1", "RTMAX-14"] {
            assert!(is_signal(text), "{text}");
        }
        for text in ["", "0", "SIGFOO", "RTMIN+16", "RTMIN+03"] {
            assert!(!is_signal(text), "{text}");
        }
    }
}

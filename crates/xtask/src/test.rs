//! The whole test run, ending in one summary line.

use std::process::{Command, Stdio};

use anyhow::{Context, Result, bail};

use crate::shell::root;
use crate::{e2e, setup, tidy};

/// How many checks went which way.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Counts {
    /// Checks that held.
    pub passed: usize,
    /// Checks that did not.
    pub failed: usize,
    /// Checks that could not run here, each reported with its reason.
    pub skipped: usize,
}

impl Counts {
    fn add(&mut self, other: Self) {
        self.passed += other.passed;
        self.failed += other.failed;
        self.skipped += other.skipped;
    }
}

/// Runs every check; later ones run even when an earlier one failed, so that one run shows all that is wrong.
pub fn run() -> Result<()> {
    let mut total = Counts::default();
    if let Err(error) = setup::base() {
        eprintln!("setup: {error:#}");
    }
    setup::clients();
    setup::kernel_tools();
    total.add(step("format", || cargo(&["fmt", "--all", "--check"])));
    total.add(step("tidy", tidy::run));
    total.add(step("clippy", || {
        cargo(&[
            "clippy",
            "--workspace",
            "--all-targets",
            "--locked",
            "--",
            "-D",
            "warnings",
        ])
    }));
    total.add(cargo_test()?);
    total.add(e2e::run(&[])?);
    println!(
        "{} passed, {} failed, {} skipped",
        total.passed, total.failed, total.skipped
    );
    if total.failed > 0 {
        bail!("{} checks failed", total.failed);
    }
    Ok(())
}

fn step(name: &str, check: impl FnOnce() -> Result<()>) -> Counts {
    println!("=== {name}");
    match check() {
        Ok(()) => Counts {
            passed: 1,
            ..Counts::default()
        },
        Err(error) => {
            println!("FAILED {name}: {error:#}");
            Counts {
                failed: 1,
                ..Counts::default()
            }
        }
    }
}

fn cargo(arguments: &[&str]) -> Result<()> {
    crate::shell::run(Command::new(env!("CARGO")).args(arguments).current_dir(root()))
}

/// Runs the unit and contract tests, shows their output as it comes and adds up the runner's result lines.
fn cargo_test() -> Result<Counts> {
    println!("=== unit and contract tests");
    let mut child = Command::new(env!("CARGO"))
        .args(["test", "--workspace", "--locked", "--no-fail-fast"])
        .current_dir(root())
        .stdout(Stdio::piped())
        .spawn()
        .context("starting cargo test")?;
    let output = child.stdout.take().context("cargo test has no standard output")?;
    let mut counts = Counts::default();
    for line in std::io::BufRead::lines(std::io::BufReader::new(output)) {
        let line = line?;
        println!("{line}");
        if let Some(found) = result_line(&line) {
            counts.add(found);
        }
    }
    let status = child.wait()?;
    if !status.success() && counts.failed == 0 {
        println!("FAILED unit and contract tests: cargo test ended with {status}");
        counts.failed = 1;
    }
    Ok(counts)
}

/// Reads `test result: ok. 3 passed; 0 failed; 1 ignored; …`.
fn result_line(line: &str) -> Option<Counts> {
    let counts = line.strip_prefix("test result: ")?.split_once(". ")?.1;
    let mut found = Counts::default();
    for part in counts.split("; ") {
        let (number, what) = part.split_once(' ')?;
        let target = match what {
            "passed" => &mut found.passed,
            "failed" => &mut found.failed,
            "ignored" => &mut found.skipped,
            _ => continue,
        };
        *target = number.parse().ok()?;
    }
    Some(found)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn reads_the_runners_result_line() {
        let line = "test result: FAILED. 12 passed; 2 failed; 1 ignored; 0 measured; 0 filtered out; finished in 0.1s";
        assert_eq!(
            result_line(line),
            Some(Counts {
                passed: 12,
                failed: 2,
                skipped: 1
            })
        );
        assert_eq!(result_line("test result says nothing"), None);
    }
}

//! Project automation: `cargo xtask <command>`. Run without arguments for the list.
#![forbid(unsafe_code)]
#![expect(clippy::print_stdout, clippy::print_stderr, reason = "a command-line tool talks on its terminal")]

mod codegen;
mod shell;
mod tidy;

use anyhow::{Result, bail};

const USAGE: &str = "\
usage: cargo xtask COMMAND

  codegen   generate Rust from the .proto files
  tidy      check the rules that no compiler checks: imports, file sizes, markers of unfinished work
  test      everything: set-up, format, tidy, clippy, unit, contract and end-to-end tests
  e2e       end-to-end tests alone, with real containers, registries and clients; e2e NAME… runs some
  demo      build and run the example with an embedded engine
  bench     benchmarks";

fn main() -> Result<()> {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let (command, rest) = match arguments.split_first() {
        Some((command, rest)) => (command.as_str(), rest),
        None => bail!("{USAGE}"),
    };
    match command {
        "codegen" => codegen::run(),
        "tidy" => tidy::run(),
        _ => {
            let _ = rest;
            bail!("unknown command {command:?}\n{USAGE}")
        }
    }
}

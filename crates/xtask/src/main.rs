//! Project automation: `cargo xtask <command>`. Run without arguments for the list.
#![forbid(unsafe_code)]
#![expect(
    clippy::print_stdout,
    clippy::print_stderr,
    reason = "a command-line tool talks on its terminal"
)]

mod base_image;
#[cfg(feature = "codegen")]
mod codegen;
mod demo;
mod e2e;
mod export_bench;
mod setup;
mod shell;
mod test;
mod tidy;

use anyhow::{Context as _, Result, bail};

const USAGE: &str = "\
usage: cargo xtask COMMAND

  codegen   generate Rust from the .proto files
  tidy      check the rules that no compiler checks: imports, file sizes, markers of unfinished work
  test      everything: set-up, format, tidy, clippy, unit, contract and end-to-end tests
  e2e       end-to-end tests alone, with real containers, registries and clients; e2e NAME… runs some
  bench     measure a part alone, optimised: bench caches, bench dockerfile, bench exec; or the export of the cache of 300
            stages to a registry: bench exports, against another daemon with bench exports PROGRAM [FLAG…]
  fuzz      convert mutated Dockerfiles for some time; fuzz SECONDS
  demo      build and run the example with an embedded engine";

fn main() -> Result<()> {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let (command, rest) = match arguments.split_first() {
        Some((command, rest)) => (command.as_str(), rest),
        None => bail!("{USAGE}"),
    };
    match command {
        "codegen" => generate(),
        "tidy" => tidy::run(),
        "test" => test::run(),
        "e2e" => e2e::command(rest),
        "bench" => bench(rest),
        "fuzz" => fuzz(rest),
        "demo" => demo::command(),
        _ => bail!("unknown command {command:?}\n{USAGE}"),
    }
}

/// Runs the benchmark of a part.
fn bench(parts: &[String]) -> Result<()> {
    let (package, bench) = match parts {
        [part, peer @ ..] if part == "exports" => return export_bench::run(peer),
        [part] if part == "caches" => ("remotecache", "records"),
        [part] if part == "dockerfile" => ("dockerfile", "convert"),
        [part] if part == "exec" => {
            setup::runtimes()?;
            ("executor", "start")
        }
        _ => bail!("bench wants the name of a part: caches, dockerfile, exec, exports"),
    };
    shell::run(
        std::process::Command::new(env!("CARGO"))
            .args(["bench", "--quiet", "--package", package, "--bench", bench])
            .current_dir(shell::root()),
    )
}

/// Converts mutated Dockerfiles, optimised, from a seed that is the time.
fn fuzz(rest: &[String]) -> Result<()> {
    let seconds = match rest {
        [] => 60,
        [seconds] => seconds.parse::<u32>().context("fuzz wants a number of seconds")?,
        _ => bail!("fuzz wants a number of seconds"),
    };
    let seed = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH)?;
    let arguments = [
        "test",
        "--quiet",
        "--release",
        "--package",
        "dockerfile",
        "--test",
        "suite",
    ];
    shell::run(
        std::process::Command::new(env!("CARGO"))
            .args(arguments)
            .args(["mutants", "--", "--nocapture"])
            .env("FUZZ_SECONDS", seconds.to_string())
            .env("FUZZ_SEED", seed.as_secs().to_string())
            .current_dir(shell::root()),
    )
}

#[cfg(feature = "codegen")]
fn generate() -> Result<()> {
    codegen::run()
}

/// Runs this program again with the protobuf compiler built in.
#[cfg(not(feature = "codegen"))]
fn generate() -> Result<()> {
    let arguments = [
        "run",
        "--quiet",
        "--package",
        "xtask",
        "--features",
        "codegen",
        "--",
        "codegen",
    ];
    shell::run(
        std::process::Command::new(env!("CARGO"))
            .args(arguments)
            .current_dir(shell::root()),
    )
}

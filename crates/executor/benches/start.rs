//! What starting a container takes: the same step, `/bin/true` of busybox on an overlay, by the embedded runtime, runc and
//! crun, one after the other in turns.
//!
//! Run it with `cargo xtask bench exec`, as root. A number as argument is how often each runs.
#![expect(
    clippy::unwrap_used,
    clippy::print_stdout,
    reason = "a benchmark talks on its terminal and fails by panicking"
)]

use std::os::unix::fs::symlink;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::{Duration, Instant};

use executor::{Executor, ExecutorConfig, Process, Root, RunRequest, RuntimeChoice, Stdio};
use tokio_util::sync::CancellationToken;

const RUNS: usize = 300;
/// Not counted: programs and directories are read for the first time.
const WARM_UP: usize = 10;
const BUSYBOX: &str = "/bin/busybox";

/// A runtime and what its containers took.
struct Candidate {
    name: &'static str,
    executor: Executor,
    took: Vec<Duration>,
}

fn main() {
    executor::supervisor_main();
    let runs = std::env::args()
        .skip(1)
        .find_map(|argument| argument.parse().ok());
    let runs: usize = runs.unwrap_or(RUNS).max(1);
    if !rustix::process::geteuid().is_root() || !Path::new(BUSYBOX).exists() {
        println!("skipped: it needs root and {BUSYBOX} (Debian's busybox-static)");
        return;
    }
    let directory = tempfile::tempdir().unwrap();
    make_rootfs(&directory.path().join("rootfs"));
    let tokio = tokio::runtime::Builder::new_multi_thread()
        .worker_threads(2)
        .enable_all()
        .build()
        .unwrap();
    tokio.block_on(measure(directory.path(), runs));
}

fn make_rootfs(root: &Path) {
    for directory in ["bin", "etc", "proc", "dev", "sys"] {
        std::fs::create_dir_all(root.join(directory)).unwrap();
    }
    std::fs::copy(BUSYBOX, root.join("bin/busybox")).unwrap();
    symlink("busybox", root.join("bin/true")).unwrap();
}

async fn measure(directory: &Path, runs: usize) {
    let mut candidates = Vec::new();
    for name in ["embedded", "runc", "crun"] {
        match candidate(name, directory).await {
            Ok(candidate) => candidates.push(candidate),
            Err(reason) => println!("{name}: skipped: {reason}"),
        }
    }
    let mut bare = Vec::with_capacity(runs);
    for number in 0..WARM_UP + runs {
        for candidate in &mut candidates {
            let took = step(&candidate.executor, directory).await.unwrap();
            candidate.took.push(took);
        }
        let begin = Instant::now();
        Command::new(BUSYBOX).arg("true").status().unwrap();
        bare.push(begin.elapsed());
        if number + 1 == WARM_UP {
            candidates.iter_mut().for_each(|candidate| candidate.took.clear());
            bare.clear();
        }
    }
    report(candidates, &mut bare, runs);
}

/// Starts an executor and runs one step, to see that it can be done here.
async fn candidate(name: &'static str, directory: &Path) -> Result<Candidate, String> {
    let runtime = match name {
        "embedded" => RuntimeChoice::Embedded,
        program => RuntimeChoice::Binary(PathBuf::from(program)),
    };
    let config = ExecutorConfig {
        state_dir: directory.join(name),
        runtime,
        ..ExecutorConfig::default()
    };
    let executor = Executor::new(config).map_err(|error| error.to_string())?;
    step(&executor, directory).await?;
    Ok(Candidate {
        name,
        executor,
        took: Vec::new(),
    })
}

/// Runs a step and returns what it took, from asking for it until nothing is left of its container.
async fn step(executor: &Executor, directory: &Path) -> Result<Duration, String> {
    let changes = tempfile::tempdir_in(directory).map_err(|error| error.to_string())?;
    let (upper, work) = (changes.path().join("upper"), changes.path().join("work"));
    for made in [&upper, &work] {
        std::fs::create_dir(made).map_err(|error| error.to_string())?;
    }
    let lower = directory.join("rootfs");
    let mount = snapshot::Mount::overlay([lower.as_path()], Some((&upper, &work)), &["volatile".to_owned()]);
    let root = Root {
        mounts: vec![mount],
        read_only: false,
    };
    let process = Process {
        args: vec!["/bin/true".to_owned()],
        env: Vec::new(),
        cwd: String::new(),
        user: String::new(),
        tty: false,
    };
    let request = RunRequest::new(root, process);
    let begin = Instant::now();
    let ended = executor
        .run(request, Stdio::default(), &CancellationToken::new())
        .await;
    let took = begin.elapsed();
    match ended {
        Ok(status) if status.success() => Ok(took),
        Ok(status) => Err(format!("the step ended with {status:?}")),
        Err(error) => Err(error.to_string()),
    }
}

fn report(candidates: Vec<Candidate>, bare: &mut [Duration], runs: usize) {
    let rows: Vec<(&str, Duration, Duration)> = candidates
        .into_iter()
        .map(|mut candidate| {
            let (median, slow) = quantiles(&mut candidate.took);
            (candidate.name, median, slow)
        })
        .collect();
    let first = rows.first().map_or(Duration::MAX, |row| row.1);
    println!("{runs} containers each, in turns");
    println!("{:<28}{:>10}{:>10}{:>10}", "", "median ms", "90 % ms", "ratio");
    for (name, median, slow) in rows {
        let ratio = median.as_secs_f64() / first.as_secs_f64();
        println!(
            "{name:<28}{:>10.2}{:>10.2}{ratio:>10.2}",
            millis(median),
            millis(slow)
        );
    }
    let (median, slow) = quantiles(bare);
    let name = "the program, no container";
    println!("{name:<28}{:>10.2}{:>10.2}", millis(median), millis(slow));
}

/// The median and what nine of ten stay below.
fn quantiles(took: &mut [Duration]) -> (Duration, Duration) {
    took.sort_unstable();
    (took[took.len() / 2], took[took.len() * 9 / 10])
}

fn millis(duration: Duration) -> f64 {
    duration.as_secs_f64() * 1000.0
}

//! What exporting the cache of many stages to a registry takes, against another daemon that takes the same flags.
//!
//! Either daemon is alone while it is measured, starts on an empty directory and is driven by the same client. It builds
//! first, then exports what it has: layers are packed, sent, and described by one record for each step.

use std::fmt::Write as _;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};

use crate::base_image::{BaseRegistry, RealRegistry};
use crate::e2e::fixture;
use crate::setup;
use crate::shell::{is_root, output};

const STAGES: usize = 300;
/// Stages whose files one more stage gathers.
const GATHERED: usize = 30;
/// How often each daemon is measured; the medians are compared.
const ROUNDS: usize = 3;
/// How long a daemon may take to answer first.
const START_LIMIT: Duration = Duration::from_secs(30);

/// Measures our daemon, and with a program, and perhaps flags of it, that one as well.
pub fn run(peer: &[String]) -> Result<()> {
    setup::base()?;
    setup::clients();
    if !is_root() {
        println!("skipped: containers need root");
        return Ok(());
    }
    if setup::find("docker-registry").is_none() {
        println!("skipped: docker-registry is not installed");
        return Ok(());
    }
    let binaries = fixture::build_optimised()?;
    let bench = Bench::new(binaries.join("buildctl"))?;
    let mut candidates = vec![Candidate::new(binaries.join("cooperd"), &[])];
    if let [program, flags @ ..] = peer {
        candidates.push(Candidate::new(PathBuf::from(program), flags));
    }
    for round in 0..ROUNDS {
        for (number, candidate) in candidates.iter_mut().enumerate() {
            let measured = bench.measure(candidate, &format!("round{round}-{number}"))?;
            println!("{}: {}", candidate.name(), measured.text());
            candidate.measured.push(measured);
        }
    }
    if let [own, peer] = &candidates[..] {
        print!("{}", compared(own, peer));
    }
    Ok(())
}

/// A daemon, and what it took each time.
struct Candidate {
    program: PathBuf,
    flags: Vec<String>,
    measured: Vec<Measured>,
}

impl Candidate {
    fn new(program: PathBuf, flags: &[String]) -> Self {
        Self {
            program,
            flags: flags.to_vec(),
            measured: Vec::new(),
        }
    }

    fn name(&self) -> String {
        let name = self.program.file_name().unwrap_or_default();
        name.to_string_lossy().into_owned()
    }

    fn median(&self, of: fn(&Measured) -> f64) -> f64 {
        let mut all: Vec<f64> = self.measured.iter().map(of).collect();
        all.sort_by(f64::total_cmp);
        all.get(all.len() / 2).copied().unwrap_or_default()
    }
}

/// What one round took.
struct Measured {
    build: Duration,
    export: Duration,
    /// Most memory that the daemon and its processes had during the export.
    peak_kib: u32,
    records: String,
}

impl Measured {
    fn export_seconds(&self) -> f64 {
        self.export.as_secs_f64()
    }

    fn peak_mib(&self) -> f64 {
        f64::from(self.peak_kib) / 1024.0
    }

    fn text(&self) -> String {
        format!(
            "built in {:.2} s, exported in {:.2} s with a peak of {:.1} MiB: {}",
            self.build.as_secs_f64(),
            self.export_seconds(),
            self.peak_mib(),
            self.records
        )
    }
}

fn compared(own: &Candidate, peer: &Candidate) -> String {
    let mut text = format!(
        "{STAGES} stages, medians of {ROUNDS}: {} against {}\n",
        own.name(),
        peer.name()
    );
    let mut line = |name: &str, of: fn(&Measured) -> f64| {
        let (own, peer) = (own.median(of), peer.median(of));
        let _ = writeln!(text, "{name:10} {own:9.2} {peer:9.2}  ratio {:.2}", own / peer);
    };
    line("export, s", Measured::export_seconds);
    line("peak, MiB", Measured::peak_mib);
    text
}

/// What all rounds share.
struct Bench {
    dir: tempfile::TempDir,
    client: PathBuf,
    context: PathBuf,
    // Base images, and the registry that is exported to.
    _base: BaseRegistry,
    target: RealRegistry,
}

impl Bench {
    fn new(client: PathBuf) -> Result<Self> {
        let dir = tempfile::Builder::new().prefix("cooper-bench-").tempdir()?;
        let base = BaseRegistry::start()?;
        let target = RealRegistry::start(&dir.path().join("registry"))?;
        let context = dir.path().join("context");
        fs::create_dir(&context)?;
        let image = format!("{}/library/busybox:latest", base.address());
        fs::write(context.join("Dockerfile"), dockerfile(&image))?;
        Ok(Self {
            dir,
            client,
            context,
            _base: base,
            target,
        })
    }

    fn measure(&self, candidate: &Candidate, name: &str) -> Result<Measured> {
        let root = self.dir.path().join(name);
        let daemon = Daemon::start(self, candidate, &root)?;
        let cache = format!("{}/{name}:cache", self.target.address());
        let build = daemon.build(&self.context, &[])?;
        daemon.forget_peak()?;
        let option = format!("--export-cache=type=registry,mode=max,ref={cache}");
        let export = daemon.build(&self.context, &[&option])?;
        let peak_kib = daemon.peak_kib()?;
        let inspected = output(Command::new(self.client.with_file_name("cooper")).args([
            "cache",
            "inspect",
            "--insecure",
            &cache,
        ]))?;
        drop(daemon);
        fs::remove_dir_all(&root)?;
        Ok(Measured {
            build,
            export,
            peak_kib,
            records: inspected.lines().nth(1).unwrap_or_default().to_owned(),
        })
    }
}

/// Stages that have nothing to do with each other, and some that gather what they made.
fn dockerfile(image: &str) -> String {
    let mut text = String::new();
    for stage in 0..STAGES {
        let _ = writeln!(
            text,
            "FROM {image} AS s{stage}\nRUN seq {stage} {} > /made",
            stage + 20_000
        );
    }
    for (number, first) in (0..STAGES).step_by(GATHERED).enumerate() {
        let _ = writeln!(text, "FROM {image} AS g{number}");
        for stage in first..(first + GATHERED).min(STAGES) {
            let _ = writeln!(text, "COPY --from=s{stage} /made /all/{stage}");
        }
    }
    let _ = writeln!(text, "FROM {image}");
    for number in 0..STAGES.div_ceil(GATHERED) {
        let _ = writeln!(text, "COPY --from=g{number} /all /all");
    }
    text
}

/// A daemon that runs.
struct Daemon<'a> {
    bench: &'a Bench,
    address: String,
    child: Child,
}

impl<'a> Daemon<'a> {
    fn start(bench: &'a Bench, candidate: &Candidate, root: &Path) -> Result<Self> {
        fs::create_dir(root)?;
        let log = fs::File::create(root.join("log"))?;
        let address = format!("unix://{}", root.join("sock").display());
        let child = Command::new(&candidate.program)
            .arg("--root")
            .arg(root.join("state"))
            .args(["--addr", &address])
            .args(&candidate.flags)
            .env("PATH", setup::path_with_tools())
            .stdin(Stdio::null())
            .stdout(log.try_clone()?)
            .stderr(log)
            .spawn()
            .with_context(|| format!("starting {}", candidate.program.display()))?;
        let mut daemon = Self {
            bench,
            address,
            child,
        };
        let start = Instant::now();
        while !daemon.client(&["debug", "workers"]).output()?.status.success() {
            let ended = daemon.child.try_wait()?;
            if ended.is_some() || start.elapsed() > START_LIMIT {
                let log = fs::read_to_string(root.join("log")).unwrap_or_default();
                bail!("{} does not answer:\n{log}", candidate.name());
            }
        }
        Ok(daemon)
    }

    fn client(&self, arguments: &[&str]) -> Command {
        let mut command = Command::new(&self.bench.client);
        command.args(["--addr", &self.address]).args(arguments);
        command
    }

    /// Builds the context; returns how long that took.
    fn build(&self, context: &Path, arguments: &[&str]) -> Result<Duration> {
        let shown = context.display();
        let mut command = self.client(&["build", "--progress=plain", "--frontend=dockerfile.v0"]);
        command
            .arg(format!("--local=context={shown}"))
            .arg(format!("--local=dockerfile={shown}"))
            .args(arguments);
        let start = Instant::now();
        output(&mut command)?;
        Ok(start.elapsed())
    }

    /// The daemon's process and those that it started.
    fn processes(&self) -> Vec<u32> {
        let mut found = vec![self.child.id()];
        let mut at = 0;
        while let Some(process) = found.get(at) {
            let threads = fs::read_dir(format!("/proc/{process}/task"));
            let children = threads.into_iter().flatten().flatten().map(|thread| {
                let children = fs::read_to_string(thread.path().join("children"));
                children.unwrap_or_default()
            });
            let children: Vec<String> = children.collect();
            let children = children.iter().flat_map(|text| text.split_whitespace());
            found.extend(children.filter_map(|id| id.parse::<u32>().ok()));
            at += 1;
        }
        found
    }

    /// Lets the peak of the memory begin where it is now.
    fn forget_peak(&self) -> Result<()> {
        for process in self.processes() {
            let path = format!("/proc/{process}/clear_refs");
            fs::write(&path, "5").with_context(|| path.clone())?;
        }
        Ok(())
    }

    fn peak_kib(&self) -> Result<u32> {
        let mut sum = 0_u32;
        for process in self.processes() {
            let status = fs::read_to_string(format!("/proc/{process}/status"))?;
            let peak = status.lines().find_map(|line| line.strip_prefix("VmHWM:"));
            let peak = peak.and_then(|peak| peak.trim().strip_suffix(" kB")?.parse::<u32>().ok());
            sum = sum.saturating_add(peak.with_context(|| format!("no peak of process {process}"))?);
        }
        Ok(sum)
    }
}

impl Drop for Daemon<'_> {
    fn drop(&mut self) {
        let id = self.child.id().to_string();
        let _ = Command::new("kill").args(["-TERM", &id]).status();
        let _ = self.child.wait();
    }
}

#[cfg(test)]
mod tests {
    use super::{STAGES, dockerfile};

    #[test]
    fn all_stages_are_gathered() {
        let text = dockerfile("base");
        for stage in 0..STAGES {
            let line = format!("COPY --from=s{stage} /made /all/{stage}\n");
            assert!(text.contains(&line), "{stage}");
        }
        assert!(text.ends_with("COPY --from=g9 /all /all\n"));
    }
}

//! What must stay as it is: files beside the state directory, the process, its mounts.

use std::collections::BTreeMap;
use std::fs;
use std::os::unix::fs::MetadataExt as _;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, bail, ensure};
use llb::pb;

use super::client::{Answer, Client, name, request};
use super::ops;
use crate::e2e::fixture::{Daemon, Lab, eventually, succeed};

/// Part of every name that an attack tries to make where it must not.
pub const MARK: &str = "cooper-attack";
/// Longest error text that is sane.
const MAX_TEXT: usize = 8 << 10;
/// Longest time that one case may take.
const MAX_TIME: Duration = Duration::from_secs(15);

/// What has to come of an attack.
#[derive(Clone, Copy)]
pub enum End {
    /// An error whose text has all of these.
    Refused(&'static [&'static str]),
    /// A success.
    Built,
}

/// A daemon under attack.
pub struct Yard<'lab> {
    pub lab: &'lab Lab,
    pub daemon: Daemon<'lab>,
    pub client: Client,
    outside: PathBuf,
    files: BTreeMap<PathBuf, String>,
    mounts: String,
    complaints: Vec<String>,
}

impl<'lab> Yard<'lab> {
    /// Starts a daemon, and puts files beside its state directory.
    pub fn open(lab: &'lab Lab) -> Result<Self> {
        let outside = lab.dir().join("outside");
        fs::create_dir_all(outside.join("dir"))?;
        fs::write(outside.join("victim"), "untouched")?;
        let daemon = lab.daemon()?;
        let client = Client::connect(&daemon)?;
        let mut yard = Self {
            lab,
            client,
            files: walk(&outside)?,
            outside,
            mounts: String::new(),
            daemon,
            complaints: Vec::new(),
        };
        yard.run_step()?;
        yard.mounts = yard.current_mounts()?;
        Ok(yard)
    }

    /// Attacks, and looks what came of it.
    pub fn case(&mut self, name: &str, end: End, attack: impl FnOnce(&Self) -> Result<Answer>) {
        let start = Instant::now();
        let outcome = attack(self).and_then(|answer| came_of(end, answer));
        let outcome = outcome.and_then(|()| self.is_unharmed());
        let took = start.elapsed();
        if std::env::var_os("COOPER_TIMES").is_some() {
            println!("  {name}: {:.2} s", took.as_secs_f32());
        }
        let outcome = outcome.and_then(|()| {
            ensure!(took < MAX_TIME, "took {took:?}");
            Ok(())
        });
        if let Err(error) = outcome {
            self.complaints.push(format!("{name}: {error:#}"));
        }
    }

    /// Looks at the daemon once more, and tells of everything that went wrong.
    pub fn close(mut self) -> Result<()> {
        let ended = self.run_step().and_then(|()| self.forgets());
        if let Err(error) = ended {
            self.complaints.push(format!("in the end: {error:#}"));
        }
        if self.complaints.is_empty() {
            return Ok(());
        }
        let log = self.daemon.log();
        let tail: Vec<&str> = log.lines().rev().take(10).collect();
        let tail: Vec<&str> = tail.into_iter().rev().collect();
        bail!(
            "{} cases went wrong:\n{}\nthe daemon's last words:\n{}",
            self.complaints.len(),
            self.complaints.join("\n"),
            tail.join("\n")
        );
    }

    /// The same process builds, and nothing outside was touched.
    pub fn is_unharmed(&mut self) -> Result<()> {
        ensure!(self.daemon.is_running()?, "the daemon ended");
        let made = ops::mkfile(&name("file"), b"fine");
        let answer = self.client.solve(request(ops::definition(&[made])))?;
        answer.map_err(|status| anyhow::anyhow!("a harmless build failed: {}", status.message()))?;
        let files = walk(&self.outside)?;
        ensure!(files == self.files, "outside is now {files:?}");
        let state = self.lab.dir().join("daemon");
        for dir in ["/", "/tmp", "/etc", "/dev", "/root", "/var", "/run"] {
            has_no_mark(Path::new(dir))?;
        }
        has_no_mark(self.lab.dir())?;
        has_no_mark(&state)?;
        has_no_mark(&std::env::current_dir()?)
    }

    /// A step in a container still works.
    fn run_step(&self) -> Result<()> {
        let dockerfile = format!("FROM @BASE@\nRUN echo {}\n", name("step"));
        let context = self.lab.context("fine", &[("Dockerfile", &dockerfile)])?;
        succeed(&mut self.daemon.buildctl_build(&context)).map(drop)
    }

    fn current_mounts(&self) -> Result<String> {
        let path = format!("/proc/{}/mounts", self.daemon.pid());
        let mounts = fs::read_to_string(&path).context(path)?;
        let here = self.lab.dir().to_string_lossy().into_owned();
        // Others mount and unmount on the same machine.
        let ours: Vec<&str> = mounts.lines().filter(|line| line.contains(&here)).collect();
        Ok(ours.join("\n"))
    }

    /// All can be removed that attacks have left in the state directory, and nothing is mounted any more.
    fn forgets(&self) -> Result<()> {
        succeed(&mut self.daemon.buildctl(&["prune", "--all"]))?;
        self.run_step()?;
        eventually("the end of all mounts", || {
            self.current_mounts().is_ok_and(|mounts| mounts == self.mounts)
        })
    }
}

fn came_of(end: End, answer: Answer) -> Result<()> {
    let text = match (end, answer) {
        (End::Built, Ok(_)) => return Ok(()),
        (End::Built, Err(status)) => bail!("failed: {}", shortened(status.message())),
        (End::Refused(_), Ok(_)) => bail!("succeeded"),
        (End::Refused(_), Err(status)) => status.message().to_owned(),
    };
    let End::Refused(parts) = end else { return Ok(()) };
    ensure!(text.len() <= MAX_TEXT, "the error is {} bytes long", text.len());
    for part in parts {
        ensure!(text.contains(part), "{part:?} is not in {:?}", shortened(&text));
    }
    Ok(())
}

fn shortened(text: &str) -> String {
    text.chars().take(400).collect()
}

/// All below a directory with what matters of it.
fn walk(dir: &Path) -> Result<BTreeMap<PathBuf, String>> {
    let mut found = BTreeMap::new();
    let mut pending = vec![dir.to_owned()];
    while let Some(path) = pending.pop() {
        let stat = fs::symlink_metadata(&path)?;
        let content = if stat.is_file() {
            fs::read(&path)?
        } else {
            Vec::new()
        };
        if stat.is_dir() {
            for entry in fs::read_dir(&path)? {
                pending.push(entry?.path());
            }
        }
        let told = format!(
            "{:o} {}:{} {} {} {content:?}",
            stat.mode(),
            stat.uid(),
            stat.gid(),
            stat.nlink(),
            stat.mtime_nsec()
        );
        found.insert(path, told);
    }
    Ok(found)
}

fn has_no_mark(dir: &Path) -> Result<()> {
    for entry in fs::read_dir(dir)? {
        let name = entry?.file_name();
        let is_attack = name.to_string_lossy().contains(MARK);
        ensure!(!is_attack, "{} was made in {}", name.display(), dir.display());
    }
    Ok(())
}

/// An attack by a definition alone.
pub struct DefinitionCase {
    pub name: &'static str,
    pub make: fn(&Lab) -> pb::Definition,
    pub end: End,
}

//! Many builds over few cache mounts, of which some are given up or killed while they wait for a mount or have it.
//!
//! `COOPER_SEED` sets who asks for what and who is cancelled when, `COOPER_BUILDS` how many builds there are.

use std::fs;
use std::path::Path;
use std::process::Stdio;
use std::sync::Mutex;
use std::time::Duration;

use anyhow::{Context as _, Result, anyhow, bail, ensure};
use llb::pb;
use llb::pb::CacheSharingOpt::{Locked, Private, Shared};

use super::fixture::{Daemon, Lab, eventually, expect, expect_not, processes_of, succeed};
use super::hostile::client::{Client, Files, request};
use super::hostile::ops::{definition, exec, image, mount};
use super::store::{Random, number};
use super::{Need, Scenario};

/// This file's scenarios.
pub const SCENARIOS: &[Scenario] = &[Scenario {
    name: "cache-mounts-of-cancelled-builds",
    needs: &[Need::Root],
    run,
}];

const IDS: u64 = 20;
const BUILDS: usize = 50;
/// How many builds run at once.
const PARALLEL: usize = 8;
/// Longest patience of a client that gives up, in milliseconds.
const MAX_PATIENCE_MS: u64 = 250;

/// Who else may have an id's directory.
fn sharing(id: u64) -> pb::CacheSharingOpt {
    [Locked, Shared, Private][(id % 3) as usize]
}

/// How a build comes to its end.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum End {
    /// By its own.
    Done,
    /// Its client takes back the call and ends the session, wherever the build is.
    GivenUp(Duration),
    /// Its client is killed while the step runs.
    Killed,
}

#[derive(Debug)]
struct Build {
    name: String,
    ids: Vec<u64>,
    end: End,
}

impl Build {
    fn draw(random: &mut Random, index: usize) -> Self {
        let mut ids: Vec<u64> = (0..=random.below(3)).map(|_| random.below(IDS)).collect();
        ids.sort_unstable();
        ids.dedup();
        let end = match random.below(5) {
            0 => End::GivenUp(Duration::from_millis(random.below(MAX_PATIENCE_MS))),
            1 => End::Killed,
            _ => End::Done,
        };
        // What follows tells one name from the beginning of another.
        let name = format!("build{index}-of-many");
        Self { name, ids, end }
    }

    /// What its step does. Whoever has a directory alone writes its name there, and must find it there a while later. Only
    /// the steps that are not cancelled may say so with a directory, since the others have no time to remove it.
    fn script(&self) -> String {
        let name = &self.name;
        let dirs =
            |ids: &mut dyn Iterator<Item = &u64>| -> String { ids.map(|id| format!("/c{id} ")).collect() };
        let all = dirs(&mut self.ids.iter());
        let alone = dirs(&mut self.ids.iter().filter(|id| sharing(**id) != Shared));
        if self.end == End::Done {
            return format!(
                "for d in {alone}; do mkdir $d/held && echo {name} > $d/owner || exit 1; done; usleep 10000; \
                 for d in {alone}; do [ \"$(cat $d/owner)\" = {name} ] && rmdir $d/held || exit 1; done; \
                 for d in {all}; do echo {name} >> $d/log-${{d#/c}}; done"
            );
        }
        format!(
            "while :; do for d in {alone}; do echo {name} > $d/owner; done; usleep 1000; \
             for d in {alone}; do [ \"$(cat $d/owner)\" = {name} ] && ! [ -e $d/held ] || touch $d/broken; done; done"
        )
    }

    fn definition(&self, lab: &Lab) -> pb::Definition {
        let caches = self.ids.iter().map(|id| (*id, sharing(*id)));
        step(lab, &self.script(), caches)
    }

    /// Runs it to its end, which it must come to as planned.
    fn run(&self, lab: &Lab, daemon: &Daemon<'_>, client: &Client) -> Result<()> {
        let definition = self.definition(lab);
        match self.end {
            End::Done => {
                let answer = client.solve(request(definition))?;
                answer.map_err(|status| anyhow!("{}", status.message()))?;
            }
            End::GivenUp(patience) => {
                let files = Files::honest(Vec::new(), Vec::new());
                if let Some(answer) = client.give_up(files, request(definition), patience)? {
                    bail!("it came to {answer:?}");
                }
            }
            End::Killed => self.kill(lab, daemon, &definition)?,
        }
        Ok(())
    }

    /// Kills the client once the step runs.
    fn kill(&self, lab: &Lab, daemon: &Daemon<'_>, definition: &pb::Definition) -> Result<()> {
        let log = lab.dir().join(&self.name);
        let mut build = daemon.buildctl_definition(&self.name, definition)?;
        let mut build = build
            .stdout(Stdio::null())
            .stderr(fs::File::create(&log)?)
            .spawn()?;
        let runs = eventually("the step", || !processes_of(&self.name).is_empty());
        build.kill()?;
        build.wait()?;
        runs.with_context(|| fs::read_to_string(&log).unwrap_or_default())
    }
}

/// A step on cache mounts, which are at `/c` and their id.
fn step(lab: &Lab, script: &str, caches: impl Iterator<Item = (u64, pb::CacheSharingOpt)>) -> pb::Definition {
    let base = image(&lab.busybox());
    let step = exec(&[&base], script, |exec, _| {
        exec.mounts.extend(caches.map(|(id, sharing)| pb::Mount {
            cache_opt: Some(pb::CacheOpt {
                id: format!("id{id}"),
                sharing: sharing.into(),
            }),
            ..mount(pb::MountType::Cache, &format!("/c{id}"))
        }));
    });
    definition(&[base, step])
}

fn run(lab: &Lab) -> Result<()> {
    let daemon = lab.daemon()?;
    let client = Client::connect(&daemon)?;
    let mut random = Random::new()?;
    let count = number("COOPER_BUILDS")?.unwrap_or(BUILDS);
    let builds: Vec<Build> = (0..count).map(|index| Build::draw(&mut random, index)).collect();
    let cancelled = builds.iter().filter(|build| build.end != End::Done).count();
    println!("  {cancelled} of {count} builds are cancelled");
    run_all(lab, &daemon, &client, &builds)?;
    all_are_free(lab, &daemon)?;
    nothing_is_lost(lab, &builds)?;
    nobody_holds_any(&daemon)
}

/// Runs builds in their order, some at once.
fn run_all(lab: &Lab, daemon: &Daemon<'_>, client: &Client, builds: &[Build]) -> Result<()> {
    let queue = Mutex::new(builds.iter());
    let next = || queue.lock().ok()?.next();
    let work = || -> Result<()> {
        while let Some(build) = next() {
            build
                .run(lab, daemon, client)
                .with_context(|| format!("{build:?}"))?;
        }
        Ok(())
    };
    std::thread::scope(|scope| {
        let workers: Vec<_> = (0..PARALLEL).map(|_| scope.spawn(work)).collect();
        workers.into_iter().try_for_each(|worker| {
            let outcome = worker.join();
            outcome.unwrap_or_else(|_| bail!("a worker panicked"))
        })
    })
}

/// One more step gets all ids for itself; it leaves what it finds in `out`.
fn all_are_free(lab: &Lab, daemon: &Daemon<'_>) -> Result<()> {
    let script = "for d in /c*; do ! [ -e $d/held ] && ! [ -e $d/broken ] || exit 1; cp $d/log-${d#/c} /seen-${d#/c} || true; done";
    let definition = step(lab, script, (0..IDS).map(|id| (id, Locked)));
    let mut build = daemon.buildctl_definition("last", &definition)?;
    let out = lab.dir().join("out");
    succeed(build.arg(format!("--output=type=local,dest={}", out.display()))).map(drop)
}

/// What a step that came to its end wrote is what the last step saw, or lies in another of an id's private directories.
fn nothing_is_lost(lab: &Lab, builds: &[Build]) -> Result<()> {
    for id in 0..IDS {
        let name = format!("log-{id}");
        let seen = if sharing(id) == Private {
            all_of_name(&lab.dir().join("daemon/snapshots"), &name)?
        } else {
            fs::read_to_string(lab.dir().join(format!("out/seen-{id}"))).unwrap_or_default()
        };
        let mut seen: Vec<&str> = seen.lines().collect();
        seen.sort_unstable();
        let done = builds.iter().filter(|build| build.end == End::Done);
        let mut written: Vec<&str> = done
            .filter(|build| build.ids.contains(&id))
            .map(|build| build.name.as_str())
            .collect();
        written.sort_unstable();
        ensure!(
            seen == written,
            "{:?} id {id} has {seen:?}, not {written:?}",
            sharing(id)
        );
    }
    Ok(())
}

/// What all files of a name below a directory have together.
fn all_of_name(dir: &Path, name: &str) -> Result<String> {
    let mut all = String::new();
    let mut pending = vec![dir.to_owned()];
    while let Some(dir) = pending.pop() {
        for entry in fs::read_dir(&dir)? {
            let entry = entry?;
            if entry.file_type()?.is_dir() {
                pending.push(entry.path());
            } else if entry.file_name() == name {
                all += &fs::read_to_string(entry.path())?;
            }
        }
    }
    Ok(all)
}

/// All directories can be removed, which none can that is in use.
fn nobody_holds_any(daemon: &Daemon<'_>) -> Result<()> {
    let kind = ["--filter", "type==exec.cachemount"];
    let found = succeed(daemon.buildctl(&["du", "-v"]).args(kind))?;
    expect(&found, "exec.cachemount")?;
    succeed(daemon.buildctl(&["prune"]).args(kind))?;
    let left = succeed(daemon.buildctl(&["du", "-v"]).args(kind))?;
    expect_not(&left, "exec.cachemount")
}

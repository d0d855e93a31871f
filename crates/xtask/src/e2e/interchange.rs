//! Caches between our daemon and BuildKit's: what either exports serves the other as well as it serves itself.
//!
//! Each project has a step whose outcome is random: what an import yields is compared with what the exporter made, so that a
//! step that is only said to be cached is noticed.

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Child, Command};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use serde_json::Value;

use super::fixture::{Lab, succeed};
use super::{Need, Scenario};

const NEEDS: &[Need] = &[Need::Root, Need::ForeignDaemon];

/// This file's scenarios.
pub const SCENARIOS: &[Scenario] = &[
    Scenario {
        name: "interchange-stages",
        needs: NEEDS,
        run: stages,
    },
    Scenario {
        name: "interchange-links",
        needs: NEEDS,
        run: links,
    },
    Scenario {
        name: "interchange-platforms",
        needs: NEEDS,
        run: platforms,
    },
];

/// How long a daemon may take to answer first.
const START_LIMIT: Duration = Duration::from_secs(30);

/// A chain of steps on files of the context, and a file of another stage.
const STAGES: &str = r#"FROM @BASE@ AS made
WORKDIR /w
COPY a.txt ./
RUN cat a.txt > chained && od -An -tx1 -N16 /dev/urandom > random
RUN cat chained chained > doubled
FROM @BASE@
RUN echo own > /own
COPY --from=made /w/random /w/doubled /got/
COPY b.txt /got/
RUN cat /got/b.txt /got/random > /result
"#;

/// Layers that stand on nothing, merged with those below.
const LINKS: &str = r#"FROM @BASE@ AS made
RUN od -An -tx1 -N16 /dev/urandom > /random
FROM @BASE@ AS other
RUN mkdir /tree && echo leaf > /tree/leaf
FROM @BASE@
COPY --link a.txt /linked/
COPY --link --from=made /random /linked/
COPY --link --from=other /tree /linked/tree
RUN cat /linked/random /linked/tree/leaf > /result
"#;

/// Two platforms whose steps run on this machine's. They share none: that would have the name of whichever came first.
const PLATFORMS: &str = r#"FROM --platform=$BUILDPLATFORM @BASE@ AS made
ARG TARGETARCH
RUN (echo $TARGETARCH && od -An -tx1 -N16 /dev/urandom) > /result
COPY a.txt /
FROM scratch
COPY --from=made /result /a.txt /
COPY b.txt /
"#;

fn stages(lab: &Lab) -> Result<()> {
    Interchange::new(lab, STAGES, &[], &["result"])?.run(8)
}

fn links(lab: &Lab) -> Result<()> {
    Interchange::new(lab, LINKS, &[], &["result"])?.run(6)
}

fn platforms(lab: &Lab) -> Result<()> {
    let opt = ["--opt=platform=linux/amd64,linux/arm64"];
    Interchange::new(
        lab,
        PLATFORMS,
        &opt,
        &["linux_amd64/result", "linux_arm64/result"],
    )?
    .run(8)
}

/// Whose daemon.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
enum Kind {
    Own,
    Foreign,
}

const KINDS: [Kind; 2] = [Kind::Own, Kind::Foreign];

impl Kind {
    /// Tells its caches from the other's.
    fn tag(self) -> &'static str {
        match self {
            Self::Own => "own",
            Self::Foreign => "foreign",
        }
    }
}

/// One project, exported by either daemon.
struct Interchange<'lab> {
    lab: &'lab Lab,
    context: PathBuf,
    options: Vec<String>,
    /// The files of the result that are compared.
    files: Vec<String>,
}

/// What a build came to.
struct Built {
    /// Names of the Dockerfile's steps.
    steps: BTreeSet<String>,
    /// Those that were cached.
    cached: BTreeSet<String>,
    /// The compared files.
    files: Vec<String>,
}

impl<'lab> Interchange<'lab> {
    fn new(lab: &'lab Lab, dockerfile: &str, options: &[&str], files: &[&str]) -> Result<Self> {
        let context = lab.context(
            "c",
            &[("Dockerfile", dockerfile), ("a.txt", "a\n"), ("b.txt", "b\n")],
        )?;
        let owned = |all: &[&str]| all.iter().map(|&one| one.to_owned()).collect();
        Ok(Self {
            lab,
            context,
            options: owned(options),
            files: owned(files),
        })
    }

    /// Exports by both, imports by both; `count` is the number of the project's steps, all of which a large cache has.
    fn run(&self, count: usize) -> Result<()> {
        for form in ["registry", "local", "inline"] {
            let mut reached = BTreeMap::new();
            for exporter in KINDS {
                let made = self.export(exporter, form)?;
                ensure!(made.steps.len() == count, "{:?}", made.steps);
                for importer in KINDS {
                    let found = self.import(exporter, importer, form)?;
                    let way = format!("{form}, from {exporter:?} to {importer:?}");
                    ensure!(found.files == made.files, "{way}: the result is another");
                    ensure!(found.steps == made.steps, "{way}: {:?}", found.steps);
                    reached.insert((exporter, importer), found.cached);
                }
            }
            compare(form, count, &reached)?;
        }
        Ok(())
    }

    /// Builds on an empty daemon and exports the cache.
    fn export(&self, exporter: Kind, form: &str) -> Result<Built> {
        let mut arguments = vec![format!(
            "--output=type=image,name={},push=true",
            self.name(exporter, form)
        )];
        arguments.push(match form {
            "inline" => "--export-cache=type=inline".to_owned(),
            "local" => format!("--export-cache=type=local,mode=max,dest={}", self.dir(exporter)),
            _ => format!(
                "--export-cache=type=registry,mode=max,ref={}-cache",
                self.name(exporter, form)
            ),
        });
        let daemon = Daemon::start(self.lab, exporter)?;
        let built = self.build(&daemon, &arguments)?;
        ensure!(
            built.cached.is_empty(),
            "{exporter:?} was not empty: {:?}",
            built.cached
        );
        // What was made is what the exporter has now.
        self.build(&daemon, &[])
    }

    /// Builds on an empty daemon with a cache.
    fn import(&self, exporter: Kind, importer: Kind, form: &str) -> Result<Built> {
        let import = match form {
            "inline" => format!("type=registry,ref={}", self.name(exporter, form)),
            "local" => format!("type=local,src={}", self.dir(exporter)),
            _ => format!("type=registry,ref={}-cache", self.name(exporter, form)),
        };
        let daemon = Daemon::start(self.lab, importer)?;
        self.build(&daemon, &[format!("--import-cache={import}")])
    }

    fn name(&self, exporter: Kind, form: &str) -> String {
        let tag = exporter.tag();
        format!("{}/{form}:{tag}", self.lab.registry())
    }

    fn dir(&self, exporter: Kind) -> String {
        self.lab.dir().join(exporter.tag()).display().to_string()
    }

    /// Builds; without an output of its own the result goes into a directory, and its files are read.
    fn build(&self, daemon: &Daemon<'_>, arguments: &[String]) -> Result<Built> {
        let out = self.lab.dir().join("out");
        let has_output = arguments.iter().any(|argument| argument.starts_with("--output"));
        let mut command = daemon.client(&["build", "--progress=rawjson", "--frontend=dockerfile.v0"]);
        let context = self.context.display();
        command
            .arg(format!("--local=context={context}"))
            .arg(format!("--local=dockerfile={context}"))
            .args(&self.options)
            .args(arguments);
        if !has_output {
            command.arg(format!("--output=type=local,dest={}", out.display()));
        }
        let (steps, cached) = steps_of(&succeed(&mut command)?)?;
        let mut files = Vec::new();
        if !has_output {
            for file in &self.files {
                files.push(fs::read_to_string(out.join(file)).with_context(|| file.clone())?);
            }
            fs::remove_dir_all(&out)?;
        }
        Ok(Built { steps, cached, files })
    }
}

/// Requires that neither exporter and neither importer loses what the others reach.
fn compare(form: &str, count: usize, reached: &BTreeMap<(Kind, Kind), BTreeSet<String>>) -> Result<()> {
    let own = &reached[&(Kind::Own, Kind::Own)];
    let foreign = &reached[&(Kind::Foreign, Kind::Foreign)];
    for ((exporter, importer), cached) in reached {
        for at_least in [own, foreign] {
            let lost: Vec<_> = at_least.difference(cached).collect();
            ensure!(
                lost.is_empty(),
                "{form}, from {exporter:?} to {importer:?}: not cached are {lost:?}, but {cached:?}"
            );
        }
    }
    let least = if form == "inline" { 1 } else { count };
    ensure!(own.len() >= least, "{form}: only {own:?} are cached");
    Ok(())
}

/// The Dockerfile's steps of a build's progress, and those of them that were cached. Base images are neither.
fn steps_of(progress: &str) -> Result<(BTreeSet<String>, BTreeSet<String>)> {
    let (mut steps, mut cached) = (BTreeSet::new(), BTreeSet::new());
    for line in progress.lines().filter(|line| line.starts_with('{')) {
        let status: Value = serde_json::from_str(line).with_context(|| line.to_owned())?;
        for vertex in status["vertexes"].as_array().into_iter().flatten() {
            let name = vertex["name"].as_str().unwrap_or_default();
            let is_step = name.starts_with('[')
                && ["] RUN ", "] COPY ", "] WORKDIR "]
                    .iter()
                    .any(|mark| name.contains(mark));
            if !is_step {
                continue;
            }
            steps.insert(name.to_owned());
            if vertex["cached"] == true {
                cached.insert(name.to_owned());
            }
        }
    }
    Ok((steps, cached))
}

/// A daemon on an empty directory, which goes with it.
struct Daemon<'lab> {
    lab: &'lab Lab,
    root: PathBuf,
    child: Child,
}

impl<'lab> Daemon<'lab> {
    fn start(lab: &'lab Lab, kind: Kind) -> Result<Self> {
        let root = lab.dir().join("peer");
        fs::create_dir(&root)?;
        let log = fs::File::create(root.join("log"))?;
        let child = command(lab, kind, &root)?
            .stdout(log.try_clone()?)
            .stderr(log)
            .spawn()
            .with_context(|| format!("starting the daemon: {kind:?}"))?;
        let mut daemon = Self { lab, root, child };
        let start = Instant::now();
        while !daemon.client(&["debug", "workers"]).output()?.status.success() {
            if daemon.child.try_wait()?.is_some() || start.elapsed() > START_LIMIT {
                let log = fs::read_to_string(daemon.root.join("log")).unwrap_or_default();
                bail!("the daemon does not answer: {kind:?}:\n{log}");
            }
        }
        Ok(daemon)
    }

    /// Our client against this daemon.
    fn client(&self, arguments: &[&str]) -> Command {
        let mut command = self.lab.command("buildctl");
        command.arg("--addr").arg(address(&self.root)).args(arguments);
        command
    }
}

impl Drop for Daemon<'_> {
    fn drop(&mut self) {
        let id = self.child.id().to_string();
        let _ = Command::new("kill").args(["-TERM", &id]).status();
        let _ = self.child.wait();
        let _ = fs::remove_dir_all(&self.root);
    }
}

fn address(root: &Path) -> String {
    format!("unix://{}", root.join("sock").display())
}

fn command(lab: &Lab, kind: Kind, root: &Path) -> Result<Command> {
    let mut command = match kind {
        Kind::Own => lab.command("cooperd"),
        Kind::Foreign => lab.foreign_daemon()?,
    };
    if kind == Kind::Foreign {
        let config = root.join("config.toml");
        fs::write(
            &config,
            format!("[registry.\"{}\"]\n  http = true\n", lab.registry()),
        )?;
        command
            .arg("--config")
            .arg(config)
            .args(["--containerd-worker=false", "--oci-worker-net=host"]);
    }
    command
        .arg("--root")
        .arg(root.join("state"))
        .arg("--addr")
        .arg(address(root));
    Ok(command)
}

//! The store under stress: kills, damage, full disks, caps, many builds at once and one after another.
//!
//! Sizes are modest by default. `COOPER_KILLS`, `COOPER_PARALLEL` and `COOPER_BUILDS` set them, as `COOPER_SEED` sets the moments
//! of the kills.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use anyhow::{Context, Result, ensure};

use super::fixture::{Daemon, Lab, cached_steps, eventually, expect, fail, succeed, text};
use super::{Need, Scenario};

/// This file's scenarios.
pub const SCENARIOS: &[Scenario] = &[
    Scenario {
        name: "kills-at-random-moments",
        needs: &[Need::Root],
        run: random_kills,
    },
    Scenario {
        name: "damage-on-disk-is-noticed",
        needs: &[Need::Root],
        run: damage,
    },
    Scenario {
        name: "full-disk-is-survived",
        needs: &[Need::Root],
        run: full_disk,
    },
    Scenario {
        name: "cap-holds-during-builds",
        needs: &[Need::Root],
        run: cap,
    },
    Scenario {
        name: "prune-during-builds",
        needs: &[Need::Root],
        run: prune_during_builds,
    },
    Scenario {
        name: "parallel-builds-run-shared-steps-once",
        needs: &[Need::Root],
        run: parallel_builds,
    },
    Scenario {
        name: "locked-mounts-never-deadlock",
        needs: &[Need::Root],
        run: locked_mounts,
    },
    Scenario {
        name: "many-builds-leave-nothing-in-memory",
        needs: &[Need::Root],
        run: many_builds,
    },
];

/// Longest time the kills take when their number is not given.
const KILLS_LIMIT: Duration = Duration::from_secs(45);
/// Lines the steps of a killed build leave.
const LINES: usize = 6;

/// The number in a variable of the environment.
pub(super) fn number(name: &str) -> Result<Option<usize>> {
    let Ok(value) = std::env::var(name) else {
        return Ok(None);
    };
    Ok(Some(value.parse().with_context(|| format!("{name}={value}"))?))
}

/// Numbers that look random; the same for the same seed.
pub(super) struct Random(u64);

impl Random {
    pub(super) fn new() -> Result<Self> {
        let seed = match number("COOPER_SEED")? {
            Some(seed) => u64::try_from(seed)?,
            None => u64::try_from(SystemTime::now().duration_since(UNIX_EPOCH)?.as_nanos() % 1_000_000)?,
        };
        println!("  COOPER_SEED={seed}");
        Ok(Self(seed))
    }

    pub(super) fn below(&mut self, limit: u64) -> u64 {
        // Knuth's constants for a linear congruence.
        self.0 = self
            .0
            .wrapping_mul(6_364_136_223_846_793_005)
            .wrapping_add(1_442_695_040_888_963_407);
        (self.0 >> 33) % limit.max(1)
    }
}

fn to_directory(command: &mut Command, out: &Path) -> Result<String> {
    succeed(command.arg(format!("--output=type=local,dest={}", out.display())))
}

fn to_archive(command: &mut Command, out: &Path) -> Result<String> {
    succeed(command.arg(format!("--output=type=oci,dest={}", out.display())))
}

fn start(command: &mut Command) -> Result<Child> {
    Ok(command.stdout(Stdio::piped()).stderr(Stdio::piped()).spawn()?)
}

fn wait_all(builds: Vec<Child>) -> Result<()> {
    for build in builds {
        let output = build.wait_with_output()?;
        ensure!(output.status.success(), "{}", text(&output));
    }
    Ok(())
}

fn random_kills(lab: &Lab) -> Result<()> {
    let given = number("COOPER_KILLS")?;
    let (rounds, began) = (given.unwrap_or(12), Instant::now());
    let mut random = Random::new()?;
    let mut daemon = lab.daemon()?;
    let mut build_ms = 1500;
    for round in 0..rounds {
        if given.is_none() && began.elapsed() > KILLS_LIMIT {
            break;
        }
        let context = killed_context(lab, round)?;
        let mut build = daemon.buildctl_build(&context);
        let archive = lab.dir().join("killed.tar");
        build.arg(format!("--output=type=oci,dest={}", archive.display()));
        let mut build = build.stdout(Stdio::null()).stderr(Stdio::null()).spawn()?;
        std::thread::park_timeout(Duration::from_millis(random.below(build_ms)));
        daemon.kill()?;
        build.wait()?;
        // The first look repairs; after that nothing may be missing, and nothing left over.
        daemon.verify()?;
        let again = daemon.verify()?;
        expect(&again, "0 refs forgotten, 0 snapshots and 0 blobs removed")?;
        daemon.start_again()?;
        let rebuilt = Instant::now();
        check_killed(lab, &daemon, &context, round)?;
        build_ms = u64::try_from(rebuilt.elapsed().as_millis())?.max(500);
    }
    Ok(())
}

fn killed_context(lab: &Lab, round: usize) -> Result<PathBuf> {
    let dockerfile = format!(
        "FROM @BASE@\nCOPY src /src\nRUN --mount=type=cache,target=/m echo {round} >> /m/log\n{}",
        "RUN echo x >> /log && head -c 300000 /dev/urandom > /big\n".repeat(LINES)
    );
    let context = lab.context("killed", &[("Dockerfile", &dockerfile)])?;
    fs::create_dir_all(context.join("src"))?;
    for index in 0..20 {
        fs::write(context.join(format!("src/f{index}")), format!("{round} {index}"))?;
    }
    Ok(context)
}

fn check_killed(lab: &Lab, daemon: &Daemon<'_>, context: &Path, round: usize) -> Result<()> {
    let out = lab.dir().join("out");
    if out.exists() {
        fs::remove_dir_all(&out)?;
    }
    to_directory(&mut daemon.buildctl_build(context), &out)?;
    let log = fs::read_to_string(out.join("log"))?;
    ensure!(
        log.lines().count() == LINES,
        "round {round}: a step was lost or ran twice: {log}"
    );
    for index in 0..20 {
        let file = fs::read_to_string(out.join(format!("src/f{index}")))?;
        ensure!(
            file == format!("{round} {index}"),
            "round {round}: f{index} is {file:?}"
        );
    }
    let archive = lab.dir().join("whole.tar");
    let again = to_archive(&mut daemon.buildctl_build(context), &archive)?;
    ensure!(cached_steps(&again) == LINES + 2, "round {round}: {again}");
    check_archive(lab, &archive)
}

/// Requires that every blob of an OCI archive has its digest.
fn check_archive(lab: &Lab, archive: &Path) -> Result<()> {
    let dir = lab.dir().join("layout");
    if dir.exists() {
        fs::remove_dir_all(&dir)?;
    }
    fs::create_dir(&dir)?;
    succeed(Command::new("tar").arg("-xf").arg(archive).arg("-C").arg(&dir))?;
    for entry in fs::read_dir(dir.join("blobs/sha256"))? {
        let path = entry?.path();
        let digest = oci::Digest::sha256(fs::read(&path)?);
        let name = path.file_name().unwrap_or_default();
        ensure!(
            name == digest.hex().as_str(),
            "{} has digest {digest}",
            path.display()
        );
    }
    Ok(())
}

/// Files of the daemon's state below `sub`, largest first.
fn files(lab: &Lab, sub: &str) -> Result<Vec<PathBuf>> {
    let mut found = Vec::new();
    for entry in fs::read_dir(lab.dir().join("daemon").join(sub))? {
        let entry = entry?;
        found.push((entry.metadata()?.len(), entry.path()));
    }
    found.sort();
    Ok(found.into_iter().rev().map(|(_, path)| path).collect())
}

/// Requires that of the daemon's state nothing can be changed by other users, nor looked into.
fn nobody_else_may_write(lab: &Lab) -> Result<()> {
    use std::os::unix::fs::MetadataExt;
    for entry in fs::read_dir(lab.dir().join("daemon"))? {
        let entry = entry?;
        let mode = entry.metadata()?.mode();
        ensure!(mode & 0o022 == 0, "{} has mode {mode:o}", entry.path().display());
    }
    Ok(())
}

fn damage(lab: &Lab) -> Result<()> {
    let dockerfile = "FROM @BASE@\nCOPY a.txt /a.txt\nRUN head -c 2000000 /dev/zero | tr '\\0' x > /big && cat /a.txt > /b.txt\n";
    let context = lab.context("c", &[("Dockerfile", dockerfile), ("a.txt", "right")])?;
    let mut daemon = lab.daemon()?;
    let (out, archive) = (lab.dir().join("out"), lab.dir().join("a.tar"));
    to_archive(&mut daemon.buildctl_build(&context), &archive)?;

    // One bit of every blob: the first export may say so, the next has made or fetched them again.
    daemon.stop()?;
    nobody_else_may_write(lab)?;
    let blobs = files(lab, "content/blobs/sha256")?;
    ensure!(!blobs.is_empty(), "no blob is kept");
    for blob in &blobs {
        let mut bytes = fs::read(blob)?;
        let middle = bytes.len() / 2;
        bytes[middle] ^= 1;
        fs::write(blob, bytes)?;
    }
    let (_, found) = fail(&mut daemon.verify_command())?;
    expect(&found, "damaged")?;
    daemon.start_again()?;
    let mut attempts = 0;
    loop {
        let mut build = daemon.buildctl_build(&context);
        let output = build
            .arg(format!("--output=type=oci,dest={}", archive.display()))
            .output()?;
        if output.status.success() {
            break;
        }
        expect(&text(&output), "the stored bytes have digest")?;
        attempts += 1;
        ensure!(attempts <= blobs.len(), "{}", text(&output));
    }
    check_archive(lab, &archive)?;

    // Every blob removed.
    for blob in files(lab, "content/blobs/sha256")? {
        fs::remove_file(blob)?;
    }
    to_archive(&mut daemon.buildctl_build(&context), &archive)?;
    check_archive(lab, &archive)?;

    // The snapshots removed one at a time, below the running daemon.
    for snapshot in files(lab, "snapshots/overlayfs/committed")? {
        // One that stood on a lost one is gone with it.
        if fs::remove_dir_all(&snapshot).is_err() {
            ensure!(!snapshot.exists(), "{} cannot be removed", snapshot.display());
            continue;
        }
        to_directory(&mut daemon.buildctl_build(&context), &out)?;
        expect(&fs::read_to_string(out.join("b.txt"))?, "right")?;
        ensure!(
            fs::metadata(out.join("big"))?.len() == 2_000_000,
            "a part is missing"
        );
        fs::remove_dir_all(&out)?;
    }
    daemon.stop()?;
    succeed(&mut daemon.verify_command())?;
    Ok(())
}

/// A small file system below a directory, unmounted when dropped.
pub(super) struct SmallDisk(PathBuf);

impl SmallDisk {
    pub(super) fn mount(at: PathBuf, megabytes: usize) -> Result<Self> {
        fs::create_dir_all(&at)?;
        let size = format!("size={megabytes}m");
        succeed(
            Command::new("mount")
                .args(["-t", "tmpfs", "-o", &size, "tmpfs"])
                .arg(&at),
        )?;
        Ok(Self(at))
    }
}

impl Drop for SmallDisk {
    fn drop(&mut self) {
        let _ = Command::new("umount").arg("-l").arg(&self.0).status();
    }
}

fn full_disk(lab: &Lab) -> Result<()> {
    let disk = SmallDisk::mount(lab.dir().join("daemon"), 96)?;
    let daemon = lab.daemon()?;
    let context = |name: &str, step: &str| {
        let dockerfile = format!("FROM @BASE@\nRUN {step}\n");
        lab.context(name, &[("Dockerfile", &dockerfile)])
    };
    let small = context("small", "echo 1 > /one")?;
    succeed(&mut daemon.buildctl_build(&small))?;
    let big = context("big", "dd if=/dev/zero of=/big bs=1M count=200")?;
    let (_, failure) = fail(&mut daemon.buildctl_build(&big))?;
    expect(&failure, "No space left")?;
    // Nothing has to be restarted, and what the failed step wrote is gone.
    let next = context("next", "dd if=/dev/zero of=/part bs=1M count=30")?;
    let mut last = Ok(());
    let builds = eventually("room is made", || {
        last = succeed(&mut daemon.buildctl_build(&next)).map(drop);
        last.is_ok()
    });
    last?;
    builds?;
    // Someone else fills the disk to the last block.
    let filler = disk.0.join("filler");
    let _ = Command::new("dd")
        .args(["if=/dev/zero", "bs=64k"])
        .arg(format!("of={}", filler.display()))
        .stderr(Stdio::null())
        .status()?;
    let other = context("other", "echo 2 > /two && dd if=/dev/zero of=/part bs=1M count=2")?;
    let (_, failure) = fail(&mut daemon.buildctl_build(&other))?;
    expect(&failure.to_lowercase(), "no space left")?;
    // Pruning makes room, even though there is none to write down what goes.
    let mut left = String::new();
    eventually("the cache is pruned on a full disk", || {
        succeed(&mut daemon.buildctl(&["prune", "--all"])).is_ok_and(|pruned| {
            left = pruned;
            true
        })
    })?;
    expect(&left, "Total:")?;
    succeed(&mut daemon.buildctl_build(&other))?;
    drop(daemon);
    Ok(())
}

fn cap(lab: &Lab) -> Result<()> {
    let config = lab.dir().join("capped.toml");
    let policy =
        "[worker.oci]\n  gc = true\n[[worker.oci.gcpolicy]]\n  all = true\n  maxUsedSpace = \"40MB\"\n";
    fs::write(&config, policy)?;
    let config = config.to_string_lossy().into_owned();
    let daemon = lab.daemon_with(&["--config", &config])?;
    let used = || -> Result<u64> {
        let listed = succeed(
            Command::new("du")
                .args(["-s", "-B1"])
                .arg(lab.dir().join("daemon")),
        )?;
        Ok(listed.split_whitespace().next().unwrap_or_default().parse()?)
    };
    let fill = "head -c 30000000 /dev/urandom > /big";
    let first = lab.context("first", &[("Dockerfile", &format!("FROM @BASE@\nRUN {fill}\n"))])?;
    succeed(&mut daemon.buildctl_build(&first))?;
    // The second fills as much and then stays until it is told to go on.
    let wait = "RUN --mount=type=cache,id=sync,target=/sync while [ ! -e /sync/go ]; do :; done\n";
    let second = format!("FROM @BASE@\nRUN {fill} && echo second\n{wait}");
    let second = lab.context("second", &[("Dockerfile", &second)])?;
    let running = start(&mut daemon.buildctl_build(&second))?;
    let capped = eventually("the cap holds while a build runs", || {
        used().is_ok_and(|used| used < 45_000_000) && second_is_kept(&daemon)
    });
    let go = lab.context(
        "go",
        &[(
            "Dockerfile",
            "FROM @BASE@\nRUN --mount=type=cache,id=sync,target=/sync touch /sync/go\n",
        )],
    )?;
    succeed(&mut daemon.buildctl_build(&go))?;
    wait_all(vec![running])?;
    capped
}

/// Whether the listing has the step that the second build made, and not the one of the first.
fn second_is_kept(daemon: &Daemon<'_>) -> bool {
    let listed = succeed(&mut daemon.buildctl(&["du", "-v"])).unwrap_or_default();
    let fills = listed.matches("head -c 30000000").count();
    fills == 1 && listed.contains("echo second")
}

fn prune_during_builds(lab: &Lab) -> Result<()> {
    let daemon = lab.daemon()?;
    let mut contexts = Vec::new();
    for index in 0..6 {
        let steps = "RUN echo x >> /log\n".repeat(5);
        let dockerfile = format!("FROM @BASE@\nCOPY a.txt /a\nRUN echo {} > /n\n{steps}", index % 3);
        contexts.push(lab.context(
            &format!("c{index}"),
            &[("Dockerfile", &dockerfile), ("a.txt", "a")],
        )?);
    }
    for round in 0..2 {
        let mut builds = Vec::new();
        for (index, context) in contexts.iter().enumerate() {
            let out = lab.dir().join(format!("out{round}-{index}"));
            builds.push(start(
                daemon
                    .buildctl_build(context)
                    .arg(format!("--output=type=local,dest={}", out.display())),
            )?);
        }
        while builds
            .iter_mut()
            .any(|build| matches!(build.try_wait(), Ok(None)))
        {
            succeed(&mut daemon.buildctl(&["prune", "--all"]))?;
        }
        wait_all(builds)?;
        for index in 0..contexts.len() {
            let out = lab.dir().join(format!("out{round}-{index}"));
            expect(&fs::read_to_string(out.join("n"))?, &(index % 3).to_string())?;
            ensure!(
                fs::read_to_string(out.join("log"))?.lines().count() == 5,
                "a step was lost"
            );
        }
    }
    Ok(())
}

fn parallel_builds(lab: &Lab) -> Result<()> {
    let count = number("COOPER_PARALLEL")?.unwrap_or(12);
    let daemon = lab.daemon()?;
    let mut shared = String::from("FROM @BASE@\n");
    for step in 0..9 {
        shared.push_str(&format!(
            "RUN --mount=type=cache,id=count,target=/count,sharing=locked echo {step} >> /count/runs && echo {step} >> /log\n"
        ));
    }
    let mut builds = Vec::new();
    for index in 0..count {
        let own = format!("{shared}RUN echo {index} > /own\n");
        let context = lab.context(&format!("c{index}"), &[("Dockerfile", &own)])?;
        let out = lab.dir().join(format!("out{index}"));
        builds.push(start(
            daemon
                .buildctl_build(&context)
                .arg(format!("--output=type=local,dest={}", out.display())),
        )?);
    }
    wait_all(builds)?;
    for index in 0..count {
        let out = lab.dir().join(format!("out{index}"));
        ensure!(
            fs::read_to_string(out.join("own"))?.trim() == index.to_string(),
            "another build's step"
        );
        ensure!(
            fs::read_to_string(out.join("log"))?.lines().count() == 9,
            "a step was lost"
        );
    }
    let show =
        "FROM @BASE@\nRUN --mount=type=cache,id=count,target=/count,sharing=locked cp /count/runs /runs\n";
    let context = lab.context("show", &[("Dockerfile", show)])?;
    let out = lab.dir().join("runs");
    to_directory(&mut daemon.buildctl_build(&context), &out)?;
    let runs = fs::read_to_string(out.join("runs"))?;
    let expected: String = (0..9).map(|step| format!("{step}\n")).collect();
    ensure!(runs == expected, "shared steps ran more than once:\n{runs}");
    Ok(())
}

fn locked_mounts(lab: &Lab) -> Result<()> {
    let daemon = lab.daemon()?;
    let mount = |id: &str| format!("--mount=type=cache,id={id},target=/{id},sharing=locked");
    // Reading and writing apart from each other: with two at once a count would be lost.
    let raise = |id: &str| format!("n=$(cat /{id}/n || echo 0); echo $((n+1)) > /{id}/n");
    let mut builds = Vec::new();
    for index in 0..6 {
        let (first, second) = if index % 2 == 0 { ("a", "b") } else { ("b", "a") };
        let step = format!(
            "RUN {} {} : {index}; {}; {}\n",
            mount(first),
            mount(second),
            raise(first),
            raise(second)
        );
        let dockerfile = format!("FROM @BASE@\n{step}");
        let context = lab.context(&format!("c{index}"), &[("Dockerfile", &dockerfile)])?;
        builds.push(start(&mut daemon.buildctl_build(&context))?);
    }
    wait_all(builds)?;
    let show = format!(
        "FROM @BASE@\nRUN {} {} cat /a/n /b/n > /counts\n",
        mount("a"),
        mount("b")
    );
    let context = lab.context("show", &[("Dockerfile", &show)])?;
    let out = lab.dir().join("out");
    to_directory(&mut daemon.buildctl_build(&context), &out)?;
    expect(&fs::read_to_string(out.join("counts"))?, "6\n6\n")
}

/// What a process group takes.
#[derive(Clone, Copy, Debug)]
struct Footprint {
    memory_kb: u64,
    threads: usize,
    descriptors: usize,
}

impl Footprint {
    fn of(daemon: &Daemon<'_>) -> Result<Self> {
        let proc = PathBuf::from(format!("/proc/{}", daemon.pid()));
        let rollup = fs::read_to_string(proc.join("smaps_rollup"))?;
        let memory = rollup.lines().find_map(|line| line.strip_prefix("Pss_Anon:"));
        let memory = memory.and_then(|rest| rest.split_whitespace().next());
        Ok(Self {
            memory_kb: memory.context("the kernel tells no Pss_Anon")?.parse()?,
            threads: fs::read_dir(proc.join("task"))?.count(),
            descriptors: fs::read_dir(proc.join("fd"))?.count(),
        })
    }
}

fn many_builds(lab: &Lab) -> Result<()> {
    let count = number("COOPER_BUILDS")?.unwrap_or(50);
    let daemon = lab.daemon()?;
    let dockerfile = "FROM @BASE@\nCOPY a.txt /a\nRUN cat /a > /b\n";
    let context = lab.context("c", &[("Dockerfile", dockerfile)])?;
    let mut before = None;
    for build in 1..=count {
        // Each leaves a result, as a change in a project does.
        fs::write(context.join("a.txt"), build.to_string())?;
        succeed(&mut daemon.buildctl_build(&context))?;
        if build == (count / 10).max(25) {
            before = Some(Footprint::of(&daemon)?);
        }
    }
    let after = Footprint::of(&daemon)?;
    let before = before.context("too few builds")?;
    println!("  {before:?} {after:?}");
    ensure!(
        after.descriptors <= before.descriptors + 2 && after.threads <= before.threads + 6,
        "{before:?} became {after:?}"
    );
    // Results stay cached, and each takes some hundred bytes; what a build needs while it runs would be far more.
    ensure!(
        after.memory_kb <= before.memory_kb + before.memory_kb / 10 + 1024,
        "{before:?} became {after:?}"
    );
    Ok(())
}

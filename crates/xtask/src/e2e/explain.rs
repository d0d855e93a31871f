//! Scenarios about the reasons for which steps run.

use std::fs;
use std::os::unix::fs::PermissionsExt as _;
use std::path::{Path, PathBuf};

use anyhow::{Context as _, Result, ensure};

use super::fixture::{Daemon, Lab, expect, expect_not, fail, succeed};
use super::{Need, Scenario};

/// All of them.
pub const SCENARIOS: &[Scenario] = &[Scenario {
    name: "explains-what-changed",
    needs: &[Need::Root],
    run: explains_what_changed,
}];

const SECRET_CANARY: &str = "canary-of-a-secret-4711";
const ARG_CANARY: &str = "canary-of-an-argument-0815";

/// A build context that is changed and built again and again.
struct Changing<'a> {
    lab: &'a Lab,
    context: PathBuf,
    base: String,
    command: &'static str,
    color: &'static str,
    token: String,
    /// What `cooper explain --json` said of each build.
    told: Vec<String>,
}

impl<'a> Changing<'a> {
    fn new(lab: &'a Lab) -> Result<Self> {
        let context = lab.context("c", &[("files/a.txt", "one"), ("files/b.txt", "two")])?;
        fs::write(lab.dir().join("secret"), SECRET_CANARY)?;
        let this = Self {
            lab,
            context,
            base: format!("{}/library/busybox:moving", lab.registry()),
            command: "echo hello",
            color: "red",
            token: format!("{ARG_CANARY}-1"),
            told: Vec::new(),
        };
        this.set_mode(0o644)?;
        Ok(this)
    }

    fn file(&self, name: &str) -> PathBuf {
        self.context.join("files").join(name)
    }

    fn set_mode(&self, mode: u32) -> Result<()> {
        Ok(fs::set_permissions(
            self.file("a.txt"),
            fs::Permissions::from_mode(mode),
        )?)
    }

    /// Builds, and returns what `--explain` tells in the end.
    fn build(&mut self, daemon: &Daemon<'_>) -> Result<String> {
        let dockerfile = format!(
            "FROM {}\nARG API_TOKEN\nENV COLOR={}\nRUN --mount=type=secret,id=s cat /run/secrets/s | wc -c; {}\nCOPY files /files\n",
            self.base, self.color, self.command
        );
        fs::write(self.context.join("Dockerfile"), dockerfile)?;
        let secret = self.lab.dir().join("secret");
        let shown = succeed(
            daemon
                .cooper_build(&self.context)
                .arg("--explain")
                .arg(format!("--build-arg=API_TOKEN={}", self.token))
                .arg(format!("--secret=id=s,src={}", secret.display())),
        )?;
        let told = explain(daemon, &["latest", "--json"])?;
        self.told.push(told);
        let reasons = shown.split("Why steps ran:\n").nth(1).unwrap_or_default();
        ensure!(!reasons.is_empty(), "no reasons are told:\n{shown}");
        let later = explain(daemon, &["latest"])?;
        ensure!(
            reasons.contains(&later),
            "told in the end:\n{reasons}\ntold later:\n{later}"
        );
        for text in [reasons, &self.told[self.told.len() - 1]] {
            expect_not(text, SECRET_CANARY)?;
            expect_not(text, ARG_CANARY)?;
        }
        Ok(reasons.to_owned())
    }
}

fn explain(daemon: &Daemon<'_>, arguments: &[&str]) -> Result<String> {
    succeed(&mut explain_command(daemon, arguments))
}

fn explain_command(daemon: &Daemon<'_>, arguments: &[&str]) -> std::process::Command {
    let mut command = daemon.command("cooper");
    command
        .args(["explain", "--addr", &daemon.address()])
        .args(arguments);
    command
}

fn explains_what_changed(lab: &Lab) -> Result<()> {
    let mut daemon = lab.daemon()?;
    let mut changing = Changing::new(lab)?;
    lab.move_tag(1)?;
    expect(&changing.build(&daemon)?, "\n  never built here before\n")?;
    expect(&changing.build(&daemon)?, "No step ran")?;

    changing.command = "echo goodbye";
    let told = changing.build(&daemon)?;
    expect(&told, "  argument 3 \"")?;
    expect(&told, "echo hello\"→\"")?;
    changing.color = "blue";
    expect(
        &changing.build(&daemon)?,
        "  environment variable COLOR \"red\"→\"blue\"\n",
    )?;
    changing.token = format!("{ARG_CANARY}-2");
    expect(
        &changing.build(&daemon)?,
        "  environment variable API_TOKEN changed\n",
    )?;
    files(&mut changing, &daemon)?;
    lab.move_tag(2)?;
    expect(
        &changing.build(&daemon)?,
        &format!("  digest of image {} sha256:", changing.base),
    )?;
    after_a_restart(&mut changing, &mut daemon)
}

fn files(changing: &mut Changing<'_>, daemon: &Daemon<'_>) -> Result<()> {
    changing.set_mode(0o664)?;
    let told = changing.build(daemon)?;
    expect(&told, "  mode of files/a.txt 0644→0664\n")?;
    expect_not(&told, "content of")?;
    expect_not(&told, "RUN")?;
    fs::write(changing.file("a.txt"), "eno")?;
    let told = changing.build(daemon)?;
    expect(&told, "  content of files/a.txt changed\n")?;
    expect_not(&told, "mode of")?;
    fs::write(changing.file("new.txt"), "new")?;
    expect(&changing.build(daemon)?, "  files/new.txt was added\n")?;
    fs::remove_file(changing.file("b.txt"))?;
    expect(&changing.build(daemon)?, "  files/b.txt was removed\n")
}

/// What was told is told again by another process; what was removed is known to have been there.
fn after_a_restart(changing: &mut Changing<'_>, daemon: &mut Daemon<'_>) -> Result<()> {
    daemon.restart()?;
    for told in &changing.told {
        let build = told
            .strip_prefix("{\"ref\":\"")
            .and_then(|rest| rest.split('"').next());
        let build = build.with_context(|| format!("no build is named:\n{told}"))?;
        let again = explain(daemon, &[build, "--json"])?;
        ensure!(
            again == *told,
            "told before:\n{told}\ntold after the restart:\n{again}"
        );
    }
    let (_, unknown) = fail(&mut explain_command(daemon, &["nonsense"]))?;
    expect(&unknown, "no build nonsense is remembered")?;
    succeed(&mut daemon.buildctl(&["prune", "--all"]))?;
    expect(
        &changing.build(daemon)?,
        "  it ran before, but its result is not in the cache any more\n",
    )?;
    changing.command = "echo again";
    fs::write(
        changing.context.join("Dockerfile"),
        format!("FROM {}\nRUN {}\n", changing.base, changing.command),
    )?;
    let mut build = daemon.command("cooper");
    build.args([
        "build",
        "--explain",
        "--progress=rawjson",
        "--addr",
        &daemon.address(),
    ]);
    let lines = succeed(build.arg(&changing.context))?;
    expect(&lines, "{\"explanations\":[{\"vertex\":\"sha256:")?;
    daemon.stop()?;
    let state = changing.lab.dir().join("daemon");
    ensure!(
        !holds(&state, SECRET_CANARY.as_bytes())?,
        "a secret is in the state directory"
    );
    let database = fs::read(state.join("metadata.redb"))?;
    ensure!(
        !contains(&database, ARG_CANARY.as_bytes()),
        "a secret argument is in the database"
    );
    Ok(())
}

fn contains(bytes: &[u8], wanted: &[u8]) -> bool {
    bytes.windows(wanted.len()).any(|window| window == wanted)
}

/// Whether a file below a directory holds these bytes.
fn holds(dir: &Path, wanted: &[u8]) -> Result<bool> {
    for entry in fs::read_dir(dir)? {
        let entry = entry?;
        let kind = entry.file_type()?;
        let found = if kind.is_dir() {
            holds(&entry.path(), wanted)?
        } else {
            kind.is_file() && contains(&fs::read(entry.path())?, wanted)
        };
        if found {
            return Ok(true);
        }
    }
    Ok(false)
}

//! Caches in stores that others wrote: s3rver for S3, Azurite for Azure, Docker's own registry; and in directories.

use std::net::{TcpListener, TcpStream};
use std::process::{Child, Stdio};

use anyhow::{Context, Result, ensure};

use super::fixture::{Lab, cached_steps, eventually, expect, expect_not, fail, succeed};
use super::{Need, Scenario};
use crate::base_image::RealRegistry;
use crate::setup;

/// This file's scenarios.
pub const SCENARIOS: &[Scenario] = &[
    Scenario {
        name: "cache-on-s3rver",
        needs: &[Need::Root, Need::Node("s3rver", "s3rver")],
        run: on_s3rver,
    },
    Scenario {
        name: "cache-on-azurite",
        needs: &[Need::Root, Need::Node("azurite", "azurite-blob")],
        run: on_azurite,
    },
    Scenario {
        name: "cache-on-docker-registry",
        needs: &[Need::Root, Need::Program("docker-registry")],
        run: on_docker_registry,
    },
    Scenario {
        name: "cache-in-a-directory",
        needs: &[Need::Root],
        run: in_a_directory,
    },
];

/// The key that Azurite documents for its account.
const AZURITE_KEY: &str =
    "Eby8vdM02xNOcqFlqUwJPLlmEtlCDXJ1OUzFT50uSRZ6IFsuFq2UVErCz4I6tq/K1SZFPTOtr/KBHBeksoGMGw==";

/// A layer larger than this is that of the step with much to do.
const LARGE_BYTES: u64 = 10 << 20;

/// A server of another project; it ends when dropped.
struct Server {
    child: Child,
    port: u16,
}

impl Drop for Server {
    fn drop(&mut self) {
        // It may have ended by itself.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

impl Server {
    fn start(
        lab: &Lab,
        package: &str,
        program: &str,
        flags: impl Fn(&str, &str) -> Vec<String>,
    ) -> Result<Self> {
        let port = TcpListener::bind("127.0.0.1:0")?.local_addr()?.port();
        let dir = lab.dir().join("objects");
        std::fs::create_dir_all(&dir)?;
        let path = setup::node_program(package, program).map_err(anyhow::Error::msg)?;
        let child = std::process::Command::new(path)
            .args(flags(&dir.display().to_string(), &port.to_string()))
            .stdout(Stdio::null())
            .stderr(Stdio::null())
            .stdin(Stdio::null())
            .spawn()
            .with_context(|| format!("starting {program}"))?;
        let server = Self { child, port };
        eventually("the object store's port", || {
            TcpStream::connect(("127.0.0.1", port)).is_ok()
        })?;
        Ok(server)
    }
}

fn on_s3rver(lab: &Lab) -> Result<()> {
    let server = Server::start(lab, "s3rver", "s3rver", |dir, port| {
        [
            "-d",
            dir,
            "-a",
            "127.0.0.1",
            "-p",
            port,
            "--configure-bucket",
            "cache",
        ]
        .map(ToOwned::to_owned)
        .to_vec()
    })?;
    let options = format!(
        "type=s3,bucket=cache,region=us-east-1,endpoint_url=http://127.0.0.1:{},use_path_style=true,\
         access_key_id=S3RVER,secret_access_key=S3RVER,prefix=p/,name=app",
        server.port
    );
    round_trip(lab, &options, "secret_access_key")
}

fn on_azurite(lab: &Lab) -> Result<()> {
    let server = Server::start(lab, "azurite", "azurite-blob", |dir, port| {
        let flags = [
            "--silent",
            "--skipApiVersionCheck",
            "--location",
            dir,
            "--blobHost",
            "127.0.0.1",
            "--blobPort",
            port,
        ];
        flags.map(ToOwned::to_owned).to_vec()
    })?;
    let options = format!(
        "type=azblob,account_url=http://127.0.0.1:{}/devstoreaccount1,account_name=devstoreaccount1,\
         secret_access_key={AZURITE_KEY},prefix=p",
        server.port
    );
    round_trip(lab, &options, AZURITE_KEY)
}

fn on_docker_registry(lab: &Lab) -> Result<()> {
    let registry = RealRegistry::start(&lab.dir().join("registry"))?;
    for form in ["", ",image-manifest=false", ",oci-mediatypes=false"] {
        let options = format!(
            "type=registry,ref={}/form{}:cache{form}",
            registry.address(),
            form.len()
        );
        round_trip(lab, &options, "no secret is needed")?;
    }
    let name = format!("{}/form0:cache", registry.address());
    inspect(lab, &["--insecure", &name])
}

fn in_a_directory(lab: &Lab) -> Result<()> {
    let dir = lab.dir().join("cache").display().to_string();
    for tag in ["one", "two"] {
        let (export, import) = (
            format!("type=local,dest={dir},tag={tag}"),
            format!("type=local,src={dir},tag={tag}"),
        );
        between(lab, &export, &import, "no secret is needed")?;
    }
    for tag in ["one", "two"] {
        inspect(lab, &["--tag", tag, &dir])?;
    }
    let (_, message) = fail(
        lab.command("cooper")
            .args(["cache", "inspect", "--tag=three", &dir]),
    )?;
    expect(&message, "has no cache with the tag")?;
    // What is taken away is named.
    let blobs = std::path::Path::new(&dir).join("blobs/sha256");
    for entry in std::fs::read_dir(&blobs)? {
        let entry = entry?;
        if entry.metadata()?.len() > LARGE_BYTES {
            std::fs::remove_file(entry.path())?;
        }
    }
    let told = succeed(
        lab.command("cooper")
            .args(["cache", "inspect", "--tag=two", &dir]),
    )?;
    let (_, lost) = told
        .split_once("Cannot be restored:")
        .context("nothing is missed")?;
    expect(lost, " is missing")
}

/// Looks at a cache all of which is there.
fn inspect(lab: &Lab, arguments: &[&str]) -> Result<()> {
    let told = succeed(lab.command("cooper").args(["cache", "inspect"]).args(arguments))?;
    expect(&told, " with a result; ")?;
    expect_not(&told, "Cannot be restored")
}

/// Exports a cache, forgets everything, and builds from the cache.
fn round_trip(lab: &Lab, options: &str, secret: &str) -> Result<()> {
    between(lab, options, options, secret)
}

fn between(lab: &Lab, export: &str, import: &str, secret: &str) -> Result<()> {
    // Larger than what is uploaded at once, and not to be packed smaller.
    let dockerfile = "FROM @BASE@ AS one\nRUN head -c 40000000 /dev/urandom > /big && sha256sum /big > /sum\nFROM \
                      @BASE@\nCOPY --from=one /sum /\nRUN cat /sum > /again\n";
    let context = lab.context("c", &[("Dockerfile", dockerfile)])?;
    let daemon = lab.daemon_with(&["--debug"])?;
    // What another cache gave may be no more than promised.
    succeed(&mut daemon.buildctl(&["prune", "--all"]))?;
    succeed(
        daemon
            .buildctl_build(&context)
            .arg(format!("--export-cache={export},mode=max")),
    )?;
    succeed(&mut daemon.buildctl(&["prune", "--all"]))?;
    let out = lab.dir().join("out");
    let again = succeed(
        daemon
            .buildctl_build(&context)
            .arg(format!("--import-cache={import}"))
            .arg(format!("--output=type=local,dest={}", out.display())),
    )?;
    ensure!(
        cached_steps(&again) == 3,
        "not all steps were in the cache:\n{again}"
    );
    ensure!(
        std::fs::read(out.join("sum"))? == std::fs::read(out.join("again"))?,
        "what came from the cache is something else"
    );
    expect_not(&daemon.log(), secret)?;
    expect_not(&again, secret)
}

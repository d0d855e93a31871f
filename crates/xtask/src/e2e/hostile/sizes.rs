//! What is only large: it may take its time, but it ends when nobody waits for it any more.

use std::fs;
use std::time::Duration;

use anyhow::{Context as _, Result, bail, ensure};
use api::fsutil::Stat;
use api::pb::control::{Exporter, SolveRequest};
use bytes::Bytes;
use llb::pb;

use super::archives::{directory, unpacking};
use super::client::{Files, request};
use super::ops::{copying, definition, file, mkfile, source};
use super::tarball::{Tarball, many, sparse};
use super::yard::{MARK, Yard};
use crate::e2e::fixture::{Lab, eventually};

/// How long a client waits before it gives up.
const PATIENCE: Duration = Duration::from_secs(1);
/// What a daemon with nothing to do may use of a processor in [`PAUSE`], in hundredths of a second.
const REST: u64 = 2;
const PAUSE: Duration = Duration::from_millis(200);
/// Eight terabytes.
const SIZE: u64 = 8 << 40;

/// Something large: its name, the client's directory, what is asked for.
type Large = (&'static str, fn(&Lab) -> (Files, SolveRequest));

const LARGE: &[Large] = &[
    ("an archive of a million entries", |lab| {
        let mut chunk = Tarball::new();
        for number in 0..1000 {
            chunk = chunk.file(&format!("d{}/{MARK}-{number}", number % 10), b"");
        }
        let archive = many(&chunk.cut(), 1000);
        (directory(archive), request(unpacking(lab, "true")))
    }),
    ("the content of eight terabytes", |_| {
        let [from, empty, unpacked] = eight_terabytes();
        // What is copied is a part of a key.
        let copied = file(copying("/big", "/copied", |_| {}), &[&empty, &unpacked]);
        let definition = definition(&[from, empty, unpacked, copied]);
        (directory(sparse("big", SIZE)), request(definition))
    }),
    ("a layer of eight terabytes", |_| {
        let exporter = Exporter {
            r#type: "image".to_owned(),
            attrs: [("name".to_owned(), "big".to_owned())].into(),
        };
        let request = SolveRequest {
            exporters: vec![exporter],
            ..request(definition(&eight_terabytes()))
        };
        (directory(sparse("big", SIZE)), request)
    }),
    ("a directory of a million entries", |_| {
        let stat = |number: u32| Stat {
            path: Bytes::from(format!("{MARK}-{number:07}")),
            mode: 0o644,
            ..Stat::default()
        };
        let files = Files::honest((0..1_000_000).map(stat).collect(), Vec::new());
        (files, request(definition(&[source("local://context", &[])])))
    }),
];

/// Unpacking the client's archive.
fn eight_terabytes() -> [pb::Op; 3] {
    let from = source("local://context", &[]);
    let empty = mkfile("empty", b"");
    let unpack = copying("/archive", "/", |copy| {
        copy.attempt_unpack_docker_compatibility = true;
    });
    let unpacked = file(unpack, &[&empty, &from]);
    [from, empty, unpacked]
}

/// Asks for all of them, and gives up.
pub fn run(lab: &Lab) -> Result<()> {
    let mut yard = Yard::open(lab)?;
    for (name, make) in LARGE {
        let (files, request) = make(lab);
        match yard.client.give_up(files, request, PATIENCE)? {
            None => {}
            Some(Err(status)) => bail!("{name}: {}", status.message()),
            // A machine may be that fast, but not with the content of terabytes.
            Some(Ok(_)) => ensure!(!name.contains("terabytes"), "{name} was done at once"),
        }
        let pid = yard.daemon.pid();
        eventually("rest", || rests(pid).unwrap_or(false)).context(*name)?;
        yard.is_unharmed().context(*name)?;
    }
    yard.close()
}

/// Whether a process does nothing for a while.
fn rests(pid: u32) -> Result<bool> {
    let before = used(pid)?;
    std::thread::park_timeout(PAUSE);
    Ok(used(pid)? - before <= REST)
}

/// What a process used of processors so far, in hundredths of a second.
fn used(pid: u32) -> Result<u64> {
    let stat = fs::read_to_string(format!("/proc/{pid}/stat"))?;
    // The name before may have anything in it.
    let fields: Vec<&str> = stat
        .rsplit(')')
        .next()
        .unwrap_or_default()
        .split_whitespace()
        .collect();
    ensure!(fields.len() > 12, "{stat}");
    Ok(fields[11].parse::<u64>()? + fields[12].parse::<u64>()?)
}

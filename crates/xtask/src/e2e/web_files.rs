//! Files of web servers that are larger than anybody wants: they need no memory, and end with the build or the disk.

use std::fs;
use std::io::{BufRead as _, BufReader, Read as _, Write as _};
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::process::Command;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::JoinHandle;

use anyhow::{Context as _, Result, ensure};
use llb::pb;
use tokio::sync::Notify;

use super::fixture::{Daemon, Lab, eventually, expect, expect_not, fail, succeed};
use super::hostile::client::{Client, Files, request};
use super::hostile::ops::{definition, exec, image, second, source};
use super::store::SmallDisk;
use super::{Need, Scenario};

/// This file's scenarios.
pub const SCENARIOS: &[Scenario] = &[
    Scenario {
        name: "web-files-of-any-size",
        needs: &[Need::Root],
        run: of_any_size,
    },
    Scenario {
        name: "web-files-larger-than-the-disk",
        needs: &[Need::Root],
        run: larger_than_the_disk,
    },
];

/// Size of a large file.
const LARGE: u64 = 300 << 20;
/// By how much a large file may raise the daemon's peak of memory.
const MAX_GROWTH_KB: u64 = 16 << 10;
/// How much of a file without end is sent before the server says so.
const BEGUN: u64 = 64 << 20;
/// What is sent at once.
static PIECE: [u8; 1 << 20] = [0; 1 << 20];

/// What a server's threads and its owner share.
#[derive(Default)]
struct Shared {
    is_closed: AtomicBool,
    /// Told when much of the file without end was sent.
    has_begun: Notify,
    /// Whether somebody hung up on the file without end.
    is_given_up: AtomicBool,
    /// [`LARGE`] zeros, compressed.
    gzip: Vec<u8>,
}

/// A web server with files of zeros. It ends when dropped.
struct Server {
    address: SocketAddr,
    shared: Arc<Shared>,
    accepting: Option<JoinHandle<()>>,
}

impl Server {
    fn start() -> Result<Self> {
        let listener = TcpListener::bind("127.0.0.1:0")?;
        let address = listener.local_addr()?;
        let mut gzip = flate2::write::GzEncoder::new(Vec::new(), flate2::Compression::fast());
        std::io::copy(&mut std::io::repeat(0).take(LARGE), &mut gzip)?;
        let shared = Arc::new(Shared {
            gzip: gzip.finish()?,
            ..Shared::default()
        });
        let of_thread = Arc::clone(&shared);
        let accepting = std::thread::spawn(move || {
            std::thread::scope(|scope| {
                for stream in listener.incoming() {
                    if of_thread.is_closed.load(Ordering::SeqCst) {
                        return;
                    }
                    let shared = &of_thread;
                    // A client that hangs up is none to be told of.
                    scope.spawn(move || stream.map(|stream| answer(stream, shared)));
                }
            });
        });
        Ok(Self {
            address,
            shared,
            accepting: Some(accepting),
        })
    }

    fn file(&self, path: &str) -> pb::Op {
        source(&self.url(path), &[])
    }

    fn url(&self, path: &str) -> String {
        format!("http://{}/{path}", self.address)
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        self.shared.is_closed.store(true, Ordering::SeqCst);
        // One more connection, for the thread to see it.
        let _ = TcpStream::connect(self.address);
        if let Some(accepting) = self.accepting.take() {
            let _ = accepting.join();
        }
    }
}

fn answer(stream: TcpStream, shared: &Shared) -> std::io::Result<()> {
    let mut reader = BufReader::new(stream.try_clone()?);
    let mut asked = String::new();
    reader.read_line(&mut asked)?;
    let mut line = String::new();
    while reader.read_line(&mut line)? > 2 {
        line.clear();
    }
    let mut stream = stream;
    let head = |headers: String| format!("HTTP/1.1 200 OK\r\nConnection: close\r\n{headers}\r\n");
    match asked.split([' ', '/']).nth(2) {
        Some("large") => {
            stream.write_all(head(format!("Content-Length: {LARGE}\r\n")).as_bytes())?;
            std::io::copy(&mut std::io::repeat(0).take(LARGE), &mut stream).map(drop)
        }
        Some("compressed") => {
            let length = shared.gzip.len();
            let headers = format!("Content-Encoding: gzip\r\nContent-Length: {length}\r\n");
            stream.write_all(head(headers).as_bytes())?;
            stream.write_all(&shared.gzip)
        }
        Some("endless") => {
            stream.write_all(head("Transfer-Encoding: chunked\r\n".to_owned()).as_bytes())?;
            let given_up = endless(&mut stream, shared);
            shared.is_given_up.store(true, Ordering::SeqCst);
            given_up
        }
        _ => stream.write_all(head("Content-Length: 1\r\n".to_owned() + "\r\n0").as_bytes()),
    }
}

/// Sends chunks until the client hangs up.
fn endless(stream: &mut TcpStream, shared: &Shared) -> std::io::Result<()> {
    let mut sent = 0;
    loop {
        write!(stream, "{:x}\r\n", PIECE.len())?;
        stream.write_all(&PIECE)?;
        stream.write_all(b"\r\n")?;
        sent += PIECE.len() as u64;
        if sent == BEGUN {
            shared.has_begun.notify_one();
        }
    }
}

/// A step that looks at a file's size.
fn looking(lab: &Lab, file: pb::Op, size: u64) -> pb::Definition {
    let base = image(&lab.busybox());
    let script = format!("[ $(cat /in/* | wc -c) = {size} ]");
    let step = exec(&[&base, &file], &script, |exec, _| {
        exec.mounts.push(second("/in"))
    });
    definition(&[base, file, step])
}

/// The most memory that a process had since it was last asked, in KB; page cache apart.
fn peak_kb(daemon: &Daemon<'_>) -> Result<u64> {
    let dir = format!("/proc/{}", daemon.pid());
    let status = fs::read_to_string(format!("{dir}/status"))?;
    // 5 makes the peak what is used now (proc_pid_clear_refs(5)).
    fs::write(format!("{dir}/clear_refs"), "5")?;
    let peak = status.lines().find_map(|line| line.strip_prefix("VmHWM:"));
    let peak = peak.and_then(|rest| rest.split_whitespace().next());
    Ok(peak.context("the kernel tells no VmHWM")?.parse()?)
}

/// Bytes that the daemon's state takes on the disk.
fn used(lab: &Lab) -> Result<u64> {
    let mut du = Command::new("du");
    let shown = succeed(du.args(["-s", "-B1"]).arg(lab.dir().join("daemon")))?;
    Ok(shown.split_whitespace().next().unwrap_or_default().parse()?)
}

fn of_any_size(lab: &Lab) -> Result<()> {
    let (server, daemon) = (Server::start()?, lab.daemon()?);
    let build = |path: &str, size| {
        let definition = looking(lab, server.file(path), size);
        succeed(&mut daemon.buildctl_definition(path, &definition)?)
    };
    build("small", 1)?;
    let before = peak_kb(&daemon)?;
    for path in ["large", "compressed"] {
        build(path, LARGE)?;
        let peak = peak_kb(&daemon)?;
        println!("  {path}: {before} KB became {peak} KB");
        ensure!(
            peak < before + MAX_GROWTH_KB,
            "{path}: {before} KB became {peak} KB"
        );
    }
    given_up(lab, &daemon, &server)?;
    let peak = peak_kb(&daemon)?;
    ensure!(
        peak < before + MAX_GROWTH_KB,
        "endless: {before} KB became {peak} KB"
    );
    Ok(())
}

/// Nothing is left of a file whose build was given up in its middle.
fn given_up(lab: &Lab, daemon: &Daemon<'_>, server: &Server) -> Result<()> {
    let before = used(lab)?;
    let client = Client::connect(daemon)?;
    let files = Files::honest(Vec::new(), Vec::new());
    let asked = request(looking(lab, server.file("endless"), 0));
    let answer = client.give_up_when(files, asked, server.shared.has_begun.notified())?;
    ensure!(answer.is_none(), "it came to {answer:?}");
    eventually("the end of the connection", || {
        server.shared.is_given_up.load(Ordering::SeqCst)
    })?;
    eventually("the end of the file", || {
        used(lab).is_ok_and(|used| used < before + BEGUN / 2)
    })?;
    let listed = succeed(&mut daemon.buildctl(&["du", "-v"]))?;
    expect(&listed, &server.url("large"))?;
    expect_not(&listed, &server.url("endless"))
}

fn larger_than_the_disk(lab: &Lab) -> Result<()> {
    let disk = SmallDisk::mount(lab.dir().join("daemon"), 96)?;
    let (server, daemon) = (Server::start()?, lab.daemon()?);
    let build = |path: &str| daemon.buildctl_definition(path, &looking(lab, server.file(path), 1));
    for path in ["large", "compressed", "endless"] {
        let (_, failure) = fail(&mut build(path)?)?;
        expect(
            &failure,
            &format!("{}: no space left on device", server.url(path)),
        )?;
    }
    // Nothing has to be removed by hand, and nothing has to be restarted.
    let mut last = Ok(());
    let builds = eventually("room", || {
        last = build("small").and_then(|mut build| succeed(&mut build)).map(drop);
        last.is_ok()
    });
    last?;
    builds?;
    drop(daemon);
    drop(disk);
    Ok(())
}

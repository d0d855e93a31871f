//! Containers of clients: several processes at once in one, their streams, terminals, signals and files.

use std::collections::BTreeMap;

use anyhow::{Context as _, Result, bail, ensure};
use api::pb::gateway as pb;
use api::pb::gateway::exec_message::Input;
use bytes::Bytes;
use llb::pb as ops;
use tokio::sync::mpsc;
use tokio_stream::wrappers::ReceiverStream;
use tonic::Streaming;

use super::fixture::Lab;
use super::hostile::client::{Bridge, Client};
use super::hostile::ops::{definition, image, mount};
use super::{Need, Scenario};

/// This file's scenarios.
pub const SCENARIOS: &[Scenario] = &[
    Scenario {
        name: "containers-of-clients",
        needs: &[Need::Root],
        run: embedded,
    },
    Scenario {
        name: "containers-of-clients-with-runc",
        needs: &[Need::Root, Need::Program("runc")],
        run: with_runc,
    },
];

fn embedded(lab: &Lab) -> Result<()> {
    check(lab, &[])
}

fn with_runc(lab: &Lab) -> Result<()> {
    check(lab, &["--oci-worker-binary=runc"])
}

fn check(lab: &Lab, flags: &[&str]) -> Result<()> {
    let daemon = lab.daemon_with(flags)?;
    let client = Client::connect(&daemon)?;
    let base = image(&lab.busybox());
    client.drive(|bridge| drive(bridge, definition(&[base])))
}

async fn drive(mut bridge: Bridge, base: ops::Definition) -> Result<()> {
    let root = solve(&mut bridge, base).await?;
    container(&mut bridge, "c", &root, ops::NetMode::Unset).await?;
    let mut processes = Processes::open(&mut bridge).await?;

    // The first process keeps the container as long as its input is open.
    processes
        .start("first", "c", "echo ready; cat; exit 4", |_| {})
        .await?;
    processes.until_output("first", "ready\n").await?;
    let script = "hostname; grep some.where /etc/hosts; echo hidden > /file; echo oops >&2; exit 3";
    processes
        .start("joined", "c", script, |init| init.fds = vec![1, 2])
        .await?;
    let joined = processes.end("joined").await?;
    // The two streams come in any order.
    let parts = ["named\n", "10.1.2.3\tsome.where\n", "oops\n"];
    ensure!(
        parts.iter().all(|part| joined.output.contains(part)) && joined.code == 3,
        "{joined:?}"
    );
    terminal(&mut processes).await?;
    signals(&mut processes).await?;
    refusals(&mut processes).await?;
    files(&mut bridge).await?;

    processes.input("first", b"from the client", true).await?;
    let first = processes.end("first").await?;
    ensure!(
        first.output == "ready\nfrom the client" && first.code == 4,
        "{first:?}"
    );
    processes.start("late", "c", "true", |_| {}).await?;
    ensure!(
        processes.end("late").await?.code != 0,
        "a container went on without its first process"
    );
    release(&mut bridge, "c").await?;
    rights(&mut bridge, &mut processes, &root).await
}

/// Makes a result and returns its name.
async fn solve(bridge: &mut Bridge, definition: ops::Definition) -> Result<String> {
    let request = pb::SolveRequest {
        definition: Some(definition),
        allow_result_return: true,
        allow_result_array_ref: true,
        evaluate: true,
        ..pb::SolveRequest::default()
    };
    let answer = bridge.solve(request).await?.into_inner();
    match answer.result.and_then(|result| result.result) {
        Some(pb::result::Result::Ref(reference)) => Ok(reference.id),
        other => bail!("no result: {other:?}"),
    }
}

async fn container(bridge: &mut Bridge, id: &str, root: &str, network: ops::NetMode) -> Result<()> {
    let root = ops::Mount {
        result_id: root.to_owned(),
        ..mount(ops::MountType::Bind, "/")
    };
    let request = pb::NewContainerRequest {
        container_id: id.to_owned(),
        mounts: vec![root, mount(ops::MountType::Tmpfs, "/t")],
        network: network.into(),
        extra_hosts: vec![ops::HostIp {
            host: "some.where".to_owned(),
            ip: "10.1.2.3".to_owned(),
        }],
        hostname: "named".to_owned(),
        ..pb::NewContainerRequest::default()
    };
    bridge.new_container(request).await?;
    Ok(())
}

async fn release(bridge: &mut Bridge, id: &str) -> Result<()> {
    let container_id = id.to_owned();
    // A process of it that failed is told here as well.
    let _ = bridge
        .release_container(pb::ReleaseContainerRequest { container_id })
        .await;
    Ok(())
}

/// A terminal that changes its size while it is used.
async fn terminal(processes: &mut Processes) -> Result<()> {
    let script = "test -t 0 && test -t 1 && echo begun; read line; echo \"got $line\"; stty size";
    processes
        .start("terminal", "c", script, |init| init.tty = true)
        .await?;
    processes.until_output("terminal", "begun").await?;
    let size = pb::ResizeMessage { rows: 33, cols: 77 };
    processes.send("terminal", Input::Resize(size)).await?;
    processes.input("terminal", b"hello\n", false).await?;
    let ended = processes.end("terminal").await?;
    ensure!(
        ended.output.contains("got hello") && ended.output.contains("33 77") && ended.code == 0,
        "{ended:?}"
    );
    Ok(())
}

async fn signals(processes: &mut Processes) -> Result<()> {
    let script = "trap 'echo caught; exit 7' USR1; echo ready; while true; do sleep 0.01; done";
    processes.start("caught", "c", script, |_| {}).await?;
    processes.until_output("caught", "ready\n").await?;
    let signal = |name: &str| {
        Input::Signal(pb::SignalMessage {
            name: name.to_owned(),
        })
    };
    processes.send("caught", signal("SIGUSR1")).await?;
    let ended = processes.end("caught").await?;
    ensure!(ended.output == "ready\ncaught\n" && ended.code == 7, "{ended:?}");
    processes
        .start("killed", "c", "echo ready; exec sleep 1000", |_| {})
        .await?;
    processes.until_output("killed", "ready\n").await?;
    processes.send("killed", signal("KILL")).await?;
    let ended = processes.end("killed").await?;
    ensure!(ended.code == 137, "{ended:?}");
    Ok(())
}

/// What cannot be run is told of that process alone.
async fn refusals(processes: &mut Processes) -> Result<()> {
    processes
        .start("missing", "c", "", |init| {
            if let Some(meta) = &mut init.meta {
                meta.args = vec!["/no/such/program".to_owned()];
            }
        })
        .await?;
    let ended = processes.end("missing").await?;
    ensure!(
        ended.code == 1 && ended.output.contains("no such file or directory"),
        "{ended:?}"
    );
    let user = |init: &mut pb::InitMessage| {
        if let Some(meta) = &mut init.meta {
            "unknown".clone_into(&mut meta.user);
        }
    };
    processes.start("nobody", "c", "true", user).await?;
    let ended = processes.end("nobody").await?;
    ensure!(
        ended.code != 0 && ended.told.contains("unable to find user unknown"),
        "{ended:?}"
    );
    processes.start("elsewhere", "other", "true", |_| {}).await?;
    let ended = processes.end("elsewhere").await?;
    ensure!(ended.code != 0 && ended.told.contains("other"), "{ended:?}");
    Ok(())
}

/// Files of a container are read by the index of their mount.
async fn files(bridge: &mut Bridge) -> Result<()> {
    let read = |path: &str, mount_index: i32| pb::ReadFileRequest {
        r#ref: "c".to_owned(),
        file_path: path.to_owned(),
        mount_index,
        range: None,
    };
    let found = bridge
        .read_file_container(read("/file", 0))
        .await?
        .into_inner()
        .data;
    ensure!(found == "hidden\n", "{found:?}");
    let part = pb::ReadFileRequest {
        range: Some(pb::FileRange { offset: 2, length: 3 }),
        ..read("/file", 0)
    };
    let found = bridge.read_file_container(part).await?.into_inner().data;
    ensure!(found == "dde", "{found:?}");
    let listing = pb::ReadDirRequest {
        r#ref: "c".to_owned(),
        dir_path: "/".to_owned(),
        include_pattern: "fi*".to_owned(),
        mount_index: 0,
    };
    let entries = bridge.read_dir_container(listing).await?.into_inner().entries;
    let names: Vec<&Bytes> = entries.iter().map(|entry| &entry.path).collect();
    ensure!(names == ["file"], "{names:?}");
    let asked = pb::StatFileRequest {
        r#ref: "c".to_owned(),
        path: "/file".to_owned(),
        mount_index: 0,
    };
    let stat = bridge.stat_file_container(asked).await?.into_inner().stat;
    ensure!(stat.as_ref().is_some_and(|stat| stat.size == 7), "{stat:?}");
    for (path, index, part) in [
        ("/absent", 0, "no such file or directory"),
        ("/x", 1, "mount 1 can only be read by processes"),
        ("/file", 2, "out of bounds"),
        ("/file", -1, "out of bounds"),
    ] {
        let status = bridge.read_file_container(read(path, index)).await;
        let text = status.err().map(|status| status.message().to_owned());
        ensure!(
            text.as_ref().is_some_and(|text| text.contains(part)),
            "{path} of mount {index}: {text:?}"
        );
    }
    Ok(())
}

/// Rights that the build was not granted are no container's.
async fn rights(bridge: &mut Bridge, processes: &mut Processes, root: &str) -> Result<()> {
    container(bridge, "host", root, ops::NetMode::Host).await?;
    processes.start("host", "host", "true", |_| {}).await?;
    let ended = processes.end("host").await?;
    ensure!(ended.told.contains("network.host is not allowed"), "{ended:?}");
    release(bridge, "host").await?;
    container(bridge, "insecure", root, ops::NetMode::None).await?;
    let insecure = |init: &mut pb::InitMessage| init.security = ops::SecurityMode::Insecure.into();
    processes.start("insecure", "insecure", "true", insecure).await?;
    let ended = processes.end("insecure").await?;
    ensure!(
        ended.told.contains("security.insecure is not allowed"),
        "{ended:?}"
    );
    release(bridge, "insecure").await?;
    container(bridge, "alone", root, ops::NetMode::None).await?;
    processes
        .start("alone", "alone", "ls /sys/class/net", |_| {})
        .await?;
    let ended = processes.end("alone").await?;
    ensure!(ended.output == "lo\n" && ended.code == 0, "{ended:?}");
    release(bridge, "alone").await
}

/// What came of a process so far.
#[derive(Debug, Default)]
struct Told {
    /// Both of its streams.
    output: String,
    code: u32,
    /// Its error's text.
    told: String,
    has_ended: bool,
}

/// One stream of processes.
struct Processes {
    to: mpsc::Sender<pb::ExecMessage>,
    from: Streaming<pb::ExecMessage>,
    known: BTreeMap<String, Told>,
}

impl Processes {
    async fn open(bridge: &mut Bridge) -> Result<Self> {
        let (to, messages) = mpsc::channel(16);
        let from = bridge.exec_process(ReceiverStream::new(messages)).await?;
        Ok(Self {
            to,
            from: from.into_inner(),
            known: BTreeMap::new(),
        })
    }

    async fn send(&self, id: &str, input: Input) -> Result<()> {
        let message = pb::ExecMessage {
            process_id: id.to_owned(),
            input: Some(input),
        };
        self.to.send(message).await.context("nobody listens any more")
    }

    /// Starts a shell with all its streams in a container.
    async fn start(
        &mut self,
        id: &str,
        container: &str,
        script: &str,
        edit: impl FnOnce(&mut pb::InitMessage),
    ) -> Result<()> {
        let meta = ops::Meta {
            args: ["/bin/sh", "-c", script].map(str::to_owned).to_vec(),
            cwd: "/".to_owned(),
            ..ops::Meta::default()
        };
        let mut init = pb::InitMessage {
            container_id: container.to_owned(),
            meta: Some(meta),
            fds: vec![0, 1, 2],
            ..pb::InitMessage::default()
        };
        edit(&mut init);
        self.known.insert(id.to_owned(), Told::default());
        self.send(id, Input::Init(init)).await
    }

    async fn input(&self, id: &str, data: &'static [u8], eof: bool) -> Result<()> {
        let data = Bytes::from_static(data);
        self.send(id, Input::File(pb::FdMessage { fd: 0, eof, data }))
            .await
    }

    async fn next(&mut self) -> Result<()> {
        let message = self
            .from
            .message()
            .await?
            .context("the stream of processes ended")?;
        let known = self.known.entry(message.process_id).or_default();
        match message.input {
            Some(Input::File(file)) => known.output.push_str(&String::from_utf8_lossy(&file.data)),
            Some(Input::Exit(exit)) => {
                known.code = exit.code;
                known.told = exit.error.map(|error| error.message).unwrap_or_default();
            }
            Some(Input::Done(_)) => known.has_ended = true,
            _ => {}
        }
        Ok(())
    }

    async fn until_output(&mut self, id: &str, text: &str) -> Result<()> {
        loop {
            let known = self.known.entry(id.to_owned()).or_default();
            if known.output.contains(text) {
                return Ok(());
            }
            ensure!(!known.has_ended, "{id} ended: {known:?}");
            self.next().await?;
        }
    }

    async fn end(&mut self, id: &str) -> Result<Told> {
        while !self.known.get(id).is_some_and(|known| known.has_ended) {
            self.next().await?;
        }
        self.known.remove(id).context("it was never started")
    }
}

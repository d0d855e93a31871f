//! Directories of the client, sent by a client that records what it is asked for and may misbehave.

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex};

use bytes::Bytes;
use engine::session::{FilePacket, FileStat, FileStream, SessionError};
use llb::{LocalOptions, State};
use tokio::sync::mpsc;

use super::world::{Tree, World};

const DIR: u32 = 1 << 31;
const LINK: u32 = 1 << 27;
const FIFO: u32 = 1 << 25;
/// Long before any transfer of a test.
const OLD_S: i64 = 1_000_000_000;

/// How a client misbehaves.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Fault {
    #[default]
    None,
    /// The connection ends within the first file's content.
    CutContent,
    /// The connection ends within the listing.
    CutListing,
    /// The listing is followed by content that nobody asked for.
    Unasked,
    /// The end comes before the receiver's.
    EarlyFin,
    /// The client fails and says why.
    Fails,
}

/// The sending side of the transfer protocol.
#[derive(Clone, Debug, Default)]
pub struct Sender {
    entries: Vec<(FileStat, String)>,
    fault: Fault,
    requested: Arc<Mutex<Vec<String>>>,
    failed: Arc<Mutex<Option<String>>>,
}

impl Sender {
    /// Opens a transfer; called for each one.
    pub fn start(&self) -> FileStream {
        let (to, incoming) = mpsc::channel(16);
        let (outgoing, from) = mpsc::channel(16);
        let sender = self.clone();
        sender.requested.lock().unwrap().clear();
        tokio::spawn(sender.send(to, from));
        FileStream { incoming, outgoing }
    }

    async fn send(
        self,
        to: mpsc::Sender<Result<FilePacket, SessionError>>,
        mut from: mpsc::Receiver<FilePacket>,
    ) -> Option<()> {
        let (to, lister) = (to.clone(), to);
        let entries = self.entries.clone();
        let fault = self.fault;
        let listing = tokio::spawn(async move {
            for (stat, _) in entries {
                lister.send(Ok(FilePacket::Stat(Some(stat)))).await.ok()?;
            }
            match fault {
                Fault::CutListing => return None,
                Fault::Fails => lister
                    .send(Ok(FilePacket::Failed("out of disk".to_owned())))
                    .await
                    .ok()?,
                _ => lister.send(Ok(FilePacket::Stat(None))).await.ok()?,
            }
            match fault {
                Fault::EarlyFin => lister.send(Ok(FilePacket::Fin)).await.ok(),
                Fault::Unasked => {
                    let packet = FilePacket::Content {
                        id: 4_000,
                        bytes: Bytes::from_static(b"x"),
                    };
                    lister.send(Ok(packet)).await.ok()
                }
                _ => Some(()),
            }
        });
        if fault == Fault::CutListing {
            listing.await.unwrap();
            return None;
        }
        while let Some(packet) = from.recv().await {
            match packet {
                FilePacket::Request(id) => {
                    let (stat, content) = &self.entries[id as usize];
                    self.requested.lock().unwrap().push(stat.path.clone());
                    let bytes = Bytes::from(content.clone());
                    to.send(Ok(FilePacket::Content { id, bytes })).await.ok()?;
                    if fault == Fault::CutContent {
                        return None;
                    }
                    to.send(Ok(FilePacket::Content {
                        id,
                        bytes: Bytes::new(),
                    }))
                    .await
                    .ok()?;
                }
                FilePacket::Fin => to.send(Ok(FilePacket::Fin)).await.ok()?,
                FilePacket::Failed(message) => *self.failed.lock().unwrap() = Some(message),
                other => panic!("the receiver sent {other:?}"),
            }
        }
        Some(())
    }
}

/// A client's directory, changed between transfers.
#[derive(Default)]
struct Files(BTreeMap<Vec<String>, (FileStat, String)>);

impl Files {
    fn put(&mut self, path: &str, mode: u32, content: &str, mod_time_ns: i64) -> &mut FileStat {
        let has_content = mode & (DIR | LINK | FIFO) == 0;
        let size_bytes = if has_content {
            i64::try_from(content.len()).unwrap()
        } else {
            0
        };
        let (uid, gid) = (
            rustix::process::geteuid().as_raw(),
            rustix::process::getegid().as_raw(),
        );
        let linkname = if mode & LINK == 0 {
            String::new()
        } else {
            content.to_owned()
        };
        let stat = FileStat {
            path: path.to_owned(),
            mode,
            uid,
            gid,
            size_bytes,
            mod_time_ns,
            linkname,
            ..FileStat::default()
        };
        let key: Vec<String> = path.split('/').map(str::to_owned).collect();
        self.0.insert(key.clone(), (stat, content.to_owned()));
        &mut self.0.get_mut(&key).unwrap().0
    }

    fn file(&mut self, path: &str, content: &str) {
        self.put(path, 0o644, content, OLD_S * 1_000_000_000);
    }

    fn dir(&mut self, path: &str) {
        self.put(path, DIR | 0o755, "", OLD_S * 1_000_000_000);
    }

    fn remove(&mut self, path: &str) {
        let key: Vec<String> = path.split('/').map(str::to_owned).collect();
        self.0.retain(|known, _| !known.starts_with(&key));
    }

    /// Sends the directory in a build of its own and returns what arrived and what was asked for.
    async fn sync(&self, world: &World, fault: Fault) -> Result<(Tree, Vec<String>), engine::BuildError> {
        self.sync_with(world, fault, LocalOptions::default()).await
    }

    async fn sync_with(
        &self,
        world: &World,
        fault: Fault,
        options: LocalOptions,
    ) -> Result<(Tree, Vec<String>), engine::BuildError> {
        let sender = Sender {
            entries: self.0.values().cloned().collect(),
            fault,
            ..Sender::default()
        };
        *world.client.dir.lock().unwrap() = sender.clone();
        let tree = world.build(&State::local("context", options)).await?;
        let mut requested = sender.requested.lock().unwrap().clone();
        requested.sort();
        Ok((tree, requested))
    }

    async fn good(&self, world: &World) -> (Tree, Vec<String>) {
        self.sync(world, Fault::None).await.unwrap()
    }
}

fn names(tree: &Tree) -> Vec<&str> {
    tree.keys().map(String::as_str).collect()
}

#[tokio::test(flavor = "multi_thread")]
async fn the_first_transfer_brings_all_and_the_second_nothing() {
    let (world, mut files) = (World::new(), Files::default());
    files.file("a", "1");
    files.dir("d");
    files.file("d/b", "22");
    files.file("d-e", "3");
    files.put("link", LINK | 0o777, "d/b", OLD_S * 1_000_000_000);
    files.put("pipe", FIFO | 0o600, "", OLD_S * 1_000_000_000);
    files.put("tool", 0o755 | 1 << 23, "x", OLD_S * 1_000_000_000);
    let (tree, requested) = files.good(&world).await;
    assert_eq!(names(&tree), ["a", "d-e", "d/", "d/b", "link", "pipe", "tool"]);
    assert_eq!(requested, ["a", "d-e", "d/b", "tool"]);
    assert_eq!(
        (tree["d/b"].content.as_str(), tree["d/b"].mtime, tree["d/b"].mode),
        ("22", OLD_S, 0o644)
    );
    assert_eq!(
        (tree["link"].content.as_str(), tree["link"].mtime),
        ("d/b", OLD_S)
    );
    assert_eq!(
        (tree["tool"].mode, tree["d/"].mode, tree["d/"].mtime),
        (0o4755, 0o755, OLD_S)
    );
    let (again, requested) = files.good(&world).await;
    assert_eq!(requested, Vec::<String>::new());
    assert_eq!(again, tree);
}

#[tokio::test(flavor = "multi_thread")]
async fn only_what_changed_is_asked_for() {
    let (world, mut files) = (World::new(), Files::default());
    for name in ["bytes", "mode", "gone", "time"] {
        files.file(name, "1");
    }
    files.dir("old");
    files.file("old/x", "1");
    files.file("old/y", "2");
    files.good(&world).await;
    files.file("bytes", "22");
    files.put("mode", 0o755, "1", OLD_S * 1_000_000_000);
    files.put("time", 0o644, "2", (OLD_S + 5) * 1_000_000_000);
    files.remove("gone");
    files.remove("old");
    files.dir("new");
    files.file("new/x", "1");
    files.file("new/y", "2");
    let (tree, requested) = files.good(&world).await;
    assert_eq!(requested, ["bytes", "mode", "new/x", "new/y", "time"]);
    assert_eq!(names(&tree), ["bytes", "mode", "new/", "new/x", "new/y", "time"]);
    assert_eq!(
        (
            tree["bytes"].content.as_str(),
            tree["mode"].mode,
            tree["time"].content.as_str()
        ),
        ("22", 0o755, "2")
    );
    assert_eq!(files.good(&world).await, (tree, Vec::new()));
}

#[tokio::test(flavor = "multi_thread")]
async fn entries_may_change_their_type() {
    let (world, mut files) = (World::new(), Files::default());
    files.dir("a");
    files.dir("a/b");
    files.file("a/b/c", "1");
    files.file("f", "1");
    files.put("l", LINK | 0o777, "a", OLD_S * 1_000_000_000);
    files.good(&world).await;
    files.remove("a");
    files.put("a", LINK | 0o777, "/etc", OLD_S * 1_000_000_000);
    files.dir("f");
    files.file("f/g", "2");
    files.file("l", "file");
    let (tree, requested) = files.good(&world).await;
    assert_eq!(requested, ["f/g", "l"]);
    assert_eq!(names(&tree), ["a", "f/", "f/g", "l"]);
    assert_eq!(
        (tree["a"].content.as_str(), tree["l"].content.as_str()),
        ("/etc", "file")
    );
    files.remove("a");
    files.dir("a");
    files.file("a/passwd", "mine");
    let (tree, _) = files.good(&world).await;
    assert_eq!(tree["a/passwd"].content, "mine");
}

#[tokio::test(flavor = "multi_thread")]
async fn hard_links_stay_links() {
    let (world, mut files) = (World::new(), Files::default());
    files.file("a", "1");
    files.put("b", 0o644, "", OLD_S * 1_000_000_000).linkname = "a".to_owned();
    let (tree, requested) = files.good(&world).await;
    assert_eq!(requested, ["a"]);
    assert_eq!(
        (tree["b"].inode, tree["b"].content.as_str()),
        (tree["a"].inode, "1")
    );
    // A new file in place of the old one takes its links along.
    files.file("a", "22");
    let (tree, _) = files.good(&world).await;
    assert_eq!(
        (tree["b"].inode, tree["b"].content.as_str()),
        (tree["a"].inode, "22")
    );
    files.file("b", "own");
    let (tree, requested) = files.good(&world).await;
    assert_eq!(
        (requested, tree["a"].content.as_str()),
        (vec!["b".to_owned()], "22")
    );
}

#[tokio::test(flavor = "multi_thread")]
async fn what_was_just_written_is_read_again() {
    let (world, mut files) = (World::new(), Files::default());
    let since = std::time::SystemTime::now()
        .duration_since(std::time::UNIX_EPOCH)
        .unwrap();
    let future = i64::try_from(since.as_nanos()).unwrap() + 3_600_000_000_000;
    files.file("old", "1");
    files.put("now", 0o644, "1", future);
    files.good(&world).await;
    // The same length and time, other bytes.
    files.put("now", 0o644, "2", future);
    let (tree, requested) = files.good(&world).await;
    assert_eq!(
        (requested, tree["now"].content.as_str()),
        (vec!["now".to_owned()], "2")
    );
}

#[tokio::test(flavor = "multi_thread")]
async fn a_file_that_grew_while_it_was_read_is_read_again() {
    let (world, mut files) = (World::new(), Files::default());
    files
        .put("log", 0o644, "longer than listed", OLD_S * 1_000_000_000)
        .size_bytes = 3;
    let (tree, _) = files.good(&world).await;
    assert_eq!(tree["log"].content, "longer than listed");
    assert_eq!(files.good(&world).await.1, ["log"]);
}

#[tokio::test(flavor = "multi_thread")]
async fn everything_comes_again_when_the_client_says_so() {
    let (world, mut files) = (World::new(), Files::default());
    files.file("a", "1");
    files.good(&world).await;
    let options = || LocalOptions {
        differ: "none".to_owned(),
        ..LocalOptions::default()
    };
    let (_, requested) = files.sync_with(&world, Fault::None, options()).await.unwrap();
    assert_eq!(requested, ["a"]);
}

#[tokio::test(flavor = "multi_thread")]
async fn metadata_may_come_alone() {
    let (world, mut files) = (World::new(), Files::default());
    files.dir("d");
    files.file("d/a", "1");
    files.file("d/b", "2");
    files.dir("e");
    let options = LocalOptions {
        metadata_only: Some(vec!["d/b".to_owned()]),
        ..LocalOptions::default()
    };
    let (tree, requested) = files.sync_with(&world, Fault::None, options).await.unwrap();
    assert_eq!(requested, ["d/b"]);
    assert_eq!(names(&tree), [".fsutil-metadata", "d/", "d/b"]);
}

#[tokio::test(flavor = "multi_thread")]
async fn the_exceptions_from_metadata_may_change() {
    let (world, mut files) = (World::new(), Files::default());
    files.file("a", "1");
    files.file("b", "2");
    let only = |name: &str| LocalOptions {
        metadata_only: Some(vec![name.to_owned()]),
        ..LocalOptions::default()
    };
    for name in ["a", "b", "a"] {
        let (tree, requested) = files.sync_with(&world, Fault::None, only(name)).await.unwrap();
        assert!(requested.iter().all(|asked| asked == name), "{requested:?}");
        assert_eq!(names(&tree), [".fsutil-metadata", name]);
    }
    // A whole transfer is not confused by it.
    let (tree, requested) = files.good(&world).await;
    assert_eq!(
        (names(&tree), requested),
        (vec!["a", "b"], vec!["a".to_owned(), "b".to_owned()])
    );
}

#[tokio::test(flavor = "multi_thread")]
async fn the_client_is_told_what_is_wanted() {
    let (world, mut files) = (World::new(), Files::default());
    files.file("a", "1");
    let list = |text: &str| vec![text.to_owned(), format!("{text}/*")];
    let options = LocalOptions {
        include_patterns: list("in"),
        exclude_patterns: list("ex"),
        follow_paths: list("follow"),
        ..LocalOptions::default()
    };
    files.sync_with(&world, Fault::None, options).await.unwrap();
    let asked = world.client.asked.lock().unwrap().clone();
    assert_eq!(asked.len(), 1);
    assert_eq!(asked[0].dir_name, "context");
    assert_eq!(asked[0].include_patterns, list("in"));
    assert_eq!(asked[0].exclude_patterns, list("ex"));
    assert_eq!(asked[0].follow_paths, list("follow"));
}

#[tokio::test(flavor = "multi_thread")]
async fn trees_with_other_hints_are_kept_apart() {
    let (world, mut files) = (World::new(), Files::default());
    files.file("a", "1");
    let hint = |hint: &str| LocalOptions {
        shared_key_hint: hint.to_owned(),
        ..LocalOptions::default()
    };
    for (name, expected) in [("x", &["a"][..]), ("y", &["a"]), ("x", &[]), ("y", &[])] {
        let (_, requested) = files.sync_with(&world, Fault::None, hint(name)).await.unwrap();
        assert_eq!(requested, expected, "{name}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn attributes_are_trusted_where_the_client_says_so() {
    let (world, mut files) = (World::new(), Files::default());
    let since = std::time::SystemTime::now()
        .duration_since(std::time::UNIX_EPOCH)
        .unwrap();
    let future = i64::try_from(since.as_nanos()).unwrap() + 3_600_000_000_000;
    let options = || LocalOptions {
        differ: "metadata".to_owned(),
        ..LocalOptions::default()
    };
    files.put("now", 0o644, "1", future);
    files.sync_with(&world, Fault::None, options()).await.unwrap();
    files.put("now", 0o644, "2", future);
    let (_, requested) = files.sync_with(&world, Fault::None, options()).await.unwrap();
    assert_eq!(requested, Vec::<String>::new());
    files.put("now", 0o600, "2", future);
    let (tree, requested) = files.sync_with(&world, Fault::None, options()).await.unwrap();
    assert_eq!(
        (requested, tree["now"].content.as_str()),
        (vec!["now".to_owned()], "2")
    );
}

#[tokio::test(flavor = "multi_thread")]
async fn hostile_listings_are_refused() {
    let world = World::new();
    let entry = |path: &str, mode: u32, linkname: &str| {
        let linkname = linkname.to_owned();
        (
            FileStat {
                path: path.to_owned(),
                mode,
                linkname,
                ..FileStat::default()
            },
            String::new(),
        )
    };
    for entries in [
        vec![entry("../x", 0o644, "")],
        vec![entry("/etc/x", 0o644, "")],
        vec![entry("a", LINK, "/etc"), entry("a/x", 0o644, "")],
        vec![entry("a", 0o644, "/etc/passwd")],
        vec![entry("b", 0o644, ""), entry("a", 0o644, "")],
        vec![entry("a/b", 0o644, "")],
        vec![entry("a", 0o644, ""), entry("a", 0o644, "")],
        vec![entry("", DIR, "")],
        vec![entry("a\0", 0o644, "")],
    ] {
        let shown = format!("{entries:?}");
        let sender = Sender {
            entries,
            ..Sender::default()
        };
        *world.client.dir.lock().unwrap() = sender.clone();
        let error = world
            .build(&State::local("context", LocalOptions::default()))
            .await
            .unwrap_err();
        assert_eq!(error.kind(), engine::ErrorKind::User, "{shown}: {error}");
        assert!(error.to_string().contains("invalid entry"), "{shown}: {error}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn an_interrupted_transfer_leaves_nothing_trusted() {
    for fault in [
        Fault::CutContent,
        Fault::CutListing,
        Fault::Unasked,
        Fault::EarlyFin,
        Fault::Fails,
    ] {
        let (world, mut files) = (World::new(), Files::default());
        files.file("a", "1");
        files.file("b", "1");
        files.good(&world).await;
        files.file("a", "22");
        files.remove("b");
        let error = files.sync(&world, fault).await.expect_err("is interrupted");
        assert!(
            fault != Fault::Fails || error.to_string().contains("error from sender: out of disk"),
            "{error}"
        );
        files.file("b", "1");
        let (tree, requested) = files.good(&world).await;
        assert_eq!(requested, ["a", "b"], "{fault:?}");
        assert_eq!(
            (tree["a"].content.as_str(), tree["b"].content.as_str()),
            ("22", "1"),
            "{fault:?}"
        );
        assert_eq!(files.good(&world).await.1, Vec::<String>::new(), "{fault:?}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_transfer_that_fails_before_it_changes_anything_costs_nothing() {
    let (world, mut files) = (World::new(), Files::default());
    files.file("a", "1");
    files.good(&world).await;
    assert!(files.sync(&world, Fault::Fails).await.is_err());
    assert_eq!(files.good(&world).await.1, Vec::<String>::new());
}

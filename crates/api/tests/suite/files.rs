//! Trees walked, sent and received.

use std::fs;
use std::ops::ControlFlow;
use std::os::unix::fs::{MetadataExt as _, PermissionsExt as _, symlink};
use std::path::Path;

use api::fsutil::{
    FilterOptions, Message, Packet, ReceiveOptions, SendSource, TransferError, Tree, receive, send, walk,
};
use tokio::sync::mpsc;
use tokio_stream::wrappers::ReceiverStream;
use tonic::Status;

fn write(root: &Path, path: &str, content: &str) {
    let path = root.join(path);
    fs::create_dir_all(path.parent().unwrap()).unwrap();
    fs::write(path, content).unwrap();
}

fn listed(root: &Path, include: &[&str], exclude: &[&str], follow: &[&str]) -> Vec<String> {
    let owned = |list: &[&str]| list.iter().map(ToString::to_string).collect();
    let filter = FilterOptions {
        include_patterns: owned(include),
        exclude_patterns: owned(exclude),
        follow_paths: owned(follow),
    };
    let mut out = Vec::new();
    walk(&Tree::open(root).unwrap(), &filter, &mut |stat| {
        out.push(String::from_utf8(stat.path.to_vec()).unwrap());
        ControlFlow::Continue(())
    })
    .unwrap();
    out
}

#[test]
fn patterns_choose_entries() {
    let dir = tempfile::tempdir().unwrap();
    let root = dir.path();
    for path in ["a/x.txt", "a/b/y.txt", "a/b/z.md", "c/w.txt", "d.txt", "b-a/q"] {
        write(root, path, path);
    }
    let all = [
        "a",
        "a/b",
        "a/b/y.txt",
        "a/b/z.md",
        "a/x.txt",
        "b-a",
        "b-a/q",
        "c",
        "c/w.txt",
        "d.txt",
    ];
    assert_eq!(listed(root, &[], &[], &[]), all);
    assert_eq!(
        listed(root, &["a/b"], &[], &[]),
        ["a", "a/b", "a/b/y.txt", "a/b/z.md"]
    );
    assert_eq!(listed(root, &["**/*.md"], &[], &[]), ["a", "a/b", "a/b/z.md"]);
    assert_eq!(listed(root, &["*.txt"], &[], &[]), ["d.txt"]);
    assert_eq!(
        listed(root, &[], &["a", "!a/b/z.md", "b-a", "c"], &[]),
        ["a", "a/b", "a/b/z.md", "d.txt"]
    );
    assert_eq!(listed(root, &["a"], &["**/*.txt"], &[]), ["a", "a/b", "a/b/z.md"]);
    assert_eq!(listed(root, &["nope"], &[], &[]), Vec::<String>::new());
}

#[test]
fn symlinks_are_followed_for_what_is_asked() {
    let dir = tempfile::tempdir().unwrap();
    let root = dir.path();
    write(root, "real/one/file", "1");
    write(root, "real/two", "2");
    write(root, "other", "3");
    symlink("real/one", root.join("link")).unwrap();
    symlink("/link/file", root.join("abs")).unwrap();
    symlink("loop", root.join("loop")).unwrap();
    assert_eq!(
        listed(root, &[], &[], &["link/file"]),
        ["link", "real", "real/one", "real/one/file"]
    );
    assert_eq!(
        listed(root, &[], &[], &["abs"]),
        ["abs", "link", "real", "real/one", "real/one/file"]
    );
    assert_eq!(listed(root, &[], &[], &["loop"]), ["loop"]);
    assert_eq!(
        listed(root, &[], &[], &["lin*"]),
        ["link", "real", "real/one", "real/one/file"]
    );
    assert_eq!(listed(root, &[], &[], &["../../other"]), ["other"]);
}

/// Connects a sender and a receiver without a network.
async fn transfer(source: &Path, dest: &Path, options: ReceiveOptions) -> Result<(), TransferError> {
    let (to_receiver, from_sender) = mpsc::channel(4);
    let (to_sender, from_receiver) = mpsc::channel(4);
    let source = SendSource {
        dir: source.into(),
        filter: FilterOptions::default(),
    };
    let sender = send(source, ReceiverStream::new(from_receiver), to_receiver, None);
    let receiver = receive(
        dest.into(),
        options,
        ReceiverStream::new(from_sender),
        to_sender,
        None,
    );
    let (sent, received) = tokio::join!(sender, receiver);
    sent?;
    received
}

#[tokio::test]
async fn trees_arrive_as_they_were() {
    let (from, to) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
    let (from, to) = (from.path(), to.path());
    write(from, "dir/file", "content");
    write(from, "dir/empty", "");
    write(from, "big", &"x".repeat(1 << 20));
    for at in 0..300 {
        write(from, &format!("many/{at}"), &at.to_string());
    }
    fs::set_permissions(from.join("dir/file"), fs::Permissions::from_mode(0o440)).unwrap();
    fs::set_permissions(from.join("dir"), fs::Permissions::from_mode(0o751)).unwrap();
    fs::hard_link(from.join("big"), from.join("dir/linked")).unwrap();
    symlink("/etc/passwd", from.join("symlink")).unwrap();
    // What is in the way is replaced, what is beside it stays.
    write(to, "big/in/the/way", "");
    write(to, "kept", "kept");
    symlink("/tmp", to.join("dir")).unwrap();
    write(to, "symlink", "was a file");

    transfer(from, to, ReceiveOptions::default()).await.unwrap();

    assert_eq!(fs::read_to_string(to.join("dir/file")).unwrap(), "content");
    assert_eq!(fs::read(to.join("dir/empty")).unwrap(), b"");
    assert_eq!(fs::read(to.join("big")).unwrap().len(), 1 << 20);
    assert_eq!(fs::read_to_string(to.join("many/299")).unwrap(), "299");
    assert_eq!(fs::read_to_string(to.join("kept")).unwrap(), "kept");
    assert_eq!(
        fs::read_link(to.join("symlink")).unwrap(),
        Path::new("/etc/passwd")
    );
    let (one, two) = (
        fs::metadata(to.join("big")).unwrap(),
        fs::metadata(to.join("dir/linked")).unwrap(),
    );
    assert_eq!((one.ino(), one.nlink()), (two.ino(), 2));
    for path in ["dir", "dir/file", "many", "big"] {
        let (was, is) = (
            fs::metadata(from.join(path)).unwrap(),
            fs::metadata(to.join(path)).unwrap(),
        );
        assert_eq!(
            (was.mode(), was.mtime(), was.mtime_nsec()),
            (is.mode(), is.mtime(), is.mtime_nsec()),
            "{path}"
        );
    }
    assert!(
        fs::read_dir(to).unwrap().all(|entry| !entry
            .unwrap()
            .file_name()
            .to_string_lossy()
            .contains(".tmp."))
    );
}

#[tokio::test]
async fn delete_leaves_only_what_was_sent() {
    let (from, to) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
    write(from.path(), "a/b", "new");
    write(to.path(), "a/b", "old");
    write(to.path(), "a/gone", "");
    write(to.path(), "dir/gone/too", "");
    transfer(from.path(), to.path(), ReceiveOptions { delete: true })
        .await
        .unwrap();
    assert_eq!(fs::read_to_string(to.path().join("a/b")).unwrap(), "new");
    assert!(!to.path().join("a/gone").exists());
    assert!(!to.path().join("dir").exists());
}

#[tokio::test]
async fn hostile_senders_cannot_leave_the_directory() {
    let outside = tempfile::tempdir().unwrap();
    for paths in [
        vec![("../evil", 0)],
        vec![("/evil", 0)],
        vec![("a/../../evil", 0)],
        vec![("missing/evil", 0)],
        vec![("link", api::fsutil::mode::SYMLINK), ("link/evil", 0)],
    ] {
        let to = tempfile::tempdir().unwrap();
        let (packets, incoming) = mpsc::channel::<Result<Packet, Status>>(8);
        let (outgoing, mut answers) = mpsc::channel(8);
        for (path, mode) in paths {
            let stat = api::fsutil::Stat {
                path: path.into(),
                mode: mode | 0o644,
                linkname: if mode == 0 {
                    "".into()
                } else {
                    outside.path().to_str().unwrap().to_owned().into()
                },
                ..Default::default()
            };
            packets.send(Ok(Message::Stat(Some(stat)).into())).await.unwrap();
        }
        let dest = to.path().join("dest");
        let result = receive(
            dest,
            ReceiveOptions::default(),
            ReceiverStream::new(incoming),
            outgoing,
            None,
        )
        .await;
        assert!(result.is_err());
        let mut last = None;
        while let Some(answer) = answers.recv().await {
            last = Some(Message::try_from(answer.unwrap()).unwrap());
        }
        assert!(matches!(last, Some(Message::Failed(_))));
        assert_eq!(fs::read_dir(outside.path()).unwrap().count(), 0);
        assert_eq!(fs::read_dir(to.path()).unwrap().count(), 1);
    }
}

#[tokio::test]
async fn senders_refuse_numbers_they_did_not_offer() {
    let from = tempfile::tempdir().unwrap();
    let (requests, incoming) = mpsc::channel::<Result<Packet, Status>>(8);
    let (outgoing, mut packets) = mpsc::channel(8);
    requests.send(Ok(Message::Request(7).into())).await.unwrap();
    let source = SendSource {
        dir: from.path().into(),
        filter: FilterOptions::default(),
    };
    let result = send(source, ReceiverStream::new(incoming), outgoing, None).await;
    assert!(matches!(result, Err(TransferError::InvalidFile(7))));
    while packets.recv().await.is_some() {}
}

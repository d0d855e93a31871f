//! Git repositories as sources. The server is Git's own backend; where Git is missing the tests say so and pass.

use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::Mutex;
use std::sync::atomic::{AtomicUsize, Ordering};

use engine::ErrorKind;
use llb::sourcepolicy::{Policy, PolicyAction, Rule, Selector, Update};
use llb::{GitOptions, State};
use tempfile::TempDir;
use testkit::registry::Registry;

use super::server::{Answer, Seen, Server, git_backend};
use super::world::{Tree, World};

/// Repositories to clone from.
struct Origin {
    dir: TempDir,
    format: &'static str,
}

impl Origin {
    /// `None` where there is no Git.
    #[expect(clippy::print_stderr, reason = "a skipped test says why")]
    fn new(format: &'static str) -> Option<Self> {
        if Command::new("git").arg("version").output().is_err() {
            eprintln!("skipped: git is not installed");
            return None;
        }
        Some(Self {
            dir: tempfile::tempdir().unwrap(),
            format,
        })
    }

    fn path(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    fn git(&self, name: &str, args: &[&str]) -> String {
        git(&self.path(name), args)
    }

    fn init(&self, name: &str) {
        std::fs::create_dir_all(self.path(name)).unwrap();
        self.git(
            name,
            &[
                "init",
                "-q",
                "-b",
                "main",
                &format!("--object-format={}", self.format),
            ],
        );
    }

    /// Commits a file and returns the commit.
    fn commit(&self, name: &str, file: &str, content: &str) -> String {
        let path = self.path(name).join(file);
        std::fs::create_dir_all(path.parent().unwrap()).unwrap();
        std::fs::write(path, content).unwrap();
        self.git(name, &["add", "-A"]);
        self.git(name, &["commit", "-q", "-m", file]);
        self.git(name, &["rev-parse", "HEAD"])
    }

    fn serve(&self) -> Server {
        Server::start(git_backend(self.dir.path().to_owned()))
    }
}

fn git(dir: &Path, args: &[&str]) -> String {
    let mut command = Command::new("git");
    command
        .current_dir(dir)
        .args(args)
        .env("GIT_CONFIG_GLOBAL", "/dev/null")
        .env("GIT_CONFIG_NOSYSTEM", "1");
    for who in ["AUTHOR", "COMMITTER"] {
        command
            .env(format!("GIT_{who}_NAME"), "n")
            .env(format!("GIT_{who}_EMAIL"), "e@e");
        command.env(format!("GIT_{who}_DATE"), "1000000000 +0000");
    }
    let output = command.output().unwrap();
    assert!(
        output.status.success(),
        "git {args:?}: {}",
        String::from_utf8_lossy(&output.stderr)
    );
    String::from_utf8_lossy(&output.stdout).trim().to_owned()
}

fn state(server: &Server, fragment: &str) -> State {
    with(server, fragment, GitOptions::default())
}

fn with(server: &Server, fragment: &str, options: GitOptions) -> State {
    State::git(&server.url("/repo/.git"), fragment, options)
}

fn keep() -> GitOptions {
    GitOptions {
        keep_git_dir: true,
        ..GitOptions::default()
    }
}

fn names(tree: &Tree) -> Vec<&str> {
    tree.keys().map(String::as_str).collect()
}

fn fetches(log: &[Seen]) -> usize {
    log.iter()
        .filter(|seen| String::from_utf8_lossy(&seen.body).contains("command=fetch"))
        .count()
}

#[tokio::test(flavor = "multi_thread")]
async fn the_default_branch_is_checked_out_once() {
    let Some(origin) = Origin::new("sha1") else { return };
    origin.init("repo");
    std::os::unix::fs::symlink("a", origin.path("repo").join("link")).unwrap();
    origin.commit("repo", "a", "1");
    let executable = std::os::unix::fs::PermissionsExt::from_mode(0o755);
    std::fs::set_permissions(origin.path("repo").join("a"), executable).unwrap();
    origin.commit("repo", "dir/b", "2");
    let (server, world) = (origin.serve(), World::new());
    let tree = world.build(&state(&server, "")).await.unwrap();
    assert_eq!(names(&tree), ["a", "dir/", "dir/b", "link"]);
    let modes: Vec<u32> = ["a", "dir/", "dir/b"]
        .iter()
        .map(|name| tree[*name].mode)
        .collect();
    assert_eq!(modes, [0o755, 0o755, 0o644]);
    assert_eq!(tree["link"].content, "a");
    assert_eq!(fetches(&server.take_log()), 1);
    // Another name of the same commit is the same checkout, and the same repository.
    assert_eq!(world.build(&state(&server, "main")).await.unwrap(), tree);
    assert_eq!(fetches(&server.take_log()), 0);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_moved_branch_is_fetched_again() {
    let Some(origin) = Origin::new("sha1") else { return };
    origin.init("repo");
    origin.commit("repo", "a", "1");
    let (server, world) = (origin.serve(), World::new());
    world.build(&state(&server, "main")).await.unwrap();
    std::fs::remove_file(origin.path("repo").join("a")).unwrap();
    origin.commit("repo", "b", "2");
    assert_eq!(names(&world.build(&state(&server, "main")).await.unwrap()), ["b"]);
    // A branch below the name of one that is gone.
    origin.git("repo", &["checkout", "-q", "-b", "x"]);
    assert_eq!(names(&world.build(&state(&server, "x")).await.unwrap()), ["b"]);
    origin.git("repo", &["checkout", "-q", "-b", "y"]);
    origin.git("repo", &["branch", "-D", "x"]);
    origin.git("repo", &["checkout", "-q", "-b", "x/y"]);
    origin.commit("repo", "c", "3");
    assert_eq!(
        names(&world.build(&state(&server, "x/y")).await.unwrap()),
        ["b", "c"]
    );
}

async fn every_kind_of_ref(format: &'static str) {
    let Some(origin) = Origin::new(format) else { return };
    origin.init("repo");
    let first = origin.commit("repo", "a", "1");
    origin.git("repo", &["tag", "-a", "v1", "-m", "one"]);
    origin.commit("repo", "b", "2");
    origin.git("repo", &["tag", "light"]);
    origin.commit("repo", "c", "3");
    origin.git("repo", &["update-ref", "refs/pull/1/merge", "HEAD"]);
    origin.git("repo", &["reset", "-q", "--hard", &first]);
    let (server, world) = (origin.serve(), World::new());
    for (fragment, wanted) in [
        ("v1", &["a"][..]),
        ("refs/tags/v1", &["a"]),
        ("light", &["a", "b"]),
        ("refs/pull/1/merge", &["a", "b", "c"]),
        ("main", &["a"]),
        (&first, &["a"]),
    ] {
        assert_eq!(
            names(&world.build(&state(&server, fragment)).await.unwrap()),
            wanted,
            "{fragment}"
        );
    }
    let error = world.build(&state(&server, "v2")).await.unwrap_err().to_string();
    assert!(error.contains("repository does not contain ref v2"), "{error}");
    let missing = "1".repeat(first.len());
    assert!(world.build(&state(&server, &missing)).await.is_err());
}

#[tokio::test(flavor = "multi_thread")]
async fn every_kind_of_ref_is_found() {
    every_kind_of_ref("sha1").await;
}

#[tokio::test(flavor = "multi_thread")]
async fn every_kind_of_ref_is_found_with_sha256() {
    every_kind_of_ref("sha256").await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_kept_repository_is_a_clone_of_one_commit() {
    let Some(origin) = Origin::new("sha1") else { return };
    origin.init("repo");
    origin.commit("repo", "a", "1");
    let commit = origin.commit("repo", "b", "2");
    origin.git("repo", &["tag", "-a", "v1", "-m", "one"]);
    let tag = origin.git("repo", &["rev-parse", "v1"]);
    let (server, world) = (origin.serve(), World::new());
    for (fragment, reference, checksum) in [
        ("main", Some("refs/heads/main"), &commit),
        ("v1", Some("refs/tags/v1"), &tag),
        (&commit, None, &commit),
    ] {
        let tree = world.build(&with(&server, fragment, keep())).await.unwrap();
        assert_eq!(tree["b"].content, "2");
        assert_eq!(tree[".git/HEAD"].content.trim(), commit, "{fragment}");
        assert_eq!(tree[".git/shallow"].content.trim(), commit, "{fragment}");
        let config = &tree[".git/config"].content;
        assert!(config.contains(&server.url("/repo/.git")), "{config}");
        assert!(!config.contains("file://"), "{config}");
        assert!(!tree.contains_key(".git/FETCH_HEAD"));
        assert_eq!(
            tree[".git/logs/HEAD"].content, "",
            "nothing tells when this was made"
        );
        assert!(tree.contains_key(".git/description") && tree.contains_key(".git/info/exclude"));
        let hooks = tree.keys().filter(|name| name.starts_with(".git/hooks/"));
        assert_eq!(hooks.collect::<Vec<_>>(), [".git/hooks/"], "none of this host");
        let refs: Vec<&str> = tree
            .keys()
            .filter_map(|name| name.strip_prefix(".git/"))
            .collect();
        let refs: Vec<&str> = refs
            .into_iter()
            .filter(|name| name.starts_with("refs/") && !name.ends_with('/'))
            .collect();
        assert_eq!(refs, reference.into_iter().collect::<Vec<_>>(), "{fragment}");
        if let Some(reference) = reference {
            assert_eq!(tree[&format!(".git/{reference}")].content.trim(), checksum);
        }
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_subdirectory_is_one() {
    let Some(origin) = Origin::new("sha1") else { return };
    origin.init("repo");
    std::os::unix::fs::symlink("/etc", origin.path("repo").join("out")).unwrap();
    origin.commit("repo", "a", "1");
    origin.commit("repo", "x/y/b", "2");
    let (server, world) = (origin.serve(), World::new());
    assert_eq!(
        names(&world.build(&state(&server, ":x/../x/y")).await.unwrap()),
        ["b"]
    );
    let options = GitOptions {
        keep_git_dir: true,
        ..GitOptions::default()
    };
    assert_eq!(
        names(&world.build(&with(&server, "main:x", options)).await.unwrap()),
        ["y/", "y/b"]
    );
    for subdir in [":out", ":a", ":none", ":out/ssl"] {
        let error = world
            .build(&state(&server, subdir))
            .await
            .unwrap_err()
            .to_string();
        assert!(error.contains("invalid subdir"), "{error}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_checksum_is_that_of_the_tag_or_of_its_commit() {
    let Some(origin) = Origin::new("sha1") else { return };
    origin.init("repo");
    let commit = origin.commit("repo", "a", "1");
    origin.git("repo", &["tag", "-a", "v1", "-m", "one"]);
    let tag = origin.git("repo", &["rev-parse", "v1"]);
    let (server, world) = (origin.serve(), World::new());
    let checked = |checksum: &str| {
        let options = GitOptions {
            checksum: checksum.to_owned(),
            ..GitOptions::default()
        };
        with(&server, "v1", options)
    };
    for checksum in [&commit[..], &tag, &commit[..8]] {
        world.build(&checked(checksum)).await.unwrap();
    }
    let error = world.build(&checked("0123456789")).await.unwrap_err().to_string();
    assert!(
        error.contains("expected checksum to match 0123456789, got"),
        "{error}"
    );
    // The commit itself, whatever the name points to now.
    origin.commit("repo", "b", "2");
    let options = GitOptions {
        checksum: commit,
        fetch_by_commit: true,
        ..keep()
    };
    let tree = world.build(&with(&server, "main", options)).await.unwrap();
    assert!(!tree.contains_key("b") && tree.contains_key(".git/refs/heads/main"));
}

#[tokio::test(flavor = "multi_thread")]
async fn a_branch_that_moves_meanwhile_gives_what_was_resolved() {
    let Some(origin) = Origin::new("sha1") else { return };
    origin.init("repo");
    origin.commit("repo", "a", "1");
    let (backend, asked) = (git_backend(origin.dir.path().to_owned()), AtomicUsize::new(0));
    let repo = origin.path("repo");
    let server = Server::start(move |seen| {
        // The first question is what the branch is, the second begins the fetch.
        if seen.method == "GET" && asked.fetch_add(1, Ordering::Relaxed) == 1 {
            std::fs::write(repo.join("b"), "2").unwrap();
            git(&repo, &["add", "-A"]);
            git(&repo, &["commit", "-q", "-m", "moved"]);
        }
        backend(seen)
    });
    let world = World::new();
    assert_eq!(names(&world.build(&state(&server, "main")).await.unwrap()), ["a"]);
    assert_eq!(
        names(&world.build(&state(&server, "main")).await.unwrap()),
        ["a", "b"]
    );
}

#[tokio::test(flavor = "multi_thread")]
async fn old_servers_give_commits_away_with_their_branches() {
    let Some(origin) = Origin::new("sha1") else { return };
    origin.init("repo");
    let first = origin.commit("repo", "a", "1");
    origin.commit("repo", "b", "2");
    let backend = git_backend(origin.dir.path().to_owned());
    let server = Server::start(move |seen| {
        let mut seen = seen.clone();
        seen.headers.remove("git-protocol");
        backend(&seen)
    });
    let world = World::new();
    assert_eq!(
        names(&world.build(&state(&server, "main")).await.unwrap()),
        ["a", "b"]
    );
    assert_eq!(names(&world.build(&state(&server, &first)).await.unwrap()), ["a"]);
}

#[tokio::test(flavor = "multi_thread")]
async fn submodules_come_along_without_traces() {
    let Some(origin) = Origin::new("sha1") else { return };
    for name in ["sub", "repo"] {
        origin.init(name);
        origin.commit(name, "a", name);
    }
    let sub = origin.path("sub");
    let add = |url: &str, path: &str| {
        let cloned = origin.path("repo").join(path);
        git(
            origin.dir.path(),
            &["clone", "-q", sub.to_str().unwrap(), cloned.to_str().unwrap()],
        );
        origin.git("repo", &["submodule", "add", "-q", url, path]);
        origin.commit("repo", "n", path);
    };
    let server = origin.serve();
    origin.git("repo", &["remote", "add", "origin", &server.url("/repo/.git")]);
    add("../../sub/.git", "s");
    let world = World::new();
    let tree = world.build(&state(&server, "")).await.unwrap();
    assert_eq!(names(&tree), [".gitmodules", "a", "n", "s/", "s/a"]);
    assert_eq!(tree["s/a"].content, "sub");
    let skipped = GitOptions {
        skip_submodules: true,
        ..GitOptions::default()
    };
    let tree = world.build(&with(&server, "", skipped)).await.unwrap();
    assert_eq!(names(&tree), [".gitmodules", "a", "n", "s/"]);
    let tree = world.build(&with(&server, "", keep())).await.unwrap();
    assert!(
        tree["s/.git"].content.contains("../.git/modules/s"),
        "{}",
        tree["s/.git"].content
    );
    for name in ["description", "info/exclude", "hooks/"] {
        assert!(tree.contains_key(&format!(".git/modules/s/{name}")), "{name}");
    }
    assert_eq!(tree[".git/modules/s/logs/HEAD"].content, "");
    let copied = tempfile::tempdir().unwrap();
    let copy = copied.path().join("copy");
    let done = Command::new("cp").arg("-a").arg(world.path()).arg(&copy).status();
    assert!(done.unwrap().success());
    assert_eq!(git(&copy, &["status", "--porcelain"]), "");
    let submodules = git(&copy, &["submodule", "status", "--recursive"]);
    assert!(submodules.ends_with(" s (heads/main)"), "{submodules}");
    // A repository of this machine is none of a client's submodules.
    origin.git(
        "repo",
        &[
            "config",
            "-f",
            ".gitmodules",
            "submodule.s.url",
            sub.to_str().unwrap(),
        ],
    );
    origin.commit("repo", "n", "local");
    let error = world.build(&state(&server, "")).await.unwrap_err().to_string();
    assert!(
        error.contains("failed to update submodules") && error.contains("'file' not allowed"),
        "{error}"
    );
}

#[tokio::test(flavor = "multi_thread")]
async fn files_may_have_the_commits_time() {
    let Some(origin) = Origin::new("sha1") else { return };
    origin.init("repo");
    std::os::unix::fs::symlink("nowhere", origin.path("repo").join("link")).unwrap();
    origin.commit("repo", "dir/a", "1");
    let (server, world) = (origin.serve(), World::new());
    let options = GitOptions {
        mtime: "commit".to_owned(),
        ..GitOptions::default()
    };
    let tree = world.build(&with(&server, "", options)).await.unwrap();
    assert!(
        tree.values().all(|found| found.mtime == 1_000_000_000),
        "{tree:?}"
    );
}

#[expect(clippy::too_many_lines, reason = "one story told in order")]
#[tokio::test(flavor = "multi_thread")]
async fn secrets_open_repositories_and_stay_secret() {
    let Some(origin) = Origin::new("sha1") else { return };
    origin.init("repo");
    origin.commit("repo", "a", "1");
    let backend = git_backend(origin.dir.path().to_owned());
    let wanted: &'static Mutex<String> = Box::leak(Box::default());
    let server = Server::start(move |seen| {
        // Who may see the list of processes sees no secret in it.
        let lines = std::fs::read_dir("/proc")
            .unwrap()
            .filter_map(|entry| std::fs::read_to_string(entry.ok()?.path().join("cmdline")).ok());
        for line in lines.filter(|line| line.contains("git")) {
            let is_shown = ["p4ssw0rd", "t0k3n", "h34d3r", "eC1hY2"]
                .iter()
                .any(|secret| line.contains(secret));
            assert!(!is_shown, "{line}");
        }
        let given = seen.headers.get("authorization").cloned().unwrap_or_default();
        if given == *wanted.lock().unwrap() {
            return backend(seen);
        }
        Answer(
            401,
            vec![("WWW-Authenticate".into(), "Basic realm=\"x\"".into())],
            given.into_bytes(),
        )
    });
    let set = |secrets: &[(&str, &str)], world: &World| {
        let secrets = secrets
            .iter()
            .map(|(name, value)| ((*name).to_owned(), (*value).to_owned()))
            .collect();
        *world.client.secrets.lock().unwrap() = secrets;
    };
    // x-access-token:t0k3n
    "basic eC1hY2Nlc3MtdG9rZW46dDBrM24=".clone_into(&mut wanted.lock().unwrap());
    let world = World::new();
    let error = world.build(&state(&server, "")).await.unwrap_err();
    assert_eq!(error.kind(), engine::ErrorKind::Denied, "{error}");
    set(
        &[
            ("GIT_AUTH_TOKEN", "other"),
            (&format!("GIT_AUTH_TOKEN.{}", server.host()), "t0k3n\n"),
        ],
        &world,
    );
    let tree = world.build(&with(&server, "", keep())).await.unwrap();
    assert!(!format!("{tree:?}").contains("t0k3n") && !format!("{tree:?}").contains("eC1hY2"));
    "Custom h34d3r".clone_into(&mut wanted.lock().unwrap());
    set(&[("GIT_AUTH_HEADER", "Custom h34d3r")], &world);
    let world = World::new();
    set(&[("GIT_AUTH_HEADER", "Custom h34d3r")], &world);
    world.build(&state(&server, "main")).await.unwrap();
    assert!(!world.log().contains("h34d3r"), "{}", world.log());
    // A password in the URL: user:p4ssw0rd
    "Basic dXNlcjpwNHNzdzByZA==".clone_into(&mut wanted.lock().unwrap());
    let url = server
        .url("/repo/.git")
        .replace("http://", "http://user:p4ssw0rd@");
    let world = World::new();
    let tree = world.build(&State::git(&url, "", keep())).await.unwrap();
    assert!(
        !format!("{tree:?}").contains("p4ssw0rd"),
        "{}",
        tree[".git/config"].content
    );
    let error = world
        .build(&State::git(&url, "none", keep()))
        .await
        .unwrap_err()
        .to_string();
    assert!(
        !error.contains("p4ssw0rd") && !world.log().contains("p4ssw0rd"),
        "{error}"
    );
    let kept = Command::new("grep")
        .args(["-rlE", "p4ssw0rd|t0k3n"])
        .arg(world.store.root())
        .output()
        .unwrap();
    assert_eq!(String::from_utf8_lossy(&kept.stdout), "");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_broken_repository_is_made_anew() {
    let Some(origin) = Origin::new("sha1") else { return };
    origin.init("repo");
    origin.commit("repo", "a", "1");
    let (server, world) = (origin.serve(), World::new());
    world.build(&state(&server, "main")).await.unwrap();
    let index = format!("git-remote::{}", server.url("/repo/.git"));
    let take = || {
        let ids = world.store.search_index(&index).unwrap();
        assert_eq!(ids.len(), 1);
        let reference = world.store.get_mutable(&ids[0]).unwrap();
        let path = reference.mounts(false).unwrap()[0].source.clone();
        (reference, path)
    };
    // Locks that a killed process left.
    let (held, path) = take();
    for entry in std::fs::read_dir(path.join("refs/cooper")).unwrap() {
        let lock = format!("{}.lock", entry.unwrap().path().display());
        std::fs::write(lock, "").unwrap();
    }
    std::fs::write(path.join("shallow.lock"), "").unwrap();
    drop(held);
    origin.commit("repo", "b", "2");
    assert_eq!(
        names(&world.build(&state(&server, "main")).await.unwrap()),
        ["a", "b"]
    );
    // After a crash the store knows nothing of what was being written to.
    let (held, path) = take();
    held.set_metadata("git.format", None).unwrap();
    std::fs::remove_file(path.join("HEAD")).unwrap();
    drop(held);
    origin.commit("repo", "c", "3");
    assert_eq!(
        names(&world.build(&state(&server, "main")).await.unwrap()),
        ["a", "b", "c"]
    );
    // The remote is another repository now.
    std::fs::remove_dir_all(origin.path("repo")).unwrap();
    let other = Origin {
        dir: origin.dir,
        format: "sha256",
    };
    other.init("repo");
    other.commit("repo", "d", "4");
    assert_eq!(names(&world.build(&state(&server, "main")).await.unwrap()), ["d"]);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_cancelled_build_ends_git() {
    use std::io::Read;
    if Origin::new("sha1").is_none() {
        return;
    }
    let listener = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    let url = format!("http://{}/repo.git", listener.local_addr().unwrap());
    let (asked, mut is_asked) = tokio::sync::mpsc::channel(1);
    // A server that never answers; it sees the end of its client.
    let server = tokio::task::spawn_blocking(move || {
        let (mut stream, _) = listener.accept().unwrap();
        let mut buffer = [0; 4096];
        while stream.read(&mut buffer).is_ok_and(|count| count > 0) {
            // More of the request than one read may come after the first.
            let _ = asked.try_send(());
        }
    });
    let world = World::new();
    let source = State::git(&url, "", GitOptions::default());
    tokio::select! {
        built = world.build(&source) => panic!("nothing was built: {built:?}"),
        _ = is_asked.recv() => {}
    }
    tokio::time::timeout(std::time::Duration::from_secs(30), server)
        .await
        .expect("git ends")
        .unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn a_source_is_resolved_with_its_objects() {
    let Some(origin) = Origin::new("sha1") else { return };
    origin.init("repo");
    let commit = origin.commit("repo", "a", "1");
    origin.git("repo", &["tag", "-a", "v1", "-m", "the tag"]);
    let tag = origin.git("repo", &["rev-parse", "v1"]);
    let (server, world) = (origin.serve(), World::new());
    let meta = world.ask(&state(&server, "v1")).await.unwrap().git.unwrap();
    assert_eq!((&meta.checksum, &meta.commit_checksum), (&tag, &commit));
    assert_eq!(meta.reference, "refs/tags/v1");
    assert!(
        meta.tag_object
            .starts_with(format!("object {commit}\n").as_bytes())
            && meta.tag_object.ends_with(b"the tag\n")
    );
    assert!(meta.commit_object.starts_with(b"tree ") && meta.commit_object.ends_with(b"\na\n"));
    let meta = world.ask(&state(&server, "")).await.unwrap().git.unwrap();
    assert_eq!(
        (meta.reference.as_str(), meta.checksum),
        ("refs/heads/main", commit)
    );
    assert!(meta.tag_object.is_empty() && meta.commit_checksum.is_empty());
}

#[tokio::test(flavor = "multi_thread")]
async fn a_bundle_stands_in_for_the_remote() {
    for format in ["sha1", "sha256"] {
        let Some(origin) = Origin::new(format) else { return };
        origin.init("repo");
        let first = origin.commit("repo", "a", "1");
        let commit = origin.commit("repo", "b", "2");
        origin.git("repo", &["bundle", "create", "-q", "../bundle", "main"]);
        let bytes = std::fs::read(origin.path("bundle")).unwrap();
        let (world, registry) = (World::new(), Registry::start().await);
        let digest = registry.add_blob("bundles", bytes);
        let locator = format!(
            "docker-image+blob://{}",
            registry.reference(&format!("bundles@{digest}"))
        );
        let from_bundle = |name: &str, checksum: &str, keep_git_dir| {
            let options = GitOptions {
                bundle: locator.clone(),
                checksum: checksum.to_owned(),
                keep_git_dir,
                ..GitOptions::default()
            };
            // Nobody listens there.
            State::git("http://127.0.0.1:1/repo.git", name, options)
        };
        let tree = world.build(&from_bundle("main", &commit, false)).await.unwrap();
        assert_eq!(names(&tree), ["a", "b"], "{format}");
        let by_commit = world.build(&from_bundle(&commit, &commit, false)).await.unwrap();
        assert_eq!(by_commit, tree);
        // What was unpacked is kept.
        registry.remove_blob("bundles", &digest);
        let tree = world.build(&from_bundle("main", &commit, true)).await.unwrap();
        assert!(tree.contains_key(".git/"), "{tree:?}");
        assert!(!tree.keys().any(|name| name.contains("cooper")), "{tree:?}");
        // The parent is in the bundle too; what is not, is not taken from anywhere else.
        let parent = world.build(&from_bundle(&first, &first, false)).await.unwrap();
        assert_eq!(names(&parent), ["a"]);
        let other = "0".repeat(commit.len());
        let error = world
            .build(&from_bundle(&other, &other, false))
            .await
            .unwrap_err();
        assert!(error.to_string().contains("not found in bundle"), "{error}");
        let error = world
            .build(&from_bundle("main", &first, false))
            .await
            .unwrap_err();
        assert!(
            error.to_string().contains("expected checksum to match"),
            "{error}"
        );
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_commit_and_its_history_become_a_bundle() {
    let Some(origin) = Origin::new("sha1") else { return };
    origin.init("repo");
    origin.commit("repo", "a", "1");
    let commit = origin.commit("repo", "b", "2");
    let (server, world) = (origin.serve(), World::new());
    // The commit alone is there already.
    world.build(&state(&server, "main")).await.unwrap();
    let options = || GitOptions {
        checkout_bundle: true,
        ..GitOptions::default()
    };
    let tree = world.build(&with(&server, "main", options())).await.unwrap();
    assert_eq!(names(&tree), ["bundle"]);
    assert_eq!(tree["bundle"].mode, 0o644);
    let head = tree["bundle"].content.split("\n\n").next().unwrap();
    // Nothing that a reader would have to have already.
    assert_eq!(head, format!("# v2 git bundle\n{commit} refs/heads/main"));
    // Another name is another bundle.
    origin.git("repo", &["branch", "other"]);
    let tree = world.build(&with(&server, "other", options())).await.unwrap();
    assert!(tree["bundle"].content.contains("refs/heads/other"));
}

/// A key that signs commits and tags of a repository; `None` where there is no `ssh-keygen`.
#[expect(clippy::print_stderr, reason = "a skipped test says why")]
fn signing_key(origin: &Origin, repository: &str, name: &str) -> Option<String> {
    let path = origin.path(name);
    let mut command = Command::new("ssh-keygen");
    let made = command
        .args(["-q", "-t", "ed25519", "-N", "", "-C", "x", "-f"])
        .arg(&path)
        .status();
    if made.is_err() {
        eprintln!("skipped: ssh-keygen is not installed");
        return None;
    }
    origin.git(repository, &["config", "gpg.format", "ssh"]);
    origin.git(repository, &["config", "user.signingkey", path.to_str().unwrap()]);
    Some(std::fs::read_to_string(path.with_extension("pub")).unwrap())
}

/// A policy that has a ref's signature checked, by the name that policies know the source by.
fn signed(server: &Server, name: &str, demands: &[(&str, &str)]) -> Policy {
    let host = server.url("");
    let host = host.trim_start_matches("http://").trim_end_matches('/');
    let attrs = demands
        .iter()
        .map(|(key, value)| (format!("git.sig.{key}"), (*value).to_owned()));
    Policy {
        version: 1,
        rules: vec![Rule {
            action: PolicyAction::Convert as i32,
            selector: Some(Selector {
                identifier: format!("git://{host}/repo/.git#{name}"),
                ..Selector::default()
            }),
            updates: Some(Update {
                attrs: attrs.collect(),
                ..Update::default()
            }),
        }],
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn commits_and_tags_are_signed_as_demanded() {
    for format in ["sha1", "sha256"] {
        let Some(origin) = Origin::new(format) else { return };
        origin.init("repo");
        origin.commit("repo", "a", "1");
        origin.git("repo", &["tag", "-a", "-m", "x", "unsigned"]);
        let Some(first) = signing_key(&origin, "repo", "first") else {
            return;
        };
        origin.git("repo", &["config", "commit.gpgsign", "true"]);
        origin.commit("repo", "b", "2");
        let Some(second) = signing_key(&origin, "repo", "second") else {
            return;
        };
        origin.git("repo", &["tag", "-s", "-m", "x", "v1"]);
        let (server, world) = (origin.serve(), World::new());
        let build = async |name: &str, demands: &[(&str, &str)]| {
            let policy = signed(&server, name, demands);
            let built = world.build_under(&state(&server, name), Some(policy)).await;
            built.map(drop).map_err(|error| error.to_string())
        };
        assert_eq!(build("main", &[("pubkey", &first)]).await, Ok(()), "{format}");
        // The commit's signature, or the tag's.
        assert_eq!(build("v1", &[("pubkey", &first)]).await, Ok(()));
        assert_eq!(build("v1", &[("pubkey", &second)]).await, Ok(()));
        let strict = [("pubkey", second.as_str()), ("requiresignedtag", "true")];
        assert_eq!(build("v1", &strict).await, Ok(()));
        for (name, demands, text) in [
            (
                "unsigned",
                vec![("pubkey", first.as_str())],
                "git object is not signed",
            ),
            (
                "main",
                vec![("pubkey", &second)],
                "failed to verify ssh signature",
            ),
            (
                "main",
                vec![("rejectexpired", "true")],
                "failed to parse ssh public key",
            ),
            (
                "main",
                vec![("pubkey", &first), ("requiresignedtag", "true")],
                "no signed tag found",
            ),
            (
                "v1",
                vec![("pubkey", &first), ("requiresignedtag", "true")],
                "failed to verify",
            ),
            (
                "v1",
                vec![("pubkey", &second), ("ignoresignedtag", "true")],
                "failed to verify",
            ),
        ] {
            let error = build(name, &demands).await.unwrap_err();
            assert!(error.contains(text), "{name} {demands:?}: {error}");
        }
        // The same commit without a demand is the same checkout.
        server.take_log();
        world.build(&state(&server, "main")).await.unwrap();
        assert_eq!(fetches(&server.take_log()), 0);
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_branch_is_what_it_last_was_where_that_will_do() {
    let Some(origin) = Origin::new("sha1") else { return };
    origin.init("repo");
    origin.commit("repo", "a", "1");
    let (server, world) = (origin.serve(), World::new());
    let main = state(&server, "main");
    let error = world.build_with_cache(&main, "offline").await.unwrap_err();
    assert!(error.to_string().contains("is not known here"), "{error}");
    assert_eq!(names(&world.build(&main).await.unwrap()), ["a"]);
    origin.commit("repo", "b", "2");
    server.take_log();
    assert_eq!(
        names(&world.build_with_cache(&main, "offline").await.unwrap()),
        ["a"]
    );
    assert_eq!(server.take_log().len(), 0);
    assert_eq!(
        names(&world.build_with_cache(&main, "fallback").await.unwrap()),
        ["a", "b"]
    );
    // Nobody listens here: what is not known stays so.
    let gone = State::git("http://127.0.0.1:1/repo/.git", "main", GitOptions::default());
    let error = world.build_with_cache(&gone, "fallback").await.unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Unavailable, "{error}");
}

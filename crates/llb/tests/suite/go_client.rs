//! The same constructions as in `golden/generate.go` marshal to the bytes of the Go client.

use std::collections::{BTreeMap, BTreeSet};

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use llb::pb::{
    self, Definition, LinuxResources, MountContentCache, NetMode, Op, OpMetadata, SecurityMode, Source,
};
use llb::{
    CacheSharing, Chown, Constraints, CopyOptions, FileActions, GitOptions, HttpOptions, ImageBlobOptions,
    ImageOptions, LocalOptions, MarshalOptions, MkdirOptions, MkfileOptions, Mount, OciLayoutOptions, Owner,
    ProxyEnv, ResolveMode, RmOptions, Secret, SourceMap, Ssh, State, SymlinkOptions, diff, merge,
};
use oci::{Digest, ImageConfig, Platform};
use prost::Message as _;
use serde::Deserialize;

#[derive(Deserialize)]
#[serde(rename_all = "PascalCase")]
struct Golden {
    name: String,
    ops: Option<Vec<String>>,
    meta: BTreeMap<String, OpMetadata>,
    source: Option<Source>,
}

struct Cases {
    golden: BTreeMap<String, Golden>,
    options: MarshalOptions,
}

impl Cases {
    fn load() -> Self {
        let golden: Vec<Golden> = serde_json::from_str(include_str!("../golden/go_client.json")).unwrap();
        let options = MarshalOptions {
            platform: Platform::new("linux", "amd64"),
            local_unique_id: "unique".into(),
            ..MarshalOptions::default()
        };
        Self {
            golden: golden
                .into_iter()
                .map(|golden| (golden.name.clone(), golden))
                .collect(),
            options,
        }
    }

    #[track_caller]
    fn check(&mut self, name: &str, state: &State) {
        let options = self.options.clone();
        self.check_with(name, state, &options);
    }

    #[track_caller]
    fn check_with(&mut self, name: &str, state: &State, options: &MarshalOptions) {
        let golden = self.golden.remove(name).expect("a golden construction");
        let ours = state.marshal(options).unwrap();
        let theirs = golden.ops.unwrap_or_default();
        let theirs: Vec<Vec<u8>> = theirs.iter().map(|op| STANDARD.decode(op).unwrap()).collect();
        for (at, (ours, theirs)) in ours.def.iter().zip(&theirs).enumerate() {
            let decode = |bytes: &[u8]| Op::decode(bytes).unwrap();
            assert_eq!(decode(ours), decode(theirs), "{name}: op {at}");
            assert_eq!(ours, theirs, "{name}: bytes of op {at}");
        }
        assert_eq!(ours.def.len(), theirs.len(), "{name}");
        assert_eq!(ours.metadata, golden.meta, "{name}: metadata");
        assert_eq!(ours.source, golden.source, "{name}: source");
        if !ours.def.is_empty() {
            llb::Graph::load(&ours).unwrap();
        }
    }
}

fn arm() -> Platform {
    Platform {
        variant: "v7".into(),
        ..Platform::new("linux", "arm")
    }
}

fn image(name: &str) -> State {
    State::image(name, ImageOptions::default())
}

fn run(state: &State, arg: &str) -> State {
    state.run([arg]).done().root()
}

fn strings(list: &[&str]) -> Vec<String> {
    list.iter().map(ToString::to_string).collect()
}

fn named(prefix: &str, content: &str) -> String {
    format!("{prefix}@{}", Digest::sha256(content))
}

#[test]
fn constructions_have_the_go_clients_bytes() {
    let mut cases = Cases::load();
    images(&mut cases);
    locals_and_urls(&mut cases);
    gits(&mut cases);
    execs(&mut cases);
    mounts(&mut cases);
    platforms_and_caps(&mut cases);
    files(&mut cases);
    copies(&mut cases);
    combinations(&mut cases);
    locations(&mut cases);
    assert_eq!(cases.golden.keys().collect::<Vec<_>>(), Vec::<&String>::new());
}

fn images(cases: &mut Cases) {
    cases.check("image", &image("alpine"));
    let options = ImageOptions {
        resolve_mode: ResolveMode::ForcePull,
        record_type: "internal".into(),
        layer_limit: Some(5),
        checksum: Some(Digest::sha256("x")),
        constraints: Constraints::new().platform(&arm()).custom_name("named"),
    };
    cases.check(
        "image-options",
        &State::image("docker.io/library/busybox:1.36", options),
    );
    let options = ImageOptions {
        resolve_mode: ResolveMode::PreferLocal,
        ..ImageOptions::default()
    };
    cases.check("image-prefer-local", &State::image(&named("a/b", "x"), options));
    let options = OciLayoutOptions {
        session_id: "sess".into(),
        store_id: "store".into(),
        layer_limit: Some(3),
        ..OciLayoutOptions::default()
    };
    cases.check("oci-layout", &State::oci_layout(&named("x/y", "z"), options));
    let options = ImageBlobOptions {
        filename: "f".into(),
        perm: 0o600,
        uid: 3,
        gid: 4,
        ..ImageBlobOptions::default()
    };
    cases.check("image-blob", &State::image_blob(&named("a/b", "z"), options));
    let options = ImageBlobOptions {
        session_id: "s".into(),
        store_id: "t".into(),
        ..ImageBlobOptions::default()
    };
    cases.check(
        "oci-layout-blob",
        &State::oci_layout_blob(&named("a/b", "z"), options),
    );
    cases.check("scratch", &State::scratch());
}

fn locals_and_urls(cases: &mut Cases) {
    cases.check("local", &State::local("context", LocalOptions::default()));
    let options = LocalOptions {
        session_id: "s1".into(),
        include_patterns: strings(&["a<b>", "c&d"]),
        exclude_patterns: strings(&["e"]),
        follow_paths: strings(&["f"]),
        shared_key_hint: "hint".into(),
        differ: "none".into(),
        differ_required: true,
        metadata_only: Some(strings(&["m"])),
        constraints: Constraints::new().custom_name("load"),
    };
    cases.check("local-options", &State::local("context", options));
    let options = HttpOptions {
        checksum: Some(Digest::sha256("y")),
        filename: "n".into(),
        perm: 0o640,
        uid: 1,
        gid: 2,
        auth_header_secret: "sec".into(),
        headers: Some(("x".into(), "y".into())),
        ..HttpOptions::default()
    };
    cases.check("http", &State::http("https://example.com/f", options));
    cases.check(
        "http-plain",
        &State::http("https://example.com/f", HttpOptions::default()),
    );
    let options = HttpOptions {
        signature: Some(("k".into(), "s".into())),
        ..HttpOptions::default()
    };
    cases.check("http-signature", &State::http("https://example.com/f", options));
}

fn gits(cases: &mut Cases) {
    let options = GitOptions::default;
    cases.check(
        "git",
        &State::git("https://github.com/moby/buildkit.git", "v1:sub/dir", options()),
    );
    cases.check(
        "git-short",
        &State::git("github.com/moby/buildkit.git", "", options()),
    );
    let ssh = GitOptions {
        known_ssh_hosts: "hosts\n".into(),
        mount_ssh_sock: "sock".into(),
        ..options()
    };
    cases.check(
        "git-ssh",
        &State::git("git@github.com:moby/buildkit.git", "main", ssh),
    );
    let all = GitOptions {
        reference: "r".into(),
        subdir: "s".into(),
        keep_git_dir: true,
        skip_submodules: true,
        checksum: "0123456789012345678901234567890123456789".into(),
        mtime: "commit".into(),
        fetch_by_commit: true,
        auth_token_secret: Some("t".into()),
        auth_header_secret: Some("h".into()),
        ..options()
    };
    cases.check(
        "git-options",
        &State::git("https://u:p@host:8443/repo.git?x=y#frag", "", all),
    );
}

fn execs(cases: &mut Cases) {
    let alpine = image("alpine");
    cases.check("run", &alpine.run(["echo", "hi"]).done().root());
    let settings = alpine
        .env("A", "1")
        .env("B", "2")
        .env("A", "3")
        .dir("/w")
        .dir("x/../y")
        .user("me")
        .hostname("h")
        .extra_host("e", [10, 0, 0, 1].into())
        .ulimit("nofile", 1, 2)
        .cgroup_parent("cg")
        .network(NetMode::Host)
        .security(SecurityMode::Insecure);
    let resources = LinuxResources {
        memory: 5,
        cpu_shares: 6,
        cpuset_cpus: "0".into(),
        ..Default::default()
    };
    let proxy = ProxyEnv {
        http_proxy: "a".into(),
        https_proxy: "b".into(),
        ftp_proxy: "c".into(),
        no_proxy: "d".into(),
        all_proxy: "e".into(),
    };
    let constraints = Constraints::new()
        .ignore_cache()
        .progress_group("g", "group", true)
        .linux_resources(resources);
    let exec = settings
        .run(["sh", "-c", "x"])
        .valid_exit_codes([0, 3])
        .proxy(proxy)
        .cdi_device("v/d=1", true);
    cases.check("run-settings", &exec.constraints(&constraints).done().root());
    let config = r#"{"architecture":"arm64","os":"linux","config":{"Env":["P=1","Q"],"WorkingDir":"rel"}}"#;
    let config: ImageConfig = serde_json::from_str(config).unwrap();
    cases.check("image-config", &run(&alpine.image_config(&config), "c"));
}

fn mounts(cases: &mut Cases) {
    let (alpine, busybox, scratch) = (image("alpine"), image("busybox"), State::scratch());
    let secret = Secret {
        optional: true,
        uid: 1,
        gid: 2,
        mode: 0o440,
        ..Secret::file("sid", "/run/secrets/s")
    };
    let agent = Ssh {
        optional: true,
        ..Ssh::new("agent")
    };
    let sock = Ssh {
        target: "/sock".into(),
        uid: 3,
        gid: 4,
        mode: 0o666,
        ..Ssh::new("")
    };
    let exec = alpine
        .run(["m"])
        .mount(Mount::new("/z", &busybox).selector("/bin").readonly())
        .mount(Mount::new("/a", &busybox))
        .mount(Mount::new("/b", &scratch))
        .mount(Mount::cache("/c", &scratch, "id", CacheSharing::Locked))
        .mount(Mount::cache("/d", &busybox, "id2", CacheSharing::Private).selector("x"))
        .mount(Mount::tmpfs("/e", 1024))
        .mount(
            Mount::new("/f", &busybox)
                .no_output()
                .content_cache(MountContentCache::On),
        )
        .secret(secret)
        .secret(Secret::env("sid2", "SECRET"))
        .ssh(agent)
        .ssh(sock)
        .done();
    cases.check("mounts-root", &exec.root());
    cases.check("mounts-a", &exec.mount("/a").unwrap());
    cases.check("mounts-b", &run(&exec.mount("/b").unwrap(), "n"));
    cases.check("mounts-z", &exec.mount("/z").unwrap());
    assert!(exec.mount("/c").is_none() && exec.mount("/e").is_none() && exec.mount("/nope").is_none());
    let exec = alpine
        .run(["ro"])
        .readonly_root()
        .mount(Mount::new("/out", &scratch))
        .done();
    cases.check("readonly", &exec.mount("/out").unwrap());
    cases.check("readonly-root", &exec.root());
}

fn platforms_and_caps(cases: &mut Cases) {
    let on_arm = Constraints::new().platform(&arm());
    let options = ImageOptions {
        constraints: on_arm.clone(),
        ..ImageOptions::default()
    };
    cases.check("run-platform", &run(&State::image("alpine", options), "p"));
    let constrained = image("alpine").run(["p"]).constraints(&on_arm).done().root();
    cases.check("run-constraint-platform", &run(&constrained, "q"));
    let state = run(&image("alpine"), "p");
    let all: BTreeSet<String> = llb::caps::ALL.iter().map(ToString::to_string).collect();
    let options = MarshalOptions {
        caps: Some(all),
        ..cases.options.clone()
    };
    cases.check_with("caps-known", &state, &options);
    let options = MarshalOptions {
        caps: Some(BTreeSet::new()),
        ..cases.options.clone()
    };
    cases.check_with("caps-unknown", &state, &options);
}

fn files(cases: &mut Cases) {
    let none = Constraints::new();
    let alpine = image("alpine");
    let mkdir = FileActions::new().mkdir("/foo", 0o755, MkdirOptions::default());
    cases.check("mkdir", &alpine.file(mkdir, &none));
    let options = MkdirOptions {
        make_parents: true,
        chown: Some(Chown::parse("me:7")),
        created_ns: Some(1_700_000_000_000_000_005),
    };
    let root = |chown| MkfileOptions {
        chown,
        created_ns: None,
    };
    let chain = FileActions::new()
        .mkdir("foo", 0o1777, options)
        .mkfile("foo/bar", 0o600, "data", root(Some(Chown::ids(0, 0))))
        .symlink(
            "old",
            "new",
            SymlinkOptions {
                chown: Some(Chown::parse("root")),
                created_ns: None,
            },
        )
        .rm(
            "x*",
            RmOptions {
                allow_not_found: true,
                allow_wildcard: true,
            },
        );
    cases.check("file-chain", &alpine.dir("/wd").file(chain, &none));
}

fn copies(cases: &mut Cases) {
    let none = Constraints::new();
    let (alpine, busybox) = (image("alpine"), image("busybox"));
    let options = CopyOptions {
        mode: Some(0o755),
        follow_symlinks: true,
        copy_dir_contents_only: true,
        include_patterns: strings(&["i"]),
        exclude_patterns: strings(&["e"]),
        required_paths: strings(&["r"]),
        attempt_unpack: true,
        create_dest_path: true,
        allow_wildcard: true,
        allow_empty_wildcard: true,
        always_replace_existing_dest_paths: true,
        chown: Some(Chown {
            user: Some(Owner::Name("n".into())),
            group: None,
        }),
        ..CopyOptions::default()
    };
    let copy = FileActions::new().copy(&alpine, "/etc/../x", "y/", options);
    cases.check("copy", &busybox.file(copy, &none));
    let symbolic = CopyOptions {
        mode_str: "u+x".into(),
        ..CopyOptions::default()
    };
    let copy = FileActions::new()
        .copy(&alpine.dir("/s"), "a", "b/.", CopyOptions::default())
        .copy(&alpine, ".", ".", CopyOptions::default())
        .copy(&State::local("l", LocalOptions::default()), "/", "/", symbolic);
    cases.check("copy-dot", &busybox.dir("/d").file(copy, &none));
    let bound = FileActions::new()
        .mkdir("/m", 0o700, MkdirOptions::default())
        .mkfile("/m/f", 0o600, "", MkfileOptions::default())
        .on(&image("debian").dir("/q"));
    let copy = FileActions::new()
        .mkdir("/one", 0o755, MkdirOptions::default())
        .copy(&bound, "m", "/two", CopyOptions::default())
        .copy(&bound, "/m/f", "/three", CopyOptions::default());
    cases.check("copy-actions", &busybox.file(copy, &none));
    let copy = |from: &State| FileActions::new().copy(from, "/a", "/b", CopyOptions::default());
    let state = State::scratch()
        .file(copy(&alpine), &none)
        .file(copy(&State::scratch()), &none);
    cases.check("copy-scratch", &state);
}

fn combinations(cases: &mut Cases) {
    let none = Constraints::new();
    let (alpine, busybox, scratch) = (image("alpine"), image("busybox"), State::scratch());
    cases.check("merge", &merge([&alpine, &scratch, &busybox, &alpine], &none));
    cases.check("merge-one", &merge([&scratch, &busybox], &none));
    cases.check("diff", &diff(&alpine, &run(&alpine, "d"), &none));
    cases.check("diff-scratch", &diff(&alpine, &scratch, &none));
    cases.check("requires", &alpine.requires("id", [&busybox, &scratch]));
    cases.check("build", &alpine.build(Some("f"), &none));
    cases.check("build-default", &alpine.build(None, &none));
}

fn locations(cases: &mut Cases) {
    let map = SourceMap::new(None, "Dockerfile", "Dockerfile", "FROM x\n");
    let at = |line| {
        let position = Some(pb::Position { line, character: 0 });
        Constraints::new().location(
            &map,
            vec![pb::Range {
                start: position,
                end: position,
            }],
        )
    };
    let base = State::image(
        "alpine",
        ImageOptions {
            constraints: at(1),
            ..ImageOptions::default()
        },
    );
    let described = at(2).description([("a", "b")]).export_cache(true);
    let chained = base.run(["one"]).constraints(&described).done().root();
    let second = chained
        .run(["two"])
        .constraints(&at(3).export_cache(false))
        .done()
        .root();
    cases.check(
        "locations",
        &merge([&second, &chained], &Constraints::new().ignore_cache()),
    );
    let options = MarshalOptions {
        platform: arm(),
        ..MarshalOptions::default()
    };
    let definition: Definition = chained.marshal(&options).unwrap();
    cases.check(
        "imported",
        &run(&State::from_definition(&definition).unwrap(), "after"),
    );
}

//! Specifications: what they say, and what of them is refused.

use std::slice::from_ref;

use super::*;

fn write(dir: &Path, name: &str, text: &str) {
    std::fs::write(dir.join(name), text).unwrap();
}

const FILE: &str = r#"
cdiVersion: "0.6.0"
kind: "vendor1.com/device"
annotations:
  org.mobyproject.buildkit.device.autoallow: true
containerEdits:
  env: [ALL=1]
devices:
- name: foo
  annotations:
    org.mobyproject.buildkit.device.class: class1
  containerEdits:
    env:
    - FOO=injected
    deviceNodes:
    - {path: /dev/sub/null, hostPath: /dev/null, permissions: r, fileMode: 0640, gid: 7}
    mounts:
    - {hostPath: /etc, containerPath: /host-etc, options: [ro, nosuid, rbind]}
- name: bar
  containerEdits:
    env: [BAR=injected]
    additionalGids: [5, 0]
"#;

fn scan(dir: &Path) -> Devices {
    DeviceRegistry::new(vec![dir.to_owned()], []).scan()
}

#[test]
fn requests_mean_a_device_a_kind_or_a_class() {
    let dir = tempfile::tempdir().unwrap();
    write(dir.path(), "a.yaml", FILE);
    let devices = scan(dir.path());
    assert_eq!(devices.problems(), []);
    let (foo, bar) = (
        "vendor1.com/device=foo".to_owned(),
        "vendor1.com/device=bar".to_owned(),
    );
    assert_eq!(devices.find(&foo), from_ref(&foo));
    assert_eq!(
        devices.find("vendor1.com/device"),
        from_ref(&bar),
        "the first by name"
    );
    assert_eq!(devices.find("vendor1.com/device=*"), [bar.clone(), foo.clone()]);
    assert_eq!(devices.find("class1"), from_ref(&foo));
    for none in [
        "vendor1.com/device=baz",
        "vendor2.com/device",
        "class2",
        "",
        "=",
        "/=",
    ] {
        assert_eq!(devices.find(none), Vec::<String>::new(), "{none}");
    }
    assert!(devices.list().iter().all(|listing| listing.auto_allowed));
}

#[test]
fn edits_come_from_the_file_and_the_device() {
    let dir = tempfile::tempdir().unwrap();
    write(dir.path(), "a.yaml", FILE);
    let devices = scan(dir.path());
    let names = devices.find("vendor1.com/device=*");
    let edits = devices.edits(names.iter().map(String::as_str)).unwrap();
    assert_eq!(edits.env, ["ALL=1", "BAR=injected", "FOO=injected"]);
    assert_eq!(edits.groups, [5]);
    let node = &edits.nodes[0];
    assert_eq!(
        (node.name.as_str(), node.block, node.major, node.minor),
        ("sub/null", false, 1, 3)
    );
    assert_eq!((node.mode, node.gid, node.access.as_str()), (0o640, 7, "r"));
    assert_eq!(
        edits.mounts,
        [("/etc".into(), "/host-etc".to_owned(), ATTR_RDONLY | ATTR_NOSUID)]
    );
    assert!(devices.edits(["vendor1.com/device=baz"]).is_err());
}

#[test]
fn rights_come_from_annotations_or_configuration() {
    let dir = tempfile::tempdir().unwrap();
    let text = FILE.replace("autoallow: true", "autoallow: nonsense");
    write(dir.path(), "a.yaml", &text);
    assert!(!scan(dir.path()).is_auto_allowed("vendor1.com/device=foo"));
    for name in ["vendor1.com/device", "vendor1.com/device=foo"] {
        let devices = DeviceRegistry::new(vec![dir.path().to_owned()], [name.to_owned()]).scan();
        assert!(devices.is_auto_allowed("vendor1.com/device=foo"), "{name}");
        assert_eq!(
            devices.is_auto_allowed("vendor1.com/device=bar"),
            !name.contains('=')
        );
    }
}

#[test]
fn later_directories_win_and_equals_cancel_out() {
    let (first, second) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
    write(first.path(), "a.yaml", FILE);
    write(
        second.path(),
        "b.yaml",
        &FILE.replace("FOO=injected", "FOO=better"),
    );
    let dirs = vec![first.path().to_owned(), second.path().to_owned()];
    let devices = DeviceRegistry::new(dirs.clone(), []).scan();
    let edits = devices.edits(["vendor1.com/device=foo"]).unwrap();
    assert_eq!(edits.env, ["ALL=1", "FOO=better"]);
    write(second.path(), "c.yaml", FILE);
    write(second.path(), "d.yaml", FILE);
    let devices = DeviceRegistry::new(dirs, []).scan();
    assert_eq!(devices.find("vendor1.com/device=*"), Vec::<String>::new());
    assert!(
        devices
            .problems()
            .iter()
            .any(|problem| problem.reason.contains("is also in"))
    );
}

#[test]
fn json_is_read_too() {
    let dir = tempfile::tempdir().unwrap();
    let text = r#"{"cdiVersion":"1.0.0","kind":"v/c","devices":[{"name":"1","containerEdits":{"deviceNodes":
        [{"path":"/dev/x","type":"c","major":10,"minor":229}]}}]}"#;
    write(dir.path(), "a.json", text);
    let devices = scan(dir.path());
    assert_eq!(devices.problems(), []);
    let edits = devices.edits(["v/c=1"]).unwrap();
    assert_eq!((edits.nodes[0].major, edits.nodes[0].mode), (10, 0o666));
}

/// Makes a file of one device with these edits, in flow style.
fn one(edits: &str) -> String {
    format!("{{cdiVersion: 0.6.0, kind: v/c, devices: [{{name: d, containerEdits: {edits}}}]}}")
}

#[test]
fn hostile_files_cost_only_their_own_devices() {
    let deep = format!("a: {}", "[".repeat(500));
    let laughs = "a: &a [x, x]\nb: [*a, *a]\n";
    let cases: [(&str, String); 14] = [
        ("not YAML", "{".to_owned()),
        ("nothing", String::new()),
        ("a list", "[]".to_owned()),
        ("deep", deep),
        ("aliases", laughs.to_owned()),
        ("a version that is not known", FILE.replace("0.6.0", "9.9.9")),
        (
            "a kind without a vendor",
            FILE.replace("vendor1.com/device", "device"),
        ),
        (
            "a kind that leads upwards",
            FILE.replace("vendor1.com/device", "../etc"),
        ),
        (
            "a field that is not known",
            FILE.replace("containerEdits:\n  env", "edits:\n  env"),
        ),
        (
            "no devices",
            "{cdiVersion: 0.6.0, kind: v/c, devices: []}".to_owned(),
        ),
        ("nothing to do", one("{}")),
        ("a nameless variable", one("{env: [=x]}")),
        (
            "a type that is not known",
            one("{deviceNodes: [{path: /dev/x, type: z}]}"),
        ),
        ("too large", format!("#{}", "x".repeat(5 << 20))),
    ];
    for (what, text) in cases {
        let dir = tempfile::tempdir().unwrap();
        write(dir.path(), "bad.yaml", &text);
        write(
            dir.path(),
            "good.yaml",
            &one("{env: [A=1]}").replace("v/c", "good/c"),
        );
        let devices = scan(dir.path());
        assert_eq!(devices.list().len(), 1, "{what}");
        assert_eq!(devices.problems().len(), 1, "{what}: {:?}", devices.problems());
        assert_eq!(devices.problems()[0].path, dir.path().join("bad.yaml"), "{what}");
    }
}

#[test]
fn what_cannot_be_done_is_refused_by_name() {
    let cases = [
        (
            "{deviceNodes: [{path: /etc/passwd, type: c, major: 1}]}",
            "not below /dev",
        ),
        (
            "{deviceNodes: [{path: /dev/../etc/x, type: c, major: 1}]}",
            "not below /dev",
        ),
        (
            "{deviceNodes: [{path: /dev/x, hostPath: /etc/passwd}]}",
            "no device node",
        ),
        (
            "{deviceNodes: [{path: /dev/x, hostPath: /dev/null, type: b}]}",
            "another type",
        ),
        ("{deviceNodes: [{path: /dev/cooper-has-none}]}", "No such file"),
        (
            "{mounts: [{hostPath: /x, containerPath: /y, type: tmpfs}]}",
            "tmpfs",
        ),
        (
            "{mounts: [{hostPath: /x, containerPath: /y, options: [dax]}]}",
            "dax",
        ),
        ("{mounts: [{hostPath: x, containerPath: /y}]}", "not absolute"),
        ("{intelRdt: {closID: x}}", "intelRdt"),
    ];
    for (edits, expected) in cases {
        let dir = tempfile::tempdir().unwrap();
        write(dir.path(), "a.yaml", &one(edits));
        let devices = scan(dir.path());
        assert_eq!(devices.problems(), [], "{edits}");
        let error = devices.edits(["v/c=d"]).unwrap_err().to_string();
        assert!(
            error.starts_with("device v/c=d: ") && error.contains(expected),
            "{error}"
        );
    }
}

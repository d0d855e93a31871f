//! Archives: unpacked by ADD, and as layers of images.

use anyhow::Result;
use api::fsutil::Stat;
use bytes::Bytes;
use llb::pb;

use super::client::{Files, name, request};
use super::ops::{copying, definition, exec, file, image, mkfile, second, source};
use super::tarball::{Tarball, many, sparse};
use super::yard::{End, MARK, Yard};
use crate::e2e::fixture::Lab;

/// An archive that attacks.
pub struct Attack {
    pub name: &'static str,
    /// Makes it.
    pub make: fn(&Lab) -> Vec<u8>,
    pub end: Outcome,
}

/// What has to come of unpacking.
#[derive(Clone, Copy)]
pub enum Outcome {
    /// An error whose text has all of these.
    Refused(&'static [&'static str]),
    /// Success; this script succeeds where the tree is at `/m`.
    Confined(&'static str),
}

const fn refused(name: &'static str, make: fn(&Lab) -> Vec<u8>, parts: &'static [&'static str]) -> Attack {
    Attack {
        name,
        make,
        end: Outcome::Refused(parts),
    }
}

const fn confined(name: &'static str, make: fn(&Lab) -> Vec<u8>, script: &'static str) -> Attack {
    Attack {
        name,
        make,
        end: Outcome::Confined(script),
    }
}

fn outside(lab: &Lab) -> String {
    lab.dir().join("outside").to_string_lossy().into_owned()
}

/// A name that leads to the directory outside from anywhere.
fn up(lab: &Lab) -> String {
    format!("../../../../../../../../..{}", outside(lab))
}

/// A file below the root whose name begins so.
fn marked(begin: &str) -> String {
    format!("{begin}{MARK}")
}

/// An archive that begins well: what does not is no archive for ADD, and copied as it is.
fn began() -> Tarball {
    Tarball::new().file("began", b"well")
}

/// The attacks, for whoever unpacks.
pub const ATTACKS: &[Attack] = &[
    confined(
        "an absolute name",
        |_| Tarball::new().file(&marked("/"), b"x").end(),
        "[ -f /m/cooper-attack ]",
    ),
    confined(
        "a name that leads up",
        |_| Tarball::new().file(&marked("../../../../"), b"x").end(),
        "[ -f /m/cooper-attack ]",
    ),
    confined(
        "an absolute name of a file that is there",
        |lab| {
            Tarball::new()
                .file(&format!("{}/victim", outside(lab)), b"changed")
                .end()
        },
        "[ \"$(cat /m/*/*/outside/victim || cat /m/*/outside/victim)\" = changed ]",
    ),
    confined(
        "a name through a link that leads out",
        |lab| {
            Tarball::new()
                .symlink("out", &outside(lab))
                .file(&marked("out/"), b"x")
                .end()
        },
        "find /m | grep outside/cooper-attack",
    ),
    confined(
        "a name through a link that leads up",
        |lab| {
            Tarball::new()
                .symlink("out", &up(lab))
                .file(&marked("out/"), b"x")
                .end()
        },
        "find /m | grep outside/cooper-attack",
    ),
    confined(
        "a directory that turns into a link on the way",
        |lab| {
            Tarball::new()
                .dir("d")
                .file("d/a", b"x")
                .symlink("d", &outside(lab))
                .file(&marked("d/"), b"x")
                .file("d/victim", b"changed")
                .end()
        },
        "find /m | grep outside/cooper-attack && [ -L /m/d ]",
    ),
    confined(
        "times of a directory that has turned into a link",
        |lab| {
            Tarball::new()
                .dir("d")
                .dir("d/dir")
                .symlink("d", &outside(lab))
                .end()
        },
        "[ -L /m/d ]",
    ),
    confined(
        "a link instead of the file that is written through it",
        |lab| {
            Tarball::new()
                .symlink("f", &format!("{}/victim", outside(lab)))
                .file("f", b"changed")
                .end()
        },
        "[ ! -L /m/f ] && [ \"$(cat /m/f)\" = changed ]",
    ),
    refused(
        "a hard link to a file outside",
        |lab| Tarball::new().link(MARK, &format!("{}/victim", up(lab))).end(),
        &["cooper-attack"],
    ),
    refused(
        "a hard link through a link that leads out",
        |lab| {
            Tarball::new()
                .symlink("out", &outside(lab))
                .link(MARK, "out/victim")
                .end()
        },
        &["cooper-attack", "no such file"],
    ),
    refused(
        "a hard link to the root",
        |_| Tarball::new().link(MARK, "..").end(),
        &["cooper-attack", "hard link to the root"],
    ),
    confined(
        "a hard link to a link, changed afterwards",
        |lab| {
            Tarball::new()
                .symlink("s", &format!("{}/victim", outside(lab)))
                .link("h", "s")
                .file("h", b"changed")
                .end()
        },
        "[ -L /m/s ] && [ \"$(cat /m/h)\" = changed ]",
    ),
    refused(
        "links that go round in circles",
        |_| {
            Tarball::new()
                .symlink("a", "b")
                .symlink("b", "a")
                .file("a/x", b"x")
                .end()
        },
        &["a/x", "too many levels of symbolic links"],
    ),
    refused(
        "a name with a zero byte",
        |_| began().records(&[("path", b"a\0b")]).file("a", b"x").end(),
        &["extended header"],
    ),
    confined(
        "a name with a newline",
        |_| Tarball::new().file("a\nb", b"x").end(),
        "[ -f \"/m/a\nb\" ]",
    ),
    refused(
        "a name of 4 KiB",
        |_| Tarball::new().file(&"n".repeat(4096), b"x").end(),
        &["nnnn", "name too long"],
    ),
    refused(
        "a link of 4 KiB",
        |_| Tarball::new().symlink("l", &"n".repeat(4096)).end(),
        &["\"l\"", "name too long"],
    ),
    refused(
        "a part of a name of 300 bytes",
        |_| Tarball::new().file(&"n".repeat(300), b"x").end(),
        &["nnnn", "name too long"],
    ),
    refused(
        "an extended header of a terabyte",
        |_| {
            began()
                .header(b'x', "x", 0, |header| {
                    header[124..136].copy_from_slice(b"77777777777\0");
                })
                .cut()
        },
        &["size of an extended header"],
    ),
    refused(
        "an extended header of two megabytes",
        |_| {
            began()
                .records(&[("path", &vec![b'n'; 2 << 20])])
                .file("a", b"x")
                .end()
        },
        &["size of an extended header"],
    ),
    refused(
        "extended headers without an end",
        |_| {
            let mut tarball = began();
            for _ in 0..100 {
                tarball = tarball.records(&[("comment", b"x")]);
            }
            tarball.file("a", b"x").end()
        },
        &["too many extended headers"],
    ),
    refused(
        "a size of less than nothing",
        |_| {
            began()
                .header(b'0', "a", 0, |header| header[124..136].fill(0xff))
                .end()
        },
        &["negative size"],
    ),
    refused(
        "a file of exabytes that is not there",
        |_| {
            Tarball::new()
                .file("before", b"x")
                .header(b'0', "a", 0, |header| {
                    header[124..128].copy_from_slice(&[0x80, 0, 0, 0]);
                    header[128..136].copy_from_slice(&[0x3f, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff]);
                })
                .data(b"x")
                .cut()
        },
        &["\"a\"", "read data of"],
    ),
    confined(
        "a sparse file of eight terabytes",
        |_| sparse("big", 8 << 40),
        "[ $(stat -c %s /m/big) = 8796093022208 ] && [ $(stat -c %b /m/big) -lt 1000 ]",
    ),
    refused(
        "a sparse file of exabytes",
        |_| sparse("big", 7 << 60),
        &["\"big\"", "file too large"],
    ),
    refused(
        "a sparse file whose parts overlap",
        |_| {
            began()
                .records(&[
                    ("GNU.sparse.major", b"0"),
                    ("GNU.sparse.minor", b"1"),
                    ("GNU.sparse.size", b"100"),
                    ("GNU.sparse.numblocks", b"2"),
                    ("GNU.sparse.map", b"50,10,0,10"),
                ])
                .file("a", &[b'x'; 20])
                .end()
        },
        &["map of a sparse file"],
    ),
    confined(
        "devices of the machine",
        |_| {
            let numbers = |header: &mut [u8; 512], major: &[u8; 7], minor: &[u8; 7]| {
                header[329..336].copy_from_slice(major);
                header[337..344].copy_from_slice(minor);
            };
            Tarball::new()
                .header(b'3', "memory", 0, |header| {
                    numbers(header, b"0000001", b"0000001")
                })
                .header(b'3', "log", 0, |header| numbers(header, b"0000001", b"0000013"))
                .header(b'4', "disk", 0, |header| numbers(header, b"0000007", b"0000000"))
                .end()
        },
        "[ -c /m/memory ] && [ -b /m/disk ] && for d in memory log disk; do ! head -c 1 /m/$d 2>/dev/null || exit 1; done",
    ),
    refused(
        "an entry of unknown type",
        |_| Tarball::new().file("a", b"x").entry(b'Z', "b", "", b"").end(),
        &["unknown type of entry"],
    ),
    refused(
        "an owner that there cannot be",
        |_| {
            Tarball::new()
                .header(b'0', "a", 0, |header| {
                    header[108..116].copy_from_slice(&[0x80, 0, 0, 0, 0xff, 0xff, 0xff, 0xff]);
                })
                .end()
        },
        &["\"a\"", "owner"],
    ),
    confined(
        "devices",
        |_| {
            Tarball::new()
                .header(b'4', "disk", 0, |header| {
                    header[329..337].copy_from_slice(b"0000010\0");
                    header[337..345].copy_from_slice(b"0000000\0");
                })
                .header(b'6', "pipe", 0, |_| {})
                .end()
        },
        // They are there, and of no use to a step.
        "[ -b /m/disk ] && [ -p /m/pipe ] && ! head -c 1 /m/disk",
    ),
    confined(
        "marks of the kernel's overlays",
        |_| {
            Tarball::new()
                .records(&[
                    ("SCHILY.xattr.trusted.overlay.redirect", b"/etc"),
                    ("SCHILY.xattr.trusted.overlay.opaque", b"y"),
                ])
                .dir("d")
                .file("d/x", b"x")
                .end()
        },
        "[ \"$(ls /m/d)\" = x ]",
    ),
    confined(
        "times that there cannot be",
        |_| {
            Tarball::new()
                .header(b'0', "a", 0, |header| {
                    header[136..148]
                        .copy_from_slice(&[0x80, 0, 0, 0, 0x7f, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff]);
                })
                .end()
        },
        "[ -f /m/a ]",
    ),
    refused(
        "directories in each other, deeper than a path can tell",
        |_| {
            let deep = "d/".repeat(1900);
            Tarball::new()
                .dir(&deep)
                .symlink("s", &deep)
                .dir(&format!("s/{deep}"))
                .end()
        },
        &["\"s/d/d/", "name too long"],
    ),
    refused(
        "an archive that ends early",
        |_| {
            let mut bytes = Tarball::new().file("a", &[b'x'; 5000]).end();
            bytes.truncate(2000);
            bytes
        },
        &["\"a\"", "read data of"],
    ),
    refused(
        "an archive compressed and cut short",
        |_| {
            let mut bytes = many(&Tarball::new().file("a", &[b'x'; 50_000]).cut(), 100);
            bytes.truncate(bytes.len() / 2);
            bytes
        },
        &["deflate"],
    ),
];

/// A client's directory with one file.
pub fn directory(archive: Vec<u8>) -> Files {
    let stat = Stat {
        path: Bytes::from_static(b"archive"),
        mode: 0o644,
        size: i64::try_from(archive.len()).unwrap_or(i64::MAX),
        ..Stat::default()
    };
    Files::honest(vec![stat], archive)
}

/// What unpacks the client's archive, and looks at the result.
pub fn unpacking(lab: &Lab, script: &str) -> pb::Definition {
    // Two archives are never the same directory.
    let hint = name("hint");
    let from = source("local://context", &[("local.sharedkeyhint", hint.as_str())]);
    let empty = mkfile("empty", b"");
    let copy = copying("/archive", "/", |copy| {
        copy.attempt_unpack_docker_compatibility = true;
    });
    let unpacked = file(copy, &[&empty, &from]);
    let base = image(&lab.busybox());
    let step = exec(&[&base, &unpacked], script, |exec, _| {
        exec.mounts.push(second("/m"));
    });
    definition(&[from, empty, unpacked, base, step])
}

/// Unpacks them all.
pub fn run(lab: &Lab) -> Result<()> {
    let mut yard = Yard::open(lab)?;
    for attack in ATTACKS {
        let files = directory((attack.make)(lab));
        let (end, script) = match attack.end {
            Outcome::Refused(parts) => (End::Refused(parts), "true"),
            Outcome::Confined(script) => (End::Built, script),
        };
        let request = request(unpacking(lab, script));
        yard.case(attack.name, end, |yard| yard.client.solve_with(files, request));
    }
    yard.close()
}

//! Device nodes of containers, and the device program of cgroup v2.

use std::os::fd::BorrowedFd;

use rustix::fs::{AtFlags, CWD, FileType, Gid, Mode, OFlags, Uid};
use rustix::io::Errno;

use super::cgroup::ALLOWED_DEVICES;
use super::child::{Fallible as _, SetupError};
use crate::spec::DeviceNode;
use crate::sys::{self, BpfInstruction};
use crate::tree;

const NODES: &[(&str, u32, u32)] = &[
    ("null", 1, 3),
    ("zero", 1, 5),
    ("full", 1, 7),
    ("random", 1, 8),
    ("urandom", 1, 9),
    ("tty", 5, 0),
];

const LINKS: &[(&str, &str)] = &[
    ("fd", "/proc/self/fd"),
    ("stdin", "/proc/self/fd/0"),
    ("stdout", "/proc/self/fd/1"),
    ("stderr", "/proc/self/fd/2"),
    ("ptmx", "pts/ptmx"),
];

/// Fills a new `/dev`.
pub(super) fn populate(root: BorrowedFd<'_>, devices: &[DeviceNode]) -> Result<(), SetupError> {
    let dev = tree::open_in_root(root, "/dev", OFlags::PATH | OFlags::DIRECTORY).or_fail("open /dev")?;
    for &(name, major, minor) in NODES {
        make(&dev, name, FileType::CharacterDevice, (major, minor), 0o666)?;
    }
    for (name, target) in LINKS {
        rustix::fs::symlinkat(*target, &dev, *name).or_fail(format_args!("make /dev/{name}"))?;
    }
    for device in devices {
        let kind = if device.block {
            FileType::BlockDevice
        } else {
            FileType::CharacterDevice
        };
        let directories = device
            .name
            .match_indices('/')
            .map(|(at, _)| device.name.split_at(at).0);
        for directory in directories {
            match rustix::fs::mkdirat(&dev, directory, Mode::from_raw_mode(0o755)) {
                Ok(()) | Err(Errno::EXIST) => {}
                Err(error) => return Err(error).or_fail(format_args!("make /dev/{directory}")),
            }
        }
        make(
            &dev,
            &device.name,
            kind,
            (device.major, device.minor),
            device.mode,
        )?;
        let owner = (Uid::from_raw(device.uid), Gid::from_raw(device.gid));
        rustix::fs::chownat(
            &dev,
            device.name.as_str(),
            Some(owner.0),
            Some(owner.1),
            AtFlags::SYMLINK_NOFOLLOW,
        )
        .or_fail(format_args!("give /dev/{} to its owner", device.name))?;
    }
    Ok(())
}

fn make(
    dev: &std::os::fd::OwnedFd,
    name: &str,
    kind: FileType,
    (major, minor): (u32, u32),
    mode: u32,
) -> Result<(), SetupError> {
    // The umask is cleared while a container is built.
    rustix::fs::mknodat(
        dev,
        name,
        kind,
        Mode::from_raw_mode(mode),
        rustix::fs::makedev(major, minor),
    )
    .or_fail(format_args!("make /dev/{name}"))
}

/// Lists what an insecure container finds in `/dev` beside the usual: what a kernel log, FUSE, KVM, TUN and loop devices
/// need. Some loop devices beyond the next free one are included.
pub(crate) fn insecure_devices() -> Vec<DeviceNode> {
    let node = |name: &str, block, major, minor| DeviceNode {
        name: name.to_owned(),
        block,
        major,
        minor,
        mode: 0o666,
        uid: 0,
        gid: 0,
        access: "rwm".to_owned(),
    };
    let character = |name: &str, major, minor| node(name, false, major, minor);
    let mut devices = vec![
        character("kmsg", 1, 11),
        character("cuse", 10, 203),
        character("fuse", 10, 229),
        character("kvm", 10, 232),
        character("net/tun", 10, 200),
        character("loop-control", 10, 237),
    ];
    let flags = OFlags::RDWR | OFlags::CLOEXEC;
    let control = rustix::fs::openat(CWD, c"/dev/loop-control", flags, Mode::empty());
    let free = control.ok().and_then(|control| {
        use std::os::fd::AsFd as _;
        sys::free_loop_device(control.as_fd()).ok()
    });
    for minor in 0..=free.unwrap_or(0).min(248) + 7 {
        devices.push(node(&format!("loop{minor}"), true, 7, minor));
    }
    devices
}

/// The program that allows what sandboxed processes may do with devices: making any node, using those allowed.
///
/// Its argument is `struct bpf_cgroup_dev_ctx { u32 access_type; u32 major; u32 minor; }` where `access_type` holds the
/// kind of device in its low half (1: block, 2: character) and the access above it (1: make, 2: read, 4: write).
pub(super) fn program(devices: &[DeviceNode]) -> Vec<BpfInstruction> {
    const LOAD_WORD: u8 = 0x61;
    const MOVE_REGISTER: u8 = 0xbf;
    const MOVE: u8 = 0xb7;
    const AND32: u8 = 0x54;
    const RIGHT_SHIFT32: u8 = 0x74;
    const IF_NOT_EQUAL: u8 = 0x55;
    const EXIT: u8 = 0x95;
    let instruction = |code, destination: u8, source: u8, offset, immediate| BpfInstruction {
        code,
        registers: destination | source << 4,
        offset,
        immediate,
    };
    let mut program = vec![
        instruction(LOAD_WORD, 2, 1, 0, 0),
        instruction(MOVE_REGISTER, 3, 2, 0, 0),
        instruction(RIGHT_SHIFT32, 3, 0, 0, 16),
        instruction(AND32, 2, 0, 0, 0xffff),
        instruction(LOAD_WORD, 4, 1, 4, 0),
        instruction(LOAD_WORD, 5, 1, 8, 0),
        // Making a node and nothing else.
        instruction(IF_NOT_EQUAL, 3, 0, 2, 1),
        instruction(MOVE, 0, 0, 0, 1),
        instruction(EXIT, 0, 0, 0, 0),
    ];
    for &(kind, major, minor) in ALLOWED_DEVICES {
        let kind = if kind == 'b' { 1 } else { 2 };
        let mut checks = vec![(2, kind), (4, i32::try_from(major).unwrap_or(-1))];
        if let Some(minor) = minor {
            checks.push((5, i32::try_from(minor).unwrap_or(-1)));
        }
        let len = checks.len();
        for (at, (register, value)) in checks.into_iter().enumerate() {
            let skip = i16::try_from(len - at + 1).unwrap_or(0);
            program.push(instruction(IF_NOT_EQUAL, register, 0, skip, value));
        }
        program.extend([instruction(MOVE, 0, 0, 0, 1), instruction(EXIT, 0, 0, 0, 0)]);
    }
    for device in devices {
        let denied = denied_access(&device.access);
        let kind = if device.block { 1 } else { 2 };
        let number = |number: u32| i32::try_from(number).unwrap_or(-1);
        program.extend([
            instruction(IF_NOT_EQUAL, 2, 0, 7, kind),
            instruction(IF_NOT_EQUAL, 4, 0, 6, number(device.major)),
            instruction(IF_NOT_EQUAL, 5, 0, 5, number(device.minor)),
            instruction(MOVE_REGISTER, 0, 3, 0, 0),
            instruction(AND32, 0, 0, 0, denied),
            instruction(IF_NOT_EQUAL, 0, 0, 2, 0),
            instruction(MOVE, 0, 0, 0, 1),
            instruction(EXIT, 0, 0, 0, 0),
        ]);
    }
    program.extend([instruction(MOVE, 0, 0, 0, 0), instruction(EXIT, 0, 0, 0, 0)]);
    program
}

/// The bits of accesses that are not among `access`; making nodes is always allowed.
fn denied_access(access: &str) -> i32 {
    let denied = |letter: char, bit: i32| if access.contains(letter) { 0 } else { bit };
    denied('r', 2) | denied('w', 4)
}

#[cfg(test)]
mod tests {
    use std::os::fd::AsFd as _;
    use std::path::PathBuf;
    use std::process::Command;

    use super::*;

    fn unified_mount() -> Option<PathBuf> {
        let mounts = std::fs::read_to_string("/proc/self/mounts").unwrap();
        let line = mounts
            .lines()
            .find(|line| line.split(' ').nth(2) == Some("cgroup2"))?;
        line.split(' ').nth(1).map(PathBuf::from)
    }

    #[test]
    fn the_program_lets_nodes_be_made_and_few_be_used() {
        let Some(mount) = unified_mount().filter(|_| rustix::process::geteuid().is_root()) else {
            eprintln!("skipped: needs root and a cgroup2 file system");
            return;
        };
        let cgroup = mount.join(format!("cooper-test-{}", std::process::id()));
        std::fs::create_dir(&cgroup).unwrap();
        let directory = std::fs::File::open(&cgroup).unwrap();
        let readable = DeviceNode {
            name: "kmsg".to_owned(),
            block: false,
            major: 1,
            minor: 11,
            mode: 0o666,
            uid: 0,
            gid: 0,
            access: "r".to_owned(),
        };
        let program = sys::load_device_program(&program(&[readable])).unwrap();
        sys::attach_device_program(directory.as_fd(), program.as_fd()).unwrap();
        let node = tempfile::tempdir().unwrap();
        let script = format!(
            "echo $$ > {}/cgroup.procs || exit 9; cd {}; mknod kmsg c 1 11 && mknod loop b 7 0 || exit 8; \
             true < /dev/null && true > /dev/zero && true < /dev/urandom || exit 7; \
             if true > kmsg; then exit 6; fi; if true < loop; then exit 5; fi; true < kmsg || exit 4; exit 0",
            cgroup.display(),
            node.path().display()
        );
        let output = Command::new("sh").args(["-c", &script]).output().unwrap();
        std::fs::remove_dir(&cgroup).unwrap();
        assert!(output.status.success(), "{output:?}");
        assert_eq!(
            String::from_utf8_lossy(&output.stderr)
                .matches("not permitted")
                .count(),
            2
        );
    }
}

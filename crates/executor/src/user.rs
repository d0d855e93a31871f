//! Whom a process runs as: `user:group` looked up in the image's own files.

use std::io::Read as _;
use std::os::fd::BorrowedFd;

use rustix::fs::OFlags;

use crate::tree;

/// Longest `/etc/passwd` or `/etc/group` that is read.
const MAX_FILE_BYTES: u64 = 10 << 20;

/// A process' identity.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Identity {
    pub(crate) uid: u32,
    pub(crate) gid: u32,
    /// All supplementary groups, the primary one first unless it is among the others.
    pub(crate) groups: Vec<u32>,
    /// The home directory, if the user is known.
    pub(crate) home: Option<String>,
}

struct Account {
    name: String,
    uid: u32,
    gid: u32,
    home: String,
}

struct Group {
    name: String,
    gid: u32,
    members: Vec<String>,
}

/// Looks up `spec` in the root file system behind `root`, and adds further groups.
pub(crate) fn look_up(root: BorrowedFd<'_>, spec: &str, extra_groups: &[u32]) -> Result<Identity, String> {
    let mut identity = identity(root, spec)?;
    for group in extra_groups {
        if !identity.groups.contains(group) {
            identity.groups.push(*group);
        }
    }
    Ok(identity)
}

fn identity(root: BorrowedFd<'_>, spec: &str) -> Result<Identity, String> {
    if let Some((uid, gid)) = both_numeric(spec) {
        let home = read_file(root, "/etc/passwd")
            .ok()
            .flatten()
            .and_then(|text| home_of(&text, uid));
        return Ok(Identity {
            uid,
            gid,
            groups: vec![gid],
            home,
        });
    }
    let files =
        read_file(root, "/etc/passwd").and_then(|passwd| Ok((passwd, read_file(root, "/etc/group")?)));
    let found = files.and_then(|(passwd, group)| {
        find(
            if spec.is_empty() { "0" } else { spec },
            passwd.as_deref(),
            group.as_deref(),
        )
    });
    match found {
        Err(_) if spec.is_empty() => Ok(Identity {
            uid: 0,
            gid: 0,
            groups: vec![0],
            home: None,
        }),
        found => found,
    }
}

/// `uid:gid` needs no files.
fn both_numeric(spec: &str) -> Option<(u32, u32)> {
    let id = |text: &str| {
        if text == "root" {
            Some(0)
        } else {
            text.parse().ok()
        }
    };
    let (user, group) = spec.split_once(':')?;
    Some((id(user)?, id(group)?))
}

/// `Ok(None)` if there is no such file, or it is no regular one.
fn read_file(root: BorrowedFd<'_>, path: &str) -> Result<Option<String>, String> {
    let flags = OFlags::RDONLY | OFlags::NONBLOCK | OFlags::NOCTTY;
    let Ok(file) = tree::open_in_root(root, path, flags) else {
        return Ok(None);
    };
    let file = std::fs::File::from(file);
    match file.metadata() {
        Ok(metadata) if metadata.is_file() => {}
        _ => return Ok(None),
    }
    let mut bytes = Vec::new();
    file.take(MAX_FILE_BYTES + 1)
        .read_to_end(&mut bytes)
        .map_err(|error| format!("{path}: {error}"))?;
    if u64::try_from(bytes.len()).is_ok_and(|len| len > MAX_FILE_BYTES) {
        return Err(format!("{path:?} exceeds {MAX_FILE_BYTES} bytes"));
    }
    Ok(Some(String::from_utf8_lossy(&bytes).into_owned()))
}

/// Lines whose numbers are no numbers do not count.
fn accounts(text: &str) -> impl Iterator<Item = Account> {
    text.lines().filter_map(|line| {
        let mut fields = line.trim().split(':');
        let (name, _password) = (fields.next()?, fields.next()?);
        let uid = fields.next()?.parse().ok()?;
        let gid = fields.next().and_then(|gid| gid.parse().ok())?;
        let home = fields.nth(1).unwrap_or_default().to_owned();
        Some(Account {
            name: name.to_owned(),
            uid,
            gid,
            home,
        })
    })
}

fn groups(text: &str) -> impl Iterator<Item = Group> {
    text.lines().filter_map(|line| {
        let line = line.trim();
        if line.starts_with('#') {
            return None;
        }
        let mut fields = line.split(':');
        let (name, _password) = (fields.next()?, fields.next()?);
        let gid = fields.next()?.parse().ok()?;
        let members = fields.next().unwrap_or_default();
        let members = members
            .split(',')
            .filter(|member| !member.is_empty())
            .map(str::to_owned)
            .collect();
        Some(Group {
            name: name.to_owned(),
            gid,
            members,
        })
    })
}

fn home_of(passwd: &str, uid: u32) -> Option<String> {
    accounts(passwd)
        .find(|account| account.uid == uid)
        .map(|account| account.home)
}

/// `Ok(None)`: not a number.
fn numeric(text: &str) -> Result<Option<u32>, String> {
    match text.parse::<i64>() {
        Ok(number) => u32::try_from(number)
            .ok()
            .filter(|&number| number <= 0x7fff_ffff)
            .map(Some)
            .ok_or_else(|| "uids and gids must be in range 0-2147483647".to_owned()),
        Err(_) => Ok(None),
    }
}

fn find(spec: &str, passwd: Option<&str>, group: Option<&str>) -> Result<Identity, String> {
    let mut parts = spec.split(':');
    let (user, group_name) = (parts.next().unwrap_or_default(), parts.next().unwrap_or_default());
    let (uid, gid) = (numeric(user)?, numeric(group_name)?);
    let account = accounts(passwd.unwrap_or_default()).find(|account| match (user, uid) {
        ("", _) => account.uid == 0,
        (_, Some(uid)) => account.uid == uid,
        (name, None) => account.name == name,
    });
    let mut identity = match (&account, uid) {
        (Some(account), _) => Identity {
            uid: account.uid,
            gid: account.gid,
            groups: Vec::new(),
            home: Some(account.home.clone()),
        },
        (None, Some(uid)) => Identity {
            uid,
            gid: 0,
            groups: Vec::new(),
            home: None,
        },
        (None, None) if user.is_empty() => Identity {
            uid: 0,
            gid: 0,
            groups: Vec::new(),
            home: None,
        },
        (None, None) => {
            return Err(format!(
                "unable to find user {user}: no matching entries in passwd file"
            ));
        }
    };
    let group_text = group.unwrap_or_default();
    if group_name.is_empty() {
        if let Some(account) = &account {
            identity.groups = groups(group_text)
                .filter(|group| group.members.contains(&account.name))
                .map(|group| group.gid)
                .collect();
        }
    } else {
        let found = groups(group_text).find(|group| match gid {
            Some(gid) => group.gid == gid,
            None => group.name == group_name,
        });
        identity.gid = match (found, gid) {
            (Some(group), _) => group.gid,
            (None, Some(gid)) => gid,
            (None, None) => {
                return Err(format!(
                    "unable to find group {group_name}: no matching entries in group file"
                ));
            }
        };
    }
    if !identity.groups.contains(&identity.gid) {
        identity.groups.insert(0, identity.gid);
    }
    Ok(identity)
}

#[cfg(test)]
mod tests {
    use super::*;

    const PASSWD: &str =
        "root:x:0:0:root:/root:/bin/sh\nbad:x:nan:0::/:\ndaemon:x:2:2::/sbin:/no\nu:x:1000:1001::/home/u:\n";
    const GROUP: &str = "# c\nroot:x:0:root\nwheel:x:10:root,u\nstaff:x:50:u\n";

    fn look(spec: &str) -> Result<(u32, u32, Vec<u32>), String> {
        find(spec, Some(PASSWD), Some(GROUP)).map(|found| (found.uid, found.gid, found.groups))
    }

    #[test]
    fn names_bring_their_groups() {
        assert_eq!(look("u"), Ok((1000, 1001, vec![1001, 10, 50])));
        assert_eq!(look("0"), Ok((0, 0, vec![0, 10])));
        assert_eq!(look("u:staff"), Ok((1000, 50, vec![50])));
        assert_eq!(look("1000:7"), Ok((1000, 7, vec![7])));
        assert_eq!(look("4242"), Ok((4242, 0, vec![0])));
    }

    #[test]
    fn what_cannot_be_found_is_an_error() {
        assert!(look("nobody").is_err());
        assert!(look("u:nogroup").is_err());
        assert!(look("-1").is_err());
        assert!(look("99999999999").is_err());
        assert!(look("bad").is_err(), "a malformed number must not become root's");
        assert!(find("u", None, None).is_err());
    }

    #[test]
    fn numbers_need_no_files() {
        assert_eq!(both_numeric("5:6"), Some((5, 6)));
        assert_eq!(both_numeric("root:root"), Some((0, 0)));
        assert_eq!(both_numeric("5"), None);
        assert_eq!(both_numeric("a:6"), None);
    }
}

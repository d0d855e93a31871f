//! Owners of what a file op makes: numbers, or names looked up in a tree's `/etc/passwd` and `/etc/group`.

use std::path::Path;

use layer::tree::Root;
use llb::pb;
use llb::pb::user_opt::User;

use crate::error::{BuildError, ErrorKind};

/// Largest user or group file that is read.
const MAX_FILE_BYTES: usize = 10 << 20;

/// Works out the uid and gid; `None`: nothing is said about the owner. A name that is not found is root, as BuildKit
/// has it. `tree` yields the tree of the input that a name is looked up in.
pub(super) fn resolve<'a>(
    owner: Option<&pb::ChownOpt>,
    tree: &dyn Fn(i64) -> Result<Option<&'a Root>, BuildError>,
) -> Result<Option<(u32, u32)>, BuildError> {
    let Some(owner) = owner else { return Ok(None) };
    let (mut uid, mut gid) = (0, 0);
    match choice(owner.user.as_ref()) {
        Some(User::ById(id)) => (uid, gid) = (*id, *id),
        Some(User::ByName(named)) => {
            let root = tree(named.input)?.ok_or_else(|| BuildError::user("invalid missing user mount"))?;
            if let Some(fields) = find(root, "/etc/passwd", &named.name)? {
                (uid, gid) = (number(&fields, 2)?, number(&fields, 3)?);
            }
        }
        None => {}
    }
    match choice(owner.group.as_ref()) {
        Some(User::ById(id)) => gid = *id,
        Some(User::ByName(named)) => {
            let root = tree(named.input)?.ok_or_else(|| BuildError::user("invalid missing group mount"))?;
            if let Some(fields) = find(root, "/etc/group", &named.name)? {
                gid = number(&fields, 2)?;
            }
        }
        None => {}
    }
    Ok(Some((uid, gid)))
}

fn choice(user: Option<&pb::UserOpt>) -> Option<&User> {
    user.and_then(|user| user.user.as_ref())
}

/// Finds the colon-separated line of a name; `None` also when the file does not exist.
fn find(root: &Root, file: &str, name: &str) -> Result<Option<Vec<String>>, BuildError> {
    let bytes = match root.read_file(Path::new(file), None, MAX_FILE_BYTES) {
        Ok(bytes) => bytes,
        Err(error) if is_absent(&error.source) => return Ok(None),
        Err(error) => return Err(BuildError::from_source(ErrorKind::User, error)),
    };
    let text = String::from_utf8_lossy(&bytes);
    let line = text
        .lines()
        .map(str::trim)
        .find(|line| line.split(':').next() == Some(name));
    Ok(line.map(|line| line.split(':').map(str::to_owned).collect()))
}

fn is_absent(error: &std::io::Error) -> bool {
    matches!(
        error.kind(),
        std::io::ErrorKind::NotFound | std::io::ErrorKind::NotADirectory
    )
}

/// A missing or malformed number is 0, as Go's parser of these files has it; one that is out of range is an error.
fn number(fields: &[String], index: usize) -> Result<u32, BuildError> {
    let Some(text) = fields.get(index) else {
        return Ok(0);
    };
    match text.parse::<i64>() {
        Ok(value) => u32::try_from(value)
            .map_err(|_| BuildError::user(format!("user or group id {value} is out of range"))),
        Err(_) => Ok(0),
    }
}

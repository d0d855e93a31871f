//! What a kept repository has beside what was fetched: the files and directories that tools expect in every `.git`.
//!
//! They are the same on every host, unlike those of Git's own templates, and there are no hooks among them. No log of refs has an
//! entry, as entries tell when and where the files were made.

use std::fs;
use std::io;
use std::path::Path;

use build::error::BuildError;

use super::blocking;
use super::checkout::{MAX_DEPTH, Scratch, internal};

const FILES: [(&str, &str); 3] = [
    // Programs know by this text that nobody named the repository.
    (
        "description",
        "Unnamed repository; edit this file 'description' to name the repository.\n",
    ),
    (
        "info/exclude",
        "# Patterns of files that are none of the repository's, one a line.\n",
    ),
    // As Git says itself in a repository with files; we tell it to log nothing while we work.
    ("config", "[core]\n\tlogallrefupdates = true\n"),
];
const DIRS: [&str; 4] = ["branches", "hooks", "info", "logs"];

/// Makes a directory of templates for Git below `dir`.
pub(super) async fn create(dir: &Path) -> Result<Scratch, BuildError> {
    let template = Scratch::create(dir).await?;
    let root = template.0.clone();
    blocking(move || fill(&root).map_err(internal)).await?;
    Ok(template)
}

fn fill(root: &Path) -> io::Result<()> {
    for name in DIRS {
        fs::create_dir(root.join(name))?;
    }
    FILES
        .iter()
        .try_for_each(|(name, text)| fs::write(root.join(name), text))
}

/// Gives a repository and those of its submodules logs without entries, which are written to only if they are there.
pub(super) async fn add_logs(git_dir: &Path) -> Result<(), BuildError> {
    let git_dir = git_dir.to_owned();
    blocking(move || add_log(&git_dir, 0).map_err(internal)).await
}

/// Adds logs to the repositories at or below a directory.
fn add_log(dir: &Path, depth: usize) -> io::Result<()> {
    if depth > MAX_DEPTH {
        return Err(io::ErrorKind::InvalidFilename.into());
    }
    let is_repository = dir.join("HEAD").is_file() && dir.join("objects").is_dir();
    let below = if is_repository {
        fs::create_dir_all(dir.join("logs"))?;
        fs::write(dir.join("logs/HEAD"), "")?;
        dir.join("modules")
    } else {
        dir.to_owned()
    };
    if !below.is_dir() {
        return Ok(());
    }
    for entry in fs::read_dir(below)? {
        let entry = entry?;
        if entry.file_type()?.is_dir() {
            add_log(&entry.path(), depth + 1)?;
        }
    }
    Ok(())
}

//! Everything in the metadata database as text, for people who look for what is wrong.

use std::fmt::Write as _;
use std::io;
use std::path::{Path, PathBuf};

use redb::{ReadOnlyDatabase, ReadTransaction, ReadableDatabase as _, ReadableTable as _, TableError};

use crate::db::{BoxError, META, NAMES, REFS, Table, VALUES};
use crate::describe::{DESCRIPTIONS, GONE, GONE_ORDER, GROUPS, LISTED, LISTINGS};
use crate::error::OpenError;
use crate::graph::{BACKLINKS, BY_REF, BY_RESULT, LINKS, RESULTS};
use crate::open::StateLock;

const TABLES: [(&str, Table); 15] = [
    ("meta", META),
    ("refs", REFS),
    ("values", VALUES),
    ("names", NAMES),
    ("links", LINKS),
    ("backlinks", BACKLINKS),
    ("results", RESULTS),
    ("by_result", BY_RESULT),
    ("by_ref", BY_REF),
    ("descriptions", DESCRIPTIONS),
    ("groups", GROUPS),
    ("listings", LISTINGS),
    ("listed", LISTED),
    ("gone", GONE),
    ("gone_order", GONE_ORDER),
];

/// Writes the database of a state directory that no process uses: its path, then per table its name and a line per entry.
///
/// # Errors
/// When the directory is in use or written by a newer program, when there is no database in it or it does not read, and
/// when `out` fails.
pub fn dump(root: &Path, out: &mut dyn io::Write) -> Result<(), OpenError> {
    let path = root.join("metadata.redb");
    let failed = |action| move |path: PathBuf| move |source| OpenError::Io { action, path, source };
    path.metadata().map_err(failed("stat")(path.clone()))?;
    let _lock = StateLock::acquire(root, None)?;
    let database_error = |source| OpenError::Database {
        root: root.to_owned(),
        source,
    };
    let opened = ReadOnlyDatabase::open(&path).map_err(|error| database_error(error.into()))?;
    let read = opened
        .begin_read()
        .map_err(|error| database_error(error.into()))?;
    let mut text = format!("===== {} =====\n", path.display());
    for (name, table) in TABLES {
        text.push_str(&dump_table(&read, name, table).map_err(database_error)?);
    }
    out.write_all(text.as_bytes())
        .map_err(failed("print")(path.clone()))
}

fn dump_table(read: &ReadTransaction, name: &str, table: Table) -> Result<String, BoxError> {
    let mut text = format!("bucket {name:?}:\n");
    let table = match read.open_table(table) {
        Err(TableError::TableDoesNotExist(_)) => return Ok(text),
        opened => opened?,
    };
    for entry in table.iter()? {
        let (key, value) = entry?;
        let _ = writeln!(
            text,
            "  \"{}\": {}",
            key.value().escape_ascii(),
            shown(value.value())
        );
    }
    Ok(text)
}

/// Texts stay as they are, anything else is escaped.
fn shown(value: &[u8]) -> String {
    match std::str::from_utf8(value) {
        Ok(text) if !text.contains(char::is_control) => text.to_owned(),
        _ => value.escape_ascii().to_string(),
    }
}

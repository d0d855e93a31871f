//! What plugins were asked to make: written before they are called, removed after all is undone.
//!
//! Plugins keep addresses and rules outside of the namespace, so what a killed daemon left has to be undone by them. An
//! entry is `<id>.json`, the configuration, durable before the first plugin runs; `<id>.result`, what they made; and
//! `<id>.netns`, on which the namespace is mounted. The latter two only matter as long as the machine runs.

use std::io;
use std::path::{Path, PathBuf};

use serde_json::Value;

use super::list::NetworkList;

/// The entries of one daemon.
#[derive(Clone, Debug)]
pub(super) struct Journal {
    directory: PathBuf,
}

/// An entry that an earlier daemon left.
#[derive(Debug)]
pub(super) struct Entry {
    pub(super) id: String,
    pub(super) list: NetworkList,
    pub(super) result: Option<Value>,
}

impl Journal {
    /// Opens a directory, which is made if it is missing.
    pub(super) fn open(directory: &Path) -> io::Result<Self> {
        std::fs::create_dir_all(directory)?;
        Ok(Self {
            directory: directory.to_owned(),
        })
    }

    fn path(&self, id: &str, extension: &str) -> PathBuf {
        self.directory.join(format!("{id}.{extension}"))
    }

    /// Where the namespace of an entry is mounted.
    pub(super) fn namespace(&self, id: &str) -> PathBuf {
        self.path(id, "netns")
    }

    /// Notes what is about to be made; durable when this returns.
    pub(super) fn begin(&self, id: &str, list: &NetworkList) -> io::Result<()> {
        let new = self.path(id, "new");
        let mut file = std::fs::File::create(&new)?;
        io::Write::write_all(&mut file, &serde_json::to_vec(list)?)?;
        file.sync_data()?;
        std::fs::rename(new, self.path(id, "json"))?;
        std::fs::File::open(&self.directory)?.sync_all()
    }

    /// Notes what was made.
    pub(super) fn set_result(&self, id: &str, result: &Value) -> io::Result<()> {
        std::fs::write(self.path(id, "result"), result.to_string())
    }

    /// Forgets what is undone.
    pub(super) fn end(&self, id: &str) -> io::Result<()> {
        for extension in ["result", "json"] {
            match std::fs::remove_file(self.path(id, extension)) {
                Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(error),
                _ => {}
            }
        }
        Ok(())
    }

    /// Lists what was begun and not ended. Entries that cannot be read are dropped: nothing was made of them.
    pub(super) fn entries(&self) -> io::Result<Vec<Entry>> {
        let mut entries = Vec::new();
        for found in std::fs::read_dir(&self.directory)? {
            let path = found?.path();
            let (name, extension) = (path.file_stem(), path.extension());
            let Some(id) = name.and_then(|name| name.to_str()) else {
                continue;
            };
            if extension.is_none_or(|extension| extension != "json") {
                continue;
            }
            match serde_json::from_slice(&std::fs::read(&path)?) {
                Ok(list) => entries.push(Entry {
                    id: id.to_owned(),
                    list,
                    result: self.result(id),
                }),
                Err(error) => {
                    tracing::warn!(path = %path.display(), %error, "dropping a damaged note of a network");
                    self.end(id)?;
                }
            }
        }
        entries.sort_by(|a, b| a.id.cmp(&b.id));
        Ok(entries)
    }

    fn result(&self, id: &str) -> Option<Value> {
        let text = std::fs::read(self.path(id, "result")).ok()?;
        serde_json::from_slice(&text).ok()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_was_begun_is_remembered_until_it_ends() {
        let directory = tempfile::tempdir().unwrap();
        let list: NetworkList =
            serde_json::from_value(serde_json::json!({"name": "n", "plugins": [{"type": "a"}]})).unwrap();
        let journal = Journal::open(directory.path()).unwrap();
        for id in ["b", "a", "c"] {
            journal.begin(id, &list).unwrap();
        }
        journal.set_result("a", &Value::from(1)).unwrap();
        journal.end("c").unwrap();
        journal.end("never").unwrap();
        std::fs::write(directory.path().join("torn.json"), "{").unwrap();
        std::fs::write(directory.path().join("half.new"), "").unwrap();
        let entries = Journal::open(directory.path()).unwrap().entries().unwrap();
        let found: Vec<_> = entries
            .iter()
            .map(|entry| (entry.id.as_str(), &entry.result))
            .collect();
        assert_eq!(found, [("a", &Some(Value::from(1))), ("b", &None)]);
        assert_eq!(entries[0].list, list);
        assert!(!directory.path().join("torn.json").exists());
    }
}

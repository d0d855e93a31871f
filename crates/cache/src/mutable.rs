//! Refs that can be written to: making, taking back, committing.

use std::fs::File;
use std::sync::Arc;

use crate::db::{After, Transaction};
use crate::error::StoreError;
use crate::handle::{CHECKSUMS, Hold, ImmutableRef, MutableRef, read_value};
use crate::row::Row;
use crate::state::State;
use crate::store::{Store, locked, new_id};
use crate::types::{Parents, RefId, RefOptions};

impl Store {
    /// Makes an empty writable ref on `parent`, which is unpacked and finalized first; `Lazy` if that needs missing blobs.
    pub fn create_mutable(
        &self,
        parent: Option<&ImmutableRef>,
        options: RefOptions,
    ) -> Result<MutableRef, StoreError> {
        let mut below = None;
        if let Some(parent) = parent {
            parent.finalize()?;
            parent.unpack()?;
            below = parent.snapshot()?;
        }
        let id = new_id();
        let key = id.snapshot_key().clone();
        self.shared.snapshotter.prepare(&key, below.as_ref())?;
        let parents = Parents::Layer {
            parent: parent.map(|parent| parent.id().clone()),
        };
        let mut state = self.shared.state();
        let mut row = Row::new(parents, &options, state.epoch);
        (row.mutable, row.snapshot) = (true, Some(key));
        let mut transaction = Transaction::default();
        state.insert(&id, row, &mut transaction);
        self.shared.submit(&mut state, transaction)?;
        let hold = Hold::new(self, &mut state, &id, true).expect("inserted above");
        Ok(MutableRef::new(hold, None))
    }

    /// Takes a ref for writing again: a cache mount, or the files of an earlier local source. `Locked` while anyone holds
    /// it. If it had been committed, that immutable ref and the records with it are gone, even after a crash.
    pub fn get_mutable(&self, id: &RefId) -> Result<MutableRef, StoreError> {
        let mut state = self.shared.state();
        let entry = state
            .get(id)
            .ok_or_else(|| StoreError::NotFound { id: id.clone() })?;
        if !entry.row.mutable {
            return Err(StoreError::NotMutable { id: id.clone() });
        }
        let twin = entry.row.twin.clone();
        let key = id.snapshot_key();
        let is_free = |entry: &crate::state::Entry| entry.holds == 0 && entry.children == 0;
        let twin_is_free = twin.as_ref().and_then(|twin| state.get(twin)).is_none_or(is_free);
        if !is_free(entry) || !twin_is_free {
            return Err(StoreError::Locked { id: id.clone() });
        }
        let mut transaction = Transaction::default();
        if !self.is_whole(key)? {
            state.remove_with_twin(id, &mut transaction);
            self.shared.submit(&mut state, transaction)?;
            return Err(StoreError::NotFound { id: id.clone() });
        }
        let mut checksums = None;
        self.mark_writing(&mut state, id)?;
        if let Some(twin) = &twin {
            checksums = read_value(self, twin, CHECKSUMS)?;
            state.remove(twin, &mut transaction);
        }
        let epoch = state.epoch;
        state.update(id, &mut transaction, |row| {
            (row.twin, row.size_bytes, row.epoch) = (None, None, epoch);
        });
        self.shared.submit(&mut state, transaction)?;
        let hold = Hold::new(self, &mut state, id, true).expect("found above");
        Ok(MutableRef::new(hold, checksums))
    }

    /// Leaves a mark on disk that the files of a ref are being changed: should the process die, nothing stored about them
    /// holds. Cheaper than waiting until the database has forgotten it durably.
    fn mark_writing(&self, state: &mut State, id: &RefId) -> Result<(), StoreError> {
        state.markers += 1;
        let path = self
            .shared
            .root
            .join("writing")
            .join(format!("{id}.{}", state.markers));
        File::create(&path).map_err(|source| StoreError::Io {
            action: "create",
            path: path.clone(),
            source,
        })?;
        state.writing.insert(id.clone(), path);
        Ok(())
    }
}

/// Makes the immutable twin of a mutable ref, whose only handle the caller has.
pub(crate) fn commit(store: &Store, id: &RefId) -> Result<ImmutableRef, StoreError> {
    let mut state = store.shared.state();
    let not_found = || StoreError::NotFound { id: id.clone() };
    let row = state.get(id).ok_or_else(not_found)?.row.clone();
    let twin = new_id();
    let options = RefOptions {
        record_type: row.record_type,
        ..RefOptions::default()
    };
    let mut immutable = Row::new(row.parents.clone(), &options, state.epoch);
    (immutable.snapshot, immutable.twin) = (Some(twin.snapshot_key().clone()), Some(id.clone()));
    immutable.description = Arc::clone(&row.description);
    let mut transaction = Transaction::default();
    state.insert(&twin, immutable, &mut transaction);
    let epoch = state.epoch;
    state.update(id, &mut transaction, |row| {
        (row.twin, row.size_bytes, row.epoch) = (Some(twin.clone()), None, epoch);
    });
    if let Some(marker) = state.writing.remove(id) {
        transaction.after.push(After::DeleteFile(marker));
    }
    store.shared.submit(&mut state, transaction)?;
    let hold = Hold::new(store, &mut state, &twin, true).expect("inserted above");
    Ok(ImmutableRef::new(hold))
}

/// Commits the active snapshot behind an immutable ref that the caller holds.
pub(crate) fn finalize(store: &Store, id: &RefId) -> Result<(), StoreError> {
    let not_found = || StoreError::NotFound { id: id.clone() };
    let work = {
        let mut state = store.shared.state();
        if state.get(id).ok_or_else(not_found)?.row.twin.is_none() {
            return Ok(());
        }
        state.work(id).ok_or_else(not_found)?
    };
    let _working = locked(&work);
    let (name, twin) = {
        let state = store.shared.state();
        let row = &state.get(id).ok_or_else(not_found)?.row;
        let Some(twin) = row.twin.clone() else {
            return Ok(());
        };
        (row.snapshot.clone().ok_or_else(not_found)?, twin)
    };
    store.shared.snapshotter.commit(&name, twin.snapshot_key())?;
    let mut state = store.shared.state();
    let mut transaction = Transaction::default();
    let epoch = state.epoch;
    state.update(id, &mut transaction, |row| (row.twin, row.epoch) = (None, epoch));
    state.update(&twin, &mut transaction, |row| row.twin = None);
    state.remove(&twin, &mut transaction);
    store.shared.submit(&mut state, transaction)?;
    Ok(())
}

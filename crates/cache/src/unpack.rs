//! Making trees: from layer blobs, and from other trees.

use std::collections::BTreeSet;
use std::ffi::OsString;
use std::path::Path;

use layer::{ApplyOptions, Stop};
use oci::Digest;
use snapshot::{Diff, Mount, SnapshotKey};

use crate::db::Transaction;
use crate::error::{DiffIdMismatch, StoreError};
use crate::mutable;
use crate::row::Row;
use crate::state::State;
use crate::store::{Store, locked, new_id};
use crate::types::{MissingBlob, Parents, RefId};

/// Lists `id` and what it stands on as far as trees are missing, parents first.
fn without_tree(state: &State, id: &RefId) -> Vec<RefId> {
    let (mut order, mut seen) = (Vec::new(), BTreeSet::new());
    // Each ref is met twice: on the way down, and when its parents are done.
    let mut pending = vec![(id.clone(), false)];
    while let Some((id, parents_done)) = pending.pop() {
        let Some(entry) = state.get(&id) else { continue };
        if parents_done {
            order.push(id);
        } else if !entry.row.has_tree() && seen.insert(id.clone()) {
            let parents: Vec<_> = entry
                .row
                .parents
                .ids()
                .into_iter()
                .map(|id| (id.clone(), false))
                .collect();
            pending.push((id, true));
            pending.extend(parents.into_iter().rev());
        }
    }
    order
}

/// Lists the blobs that have to be fetched before `id` can be unpacked.
pub(crate) fn missing_blobs(store: &Store, id: &RefId) -> Result<Vec<MissingBlob>, StoreError> {
    let rows: Vec<(RefId, Row)> = {
        let state = store.shared.state();
        let ids = without_tree(&state, id);
        ids.into_iter()
            .filter_map(|id| state.get(&id).map(|entry| (id.clone(), entry.row.clone())))
            .collect()
    };
    let mut missing = Vec::new();
    for (id, row) in rows {
        if !matches!(row.parents, Parents::Layer { .. }) || present_blob(store, &row)?.is_some() {
            continue;
        }
        // Prefer what someone is known to have.
        let is_provided = |digest: &Digest| {
            row.layer()
                .providers
                .get(digest)
                .is_some_and(|providers| !providers.is_empty())
        };
        let layer = row.layer();
        let blob = layer
            .blobs
            .iter()
            .find(|blob| is_provided(&blob.digest))
            .or_else(|| layer.blobs.first());
        let diff_id = blob.and_then(|blob| layer.diff_id_of(&blob.digest));
        let (Some(descriptor), Some(diff_id)) = (blob.cloned(), diff_id) else {
            return Err(StoreError::NotFound { id });
        };
        let providers = layer
            .providers
            .get(&descriptor.digest)
            .cloned()
            .unwrap_or_default();
        missing.push(MissingBlob {
            ref_id: id,
            descriptor,
            diff_id,
            providers,
            description: row.description.as_ref().to_owned(),
        });
    }
    Ok(missing)
}

fn present_blob(store: &Store, row: &Row) -> Result<Option<Digest>, StoreError> {
    for blob in &row.layer().blobs {
        if store.content().exists(&blob.digest)? {
            return Ok(Some(blob.digest));
        }
    }
    Ok(None)
}

/// Makes the trees that are missing up to `id`, which the caller holds.
pub(crate) fn unpack(store: &Store, id: &RefId, stop: &Stop) -> Result<(), StoreError> {
    if store
        .shared
        .state()
        .get(id)
        .is_some_and(|entry| entry.row.has_tree())
    {
        return Ok(());
    }
    let missing = missing_blobs(store, id)?;
    if !missing.is_empty() {
        let digests = missing.into_iter().map(|blob| blob.descriptor.digest).collect();
        return Err(StoreError::Lazy {
            id: id.clone(),
            digests,
        });
    }
    let order = without_tree(&store.shared.state(), id);
    order.iter().try_for_each(|id| make_tree(store, id, stop))
}

fn make_tree(store: &Store, id: &RefId, stop: &Stop) -> Result<(), StoreError> {
    if stop.is_stopped() {
        return Err(StoreError::Unwanted { id: id.clone() });
    }
    let not_found = || StoreError::NotFound { id: id.clone() };
    let work = store.shared.state().work(id).ok_or_else(not_found)?;
    let _working = locked(&work);
    let row = store.shared.state().get(id).ok_or_else(not_found)?.row.clone();
    if row.has_tree() {
        return Ok(());
    }
    let name = match shared_tree(store, &row)? {
        Some(name) => name,
        None => {
            let mut name = id.snapshot_key().clone();
            if store.shared.snapshotter.stat(&name).is_ok() {
                // What remains of a tree whose files were removed by hand still has the name.
                name = new_id().snapshot_key().clone();
            }
            match &row.parents {
                Parents::Layer { parent } => {
                    apply_blob(store, id, &row, (parent.as_ref(), &name), stop)?;
                }
                Parents::Merge { .. } | Parents::Diff { .. } => {
                    let diffs = diffs_of(store, id, stop)?;
                    store.shared.snapshotter.merge(&name, &diffs)?;
                }
            }
            name
        }
    };
    let mut state = store.shared.state();
    let mut transaction = Transaction::default();
    let epoch = state.epoch;
    state.update(id, &mut transaction, |row| {
        (row.snapshot, row.size_bytes, row.epoch) = (Some(name), None, epoch);
    });
    store.shared.submit(&mut state, transaction)?;
    Ok(())
}

/// Finds the tree of a ref with the same layers.
fn shared_tree(store: &Store, row: &Row) -> Result<Option<SnapshotKey>, StoreError> {
    let state = store.shared.state();
    let Some(chain_id) = row.layer().chain_id else {
        return Ok(None);
    };
    let committed = state
        .by_chain(&chain_id)
        .filter_map(|id| state.get(id))
        .filter_map(|entry| entry.row.committed());
    for key in committed {
        if store.is_whole(&key)? {
            return Ok(Some(key));
        }
    }
    Ok(None)
}

/// Unpacks a layer on its parent, as a snapshot of a name.
fn apply_blob(
    store: &Store,
    id: &RefId,
    row: &Row,
    (parent, name): (Option<&RefId>, &SnapshotKey),
    stop: &Stop,
) -> Result<(), StoreError> {
    let snapshotter = &store.shared.snapshotter;
    let below = parent.map(|parent| committed(store, parent)).transpose()?;
    let lazy = || StoreError::Lazy {
        id: id.clone(),
        digests: row.layer().blobs.iter().map(|blob| blob.digest).collect(),
    };
    let blob = present_blob(store, row)?.ok_or_else(lazy)?;
    check_kind(row, id, &blob)?;
    let reader = store.content().reader(&blob)?.into_reader();
    let options = ApplyOptions {
        stop: stop.clone(),
        ..ApplyOptions::default()
    };
    let key = new_id().snapshot_key().clone();
    snapshotter.prepare(&key, below.as_ref())?;
    let applied = snapshot::apply_layer(&**snapshotter, &key, reader, options)
        .map_err(|source| StoreError::Unpack {
            id: id.clone(),
            blob,
            source: Box::new(source),
        })
        .and_then(|applied| match row.layer().diff_id_of(&blob) {
            Some(expected) if expected != applied.diff_id => Err(StoreError::WrongDiffId {
                id: id.clone(),
                mismatch: Box::new(DiffIdMismatch {
                    blob,
                    expected,
                    actual: applied.diff_id,
                }),
            }),
            _ => Ok(()),
        })
        .and_then(|()| Ok(snapshotter.commit(name, &key)?));
    if applied.is_err()
        && let Err(error) = snapshotter.remove(&key)
    {
        tracing::warn!(error = &error as &dyn std::error::Error, %key, "remove a half-made snapshot");
    }
    match applied {
        Err(StoreError::Unpack { .. }) if stop.is_stopped() => Err(StoreError::Unwanted { id: id.clone() }),
        applied => applied.map_err(|error| without_corrupt_blob(store, id, &blob, error)),
    }
}

/// Refuses a blob that is not said to be a layer, whatever is in it: the text is BuildKit's.
fn check_kind(row: &Row, id: &RefId, blob: &Digest) -> Result<(), StoreError> {
    let descriptor = row
        .layer()
        .blobs
        .iter()
        .find(|descriptor| descriptor.digest == *blob);
    let kind = descriptor.map_or("", |descriptor| descriptor.media_type.as_str());
    if oci::media_type::is_layer(kind) {
        return Ok(());
    }
    let reason = format!("failed to get stream processor for {kind}: no processor for media-type");
    Err(StoreError::Unpack {
        id: id.clone(),
        blob: *blob,
        source: reason.into(),
    })
}

/// Looks whether a layer failed because its blob is not what it was when it was stored. Then the blob goes, so that it is
/// fetched again, and the error is that it is missing.
fn without_corrupt_blob(store: &Store, id: &RefId, blob: &Digest, error: StoreError) -> StoreError {
    if !matches!(error, StoreError::WrongDiffId { .. } | StoreError::Unpack { .. }) {
        return error;
    }
    let Err(content::VerifyError::Corrupt { actual, .. }) = store.content().verify(blob) else {
        return error;
    };
    tracing::warn!(%blob, %actual, "a blob was damaged on disk and is dropped");
    match store.content().delete(blob) {
        Ok(_) => StoreError::Lazy {
            id: id.clone(),
            digests: vec![*blob],
        },
        Err(error) => error.into(),
    }
}

/// Returns the committed snapshot of a ref that something stands on.
fn committed(store: &Store, id: &RefId) -> Result<SnapshotKey, StoreError> {
    mutable::finalize(store, id)?;
    let state = store.shared.state();
    let row = state.get(id).map(|entry| &entry.row);
    row.and_then(Row::committed)
        .ok_or_else(|| StoreError::NotFound { id: id.clone() })
}

/// Lists the changes that, applied in order to nothing, give a merge or diff.
fn diffs_of(store: &Store, id: &RefId, stop: &Stop) -> Result<Vec<Diff>, StoreError> {
    let sides: Vec<(RefId, Parents)> = {
        let state = store.shared.state();
        let layers = state.layers(id);
        layers
            .into_iter()
            .filter_map(|id| {
                state
                    .get(&id)
                    .map(|entry| (id.clone(), entry.row.parents.clone()))
            })
            .collect()
    };
    let mut diffs = Vec::with_capacity(sides.len());
    for (id, parents) in sides {
        let (lower, upper) = match parents {
            Parents::Layer { parent } => (parent, Some(id)),
            // Not a run of layers: it lists itself.
            Parents::Diff { lower, upper } => (lower.map(|id| *id), upper.map(|id| *id)),
            Parents::Merge { .. } => continue,
        };
        let lower = lower.map(|id| tree_of(store, &id, stop)).transpose()?;
        let upper = upper.map(|id| tree_of(store, &id, stop)).transpose()?;
        diffs.push(Diff { lower, upper });
    }
    Ok(diffs)
}

/// Returns a side of a diff; makes its tree if it was no parent of what is being unpacked.
fn tree_of(store: &Store, id: &RefId, stop: &Stop) -> Result<SnapshotKey, StoreError> {
    for id in without_tree(&store.shared.state(), id) {
        make_tree(store, &id, stop)?;
    }
    committed(store, id)
}

fn is_twin_retained(store: &Store, id: &RefId) -> bool {
    let state = store.shared.state();
    let twin = state.get(id).and_then(|entry| entry.row.twin.as_ref());
    twin.and_then(|twin| state.get(twin))
        .is_some_and(|twin| twin.row.retain)
}

/// Describes how to look at the tree of a held ref, making it if need be.
pub(crate) fn read_mounts(store: &Store, id: &RefId) -> Result<Vec<Mount>, StoreError> {
    let not_found = || StoreError::NotFound { id: id.clone() };
    unpack(store, id, &Stop::default())?;
    if !is_twin_retained(store, id) {
        // The directory moves when the snapshot is committed; after this it stays where it is.
        mutable::finalize(store, id)?;
    }
    let work = store.shared.state().work(id).ok_or_else(not_found)?;
    // The snapshot must not be committed between looking and describing.
    let _working = locked(&work);
    let row = store.shared.state().get(id).ok_or_else(not_found)?.row.clone();
    match &row.twin {
        Some(twin) => {
            let mounts = store.shared.snapshotter.mounts(twin.snapshot_key())?;
            Ok(mounts.iter().map(read_only).collect())
        }
        None => Ok(store.shared.snapshotter.read_mounts(row.committed().as_ref())?),
    }
}

/// Describes the same tree read-only.
pub(crate) fn read_only(mount: &Mount) -> Mount {
    let mut mount = mount.clone();
    let lowest = mount.lower_dirs().is_empty();
    match mount.upper_dir().map(Path::to_owned) {
        // Nothing lies below, so nothing in it is a mark for overlayfs.
        Some(upper) if lowest => return Mount::bind(upper, true),
        Some(upper) => {
            let mut first = OsString::from("lowerdir+=");
            first.push(upper);
            mount.options.retain(|option| {
                let option = option.as_encoded_bytes();
                !option.starts_with(b"upperdir=") && !option.starts_with(b"workdir=")
            });
            mount.options.insert(0, first);
        }
        None => {}
    }
    mount.options.retain(|option| option != "rw" && option != "ro");
    mount.options.push("ro".into());
    mount
}

//! Removing refs nobody holds.

use std::ops::ControlFlow;
use std::os::unix::fs::MetadataExt as _;
use std::sync::mpsc;
use std::time::SystemTime;

use crate::db::{After, Transaction};
use crate::error::StoreError;
use crate::filter::Filters;
use crate::gc::{Candidate, DiskStat, PruneOptions, keep_bytes, order};
use crate::store::{Store, locked};
use crate::types::{RecordType, RefId};
use crate::usage::{self, UsageOptions, UsageRecord};

impl Store {
    /// Removes what the steps allow, in order, calling `removed` for each. Returns when the space is free. `removed` may stop
    /// it by returning `Break`.
    ///
    /// What is held by a handle, or by something that is, stays. With limits, what was used least and longest ago goes
    /// first, and what stood below it is looked at again, until the limits are met or nothing more may go.
    pub fn prune(
        &self,
        steps: &[PruneOptions],
        removed: &mut dyn FnMut(UsageRecord) -> ControlFlow<()>,
    ) -> Result<(), StoreError> {
        let _alone = locked(&self.shared.pruning);
        let outcome = self.prune_steps(steps, removed);
        self.wait_for_space()?;
        outcome
    }

    /// Does what [`prune`](Self::prune) does, without any cost to the disk when there is nothing to remove.
    pub fn collect(
        &self,
        steps: &[PruneOptions],
        removed: &mut dyn FnMut(UsageRecord) -> ControlFlow<()>,
    ) -> Result<(), StoreError> {
        let _alone = locked(&self.shared.pruning);
        let mut is_removing = false;
        let outcome = self.prune_steps(steps, &mut |record| {
            is_removing = true;
            removed(record)
        });
        if is_removing {
            self.wait_for_space()?;
        }
        outcome
    }

    fn prune_steps(
        &self,
        steps: &[PruneOptions],
        removed: &mut dyn FnMut(UsageRecord) -> ControlFlow<()>,
    ) -> Result<(), StoreError> {
        for step in steps {
            if self.prune_step(step, removed)?.is_break() {
                break;
            }
        }
        Ok(())
    }

    /// Waits until everything removed so far is deleted from disk.
    fn wait_for_space(&self) -> Result<(), StoreError> {
        let (done, wait) = mpsc::channel();
        let sequence = {
            let mut state = self.shared.state();
            self.shared.submit(
                &mut state,
                Transaction {
                    after: vec![After::Notify(done)],
                    ..Transaction::default()
                },
            )?
        };
        self.shared.db.wait_durable(sequence)?;
        // Without a sender the database has failed, which was reported above.
        let _ = wait.recv();
        Ok(())
    }

    fn prune_step(
        &self,
        step: &PruneOptions,
        removed: &mut dyn FnMut(UsageRecord) -> ControlFlow<()>,
    ) -> Result<ControlFlow<()>, StoreError> {
        let filters = Filters::parse(&step.filter)?;
        let is_limited = step.max_used_bytes != 0 || step.reserved_bytes != 0 || step.min_free_bytes != 0;
        let (mut total, mut disk) = (0u64, DiskStat::default());
        if is_limited {
            if self.is_far_below(step)? {
                return Ok(ControlFlow::Continue(()));
            }
            let records = self.disk_usage(&UsageOptions::default())?;
            total = records
                .iter()
                .filter(|record| !record.shared)
                .map(|record| record.size_bytes)
                .sum();
            total = total.saturating_add(self.metadata_bytes());
        }
        if step.min_free_bytes != 0 {
            disk = self.disk_stat()?;
        }
        let keep = keep_bytes(step, total, disk);
        loop {
            let candidates = self.candidates(step, &filters);
            // Only limits make it matter who goes first.
            let candidates = if keep.is_some() {
                order(candidates)
            } else {
                candidates
            };
            let mut count = 0;
            for candidate in candidates {
                if keep.is_some_and(|keep| total < keep) {
                    return Ok(ControlFlow::Continue(()));
                }
                let Some(record) = self.remove(&candidate.subject)? else {
                    continue;
                };
                total = total.saturating_sub(record.size_bytes);
                count += 1;
                if removed(record).is_break() {
                    return Ok(ControlFlow::Break(()));
                }
            }
            if count == 0 {
                return Ok(ControlFlow::Continue(()));
            }
        }
    }

    /// Tells whether all that the file system holds is less than may stay: then nothing has to be measured, which takes a
    /// look at every file.
    fn is_far_below(&self, step: &PruneOptions) -> Result<bool, StoreError> {
        let disk = self.disk_stat()?;
        let used = disk.total_bytes.saturating_sub(disk.free_bytes);
        Ok(used < step.max_used_bytes && disk.free_bytes > step.min_free_bytes)
    }

    /// Returns the size of the metadata on disk, the room that is kept for it included.
    fn metadata_bytes(&self) -> u64 {
        let path = self.shared.root.join("metadata.redb");
        std::fs::metadata(path).map_or(0, |metadata| metadata.blocks().saturating_mul(512))
    }

    fn candidates(&self, step: &PruneOptions, filters: &Filters) -> Vec<Candidate<RefId>> {
        let state = self.shared.state();
        let cut_off = SystemTime::now().checked_sub(step.keep_duration);
        let mut candidates = Vec::new();
        for (id, entry) in state.iter() {
            if entry.holds > 0 || entry.children > 0 || !usage::is_listed(&state, entry) {
                continue;
            }
            let record = usage::describe(&state, id, entry, false);
            let is_internal = matches!(record.record_type, RecordType::Internal | RecordType::Frontend);
            if !step.all && (is_internal || record.shared) {
                continue;
            }
            let is_young = |used_at| cut_off.is_some_and(|cut_off| used_at > cut_off);
            if !step.keep_duration.is_zero() && record.last_used_at.is_some_and(is_young) {
                continue;
            }
            if filters.matches(&record) {
                candidates.push(Candidate {
                    last_used_at_ns: entry.row.last_used_at_ns,
                    usage_count: entry.row.usage_count,
                    subject: id.clone(),
                });
            }
        }
        candidates
    }

    /// Removes a ref unless someone took it meanwhile.
    fn remove(&self, id: &RefId) -> Result<Option<UsageRecord>, StoreError> {
        let size_bytes = usage::measure(self, id)?;
        let mut state = self.shared.state();
        let Some(entry) = state.get(id) else {
            return Ok(None);
        };
        let record = UsageRecord {
            size_bytes,
            ..usage::describe(&state, id, entry, false)
        };
        let mut transaction = Transaction::default();
        if state.remove_with_twin(id, &mut transaction).is_none() {
            return Ok(None);
        }
        self.shared.submit(&mut state, transaction)?;
        Ok(Some(record))
    }
}

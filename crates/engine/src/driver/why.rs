//! Finds out why a vertex runs: describes it, reads what is remembered of others, looks at the files that it reads. Blocking,
//! and beside the work itself.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::SystemTime;

use cache::{RecordDescription, Records};
use layer::checksum::Listed;
use solver::NewRecord;

use crate::checksum;
use crate::explain::MAX_CHANGES;
use crate::explain::compare;
use crate::explain::describe::{self, Described, Input, Subject};
use crate::explain::listing::{self, Listing, MAX_FILES};
use crate::explanation::{Change, Explanation, Reason};
use crate::op::{Op, ResultRef, VertexSpec};

/// Earlier descriptions that are compared, per group.
const COMPARED: usize = 16;
/// Files that are read to tell a change of their bytes from one of their attributes: how many, and how much.
const READ_FILES: usize = 64;
const READ_BYTES: u64 = 64 << 20;

/// A vertex that runs.
pub(super) struct Work {
    pub records: Records,
    pub spec: Arc<VertexSpec>,
    /// The record that it will have.
    pub record: Option<NewRecord>,
    pub op: Arc<dyn Op>,
    pub inputs: Vec<ResultRef>,
    /// The ops of inputs that are sources.
    pub sources: Vec<Option<Arc<dyn Op>>>,
    pub started_at: SystemTime,
}

/// What came of it.
pub(super) struct Explained {
    pub explanation: Explanation,
    /// For those who compare with it later.
    pub description: Option<RecordDescription>,
}

/// Describes a vertex that did not run here, without looking at files.
pub(super) fn describe(
    spec: &VertexSpec,
    record: &NewRecord,
    created_at: SystemTime,
) -> Option<RecordDescription> {
    let described = describe::describe(Subject {
        spec,
        record,
        provenance: None,
        pins: &[],
    });
    to_store(&described, Vec::new(), created_at)
}

fn to_store(
    described: &Described,
    listings: Vec<Vec<u8>>,
    created_at: SystemTime,
) -> Option<RecordDescription> {
    Some(RecordDescription {
        groups: describe::groups(described),
        json: serde_json::to_vec(described).ok()?,
        listings,
        created_at,
    })
}

/// Files that were read of an input.
struct Files {
    listed: Listed,
    listing: Listing,
}

impl Work {
    /// Explains the vertex.
    pub fn explain(self) -> Explained {
        let Some(record) = &self.record else {
            let is_client = self.spec.inputs.is_empty();
            let reason = if is_client {
                Reason::Client
            } else {
                Reason::Unidentified
            };
            return Explained {
                explanation: self.explanation(self.ignored().unwrap_or(reason), None),
                description: None,
            };
        };
        let pins: Vec<_> = self
            .sources
            .iter()
            .map(|source| describe::pin(&source.as_ref()?.provenance()?))
            .collect();
        let mut described = describe::describe(Subject {
            spec: &self.spec,
            record,
            provenance: self.op.provenance().as_ref(),
            pins: &pins,
        });
        let mut files = BTreeMap::new();
        let mut listings = Vec::new();
        for (number, input) in described.inputs.iter_mut().enumerate() {
            if let Some(found) = self.files(number) {
                let encoded = found.listing.encode();
                input.listing = Some(oci::Digest::sha256(&encoded));
                listings.push(encoded);
                files.insert(number, found);
            }
        }
        Explained {
            explanation: self.find_reason(record, &described, &files),
            description: to_store(&described, listings, self.started_at),
        }
    }

    fn ignored(&self) -> Option<Reason> {
        self.spec.metadata.ignore_cache.then_some(Reason::Ignored)
    }

    fn explanation(&self, reason: Reason, compared_at: Option<SystemTime>) -> Explanation {
        Explanation {
            vertex: self
                .spec
                .digest
                .unwrap_or_else(|| oci::Digest::sha256(&self.spec.raw)),
            name: describe::shown_name(&self.spec),
            reason,
            compared_at,
            changes: Vec::new(),
            omitted: 0,
        }
    }

    /// Lists what the step reads of an input; `None` if that does not count or cannot be looked at any more.
    fn files(&self, number: usize) -> Option<Files> {
        let selectors = self.op.content_selectors(number)?;
        let reference = self.inputs.get(number)?.get()?;
        match checksum::list(reference, selectors, MAX_FILES) {
            Ok(listed) => Some(Files {
                listing: Listing::from(&listed),
                listed,
            }),
            Err(error) => {
                tracing::debug!(%error, vertex = self.spec.name, "what a step reads is not listed");
                None
            }
        }
    }

    fn find_reason(
        &self,
        record: &NewRecord,
        now: &Described,
        files: &BTreeMap<usize, Files>,
    ) -> Explanation {
        if let Some(reason) = self.ignored() {
            return self.explanation(reason, None);
        }
        let id = record.record.to_string();
        let candidates = self.candidates(now);
        let found = compare::nearest(now, &candidates);
        if let Some(((known, at), described)) = found
            && (*known == id || compare::is_equal(now, described))
        {
            return self.explanation(self.loss(known), Some(*at));
        }
        if let Some(at) = self.records.gone_since(&id).unwrap_or_default() {
            return self.explanation(Reason::Expired, Some(at));
        }
        let Some(((_, at), known)) = found else {
            return self.explanation(Reason::NeverBuilt, None);
        };
        let mut compared = |number: usize, before: &Input| {
            let changed = files
                .get(&number)
                .map(|files| self.file_changes(number, files, before));
            changed.unwrap_or_default()
        };
        let mut changes = compare::changes(now, known, &mut compared);
        let omitted = changes.len().saturating_sub(MAX_CHANGES);
        changes.truncate(MAX_CHANGES);
        Explanation {
            changes,
            omitted,
            ..self.explanation(Reason::Changed, Some(*at))
        }
    }

    /// Reads what is remembered of steps like this one from before it was started, newest first.
    fn candidates(&self, now: &Described) -> Vec<((String, SystemTime), Described)> {
        let groups = describe::groups(now);
        let described = |group: &String| {
            self.records.described(group, COMPARED).unwrap_or_else(|error| {
                tracing::warn!(%error, "descriptions of cache records cannot be read");
                Vec::new()
            })
        };
        let mut found: Vec<cache::Described> = groups.iter().flat_map(described).collect();
        found.sort_by(|a, b| {
            b.created_at
                .cmp(&a.created_at)
                .then_with(|| a.record.cmp(&b.record))
        });
        found.dedup_by(|a, b| a.record == b.record);
        let earlier = found
            .into_iter()
            .filter(|found| found.created_at < self.started_at);
        earlier
            .filter_map(|found| {
                let described = serde_json::from_slice(&found.json).ok()?;
                Some(((found.record, found.created_at), described))
            })
            .collect()
    }

    /// What became of a result that should have been found.
    fn loss(&self, record: &str) -> Reason {
        let results = self.records.results(record).unwrap_or_default();
        match results.iter().any(|result| result.created_at < self.started_at) {
            true => Reason::Unusable,
            false => Reason::Expired,
        }
    }

    fn file_changes(&self, number: usize, files: &Files, before: &Input) -> Vec<Change> {
        let stored = before
            .listing
            .and_then(|digest| self.records.listing(&digest).ok()?);
        let Some(stored) = stored.and_then(|bytes| Listing::decode(&bytes)) else {
            return Vec::new();
        };
        let reference = self.inputs.get(number).and_then(ResultRef::get);
        let (mut left_files, mut left_bytes) = (READ_FILES, READ_BYTES);
        let mut has_same_content = |path: &str, old: &listing::Entry| {
            left_files = left_files.checked_sub(1)?;
            left_bytes = left_bytes.checked_sub(old.size_bytes)?;
            let path = if path == "." {
                String::new()
            } else {
                format!("/{path}")
            };
            let place = &files.listed.files.get(&path)?.place;
            let hash = checksum::hash_as(reference?, place, old.attributes())?;
            Some(old.has_hash(&hash))
        };
        let input = &self.spec.input_names.get(number).cloned().unwrap_or_default();
        let mut changes = listing::diff(&stored, &files.listing, input, &mut has_same_content);
        if changes.is_empty() && (stored.is_cut || files.listing.is_cut) {
            changes.push(Change {
                subject: format!("something of \"{input}\" beyond the first {MAX_FILES} files"),
                ..Change::default()
            });
        }
        changes
    }
}

//! What can be said about any operation beside what it does.

use std::collections::BTreeMap;
use std::sync::Arc;

use oci::Platform;

use super::{SourceLocation, SourceMap};
use crate::pb::{ExportCache, LinuxResources, OpMetadata, ProgressGroup, Range};

/// Platform, worker and metadata of one operation.
#[derive(Clone, Debug, Default)]
pub struct Constraints {
    /// Platform; unset means that of the state, then that of the whole definition.
    pub platform: Option<Platform>,
    /// Filters that a worker must match.
    pub worker_constraints: Vec<String>,
    /// What is said about the vertex without being part of its identity.
    pub metadata: OpMetadata,
    /// Identity of local files; unset means that of the whole definition.
    pub local_unique_id: Option<String>,
    /// Where in which source file the operation comes from.
    pub locations: Vec<SourceLocation>,
}

impl Constraints {
    /// Returns no constraints.
    pub fn new() -> Self {
        Self::default()
    }

    /// Sets the platform.
    #[must_use]
    pub fn platform(mut self, platform: &Platform) -> Self {
        self.platform = Some(platform.clone());
        self
    }

    /// Runs the operation even if its result is cached.
    #[must_use]
    pub fn ignore_cache(mut self) -> Self {
        self.metadata.ignore_cache = true;
        self
    }

    /// Adds to the description.
    #[must_use]
    pub fn description<K: Into<String>, V: Into<String>>(
        mut self,
        entries: impl IntoIterator<Item = (K, V)>,
    ) -> Self {
        let entries = entries.into_iter().map(|(key, value)| (key.into(), value.into()));
        self.metadata.description.extend(entries);
        self
    }

    /// Sets the name shown for the operation.
    #[must_use]
    pub fn custom_name(self, name: impl Into<String>) -> Self {
        self.description([("llb.customname", name.into())])
    }

    /// Exports, or does not export, the result with the cache.
    #[must_use]
    pub fn export_cache(mut self, export: bool) -> Self {
        self.metadata.export_cache = Some(ExportCache { value: export });
        self
    }

    /// Shows the operation as part of a group.
    #[must_use]
    pub fn progress_group(mut self, id: impl Into<String>, name: impl Into<String>, weak: bool) -> Self {
        self.metadata.progress_group = Some(ProgressGroup {
            id: id.into(),
            name: name.into(),
            weak,
        });
        self
    }

    /// Limits CPU and memory of containers.
    #[must_use]
    pub fn linux_resources(mut self, resources: LinuxResources) -> Self {
        self.metadata.linux_resources = Some(resources);
        self
    }

    /// Sets the identity of local files.
    #[must_use]
    pub fn local_unique_id(mut self, id: impl Into<String>) -> Self {
        self.local_unique_id = Some(id.into());
        self
    }

    /// Adds a place in a source file.
    #[must_use]
    pub fn location(mut self, map: &Arc<SourceMap>, ranges: Vec<Range>) -> Self {
        self.locations.push(SourceLocation {
            map: Arc::clone(map),
            ranges,
        });
        self
    }

    /// Takes over everything that `other` says.
    #[must_use]
    pub fn and(mut self, other: &Self) -> Self {
        if other.platform.is_some() {
            self.platform.clone_from(&other.platform);
        }
        if other.local_unique_id.is_some() {
            self.local_unique_id.clone_from(&other.local_unique_id);
        }
        self.worker_constraints
            .extend(other.worker_constraints.iter().cloned());
        self.locations.extend(other.locations.iter().cloned());
        self.metadata = merge_metadata(self.metadata, other.metadata.clone());
        self
    }

    pub(super) fn add_cap(&mut self, cap: &str) {
        add_cap(&mut self.metadata.caps, cap);
    }
}

pub(super) fn add_cap(caps: &mut BTreeMap<String, bool>, cap: &str) {
    caps.insert(cap.to_owned(), true);
}

/// Adds what `other` says to `base`; where both say something, `other` wins.
pub(super) fn merge_metadata(mut base: OpMetadata, other: OpMetadata) -> OpMetadata {
    base.ignore_cache |= other.ignore_cache;
    base.description.extend(other.description);
    base.caps.extend(other.caps.into_keys().map(|cap| (cap, true)));
    base.export_cache = other.export_cache.or(base.export_cache);
    base.progress_group = other.progress_group.or(base.progress_group);
    base.linux_resources = other.linux_resources.or(base.linux_resources);
    base
}

//! Remote caches in BuildKit's format: `inline` in images, `registry` and `local` as manifests of their own.
//!
//! An export turns the steps of a build into records ([`chains`], [`collect`]) whose results are layers; an import
//! answers the solver's questions from such records ([`records`]) and makes lazy refs of results, which find their blobs
//! where the cache is ([`place`]).
//!
//! Invariants: what is left out of an export is a warning on its vertex; a broken cache is one that has nothing; what is
//! read is bounded, and the work is linear in it; the same records are written as the same bytes.

pub mod chains;
pub mod collect;
pub mod config;
pub mod export;
pub mod import;
pub mod inline;
pub mod options;
pub mod place;
pub mod records;

use std::collections::BTreeMap;
use std::sync::Arc;

use export::{ExportParts, LocalFactory, RegistryFactory};
use import::{LocalImporter, RegistryImporter};
use inline::InlineFactory;
pub use place::providers;

use crate::driver::CacheImporter;
use crate::export::image::LayerExporter;
use crate::solve::CacheExporterFactory;
use crate::source::image::Images;

/// Importers and exporters of caches, by type.
#[derive(Debug)]
pub struct RemoteCaches {
    /// Importers.
    pub importers: BTreeMap<String, Arc<dyn CacheImporter>>,
    /// Exporters.
    pub exporters: BTreeMap<String, Arc<dyn CacheExporterFactory>>,
}

impl RemoteCaches {
    /// Makes all that there are. The fetcher of `layers` has to know the [`providers`].
    pub fn new(images: &Arc<Images>, layers: &LayerExporter) -> Self {
        let parts = ExportParts {
            images: Arc::clone(images),
            layers: layers.clone(),
            imports: Arc::default(),
        };
        let inline = InlineFactory::new(layers.store().clone(), Arc::clone(&parts.imports));
        let importers: [(&str, Arc<dyn CacheImporter>); 2] = [
            ("registry", Arc::new(RegistryImporter(parts.clone()))),
            ("local", Arc::new(LocalImporter(parts.clone()))),
        ];
        let exporters: [(&str, Arc<dyn CacheExporterFactory>); 3] = [
            ("inline", Arc::new(inline)),
            ("registry", Arc::new(RegistryFactory(parts.clone()))),
            ("local", Arc::new(LocalFactory(parts))),
        ];
        Self {
            importers: importers
                .map(|(name, importer)| (name.to_owned(), importer))
                .into(),
            exporters: exporters
                .map(|(name, exporter)| (name.to_owned(), exporter))
                .into(),
        }
    }
}

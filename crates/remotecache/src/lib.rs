//! Remote caches in BuildKit's format: `inline` in images, `registry` and `local` as manifests of their own, `s3`,
//! `azblob` and `gha` in object stores.
//!
//! An export turns the steps of a build into records ([`chains`], [`collect`]) whose results are layers; an import
//! answers the solver's questions from such records ([`records`]) and makes lazy refs of results, which find their blobs
//! where the cache is ([`place`], [`objects`]).
//!
//! Non-goals: which caches a build has, and when they are asked.
//!
//! Invariants: what is left out of an export is a warning on its vertex; a broken cache is one that has nothing; what is
//! read is bounded, and the work is linear in it; the same records are written as the same bytes; credentials are neither
//! stored nor shown.
//!
//! Start at [`RemoteCaches`].
#![forbid(unsafe_code)]

pub mod chains;
pub mod collect;
pub mod config;
pub mod export;
pub mod import;
pub mod inline;
pub mod objects;
mod omissions;
pub mod options;
pub mod place;
pub mod records;

use std::collections::BTreeMap;
use std::sync::Arc;

use ::export::image::LayerExporter;
use build::cache_export::CacheExporterFactory;
use build::cache_import::CacheImporter;
use source::image::Images;

use self::export::{ExportParts, LocalFactory, ObjectFactory, RegistryFactory};
use import::{LocalImporter, RegistryImporter};
use inline::InlineFactory;
pub use objects::Connections;
use objects::{ObjectImporter, ObjectKind, Variable};
pub use place::providers;

/// Importers and exporters of caches, by type.
#[derive(Debug)]
pub struct RemoteCaches {
    /// Importers.
    pub importers: BTreeMap<String, Arc<dyn CacheImporter>>,
    /// Exporters.
    pub exporters: BTreeMap<String, Arc<dyn CacheExporterFactory>>,
}

/// What object stores are reached with.
#[derive(Clone, Debug)]
pub struct ObjectAccess {
    /// Sends requests.
    pub client: reqwest::Client,
    /// Reads the daemon's environment, where some attributes have their defaults.
    pub variable: Variable,
    /// Those that [`providers`] knows.
    pub connections: Arc<Connections>,
}

impl RemoteCaches {
    /// Makes all that there are. The fetcher of `layers` has to know the [`providers`].
    pub fn new(images: &Arc<Images>, layers: &LayerExporter, access: &ObjectAccess) -> Self {
        let parts = ExportParts {
            images: Arc::clone(images),
            layers: layers.clone(),
            imports: Arc::default(),
        };
        let inline = InlineFactory::new(layers.store().clone(), Arc::clone(&parts.imports));
        let mut importers: BTreeMap<String, Arc<dyn CacheImporter>> = BTreeMap::new();
        let mut exporters: BTreeMap<String, Arc<dyn CacheExporterFactory>> = BTreeMap::new();
        importers.insert("registry".to_owned(), Arc::new(RegistryImporter(parts.clone())));
        importers.insert("local".to_owned(), Arc::new(LocalImporter(parts.clone())));
        exporters.insert("inline".to_owned(), Arc::new(inline));
        exporters.insert("registry".to_owned(), Arc::new(RegistryFactory(parts.clone())));
        exporters.insert("local".to_owned(), Arc::new(LocalFactory(parts.clone())));
        for kind in [ObjectKind::S3, ObjectKind::AzureBlob, ObjectKind::GitHub] {
            let importer = ObjectImporter {
                kind,
                parts: parts.clone(),
                connections: Arc::clone(&access.connections),
                variable: access.variable,
                client: access.client.clone(),
            };
            let factory = ObjectFactory {
                kind,
                parts: parts.clone(),
                variable: access.variable,
                client: access.client.clone(),
            };
            importers.insert(kind.name().to_owned(), Arc::new(importer));
            exporters.insert(kind.name().to_owned(), Arc::new(factory));
        }
        Self { importers, exporters }
    }
}

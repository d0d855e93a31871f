//! Caches that a build imports: they are read like the local records, once they have arrived.

use std::sync::Arc;

use build::cache_import::ImportedCache;
use tokio::sync::watch;

/// An import on its way: `None` is pending, `Some(None)` failed, which is no more than finding nothing.
pub(crate) type ImportSlot = watch::Receiver<Option<Option<Arc<dyn ImportedCache>>>>;

/// Waits for an import.
pub(crate) async fn arrived(slot: &mut ImportSlot) -> Option<Arc<dyn ImportedCache>> {
    match slot.wait_for(Option::is_some).await {
        Ok(cache) => cache.clone().flatten(),
        // The import was given up.
        Err(_) => None,
    }
}

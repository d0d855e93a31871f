//! Which results a lost blob takes with it.

use std::collections::BTreeSet;

use cache::ImmutableRef;
use oci::Digest;

/// Whether a ref has a layer with one of these blobs, which are nowhere any more.
pub(super) fn lacks(reference: &ImmutableRef, gone: &BTreeSet<Digest>) -> bool {
    let chain = reference.layer_chain();
    let mut blobs = chain.iter().flat_map(ImmutableRef::blobs);
    blobs.any(|blob| gone.contains(&blob.digest))
}

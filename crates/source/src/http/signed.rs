//! Signatures of fetched files: detached ones of OpenPGP that the client gives along with the keys that it trusts.

use std::io::Read as _;
use std::time::SystemTime;

use build::error::{BuildError, ErrorKind};
use cache::ImmutableRef;

use super::store;
use crate::signature::{self, Terms};

/// Longest file that is checked: all of it is in memory meanwhile.
const MAX_SIGNED_BYTES: u64 = 512 << 20;

/// By what a file must be signed. Not a part of keys: who has the file may use it, whoever vouched for it.
#[derive(Clone, Debug, Default)]
pub(super) struct Demand {
    /// OpenPGP keys in armor, one or several.
    pub public_key: String,
    /// The signature in armor.
    pub signature: String,
}

impl Demand {
    /// # Errors
    /// When only one of key and signature is given.
    pub fn validate(&self) -> Result<(), BuildError> {
        if self.public_key.is_empty() == self.signature.is_empty() {
            return Ok(());
        }
        Err(BuildError::user(
            "http signature verification requires both pubkey and signature",
        ))
    }

    /// Checks the only file of a ref. Blocking. Keys that have expired since they signed are good.
    ///
    /// # Errors
    /// [`ErrorKind::Denied`] for a file that is not signed as demanded.
    pub fn check(&self, reference: &ImmutableRef) -> Result<(), BuildError> {
        let internal = |error| BuildError::from_source(ErrorKind::Internal, error);
        let file = store::open(reference)?;
        let size = file.metadata().map_err(internal)?.len();
        if size > MAX_SIGNED_BYTES {
            return Err(BuildError::user(format!(
                "failed to verify pgp signature: the file has {size} bytes, signatures of at most {MAX_SIGNED_BYTES} are checked"
            )));
        }
        let mut signed = Vec::new();
        file.take(MAX_SIGNED_BYTES)
            .read_to_end(&mut signed)
            .map_err(internal)?;
        let terms = Terms {
            now: SystemTime::now(),
            reject_expired: false,
        };
        signature::verify_openpgp(&signed, &self.signature, &self.public_key, terms).map_err(|error| {
            BuildError::from_source(ErrorKind::Denied, error).context("failed to verify pgp signature")
        })
    }
}

//! Why a step ran: what identified it when something like it ran before, and what of that differs now.
//!
//! Everything here is a function of what it is given: [`describe`] makes of a vertex a flat list of named inputs, without
//! secrets ([`redact`]); [`listing`] holds the files that a step read; [`compare`] finds the nearest of earlier
//! descriptions and says what differs. The driver reads and writes them.

pub(crate) mod compare;
pub(crate) mod describe;
pub(crate) mod listing;
pub(crate) mod redact;
#[cfg(test)]
mod tests;

/// Differences that one explanation tells; the others are counted.
pub(crate) const MAX_CHANGES: usize = 20;

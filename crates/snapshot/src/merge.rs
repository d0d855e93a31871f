//! Merging differences.

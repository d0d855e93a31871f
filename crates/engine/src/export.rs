//! Exporters: what turns a build's results into something outside of the store.

pub mod files;
pub mod image;
pub mod local;
pub mod oci;
pub mod platforms;
pub mod push;
pub mod tar;

//! Exporters: what turns a build's results into something outside of the store.

pub mod files;
pub mod local;
pub mod platforms;
pub mod tar;

//! Exporters: what turns a build's results into something outside of the store.
//!
//! Purpose: images in the store and in registries ([`image`], [`push`]), archives of them ([`oci`]), files at the client
//! ([`local`], [`tar`]). [`image::LayerExporter`] makes the layers of refs for all of them and for remote caches.
//!
//! Non-goals: which exporters a build has, and in which order they run.
//!
//! Invariants: the same result and attributes make the same bytes; a blob that was made is held until whoever asked has
//! it; a layer is packed once, however many exporters want it; what did not complete is told as a failure.
//!
//! Start at [`image::ImageExporter`].
#![forbid(unsafe_code)]

pub mod files;
pub mod image;
pub mod local;
pub mod oci;
pub mod platforms;
pub mod push;
pub mod tar;

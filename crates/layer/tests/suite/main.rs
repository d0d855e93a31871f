//! Tests of the layer crate against real directories.

mod compressing;
mod copying;
mod hostile;
mod layers;
mod model;
mod rooted;
mod support;

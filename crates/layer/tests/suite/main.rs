//! Tests of the layer crate against real directories.
#![expect(
    clippy::unwrap_used,
    clippy::print_stderr,
    reason = "a failing test says where, a skipped one why"
)]

mod compressing;
mod copying;
mod estargz;
mod hostile;
mod layers;
mod model;
mod rooted;
mod sharing;
mod support;

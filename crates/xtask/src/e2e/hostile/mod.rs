//! A corpus of attacks: definitions, archives, images and directories that want out, or want the daemon down.
//!
//! Each is a case of a table: what is sent, and what has to come of it. After every case the same process still builds and
//! nothing outside of its state directory has changed; in the end it has left no mount.

mod archives;
pub mod client;
mod contexts;
mod definitions;
mod images;
pub mod ops;
mod requests;
mod sizes;
mod swaps;
mod tarball;
mod yard;

use super::{Need, Scenario};

/// This directory's scenarios.
pub const SCENARIOS: &[Scenario] = &[
    Scenario {
        name: "hostile-definitions",
        needs: &[Need::Root],
        run: definitions::run,
    },
    Scenario {
        name: "hostile-solves",
        needs: &[Need::Root],
        run: requests::run,
    },
    Scenario {
        name: "hostile-archives",
        needs: &[Need::Root],
        run: archives::run,
    },
    Scenario {
        name: "hostile-images",
        needs: &[Need::Root],
        run: images::run,
    },
    Scenario {
        name: "hostile-contexts",
        needs: &[Need::Root],
        run: contexts::run,
    },
    Scenario {
        name: "hostile-sizes",
        needs: &[Need::Root],
        run: sizes::run,
    },
    Scenario {
        name: "hostile-swaps",
        needs: &[Need::Root],
        run: swaps::run,
    },
];

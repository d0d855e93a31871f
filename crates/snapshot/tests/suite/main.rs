//! The snapshotter contract on every backend, and what is particular to one.
#![expect(
    clippy::unwrap_used,
    clippy::print_stderr,
    reason = "a failing test says where, a skipped one why"
)]

mod contract;
mod layers;
mod merging;
mod mounting;
mod support;

/// Runs every test of the contract on one backend.
macro_rules! snapshotter_suite {
    ($backend:ident, $open:path) => {
        mod $backend {
            snapshotter_suite!(@tests $open, contract,
                life_of_a_snapshot keys_and_kinds_are_checked parents_are_held views_are_read_only
                parallel_steps_on_one_parent survives_reopening sweeps_what_nobody_keeps a_crash_leaves_nothing_behind
                usage_counts_own_files_once files_removed_by_hand_are_missed the_tree_looks_the_same_through_many_parents);
            snapshotter_suite!(@tests $open, layers, layers_go_in_and_out a_layer_deletes_what_is_below
                differences_of_strangers_are_worked_out a_diff_is_what_was_applied);
            snapshotter_suite!(@tests $open, merging, merging_looks_like_unpacking_layers merging_keeps_whole_chains
                deletions_merge a_merge_of_nothing_is_empty);
        }
    };
    (@tests $open:path, $module:ident, $($test:ident)*) => {
        $(
            #[test]
            fn $test() {
                crate::support::with_backend($open, crate::$module::$test);
            }
        )*
    };
}

snapshotter_suite!(overlay, crate::support::overlay);
snapshotter_suite!(native, crate::support::native);

//! Builds that overlap, partial matches, and whatever else depends on who is when how far.

use crate::script::{lines, play};

fn expect(script: &str, trace: &str) {
    let played = play(script);
    assert!(played == lines(trace), "the trace is now:\n{played}");
}

#[test]
fn what_another_build_saved_meanwhile_is_found_before_execution() {
    expect(
        "
        graph one
            base = source 1
            run = op base
        graph two
            base = source 1
            slow = local 1
            run = op base salt 1
            both = op run slow*
        graph three
            base = source 1
            slow = local 1
            run = op base
            both = op run slow* salt 2
        build 1 two
        until exec slow
        build 2 three
        until exec slow
        run",
        "
            > build 1 two
            map both
            map run
            map slow
            map base
            exec slow
            exec base
            exec run
            > build 2 three
            map both
            map run
            load run
            checksum both input 1
            checksum both input 1
            exec both
            build 1 is done
            load both
            build 2 is done
        ",
    );
}

#[test]
fn a_step_that_asked_in_vain_asks_again_when_somebody_saves_the_answer() {
    expect(
        "
        graph one
            ctx = source 2
            fast = local 8
            copy = op ctx* fast*
        graph two
            cxt = source 3
            flow = local 9
            copy = op cxt* flow* salt 1
        build 1 one
        until exec ctx and exec fast
        build 2 two
        until exec ctx and exec flow
        until exec flow
        run",
        "
            > build 1 one
            map copy
            map ctx
            map fast
            exec fast
            exec ctx
            > build 2 two
            map copy
            map cxt
            map flow
            checksum copy input 1
            exec flow
            exec cxt
            checksum copy input 0
            checksum copy input 0
            exec copy
            build 1 is done
            checksum copy input 1
            load copy
            build 2 is done
        ",
    );
}

#[test]
fn records_found_through_different_inputs_are_no_match() {
    expect(
        "
        graph one
            a = source 1
            b = source 1
            run = op a b
        graph two
            a = source 3
            b = source 1
            run = op a b
        graph three
            a = source 1
            b = source 3
            run = op a b
        graph four
            a = source 3
            b = source 3
            run = op a b
        build 1 one
        run
        build 2 two
        run
        build 3 three
        run
        build 4 four
        run",
        "
            > build 1 one
            map run
            map a
            map b
            exec a
            exec b
            exec run
            build 1 is done
            > build 2 two
            map run
            map a
            exec a
            exec run
            build 2 is done
            > build 3 three
            map run
            map b
            exec b
            exec run
            build 3 is done
            > build 4 four
            map run
            exec run
            build 4 is done
        ",
    );
}

#[test]
fn of_several_matches_the_local_one_is_loaded_and_the_next_one_if_it_is_gone() {
    expect(
        "
        graph one
            base = source 1
            run = op base
        graph imports
            base = source 1 from 1 from 2
            run = op base from 1 from 2
        build 1 one
        run
        close 1
        import 1
        build 2 one
        run
        close 2
        import 2
        build 3 one
        run
        close 3
        lose run
        build 4 imports
        run",
        "
            > build 1 one
            map run
            map base
            exec base
            exec run
            build 1 is done
            > close 1
            > import 1
            > build 2 one
            map run
            map base
            exec base
            exec run
            build 2 is done
            > close 2
            > import 2
            > build 3 one
            map run
            map base
            exec base
            exec run
            build 3 is done
            > close 3
            > lose run
            > build 4 imports
            map run
            map base
            load run
            load run
            load run
            load base
            exec run
            build 4 is done
        ",
    );
}

#[test]
fn one_of_two_builds_leaves_while_its_step_runs() {
    expect(
        "
        graph one
            base = source 1
            run = op base
        graph two
            base = source 1
            run = op base
            last = op run
        build 1 one
        build 2 two
        until exec run
        cancel 1
        run",
        "
            > build 1 one
            map run
            map base
            > build 2 two
            map last
            exec base
            exec run
            > cancel 1
            exec last
            build 2 is done
        ",
    );
}

#[test]
fn a_failure_reaches_all_that_wait_and_nobody_else() {
    expect(
        "
        graph one
            base = source 1
            run = op base
        graph two
            base = source 1
            run = op base
            last = op run
        graph three
            base = source 1
            other = op base
        build 1 one
        build 2 two
        build 3 three
        until exec run
        fail exec run
        run",
        "
            > build 1 one
            map run
            map base
            > build 2 two
            map last
            > build 3 three
            map other
            exec base
            exec run
            exec other
            build 3 is done
            > fail exec run
            build 1 failed: broken
            build 2 failed: broken
        ",
    );
}

#[test]
fn a_step_that_fails_lets_its_twin_try() {
    expect(
        "
        graph one
            base = source 1
            run = op base
        graph two
            base = source 1
            run = op base salt 1
        build 1 one
        build 2 two
        until exec run
        fail exec run
        run",
        "
            > build 1 one
            map run
            map base
            > build 2 two
            map run
            exec base
            exec run
            > fail exec run
            build 1 failed: broken
            exec run
            build 2 is done
        ",
    );
}

#[test]
fn a_twin_that_is_cancelled_lets_the_other_run() {
    expect(
        "
        graph one
            base = source 1
            run = op base
        graph two
            base = source 1
            run = op base salt 1
        build 1 one
        build 2 two
        until exec run
        cancel 1
        end exec run
        run",
        "
            > build 1 one
            map run
            map base
            > build 2 two
            map run
            exec base
            exec run
            > cancel 1
            cancel exec run
            > end exec run
            exec run
            build 2 is done
        ",
    );
}

#[test]
fn who_ignores_the_cache_shares_with_those_who_come_later() {
    expect(
        "
        graph lax
            base = source 1
            run = op base
        graph strict
            base = source 1
            run = op base !
        build 1 lax
        run
        close 1
        build 2 strict
        until exec run
        build 3 lax
        run",
        "
            > build 1 lax
            map run
            map base
            exec base
            exec run
            build 1 is done
            > close 1
            > build 2 strict
            map run
            map base
            load base
            exec run
            > build 3 lax
            build 2 is done
            build 3 is done
        ",
    );
}

#[test]
fn twins_that_build_for_each_other_do_not_wait_for_each_other() {
    expect(
        "
        graph one
            base = source 1
            left = op base
        graph two
            base = source 1
            right = op base
        graph oner
            base = source 1
            left = op base salt 1
        graph twor
            base = source 1
            right = op base salt 1
        build 1 one
        build 2 two
        answer map left
        answer map right
        answer map base
        answer query base
        answer exec base
        answer query left
        answer query right
        within exec left build 3 twor
        answer map right
        answer query right
        within exec right build 4 oner
        answer map left
        answer query left
        run",
        "
            > build 1 one
            map left
            map base
            > build 2 two
            map right
            exec base
            exec left
            exec right
            > within exec left build 3 twor
            map right
            > within exec right build 4 oner
            map left
            exec left
            build 1 is done
            build 2 is done
            build 4 is done
            load right
            build 3 is done
        ",
    );
}

#[test]
fn several_outputs_are_remembered_each_by_itself() {
    expect(
        "
        graph one
            base = source 1
            run = op base
            last = op run.1
        graph both
            base = source 1
            run = op base
            last = op run.1
            more = op run.0 last
        build 1 one
        run
        close 1
        build 2 both
        run",
        "
            > build 1 one
            map last
            map run
            map base
            exec base
            exec run
            exec last
            build 1 is done
            > close 1
            > build 2 both
            map more
            map run
            map last
            map base
            load base
            exec run
            load last
            exec more
            build 2 is done
        ",
    );
}

#[test]
fn a_lost_input_is_made_again_for_all_who_use_it() {
    expect(
        "
        graph one
            base = source 1
            run = op base
        graph two
            base = source 1
            run = op base
            left = op run
            right = op run
            both = op left right
        build 1 one
        run
        close 1
        build 2 two
        until exec left
        gone exec left 0
        run",
        "
            > build 1 one
            map run
            map base
            exec base
            exec run
            build 1 is done
            > close 1
            > build 2 two
            map both
            map left
            map right
            map run
            map base
            load run
            exec left
            exec right
            > gone exec left 0
            forget
            load base
            exec run
            exec left
            exec both
            build 2 is done
        ",
    );
}

#[test]
fn what_is_gone_after_a_build_is_made_again_as_far_as_it_is_needed() {
    expect(
        "
        graph one
            base = source 1
            run = op base
            last = op run
        build 1 one
        run
        close 1
        build 2 one
        run
        renew 3 2 last
        run
        renew 4 2 base run
        run
        renew 5 2 last run
        run",
        "
            > build 1 one
            map last
            map run
            map base
            exec base
            exec run
            exec last
            build 1 is done
            > close 1
            > build 2 one
            map last
            map run
            map base
            load last
            build 2 is done
            > renew 3 2 last
            forget
            load run
            exec last
            build 3 is done
            > renew 4 2 base run
            forget
            build 4 is done
            > renew 5 2 last run
            load base
            exec run
            exec last
            build 5 is done
        ",
    );
}

#[test]
fn nothing_is_made_again_for_a_job_that_is_over() {
    expect(
        "
        graph one
            base = source 1
            run = op base
        build 1 one
        run
        close 1
        renew 2 1 run
        run",
        "
            > build 1 one
            map run
            map base
            exec base
            exec run
            build 1 is done
            > close 1
            > renew 2 1 run
            build 2 failed: Canceled
        ",
    );
}

#[test]
fn an_import_is_asked_only_by_those_who_name_it() {
    expect(
        "
        graph one
            base = source 1
            run = op base
        graph imports
            base = source 1 from 1
            run = op base from 1
            last = op run
        build 1 one
        run
        close 1
        import 1
        build 2 one
        run
        close 2
        import 2
        build 3 imports
        run",
        "
            > build 1 one
            map run
            map base
            exec base
            exec run
            build 1 is done
            > close 1
            > import 1
            > build 2 one
            map run
            map base
            exec base
            exec run
            build 2 is done
            > close 2
            > import 2
            > build 3 imports
            map last
            map run
            map base
            load run
            exec last
            build 3 is done
        ",
    );
}

#[test]
fn what_is_imported_is_remembered_while_a_further_digest_is_asked_for() {
    let played = play(
        "
        graph one
            base = source 2 rounds
            run = op base
        graph two
            base = source 2 rounds from 1
            run = op base from 1
            other = op base.1 from 1
            both = op run other
        graph three
            base = source 2 rounds
            run = op base
        build 1 one
        run
        close 1
        import 1
        build 2 two
        until map base again 1 and load run
        answer load run
        run
        close 2
        build 3 three
        run",
    );
    let (_, third) = played.split_once("> build 3 three").unwrap();
    assert!(third.contains("load run") && !third.contains("exec"), "{played}");
}

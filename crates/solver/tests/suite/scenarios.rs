//! Small graphs, and the effects that they lead to, in order. See [`crate::script`] for how they are written.

use std::collections::BTreeMap;

use solver::{BuildId, Effect, Failure, Input, Owner};

use crate::bench::{Bench, Graph, effect_id, part};
use crate::script::{graph, last, lines};

/// Builds in a job of its own and returns the trace.
fn build(bench: &mut Bench, number: u64, graph: &Graph) -> String {
    bench.build(number, number, graph, last(graph));
    bench.run();
    let (outcome, value) = &bench.finished[&BuildId(number)];
    if outcome.is_ok() {
        assert_eq!(*value, Some(graph.value(last(graph).0, 0)));
    }
    bench.close(number);
    assert!(bench.results.is_empty() && bench.solver.active_vertices() == 0);
    bench.take_trace()
}

const DOCKERFILE: &str = "
    base = source 1
    ctx = local 2
    copy = op base ctx*
    run = op copy
";

#[test]
fn a_cold_build_executes_everything_once() {
    let mut bench = Bench::default();
    let trace = build(&mut bench, 1, &graph(DOCKERFILE));
    let expected = "
        map run
        map copy
        map base
        map ctx
        exec ctx
        exec base
        checksum copy input 1
        exec copy
        exec run
        build 1 is done";
    assert_eq!(trace, lines(expected));
}

#[test]
fn a_second_build_transfers_the_context_and_loads_the_last_step() {
    let mut bench = Bench::default();
    build(&mut bench, 1, &graph(DOCKERFILE));
    let trace = build(&mut bench, 2, &graph(DOCKERFILE));
    let expected = "
        map run
        map copy
        map base
        map ctx
        exec ctx
        checksum copy input 1
        load run
        build 2 is done";
    assert_eq!(trace, lines(expected));
}

#[test]
fn only_of_what_all_inputs_lead_to_results_are_asked_for() {
    let text = |version: u64| format!("base = source 1\nctx = local {version}\ncopy = op base ctx*");
    let mut bench = Bench::default();
    let contents = |version: &u64| part(graph(&text(*version)).value(1, 0));
    let versions: BTreeMap<u64, u64> = (0..20).map(|version| (contents(&version), version)).collect();
    assert_eq!(versions.len(), 3, "as many copies are made of the base");
    for (number, version) in (1..).zip(versions.values().chain([&versions[&0]])) {
        bench.told = 0;
        build(&mut bench, number, &graph(&text(*version)));
    }
    // One of the base, one of the copy.
    assert_eq!((bench.executed, bench.told), (1 + 4 + 3, 2));
}

#[test]
fn equal_content_of_another_source_is_found_and_remembered() {
    let text = |version: u64| format!("git = source {version}\ncopy = op git*\nrun = op copy");
    let mut bench = Bench::default();
    build(&mut bench, 1, &graph(&text(2)));
    let trace = build(&mut bench, 2, &graph(&text(3)));
    let expected = "
        map run
        map copy
        map git
        exec git
        checksum copy input 0
        load run
        build 2 is done";
    assert_eq!(trace, lines(expected));
    // The new commit was linked to the old copy: no checkout any more.
    let trace = build(&mut bench, 3, &graph(&text(3)));
    assert_eq!(
        trace,
        lines("map run\nmap copy\nmap git\nload run\nbuild 3 is done")
    );
}

#[test]
fn a_further_digest_is_asked_for_when_the_first_finds_nothing() {
    let text = |version: u64| format!("image = source {version} rounds\nrun = op image");
    let mut bench = Bench::default();
    build(&mut bench, 1, &graph(&text(2)));
    let trace = build(&mut bench, 2, &graph(&text(3)));
    assert_eq!(
        trace,
        lines("map run\nmap image\nmap image again 1\nload run\nbuild 2 is done")
    );
    let trace = build(&mut bench, 3, &graph(&text(2)));
    assert_eq!(trace, lines("map run\nmap image\nload run\nbuild 3 is done"));
}

#[test]
fn a_lost_result_is_a_miss() {
    let mut bench = Bench::default();
    let graph = graph("base = source 1\nrun = op base\nlast = op run");
    build(&mut bench, 1, &graph);
    let lost = bench.stored.keys().next_back().cloned().unwrap();
    bench.stored.remove(&lost);
    let trace = build(&mut bench, 2, &graph);
    assert_eq!(
        trace,
        lines("map last\nmap run\nmap base\nload last\nload run\nexec last\nbuild 2 is done")
    );
}

#[test]
fn a_loaded_input_that_is_gone_is_made_again() {
    let mut bench = Bench::default();
    build(
        &mut bench,
        1,
        &graph("base = source 1\nrun = op base\nlast = op run"),
    );
    let changed = graph("base = source 1\nrun = op base\nother = op run");
    bench.build(2, 2, &changed, last(&changed));
    while !matches!(&bench.waiting[0], Effect::Exec { .. }) {
        let effect = bench.waiting.remove(0);
        let answer = bench.answer(effect).unwrap();
        bench.tell(answer);
    }
    let effect = effect_id(&bench.waiting.remove(0)).unwrap();
    bench.tell(Input::Lost {
        effect,
        inputs: vec![0],
        error: "gone".to_owned(),
    });
    bench.run();
    let expected = "
        map other
        map run
        map base
        load run
        exec other
        forget
        load base
        exec run
        exec other
        build 2 is done";
    assert_eq!(bench.take_trace(), lines(expected));
    bench.close(2);
    assert!(bench.results.is_empty());
}

#[test]
fn a_pruned_step_in_the_middle_does_no_harm() {
    let mut bench = Bench::default();
    let graph = graph("base = source 1\nrun = op base\nlast = op run");
    build(&mut bench, 1, &graph);
    bench.local.remove_result("r1");
    bench.local.remove_result("r2");
    let trace = build(&mut bench, 2, &graph);
    assert_eq!(
        trace,
        lines("map last\nmap run\nmap base\nload last\nbuild 2 is done")
    );
}

#[test]
fn ignoring_the_cache_executes_and_lends_no_keys() {
    let mut bench = Bench::default();
    build(
        &mut bench,
        1,
        &graph("base = source 1\nrun = op base\nlast = op run"),
    );
    let strict = graph("base = source 1\nrun = op base !\nlast = op run");
    let trace = build(&mut bench, 2, &strict);
    assert_eq!(
        trace,
        lines("map last\nmap run\nmap base\nload base\nexec run\nexec last\nbuild 2 is done")
    );
    // But content that did not change is found.
    build(
        &mut bench,
        3,
        &graph("base = source 1\nrun = op base\ncopy = op run*"),
    );
    let strict = graph("base = source 1\nrun = op base !\ncopy = op run*");
    let trace = build(&mut bench, 4, &strict);
    let expected =
        "map copy\nmap run\nmap base\nload base\nexec run\nchecksum copy input 0\nload copy\nbuild 4 is done";
    assert_eq!(trace, lines(expected));
}

#[test]
fn two_jobs_share_one_execution_and_one_may_leave() {
    let mut bench = Bench::default();
    let graph = graph("base = source 1\nrun = op base");
    bench.build(1, 1, &graph, last(&graph));
    bench.build(2, 2, &graph, last(&graph));
    while !matches!(bench.waiting[0], Effect::Exec { .. }) {
        let effect = bench.waiting.remove(0);
        let answer = bench.answer(effect).unwrap();
        bench.tell(answer);
    }
    bench.close(1);
    bench.run();
    assert_eq!(
        bench.take_trace(),
        lines("map run\nmap base\nexec base\nbuild 1 failed: Canceled\nexec run\nbuild 2 is done")
    );
    bench.close(2);
    assert!(bench.results.is_empty());
}

#[test]
fn the_last_to_leave_cancels() {
    let mut bench = Bench::default();
    let graph = graph("base = source 1\nrun = op base");
    bench.build(1, 1, &graph, last(&graph));
    bench.build(2, 2, &graph, last(&graph));
    while !matches!(bench.waiting[0], Effect::Exec { .. }) {
        let effect = bench.waiting.remove(0);
        let answer = bench.answer(effect).unwrap();
        bench.tell(answer);
    }
    bench.tell(Input::CancelBuild { build: BuildId(1) });
    bench.take_trace();
    bench.tell(Input::CancelBuild { build: BuildId(2) });
    assert_eq!(bench.take_trace(), "cancel exec base");
    // It is wanted again before the cancellation is answered: the work is done anew.
    bench.build(3, 2, &graph, last(&graph));
    let Effect::Exec { effect, .. } = bench.waiting.remove(0) else {
        panic!()
    };
    bench.waiting.clear();
    bench.tell(Input::Canceled { effect });
    bench.run();
    assert_eq!(bench.take_trace(), lines("exec base\nexec run\nbuild 3 is done"));
}

fn fail_execs(bench: &mut Bench, name: &str) {
    while !bench.waiting.is_empty() {
        let effect = bench.waiting.remove(0);
        if let Effect::Exec { vertex, .. } = &effect
            && bench.name(*vertex) == name
        {
            let effect = effect_id(&effect).unwrap();
            bench.tell(Input::Failed {
                effect,
                error: "exit code: 1".to_owned(),
            });
        } else if let Some(answer) = bench.answer(effect) {
            bench.tell(answer);
        }
    }
}

#[test]
fn a_failure_is_told_again_to_its_job_and_tried_again_by_another() {
    let mut bench = Bench::default();
    let graph = graph("base = source 1\nrun = op base\nlast = op run");
    bench.build(1, 1, &graph, last(&graph));
    fail_execs(&mut bench, "run");
    bench.build(2, 1, &graph, last(&graph));
    bench.run();
    for build in [1, 2] {
        let (outcome, _) = &bench.finished[&BuildId(build)];
        assert!(
            matches!(outcome, Err(Failure::Op { error, .. }) if error == "exit code: 1"),
            "{outcome:?}"
        );
    }
    bench.take_trace();
    bench.build(3, 2, &graph, last(&graph));
    bench.run();
    assert_eq!(bench.take_trace(), lines("exec run\nexec last\nbuild 3 is done"));
}

#[test]
fn equal_steps_of_different_vertices_run_once() {
    let mut bench = Bench::default();
    let one = graph("ctx = local 2\ncopy = op ctx* salt 1\nrun = op copy");
    let two = graph("ctx = local 3\ncopy = op ctx* salt 2\nrun = op copy");
    bench.build(1, 1, &one, last(&one));
    bench.build(2, 2, &two, last(&two));
    bench.run();
    assert_eq!(bench.finished.len(), 2);
    let trace = bench.take_trace();
    assert_eq!(trace.matches("exec copy").count(), 1, "{trace}");
    assert_eq!(trace.matches("exec run").count(), 1, "{trace}");
}

#[test]
fn several_outputs_come_of_one_execution() {
    let mut bench = Bench::default();
    let both = graph("base = source 1\nrun = op base\nlast = op run.0 run.1");
    let trace = build(&mut bench, 1, &both);
    assert_eq!(trace.matches("exec run").count(), 1, "{trace}");
    let second = graph("base = source 1\nrun = op base\nother = op run.1");
    let trace = build(&mut bench, 2, &second);
    assert_eq!(
        trace,
        lines("map other\nmap run\nmap base\nload run output 1\nexec other\nbuild 2 is done")
    );
}

#[test]
fn an_output_that_does_not_exist_fails_the_build() {
    let mut bench = Bench::default();
    let graph = graph("base = source 1\nrun = op base.9");
    bench.build(1, 1, &graph, last(&graph));
    bench.run();
    let (outcome, _) = &bench.finished[&BuildId(1)];
    assert!(
        matches!(outcome, Err(Failure::NoOutput { output: 9, .. })),
        "{outcome:?}"
    );
}

#[test]
fn an_op_builds_within_the_lifetime_of_its_vertex() {
    let mut bench = Bench::default();
    let outer = graph("base = source 1\nbuild = op base");
    let inner = graph("other = source 5\nstep = op other");
    bench.build(1, 1, &outer, last(&outer));
    while !matches!(&bench.waiting[0], Effect::Exec { vertex, .. } if bench.name(*vertex) == "build") {
        let effect = bench.waiting.remove(0);
        let answer = bench.answer(effect).unwrap();
        bench.tell(answer);
    }
    let Effect::Exec { vertex, .. } = bench.waiting[0].clone() else {
        panic!()
    };
    let exec = bench.waiting.remove(0);
    let owner = Owner::Vertex(vertex);
    bench.build_for(2, owner, &inner, last(&inner));
    bench.run();
    assert!(bench.finished[&BuildId(2)].0.is_ok());
    // An op that builds itself would wait for itself.
    bench.tell(Input::Build {
        build: BuildId(3),
        owner,
        graph: outer.defs(),
        target: last(&outer),
    });
    assert_eq!(bench.finished[&BuildId(3)].0, Err(Failure::Recursive));
    bench.waiting.push(exec);
    bench.run();
    assert!(bench.finished[&BuildId(1)].0.is_ok());
    bench.close(1);
    assert!(bench.results.is_empty() && bench.solver.active_vertices() == 0);
}

#[test]
fn the_steps_behind_a_result_can_be_exported() {
    let mut bench = Bench::default();
    let graph = graph(DOCKERFILE);
    bench.build(1, 1, &graph, last(&graph));
    bench.run();
    let built = bench.finished[&BuildId(1)].0.clone().unwrap();
    let exported = bench.solver.export(&[built.edge]);
    // The context has no identity but its content.
    assert_eq!(exported.entries.len(), 3);
    assert_eq!(exported.roots, [Some(2)]);
    let copy = &exported.entries[1];
    assert_eq!(copy.vertex, graph.digests[2]);
    assert_eq!((copy.inputs[0].len(), copy.inputs[1].len()), (1, 1));
    assert!(copy.result.is_some() && exported.entries[2].result == Some(built.result));
    bench.close(1);

    // Loaded: what lies behind was not loaded, but its results are known.
    bench.build(2, 2, &graph, last(&graph));
    bench.run();
    let built = bench.finished[&BuildId(2)].0.clone().unwrap();
    let exported = bench.solver.export(&[built.edge]);
    assert_eq!(exported.entries.len(), 3);
    assert!(exported.entries[1].result.is_none() && exported.entries[1].stored.len() == 1);
    assert!(exported.entries[2].loaded.is_some());
}

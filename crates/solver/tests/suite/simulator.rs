//! Random graphs, random order of answers, losses, failures and cancels, against the naive evaluation.
//!
//! `SOLVER_SEEDS=100000 cargo test -p solver` runs more seeds, `SOLVER_SEED=n` one of them.

use solver::{BuildId, Effect, Failure, Input, StoreId};

use crate::bench::{Bench, Graph, Spec, effect_id};
use crate::random::Random;

struct Chances {
    fail: u64,
    lose: u64,
    ephemeral: u64,
    ignore: u64,
    cancel: u64,
}

const CALM: Chances = Chances {
    fail: 0,
    lose: 0,
    ephemeral: 0,
    ignore: 0,
    cancel: 0,
};

fn random_graph(random: &mut Random, chances: &Chances, names: &[&str]) -> Graph {
    let count = 1 + random.below(10);
    let mut specs: Vec<Spec> = Vec::new();
    for index in 0..count {
        let arity = if index == 0 { 0 } else { random.below(4) };
        let inputs: Vec<_> = (0..arity)
            .map(|_| (random.below(index), random.below(2), random.chance(35)))
            .collect();
        let source = inputs.is_empty();
        specs.push(Spec {
            name: format!(
                "{}{}",
                names[random.below(names.len())],
                if source { "s" } else { "" }
            ),
            inputs,
            version: random.next() % 4,
            salt: random.next() % 2,
            ephemeral: source && random.chance(chances.ephemeral),
            rounds: source && random.chance(30),
            ignore_cache: random.chance(chances.ignore),
            stores: Vec::new(),
        });
    }
    Graph::new(specs)
}

/// Answers one waiting effect, perhaps badly.
fn answer_one(bench: &mut Bench, random: &mut Random, chances: &Chances) {
    let index = random.below(bench.waiting.len());
    let effect = bench.waiting.remove(index);
    if let Effect::Cancel { effect } = effect {
        let position = bench
            .waiting
            .iter()
            .position(|waiting| effect_id(waiting) == Some(effect));
        if let Some(position) = position
            && random.chance(70)
        {
            bench.waiting.remove(position);
            let canceled = random.chance(60);
            bench.tell(if canceled {
                Input::Canceled { effect }
            } else {
                Input::Failed {
                    effect,
                    error: "interrupted".to_owned(),
                }
            });
        }
        return;
    }
    let id = effect_id(&effect).unwrap();
    if !matches!(effect, Effect::Query { .. }) && random.chance(chances.fail) {
        bench.tell(Input::Failed {
            effect: id,
            error: "broken".to_owned(),
        });
        return;
    }
    if matches!(effect, Effect::Load { .. }) && random.chance(chances.lose) {
        bench.tell(Input::Loaded {
            effect: id,
            result: None,
        });
        return;
    }
    if let Some(inputs) = lost_inputs(bench, random, chances, &effect) {
        bench.tell(Input::Lost {
            effect: id,
            inputs,
            error: "lost".to_owned(),
        });
        return;
    }
    let answer = bench.answer(effect).unwrap();
    bench.tell(answer);
}

/// Which of an effect's loaded inputs turn out to be gone, if any.
fn lost_inputs(
    bench: &Bench,
    random: &mut Random,
    chances: &Chances,
    effect: &Effect<String>,
) -> Option<Vec<usize>> {
    let given: Vec<_> = match effect {
        Effect::Exec { inputs, .. } => inputs.iter().copied().enumerate().collect(),
        Effect::Checksum { input, result, .. } => vec![(*input, *result)],
        _ => return None,
    };
    let loaded = given
        .into_iter()
        .filter(|(_, result)| bench.loaded.contains(result));
    let lost: Vec<usize> = loaded
        .map(|(number, _)| number)
        .filter(|_| random.chance(chances.lose))
        .collect();
    (!lost.is_empty()).then_some(lost)
}

fn settle(bench: &mut Bench, random: &mut Random, chances: &Chances) {
    let mut steps = 0;
    while !bench.waiting.is_empty() {
        answer_one(bench, random, chances);
        steps += 1;
        assert!(steps < 50_000, "the solver comes to an end");
    }
}

fn lose_some(bench: &mut Bench, random: &mut Random, percent: u64) {
    let results: Vec<String> = bench.stored.keys().cloned().collect();
    for result in results {
        if random.chance(percent) {
            bench.stored.remove(&result);
            if random.chance(50) {
                bench.local.remove_result(&result);
            }
        }
    }
}

type Wanted = (u64, u64, Graph, (usize, usize));

fn check_outcomes(seed: u64, bench: &Bench, wanted: &[Wanted], canceled: &[u64], may_fail: bool) {
    for (build, _, graph, (target, output)) in wanted {
        match bench.finished.get(&BuildId(*build)) {
            None => assert!(canceled.contains(build), "seed {seed}: build {build} is finished"),
            Some((Ok(_), value)) => {
                assert_eq!(
                    *value,
                    Some(graph.value(*target, *output)),
                    "seed {seed}: build {build} is right"
                );
            }
            Some((Err(Failure::Op { .. }), _)) => assert!(may_fail, "seed {seed}: {build} failed"),
            Some((Err(Failure::Canceled), _)) if canceled.contains(build) => {}
            Some((Err(failure), _)) => panic!("seed {seed}: build {build} failed with {failure:?}"),
        }
    }
}

fn simulate(seed: u64) {
    let mut random = Random::new(seed);
    let random = &mut random;
    let chances = Chances {
        fail: if random.chance(30) { 3 } else { 0 },
        lose: if random.chance(40) { 10 } else { 0 },
        ephemeral: if random.chance(50) { 30 } else { 0 },
        ignore: if random.chance(30) { 15 } else { 0 },
        cancel: if random.chance(50) { 4 } else { 0 },
    };
    let mut bench = Bench::default();
    let mut wanted: Vec<Wanted> = Vec::new();
    let mut canceled: Vec<u64> = Vec::new();
    let builds = 1 + random.next() % 6;
    let mut started = 0;
    while started < builds || !bench.waiting.is_empty() {
        if started < builds && (bench.waiting.is_empty() || random.chance(10)) {
            let graph = match wanted.last() {
                Some((_, _, graph, _)) if random.chance(40) => graph.clone(),
                _ => random_graph(random, &chances, &["a", "b", "c", "dd"]),
            };
            let target = (graph.specs.len() - 1, random.below(2));
            let job = random.next() % 3;
            bench.build(started, job, &graph, target);
            wanted.push((started, job, graph, target));
            started += 1;
            continue;
        }
        if random.chance(chances.cancel) && !wanted.is_empty() {
            let index = random.below(wanted.len());
            let (build, job) = (wanted[index].0, wanted[index].1);
            if random.chance(50) {
                canceled.push(build);
                bench.tell(Input::CancelBuild {
                    build: BuildId(build),
                });
            } else {
                canceled.extend(
                    wanted
                        .iter()
                        .filter(|wanted| wanted.1 == job)
                        .map(|wanted| wanted.0),
                );
                bench.close(job);
            }
            continue;
        }
        if random.chance(chances.lose / 5) {
            lose_some(&mut bench, random, 20);
        }
        answer_one(&mut bench, random, &chances);
    }
    check_outcomes(seed, &bench, &wanted, &canceled, chances.fail > 0);
    for job in 0..3 {
        bench.close(job);
    }
    settle(&mut bench, random, &CALM);
    assert_eq!(
        bench.solver.active_vertices(),
        0,
        "seed {seed}: vertices are given up"
    );
    assert_eq!(
        bench.solver.outstanding_effects(),
        0,
        "seed {seed}: effects are answered"
    );
    assert!(bench.results.is_empty(), "seed {seed}: results are released");
}

/// What was built once is only loaded afterwards: with the same store, and from an imported one.
fn rebuild(seed: u64) {
    let mut random = Random::new(seed);
    let random = &mut random;
    let mut graph = random_graph(random, &CALM, &["a", "b", "c", "dd"]);
    let target = (graph.specs.len() - 1, 0);
    let mut first = Bench::default();
    first.build(0, 0, &graph, target);
    settle(&mut first, random, &CALM);
    let mut second = Bench {
        local: first.local.clone(),
        stored: first.stored.clone(),
        ..Bench::default()
    };
    second.build(0, 0, &graph, target);
    settle(&mut second, random, &CALM);
    assert_eq!(
        (second.executed, second.loads),
        (0, 1),
        "seed {seed}: {:?}",
        second.trace
    );

    let store = StoreId(1);
    for spec in &mut graph.specs {
        spec.stores.push(store);
    }
    let mut third = Bench {
        stored: first.stored.clone(),
        ..Bench::default()
    };
    third.imported.insert(store, first.local.clone());
    third.build(0, 0, &graph, target);
    settle(&mut third, random, &CALM);
    assert_eq!(
        (third.executed, third.loads),
        (0, 1),
        "seed {seed}: {:?}",
        third.trace
    );

    // What was imported is known locally, also by those who do not import.
    for spec in &mut graph.specs {
        spec.stores.clear();
    }
    let mut fourth = Bench {
        local: third.local.clone(),
        stored: third.stored.clone(),
        ..Bench::default()
    };
    fourth.build(0, 0, &graph, target);
    settle(&mut fourth, random, &CALM);
    assert_eq!(
        (fourth.executed, fourth.loads),
        (0, 1),
        "seed {seed}: {:?}",
        fourth.trace
    );
}

fn seeds() -> std::ops::Range<u64> {
    let number = |name: &str| {
        std::env::var(name)
            .ok()
            .and_then(|value| value.parse::<u64>().ok())
    };
    match number("SOLVER_SEED") {
        Some(seed) => seed..seed + 1,
        None => 0..number("SOLVER_SEEDS").unwrap_or(3_000),
    }
}

#[test]
fn random_builds_match_the_naive_evaluation() {
    for seed in seeds() {
        simulate(seed);
    }
}

#[test]
fn what_was_built_is_loaded() {
    for seed in seeds() {
        rebuild(seed);
    }
}

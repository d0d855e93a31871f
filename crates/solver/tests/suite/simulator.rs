//! Random graphs, random order of answers, losses, failures and cancels, against the naive evaluation.
//!
//! A default run takes as many seeds as fit into some seconds. `SOLVER_SEEDS=100000 cargo test -p solver simulator` runs
//! that many, `SOLVER_SEED=n` one of them: the same seed is the same run everywhere.

use std::collections::BTreeMap;
use std::ops::Range;
use std::time::{Duration, Instant};

use solver::{BuildId, Effect, EffectId, Failure, Input, JobId, Owner, StoreId};

use crate::bench::{Bench, Graph, Spec, effect_id};
use crate::random::Random;

/// Jobs that a run has.
const JOBS: u64 = 6;
/// Vertices of the largest graph.
const VERTICES: usize = 40;
/// Names of ops: so few that many vertices are the same step.
const NAMES: [&str; 4] = ["a", "b", "c", "dd"];

/// What goes wrong how often, in percent.
#[derive(Debug)]
struct Chances {
    fail: u64,
    lose: u64,
    ephemeral: u64,
    ignore: u64,
    cancel: u64,
    /// An op yields one output less.
    missing: u64,
    /// A vertex asks an imported cache.
    import: u64,
    /// An op builds another graph while it is executed.
    nest: u64,
}

const CALM: Chances = Chances {
    fail: 0,
    lose: 0,
    ephemeral: 0,
    ignore: 0,
    cancel: 0,
    missing: 0,
    import: 0,
    nest: 0,
};

impl Chances {
    fn random(random: &mut Random) -> Self {
        let mut some = |percent, chance| if random.chance(percent) { chance } else { 0 };
        Self {
            fail: some(30, 3),
            lose: some(40, 10),
            ephemeral: some(50, 30),
            ignore: some(30, 15),
            cancel: some(40, 4),
            missing: some(10, 5),
            import: some(40, 30),
            nest: some(25, 15),
        }
    }

    /// Whether every step that is the same has to be executed once only.
    fn is_calm(&self) -> bool {
        self.fail + self.lose + self.ignore + self.cancel + self.missing + self.nest == 0
    }

    fn may_fail(&self) -> bool {
        self.fail + self.missing > 0
    }
}

fn random_graph(random: &mut Random, chances: &Chances, size: usize) -> Graph {
    let count = 1 + random.below(size);
    let mut specs: Vec<Spec> = Vec::new();
    for index in 0..count {
        let arity = if index == 0 { 0 } else { random.below(4) };
        // Half of the inputs are near, so that chains come about.
        let near = index.min(3);
        let mut input = || match random.chance(50) {
            true => index - 1 - random.below(near),
            false => random.below(index),
        };
        let inputs: Vec<usize> = (0..arity).map(|_| input()).collect();
        let inputs: Vec<_> = inputs
            .into_iter()
            .map(|input| (input, random.below(2), random.chance(35)))
            .collect();
        let source = inputs.is_empty();
        let name = NAMES[random.below(NAMES.len())];
        specs.push(Spec {
            name: format!("{name}{}", if source { "s" } else { "" }),
            inputs,
            version: random.next() % 4,
            salt: random.next() % 2,
            ephemeral: source && random.chance(chances.ephemeral),
            rounds: source && random.chance(30),
            ignore_cache: random.chance(chances.ignore),
            stores: stores(random, chances),
            missing: random.chance(chances.missing).then(|| random.below(2)),
        });
    }
    Graph::new(specs)
}

fn stores(random: &mut Random, chances: &Chances) -> Vec<StoreId> {
    [1, 2]
        .into_iter()
        .filter(|_| random.chance(chances.import))
        .map(StoreId)
        .collect()
}

/// One run.
struct Simulation<'a> {
    seed: u64,
    random: &'a mut Random,
    chances: Chances,
    bench: Bench,
    /// Builds with their jobs, graphs and targets; nested ones have no job.
    wanted: Vec<Wanted>,
    canceled: Vec<u64>,
    /// Builds that executions wait for.
    nested: BTreeMap<EffectId, u64>,
    next_build: u64,
}

struct Wanted {
    build: u64,
    job: Option<u64>,
    graph: Graph,
    target: (usize, usize),
}

impl<'a> Simulation<'a> {
    fn new(seed: u64, random: &'a mut Random) -> Self {
        let chances = Chances::random(random);
        Self {
            seed,
            random,
            chances,
            bench: Bench::default(),
            wanted: Vec::new(),
            canceled: Vec::new(),
            nested: BTreeMap::new(),
            next_build: 0,
        }
    }

    fn run(&mut self) {
        let builds = 1 + self.random.next() % 8;
        let size = 1 + self.random.below(VERTICES);
        let mut started = 0;
        let mut steps = 0;
        while started < builds || !self.bench.waiting.is_empty() {
            steps += 1;
            assert!(steps < 100_000, "seed {}: the run comes to an end", self.seed);
            if started < builds && (self.bench.waiting.is_empty() || self.random.chance(5)) {
                self.start_build(size);
                started += 1;
            } else if self.random.chance(self.chances.cancel) && !self.wanted.is_empty() {
                self.cancel_some();
            } else if self.random.chance(self.chances.lose / 5) && !self.wanted.is_empty() {
                self.renew_some();
            } else if !self.bench.waiting.is_empty() {
                if self.random.chance(self.chances.lose / 5) {
                    lose_some(&mut self.bench, self.random, 20);
                }
                self.answer_one();
            }
        }
        self.check_outcomes();
        if self.chances.is_calm() {
            for (step, runs) in &self.bench.runs {
                assert_eq!(*runs, 1, "seed {}: {step:x?} is executed once", self.seed);
            }
        }
        self.end();
    }

    fn start_build(&mut self, size: usize) {
        if self.random.chance(self.chances.import) {
            let (mut records, store) = (self.bench.local.clone(), 1 + self.random.below(2));
            for result in self.bench.stored.keys() {
                if self.random.chance(30) {
                    records.remove_result(result);
                }
            }
            let store = StoreId(u32::try_from(store).unwrap());
            self.bench.imported.insert(store, records);
        }
        if !self.chances.is_calm() && self.random.chance(self.chances.import / 3) {
            // Another machine: only the imported caches know anything.
            self.bench.local = solver::MemoryRecords::default();
        }
        let graph = match self.wanted.last() {
            Some(wanted) if self.random.chance(40) => {
                let mut graph = wanted.graph.clone();
                for spec in &mut graph.specs {
                    spec.stores = stores(self.random, &self.chances);
                }
                graph
            }
            _ => random_graph(self.random, &self.chances, size),
        };
        let target = (graph.specs.len() - 1, self.random.below(2));
        let job = self.random.next() % JOBS;
        let build = self.new_build(Some(job), &graph, target);
        self.bench.build(build, job, &graph, target);
    }

    fn new_build(&mut self, job: Option<u64>, graph: &Graph, target: (usize, usize)) -> u64 {
        let build = self.next_build;
        self.next_build += 1;
        let graph = graph.clone();
        self.wanted.push(Wanted {
            build,
            job,
            graph,
            target,
        });
        build
    }

    /// What a build yielded turns out to be gone, in part.
    fn renew_some(&mut self) {
        let wanted = &self.wanted[self.random.below(self.wanted.len())];
        let done = self.bench.finished.get(&BuildId(wanted.build));
        let is_done = done.is_some_and(|(outcome, _)| outcome.is_ok());
        let Some(job) = wanted
            .job
            .filter(|_| is_done && !self.canceled.contains(&wanted.build))
        else {
            return;
        };
        let (of, graph, target) = (wanted.build, wanted.graph.clone(), wanted.target);
        let build = self.new_build(Some(job), &graph, target);
        let random = &mut *self.random;
        self.bench.renew(build, job, of, |_| random.chance(40));
    }

    fn cancel_some(&mut self) {
        let index = self.random.below(self.wanted.len());
        let (build, job) = (self.wanted[index].build, self.wanted[index].job);
        match job {
            Some(job) if self.random.chance(50) => {
                let closed = self.wanted.iter().filter(|wanted| wanted.job == Some(job));
                self.canceled.extend(closed.map(|wanted| wanted.build));
                self.bench.close(job);
            }
            Some(_) => {
                self.canceled.push(build);
                self.bench.tell(Input::CancelBuild {
                    build: BuildId(build),
                });
            }
            None => {}
        }
    }

    /// Whether an execution waits for a build of its own.
    fn is_waiting(&self, effect: &Effect<String>) -> bool {
        effect_id(effect)
            .and_then(|effect| self.nested.get(&effect))
            .is_some_and(|build| {
                !self.bench.finished.contains_key(&BuildId(*build)) && !self.canceled.contains(build)
            })
    }

    /// Answers one waiting effect, perhaps badly.
    fn answer_one(&mut self) {
        let ready: Vec<usize> = (0..self.bench.waiting.len())
            .filter(|index| !self.is_waiting(&self.bench.waiting[*index]))
            .collect();
        assert!(
            !ready.is_empty(),
            "seed {}: executions wait for each other",
            self.seed
        );
        let effect = self.bench.waiting.remove(ready[self.random.below(ready.len())]);
        if let Effect::Cancel { effect } = effect {
            self.cancel_effect(effect);
            return;
        }
        let id = effect_id(&effect).unwrap();
        let is_query = matches!(effect, Effect::Query { .. });
        if !is_query && self.random.chance(self.chances.fail) {
            let error = "broken".to_owned();
            self.bench.tell(Input::Failed { effect: id, error });
        } else if matches!(effect, Effect::Load { .. }) && self.random.chance(self.chances.lose) {
            self.bench.tell(Input::Loaded {
                effect: id,
                result: None,
            });
        } else if let Some(inputs) = self.lost_inputs(&effect) {
            let error = "lost".to_owned();
            self.bench.tell(Input::Lost {
                effect: id,
                inputs,
                error,
            });
        } else if !self.nest(&effect) {
            let answer = self.bench.answer(effect).unwrap();
            self.bench.tell(answer);
        }
    }

    /// Cancelled work ends sooner or later, one way or the other.
    fn cancel_effect(&mut self, effect: EffectId) {
        if let Some(build) = self.nested.get(&effect).copied() {
            self.canceled.push(build);
            self.bench.tell(Input::CancelBuild {
                build: BuildId(build),
            });
        }
        let is_it = |waiting: &Effect<String>| effect_id(waiting) == Some(effect);
        let position = self.bench.waiting.iter().position(is_it);
        let Some(position) = position.filter(|_| self.random.chance(70)) else {
            return;
        };
        self.bench.waiting.remove(position);
        let error = "interrupted".to_owned();
        self.bench.tell(if self.random.chance(60) {
            Input::Canceled { effect }
        } else {
            Input::Failed { effect, error }
        });
    }

    /// Lets an op build something for itself, and wait for it.
    fn nest(&mut self, effect: &Effect<String>) -> bool {
        let Effect::Exec {
            effect: id, vertex, ..
        } = effect
        else {
            return false;
        };
        if self.nested.contains_key(id) || !self.random.chance(self.chances.nest) {
            return false;
        }
        let graph = if self.random.chance(50) {
            let index = self.random.below(self.wanted.len());
            self.wanted[index].graph.clone()
        } else {
            random_graph(self.random, &self.chances, 6)
        };
        let target = (graph.specs.len() - 1, self.random.below(2));
        let build = self.new_build(None, &graph, target);
        self.nested.insert(*id, build);
        self.bench.waiting.push(effect.clone());
        self.bench
            .build_for(build, Owner::Vertex(*vertex), &graph, target);
        true
    }

    /// Which of an effect's loaded inputs turn out to be gone, if any.
    fn lost_inputs(&mut self, effect: &Effect<String>) -> Option<Vec<usize>> {
        let given: Vec<_> = match effect {
            Effect::Exec { inputs, .. } => inputs.iter().copied().enumerate().collect(),
            Effect::Checksum { input, result, .. } => vec![(*input, *result)],
            _ => return None,
        };
        let mut lost = Vec::new();
        for (number, result) in given {
            if self.bench.loaded.contains(&result) && self.random.chance(self.chances.lose) {
                lost.push(number);
            }
        }
        (!lost.is_empty()).then_some(lost)
    }

    fn check_outcomes(&self) {
        for wanted in &self.wanted {
            let (target, output) = wanted.target;
            let canceled = wanted.job.is_none() || self.canceled.contains(&wanted.build);
            let context = format!("seed {}: build {}", self.seed, wanted.build);
            match self.bench.finished.get(&BuildId(wanted.build)) {
                None => assert!(canceled, "{context} is finished"),
                Some((Ok(_), value)) => {
                    let right = wanted.graph.value(target, output);
                    assert_eq!(*value, Some(right), "{context} is right");
                }
                Some((Err(Failure::Op { .. }), _)) => assert!(self.chances.fail > 0, "{context} failed"),
                Some((Err(Failure::NoOutput { .. }), _)) => {
                    assert!(self.chances.may_fail(), "{context} lacks an output");
                }
                Some((Err(Failure::Recursive), _)) => assert!(wanted.job.is_none(), "{context} is recursive"),
                Some((Err(Failure::Canceled), _)) if canceled => {}
                Some((Err(failure), _)) => panic!("{context} failed with {failure:?}"),
            }
        }
    }

    fn end(&mut self) {
        for job in 0..JOBS {
            self.bench.tell(Input::CloseJob { job: JobId(job) });
        }
        self.bench.run();
        let seed = self.seed;
        assert_eq!(
            self.bench.solver.active_vertices(),
            0,
            "seed {seed}: vertices are given up"
        );
        assert_eq!(
            self.bench.solver.outstanding_effects(),
            0,
            "seed {seed}: effects are answered"
        );
        assert!(self.bench.results.is_empty(), "seed {seed}: results are released");
    }
}

impl Drop for Simulation<'_> {
    #[expect(clippy::print_stdout, reason = "who asks for one seed wants to see it")]
    fn drop(&mut self) {
        if std::thread::panicking() && std::env::var_os("SOLVER_SEED").is_some() {
            println!("{:?}", self.chances);
            for wanted in &self.wanted {
                println!("build {} in {:?}: {:?}", wanted.build, wanted.job, wanted.target);
                for (index, spec) in wanted.graph.specs.iter().enumerate() {
                    println!("    {index} {spec:?}");
                }
            }
            println!("{}", self.bench.trace.join("\n"));
        }
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

/// Answers everything, in any order.
fn settle(bench: &mut Bench, random: &mut Random) {
    while !bench.waiting.is_empty() {
        let effect = bench.waiting.remove(random.below(bench.waiting.len()));
        if let Some(answer) = bench.answer(effect) {
            bench.tell(answer);
        }
    }
}

/// Builds a graph with nothing going wrong and expects one result to be loaded, nothing to be executed.
fn expect_loaded(seed: u64, random: &mut Random, mut bench: Bench, graph: &Graph) -> Bench {
    bench.build(0, 0, graph, (graph.specs.len() - 1, 0));
    settle(&mut bench, random);
    let (executed, loads) = (bench.executed, bench.loads);
    assert_eq!((executed, loads), (0, 1), "seed {seed}: {:?}", bench.trace);
    bench
}

/// What was built once is only loaded afterwards: with the same store, and from an imported one.
fn rebuild(seed: u64) {
    let mut random = Random::new(seed);
    let random = &mut random;
    let size = 1 + random.below(VERTICES);
    let mut graph = random_graph(random, &CALM, size);
    let mut first = Bench::default();
    first.build(0, 0, &graph, (graph.specs.len() - 1, 0));
    settle(&mut first, random);
    let stored = first.stored.clone();
    let local = Bench {
        local: first.local.clone(),
        stored: stored.clone(),
        ..Bench::default()
    };
    expect_loaded(seed, random, local, &graph);

    let store = StoreId(1);
    for spec in &mut graph.specs {
        spec.stores.push(store);
    }
    let mut imported = Bench {
        stored,
        ..Bench::default()
    };
    imported.imported.insert(store, first.local.clone());
    let third = expect_loaded(seed, random, imported, &graph);

    // What was imported is known locally, also by those who do not import.
    for spec in &mut graph.specs {
        spec.stores.clear();
    }
    let local = Bench {
        local: third.local.clone(),
        stored: third.stored.clone(),
        ..Bench::default()
    };
    expect_loaded(seed, random, local, &graph);
}

/// Runs the seeds that are asked for, or those that fit into the time.
fn for_seeds(budget: Duration, run: fn(u64)) {
    let number = |name: &str| {
        let value = std::env::var(name).ok()?;
        value.parse::<u64>().ok()
    };
    let (seeds, budget): (Range<u64>, _) = match (number("SOLVER_SEED"), number("SOLVER_SEEDS")) {
        (Some(seed), _) => (seed..seed + 1, Duration::MAX),
        (None, Some(count)) => (0..count, Duration::MAX),
        (None, None) => (0..3_000, budget),
    };
    let start = Instant::now();
    for seed in seeds {
        if start.elapsed() > budget {
            break;
        }
        let outcome = std::panic::catch_unwind(|| run(seed));
        if let Err(panic) = outcome {
            let message = panic.downcast_ref::<String>().map_or("", String::as_str);
            panic!("SOLVER_SEED={seed} shows it: {message}");
        }
    }
}

#[test]
fn random_builds_match_the_naive_evaluation() {
    for_seeds(Duration::from_secs(6), |seed| {
        let mut random = Random::new(seed);
        Simulation::new(seed, &mut random).run();
    });
}

#[test]
fn what_was_built_is_loaded() {
    for_seeds(Duration::from_secs(2), rebuild);
}

/// A step was found by a digest that its input shares with another source; the next build knew the input's own one first.
#[test]
fn a_step_that_was_found_in_one_way_is_found_in_every_other_way() {
    rebuild(55_227);
}

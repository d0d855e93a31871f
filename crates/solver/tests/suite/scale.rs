//! Time is linear in the graph, whatever its shape.
//!
//! `cargo test -p solver scale -- --nocapture` prints what a graph of 1,250, 2,500 and 5,000 vertices takes: cold, and
//! again with everything remembered.

use std::collections::{BTreeMap, VecDeque};
use std::time::Duration;

use solver::{
    BuildId, CacheMap, Dep, Effect, Event, FoundKey, Input, JobId, MemoryRecords, Owner, ResultId, Solver,
    StoreId, VertexDef,
};

use crate::bench::digest;

const SIZES: [usize; 3] = [1_250, 2_500, 5_000];

/// A vertex's inputs, and whether content identifies each.
type Shape = Vec<Vec<(usize, bool)>>;

fn chain(size: usize) -> Shape {
    (0..size)
        .map(|index| {
            index
                .checked_sub(1)
                .map(|input| (input, false))
                .into_iter()
                .collect()
        })
        .collect()
}

/// Two branches that are joined again and again: twice as many paths with every joint.
fn ladder(size: usize) -> Shape {
    let inputs = |index: usize| match index {
        0 => Vec::new(),
        index if index % 3 == 0 => vec![(index - 1, false), (index - 2, false)],
        index => vec![((index - 1) / 3 * 3, false)],
    };
    (0..size).map(inputs).collect()
}

/// Stages that copy from the one before, and from a context.
fn stages(size: usize) -> Shape {
    let inputs = |index: usize| match index {
        0 | 1 => Vec::new(),
        index if index % 5 == 0 => vec![(index - 1, false), (1, true)],
        index if index % 5 == 4 => vec![(index - 1, false), (index / 2, true)],
        index => vec![(index - 1, false)],
    };
    (0..size).map(inputs).collect()
}

/// Many that use one, and one that uses many.
fn fan(size: usize) -> Shape {
    let mut shape: Shape = (1..size)
        .map(|index| if index == 1 { Vec::new() } else { vec![(0, false)] })
        .collect();
    shape.push((1..size - 1).map(|input| (input, false)).collect());
    shape
}

struct Run {
    executed: usize,
    loaded: usize,
    answers: usize,
    time: Duration,
}

/// What the thread has computed so far; unlike a clock it does not count what others do.
fn computed() -> Duration {
    let stat = std::fs::read_to_string("/proc/thread-self/schedstat").unwrap_or_default();
    let nanoseconds = stat.split_whitespace().next().and_then(|word| word.parse().ok());
    Duration::from_nanos(nanoseconds.unwrap_or(0))
}

/// The world around one build: the shortest that can be, so that the solver's time is what counts.
struct World<'a> {
    shape: &'a Shape,
    records: &'a mut MemoryRecords,
    vertices: BTreeMap<solver::VertexId, usize>,
    inputs: VecDeque<Input<String>>,
    results: u64,
    run: Run,
}

impl World<'_> {
    fn result(&mut self) -> ResultId {
        self.results += 1;
        ResultId(self.results)
    }

    fn effect(&mut self, effect: Effect<String>) {
        let answer = match effect {
            Effect::CacheMap { effect, vertex, .. } => {
                let index = self.vertices[&vertex];
                let deps = self.shape[index].iter().map(|(_, content)| Dep {
                    selector: None,
                    content: *content,
                });
                let map = CacheMap {
                    digests: vec![digest(format!("op {index}"))],
                    deps: deps.collect(),
                    ..CacheMap::default()
                };
                Input::MapReady { effect, map }
            }
            Effect::Query { effect, queries, .. } => {
                let found: Vec<Vec<FoundKey>> =
                    queries.iter().map(|query| self.records.answer(query)).collect();
                Input::KeysFound { effect, found }
            }
            Effect::Checksum { effect, .. } => Input::Checksummed {
                effect,
                digest: Some(digest("content")),
            },
            Effect::Load { effect, .. } => {
                self.run.loaded += 1;
                let result = Some(self.result());
                Input::Loaded { effect, result }
            }
            Effect::Exec { effect, .. } => {
                self.run.executed += 1;
                let outputs = vec![Some(self.result())];
                Input::Executed { effect, outputs }
            }
            Effect::Save { record, .. } => {
                self.records.add(record.record, record.links);
                if let Some(result) = record.result {
                    self.records.add_result(record.record, result.0.to_string(), 0);
                }
                return;
            }
            Effect::Finished { outcome, .. } => {
                outcome.unwrap();
                return;
            }
            Effect::Release { .. } | Effect::Cancel { .. } | Effect::Forget { .. } => return,
        };
        self.inputs.push_back(answer);
    }
}

/// Builds the last vertex of a shape. `stores`: how many imported caches are asked as well.
fn build(shape: &Shape, records: &mut MemoryRecords, stores: u32) -> Run {
    let digests: Vec<_> = (0..shape.len())
        .map(|index| digest(format!("vertex {index}")))
        .collect();
    let defs = shape.iter().zip(&digests).map(|(inputs, digest)| VertexDef {
        digest: *digest,
        inputs: inputs.iter().map(|(input, _)| (*input, 0)).collect(),
        ignore_cache: false,
        export: None,
        stores: (1..=stores).map(StoreId).collect(),
    });
    let indices: BTreeMap<_, usize> = digests.iter().copied().zip(0..).collect();
    let mut world = World {
        shape,
        records,
        vertices: BTreeMap::new(),
        inputs: VecDeque::new(),
        results: 0,
        run: Run {
            executed: 0,
            loaded: 0,
            answers: 0,
            time: Duration::ZERO,
        },
    };
    world.inputs.push_back(Input::Build {
        build: BuildId(1),
        owner: Owner::Job(JobId(1)),
        graph: defs.collect(),
        target: (shape.len() - 1, 0),
    });
    let start = computed();
    let mut solver = Solver::new();
    let mut closed = false;
    loop {
        let Some(input) = world.inputs.pop_front() else {
            if closed {
                break;
            }
            closed = true;
            world.inputs.push_back(Input::CloseJob { job: JobId(1) });
            continue;
        };
        world.run.answers += 1;
        solver.handle(input);
        while let Some(event) = solver.poll_event() {
            if let Event::Added { vertex, digest } = event {
                world.vertices.insert(vertex, indices[&digest]);
            }
        }
        while let Some(effect) = solver.poll_effect() {
            world.effect(effect);
        }
    }
    assert_eq!(solver.active_vertices() + solver.outstanding_effects(), 0);
    world.run.time = computed() - start;
    world.run
}

#[expect(clippy::print_stdout, reason = "that is what it is for")]
fn print(name: &str, size: usize, cold: &Run, again: &Run) {
    println!(
        "{name} of {size}: cold {:?} with {} answers, again {:?} with {} answers",
        cold.time, cold.answers, again.time, again.answers
    );
}

/// Builds a shape in all sizes, cold and again, and expects four times the vertices to take little more than four times
/// the answers and the time.
fn expect_linear(name: &str, shape: fn(usize) -> Shape) {
    let mut cold = Vec::new();
    let mut again = Vec::new();
    for size in SIZES {
        let shape = shape(size);
        let mut records = MemoryRecords::default();
        let first = build(&shape, &mut records, 0);
        // The best of some: others use the machine's caches.
        let times = (0..3).map(|_| build(&shape, &mut records, 2)).collect::<Vec<_>>();
        let second = times.into_iter().min_by_key(|run| run.time).unwrap();
        assert_eq!((second.executed, second.loaded > 0), (0, true), "{name}");
        print(name, size, &first, &second);
        cold.push(first);
        again.push(second);
    }
    for runs in [cold, again] {
        let (small, large) = (&runs[0], &runs[2]);
        assert!(large.answers <= small.answers * 4 + 100, "{name}: answers");
        // Something quadratic would take sixteen times as long.
        assert!(
            large.time < small.time * 10 + Duration::from_millis(20),
            "{name}: time"
        );
    }
}

#[test]
fn a_chain_takes_linear_time() {
    expect_linear("chain", chain);
}

#[test]
fn a_ladder_takes_linear_time() {
    expect_linear("ladder", ladder);
}

#[test]
fn stages_take_linear_time() {
    expect_linear("stages", stages);
}

#[test]
fn a_fan_takes_linear_time() {
    expect_linear("fan", fan);
}

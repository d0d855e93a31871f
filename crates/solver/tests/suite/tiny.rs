//! All graphs of up to three vertices, with every order of answers, every loss and every moment of a cancellation.
//!
//! `SOLVER_TINY=4 cargo test -p solver tiny` takes graphs of four vertices as well, which lasts minutes.

use solver::{BuildId, Input};

use crate::bench::{Bench, Graph, Spec};

/// Walks all sequences of choices: the first ones are given, later ones are zero and noted.
#[derive(Default)]
struct Choices {
    taken: Vec<(usize, usize)>,
    next: usize,
}

impl Choices {
    /// Chooses below `options`.
    fn choose(&mut self, options: usize) -> usize {
        if self.next == self.taken.len() {
            self.taken.push((0, options));
        }
        let (choice, known) = self.taken[self.next];
        assert_eq!(known, options, "the same choices lead to the same place");
        self.next += 1;
        choice
    }

    /// Goes on to the next sequence. `false`: there is none.
    fn advance(&mut self) -> bool {
        self.next = 0;
        while let Some((choice, options)) = self.taken.pop() {
            if choice + 1 < options {
                self.taken.push((choice + 1, options));
                return true;
            }
        }
        false
    }
}

/// Ways in which a vertex can use one or two earlier ones, or none.
fn arrangements(earlier: usize) -> Vec<Vec<(usize, usize, bool)>> {
    let mut all = vec![Vec::new()];
    let uses = || (0..earlier).flat_map(|index| [(index, 0, false), (index, 0, true)]);
    for first in uses() {
        all.push(vec![first]);
        all.extend(
            uses()
                .filter(|second| second.0 > first.0)
                .map(|second| vec![first, second]),
        );
    }
    all
}

/// All graphs of a size whose last vertex uses the one before, so that none is left out of a build by mistake.
fn graphs(size: usize) -> Vec<Graph> {
    let mut all: Vec<Vec<Spec>> = vec![Vec::new()];
    for index in 0..size {
        let mut longer = Vec::new();
        for specs in &all {
            for inputs in arrangements(index) {
                if index + 1 == size && index > 0 && !inputs.iter().any(|(input, ..)| *input + 1 == index) {
                    continue;
                }
                let mut specs = specs.clone();
                // The same name for two of them: equal steps where inputs are equal.
                let name = ["a", "b", "b", "c"][index];
                let source = inputs.is_empty();
                specs.push(Spec {
                    name: format!("{name}{}", if source { "s" } else { "" }),
                    inputs,
                    salt: index as u64,
                    ..Spec::default()
                });
                longer.push(specs);
            }
        }
        all = longer;
    }
    all.into_iter().map(Graph::new).collect()
}

/// Answers in the order that is chosen. Answers that are equal choices to the solver are not told apart: which of the
/// effects on the way is next.
fn settle(bench: &mut Bench, choices: &mut Choices) {
    while !bench.waiting.is_empty() {
        let index = choices.choose(bench.waiting.len());
        let effect = bench.waiting.remove(index);
        if let Some(answer) = bench.answer(effect) {
            bench.tell(answer);
        }
    }
}

fn expect(bench: &Bench, graph: &Graph, build: u64) {
    let (_, value) = &bench.finished[&BuildId(build)];
    let target = graph.specs.len() - 1;
    assert_eq!(
        *value,
        Some(graph.value(target, 0)),
        "{graph:?}: {:?}",
        bench.trace
    );
}

fn sizes() -> std::ops::RangeInclusive<usize> {
    let wanted = std::env::var("SOLVER_TINY")
        .ok()
        .and_then(|size| size.parse().ok());
    1..=wanted.unwrap_or(3)
}

fn for_all(sizes: std::ops::RangeInclusive<usize>, mut run: impl FnMut(&Graph, &mut Choices)) {
    for graph in sizes.flat_map(graphs) {
        let mut choices = Choices::default();
        loop {
            run(&graph, &mut choices);
            if !choices.advance() {
                break;
            }
        }
    }
}

#[test]
fn every_order_of_answers_leads_to_the_result() {
    for_all(sizes(), |graph, choices| {
        let mut bench = Bench::default();
        bench.build(1, 1, graph, (graph.specs.len() - 1, 0));
        settle(&mut bench, choices);
        expect(&bench, graph, 1);
        for (step, runs) in &bench.runs {
            assert_eq!(*runs, 1, "{step:x?} of {graph:?}: {:?}", bench.trace);
        }
        bench.close(1);
        assert!(bench.results.is_empty() && bench.solver.active_vertices() == 0);
    });
}

#[test]
fn every_loss_is_made_good() {
    for_all(sizes(), |graph, choices| {
        let target = (graph.specs.len() - 1, 0);
        let mut bench = Bench::default();
        bench.build(1, 1, graph, target);
        bench.run();
        bench.close(1);
        let first = bench.executed;
        // Per result: it is there, it is lost without notice, it was pruned.
        let stored: Vec<String> = bench.stored.keys().cloned().collect();
        for result in stored {
            match choices.choose(3) {
                0 => {}
                1 => drop(bench.stored.remove(&result)),
                _ => bench.local.remove_result(&result),
            }
        }
        bench.build(2, 2, graph, target);
        bench.run();
        expect(&bench, graph, 2);
        assert!(
            bench.executed <= first * 2,
            "nothing is made more than once again"
        );
        bench.close(2);
        assert!(bench.results.is_empty() && bench.solver.active_vertices() == 0);
    });
}

#[test]
fn a_build_may_leave_at_any_moment() {
    for_all(sizes(), |graph, choices| {
        let target = (graph.specs.len() - 1, 0);
        let mut bench = Bench::default();
        bench.build(1, 1, graph, target);
        let late = choices.choose(2) == 1;
        if !late {
            bench.build(2, 2, graph, target);
        }
        let mut left = false;
        while !bench.waiting.is_empty() {
            if !left && choices.choose(2) == 1 {
                left = true;
                if choices.choose(2) == 0 {
                    bench.tell(Input::CancelBuild { build: BuildId(1) });
                } else {
                    bench.close(1);
                }
                if late {
                    bench.build(2, 2, graph, target);
                }
                continue;
            }
            let effect = bench.waiting.remove(0);
            if let Some(answer) = bench.answer(effect) {
                bench.tell(answer);
            }
        }
        if late && !left {
            return;
        }
        expect(&bench, graph, 2);
        bench.close(1);
        bench.close(2);
        bench.run();
        assert!(bench.results.is_empty() && bench.solver.active_vertices() == 0);
    });
}

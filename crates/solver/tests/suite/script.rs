//! Graphs, caches and orders of completion as text, and the trace of effects that follows.
//!
//! A graph's line is `name = source N` (it contains what `N / 2` and the name's length and first letter tell), `local N`
//! (its key is worth nothing in another build), or `op inputs…`; an input is `name`, `name.1` for its second output, and
//! ends in `*` when content identifies it. `!` at the end ignores the cache, `salt N` makes a vertex of its own of the
//! same step, `rounds` gives a source a second digest that follows from its content, `from N` asks the imported cache of
//! that number.
//!
//! A script defines graphs, each indented below `graph NAME`, and then says what happens, a line each:
//!
//! | line | what happens |
//! |---|---|
//! | `build N GRAPH [in JOB]` | build N starts, in the job of the same number unless said otherwise |
//! | `within TEXT build N GRAPH` | the op that is waited for under that text builds something |
//! | `until TEXT [and TEXT]` | everything is answered in order, but what the trace calls so, until that is all that waits |
//! | `answer TEXT` | this is answered |
//! | `fail TEXT`, `end TEXT` | this fails; ends as if it had been cancelled |
//! | `gone TEXT N…` | this finds that its inputs of these numbers are gone |
//! | `renew N M NAME…` | build N wants what build M yielded, without the results of these steps, which are gone |
//! | `run` | everything is answered in order |
//! | `cancel N`, `close N` | build N is not wanted any more; job N is over |
//! | `lose NAME` | the step's results cannot be loaded any more, which nobody knows yet |
//! | `prune NAME` | they are removed from the local store |
//! | `import N` | the local store becomes the imported cache N, and a new local one is empty |

use std::collections::BTreeMap;

use solver::{BuildId, Effect, Input, JobId, Owner, StoreId};

use crate::bench::{Bench, Graph, Spec, effect_id};

/// Reads a graph.
pub fn graph(text: &str) -> Graph {
    let mut specs: Vec<Spec> = Vec::new();
    for line in text.lines().map(str::trim).filter(|line| !line.is_empty()) {
        let (name, rest) = line.split_once('=').unwrap();
        let mut words = rest.split_whitespace();
        let kind = words.next().unwrap();
        let mut spec = Spec {
            name: name.trim().to_owned(),
            ephemeral: kind == "local",
            ..Spec::default()
        };
        while let Some(word) = words.next() {
            if let Ok(version) = word.parse() {
                spec.version = version;
            } else if word == "!" {
                spec.ignore_cache = true;
            } else if word == "salt" {
                spec.salt = words.next().unwrap().parse().unwrap();
            } else if word == "from" {
                spec.stores.push(StoreId(words.next().unwrap().parse().unwrap()));
            } else if word == "rounds" {
                spec.rounds = true;
            } else {
                let content = word.ends_with('*');
                let (input, output) = word.trim_end_matches('*').split_once('.').unwrap_or((word, "0"));
                let input = input.trim_end_matches('*');
                let index = specs.iter().position(|spec| spec.name == input).unwrap();
                spec.inputs.push((index, output.parse().unwrap(), content));
            }
        }
        specs.push(spec);
    }
    Graph::new(specs)
}

/// The graph's last vertex, first output.
pub fn last(graph: &Graph) -> (usize, usize) {
    (graph.specs.len() - 1, 0)
}

/// Removes what makes a text readable in a test.
pub fn lines(text: &str) -> String {
    text.lines()
        .map(str::trim)
        .filter(|line| !line.is_empty())
        .collect::<Vec<_>>()
        .join("\n")
}

/// What has been said so far.
#[derive(Default)]
struct Stage {
    bench: Bench,
    graphs: BTreeMap<String, Graph>,
}

/// Plays a script and returns the trace of effects, with the lines that are no `answer`s, `until`s or `run`s between.
pub fn play(script: &str) -> String {
    let mut stage = Stage::default();
    let mut texts: BTreeMap<String, String> = BTreeMap::new();
    let mut current = None;
    for line in script.lines() {
        let words: Vec<&str> = line.split_whitespace().collect();
        match words.as_slice() {
            [] => {}
            ["graph", name] => current = Some((*name).to_owned()),
            [_, "=", ..] => {
                let text = texts.entry(current.clone().unwrap()).or_default();
                text.push_str(line);
                text.push('\n');
            }
            words => {
                for (name, text) in std::mem::take(&mut texts) {
                    stage.graphs.insert(name, graph(&text));
                }
                stage.act(words);
                stage.bench.solver.assert_invariants();
            }
        }
    }
    stage.bench.take_trace()
}

impl Stage {
    fn act(&mut self, words: &[&str]) {
        let bench = &mut self.bench;
        if !matches!(words[0], "answer" | "until" | "run") {
            bench.trace.push(format!("> {}", words.join(" ")));
        }
        match words {
            ["build", number, name] => self.build(number, name, number),
            ["build", number, name, "in", job] => self.build(number, name, job),
            ["within", what @ .., "build", number, name] => {
                let position = self.waiting(what);
                let Effect::Exec { vertex, .. } = self.bench.waiting[position] else {
                    panic!("{what:?} is no execution")
                };
                let graph = self.graphs[*name].clone();
                let target = last(&graph);
                self.bench
                    .build_for(number.parse().unwrap(), Owner::Vertex(vertex), &graph, target);
            }
            ["until", what @ ..] => {
                let what = what.join(" ");
                self.until(&what.split(" and ").collect::<Vec<_>>());
            }
            ["answer", what @ ..] => {
                let position = self.waiting(what);
                let effect = self.bench.waiting.remove(position);
                self.answer(effect);
            }
            ["fail", what @ ..] => {
                let effect = self.take(what);
                let error = "broken".to_owned();
                self.bench.tell(Input::Failed { effect, error });
            }
            ["end", what @ ..] => {
                let effect = self.take(what);
                self.bench.tell(Input::Canceled { effect });
            }
            ["gone", kind, name, inputs @ ..] => {
                let effect = self.take(&[kind, name]);
                let inputs = inputs.iter().map(|input| input.parse().unwrap()).collect();
                let error = "gone".to_owned();
                self.bench.tell(Input::Lost {
                    effect,
                    inputs,
                    error,
                });
            }
            ["renew", number, of, names @ ..] => {
                let (number, of) = (number.parse().unwrap(), of.parse().unwrap());
                bench.renew(number, of, of, |name| names.contains(&name));
            }
            ["run"] => bench.run(),
            ["cancel", number] => {
                let build = BuildId(number.parse().unwrap());
                bench.tell(Input::CancelBuild { build });
            }
            ["close", number] => {
                let job = JobId(number.parse().unwrap());
                bench.tell(Input::CloseJob { job });
            }
            ["lose", name] => drop(self.take_results(name)),
            ["prune", name] => {
                for result in self.take_results(name) {
                    self.bench.local.remove_result(&result);
                }
            }
            ["import", number] => {
                let store = StoreId(number.parse().unwrap());
                bench.imported.insert(store, std::mem::take(&mut bench.local));
            }
            other => panic!("{other:?} is no part of a script"),
        }
    }

    fn build(&mut self, number: &str, name: &str, job: &str) {
        let graph = self.graphs[name].clone();
        let (number, job) = (number.parse().unwrap(), job.parse().unwrap());
        self.bench.build(number, job, &graph, last(&graph));
        let finished = self.bench.finished.get(&BuildId(number));
        assert!(
            finished.is_none_or(|(outcome, _)| outcome.is_err()),
            "it takes an answer"
        );
    }

    fn waiting(&self, what: &[&str]) -> usize {
        let what = what.join(" ");
        let waiting = self
            .bench
            .waiting
            .iter()
            .map(|effect| self.bench.describe(effect));
        let all: Vec<String> = waiting.collect();
        let position = all.iter().position(|waiting| *waiting == what);
        position.unwrap_or_else(|| panic!("{what} is not waited for, but {all:?}"))
    }

    fn take(&mut self, what: &[&str]) -> solver::EffectId {
        let position = self.waiting(what);
        effect_id(&self.bench.waiting.remove(position)).unwrap()
    }

    fn answer(&mut self, effect: Effect<String>) {
        if let Some(answer) = self.bench.answer(effect) {
            self.bench.tell(answer);
        }
    }

    fn until(&mut self, what: &[&str]) {
        let is_kept =
            |bench: &Bench, effect: &Effect<String>| what.contains(&bench.describe(effect).as_str());
        loop {
            let bench = &mut self.bench;
            let other = bench.waiting.iter().position(|effect| !is_kept(bench, effect));
            let Some(other) = other else { break };
            let effect = bench.waiting.remove(other);
            self.answer(effect);
        }
        assert!(!self.bench.waiting.is_empty(), "{what:?} is never waited for");
    }

    /// Takes all results of a step from what can be loaded.
    fn take_results(&mut self, name: &str) -> Vec<String> {
        let results: Vec<String> = self
            .bench
            .makers
            .iter()
            .filter(|(_, maker)| *maker == name)
            .map(|(result, _)| result.clone())
            .collect();
        for result in &results {
            self.bench.stored.remove(result);
        }
        results
    }
}

//! What stands outside of the solver in tests: ops that compute numbers, stores in memory, and a trace.

use std::collections::{BTreeMap, BTreeSet};

use oci::Digest;
use solver::{
    BuildId, CacheMap, Dep, Effect, EffectId, Event, Failure, Input, JobId, MemoryRecords, Outcome, Owner,
    RecordId, ResultId, Solver, StoreId, VertexDef, VertexId,
};

pub fn digest(text: impl AsRef<str>) -> Digest {
    Digest::sha256(text.as_ref().as_bytes())
}

pub fn mix(parts: &[u64]) -> u64 {
    parts.iter().fold(0xcbf2_9ce4_8422_2325, |hash, part| {
        (hash ^ part).wrapping_mul(0x0100_0000_01b3) ^ (hash >> 29)
    })
}

/// A digest as a number.
fn number(digest: &Digest) -> u64 {
    u64::from_str_radix(&digest.hex()[..16], 16).unwrap()
}

/// What part of an input a step reads when it is identified by content.
pub fn part(value: u64) -> u64 {
    value % 3
}

#[derive(Clone, Debug, Default)]
pub struct Spec {
    pub name: String,
    /// Indices of earlier vertices and their outputs, and whether content identifies them.
    pub inputs: Vec<(usize, usize, bool)>,
    /// What a source contains.
    pub version: u64,
    /// Makes vertices differ that are the same step.
    pub salt: u64,
    pub ephemeral: bool,
    /// A source with a second digest that follows from what it contains.
    pub rounds: bool,
    pub ignore_cache: bool,
    pub stores: Vec<StoreId>,
    /// An output that the op does not yield.
    pub missing: Option<usize>,
}

impl Spec {
    fn own_digest(&self) -> Digest {
        let kinds: Vec<_> = self
            .inputs
            .iter()
            .map(|(_, output, content)| (output, content))
            .collect();
        let version = if self.inputs.is_empty() { self.version } else { 0 };
        digest(format!("op {} {version} {kinds:?}", self.name))
    }

    /// What a source contains: two versions each are equal.
    fn source_value(&self) -> u64 {
        mix(&[
            self.name.len() as u64,
            self.version / 2,
            u64::from(self.name.as_bytes()[0]),
        ])
    }

    pub fn output(&self, output: usize, inputs: &[u64]) -> u64 {
        if self.inputs.is_empty() {
            return mix(&[self.source_value(), output as u64]);
        }
        let mut parts = vec![
            u64::from(self.name.as_bytes()[0]),
            self.name.len() as u64,
            output as u64,
        ];
        for ((_, _, content), value) in self.inputs.iter().zip(inputs) {
            parts.push(if *content { part(*value) } else { *value });
        }
        mix(&parts)
    }
}

/// Outputs that an op yields unless one is missing.
const OUTPUTS: usize = 3;

/// A graph with its vertices' digests.
#[derive(Clone, Debug, Default)]
pub struct Graph {
    pub specs: Vec<Spec>,
    pub digests: Vec<Digest>,
    /// What makes a step the same step wherever it stands: its op, and per input what identifies it.
    identities: Vec<u64>,
}

impl Graph {
    pub fn new(specs: Vec<Spec>) -> Self {
        let mut digests: Vec<Digest> = Vec::new();
        let mut identities: Vec<u64> = Vec::new();
        let mut lasting: Vec<bool> = Vec::new();
        let mut values: Vec<[u64; OUTPUTS]> = Vec::new();
        for spec in &specs {
            let inputs: Vec<_> = spec
                .inputs
                .iter()
                .map(|(i, o, c)| (digests[*i].to_string(), o, c))
                .collect();
            let version = (spec.version, spec.salt, spec.ephemeral, spec.rounds, spec.missing);
            let own = digest(format!("vertex {} {version:?} {inputs:?}", spec.name));
            digests.push(own);
            let is_known = |(input, _, content): &(usize, usize, bool)| *content || lasting[*input];
            lasting.push(!spec.ephemeral && spec.inputs.iter().all(is_known));
            // What has an input without a lasting identity has none.
            let op = if lasting[lasting.len() - 1] {
                spec.own_digest()
            } else {
                own
            };
            let mut parts = vec![number(&op), spec.missing.map_or(0, |output| output as u64 + 1)];
            let value = |(input, output): (usize, usize)| values[input].get(output).copied().unwrap_or(0);
            for (input, output, content) in &spec.inputs {
                parts.push(*output as u64);
                parts.push(if *content {
                    part(value((*input, *output)))
                } else {
                    identities[*input]
                });
            }
            let read: Vec<u64> = spec.inputs.iter().map(|(i, o, _)| value((*i, *o))).collect();
            identities.push(mix(&parts));
            values.push(std::array::from_fn(|output| spec.output(output, &read)));
        }
        Self {
            specs,
            digests,
            identities,
        }
    }

    pub fn defs(&self) -> Vec<VertexDef> {
        let defs = self
            .specs
            .iter()
            .zip(&self.digests)
            .map(|(spec, digest)| VertexDef {
                digest: *digest,
                inputs: spec
                    .inputs
                    .iter()
                    .map(|(index, output, _)| (*index, *output))
                    .collect(),
                ignore_cache: spec.ignore_cache,
                export: None,
                stores: spec.stores.clone(),
            });
        defs.collect()
    }

    /// The naive evaluation.
    pub fn value(&self, target: usize, output: usize) -> u64 {
        let mut memo: BTreeMap<(usize, usize), u64> = BTreeMap::new();
        self.value_of(target, output, &mut memo)
    }

    fn value_of(&self, target: usize, output: usize, memo: &mut BTreeMap<(usize, usize), u64>) -> u64 {
        if let Some(value) = memo.get(&(target, output)) {
            return *value;
        }
        let spec = &self.specs[target];
        let inputs: Vec<u64> = spec
            .inputs
            .iter()
            .map(|(i, o, _)| self.value_of(*i, *o, memo))
            .collect();
        let value = spec.output(output, &inputs);
        memo.insert((target, output), value);
        value
    }
}

/// The outside.
#[derive(Default)]
pub struct Bench {
    pub solver: Solver<String>,
    pub local: MemoryRecords,
    pub imported: BTreeMap<StoreId, MemoryRecords>,
    /// What stored results contain.
    pub stored: BTreeMap<String, u64>,
    /// Which step made which stored result.
    pub makers: BTreeMap<String, String>,
    /// Results that were loaded, not made.
    pub loaded: BTreeSet<ResultId>,
    /// Vertices that were executed to the end.
    pub done: BTreeSet<VertexId>,
    /// What the result of a record is, whoever made it.
    pub truth: BTreeMap<RecordId, u64>,
    /// How often steps that are the same were executed to the end for which output, and which vertices are which.
    pub runs: BTreeMap<(u64, usize), usize>,
    pub identities: BTreeMap<Digest, u64>,
    /// Results that the solver owns.
    pub results: BTreeMap<ResultId, u64>,
    pub specs: BTreeMap<Digest, Spec>,
    pub names: BTreeMap<VertexId, Digest>,
    pub waiting: Vec<Effect<String>>,
    /// Values of inputs when an effect was asked for: it may outlive them.
    pub read: BTreeMap<EffectId, Vec<u64>>,
    pub finished: BTreeMap<BuildId, (Outcome<String>, Option<u64>)>,
    pub trace: Vec<String>,
    pub executed: usize,
    pub loads: usize,
    /// Stored results that the solver was told of.
    pub told: usize,
    pub clock: i64,
    pub next: u64,
}

impl Bench {
    pub fn build(&mut self, build: u64, job: u64, graph: &Graph, target: (usize, usize)) {
        self.build_for(build, Owner::Job(JobId(job)), graph, target);
    }

    pub fn build_for(&mut self, build: u64, owner: Owner, graph: &Graph, target: (usize, usize)) {
        for (index, (spec, digest)) in graph.specs.iter().zip(&graph.digests).enumerate() {
            if self.specs.insert(*digest, spec.clone()).is_none() {
                self.identities.insert(*digest, graph.identities[index]);
            }
        }
        self.tell(Input::Build {
            build: BuildId(build),
            owner,
            graph: graph.defs(),
            target,
        });
    }

    /// Lets a build want the edge of one that is done again, without those results behind it that are gone: all whose steps
    /// `is_lost` by name. They are not in the local store any more.
    pub fn renew(&mut self, build: u64, job: u64, of: u64, mut is_lost: impl FnMut(&str) -> bool) {
        let Some((Ok(built), _)) = &self.finished.get(&BuildId(of)) else {
            panic!("build {of} is not done")
        };
        let edge = built.edge;
        let mut lost = BTreeSet::new();
        for entry in self.solver.export(&[edge]).entries {
            let name = self.specs[&entry.vertex].name.clone();
            if let Some(result) = entry.result
                && is_lost(&name)
            {
                lost.insert(result);
                self.done.retain(|vertex| self.names[vertex] != entry.vertex);
                let gone = self.makers.iter().filter(|(_, maker)| **maker == name);
                for (stored, _) in gone {
                    self.local.remove_result(stored);
                }
            }
        }
        self.tell(Input::Renew {
            build: BuildId(build),
            owner: Owner::Job(JobId(job)),
            edge,
            lost,
        });
    }

    pub fn tell(&mut self, input: Input<String>) {
        self.solver.handle(input);
        self.collect();
        self.solver.assert_invariants();
    }

    fn collect(&mut self) {
        loop {
            while let Some(event) = self.solver.poll_event() {
                if let Event::Added { vertex, digest } = event {
                    self.names.insert(vertex, digest);
                }
            }
            let Some(effect) = self.solver.poll_effect() else {
                return;
            };
            self.note(&effect);
            match effect {
                Effect::Save { vertex, record } => {
                    self.local.add(record.record, record.links);
                    if let Some(result) = record.result {
                        let value = self.results[&result];
                        let known = *self.truth.entry(record.record).or_insert(value);
                        assert_eq!(known, value, "{:?} stands for one result", record.record);
                        self.clock += 1;
                        let id = format!("r{}", self.clock);
                        self.stored.insert(id.clone(), value);
                        self.makers.insert(id.clone(), self.name(vertex).to_owned());
                        self.local.add_result(record.record, id, self.clock);
                    }
                }
                Effect::Forget { stored } => {
                    self.stored.remove(&stored.result);
                    self.local.remove_result(&stored.result);
                }
                Effect::Release { result } => {
                    assert!(
                        self.results.remove(&result).is_some(),
                        "{result:?} is released once"
                    );
                }
                Effect::Finished { build, outcome } => {
                    let value = outcome.as_ref().ok().map(|built| self.results[&built.result]);
                    assert!(self.finished.insert(build, (outcome, value)).is_none());
                }
                other => {
                    let read = match &other {
                        Effect::Checksum { result, .. } => vec![self.results[result]],
                        Effect::Exec { inputs, .. } => {
                            inputs.iter().map(|input| self.results[input]).collect()
                        }
                        _ => Vec::new(),
                    };
                    if let Some(effect) = effect_id(&other) {
                        self.read.insert(effect, read);
                    }
                    self.waiting.push(other);
                }
            }
        }
    }

    pub fn name(&self, vertex: VertexId) -> &str {
        &self.specs[&self.names[&vertex]].name
    }

    fn note(&mut self, effect: &Effect<String>) {
        if let Effect::Exec { vertex, .. } = effect {
            assert!(!self.done.contains(vertex), "{vertex:?} is executed once");
        }
        let is_quiet = matches!(
            effect,
            Effect::Query { .. } | Effect::Save { .. } | Effect::Release { .. }
        );
        if !is_quiet {
            let line = self.describe(effect);
            self.trace.push(line);
        }
    }

    /// An effect as the trace tells it.
    pub fn describe(&self, effect: &Effect<String>) -> String {
        match effect {
            Effect::CacheMap { vertex, round, .. } => match round {
                0 => format!("map {}", self.name(*vertex)),
                round => format!("map {} again {round}", self.name(*vertex)),
            },
            Effect::Query { vertex, .. } => format!("query {}", self.name(*vertex)),
            Effect::Checksum { vertex, input, .. } => {
                format!("checksum {} input {input}", self.name(*vertex))
            }
            Effect::Load {
                vertex, output: 0, ..
            } => format!("load {}", self.name(*vertex)),
            Effect::Load { vertex, output, .. } => format!("load {} output {output}", self.name(*vertex)),
            Effect::Exec { vertex, .. } => format!("exec {}", self.name(*vertex)),
            Effect::Cancel { effect } => {
                let is_it = |waiting: &&Effect<String>| effect_id(waiting) == Some(*effect);
                let canceled = self.waiting.iter().find(is_it);
                let what = canceled.map_or_else(|| "what is over".to_owned(), |effect| self.describe(effect));
                format!("cancel {what}")
            }
            Effect::Finished { build, outcome } => match outcome {
                Ok(_) => format!("build {} is done", build.0),
                Err(Failure::Op { error, .. }) => format!("build {} failed: {error}", build.0),
                Err(failure) => {
                    format!("build {} failed: {failure:?}", build.0).replace(char::is_control, " ")
                }
            },
            Effect::Forget { .. } => "forget".to_owned(),
            Effect::Save { vertex, .. } => format!("save {}", self.name(*vertex)),
            Effect::Release { result } => format!("release {}", result.0),
        }
    }

    pub fn new_result(&mut self, value: u64) -> ResultId {
        self.next += 1;
        let id = ResultId(self.next);
        self.results.insert(id, value);
        id
    }

    fn cache_map(&self, vertex: VertexId, round: u32) -> CacheMap {
        let spec = &self.specs[&self.names[&vertex]];
        let deps = spec.inputs.iter().map(|(_, _, content)| Dep {
            selector: content.then(|| digest("part")),
            content: *content,
        });
        let mut digests = vec![spec.own_digest()];
        if round > 0 {
            digests.push(digest(format!("contains {}", spec.source_value())));
        }
        CacheMap {
            digests,
            more: spec.rounds && round == 0,
            ephemeral: spec.ephemeral,
            deps: deps.collect(),
        }
    }

    /// The right answer to an effect; `None` for cancellations.
    pub fn answer(&mut self, effect: Effect<String>) -> Option<Input<String>> {
        Some(match effect {
            Effect::CacheMap {
                effect,
                vertex,
                round,
            } => {
                let map = self.cache_map(vertex, round);
                Input::MapReady { effect, map }
            }
            Effect::Query { effect, queries, .. } => {
                let found = queries.iter().map(|query| match query.store() {
                    StoreId::LOCAL => self.local.answer(query),
                    store => self
                        .imported
                        .get(&store)
                        .map(|records| records.answer(query))
                        .unwrap_or_default(),
                });
                let found: Vec<_> = found.collect();
                self.told += found.iter().flatten().map(|key| key.results.len()).sum::<usize>();
                Input::KeysFound { effect, found }
            }
            Effect::Checksum { effect, .. } => {
                let digest = digest(format!("content {}", part(self.read[&effect][0])));
                Input::Checksummed {
                    effect,
                    digest: Some(digest),
                }
            }
            Effect::Load { effect, stored, .. } => {
                self.loads += 1;
                let value = self.stored.get(&stored.result).copied();
                let result = value.map(|value| self.new_result(value));
                self.loaded.extend(result);
                Input::Loaded { effect, result }
            }
            Effect::Exec {
                effect,
                vertex,
                record,
                ..
            } => {
                self.executed += 1;
                self.done.insert(vertex);
                let identity = self.identities[&self.names[&vertex]];
                let spec = self.specs[&self.names[&vertex]].clone();
                let output = record.map_or(0, |record| match record.links.first() {
                    Some(link) => link.output,
                    None => usize::from(record.record != RecordId::root(&spec.own_digest(), 0)),
                });
                *self.runs.entry((identity, output)).or_default() += 1;
                let inputs = self.read[&effect].clone();
                let outputs = (0..OUTPUTS).map(|output| {
                    let value = spec.output(output, &inputs);
                    (spec.missing != Some(output)).then(|| self.new_result(value))
                });
                let outputs = outputs.collect();
                Input::Executed { effect, outputs }
            }
            Effect::Cancel { .. } => return None,
            other => panic!("{other:?} needs no answer"),
        })
    }

    /// Answers everything in the order in which it was asked.
    pub fn run(&mut self) {
        while !self.waiting.is_empty() {
            let effect = self.waiting.remove(0);
            if let Some(answer) = self.answer(effect) {
                self.tell(answer);
            }
        }
    }

    pub fn close(&mut self, job: u64) {
        self.tell(Input::CloseJob { job: JobId(job) });
    }

    pub fn take_trace(&mut self) -> String {
        std::mem::take(&mut self.trace).join("\n")
    }
}

pub fn effect_id(effect: &Effect<String>) -> Option<EffectId> {
    match effect {
        Effect::CacheMap { effect, .. }
        | Effect::Query { effect, .. }
        | Effect::Checksum { effect, .. }
        | Effect::Load { effect, .. }
        | Effect::Exec { effect, .. } => Some(*effect),
        _ => None,
    }
}

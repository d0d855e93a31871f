//! The graph of records that an export writes: steps by digest, linked with what identifies their inputs.
//!
//! A step that is added twice with inputs in common is one record; that is how the same step, reached in different ways,
//! becomes one. Everything is linear in the links, up to logarithms.

use std::collections::{BTreeMap, BTreeSet};
use std::time::SystemTime;

use oci::Digest;

use super::config::{ConfigInput, ConfigRecord, wire_index};

/// A record of a [`Chains`].
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct ItemId(usize);

/// One way in which an input is identified: a record, and what is read of it.
pub type ItemLink = (ItemId, Option<Digest>);

/// A result of a record.
#[derive(Clone, Debug)]
pub struct ItemResult<R> {
    /// When it was made.
    pub created_at: SystemTime,
    /// What it consists of.
    pub value: R,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
struct LinkKey {
    input: usize,
    selector: Option<Digest>,
    digest: Digest,
}

/// From a record, by a link, to a record that it leads to. All have a link: none is what comes before them.
type Child = (ItemId, Option<LinkKey>, ItemId);

const FIRST: ItemId = ItemId(0);
const LAST: ItemId = ItemId(usize::MAX);

#[derive(Debug)]
struct Item<R> {
    digest: Digest,
    /// How many links lead on from it.
    children: usize,
    parents: Vec<Vec<ItemLink>>,
    results: Vec<ItemResult<R>>,
    merged: Option<ItemId>,
}

/// Records with results of a type `R`.
#[derive(Debug)]
pub struct Chains<R> {
    items: Vec<Item<R>>,
    roots: BTreeMap<Digest, ItemId>,
    /// Of all records in one: most have a single one, and small sets take much memory.
    children: BTreeSet<Child>,
}

impl<R> Default for Chains<R> {
    fn default() -> Self {
        Self {
            items: Vec::new(),
            roots: BTreeMap::new(),
            children: BTreeSet::new(),
        }
    }
}

impl<R> Chains<R> {
    /// The record that an id stands for now.
    fn find(&self, mut id: ItemId) -> ItemId {
        while let Some(next) = self.items[id.0].merged {
            id = next;
        }
        id
    }

    fn make(&mut self, digest: Digest) -> ItemId {
        self.items.push(Item {
            digest,
            children: 0,
            parents: Vec::new(),
            results: Vec::new(),
            merged: None,
        });
        ItemId(self.items.len() - 1)
    }

    /// Returns the record without inputs of this digest.
    pub fn root(&mut self, digest: Digest) -> ItemId {
        if let Some(known) = self.roots.get(&digest) {
            return *known;
        }
        let made = self.make(digest);
        self.roots.insert(digest, made);
        made
    }

    /// Returns the record without inputs of this digest, if there is one.
    pub fn known_root(&self, digest: &Digest) -> Option<ItemId> {
        self.roots.get(digest).copied()
    }

    /// Adds a step; `None` if an input is not identified by anything. Without inputs it is a root.
    pub fn add(&mut self, digest: Digest, inputs: &[Vec<ItemLink>]) -> Option<ItemId> {
        if inputs.is_empty() {
            return Some(self.root(digest));
        }
        if inputs.iter().any(Vec::is_empty) {
            return None;
        }
        let mut found = self.matching(digest, inputs).into_iter();
        let mut item = match found.next() {
            Some(item) => item,
            None => self.make(digest),
        };
        for other in found {
            item = self.merge(item, other);
        }
        for (input, links) in inputs.iter().enumerate() {
            for (source, selector) in links {
                self.link(*source, *selector, item, input);
            }
        }
        Some(item)
    }

    /// Adds a result to a record.
    pub fn add_result(&mut self, item: ItemId, result: ItemResult<R>) {
        let item = self.find(item);
        self.items[item.0].results.push(result);
    }

    /// Records of a step that each of the inputs leads to.
    pub fn matching(&self, digest: Digest, inputs: &[Vec<ItemLink>]) -> BTreeSet<ItemId> {
        let mut found: Option<BTreeSet<ItemId>> = None;
        for (input, links) in inputs.iter().enumerate() {
            let mut here = BTreeSet::new();
            for (source, selector) in links {
                let key = Some(LinkKey {
                    input,
                    selector: *selector,
                    digest,
                });
                let source = self.find(*source);
                let children = self.children.range((source, key, FIRST)..=(source, key, LAST));
                here.extend(children.map(|(_, _, child)| self.find(*child)));
            }
            found = Some(match found {
                None => here,
                Some(before) => before.intersection(&here).copied().collect(),
            });
            if found.as_ref().is_some_and(BTreeSet::is_empty) {
                break;
            }
        }
        found.unwrap_or_default()
    }

    fn link(&mut self, source: ItemId, selector: Option<Digest>, item: ItemId, input: usize) {
        let source = self.find(source);
        let key = Some(LinkKey {
            input,
            selector,
            digest: self.items[item.0].digest,
        });
        if self.children.insert((source, key, item)) {
            self.items[source.0].children += 1;
            let parents = &mut self.items[item.0].parents;
            if parents.len() <= input {
                parents.resize_with(input + 1, Vec::new);
            }
            parents[input].push((source, selector));
        }
    }

    /// Makes two records one: the smaller goes into the larger.
    fn merge(&mut self, one: ItemId, other: ItemId) -> ItemId {
        let (one, other) = (self.find(one), self.find(other));
        if one == other {
            return one;
        }
        let is_smaller = self.items[one.0].children < self.items[other.0].children;
        let (into, from) = if is_smaller { (other, one) } else { (one, other) };
        let children = self.take_children(from);
        let from_item = &mut self.items[from.0];
        from_item.merged = Some(into);
        let parents = std::mem::take(&mut from_item.parents);
        let results = std::mem::take(&mut from_item.results);
        let item = &mut self.items[into.0];
        for (_, key, child) in children {
            item.children += usize::from(self.children.insert((into, key, child)));
        }
        if item.parents.len() < parents.len() {
            item.parents.resize_with(parents.len(), Vec::new);
        }
        for (known, links) in item.parents.iter_mut().zip(parents) {
            known.extend(links);
        }
        item.results.extend(results);
        into
    }

    fn take_children(&mut self, item: ItemId) -> Vec<Child> {
        let all = (item, None, FIRST)..;
        let own = self
            .children
            .range(all)
            .take_while(|(source, ..)| *source == item);
        let own: Vec<Child> = own.copied().collect();
        for child in &own {
            self.children.remove(child);
        }
        self.items[item.0].children = 0;
        own
    }

    /// The results of a record, newest first.
    pub fn results(&self, item: ItemId) -> Vec<&ItemResult<R>> {
        let mut results: Vec<_> = self.items[self.find(item).0].results.iter().collect();
        results.sort_by_key(|result| std::cmp::Reverse(result.created_at));
        results
    }

    /// Writes the records in the format's order, without results, each with its item.
    ///
    /// Links that close a circle are left out, and so are records that nothing else identifies.
    pub fn records(&self) -> Vec<(ItemId, ConfigRecord)> {
        sorted(self.ordered())
    }

    /// All records that can be identified, inputs before those that use them. Links are taken along if their input came
    /// before; only where records go in circles does not every input.
    fn ordered(&self) -> Vec<Ordered> {
        let mut waiting = self.waiting();
        let mut states: Vec<Option<usize>> = vec![None; self.items.len()];
        let mut ordered: Vec<Ordered> = Vec::new();
        let live = (0..self.items.len()).filter(|id| self.items[*id].merged.is_none());
        let mut complete: BTreeSet<usize> = live.filter(|id| waiting[*id].links == 0).collect();
        let mut possible: BTreeSet<usize> = BTreeSet::new();
        while let Some(next) = complete.pop_first().or_else(|| possible.pop_first()) {
            possible.remove(&next);
            let Some(record) = self.order(ItemId(next), &states, &ordered) else {
                continue;
            };
            states[next] = Some(ordered.len());
            ordered.push(record);
            for (user, input) in std::mem::take(&mut waiting[next].users) {
                let waits = &mut waiting[user];
                waits.links -= 1;
                waits.inputs[input] = false;
                if states[user].is_some() {
                    continue;
                }
                if waits.links == 0 {
                    complete.insert(user);
                } else if waits.inputs.iter().all(|waits| !waits) {
                    possible.insert(user);
                }
            }
        }
        ordered
    }

    /// What each record waits for, and who waits for it.
    fn waiting(&self) -> Vec<Waiting> {
        let mut waiting: Vec<Waiting> = Vec::new();
        waiting.resize_with(self.items.len(), Waiting::default);
        for (id, item) in self
            .items
            .iter()
            .enumerate()
            .filter(|(_, item)| item.merged.is_none())
        {
            waiting[id].inputs = vec![true; item.parents.len()];
            for (input, links) in item.parents.iter().enumerate() {
                waiting[id].links += links.len();
                for (source, _) in links {
                    waiting[self.find(*source).0].users.push((id, input));
                }
            }
        }
        waiting
    }

    fn order(&self, id: ItemId, states: &[Option<usize>], ordered: &[Ordered]) -> Option<Ordered> {
        let item = &self.items[id.0];
        let mut inputs = Vec::with_capacity(item.parents.len());
        for links in &item.parents {
            let done = links.iter().filter_map(|(source, selector)| {
                let index = states[self.find(*source).0]?;
                Some(OrderedLink {
                    selector: selector.map(|selector| selector.to_string()).unwrap_or_default(),
                    digest: ordered[index].digest,
                    shape: ordered[index].shape,
                    index,
                })
            });
            let mut links: Vec<OrderedLink> = done.collect();
            links.sort();
            links.dedup();
            if links.is_empty() {
                return None;
            }
            inputs.push(links);
        }
        let mut shape = oci::Digester::sha256();
        shape.update(item.digest.to_string());
        for links in &inputs {
            shape.update("\n");
            for link in links {
                shape.update(format!("{} {};", link.shape, link.selector));
            }
        }
        Some(Ordered {
            id,
            digest: item.digest,
            inputs,
            shape: shape.finish(),
        })
    }
}

/// What a record waits for before it can be written.
#[derive(Default)]
struct Waiting {
    /// Links whose inputs were not written.
    links: usize,
    /// Per input, whether nothing that identifies it was written.
    inputs: Vec<bool>,
    /// Who waits for this one, and as which input.
    users: Vec<(usize, usize)>,
}

/// A record ready to be written.
struct Ordered {
    id: ItemId,
    digest: Digest,
    inputs: Vec<Vec<OrderedLink>>,
    /// Follows from the record and all behind it: orders records that look alike.
    shape: Digest,
}

#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
struct OrderedLink {
    selector: String,
    digest: Digest,
    shape: Digest,
    index: usize,
}

type OrderKey<'a> = (Digest, usize, Vec<(usize, Vec<(&'a str, Digest)>)>, Digest);

fn order_key(record: &Ordered) -> OrderKey<'_> {
    let inputs = record.inputs.iter().map(|links| {
        let links: Vec<_> = links
            .iter()
            .map(|link| (link.selector.as_str(), link.digest))
            .collect();
        (links.len(), links)
    });
    (record.digest, record.inputs.len(), inputs.collect(), record.shape)
}

fn sorted(ordered: Vec<Ordered>) -> Vec<(ItemId, ConfigRecord)> {
    let mut keyed: Vec<(OrderKey<'_>, usize)> = ordered
        .iter()
        .enumerate()
        .map(|(index, record)| (order_key(record), index))
        .collect();
    keyed.sort();
    let mut positions = vec![0; ordered.len()];
    for (position, (_, index)) in keyed.iter().enumerate() {
        positions[*index] = position;
    }
    let write = |record: &Ordered| {
        let inputs = record.inputs.iter().map(|links| {
            let mut links: Vec<ConfigInput> = links
                .iter()
                .map(|link| ConfigInput {
                    selector: link.selector.clone(),
                    link: wire_index(positions[link.index]),
                })
                .collect();
            links.sort_by(|a, b| a.link.cmp(&b.link).then_with(|| a.selector.cmp(&b.selector)));
            links
        });
        ConfigRecord {
            digest: record.digest.to_string(),
            inputs: inputs.collect(),
            ..ConfigRecord::default()
        }
    };
    keyed
        .iter()
        .map(|(_, index)| (ordered[*index].id, write(&ordered[*index])))
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn digest(name: &str) -> Digest {
        Digest::sha256(name)
    }

    #[test]
    fn a_step_reached_in_two_ways_is_one_record() {
        let mut chains: Chains<()> = Chains::default();
        let (a, b, content) = (
            chains.root(digest("a")),
            chains.root(digest("b")),
            chains.root(digest("c")),
        );
        let first = chains
            .add(digest("run"), &[vec![(a, None), (content, None)]])
            .unwrap();
        let second = chains
            .add(digest("run"), &[vec![(b, None), (content, None)]])
            .unwrap();
        assert_eq!(first, second);
        let other = chains
            .add(digest("run"), &[vec![(b, Some(digest("part")))]])
            .unwrap();
        assert_ne!(first, other);
        let both = chains
            .add(digest("run"), &[vec![(a, None), (b, Some(digest("part")))]])
            .unwrap();
        assert_eq!(chains.find(first), chains.find(other));
        assert_eq!(chains.find(both), chains.find(first));
        let records = chains.records();
        assert_eq!(records.len(), 4);
        let run = records
            .iter()
            .find(|(_, record)| !record.inputs.is_empty())
            .unwrap();
        assert_eq!(run.1.inputs[0].len(), 4);
    }

    #[test]
    fn circles_are_cut() {
        let mut chains: Chains<()> = Chains::default();
        let root = chains.root(digest("root"));
        let first = chains.add(digest("first"), &[vec![(root, None)]]).unwrap();
        let second = chains.add(digest("second"), &[vec![(first, None)]]).unwrap();
        let again = chains
            .add(digest("first"), &[vec![(root, None), (second, None)]])
            .unwrap();
        assert_eq!(first, again);
        let records = chains.records();
        assert_eq!(records.len(), 3);
        assert!(
            records
                .iter()
                .all(|(_, record)| record.inputs.iter().all(|links| links.len() == 1))
        );
        assert_eq!(chains.add(digest("nothing"), &[Vec::new()]), None);
    }

    #[test]
    fn the_order_does_not_depend_on_how_records_came() {
        let build = |names: &[&str]| {
            let mut chains: Chains<()> = Chains::default();
            for name in names {
                let root = chains.root(digest(name));
                chains.add(digest("run"), &[vec![(root, None)]]).unwrap();
            }
            chains
                .records()
                .into_iter()
                .map(|(_, record)| record)
                .collect::<Vec<_>>()
        };
        assert_eq!(build(&["a", "b", "c"]), build(&["c", "a", "b"]));
    }

    #[test]
    fn a_long_chain_takes_no_stack() {
        let mut chains: Chains<()> = Chains::default();
        let mut last = chains.root(digest("root"));
        for number in 0..100_000 {
            last = chains
                .add(digest(&number.to_string()), &[vec![(last, None)]])
                .unwrap();
        }
        assert_eq!(chains.records().len(), 100_001);
    }
}

//! Variables in the order in which they were last set.

use std::cell::OnceCell;
use std::collections::BTreeMap;
use std::rc::Rc;
use std::sync::Arc;

use crate::word::Variables;

/// A set of variables. Clones are cheap until one of them changes.
#[derive(Clone, Debug, Default)]
pub(crate) struct Env(Rc<Entries>);

#[derive(Clone, Debug, Default)]
struct Entries {
    /// When each name was set.
    set_at: BTreeMap<String, u64>,
    by_time: BTreeMap<u64, (String, String)>,
    next: u64,
    bytes: usize,
    /// All of them in order, once they were asked for.
    listed: OnceCell<Arc<Vec<(String, String)>>>,
}

impl Env {
    /// Sets a variable; one that is set already moves to the end.
    pub(crate) fn set(&mut self, name: &str, value: &str) {
        let entries = Rc::make_mut(&mut self.0);
        entries.listed.take();
        let at = entries.next;
        entries.next += 1;
        match entries.set_at.get_mut(name) {
            Some(before) => {
                if let Some((name, value)) = entries.by_time.remove(before) {
                    entries.bytes -= name.len() + value.len() + 2;
                }
                *before = at;
            }
            None => {
                entries.set_at.insert(name.to_owned(), at);
            }
        }
        entries.bytes += name.len() + value.len() + 2;
        entries.by_time.insert(at, (name.to_owned(), value.to_owned()));
    }

    /// Removes a variable.
    pub(crate) fn remove(&mut self, name: &str) {
        let entries = Rc::make_mut(&mut self.0);
        entries.listed.take();
        let at = entries.set_at.remove(name);
        if let Some((name, value)) = at.and_then(|at| entries.by_time.remove(&at)) {
            entries.bytes -= name.len() + value.len() + 2;
        }
    }

    /// Counts the bytes of all assignments.
    pub(crate) fn bytes(&self) -> usize {
        self.0.bytes
    }

    /// Lists names and values in order.
    pub(crate) fn to_pairs(&self) -> Arc<Vec<(String, String)>> {
        let list = || Arc::new(self.0.by_time.values().cloned().collect());
        Arc::clone(self.0.listed.get_or_init(list))
    }
}

impl Variables for Env {
    fn get(&self, name: &str) -> Option<&str> {
        let at = self.0.set_at.get(name)?;
        self.0.by_time.get(at).map(|(_, value)| value.as_str())
    }

    fn names(&self) -> Vec<&str> {
        self.0.by_time.values().map(|(name, _)| name.as_str()).collect()
    }
}

/// Variables of which some are shown with other values.
pub(crate) struct Masked<'a> {
    pub(crate) base: &'a Env,
    pub(crate) mask: Env,
}

impl Variables for Masked<'_> {
    fn get(&self, name: &str) -> Option<&str> {
        self.mask.get(name).or_else(|| self.base.get(name))
    }

    fn names(&self) -> Vec<&str> {
        let base = self
            .base
            .names()
            .into_iter()
            .filter(|name| self.mask.get(name).is_none());
        base.chain(self.mask.names()).collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_variable_set_again_moves_to_the_end() {
        let mut env = Env::default();
        env.set("A", "1");
        env.set("B", "2");
        let before = env.clone();
        env.set("A", "3");
        assert_eq!(env.names(), ["B", "A"]);
        assert_eq!(env.get("A"), Some("3"));
        env.remove("B");
        assert_eq!(env.names(), ["A"]);
        assert_eq!(before.names(), ["A", "B"]);
    }
}

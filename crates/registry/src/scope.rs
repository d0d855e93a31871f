//! Token scopes: `type:name:action,action`, merged by type and name.

use std::collections::{BTreeMap, BTreeSet};

/// A set of scopes in normal form.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(crate) struct Scopes(BTreeMap<String, BTreeSet<String>>);

impl Scopes {
    /// The scope of one repository.
    pub fn repository(path: &str, push: bool) -> Self {
        let mut scopes = Self::default();
        scopes.add(&format!(
            "repository:{path}:{}",
            if push { "pull,push" } else { "pull" }
        ));
        scopes
    }

    /// Adds space-separated scopes as challenges carry them.
    pub fn add(&mut self, text: &str) {
        for scope in text.split(' ').filter(|scope| !scope.is_empty()) {
            // The actions follow the last colon: a name may hold a port.
            let (name, actions) = match scope.rsplit_once(':') {
                Some((name, actions)) if name.contains(':') => (name, actions),
                _ => (scope, ""),
            };
            let set = self.0.entry(name.to_owned()).or_default();
            set.extend(
                actions
                    .split(',')
                    .filter(|action| !action.is_empty())
                    .map(str::to_owned),
            );
        }
    }

    /// Adds another set.
    pub fn merge(&mut self, other: &Self) {
        for (name, actions) in &other.0 {
            self.0
                .entry(name.clone())
                .or_default()
                .extend(actions.iter().cloned());
        }
    }

    /// Whether every action of `other` is here.
    pub fn contains(&self, other: &Self) -> bool {
        other
            .0
            .iter()
            .all(|(name, actions)| self.0.get(name).is_some_and(|mine| actions.is_subset(mine)))
    }

    /// The scopes as sent to a token server, sorted.
    pub fn to_strings(&self) -> Vec<String> {
        self.0
            .iter()
            .map(|(name, actions)| {
                format!(
                    "{name}:{}",
                    actions.iter().map(String::as_str).collect::<Vec<_>>().join(",")
                )
            })
            .collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn merges_by_name() {
        let mut scopes = Scopes::repository("a/b", false);
        scopes.add("repository:a/b:push,pull registry:catalog:* repository:c:pull");
        assert_eq!(
            scopes.to_strings(),
            [
                "registry:catalog:*",
                "repository:a/b:pull,push",
                "repository:c:pull"
            ]
        );
        assert!(scopes.contains(&Scopes::repository("a/b", true)));
        assert!(!Scopes::repository("a/b", false).contains(&scopes));
    }

    #[test]
    fn keeps_ports_in_names() {
        let mut scopes = Scopes::default();
        scopes.add("repository:localhost:5000/x:pull");
        assert_eq!(scopes.to_strings(), ["repository:localhost:5000/x:pull"]);
    }
}

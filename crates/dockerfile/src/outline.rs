//! What a target can be given: arguments, secrets and SSH agents.

use std::collections::{BTreeMap, BTreeSet};

use crate::instruction::Argument;
use crate::position::Range;

/// An argument that was declared.
#[derive(Clone, Debug, Default)]
pub(crate) struct ArgSeen {
    pub(crate) name: String,
    pub(crate) value: String,
    pub(crate) description: String,
    /// Arguments that the default is made of.
    pub(crate) depends: BTreeSet<String>,
    pub(crate) location: Vec<Range>,
}

impl ArgSeen {
    pub(crate) fn new(arg: &Argument, location: &[Range]) -> Self {
        Self {
            name: arg.key.clone(),
            description: arg.doc_comment.clone(),
            location: location.to_vec(),
            ..Self::default()
        }
    }
}

/// A secret or an agent that was asked for.
#[derive(Clone, Debug)]
pub(crate) struct CredentialSeen {
    pub(crate) required: bool,
    pub(crate) location: Vec<Range>,
}

/// What a stage has seen so far.
#[derive(Clone, Debug, Default)]
pub(crate) struct Capture {
    pub(crate) all_args: BTreeMap<String, ArgSeen>,
    pub(crate) used_args: BTreeSet<String>,
    pub(crate) secrets: BTreeMap<String, CredentialSeen>,
    pub(crate) ssh: BTreeMap<String, CredentialSeen>,
}

impl Capture {
    pub(crate) fn new(all_args: BTreeMap<String, ArgSeen>) -> Self {
        Self {
            all_args,
            ..Self::default()
        }
    }

    pub(crate) fn add_secret(&mut self, name: &str, required: bool, location: &[Range]) {
        add(&mut self.secrets, name, required, location);
    }

    pub(crate) fn add_ssh(&mut self, name: &str, required: bool, location: &[Range]) {
        add(&mut self.ssh, name, required, location);
    }

    /// Adds what used arguments are made of, and what those are made of.
    fn close_used(&self) -> BTreeSet<String> {
        let mut used = BTreeSet::new();
        let mut pending: Vec<&String> = self.used_args.iter().collect();
        while let Some(name) = pending.pop() {
            if used.insert(name.clone()) {
                pending.extend(self.all_args.get(name).into_iter().flat_map(|arg| &arg.depends));
            }
        }
        used
    }
}

fn add(known: &mut BTreeMap<String, CredentialSeen>, name: &str, required: bool, location: &[Range]) {
    if !known.contains_key(name) {
        known.insert(
            name.to_owned(),
            CredentialSeen {
                required,
                location: location.to_vec(),
            },
        );
    }
}

/// What a target can be given, in the order of the lines that ask for it.
#[derive(Clone, Debug, Default)]
pub(crate) struct Outline {
    pub(crate) name: String,
    pub(crate) description: String,
    pub(crate) args: Vec<ArgSeen>,
    pub(crate) secrets: Vec<(String, CredentialSeen)>,
    pub(crate) ssh: Vec<(String, CredentialSeen)>,
}

impl Outline {
    /// Puts together what the stages of a target have seen; the target comes first.
    pub(crate) fn new<'c>(
        name: &str,
        description: &str,
        captures: impl IntoIterator<Item = &'c Capture>,
    ) -> Self {
        let mut outline = Self {
            name: name.to_owned(),
            description: description.to_owned(),
            ..Self::default()
        };
        let (mut args, mut secrets, mut ssh) = (BTreeSet::new(), BTreeSet::new(), BTreeSet::new());
        for capture in captures {
            for arg in capture.close_used() {
                if let Some(seen) = capture.all_args.get(&arg)
                    && args.insert(arg)
                {
                    outline.args.push(seen.clone());
                }
            }
            collect(&capture.secrets, &mut secrets, &mut outline.secrets);
            collect(&capture.ssh, &mut ssh, &mut outline.ssh);
        }
        let line = |location: &[Range]| location.first().map_or(0, |range| range.start.line);
        outline.args.sort_by_key(|arg| line(&arg.location));
        outline.secrets.sort_by_key(|(_, seen)| line(&seen.location));
        outline.ssh.sort_by_key(|(_, seen)| line(&seen.location));
        outline
    }
}

fn collect(
    from: &BTreeMap<String, CredentialSeen>,
    seen: &mut BTreeSet<String>,
    into: &mut Vec<(String, CredentialSeen)>,
) {
    for (name, found) in from {
        if seen.insert(name.clone()) {
            into.push((name.clone(), found.clone()));
        }
    }
}

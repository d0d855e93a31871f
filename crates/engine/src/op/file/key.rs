//! What identifies a file op: the digest of its actions, and which parts of its inputs count by content.
//!
//! The digest is BuildKit's (`buildkit.file.v0`): of the actions as Go writes them in JSON. A copied path counts by its
//! content alone: only its last name goes into the digest.

use std::collections::{BTreeMap, BTreeSet};

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use layer::checksum::Selector;
use llb::pb;
use llb::pb::file_action::Action;
use llb::pb::user_opt::User;
use oci::Digest;
use serde::Serialize;

use crate::error::BuildError;
use crate::op::{CacheMap, Dep};

/// Everything about an op's identity that does not depend on its inputs' bytes.
#[derive(Clone, Debug)]
pub(super) struct Key {
    /// What the solver is told.
    pub map: CacheMap,
    /// Per input, what is checksummed; empty: the input does not count by content.
    pub selectors: Vec<Vec<Selector>>,
}

/// Works out the identity of `op` on a vertex with `inputs` inputs.
pub(super) fn key(op: &pb::FileOp, inputs: usize) -> Result<Key, BuildError> {
    let mut reads = Reads::default();
    let mut actions = Vec::with_capacity(op.actions.len());
    let mut indexes = Vec::with_capacity(op.actions.len());
    for action in &op.actions {
        actions.push(STANDARD.encode(action_json(action, inputs, &mut reads)?));
        indexes.push([action.input, action.secondary_input, action.output]);
    }
    let indexes = (!is_plain_chain(&indexes)).then_some(indexes);
    let document = Document {
        kind: "buildkit.file.v0",
        actions,
        indexes,
    };
    let digest = Digest::sha256(&go_json(&document)?);
    let (deps, selectors) = reads.into_deps(inputs)?;
    Ok(Key {
        map: CacheMap {
            digests: vec![digest],
            deps,
            ..CacheMap::default()
        },
        selectors,
    })
}

fn go_json(value: &impl Serialize) -> Result<Vec<u8>, BuildError> {
    oci::json::to_vec(value).map_err(|error| BuildError::internal(format!("file op's key: {error}")))
}

/// Caches of old versions have no indexes for the pattern that nearly all ops follow: each action works on the result
/// of the one before, reads the second input at most, and the last one makes the only output.
fn is_plain_chain(indexes: &[[i64; 3]]) -> bool {
    let count = indexes.len();
    !indexes.is_empty()
        && indexes
            .iter()
            .enumerate()
            .all(|(at, [input, secondary, output])| {
                let expected_input = if at == 0 {
                    Some(0)
                } else {
                    i64::try_from(count + at - 1).ok()
                };
                let expected_output = if at == count - 1 { 0 } else { -1 };
                Some(*input) == expected_input && matches!(secondary, -1 | 1) && *output == expected_output
            })
}

#[derive(Serialize)]
struct Document {
    #[serde(rename = "Type")]
    kind: &'static str,
    #[serde(rename = "Actions")]
    actions: Vec<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    indexes: Option<Vec<[i64; 3]>>,
}

fn action_json(action: &pb::FileAction, inputs: usize, reads: &mut Reads) -> Result<Vec<u8>, BuildError> {
    reads.whole(action.input);
    match &action.action {
        Some(Action::Mkdir(mkdir)) => {
            reads.owner(mkdir.owner.as_ref())?;
            go_json(mkdir)
        }
        Some(Action::Mkfile(mkfile)) => {
            reads.owner(mkfile.owner.as_ref())?;
            go_json(mkfile)
        }
        Some(Action::Symlink(symlink)) => go_json(symlink),
        Some(Action::Rm(rm)) => go_json(rm),
        Some(Action::Copy(copy)) => copy_json(copy, action.secondary_input, inputs, reads),
        None => Err(BuildError::user("invalid file action without a kind")),
    }
}

fn copy_json(
    copy: &pb::FileActionCopy,
    from: i64,
    inputs: usize,
    reads: &mut Reads,
) -> Result<Vec<u8>, BuildError> {
    reads.owner(copy.owner.as_ref())?;
    let Some(index) = usize::try_from(from).ok().filter(|index| *index < inputs) else {
        return go_json(copy);
    };
    let selector = Selector {
        path: copy.src.clone(),
        wildcard: copy.allow_wildcard && has_wildcards(&copy.src),
        follow_links: copy.follow_symlink,
        include: copy.include_patterns.clone(),
        exclude: copy.exclude_patterns.clone(),
        required: copy.required_paths.clone(),
    };
    reads.add(index, selector);
    go_json(&pb::FileActionCopy {
        src: oci::path::base(&copy.src).to_owned(),
        ..copy.clone()
    })
}

/// Whether a path has an unescaped `*`, `?` or `[`.
pub(super) fn has_wildcards(path: &str) -> bool {
    let mut bytes = path.bytes();
    while let Some(byte) = bytes.next() {
        match byte {
            b'\\' => drop(bytes.next()),
            b'*' | b'?' | b'[' => return true,
            _ => {}
        }
    }
    false
}

/// What the actions read of the inputs.
#[derive(Debug, Default)]
struct Reads {
    selectors: BTreeMap<usize, Vec<Selector>>,
    /// Inputs whose whole tree shows in the result.
    whole: BTreeSet<usize>,
}

impl Reads {
    fn whole(&mut self, input: i64) {
        self.whole.extend(usize::try_from(input).ok());
    }

    fn add(&mut self, input: usize, selector: Selector) {
        self.selectors.entry(input).or_default().push(selector);
    }

    fn owner(&mut self, owner: Option<&pb::ChownOpt>) -> Result<(), BuildError> {
        let Some(owner) = owner else { return Ok(()) };
        for (user, file) in [(&owner.user, "/etc/passwd"), (&owner.group, "/etc/group")] {
            if let Some(User::ByName(named)) = user.as_ref().and_then(|user| user.user.as_ref()) {
                let index = usize::try_from(named.input)
                    .map_err(|_| BuildError::user(format!("invalid user index: {}", named.input)))?;
                let selector = Selector {
                    path: file.to_owned(),
                    follow_links: true,
                    ..Selector::default()
                };
                self.add(index, selector);
            }
        }
        Ok(())
    }

    fn into_deps(self, inputs: usize) -> Result<(Vec<Dep>, Vec<Vec<Selector>>), BuildError> {
        let mut deps = vec![Dep::default(); inputs];
        let mut selectors = vec![Vec::new(); inputs];
        for (index, found) in self.selectors {
            let Some(dep) = deps.get_mut(index) else {
                return Err(BuildError::user(format!(
                    "invalid input index {index} in file op with {inputs} inputs"
                )));
            };
            if self.whole.contains(&index) {
                continue;
            }
            let mut paths: Vec<&str> = found.iter().map(|selector| selector.path.as_str()).collect();
            // Falling order, as BuildKit has always had it.
            paths.sort_unstable_by(|a, b| b.cmp(a));
            *dep = Dep {
                selector: Some(Digest::sha256(paths.join("\0").as_bytes())),
                content: true,
            };
            selectors[index] = deduplicated(found);
        }
        Ok((deps, selectors))
    }
}

/// Drops plain paths that another plain path contains, and orders the rest by path.
fn deduplicated(found: Vec<Selector>) -> Vec<Selector> {
    let is_plain = |selector: &Selector| {
        !selector.wildcard && selector.include.is_empty() && selector.exclude.is_empty()
    };
    let mut kept = Vec::with_capacity(found.len());
    for follow_links in [false, true] {
        let paths = found
            .iter()
            .filter(|s| is_plain(s) && s.follow_links == follow_links)
            .map(|s| s.path.as_str());
        for path in outermost(paths) {
            kept.push(Selector {
                path: path.to_owned(),
                follow_links,
                ..Selector::default()
            });
        }
    }
    kept.extend(found.iter().filter(|selector| !is_plain(selector)).cloned());
    kept.sort_by(|a, b| a.path.cmp(&b.path));
    kept
}

/// The paths that lie below no other one, each once, sorted.
pub(crate) fn outermost<'a>(paths: impl Iterator<Item = &'a str>) -> Vec<&'a str> {
    let paths: BTreeSet<&str> = paths.collect();
    let is_covered = |path: &str| {
        path.match_indices('/').any(|(at, _)| {
            let with_slash = &path[..=at];
            paths.contains(&path[..at]) || (with_slash != path && paths.contains(with_slash))
        })
    };
    paths.iter().copied().filter(|path| !is_covered(path)).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn finds_unescaped_wildcards_only() {
        assert!(has_wildcards("a*"));
        assert!(has_wildcards("a[b]"));
        assert!(!has_wildcards("a\\*b"));
        assert!(!has_wildcards("plain\\"));
    }

    #[test]
    fn keeps_the_outermost_paths() {
        assert_eq!(outermost(["/a/b", "/ab", "/a", "/ab"].into_iter()), ["/a", "/ab"]);
        assert_eq!(outermost(["/", "/a"].into_iter()), ["/"]);
    }

    #[test]
    fn recognises_plain_chains() {
        assert!(is_plain_chain(&[[0, 1, 0]]));
        assert!(is_plain_chain(&[[0, 1, -1], [2, -1, 0]]));
        assert!(!is_plain_chain(&[[0, 2, 0]]));
        assert!(!is_plain_chain(&[[-1, 1, 0]]));
        assert!(!is_plain_chain(&[]));
    }

    #[test]
    fn writes_owners_as_go_does() {
        let by = |user| Some(pb::UserOpt { user: Some(user) });
        let owner = pb::ChownOpt {
            user: by(User::ByName(pb::NamedUserOpt {
                name: "a<b".to_owned(),
                input: 0,
            })),
            group: by(User::ById(0)),
        };
        let json = go_json(&owner).expect("serializes");
        let text = String::from_utf8(json).expect("is text");
        assert_eq!(
            text,
            r#"{"user":{"User":{"byName":{"name":"a\u003cb"}}},"group":{"User":{}}}"#
        );
    }
}

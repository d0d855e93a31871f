//! Source policies: rules that allow, deny or replace sources.
//!
//! The rules of one policy are read in order. A rule that converts and changes the source ends the round, and all
//! policies are read again for the changed source. Of the rules that allow or deny, the last that matches counts.

use llb::pb;
use llb::sourcepolicy::{AttrConstraint, AttrMatch, MatchType, Policy, PolicyAction};
use regex::{Regex, RegexBuilder};

use crate::error::{BuildError, ErrorKind};

/// How often one source may be converted.
const MAX_CONVERSIONS: usize = 20;
/// Bytes that a compiled pattern may take.
const MAX_PATTERN_BYTES: usize = 1 << 20;

/// Why a policy cannot be used, or a source not be used under it.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum PolicyError {
    /// A rule without a selector.
    #[error("invalid nil selector in policy")]
    NoSelector,
    /// A rule that converts to nothing.
    #[error("error mutating source policy: missing destination for convert rule")]
    NoDestination,
    /// An action, match type or condition that is not known: never taken for another.
    #[error("source policy: {what} {value}: unknown type")]
    Unknown {
        /// What it is.
        what: &'static str,
        /// Its number.
        value: i32,
    },
    /// A pattern that does not compile.
    #[error("invalid pattern {pattern:?}: {reason}")]
    Pattern {
        /// The pattern.
        pattern: String,
        /// Why.
        reason: String,
    },
    /// Conversions without end.
    #[error("too many mutations on a single source: too many operations")]
    TooMany,
    /// The source is denied.
    #[error("source {identifier:?} denied by policy: source denied by policy")]
    Denied {
        /// The source.
        identifier: String,
    },
}

#[derive(Clone, Debug)]
enum Matcher {
    Exact,
    Wildcard(Regex),
    Regex(Regex),
}

#[derive(Clone, Debug)]
enum Condition {
    Equal,
    NotEqual,
    Matches(Regex),
}

#[derive(Clone, Debug)]
struct Rule {
    action: PolicyAction,
    identifier: String,
    matcher: Matcher,
    constraints: Vec<(AttrConstraint, Condition)>,
    updates: Option<llb::sourcepolicy::Update>,
}

/// Policies, checked and compiled.
#[derive(Clone, Debug, Default)]
pub struct PolicySet(Vec<Vec<Rule>>);

fn compile(pattern: &str, shown: &str) -> Result<Regex, PolicyError> {
    let built = RegexBuilder::new(pattern).size_limit(MAX_PATTERN_BYTES).build();
    built.map_err(|error| PolicyError::Pattern {
        pattern: shown.to_owned(),
        reason: error.to_string(),
    })
}

fn wildcard(text: &str) -> Result<Regex, PolicyError> {
    if text.contains("**") {
        let reason = "invalid wildcard: \"**\"".to_owned();
        return Err(PolicyError::Pattern {
            pattern: text.to_owned(),
            reason,
        });
    }
    let escaped = regex::escape(text).replace("\\*", "(.*)");
    compile(&format!("^{escaped}$"), text)
}

impl Rule {
    fn new(rule: &llb::sourcepolicy::Rule) -> Result<Self, PolicyError> {
        let action = PolicyAction::try_from(rule.action).map_err(|_| PolicyError::Unknown {
            what: "action",
            value: rule.action,
        })?;
        let selector = rule.selector.as_ref().ok_or(PolicyError::NoSelector)?;
        let matcher = match MatchType::try_from(selector.match_type) {
            Ok(MatchType::Exact) => Matcher::Exact,
            Ok(MatchType::Wildcard) => Matcher::Wildcard(wildcard(&selector.identifier)?),
            Ok(MatchType::Regex) => Matcher::Regex(compile(&selector.identifier, &selector.identifier)?),
            Err(_) => {
                return Err(PolicyError::Unknown {
                    what: "match type",
                    value: selector.match_type,
                });
            }
        };
        let mut constraints = Vec::new();
        for constraint in &selector.constraints {
            let condition = match AttrMatch::try_from(constraint.condition) {
                Ok(AttrMatch::Equal) => Condition::Equal,
                Ok(AttrMatch::Notequal) => Condition::NotEqual,
                Ok(AttrMatch::Matches) => Condition::Matches(compile(&constraint.value, &constraint.value)?),
                Err(_) => {
                    return Err(PolicyError::Unknown {
                        what: "attr condition",
                        value: constraint.condition,
                    });
                }
            };
            constraints.push((constraint.clone(), condition));
        }
        if action == PolicyAction::Convert && rule.updates.is_none() {
            return Err(PolicyError::NoDestination);
        }
        let identifier = selector.identifier.clone();
        Ok(Self {
            action,
            identifier,
            matcher,
            constraints,
            updates: rule.updates.clone(),
        })
    }

    fn matches(&self, op: &pb::SourceOp) -> bool {
        let attr = |key: &str| op.attrs.get(key).map_or("", String::as_str);
        let constrained = self
            .constraints
            .iter()
            .all(|(constraint, condition)| match condition {
                Condition::Equal => attr(&constraint.key) == constraint.value,
                Condition::NotEqual => attr(&constraint.key) != constraint.value,
                Condition::Matches(pattern) => pattern.is_match(attr(&constraint.key)),
            });
        let matched = self.identifier == op.identifier
            || match &self.matcher {
                Matcher::Exact => false,
                Matcher::Wildcard(pattern) | Matcher::Regex(pattern) => pattern.is_match(&op.identifier),
            };
        constrained && matched
    }

    /// Changes the source; whether anything differs.
    fn convert(&self, op: &mut pb::SourceOp) -> bool {
        let Some(updates) = &self.updates else {
            return false;
        };
        let destination = if updates.identifier.is_empty() {
            &self.identifier
        } else {
            &updates.identifier
        };
        let destination = match &self.matcher {
            Matcher::Exact => destination.clone(),
            Matcher::Wildcard(pattern) => match pattern.captures(&op.identifier) {
                Some(captures) => {
                    let mut text = String::new();
                    captures.expand(destination, &mut text);
                    text
                }
                None => destination.clone(),
            },
            // What the expression does not match stays.
            Matcher::Regex(pattern) => pattern.replace_all(&op.identifier, destination).into_owned(),
        };
        let mut changed = false;
        if !destination.is_empty() && op.identifier != destination {
            // What a client writes out in full must not undo that another repository is taken.
            if repository(&op.identifier) != repository(&destination) {
                op.attrs.remove(llb::attr::FULL_REMOTE_URL);
            }
            op.identifier = destination;
            changed = true;
        }
        for (key, value) in &updates.attrs {
            if op.attrs.get(key) != Some(value) {
                op.attrs.insert(key.clone(), value.clone());
                changed = true;
            }
        }
        changed
    }
}

/// An identifier without what it names within a repository.
fn repository(identifier: &str) -> &str {
    identifier.split('#').next().unwrap_or_default()
}

impl PolicySet {
    /// Checks policies.
    ///
    /// # Errors
    /// For what is not known or does not compile: a policy that is not understood is not ignored.
    pub fn new(policies: &[Policy]) -> Result<Self, PolicyError> {
        let compiled = policies
            .iter()
            .map(|policy| policy.rules.iter().map(Rule::new).collect());
        compiled.collect::<Result<_, _>>().map(Self)
    }

    /// Returns whether there are no policies.
    pub fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    /// Applies the policies to a source; whether it changed.
    ///
    /// # Errors
    /// [`PolicyError::Denied`], [`PolicyError::TooMany`].
    pub fn apply(&self, op: &mut pb::SourceOp) -> Result<bool, PolicyError> {
        let mut changed = false;
        for _ in 0..=MAX_CONVERSIONS {
            if !self.round(op)? {
                return Ok(changed);
            }
            changed = true;
        }
        Err(PolicyError::TooMany)
    }

    fn round(&self, op: &mut pb::SourceOp) -> Result<bool, PolicyError> {
        for policy in &self.0 {
            let mut denied = false;
            for rule in policy {
                if !rule.matches(op) {
                    continue;
                }
                match rule.action {
                    PolicyAction::Allow => denied = false,
                    PolicyAction::Deny => denied = true,
                    PolicyAction::Convert => {
                        if rule.convert(op) {
                            return Ok(true);
                        }
                    }
                }
            }
            if denied {
                return Err(PolicyError::Denied {
                    identifier: op.identifier.clone(),
                });
            }
        }
        Ok(false)
    }
}

/// The engine's error of a policy.
pub(super) fn policy_error(error: PolicyError) -> BuildError {
    let kind = if matches!(error, PolicyError::Denied { .. }) {
        ErrorKind::Denied
    } else {
        ErrorKind::User
    };
    BuildError::from_source(kind, error)
}

#[cfg(test)]
mod tests {
    use llb::sourcepolicy::{AttrConstraint, Rule as PbRule, Selector, Update};

    use super::*;

    fn rule(action: PolicyAction, identifier: &str, to: Option<&str>) -> PbRule {
        PbRule {
            action: action as i32,
            selector: Some(Selector {
                identifier: identifier.to_owned(),
                ..Selector::default()
            }),
            updates: to.map(|to| Update {
                identifier: to.to_owned(),
                ..Update::default()
            }),
        }
    }

    fn source(identifier: &str) -> pb::SourceOp {
        pb::SourceOp {
            identifier: identifier.to_owned(),
            ..pb::SourceOp::default()
        }
    }

    fn policies(rules: Vec<PbRule>) -> PolicySet {
        PolicySet::new(&[Policy { version: 1, rules }]).unwrap()
    }

    #[test]
    fn the_last_rule_that_allows_or_denies_counts() {
        let all = "docker-image://*";
        let set = policies(vec![
            rule(PolicyAction::Deny, all, None),
            rule(
                PolicyAction::Allow,
                "docker-image://docker.io/library/alpine:*",
                None,
            ),
        ]);
        set.apply(&mut source("docker-image://docker.io/library/alpine:latest"))
            .unwrap();
        let error = set
            .apply(&mut source("docker-image://docker.io/library/busybox:latest"))
            .unwrap_err();
        let error = policy_error(error);
        assert_eq!(error.kind(), ErrorKind::Denied);
        assert!(error.to_string().contains("denied by policy"), "{error}");
    }

    #[test]
    fn conversions_fill_in_what_the_wildcard_matched() {
        let to = "docker-image://docker.io/library/golang:${1}-alpine";
        let set = policies(vec![
            rule(
                PolicyAction::Convert,
                "docker-image://docker.io/library/golang:1.19",
                Some(to),
            ),
            rule(
                PolicyAction::Convert,
                "docker-image://docker.io/library/go:*",
                Some(to),
            ),
        ]);
        let mut op = source("docker-image://docker.io/library/go:1.20");
        assert!(set.apply(&mut op).unwrap());
        assert_eq!(
            op.identifier,
            "docker-image://docker.io/library/golang:1.20-alpine"
        );
    }

    #[test]
    fn expressions_replace_what_they_match() {
        let by_regex = |pattern: &str, to: &str| {
            let mut rule = rule(PolicyAction::Convert, pattern, Some(to));
            rule.selector.as_mut().unwrap().match_type = MatchType::Regex as i32;
            let mut op = source("docker-image://docker.io/library/golang:1.19-alpine3.19");
            policies(vec![rule]).apply(&mut op).unwrap();
            op.identifier
        };
        let image = |rest: &str| format!("docker-image://docker.io/library/{rest}");
        assert_eq!(
            by_regex(r"golang:1\.19-", "golang:1.20-"),
            image("golang:1.20-alpine3.19")
        );
        assert_eq!(by_regex(r"(\d)\.19", "${1}.21"), image("golang:1.21-alpine3.21"));
        assert_eq!(
            by_regex("^.*/(go)lang:.*$", "docker-image://mine/$1:latest"),
            "docker-image://mine/go:latest"
        );
        assert_eq!(by_regex("^golang", "x"), image("golang:1.19-alpine3.19"));
    }

    #[test]
    fn rules_match_by_name_pattern_and_attributes() {
        let denies = |match_type: MatchType, identifier: &str, constraints: &[(&str, &str, AttrMatch)]| {
            let mut rule = rule(PolicyAction::Deny, identifier, None);
            let selector = rule.selector.as_mut().unwrap();
            selector.match_type = match_type as i32;
            let constraint = |(key, value, condition): &(&str, &str, AttrMatch)| AttrConstraint {
                key: (*key).to_owned(),
                value: (*value).to_owned(),
                condition: *condition as i32,
            };
            selector.constraints = constraints.iter().map(constraint).collect();
            let mut op = source("https://host/a.txt");
            op.attrs
                .insert("http.checksum".to_owned(), "sha256:12".to_owned());
            policies(vec![rule]).apply(&mut op).is_err()
        };
        for (match_type, identifier, expected) in [
            (MatchType::Exact, "https://host/a.txt", true),
            (MatchType::Exact, "https://host/*", false),
            (MatchType::Exact, "https://host/a.tx", false),
            (MatchType::Wildcard, "https://host/*.txt", true),
            (MatchType::Wildcard, "https://*", true),
            // A pattern is for the whole name, and a dot for itself.
            (MatchType::Wildcard, "host/*", false),
            (MatchType::Wildcard, "https://host/a?txt", false),
            (MatchType::Wildcard, "https://host/*xtxt", false),
            (MatchType::Regex, "host/a.tx", true),
            (MatchType::Regex, "^host", false),
            (MatchType::Regex, "a[.]t{1}xt$", true),
        ] {
            assert_eq!(
                denies(match_type, identifier, &[]),
                expected,
                "{match_type:?} {identifier}"
            );
        }
        let all = |constraints: &[(&str, &str, AttrMatch)]| denies(MatchType::Wildcard, "*", constraints);
        let key = "http.checksum";
        for (constraint, expected) in [
            ((key, "sha256:12", AttrMatch::Equal), true),
            ((key, "sha256:1", AttrMatch::Equal), false),
            (("absent", "", AttrMatch::Equal), true),
            ((key, "sha256:12", AttrMatch::Notequal), false),
            (("absent", "x", AttrMatch::Notequal), true),
            ((key, "^sha256:[0-9]+$", AttrMatch::Matches), true),
            ((key, "^[0-9]+$", AttrMatch::Matches), false),
        ] {
            assert_eq!(all(&[constraint]), expected, "{constraint:?}");
        }
        // All have to hold.
        let holds = (key, "sha256:12", AttrMatch::Equal);
        assert!(!all(&[holds, ("absent", "x", AttrMatch::Equal)]));
        // They have to hold of a name that is the same, too.
        assert!(!denies(
            MatchType::Exact,
            "https://host/a.txt",
            &[(key, "x", AttrMatch::Equal)]
        ));
    }

    #[test]
    fn conversions_set_attributes() {
        let mut rule = rule(PolicyAction::Convert, "https://host/*", None);
        rule.updates = Some(Update {
            attrs: [("http.checksum".to_owned(), "sha256:34".to_owned())].into(),
            ..Update::default()
        });
        let mut op = source("https://host/a");
        let set = policies(vec![rule]);
        assert!(set.apply(&mut op).unwrap());
        // Without a new name the selector's is meant, as BuildKit has it.
        assert_eq!(op.identifier, "https://host/*");
        assert_eq!(op.attrs["http.checksum"], "sha256:34");
        assert!(!set.apply(&mut op).unwrap(), "it is what it shall be");
    }

    #[test]
    fn another_repository_is_not_the_one_written_out_in_full() {
        let set = policies(vec![
            rule(PolicyAction::Convert, "git://a/x#*", Some("git://b/x#${1}")),
            rule(PolicyAction::Convert, "git://c/x#v1", Some("git://c/x#v2")),
        ]);
        let converted = |identifier: &str| {
            let mut op = source(identifier);
            op.attrs.insert("git.fullurl".to_owned(), "http://x/".to_owned());
            set.apply(&mut op).unwrap();
            (op.identifier, op.attrs.contains_key("git.fullurl"))
        };
        assert_eq!(converted("git://a/x#v1"), ("git://b/x#v1".to_owned(), false));
        assert_eq!(converted("git://c/x#v1"), ("git://c/x#v2".to_owned(), true));
    }

    #[test]
    fn conversions_in_a_circle_end() {
        let set = policies(vec![
            rule(PolicyAction::Convert, "https://a/", Some("https://b/")),
            rule(PolicyAction::Convert, "https://b/", Some("https://a/")),
        ]);
        assert_eq!(set.apply(&mut source("https://a/")), Err(PolicyError::TooMany));
    }

    #[test]
    fn what_is_not_understood_is_refused() {
        let mut bad = rule(PolicyAction::Allow, "x", None);
        bad.action = 9;
        let refused = PolicySet::new(&[Policy {
            version: 1,
            rules: vec![bad],
        }]);
        assert_eq!(
            refused.unwrap_err(),
            PolicyError::Unknown {
                what: "action",
                value: 9
            }
        );
        let no_update = rule(PolicyAction::Convert, "x", None);
        assert!(
            PolicySet::new(&[Policy {
                version: 1,
                rules: vec![no_update]
            }])
            .is_err()
        );
        let wild = rule(PolicyAction::Deny, "a**", None);
        assert!(
            PolicySet::new(&[Policy {
                version: 1,
                rules: vec![wild]
            }])
            .is_err()
        );
    }
}

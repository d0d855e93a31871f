//! `--source-policy-file`: rules for sources, in JSON.

use std::collections::BTreeMap;

use api::pb::sourcepolicy as pb;
use serde::Deserialize;
use serde_json::Value;

use super::SpecError;

#[derive(Default, Deserialize)]
#[serde(default)]
struct Policy {
    version: i64,
    rules: Vec<Rule>,
}

#[derive(Default, Deserialize)]
#[serde(default)]
struct Rule {
    action: Value,
    selector: Option<Selector>,
    updates: Option<Update>,
}

#[derive(Default, Deserialize)]
#[serde(default)]
struct Update {
    identifier: String,
    attrs: BTreeMap<String, String>,
}

#[derive(Default, Deserialize)]
#[serde(default)]
struct Selector {
    identifier: String,
    #[serde(alias = "matchType")]
    match_type: Value,
    constraints: Vec<Constraint>,
}

#[derive(Default, Deserialize)]
#[serde(default)]
struct Constraint {
    key: String,
    value: String,
    condition: Value,
}

/// Reads a policy.
///
/// # Errors
/// For anything but a policy, also for names of enumerations that are not known.
pub fn source_policy(text: &[u8]) -> Result<pb::Policy, SpecError> {
    let policy: Policy =
        serde_json::from_slice(text).map_err(|error| SpecError::invalid(error.to_string()))?;
    let rules: Result<Vec<_>, _> = policy.rules.into_iter().map(rule).collect();
    Ok(pb::Policy {
        version: policy.version,
        rules: rules?,
    })
}

fn rule(rule: Rule) -> Result<pb::Rule, SpecError> {
    let action = number(&rule.action, pb::PolicyAction::from_str_name, "PolicyAction")?;
    pb::PolicyAction::try_from(action)
        .map_err(|_| SpecError::invalid(format!("invalid PolicyAction value: {action}")))?;
    let updates = rule.updates.map(|update| pb::Update {
        identifier: update.identifier,
        attrs: update.attrs,
    });
    Ok(pb::Rule {
        action,
        selector: rule.selector.map(selector).transpose()?,
        updates,
    })
}

fn selector(selector: Selector) -> Result<pb::Selector, SpecError> {
    let match_type = number(&selector.match_type, pb::MatchType::from_str_name, "MatchType")?;
    pb::MatchType::try_from(match_type)
        .map_err(|_| SpecError::invalid(format!("invalid MatchType value: {match_type}")))?;
    let constraint = |constraint: Constraint| {
        let condition = number(&constraint.condition, pb::AttrMatch::from_str_name, "AttrMatch")?;
        pb::AttrMatch::try_from(condition)
            .map_err(|_| SpecError::invalid(format!("invalid AttrMatch value: {condition}")))?;
        Ok(pb::AttrConstraint {
            key: constraint.key,
            value: constraint.value,
            condition,
        })
    };
    let constraints: Result<Vec<_>, SpecError> = selector.constraints.into_iter().map(constraint).collect();
    Ok(pb::Selector {
        identifier: selector.identifier,
        match_type,
        constraints: constraints?,
    })
}

/// Reads an enumeration's value, written as its name or number.
fn number<E: Into<i32>>(
    value: &Value,
    from_name: fn(&str) -> Option<E>,
    what: &str,
) -> Result<i32, SpecError> {
    let known = match value {
        Value::Null => Some(0),
        Value::Number(number) => number.as_i64().and_then(|number| i32::try_from(number).ok()),
        Value::String(name) => from_name(name).map(Into::into),
        _ => None,
    };
    known.ok_or_else(|| SpecError::invalid(format!("unrecognized enum {value} for {what}")))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn reads_rules() {
        let text = br#"{"version":1,"rules":[{"action":"CONVERT","selector":{"identifier":"docker-image://a",
            "match_type":"EXACT","constraints":[{"key":"k","value":"v","condition":1}]},
            "updates":{"identifier":"docker-image://b"}},{"action":"DENY"}]}"#;
        let policy = source_policy(text).unwrap();
        assert_eq!((policy.version, policy.rules.len()), (1, 2));
        assert_eq!(policy.rules[0].action(), pb::PolicyAction::Convert);
        let selector = policy.rules[0].selector.as_ref().unwrap();
        assert_eq!(selector.match_type(), pb::MatchType::Exact);
        assert_eq!(selector.constraints[0].condition, 1);
        assert_eq!(
            policy.rules[0].updates.as_ref().unwrap().identifier,
            "docker-image://b"
        );
        assert_eq!(policy.rules[1].action(), pb::PolicyAction::Deny);
    }

    #[test]
    fn refuses_what_it_does_not_know() {
        assert!(source_policy(br#"{"rules":[{"action":"MAYBE"}]}"#).is_err());
        assert!(source_policy(br#"{"rules":[{"action":99}]}"#).is_err());
        assert!(source_policy(b"[").is_err());
    }
}

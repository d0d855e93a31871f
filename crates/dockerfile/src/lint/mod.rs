//! Checks of a Dockerfile that do not stop a build unless asked to.

pub(crate) mod rules;

use std::cell::RefCell;
use std::collections::BTreeSet;
use std::rc::Rc;

use crate::parser::check_directive;
use crate::position::Range;
use crate::text;

/// One kind of check.
#[derive(Debug, PartialEq, Eq)]
pub(crate) struct Rule {
    pub(crate) name: &'static str,
    pub(crate) description: &'static str,
    /// May be empty.
    pub(crate) url: &'static str,
    /// Off unless asked for.
    pub(crate) experimental: bool,
}

/// Something a check found.
#[derive(Clone, Debug)]
pub(crate) struct Finding {
    pub(crate) rule: &'static Rule,
    pub(crate) message: String,
    pub(crate) location: Vec<Range>,
}

impl Finding {
    /// One line with the rule's name and, if known, the line number.
    pub(crate) fn short(&self) -> String {
        match self.location.first() {
            Some(range) if range.start.line > 0 => {
                format!("{}: {} (line {})", self.rule.name, self.message, range.start.line)
            }
            _ => format!("{}: {}", self.rule.name, self.message),
        }
    }
}

/// Why the value of `# check=` is refused.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub(crate) enum LintOptionError {
    #[error("invalid check option {}", text::quote(.0))]
    Invalid(String),
    #[error("failed to parse check option {}: strconv.ParseBool: parsing {}: invalid syntax", text::quote(.option), text::quote(.value))]
    Bool { option: String, value: String },
}

/// Which checks are wanted.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(crate) struct LintConfig {
    experimental_all: bool,
    experimental: BTreeSet<String>,
    skip_all: bool,
    skip: BTreeSet<String>,
    findings_are_errors: bool,
}

impl LintConfig {
    /// Parses `skip=A,B;experimental=all;error=true`.
    pub(crate) fn parse(text: &str) -> Result<Self, LintOptionError> {
        let mut config = Self::default();
        let text = text.trim();
        if text.is_empty() {
            return Ok(config);
        }
        let names = |value: &str| value.split(',').map(|name| name.trim().to_owned()).collect();
        for part in text.splitn(3, ';') {
            let Some((key, value)) = part.split_once('=') else {
                return Err(LintOptionError::Invalid(part.to_owned()));
            };
            match (key.trim(), value.trim()) {
                ("skip", "all") => config.skip_all = true,
                ("skip", value) => config.skip = names(value),
                ("experimental", "all") => config.experimental_all = true,
                ("experimental", value) => config.experimental = names(value),
                ("error", value) => {
                    config.findings_are_errors =
                        text::parse_bool(value).ok_or_else(|| LintOptionError::Bool {
                            option: part.to_owned(),
                            value: value.to_owned(),
                        })?;
                }
                (key, _) => return Err(LintOptionError::Invalid(key.to_owned())),
            }
        }
        Ok(config)
    }
}

/// Collects findings. Clones share what was found.
#[derive(Clone, Debug)]
pub(crate) struct Linter {
    config: Rc<LintConfig>,
    /// `None` looks for nothing.
    findings: Option<Rc<RefCell<Vec<Finding>>>>,
}

impl Linter {
    pub(crate) fn new(config: LintConfig) -> Self {
        Self {
            config: Rc::new(config),
            findings: Some(Rc::default()),
        }
    }

    /// Makes a linter that looks for nothing.
    pub(crate) fn silent() -> Self {
        Self {
            config: Rc::default(),
            findings: None,
        }
    }

    /// Returns what was found so far.
    pub(crate) fn findings(&self) -> Vec<Finding> {
        self.findings
            .as_ref()
            .map(|findings| findings.borrow().clone())
            .unwrap_or_default()
    }

    /// Counts what was found so far.
    pub(crate) fn count(&self) -> usize {
        self.findings
            .as_ref()
            .map_or(0, |findings| findings.borrow().len())
    }

    /// Returns what it looks for; `None` for nothing.
    pub(crate) fn config(&self) -> Option<&LintConfig> {
        self.findings.as_ref().map(|_| &*self.config)
    }

    /// Adds what was found before.
    pub(crate) fn extend(&self, found: &[Finding]) {
        if let Some(findings) = &self.findings {
            findings.borrow_mut().extend_from_slice(found);
        }
    }

    /// Notes a finding if its rule is wanted.
    pub(crate) fn run(&self, rule: &'static Rule, location: &[Range], message: impl FnOnce() -> String) {
        let Some(findings) = &self.findings else { return };
        let config = &self.config;
        let wanted = if rule.experimental {
            config.experimental_all || config.experimental.contains(rule.name)
        } else {
            !config.skip_all && !config.skip.contains(rule.name)
        };
        if wanted {
            let finding = Finding {
                rule,
                message: message(),
                location: location.to_vec(),
            };
            findings.borrow_mut().push(finding);
        }
    }

    /// Returns a linter that obeys `# check=` in the comments of one instruction.
    pub(crate) fn with_comments(&self, comments: &[String]) -> Self {
        let directive = comments.iter().find_map(|comment| check_directive(comment));
        let Some(Ok(other)) = directive.map(|text| LintConfig::parse(&text)) else {
            return self.clone();
        };
        let mut config = LintConfig::clone(&self.config);
        config.experimental_all |= other.experimental_all;
        config.experimental.extend(other.experimental);
        config.skip_all |= other.skip_all;
        config.skip.extend(other.skip);
        Self {
            config: Rc::new(config),
            findings: self.findings.clone(),
        }
    }

    /// Returns the rules that were hit, if that is to be an error.
    pub(crate) fn violation(&self) -> Option<String> {
        if !self.config.findings_are_errors {
            return None;
        }
        let found = self.findings();
        let names: BTreeSet<&str> = found.iter().map(|finding| finding.rule.name).collect();
        if names.is_empty() {
            None
        } else {
            Some(names.into_iter().collect::<Vec<_>>().join(", "))
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn parses_options() {
        let config = LintConfig::parse("skip=A, B;error=true;experimental=all").unwrap();
        assert!(config.findings_are_errors && config.experimental_all && config.skip.contains("B"));
        assert_eq!(
            LintConfig::parse("x").unwrap_err().to_string(),
            "invalid check option \"x\""
        );
        assert_eq!(
            LintConfig::parse("x=1").unwrap_err().to_string(),
            "invalid check option \"x\""
        );
        assert_eq!(
            LintConfig::parse("error=x").unwrap_err().to_string(),
            "failed to parse check option \"error=x\": strconv.ParseBool: parsing \"x\": invalid syntax"
        );
    }

    #[test]
    fn obeys_comments() {
        let linter = Linter::new(LintConfig::default());
        let quiet = linter.with_comments(&["check=skip=MaintainerDeprecated".into()]);
        quiet.run(&rules::MAINTAINER_DEPRECATED, &[], rules::maintainer_deprecated);
        assert!(linter.findings().is_empty());
        linter.run(
            &rules::MAINTAINER_DEPRECATED,
            &[Range::line(3)],
            rules::maintainer_deprecated,
        );
        assert_eq!(
            quiet.findings()[0].short(),
            "MaintainerDeprecated: Maintainer instruction is deprecated in favor of using label (line 3)"
        );
    }
}

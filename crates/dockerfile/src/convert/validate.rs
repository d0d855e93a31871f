//! Checks that need no operation.

use std::collections::{BTreeMap, BTreeSet};

use oci::{Platform, Reference};

use super::stages::{expand, meta_args};
use crate::env::Env;
use crate::instruction::{Parsed, Stage};
use crate::lint::{Linter, rules};
use crate::position::Range;
use crate::suggest;
use crate::text::{is_lower, is_upper};
use crate::word::{Expanded, Lexer, Variables};

pub(super) fn stage_names(stages: &[Stage], linter: &Linter) {
    let mut seen = BTreeSet::new();
    for stage in stages.iter().filter(|stage| !stage.name.is_empty()) {
        let name = &stage.name;
        if matches!(name.as_str(), "context" | "scratch") {
            linter.run(&rules::RESERVED_STAGE_NAME, &stage.location, || {
                rules::reserved_stage_name(name)
            });
        }
        if !seen.insert(name) {
            linter.run(&rules::DUPLICATE_STAGE_NAME, &stage.location, || {
                rules::duplicate_stage_name(name)
            });
        }
    }
}

/// Checks that all names of instructions are written like most of them are.
pub(super) fn command_casing(stages: &[Stage], linter: &Linter) {
    let names = || {
        stages.iter().flat_map(|stage| {
            let instructions = stage
                .instructions
                .iter()
                .map(|found| (found.name.as_str(), &found.location));
            std::iter::once((stage.keyword.as_str(), &stage.location)).chain(instructions)
        })
    };
    let lower = names().filter(|(name, _)| is_lower(name)).count();
    let upper = names()
        .filter(|(name, _)| !is_lower(name) && is_upper(name))
        .count();
    for (name, location) in names() {
        let wrong = if lower > upper {
            (!is_lower(name)).then_some("lowercase")
        } else {
            (!is_upper(name)).then_some("uppercase")
        };
        if let Some(casing) = wrong {
            let message = || rules::consistent_instruction_casing(name, casing);
            linter.run(&rules::CONSISTENT_INSTRUCTION_CASING, location, message);
        }
    }
}

/// Checks that base images are images without any build argument given.
pub(super) fn base_images(parsed: &Parsed, lexer: &Lexer, defaults: &Env, linter: &Linter) {
    let Ok((args, _)) = meta_args(defaults.clone(), lexer, &parsed.meta_args, &BTreeMap::new()) else {
        return;
    };
    for stage in &parsed.stages {
        let Ok(found) = expand(lexer, &stage.base_name, &args) else {
            return;
        };
        if Reference::parse(&found.text).is_err() {
            let message = || rules::invalid_default_arg_in_from(&stage.base_name);
            linter.run(&rules::INVALID_DEFAULT_ARG_IN_FROM, &stage.location, message);
        }
    }
}

pub(super) fn undeclared_args(
    declared: &BTreeSet<String>,
    unmatched: &BTreeSet<String>,
    location: &[Range],
    linter: &Linter,
) {
    for name in unmatched.difference(declared) {
        let message =
            || rules::undefined_arg_in_from(name, suggest::search(name, declared, false).as_deref());
        linter.run(&rules::UNDEFINED_ARG_IN_FROM, location, message);
    }
}

pub(super) fn redundant_platform(
    written: &str,
    found: &Expanded,
    location: &[Range],
    args: &Env,
    linter: &Linter,
) {
    const TARGET: &str = "TARGETPLATFORM";
    let only_target =
        found.unmatched.is_empty() && found.matched.len() == 1 && found.matched.contains(TARGET);
    if only_target && args.get(TARGET).unwrap_or_default() == found.text {
        linter.run(&rules::REDUNDANT_TARGET_PLATFORM, location, || {
            rules::redundant_target_platform(written)
        });
    }
}

pub(super) fn constant_platform(stage: &str, found: &Expanded, location: &[Range], linter: &Linter) {
    if !found.matched.is_empty() || !found.unmatched.is_empty() {
        return;
    }
    let Ok(platform) = Platform::parse(&found.text) else {
        return;
    };
    if !stage.contains(&platform.os) && !stage.contains(&platform.architecture) {
        let message = || rules::from_platform_flag_const_disallowed(&found.text);
        linter.run(&rules::FROM_PLATFORM_FLAG_CONST_DISALLOWED, location, message);
    }
}

pub(super) fn base_image_platform(
    name: &str,
    expected: &Platform,
    actual: &Platform,
    location: &[Range],
    linter: &Linter,
) {
    if expected.os != actual.os || expected.architecture != actual.architecture {
        let message = || {
            let shown = |platform: &Platform| platform.normalized().format_all();
            rules::invalid_base_image_platform(name, &shown(expected), &shown(actual))
        };
        linter.run(&rules::INVALID_BASE_IMAGE_PLATFORM, location, message);
    }
}

const SECRET_WORDS: [&str; 10] = [
    "apikey",
    "auth",
    "credential",
    "credentials",
    "key",
    "passwd",
    "password",
    "pword",
    "secret",
    "token",
];
const HARMLESS_WORDS: [&str; 3] = ["file", "public", "version"];

/// Warns of names that look like those of secrets.
pub(super) fn secret_name(instruction: &str, name: &str, location: &[Range], linter: &Linter) {
    let lower = name.to_lowercase();
    let has = |words: &[&str]| lower.split('_').any(|part| words.contains(&part));
    if has(&SECRET_WORDS) && !has(&HARMLESS_WORDS) {
        let message = || rules::secrets_used_in_arg_or_env(instruction, name);
        linter.run(&rules::SECRETS_USED_IN_ARG_OR_ENV, location, message);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::lint::LintConfig;

    #[test]
    fn tells_secrets_from_others() {
        let warns = |name: &str| {
            let linter = Linter::new(LintConfig::default());
            secret_name("ARG", name, &[], &linter);
            !linter.findings().is_empty()
        };
        for name in [
            "api_key",
            "DATABASE_PASSWORD",
            "GITHUB_TOKEN",
            "secret_MESSAGE",
            "AUTH",
        ] {
            assert!(warns(name), "{name}");
        }
        for name in ["monkey", "public_key", "KEY_FILE", "TOKENS"] {
            assert!(!warns(name), "{name}");
        }
    }
}

//! Requests that no honest client makes, for a definition that is as it should be.

use anyhow::Result;
use api::pb::control::{CacheOptions, CacheOptionsEntry, Exporter, SolveRequest};
use llb::sourcepolicy::{Policy, Rule, Selector};

use super::client::{Files, name, request};
use super::ops::{definition, mkfile};
use super::yard::{End, MARK, Yard};
use crate::e2e::fixture::Lab;

/// What is spoiled of a request.
struct Case {
    name: &'static str,
    spoil: fn(&mut SolveRequest),
    end: End,
}

const fn refused(name: &'static str, spoil: fn(&mut SolveRequest), parts: &'static [&'static str]) -> Case {
    Case {
        name,
        spoil,
        end: End::Refused(parts),
    }
}

const fn built(name: &'static str, spoil: fn(&mut SolveRequest)) -> Case {
    Case {
        name,
        spoil,
        end: End::Built,
    }
}

fn long() -> String {
    "n".repeat(1_500_000)
}

fn entry() -> CacheOptionsEntry {
    CacheOptionsEntry {
        r#type: "evil".to_owned(),
        ..CacheOptionsEntry::default()
    }
}

fn policy(action: i32, match_type: i32) -> Policy {
    let selector = Selector {
        identifier: "*".to_owned(),
        match_type,
        ..Selector::default()
    };
    Policy {
        version: 1,
        rules: vec![Rule {
            action,
            selector: Some(selector),
            ..Rule::default()
        }],
    }
}

const CASES: &[Case] = &[
    refused(
        "a frontend that nobody knows",
        |request| {
            request.definition = None;
            request.frontend = "evil.v0".to_owned();
        },
        &["evil.v0"],
    ),
    refused(
        "a frontend with a name of a megabyte",
        |request| {
            request.definition = None;
            request.frontend = long();
        },
        &["nnnn"],
    ),
    refused(
        "an exporter that nobody knows",
        |request| {
            request.exporters = vec![Exporter {
                r#type: "evil".to_owned(),
                ..Exporter::default()
            }];
        },
        &["evil"],
    ),
    refused(
        "a cache of unknown kind to export to",
        |request| {
            request.cache = Some(CacheOptions {
                exports: vec![entry()],
                ..CacheOptions::default()
            });
        },
        &["evil"],
    ),
    refused(
        "a right that nobody knows",
        |request| request.entitlements = vec!["evil".to_owned()],
        &["evil"],
    ),
    refused(
        "a policy that does what nobody knows",
        |request| request.source_policy = Some(policy(99, 0)),
        &["99"],
    ),
    refused(
        "a policy that matches as nobody knows",
        |request| request.source_policy = Some(policy(0, 77)),
        &["77"],
    ),
    built("a name that is a path", |request| {
        request.r#ref = format!("../../../../../../tmp/{MARK}-{}", request.r#ref);
    }),
    built("a name with a newline", |request| {
        request.r#ref.push_str("\nx\u{1b}[2J")
    }),
    built("a session that there is not", |request| request.session = long()),
];

/// Sends them all.
pub fn run(lab: &Lab) -> Result<()> {
    let mut yard = Yard::open(lab)?;
    for case in CASES {
        let mut request = request(definition(&[mkfile(&name("file"), b"x")]));
        (case.spoil)(&mut request);
        let is_sessionless = !request.session.is_empty();
        yard.case(case.name, case.end, |yard| {
            if is_sessionless {
                yard.client.solve(request)
            } else {
                yard.client.solve_with(Files::new(Vec::new()), request)
            }
        });
    }
    yard.close()
}

//! Source policies of a build, from a file of the client.

use std::fs;
use std::path::Path;
use std::process::Command;

use anyhow::Result;

use super::fixture::{Daemon, Lab, expect, fail, succeed};
use super::{Need, Scenario};

/// This file's scenarios.
pub const SCENARIOS: &[Scenario] = &[Scenario {
    name: "source-policies",
    needs: &[Need::Root],
    run: policies,
}];

/// `buildctl build` of a context with rules, which are written as JSON; `@R@` is the registry.
fn with_rules(lab: &Lab, daemon: &Daemon<'_>, context: &Path, rules: &str) -> Result<Command> {
    let file = lab.dir().join("policy.json");
    fs::write(
        &file,
        format!("{{\"rules\":[{rules}]}}").replace("@R@", lab.registry()),
    )?;
    let mut build = daemon.buildctl_build(context);
    build.arg(format!("--source-policy-file={}", file.display()));
    Ok(build)
}

fn policies(lab: &Lab) -> Result<()> {
    let daemon = lab.daemon()?;
    lab.move_tag(7)?;
    let dockerfile = "FROM @BASE@\nRUN echo \"number $(cat /etc/number 2>/dev/null || echo none).\"\n";
    let context = lab.context("c", &[("Dockerfile", dockerfile)])?;
    let denied = [
        r#"{"action":"DENY","selector":{"identifier":"docker-image://@R@/library/busybox:latest","match_type":"EXACT"}}"#,
        r#"{"action":"DENY","selector":{"identifier":"docker-image://*/library/*"}}"#,
        r#"{"action":"DENY","selector":{"identifier":"busybox:l[a-z]+st","match_type":"REGEX"}}"#,
        r#"{"action":"ALLOW","selector":{"identifier":"docker-image://*"}},{"action":"DENY","selector":{"identifier":"*busybox*"}}"#,
        r#"{"action":"DENY","selector":{"identifier":"*","constraints":[{"key":"image.checksum","value":"x","condition":"NOTEQUAL"}]}}"#,
    ];
    for rules in denied {
        let (_, message) = fail(&mut with_rules(lab, &daemon, &context, rules)?)?;
        expect(&message, "denied by policy")?;
    }
    let built = [
        (
            r#"{"action":"DENY","selector":{"identifier":"docker-image://@R@/library/*","match_type":"EXACT"}}"#,
            "number none.",
        ),
        (
            r#"{"action":"DENY","selector":{"identifier":"^busybox","match_type":"REGEX"}}"#,
            "number none.",
        ),
        (
            r#"{"action":"DENY","selector":{"identifier":"*"}},{"action":"ALLOW","selector":{"identifier":"*busybox*"}},
               {"action":"ALLOW","selector":{"identifier":"local://*"}}"#,
            "number none.",
        ),
        (
            r#"{"action":"DENY","selector":{"identifier":"docker-image://*","constraints":[{"key":"image.checksum","value":"^sha256:","condition":"MATCHES"}]}}"#,
            "number none.",
        ),
        (
            r#"{"action":"CONVERT","selector":{"identifier":"docker-image://@R@/library/busybox:latest","match_type":"EXACT"},
                "updates":{"identifier":"docker-image://@R@/library/busybox:moving"}}"#,
            "number 7.",
        ),
        (
            r#"{"action":"CONVERT","selector":{"identifier":"docker-image://*:latest"},
                "updates":{"identifier":"docker-image://${1}:moving"}}"#,
            "number 7.",
        ),
        // Only what the expression matches is replaced.
        (
            r#"{"action":"CONVERT","selector":{"identifier":":(la)test","match_type":"REGEX"},"updates":{"identifier":":moving"}}"#,
            "number 7.",
        ),
    ];
    for (rules, shown) in built {
        let told = succeed(with_rules(lab, &daemon, &context, rules)?.arg("--no-cache"))?;
        expect(&told, shown)?;
    }
    let checksum = format!(
        r#"{{"action":"CONVERT","selector":{{"identifier":"docker-image://@R@/library/busybox:latest"}},"updates":{{"attrs":{{"image.checksum":"sha256:{}"}}}}}}"#,
        "0".repeat(64)
    );
    let (_, message) = fail(&mut with_rules(lab, &daemon, &context, &checksum)?)?;
    expect(&message, "does not match expected checksum")
}

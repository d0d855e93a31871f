//! Questions about a Dockerfile that build nothing: outline, targets, lint, its LLB, and what can be asked at all.

use std::sync::Arc;

use llb::SourceMap;
use llb::pb;
use oci::json::to_vec_indent;
use serde::Serialize;

use crate::context::{Contexts, Entrypoint};
use crate::convert::{Job, convert, lint_config, read, wire_ranges};
use crate::error::{ConvertError, Progress, Stop};
use crate::frontend::{Metadata, merge_ranges, wire_source};
use crate::lint::{Finding, Linter};
use crate::outline::Outline;
use crate::position::Range;
use crate::print_source::Printer;
use crate::table::table;
use crate::{convert_llb, raw};

const INDENT: &str = "  ";

#[derive(Serialize)]
struct Description {
    name: &'static str,
    version: &'static str,
    #[serde(rename = "type")]
    kind: &'static str,
    description: &'static str,
    opts: Option<Vec<Named>>,
    inputs: Option<Vec<Named>>,
    metadata: Option<Vec<Named>>,
    refs: Option<Vec<Named>>,
}

#[derive(Serialize)]
struct Named {
    name: &'static str,
    description: &'static str,
}

/// Answers a subrequest. The linter has what is to be warned of besides, also if there is no answer.
pub(crate) fn answer(
    name: &str,
    entrypoint: &Entrypoint,
    text: &str,
    map: &Arc<SourceMap>,
    contexts: &Contexts<'_>,
) -> (Progress<Metadata>, Linter) {
    let job = |linter, all_stages| Job {
        text,
        contexts,
        source_map: map,
        platform: None,
        linter,
        all_stages,
    };
    let (linter, config_error) = match lint_config(text, contexts.options.check.as_ref()) {
        Ok(config) => (Linter::new(config), None),
        Err(stop) => (Linter::silent(), Some(stop)),
    };
    let converted = |all_stages| match config_error {
        Some(stop) => Err(stop),
        None => convert(job(linter.clone(), all_stages)),
    };
    let metadata = match name {
        "frontend.subrequests.describe" => describe(),
        "frontend.outline" => converted(false).and_then(|done| outline(&done.outline, entrypoint)),
        "frontend.targets" => targets(text, entrypoint),
        "frontend.lint" => {
            let result = converted(contexts.options.target.is_empty()).map(|_| ());
            // The report has the findings.
            return (lint_report(&linter.findings(), result, map), Linter::silent());
        }
        "frontend.convertllb" => converted(false).and_then(|done| {
            let definition = done.definition()?;
            Ok(Metadata::from([
                ("result.json".to_owned(), convert_llb::print(&definition)?),
                ("version".to_owned(), b"0.1.0".to_vec()),
            ]))
        }),
        _ => Err(ConvertError::Subrequest(name.to_owned()).into()),
    };
    (metadata, linter)
}

fn json<T: Serialize>(value: &T) -> Progress<Vec<u8>> {
    let json = to_vec_indent(value, INDENT).map_err(|error| ConvertError::Json(error.to_string()))?;
    Ok(match String::from_utf8(json) {
        Ok(text) => raw::json(text).into_bytes(),
        Err(error) => error.into_bytes(),
    })
}

/// Longest report as text. Each finding shows its lines, of which a long instruction with many findings has too many; an
/// answer of more than this does not fit into a message anyway.
const MAX_REPORT_MIB: usize = 16;

fn metadata<T: Serialize>(value: &T, text: String) -> Progress<Metadata> {
    Ok(Metadata::from([
        ("result.json".to_owned(), json(value)?),
        ("result.txt".to_owned(), raw::shown(text).into_bytes()),
        ("version".to_owned(), b"1.0.0".to_vec()),
    ]))
}

fn describe() -> Progress<Metadata> {
    let named = |name, description| Named { name, description };
    let results = || Some(vec![named("result.json", ""), named("result.txt", "")]);
    let request = |name, description, opts| Description {
        name,
        version: "1.0.0",
        kind: "rpc",
        description,
        opts,
        inputs: None,
        metadata: results(),
        refs: None,
    };
    let all = [
        request(
            "frontend.outline",
            "List all parameters current build target supports",
            Some(vec![named("target", "Target build stage")]),
        ),
        request(
            "frontend.targets",
            "List all targets current build supports",
            Some(Vec::new()),
        ),
        request(
            "frontend.subrequests.describe",
            "List available subrequest types",
            None,
        ),
    ];
    let mut rows = vec![["NAME", "VERSION", "DESCRIPTION"].map(str::to_owned).to_vec()];
    rows.extend(all.iter().map(|request| {
        let name = request.name.strip_prefix("frontend.").unwrap_or(request.name);
        [name, request.version, request.description]
            .map(str::to_owned)
            .to_vec()
    }));
    metadata(&all, table(&rows, 1))
}

fn location(ranges: &[Range]) -> Option<pb::Location> {
    (!ranges.is_empty()).then(|| pb::Location {
        source_index: 0,
        ranges: wire_ranges(ranges),
    })
}

fn is_false(value: &bool) -> bool {
    !value
}

/// A file's content, as JSON has bytes.
struct Data<'a>(&'a [u8]);

impl Serialize for Data<'_> {
    fn serialize<S: serde::Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        use base64::Engine as _;
        serializer.serialize_str(&base64::engine::general_purpose::STANDARD.encode(self.0))
    }
}

#[derive(Serialize)]
struct OutlineJson<'a> {
    #[serde(skip_serializing_if = "str::is_empty")]
    name: &'a str,
    #[serde(skip_serializing_if = "str::is_empty")]
    description: &'a str,
    #[serde(skip_serializing_if = "Vec::is_empty")]
    args: Vec<ArgJson<'a>>,
    #[serde(skip_serializing_if = "Vec::is_empty")]
    secrets: Vec<CredentialJson<'a>>,
    #[serde(skip_serializing_if = "Vec::is_empty")]
    ssh: Vec<CredentialJson<'a>>,
    sources: [Data<'a>; 1],
}

#[derive(Serialize)]
struct ArgJson<'a> {
    name: &'a str,
    #[serde(skip_serializing_if = "str::is_empty")]
    description: &'a str,
    #[serde(skip_serializing_if = "str::is_empty")]
    value: &'a str,
    #[serde(skip_serializing_if = "Option::is_none")]
    location: Option<pb::Location>,
}

#[derive(Serialize)]
struct CredentialJson<'a> {
    name: &'a str,
    #[serde(skip_serializing_if = "is_false")]
    required: bool,
    #[serde(skip_serializing_if = "Option::is_none")]
    location: Option<pb::Location>,
}

fn outline(outline: &Outline, entrypoint: &Entrypoint) -> Progress<Metadata> {
    let credential =
        |(name, seen): &'_ (String, crate::outline::CredentialSeen)| -> (String, bool, Option<pb::Location>) {
            (name.clone(), seen.required, location(&seen.location))
        };
    let secrets: Vec<_> = outline.secrets.iter().map(credential).collect();
    let ssh: Vec<_> = outline.ssh.iter().map(credential).collect();
    let arg = |arg: &'_ crate::outline::ArgSeen| location(&arg.location);
    let args = outline.args.iter().map(|seen| ArgJson {
        name: &seen.name,
        description: &seen.description,
        value: &seen.value,
        location: arg(seen),
    });
    let value = OutlineJson {
        name: &outline.name,
        description: &outline.description,
        args: args.collect(),
        secrets: secrets.iter().map(credential_json).collect(),
        ssh: ssh.iter().map(credential_json).collect(),
        sources: [Data(&entrypoint.data)],
    };
    metadata(&value, outline_text(&value))
}

fn credential_json((name, required, location): &(String, bool, Option<pb::Location>)) -> CredentialJson<'_> {
    CredentialJson {
        name,
        required: *required,
        location: location.clone(),
    }
}

fn outline_text(outline: &OutlineJson<'_>) -> String {
    let mut text = String::new();
    if !outline.name.is_empty() || !outline.description.is_empty() {
        let name = if outline.name.is_empty() {
            "(default)"
        } else {
            outline.name
        };
        let mut rows = vec![vec!["TARGET:".to_owned(), name.to_owned()]];
        if !outline.description.is_empty() {
            rows.push(vec!["DESCRIPTION:".to_owned(), outline.description.to_owned()]);
        }
        text.push_str(&table(&rows, 1));
        text.push('\n');
    }
    if !outline.args.is_empty() {
        let mut rows = vec![["BUILD ARG", "VALUE", "DESCRIPTION"].map(str::to_owned).to_vec()];
        rows.extend(
            outline
                .args
                .iter()
                .map(|arg| [arg.name, arg.value, arg.description].map(str::to_owned).to_vec()),
        );
        text.push_str(&table(&rows, 3));
        text.push('\n');
    }
    for (title, credentials) in [("SECRET", &outline.secrets), ("SSH", &outline.ssh)] {
        if !credentials.is_empty() {
            let mut rows = vec![[title, "REQUIRED"].map(str::to_owned).to_vec()];
            let required = |required| {
                if required {
                    "true".to_owned()
                } else {
                    String::new()
                }
            };
            rows.extend(
                credentials
                    .iter()
                    .map(|found| vec![found.name.to_owned(), required(found.required)]),
            );
            text.push_str(&table(&rows, 3));
            text.push('\n');
        }
    }
    text
}

#[derive(Serialize)]
struct TargetsJson<'a> {
    targets: Option<Vec<TargetJson>>,
    sources: [Data<'a>; 1],
}

#[derive(Serialize)]
struct TargetJson {
    #[serde(skip_serializing_if = "String::is_empty")]
    name: String,
    #[serde(skip_serializing_if = "is_false")]
    default: bool,
    #[serde(skip_serializing_if = "String::is_empty")]
    description: String,
    #[serde(skip_serializing_if = "String::is_empty")]
    base: String,
    #[serde(skip_serializing_if = "String::is_empty")]
    platform: String,
    #[serde(skip_serializing_if = "Option::is_none")]
    location: Option<pb::Location>,
}

fn targets(text: &str, entrypoint: &Entrypoint) -> Progress<Metadata> {
    let (parsed, _) = read(text, &Linter::silent())?;
    let count = parsed.stages.len();
    let targets = parsed
        .stages
        .into_iter()
        .enumerate()
        .map(|(at, stage)| TargetJson {
            name: stage.name,
            default: at + 1 == count,
            description: stage.doc_comment,
            base: stage.base_name,
            platform: stage.platform,
            location: location(&stage.location),
        });
    let targets: Vec<TargetJson> = targets.collect();
    let mut rows = vec![["TARGET", "DESCRIPTION"].map(str::to_owned).to_vec()];
    rows.extend(targets.iter().map(|target| {
        let name = match (target.name.as_str(), target.default) {
            ("", true) => "(default)".to_owned(),
            (name, true) => format!("{name} (default)"),
            (name, false) => name.to_owned(),
        };
        vec![name, target.description.clone()]
    }));
    let shown = table(&rows, 1);
    metadata(
        &TargetsJson {
            targets: (count > 0).then_some(targets),
            sources: [Data(&entrypoint.data)],
        },
        shown,
    )
}

#[derive(Serialize)]
struct LintJson {
    warnings: Option<Vec<WarningJson>>,
    sources: [pb::SourceInfo; 1],
    #[serde(rename = "buildError", skip_serializing_if = "Option::is_none")]
    error: Option<ErrorJson>,
}

#[derive(Serialize)]
#[serde(rename_all = "camelCase")]
struct WarningJson {
    rule_name: &'static str,
    description: &'static str,
    #[serde(skip_serializing_if = "str::is_empty")]
    url: &'static str,
    detail: String,
    location: pb::Location,
}

#[derive(Serialize)]
struct ErrorJson {
    message: String,
    location: pb::Location,
}

fn lint_report(findings: &[Finding], result: Progress<()>, map: &Arc<SourceMap>) -> Progress<Metadata> {
    let error = match result {
        Ok(()) => None,
        Err(Stop::Pending) => return Err(Stop::Pending),
        Err(Stop::Failed(error)) => {
            let ranges = wire_ranges(&merge_ranges(&error.locations()));
            Some(ErrorJson {
                message: error.to_string(),
                location: pb::Location {
                    source_index: 0,
                    ranges,
                },
            })
        }
    };
    let status = if findings.is_empty() && error.is_none() {
        b"0"
    } else {
        b"1"
    };
    let source = wire_source(map);
    let mut sorted: Vec<&Finding> = findings.iter().collect();
    sorted.sort_by(|one, two| match (one.location.first(), two.location.first()) {
        (None, None) => one.rule.name.cmp(two.rule.name),
        (one, two) => one
            .map(|range| range.start.line)
            .cmp(&two.map(|range| range.start.line)),
    });
    let mut text = String::new();
    let printer = Printer::new(&source);
    for finding in sorted {
        let url = if finding.rule.url.is_empty() {
            String::new()
        } else {
            format!(" - {}", finding.rule.url)
        };
        text.push_str(&format!(
            "\nWARNING: {}{url}\n{}\n",
            finding.rule.name, finding.message
        ));
        text.push_str(&printer.print(&finding.location));
        if text.len() > MAX_REPORT_MIB << 20 {
            return Err(ConvertError::ReportTooLarge(MAX_REPORT_MIB).into());
        }
    }
    let warning = |finding: &Finding| WarningJson {
        rule_name: finding.rule.name,
        description: finding.rule.description,
        url: finding.rule.url,
        detail: finding.message.clone(),
        location: pb::Location {
            source_index: 0,
            ranges: wire_ranges(&finding.location),
        },
    };
    let warnings = (!findings.is_empty()).then(|| findings.iter().map(warning).collect());
    let mut metadata = metadata(
        &LintJson {
            warnings,
            sources: [source],
            error,
        },
        text,
    )?;
    metadata.insert("result.statuscode".to_owned(), status.to_vec());
    Ok(metadata)
}

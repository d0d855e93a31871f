//! `build`.

use std::collections::BTreeMap;
use std::io::{IsTerminal as _, Write as _};

use tonic::transport::Channel;

use super::args::BuildArgs;
use super::context::{Context, shared_key};
use crate::failure::Failure;
use crate::progress::event::VertexWarning;
use crate::progress::{self, Mode};
use crate::solve::Build;
use crate::spec::{self, Destination, Output};
use crate::{metadata, oci_index, run_build};

/// A build that can start, with what lives as long as it does.
pub(super) struct Prepared {
    build: Build,
    mode: Mode,
    _context: Context,
}

pub(super) fn prepare(args: &BuildArgs) -> Result<Prepared, Failure> {
    let env = |name: &str| std::env::var(name).ok();
    let mode = if args.quiet {
        Mode::Quiet
    } else {
        args.progress
            .clone()
            .or_else(|| env("BUILDKIT_PROGRESS"))
            .unwrap_or_default()
            .parse()?
    };
    let mut context = Context::find(&args.context, args.file.as_deref())?;
    for named in &args.build_context {
        context.add_named(named)?;
    }
    let mut options = options(args)?;
    options.extend(context.options.clone());
    spec::allow(&args.allow)?;
    let exports: Result<Vec<_>, _> = args
        .cache_to
        .iter()
        .map(String::as_str)
        .chain(inline_cache(&options))
        .map(|cache| spec::cache_export("--cache-to", cache, env))
        .collect();
    let imports: Result<Vec<_>, _> = args
        .cache_from
        .iter()
        .map(|cache| spec::cache_import("--cache-from", cache, env))
        .collect();
    let build = Build {
        id: crate::ids::new_id(),
        frontend: "dockerfile.v0".to_owned(),
        options,
        definition: None,
        outputs: outputs(args)?,
        cache_exports: exports?,
        cache_imports: imports?,
        directories: context.directories.clone(),
        layouts: context.layouts.clone(),
        secrets: spec::secrets(&args.secret, |name| std::env::var_os(name).is_some())?,
        agents: spec::agents(&args.ssh)?,
        entitlements: entitlements(args),
        source_policy: None,
        proxy_network: false,
        shared_key: shared_key(&context.origin),
        uploads: context.uploads.clone(),
        token_servers: BTreeMap::new(),
        explain: args.explain,
    };
    Ok(Prepared {
        build,
        mode,
        _context: context,
    })
}

/// The cache export that a build argument asks for, as other clients have it. A second one of its kind is ignored.
fn inline_cache(options: &BTreeMap<String, String>) -> Option<&'static str> {
    let asked = options.get("build-arg:BUILDKIT_INLINE_CACHE")?;
    spec::go_bool(asked).unwrap_or(false).then_some("type=inline")
}

/// A host's network for every step is a right that has to be granted, too.
fn entitlements(args: &BuildArgs) -> Vec<String> {
    let mut entitlements = args.allow.clone();
    let host = "network.host".to_owned();
    if args.network.as_deref() == Some("host") && !entitlements.contains(&host) {
        entitlements.push(host);
    }
    entitlements
}

fn options(args: &BuildArgs) -> Result<BTreeMap<String, String>, Failure> {
    let mut values: Vec<String> = args
        .build_arg
        .iter()
        .map(|arg| format!("build-arg:{arg}"))
        .collect();
    values.extend(args.label.iter().map(|label| match label.contains('=') {
        true => format!("label:{label}"),
        false => format!("label:{label}="),
    }));
    let mut options = spec::build_opts(&values, |name| std::env::var(name).ok())?;
    let mut set = |name: &str, value: String| {
        if !value.is_empty() {
            options.insert(name.to_owned(), value);
        }
    };
    set("target", args.target.clone().unwrap_or_default());
    set("platform", args.platform.join(","));
    set("cgroup-parent", args.cgroup_parent.clone().unwrap_or_default());
    set(
        "cooper.resolve-cache",
        args.resolve_cache.clone().unwrap_or_default(),
    );
    if args.pull {
        set("image-resolve-mode", "pull".to_owned());
    }
    match args.network.as_deref() {
        None | Some("" | "default") => {}
        Some(mode @ ("none" | "host")) => set("force-network-mode", mode.to_owned()),
        Some(mode) => {
            return Err(Failure::new(format!(
                "network mode {mode:?} not supported by buildkit"
            )));
        }
    }
    if let Some(size) = &args.shm_size {
        set("shm-size", spec::memory_bytes(size)?.to_string());
    }
    let limits: Result<Vec<String>, _> = args.ulimit.iter().map(|limit| spec::ulimit(limit)).collect();
    set("ulimit", limits?.join(","));
    let hosts: Result<Vec<String>, _> = args.add_host.iter().map(|host| extra_host(host)).collect();
    set("add-hosts", hosts?.join(","));
    if args.no_cache {
        options.insert("no-cache".to_owned(), String::new());
    } else if !args.no_cache_filter.is_empty() {
        options.insert("no-cache".to_owned(), args.no_cache_filter.join(","));
    }
    options.extend(attestations(args)?);
    if let Some(question) = question(args)? {
        options.insert("requestid".to_owned(), question.to_owned());
    }
    Ok(options)
}

/// Reads `host:ip` or `host=ip`; returns `host=ip`.
fn extra_host(text: &str) -> Result<String, Failure> {
    let (host, address) = text
        .split_once('=')
        .or_else(|| text.split_once(':'))
        .filter(|(host, address)| !host.is_empty() && !address.is_empty())
        .ok_or_else(|| Failure::new(format!("invalid host {text}")))?;
    let address = address.trim_start_matches('[').trim_end_matches(']');
    if address == "host-gateway" || address.parse::<std::net::IpAddr>().is_ok() {
        return Ok(format!("{host}={address}"));
    }
    Err(Failure::new(format!(
        "invalid host {text}: invalid IP address in add-host: {address:?}"
    )))
}

fn attestations(args: &BuildArgs) -> Result<BTreeMap<String, String>, Failure> {
    let mut all = Vec::new();
    for text in &args.attest {
        all.push(spec::attestation(None, text)?);
    }
    if let Some(text) = &args.sbom {
        all.push(spec::attestation(Some("sbom"), text)?);
    }
    if let Some(text) = &args.provenance {
        all.push(spec::attestation(Some("provenance"), text)?);
    }
    Ok(all.into_iter().flatten().collect())
}

/// Returns the name of what the frontend is asked instead of being let build.
fn question(args: &BuildArgs) -> Result<Option<&'static str>, Failure> {
    let call = if args.check {
        "check"
    } else {
        args.call.as_deref().unwrap_or("build")
    };
    match call {
        "build" | "" => Ok(None),
        "check" | "lint" => Ok(Some("frontend.lint")),
        "outline" => Ok(Some("frontend.outline")),
        "targets" => Ok(Some("frontend.targets")),
        _ => Err(Failure::new(format!(
            "invalid call {call:?}: expected build, check, outline or targets"
        ))),
    }
}

fn outputs(args: &BuildArgs) -> Result<Vec<Output>, Failure> {
    let is_terminal = std::io::stdout().is_terminal();
    let parsed: Result<Vec<_>, _> = args
        .output
        .iter()
        .map(|output| spec::buildx_output(output, is_terminal))
        .collect();
    let mut outputs = parsed?;
    if args.push {
        if args.tag.is_empty() {
            return Err(Failure::new("tag is needed when pushing to registry"));
        }
        match outputs.iter_mut().find(|output| output.kind == "image") {
            Some(output) => {
                output.attrs.insert("push".to_owned(), "true".to_owned());
            }
            None => outputs.push(Output {
                kind: "image".to_owned(),
                attrs: BTreeMap::from([("push".to_owned(), "true".to_owned())]),
                destination: Destination::None,
            }),
        }
    }
    let annotations = spec::attributes(&args.annotation)?;
    for output in outputs
        .iter_mut()
        .filter(|output| ["image", "oci", "docker"].contains(&output.kind.as_str()))
    {
        if !args.tag.is_empty() && !output.attrs.contains_key("name") {
            output.attrs.insert("name".to_owned(), args.tag.join(","));
        }
        for (name, value) in &annotations {
            output.attrs.insert(format!("annotation.{name}"), value.clone());
        }
    }
    Ok(outputs)
}

/// Builds; returns the exit code, which is not 0 when a check found something.
pub(super) async fn build(channel: Channel, args: &BuildArgs, prepared: Prepared) -> Result<u8, Failure> {
    let Prepared {
        build,
        mode,
        _context,
    } = prepared;
    let asks = build.options.contains_key("requestid");
    let goes_nowhere = build.outputs.is_empty() && !asks;
    let display = progress::on_stderr(mode)?;
    let ended = run_build(channel, build, display, mode != Mode::RawJson).await?;
    let response = &ended.outcome.response;
    if let Some(path) = &args.metadata_file {
        metadata::write(path, response)?;
    }
    if let Some(path) = &args.iidfile {
        let id = metadata::image_id(response).unwrap_or_default();
        oci_index::write_atomically(path, id.as_bytes())?;
    }
    let mut notes = String::new();
    if mode != Mode::Quiet && mode != Mode::RawJson {
        if goes_nowhere {
            notes.push_str(
                "\nWARNING: No output specified. The result only remains in the build cache. To push it to a registry \
                 use --push, to write it to a file use --output.\n",
            );
        }
        notes.push_str(&warning_text(&ended.warnings));
    }
    std::io::stderr().write_all(notes.as_bytes())?;
    if args.quiet {
        let id = metadata::image_id(response)
            .map(|id| format!("{id}\n"))
            .unwrap_or_default();
        crate::buildctl::write_stdout(&id)?;
    }
    let answer = &ended.outcome.metadata;
    crate::buildctl::write_stdout(&metadata::check_text(answer))?;
    crate::buildctl::write_stdout(&metadata::answer_text(answer))?;
    Ok(metadata::status_code(answer))
}

/// Formats what frontends and steps warn of, each with its line.
fn warning_text(warnings: &[VertexWarning]) -> String {
    if warnings.is_empty() {
        return String::new();
    }
    let plural = if warnings.len() == 1 { "" } else { "s" };
    let mut text = format!("\n {} warning{plural} found:\n", warnings.len());
    for warning in warnings {
        let line = warning
            .ranges
            .first()
            .and_then(|range| range.start.as_ref())
            .map(|start| start.line);
        let place = line
            .filter(|line| *line > 0)
            .map(|line| format!(" (line {line})"))
            .unwrap_or_default();
        // Some frontends name the line themselves.
        let place = if warning.short.ends_with(&place) {
            ""
        } else {
            place.as_str()
        };
        text.push_str(&format!(" - {}{place}\n", warning.short));
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    fn args(change: impl FnOnce(&mut BuildArgs)) -> BuildArgs {
        let mut args = BuildArgs::default();
        change(&mut args);
        args
    }

    #[test]
    fn flags_become_options() {
        let options = options(&args(|args| {
            args.build_arg = vec!["A=1".to_owned()];
            args.label = vec!["l=v".to_owned(), "bare".to_owned()];
            args.platform = vec!["linux/amd64".to_owned(), "linux/arm64".to_owned()];
            args.pull = true;
            args.resolve_cache = Some("offline".to_owned());
            args.network = Some("none".to_owned());
            args.shm_size = Some("64m".to_owned());
            args.add_host = vec!["h:1.2.3.4".to_owned(), "six=::1".to_owned()];
            args.no_cache_filter = vec!["a".to_owned(), "b".to_owned()];
            args.provenance = Some("mode=max".to_owned());
            args.check = true;
        }))
        .unwrap();
        let expected = [
            ("build-arg:A", "1"),
            ("label:l", "v"),
            ("label:bare", ""),
            ("platform", "linux/amd64,linux/arm64"),
            ("image-resolve-mode", "pull"),
            ("cooper.resolve-cache", "offline"),
            ("force-network-mode", "none"),
            ("shm-size", "67108864"),
            ("add-hosts", "h=1.2.3.4,six=::1"),
            ("no-cache", "a,b"),
            ("attest:provenance", "mode=max"),
            ("requestid", "frontend.lint"),
        ];
        for (name, value) in expected {
            assert_eq!(options.get(name).map(String::as_str), Some(value), "{name}");
        }
    }

    #[test]
    fn an_inline_cache_can_be_asked_for_by_a_build_argument() {
        let context = tempfile::tempdir().unwrap();
        std::fs::write(context.path().join("Dockerfile"), "FROM scratch").unwrap();
        for (value, asked) in [
            ("1", true),
            ("true", true),
            ("0", false),
            ("", false),
            ("yes", false),
        ] {
            let prepared = prepare(&args(|args| {
                args.build_arg = vec![format!("BUILDKIT_INLINE_CACHE={value}")];
                args.context = context.path().display().to_string();
            }));
            let kinds = prepared.unwrap().build.cache_exports;
            let kinds: Vec<String> = kinds.into_iter().map(|export| export.kind).collect();
            let expected: &[&str] = if asked { &["inline"] } else { &[] };
            assert_eq!(kinds, expected, "{value:?}");
        }
    }

    #[test]
    fn tags_name_images() {
        let outputs = outputs(&args(|args| {
            args.tag = vec!["a".to_owned(), "b".to_owned()];
            args.output = vec!["type=image".to_owned(), "type=local,dest=x".to_owned()];
            args.push = true;
        }))
        .unwrap();
        assert_eq!(outputs[0].attrs["name"], "a,b");
        assert_eq!(outputs[0].attrs["push"], "true");
        assert!(outputs[1].attrs.is_empty());
        assert!(super::outputs(&args(|args| args.push = true)).is_err());
    }

    #[test]
    fn hosts_need_addresses() {
        assert_eq!(extra_host("h:host-gateway").unwrap(), "h=host-gateway");
        for bad in ["h", "h:", "h:x", ":1.2.3.4"] {
            assert!(extra_host(bad).is_err(), "{bad}");
        }
    }

    #[test]
    fn warnings_have_lines() {
        let position = llb::pb::Position {
            line: 3,
            character: 0,
        };
        let warning = VertexWarning {
            short: "x".to_owned(),
            ranges: vec![llb::pb::Range {
                start: Some(position),
                end: None,
            }],
            ..VertexWarning::default()
        };
        assert_eq!(
            warning_text(std::slice::from_ref(&warning)),
            "\n 1 warning found:\n - x (line 3)\n"
        );
        let named = VertexWarning {
            short: "x (line 3)".to_owned(),
            ..warning
        };
        assert_eq!(warning_text(&[named]), "\n 1 warning found:\n - x (line 3)\n");
        assert_eq!(warning_text(&[]), "");
    }
}

//! `build`.

use std::collections::BTreeMap;
use std::fs::OpenOptions;
use std::io::{IsTerminal as _, Read as _, Write as _};
use std::os::unix::fs::{FileTypeExt as _, OpenOptionsExt as _};
use std::path::{Path, PathBuf};
use std::time::Instant;

use api::pb::{pb, sourcepolicy};
use prost::Message as _;

use super::args::{BuildArgs, ConnectionArgs};
use super::metrics::Metrics;
use super::{open, write_stdout};
use crate::failure::Failure;
use crate::progress::{self, Display, Tee, rawjson::RawJsonDisplay};
use crate::solve::Build;
use crate::{metadata, oci_index, run_build, spec};

pub(super) async fn build(args: BuildArgs, connection: &ConnectionArgs) -> Result<(), Failure> {
    let started = Instant::now();
    let channel = open(connection).await?;
    let build = read_args(&args)?;
    let id = build.id.clone();
    let mut displays: Vec<Box<dyn Display>> = vec![progress::on_stderr(args.progress.parse()?)?];
    if let Some(path) = &args.trace {
        let file = OpenOptions::new()
            .append(true)
            .create(true)
            .mode(0o600)
            .open(path)?;
        displays.push(Box::new(RawJsonDisplay::new(file)));
    }
    let metrics = args.debug_json_cache_metrics.as_ref().map(|_| Metrics::default());
    if let Some(metrics) = &metrics {
        displays.push(Box::new(metrics.clone()));
    }
    let ended = run_build(channel, build, Box::new(Tee(displays)), false).await;
    if let Some(path) = &args.ref_file {
        oci_index::write_atomically(path, id.as_bytes())?;
    }
    if let (Some(metrics), Some(target)) = (&metrics, &args.debug_json_cache_metrics) {
        write_metrics(target, &metrics.report(started.elapsed()))?;
    }
    let outcome = ended?.outcome;
    if let Some(path) = &args.metadata_file {
        metadata::write(path, &outcome.response)?;
    }
    write_stdout(&metadata::answer_text(&outcome.metadata))
}

fn write_metrics(target: &str, report: &str) -> Result<(), Failure> {
    match target {
        "stdout" => write_stdout(report),
        "stderr" => Ok(std::io::stderr().write_all(report.as_bytes())?),
        path => Ok(OpenOptions::new()
            .write(true)
            .create(true)
            .truncate(true)
            .mode(0o600)
            .open(path)?
            .write_all(report.as_bytes())?),
    }
}

fn read_args(args: &BuildArgs) -> Result<Build, Failure> {
    let env = |name: &str| std::env::var(name).ok();
    let agents = spec::agents(&args.ssh)?;
    let secrets = spec::secrets(&args.secret, |name| std::env::var_os(name).is_some())?;
    spec::allow(&args.allow)?;
    let is_terminal = std::io::stdout().is_terminal();
    let outputs: Result<Vec<_>, _> = args
        .output
        .iter()
        .map(|output| spec::buildctl_output(output, is_terminal))
        .collect();
    let exports: Result<Vec<_>, _> = args
        .export_cache
        .iter()
        .map(|cache| spec::cache_export("--export-cache", cache, env))
        .collect();
    let imports: Result<Vec<_>, _> = args
        .import_cache
        .iter()
        .map(|cache| spec::cache_import("--import-cache", cache, env))
        .collect();
    let mut options =
        spec::build_opts(&args.opt, env).map_err(|error| Failure::from(error).context("invalid opt"))?;
    let locals =
        spec::attributes(&args.local).map_err(|error| Failure::from(error).context("invalid local"))?;
    let frontend = args.frontend.clone().unwrap_or_default();
    let definition = if frontend.is_empty() {
        Some(read_definition(args.no_cache)?)
    } else {
        if args.no_cache {
            options.insert("no-cache".to_owned(), String::new());
        }
        None
    };
    Ok(Build {
        id: crate::ids::new_id(),
        frontend,
        options,
        definition,
        outputs: outputs?,
        cache_exports: exports?,
        cache_imports: imports?,
        directories: directories(locals)?,
        layouts: layouts(&args.oci_layout)?,
        secrets,
        agents,
        entitlements: args.allow.clone(),
        source_policy: args.source_policy_file.as_deref().map(read_policy).transpose()?,
        proxy_network: args.proxy_network,
        shared_key: String::new(),
        uploads: None,
        token_servers: spec::auth_tls(&args.registry_auth_tlscontext)?,
        explain: false,
    })
}

fn directories(locals: BTreeMap<String, String>) -> Result<BTreeMap<String, PathBuf>, Failure> {
    let mut directories = BTreeMap::new();
    for (name, path) in locals {
        let dir = std::fs::canonicalize(&path)
            .map_err(|error| Failure::new(format!("invalid local: stat {path}: {error}")))?;
        if !dir.is_dir() {
            return Err(Failure::new(format!("invalid local: {path} not a directory")));
        }
        directories.insert(name, dir);
    }
    Ok(directories)
}

fn layouts(values: &[String]) -> Result<BTreeMap<String, PathBuf>, Failure> {
    let parse = |value: &String| match value.split_once('=') {
        Some((id, dir)) => Ok((id.to_owned(), PathBuf::from(dir))),
        None => Err(Failure::new(format!(
            "invalid oci-layout: oci-layout option must be 'id=path/to/layout', instead had invalid {value}"
        ))),
    };
    values.iter().map(parse).collect()
}

fn read_policy(path: &Path) -> Result<sourcepolicy::Policy, Failure> {
    let text =
        std::fs::read(path).map_err(|error| Failure::new(format!("open {}: {error}", path.display())))?;
    spec::source_policy(&text).map_err(|error| {
        Failure::new(format!(
            "failed to unmarshal source-policy-file {:?}: {error}",
            path.display().to_string()
        ))
    })
}

/// Reads a definition from standard input.
fn read_definition(no_cache: bool) -> Result<pb::Definition, Failure> {
    let is_device = std::fs::metadata("/dev/stdin").is_ok_and(|found| found.file_type().is_char_device());
    if is_device {
        return Err(Failure::new(
            "please specify --frontend or pipe LLB definition to stdin",
        ));
    }
    let mut bytes = Vec::new();
    std::io::stdin().lock().read_to_end(&mut bytes)?;
    let mut definition = pb::Definition::decode(bytes.as_slice())
        .map_err(|error| Failure::new(format!("failed to parse input: {error}")))?;
    if definition.def.is_empty() {
        return Err(Failure::new(
            "empty definition sent to build. Specify --frontend instead?",
        ));
    }
    if no_cache {
        for encoded in &definition.def {
            let digest = oci::Digest::sha256(encoded).to_string();
            definition.metadata.entry(digest).or_default().ignore_cache = true;
        }
    }
    Ok(definition)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn bad_arguments_have_buildctls_texts() {
        let error = |args: BuildArgs| read_args(&args).unwrap_err().to_string();
        let frontend = || BuildArgs {
            frontend: Some("dockerfile.v0".to_owned()),
            ..BuildArgs::default()
        };
        let with = |change: fn(&mut BuildArgs)| {
            let mut args = frontend();
            change(&mut args);
            args
        };
        assert_eq!(
            error(with(|args| args.opt = vec!["x".to_owned()])),
            "invalid opt: invalid value x"
        );
        assert_eq!(
            error(with(|args| args.local = vec!["x".to_owned()])),
            "invalid local: invalid value x"
        );
        assert!(error(with(|args| args.local = vec!["x=/nonexistent".to_owned()])).contains("/nonexistent"));
        assert!(error(with(|args| args.oci_layout = vec!["x".to_owned()])).contains("id=path/to/layout"));
        assert_eq!(
            error(with(|args| args.allow = vec!["root".to_owned()])),
            "unknown entitlement root"
        );
        assert_eq!(
            error(with(
                |args| args.registry_auth_tlscontext = vec!["host=h".to_owned()]
            )),
            "--registry-auth-tlscontext requires ca=<ca> or cert=<cert>,key=<key> or insecure=true"
        );
        assert!(read_args(&frontend()).is_ok());
    }
}

//! What identifies an exec op: the digest of the process and its mounts, and which inputs count by content.
//!
//! The digest is BuildKit's (`buildkit.exec.v0`): of the op as Go writes it in JSON, without what cannot show in the
//! result or is identified otherwise (addresses of extra hosts, proxies, selectors, names of cache mounts).

use std::collections::BTreeSet;

use layer::checksum::Selector;
use llb::pb;
use oci::{Digest, Platform};
use serde::Serialize;

use crate::error::BuildError;
use crate::op::{CacheMap, Dep};

/// Everything about an op's identity that does not depend on its inputs' bytes.
#[derive(Clone, Debug)]
pub(super) struct Key {
    /// What the solver is told.
    pub map: CacheMap,
    /// Per input, what is checksummed (an empty list: all of it); `None`: the input does not count by content.
    pub selectors: Vec<Option<Vec<Selector>>>,
}

/// Works out the identity of `exec` on a vertex with `inputs` inputs.
pub(super) fn key(
    exec: &pb::ExecOp,
    platform: Option<&pb::Platform>,
    inputs: usize,
) -> Result<Key, BuildError> {
    let digest = digest(exec, platform)?;
    let mut deps = vec![Dep::default(); inputs];
    let mut selectors = vec![None; inputs];
    for (index, reads) in reads(exec, inputs)?.into_iter().enumerate() {
        if !reads.paths.is_empty() {
            deps[index].selector = Some(Digest::sha256(reads.paths.join("\0").as_bytes()));
        }
        deps[index].content = reads.by_content;
        if reads.by_content {
            selectors[index] = Some(to_selectors(&reads.paths));
        }
    }
    Ok(Key {
        map: CacheMap {
            digests: vec![digest],
            deps,
            ..CacheMap::default()
        },
        selectors,
    })
}

#[derive(Serialize)]
#[serde(rename_all = "PascalCase")]
struct Document<'a> {
    r#type: &'static str,
    exec: &'a pb::ExecOp,
    #[serde(rename = "OS")]
    os: &'a str,
    arch: &'a str,
    #[serde(skip_serializing_if = "str::is_empty")]
    variant: &'a str,
    #[serde(rename = "OSVersion", skip_serializing_if = "str::is_empty")]
    os_version: &'a str,
    #[serde(rename = "OSFeatures", skip_serializing_if = "<[String]>::is_empty")]
    os_features: &'a [String],
}

fn digest(exec: &pb::ExecOp, platform: Option<&pb::Platform>) -> Result<Digest, BuildError> {
    let exec = normalized(exec);
    let host = Platform::host();
    let document = match platform {
        Some(platform) => Document {
            r#type: "buildkit.exec.v0",
            exec: &exec,
            os: &platform.os,
            arch: &platform.architecture,
            variant: &platform.variant,
            os_version: &platform.os_version,
            os_features: &platform.os_features,
        },
        None => Document {
            r#type: "buildkit.exec.v0",
            exec: &exec,
            os: &host.os,
            arch: &host.architecture,
            variant: &host.variant,
            os_version: "",
            os_features: &[],
        },
    };
    let bytes = oci::json::to_vec(&document)
        .map_err(|error| BuildError::internal(format!("exec op's key: {error}")))?;
    Ok(Digest::sha256(&bytes))
}

/// The op without what does not identify it.
fn normalized(exec: &pb::ExecOp) -> pb::ExecOp {
    let mut exec = exec.clone();
    if let Some(meta) = &mut exec.meta {
        for host in &mut meta.extra_hosts {
            host.ip.clear();
        }
        meta.proxy_env = None;
    }
    for mount in &mut exec.mounts {
        mount.selector.clear();
        let dest = mount.dest.clone();
        if let Some(cache) = mount
            .cache_opt
            .as_mut()
            .filter(|cache| !is_default_cache(cache, &dest))
        {
            cache.id.clear();
            cache.sharing = 0;
        }
    }
    if let [mount] = exec.mounts.as_slice() {
        // Old versions left out the mounts; the most common case still does.
        if is_plain_root(mount) {
            exec.mounts.clear();
        }
    }
    exec
}

/// A Dockerfile's cache mount without options is named after its target, maybe behind a namespace.
fn is_default_cache(cache: &pb::CacheOpt, dest: &str) -> bool {
    let names_dest = cache.id == dest || cache.id.split_once('/').is_some_and(|(_, rest)| rest == dest);
    names_dest && cache.sharing == 0
}

fn is_plain_root(mount: &pb::Mount) -> bool {
    mount.dest == "/"
        && !mount.readonly
        && mount.mount_type == i32::from(pb::MountType::Bind)
        && mount.cache_opt.is_none()
        && mount.ssh_opt.is_none()
        && mount.secret_opt.is_none()
        && mount.result_id.is_empty()
}

/// What mounts show of an input.
#[derive(Clone, Debug, Default)]
struct Reads {
    paths: Vec<String>,
    by_content: bool,
}

fn reads(exec: &pb::ExecOp, inputs: usize) -> Result<Vec<Reads>, BuildError> {
    let mut reads = vec![Reads::default(); inputs];
    for mount in &exec.mounts {
        let kind = pb::MountType::try_from(mount.mount_type)
            .map_err(|_| BuildError::user(format!("mount type {} not implemented", mount.mount_type)))?;
        let from_input = matches!(kind, pb::MountType::Bind | pb::MountType::Cache);
        if !from_input || mount.input == -1 {
            continue;
        }
        let found = usize::try_from(mount.input)
            .ok()
            .and_then(|index| reads.get_mut(index));
        let Some(input) = found else {
            return Err(BuildError::user(format!(
                "invalid mount input {} of {:?}",
                mount.input, mount.dest
            )));
        };
        let path = oci::path::join(&["/", &mount.selector]);
        input.by_content = counts_by_content(mount, &path)?;
        input.paths.push(path);
    }
    Ok(reads)
}

/// Content may stand for an input only if nothing but what is checksummed can show in the result: the mount has no
/// output, cannot be written, or is the whole input. The root is not worth its checksum.
fn counts_by_content(mount: &pb::Mount, path: &str) -> Result<bool, BuildError> {
    let is_safe = mount.output == -1 || mount.readonly || path == "/";
    match pb::MountContentCache::try_from(mount.content_cache) {
        Ok(pb::MountContentCache::Off) => Ok(false),
        Ok(pb::MountContentCache::On) if !is_safe => Err(BuildError::user(format!(
            "invalid mount cache content of {:?}",
            mount.dest
        ))),
        Ok(pb::MountContentCache::On) => Ok(true),
        Ok(pb::MountContentCache::Default) => Ok(is_safe && mount.dest != "/"),
        Err(_) => Err(BuildError::user(format!(
            "unknown content cache mode {}",
            mount.content_cache
        ))),
    }
}

/// The outermost of the paths; none, meaning everything, when the root is among them.
fn to_selectors(paths: &[String]) -> Vec<Selector> {
    let paths: BTreeSet<&str> = paths.iter().map(String::as_str).collect();
    let kept = crate::op::file::outermost(paths.iter().copied());
    if kept.contains(&"/") {
        return Vec::new();
    }
    let selector = |path: &str| Selector {
        path: path.to_owned(),
        follow_links: true,
        ..Selector::default()
    };
    kept.into_iter().map(selector).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn mount(dest: &str, change: impl FnOnce(&mut pb::Mount)) -> pb::Mount {
        let mut mount = pb::Mount {
            dest: dest.to_owned(),
            output: -1,
            ..Default::default()
        };
        change(&mut mount);
        mount
    }

    fn exec(mounts: Vec<pb::Mount>) -> pb::ExecOp {
        let meta = pb::Meta {
            args: vec!["true".to_owned()],
            cwd: "/".to_owned(),
            ..Default::default()
        };
        pb::ExecOp {
            meta: Some(meta),
            mounts,
            ..Default::default()
        }
    }

    fn digest_of(exec: &pb::ExecOp) -> Digest {
        key(exec, None, 2).expect("is valid").map.digests[0]
    }

    #[test]
    fn leaves_out_what_cannot_show() {
        let plain = exec(vec![mount("/", |m| m.output = 0)]);
        let mut other = plain.clone();
        let meta = other.meta.as_mut().expect("has meta");
        meta.proxy_env = Some(pb::ProxyEnv {
            http_proxy: "http://p".to_owned(),
            ..Default::default()
        });
        assert_eq!(digest_of(&plain), digest_of(&other));
        let with_host = |ip: &str| {
            let mut exec = plain.clone();
            let host = pb::HostIp {
                host: "h".to_owned(),
                ip: ip.to_owned(),
            };
            exec.meta.as_mut().expect("has meta").extra_hosts.push(host);
            digest_of(&exec)
        };
        assert_eq!(with_host("1.2.3.4"), with_host("4.3.2.1"));
        assert_ne!(with_host("1.2.3.4"), digest_of(&plain));
    }

    #[test]
    fn names_of_cache_mounts_do_not_count_unless_default() {
        let with = |id: &str| {
            let cache = |m: &mut pb::Mount| {
                m.mount_type = pb::MountType::Cache.into();
                m.input = -1;
                m.cache_opt = Some(pb::CacheOpt {
                    id: id.to_owned(),
                    sharing: 0,
                });
            };
            digest_of(&exec(vec![mount("/", |m| m.output = 0), mount("/c", cache)]))
        };
        assert_eq!(with("a"), with("b"));
        assert_ne!(with("a"), with("/c"));
    }

    #[test]
    fn counts_read_only_mounts_by_content() {
        let mounts = vec![
            mount("/", |m| m.output = 0),
            mount("/src", |m| {
                m.input = 1;
                m.selector = "sub".to_owned();
            }),
        ];
        let key = key(&exec(mounts), None, 2).expect("is valid");
        assert!(!key.map.deps[0].content);
        assert!(key.map.deps[1].content);
        let selectors = key.selectors[1].as_ref().expect("counts by content");
        assert_eq!(selectors[0].path, "/sub");
    }

    #[test]
    fn refuses_inputs_that_do_not_exist() {
        assert!(key(&exec(vec![mount("/", |m| m.input = 5)]), None, 2).is_err());
        assert!(key(&exec(vec![mount("/", |m| m.input = -7)]), None, 2).is_err());
        assert!(key(&exec(vec![mount("/", |m| m.mount_type = 99)]), None, 2).is_err());
    }

    fn from_hex(text: &str) -> Vec<u8> {
        let digits = |at: usize| u8::from_str_radix(&text[at..at + 2], 16).expect("is hexadecimal");
        (0..text.len()).step_by(2).map(digits).collect()
    }

    #[test]
    fn agrees_with_buildkit_bit_for_bit() {
        let cases = include_str!("testdata/keys.txt")
            .lines()
            .filter(|line| !line.starts_with('#'));
        for case in cases {
            let fields: Vec<&str> = case.split(' ').collect();
            let op = <pb::Op as prost::Message>::decode(&*from_hex(fields[2])).expect("is an op");
            let Some(pb::op::Op::Exec(exec)) = &op.op else {
                panic!("{case}")
            };
            let inputs = fields[1].parse().expect("is a number");
            let key = key(exec, op.platform.as_ref(), inputs).expect("is valid");
            assert_eq!(key.map.digests[0].to_string(), fields[3], "{}", fields[0]);
            let selector = |dep: &Dep| dep.selector.map_or("-".to_owned(), |digest| digest.to_string());
            let deps: Vec<String> = key
                .map
                .deps
                .iter()
                .map(|dep| format!("{},{}", selector(dep), dep.content))
                .collect();
            assert_eq!(deps, fields[4..], "{}", fields[0]);
        }
    }
}

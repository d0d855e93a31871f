//! A definition as JSON in the canonical mapping of protocol buffers.

use llb::Graph;
use llb::pb::{self, Definition, file_action::Action, op, user_opt};
use serde_json::{Map, Value, json};

use crate::error::{ConvertError, Progress};

/// Prints operations by digest, metadata by digest, and the source.
pub(crate) fn print(definition: &Definition) -> Progress<Vec<u8>> {
    let mut def = Map::new();
    if !definition.def.is_empty() {
        let graph = Graph::load(definition)?;
        for vertex in graph.vertices() {
            def.insert(vertex.digest.to_string(), op_json(&vertex.op));
        }
        if let Some(raw) = definition.def.last() {
            let root = graph.root();
            let output = i64::try_from(root.output).unwrap_or_default();
            let input = pb::Input {
                digest: graph.vertex(root).digest.to_string(),
                index: output,
            };
            def.insert(
                oci::Digest::sha256(raw).to_string(),
                op_json(&pb::Op {
                    inputs: vec![input],
                    ..pb::Op::default()
                }),
            );
        }
    }
    let source = definition
        .source
        .as_ref()
        .map_or(Ok(json!({})), serde_json::to_value);
    let to_error = |error: serde_json::Error| ConvertError::Json(error.to_string());
    let metadata = serde_json::to_value(&definition.metadata).map_err(to_error)?;
    let all = json!({ "def": def, "metadata": metadata, "source": source.map_err(to_error)? });
    Ok(oci::json::to_vec_indent(&all, "  ").map_err(to_error)?)
}

/// An object of the fields that are not empty, zero or false.
fn object<const N: usize>(fields: [(&str, Value); N]) -> Value {
    let is_set = |value: &Value| match value {
        Value::Null => false,
        Value::Bool(value) => *value,
        Value::Number(value) => value.as_i64() != Some(0),
        Value::String(value) => !value.is_empty() && value != "0",
        Value::Array(values) => !values.is_empty(),
        Value::Object(_) => true,
    };
    let fields = fields.into_iter().filter(|(_, value)| is_set(value));
    Value::Object(fields.map(|(name, value)| (name.to_owned(), value)).collect())
}

/// 64-bit numbers are texts.
fn number(value: i64) -> Value {
    Value::String(value.to_string())
}

fn texts(values: &[String]) -> Value {
    values.iter().map(|text| Value::String(text.clone())).collect()
}

/// A map; nothing if it is empty.
fn texts_by_name(values: &std::collections::BTreeMap<String, String>) -> Value {
    if values.is_empty() {
        Value::Null
    } else {
        json!(values)
    }
}

fn enumeration(name: &str, default: &str) -> Value {
    if name == default {
        Value::Null
    } else {
        Value::String(name.to_owned())
    }
}

fn op_json(op: &pb::Op) -> Value {
    let inputs = op
        .inputs
        .iter()
        .map(|input| object([("digest", json!(input.digest)), ("index", number(input.index))]));
    let platform = op.platform.as_ref().map_or(Value::Null, |platform| {
        object([
            ("Architecture", json!(platform.architecture)),
            ("OS", json!(platform.os)),
            ("Variant", json!(platform.variant)),
            ("OSVersion", json!(platform.os_version)),
            ("OSFeatures", texts(&platform.os_features)),
        ])
    });
    let constraints = op
        .constraints
        .as_ref()
        .map_or(Value::Null, |found| object([("filter", texts(&found.filter))]));
    let (name, kind) = op.op.as_ref().map_or(("exec", Value::Null), kind_json);
    object([
        ("inputs", inputs.collect()),
        (name, kind),
        ("platform", platform),
        ("constraints", constraints),
    ])
}

/// The field of an operation's kind, and its value.
fn kind_json(kind: &op::Op) -> (&'static str, Value) {
    match kind {
        op::Op::Exec(exec) => ("exec", exec_json(exec)),
        op::Op::Source(source) => (
            "source",
            object([
                ("identifier", json!(source.identifier)),
                ("attrs", texts_by_name(&source.attrs)),
            ]),
        ),
        op::Op::File(file) => (
            "file",
            object([("actions", file.actions.iter().map(action_json).collect())]),
        ),
        op::Op::Merge(merge) => {
            let inputs = merge
                .inputs
                .iter()
                .map(|input| object([("input", number(input.input))]));
            ("merge", object([("inputs", inputs.collect())]))
        }
        op::Op::Diff(diff) => {
            let lower = diff
                .lower
                .as_ref()
                .map_or(Value::Null, |lower| object([("input", number(lower.input))]));
            let upper = diff
                .upper
                .as_ref()
                .map_or(Value::Null, |upper| object([("input", number(upper.input))]));
            ("diff", object([("lower", lower), ("upper", upper)]))
        }
        op::Op::Build(build) => {
            let inputs: Map<String, Value> = build
                .inputs
                .iter()
                .map(|(name, input)| (name.clone(), object([("input", number(input.input))])))
                .collect();
            let fields = [
                ("builder", number(build.builder)),
                ("inputs", Value::Object(inputs)),
                ("attrs", texts_by_name(&build.attrs)),
            ];
            ("build", object(fields))
        }
        op::Op::Passthrough(pass) => {
            let outputs = pass.outputs.iter().map(|output| number(*output));
            (
                "passthrough",
                object([("id", json!(pass.id)), ("outputs", outputs.collect())]),
            )
        }
    }
}

fn exec_json(exec: &pb::ExecOp) -> Value {
    let secrets = exec.secretenv.iter().map(|secret| {
        object([
            ("ID", json!(secret.id)),
            ("name", json!(secret.name)),
            ("optional", json!(secret.optional)),
        ])
    });
    let devices = exec
        .cdi_devices
        .iter()
        .map(|device| object([("name", json!(device.name)), ("optional", json!(device.optional))]));
    object([
        ("meta", exec.meta.as_ref().map_or(Value::Null, meta_json)),
        ("mounts", exec.mounts.iter().map(mount_json).collect()),
        (
            "network",
            enumeration(exec.network().as_str_name(), pb::NetMode::default().as_str_name()),
        ),
        (
            "security",
            enumeration(
                exec.security().as_str_name(),
                pb::SecurityMode::default().as_str_name(),
            ),
        ),
        ("secretenv", secrets.collect()),
        ("cdiDevices", devices.collect()),
    ])
}

fn meta_json(meta: &pb::Meta) -> Value {
    let proxy = meta.proxy_env.as_ref().map_or(Value::Null, |proxy| {
        object([
            ("httpProxy", json!(proxy.http_proxy)),
            ("httpsProxy", json!(proxy.https_proxy)),
            ("ftpProxy", json!(proxy.ftp_proxy)),
            ("noProxy", json!(proxy.no_proxy)),
            ("allProxy", json!(proxy.all_proxy)),
        ])
    });
    let hosts = meta
        .extra_hosts
        .iter()
        .map(|host| object([("Host", json!(host.host)), ("IP", json!(host.ip))]));
    let limits = meta.ulimit.iter().map(|limit| {
        object([
            ("Name", json!(limit.name)),
            ("Soft", number(limit.soft)),
            ("Hard", number(limit.hard)),
        ])
    });
    object([
        ("args", texts(&meta.args)),
        ("env", texts(&meta.env)),
        ("cwd", json!(meta.cwd)),
        ("user", json!(meta.user)),
        ("proxyEnv", proxy),
        ("extraHosts", hosts.collect()),
        ("hostname", json!(meta.hostname)),
        ("ulimit", limits.collect()),
        ("cgroupParent", json!(meta.cgroup_parent)),
        (
            "removeMountStubsRecursive",
            json!(meta.remove_mount_stubs_recursive),
        ),
        ("validExitCodes", json!(meta.valid_exit_codes)),
    ])
}

fn mount_json(mount: &pb::Mount) -> Value {
    let tmpfs = mount
        .tmpfs_opt
        .as_ref()
        .map_or(Value::Null, |tmpfs| object([("size", number(tmpfs.size))]));
    let cache = mount.cache_opt.as_ref().map_or(Value::Null, |cache| {
        let default = pb::CacheSharingOpt::default().as_str_name();
        object([
            ("ID", json!(cache.id)),
            ("sharing", enumeration(cache.sharing().as_str_name(), default)),
        ])
    });
    let file = |id: &str, uid: u32, gid: u32, mode: u32, optional: bool| {
        object([
            ("ID", json!(id)),
            ("uid", json!(uid)),
            ("gid", json!(gid)),
            ("mode", json!(mode)),
            ("optional", json!(optional)),
        ])
    };
    let secret = mount.secret_opt.as_ref();
    let secret = secret.map_or(Value::Null, |opt| {
        file(&opt.id, opt.uid, opt.gid, opt.mode, opt.optional)
    });
    let ssh = mount.ssh_opt.as_ref();
    let ssh = ssh.map_or(Value::Null, |opt| {
        file(&opt.id, opt.uid, opt.gid, opt.mode, opt.optional)
    });
    let content_cache = mount.content_cache().as_str_name();
    object([
        ("input", number(mount.input)),
        ("selector", json!(mount.selector)),
        ("dest", json!(mount.dest)),
        ("output", number(mount.output)),
        ("readonly", json!(mount.readonly)),
        (
            "mountType",
            enumeration(
                mount.mount_type().as_str_name(),
                pb::MountType::default().as_str_name(),
            ),
        ),
        ("TmpfsOpt", tmpfs),
        ("cacheOpt", cache),
        ("secretOpt", secret),
        ("SSHOpt", ssh),
        ("resultID", json!(mount.result_id)),
        (
            "contentCache",
            enumeration(content_cache, pb::MountContentCache::default().as_str_name()),
        ),
    ])
}

fn owner_json(owner: Option<&pb::ChownOpt>) -> Value {
    let user = |user: Option<&pb::UserOpt>| match user.map(|user| &user.user) {
        None => Value::Null,
        Some(Some(user_opt::User::ByName(name))) => {
            json!({ "byName": object([("name", json!(name.name)), ("input", number(name.input))]) })
        }
        Some(Some(user_opt::User::ById(id))) => json!({ "byID": id }),
        Some(None) => json!({}),
    };
    owner.map_or(Value::Null, |owner| {
        object([
            ("user", user(owner.user.as_ref())),
            ("group", user(owner.group.as_ref())),
        ])
    })
}

fn action_json(action: &pb::FileAction) -> Value {
    let (name, kind) = match &action.action {
        Some(Action::Copy(copy)) => ("copy", copy_json(copy)),
        Some(Action::Mkfile(file)) => {
            use base64::Engine as _;
            let data = base64::engine::general_purpose::STANDARD.encode(&file.data);
            let fields = [
                ("path", json!(file.path)),
                ("mode", json!(file.mode)),
                ("data", json!(data)),
                ("owner", owner_json(file.owner.as_ref())),
                ("timestamp", number(file.timestamp)),
            ];
            ("mkfile", object(fields))
        }
        Some(Action::Mkdir(dir)) => {
            let fields = [
                ("path", json!(dir.path)),
                ("mode", json!(dir.mode)),
                ("makeParents", json!(dir.make_parents)),
                ("owner", owner_json(dir.owner.as_ref())),
                ("timestamp", number(dir.timestamp)),
            ];
            ("mkdir", object(fields))
        }
        Some(Action::Rm(rm)) => {
            let fields = [
                ("path", json!(rm.path)),
                ("allowNotFound", json!(rm.allow_not_found)),
                ("allowWildcard", json!(rm.allow_wildcard)),
            ];
            ("rm", object(fields))
        }
        Some(Action::Symlink(link)) => {
            let fields = [
                ("oldpath", json!(link.oldpath)),
                ("newpath", json!(link.newpath)),
                ("owner", owner_json(link.owner.as_ref())),
                ("timestamp", number(link.timestamp)),
            ];
            ("symlink", object(fields))
        }
        None => ("copy", Value::Null),
    };
    object([
        ("input", number(action.input)),
        ("secondaryInput", number(action.secondary_input)),
        ("output", number(action.output)),
        (name, kind),
    ])
}

fn copy_json(copy: &pb::FileActionCopy) -> Value {
    object([
        ("src", json!(copy.src)),
        ("dest", json!(copy.dest)),
        ("owner", owner_json(copy.owner.as_ref())),
        ("mode", json!(copy.mode)),
        ("followSymlink", json!(copy.follow_symlink)),
        ("dirCopyContents", json!(copy.dir_copy_contents)),
        (
            "attemptUnpackDockerCompatibility",
            json!(copy.attempt_unpack_docker_compatibility),
        ),
        ("createDestPath", json!(copy.create_dest_path)),
        ("allowWildcard", json!(copy.allow_wildcard)),
        ("allowEmptyWildcard", json!(copy.allow_empty_wildcard)),
        ("timestamp", number(copy.timestamp)),
        ("includePatterns", texts(&copy.include_patterns)),
        ("excludePatterns", texts(&copy.exclude_patterns)),
        (
            "alwaysReplaceExistingDestPaths",
            json!(copy.always_replace_existing_dest_paths),
        ),
        ("modeStr", json!(copy.mode_str)),
        ("requiredPaths", texts(&copy.required_paths)),
    ])
}

//! What identifies a step, as a flat list of named inputs. Nothing secret is in it: see [`redact`].

use std::collections::{BTreeMap, BTreeSet};

use llb::pb;
use llb::pb::file_action::Action;
use llb::pb::user_opt::User;
use oci::{Digest, Platform};
use serde::{Deserialize, Serialize};
use serde_json::Value;
use solver::NewRecord;

use super::redact;
use crate::op::{OpProvenance, VertexSpec};

/// Fields that are described; the rest counts through the op's digest alone.
const MAX_FIELDS: usize = 1_000;
/// Records by which a step is found that is called otherwise.
const MAX_GROUPS: usize = 4;
/// Characters of a value that are kept.
const MAX_VALUE: usize = 1_000;
/// Characters of a name that are kept.
const MAX_NAME: usize = 300;

/// What identified a step when it ran.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Described {
    /// `exec`, `file`, `source` and so on.
    pub kind: String,
    /// The step's name.
    pub name: String,
    /// The op's digest, which covers all fields.
    pub op: String,
    /// What the definition says.
    pub fields: Vec<Field>,
    /// What a source resolved to.
    #[serde(skip_serializing_if = "Option::is_none", default)]
    pub pin: Option<Pin>,
    /// What the step takes from others.
    pub inputs: Vec<Input>,
}

/// One thing that a definition says.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Field {
    /// Its name in words, unique in the step.
    #[serde(rename = "n")]
    pub name: String,
    /// Its value with secrets replaced; `None`: not to be shown at all.
    #[serde(rename = "v", skip_serializing_if = "Option::is_none", default)]
    pub value: Option<String>,
    /// The beginning of the whole value's hash, too short to find the value by.
    #[serde(rename = "h")]
    pub hash: u32,
}

/// What a source resolved to.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Pin {
    /// What the value is: `image`, `commit`, `checksum`.
    pub what: String,
    /// The source without the value.
    pub source: String,
    /// The digest, commit or checksum.
    pub value: String,
}

/// One input of a step.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Input {
    /// The name of the step that makes it.
    pub name: String,
    /// The beginnings of hashes over the records by which it was found; one in common is enough to be the same.
    pub records: BTreeSet<String>,
    /// What it resolved to, if it is a source.
    #[serde(skip_serializing_if = "Option::is_none", default)]
    pub pin: Option<Pin>,
    /// The listing of the files that were read of it.
    #[serde(skip_serializing_if = "Option::is_none", default)]
    pub listing: Option<Digest>,
}

/// What is known of a vertex that runs.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Subject<'a> {
    pub spec: &'a VertexSpec,
    pub record: &'a NewRecord,
    /// What the op says of itself, for sources.
    pub provenance: Option<&'a OpProvenance>,
    /// What each input resolved to.
    pub pins: &'a [Option<Pin>],
}

fn shortened(text: &str, limit: usize) -> String {
    text.chars().take(limit).collect()
}

fn short_hash(text: &str) -> String {
    Digest::sha256(text).hex().chars().take(16).collect()
}

/// Describes a vertex; listings are added by whoever has them.
pub(crate) fn describe(subject: Subject<'_>) -> Described {
    let Subject {
        spec,
        record,
        provenance,
        pins,
    } = subject;
    let known = known_secrets(&spec.op);
    let pin = provenance.and_then(pin);
    let mut fields = Fields {
        known: &known,
        list: Vec::new(),
        names: BTreeSet::new(),
    };
    fields.op(spec, pin.as_ref());
    let inputs = spec.input_names.iter().enumerate();
    let inputs = inputs.map(|(number, name)| {
        let links = record.links.iter().filter(|link| link.input == number);
        Input {
            name: name_of(name, &known),
            records: links
                .map(|link| short_hash(&format!("{} {:?}", link.parent, link.selector)))
                .collect(),
            pin: pins.get(number).cloned().flatten(),
            listing: None,
        }
    });
    let op = record.links.first().map_or(record.record.0, |link| link.op);
    Described {
        kind: kind(&spec.op).to_owned(),
        name: name_of(&spec.name, &known),
        op: short_hash(&op.to_string()),
        inputs: inputs.collect(),
        fields: fields.list,
        pin,
    }
}

/// Returns a vertex's name without secrets.
pub(crate) fn shown_name(spec: &VertexSpec) -> String {
    name_of(&spec.name, &known_secrets(&spec.op))
}

fn name_of(name: &str, known: &[String]) -> String {
    shortened(&redact::text(name, known), MAX_NAME)
}

fn kind(op: &pb::Op) -> &'static str {
    match &op.op {
        Some(pb::op::Op::Exec(_)) => "exec",
        Some(pb::op::Op::Source(_)) => "source",
        Some(pb::op::Op::File(_)) => "file",
        Some(pb::op::Op::Build(_)) => "build",
        Some(pb::op::Op::Merge(_)) => "merge",
        Some(pb::op::Op::Diff(_)) => "diff",
        Some(_) => "other",
        None => "none",
    }
}

/// Splits a name as the Dockerfile frontend makes them, `[stage 2/4] RUN …`, into the place and the rest without digests.
pub(crate) fn place_and_text(name: &str) -> (&str, &str) {
    let split = name.strip_prefix('[').and_then(|rest| rest.split_once(']'));
    let (place, text) = split.unwrap_or(("", name));
    let text = match text.rsplit_once("@sha256:") {
        Some((text, hash)) if hash.bytes().all(|byte| byte.is_ascii_hexdigit()) => text,
        _ => text,
    };
    (place, text.trim())
}

/// The groups in which steps like this one are found: what is called the same, and what works at the same place on the same
/// thing.
pub(crate) fn groups(described: &Described) -> Vec<String> {
    let (place, text) = place_and_text(&described.name);
    let kind = &described.kind;
    let mut groups = vec![format!("text {kind} {}", short_hash(text))];
    let records = described.inputs.iter().flat_map(|input| &input.records);
    for record in records.take(MAX_GROUPS) {
        groups.push(format!("place {kind} {} {record}", short_hash(place)));
    }
    groups
}

/// Says what a source resolved to, if it did.
pub(crate) fn pin(provenance: &OpProvenance) -> Option<Pin> {
    let value = provenance.pin.clone()?;
    let source = redact::text(provenance.source.as_deref()?, &[]);
    let (scheme, rest) = source.split_once("://").unwrap_or(("", &source));
    let (what, source) = match scheme {
        "docker-image" | "oci-layout" => ("image", rest.split('@').next().unwrap_or(rest)),
        "docker-image+blob" | "oci-layout+blob" => ("blob", rest.split('@').next().unwrap_or(rest)),
        "http" | "https" => ("checksum", source.as_str()),
        _ => ("commit", source.as_str()),
    };
    Some(Pin {
        what: what.to_owned(),
        source: shortened(source, MAX_NAME),
        value: shortened(&value, MAX_NAME),
    })
}

/// Values of environment variables that look like secrets by name: other texts of the step may repeat them.
fn known_secrets(op: &pb::Op) -> Vec<String> {
    let Some(pb::op::Op::Exec(exec)) = &op.op else {
        return Vec::new();
    };
    let env = exec.meta.iter().flat_map(|meta| &meta.env);
    let pairs = env.filter_map(|pair| pair.split_once('='));
    let secrets = pairs.filter(|(name, _)| redact::is_secret_name(name));
    secrets.map(|(_, value)| value.to_owned()).collect()
}

struct Fields<'a> {
    known: &'a [String],
    list: Vec<Field>,
    names: BTreeSet<String>,
}

impl Fields<'_> {
    fn push(&mut self, name: String, value: &str, is_shown: bool) {
        if self.list.len() >= MAX_FIELDS || !self.names.insert(name.clone()) {
            return;
        }
        let hash = Digest::sha256(value);
        let hash: [u8; 4] = hash.as_bytes().first_chunk().copied().unwrap_or_default();
        self.list.push(Field {
            name,
            value: is_shown.then(|| shortened(&redact::text(value, self.known), MAX_VALUE)),
            hash: u32::from_be_bytes(hash),
        });
    }

    /// Describes what has a value other than the default.
    fn set(&mut self, name: impl Into<String>, value: impl ToString) {
        let value = value.to_string();
        if !value.is_empty() && value != "0" && value != "false" {
            self.push(name.into(), &value, true);
        }
    }

    fn named(&mut self, name: String, key: &str, value: &str) {
        self.push(name, value, !redact::is_secret_name(key));
    }

    fn op(&mut self, spec: &VertexSpec, pin: Option<&Pin>) {
        match &spec.op.op {
            Some(pb::op::Op::Exec(exec)) => self.exec(exec, spec.op.platform.as_ref()),
            Some(pb::op::Op::File(file)) => self.file(file),
            Some(pb::op::Op::Source(source)) => {
                // What it resolved to is told by itself.
                let identifier = match source.identifier.rsplit_once('@') {
                    Some((identifier, _)) if pin.is_some_and(|pin| pin.what == "image") => identifier,
                    _ => &source.identifier,
                };
                self.set("source", identifier);
                for (name, value) in &source.attrs {
                    self.named(format!("attribute {name}"), name, value);
                }
                self.platform(spec.op.platform.as_ref());
            }
            Some(other) => {
                self.leaves("", &serde_json::to_value(other_op(other)).unwrap_or_default());
                self.platform(spec.op.platform.as_ref());
            }
            None => {}
        }
    }

    fn platform(&mut self, platform: Option<&pb::Platform>) {
        let platform = match platform {
            Some(platform) => Platform::from(platform),
            None => Platform::host(),
        };
        self.set("platform", platform);
    }

    fn exec(&mut self, exec: &pb::ExecOp, platform: Option<&pb::Platform>) {
        let meta = exec.meta.clone().unwrap_or_default();
        for (index, argument) in meta.args.iter().enumerate() {
            self.push(format!("argument {}", index + 1), argument, true);
        }
        // The last of a name counts.
        let env: BTreeMap<&str, &str> = meta
            .env
            .iter()
            .map(|pair| pair.split_once('=').unwrap_or((pair, "")))
            .collect();
        for (name, value) in env {
            self.named(format!("environment variable {name}"), name, value);
        }
        self.set("working directory", &meta.cwd);
        self.set("user", &meta.user);
        self.set("host name", &meta.hostname);
        self.set("parent of control groups", &meta.cgroup_parent);
        for limit in &meta.ulimit {
            self.set(
                format!("limit of {}", limit.name),
                format!("{}:{}", limit.soft, limit.hard),
            );
        }
        let hosts: Vec<&str> = meta.extra_hosts.iter().map(|host| host.host.as_str()).collect();
        self.set("extra hosts", hosts.join(", "));
        let codes: Vec<String> = meta.valid_exit_codes.iter().map(ToString::to_string).collect();
        self.set("valid exit codes", codes.join(", "));
        self.set("removal of mount points", meta.remove_mount_stubs_recursive);
        self.set(
            "network",
            pb::NetMode::try_from(exec.network).map_or("", |mode| mode.as_str_name()),
        );
        self.set(
            "security",
            pb::SecurityMode::try_from(exec.security).map_or("", |mode| mode.as_str_name()),
        );
        for secret in &exec.secretenv {
            self.set(
                format!("secret as environment variable {}", secret.name),
                format!("id {}", secret.id),
            );
        }
        for device in &exec.cdi_devices {
            let text = serde_json::to_string(device).unwrap_or_default();
            self.set(format!("device {}", device.name), text);
        }
        for mount in &exec.mounts {
            self.set(format!("mount at {}", mount.dest), mount_text(mount));
        }
        self.platform(platform);
    }

    fn file(&mut self, file: &pb::FileOp) {
        let is_single = file.actions.len() == 1;
        for (index, action) in file.actions.iter().enumerate() {
            let number = if is_single {
                String::new()
            } else {
                format!(" {}", index + 1)
            };
            let mut set = |verb: &str, name: &str, value: String| {
                self.set(format!("{name} of {verb}{number}"), value);
            };
            match &action.action {
                Some(Action::Copy(copy)) => {
                    set("the copy", "source", copy.src.clone());
                    set("the copy", "destination", copy.dest.clone());
                    set("the copy", "owner", owner(copy.owner.as_ref()));
                    set("the copy", "mode", mode(copy.mode, &copy.mode_str));
                    set("the copy", "time", copy.timestamp.to_string());
                    let rest = pb::FileActionCopy {
                        src: String::new(),
                        dest: String::new(),
                        owner: None,
                        mode: 0,
                        mode_str: String::new(),
                        timestamp: 0,
                        ..copy.clone()
                    };
                    self.leaves(
                        &format!("the copy{number}"),
                        &serde_json::to_value(&rest).unwrap_or_default(),
                    );
                }
                Some(Action::Mkfile(made)) => {
                    set("the file", "path", made.path.clone());
                    set("the file", "owner", owner(made.owner.as_ref()));
                    set("the file", "mode", mode(made.mode, ""));
                    set("the file", "time", made.timestamp.to_string());
                    // What a file is made with may be a secret under any name.
                    let hash = Digest::sha256(&made.data).to_string();
                    self.push(format!("content of the file{number}"), &hash, false);
                }
                Some(Action::Mkdir(made)) => {
                    set("the directory", "path", made.path.clone());
                    set("the directory", "owner", owner(made.owner.as_ref()));
                    set("the directory", "mode", mode(made.mode, ""));
                    set("the directory", "time", made.timestamp.to_string());
                    set(
                        "the directory",
                        "making of parents",
                        made.make_parents.to_string(),
                    );
                }
                Some(Action::Symlink(link)) => {
                    set("the link", "path", link.newpath.clone());
                    set("the link", "target", link.oldpath.clone());
                    set("the link", "owner", owner(link.owner.as_ref()));
                    set("the link", "time", link.timestamp.to_string());
                }
                Some(Action::Rm(removed)) => {
                    set("the removal", "path", removed.path.clone());
                    set("the removal", "tolerance", removed.allow_not_found.to_string());
                    set(
                        "the removal",
                        "use of wildcards",
                        removed.allow_wildcard.to_string(),
                    );
                }
                None => {}
            }
        }
    }

    /// Describes the leaves of a JSON document, by path.
    fn leaves(&mut self, path: &str, value: &Value) {
        match value {
            Value::Object(members) => {
                for (name, member) in members {
                    let path = match path {
                        "" => name.clone(),
                        _ => format!("{name} of {path}"),
                    };
                    self.leaves(&path, member);
                }
            }
            Value::Array(items) => {
                for (index, item) in items.iter().enumerate() {
                    self.leaves(&format!("{path} {}", index + 1), item);
                }
            }
            Value::String(text) => self.named(path.to_owned(), path, text),
            leaf => self.set(path, leaf),
        }
    }
}

fn other_op(op: &pb::op::Op) -> pb::Op {
    pb::Op {
        op: Some(op.clone()),
        ..pb::Op::default()
    }
}

/// A mount in words; what does not identify the step, such as a cache mount's name, is left out.
fn mount_text(mount: &pb::Mount) -> String {
    let kind = pb::MountType::try_from(mount.mount_type).map_or("UNKNOWN", |kind| kind.as_str_name());
    let mut words = vec![kind.to_lowercase()];
    if mount.input >= 0 {
        words.push(format!("of input {}", mount.input + 1));
    }
    if mount.readonly {
        words.push("read-only".to_owned());
    }
    if mount.output >= 0 {
        words.push(format!("yields output {}", mount.output + 1));
    }
    if let Some(secret) = &mount.secret_opt {
        words.push(format!(
            "id {}, owner {}:{}, mode {:04o}, optional {}",
            secret.id, secret.uid, secret.gid, secret.mode, secret.optional
        ));
    }
    if let Some(agent) = &mount.ssh_opt {
        words.push(format!(
            "id {}, owner {}:{}, mode {:04o}, optional {}",
            agent.id, agent.uid, agent.gid, agent.mode, agent.optional
        ));
    }
    if let Some(tmpfs) = &mount.tmpfs_opt {
        words.push(format!("{} bytes", tmpfs.size));
    }
    words.join(", ")
}

fn owner(owner: Option<&pb::ChownOpt>) -> String {
    let name = |user: Option<&pb::UserOpt>| match user.and_then(|user| user.user.as_ref()) {
        Some(User::ByName(named)) => named.name.clone(),
        Some(User::ById(id)) => id.to_string(),
        None => String::new(),
    };
    owner.map_or_else(String::new, |owner| {
        format!("{}:{}", name(owner.user.as_ref()), name(owner.group.as_ref()))
    })
}

fn mode(mode: i32, text: &str) -> String {
    match (mode, text) {
        (_, text) if !text.is_empty() => text.to_owned(),
        // -1 and 0 leave the mode alone.
        (mode, _) if mode <= 0 => String::new(),
        (mode, _) => format!("{mode:04o}"),
    }
}

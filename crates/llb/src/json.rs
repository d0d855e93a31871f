//! JSON of the wire types, in the form Go gives them: field names of the `.proto` file, defaults left out, bytes in
//! base64, and each oneof nested in an object named after it.

use ::base64::engine::general_purpose::STANDARD;
use bytes::Bytes;
use serde::{Deserialize, Deserializer, Serialize, Serializer, de::Error as _};

use crate::pb::{
    BuildOp, DiffOp, ExecOp, FileAction, FileActionCopy, FileActionMkDir, FileActionMkFile, FileActionRm,
    FileActionSymlink, FileOp, Input, MergeOp, NamedUserOpt, Op, PassthroughOp, Platform, SourceOp, UserOpt,
    WorkerConstraints, file_action::Action, op, user_opt::User,
};

/// Tells whether Go would leave the value out.
pub fn is_default<T: Default + PartialEq>(value: &T) -> bool {
    *value == T::default()
}

/// Bytes as base64 text, for `#[serde(with)]`.
pub mod base64 {
    use ::base64::Engine as _;

    use super::{Bytes, Deserialize, Deserializer, STANDARD, Serializer};

    /// Writes base64.
    pub fn serialize<S: Serializer>(bytes: &Bytes, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.serialize_str(&STANDARD.encode(bytes))
    }

    /// Reads base64.
    pub fn deserialize<'de, D: Deserializer<'de>>(deserializer: D) -> Result<Bytes, D::Error> {
        let text = Option::<String>::deserialize(deserializer)?.unwrap_or_default();
        STANDARD
            .decode(text)
            .map(Bytes::from)
            .map_err(serde::de::Error::custom)
    }
}

/// Lists of bytes as base64 texts, for `#[serde(with)]`.
pub mod base64_list {
    use ::base64::Engine as _;

    use super::{Bytes, Deserialize, Deserializer, STANDARD, Serializer};

    /// Writes a list of base64 texts.
    pub fn serialize<S: Serializer>(list: &[Bytes], serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_seq(list.iter().map(|bytes| STANDARD.encode(bytes)))
    }

    /// Reads a list of base64 texts.
    pub fn deserialize<'de, D: Deserializer<'de>>(deserializer: D) -> Result<Vec<Bytes>, D::Error> {
        let list = Option::<Vec<String>>::deserialize(deserializer)?.unwrap_or_default();
        let decode = |text| {
            STANDARD
                .decode(text)
                .map(Bytes::from)
                .map_err(serde::de::Error::custom)
        };
        list.into_iter().map(decode).collect()
    }
}

#[derive(Default, Serialize, Deserialize)]
#[serde(default)]
struct JsonOp {
    #[serde(skip_serializing_if = "Vec::is_empty")]
    inputs: Vec<Input>,
    #[serde(rename = "Op")]
    op: JsonOpKind,
    #[serde(skip_serializing_if = "Option::is_none")]
    platform: Option<Platform>,
    #[serde(skip_serializing_if = "Option::is_none")]
    constraints: Option<WorkerConstraints>,
}

#[derive(Default, Serialize, Deserialize)]
#[serde(default)]
struct JsonOpKind {
    #[serde(skip_serializing_if = "Option::is_none")]
    exec: Option<ExecOp>,
    #[serde(skip_serializing_if = "Option::is_none")]
    source: Option<SourceOp>,
    #[serde(skip_serializing_if = "Option::is_none")]
    file: Option<FileOp>,
    #[serde(skip_serializing_if = "Option::is_none")]
    build: Option<BuildOp>,
    #[serde(skip_serializing_if = "Option::is_none")]
    merge: Option<MergeOp>,
    #[serde(skip_serializing_if = "Option::is_none")]
    diff: Option<DiffOp>,
    #[serde(skip_serializing_if = "Option::is_none")]
    passthrough: Option<PassthroughOp>,
}

impl Serialize for Op {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        let mut kind = JsonOpKind::default();
        match self.op.clone() {
            Some(op::Op::Exec(exec)) => kind.exec = Some(exec),
            Some(op::Op::Source(source)) => kind.source = Some(source),
            Some(op::Op::File(file)) => kind.file = Some(file),
            Some(op::Op::Build(build)) => kind.build = Some(build),
            Some(op::Op::Merge(merge)) => kind.merge = Some(merge),
            Some(op::Op::Diff(diff)) => kind.diff = Some(diff),
            Some(op::Op::Passthrough(passthrough)) => kind.passthrough = Some(passthrough),
            None => {}
        }
        let (inputs, platform, constraints) = (
            self.inputs.clone(),
            self.platform.clone(),
            self.constraints.clone(),
        );
        JsonOp {
            inputs,
            op: kind,
            platform,
            constraints,
        }
        .serialize(serializer)
    }
}

impl<'de> Deserialize<'de> for Op {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        let JsonOp {
            inputs,
            op: kind,
            platform,
            constraints,
        } = JsonOp::deserialize(deserializer)?;
        let op = kind
            .exec
            .map(op::Op::Exec)
            .or_else(|| kind.source.map(op::Op::Source))
            .or_else(|| kind.file.map(op::Op::File))
            .or_else(|| kind.build.map(op::Op::Build))
            .or_else(|| kind.merge.map(op::Op::Merge))
            .or_else(|| kind.diff.map(op::Op::Diff))
            .or_else(|| kind.passthrough.map(op::Op::Passthrough));
        Ok(Self {
            inputs,
            platform,
            constraints,
            op,
        })
    }
}

#[derive(Default, Serialize, Deserialize)]
#[serde(default, rename_all = "camelCase")]
struct JsonFileAction {
    input: i64,
    secondary_input: i64,
    output: i64,
    #[serde(rename = "Action")]
    action: JsonActionKind,
}

#[derive(Default, Serialize, Deserialize)]
#[serde(default)]
struct JsonActionKind {
    #[serde(skip_serializing_if = "Option::is_none")]
    copy: Option<FileActionCopy>,
    #[serde(skip_serializing_if = "Option::is_none")]
    mkfile: Option<FileActionMkFile>,
    #[serde(skip_serializing_if = "Option::is_none")]
    mkdir: Option<FileActionMkDir>,
    #[serde(skip_serializing_if = "Option::is_none")]
    rm: Option<FileActionRm>,
    /// Go leaves symlinks out.
    #[serde(skip_serializing_if = "Option::is_none")]
    symlink: Option<FileActionSymlink>,
}

impl Serialize for FileAction {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        let mut kind = JsonActionKind::default();
        match self.action.clone() {
            Some(Action::Copy(copy)) => kind.copy = Some(copy),
            Some(Action::Mkfile(mkfile)) => kind.mkfile = Some(mkfile),
            Some(Action::Mkdir(mkdir)) => kind.mkdir = Some(mkdir),
            Some(Action::Rm(rm)) => kind.rm = Some(rm),
            Some(Action::Symlink(symlink)) => kind.symlink = Some(symlink),
            None => {}
        }
        let (input, secondary_input, output) = (self.input, self.secondary_input, self.output);
        JsonFileAction {
            input,
            secondary_input,
            output,
            action: kind,
        }
        .serialize(serializer)
    }
}

impl<'de> Deserialize<'de> for FileAction {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        let JsonFileAction {
            input,
            secondary_input,
            output,
            action: kind,
        } = JsonFileAction::deserialize(deserializer)?;
        let action = kind
            .copy
            .map(Action::Copy)
            .or_else(|| kind.mkfile.map(Action::Mkfile))
            .or_else(|| kind.mkdir.map(Action::Mkdir))
            .or_else(|| kind.rm.map(Action::Rm))
            .or_else(|| kind.symlink.map(Action::Symlink));
        Ok(Self {
            input,
            secondary_input,
            output,
            action,
        })
    }
}

#[derive(Default, Serialize, Deserialize)]
#[serde(default)]
struct JsonUserOpt {
    #[serde(rename = "User")]
    user: JsonUser,
}

#[derive(Default, Serialize, Deserialize)]
#[serde(default)]
struct JsonUser {
    #[serde(rename = "byName", skip_serializing_if = "Option::is_none")]
    by_name: Option<NamedUserOpt>,
    #[serde(rename = "byId", skip_serializing_if = "is_default")]
    by_id: u32,
}

impl Serialize for UserOpt {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        let user = match self.user.clone() {
            Some(User::ByName(name)) => JsonUser {
                by_name: Some(name),
                by_id: 0,
            },
            Some(User::ById(id)) => JsonUser {
                by_name: None,
                by_id: id,
            },
            None => JsonUser::default(),
        };
        JsonUserOpt { user }.serialize(serializer)
    }
}

impl<'de> Deserialize<'de> for UserOpt {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        let JsonUserOpt { user } = JsonUserOpt::deserialize(deserializer)?;
        let user = match user {
            JsonUser {
                by_name: Some(_),
                by_id,
            } if by_id != 0 => {
                return Err(D::Error::custom("user by name and by ID"));
            }
            JsonUser {
                by_name: Some(name), ..
            } => User::ByName(name),
            JsonUser { by_id, .. } => User::ById(by_id),
        };
        Ok(Self { user: Some(user) })
    }
}

//! Definitions for people: one JSON object per operation, or a graph for Graphviz.

use std::fmt::Write as _;

use bytes::Bytes;
use oci::{Digest, json};
use prost::Message as _;
use serde::Serialize;

use crate::pb::{Definition, ExecOp, FileAction, Op, OpMetadata, file_action::Action, op};
use crate::{GraphError, quote};

/// One operation of a definition, as `buildctl debug dump-llb` prints it.
#[derive(Clone, Debug, Serialize)]
#[serde(rename_all = "PascalCase")]
pub struct DumpedOp {
    /// The operation.
    pub op: Op,
    /// Its digest.
    pub digest: Digest,
    /// Its metadata.
    pub op_metadata: OpMetadata,
}

/// Decodes the operations of a definition in order, without checking them.
pub fn ops(definition: &Definition) -> Result<Vec<DumpedOp>, GraphError> {
    let dump = |raw: &Bytes| {
        let digest = Digest::sha256(raw);
        let op = Op::decode(raw.clone()).map_err(GraphError::Decode)?;
        let op_metadata = definition
            .metadata
            .get(&digest.to_string())
            .cloned()
            .unwrap_or_default();
        Ok(DumpedOp {
            op,
            digest,
            op_metadata,
        })
    };
    definition.def.iter().map(dump).collect()
}

/// Renders one JSON object per line.
pub fn to_json_lines(ops: &[DumpedOp]) -> serde_json::Result<String> {
    let mut out = String::new();
    for op in ops {
        out.push_str(&json::to_string(op)?);
        out.push('\n');
    }
    Ok(out)
}

/// Renders a graph for Graphviz.
pub fn to_dot(ops: &[DumpedOp]) -> String {
    let mut out = String::from("digraph {\n");
    for dumped in ops {
        let (label, shape) = label(dumped);
        let digest = dumped.digest;
        let _ = writeln!(out, "  \"{digest}\" [label={} shape=\"{shape}\"];", quote(&label));
    }
    for dumped in ops {
        let digest = dumped.digest;
        for (at, input) in dumped.op.inputs.iter().enumerate() {
            let label = match &dumped.op.op {
                Some(op::Op::Exec(exec)) => mount_of(exec, at),
                _ => "",
            };
            let (input, label) = (quote(&input.digest), quote(label));
            let _ = writeln!(out, "  {input} -> \"{digest}\" [label={label}];");
        }
    }
    out.push_str("}\n");
    out
}

fn mount_of(exec: &ExecOp, input: usize) -> &str {
    let is_mount = |index: i64| usize::try_from(index).is_ok_and(|index| index == input);
    let mut mounts = exec
        .mounts
        .iter()
        .filter(|mount| is_mount(mount.input) && mount.dest != "/");
    mounts.next_back().map_or("", |mount| mount.dest.as_str())
}

fn label(dumped: &DumpedOp) -> (String, &'static str) {
    match &dumped.op.op {
        Some(op::Op::Source(source)) => (source.identifier.clone(), "ellipse"),
        Some(op::Op::Exec(exec)) => (
            exec.meta
                .as_ref()
                .map(|meta| meta.args.join(" "))
                .unwrap_or_default(),
            "box",
        ),
        Some(op::Op::Build(_)) => ("build".into(), "box3d"),
        Some(op::Op::Merge(_)) => ("merge".into(), "invtriangle"),
        Some(op::Op::Diff(_)) => ("diff".into(), "doublecircle"),
        Some(op::Op::File(file)) => {
            let actions: Vec<String> = file.actions.iter().map(action_label).collect();
            (actions.join(","), "note")
        }
        Some(op::Op::Passthrough(_)) | None => (dumped.digest.to_string(), "plaintext"),
    }
}

fn action_label(action: &FileAction) -> String {
    match &action.action {
        Some(Action::Copy(copy)) => format!("copy{{src={}, dest={}}}", copy.src, copy.dest),
        Some(Action::Mkfile(mkfile)) => format!("mkfile{{path={}}}", mkfile.path),
        Some(Action::Mkdir(mkdir)) => format!("mkdir{{path={}}}", mkdir.path),
        Some(Action::Rm(rm)) => format!("rm{{path={}}}", rm.path),
        Some(Action::Symlink(symlink)) => format!(
            "symlink{{oldpath={}, newpath={}}}",
            symlink.oldpath, symlink.newpath
        ),
        None => String::new(),
    }
}

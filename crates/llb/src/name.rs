//! What operations are called in progress output.

use crate::pb::{FileAction, Op, file_action::Action, op};

/// Names of merges contain the names of their inputs, so they are cut: a few operations could name gigabytes.
const MAX_NAME_BYTES: usize = 4096;

/// Returns the name BuildKit shows for an operation; `input` gives the name of the vertex behind an input.
pub fn op_name<'a>(op: &Op, input: impl Fn(usize) -> Option<&'a str>) -> String {
    let side = |index: i64| {
        let name = usize::try_from(index).ok().and_then(&input);
        name.map_or_else(|| "scratch".to_owned(), |name| format!("({name})"))
    };
    let name = match &op.op {
        Some(op::Op::Source(source)) => source.identifier.clone(),
        Some(op::Op::Exec(exec)) => exec
            .meta
            .as_ref()
            .map(|meta| meta.args.join(" "))
            .unwrap_or_default(),
        Some(op::Op::File(file)) => file
            .actions
            .iter()
            .filter_map(action_name)
            .collect::<Vec<_>>()
            .join(", "),
        Some(op::Op::Build(_)) => "build".into(),
        Some(op::Op::Merge(_)) => {
            let names: Vec<&str> = (0..op.inputs.len()).filter_map(&input).collect();
            format!("merge ({})", names.join(", "))
        }
        Some(op::Op::Diff(diff)) => {
            let lower = diff.lower.as_ref().map_or(-1, |lower| lower.input);
            let upper = diff.upper.as_ref().map_or(-1, |upper| upper.input);
            format!("diff {} -> {}", side(lower), side(upper))
        }
        Some(op::Op::Passthrough(passthrough)) => format!("passthrough {}", passthrough.id),
        None => "unknown".into(),
    };
    match op.op {
        Some(op::Op::Merge(_) | op::Op::Diff(_)) => cut(name),
        _ => name,
    }
}

fn cut(mut name: String) -> String {
    if name.len() > MAX_NAME_BYTES {
        let end = (0..=MAX_NAME_BYTES)
            .rev()
            .find(|at| name.is_char_boundary(*at))
            .unwrap_or(0);
        name.truncate(end);
        name.push('…');
    }
    name
}

fn action_name(action: &FileAction) -> Option<String> {
    Some(match action.action.as_ref()? {
        Action::Mkdir(mkdir) => format!("mkdir {}", mkdir.path),
        Action::Mkfile(mkfile) => format!("mkfile {}", mkfile.path),
        Action::Symlink(symlink) => format!("symlink {} -> {}", symlink.newpath, symlink.oldpath),
        Action::Rm(rm) => format!("rm {}", rm.path),
        Action::Copy(copy) => format!("copy {} {}", copy.src, copy.dest),
    })
}

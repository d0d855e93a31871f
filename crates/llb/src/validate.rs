//! What a single operation must satisfy before anything looks at it.

use crate::pb::{
    BuildOp, CacheSharingOpt, ChownOpt, ExecOp, FileAction, FileOp, MountContentCache, MountType, NetMode,
    Op, PassthroughOp, SecurityMode, UserOpt, file_action::Action, op, user_opt::User,
};

/// Why an operation is refused.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum OpError {
    /// The operation is of no known kind.
    #[error("invalid op of unknown kind")]
    UnknownKind,
    /// A part that must be there is not.
    #[error("invalid {0}")]
    Missing(&'static str),
    /// An enum has a value this version does not know; guessing could weaken a sandbox.
    #[error("invalid {field} {value}")]
    UnknownValue {
        /// Which enum.
        field: &'static str,
        /// The value.
        value: i32,
    },
    /// An index points outside of the inputs or outputs.
    #[error("invalid {field} index {index}")]
    Index {
        /// What the index points to.
        field: &'static str,
        /// The index.
        index: i64,
    },
}

/// Checks one operation by itself; returns how many outputs it has.
pub(crate) fn validate(op: &Op) -> Result<usize, OpError> {
    let inputs = op.inputs.len();
    match op.op.as_ref().ok_or(OpError::UnknownKind)? {
        op::Op::Source(source) if source.identifier.is_empty() => {
            Err(OpError::Missing("source op with no identifier"))
        }
        op::Op::Source(_) => Ok(1),
        op::Op::Exec(exec) => validate_exec(exec, inputs),
        op::Op::File(file) => validate_file(file, inputs),
        op::Op::Build(build) => validate_build(build, inputs),
        op::Op::Merge(merge) => {
            for input in &merge.inputs {
                check("merge input", input.input, inputs)?;
            }
            Ok(1)
        }
        op::Op::Diff(diff) => {
            let (Some(lower), Some(upper)) = (&diff.lower, &diff.upper) else {
                return Err(OpError::Missing("diff op with nil lower or upper input"));
            };
            check_or_empty("diff input", lower.input, inputs)?;
            check_or_empty("diff input", upper.input, inputs)?;
            Ok(1)
        }
        op::Op::Passthrough(passthrough) => validate_passthrough(passthrough, inputs),
    }
}

/// Accepts `0..count`.
fn check(field: &'static str, index: i64, count: usize) -> Result<(), OpError> {
    match usize::try_from(index) {
        Ok(at) if at < count => Ok(()),
        _ => Err(OpError::Index { field, index }),
    }
}

/// Accepts `0..count` and -1.
fn check_or_empty(field: &'static str, index: i64, count: usize) -> Result<(), OpError> {
    if index == crate::pb::EMPTY {
        Ok(())
    } else {
        check(field, index, count)
    }
}

fn known<T: TryFrom<i32>>(field: &'static str, value: i32) -> Result<T, OpError> {
    T::try_from(value).map_err(|_| OpError::UnknownValue { field, value })
}

/// Returns the number of outputs that indices up to the greatest one need.
fn outputs(indices: impl Iterator<Item = i64>) -> usize {
    indices
        .filter_map(|index| usize::try_from(index).ok())
        .map(|index| index + 1)
        .max()
        .unwrap_or(0)
}

fn validate_exec(exec: &ExecOp, inputs: usize) -> Result<usize, OpError> {
    let meta = exec
        .meta
        .as_ref()
        .ok_or(OpError::Missing("exec op with no meta"))?;
    if meta.args.is_empty() {
        return Err(OpError::Missing("exec op with no args"));
    }
    if exec.mounts.is_empty() {
        return Err(OpError::Missing("exec op with no mounts"));
    }
    if !exec.mounts.iter().any(|mount| mount.dest == "/") {
        return Err(OpError::Missing("exec op with no rootfs"));
    }
    known::<NetMode>("network mode", exec.network)?;
    known::<SecurityMode>("security mode", exec.security)?;
    for mount in &exec.mounts {
        check_or_empty("mount input", mount.input, inputs)?;
        check_or_empty("mount output", mount.output, exec.mounts.len())?;
        known::<MountType>("mount type", mount.mount_type)?;
        known::<MountContentCache>("mount content cache", mount.content_cache)?;
        if let Some(cache) = &mount.cache_opt {
            known::<CacheSharingOpt>("cache sharing mode", cache.sharing)?;
        }
    }
    let kept = exec.mounts.iter().filter(|mount| {
        let kind = MountType::try_from(mount.mount_type).unwrap_or_default();
        matches!(kind, MountType::Bind | MountType::Cache)
    });
    Ok(outputs(kept.map(|mount| mount.output)))
}

fn validate_file(file: &FileOp, inputs: usize) -> Result<usize, OpError> {
    if file.actions.is_empty() {
        return Err(OpError::Missing("file op with no actions"));
    }
    for (at, action) in file.actions.iter().enumerate() {
        validate_action(action, inputs + at, file.actions.len())?;
    }
    Ok(outputs(file.actions.iter().map(|action| action.output)))
}

fn validate_action(action: &FileAction, inputs: usize, actions: usize) -> Result<(), OpError> {
    check_or_empty("file action input", action.input, inputs)?;
    check_or_empty("file action secondary input", action.secondary_input, inputs)?;
    check_or_empty("file action output", action.output, actions)?;
    let owner = match action
        .action
        .as_ref()
        .ok_or(OpError::Missing("file action of unknown kind"))?
    {
        Action::Copy(copy) => &copy.owner,
        Action::Mkfile(mkfile) => &mkfile.owner,
        Action::Mkdir(mkdir) => &mkdir.owner,
        Action::Symlink(symlink) => &symlink.owner,
        Action::Rm(_) => &None,
    };
    let Some(ChownOpt { user, group }) = owner else {
        return Ok(());
    };
    for UserOpt { user } in [user, group].into_iter().flatten() {
        if let Some(User::ByName(name)) = user {
            check_or_empty("file owner input", name.input, inputs)?;
        }
    }
    Ok(())
}

fn validate_build(build: &BuildOp, inputs: usize) -> Result<usize, OpError> {
    check_or_empty("build op builder", build.builder, inputs)?;
    for input in build.inputs.values() {
        check("build op input", input.input, inputs)?;
    }
    Ok(1)
}

fn validate_passthrough(passthrough: &PassthroughOp, inputs: usize) -> Result<usize, OpError> {
    if passthrough.id.is_empty() {
        return Err(OpError::Missing("passthrough op with no id"));
    }
    if passthrough.outputs.is_empty() {
        return Err(OpError::Missing("passthrough op with no outputs"));
    }
    for input in &passthrough.outputs {
        check("passthrough output input", *input, inputs)?;
    }
    Ok(passthrough.outputs.len())
}

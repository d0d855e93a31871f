//! Carrying out the actions of a file op on trees. Runs on a blocking thread.
//!
//! Actions name what they work on by index: the op's inputs come first, then the actions' own results. A result that is
//! an output, or that several actions use, is committed; otherwise the next action goes on in the same tree.

use std::collections::BTreeMap;
use std::path::Path;

use cache::{ImmutableRef, MutableRef, RefOptions, Store};
use layer::Stop;
use layer::copy::{CopyError, CopyOptions, ModeChange};
use layer::tree::{Attributes, Root, Timestamp, TreeError};
use llb::pb;
use llb::pb::file_action::Action;
use tokio_util::sync::CancellationToken;

use super::owner;
use crate::error::{BuildError, ErrorKind};
use crate::op::ResultRef;

/// In which order actions run and which of their results are committed.
#[derive(Debug)]
pub(super) struct Plan {
    /// Indices of actions; what an action uses comes before it.
    order: Vec<usize>,
    /// Per action, whether its result becomes a ref.
    commits: Vec<bool>,
    /// Action of each output.
    outputs: Vec<usize>,
}

impl Plan {
    /// Checks all indices of `op` on a vertex with `inputs` inputs.
    pub(super) fn new(op: &pb::FileOp, inputs: usize) -> Result<Self, BuildError> {
        let total = inputs + op.actions.len();
        let mut uses = vec![0_usize; total];
        let mut outputs = BTreeMap::new();
        for (at, action) in op.actions.iter().enumerate() {
            for (index, what) in [
                (action.input, "input"),
                (action.secondary_input, "secondary input"),
            ] {
                if let Some(index) = checked(index, total, what)? {
                    uses[index] += 1;
                }
            }
            if action.output != -1 && outputs.insert(action.output, at).is_some() {
                return Err(BuildError::user(format!("duplicate output {}", action.output)));
            }
        }
        if outputs.is_empty() {
            return Err(BuildError::user("no outputs specified"));
        }
        for (expected, output) in (0_i64..).zip(outputs.keys()) {
            if expected != *output {
                return Err(BuildError::user(format!("missing output index {expected}")));
            }
        }
        let commits = (0..op.actions.len())
            .map(|at| uses[inputs + at] > 1 || op.actions[at].output != -1)
            .collect();
        let outputs: Vec<usize> = outputs.into_values().collect();
        Ok(Self {
            order: order(op, inputs, &outputs)?,
            commits,
            outputs,
        })
    }
}

fn checked(index: i64, total: usize, what: &str) -> Result<Option<usize>, BuildError> {
    if index == -1 {
        return Ok(None);
    }
    match usize::try_from(index) {
        Ok(index) if index < total => Ok(Some(index)),
        _ => Err(BuildError::user(format!(
            "invalid {what} index {index}, {total} provided"
        ))),
    }
}

/// Sorts the actions that the outputs need so that each comes after what it uses.
fn order(op: &pb::FileOp, inputs: usize, outputs: &[usize]) -> Result<Vec<usize>, BuildError> {
    #[derive(Clone, Copy, PartialEq)]
    enum Mark {
        New,
        Open,
        Done,
    }
    let mut marks = vec![Mark::New; op.actions.len()];
    let mut order = Vec::with_capacity(op.actions.len());
    for root in outputs {
        let mut stack = vec![(*root, false)];
        while let Some((at, used_are_done)) = stack.pop() {
            if used_are_done {
                marks[at] = Mark::Done;
                order.push(at);
                continue;
            }
            match marks[at] {
                Mark::Done => continue,
                Mark::Open => return Err(BuildError::user(format!("loop from index {}", inputs + at))),
                Mark::New => marks[at] = Mark::Open,
            }
            stack.push((at, true));
            let action = &op.actions[at];
            let used = [action.input, action.secondary_input]
                .into_iter()
                .chain(owner_inputs(action));
            for index in used.filter_map(|index| usize::try_from(index).ok()) {
                let next = index.checked_sub(inputs);
                if let Some(next) =
                    next.filter(|next| marks.get(*next).is_some_and(|mark| *mark != Mark::Done))
                {
                    stack.push((next, false));
                }
            }
        }
    }
    Ok(order)
}

/// Inputs in which an action looks up names of owners.
fn owner_inputs(action: &pb::FileAction) -> impl Iterator<Item = i64> {
    let owner = owner_of(action);
    let users = owner
        .into_iter()
        .flat_map(|owner| [owner.user.as_ref(), owner.group.as_ref()])
        .flatten();
    users.filter_map(|user| match &user.user {
        Some(pb::user_opt::User::ByName(named)) => Some(named.input),
        _ => None,
    })
}

fn owner_of(action: &pb::FileAction) -> Option<&pb::ChownOpt> {
    match action.action.as_ref()? {
        Action::Copy(copy) => copy.owner.as_ref(),
        Action::Mkfile(mkfile) => mkfile.owner.as_ref(),
        Action::Mkdir(mkdir) => mkdir.owner.as_ref(),
        Action::Symlink(symlink) => symlink.owner.as_ref(),
        Action::Rm(_) => None,
    }
}

/// Why a file op failed, and what its actions had made by then.
#[derive(Debug)]
pub(super) struct Failure {
    /// The error.
    pub error: BuildError,
    /// The action that failed; `None`: the op as a whole.
    pub action: Option<usize>,
    /// Per action, what it made, or the state of the tree that it failed on.
    pub mounts: Vec<Option<ResultRef>>,
}

impl From<BuildError> for Failure {
    fn from(error: BuildError) -> Self {
        Self {
            error,
            action: None,
            mounts: Vec::new(),
        }
    }
}

/// Runs the op and returns its outputs.
pub(super) fn run(
    op: &pb::FileOp,
    store: &Store,
    inputs: &[ResultRef],
    description: &str,
    cancel: &CancellationToken,
) -> Result<Vec<Option<ResultRef>>, Failure> {
    let plan = Plan::new(op, inputs.len())?;
    let mut work = Work {
        store,
        inputs,
        description,
        made: BTreeMap::new(),
        opened: BTreeMap::new(),
        stop: {
            let cancel = cancel.clone();
            Stop::when(move || cancel.is_cancelled())
        },
    };
    for at in &plan.order {
        if cancel.is_cancelled() {
            return Err(BuildError::canceled().into());
        }
        let action = &op.actions[*at];
        work.open_readers(action)?;
        let target = work.take_target(action.input)?;
        if let Err(error) = work.perform(action, &target) {
            if cancel.is_cancelled() {
                return Err(BuildError::canceled().into());
            }
            let mounts = work.left(target, *at, op.actions.len());
            return Err(Failure {
                error,
                action: Some(*at),
                mounts,
            });
        }
        let made = if plan.commits[*at] {
            Made::Ref(target.commit()?)
        } else {
            Made::Tree(target)
        };
        work.made.insert(*at, made);
    }
    let results = plan.outputs.iter().map(|at| match work.made.get(at) {
        Some(Made::Ref(reference)) => Ok(Some(ResultRef::new(reference.clone()))),
        _ => Err(BuildError::internal("file op lost an output").into()),
    });
    results.collect()
}

/// A writable tree.
#[derive(Debug)]
struct Target {
    tree: Root,
    reference: MutableRef,
}

impl Target {
    fn new(store: &Store, parent: Option<&ImmutableRef>, description: &str) -> Result<Self, BuildError> {
        let options = RefOptions {
            description: description.to_owned(),
            ..RefOptions::default()
        };
        let reference = store.create_mutable(parent, options).map_err(internal)?;
        let mounts = reference.mounts(false).map_err(internal)?;
        Ok(Self {
            tree: open(&mounts)?,
            reference,
        })
    }

    fn commit(self) -> Result<ImmutableRef, BuildError> {
        drop(self.tree);
        self.reference.commit().map_err(internal)
    }
}

fn open(mounts: &[snapshot::Mount]) -> Result<Root, BuildError> {
    let [mount] = mounts else {
        return Err(BuildError::internal(format!(
            "a snapshot has {} mounts instead of one",
            mounts.len()
        )));
    };
    let tree = mount.open().map_err(internal)?;
    Root::new(&tree).map_err(internal)
}

fn internal(error: impl std::error::Error + Send + Sync + 'static) -> BuildError {
    BuildError::from_source(ErrorKind::Internal, error)
}

#[derive(Debug)]
enum Made {
    Ref(ImmutableRef),
    Tree(Target),
}

#[derive(Debug)]
struct Work<'a> {
    store: &'a Store,
    inputs: &'a [ResultRef],
    description: &'a str,
    /// Results of actions by the action's index.
    made: BTreeMap<usize, Made>,
    /// Trees of refs that are read, by index; scratch has none.
    opened: BTreeMap<usize, Root>,
    /// When to give up.
    stop: Stop,
}

impl Work<'_> {
    /// The ref at an index; `None` is scratch.
    fn reference(&self, index: usize) -> Option<&ImmutableRef> {
        if let Some(input) = self.inputs.get(index) {
            return input.get();
        }
        match self.made.get(&(index - self.inputs.len())) {
            Some(Made::Ref(reference)) => Some(reference),
            _ => None,
        }
    }

    /// Opens the trees from which an action copies or looks up names.
    fn open_readers(&mut self, action: &pb::FileAction) -> Result<(), BuildError> {
        let read = std::iter::once(action.secondary_input).chain(owner_inputs(action));
        for index in read.filter_map(|index| usize::try_from(index).ok()) {
            if self.opened.contains_key(&index) {
                continue;
            }
            if let Some(reference) = self.reference(index) {
                let tree = open(&reference.mounts().map_err(internal)?)?;
                self.opened.insert(index, tree);
            }
        }
        Ok(())
    }

    /// What the failed action left, and those before it, for whoever looks into the failure.
    fn left(self, target: Target, at: usize, actions: usize) -> Vec<Option<ResultRef>> {
        let mut mounts = vec![None; actions];
        for (before, made) in self.made {
            mounts[before] = match made {
                Made::Ref(reference) => Some(ResultRef::new(reference)),
                Made::Tree(tree) => tree.commit().ok().map(ResultRef::new),
            };
        }
        mounts[at] = target.commit().ok().map(ResultRef::new);
        mounts
    }

    /// The tree that an action changes: a new one on top of a ref, or the one the action before left.
    fn take_target(&mut self, input: i64) -> Result<Target, BuildError> {
        let Ok(index) = usize::try_from(input) else {
            return Target::new(self.store, None, self.description);
        };
        if let Some(at) = index.checked_sub(self.inputs.len())
            && matches!(self.made.get(&at), Some(Made::Tree(_)))
            && let Some(Made::Tree(target)) = self.made.remove(&at)
        {
            return Ok(target);
        }
        Target::new(self.store, self.reference(index), self.description)
    }

    /// A tree that an action reads; `None` is scratch. An action may look names up in the tree that it changes.
    fn reader<'a>(&'a self, index: i64, input: i64, target: &'a Target) -> Option<&'a Root> {
        let at = usize::try_from(index).ok()?;
        if let Some(root) = self.opened.get(&at) {
            return Some(root);
        }
        if index == input {
            return Some(&target.tree);
        }
        match self.made.get(&at.checked_sub(self.inputs.len())?) {
            Some(Made::Tree(made)) => Some(&made.tree),
            _ => None,
        }
    }

    fn perform(&self, action: &pb::FileAction, target: &Target) -> Result<(), BuildError> {
        let tree = |index: i64| -> Result<Option<&Root>, BuildError> {
            if index < 0 {
                return Err(BuildError::user(format!("invalid user index: {index}")));
            }
            Ok(self.reader(index, action.input, target))
        };
        let owner = owner::resolve(owner_of(action), &tree)?;
        match &action.action {
            Some(Action::Mkdir(mkdir)) => {
                let attributes = Attributes {
                    owner,
                    time: time(mkdir.timestamp),
                };
                let mode = permissions(mkdir.mode);
                target
                    .tree
                    .mkdir(Path::new(&mkdir.path), mode, mkdir.make_parents, attributes)
                    .map_err(tree_error)
            }
            Some(Action::Mkfile(mkfile)) => {
                let attributes = Attributes {
                    owner,
                    time: time(mkfile.timestamp),
                };
                let mode = permissions(mkfile.mode);
                target
                    .tree
                    .mkfile(Path::new(&mkfile.path), &mkfile.data, mode, attributes)
                    .map_err(tree_error)
            }
            Some(Action::Symlink(link)) => {
                let attributes = Attributes {
                    owner,
                    time: time(link.timestamp),
                };
                let (old, new) = (Path::new(&link.oldpath), Path::new(&link.newpath));
                target.tree.symlink(old, new, attributes).map_err(tree_error)
            }
            Some(Action::Rm(rm)) => target
                .tree
                .remove(Path::new(&rm.path), rm.allow_wildcard, rm.allow_not_found)
                .map_err(tree_error),
            Some(Action::Copy(copy)) => self.copy(copy, action, owner, target),
            None => Err(BuildError::user("invalid file action without a kind")),
        }
    }

    fn copy(
        &self,
        copy: &pb::FileActionCopy,
        action: &pb::FileAction,
        owner: Option<(u32, u32)>,
        target: &Target,
    ) -> Result<(), BuildError> {
        let options = CopyOptions {
            stop: self.stop.clone(),
            ..copy_options(copy, owner)
        };
        let (source, dest) = (Path::new(&copy.src), Path::new(&copy.dest));
        let copied = match self.reader(action.secondary_input, action.input, target) {
            Some(from) => layer::copy::copy(from, source, &target.tree, dest, &options),
            None => {
                let empty = Target::new(self.store, None, self.description)?;
                layer::copy::copy(&empty.tree, source, &target.tree, dest, &options)
            }
        };
        copied.map_err(copy_error)
    }
}

fn copy_options(copy: &pb::FileActionCopy, owner: Option<(u32, u32)>) -> CopyOptions {
    let mode = if copy.mode_str.is_empty() {
        u32::try_from(copy.mode).ok().map(ModeChange::Bits)
    } else {
        Some(ModeChange::Symbolic(copy.mode_str.clone()))
    };
    CopyOptions {
        owner,
        time: time(copy.timestamp),
        mode,
        include: copy.include_patterns.clone(),
        exclude: copy.exclude_patterns.clone(),
        allow_wildcard: copy.allow_wildcard,
        allow_empty_wildcard: copy.allow_empty_wildcard,
        follow_symlinks: copy.follow_symlink,
        dir_contents: copy.dir_copy_contents,
        create_dest_path: copy.create_dest_path,
        always_replace: copy.always_replace_existing_dest_paths,
        unpack: copy.attempt_unpack_docker_compatibility,
        stop: Stop::default(),
    }
}

/// -1 says nothing about the time.
fn time(timestamp_ns: i64) -> Option<Timestamp> {
    (timestamp_ns != -1).then(|| Timestamp::from_unix_nanos(timestamp_ns))
}

fn permissions(mode: i32) -> u32 {
    mode.cast_unsigned() & 0o777
}

fn tree_error(error: TreeError) -> BuildError {
    BuildError::from_source(kind(&error.source), error)
}

fn copy_error(error: CopyError) -> BuildError {
    let kind = match &error {
        CopyError::Tree(tree) => kind(&tree.source),
        CopyError::NoMatch { .. } => ErrorKind::NotFound,
        _ => ErrorKind::User,
    };
    BuildError::from_source(kind, error)
}

/// A full or failing disk is nothing the build's author can mend.
fn kind(error: &std::io::Error) -> ErrorKind {
    use std::io::ErrorKind as Io;
    match error.kind() {
        Io::NotFound => ErrorKind::NotFound,
        Io::StorageFull | Io::QuotaExceeded | Io::ReadOnlyFilesystem => ErrorKind::Unavailable,
        _ => ErrorKind::User,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn action(input: i64, secondary_input: i64, output: i64) -> pb::FileAction {
        let mkdir = pb::FileActionMkDir {
            path: "/a".to_owned(),
            ..Default::default()
        };
        pb::FileAction {
            input,
            secondary_input,
            output,
            action: Some(Action::Mkdir(mkdir)),
        }
    }

    fn plan(actions: Vec<pb::FileAction>, inputs: usize) -> Result<Plan, String> {
        Plan::new(&pb::FileOp { actions }, inputs).map_err(|error| error.to_string())
    }

    #[test]
    fn runs_what_is_used_first_and_commits_what_is_shared() {
        let plan = plan(vec![action(3, -1, 0), action(0, -1, -1), action(2, 2, 1)], 1).expect("is valid");
        assert_eq!(plan.order, [1, 2, 0]);
        assert_eq!(plan.commits, [true, true, true]);
        assert_eq!(plan.outputs, [0, 2]);
    }

    #[test]
    fn goes_on_in_the_same_tree_along_a_chain() {
        let plan = plan(vec![action(0, -1, -1), action(1, -1, 0)], 1).expect("is valid");
        assert_eq!(plan.commits, [false, true]);
    }

    #[test]
    fn refuses_indices_that_lead_nowhere() {
        let refused = |actions: Vec<pb::FileAction>| plan(actions, 1).expect_err("is refused");
        assert!(refused(vec![action(5, -1, 0)]).contains("invalid input index 5"));
        assert!(refused(vec![action(-2, -1, 0)]).contains("invalid input index -2"));
        assert!(refused(vec![action(0, 9, 0)]).contains("invalid secondary input index 9"));
        assert!(refused(vec![action(1, -1, 0)]).contains("loop"));
        assert!(refused(vec![action(2, -1, -1), action(1, -1, 0)]).contains("loop"));
        assert!(refused(vec![action(0, -1, -1)]).contains("no outputs"));
        assert!(refused(vec![action(0, -1, 1)]).contains("missing output index 0"));
        assert!(refused(vec![action(0, -1, 0), action(0, -1, 0)]).contains("duplicate output 0"));
    }
}

//! Operations of definitions: well made ones, to be spoiled by whoever uses them.

use bytes::Bytes;
use llb::pb;
use llb::pb::file_action::Action;
use prost::Message as _;

/// The definition of the last operation's first output.
pub fn definition(ops: &[pb::Op]) -> pb::Definition {
    let output = ops.last().map(|last| input(last, 0));
    let end = pb::Op {
        inputs: output.into_iter().collect(),
        ..pb::Op::default()
    };
    raw(ops.iter().chain([&end]).map(llb::encode_op))
}

/// A definition of any bytes.
pub fn raw(ops: impl IntoIterator<Item = Bytes>) -> pb::Definition {
    pb::Definition {
        def: ops.into_iter().collect(),
        ..pb::Definition::default()
    }
}

/// An operation's output as an input.
pub fn input(op: &pb::Op, index: i64) -> pb::Input {
    pb::Input {
        digest: llb::op_digest(op).to_string(),
        index,
    }
}

/// An operation on the first outputs of others.
pub fn op(kind: pb::op::Op, inputs: &[&pb::Op]) -> pb::Op {
    pb::Op {
        inputs: inputs.iter().map(|from| input(from, 0)).collect(),
        op: Some(kind),
        ..pb::Op::default()
    }
}

/// A source.
pub fn source(identifier: &str, attrs: &[(&str, &str)]) -> pb::Op {
    let attrs = attrs
        .iter()
        .map(|(key, value)| ((*key).to_owned(), (*value).to_owned()))
        .collect();
    let identifier = identifier.to_owned();
    op(pb::op::Op::Source(pb::SourceOp { identifier, attrs }), &[])
}

/// An image.
pub fn image(reference: &str) -> pb::Op {
    source(&format!("docker-image://{reference}"), &[])
}

/// A file operation of one action.
pub fn file(action: Action, inputs: &[&pb::Op]) -> pb::Op {
    let has = |at: usize| if inputs.len() > at { at as i64 } else { pb::EMPTY };
    files(
        vec![pb::FileAction {
            input: has(0),
            secondary_input: has(1),
            output: 0,
            action: Some(action),
        }],
        inputs,
    )
}

/// A file operation.
pub fn files(actions: Vec<pb::FileAction>, inputs: &[&pb::Op]) -> pb::Op {
    op(pb::op::Op::File(pb::FileOp { actions }), inputs)
}

/// Making a file in nothing.
pub fn mkfile(path: &str, data: &'static [u8]) -> pb::Op {
    file(Action::Mkfile(making(path, data)), &[])
}

/// The action of making a file.
pub fn making(path: &str, data: &'static [u8]) -> pb::FileActionMkFile {
    pb::FileActionMkFile {
        path: path.to_owned(),
        mode: 0o644,
        data: Bytes::from_static(data),
        timestamp: -1,
        ..pb::FileActionMkFile::default()
    }
}

/// The action of making a symbolic link.
pub fn linking(path: &str, target: &str) -> Action {
    Action::Symlink(pb::FileActionSymlink {
        oldpath: target.to_owned(),
        newpath: path.to_owned(),
        timestamp: -1,
        ..pb::FileActionSymlink::default()
    })
}

/// The action of copying.
pub fn copying(src: &str, dest: &str, edit: impl FnOnce(&mut pb::FileActionCopy)) -> Action {
    let mut copy = pb::FileActionCopy {
        src: src.to_owned(),
        dest: dest.to_owned(),
        mode: -1,
        timestamp: -1,
        create_dest_path: true,
        ..pb::FileActionCopy::default()
    };
    edit(&mut copy);
    Action::Copy(copy)
}

/// A step that runs a script on the first of its inputs, and may be spoiled before.
pub fn exec(inputs: &[&pb::Op], script: &str, spoil: impl FnOnce(&mut pb::ExecOp, &mut pb::Meta)) -> pb::Op {
    let mut meta = pb::Meta {
        args: ["/bin/sh", "-c", script].map(str::to_owned).to_vec(),
        env: vec!["PATH=/bin".to_owned()],
        cwd: "/".to_owned(),
        ..pb::Meta::default()
    };
    let root = pb::Mount {
        dest: "/".to_owned(),
        ..pb::Mount::default()
    };
    let mut exec = pb::ExecOp {
        mounts: vec![root],
        ..pb::ExecOp::default()
    };
    spoil(&mut exec, &mut meta);
    exec.meta = Some(meta);
    op(pb::op::Op::Exec(exec), inputs)
}

/// A mount without input and output.
pub fn mount(kind: pb::MountType, dest: &str) -> pb::Mount {
    pb::Mount {
        input: pb::EMPTY,
        output: pb::EMPTY,
        dest: dest.to_owned(),
        mount_type: kind.into(),
        ..pb::Mount::default()
    }
}

/// A mount of a step's second input, which may be too large to be a key by its content.
pub fn second(dest: &str) -> pb::Mount {
    pb::Mount {
        input: 1,
        readonly: true,
        content_cache: pb::MountContentCache::Off.into(),
        ..mount(pb::MountType::Bind, dest)
    }
}

/// An operation's bytes with a field that no version knows instead of its kind.
pub fn of_unknown_kind(op: &pb::Op) -> Bytes {
    let mut bytes = pb::Op {
        op: None,
        ..op.clone()
    }
    .encode_to_vec();
    // Field 99, length-delimited, one byte.
    bytes.extend_from_slice(&[0x9a, 0x06, 0x01, 0x00]);
    bytes.into()
}

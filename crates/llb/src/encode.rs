//! Encoding operations with the bytes of Go's deterministic protobuf encoder.
//!
//! prost differs in three ways: it writes the fields of a oneof in tag order (Go writes them last), it leaves out keys
//! and values of maps that have their default (Go writes both always), and its hash maps have no order (here all maps
//! are ordered trees). Only the first two need care, and only in `Op`, `SourceOp` and `BuildOp`.

use std::collections::BTreeMap;

use bytes::Bytes;
use oci::Digest;
use prost::Message;

use crate::pb::{BuildOp, Op, SourceOp, op};

/// Encodes an operation as the Go client does.
pub fn encode_op(op: &Op) -> Bytes {
    let (inputs, platform, constraints) = (op.inputs.clone(), op.platform.clone(), op.constraints.clone());
    let mut out = Op {
        inputs,
        platform,
        constraints,
        op: None,
    }
    .encode_to_vec();
    match &op.op {
        None => {}
        Some(op::Op::Exec(exec)) => put_message(&mut out, 2, &exec.encode_to_vec()),
        Some(op::Op::Source(source)) => put_message(&mut out, 3, &encode_source(source)),
        Some(op::Op::File(file)) => put_message(&mut out, 4, &file.encode_to_vec()),
        Some(op::Op::Build(build)) => put_message(&mut out, 5, &encode_build(build)),
        Some(op::Op::Merge(merge)) => put_message(&mut out, 6, &merge.encode_to_vec()),
        Some(op::Op::Diff(diff)) => put_message(&mut out, 7, &diff.encode_to_vec()),
        Some(op::Op::Passthrough(passthrough)) => put_message(&mut out, 8, &passthrough.encode_to_vec()),
    }
    out.into()
}

/// Returns the digest of an encoded operation: its identity.
pub fn op_digest(op: &Op) -> Digest {
    Digest::sha256(encode_op(op))
}

fn encode_source(source: &SourceOp) -> Vec<u8> {
    let mut out = SourceOp {
        identifier: source.identifier.clone(),
        attrs: BTreeMap::new(),
    }
    .encode_to_vec();
    put_text_map(&mut out, 2, &source.attrs);
    out
}

fn encode_build(build: &BuildOp) -> Vec<u8> {
    let mut out = BuildOp {
        builder: build.builder,
        ..BuildOp::default()
    }
    .encode_to_vec();
    for (key, input) in &build.inputs {
        let mut entry = Vec::new();
        put_message(&mut entry, 1, key.as_bytes());
        put_message(&mut entry, 2, &input.encode_to_vec());
        put_message(&mut out, 2, &entry);
    }
    if let Some(def) = &build.def {
        put_message(&mut out, 3, &def.encode_to_vec());
    }
    put_text_map(&mut out, 4, &build.attrs);
    out
}

fn put_text_map(out: &mut Vec<u8>, tag: u32, map: &BTreeMap<String, String>) {
    for (key, value) in map {
        let mut entry = Vec::new();
        put_message(&mut entry, 1, key.as_bytes());
        put_message(&mut entry, 2, value.as_bytes());
        put_message(out, tag, &entry);
    }
}

/// Writes a length-delimited field.
fn put_message(out: &mut Vec<u8>, tag: u32, bytes: &[u8]) {
    put_varint(out, u64::from(tag << 3 | 2));
    put_varint(out, bytes.len() as u64);
    out.extend_from_slice(bytes);
}

fn put_varint(out: &mut Vec<u8>, mut value: u64) {
    while value > 0x7f {
        out.push(value.to_le_bytes()[0] | 0x80);
        value >>= 7;
    }
    out.push(value.to_le_bytes()[0]);
}

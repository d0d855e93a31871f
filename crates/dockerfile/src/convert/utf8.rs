//! What of a Dockerfile that is not UTF-8 cannot be part of a definition: texts of protocol buffers are UTF-8.

use llb::pb::{Definition, file_action, op};
use llb::{Graph, Vertex, encode_op};

use crate::error::{ConvertError, Progress};
use crate::position::{Position, Range};
use crate::raw;

/// Refuses operations with texts that are not UTF-8, and makes what is said about the others showable.
pub(super) fn check(definition: &mut Definition) -> Progress<()> {
    if definition.def.iter().any(|op| raw::is_within(op)) {
        let graph = Graph::load(definition)?;
        if let Some(vertex) = graph.vertices().iter().find(|vertex| has_raw_text(vertex)) {
            return Err(refusal(definition, vertex).into());
        }
    }
    for metadata in definition.metadata.values_mut() {
        for text in metadata.description.values_mut() {
            *text = raw::shown(std::mem::take(text));
        }
    }
    Ok(())
}

/// Tells whether an operation has such a text. The contents of files are none.
fn has_raw_text(vertex: &Vertex) -> bool {
    let mut op = vertex.op.clone();
    if let Some(op::Op::File(file)) = &mut op.op {
        for action in &mut file.actions {
            if let Some(file_action::Action::Mkfile(mkfile)) = &mut action.action {
                mkfile.data = Vec::new().into();
            }
        }
    }
    raw::is_within(&encode_op(&op))
}

fn refusal(definition: &Definition, vertex: &Vertex) -> ConvertError {
    let source = definition.source.as_ref();
    let locations = source.and_then(|source| source.locations.get(&vertex.digest.to_string()));
    let ranges: Vec<Range> = locations
        .into_iter()
        .flat_map(|locations| &locations.locations)
        .flat_map(|location| &location.ranges)
        .map(read_range)
        .collect();
    let file = source.and_then(|source| source.infos.first());
    ConvertError::Utf8 {
        file: file.map(|info| info.filename.clone()).unwrap_or_default(),
        line: bad_line(file.map_or(&[], |info| &info.data), &ranges),
    }
    .at(&ranges)
}

/// Finds the line that is not UTF-8 among those of an instruction.
fn bad_line(text: &[u8], ranges: &[Range]) -> u32 {
    let first = ranges.first().map_or(0, |range| range.start.line);
    let last = ranges.last().map_or(0, |range| range.end.line);
    (1..=last)
        .zip(text.split(|byte| *byte == b'\n'))
        .find(|(line, bytes)| *line >= first && std::str::from_utf8(bytes).is_err())
        .map_or(first, |(line, _)| line)
}

fn read_range(range: &llb::pb::Range) -> Range {
    let position = |at: &Option<llb::pb::Position>| {
        let number = |number: i32| u32::try_from(number).unwrap_or_default();
        at.as_ref().map_or_else(Position::default, |at| Position {
            line: number(at.line),
            character: number(at.character),
        })
    };
    Range {
        start: position(&range.start),
        end: position(&range.end),
    }
}

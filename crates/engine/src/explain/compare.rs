//! The nearest of earlier descriptions, and what differs from it.

use super::describe::{Described, Field, Input, Pin, place_and_text};
use crate::explanation::{Change, ChangeKind, How};

/// Chooses the description that differs in the fewest things; of equals the first. Those of other steps that only happen to
/// stand at the same place are left out.
pub(crate) fn nearest<'a, T>(
    now: &Described,
    candidates: impl IntoIterator<Item = &'a (T, Described)>,
) -> Option<&'a (T, Described)> {
    let alike = candidates
        .into_iter()
        .filter(|(_, known)| is_comparable(now, known));
    alike.min_by_key(|(_, known)| distance(now, known))
}

/// Whether it is the same step in another state: it is called the same, or works at the same place on the same thing.
fn is_comparable(now: &Described, known: &Described) -> bool {
    if now.kind != known.kind {
        return false;
    }
    let ((place, text), (known_place, known_text)) = (place_and_text(&now.name), place_and_text(&known.name));
    let shares_input = || {
        let mut pairs = now.inputs.iter().zip(&known.inputs);
        pairs.any(|(input, known)| is_same(input, known))
    };
    text == known_text || (place == known_place && shares_input())
}

fn is_same(input: &Input, known: &Input) -> bool {
    !input.records.is_disjoint(&known.records)
}

/// Whether nothing that identifies the step differs.
pub(crate) fn is_equal(now: &Described, known: &Described) -> bool {
    now.op == known.op && now.inputs.len() == known.inputs.len() && changed_inputs(now, known).is_empty()
}

fn distance(now: &Described, known: &Described) -> usize {
    let fields = field_pairs(now, known)
        .into_iter()
        .filter(|(before, after)| hash(*before) != hash(*after))
        .count();
    let pins = usize::from(now.pin != known.pin);
    let place = usize::from(place_and_text(&now.name).0 != place_and_text(&known.name).0);
    // Where a step stands matters least.
    2 * (fields + pins + changed_inputs(now, known).len()) + place
}

fn changed_inputs(now: &Described, known: &Described) -> Vec<usize> {
    let changed = |(number, input): (usize, &Input)| {
        let same = known
            .inputs
            .get(number)
            .is_some_and(|known| is_same(input, known));
        (!same).then_some(number)
    };
    now.inputs.iter().enumerate().filter_map(changed).collect()
}

fn hash(field: Option<&Field>) -> Option<u32> {
    field.map(|field| field.hash)
}

/// Pairs fields of the same name, in the order in which they are described.
fn field_pairs<'a>(now: &'a Described, known: &'a Described) -> Vec<(Option<&'a Field>, Option<&'a Field>)> {
    let find = |fields: &'a [Field], at: usize, name: &str| {
        // Nearly always they stand in the same order.
        let guess = fields.get(at).filter(|field| field.name == name);
        guess.or_else(|| fields.iter().find(|field| field.name == name))
    };
    let mut pairs = Vec::with_capacity(now.fields.len());
    for (at, field) in now.fields.iter().enumerate() {
        pairs.push((find(&known.fields, at, &field.name), Some(field)));
    }
    for (at, field) in known.fields.iter().enumerate() {
        if find(&now.fields, at, &field.name).is_none() {
            pairs.push((Some(field), None));
        }
    }
    pairs
}

/// Says what differs. `files` is asked for the differences in the files of an input of which both have a listing.
pub(crate) fn changes(
    now: &Described,
    known: &Described,
    files: &mut dyn FnMut(usize, &Input) -> Vec<Change>,
) -> Vec<Change> {
    let mut changes = argument_changes(now, known);
    let pairs = field_pairs(now, known).into_iter();
    let others = pairs.filter(|(before, after)| hash(*before) != hash(*after));
    changes.extend(others.filter_map(|(before, after)| field_change(before, after)));
    changes.extend(pin_change(now.pin.as_ref(), known.pin.as_ref()));
    for number in changed_inputs(now, known) {
        let (input, before) = (&now.inputs[number], known.inputs.get(number));
        changes.extend(input_changes(number, input, before, files));
    }
    for gone in known.inputs.iter().skip(now.inputs.len()) {
        changes.push(input_change(&gone.name, How::Removed));
    }
    if changes.is_empty() && now.op != known.op {
        changes.push(Change {
            subject: "the definition".to_owned(),
            ..Change::default()
        });
    }
    changes
}

fn is_argument(field: &Field) -> bool {
    field.name.starts_with("argument ")
}

/// One change where there are more or fewer arguments: what is only shifted is not different.
fn argument_changes(now: &Described, known: &Described) -> Vec<Change> {
    let arguments = |fields: &[Field]| -> Vec<Field> {
        let fields = fields.iter().filter(|field| is_argument(field));
        fields.cloned().collect()
    };
    let (after, before) = (arguments(&now.fields), arguments(&known.fields));
    let joined = |fields: &[Field]| {
        let values: Vec<&str> = fields.iter().filter_map(|field| field.value.as_deref()).collect();
        Some(values.join(" "))
    };
    if after.len() != before.len() {
        return vec![Change {
            kind: ChangeKind::Argument,
            subject: "arguments".to_owned(),
            before: joined(&before),
            after: joined(&after),
            ..Change::default()
        }];
    }
    let pairs = before.into_iter().zip(after);
    let changed = pairs.filter(|(before, after)| before.hash != after.hash);
    let change = |(before, after): (Field, Field)| Change {
        kind: ChangeKind::Argument,
        subject: after.name,
        before: before.value,
        after: after.value,
        ..Change::default()
    };
    changed.map(change).collect()
}

fn field_change(before: Option<&Field>, after: Option<&Field>) -> Option<Change> {
    let field = after.or(before)?;
    if is_argument(field) {
        return None;
    }
    let kind = match field.name.as_str() {
        "platform" => ChangeKind::Platform,
        name if name.starts_with("environment variable ") => ChangeKind::Environment,
        _ => ChangeKind::Definition,
    };
    let how = match (before, after) {
        (None, _) => How::Added,
        (_, None) => How::Removed,
        _ => How::Changed,
    };
    Some(Change {
        kind,
        subject: field.name.clone(),
        before: before.and_then(|field| field.value.clone()),
        after: after.and_then(|field| field.value.clone()),
        how,
        ..Change::default()
    })
}

fn pin_change(now: Option<&Pin>, known: Option<&Pin>) -> Option<Change> {
    let (now, known) = (now?, known?);
    if now == known {
        return None;
    }
    let (subject, before, after) = if now.source == known.source {
        let what = match now.what.as_str() {
            "image" => "digest of image",
            "blob" => "digest of blob",
            "checksum" => "checksum of",
            _ => "commit of",
        };
        (format!("{what} {}", now.source), &known.value, &now.value)
    } else {
        (now.what.clone(), &known.source, &now.source)
    };
    Some(Change {
        kind: ChangeKind::Source,
        subject,
        before: Some(before.clone()),
        after: Some(after.clone()),
        ..Change::default()
    })
}

fn input_change(name: &str, how: How) -> Change {
    Change {
        kind: ChangeKind::Input,
        subject: name.to_owned(),
        how,
        ..Change::default()
    }
}

fn input_changes(
    number: usize,
    input: &Input,
    before: Option<&Input>,
    files: &mut dyn FnMut(usize, &Input) -> Vec<Change>,
) -> Vec<Change> {
    let Some(before) = before else {
        return vec![input_change(&input.name, How::Added)];
    };
    if input.listing.is_some() && before.listing.is_some() {
        let found = files(number, before);
        if !found.is_empty() {
            return found;
        }
    }
    if let Some(change) = pin_change(input.pin.as_ref(), before.pin.as_ref()) {
        return vec![change];
    }
    let (name, before) = (place_and_text(&input.name).1, place_and_text(&before.name).1);
    if name == before {
        return vec![input_change(&input.name, How::Changed)];
    }
    vec![Change {
        before: Some(before.to_owned()),
        after: Some(name.to_owned()),
        ..input_change(&input.name, How::Changed)
    }]
}

//! Results of frontends between the wire and the engine.

use std::collections::BTreeMap;

use api::pb::gateway as pb;
use api::pb::gateway::result::Result as Kind;
use engine::BuildError;
use engine::bridge::{
    Attestation, AttestationKind, AttestationSubject, BuildRef, BuildRefId, BuildResult, Forwarder,
};

/// Returns a definition as all clients can read it: Go's fast decoder takes a map's empty message, whose encoding may be
/// left out, for none at all, and its users do not expect that. Vertices without places say nothing.
pub(super) fn for_clients(definition: &llb::pb::Definition) -> llb::pb::Definition {
    let mut definition = definition.clone();
    if let Some(source) = &mut definition.source {
        source.locations.retain(|_, places| !places.locations.is_empty());
        for info in &mut source.infos {
            info.definition = info.definition.as_ref().map(for_clients);
        }
    }
    definition
}

/// Gives the client names for a result's refs. `arrays`: the client knows the newer form.
pub(super) fn to_wire(forwarder: &Forwarder, result: BuildResult, arrays: bool) -> (pb::Result, String) {
    let named = |reference: &BuildRef| {
        forwarder.keep(reference);
        pb::Ref {
            id: reference.id().0.clone(),
            def: Some(for_clients(reference.definition())),
        }
    };
    let mut first = String::new();
    let kind = if result.refs.is_empty() {
        let single = result.single.as_ref().map(named).unwrap_or_default();
        first.clone_from(&single.id);
        if arrays {
            Kind::Ref(single)
        } else {
            Kind::RefDeprecated(single.id)
        }
    } else {
        let refs = result.refs.iter();
        let refs: BTreeMap<String, pb::Ref> = refs
            .map(|(key, reference)| (key.clone(), reference.as_ref().map(named).unwrap_or_default()))
            .collect();
        if arrays {
            Kind::Refs(pb::RefMap { refs })
        } else {
            let refs = refs
                .into_iter()
                .map(|(key, reference)| (key, reference.id))
                .collect();
            Kind::RefsDeprecated(pb::RefMapDeprecated { refs })
        }
    };
    let attestations = result.attestations.into_iter().map(|(key, list)| {
        let attestation = list
            .into_iter()
            .map(|one| attestation_to_wire(one, named))
            .collect();
        (key, pb::Attestations { attestation })
    });
    let message = pb::Result {
        metadata: result.metadata,
        attestations: attestations.collect(),
        result: Some(kind),
    };
    (message, first)
}

fn attestation_to_wire(
    attestation: Attestation<BuildRef>,
    named: impl Fn(&BuildRef) -> pb::Ref,
) -> pb::Attestation {
    let kind = match attestation.kind {
        AttestationKind::InToto => pb::AttestationKind::InToto,
        AttestationKind::Bundle => pb::AttestationKind::Bundle,
    };
    pb::Attestation {
        kind: kind.into(),
        metadata: attestation.metadata,
        r#ref: attestation.reference.as_ref().map(named),
        path: attestation.path,
        in_toto_predicate_type: attestation.predicate_type,
        in_toto_subjects: attestation.subjects.into_iter().map(subject_to_wire).collect(),
    }
}

fn subject_to_wire(subject: AttestationSubject) -> pb::InTotoSubject {
    match subject {
        AttestationSubject::Image(name) => pb::InTotoSubject {
            kind: pb::InTotoSubjectKind::Self_.into(),
            digest: Vec::new(),
            name,
        },
        AttestationSubject::Raw { name, digests } => pb::InTotoSubject {
            kind: pb::InTotoSubjectKind::Raw.into(),
            digest: digests.iter().map(ToString::to_string).collect(),
            name,
        },
    }
}

/// Reads a client's result; its refs must be ones that it was given.
///
/// # Errors
/// For refs that nobody was given, and for attestations that make no sense.
pub(super) fn from_wire(forwarder: &Forwarder, result: pb::Result) -> Result<BuildResult, BuildError> {
    let mut out = BuildResult {
        metadata: result.metadata,
        ..BuildResult::default()
    };
    match result.result {
        None => {}
        Some(Kind::RefDeprecated(id)) => out.single = find(forwarder, id)?,
        Some(Kind::Ref(reference)) => out.single = find(forwarder, reference.id)?,
        Some(Kind::RefsDeprecated(map)) => {
            for (key, id) in map.refs {
                out.refs.insert(key, find(forwarder, id)?);
            }
        }
        Some(Kind::Refs(map)) => {
            for (key, reference) in map.refs {
                out.refs.insert(key, find(forwarder, reference.id)?);
            }
        }
    }
    for (key, list) in result.attestations {
        let list: Result<Vec<_>, _> = list
            .attestation
            .into_iter()
            .map(|one| attestation_from_wire(forwarder, one))
            .collect();
        out.attestations.insert(key, list?);
    }
    Ok(out)
}

/// Finds a ref; no name is no ref.
pub(super) fn find(forwarder: &Forwarder, id: String) -> Result<Option<BuildRef>, BuildError> {
    if id.is_empty() {
        return Ok(None);
    }
    let id = BuildRefId(id);
    let found = forwarder.find(&id);
    found
        .map(Some)
        .ok_or_else(|| BuildError::user(format!("return reference {id} not found")))
}

fn attestation_from_wire(
    forwarder: &Forwarder,
    attestation: pb::Attestation,
) -> Result<Attestation<BuildRef>, BuildError> {
    let kind = match pb::AttestationKind::try_from(attestation.kind) {
        Ok(pb::AttestationKind::InToto) => AttestationKind::InToto,
        Ok(pb::AttestationKind::Bundle) => AttestationKind::Bundle,
        Err(_) => {
            return Err(BuildError::user(format!(
                "unknown attestation kind {}",
                attestation.kind
            )));
        }
    };
    let subjects: Result<Vec<_>, _> = attestation
        .in_toto_subjects
        .into_iter()
        .map(subject_from_wire)
        .collect();
    Ok(Attestation {
        kind,
        metadata: attestation.metadata,
        reference: attestation
            .r#ref
            .map(|reference| find(forwarder, reference.id))
            .transpose()?
            .flatten(),
        path: attestation.path,
        // A statement that is in no tree is the engine's own.
        content: None,
        predicate_type: attestation.in_toto_predicate_type,
        subjects: subjects?,
    })
}

fn subject_from_wire(subject: pb::InTotoSubject) -> Result<AttestationSubject, BuildError> {
    match pb::InTotoSubjectKind::try_from(subject.kind) {
        Ok(pb::InTotoSubjectKind::Self_) => Ok(AttestationSubject::Image(subject.name)),
        Ok(pb::InTotoSubjectKind::Raw) => {
            let digests: Result<Vec<_>, _> = subject.digest.iter().map(|digest| digest.parse()).collect();
            let digests = digests.map_err(|error| BuildError::user(format!("invalid subject: {error}")))?;
            Ok(AttestationSubject::Raw {
                name: subject.name,
                digests,
            })
        }
        Err(_) => Err(BuildError::user(format!(
            "unknown in toto subject kind {}",
            subject.kind
        ))),
    }
}

#[cfg(test)]
mod tests {
    use llb::pb::{Definition, Location, Locations, Source, SourceInfo};

    use super::*;

    #[test]
    fn clients_get_no_empty_places() {
        let places = |count: usize| Locations {
            locations: vec![Location::default(); count],
        };
        let inner = Definition {
            source: Some(Source {
                locations: BTreeMap::from([("a".to_owned(), places(0))]),
                ..Source::default()
            }),
            ..Definition::default()
        };
        let definition = Definition {
            source: Some(Source {
                locations: BTreeMap::from([("a".to_owned(), places(0)), ("b".to_owned(), places(1))]),
                infos: vec![SourceInfo {
                    definition: Some(inner),
                    ..SourceInfo::default()
                }],
            }),
            ..Definition::default()
        };
        let source = for_clients(&definition).source.unwrap();
        assert_eq!(source.locations.keys().collect::<Vec<_>>(), ["b"]);
        let inner = source.infos[0].definition.as_ref().unwrap();
        assert!(inner.source.as_ref().unwrap().locations.is_empty());
    }
}

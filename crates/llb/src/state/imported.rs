//! States from definitions that exist already, such as inputs of a frontend.

use std::collections::BTreeMap;
use std::sync::Arc;

use bytes::Bytes;
use oci::{Digest, Platform};

use super::vertex::{Kind, Output, Vertex};
use super::{Constraints, SourceLocation, SourceMap, State};
use crate::pb::{Definition, OpMetadata};
use crate::{Graph, GraphError};

/// The vertices of a checked definition.
#[derive(Debug)]
pub(super) struct Imported {
    vertices: BTreeMap<Digest, ImportedVertex>,
}

#[derive(Debug)]
struct ImportedVertex {
    raw: Bytes,
    metadata: OpMetadata,
    inputs: Vec<(Digest, i64)>,
    platform: Option<Platform>,
    locations: Vec<SourceLocation>,
}

impl Imported {
    /// Returns the bytes, the metadata and the locations of a vertex of this definition.
    pub fn marshal(&self, digest: &Digest) -> Option<(Bytes, &OpMetadata, &[SourceLocation])> {
        let vertex = self.vertices.get(digest)?;
        Some((vertex.raw.clone(), &vertex.metadata, &vertex.locations))
    }

    pub fn inputs(set: &Arc<Self>, digest: &Digest) -> Vec<Output> {
        let inputs = set.vertices.get(digest).map_or(&[][..], |vertex| &vertex.inputs);
        inputs
            .iter()
            .map(|(digest, index)| Self::output(set, *digest, *index))
            .collect()
    }

    fn output(set: &Arc<Self>, digest: Digest, index: i64) -> Output {
        let platform = set
            .vertices
            .get(&digest)
            .and_then(|vertex| vertex.platform.clone());
        let kind = Kind::Imported {
            set: Arc::clone(set),
            digest,
        };
        Output {
            vertex: Arc::new(Vertex {
                kind,
                constraints: Constraints::new(),
            }),
            index,
            platform,
        }
    }
}

impl State {
    /// Returns the result of a definition; an empty definition is the empty filesystem.
    pub fn from_definition(definition: &Definition) -> Result<Self, GraphError> {
        if definition.def.is_empty() {
            return Ok(Self::scratch());
        }
        let graph = Graph::load(definition)?;
        let maps = source_maps(definition)?;
        let mut vertices = BTreeMap::new();
        for vertex in graph.vertices() {
            let index = |output: usize| i64::try_from(output).unwrap_or(i64::MAX);
            let inputs = vertex
                .inputs
                .iter()
                .map(|edge| (graph.vertex(*edge).digest, index(edge.output)));
            let locations = definition
                .source
                .as_ref()
                .and_then(|source| source.locations.get(&vertex.digest.to_string()));
            let locations = locations.map_or(&[][..], |locations| &locations.locations);
            let locations = locations.iter().filter_map(|location| {
                let map = maps.get(usize::try_from(location.source_index).ok()?)?;
                Some(SourceLocation {
                    map: Arc::clone(map),
                    ranges: location.ranges.clone(),
                })
            });
            let imported = ImportedVertex {
                raw: vertex.raw.clone(),
                metadata: vertex.metadata.clone(),
                inputs: inputs.collect(),
                platform: vertex.platform(),
                locations: locations.collect(),
            };
            vertices.insert(vertex.digest, imported);
        }
        let root = graph.root();
        let set = Arc::new(Imported { vertices });
        let index = i64::try_from(root.output).unwrap_or(i64::MAX);
        // As in the Go client, what is done on the result does not take over its platform.
        let output = Imported::output(&set, graph.vertex(root).digest, index);
        Ok(Self::new(Some(Output {
            platform: None,
            ..output
        })))
    }
}

fn source_maps(definition: &Definition) -> Result<Vec<Arc<SourceMap>>, GraphError> {
    let infos = definition.source.as_ref().map_or(&[][..], |source| &source.infos);
    let map = |info: &crate::pb::SourceInfo| {
        Ok(Arc::new(SourceMap {
            state: None,
            definition: info.definition.clone(),
            filename: info.filename.clone(),
            language: info.language.clone(),
            data: info.data.clone(),
        }))
    };
    infos.iter().map(map).collect()
}

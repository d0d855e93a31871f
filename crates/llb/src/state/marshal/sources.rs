//! Gathering where operations come from into the source part of a definition.

use std::collections::BTreeMap;
use std::sync::Arc;

use super::{MarshalError, MarshalOptions};
use crate::pb::{Location, Locations, Source, SourceInfo};
use crate::state::{SourceLocation, SourceMap};

#[derive(Default)]
pub(super) struct Sources {
    maps: Vec<Arc<SourceMap>>,
    locations: BTreeMap<String, Locations>,
}

impl Sources {
    pub fn add(&mut self, digest: String, locations: Vec<SourceLocation>) {
        let located: Vec<Location> = locations
            .into_iter()
            .map(|SourceLocation { map, ranges }| Location {
                source_index: self.index(map),
                ranges,
            })
            .collect();
        self.locations
            .entry(digest)
            .or_default()
            .locations
            .extend(located);
    }

    fn index(&mut self, map: Arc<SourceMap>) -> i32 {
        let same = |have: &Arc<SourceMap>| Arc::ptr_eq(have, &map) || have.same(&map);
        let at = self.maps.iter().position(same).unwrap_or_else(|| {
            self.maps.push(map);
            self.maps.len() - 1
        });
        i32::try_from(at).unwrap_or(i32::MAX)
    }

    pub fn marshal(self, options: &MarshalOptions) -> Result<Source, MarshalError> {
        let info = |map: Arc<SourceMap>| {
            let definition = match (&map.definition, &map.state) {
                (Some(definition), _) => Some(definition.clone()),
                (None, Some(state)) => Some(state.marshal(options)?),
                (None, None) => None,
            };
            let (filename, language) = (map.filename.clone(), map.language.clone());
            Ok(SourceInfo {
                filename,
                data: map.data.clone(),
                definition,
                language,
            })
        };
        let infos = self
            .maps
            .into_iter()
            .map(info)
            .collect::<Result<_, MarshalError>>()?;
        Ok(Source {
            locations: self.locations,
            infos,
        })
    }
}

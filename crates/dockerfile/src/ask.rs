//! Questions and their answers.

use std::cell::RefCell;
use std::collections::BTreeMap;

use llb::pb;

use crate::convert::Memory;
use crate::error::{ConvertError, Progress, Stop};
use crate::request::{
    Answer, AnswerError, FilesNeed, ImageAnswer, ImageConfigNeed, Need, SourceAnswer, SourceMetadataNeed,
};

/// Answers known so far, by what was asked.
pub(crate) type Known = BTreeMap<String, Answer>;

/// Looks answers up and notes what is missing.
pub(crate) struct Asker<'a> {
    known: &'a Known,
    memory: &'a Memory,
    missing: RefCell<BTreeMap<String, Need>>,
    order: RefCell<Vec<String>>,
}

impl<'a> Asker<'a> {
    pub(crate) fn new(known: &'a Known, memory: &'a Memory) -> Self {
        Self {
            known,
            memory,
            missing: RefCell::default(),
            order: RefCell::default(),
        }
    }

    /// Returns what passes leave to later ones.
    pub(crate) fn memory(&self) -> &'a Memory {
        self.memory
    }

    /// Returns what was asked for in vain, in order.
    pub(crate) fn into_missing(self) -> Vec<(String, Need)> {
        let mut missing = self.missing.into_inner();
        let order = self.order.into_inner();
        order
            .into_iter()
            .filter_map(|key| missing.remove(&key).map(|need| (key, need)))
            .collect()
    }

    fn ask(&self, need: Need) -> Progress<&'a Answer> {
        let key = key(&need);
        if let Some(answer) = self.known.get(&key) {
            return Ok(answer);
        }
        let before = self.missing.borrow_mut().insert(key.clone(), need);
        if before.is_none() {
            self.order.borrow_mut().push(key);
        }
        Err(Stop::Pending)
    }

    /// Asks for an image; the error is the redirection if there is one.
    pub(crate) fn image(&self, need: ImageConfigNeed) -> Progress<Result<&'a ImageAnswer, &'a str>> {
        let shown = need.reference.clone();
        match self.ask(Need::ImageConfig(need))? {
            Answer::Image(image) => Ok(Ok(image)),
            Answer::Redirected { updated } => Ok(Err(updated)),
            other => Err(failed(other, shown)),
        }
    }

    /// Asks for an image that must not become anything else.
    pub(crate) fn only_image(&self, need: ImageConfigNeed) -> Progress<&'a ImageAnswer> {
        let reference = need.reference.clone();
        self.image(need)?.map_err(|updated| {
            ConvertError::NonImage {
                reference,
                updated: updated.to_owned(),
            }
            .into()
        })
    }

    /// Asks for files; the outer error means that the definition could not be solved.
    pub(crate) fn files(
        &self,
        definition: &pb::Definition,
        paths: &[&str],
        limit: Option<u64>,
    ) -> Progress<&'a [Result<Vec<u8>, AnswerError>]> {
        let paths: Vec<String> = paths.iter().map(|path| (*path).to_owned()).collect();
        let count = paths.len();
        let need = FilesNeed {
            definition: definition.clone(),
            paths,
            limit,
        };
        match self.ask(Need::Files(need))? {
            Answer::Files(files) if files.len() == count => Ok(files),
            other => Err(failed(other, "files".to_owned())),
        }
    }

    /// Asks what is known about a source.
    pub(crate) fn source(&self, need: SourceMetadataNeed) -> Progress<&'a SourceAnswer> {
        let shown = need.source.identifier.clone();
        match self.ask(Need::SourceMetadata(need))? {
            Answer::Source(source) => Ok(source),
            other => Err(failed(other, shown)),
        }
    }

    /// Asks for the newest time of a file in an archive.
    pub(crate) fn newest_in_archive(&self, definition: &pb::Definition, path: &str) -> Progress<Option<i64>> {
        let need = FilesNeed {
            definition: definition.clone(),
            paths: vec![path.to_owned()],
            limit: None,
        };
        match self.ask(Need::NewestInArchive(need))? {
            Answer::Time(seconds) => Ok(*seconds),
            other => Err(failed(other, path.to_owned())),
        }
    }
}

fn failed(answer: &Answer, shown: String) -> Stop {
    match answer {
        Answer::Failed(error) => ConvertError::Answer(error.clone()).into(),
        _ => ConvertError::WrongAnswer(shown).into(),
    }
}

fn key(need: &Need) -> String {
    match need {
        Need::ImageConfig(need) => format!(
            "image {} {} {} {:?} {}",
            need.reference,
            need.platform
                .as_ref()
                .map(ToString::to_string)
                .unwrap_or_default(),
            need.resolve_mode,
            need.store,
            need.log_name
        ),
        Need::Files(need) => format!(
            "files {} {:?} {:?}",
            root(&need.definition),
            need.paths,
            need.limit
        ),
        Need::NewestInArchive(need) => format!("archive {} {:?}", root(&need.definition), need.paths),
        Need::SourceMetadata(need) => format!("source {} {:?}", need.source.identifier, need.source.attrs),
    }
}

/// Identifies what a definition makes.
fn root(definition: &pb::Definition) -> String {
    definition
        .def
        .last()
        .map_or_else(String::new, |op| oci::Digest::sha256(op).to_string())
}

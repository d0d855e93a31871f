//! Drives a conversion with files of a directory and a table of images.

use std::collections::{BTreeMap, BTreeSet};
use std::path::Path;

use dockerfile::{
    Answer, AnswerError, Conversion, Failure, FilesNeed, ImageAnswer, ImageConfigNeed, Need, Outcome,
    Request, SourceAnswer, SourceMetadataNeed, Step,
};
use llb::pb::Definition;
use llb::{HttpOptions, ImageOptions, LocalOptions, MarshalOptions, State};
use oci::Platform;
use serde_json::Value;

/// Where answers come from, and what was asked.
pub struct Driver<'a> {
    /// Files by name; directories of contexts are all the same one.
    pub files: &'a dyn Fn(&str) -> Option<Vec<u8>>,
    pub images: &'a Value,
    /// Metadata of sources, by identifier.
    pub sources: &'a Value,
    /// What images become when they are resolved, by reference: `docker-image://…` or another kind of source.
    pub policy: &'a Value,
    /// The newest time in an archive, seconds since 1970.
    pub newest: Option<i64>,
    pub solved: Vec<Definition>,
    pub asked: Vec<String>,
}

fn missing(name: &str) -> AnswerError {
    AnswerError {
        message: format!("{name}: not found"),
        token: 7,
    }
}

impl Driver<'_> {
    pub fn run(&mut self, request: Request) -> Result<Outcome, Box<Failure>> {
        let mut conversion = Conversion::new(request);
        let mut answers = Vec::new();
        for _ in 0..20 {
            match conversion.step(answers)? {
                Step::Done(outcome) => return Ok(*outcome),
                Step::Needs(needs) => {
                    assert!(!needs.is_empty(), "a conversion that is not done needs something");
                    answers = needs.into_iter().map(|need| self.answer(need)).collect();
                }
            }
        }
        panic!("the conversion asks without end");
    }

    fn answer(&mut self, need: Need) -> Answer {
        match need {
            Need::ImageConfig(need) => self.image(&need),
            Need::Files(need) => self.read(need),
            Need::SourceMetadata(need) => self.source(&need),
            Need::NewestInArchive(need) => {
                self.solved.push(need.definition);
                Answer::Time(self.newest)
            }
        }
    }

    fn read(&mut self, need: FilesNeed) -> Answer {
        let read = |path: &String| {
            let mut content = (self.files)(path).ok_or_else(|| missing(path))?;
            if let Some(limit) = need.limit {
                content.truncate(usize::try_from(limit).unwrap());
            }
            Ok(content)
        };
        let files = need.paths.iter().map(read).collect();
        self.solved.push(need.definition);
        Answer::Files(files)
    }

    fn image(&mut self, need: &ImageConfigNeed) -> Answer {
        let store = need
            .store
            .as_ref()
            .map(|store| format!("{}/{}", store.session_id, store.store_id));
        let platform = need
            .platform
            .as_ref()
            .map(Platform::format_all)
            .unwrap_or_default();
        let mode = store.unwrap_or_else(|| need.resolve_mode.clone());
        self.asked
            .push(format!("{}|{platform}|{mode}|{}", need.reference, need.log_name));
        let normal = need
            .platform
            .as_ref()
            .map(|platform| platform.normalized().format())
            .unwrap_or_default();
        let mut reference = need.reference.as_str();
        if let Some(updated) = self.policy[reference].as_str() {
            match updated.strip_prefix("docker-image://") {
                Some(image) => reference = image,
                None => {
                    return Answer::Redirected {
                        updated: updated.to_owned(),
                    };
                }
            }
        }
        let found = self
            .images
            .get(format!("{reference}|{normal}"))
            .or(self.images.get(reference))
            .or(self.images.get("*"));
        match found {
            None => Answer::Failed(missing(reference)),
            Some(image) => Answer::Image(ImageAnswer {
                reference: reference.to_owned(),
                digest: image["Digest"].as_str().map(|digest| digest.parse().unwrap()),
                config: serde_json::to_vec(&image["Config"]).unwrap(),
            }),
        }
    }

    fn source(&mut self, need: &SourceMetadataNeed) -> Answer {
        let identifier = &need.source.identifier;
        if let Some(image) = identifier.strip_prefix("docker-image://") {
            self.asked.push(format!("{image}|||{}", need.log_name));
            return Answer::Source(SourceAnswer::default());
        }
        match self.sources.get(identifier) {
            None => Answer::Failed(missing(identifier)),
            Some(found) => Answer::Source(SourceAnswer {
                commit_object: found["Commit"].as_str().map(|object| object.as_bytes().to_vec()),
                last_modified_s: found["LastModified"].as_i64(),
            }),
        }
    }
}

/// Makes the definition of a single source.
pub fn input(source: &str) -> Definition {
    let state = match source.split_once("://") {
        Some(("docker-image", reference)) => State::image(reference, ImageOptions::default()),
        Some(("local", name)) => State::local(name, LocalOptions::default()),
        _ => State::http(source, HttpOptions::default()),
    };
    let options = MarshalOptions {
        platform: Platform::parse("linux/amd64").unwrap(),
        local_unique_id: "unique".to_owned(),
        ..MarshalOptions::default()
    };
    state.marshal(&options).unwrap()
}

/// Makes a request as the daemon would.
pub fn request(options: BTreeMap<String, String>, platforms: &[String], without: &[String]) -> Request {
    let platforms: Vec<Platform> = platforms
        .iter()
        .map(|text| Platform::parse(text).unwrap())
        .collect();
    Request {
        options,
        session_id: "session".into(),
        inputs: BTreeMap::new(),
        llb_capabilities: capabilities()
            .into_iter()
            .filter(|cap| !without.contains(cap))
            .collect(),
        worker_platforms: platforms,
    }
}

fn capabilities() -> BTreeSet<String> {
    let all = [
        llb::caps::FILE_BASE,
        llb::caps::MERGE_OP,
        llb::caps::EXEC_META_SETS_DEFAULT_PATH,
        llb::caps::EXEC_META_ULIMIT,
        llb::caps::EXEC_META_CDI,
        llb::caps::EXEC_META_CGROUP_PARENT,
        llb::caps::EXEC_META_LINUX_RESOURCES,
        llb::caps::EXEC_MOUNT_TMPFS_SIZE,
        llb::caps::EXEC_MOUNT_BIND_READ_WRITE_NO_OUTPUT,
    ];
    all.into_iter().map(str::to_owned).collect()
}

/// Reads files of a directory.
pub fn files_of(dir: &Path) -> impl Fn(&str) -> Option<Vec<u8>> {
    let dir = dir.to_owned();
    move |name| std::fs::read(dir.join(name)).ok()
}

//! `SOURCE_DATE_EPOCH`: the time that history and new directories get. It is a number, or names what to take it from.

use llb::pb::SourceOp;
use llb::{GitOptions, HttpOptions, State};
use oci::{Digest, timestamp};

use super::stages::expand;
use super::{Converter, EPOCH_ARG, SCRATCH};
use crate::context::{marshal, source_of};
use crate::env::Env;
use crate::error::{ConvertError, Progress};
use crate::git_ref::{GitRef, is_http, url_file_name};
use crate::instruction::{Copy, Kind, Stage};
use crate::request::SourceMetadataNeed;
use crate::text::quote;
use crate::word::Variables;

const NANOSECONDS_PER_SECOND: i64 = 1_000_000_000;

/// A time in whole seconds, and the zone it is shown in.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Epoch {
    /// Seconds since 1970.
    pub(crate) seconds: i64,
    /// Minutes ahead of UTC.
    offset_minutes: i32,
}

impl Epoch {
    const fn utc(seconds: i64) -> Self {
        Self {
            seconds,
            offset_minutes: 0,
        }
    }

    /// Nanoseconds since 1970.
    pub(crate) const fn nanoseconds(self) -> i64 {
        self.seconds.wrapping_mul(NANOSECONDS_PER_SECOND)
    }

    /// Prints the time as image configurations have it.
    pub(crate) fn to_rfc3339(self) -> String {
        let shown = timestamp::format(
            self.seconds.saturating_add(i64::from(self.offset_minutes) * 60),
            0,
        );
        if self.offset_minutes == 0 {
            return shown;
        }
        let sign = if self.offset_minutes < 0 { '-' } else { '+' };
        let minutes = self.offset_minutes.abs();
        format!(
            "{}{sign}{:02}:{:02}",
            shown.trim_end_matches('Z'),
            minutes / 60,
            minutes % 60
        )
    }

    /// Reads when a raw commit was committed; nothing if its header says so in no known form.
    fn of_commit(object: &[u8]) -> Result<Option<Self>, ConvertError> {
        let object = String::from_utf8_lossy(object);
        let is_tag = object.starts_with("object ");
        let header = || object.split('\n').take_while(|line| !line.is_empty());
        let value = |name: &str| header().find_map(|line| line.strip_prefix(name)?.strip_prefix(' '));
        let (kind, names): (_, &[&str]) = if is_tag {
            ("tag", &["object", "type", "tag", "tagger"])
        } else {
            ("commit", &["tree", "author", "committer"])
        };
        if let Some(name) = names.iter().find(|name| value(name).is_none()) {
            return Err(ConvertError::GitObject(format!(
                "invalid {kind} object: missing {name} header"
            )));
        }
        if is_tag {
            return Err(ConvertError::GitObject("not a commit object".to_owned()));
        }
        Ok(value("committer").and_then(Self::of_actor))
    }

    /// Reads when somebody did something: `name <address> seconds zone`.
    fn of_actor(actor: &str) -> Option<Self> {
        let (before, rest) = actor.rsplit_once('>')?;
        before.contains('<').then_some(())?;
        let mut words = rest.split_whitespace();
        let seconds = words.next()?.parse().ok()?;
        let zone = words.next()?;
        let (sign, digits) = match zone.as_bytes() {
            [b'+', digits @ ..] if digits.len() == 4 => (1, digits),
            [b'-', digits @ ..] if digits.len() == 4 => (-1, digits),
            _ => return None,
        };
        let number = |digits: &[u8]| {
            std::str::from_utf8(digits)
                .ok()
                .and_then(|text| text.parse::<i32>().ok())
        };
        let offset_minutes =
            sign * (number(&digits[..2]).unwrap_or_default() * 60 + number(&digits[2..]).unwrap_or_default());
        Some(Self {
            seconds,
            offset_minutes,
        })
    }
}

impl Converter<'_> {
    /// Finds out the time, and replaces what names it by the number.
    pub(super) fn resolve_epoch(&mut self, stages: &[Stage]) -> Progress<()> {
        let global = self.global_args.get(EPOCH_ARG).filter(|value| !value.is_empty());
        let Some(value) = self.build_args.get(EPOCH_ARG).map(String::as_str).or(global) else {
            return Ok(());
        };
        let value = value.to_owned();
        self.epoch = match value.parse::<i64>() {
            _ if value.is_empty() => None,
            Ok(seconds) => Some(Epoch::utc(seconds)),
            Err(_) => self.named_epoch(&value, stages)?,
        };
        let text = self.epoch.map(|epoch| epoch.seconds.to_string());
        let in_args = self.build_args.contains_key(EPOCH_ARG);
        match text {
            Some(text) => {
                if self.global_args.get(EPOCH_ARG).is_some() {
                    self.global_args.set(EPOCH_ARG, &text);
                }
                if in_args {
                    self.build_args.insert(EPOCH_ARG.to_owned(), text);
                }
            }
            None => {
                self.global_args.remove(EPOCH_ARG);
                self.build_args.remove(EPOCH_ARG);
            }
        }
        Ok(())
    }

    fn named_epoch(&mut self, value: &str, stages: &[Stage]) -> Progress<Option<Epoch>> {
        if value == "context" {
            let Some(source) = self.contexts.main_source() else {
                return Ok(None);
            };
            return self.epoch_of(&source.clone(), "[internal] resolve main build context metadata");
        }
        if let Some(named) = self.contexts.named(value, None, "")? {
            let loaded = self.contexts.load(&named, &mut self.locals, None)?;
            let name = format!("[internal] resolve SOURCE_DATE_EPOCH named context {value}");
            return self.epoch_of(&loaded.state, &name);
        }
        let found = stages
            .iter()
            .find(|stage| !stage.name.is_empty() && stage.name.eq_ignore_ascii_case(value));
        let Some(stage) = found else {
            return Err(ConvertError::Epoch(value.to_owned()).into());
        };
        let source = self
            .stage_source(stage)
            .map_err(|stop| stop.at(&stage.location))?;
        let name = format!("[internal] resolve SOURCE_DATE_EPOCH source stage {}", stage.name);
        self.epoch_of(&source, &name)
    }

    /// Returns the one remote source that a stage adds; the stage must do nothing else.
    fn stage_source(&self, stage: &Stage) -> Progress<State> {
        let mut env = self.global_args.clone();
        env.remove(EPOCH_ARG);
        let base = expand(&self.lexer, &stage.base_name, &env).map_err(|stop| {
            stop.context(format!(
                "failed to process source stage base name {}",
                quote(&stage.base_name)
            ))
        })?;
        if base.text != SCRATCH {
            return Err(ConvertError::EpochStage("SOURCE_DATE_EPOCH stage must use FROM scratch").into());
        }
        let one_add =
            || ConvertError::EpochStage("SOURCE_DATE_EPOCH stage must contain exactly one remote ADD");
        let mut source = None;
        for instruction in &stage.instructions {
            match &instruction.kind {
                Kind::Arg(args) => {
                    for arg in args {
                        let value = match (self.build_args.get(&arg.key), &arg.value) {
                            (Some(given), _) => given.clone(),
                            (None, Some(default)) => expand(&self.lexer, default, &env)?.text,
                            (None, None) => continue,
                        };
                        env.set(&arg.key, &value);
                    }
                }
                Kind::Add(_) if source.is_some() => return Err(one_add().into()),
                Kind::Add(add) => source = Some(self.add_source(add, &env)?),
                _ => return Err(ConvertError::EpochInstruction(instruction.name.clone()).into()),
            }
        }
        source.ok_or_else(|| one_add().into())
    }

    fn add_source(&self, add: &Copy, env: &Env) -> Progress<State> {
        let ([source], true) = (add.sources.as_slice(), add.contents.is_empty()) else {
            let text = "SOURCE_DATE_EPOCH stage must contain exactly one remote ADD source";
            return Err(ConvertError::EpochStage(text).into());
        };
        let source = expand(&self.lexer, source, env)?.text;
        let checksum = expand(&self.lexer, &add.checksum, env)?.text;
        if is_http(&source) {
            let checksum = if checksum.is_empty() {
                None
            } else {
                Some(checksum.parse::<Digest>()?)
            };
            let filename = url_file_name(&source);
            return Ok(State::http(
                &source,
                HttpOptions {
                    filename,
                    checksum,
                    ..HttpOptions::default()
                },
            ));
        }
        let git = GitRef::parse(&source).transpose()?;
        let Some(git) = git.filter(|git| !git.like_local) else {
            let text = "SOURCE_DATE_EPOCH stage source must be a single HTTP(S) or Git ADD";
            return Err(ConvertError::EpochStage(text).into());
        };
        let mut options = git.options();
        options.keep_git_dir = add.keep_git_dir == Some(true) || git.keep_git_dir == Some(true);
        if !checksum.is_empty() {
            options.checksum = checksum;
        }
        Ok(State::git(&git.remote, "", GitOptions { ..options }))
    }

    /// Asks for the time of a source; nothing if it has none.
    fn epoch_of(&self, state: &State, log_name: &str) -> Progress<Option<Epoch>> {
        let Some(source) = source_of(state) else {
            return Ok(None);
        };
        let is_git = source.identifier.starts_with("git://");
        let is_http = source.identifier.starts_with("http://") || source.identifier.starts_with("https://");
        let filename = source
            .attrs
            .get(llb::attr::HTTP_FILENAME)
            .cloned()
            .unwrap_or_default();
        let need = SourceMetadataNeed {
            source: SourceOp { ..source },
            log_name: log_name.to_owned(),
            return_object: is_git,
        };
        let answer = self.contexts.asker.source(need)?;
        if let Some(object) = answer.commit_object.as_ref().filter(|object| !object.is_empty()) {
            return Ok(Epoch::of_commit(object)?);
        }
        if let Some(seconds) = answer.last_modified_s {
            return Ok(Some(Epoch::utc(seconds)));
        }
        if !is_http || filename.is_empty() {
            return Ok(None);
        }
        let newest = self
            .contexts
            .asker
            .newest_in_archive(&marshal(state)?, &filename)?;
        Ok(newest.map(Epoch::utc))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn reads_commits_and_prints_zones() {
        let object = b"tree x\nauthor A <a> 1 +0000\ncommitter B <b> 1700000000 +0130\n\nmessage";
        let epoch = Epoch::of_commit(object).unwrap().unwrap();
        assert_eq!(epoch.to_rfc3339(), "2023-11-14T23:43:20+01:30");
        assert_eq!(Epoch::utc(0).to_rfc3339(), "1970-01-01T00:00:00Z");
    }
}

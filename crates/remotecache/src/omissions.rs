//! What an export leaves out of what its mode asks for, and whom that is told to.
//!
//! There are three kinds. A result that should be there but cannot be had is told of one by one, as a warning, and fails an
//! export that is to be complete. A step that is known only as the way to a later one, because the cache it was imported
//! from leaves results of such steps out by design, is no failure of this export: such steps are counted and told of once. A
//! result that the build's definition wants left out is told of as one by one, but is no failure: it was asked for.

use std::collections::BTreeSet;
use std::sync::{Mutex, MutexGuard, PoisonError};

use build::blocking::internal;
use build::cache_export::OMITTED_KEY;
use build::error::{BuildError, ErrorKind};
use build::progress::{LogStream, VertexProgress, VertexWarning};
use oci::Digest;
use serde::Serialize;

/// Steps without results that are listed in the response; all are counted.
const MAX_LISTED: usize = 1_000;
/// Why a step never had a result here.
const NEVER_HERE: &str = "no result was ever here: known only as the way to a later step, whose result came from a cache \
                          (one of mode=min leaves the results of intermediate steps out)";

/// Why a result is left out that could be had.
const UNWANTED: &str = "the build's definition wants it left out of caches";

/// A result that an export left out.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize)]
struct Omitted {
    /// The step's vertex or record; absent: many.
    #[serde(skip_serializing_if = "Option::is_none")]
    record: Option<Digest>,
    /// Why.
    reason: String,
    /// Whether an export that is to be complete fails for it.
    #[serde(skip)]
    fails: bool,
}

/// Steps that have no results to export.
#[derive(Debug, Serialize)]
struct Without<'a> {
    /// How many.
    count: usize,
    /// Their vertices, at most [`MAX_LISTED`].
    records: Vec<&'a Digest>,
    /// Why.
    reason: &'static str,
}

#[derive(Debug, Default)]
struct Noted {
    omitted: BTreeSet<Omitted>,
    without: BTreeSet<Digest>,
    has_unreadable: bool,
}

/// What one export left out so far.
#[derive(Debug, Default)]
pub(super) struct Omissions(Mutex<Noted>);

impl Omissions {
    fn lock(&self) -> MutexGuard<'_, Noted> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Notes a result that should be there.
    pub(super) fn omit(&self, record: Option<Digest>, reason: String) {
        self.lock().omitted.insert(Omitted {
            record,
            reason,
            fails: true,
        });
    }

    /// Notes a result that the build's definition wants left out.
    pub(super) fn unwanted(&self, record: Digest) {
        self.lock().omitted.insert(Omitted {
            record: Some(record),
            reason: UNWANTED.to_owned(),
            fails: false,
        });
    }

    /// Notes that there is nothing to export.
    pub(super) fn nothing(&self, reason: &str) {
        self.lock().omitted.insert(Omitted {
            record: None,
            reason: reason.to_owned(),
            fails: false,
        });
    }

    /// Notes a result that is known but whose layers cannot be had.
    pub(super) fn unreadable(&self, record: Option<Digest>, reason: String) {
        self.omit(record, reason);
        self.lock().has_unreadable = true;
    }

    /// Whether there is a result whose layers cannot be had.
    pub(super) fn has_unreadable(&self) -> bool {
        self.lock().has_unreadable
    }

    /// Notes a step that never had a result here.
    pub(super) fn without(&self, record: Digest) {
        self.lock().without.insert(record);
    }

    /// Tells of all that was left out, in the log and on an exporter's vertex: as warnings, but once of all steps that
    /// never had a result here.
    pub(super) fn tell(&self, exporter: &str, progress: &VertexProgress) {
        let noted = self.lock();
        for omitted in &noted.omitted {
            let text = match &omitted.record {
                Some(record) => format!("result of step {record} is not exported: {}", omitted.reason),
                None => omitted.reason.clone(),
            };
            tracing::warn!(exporter, "{text}");
            progress.warn(VertexWarning::short(progress.digest(), text));
        }
        let count = noted.without.len();
        if count == 0 {
            return;
        }
        let steps = if count == 1 { "step" } else { "steps" };
        let text = format!("{count} {steps} exported without result: {NEVER_HERE}");
        tracing::info!(exporter, "{text}");
        progress.log(LogStream::Stderr, format!("{text}\n"));
    }

    /// Fails for what was left out although it should be there.
    ///
    /// # Errors
    /// A not-found error that names the first.
    pub(super) fn check_complete(&self) -> Result<(), BuildError> {
        let noted = self.lock();
        let mut lacking = noted.omitted.iter().filter(|omitted| omitted.fails);
        let Some(first) = lacking.next() else {
            return Ok(());
        };
        let record = first
            .record
            .map(|record| format!("{record}: "))
            .unwrap_or_default();
        let count = lacking.count().saturating_add(1);
        let results = if count == 1 { "result" } else { "results" };
        let text = format!(
            "cache export left out {count} {results}, and ignore-error=false was asked for: {record}{}",
            first.reason
        );
        Err(BuildError::new(ErrorKind::NotFound, text))
    }

    /// The entry of the build's response; `None`: nothing was left out.
    ///
    /// # Errors
    /// When it cannot be written as JSON.
    pub(super) fn response(&self) -> Result<Option<(String, String)>, BuildError> {
        let noted = self.lock();
        let mut listed = Vec::new();
        for omitted in &noted.omitted {
            listed.push(oci::json::to_string(omitted).map_err(internal)?);
        }
        if !noted.without.is_empty() {
            let without = Without {
                count: noted.without.len(),
                records: noted.without.iter().take(MAX_LISTED).collect(),
                reason: NEVER_HERE,
            };
            listed.push(oci::json::to_string(&without).map_err(internal)?);
        }
        if listed.is_empty() {
            return Ok(None);
        }
        Ok(Some((OMITTED_KEY.to_owned(), format!("[{}]", listed.join(",")))))
    }
}

#[cfg(test)]
mod tests {
    use std::io::{self, Write};
    use std::sync::Arc;

    use build::progress::JobProgress;
    use futures_util::FutureExt;

    use super::*;

    fn digest(name: &str) -> Digest {
        Digest::sha256(name)
    }

    /// What is written to the log.
    #[derive(Clone, Default)]
    struct Log(Arc<Mutex<Vec<u8>>>);

    impl Write for Log {
        fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
            self.0.lock().unwrap().write(bytes)
        }

        fn flush(&mut self) -> io::Result<()> {
            Ok(())
        }
    }

    /// Where it is told of what was left out.
    struct Told {
        warnings: Vec<String>,
        log: String,
        /// Empty: there is no entry.
        response: Vec<serde_json::Value>,
    }

    fn told(omissions: &Omissions) -> Told {
        let (progress, job) = (
            VertexProgress::new(digest("export"), "export".to_owned(), Vec::new(), None),
            JobProgress::new(),
        );
        progress.attach(&job);
        let log = Log::default();
        let writer = log.clone();
        let subscriber = tracing_subscriber::fmt()
            .with_ansi(false)
            .with_writer(move || writer.clone())
            .finish();
        tracing::subscriber::with_default(subscriber, || omissions.tell("to a registry", &progress));
        let response = omissions.response().unwrap().map(|(key, json)| {
            assert_eq!(key, OMITTED_KEY);
            serde_json::from_str(&json).unwrap()
        });
        let log = String::from_utf8(log.0.lock().unwrap().clone()).unwrap();
        Told {
            warnings: warnings(&job),
            log,
            response: response.unwrap_or_default(),
        }
    }

    fn warnings(job: &JobProgress) -> Vec<String> {
        job.close();
        let (mut shown, mut texts) = (job.subscribe(), Vec::new());
        while let Some(Some(batch)) = shown.next().now_or_never() {
            let short = batch.warnings.into_iter().map(|warning| warning.short);
            texts.extend(short.map(|text| String::from_utf8(text.to_vec()).unwrap()));
        }
        texts
    }

    #[test]
    fn steps_that_never_had_a_result_are_told_of_once() {
        let omissions = Omissions::default();
        for number in 0..MAX_LISTED + 5 {
            omissions.without(digest(&number.to_string()));
        }
        omissions.check_complete().unwrap();
        assert!(!omissions.has_unreadable());
        let told = told(&omissions);
        assert_eq!(told.warnings, Vec::<String>::new());
        assert_eq!(told.log.matches(NEVER_HERE).count(), 1);
        let [entry] = &told.response[..] else {
            panic!("{:?}", told.response);
        };
        assert_eq!(entry["count"], MAX_LISTED + 5);
        assert_eq!(entry["records"].as_array().unwrap().len(), MAX_LISTED);
        assert_eq!(entry["reason"], NEVER_HERE);
    }

    #[test]
    fn results_that_should_be_there_are_told_of_one_by_one() {
        let omissions = Omissions::default();
        assert_eq!(told(&omissions).warnings, Vec::<String>::new());
        omissions.check_complete().unwrap();
        assert_eq!(omissions.response().unwrap(), None);
        omissions.omit(Some(digest("a")), "a is gone".to_owned());
        assert!(!omissions.has_unreadable());
        omissions.unreadable(Some(digest("b")), "b is gone".to_owned());
        assert!(omissions.has_unreadable());
        omissions.without(digest("c"));
        let told = told(&omissions);
        assert_eq!(told.warnings.len(), 2);
        let error = omissions.check_complete().unwrap_err().to_string();
        assert!(error.contains("left out 2 results"), "{error}");
        assert_eq!(told.response.len(), 3);
    }

    /// Whatever the reason: as a warning, in the log and in the response, with the record, and as a failure where nothing
    /// is to be left out.
    #[test]
    fn every_reason_is_told_of_everywhere() {
        let unreachable = "layer sha256:0: dial tcp: connection refused";
        let too_many = "more than 100000 records lead to the build's steps";
        type Note = fn(&Omissions, &'static str);
        let cases: [(&str, bool, bool, Note); 5] = [
            (unreachable, true, true, |all, why| {
                all.unreadable(Some(digest("a")), why.to_owned())
            }),
            ("its result was removed", true, true, |all, why| {
                all.omit(Some(digest("a")), why.to_owned())
            }),
            (UNWANTED, true, false, |all, _| all.unwanted(digest("a"))),
            ("nothing is there", false, false, |all, why| all.nothing(why)),
            // Of many at once none is named.
            (too_many, false, true, |all, why| all.omit(None, why.to_owned())),
        ];
        for (reason, has_record, fails, note) in cases {
            let omissions = Omissions::default();
            note(&omissions, reason);
            let told = told(&omissions);
            let record = digest("a").to_string();
            assert_eq!(told.warnings.len(), 1, "{reason}");
            for text in [&told.warnings[0], &told.log] {
                assert!(text.contains(reason), "{text}");
                assert_eq!(text.contains(&record), has_record, "{text}");
            }
            assert!(
                told.log.contains(" WARN ") && told.log.contains("to a registry"),
                "{}",
                told.log
            );
            let mut entry = serde_json::json!({ "reason": reason });
            if has_record {
                entry["record"] = record.clone().into();
            }
            assert_eq!(told.response, [entry]);
            match omissions.check_complete() {
                Ok(()) => assert!(!fails, "{reason}"),
                Err(error) => {
                    let error = error.to_string();
                    assert!(
                        fails && error.contains(reason) && error.contains("left out 1 result,"),
                        "{error}"
                    );
                    assert_eq!(error.contains(&record), has_record, "{error}");
                }
            }
        }
    }
}

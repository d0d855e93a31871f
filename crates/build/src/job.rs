//! One build as the engine sees it: its session, its settings, its progress, its memory of what it resolved.

use std::any::Any;
use std::collections::BTreeMap;
use std::fmt;
use std::future::Future;
use std::sync::{Arc, Mutex};
use std::time::SystemTime;

use crate::error::BuildError;
use crate::progress::JobProgress;
use crate::session::SessionId;
use crate::trace::Trace;

/// Names a job: the client's `Ref` of the solve.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct JobId(pub String);

impl fmt::Display for JobId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

/// A right beyond the ordinary that a build asks for.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Entitlement {
    /// `network.host`.
    NetworkHost,
    /// `security.insecure`.
    SecurityInsecure,
    /// `device` or `device=name[,alias=other]`: devices; `None`: all.
    Device(Option<DeviceGrant>),
}

/// The right to some devices.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct DeviceGrant {
    /// A device, a kind or a class, as steps name them.
    pub device: String,
    /// Under which name steps get it; `None`: its own.
    pub alias: Option<String>,
}

/// What a build was started with and what its steps must respect.
#[derive(Clone, Debug, Default)]
pub struct JobSettings {
    /// The client's session; `None`: the build has none.
    pub session: Option<SessionId>,
    /// Rights granted, i.e. asked for and allowed by the daemon.
    pub entitlements: Vec<Entitlement>,
    /// Source policies that apply to all definitions of the build, in order.
    pub source_policies: Vec<llb::sourcepolicy::Policy>,
    /// The session that is asked for policy decisions.
    pub policy_session: Option<SessionId>,
    /// Whether steps reach the network by nothing but a proxy that policies decide for.
    pub proxy_network: bool,
    /// Not shown in the build history.
    pub is_internal: bool,
    /// The trace that the build belongs to; `None`: none is kept.
    pub trace: Option<Trace>,
    /// Say in a step's log why it is executed.
    pub explain: bool,
    /// Whether sources must be asked.
    pub resolve_cache: ResolveCache,
}

/// Whether a source's answer of an earlier build may stand for one that is not to be had. Ordered from the least particular
/// to the most.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord)]
pub enum ResolveCache {
    /// `offline`: sources are not asked, an earlier answer is used.
    Offline,
    /// `fallback`: an earlier answer is used when a source cannot be reached, with a warning.
    Fallback,
    /// `required`: sources are asked in every build, as BuildKit does.
    #[default]
    Required,
}

/// A text that names no [`ResolveCache`].
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("invalid resolve cache {0:?}: it is required, fallback or offline")]
pub struct ResolveCacheError(String);

impl std::str::FromStr for ResolveCache {
    type Err = ResolveCacheError;

    fn from_str(text: &str) -> Result<Self, ResolveCacheError> {
        match text {
            "required" => Ok(Self::Required),
            "fallback" => Ok(Self::Fallback),
            "offline" => Ok(Self::Offline),
            _ => Err(ResolveCacheError(text.to_owned())),
        }
    }
}

type Slot = Arc<tokio::sync::Mutex<Option<Arc<dyn Any + Send + Sync>>>>;

/// One build.
pub struct Job {
    id: JobId,
    number: u64,
    unique_id: String,
    started_at: SystemTime,
    settings: JobSettings,
    progress: JobProgress,
    memo: Mutex<BTreeMap<String, Slot>>,
}

impl Job {
    /// Makes a job; `number` is unique in the process.
    pub fn new(id: JobId, number: u64, settings: JobSettings) -> Arc<Self> {
        let started_at = SystemTime::now();
        let seed = format!("{} {number} {started_at:?} {id}", std::process::id());
        Arc::new(Self {
            id,
            number,
            unique_id: oci::Digest::sha256(seed).hex().chars().take(25).collect(),
            started_at,
            settings,
            progress: JobProgress::new(),
            memo: Mutex::default(),
        })
    }

    /// Returns the client's name of the build.
    pub fn id(&self) -> &JobId {
        &self.id
    }

    /// Returns the job's number, unique in the process and not chosen by the client.
    pub fn number(&self) -> u64 {
        self.number
    }

    /// Returns a name of the build that the client did not choose and that no other daemon uses.
    pub fn unique_id(&self) -> String {
        self.unique_id.clone()
    }

    /// Returns when the build was started.
    pub fn started_at(&self) -> SystemTime {
        self.started_at
    }

    /// Returns the client's session.
    pub fn session(&self) -> Option<&SessionId> {
        self.settings.session.as_ref()
    }

    /// Returns the settings.
    pub fn settings(&self) -> &JobSettings {
        &self.settings
    }

    /// Returns the trace that the build belongs to, if one is kept.
    pub fn trace(&self) -> Option<&Trace> {
        self.settings.trace.as_ref()
    }

    /// Returns the build's progress.
    pub fn progress(&self) -> &JobProgress {
        &self.progress
    }

    /// Lets go of what the build resolved: a job that has ended is still known for its progress, and must hold nothing else.
    pub fn forget(&self) {
        let mut memo = self
            .memo
            .lock()
            .unwrap_or_else(std::sync::PoisonError::into_inner);
        memo.clear();
    }

    fn slot(&self, key: &str) -> Slot {
        let mut memo = self
            .memo
            .lock()
            .unwrap_or_else(std::sync::PoisonError::into_inner);
        Arc::clone(memo.entry(key.to_owned()).or_default())
    }
}

impl fmt::Debug for Job {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Job")
            .field("id", &self.id)
            .field("number", &self.number)
            .finish_non_exhaustive()
    }
}

/// Computes a value once for a set of builds: the first build that knows it lends it to the others.
pub async fn memo<T, F>(jobs: &[Arc<Job>], key: &str, compute: F) -> Result<Arc<T>, BuildError>
where
    T: Any + Send + Sync,
    F: Future<Output = Result<T, BuildError>> + Send,
{
    // In the order of the jobs' numbers, so that two vertices that share jobs cannot wait for each other.
    let mut slots: Vec<(u64, Slot)> = jobs.iter().map(|job| (job.number, job.slot(key))).collect();
    slots.sort_by_key(|(number, _)| *number);
    let mut guards = Vec::with_capacity(slots.len());
    for (_, slot) in slots {
        guards.push(slot.lock_owned().await);
    }
    let known = guards
        .iter()
        .find_map(|guard| guard.as_ref().and_then(|v| Arc::clone(v).downcast::<T>().ok()));
    let value = match known {
        Some(value) => value,
        None => Arc::new(compute.await?),
    };
    for mut guard in guards {
        *guard = Some(Arc::clone(&value) as Arc<dyn Any + Send + Sync>);
    }
    Ok(value)
}

//! The local exporter: a result's files into a directory of the client.

use std::collections::BTreeMap;
use std::io::Read;
use std::sync::{Arc, Mutex, PoisonError};

use async_trait::async_trait;
use build::error::{BuildError, ErrorKind};
use build::export::{ExportContext, ExportSource, Exported, Exporter, ExporterInstance};
use build::op::ResultRef;
use build::progress::StatusStep;
use build::result::Attestation;
use build::session::{FilePacket, FileStream, Session, SessionError};
use build::unlazy::{FetchContext, Unlazy};
use bytes::Bytes;
use oci::{Digest, Digester};
use tokio::sync::mpsc;

use super::files::{Files, Part, WalkError};
use super::image::{is_inline_only, statement_files};
use super::platforms::{EPOCH_ATTRIBUTE, epoch, parse_epoch, refs};

use layer::tree::Timestamp;

/// Bytes of a file in one packet.
const PIECE_BYTES: usize = 64 << 10;
/// Go's `os.ModeType`.
const MODE_TYPE: u32 = 0x8f28_0000;

/// How files are laid out for the client.
#[derive(Clone, Debug, Default)]
pub(super) struct Layout {
    /// The time that all entries get.
    epoch: Option<Timestamp>,
    /// Whether each platform goes into a directory of its own; `None`: if there are several.
    platform_split: Option<bool>,
    /// The client empties the directory before.
    deletes: bool,
    /// Put before the names of attestations.
    attestation_prefix: String,
}

impl Layout {
    /// Reads exporter attributes; unknown ones are left to the client, as BuildKit does.
    pub fn read(attrs: &BTreeMap<String, String>) -> Result<Self, BuildError> {
        let mut layout = Self::default();
        for (key, value) in attrs {
            match key.as_str() {
                EPOCH_ATTRIBUTE => layout.epoch = parse_epoch(value)?,
                "platform-split" => {
                    layout.platform_split = Some(boolean(value).ok_or_else(|| {
                        BuildError::user(format!("non-bool value for platform-split: {value}"))
                    })?);
                }
                "attestation-prefix" => layout.attestation_prefix.clone_from(value),
                "mode" => match value.trim().to_ascii_lowercase().as_str() {
                    "" | "copy" => layout.deletes = false,
                    "delete" => layout.deletes = true,
                    _ => return Err(BuildError::user(format!("invalid local exporter mode {value:?}"))),
                },
                _ => {}
            }
        }
        Ok(layout)
    }

    /// Works out the trees of an export and makes them real. `always_split`: several platforms always get directories of
    /// their own.
    pub async fn parts(
        &self,
        unlazy: &dyn Unlazy,
        ctx: &ExportContext,
        source: &ExportSource,
        always_split: bool,
    ) -> Result<Vec<Part>, BuildError> {
        let is_map = !source.refs.is_empty();
        let split = if always_split {
            is_map
        } else {
            self.platform_split.unwrap_or(is_map)
        };
        let mut parts = Vec::new();
        for (platform, reference) in refs(source)? {
            let epoch = match self.epoch {
                Some(epoch) => Some(epoch),
                None => epoch(source, Some(&platform.id))?,
            };
            let directory = platform.id.replace('/', "_");
            let suffix = if is_map && !split {
                format!(".{directory}")
            } else {
                String::new()
            };
            let prefix = if split { directory } else { String::new() };
            let fetch = FetchContext::from(ctx);
            if let Some(reference) = reference.get() {
                unlazy.unpack(&fetch, reference).await?;
            }
            let mut part = Part {
                reference,
                prefix,
                epoch,
                extra: BTreeMap::new(),
            };
            let attestations = source.attestations.get(&platform.id).into_iter().flatten();
            let attestations: Vec<_> = attestations.filter(|one| !is_inline_only(one)).cloned().collect();
            if !attestations.is_empty() {
                part.extra = self
                    .statements(unlazy, &fetch, &part, attestations, &suffix)
                    .await?;
            }
            parts.push(part);
        }
        // The order of the transfer protocol is that of names.
        parts.sort_by(|a, b| a.prefix.cmp(&b.prefix));
        Ok(parts)
    }

    /// The attestations of a tree as files of its root directory.
    async fn statements(
        &self,
        unlazy: &dyn Unlazy,
        ctx: &FetchContext,
        part: &Part,
        attestations: Vec<Attestation<ResultRef>>,
        suffix: &str,
    ) -> Result<BTreeMap<String, Bytes>, BuildError> {
        let tree = Part {
            prefix: String::new(),
            ..part.clone()
        };
        let files = blocking(move || digests(&tree)).await?;
        let mut named = BTreeMap::new();
        for (name, bytes) in statement_files(unlazy, ctx, attestations, files).await? {
            let name = format!("{}{name}", self.attestation_prefix);
            let name = match name.rfind('.') {
                Some(dot) => format!("{}{suffix}{}", &name[..dot], &name[dot..]),
                None => format!("{name}{suffix}"),
            };
            if name.contains('/') || matches!(name.as_str(), "" | "." | "..") {
                return Err(BuildError::user(format!(
                    "invalid attestation path name {name:?}"
                )));
            }
            if named.insert(name.clone(), bytes).is_some() {
                return Err(BuildError::user(format!(
                    "duplicate attestation path name {name}"
                )));
            }
        }
        Ok(named)
    }
}

/// Digests of a tree's regular files, by path.
fn digests(part: &Part) -> Result<Vec<(String, Digest)>, BuildError> {
    let files = Files::open(part)?;
    let mut found = Vec::new();
    files.walk(&mut |stat| {
        if stat.mode & MODE_TYPE == 0 {
            let mut digester = Digester::sha256();
            let read = |source| WalkError::Read {
                path: stat.path.clone(),
                source,
            };
            std::io::copy(&mut files.open_file(&stat.path)?, &mut digester).map_err(read)?;
            found.push((stat.path, digester.finish()));
        }
        Ok(())
    })?;
    Ok(found)
}

fn boolean(value: &str) -> Option<bool> {
    match value {
        "1" | "t" | "T" | "true" | "TRUE" | "True" => Some(true),
        "0" | "f" | "F" | "false" | "FALSE" | "False" => Some(false),
        _ => None,
    }
}

/// Finds the client that an export goes to.
pub(super) async fn client(ctx: &ExportContext) -> Result<Arc<dyn Session>, BuildError> {
    Ok(ctx.sessions.any(|session| async { Ok(session) }).await?)
}

/// Makes local exporters.
#[derive(Debug)]
pub struct LocalExporter {
    unlazy: Arc<dyn Unlazy>,
}

impl LocalExporter {
    /// Makes an exporter that fetches lazy refs through `unlazy`.
    pub fn new(unlazy: Arc<dyn Unlazy>) -> Self {
        Self { unlazy }
    }
}

impl Exporter for LocalExporter {
    fn resolve(
        &self,
        id: usize,
        attrs: BTreeMap<String, String>,
    ) -> Result<Arc<dyn ExporterInstance>, BuildError> {
        let layout = Layout::read(&attrs)?;
        Ok(Arc::new(LocalInstance {
            id,
            layout,
            unlazy: Arc::clone(&self.unlazy),
        }))
    }
}

#[derive(Debug)]
struct LocalInstance {
    id: usize,
    layout: Layout,
    unlazy: Arc<dyn Unlazy>,
}

#[async_trait]
impl ExporterInstance for LocalInstance {
    fn name(&self) -> &str {
        "exporting to client directory"
    }

    async fn export(&self, ctx: &ExportContext, source: &ExportSource) -> Result<Exported, BuildError> {
        let parts = self.layout.parts(&*self.unlazy, ctx, source, false).await?;
        let session = client(ctx).await?;
        let is_split = parts.iter().any(|part| !part.prefix.is_empty());
        if !is_split && parts.len() > 1 {
            let names = refs(source)?
                .into_iter()
                .map(|(platform, _)| platform.id)
                .collect();
            check_overlaps(&parts, names).await?;
        }
        if self.layout.deletes {
            // The client removes what is not in the transfer, so everything goes in one.
            let headers = BTreeMap::from([("buildkit-exporter-multi-platform".to_owned(), "1".to_owned())]);
            self.send(ctx, &*session, parts, "copying files".to_owned(), &headers)
                .await?;
        } else {
            for part in parts {
                let label = match part.prefix.as_str() {
                    "" => "copying files".to_owned(),
                    prefix => format!("copying files {}", prefix.replace('_', "/")),
                };
                self.send(ctx, &*session, vec![part], label, &BTreeMap::new())
                    .await?;
            }
        }
        Ok(Exported::default())
    }
}

impl LocalInstance {
    async fn send(
        &self,
        ctx: &ExportContext,
        session: &dyn Session,
        parts: Vec<Part>,
        label: String,
        headers: &BTreeMap<String, String>,
    ) -> Result<(), BuildError> {
        let stream = session.send_tree(&self.id.to_string(), headers).await?;
        let step = ctx.progress.step(label, "transferring");
        let sending = send_trees(stream, parts, step);
        tokio::select! {
            sent = sending => sent,
            () = ctx.cancel.cancelled() => Err(BuildError::canceled()),
        }
    }
}

/// Without directories per platform no file may come from two of them.
async fn check_overlaps(parts: &[Part], names: Vec<String>) -> Result<(), BuildError> {
    let parts = parts.to_vec();
    blocking(move || {
        let mut seen: BTreeMap<String, usize> = BTreeMap::new();
        for (at, part) in parts.iter().enumerate() {
            Files::open(part)?.walk(&mut |stat| {
                if stat.mode & MODE_TYPE != 0 {
                    return Ok(());
                }
                let Some(earlier) = seen.insert(stat.path.clone(), at) else {
                    return Ok(());
                };
                let (path, from, with) = (&stat.path, &names[earlier], &names[at]);
                let reason =
                    format!("cannot overwrite {path} from {from} with {with} when split option is disabled");
                Err(WalkError::Stopped(reason))
            })?;
        }
        Ok(())
    })
    .await
}

/// Paths of regular files by their number in the listing, with the part they are in.
type Offered = Mutex<BTreeMap<u32, (usize, String)>>;

/// Sends trees as one listing and then serves what the client asks for, until it has all it wants.
///
/// Listing and serving run at once: the client asks while it reads, and a full queue on one side must not block the other.
async fn send_trees(stream: FileStream, parts: Vec<Part>, step: StatusStep) -> Result<(), BuildError> {
    let FileStream { incoming, outgoing } = stream;
    let opened = blocking(move || parts.iter().map(Files::open).collect::<Result<Vec<_>, _>>()).await?;
    let files = Arc::new(opened);
    let offered: Arc<Offered> = Arc::default();
    let listing = {
        let (files, offered, outgoing) = (Arc::clone(&files), Arc::clone(&offered), outgoing.clone());
        blocking(move || list(&files, &offered, &outgoing))
    };
    let serving = blocking(move || serve(&files, &offered, incoming, &outgoing, step));
    let (listed, served) = tokio::join!(listing, serving);
    // What the client says about a failed transfer explains more than that the listing could not be sent.
    served?;
    listed
}

fn list(files: &[Files], offered: &Offered, outgoing: &mpsc::Sender<FilePacket>) -> Result<(), BuildError> {
    let send = |packet| {
        outgoing
            .blocking_send(packet)
            .map_err(|_| WalkError::Stopped("the client left the transfer".to_owned()))
    };
    let mut next = 0_u32;
    for (part, tree) in files.iter().enumerate() {
        let walked = tree.walk(&mut |stat| {
            if stat.mode & MODE_TYPE == 0 {
                offered
                    .lock()
                    .unwrap_or_else(PoisonError::into_inner)
                    .insert(next, (part, stat.path.clone()));
            }
            next += 1;
            send(FilePacket::Stat(Some(stat)))
        });
        if let Err(error) = walked {
            let _ = outgoing.blocking_send(FilePacket::Failed(error.to_string()));
            return Err(error.into());
        }
    }
    Ok(send(FilePacket::Stat(None))?)
}

fn serve(
    files: &[Files],
    offered: &Offered,
    mut incoming: mpsc::Receiver<Result<FilePacket, SessionError>>,
    outgoing: &mpsc::Sender<FilePacket>,
    mut step: StatusStep,
) -> Result<(), BuildError> {
    let left = || BuildError::new(ErrorKind::Unavailable, "the client left the transfer");
    let mut sent_bytes = 0;
    loop {
        match incoming.blocking_recv().ok_or_else(left)?? {
            FilePacket::Request(id) => {
                let asked = offered.lock().unwrap_or_else(PoisonError::into_inner).remove(&id);
                let (part, path) = asked.ok_or_else(|| BuildError::user(format!("invalid file id {id}")))?;
                let tree = files
                    .get(part)
                    .ok_or_else(|| BuildError::internal("a file of no part"))?;
                sent_bytes += send_file(tree, &path, id, outgoing)?;
                step.update(sent_bytes, 0);
            }
            FilePacket::Fin => {
                outgoing.blocking_send(FilePacket::Fin).map_err(|_| left())?;
                return Ok(());
            }
            FilePacket::Failed(message) => {
                return Err(BuildError::user(format!("error from receiver: {message}")));
            }
            FilePacket::Stat(_) | FilePacket::Content { .. } => {
                return Err(BuildError::user(
                    "file transfer: the receiver sent what only a sender sends",
                ));
            }
        }
    }
}

fn send_file(
    files: &Files,
    path: &str,
    id: u32,
    outgoing: &mpsc::Sender<FilePacket>,
) -> Result<u64, BuildError> {
    let left = |_| BuildError::new(ErrorKind::Unavailable, "the client left the transfer");
    let mut file = files.open_file(path)?;
    let mut sent_bytes = 0;
    loop {
        let mut piece = vec![0; PIECE_BYTES];
        let count = file.read(&mut piece).map_err(|source| WalkError::Read {
            path: path.to_owned(),
            source,
        })?;
        piece.truncate(count);
        let packet = FilePacket::Content {
            id,
            bytes: Bytes::from(piece),
        };
        outgoing.blocking_send(packet).map_err(left)?;
        if count == 0 {
            return Ok(sent_bytes);
        }
        sent_bytes += u64::try_from(count).unwrap_or(0);
    }
}

pub(super) async fn blocking<T: Send + 'static>(
    work: impl FnOnce() -> Result<T, BuildError> + Send + 'static,
) -> Result<T, BuildError> {
    tokio::task::spawn_blocking(work)
        .await
        .map_err(|error| BuildError::internal(format!("export: {error}")))?
}

//! The local source: a client's directory, kept between builds so that only what changed is transferred.
//!
//! The tree of each shared key is a retained mutable ref; each build takes it, brings it up to date and commits it. Beside
//! the tree, a [`manifest`] says what the client had at the last transfer. A file counts as unchanged when its attributes
//! are those of the manifest *and* it was not modified so shortly before that transfer that a later edit could have
//! left the same times (a racily clean entry); everything else is transferred again. Clients of this project also tell when
//! the inode last changed, which no edit can take back.

mod attributes;
mod listing;
mod manifest;
mod order;
mod receive;
mod tree;

use async_trait::async_trait;
use build::error::{BuildError, ErrorKind};
use build::op::{CacheMap, Op, OpContext, OpProvenance, ResultRef, VertexSpec};
use build::session::{FilePacket, Session, SessionError, SessionId, SyncRequest};
use cache::{MutableRef, RecordType, RefId, RefOptions, Store};
use oci::Digest;
use tokio::sync::mpsc;

use attributes::Attributes;

/// Packets on their way from the client to the thread that writes them.
const QUEUED_PACKETS: usize = 256;

/// One `local://` vertex.
#[derive(Debug)]
pub struct LocalOp {
    store: Store,
    attributes: Attributes,
}

impl LocalOp {
    /// Makes the op of a vertex whose identifier begins with `local://`.
    ///
    /// # Errors
    /// A user error for attributes that cannot be understood.
    pub fn new(vertex: &VertexSpec, store: Store) -> Result<Self, BuildError> {
        Ok(Self {
            store,
            attributes: Attributes::read(vertex)?,
        })
    }

    /// The session that the vertex names, or the first one of the build.
    fn session_id(&self, ctx: &OpContext) -> Result<SessionId, BuildError> {
        if let Some(id) = &self.attributes.session {
            return Ok(id.clone());
        }
        ctx.sessions().ids().first().cloned().ok_or_else(|| {
            BuildError::new(
                ErrorKind::Unavailable,
                "could not access local files without session",
            )
        })
    }

    async fn transfer(&self, ctx: &OpContext) -> Result<cache::ImmutableRef, BuildError> {
        let group = ctx.sessions();
        let mut last = None;
        if let Some(id) = &self.attributes.session {
            match group.get(id).await {
                Ok(session) => match self.transfer_from(ctx, &*session).await {
                    Ok(reference) => return Ok(reference),
                    Err(Refusal::Directory(error)) => last = Some(error),
                    Err(Refusal::Failed(error)) => return Err(error),
                },
                Err(error) => last = Some(BuildError::from(error)),
            }
        }
        for id in group.ids() {
            let attempt = match group.get(id).await {
                Ok(session) => self.transfer_from(ctx, &*session).await,
                Err(error) => Err(Refusal::Directory(error.into())),
            };
            match attempt {
                Ok(reference) => return Ok(reference),
                Err(Refusal::Directory(error)) => last = Some(error),
                Err(Refusal::Failed(error)) => return Err(error),
            }
        }
        Err(last.unwrap_or_else(|| {
            BuildError::new(
                ErrorKind::Unavailable,
                "could not access local files without session",
            )
        }))
    }

    async fn transfer_from(
        &self,
        ctx: &OpContext,
        session: &dyn Session,
    ) -> Result<cache::ImmutableRef, Refusal> {
        let request = SyncRequest {
            dir_name: self.attributes.name.clone(),
            include_patterns: self.attributes.include_patterns.clone(),
            exclude_patterns: self.attributes.exclude_patterns.clone(),
            follow_paths: self.attributes.follow_paths.clone(),
        };
        let stream = session
            .sync_dir(request)
            .await
            .map_err(|error| Refusal::Directory(error.into()))?;
        let shared_key = self.attributes.shared_key(session.shared_key());
        let step = ctx
            .progress()
            .step(format!("transferring {}:", self.attributes.name), "transferring");
        let (incoming, pump) = Pump::new(stream.incoming, ctx);
        let receiver = receive::Receiver::new(incoming, stream.outgoing, self.attributes.clone(), step);
        let (store, name) = (self.store.clone(), self.attributes.name.clone());
        let writer = tokio::task::spawn_blocking(move || {
            let reference = take(&store, &shared_key, &name)?;
            receiver.run(reference, &shared_key)
        });
        let (written, ()) = tokio::join!(writer, pump.run());
        let written = written.map_err(|error| BuildError::internal(format!("local source: {error}")));
        match written.and_then(|result| result) {
            Ok(reference) => Ok(reference),
            Err(_) if ctx.cancel().is_cancelled() => Err(Refusal::Failed(BuildError::canceled())),
            Err(error) if error.kind() == ErrorKind::NotFound => Err(Refusal::Directory(error)),
            Err(error) => Err(Refusal::Failed(error)),
        }
    }
}

/// Why a session did not yield the directory.
enum Refusal {
    /// It does not have the directory; another session of the build may.
    Directory(BuildError),
    /// The transfer failed.
    Failed(BuildError),
}

/// Forwards packets to the writing thread and stops doing so when the step is cancelled, which ends the thread.
struct Pump<'a> {
    from: mpsc::Receiver<Result<FilePacket, SessionError>>,
    to: mpsc::Sender<Result<FilePacket, SessionError>>,
    ctx: &'a OpContext,
}

impl<'a> Pump<'a> {
    fn new(
        from: mpsc::Receiver<Result<FilePacket, SessionError>>,
        ctx: &'a OpContext,
    ) -> (mpsc::Receiver<Result<FilePacket, SessionError>>, Self) {
        let (to, incoming) = mpsc::channel(QUEUED_PACKETS);
        (incoming, Self { from, to, ctx })
    }

    async fn run(mut self) {
        loop {
            let packet = tokio::select! {
                packet = self.from.recv() => packet,
                () = self.ctx.cancel().cancelled() => return,
                () = self.to.closed() => return,
            };
            let Some(packet) = packet else { return };
            if self.to.send(packet).await.is_err() {
                return;
            }
        }
    }
}

/// Takes the tree of a shared key if nobody else holds it, or makes a new one.
fn take(store: &Store, shared_key: &str, name: &str) -> Result<MutableRef, BuildError> {
    let internal = |error| BuildError::from_source(ErrorKind::Internal, error);
    let known: Vec<RefId> = store.search_index(shared_key).map_err(internal)?;
    for id in known {
        // One that is held by another build, or was just collected, is not an error: there may be others.
        if let Ok(reference) = store.get_mutable(&id) {
            return Ok(reference);
        }
    }
    let options = RefOptions {
        description: format!("local source for {name}"),
        record_type: RecordType::SourceLocal,
        ..RefOptions::default()
    };
    store.create_mutable(None, options).map_err(internal)
}

#[async_trait]
impl Op for LocalOp {
    fn shows_cache_map(&self) -> bool {
        false
    }

    async fn cache_map(&self, ctx: &OpContext, _: u32) -> Result<CacheMap, BuildError> {
        let key = self.attributes.key(&self.session_id(ctx)?)?;
        Ok(CacheMap {
            digests: vec![super::key_digest(&key)],
            ephemeral: true,
            ..CacheMap::default()
        })
    }

    async fn content_digest(
        &self,
        _: &OpContext,
        _: usize,
        _: &ResultRef,
    ) -> Result<Option<Digest>, BuildError> {
        Ok(None)
    }

    async fn exec(&self, ctx: &OpContext, _: &[ResultRef]) -> Result<Vec<Option<ResultRef>>, BuildError> {
        Ok(vec![Some(ResultRef::new(self.transfer(ctx).await?))])
    }

    fn provenance(&self) -> Option<OpProvenance> {
        let source = Some(format!("local://{}", self.attributes.name));
        Some(OpProvenance {
            source,
            ..OpProvenance::default()
        })
    }
}
